"""A 3-D autoencoder of molecule grids, after Xception (Chollet, CVPR 2017, doi:10.1109/CVPR.2017.195)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 4  # voxels to a latent cell, along each axis


class WaveAutoencoder(nn.Module):
    """Grid -> spatial latent -> grid, fully convolutional: one network serves every shape of whole latent cells.

    The latent keeps a vector of `latent` numbers for each cell of 4 x 4 x 4 voxels, so it is 64 `channels` / `latent`
    times smaller than the grid. The output layer is linear, as wave grids have a sign. Input and output are grids in
    their own units; in between they are divided by `scale`.

    Args:
        channels: C of the grids.
        width: features of a cell inside the network.
        latent: numbers a cell is squeezed to.
        blocks: residual blocks on each side of the latent.
        scale: [C] float, > 0; the standard deviation of each channel over the data set. Kept with the weights.

    Deterministic. Differentiable in the grid and the weights. In training mode a batch's statistics are used, so it
    needs more than one cell.
    """

    scale: Tensor

    def __init__(
        self,
        channels: int,
        *,
        width: int = 128,
        latent: int = 32,
        blocks: int = 2,
        scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("scale", check_scale(scale, channels))
        self.stem = nn.Conv3d(channels, width, STRIDE + 2, stride=STRIDE, padding=1)
        self.encoder = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)), nn.Conv3d(width, latent, 1))
        self.decoder = nn.Sequential(nn.Conv3d(latent, width, 1), *(ResidualBlock(width) for _ in range(blocks)))
        self.head = nn.Conv3d(width, channels * STRIDE**3, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, C, D, H, W] -> the same shape."""
        return self.decode(self.encode(grid))

    def encode(self, grid: Tensor) -> Tensor:
        """[B, C, D, H, W] -> [B, latent, D/4, H/4, W/4]. ValueError unless D, H and W are multiples of 4."""
        check_grid(grid, len(self.scale))
        latent: Tensor = self.encoder(self.stem(scaled(grid, self.scale)))
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """[B, latent, d, h, w] -> [B, C, 4d, 4h, 4w]."""
        cells = self.head(self.decoder(latent.to(memory_format=torch.channels_last_3d)))
        batch, _, *shape = cells.shape
        voxels = cells.view(batch, len(self.scale), STRIDE, STRIDE, STRIDE, *shape).permute(0, 1, 5, 2, 6, 3, 7, 4)
        grid: Tensor = voxels.reshape(batch, len(self.scale), *(STRIDE * n for n in shape)) * _per_channel(self.scale)
        return grid


def channel_loss(output: Tensor, grid: Tensor, scale: Tensor) -> Tensor:
    """Mean squared error of each channel over its variance `scale**2`, averaged over channels. Scalar.

    Without the division carbon decides everything: halogens fill a twentieth of its voxels.
    """
    return ((output - grid) / _per_channel(scale)).square().mean()


class ResidualBlock(nn.Module):
    """x + two separable convolutions, each after normalisation and SiLU; begins as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm3d(width), nn.BatchNorm3d(width)
        self.conv1, self.conv2 = SeparableConv3d(width), SeparableConv3d(width)
        for parameter in self.conv2.pointwise.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return x + y


class SeparableConv3d(nn.Module):
    """A depthwise 3 x 3 x 3 convolution, then a pointwise one. Shapes stay.

    The depthwise part is itself separated, a 3 x 3 plane and a line of 3: both run as 2-D convolutions, which the CPU
    has fast depthwise kernels for. 96 channels, 8^3 cells, batch 16, forward and backward on two cores: 12 ms as
    Conv3d(groups=96), 2 ms so.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.plane = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.line = nn.Conv2d(width, width, (3, 1), padding=(1, 0), groups=width, bias=False)
        self.pointwise = nn.Conv3d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, d, h, w = x.shape
        y = self.plane(x.transpose(1, 2).reshape(batch * d, channels, h, w))
        y = y.view(batch, d, channels, h, w).transpose(1, 2).reshape(batch, channels, d, h * w)
        y = self.line(y).view(batch, channels, d, h, w)
        result: Tensor = self.pointwise(y)
        return result


def check_scale(scale: Sequence[float] | None, channels: int) -> Tensor:
    """[C] float32, ones for None; ValueError unless there is a number above 0 for each channel."""
    values = torch.ones(channels) if scale is None else torch.as_tensor(scale, dtype=torch.float32)
    if values.shape != (channels,) or not (values > 0).all():
        raise ValueError(f"scale: expected {channels} numbers above 0, got {values.tolist()}")
    return values


def check_grid(grid: Tensor, channels: int) -> None:
    """ValueError unless the grid is [B, C, D, H, W] of whole cells."""
    if grid.dim() != 5 or grid.shape[1] != channels or any(n % STRIDE or n == 0 for n in grid.shape[2:]):
        raise ValueError(f"grid: expected [B, {channels}, D, H, W] of multiples of {STRIDE}, got {list(grid.shape)}")


def scaled(grid: Tensor, scale: Tensor) -> Tensor:
    """The grid over `scale`, with the channels last: convolutions on the CPU are then several times faster."""
    return (grid / _per_channel(scale)).to(memory_format=torch.channels_last_3d)


def _per_channel(scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1, 1)
