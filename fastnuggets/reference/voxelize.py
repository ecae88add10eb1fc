"""Voxelization by its definition: every atom at every voxel, nothing cut off, gradients by autograd.

Memory is atoms of one molecule and channel times voxels: for tests and for reading, not for training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

PYUUL_REACH = 5  # voxels to each side of the atom's own
PYUUL_WIDTH = 0.93  # of the radius
MOLECULEKIT_CUTOFF = 5.0  # angstrom


@dataclass(frozen=True)
class _Atoms:
    """n atoms of one channel over a grid of [D, H, W] voxels of one pose."""

    position: Tensor  # [n, 3] angstrom, the box centre at the origin
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]  # angstrom
    radius: Tensor  # [n, 1, 1, 1] angstrom, > 0
    sigma: Tensor  # [n, 1, 1, 1] angstrom, > 0
    omega: Tensor  # [n, 1, 1, 1] 1/angstrom

    def offset(self, axis: int) -> Tensor:
        """Voxel centre minus atom along one axis, [n, D, 1, 1], [n, 1, H, 1] or [n, 1, 1, W]."""
        n = self.shape[axis]
        index = torch.arange(n, dtype=self.position.dtype, device=self.position.device)
        centers = (index - (n - 1) / 2) * self.spacing[axis]
        return _along(axis, centers - self.position[:, axis, None])

    def steps(self, axis: int) -> Tensor:
        """Voxel index minus index of the cell that holds the atom, same shapes."""
        n = self.shape[axis]
        cell = torch.floor(self.position[:, axis, None] / self.spacing[axis] + (n - 1) / 2 + 0.5)
        return _along(axis, torch.arange(n, dtype=cell.dtype, device=cell.device) - cell)

    @property
    def squared_distance(self) -> Tensor:  # [n, D, H, W]
        x, y, z = (self.offset(axis) for axis in range(3))
        return x * x + y * y + z * z


def _along(axis: int, values: Tensor) -> Tensor:  # [n, m] -> [n, 1, 1, 1] with m in the place of `axis`
    sizes = [values.shape[0], 1, 1, 1]
    sizes[axis + 1] = values.shape[1]
    return values.reshape(sizes)


def _indicator(inside: Tensor, atoms: _Atoms) -> Tensor:
    # A step has derivative zero where it has one; the product says so to autograd.
    return inside + 0 * atoms.squared_distance


def _nearest(atoms: _Atoms) -> Tensor:
    x, y, z = (atoms.steps(axis) == 0 for axis in range(3))
    return _indicator(x & y & z, atoms)


def _trilinear(atoms: _Atoms) -> Tensor:
    x, y, z = (torch.relu(1 - atoms.offset(axis).abs() / atoms.spacing[axis]) for axis in range(3))
    return x * y * z


def _sphere(atoms: _Atoms) -> Tensor:
    return _indicator(atoms.squared_distance <= atoms.radius**2, atoms)


def _gaussian(atoms: _Atoms) -> Tensor:
    return torch.exp(-atoms.squared_distance / (2 * atoms.sigma**2))


def _wave(atoms: _Atoms) -> Tensor:
    return _gaussian(atoms) * _cos_of_root((2 * math.pi * atoms.omega) ** 2 * atoms.squared_distance)


def _cos_of_root(y: Tensor) -> Tensor:
    """cos(sqrt(y)), y >= 0, smooth at 0: autograd must not meet the square root there."""
    small = y < 0.01
    series = sum((-torch.where(small, y, 0.0)) ** n / math.factorial(2 * n) for n in range(7))
    return torch.where(small, series, torch.cos(torch.sqrt(torch.where(small, 1.0, y))))


def _molgrid(atoms: _Atoms) -> Tensor:
    u2 = atoms.squared_distance / atoms.radius**2
    u = torch.sqrt(torch.where(u2 > 1, u2, 1.0))
    tail = 4 * math.exp(-2) * torch.where(u < 1.5, u - 1.5, 0.0) ** 2
    return torch.where(u2 > 1, tail, torch.exp(-2 * u2))


def _gaussian_to_radius(atoms: _Atoms) -> Tensor:
    u2 = atoms.squared_distance / atoms.radius**2
    return torch.where(u2 <= 1, torch.exp(-2 * u2), 0.0)


def _pyuul(atoms: _Atoms) -> Tensor:
    x, y, z = (atoms.steps(axis).abs() <= PYUUL_REACH for axis in range(3))
    value = torch.exp(-atoms.squared_distance / (PYUUL_WIDTH * atoms.radius) ** 2)
    return torch.where(x & y & z, value, 0.0)


def _moleculekit(atoms: _Atoms) -> Tensor:
    d2 = atoms.squared_distance
    # Within half a radius the value is 1 to the last bit; the division must not see d = 0.
    ratio = atoms.radius**2 / torch.maximum(d2, atoms.radius**2 / 4)
    return torch.where(d2 < MOLECULEKIT_CUTOFF**2, -torch.expm1(-(ratio**6)), 0.0)


DENSITIES: dict[str, Callable[[_Atoms], Tensor]] = {
    "nearest": _nearest,
    "trilinear": _trilinear,
    "sphere": _sphere,
    "gaussian": _gaussian,
    "wave": _wave,
    "molgrid": _molgrid,
    "molvoxel": _gaussian_to_radius,
    "deepfrag": _gaussian_to_radius,
    "pyuul": _pyuul,
    "moleculekit": _moleculekit,
}
DEFAULT_COMBINE = {"pyuul": "union", "moleculekit": "max"}


def _sum(values: Tensor) -> Tensor:  # [n, D, H, W] -> [D, H, W], as the two below
    return values.sum(0)


def _max(values: Tensor) -> Tensor:
    # The row of zeros comes first and the first of equals gets the gradient: nothing flows where nothing is positive.
    return torch.cat([values.new_zeros(1, *values.shape[1:]), values]).max(0).values


def _union(values: Tensor) -> Tensor:
    return 1 - torch.prod(1 - values, 0)


COMBINE: dict[str, Callable[[Tensor], Tensor]] = {"sum": _sum, "max": _max, "union": _union}


def voxelize(
    coords: Tensor,
    channels: Tensor,
    ptr: Tensor | None = None,
    *,
    shape: int | Sequence[int],
    spacing: float | Sequence[float] = 0.5,
    num_channels: int | None = None,
    density: str = "gaussian",
    radius: Tensor | float | None = None,
    sigma: Tensor | float | None = None,
    omega: Tensor | float | None = None,
    weights: Tensor | None = None,
    center: Tensor | None = None,
    rotation: Tensor | None = None,
    translation: Tensor | None = None,
    combine: str | None = None,
    cutoff: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What `fastnuggets.ops.voxelize` computes; arguments and result as there, arithmetic in the dtype of `coords`.

    `cutoff` is accepted and not used: a Gaussian or a wave is never truncated here. Nothing is checked.
    """
    rule = COMBINE[combine or DEFAULT_COMBINE.get(density, "sum")]
    cells = _cells(
        coords,
        channels,
        ptr,
        shape=shape,
        spacing=spacing,
        num_channels=num_channels,
        density=density,
        radius=radius,
        sigma=sigma,
        omega=omega,
        weights=weights,
        center=center,
        rotation=rotation,
        translation=translation,
    )
    grids = [rule(values) for *_, values in cells]
    molecules = 1 if ptr is None else len(ptr) - 1
    poses = _pose_count(center, rotation, translation)
    width = channels.shape[1] if channels.dim() == 2 else num_channels or 0
    size = (molecules, *poses, width, *_triple(shape))
    grid = torch.stack(grids).reshape(size) if grids else coords.new_zeros(size)
    return grid.to(dtype or coords.dtype)


def atom_relevance(
    relevance: Tensor, coords: Tensor, channels: Tensor, ptr: Tensor | None = None, **options: Any
) -> Tensor:
    """Shares the relevance of each voxel among the atoms of its channel in proportion to |weight * density| there.

    For a density that is nowhere negative this is layer-wise relevance propagation through a sum. What lies on voxels
    that no atom reaches is lost; all else is conserved.

    Args:
        relevance: [B, C, D, H, W], or [B, K, C, D, H, W] with K poses.
        options: the keyword arguments of `voxelize` but `combine`, `cutoff` and `dtype`.

    Returns:
        [N], summed over channels and poses.
    """
    poses = _pose_count(*(options.get(name) for name in ("center", "rotation", "translation")))
    posed = relevance if poses else relevance[:, None]
    shares = coords.new_zeros(len(coords))
    for b, k, c, rows, values in _cells(coords, channels, ptr, **options):
        total = values.abs().sum(0)
        share = torch.where(total == 0, 0.0, values.abs() / torch.where(total == 0, 1.0, total))
        shares = shares.index_add(0, rows, (share * posed[b, k, c]).sum((1, 2, 3)))
    return shares


def _cells(
    coords: Tensor,
    channels: Tensor,
    ptr: Tensor | None = None,
    *,
    shape: int | Sequence[int],
    spacing: float | Sequence[float] = 0.5,
    num_channels: int | None = None,
    density: str = "gaussian",
    radius: Tensor | float | None = None,
    sigma: Tensor | float | None = None,
    omega: Tensor | float | None = None,
    weights: Tensor | None = None,
    center: Tensor | None = None,
    rotation: Tensor | None = None,
    translation: Tensor | None = None,
) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
    """For each molecule b, pose k and channel c: which atoms are in it, [n], and weight * density, [n, D, H, W]."""
    if channels.dim() == 1:
        member = torch.nn.functional.one_hot(channels, num_channels or 0).bool()  # [N, C]
        feature = member.to(coords.dtype)
    else:
        member, feature = torch.ones_like(channels, dtype=torch.bool), channels
    if weights is not None:
        feature = feature * weights[:, None]

    def spread(size: Tensor | float) -> Tensor:
        return torch.as_tensor(size, dtype=coords.dtype, device=coords.device).expand(feature.shape)

    radius = spread(1.0 if radius is None else radius)
    sigma = radius / 2 if sigma is None else spread(sigma)
    omega = spread(0.0 if omega is None else omega)
    if density not in ("nearest", "trilinear"):
        member = member & ((sigma if density in ("gaussian", "wave") else radius) > 0)

    ends = [0, len(coords)] if ptr is None else ptr.tolist()
    for b, (start, stop) in enumerate(itertools.pairwise(ends)):
        for k, position in enumerate(_poses(coords[start:stop], b, center, rotation, translation)):
            for c in range(feature.shape[1]):
                inside = member[start:stop, c].nonzero().squeeze(1)
                rows = inside + start
                sizes = (size[rows, c].reshape(-1, 1, 1, 1) for size in (radius, sigma, omega))
                atoms = _Atoms(position[inside], _triple(shape), _triple(spacing), *sizes)
                yield b, k, c, rows, feature[rows, c].reshape(-1, 1, 1, 1) * DENSITIES[density](atoms)


def _poses(
    coords: Tensor, molecule: int, center: Tensor | None, rotation: Tensor | None, translation: Tensor | None
) -> list[Tensor]:
    """R (x - center) + translation for each pose of one molecule."""

    def of(value: Tensor, rank: int, pose: int) -> Tensor:
        value = value if value.dim() == rank else value[molecule]
        return value if value.dim() == rank else value[pose]

    poses = []
    for k in range(math.prod(_pose_count(center, rotation, translation))):
        position = coords if center is None else coords - of(center, 1, k)
        position = position if rotation is None else position @ of(rotation, 2, k).T
        poses.append(position if translation is None else position + of(translation, 1, k))
    return poses


def _pose_count(center: Tensor | None, rotation: Tensor | None, translation: Tensor | None) -> tuple[int, ...]:
    """(K,) where one of them is given for K poses, else ()."""
    for value, rank in ((center, 1), (rotation, 2), (translation, 1)):
        if value is not None and value.dim() == rank + 2:
            return (value.shape[1],)
    return ()


def _triple(value: T | Sequence[T]) -> tuple[T, T, T]:
    first, second, third = value if isinstance(value, Sequence) else (value,) * 3
    return first, second, third
