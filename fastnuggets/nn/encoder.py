"""The head of a variational autoencoder: features to a drawn code and its divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnuggets import ops
from fastnuggets.nn.stochastic import Stochastic
from fastnuggets.ops.sample import Key

# Those of a spread that may be any real number.
FORMS = ("logvar", "log_std", "rho")


class GaussianEncoder(Stochastic):
    """x [..., in_features] -> z [..., latent], drawn from a normal whose moments are linear in x, and its KL.

    While it trains, and in eval mode inside `fastnuggets.nn.sampling`, z is a draw; otherwise the mean.

    Args:
        in_features, latent, bias, device, dtype: of the one `torch.nn.Linear` that makes mean and spread.
        form: how the spread says the standard deviation, as in `fastnuggets.ops.rsample_normal`: ``"logvar"``,
            ``"log_std"`` or ``"rho"``.
        event_dims: the KL is summed over so many of z's last axes, 1 or more.
        prior_mean, prior_std: of the prior; numbers, or tensors that broadcast with z, which become buffers, or stay
            parameters.
        free_bits: nats a latent dimension below which its KL, averaged over all other axes of z, has no gradient. Then
            the mean of ``kl`` is that of sum_j max(free_bits, mean kl_j); single values have no other meaning.

    ``kl`` has z's shape less ``event_dims`` axes; float64 for float64, else float32. With free bits it takes one
    more tensor of z's size. Deterministic and does not synchronise.
    D. Kingma, M. Welling, Auto-Encoding Variational Bayes, ICLR 2014, arXiv:1312.6114; free bits: D. Kingma et al.,
    Improving Variational Inference with Inverse Autoregressive Flow, NeurIPS 2016, arXiv:1606.04934.
    """

    prior_mean: Tensor | float
    prior_std: Tensor | float

    def __init__(
        self,
        in_features: int,
        latent: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        form: str = "logvar",
        event_dims: int = 1,
        prior_mean: Tensor | float = 0.0,
        prior_std: Tensor | float = 1.0,
        free_bits: float = 0.0,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if event_dims < 1:
            raise ValueError(f"event_dims must be at least 1, got {event_dims}")
        if not free_bits >= 0:
            raise ValueError(f"free_bits must be at least 0, got {free_bits}")
        if not isinstance(prior_std, Tensor) and not prior_std > 0:
            raise ValueError(f"prior_std must be above 0, got {prior_std}")
        self.linear = torch.nn.Linear(in_features, 2 * latent, bias=bias, device=device, dtype=dtype)
        self.form, self.event_dims, self.free_bits = form, event_dims, free_bits
        for name, value in (("prior_mean", prior_mean), ("prior_std", prior_std)):
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor, *, key: Key = None) -> tuple[Tensor, Tensor]:
        mean, spread = self.linear(x).chunk(2, -1)
        prior: dict[str, Any] = {"form": self.form, "prior_mean": self.prior_mean, "prior_std": self.prior_std}
        prior["event_dims"] = 0 if self.free_bits else self.event_dims
        if self.samples:
            z, kl = ops.rsample_normal_kl(mean, spread, key=key, **prior)
        else:
            z, kl = mean, ops.kl_normal(mean, spread, **prior)
        return z, self._freed(kl) if self.free_bits else kl

    def _freed(self, kl: Tensor) -> Tensor:
        # What is added to every row takes the place of the gradient where a mean is below, and is 0 where it is not.
        mean = kl.flatten(0, -2).mean(0) if kl.dim() > 1 else kl
        kl = kl + (self.free_bits - mean).clamp(min=0)
        return kl.flatten(kl.dim() - self.event_dims).sum(-1)

    def extra_repr(self) -> str:
        return f"form={self.form}, event_dims={self.event_dims}, free_bits={self.free_bits}"
