"""Stored grids: a zarr v3 group with one molecule in a chunk, or an npz file for a few.

Both hold ``grids`` [M, C, D, H, W], ``centers`` [M, 3] (the point of each molecule in the middle of its box,
angstrom), ``names`` and ``smiles`` [M], and the ``GridInfo`` that says how the grids were made. Grids are large:
coordinates in the table of ``save_table`` and grids made on the fly take a thousandth of the room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastnuggets.molecules.files import atomic_write, available_memory, need, readable, sync

_ATTRIBUTE = "fastnuggets"
_ROWS = 1024  # molecules in one chunk of the small arrays
_SMALL = ("centers", "names", "smiles")


@dataclass(frozen=True)
class GridInfo:
    """How grids were made: arguments of ``fastnuggets.ops.voxelize`` and the element of each channel."""

    density: str
    elements: tuple[str, ...]  # [C]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]  # angstrom
    sigma: float | None
    omega: float | None
    radius: tuple[float, ...] | None  # [C] angstrom
    dtype: str
    version: str  # of fastnuggets

    def bytes_per_molecule(self) -> int:
        return len(self.elements) * int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize


class GridWriter:
    """Appends grids to ``out`` so that nothing finished is lost and nothing unfinished bears the name ``out``.

    Work is kept in ``out.partial`` until ``finish()`` renames it. A writer made again with the same arguments goes on
    after the last ``append``: ``consumed`` records of the input need not be read again and ``written`` molecules are
    there.

    out: path ending in .zarr or .npz. capacity: most molecules there can be. key: whatever else must not change
    between an interruption and going on (input file, options), compared as text. restart: throw away what is in
    ``out.partial``. overwrite: replace ``out`` at the end if it exists. Raises FileExistsError; ValueError for another
    ending, for an unfinished ``out.partial`` of other arguments, for an npz that could not be loaded into memory;
    OSError if the disk is full.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        info: GridInfo,
        *,
        capacity: int,
        key: str = "",
        restart: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out = Path(out)
        self.info = info
        self.capacity = capacity
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.consumed = self.written = self.skipped = 0
        self.notes: Counter[str] = Counter()
        if self.out.suffix not in (".zarr", ".npz"):
            raise ValueError(f"out: expected a name ending in .zarr or .npz, got {self.out}")
        if self.out.exists() and not overwrite:
            raise FileExistsError(errno.EEXIST, "the output exists already", str(self.out))
        one, free = info.bytes_per_molecule(), available_memory()
        if self.out.suffix == ".npz" and capacity * one > free:
            raise ValueError(
                f"out: an npz is loaded whole, and {capacity} grids of {readable(one)} take up to "
                f"{readable(capacity * one)}, but {readable(free)} of memory are free; write a .zarr"
            )
        self._key = json.dumps([dataclasses.asdict(info), capacity, key], sort_keys=True)
        if restart and self.partial.exists():
            shutil.rmtree(self.partial)
        if not self._go_on():
            self._create(capacity)

    def _go_on(self) -> bool:
        try:
            state = json.loads((self.partial / "progress.json").read_text())
        except FileNotFoundError:
            return False
        if state["key"] != self._key:
            raise ValueError(f"out: {self.partial} was begun with other options or another input; finish or restart it")
        self.consumed, self.written, self.skipped = (state[name] for name in ("consumed", "written", "skipped"))
        self.notes.update(state["notes"])
        for leftover in (self.partial / "store").rglob("*.partial"):  # zarr's own temporary files
            leftover.unlink()
        os.truncate(self.partial / "skipped.tsv", state["skipped_bytes"])
        self._group = _zarr().open_group(self.partial / "store", mode="r+")
        return True

    def _create(self, capacity: int) -> None:
        zarr = _zarr()
        if self.partial.exists():
            raise FileExistsError(
                errno.EEXIST, "it is in the way and not known to be unfinished work", str(self.partial)
            )
        self.partial.mkdir(parents=True)
        try:
            self._create_arrays(zarr, capacity)
        except BaseException:
            shutil.rmtree(self.partial)
            raise

    def _create_arrays(self, zarr: Any, capacity: int) -> None:
        grid = (len(self.info.elements), *self.info.shape)
        self._group = zarr.open_group(self.partial / "store", mode="w", zarr_format=3)
        options = {"compressors": zarr.codecs.ZstdCodec(level=3), "chunk_key_encoding": _FLAT}
        self._group.create_array("grids", shape=(capacity, *grid), chunks=(1, *grid), dtype=self.info.dtype, **options)
        self._group.create_array("centers", shape=(capacity, 3), chunks=(_ROWS, 3), dtype="float32", **options)
        for name in ("names", "smiles"):
            self._group.create_array(name, shape=(capacity,), chunks=(_ROWS,), dtype=str, **options)
        self._group.attrs[_ATTRIBUTE] = dataclasses.asdict(self.info)
        (self.partial / "skipped.tsv").touch()
        self._save_progress()

    def append(
        self,
        grids: np.ndarray,
        centers: np.ndarray,
        names: Sequence[str],
        smiles: Sequence[str],
        *,
        consumed: int,
        skipped: Iterable[tuple[int, str, str]] = (),
        notes: Mapping[str, int] | None = None,
    ) -> None:
        """Add grids [b, C, D, H, W] with centers [b, 3]; on the disk when this returns.

        consumed: records of the input used so far, in all. skipped: (number, name, reason) of those among them since
        the last call that gave no grid. notes: counts of anything worth telling at the end, summed in ``self.notes``.
        """
        first, last = self.written, self.written + len(grids)
        if last > first:
            self._group["grids"][first:last] = grids
            self._group["centers"][first:last] = centers
            self._group["names"][first:last] = np.array(list(names), dtype=object)
            self._group["smiles"][first:last] = np.array(list(smiles), dtype=object)
        lines = ["\t".join((str(number), name, reason)) + "\n" for number, name, reason in skipped]
        with open(self.partial / "skipped.tsv", "a", encoding="utf-8") as file:
            file.writelines(lines)
        store = self.partial / "store"
        chunks = [store / "grids" / f"c.{row}.0.0.0.0" for row in range(first, last)]
        for row in range(first // _ROWS, -(-last // _ROWS)):
            chunks += [store / "centers" / f"c.{row}.0", store / "names" / f"c.{row}", store / "smiles" / f"c.{row}"]
        for path in [*chunks, self.partial / "skipped.tsv"]:
            if path.exists():  # zarr does not write a chunk of zeros
                sync(path)
        self.consumed, self.written, self.skipped = consumed, last, self.skipped + len(lines)
        self.notes.update(notes or {})
        self._save_progress()

    def _save_progress(self) -> None:
        state = {
            "key": self._key,
            "consumed": self.consumed,
            "written": self.written,
            "skipped": self.skipped,
            "notes": self.notes,
            "skipped_bytes": (self.partial / "skipped.tsv").stat().st_size,
        }
        with atomic_write(self.partial / "progress.json") as file:
            file.write(json.dumps(state).encode())

    def finish(self) -> Path | None:
        """Give the output its name; without a molecule there is none.

        Returns the list of skipped records beside it, ``out.skipped.tsv``, if there are any.
        """
        if not self.written:
            self.discard()
            return None
        for name in ("grids", *_SMALL):
            array = self._group[name]
            array.resize((self.written, *array.shape[1:]))
        if self.out.suffix == ".npz":
            with atomic_write(self.out) as file:
                _pack(self._group, self.info, file)
        else:
            if self.out.exists():
                os.rename(self.out, self.partial / "replaced")
            os.rename(self.partial / "store", self.out)
            sync(self.out.parent)
        report = None
        if self.skipped:
            report = self.out.with_name(self.out.name + ".skipped.tsv")
            os.replace(self.partial / "skipped.tsv", report)
        self.discard()
        return report

    def discard(self) -> None:
        """Throw away what is not finished."""
        shutil.rmtree(self.partial)


def _zarr() -> Any:
    zarr = need("zarr")
    if int(zarr.__version__.split(".")[0]) < 3:
        raise ImportError(f"grids need zarr 3, which needs Python 3.11; zarr {zarr.__version__} is installed")
    return zarr


# One folder of chunks: the default of zarr makes four nested folders for each molecule.
_FLAT = {"name": "default", "configuration": {"separator": "."}}


def _pack(group: Any, info: GridInfo, file: Any) -> None:
    """An npz of the group, a molecule at a time: numpy's own writer would need all of it in memory."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        grids = group["grids"]
        with archive.open("grids.npy", "w", force_zip64=True) as member:
            header = {"descr": np.dtype(info.dtype).str, "fortran_order": False, "shape": grids.shape}
            np.lib.format.write_array_header_2_0(member, header)
            for row in range(grids.shape[0]):
                member.write(np.ascontiguousarray(grids[row]).tobytes())
        small = {name: np.array([str(text) for text in group[name][:]], np.str_) for name in ("names", "smiles")}
        small["centers"] = np.asarray(group["centers"][:])
        small[_ATTRIBUTE] = np.array(json.dumps(dataclasses.asdict(info)))
        for name, array in small.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            archive.writestr(f"{name}.npy", buffer.getvalue())


@dataclass(frozen=True)
class Grids:
    """Stored grids. ``grids[i:j]`` reads [j - i, C, D, H, W] as numpy; zarr reads only those, npz all of it at once."""

    info: GridInfo
    centers: np.ndarray  # [M, 3] float32, angstrom
    names: list[str]
    smiles: list[str]
    array: Any  # [M, C, D, H, W], a zarr array or numpy

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.asarray(self.array[rows])


def open_grids(path: str | os.PathLike[str]) -> Grids:
    """Open what ``GridWriter`` wrote. FileNotFoundError; ValueError if the file is something else or too large to
    load."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        source, info = _open_npz(path) if path.is_file() else _open_zarr(path)
        fields = {**info, **{name: tuple(info[name]) for name in ("elements", "shape", "spacing")}}
        fields["radius"] = None if info["radius"] is None else tuple(info["radius"])
        small = {name: source[name][:] for name in _SMALL}
        return Grids(
            GridInfo(**fields),
            np.asarray(small["centers"]),
            [str(name) for name in small["names"]],
            [str(smiles) for smiles in small["smiles"]],
            source["grids"],
        )
    except (KeyError, TypeError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected grids written by fastnuggets ({type(error).__name__}: {error})") from error


def _open_npz(path: Path) -> tuple[Any, dict[str, Any]]:
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("grids.npy").file_size
    if size > available_memory():
        raise ValueError(f"{path}: its grids take {readable(size)}, and {readable(available_memory())} are free")
    source = np.load(path, allow_pickle=False)
    return source, json.loads(str(source[_ATTRIBUTE]))


def _open_zarr(path: Path) -> tuple[Any, dict[str, Any]]:
    zarr = _zarr()
    with contextlib.suppress(FileNotFoundError):
        group = zarr.open_group(path, mode="r")
        return group, dict(group.attrs)[_ATTRIBUTE]
    raise ValueError(f"{path}: expected grids written by fastnuggets, got a folder that is no zarr group")
