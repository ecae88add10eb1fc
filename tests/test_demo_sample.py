import json
import math

import numpy as np
import pytest
import torch
from test_demo import Page, assert_loads_nothing, without

from fastnuggets import cli, demo_sample, report_sample
from fastnuggets.parts import settings

for package in ("sklearn", "scipy", "tqdm", "matplotlib"):
    pytest.importorskip(package)

TINY = demo_sample.Plan(
    seeds=2, steps=4, toy_steps=4, members=2, toy_seeds=2, toy_points=60, passes=3, strange=20, width=12, calls=1
)
TIMES = ("training", "testing", "seconds")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with the demo in it, and its result."""
    out, results, write = tmp_path_factory.mktemp("sample"), [], report_sample.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_sample, "QUICK", TINY)
        patch.setattr(report_sample, "write", lambda result, out: results.append(result) or write(result, out))
        assert cli.main(["demo", "sample", "--quick", "--out", str(out)]) == 0
    return out, results[0]


@pytest.fixture(scope="module")
def text(done):
    return (done[0] / "sample.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def bits(result):
    return [without(TIMES, part) for part in (result.toys, result.scores, result.examples, result.noise)]


def same(a, b):
    """Without that a NaN would be unequal to itself."""
    return repr(a) == repr(b)


# --- the page ---


def test_page_loads_nothing(page, text):
    assert_loads_nothing(page, text, "script")
    assert len(text) < 2_000_000


def test_page_has_its_charts(page):
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert len(labels) == len(set(labels)) + 2 == 14  # two charts for each of two tasks


def test_tables_say_what_was_measured(page, done):
    result = done[1]
    names = report_sample._names(result)
    assert len(set(names.values())) == len(demo_sample.METHODS) + len(demo_sample.MEANS) == 11
    rows = [row for row in page.rows if len(row) == 10 and row[0] in names.values()]
    ordered = [report_sample._ordered(task) for task in demo_sample.TASKS]
    assert [row[0] for row in rows] == [names[method] for methods in ordered for method in methods]
    row = rows[ordered[0].index("dropout")]
    scores = result.scores["few images"]["dropout"]
    values = [100 * score["accuracy"] for score in scores]
    assert row[1] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    change = np.mean([a["nll"] - b["nll"] for a, b in zip(scores, result.scores["few images"]["plain"], strict=True)])
    assert row[3].startswith(f"{change:+.3f};")
    assert [row[7] for row in rows[:5]] == ["1", "1", "2", "3", "1"]


def test_figures_are_kept_as_json(done):
    out, result = done
    figures = json.loads((out / "sample.json").read_text())
    assert figures["digits"]["few images"]["bayes"][1]["nll"] == result.scores["few images"]["bayes"][1]["nll"]
    assert figures["toy"][0]["accuracy"] == result.toys[0]["accuracy"]
    assert sum(figures["numbers that differ"]["ours"].values()) == 0


@pytest.mark.parametrize(("changes", "verdict"), [([1, 1.2, 0.9], 1), ([-1, -1.2, -0.9], -1), ([1, -0.5, 2], 0)])
def test_verdict_needs_more_than_the_spread(done, changes, verdict):
    task = demo_sample.FEW
    like = done[1].scores[task.name]["plain"][0]
    scores = {
        "plain": [like | {"accuracy": 0.5, "nll": 5.0}] * 3,
        "bayes": [like | {"accuracy": 0.5 + change / 100, "nll": 5 + change} for change in changes],
    }
    result = done[1]._replace(scores={task.name: scores})
    found = report_sample.compare(result, task, "bayes", report_sample.ACCURACY)
    assert found.mean == pytest.approx(np.mean(changes))
    assert found.verdict == verdict
    assert report_sample.compare(result, task, "bayes", report_sample.NLL).verdict == -verdict  # less is better


# --- going on ---


def test_ctrl_c_is_gone_on_from_to_the_same_bits(done, tmp_path, monkeypatch, capsys):
    whole, calls, train = done[1], [], demo_sample.train

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 10:  # in the second seed: one has six methods to train and one more of the ensemble
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(demo_sample, "QUICK", TINY)
    monkeypatch.setattr(demo_sample, "train", interrupted)
    assert cli.main(["demo", "sample", "--quick", "--out", str(tmp_path)]) == cli.INTERRUPTED
    assert "The same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "sample.html").exists()
    parts = demo_sample.run(TINY, tmp_path / "sample")
    assert parts.reused == 5  # noise, speed, two toys and a seed
    assert len(calls) == 10 + 7 + 2 * 4
    assert same(bits(parts), bits(whole))


def test_finished_parts_are_reused_and_damaged_ones_are_not(done, capsys):
    out, result = done
    again = demo_sample.run(TINY, out / "sample")
    assert again.reused == again.parts == 8
    assert again.speed == result.speed
    part = max((out / "sample").iterdir(), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:1000])
    again = demo_sample.run(TINY, out / "sample")
    assert again.reused == 7
    assert "is damaged" in capsys.readouterr().err
    assert same(bits(again), bits(result))


def test_other_settings_are_other_parts():
    assert settings(TINY, {"seed": 0}) == settings(TINY._replace(seeds=5), {"seed": 0})
    assert settings(TINY, {"seed": 0}) != settings(TINY._replace(steps=5), {"seed": 0})


def test_random_state_and_threads_are_left_alone(done, threads):
    threads(2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    demo_sample.toy(TINY, 0, lambda: None)
    demo_sample.digits(demo_sample.MORE, TINY, 1, lambda: None)
    assert torch.equal(before, torch.get_rng_state())
    demo_sample.run(TINY, done[0] / "sample")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("value", ["1", "many"])
def test_bad_number_of_seeds_is_named(value, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "sample", "--seeds", value])
    assert stop.value.code == cli.USAGE
    assert f"--seeds: must be a whole number, at least 2 to show a spread, got '{value}'" in capsys.readouterr().err


def test_missing_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fastnuggets.parts.find_spec", lambda name: None if name == "sklearn" else name)
    assert cli.main(["demo", "sample", "--out", str(tmp_path)]) == cli.FAILED
    assert "sklearn: not installed; pip install 'fastnuggets[demo]'" in capsys.readouterr().err


# --- what is measured ---


def test_the_layer_of_noise_learns_and_its_mean_does_not():
    found = demo_sample.toy(demo_sample.STANDARD._replace(toy_steps=400), 0, lambda: None)
    assert found["accuracy"][0] > 0.8
    assert found["accuracy"][-1] > 0.95
    assert abs(found["means"] - 0.25) < 0.04
    for points, deviations in zip(found["activations"], found["deviations"], strict=True):
        assert points.shape[1] == 2
        # Half of a normal is within 0.67 deviations; the deviation is another for each point.
        within = (points.abs() < 0.67 * torch.tensor(deviations)).double().mean(0)
        assert ((within > 0.3) & (within < 0.7)).all()


def test_digits_are_split_and_held_out_as_said():
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    known = {tuple(row): digit for row, digit in zip(pixels.tolist(), digits.tolist(), strict=True)}
    task = demo_sample.FEW
    data = demo_sample.load(task, demo_sample.STANDARD, 3)
    assert data.held_out == [6, 7]
    assert abs(data.images.mean()) < 1e-5
    assert abs(data.images.std() - 1) < 1e-5
    everything = torch.cat([data.images, data.test_images, data.strange["held out"]])
    assert len(everything) == len(pixels)
    scale = 16 / (everything.max() - everything.min())
    rows = ((everything - everything.min()) * scale).round().tolist()
    truth = [known[tuple(row)] for row in rows]
    learned = len(pixels) - len(data.strange["held out"])
    labels = torch.cat([data.labels, data.test_labels]).tolist()
    assert truth[:learned] == [data.names[label] for label in labels]
    assert set(truth[learned:]) == {6, 7}
    few = data.test_images[:500]
    assert torch.equal(data.strange["shuffled"].sort(1).values, few.sort(1).values)
    assert not torch.equal(data.strange["shuffled"], few)


def test_turning_turns():
    image = torch.zeros(1, 8, 8)
    image[0, 1, 2], image[0, 5, 6] = 1.0, 0.5
    quarter = demo_sample.turn(image.flatten(1), 90).view(8, 8)
    assert min((quarter - torch.rot90(image[0], k)).abs().max() for k in (1, 3)) < 1e-5
    assert torch.equal(demo_sample.turn(image.flatten(1), 0).view(8, 8), image[0])
    assert (demo_sample.turn(torch.ones(1, 64), 45).view(8, 8)[0, 0] == 0).all()


def test_means_of_passes_are_of_groups():
    stack = torch.rand(7, 5, 3)
    found = demo_sample.by_passes(stack, (1, 3), lambda p: p[0, 0].item())
    assert found[0] == pytest.approx(stack[:, 0, 0].mean().item())
    assert found[1] == pytest.approx(stack[:6, 0, 0].mean().item())


def test_doubt_and_detection_by_their_definitions():
    sure, torn = torch.tensor([0.98, 0.02]), torch.tensor([0.5, 0.5])
    agree, contradict = torch.stack([torn, torn]), torch.stack([sure, sure.flip(0)])
    found = demo_sample.doubt(torch.stack([agree, contradict], 1))
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(2)] * 2))
    own = -0.98 * math.log(0.98) - 0.02 * math.log(0.02)
    torch.testing.assert_close(found.disagreement, torch.tensor([0.0, math.log(2) - own]), atol=1e-6, rtol=1e-6)
    assert demo_sample.detection(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])) == pytest.approx(3.5 / 4)


def test_methods_differ_as_they_say():
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    for method in demo_sample.METHODS:
        model = demo_sample.network("plain" if method == "ensemble" else method, TINY).eval()
        assert model(x).shape == (4, demo_sample.CLASSES)
        draws = demo_sample.passes([model], x, 5 if method in demo_sample.SAMPLED else 1)
        torch.testing.assert_close(draws.sum(-1), torch.ones(draws.shape[:2]))
        assert (draws.std(0).max() > 1e-3) if method in demo_sample.SAMPLED else len(draws) == 1


def test_only_the_methods_with_a_divergence_have_one():
    data = demo_sample.load(demo_sample.FEW, TINY, 0)
    plan = TINY._replace(steps=30)
    weights = {}
    for method in ("plain", "bayes", "concrete"):
        model, _ = demo_sample.train(method, data, plan, 0, lambda: None)
        weights[method] = model
    bayes = weights["bayes"]
    assert bayes[0].weight.square().mean() < weights["plain"][0].weight.square().mean() * 1.5
    assert bayes[0].weight_std.mean() > 0.1 / math.sqrt(64)  # grown towards the prior's
    assert weights["concrete"][2].p.item() > 0.1  # as it was at first


def test_noise_of_ours_never_differs_and_torch_s_does(done):
    differ = done[1].noise["differ"]
    assert list(differ["ours"]) == list(differ["torch"]) == list(demo_sample.LAYOUTS)
    assert not any(where.any() for where in differ["ours"].values())
    # Else the comparison would see no difference anywhere.
    assert differ["torch"]["transposed"].any()
    assert differ["torch"]["float64"].any()


def test_speed_is_measured_of_all(done):
    times = done[1].speed["times"]
    assert "1" in times
    assert all(value > 0 for found in times.values() for pair in found.values() for value in pair)
    assert all(len(found) == 6 for found in times.values())
