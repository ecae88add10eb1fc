"""fastnuggets.training's ensembles against members that are kept and averaged by hand."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastnuggets.training import FastGeometricEnsemble, SnapshotEnsemble, WeightAverager, swag_predict, update_bn
from fastnuggets.training.schedules import SWALR, CosineCyclicLR, TriangularCyclicLR

INPUTS = torch.randn(7, 6, generator=torch.Generator().manual_seed(5))
# The mean of a few float32 probabilities; measured at most 6e-8.
ROUNDING = {"rtol": 0, "atol": 2e-7}


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))


def disturb(model):
    """Another model: weights and statistics moved, as by training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.train()
    model(torch.randn(16, 6))


def collected(ensemble, count=3):
    """Fills the ensemble; copies of the members."""
    members = []
    for _ in range(count):
        disturb(ensemble.model)
        ensemble.collect()
        members.append(copy.deepcopy(ensemble.model).eval())
    disturb(ensemble.model)
    return members


@torch.no_grad()
def mean_prediction(members, inputs=INPUTS):
    return torch.stack([member(inputs).softmax(-1) for member in members]).mean(0)


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]


def assert_unchanged(model, before):
    state, flags = before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags


@pytest.fixture(params=["memory", "disk"])
def place(request, tmp_path):
    return {} if request.param == "memory" else {"folder": tmp_path / "members"}


@pytest.mark.parametrize("kind", [SnapshotEnsemble, FastGeometricEnsemble])
def test_mean_of_probabilities(kind, place):
    model = network()
    model[2].eval()
    ensemble = kind(model, **place)
    members = collected(ensemble)
    before = state_of(model)
    assert len(ensemble) == 3
    torch.testing.assert_close(ensemble.predict(INPUTS), mean_prediction(members), **ROUNDING)
    loader = [(x, "label") for x in INPUTS.split(3)]
    torch.testing.assert_close(ensemble.predict_loader(loader), mean_prediction(members), **ROUNDING)
    assert_unchanged(model, before)
    assert not ensemble.predict(INPUTS).requires_grad


def test_on_a_device(device, tmp_path):
    for place in ({}, {"device": "cpu"}, {"folder": tmp_path}):
        ensemble = SnapshotEnsemble(network().to(device), **place)
        with torch.no_grad():
            ensemble.collect()
        alone = copy.deepcopy(ensemble.model).eval()
        expected = alone(INPUTS.to(device)).softmax(-1).detach()
        torch.testing.assert_close(ensemble.predict(INPUTS), expected, rtol=0, atol=0)


def test_limit_keeps_the_last(place):
    ensemble = SnapshotEnsemble(network(), limit=2, **place)
    members = collected(ensemble, 4)
    assert len(ensemble) == 2
    assert ensemble.taken == 4
    torch.testing.assert_close(ensemble.predict(INPUTS), mean_prediction(members[2:]), **ROUNDING)


def test_schedules_say_when(place):
    for kind, schedule, count, ends in (
        (SnapshotEnsemble, lambda o: CosineCyclicLR(o, 24, 3), 25, [8, 16, 24]),
        (FastGeometricEnsemble, lambda o: TriangularCyclicLR(o, 6, 1e-3), 24, [3, 9, 15, 21]),
    ):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ensemble = kind(model, schedule(optimizer), **place)
        taken, rates = [], []
        for step in range(1, count + 1):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if ensemble.update():
                taken.append(step)
            ensemble.schedule.step()
        assert taken == ends
        assert {rates[step - 1] for step in taken} == {min(rates)}
    with pytest.raises(TypeError, match="schedule must be a CosineCyclicLR, got TriangularCyclicLR"):
        SnapshotEnsemble(model, TriangularCyclicLR(optimizer, 4, 0.1))
    with pytest.raises(ValueError, match="needs a schedule"):
        SnapshotEnsemble(model).update()


def test_a_schedule_that_is_done_takes_no_more():
    """In SequentialLR it stays at its lowest rate, and the next one may even start from there."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ensemble = SnapshotEnsemble(model, CosineCyclicLR(optimizer, 8, 2))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ensemble.schedule, SWALR(optimizer, 0.05, 3)], [8])
    taken, at_minimum = [], []
    for step in range(1, 15):
        optimizer.step()
        at_minimum += [step] * ensemble.schedule.at_minimum
        taken += [step] * ensemble.update()
        schedule.step()
    assert taken == [4, 8]
    assert at_minimum == [4, 8, 9]


def test_state_resumes(place, tmp_path):
    """A run that ends and one that goes on from its checkpoint have the same members."""
    ensemble = SnapshotEnsemble(network(), limit=3, **place)
    collected(ensemble, 3)
    torch.save(ensemble.state_dict(), tmp_path / "state.pt")
    later = state_of(ensemble.model)[0]
    collected(ensemble, 1)  # after the checkpoint, and lost; on disk it drops the oldest member
    resumed = SnapshotEnsemble(network(), limit=3, **place)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    whole = [resumed.weights(i) for i in range(3)]
    resumed.model.load_state_dict(later)
    resumed.collect()
    assert resumed.taken == 4
    for i, member in enumerate([*whole[1:], later]):
        found = resumed.weights(i)
        assert found.keys() == member.keys()
        assert all(torch.equal(found[k], member[k]) for k in member)
    assert list(tmp_path.glob("members/.*partial")) == []


def test_members_are_copies():
    ensemble = SnapshotEnsemble(network())
    members = collected(ensemble, 1)
    state = ensemble.state_dict()
    other = SnapshotEnsemble(network())
    other.load_state_dict(state)
    other.weights(0)["0.weight"].zero_()
    disturb(ensemble.model)
    torch.testing.assert_close(ensemble.predict(INPUTS), mean_prediction(members), **ROUNDING)


def test_type_of_the_members(place):
    ensemble = SnapshotEnsemble(network(), dtype=torch.bfloat16, **place)
    members = collected(ensemble)
    kept = ensemble.weights(0)
    assert {k: v.dtype for k, v in kept.items() if v.is_floating_point() and v.dtype != torch.bfloat16} == {
        "1.running_mean": torch.float32,
        "1.running_var": torch.float32,
    }
    for member in members:
        for parameter in member.parameters():
            parameter.data = parameter.data.bfloat16().float()
    torch.testing.assert_close(ensemble.predict(INPUTS), mean_prediction(members), **ROUNDING)


def test_tied_weights(place):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    ensemble = SnapshotEnsemble(model, **place)
    ensemble.collect()
    expected = mean_prediction([copy.deepcopy(model)])
    with torch.no_grad():
        model[0].weight.zero_()
    torch.testing.assert_close(ensemble.predict(INPUTS), expected, **ROUNDING)


def test_other_outputs_and_batches():
    ensemble = SnapshotEnsemble(network())
    members = collected(ensemble)
    expected = torch.stack([member(INPUTS) for member in members]).mean(0).detach()
    found = ensemble.predict({"x": INPUTS}, forward=lambda m, b: m(b["x"]), output=lambda y: y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # measured: the same bits


def test_refreshed_statistics(place):
    batches = list(torch.randn(40, 6).mul(3).split(16))
    ensemble = SnapshotEnsemble(network(), **place)
    members = collected(ensemble)
    before, stale = state_of(ensemble.model), ensemble.predict(INPUTS)
    ensemble.update_bn(batches, progress=False)
    assert_unchanged(ensemble.model, before)
    for member in members:
        update_bn(batches, member)
    found = ensemble.predict(INPUTS)
    torch.testing.assert_close(found, mean_prediction(members), **ROUNDING)
    assert (found - stale).abs().max() > 0.01


def test_the_model_comes_back_after_an_error(place):
    ensemble = SnapshotEnsemble(network(), **place)
    collected(ensemble)
    before = state_of(ensemble.model)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        ensemble.predict(torch.zeros(2, 5))
    assert_unchanged(ensemble.model, before)


def test_errors(tmp_path):
    model = network()
    with pytest.raises(ValueError, match="no member yet"):
        SnapshotEnsemble(model).predict(INPUTS)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        SnapshotEnsemble(model, limit=0)
    with pytest.raises(ValueError, match="dtype must be a floating type"):
        SnapshotEnsemble(model, dtype=torch.int8)
    ensemble = SnapshotEnsemble(model, folder=tmp_path)
    ensemble.collect()
    with pytest.raises(ValueError, match="kept on disk"):
        SnapshotEnsemble(model).load_state_dict(ensemble.state_dict())
    with pytest.raises(ValueError, match="gave no batch"):
        ensemble.predict_loader([])
    with pytest.raises(ValueError, match=r"member 0 does not fit the model: 0.weight$"):
        other = SnapshotEnsemble(nn.Sequential(nn.Linear(3, 5), *model[1:]), folder=tmp_path)
        other.load_state_dict(ensemble.state_dict())
        other.predict(INPUTS)
    path = tmp_path / "snapshot-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"snapshot-00000.safetensors: not a whole safetensors file"):
        ensemble.predict(INPUTS)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="a member of the ensemble is missing"):
        ensemble.load_state_dict(ensemble.state_dict())
    model[4].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"4.weight is not finite"):
        ensemble.collect()
    with pytest.raises(ValueError, match="more batches to one member"):
        ensemble = SnapshotEnsemble(network())
        collected(ensemble, 2)
        lengths = iter((1, 2))
        ensemble.predict_loader(type("Loader", (), {"__iter__": lambda _: iter([INPUTS] * next(lengths))})())


def test_optional_packages_are_imported_where_they_are_used():
    code = "import sys\nfor m in ('tqdm', 'safetensors', 'matplotlib'): sys.modules[m] = None\n"
    code += "import torch, fastnuggets.training as t\n"
    code += "t.update_bn([torch.randn(4, 3)], torch.nn.BatchNorm1d(3))\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def averager(rank=4):
    model = network()
    average = WeightAverager(model, "swag", rank=rank)
    for _ in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        average.update()
    disturb(model)
    return average


def test_swag_prediction():
    """The mean over draws that are made by hand, with the statistics of each; the model and the averages stay."""
    average, batches = averager(), list(torch.randn(40, 6).split(16))
    before = state_of(average.model)
    averages = {k: v.clone() for k, v in average.average().items()}
    found = swag_predict(average, INPUTS.split(3), samples=4, seed=3, bn_loader=batches, progress=False)
    assert_unchanged(average.model, before)
    assert all(torch.equal(v, averages[k]) for k, v in average.average().items())
    draws = []
    with average.swapped() as model:
        for k in range(4):
            average.sample((3 << 20) + k)
            update_bn(batches, model)
            draws.append(copy.deepcopy(model).eval())
    torch.testing.assert_close(found, mean_prediction(draws), **ROUNDING)
    again = swag_predict(average, [INPUTS], samples=4, seed=3, bn_loader=batches, progress=False)
    torch.testing.assert_close(again, found, **ROUNDING)
    other = swag_predict(average, [INPUTS], samples=4, seed=4, bn_loader=batches, progress=False)
    assert (other - found).abs().max() > 0.01


def test_swag_scale_and_errors():
    average = averager()
    still = swag_predict(average, [INPUTS], samples=2, scale=0.0, progress=False)
    with average.swapped() as model:
        torch.testing.assert_close(still, mean_prediction([copy.deepcopy(model).eval()]), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        swag_predict(average, [INPUTS], samples=0)
    before = state_of(average.model)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        swag_predict(average, [INPUTS[:, :2]], samples=2, progress=False)
    assert_unchanged(average.model, before)
