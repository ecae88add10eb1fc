"""The ``fastnuggets`` command."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import importlib
import json
import logging
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastnuggets
from fastnuggets.commands import arguments, impute, metrics, screen, train
from fastnuggets.commands.arguments import FAILED, INTERRUPTED, OK, SKIPPED, USAGE, UsageError, say
from fastnuggets.molecules.files import cache_folder

if TYPE_CHECKING:
    from fastnuggets.molecules import Conformer, GridInfo, Grids, GridWriter


_DESCRIPTION = """\
Fast kernels for PyTorch, and what stands on them: molecules as grids and back, averages of weights, scenes pasted
together, published systems on your data.

examples:
  fastnuggets info
  fastnuggets demo --out out
  fastnuggets conformers molecules.smi --out molecules.parquet
  fastnuggets voxelize molecules.smi --out grids.zarr
  fastnuggets invert grids.zarr --out atoms.sdf
  fastnuggets average a.safetensors b.safetensors -o soup.safetensors
  fastnuggets compose --objects objects --backgrounds rooms --out scenes --images 10000
  fastnuggets blend cat.jpg mask.png room.jpg -o out.png --mode poisson
  fastnuggets train char-rnn --data molecules.smi --out runs/rnn
  fastnuggets metrics new.smi --reference test.smi --train molecules.smi
  fastnuggets screen actives.smi --database library.npz -o hits.csv
  fastnuggets impute data.csv -o imputed.csv --samples 10
"""
_EXIT_CODES = """\
exit codes:
  0    done; records that cannot be read are counted and named, and are no failure
  1    failed: the last line on stderr says why
  2    the command line is wrong
  3    done, but records were skipped and --strict was given
  130  interrupted by Ctrl-C; what is finished is kept
"""
_VOXELIZE = """\
Turn molecules into grids [channels, D, H, W], one for each molecule, centred on its heavy atoms.

Molecules without 3-D coordinates get a conformer (ETKDGv3 and MMFF94, kept in the cache). The input is streamed. What
is finished stays in OUT.partial until all is done: after an interruption the same command goes on from there.

examples:
  fastnuggets voxelize molecules.smi --out grids.zarr
  fastnuggets voxelize ligands.sdf.gz --out grids.zarr --elements C,N,O,S,H --shape 64,48,48
  fastnuggets voxelize table.csv --column SMILES --kernel gaussian --sigma 0.5 --out grids.npz
"""
_INVERT = """\
Find the atoms in grids that `fastnuggets voxelize` wrote with --kernel wave or gaussian, in the frame of the original
molecules.

Bond orders are determined where the grids have a hydrogen channel; otherwise near atoms are joined by single bonds.

example:
  fastnuggets invert grids.zarr --out atoms.sdf
"""
_CONFORMERS = """\
Write the coordinate table: Parquet with smiles, name, z (atomic numbers) and xyz (angstrom), about 350 bytes a
molecule. After an interruption the same command finds the finished conformers in the cache.

example:
  fastnuggets conformers molecules.smi --out molecules.parquet
"""
_AVERAGE = """\
Average checkpoints of one model into a safetensors file: their mean, a weighted sum, or a moving average.

A checkpoint is a .safetensors file, a .pt, .pth or .bin file of tensors, the .index.json of a sharded model, or the
folder of one of these. Models may be larger than memory. Sums are float32 and rounded once; integer tensors come from
the last checkpoint. OUT appears only when it is complete; the same command gives the same bytes.

examples:
  fastnuggets average run1.safetensors run2.safetensors run3.safetensors -o soup.safetensors
  fastnuggets average base/ tuned/ --weights 0.3 0.7 -o merged/ --max-shard-size 5GB
  fastnuggets average epoch*.pt --ema 0.9 -o ema.safetensors --dtype float32
"""
_COMPOSE = """\
Paste objects onto backgrounds: a COCO data set, OUT/images and OUT/annotations.json, whose labels are of what is
visible.

Objects are images with an alpha channel or with a mask beside them (name.jpg and name.pbm, or name_mask.png); the
folder below DIR that they lie in is their category. Image k follows from the seed and k alone. What is finished stays
in OUT.partial until all is done: after an interruption the same command goes on from there.

examples:
  fastnuggets compose --objects objects --backgrounds rooms --out scenes --images 10000
  fastnuggets compose --objects objects --backgrounds rooms --out scenes --images 2000 --preset dwibedi2017
  fastnuggets compose --objects photos --masks grabcut --backgrounds rooms --out scenes --blend poisson --count 1,4
  fastnuggets compose --objects train2017 --annotations instances.json --backgrounds rooms --out scenes
"""
_BLEND = """\
Paste one image onto another, where its mask is white. By default in the middle.

examples:
  fastnuggets blend cat.jpg mask.png room.jpg -o out.png
  fastnuggets blend cat.jpg mask.png room.jpg -o out.png --mode gaussian --at 120,40
"""
_RADIUS_KERNELS = ("sphere", "molgrid", "molvoxel", "pyuul", "moleculekit", "deepfrag")
_KERNELS = ("wave", "gaussian", "nearest", "trilinear", *_RADIUS_KERNELS)
_BLENDS = ("poisson", "mixed", "average", "rectangle", "none", "gaussian", "box", "difference", "multiband")
_SCENES = ("pillow", "opencv-python-headless", "pycocotools")
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_SIGMA = {"wave": 1.0, "gaussian": 0.5}
_BATCH_BYTES = 1 << 28
_OUTSIDE = "outside"
_TOLD = 5  # skipped records named on the terminal
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # zarr writes chunks side by side: the first that fails is raised, and asyncio would print the others' tracebacks.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        if arguments[:1] == ["demo"]:
            return int(importlib.import_module("fastnuggets.demo").main(arguments[1:]) or OK)
        if arguments[:1] == ["train"]:
            return int(importlib.import_module("fastnuggets.commands.train").main(arguments[1:]))
        args = _parser().parse_args(arguments)
        return int(args.run(args))
    except KeyboardInterrupt:
        return say("interrupted", INTERRUPTED)
    except UsageError as error:
        return say(f"error: {error}", USAGE)
    except OSError as error:
        reason = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
        return say(f"error: {reason}" + (f": {error.filename}" if error.filename else ""), FAILED)
    except (ImportError, MemoryError, RuntimeError, ValueError) as error:
        return say(f"error: {error or type(error).__name__}", FAILED)


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fastnuggets", description=_DESCRIPTION, epilog=_EXIT_CODES, formatter_class=style
    )
    parser.add_argument("--version", action="version", version=f"fastnuggets {fastnuggets.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str, text: str = "") -> Any:
        sub = commands.add_parser(
            name, help=summary, description=text or summary, epilog=_EXIT_CODES, formatter_class=style
        )
        sub.set_defaults(run=run)
        return sub

    command("info", _info, "print versions, how this copy was built, and the devices")
    demos = "molecules, averages of weights, sampling and others, each in a report (demo --help)"
    commands.add_parser("demo", help=demos, add_help=False)
    commands.add_parser("train", help="a published system, on your data (train --help)", add_help=False)
    train.add(command)
    impute.add(command)
    metrics.add(command)
    screen.add(command)

    table = command("conformers", _conformers, "molecules -> coordinate table (Parquet)", _CONFORMERS)
    _add_input(table)
    table.add_argument("--out", required=True, type=Path, metavar="FILE.parquet")

    grids = command("voxelize", _voxelize, "molecules -> grids (zarr or npz)", _VOXELIZE)
    _add_input(grids)
    grids.add_argument("--out", required=True, type=Path, metavar="OUT", help="name.zarr, or name.npz for a few")
    grids.add_argument("--kernel", choices=_KERNELS, default="wave", metavar="KERNEL", help=", ".join(_KERNELS))
    grids.add_argument(
        "--shape", type=arguments.shape, default=(48, 48, 48), metavar="N|D,H,W", help="voxels (default 48)"
    )
    grids.add_argument(
        "--spacing", type=arguments.spacing, default=(0.5,) * 3, metavar="A|X,Y,Z", help="angstrom (default 0.5)"
    )
    grids.add_argument("--sigma", type=arguments.positive, help="angstrom (default: wave 1.0, gaussian 0.5)")
    grids.add_argument("--omega", type=float, help="waves per angstrom (default 0.5; wave only)")
    grids.add_argument(
        "--radius", type=arguments.positive, help="angstrom, for the other kernels (default: Bondi's, by element)"
    )
    grids.add_argument(
        "--elements", type=arguments.elements, metavar="C,N,...", help="channels (default C,N,O,S,F,Cl,Br)"
    )
    grids.add_argument(
        "--others", choices=("drop", "skip"), default="drop", help="atoms of other elements: drop them or the molecule"
    )
    grids.add_argument(
        "--center", choices=("mean", "origin"), default="mean", help="what is mid-box: heavy atoms' mean, or 0,0,0"
    )
    grids.add_argument("--dtype", choices=("float16", "float32", "float64"), default="float16")
    grids.add_argument("--device", type=arguments.device, default="cpu", help="where to compute (default cpu)")
    grids.add_argument("--restart", action="store_true", help="throw away OUT.partial instead of going on from it")
    grids.add_argument("--overwrite", action="store_true", help="replace OUT at the end")

    atoms = command("invert", _invert, "grids -> atoms (SDF)", _INVERT)
    atoms.add_argument("input", type=Path, metavar="GRIDS", help="what voxelize wrote")
    atoms.add_argument("--out", required=True, type=Path, metavar="FILE.sdf")
    atoms.add_argument("--noise", type=float, help="noise of a voxel (default: estimated from the grid)")
    atoms.add_argument("--device", type=arguments.device, default="cpu", help="where to compute (default cpu)")

    soup = command("average", _average, "checkpoints -> their average (safetensors)", _AVERAGE)
    soup.add_argument("inputs", type=Path, nargs="+", metavar="CHECKPOINT", help="what to average, in this order")
    soup.add_argument("-o", "--out", required=True, type=Path, metavar="OUT", help="name.safetensors, or a folder")
    how = soup.add_mutually_exclusive_group()
    how.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each, used as given (default 1/K)")
    how.add_argument("--ema", type=float, metavar="DECAY", help="a = DECAY a + (1 - DECAY) w, from the first one on")
    soup.add_argument("--dtype", choices=_FLOATS, help="of the output (default: as in the checkpoints)")
    soup.add_argument(
        "--max-shard-size", type=arguments.size, metavar="5GB", help="write shards and an index if it is larger"
    )
    soup.add_argument("--allow-nonfinite", action="store_true", help="write NaN and inf instead of refusing them")
    soup.add_argument("--overwrite", action="store_true", help="replace OUT")

    _add_compose(command("compose", _compose, "objects and backgrounds -> scenes with labels (COCO)", _COMPOSE))

    paste = command("blend", _blend, "one image pasted onto another", _BLEND)
    paste.add_argument("foreground", type=Path, metavar="FG", help="what to paste")
    paste.add_argument("mask", type=Path, metavar="MASK", help="of the size of FG: white is pasted")
    paste.add_argument("background", type=Path, metavar="BG", help="what to paste onto")
    paste.add_argument("-o", "--out", required=True, type=Path, metavar="OUT", help="name.png or name.jpg")
    paste.add_argument("--mode", choices=_BLENDS, default="poisson", metavar="MODE", help=", ".join(_BLENDS))
    paste.add_argument(
        "--at", type=arguments.place, metavar="Y,X", help="row and column of BG where FG begins; --at=-8,70"
    )
    return parser


def _add_compose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--objects", required=True, type=Path, metavar="DIR", help="the cut-outs")
    parser.add_argument(
        "--masks", choices=("auto", "alpha", "file", "grabcut"), default="auto", help="default: %(default)s"
    )
    parser.add_argument("--inverted-masks", action="store_true", help="masks are black on the object")
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="COCO instances of --objects, as cut-outs")
    parser.add_argument("--distractors", type=Path, metavar="DIR", help="cut-outs that are pasted and not labelled")
    parser.add_argument("--backgrounds", required=True, type=Path, metavar="DIR", help="photographs")
    parser.add_argument("--background-annotations", type=Path, metavar="JSON", help="COCO instances of --backgrounds")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--images", type=arguments.whole, default=1000, metavar="N", help="scenes (default %(default)s)"
    )
    presets = "default, dwibedi2017, dwibedi2017-compatible, simple_copy_paste, georgakis2017"
    parser.add_argument("--preset", default="default", metavar="NAME", help=f"settings to begin with, of {presets}")
    parser.add_argument(
        "--blend",
        metavar="A,B,...",
        help="one of them for each scene, of gaussian, poisson, none, box, motion, mixed; all: each in the first five",
    )
    parser.add_argument("--same-scene", action="store_true", help="each scene in each blend")
    parser.add_argument("--level", choices=("object", "box"), help="paste the object, or its whole box")
    parser.add_argument("--size", type=arguments.place, metavar="H,W", help="of the images (default 480,640)")
    parser.add_argument("--count", type=arguments.place, metavar="A,B", help="least and most objects in a scene")
    parser.add_argument(
        "--distractor-count", type=arguments.place, metavar="A,B", help="the same for distractors (default 2,4)"
    )
    parser.add_argument("--scale", type=arguments.pair, metavar="A,B", help="least and largest size; see --scale-of")
    parser.add_argument("--scale-of", choices=("cutout", "canvas"), help="of the cut-out's size, or of the image's")
    parser.add_argument("--angle", type=arguments.pair, metavar="A,B", help="degrees; --angle=-30,30")
    parser.add_argument("--max-overlap", type=float, metavar="IOU", help="of the boxes of two objects")
    parser.add_argument("--min-visibility", type=float, metavar="PART", help="of each object, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="default: %(default)s")
    parser.add_argument("--quality", type=arguments.whole, default=95, help="of jpg (default %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores; 0: this one)")
    parser.add_argument("--restart", action="store_true", help="throw away OUT.partial instead of going on from it")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT at the end")
    parser.add_argument("--strict", action="store_true", help="exit with 3 if a file was skipped")


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="IN", help=".sdf .smi .csv (also .gz) .pdb .parquet")
    parser.add_argument("--column", help="column of the SMILES in a table (default: the one called smiles)")
    parser.add_argument("--seed", type=int, default=0, help="of the conformers (default 0)")
    parser.add_argument("--no-mmff", action="store_true", help="conformers without the force field: twice as fast")
    parser.add_argument("--processes", type=int, metavar="N", help="for the conformers (default: all cores)")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder of conformers (default %(default)s)")
    parser.add_argument("--no-cache", action="store_const", const=None, dest="cache", help="keep no conformers")
    parser.add_argument("--strict", action="store_true", help="exit with 3 if a record was skipped")


def _info(args: argparse.Namespace) -> int:
    from importlib import metadata

    lines = {"fastnuggets": fastnuggets.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "rdkit", "pyarrow", "zarr", "safetensors", "tqdm", "matplotlib", *_SCENES):
        try:
            lines[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            lines[package] = "not installed"
    for key, value in fastnuggets.build_info().items():
        lines[f"build {key}"] = str(value)
    lines["cpu"] = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        lines[f"cuda:{index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
    if not torch.cuda.is_available():
        lines["cuda"] = "no device"
    width = max(map(len, lines))
    for key, value in lines.items():
        print(f"{key:<{width}}  {value}")
    return OK


def _stream(args: argparse.Namespace, start: int = 0, **options: Any) -> Generator[Conformer, None, None]:
    from fastnuggets.molecules import conformers, read

    records = read(args.input, column=args.column, start=start)
    return conformers(
        records, optimize=not args.no_mmff, seed=args.seed, processes=args.processes, cache=args.cache, **options
    )


def _conformers(args: argparse.Namespace) -> int:
    from fastnuggets.molecules import Molecules, count_records, save_table
    from fastnuggets.molecules.files import batched

    skipped: list[Conformer] = []

    def batches() -> Iterator[Molecules]:
        for group in batched(_stream(args, progress=True, total=total), 1024):
            skipped.extend(conformer for conformer in group if conformer.error)
            yield Molecules.from_conformers(group)

    total = count_records(args.input)
    count = save_table(args.out, batches())
    for conformer in skipped[:_TOLD]:
        print(_skipped(conformer), file=sys.stderr)
    return _summary(args, f"{args.out}: {count} molecules", count, len(skipped))


def _skipped(conformer: Conformer) -> str:
    return f"skipped record {conformer.index} ({conformer.name}): {conformer.error}"


def _summary(args: argparse.Namespace, text: str, count: int, skipped: int, report: Path | None = None) -> int:
    broken = f"{skipped} record{'s' if skipped > 1 else ''} skipped" if skipped else ""
    if count == 0:
        return say(f"error: no molecule in {args.input}" + (f": {broken}" if broken else ""), FAILED)
    print(text + (f", {broken}" if broken else "") + (f" (named in {report})" if report else ""))
    return SKIPPED if skipped and args.strict else OK


def _grid_info(args: argparse.Namespace) -> GridInfo:
    from fastnuggets.molecules import ELEMENTS, GridInfo, bondi_radii

    elements = args.elements or ELEMENTS
    sigma, omega, radius = args.sigma, args.omega, None
    for name, value, allowed in (
        ("sigma", sigma, ("wave", "gaussian")),
        ("omega", omega, ("wave",)),
        ("radius", args.radius, _RADIUS_KERNELS),
    ):
        if value is not None and args.kernel not in allowed:
            raise UsageError(f"--{name} has no meaning for --kernel {args.kernel}")
    if args.kernel in _RADIUS_KERNELS:
        radius = (args.radius,) * len(elements) if args.radius else tuple(bondi_radii(elements).tolist())
    return GridInfo(
        density=args.kernel,
        elements=elements,
        shape=args.shape,
        spacing=args.spacing,
        sigma=_SIGMA.get(args.kernel) if sigma is None else sigma,
        omega=(0.5 if omega is None else omega) if args.kernel == "wave" else None,
        radius=radius,
        dtype=args.dtype,
        version=fastnuggets.__version__,
    )


def _batch_size(size: int) -> int:
    """Molecules computed at once, when one of them takes ``size`` bytes. ValueError if not even one fits."""
    from fastnuggets.molecules.files import available_memory, readable

    free = available_memory()
    if size > free:
        raise ValueError(f"the grid of one molecule takes {readable(size)}, and {readable(free)} of memory are free")
    return max(1, min(64, _BATCH_BYTES // size))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _voxelize(args: argparse.Namespace) -> int:
    from fastnuggets.molecules import GridWriter, count_records

    info = _grid_info(args)
    size = _batch_size(info.bytes_per_molecule())
    options = [_digest(args.input), args.column, args.seed, args.no_mmff, args.others, args.center]
    writer = GridWriter(
        args.out,
        info,
        capacity=count_records(args.input),
        key=json.dumps(options),
        restart=args.restart,
        overwrite=args.overwrite,
    )
    if writer.consumed:
        say(f"going on from {writer.partial}: {writer.written} molecules are done")
    try:
        _fill(writer, args, size)
        report = writer.finish()
    except BaseException:
        if writer.written:
            say(
                f"{writer.written} finished molecules are kept in {writer.partial}; the same command goes on from there"
            )
        else:
            writer.discard()
        raise
    outside = writer.notes.pop(_OUTSIDE, 0)
    if outside:
        say(f"molecules with an atom outside the box: {outside}")
    if writer.notes:
        others = ", ".join(f"{element} {count}" for element, count in writer.notes.most_common())
        say(f"atoms without a channel left out: {others}")
    text = f"{args.out}: {writer.written} molecules as {info.dtype} grids {[len(info.elements), *info.shape]}"
    return _summary(args, text, writer.written, writer.skipped, report)


def _fill(writer: GridWriter, args: argparse.Namespace, size: int) -> None:
    """Append the grids of all records that the writer does not have yet."""
    from tqdm import tqdm

    from fastnuggets.molecules.embedding import CHUNK
    from fastnuggets.molecules.files import batched

    # Chunks of the conformer cache are counted from the first record: begin where one begins.
    start = writer.consumed // CHUNK * CHUNK
    bar = tqdm(total=writer.capacity, initial=writer.consumed, unit="mol", desc="voxelize", disable=None)
    with contextlib.closing(_stream(args, start)) as stream, bar:
        told = 0
        for group in batched((conformer for conformer in stream if conformer.index > writer.consumed), size):
            group = [_checked(conformer, args, writer.info.elements) for conformer in group]
            _append(writer, args, group)
            bar.update(len(group))
            for conformer in group:
                if conformer.error and told < _TOLD:
                    bar.write(_skipped(conformer), sys.stderr)
                    told += 1


def _append(writer: GridWriter, args: argparse.Namespace, group: list[Conformer]) -> None:
    from fastnuggets.molecules import Molecules

    elements = writer.info.elements
    every = Molecules.from_conformers(group)
    # That hydrogens have no channel is the usual case.
    notes = Counter({key: n for key, n in every.elements().items() if key not in (*elements, "H")})
    molecules = every.keep(elements)
    center = every.center() if args.center == "mean" else torch.zeros(len(every), 3)
    owner = torch.repeat_interleave(torch.arange(len(molecules)), molecules.ptr.diff())
    half = torch.tensor(writer.info.shape) * torch.tensor(writer.info.spacing) / 2
    outside = ((molecules.coords - center[owner]).abs() > half).any(1)
    notes[_OUTSIDE] = len(set(owner[outside].tolist()))
    writer.append(
        _grids(writer.info, molecules.to(args.device), center.to(args.device)),
        center.numpy(),
        molecules.names,
        molecules.smiles,
        consumed=group[-1].index,
        skipped=[(conformer.index, conformer.name, conformer.error) for conformer in group if conformer.error],
        notes=+notes,
    )


def _checked(conformer: Conformer, args: argparse.Namespace, elements: Sequence[str]) -> Conformer:
    """The conformer; with --others skip, failed if it has an atom without a channel that is no hydrogen."""
    from fastnuggets.molecules.batch import symbol

    others = {symbol(number) for number in conformer.numbers.tolist()} - {"H", *elements}
    if args.others == "skip" and others and not conformer.error:
        return conformer._replace(error=f"no channel for {', '.join(sorted(others))}")
    return conformer


def _grids(info: GridInfo, molecules: Any, center: torch.Tensor) -> Any:
    from fastnuggets.ops import voxelize

    grids = voxelize(
        molecules.coords,
        molecules.channels(info.elements),
        molecules.ptr,
        shape=info.shape,
        spacing=info.spacing,
        num_channels=len(info.elements),
        density=info.density,
        sigma=info.sigma,
        omega=info.omega,
        radius=None if info.radius is None else torch.tensor(info.radius, device=center.device),
        center=center,
        dtype=getattr(torch, info.dtype),
    )
    return grids.cpu().numpy()


def _invert(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fastnuggets.molecules import open_grids
    from fastnuggets.molecules.files import atomic_write, need

    need("rdkit.Chem")
    grids = open_grids(args.input)
    if grids.info.density not in ("wave", "gaussian"):
        raise ValueError(f"{args.input}: a wave or gaussian grid can be inverted, this one is {grids.info.density}")
    levels: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    with (
        atomic_write(args.out) as file,
        tqdm(total=len(grids), unit="mol", desc="invert", disable=None) as bar,
    ):
        for record, level, found in _atoms(grids, args):
            file.write(record.encode())
            levels[level] += 1
            elements.update(found)
            bar.update()
    atoms = ", ".join(f"{element} {count}" for element, count in elements.most_common()) or "no atom"
    kinds = ", ".join(f"{level} {count}" for level, count in levels.most_common())
    print(f"{args.out}: {len(grids)} molecules ({kinds}); atoms {atoms}")
    return OK


def _atoms(grids: Grids, args: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """SDF record, level of its bonds and element symbols of each grid."""
    from fastnuggets.molecules import atomic_numbers
    from fastnuggets.molecules.bonds import bonded, sdf_record
    from fastnuggets.ops import find_atoms

    info = grids.info
    numbers = torch.tensor(atomic_numbers(info.elements))
    size = _batch_size(4 * info.bytes_per_molecule())
    for first in range(0, len(grids), size):
        batch = torch.from_numpy(grids[first : first + size]).to(args.device, torch.float32)
        found = find_atoms(
            batch, sigma=info.sigma or 0.0, omega=info.omega or 0.0, spacing=info.spacing, noise=args.noise
        )
        ptr, channels, positions = found.ptr.tolist(), found.channels.cpu(), found.positions.cpu().numpy()
        for i in range(len(batch)):
            own = slice(ptr[i], ptr[i + 1])
            row = first + i
            mol, level = bonded(numbers[channels[own]].tolist(), positions[own] + grids.centers[row])
            properties = {"smiles": grids.smiles[row], "bonds": level}
            yield sdf_record(mol, grids.names[row], properties), level, [info.elements[c] for c in channels[own]]


def _average(args: argparse.Namespace) -> int:
    from fastnuggets.training.soup import average_checkpoints

    if args.weights and len(args.weights) != len(args.inputs):
        raise UsageError(f"--weights has {len(args.weights)} numbers for {len(args.inputs)} checkpoints")
    if args.ema is not None and not 0 <= args.ema <= 1:
        raise UsageError(f"--ema must be in [0, 1], got {args.ema}")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")  # type: ignore[assignment]
        soup = average_checkpoints(
            args.inputs,
            args.out,
            weights=args.weights,
            ema=args.ema,
            dtype=args.dtype and getattr(torch, args.dtype),
            max_shard_size=args.max_shard_size,
            allow_nonfinite=args.allow_nonfinite,
            overwrite=args.overwrite,
            progress=True,
        )
    last = args.inputs[-1]
    if soup.integers:
        say(f"integer tensors taken from {last}: {soup.integers}")
    if soup.left_out:
        say(f"entries left out that are no tensors: {soup.left_out}")
    if soup.nonfinite:
        say(f"tensors with NaN or inf: {', '.join(soup.nonfinite)}")
    shards = f" in {len(soup.files) - 1} shards" if len(soup.files) > 1 else ""
    count = f"{len(args.inputs)} checkpoint{'s' if len(args.inputs) > 1 else ''}"
    print(f"{soup.files[-1]}: {soup.tensors} tensors{shards}, the average of {count}")
    return OK


def _compose(args: argparse.Namespace) -> int:
    from fastnuggets.scenes import Backgrounds, Cutouts, SceneComposer, compose

    if args.annotations:
        cutouts = Cutouts.from_coco(args.objects, args.annotations)
    else:
        cutouts = Cutouts.from_folder(args.objects, masks=args.masks, inverted=args.inverted_masks)
    if args.background_annotations:
        backgrounds = Backgrounds.from_coco(args.backgrounds, args.background_annotations)
    else:
        backgrounds = Backgrounds.from_folder(args.backgrounds)
    options = {"masks": args.masks, "inverted": args.inverted_masks}
    distractors = Cutouts.from_folder(args.distractors, **options) if args.distractors else ()
    composer = SceneComposer(cutouts, backgrounds, _recipe(args), seed=args.seed, distractors=distractors)
    made = compose(
        composer,
        args.out,
        args.images,
        kind=args.format,
        quality=args.quality,
        workers=args.workers,
        restart=args.restart,
        overwrite=args.overwrite,
        progress=True,
    )
    for name, reason in list(made.skipped.items())[:_TOLD]:
        say(f"skipped {name}: {reason}")
    if made.left_out:
        say(f"objects left out for want of a place: {made.left_out}")
    broken = f", {len(made.skipped)} broken files skipped (named in {made.report})" if made.skipped else ""
    print(f"{made.out}: {made.images} images with {made.annotations} objects{broken}")
    return SKIPPED if made.skipped and args.strict else OK


def _recipe(args: argparse.Namespace) -> Any:
    """The preset with what the command line says otherwise."""
    from fastnuggets.scenes import ALL_BLENDS, preset

    changes: dict[str, Any] = {"objects": args.count}
    for name in ("size", "level", "scale", "scale_of", "angle", "max_overlap", "min_visibility"):
        changes[name] = getattr(args, name)
    if args.blend:
        changes["blend"] = ALL_BLENDS if args.blend == "all" else tuple(args.blend.split(","))
        changes["same_scene"] = args.same_scene or args.blend == "all"
    elif args.same_scene:
        changes["same_scene"] = True
    if args.distractors:
        changes["distractors"] = args.distractor_count or (2, 4)
    elif args.distractor_count:
        raise UsageError("--distractor-count needs --distractors")
    try:
        return preset(args.preset, **{name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise UsageError(str(error)) from None


def _blend(args: argparse.Namespace) -> int:
    from fastnuggets.molecules.files import atomic_write
    from fastnuggets.scenes.blending import blend_one
    from fastnuggets.scenes.images import encode, read_mask, read_rgb

    kind = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg"}.get(args.out.suffix.lower())
    if kind is None:
        raise UsageError(f"--out must end in .png or .jpg, got {args.out}")
    foreground, mask, background = read_rgb(args.foreground), read_mask(args.mask), read_rgb(args.background)
    if mask.shape != foreground.shape[:2]:
        raise ValueError(f"{args.mask}: the mask is {mask.shape}, and the foreground {foreground.shape[:2]}")
    middle = tuple((whole - part) // 2 for whole, part in zip(background.shape, mask.shape, strict=False))
    with atomic_write(args.out) as file:
        file.write(encode(blend_one(background, foreground, mask, args.at or middle, args.mode), kind))
    print(f"{args.out}: {background.shape[1]} x {background.shape[0]}, {args.mode}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
