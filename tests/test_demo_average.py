from importlib.util import find_spec

import numpy as np
import pytest
import torch
from test_demo import Page, assert_loads_nothing

from fastnuggets import cli, demo, demo_average, report_average
from fastnuggets.parts import settings

for package in ("sklearn", "scipy", "tqdm", "matplotlib"):
    pytest.importorskip(package)

TINY = demo_average.Plan(
    seeds=2, steps=48, start=24, cycles=2, draws=2, dense=8, convolutional=3, grid=4, curve_steps=4, curve_points=3
)
TIMES = ("training", "ready", "testing")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(demo_average, "QUICK", TINY)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with the demo in it, and its result."""
    out, results, write = tmp_path_factory.mktemp("average"), [], report_average.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_average, "QUICK", TINY)
        patch.setattr(report_average, "write", lambda result, out: results.append(result) or write(result, out))
        assert cli.main(["demo", "average", "--quick", "--out", str(out)]) == 0
    return out, results[0]


@pytest.fixture(scope="module")
def text(done):
    return (done[0] / "average.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def bits(result):
    """All that was computed, without what was timed."""
    scores = {
        (task, method): [[value for key, value in score._asdict().items() if key not in TIMES] for score in found]
        for task, methods in result.scores.items()
        for method, found in methods.items()
    }
    plane = {key: value.tolist() for key, value in result.pictures["plane"].items()}
    curves = {name: [part.tolist() for part in curve.values()] for name, curve in result.pictures["curves"].items()}
    return scores, result.rates, result.taken, plane, curves


def test_page_loads_nothing(page, text):
    assert_loads_nothing(page, text, "script")


def test_page_has_its_charts(page):
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert len(labels) == len(set(labels)) + 4 == 12  # two charts for each of three tasks


def test_tables_say_what_was_measured(page, done):
    result = done[1]
    names = report_average._names(result)
    assert len(names) == len(demo_average.METHODS) == 9
    rows = [row for row in page.rows if row and row[0] in names.values()]
    assert [row[0] for row in rows] == 3 * list(names.values())
    values = [100 * score.accuracy for score in result.scores[demo_average.NOISY.name]["swa"]]
    swa = rows[list(names).index("swa")]
    assert swa[1] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    passes = dict(zip(names, (row[6] for row in rows), strict=False))
    assert [passes[key] for key in ("last", "swa", "swag", "snapshot", "fge")] == ["1", "1", "2", "2", "2"]


def test_models_are_taken_when_the_schedules_say(done):
    taken, rates = done[1].taken, done[1].rates
    assert taken["swa"] == taken["swag"] == [25, 31, 37, 43]
    assert taken["snapshot"] == [24, 48]
    assert taken["fge"] == [30, 42]  # the middles of two triangles of 12 steps
    assert [rates["fge"][step - 1] for step in taken["fge"]] == pytest.approx([TINY.low] * 2)
    assert taken["ema"] == list(range(1, 49))
    # The same rate so far, and so the same weights and batches.
    assert rates["last"][:12] == rates["swa"][:12] == rates["fge"][:12]


def test_path_goes_from_the_first_averaged_model_and_its_mean_is_swa(done):
    plane = done[1].pictures["plane"]
    assert plane["path"].shape == (4, 2)
    torch.testing.assert_close(plane["path"][0], plane["points"][2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plane["path"].mean(0), plane["points"][1], atol=1e-5, rtol=1e-5)


def test_curves_start_and_end_at_the_same_models(done):
    ends = [curve["loss"][[0, -1]] for name, curve in done[1].pictures["curves"].items() if name != "to swa"]
    assert len(ends) == 3
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_ctrl_c_is_gone_on_from_to_the_same_bits(done, tmp_path, monkeypatch, capsys):
    whole, calls, train = done[1], [], demo_average.train

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 6:  # the second of four runs of the second seed
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(demo_average, "train", interrupted)
    command = ["demo", "average", "--quick", "--out", str(tmp_path)]
    assert cli.main(command) == cli.INTERRUPTED
    assert "The same command goes on" in capsys.readouterr().err
    assert [path.suffix for path in (tmp_path / "average").iterdir()] == [".pt"]
    assert not (tmp_path / "average.html").exists()
    parts = demo_average.run(TINY, tmp_path / "average")
    assert parts.reused == 1
    assert len(calls) == 6 + 5 * 4 + 1  # nothing of the first seed again
    assert bits(parts) == bits(whole)


def test_finished_parts_are_reused_and_damaged_ones_are_not(done, capsys):
    out, result = done
    again = demo_average.run(TINY, out / "average")
    assert again.reused == again.parts == 7
    assert again.scores == result.scores  # times too
    parts = sorted((out / "average").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:1000])
    again = demo_average.run(TINY, out / "average")
    assert again.reused == 6
    assert "is damaged" in capsys.readouterr().err
    assert bits(again) == bits(result)


def test_other_settings_are_other_parts():
    same = settings(TINY, {"seed": 0})
    assert settings(TINY._replace(seeds=5), {"seed": 0}) == same
    for changed in (TINY._replace(steps=49), TINY._replace(decay=0.5)):
        assert settings(changed, {"seed": 0}) != same


@pytest.mark.parametrize("value", ["1", "0", "-3", "many", "2.5"])
def test_bad_number_of_seeds_is_named(value, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "average", "--seeds", value])
    assert stop.value.code == cli.USAGE
    assert f"--seeds: must be a whole number, at least 2 to show a spread, got '{value}'" in capsys.readouterr().err


def test_unknown_demo_is_named_and_help_shows_all(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "averages"])
    assert stop.value.code == cli.USAGE
    assert "no demo 'averages': molecules, average, sample" in capsys.readouterr().err
    for arguments in (["--help"], ["molecules", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(["demo", *arguments])
        shown = capsys.readouterr().out
        for name in demo.OTHERS:
            assert f"  {name} " in shown and find_spec(f"fastnuggets.demo_{name}")


def test_missing_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fastnuggets.parts.find_spec", lambda name: None if name == "sklearn" else name)
    assert cli.main(["demo", "average", "--out", str(tmp_path)]) == cli.FAILED
    assert "sklearn: not installed; pip install 'fastnuggets[demo]'" in capsys.readouterr().err


def test_wrong_labels_are_as_many_as_said_and_test_labels_are_right():
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    known = {tuple(row): digit for row, digit in zip(pixels.tolist(), digits.tolist(), strict=True)}
    assert len(known) == len(pixels)
    data = demo_average.load(demo_average.NOISY, 3)
    everything = torch.cat([data.images, data.test_images])
    scale = 16 / (everything.max() - everything.min())
    pixels = ((everything - everything.min()) * scale).flatten(1).round().tolist()
    truth = torch.tensor([known[tuple(row)] for row in pixels])
    assert len(data.images) == 300
    assert (data.labels != truth[:300]).sum() == 60
    assert torch.equal(data.test_labels, truth[300:])


def test_score_is_what_the_definitions_say():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.62, 0.38], [0.2, 0.8]])
    score = demo_average.score(probabilities, torch.tensor([0, 1, 0, 1]))
    assert score.accuracy == 0.75
    assert score.nll == pytest.approx(-np.log([0.9, 0.4, 0.62, 0.8]).mean(), rel=1e-6)
    # 0.6 and 0.62 share the tenth of fifteen bins, with one of two right.
    assert score.ece == pytest.approx((0.1 + abs(0.6 + 0.62 - 1) + 0.2) / 4, rel=1e-6)


def test_projection_is_at_right_angles():
    corners = [torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    side, other = (corner - corners[0] for corner in corners[1:])
    aside = torch.linalg.qr(torch.stack([side, other, torch.ones(6)], 1)).Q[:, 2]
    points = torch.stack([corners[0], corners[1], corners[2], corners[1] + 3 * aside])
    seen = demo_average.project(points, corners, None)
    assert seen[1, 0] > 0
    assert seen[2, 1] > 0
    torch.testing.assert_close(seen[0], torch.zeros(2).double())
    torch.testing.assert_close(seen[1], torch.tensor([side.norm(), 0]).double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(seen[3], seen[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(seen[2].norm(), other.double().norm(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("changes", "verdict"), [([1, 1.2, 0.9], 1), ([-1, -1.2, -0.9], -1), ([1, -0.5, 2], 0)])
def test_verdict_needs_more_than_the_spread(done, changes, verdict):
    name = demo_average.NOISY.name
    like = done[1].scores[name]["last"][0]
    scores = {
        "last": [like._replace(accuracy=0.5, nll=5.0)] * 3,
        "swa": [like._replace(accuracy=0.5 + change / 100, nll=5 + change) for change in changes],
    }
    result = done[1]._replace(scores={name: scores})
    found = report_average.compare(result, name, "swa", report_average.ACCURACY)
    assert found.mean == pytest.approx(np.mean(changes))
    assert found.verdict == verdict
    assert report_average.compare(result, name, "swa", report_average.NLL).verdict == -verdict  # less is better
