"""Cornucopia's conditional adversarial autoencoder of fingerprints (Kadurin et al., Oncotarget 8:10883, 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.ops.sample import Key


class Code(NamedTuple):
    """What the encoder makes of a fingerprint."""

    latent: Tensor  # [B, latent]: where the prior is to be
    condition: Tensor  # [B]: its estimate of the property, in standard deviations from the mean


class Decoded(NamedTuple):
    """What the decoder makes of a code."""

    logits: Tensor  # [B, bits]
    dose: Tensor | None  # [B], standardised; None without one


class ConditionalAAE(nn.Module):
    """Bits and a dose -> latents and a property -> bits and the dose.

    One neuron of the code is trained to be a property of the molecule, such as its activity; at generation it is set
    by hand. The discriminator sees the other neurons alone. The paper's dose is the logarithm of the concentration
    that the activity was measured at; where nothing of the kind is known, there is no such input.

    Args:
        bits: of a fingerprint.
        dosed: whether there is a dose.
        latent: numbers of a code, without the property.
        hidden: widths of the encoder's layers, batch norm and ReLU after each; the decoder mirrors them, with tanh.
        prior_std: standard deviation of the prior, > 0.

    Deterministic. In training mode a batch's statistics are used: it needs two rows.
    """

    def __init__(
        self,
        bits: int = 166,
        *,
        dosed: bool = False,
        latent: int = 4,
        hidden: Sequence[int] = (128, 64),
        prior_std: float = 1.0,
    ) -> None:
        super().__init__()
        if bits < 1 or latent < 1 or not hidden or min(hidden) < 1:
            raise ValueError(f"bits, latent and hidden must be at least 1, got {bits}, {latent} and {list(hidden)}")
        if not prior_std > 0:
            raise ValueError(f"prior_std must be above 0, got {prior_std}")
        self.bits, self.dosed, self.latent, self.prior_std = bits, dosed, latent, prior_std
        # The norm before the ReLU: after it, a feature that is 0 for all but a few molecules is enormous for those.
        outer = [
            module
            for inside, outside in pairwise([bits + dosed, *hidden])
            for module in (nn.Linear(inside, outside), nn.BatchNorm1d(outside), nn.ReLU())
        ]
        self.encoder = nn.Sequential(*outer, nn.Linear(hidden[-1], latent + 1))
        mirrored = [latent + 1, *reversed(hidden)]
        inner = [module for inside, outside in pairwise(mirrored) for module in (nn.Linear(inside, outside), nn.Tanh())]
        self.decoder = nn.Sequential(*inner, nn.Linear(hidden[0], bits + dosed))
        self.discriminator = nn.Sequential(nn.Linear(latent, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: Tensor, dose: Tensor | None = None) -> Decoded:
        """Bits [B, bits] float, 0 and 1, and doses [B], if there are any."""
        return self.decode(*self.encode(x, dose))

    def encode(self, x: Tensor, dose: Tensor | None = None) -> Code:
        if (dose is not None) != self.dosed:
            raise ValueError(f"dose: this network is {'' if self.dosed else 'not '}made for one")
        out = self.encoder(x if dose is None else torch.cat([x, dose[:, None]], 1))
        return Code(out[:, :-1], out[:, -1])

    def decode(self, latent: Tensor, condition: Tensor) -> Decoded:
        """Latents [B, latent] and properties [B], standardised."""
        out = self.decoder(torch.cat([latent, condition[:, None]], 1))
        return Decoded(out[:, : self.bits], out[:, self.bits] if self.dosed else None)

    def prior(self, count: int, *, key: Key = None) -> Tensor:
        """Latents [count, latent] drawn from the prior, on the weights' device."""
        device = next(self.parameters()).device
        return ops.noise("normal", [count, self.latent], scale=self.prior_std, device=device, key=key)


def manifold_loss(latent: Tensor, other: Tensor) -> Tensor:
    """Mean of 1 - cosine of two latents [B, latent] of a molecule at two doses, scalar; 0 where they are alike."""
    return (1 - F.cosine_similarity(latent, other)).mean()
