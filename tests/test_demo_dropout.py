"""The demo of masks and depth: shifts by hand, networks that are what they are called, findings that follow figures."""

import json
import math

import numpy as np
import pytest
import torch
from test_demo import Page, assert_loads_nothing, without

from fastnuggets import cli, demo_dropout, nn, report_dropout
from fastnuggets.demo_dropout import BASE, CLEAN, METHODS, SHIFTS, TASKS, TRAINED, Plan, shifted

for package in ("sklearn", "scipy", "tqdm", "matplotlib", "PIL"):
    pytest.importorskip(package)

TINY = Plan(seeds=2, steps=4, letter_steps=2, members=2, passes=2, tested=40, width=8, blocks=2)
TIMES = ("training", "testing", "seconds")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with the demo in it, and its result."""
    out, results, write = tmp_path_factory.mktemp("dropout"), [], report_dropout.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_dropout, "QUICK", TINY)
        patch.setattr(report_dropout, "write", lambda result, out: results.append(result) or write(result, out))
        assert cli.main(["demo", "dropout", "--quick", "--out", str(out)]) == 0
    return out, results[0]


# --- data ---


def picture():
    image = torch.zeros(1, 8, 8)
    image[0, 2, 3], image[0, 5, 5] = 16.0, 8.0
    return image


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_blurring_spreads_a_pixel_by_its_weights():
    found = shifted("blurred", picture().flatten(1), generator()).view(8, 8)
    assert found[2].tolist() == [0, 0, 2, 4, 2, 0, 0, 0]
    assert found[1].tolist() == found[3].tolist() == [0, 0, 1, 2, 1, 0, 0, 0]
    assert found.sum() == 24


def test_moving_is_by_one_pixel_to_each_side():
    many = picture().expand(200, 8, 8).flatten(1)
    found = {
        tuple(map(tuple, image.nonzero().tolist())) for image in shifted("moved", many, generator()).view(-1, 8, 8)
    }
    assert found == {((2 + i, 3 + j), (5 + i, 5 + j)) for i, j in ((0, 1), (0, -1), (1, 0), (-1, 0))}


def test_hiding_takes_a_square_of_three():
    full = torch.full((300, 64), 9.0)
    hidden = (shifted("hidden", full, generator()) == 0).view(-1, 8, 8)
    assert (hidden.sum((1, 2)) == 9).all()
    rows, columns = hidden.any(2), hidden.any(1)
    assert (rows.sum(1) == 3).all() and (columns.sum(1) == 3).all()
    assert hidden.any(0).all()  # somewhere each


def test_noise_has_its_deviation_and_stays_within_the_pixels():
    middle = torch.full((500, 64), 8.0)
    change = shifted("noisy", middle, generator()) - 8
    # The normal of deviation 5, cut at +-8: its variance in closed form.
    cut, density = 8 / 5, math.exp(-0.5 * (8 / 5) ** 2) / math.sqrt(2 * math.pi)
    inside = math.erf(cut / math.sqrt(2))
    expected = 25 * (inside - 2 * cut * density) + 64 * (1 - inside)
    assert change.square().mean().item() == pytest.approx(expected, rel=0.03)  # 1 % standard error
    assert change.abs().max() <= 8


def test_no_image_is_learned_from_and_tested_on_and_labels_are_wrong_as_said():
    for task in TASKS:
        data = demo_dropout.load(task, Plan(1, 1, 1, tested=200), 3)
        right = demo_dropout.load(task._replace(wrong=0.0), Plan(1, 1, 1, tested=200), 3)
        assert (data.labels != right.labels).sum() == round(task.images * task.wrong)
        assert abs(data.images.mean()) < 1e-5 and abs(data.images.std() - 1) < 1e-5
        assert set(data.tests) == {CLEAN, *SHIFTS} and len(data.test_labels) == 200
        learned = {tuple(image) for image in data.images.tolist()}
        assert len(learned) == task.images
        assert not learned & {tuple(image) for image in data.tests[CLEAN].tolist()}


def test_letters_are_letters():
    every = demo_dropout.glyphs()
    assert every.shape == (12, 52, 32, 32) and every.amax((2, 3)).min() > 0.7
    flat = every.flatten(2)
    # Each letter is more like itself in another face than like most others.
    first, second = (torch.nn.functional.normalize(flat[i] - flat[i].mean(1, keepdim=True), dim=1) for i in (0, 4))
    like = first @ second.mT
    assert (like > like.diag()[:, None]).sum(1).double().mean() < 3
    images, letters = demo_dropout.draw_letters(500, generator(1))
    assert images.shape == (500, 64) and abs(images.mean()) < 1e-5 and len(letters.unique()) > 45
    again, _ = demo_dropout.draw_letters(500, generator(1))
    assert torch.equal(images, again)


# --- networks ---


def test_masks_are_where_they_are_said_to_be():
    found = {}
    for method in TRAINED:
        model = demo_dropout.network(method, Plan(1, 1, 1), 10)
        blocks = [m for m in model if isinstance(m, demo_dropout.Block)]
        inside = [m.p for block in blocks for m in block.branch if isinstance(m, nn.Dropout)]
        found[method] = (model[-2].p, inside, [round(block.depth.p, 3) for block in blocks])
    nothing = [0.0] * 4
    assert found[BASE] == found["swa"] == (0.0, nothing, nothing)
    assert found["dropout"] == (0.5, [0.5] * 4, nothing)
    assert found["depth"] == (
        0.0,
        nothing,
        [0.125, 0.25, 0.375, 0.5],
    )
    assert found["large"] == (0.9, nothing, nothing) and found["larger"] == (0.95, nothing, nothing)


def test_a_block_whose_branch_is_dropped_is_the_identity():
    block = demo_dropout.Block(8, 0.0, 1.0)
    x = torch.randn(5, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_networks_begin_alike_and_letters_leave_the_last_layer_alone():
    letters = demo_dropout.learn_letters(TINY, 0, lambda: None)["weights"]
    for task in (TASKS[0], TASKS[2]):
        states = []
        for method in TRAINED:
            torch.manual_seed(7)
            states.append(demo_dropout.begin(method, task, TINY, letters).state_dict())
        last = [name for name in states[0] if name not in letters]
        assert last == [f"{len(demo_dropout.network(BASE, TINY, 10)) - 1}.{part}" for part in ("weight", "bias")]
        for state in states:
            assert list(state) == list(states[0])
            assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())
        assert all(torch.equal(states[0][name], letters[name]) for name in letters) is task.letters


def test_averages_go_along_and_end_where_they_should():
    data = demo_dropout.load(TASKS[0], TINY, 0)
    plan = TINY._replace(steps=10, start=0.6, every=2)
    swa = demo_dropout.train("swa", TASKS[0], data, plan, 0, {}, lambda: None).average
    assert swa.count == 2 and swa.mode == "swa"  # of steps 6 to 9 every second
    ema = demo_dropout.train(BASE, TASKS[0], data, plan, 0, {}, lambda: None).average
    assert ema.count == 10 and ema.mode == "ema"
    assert demo_dropout.train("depth", TASKS[0], data, plan, 0, {}, lambda: None).average is None


# --- the page ---


def test_page(done):
    out, result = done
    text = (out / "dropout.html").read_text(encoding="utf-8")
    page = Page(text)
    assert_loads_nothing(page, text, "script")
    assert "nan" not in text.lower().replace("lakshminarayanan", "")
    assert sum(tag == "svg" for tag, _ in page.tags) == 1 + 2 * len(TASKS)
    names = report_dropout.names(result)
    rows = [row for row in page.rows if len(row) == 11 and row[0] in names.values()]
    assert [row[0] for row in rows] == [names[method] for method in METHODS] * len(TASKS)
    scores = result.scores["noisy labels"]["depth mean"]
    row = rows[len(METHODS) + METHODS.index("depth mean")]
    found = [100 * score[CLEAN]["accuracy"] for score in scores]
    assert row[1] == f"{np.mean(found):.1f} ± {np.std(found, ddof=1):.1f}"
    found = [np.mean([score[shift]["nll"] for shift in SHIFTS]) for score in scores]
    assert row[6] == f"{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}"
    figures = json.loads((out / "dropout.json").read_text())
    assert figures["scores"]["few labels"]["swa"][1][CLEAN] == result.scores["few labels"]["swa"][1][CLEAN]


def told(done, **better):
    """The result with accuracies of 0.5 all over, but so much more for some methods, and as many points of seeds."""
    names = [CLEAN, *SHIFTS]

    def unit(method, seed):
        accuracy = 0.5 + 0.01 * seed + better.get(method.replace(" ", "_"), 0.0) * (1 + 0.1 * seed)
        each = {"accuracy": accuracy, "nll": 1 - accuracy, "ece": 1 - accuracy, "bins": []}
        return dict.fromkeys(names, each) | {"passes": 1, "training": 1.0, "testing": 1.0}

    scores = {task.name: {m: [unit(m, seed) for seed in range(4)] for m in METHODS} for task in TASKS}
    return done[1]._replace(scores=scores)


def test_findings_follow_the_figures(done):
    level = told(done)
    assert "more accurate than the plain network with: few labels, noisy labels" in report_dropout._limits(level)
    assert "is not better on shifted digits than: EMA" in report_dropout._limits(level)
    ahead = told(done, large=0.2, swa=0.1, depth_mean=0.1)
    text = report_dropout._limits(ahead)
    assert "is better on shifted digits than all of its rivals" in text
    assert "Stochastic depth is not" not in text and "Nor is SWA" not in text
    assert "better than ensemble of 2" in report_dropout._shift_text(ahead)
    behind = report_dropout._limits(told(done, large=-0.2))
    assert "cannot be trained from scratch does not show" not in behind
    assert "cannot be trained from scratch does not show" in text
    found = report_dropout._text(told(done, ensemble=0.1, larger=-0.1), TASKS[0])
    assert "<b>More accurate than plain</b>, Clean: ensemble of 2; worse: dropout of 0.95" in found


# --- going on ---


def test_ctrl_c_is_gone_on_from_to_the_same_bits(done, tmp_path, monkeypatch):
    calls, train = [], demo_dropout.train

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 10:  # in the second task: one has six trainings and one more of the ensemble
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(demo_dropout, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_dropout.run(TINY, tmp_path)
    again = demo_dropout.run(TINY, tmp_path)
    assert (again.reused, again.parts) == (2, 2 * (1 + len(TASKS)))
    assert repr(without(TIMES, again.scores)) == repr(without(TIMES, done[1].scores))


def test_random_state_is_left_alone():
    before, ticks = torch.get_rng_state(), []
    letters = demo_dropout.learn_letters(TINY, 1, lambda: ticks.append(1))["weights"]
    demo_dropout.compare(TASKS[3], TINY, 1, letters, lambda: ticks.append(1))
    assert torch.equal(before, torch.get_rng_state())
    assert len(ticks) == TINY.letter_steps + (len(TRAINED) + TINY.members - 1) * TINY.steps
