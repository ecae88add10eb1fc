"""Sampling by its definitions: the noise of a key in float64, and what is made of it in differentiable PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnuggets.reference.philox import MASK, normal, stream_words, uniform

MOLCHANOV = 0.63576, 1.87320, 1.48695  # Variational Dropout Sparsifies Deep Neural Networks, ICML 2017
KINGMA = 1.16145124, -1.50204118, 0.58629921  # Variational Dropout and the Local Reparameterization Trick, NeurIPS 2015


def noise(key: Tensor, kind: str, size: tuple[int, ...], parameter: float = 0.0) -> Tensor:
    """The noise of a key [2] int64 in the shape `size`, float64; element i, in row-major order, is that of the stream.

    Kinds: normal; uniform on (0, 1); laplace, logistic, gumbel of scale 1; exponential of rate 1; sign, -1 or 1; keep,
    1 / parameter with probability `parameter` or else 0; gain, 1 + parameter * normal.
    """
    seed, offset = key.tolist()
    words = offset & MASK, offset >> 32 & MASK
    n = torch.Size(size).numel()
    if kind in ("normal", "gain"):
        made = normal(seed, words, n)
        made = 1 + parameter * made if kind == "gain" else made
    elif kind == "uniform":
        made = uniform(seed, words, n)
    elif kind == "keep":
        made = _keep(seed, words, n, parameter)
    else:
        made = _OF_A_WORD[kind](stream_words(seed, words, n))
    return made.reshape(size).to(key.device)


def _exponential(word: Tensor) -> Tensor:
    return -torch.log((word.double() + 0.5) / 2**32)


def _laplace(word: Tensor) -> Tensor:
    """The top bit is the sign, the others are the size."""
    return torch.where(word >> 31 == 1, -1.0, 1.0) * _exponential(word << 1 & MASK)


def _logistic(word: Tensor) -> Tensor:
    return _exponential(MASK - word) - _exponential(word)


def _gumbel(word: Tensor) -> Tensor:
    return -torch.log(_exponential(word))


def _sign(word: Tensor) -> Tensor:
    return torch.where(word >> 31 == 1, -1.0, 1.0).double()


def _keep(seed: int, words: tuple[int, int], n: int, probability: float) -> Tensor:
    """16 bits an element: in each group of 128, elements 32 j + l take the low and 32 j + 16 + l the high half of word
    16 j + l of the group's block."""
    groups = -(-n // 128)
    word = stream_words(seed, words, 64 * groups).view(groups, 4, 1, 16)
    bits = torch.cat([word & 0xFFFF, word >> 16], 2).flatten()[:n]
    kept = int(probability * 2**16 + 0.5)
    return (bits < kept).double() * (2**16 / max(kept, 1))


_OF_A_WORD = {
    "laplace": _laplace,
    "logistic": _logistic,
    "gumbel": _gumbel,
    "exponential": _exponential,
    "sign": _sign,
}


def scaled_noise(loc: Tensor | None, scale: Tensor, key: Tensor, kind: str, parameter: float = 0.0) -> Tensor:
    """loc + scale * noise."""
    made = scale * noise(key, kind, tuple(scale.shape), parameter).to(scale)
    return made if loc is None else loc + made


def std_of(spread: Tensor, form: str) -> Tensor:
    """The standard deviation that `spread` says in the form std, logvar, log_std, var or rho."""
    if form == "var":  # its root has no slope at 0: there it is 0
        some = spread > 0
        return torch.where(some, torch.where(some, spread, 1).sqrt(), 0)
    if form == "rho":
        return F.softplus(spread)
    return {"std": spread, "logvar": (spread / 2).exp(), "log_std": spread.exp()}[form]


def rsample_normal(mean: Tensor, spread: Tensor, key: Tensor, form: str = "std") -> Tensor:
    return scaled_noise(mean, std_of(spread, form), key, "normal")


def gumbel_softmax(logits: Tensor, key: Tensor, tau: float = 1.0, hard: bool = False) -> Tensor:
    """softmax((logits + gumbel) / tau) over the last axis; hard: 1 at the largest, with the gradient of the soft."""
    soft = ((logits + noise(key, "gumbel", tuple(logits.shape)).to(logits)) / tau).softmax(-1)
    if not hard or logits.numel() == 0:
        return soft
    return F.one_hot(soft.argmax(-1), logits.shape[-1]) + (soft - soft.detach())


def kl_normal(
    mean: Tensor,
    spread: Tensor,
    form: str = "std",
    prior_mean: Tensor | float = 0.0,
    prior_std: Tensor | float = 1.0,
    event_dims: int = 0,
) -> Tensor:
    """KL(N(mean, std^2) || N(prior_mean, prior_std^2)), summed over the last `event_dims` axes."""
    std, prior = std_of(spread, form), torch.as_tensor(prior_std, dtype=mean.dtype, device=mean.device)
    kl = (prior / std).log() + (std**2 + (mean - prior_mean) ** 2) / (2 * prior**2) - 0.5
    return kl.flatten(kl.dim() - event_dims).sum(-1) if event_dims else kl


def kl_log_uniform(log_alpha: Tensor, approximation: str = "molchanov", event_dims: int = 0) -> Tensor:
    """The divergence of N(m, alpha m^2) from the log-uniform prior, or ARD's, summed over the last axes."""
    half = F.softplus(-log_alpha) / 2
    if approximation == "molchanov":
        k1, k2, k3 = MOLCHANOV
        half = half + k1 - k1 * torch.sigmoid(k2 + k3 * log_alpha)
    elif approximation == "kingma":
        alpha = log_alpha.exp()
        half = -log_alpha / 2 - sum(c * alpha ** (i + 1) for i, c in enumerate(KINGMA))
    return half.flatten(half.dim() - event_dims).sum(-1) if event_dims else half
