"""The CUDA kernels of voxelize, run on the CPU, against the definition in fastnuggets.reference and the CPU kernels."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, wraps

import pytest
import torch
from building import CSRC, HERE, load
from torch import Tensor

from fastnuggets import reference  # and torch.ops.fastnuggets

DENSITIES = ["nearest", "trilinear", "sphere", "gaussian", "wave", "molgrid", "molvoxel", "pyuul", "moleculekit"]
COMBINE = ["sum", "max", "union"]
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
EXACT = 1e-18  # a cut-off beyond the last digit of float64
SOURCES = HERE / "voxelize_driver.cpp", CSRC / "voxelize" / "voxelize_kernels.cu"
TYPES = [torch.float32, torch.float64]


class Call(ctypes.Structure):
    """As in voxelize_driver.cpp."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("is_double", "is_dual")],
        *[(name, ctypes.c_void_p) for name in ("coords", "ptr", "channel", "weight", "size", "omega")],
        *[(f"{name}_strides", ctypes.c_int64 * 2) for name in ("weight", "size", "omega")],
        *[(name, ctypes.c_void_p) for name in ("center", "rotation", "translation")],
        *[(name, ctypes.c_int64) for name in ("posed", "B", "K", "N", "C")],
        ("tangent", ctypes.c_void_p * 4),
        ("shape", ctypes.c_int64 * 3),
        ("spacing", ctypes.c_double * 3),
        *[(name, ctypes.c_int64) for name in ("density", "combine")],
        ("cutoff", ctypes.c_double),
    ]


@dataclass(frozen=True)
class Case:
    coords: Tensor  # [N, 3], or box positions [N, K, 3]
    ptr: Tensor  # [B + 1]
    channel: Tensor | None  # [N]; None: an atom has all channels
    weight: Tensor  # [N, C], as are size and omega
    size: Tensor
    omega: Tensor
    density: str
    combine: str = "sum"
    shape: tuple[int, int, int] = (7, 5, 9)
    spacing: tuple[float, float, float] = (0.5, 0.75, 0.625)
    cutoff: float = EXACT
    center: Tensor | None = None  # [B, K, 3]
    rotation: Tensor | None = None  # [B, K, 3, 3]
    translation: Tensor | None = None  # [B, K, 3]

    @property
    def poses(self) -> int:
        if self.coords.dim() == 3:
            return self.coords.shape[1]
        return self.center.shape[1] if self.center is not None else 1

    @property
    def grid_shape(self) -> tuple[int, ...]:
        return ((len(self.ptr) - 1) * self.poses, self.weight.shape[1], *self.shape)

    def to(self, dtype: torch.dtype) -> "Case":
        names = ("coords", "weight", "size", "omega", "center", "rotation", "translation")
        return replace(self, **{n: getattr(self, n).to(dtype) for n in names if getattr(self, n) is not None})

    def call(self, tangents=(None,) * 4) -> Call:
        weight, size, omega = self.weight, self.size, self.omega
        return Call(
            self.coords.dtype == torch.float64,
            any(t is not None for t in tangents),
            *(address(t) for t in (self.coords, self.ptr, self.channel, weight, size, omega)),
            *((ctypes.c_int64 * 2)(*t.stride()) for t in (weight, size, omega)),
            *(address(t) for t in (self.center, self.rotation, self.translation)),
            self.coords.dim() == 3,
            len(self.ptr) - 1,
            self.poses,
            *weight.shape,
            (ctypes.c_void_p * 4)(*map(address, tangents)),
            (ctypes.c_int64 * 3)(*self.shape),
            (ctypes.c_double * 3)(*self.spacing),
            DENSITIES.index(self.density),
            COMBINE.index(self.combine),
            self.cutoff,
        )


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def kernels() -> ctypes.CDLL:
    library = load(
        *SOURCES, functions=("forward", "backward", "sparse_count", "sparse_write", "segment_sum", "segment_expand")
    )
    library.sparse_tiles.restype = ctypes.c_int64
    return library


def run(name: str, *arguments) -> None:
    converted = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) if isinstance(a, int) else a
        for a in arguments
    ]
    message = getattr(kernels(), name)(*converted)
    assert message is None, message.decode()


def in_both_thread_orders(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Runs kernels twice: the order of threads must not change a single bit, and no poison may be left."""

    @wraps(function)
    def twice(*arguments, **options):
        results = []
        for is_reversed in (1, 0):
            kernels().set_thread_order(is_reversed)
            results.append(function(*arguments, **options))
        assert all(map(torch.equal, *results))
        return results[0]

    return twice


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)


def forward(case: Case, dtype: torch.dtype | None = None, tangents=(None,) * 4) -> Tensor:
    return _forward(case, dtype, tangents)[0]


@in_both_thread_orders
def _forward(case: Case, dtype: torch.dtype | None, tangents) -> list[Tensor]:
    out = poisoned(*case.grid_shape, dtype=dtype or case.coords.dtype)
    run("forward", ctypes.byref(case.call(tangents)), out, DTYPES[out.dtype])
    return [out]


@in_both_thread_orders
def backward(case: Case, grad: Tensor, tangents=(None,) * 4) -> list[Tensor]:
    """Gradients of box positions, weight, size, omega; zero where there is no entry."""
    positions = poisoned(len(case.coords), case.poses, 3, dtype=case.coords.dtype)
    out = [positions, *(torch.zeros(case.weight.shape, dtype=case.coords.dtype) for _ in range(3))]
    to = (ctypes.c_void_p * 4)(*map(address, out))
    run("backward", ctypes.byref(case.call(tangents)), grad, DTYPES[grad.dtype], to)
    return out


def sparse(case: Case) -> Tensor:
    places, values = _sparse(case)
    return torch.sparse_coo_tensor(places, values, case.grid_shape, is_coalesced=True, check_invariants=True)


@in_both_thread_orders
def _sparse(case: Case) -> list[Tensor]:
    call = ctypes.byref(case.call())
    counts = poisoned(kernels().sparse_tiles(call), dtype=torch.int64)
    run("sparse_count", call, counts)
    total = int(counts.sum())
    places = poisoned(5, total, dtype=torch.int64)
    values = poisoned(total, dtype=case.coords.dtype)
    run("sparse_write", call, counts.cumsum(0) - counts, total, places, values)
    return [places, values]


def make(density: str, sizes=(6, 0, 4), channels=3, *, soft=False, posed=0, seed=0, **options) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return (low + (high - low) * torch.rand(*shape, generator=generator)).double()

    n = sum(sizes)
    shape, spacing = options.get("shape", Case.shape), options.get("spacing", Case.spacing)
    reach = torch.tensor([0.5 * count * edge + 0.5 for count, edge in zip(shape, spacing, strict=True)])
    coords = uniform(-1, 1, n, *([posed] if posed else []), 3) * reach
    size = uniform(0.5, 0.9, n, channels)
    if density in ("molgrid", "molvoxel", "pyuul", "moleculekit", "sphere"):
        size = 1.5 * size
    if n > 2:
        size[2] = 0
    return Case(
        coords,
        torch.tensor([0, *sizes]).cumsum(0),
        None if soft else torch.randint(channels, (n,), generator=generator),
        uniform(-0.3 if soft else 0.2, 0.9, n, channels),
        size,
        uniform(0.4, 0.8, n, channels),
        density,
        **options,
    )


def wanted(case: Case, positions: Tensor, weight: Tensor, size: Tensor, omega: Tensor) -> Tensor:
    """The definition in float64, [G, C, D, H, W]; positions [N, K, 3] or, with a pose, coords [N, 3]."""
    case = case.to(torch.float64)
    options = {
        "shape": case.shape,
        "spacing": case.spacing,
        "density": case.density,
        "combine": case.combine,
        "sigma" if case.density in ("gaussian", "wave") else "radius": size,
        "omega": omega,
    }
    mask = torch.ones_like(weight)
    if case.channel is not None:
        mask = torch.nn.functional.one_hot(case.channel, weight.shape[1]).to(weight)
    if positions.dim() == 2:
        for name in ("center", "rotation", "translation"):
            options[name] = getattr(case, name)
        return reference.voxelize(positions, mask * weight, case.ptr, **options).reshape(case.grid_shape)
    each = [reference.voxelize(positions[:, k], mask * weight, case.ptr, **options) for k in range(positions.shape[1])]
    return torch.stack(each, 1).reshape(case.grid_shape)


def inputs(case: Case) -> list[Tensor]:
    case = case.to(torch.float64)
    return [case.coords, case.weight, case.size, case.omega]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    assert not error.isnan().any()
    if error.numel():
        assert error.max() <= tolerance * max(1.0, float(expected.abs().max()))


# Largest error over the largest value (or 1). Measured on these cases: 2.7e-7 and 1.6e-15, 6.0e-7 and 4.1e-15, 1.4e-6
# and 1.6e-13 (wave, whose second derivatives in omega are the largest numbers).
FORWARD = {torch.float32: 5e-7, torch.float64: 5e-15}
GRADIENT = {torch.float32: 1.2e-6, torch.float64: 1e-14}
SECOND_GRADIENT = {torch.float32: 3e-6, torch.float64: 3e-13}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("density", DENSITIES)
def test_forward_is_the_definition(density, combine, dtype):
    case = make(density, combine=combine).to(dtype)
    assert_near(forward(case), wanted(case, *inputs(case)), FORWARD[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "features"])
def test_forward_of_poses(density, soft, dtype):
    case = with_poses(make(density, soft=soft), 2).to(dtype)
    assert_near(forward(case), wanted(case, *inputs(case)), FORWARD[dtype])


def with_poses(case: Case, poses: int) -> Case:
    generator = torch.Generator().manual_seed(1)
    sizes = len(case.ptr) - 1, poses

    def normal(*shape):  # float32 holds them, so that both precisions have the same pose
        return torch.randn(*shape, generator=generator).double()

    rotation = torch.linalg.qr(normal(*sizes, 3, 3))[0].float().double().contiguous()
    return replace(case, center=0.3 * normal(*sizes, 3), rotation=rotation, translation=0.3 * normal(*sizes, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 4, 8, 33, 130, 132])
def test_every_output_type_and_row_length(width, dtype):
    # Rows that are and are not a multiple of four, shorter and longer than a tile; tiles cut short on all axes.
    case = make("gaussian", (3, 5), 2, shape=(3, 9, width), spacing=(0.5, 0.5, 0.5)).to(torch.float32)
    assert torch.equal(forward(case, dtype), forward(case).to(dtype))
    if dtype == torch.float32:
        assert_near(forward(case), wanted(case, *inputs(case)), FORWARD[dtype])


def test_output_that_starts_anywhere():
    case = make("gaussian", shape=(3, 4, 8)).to(torch.float32)
    expected = forward(case).flatten()
    out = poisoned(1 + expected.numel(), dtype=torch.float32)[1:]
    run("forward", ctypes.byref(case.call()), out, DTYPES[torch.float32])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (2, 1, 70), (40, 2, 3), (5, 45, 2)])
def test_odd_grids(shape):
    case = make("molgrid", (4,), 1, shape=shape)
    assert_near(forward(case), wanted(case, *inputs(case)), FORWARD[torch.float64])
    assert_near(sparse(case).to_dense(), forward(case), 0)


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0)])
def test_no_atoms(sizes):
    case = make("wave", sizes)
    assert torch.equal(forward(case), torch.zeros(case.grid_shape, dtype=torch.float64))
    assert sparse(case)._nnz() == 0
    assert backward(case, torch.ones(case.grid_shape).double())[0].numel() == 0


@pytest.mark.parametrize("combine", COMBINE)
def test_more_atoms_than_threads(combine):
    case = make("gaussian", (2, 600, 1), 1, combine=combine, shape=(4, 3, 5))
    assert_near(forward(case), wanted(case, *inputs(case)), FORWARD[torch.float64])
    case = make("gaussian", (2, 300, 1), 1, combine=combine, shape=(4, 3, 5))
    grad = torch.randn(case.grid_shape, generator=torch.Generator().manual_seed(1)).double()
    for actual, expected in zip(backward(case, grad), differentiated(case, grad), strict=True):
        assert_near(actual, expected, GRADIENT[torch.float64])


@pytest.mark.parametrize("soft", [False, True], ids=["index", "features"])
@pytest.mark.parametrize("density", ["gaussian", "sphere", "moleculekit"])
def test_sparse_is_the_dense_grid_without_its_zeros(density, soft):
    case = make(density, soft=soft, shape=(9, 8, 19), cutoff=1e-6)
    grid = sparse(case)
    assert torch.equal(grid.to_dense(), forward(case))
    assert torch.equal(grid.indices(), forward(case).nonzero().T)


def test_channels_that_do_not_exist_are_left_out():
    case = make("gaussian", (4,), 2)
    strange = replace(case, channel=torch.tensor([0, -1, 2, 1]))
    size = case.size.clone()
    size[1:3] = 0
    assert torch.equal(forward(strange), forward(replace(case, channel=torch.tensor([0, 0, 0, 1]), size=size)))
    grads = backward(strange, torch.ones(case.grid_shape).double())
    assert all(torch.equal(g[1:3], torch.zeros_like(g[1:3])) for g in grads)


def test_expanded_entries():
    case = make("molgrid", soft=True)
    one = replace(
        case, size=torch.tensor(1.1).double().expand(case.size.shape), weight=case.weight[:, :1].expand(-1, 3)
    )
    assert torch.equal(forward(one), forward(replace(one, size=one.size.clone(), weight=one.weight.clone())))


def differentiated(case: Case, grad: Tensor, tangents=None):
    """By autograd in float64: gradients of the four inputs, and with tangents also those of <gradients, tangents>."""
    case = case.to(torch.float64)
    positions = case.coords if case.coords.dim() == 3 else case.coords[:, None]
    leaves = [t.detach().requires_grad_() for t in (positions, case.weight, case.size, case.omega)]
    grad = grad.double().requires_grad_()
    out = wanted(case, *leaves)
    first = torch.autograd.grad(out, leaves, grad, create_graph=tangents is not None, materialize_grads=True)
    if tangents is None:
        return list(first)
    along = sum((f * t).sum() for f, t in zip(first, tangents, strict=True))
    return list(torch.autograd.grad(along, [grad, *leaves], materialize_grads=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("density", DENSITIES)
def test_backward_is_the_derivative(density, combine, dtype):
    case = make(density, combine=combine, posed=2, soft=density == "wave").to(dtype)
    grad = torch.randn(case.grid_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for actual, expected in zip(backward(case, grad), differentiated(case, grad), strict=True):
        assert_near(actual, expected, GRADIENT[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("density", DENSITIES)
def test_second_backward_is_the_second_derivative(density, combine, dtype):
    case = make(density, combine=combine, posed=1, soft=density == "molgrid").to(dtype)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(case.grid_shape, generator=generator).to(dtype)
    tangents = [torch.randn(t.shape, generator=generator).to(dtype) for t in inputs(case)]
    expected = differentiated(case, grad, [t.double() for t in tangents])
    assert_near(forward(case, tangents=tangents), expected[0], SECOND_GRADIENT[dtype])
    for actual, wished in zip(backward(case, grad, tangents), expected[1:], strict=True):
        assert_near(actual, wished, SECOND_GRADIENT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_grid_in_every_type(dtype):
    case = make("gaussian").to(torch.float32)
    grad = torch.randn(case.grid_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for actual, expected in zip(backward(case, grad), backward(case, grad.float()), strict=True):
        assert torch.equal(actual, expected)


def test_footprints_wider_than_a_span():
    case = make("gaussian", (3,), 1, shape=(70, 3, 66), spacing=(0.05, 0.5, 0.05))
    grad = torch.randn(case.grid_shape, generator=torch.Generator().manual_seed(1)).double()
    for actual, expected in zip(backward(case, grad), differentiated(case, grad), strict=True):
        assert_near(actual, expected, GRADIENT[torch.float64])


def test_sums_over_molecules_and_back():
    ptr = torch.tensor([0, 3, 3, 80])
    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(0)).double()
    out = poisoned(3, 5, dtype=torch.float64)
    run("segment_sum", x, ptr, 3, 5, out)
    assert_near(out, torch.stack([part.sum(0) for part in x.split([3, 0, 77])]), 1e-14)
    back = poisoned(80, 5, dtype=torch.float64)
    run("segment_expand", out, ptr, 3, 80, 5, back)
    assert torch.equal(back, out.repeat_interleave(ptr.diff(), 0))


# Measured: 2.5e-6 (the derivative in omega of a wave that is not cut off, wrong by as much on either side) and 2.6e-15.
SAME = {torch.float32: 5e-6, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("density", DENSITIES)
def test_same_as_the_cpu_kernels(density, combine, dtype):
    case = make(density, combine=combine, posed=2, soft=density == "gaussian", shape=(9, 14, 12)).to(dtype)
    rule = (case.spacing, DENSITIES.index(density), COMBINE.index(combine), case.cutoff)
    entries = (case.ptr, case.channel, case.weight, case.size, case.omega)
    grad = torch.randn(case.grid_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.ops.fastnuggets.voxelize_backward(grad, case.coords, *entries, *rule, [True] * 4)
    for actual, wished in zip(backward(case, grad), expected, strict=True):
        assert_near(actual, wished, SAME[dtype])
    case = with_poses(replace(case, coords=case.coords[:, 0].contiguous()), 2).to(dtype)
    pose = (case.center, case.rotation, case.translation)
    grid = torch.ops.fastnuggets.voxelize(case.coords, *entries, *pose, case.shape, *rule, dtype)
    assert_near(forward(case), grid, SAME[dtype])
