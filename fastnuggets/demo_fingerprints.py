"""The demo of fingerprint generators: druGAN's comparison on the molecules that come with RDKit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastnuggets.models.fingerprint_autoencoder import discriminator_loss, layers
from fastnuggets.molecules import read
from fastnuggets.molecules.files import need
from fastnuggets.molecules.fingerprints import BITS, fingerprints
from fastnuggets.parts import Parts, command, one_thread, settings
from fastnuggets.systems import Draw
from fastnuggets.systems.fingerprint_autoencoder import FingerprintAAESystem, FingerprintSystem, FingerprintVAESystem
from fastnuggets.systems.fingerprint_data import Rows, Split, properties
from fastnuggets.systems.fingerprint_measures import judge, moments, nearest, regression

KIND = "maccs"
PROPERTIES = ("logP", "TPSA")
NCI = "Data/NCI/first_5K.smi"
# Every file of molecules in RDKit's wheel, and where in a line the SMILES is if the reader cannot know.
SOURCES: tuple[tuple[str, int | None], ...] = (
    (NCI, None),
    ("Data/NCI/first_200.props.sdf", None),
    ("Data/Pains/test_data/wehi_mols.csv", 0),
    ("Data/Pains/test_data/test_set3.txt", 2),
    ("Contrib/FreeWilson/data/CHEMBL2321810.smi", None),
    ("Contrib/FreeWilson/data/cmet_ligands.sdf", None),
    ("Contrib/PBF/testData/egfr.sdf", None),
    ("Contrib/fraggle/data/ChEMBL_11265_actives.smi", None),
    ("Contrib/Fastcluster/cdk2.smi", 1),
    ("Contrib/SA_Score/data/zim.100.txt", 0),
)


class Setting(NamedTuple):
    """One network and how it is regularized."""

    model: str  # VAE or AAE
    latent: int
    weight: float
    prior_std: float = 1.0

    @property
    def name(self) -> str:
        prior = f", prior {self.prior_std:g}" if self.prior_std != 1 else ""
        return f"{self.model}, z {self.latent}, weight {self.weight:g}{prior}"


VAE, AAE = Setting("VAE", 10, 1.0), Setting("AAE", 20, 1.0)  # as published
SETTINGS = (
    VAE._replace(weight=0.1),
    VAE._replace(weight=0.3),
    VAE,
    VAE._replace(weight=3.0),
    VAE._replace(latent=20),
    AAE._replace(weight=0.1),
    AAE,
    AAE._replace(prior_std=5.5),
    AAE._replace(latent=10),
)


class Plan(NamedTuple):
    """How much the demo does, and its settings."""

    seeds: int
    steps: int  # of the autoencoder; the adversary and its opponent have as many of their own
    molecules: int = 0  # read of each file; 0: all
    batch: int = 256
    rate: float = 1e-3
    tested: float = 0.1
    samples: int = 1000
    probe_steps: int = 200
    shown: int = 6


STANDARD = Plan(seeds=5, steps=400)
QUICK = Plan(seeds=2, steps=60, molecules=600, probe_steps=50)


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    data: dict[str, Any]
    scores: dict[Setting, list[dict[str, Any]]]  # one a seed
    independent: float  # nats of a molecule if its bits were independent
    parameters: dict[str, int]
    seconds: float  # of all computations, those of earlier calls too
    reused: int  # parts that an earlier call had done
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return command(
        "fingerprints",
        argv,
        run,
        (STANDARD, QUICK),
        description="druGAN's comparison: a variational and an adversarial autoencoder of MACCS fingerprints, on all "
        "molecules that come with RDKit. How well each rebuilds what it has not seen, against how various its samples "
        "are; whether its codes are where the prior is; what a linear function of a code tells. Writes "
        "OUT/fingerprints.html, a page that needs no network, and its figures in OUT/fingerprints.json.",
        repeated="splits, weights and batches to repeat all with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The demo without its page. Each training is kept in `cache` when it is done.

    Deterministic: the same settings and versions give the same bits on the same machine, interrupted or not; times
    are as they were measured.
    """
    need("rdkit.Chem")
    total = len(SETTINGS) * plan.seeds * plan.steps
    with one_thread(), need("tqdm").tqdm(total=total, unit="step", disable=None) as bar:
        part = Parts(cache, bar, fresh=fresh)
        what = {"part": "data", "sources": list(SOURCES), "rdkit": need("rdkit").__version__}
        data = part("molecules", 0, settings(plan, what), partial(collect, plan))
        scores: dict[Setting, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
        for seed in range(plan.seeds):
            for setting in SETTINGS:
                what = settings(plan, {"part": list(setting), "seed": seed, "rdkit": need("rdkit").__version__})
                compute = partial(score, setting, plan, data["packed"], data["values"], seed, bar.update)
                scores[setting].append(part(f"{setting.name}, seed {seed}", plan.steps, what, compute))
    mean, _ = moments(data["packed"], BITS[KIND])
    return Result(
        plan,
        data,
        scores,
        float((torch.special.entr(mean) + torch.special.entr(1 - mean)).sum()),
        {one.model: sum(w.numel() for w in system(one, plan).model.parameters()) for one in (VAE, AAE)},
        sum(part.seconds),
        sum(part.reused),
        len(part.reused),
    )


# Data


def collect(plan: Plan) -> dict[str, Any]:
    """The distinct fingerprints of RDKit's molecules, with what is told of each by its first molecule."""
    config = need("rdkit.RDConfig")
    roots = {"Data": Path(config.RDDataDir), "Contrib": Path(config.RDContribDir)}
    counts: dict[str, list[int]] = {}
    smiles: dict[str, None] = {}
    for source, column in SOURCES:
        root, _, rest = source.partition("/")
        path = roots[root] / rest
        if not path.is_file():  # another release of RDKit may have fewer
            continue
        before, lines, readable = len(smiles), 0, 0
        for text in _molecules(path, column):
            lines += 1
            readable += bool(text)
            if text:
                smiles[text] = None
            if lines == plan.molecules:
                break
        counts[source] = [lines, readable, len(smiles) - before]
    found = fingerprints(list(smiles), KIND)
    _, first = np.unique(found.packed, axis=0, return_index=True)
    first.sort()
    kept = [found.smiles[place] for place in first]
    return {
        "packed": torch.from_numpy(found.packed[first]),
        "smiles": kept,
        "values": torch.stack([properties(kept, name) for name in PROPERTIES]),
        "counts": counts,
        "molecules": len(found),
    }


def _molecules(path: Path, column: int | None) -> Iterator[str]:
    """Canonical SMILES of a file, "" for what cannot be read."""
    if column is None:
        yield from (record.smiles for record in read(path))
        return
    chem = need("rdkit.Chem")
    with need("rdkit.rdBase").BlockLogs():
        for line in path.read_text().splitlines():
            fields = line.replace('"', "").split("," if path.suffix == ".csv" else None)
            if line.startswith("#") or len(fields) <= column or fields[column] == "smiles":
                continue
            mol = chem.MolFromSmiles(fields[column])
            yield chem.MolToSmiles(mol) if mol is not None and mol.GetNumAtoms() else ""


# One training


def system(setting: Setting, plan: Plan) -> FingerprintSystem:
    kind: type[FingerprintSystem] = FingerprintVAESystem if setting.model == "VAE" else FingerprintAAESystem
    told = kind.Settings(  # type: ignore[call-arg]
        batch_size=plan.batch,
        learning_rate=plan.rate,
        tested=plan.tested,
        latent=setting.latent,
        weight=setting.weight,
        prior_std=setting.prior_std,
    )
    return kind(told, {"bits": BITS[KIND], "kind": KIND})


def train(setting: Setting, plan: Plan, data: Split, seed: int, tick: Callable[[], object]) -> FingerprintSystem:
    """A network after its steps, in evaluation mode."""
    torch.manual_seed(seed)
    made = system(setting, plan)
    made.model.train()
    for step in range(plan.steps):
        for update in made.updates(data, step, Draw(seed)):
            made.model.zero_grad(set_to_none=True)
            update.loss.backward()
            update.optimizer.step()
        tick()
    made.model.eval()
    return made


def score(
    setting: Setting, plan: Plan, packed: Tensor, values: Tensor, seed: int, tick: Callable[[], object]
) -> dict[str, Any]:
    """A training, and what its network is worth on fingerprints [N, bytes] that were held out; values [P, N]."""
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(seed))
    tested, learned = order[: (held := round(plan.tested * len(order)))], order[held:]
    data = Split(Rows(packed[learned], ()), Rows(packed[tested], ()))
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        made = train(setting, plan, data, seed, tick)
        training = time.perf_counter() - began
        codes, fit = made.codes(data.test.packed, seed=seed)
        logits = made.samples(plan.samples, seed)
        drawn = judge(logits, data.train.packed)
        probe = _probe(made, data, plan, seed)
    told = {name: regression(codes, values[i, tested])[0] for i, name in enumerate(PROPERTIES)}
    first = nearest(logits[: plan.shown], data.train.packed)
    return {
        **made.figures(data.test.packed, seed=seed),
        "covered": drawn.covered,
        "best": drawn.best,
        "mean": drawn.mean,
        "mean cosine": drawn.mean_cosine,
        "std cosine": drawn.std_cosine,
        "frequencies": drawn.frequencies,
        "probe": probe,
        "told": told,
        "training": training,
        "fit": {"mean": fit.mean, "std": fit.std / setting.prior_std, "ks": fit.ks, "p": fit.p},
        "energy": [fit.energy, fit.energy_p],
        "codes": codes[:, : setting.latent] / setting.prior_std if seed == 0 and setting in (VAE, AAE) else None,
        "nearest": {"rows": learned[first.row[:, 0]].tolist(), "scores": first.score[:, 0].tolist()},
        "held out": held,
    }


def _probe(made: FingerprintSystem, data: Split, plan: Plan, seed: int) -> float:
    """Loss of a discriminator that is new and knows the codes of the training set: ln 2 if they are the prior's.

    On held-out codes. The model's own discriminator may be behind the encoder; this one has had nobody to fool it.
    """
    torch.manual_seed(seed)
    learned, _ = made.codes(data.train.packed, seed=seed)
    tested, _ = made.codes(data.test.packed, seed=seed + 1)
    scale = made.settings.prior_std
    judge_ = nn.Sequential(*layers([learned.shape[1], 64, 64, 8], nn.Tanh), nn.Linear(8, 1))
    adam = torch.optim.Adam(judge_.parameters(), 3e-3)
    for _ in range(plan.probe_steps):
        code = learned[torch.randint(len(learned), (256,))] / scale
        loss = discriminator_loss(judge_, code, torch.randn_like(code))
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
    judge_.eval()
    with torch.no_grad():
        return discriminator_loss(judge_, tested / scale, torch.randn_like(tested)).item()


if __name__ == "__main__":
    sys.exit(main())
