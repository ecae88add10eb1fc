"""What the systems that write SMILES have in common: their data, their batches, and what is asked of samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastnuggets import ops
from fastnuggets.models.char_rnn import BEGIN, END, IGNORED
from fastnuggets.molecules.files import need
from fastnuggets.molecules.smiles import digests, smiles_of_file
from fastnuggets.molecules.vocabulary import Strings, Vocabulary
from fastnuggets.systems.base import Draw, Section, Settings, System, option

POOL = 16  # batches whose molecules are sorted by length together
SAMPLE = 256  # molecules that a validation draws, and that it puts through an autoencoder
HELD = 10_000  # held-out molecules that a validation looks at, at most
_WRITTEN = 512  # molecules that are written at a time


@dataclasses.dataclass(frozen=True)
class SmilesSettings(Settings):
    canonical: bool = option(True, "write each SMILES anew; without, the file is taken to have canonical ones")
    max_length: int = option(100, "characters; longer SMILES are left out, and generated ones end there")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{field.name}: expected a whole number above 0, got {value}")


class SmilesData(NamedTuple):
    """Tokens of the molecules, each of which is in one of the two."""

    train: Strings
    held: Strings
    known: np.ndarray  # [molecules of train] uint64, ascending: digests of their SMILES


class Batch(NamedTuple):
    """Sequences of tokens, the longest first."""

    tokens: Tensor  # [T + 1, B] int64: begin, characters, end, and more ends
    targets: Tensor  # [T, B] int64: the tokens from the second on, IGNORED behind the end
    lengths: Tensor  # [B] int64, on the CPU: characters and the end

    @property
    def inputs(self) -> Tensor:
        """[T, B]: what stands before each target."""
        return self.tokens[:-1]


def batch_of(strings: Strings, rows: np.ndarray, device: torch.device) -> Batch:
    rows = rows[np.argsort(-strings.lengths[rows], kind="stable")]
    lengths = torch.from_numpy(strings.lengths[rows] - 1)
    tokens = torch.from_numpy(strings.padded(rows, END)).long()
    inside = torch.arange(len(tokens) - 1)[:, None] < lengths
    targets = tokens[1:].masked_fill(~inside, IGNORED)
    return Batch(tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True), lengths)


def grouped_rows(draw: Draw, step: int, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Rows of a step, of about equal lengths: those of POOL random batches, sorted, cut up, and taken in random order.

    In an epoch each molecule comes once, as in `Draw.rows`, and which others it is with is random but for the length.
    """
    batches = -(-len(lengths) // min(batch_size, len(lengths)))
    place = step % batches
    first = place - place % POOL
    count = min(POOL, batches - first)
    pool = _pool(draw, step - place + first, count, len(lengths), batch_size)
    pool = pool[np.argsort(lengths[pool], kind="stable")]
    # The same turn in every process, so that all have about the same to do.
    turn = torch.randperm(count, generator=Draw(draw.seed).generator(step - place + first, purpose=3))[place - first]
    size = len(pool) // count
    return pool[size * int(turn) : size * (int(turn) + 1)]


@functools.lru_cache(maxsize=1)
def _pool(draw: Draw, first: int, count: int, molecules: int, batch_size: int) -> np.ndarray:
    return torch.cat([draw.rows(first + i, molecules, batch_size) for i in range(count)]).numpy()


class SmilesSystem(System[SmilesData]):
    """A system that learns from SMILES and writes new ones."""

    settings: SmilesSettings

    @classmethod
    def read(
        cls, path: Path, settings: SmilesSettings, *, seed: int, progress: bool = True
    ) -> tuple[dict[str, Any], SmilesData]:
        found = smiles_of_file(path, canonical=settings.canonical, longest=settings.max_length, progress=progress)
        count = len(found.strings)
        if count < 2:
            why = f"{found.broken} cannot be read" + (f" ({found.reason})" if found.reason else "")
            raise ValueError(
                f"{path}: {count} molecules to learn from, 2 are needed: {why}, "
                f"{found.too_long} have more than {settings.max_length} characters"
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
        held = min(count - 1, max(1, round(settings.tested * count)))
        vocabulary = Vocabulary.of(found.strings)
        train, test = np.sort(order[held:]), np.sort(order[:held])
        kept = found.strings.take(train)
        facts = {
            "vocabulary": vocabulary.tokens,
            "molecules": len(train),
            "held_out": len(test),
            "broken": found.broken,
            "too_long": found.too_long,
            "repeated": found.repeated,
            "mean_length": float(kept.lengths.mean() + 1),  # with the end
        }
        known = np.sort(digests(kept[i] for i in range(len(kept))))
        data = SmilesData(vocabulary.encode(kept), vocabulary.encode(found.strings.take(test)), known)
        return facts, data

    def _begin(self, settings: SmilesSettings, facts: dict[str, Any], model: nn.Module) -> None:
        """The alphabet is kept with the weights: those of another one would fit a network as large, and mean
        nothing."""
        self.settings, self.facts, self.model = settings, facts, model
        self.vocabulary = Vocabulary.from_tokens(facts["vocabulary"])
        letters = torch.tensor([ord(c) for c in self.vocabulary.characters], dtype=torch.uint8)
        model.register_buffer("alphabet", letters)
        model.register_load_state_dict_pre_hook(_same_alphabet)

    def steps(self, data: SmilesData) -> int:
        return self.settings.epochs * self.batches

    @property
    def batches(self) -> int:
        """Of an epoch."""
        count = int(self.facts["molecules"])
        return -(-count // min(self.settings.batch_size, count))

    def batch(self, data: SmilesData, step: int, draw: Draw) -> Batch:
        rows = grouped_rows(draw, step, data.train.lengths, self.settings.batch_size)
        return batch_of(data.train, rows, self.device)

    def per_character(self, nats: Tensor) -> Tensor:
        """Sum of [B] over the characters that so many molecules have on average.

        Not over their own number: batches are of about equal lengths, and short molecules would weigh too much.
        """
        return nats.sum() / (len(nats) * self.facts["mean_length"])

    def write(self, count: int, *, temperature: float, key: Tensor) -> Tensor:
        """[count, max_length] tokens drawn by the model."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, count: int, *, seed: int, temperature: float = 1.0, valid: bool = False) -> Iterator[str]:
        """SMILES, some of which may be no molecules. `temperature` below 1 writes likelier ones; 0 the likeliest.
        `valid`: only those that RDKit can read, canonical; ValueError once it seems that none will come."""
        asked, given = 0, 0
        while given < count:
            size = min(_WRITTEN, count - given) if not valid else _WRITTEN
            texts = self._texts(size, temperature, seed, asked)
            asked += size
            if valid:
                texts = [text for text in _canonical(texts) if text]
                if given + len(texts) < asked / 1000:
                    raise ValueError(f"of {asked} SMILES that were written {given + len(texts)} are molecules")
            for text in texts[: count - given]:
                yield text
                given += 1

    def _texts(self, count: int, temperature: float, seed: int, before: int = 0) -> list[str]:
        # A token of a batch takes one number of the key's stream of offsets.
        key = torch.tensor([seed, before // _WRITTEN * 2**32], device=self.device)
        tokens = self.write(count, temperature=temperature, key=key)
        return self.vocabulary.decode(tokens.cpu().numpy())

    def sampled(self, data: SmilesData) -> dict[str, float]:
        """Shares of a small sample: molecules; different ones, of those; and new ones, of these."""
        found = [text for text in _canonical(self._texts(SAMPLE, 1.0, 0)) if text]
        different = sorted(set(found))
        new = ~np.isin(digests(different), data.known)
        return {
            "valid": len(found) / SAMPLE,
            "unique": len(different) / max(1, len(found)),
            "novel": float(new.sum()) / max(1, len(different)),
        }

    def each(self, strings: Strings) -> Iterator[Batch]:
        """All molecules once, the shortest first, in batches that hold as much as those of the training."""
        order = np.argsort(strings.lengths, kind="stable")
        for rows in np.array_split(order, max(1, len(order) // max(1, min(self.settings.batch_size, _WRITTEN)))):
            if len(rows):
                yield batch_of(strings, rows, self.device)

    def other(self, path: Path) -> tuple[Strings, dict[str, float]]:
        """Tokens of another file's molecules, and how many could not be used. ValueError if none could."""
        found = smiles_of_file(path, canonical=self.settings.canonical, longest=self.settings.max_length, progress=True)
        known = self.vocabulary.knows(found.strings)
        figures = {
            "molecules": float(known.sum()),
            "broken": float(found.broken),
            "too_long": float(found.too_long),
            "unknown_characters": float((~known).sum()),
        }
        if not known.any():
            if len(known):
                self.vocabulary.encode(found.strings)  # says which character
            why = f": {found.reason}" if found.reason else ""
            raise ValueError(f"{path}: no molecule of it can be used{why}")
        return self.vocabulary.encode(found.strings.take(known)), figures

    def sections(self, data: SmilesData) -> list[Section]:
        texts = self._texts(SAMPLE, 1.0, 0)
        valid = [text for text in dict.fromkeys(_canonical(texts)) if text]
        return [
            Section("Lengths", _lengths(data.held.lengths - 2, [len(text) for text in texts])),
            Section("Molecules it writes", _drawn(valid[:12])),
        ]


def halved(step: int, steps: int, epochs: int, every: int) -> float:
    """1/2 for each `every` epochs that are over."""
    return 0.5 ** (step * epochs // steps // every)


def _same_alphabet(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    ours, theirs = model.alphabet, state.get(f"{prefix}alphabet")
    if theirs is not None and not torch.equal(ours.cpu(), theirs.cpu()):
        raise ValueError(
            "the weights are of another vocabulary: "
            f"{bytes(theirs.tolist()).decode('ascii', 'replace')!r} for {bytes(ours.tolist()).decode()!r}"
        )


def _canonical(texts: Sequence[str]) -> list[str]:
    """As RDKit writes them, empty where it cannot read one; its messages stay off the terminal."""
    need("rdkit.Chem")
    from fastnuggets.molecules import _canonical as worker

    return worker.compute(texts)


def _lengths(held: np.ndarray, written: list[int]) -> str:
    from fastnuggets.figures import INK, chart, svg

    figure, axis = chart(6.4, 2.6)
    bins = np.arange(0, max(int(held.max()), *written, 1) + 3, 2)
    for lengths, label in ((held, "held out"), (written, "written")):
        axis.hist(lengths, bins, density=True, histtype="step", linewidth=1.4, label=label)
    axis.set_xlabel("characters", color=INK)
    axis.legend(frameon=False, labelcolor=INK)
    return svg(figure, "lengths of held-out SMILES and of those that the network writes")


def _drawn(smiles: Sequence[str]) -> str:
    if not smiles:
        return "<p>None of the sample is one.</p>"
    from fastnuggets.figures import image

    chem, draw = need("rdkit.Chem"), need("rdkit.Chem.Draw")
    board = draw.MolDraw2DCairo(4 * 220, -(-len(smiles) // 4) * 160, 220, 160)
    board.DrawMolecules([chem.MolFromSmiles(text) for text in smiles])
    board.FinishDrawing()
    return image(board.GetDrawingText(), "molecules that the network wrote")


def prior(codes: int, latent: int, key: Tensor) -> Tensor:
    """[codes, latent] of a standard normal, on the key's device."""
    return ops.noise("normal", (codes, latent), dtype=torch.float32, device=key.device, key=key)


__all__ = ["BEGIN", "END", "Batch", "SmilesData", "SmilesSettings", "SmilesSystem", "batch_of", "grouped_rows"]
