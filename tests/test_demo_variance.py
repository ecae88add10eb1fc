"""The demo of variance networks: attacks against closed forms, means and deviations that go where they are said to."""

import json

import numpy as np
import pytest
import torch
from test_demo import Page, assert_loads_nothing, without
from torch.nn.functional import cross_entropy

from fastnuggets import cli, demo_variance, nn, report_variance
from fastnuggets.demo_variance import ATTACKED, BASE, DRAWN, NETWORKS, SHARED, Plan, attack
from fastnuggets.models.lenet import LAYERS, LeNet

for package in ("sklearn", "scipy", "tqdm", "matplotlib", "captum"):
    pytest.importorskip(package)

TINY = Plan(
    seeds=2,
    steps=3,
    images=1700,
    averaged=(1, 2, 4),
    attacked=12,
    epsilons=(0.1,),
    passes=2,
    ladder=(1, 2),
    pgd_steps=2,
    channels=(2, 3),
    dense=6,
    watched=3,
    objective=1,
)
TIMES = ("training", "seconds")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with the demo in it, and its result."""
    out, results, write = tmp_path_factory.mktemp("variance"), [], report_variance.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_variance, "QUICK", TINY)
        patch.setattr(report_variance, "write", lambda result, out: results.append(result) or write(result, out))
        assert cli.main(["demo", "variance", "--quick", "--out", str(out)]) == 0
    return out, results[0]


# --- attacks ---


def linear(scale=1.0):
    """A linear model of 16 pixels and 3 classes, as a module of images."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    with torch.no_grad():
        model[1].weight.mul_(scale)
    return model


def loss_gradient(model, images, labels):
    """Of the cross entropy of a linear model, by its closed form: (softmax - one-hot) W."""
    probabilities = model(images).softmax(-1)
    return ((probabilities - torch.eye(3)[labels]) @ model[1].weight).view_as(images).detach()


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_fgsm_is_a_step_along_the_sign_of_the_gradient(scale):
    images, labels = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    model = linear(scale)
    if scale > 1:
        labels = model(images).argmax(-1)  # sure and right: some gradients are below 1e-6
        assert (loss_gradient(model, images, labels).abs().amax((1, 2, 3)) < 1e-6).any()
    # Where a softmax is exactly one-hot there is no gradient, and nothing to go by.
    gradient = loss_gradient(model.double(), images.double(), labels)
    some = gradient.abs() > 0
    found = attack(model, images.double(), labels, 0.05, samples=1)
    torch.testing.assert_close(found, (images + 0.05 * gradient.sign()).clamp(0, 1))
    assert some.any() and found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("steps", [0, 10])
def test_attacks_stay_within_epsilon_and_reach_the_worst_corner(steps):
    # With two classes the sign of a linear model's gradient is the same everywhere: the worst change is known.
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    images, labels = torch.rand(7, 1, 4, 4), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    w = model[1].weight.detach()
    away = (w[1 - labels] - w[labels]).sign().view_as(images)
    found = attack(model, images, labels, 0.1, samples=1, steps=steps)
    torch.testing.assert_close(found, (images + 0.1 * away).clamp(0, 1), atol=1e-6, rtol=0)
    assert (found - images).abs().max() <= 0.1 + 1e-6
    assert cross_entropy(model(found), labels) > cross_entropy(model(images), labels)


def test_the_average_of_probabilities_is_attacked():
    torch.manual_seed(0)
    images = torch.rand(6, 1, 8, 8)
    logs = demo_variance.mean_log_probabilities(LeNet({"dense1": "variance"}).eval(), 7, images)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(6))

    # What it averages over: the same draws, taken one by one.
    class Draws(torch.nn.Module):
        def forward(self, x):
            return table[: len(x)]

    table = torch.randn(12, 3, dtype=torch.float64)
    found = demo_variance.mean_log_probabilities(Draws(), 4, torch.zeros(3, 1, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(found.exp(), table.softmax(-1).view(4, 3, 3).mean(0))


def test_noise_is_on_while_a_network_is_attacked_and_off_afterwards():
    seen = []
    model = LeNet(drop=0.5).eval()
    model.drop.register_forward_hook(
        lambda module, given, out: seen.append(bool((out == 0).sum() > (given[0] == 0).sum()))
    )
    attack(model, torch.rand(4, 1, 8, 8), torch.tensor([1, 2, 3, 4]), 0.1, samples=3)
    assert seen == [True]
    model(torch.rand(4, 1, 8, 8))
    assert seen == [True, False]
    assert all(p.grad is None for p in model.parameters())


# --- what is measured ---


def test_networks_are_what_they_are_called():
    kinds = {name: demo_variance.network(name, TINY) for name in NETWORKS}
    dropping = [name for name, model in kinds.items() if any(isinstance(m, nn.Dropout) for m in model)]
    assert dropping == ["dropout"]
    for name, model in kinds.items():
        found = demo_variance.ln_alphas(model)
        layers = {"every layer": list(LAYERS)}.get(name, ["dense1"] if name in SHARED else [])
        assert list(found) == layers
        assert isinstance(model.dense1, nn.VarianceLinear) == (name == "variance")
    sizes = [kinds[name].dense1.ln_alpha().numel() for name in ("variational", "neuron", "weight")]
    assert sizes == [1, 6, 6 * 12]


def test_objective_by_hand():
    data = demo_variance.load(TINY, 0)
    model = demo_variance.network("variational", TINY).eval()
    with torch.no_grad():
        model.dense1.log_alpha.fill_(-50.0)  # as good as no noise
    ln_alpha = torch.tensor(-50.0, dtype=torch.float64)
    k = (0.63576, 1.87320, 1.48695)
    each = k[0] + 0.5 * torch.log1p((-ln_alpha).exp()) - k[0] * torch.sigmoid(k[1] + k[2] * ln_alpha)
    expected = cross_entropy(model(data.images), data.labels).item() + 6 * 12 * each.item() / len(data.images)
    assert demo_variance.objective(model, data, 2) == pytest.approx(expected, rel=1e-4)
    variance = demo_variance.network("variance", TINY).eval()
    assert demo_variance.objective(variance, data, 1) > 0 and nn.kl(variance) == 0


def test_alpha_grows_and_the_layer_learns():
    plan = Plan(seeds=1, steps=60, watched=5)
    data = demo_variance.load(plan, 0)
    model, seen = demo_variance.train("variational", data, plan, 0, lambda: None)
    found = seen["seen"]["ln alpha"]
    assert found[0] == -5 and found == sorted(found) and found[-1] > -3.5
    assert demo_variance.judge(model, data, (1, 2))["accuracy"][1] > 0.8


def test_splits_are_of_all_images_and_another_each_seed():
    first, second = (demo_variance.load(Plan(seeds=1, steps=1), seed) for seed in (0, 1))
    assert len(first.images) == 1000 and len(first.test_images) == 797
    assert first.images.min() == 0 and first.images.max() == 1
    assert not torch.equal(first.images, second.images)
    whole = torch.cat([first.images, first.test_images]).flatten(1)
    assert torch.equal(
        whole.sum(1).sort().values, torch.cat([second.images, second.test_images]).flatten(1).sum(1).sort().values
    )


# --- the page ---


def test_page(done):
    out, result = done
    text = (out / "variance.html").read_text(encoding="utf-8")
    page = Page(text)
    assert_loads_nothing(page, text, "script")
    assert "nan" not in text.lower()
    assert sum(tag == "svg" for tag, _ in page.tags) == 6
    names = report_variance.NAMES
    rows = {row[0]: row for row in page.rows if len(row) == 10 and row[0] in names.values()}
    assert list(rows) == [names[name] for name in NETWORKS]
    values = [100 * unit["zeroed"]["accuracy"][-1] for unit in result.networks["neuron"]]
    assert rows[names["neuron"]][7] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    figures = json.loads((out / "variance.json").read_text())
    assert figures["networks"]["weight"][1]["mean"] == result.networks["weight"][1]["mean"]
    for unit in figures["attacks"]:
        assert set(unit["by epsilon"]) == set(ATTACKED) and set(unit["ladder"]) == set(DRAWN)
        assert len(unit["by epsilon"][BASE]["pgd"]) == 1 and unit["by epsilon"][BASE]["transfer"] == []


def told(done, **accuracies):
    """The result with other accuracies under attack: kind -> accuracy of the variance layer, all others as 0.5."""
    attacks = []
    for seed in range(4):
        own = {}
        for name in ATTACKED:
            kinds = {kind: [0.5 + 0.001 * seed] for kind in demo_variance.ATTACKS}
            if name == "variance":
                kinds |= {kind: [value + 0.002 * seed] for kind, value in accuracies.items()}
            own[name] = kinds
        ladder = {name: [0.5] * len(TINY.ladder) for name in DRAWN}
        attacks.append({"clean": dict.fromkeys(ATTACKED, 0.9), "by epsilon": own, "ladder": ladder})
    return done[1]._replace(attacks=attacks)


def test_findings_follow_the_figures(done):
    better, masked = told(done, pgd=0.8), told(done, **{"pgd": 0.2, "one draw": 0.7, "transfer": 0.1})
    assert "variance layer more robust" in report_variance._attack_text(better)
    assert "variance layer less robust" in report_variance._attack_text(masked)
    assert "is a mask" in report_variance._ladder_text(masked)
    assert "is a mask" not in report_variance._ladder_text(better._replace(attacks=told(done, pgd=0.5).attacks))
    assert "to: variance layer" in report_variance._attack_text(masked)
    assert "No network is harmed more" in report_variance._attack_text(told(done, pgd=0.5, transfer=0.6))


# --- going on ---


def test_ctrl_c_is_gone_on_from_to_the_same_bits(done, tmp_path, monkeypatch):
    calls, train = [], demo_variance.train

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == len(NETWORKS) + 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(demo_variance, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_variance.run(TINY, tmp_path)
    again = demo_variance.run(TINY, tmp_path)
    assert (again.reused, again.parts) == (1, 2)
    assert len(calls) == 2 * len(NETWORKS) + 2
    for part in ("networks", "attacks"):
        assert repr(without(TIMES, getattr(again, part))) == repr(without(TIMES, getattr(done[1], part)))


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    ticks = []
    demo_variance.compare(TINY, 1, lambda n=1: ticks.append(n))
    assert torch.equal(before, torch.get_rng_state())
    assert sum(ticks) == len(NETWORKS) * TINY.steps + demo_variance._gradients(TINY)


def test_without_captum_it_says_so_at_once(monkeypatch, tmp_path, capsys):
    import fastnuggets.molecules.files as files

    found = files.importlib.import_module
    broken = lambda name: found(name) if "captum" not in name else found("no.such.module")  # noqa: E731
    monkeypatch.setattr(files.importlib, "import_module", broken)
    assert cli.main(["demo", "variance", "--out", str(tmp_path)]) == cli.FAILED
    assert "captum is not installed: pip install 'fastnuggets[demo]'" in capsys.readouterr().err
    assert not any((tmp_path / "variance").glob("*.pt"))
