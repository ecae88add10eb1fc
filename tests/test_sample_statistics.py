"""Whether the noise can be told from its distribution: along a call, across rows, calls, seeds and offsets.

A checker turns a sequence into p-values: the probability, under the stated distribution, of something at least as far
out, on both sides, so that what is too even is caught as well. All must be above LEVEL. Some 650 are asked for, so
sound noise fails this file for one choice of keys in 1500; no key was chosen. Each checker is also given planted
faults, and must report them.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch

from fastnuggets import ops
from fastnuggets.reference import philox

LEVEL = 1e-6
SAMPLES = 2**21
EULER = 0.5772156649015329


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Work comes in pieces that fit a cache: a second thread is waited for longer than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(p_values):
    return {name: p for name, p in p_values.items() if not p > LEVEL}


# --- distributions of statistics --------------------------------------------------------------------------------------


def p_of_deviations(z):
    return math.erfc(abs(z) / math.sqrt(2))


def p_of_count(count, n, p):
    """Of a binomial count, by Chernoff's bound: never below the true one."""
    q = count / n
    divergence = sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0)
    return min(1.0, 2 * math.exp(-n * divergence))


def p_of_chi_square(observed, expected):
    expected = expected.double().flatten()
    half = ((observed.flatten() - expected) ** 2 / expected).sum() / 2
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return 2 * min(torch.special.gammainc(freedom, half).item(), torch.special.gammaincc(freedom, half).item())


def kolmogorov(t):
    """The probabilities that sqrt(n) D is below and above t, n large (Kolmogorov, 1933; either series is exact)."""
    if t < 1:
        terms = (math.exp(-(((2 * k - 1) * math.pi / t) ** 2) / 8) for k in range(1, 9))
        below = math.sqrt(2 * math.pi) / t * sum(terms)
        return below, 1 - below
    above = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * t) ** 2) for k in range(1, 9))
    return 1 - above, above


# --- what the noise should be -----------------------------------------------------------------------------------------

CELLS = 2**20


def zeta(n):
    return torch.special.zeta(torch.tensor(float(n), dtype=torch.float64), 1.0).item()


@dataclass(eq=False)
class Law:
    """A density, and cells of width 2^-fine from `lowest` on in which float32 values fall without rounding.

    Args:
        cumulative: of float64 values.
        cumulant: of an order above 1.
        tails: bounds beyond which, away from the mean, values are counted.
    """

    cumulative: object
    cumulant: object
    lowest: int
    fine: int
    tails: tuple[float, ...]
    mean: float = 0.0

    @cached_property
    def edges(self):  # [CELLS + 1]
        return self.lowest + torch.arange(CELLS + 1, dtype=torch.float64) / 2**self.fine

    @cached_property
    def below_edges(self):  # [CELLS + 1]; the ends hold everything beyond
        p = self.cumulative(self.edges)
        p[0], p[-1] = 0.0, 1.0
        return p

    @cached_property
    def masses(self):  # [CELLS]
        return self.below_edges.diff()

    @cached_property
    def moments(self):
        """Central moments 0 to 8, of the cumulants."""
        k = [0, 0, *map(self.cumulant, range(2, 9))]
        m = [1.0]
        for n in range(1, 9):
            m.append(sum(math.comb(n - 1, i - 1) * k[i] * m[n - i] for i in range(1, n + 1)))
        return m

    def cell(self, x):
        """[N] float32 -> [N] int64: a product with a power of two and its floor are exact."""
        return (x * 2**self.fine).floor_().long().sub_(self.lowest * 2**self.fine).clamp_(0, CELLS - 1)

    def count(self, x):
        """How many of [N] float32 fell into each cell, [CELLS] int64."""
        counts, ones = torch.zeros(CELLS, dtype=torch.int64), torch.ones(2**18, dtype=torch.int64)
        for part in x.split(2**18):  # as much as a cache holds
            counts.scatter_add_(0, self.cell(part), ones[: len(part)])
        return counts


def even(cumulant):
    return lambda n: cumulant(n) if n % 2 == 0 else 0.0


BERNOULLI = {2: 1 / 6, 4: -1 / 30, 6: 1 / 42, 8: -1 / 30}
RIGHT = 5.0, 8.0, 11.0, 14.0
BOTH = *RIGHT, *(-x for x in RIGHT)
SIGMAS = 3.0, 4.0, 5.0, 6.0, -3.0, -4.0, -5.0, -6.0
ENDS = 2.0**-18, 2.0**-14, 2.0**-8, 1 - 2.0**-8, 1 - 2.0**-14, 1 - 2.0**-18

LAWS = {
    "normal": Law(torch.special.ndtr, lambda n: float(n == 2), -8, 16, SIGMAS),
    "uniform": Law(torch.clone, even(lambda n: BERNOULLI[n] / n), 0, 20, ENDS, 0.5),
    "laplace": Law(
        lambda x: torch.where(x < 0, (-x.abs()).exp() / 2, 1 - (-x.abs()).exp() / 2),
        even(lambda n: 2 * math.factorial(n - 1)),
        -32,
        14,
        BOTH,
    ),
    "logistic": Law(torch.sigmoid, even(lambda n: 2 * math.factorial(n - 1) * zeta(n)), -32, 14, BOTH),
    "gumbel": Law(
        lambda x: (-(-x).exp()).exp(), lambda n: math.factorial(n - 1) * zeta(n), -8, 15, (*RIGHT, -2.0, -2.5), EULER
    ),
    "exponential": Law(
        lambda x: -torch.expm1(-x), lambda n: math.factorial(n - 1), 0, 15, (*RIGHT, 2.0**-8, 2.0**-14), 1.0
    ),
}


# --- checkers ---------------------------------------------------------------------------------------------------------


def of_counts(counts, law):
    """Distribution, moments and tails of how many values fell into each cell, [CELLS].

    The distance D of Kolmogorov and Smirnov is taken at the cells' edges; between two of them both functions only grow,
    so the true one is at most a cell's mass larger. Each tail is given the end of that interval which is less likely.
    Moments take the middles of the cells, 1e-5 apart: 1e-10 off.
    """
    n = counts.sum().item()
    seen = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).double() / n
    distance = (seen - law.below_edges).abs().max().item()
    found = {
        "too even": 2 * kolmogorov(math.sqrt(n) * distance)[0],
        "distribution": 2 * kolmogorov(math.sqrt(n) * (distance + law.masses.max().item()))[1],
    }
    middle = (law.edges[1:] + law.edges[:-1]) / 2 - law.mean
    for order in (1, 2, 3, 4):
        expected, variance = law.moments[order], law.moments[2 * order] - law.moments[order] ** 2
        mean = (counts * middle**order).sum().item() / n
        found[f"moment {order}"] = p_of_deviations((mean - expected) / math.sqrt(variance / n))
    for bound in law.tails:
        cell = round((bound - law.lowest) * 2**law.fine)
        tail = slice(cell, None) if bound > law.mean else slice(None, cell)
        found[f"beyond {bound:g}"] = p_of_count(counts[tail].sum().item(), n, law.masses[tail].sum().item())
    return found


LAGS = 1, 2, 3, 16, 32, 48, 64, 128, 1024, 4096


def correlations(x, law):
    """Of values, and of their squares, so many places apart."""
    found = {}
    central = x.double() - law.mean
    for name, power in (("values", 1), ("squares", 2)):
        mean = law.moments[power]
        y = (central**power - mean) / math.sqrt(law.moments[2 * power] - mean**2)
        for lag in LAGS:
            z = torch.dot(y[lag:], y[:-lag]).item() / math.sqrt(len(y) - lag)
            found[f"{name} {lag} apart"] = p_of_deviations(z)
    return found


def pairs(x, law):
    """Chi-square of pairs so many places apart in 64 x 64 boxes of equal mass, no value in two pairs."""
    box_of_cell = (64 * (law.below_edges[1:] + law.below_edges[:-1]) / 2).long().clamp_(max=63)
    mass = torch.zeros(64, dtype=torch.float64).index_add_(0, box_of_cell, law.masses)
    box = box_of_cell[law.cell(x)]
    found = {}
    for lag in (1, 16, 32, 64, 4096):
        a, b = box[: len(box) // (2 * lag) * (2 * lag)].view(-1, 2, lag).unbind(1)
        observed = torch.bincount((64 * a + b).flatten(), minlength=64 * 64)
        found[f"pairs {lag} apart"] = p_of_chi_square(observed, a.numel() * torch.outer(mass, mass))
    return found


def check(x, kind="normal"):
    """All of the above of a sequence [N] float32."""
    law = LAWS[kind]
    return {**of_counts(law.count(x), law), **correlations(x, law), **pairs(x, law)}


def check_bits(bits, p, length):
    """Of a sequence [N] of 0 and 1: how many are 1, and the patterns of `length` of them so many places apart."""
    found = {"count": p_of_count(bits.sum().item(), len(bits), p)}
    weight = torch.tensor([1 - p, p], dtype=torch.float64)
    expected = torch.stack([torch.stack(c).prod() for c in itertools.product(weight, repeat=length)])
    place = 2 ** torch.arange(length - 1, -1, -1)
    for lag in (1, 16, 32, 64, 128):
        groups = bits[: len(bits) // (length * lag) * (length * lag)].view(-1, length, lag)
        observed = torch.bincount((groups * place[:, None]).sum(1).flatten(), minlength=2**length)
        found[f"patterns {lag} apart"] = p_of_chi_square(observed, observed.sum() * expected)
    return found


# --- the noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAWS)
def test_along_a_call(kind):
    assert not small(check(ops.noise(kind, [SAMPLES], key=101), kind))


def test_gaussian_dropout():
    """Its deviation is 1 for p = 1/2."""
    assert not small(check(ops.gaussian_dropout(torch.ones(SAMPLES), 0.5, key=102) - 1))


def test_signs():
    assert not small(check_bits((ops.noise("sign", [SAMPLES], key=103) > 0).long(), 0.5, 12))


@pytest.mark.parametrize("p", [0.02, 0.1, 0.3, 0.5, 0.75, 0.98])
def test_masks(p):
    """Of the probability that is a multiple of 2^-16."""
    kept = (ops.dropout(torch.ones(SAMPLES), p, key=104) > 0).long()
    assert not small(check_bits(kept, math.floor((1 - p) * 2**16 + 0.5) / 2**16, {0.5: 12, 0.3: 5}.get(p, 2)))


CALLS, LENGTH = 4096, 500  # no multiple of a block


def across(key_of):
    """The noise of many keys, [CALLS * LENGTH]: the first element of each, then the second of each, and so on."""
    drawn = torch.empty(CALLS, LENGTH)
    for number, row in enumerate(drawn):
        ops.noise_(row, "normal", key=key_of(number))
    return drawn.T.flatten()


def signed(word):
    return (word + 2**63) % 2**64 - 2**63


KEYS = {
    "seeds": lambda k: [k, 0],
    "upper halves of seeds": lambda k: [signed(k << 32), 5],
    "multiples of a round's step": lambda k: [signed(k * 0xBB67AE859E3779B9), 0],
    "offsets": lambda k: [7, k],
    "upper halves of offsets": lambda k: [7, signed(k << 32)],
    "offsets a block's counters apart": lambda k: [7, 16 * k],
}


@pytest.mark.parametrize("keys", KEYS)
def test_across_neighbouring_keys(keys):
    assert not small(check(across(lambda k: torch.tensor(KEYS[keys](k)))))


def test_across_consecutive_calls():
    generator = torch.Generator().manual_seed(105)
    assert not small(check(across(lambda _: ops.noise_key(generator=generator))))


def test_across_rows_of_a_call():
    assert not small(check(ops.noise("normal", [CALLS, LENGTH], key=106).T.flatten()))


# --- 1e8 normals ------------------------------------------------------------------------------------------------------

MANY = 10**8


def one_call():
    return ops.noise("normal", [MANY], key=107).split(2**24)


def many_calls():
    """10 000 values each, as a training loop draws them."""
    generator = torch.Generator().manual_seed(108)
    chunk = torch.empty(100, 10_000)
    for _ in range(MANY // chunk.numel()):
        for call in chunk:
            ops.noise_(call, "normal", generator=generator)
        yield chunk.flatten()


@pytest.fixture(scope="module", params=[one_call, many_calls], ids=lambda f: f.__name__)
def hundred_million(request):
    """How many fell into each cell."""
    counts = torch.zeros(CELLS, dtype=torch.int64)
    for chunk in request.param():
        counts += LAWS["normal"].count(chunk)
    assert counts.sum() == MANY
    return counts


def test_hundred_million(hundred_million):
    assert not small(of_counts(hundred_million, LAWS["normal"]))


def clipped(counts, bound):
    law = LAWS["normal"]
    cut = round((bound - law.lowest) * 2**law.fine)
    made = counts.clone()
    made[cut:] = made[: CELLS - cut] = 0
    made[cut - 1] += counts[cut:].sum()
    made[CELLS - cut] += counts[: CELLS - cut].sum()
    return made


def moved_to_tail(counts, number):
    made = counts.clone()
    made[CELLS // 2] -= number
    made[round(14.2 * 2**16)] += number  # at 6.2
    return made


def thinned(counts):
    made = counts.double()
    made[: CELLS // 2] *= 1 - 1 / 500
    return made


FAULTS_OF_MANY = {
    "clipped at 5": (lambda c: clipped(c, 5.0), {"beyond 5", "beyond -5"}),
    "clipped at 4": (lambda c: clipped(c, 4.0), {"beyond 4", "beyond -4", "beyond 5", "beyond -5"}),
    "15 too many beyond 6": (lambda c: moved_to_tail(c, 15), {"beyond 6"}),
    "moved by 0.001": (lambda c: c.roll(66), {"distribution", "moment 1"}),
    "one in 500 below 0 left out": (thinned, {"distribution", "moment 1"}),
}


@pytest.mark.parametrize("fault", FAULTS_OF_MANY)
def test_planted_in_hundred_million(hundred_million, fault):
    plant, expected = FAULTS_OF_MANY[fault]
    assert expected <= set(small(of_counts(plant(hundred_million), LAWS["normal"])))


# --- what the checkers must report ------------------------------------------------------------------------------------


def sound(n=SAMPLES):
    return torch.randn(n, generator=torch.Generator().manual_seed(1))


def of_words(change):
    """Normals in the order of the stream's blocks, of random words [blocks, 4, 16] that are changed first."""
    words = change(torch.randint(2**32, (SAMPLES // 64, 4, 16), generator=torch.Generator().manual_seed(2)))
    halves = words.unflatten(1, (2, 2))
    return torch.stack(philox.box_muller(halves[:, :, 0], halves[:, :, 1]), 2).flatten().float()


def repeated(x, lag):
    """One value in 64 is that of `lag` places before."""
    x = x.clone()
    x[lag::64] = x[: len(x) - lag : 64]
    return x


def stratified(n=SAMPLES):
    """One value in each of n parts of equal mass, in any order."""
    generator = torch.Generator().manual_seed(3)
    u = (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
    return torch.special.ndtri(u[torch.randperm(n, generator=generator)]).float()


def one_radius(words):
    words[:, 2] = words[:, 0]
    return words


def short_angle(words):
    words[:, 1::2] &= ~(1 << 31)
    return words


def sums_of_four(n=SAMPLES):
    """Uniforms added: kurtosis 2.7 and no tails."""
    u = torch.rand(4, n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return ((u.sum(0) - 2) * math.sqrt(3)).float()


def congruential(n=SAMPLES):
    """x -> 5 x + 3 modulo 2^25: even in one dimension, lines in two."""
    values, x = torch.empty(n, dtype=torch.float64), torch.arange(512) * 65_521
    for part in values.view(-1, 512):
        x = (5 * x + 3) % 2**25
        part.copy_(x)
    return torch.special.ndtri((values.view(-1, 512).T.flatten() + 0.5) / 2**25).float()


def ignored_bit(k):
    return torch.tensor([k & ~1, 0])


FAULTS = {
    "variance of 1.01": (lambda: sound() * 1.005, {"moment 2", "moment 4"}),
    "skewed": (lambda: sound().add_(sound() ** 2 / 100 - 0.01), {"moment 3"}),
    "u begins at 2^-9": (
        lambda: torch.special.ndtri(2**-9 + torch.special.ndtr(sound()) * (1 - 2**-9)),
        {"moment 1", "distribution", "beyond -3"},
    ),
    "four uniforms": (sums_of_four, {"moment 4", "beyond 4", "beyond -4", "distribution"}),
    "neighbours": (lambda: repeated(sound(), 1), {"values 1 apart", "squares 1 apart", "pairs 1 apart"}),
    "of one counter": (lambda: repeated(sound(), 16), {"values 16 apart", "pairs 16 apart"}),
    "of the next block": (lambda: repeated(sound(), 64), {"values 64 apart", "squares 64 apart"}),
    "a radius for two pairs": (lambda: of_words(one_radius), {"squares 32 apart", "squares 48 apart"}),
    "half the angles": (lambda: of_words(short_angle), {"moment 1", "distribution"}),
    "stratified": (stratified, {"too even"}),
    "congruential": (congruential, {"pairs 1 apart"}),
    "a bit of the seed ignored": (lambda: across(ignored_bit), {"values 1 apart", "pairs 1 apart"}),
    "calls begin inside the one before": (
        lambda: ops.noise("normal", [CALLS + LENGTH], key=1).unfold(0, LENGTH, 1)[:CALLS].T.flatten(),
        {"distribution"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted(fault):
    plant, expected = FAULTS[fault]
    assert expected <= set(small(check(plant())))


def test_nothing_planted():
    assert not small(check(sound()))
    assert not small(check(of_words(lambda words: words)))
    assert not small(check_bits((sound() > 0).long(), 0.5, 12))


FAULTS_OF_BITS = {
    "one in 100 copied": (lambda x: repeated(x, 16), {"patterns 16 apart"}),
    "0.505": (lambda x: x + 0.0125, {"count"}),
    "in turns": (lambda x: x.abs() * (-1) ** torch.arange(len(x)), {"patterns 1 apart"}),
}


@pytest.mark.parametrize("fault", FAULTS_OF_BITS)
def test_planted_in_bits(fault):
    plant, expected = FAULTS_OF_BITS[fault]
    assert expected <= set(small(check_bits((plant(sound()) > 0).long(), 0.5, 12)))


# --- streams do not meet ----------------------------------------------------------------------------------------------
#
# A call's counters are (index, offset), 64 bits each, under the seed. Under one seed the generator can be undone, so
# calls that differ in the offset have no four words in common, nor has one call the same four twice. Two seeds are two
# bijections. So two calls share noise only if they have one key, and drawn keys are 128 random bits.


def undone(seed, words):
    """The counters [..., 4] of words [..., 4]. A round's multipliers are odd; what it adds is known by then."""
    inverse = [pow(m, -1, 2**32) for m in philox.MULTIPLIERS]
    a, b, c, d = words.unbind(-1)
    for number in reversed(range(philox.ROUNDS)):
        key = [(seed >> 32 * i) + number * step & philox.MASK for i, step in enumerate(philox.STEPS)]
        (_, first), (_, third) = philox._product(d, inverse[0]), philox._product(b, inverse[1])
        high = [philox._product(w, m)[0] for w, m in zip((first, third), philox.MULTIPLIERS, strict=True)]
        a, b, c, d = first, a ^ high[1] ^ key[0], third, c ^ high[0] ^ key[1]
    return torch.stack([a, b, c, d], -1)


EXTREME = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), -(2**33) + 5]


def test_generator_can_be_undone():
    counters = torch.randint(2**32, (10_000, 4))
    counters[:3] = torch.tensor([[0] * 4, [philox.MASK] * 4, [philox.MASK, 0, 0, 0]])
    for seed in EXTREME:
        assert torch.equal(undone(seed % 2**64, philox.philox(seed, counters)), counters)


@pytest.mark.parametrize("seed", EXTREME)
@pytest.mark.parametrize("offset", EXTREME)
def test_every_bit_of_a_key_arrives(seed, offset):
    """Uniforms are 23 bits of the words; the words' counters are the element's number and the offset."""
    key, n = torch.tensor([seed, offset]), 1000
    halves = offset & philox.MASK, offset >> 32 & philox.MASK
    words = philox.stream_words(seed, halves, 1024)
    assert torch.equal(ops.noise("uniform", [n], key=key).double(), ((words[:n] >> 9) + 0.5) / 2**23)
    counters = undone(seed % 2**64, words.view(-1, 4, 16).transpose(1, 2).reshape(-1, 4))
    assert torch.equal(counters, torch.tensor([[i, 0, *halves] for i in range(256)]))


def common_blocks(calls):
    """Blocks of 64 that occur twice among [calls, n]; n is a multiple of 64."""
    blocks = calls.reshape(-1, 64)[:, :8]
    return len(blocks) - len(blocks.unique(dim=0))


def test_calls_have_no_block_in_common():
    generator = torch.Generator().manual_seed(109)
    drawn = torch.stack([ops.noise("uniform", [6400], generator=generator) for _ in range(200)])
    near = torch.stack([ops.noise("uniform", [6400], key=torch.tensor([s, o])) for s in range(9) for o in range(9)])
    assert common_blocks(torch.cat([drawn, near])) == 0
    inside = ops.noise("uniform", [6400 * 20], key=1).unfold(0, 6400, 64)[:200]
    assert common_blocks(inside) == 199 * 99


def check_keys(keys):
    """Of [N, 2] int64: each of the 128 bits, each two of a key, and each with that of the key before."""
    bits = (keys[:, :, None] >> torch.arange(64) & 1).flatten(1).double() * 2 - 1
    n = len(keys)
    within = (bits.T @ bits)[torch.ones(128, 128).triu(1).bool()]
    deviations = torch.cat([bits.sum(0), within, (bits[1:] * bits[:-1]).sum(0)]) / math.sqrt(n)
    twice = n - len(keys.unique(dim=0))
    # The largest of 8384 deviations: each has that share of the level.
    return {"bits": min(1.0, len(deviations) * p_of_deviations(deviations.abs().max())), "twice": float(twice == 0)}


def test_drawn_keys_are_128_random_bits():
    for generator in (torch.Generator().manual_seed(110), None):  # None: torch's own
        assert not small(check_keys(torch.stack([ops.noise_key(generator=generator) for _ in range(4096)])))


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (lambda: torch.randint(2**31, (4096, 2)), "bits"),
        (lambda: torch.randint(-(2**63), 2**63 - 1, (4096, 1)).expand(-1, 2), "bits"),
        (lambda: torch.randint(-(2**63), 2**63 - 1, (4096, 2)).cumsum(1) | 1, "bits"),
        (lambda: torch.randint(-(2**63), 2**63 - 1, (4, 2)).repeat(1024, 1), "twice"),
    ],
    ids=["31 bits", "one number twice", "an odd offset", "keys again"],
)
def test_planted_in_keys(plant, expected):
    assert expected in small(check_keys(plant()))


# --- beyond six deviations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "short"), [(4, 2e-8), (5, 3e-6), (6, 1.5e-3), (6.5, 1.5e-2)])
def test_mass_of_the_tails(bound, short):
    """Of the definition, summed over all radius words: more samples than can be drawn.

    With 32 bits for the radius the largest normal is 6.77. Seen: short of 1.2e-8, 1.8e-6, 1.2e-3 and 1.3e-2.
    """
    words = torch.arange(math.ceil(math.exp(-(bound**2) / 2) * 2**32) + 1)
    radius = philox.box_muller(words, torch.zeros((), dtype=torch.int64))[0]
    share = torch.acos((bound / radius).clamp(max=1)) * 2 / math.pi  # of the angles whose cosine is beyond
    mass = share.sum().item() / 2**32
    assert -1e-12 <= 1 - mass / math.erfc(bound / math.sqrt(2)) < short
