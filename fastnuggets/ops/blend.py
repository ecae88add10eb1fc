"""Cut-outs laid on backgrounds: hard and soft masks, feathered edges, any affine map or homography, many at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastnuggets import _C
from fastnuggets.ops.choices import number_of

# The order of these is that of the enum in csrc/blend/composite.h, premultiplied ones after the others.
_MIXES = {"none": 0, "gaussian": 0, "box": 0, "difference": 1}
_PREMULTIPLIED = 2
MODES = tuple(_MIXES)
EDGES = ("reflect", "zero")
INTERPOLATIONS = ("bilinear", "nearest")
_MAX_SIZE = 127

_OPS = torch.ops.fastnuggets

Numbers = Tensor | Sequence[float] | float


class Objects(NamedTuple):
    """Cut-outs of different sizes, packed once and used many times. N objects, P pixels in all, C channels.

    ``largest`` is on the host, so that a kernel's launch need not wait for the device.
    """

    pixels: Tensor  # [P * C] object after object, each [C, h, w], or [h, w, C] if channels_last
    mask: Tensor  # [P] of the same type: uint8 0..255, or floating 0..1
    sizes: Tensor  # [N, 3] int64, same device: number of the first pixel, h, w
    largest: tuple[int, int]  # largest h, largest w
    channels: int
    channels_last: bool


class Composite(NamedTuple):
    """What :func:`composite` gives with ``labels=True``."""

    image: Tensor  # like the background
    ids: Tensor  # [B, H, W] int32, without B if the background is: number of the topmost object, or -1
    area: Tensor  # [N] int64: pixels of the object inside the image, hidden ones too


def pack_objects(images: Sequence[Tensor], masks: Sequence[Tensor], *, channels_last: bool = False) -> Objects:
    """Packs cut-outs for :func:`composite`.

    Args:
        images: N tensors [C, h, w], or [h, w, C] if ``channels_last``, uint8 or floating, of one type and device.
        masks: N tensors [h, w] of the same type, uint8 0..255 or floating 0..1; or bool.
        channels_last: where the channels are.

    Returns:
        :class:`Objects`, in memory of its own.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.

    Differentiable in images and masks. Does not synchronise.
    """
    if len(images) != len(masks):
        raise ValueError(f"masks must be as many as images, {len(images)}, got {len(masks)}")
    if not images:
        raise ValueError("images must hold at least one object; composite() takes empty lists")
    first = images[0]
    dtype, channels = first.dtype, first.shape[-1 if channels_last else 0] if first.dim() == 3 else 0
    opaque = 255 if dtype == torch.uint8 else 1
    flat, shares, rows, start = [], [], [], 0
    for n, (image, mask) in enumerate(zip(images, masks, strict=True)):
        shape = tuple(mask.shape)
        expected = (*shape, channels) if channels_last else (channels, *shape)
        if len(shape) != 2 or image.shape != expected:
            layout = "[h, w, C]" if channels_last else "[C, h, w]"
            raise ValueError(
                f"images and masks of object {n} must be {layout} with C = {channels} and [h, w], got "
                f"{tuple(image.shape)} and {shape}"
            )
        if image.dtype != dtype or mask.dtype not in (dtype, torch.bool):
            raise TypeError(
                f"images and masks of object {n} must be {dtype} (or masks bool), got {image.dtype} and {mask.dtype}"
            )
        flat.append(image.reshape(-1))
        shares.append((mask.to(dtype) * opaque if mask.dtype == torch.bool else mask).reshape(-1))
        rows.append((start, *shape))
        start += mask.numel()
    sizes = torch.tensor(rows, dtype=torch.int64)
    largest = max(h for _, h, _ in rows), max(w for _, _, w in rows)
    return Objects(torch.cat(flat), torch.cat(shares), _to(sizes, first.device), largest, channels, channels_last)


def composite(
    background: Tensor,  # [B, C, H, W] | [C, H, W], channels last if channels_last
    objects: Objects | Sequence[Tensor] | Tensor,  # | [N, C, h, w]
    masks: Sequence[Tensor] | Tensor | None = None,  # | [N, h, w]
    *,
    ptr: Tensor | Sequence[int] | None = None,  # [B + 1] int64
    position: Tensor | Sequence[Sequence[float]] | None = None,  # [N, 2]
    scale: Numbers | None = None,  # [N]
    angle: Numbers | None = None,  # [N]
    flip: Tensor | Sequence[bool] | bool | None = None,  # [N] bool
    matrix: Tensor | None = None,  # [N, 3, 3]
    mode: str = "none",
    size: int = 5,
    sigma: float = 2.0,
    edge: str = "reflect",
    interpolation: str = "bilinear",
    premultiplied: bool = False,
    channels_last: bool = False,
    labels: bool = False,
) -> Tensor | Composite:
    """Lays objects on backgrounds, one after the other, each on the result of those before.

    ``image = a * object + (1 - a) * image`` at every pixel of the object's box, a the mask or the mask blurred. The box
    is the object's rectangle or, where it is resampled, the smallest that holds what interpolation leaves of it.

    Args:
        background: images [B, C, H, W], or one [C, H, W]; uint8, float32, float64, float16 or bfloat16. It is not
            written to.
        objects: an :class:`Objects`, the fastest; or images [C, h, w], of different sizes; or one tensor [N, C, h, w].
            Of the background's type and number of channels.
        masks: of ``objects`` that are not packed: [h, w] each, or [N, h, w]; uint8 0..255, floating 0..1, or bool.
        ptr: objects ``ptr[b]..ptr[b+1]-1`` lie on image b, the later ones on top; int64, ascending from 0 to N. None:
            all on the one image there is, or, where N is B, one on each.
        position: row and column (y, x) of the image where the centre of the object's first pixel comes to lie, before
            scale, angle and flip, which are about the centre of the object. It may lie outside. Integers, with none of
            those three, copy pixel for pixel; floating numbers interpolate. None: 0, 0.
        scale: of the object's edges, above 0. angle: in degrees, counter-clockwise as seen. flip: left to right, first.
            One number for all objects, or [N].
        matrix: instead of those four: from an object's (x, y, 1) to the image's, pixel centres at whole numbers, as
            OpenCV's warpAffine and warpPerspective take it.
        mode: ``"none"``; ``"gaussian"`` and ``"box"``, the mask blurred by ``size`` x ``size`` pixels of the result;
            ``"difference"``: |object - image| in the object's place.
        size, sigma: of the blur: odd, up to 127 (1 is no blur); and the Gaussian's deviation in pixels.
        edge: how the mask goes on beyond its box: ``"reflect"``, mirrored without repeating its edge, so that nothing
            is drawn outside and an object that fills its box keeps a hard edge, as in Dwibedi's generator; ``"zero"``:
            the box grows, the mask is 0 beyond the object, and the colour there is that of the object's edge.
        interpolation: ``"bilinear"``, of colours and mask each by themselves; or ``"nearest"``, with no gradient for
            the place. Beyond the object's edge the mask is 0 and the colour that of the edge.
        premultiplied: the objects' pixels are multiplied by their mask already. Not with a blur: it would show colours
            that such pixels do not have.
        channels_last: background and objects are [B, H, W, C] and [h, w, C].
        labels: say which object is where.

    Returns:
        The image, like ``background``; with ``labels`` a :class:`Composite`. An object is where its mask, resampled
        and not blurred, is 1/2 or more (128 of 255); ``ids`` has its number n of N.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was. On CUDA the values of ptr and sizes
            are not looked at: what they say must be right.

    uint8: without resampling or blur the exact value rounded to nearest, after each object: that of Pillow's
    ``Image.paste`` and ``ImageChops.difference``. Else within 1 of the exact value. Half types are computed with in
    float32 and rounded after each object.
    Pixels outside the boxes, and of straight colours those under a mask of 0, are the background's bit for bit; a mask
    of 1 gives the object's. So a NaN under a mask of 0 or beneath one of 1 is not seen; elsewhere it goes into the
    result, and any NaN into the gradients of what multiplies it. A matrix that is not finite or has no inverse draws
    nothing, and has gradient 0.

    Which objects are drawn, and in what order, is ``sizes`` alone: ``objects._replace(sizes=objects.sizes[[3, 0, 0]])``
    draws object 3 and object 0 twice; gradients add up.

    Differentiable once in background, objects, masks, position, scale, angle and matrix; a second derivative is an
    error. The box moves by whole pixels, and that has no derivative. Deterministic: the same bits for any number of
    threads. Does not synchronise and can be captured in a CUDA graph if what is given is on the device already:
    numbers and lists are copied there. The backward pass of resampled objects takes scratch on CUDA: for each object,
    about 8 + 8 C bytes for each pixel of the image (float32), since the host does not know where it lies.

    D. Dwibedi, I. Misra, M. Hebert, Cut, Paste and Learn, ICCV 2017, arXiv:1708.01642; T. Porter, T. Duff, Compositing
    Digital Images, SIGGRAPH 1984.
    """
    packed = objects_for(background, objects, masks, channels_last)
    mix, taps = _rule(mode, size, sigma, premultiplied)
    place, forward = _where(packed, position, scale, angle, flip, matrix)
    if ptr is not None and not isinstance(ptr, Tensor):
        ptr = _to(torch.tensor(ptr, dtype=torch.int64), background.device)
    # The binding costs less a call; the compiler needs the registered op.
    op = _OPS.composite if torch.compiler.is_compiling() or not hasattr(_C, "composite") else _C.composite
    image, ids, area = op(
        background, packed.pixels, packed.mask, packed.sizes, ptr, place, forward, mix,
        number_of("interpolation", interpolation, INTERPOLATIONS) == 1, taps, number_of("edge", edge, EDGES) == 1,
        channels_last, labels,
    )  # fmt: skip
    return Composite(image, ids, area) if labels else image


def objects_for(
    background: Tensor,
    objects: Objects | Sequence[Tensor] | Tensor,
    masks: Sequence[Tensor] | Tensor | None,
    channels_last: bool,
) -> Objects:
    """What is to be laid on a background, packed, and of its type and channels."""
    if background.dim() not in (3, 4):
        raise ValueError(f"background must be [B, C, H, W] or [C, H, W], got {tuple(background.shape)}")
    if not isinstance(objects, Objects):
        objects = _packed(background, objects, masks, channels_last)
    if objects.pixels.dtype != background.dtype:
        raise TypeError(f"objects must be {background.dtype} like background, got {objects.pixels.dtype}")
    channels = background.size(-1 if channels_last else -3)
    if (objects.channels, objects.channels_last) != (channels, channels_last):
        raise ValueError(
            f"objects must have {channels} channels, {'last' if channels_last else 'first'}, like background, got "
            f"{objects.channels}, {'last' if objects.channels_last else 'first'}"
        )
    return objects


def _packed(
    background: Tensor, objects: Sequence[Tensor] | Tensor, masks: Sequence[Tensor] | Tensor | None, channels_last: bool
) -> Objects:
    if masks is None:
        raise ValueError("masks must be given with objects that are not packed, got None")
    if len(objects) or len(masks):
        return pack_objects(list(objects), list(masks), channels_last=channels_last)
    nothing = background.new_empty(0)
    channels = background.size(-1 if channels_last else -3)
    sizes = torch.empty((0, 3), dtype=torch.int64, device=background.device)
    return Objects(nothing, nothing, sizes, (0, 0), channels, channels_last)


@cache
def _rule(mode: str, size: int, sigma: float, premultiplied: bool) -> tuple[int, list[float]]:
    """The number of the mix, and the taps from the middle outwards: none without a blur."""
    number_of("mode", mode, MODES)
    mix = _MIXES[mode] + _PREMULTIPLIED * premultiplied
    if mode not in ("gaussian", "box"):
        return mix, []
    if premultiplied:
        raise ValueError(f"premultiplied must be False with mode {mode!r}, got True")
    if size not in range(1, _MAX_SIZE + 1, 2):
        raise ValueError(f"size must be odd, from 1 to {_MAX_SIZE}, got {size}")
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    radius = size // 2
    if radius == 0:
        return mix, []
    taps = [math.exp(-((k / sigma) ** 2) / 2) if mode == "gaussian" else 1.0 for k in range(radius + 1)]
    total = 2 * math.fsum(taps) - taps[0]
    return mix, [t / total for t in taps]


def _to(values: Tensor, device: torch.device) -> Tensor:
    return values if values.device == device else values.to(device)


def _where(
    objects: Objects,
    position: Tensor | Sequence[Sequence[float]] | None,
    scale: Numbers | None,
    angle: Numbers | None,
    flip: Tensor | Sequence[bool] | bool | None,
    matrix: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Where the objects lie: rows and columns [N, 2] int64, or matrices [N, 3, 3] float64."""
    count, device = objects.sizes.size(0), objects.sizes.device
    moved = scale is not None or angle is not None or flip is not None
    if matrix is not None:
        if moved or position is not None:
            raise ValueError("matrix must be None beside position, scale, angle or flip")
        if matrix.shape != (count, 3, 3):
            raise ValueError(f"matrix must be [N = {count}, 3, 3], got {tuple(matrix.shape)}")
        return None, matrix.to(torch.float64)
    if position is None:
        position = torch.zeros((count, 2), dtype=torch.int64, device=device)
    elif not isinstance(position, Tensor):
        position = _to(_exact(position).reshape(-1, 2) if count else torch.zeros(0, 2), device)
    if position.shape != (count, 2):
        raise ValueError(f"position must be [N = {count}, 2], got {tuple(position.shape)}")
    if not moved and not position.is_floating_point():
        return position.long(), None
    return None, _matrices(objects.sizes, position, scale, angle, flip)


def _matrices(
    sizes: Tensor,
    position: Tensor,
    scale: Numbers | None,
    angle: Numbers | None,
    flip: Tensor | Sequence[bool] | bool | None,
) -> Tensor:
    """[N, 3, 3] float64: the object's centre goes to the middle of its rectangle at the position."""
    one = torch.ones(sizes.size(0), dtype=torch.float64, device=sizes.device)
    cos = one if scale is None else _each("scale", scale, one)
    sin = torch.zeros_like(one)
    if angle is not None:
        turn = torch.deg2rad(_each("angle", angle, one))
        cos, sin = cos * turn.cos(), cos * turn.sin()
    side = one if flip is None else 1 - 2 * _each("flip", flip, one)
    linear = torch.stack([side * cos, sin, -side * sin, cos], 1).view(-1, 2, 2)
    centre = ((sizes[:, 1:].to(torch.float64) - 1) / 2).flip(1)[:, :, None]  # x, y
    shift = position.to(torch.float64).flip(1)[:, :, None] + centre - linear @ centre
    bottom = torch.zeros_like(linear[:, :1]), one[:, None, None]
    return torch.cat([torch.cat([linear, shift], 2), torch.cat(bottom, 2)], 1)


def _exact(values: Sequence[Sequence[float]] | Sequence[float] | float) -> Tensor:
    """Integers as integers, other numbers in float64."""
    made = torch.tensor(values)
    return torch.tensor(values, dtype=torch.float64) if made.is_floating_point() else made


def _each(name: str, value: Numbers | Sequence[bool], like: Tensor) -> Tensor:
    values = _to(value if isinstance(value, Tensor) else _exact(value), like.device).to(torch.float64)
    if values.dim() > 1 or values.numel() not in (1, like.numel()):
        raise ValueError(f"{name} must be one number or [N = {like.numel()}], got {tuple(values.shape)}")
    return values.expand_as(like)


@torch.library.register_fake("fastnuggets::composite")
def _(background, pixels, mask, sizes, ptr, place, matrix, mix, nearest, taps, zero_edge, channels_last, labels):  # type: ignore[no-untyped-def]
    shape = background.shape[:-1] if channels_last else (*background.shape[:-3], *background.shape[-2:])
    ids = background.new_empty(shape if labels else (0,), dtype=torch.int32)
    area = background.new_empty((sizes.size(0) if labels else 0,), dtype=torch.int64)
    return background.new_empty(background.shape), ids, area


@torch.library.register_fake("fastnuggets::composite_backward")
def _(grad, background, pixels, mask, sizes, ptr, place, matrix, *rule):  # type: ignore[no-untyped-def]
    given = (background, pixels, mask, background.new_empty(0, dtype=torch.float64) if matrix is None else matrix)
    return tuple(t.new_empty(t.shape if w else (0,)) for t, w in zip(given, rule[-1], strict=True))
