"""Databases of fingerprints searched for the nearest of each query, whether they fit into memory or not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastnuggets import ops
from fastnuggets.molecules.files import need
from fastnuggets.molecules.fingerprints import Fingerprints

Rows = Fingerprints | Tensor | np.ndarray

_CHUNK = 1 << 26  # bytes of a database that are searched at a time


def tanimoto_topk(
    queries: Rows,  # [Q, B] uint8
    database: Rows | str | os.PathLike[str] | Iterable[Rows],  # [N, B] uint8, whole or in chunks
    k: int,
    *,
    threshold: float = 0.0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:  # similarity [Q, k] float64, index [Q, k] int64
    """``ops.tanimoto_topk`` over any source: what comes out is the same however the rows are cut into chunks.

    ``queries`` and ``database`` are packed rows, as ``Fingerprints`` has them; ``database`` may also be the path of a
    file that ``Fingerprints.save`` wrote, or an iterable of chunks, which is run through once. A file is mapped and
    read a piece at a time, so it may be larger than memory. Rows are counted from 0 over all chunks. ``device``: where
    to search; by default where the queries are. ``progress``: a bar on stderr if that is a terminal.

    Raises ValueError if the two hold different kinds of fingerprints, and what ``ops.tanimoto_topk`` raises. Not
    differentiable. Deterministic.
    """
    if isinstance(database, (str, os.PathLike)):
        database = Fingerprints.load(Path(database))
    if isinstance(queries, Fingerprints) and isinstance(database, Fingerprints) and queries.kind != database.kind:
        raise ValueError(f"database: expected {queries.kind} fingerprints like the queries, got {database.kind}")
    wanted = _tensor(queries).to(device)
    total = len(database) if isinstance(database, Rows) else None
    bar = need("tqdm").tqdm(total=total, unit="row", desc="screen", disable=None if progress else True)
    best = ops.tanimoto_topk(wanted, wanted[:0], k, threshold=threshold)
    first = 0
    with bar:
        for chunk in _chunks(database):
            similarity, index = ops.tanimoto_topk(wanted, chunk.to(wanted.device), k, threshold=threshold)
            index = torch.where(index < 0, index, index + first)
            best = _merged(best, (similarity, index), k) if first else (similarity, index)
            first += len(chunk)
            bar.update(len(chunk))
    return best


def _tensor(rows: Rows) -> Tensor:
    if isinstance(rows, Tensor):
        return rows
    array = rows.packed if isinstance(rows, Fingerprints) else rows
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nothing writes to it
        return torch.from_numpy(array)


def _chunks(database: Rows | Iterable[Rows]) -> Iterator[Tensor]:
    for rows in (database,) if isinstance(database, Rows) else database:
        whole = _tensor(rows)
        yield from whole.split(max(1, _CHUNK // max(1, whole[:1].nbytes))) if len(whole) else (whole,)


def _merged(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The best of two sets, each in order: of equal rows those before, and places without a row last."""
    similarity, index = (torch.cat(pair, 1) for pair in zip(before, after, strict=True))
    order = similarity.masked_fill(index < 0, -1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return similarity.gather(1, order), index.gather(1, order)
