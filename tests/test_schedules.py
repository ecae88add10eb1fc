"""fastnuggets.training.schedules against the papers' formulas, written out here, and against torch's own."""

import math

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from fastnuggets.training import schedules

# Each rate is a handful of float64 operations, of 1e-16 each.
EXACT = {"rel": 1e-12, "abs": 1e-15}


def sgd(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def run(schedule, steps):
    """The rates of that many steps, each [groups]."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return rates


def snapshot(i, a0, T, M):
    L = math.ceil(T / M)
    return a0 / 2 * (math.cos(math.pi * ((i - 1) % L) / L) + 1)


def fge(i, a1, a2, c):
    t = ((i - 1) % c + 1) / c
    return (1 - 2 * t) * a1 + 2 * t * a2 if t <= 0.5 else (2 - 2 * t) * a2 + (2 * t - 1) * a1


def swa(i, a1, a2, c):
    t = ((i - 1) % c + 1) / c
    return (1 - t) * a1 + t * a2


def script(i, lr, last, total):
    t = (i - 1) / total
    return lr if t <= 0.5 else last if t > 0.9 else lr + (last - lr) * (t - 0.5) / 0.4


FORMULAS = {
    "snapshot": (lambda o: schedules.CosineCyclicLR(o, 23, 4), lambda i, lr, k: snapshot(i, lr, 23, 4)),
    "fge": (lambda o: schedules.TriangularCyclicLR(o, 6, [1e-3, 2e-3]), lambda i, lr, k: fge(i, lr, 1e-3 * k, 6)),
    "fge, odd": (lambda o: schedules.TriangularCyclicLR(o, 5, 1e-3, 0.7), lambda i, lr, k: fge(i, 0.7, 1e-3, 5)),
    "swa": (lambda o: schedules.SawtoothCyclicLR(o, 5, 0.01), lambda i, lr, k: swa(i, lr, 0.01, 5)),
    "swa, c = 1": (lambda o: schedules.SawtoothCyclicLR(o, 1, 0.01), lambda i, lr, k: 0.01),
    "script": (lambda o: schedules.FlatLinearFlatLR(o, 20, 0.05), lambda i, lr, k: script(i, lr, 0.05, 20)),
    "curve": (lambda o: schedules.FlatLinearFlatLR(o, 20), lambda i, lr, k: script(i, lr, lr / 100, 20)),
    "anneal": (
        lambda o: schedules.SWALR(o, [0.05, 0.1], 7, "linear"),
        lambda i, lr, k: lr + (0.05 * k - lr) * min(1, (i - 1) / 7),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_closed_form_and_parameter_groups(name):
    make, formula = FORMULAS[name]
    rates = run(make(sgd(0.1, 0.3)), 30)
    for i, pair in enumerate(rates, 1):
        assert pair == pytest.approx([formula(i, 0.1, 1), formula(i, 0.3, 2)], **EXACT), i


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("epochs", [0, 1, 7])
def test_swalr_is_torchs(strategy, epochs):
    options = {"swa_lr": 0.05, "anneal_epochs": epochs, "anneal_strategy": strategy}
    ours, theirs = (
        run(schedules.SWALR(sgd(0.1, 0.01), **options), 15),
        run(swa_utils.SWALR(sgd(0.1, 0.01), **options), 15),
    )
    # torch does not set the constant rate before the first step where there is nothing to anneal.
    skip = 1 if epochs == 0 else 0
    # Their recursion divides by what is left of the way, fifteen times at most: a digit or two of sixteen.
    assert ours[skip:] == [pytest.approx(pair, rel=1e-12) for pair in theirs[skip:]]


@pytest.mark.parametrize("name", FORMULAS)
def test_state_resumes(name):
    make, _ = FORMULAS[name]
    whole = run(make(sgd(0.1, 0.3)), 30)
    first = make(sgd(0.1, 0.3))
    run(first, 11)
    saved, optimizer = first.state_dict(), sgd(0.1, 0.3)
    second = make(optimizer)
    optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(saved)
    assert run(second, 19) == whole[11:]


def test_state_is_plain(tmp_path):
    schedule = schedules.SWALR(sgd(0.1), 0.05)
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["swa_lrs"] == [0.05]


def test_composes_with_sequential():
    """A schedule counts from where it takes over, and SWALR starts from the rate it finds there."""
    optimizer = sgd(0.1)
    schedule = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=0.02),
            schedules.SWALR(optimizer, 0.05, 5, "linear"),
            cyclic := schedules.TriangularCyclicLR(optimizer, 4, 0.001, 0.03),
        ],
        milestones=[8, 15],
    )
    rates, taken = [], []
    for step in range(1, 24):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if cyclic.at_minimum:
            taken.append(step)
        schedule.step()
    start = rates[7]
    assert start < 0.03
    assert rates[8:15] == pytest.approx([start + (0.05 - start) * min(1, k / 5) for k in range(7)], **EXACT)
    assert rates[15:] == pytest.approx([fge(i, 0.03, 0.001, 4) for i in range(1, 9)], **EXACT)
    assert taken == [15 + 2, 15 + 6] == [15 + end for end in cyclic.cycle_ends(8)]


@pytest.mark.parametrize("name", ["snapshot", "fge", "fge, odd", "swa", "swa, c = 1"])
def test_models_are_taken_at_the_lowest_rate(name):
    schedule = FORMULAS[name][0](sgd(0.1, 0.3))
    rates, ends = [], []
    for i in range(1, 31):
        if schedule.at_minimum:
            ends.append(i)
        rates += run(schedule, 1)
    assert ends == schedule.cycle_ends(30)
    assert len(ends) == 30 // schedule.cycle
    for i in ends:
        cycle = rates[(i - 1) // schedule.cycle * schedule.cycle :][: schedule.cycle]
        assert rates[i - 1] == pytest.approx([min(rate) for rate in zip(*cycle, strict=True)], rel=1e-12)


def test_a_rate_that_is_a_tensor():
    """As optimizers want it that are captured in a graph: the tensor stays, its value changes."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name, (make, formula) in FORMULAS.items():
        if "[" in name or name in ("fge", "anneal"):
            continue
        rate = torch.tensor(0.1, dtype=torch.float64)
        optimizer = torch.optim.AdamW([parameter], lr=rate)
        schedule = make(optimizer)
        for i in range(1, 12):
            assert optimizer.param_groups[0]["lr"] is rate
            assert rate.item() == pytest.approx(formula(i, 0.1, 1), **EXACT), (name, i)
            optimizer.step()
            schedule.step()


def test_errors():
    optimizer = sgd(0.1, 0.3)
    for message, make in {
        "one for each of 2 parameter groups, got 3": lambda: schedules.SWALR(optimizer, [1, 2, 3]),
        "swa_lr must be at least 0 and finite, got -1": lambda: schedules.SWALR(optimizer, -1),
        'anneal_strategy must be "cos" or "linear"': lambda: schedules.SWALR(optimizer, 1, anneal_strategy="exp"),
        "cycle must be a whole number of steps, at least 2": lambda: schedules.TriangularCyclicLR(optimizer, 1, 0.1),
        "cycles must be a whole number": lambda: schedules.CosineCyclicLR(optimizer, 10, 0),
        "total_steps must be a whole number": lambda: schedules.FlatLinearFlatLR(optimizer, 2.5),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
