"""``fastnuggets train``, ``generate`` and ``evaluate``: published systems, one folder a run."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastnuggets.commands.arguments import OK, UsageError, device, whole
from fastnuggets.systems import SYSTEMS, find
from fastnuggets.systems.run import AVERAGES, How, load, read_config, train
from fastnuggets.training.fit import PRECISIONS, Interrupted

_TRAIN = """\
Train a published system on the data of a file. DIR gets its configuration, a log, a checkpoint, the weights and a page
with pictures. After an interruption of any kind the same command goes on from the checkpoint, to the same result.
Several processes: torchrun --nproc-per-node=N -m fastnuggets.cli train SYSTEM ...

systems:
"""
_EXAMPLES = """
examples:
  fastnuggets train char-rnn --data molecules.smi --out runs/rnn
  fastnuggets train fingerprint-aae --data molecules.csv --out runs/aae --epochs 50 --average ema
  fastnuggets generate runs/rnn -n 1000 -o new.smi
  fastnuggets evaluate runs/rnn --data others.smi

options of a system:
  fastnuggets train SYSTEM --help"""


def main(arguments: Sequence[str]) -> int:
    """`arguments`: what follows the name of the command ``train``."""
    style = argparse.RawDescriptionHelpFormatter
    if not arguments or arguments[0].startswith("-"):
        width = max(map(len, SYSTEMS))
        systems = "\n".join(f"  {name:<{width}}  {find(name).summary}" for name in SYSTEMS)
        parser = argparse.ArgumentParser(
            prog="fastnuggets train",
            usage="%(prog)s SYSTEM --data FILE --out DIR [options]",
            description=_TRAIN + systems,
            epilog=_EXAMPLES,
            formatter_class=style,
        )
        parser.add_argument("system", choices=SYSTEMS, metavar="SYSTEM")
        parser.parse_args(arguments)
    args = _parser(arguments[0]).parse_args(arguments[1:])
    how = How(**{field.name: getattr(args, field.name) for field in dataclasses.fields(How)})
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(find(arguments[0]).Settings)}
    try:
        measured = train(arguments[0], args.data, args.out, settings, how, fresh=args.fresh)
    except Interrupted:
        print(f"\nfastnuggets: the same command goes on from {args.out / 'checkpoint.pt'}", file=sys.stderr)
        raise
    _table(measured)
    print(f"{args.out}")
    return OK


def _parser(name: str) -> argparse.ArgumentParser:
    try:
        kind = find(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    text = f"{kind.summary}. {kind.paper}" if kind.paper else kind.summary
    parser = argparse.ArgumentParser(prog=f"fastnuggets train {name}", description=text)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help=kind.takes)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--fresh", action="store_true", help="throw away the run in DIR and begin anew")
    own = parser.add_argument_group("settings of the system")
    for field in dataclasses.fields(kind.Settings):
        add_setting(own, field)
    how = parser.add_argument_group("how to train")
    how.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    how.add_argument("--device", type=device, default="cpu", help="default cpu")
    how.add_argument("--precision", choices=PRECISIONS, default="float32", help="of autocast (default float32)")
    how.add_argument("--average", choices=AVERAGES, default="none", help="weights that are kept (default none)")
    how.add_argument("--decay", type=float, default=0.999, help="of --average ema (default %(default)s)")
    how.add_argument("--validations", type=whole, default=20, help="in all (default %(default)s)")
    how.add_argument("--patience", type=whole, help="stop after so many validations without a better one")
    return parser


def add_setting(group: Any, field: dataclasses.Field[Any]) -> None:
    """--name of a field of Settings; its type is that of the default."""
    flag, help_text, choices = "--" + field.name.replace("_", "-"), field.metadata["help"], field.metadata["choices"]
    if isinstance(field.default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=help_text)
        return
    shown = f"{help_text} (default {field.default})" if field.default not in (None, "") else help_text
    kind = str if field.default is None else type(field.default)
    group.add_argument(flag, type=kind, choices=choices, default=field.default, help=shown)


def add(command: Any) -> None:
    made = command("generate", _generate, "new examples from a trained system", "Write new examples of a run.")
    made.add_argument("run_folder", type=Path, metavar="DIR", help="what train wrote")
    made.add_argument("-n", "--count", type=whole, default=1000, help="how many (default %(default)s)")
    made.add_argument("-o", "--out", type=Path, metavar="FILE", help="default: standard output")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", type=device, default="cpu", help="default cpu")
    made.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of the system, such as temperature=0.8"
    )
    asked = command("evaluate", _evaluate, "figures of a trained system on other data", "Measure a run on a file.")
    asked.add_argument("run_folder", type=Path, metavar="DIR", help="what train wrote")
    asked.add_argument("--data", type=Path, required=True, metavar="FILE")
    asked.add_argument("--out", type=Path, metavar="FILE.json", help="the figures as JSON")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--device", type=device, default="cpu", help="default cpu")


def _generate(args: argparse.Namespace) -> int:
    from fastnuggets.molecules.files import atomic_write

    options = dict(_option(text) for text in args.set)
    system = load(args.run_folder, args.device)
    try:
        records = system.generate(args.count, seed=args.seed, **options)
        first = list(itertools.islice(records, 1))  # a generator looks at its arguments when it is first asked
    except TypeError as error:
        raise UsageError(f"--set: {read_config(args.run_folder)['system']}: {error}") from None
    lines = _counted(itertools.chain(first, records), args.count)
    if args.out is None:
        for line in lines:
            print(line)
        return OK
    written = 0
    with atomic_write(args.out) as file:
        for line in lines:
            file.write(f"{line}\n".encode())
            written += 1
    print(f"{args.out}: {written} records")
    return OK


def _option(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise UsageError(f"--set: expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _counted(lines: Iterator[str], count: int) -> Iterator[str]:
    from tqdm import tqdm

    return iter(tqdm(lines, total=count, desc="generating", disable=None))


def _evaluate(args: argparse.Namespace) -> int:
    from fastnuggets.molecules.files import atomic_write

    figures = load(args.run_folder, args.device).evaluate(args.data, seed=args.seed)
    _table(figures)
    if args.out is not None:
        with atomic_write(args.out) as file:
            file.write((json.dumps(figures, indent=1) + "\n").encode())
    return OK


def _table(figures: dict[str, float]) -> None:
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.4g}")
