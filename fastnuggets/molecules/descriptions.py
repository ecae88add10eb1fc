"""What the metrics need of a set of molecules: worked out once for each, in worker processes, and kept in arrays."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import random
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastnuggets.molecules import _describe
from fastnuggets.molecules._describe import PROPERTIES
from fastnuggets.molecules.files import atomic_write, batched, need
from fastnuggets.molecules.workers import DiedError, Workers, in_order

Embed = Callable[[Sequence[str]], np.ndarray]  # SMILES [n] -> activations [n, D]

_BLOCK = 256  # molecules that a worker takes at a time, half a second
_SAMPLE = 48
_LIMIT = 120.0  # seconds that a block may take; it takes one
_FORMAT = "fastnuggets statistics 1"
_WIDTH = 128


class Activations(NamedTuple):
    """Moments of a network's activations."""

    count: int  # type: ignore[assignment]
    mean: np.ndarray  # [D] float64
    covariance: np.ndarray  # [D, D] float64, of count - 1 degrees of freedom


@dataclass(frozen=True, eq=False)
class Statistics:
    """V valid molecules, in their order, duplicates kept.

    Memory is about 170 bytes for each, and the distinct fragments and scaffolds.
    """

    total: int  # SMILES that were given, broken ones too
    keys: np.ndarray  # [V] uint64, hashes of canonical SMILES: two of ten million agree by chance once in 400,000 sets
    fingerprints: np.ndarray  # [V, 128] uint8, Morgan bits as in Fingerprints
    properties: np.ndarray  # [V, 4] float64 in the order of PROPERTIES; nan where one of them is not defined
    fragments: Mapping[str, int]  # BRICS
    scaffolds: Mapping[str, int]  # Bemis-Murcko, of two rings or more
    passing: int | None = None  # molecules that pass the filters, if asked for
    activations: Activations | None = None  # of ChemNet, if asked for
    sample: Sequence[str] = ()  # canonical SMILES of at most 48 of the molecules, at random
    crashed: int = 0  # SMILES over which a worker process died; they count as broken

    @property
    def valid(self) -> int:
        return len(self.keys)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.npz`` of numbers and JSON; it appears under its name only when it is complete."""
        words = {name: getattr(self, name) for name in ("total", "passing", "crashed")}
        counts = {name: dict(getattr(self, name)) for name in ("fragments", "scaffolds")}
        meta = {"format": _FORMAT, "rdkit": need("rdkit").__version__, "sample": list(self.sample), **words, **counts}
        arrays = {name: getattr(self, name) for name in ("keys", "fingerprints", "properties")}
        if self.activations is not None:
            meta["activations"] = self.activations.count
            arrays.update(mean=self.activations.mean, covariance=self.activations.covariance)
        with atomic_write(Path(path)) as file:
            np.savez(file, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """What ``save`` wrote. ValueError if the file is something else or damaged; a warning if it is of another
        RDKit, whose canonical SMILES may differ."""
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(file["meta"].tobytes())
                if meta.pop("format") != _FORMAT:
                    raise ValueError("another format")
                version, count = meta.pop("rdkit"), meta.pop("activations", None)
                moments = None if count is None else Activations(count, file["mean"], file["covariance"])
                arrays = {name: file[name] for name in ("keys", "fingerprints", "properties")}
                found = cls(**arrays, **meta, activations=moments)
        except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not statistics, or damaged") from error
        if version != need("rdkit").__version__:
            warnings.warn(f"{path} was made by RDKit {version}, this is {need('rdkit').__version__}", stacklevel=2)
        return found


def describe(
    smiles: Iterable[str],
    *,
    filters: Sequence[str] | None = None,
    embed: Embed | None = None,
    names_only: bool = False,
    processes: int | None = None,
    progress: bool | str = False,
    total: int | None = None,
) -> Statistics:
    """Statistics of SMILES, streamed; what RDKit cannot read, or has no atoms, is counted and left out.

    Each is taken as its canonical SMILES, so nothing depends on how it was written, nor on the number of processes.
    ``filters``: SMARTS of the medicinal chemistry filters, maybe none; the filters are applied if this is given.
    ``embed``: a network for FCD, such as ``chemnet()``. ``names_only``: for a training set, of which novelty needs
    nothing else. ``processes``: workers; None: one for each core, 0: in this process. They need no ``__main__`` guard
    and end with the call, by KeyboardInterrupt too. A SMILES over which a worker dies or needs more than two minutes
    counts as broken. ``progress``: a bar on stderr if that is a terminal, maybe with a name, ``total`` its end.
    """
    for module in ("rdkit.Chem", "tqdm"):
        need(module)
    alerts = tuple(filters or ())
    broken = _describe.not_smarts(alerts)
    if broken:
        raise ValueError(f"filters: RDKit cannot read {broken[0]!r} as SMARTS")
    level = _describe.NAMES if names_only else _describe.PARTS if filters is None else _describe.ALL
    if total is None and isinstance(smiles, Sized):
        total = len(smiles)
    label = progress if isinstance(progress, str) else "molecules"
    gathered, crashed = _Gathered(embed), list[str]()
    with need("tqdm").tqdm(total=total, unit="mol", desc=label, disable=None if progress else True) as bar:
        blocks = batched(smiles, _BLOCK)
        made = in_order(
            lambda count: _Describers(count, crashed), blocks, lambda part: (part, level, alerts), processes
        )
        with closing(made):
            for part, block in made:
                gathered.add(block)
                bar.update(len(part))
    return gathered.finish(level, len(crashed))


def chemnet(device: str = "cpu", batch_size: int = 512) -> Embed:
    """The network of FCD: SMILES [n] to activations [n, 512]. Needs the extra ``fastnuggets[fcd]``.

    Preuer et al., J. Chem. Inf. Model. 58, 1736 (2018), doi 10.1021/acs.jcim.8b00234.
    """
    network = need("fcd_torch", "fcd").FCD(device=device, n_jobs=1, batch_size=batch_size)

    def embed(smiles: Sequence[str]) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return np.asarray(network.get_predictions(list(smiles)))

    return embed


def read_filters(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """SMARTS of a table with a column ``smarts``, as molsets' mcf.csv."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or "smarts" not in rows[0]:
        raise ValueError(f"{path}: expected a table with a column smarts")
    return tuple(row["smarts"] for row in rows if row["smarts"])


def installed_filters() -> tuple[str, ...]:
    """The medicinal chemistry filters of an installed molsets, which is not imported; none if there is none."""
    found = importlib.util.find_spec("moses")
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / "metrics" / "mcf.csv"
        if path.is_file():
            return read_filters(path)
    return ()


class _Describers(Workers):
    """If a process dies over a block, half by half, until it is known over which SMILES."""

    def __init__(self, count: int, crashed: list[str]) -> None:
        super().__init__(_describe.describe, count, "describing", _LIMIT)
        self.crashed = crashed

    def run(self, *task: Any) -> _describe.Block:
        try:
            block: _describe.Block = self.ask(*task)
            return block
        except DiedError:
            smiles, level, alerts = task
        if len(smiles) == 1:
            self.crashed += smiles
            return _describe.describe([""], level, alerts)
        middle = len(smiles) // 2
        halves = (self.run(part, level, alerts) for part in (smiles[:middle], smiles[middle:]))
        *rows, fragments, scaffolds = (a + b for a, b in zip(*map(_summable, halves), strict=True))
        joined: Any = (*rows, dict(fragments), dict(scaffolds))
        return joined


def _summable(block: _describe.Block) -> list[Any]:
    *rows, fragments, scaffolds = block
    return [*rows, Counter(fragments), Counter(scaffolds)]


class _Gathered:
    """Statistics of the blocks up to now."""

    def __init__(self, embed: Embed | None) -> None:
        self.embed = embed
        self.total = self.valid = 0
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []
        self.fragments: Counter[str] = Counter()
        self.scaffolds: Counter[str] = Counter()
        self.moments = _Moments()
        self.random = random.Random(0)
        self.sample: list[str] = []

    def add(self, block: _describe.Block) -> None:
        names, bits, properties, passed, fragments, scaffolds = block
        valid = [name for name in names if name]
        self.total += len(names)
        keys = np.fromiter(map(_key, valid), np.uint64, len(valid))
        values = np.frombuffer(properties).reshape(-1, len(PROPERTIES))
        self.rows.append((keys, np.frombuffer(bits, np.uint8).reshape(-1, _WIDTH), values, sum(passed)))
        self.fragments.update(fragments)
        self.scaffolds.update(scaffolds)
        for name in valid:  # each of all has the same chance to be in the sample
            self.valid += 1
            place = self.random.randrange(self.valid)
            if len(self.sample) < _SAMPLE:
                self.sample.append(name)
            elif place < _SAMPLE:
                self.sample[place] = name
        if self.embed and valid:
            self.moments.add(np.asarray(self.embed(valid), np.float64))

    def finish(self, level: int, crashed: int) -> Statistics:
        nothing = (np.empty(0, np.uint64), np.empty((0, _WIDTH), np.uint8), np.empty((0, len(PROPERTIES))), 0)
        keys, bits, values, passed = zip(nothing, *self.rows, strict=True)
        return Statistics(
            self.total,
            np.concatenate(keys),
            np.concatenate(bits),
            np.concatenate(values),
            dict(self.fragments),
            dict(self.scaffolds),
            sum(passed) if level == _describe.ALL else None,
            self.moments.finish() if self.embed else None,
            self.sample,
            crashed,
        )


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class _Moments:
    """Mean and covariance, a block at a time: Chan, Golub and LeVeque, Am. Stat. 37, 242 (1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.scatter: Any = 0.0

    def add(self, block: np.ndarray) -> None:
        mean = block.mean(0)
        shift, centred = mean - self.mean, block - mean
        count = self.count + len(block)
        self.scatter = self.scatter + centred.T @ centred + np.outer(shift, shift) * (self.count * len(block) / count)
        self.mean = self.mean + shift * (len(block) / count)
        self.count = count

    def finish(self) -> Activations | None:
        return Activations(self.count, self.mean, self.scatter / (self.count - 1)) if self.count > 1 else None
