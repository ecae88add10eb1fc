"""The SMILES of a file, all of them in memory: canonical, each molecule once, read by several processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastnuggets.molecules import _canonical, readers
from fastnuggets.molecules.files import batched, need
from fastnuggets.molecules.vocabulary import Strings
from fastnuggets.molecules.workers import Workers, in_order

_BLOCK = 1024  # SMILES that a worker takes at a time, a fifth of a second


class SmilesFile(NamedTuple):
    """The molecules of a file that can be used, in its order, and how many cannot."""

    strings: Strings
    broken: int  # records that RDKit cannot read
    too_long: int
    repeated: int  # the first of each is kept
    reason: str  # why the first broken record is


def smiles_of_file(
    path: str | os.PathLike[str],
    *,
    canonical: bool = True,
    longest: int | None = None,
    column: str | None = None,
    processes: int | None = None,
    progress: bool = False,
) -> SmilesFile:
    """Canonical SMILES of a file that ``read`` takes, as it would give them.

    ``canonical``: False takes SMILES as they stand in the file, a million in 9 seconds of one core in place of six
    minutes; right if a file is known to have canonical ones, as whether they are molecules is then not looked at.
    ``longest``: SMILES of more characters are left out. ``processes``: workers; None: one for each core, 0: in this
    process. They need no ``__main__`` guard and end with the call, by KeyboardInterrupt too. ``progress``: a bar on
    stderr if that is a terminal. Raises FileNotFoundError; ValueError for an unknown ending or a missing column.
    """
    path = Path(path)
    for module in ("rdkit.Chem", "tqdm"):
        need(module)
    total = readers.count_records(path) if progress else None
    blocks = _blocks(path, column, canonical, processes)
    parts, broken, too_long, reason = [], 0, 0, ""
    with need("tqdm").tqdm(total=total, unit="mol", desc="reading", disable=None if progress else True) as bar:
        for given, found in blocks:
            good = [text for text in found if text and (longest is None or len(text) <= longest)]
            bad = [i for i, text in enumerate(found) if not text]
            if bad and not broken:
                reason = _reason(given[bad[0]])
            broken += len(bad)
            too_long += len(found) - len(bad) - len(good)
            parts.append(_with_digests(good))
            bar.update(len(found))
    strings = Strings.cat([part for part, _ in parts])
    hashes = np.concatenate([np.empty(0, np.uint64), *(part for _, part in parts)])
    first = np.sort(np.unique(hashes, return_index=True)[1])
    return SmilesFile(strings.take(first), broken, too_long, len(strings) - len(first), reason)


def digests(texts: Iterable[str]) -> np.ndarray:
    """[B] uint64: 64 bits of a hash of each text. Of ten million texts two share one once in 400,000 times."""
    found = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(found), np.uint64)


def _reason(text: readers.Text) -> str:
    if not text.smiles.isascii():
        return f"{text.smiles!r} has characters that are not of SMILES"
    return text.error or readers.why_not(text.smiles)


def _with_digests(texts: list[str]) -> tuple[Strings, np.ndarray]:
    return Strings.of(texts), digests(texts)


def _blocks(
    path: Path, column: str | None, canonical: bool, processes: int | None
) -> Iterator[tuple[list[readers.Text], list[str]]]:
    """Blocks of the file and their SMILES, empty if broken, a few blocks ahead of the caller."""
    blocks = batched(readers.read_texts(path, column=column), _BLOCK)
    if not canonical:
        return ((block, [text.smiles if text.smiles.isascii() else "" for text in block]) for block in blocks)
    return in_order(
        lambda count: Workers(_canonical.compute, count, "reading"),
        blocks,
        lambda block: ([text.smiles for text in block],),
        processes,
    )
