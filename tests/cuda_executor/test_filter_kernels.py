"""The CUDA kernels of filters, run on the CPU, against the CPU kernels: bytes are the same, floats within rounding."""

import ctypes
from functools import cache

import pytest
import torch
from building import CSRC, HERE, both_orders, load

from fastnuggets.ops.filters import BORDERS, STEPS

OPS = torch.ops.fastnuggets
SOURCES = HERE / "filter_driver.cpp", CSRC / "blend" / "filter_kernels.cu"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 5}
# Largest errors seen: 4.8e-7, 8.9e-16, and a unit of the last place of the half types.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 4e-15, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.uint8: 0}


class Layout(ctypes.Structure):
    """The structs here are those of filter.h."""

    _fields_ = [(axis, ctypes.c_int64) for axis in "BPHWI"]


class Tap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int16) for name in ("dy", "dx", "weight", "joins")]


class Taps(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int), ("radius_y", ctypes.c_int), ("radius_x", ctypes.c_int), ("divisor", ctypes.c_int32),
        ("tap", Tap * 128),
    ]  # fmt: skip


class FilterTaps(ctypes.Structure):
    _fields_ = [
        ("shape", Layout), ("image", ctypes.c_void_p), ("out", ctypes.c_void_p), ("dtype", ctypes.c_uint8),
        ("border", ctypes.c_int), ("value", ctypes.c_double), ("rounding", ctypes.c_int),
        ("transposed", ctypes.c_bool), ("taps", Taps),
    ]  # fmt: skip


class PyramidStep(ctypes.Structure):
    _fields_ = [
        ("step", ctypes.c_int), ("planes", ctypes.c_int64), ("in_h", ctypes.c_int64), ("in_w", ctypes.c_int64),
        ("out_h", ctypes.c_int64), ("out_w", ctypes.c_int64), ("input", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("dtype", ctypes.c_uint8),
    ]  # fmt: skip


class Multiband(ctypes.Structure):
    _fields_ = [
        ("shape", Layout), ("levels", ctypes.c_int), ("dtype", ctypes.c_uint8), ("background", ctypes.c_void_p),
        ("foreground", ctypes.c_void_p), ("mask", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    ]  # fmt: skip


class MultibandBackward(ctypes.Structure):
    _fields_ = [
        ("forward", Multiband), ("grad", ctypes.c_void_p), ("by_background", ctypes.c_void_p),
        ("by_foreground", ctypes.c_void_p), ("by_mask", ctypes.c_void_p),
    ]  # fmt: skip


@cache
def kernels() -> ctypes.CDLL:
    return load(*SOURCES, functions=("filter_taps", "filter_step", "filter_multiband", "filter_multiband_backward"))


thread_order = both_orders(kernels)


def run(name, how):
    message = getattr(kernels(), name)(ctypes.byref(how))
    assert message is None, message.decode()


def random(*size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, size, dtype=dtype, generator=generator)
    return torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)


def layout(image, last):
    b, *size = image.shape
    return Layout(b, 1, *size) if last else Layout(b, *size, 1)


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0
    assert error <= TOLERANCE[actual.dtype], error


# dy, dx, weight, joins: all weights 1, whose mean is exact; weights of all kinds; and one far tap.
TAPS = {
    "mean": ([-1, 2, 1, 0, 0, 0, 1, 1, 2, -1, 1, 0, 3, 3, 1, 0], 4),
    "weights": ([0, 0, 4, 0, -2, 1, -1, 0, 1, 0, 2, 0], 5),
    "far": ([-6, 7, 1, 0], 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("way", ["nearest", "truncate", "transposed"])
def test_taps(dtype, border, taps, way):
    flat, divisor = TAPS[taps]
    if (way == "transposed" and dtype == torch.uint8) or (way == "truncate" and taps == "weights"):
        pytest.skip("not defined")
    made = Taps(len(flat) // 4, max(map(abs, flat[::4])), max(map(abs, flat[1::4])), divisor)
    for k in range(made.count):
        made.tap[k] = Tap(*flat[4 * k : 4 * k + 4])
    for size, last in (((2, 3, 9, 40), False), ((1, 3, 8, 14), True), ((1, 2, 3, 2), True), ((1, 1, 1, 1), False)):
        image = random(*size, dtype=dtype)
        image = image.movedim(1, -1).contiguous() if last else image
        out = torch.full_like(image, 7)
        number, rounding, transposed = BORDERS.index(border), int(way == "truncate"), way == "transposed"
        expected = OPS.filter_taps(image, flat, [0, made.count], [divisor], number, 200.0, rounding, transposed, last)
        how = FilterTaps(
            layout(image, last), image.data_ptr(), out.data_ptr(), DTYPES[dtype], number, 200.0, rounding, transposed,
            made,
        )  # fmt: skip
        run("filter_taps", how)
        scale = 200.0 if dtype != torch.uint8 else 1.0  # of the values that come in from outside
        assert_near(
            out / scale if dtype != torch.uint8 else out, expected / scale if dtype != torch.uint8 else expected
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_step(step, dtype):
    for h, w in ((1, 1), (1, 2), (2, 3), (4, 5), (7, 66), (18, 33)):
        fine, coarse = (h, w), ((h + 1) // 2, (w + 1) // 2)
        size, to = (fine, coarse) if step in ("down", "up_transposed") else (coarse, fine)
        image = random(2, *size, dtype=dtype)
        out = torch.full((2, *to), 7, dtype=dtype)
        number = STEPS.index(step)
        run("filter_step", PyramidStep(number, 2, *size, *to, image.data_ptr(), out.data_ptr(), DTYPES[dtype]))
        assert_near(out, OPS.pyramid_step(image, number, *to))


SIZES = [(1, 3, 16, 40, 4), (2, 2, 7, 5, 3), (1, 1, 1, 1, 0), (1, 5, 9, 2, 2), (2, 1, 4, 35, 0)]


def images(b, c, h, w, dtype, last):
    made = [random(b, c, h, w, dtype=dtype, seed=seed) for seed in (1, 2)]
    made = [t.movedim(1, -1).contiguous() if last else t for t in made]
    return *made, random(b, h, w, dtype=dtype, seed=3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_multiband(dtype, last):
    for *size, levels in SIZES:
        under, over, mask = images(*size, dtype, last)
        out = torch.full_like(under, 7)
        pointers = (t.data_ptr() for t in (under, over, mask, out))
        run("filter_multiband", Multiband(layout(under, last), levels, DTYPES[dtype], *pointers))
        expected = OPS.multiband_blend(under, over, mask, levels, last)
        if dtype != torch.uint8:
            assert_near(out, expected)
        else:  # sums of another order may round to the other byte
            differs = (out.int() - expected.int()).abs()
            assert differs.max() <= 1
            assert (differs > 0).sum() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_multiband_backward(dtype, last, wanted):
    for *size, levels in SIZES:
        under, over, mask = images(*size, dtype, last)
        grad = random(*under.shape, dtype=dtype, seed=4)
        outs = [torch.full_like(t, 7) if w else None for t, w in zip((under, over, mask), wanted, strict=True)]
        pointers = (t.data_ptr() for t in (under, over, mask))
        how = MultibandBackward(
            Multiband(layout(under, last), levels, DTYPES[dtype], *pointers, None, None),
            grad.data_ptr(),
            *(None if t is None else t.data_ptr() for t in outs),
        )
        run("filter_multiband_backward", how)
        expected = OPS.multiband_blend_backward(grad, under, over, mask, levels, last, list(map(bool, wanted)))
        for actual, e in zip(outs, expected, strict=True):
            if actual is not None:
                assert_near(actual, e)
