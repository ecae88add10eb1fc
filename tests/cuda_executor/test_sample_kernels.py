"""The CUDA kernels of sampling, run on the CPU: the CPU kernels' bits, and the definitions within rounding."""

import ctypes
import itertools
import math
from functools import cache

import pytest
import torch
from building import CSRC, HERE, both_orders, load
from torch import Tensor

from fastnuggets import reference  # and torch.ops.fastnuggets
from fastnuggets.ops.sample import APPROXIMATIONS, FORMS, KINDS
from fastnuggets.reference.sample import std_of

OPS = torch.ops.fastnuggets
SOURCES = HERE / "sample_driver.cpp", CSRC / "sample" / "sample_kernels.cu"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
KEYS = torch.tensor([[11, 22], [-(2**63) + 5, -2], [2**63 - 1, 2**40 + 3]])
PARAMETERS = {"keep": 0.3, "gain": 0.7}
# Rows as [rows, n]: of one element and around the stream's block, the tile and the lanes of a sum; in pieces, which
# begin and end inside a block of the stream; and nothing.
SHAPES = [
    (1, 1), (1, 63), (1, 64), (1, 65), (1, 1023), (1, 1024), (2, 1025), (700, 1), (450, 3), (130, 8), (9, 15), (40, 17),
    (35, 32), (30, 41), (5, 100), (3, 513), (2, 3001), (7, 0), (0, 5),
]  # fmt: skip
# Largest distance of float64 results, whose products a compiler may leave unrounded, in units of eps (1 + |x|). Seen:
# 2.0, of the gradient of a softmax; 1.9 of the others.
DOUBLE = 4


class Operand(ctypes.Structure):
    """The structs here are those of sample.h."""

    _fields_ = [("data", ctypes.c_void_p), ("constant", ctypes.c_bool), ("value", ctypes.c_double)]


class ScaledNoise(ctypes.Structure):
    _fields_ = [
        ("loc", Operand), ("scale", Operand), ("out", ctypes.c_void_p), ("dtype", ctypes.c_uint8),
        ("numel", ctypes.c_int64), ("key", ctypes.c_void_p), ("kind", ctypes.c_int), ("parameter", ctypes.c_double),
    ]  # fmt: skip


class Rows(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int64), ("n", ctypes.c_int64)]


class Normal(ctypes.Structure):
    _fields_ = [
        ("mean", Operand), ("spread", Operand), ("prior_mean", Operand), ("prior_std", Operand),
        ("dtype", ctypes.c_uint8), ("shape", Rows), ("form", ctypes.c_int), ("key", ctypes.c_void_p),
        ("z", ctypes.c_void_p), ("var", ctypes.c_void_p), ("kl", ctypes.c_void_p),
    ]  # fmt: skip


class NormalBackward(ctypes.Structure):
    _fields_ = [
        ("forward", Normal), ("grad_z", Operand), ("grad_var", Operand), ("grad_kl", ctypes.c_void_p),
        ("grads", ctypes.c_void_p * 4),
    ]  # fmt: skip


class GumbelSoftmax(ctypes.Structure):
    _fields_ = [
        ("logits", Operand), ("dtype", ctypes.c_uint8), ("shape", Rows), ("tau", ctypes.c_double),
        ("key", ctypes.c_void_p), ("hard", ctypes.c_bool), ("out", ctypes.c_void_p),
    ]  # fmt: skip


class GumbelSoftmaxBackward(ctypes.Structure):
    _fields_ = [
        ("grad", Operand), ("soft", Operand), ("dtype", ctypes.c_uint8), ("shape", Rows), ("tau", ctypes.c_double),
        ("out", ctypes.c_void_p),
    ]  # fmt: skip


class LogUniform(ctypes.Structure):
    _fields_ = [
        ("log_alpha", Operand), ("dtype", ctypes.c_uint8), ("shape", Rows), ("approximation", ctypes.c_int),
        ("kl", ctypes.c_void_p), ("grad_kl", ctypes.c_void_p), ("grad", ctypes.c_void_p),
    ]  # fmt: skip


@cache
def kernels() -> ctypes.CDLL:
    return load(
        *SOURCES,
        functions=(
            "sample_scaled_noise",
            "sample_normal",
            "sample_normal_backward",
            "sample_gumbel_softmax",
            "sample_gumbel_softmax_backward",
            "sample_log_uniform",
        ),
    )


def run(name: str, how: ctypes.Structure, *more) -> None:
    message = getattr(kernels(), f"sample_{name}")(ctypes.byref(how), *more)
    assert message is None, message.decode()


thread_order = both_orders(kernels)


def operand(value: Tensor | float | None, otherwise: float = 0.0) -> Operand:
    """A tensor whose elements are all one in memory is a constant."""
    if value is None or isinstance(value, float):
        return Operand(None, True, otherwise if value is None else value)
    constant = value.numel() > 0 and value.untyped_storage().nbytes() == value.element_size()
    assert constant or value.is_contiguous()
    return Operand(value.data_ptr(), constant, math.nan)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, low: float = -2.0, high: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(dtype)


def constant(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> Tensor:
    return torch.full((1,) * len(shape), value, dtype=dtype).expand(shape)


class Out:
    """Memory for a result between two elements that no kernel may touch."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, wanted: bool = True):
        self.around = torch.full((math.prod(shape) + 2,), -77.0, dtype=dtype)
        self.values = self.around[1:-1].view(shape) if wanted else None

    @property
    def pointer(self) -> int | None:
        return None if self.values is None else self.values.data_ptr()

    def same_bits(self, expected: Tensor) -> None:
        """Where it is not NaN: those differ between processors, too."""
        assert (self.around[[0, -1]] == -77).all()
        if self.values is None:
            assert (self.around == -77).all()
            return
        assert torch.equal(self.values.isnan(), expected.isnan())
        kind, number = BITS[expected.element_size()], ~expected.isnan()
        assert self.values.dtype == expected.dtype
        assert torch.equal(self.values[number].view(kind), expected[number].view(kind))

    def same(self, expected: Tensor) -> None:
        """In bits, or nearly so if it is in float64."""
        if expected.dtype == torch.float64 and self.values is not None:
            assert (self.around[[0, -1]] == -77).all()
            near(self.values, expected, torch.float64, DOUBLE)
        else:
            self.same_bits(expected)


def near(actual: Tensor, expected: Tensor, rounded: torch.dtype, roundings: float) -> None:
    tolerance = roundings * torch.finfo(rounded).eps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- scaled noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scaled_noise(kind, dtype):
    """Sizes about the stream's blocks, of 64 or for masks 128, and a tile of 2048."""
    parameter, number = PARAMETERS.get(kind, 0.0), KINDS.index(kind)
    sizes = [0, 1, 15, 16, 63, 64, 65, 127, 128, 129, 1023, 1025, 2047, 2048, 2049, 4500]
    sizes = sizes if dtype == torch.float32 else sizes[1::4]
    for i, (size, key) in enumerate(zip(sizes, itertools.cycle(KEYS), strict=False)):
        loc = [None, numbers((size,), dtype, 1), constant((size,), dtype, 0.75)][i % 3]
        scale = [numbers((size,), dtype, 2), constant((size,), dtype, -1.5)][i % 2]
        out = Out((size,), dtype)
        run("scaled_noise", ScaledNoise(
            operand(loc), operand(scale), out.pointer, DTYPES[dtype], size, key.data_ptr(), number, parameter,
        ))  # fmt: skip
        out.same_bits(OPS.scaled_noise(loc, scale, key, number, parameter))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filled_with_noise(dtype):
    out, expected = Out((777,), dtype), torch.empty(777, dtype=dtype)
    OPS.fill_noise_(expected, 0.25, 1.7, KEYS[1], KINDS.index("laplace"), 0.0)
    run("scaled_noise", ScaledNoise(
        operand(0.25), operand(1.7), out.pointer, DTYPES[dtype], 777, KEYS[1].data_ptr(), KINDS.index("laplace"), 0.0,
    ))  # fmt: skip
    out.same_bits(expected)


@pytest.mark.parametrize("probability", [0.0, 1e-6, 0.5, 1.0])
def test_masks_of_every_probability(probability):
    ones, out = torch.ones(3000), Out((3000,), torch.float32)
    run("scaled_noise", ScaledNoise(
        operand(None), operand(ones), out.pointer, 0, 3000, KEYS[2].data_ptr(), KINDS.index("keep"), probability,
    ))  # fmt: skip
    out.same_bits(OPS.scaled_noise(None, ones, KEYS[2], KINDS.index("keep"), probability))


# Largest distance from the definition, in units of eps (1 + |x|). Seen: 1.3.
@pytest.mark.parametrize("kind", KINDS)
def test_scaled_noise_is_the_definition(kind):
    parameter, out = PARAMETERS.get(kind, 0.0), Out((10000,), torch.float32)
    run("scaled_noise", ScaledNoise(
        operand(None), operand(1.0), out.pointer, 0, 10000, KEYS[0].data_ptr(), KINDS.index(kind), parameter,
    ))  # fmt: skip
    near(out.values, reference.noise(KEYS[0], kind, (10000,), parameter), torch.float32, 3)


# --- normals and their divergence -------------------------------------------------------------------------------------


def spreads(form: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return numbers(shape, dtype, 3, low=0.1 if form in ("std", "var") else -3.0)


def priors(which: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    return [
        (None, None),
        (constant(shape, dtype, 0.5), constant(shape, dtype, 2.0)),
        (numbers(shape, dtype, 4), numbers(shape, dtype, 5, low=0.2)),
        (None, numbers(shape, dtype, 5, low=0.2)),
    ][which % 4]


def normal_of(mean, spread, prior_mean, prior_std, dtype, shape, form, key, outs=()) -> Normal:
    return Normal(
        *map(operand, (mean, spread, prior_mean)), operand(prior_std, 1.0), DTYPES[dtype], Rows(*shape), form,
        None if key is None else key.data_ptr(), *(out.pointer for out in outs),
    )  # fmt: skip


def check_normal(mean, spread, prior, form, key, wanted):
    dtype, shape = mean.dtype, tuple(mean.shape)
    outs = [Out(shape, dtype, wanted[0]), Out(shape, dtype, wanted[1]), Out(shape[:1], sum_type(dtype), wanted[2])]
    key = key if wanted[0] else None
    run("normal", normal_of(mean, spread, *prior, dtype, shape, form, key, outs))
    expected = OPS.rsample_normal(mean, spread, *prior, key, form, 1, wanted)
    for out, other in zip(outs, expected, strict=True):
        out.same(other)
    return outs


WANTED = [w for w in itertools.product([True, False], repeat=3) if any(w)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_normal(form, dtype):
    number = FORMS.index(form)
    for i, shape in enumerate(SHAPES):
        spread = spreads(form, shape, dtype)
        for j in range(2 if dtype == torch.float32 else 1):
            mean = constant(shape, dtype, 0.3) if (i + j) % 5 == 4 else numbers(shape, dtype, 2)
            wanted = WANTED[(i + 3 * j + number) % len(WANTED)]
            check_normal(mean, spread, priors(i + j, shape, dtype), number, KEYS[j], wanted)


@pytest.mark.parametrize("form", FORMS)
def test_normal_of_all_that_can_be_wanted(form):
    shape = (12, 30)
    for which, wanted in itertools.product(range(4), WANTED):
        check_normal(
            numbers(shape, torch.float32, 2), spreads(form, shape, torch.float32), priors(which, shape, torch.float32),
            FORMS.index(form), KEYS[0], wanted,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_more_pieces_than_a_warp_reads_at_a_time(dtype):
    shape = (2, 33 * 1024 + 5)
    check_normal(
        numbers(shape, dtype, 2), spreads("std", shape, dtype), (None, None), 0, None, (False, False, True)
    )  # fmt: skip


SPECIAL = torch.tensor([0.0, -0.0, 1e-45, 1e-38, -1e-30, 3e38, -3e38, 90.0, -104.0, math.inf, -math.inf, math.nan, 1.0])


@pytest.mark.parametrize("form", FORMS)
def test_normal_of_special_numbers(form):
    mean, spread = (t.contiguous() for t in torch.broadcast_tensors(SPECIAL[:, None], SPECIAL[None]))
    mean, spread = mean.reshape(-1, 1), spread.reshape(-1, 1)
    check_normal(mean, spread, (None, None), FORMS.index(form), KEYS[0], (True, True, True))


# Largest distance from the definition, in units of eps (1 + |x|), of sums of 1100 in their mean. Seen: 2.3.
@pytest.mark.parametrize("form", FORMS)
def test_normal_is_the_definition(form):
    shape = (4, 1100)
    mean, spread, prior = numbers(shape, torch.float32, 2), spreads(form, shape, torch.float32), priors(2, shape, None)
    outs = check_normal(mean, spread, [t.float() for t in prior], FORMS.index(form), KEYS[0], (True, True, True))
    doubles = [t.float().double() for t in (mean, spread, *prior)]
    near(outs[0].values, reference.rsample_normal(*doubles[:2], KEYS[0], form), torch.float32, 5)
    near(outs[1].values, std_of(doubles[1], form) ** 2, torch.float32, 5)
    near(outs[2].values / 1100, reference.kl_normal(*doubles[:2], form, *doubles[2:], 1) / 1100, torch.float32, 5)


def check_backward(mean, spread, prior, form, key, given, wanted):
    """`given` of z, var and kl; `wanted` of mean, spread and the prior's."""
    dtype, shape = mean.dtype, tuple(mean.shape)
    grad_z = numbers(shape, dtype, 6) if given[0] else None
    grad_var = numbers(shape, dtype, 7) if given[1] else None
    grad_kl = numbers(shape[:1], sum_type(dtype), 8) if given[2] else None
    key = key if given[0] else None
    outs = [Out(shape, dtype, w) for w in wanted]
    forward = normal_of(mean, spread, *prior, dtype, shape, form, key)
    pointers = (ctypes.c_void_p * 4)(*(out.pointer for out in outs))
    at = None if grad_kl is None else grad_kl.data_ptr()
    run("normal_backward", NormalBackward(forward, operand(grad_z), operand(grad_var), at, pointers))
    expected = OPS.rsample_normal_backward(
        grad_z, grad_var, grad_kl, mean, spread, *prior, key, form, 1, wanted
    )  # fmt: skip
    for out, other in zip(outs, expected, strict=True):
        out.same(other)
    return outs, (grad_z, grad_var, grad_kl)


GRADS = [w for w in itertools.product([True, False], repeat=4) if any(w)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_normal_backward(form, dtype):
    number = FORMS.index(form)
    for i, shape in enumerate(SHAPES):
        spread = spreads(form, shape, dtype)
        for j in range(2 if dtype == torch.float32 else 1):
            mean = constant(shape, dtype, 0.3) if (i + j) % 5 == 4 else numbers(shape, dtype, 2)
            given, wanted = WANTED[(i + 3 * j + number) % len(WANTED)], GRADS[(i + 4 * j) % len(GRADS)]
            check_backward(mean, spread, priors(i + j, shape, dtype), number, KEYS[j], given, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_normal_backward_of_all_that_can_be_given_and_wanted(form):
    shape = (20, 7)
    for which, (given, wanted) in enumerate(itertools.product(WANTED, GRADS)):
        check_backward(
            numbers(shape, torch.float32, 2), spreads(form, shape, torch.float32), priors(which, shape, torch.float32),
            FORMS.index(form), KEYS[0], given, wanted,
        )  # fmt: skip


# Largest distance from the derivatives by autograd in float64, in units of eps (1 + |x|). Seen: 16, of quotients by
# the square of the prior's deviation.
@pytest.mark.parametrize("form", FORMS)
def test_normal_backward_is_the_derivative(form):
    shape = (4, 1100)
    inputs = [numbers(shape, torch.float32, 2), spreads(form, shape, torch.float32)]
    inputs += [t.float() for t in priors(2, shape, torch.float32)]
    outs, grads = check_backward(*inputs[:2], inputs[2:], FORMS.index(form), KEYS[0], (True,) * 3, (True,) * 4)
    doubles = [t.double().requires_grad_() for t in inputs]
    z, var = reference.rsample_normal(*doubles[:2], KEYS[0], form), std_of(doubles[1], form) ** 2
    kl = reference.kl_normal(*doubles[:2], form, *doubles[2:], 1)
    expected = torch.autograd.grad([z, var, kl], doubles, [g.double() for g in grads])
    for out, other in zip(outs, expected, strict=True):
        near(out.values, other, torch.float32, 30)


# --- divergence from the log-uniform prior ----------------------------------------------------------------------------


def log_uniform(log_alpha: Tensor, approximation: int, kl: Out, grad_kl: Tensor | None, grad: Out) -> None:
    run("log_uniform", LogUniform(
        operand(log_alpha), DTYPES[log_alpha.dtype], Rows(*log_alpha.shape), approximation, kl.pointer,
        None if grad_kl is None else grad_kl.data_ptr(), grad.pointer,
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximation", range(3), ids=APPROXIMATIONS)
def test_log_uniform(approximation, dtype):
    for i, shape in enumerate(SHAPES):
        log_alpha = constant(shape, dtype, -0.8) if i % 4 == 3 else numbers(shape, dtype, 1, low=-6.0)
        kl, grad, none = Out(shape[:1], sum_type(dtype)), Out(shape, dtype), Out(shape, dtype, False)
        log_uniform(log_alpha, approximation, kl, None, none)
        kl.same(OPS.kl_log_uniform(log_alpha, approximation, 1))
        if math.prod(shape) == 0:
            continue
        grad_kl = numbers(shape[:1], sum_type(dtype), 2)
        log_uniform(log_alpha, approximation, none, grad_kl, grad)
        grad.same(OPS.kl_log_uniform_backward(grad_kl, log_alpha, approximation, 1))


# --- Gumbel-softmax ---------------------------------------------------------------------------------------------------


def check_softmax(logits, key, tau, hard, most_bytes=2**63):
    out, dtype, shape = Out(tuple(logits.shape), logits.dtype), DTYPES[logits.dtype], Rows(*logits.shape)
    how = GumbelSoftmax(operand(logits), dtype, shape, tau, key.data_ptr(), hard, out.pointer)
    run("gumbel_softmax", how, ctypes.c_size_t(most_bytes))
    out.same(OPS.gumbel_softmax(logits, key, tau, hard))
    return out.values


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gumbel_softmax(dtype, hard):
    for i, shape in enumerate(SHAPES):
        logits = constant(shape, dtype, 0.3) if i % 6 == 5 else numbers(shape, dtype, 1)
        found = check_softmax(logits, KEYS[i % 3], [0.5, 1.0, 3.0][i % 3], hard)
        if hard:
            assert torch.equal(found.sum(-1), torch.ones(shape[0], dtype=dtype) * (shape[1] > 0))


def test_first_of_several_largest():
    """Noise is lost beside logits that are this large, so all are the same."""
    found = check_softmax(torch.full((3, 5000), 1e30), KEYS[0], 1.0, True)
    assert found[:, 0].tolist() == [1, 1, 1]
    assert check_softmax(torch.full((70, 9), 1e30), KEYS[0], 1.0, True)[:, 0].eq(1).all()


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("n", [10, 1500])
def test_gumbel_softmax_of_special_numbers(n, hard):
    logits = numbers((9, n), torch.float32, 1)
    for row, value in enumerate([math.nan, math.inf, -math.inf, 2e38, -2e38]):
        logits[row, n // 2] = value
    logits[5], logits[6, 0], logits[7, n - 1] = -math.inf, math.nan, math.nan
    found = check_softmax(logits, KEYS[0], 0.7, hard)
    assert found.isnan().any(-1).tolist() == [True, True, False, False, False, True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1025, 17000, 40000])
def test_gumbel_softmax_of_long_rows(n, dtype):
    """A block has a piece for each of its teams, 16 in float32 and 32 in float64, and then more; half types have
    memory for two rows at a time."""
    check_softmax(numbers((3, n), dtype, 1), KEYS[1], 1.0, n == 40000, 2 * n * 4)


def test_gumbel_softmax_of_more_elements_than_are_numbered_at_once():
    check_softmax(numbers((1, 2**20 + 100), torch.float32, 1), KEYS[0], 1.0, False)


# Largest distance from the definition, in units of eps (1 + |x|), of probabilities times their number. Seen: 9.8.
@pytest.mark.parametrize("shape", [(40, 17), (3, 5000)])
def test_gumbel_softmax_is_the_definition(shape):
    logits = numbers(shape, torch.float32, 1)
    found = check_softmax(logits, KEYS[0], 0.5, False)
    noisy = (logits.double() + reference.noise(KEYS[0], "gumbel", shape)) / 0.5
    near(found * shape[1], noisy.softmax(-1) * shape[1], torch.float32, 20)
    assert torch.equal(check_softmax(logits, KEYS[0], 0.5, True).argmax(-1), noisy.argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gumbel_softmax_backward(dtype):
    for i, shape in enumerate(SHAPES):
        soft = OPS.gumbel_softmax(numbers(shape, dtype, 1), KEYS[0], 0.5, False)
        grad = constant(shape, dtype, 0.7) if i % 6 == 5 else numbers(shape, dtype, 2)
        out = Out(shape, dtype)
        run("gumbel_softmax_backward", GumbelSoftmaxBackward(
            operand(grad), operand(soft), DTYPES[dtype], Rows(*shape), 0.5, out.pointer,
        ))  # fmt: skip
        out.same(OPS.gumbel_softmax_backward(grad, soft, 0.5))
        if dtype == torch.float64 and shape[1] > 0:
            near(out.values, soft * (grad - (grad * soft).sum(-1, True)) / 0.5, dtype, DOUBLE)
