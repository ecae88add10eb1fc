import json

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastnuggets import demo, demo_impute, report_impute
from fastnuggets.demo_impute import METHODS, Plan, Result, Table, judge, load

TINY = Plan(seeds=2, tables=("wine",), shares=(0.3,), steps=2, rounds=1, trees=2)


def test_judge_by_hand():
    table = Table(np.array([[0.0], [1.0], [2.0]]), np.array([[0], [1], [1]]))
    hidden = np.array([[True, True], [True, True], [False, False]])
    numbers, places = np.array([[1.0], [4.0], [9.0]]), np.array([[1], [1], [0]])
    drawn = np.array([[[k], [10 + k], [0]] for k in range(-2, 3)], dtype=float)
    found = judge(table, hidden, numbers, places, drawn)
    assert found["nrmse"] == pytest.approx(5**0.5) and found["pfc"] == 0.5
    assert found["coverage"] == 0.5 and found["width"] == 2
    assert "coverage" not in judge(table, hidden, numbers, places, None)


@pytest.mark.parametrize(
    ("name", "rows", "numbers", "categories"),
    [("wine", 178, 13, 3), ("breast cancer", 569, 30, 2), ("diabetes", 442, 9, 2)],
)
def test_tables(name, rows, numbers, categories):
    table = load(name)
    assert table.numbers.shape == (rows, numbers) and set(table.categories.flatten()) == set(range(categories))
    assert np.allclose(table.numbers.mean(0), 0) and np.allclose(table.numbers.std(0), 1)


def test_counts_and_calibration_by_hand():
    """Of two rows ours is below every peer in one and above one in the other; the normal distribution is no peer."""

    def scores(ours, least):
        one = {method: {"nrmse": 2.0, "pfc": 0.5, "coverage": 0.8} for method in METHODS}
        one["kNN"]["nrmse"], one["normal"]["nrmse"] = least, 0.1
        one["VAEAC"] |= {"nrmse": ours, "coverage": 0.94}
        return [one, one]

    result = Result(TINY, {}, {"a": scores(1.0, 1.5), "b": scores(1.0, 0.9)}, 0.0, 0, 0)
    assert report_impute._ahead(result, "nrmse") == 1 and report_impute._ahead(result, "pfc") == 2
    told = report_impute._covered(result)
    assert "iterative 80 to 80 %, on average 10.0 off" in told and "VAEAC 94 to 94 %, on average 4.0 off" in told


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_impute, "QUICK", TINY)
    assert demo.main(["impute", "--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "impute.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "NaN" not in page and "nan" not in page
    scores = json.loads((tmp_path / "impute.json").read_text())["scores"]["wine, 30%"]
    assert len(scores) == 2 and scores[0]["mean"] != scores[1]["mean"]
    for method in METHODS:
        assert 0.2 < scores[0][method]["nrmse"] < 2
    assert scores[0]["mean"]["nrmse"] == pytest.approx(1, abs=0.1)
    assert scores[0]["kNN"]["nrmse"] < scores[0]["mean"]["nrmse"]
    for method in ("kNN", "iterative", "forest"):  # each learns the class from the measurements
        assert scores[0][method]["pfc"] < 0.7 * scores[0]["mean"]["pfc"]
    # Seeds that are done are kept, and a third is an addition.
    capsys.readouterr()
    again = demo_impute.run(TINY._replace(seeds=3), tmp_path / "impute")
    assert (again.reused, again.parts) == (2, 3)
    assert again.scores["wine, 30%"][:2] == scores
    assert report_impute.write(again, tmp_path).exists()
