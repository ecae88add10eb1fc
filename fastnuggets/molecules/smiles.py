"""The SMILES of a file, all of them in memory: canonical, each molecule once, read by several processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastnuggets.molecules import _canonical, readers
from fastnuggets.molecules.batch import Molecules
from fastnuggets.molecules.files import batched, cores, need
from fastnuggets.molecules.vocabulary import Strings

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
    if processes is not None and processes < 0:
        raise ValueError(f"processes: expected 0 or more, got {processes}")
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
    head = list(itertools.islice(blocks, 2))
    if processes is None:
        processes = cores() if len(head) > 1 else 0  # a few molecules are done sooner than a process has started
    with _Workers(processes) as workers:
        waiting: deque[tuple[list[_Text], Any]] = deque()
        for block in itertools.chain(head, blocks, itertools.repeat(None)):
            if block:
                waiting.append((block, workers.submit([item.text for item in block])))
            elif not waiting:
                return
            if not block or len(waiting) > 2 * processes:
                given, found = waiting.popleft()
                yield given, found.result() if isinstance(found, Future) else found


class _Workers:
    """Processes that write canonical SMILES, each fed by a thread of its own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.mine = threading.local()
        self.lock = threading.Lock()
        self.live: list[Any] = []
        self.closed = False

    def __enter__(self) -> _Workers:
        self.threads = ThreadPoolExecutor(self.count) if self.count else None
        self.messages = tempfile.TemporaryFile()
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.closed = True
            for process in self.live:
                process.kill()
        if self.threads:
            self.threads.shutdown(cancel_futures=True)
        for process in self.live:
            process.communicate()
        self.messages.close()

    def submit(self, texts: list[str]) -> Any:
        return self.threads.submit(self._run, texts) if self.threads else _canonical.compute(texts)

    def _run(self, texts: list[str]) -> list[str]:
        process = getattr(self.mine, "process", None) or self._start()
        try:
            pickle.dump(texts, process.stdin)
            process.stdin.flush()
            found: list[str] = pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            self.messages.seek(0)
            said = self.messages.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"a reading process died: {said[-1] if said else process.poll()}") from error
        return found

    def _start(self) -> Any:
        with self.lock:
            if self.closed:
                raise RuntimeError("the workers are closed")
            process = subprocess.Popen(
                [sys.executable, _canonical.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.messages,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # a Ctrl-C at the terminal is for the parent, which then ends the workers
            )
            self.live.append(process)
        self.mine.process = process
        return process
