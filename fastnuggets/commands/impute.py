"""``fastnuggets impute``: a table with gaps becomes complete ones, in the file's own form."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastnuggets.commands.arguments import OK, UsageError, device, say, whole
from fastnuggets.commands.train import add_setting
from fastnuggets.systems.run import How, load, read_config, train
from fastnuggets.systems.tables import Table, infer
from fastnuggets.systems.vaeac import Filled, VaeacSettings, VaeacSystem, names, read
from fastnuggets.training.fit import Interrupted
from fastnuggets.training.log import read_log

_TEXT = """\
Fill the gaps of a table. A network (VAEAC) learns from the rows as they are what belongs in any gap given the rest of
the row, and the gaps are drawn from it.

OUT is the table with a best guess in each gap, a mean or the most frequent category. OUT.1, OUT.2, ... (name.1.csv and
so on) are samples, for whoever wants to carry the uncertainty on: repeat the analysis on each. What was in the table
stays as it was, byte for byte in a CSV file. Columns of identifiers or free text, of dates, empty ones and those that
never vary are neither filled nor learned from; they are named at the end.

The training is a run in a folder, by default OUT.run: after an interruption the same command goes on from there, and
once it is done only the sampling is repeated.

examples:
  fastnuggets impute data.csv -o imputed.csv --samples 10
  fastnuggets impute survey.parquet -o complete.parquet --mean --categorical region,grade
  fastnuggets impute new.csv -o imputed.csv --model imputed.run
"""
_PATIENCE = 5  # of 20 validations: small tables are soon learned by heart


def add(command: Any) -> None:
    parser = command("impute", _impute, "a table with gaps -> complete tables (CSV, Parquet)", _TEXT)
    parser.add_argument("input", type=Path, metavar="TABLE", help="CSV (UTF-8, names first) or Parquet")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="OUT", help="of the input's kind")
    parser.add_argument("--samples", type=whole, default=10, help="drawn for each gap (default %(default)s)")
    parser.add_argument("--mean", action="store_true", help="write OUT alone, and not each sample")
    parser.add_argument("--within", action="store_true", help="numbers stay within the range of those that are there")
    parser.add_argument("--run", type=Path, dest="folder", metavar="DIR", help="of the training (default OUT.run)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a finished run: nothing is trained")
    parser.add_argument("--fresh", action="store_true", help="throw away the run in DIR and begin anew")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    parser.add_argument("--device", type=device, default="cpu", help="default cpu")
    own = parser.add_argument_group("settings of the network and its training")
    for field in dataclasses.fields(VaeacSettings):
        add_setting(own, field)


def _impute(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    if args.out.suffix.lower() != args.input.suffix.lower():
        raise UsageError(f"--out must end in {args.input.suffix}, as the input does, got {args.out}")
    if args.out.resolve() == args.input.resolve():
        raise UsageError("--out: the table itself would be overwritten")
    args.out.parent.mkdir(parents=True, exist_ok=True)  # not when hours of training are done
    system, table = _system(args)
    with tqdm(total=2 * args.samples, unit="pass", desc="imputing", disable=None) as bar:
        *samples, means = system.fill(table, args.samples, seed=args.seed, within=args.within, tick=bar.update)
    written = [args.out]
    if not args.mean:
        for number, sample in enumerate(samples, 1):
            written.append(args.out.with_name(f"{args.out.stem}.{number}{args.out.suffix}"))
            table.write(written[-1], sample)
    table.write(args.out, means)  # last: where it is, so are the others
    _report(system, table, means)
    more = f", and {len(samples)} samples, {written[1].name} to {written[-1].name}" if len(written) > 1 else ""
    print(f"{args.out}: {sum(map(len, means.values()))} gaps filled{more}")
    return OK


def _system(args: argparse.Namespace) -> tuple[VaeacSystem, Table]:
    """Trained, if it must be; and the table to be filled."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(VaeacSettings)}
    settings = VaeacSettings(**given)
    if args.model is not None:
        if settings != VaeacSettings():
            raise UsageError("--model: a finished run has its settings, and takes no others")
        kind = read_config(args.model)["system"]
        if kind != "vaeac":
            raise ValueError(f"{args.model}: a run of {kind}, not of vaeac")
        system = load(args.model, args.device)
        assert isinstance(system, VaeacSystem)
        table = read(args.input, system.settings)
        _look(table, args.input, {column.name for column in system.columns}, system.facts["left_out"])
        return system, table
    table = read(args.input, settings)
    columns, left_out = infer(table, names(settings.categorical), names(settings.numbers))
    _look(table, args.input, {column.name for column in columns}, left_out)
    folder = args.folder or args.out.with_suffix(".run")
    try:
        train("vaeac", args.input, folder, given, How(args.seed, args.device, patience=_PATIENCE), fresh=args.fresh)
    except Interrupted:
        print(f"\nfastnuggets: the same command goes on from {folder / 'checkpoint.pt'}", file=sys.stderr)
        raise
    system = load(folder, args.device)
    assert isinstance(system, VaeacSystem)
    say(f"{folder}: on cells that were hidden from it: {_measured(folder)}")
    return system, table


def _measured(folder: Path) -> str:
    """The validation of the weights that were kept: those of the least first figure."""
    found = read_log(folder / "log_validation.csv")
    found.pop("step")
    best = int(np.nanargmin(next(iter(found.values()))))
    return ", ".join(f"{name} {values[best]:.3g}" for name, values in found.items())


def _look(table: Table, path: Path, learned: set[str], left_out: dict[str, str]) -> None:
    """ValueError if there is nothing to fill, before minutes are spent."""
    gaps = {name: table.gaps(name) for name in table.names}
    if not any(gaps.values()):
        raise ValueError(f"{path}: there is nothing to impute: no cell is empty or stands for a gap (see --missing)")
    if not any(gaps[name] for name in table.names if name in learned):
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items() if gaps.get(name))
        raise ValueError(f"{path}: none of the columns with gaps can be imputed: {reasons}")


def _report(system: VaeacSystem, table: Table, filled: Filled) -> None:
    """What was done to each column that has gaps, or why nothing was."""
    kinds = {c.name: f"{len(c.categories)} categories" if c.categories else "numbers" for c in system.columns}
    width = max(map(len, table.names))
    for name in table.names:
        if name in filled:
            print(f"{name:<{width}}  {len(filled[name])} gaps filled, {kinds[name]}")
        elif gaps := table.gaps(name):
            print(f"{name:<{width}}  {gaps} gaps left: {system.facts['left_out'].get(name, 'not learned')}")
    apart = [
        f"{name} ({why})"
        for name, why in system.facts["left_out"].items()
        if name in table.names and not table.gaps(name)
    ]
    if apart:
        print(f"not learned from: {', '.join(apart)}")
