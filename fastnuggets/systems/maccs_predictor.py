"""MACCS keys from molecules as grids: what of a molecule's chemistry a network reads off its representation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fastnuggets.models import FingerprintPredictor
from fastnuggets.molecules.batch import Molecules
from fastnuggets.molecules.fingerprints import BITS, fingerprints
from fastnuggets.systems.base import Draw, Section, Settings, System, option
from fastnuggets.systems.molecule_grids import (
    CLIP,
    PAPER,
    TAKES,
    Drawing,
    GridSettings,
    apart,
    batches,
    facts_of,
    optimizer,
    read_molecules,
    turned,
    warm_cosine,
)
from fastnuggets.systems.ranking import Ranking, rank
from fastnuggets.training.fit import Update

VALIDATED = 512  # molecules at most


@dataclasses.dataclass(frozen=True)
class MaccsPredictorSettings(GridSettings):
    width: int = option(96, "features of a cell inside the network")
    blocks: int = option(3, "residual blocks")


class KeyedData(NamedTuple):
    """Molecules, and their keys [N, 166] bool."""

    train: Molecules
    test: Molecules
    train_keys: Tensor
    test_keys: Tensor


class MaccsPredictorSystem(System[KeyedData]):
    summary = "MACCS keys from molecules as grids of waves, Gaussians or one-hot voxels"
    paper = PAPER
    takes = TAKES
    made = ""
    clip = CLIP
    Settings: ClassVar[type[Settings]] = MaccsPredictorSettings

    model: FingerprintPredictor

    @classmethod
    def read(cls, path: Path, settings: Any, *, seed: int, progress: bool = True) -> tuple[dict[str, Any], KeyedData]:
        molecules, keys = keyed(read_molecules(path, settings, seed=seed, progress=progress), path, progress)
        train, test = apart(len(molecules), settings.tested, seed, path)
        data = KeyedData(molecules[train], molecules[test], keys[train], keys[test])
        return facts_of(path, data, Drawing(settings), seed), data

    def __init__(self, settings: Any, facts: dict[str, Any]) -> None:
        self.settings, self.facts = settings, facts
        self.drawing = Drawing(settings)
        self.model = FingerprintPredictor(
            len(facts["channels"]),
            BITS["maccs"],
            width=settings.width,
            blocks=settings.blocks,
            scale=facts["scale"],
        )
        self._optimizer = optimizer(self.model, settings.learning_rate)

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return [self._optimizer]

    def schedule(self, step: int, steps: int) -> float:
        return warm_cosine(step, steps)

    def updates(self, data: KeyedData, step: int, draw: Draw) -> Iterator[Update]:
        rows = draw.rows(step, len(data.train), self.settings.batch_size)
        grid = self.drawing.posed(data.train[rows].to(self.device), draw.generator(step))
        keys = data.train_keys[rows].to(self.device, torch.float32)
        yield Update("loss", self._optimizer, binary_cross_entropy_with_logits(self.model(grid), keys))

    def validate(self, data: KeyedData) -> dict[str, float]:
        test, keys = data.test[:VALIDATED], data.test_keys[:VALIDATED]
        logits = self.logits(turned(test, 0, self.settings.shift))
        loss = binary_cross_entropy_with_logits(logits, keys.float()).item()
        return {"loss": loss, **_figures(logits, keys)}

    @torch.no_grad()
    def logits(self, molecules: Molecules) -> Tensor:
        """[B, 166] of molecules in their boxes, as they stand, on the CPU."""
        self.model.eval()
        return torch.cat(
            [self.model(self.drawing.still(batch.to(self.device))).float().cpu() for batch in batches(molecules)]
        )

    def evaluate(self, path: Path, *, seed: int = 0) -> dict[str, float]:
        """Of all molecules of a file that fit the box, turned at random: how the keys that vary are ranked."""
        molecules, keys = keyed(read_molecules(path, self.settings, seed=seed), path)
        logits = self.logits(turned(molecules, seed, self.settings.shift))
        return {"molecules": float(len(molecules)), **_figures(logits, keys)}

    def sections(self, data: KeyedData) -> list[Section]:
        from fastnuggets.figures import INK, chart, svg

        test, keys = data.test[:VALIDATED], data.test_keys[:VALIDATED]
        ranking = _ranking(self.logits(turned(test, 0, self.settings.shift)), keys)
        if ranking is None:
            return []
        figure, axis = chart(8, 3)
        share = 100 * keys[:, ranking.varying].double().mean(0)
        axis.scatter(share, ranking.roc_auc[ranking.varying], s=14, color="#2f6fed", alpha=0.7, linewidths=0)
        axis.set_xlabel("molecules that have the key, %", color=INK)
        axis.set_ylabel("ROC AUC", color=INK)
        text = (
            f"<p>{int(ranking.varying.sum())} of the keys vary among {len(test)} held-out molecules; one dot each.</p>"
        )
        return [Section("Keys", text + svg(figure, "ROC AUC of each key against how common it is"))]


def keyed(molecules: Molecules, path: Path, progress: bool = False) -> tuple[Molecules, Tensor]:
    """Those that have keys: where only atoms are known there are none. ValueError if that leaves nothing."""
    found = fingerprints(molecules.smiles, progress=progress)
    if not len(found):
        raise ValueError(f"{path}: keys are made of SMILES, and none of its {len(molecules)} molecules has one")
    return molecules[torch.from_numpy(found.positions())], torch.from_numpy(found.unpack()).bool()


def _ranking(logits: Tensor, keys: Tensor) -> Ranking | None:
    try:
        return rank(logits, keys)
    except ValueError:
        return None  # of one molecule nothing varies


def _figures(logits: Tensor, keys: Tensor) -> dict[str, float]:
    ranking = _ranking(logits, keys)
    if ranking is None:
        return {"keys that vary": 0.0}
    return {
        "keys that vary": float(ranking.varying.sum()),
        "ROC AUC, micro": ranking.micro_roc_auc,
        "ROC AUC, macro": ranking.macro_roc_auc,
        "average precision, micro": ranking.micro_average_precision,
        "average precision, macro": ranking.macro_average_precision,
    }
