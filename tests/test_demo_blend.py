import json

import numpy as np
import pytest
import torch
from test_demo import Page, assert_loads_nothing, without

from fastnuggets import cli, demo_blend, report_blend
from fastnuggets.models.center_detector import Detections

for package in ("sklearn", "scipy", "tqdm", "matplotlib", "skimage", "cv2", "pycocotools"):
    pytest.importorskip(package)

TINY = demo_blend.Plan(
    seeds=2, steps=2, cutouts=1, backgrounds=2, scenes=4, tested=10, batch=2, width=8, blocks=1, rays=1
)
TIMES = ("ms", "seconds")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with the demo in it, and its result; the gallery is smaller."""
    out, results, write = tmp_path_factory.mktemp("blend"), [], report_blend.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_blend, "QUICK", TINY)
        patch.setattr(demo_blend, "GALLERY", 64)
        patch.setattr(demo_blend, "find_spec", lambda name: name if name == "cv2" else None)
        patch.setattr(report_blend, "write", lambda result, out: results.append(result) or write(result, out))
        assert cli.main(["demo", "blend", "--quick", "--out", str(out)]) == 0
        yield out, results[0]


@pytest.fixture(scope="module")
def text(done):
    return (done[0] / "blend.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def bits(result):
    return repr([without(TIMES, part) for part in (result.gallery, result.scores, result.examples)])


# --- the page ---


def test_page_loads_nothing(page, text):
    assert_loads_nothing(page, text, "script")
    assert len(text) < 3_000_000


def test_page_has_its_pictures(page, done):
    alternatives = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    given, strips = 3, len(demo_blend.SOURCES) - 1
    modes = len(report_blend.MODES)
    solvers = len(report_blend._solvers(done[1]))
    assert len(alternatives) == given + modes + solvers + strips + demo_blend.SHOWN


def test_tables_say_what_was_measured(page, done):
    result = done[1]
    rows = {row[0]: row for row in page.rows if row}
    for source in demo_blend.SOURCES:
        values = [100 * score["mean"] for score in result.scores[source]]
        assert rows[report_blend.NAMES[source]][1] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    ours = result.gallery["rows"]["import"]
    assert rows["ours, import"][2] == f"{ours['largest']:.3g}"
    assert rows["OpenCV seamlessClone"][1] == "import" or rows["OpenCV seamlessClone"][1] == "mixed"


def test_figures_are_kept_as_json(done):
    out, result = done
    figures = json.loads((out / "blend.json").read_text())
    assert figures["average precision"] == result.scores
    assert figures["blends"]["import"]["largest"] == result.gallery["rows"]["import"]["largest"]


def test_what_is_not_installed_is_said(text):
    assert "Not installed, so not compared: pie-torch, fpie." in text


# --- going on ---


def test_ctrl_c_is_gone_on_from_to_the_same_bits(done, tmp_path, monkeypatch, capsys):
    whole, calls, train = done[1], [], demo_blend.train

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == len(demo_blend.SOURCES) + 2:  # in the second seed
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(demo_blend, "train", interrupted)
    assert cli.main(["demo", "blend", "--quick", "--out", str(tmp_path)]) == cli.INTERRUPTED
    assert "The same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "blend.html").exists()
    parts = demo_blend.run(TINY, tmp_path / "blend")
    assert parts.reused == 2  # the gallery and a seed
    assert bits(parts) == bits(whole)


def test_random_state_and_threads_are_left_alone(done, threads):
    threads(2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    demo_blend.detectors(TINY, 1, lambda: None)
    assert torch.equal(before, torch.get_rng_state())
    demo_blend.run(TINY, done[0] / "blend")
    assert torch.get_num_threads() == 2


# --- what is measured ---


def test_ours_are_exact_and_leave_the_outside_alone(done):
    rows = done[1].gallery["rows"]
    for guidance in demo_blend.POISSON:
        assert rows[guidance]["largest"] <= 0.75  # half a level by rounding, a quarter by the solver's promise
        assert rows[guidance]["outside"] == 0
    assert rows["OpenCV seamlessClone, import"]["largest"] > 10


def test_rooms_are_labelled_as_they_are_seen():
    pictures = demo_blend.rendered(3, 4, 1)
    assert pictures.images.shape == (4, 3, demo_blend.SIDE, demo_blend.SIDE)
    for boxes, labels in zip(pictures.boxes, pictures.labels, strict=True):
        assert len(boxes) == len(labels) <= 4
        assert ((boxes >= 0) & (boxes <= demo_blend.SIDE)).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 3).all()
    again = demo_blend.rendered(3, 4, 1)
    assert torch.equal(again.images, pictures.images)


def test_cut_outs_are_views_of_each_thing():
    found = demo_blend.cut_out(50, 1)
    assert sorted(one.category for one in found) == sorted(demo_blend.KINDS)
    for one in found:
        assert one.mask.shape == one.image.shape[:2]
        # The mask's own box.
        assert all(one.mask.any(axis).all() or one.mask.any(axis)[[0, -1]].all() for axis in (0, 1))


def test_all_sources_have_the_same_places():
    cutouts, backgrounds = demo_blend.cut_out(50, 1), demo_blend.empty_rooms(0, 2, 1)
    hard, soft = (demo_blend.composed(source, cutouts, backgrounds, 3, 7)[0] for source in ("none", "gaussian"))
    every = demo_blend.composed(demo_blend.EVERY, cutouts, backgrounds, 3, 7)
    assert len(every) == 5
    for a, b, c in zip(hard.boxes, soft.boxes, every[0].boxes, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not torch.equal(hard.images, soft.images)


def test_average_precision_of_known_answers():
    truth = demo_blend.rendered(3, 4, 1)
    perfect = [
        Detections(boxes, torch.ones(len(boxes)), labels)
        for boxes, labels in zip(truth.boxes, truth.labels, strict=True)
    ]
    seen = sorted(set(torch.cat(truth.labels).tolist()))
    found = demo_blend.average_precision(perfect, truth)
    assert all(found[demo_blend.KINDS[label]] == 1 for label in seen)
    shifted = [one._replace(boxes=one.boxes + demo_blend.SIDE) for one in perfect]
    found = demo_blend.average_precision(shifted, truth)
    assert all(found[demo_blend.KINDS[label]] == 0 for label in seen)


@pytest.mark.parametrize(("changes", "verdict"), [([1, 1.2, 0.9], 1), ([-1, -1.2, -0.9], -1), ([1, -0.5, 2], 0)])
def test_verdict_needs_more_than_the_spread(done, changes, verdict):
    like = done[1].scores["none"][0]
    scores = {
        "none": [like | {"mean": 0.5}] * 3,
        "poisson": [like | {"mean": 0.5 + change / 100} for change in changes],
    }
    found = report_blend.compare(done[1]._replace(scores=scores), "poisson")
    assert found.mean == pytest.approx(np.mean(changes))
    assert found.verdict == verdict
