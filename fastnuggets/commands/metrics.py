"""``fastnuggets metrics``: how good generated molecules are, as MOSES measures it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastnuggets.commands import arguments
from fastnuggets.commands.arguments import OK, UsageError, say

_TEXT = """\
The metrics of MOSES for a file of generated molecules against a reference: MOSES' test set, or any other.

GEN is a file with a SMILES for each molecule that was generated, the broken ones too: they count as invalid. The order
matters for unique@k alone. A reference that is large and used again can be worked out once: --save-reference writes its
statistics, and --reference, --train and --scaffold-reference take such a file wherever they take molecules.

examples:
  fastnuggets metrics generated.smi --reference test.csv
  fastnuggets metrics generated.smi --reference test.csv --train train.csv --fcd --out report
  fastnuggets metrics generated.smi --reference test.csv --save-reference test.npz
  fastnuggets metrics others.smi --reference test.npz
"""


def add(command: Callable[..., Any]) -> None:
    """Add ``metrics`` to the parser behind ``command(name, run, summary, text)``."""
    parser = command("metrics", _metrics, "generated molecules -> the metrics of MOSES", _TEXT)
    files = "statistics (.npz), or "
    parser.add_argument("input", type=Path, metavar="GEN", help=".smi .csv (also .gz) .parquet .sdf")
    parser.add_argument(
        "--reference", required=True, type=Path, metavar="REF", help=files + "molecules, to compare with"
    )
    parser.add_argument("--train", type=Path, metavar="TRAIN", help=files + "the training set, for novelty")
    parser.add_argument(
        "--scaffold-reference", type=Path, metavar="REF", help=files + "molecules of scaffolds kept from training"
    )
    parser.add_argument(
        "--mcf", type=Path, metavar="CSV", help="table of SMARTS, column smarts (default: of an installed molsets)"
    )
    parser.add_argument("--fcd", action="store_true", help="the Frechet ChemNet distance too; needs fcd_torch")
    parser.add_argument("--column", help="column of the SMILES in all tables (default: the one called smiles)")
    parser.add_argument(
        "--similar-at-most",
        type=arguments.whole,
        default=50_000,
        metavar="N",
        help="SNN and IntDiv of at most so many molecules (default %(default)s)",
    )
    parser.add_argument("--save-reference", type=Path, metavar="FILE.npz", help="write the reference's statistics")
    parser.add_argument("--processes", type=int, metavar="N", help="default: all cores")
    parser.add_argument(
        "--device", type=arguments.device, default="cpu", help="of SNN, IntDiv and ChemNet (default cpu)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write metrics.html and metrics.json")


def _metrics(args: argparse.Namespace) -> int:
    from fastnuggets.figures import pyplot
    from fastnuggets.molecules import metrics, read_smiles

    if args.save_reference and args.save_reference.suffix != ".npz":
        raise UsageError(f"--save-reference must end in .npz, got {args.save_reference}")
    if args.processes is not None and args.processes < 0:
        raise UsageError(f"--processes must be 0 or more, got {args.processes}")
    filters = metrics.read_filters(args.mcf) if args.mcf else metrics.installed_filters()
    embed = metrics.chemnet(args.device) if args.fcd else None
    for path in filter(None, (args.input, args.reference, args.train, args.scaffold_reference)):
        if path == args.input or path.suffix != ".npz":
            read_smiles(path, column=args.column)  # a file that is not there is told at once
    if args.out:
        pyplot()
        args.out.mkdir(parents=True, exist_ok=True)
    sets = {
        "reference": _described(args, args.reference, "reference", embed=embed),
        "train": args.train and _described(args, args.train, "train", names_only=True),
        "scaffold_reference": args.scaffold_reference
        and _described(args, args.scaffold_reference, "scaffold reference", embed=embed),
    }
    if args.save_reference:
        sets["reference"].save(args.save_reference)
    generated = _described(args, args.input, "generated", filters=filters, embed=embed)
    found = metrics.compare(generated, **sets, similar_at_most=args.similar_at_most, device=args.device)
    if not filters:
        found = found._replace(notes=(*found.notes, metrics.NO_FILTERS))
    for note in found.notes:
        say(note)
    print(f"{'molecules':12}  {found.molecules}")
    for name, value in found.named().items():
        print(f"{name:12}  {value:.5g}")
    if args.out:
        from fastnuggets import report_metrics

        print(report_metrics.write(found, generated, sets["reference"], args))
    return OK


def _described(args: argparse.Namespace, path: Path, label: str, **options: Any) -> Any:
    """The statistics in a file, or those of the molecules in it."""
    from fastnuggets.molecules import count_records, metrics, read_smiles

    if path.suffix == ".npz" and label != "generated":
        return metrics.Statistics.load(path)
    smiles = read_smiles(path, column=args.column)
    total = count_records(path)
    return metrics.describe(smiles, processes=args.processes, progress=label, total=total, **options)
