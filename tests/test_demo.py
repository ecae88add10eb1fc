import base64
import io
import json
import math
import re
import signal
from html.parser import HTMLParser

import pytest
import torch

from fastnuggets import cli, demo, report
from fastnuggets.molecules import Molecules
from fastnuggets.molecules.boxes import SMALLEST
from fastnuggets.molecules.matching import match, sorted_atoms
from fastnuggets.ops.inverse import Atoms
from fastnuggets.training import load_checkpoint

for package in ("rdkit", "pyarrow", "tqdm", "matplotlib", "skimage"):
    pytest.importorskip(package)

TINY = demo.Plan(records=60, steps=6, batch=2, width=8, latent=4, blocks=1, tested=4, shown=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(demo, "_rate", lambda function, count: float(count))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with a demo in it, and its result."""
    out, results, write = tmp_path_factory.mktemp("demo"), [], report.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK", TINY)
        patch.setattr(demo, "_rate", lambda function, count: float(count))
        patch.setattr(report, "write", lambda result, out: results.append(result) or write(result, out))
        assert cli.main(["demo", "--quick", "--out", str(out)]) == 0
    return out, results[0]


@pytest.fixture
def finished(done):
    return done[0]


@pytest.fixture
def result(done):
    return done[1]


def picture(png):
    """[H, W, 4]"""
    from matplotlib.image import imread

    return imread(io.BytesIO(png))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self.rows, self.in_cell, self.is_data = [], "", [], False, False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.is_data = attributes.get("id") == "data"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.in_cell = tag in ("td", "th") or (self.in_cell and tag == "b")

    def handle_endtag(self, tag):
        self.is_data = False
        self.in_cell = self.in_cell and tag == "b"

    def handle_data(self, text):
        if self.is_data:
            self.data += text
        if self.in_cell:
            self.rows[-1][-1] += text


@pytest.fixture(scope="module")
def text(done):
    return (done[0] / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def without(keys, value):
    """Tensors as lists, and nothing under these keys: what was timed differs each time."""
    if isinstance(value, dict):
        return {key: without(keys, item) for key, item in value.items() if key not in keys}
    if isinstance(value, list):
        return [without(keys, item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def assert_loads_nothing(page, text, *tags):
    """Of the network; `tags` must not be there either."""
    for tag, attributes in page.tags:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            assert re.match(r"data:|#|$", attributes.get(name) or ""), (tag, attributes)
    assert not {"link", "iframe", "object", "embed", "base", *tags} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\((?!['\"]?#)|@import|fetch\(|XMLHttpRequest|import\(", text)
    # Names of XML namespaces are no addresses.
    assert set(re.findall(r"https?://[^\s\"'<)]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\$\w", text)


def test_page_loads_nothing(page, text):
    assert_loads_nothing(page, text)


def test_page_has_its_pictures(page):
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2
    for attributes in pictures:
        assert attributes["alt"]
        pixels = picture(base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,")))
        assert pixels.shape[1] >= 300 * TINY.shown
        assert (pixels[..., 3] > 0.5).mean() > 0.001
    assert sum(tag == "svg" for tag, _ in page.tags) == 2


def test_preview_is_a_picture(finished):
    pixels = picture((finished / "preview.png").read_bytes())
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.01


def test_viewer_has_the_molecules(page):
    molecules = json.loads(page.data)
    assert len(molecules) == TINY.shown
    for molecule in molecules:
        before = molecule["before"]
        assert len(before["atoms"]) > SMALLEST - 1
        assert len(before["bonds"]) >= len(before["atoms"]) - 1  # in one piece
        points, faces, kinds = (
            torch.frombuffer(bytearray(base64.b64decode(before[key])), dtype=dtype)
            for key, dtype in (("points", torch.int16), ("faces", torch.uint16), ("kinds", torch.int8))
        )
        assert len(faces) == 3 * len(kinds) > 100
        assert faces.int().max() == len(points) / 3 - 1
        assert kinds.unique()[0] == -1
        missed = sum(not atom[4] for atom in before["atoms"])
        assert len(molecule["after"]["missed"]) == missed


def test_tables_say_what_was_measured(page, result):
    rows = {row[0]: row[1:] for row in page.rows if row}
    atoms = len(result.data.test.numbers)
    assert rows["all"][:3] == [str(value) for value in result.scores["wave"]["autoencoder"][-1][:3]]
    assert rows["all"][0] == str(atoms)
    assert rows["wave, clean"][:2] == ["100.0", "100.0"]
    assert {"one-hot, 40% noise", "Gaussian, wide, 10% noise", "wave, autoencoder"} <= rows.keys()


def test_clean_grids_give_all_atoms_back(result):
    scores = result.scores
    for name in ("one-hot", "Gaussian, narrow", "wave"):
        every = scores[name]["clean"][-1]
        assert every.precision == every.recall == 1.0
    assert scores["wave"]["clean"][-1].rmse < 1e-3
    # Uniform over a voxel of half an angstrom is 0.25 in three dimensions.
    assert 0.2 < scores["one-hot"]["clean"][-1].rmse < 0.3


def test_ctrl_c_is_gone_on_from_to_the_same_weights(finished, tmp_path, monkeypatch, capsys):
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return channel_loss(*arguments)

    channel_loss = demo.channel_loss
    monkeypatch.setattr(demo, "channel_loss", interrupted)
    command = ["demo", "--quick", "--out", str(tmp_path)]
    assert cli.main(command) == 130
    assert "checkpoint.pt is kept" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "checkpoint.pt").step == 3
    assert not (tmp_path / "report.html").exists()
    assert cli.main([*command, "--resume"]) == 0
    assert "3 of 6 steps" in capsys.readouterr().err
    assert len(calls) == 6
    whole, parts = (load_checkpoint(folder / "checkpoint.pt") for folder in (finished, tmp_path))
    assert all(torch.equal(whole.model[key], parts.model[key]) for key in whole.model)


def test_resume_without_a_checkpoint_fails(finished, tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--resume", "--out", str(tmp_path)]) == 1
    assert "no checkpoint to resume" in capsys.readouterr().err


def test_other_settings_start_anew_or_are_refused(finished, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
    plan = TINY._replace(steps=1)
    with pytest.raises(ValueError, match="another steps"):
        demo.run(None, tmp_path, plan, restart=False)
    assert demo.run(None, tmp_path, plan).training.step == 1


def test_input_with_too_few_molecules_is_named(tmp_path, capsys):
    source = tmp_path / "few.smi"
    source.write_text("CCCCO a\nCCCCO b\nnonsense c\nCC d\nCCCC.Cl e\nCCC[Si] f\nCCCCN g\n")
    assert cli.main(["demo", "--quick", "--input", str(source), "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "few.smi: 2 molecules are left, 8 are needed" in message
    for reason in ("'seen before': 1", "'cannot be read': 1", "'more than one part': 1", "'another element': 1"):
        assert reason in message


def atoms(rows, count):
    """(molecule, channel, x) -> Atoms."""
    molecule, channel, x = (torch.tensor(values) for values in zip(*rows, strict=True))
    positions = torch.stack([x.float(), torch.zeros(len(x)), torch.zeros(len(x))], 1)
    return sorted_atoms(positions, channel, molecule, count)


def test_scores_count_each_atom_once_by_molecule_and_element():
    truth = atoms([(0, 0, 0.0), (0, 0, 1.0), (0, 1, 2.0), (1, 0, 0.0)], 2)
    # near, nearer to the same atom, another element, too far, another molecule's place
    found = atoms([(0, 0, 0.3), (0, 0, -0.1), (0, 2, 2.0), (1, 0, 0.6), (1, 0, 1.0)], 2)
    assert match(found, truth)[0].tolist() == [-1, 0, -1, -1, -1]
    scores = demo.compare(found, truth)
    assert scores[0][:3] == (3, 4, 1)
    assert scores[2][:3] == (0, 1, 0)
    assert scores[-1][:3] == (4, 5, 1)
    assert scores[-1].precision == 0.2
    assert scores[-1].recall == 0.25
    assert scores[-1].rmse == pytest.approx(0.1)
    assert math.isnan(scores[2].recall)
    assert math.isnan(scores[1].precision)


def test_no_atom_found_is_no_error():
    truth = atoms([(0, 0, 0.0)], 1)
    none = Atoms(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.tensor([0, 0]), None)
    assert demo.compare(none, truth)[-1][:3] == (1, 0, 0)


def test_rotations_are_rotations():
    turns = demo.random_rotations(500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(500, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(500), atol=1e-5, rtol=0)
    assert turns.mean(0).abs().max() < 0.1  # 500 entries of standard deviation 0.58: 0.026 each


def test_finer_volume_is_the_grid_at_half_the_spacing():
    molecule = Molecules(
        torch.tensor([[0.0, 0, 0], [1.4, 0.3, -0.2], [-1.1, 0.9, 0.4]]),
        torch.tensor([6, 6, 6], dtype=torch.uint8),
        torch.tensor([0, 3]),
        ["a"],
        [""],
    )
    pose = demo.Pose(torch.eye(3)[None], torch.tensor([[0.1, 0.2, -0.3]]))
    coarse = demo.draw(molecule, demo.WAVE, 32, pose)[0, 0]
    fine = demo.voxelize(
        molecule.coords, demo.channels(molecule), shape=64, spacing=0.25, num_channels=1, density="wave", sigma=1.0,
        omega=0.5, **pose._asdict(),
    )[0, 0]  # fmt: skip
    # What (1.0, 0.5) has above the coarse grid's band: 0.004 of the peak, measured.
    assert (report._finer(coarse) - fine).abs().max() < 0.01


def test_rendering_shows_an_atom_where_it_is():
    position, channel = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([2])
    grid = demo.voxelize(position, channel, shape=32, num_channels=5, density="wave", sigma=1.0, omega=0.5)[0]
    volumes = report._volumes(grid, position, channel)
    pixels = report._render(volumes, torch.eye(3).numpy(), (6.0, 3.0, 3.0), 120)
    assert pixels.shape == (60, 120, 4)
    row, column = (int(value) for value in (60 * (3 - 1) / 6, 120 * (6 + 2) / 12))
    red, green, blue, alpha = pixels[row, column]
    assert alpha > 0.95
    assert red > 1.5 * max(green, blue)  # oxygen
    assert 0.05 < pixels[row, column + 8, 3] < 0.95  # 0.8 angstrom beside the atom: glass alone
    assert pixels[-1, 0, 3] == 0
