"""Golden values of the noise, made from its definition and not by a kernel: `python tests/test_sample_golden.py`.

The file holds 1000 elements of each kind, float64, for one key whose four halves differ. Whoever writes this generator
again compares with it, or with the few that csrc/sample/README.md prints.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnuggets import ops, reference
from fastnuggets.ops.sample import KINDS

FILE = Path(__file__).with_name("sample_golden.npz")
README = Path(__file__).parent.parent / "csrc" / "sample" / "README.md"

SEED, OFFSET = 0x0123456789ABCDEF, 0x0F1E2D3C4B5A6978
KEY = torch.tensor([SEED, OFFSET])
N = 1000
DROPPED, ALPHA_P = 0.3, 0.2  # of dropout and of Gaussian dropout, whose deviation is then 1 / 2
PARAMETER = {"keep": 1 - DROPPED, "gain": 0.5}

# How far float32 may be off: units of the last place, and absolute. The README says what was seen over all words; to
# that comes the product and the sum of `gain`.
ALLOWED = {
    "normal": (3.2, 0),
    "uniform": (0, 0),
    "laplace": (2, 0),
    "logistic": (0, 1e-6),
    "gumbel": (0, 1e-6),
    "exponential": (2, 0),
    "sign": (0, 0),
    "keep": (0.5, 0),
    "gain": (0, 6e-7),
}


def defined(kind):
    return reference.noise(KEY, kind, (N,), PARAMETER.get(kind, 0.0)).numpy()


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return dict(file)


def drawn(kind, n=N):
    if kind == "keep":
        return ops.dropout(torch.ones(n), DROPPED, key=KEY)
    if kind == "gain":
        return ops.gaussian_dropout(torch.ones(n), ALPHA_P, key=KEY)
    return ops.noise(kind, [n], key=KEY)


# --- the definition once more, in plain Python, as the paper and the README have it -----------------------------------


def word(element):
    """Philox4x32-10 of the element's counter."""
    block, place = divmod(element, 64)
    number = 16 * block + place % 16
    mask = 2**32 - 1
    c = [number & mask, number >> 32, OFFSET & mask, OFFSET >> 32]
    key = [SEED & mask, SEED >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ key[0], second & mask, first >> 32 ^ c[3] ^ key[1], first & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return c[place // 16]


def unit(w):
    return (w + 0.5) / 2**32


def normal(i):
    first = i - i % 32 + i % 16  # the pair's two are 16 apart
    radius, angle = math.sqrt(-2 * math.log(unit(word(first)))), 2 * math.pi * unit(word(first + 16))
    return radius * (math.cos(angle) if i == first else math.sin(angle))


def keep(i):
    half = i % 128 // 16
    w = word(64 * (i // 128) + 16 * (half // 2) + i % 16)
    threshold = math.floor(PARAMETER["keep"] * 2**16 + 0.5)
    return 2**16 / threshold if (w >> 16 * (half % 2) & 0xFFFF) < threshold else 0.0


SPELLED = {
    "normal": normal,
    "uniform": lambda i: ((word(i) >> 9) + 0.5) / 2**23,
    "laplace": lambda i: (1 if word(i) >> 31 else -1) * math.log(unit(word(i) << 1 & 2**32 - 1)),
    "logistic": lambda i: math.log(unit(word(i))) - math.log1p(-unit(word(i))),
    "gumbel": lambda i: -math.log(-math.log(unit(word(i)))),
    "exponential": lambda i: -math.log(unit(word(i))),
    "sign": lambda i: -1.0 if word(i) >> 31 else 1.0,
    "keep": keep,
    "gain": lambda i: 1 + PARAMETER["gain"] * normal(i),
}


@pytest.mark.parametrize("kind", KINDS)
def test_golden_values_are_those_of_the_definition(kind, golden):
    spelled = [SPELLED[kind](i) for i in range(N)]
    # Of two float64 computations; near 0 an angle of 2 pi leaves 1e-15. Seen: 4.4e-16 of the larger of 1 and the value.
    for values in (spelled, defined(kind)):
        np.testing.assert_allclose(golden[kind], values, rtol=1e-15, atol=3e-15)


# --- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_have_the_golden_values(kind, golden):
    units, absolute = ALLOWED[kind]
    error = np.abs(drawn(kind).double().numpy() - golden[kind])
    assert (error <= np.maximum(absolute, units * np.spacing(np.abs(golden[kind]).astype(np.float32)))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_bits_for_any_number_of_threads(kind, threads):
    made = []
    for n in (1, 2, 3):
        threads(n)
        made.append(drawn(kind, 100_003))
    assert torch.equal(made[1], made[0])
    assert torch.equal(made[2], made[0])


# --- what the README prints -------------------------------------------------------------------------------------------

SHOWN = 0, 2, 16, 32, 48, 64, 500, 999


def table(golden):
    lines = [["element", *map(str, SHOWN)], ["---"] * (len(SHOWN) + 1)]
    lines.append(["word", *(f"{word(i):08x}" for i in SHOWN)])
    lines += [[kind, *(f"{np.float32(golden[kind][i]):.9g}" for i in SHOWN)] for kind in KINDS]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def test_readme_prints_the_golden_values(golden):
    """float32 nearest to the definition, with the nine digits that tell it from its neighbours."""
    text = README.read_text()
    assert f"({SEED:#018x}, {OFFSET:#018x})" in text
    assert table(golden) in text


if __name__ == "__main__":
    np.savez_compressed(FILE, **{kind: defined(kind) for kind in KINDS})
    with np.load(FILE) as made:
        print(table(dict(made)))
