"""A normal distribution of rows with gaps, and what it says of any cells given the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROUNDS = 100  # of expectation and maximisation at most
SETTLED = 1e-4  # the largest change of a covariance in a round that is the last
PSEUDO_ROWS = 1.0  # of independent columns: neighbours that are copies of each other stay invertible
MOST_ROWS = 4096  # that the covariance is estimated from
_BLOCK = 256


class ConditionalGaussian(nn.Module):
    """Means and standard deviations of hidden cells given the others, as a joint normal distribution has them.

    Args:
        columns: E. Columns should be of about unit deviation.

    The distribution is standard until `estimate` is called; it is kept with the weights and is not trained.
    Deterministic. Differentiable in x. A row costs a factorisation of [E, E].
    """

    center: Tensor
    covariance: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(columns))
        self.register_buffer("covariance", torch.eye(columns))

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, E] float, hidden [B, E] bool -> means and standard deviations [B, E] given what is not hidden; of that
        itself, x and 0. What x holds where it is hidden does not matter, but must be finite."""
        with torch.autocast(x.device.type, enabled=False):  # differences of nearly equal numbers
            covariance = self.covariance.to(x)
            mean, across, gain = _given(x, ~hidden, self.center.to(x), covariance)
            var = covariance.diagonal() - (across * gain).sum(1)
        return torch.where(hidden, mean, x), var.clamp(min=0).sqrt() * hidden

    @torch.no_grad()
    def estimate(self, x: Tensor) -> None:
        """Take the distribution of rows [N, E] with NaN for gaps, by expectation and maximisation.

        Right if gaps depend on what is known of a row alone. A. Dempster, N. Laird, D. Rubin, Maximum Likelihood from
        Incomplete Data via the EM Algorithm, J. R. Stat. Soc. B 39 (1), 1977.
        """
        x = x[:: -(-len(x) // MOST_ROWS)].double().cpu()
        known = ~x.isnan()
        x = x.nan_to_num()
        center = x.sum(0) / known.sum(0).clamp(min=1)
        covariance = torch.eye(x.shape[1], dtype=x.dtype)
        for _ in range(ROUNDS):
            last = covariance
            center, covariance = _round(x, known, center, covariance)
            if (covariance - last).abs().max() < SETTLED:
                break
        self.center.copy_(center)
        self.covariance.copy_(covariance)


def _round(x: Tensor, known: Tensor, center: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    means, within = [], torch.zeros_like(covariance)
    for values, there in zip(x.split(_BLOCK), known.split(_BLOCK), strict=True):
        mean, across, gain = _given(values, there, center, covariance)
        means.append(torch.where(there, values, mean))
        gone = (~there).to(x.dtype)
        left = covariance - across.mT @ gain
        within += (left * gone[:, :, None] * gone[:, None, :]).sum(0)
    filled = torch.cat(means)
    center = filled.mean(0)
    apart = filled - center
    prior = PSEUDO_ROWS * torch.eye(len(center), dtype=x.dtype)
    return center, (apart.T @ apart + within + prior) / (len(filled) + PSEUDO_ROWS)


def _given(x: Tensor, known: Tensor, center: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Conditional means [B, E]; the covariances of what is known with all [B, E, E], and the weights of what is known
    in all: their product is what knowing takes from the covariance."""
    there = known.to(x.dtype)
    # The covariance of what is known, and the identity elsewhere: one shape for all patterns of gaps.
    system = covariance * there[:, :, None] * there[:, None, :] + torch.diag_embed(1 - there)
    across = there[:, :, None] * covariance
    gain = torch.cholesky_solve(across, torch.linalg.cholesky(system))
    return center + torch.einsum("bke,bk->be", gain, (x - center) * there), across, gain
