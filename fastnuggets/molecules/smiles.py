"""The SMILES of a file, all of them in memory: canonical, each molecule once, read by several processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastnuggets.molecules import _canonical, readers
from fastnuggets.molecules.batch import Molecules
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


def read_smiles(
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
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    damage: list[str] = []
    texts, ready = _texts(path, column, damage)
    total = readers.count_records(path) if progress else None
    parts, broken, too_long, reason = [], 0, 0, ""
    bar = need("tqdm").tqdm(total=total, unit="mol", desc="reading", disable=None if progress else True)
    with bar, contextlib.closing(_canonical_blocks(texts, ready or not canonical, processes)) as blocks:
        for given, found in blocks:
            good = [text for text in found if text and (longest is None or len(text) <= longest)]
            bad = [i for i, text in enumerate(found) if not text]
            if bad and not broken:
                reason = given[bad[0]].error or readers.why_not(given[bad[0]].text)
            broken += len(bad)
            too_long += len(found) - len(bad) - len(good)
            parts.append(_with_digests(good))
            bar.update(len(found))
    if damage and not broken:
        reason = damage[0]
    strings = Strings.cat([part for part, _ in parts])
    hashes = np.concatenate([np.empty(0, np.uint64), *(part for _, part in parts)])
    first = np.sort(np.unique(hashes, return_index=True)[1])
    return SmilesFile(strings.take(first), broken + len(damage), too_long, len(strings) - len(first), reason)


def digests(texts: Iterable[str]) -> np.ndarray:
    """[B] uint64: 64 bits of a hash of each text. Of ten million texts two share one once in 400,000 times."""
    found = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(found), np.uint64)


def _with_digests(texts: list[str]) -> tuple[Strings, np.ndarray]:
    return Strings.of(texts), digests(texts)


class _Text(NamedTuple):
    text: str
    error: str | None = None


def _texts(path: Path, column: str | None, damage: list[str]) -> tuple[Iterator[_Text], bool]:
    """What stands in the file, and whether that is canonical already."""
    form = readers._format(path)
    if form.parse in (readers._parse_sdf, readers._parse_pdb):
        return (_Text(record.smiles, record.error) for record in readers.read(path)), True
    source = path if form.records is readers._parquet else readers._lines(path, damage)
    return (_as_text(payload) for _, payload in form.records(source, damage, (column, None))), False


def _as_text(payload: Any) -> _Text:
    if isinstance(payload, Molecules):
        payload = payload.smiles[0]
    if not isinstance(payload, str):
        return _Text("", str(payload))
    text = payload.strip()
    if not text or not text.isascii():
        return _Text("", "no SMILES" if not text else f"{text!r} has characters that are not of SMILES")
    return _Text(text)


def _canonical_blocks(
    texts: Iterator[_Text], ready: bool, processes: int | None
) -> Generator[tuple[list[_Text], list[str]], None, None]:
    """Blocks of the file and their SMILES, empty if broken, a few blocks ahead of the caller."""
    blocks = batched(texts, _BLOCK)
    if ready:
        for plain in blocks:
            yield plain, [item.text for item in plain]
        return
    found = in_order(
        lambda count: Workers(_canonical.compute, count, "reading"),
        blocks,
        lambda block: ([item.text for item in block],),
        processes,
    )
    with contextlib.closing(found):
        yield from found
