"""Filters of images: linear motion blur, any few taps, pyramids, and the multi-band blend that is made of them.

**Images** are [B, C, H, W] or [C, H, W], or with ``channels_last`` [B, H, W, C] or [H, W, C]. uint8 and the floating
types; half types are computed with in float32 and rounded once. Autocast leaves them as they are.

**Promises.** Inputs are never written to. Floating images are differentiable in reverse mode to any order; a
forward-mode tangent is an error. Deterministic, the same bits for any number of threads. Nothing synchronises and CUDA
graphs can hold every function: what tells a kernel where to read goes to it by value.

Errors are ValueError or TypeError that name the argument, what it must be and what it was.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import accumulate, chain

import torch
from torch import Tensor

# The order of these is that of the enums in csrc/blend/filter.h.
BORDERS = ("constant", "reflect", "replicate")
STEPS = ("down", "up", "down_transposed", "up_transposed")
_NEAREST, _TRUNCATE = 0, 1

LENGTHS = (3, 5, 7, 9)
KINDS = ("full", "left", "right")

# Lines of the published table that are written from the other end than their neighbours: (length, degrees).
_REVERSED = {(3, 90.0), (5, 45.0), (5, 67.5), (5, 90.0), (7, 90.0)}

Border = float | str
_OPS = torch.ops.fastnuggets


# --- motion blur ------------------------------------------------------------------------------------------------------


def motion_kernel(length: int, angle: float, kind: str = "full", *, used: Collection[str] = ()) -> Tensor:
    """The convolution kernel of a straight line, [length, length] float32, as Dwibedi et al. 2017 used it (pyblur).

    The line runs through the centre of the square, or from the centre to one end; its pixels, those of a line drawn
    with rounding, weigh the same and add up to 1.

    Args:
        length: 3, 5, 7 or 9.
        angle: degrees, anticlockwise from the row: of the ``4 * (length // 2)`` even steps of [0, 180) the nearest one
            is taken, the first of two as near; 179 so means the last step. Other angles are taken modulo 180.
        kind: ``"full"``; ``"left"``, from the first end to the centre; ``"right"``, from the centre to the other end.
            The first end is the left one, or of the upright and some steep lines the upper or lower one as published.
        used: kinds that were drawn of this line before, for the published defect: each moved an end of the line to the
            centre in a table that was never set back. With both, ``("left", "right")``, every kernel is 1 at the
            centre, and the image is not blurred; that is how most images of a large data set were made.

    On the CPU; not differentiable.
    D. Dwibedi, I. Misra, M. Hebert, Cut, Paste and Learn, ICCV 2017, arXiv:1708.01642.
    """
    kernel = torch.zeros(length, length) if length in LENGTHS else torch.zeros(0)
    pixels = _line(length, angle, kind, tuple(sorted(used)))
    for row, column in pixels:
        kernel[row, column] = 1
    return kernel / len(pixels)


def motion_blur(
    image: Tensor,
    length: int | Sequence[int],
    angle: float | Sequence[float],
    kind: str | Sequence[str] = "full",
    *,
    border: Border = "reflect",
    truncate: bool = False,
    used: Collection[str] = (),
    channels_last: bool = False,
) -> Tensor:
    """Convolves an image with :func:`motion_kernel`.

    Args:
        image: as the module says.
        length, angle, kind, used: of the kernel; or lists of them, one for each image of a batch.
        border: what lies outside: ``"reflect"`` (without repeating the edge, OpenCV's default), ``"replicate"``, or a
            number; the published form is 255.
        truncate: uint8 only. Otherwise bytes are the exact means to nearest, ties to even, which are OpenCV's. The
            published form cuts float32 sums off, by up to one level: ``convolve2d(image, kernel, mode="same",
            fillvalue=255).astype(uint8)`` bit by bit.

    Returns:
        Like the image. As the module says.
    """
    batch, squeeze = _batch(image, channels_last)
    number, value = _border(border, image)
    before = tuple(sorted(used))
    taps: Sequence[int]
    if any(isinstance(given, (list, tuple)) for given in (length, angle, kind)):
        lists = {"length": length, "angle": angle, "kind": kind}
        columns = [_for_each(name, given, len(batch)) for name, given in lists.items()]
        kernels = [_kernel_taps(*row, before) for row in zip(*columns, strict=True)]
        counts = [len(kernel) // 4 for kernel in kernels]
        ptr = [0, *accumulate(counts)]
        taps = list(chain.from_iterable(kernels))
    else:
        taps = _kernel_taps(length, angle, kind, before)
        counts = [len(taps) // 4]
        ptr = [0, *counts]
    rounding = _TRUNCATE if truncate else _NEAREST
    out: Tensor = _OPS.filter_taps(batch, taps, ptr, counts, number, value, rounding, False, channels_last)
    return out.squeeze(0) if squeeze else out


@lru_cache(maxsize=1024)
def _kernel_taps(length: int, angle: float, kind: str, used: tuple[str, ...]) -> tuple[int, ...]:
    """dy, dx, weight and whether it joins the tap before (csrc/blend/filter.h), of each tap."""
    taps: list[int] = []
    four = None
    for row, column in sorted(_line(length, angle, kind, used)):
        # A convolution reads what lies on the other side of the centre. Sums that are cut off depend on their order: it
        # is SciPy's, which adds up the kernel row by row, and there by fours while there are four columns.
        before, four = four, (row, column // 4) if column < length // 4 * 4 else None
        taps += (length // 2 - row, length // 2 - column, 1, int(four is not None and four == before))
    return tuple(taps)


@lru_cache(maxsize=1024)
def _line(length: int, angle: float, kind: str, used: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Row and column of each pixel."""
    if length not in LENGTHS:
        raise ValueError(f"length: expected one of {LENGTHS}, got {length}")
    for name, given in (("kind", kind), *(("used", other) for other in used)):
        if given not in KINDS:
            raise ValueError(f"{name}: expected one of {KINDS}, got {given!r}")
    if not math.isfinite(angle):
        raise ValueError(f"angle: expected a number of degrees, got {angle}")
    centre = length // 2
    start, end = _ends(centre, angle)
    if "right" in (kind, *used):
        start = (centre, centre)
    if "left" in (kind, *used):
        end = (centre, centre)
    return _drawn(start, end)


def _ends(centre: int, angle: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """The ends of the nearest of 4 * centre directions, on the rim of the square: once around half of it."""
    steps = 4 * centre
    place = angle % 180 / 180 * steps
    k = min(range(steps), key=lambda step: (abs(step - place), step))
    side, far = k // centre, 2 * centre
    if side == 0 or (side == 1 and k == centre):
        ends = (centre + k, 0), (centre - k, far)
    elif k <= 2 * centre:
        ends = (far, k - centre), (0, 3 * centre - k)
    elif k <= 3 * centre:
        ends = (0, 3 * centre - k), (far, k - centre)
    else:
        ends = (k - 3 * centre, 0), (5 * centre - k, far)
    return ends[::-1] if (far + 1, 180 / steps * k) in _REVERSED else ends


def _drawn(start: tuple[int, int], end: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Bresenham's line: one pixel a step along the longer axis; halves of the shorter one go on towards the end."""
    rows, columns = end[0] - start[0], end[1] - start[1]
    steps = max(abs(rows), abs(columns))

    def after(step: int, whole: int) -> int:
        return int(math.copysign((2 * step * abs(whole) + steps) // (2 * steps), whole))

    if steps == 0:
        return (start,)
    return tuple((start[0] + after(i, rows), start[1] + after(i, columns)) for i in range(steps + 1))


# --- any few taps -----------------------------------------------------------------------------------------------------


def filter_taps(
    image: Tensor,
    taps: Sequence[tuple[int, int, int]],
    *,
    divisor: int = 1,
    border: Border = "reflect",
    channels_last: bool = False,
) -> Tensor:
    """out[y, x] = sum of weight * image[y + dy, x + dx] over (dy, dx, weight) in ``taps``, over ``divisor``.

    Args:
        image: as the module says.
        taps: up to 128, at most 255 pixels away; weights are integers, for uint8 of at most 65536 in all.
        divisor: 1 to 32767. uint8 images become the nearest byte of the exact quotient, ties to even.
        border: as for :func:`motion_blur`.

    Returns:
        Like the image. As the module says.
    """
    batch, squeeze = _batch(image, channels_last)
    number, value = _border(border, image)
    flat = [n for dy, dx, weight in taps for n in (dy, dx, weight, 0)]
    out: Tensor = _OPS.filter_taps(
        batch, flat, [0, len(taps)], [divisor], number, value, _NEAREST, False, channels_last
    )
    return out.squeeze(0) if squeeze else out


# --- pyramids ---------------------------------------------------------------------------------------------------------


def pyr_down(image: Tensor) -> Tensor:
    """The next level of a Gaussian pyramid: [..., H, W] floating -> [..., (H + 1) // 2, (W + 1) // 2].

    1 4 6 4 1 / 16 on each axis at every second pixel, reflected at the border without repeating the edge: OpenCV's
    pyrDown. As the module says.
    """
    _check_floating(image)
    h, w = image.shape[-2:]
    out: Tensor = _OPS.pyramid_step(image, STEPS.index("down"), (h + 1) // 2, (w + 1) // 2)
    return out


def pyr_up(image: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """The expansion of a level: [..., h, w] floating -> [..., *size], OpenCV's pyrUp.

    Args:
        size: (H, W), each twice h and w (the default) or one less.

    As the module says.
    """
    _check_floating(image)
    h, w = image.shape[-2:]
    size = (2 * h, 2 * w) if size is None else size
    if len(size) != 2 or any(2 * n - m not in (0, 1) for n, m in zip((h, w), size, strict=True)):
        raise ValueError(f"size: expected twice {(h, w)} or one less on an axis, got {tuple(size)}")
    out: Tensor = _OPS.pyramid_step(image, STEPS.index("up"), *size)
    return out


def multiband_blend(
    background: Tensor, foreground: Tensor, mask: Tensor, *, levels: int = 5, channels_last: bool = False
) -> Tensor:
    """Blends each band of two images' Laplacian pyramids under a mask that is as smooth as the band.

    Args:
        background, foreground: of one shape, type and device, as the module says; any size.
        mask: [B, H, W] or [H, W] of the same type, uint8 0..255 or floating 0..1; or bool. 0 takes the background.
        levels: bands beside the last, coarsest one; no more are used than the size has. 0 is alpha compositing.

    Returns:
        Like the background; uint8 rounded to nearest, ties to even, and clipped. Where the mask is 0 all around, to the
        reach of the coarsest band, the background bit by bit; where it is 1, the foreground to rounding.

    Differentiable in all three; saved for backward: the three. Otherwise as the module says.
    P. Burt, E. Adelson, A multiresolution spline with application to image mosaics, ACM Trans. Graphics 2, 1983.
    """
    under, squeeze = _batch(background, channels_last, "background")
    over, _ = _batch(foreground, channels_last, "foreground")
    if foreground.shape != background.shape:
        raise ValueError(
            f"foreground: expected {tuple(background.shape)} like background, got {tuple(foreground.shape)}"
        )
    if mask.dtype == torch.bool:
        mask = mask.to(background.dtype) * (255 if background.dtype == torch.uint8 else 1)
    size = under.shape[1:3] if channels_last else under.shape[2:]
    if mask.shape[-2:] != size or mask.dim() not in (2, 3) or (mask.dim() == 3 and len(mask) != len(under)):
        raise ValueError(f"mask: expected {(len(under), *size)} or {tuple(size)}, got {tuple(mask.shape)}")
    out: Tensor = _OPS.multiband_blend(under, over, mask.expand(len(under), *size), levels, channels_last)
    return out.squeeze(0) if squeeze else out


# --- arguments --------------------------------------------------------------------------------------------------------


def _batch(image: Tensor, channels_last: bool, name: str = "image") -> tuple[Tensor, bool]:
    """[B, ...], and whether the B was added."""
    axes = "H, W, C" if channels_last else "C, H, W"
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(image).__name__}")
    if image.dim() not in (3, 4):
        raise ValueError(f"{name}: expected [B, {axes}] or [{axes}], got {tuple(image.shape)}")
    return (image.unsqueeze(0), True) if image.dim() == 3 else (image, False)


def _border(border: Border, image: Tensor) -> tuple[int, float]:
    """The number of the border and its constant."""
    if not isinstance(border, str):
        value = float(border)
        if image.dtype == torch.uint8 and not (0 <= value <= 255 and value.is_integer()):
            raise ValueError(f"border: expected a whole number in 0..255 for uint8, got {border}")
        return 0, value
    if border not in BORDERS[1:]:
        raise ValueError(f"border: expected a number or one of {BORDERS[1:]}, got {border!r}")
    return BORDERS.index(border), 0.0


def _for_each(name: str, value: object, count: int) -> list:  # type: ignore[type-arg]
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: expected one or a list of {count}, one for each image, got {len(value)}")
    return list(value)


def _check_floating(image: Tensor) -> None:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise TypeError(f"image: expected a floating-point tensor, got {getattr(image, 'dtype', type(image).__name__)}")
    if image.dim() < 2:
        raise ValueError(f"image: expected [..., H, W], got {tuple(image.shape)}")


# --- fake kernels -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastnuggets::filter_taps")
def _(image, *_):  # type: ignore[no-untyped-def]
    return image.new_empty(image.shape)


@torch.library.register_fake("fastnuggets::pyramid_step")
def _(image, step, h, w):  # type: ignore[no-untyped-def]
    return image.new_empty((*image.shape[:-2], h, w))


@torch.library.register_fake("fastnuggets::multiband_blend")
def _(background, *_):  # type: ignore[no-untyped-def]
    return background.new_empty(background.shape)


@torch.library.register_fake("fastnuggets::multiband_blend_backward")
def _(grad, background, foreground, mask, levels, channels_last, wanted):  # type: ignore[no-untyped-def]
    inputs = background, foreground, mask
    return tuple(t.new_empty(t.shape if w else 0) for t, w in zip(inputs, wanted, strict=True))
