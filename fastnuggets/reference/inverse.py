"""Fitting atoms to grids by its definition: every atom at every voxel, a dense Jacobian, one grid after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_MOVE = 0.25  # angstrom
CONVERGED = 1e-4  # angstrom, and of the amplitude
FIRST_DAMPING = 1e-3
RIDGE = 1e-9


def fit_atoms(
    grid: Tensor,
    positions: Tensor,
    amplitudes: Tensor,
    ptr: Tensor,
    sigma: Tensor,
    omega: Tensor,
    spacing: Sequence[float],
    cutoff: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Levenberg-Marquardt on sum over voxels of (grid - sum of A k(|v - p|))^2, for each grid on its own.

    k(r) = exp(-r^2 / 2 sigma^2) cos(2 pi omega r) where the exponential is at least `cutoff`, else 0. A step solves
    (J^T J + damping diag J^T J) s = J^T r; an atom moves by at most 0.25 angstrom. A step that lowers the sum is kept
    and divides the damping by 10, another multiplies it by 10. The first one below 1e-4 is kept and ends the fit.

    Args:
        grid: [G, D, H, W].
        positions: [M, 3] where the atoms start, angstrom; the box centre is the origin.
        amplitudes: [M].
        ptr: [G + 1], ascending from 0 to M: which atoms are in which grid.
        sigma, omega: [G], angstrom and oscillations per angstrom.
        spacing: angstrom, one an axis.
        cutoff: where the kernel ends.
        iterations: most steps to try.

    Returns:
        Positions [M, 3] and amplitudes [M] where the fit ended.
    """
    axes = [(torch.arange(n).to(grid) - (n - 1) / 2) * h for n, h in zip(grid.shape[1:], spacing, strict=True)]
    voxels = torch.cartesian_prod(*axes)  # [V, 3]
    fitted = [torch.cat([positions[:0], amplitudes[:0, None]], 1)]
    for g, (first, last) in enumerate(zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)):
        start = torch.cat([positions[first:last], amplitudes[first:last, None]], 1)
        fitted.append(_fit(grid[g].flatten(), voxels, start, sigma[g], omega[g], cutoff, iterations))
    atoms = torch.cat(fitted)
    return atoms[:, :3].contiguous(), atoms[:, 3].contiguous()


def _fit(
    grid: Tensor, voxels: Tensor, atoms: Tensor, sigma: Tensor, omega: Tensor, cutoff: float, iterations: int
) -> Tensor:
    if len(atoms) == 0:
        return atoms
    damping = FIRST_DAMPING
    residual, jacobian = _linearise(grid, voxels, atoms, sigma, omega, cutoff)
    for _ in range(iterations):
        normal = jacobian.T @ jacobian
        damped = normal + torch.diag(damping * normal.diagonal() + RIDGE)
        step = torch.linalg.solve(damped, jacobian.T @ residual).view(-1, 4)
        length = step[:, :3].norm(dim=1, keepdim=True)
        converged = bool((length < CONVERGED).all() and (step[:, 3].abs() < CONVERGED).all())
        trial = atoms + step * torch.cat(
            [(LARGEST_MOVE / length).clamp(max=1).expand(-1, 3), torch.ones_like(length)], 1
        )
        if converged:
            return trial
        next_residual, next_jacobian = _linearise(grid, voxels, trial, sigma, omega, cutoff)
        if next_residual.square().sum() < residual.square().sum():
            atoms, residual, jacobian = trial, next_residual, next_jacobian
            damping *= 0.1
        else:
            damping *= 10
    return atoms


def _linearise(
    grid: Tensor, voxels: Tensor, atoms: Tensor, sigma: Tensor, omega: Tensor, cutoff: float
) -> tuple[Tensor, Tensor]:
    """What the atoms [n, 4] leave of the grid [V], and the derivatives of what they add to it, [V, 4 n]."""
    delta = atoms[:, :3] - voxels[:, None]  # [V, n, 3]
    square = delta.square().sum(-1)
    inside = square <= -2 * math.log(cutoff) * sigma**2
    gauss = torch.where(inside, torch.exp(-square / (2 * sigma**2)), 0)
    phase = 2 * math.pi * omega * square.sqrt()
    value = gauss * torch.cos(phase)  # [V, n]
    # sin(phase) / phase, 1 at an atom's centre
    slope = -value / sigma**2 - gauss * (2 * math.pi * omega) ** 2 * torch.sinc(phase / math.pi)
    jacobian = torch.cat([(atoms[:, 3] * slope)[..., None] * delta, value[..., None]], 2)
    return grid - value @ atoms[:, 3], jacobian.flatten(1)
