"""The coordinate table: Parquet with ``smiles: string, name: string, z: list<uint8>, xyz: list<float32>``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastnuggets.molecules.batch import Molecules
from fastnuggets.molecules.files import atomic_write, need

_COLUMNS = ("smiles", "name", "z", "xyz")
_ROW_GROUP = 65536  # molecules; about 18 MB of drug-like molecules with hydrogens


def _schema() -> Any:
    pa = need("pyarrow")
    return pa.schema(
        [("smiles", pa.string()), ("name", pa.string()), ("z", pa.list_(pa.uint8())), ("xyz", pa.list_(pa.float32()))]
    )


def _to_arrow(molecules: Molecules) -> Any:
    pa = need("pyarrow")
    ptr = molecules.ptr.cpu().numpy().astype(np.int32)
    numbers = pa.array(molecules.numbers.cpu().numpy())
    coords = pa.array(molecules.coords.cpu().numpy().astype(np.float32, copy=False).ravel())
    z, xyz = pa.ListArray.from_arrays(ptr, numbers), pa.ListArray.from_arrays(3 * ptr, coords)
    texts = [pa.array(list(column), pa.string()) for column in (molecules.smiles, molecules.names)]
    return pa.Table.from_arrays([*texts, z, xyz], schema=_schema())


def _from_arrow(table: Any) -> Molecules:
    table = table.combine_chunks()
    z, xyz = (_flat(table.column(name)) for name in ("z", "xyz"))
    counts = np.diff(z[1])
    if not np.array_equal(np.diff(xyz[1]), 3 * counts):
        raise ValueError("a molecule has not three coordinates for each atomic number")
    # Arrow's memory is read-only and a tensor's is not: these copies are the only ones.
    return Molecules(
        torch.from_numpy(xyz[0].astype(np.float32).reshape(-1, 3)),
        torch.from_numpy(z[0].astype(np.uint8)),
        torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int64)),
        [text or "" for text in table.column("name").to_pylist()],
        [text or "" for text in table.column("smiles").to_pylist()],
    )


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a list column."""
    pa = need("pyarrow")
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # a table with no rows has no chunk to combine
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        raise ValueError("a molecule has no coordinates")
    return column.flatten().to_numpy(zero_copy_only=False), column.offsets.to_numpy()


def open_parquet(path: Path) -> Any:
    """A memory-mapped ``pyarrow.parquet.ParquetFile``. ValueError if it is damaged."""
    pa, pq = need("pyarrow"), need("pyarrow.parquet")
    try:
        return pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from error


def save_table(path: str | os.PathLike[str], molecules: Molecules | Iterable[Molecules]) -> int:
    """Write one batch, or a stream of batches in constant memory; returns the number of molecules.

    The file appears under its name only when it is complete. OSError if the disk is full.
    """
    pq = need("pyarrow.parquet")
    stream = [molecules] if isinstance(molecules, Molecules) else molecules
    count = 0
    with (
        atomic_write(Path(path)) as file,
        pq.ParquetWriter(file, _schema(), compression="zstd", use_dictionary=False) as writer,
    ):
        for group in _row_groups(stream):
            writer.write_table(_to_arrow(group))
            count += len(group)
    return count


def _row_groups(stream: Iterable[Molecules]) -> Iterator[Molecules]:
    """Batches of _ROW_GROUP molecules: many small row groups would make the file slow to read."""
    waiting: list[Molecules] = []
    for molecules in stream:
        for part in molecules.batches(_ROW_GROUP):
            waiting.append(part)
            if sum(map(len, waiting)) >= _ROW_GROUP:
                yield Molecules.cat(waiting)
                waiting = []
    if waiting:
        yield Molecules.cat(waiting)


def iter_table(path: str | os.PathLike[str], batch_size: int = _ROW_GROUP) -> Iterator[Molecules]:
    """Batches of a coordinate table in constant memory. ValueError if the file is damaged or lacks a column."""
    pa = need("pyarrow")
    with open_parquet(Path(path)) as file:
        missing = set(_COLUMNS) - set(file.schema_arrow.names)
        if missing:
            raise ValueError(f"{path} is not a coordinate table: it has no column {', '.join(sorted(missing))}")
        for batch in file.iter_batches(batch_size, columns=list(_COLUMNS)):
            yield _from_arrow(pa.Table.from_batches([batch]))


def load_table(path: str | os.PathLike[str]) -> Molecules:
    """A whole coordinate table as flat tensors. The file is memory-mapped: only the decoded tensors take memory."""
    parts = list(iter_table(path))
    if not parts:
        return Molecules.from_conformers([])
    return parts[0] if len(parts) == 1 else Molecules.cat(parts)
