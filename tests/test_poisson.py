"""Poisson blending against a direct sparse solution of its definition, masks made to be hard included."""

import numpy as np
import pytest
import torch

from fastnuggets import ops
from fastnuggets.scenes.samples import ADVERSARIAL, MASKS, mask, photo

sparse = pytest.importorskip("scipy.sparse")
spsolve = pytest.importorskip("scipy.sparse.linalg")

GUIDANCES = ("import", "mixed", "average")
TIE = 4e-6 * 255  # of csrc/blend/poisson_math.h, in grey levels
STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def neighbour(a, step):
    """The value one step further; beyond the image the pixel's own."""
    height, width = a.shape[:2]
    rows = np.clip(np.arange(height) + step[0], 0, height - 1)
    return a[rows][:, np.clip(np.arange(width) + step[1], 0, width - 1)]


def direct(bg, fg, share, y, x, guidance="import", soft=False):
    """The definition in float64: bg [H, W, C], fg [h, w, C], share [h, w] in 0..1; by sparse LU."""
    height, width = bg.shape[:2]
    h, w = share.shape
    rows, columns = np.arange(height) - y, np.arange(width) - x
    covered = ((rows >= 0) & (rows < h))[:, None] & ((columns >= 0) & (columns < w))
    near = np.clip(rows, 0, h - 1), np.clip(columns, 0, w - 1)
    spread, weight = fg[near[0]][:, near[1]], np.where(covered, share[near[0]][:, near[1]], 0.0)
    inside = (weight > 0) if soft else (weight >= 0.5)
    count = int(inside.sum())
    if count == 0:
        return bg.copy()
    number = np.full((height, width), -1)
    number[inside] = np.arange(count)
    entries, side = [], np.zeros_like(bg)
    closed = True
    for step in STEPS:
        index = np.indices((height, width))
        row, column = index[0] + step[0], index[1] + step[1]
        used = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        other = neighbour(number, step)
        free = used & (other >= 0)
        closed = closed and bool((used == free).all())
        entries += [(number[used], number[used], 1.0), (number[free], other[free], -1.0)]
        f, b = spread - neighbour(spread, step), bg - neighbour(bg, step)
        v = {"import": f, "average": (f + b) / 2, "mixed": np.where(abs(b) > abs(f) + TIE, b, f)}[guidance]
        if soft:
            half = ((weight + neighbour(weight, step)) / 2)[..., None]
            v = half * v + (1 - half) * b
        side += v + np.where((used & ~free)[..., None], neighbour(bg, step), 0)
    i, j = (np.concatenate([e[k] for e in entries]) for k in (0, 1))
    values = np.concatenate([np.full(len(e[0]), e[2]) for e in entries])
    matrix = sparse.csc_matrix((values, (i, j)), (count, count))
    right = side[inside]
    if closed:  # fix one value, then shift to the object's mean
        matrix = sparse.bmat([[matrix[1:, 1:]]]).tocsc()
        solved = np.vstack([np.zeros((1, bg.shape[2])), spsolve.splu(matrix).solve(right[1:])])
        solved += spread.reshape(-1, bg.shape[2]).mean(0) - solved.mean(0)
    else:
        solved = spsolve.splu(matrix).solve(right)
    result = bg.copy()
    result[inside] = solved
    return result


def scene(name, size, margin=(0, 0), seed=0):
    """Photographs as float64 grey levels and a mask in 0..1."""
    height, width = size
    fg, bg = photo("astronaut", size), photo("coffee", (height + margin[0], width + margin[1]))
    return bg.astype(np.float64), fg.astype(np.float64), mask(name, size).astype(np.float64)


def blended(bg, fg, share, position, dtype=torch.float32, **how):
    scale = 1 if dtype == torch.uint8 else 255
    image = torch.from_numpy(bg / scale).to(dtype)
    objects = torch.from_numpy(fg / scale).to(dtype)
    masks = torch.from_numpy(share * (255 if dtype == torch.uint8 else 1)).to(dtype)
    before = [t.clone() for t in (image, objects, masks)]
    result = ops.poisson_blend(image, [objects], [masks], position=[position], channels_last=True, **how)
    for a, b in zip(before, (image, objects, masks), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return result.double().numpy() * scale


def covered_pixels(share, shape, position, threshold=0.5):
    inside = np.zeros(shape[:2], bool)
    for i, j in np.argwhere(share >= threshold):
        row, column = i + position[0], j + position[1]
        if 0 <= row < shape[0] and 0 <= column < shape[1]:
            inside[row, column] = True
    return inside


# --- exactness --------------------------------------------------------------------------------------------------------

# Largest seen of all below: 0.09 levels (pinholes), where 0.25 was asked for.
CASES = [(name, (64, 64)) for name in MASKS] + [(name, (120, 96)) for name in MASKS]
CASES += [(name, (65, 50)) for name in ADVERSARIAL]


@pytest.mark.parametrize(("name", "size"), CASES, ids=[f"{n}-{h}x{w}" for n, (h, w) in CASES])
@pytest.mark.parametrize("guidance", ["import", "mixed"])
def test_exact(name, size, guidance):
    bg, fg, share = scene(name, size, (9, 7))
    position = (4, 3)
    expected = direct(bg, fg, share, *position, guidance)
    result = blended(bg, fg, share, position, guidance=guidance)
    assert abs(result - expected).max() <= 0.25
    bytes_ = blended(bg, fg, share, position, torch.uint8, guidance=guidance)
    assert abs(bytes_ - np.clip(expected, 0, 255)).max() <= 0.75
    outside = ~covered_pixels(share, bg.shape, position)
    assert (bytes_[outside] == bg[outside]).all()


@pytest.mark.parametrize("name", ["cat", "blob"])
def test_exact_large(name):
    bg, fg, share = scene(name, (256, 300))
    expected = direct(bg, fg, share, 0, 0)
    assert abs(blended(bg, fg, share, (0, 0)) - expected).max() <= 0.25


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("position", [(-20, 5), (30, -25), (-9, -9), (0, 0), (500, 0), (-64, -64)])
def test_cut_by_the_image(guidance, position):
    """What is outside the image is not there: no condition at its border, and no place is an error."""
    bg, fg, _ = scene("cat", (64, 64))
    for name in ("cat", "full", "random"):
        share = mask(name, (64, 64)).astype(np.float64)
        expected = direct(bg, fg, share, *position, guidance)
        assert abs(blended(bg, fg, share, position, guidance=guidance) - expected).max() <= 0.25, name


def test_object_larger_than_the_image():
    bg, fg, share = scene("blob", (90, 100))
    expected = direct(bg[:40, :30], fg, share, -25, -30, "mixed")
    assert abs(blended(bg[:40, :30], fg, share, (-25, -30), guidance="mixed") - expected).max() <= 0.25


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_mask_on_the_whole_image_keeps_the_object_mean(guidance):
    bg, fg, share = scene("full", (33, 47))
    result = blended(bg, fg, share, (0, 0), torch.float64, guidance=guidance, tolerance=1e-8)
    assert abs(result - direct(bg, fg, share, 0, 0, guidance)).max() < 1e-6
    assert abs(result.mean((0, 1)) - fg.mean((0, 1))).max() < 1e-9
    if guidance == "import":
        assert abs(result - fg).max() < 1e-9


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_soft(guidance):
    bg, fg, share = scene("cat", (48, 52), (6, 6))
    generator = np.random.default_rng(0)
    share = share * generator.uniform(0.1, 1, share.shape)
    expected = direct(bg, fg, share, 3, 2, guidance, soft=True)
    assert abs(blended(bg, fg, share, (3, 2), guidance=guidance, soft=True) - expected).max() <= 0.25
    levels = np.round(share * 255) / 255
    expected = direct(bg, fg, levels, 3, 2, guidance, soft=True).clip(0, 255)
    result = blended(bg, fg, levels, (3, 2), torch.uint8, guidance=guidance, soft=True)
    assert abs(result - expected).max() <= 0.75


@pytest.mark.parametrize(("dtype", "tolerance", "bound"), [(torch.float32, 0.01, 0.01), (torch.float64, 1e-9, 1e-9)])
def test_any_tolerance(dtype, tolerance, bound):
    """float32 goes to some 1e-3 levels of a range of 255, float64 to 1e-12."""
    bg, fg, share = scene("pinholes", (70, 70), (1, 1))
    for guidance in GUIDANCES:
        expected = direct(bg, fg, share, 0, 0, guidance)
        result = blended(bg, fg, share, (0, 0), dtype, guidance=guidance, tolerance=tolerance)
        assert abs(result - expected).max() <= bound


@pytest.mark.parametrize("name", ["pinholes", "walls", "comb", "spiral", "random", "cat", "text"])
@pytest.mark.parametrize("guidance", ["import", "mixed"])
def test_the_estimate_is_not_too_small(name, guidance):
    """After each number of cycles; the estimate was seen 3 to 30 times the error."""
    bg, fg, share = scene(name, (96, 96), (2, 2))
    expected = direct(bg, fg, share, 1, 1, guidance)
    image, pixels = (torch.from_numpy(a / 255) for a in (bg[None], fg.reshape(-1)))
    table = torch.tensor([[0, 1, 1, 96, 96, 0]])
    for cycles in range(1, 6):
        result, info = torch.ops.fastnuggets.poisson_blend(
            image, pixels, torch.from_numpy(share.reshape(-1)), table, 96, 96, GUIDANCES.index(guidance), False, 1e-12,
            cycles, True,
        )  # fmt: skip
        assert abs(result[0].numpy() * 255 - expected).max() <= info.item() + 1e-9


# --- layouts, batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("last", [False, True])
def test_channels_and_their_order(channels, last):
    """The same bits for either order; each channel by itself."""
    generator = torch.Generator().manual_seed(channels)
    bg, fg = torch.rand(40, 50, channels, generator=generator), torch.rand(30, 33, channels, generator=generator)
    share = torch.from_numpy(mask("blob", (30, 33))).float()
    if last:
        result = ops.poisson_blend(bg, [fg], [share], position=[(3, 9)], channels_last=True)
    else:
        planes = [t.movedim(-1, 0).contiguous() for t in (bg, fg)]
        result = ops.poisson_blend(planes[0], [planes[1]], [share], position=[(3, 9)]).movedim(0, -1)
    for c in range(channels):
        alone = ops.poisson_blend(
            bg[..., c][None, None], fg[..., c][None, None], share[None], position=[(3, 9)], tolerance=1e-3
        )
        assert (result[..., c] - alone[0, 0]).abs().max() <= 0.25 / 255


def test_ragged_batch_is_one_at_a_time():
    generator = torch.Generator().manual_seed(3)
    bg = (torch.rand(3, 3, 80, 90, generator=generator) * 255).byte()
    sizes = [(20, 31), (64, 40), (9, 9), (50, 50), (33, 80)]
    objects = [(torch.rand(3, *s, generator=generator) * 255).byte() for s in sizes]
    masks = [torch.from_numpy(mask("cat", s)) for s in sizes]
    places = [(1, 1), (10, 20), (70, 85), (20, 30), (-5, 4)]
    packed = ops.pack_objects(objects, masks)
    ptr = [0, 2, 2, 5]
    result = ops.poisson_blend(bg, packed, ptr=ptr, position=places, guidance="mixed")
    expected = bg.clone()
    for b in range(3):
        for n in range(ptr[b], ptr[b + 1]):
            expected[b] = ops.poisson_blend(expected[b], [objects[n]], [masks[n]], position=[places[n]],
                                            guidance="mixed")  # fmt: skip
    assert torch.equal(result, expected)


def test_same_bits_for_any_number_of_threads(threads):
    """Of one object, whose rows and channels are shared out, and of many, which are."""
    bg, fg, share = scene("blob", (300, 333))
    results = []
    for n in (1, 2, 3, 5):
        threads(n)
        results.append(blended(bg, fg, share, (0, 0), guidance="mixed"))
    assert all((r == results[0]).all() for r in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    generator = torch.Generator().manual_seed(1)
    bg, fg = torch.rand(3, 40, 40, generator=generator).to(dtype), torch.rand(3, 30, 30, generator=generator).to(dtype)
    share = torch.from_numpy(mask("cup", (30, 30)))
    result = ops.poisson_blend(bg, [fg], [share], position=[(2, 2)])
    full = ops.poisson_blend(bg.float(), [fg.float()], [share], position=[(2, 2)])
    assert result.dtype == dtype
    assert torch.equal(result, full.to(dtype))


def test_no_objects():
    bg = torch.rand(2, 3, 5, 6)
    result = ops.poisson_blend(bg, [], [], ptr=[0, 0, 0])
    assert torch.equal(result, bg)
    assert result.data_ptr() != bg.data_ptr()


def test_uint8_and_float_take_the_same_edges():
    """Ties of whole grey levels stay ties as fractions of 255."""
    generator = torch.Generator().manual_seed(5)
    bg, fg = (torch.randint(0, 4, (1, 40, 40), generator=generator, dtype=torch.uint8) * 20 for _ in range(2))
    share = torch.ones(1, 30, 30, dtype=torch.uint8) * 255
    whole = ops.poisson_blend(bg, fg[:, None, :30, :30].reshape(1, 1, 30, 30), share, position=[(5, 5)],
                              guidance="mixed")  # fmt: skip
    real = ops.poisson_blend(bg / 255, (fg[:, :30, :30] / 255)[None], share / 255, position=[(5, 5)], guidance="mixed")
    assert (whole.float() - (real * 255).clamp(0, 255)).abs().max() <= 0.75


# --- errors -----------------------------------------------------------------------------------------------------------


def test_not_converged_is_an_error():
    bg, fg, share = scene("cat", (64, 64))
    with pytest.raises(RuntimeError, match=r"object 0 did not converge: estimated error .* after 1 cycles"):
        blended(bg, fg, share, (0, 0), torch.float64, tolerance=1e-6, max_cycles=1)
    blended(bg, fg, share, (0, 0), torch.float64, tolerance=1e-6, max_cycles=1, check=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    """An error where they count, and none where nothing depends on them."""
    bg, fg, share = scene("cat", (64, 64))
    centre, corner = (30, 30), (0, 0)
    for array, where in ((fg, centre), (bg, next(iter(np.argwhere((share == 0) & (np.roll(share, -1, 0) == 1)))))):
        spoilt = array.copy()
        spoilt[tuple(where)] = value
        with pytest.raises(RuntimeError, match="object 0 was not blended"):
            blended(spoilt if array is bg else bg, spoilt if array is fg else fg, share, (0, 0))
    spoilt = fg.copy()
    spoilt[corner] = value
    assert (blended(bg, spoilt, share, (0, 0)) == blended(bg, fg, share, (0, 0))).all()
    spoilt = bg.copy()
    spoilt[centre] = value
    assert (blended(spoilt, fg, share, (0, 0)) == blended(bg, fg, share, (0, 0))).all()


def test_arguments():
    bg, fg, share = torch.rand(1, 3, 20, 20), [torch.rand(3, 8, 8)], [torch.ones(8, 8)]
    for error, message, how in (
        (ValueError, "guidance must be one of", {"guidance": "sum"}),
        (ValueError, "domain must be one of", {"domain": "box"}),
        (TypeError, "position must be whole numbers", {"position": [(0.5, 1.0)]}),
        (ValueError, r"position must be \[N = 1, 2\]", {"position": [(0, 1), (2, 3)]}),
        (ValueError, r"ptr must be \[B \+ 1 = 2\]", {"ptr": [0, 2]}),
        (ValueError, "tolerance must be above 0", {"tolerance": 0.0}),
        (ValueError, "max_cycles must be at least 1", {"max_cycles": 0}),
        (ValueError, "objects must have 3 channels, last", {"channels_last": True}),
    ):
        with pytest.raises(error, match=message):
            background = bg.movedim(1, -1) if how.get("channels_last") else bg
            ops.poisson_blend(background, ops.pack_objects(fg, share), **how)
    with pytest.raises(ValueError, match="ptr must be given"):
        ops.poisson_blend(bg.expand(3, 3, 20, 20), fg, share)
    with pytest.raises(TypeError, match="objects must be"):
        ops.poisson_blend(bg, [f.double() for f in fg], [s.double() for s in share])


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("soft", [False, True])
def test_gradient_along_a_direction(guidance, soft):
    """One object of a real size: the adjoint's product with a direction is the difference quotient's."""
    generator = torch.Generator().manual_seed(9)
    bg, fg = (torch.rand(1, 2, n, n, dtype=torch.float64, generator=generator) for n in (60, 50))
    share = torch.from_numpy(mask("cat", (50, 50))).double()[None]
    share = share * torch.empty_like(share).uniform_(0.2, 0.8, generator=generator) if soft else share
    leaves = [t.requires_grad_() for t in (bg, fg, share)]
    how = {"position": [(-4, 5)], "guidance": guidance, "soft": soft, "tolerance": 1e-11, "max_cycles": 60}

    def loss(image, objects, masks):
        return (ops.poisson_blend(image, objects, masks, **how) ** 2).sum()

    grads = torch.autograd.grad(loss(*leaves), leaves)
    for k in range(3 if soft else 2):
        direction = torch.randn(leaves[k].shape, dtype=torch.float64, generator=generator)
        direction = direction * (share > 0) if k == 2 else direction
        ends = []
        for sign in (1, -1):
            moved = [t.detach() for t in leaves]
            moved[k] = moved[k] + sign * 1e-7 * direction
            ends.append(loss(*moved))
        slope = (ends[0] - ends[1]) / 2e-7
        assert abs((grads[k] * direction).sum() / slope - 1) < 1e-5, k
    if not soft:
        assert (grads[2] == 0).all()


def test_gradient_of_float32_at_the_usual_tolerance():
    bg, fg, share = scene("cup", (90, 80), (3, 3))
    exact = []
    for dtype, tolerance in ((torch.float32, 0.25), (torch.float64, 1e-9)):
        image, objects = (torch.from_numpy(a / 255).to(dtype).requires_grad_() for a in (bg, fg))
        result = ops.poisson_blend(image, [objects], [torch.from_numpy(share).to(dtype)], position=[(1, 2)],
                                   channels_last=True, tolerance=tolerance)  # fmt: skip
        exact.append(torch.autograd.grad(result.square().sum(), (image, objects)))
    for a, b in zip(*exact, strict=True):  # seen: 7e-4 of the largest
        assert (a.double() - b).abs().max() <= 4e-3 * b.abs().max()


def test_gradients_of_one_object_on_many_images_add_up(threads):
    """Rows of the table may name the same pixels; the bits are those of any number of threads."""
    generator = torch.Generator().manual_seed(8)
    bg = torch.rand(4, 2, 40, 40, generator=generator)
    fg = torch.rand(2, 25, 30, generator=generator)
    share = torch.from_numpy(mask("blob", (25, 30))).float()
    places = [(1, 1), (10, 5), (-3, 9), (20, 20)]
    packed = ops.pack_objects([fg], [share])
    found = []
    for n in (1, 3):
        threads(n)
        pixels = packed.pixels.clone().requires_grad_()
        many = packed._replace(pixels=pixels, sizes=packed.sizes.expand(4, 3).contiguous())
        result = ops.poisson_blend(bg, many, position=places, guidance="average")
        found.append(torch.autograd.grad(result.square().sum(), pixels)[0])
    assert torch.equal(found[0], found[1])
    leaf = fg.clone().requires_grad_()
    single = [ops.poisson_blend(b, [leaf], [share], position=[p], guidance="average")
              for b, p in zip(bg, places, strict=True)]  # fmt: skip
    expected = torch.autograd.grad(sum(r.square().sum() for r in single), leaf)[0].reshape(-1)
    assert (found[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- the rectangle ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cat", "cup"])
@pytest.mark.parametrize("guidance", ["import", "mixed"])
def test_rectangle_is_what_opencv_does(name, guidance):
    """OpenCV truncates and we round: half a level on average. It overwrites the mask, so it gets a copy."""
    cv2 = pytest.importorskip("cv2")
    bg, fg, share = scene(name, (100, 110), (60, 50))
    bytes_ = (share * 255).astype(np.uint8)
    rows, columns = np.argwhere(share.any(1))[:, 0], np.argwhere(share.any(0))[:, 0]
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    h, w = share[box].shape
    top, left = 31, 22
    flag = cv2.NORMAL_CLONE if guidance == "import" else cv2.MIXED_CLONE
    expected = cv2.seamlessClone(fg.astype(np.uint8), bg.astype(np.uint8), bytes_.copy(), (left + w // 2, top + h // 2),
                                 flag)  # fmt: skip
    result = ops.poisson_blend(
        torch.from_numpy(bg).byte(), [torch.from_numpy(fg[box].copy()).byte()], [torch.from_numpy(share[box] > 0)],
        position=[(top, left)], guidance=guidance, domain="rectangle", channels_last=True,
    ).numpy()  # fmt: skip
    difference = abs(result.astype(float) - expected.astype(float))
    assert difference[top : top + h, left : left + w].mean() < 0.6
    assert difference.max() <= 1  # it truncates
    outside = np.ones(bg.shape[:2], bool)
    outside[top + 1 : top + h - 1, left + 1 : left + w - 1] = False
    assert (result[outside] == bg[outside]).all()


def test_rectangle_gradient():
    generator = torch.Generator().manual_seed(2)
    bg = torch.rand(1, 1, 9, 10, dtype=torch.float64, generator=generator).requires_grad_()
    fg = torch.rand(1, 1, 8, 9, dtype=torch.float64, generator=generator).requires_grad_()
    share = torch.ones(1, 8, 9, dtype=torch.float64)
    for guidance in ("import", "mixed"):
        assert torch.autograd.gradcheck(
            lambda b, f, g=guidance: ops.poisson_blend(b, f, share, position=[(2, -1)], guidance=g, domain="rectangle"),
            (bg, fg),
        )


# --- the random walker ------------------------------------------------------------------------------------------------


def scribbles(size):
    height, width = size
    seeds = torch.zeros(size, dtype=torch.int64)
    seeds[height // 2, width // 2 : width // 2 + 5] = 1
    seeds[2, 2:-2] = 2
    seeds[height - 6 : height - 3, 5] = 3
    return seeds


@pytest.mark.parametrize("channels", [1, 3])
def test_random_walker_is_scikit_images(channels):
    """Its direct solution. Its least weight is 1e-10 and ours 1e-6: they differ where walls are high."""
    segmentation = pytest.importorskip("skimage.segmentation")
    size = (60, 70)
    image = photo("coffee", size)[..., :channels].astype(np.float64) / 255
    seeds = scribbles(size)
    beta = 30.0 / channels**2
    # scikit-image divides its beta by 10 times the deviation of the whole array, and by the root of the channels.
    expected = segmentation.random_walker(
        image,
        seeds.numpy(),
        beta=beta * 10 * image.std() * channels**0.5,
        mode="bf",
        return_full_prob=True,
        channel_axis=-1,
    )
    labels, found = ops.random_walker_segment(
        torch.from_numpy(image).movedim(-1, 0), seeds, beta=beta, tolerance=1e-8, return_probabilities=True
    )
    assert found.dtype == torch.float64
    assert abs(found.numpy() - expected).max() < 1e-3  # seen: 1e-4, all of it from the floor
    assert (labels.numpy() == expected.argmax(0) + 1).mean() > 0.999


@pytest.mark.parametrize("beta", [0.0, 300.0, 5000.0])
def test_random_walker_solves_its_system(beta):
    """Weights over six decades; against the dense system."""
    from fastnuggets import reference
    from fastnuggets.ops.poisson import _edge_weights

    size = (40, 37)
    image = torch.from_numpy(photo("rocket", size).copy()).movedim(-1, 0)
    seeds = scribbles(size)
    labels, found = ops.random_walker_segment(image.double() / 255, seeds, beta=beta, return_probabilities=True)
    east, south = (_edge_weights(image.double() / 255, dim, beta) for dim in (2, 1))
    expected = reference.random_walker(east, south, seeds, 3)
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(labels, found.argmax(0) + 1)
    assert (labels[seeds > 0] == seeds[seeds > 0]).all()
    assert torch.equal(ops.random_walker_segment(image, seeds, beta=beta), labels)


def test_random_walker_finds_a_disc_behind_noise():
    size = (80, 80)
    y, x = torch.meshgrid(*(torch.arange(80),) * 2, indexing="ij")
    disc = ((y - 40) ** 2 + (x - 40) ** 2) < 22**2
    generator = torch.Generator().manual_seed(4)
    image = 0.3 + 0.4 * disc + 0.05 * torch.randn(size, generator=generator)
    seeds = torch.zeros(size, dtype=torch.int64)
    seeds[40, 40], seeds[3, 3] = 1, 2
    labels = ops.random_walker_segment(image, seeds, beta=200.0)
    assert ((labels == 1) == disc).float().mean() > 0.99


def test_random_walker_arguments():
    image, seeds = torch.rand(3, 30, 30), scribbles((30, 30)).clamp(max=2)
    for error, message, args in (
        (ValueError, r"seeds must be \[H, W\]", (image, seeds[1:])),
        (TypeError, "seeds must be integers", (image, seeds.float())),
        (TypeError, "image must be uint8", (image.long(), seeds)),
        (ValueError, "seeds must mark at least one", (image, torch.zeros_like(seeds))),
        (ValueError, "seeds must be from 0", (image, seeds - 1)),
    ):
        with pytest.raises(error, match=message):
            ops.random_walker_segment(*args)
    with pytest.raises(RuntimeError, match="did not converge in 1 steps"):
        ops.random_walker_segment(image, seeds, beta=1000.0, tolerance=1e-12, max_steps=1)
    image[0, 5, 5] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        ops.random_walker_segment(image, seeds)
