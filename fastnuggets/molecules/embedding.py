"""3-D coordinates for molecules: ETKDGv3 in worker processes, seeded by content, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastnuggets.molecules import _worker
from fastnuggets.molecules.files import atomic_write, batched, cores, need
from fastnuggets.molecules.readers import Record
from fastnuggets.molecules.workers import DiedError, Workers

CHUNK = 64  # molecules in one cache file: what an interruption can cost, about a second of two cores


class Conformer(NamedTuple):
    """Coordinates of one record, or the reason why there are none."""

    index: int  # type: ignore[assignment]  # as in Record
    name: str
    smiles: str
    numbers: np.ndarray  # [n] uint8, atomic numbers; empty if it failed
    coords: np.ndarray  # [n, 3] float32, angstrom
    error: str | None


def conformers(
    records: Iterable[Record],
    *,
    optimize: bool = True,
    seed: int = 0,
    processes: int | None = None,
    timeout: float = 60.0,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
    total: int | None = None,
) -> Generator[Conformer, None, None]:
    """One conformer for each record, in order and in constant memory.

    A record with 3-D coordinates keeps them, atoms as in its file. Any other is embedded from its canonical SMILES by
    ETKDGv3, all hydrogens added, the fragments of a salt side by side, and relaxed by MMFF94 if ``optimize`` and the
    force field knows its atoms. The random seed comes from ``seed`` and the SMILES: the result depends neither on the
    order nor on the number of processes, only on the RDKit version. Broken records pass through; a molecule that RDKit
    cannot embed, that takes longer than ``timeout`` seconds, or on which its worker dies has ``error`` set.

    ``processes``: workers; None: one for each core, 0: in this process. They need no ``__main__`` guard and end with
    the iterator, by exhaustion, close() or an exception such as KeyboardInterrupt. ``cache``: a folder where each
    finished chunk of molecules stays, found again by content, parameters and RDKit version; OSError if it cannot be
    written. ``progress``: a bar on stderr if that is a terminal, with ``total`` as its end.
    """
    for module in ("rdkit.Chem", "tqdm"):
        need(module)
    if processes is not None and processes < 0:
        raise ValueError(f"processes: expected 0 or more, got {processes}")
    if not timeout > 0:
        raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
    store = _Cache(Path(cache), optimize, seed) if cache is not None else None
    return _conformers(records, optimize, seed, processes, timeout, store, progress, total)


def _conformers(
    records: Iterable[Record],
    optimize: bool,
    seed: int,
    processes: int | None,
    timeout: float,
    store: _Cache | None,
    progress: bool,
    total: int | None,
) -> Generator[Conformer, None, None]:
    bar = need("tqdm").tqdm(total=total, unit="mol", desc="conformers", disable=None if progress else True)
    with _Embedders(cores() if processes is None else processes, timeout) as workers, bar:
        waiting: deque[_Chunk] = deque()
        for group in batched(records, CHUNK):
            waiting.append(_Chunk(group, workers, store, optimize, seed, timeout))
            if len(waiting) > 1:  # one chunk ahead keeps the workers busy while the caller uses the last one
                yield from waiting.popleft().finish(bar)
        for chunk in waiting:
            yield from chunk.finish(bar)


class _Chunk:
    """Records whose conformers are being made, or were found in the cache."""

    def __init__(
        self,
        records: list[Record],
        workers: _Embedders,
        store: _Cache | None,
        optimize: bool,
        seed: int,
        timeout: float,
    ) -> None:
        self.records = records
        self.store = store
        self.smiles = [record.smiles for record in records if _to_embed(record)]
        cached = store.load(self.smiles) if store and self.smiles else None
        self.fresh = cached is None and bool(self.smiles)
        self.results: Iterator[Any] = iter(
            cached
            if cached is not None
            else [workers.submit(text, _seed(seed, text), optimize, timeout) for text in self.smiles]
        )

    def finish(self, bar: Any) -> list[Conformer]:
        done: list[_worker.Result] = []
        conformers = []
        for record in self.records:
            if _to_embed(record):
                result = next(self.results)
                done.append(result.result() if isinstance(result, Future) else result)
                conformers.append(_unpack(record, done[-1]))
            else:
                conformers.append(_own(record))
            bar.update()
        if self.store and self.fresh and all(final for *_, final in done):
            self.store.save(self.smiles, done)
        return conformers


def _to_embed(record: Record) -> bool:
    return record.error is None and not _is_3d(record.mol)


def _is_3d(mol: Any) -> bool:
    return bool(mol.GetNumConformers() > 0 and mol.GetConformer().Is3D())


def _own(record: Record) -> Conformer:
    error, numbers, coords = record.error, np.empty(0, np.uint8), np.empty((0, 3), np.float32)
    if error is None:
        positions = record.mol.GetConformer().GetPositions().astype(np.float32)
        if np.isfinite(positions).all():
            numbers = np.array([atom.GetAtomicNum() for atom in record.mol.GetAtoms()], np.uint8)
            coords = positions
        else:
            error = "its coordinates are not finite"
    return Conformer(record.index, record.name, record.smiles, numbers, coords, error)


def _unpack(record: Record, result: _worker.Result) -> Conformer:
    numbers, coords, reason, _ = result
    return Conformer(
        record.index,
        record.name,
        record.smiles,
        np.frombuffer(numbers, np.uint8),
        np.frombuffer(coords, np.float32).reshape(-1, 3),
        reason or None,
    )


def _seed(seed: int, smiles: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {smiles}".encode()).digest()[:4], "big") & 0x7FFFFFFF


class _Embedders(Workers):
    """A molecule on which a process dies has that for a reason."""

    def __init__(self, count: int, timeout: float) -> None:
        # RDKit's own limit ends an embedding in good order; this one ends whatever does not heed it.
        super().__init__(_worker.embed, count, "conformer", 2 * timeout + 5)

    def run(self, *task: Any) -> _worker.Result:
        try:
            result: _worker.Result = self.ask(*task)
            return result
        except DiedError as error:
            return b"", b"", str(error), False


class _Cache:
    """One Parquet file for each chunk of molecules, named by what went in."""

    def __init__(self, folder: Path, optimize: bool, seed: int) -> None:
        need("pyarrow.parquet")
        self.folder = folder
        self.key = ["1", need("rdkit").__version__, "ETKDGv3, fragments apart", optimize, seed]

    def _path(self, smiles: list[str]) -> Path:
        digest = hashlib.sha256(json.dumps([self.key, smiles]).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.parquet"

    def load(self, smiles: list[str]) -> list[_worker.Result] | None:
        pa, pq = need("pyarrow"), need("pyarrow.parquet")
        path = self._path(smiles)
        try:
            rows = pq.read_table(path).to_pydict() if path.is_file() else None
        except (pa.ArrowInvalid, OSError):
            return None  # damaged: it is made again
        if not rows or len(rows.get("error", [])) != len(smiles):
            return None
        return [(*row, True) for row in zip(rows["z"], rows["xyz"], rows["error"], strict=True)]

    def save(self, smiles: list[str], results: list[_worker.Result]) -> None:
        pa, pq = need("pyarrow"), need("pyarrow.parquet")
        z, xyz, error, _ = zip(*results, strict=True)
        table = pa.table({"z": pa.array(z, pa.binary()), "xyz": pa.array(xyz, pa.binary()), "error": list(error)})
        path = self._path(smiles)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            pq.write_table(table, file, compression="zstd")
