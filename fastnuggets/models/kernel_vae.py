"""A variational autoencoder of convolution kernels: the model behind a deep weight prior (Atanov et al., 2019)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.models.vae import Bound
from fastnuggets.ops.sample import Key, counted_keys

LEAST_VARIANCE = 1e-6  # of a latent number, and of a weight in units of scale^2: a kernel that recurs has a density
LARGE = 7  # from this size on valid convolutions alone make a network deep enough


class Normal(NamedTuple):
    mean: Tensor
    var: Tensor


class KernelVAE(nn.Module):
    """Kernels w of ``size`` x ``size`` weights: p(w) = int p(w | z) N(z; 0, I) dz, and r(z | w), which guesses z.

    Both are Gaussian with independent components; convolutional networks say their means and variances.

    Args:
        size: of a kernel, odd, 3 or more.
        latent: numbers of z. Published: 2 with 32 hidden channels for 7 x 7, 4 with 64 for 5 x 5.
        hidden: channels of the outer layers; the inner ones have twice as many.
        scale: what the networks take for 1, best the standard deviation of the kernels that are learned from; a buffer.

    In every method w is [N, size, size], a kernel each, whatever layer and channels it is from. Densities are of w, not
    of w / scale: nats of kernels of different scales can be added and compared. Deterministic, given torch's seed or a
    key; synchronises nowhere.

    A. Atanov, A. Ashukha, K. Struminsky, D. Vetrov, M. Welling, The Deep Weight Prior, ICLR 2019, arXiv:1810.06943.
    Unlike there: kernels are divided by their scale, and variances have a floor.
    """

    scale: Tensor  # []

    def __init__(self, size: int, *, latent: int = 4, hidden: int = 64, scale: float = 1.0) -> None:
        super().__init__()
        if size < 3 or size % 2 == 0:
            raise ValueError(f"size must be odd and at least 3, got {size}")
        if latent < 1 or hidden < 1:
            raise ValueError(f"latent and hidden must be at least 1, got {latent} and {hidden}")
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale must be above 0, got {scale}")
        self.size, self.latent = size, latent
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.encoder = _encoder(size, hidden, 2 * latent)
        self.decoder = _decoder(size, latent, hidden)

    def encode(self, w: Tensor) -> Normal:
        """r(z | w): mean and variance [N, latent]."""
        if w.dim() != 3 or w.shape[1:] != (self.size, self.size):
            raise ValueError(f"w: expected [N, {self.size}, {self.size}], got {list(w.shape)}")
        mean, spread = self.encoder((w / self.scale)[:, None]).flatten(1).chunk(2, 1)
        return Normal(mean, F.softplus(spread) + LEAST_VARIANCE)

    def decode(self, z: Tensor) -> Normal:
        """p(w | z) of z [N, latent]: mean and variance [N, size, size]."""
        mean, spread = self.decoder(z[:, :, None, None]).unbind(1)
        return Normal(mean * self.scale, (F.softplus(spread) + LEAST_VARIANCE) * self.scale.square())

    def bound(self, w: Tensor, *, key: Key = None) -> Bound:
        """The evidence lower bound on ln p(w), nats of each kernel [N], its expectation estimated by one z."""
        z, kl = ops.rsample_normal_kl(*self.encode(w), form="var", key=key)
        return Bound(_log_normal(w, self.decode(z)), kl)

    def importance_bound(self, w: Tensor, samples: int = 100, *, key: Key = None) -> Tensor:
        """The importance-weighted bound on ln p(w), nats [N]: ln of the mean, over z, of p(w | z) p(z) / r(z | w).

        In expectation never below the bound of fewer samples, nor above the truth, to which it tends.
        Y. Burda, R. Grosse, R. Salakhutdinov, Importance Weighted Autoencoders, ICLR 2016, arXiv:1509.00519.
        """
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        guess = self.encode(w)
        z = ops.rsample_normal(*(of.expand(samples, *of.shape) for of in guess), form="var", key=key)
        # One sample after the other: memory does not grow with their number.
        weights = [_log_normal(w, self.decode(one)) + _log_standard(one) - _log_normal(one, guess) for one in z]
        return torch.logsumexp(torch.stack(weights), 0) - math.log(samples)

    @torch.no_grad()
    def sample(self, n: int, *, noise: bool = True, key: Key = None) -> Tensor:
        """Kernels [n, size, size] of p(w); without ``noise`` the means of p(w | z), of a z that is drawn all the same.

        A key given has its offset counted on: 0 for z, 1 for w.
        """
        first, second = counted_keys(2, self.scale.device, key=key)
        z = ops.noise("normal", [n, self.latent], dtype=self.scale.dtype, device=self.scale.device, key=first)
        mean, var = self.decode(z)
        return ops.rsample_normal(mean, var, form="var", key=second) if noise else mean

    def extra_repr(self) -> str:
        return f"size={self.size}, latent={self.latent}"


def _encoder(size: int, hidden: int, outputs: int) -> nn.Sequential:
    """[N, 1, size, size] -> [N, outputs, 1, 1]."""
    valid = (size - 1) // 2
    padded = [1] if size >= LARGE else [1, hidden, hidden]
    layers: list[nn.Module] = []
    for a, b in pairwise(padded):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ELU()]
    widths = padded[-1:] + ([hidden] if size >= LARGE else [])
    widths += [2 * hidden] * (valid + 1 - len(widths))
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3), nn.ELU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], outputs, 1))


def _decoder(size: int, latent: int, hidden: int) -> nn.Sequential:
    """[N, latent, 1, 1] -> [N, 2, size, size]."""
    valid = (size - 1) // 2
    layers: list[nn.Module] = []
    if size >= LARGE:
        widths = [latent, *[2 * hidden] * (valid - 1), hidden]
    else:
        widths = [2 * hidden] * (valid + 1)
        layers += [nn.Conv2d(latent, 2 * hidden, 1), nn.ELU()]
    for a, b in pairwise(widths):
        layers += [nn.ConvTranspose2d(a, b, 3), nn.ELU()]
    if size < LARGE:
        layers += [nn.Conv2d(2 * hidden, hidden, 1), nn.ELU()]
    return nn.Sequential(*layers, nn.Conv2d(hidden, 2, 1))


def _log_normal(x: Tensor, of: Normal) -> Tensor:
    """[N], summed over all other axes."""
    each = -0.5 * ((x - of.mean).square() / of.var + of.var.log() + math.log(2 * math.pi))
    return each.flatten(1).sum(1)


def _log_standard(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
