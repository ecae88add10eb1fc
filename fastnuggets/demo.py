"""The demo: molecules become grids, a network learns the grids, and the atoms come back, in one page."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastnuggets.models import WaveAutoencoder
from fastnuggets.models.wave_autoencoder import channel_loss
from fastnuggets.molecules import Molecules
from fastnuggets.molecules.boxes import boxed
from fastnuggets.molecules.files import need
from fastnuggets.molecules.matching import Score, sorted_atoms, voxel_atoms
from fastnuggets.molecules.matching import compare as compare_channels
from fastnuggets.ops.inverse import Atoms, find_atoms
from fastnuggets.ops.voxelize import voxelize
from fastnuggets.training import Checkpoint, Interrupted, fit, load_checkpoint

ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br", "I")
CHANNELS = ("C", "N", "O", "S", "halogen")  # the halogens are too few here for a channel each
SPACING = 0.5  # angstrom
LARGEST = 7.0  # angstrom, from the centre to the farthest heavy atom: a margin of an angstrom in the box of 16
SCALE_POWER = 0.85
NOISE = (0.0, 0.1, 0.2, 0.4)  # standard deviation, of an atom's peak


class Representation(NamedTuple):
    """A way to draw atoms into a grid."""

    name: str
    density: str
    sigma: float | None = None  # angstrom
    omega: float | None = None  # waves per angstrom


REPRESENTATIONS = (
    Representation("one-hot", "nearest"),
    Representation("Gaussian, narrow", "gaussian", 0.5),
    Representation("Gaussian, wide", "gaussian", 1.0),
    Representation("wave", "wave", 1.0, 0.5),
)
WAVE = REPRESENTATIONS[-1]


class Plan(NamedTuple):
    """How much the demo does."""

    records: int | None  # read from the file; None: all
    steps: int
    batch: int = 16
    learning_rate: float = 3e-3
    width: int = 128
    latent: int = 32
    blocks: int = 2
    shape: int = 32  # of the grids shown and measured
    crop: int = 24  # of those trained on; less than `shape` costs less, and the network takes any shape
    tested: int = 64  # molecules kept from the training
    shown: int = 6


STANDARD = Plan(records=None, steps=1800)
QUICK = Plan(records=1200, steps=250, latent=48, tested=32, shown=4)


class Data(NamedTuple):
    """Molecules of heavy atoms, centred, and how they were chosen."""

    train: Molecules
    test: Molecules
    read: int
    left_out: dict[str, int]
    conformers_per_second: float | None  # None: they were in the cache


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    data: Data
    seed: int
    training: Checkpoint
    parameters: int
    grid: Tensor  # [B, C, D, H, W] wave grids of the test molecules
    output: Tensor  # what the autoencoder made of them
    truth: Atoms
    found: Atoms  # in `output`
    noise: float  # what find_atoms was told about `output`
    scores: dict[str, dict[str, list[Score]]]  # representation -> condition -> one a channel, and all
    residual: list[float]  # [C] mean squared error of the test molecules over the grids' mean square
    speed: dict[str, float]  # molecules a second
    seconds: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, or the one that the first argument names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "molecules"
    if name in OTHERS:
        return int(import_module(f"fastnuggets.demo_{name}").main(arguments))
    if name != "molecules":
        _parser().error(f"there is no demo {name!r}: {', '.join(['molecules', *OTHERS])}")
    args = _parser().parse_args(arguments)
    # Before minutes are spent: the last of these is needed only for the page.
    missing = [name for name in ("rdkit", "pyarrow", "tqdm", "matplotlib", "skimage") if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)}: not installed; pip install 'fastnuggets[demo]'")
    try:
        result = run(args.input, args.out, QUICK if args.quick else STANDARD, seed=args.seed, restart=args.restart)
    except KeyboardInterrupt as stop:
        kept = f"{args.out / 'checkpoint.pt'} is" if isinstance(stop, Interrupted) else "finished conformers are"
        print(f"\nfastnuggets: interrupted; {kept} kept. The same command goes on from there", file=sys.stderr)
        return 130
    from fastnuggets import report

    page = report.write(result, args.out)
    print(f"{page}: open it in a browser ({sum(result.seconds.values()):.0f} s)")
    return 0


# The other demos, each in a module of its own, demo_NAME, which writes OUT/NAME.html.
OTHERS = {
    "average": "averages of weights and ensembles side by side, on handwritten digits",
    "sample": "a layer that is nothing but noise, networks that say how sure they are, and noise that repeats",
    "blend": "one object under every blend with its errors, and detectors that learn from composed scenes",
    "representations": "two networks learn from one-hot voxels, Gaussians and waves, and what each makes of them",
    "fingerprints": "two autoencoders of fingerprints, one regularized by a divergence and one by an adversary",
    "impute": "gaps of three tables, filled by a network that draws what belongs in them and by scikit-learn",
    "inpaint": "hidden parts of digits and of photographs, drawn by a network beside other ways to fill them",
    "prior": "what kernels of networks that read letters look like, as the prior of networks that read digits",
    "variance": "networks that learn by noise alone lose their means, and are attacked through what they draw",
    "vae": "digits with a label, or with a category that nobody named, and bounds that compare with a mixture",
    "dropout": "dropout, stochastic depth and very large dropout beside averages of weights and ensembles",
}

_DESCRIPTION = """\
Each demo writes a page that needs no network.

  molecules        molecules become wave grids, an autoencoder learns them, and the atoms are found again in what it
                   returns: OUT/report.html. This is what runs without a name; its options are below.
{others}

Each of these has options of its own (fastnuggets demo NAME --help) and writes OUT/NAME.html.

Options of molecules:"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastnuggets demo",
        usage="%(prog)s [molecules] [--input FILE] [--out DIR] [--quick] [--seed SEED] [--resume | --fresh]\n"
        f"       %(prog)s {{{','.join(OTHERS)}}} [--help]",
        description=_DESCRIPTION.format(others="\n".join(f"  {name:<15}  {told}" for name, told in OTHERS.items())),
        epilog="Ctrl-C keeps a checkpoint; the same command goes on from it. A finished training is not repeated.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, metavar="FILE", help=".sdf .smi .csv .parquet (default: NCI, from RDKit)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder to write (default out)")
    parser.add_argument("--quick", action="store_true", help="fewer molecules and steps: about a minute")
    parser.add_argument("--seed", type=int, default=0, help="of conformers, split, poses and weights (default 0)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--resume", dest="restart", action="store_false", help="go on from the checkpoint, or fail if it cannot be"
    )
    how.add_argument("--fresh", dest="restart", action="store_true", help="train again from the beginning")
    parser.set_defaults(restart=None)
    return parser


def run(source: Path | None, out: Path, plan: Plan, *, seed: int = 0, restart: bool | None = None) -> Result:
    """The demo without its page.

    ``restart``: True trains anew, False goes on from the checkpoint or raises ValueError, None does what fits.
    """
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable, *args: object, **options: object):
        print(f"{name} ...", file=sys.stderr)
        began = time.perf_counter()
        result = function(*args, **options)
        seconds[name] = time.perf_counter() - began
        return result

    data = timed("conformers", load, source or _nci(), out / "conformers", plan, seed)
    model, training = timed("training", train, data.train, plan, seed, out / "checkpoint.pt", restart)
    return timed("measuring", _measure, model, data, plan, seed, training, seconds)


def _nci() -> Path:
    return Path(need("rdkit.RDConfig").RDDataDir) / "NCI" / "first_5K.smi"


def load(source: Path, cache: Path, plan: Plan, seed: int) -> Data:
    """Molecules that fit the box, each once, with one conformer; split at random. ValueError if too few are left."""
    known = len(list(cache.glob("*/*.parquet")))
    began = time.perf_counter()
    largest = min(LARGEST, plan.shape * SPACING / 2 - 1)
    found = boxed(source, ELEMENTS, largest, seed=seed, optimize=False, cache=cache, most=plan.records, progress=True)
    seconds = time.perf_counter() - began
    count = len(found.molecules)
    if count < 2 * plan.tested:
        raise ValueError(f"{source}: {count} molecules are left, {2 * plan.tested} are needed ({found.left_out})")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    train_set, test_set = found.molecules[order[plan.tested :]], found.molecules[order[: plan.tested]]
    speed = None if known or not found.embedded else found.embedded / seconds
    return Data(train_set, test_set, found.read, found.left_out, speed)


def random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """[count, 3, 3], uniform over all rotations: from unit quaternions (Shoemake, Graphics Gems III, 1992)."""
    q = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1)
    w, (x, y, z) = q[:, 0], q[:, 1:].unbind(1)
    zero = torch.zeros_like(w)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    return torch.eye(3) + 2 * (w.view(-1, 1, 1) * cross + cross @ cross)


def channels(molecules: Molecules) -> Tensor:
    """Channel of each atom, [N] int64: the place in CHANNELS."""
    return molecules.channels(ELEMENTS).clamp(max=len(CHANNELS) - 1)


class Pose(NamedTuple):
    """How molecules stand in their boxes."""

    rotation: Tensor  # [B, 3, 3]
    translation: Tensor  # [B, 3] angstrom, after the rotation


def draw(
    molecules: Molecules, representation: Representation, shape: int, pose: Pose, out: Tensor | None = None
) -> Tensor:
    """[B, C, D, H, W] float32."""
    return voxelize(
        molecules.coords,
        channels(molecules),
        molecules.ptr,
        shape=shape,
        spacing=SPACING,
        num_channels=len(CHANNELS),
        density=representation.density,
        sigma=representation.sigma,
        omega=representation.omega,
        rotation=pose.rotation,
        translation=pose.translation,
        out=out,
    )


def random_pose(count: int, generator: torch.Generator, shift: float) -> Pose:
    """Any rotation, and up to `shift` angstrom along each axis."""
    translation = shift * (2 * torch.rand(count, 3, generator=generator) - 1)
    return Pose(random_rotations(count, generator), translation)


def train(
    molecules: Molecules, plan: Plan, seed: int, path: Path, restart: bool | None
) -> tuple[WaveAutoencoder, Checkpoint]:
    """The autoencoder, trained on random poses of the molecules, and its last checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    sample = molecules[:512]
    spread = draw(sample, WAVE, plan.shape, random_pose(len(sample), generator, SPACING)).std((0, 2, 3, 4))
    # A channel that no molecule of the sample has would divide by zero.
    scale = spread.clamp(min=0.1 * spread.max().item()) ** SCALE_POWER
    torch.manual_seed(seed)
    model = WaveAutoencoder(
        len(CHANNELS), width=plan.width, latent=plan.latent, blocks=plan.blocks, scale=scale.tolist()
    )

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed << 32) + step)
        batch = molecules[torch.randint(len(molecules), (plan.batch,), generator=generator)]
        grid = draw(batch, WAVE, plan.crop, random_pose(plan.batch, generator, 1.0))
        return channel_loss(model(grid), grid, model.scale)

    settings = {**plan._asdict(), "seed": seed, "molecules": len(molecules), "atoms": len(molecules.numbers)}
    if restart is False and not path.exists():
        raise ValueError(f"{path}: there is no checkpoint to resume from")
    if restart or not (_continues(path, settings) or restart is False):
        path.unlink(missing_ok=True)
    checkpoint = fit(
        model,
        loss,
        torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4),
        steps=plan.steps,
        schedule=lambda step: min(1.0, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * step / plan.steps)),
        checkpoint=path,
        settings=settings,
    )
    return model.eval(), checkpoint


def _continues(path: Path, settings: dict) -> bool:
    found = load_checkpoint(path)
    if found is None:
        return False
    if found.settings != settings:
        print(f"{path} is of other settings: training from the beginning", file=sys.stderr)
        return False
    print(f"going on from {path}: {found.step} of {settings['steps']} steps are done", file=sys.stderr)
    return True


@torch.no_grad()
def _measure(
    model: WaveAutoencoder, data: Data, plan: Plan, seed: int, training: Checkpoint, seconds: dict[str, float]
) -> Result:
    test, generator = data.test, torch.Generator().manual_seed(seed + 1)
    pose = random_pose(len(test), generator, SPACING / 2)
    truth = _truth(test, pose)
    scores: dict[str, dict[str, list[Score]]] = {}
    speed = {"training": plan.batch * training.step / training.seconds}
    if data.conformers_per_second:
        speed["conformers"] = data.conformers_per_second
    for representation in REPRESENTATIONS:
        grid = draw(test, representation, plan.shape, pose)
        speed[f"voxelize, {representation.name}"] = _rate(
            partial(draw, test, representation, plan.shape, pose, grid), len(test)
        )
        scores[representation.name] = {}
        for level in NOISE:
            noisy = grid + level * torch.randn(grid.shape, generator=generator)
            began = time.perf_counter()
            found = recover(noisy, representation, level)
            if level == 0.1:
                speed[f"find atoms, {representation.name}"] = len(test) / (time.perf_counter() - began)
            scores[representation.name][f"{level:.0%} noise" if level else "clean"] = compare(found, truth)
    output = reconstruct(model, grid)
    # What the network does not give back is what find_atoms must take for noise; known molecules tell how much.
    known = data.train[: plan.tested]
    known_grid = draw(known, WAVE, plan.shape, random_pose(len(known), generator, SPACING / 2))
    noise = _error(reconstruct(model, known_grid), known_grid)
    found = recover(output, WAVE, noise)
    scores[WAVE.name]["autoencoder"] = compare(found, truth)
    speed["autoencoder, forward"] = _rate(lambda: reconstruct(model, grid), len(test))
    return Result(
        plan,
        data,
        seed,
        training,
        sum(parameter.numel() for parameter in model.parameters()),
        grid,
        output,
        truth,
        found,
        noise,
        scores,
        ((output - grid).square().mean((0, 2, 3, 4)) / grid.square().mean((0, 2, 3, 4))).tolist(),
        speed,
        seconds,
    )


def reconstruct(model: WaveAutoencoder, grid: Tensor) -> Tensor:
    return torch.cat([model(part) for part in grid.split(16)])


def _error(output: Tensor, grid: Tensor) -> float:
    """Rms error of the voxels where there is something to see."""
    return (output - grid)[grid.abs() > 0.05].square().mean().sqrt().item()


def _rate(function: Callable[[], object], count: int, least: float = 0.5) -> float:
    """Items a second, from at least `least` seconds of calls after a first one."""
    function()
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < least:
        function()
        calls += 1
    return calls * count / (time.perf_counter() - began)


def _truth(molecules: Molecules, pose: Pose) -> Atoms:
    """The atoms as they stand in the box, sorted as find_atoms sorts them."""
    owner = torch.arange(len(molecules)).repeat_interleave(molecules.ptr.diff())
    positions = (pose.rotation[owner] @ molecules.coords[:, :, None]).squeeze(2) + pose.translation[owner]
    return sorted_atoms(positions, channels(molecules), owner, len(molecules))


def recover(grid: Tensor, representation: Representation, noise: float) -> Atoms:
    """The atoms a grid shows; of a one-hot grid, which has no kernel to undo, the centres of voxels above one half."""
    if representation.sigma is not None:
        return find_atoms(
            grid, sigma=representation.sigma, omega=representation.omega or 0.0, spacing=SPACING, noise=noise
        )
    return voxel_atoms(grid, SPACING)


def compare(found: Atoms, truth: Atoms) -> list[Score]:
    """One score a channel, and one of all atoms."""
    return compare_channels(found, truth, len(CHANNELS))


if __name__ == "__main__":
    sys.exit(main())
