"""Filters by their definitions: sums of shifted images, pyramids as matrices, a blend of two Laplacian pyramids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

BINOMIAL = (1, 4, 6, 4, 1)


def filter_taps(
    image: Tensor,
    taps: Sequence[tuple[int, int, int]],
    divisor: int = 1,
    border: str = "reflect",
    value: float = 0.0,
) -> Tensor:
    """sum of weight * image[..., y + dy, x + dx] over (dy, dx, weight), over `divisor`; image [..., H, W].

    border: "reflect" without repeating the edge, "replicate", or "constant" of `value`. Bytes to nearest, ties to even.
    """
    h, w = image.shape[-2:]
    numbers = image if image.is_floating_point() else image.double()
    total = torch.zeros_like(numbers)
    for dy, dx, weight in taps:
        y, x = torch.arange(h) + dy, torch.arange(w) + dx
        outside = ((y < 0) | (y >= h))[:, None] | ((x < 0) | (x >= w))
        moved = numbers[..., _found(y, h, border), :][..., _found(x, w, border)]
        if border == "constant":
            moved = moved.masked_fill(outside.to(image.device), value)
        total = total + weight * moved
    total = total / divisor
    return total if image.is_floating_point() else total.round().clamp(0, 255).to(image.dtype)


def _found(i: Tensor, n: int, border: str) -> Tensor:
    if border != "reflect" or n == 1:
        return i.clamp(0, n - 1)
    i = i.abs() % (2 * (n - 1))
    return torch.where(i < n, i, 2 * (n - 1) - i)


def pyr_down(image: Tensor) -> Tensor:
    """[..., H, W] -> [..., (H + 1) // 2, (W + 1) // 2]."""
    h, w = image.shape[-2:]
    return _down_matrix(h).to(image) @ image @ _down_matrix(w).to(image).T


def pyr_up(image: Tensor, size: Sequence[int]) -> Tensor:
    """[..., h, w] -> [..., *size]."""
    h, w = image.shape[-2:]
    return _up_matrix(h, size[0]).to(image) @ image @ _up_matrix(w, size[1]).to(image).T


@lru_cache
def _down_matrix(n: int) -> Tensor:
    matrix = torch.zeros((n + 1) // 2, n, dtype=torch.float64)
    for j in range(len(matrix)):
        for k, weight in enumerate(BINOMIAL):
            matrix[j, _reflected(2 * j + k - 2, n)] += weight / 16
    return matrix


@lru_cache
def _up_matrix(n: int, size: int) -> Tensor:
    """Zeros between the samples, the filter, twice: of 2 n samples reflected as OpenCV does it, of which n - 1 is the
    last."""
    matrix = torch.zeros(size, n, dtype=torch.float64)
    for x in range(size):
        for k, weight in enumerate(BINOMIAL):
            e = x + k - 2
            if e % 2 == 0:
                matrix[x, _reflected(e, 2 * n) // 2] += weight / 8
    return matrix


def _reflected(i: int, n: int) -> int:
    return int(_found(torch.tensor(i), n, "reflect"))


def multiband_blend(background: Tensor, foreground: Tensor, mask: Tensor, levels: int) -> Tensor:
    """Images [B, C, H, W] and mask [B, H, W], floating, 0..1: each band of the Laplacian pyramids under the Gaussian
    pyramid's level of the mask."""
    under, over = _laplacian(background, levels), _laplacian(foreground, levels)
    gaussian = [mask[:, None]]
    for _ in range(levels):
        gaussian.append(pyr_down(gaussian[-1]))
    out = None
    for m, b, f in reversed(list(zip(gaussian, under, over, strict=True))):
        band = m * f + (1 - m) * b
        out = band if out is None else band + pyr_up(out, band.shape[-2:])
    assert out is not None
    return out


def _laplacian(image: Tensor, levels: int) -> list[Tensor]:
    bands = []
    for _ in range(levels):
        coarse = pyr_down(image)
        bands.append(image - pyr_up(coarse, image.shape[-2:]))
        image = coarse
    return [*bands, image]


def transposed(linear: Callable[[Tensor], Tensor], grad: Tensor, size: Sequence[int]) -> Tensor:
    """The transpose of a linear function of a tensor of `size`, applied to `grad`; differentiable in it."""
    with torch.enable_grad():
        nowhere = grad.new_zeros(tuple(size), requires_grad=True)
        return torch.autograd.grad(linear(nowhere), nowhere, grad, create_graph=grad.requires_grad)[0]
