"""Averages of weights by their definitions, one tensor after the other.

The lists of several averages, sources or moments are flat, as in the registered ops: with T weights, the k-th average
of weight i is ``averages[k * T + i]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnuggets.reference.philox import philox

EXPONENT = 0x7F800000  # of a float32


def average_update(averages: Sequence[Tensor], weights: Sequence[Tensor], rates: Tensor) -> list[Tensor]:
    """a + rate (w - a) for each of the averages."""
    return [
        a + rate.to(a) * (weights[i % len(weights)].to(a) - a)
        for k, rate in enumerate(rates)
        for i, a in enumerate(averages[k * len(weights) : (k + 1) * len(weights)], k * len(weights))
    ]


def swag_update(
    mean: Sequence[Tensor],
    m2: Sequence[Tensor],
    deviations: Sequence[Tensor],
    weights: Sequence[Tensor],
    n: int,
    row: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Welford's step after `n` weights: mean, sum of squared deviations, and w - mean as row `row` of each [K, ...]."""
    new_mean = [m + (w.to(m) - m) / (n + 1) for m, w in zip(mean, weights, strict=True)]
    triples = zip(mean, new_mean, weights, strict=True)
    new_m2 = [s + (w.to(m) - m) * (w.to(m) - now) for s, (m, now, w) in zip(m2, triples, strict=True)]
    rings = [ring.clone() for ring in deviations]
    for ring, w, now in zip(rings, weights, new_mean, strict=bool(rings)):
        ring[row] = w.to(now) - now
    return new_mean, new_m2, rings


def weighted_sum(sources: Sequence[Tensor], coefficients: Tensor) -> list[Tensor]:
    """Σ_k c_k source_k for K sources of T tensors each, ``sources[k * T + i]``."""
    count = len(sources) // len(coefficients)
    return [sum(c * sources[k * count + i] for k, c in enumerate(coefficients)) for i in range(count)]


def stochastic_bfloat16(values: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """float32 `values` rounded up or down to bfloat16 with the probabilities that make the mean exact.

    Element e adds a 16-bit number to the bits that are cut off: half h = (e % 128) // 16 (low halves first) of the
    words of counter 16 (e // 128) + e % 16.
    """
    bits = values.float().flatten().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    e = torch.arange(len(bits))
    number = 16 * (e // 128) + e % 16
    counters = torch.stack(
        [number & 0xFFFFFFFF, number >> 32, torch.full_like(e, step & 0xFFFFFFFF), torch.full_like(e, stream)], 1
    )
    words = philox(seed, counters)  # [n, 4]
    half = (e % 128) // 16
    noise = (words.gather(1, (half // 2)[:, None]).squeeze(1) >> (16 * (half % 2))) & 0xFFFF
    finite = (bits & EXPONENT) != EXPONENT
    rounded = ((bits + noise) >> 16).to(torch.int32) << 16
    as_float = rounded.view(torch.float32).bfloat16()
    return torch.where(finite, as_float, values.flatten().bfloat16()).view(values.shape)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 `values` as a bfloat16 (ties away from zero) and the int16 that brings them back."""
    values = torch.where(values.isnan(), torch.nan, values.float())
    bits = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    high = ((bits + 0x8000) >> 16) & 0xFFFF
    low = bits - (high << 16)
    return (high << 16).to(torch.int32).view(torch.float32).bfloat16(), low.to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that `split` took apart."""
    bits = (high.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + low.to(torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def sgd_step(
    weight: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    *,
    lr: float,
    momentum_rate: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
) -> tuple[Tensor, Tensor | None]:
    """One step of SGD as `torch.optim.SGD` defines it: the new weight and the new momentum."""
    grad = grad + weight_decay * weight
    if momentum is not None:
        momentum = grad if first else momentum_rate * momentum + (1 - dampening) * grad
        grad = grad + momentum_rate * momentum if nesterov else momentum
    return weight - lr * grad, momentum


def adamw_step(
    weight: Tensor,
    grad: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step number `step` (from 1) of AdamW as `torch.optim.AdamW` defines it."""
    weight = weight * (1 - lr * weight_decay)
    first_moment = betas[0] * first_moment + (1 - betas[0]) * grad
    second_moment = betas[1] * second_moment + (1 - betas[1]) * grad * grad
    mean, variance = first_moment / (1 - betas[0] ** step), second_moment / (1 - betas[1] ** step)
    return weight - lr * mean / (variance.sqrt() + eps), first_moment, second_moment
