"""What a published system is to the commands: its data, its network, its losses, and what it can be asked."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastnuggets.training.fit import Update

Data = TypeVar("Data")


def option(default: Any, text: str, choices: Sequence[Any] | None = None) -> Any:
    """A field of Settings that the command line offers as --field."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every system can be told. A system derives its own, with its publication's values as the defaults."""

    epochs: int = option(100, "passes over the training set")
    batch_size: int = option(128, "examples in a step, of all processes together")
    learning_rate: float = option(1e-3, "of Adam")
    tested: float = option(0.1, "share of the examples that is held out for validation")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if not 0 < self.tested < 1:
            raise ValueError(f"tested: expected a share between 0 and 1, got {self.tested}")


class Section(NamedTuple):
    """A part of the page that a training leaves behind."""

    title: str
    html: str


class Draw(NamedTuple):
    """Which examples a step takes: those of one process out of `world`, the same ones however often it is asked."""

    seed: int
    rank: int = 0
    world: int = 1

    def generator(self, step: int, purpose: int = 0) -> torch.Generator:
        """Of the random numbers of a step: a CPU generator that depends on seed, step, rank and purpose alone."""
        # A seed of several numbers: torch has none, and numpy's is made for it.
        from numpy.random import SeedSequence

        words = SeedSequence([self.seed, step, self.rank, purpose]).generate_state(1, "uint64")
        return torch.Generator().manual_seed(int(words[0]) & (2**63 - 1))

    def rows(self, step: int, count: int, batch_size: int) -> Tensor:
        """Places of the step's examples among `count`, int64: a new order in each epoch, its last batch filled up
        from the order's beginning."""
        batch_size = min(batch_size, count)
        steps = -(-count // batch_size)
        order = _order(self.seed, step // steps, count)
        places = torch.arange(batch_size * (step % steps), batch_size * (step % steps + 1))[self.rank :: self.world]
        return order[places % count]


_LAST: dict[tuple[int, int, int], Tensor] = {}


def _order(seed: int, epoch: int, count: int) -> Tensor:
    """A permutation; the last one is kept, as an epoch has many steps."""
    key = (seed, epoch, count)
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = torch.randperm(count, generator=Draw(seed).generator(epoch, purpose=1))
    return _LAST[key]


class System(ABC, Generic[Data]):
    """One published system. Its networks are all in `model`, so that a checkpoint holds them.

    A run is made so::

        facts, data = System.read(path, settings, seed=0)
        system = System(settings, facts)         # later again, from what is saved, without the data
        fit(system.model, lambda step: system.updates(data, step, draw), ...)
    """

    summary: ClassVar[str]  # a line for --help
    paper: ClassVar[str]  # where it was published
    takes: ClassVar[str] = "molecules: .smi .csv .sdf .parquet, also .gz"  # what --data is
    made: ClassVar[str] = "molecules, one SMILES a line"  # what `generate` writes; "" if it generates nothing
    clip: ClassVar[float] = math.inf  # largest norm of the gradients of an update that names no other
    Settings: ClassVar[type[Settings]]

    settings: Any
    model: nn.Module

    @classmethod
    @abstractmethod
    def read(cls, path: Path, settings: Any, *, seed: int, progress: bool = True) -> tuple[dict[str, Any], Data]:
        """The data of a file, split, and the facts of it that the network is made of (numbers, strings and lists of
        them: they are saved with the weights). Raises ValueError if nothing in it can be used, saying why."""

    @abstractmethod
    def __init__(self, settings: Any, facts: dict[str, Any]) -> None:
        """Makes `model`, with weights from torch's default generator."""

    def begin(self, data: Any) -> None:
        """Measure of the training's examples what the model holds but does not learn; before the first step."""

    def end(self, data: Any) -> None:
        """The same after the last step, of the best weights; the model is in evaluation mode."""

    @abstractmethod
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """One for each loss that is minimised on its own."""

    def steps(self, data: Any) -> int:
        """Of the whole training: the epochs, over `data.train`."""
        return int(self.settings.epochs) * -(-len(data.train) // int(self.settings.batch_size))

    def schedule(self, step: int, steps: int) -> float:
        """The learning rate of a step, as a factor."""
        return 1.0

    @abstractmethod
    def updates(self, data: Data, step: int, draw: Draw) -> Iterator[Update]:
        """The losses of a step, each with its optimizer, in turn: one is computed after the one before was minimised.
        Depends on the weights, the step and `draw` alone, and on torch's default generator."""

    @abstractmethod
    def validate(self, data: Data) -> dict[str, float]:
        """Figures of the held-out examples; of the first, less is better. The model is in evaluation mode."""

    def generate(self, count: int, *, seed: int, **options: Any) -> Iterator[str]:
        """New examples, one record each. Not every system has any."""
        raise ValueError("this system generates nothing")

    def evaluate(self, path: Path, *, seed: int = 0) -> dict[str, float]:
        """Figures of all examples of a file that the network may never have seen."""
        raise ValueError("this system evaluates no other file")

    def sections(self, data: Data) -> list[Section]:
        """Pictures for the page of the run. The model is in evaluation mode."""
        return []

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
