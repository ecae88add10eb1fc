"""COCO data sets on the disk: images and records as they come, one annotations file at the end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastnuggets.molecules.files import atomic_write, sync
from fastnuggets.scenes.composer import Scene
from fastnuggets.scenes.images import encode

_RECORDS, _KEY = "records.jsonl", "key.json"
Record = dict[str, Any]


def coco_annotations(scene: Scene, boxes: str = "visible", keep_hidden: bool = False) -> list[Record]:
    """COCO annotations of a scene, without ``id`` and ``image_id``.

    ``segmentation`` (RLE), ``area`` and ``bbox`` are of what is visible; boxes: ``"amodal"`` for the box of the whole
    object inside the image. Beside them ``amodal_bbox``, ``visibility``, ``truncation``, ``depth_order`` (pasted later
    is higher) and ``source``. keep_hidden: objects too of which nothing is visible, with an empty segmentation.
    """
    labels = scene.labels
    found = []
    for one in labels.everything:
        if one.distractor or not (one.area or (keep_hidden and one.amodal_area)):
            continue
        visible, amodal = list(one.box or (0, 0, 0, 0)), list(one.amodal_box or (0, 0, 0, 0))
        found.append(
            {
                "category_id": labels.category_id(one),
                "bbox": amodal if boxes == "amodal" else visible,
                "area": one.area,
                "segmentation": labels.rle(one),
                "iscrowd": 0,
                "amodal_bbox": amodal,
                "visibility": round(one.visibility, 4),
                "truncation": round(one.truncation, 4),
                "depth_order": one.number,
                "source": one.name,
            }
        )
    return found


class CocoWriter:
    """Writes a folder ``images`` and ``annotations.json`` so that nothing finished is lost and no half is left.

    Work is kept in ``out.partial`` until ``finish`` renames it to ``out``. A writer made again with the same ``key``
    goes on: ``done`` has the scenes that need not be made again. One line of ``records.jsonl`` is a scene; it counts if
    its images are there in the size that it says.

    out: a folder that does not exist. key: whatever must not change in between, compared as JSON. scenes: how
    many there will be, which may change. restart: throw away
    what is in ``out.partial``. overwrite: replace ``out`` at the end. Raises FileExistsError; ValueError for unfinished
    work of another key.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        key: Record,
        *,
        scenes: int,
        restart: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out, self.scenes = Path(out), scenes
        key = json.loads(json.dumps(key))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.images = self.partial / "images"
        self.done: dict[int, int] = {}  # scene: where its record begins in the file
        self.skipped: dict[str, str] = {}
        self.annotations = self.left_out = 0
        if self.out.exists() and not overwrite:
            raise FileExistsError(errno.EEXIST, "the output exists already", str(self.out))
        if restart and self.partial.exists():
            shutil.rmtree(self.partial)
        if self.partial.exists():
            self._go_on(key)
        else:
            self.images.mkdir(parents=True)
            with atomic_write(self.partial / _KEY) as file:
                file.write(json.dumps(key, sort_keys=True).encode())
        self._records: BinaryIO = open(self.partial / _RECORDS, "ab")  # noqa: SIM115 - closed by close()

    def _go_on(self, key: Any) -> None:
        try:
            before = json.loads((self.partial / _KEY).read_text())
        except FileNotFoundError:
            raise FileExistsError(
                errno.EEXIST, "it is in the way and not known to be unfinished work", str(self.partial)
            ) from None
        other = [name for name in sorted({*key, *before}) if key.get(name) != before.get(name)]
        if other:
            changes = "; ".join(f"{name} was {before.get(name)} and is {key.get(name)}" for name in other)
            raise ValueError(f"out: {self.partial} was begun with other settings ({changes}); finish or restart it")
        for leftover in self.partial.rglob(".*.tmp"):
            leftover.unlink()
        good = 0
        for start, record in self._read():
            if record is None:
                break
            good = start + record["bytes"]
            if all(_size(self.images / name) == size for name, size in record["files"].items()):
                self._count(start, record)
        if (self.partial / _RECORDS).exists():
            os.truncate(self.partial / _RECORDS, good)  # a last line that was not written to its end

    def _read(self) -> Iterator[tuple[int, Record | None]]:
        with contextlib.suppress(FileNotFoundError), open(self.partial / _RECORDS, "rb") as file:
            start = 0
            for line in file:
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    record = None
                yield start, record and {**record, "bytes": len(line)}
                start += len(line)

    def _count(self, start: int, record: Record) -> None:
        if record["scene"] >= self.scenes:
            return
        self.done[record["scene"]] = start
        self.skipped.update(record["skipped"])
        self.annotations += len(record["annotations"]) * len(record["files"])
        self.left_out += record["left_out"]

    def append(self, record: Record) -> None:
        """Keep the record of a scene whose images are written, as `write_scene` makes it."""
        start = self._records.tell()
        self._records.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._records.flush()
        self._count(start, record)

    def finish(self, categories: Sequence[str], info: Record) -> Path | None:
        """Write ``annotations.json`` in the order of the scenes, and give the folder its name.

        Returns the list of broken files beside it, ``out.skipped.tsv``, if there are any.
        """
        self.close()
        sync(self.partial / _RECORDS)
        with open(self.partial / _RECORDS, "rb") as records, atomic_write(self.partial / "annotations.json") as file:
            for part in self._json(records, categories, info):
                file.write(part.encode())
        report = None
        if self.skipped:
            report = self.out.with_name(self.out.name + ".skipped.tsv")
            with atomic_write(report) as file:
                file.writelines(f"{name}\t{reason}\n".encode() for name, reason in sorted(self.skipped.items()))
        sync(self.images)
        replaced = self.partial / ".replaced"
        if self.out.exists():
            os.rename(self.out, replaced)
        os.rename(self.partial, self.out)
        sync(self.out.parent)
        for name in (_RECORDS, _KEY):
            (self.out / name).unlink()
        shutil.rmtree(self.out / replaced.name, ignore_errors=True)
        return report

    def _json(self, records: BinaryIO, categories: Sequence[str], info: Record) -> Iterator[str]:
        """The file in pieces: a million annotations are not kept in memory."""
        yield '{"info":' + json.dumps(info) + ',"categories":'
        yield json.dumps([{"id": number, "name": name} for number, name in enumerate(categories, start=1)])
        yield ',"images":['
        yield from _joined(json.dumps(image) for image, _ in self._numbered(records))
        yield '],"annotations":['
        every = (one for image, found in self._numbered(records) for one in _owned(image["id"], found))
        yield from _joined(json.dumps({"id": number, **one}) for number, one in enumerate(every, start=1))
        yield "]}\n"

    def _numbered(self, records: BinaryIO) -> Iterator[tuple[Record, list[Record]]]:
        number = 0
        for scene in sorted(self.done):
            records.seek(self.done[scene])
            record = json.loads(records.readline())
            for blend, name in zip(record["blends"], record["files"], strict=True):
                number += 1
                image = {"id": number, "file_name": name, "width": record["width"], "height": record["height"]}
                more = {"scene": scene, "blend": blend, "background": record["background"]}
                yield {**image, **more}, record["annotations"]

    def close(self) -> None:
        self._records.close()

    def discard(self) -> None:
        """Throw away what is not finished."""
        self.close()
        shutil.rmtree(self.partial)


def _owned(image: int, found: Iterable[Record]) -> Iterator[Record]:
    for one in found:
        yield {"image_id": image, **one}


def _joined(parts: Iterable[str]) -> Iterator[str]:
    for number, part in enumerate(parts):
        yield f",\n{part}" if number else part


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def write_scene(scene: Scene, folder: Path, kind: str, *, quality: int, boxes: str, keep_hidden: bool) -> Record:
    """Write the images of a scene into ``folder`` and return its record, for `CocoWriter.append`."""
    several = len(scene.images) > 1
    files = {}
    for blend, image in scene.images.items():
        name = f"{scene.number:06d}_{blend}.{kind}" if several else f"{scene.number:06d}.{kind}"
        data = encode(image, kind, quality)
        _write(folder / name, data)
        files[name] = len(data)
    height, width = scene.labels.ids.shape
    return {
        "scene": scene.number,
        "width": width,
        "height": height,
        "background": scene.background_name,
        "blends": list(scene.images),
        "files": files,
        "annotations": coco_annotations(scene, boxes, keep_hidden),
        "left_out": scene.left_out,
        "skipped": {},
    }


def _write(path: Path, data: bytes) -> None:
    """Like `atomic_write` without waiting for the folder: `CocoWriter` knows by the size what is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError) and not error.filename:  # a full disk is noticed by a write, which has no name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
