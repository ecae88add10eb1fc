"""Compositing: Pillow's and OpenCV's pixels where they define the same, the definition in float64 elsewhere."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from fastnuggets import reference
from fastnuggets.ops import Composite, Objects, composite, pack_objects
from fastnuggets.ops.blend import EDGES, MODES

cv2 = pytest.importorskip("cv2")
Image = pytest.importorskip("PIL.Image")
ImageChops = pytest.importorskip("PIL.ImageChops")

FLOATS = torch.float32, torch.float64, torch.float16, torch.bfloat16
# Largest distance from the definition in float64 of values in 0..1. Seen: 1.7e-7 and 4e-16; half types are rounded.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def noise(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def some_mask(h, w, seed=0):
    """All there, not there and some of each, in pieces shorter and longer than a vector."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 256, (h, w), dtype=np.uint8)
    for i in range(h):
        left, right = sorted(rng.integers(0, w + 1, 2))
        mask[i, left:right] = 255 * (i % 2)
    return mask


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def as_bytes(image):
    return image.numpy().astype(np.uint8)


def packed(images, masks, dtype=torch.uint8, **how):
    """uint8 arrays [h, w, C] and [h, w] as objects of a type."""
    scale = 1 if dtype == torch.uint8 else 255
    images, masks = (
        [tensor(a).to(dtype) / scale if scale > 1 else tensor(a) for a in part] for part in (images, masks)
    )
    if not how.get("channels_last"):
        images = [i.permute(2, 0, 1) for i in images]
    return pack_objects(images, masks, **how)


def taps_of(mode, size, sigma):
    if mode not in ("gaussian", "box"):
        return []
    radius = np.arange(size // 2 + 1)
    taps = np.exp(-(radius**2) / (2 * sigma**2)) if mode == "gaussian" else np.ones(len(radius))
    return list(taps / (2 * taps.sum() - taps[0]))


def expected(background, images, masks, ptr, *, mode="none", size=5, sigma=2.0, edge="reflect", **how):
    """The definition in float64 of uint8 or floating [B, C, H, W], [C, h, w] and [h, w]; uint8 is not rounded."""
    byte = background.dtype == torch.uint8
    scale = 255 if byte else 1
    image, ids, area = reference.composite(
        background.double() / scale,
        [i.double() / scale for i in images],
        [m.double() / scale for m in masks],
        ptr,
        difference=mode == "difference",
        taps=taps_of(mode, size, sigma),
        zero_edge=edge == "zero",
        **how,
    )
    return image * scale, ids, area


# --- bytes: what others give ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("h", "w", "channels"), [(37, 131, 3), (64, 64, 4), (5, 1, 1), (9, 40, 3), (3, 33, 2)])
def test_bytes_are_pillows(h, w, channels, channels_last):
    """Image.paste with a mask, some of it outside, and Image.composite where the object is the whole image."""
    bands = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    background, top, mask = noise(60, 90, channels), noise(h, w, channels, seed=1), some_mask(h, w)

    def picture(array):
        return Image.fromarray(array.squeeze(-1) if channels == 1 else array, bands)

    for y, x in [(3, 7), (-4, -20), (50, 60), (-h, 0), (60, 90), (0, -w + 1)]:
        wanted = picture(background.copy())
        wanted.paste(picture(top), (x, y), Image.fromarray(mask))
        under = tensor(background) if channels_last else tensor(background).permute(2, 0, 1)
        objects = packed([top], [mask], channels_last=channels_last)
        actual = composite(under, objects, position=[[y, x]], channels_last=channels_last)
        actual = actual if channels_last else actual.permute(1, 2, 0)
        assert np.array_equal(as_bytes(actual), np.asarray(wanted).reshape(background.shape)), (y, x)
    below = noise(h, w, channels, seed=2)
    wanted = Image.composite(picture(top), picture(below), Image.fromarray(mask))
    actual = composite(tensor(below), packed([top], [mask], channels_last=True), channels_last=True)
    assert np.array_equal(as_bytes(actual), np.asarray(wanted).reshape(below.shape))


def test_bytes_of_every_alpha_and_colour():
    """All 256 ^ 3 mixes are the exact value rounded to nearest."""
    colours = np.arange(256)
    for alpha in range(0, 256, 5):
        top, under = np.meshgrid(colours, colours, indexing="ij")
        wanted = (2 * (alpha * top + (255 - alpha) * under) + 255) // 510
        objects = pack_objects([tensor(top.astype(np.uint8))[None]], [torch.full((256, 256), alpha, dtype=torch.uint8)])
        assert np.array_equal(as_bytes(composite(tensor(under.astype(np.uint8))[None], objects)[0]), wanted)


def test_bytes_are_opencvs_blend():
    """cv2.blendLinear works in float32 and divides by the sum of the weights, a hair above 1, which moves ties."""
    top, under, mask = noise(64, 96, 3), noise(64, 96, 3, seed=1), some_mask(64, 96)
    share = mask.astype(np.float32) / 255
    wanted = cv2.blendLinear(top, under, share, 1 - share).astype(int)
    actual = composite(tensor(under), packed([top], [mask], channels_last=True), channels_last=True)
    apart = np.abs(as_bytes(actual) - wanted)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


@pytest.mark.parametrize("channels_last", [False, True])
def test_difference_is_pillows(channels_last):
    top, under, full = noise(40, 70, 3), noise(40, 70, 3, seed=1), np.full((40, 70), 255, np.uint8)
    wanted = np.asarray(ImageChops.difference(Image.fromarray(top), Image.fromarray(under)))
    background = tensor(under) if channels_last else tensor(under).permute(2, 0, 1)
    objects = packed([top], [full], channels_last=channels_last)
    actual = composite(background, objects, mode="difference", channels_last=channels_last)
    assert np.array_equal(as_bytes(actual if channels_last else actual.permute(1, 2, 0)), wanted)


@pytest.mark.parametrize("mode", ["gaussian", "box"])
def test_a_feather_is_the_published_pipelines(mode):
    """Dwibedi's: OpenCV blurs the mask inside the object's box to 8 bits, Pillow pastes. Each rounds once."""
    top, under, mask = noise(50, 60, 3), noise(80, 90, 3, seed=1), some_mask(50, 60)
    soft = cv2.GaussianBlur(mask, (5, 5), 2, borderType=cv2.BORDER_REFLECT_101)
    soft = soft if mode == "gaussian" else cv2.blur(mask, (3, 3), borderType=cv2.BORDER_REFLECT_101)
    wanted = Image.fromarray(under.copy())
    wanted.paste(Image.fromarray(top), (11, 8), Image.fromarray(soft))
    size = 5 if mode == "gaussian" else 3
    objects = packed([top], [mask], channels_last=True)
    actual = composite(tensor(under), objects, position=[[8, 11]], mode=mode, size=size, channels_last=True)
    assert np.abs(as_bytes(actual).astype(int) - np.asarray(wanted)).max() <= 1


def similarity(h, w, degrees, scale, to):
    matrix = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), degrees, scale)
    matrix[:, 2] += to
    return np.vstack([matrix, [0, 0, 1]])


TILTED = np.array([[0.9, 0.15, 4.0], [-0.1, 0.8, 12.0], [0.0005, 0.001, 1.0]])


@pytest.mark.parametrize("how", ["similarity", "homography"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_a_warp_is_opencvs(dtype, interpolation, how):
    """Seen: nearest the same, bilinear bytes 1 apart in 0.02 %, float32 1e-5 of 1, which is OpenCV's places."""
    top, full = noise(60, 80, 3), np.full((60, 80), 255, np.uint8)
    matrix = similarity(60, 80, 27, 0.8, (5.3, -3.7)) if how == "similarity" else TILTED
    flags = cv2.INTER_NEAREST if interpolation == "nearest" else cv2.INTER_LINEAR
    source = top if dtype == torch.uint8 else top.astype(np.float32) / 255
    warp = (lambda a: cv2.warpAffine(a, matrix[:2], (100, 90), flags=flags)) if how == "similarity" else (
        lambda a: cv2.warpPerspective(a, matrix, (100, 90), flags=flags))  # fmt: skip
    wanted = warp(source).astype(np.float64)
    inside = warp(full.astype(np.float32)) == 255  # at the edge OpenCV mixes with black, here the mask does
    background = torch.zeros(90, 100, 3, dtype=dtype)
    objects = packed([top], [full], dtype, channels_last=True)
    actual = composite(
        background, objects, matrix=tensor(matrix)[None], interpolation=interpolation, channels_last=True
    )
    apart = np.abs(actual.numpy() - wanted)[inside]
    assert inside.mean() > 0.2
    if interpolation == "nearest":
        assert apart.max() == 0
    elif dtype == torch.uint8:
        assert apart.max() <= 1
        assert (apart > 0).mean() < 1e-3
    else:
        assert apart.max() <= 3e-5


# --- against the definition -------------------------------------------------------------------------------------------


def scene(dtype, *, channels_last=False, sizes=((30, 41), (12, 9), (40, 64), (1, 1), (3, 0), (70, 20)), seed=0):
    """Three images, one without objects; objects here and there, as arguments of composite and as their values."""
    shape = 50, 67
    backgrounds = [noise(*shape, 3, seed=seed + i) for i in range(3)]
    tops = [noise(h, w, 3, seed=seed + 10 + i) for i, (h, w) in enumerate(sizes)]
    masks = [some_mask(h, w, seed=seed + 20 + i) if h * w else noise(h, w) for i, (h, w) in enumerate(sizes)]
    background = tensor(np.stack(backgrounds))
    if dtype != torch.uint8:
        background = (background.double() / 255).to(dtype)
    objects = packed(tops, masks, dtype, channels_last=channels_last)
    first = packed(tops, masks, dtype)
    pixels, shares = [], []
    for start, h, w in first.sizes.tolist():
        pixels.append(first.pixels[3 * start : 3 * (start + h * w)].view(3, h, w))
        shares.append(first.mask[start : start + h * w].view(h, w))
    given = background if channels_last else background.permute(0, 3, 1, 2)
    return given, objects, background.permute(0, 3, 1, 2), pixels, shares


PTR = [0, 4, 4, 6]
PLACES = [[-7, 20], [44, -3], [5, 10], [0, 66], [2, 3], [-10, -5]]
FREE = {
    "position": [[-7.3, 20.2], [44.0, -3.5], [5.5, 10.0], [0.1, 65.0], [2.0, 3.0], [-10.0, -5.25]],
    "angle": [12.0, 0.0, -140.0, 45.0, 3.0, 83.0],
    "scale": [1.0, 1.7, 0.4, 3.0, 1.0, 0.75],
    "flip": [True, False, False, True, False, True],
}


def error(actual, wanted):
    return (actual.double() - wanted).abs().max().item()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS], ids=str)
def test_placed_is_the_definition(dtype, mode, edge, channels_last):
    """On one object an image: with several, bytes and half types are rounded between."""
    background, objects, first, pixels, masks = scene(dtype, channels_last=channels_last)
    chosen = [0, 2, 5]
    some = objects._replace(sizes=objects.sizes[chosen])
    where = torch.tensor([PLACES[i] for i in chosen])
    actual = composite(background, some, position=where, mode=mode, edge=edge, channels_last=channels_last)
    wanted, _, _ = expected(
        first, [pixels[i] for i in chosen], [masks[i] for i in chosen], [0, 1, 2, 3], place=where, mode=mode, edge=edge
    )
    actual = actual.permute(0, 3, 1, 2) if channels_last else actual
    most = 0.5 if mode in ("none", "difference") else 1.0
    assert error(actual, wanted) <= (most if dtype == torch.uint8 else TOLERANCE[dtype])


@pytest.mark.parametrize("mode", ["none", "gaussian"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS], ids=str)
def test_moved_is_the_definition(dtype, interpolation, mode):
    background, objects, first, pixels, masks = scene(dtype)
    chosen = [0, 2, 5]
    how = {name: [values[i] for i in chosen] for name, values in FREE.items()}
    some = objects._replace(sizes=objects.sizes[chosen])
    actual = composite(background, some, interpolation=interpolation, mode=mode, **how)
    matrix = torch.stack([by_hand(*pixels[i].shape[1:], **{k: v[i] for k, v in FREE.items()}) for i in chosen])
    wanted, _, _ = expected(
        first, [pixels[i] for i in chosen], [masks[i] for i in chosen], [0, 1, 2, 3],
        matrix=matrix, nearest=interpolation == "nearest", mode=mode,
    )  # fmt: skip
    apart = (actual.double() - wanted).abs()
    # Places are rounded otherwise than with the matrix by hand, and times the slope of noise: seen, 3e-13.
    most = 0.51 if dtype == torch.uint8 else max(TOLERANCE[dtype], 1e-12)
    assert apart.max() <= most


def by_hand(h, w, position, angle, scale, flip):
    """To the middle, mirrored, turned as seen counter-clockwise, scaled, and the middle to its place."""

    def move(x, y):
        return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)

    turn = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
    cos, sin = scale * turn.cos(), scale * turn.sin()
    spin = torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=torch.float64)
    mirror = torch.diag(torch.tensor([-1.0 if flip else 1.0, 1, 1], dtype=torch.float64))
    middle = (w - 1) / 2, (h - 1) / 2
    return move(position[1] + middle[0], position[0] + middle[1]) @ spin @ mirror @ move(-middle[0], -middle[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_order_and_labels(dtype, moved, mode):
    """All objects, the later on top: equal to one call an object, and labels by the definition."""
    background, objects, first, pixels, masks = scene(dtype)
    how = FREE if moved else {"position": PLACES}
    image, ids, area = composite(background, objects, ptr=PTR, mode=mode, labels=True, **how)
    one_by_one = background
    for n in range(len(masks)):
        b = next(b for b, (start, end) in enumerate(itertools.pairwise(PTR)) if start <= n < end)
        single = objects._replace(sizes=objects.sizes[n : n + 1])
        drawn = composite(one_by_one[b], single, mode=mode, **{k: v[n : n + 1] for k, v in how.items()})
        one_by_one = torch.stack([drawn if i == b else one_by_one[i] for i in range(3)])
    assert torch.equal(image, one_by_one)
    matrix = torch.stack([by_hand(*p.shape[1:], **{k: v[n] for k, v in FREE.items()}) for n, p in enumerate(pixels)])
    _, wanted_ids, wanted_area = expected(
        first, pixels, masks, PTR, mode=mode, **({"matrix": matrix} if moved else {"place": torch.tensor(PLACES)})
    )
    assert ids.dtype == torch.int32
    # A resampled mask may round to the other side of a half.
    assert (ids != wanted_ids).double().mean() <= (1e-3 if moved else 0)
    assert (area - wanted_area).abs().max() <= (2 if moved else 0)
    assert torch.equal(image[1], background[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("edge", EDGES)
def test_pixels_outside_are_untouched(mode, edge):
    """Bit for bit, NaNs and the sign of zero with them; and nothing that is given is written to."""
    background = torch.rand(2, 3, 40, 50)
    background[0, :, 0], background[1, 1, :, 3] = float("nan"), -0.0
    objects = pack_objects([torch.rand(3, 8, 9)] * 2, [torch.rand(8, 9)] * 2)
    before = [t.clone() for t in (background, objects.pixels, objects.mask)]
    image = composite(background, objects, position=[[10, 20], [-4, 30]], mode=mode, edge=edge)
    grow = 2 if edge == "zero" and mode in ("gaussian", "box") else 0
    outside = torch.ones(2, 40, 50, dtype=torch.bool)
    outside[0, 10 - grow : 18 + grow, 20 - grow : 29 + grow] = False
    outside[1, : 4 + grow, 30 - grow : 39 + grow] = False
    outside = outside[:, None].expand_as(image)
    assert torch.equal(image[outside].view(torch.int32), background[outside].view(torch.int32))
    assert not torch.equal(image[~outside].view(torch.int32), background[~outside].view(torch.int32))
    for t, b in zip((background, objects.pixels, objects.mask), before, strict=True):
        assert torch.equal(t.view(torch.int32), b.view(torch.int32))


def test_what_a_mask_hides():
    """A NaN under a mask of 0 or beneath one of 1 is not seen, and -0 stays; a NaN in the mask is."""
    background = torch.full((1, 1, 4), -0.0)
    background[0, 0, 1] = float("nan")
    pixels, mask = torch.tensor([[[float("nan"), 2.0, 3.0, 4.0]]]), torch.tensor([[0.0, 1.0, float("nan"), 0.0]])
    image = composite(background, pack_objects([pixels], [mask]))
    assert image[0, 0, 0] == 0
    assert image[0, 0, 0].signbit()
    assert image[0, 0, 1] == 2
    assert image[0, 0, 2].isnan()
    between = composite(background, pack_objects([pixels], [mask]), position=[[0.0, 1.0]], interpolation="bilinear")
    assert torch.equal(between[0, 0, :2].isnan(), torch.tensor([False, True]))
    assert between[0, 0, 2] == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_a_whole_matrix_is_a_place(dtype):
    """Matrices that move by whole pixels, and right angles, give the pixels of the copy."""
    background, objects, _, _, _ = scene(dtype)
    for mode in ("none", "gaussian"):
        wanted = composite(background, objects, ptr=PTR, position=PLACES, mode=mode)
        floating = [[float(v) for v in place] for place in PLACES]
        actual = composite(background, objects, ptr=PTR, position=floating, mode=mode)
        assert error(actual, wanted.double()) <= (0 if mode == "none" else 1 if dtype == torch.uint8 else 1e-6)
    top, full = noise(8, 13, 3), np.full((8, 13), 255, np.uint8)
    turned = composite(
        torch.zeros(3, 13, 8, dtype=torch.uint8), packed([top], [full]), position=[[2.5, -2.5]], angle=90.0
    )
    assert np.array_equal(as_bytes(turned.permute(1, 2, 0)), np.rot90(top))
    mirrored = composite(torch.zeros(3, 8, 13, dtype=torch.uint8), packed([top], [full]), flip=True)
    assert np.array_equal(as_bytes(mirrored.permute(1, 2, 0)), top[:, ::-1])


def test_premultiplied():
    """Pixels times mask, given as such, give what straight ones do."""
    background, objects, _, _, _ = scene(torch.float64)
    share = torch.cat([
        objects.mask[start : start + h * w].repeat(3) for start, h, w in objects.sizes.tolist()
    ])  # fmt: skip
    multiplied = objects._replace(pixels=objects.pixels * share)
    for mode in ("none", "difference"):
        wanted = composite(background, objects, ptr=PTR, position=PLACES, mode=mode)
        actual = composite(background, multiplied, ptr=PTR, position=PLACES, mode=mode, premultiplied=True)
        assert error(actual, wanted) < 1e-15
    with pytest.raises(ValueError, match=r"premultiplied must be False with mode 'gaussian', got True"):
        composite(background, multiplied, ptr=PTR, position=PLACES, mode="gaussian", premultiplied=True)


@pytest.mark.parametrize("size", [1, 3, 31, 33, 127])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_feathers_of_any_size(dtype, size):
    """Larger than the object too, whose mirror images then follow one another."""
    background, objects, first, pixels, masks = scene(dtype)
    some = objects._replace(sizes=objects.sizes[[0, 2, 5]])
    where = torch.tensor([PLACES[i] for i in (0, 2, 5)])
    actual = composite(background, some, position=where, mode="gaussian", size=size, sigma=size / 4)
    wanted, _, _ = expected(
        first, [pixels[i] for i in (0, 2, 5)], [masks[i] for i in (0, 2, 5)], [0, 1, 2, 3],
        place=where, mode="gaussian", size=size, sigma=size / 4,
    )  # fmt: skip
    assert error(actual, wanted) <= (1 if dtype == torch.uint8 else 1e-6)


def test_the_horizon():
    """Behind the camera nothing is drawn; a matrix without an inverse, or not finite, draws nothing."""
    objects = pack_objects([torch.ones(1, 10, 10)] * 3, [torch.ones(10, 10)] * 3)
    beyond = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, -0.2, 1]])  # the object's rows from 5 on are behind
    nothing, broken = torch.zeros(3, 3), torch.full((3, 3), float("nan"))
    image, _, area = composite(
        torch.zeros(3, 1, 60, 60), objects, matrix=torch.stack([beyond, nothing, broken]), labels=True
    )
    assert area.tolist()[1:] == [0, 0]
    assert 0 < area[0] < 3000
    assert image[1:].abs().sum() == 0
    assert image[0].isfinite().all()


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_place_scale_and_angle(mode, edge):
    generator = torch.Generator().manual_seed(0)

    def uniform(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = uniform(1, 2, 7, 8), uniform(2, 2, 4, 5), uniform(2, 4, 5), uniform(2, 2), uniform(2), uniform(2)

    def function(background, images, masks, position, scale, angle):
        return composite(
            background, images, 0.1 + 0.8 * masks, position=3 * position, scale=1 + scale / 2, angle=90 * angle,
            flip=[True, False], mode=mode, size=3, edge=edge,
        )  # fmt: skip

    assert gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_an_object_drawn_twice():
    """Objects may share their pixels; their gradients are then summed, in every layout of the work."""
    for dtype, how in itertools.product((torch.float64, torch.float32), ({}, {"mode": "gaussian"}, {"angle": 30.0})):
        pixels, mask, background = (torch.rand(n, dtype=dtype).requires_grad_() for n in (60, 20, 3 * 81))
        sizes = torch.tensor([[0, 4, 5], [0, 4, 5], [4, 2, 3]])
        objects = Objects(pixels, mask, sizes, (4, 5), 3, True)
        images = background.view(9, 9, 3)
        where = [[1, 2], [3, 3], [0, 0]] if "angle" not in how else [[1.0, 2.0], [3.0, 3.0], [0.0, 0.0]]
        image = composite(images, objects, position=where, channels_last=True, **how)
        apart = [(pixels.view(20, 3)[first : first + h * w], mask[first : first + h * w]) for first, h, w in sizes]
        wanted = composite(
            images, [p.view(h, w, 3) for (p, _), (_, h, w) in zip(apart, sizes, strict=True)],
            [m.view(h, w) for (_, m), (_, h, w) in zip(apart, sizes, strict=True)],
            position=where, channels_last=True, **how,
        )  # fmt: skip
        weight = torch.rand_like(image)
        actual = torch.autograd.grad((image * weight).sum(), (background, pixels, mask))
        expected_grads = torch.autograd.grad((wanted * weight).sum(), (background, pixels, mask))
        for a, e in zip(actual, expected_grads, strict=True):
            assert torch.allclose(a, e, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_memory_between_objects_has_gradient_zero():
    pixels, mask = torch.rand(40).requires_grad_(), torch.rand(40).requires_grad_()
    objects = Objects(pixels, mask, torch.tensor([[3, 4, 5], [30, 2, 2]]), (4, 5), 1, False)
    image = composite(torch.zeros(1, 6, 6), objects, position=[[-1, -1], [5, 5]])
    image.sum().backward()
    used = torch.zeros(40, dtype=torch.bool)
    used[3:23].view(4, 5)[1:, 1:] = used[30:31] = True
    assert torch.equal(pixels.grad != 0, used)
    assert torch.equal(mask.grad[~used], torch.zeros(int((~used).sum())))


# --- calls ------------------------------------------------------------------------------------------------------------


def test_forms_of_the_arguments():
    images, masks = torch.rand(2, 3, 4, 5), torch.rand(2, 4, 5)
    background = torch.rand(2, 3, 9, 9)
    objects = pack_objects(list(images), list(masks))
    wanted = composite(background, objects, position=torch.tensor([[1, 2], [3, 4]]), ptr=torch.tensor([0, 1, 2]))
    assert torch.equal(composite(background, objects, position=[[1, 2], [3, 4]]), wanted)
    assert torch.equal(composite(background, images, masks, position=[[1, 2], [3, 4]], ptr=[0, 1, 2]), wanted)
    assert torch.equal(composite(background, list(images), list(masks), position=[[1, 2], [3, 4]]), wanted)
    both = composite(background[:1], objects, position=[[1, 2], [3, 4]], labels=True)
    assert isinstance(both, Composite)
    alone = composite(background[0], objects, position=[[1, 2], [3, 4]], labels=True)
    assert torch.equal(alone.image, both.image[0])
    assert torch.equal(alone.ids, both.ids[0])
    assert torch.equal(alone.area, both.area)
    hard = pack_objects([images[0]], [masks[0] > 0.5])
    assert torch.equal(hard.mask, (masks[0] > 0.5).float().flatten())
    assert pack_objects([(255 * images[0]).byte()], [masks[0] > 0.5]).mask.max() == 255
    assert objects.largest == (4, 5)


def test_nothing():
    background = torch.rand(2, 3, 4, 5)
    for ptr in (None, [0, 0, 0]):
        if ptr is None:
            assert torch.equal(composite(background[0], [], []), background[0])
            continue
        image, ids, area = composite(background, [], [], ptr=ptr, labels=True)
        assert torch.equal(image, background)
        assert image.data_ptr() != background.data_ptr()
        assert (ids == -1).all()
        assert area.numel() == 0
    for shape in [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)]:
        empty = torch.rand(shape)
        objects = (
            pack_objects([torch.rand(shape[1], 2, 2)] * shape[0], [torch.rand(2, 2)] * shape[0]) if shape[0] else None
        )
        result = composite(empty, [], [], ptr=[0]) if objects is None else composite(empty, objects)
        assert result.shape == shape


def good():
    return {
        "background": torch.rand(2, 3, 9, 9),
        "objects": pack_objects([torch.rand(3, 4, 5)] * 2, [torch.rand(4, 5)] * 2),
        "position": torch.zeros(2, 2, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"background": torch.rand(9, 9)}, ValueError, r"background must be \[B, C, H, W\] or .*, got \(9, 9\)"),
        ({"background": torch.rand(2, 3, 9, 9).double()}, TypeError, r"objects must be torch.float64 like background"),
        ({"background": torch.rand(2, 4, 9, 9)}, ValueError, r"objects must have 4 channels, first.*got 3, first"),
        ({"channels_last": True}, ValueError, r"objects must have 9 channels, last.*got 3, first"),
        ({"objects": [torch.rand(3, 4, 5)]}, ValueError, r"masks must be given .*got None"),
        ({"ptr": [0, 1]}, ValueError, r"ptr must be \[3\], got \[2\]"),
        ({"ptr": [0, 3, 2]}, ValueError, r"ptr must ascend from 0 to the number of objects, 2"),
        ({"ptr": torch.tensor([0.0, 1, 2])}, TypeError, r"ptr must be Long, got Float"),
        ({"background": torch.rand(3, 3, 9, 9)}, ValueError, r"ptr must be given for 2 objects on 3 images"),
        ({"position": torch.zeros(3, 2)}, ValueError, r"position must be \[N = 2, 2\], got \(3, 2\)"),
        ({"matrix": torch.zeros(2, 3, 3)}, ValueError, r"matrix must be None beside position"),
        ({"matrix": torch.zeros(1, 3, 3), "position": None}, ValueError, r"matrix must be \[N = 2, 3, 3\], got \(1"),
        ({"scale": [1.0, 2.0, 3.0]}, ValueError, r"scale must be one number or \[N = 2\], got \(3,\)"),
        ({"mode": "poisson"}, ValueError, r"mode must be one of none, gaussian, box, difference, got 'poisson'"),
        ({"mode": "box", "size": 4}, ValueError, r"size must be odd, from 1 to 127, got 4"),
        ({"mode": "gaussian", "sigma": 0.0}, ValueError, r"sigma must be above 0, got 0.0"),
        ({"edge": "wrap"}, ValueError, r"edge must be one of reflect, zero, got 'wrap'"),
        ({"interpolation": "cubic"}, ValueError, r"interpolation must be one of bilinear, nearest, got 'cubic'"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        composite(**{**good(), **change})


def test_errors_of_packing():
    image, mask = torch.rand(3, 4, 5), torch.rand(4, 5)
    with pytest.raises(ValueError, match="masks must be as many as images, 2, got 1"):
        pack_objects([image, image], [mask])
    with pytest.raises(ValueError, match="images must hold at least one object"):
        pack_objects([], [])
    with pytest.raises(ValueError, match=r"object 1 must be \[C, h, w\] with C = 3"):
        pack_objects([image, image[:, 1:]], [mask, mask])
    with pytest.raises(TypeError, match=r"object 0 must be torch.float32"):
        pack_objects([image], [mask.double()])
    objects = pack_objects([image], [mask])
    outside = objects._replace(sizes=torch.tensor([[1, 4, 5]]))
    with pytest.raises(ValueError, match=r"sizes of object 0 must lie within the 20 pixels of mask, got first 1"):
        composite(torch.rand(3, 9, 9), outside)


_DRAW = """
import torch
from fastnuggets.ops import composite, pack_objects
generator = torch.Generator().manual_seed(0)
def draw(dtype, mode, **where):
    top, under = (torch.rand(3, 40, 61, generator=generator) for _ in range(2))
    mask = torch.rand(40, 61, generator=generator)
    if dtype == torch.uint8:
        top, under, mask = ((255 * t).to(dtype) for t in (top, under, mask))
    image = composite(under, pack_objects([top], [mask]), mode=mode, **where)
    last = composite(under.permute(1, 2, 0), pack_objects([top.permute(1, 2, 0)], [mask], channels_last=True),
                     mode=mode, channels_last=True, **where)
    return image.double().sum().item(), (last.permute(2, 0, 1).double() * image).sum().item()
for dtype in (torch.uint8, torch.float32):
    for mode in ("none", "gaussian", "difference"):
        print(*draw(dtype, mode, position=[[3, -2]]), *draw(dtype, mode, angle=20.0))
"""


def test_without_vectors(capsys):
    """The same bytes; floating results as near as fused products leave them."""
    plain = subprocess.run(
        [sys.executable, "-c", _DRAW], capture_output=True, text=True, check=True,
        env={**os.environ, "FASTNUGGETS_SIMD": "generic"},
    ).stdout  # fmt: skip
    exec(_DRAW, {})
    plain, here = (
        np.array([line.split() for line in text.splitlines()], dtype=np.float64)
        for text in (plain, capsys.readouterr().out)
    )
    assert np.array_equal(plain[:3, :2], here[:3, :2])
    assert np.allclose(plain, here, rtol=1e-6)
