"""The study of representations: what one network makes of molecules as one-hot voxels, as Gaussians and as waves."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnuggets.molecules.batch import Molecules
from fastnuggets.molecules.boxes import Boxed, boxed
from fastnuggets.molecules.files import need
from fastnuggets.molecules.matching import compare, recovered
from fastnuggets.parts import Parts, command, settings
from fastnuggets.systems.base import Draw, System
from fastnuggets.systems.maccs_predictor import KeyedData, MaccsPredictorSettings, MaccsPredictorSystem, keyed
from fastnuggets.systems.molecule_grids import MARGIN, Drawing, GridSettings, apart, facts_of, turned
from fastnuggets.systems.ranking import rank
from fastnuggets.systems.wave_autoencoder import WaveAutoencoderSettings, WaveAutoencoderSystem

ELEMENTS = "C,N,O,S,F+Cl+Br+I"  # the halogens are too few here for a channel each
SPACING = 0.5  # angstrom
LEVELS = (0.1, 0.2, 0.4)  # of noise, of an atom's peak
PICTURED = 3


class Representation(NamedTuple):
    """A way to draw atoms into a grid."""

    name: str
    density: str
    sigma: float = 0.0  # angstrom
    omega: float = 0.0  # waves per angstrom


ONE_HOT = Representation("one-hot", "nearest")
GAUSSIANS = (
    Representation("Gaussian, narrow", "gaussian", 0.5),
    Representation("Gaussian, wide", "gaussian", 1.0),
)
WAVES = (
    Representation("wave, narrow", "wave", 0.75, 0.5),
    Representation("wave, wide", "wave", 1.0, 0.5),
)
LEARNED = (ONE_HOT, *GAUSSIANS, *WAVES)
NOISY = (
    ONE_HOT,
    GAUSSIANS[0],
    Representation("Gaussian 0.75", "gaussian", 0.75),
    GAUSSIANS[1],
    Representation("Gaussian 1.5", "gaussian", 1.5),
    *WAVES,
    Representation("wave 1, 0.6", "wave", 1.0, 0.6),
    Representation("wave 1.5, 0.667", "wave", 1.5, 0.667),
)


class Plan(NamedTuple):
    """How much the study does, and its settings."""

    seeds: int
    steps: int  # of an autoencoder
    key_steps: int  # of a predictor of keys
    records: int | None = None  # read from the file; None: all
    tested: int = 200  # molecules kept from the training
    chosen: int = 64  # molecules of the training on which the caution is chosen
    noisy: int = 64  # molecules whose grids are made noisy
    shape: int = 24  # of the grids that are learned
    noisy_shape: int = 32
    batch: int = 16
    rate: float = 3e-3
    width: int = 64
    latent: int = 32
    blocks: int = 2
    key_blocks: int = 3


STANDARD = Plan(seeds=2, steps=1000, key_steps=800)
QUICK = Plan(seeds=2, steps=40, key_steps=40, records=600, tested=16, chosen=4, noisy=4, width=32, blocks=1)


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    data: dict[str, Any]
    noise: dict[str, dict[str, Any]]  # representation -> its figures
    atoms: dict[str, list[dict[str, Any]]]  # representation -> one a seed
    keys: dict[str, list[dict[str, Any]]]  # representation -> one a seed
    seconds: float  # of all computations, those of earlier calls too
    reused: int  # parts that an earlier call had done
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    return command(
        "representations",
        argv,
        run,
        (STANDARD, QUICK),
        description="The molecules of the NCI that RDKit ships become grids of one-hot voxels, and of narrow and "
        "wide Gaussians and waves. One autoencoder and one predictor of MACCS keys learn from each, with the same "
        "settings and steps; atoms are looked for in what the autoencoders return, and in grids with noise. Writes "
        "OUT/representations.html, a page that needs no network, and its figures in OUT/representations.json.",
        repeated="splits, poses and weights to repeat the learning with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The study without its page. Each training, and each row of the noise, is kept in `cache` when it is done.

    Deterministic: the same settings, versions and number of threads give the same bits on the same machine,
    interrupted or not.
    """
    source = Path(need("rdkit.RDConfig").RDDataDir) / "NCI" / "first_5K.smi"
    found = load(source, plan, cache / "conformers")
    radius = _radius(found.molecules)
    fits = (radius <= plan.shape * SPACING / 2 - MARGIN).nonzero().flatten()
    molecules, keys = keyed(found.molecules[fits], source)
    data = {
        "read": found.read,
        "left out": found.left_out,
        "left": len(found.molecules),
        "learned": len(molecules) - plan.tested,
        "atoms": len(molecules.numbers) / len(molecules),
    }
    total = plan.seeds * len(LEARNED) * (plan.steps + plan.key_steps)
    atoms: dict[str, list[dict[str, Any]]] = {representation.name: [] for representation in LEARNED}
    bits: dict[str, list[dict[str, Any]]] = {representation.name: [] for representation in LEARNED}
    noise = {}
    with need("tqdm").tqdm(total=total, unit="step", disable=None) as bar:
        part = Parts(cache, bar, fresh=fresh)
        for one in NOISY:
            what = settings(plan, {"part": "noise", "representation": list(one)})
            noise[one.name] = part(f"noise, {one.name}", 0, what, partial(_timed, noisy, found.molecules, plan, one))
        for seed in range(plan.seeds):
            learn, test = apart(len(molecules), plan.tested / len(molecules), seed, source)
            split = KeyedData(molecules[learn], molecules[test], keys[learn], keys[test])
            for one in LEARNED:
                for into, name, ticks, compute in (
                    (atoms, "atoms", plan.steps, learn_atoms),
                    (bits, "keys", plan.key_steps, learn_keys),
                ):
                    what = settings(plan, {"part": name, "representation": list(one), "seed": seed})
                    job = partial(_timed, compute, split, plan, one, seed, bar.update, source)
                    into[one.name].append(part(f"{name}, {one.name}, seed {seed}", ticks, what, job))
    return Result(plan, data, noise, atoms, bits, sum(part.seconds), sum(part.reused), len(part.reused))


def _timed(compute: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """With the seconds of processor time, all threads together: they tell more than a clock on a busy machine."""
    began = time.process_time()
    return compute(*arguments) | {"processor": time.process_time() - began}


def load(source: Path, plan: Plan, cache: Path) -> Boxed:
    """Molecules of the file that fit the larger box, heavy atoms alone, centred."""
    print("conformers ...", file=sys.stderr)
    elements = ELEMENTS.replace("+", ",").split(",")
    largest = plan.noisy_shape * SPACING / 2 - MARGIN
    return boxed(source, elements, largest, optimize=False, cache=cache, most=plan.records, progress=True)


def _radius(molecules: Molecules) -> Tensor:
    owner = torch.arange(len(molecules)).repeat_interleave(molecules.ptr.diff())
    return torch.zeros(len(molecules)).scatter_reduce(0, owner, molecules.coords.norm(dim=1), "amax")


def _common(plan: Plan, one: Representation) -> dict[str, Any]:
    return {
        "density": one.density,
        "sigma": one.sigma,
        "omega": one.omega,
        "spacing": SPACING,
        "shape": plan.shape,
        "elements": ELEMENTS,
        "batch_size": plan.batch,
        "learning_rate": plan.rate,
        "width": plan.width,
    }


# Noise on the grid


def noisy(molecules: Molecules, plan: Plan, one: Representation) -> dict[str, Any]:
    """Atoms found in grids with noise: for each level the share of molecules found without an error, and more."""
    drawing = Drawing(GridSettings(**(_common(plan, one) | {"shape": plan.noisy_shape})))
    order = torch.randperm(len(molecules), generator=torch.Generator().manual_seed(0))
    some = turned(molecules[order[: plan.noisy]], 0, SPACING / 2)
    grid, truth = drawing.still(some), drawing.truth(some)
    generator = torch.Generator().manual_seed(1)
    found = {}
    for level in LEVELS:
        dirty = grid + level * torch.randn(grid.shape, generator=generator)
        atoms = drawing.find(dirty, torch.full((len(drawing.names),), level))
        score = compare(atoms, truth, len(drawing.names))[-1]
        whole = recovered(atoms, truth).double().mean().item()
        found[f"{level:g}"] = [whole, score.precision, score.recall, score.rmse]
    return {"noise": found}


# What is learned


def learn(system: System, data: KeyedData, steps: int, seed: int, tick: Callable[[], object]) -> list[float]:
    """Trains a system's model; the loss of each step."""
    (optimizer,) = system.optimizers()
    base = [group["lr"] for group in optimizer.param_groups]
    losses = []
    system.model.train()
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * system.schedule(step, steps)
        for update in system.updates(data, step, Draw(seed)):
            optimizer.zero_grad(set_to_none=True)
            update.loss.backward()
            torch.nn.utils.clip_grad_norm_(system.model.parameters(), system.clip)
            optimizer.step()
            losses.append(update.loss.item())
        tick()
    system.model.eval()
    return losses


def learn_atoms(
    data: KeyedData, plan: Plan, one: Representation, seed: int, tick: Callable[[], object], source: Path
) -> dict[str, Any]:
    """An autoencoder, and the atoms of the test molecules found in what it returns."""
    chosen = WaveAutoencoderSettings(**_common(plan, one), crop=plan.shape, latent=plan.latent, blocks=plan.blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        system = WaveAutoencoderSystem(chosen, facts_of(source, data, Drawing(chosen), seed))
        losses = learn(system, data, plan.steps, seed, tick)
    system.choose_caution(data.train[: plan.chosen])
    test = turned(data.test, seed, SPACING / 2)
    counted = system.counted(test)
    return {
        "losses": losses,
        "caution": system.model.caution.item(),
        "gain": system.model.gain.tolist(),
        "error": system.model.error.tolist(),
        "scores": [list(score) for score in counted.scores],
        "recovered": counted.recovered.double().mean().item(),
        "parameters": sum(weight.numel() for weight in system.model.parameters()),
        "pictures": _pictures(system, test[:PICTURED]),
    }


@torch.no_grad()
def _pictures(system: WaveAutoencoderSystem, molecules: Molecules) -> Tensor:
    """[molecules, 2, H, W] middle planes of what went in and of what came out, channels added."""
    grid = system.drawing.still(molecules)
    middle = grid.shape[2] // 2
    return torch.stack([volume.sum(1)[:, middle - 1 : middle + 1].mean(1) for volume in (grid, system.model(grid))], 1)


def learn_keys(
    data: KeyedData, plan: Plan, one: Representation, seed: int, tick: Callable[[], object], source: Path
) -> dict[str, Any]:
    """A predictor of MACCS keys, and how it ranks those of the test molecules."""
    chosen = MaccsPredictorSettings(**_common(plan, one), blocks=plan.key_blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        system = MaccsPredictorSystem(chosen, facts_of(source, data, Drawing(chosen), seed))
        losses = learn(system, data, plan.key_steps, seed, tick)
    ranking = rank(system.logits(turned(data.test, seed, SPACING / 2)), data.test_keys)
    # What is already known of a molecule that was not looked at: how common each key is.
    common = rank(data.train_keys.double().mean(0).expand(len(data.test_keys), -1), data.test_keys)
    return {
        "losses": losses,
        "varying": int(ranking.varying.sum()),
        "roc_auc": [ranking.micro_roc_auc, ranking.macro_roc_auc],
        "average_precision": [ranking.micro_average_precision, ranking.macro_average_precision],
        "without looking": [
            common.micro_roc_auc,
            common.macro_roc_auc,
            common.micro_average_precision,
            common.macro_average_precision,
        ],
        "each": ranking.roc_auc.tolist(),
        "share": data.test_keys.double().mean(0).tolist(),
        "parameters": sum(weight.numel() for weight in system.model.parameters()),
    }
