"""The metrics beside those of the benchmark's own package, molsets 0.3.1, where it is installed.

pip install --no-deps molsets==0.3.1 fcd_torch && pip install pandas scipy
"""

import contextlib
import gzip
import importlib
import importlib.util
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rdkit")
for package in ("moses", "fcd_torch", "pandas", "scipy"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

from rdkit import Chem, RDConfig  # noqa: E402

from fastnuggets.molecules import metrics  # noqa: E402
from fastnuggets.molecules.fingerprints import pack  # noqa: E402

NCI = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
# Of the first 3,000 training molecules against the package's stored statistics, by the package itself (RDKit 2026.09,
# NumPy 2.4, SciPy 1.17). FCD with SciPy's matrix root; the others to what was printed.
PUBLISHED = {
    "valid": 1,
    "unique@1000": 1,
    "unique@10000": 1,
    "FCD/Test": 6.378,
    "SNN/Test": 0.64993,
    "Frag/Test": 0.94129,
    "Scaf/Test": 0.72065,
    "FCD/TestSF": 7.213,
    "SNN/TestSF": 0.58189,
    "Frag/TestSF": 0.93620,
    "Scaf/TestSF": 0,
    "IntDiv": 0.85184,
    "IntDiv2": 0.84102,
    "Filters": 1,
    "logP": 0.16620,
    "SA": 0.27163,
    "QED": 0.01396,
    "weight": 13.519,
    "Novelty": 0,
}
DIGITS = {"FCD/Test": 3, "FCD/TestSF": 3, "weight": 3}


@pytest.fixture(scope="module")
def moses():
    """The package, which asks for what RDKit and pandas no longer have."""
    import pandas

    six, moves = types.ModuleType("rdkit.six"), types.ModuleType("rdkit.six.moves")
    six.iteritems, moves.cPickle, moves.xrange, six.moves = lambda given: iter(given.items()), pickle, range, moves
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "rdkit.six", six)
        patch.setitem(sys.modules, "rdkit.six.moves", moves)
        append = lambda self, other, sort: pandas.concat([self, other], sort=sort)  # noqa: E731
        patch.setattr(pandas.DataFrame, "append", append, raising=False)
        yield importlib.import_module("moses")


def data(moses) -> Path:
    return Path(moses.__file__).parent / "dataset" / "data"


def stored(moses, name: str) -> metrics.Statistics:
    """The statistics that come with the package."""
    with np.load(data(moses) / f"{name}_stats.npz", allow_pickle=True) as file:
        given = file["stats"].item()
    values = [np.asarray(given[name]["values"], np.float64) for name in ("logP", "SA", "QED", "weight")]
    count = len(values[0])
    return metrics.Statistics(
        count,
        np.arange(count, dtype=np.uint64),
        pack(np.asarray(given["SNN"]["fps"])),
        np.stack(values, 1),
        given["Frag"]["frag"],
        given["Scaf"]["scaf"],
        activations=metrics.Activations(count, given["FCD"]["mu"], given["FCD"]["sigma"]),
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_published_values(moses):
    with gzip.open(data(moses) / "train.csv.gz", "rt") as file:
        next(file)
        smiles = [line.split(",")[0].strip() for line, _ in zip(file, range(3000), strict=False)]
    found = metrics.evaluate(
        smiles, stored(moses, "test"), train=smiles, scaffold_reference=stored(moses, "test_scaffolds"), fcd=True
    ).named()
    print(found)
    assert {name: round(value, DIGITS.get(name, 5)) for name, value in found.items()} == PUBLISHED


@pytest.mark.filterwarnings("ignore")
def test_every_metric_on_other_molecules(moses, capsys):
    """Of NCI: salts, metals, large rings, duplicates, broken ones."""
    lines = [line.split()[0] for line in NCI.read_text().splitlines()]
    mols = [[mol for mol in map(Chem.MolFromSmiles, part) if mol] for part in (lines[300:900], lines[2000:2300])]
    reference, second = [[Chem.MolToSmiles(mol) for mol in part] for part in mols]
    generated = [*lines[700:1100], "C1CC", "", "N(C", *lines[4000:4200], *lines[700:750], "c1ccccc1c"]
    package = importlib.import_module("moses.metrics.metrics")
    with contextlib.redirect_stdout(sys.stderr):
        expected = package.get_all_metrics(generated, test=reference, test_scaffolds=second, train=reference)
    found = metrics.evaluate(
        generated, reference, train=reference, scaffold_reference=second, fcd=True, processes=0
    ).named()
    assert list(found) == [name for name in found if name in expected]
    assert set(found) == set(expected)
    with capsys.disabled():
        for name in found:
            print(f"\n{name:12} {expected[name]!r:24} {found[name]!r}", end="")
    for name, value in found.items():
        # FCD: SciPy's matrix root of a singular product, and a mean in float32. The similarities are float32 there.
        tolerance = 1e-4 if name.startswith("FCD") else 1e-6 if name[:3] in ("SNN", "Int") else 1e-12
        assert value == pytest.approx(float(expected[name]), rel=tolerance, abs=1e-12), name
