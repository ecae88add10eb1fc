"""The same work done by the packages a user would otherwise take, and by plain PyTorch.

Every function returns a `Contender`, or `Missing` where the package is not installed. Peers are called the fastest way
their public interface has, with conversions of the input done beforehand.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.cases import GAUSSIAN, GRADIENT_TOLERANCE, MOLGRID, Contender, Missing, Setting, forward, voxelize
from bench.workload import CHANNELS, Batch
from fastnuggets import reference

F = TypeVar("F", bound=Callable[..., "Contender | Missing"])


def needs(package: str) -> Callable[[F], F]:
    """Makes a contender missing where its package cannot be imported."""

    def decorate(function: F) -> F:
        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Contender | Missing:
            try:
                # libmolgrid's wheel complains at length about numpy 2 and then works with torch tensors.
                with contextlib.redirect_stderr(io.StringIO()):
                    __import__(package)
            except ImportError as error:
                return Missing(function.__name__.replace("_", " "), str(error).splitlines()[0])
            return function(*args, **kwargs)

        return guarded  # type: ignore[return-value]

    return decorate


# ---- libmolgrid


def _molgrid_views(setting: Setting, grid: Tensor) -> tuple[Any, Any, list[tuple[Any, ...]]]:
    import molgrid
    from molgrid.torch_bindings import tensor_as_grid

    molgrid.set_gpu_enabled(0)
    batch = setting.batch
    maker = molgrid.GridMaker(resolution=setting.spacing, dimension=setting.spacing * (setting.size - 1))
    types, radius = batch.channels.float(), batch.radius
    views = [
        tuple(tensor_as_grid(t) for t in (batch.coords[s], types[s], radius[s], grid[i]))
        for i, s in enumerate(batch.slices)
    ]
    # The views hold bare pointers: the tensors must live as long as the maker.
    maker.kept = (types, radius, grid)
    return maker, molgrid.float3(0, 0, 0), views


@needs("molgrid")
def libmolgrid_forward(setting: Setting, out: Tensor, against: str, suffix: str = "") -> Contender:
    maker, center, views = _molgrid_views(setting, out)

    def run() -> Tensor:
        for view in views:
            maker.forward(center, *view)
        return out

    return Contender("libmolgrid" + suffix, run, setting.forward_error(**MOLGRID), against=against)


@needs("molgrid")
def libmolgrid_backward(setting: Setting, against: str) -> Contender:
    from molgrid.torch_bindings import tensor_as_grid

    maker, center, views = _molgrid_views(setting, setting.cotangent())
    gradient = torch.zeros_like(setting.batch.coords)
    outputs = [tensor_as_grid(gradient[s]) for s in setting.batch.slices]

    def run() -> Tensor:
        for view, output in zip(views, outputs, strict=True):
            maker.backward(center, *view, output)
        return gradient

    return Contender("libmolgrid backward", run, setting.gradient_error(**MOLGRID), 2e-6, against)


@needs("molgrid")
def libmolgrid_layer(setting: Setting, against: str) -> Contender:
    """`Coords2Grid`: padded coordinates, a vector of types for each atom."""
    from molgrid.torch_bindings import Coords2Grid

    maker, _, _ = _molgrid_views(setting, setting.cotangent())
    layer = Coords2Grid(maker, (0.0, 0.0, 0.0))
    batch = setting.batch
    types = torch.nn.functional.one_hot(batch.channels, setting.channels).float()
    coords, types, radius = (_pad(batch, t) for t in (batch.coords, types, batch.radius))
    coords.requires_grad_()
    kept = _pad(batch, torch.ones(len(batch.coords), dtype=torch.bool))

    def run() -> Tensor:
        return torch.autograd.grad(layer(coords, types, radius), coords, setting.cotangent())[0]

    check = setting.gradient_error(**MOLGRID)
    name = "libmolgrid Coords2Grid forward + backward"
    return Contender(name, run, lambda gradient: check(gradient[kept]), GRADIENT_TOLERANCE, against)


def _pad(batch: Batch, values: Tensor, fill: float = 0) -> Tensor:  # [N, ...] -> [B, most atoms, ...]
    return torch.nn.utils.rnn.pad_sequence([values[s] for s in batch.slices], batch_first=True, padding_value=fill)


# ---- molvoxel, moleculekit, ParticleGrid


@needs("molvoxel")
@needs("numba")
def molvoxel(setting: Setting, out: Tensor, against: str) -> Contender:
    """The numba backend."""
    from molvoxel import create_voxelizer

    voxelizer = create_voxelizer(setting.spacing, setting.size, "atom-wise", "gaussian", "numba")
    batch = setting.batch
    coords, types, radius = batch.coords.double().numpy(), batch.channels.short().numpy(), batch.radius.numpy()
    grids = out.numpy()

    def run() -> Tensor:
        for i, s in enumerate(batch.slices):
            voxelizer.forward_types(coords[s], None, types[s], radius[s], out_grid=grids[i])
        return out

    error = setting.forward_error(density="molvoxel")
    note = "its block filter drops atoms at block edges"
    return Contender("molvoxel, numba", run, error, against=against, note=note)


@needs("moleculekit.occupancy_utils")
def moleculekit(setting: Setting, against: str) -> Contender:
    """Its compiled kernel, which works in float64 with the channels last."""
    from moleculekit.occupancy_utils import calculate_occupancy

    batch, size = setting.batch, setting.size
    axis = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * setting.spacing
    centers = torch.cartesian_prod(axis, axis, axis).numpy()
    coords = batch.coords.numpy()
    sizes = torch.zeros(len(coords), setting.channels, dtype=torch.float64)
    sizes = sizes.scatter_(1, batch.channels[:, None], batch.radius.double()[:, None]).numpy()
    out = setting.empty(torch.float64).flatten(2).transpose(1, 2).contiguous()
    grids = out.numpy()

    def run() -> Tensor:
        out.zero_()
        for i, s in enumerate(batch.slices):
            calculate_occupancy(centers, coords[s], sizes[s], grids[i])
        return out.transpose(1, 2).reshape(setting.shape)

    return Contender("moleculekit", run, setting.forward_error(density="moleculekit"), against=against)


def particlegrid() -> Missing:
    return Missing("ParticleGrid", "not on the package index")


# ---- PyUUL, as VoxMol calls it


# Of PyUUL's float32 results against its own formula; measured 2.4e-6 and 2.2e-5, it multiplies through log and exp.
PYUUL_TOLERANCE = 5e-6
PYUUL_GRADIENT_TOLERANCE = 5e-5
VOXMOL_CHANNELS = ("C", "H", "O", "N", "F")
VOXMOL_CORNER = 15.0  # angstrom
VOXMOL: dict[str, Any] = {"density": "pyuul", "radius": 0.5}
MOVED = 0.05  # angstrom along each axis: where a refinement step finds the atoms


def voxmol(batch: Batch, cpu: bool) -> Iterator[Contender | Missing]:
    """Forward of 8 molecules, and one step of fitting the coordinates of one molecule to a grid."""
    names = VOXMOL_CHANNELS
    channel = torch.tensor([names.index(c) if c in names else -1 for c in CHANNELS], device=batch.coords.device)
    channel = channel[batch.channels]
    keep = channel >= 0
    molecule = torch.repeat_interleave(batch.ptr.diff())[keep]
    ptr = torch.cat([batch.ptr[:1], torch.bincount(molecule).cumsum(0)])
    setting = Setting(Batch(batch.coords[keep], channel[keep], ptr), 64, 0.25, len(names))
    single = Setting(setting.batch.first(1), 64, 0.25, len(names))
    atoms = single.batch

    def exactly(coords: Tensor) -> Tensor:
        return reference.voxelize(coords, atoms.channels, **single.options(0, torch.float64, **VOXMOL))

    step = _step(lambda coords: voxelize(single, coords, **VOXMOL), atoms.coords)
    error = _same_as(_step(exactly, atoms.coords.double()))
    yield forward("ours pyuul, 8 molecules", setting, setting.empty(), **VOXMOL)
    # Measured 4e-6: the step takes the difference of two float32 grids.
    yield Contender("ours pyuul, step", step, error, 1e-5)
    if cpu:
        yield pyuul(setting, "ours pyuul, 8 molecules")
        yield pyuul_step(single, "ours pyuul, step")


def _step(voxelized: Callable[[Tensor], Tensor], coords: Tensor) -> Callable[[], Tensor]:
    """The gradient of the squared difference to the grid of `coords` at atoms that have moved."""
    target = voxelized(coords).detach()
    moved = (coords + MOVED).requires_grad_()

    def run() -> Tensor:
        loss = torch.nn.functional.mse_loss(voxelized(moved), target)
        return torch.autograd.grad(loss, moved)[0]

    return run


def _same_as(exact: Callable[[], Tensor]) -> Callable[[Tensor], float]:
    def error(got: Tensor) -> float:
        expected = exact()
        return ((got - expected).abs().max() / expected.abs().max()).item()

    return error


@needs("pyuul")
def pyuul(setting: Setting, against: str) -> Contender:
    batch = setting.batch
    grid = _pyuul_grid(setting)

    def formula() -> Tensor:
        return torch.cat([_pyuul_formula(batch.coords[s].double(), batch.channels[s], setting) for s in batch.slices])

    name = f"PyUUL, {len(batch)} molecules"
    padded = _pad(batch, batch.coords, 999.0)
    return Contender(name, lambda: grid(padded), _same_as(formula), PYUUL_TOLERANCE, against)


@needs("pyuul")
def pyuul_step(setting: Setting, against: str) -> Contender:
    coords, channels = setting.batch.coords, setting.batch.channels
    grid = _pyuul_grid(setting)
    exact = _step(lambda coords: _pyuul_formula(coords, channels, setting), coords.double())
    run = _step(lambda coords: grid(coords[None]), coords)
    return Contender("PyUUL, step", run, _same_as(exact), PYUUL_GRADIENT_TOLERANCE, against)


def _pyuul_grid(setting: Setting) -> Callable[[Tensor], Tensor]:
    """As VoxMol: two atoms at corners make the box's size independent of the molecule, then the centre is cut out."""
    from pyuul import VolumeMaker

    warnings.filterwarnings("ignore", module="pyuul")
    batch, maker = setting.batch, VolumeMaker.Voxels(sparse=False)
    corners = torch.tensor([[-VOXMOL_CORNER] * 3, [VOXMOL_CORNER] * 3]).expand(len(batch), 2, 3)
    channels = torch.cat([_pad(batch, batch.channels.float(), 999.0), torch.zeros(len(batch), 2)], 1)
    radius = torch.full(channels.shape, VOXMOL["radius"])

    def grid(coords: Tensor) -> Tensor:  # [B, most atoms, 3]
        coords = torch.cat([coords, corners], 1)
        volume = maker(coords, radius, channels, setting.channels, setting.spacing, function="gaussian")
        first = volume.shape[-1] // 2 - setting.size // 2
        box = slice(first, first + setting.size)
        return volume[:, :, box, box, box]

    return grid


def _pyuul_formula(coords: Tensor, channels: Tensor, setting: Setting) -> Tensor:
    """What PyUUL computes for one molecule, with its offsets, which are not ours: see csrc/voxelize/README.md."""
    reach, spacing = 5, setting.spacing
    corner = VOXMOL_CORNER / spacing
    first = (round(2 * corner) + 2 * reach + 2) // 2 - setting.size // 2
    scaled = coords / spacing + (corner + reach)  # [n, 3] voxels
    cell = (coords.float() / spacing + (corner + reach)).trunc()  # in float32 as there: an atom may be on a border
    index = torch.arange(first, first + setting.size)
    inside = (index - cell[:, :, None] - 1).abs() <= reach  # [n, 3, m]
    squares = (index + 0.5 * spacing - scaled[:, :, None]) ** 2
    x, y, z = torch.where(inside, torch.exp(-squares / (0.93 * VOXMOL["radius"] / spacing) ** 2), 0.0).unbind(1)
    empty = 1 - x[:, :, None, None] * y[:, None, :, None] * z[:, None, None, :]
    return torch.stack([1 - torch.prod(empty[channels == c], 0) for c in range(setting.channels)])[None]


# ---- plain PyTorch


NOTHING = 1e-12  # of an atom's peak, along one axis


def _axes(setting: Setting, coords: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Gaussian of every atom along each axis, [N, n] each: their product is the density."""
    size, device = setting.size, coords.device
    centers = (torch.arange(size, device=device) - (size - 1) / 2) * setting.spacing
    squares = (centers - coords[:, :, None]) ** 2  # [N, 3, n]
    values = torch.exp(-2 / setting.batch.radius[:, None, None] ** 2 * squares)
    # Subnormal numbers would make the products several times slower on some processors, and are no part of the result.
    x, y, z = torch.nn.functional.threshold(values, NOTHING, 0.0).unbind(1)
    return x, y, z


def _separable(setting: Setting, coords: Tensor, out: Tensor) -> None:
    x, y, z = _axes(setting, coords)
    yz = (y[:, :, None] * z[:, None, :]).flatten(1)  # [N, n n]
    for (i, c), rows in _rows(setting).items():
        torch.mm(x[rows].T, yz[rows], out=out[i, c].flatten(1))


def _rows(setting: Setting) -> dict[tuple[int, int], Tensor]:
    """The atoms of each molecule and channel; grouping is input, not work."""
    if not hasattr(setting, "rows"):
        batch = setting.batch
        setting.rows = {  # type: ignore[attr-defined]
            (i, c): (batch.channels[s] == c).nonzero().squeeze(1) + s.start
            for i, s in enumerate(batch.slices)
            for c in range(setting.channels)
        }
    return setting.rows  # type: ignore[attr-defined,no-any-return]


def torch_separable(setting: Setting, out: Tensor, against: str) -> Contender:
    """One matrix product for each molecule and channel: the honest baseline."""

    def run() -> Tensor:
        _separable(setting, setting.batch.coords, out)
        return out

    return Contender("torch separable GEMM", run, setting.forward_error(**GAUSSIAN), against=against)


def torch_separable_gradient(setting: Setting, against: str) -> Contender:
    coords = setting.batch.coords.clone().requires_grad_()

    def run() -> Tensor:
        x, y, z = _axes(setting, coords)
        yz = (y[:, :, None] * z[:, None, :]).flatten(1)
        grids = [x[rows].T @ yz[rows] for rows in _rows(setting).values()]
        return torch.autograd.grad(torch.stack(grids).view(setting.shape), coords, setting.cotangent())[0]

    check = setting.gradient_error(**GAUSSIAN)
    return Contender("torch separable GEMM forward + backward", run, check, GRADIENT_TOLERANCE, against)


def torch_windows(setting: Setting, out: Tensor, against: str) -> Contender:
    """libmolgrid's density in a cube around each atom, added up with index_add."""
    batch, size, spacing = setting.batch, setting.size, setting.spacing
    reach = math.ceil(1.5 * batch.radius.max().item() / spacing)
    molecule = torch.repeat_interleave(batch.ptr.diff())
    start = (molecule * setting.channels + batch.channels)[:, None, None, None] * size**3
    steps = torch.arange(-reach, reach + 1, device=out.device)

    def run() -> Tensor:
        position = batch.coords / spacing + (size - 1) / 2  # [N, 3] voxels
        index = position.round().long()[:, :, None] + steps  # [N, 3, m]
        inside = (index >= 0) & (index < size)
        squares = ((index - position[:, :, None]) * spacing) ** 2 / batch.radius[:, None, None] ** 2
        index = index.clamp(0, size - 1)
        u2 = squares[:, 0, :, None, None] + squares[:, 1, None, :, None] + squares[:, 2, None, None, :]
        tail = 4 * math.exp(-2) * (u2.sqrt() - 1.5).clamp(max=0) ** 2
        value = torch.where(u2 <= 1, torch.exp(-2 * u2), tail)
        value = value * (inside[:, 0, :, None, None] & inside[:, 1, None, :, None] & inside[:, 2, None, None, :])
        flat = (index[:, 0, :, None, None] * size + index[:, 1, None, :, None]) * size + index[:, 2, None, None, :]
        return out.zero_().view(-1).index_add_(0, (start + flat).flatten(), value.flatten()).view(setting.shape)

    return Contender("torch windows + index_add", run, setting.forward_error(**MOLGRID), against=against)


def torch_naive(setting: Setting, against: str, molecules: int = 2) -> Contender:
    """Every atom at every voxel, on the first molecules only."""
    part = Setting(setting.batch.first(molecules), setting.size, setting.spacing, setting.channels)
    radius = part.batch.radius[:, None]

    def run() -> Tensor:
        batch = part.batch
        options = part.options(density="gaussian", radius=radius)
        return reference.voxelize(batch.coords, batch.channels, batch.ptr, **options)

    scale = molecules / len(setting.batch)
    note = f"{molecules} molecules, scaled"
    return Contender(
        "torch naive broadcast", run, part.forward_error(**GAUSSIAN), against=against, scale=scale, note=note
    )
