"""The CUDA kernels of Poisson blending, run on the CPU, against dense solutions of the definition in float64."""

import ctypes
import itertools
import math
import zlib
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from building import CSRC, HERE, load
from torch import Tensor

import fastnuggets  # noqa: F401  (registers torch.ops.fastnuggets)

OPS = torch.ops.fastnuggets
SOURCES = HERE / "poisson_driver.cpp", CSRC / "blend" / "poisson_kernels.cu"
DTYPES = {torch.uint8: 5, torch.float32: 0, torch.float64: 1}  # as common/storage.h numbers them
GUIDANCES = ["import", "mixed", "average"]
# Shared memory of a block: all that is solved here fits, or hardly anything, so that all but the coarsest levels lie in
# global memory.
SHARED = {"small": 227 * 1024, "large": 4096}


class Scene(ctypes.Structure):
    """The structs here are those of poisson.h."""

    _fields_ = [
        ("background", ctypes.c_void_p), ("pixels", ctypes.c_void_p), ("mask", ctypes.c_void_p),
        ("table", ctypes.c_void_p), ("dtype", ctypes.c_uint8), ("channels_last", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("B", "C", "H", "W", "N", "P", "max_h", "max_w")),
        ("guidance", ctypes.c_int), ("soft", ctypes.c_bool),
    ]  # fmt: skip


class Effort(ctypes.Structure):
    _fields_ = [("tolerance", ctypes.c_float), ("max_cycles", ctypes.c_int)]


class Blend(ctypes.Structure):
    _fields_ = [("scene", Scene), ("effort", Effort), ("image", ctypes.c_void_p), ("info", ctypes.c_void_p)]


class BlendBackward(ctypes.Structure):
    _fields_ = [
        ("scene", Scene), ("effort", Effort), ("grad", ctypes.c_void_p), ("grad_background", ctypes.c_void_p),
        ("grad_pixels", ctypes.c_void_p), ("grad_mask", ctypes.c_void_p), ("info", ctypes.c_void_p),
    ]  # fmt: skip


@cache
def kernels() -> ctypes.CDLL:
    library = load(*SOURCES, functions=("poisson_blend", "poisson_blend_backward"))
    library.poisson_scratch_bytes.restype = ctypes.c_size_t
    return library


@pytest.fixture(autouse=True)
def thread_order(request):
    """Forward or reversed, by the test's name; `test_same_bits_in_every_thread_order` takes both."""
    kernels().set_thread_order(zlib.crc32(request.node.name.encode()) % 2)
    yield
    kernels().set_thread_order(0)


# --- the definition ---------------------------------------------------------------------------------------------------


def definition(background, pixels, mask, y, x, guidance, soft, full=1.0) -> Tensor:
    """background [C, H, W], pixels [C, h, w], mask [h, w], all float64 and counted to `full`; differentiable."""
    (height, width), (h, w) = background.shape[1:], mask.shape
    rows, columns = torch.arange(height) - y, torch.arange(width) - x
    fg = pixels[:, rows.clamp(0, h - 1)][:, :, columns.clamp(0, w - 1)]
    inside = ((rows >= 0) & (rows < h))[:, None] & ((columns >= 0) & (columns < w))
    m = mask[rows.clamp(0, h - 1)][:, columns.clamp(0, w - 1)] / full * inside
    domain = (m > 0 if soft else m >= 0.5).flatten()
    n = int(domain.sum())
    if n == 0:
        return background
    number = torch.arange(height * width).view(height, width)
    p = torch.cat([number[:, :-1].flatten(), number[:-1].flatten()])
    q = torch.cat([number[:, 1:].flatten(), number[1:].flatten()])
    p, q = (side[domain[p] | domain[q]] for side in (p, q))
    flat_fg, flat_bg, flat_m = fg.flatten(1), background.flatten(1), m.flatten()
    by_fg, by_bg = flat_fg[:, p] - flat_fg[:, q], flat_bg[:, p] - flat_bg[:, q]
    v = by_fg
    if guidance == "mixed":
        v = torch.where(by_bg.abs() > by_fg.abs() + 4e-6, by_bg, by_fg)
    elif guidance == "average":
        v = (by_fg + by_bg) / 2
    if soft:
        weight = (flat_m[p] + flat_m[q]) / 2
        v = weight * v + (1 - weight) * by_bg
    unknown = domain.cumsum(0) - 1
    right = torch.zeros_like(flat_bg)
    right = right.index_add(1, p, v).index_add(1, q, -v)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for here, there in ((p, q), (q, p)):
        ours, border = domain[here], domain[here] & ~domain[there]
        matrix.index_put_((unknown[here[ours]],) * 2, torch.ones((), dtype=torch.float64), accumulate=True)
        right = right.index_add(1, here[border], flat_bg[:, there[border]])
    inner = domain[p] & domain[q]
    matrix[unknown[p[inner]], unknown[q[inner]]] = -1
    matrix[unknown[q[inner]], unknown[p[inner]]] = -1
    right, mean = right[:, domain].T, 0.0
    if domain.all():  # the constant is open
        matrix, mean = matrix + 1 / n, flat_fg.mean(1)
    found = torch.linalg.solve(matrix, right).T + (mean[:, None] if domain.all() else 0)
    return flat_bg.index_put((torch.arange(len(flat_bg))[:, None], domain.nonzero().T), found).view_as(background)


# --- scenes -----------------------------------------------------------------------------------------------------------


@dataclass
class Pasted:
    """An object: mask [h, w] in 0 to 1, and where its first pixel lies."""

    mask: Tensor
    y: int
    x: int
    image: int = 0


def random(*shape, seed=0, smooth=True) -> Tensor:
    """Numbers in 0 to 1, of which neighbours resemble each other."""
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if smooth:
        for axis in (-1, -2):
            values = (values + values.roll(1, axis) + values.roll(2, axis)) / 3
    return values


def disc(h: int, w: int, hole: float = 0.0) -> Tensor:
    y, x = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)
    square = y**2 + x**2 if min(h, w) > 1 else torch.zeros(h, w)
    return ((square < 0.95) & (square >= hole)).double()


def noise(h: int, w: int, seed: int = 3) -> Tensor:
    return (random(h, w, seed=seed) > 0.5).double()


def comb(h: int, w: int) -> Tensor:
    mask = torch.zeros(h, w, dtype=torch.float64)
    mask[:, ::2] = 1
    mask[h // 2] = 1
    return mask


class Case:
    """What a call is given. Values count to 1, or to 255 if uint8."""

    def __init__(self, objects, size, *, images=1, channels=1, dtype=torch.float64, channels_last=False,
                 guidance="import", soft=False):  # fmt: skip
        self.objects, self.dtype, self.guidance, self.soft = objects, dtype, guidance, soft
        self.channels_last = channels_last
        self.full = 255.0 if dtype == torch.uint8 else 1.0
        self.background = self.stored(random(images, channels, *size, seed=0))
        self.pixels = [self.stored(random(channels, *o.mask.shape, seed=1 + k)) for k, o in enumerate(objects)]
        self.masks = [self.stored(o.mask) for o in objects]
        self.grad = random(images, channels, *size, seed=99).sub(0.5).to(dtype)

    def stored(self, values: Tensor) -> Tensor:
        return (values * self.full).round().to(self.dtype) if self.full > 1 else values.to(self.dtype)

    def laid_out(self, image: Tensor) -> Tensor:
        return image.movedim(-3, -1).contiguous() if self.channels_last else image.contiguous()

    def back(self, image: Tensor) -> Tensor:
        return image.movedim(-1, -3) if self.channels_last else image

    def scene(self) -> Scene:
        self.given = [self.laid_out(self.background), torch.cat([self.laid_out(p).flatten() for p in self.pixels])]
        self.given.append(torch.cat([m.flatten() for m in self.masks]))
        sizes = [o.mask.numel() for o in self.objects]
        firsts = [sum(sizes[:k]) for k in range(len(sizes))]
        rows = [[o.image, o.y, o.x, *o.mask.shape, first] for o, first in zip(self.objects, firsts, strict=True)]
        self.given.append(torch.tensor(rows, dtype=torch.int64))
        images, channels, height, width = self.background.shape
        return Scene(
            *(t.data_ptr() for t in self.given), DTYPES[self.dtype], self.channels_last, images, channels,
            height, width, len(rows), sum(sizes), max(row[3] for row in rows), max(row[4] for row in rows),
            GUIDANCES.index(self.guidance), self.soft,
        )  # fmt: skip

    def call(self, name: str, how: ctypes.Structure, shared: int, most_bytes: int) -> None:
        before = [t.view(torch.uint8).clone() for t in self.given]
        message = getattr(kernels(), name)(ctypes.byref(how), shared, ctypes.c_size_t(most_bytes))
        assert message is None, message.decode()
        assert all(torch.equal(a, b.view(torch.uint8)) for a, b in zip(before, self.given, strict=True))

    def blend(self, shared: int, tolerance: float, *, max_cycles: int = 6, most_bytes: int = 2**62, edit=None):
        """Returns the image and info. `edit` changes the table."""
        scene = self.scene()
        if edit is not None:
            edit(self.given[3])
        image, info = self.given[0].clone(), Guarded(len(self.objects))
        how = Blend(scene, Effort(tolerance, max_cycles), image.data_ptr(), info.pointer)
        self.call("poisson_blend", how, shared, most_bytes)
        return self.back(image), info.values

    def backward(self, shared: int, tolerance: float, *, max_cycles: int = 8, most_bytes: int = 2**62, edit=None):
        """Returns the gradients of background, pixels and mask, the last two flat."""
        scene = self.scene()
        if edit is not None:
            edit(self.given[3])
        grad, info = self.laid_out(self.grad), Guarded(len(self.objects))
        outs = [grad.clone(), torch.zeros_like(self.given[1]), torch.zeros_like(self.given[2])]
        pointers = [outs[0].data_ptr(), outs[1].data_ptr(), outs[2].data_ptr() if self.soft else None]
        how = BlendBackward(scene, Effort(tolerance, max_cycles), grad.data_ptr(), *pointers, info.pointer)
        self.call("poisson_blend_backward", how, shared, most_bytes)
        assert (info.values <= tolerance).all()
        return [self.back(outs[0]), *outs[1:]]

    def scratch_bytes(self, shared: int, objects: int, **scene) -> int:
        how = Blend(self.scene(), Effort(0.25, 10), None, None)
        for name, value in {"N": objects, **scene}.items():
            setattr(how.scene, name, value)
        return kernels().poisson_scratch_bytes(ctypes.byref(how), shared)

    def expected(self, inputs=None) -> Tensor:
        """In float64, counted to `full`, neither rounded nor clipped."""
        background, pixels, masks = inputs or (self.background.double(), self.pixels, self.masks)
        images = list(background)
        for o, p, m in zip(self.objects, pixels, masks, strict=True):
            images[o.image] = definition(
                images[o.image], p.double(), m.double(), o.y, o.x, self.guidance, self.soft, self.full
            )
        return torch.stack(images)

    def check(self, shared: int, tolerance: float, **how) -> Tensor:
        """Within the tolerance of the definition, in grey levels, and no other pixel changed."""
        found, info = self.blend(shared, tolerance, **how)
        expected = self.expected()
        rounding = 0.5 if self.full > 1 else 0.0
        error = (found.double() - (expected.clamp(0, 255) if rounding else expected)).abs().max() * 255 / self.full
        assert error <= tolerance + rounding
        assert (info <= tolerance).all() and (info >= 0).all()
        outside = torch.ones_like(found, dtype=torch.bool)
        for o, m in zip(self.objects, self.masks, strict=True):
            part = torch.zeros(found.shape[-2:], dtype=torch.bool)
            rows, columns = torch.arange(m.shape[0]) + o.y, torch.arange(m.shape[1]) + o.x
            inside = [((n >= 0) & (n < size)) for n, size in zip((rows, columns), part.shape, strict=True)]
            domain = m > 0 if self.soft else m >= 0.5 * self.full
            part[rows[inside[0]][:, None], columns[inside[1]]] = domain[inside[0]][:, inside[1]]
            outside[o.image] &= ~part
        assert torch.equal(found[outside], self.background[outside])
        return found


class Guarded:
    """Numbers for a result between two that no kernel may touch."""

    def __init__(self, count: int):
        self.around = torch.full((count + 2,), -77.0)
        self.pointer = self.around[1:].data_ptr()

    @property
    def values(self) -> Tensor:
        assert (self.around[[0, -1]] == -77).all()
        return self.around[1:-1]


def ones(h: int, w: int) -> Tensor:
    return torch.ones(h, w, dtype=torch.float64)


def one_pixel(h: int, w: int) -> Tensor:
    mask = torch.zeros(h, w, dtype=torch.float64)
    mask[h // 2, w // 2] = 1
    return mask


# --- forward ----------------------------------------------------------------------------------------------------------

# name: an object, and the size of its image. Sizes are around those of a tile, 32 points, and of the coarsest level.
PLACED = {
    "odd": (Pasted(disc(33, 37), 2, 3), (41, 45)),
    "tile": (Pasted(ones(32, 32), 1, 1), (34, 34)),
    "beyond a tile": (Pasted(disc(17, 65), 1, 1), (20, 70)),
    "hole": (Pasted(disc(34, 40, 0.3), 2, 2), (40, 50)),
    "islands": (Pasted(noise(35, 38), 1, 1), (37, 40)),
    "comb": (Pasted(comb(30, 41), 2, 1), (36, 44)),
    "row": (Pasted(ones(1, 70), 2, 3), (5, 80)),
    "column": (Pasted(ones(70, 2), 3, 2), (80, 5)),
    "one pixel": (Pasted(one_pixel(20, 40), 1, 2), (24, 44)),
    "nothing": (Pasted(torch.zeros(9, 40, dtype=torch.float64), 1, 2), (24, 44)),
    "tiny": (Pasted(ones(2, 3), 1, 1), (5, 5)),
    "cut off above": (Pasted(disc(40, 36), -15, -9), (36, 40)),
    "cut off below": (Pasted(ones(40, 36), 15, 22), (36, 40)),
    "outside": (Pasted(ones(8, 9), -8, 3), (20, 20)),
    "larger than the image": (Pasted(noise(50, 60), -8, -9), (33, 40)),
    "whole image": (Pasted(ones(40, 50), -3, -4), (33, 40)),
    "whole row": (Pasted(ones(1, 40), 0, 0), (1, 40)),
    "only pixel": (Pasted(ones(3, 3), -1, -1), (1, 1)),
}


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("name", PLACED)
def test_blend_of_every_place_and_mask(name, shared):
    pasted, size = PLACED[name]
    guidance = GUIDANCES[list(PLACED).index(name) % 3]
    Case([pasted], size, guidance=guidance).check(shared, 0.02)


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_blend_with_a_soft_mask(guidance, shared):
    mask = random(35, 38, seed=5) * disc(35, 38, 0.1)
    Case([Pasted(mask, 3, -4)], (40, 44), guidance=guidance, soft=True).check(shared, 0.02)


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blend_of_every_type_and_layout(dtype, channels_last, shared):
    layout = {"channels": 3, "dtype": dtype, "channels_last": channels_last}
    for guidance, soft in [("import", False), ("mixed", dtype == torch.float32)]:
        mask = noise(20, 23) * random(20, 23, seed=8) if soft else noise(20, 23)
        Case([Pasted(mask, -2, 3)], (25, 27), guidance=guidance, soft=soft, **layout).check(shared, 0.02)


SEVERAL = [
    Pasted(disc(31, 35, 0.2), 1, 2, 3), Pasted(ones(5, 4), 3, 30, 0), Pasted(noise(14, 34), 30, 20, 1),
    Pasted(torch.zeros(3, 3, dtype=torch.float64), 0, 0, 4), Pasted(comb(12, 12), 4, 5, 2),
]  # fmt: skip


@pytest.mark.parametrize("shared", [SHARED["small"], 16 * 1024, SHARED["large"]])
def test_objects_of_many_sizes(shared):
    """With 16 KB some of them fit into a block. Each has the bits that it has alone, or in another group."""
    case = Case(SEVERAL, (34, 40), images=5, dtype=torch.float32, guidance="average")
    found = case.check(shared, 0.02)
    one_by_one, info = case.blend(shared, 0.02, most_bytes=case.scratch_bytes(shared, 1))
    assert torch.equal(found, one_by_one)
    for n in (0, 4):

        def only(table, n=n):
            table[torch.arange(len(table)) != n, 0] = -1

        alone, error = case.blend(shared, 0.02, edit=only)
        assert torch.equal(alone[SEVERAL[n].image], found[SEVERAL[n].image])
        assert error[n] == info[n] and error.isnan().sum() == len(SEVERAL) - 1


def test_scratch():
    case = Case(SEVERAL, (34, 40), images=5)
    assert case.scratch_bytes(SHARED["small"], 5) == 0
    one = case.scratch_bytes(SHARED["large"], 1)
    assert 3 * 31 * 35 * 8 < one < 8 * 31 * 35 * 8
    assert case.scratch_bytes(SHARED["large"], 5) == 5 * one
    sides = dict.fromkeys(("max_h", "max_w", "H", "W"), 2000)
    one = case.scratch_bytes(SHARED["small"], 1, **sides)
    assert case.scratch_bytes(SHARED["small"], 1000, **sides) == max(one, 2**30)


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_cycles_stop_when_the_error_is_small(shared):
    case = Case([Pasted(disc(33, 37), 2, 3)], (41, 45), guidance="mixed")
    expected, errors = case.expected(), []
    for cycles in range(5):
        found, info = case.blend(shared, 1e-9, max_cycles=cycles)
        errors.append((found - expected).abs().max().item() * 255)
        assert info[0] > 1e-9 and errors[-1] < info[0]
    assert all(a > 3 * b for a, b in itertools.pairwise(errors))
    enough, info = case.blend(shared, 0.25)
    assert errors[4] < (enough - expected).abs().max() * 255 <= info[0] <= 0.25


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_error_is_that_of_the_worst_channel(shared):
    case = Case([Pasted(disc(20, 22), 2, 3)], (30, 30), channels=3)
    _, worst = case.blend(shared, 0.25)
    for same in ([0, 1], [1, 2], [0, 1, 2]):
        case = Case([Pasted(disc(20, 22), 2, 3)], (30, 30), channels=3)
        for c in same:
            case.background[0, c] = case.pixels[0][c] = 0.5
        info = case.blend(shared, 0.25)[1]
        assert 0 < info <= worst if len(same) < 3 else info == 0


@pytest.mark.parametrize("mask", [noise(37, 68), ones(40, 65)], ids=["islands", "full"])
@pytest.mark.parametrize("cycles", [0, 1])
def test_tiles_are_the_whole_level(cycles, mask):
    """A rim that is too narrow shows before convergence. Seen: the same bits."""
    case = Case([Pasted(mask, 1, 2)], (42, 71), guidance="mixed")
    found = [case.blend(shared, 1e-9, max_cycles=cycles)[0] for shared in SHARED.values()]
    assert (found[0] - found[1]).abs().max() < 1e-13


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_rows_that_name_nothing_and_values_not_finite(shared):
    case = Case([Pasted(ones(20, 22), 2, 3, k) for k in range(7)], (30, 30), images=7)
    case.background[5, 0, 12, 2] = math.nan  # beside the domain
    case.background[6, 0, 29, 29] = math.inf  # far from it

    def break_rows(table):
        table[0, 0] = 7
        table[1, 3] = -1
        table[2, 4] = 23
        table[3, 5] = 6 * 440 + 1

    found, info = case.blend(shared, 0.25, edit=break_rows)
    assert info.isnan().tolist() == [True, True, True, True, False, True, False]
    assert torch.equal(found[:4], case.background[:4])
    assert found[4].isfinite().all() and found[6].isfinite().sum() == 899


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize(("size", "info"), [("N", -77), ("C", 0), ("H", 0), ("max_h", math.nan)])
def test_nothing_to_blend(size, info, shared):
    case = Case([Pasted(ones(4, 4), 1, 1)], (8, 8))
    scene, found = case.scene(), Guarded(1)
    setattr(scene, size, 0)
    image = case.given[0].clone()
    case.call("poisson_blend", Blend(scene, Effort(0.25, 5), image.data_ptr(), found.pointer), shared, 2**62)
    assert torch.equal(image, case.given[0])
    assert found.values.item() == info or (info != info and found.values.isnan())


# --- backward ---------------------------------------------------------------------------------------------------------


def check_backward(case: Case, shared: int, tolerance: float = 2e-3, **how) -> None:
    """Against autograd through the definition. Seen: 2.5 times the solution's own error, of the largest gradient."""
    found = case.backward(shared, tolerance, **how)
    groups = [[t.double().clone().requires_grad_() for t in group] for group in (case.pixels, case.masks)]
    background = case.background.double().clone().requires_grad_()
    image = case.expected((background, *groups))
    inputs = [background, *groups[0], *groups[1]]
    grads = torch.autograd.grad(image, inputs, case.grad.double(), allow_unused=True, materialize_grads=True)
    count = len(case.objects)
    by_pixels, by_mask = grads[1 : 1 + count], grads[1 + count :]
    expected = [grads[0], torch.cat([case.laid_out(g).flatten() for g in by_pixels])]
    expected.append(torch.cat([g.flatten() for g in by_mask]))  # 0 of a hard mask
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 5 * tolerance / 255 * b.abs().max()


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_backward_is_the_derivative(guidance, soft, shared):
    mask = random(20, 23, seed=5) * disc(20, 23, 0.1) if soft else noise(20, 23)
    check_backward(Case([Pasted(mask, -2, 3)], (24, 30), guidance=guidance, soft=soft, channels=2), shared)


@pytest.mark.parametrize("name", PLACED)
def test_backward_of_every_place_and_mask(name):
    (pasted, size), shared = PLACED[name], [*SHARED.values()][list(PLACED).index(name) % 2]
    check_backward(Case([pasted], size, guidance="average", soft=bool(pasted.mask.sum() > 900)), shared)


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_backward_in_float32(channels_last, shared):
    layout = {"channels": 3, "dtype": torch.float32, "channels_last": channels_last}
    check_backward(Case([Pasted(noise(20, 23), -2, 3)], (25, 27), guidance="mixed", **layout), shared)


@pytest.mark.parametrize("shared", [SHARED["small"], 16 * 1024, SHARED["large"]])
def test_backward_of_objects_of_many_sizes(shared):
    case = Case(SEVERAL, (34, 40), images=5, guidance="average")
    check_backward(case, shared)
    apart = case.backward(shared, 0.25, most_bytes=2**18)
    assert all(map(torch.equal, case.backward(shared, 0.25), apart))


@pytest.mark.parametrize("groups", [False, True], ids=["together", "in_groups"])
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_rows_that_name_the_same_pixels_add_their_gradients(shared, groups):
    """One object on two images, cut off on one of them."""
    mask = random(12, 13, seed=5)
    case = Case([Pasted(mask, 2, 1, 0), Pasted(ones(3, 3), 1, 1, 1), Pasted(mask, 9, -3, 2)], (16, 18), images=3,
                soft=True)  # fmt: skip
    case.pixels[2] = case.pixels[0]
    apart = case.backward(shared, 0.25)

    def share(table):
        table[2, 5] = 0

    together = case.backward(shared, 0.25, edit=share, most_bytes=10000 if groups else 2**62)
    first, rest = slice(0, 12 * 13), slice(12 * 13 + 9, None)
    for a, b in zip(apart[1:], together[1:], strict=True):
        assert torch.allclose(a[first] + a[rest], b[first], rtol=0, atol=1e-12) and b[first].any()
        assert not b[rest].any()


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize(
    ("pasted", "size", "soft"),
    [
        (Pasted(noise(33, 41), 1, 2), (36, 45), False),
        (Pasted(random(36, 33, seed=5), 2, -2), (40, 38), True),
        (Pasted(ones(33, 34), 0, 0), (33, 34), False),
    ],
    ids=["hard", "soft", "whole image"],
)
def test_same_bits_in_every_thread_order(pasted, size, soft, shared):
    case, found = Case([pasted], size, dtype=torch.float32, guidance="mixed", soft=soft), []
    for order in (0, 1):
        kernels().set_thread_order(order)
        found.append([*case.blend(shared, 0.25), *case.backward(shared, 0.25)])
    assert all(map(torch.equal, *found))


# Seen: 4e-16 of images, 8e-16 of gradients. Of several channels the CPU stops when the last one is done.
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_cpu_kernels_take_the_same_steps(guidance, soft, shared):
    mask = random(33, 38, seed=5) * disc(33, 38, 0.1) if soft else noise(33, 38)
    case = Case([Pasted(mask, -2, 3)], (40, 39), guidance=guidance, soft=soft)
    found, info = case.blend(shared, 0.25)
    rule = (33, 38, GUIDANCES.index(guidance), soft, 0.25, 6, False)
    expected, expected_info = OPS.poisson_blend(*case.given, *rule)
    assert (found - expected).abs().max() < 1e-12
    assert torch.allclose(info, expected_info, rtol=1e-5)
    grads = OPS.poisson_blend_backward(case.grad, *case.given, *rule, [True, True, soft])
    for a, b in zip(case.backward(shared, 0.25, max_cycles=6), grads, strict=True):
        assert b.numel() == 0 or (a - b).abs().max() < 1e-12
