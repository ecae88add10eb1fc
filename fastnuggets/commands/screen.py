"""``fastnuggets fingerprints`` and ``fastnuggets screen``: molecules as bits, and the nearest ones of a database."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnuggets.commands import arguments
from fastnuggets.commands.arguments import FAILED, OK, SKIPPED, UsageError, say

if TYPE_CHECKING:
    from fastnuggets.molecules import Fingerprints

_FINGERPRINTS = """\
Write the fingerprints of molecules to a file that is mapped, not loaded: a database for `fastnuggets screen`.

morgan is radius 2 with 1024 bits, 128 bytes a molecule; maccs is RDKit's 166 keys, 24 bytes; names and SMILES are kept
beside them. What is finished stays in OUT.partial until all is done: after an interruption the same command goes on.

example:
  fastnuggets fingerprints library.smi.gz --out library.npz
"""
_SCREEN = """\
For each query, the K molecules of a database that are most similar to it by Tanimoto's similarity of fingerprints.

QUERIES and DB are files of molecules, or of fingerprints as `fastnuggets fingerprints` writes them; the latter may be
larger than memory, and are the way to go for a database that is searched again. HITS.csv has the columns query, rank
(from 1), index (of the molecule among those of DB that could be read, from 0), name, smiles and similarity. Of equally
similar molecules the first in DB is the better.

examples:
  fastnuggets screen actives.smi --database library.npz -k 100 -o hits.csv
  fastnuggets screen actives.sdf --database library.smi.gz --kind maccs --threshold 0.8 -o hits.csv
"""
_KINDS = ("maccs", "morgan")
_TOLD = 5  # skipped records named on the terminal


def add(command: Callable[..., Any]) -> None:
    """Add both to the parser behind ``command(name, run, summary, text)``."""
    parser = command("fingerprints", _fingerprints, "molecules -> packed fingerprints (npz)", _FINGERPRINTS)
    parser.add_argument("input", type=Path, metavar="IN", help=".sdf .smi .csv (also .gz) .pdb .parquet")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npz")
    parser.add_argument("--kind", choices=_KINDS, default="morgan", help="default: %(default)s")
    _add_reading(parser)

    parser = command("screen", _screen, "queries and a database -> the most similar molecules (CSV)", _SCREEN)
    parser.add_argument("queries", type=Path, metavar="QUERIES", help="molecules or fingerprints")
    parser.add_argument("--database", required=True, type=Path, metavar="DB", help="molecules or fingerprints")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="HITS.csv")
    parser.add_argument("-k", type=arguments.whole, default=10, help="hits of each query (default %(default)s)")
    parser.add_argument("--threshold", type=_similarity, default=0.0, metavar="T", help="least similarity, 0 to 1")
    parser.add_argument("--kind", choices=_KINDS, help="default: that of the files of fingerprints, or morgan")
    parser.add_argument(
        "--device", type=arguments.device, default="cpu", help="where to search (default cpu); k at most 1024 on a GPU"
    )
    _add_reading(parser)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--column", help="column of the SMILES in a table (default: the one called smiles)")
    parser.add_argument("--processes", type=int, metavar="N", help="that make fingerprints (default: all cores)")
    parser.add_argument("--strict", action="store_true", help="exit with 3 if a record was skipped")


def _similarity(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def _fingerprints(args: argparse.Namespace) -> int:
    from fastnuggets.molecules import fingerprints_of_file

    if args.out.suffix != ".npz":
        raise UsageError(f"--out must end in .npz, got {args.out}")
    partial = args.out.with_name(f"{args.out.name}.partial")
    try:
        made = fingerprints_of_file(
            args.input, args.kind, out=args.out, column=args.column, processes=args.processes, progress=True
        )
    except BaseException:
        if partial.exists():
            say(f"what is finished is kept in {partial}; the same command goes on from there")
        raise
    skipped = _tell(made, args.input)
    print(f"{args.out}: {len(made)} {made.kind} fingerprints{_count(skipped)}")
    return SKIPPED if skipped and args.strict else OK


def _screen(args: argparse.Namespace) -> int:
    from fastnuggets.molecules.files import atomic_write
    from fastnuggets.molecules.screening import tanimoto_topk

    saved = {path: _saved(path) for path in (args.queries, args.database)}
    kinds = {found.kind for found in saved.values() if found}
    if len(kinds | {args.kind} - {None}) > 1:
        named = ", ".join(f"{path}: {found.kind}" for path, found in saved.items() if found)
        raise ValueError(
            "the fingerprints are of different kinds: " + named + (f", --kind {args.kind}" * bool(args.kind))
        )
    kind = args.kind or next(iter(kinds), "morgan")
    queries, database = (saved[path] or _made(args, path, kind) for path in (args.queries, args.database))
    skipped = 0
    for path, found in ((args.queries, queries), (args.database, database)):
        if not len(found):
            return say(f"error: no molecule in {path}", FAILED)
        if saved[path] is None:  # the others' were told when they were made
            skipped += _tell(found, path)
    nearest = tanimoto_topk(queries, database, args.k, threshold=args.threshold, device=args.device, progress=True)
    hits = 0
    with atomic_write(args.out) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        table = csv.writer(text)
        table.writerow(("query", "rank", "index", "name", "smiles", "similarity"))
        for row in _hits(queries, database, *(t.tolist() for t in nearest)):
            table.writerow(row)
            hits += 1
        text.detach()  # or it would close the file
    print(f"{args.out}: {hits} hits of {len(queries)} queries in {len(database)} molecules{_count(skipped)}")
    return SKIPPED if skipped and args.strict else OK


def _saved(path: Path) -> Fingerprints | None:
    from fastnuggets.molecules import Fingerprints

    return Fingerprints.load(path) if path.suffix == ".npz" else None


def _made(args: argparse.Namespace, path: Path, kind: str) -> Fingerprints:
    from fastnuggets.molecules import fingerprints_of_file

    return fingerprints_of_file(path, kind, column=args.column, processes=args.processes, progress=True)


def _hits(
    queries: Fingerprints, database: Fingerprints, similarity: list[list[float]], index: list[list[int]]
) -> Iterator[tuple[Any, ...]]:
    for number, (values, rows) in enumerate(zip(similarity, index, strict=True)):
        query = _text(queries.names, number) or f"row {number}"
        for rank, (value, row) in enumerate(zip(values, rows, strict=True), 1):
            if row >= 0:
                yield query, rank, row, _text(database.names, row), _text(database.smiles, row), value


def _text(texts: Sequence[str], row: int) -> str:
    return texts[row] if len(texts) else ""


def _tell(found: Fingerprints, path: Path) -> int:
    """Name the first records that were skipped; returns how many there are."""
    for skipped in found.skipped[:_TOLD]:
        say(f"skipped record {skipped.index + 1} of {path} ({skipped.name}): {skipped.error}")
    return len(found.skipped)


def _count(skipped: int) -> str:
    return f", {skipped} record{'s' if skipped > 1 else ''} skipped" if skipped else ""
