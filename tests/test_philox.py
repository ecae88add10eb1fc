"""The generator of csrc/common against Random123's vectors, the definitions in fastnuggets.reference and statistics."""

import ctypes
import hashlib
import math
import platform
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from fastnuggets.reference import philox as reference

sys.path.append(str(Path(__file__).parent / "cuda_executor"))
from building import HERE, build

RELEASE = ("-O3", "-fno-math-errno", "-fno-trapping-math")
PLAIN = ("-O1", "-ffp-contract=off")
BUILDS = [PLAIN, (*RELEASE, "-ffp-contract=fast")]
if platform.machine() == "x86_64":
    BUILDS += [(*flags, "-mavx2", "-mfma") for flags in BUILDS]
ONE_BY_ONE = -1
NAMES = {ONE_BY_ONE: "one by one", 0: "generic", 1: "avx2", 2: "avx512"}

SEED = 0x9E3779B97F4A7C15
WORDS = 0xFFFFFFFF, 7


@cache
def library(flags: tuple[str, ...] = BUILDS[1]) -> ctypes.CDLL:
    return ctypes.CDLL(build(HERE / "philox_driver.cpp", sanitize=False, shared=True, flags=flags))


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def fill(name, dtype, blocks, level=None, flags=BUILDS[1], seed=SEED, words=WORDS, first=0):
    """Words or normals of blocks first, first + 1, ...: [64 * blocks]; by the best instruction set if none is named."""
    lib = library(flags)
    out = torch.empty(64 * blocks, dtype=dtype)
    getattr(lib, name)(
        ctypes.c_int(lib.best_level() if level is None else level),
        ctypes.c_uint64(seed),
        *map(ctypes.c_uint32, words),
        ctypes.c_uint64(first),
        ctypes.c_int64(blocks),
        pointer(out),
    )
    return out


def random_words(blocks, **stream):
    return fill("words", torch.int32, blocks, **stream)


def normals(blocks, **stream):
    return fill("normals", torch.float32, blocks, **stream)


def as_int32(words):  # the same 32 bits
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def uniforms(words):  # int64 of 32 bits -> float32
    words, out = as_int32(words), torch.empty(len(words))
    library().uniforms(pointer(words), ctypes.c_int64(len(words)), pointer(out))
    return out


def pairs(radius, angle, flags=BUILDS[1]):
    radius, angle = as_int32(radius), as_int32(angle)
    cosine, sine = torch.empty(len(radius)), torch.empty(len(radius))
    n = ctypes.c_int64(len(radius))
    library(flags).pairs(pointer(radius), pointer(angle), n, pointer(cosine), pointer(sine))
    return cosine, sine


def shifted(radius, angle, mean, flags):
    radius, angle = as_int32(radius), as_int32(angle)
    out = torch.empty(len(radius))
    n = ctypes.c_int64(len(radius))
    library(flags).shifted(pointer(radius), pointer(angle), n, ctypes.c_float(mean), pointer(out))
    return out


def edges():
    """Words around every power of two and its complement, and around the borders of the quarter turns."""
    near = [w + d for k in range(33) for w in (2**k, 2**32 - 2**k) for d in (-2, -1, 0, 1)]
    near += [w * 2**29 + d for w in range(9) for d in (-2, -1, 0, 1)]
    return torch.tensor(sorted({w for w in near if 0 <= w < 2**32}))


def grid():
    """Radius and angle words: every pair of the edges, and a million of the stream."""
    e = edges()
    stream = reference.stream_words(1, (0, 0), 2**20).view(2, -1)
    radius, angle = torch.cartesian_prod(e, e).unbind(1)
    return torch.cat([radius, stream[0]]), torch.cat([angle, stream[1]])


# ---- the words

# Salmon and others, Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def parse(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_known_answers(counter, key, result):
    low, high = parse(key)
    seed = low | high << 32
    assert reference.philox(seed, torch.tensor(parse(counter))).tolist() == parse(result)
    out = (ctypes.c_uint32 * 4)()
    library().philox_of(ctypes.c_uint64(seed), (ctypes.c_uint32 * 4)(*parse(counter)), out)
    assert list(out) == parse(result)


def levels(flags):
    return [ONE_BY_ONE, *range(library(flags).best_level() + 1)]


@pytest.mark.parametrize("flags", BUILDS, ids=" ".join)
def test_words_follow_the_layout(flags):
    expected = as_int32(reference.stream_words(SEED, WORDS, 64 * 100))
    for level in levels(flags):
        assert torch.equal(random_words(100, level=level, flags=flags), expected), NAMES[level]


def test_counter_number_carries_into_its_high_half():
    first = 2**32 // 16 - 2  # two blocks before the low half starts again
    number = torch.arange(first * 16, (first + 4) * 16)
    counters = torch.stack([number & reference.MASK, number >> 32, *(torch.full_like(number, w) for w in WORDS)], -1)
    expected = as_int32(reference.philox(SEED, counters).view(4, 16, 4).transpose(1, 2).reshape(-1))
    for level in levels(BUILDS[1]):
        assert torch.equal(random_words(4, level=level, first=first), expected), NAMES[level]


def test_every_part_of_a_stream_matters():
    base = random_words(1)
    others = [{"seed": SEED ^ 1}, {"seed": SEED ^ 1 << 63}, {"first": 1}, {"words": (WORDS[0], 8)}, {"words": (0, 7)}]
    for other in others:
        assert not (random_words(1, **other) == base).any(), other


# ---- the same bits

# SHA-256 of the bytes of the first 2^16 normals of the stream above, little-endian float32.
GOLDEN = "d15016c54766a5aed11768c163f04fa839021af57373101eb16625e8ed34194c"


@pytest.mark.parametrize("flags", BUILDS, ids=" ".join)
def test_normals_have_the_same_bits_in_every_build(flags):
    for level in levels(flags):
        bits = normals(2**10, level=level, flags=flags).numpy().tobytes()
        assert hashlib.sha256(bits).hexdigest() == GOLDEN, NAMES[level]


@pytest.mark.parametrize("flags", BUILDS[1:], ids=" ".join)
def test_a_compiler_may_not_contract_a_normal_with_what_it_is_added_to(flags):
    radius, angle = grid()
    assert torch.equal(shifted(radius, angle, 0.3, flags), torch.tensor(0.3) + pairs(radius, angle, PLAIN)[0])


# ---- right values


def ulps(value, exact):
    """The error in units of the last place, less what float64 leaves open of a value near zero."""
    _, exponent = torch.frexp(exact)
    error = (value.double() - exact).abs() - 1e-14
    return torch.ldexp(error, 24 - exponent)


def test_normals_are_right():
    radius, angle = grid()
    exact = torch.cat(reference.box_muller(radius, angle))
    value = torch.cat(pairs(radius, angle))
    # Seen: 3.03 and 6.6e-7.
    assert ulps(value, exact).max() < 4
    assert (value.double() - exact).abs().max() < 8e-7
    assert value.abs().max() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
    assert value.abs().min() > 0


def test_normals_follow_the_layout():
    exact = reference.normal(SEED, WORDS, 64 * 1000)
    assert ulps(normals(1000), exact).max() < 4
    assert torch.equal(reference.normal(SEED, WORDS, 77), exact[:77])


def test_uniforms_are_exact_and_inside():
    words = torch.cat([edges(), reference.stream_words(SEED, WORDS, 2**16)])
    u = uniforms(words)
    assert u.min() == 2**-24
    assert u.max() == 1 - 2**-24
    assert torch.equal(u.double(), ((words >> 9).double() + 0.5) / 2**23)
    assert torch.equal(uniforms(reference.MASK - words), 1 - u)
    assert torch.equal(uniforms(reference.stream_words(SEED, WORDS, 100)).double(), reference.uniform(SEED, WORDS, 100))


# ---- statistics: no seed is chosen, and four deviations are passed by chance once in 16 000

SAMPLES = 2**24


@cache
def sample(word2: int = 0) -> torch.Tensor:
    return normals(SAMPLES // 64, seed=0, words=(word2, 0))


def deviations(values: torch.Tensor, mean: float, variance: float) -> float:
    return (values.mean(dtype=torch.float64).item() - mean) / math.sqrt(variance / values.numel())


def test_moments():
    x = sample().double()
    x2 = x * x
    seen = {
        "mean": deviations(x, 0, 1),
        "variance": deviations(x2, 1, 2),
        "skewness": deviations(x2 * x, 0, 15),
        "kurtosis": deviations(x2 * x2, 3, 96),
    }
    assert max(map(abs, seen.values())) < 4, seen


@pytest.mark.parametrize("bound", [0.01, 0.5, 1, 2, 3, 4, 4.5, 5])
def test_tails(bound):
    x = sample()
    p = math.erfc(bound / math.sqrt(2)) / 2
    for count in (torch.count_nonzero(x > bound).item(), torch.count_nonzero(x < -bound).item()):
        assert abs(count - SAMPLES * p) < 4 * math.sqrt(SAMPLES * p * (1 - p)) + 1, count


def kolmogorov_smirnov(probabilities: torch.Tensor) -> float:
    """sqrt(n) D of values that should be uniform; beyond 1.95 once in 1000 times."""
    p = probabilities.sort().values.double()
    n = len(p)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * torch.maximum(steps[1:] - p, p - steps[:-1]).max().item()


def test_kolmogorov_smirnov_normal():
    assert kolmogorov_smirnov(torch.special.ndtr(sample()[: 2**22].double())) < 1.95


def test_kolmogorov_smirnov_uniform():
    words = random_words(2**16, seed=0, words=(0, 0)).long() & reference.MASK
    assert kolmogorov_smirnov(uniforms(words)) < 1.95


@pytest.mark.parametrize("power", [1, 2])
def test_neighbours_and_streams_are_uncorrelated(power):
    x, other = (sample(word2)[: 2**22] ** power - (power - 1) for word2 in (0, 1))
    variance = {1: 1, 2: 4}[power]
    # In one register, the two of a pair, the two pairs of a counter, consecutive counters' words, consecutive blocks.
    seen = {shift: deviations(x[:-shift] * x[shift:], 0, variance) for shift in (1, 2, 16, 32, 48, 64)}
    seen["stream"] = deviations(x * other, 0, variance)
    assert max(map(abs, seen.values())) < 4, seen
