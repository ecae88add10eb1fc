"""The counter-based generator and its transforms by their definitions: integers exact, real numbers in float64.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011). Words are int64 tensors that hold 32 bits each.
A stream is a seed and two words; its element e, with b = e // 64, p = e % 64, l = p % 16 and j = p // 16, takes word j
of counter number n = 16 b + l, which is (n mod 2^32, n // 2^32, words[0], words[1]). Normals pair words (0, 1) and
(2, 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85  # of the key, a round
ROUNDS = 10
LANES = 16  # counters of a block
BLOCK = 64  # elements of a block


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # High and low half. The full product needs an unsigned 64th bit, so the word goes in 16 bits at a time.
    low, high = (word & 0xFFFF) * multiplier, (word >> 16) * multiplier
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & MASK


def philox(seed: int, counters: Tensor) -> Tensor:
    """Random words of counters, both [..., 4] int64 of 32 bits each; the seed is taken modulo 2^64.

    Not differentiable; deterministic; does not synchronise. Paper: "Parallel random numbers: as easy as 1, 2, 3".
    """
    key = [seed & MASK, seed >> 32 & MASK]
    c0, c1, c2, c3 = counters.unbind(-1)
    for _ in range(ROUNDS):
        (high0, low0), (high2, low2) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ key[0], low2, high0 ^ c3 ^ key[1], low0
        key = [(k + step) & MASK for k, step in zip(key, STEPS, strict=True)]
    return torch.stack([c0, c1, c2, c3], -1)


def stream_words(seed: int, words: tuple[int, int], n: int) -> Tensor:
    """The random words of the first n elements of a stream, [n] int64."""
    blocks = -(-n // BLOCK)
    number = torch.arange(blocks * LANES)
    word2, word3 = (torch.full_like(number, word) for word in words)
    counters = torch.stack([number & MASK, number >> 32, word2, word3], -1)
    lanes = philox(seed, counters).view(blocks, LANES, 4)
    return lanes.transpose(1, 2).reshape(-1)[:n]


def uniform(seed: int, words: tuple[int, int], n: int) -> Tensor:
    """The first n elements of a stream as uniform numbers, [n] float64: the top 23 bits and a half, in (0, 1)."""
    return ((stream_words(seed, words, n) >> 9).double() + 0.5) / 2**23


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(-2 ln u) times cosine and sine of 2 pi v, with u and v = (word + 1/2) / 2^32 of int64 words; float64.

    u and v are exact, so the error is some 1e-15, of the value and absolute.
    """
    u, v = (radius.double() + 0.5) / 2**32, (angle.double() + 0.5) / 2**32
    r = torch.sqrt(-2 * torch.log(u))
    return r * torch.cos(2 * math.pi * v), r * torch.sin(2 * math.pi * v)


def normal(seed: int, words: tuple[int, int], n: int) -> Tensor:
    """The first n elements of a stream as standard normals, [n] float64 (Box, Muller, 1958)."""
    blocks = -(-n // BLOCK)
    pairs = stream_words(seed, words, blocks * BLOCK).view(blocks, 2, 2, LANES)
    return torch.stack(box_muller(pairs[:, :, 0], pairs[:, :, 1]), 2).reshape(-1)[:n]
