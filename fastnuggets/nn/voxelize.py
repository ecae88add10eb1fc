"""Molecules as grids, as a layer: fixed settings, random poses while training, a buffer that is used again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnuggets import ops
from fastnuggets.ops.voxelize import one_molecule


class Voxelizer(torch.nn.Module):
    """`fastnuggets.ops.voxelize` with its settings fixed: coords, channels, ptr -> [B, C, D, H, W].

    Args:
        shape, num_channels, spacing, density, radius, sigma, omega, combine, cutoff, dtype: as in
            `fastnuggets.ops.voxelize`. Tensors among radius, sigma and omega become buffers, or stay parameters.
        center: "mean" puts the mean of each molecule's atoms at the box centre; None leaves coordinates as they are.
        random_rotation: while training, turn each molecule about its centre, uniformly over all rotations.
        random_shift: while training, move each by up to so many angstrom along each axis, uniformly.
        generator: where poses are drawn from; default torch's global CPU generator. The same seed gives the same
            poses on any device.
        reuse_buffer: write every grid to the same `fastnuggets.ops.GridBuffer`: several times faster, and a grid
            is then valid until the next call; autograd raises if a backward needs one that was overwritten.

    Raises:
        ValueError, TypeError: as `fastnuggets.ops.voxelize`; of settings at construction.

    Differentiable and deterministic as the op, given the poses. Poses drawn on the CPU are copied to the device, which
    synchronises: for a CUDA graph, draw them with a CUDA generator or pass them to the op.
    """

    radius: float | Tensor | None
    sigma: float | Tensor | None
    omega: float | Tensor | None

    def __init__(
        self,
        shape: int | Sequence[int],
        num_channels: int,
        spacing: float | Sequence[float] = 0.5,
        density: str = "gaussian",
        *,
        radius: float | Tensor | None = None,
        sigma: float | Tensor | None = None,
        omega: float | Tensor | None = None,
        center: str | None = "mean",
        random_rotation: bool = False,
        random_shift: float = 0.0,
        generator: torch.Generator | None = None,
        reuse_buffer: bool = False,
        combine: str | None = None,
        cutoff: float = 1e-6,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if center not in ("mean", None):
            raise ValueError(f'center must be "mean" or None, got {center!r}')
        if not (random_shift >= 0 and math.isfinite(random_shift)):
            raise ValueError(f"random_shift must be a length, at least 0 angstrom, got {random_shift}")
        self.shape = (shape,) * 3 if isinstance(shape, int) else tuple(shape)
        self.num_channels = num_channels
        self.settings: dict[str, Any] = {
            "spacing": spacing,
            "density": density,
            "combine": combine,
            "cutoff": cutoff,
            "dtype": dtype,
        }
        for name, value in (("radius", radius), ("sigma", sigma), ("omega", omega)):
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.center, self.random_rotation, self.random_shift = center, random_rotation, random_shift
        self.generator = generator
        self._buffer = ops.GridBuffer() if reuse_buffer else None
        self._check()

    def _check(self) -> None:
        # An empty batch goes through every check of the op and costs nothing.
        coords, channels, ptr = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        given = {name: getattr(self, name) for name in ("radius", "sigma", "omega")}
        sizes: dict[str, Any] = {name: None if value is None else 1.0 for name, value in given.items()}
        ops.voxelize(coords, channels, ptr, shape=self.shape, num_channels=self.num_channels, **sizes, **self.settings)

    def forward(self, coords: Tensor, channels: Tensor, ptr: Tensor | None = None) -> Tensor:
        ptr = one_molecule(coords) if ptr is None else ptr
        batch = ptr.size(0) - 1
        return ops.voxelize(
            coords,
            channels,
            ptr,
            shape=self.shape,
            num_channels=self.num_channels,
            radius=self.radius,
            sigma=self.sigma,
            omega=self.omega,
            center=self._means(coords, ptr) if self.center == "mean" else None,
            out=self._buffer,
            **self._poses(batch, coords),
            **self.settings,
        )

    def _means(self, coords: Tensor, ptr: Tensor) -> Tensor:
        atoms = ptr.diff().clamp(min=1).unsqueeze(1)
        return torch.ops.fastnuggets.segment_sum(coords, ptr) / atoms

    def _poses(self, batch: int, coords: Tensor) -> dict[str, Any]:
        poses: dict[str, Any] = {}
        if not self.training:
            return poses
        source = self.generator
        # torch.compile knows no generator, not even None.
        draw: dict[str, Any] = {"device": "cpu"} if source is None else {"device": source.device, "generator": source}
        if self.random_rotation:
            poses["rotation"] = rotations(torch.randn(batch, 4, **draw)).to(coords)
        if self.random_shift:
            poses["translation"] = ((torch.rand(batch, 3, **draw) * 2 - 1) * self.random_shift).to(coords)
        return poses

    def extra_repr(self) -> str:
        return f"shape={self.shape}, num_channels={self.num_channels}, " + ", ".join(
            f"{k}={v!r}" for k, v in self.settings.items() if v is not None
        )


def rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4], which need not have length 1.

    Standard normal quaternions give rotations that are uniform over SO(3).
    """
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
