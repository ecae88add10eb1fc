import json

import numpy as np
import pytest
import torch
from test_demo import Page, assert_loads_nothing, without

from fastnuggets import cli, demo_fingerprints, report_fingerprints
from fastnuggets.demo_fingerprints import AAE, SETTINGS, VAE

for package in ("rdkit", "sklearn", "scipy", "tqdm", "matplotlib"):
    pytest.importorskip(package)

TINY = demo_fingerprints.Plan(seeds=2, steps=3, molecules=40, batch=32, samples=50, probe_steps=3, shown=2)
TIMES = ("training", "seconds")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with the demo in it, and its result."""
    out, results, write = tmp_path_factory.mktemp("fingerprints"), [], report_fingerprints.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_fingerprints, "QUICK", TINY)
        patch.setattr(report_fingerprints, "write", lambda result, out: results.append(result) or write(result, out))
        assert cli.main(["demo", "fingerprints", "--quick", "--out", str(out)]) == 0
    return out, results[0]


@pytest.fixture(scope="module")
def text(done):
    return (done[0] / "fingerprints.html").read_text(encoding="utf-8")


def test_page_loads_nothing(text):
    assert_loads_nothing(Page(text), text, "script")
    assert "$" not in text.replace("$schema", "") and len(text) < 2_000_000


def test_page_has_both_models_on_one_plot(text):
    labels = [attributes["aria-label"] for tag, attributes in Page(text).tags if tag == "svg"]
    assert sum("both models, all settings" in label for label in labels) == 2
    assert all(setting.name in text for setting in SETTINGS)


def test_figures_are_those_of_the_page(done, text):
    figures = json.loads((done[0] / "fingerprints.json").read_text())
    assert set(figures["trainings"]) == {setting.name for setting in SETTINGS}
    nats = np.mean([score["nats"] for score in figures["trainings"][VAE.name]])
    assert f"{nats:.2f}" in text
    assert figures["fingerprints"] == len(done[1].data["packed"])


def test_files_are_counted(done):
    data = done[1].data
    assert all(records <= 40 and readable <= records for records, readable, _ in data["counts"].values())
    assert sum(new for *_, new in data["counts"].values()) == data["molecules"] >= len(data["packed"])
    assert len(data["packed"]) == len(data["packed"].unique(dim=0)) == len(data["smiles"]) == data["values"].shape[1]


def test_nats_of_independent_bits(done):
    from fastnuggets.molecules.fingerprints import unpack

    p = unpack(done[1].data["packed"], 166).double().mean(0).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        by_hand = -np.nansum(p * np.log(p)) - np.nansum((1 - p) * np.log(1 - p))
    assert done[1].independent == pytest.approx(by_hand)


def test_coverage_by_chance(done):
    known = len(done[1].data["packed"]) - done[1].scores[VAE][0]["held out"]
    drawn = torch.randint(known, (2000, TINY.samples), generator=torch.Generator().manual_seed(0))
    mean = np.mean([len(row.unique()) for row in drawn])
    assert report_fingerprints.by_chance(done[1]) == pytest.approx(mean, abs=0.5)


def test_goes_on_from_what_is_done(done, tmp_path, monkeypatch):
    calls = []
    score = demo_fingerprints.score

    def stop(setting, *arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(setting)
        return score(setting, *arguments)

    monkeypatch.setattr(demo_fingerprints, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        demo_fingerprints.run(TINY, tmp_path)
    monkeypatch.setattr(demo_fingerprints, "score", score)
    result = demo_fingerprints.run(TINY, tmp_path)
    assert result.reused == 4  # three trainings and the data
    assert repr(without(TIMES, result.scores)) == repr(without(TIMES, done[1].scores))


def test_every_source_is_there():
    """Another release of RDKit may have fewer; the one that tests run with has all."""
    plan = TINY._replace(molecules=1)
    assert set(demo_fingerprints.collect(plan)["counts"]) == {name for name, _ in demo_fingerprints.SOURCES}


def test_both_published_settings_are_compared():
    assert {VAE, AAE} <= set(SETTINGS) and len(set(SETTINGS)) == len(SETTINGS)
