"""What the benchmark says, given what it measured. Nothing is timed here."""

import torch

from bench import __main__ as main
from bench import report, sample, workload
from bench.cases import Gate

ROWS = [
    {"name": "ours", "against": None, "ms": {"1": 2.0, "2": 1.0}, "error": 1e-7, "tolerance": 1e-6, "extra_mb": 0.0},
    {
        "name": "peer",
        "against": "ours",
        "ms": {"1": 10.0, "2": 10.0},
        "error": 1e-7,
        "tolerance": 1e-6,
        "extra_mb": 3.0,
    },
    {
        "name": "hasty",
        "against": "ours",
        "ms": {"1": 100.0, "2": 99.0},
        "error": 0.1,
        "tolerance": 1e-6,
        "extra_mb": None,
    },
    {"name": "absent", "note": "not measured: no module"},
]
for row in ROWS:
    row.setdefault("note", "")


def verdicts(gate, rows=ROWS, threads=(1, 2)):
    (result,) = report.gates([gate], rows, list(threads))
    return {count: (cell.get("value"), cell["verdict"]) for count, cell in result["threads"].items()}


def test_gates():
    assert verdicts(Gate("", "peer", "ours", (5, 11))) == {"1": (5, "reached"), "2": (10, "missed")}
    assert verdicts(Gate("", "ours", "peer", (0.1, 0.1), at_most=True)) == {"1": (0.2, "missed"), "2": (0.1, "reached")}
    assert verdicts(Gate("", "peer", None, (None, 100))) == {"2": (100, "reached")}
    assert verdicts(Gate("", "absent", "ours", (5, None))) == {"1": (None, "not measured")}
    assert verdicts(Gate("", "peer", "absent", (5, None))) == {"1": (None, "not measured")}
    assert verdicts(Gate("", ("peer", "absent", "ours"), "ours", (1, 2))) == {"1": (1, "reached"), "2": (1, "missed")}


def test_a_wrong_result_has_no_speed():
    assert verdicts(Gate("", "hasty", "ours", (5, 5))) == {"1": (None, "wrong result"), "2": (None, "wrong result")}
    text = "\n".join(report.table({"rows": ROWS}, {"threads": [1, 2], "device": "cpu"}))
    assert "5x / 10x" in text
    assert "50x" not in text
    wrong = [{**ROWS[0], "error": float("nan")}, ROWS[1]]
    assert verdicts(Gate("", "peer", "ours", (5, 5)), wrong)["1"] == (None, "wrong result")
    assert "5x" not in "\n".join(report.table({"rows": wrong}, {"threads": [1, 2], "device": "cpu"}))


def test_tables_go_between_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench forward: begin -->\nold\n<!-- bench forward: end -->\nafter\n")
    result = report.start("cpu", [1], 3, quick=False, complete=[])
    result["groups"] = [{"name": "forward", "family": "voxelize", "title": "Forward", "rows": ROWS[:2], "gates": []}]
    report.fill(str(readme), result)
    once = readme.read_text()
    assert once.startswith("before\n<!-- bench forward: begin -->\n")
    assert once.endswith("<!-- bench forward: end -->\nafter\n")
    assert "| peer | 10 |" in once
    assert "old" not in once
    report.fill(str(readme), result)
    assert readme.read_text() == once


def test_a_group_of_another_environment_is_measured_in_another_process(monkeypatch):
    """An allocator's settings are read when a process starts."""
    group = next(g for g in sample.groups("cpu", True) if g.environment)
    seen = {}

    def run(command, env, **_):
        seen.update(env)
        folder = command[command.index("--out") + 1]
        made = report.start("cpu", [1], 5, quick=True, complete=[])
        made["groups"] = [{"name": group.name, "rows": [{"ms": {"1": 2.0}}]}]
        report.write(made, "", folder)

    monkeypatch.setattr(main.subprocess, "run", run)
    assert main.measure_apart(group, "cpu", [1], 5, True)["rows"][0]["ms"] == {"1": 2.0}
    assert group.environment.items() <= seen.items()


def test_workload():
    heavy, every = workload.load(), workload.load(hydrogens=True)
    hydrogen = workload.CHANNELS.index("H")
    assert len(heavy) == len(every) == 64
    assert (heavy.channels != hydrogen).all()
    assert (every.channels == hydrogen).any()
    mean = torch.stack([heavy.coords[s].mean(0) for s in heavy.slices])
    assert mean.abs().max() < 1e-5  # float32 sums of 40 coordinates of 10 angstrom
    # No two atoms closer than a short bond to hydrogen: nothing was mixed up when the coordinates were packed.
    for s in every.slices:
        assert torch.pdist(every.coords[s]).min() > 0.9
