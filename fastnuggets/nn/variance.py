"""Layers whose weights are noise: of zero mean, or of a mean that variational dropout may remove."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastnuggets import ops
from fastnuggets.nn.weights import Posterior, RandomWeights, wide
from fastnuggets.ops.sample import APPROXIMATIONS, Key

NOISES = ("normal", "bernoulli", "uniform")
ALPHAS = ("weight", "neuron", "layer")
# Added to w^2 under the logarithm, so that alpha of a weight of 0 is finite: some 1e16 sigma^2.
TINY = 1e-16


class Variance(RandomWeights):
    """What :class:`VarianceLinear` and the convolutions have in common."""

    def __init__(self, *args: Any, noise: str = "normal", **kwargs: Any) -> None:
        if noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
        super().__init__(*args, **kwargs)
        self.noise = noise

    @property
    def samples(self) -> bool:
        return self._draws is not False

    def forward(self, x: Tensor, *, key: Key = None) -> Tensor:
        if not self.samples:
            return self.product(x, torch.zeros_like(self.weight), self.bias)
        if self.noise == "bernoulli":
            return self.product(x, ops.random_signs(self.weight / 2, key=key), self.bias)
        if self.noise == "uniform":
            return self.product(x, ops.rsample("uniform", -self.weight / 2, self.weight, key=key), self.bias)
        var = self.product_of_squares(x, wide(self.weight).square(), None)
        return ops.local_reparam(self._mean(var), var, key=key).to(self.computes_in(x))

    def _mean(self, var: Tensor) -> Tensor:
        """The bias as it broadcasts with outputs."""
        if self.bias is None:
            return var.new_zeros(())
        return self.bias.to(var.dtype).view(-1, *[1] * (self.weight.dim() - 2))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, noise={self.noise!r}"


class VarianceLinear(Variance, nn.Linear):
    """Weights of zero mean, of which only the size is learned: y = bias + sqrt(x^2 (sigma^2)^T) * normal.

    Args:
        in_features, out_features, bias, device, dtype: as torch's. The parameter ``weight`` is sigma; its sign has no
            meaning, and torch's initial values, uniform within 1 / sqrt(fan_in), are the paper's.
        noise: ``"normal"``, one draw an output; or, one draw a weight and call, ``"bernoulli"``, sigma times -1/2 or
            1/2, and ``"uniform"``, sigma times a number in (-1/2, 1/2).

    Call:
        x as torch's layer, ``key`` as in :mod:`fastnuggets.ops.sample`, which says what is promised of draws.

    **It draws in eval mode too**: what it has learned is in the noise, and without it the output is the bias alone,
    as it is after :func:`fastnuggets.nn.weight_scaling_`. To predict, average the softmax of several passes.

    There is no divergence: this is the limit alpha -> infinity of variational dropout, where it is constant.

    K. Neklyudov, D. Molchanov, A. Ashukha, D. Vetrov, Variance Networks: When Expectation Does Not Meet Your
    Expectations, ICLR 2019, arXiv:1803.03764.
    """


class VarianceConv1d(Variance, nn.Conv1d):
    """`torch.nn.Conv1d` of weights of zero mean: see :class:`VarianceLinear`."""


class VarianceConv2d(Variance, nn.Conv2d):
    """`torch.nn.Conv2d` of weights of zero mean: see :class:`VarianceLinear`."""


class VarianceConv3d(Variance, nn.Conv3d):
    """`torch.nn.Conv3d` of weights of zero mean: see :class:`VarianceLinear`."""


class VariationalDropout(Posterior):
    """What :class:`VariationalDropoutLinear` and the convolutions have in common."""

    alpha = ""  # until the torch layer has been made
    mask: Tensor | None
    log_alpha: Any
    log_sigma2: Any
    optional_buffers = ("mask",)

    def __init__(
        self,
        *args: Any,
        alpha: str = "weight",
        approximation: str = "molchanov",
        threshold: float = 3.0,
        init: float | None = None,
        **kwargs: Any,
    ) -> None:
        if alpha not in ALPHAS:
            raise ValueError(f"alpha must be one of {', '.join(ALPHAS)}, got {alpha!r}")
        if approximation not in APPROXIMATIONS:
            raise ValueError(f"approximation must be one of {', '.join(APPROXIMATIONS)}, got {approximation!r}")
        super().__init__(*args, **kwargs)
        self.alpha, self.approximation, self.threshold = alpha, approximation, threshold
        self.init = (-10.0 if alpha == "weight" else -5.0) if init is None else init
        ones = [1] * (self.weight.dim() - 1)
        sizes = {"weight": self.weight.shape, "neuron": (self.weight.size(0), *ones), "layer": (1, *ones)}
        self._name = "log_sigma2" if alpha == "weight" else "log_alpha"
        self.register_parameter(self._name, nn.Parameter(self.weight.new_empty(sizes[alpha])))
        self.register_buffer("mask", None)
        self._reset_noise()

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if self.alpha:
            self._reset_noise()

    def _reset_noise(self) -> None:
        nn.init.constant_(getattr(self, self._name), self.init)
        self.mask = None

    def beyond_plain(self) -> tuple[str, ...]:
        return (self._name,)

    def described_by(self) -> tuple[Tensor, ...]:
        return self.weight, getattr(self, self._name)

    def ln_alpha(self) -> Tensor:
        """ln of the ratio sigma^2 / weight^2; at most 0 for the approximation that is one for alpha <= 1."""
        if self.alpha == "weight":
            weight, log_sigma2 = _full(self.weight), _full(self.log_sigma2)
            found = log_sigma2 - (weight.square() + TINY).log()
        else:
            found = _full(self.log_alpha)
        return found.clamp(max=0.0) if self.approximation == "kingma" else found

    def kl(self) -> Tensor:
        ln_alpha, how = self.ln_alpha(), self.approximation
        if self.mask is not None:
            return (ops.kl_log_uniform(ln_alpha, approximation=how) * self.mask).sum()
        total = ops.kl_log_uniform(ln_alpha, approximation=how, event_dims=ln_alpha.dim())
        return total * (self.weight.numel() / max(1, ln_alpha.numel()))

    def forward(self, x: Tensor, *, key: Key = None) -> Tensor:
        if not self.samples:
            return self.product(x, self.sparse_weight(), self.bias)
        weight, var = self.weight, self._variance()
        if self.mask is not None:
            weight, var = weight * self.mask, var * self.mask
        mean = self.product(x, weight, self.bias)
        return ops.local_reparam(mean, self.product_of_squares(x, var, None), key=key).to(mean.dtype)

    def _variance(self) -> Tensor:
        if self.alpha == "weight" and self.approximation != "kingma":
            return wide(self.log_sigma2).exp()
        weight = wide(self.weight)
        return weight.square() * self.ln_alpha().exp().to(weight.dtype)

    @torch.no_grad()
    def kept(self, threshold: float | None = None) -> Tensor:
        """Which weights are not removed, bool of their shape: those of ln alpha <= threshold."""
        kept = (self.ln_alpha() <= (self.threshold if threshold is None else threshold)).expand_as(self.weight)
        return kept if self.mask is None else kept & self.mask

    def sparse_weight(self) -> Tensor:
        """The weights, those that are removed 0."""
        return torch.where(self.kept(), self.weight, 0.0)

    def sparsity(self, threshold: float | None = None) -> float:
        """The share of weights that are removed. Synchronises."""
        return 1.0 - float(self.kept(threshold).double().mean())

    @torch.no_grad()
    def prune_(self, threshold: float | None = None) -> None:
        """Removes them for good: 0, without noise or divergence, whatever is learned later. In the state_dict."""
        self.mask = self.kept(threshold).contiguous()
        self.weight.mul_(self.mask)

    def to_plain(self) -> nn.Module:
        """torch's layer with the weights that eval mode uses, zeros in their place; a copy."""
        return self.with_weights(self.sparse_weight())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha!r}, approximation={self.approximation!r}"


class VariationalDropoutLinear(VariationalDropout, nn.Linear):
    """Weights N(w, sigma^2 = alpha w^2) under a log-uniform prior, which drives alpha of useless weights to infinity.

    Args:
        in_features, out_features, bias, device, dtype: as torch's. ``weight`` is the mean.
        alpha: one a ``"weight"``, stored as the parameter ``log_sigma2``, of which the gradient is steadier; or one a
            ``"neuron"`` (output feature or channel) or ``"layer"``, stored as ``log_alpha``. The divergence counts
            every weight.
        approximation: of the divergence, as in :func:`fastnuggets.ops.kl_log_uniform`. ``"kingma"`` holds alpha at 1
            or below, where it is one.
        threshold: in eval mode the means are used, less those with ln alpha above it.
        init: of the parameter; default -10 of ``log_sigma2``, -5 of ``log_alpha``.

    Call:
        x as torch's layer, ``key`` as in :mod:`fastnuggets.ops.sample`, which says what is promised of draws. The
        output is drawn from its mean and variance.

    ln alpha = log_sigma2 - ln(w^2 + 1e-16), so it and its gradient are finite at w = 0. A plain layer's state_dict
    loads. Eval mode goes over the weights at each call: :meth:`to_plain` for use, :meth:`prune_` to go on training.

    D. Molchanov, A. Ashukha, D. Vetrov, Variational Dropout Sparsifies Deep Neural Networks, ICML 2017,
    arXiv:1701.05369; D. Kingma, T. Salimans, M. Welling, arXiv:1506.02557.
    """


class VariationalDropoutConv1d(VariationalDropout, nn.Conv1d):
    """`torch.nn.Conv1d` with variational dropout: see :class:`VariationalDropoutLinear`."""


class VariationalDropoutConv2d(VariationalDropout, nn.Conv2d):
    """`torch.nn.Conv2d` with variational dropout: see :class:`VariationalDropoutLinear`."""


class VariationalDropoutConv3d(VariationalDropout, nn.Conv3d):
    """`torch.nn.Conv3d` with variational dropout: see :class:`VariationalDropoutLinear`."""


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
