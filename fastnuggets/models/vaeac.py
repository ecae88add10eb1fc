"""A variational autoencoder with arbitrary conditioning: any part of a row given any other (Ivanov et al., 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.models.conditional_gaussian import ConditionalGaussian
from fastnuggets.ops.sample import Key, counted_keys

LEAST_STD = 1e-3  # of a latent number
PRIOR_MEAN = 1e4  # standard deviation of the hyperprior of the prior's means
PRIOR_STD = 1e-4  # weight of the hyperprior of the prior's standard deviations
LEAST_CHANCE = 1e-4  # of a category
LEAST_START = 0.02  # of a category's share where a normal distribution says less
UNIT = math.log(math.e - 1)  # softplus of it is 1
MOST_CATEGORIES = 1000  # of a column, so that the floor stays a small part


class Normal(NamedTuple):
    mean: Tensor  # [B, latent]
    std: Tensor  # [B, latent]


class Outcome(NamedTuple):
    """What the generative network says of each cell."""

    mean: Tensor  # [B, numbers]
    std: Tensor  # [B, numbers]
    chances: Tensor  # [B, categoricals, most categories] ln of probabilities; -inf where a column has fewer


class Bound(NamedTuple):
    """The parts of the bound on ln p(x_b | x_{1-b}, b), nats of each row or image [B]."""

    likelihood: Tensor  # ln p(x_b | z, x_{1-b}, b) of one z from the proposal
    kl: Tensor  # KL(q(z | x, b) || p(z | x_{1-b}, b))
    hyperprior: Tensor  # ln of what keeps the prior's parameters from running away

    @property
    def loss(self) -> Tensor:  # [B]
        return self.kl - self.likelihood - self.hyperprior


class Start(NamedTuple):
    """What the generative network's outputs are relative to."""

    mean: Tensor | float  # [B, numbers]
    std: Tensor | float  # [B, numbers]
    logits: Tensor | float  # [B, sum of sizes]


class Conditional(nn.Module):
    """What the networks of rows and of images share: bounds on ln p(x_b | x_{1-b}, b), and draws of x_b.

    A subclass tells, of what it has `_seen`, the `_prior` with what of its network the generative one uses, the
    `_proposal`, the `_outcome` of a z, its `_likelihood` [B], and what is `_drawn` of it.
    """

    def bound(self, x: Tensor, mask: Tensor, *, key: Key = None) -> Bound:
        """The evidence lower bound, its expectation estimated by one z."""
        seen = self._seen(x, mask)
        prior, memory = self._prior(seen)
        proposal = self._proposal(seen)
        z, kl = ops.rsample_normal_kl(proposal.mean, proposal.std, prior_mean=prior.mean, prior_std=prior.std, key=key)
        likelihood = self._likelihood(seen, self._outcome(z, memory))
        far = -prior.mean.square() / (2 * PRIOR_MEAN**2)
        return Bound(likelihood, kl, (far + PRIOR_STD * (prior.std.log() - prior.std)).sum(1))

    def importance_bound(self, x: Tensor, mask: Tensor, samples: int = 25, *, key: Key = None) -> Tensor:
        """The importance-weighted bound on ln p(x_b | x_{1-b}, b), nats of each [B].

        ln of the mean, over so many z from the proposal, of p(x_b | z, x_{1-b}, b) p(z | x_{1-b}, b) / q(z | x, b). In
        expectation it is never below the bound of fewer samples and never above the truth, to which it tends.
        Y. Burda, R. Grosse, R. Salakhutdinov, Importance Weighted Autoencoders, ICLR 2016, arXiv:1509.00519.
        """
        seen = self._seen(x, mask)
        prior, memory = self._prior(seen)
        proposal = self._proposal(seen)
        mean, std = (of.expand(samples, *of.shape) for of in proposal)
        z = ops.rsample_normal(mean, std, key=key)
        ratio = (log_normal(z, *prior) - log_normal(z, *proposal)).sum(-1)
        # One sample after the other: memory does not grow with their number.
        likelihood = torch.stack([self._likelihood(seen, self._outcome(one, memory)) for one in z])
        return torch.logsumexp(likelihood + ratio, 0) - math.log(samples)

    @torch.no_grad()
    def impute(self, x: Tensor, mask: Tensor, *, likeliest: bool = False, key: Key = None) -> Tensor:
        """x with each unobserved cell (mask True, or NaN) drawn given the observed ones; these stay as they are.

        Args:
            likeliest: the most probable value given z, which is drawn in any case.

        Values under the mask are not looked at.
        """
        seen = self._seen(x, mask)
        prior, memory = self._prior(seen)
        keys = counted_keys(3, x.device, key=key)
        outcome = self._outcome(ops.rsample_normal(*prior, key=keys[0]), memory)
        drawn = self._drawn(outcome, [] if likeliest else keys[1:])
        return torch.where(seen.hidden, drawn.to(x.dtype), x)

    def _seen(self, x: Tensor, mask: Tensor) -> Seen:
        return Seen(x, mask)

    def _prior(self, seen: Seen) -> tuple[Normal, list[Tensor]]:
        raise NotImplementedError

    def _proposal(self, seen: Seen) -> Normal:
        raise NotImplementedError

    def _outcome(self, z: Tensor, memory: Sequence[Tensor]) -> Any:
        raise NotImplementedError

    def _likelihood(self, seen: Seen, outcome: Any) -> Tensor:
        raise NotImplementedError

    def _drawn(self, outcome: Any, keys: Sequence[Tensor]) -> Tensor:
        """All of x given z: drawn with two keys, or, without any, the likeliest."""
        raise NotImplementedError


class VAEAC(Conditional):
    """Rows of numbers and categories, some of them unobserved: what the others say of these.

    Three networks of residual layers: the proposal q(z | x, b), the prior p(z | x_{1-b}, b), and the generative network
    p(x_b | z, x_{1-b}, b), whose layers also see the prior's, the last one first.

    Args:
        sizes: of each column, how many categories it has; 0 for a column of numbers (which are best standardised).
        width: of every layer.
        depth: residual layers of a network.
        latent: numbers of z.
        sigma: standard deviation of a number given z, the same for all; None: learned.
        least_sigma: floor of what is learned.
        slope: of the activation below 0.
        linear: begin as the joint normal distribution of the columns that `estimate` takes from the data, categories as
            ones among zeros: the networks see what it makes of hidden cells in place of zeros, and learn by what the
            truth is otherwise. A table of few rows is often told as well by no more than that.

    In every method x is [B, columns], float: a number, or the place of a category; NaN where the value is not known at
    all. ``mask`` is [B, columns], bool, and **True (b = 1) is UNOBSERVED**: such a cell is to be told from the others.
    A NaN is unobserved whatever its mask says, and never scored: no loss and no gradient depends on what it stands for.

    Deterministic, given torch's seed or a key; synchronises nowhere.
    O. Ivanov, M. Figurnov, D. Vetrov, Variational Autoencoder with Arbitrary Conditioning, ICLR 2019,
    arXiv:1806.02382. Unlike there: sigma may be learned (it was 1); the floor of a category's chance is that of a
    mixture with the uniform distribution, which has a gradient everywhere.
    """

    number: Tensor  # [numbers] columns of numbers
    categorical: Tensor  # [categoricals]
    place: Tensor  # [categoricals, most] of a category among all; 0 where a column has fewer
    absent: Tensor  # [categoricals, most] bool: where it has fewer
    present: Tensor  # [sum of sizes] places of the others in that table
    owner: Tensor  # [numbers + sum of sizes] the column of each encoded one
    widened: Tensor  # scalar

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        width: int = 256,
        depth: int = 10,
        latent: int = 64,
        sigma: float | None = None,
        least_sigma: float = 0.01,
        slope: float = 0.01,
        linear: bool = False,
    ) -> None:
        super().__init__()
        if not sizes or any(size < 0 or size == 1 or size > MOST_CATEGORIES for size in sizes):
            raise ValueError(f"sizes: expected 0 or 2 to {MOST_CATEGORIES} for each column, got {list(sizes)}")
        if width < 1 or latent < 1 or depth < 0:
            raise ValueError(f"width and latent must be at least 1, depth 0, got {width}, {latent} and {depth}")
        if not least_sigma > 0 or (sigma is not None and not sigma > 0):
            raise ValueError(f"sigma and least_sigma must be above 0, got {sigma} and {least_sigma}")
        self.sizes, self.latent = list(sizes), latent
        self.sigma, self.least_sigma, self.slope = sigma, least_sigma, slope
        self._index()
        numbers, columns, encoded = len(self.number), len(sizes), len(self.number) + sum(sizes)
        self.proposal = _layers([encoded + 2 * columns, *[width] * (depth + 1), 2 * latent])
        self.prior_network = _layers([encoded + columns, *[width] * (depth + 1), 2 * latent])
        self.first = nn.Linear(latent, width)
        outputs = (1 if sigma else 2) * numbers + sum(sizes)
        self.generator = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(depth)])
        self.last = nn.Linear(2 * width, outputs)
        self.gaussian = ConditionalGaussian(encoded) if linear else None
        # Factor of learned deviations, 1 unless it is set: what is learned from few rows is too sure of others.
        self.register_buffer("widened", torch.ones(()))
        if linear:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def _index(self) -> None:
        sizes = self.sizes
        kinds = torch.tensor([size > 0 for size in sizes])
        self.register_buffer("number", (~kinds).nonzero().flatten(), persistent=False)
        self.register_buffer("categorical", kinds.nonzero().flatten(), persistent=False)
        counts = torch.tensor([size for size in sizes if size], dtype=torch.int64)
        step = torch.arange(int(counts.max()) if len(counts) else 0)
        absent = step >= counts[:, None]
        place = (counts.cumsum(0) - counts)[:, None] + step
        self.register_buffer("place", place.masked_fill(absent, 0), persistent=False)
        self.register_buffer("absent", absent, persistent=False)
        self.register_buffer("present", (~absent).flatten().nonzero().flatten(), persistent=False)
        self.register_buffer(
            "owner", torch.cat([self.number, self.categorical.repeat_interleave(counts)]), persistent=False
        )

    def estimate(self, x: Tensor) -> None:
        """With `linear`: take the normal distribution of rows [N, columns], NaN for gaps. Not differentiable."""
        if self.gaussian is not None:
            unknown = x.isnan()
            self.gaussian.estimate(self._encoded(x, unknown).masked_fill(unknown[:, self.owner], math.nan))

    def _prior(self, seen: Seen) -> tuple[Normal, tuple[list[Tensor], Start]]:
        """The prior; and its network's layers for the generative one, with what this one's outputs are relative to."""
        inputs, start = self._guessed(seen.x, seen.hidden)
        layers = self._through(self.prior_network, torch.cat([inputs, seen.hidden.to(inputs)], 1))
        return normal(self.prior_network[-1](layers[-1])), (layers, start)

    def _proposal(self, seen: Seen) -> Normal:
        inputs, _ = self._guessed(seen.x, seen.unknown)
        layers = self._through(self.proposal, torch.cat([inputs, seen.hidden.to(inputs), seen.unknown.to(inputs)], 1))
        return normal(self.proposal[-1](layers[-1]))

    def _guessed(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Start]:
        """What networks are given of a row [B, numbers + sum of sizes]."""
        encoded = self._encoded(x, hidden)
        if self.gaussian is None:
            return encoded, Start(0.0, 1.0, 0.0)
        mean, std = self.gaussian(encoded, hidden[:, self.owner])
        numbers = len(self.number)
        return mean, Start(mean[:, :numbers], std[:, :numbers], mean[:, numbers:].clamp(min=LEAST_START).log())

    def _through(self, network: nn.ModuleList, x: Tensor) -> list[Tensor]:
        layers = [F.leaky_relu(network[0](x), self.slope)]
        for layer in network[1:-1]:
            layers.append(layers[-1] + F.leaky_relu(layer(layers[-1]), self.slope))
        return layers

    def _outcome(self, z: Tensor, memory: tuple[list[Tensor], Start]) -> Outcome:
        layers, start = memory
        x = F.leaky_relu(self.first(z), self.slope)
        for layer, seen in zip(self.generator, reversed(layers[1:]), strict=True):
            x = x + F.leaky_relu(layer(torch.cat([x, seen], 1)), self.slope)
        outputs = full(self.last(torch.cat([x, layers[0]], 1)))
        numbers = len(self.number)
        mean = start.mean + start.std * outputs[:, :numbers]
        if self.sigma is None:
            spread = outputs[:, numbers : 2 * numbers] + (0.0 if self.gaussian is None else UNIT)
            std = self.widened * (start.std * F.softplus(spread) + self.least_sigma)
            logits = outputs[:, 2 * numbers :]
        else:
            std, logits = torch.full_like(mean, self.sigma), outputs[:, numbers:]
        return Outcome(mean, std, self._chances(start.logits + logits))

    def _chances(self, logits: Tensor) -> Tensor:
        if not len(self.categorical):
            return logits.new_zeros(len(logits), 0, 0)
        chance = logits[:, self.place].masked_fill(self.absent, -math.inf).softmax(-1)
        size = (~self.absent).sum(-1, keepdim=True)
        mixed = chance * (1 - LEAST_CHANCE * size) + LEAST_CHANCE
        return mixed.log().masked_fill(self.absent, -math.inf)

    def _likelihood(self, seen: Seen, outcome: Outcome) -> Tensor:
        scored = (seen.hidden & ~seen.unknown).to(outcome.mean.dtype)
        known = torch.where(seen.unknown, 0.0, seen.x)
        found = (log_normal(known[:, self.number], outcome.mean, outcome.std) * scored[:, self.number]).sum(1)
        if len(self.categorical):
            place = known[:, self.categorical].long()[:, :, None]
            chance = outcome.chances.gather(2, place)[:, :, 0]
            found = found + (chance * scored[:, self.categorical]).sum(1)
        return found

    def _drawn(self, outcome: Outcome, keys: Sequence[Tensor]) -> Tensor:
        mean, chances = outcome.mean, outcome.chances
        if keys:
            mean = ops.rsample_normal(mean, outcome.std, key=keys[0])
            chances = chances + ops.noise("gumbel", chances.shape, dtype=mean.dtype, device=mean.device, key=keys[1])
        drawn = mean.new_empty(len(mean), len(self.sizes))
        drawn[:, self.number] = mean
        if len(self.categorical):
            drawn[:, self.categorical] = chances.argmax(-1).to(mean.dtype)
        return drawn

    def _encoded(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Numbers, and categories as ones among zeros; zeros alone where hidden. [B, numbers + sum of sizes]"""
        numbers = torch.where(hidden, 0.0, x)[:, self.number]
        if not len(self.categorical):
            return numbers
        place = torch.where(hidden, -1.0, x)[:, self.categorical].long()
        steps = torch.arange(self.place.shape[1], device=x.device)
        ones = place[:, :, None] == steps
        return torch.cat([numbers, ones.flatten(1)[:, self.present].to(x.dtype)], 1)


class Seen:
    """x and what of it is hidden from the prior, and from everyone."""

    def __init__(self, x: Tensor, mask: Tensor) -> None:
        if mask.shape != x.shape or mask.dtype != torch.bool:
            raise ValueError(f"mask: expected bool {list(x.shape)}, got {mask.dtype} {list(mask.shape)}")
        self.x, self.unknown = x, x.isnan()
        self.hidden = mask | self.unknown


def _layers(widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])


def full(x: Tensor) -> Tensor:
    """What is scored stays float32 under autocast."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def normal(moments: Tensor) -> Normal:
    mean, spread = full(moments).chunk(2, 1)
    return Normal(mean, F.softplus(spread).clamp(min=LEAST_STD))


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
