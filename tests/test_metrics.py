"""The MOSES metrics: each by hand on a few molecules, the statistics they are made of, and the command."""

import csv
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from fastnuggets import cli

pytest.importorskip("rdkit")

from rdkit import Chem, RDConfig
from rdkit.Chem import QED, Crippen, Descriptors, FilterCatalog

from fastnuggets import molecules as fm
from fastnuggets.molecules import _describe, descriptions, metrics, workers
from fastnuggets.molecules.descriptions import Statistics, describe
from fastnuggets.molecules.fingerprints import fingerprints, pack

NCI = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
BIPHENYL, AMIDE = "c1ccc(-c2ccccc2)cc1", "CCNC(=O)c1ccccc1"


def nci(count: int, start: int = 0) -> list[str]:
    return [line.split()[0] for line in NCI.read_text().splitlines()[start : start + count]]


def rows(*bits):
    """Packed rows [N, 128] with the named bits set."""
    table = np.zeros((len(bits), 1024), np.uint8)
    for row, names in zip(table, bits, strict=True):
        row[list(names)] = 1
    return pack(table)


def same(a: Statistics, b: Statistics) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("keys", "fingerprints", "properties"))
    words = ("total", "passing", "crashed", "fragments", "scaffolds", "sample")
    moments = (a.activations is None) == (b.activations is None) and (
        a.activations is None or all(np.array_equal(x, y) for x, y in zip(a.activations, b.activations, strict=True))
    )
    return arrays and moments and all(getattr(a, name) == getattr(b, name) for name in words)


def by_length(smiles):
    """A network of two outputs."""
    return np.array([[len(text), text.count("C")] for text in smiles], np.float32)


# ---- the metrics, one by one


def test_unique_counts_among_the_first_k():
    keys = np.array([5, 5, 7, 5, 9, 9], np.uint64)
    assert metrics.unique(keys, 3) == 2 / 3
    assert metrics.unique(keys, 1000) == 3 / 6
    assert math.isnan(metrics.unique(keys[:0], 10))


def test_novelty_is_of_distinct_molecules():
    keys, train = np.array([1, 1, 2, 3], np.uint64), np.array([3, 4, 4], np.uint64)
    assert metrics.novelty(keys, train) == 2 / 3
    assert math.isnan(metrics.novelty(keys[:0], train))


def test_the_nearest_of_the_reference_is_counted():
    ours, theirs = rows({0, 1}, {2, 3, 4}), rows({1, 2}, {0, 1, 5}, {3, 4})
    # {0, 1}: 1/3, 2/3, 0; {2, 3, 4}: 1/4, 0, 2/3
    assert metrics.nearest_similarity(ours, theirs) == pytest.approx(2 / 3, abs=1e-15)
    assert metrics.nearest_similarity(ours, theirs[:2]) == pytest.approx((2 / 3 + 1 / 4) / 2, abs=1e-15)
    assert math.isnan(metrics.nearest_similarity(ours[:0], theirs))
    assert math.isnan(metrics.nearest_similarity(ours, theirs[:0]))


def test_internal_diversity_counts_a_molecule_with_itself_and_takes_its_own_root():
    found = metrics.internal_diversity(rows({0, 1}, {1, 2}, {7}))
    third = 1 / 3
    means = [(1 + third) / 3, (1 + third) / 3, 1 / 3]
    roots = [math.sqrt((1 + third**2) / 3)] * 2 + [math.sqrt(1 / 3)]
    assert found == pytest.approx((1 - sum(means) / 3, 1 - sum(roots) / 3), abs=1e-7)  # similarities are float32
    assert metrics.internal_diversity(rows(())) == (0, 0)
    assert all(map(math.isnan, metrics.internal_diversity(rows())))


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_blocks_do_not_show(monkeypatch, size):
    bits = np.random.default_rng(0).random((7, 1024)) < 0.05
    common, counts = bits.astype(float) @ bits.T, bits.sum(1)
    similar = common / (counts[:, None] + counts - common)
    monkeypatch.setattr(metrics, "_ROWS", size)
    expected = 1 - similar.mean(), 1 - np.sqrt((similar**2).mean(1)).mean()
    assert metrics.internal_diversity(pack(bits)) == pytest.approx(expected, abs=1e-7)
    assert metrics.nearest_similarity(pack(bits[:3]), pack(bits[3:])) == pytest.approx(
        similar[:3, 3:].max(1).mean(), abs=1e-15
    )


def test_the_cosine_of_counts():
    assert metrics.count_similarity({"a": 1, "b": 2}, {"b": 3, "c": 1}) == pytest.approx(6 / math.sqrt(5 * 10))
    assert metrics.count_similarity({"a": 2}, {"b": 1}) == 0
    assert math.isnan(metrics.count_similarity({}, {"b": 1}))


def test_the_wasserstein_distance():
    assert metrics.wasserstein(np.array([0.0, 1, 3]), np.array([5.0, 6, 8])) == pytest.approx(5)
    assert metrics.wasserstein(np.array([0.0]), np.array([0.0, 1, 1, 4])) == pytest.approx(6 / 4)
    assert metrics.wasserstein(np.array([2.0, 2]), np.array([2.0])) == 0
    assert math.isnan(metrics.wasserstein(np.array([]), np.array([2.0])))
    generator = np.random.default_rng(0)
    values, others = generator.normal(size=300), generator.normal(1, 2, size=300)
    expected = np.abs(np.sort(values) - np.sort(others)).mean()  # of two samples of one size
    assert metrics.wasserstein(values, others) == pytest.approx(expected, rel=1e-12)


def test_the_frechet_distance():
    one = metrics.Activations(9, np.array([0.0, 3]), np.diag([1.0, 4]))
    two = metrics.Activations(9, np.array([0.0, 0]), np.diag([9.0, 16]))
    assert metrics.frechet(one, two) == pytest.approx(9 + (1 - 3) ** 2 + (2 - 4) ** 2)
    generator = np.random.default_rng(0)
    few = [generator.normal(size=(4, 20)) for _ in range(2)]  # covariances of rank 3
    moments = [metrics.Activations(4, x.mean(0), np.cov(x.T)) for x in few]
    assert metrics.frechet(moments[0], moments[0]) == pytest.approx(0, abs=1e-6)
    # The trace of the root of a product, from its eigenvalues, without a symmetric form.
    product = np.linalg.eigvals(moments[0].covariance @ moments[1].covariance)
    trace = np.sqrt(np.maximum(product.real, 0)).sum()
    shift = moments[0].mean - moments[1].mean
    whole = shift @ shift + sum(np.trace(m.covariance) for m in moments) - 2 * trace
    assert metrics.frechet(*moments) == pytest.approx(whole, abs=1e-6)


# ---- what is worked out for a molecule


def test_statistics_of_a_few_molecules():
    found = describe(["CCO", "C1CC", "OCC", "", BIPHENYL, "Cc1ccccc1", "[Na+].[Cl-]", "\x00\udcff"], filters=[])
    assert (found.total, found.valid, found.crashed) == (8, 5, 0)
    assert found.keys[0] == found.keys[1]
    assert len(np.unique(found.keys)) == 4
    assert found.passing == 4  # the salt is charged
    assert found.scaffolds == {BIPHENYL: 1}  # one ring is not enough
    assert found.fragments["CCO"] == 2
    assert found.fragments["[Na+]"] == found.fragments["[Cl-]"] == 1
    assert found.fragments["[16*]c1ccccc1"] == 2
    assert sorted(set(found.sample)) == sorted(["CCO", BIPHENYL, "Cc1ccccc1", "[Cl-].[Na+]"])
    expected = fingerprints(["CCO", "OCC", BIPHENYL, "Cc1ccccc1", "[Na+].[Cl-]"], "morgan", processes=0).packed
    assert np.array_equal(found.fingerprints, expected)


def test_brics_bonds_are_cut():
    assert describe([AMIDE]).fragments == {"[4*]CC": 1, "[5*]N[5*]": 1, "[1*]C([6*])=O": 1, "[16*]c1ccccc1": 1}


def test_properties_are_those_of_rdkit():
    from rdkit.Contrib.SA_Score import sascorer

    smiles = nci(40, 900)
    found = describe(smiles, processes=0).properties
    for text, values in zip(smiles, found, strict=True):
        mol = Chem.MolFromSmiles(Chem.CanonSmiles(text))
        expected = (Crippen.MolLogP(mol), sascorer.calculateScore(mol), QED.qed(mol), Descriptors.MolWt(mol))
        assert tuple(values) == expected


def test_a_molecule_without_a_property_is_left_out_of_the_distances(monkeypatch):
    monkeypatch.setattr(QED, "qed", lambda mol, **_: math.log(0))
    found = describe(["CCO"], processes=0)
    monkeypatch.undo()
    assert np.isnan(found.properties).all()
    other = describe(["CCO"], processes=0)
    result = metrics.compare(found, other)
    assert math.isnan(result.qed)
    assert result.frag == 1
    assert "generated: 1 molecules have no logP, SA, QED or weight and are left out of these" in result.notes


@pytest.mark.parametrize(
    ("smiles", "passes"),
    [
        ("CCO", True),
        ("C[C@H](N)C(=O)O", True),
        ("[13CH3]CO", True),
        ("C1CCCCCC1", True),
        ("C1CCCCCCC1", False),  # a ring of eight
        ("CC(=O)[O-]", False),
        ("C[N+](C)(C)CC(=O)[O-]", False),  # charged in parts
        ("CCI", False),
        ("C[Si](C)(C)C", False),
        ("O=C1NC(=S)SC1=Cc1ccccc1", False),  # a rhodanine, of PAINS
        ("CCBr", True),
    ],
)
def test_filters(smiles, passes):
    assert describe([smiles], filters=()).passing == passes


def test_the_filters_of_a_table_see_hydrogens(tmp_path):
    path = tmp_path / "mcf.csv"
    path.write_text('names,smarts\nA,"[H]C([H])([#6])[F,Cl,Br,I]"\nB,[#16]~[#16]\nC,\n')
    table = metrics.read_filters(path)
    assert len(table) == 2
    found = describe(["CCBr", "CC(C)Br", "CSSC", "CCO"], filters=table)
    assert found.passing == 2
    path.write_text("names,patterns\nA,C\n")
    with pytest.raises(ValueError, match="expected a table with a column smarts"):
        metrics.read_filters(path)
    with pytest.raises(ValueError, match=r"filters: RDKit cannot read 'C\(' as SMARTS"):
        describe(["C"], filters=["C("])


def test_pains_are_those_of_rdkits_catalogue():
    parameters = FilterCatalog.FilterCatalogParams()
    parameters.AddCatalog(FilterCatalog.FilterCatalogParams.FilterCatalogs.PAINS)
    catalogue = FilterCatalog.FilterCatalog(parameters)
    mols = [mol for mol in map(Chem.MolFromSmiles, nci(700, 2000)) if mol]
    expected = [catalogue.HasMatch(mol) for mol in mols]
    assert sum(expected) > 20
    assert [_describe._is_pains(mol) for mol in mols] == expected


def test_nothing_depends_on_how_a_smiles_is_written():
    smiles = nci(30, 1200)
    others = [Chem.MolToSmiles(Chem.MolFromSmiles(text), doRandom=True) for text in smiles]
    assert others != smiles
    assert same(describe(smiles, filters=(), processes=0), describe(others, filters=(), processes=0))


# ---- many molecules


def test_the_number_of_processes_does_not_show(monkeypatch):
    monkeypatch.setattr(descriptions, "_BLOCK", 32)
    smiles = [*nci(80), "C1CC", *nci(20)]
    one, *others = (describe(iter(smiles), filters=("[Br]",), embed=by_length, processes=n) for n in (0, 1, 2))
    assert (one.total, one.valid, len(one.sample)) == (101, 100, 48)
    assert all(same(one, other) for other in others)
    activations = by_length([Chem.CanonSmiles(text) for text in smiles if text != "C1CC"]).astype(np.float64)
    assert one.activations.count == 100
    assert one.activations.mean == pytest.approx(activations.mean(0), rel=1e-12)
    assert one.activations.covariance == pytest.approx(np.cov(activations.T), rel=1e-12)


def test_only_names_are_worked_out_for_a_training_set():
    found = describe(["CCO", "C1CC", "C"], names_only=True)
    assert np.array_equal(found.keys, describe(["OCC", "C"]).keys)
    assert found.total == 3
    assert not len(found.fingerprints) and not found.fragments and found.passing is None
    with pytest.raises(ValueError, match="reference: these are statistics of names only"):
        metrics.compare(found, found)


def test_a_smiles_that_kills_its_process_counts_as_broken(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(_describe.__file__).parent)!r})\n"
        "import _describe\n"
        "def describe(smiles, *more):\n"
        "    return os._exit(3) if 'CCCF' in smiles else _describe.describe(smiles, *more)\n"
    )
    smiles = ["CCO", "CCCF", BIPHENYL]
    with monkeypatch.context() as patch:
        patch.setattr(_describe, "__file__", str(script))
        found = describe(smiles, filters=(), processes=1)
    assert (found.total, found.valid, found.crashed) == (3, 2, 1)
    expected = describe([text for text in smiles if text != "CCCF"], filters=(), processes=0)
    assert np.array_equal(found.keys, expected.keys)
    assert (found.fragments, found.scaffolds, found.passing) == (expected.fragments, expected.scaffolds, 2)
    notes = metrics.compare(found, expected).notes
    assert "1 molecules counted as broken, as a process died over them" in notes


def test_an_interruption_ends_the_processes(monkeypatch):
    started = []
    answer = workers._Process.answer
    monkeypatch.setattr(workers._Process, "answer", lambda self: started.append(self) or answer(self))
    monkeypatch.setattr(descriptions, "_BLOCK", 2)

    def stream():
        yield from ["CCO"] * 20
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        describe(stream(), processes=1)
    assert started
    assert all(process.popen.returncode is not None for process in started)


def test_statistics_come_back_from_a_file(tmp_path, monkeypatch):
    path = tmp_path / "s.npz"
    for options in ({}, {"filters": (), "embed": by_length}, {"names_only": True}):
        made = describe(["CCO", "C1CC", BIPHENYL], **options)
        made.save(path)
        assert same(made, Statistics.load(path))
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]
    monkeypatch.setattr("rdkit.__version__", "1.0")
    with pytest.warns(UserWarning, match=r"was made by RDKit 20.*, this is 1\.0"):
        Statistics.load(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="not statistics, or damaged"):
        Statistics.load(path)
    np.savez(path, meta=np.zeros(3))
    with pytest.raises(ValueError, match="not statistics, or damaged"):
        Statistics.load(path)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "none.npz")


# ---- all together


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_set_against_itself():
    smiles = [*nci(30), BIPHENYL]
    found = metrics.evaluate(
        smiles, smiles, train=smiles, scaffold_reference=smiles, filters=(), fcd=by_length, processes=0
    )
    ones = (found.valid, found.snn, found.frag, found.scaf, found.snn_scaffold, found.frag_scaffold)
    assert ones == pytest.approx((1,) * 6, abs=1e-12)
    assert (found.novelty, found.logp, found.sa, found.qed, found.weight) == (0,) * 5
    assert (found.fcd, found.fcd_scaffold) == pytest.approx((0, 0), abs=1e-6)
    assert found.unique_1k == found.unique_10k == len(set(map(Chem.CanonSmiles, smiles))) / len(smiles)
    assert list(found.named()) == list(metrics._NAMES.values())
    without = metrics.evaluate(smiles[:5], smiles, filters=())
    assert not {"Novelty", "FCD/Test", "FCD/TestSF", "SNN/TestSF"} & set(without.named())


def test_small_sets_are_warned_of():
    few, more = ["CCO", BIPHENYL, "C1CC"], [AMIDE, BIPHENYL, "CCCC", "N("]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = metrics.evaluate(few, more, filters=(), fcd=by_length, train=["C", "C("], similar_at_most=1)
    assert [str(warning.message) for warning in caught] == list(found.notes)
    assert found.notes == (
        "unique@1000 is of 2 molecules: there are no more",
        "unique@10000 is of 2 molecules: there are no more",
        "2 molecules are few: MOSES compares 30,000, and most metrics depend on their number",
        "SNN and IntDiv are those of 1 molecules of 2, at random",
        "reference: 1 of 4 molecules are broken and left out",
        "train: 1 of 2 molecules are broken and left out",
        "FCD of 2 molecules is too high by about 6.5e+02; compare it with none of another number of molecules",
        metrics.NO_FILTERS,
    )
    assert found.int_div == pytest.approx(0, abs=1e-7)


def test_ten_thousand_molecules_need_no_warning_of_uniqueness():
    one = describe([BIPHENYL])
    many = Statistics(
        10_000,
        np.arange(10_000, dtype=np.uint64),
        np.repeat(one.fingerprints, 10_000, 0)[:64],
        np.repeat(one.properties, 10_000, 0),
        one.fragments,
        one.scaffolds,
    )
    assert list(metrics._notes(many, one, None, None, 10_000)) == []


def test_a_set_without_a_valid_molecule_has_no_metrics_but_that():
    with pytest.warns(UserWarning, match="there is no valid molecule"):
        found = metrics.evaluate(["C1CC", ""], ["CCO"], filters=("C",), train=["C"], fcd=by_length)
    assert found.named() == {"valid": 0}
    assert found.molecules == 2


def test_a_reference_without_rings_has_no_scaffolds():
    found = metrics.compare(describe([BIPHENYL]), describe(["CCO"]))
    assert math.isnan(found.scaf)
    assert found.frag == 0
    assert "Scaf is not defined: no molecule of reference has a scaffold of two rings" in found.notes


def test_sets_without_molecules_are_errors():
    good, bad = describe(["CCO"]), describe(["C1CC"])
    with pytest.raises(ValueError, match="generated: there are no molecules"):
        metrics.evaluate([], ["CCO"], filters=())
    for name in ("reference", "train", "scaffold_reference"):
        with pytest.raises(ValueError, match=f"{name}: there is no molecule that RDKit can read"):
            metrics.compare(good, **{"reference": good, name: bad})
    with pytest.raises(ValueError, match="processes: expected 0 or more, got -1"):
        describe(["C"], processes=-1)


def test_a_reference_without_activations_is_told():
    found = metrics.compare(describe(["CCO", "CC"], embed=by_length), describe(["CCO"]))
    assert math.isnan(found.fcd)
    assert "FCD is not computed: the statistics of the reference were made without it" in found.notes


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fcd_torch", None)
    with pytest.raises(ImportError, match=r"fcd_torch is not installed: pip install 'fastnuggets\[fcd\]'"):
        metrics.evaluate(["C"], ["C"], fcd=True)


def test_smiles_are_read_as_they_stand(tmp_path):
    path = tmp_path / "x.smi"
    path.write_text("smiles name\nOCC a\nC1CC\n\n  N(\n")
    assert list(fm.read_smiles(path)) == ["OCC", "C1CC", "N("]
    path = tmp_path / "x.csv"
    path.write_text("id,made\n1,OCC\n2,\n3,C1CC\n")
    assert list(fm.read_smiles(path, column="made")) == ["OCC", "", "C1CC"]
    path = tmp_path / "x.sdf"
    path.write_text(Chem.MolToMolBlock(Chem.MolFromSmiles("OCC")) + "$$$$\nrubbish\n$$$$\n")
    assert list(fm.read_smiles(path)) == ["CCO", ""]
    with pytest.raises(FileNotFoundError):
        fm.read_smiles(tmp_path / "none.smi")


# ---- the command


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "installed_filters", lambda: ())
    Path("gen.smi").write_text("".join(f"{text}\n" for text in [*nci(20, 40), "C1CC", BIPHENYL]))
    with open("ref.csv", "w", newline="") as file:
        csv.writer(file).writerows([("SMILES", "SPLIT"), *((text, "test") for text in [*nci(25, 40), "N("])])
    return tmp_path


def run(*arguments: object) -> int:
    return cli.main(["metrics", *map(str, arguments), "--processes", "0"])


def test_the_command_prints_a_table_and_writes_a_page(files, capsys):
    pytest.importorskip("matplotlib")
    assert (
        run("gen.smi", "--reference", "ref.csv", "--train", "ref.csv", "--save-reference", "r.npz", "--out", "d") == 0
    )
    out, err = capsys.readouterr()
    table = dict(line.split(None, 1) for line in out.splitlines() if "/" not in line.split()[0] or "Test" in line)
    assert table["molecules"] == "22"
    assert table["valid"] == "0.95455"
    assert "reference: 1 of 26 molecules are broken and left out" in err
    assert "MCF" in err
    found = json.loads(Path("d/metrics.json").read_text())
    assert found["molecules"] == {"generated": 22, "valid": 21, "reference": 25}
    assert found["metrics"]["valid"] == 21 / 22
    assert float(table["SNN/Test"]) == pytest.approx(found["metrics"]["SNN/Test"], rel=1e-4)
    page = Path("d/metrics.html").read_text()
    assert page.count("<figure") >= 21 and "$" not in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://www.rdkit.org", "")
    assert run("gen.smi", "--reference", "r.npz", "--train", "r.npz") == 0
    assert capsys.readouterr().out.splitlines() == out.splitlines()[:-1]


def test_a_fragment_that_is_no_molecule_is_drawn():
    from fastnuggets.report_metrics import _drawing

    assert _drawing("[16*]c1cccc1").count("<path") > 4
    assert "stroke-dasharray" not in _drawing("c1ccccc1")  # aromatic bonds are drawn as single and double ones


def test_the_page_of_nothing_valid(files, capsys):
    pytest.importorskip("matplotlib")
    Path("bad.smi").write_text("C1CC\n")
    assert run("bad.smi", "--reference", "ref.csv", "--out", "d") == 0
    assert json.loads(Path("d/metrics.json").read_text())["metrics"] == {"valid": 0}
    assert "there is no valid molecule" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("none.smi", "--reference", "ref.csv"), 1, "No such file or directory: none.smi"),
        (("gen.smi", "--reference", "none.npz"), 1, "No such file or directory"),
        (("gen.smi", "--reference", "gen.npz"), 1, "gen.npz: not statistics, or damaged"),
        (("empty.smi", "--reference", "ref.csv"), 1, "generated: there are no molecules"),
        (("gen.smi", "--reference", "empty.smi"), 1, "reference: there is no molecule that RDKit can read"),
        (("gen.smi", "--reference", "ref.csv", "--mcf", "ref.csv"), 1, "expected a table with a column smarts"),
        (("gen.smi", "--reference", "ref.csv", "--save-reference", "r.txt"), 2, "must end in .npz"),
        (("gen.smi", "--reference", "ref.csv", "--column", "X"), 1, "no column is called 'X'"),
    ],
)
def test_bad_input_is_an_error_of_one_line(files, capsys, arguments, code, said):
    Path("empty.smi").touch()
    Path("gen.npz").write_text("no archive")
    assert run(*arguments) == code
    err = capsys.readouterr().err.strip()
    assert said in err and "\n" not in err
