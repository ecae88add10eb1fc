"""The CUDA kernels of compositing, run on the CPU, against the CPU kernels."""

import ctypes
from functools import cache

import pytest
import torch
from building import CSRC, HERE, both_orders, load

from fastnuggets.testing import CASES

OPS = torch.ops.fastnuggets
SOURCES = HERE / "composite_driver.cpp", CSRC / "blend" / "composite_kernels.cu"
# In the order of csrc/common/storage.h, with the largest distance relative to the largest value. Seen: 1.8e-7, 4e-16 of
# float32 and float64; half types, a unit of the last place where sums round on the other side.
DTYPES = {
    torch.float32: (0, 1e-6),
    torch.float64: (1, 1e-14),
    torch.float16: (2, 2e-3),
    torch.bfloat16: (3, 1.6e-2),
}
UINT8 = 5
MOST_TAPS = 64
SHIFT, NEAREST, BILINEAR = range(3)


class Feather(ctypes.Structure):
    """The structs here are those of composite.h."""

    _fields_ = [("radius", ctypes.c_int), ("zero_edge", ctypes.c_bool), ("taps", ctypes.c_double * MOST_TAPS)]


class Composite(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "background", "image", "pixels", "mask", "sizes", "ptr", "place", "matrix", "ids", "area")),
        *((name, ctypes.c_int64) for name in "BCHWNP"),
        *((name, ctypes.c_uint8) for name in ("dtype", "mix", "sampling")),
        ("channels_last", ctypes.c_bool), ("feather", Feather),
    ]  # fmt: skip


class CompositeBackward(ctypes.Structure):
    _fields_ = [
        ("forward", Composite),
        *((name, ctypes.c_void_p) for name in ("grad", "background", "pixels", "mask", "matrix")),
    ]


@cache
def kernels() -> ctypes.CDLL:
    return load(*SOURCES, functions=("composite_forward", "composite_backward"))


thread_order = both_orders(kernels)


def data(tensor):
    return None if tensor is None else tensor.data_ptr()


def described(background, pixels, mask, sizes, ptr, place, matrix, mix, nearest, taps, zero_edge, channels_last):
    b, *shape = background.shape if background.dim() == 4 else (1, *background.shape)
    h, w, c = shape if channels_last else (*shape[1:], shape[0])
    radius = max(len(taps) - 1, 0)
    dtype = UINT8 if background.dtype == torch.uint8 else DTYPES[background.dtype][0]
    return Composite(
        *map(data, (background, None, pixels, mask, sizes, ptr, place, matrix)), None, None,
        b, c, h, w, len(sizes), mask.numel(),
        dtype, mix, SHIFT if place is not None else NEAREST if nearest else BILINEAR, channels_last,
        Feather(radius, zero_edge, (ctypes.c_double * MOST_TAPS)(*(taps if radius else ()))),
    )  # fmt: skip


def run(name, how):
    message = getattr(kernels(), name)(ctypes.byref(how))
    assert message is None, message.decode()


def forward(*arguments):
    """Image, ids and area of the kernels; all but `labels` of the op's arguments."""
    how = described(*arguments)
    image = torch.full_like(arguments[0], 77)
    ids = torch.full((how.B, how.H, how.W), 77, dtype=torch.int32)
    area = torch.full((how.N,), 77)
    how.image, how.ids, how.area = data(image), data(ids), data(area)
    run("composite_forward", how)
    return image, ids.squeeze(0) if arguments[0].dim() == 3 else ids, area


def backward(grad, *arguments, wanted):
    made = [torch.full_like(t, 77) if w else None for t, w in zip((*arguments[:3], arguments[6]), wanted, strict=True)]
    run("composite_backward", CompositeBackward(described(*arguments), data(grad), *map(data, made)))
    made[3] = torch.empty(0, dtype=torch.float64) if made[3] is None else made[3]
    return made


def assert_near(actual, expected, tolerance, message):
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype), message
        if a.numel():
            error = (a.double() - e.double()).abs().max() / max(1, e.double().abs().max())
            assert error <= tolerance, f"{message}: {error:.2g}"


def scene(dtype, sizes, height, width, *, place=False, shared=False, seed=0):
    """Objects on one image whose tiles they do not fit, drawn twice if `shared`."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    areas = [h * w for h, w in sizes]
    starts = torch.tensor([0, *areas]).cumsum(0)
    rows = torch.cat([starts[:-1, None], torch.tensor(sizes)], 1)
    rows = rows.repeat(2, 1) if shared else rows
    background, pixels, mask = uniform(1, 2, height, width), uniform(2 * sum(areas)), uniform(sum(areas))
    mask = torch.where(mask < 0.2, 0, torch.where(mask > 0.8, 1, mask))
    if dtype == torch.uint8:
        background, pixels, mask = ((255 * t).round() for t in (background, pixels, mask))
    corner = (uniform(len(rows), 2) * 1.4 - 0.4) * torch.tensor([height, width])
    matrix = torch.eye(3, dtype=torch.float64).repeat(len(rows), 1, 1)
    matrix[:, :2, :2] += uniform(len(rows), 2, 2) - 0.5
    matrix[:, :2, 2] = corner.flip(1)
    matrix[:, 2, :2] = 0.02 * (uniform(len(rows), 2) - 0.5)
    where = (corner.long(), None) if place else (None, matrix)
    return (*(t.to(dtype) for t in (background, pixels, mask)), rows, torch.tensor([0, len(rows)]), *where)


RULES = {
    "plain": (0, False, [], False, False),
    "blurred": (0, False, [0.4, 0.2, 0.1], False, False),
    "grown": (0, False, [0.4, 0.2, 0.1], True, False),
    "wide": (0, True, [1 / 23] * 12, False, False),
    "difference": (1, True, [], False, False),
    "premultiplied": (2, False, [], False, False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_the_cpus(dtype):
    for name, (*arguments, _) in CASES["fastnuggets::composite"].samples(torch.device("cpu"), dtype).items():
        if name != "parallel":
            assert_near(forward(*arguments), OPS.composite(*arguments, True), DTYPES[dtype][1], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_the_cpus(dtype):
    for name, (*arguments, wanted) in (
        CASES["fastnuggets::composite_backward"].samples(torch.device("cpu"), dtype).items()
    ):
        if name != "parallel":
            expected = OPS.composite_backward(*arguments, wanted)
            assert_near(backward(*arguments, wanted=wanted), expected, DTYPES[dtype][1], name)


@pytest.mark.parametrize("place", [True, False], ids=["placed", "matrix"])
@pytest.mark.parametrize("rule", RULES)
def test_tiles(rule, place):
    arguments = (*scene(torch.float64, [(40, 33), (7, 50), (1, 1), (20, 20)], 50, 70, place=place), *RULES[rule])
    assert_near(forward(*arguments), OPS.composite(*arguments, True), 1e-14, "forward")
    grad = torch.rand(arguments[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [True, True, True, not place]
    expected = OPS.composite_backward(grad, *arguments, wanted)
    assert_near(backward(grad, *arguments, wanted=wanted), expected, 1e-12, "backward")


@pytest.mark.parametrize("place", [True, False], ids=["placed", "matrix"])
def test_an_object_drawn_twice(place):
    arguments = (*scene(torch.float64, [(9, 12), (5, 3)], 20, 24, place=place, shared=True), *RULES["blurred"])
    grad = torch.rand(arguments[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [True, True, True, not place]
    expected = OPS.composite_backward(grad, *arguments, wanted)
    assert_near(backward(grad, *arguments, wanted=wanted), expected, 1e-12, "backward")


@pytest.mark.parametrize("place", [True, False], ids=["placed", "matrix"])
@pytest.mark.parametrize("rule", RULES)
def test_bytes(rule, place):
    """Without a blur the same; with one the CPU's fixed point may round a tie another way."""
    arguments = (*scene(torch.uint8, [(40, 33), (7, 50), (1, 1), (20, 20)], 50, 70, place=place), *RULES[rule])
    actual, expected = forward(*arguments), OPS.composite(*arguments, True)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])
    apart = (actual[0].int() - expected[0].int()).abs()
    is_exact = place and rule in ("plain", "difference")
    assert apart.max() <= (0 if is_exact else 1)
    assert (apart > 0).double().mean() < 0.05


def test_nothing_to_draw():
    empty = scene(torch.float32, [(2, 3)], 0, 4, place=True)
    assert forward(*empty, *RULES["plain"])[0].shape == (1, 2, 0, 4)
    none = [t[:0] if i in (1, 2, 3, 5) else t for i, t in enumerate(scene(torch.float32, [(2, 3)], 9, 4, place=True))]
    none[4] = torch.tensor([0, 0])
    assert torch.equal(forward(*none, *RULES["blurred"])[0], none[0])
