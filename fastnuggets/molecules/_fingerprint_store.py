"""The file of fingerprints: an uncompressed .npz whose arrays are mapped, written from parts that survive a stop.

Members: ``packed`` [N, bytes] uint8; ``names`` and ``smiles``, each UTF-8 one text after the other, [T] uint8, with
``names_end`` and ``smiles_end`` [N] int64, where each text ends, or [0] if there are none; ``about.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from fastnuggets.molecules.files import atomic_write, sync

_ARRAYS = ("packed", "names", "names_end", "smiles", "smiles_end")
_FORMAT = "fastnuggets fingerprints 1"
_COPY = 1 << 24


class Texts(Sequence[str]):
    """Texts of a mapped file, decoded when they are asked for."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self.blob = blob
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.blob[start : self.ends[index]].tobytes().decode()


class Parts:
    """A growing set of fingerprints in a folder, each array a file; whole only after ``finish``.

    A folder that a stopped writer with the same ``key`` left is gone on from: ``consumed`` molecules are done.
    """

    def __init__(self, folder: Path, key: str, kind: str, bits: int) -> None:
        self.folder = folder
        self.state: dict[str, Any] = {"key": key, "kind": kind, "bits": bits, "consumed": 0, "rows": 0, "skipped": []}
        sizes = dict.fromkeys(_ARRAYS, 0)
        try:
            state = json.loads((folder / "state.json").read_text())
            if state["key"] == key:
                self.state, sizes = state, state["sizes"]
        except (OSError, ValueError, KeyError):
            pass  # nothing to go on from
        folder.mkdir(exist_ok=True)
        self.files: dict[str, IO[bytes]] = {}
        for name in _ARRAYS:
            (folder / name).touch()
            os.truncate(folder / name, sizes[name])
            self.files[name] = open(folder / name, "ab")  # noqa: SIM115

    @property
    def consumed(self) -> int:
        return int(self.state["consumed"])

    @property
    def rows(self) -> int:
        return int(self.state["rows"])

    def append(
        self,
        packed: np.ndarray,
        names: Sequence[str],
        smiles: Sequence[str],
        skipped: Iterable[tuple[int, str, str]],
        consumed: int,
    ) -> None:
        self.files["packed"].write(np.ascontiguousarray(packed).data)
        for name, texts in (("names", names), ("smiles", smiles)):
            encoded = [text.encode() for text in texts]
            ends = self.files[name].tell() + np.cumsum([len(text) for text in encoded], dtype=np.int64)
            self.files[name].write(b"".join(encoded))
            self.files[f"{name}_end"].write(ends.astype("<i8").data)
        self.state["rows"] += len(packed)
        self.state["skipped"] += [list(one) for one in skipped]
        self.state["consumed"] = consumed

    def keep(self) -> None:
        """Make what is there survive whatever comes."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.state["sizes"] = {name: file.tell() for name, file in self.files.items()}
        with atomic_write(self.folder / "state.json") as file:
            file.write(json.dumps(self.state).encode())

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.folder)

    def finish(self, path: Path) -> None:
        """The file under its name, and the folder gone."""
        self.close()
        about = {"format": _FORMAT, **{key: self.state[key] for key in ("kind", "bits", "skipped")}}
        with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
            for name in _ARRAYS:
                member = zipfile.ZipInfo(f"{name}.npy")  # whose date is fixed: the same rows give the same bytes
                with open(self.folder / name, "rb") as part, archive.open(member, "w", force_zip64=True) as out:
                    self._header(out, name, os.fstat(part.fileno()).st_size)
                    shutil.copyfileobj(part, out, _COPY)
            archive.writestr(zipfile.ZipInfo("about.json"), json.dumps(about))
        shutil.rmtree(self.folder)
        sync(path.parent)

    def _header(self, out: IO[bytes], name: str, size: int) -> None:
        dtype = "<i8" if name.endswith("_end") else "|u1"
        shape = (self.rows, _width(self.state["bits"])) if name == "packed" else (size // np.dtype(dtype).itemsize,)
        np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})


def load(path: Path) -> dict[str, Any]:
    """The mapped arrays of a file, and what ``about.json`` says. ValueError if it is something else or damaged."""
    if not path.is_file():
        raise FileNotFoundError(2, os.strerror(2), str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("about.json"))
            if about["format"] != _FORMAT:
                raise ValueError(f"it is {about['format']}")
            return {**about, **{name: _mapped(path, archive, name) for name in _ARRAYS}}
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole file of fingerprints: {error}") from error


def _mapped(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with open(path, "rb") as file:
        # The archive's directory says where a member's own header begins; names and fields of any length follow it.
        file.seek(member.header_offset + 26)
        file.seek(sum(int.from_bytes(file.read(2), "little") for _ in range(2)), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    if 0 in shape:
        return np.empty(shape, dtype)
    # Private to this process and so writable, as a tensor that shares the memory must be.
    return np.memmap(path, dtype, "c", start, shape)


def _width(bits: int) -> int:
    return (bits + 63) // 64 * 8
