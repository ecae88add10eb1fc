"""Worker processes for what RDKit does: they load nothing else, may die, and end with whoever started them."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import IO, Any, TypeVar

from fastnuggets.molecules import _serve
from fastnuggets.molecules.files import cores

T = TypeVar("T")
W = TypeVar("W", bound="Workers")

_DEAD = (EOFError, OSError, ValueError, pickle.UnpicklingError)  # what a pipe to a dead process raises


class DiedError(Exception):
    """A worker process ended over a task; says how."""


class Workers:
    """Processes that take one task at a time, each fed by a thread of its own. A dead one costs one task.

    They need no ``__main__`` guard, and end with the ``with`` block, by KeyboardInterrupt too.

    Args:
        function: of a module that can be loaded by its path alone; arguments and results are pickled.
        count: of processes; 0: tasks are done in this one, at once.
        what: they are called in errors.
        timeout: seconds after which a process is killed over its task.
    """

    def __init__(self, function: Callable[..., Any], count: int, what: str, timeout: float | None = None) -> None:
        self.function, self.count, self.what, self.timeout = function, count, what, timeout
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._live: set[_Process] = set()
        self._closed = False

    def __enter__(self: W) -> W:
        self._threads = ThreadPoolExecutor(self.count) if self.count else None
        self._messages = tempfile.TemporaryFile()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._live:
                process.kill()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for process in self._live:
            process.end()
        self._messages.close()

    def submit(self, *task: Any) -> Future[Any]:
        """The result to come of a task; RuntimeError if its process dies."""
        if self._threads:
            return self._threads.submit(self.run, *task)
        done: Future[Any] = Future()
        done.set_result(self.function(*task))
        return done

    def run(self, *task: Any) -> Any:
        """A task's result, in a thread of the pool. Whoever has an answer to a death replaces this."""
        try:
            return self.ask(*task)
        except DiedError as error:
            raise RuntimeError(f"a {self.what} process died: {self._said() or error}") from error

    def ask(self, *task: Any) -> Any:
        """What the process of this thread answers. DiedError if it dies on the task, or is too long about it."""
        process = getattr(self._mine, "process", None) or self._start()
        limit = threading.Timer(self.timeout, process.kill) if self.timeout else None
        if limit:
            limit.start()
        try:
            return process.ask(task)
        except _DEAD as error:
            self._mine.process = None
            with self._lock:
                self._live.discard(process)
            raise DiedError(f"its worker process died ({process.end()})") from error
        finally:
            if limit:
                limit.cancel()

    def _start(self) -> _Process:
        with self._lock:
            if self._closed:
                raise RuntimeError("the workers are closed")
            process = _Process(self.function, self._messages)
            self._live.add(process)
        try:
            process.answer()
        except _DEAD as error:
            raise RuntimeError(f"a {self.what} process did not start: {self._said() or process.end()}") from error
        self._mine.process = process
        return process

    def _said(self) -> str:
        """The last line that any of them wrote."""
        self._messages.seek(0)
        return (self._messages.read().decode(errors="replace").strip().splitlines() or [""])[-1]


def in_order(
    make: Callable[[int], Workers], items: Iterator[T], task: Callable[[T], tuple[Any, ...]], processes: int | None
) -> Generator[tuple[T, Any], None, None]:
    """Each item and the result of its task, in order, a few ahead of the caller.

    ``make``: workers of a number; ``processes``: that number; None: one for each core, but none for a single item,
    which is done sooner than a process has started. ValueError if it is below 0.
    """
    if processes is not None and processes < 0:
        raise ValueError(f"processes: expected 0 or more, got {processes}")
    head = list(islice(items, 2))
    if processes is None:
        processes = cores() if len(head) > 1 else 0
    with make(processes) as workers:
        waiting: deque[tuple[T, Future[Any]]] = deque()
        for item in chain(head, items):
            waiting.append((item, workers.submit(*task(item))))
            if len(waiting) > 2 * processes:
                first, result = waiting.popleft()
                yield first, result.result()
        for item, result in waiting:
            yield item, result.result()


class _Process:
    """A worker process and its two pipes."""

    def __init__(self, function: Callable[..., Any], messages: IO[bytes]) -> None:
        script = sys.modules[function.__module__].__file__
        self.popen = subprocess.Popen(
            [sys.executable, _serve.__file__, str(script), function.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # a Ctrl-C at the terminal is for the parent, which then ends the workers
        )
        self.tasks: Any = self.popen.stdin
        self.answers: Any = self.popen.stdout

    def answer(self) -> Any:
        return pickle.load(self.answers)

    def ask(self, task: tuple[Any, ...]) -> Any:
        pickle.dump(task, self.tasks)
        self.tasks.flush()
        return self.answer()

    def kill(self) -> None:
        self.popen.kill()

    def end(self) -> str:
        """Kill it if it lives, free what it holds, and say how it ended."""
        self.kill()
        code = self.popen.wait()
        for pipe in (self.tasks, self.answers):
            with contextlib.suppress(OSError):
                pipe.close()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
