"""AveragedSGD and AveragedAdamW against torch's step and the update apart, and what the fused pass cannot serve."""

import copy
import io

import pytest
import torch
from torch import nn

from fastnuggets import ops
from fastnuggets.training import AveragedAdamW, AveragedSGD, WeightAverager, optimizers

PEERS = {AveragedSGD: torch.optim.SGD, AveragedAdamW: torch.optim.AdamW}
SETTINGS = {AveragedSGD: {"lr": 0.05, "momentum": 0.9}, AveragedAdamW: {"lr": 0.01}}
both = pytest.mark.parametrize("kind", PEERS)


class Net(nn.Module):
    """A BatchNorm, a frozen layer, one that is not always used, an embedding."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embed = nn.Embedding(7, 6, sparse=sparse)
        self.first = nn.Linear(6, 40)
        self.norm = nn.BatchNorm1d(40)
        self.frozen = nn.Linear(40, 40).requires_grad_(False)
        self.other = nn.Linear(40, 40)
        self.last = nn.Linear(40, 3)

    def forward(self, x, other=False):
        h = self.frozen(self.norm(self.first(self.embed(x).mean(1)))).tanh()
        return self.last(self.other(h) if other else h)


class Pair:
    """The same training twice: ours, and torch's optimizer with update() after each step."""

    def __init__(self, kind, *, model=None, average=None, groups=None, sparse=False, **settings):
        average = average or {"mode": "ema", "decay": 0.9}
        self.mine = model if model is not None else Net(sparse)
        self.theirs = copy.deepcopy(self.mine)
        self.average, self.separate = (WeightAverager(m, **average) for m in (self.mine, self.theirs))
        settings = {**SETTINGS[kind], **settings}
        groups = groups or (lambda m: [p for p in m.parameters() if p.requires_grad])
        self.optimizer = kind(groups(self.mine), averager=self.average, **settings)
        self.peer = PEERS[kind](groups(self.theirs), **settings)
        self.calls = 0
        self.fused = 0

    def run(self, steps, between=None, other=lambda step: False):
        counted = optimizers._Fused.run
        for step in range(self.calls, self.calls + steps):
            generator = torch.Generator().manual_seed(step)
            x = torch.randint(7, (8, 2), generator=generator)
            for model, optimizer in ((self.mine, self.optimizer), (self.theirs, self.peer)):
                optimizer.zero_grad()
                model(x, other(step)).square().mean().backward()
                noise = torch.Generator().manual_seed(step)
                for p in model.parameters():
                    if p.grad is not None and not p.grad.is_sparse:  # without feedback, which magnifies roundings
                        p.grad.copy_(torch.randn(p.shape, generator=noise))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    optimizers._Fused, "run", lambda *a: (setattr(self, "fused", self.fused + 1), counted(*a))
                )
                self.optimizer.step()
            self.peer.step()
            self.separate.update()
            if between:
                between()
        self.calls += steps
        return self

    def differ(self):
        """Largest difference of weights, and of averages."""
        states = [m.state_dict() for m in (self.mine, self.theirs)], [self.average.export(), self.separate.export()]
        return [max(float((a[k].double() - b[k].double()).abs().max()) for k in a) for a, b in states]

    def check(self, atol=0.0):
        assert (self.average.count, self.average.calls) == (self.separate.count, self.separate.calls)
        weights, averages = self.differ()
        assert weights <= atol and averages <= atol, (weights, averages)
        mine, theirs = self.optimizer.state_dict(), self.peer.state_dict()
        assert mine["state"].keys() == theirs["state"].keys()
        for key, state in theirs["state"].items():
            assert mine["state"][key].keys() == state.keys()
            for name, value in state.items():
                found = mine["state"][key][name]
                assert found.dtype == value.dtype and found.stride() == value.stride()
                torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


# Measured: 0 for SGD, 1.2e-7 (weights) and 2.4e-7 (averages) for AdamW.
SAME = 1e-6


@both
@pytest.mark.parametrize("mode", ["swa", "ema"])
@pytest.mark.parametrize("extra", [{}, {"weight_decay": 0.1, "maximize": True, "lr": 1e-3}])
def test_100_steps_of_torch(kind, mode, extra):
    pair = Pair(kind, average={"mode": mode}, **extra).run(100)
    pair.check(SAME)
    assert pair.fused == 100
    with pair.average.swapped():
        assert torch.equal(pair.mine.last.weight, pair.average._store.walk.raw["last.weight"])
    assert pair.average.averages["norm.num_batches_tracked"] == 100


@pytest.mark.parametrize("how", [{"momentum": 0.0}, {"dampening": 0.5}, {"nesterov": True}, {"weight_decay": 0.01}])
def test_kinds_of_sgd(how):
    pair = Pair(AveragedSGD, **how).run(20)
    pair.check(SAME)
    assert pair.fused == 20


@both
def test_averages_are_to_the_bit_those_of_the_weights(kind):
    model = Net()
    average = WeightAverager(model, "ema", [0.9, 0.99])
    optimizer = kind(model.parameters(), averager=average, **SETTINGS[kind])
    wanted = [[torch.zeros_like(p) for p in model.parameters()] for _ in range(2)]
    for step in range(20):
        optimizer.zero_grad()
        model(torch.randint(7, (8, 2))).square().mean().backward()
        optimizer.step()
        ops.ema_update_(wanted, list(model.parameters()), [0.9, 0.99] if step else [0.0, 0.0])
    for which in range(2):
        found = average.average(which)
        assert all(torch.equal(found[n], w) for (n, _), w in zip(model.named_parameters(), wanted[which], strict=True))


@both
def test_float64_is_torchs(kind):
    pair = Pair(kind, model=Net().double()).run(50)
    pair.check(2e-15)  # measured 2.2e-16
    assert pair.fused == 50


def groups(model):
    head = [*model.last.parameters()]
    rest = [p for p in model.parameters() if all(p is not h for h in head)]
    return [{"params": rest, "weight_decay": 0.05}, {"params": head, "lr": 0.002}]


@both
def test_groups_and_a_schedule(kind):
    pair = Pair(kind, groups=groups)
    kinds = torch.optim.lr_scheduler.OneCycleLR  # moves the momentum too
    schedules = [kinds(o, max_lr=[0.05, 0.01], total_steps=30) for o in (pair.optimizer, pair.peer)]
    pair.run(30, between=lambda: [schedule.step() for schedule in schedules]).check(SAME)
    assert pair.fused == 30
    assert pair.optimizer.param_groups[0]["lr"] == pair.peer.param_groups[0]["lr"]


@both
def test_parameters_without_gradient_come_and_go(kind):
    pair = Pair(kind).run(30, other=lambda step: step % 7 in (3, 4, 6))
    pair.check(SAME)
    assert pair.fused == 30
    numbers = {float(s["step"]) for s in pair.optimizer.state.values()} if kind is AveragedAdamW else {12.0, 30.0}
    assert numbers == {12.0, 30.0}


@both
@pytest.mark.parametrize("average", [{"start": 4, "every": 3}, {"buffers": "copy"}, {"buffers": "recompute"}])
def test_counters_and_buffers(kind, average):
    pair = Pair(kind, average={"mode": "ema", "decay": 0.5, **average}).run(20)
    pair.check(SAME)
    assert pair.average.count == pair.fused == (6 if "start" in average else 20)


PLAIN = {
    "sparse": {"sparse": True},
    "half": {"model": Net().bfloat16()},
    "mixed": {"average": {"mode": "ema", "dtype": torch.float64}},
    "swag": {"average": {"mode": "swag"}},
    "uncovered": {"average": {"mode": "ema", "exclude": "last.*"}},
    "refuse": {"average": {"mode": "ema", "nonfinite": "refuse"}},
    "tensor": {"lr": torch.tensor(0.01)},
    "differentiable": {"differentiable": True},
}


@both
@pytest.mark.parametrize("why", [*PLAIN, "amsgrad"])
def test_what_the_pass_cannot_serve_is_torchs_step_and_an_update(kind, why):
    if (kind, why) in ((AveragedSGD, "amsgrad"), (AveragedAdamW, "sparse")):
        pytest.skip("torch's has no such thing")
    torch.manual_seed(0)
    if why == "differentiable":
        model = nn.Sequential(nn.Linear(3, 3))
        mine, theirs = copy.deepcopy(model), model
        average, separate = WeightAverager(mine), WeightAverager(theirs)
        for m, a, make in ((mine, average, kind), (theirs, separate, PEERS[kind])):
            optimizer = make(m.parameters(), lr=0.1, differentiable=True, **({"averager": a} if make is kind else {}))
            for p in m.parameters():
                p.requires_grad_(False).grad = torch.ones_like(p)
            optimizer.step()
        separate.update()
        assert all(torch.equal(average.averages[n], separate.averages[n]) for n in average.averages)
        return
    settings = {"amsgrad": True} if why == "amsgrad" else PLAIN[why]
    pair = Pair(kind, **copy.deepcopy(settings)).run(10)
    pair.check(0.0)
    assert pair.fused == 0


@both
def test_settings_and_gradients_may_change_between_steps(kind):
    pair = Pair(kind).run(3)
    for optimizer in (pair.optimizer, pair.peer):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    pair.run(3)
    assert pair.fused == 3
    for optimizer in (pair.optimizer, pair.peer):
        optimizer.param_groups[0]["lr"] = 0.02
    pair.run(3)
    assert pair.fused == 6
    for model, optimizer in ((pair.mine, pair.optimizer), (pair.theirs, pair.peer)):
        optimizer.add_param_group({"params": [model.frozen.requires_grad_().weight], "lr": 0.001})
        optimizer.state.pop(model.last.weight)  # begins anew
    pair.run(3).check(SAME)
    assert pair.fused == 9
    pair.average.nonfinite = pair.separate.nonfinite = "skip"
    pair.run(2).check(SAME)
    assert pair.fused == 9


@pytest.mark.parametrize("first", [0.0, 0.9])
def test_momentum_may_be_switched(first):
    pair = Pair(AveragedSGD, momentum=first).run(3)
    for optimizer in (pair.optimizer, pair.peer):
        optimizer.param_groups[0]["momentum"] = 0.9 - first
    pair.run(3).check(SAME)
    assert pair.fused == 6


@both
def test_states_go_to_torchs_and_back(kind):
    pair = Pair(kind).run(5)
    file = io.BytesIO()
    torch.save(pair.optimizer.state_dict(), file)
    file.seek(0)
    to_torch = torch.load(file, weights_only=True)
    pair.optimizer.load_state_dict(copy.deepcopy(pair.peer.state_dict()))
    pair.peer.load_state_dict(to_torch)
    pair.run(5).check(SAME)
    assert pair.fused == 10


@both
def test_a_state_of_another_memory_layout_is_taken(kind):
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x, other):
            return self.conv(x.float().mean() * torch.ones(2, 3, 4, 4))

    pair = Pair(kind, model=Conv()).run(3)
    states = [copy.deepcopy(o.state_dict()) for o in (pair.optimizer, pair.peer)]
    for model, optimizer, state in zip((pair.mine, pair.theirs), (pair.optimizer, pair.peer), states, strict=True):
        model.to(memory_format=torch.channels_last)
        optimizer.load_state_dict(state)
    pair.average, pair.separate = (WeightAverager(m, "ema") for m in (pair.mine, pair.theirs))
    pair.optimizer = type(pair.optimizer)(pair.mine.parameters(), averager=pair.average, **SETTINGS[kind])
    pair.optimizer.load_state_dict(states[0])
    pair.run(3)
    assert max(pair.differ()) <= SAME and pair.fused == 6
    # Moved after the steps began: the averages have another layout than the weights, and torch steps.
    for model in (pair.mine, pair.theirs):
        model.to(memory_format=torch.contiguous_format)
    pair.run(2)
    assert max(pair.differ()) <= SAME and pair.fused == 6


def test_closures_hooks_and_copies(monkeypatch):
    model = nn.Linear(3, 1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # torch puts hooks around SGD.step from now on
    average = WeightAverager(model)
    optimizer = AveragedSGD(model.parameters(), lr=0.1, averager=average)
    before, after = [], []
    optimizer.register_step_pre_hook(lambda *_: before.append(1))
    optimizer.register_step_post_hook(lambda *_: after.append(average.count))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)  # torch's step
    optimizer.step(closure)
    assert len(before) == 2 and after == [1, 2]
    twin = copy.deepcopy(optimizer)
    assert twin.averager is None
    twin.step()
    assert average.count == 2


def test_update_is_left_to_the_optimizer():
    model = nn.Linear(3, 1)
    average = WeightAverager(model)
    optimizer = AveragedAdamW(model.parameters(), averager=average)
    assert average.updated_by is optimizer
    with pytest.raises(RuntimeError, match=r"AveragedAdamW\.step\(\) updates these averages"):
        average.update()
    with average.swapped(), pytest.raises(RuntimeError, match=r"step\(\) while the model holds averages"):
        optimizer.step()
    assert average.calls == 0
    optimizer.averager = None
    optimizer.step()
    assert average.calls == 0 and average.update()
    again = AveragedAdamW(model.parameters(), averager=average)
    del again
    assert average.update()
    with pytest.raises(TypeError, match="averager must be a WeightAverager, got Linear"):
        AveragedSGD(model.parameters(), averager=model)


def test_a_changed_model_is_an_error_before_the_step():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    average = WeightAverager(model)
    optimizer = AveragedSGD(model.parameters(), lr=0.1, averager=average)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = model[0].weight.detach().clone()
    model.append(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"now also has 2\.bias, 2\.weight"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)
