"""Variational autoencoders of images in black and white: plain, of a label, and with a category in the code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.models.vaeac import Normal, full
from fastnuggets.ops.sample import Key


class Bound(NamedTuple):
    """The parts of the evidence lower bound on ln p(x), nats of each row [B]: likelihood - kl is never above it in
    expectation."""

    likelihood: Tensor  # ln p(x | z) of one z from q(z | x)
    kl: Tensor  # KL(q(z | x) || p(z))

    @property
    def loss(self) -> Tensor:  # [B]
        return self.kl - self.likelihood


class JointBound(NamedTuple):
    """As :class:`Bound`, of a code of numbers and a category."""

    likelihood: Tensor  # ln p(x | z, c)
    kl: Tensor  # KL(q(z | x) || p(z))
    category_kl: Tensor  # KL(q(c | x) || uniform), from 0 to ln categories

    @property
    def loss(self) -> Tensor:  # [B]
        return self.kl + self.category_kl - self.likelihood


class Code(NamedTuple):
    """What the encoder of :class:`JointVAE` makes of images."""

    mean: Tensor  # [B, latent]
    std: Tensor  # [B, latent]
    chances: Tensor  # [B, categories] of the category


class _Autoencoder(nn.Module):
    """The two networks, and what all of these models do with them. `told` [B, T] goes into both; T may be 0."""

    def __init__(self, pixels: int, latent: int, hidden: Sequence[int], *, told: int = 0, categories: int = 0) -> None:
        super().__init__()
        if pixels < 1 or latent < 1 or not hidden or min(hidden) < 1:
            raise ValueError(f"pixels, latent and hidden must be at least 1, got {pixels}, {latent} and {list(hidden)}")
        self.pixels, self.latent, self.categories = pixels, latent, categories
        self.encoder = _layers([pixels + told, *hidden, 2 * latent + categories])
        self.decoder = _layers([latent + told + categories, *reversed(hidden), pixels])

    # ops, not nn.GaussianEncoder, whose code in evaluation mode is the mean: a bound is of draws in any mode.
    def _encode(self, x: Tensor, told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mean and ln variance of z [B, latent], logits of the category [B, categories]; float32 under autocast."""
        if x.dim() != 2 or x.shape[1] != self.pixels or not x.is_floating_point():
            raise ValueError(f"x: expected float [B, {self.pixels}], got {x.dtype} {list(x.shape)}")
        out = full(self.encoder(torch.cat([x, told], 1)))
        mean, logvar, logits = out.split([self.latent, self.latent, self.categories], 1)
        return mean, logvar, logits

    def _decode(self, z: Tensor, told: Tensor) -> Tensor:
        """Logits of the pixels."""
        return full(self.decoder(torch.cat([z, told], -1)))

    def _score(self, x: Tensor, z: Tensor, told: Tensor) -> Tensor:
        """ln p(x | z) [B]"""
        return _log_bernoulli(x, self._decode(z, told))

    def _bound(self, x: Tensor, told: Tensor, key: Key) -> Bound:
        mean, logvar, _ = self._encode(x, told)
        z, kl = ops.rsample_normal_kl(mean, logvar, form="logvar", key=key)
        return Bound(self._score(x, z, told), kl)

    def _importance(self, x: Tensor, told: Tensor, samples: int, key: Key) -> Tensor:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        mean, logvar, _ = self._encode(x, told)
        z = ops.rsample_normal(*(of.expand(samples, *of.shape) for of in (mean, logvar)), form="logvar", key=key)
        ratio = ((z - mean).square() / logvar.exp() + logvar - z.square()).sum(-1) / 2  # ln p(z) - ln q(z | x)
        # One sample after the other: without a gradient, memory does not grow with their number.
        likelihood = torch.stack([self._score(x, one, told) for one in z])
        return torch.logsumexp(likelihood + ratio, 0) - math.log(samples)

    def _sample(self, told: Tensor, expected: bool, keys: Sequence[Tensor]) -> Tensor:
        """One image a row of what the decoder is told, of two keys."""
        z = ops.noise("normal", [len(told), self.latent], dtype=told.dtype, device=told.device, key=keys[0])
        chances = self._decode(z, told).sigmoid()
        if expected:
            return chances
        level = ops.noise("uniform", chances.shape, dtype=chances.dtype, device=told.device, key=keys[1])
        return (level < chances).to(chances.dtype)

    def _ones(self, places: Tensor, size: int, name: str) -> Tensor:
        """Places [B] as ones among zeros [B, size]."""
        if places.dim() != 1 or places.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 [B], got {places.dtype} {list(places.shape)}")
        return F.embedding(places, self._every(size))  # checks the range without a synchronisation

    def _every(self, size: int) -> Tensor:
        weight = next(self.parameters())
        return torch.eye(size, dtype=weight.dtype, device=weight.device)

    def _nothing(self, count: int) -> Tensor:
        return next(self.parameters()).new_empty(count, 0)


class VAE(_Autoencoder):
    """Image -> normal code -> image. The prior of the code is the standard normal.

    Linear layers with ReLU between them. A pixel is a Bernoulli variable given the code, as these are images in black
    and white: 1 is ink, and the bounds are on the logarithm of a probability. Greys between 0 and 1 are accepted, and
    the cross-entropy that they give is much in use, but no probability of anything: nats of it compare with nothing.

    Args:
        pixels: of an image.
        latent: numbers of a code.
        hidden: widths of the encoder's layers; the decoder mirrors them.

    In every method x is [B, pixels], float, in [0, 1]. Types follow the weights', half types become float32. Training
    and evaluation mode are the same: bounds draw in both. Errors are ValueError that name the argument.
    Deterministic, given torch's seed or a key; synchronises nowhere. Bounds are differentiable.
    D. Kingma, M. Welling, Auto-Encoding Variational Bayes, ICLR 2014, arXiv:1312.6114.
    """

    def __init__(self, pixels: int, *, latent: int = 16, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__(pixels, latent, hidden)

    def bound(self, x: Tensor, *, key: Key = None) -> Bound:
        """The evidence lower bound on ln p(x), its expectation estimated by one z."""
        return self._bound(x, self._nothing(len(x)), key)

    def importance_bound(self, x: Tensor, samples: int = 100, *, key: Key = None) -> Tensor:
        """The importance-weighted bound on ln p(x), nats of each row [B].

        ln of the mean of p(x | z) p(z) / q(z | x) over so many z from q(z | x), 1 or more. In expectation that of one
        is :meth:`bound`, that of more is never below it, and none is above the truth, to which it tends.
        Y. Burda, R. Grosse, R. Salakhutdinov, Importance Weighted Autoencoders, ICLR 2016, arXiv:1509.00519.
        """
        return self._importance(x, self._nothing(len(x)), samples, key)

    @torch.no_grad()
    def sample(self, count: int, *, expected: bool = False, key: Key = None) -> Tensor:
        """Images [count, pixels] drawn from the model, of zeros and ones.

        Args:
            expected: the chances of ink given the drawn code in place of pixels that are drawn too.
        """
        told = self._nothing(count)
        return self._sample(told, expected, _keys(told.device, key, 2))

    def encode(self, x: Tensor) -> Normal:
        """Mean and standard deviation of q(z | x), each [B, latent]."""
        mean, logvar, _ = self._encode(x, self._nothing(len(x)))
        return Normal(mean, (logvar / 2).exp())

    def decode(self, z: Tensor) -> Tensor:
        """Codes [B, latent] -> chances of ink [B, pixels]."""
        return self._decode(z, self._nothing(len(z))).sigmoid()

    def reconstruct(self, x: Tensor) -> Tensor:
        """Chances of ink [B, pixels] given the mean of the code."""
        return self.decode(self.encode(x).mean)


class ConditionalVAE(_Autoencoder):
    """:class:`VAE` of images with labels: q(z | x, y) and p(x | z, y), and bounds on ln p(x | y).

    The label, as ones among zeros, goes into both networks beside their other input; the prior of z is the same for
    all labels.

    Args:
        pixels, latent, hidden: as there.
        classes: how many labels there are, 2 or more.

    y is [B], int64, from 0 to classes - 1: others are an IndexError on a CPU and an assertion on a GPU. All else, the
    methods' results too, is as there.
    K. Sohn, H. Lee, X. Yan, Learning Structured Output Representation using Deep Conditional Generative Models,
    NeurIPS 2015. There the prior sees the condition too, an image; a label leaves it little to say.
    """

    def __init__(self, pixels: int, classes: int, *, latent: int = 16, hidden: Sequence[int] = (256, 256)) -> None:
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        super().__init__(pixels, latent, hidden, told=classes)
        self.classes = classes

    def bound(self, x: Tensor, y: Tensor, *, key: Key = None) -> Bound:
        """The evidence lower bound on ln p(x | y), its expectation estimated by one z."""
        return self._bound(x, self._told(y, len(x)), key)

    def importance_bound(self, x: Tensor, y: Tensor, samples: int = 100, *, key: Key = None) -> Tensor:
        """The importance-weighted bound on ln p(x | y), nats of each row [B]; see :meth:`VAE.importance_bound`."""
        return self._importance(x, self._told(y, len(x)), samples, key)

    @torch.no_grad()
    def sample(self, y: Tensor, *, expected: bool = False, key: Key = None) -> Tensor:
        """An image for each label, [B, pixels]; see :meth:`VAE.sample`."""
        return self._sample(self._told(y, len(y)), expected, _keys(y.device, key, 2))

    def encode(self, x: Tensor, y: Tensor) -> Normal:
        """Mean and standard deviation of q(z | x, y), each [B, latent]."""
        mean, logvar, _ = self._encode(x, self._told(y, len(x)))
        return Normal(mean, (logvar / 2).exp())

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Codes [B, latent] and labels -> chances of ink [B, pixels]."""
        return self._decode(z, self._told(y, len(z))).sigmoid()

    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """Chances of ink [B, pixels] given the label and the mean of the code."""
        return self.decode(self.encode(x, y).mean, y)

    def _told(self, y: Tensor, count: int) -> Tensor:
        if y.shape != (count,):
            raise ValueError(f"y: expected [{count}], a label a row, got {list(y.shape)}")
        return self._ones(y, self.classes, "y")


class JointVAE(_Autoencoder):
    """:class:`VAE` whose code is numbers and a category c, uniform a priori: p(x | z, c), q(z | x) q(c | x).

    :meth:`relaxed` is to be trained with: c is a draw of the Concrete distribution, a point inside the simplex, and so
    has a gradient. Its likelihood is of codes that the model, of whole categories, does not have: the sum of its parts
    is no bound on ln p(x), and may be above it. :meth:`bound` is one: it sums over all categories, and decodes as
    often. So does :meth:`importance_bound`.

    Args:
        pixels, latent, hidden: as there.
        categories: how many c may be, 2 or more.

    E. Dupont, Learning Disentangled Joint Continuous and Discrete Representations, NeurIPS 2018, arXiv:1804.00104;
    the relaxation: C. Maddison, A. Mnih, Y. Teh, The Concrete Distribution, ICLR 2017, arXiv:1611.00712. There images
    are greys and the networks convolutional. Otherwise as there.
    """

    def __init__(
        self, pixels: int, categories: int = 10, *, latent: int = 10, hidden: Sequence[int] = (256, 256)
    ) -> None:
        if categories < 2:
            raise ValueError(f"categories must be at least 2, got {categories}")
        super().__init__(pixels, latent, hidden, categories=categories)

    def relaxed(self, x: Tensor, tau: float = 0.67, *, key: Key = None) -> JointBound:
        """What is trained with, estimated by one z and one relaxed c; the divergences are exact. No bound on ln p(x).

        Args:
            tau: temperature of the relaxation, above 0: towards 0 c is a whole category, and has no useful gradient.
        """
        mean, logvar, logits = self._encode(x, self._nothing(len(x)))
        keys = _keys(x.device, key, 2)
        z, kl = ops.rsample_normal_kl(mean, logvar, form="logvar", key=keys[0])
        c = ops.gumbel_softmax(logits, tau, key=keys[1])
        return JointBound(_log_bernoulli(x, self._decode(z, c)), kl, _kl_uniform(logits))

    def capacity_loss(
        self, parts: JointBound, capacity: float, category_capacity: float, *, gamma: float = 30.0
    ) -> Tensor:
        """Mean of -likelihood + gamma |KL - capacity| for either kind of code, scalar, nats; what the paper minimises.

        The divergences are means over the rows before they are compared. The capacities, 0 or more nats, are to grow
        linearly from 0 in training; the categories' counts no further than ln categories, the most there can be.
        Being sure is enough to raise the category's divergence: where its capacity grows faster than the decoder learns
        to use it, many rows end in few categories, which a smaller gamma and a slower growth avoid.
        """
        if min(capacity, category_capacity, gamma) < 0:
            raise ValueError(f"capacities and gamma must be at least 0, got {capacity}, {category_capacity}, {gamma}")
        far = (parts.kl.mean() - capacity).abs()
        category_far = (parts.category_kl.mean() - min(category_capacity, math.log(self.categories))).abs()
        return gamma * (far + category_far) - parts.likelihood.mean()

    def bound(self, x: Tensor, *, key: Key = None) -> JointBound:
        """The evidence lower bound on ln p(x): one z, and the exact expectation over the categories."""
        mean, logvar, logits = self._encode(x, self._nothing(len(x)))
        z, kl = ops.rsample_normal_kl(mean, logvar, form="logvar", key=key)
        return JointBound((logits.softmax(1) * self._each(x, z)).sum(1), kl, _kl_uniform(logits))

    def importance_bound(self, x: Tensor, samples: int = 100, *, key: Key = None) -> Tensor:
        """The importance-weighted bound on ln p(x), nats of each row [B]; see :meth:`VAE.importance_bound`.

        Each sample is of z alone, and its p(x | z) is the mean over all categories: that of one sample is already
        above :meth:`bound`.
        """
        return self._importance(x, self._nothing(len(x)), samples, key)

    @torch.no_grad()
    def sample(self, count: int, *, expected: bool = False, key: Key = None) -> Tensor:
        """Images [count, pixels], their categories drawn too; see :meth:`VAE.sample`."""
        device = next(self.parameters()).device
        *keys, last = _keys(device, key, 3)
        gumbel = ops.noise("gumbel", [count, self.categories], device=device, key=last)
        return self._sample(self._ones(gumbel.argmax(1), self.categories, "c"), expected, keys)

    def encode(self, x: Tensor) -> Code:
        mean, logvar, logits = self._encode(x, self._nothing(len(x)))
        return Code(mean, (logvar / 2).exp(), logits.softmax(1))

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """Codes [B, latent] and categories [B], int64 -> chances of ink [B, pixels]."""
        if c.shape != (len(z),):
            raise ValueError(f"c: expected [{len(z)}], a category a row, got {list(c.shape)}")
        return self._decode(z, self._ones(c, self.categories, "c")).sigmoid()

    def reconstruct(self, x: Tensor) -> Tensor:
        """Chances of ink [B, pixels] given the mean of the numbers and the likeliest category."""
        code = self.encode(x)
        return self.decode(code.mean, code.chances.argmax(1))

    def _each(self, x: Tensor, z: Tensor) -> Tensor:
        """ln p(x | z, c) of every c, [B, categories]"""
        every, size = self._every(self.categories), [len(z), self.categories, -1]
        return _log_bernoulli(x[:, None], self._decode(z[:, None].expand(size), every.expand(size)))

    def _score(self, x: Tensor, z: Tensor, told: Tensor) -> Tensor:
        return torch.logsumexp(self._each(x, z), 1) - math.log(self.categories)


def _layers(widths: Sequence[int]) -> nn.Sequential:
    made: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        made += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*made[:-1])


def _log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """ln p(x), the last axis summed."""
    return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits).to(logits.dtype), reduction="none").sum(-1)


def _kl_uniform(logits: Tensor) -> Tensor:
    """KL(Categorical(logits) || uniform) [B]"""
    log = logits.log_softmax(1)
    return (log.exp() * log).sum(1) + math.log(logits.shape[1])


def _keys(device: torch.device, key: Key, count: int) -> list[Tensor]:
    """Independent keys from one, the others far off: the caller's next key may be the next offset."""
    first = ops.noise_key(device, key=key)
    return [first ^ (i << 60) for i in range(count)]
