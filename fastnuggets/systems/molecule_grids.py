"""Molecules as grids, for the systems that learn from them: read, split, turned, drawn, and found again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnuggets.models.wave_autoencoder import STRIDE
from fastnuggets.molecules.batch import Molecules, atomic_numbers
from fastnuggets.molecules.boxes import boxed
from fastnuggets.molecules.files import cache_folder
from fastnuggets.molecules.matching import sorted_atoms, voxel_atoms
from fastnuggets.nn.voxelize import Voxelizer, rotations
from fastnuggets.ops.inverse import Atoms, find_atoms
from fastnuggets.systems.base import Settings, option

PAPER = (
    "Kuzminykh et al., 3D Molecular Representations Based on the Wave Transform for Convolutional Neural Networks,"
    " Molecular Pharmaceutics 15 (10), 2018"
)
TAKES = "molecules: .smi .csv .sdf .parquet, also .gz; conformers are made, or those of `fastnuggets conformers` taken"
DENSITIES = ("wave", "gaussian", "nearest")
MARGIN = 1.0  # angstrom between the farthest atom, however the molecule is turned, and the wall
SCALED = 512  # molecules that the channels' scale is measured on
# A rare element would decide the loss if it were divided by its whole variance.
SCALE_POWER = 0.85
CLIP = 1.0  # largest norm of all gradients together
WARM = 30  # steps until the learning rate is reached
_USUAL = {"wave": (1.0, 0.5), "gaussian": (0.5, 0.0)}  # sigma in angstrom, omega in waves per angstrom


@dataclasses.dataclass(frozen=True)
class GridSettings(Settings):
    """What every system that learns from grids is told."""

    epochs: int = option(20, "passes over the training set")
    batch_size: int = option(16, "molecules in a step, of all processes together")
    learning_rate: float = option(3e-3, "of AdamW")
    density: str = option("wave", "what an atom is drawn as; nearest: one voxel, a one-hot grid", DENSITIES)
    sigma: float = option(0.0, "angstrom, the width of an atom; 0: 1 of a wave, 0.5 of a Gaussian")
    omega: float = option(0.5, "waves per angstrom, of a wave")
    spacing: float = option(0.5, "angstrom between voxels")
    shape: int = option(48, "voxels along an edge; larger molecules are left out")
    elements: str = option("C,N,O,S,F,Cl,Br", "one channel each; those joined by + share one")
    shift: float = option(0.5, "angstrom that a molecule is moved by along each axis while training, at most")
    width: int = option(128, "features of a cell inside the network")
    blocks: int = option(2, "residual blocks")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density not in DENSITIES:
            raise ValueError(f"density must be one of {', '.join(DENSITIES)}, got {self.density!r}")
        if self.shape < 2 * STRIDE or self.shape % STRIDE:
            raise ValueError(f"shape: expected a multiple of {STRIDE}, at least {2 * STRIDE}, got {self.shape}")
        if not self.shape * self.spacing / 2 > MARGIN:
            raise ValueError(f"spacing: no molecule fits into {self.shape} voxels of {self.spacing} angstrom")
        for name in ("width", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        groups(self.elements)

    @property
    def kernel(self) -> tuple[float, float] | None:
        """sigma and omega; None of a one-hot grid."""
        if self.density == "nearest":
            return None
        usual, _ = _USUAL[self.density]
        return self.sigma or usual, self.omega if self.density == "wave" else 0.0


def groups(elements: str) -> list[list[str]]:
    """The elements of each channel: "C,N,F+Cl" gives C, N, and F with Cl. ValueError for what is no element."""
    found = [[symbol.strip() for symbol in part.split("+")] for part in elements.split(",")]
    atomic_numbers([symbol for group in found for symbol in group])
    return found


class GridData(NamedTuple):
    """Molecules of a file that fit the box, split at random."""

    train: Molecules
    test: Molecules


def read_molecules(path: Path, settings: GridSettings, *, seed: int, progress: bool = False) -> Molecules:
    """Those of a file that fit the box, centred; ValueError if there are none."""
    elements = [symbol for group in groups(settings.elements) for symbol in group]
    largest = settings.shape * settings.spacing / 2 - MARGIN
    return boxed(path, elements, largest, seed=seed, cache=cache_folder(), progress=progress).molecules


def apart(count: int, tested: float, seed: int, path: Path) -> tuple[Tensor, Tensor]:
    """Rows to learn from and rows held out, at random. ValueError if there is not one on each side."""
    if count < 2:
        raise ValueError(f"{path}: one molecule is left; some are needed to learn from and some to test on")
    held_out = min(max(1, round(tested * count)), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held_out:], order[:held_out]


def split(molecules: Molecules, tested: float, seed: int, path: Path) -> GridData:
    return GridData(*(molecules[rows] for rows in apart(len(molecules), tested, seed, path)))


class Drawing:
    """How molecules become grids, and atoms come back out of them."""

    def __init__(self, settings: GridSettings, shape: int | None = None) -> None:
        self.settings = settings
        self.groups = groups(settings.elements)
        self.names = ["+".join(group) for group in self.groups]
        self.elements = [symbol for group in self.groups for symbol in group]
        self._channel = torch.tensor([i for i, group in enumerate(self.groups) for _ in group])
        sigma, omega = settings.kernel or (None, None)
        self.voxelizer = Voxelizer(
            shape or settings.shape,
            len(self.groups),
            settings.spacing,
            settings.density,
            sigma=sigma,
            omega=omega if settings.density == "wave" else None,
            center=None,  # they come centred
            random_rotation=True,
            random_shift=settings.shift,
        )

    def channels(self, molecules: Molecules) -> Tensor:
        """Channel of each atom, [N] int64."""
        return self._channel.to(molecules.coords.device)[molecules.channels(self.elements)]

    def posed(self, molecules: Molecules, generator: torch.Generator) -> Tensor:
        """Grids [B, C, D, H, W] of molecules turned any way and moved a little."""
        self.voxelizer.generator = generator
        return self._draw(molecules)

    def still(self, molecules: Molecules) -> Tensor:
        """Grids [B, C, D, H, W] of molecules as they stand."""
        self.voxelizer.eval()
        try:
            return self._draw(molecules)
        finally:
            self.voxelizer.train()

    def _draw(self, molecules: Molecules) -> Tensor:
        grid: Tensor = self.voxelizer(molecules.coords, self.channels(molecules), molecules.ptr)
        return grid

    def scale(self, molecules: Molecules, seed: int) -> list[float]:
        """[C], about the standard deviation of each channel."""
        sample = molecules[:SCALED]
        generator = torch.Generator().manual_seed(seed)
        square, mean = torch.zeros(len(self.groups)), torch.zeros(len(self.groups))
        for batch in sample.batches(64):
            grid = self.posed(batch, generator)
            square += grid.square().mean((0, 2, 3, 4)) * len(batch) / len(sample)
            mean += grid.mean((0, 2, 3, 4)) * len(batch) / len(sample)
        spread = (square - mean.square()).clamp(min=0).sqrt()
        # A channel that no molecule of the sample has would divide by zero.
        return [float(value) for value in spread.clamp(min=0.1 * spread.max().item()) ** SCALE_POWER]

    def truth(self, molecules: Molecules) -> Atoms:
        """The atoms as they stand, sorted as `find_atoms` sorts them."""
        owner = torch.arange(len(molecules)).repeat_interleave(molecules.ptr.diff())
        return sorted_atoms(molecules.coords, self.channels(molecules), owner, len(molecules))

    def find(self, grid: Tensor, error: Tensor, caution: float = 1.0) -> Atoms:
        """The atoms that grids show, on the CPU.

        Args:
            error: [C] what each channel is wrong by where there are atoms, of an atom's peak: the noise that
                `find_atoms` is told of waves and Gaussians.
            caution: multiplies that noise, or of a one-hot grid the half that a voxel must exceed.
        """
        spacing = self.settings.spacing
        if self.settings.kernel is None:
            return _on_cpu(voxel_atoms(grid, spacing, 0.5 * caution))
        sigma, omega = self.settings.kernel
        noise = caution * error
        while True:
            try:
                return _on_cpu(find_atoms(grid, sigma=sigma, omega=omega, spacing=spacing, noise=noise[None]))
            except ValueError as refused:
                # Of a network that has learned little, some grids are much noisier than the mean.
                if "noise is too low" not in str(refused) or not float(noise.max()) < 8:
                    raise
                noise = 2 * noise.clamp(min=0.01)


def _on_cpu(atoms: Atoms) -> Atoms:
    return Atoms(*(values.cpu() for values in atoms))


def turned(molecules: Molecules, seed: int, shift: float) -> Molecules:
    """The same molecules, each turned any way and moved by up to `shift` angstrom along each axis."""
    generator = torch.Generator().manual_seed(seed)
    turns = rotations(torch.randn(len(molecules), 4, generator=generator))
    moves = shift * (2 * torch.rand(len(molecules), 3, generator=generator) - 1)
    owner = torch.arange(len(molecules)).repeat_interleave(molecules.ptr.diff())
    coords = (turns[owner] @ molecules.coords[:, :, None]).squeeze(2) + moves[owner]
    return Molecules(coords, molecules.numbers, molecules.ptr, molecules.names, molecules.smiles)


def joined(parts: list[Atoms]) -> Atoms:
    """The atoms of several batches as those of one."""
    shifts = [0]
    for part in parts:
        shifts.append(shifts[-1] + len(part.positions))
    ptr = torch.cat([parts[0].ptr[:1], *(part.ptr[1:] + n for part, n in zip(parts, shifts, strict=False))])
    positions, channels, amplitudes = (torch.cat([part[i] for part in parts]) for i in range(3))
    return Atoms(positions, channels, amplitudes, ptr, torch.cat([part.residual for part in parts]))


def optimizer(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)


def warm_cosine(step: int, steps: int) -> float:
    """Up in WARM steps, then down along half a cosine."""
    return min(1.0, (step + 1) / WARM) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def facts_of(path: Path, data: Any, drawing: Drawing, seed: int) -> dict[str, Any]:
    """What is saved with the weights."""
    return {
        "data": str(path.resolve()),
        "seed": seed,
        "channels": drawing.names,
        "scale": drawing.scale(data.train, seed),
        "learned": len(data.train),
        "held_out": len(data.test),
    }


def batches(molecules: Molecules, size: int = 16) -> Iterator[Molecules]:
    """What is drawn at a time where nothing is learned."""
    return molecules.batches(size)
