"""Fingerprint bits from molecule grids, after Xception (Chollet, CVPR 2017, doi:10.1109/CVPR.2017.195)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnuggets.models.wave_autoencoder import STRIDE, ResidualBlock, check_grid, check_scale, scaled


class FingerprintPredictor(nn.Module):
    """Grid -> one logit a bit, fully convolutional: one network serves every shape of whole cells.

    Residual blocks of separable convolutions on cells of 4 x 4 x 4 voxels, then the mean and the largest value of each
    feature over the cells: a key may ask how many there are, or whether there is one.

    Args:
        channels: C of the grids.
        bits: logits; the MACCS keys are 166.
        width: features of a cell inside the network.
        blocks: residual blocks.
        scale: [C] float, > 0; the standard deviation of each channel over the data set. Kept with the weights.

    Deterministic. Differentiable in the grid and the weights. In training mode a batch's statistics are used, so it
    needs more than one cell.
    """

    scale: Tensor

    def __init__(
        self,
        channels: int,
        bits: int = 166,
        *,
        width: int = 96,
        blocks: int = 3,
        scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if bits < 1:
            raise ValueError(f"bits: expected at least 1, got {bits}")
        self.register_buffer("scale", check_scale(scale, channels))
        self.stem = nn.Conv3d(channels, width, STRIDE + 2, stride=STRIDE, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.norm = nn.BatchNorm3d(width)
        self.head = nn.Linear(2 * width, bits)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, C, D, H, W] -> [B, bits] float. ValueError unless D, H and W are multiples of 4."""
        check_grid(grid, len(self.scale))
        cells = F.silu(self.norm(self.blocks(self.stem(scaled(grid, self.scale)))))
        logits: Tensor = self.head(torch.cat([cells.mean((2, 3, 4)), cells.amax((2, 3, 4))], 1))
        return logits
