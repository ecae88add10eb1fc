"""A whole data set of scenes on the disk, by all cores; an interruption costs what was in the making."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastnuggets
from fastnuggets.molecules.files import cores, need
from fastnuggets.scenes.coco import CocoWriter, Record, write_scene
from fastnuggets.scenes.composer import SceneComposer
from fastnuggets.scenes.images import FORMATS, opencv

_AHEAD = 3  # scenes given to a worker before the first of them is done


@dataclass(frozen=True)
class Composed:
    """What `compose` made."""

    out: Path
    scenes: int
    images: int
    annotations: int
    left_out: int  # objects for which no place was found
    skipped: dict[str, str]  # broken files by name, with the reason
    report: Path | None  # where they are listed


def compose(
    composer: SceneComposer,
    out: str | os.PathLike[str],
    scenes: int,
    *,
    kind: str = "jpg",
    quality: int = 95,
    workers: int | None = None,
    restart: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Composed:
    """Write scenes 0 .. ``scenes`` - 1 as a COCO data set: ``out/images`` and ``out/annotations.json``.

    Until all is done the work is in ``out.partial``, and the same call goes on from there. The same call gives the same
    files, whatever the number of workers and of interruptions.

    workers: processes of one thread each; None: one for each core; 0: in this process. As they are started anew, a
    script that calls this needs an ``if __name__ == "__main__"`` guard.
    Raises FileExistsError; ValueError for unfinished work of other settings; OSError if the disk is full; RuntimeError
    if a worker dies.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind must be one of {', '.join(FORMATS)}, got {kind!r}")
    if scenes < 1 or not 1 <= quality <= 100:
        raise ValueError(f"expected at least one scene and a quality of 1 to 100, got {scenes} and {quality}")
    for module in ("cv2", "PIL.Image", "pycocotools.mask"):
        need(module, "scenes")
    key = {**describe(composer), "format": kind, "quality": quality}
    writer = CocoWriter(out, key, scenes=scenes, restart=restart, overwrite=overwrite)
    maker = _Maker(composer, writer.images, kind, quality)
    if writer.done and progress:
        _tell(f"going on from {writer.partial}: {len(writer.done)} scenes are done")
    try:
        _fill(writer, maker, cores() if workers is None else max(0, workers), progress)
        report = writer.finish(composer.categories, {"description": "fastnuggets compose", **key})
    except BaseException:
        writer.close()
        if not writer.done:
            writer.discard()
        elif progress:
            count = f"{len(writer.done)} finished scene{'s' if len(writer.done) > 1 else ''}"
            kept = f"{count} kept in {writer.partial}"
            _tell(f"{kept}; the same command goes on from there")
        raise
    several = len(composer.recipe.blend) if composer.recipe.same_scene else 1
    return Composed(writer.out, scenes, scenes * several, writer.annotations, writer.left_out, writer.skipped, report)


def describe(composer: SceneComposer) -> Record:
    """What the scenes follow from: version, recipe, seed, and a digest of the names and sizes of the files."""
    found: Record = {"version": fastnuggets.__version__, "seed": composer.seed}
    found["recipe"] = dataclasses.asdict(composer.recipe)
    for name in ("cutouts", "backgrounds", "distractors"):
        found[name] = _digest(getattr(composer, name))
    rows = {name: [list(map(float, row)) for row in points] for name, points in composer.support.items()}
    found["support"] = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
    return found


def _digest(items: Any) -> str:
    digest = hashlib.sha256()
    for entry in getattr(items, "entries", items):
        digest.update(f"{_named(entry)}\n".encode())
    options = [getattr(items, name, None) for name in ("inverted", "min_side")]
    digest.update(repr(options).encode())
    return f"{len(items)}:{digest.hexdigest()[:16]}"


def _named(entry: Any) -> str:
    """A file by its size and its name below its folder, so that the folder may move; arrays by their bytes."""
    if isinstance(entry, tuple):
        return repr(tuple(_size(part) if isinstance(part, Path) else part for part in entry))
    arrays = [entry] if isinstance(entry, np.ndarray) else [entry.image, getattr(entry, "mask", entry.image)]
    return repr([getattr(entry, "name", ""), *(hashlib.sha256(array.tobytes()).hexdigest() for array in arrays)])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _tell(message: str) -> None:
    print(f"fastnuggets: {message}", file=sys.stderr)


@dataclass
class _Maker:
    """Makes and writes one scene, in whatever process."""

    composer: SceneComposer
    folder: Path
    kind: str
    quality: int

    def __post_init__(self) -> None:
        self.told: set[str] = set()  # broken files that an earlier record names

    def __call__(self, number: int) -> Record:
        scene, recipe = self.composer.scene(number), self.composer.recipe
        record = write_scene(
            scene, self.folder, self.kind, quality=self.quality, boxes=recipe.boxes, keep_hidden=recipe.keep_hidden
        )
        record["skipped"] = {name: why for name, why in self.composer.skipped.items() if name not in self.told}
        self.told.update(record["skipped"])
        return record


def _fill(writer: CocoWriter, maker: _Maker, workers: int, progress: bool) -> None:
    tqdm = need("tqdm", "scenes").tqdm
    todo = [number for number in range(writer.scenes) if number not in writer.done]
    bar = tqdm(total=writer.scenes, initial=len(writer.done), unit="scene", disable=None if progress else True)
    records = _one_by_one(maker, todo) if workers == 0 else _in_parallel(maker, todo, workers)
    with contextlib.closing(records) as stream, bar:
        for record in stream:
            writer.append(record)
            bar.update()


def _one_by_one(maker: _Maker, todo: list[int]) -> Generator[Record, None, None]:
    yield from map(maker, todo)


def _in_parallel(maker: _Maker, todo: list[int], workers: int) -> Generator[Record, None, None]:
    """The records as they come, in no order."""
    workers = min(workers, max(1, len(todo)))
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])  # torch is then imported once
    numbers, running = iter(todo), set[Future[Record]]()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(maker,))
    try:
        while True:
            for number in numbers:
                running.add(pool.submit(_make, number))
                if len(running) >= _AHEAD * workers:
                    break
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_maker: _Maker | None = None


def _start(maker: _Maker) -> None:
    """Make this process a worker."""
    global _maker
    _maker = maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    torch.set_num_threads(1)
    opencv().setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _make(number: int) -> Record:
    assert _maker is not None
    return _maker(number)
