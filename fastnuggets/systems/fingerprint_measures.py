"""What generated fingerprints and codes are worth: nearest molecules, coverage, moments, tests against the prior."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnuggets.molecules.fingerprints import unpack

_BLOCK = 1 << 15  # rows of a database that are unpacked at a time, 22 MB of 166 bits


class Nearest(NamedTuple):
    """The likeliest rows of a database under each sample, best first."""

    score: Tensor  # [S, k] ln p(row | sample)
    row: Tensor  # [S, k] int64


def nearest(logits: Tensor, database: Tensor, k: int = 1) -> Nearest:
    """Rows x of a database that make x ln p + (1 - x) ln(1 - p) largest, summed over bits, for samples of bits.

    Args:
        logits: [S, bits], of the p.
        database: [N, bytes] packed fingerprints; may be mapped from a file: it is gone through in blocks.

    As x logit + ln(1 - p), it is one product of matrices a block. Deterministic.
    """
    bits = logits.shape[1]
    none = -F.softplus(logits).sum(1, keepdim=True)
    score, row = logits.new_empty(len(logits), 0), torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    for first in range(0, len(database), _BLOCK):
        rows = unpack(database[first : first + _BLOCK].to(logits.device), bits).to(logits.dtype)
        found = (logits @ rows.T).topk(min(k, len(rows)))
        score, row = torch.cat([score, found.values], 1), torch.cat([row, found.indices + first], 1)
        if score.shape[1] > k:
            best = score.topk(k)
            score, row = best.values, row.gather(1, best.indices)
    return Nearest(score + none, row)


class Generated(NamedTuple):
    """Samples beside the data that was learned from."""

    covered: int  # distinct nearest rows
    best: float  # the highest ln p of a nearest row
    mean: float  # of all samples' nearest rows
    mean_cosine: float  # of the bits' means, samples and data
    std_cosine: float  # of the bits' standard deviations; of samples those of their probabilities
    frequencies: Tensor  # [2, bits] mean of each bit, data and samples


def judge(logits: Tensor, database: Tensor) -> Generated:
    """Samples as logits [S, bits] against a database [N, bytes]; coverage counts as in druGAN."""
    found = nearest(logits, database)
    data_mean, data_std = moments(database, logits.shape[1])
    p = logits.sigmoid().double().cpu()
    cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in ((p.mean(0), data_mean), (p.std(0), data_std))]
    return Generated(
        len(found.row.unique()),
        found.score.max().item(),
        found.score.mean().item(),
        *cosines,
        torch.stack([data_mean, p.mean(0)]),
    )


def moments(database: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each bit of packed rows, [bits] float64."""
    counts = torch.zeros(bits, dtype=torch.int64)
    for rows in database.split(_BLOCK):
        counts += unpack(rows, bits).sum(0, dtype=torch.int64).cpu()
    mean = counts.double() / len(database)
    return mean, (mean * (1 - mean)).sqrt()


class Fit(NamedTuple):
    """Codes against a normal prior of mean 0."""

    mean: Tensor  # [latent]
    std: Tensor  # [latent]
    ks: Tensor  # [latent] largest distance between the distribution functions
    p: Tensor  # [latent] chance of such a distance if the codes were of the prior
    energy: float  # distance of the joint distributions, in units of the prior; 0 for equal ones
    energy_p: float  # chance of such a distance, from relabelling


def against_prior(codes: Tensor, prior: Tensor, prior_std: float, *, seed: int = 0, relabelled: int = 199) -> Fit:
    """Codes [N, latent] against draws of the prior [M, latent] (energy) and its distribution function (KS).

    The energy test takes the first 500 of each: G. Székely, M. Rizzo, J. Stat. Plan. Inference 143, 2013.
    """
    ks = ks_distance(codes, prior_std)
    energy, energy_p = energy_test(codes[:500].cpu() / prior_std, prior[:500].cpu() / prior_std, relabelled, seed)
    return Fit(codes.mean(0).cpu(), codes.std(0).cpu(), ks, ks_p(ks, len(codes)), energy, energy_p)


def ks_distance(values: Tensor, std: float) -> Tensor:
    """Kolmogorov and Smirnov's distance of each column of [N, D] from a normal of mean 0, [D] float64."""
    ordered = torch.special.ndtr(values.detach().double().cpu().sort(0).values / std)
    steps = torch.arange(len(values) + 1, dtype=torch.float64)[:, None] / len(values)
    return torch.maximum((steps[1:] - ordered).amax(0), (ordered - steps[:-1]).amax(0))


def ks_p(distance: Tensor, n: int) -> Tensor:
    """Chance of a distance as large from n values, by Kolmogorov's series with Stephens' correction for small n."""
    x = distance * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))
    k = torch.arange(1, 101, dtype=torch.float64)
    terms = 2 * (-1.0) ** (k - 1) * torch.exp(-2 * (k * x[:, None]).square())
    # Below 0.2 the series needs more terms than there are, and its sum is 1 to twelve digits.
    return torch.where(x < 0.2, torch.ones_like(x), terms.sum(1).clamp(0, 1))


def energy_test(a: Tensor, b: Tensor, relabelled: int, seed: int) -> tuple[float, float]:
    """2 E|a - b| - E|a - a'| - E|b - b'| of points [N, D] and [M, D], and the chance of one as large."""
    apart = torch.cdist(*[torch.cat([a, b]).double()] * 2, compute_mode="donot_use_mm_for_euclid_dist")
    side = torch.cat([torch.full((len(a),), 1 / len(a)), torch.full((len(b),), -1 / len(b))]).double()
    generator = torch.Generator().manual_seed(seed)
    # With weights s the distance is -s' D s: all relabellings are one product.
    sides = torch.stack([side, *(side[torch.randperm(len(side), generator=generator)] for _ in range(relabelled))])
    found = -((sides @ apart) * sides).sum(1)
    return found[0].item(), ((found >= found[0] - 1e-12).double().mean()).item()


def regression(codes: Tensor, values: Tensor, *, folds: int = 5, seed: int = 0) -> tuple[float, Tensor]:
    """How far a linear function of the codes [N, latent] tells a property [N]: R² of predictions [N] for rows that
    were held out of the least squares fit, in `folds` parts."""
    x = torch.cat([codes.double().cpu(), torch.ones(len(codes), 1, dtype=torch.float64)], 1)
    y = values.double().cpu()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    predicted = torch.empty_like(y)
    for part in order.chunk(folds):
        rest = torch.ones(len(y), dtype=torch.bool)
        rest[part] = False
        # A ridge far below the data's own scale: a latent that is not used must not make the system singular.
        square = x[rest].T @ x[rest] + 1e-6 * torch.eye(x.shape[1], dtype=torch.float64)
        predicted[part] = x[part] @ torch.linalg.solve(square, x[rest].T @ y[rest])
    return 1 - ((y - predicted).square().sum() / (y - y.mean()).square().sum()).item(), predicted
