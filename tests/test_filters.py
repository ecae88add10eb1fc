"""Motion blur, pyramids and the multi-band blend against published definitions, SciPy and OpenCV."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from fastnuggets import ops, reference
from fastnuggets.ops.filters import KINDS, LENGTHS

cv2 = pytest.importorskip("cv2")

# The published table: where each line begins and ends, (row, column, row, column), by length and angle in degrees.
LINES = {
    3: {0: (1, 0, 1, 2), 45: (2, 0, 0, 2), 90: (0, 1, 2, 1), 135: (0, 0, 2, 2)},
    5: {
        0: (2, 0, 2, 4), 22.5: (3, 0, 1, 4), 45: (0, 4, 4, 0), 67.5: (0, 3, 4, 1), 90: (0, 2, 4, 2),
        112.5: (0, 1, 4, 3), 135: (0, 0, 4, 4), 157.5: (1, 0, 3, 4),
    },
    7: {
        0: (3, 0, 3, 6), 15: (4, 0, 2, 6), 30: (5, 0, 1, 6), 45: (6, 0, 0, 6), 60: (6, 1, 0, 5), 75: (6, 2, 0, 4),
        90: (0, 3, 6, 3), 105: (0, 2, 6, 4), 120: (0, 1, 6, 5), 135: (0, 0, 6, 6), 150: (1, 0, 5, 6),
        165: (2, 0, 4, 6),
    },
    9: {
        0: (4, 0, 4, 8), 11.25: (5, 0, 3, 8), 22.5: (6, 0, 2, 8), 33.75: (7, 0, 1, 8), 45: (8, 0, 0, 8),
        56.25: (8, 1, 0, 7), 67.5: (8, 2, 0, 6), 78.75: (8, 3, 0, 5), 90: (8, 4, 0, 4), 101.25: (0, 3, 8, 5),
        112.5: (0, 2, 8, 6), 123.75: (0, 1, 8, 7), 135: (0, 0, 8, 8), 146.25: (1, 0, 7, 8), 157.5: (2, 0, 6, 8),
        168.75: (3, 0, 5, 8),
    },
}  # fmt: skip


class Published:
    """The published way to a kernel, with its table, which a kernel of half a line changes for good."""

    def __init__(self):
        self.lines = {length: {angle: list(ends) for angle, ends in row.items()} for length, row in LINES.items()}

    def kernel(self, length, angle, kind):
        from skimage.draw import line

        center = length // 2
        angles = np.linspace(0, 180, 4 * center, endpoint=False)
        ends = self.lines[length][angles[np.abs(angles - math.fmod(angle, 180)).argmin()]]
        if kind == "right":
            ends[:2] = center, center
        if kind == "left":
            ends[2:] = center, center
        kernel = np.zeros((length, length), np.float32)
        kernel[line(*ends)] = 1
        return kernel / np.float32(np.count_nonzero(kernel))


# All that the generator draws: whole degrees at or just below the steps.
DRAWN = [
    (length, int(angle), kind) for length in LENGTHS for angle in LINES[length] for kind in ("full", "left", "right")
]


def photo(*size, seed=0):
    """Bytes as rough as can be, with a flat half: where rounding and cutting off show."""
    made = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    made[: size[0] // 2] = 100
    return made


# --- motion blur ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_kernels_are_the_published_ones(length):
    for angle in np.arange(0, 180, 0.75):
        for kind in KINDS:
            kernel = ops.motion_kernel(length, float(angle), kind)
            assert np.array_equal(kernel.numpy(), Published().kernel(length, angle, kind)), (angle, kind)


def test_angles_are_taken_modulo_180():
    for length, angle, kind in DRAWN:
        assert torch.equal(ops.motion_kernel(length, angle + 180, kind), ops.motion_kernel(length, angle, kind))
        assert torch.equal(ops.motion_kernel(length, angle - 180, kind), ops.motion_kernel(length, angle, kind))


def test_the_published_table_decays():
    """Kernels one after the other from one table are those of `used`, and in the end nothing is blurred."""
    table, used = Published(), {}
    rng = np.random.default_rng(0)
    for n in rng.integers(len(DRAWN), size=600):
        length, angle, kind = DRAWN[n]
        before = used.setdefault((length, angle), set())
        kernel = ops.motion_kernel(length, angle, kind, used=before)
        assert np.array_equal(kernel.numpy(), table.kernel(length, angle, kind))
        before.add(kind)
    identity = ops.motion_kernel(9, 45, "full", used=("left", "right"))
    assert identity[4, 4] == 1
    assert identity.sum() == 1


@pytest.mark.parametrize("length", LENGTHS)
def test_cut_off_sums_are_the_published_bytes(length):
    """Bit by bit what SciPy's convolution in float32 gives, white outside, cut off."""
    from scipy.signal import convolve2d

    image = photo(30, 41)
    for _, angle, kind in (case for case in DRAWN if case[0] == length):
        kernel = Published().kernel(length, angle, kind)
        expected = convolve2d(image.astype(np.float32), kernel, mode="same", fillvalue=255.0).astype(np.uint8)
        blurred = ops.motion_blur(torch.from_numpy(image)[None], length, angle, kind, border=255, truncate=True)
        assert np.array_equal(blurred[0].numpy(), expected), (angle, kind)


@pytest.mark.parametrize(
    ("border", "theirs"),
    [("reflect", cv2.BORDER_REFLECT_101), ("replicate", cv2.BORDER_REPLICATE), (255, None)],
    ids=str,
)
def test_bytes_are_opencvs(border, theirs):
    """Ties included, of which lines of 2, 4 and 8 pixels have many."""
    image = photo(23, 37, 3)
    for length, angle, kind in DRAWN:
        turned = Published().kernel(length, angle, kind)[::-1, ::-1].copy()  # theirs is a correlation
        if theirs is None:
            around = cv2.copyMakeBorder(image, 9, 9, 9, 9, cv2.BORDER_CONSTANT, value=(255, 255, 255))
            expected = cv2.filter2D(around, -1, turned)[9:-9, 9:-9]
        else:
            expected = cv2.filter2D(image, -1, turned, borderType=theirs)
        blurred = ops.motion_blur(torch.from_numpy(image), length, angle, kind, border=border, channels_last=True)
        assert np.array_equal(blurred.numpy(), expected), (length, angle, kind)


def test_one_line_for_each_image():
    images = torch.from_numpy(photo(3, 2, 20, 18))
    how = [(3, 45, "full"), (9, 100.0, "left"), (7, 0, "right")]
    together = ops.motion_blur(images, *map(list, zip(*how, strict=True)), border=255)
    for image, blurred, (length, angle, kind) in zip(images, together, how, strict=True):
        assert torch.equal(blurred, ops.motion_blur(image, length, angle, kind, border=255))
    assert torch.equal(
        ops.motion_blur(images, [3, 5, 7], 45, border="replicate")[1],
        ops.motion_blur(images[1], 5, 45, border="replicate"),
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
def test_layouts_agree(dtype):
    image = torch.from_numpy(photo(2, 3, 19, 22)).to(dtype)
    last = image.permute(0, 2, 3, 1)
    blurred = ops.motion_blur(image, 9, 30)
    assert torch.equal(ops.motion_blur(last, 9, 30, channels_last=True).permute(0, 3, 1, 2), blurred)
    assert torch.equal(ops.motion_blur(image[1], 9, 30), blurred[1])
    assert torch.equal(
        ops.motion_blur(image[:, :, ::2, 1:-1], 9, 30), ops.motion_blur(image[:, :, ::2, 1:-1].clone(), 9, 30)
    )


@pytest.mark.parametrize("border", ["reflect", "replicate", 7])
def test_any_taps_of_bytes(border):
    """Against float64: weights of both signs, quotients that clip and that tie, taps farther away than the image is."""
    image = torch.from_numpy(photo(2, 9, 13))
    taps = [(0, 0, 5), (-3, 11, -2), (8, 0, 3), (1, -20, 4)]
    for divisor in (1, 2, 7, 10, 64):
        kind, value = (border, 0.0) if isinstance(border, str) else ("constant", float(border))
        expected = reference.filter_taps(image, taps, divisor, kind, value)
        assert torch.equal(ops.filter_taps(image, taps, divisor=divisor, border=border), expected)


@pytest.mark.parametrize("border", ["reflect", "replicate", 0.5])
def test_motion_blur_gradcheck(border):
    image = torch.rand(2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: ops.motion_blur(x, 9, 60, "left", border=border), image)
    assert gradcheck(lambda x: ops.motion_blur(x, 5, 20, border=border, channels_last=True), image)


# --- pyramids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 3), (5, 4), (32, 48), (51, 33)], ids=str)
def test_pyramids_are_opencvs(size):
    """Seen: 1.8e-7 in float32, 3.3e-16 in float64."""
    h, w = size
    for dtype, tolerance in ((torch.float32, 5e-7), (torch.float64, 1e-15)):
        image = torch.rand(h, w, dtype=torch.float64).to(dtype)
        coarse = ops.pyr_down(image)
        assert coarse.shape == ((h + 1) // 2, (w + 1) // 2)
        assert np.abs(coarse.numpy() - cv2.pyrDown(image.numpy())).max() <= tolerance
        for fine in ((2 * h, 2 * w), (2 * h - 1, 2 * w), (2 * h, 2 * w - 1), (2 * h - 1, 2 * w - 1)):
            expected = cv2.pyrUp(image.numpy(), dstsize=fine[::-1]).reshape(fine)
            assert np.abs(ops.pyr_up(image, fine).numpy() - expected).max() <= tolerance


def test_pyramid_layouts():
    image = torch.rand(2, 3, 9, 7)
    planes = torch.stack([torch.stack([ops.pyr_down(plane) for plane in one]) for one in image])
    assert torch.equal(ops.pyr_down(image), planes)
    assert torch.equal(ops.pyr_up(image, (17, 14))[1, 2], ops.pyr_up(image[1, 2], (17, 14)))
    assert ops.pyr_up(image).shape == (2, 3, 18, 14)


# --- multi-band blend -------------------------------------------------------------------------------------------------


def pair(size, dtype, channels=3, batch=2):
    generator = torch.Generator().manual_seed(1)
    made = [torch.rand(batch, channels, *size, generator=generator, dtype=torch.float64) for _ in range(2)]
    mask = torch.rand(batch, *size, generator=generator, dtype=torch.float64).round()
    if dtype == torch.uint8:
        return *((t * 255).round().to(dtype) for t in made), (mask * 255).to(dtype)
    return *(t.to(dtype) for t in made), mask.to(dtype)


@pytest.mark.parametrize("size", [(64, 96), (37, 50), (3, 70), (1, 1)], ids=str)
def test_a_full_mask_gives_the_foreground(size):
    """Seen: 1.2e-7."""
    under, over, mask = pair(size, torch.float32)
    blended = ops.multiband_blend(under, over, torch.ones_like(mask), levels=6)
    assert (blended - over).abs().max() <= 1e-6
    under, over, mask = pair(size, torch.uint8)
    assert torch.equal(ops.multiband_blend(under, over, torch.full_like(mask, 255)), over)
    assert torch.equal(ops.multiband_blend(under, over, torch.ones_like(mask, dtype=torch.bool)), over)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
def test_an_empty_mask_gives_the_background_bit_by_bit(dtype):
    under, over, mask = pair((45, 31), dtype)
    assert torch.equal(ops.multiband_blend(under, over, torch.zeros_like(mask)), under)
    # And so does one that is empty for as far as the coarsest of two bands reaches.
    mask[:, :, 8:] = 0
    blended = ops.multiband_blend(under, over, mask, levels=2)
    assert torch.equal(blended[..., 24:], under[..., 24:])
    assert not torch.equal(blended, under)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_bytes_are_the_nearest_to_the_definition(channels, channels_last):
    """Burt and Adelson's, in float64. Seen: 6e-6 beyond the half that rounding takes."""
    under, over, mask = pair((43, 58), torch.uint8, channels)
    exact = reference.multiband_blend(under.double(), over.double(), mask.double() / 255, 5).clamp(0, 255)
    images = [t.movedim(1, -1).contiguous() if channels_last else t for t in (under, over)]
    blended = ops.multiband_blend(*images, mask, channels_last=channels_last)
    blended = blended.movedim(-1, 1) if channels_last else blended
    assert (blended.double() - exact).abs().max() <= 0.5 + 1e-4


def test_one_mask_for_all_and_one_image():
    under, over, mask = pair((20, 30), torch.float32)
    blended = ops.multiband_blend(under, over, mask[0])
    assert torch.equal(blended, ops.multiband_blend(under, over, mask[:1].expand(2, -1, -1)))
    assert torch.equal(blended[1], ops.multiband_blend(under[1], over[1], mask[0]))


def test_no_band_is_alpha_compositing():
    under, over, mask = pair((9, 14), torch.float64)
    alpha = torch.rand_like(mask)
    expected = alpha[:, None] * over + (1 - alpha[:, None]) * under
    assert torch.allclose(ops.multiband_blend(under, over, alpha, levels=0), expected, atol=1e-15)


def test_opencvs_blender_is_near():
    """cv2.detail cuts off to whole numbers at every level, twice, and pads to a multiple of 2^bands; so it changes what
    the mask leaves alone. Seen, one band: 4 levels at most and 1.0 on average, 2 where the mask is empty. Three bands:
    8, 2.3 and 4."""
    size = (256, 256)
    y, x = np.mgrid[: size[0], : size[1]]
    under, over = (
        np.stack([127 + 100 * np.sin(x / a + c) * np.cos(y / b) for c in range(3)], -1).astype(np.uint8)
        for a, b in ((9, 7), (23, 31))
    )
    mask = (((x - 128) ** 2 + (y - 120) ** 2) < 60**2).astype(np.uint8) * 255
    for bands, most, mean, changed in ((1, 5, 1.3, 3), (3, 10, 3, 5)):
        blender = cv2.detail.MultiBandBlender(0, bands)
        blender.prepare((0, 0, *size[::-1]))
        blender.feed(under.astype(np.int16), 255 - mask, (0, 0))
        blender.feed(over.astype(np.int16), mask, (0, 0))
        theirs = blender.blend(None, None)[0].astype(float)
        ours = ops.multiband_blend(*map(torch.from_numpy, (under, over, mask)), levels=bands, channels_last=True)
        difference = np.abs(ours.numpy() - theirs)[32:-32, 32:-32]
        assert difference.max() <= most
        assert difference.mean() <= mean
        assert np.array_equal(ours[:30, :30], under[:30, :30])
        assert 0 < np.abs(theirs - under)[16:30, 16:30].max() <= changed


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_multiband_gradcheck(channels_last):
    under, over, mask = pair((7, 10), torch.float64, 2, 1)
    images = [t.movedim(1, -1).contiguous() if channels_last else t for t in (under, over)]
    leaves = [t.requires_grad_() for t in (*images, torch.rand_like(mask))]
    assert gradcheck(lambda b, f, m: ops.multiband_blend(b, f, m, levels=3, channels_last=channels_last), leaves)


# --- all of them ------------------------------------------------------------------------------------------------------


def test_inputs_are_never_written_to():
    images = pair((24, 24), torch.uint8)
    copies = [t.clone() for t in images]
    ops.multiband_blend(*images)
    ops.motion_blur(images[0], 9, 45, truncate=True)
    ops.filter_taps(images[0], [(1, 1, 1)])
    assert all(torch.equal(a, b) for a, b in zip(images, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_bytes_do_not_depend_on_threads(dtype, threads):
    under, over, mask = pair((150, 170), dtype)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append((ops.multiband_blend(under, over, mask), ops.motion_blur(under, 9, 20)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


IMAGE = torch.zeros(3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.motion_blur(IMAGE, 4, 0), ValueError, r"length: expected one of \(3, 5, 7, 9\), got 4"),
        (lambda: ops.motion_kernel(5, math.nan), ValueError, "angle: expected a number"),
        (lambda: ops.motion_kernel(5, 0, "up"), ValueError, "kind: expected one of"),
        (lambda: ops.motion_kernel(5, 0, used=["up"]), ValueError, "used: expected one of"),
        (lambda: ops.motion_blur(IMAGE, 3, 0, border="wrap"), ValueError, "border: expected a number or one of"),
        (lambda: ops.motion_blur(IMAGE, 3, 0, border=300), ValueError, "border: expected a whole number in 0..255"),
        (lambda: ops.motion_blur(IMAGE, [3, 5], 0), ValueError, "length: expected one or a list of 1"),
        (lambda: ops.motion_blur(IMAGE[0], 3, 0), ValueError, r"image: expected \[B, C, H, W\] or \[C, H, W\]"),
        (lambda: ops.motion_blur(IMAGE.int(), 3, 0), TypeError, "image must be uint8, float32"),
        (lambda: ops.motion_blur(IMAGE.numpy(), 3, 0), TypeError, "image: expected a tensor, got ndarray"),
        (lambda: ops.filter_taps(IMAGE, [(0, 0, 1)] * 129), ValueError, "taps must be 1 to 128"),
        (lambda: ops.filter_taps(IMAGE, [(0, 256, 1)]), ValueError, "taps must be at most 255 pixels away"),
        (lambda: ops.filter_taps(IMAGE, [(0, 0, 1)], divisor=0), ValueError, "divisors must be in 1"),
        (lambda: ops.filter_taps(IMAGE, [(0, 0, 30000)] * 3), ValueError, "must add up to at most 65536"),
        (lambda: ops.pyr_down(IMAGE), TypeError, "image: expected a floating-point tensor"),
        (lambda: ops.pyr_up(torch.zeros(3, 4), (5, 6)), ValueError, r"size: expected twice \(3, 4\) or one less"),
        (lambda: ops.multiband_blend(IMAGE, IMAGE[:, 1:], IMAGE[0]), ValueError, "foreground: expected"),
        (lambda: ops.multiband_blend(IMAGE, IMAGE.float(), IMAGE[0]), TypeError, "foreground must be"),
        (lambda: ops.multiband_blend(IMAGE, IMAGE, IMAGE[0, 1:]), ValueError, "mask: expected"),
        (lambda: ops.multiband_blend(IMAGE, IMAGE, IMAGE[0].float()), TypeError, "mask must be"),
        (lambda: ops.multiband_blend(IMAGE, IMAGE, IMAGE[0], levels=-1), ValueError, r"levels must be in 0..30"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
