"""The CUDA kernels of the averages, run on the CPU: the CPU kernels' bits, and the definitions within rounding."""

import ctypes
import itertools
import math
from functools import cache

import pytest
import torch
from building import CSRC, HERE, both_orders, load
from torch import Tensor

from fastnuggets import reference  # and torch.ops.fastnuggets
from fastnuggets.reference.philox import normal

SOURCES = HERE / "average_driver.cpp", CSRC / "average" / "average_kernels.cu"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int16: 4}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FULL = [torch.float32, torch.float64]
NUMBERS = [*FULL, torch.float16, torch.bfloat16]
NEAREST, STOCHASTIC, COMPENSATED = range(3)
SEED, STEP = 0x1234567890ABCDEF, 7
# Elements, and where in memory they begin. A warp has 512 elements of a tile of 4096, in float64 256 of 2048.
ROWS = [(0, 0), (1, 0), (131, 1), (512, 0), (4096, 0), (4097, 3), (2047, 0), (0, 1), (4613, 0)]
# Largest distance from the definition in float64, in units of eps (1 + |x|). Seen: 2.6, of draws; 2.0 of the others.
ROUNDINGS = 4


class Rows(ctypes.Structure):
    """The structs here are those of average.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("numel", "first_block", "data", "dtype", "stream")],
        ("R", ctypes.c_int64),
        ("C", ctypes.c_int),
    ]


class Scalars(ctypes.Structure):
    _fields_ = [("value", ctypes.c_double * 128), ("device", ctypes.c_void_p), ("count", ctypes.c_int)]


class Update(ctypes.Structure):
    _fields_ = [("rates", Scalars), ("rounding", ctypes.c_int), ("seed", ctypes.c_uint64), ("step", ctypes.c_uint32)]


class Swag(ctypes.Structure):
    _fields_ = [("rate", ctypes.c_double), ("ring", ctypes.c_bool), ("row", ctypes.c_int64)]


class Sample(ctypes.Structure):
    _fields_ = [
        ("columns", Scalars),
        ("diagonal", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint32),
    ]


class Sgd(ctypes.Structure):
    _fields_ = [
        ("rates", Scalars),
        *[(name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay")],
        *[(name, ctypes.c_bool) for name in ("has_momentum", "nesterov", "maximize", "first")],
    ]


class AdamW(ctypes.Structure):
    _fields_ = [
        ("rates", Scalars),
        *[(name, ctypes.c_double) for name in ("step_size", "root", "beta1", "beta2", "eps", "shrink")],
        ("maximize", ctypes.c_bool),
    ]


def scalars(numbers: Tensor, on_device: bool = False) -> Scalars:
    """Those on the device are the tensor's own, which the caller keeps."""
    if on_device:
        return Scalars((ctypes.c_double * 128)(*[math.nan] * 128), numbers.data_ptr(), len(numbers))
    return Scalars((ctypes.c_double * 128)(*numbers.tolist()), None, len(numbers))


@cache
def kernels() -> ctypes.CDLL:
    return load(
        *SOURCES,
        functions=(
            "average_update",
            "average_swag",
            "average_sample",
            "average_weighted_sum",
            "average_swap",
            "average_first_nonfinite",
            "average_sgd",
            "average_adamw",
        ),
    )


def run(name: str, columns: list[list[Tensor]], *how, streams=None) -> None:
    """Launches on lists of tensors, one list a column."""
    numel = [t.numel() for t in columns[0]]
    cells = [t for row in zip(*columns, strict=True) for t in row]
    arrays = (
        (ctypes.c_int64 * len(numel))(*numel),
        (ctypes.c_void_p * len(cells))(*(t.data_ptr() for t in cells)),
        (ctypes.c_uint8 * len(cells))(*(DTYPES[t.dtype] for t in cells)),
        (ctypes.c_uint32 * len(numel))(*(streams or range(len(numel)))),
    )
    at, data, dtype, stream = map(ctypes.addressof, arrays)
    rows = Rows(at, None, data, dtype, stream, len(numel), len(columns))
    message = getattr(kernels(), f"average_{name}")(*(ctypes.byref(x) for x in (rows, *how)))
    assert message is None, message.decode()


thread_order = both_orders(kernels)


def placed(values: Tensor, offset: int) -> Tensor:
    """The values in memory of their own, `offset` elements from where it is aligned, ones before and after them."""
    around = torch.ones(offset + values.numel() + 9, dtype=values.dtype)
    return around[offset : offset + values.numel()].copy_(values.flatten()).view(values.shape)


def column(seed: int, dtypes, rows=ROWS, leading=(), scale=1.0) -> list[Tensor]:
    """Random tensors [*leading, numel] about 1, one for each row, of one type or of a type each."""
    generator = torch.Generator().manual_seed(seed)
    types = itertools.cycle(dtypes) if isinstance(dtypes, list) else itertools.repeat(dtypes)
    return [
        placed((scale * torch.randn(*leading, numel, generator=generator, dtype=torch.float64)).to(dtype), offset)
        for (numel, offset), dtype in zip(rows, types, strict=False)
    ]


def squares(*arguments, **options) -> list[Tensor]:
    return [t.square_() for t in column(*arguments, **options)]


def memory(tensor: Tensor) -> Tensor:
    """The tensor and what is around it."""
    return tensor._base if tensor._base is not None else tensor


def copies(*columns: list[Tensor]) -> list[list[Tensor]]:
    def copy(t):
        return memory(t).clone().as_strided(t.shape, t.stride(), t.storage_offset())

    return [[copy(t) for t in one] for one in columns]


def assert_same_bits(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for one, other in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        kind = BITS[one.element_size()]
        assert torch.equal(memory(one).view(kind), memory(other).view(kind)), (one, other)


def assert_near(actual: list[Tensor], expected: list[Tensor], compute: torch.dtype | None = None) -> None:
    for one, other in zip(actual, expected, strict=True):
        eps = max(torch.finfo(t).eps for t in (one.dtype, compute or one.dtype))
        assert torch.allclose(one.double(), other.double(), rtol=ROUNDINGS * eps, atol=ROUNDINGS * eps), one.dtype


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def flat(columns: list[list[Tensor]]) -> list[Tensor]:
    return list(itertools.chain(*columns))


# --- update -----------------------------------------------------------------------------------------------------------


def update(averages, remainders, weights, rates, rounding=NEAREST, streams=None, on_device=False):
    how = Update(scalars(rates, on_device), rounding, SEED, STEP)
    run("update", [*averages, *remainders, weights], how, streams=streams)


def cpu_update(averages, remainders, weights, rates, rounding=NEAREST, streams=None):
    torch.ops.fastnuggets.average_update_(
        flat(averages), flat(remainders), weights, rates, rounding, SEED, STEP, streams or []
    )


@pytest.mark.parametrize("rates", [[0.25], [0.9], [1.0, 0.0, 0.001]], ids=["near", "far", "three_averages"])
def test_update_of_every_pair_of_types(rates):
    rows = [row for row in ROWS for _ in range(16)]
    types = [pair for _ in ROWS for pair in itertools.product(NUMBERS, NUMBERS)]
    averages = [column(k, [t for t, _ in types], rows) for k in range(len(rates))]
    weights = column(10, [t for _, t in types], rows)
    rates = torch.tensor(rates, dtype=torch.float64)
    before = copies(*averages)
    expected = copies(*averages)
    cpu_update(expected, [], weights, rates)
    update(averages, [], weights, rates)
    assert_same_bits(averages, expected)
    definition = reference.average_update(doubles(flat(before)), doubles(weights), rates)
    for one, other in zip(flat(averages), definition, strict=True):
        assert_near([one], [other])


def test_rates_of_the_device():
    averages, weights = [column(1, NUMBERS), column(2, NUMBERS)], column(3, NUMBERS)
    expected, rates = copies(*averages), torch.tensor([0.3, 0.7], dtype=torch.float64)
    cpu_update(expected, [], weights, rates)
    update(averages, [], weights, rates, on_device=True)
    assert_same_bits(averages, expected)


@pytest.mark.parametrize("rounding", [STOCHASTIC, COMPENSATED], ids=["stochastic", "compensated"])
def test_update_of_bfloat16_averages(rounding):
    averages = [column(k, torch.bfloat16) for k in range(2)]
    remainders = [column(k, torch.int16, scale=1e4) for k in (2, 3)] if rounding == COMPENSATED else []
    weights, streams = column(4, NUMBERS), [0xFFFFFFFF - k for k in range(len(ROWS))]
    rates = torch.tensor([0.01, 0.6], dtype=torch.float64)
    expected, expected_remainders = copies(*averages), copies(*remainders)
    cpu_update(expected, expected_remainders, weights, rates, rounding, streams)
    update(averages, remainders, weights, rates, rounding, streams)
    assert_same_bits(averages + remainders, expected + expected_remainders)


def test_roundings_are_the_definitions():
    """At rate 1 the average is the weight, rounded."""
    weights, streams = column(1, torch.float32), [3 * k for k in range(len(ROWS))]
    averages, remainders = column(2, torch.bfloat16), column(3, torch.int16)
    one = torch.ones(1, dtype=torch.float64)
    update([averages], [], weights, one, STOCHASTIC, streams)
    for average, weight, stream in zip(averages, weights, streams, strict=True):
        assert torch.equal(average, reference.stochastic_bfloat16(weight, SEED, STEP, stream))
    update([averages], [remainders], weights, one, COMPENSATED)
    for high, low, weight in zip(averages, remainders, weights, strict=True):
        expected_high, expected_low = reference.split(weight)
        assert torch.equal(high, expected_high)
        assert torch.equal(low, expected_low)


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_inf_nan_and_what_is_too_large(dtype):
    values = torch.tensor([math.inf, -math.inf, math.nan, 65519.0, 65520.0, 3.4e38, 3.5e38, 5.9e-8, 2.9e-8, -0.0] * 9)
    weights = [placed(values, 0), placed(values, 1)]
    averages = [placed(torch.zeros(90, dtype=dtype), offset) for offset in (0, 1)]
    expected = copies(averages)
    cpu_update(expected, [], weights, torch.ones(1, dtype=torch.float64))
    update([averages], [], weights, torch.ones(1, dtype=torch.float64))
    for one, other in zip(averages, expected[0], strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one[~one.isnan()], other[~other.isnan()])


@pytest.mark.parametrize("rows", [[], [(0, 0)] * 3])
def test_nothing_to_do(rows):
    averages, weights, rate = column(1, torch.float32, rows), column(2, torch.float32, rows), torch.ones(1).double()
    update([averages], [], weights, rate)
    update([averages], [], weights, rate, STOCHASTIC)
    run("swap", [averages, weights])
    assert first_nonfinite(weights) == len(rows)


def test_more_rows_than_a_launch_has_parameters_for():
    """1500 rows have 36000 bytes of pointers alone, a launch has 32764 of parameters."""
    rows = [(1 + k % 3, k % 2) for k in range(1500)]
    averages = [column(k, [*NUMBERS, torch.float32], rows) for k in (1, 2)]
    weights = column(3, torch.float32, rows)
    expected, rates = copies(*averages), torch.tensor([0.3, 0.9], dtype=torch.float64)
    cpu_update(expected, [], weights, rates)
    update(averages, [], weights, rates)
    assert_same_bits(averages, expected)


# --- SWAG -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [False, True], ids=["diagonal", "ring"])
def test_swag_update(ring):
    n, row = 4, 2
    mean, m2, weights = column(1, FULL), squares(2, FULL), column(3, NUMBERS)
    rings = [column(4, FULL, leading=(3,))] if ring else []
    before, expected = copies(mean, m2, *rings), copies(mean, m2, *rings)
    torch.ops.fastnuggets.swag_update_(expected[0], expected[1], flat(expected[2:]), weights, n, row)
    run("swag", [mean, m2, *rings, weights], Swag(1 / (n + 1), ring, row))
    assert_same_bits([mean, m2, *rings], expected)
    definition = reference.swag_update(*map(doubles, before[:2]), doubles(flat(before[2:])), doubles(weights), n, row)
    for actual, wanted in zip([mean, m2, *rings], definition, strict=False):
        assert_near(actual, wanted)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_swag_sample(count):
    rows = [row for row in ROWS for _ in range(8)]
    types = [pair for _ in ROWS for pair in itertools.product(NUMBERS, FULL)]
    full = [t for _, t in types]
    out, mean, m2 = column(1, [t for t, _ in types], rows), column(2, full, rows), squares(3, full, rows)
    m2[-1][0] = -1e-9  # which rounding leaves of a variance of 0
    rings = [column(4, full, rows, leading=(3,))] if count else []
    columns, streams = torch.tensor([0.3, -0.2, 0.1][:count]).double(), [5 * k for k in range(len(rows))]
    expected = copies(out)
    torch.ops.fastnuggets.swag_sample_(expected[0], mean, m2, flat(rings), columns, 0.6, SEED, STEP, streams)
    run("sample", [out, mean, m2, *rings], Sample(scalars(columns, count == 3), 0.6, SEED, STEP), streams=streams)
    assert_same_bits([out], expected)
    for k, stream in enumerate(streams):
        deviation = m2[k].double().clamp_min(0).sqrt()
        drawn = mean[k].double() + 0.6 * deviation * normal(SEED, (STEP, stream), len(deviation))
        if count:
            drawn += columns @ rings[0][k][:count].double()
        assert_near([out[k]], [drawn], torch.float32)


# --- sums, exchanges, searches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True], ids=["by_value", "of_the_device"])
def test_weighted_sum(on_device):
    rows = [row for row in ROWS for _ in range(4)]
    out = column(1, NUMBERS, rows)
    sources = [column(2 + k, NUMBERS[k:] + NUMBERS[:k], rows) for k in range(3)]
    coefficients = torch.tensor([0.5, -0.25, 1.5], dtype=torch.float64)
    expected = copies(out)
    torch.ops.fastnuggets.weighted_sum_(expected[0], flat(sources), coefficients)
    run("weighted_sum", [out, *sources], scalars(coefficients, on_device))
    assert_same_bits([out], expected)
    assert_near(out, reference.weighted_sum(doubles(flat(sources)), coefficients))


def test_weighted_sum_of_many_sources_over_several_launches():
    rows = [(3, k % 2) for k in range(40)]
    out, sources = column(0, torch.float32, rows), [column(1 + k, torch.float32, rows) for k in range(128)]
    coefficients = torch.linspace(-1, 1, 128, dtype=torch.float64)
    expected = copies(out)
    torch.ops.fastnuggets.weighted_sum_(expected[0], flat(sources), coefficients)
    run("weighted_sum", [out, *sources], scalars(coefficients))
    assert_same_bits([out], expected)


def test_the_sum_may_replace_a_source():
    first, second = column(1, NUMBERS), column(2, NUMBERS)
    coefficients = torch.tensor([0.5, 0.5], dtype=torch.float64)
    expected = copies(first)
    torch.ops.fastnuggets.weighted_sum_(expected[0], [*copies(first)[0], *second], coefficients)
    run("weighted_sum", [first, first, second], scalars(coefficients))
    assert_same_bits([first], expected)


def test_swap():
    first, second = column(1, NUMBERS), column(2, NUMBERS)
    second[4].view(torch.int32)[5] = 0x7FC01234  # a NaN keeps its bits
    kept = copies(second, first)
    run("swap", [first, second])
    assert_same_bits([first, second], kept)


def first_nonfinite(weights: list[Tensor]) -> int:
    found = ctypes.c_longlong(len(weights))
    run("first_nonfinite", [weights], found, streams=[7] * len(weights))
    return found.value


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_first_nonfinite(dtype):
    weights = [t.clamp_(-60000, 60000) for t in column(1, [dtype], [*ROWS, *ROWS], scale=1e4)]
    assert first_nonfinite(weights) == len(weights)
    for row, element, value in [(-1, 4612, math.nan), (6, 2046, -math.inf), (5, 0, math.inf), (1, 0, math.nan)]:
        weights[row][element] = value
        assert first_nonfinite(weights) == row % len(weights)


# --- optimizer steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("momentum", "nesterov", "first"),
    [(0.0, False, False), (0.9, False, True), (0.9, False, False), (0.9, True, False)],
)
def test_sgd(momentum, nesterov, first, maximize):
    weights, grads = column(1, FULL), column(2, FULL)
    moments = [column(3, FULL)] if momentum else []
    averages, rates = [column(4, FULL), column(5, NUMBERS)], torch.tensor([0.01, 0.7], dtype=torch.float64)
    before, expected = copies(weights, *moments), copies(weights, *moments, *averages)
    numbers = {"lr": 0.1, "momentum_rate": momentum, "dampening": 0.1, "weight_decay": 0.02}
    torch.ops.fastnuggets.sgd_ema_step_(
        expected[0], grads, flat(expected[1 : 1 + len(moments)]), flat(expected[1 + len(moments) :]), rates,
        *numbers.values(), nesterov, maximize, first,
    )  # fmt: skip
    how = Sgd(scalars(rates, first), *numbers.values(), bool(momentum), nesterov, maximize, first)
    run("sgd", [weights, grads, *moments, *averages], how)
    assert_same_bits([weights, *moments, *averages], expected)
    for k, (w, g) in enumerate(zip(doubles(before[0]), doubles(grads), strict=True)):
        m = before[1][k].double() if momentum else None
        wanted = reference.sgd_step(w, -g if maximize else g, m, nesterov=nesterov, first=first, **numbers)
        assert_near([weights[k], *(moments[0][k : k + 1] if momentum else [])], [t for t in wanted if t is not None])


@pytest.mark.parametrize("maximize", [False, True])
def test_adamw(maximize):
    lr, (beta1, beta2), eps, decay, step = 0.01, (0.9, 0.99), 1e-8, 0.1, 3
    weights, grads, first, second = column(1, FULL), column(2, FULL), column(3, FULL), squares(4, FULL)
    averages, rates = [column(5, FULL), column(6, NUMBERS)], torch.tensor([0.01, 0.7], dtype=torch.float64)
    before, expected = copies(weights, first, second), copies(weights, first, second, *averages)
    torch.ops.fastnuggets.adamw_ema_step_(
        expected[0], grads, *expected[1:3], flat(expected[3:]), rates, lr, beta1, beta2, eps, decay, maximize, step
    )
    how = AdamW(
        scalars(rates), lr / (1 - beta1**step), math.sqrt(1 - beta2**step), beta1, beta2, eps, 1 - lr * decay, maximize
    )
    run("adamw", [weights, grads, first, second, *averages], how)
    assert_same_bits([weights, first, second, *averages], expected)
    for k, g in enumerate(doubles(grads)):
        wanted = reference.adamw_step(
            before[0][k].double(), -g if maximize else g, before[1][k].double(), before[2][k].double(),
            lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, step=step,
        )  # fmt: skip
        assert_near([weights[k], first[k], second[k]], list(wanted))
