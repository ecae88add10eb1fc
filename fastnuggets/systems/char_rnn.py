"""CharRNN on SMILES, with the settings of the MOSES benchmark."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastnuggets.models.char_rnn import CharRNN, nats
from fastnuggets.molecules.vocabulary import Strings
from fastnuggets.systems.base import Draw, option
from fastnuggets.systems.smiles import HELD, SmilesData, SmilesSettings, SmilesSystem, halved
from fastnuggets.training.fit import Update


@dataclasses.dataclass(frozen=True)
class CharRNNSettings(SmilesSettings):
    epochs: int = option(80, "passes over the training set")
    batch_size: int = option(64, "molecules in a step, of all processes together")
    hidden: int = option(768, "features of an LSTM layer")
    layers: int = option(3, "of the LSTM")
    dropout: float = option(0.2, "between the layers")
    halve: int = option(10, "epochs after which the learning rate halves")


class CharRNNSystem(SmilesSystem):
    """What MOSES' own training does otherwise: its loss counts the padding too, as characters to be learnt."""

    summary = "SMILES a character at a time: three LSTM layers"
    paper = "Segler et al., doi:10.1021/acscentsci.7b00512; settings of MOSES, doi:10.3389/fphar.2020.565644"
    Settings = CharRNNSettings
    settings: CharRNNSettings
    model: CharRNN

    def __init__(self, settings: CharRNNSettings, facts: dict[str, Any]) -> None:
        tokens = len(facts["vocabulary"])
        model = CharRNN(tokens, hidden=settings.hidden, layers=settings.layers, dropout=settings.dropout)
        self._begin(settings, facts, model)
        self.adam = torch.optim.Adam(model.parameters(), settings.learning_rate)

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return [self.adam]

    def schedule(self, step: int, steps: int) -> float:
        return halved(step, steps, self.settings.epochs, self.settings.halve)

    def updates(self, data: SmilesData, step: int, draw: Draw) -> Iterator[Update]:
        batch = self.batch(data, step, draw)
        logits, _ = self.model(batch.inputs)
        yield Update("loss", self.adam, self.per_character(nats(logits, batch.targets)), clip=math.inf)

    def validate(self, data: SmilesData) -> dict[str, float]:
        return {"loss": self._measured(data.held)[0], **self.sampled(data)}

    def evaluate(self, path: Path, *, seed: int = 0) -> dict[str, float]:
        strings, figures = self.other(path)
        character, molecule = self._measured(strings, most=len(strings))
        return {"nats_per_character": character, "nats_per_molecule": molecule, **figures}

    @torch.no_grad()
    def _measured(self, strings: Strings, most: int = HELD) -> tuple[float, float]:
        """-ln p of a character, the ends among them, and of a molecule."""
        strings = strings.take(np.arange(min(most, len(strings))))
        total = sum(float(nats(self.model(b.inputs)[0], b.targets).double().sum()) for b in self.each(strings))
        return total / float((strings.lengths - 1).sum()), total / len(strings)

    def write(self, count: int, *, temperature: float, key: Tensor) -> Tensor:
        return self.model.sample(count, length=self.settings.max_length, temperature=temperature, key=key)
