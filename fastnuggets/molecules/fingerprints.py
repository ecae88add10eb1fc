"""Fingerprints as packed bits: made by RDKit in worker processes, kept in files that are mapped, not loaded."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Generator, Iterable, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from fastnuggets.molecules import _bits, _fingerprint_store
from fastnuggets.molecules.files import batched, need
from fastnuggets.molecules.readers import count_records, read_texts, why_not
from fastnuggets.molecules.workers import Workers, in_order

KINDS = ("maccs", "morgan")
BITS = {"maccs": 166, "morgan": 1024}

_BLOCK = 256  # molecules that a worker takes at a time
_KEEP = 64  # blocks between two states that a stopped run goes on from, a few seconds of one core
_ROWS = 1 << 16  # copied at a time

Array = TypeVar("Array", np.ndarray, torch.Tensor)


class Skipped(NamedTuple):
    """A molecule without a fingerprint."""

    index: int  # type: ignore[assignment]  # position in the input, from 0
    name: str
    error: str


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """Rows of bits, one for each molecule that could be read, in the order of the input.

    Bit ``i`` of a row is bit ``i % 8`` of its byte ``i // 8``; a row is whole words of 64 bits, zero beyond ``bits``.
    Sizes: ``maccs`` 166 bits in 24 bytes (RDKit's 167 without bit 0, which is never set); ``morgan``, radius 2, 1024
    bits in 128 bytes.
    """

    packed: np.ndarray  # [N, bytes] uint8; in memory, or mapped from a file
    bits: int
    kind: str
    names: Sequence[str] = ()  # [N] or none
    smiles: Sequence[str] = ()  # [N] or none
    skipped: Sequence[Skipped] = ()

    def __post_init__(self) -> None:
        width = _width(self.bits)
        if self.packed.dtype != np.uint8 or self.packed.ndim != 2 or self.packed.shape[1] != width:
            raise ValueError(
                f"packed: expected [N, {width}] uint8 for {self.bits} bits, got "
                f"{list(self.packed.shape)} {self.packed.dtype}"
            )
        for name, texts in (("names", self.names), ("smiles", self.smiles)):
            if len(texts) not in (0, len(self)):
                raise ValueError(f"{name}: expected {len(self)} or none, got {len(texts)}")

    def __len__(self) -> int:
        return len(self.packed)

    def tensor(self) -> torch.Tensor:
        """The rows as a tensor [N, bytes] uint8 that shares their memory."""
        return torch.from_numpy(self.packed)

    def unpack(self) -> np.ndarray:
        """The bits [N, bits] uint8, 0 and 1."""
        return unpack(self.packed, self.bits)

    def positions(self) -> np.ndarray:
        """Where each row's molecule was in the input, [N] int64 from 0."""
        kept = np.ones(len(self) + len(self.skipped), bool)
        kept[[skipped.index for skipped in self.skipped]] = False
        return np.flatnonzero(kept)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.npz`` that ``load`` maps; it appears under its name only when it is complete."""
        path = Path(path)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            parts = _fingerprint_store.Parts(Path(folder) / "parts", "", self.kind, self.bits)
            for first in range(0, len(self), _ROWS):
                rows = slice(first, first + _ROWS)
                parts.append(self.packed[rows], self.names[rows], self.smiles[rows], (), 0)
            parts.append(self.packed[:0], (), (), self.skipped, 0)
            parts.finish(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fingerprints:
        """Map a file that ``save`` wrote: rows and texts come from the disk when they are used.

        The arrays lie uncompressed in the archive, so a database may be larger than memory, and ``numpy.load`` reads
        it anywhere. FileNotFoundError; ValueError if the file is something else or damaged.
        """
        found = _fingerprint_store.load(Path(path))
        names, smiles = (_fingerprint_store.Texts(found[of], found[f"{of}_end"]) for of in ("names", "smiles"))
        skipped = [Skipped(*one) for one in found["skipped"]]
        return cls(found["packed"], found["bits"], found["kind"], names, smiles, skipped)


def fingerprints(
    molecules: Iterable[Any],
    kind: str = "maccs",
    *,
    processes: int | None = None,
    progress: bool = False,
    total: int | None = None,
) -> Fingerprints:
    """Fingerprints of SMILES or RDKit molecules, as RDKit makes them.

    ``kind``: ``maccs`` or ``morgan``. A molecule is taken without its explicit hydrogens, so that its fingerprint is
    that of its SMILES. What RDKit cannot read, or has no atoms, has no row: ``skipped`` tells its position and why.
    ``processes``: workers; None: one for each core, 0: in this process. They need no ``__main__`` guard and end with
    the call, by KeyboardInterrupt too. ``progress``: a bar on stderr if that is a terminal, ``total`` its end.
    """
    items = (_Item("", molecule, None) for molecule in molecules)
    if total is None and isinstance(molecules, Sized):
        total = len(molecules)
    return _gathered(list(_made(items, kind, processes, progress, total)), kind)


def fingerprints_of_file(
    path: str | os.PathLike[str],
    kind: str = "maccs",
    *,
    out: str | os.PathLike[str] | None = None,
    column: str | None = None,
    name_column: str | None = None,
    processes: int | None = None,
    progress: bool = False,
) -> Fingerprints:
    """Fingerprints of the molecules of a file that ``read`` takes, in memory; or with ``out`` in that file, mapped.

    Names are kept, and canonical SMILES. Lists and tables of SMILES are parsed by the workers, other files by this
    process. With ``out``, memory is bounded and what is finished stays in ``out.partial`` until all is done: the same
    call goes on from there. The rest as in ``fingerprints`` and ``read``.
    """
    path = Path(path)
    total = count_records(path) if progress else None

    def made(start: int) -> Generator[_Made, None, None]:
        texts = read_texts(path, column=column, name_column=name_column, start=start)
        items = (_Item(text.name, text.smiles, text.error) for text in texts)
        return _made(items, kind, processes, progress, total, start, canonical=True)

    if out is None:
        return _gathered(list(made(0)), kind)
    version = need("rdkit").__version__
    status = path.stat()
    key = f"{kind} {column} {name_column} {version} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    target = Path(out)
    parts = _fingerprint_store.Parts(target.with_name(f"{target.name}.partial"), key, kind, BITS[kind])
    try:
        for number, part in enumerate(made(parts.consumed), 1):
            parts.append(*part)
            if number % _KEEP == 0:
                parts.keep()
    except BaseException:
        parts.keep() if parts.rows else parts.remove()
        raise
    finally:
        parts.close()
    parts.finish(target)
    return Fingerprints.load(target)


def _gathered(made: list[_Made], kind: str) -> Fingerprints:
    packed = np.concatenate([np.empty((0, _width(BITS[kind])), np.uint8), *(part.packed for part in made)])
    names, smiles, skipped = ([one for part in made for one in getattr(part, of)] for of in _Made._fields[1:4])
    return Fingerprints(packed, BITS[kind], kind, names if any(names) else (), smiles, skipped)


def unpack(packed: Array, bits: int) -> Array:
    """Bits [N, bits] uint8, 0 and 1, of packed rows [N, bytes] uint8: an array of an array, a tensor of a tensor."""
    if packed.ndim != 2 or packed.shape[1] * 8 < bits:
        raise ValueError(f"packed: expected [N, {_width(bits)}] for {bits} bits, got {list(packed.shape)}")
    if isinstance(packed, torch.Tensor):
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
        return (packed[:, :, None] >> shifts & 1).flatten(1)[:, :bits].contiguous()
    return np.unpackbits(np.ascontiguousarray(packed), axis=1, count=bits, bitorder="little")


def pack(bits: Array) -> Array:
    """Packed rows [N, bytes] uint8, whole words of 64 bits, of bits [N, B]: what is not zero is one."""
    if bits.ndim != 2:
        raise ValueError(f"bits: expected [N, B], got {list(bits.shape)}")
    if isinstance(bits, torch.Tensor):
        rows = torch.nn.functional.pad((bits != 0).to(torch.uint8), (0, 8 * _width(bits.shape[1]) - bits.shape[1]))
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
        return (rows.reshape(len(rows), _width(bits.shape[1]), 8) * weights).sum(2, dtype=torch.uint8)
    rows = np.zeros((len(bits), _width(bits.shape[1])), np.uint8)
    rows[:, : (bits.shape[1] + 7) // 8] = np.packbits(bits != 0, axis=1, bitorder="little")
    return rows


def _width(bits: int) -> int:
    return (bits + 63) // 64 * 8


class _Item(NamedTuple):
    """A molecule of the input."""

    name: str
    molecule: Any  # SMILES or Mol
    error: str | None


class _Made(NamedTuple):
    """Rows of some molecules that lie one behind the other in the input."""

    packed: np.ndarray  # [n, bytes]
    names: list[str]
    smiles: list[str]
    skipped: list[Skipped]
    consumed: int  # molecules of the input up to here


def _made(
    items: Iterable[_Item],
    kind: str,
    processes: int | None,
    progress: bool,
    total: int | None,
    start: int = 0,
    canonical: bool = False,
) -> Generator[_Made, None, None]:
    """Rows in the order of the input, a few blocks ahead of the caller."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    for module in ("rdkit.Chem", "tqdm"):
        need(module)

    def task(block: list[_Item]) -> tuple[Any, ...]:
        return kind, [item.molecule for item in block if not item.error], canonical

    bar = need("tqdm").tqdm(total=total, initial=start, unit="mol", desc=kind, disable=None if progress else True)
    blocks = in_order(
        lambda count: Workers(_bits.compute, count, "fingerprint"), batched(items, _BLOCK), task, processes
    )
    with bar, closing(blocks):
        for block, result in blocks:
            made = _finish(kind, start, block, result)
            start = made.consumed
            bar.update(made.consumed - bar.n)
            yield made


def _finish(kind: str, start: int, block: list[_Item], result: _bits.Block) -> _Made:
    rows, broken, canonical = result
    names, smiles, skipped = [], [], []
    sent = itertools.count()
    for index, item in enumerate(block, start):
        error = item.error
        if error is None and next(sent) in broken:
            error = why_not(item.molecule)
        if error is None:
            names.append(item.name)
            smiles.append(item.molecule if isinstance(item.molecule, str) else "")
        else:
            skipped.append(Skipped(index, item.name, error))
    packed = np.frombuffer(rows, np.uint8).reshape(-1, _width(BITS[kind]))
    return _Made(packed, names, canonical or smiles, skipped, start + len(block))
