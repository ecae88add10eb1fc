"""The inverse of the wave transform as a layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnuggets import ops


class Deconvolution(torch.nn.Module):
    """`fastnuggets.ops.deconvolve` with its kernel fixed: [B, C, D, H, W] -> the same, each atom a narrow peak.

    Args:
        sigma: angstrom, > 0; one number or one a channel.
        omega: oscillations per angstrom, >= 0; one number or one a channel.
        spacing: angstrom, one number or one an axis.
        noise, padding: as in `fastnuggets.ops.deconvolve`.

    Warns:
        UserWarning: at construction, once for each kernel and reason that `fastnuggets.ops.kernel_warnings` gives.
    """

    def __init__(
        self,
        sigma: float | Sequence[float],
        omega: float | Sequence[float] = 0.0,
        spacing: float | Sequence[float] = 0.5,
        noise: float | Sequence[float] | None = None,
        padding: float | None = None,
    ) -> None:
        super().__init__()
        self.sigma, self.omega, self.spacing, self.noise, self.padding = sigma, omega, spacing, noise, padding
        sigmas, omegas = torch.broadcast_tensors(torch.as_tensor(sigma), torch.as_tensor(omega))
        for pair in dict.fromkeys(zip(sigmas.flatten().tolist(), omegas.flatten().tolist(), strict=True)):
            for message in ops.kernel_warnings(*pair, spacing):
                warnings.warn(message, stacklevel=2)

    def forward(self, grid: Tensor) -> Tensor:
        return ops.deconvolve(
            grid, sigma=self.sigma, omega=self.omega, spacing=self.spacing, noise=self.noise, padding=self.padding
        )

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, omega={self.omega}, spacing={self.spacing}, noise={self.noise}"
