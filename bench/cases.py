"""What is measured: settings, our own contenders, the groups that are timed together, and the gates they must pass."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench import workload
from bench.workload import Batch
from fastnuggets import reference

# Largest error a result may have and still be timed, relative to the largest value of the float64 reference.
FORWARD_TOLERANCE = 1e-6
WAVE_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 2e-6

CHECKED = 16  # molecules of the batch whose result is compared; float64 at every voxel for all of them takes minutes

GAUSSIAN = {"density": "gaussian"}
WAVE = {"density": "wave", "omega": 0.5}
MOLGRID = {"density": "molgrid"}


@dataclass
class Contender:
    """One row of a table.

    Args:
        name: what is timed.
        run: does it once and returns what it made.
        error: error of what `run` returned against float64, relative to the largest value; None: nothing to check.
        tolerance: of that error.
        against: the row of ours that does the same work.
        scale: `run` does this part of the work; times are divided by it.
        note: printed at the end of the row.
    """

    name: str
    run: Callable[[], Any]
    error: Callable[[Any], float] | None = None
    tolerance: float = FORWARD_TOLERANCE
    against: str | None = None
    scale: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Gate:
    """time(top) / time(bottom) must be at least, or at most, a number for 1 and 2 threads (None: no demand).

    Without `bottom` it is what top does in a second that must be. Of several tops the fastest of those measured counts.
    On a GPU the first number is meant.
    """

    name: str
    top: str | tuple[str, ...]
    bottom: str | None
    must: tuple[float | None, float | None]
    at_most: bool = False


@dataclass
class Group:
    """Contenders timed in turns in one process, a process of its own where `environment` differs from this one's.

    A turn is one call, or as many as fill `turn_ms` milliseconds and their mean: for calls that come many at a time.
    """

    name: str
    title: str
    make: Callable[[], Iterator[Contender | Missing]]
    gates: list[Gate] = field(default_factory=list)
    family: str = "voxelize"
    environment: dict[str, str] = field(default_factory=dict)
    turn_ms: float = 0.0


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be measured here, and why."""

    name: str
    why: str


@dataclass(eq=False)  # the caches below look at which setting it is
class Setting:
    """A batch and the grid it is put on."""

    batch: Batch
    size: int
    spacing: float
    channels: int = len(workload.CHANNELS)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.batch), self.channels, self.size, self.size, self.size)

    def empty(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """An output whose pages have been touched."""
        return torch.zeros(self.shape, dtype=dtype, device=self.batch.coords.device)

    @lru_cache(maxsize=8)  # noqa: B019
    def cotangent(self) -> Tensor:
        """The gradient that arrives at the grid, standard normal."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.shape, generator=generator).to(self.batch.coords.device)

    def options(
        self, molecule: int | None = None, dtype: torch.dtype = torch.float32, **density: Any
    ) -> dict[str, Any]:
        """Keyword arguments of `voxelize` for the batch or for one molecule of it."""
        radius = self.batch.radius.to(dtype)[:, None]
        if molecule is not None:
            radius = radius[self.batch.slices[molecule]]
        return {
            "shape": self.size,
            "spacing": self.spacing,
            "num_channels": self.channels,
            "radius": radius,
            **density,
        }

    def forward_error(self, **density: Any) -> Callable[[Tensor], float]:
        """Largest difference to the float64 reference over its largest value."""

        def error(grid: Tensor) -> float:
            expected = self._expected(**_uncut(density))
            return _relative(grid[: len(expected)], expected)

        return error

    def gradient_error(self, **density: Any) -> Callable[[Tensor], float]:
        """The same for the gradient in the coordinates with `cotangent` coming in."""

        def error(gradient: Tensor) -> float:
            expected = self._expected_gradient(**_uncut(density))
            return _relative(gradient[: len(expected)], expected)

        return error

    @lru_cache(maxsize=4)  # noqa: B019
    def _expected(self, **density: Any) -> Tensor:
        grids = [self._reference(i, self.batch.coords[s].double(), **density) for i, s in self._checked()]
        return torch.cat(grids)

    @lru_cache(maxsize=4)  # noqa: B019
    def _expected_gradient(self, **density: Any) -> Tensor:
        gradients = []
        for i, s in self._checked():
            coords = self.batch.coords[s].double().requires_grad_()
            grid = self._reference(i, coords, **density)
            gradients.append(torch.autograd.grad(grid, coords, self.cotangent()[i : i + 1].double())[0])
        return torch.cat(gradients)

    def _checked(self) -> list[tuple[int, slice]]:
        return list(enumerate(self.batch.slices))[:CHECKED]

    def _reference(self, molecule: int, coords: Tensor, **density: Any) -> Tensor:
        options = self.options(molecule, torch.float64, **density)
        return reference.voxelize(coords, self.batch.channels[self.batch.slices[molecule]], **options)


def _uncut(density: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in density.items() if name != "cutoff"}  # the reference has none


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


# ---- ours


def voxelize(setting: Setting, coords: Tensor | None = None, out: Any = None, **density: Any) -> Tensor:
    from fastnuggets import ops

    batch = setting.batch
    coords = batch.coords if coords is None else coords
    return ops.voxelize(coords, batch.channels, batch.ptr, out=out, **setting.options(**density))


def forward(
    name: str, setting: Setting, out: Tensor, tolerance: float = FORWARD_TOLERANCE, **density: Any
) -> Contender:
    def run() -> Tensor:
        return voxelize(setting, out=out, **density)

    return Contender(name, run, setting.forward_error(**density), tolerance)


def buffered(name: str, setting: Setting, tolerance: float = FORWARD_TOLERANCE, **density: Any) -> Contender:
    """Forward into a `GridBuffer`, which clears what the last call filled: the batch and its mirror image in turns."""
    from fastnuggets import ops

    buffer, mirrored = ops.GridBuffer(), -setting.batch.coords

    def run() -> Tensor:
        voxelize(setting, mirrored, out=buffer, **density)
        return voxelize(setting, out=buffer, **density)

    return Contender(name, run, setting.forward_error(**density), tolerance, scale=2)


def empty_batch(setting: Setting, out: Tensor) -> Contender:
    """What writing the output once costs us, no atom in it."""
    from fastnuggets import ops

    batch, options = setting.batch, setting.options(**MOLGRID)
    options["radius"] = 1.0
    ptr = torch.zeros_like(batch.ptr)

    def run() -> Tensor:
        return ops.voxelize(batch.coords[:0], batch.channels[:0], ptr, out=out, **options)

    return Contender("ours, no atoms (streaming floor)", run, lambda grid: grid.abs().max().item(), 0.0)


def backward(name: str, setting: Setting, **density: Any) -> Contender:
    """The gradient in the coordinates alone, through autograd, of a forward done once."""
    coords = setting.batch.coords.clone().requires_grad_()
    grid = voxelize(setting, coords, **density)
    cotangent = setting.cotangent()

    def run() -> Tensor:
        return torch.autograd.grad(grid, coords, cotangent, retain_graph=True)[0]

    return Contender(name, run, setting.gradient_error(**density), GRADIENT_TOLERANCE)


def forward_backward(name: str, setting: Setting, out: Any = None, **density: Any) -> Contender:
    """Forward and backward through the public op, into `out` (a tensor or a `GridBuffer`) or a fresh grid."""
    coords = setting.batch.coords.clone().requires_grad_()
    cotangent = setting.cotangent()

    def run() -> Tensor:
        grid = voxelize(setting, coords, out=out, **density)
        return torch.autograd.grad(grid, coords, cotangent)[0]

    return Contender(name, run, setting.gradient_error(**density), GRADIENT_TOLERANCE)


def memset(out: Tensor) -> Contender:
    """libc's memset on the CPU, a part of the buffer for each thread; a fill on the GPU."""
    if out.is_cuda:
        return Contender("memset", out.zero_)

    size = out.numel() * out.element_size()
    pool = ThreadPoolExecutor(8)

    def run() -> Tensor:
        threads = torch.get_num_threads()
        if threads == 1:
            ctypes.memset(out.data_ptr(), 0, size)
        else:
            part = math.ceil(size / threads)
            list(pool.map(lambda at: ctypes.memset(out.data_ptr() + at, 0, min(part, size - at)), range(0, size, part)))
        return out

    return Contender("memset", run)


# ---- the inverse

NOISE = {0.1: 0.025, 0.2: 0.045, 0.4: 0.09}  # of an atom's peak, per voxel; the rms error allowed for it, angstrom


def find(setting: Setting, noise: float) -> Contender:
    """Atoms from noisy wave grids; timed per molecule."""
    from fastnuggets import ops

    kernel = {"sigma": 1.0, "omega": 0.5}
    batch = setting.batch
    grid = ops.voxelize(
        batch.coords,
        batch.channels,
        batch.ptr,
        shape=setting.size,
        spacing=setting.spacing,
        num_channels=setting.channels,
        density="wave",
        **kernel,
    )
    generator = torch.Generator().manual_seed(0)
    grid += noise * torch.randn(grid.shape, generator=generator).to(grid.device)

    contender = Contender(
        f"find_atoms, {noise:.0%} noise, a molecule",
        lambda: ops.find_atoms(grid, spacing=setting.spacing, noise=noise, **kernel),
        tolerance=NOISE[noise],
        scale=len(batch),
    )

    def error(atoms: ops.Atoms) -> float:
        lost, rms = _compare(batch, atoms)
        invented = len(atoms.positions) - (len(batch.coords) - lost)
        contender.note = f"error: rms, angstrom; of {len(batch.coords)} atoms {lost} lost, {invented} invented"
        return math.inf if lost or invented else rms

    contender.error = error
    return contender


def _compare(batch: Batch, atoms: Any) -> tuple[int, float]:
    """How many atoms have no found atom of their channel within half an angstrom, and the rms distance of the rest."""
    nearest = []
    for i, s in enumerate(batch.slices):
        found = slice(int(atoms.ptr[i]), int(atoms.ptr[i + 1]))
        apart = torch.cdist(batch.coords[s], atoms.positions[found].to(batch.coords))
        other = batch.channels[s][:, None] != atoms.channels[found]
        nearest.append(apart.masked_fill(other, math.inf).amin(1))
    distance = torch.cat(nearest)
    near = distance < 0.5
    return int((~near).sum()), (distance[near] ** 2).mean().sqrt().item()


# ---- groups

# "ours X" writes to a GridBuffer; "all written" to a plain tensor, whose every voxel is written. Where a gate is about
# libmolgrid, which also clears its whole output, both are held against it.
CPU_FORWARD_GATES = [
    Gate("molgrid forward, against libmolgrid", "libmolgrid", "ours molgrid", (5, 8)),
    Gate("molgrid forward, all written, against libmolgrid", "libmolgrid", "ours molgrid, all written", (5, 8)),
    Gate(
        "exact Gaussian, all written, against separable GEMM",
        "torch separable GEMM",
        "ours gaussian, all written",
        (3, 6),
    ),
    Gate("wave, in Gaussians", "ours wave", "ours gaussian", (3, 3), at_most=True),
    Gate("molgrid forward, all written, in memsets", "ours molgrid, all written", "memset", (None, 0.6), at_most=True),
    Gate(
        "with hydrogens, all written, in heavy-atom forwards",
        "ours molgrid, +H, all written",
        "ours molgrid, all written",
        (1.4, 1.4),
        at_most=True,
    ),
]
GPU_FORWARD_GATES = [
    Gate("molgrid forward, in fills of the output", "ours molgrid, all written", "memset", (1.5, None), at_most=True),
    Gate("exact Gaussian, in fills of the output", "ours gaussian, all written", "memset", (1.5, None), at_most=True),
]


def groups(device: str, quick: bool) -> list[Group]:
    """All groups, in the order of the report; `quick` takes 8 molecules."""
    from bench import peers
    from fastnuggets.ops import GridBuffer

    heavy = workload.load()
    every = workload.load(hydrogens=True)
    if quick:
        heavy, every = heavy.first(8), every.first(8)
    heavy, every = heavy.to(device), every.to(device)
    fine = Setting(heavy, 48, 0.5)
    fine_hydrogens = Setting(every, 48, 0.5)
    coarse = Setting(heavy, 24, 1.0)
    cpu = device == "cpu"

    def forward_fine() -> Iterator[Contender | Missing]:
        out = fine.empty()
        yield memset(out)
        yield empty_batch(fine, out)
        yield buffered("ours molgrid", fine, **MOLGRID)
        yield buffered("ours gaussian", fine, **GAUSSIAN)
        yield buffered("ours wave", fine, WAVE_TOLERANCE, **WAVE)
        yield buffered("ours molgrid, +H", fine_hydrogens, **MOLGRID)
        yield forward("ours molgrid, all written", fine, out, **MOLGRID)
        yield forward("ours gaussian, all written", fine, out, **GAUSSIAN)
        yield forward("ours wave, all written", fine, out, WAVE_TOLERANCE, **WAVE)
        yield forward("ours nearest, all written", fine, out, density="nearest")
        yield forward("ours sphere, all written", fine, out, density="sphere")
        yield forward("ours molvoxel, all written", fine, out, density="molvoxel")
        yield forward("ours moleculekit, all written", fine, out, density="moleculekit")
        yield forward("ours molgrid, +H, all written", fine_hydrogens, out, **MOLGRID)
        if cpu:
            yield peers.libmolgrid_forward(fine, out, "ours molgrid")
            yield peers.libmolgrid_forward(fine_hydrogens, out, "ours molgrid, +H", " +H")
            yield peers.molvoxel(fine, out, "ours molvoxel, all written")
            yield peers.moleculekit(fine, "ours moleculekit, all written")
            yield peers.particlegrid()
        yield peers.torch_separable(fine, out, "ours gaussian")
        yield peers.torch_windows(fine, out, "ours molgrid")
        yield peers.torch_naive(fine, "ours gaussian")

    def forward_coarse() -> Iterator[Contender | Missing]:
        out = coarse.empty()
        yield memset(out)
        yield empty_batch(coarse, out)
        yield buffered("ours molgrid", coarse, **MOLGRID)
        yield buffered("ours gaussian", coarse, **GAUSSIAN)
        yield forward("ours molgrid, all written", coarse, out, **MOLGRID)
        yield forward("ours gaussian, all written", coarse, out, **GAUSSIAN)
        yield forward("ours wave, all written", coarse, out, WAVE_TOLERANCE, **WAVE)
        yield forward("ours molvoxel, all written", coarse, out, density="molvoxel")
        if cpu:
            yield peers.libmolgrid_forward(coarse, out, "ours molgrid")
            yield peers.molvoxel(coarse, out, "ours molvoxel, all written")
        yield peers.torch_separable(coarse, out, "ours gaussian")

    def gradient() -> Iterator[Contender | Missing]:
        yield backward("ours molgrid backward", fine, **MOLGRID)
        yield backward("ours gaussian backward", fine, **GAUSSIAN)
        yield backward("ours wave backward", fine, **WAVE)
        yield forward_backward("ours molgrid forward + backward", fine, GridBuffer(), **MOLGRID)
        yield forward_backward("ours gaussian forward + backward", fine, GridBuffer(), **GAUSSIAN)
        yield forward_backward("ours molgrid forward + backward, all written", fine, fine.empty(), **MOLGRID)
        yield forward_backward("ours gaussian forward + backward, fresh grid", fine, **GAUSSIAN)
        if cpu:
            yield peers.libmolgrid_backward(fine, "ours molgrid backward")
            yield peers.libmolgrid_layer(fine, "ours molgrid forward + backward")
        yield peers.torch_separable_gradient(fine, "ours gaussian forward + backward")

    def cutoffs() -> Iterator[Contender | Missing]:
        out = fine.empty()
        for density in (GAUSSIAN, WAVE):
            for cutoff in (1e-4, 1e-6, 1e-8):
                options = {**density, "cutoff": cutoff}
                name = f"ours {density['density']}, cutoff {cutoff:.0e}"
                yield replace(forward(name, fine, out, **options), tolerance=math.inf)
                yield replace(backward(f"{name}, backward", fine, **options), tolerance=math.inf)

    def refinement() -> Iterator[Contender | Missing]:
        yield from peers.voxmol(every.first(8), cpu)

    def storage() -> Iterator[Contender | Missing]:
        out = fine.empty()
        yield forward("ours gaussian, float32 output", fine, out, **GAUSSIAN)
        for dtype in (torch.float16, torch.bfloat16):
            yield rounded(fine, dtype)
        yield Contender(
            "ours gaussian, float32, fresh output",
            lambda: voxelize(fine, **GAUSSIAN),
            fine.forward_error(**GAUSSIAN),
            against="ours gaussian, float32 output",
        )
        yield Contender("torch.zeros of that size", fine.empty)

    def inverse() -> Iterator[Contender | Missing]:
        some = Setting(heavy.first(min(16, len(heavy))), 48, 0.5)
        for noise in NOISE:
            yield find(some, noise)

    return [
        Group(
            "forward",
            "Forward, 64 molecules, 8 channels, 48^3 at 0.5 A",
            forward_fine,
            CPU_FORWARD_GATES if cpu else GPU_FORWARD_GATES,
        ),
        Group(
            "coarse",
            "Forward, 64 molecules, 8 channels, 24^3 at 1 A",
            forward_coarse,
            [
                Gate("24^3 molgrid forward, against libmolgrid", "libmolgrid", "ours molgrid", (4, 7)),
                Gate("24^3, all written, against libmolgrid", "libmolgrid", "ours molgrid, all written", (4, 7)),
            ],
        ),
        Group(
            "gradient",
            "Gradient in the coordinates, 48^3 at 0.5 A",
            gradient,
            [
                Gate(
                    "backward, against libmolgrid's raw one", "libmolgrid backward", "ours molgrid backward", (10, 25)
                ),
                Gate(
                    "forward + backward, against Coords2Grid",
                    "libmolgrid Coords2Grid forward + backward",
                    "ours molgrid forward + backward",
                    (20, 30),
                ),
                Gate(
                    "forward + backward, all written, against Coords2Grid",
                    "libmolgrid Coords2Grid forward + backward",
                    "ours molgrid forward + backward, all written",
                    (20, 30),
                ),
            ],
        ),
        Group("cutoff", "What the cut-off costs and saves, 48^3 at 0.5 A", cutoffs),
        Group(
            "refinement",
            "VoxMol's use of PyUUL: 5 channels, 64^3 at 0.25 A, radius 0.5 A, union",
            refinement,
            [
                Gate("8 molecules forward, against PyUUL", "PyUUL, 8 molecules", "ours pyuul, 8 molecules", (300, 300)),
                Gate("one refinement step, against PyUUL", "PyUUL, step", "ours pyuul, step", (200, 200)),
            ],
        ),
        Group("storage", "Output type and allocation, 48^3 at 0.5 A", storage),
        Group(
            "inverse",
            "Atoms from wave grids (sigma 1 A, omega 0.5 / A), 8 channels, 48^3 at 0.5 A",
            inverse,
            [Gate("find_atoms, molecules a second", "find_atoms, 10% noise, a molecule", None, (None, 50))],
        ),
    ]


def rounded(setting: Setting, dtype: torch.dtype) -> Contender:
    """A half-precision output, which must be the rounded float32 result to the bit."""
    out = setting.empty(dtype)
    contender = forward(f"ours gaussian, {str(dtype).removeprefix('torch.')} output", setting, out, 0.0, **GAUSSIAN)
    contender.error = lambda grid: (grid != voxelize(setting, **GAUSSIAN).to(dtype)).sum().item()
    contender.against = "ours gaussian, float32 output"
    return contender
