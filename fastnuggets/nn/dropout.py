"""Dropout. For the backward of the first two a key of 16 bytes is kept, and no mask.

Each module draws while it trains, and in eval mode inside `fastnuggets.nn.sampling`; otherwise it is the identity.
``forward`` takes a ``key`` as the functions of `fastnuggets.ops` do: the same key, the same noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastnuggets import ops
from fastnuggets.nn.stochastic import Stochastic
from fastnuggets.ops.sample import Key

MODES = ("row", "batch")


class _Drop(Stochastic):
    """A module with the probability ``p`` and nothing else."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be in [0, 1], got {p}")
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Dropout(_Drop):
    """`fastnuggets.ops.dropout`: zeros elements with probability p, and divides the others by 1 - p.

    As `torch.nn.Dropout`, but for ``inplace``, with p rounded to a multiple of 2^-16.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, x: Tensor, *, key: Key = None) -> Tensor:
        return ops.dropout(x, self.p, self.samples, key=key)


class GaussianDropout(_Drop):
    """`fastnuggets.ops.gaussian_dropout`: times 1 + sqrt(p / (1 - p)) * normal; p in [0, 1).

    N. Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, JMLR 2014.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        if p == 1:
            raise ValueError("p must be in [0, 1), got 1")

    def forward(self, x: Tensor, *, key: Key = None) -> Tensor:
        return ops.gaussian_dropout(x, self.p, self.samples, key=key)


class StochasticDepth(_Drop):
    """Zeros its whole input with probability p, and divides it by 1 - p if not: for the branch of a residual block.

    Args:
        p: the probability; a network of L blocks takes p * i / L for the i-th.
        mode: ``"row"`` draws for each row of the first axis, ``"batch"`` once. As `torchvision.ops.StochasticDepth`.

    Under data parallelism each rank draws for itself.
    G. Huang et al., Deep Networks with Stochastic Depth, ECCV 2016, arXiv:1603.09382.
    """

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__(p)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode

    def forward(self, x: Tensor, *, key: Key = None) -> Tensor:
        if not self.samples or self.p == 0:
            return x
        rows = x.size(0) if self.mode == "row" else 1
        return x * ops.dropout(x.new_ones([rows] + [1] * (x.dim() - 1)), self.p, key=key)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"


class ConcreteDropout(Stochastic):
    """Dropout before a layer, with a probability that is learned: of a relaxed mask, which has a gradient.

    x * (1 - sigmoid((ln p - ln(1 - p) + logistic) / temperature)) / (1 - p), then the layer. While it draws in eval
    mode the mask is the relaxed one too, as the authors have it.

    Args:
        layer: a `torch.nn.Linear`, whose input features are dropped, or a convolution, whose input channels are.
        p: the probability to start from, in (0, 1).
        temperature: > 0; the lower, the nearer is the mask to 0 and 1. The authors take 0.1 before a linear layer and
            2/3 before a convolution; so does the default, None.
        prior_std: of the weights' normal prior, the inverse of the paper's length scale. Biases have no prior.

    :meth:`kl` is part of `fastnuggets.nn.kl`, to be divided by n where the loss is a mean over n examples. Without it p
    goes to 0.
    Y. Gal, J. Hron, A. Kendall, Concrete Dropout, NeurIPS 2017, arXiv:1705.07832.
    """

    def __init__(
        self, layer: torch.nn.Module, p: float = 0.1, *, temperature: float | None = None, prior_std: float = 1.0
    ) -> None:
        super().__init__()
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            raise TypeError(f"layer must be a Linear, Conv1d, Conv2d or Conv3d, got {type(layer).__name__}")
        if not 0.0 < p < 1.0:
            raise ValueError(f"p must be in (0, 1), got {p}")
        self.space = layer.weight.dim() - 2  # axes after the channels
        if temperature is None:
            temperature = 2 / 3 if self.space else 0.1
        for name, value in (("temperature", temperature), ("prior_std", prior_std)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.layer, self.temperature, self.prior_std = layer, temperature, prior_std
        logit = math.log(p) - math.log1p(-p)
        self.logit = torch.nn.Parameter(torch.full((), logit, dtype=layer.weight.dtype, device=layer.weight.device))

    @property
    def p(self) -> Tensor:
        """The probability, a tensor of no axes, with its gradient."""
        return torch.sigmoid(self.logit)

    def forward(self, x: Tensor, *, key: Key = None) -> Tensor:
        if not self.samples:
            return self.layer(x)
        shape = x.shape[: x.dim() - self.space] + (1,) * self.space
        # Both 1 - p and the mask, which is symmetric, are of minus the logit: nothing cancels.
        kept = ops.binary_concrete(-self.logit.expand(shape), self.temperature, key=key)
        return self.layer(x * (kept / torch.sigmoid(-self.logit)).to(x.dtype))

    def kl(self) -> Tensor:
        """|W|^2 / (2 prior_std^2 (1 - p)) + K (p ln p + (1 - p) ln(1 - p)), K input features or channels: no axes.

        The divergence from the prior up to a constant, under the paper's approximation; may be negative. float64 for
        float64, else float32.
        """
        weight = self.layer.weight
        logit = self.logit if weight.dtype == torch.float64 else self.logit.float()
        log_keep, log_drop = -torch.nn.functional.softplus(logit), -torch.nn.functional.softplus(-logit)
        entropy = -(log_drop.exp() * log_drop + log_keep.exp() * log_keep)
        squares = torch.linalg.vector_norm(weight, dtype=logit.dtype).square()
        features = weight.size(1) * getattr(self.layer, "groups", 1)
        return squares / (2 * self.prior_std**2) * (-log_keep).exp() - features * entropy

    def extra_repr(self) -> str:
        return f"p={self.p.item():.3g}, temperature={self.temperature:.3g}, prior_std={self.prior_std}"
