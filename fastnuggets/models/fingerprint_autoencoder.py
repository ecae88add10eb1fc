"""druGAN's autoencoders of fingerprints, one network under two regularizers (Kadurin et al., Mol. Pharm. 14, 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.nn import GaussianEncoder
from fastnuggets.ops.sample import Key

BIAS = 0.1  # that every layer begins with


class FingerprintAutoencoder(nn.Module):
    """Bits -> code -> logits of the bits. A subclass makes the code and says what keeps it where the prior is.

    Linear layers, each but the last of a side followed by the activation and a batch norm, in that order. The prior
    is normal, with mean 0.

    Args:
        bits: of a fingerprint.
        latent: numbers of a code.
        hidden: widths of the encoder's layers; the decoder mirrors them.
        prior_std: standard deviation of the prior, > 0.

    Deterministic, given torch's seed or a key. In training mode a batch's statistics are used: it needs two rows.
    A. Kadurin et al., druGAN, Molecular Pharmaceutics 14 (9), 2017, doi:10.1021/acs.molpharmaceut.7b00346.
    """

    activation: type[nn.Module]

    def __init__(
        self, bits: int = 166, *, latent: int, hidden: Sequence[int] = (256, 256), prior_std: float = 1.0
    ) -> None:
        super().__init__()
        if bits < 1 or latent < 1 or not hidden or min(hidden) < 1:
            raise ValueError(f"bits, latent and hidden must be at least 1, got {bits}, {latent} and {list(hidden)}")
        if not prior_std > 0:
            raise ValueError(f"prior_std must be above 0, got {prior_std}")
        self.bits, self.latent, self.prior_std = bits, latent, prior_std
        self.body = layers([bits, *hidden], self.activation)
        self.decoder = nn.Sequential(*layers([latent, *reversed(hidden)], self.activation), nn.Linear(hidden[0], bits))

    def forward(self, x: Tensor, *, key: Key = None) -> Tensor:
        """Bits [B, bits] float, 0 and 1 -> logits of the same shape."""
        return self.decode(self.encode(x, key=key))

    def encode(self, x: Tensor, *, key: Key = None) -> Tensor:
        """Bits [B, bits] float -> codes [B, latent]. The key is of what is drawn, if anything is."""
        raise NotImplementedError

    def decode(self, code: Tensor) -> Tensor:
        """Codes [B, latent] -> logits [B, bits]."""
        logits: Tensor = self.decoder(code)
        return logits

    def prior(self, count: int, *, key: Key = None) -> Tensor:
        """Codes [count, latent] drawn from the prior, on the weights' device."""
        device = next(self.parameters()).device
        return ops.noise("normal", [count, self.latent], scale=self.prior_std, device=device, key=key)


class FingerprintVAE(FingerprintAutoencoder):
    """The codes are normal, and their divergence from the prior is what is paid for them. ReLU.

    In training mode a code is a draw, otherwise the mean.
    """

    activation = nn.ReLU

    def __init__(
        self, bits: int = 166, *, latent: int = 10, hidden: Sequence[int] = (256, 256), prior_std: float = 1.0
    ) -> None:
        super().__init__(bits, latent=latent, hidden=hidden, prior_std=prior_std)
        self.head = GaussianEncoder(hidden[-1], latent, prior_std=prior_std)
        begin(self)

    def encode(self, x: Tensor, *, key: Key = None) -> Tensor:
        return self.divergence(x, key=key)[0]

    def divergence(self, x: Tensor, *, key: Key = None) -> tuple[Tensor, Tensor]:
        """Bits [B, bits] -> codes [B, latent], and their KL from the prior [B] in nats."""
        code, kl = self.head(self.body(x), key=key)
        return code, kl


class FingerprintAAE(FingerprintAutoencoder):
    """A discriminator tells codes from draws of the prior, and the encoder learns to fool it. tanh.

    The discriminator has layers of 64, 64 and 8. It always sees codes and draws in one batch, so that its batch norms
    know both: with a batch of codes alone they would take away the mean and spread that it is to judge.
    A. Makhzani et al., Adversarial Autoencoders, arXiv:1511.05644.
    """

    activation = nn.Tanh

    def __init__(
        self, bits: int = 166, *, latent: int = 20, hidden: Sequence[int] = (256, 256), prior_std: float = 1.0
    ) -> None:
        super().__init__(bits, latent=latent, hidden=hidden, prior_std=prior_std)
        self.head = nn.Linear(hidden[-1], latent)
        self.discriminator = nn.Sequential(*layers([latent, 64, 64, 8], nn.Tanh), nn.Linear(8, 1))
        begin(self)

    def encode(self, x: Tensor, *, key: Key = None) -> Tensor:
        code: Tensor = self.head(self.body(x))
        return code


def layers(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear, activation, batch norm, again and again."""
    made: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        made += [nn.Linear(inside, outside), activation(), nn.BatchNorm1d(outside)]
    return nn.Sequential(*made)


def begin(model: nn.Module) -> None:
    """druGAN's first weights: normal of variance 1 / inputs."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.constant_(module.bias, BIAS)


def bits_loss(logits: Tensor, x: Tensor) -> Tensor:
    """-ln p(x) of each row's bits [B], in nats: the cross-entropy summed over bits."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def discriminator_loss(discriminator: nn.Module, code: Tensor, prior: Tensor) -> Tensor:
    """Cross-entropy of telling codes from draws of the prior, scalar. ln 2 = 0.693 for who cannot.

    Through `code` it has no gradient.
    """
    real = torch.cat([torch.zeros(len(code), 1), torch.ones(len(prior), 1)]).to(code)
    logits = discriminator(torch.cat([code.detach(), prior]))
    return F.binary_cross_entropy_with_logits(logits, real)


def encoder_loss(discriminator: nn.Module, code: Tensor, prior: Tensor) -> Tensor:
    """-ln of how far the discriminator takes codes for draws of the prior, scalar: what the encoder minimises.

    It does not saturate where the discriminator is sure (Goodfellow et al., arXiv:1406.2661).
    """
    logits = discriminator(torch.cat([code, prior]))[: len(code)]
    return F.softplus(-logits).mean()
