"""SMILES to a code and back: the variational and the adversarial autoencoder of the MOSES benchmark."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastnuggets import nn as fnn
from fastnuggets import ops
from fastnuggets.models.char_rnn import nats
from fastnuggets.models.smiles_aae import SmilesAAE
from fastnuggets.models.smiles_vae import SmilesVAE
from fastnuggets.molecules.vocabulary import Strings
from fastnuggets.systems.base import Draw, option
from fastnuggets.systems.smiles import HELD, SAMPLE, Batch, SmilesData, SmilesSettings, SmilesSystem, halved, prior
from fastnuggets.training.fit import Update

_PAPER = "settings of MOSES, Polykovskiy et al., doi:10.3389/fphar.2020.565644"


class SmilesAutoencoderSystem(SmilesSystem):
    """What is asked of both."""

    model: SmilesVAE | SmilesAAE

    def code(self, batch: Batch) -> Tensor:
        """[B, Z], without noise."""
        raise NotImplementedError

    def write(self, count: int, *, temperature: float, key: Tensor) -> Tensor:
        # A key's offsets count the characters; this one is that of none.
        codes = prior(count, self.model.latent, key + torch.tensor([0, 2**31], device=key.device))
        return self.model.sample(codes, length=self.settings.max_length, temperature=temperature, key=key)

    @torch.no_grad()
    def reconstructed(self, strings: Strings) -> float:
        """Share of molecules whose code is written back to the same SMILES, by the likeliest characters."""
        same = 0
        for batch in self.each(strings):
            length = int(batch.lengths[0])
            written = self.model.sample(self.code(batch), length=length, temperature=0)
            same += int((batch.tokens[1:] == written.T).all(0).sum())
        return same / len(strings)


@dataclasses.dataclass(frozen=True)
class SmilesVAESettings(SmilesSettings):
    epochs: int = option(100, "passes over the training set")
    batch_size: int = option(512, "molecules in a step, of all processes together")
    learning_rate: float = option(3e-4, "of Adam, where each period begins")
    final_rate: float = option(3e-4, "learning rate where each period ends; between them a cosine")
    period: int = option(10, "epochs after which the learning rate begins again")
    kl_begin: float = option(0.0, "weight of the KL divergence in the first epoch")
    kl_end: float = option(0.05, "weight that it grows to, in equal parts from epoch to epoch")
    kl_start: int = option(1, "epoch from which it grows, counted from 1")
    clip: float = option(50.0, "largest norm of the gradient")
    encoder: int = option(256, "features of the GRU that reads")
    hidden: int = option(512, "features of a layer of the GRU that writes")
    layers: int = option(3, "of the GRU that writes")
    latent: int = option(128, "numbers of a code")


class SmilesVAESystem(SmilesAutoencoderSystem):
    """The loss is in nats for a character, the KL divergence, whole, in nats for a molecule, as MOSES weighs them."""

    summary = "Variational autoencoder of SMILES: GRU to GRU"
    paper = f"Gómez-Bombarelli et al., doi:10.1021/acscentsci.7b00572; {_PAPER}"
    Settings = SmilesVAESettings
    settings: SmilesVAESettings
    model: SmilesVAE

    def __init__(self, settings: SmilesVAESettings, facts: dict[str, Any]) -> None:
        model = SmilesVAE(
            len(facts["vocabulary"]),
            encoder=settings.encoder,
            hidden=settings.hidden,
            layers=settings.layers,
            latent=settings.latent,
        )
        self._begin(settings, facts, model)
        self.adam = torch.optim.Adam(model.parameters(), settings.learning_rate)

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return [self.adam]

    def schedule(self, step: int, steps: int) -> float:
        s = self.settings
        epoch = step * s.epochs // steps
        end = s.final_rate / s.learning_rate
        return end + (1 - end) * (1 + math.cos(math.pi * (epoch % s.period) / s.period)) / 2

    def kl_weight(self, epoch: int) -> float:
        """Of an epoch, counted from 0: the last one is one part short of `kl_end`, as in MOSES."""
        s = self.settings
        done = max(0, epoch - (s.kl_start - 1)) / max(1, s.epochs - (s.kl_start - 1))
        return s.kl_begin + (s.kl_end - s.kl_begin) * done

    def updates(self, data: SmilesData, step: int, draw: Draw) -> Iterator[Update]:
        batch = self.batch(data, step, draw)
        written, kl = self._losses(batch)
        loss = self.per_character(written) + self.kl_weight(step // self.batches) * kl.mean()
        yield Update("loss", self.adam, loss, clip=self.settings.clip)

    def validate(self, data: SmilesData) -> dict[str, float]:
        written, kl, characters = self._measured(data.held, HELD, seed=0)
        shares = {"reconstructed": self.reconstructed(data.held.take(np.arange(min(SAMPLE, len(data.held)))))}
        # Of the weight at the end, so that it is the same thing throughout.
        loss = written / characters + self.settings.kl_end * kl
        return {"loss": loss, "per_character": written / characters, "kl": kl, **shares, **self.sampled(data)}

    def evaluate(self, path: Path, *, seed: int = 0) -> dict[str, float]:
        """The nats are a bound: ln p of a molecule is not less than minus so many, on average."""
        strings, figures = self.other(path)
        written, kl, characters = self._measured(strings, len(strings), seed)
        return {
            "nats_per_character": (written + kl) / characters,
            "nats_per_molecule": written + kl,
            "kl": kl,
            "reconstructed": self.reconstructed(strings),
            **figures,
        }

    def _losses(self, batch: Batch, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-ln p of each molecule given a draw of its code [B], and the KL divergence of the code [B]."""
        codes, kl = self.model.encode(batch.tokens, (batch.lengths + 1).to(batch.tokens.device), key=key)
        return nats(self.model.decode(batch.inputs, codes), batch.targets), kl

    @torch.no_grad()
    def _measured(self, strings: Strings, most: int, seed: int) -> tuple[float, float, float]:
        """Means over molecules: -ln p given the code, KL divergence, characters with the end."""
        strings = strings.take(np.arange(min(most, len(strings))))
        written, divergence = 0.0, 0.0
        with fnn.sampling(self.model):
            for number, batch in enumerate(self.each(strings)):
                losses, kl = self._losses(batch, torch.tensor([seed, number], device=self.device))
                written += float(losses.double().sum())
                divergence += float(kl.double().sum())
        count = len(strings)
        return written / count, divergence / count, float((strings.lengths - 1).mean())

    def code(self, batch: Batch) -> Tensor:
        return self.model.encode(batch.tokens, (batch.lengths + 1).to(batch.tokens.device))[0]


@dataclasses.dataclass(frozen=True)
class SmilesAAESettings(SmilesSettings):
    epochs: int = option(120, "passes over the training set")
    batch_size: int = option(512, "molecules in a batch, of all processes together")
    turns: int = option(1, "batches of the discriminator for one of the autoencoder")
    halve: int = option(20, "epochs after which the learning rates halve")
    clamp: float = option(5.0, "largest size of a number in a gradient")
    embedding: int = option(32, "features of a token")
    encoder: int = option(512, "features of each direction of the LSTM that reads")
    hidden: int = option(512, "features of a layer of the LSTM that writes")
    layers: int = option(2, "of the LSTM that writes")
    latent: int = option(128, "numbers of a code")


class SmilesAAESystem(SmilesAutoencoderSystem):
    """A step is a turn of the autoencoder, which is to write SMILES and to have its codes taken for the prior's, and
    the turns of the discriminator that follow, each on a batch of its own.

    What MOSES' own training does otherwise: a fault makes it move the embedding twice a turn.
    """

    summary = "Adversarial autoencoder of SMILES: LSTM to LSTM"
    paper = f"Polykovskiy et al., doi:10.1021/acs.molpharmaceut.8b00839; {_PAPER}"
    Settings = SmilesAAESettings
    settings: SmilesAAESettings
    model: SmilesAAE

    def __init__(self, settings: SmilesAAESettings, facts: dict[str, Any]) -> None:
        model = SmilesAAE(
            len(facts["vocabulary"]),
            embedding=settings.embedding,
            encoder=settings.encoder,
            hidden=settings.hidden,
            layers=settings.layers,
            latent=settings.latent,
        )
        self._begin(settings, facts, model)
        theirs = set(model.discriminator.parameters())
        ours = [parameter for parameter in model.parameters() if parameter not in theirs]
        self.autoencoder = torch.optim.Adam(ours, settings.learning_rate)
        self.discriminator = torch.optim.Adam(model.discriminator.parameters(), settings.learning_rate)
        for optimizer in self.optimizers():
            optimizer.register_step_pre_hook(self._clamp)

    def _clamp(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-self.settings.clamp, self.settings.clamp)

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return [self.autoencoder, self.discriminator]

    def steps(self, data: SmilesData) -> int:
        return -(-super().steps(data) // (1 + self.settings.turns))

    def schedule(self, step: int, steps: int) -> float:
        return halved(step, steps, self.settings.epochs, self.settings.halve)

    def updates(self, data: SmilesData, step: int, draw: Draw) -> Iterator[Update]:
        first = step * (1 + self.settings.turns)
        batch = self.batch(data, first, draw)
        codes = self.model.encode(batch.inputs, batch.lengths)
        written = self.per_character(nats(self.model.decode(batch.inputs, codes), batch.targets))
        deceived = _binary(self.model.discriminate(codes), 1.0)
        yield Update("autoencoder", self.autoencoder, written + deceived, clip=math.inf)
        for turn in range(self.settings.turns):
            yield self._discriminate(self.batch(data, first + 1 + turn, draw))

    def _discriminate(self, batch: Batch) -> Update:
        with torch.no_grad():
            codes = self.model.encode(batch.inputs, batch.lengths)
        drawn = prior(len(codes), self.model.latent, ops.noise_key(codes.device))
        told = _binary(self.model.discriminate(codes), 0.0) + _binary(self.model.discriminate(drawn), 1.0)
        return Update("discriminator", self.discriminator, told / 2, clip=math.inf)

    def validate(self, data: SmilesData) -> dict[str, float]:
        character, deceived = self._measured(data.held, HELD)
        shares = {"reconstructed": self.reconstructed(data.held.take(np.arange(min(SAMPLE, len(data.held)))))}
        # Not their sum: the adversary's part rises as long as it learns, and would call the first weights the best.
        return {"per_character": character, "deceived": deceived, **shares, **self.sampled(data)}

    def evaluate(self, path: Path, *, seed: int = 0) -> dict[str, float]:
        """The nats are those of a SMILES given its code."""
        strings, figures = self.other(path)
        character, _ = self._measured(strings, len(strings))
        return {
            "nats_per_character": character,
            "nats_per_molecule": character * float((strings.lengths - 1).mean()),
            "reconstructed": self.reconstructed(strings),
            **figures,
        }

    @torch.no_grad()
    def _measured(self, strings: Strings, most: int) -> tuple[float, float]:
        """-ln p of a character given the code, and the loss of the codes that are to be taken for the prior's."""
        strings = strings.take(np.arange(min(most, len(strings))))
        written, deceived = 0.0, 0.0
        for batch in self.each(strings):
            codes = self.code(batch)
            written += float(nats(self.model.decode(batch.inputs, codes), batch.targets).double().sum())
            deceived += float(_binary(self.model.discriminate(codes), 1.0)) * len(codes)
        return written / float((strings.lengths - 1).sum()), deceived / len(strings)

    def code(self, batch: Batch) -> Tensor:
        return self.model.encode(batch.inputs, batch.lengths)


def _binary(logits: Tensor, truth: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, truth, dtype=torch.float32))
