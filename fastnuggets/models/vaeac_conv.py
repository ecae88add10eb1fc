"""VAEAC for images: what is hidden of one, given the rest (Ivanov et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.models.vaeac import Conditional, Normal, Seen, full, log_normal, normal

CELEBA = (8, 8, 16, 32, 64, 128, 256, 512)  # features of each scale of the published network, for 128 x 128 pixels


class VAEACConv(Conditional):
    """Images, some of their pixels unobserved: what the others say of these.

    Three networks of residual bottleneck blocks at several scales: the proposal q(z | x, b), the prior
    p(z | x_{1-b}, b), and the generative network p(x_b | z, x_{1-b}, b), which at every scale also sees the prior's.

    Args:
        channels: C of the images.
        widths: features at each scale, from whole images on; every further scale has half as many rows and columns.
            By default the published network's, of which the last scale of 128 x 128 pixels is a single cell.
        blocks: residual blocks at each scale of each network.
        latent: numbers of z for each cell of the last scale.
        sigma: standard deviation of a value given z, the same for all; None: learned.
        least_sigma: floor of what is learned.
        slope: of the activation below 0.

    In every method x is [B, C, H, W], float, H and W multiples of 2 ** (scales - 1); NaN where the value is not known
    at all. ``mask`` is [B, 1, H, W] or [B, C, H, W], bool, and **True (b = 1) is UNOBSERVED**: such a value is to be
    told from the others. A NaN is unobserved whatever its mask says, and never scored: no loss and no gradient depends
    on what it stands for. Bounds are of whole images, in nats [B]; the publication divides its loss by H W.

    Deterministic, given torch's seed or a key, as far as torch's convolutions are; synchronises nowhere.
    O. Ivanov, M. Figurnov, D. Vetrov, Variational Autoencoder with Arbitrary Conditioning, ICLR 2019,
    arXiv:1806.02382. Chosen here: a block begins with the activation, squeezes to half the features, has no
    normalisation, and is the identity at first; scales change by convolutions of 2 x 2 cells, which tell where a pixel
    is; of the prior's network, what leaves a scale is concatenated; the proposal is also told which values are
    unknown.
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        widths: Sequence[int] = CELEBA,
        blocks: int = 4,
        latent: int = 256,
        sigma: float | None = None,
        least_sigma: float = 0.01,
        slope: float = 0.01,
    ) -> None:
        super().__init__()
        if channels < 1 or latent < 1 or blocks < 0:
            raise ValueError(f"channels and latent must be at least 1, blocks 0, got {channels}, {latent} and {blocks}")
        if not widths or any(width < 2 for width in widths):
            raise ValueError(f"widths: expected at least 2 for each scale, got {list(widths)}")
        if not least_sigma > 0 or (sigma is not None and not sigma > 0):
            raise ValueError(f"sigma and least_sigma must be above 0, got {sigma} and {least_sigma}")
        self.channels, self.latent, self.stride = channels, latent, 2 ** (len(widths) - 1)
        self.sigma, self.least_sigma = sigma, least_sigma
        self.proposal = _Down(3 * channels, widths, blocks, 2 * latent, slope)
        self.prior_network = _Down(2 * channels, widths, blocks, 2 * latent, slope)
        self.generator = _Up(latent, widths, blocks, (1 if sigma else 2) * channels, slope)

    def _seen(self, x: Tensor, mask: Tensor) -> Seen:
        shape = list(x.shape)
        if x.dim() != 4 or shape[1] != self.channels or any(n == 0 or n % self.stride for n in shape[2:]):
            raise ValueError(
                f"x: expected [B, {self.channels}, H, W] with H and W multiples of {self.stride}, got {shape}"
            )
        if mask.dtype != torch.bool or list(mask.shape) not in (shape, [shape[0], 1, *shape[2:]]):
            raise ValueError(
                f"mask: expected bool {shape}, or one channel of that, got {mask.dtype} {list(mask.shape)}"
            )
        return Seen(x, mask.expand(shape))

    def _prior(self, seen: Seen) -> tuple[Normal, list[Tensor]]:
        """The prior, and what leaves each scale of its network."""
        moments, memory = self.prior_network(_inputs(seen.x, seen.hidden, seen.hidden))
        return normal(moments.flatten(1)), memory

    def _proposal(self, seen: Seen) -> Normal:
        return normal(self.proposal(_inputs(seen.x, seen.unknown, seen.hidden, seen.unknown))[0].flatten(1))

    def _outcome(self, z: Tensor, memory: Sequence[Tensor]) -> Normal:
        """Mean and standard deviation of every value, [B, C, H, W]."""
        outputs = full(self.generator(z.unflatten(1, (self.latent, *memory[-1].shape[2:])), memory))
        if self.sigma is not None:
            return Normal(outputs, torch.full_like(outputs, self.sigma))
        mean, spread = outputs.chunk(2, 1)
        return Normal(mean, F.softplus(spread) + self.least_sigma)

    def _likelihood(self, seen: Seen, outcome: Normal) -> Tensor:
        scored = seen.hidden & ~seen.unknown
        known = torch.where(seen.unknown, 0.0, seen.x)
        return (log_normal(known, *outcome) * scored.to(known.dtype)).flatten(1).sum(1)

    def _drawn(self, outcome: Normal, keys: Sequence[Tensor]) -> Tensor:
        return ops.rsample_normal(*outcome, key=keys[0]) if keys else outcome.mean


class _Block(nn.Module):
    """x + a 3 x 3 convolution of half its features, between two of single cells; each after the activation."""

    def __init__(self, width: int, slope: float) -> None:
        super().__init__()
        inner = width // 2
        self.layers = nn.ModuleList(
            [nn.Conv2d(width, inner, 1), nn.Conv2d(inner, inner, 3, padding=1), nn.Conv2d(inner, width, 1)]
        )
        nn.init.zeros_(self.layers[2].weight)  # it begins as the identity
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        change = x
        for layer in self.layers:
            change = layer(F.leaky_relu(change, self.slope))
        return x + change


class _Down(nn.Module):
    """Images to numbers for each cell of the last scale [B, outputs, h, w], and what leaves each scale."""

    def __init__(self, inputs: int, widths: Sequence[int], blocks: int, outputs: int, slope: float) -> None:
        super().__init__()
        between = [nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths)]
        self.enter = _keeping([nn.Conv2d(inputs, widths[0], 1), *between])
        self.scales = _scales(widths, blocks, slope)
        self.last = nn.Conv2d(widths[-1], outputs, 1)
        self.slope = slope

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        memory: list[Tensor] = []
        for enter, scale in zip(self.enter, self.scales, strict=True):
            memory.append(scale(enter(memory[-1] if memory else x)))
        return self.last(F.leaky_relu(memory[-1], self.slope)), memory


class _Up(nn.Module):
    """z [B, latent, h, w], and what left each scale of the prior's network, to [B, outputs, H, W]."""

    def __init__(self, latent: int, widths: Sequence[int], blocks: int, outputs: int, slope: float) -> None:
        super().__init__()
        # As in _Down the first is of whole images.
        between = [nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths)]
        self.enter = _keeping([*between, nn.Conv2d(latent, widths[-1], 1)])
        self.join = _keeping([nn.Conv2d(2 * width, width, 1) for width in widths])
        self.scales = _scales(widths, blocks, slope)
        self.last = nn.Conv2d(widths[0], outputs, 1)
        self.slope = slope

    def forward(self, z: Tensor, memory: Sequence[Tensor]) -> Tensor:
        x = z
        for place in reversed(range(len(self.scales))):
            x = self.scales[place](self.join[place](torch.cat([self.enter[place](x), memory[place]], 1)))
        return self.last(F.leaky_relu(x, self.slope))


def _scales(widths: Sequence[int], blocks: int, slope: float) -> nn.ModuleList:
    return nn.ModuleList([nn.Sequential(*(_Block(width, slope) for _ in range(blocks))) for width in widths])


def _keeping(layers: Sequence[nn.Conv2d | nn.ConvTranspose2d]) -> nn.ModuleList:
    """Layers that begin by keeping a signal's variance: one after another they lead through all scales, down and up,
    and of what comes in torch's own weights would leave almost nothing."""
    for layer in layers:
        cells = 1 if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0, 0].numel()
        nn.init.normal_(layer.weight, std=(layer.in_channels * cells) ** -0.5)
    return nn.ModuleList(layers)


def _inputs(x: Tensor, gone: Tensor, *flags: Tensor) -> Tensor:
    """x with zeros where it is gone, and flags as numbers, channel beside channel."""
    return torch.cat([torch.where(gone, 0.0, x), *(flag.to(x.dtype) for flag in flags)], 1)
