"""Trainings with averages that are killed, at any moment and at the worst ones, and go on to the same bits.

That of the command `fastnuggets average` is in test_soup.py.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastnuggets.training import AveragedSGD, WeightAverager, fit, load_checkpoint

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}

# Trains in children that it kills, so that torch is imported once. Nothing here may start a thread before a fork.
KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from fastnuggets.training import AveragedAdamW, WeightAverager, fit, load_checkpoint

STEPS = 24
CASES = {
    "stochastic": ("ema", {"decay": 0.9, "rounding": "stochastic", "seed": 5}),
    "compensated": ("ema", {"decay": [0.9, 0.99], "rounding": "compensated"}),
    "swag": ("swag", {"rank": 4, "start": 3, "every": 2}),
    "fused": ("ema", {"decay": 0.9}),
}

def train(name, path):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name in ("stochastic", "compensated") else torch.float32
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4)).to(dtype)
    mode, how = CASES[name]
    average = WeightAverager(model, mode, **how)
    if name == "fused":
        optimizer = AveragedAdamW(model.parameters(), lr=0.01, averager=average)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def loss(step):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        return (model(x) - x[:, :4]).square().mean()

    # The checkpoint is written after each step.
    fit(model, loss, optimizer, steps=STEPS, schedule=lambda step: 1.0, checkpoint=path, settings={}, every=0.0,
        progress=False, averager=average)

def child(name, path, worst=None):
    pid = os.fork()
    if pid:
        return pid
    if worst:
        moment, left = worst
        module, call = (torch, torch.save) if moment.endswith("save") else (os, getattr(os, moment.split()[1]))
        def dying(*arguments):
            nonlocal left
            left -= 1
            if left == 0 and moment == "half save":  # the writer dies with the file open and its beginning written
                class Breaking:
                    def __init__(self, file): self.file, self.room = file, 3000
                    def write(self, data):
                        self.room -= len(data)
                        if self.room < 0:
                            self.file.write(bytes(data)[:100])
                            self.file.flush()
                            os.kill(os.getpid(), signal.SIGKILL)
                        return self.file.write(data)
                    def flush(self): self.file.flush()
                return call(arguments[0], Breaking(arguments[1]))
            if left == 0 and moment.startswith("before"):
                os.kill(os.getpid(), signal.SIGKILL)
            call(*arguments)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        setattr(module, call.__name__, dying)
    try:
        train(name, path)
        os._exit(0)
    except BaseException as error:
        print(name, repr(error), file=sys.stderr, flush=True)
        os._exit(1)

def ends(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other

torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1)])  # imports for seconds what each child would
chance = random.Random(1)
for name in sys.argv[2:]:
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    began = time.monotonic()
    assert ends(child(name, folder / "whole.pt")) == 0
    whole_run = time.monotonic() - began
    path, kills, before = folder / "parts.pt", 0, 0
    worst = [("half save", 4), ("before fsync", 3), ("before replace", 2), ("after replace", 4)]
    while True:
        pid = child(name, path, worst[kills] if kills < len(worst) else None)
        if len(worst) <= kills < len(worst) + 3:  # at random, more or less when the next tenth of the steps is done
            time.sleep(chance.uniform(0.05, 0.3) * whole_run)
            os.kill(pid, signal.SIGKILL)
        code = ends(pid)
        found = load_checkpoint(path)  # an error if it is not whole
        step = found.step if found else 0
        assert step >= before, (step, before)
        before = step
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        kills += 1
    whole = load_checkpoint(folder / "whole.pt")
    print(json.dumps({"name": name, "kills": kills, "step": step, "count": json.loads(
        bytes(whole.averager["settings"].tolist()))["count"], "same": {
        key: same(getattr(whole, key), getattr(found, key)) for key in ("model", "optimizers", "averager", "losses")}}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")
def test_killed_trainings_end_with_the_same_averages(tmp_path):
    names = {"stochastic": 24, "compensated": 24, "swag": 11, "fused": 24}
    command = [sys.executable, "-c", KILLED, str(tmp_path), *names]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["name"] for report in reports] == list(names)
    for report in reports:
        assert report["kills"] >= 4 and report["step"] == 24, report
        assert report["count"] == names[report["name"]]
        assert report["same"] == dict.fromkeys(("model", "optimizers", "averager", "losses"), True), report


def train(path, steps, *, averaging=True, fused=False):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    average = WeightAverager(model, "ema", 0.9) if averaging or fused else None
    kind, given = (AveragedSGD, {"averager": average}) if fused else (torch.optim.SGD, {})
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9, **given)

    def loss(step):
        return model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean()

    averager = average if averaging else None
    return average, fit(
        model, loss, optimizer, steps=steps, schedule=lambda step: 1.0, checkpoint=path, settings={}, progress=False,
        averager=averager,
    )  # fmt: skip


def test_fit_updates_once_a_step_whoever_does_it(tmp_path):
    found = [train(tmp_path / f"{fused}.pt", 6, fused=fused)[0] for fused in (False, True)]
    assert [average.count for average in found] == [6, 6]
    for name, value in found[0].averages.items():
        torch.testing.assert_close(found[1].averages[name], value, rtol=0, atol=1e-6)  # measured 0
    parts, _ = train(tmp_path / "parts.pt", 4)
    parts, done = train(tmp_path / "parts.pt", 6)
    assert done.step == parts.count == 6
    assert all(torch.equal(parts.averages[name], value) for name, value in found[0].averages.items())


def test_checkpoints_without_averages(tmp_path):
    path = tmp_path / "old.pt"
    train(path, 4, averaging=False)
    state = torch.load(path, weights_only=True)
    assert state.pop("averager") is None
    torch.save(state, path)  # as it was before there were averages
    assert load_checkpoint(path).averager is None
    assert train(path, 5, averaging=False)[1].step == 5
    average, done = train(path, 7)
    assert (done.step, average.count) == (7, 2)
    with pytest.raises(ValueError, match=r"old\.pt: a training with averages: give its averager"):
        train(path, 8, averaging=False)
