"""The systems that learn from grids: how atoms are drawn, found and counted, and the study that compares drawings."""

import io
import json

import numpy as np
import pytest
import torch

from fastnuggets import cli, demo_representations, report_representations
from fastnuggets.molecules import Molecules, conformers, read, save_table
from fastnuggets.molecules.boxes import boxed
from fastnuggets.molecules.matching import compare, recovered, voxel_atoms
from fastnuggets.ops import voxelize
from fastnuggets.systems import run
from fastnuggets.systems.base import Draw
from fastnuggets.systems.maccs_predictor import MaccsPredictorSettings, MaccsPredictorSystem
from fastnuggets.systems.molecule_grids import SCALE_POWER, Drawing, GridSettings, groups, turned
from fastnuggets.systems.ranking import rank
from fastnuggets.systems.wave_autoencoder import WaveAutoencoderSettings, WaveAutoencoderSystem

Chem = pytest.importorskip("rdkit.Chem")
metrics = pytest.importorskip("sklearn.metrics")
for package in ("pyarrow", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(package)

SMILES = (
    "CCO", "CC(=O)O", "c1ccccc1N", "CC(C)Cl", "CCS", "C1CCOC1", "NCC(=O)O", "FC(F)CO", "c1ccncc1", "CC#N", "OCC(O)CO",
    "CC(=O)NC",
)  # fmt: skip
SMALL = {"shape": 24, "batch_size": 4, "width": 8, "blocks": 1, "elements": "C,N,O,S,F+Cl"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A coordinate table, hydrogens included."""
    folder = tmp_path_factory.mktemp("molecules")
    path = write(folder / "molecules.smi", SMILES)
    molecules = Molecules.from_conformers(conformers(read(path), processes=0))
    save_table(folder / "molecules.parquet", molecules)
    return folder / "molecules.parquet"


def write(path, smiles):
    path.write_text("".join(f"{text} molecule{i}\n" for i, text in enumerate(smiles)))
    return path


def autoencoder(table, **settings):
    """A system with fresh weights, and its data."""
    chosen = WaveAutoencoderSettings(**{**SMALL, "latent": 4, "crop": 16, **settings})
    facts, data = WaveAutoencoderSystem.read(table, chosen, seed=0, progress=False)
    torch.manual_seed(0)
    return WaveAutoencoderSystem(chosen, facts), data


def predictor(table, **settings):
    chosen = MaccsPredictorSettings(**{**SMALL, **settings})
    facts, data = MaccsPredictorSystem.read(table, chosen, seed=0, progress=False)
    torch.manual_seed(0)
    return MaccsPredictorSystem(chosen, facts), data


class Copy(torch.nn.Module):
    """A network that has learned everything."""

    def __init__(self, network):
        super().__init__()
        self.weight = torch.nn.Parameter(network.scale)  # something that lies on a device

    def forward(self, grid):
        return grid


def perfect(system):
    system.model.network = Copy(system.model.network)
    system.model.moments[0] = 1 + 1e-6  # an error of 1e-3
    return system


# --- ranking ---


@pytest.mark.parametrize("ties", [False, True])
def test_areas_are_those_of_scikit_learn(ties):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((200, 6))
    scores = np.round(scores) if ties else scores
    truth = rng.random((200, 6)) < [0.02, 0.2, 0.5, 0.9, 0.0, 1.0]
    ranking = rank(torch.tensor(scores), torch.tensor(truth))
    assert ranking.varying.tolist() == [True] * 4 + [False] * 2
    for bit in range(4):
        assert ranking.roc_auc[bit] == pytest.approx(metrics.roc_auc_score(truth[:, bit], scores[:, bit]), abs=1e-12)
        expected = metrics.average_precision_score(truth[:, bit], scores[:, bit])
        assert ranking.average_precision[bit] == pytest.approx(expected, abs=1e-12)
    assert ranking.roc_auc[4:].isnan().all()
    for average in ("macro", "micro"):
        for name, function in (
            ("roc_auc", metrics.roc_auc_score),
            ("average_precision", metrics.average_precision_score),
        ):
            expected = function(truth[:, :4], scores[:, :4], average=average)
            assert getattr(ranking, f"{average}_{name}") == pytest.approx(expected, abs=1e-12)


def test_nothing_to_rank_is_an_error():
    with pytest.raises(ValueError, match="every bit is the same"):
        rank(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool))


# --- what a box can hold ---


def test_molecules_that_cannot_be_used_are_counted(tmp_path):
    path = write(tmp_path / "a.smi", ["CCCO", "OCCC", "CC.CC", "C[Si](C)C", "CCO", "not", "C" * 20, "OCCN"])
    found = boxed(path, ("C", "N", "O"), 5.0, optimize=False)
    assert list(found.molecules.smiles) == ["CCCO", "NCCO"]
    assert found.read == 8
    assert found.left_out == {
        "seen before": 1, "more than one part": 1, "another element": 1, "fewer than 4 heavy atoms": 1,
        "cannot be read": 1, "too large for the box": 1,
    }  # fmt: skip
    assert set(found.molecules.numbers.tolist()) == {6, 7, 8}
    torch.testing.assert_close(found.molecules.center(), torch.zeros(2, 3), atol=1e-5, rtol=0)


def test_a_table_gives_the_molecules_of_its_file(table):
    found = boxed(table, ("C", "N", "O", "S", "F", "Cl"), 6.0)
    assert found.embedded == 0
    again = boxed(table.with_suffix(".smi"), ("C", "N", "O", "S", "F", "Cl"), 6.0)
    assert list(found.molecules.smiles) == list(again.molecules.smiles)
    torch.testing.assert_close(found.molecules.coords, again.molecules.coords)


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        ([], "none of its 0 molecules can be used"),
        (["C[Si](C)C", "CC"], "1 another element, 1 fewer than 4 heavy atoms"),
        (["C" * 20], "1 too large for the box"),
        (["CCCO"], "one molecule is left"),
    ],
)
def test_files_of_no_use_say_why(tmp_path, smiles, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(write(tmp_path / "a.smi", smiles))


def test_keys_need_a_smiles(table, tmp_path):
    from fastnuggets.molecules import load_table

    molecules = load_table(table)
    save_table(
        tmp_path / "bare.parquet",
        Molecules(molecules.coords, molecules.numbers, molecules.ptr, molecules.names, [""] * len(molecules)),
    )
    with pytest.raises(ValueError, match="none of its 9 molecules has one"):
        predictor(tmp_path / "bare.parquet")


@pytest.mark.parametrize(
    "settings",
    [{"density": "box"}, {"shape": 22}, {"elements": "C,Xx"}, {"elements": "C,N+C"}, {"width": 0}, {"spacing": 0.01}],
)
def test_bad_settings_are_named(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=name if name != "spacing" else "no molecule fits"):
        GridSettings(**settings)
    with pytest.raises(ValueError, match="crop"):
        WaveAutoencoderSettings(crop=52)


# --- drawing and finding ---


def test_channels_and_their_scale(table):
    assert groups("C, N,F+Cl") == [["C"], ["N"], ["F", "Cl"]]
    drawing = Drawing(GridSettings(**SMALL | {"elements": "C,N,O,S,F+Cl,Br"}))
    molecules = boxed(table, drawing.elements, 5.0).molecules
    scale = torch.tensor(drawing.scale(molecules, 0)) ** (1 / SCALE_POWER)
    # Without poses, by the op itself: turning changes a channel's spread by less than the voxels' own chance.
    grid = voxelize(
        molecules.coords, drawing.channels(molecules), molecules.ptr, shape=24, num_channels=6, density="wave",
        sigma=1.0, omega=0.5,
    )  # fmt: skip
    spread = grid.std((0, 2, 3, 4))
    torch.testing.assert_close(scale[:5], spread[:5].clamp(min=0.1 * spread.max().item()), rtol=0.03, atol=0)
    assert spread[5] == 0 and scale[5] == pytest.approx(0.1 * scale.max().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("density", "sigma", "error"), [("wave", 1.0, 1e-3), ("gaussian", 0.5, 1e-3), ("nearest", 0, 0)]
)
def test_clean_grids_give_every_atom_back(table, density, sigma, error):
    drawing = Drawing(GridSettings(**SMALL, density=density, sigma=sigma))
    molecules = turned(boxed(table, drawing.elements, 5.0).molecules, 3, 0.25)
    found = drawing.find(drawing.still(molecules), torch.full((5,), error))
    truth = drawing.truth(molecules)
    assert recovered(found, truth).all()
    # A voxel's centre is up to 0.43 angstrom away, 0.25 on average over the voxel.
    assert compare(found, truth, 5)[-1].rmse < (0.29 if density == "nearest" else 1e-3)


def test_voxels_that_are_no_maximum_are_no_atoms():
    grid = torch.zeros(1, 1, 8, 8, 8)
    grid[0, 0, 2, 2, 2], grid[0, 0, 2, 2, 3], grid[0, 0, 5, 6, 7] = 0.9, 0.8, 0.6
    atoms = voxel_atoms(grid, 0.5)
    assert atoms.positions.tolist() == [[-0.75, -0.75, -0.75], [0.75, 1.25, 1.75]]
    assert len(voxel_atoms(grid, 0.5, 0.7).positions) == 1


def test_noise_sorts_the_kernels(table):
    """../spec: at 20 % the wave loses nothing, the wide Gaussian nearly everything; 12 small molecules here."""
    shares = {}
    for density, sigma in (("wave", 1.0), ("gaussian", 1.0)):
        drawing = Drawing(GridSettings(**SMALL, density=density, sigma=sigma))
        molecules = turned(boxed(table, drawing.elements, 5.0).molecules, 3, 0.25)
        grid = drawing.still(molecules)
        noisy = grid + 0.2 * torch.randn(grid.shape, generator=torch.Generator().manual_seed(0))
        shares[density] = (
            recovered(drawing.find(noisy, torch.full((5,), 0.2)), drawing.truth(molecules)).double().mean()
        )
    assert shares["wave"] == 1
    assert shares["gaussian"] < 0.6


def test_a_kernel_that_melts_bonds_is_warned_of(table):
    with pytest.warns(UserWarning, match="does not resolve atoms"):
        autoencoder(table, density="gaussian", sigma=1.5)


def test_a_network_that_knows_little_is_no_error():
    drawing = Drawing(GridSettings(**SMALL))
    grid = torch.randn(1, 5, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    assert len(drawing.find(grid, torch.full((5,), 0.01)).ptr) == 2


# --- the systems ---


@pytest.mark.parametrize("make", [autoencoder, predictor])
def test_a_step_follows_from_its_number_and_the_seed(table, make):
    system, data = make(table)
    system.model.eval()  # batch norm would remember

    def losses(seed, *steps):
        return [update.loss.item() for step in steps for update in system.updates(data, step, Draw(seed))]

    first = losses(0, 0, 1)
    assert losses(0, 0, 1) == first
    assert losses(0, 1, 0) == first[::-1]
    assert losses(1, 0) != first[:1]
    assert first[0] != first[1]
    shares = [next(system.updates(data, 0, Draw(0, rank, 2))).loss.item() for rank in range(2)]
    assert shares[0] != shares[1]


@pytest.mark.parametrize("density", ["wave", "gaussian", "nearest"])
@pytest.mark.parametrize("make", [autoencoder, predictor])
def test_a_short_training_lowers_the_loss(table, make, density):
    system, data = make(table, density=density, learning_rate=1e-2, shape=16)
    before = system.validate(data)["loss"]
    losses = demo_representations.learn(system, data, 30, 0, lambda: None)
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
    assert system.validate(data)["loss"] < before
    assert not system.model.training


def test_gain_and_error_are_those_of_the_voxels_with_atoms(table):
    system, _ = autoencoder(table)
    model = system.model
    assert model.gain.tolist() == [1.0] * 5 and model.error.tolist() == [1.0] * 5
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(2, 5, 8, 8, 8, generator=generator)
    grid[:, 3:, 4:] = 0.0
    grid[:, 4] = 0.0
    output = 0.4 * grid + 0.1 * torch.randn(grid.shape, generator=generator)
    output[grid == 0] = 9.0  # where nothing is, nothing is looked at
    model.track(output, grid, 0)
    for channel in range(4):
        seen = grid[:, channel].abs() > 0.05
        x, y = grid[:, channel][seen].double(), output[:, channel][seen].double()
        slope = np.linalg.lstsq(x[:, None].numpy(), y.numpy(), rcond=None)[0][0]
        assert model.gain[channel].item() == pytest.approx(slope, rel=1e-5)
        assert model.error[channel].item() == pytest.approx((y / slope - x).square().mean().sqrt().item(), rel=1e-4)
    assert model.gain[4] == 1 and model.error[4] == 1
    once = model.moments.clone()
    model.track(grid, grid, 100)
    expected = grid[:, 0][grid[:, 0].abs() > 0.05].square().mean()
    torch.testing.assert_close(model.moments[:, 0], 0.98 * once[:, 0] + 0.02 * expected)


def test_atoms_of_a_network_that_shrinks_them_come_back(table):
    """A third of an atom is less than `find_atoms` takes for one."""
    system, data = autoencoder(table)
    perfect(system).model.network.weight.data.fill_(1.0)
    system.model.network.forward = lambda grid: grid / 3
    assert not system.counted(data.test).recovered.any()
    system.model.moments[0], system.model.moments[1] = (1 + 1e-6) / 9, 1 / 3
    assert system.counted(data.test).recovered.all()


def test_caution_is_chosen_by_what_is_right(table, monkeypatch):
    system, data = autoencoder(table)
    perfect(system)
    generator = torch.Generator().manual_seed(0)
    system.model.network.forward = lambda grid: grid + 0.1 * torch.randn(grid.shape, generator=generator)
    monkeypatch.setattr("fastnuggets.systems.wave_autoencoder.CAUTIONS", (1e4, 100.0))
    system.choose_caution(data.train)
    assert system.model.caution == 100.0
    assert not system.counted(data.test, 1e4).found.positions.numel()


def test_molecules_come_back_as_sdf(table):
    """Through a perfect network: with hydrogens the bond orders too."""
    system, data = autoencoder(table, elements="C,N,O,S,F,Cl,H", tested=0.4)
    records = list(perfect(system).generate(100, seed=0))
    assert len(records) == len(data.test) == 4
    mols = list(Chem.ForwardSDMolSupplier(io.BytesIO("".join(f"{one}\n" for one in records).encode())))
    assert [mol.GetProp("_Name") for mol in mols] == list(data.test.names)
    for mol in mols:
        assert mol.GetProp("all atoms right") == "yes"
        assert mol.GetProp("bonds") == "bond orders"
        assert Chem.MolToSmiles(Chem.RemoveHs(mol)) == mol.GetProp("smiles")
    assert len(list(system.generate(2, seed=0, data=str(table)))) == 2
    with pytest.raises(ValueError, match="no such option"):
        next(system.generate(1, seed=0, temperature=1.0))
    system.facts["data"] = "/nowhere.smi"
    with pytest.raises(FileNotFoundError, match="not there any more"):
        next(system.generate(1, seed=0))


def test_figures_of_a_perfect_network(table):
    system, _ = autoencoder(table)
    figures = perfect(system).evaluate(table)
    assert figures["molecules"] == 9 and figures["molecules recovered"] == 1
    assert figures["precision"] == figures["F+Cl recall"] == 1
    assert figures["position error"] < 1e-3


def test_runs_of_both_from_the_command_line(table, tmp_path, monkeypatch):
    choose = WaveAutoencoderSystem.choose_caution

    def chosen(system, learned):
        choose(system, learned)
        assert 0 < len(learned) <= 16
        system.model.caution.fill_(1.25)

    monkeypatch.setattr(WaveAutoencoderSystem, "choose_caution", chosen)
    options = [
        "--shape",
        "24",
        "--width",
        "8",
        "--blocks",
        "1",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--tested",
        "0.3",
    ]
    for name in ("wave-autoencoder", "maccs-predictor"):
        out = tmp_path / name
        assert cli.main(["train", name, "--data", str(table), "--out", str(out), *options]) == 0
        assert "<img" in (out / "report.html").read_text() or "<svg" in (out / "report.html").read_text()
        assert cli.main(["evaluate", str(out), "--data", str(table), "--out", str(tmp_path / "f.json")]) == 0
        assert json.loads((tmp_path / "f.json").read_text())["molecules"] == 9
    sdf = tmp_path / "back.sdf"
    assert cli.main(["generate", str(tmp_path / "wave-autoencoder"), "-n", "3", "-o", str(sdf)]) == 0
    assert sdf.read_text().count("$$$$") == 3
    system = run.load(tmp_path / "wave-autoencoder")
    assert (system.model.gain[:3] != 1).all()  # as it is in the beginning: it is kept with the weights
    assert system.model.caution == 1.25


# --- the study ---

TINY = demo_representations.QUICK._replace(
    steps=2, key_steps=2, records=40, tested=6, chosen=2, noisy=2, width=4, latent=2, batch=2, key_blocks=1
)


def test_the_study_goes_on_from_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_representations, "QUICK", TINY)
    one_hot, *_, wave = demo_representations.LEARNED
    for module in (demo_representations, report_representations):
        monkeypatch.setattr(module, "LEARNED", (one_hot, wave))
        monkeypatch.setattr(module, "NOISY", (one_hot, wave))
    monkeypatch.setattr(report_representations, "WAVES", (wave,))
    calls, compute = [], demo_representations.learn_keys

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(demo_representations, "learn_keys", interrupted)
        assert cli.main(["demo", "representations", "--quick", "--out", str(tmp_path)]) == cli.INTERRUPTED
    results, write = [], report_representations.write
    monkeypatch.setattr(report_representations, "write", lambda r, out: results.append(r) or write(r, out))
    assert cli.main(["demo", "representations", "--quick", "--out", str(tmp_path)]) == 0
    (result,) = results
    assert (result.reused, result.parts) == (2 + 3, 2 + 2 * 2 * 2)
    page = (tmp_path / "representations.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and page.count("<img") == 1
    assert "http" not in page.replace("http://www.w3.org/", "")
    figures = json.loads((tmp_path / "representations.json").read_text())
    assert figures["atoms"][wave.name][1]["scores"] == result.atoms[wave.name][1]["scores"]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"representations-{name}.png" for name in ("drawings", "atoms", "noise")
    }
