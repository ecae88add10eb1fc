"""The command of a demo that is made of parts, each kept when it is done: after Ctrl-C the same command goes on."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastnuggets import __version__
from fastnuggets.molecules.files import atomic_write


def command(
    name: str,
    argv: Sequence[str] | None,
    run: Callable[..., Any],
    plans: tuple[Any, Any],
    *,
    description: str,
    repeated: str,
) -> int:
    """``fastnuggets demo NAME``: runs it and has ``report_NAME`` write the page; returns the exit code.

    Args:
        run: (plan, folder of the parts, fresh=) -> a result with `seconds`, `reused` and `parts`.
        plans: the standard and the quick one; each has a field `seeds`.
        repeated: what a seed changes.
    """
    standard, quick = plans
    args = _parser(name, standard, quick, description, repeated).parse_args(argv)
    missing = [package for package in ("sklearn", "tqdm", "matplotlib") if find_spec(package) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)}: not installed; pip install 'fastnuggets[demo]'")
    plan = quick if args.quick else standard
    plan = plan._replace(seeds=args.seeds or plan.seeds)
    cache = args.out / name
    try:
        result = run(plan, cache, fresh=args.fresh)
    except KeyboardInterrupt:
        print(f"\nfastnuggets: interrupted; what is done is kept in {cache}. The same command goes on", file=sys.stderr)
        return 130
    page = import_module(f"fastnuggets.report_{name}").write(result, args.out)
    print(f"{page}: open it in a browser ({result.seconds:.0f} s, {result.reused} of {result.parts} parts reused)")
    return 0


def _parser(name: str, standard: Any, quick: Any, description: str, repeated: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"fastnuggets demo {name}",
        description=description,
        epilog=f"Ctrl-C keeps every seed that is done in OUT/{name}; the same command goes on from there.",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder to write (default out)")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps: under a minute")
    parser.add_argument(
        "--seeds",
        type=_seeds,
        metavar="N",
        help=f"{repeated}, at least 2 (default {standard.seeds}, with --quick {quick.seeds})",
    )
    parser.add_argument("--fresh", action="store_true", help="compute everything again")
    return parser


def _seeds(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 2 to show a spread, got {text!r}")
    return number


class Parts:
    """Computes parts, or finds them in `folder`; `fresh` looks for none.

    Attributes:
        seconds, reused: of each part so far, what it took to compute and whether it was found.
    """

    def __init__(self, folder: Path, bar: Any, *, fresh: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.bar, self.fresh = folder, bar, fresh
        self.seconds: list[float] = []
        self.reused: list[bool] = []

    def __call__(
        self, name: str, ticks: int, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `compute` gives: tensors and plain numbers, lists and dicts. It moves the bar by `ticks`."""
        path = self.folder / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.pt"
        found = None if self.fresh else _load(path, settings)
        self.reused.append(found is not None)
        self.bar.set_description(name)
        if found is None:
            if self.bar.disable:
                print(f"{name} ...", file=sys.stderr)
            began = time.perf_counter()
            found = compute() | {"settings": settings, "seconds": time.perf_counter() - began}
            with atomic_write(path) as file:
                torch.save(found, file)
        else:
            self.bar.update(ticks)
        self.seconds.append(found["seconds"])
        return found


def settings(plan: Any, what: dict[str, Any]) -> dict[str, Any]:
    """What a part depends on; the number of seeds is not in it, so that more seeds are an addition."""
    versions = {"torch": str(torch.__version__), "fastnuggets": __version__}
    return {**plan._replace(seeds=0)._asdict(), **what, **versions}


def _load(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = torch.load(path, weights_only=True)
        if found["settings"] == settings:
            return found
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        print(f"{path} is damaged ({type(error).__name__}): computing it again", file=sys.stderr)
    return None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A network this small is not quicker with more, and its bits then do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
