"""The fit loop with several optimizers, logs, validation and processes; and runs of a system in a folder."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from fastnuggets.systems import Draw, Section, Settings, System, option, run
from fastnuggets.training import Interrupted, Update, Validation, WeightAverager, fit, load_checkpoint, read_log


class TinySystem(System):
    """A line through noisy points, and a critic that learns from its errors."""

    summary, paper = "A line", ""

    @dataclasses.dataclass(frozen=True)
    class Settings(Settings):
        epochs: int = option(5, "passes")
        batch_size: int = option(8, "examples")
        width: int = option(3, "of the line")

    @classmethod
    def read(cls, path, settings, *, seed, progress=True):
        values = torch.tensor([float(line) for line in path.read_text().split()])
        if len(values) == 0:
            raise ValueError(f"{path}: no numbers")
        return {"count": len(values)}, values

    def __init__(self, settings, facts):
        self.settings, width = settings, settings.width
        self.model = nn.ModuleDict({"line": nn.Linear(width, 1), "critic": nn.Linear(1, 1)})
        self.norm = self.model["norm"] = nn.BatchNorm1d(width)

    def optimizers(self):
        self.lines = torch.optim.Adam([*self.model["line"].parameters(), *self.norm.parameters()], lr=0.2)
        self.critics = torch.optim.SGD(self.model["critic"].parameters(), lr=0.01)
        return self.lines, self.critics

    def steps(self, data):
        return self.settings.epochs * -(-len(data) // self.settings.batch_size)

    def schedule(self, step, steps):
        return 1 - step / steps

    def loss(self, data, rows, noise=0.0):
        x = data[rows, None] * torch.arange(1.0, self.settings.width + 1)
        y = self.model["line"](self.norm(x)) + noise
        return y, (y - 3 * data[rows, None]).square().mean()

    def updates(self, data, step, draw):
        rows = draw.rows(step, len(data), self.settings.batch_size)
        noise = 0.01 * torch.randn(len(rows), 1)
        yield Update("line", self.lines, self.loss(data, rows, noise)[1])
        y, loss = self.loss(data, rows)
        yield Update("critic", self.critics, (self.model["critic"](y) - loss).square().mean())

    def validate(self, data):
        return {"error": self.loss(data, torch.arange(len(data)))[1].item(), "drawn": torch.rand(()).item()}

    def generate(self, count, *, seed, low=0.0):
        generator = torch.Generator().manual_seed(seed)
        yield from (str(low + value) for value in torch.rand(count, generator=generator).tolist())

    def sections(self, data):
        return [Section("Points", f"<p>{len(data)} points</p>")]


@pytest.fixture
def numbers(tmp_path, monkeypatch, threads):
    threads(1)  # steps of microseconds: threads that wait for each other take longer than the sums
    monkeypatch.setattr(run, "find", lambda name: TinySystem)
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(str(value) for value in torch.linspace(-1, 1, 60).tolist()))
    return path


def same_run(a, b):
    ours, theirs = (load_checkpoint(path / "checkpoint.pt") for path in (a, b))
    assert ours.losses == theirs.losses and ours.validations == theirs.validations
    assert all(torch.equal(ours.model[key], theirs.model[key]) for key in ours.model)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    logs = [read_log(path / name) for path in (a, b) for name in ("log.csv", "log_validation.csv")]
    for log in logs:
        log.pop("seconds", None)
    assert str(logs[:2]) == str(logs[2:])  # as text, in which NaN equals NaN


def test_updates_take_turns_and_leave_the_other_network_alone(tmp_path):
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    model = nn.ModuleList([first, second])
    for layer in model:
        nn.init.ones_(layer.weight)
    ours, theirs = torch.optim.SGD(first.parameters(), lr=0.5), torch.optim.SGD(second.parameters(), lr=0.5)
    seen = []

    def losses(step):
        yield Update("both", ours, first.weight.sum() * second.weight.sum())
        seen.append((first.weight.item(), second.weight.item()))
        yield Update("other", theirs, first.weight.sum() * second.weight.sum())
        seen.append((first.weight.item(), second.weight.item()))

    options = {"schedule": lambda step: 1.0, "settings": {}, "progress": False, "clip": 100.0}
    fit(model, losses, [ours, theirs], steps=1, checkpoint=tmp_path / "a.pt", **options)
    assert seen == [(0.5, 1.0), (0.5, 0.75)]  # d/da ab = 1; then d/db ab = 0.5: nothing left over from before


@pytest.mark.parametrize("average", ["none", "ema", "swa"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(numbers, tmp_path, monkeypatch, average):
    how = run.How(average=average, decay=0.9, validations=7)
    run.train("tiny", numbers, tmp_path / "whole", {}, how, progress=False)
    updates = TinySystem.updates

    def interrupted(self, data, step, draw):
        if step == 17:
            signal.raise_signal(signal.SIGINT)
        yield from updates(self, data, step, draw)

    with monkeypatch.context() as patch:
        patch.setattr(TinySystem, "updates", interrupted)
        with pytest.raises(Interrupted):
            run.train("tiny", numbers, tmp_path / "part", {}, how, progress=False)
    assert load_checkpoint(tmp_path / "part" / "checkpoint.pt").step == 18
    assert not (tmp_path / "part" / "model.safetensors").exists()
    with pytest.raises(FileNotFoundError, match="not finished"):
        run.load(tmp_path / "part")
    # Rows that a kill left after the checkpoint, one of them cut off.
    with open(tmp_path / "part" / "log.csv", "a") as file:
        file.write("19,1.0,0.5,7,7\n20,1.0")
    run.train("tiny", numbers, tmp_path / "part", {}, how, progress=False)
    same_run(tmp_path / "whole", tmp_path / "part")


def test_what_a_run_leaves_behind(numbers, tmp_path):
    out = tmp_path / "run"
    measured = run.train(
        "tiny", numbers, out, {"width": 2, "epochs": 160, "batch_size": 60}, run.How(validations=4), progress=False
    )
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["width"] == 2 and config["facts"] == {"count": 60}
    log, held_out = read_log(out / "log.csv"), read_log(out / "log_validation.csv")
    assert log["step"] == list(range(1, 161)) and held_out["step"] == [40, 80, 120, 160]
    assert log["line"][-1] < 0.01 * log["line"][0] and held_out["error"][-1] == measured["error"]
    assert "60 points" in (out / "report.html").read_text()
    system = run.load(out)
    assert isinstance(system, TinySystem) and not system.model.training
    assert list(system.generate(2, seed=1)) == list(run.load(out).generate(2, seed=1))
    best = system.validate(torch.linspace(-1, 1, 60))["error"]
    assert best == pytest.approx(min(held_out["error"]), rel=1e-5)


def test_a_folder_of_another_run_is_refused(numbers, tmp_path):
    out = tmp_path / "run"
    run.train("tiny", numbers, out, {"epochs": 1}, progress=False)
    with pytest.raises(ValueError, match="another epochs; choose another folder"):
        run.train("tiny", numbers, out, {"epochs": 2}, progress=False)
    with pytest.raises(ValueError, match="another seed"):
        run.train("tiny", numbers, out, {"epochs": 1}, run.How(seed=1), progress=False)
    numbers.write_text("1 2 3 4")
    with pytest.raises(ValueError, match="of other data: count"):
        run.train("tiny", numbers, out, {"epochs": 1}, progress=False)
    run.train("tiny", numbers, out, {"epochs": 1}, fresh=True, progress=False)
    (out / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: not the configuration"):
        run.load(out)
    with pytest.raises(FileNotFoundError, match="no run"):
        run.load(tmp_path)


def test_weights_of_another_model_are_named(numbers, tmp_path):
    for width in (2, 3):
        run.train("tiny", numbers, tmp_path / str(width), {"epochs": 1, "width": width}, progress=False)
    (tmp_path / "2" / "model.safetensors").replace(tmp_path / "3" / "model.safetensors")
    with pytest.raises(ValueError, match=r"another model .* line\.weight is \(1, 2\), expected \(1, 3\)"):
        run.load(tmp_path / "3")
    (tmp_path / "3" / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="not a run of this program"):
        run.load(tmp_path / "3")


def test_patience_ends_a_training_that_no_longer_gets_better(tmp_path):
    model = nn.Linear(1, 1)
    found = iter([3.0, 1.0, 2.0, float("nan"), 1.5, 0.5])
    validation = Validation(lambda: {"loss": next(found)}, 2, tmp_path / "best.pt", patience=3)
    options = {"schedule": lambda step: 1.0, "settings": {}, "progress": False, "validation": validation}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    last = fit(
        model, lambda step: model.weight.square().sum(), optimizer, steps=100, checkpoint=tmp_path / "a.pt", **options
    )
    assert last.step == 10 and len(last.validations) == 5
    again = fit(model, lambda step: 1 / 0, optimizer, steps=100, checkpoint=tmp_path / "a.pt", **options)
    assert again.step == 10
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    weight = last.model["weight"].item()
    assert best["weight"].item() == pytest.approx(weight / 0.8**6, rel=1e-4)  # of step 4; SGD multiplies by 0.8


def test_averages_are_what_is_measured_and_kept(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    averager = WeightAverager(model, "swa")
    measured = []
    validation = Validation(lambda: {"loss": -len(measured)} | {"w": measured.append(model.weight.item()) or 0}, 3,
                            tmp_path / "best.pt")  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fit(model, lambda step: model.weight.sum(), optimizer, steps=3, schedule=lambda step: 1.0, settings={},
        checkpoint=tmp_path / "a.pt", validation=validation, averager=averager, progress=False)  # fmt: skip
    # The mean of 0.5, 0 and -0.5, and the last weight; the norm is clipped to 1 - 1e-6.
    assert measured == pytest.approx([0.0], abs=1e-5) and model.weight.item() == pytest.approx(-0.5, abs=1e-5)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["weight"].item() == measured[0]


def test_bfloat16_is_used_and_float16_needs_a_gpu(tmp_path):
    model, seen = nn.Linear(8, 8), []

    def loss(step):
        y = model(torch.ones(2, 8))
        seen.append(y.dtype)
        return y.float().square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"schedule": lambda step: 1.0, "settings": {}, "progress": False, "checkpoint": tmp_path / "a.pt"}
    fit(model, loss, optimizer, steps=2, precision="bfloat16", **options)
    assert seen == [torch.bfloat16] * 2 and model.weight.dtype == torch.float32
    for precision, text in (("float16", "for CUDA"), ("half", "must be one of")):
        with pytest.raises(ValueError, match=text):
            fit(model, loss, optimizer, steps=2, precision=precision, **options)


def test_batches_cover_an_epoch_once_and_are_shared_out():
    whole = Draw(seed=3)
    rows = torch.cat([whole.rows(step, 20, 6) for step in range(4)])
    assert sorted(rows[:20].tolist()) == list(range(20))
    assert rows[20:].tolist() == rows[:4].tolist()
    assert not torch.equal(whole.rows(0, 20, 6), whole.rows(4, 20, 6))  # another order in the next epoch
    parts = [Draw(3, rank, 2).rows(1, 20, 6) for rank in range(2)]
    assert torch.stack(parts, 1).flatten().tolist() == whole.rows(1, 20, 6).tolist()
    assert whole.rows(0, 3, 6).tolist() and len(whole.rows(0, 3, 6)) == 3
    seeds = [
        Draw(seed, rank).generator(step, purpose).initial_seed()
        for seed, rank, step, purpose in itertools.product((0, 1), repeat=4)
    ]
    assert len(set(seeds)) == 16


SCRIPT = """
import sys, pathlib
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
import test_run
from fastnuggets.systems import run
run.find, run.SAVED = lambda name: test_run.{system}, 0.0
how = run.How(validations=3)
run.train("tiny", pathlib.Path({data!r}), pathlib.Path(sys.argv[1]), {settings!r}, how, progress=False)
"""


class SteadySystem(TinySystem):
    """A step does not depend on how many there will be."""

    def schedule(self, step, steps):
        return 1.0


class QuietSystem(TinySystem):
    """No noise and no normalisation: what one process computes of a batch, two can."""

    def loss(self, data, rows, noise=0.0):
        y = self.model["line"](data[rows, None] * torch.arange(1.0, self.settings.width + 1))
        return y, (y - 3 * data[rows, None]).square().mean()

    def updates(self, data, step, draw):
        yield Update("line", self.lines, self.loss(data, draw.rows(step, len(data), 8))[1])


def script(tmp_path, request, numbers, system, settings):
    path, tests = tmp_path / "script.py", request.path.parent
    path.write_text(
        SCRIPT.format(tests=str(tests), root=str(tests.parent), data=str(numbers), system=system, settings=settings)
    )
    return path


def test_two_processes_train_as_one(numbers, tmp_path, request):
    path = script(tmp_path, request, numbers, "QuietSystem", {})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, str(path), str(tmp_path / "two")], env=environment, check=True, timeout=120)
    subprocess.run([sys.executable, str(path), str(tmp_path / "one")], env=environment, check=True, timeout=120)
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert one.step == two.step == 40 and len(two.rng) == 2
    for key in one.model:
        # Sums of float32 in another order; 2e-7 seen after 40 steps.
        torch.testing.assert_close(one.model[key], two.model[key], rtol=0, atol=3e-6)
    assert one.losses == pytest.approx(two.losses, abs=1e-5)


def test_kill_leaves_a_run_to_go_on_with(numbers, tmp_path, request, monkeypatch):
    settings = {"epochs": 2000}
    path = script(tmp_path, request, numbers, "SteadySystem", settings)
    process = subprocess.Popen([sys.executable, str(path), str(tmp_path / "killed")])
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    try:
        limit = time.monotonic() + 60
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    step = load_checkpoint(checkpoint).step
    assert 0 < step < 16000
    monkeypatch.setattr(SteadySystem, "steps", lambda self, data: step + 5)
    monkeypatch.setattr(run, "find", lambda name: SteadySystem)
    for name in ("killed", "whole"):
        run.train("tiny", numbers, tmp_path / name, settings, run.How(validations=3), progress=False)
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("killed", "whole"))
    assert all(torch.equal(ours.model[key], theirs.model[key]) for key in ours.model)
    assert ours.losses[:step] != [] and ours.step == theirs.step
