"""fastnuggets.training's curves against their formulas, autograd through them, and what they are for: a lower loss."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fastnuggets.training import Curve, loss_plane, plot_curve, plot_plane, update_bn

KINDS = [("bezier", 1), ("bezier", 3), ("chain", 1), ("chain", 2), ("bezier", 0)]


def network(dtype=torch.float64, width=5):
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 2)).to(dtype)


def ends(dtype=torch.float64):
    """Two models with weights and statistics of their own."""
    models = []
    for _ in range(2):
        model = network(dtype)
        model(torch.randn(8, 2, dtype=dtype))
        models.append(model)
    return models


def curve_of(kind, bends, dtype=torch.float64):
    """A curve whose bends lie somewhere, not on the line."""
    first, last = ends(dtype)
    curve = Curve(network(dtype), first, last.state_dict(), kind, bends)
    with torch.no_grad():
        for weight in curve.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return curve


def weights_at(curve, t):
    """The paper's formula for one bend, de Casteljau's construction or interpolation for others; by name."""
    points = [dict(zip(curve.names, point, strict=True)) for point in curve.points]

    def between(a, b, s):
        return {name: (1 - s) * a[name] + s * b[name] for name in a}

    if curve.kind == "chain":
        if curve.bends == 1:
            (w1, theta, w2), low = points, t <= 0.5
            return {
                n: 2 * (t * theta[n] + (0.5 - t) * w1[n]) if low else 2 * ((t - 0.5) * w2[n] + (1 - t) * theta[n])
                for n in w1
            }
        piece = min(int(t * (len(points) - 1)), len(points) - 2)
        return between(points[piece], points[piece + 1], t * (len(points) - 1) - piece)
    while len(points) > 1:
        points = [between(a, b, t) for a, b in itertools.pairwise(points)]
    return points[0]


@pytest.mark.parametrize(("kind", "bends"), KINDS)
def test_points(kind, bends):
    curve = curve_of(kind, bends)
    for t in (0.0, 0.13, 1 / 3, 0.5, 0.77, 1.0):
        curve.point_(t)
        expected = weights_at(curve, t)
        for name, parameter in curve.model.named_parameters():
            # float64 rounding of a handful of terms: measured 4.4e-16.
            torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=1e-14, atol=1e-15)
            assert parameter.grad_fn is None
        assert curve.coefficients(t).sum().item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_are_the_models(dtype, device):
    first, last = (model.to(device) for model in ends(dtype))
    curve = Curve(network(dtype).to(device), first, last)
    assert curve.parameters()[0].dtype == torch.float32
    for t, model in ((0.0, first), (1.0, last)):
        curve.point_(t)
        state = model.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in curve.model.state_dict().items()), "buffers, too"


def test_bends_start_on_the_line():
    for kind, bends in KINDS:
        first, last = ends()
        curve = Curve(network(), first, last, kind, bends)
        curve.point_(0.3)
        for a, b, w in zip(first.parameters(), last.parameters(), curve.model.parameters(), strict=True):
            torch.testing.assert_close(w.detach(), (0.7 * a + 0.3 * b).detach(), rtol=1e-14, atol=1e-15)
        assert curve.length().item() == pytest.approx(distance(first, last), rel=1e-12)


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return math.sqrt(sum((x - y).detach().double().square().sum().item() for x, y in pairs))


@pytest.mark.parametrize(("kind", "bends"), KINDS[:-1])
def test_gradients_are_autograds(kind, bends):
    """Through functional_call at w(t) and the norm of w(t); two t together by accumulation."""
    curve = curve_of(kind, bends)
    curve.model.train()
    other = copy.deepcopy(curve.model)  # whose statistics nobody overwrites between forward and backward
    x, label = torch.randn(9, 2, dtype=torch.float64), torch.arange(9) % 2
    total = 0
    for number, t in enumerate((0.21, 0.84)):
        w = weights_at(curve, t)
        value = nn.functional.cross_entropy(functional_call(other, w, x), label)
        total = total + value + 0.05 / 2 * sum(tensor.square().sum() for tensor in w.values())
        curve.point_(t)
        curve.model.zero_grad()
        nn.functional.cross_entropy(curve.model(x), label).backward()
        curve.pull_back_(t, weight_decay=0.05, accumulate=number > 0)
    ours = [weight.grad.clone() for weight in curve.parameters()]
    expected = torch.autograd.grad(total, curve.parameters(), materialize_grads=True)
    assert max(gradient.abs().max() for gradient in expected) > 0.1
    for gradient, autograds in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, autograds, rtol=1e-12, atol=1e-14)  # measured 2.2e-16


def test_frozen_and_unused_parameters():
    curve = curve_of("bezier", 1)
    curve.model[0].weight.requires_grad_(False)
    curve.point_(0.4)
    curve.model[3](torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    curve.pull_back_(0.4)
    gradients = dict(zip(curve.names, [w.grad for w in curve.points[1]], strict=True))
    assert gradients["0.weight"] is None
    assert gradients["0.bias"].count_nonzero() == 0
    torch.testing.assert_close(gradients["3.weight"], torch.full((2, 5), 2 * 0.4 * 0.6, dtype=torch.float64))


def test_fit_is_sgd_on_the_bends():
    """Three steps as in the paper's code: functional_call, the norm of w(t), SGD on the bends, the falling rate."""
    curve = curve_of("chain", 2)
    loader = [(torch.randn(6, 2, dtype=torch.float64), torch.arange(6) % 2) for _ in range(2)]
    other = copy.deepcopy(curve)
    before = {k: v.clone() for k, v in curve.model.state_dict().items()}

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    losses = curve.fit(loss, loader, steps=5, lr=0.1, weight_decay=0.01, seed=7)
    assert all(torch.equal(v, before[k]) for k, v in curve.model.state_dict().items())
    assert curve.model.training
    assert all(parameter.grad is None for parameter in curve.model.parameters())

    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    times = torch.rand(5, generator=torch.Generator().manual_seed(7), dtype=torch.float64).tolist()
    for step, (t, rate) in enumerate(zip(times, (0.1, 0.1, 0.1, 0.1 - 0.099 * 0.25, 0.1 - 0.099 * 0.75), strict=True)):
        optimizer.param_groups[0]["lr"] = rate
        w = weights_at(other, t)
        x, label = loader[step % 2]
        value = nn.functional.cross_entropy(functional_call(other.model, w, x), label)
        assert losses[step] == pytest.approx(value.item(), rel=1e-12)
        optimizer.zero_grad(set_to_none=False)
        (value + 0.01 / 2 * sum(tensor.square().sum() for tensor in w.values())).backward()
        optimizer.step()
    for ours, theirs in zip(curve.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("kind", "bends"), KINDS)
def test_length(kind, bends):
    """Against the sum of 24 000 chords between weights that are written out."""
    curve = curve_of(kind, bends)
    times = torch.linspace(0, 1, 24_001, dtype=torch.float64)
    flat = torch.stack([torch.cat([w.detach().flatten() for w in point]) for point in curve.points])
    path = curve.coefficients(times) @ flat
    lengths = torch.cat([torch.zeros(1), (path.diff(dim=0)).norm(dim=1).cumsum(0)])
    # Measured: at most 3.3e-7 of lengths up to 7 (Bezier), and 1.4e-12 (chains).
    torch.testing.assert_close(curve.length(times), lengths, rtol=1e-6, atol=1e-6)
    even = curve.uniform(9)
    assert even[0] == 0
    assert even[-1] == 1
    torch.testing.assert_close(curve.length(even), lengths[-1] * torch.linspace(0, 1, 9).double(), rtol=1e-6, atol=1e-6)


def test_length_of_nothing():
    model = network()
    curve = Curve(network(), model, model)
    assert curve.length() == 0
    assert torch.equal(curve.uniform(3), torch.tensor([0, 0.5, 1], dtype=torch.float64))


def test_evaluation_refreshes_statistics():
    """At each point those of the point's weights; the model is as it was afterwards."""
    curve = curve_of("bezier", 1)
    batches = list(torch.randn(20, 2, dtype=torch.float64).split(8))
    x = torch.randn(5, 2, dtype=torch.float64)
    curve.model.train()
    before = {k: v.clone() for k, v in curve.model.state_dict().items()}

    def loss(model):
        assert not model.training
        return torch.stack([model(x).square().mean(), model(x).abs().max()])

    found = curve.evaluate(loss, points=[0.0, 0.25, 1.0], bn_loader=batches)
    assert found.loss.shape == (3, 2)
    assert found.t.tolist() == [0, 0.25, 1]
    assert all(torch.equal(v, before[k]) for k, v in curve.model.state_dict().items())
    assert curve.model.training
    other = copy.deepcopy(curve.model)
    with torch.no_grad():
        for name, weight in weights_at(curve, 0.25).items():
            other.get_parameter(name).copy_(weight)
    update_bn(batches, other)
    torch.testing.assert_close(found.loss[1], loss(other.eval()).detach(), rtol=1e-12, atol=0)
    stale = curve.evaluate(loss, points=[0.25])
    assert (stale.loss[0] - found.loss[1]).abs().max() > 0.01
    even = curve.evaluate(loss, points=5, spacing="length")
    torch.testing.assert_close(even.length.diff(), even.length[-1].expand(4) / 4, rtol=1e-5, atol=0)


def test_state_resumes():
    curve = curve_of("bezier", 2)
    ends_of_it = []
    for t in (0.0, 1.0):
        curve.point_(t)
        ends_of_it.append(copy.deepcopy(curve.model))
    other = Curve(copy.deepcopy(curve.model), *ends_of_it, bends=2)
    other.load_state_dict(curve.state_dict())
    for model in (curve, other):
        model.point_(0.3)
    assert all(torch.equal(a, b) for a, b in zip(curve.model.parameters(), other.model.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"state does not fit the model: 1\.0\.bias"):
        curve_of("bezier", 1).load_state_dict(curve.state_dict())


def test_plane():
    """A loss that is the distance from a fourth set of weights, for which every point of the plane is known."""
    models = [network(width=3) for _ in range(3)]
    flats = [nn.utils.parameters_to_vector(m.parameters()).detach() for m in models]
    target = flats[0] + 0.3 * (flats[1] - flats[0]) + 0.4 * (flats[2] - flats[0])

    def loss(model):
        return (nn.utils.parameters_to_vector(model.parameters()) - target).square().sum()

    place = network(width=3)
    before = copy.deepcopy(place.state_dict())
    plane = loss_plane(place, models[0], models[1], models[2].state_dict(), loss, grid=(7, 5), margin=0.5)
    assert all(torch.equal(v, before[k]) for k, v in place.state_dict().items())
    assert plane.loss.shape == (5, 7)
    for i, j in ((0, 1), (0, 2), (1, 2)):  # the plane is drawn true to scale
        apart = (flats[i] - flats[j]).norm().item()
        assert (plane.points[i] - plane.points[j]).norm().item() == pytest.approx(apart, rel=1e-12)
    at = 0.3 * plane.points[1] + 0.4 * plane.points[2]
    for row, y in enumerate(plane.y.tolist()):
        for column, x in enumerate(plane.x.tolist()):
            expected = (x - at[0].item()) ** 2 + (y - at[1].item()) ** 2
            assert plane.loss[row, column].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    extent = plane.points.amax(0) - plane.points.amin(0)
    assert plane.x[0].item() == pytest.approx(plane.points[:, 0].min().item() - 0.5 * extent[0].item(), rel=1e-6)
    with pytest.raises(ValueError, match="must not lie on a line"):
        loss_plane(place, models[0], models[1], models[0], loss)
    with pytest.raises(ValueError, match=r"w2 does not fit the model: 0.weight"):
        loss_plane(place, models[0], network(), models[2], loss)


def test_errors():
    first, last = ends()
    with pytest.raises(ValueError, match=r'kind must be "bezier" or "chain"'):
        Curve(network(), first, last, "spline")
    with pytest.raises(ValueError, match=r"end does not fit the model: 0.weight"):
        state = last.state_dict()
        del state["0.weight"]
        Curve(network(), first, state)
    with pytest.raises(ValueError, match=r"start does not fit the model: 0.weight, 0.bias"):
        Curve(network(width=6), first, last)
    with pytest.raises(ValueError, match="bends must be"):
        Curve(network(), first, last, bends=-1)
    curve = Curve(network(), first, last)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        curve.point_(1.1)
    with pytest.raises(ValueError, match="gave no batch"):
        curve.fit(lambda m, b: 0, [], steps=1)
    with pytest.raises(RuntimeError, match="the loss became nan at step 0"):
        curve.fit(lambda m, b: m(b).sum() * torch.nan, [torch.zeros(3, 2).double()], steps=1)
    with pytest.raises(ValueError, match="nothing to train"):
        Curve(network(), first, last, bends=0).fit(lambda m, b: 0, [], steps=1)
    with pytest.raises(ValueError, match="one bend"):
        curve_of("chain", 2).plane(lambda m: 0.0)


def moons(count=240):
    """Two interleaved half circles [count, 2] and their labels."""
    generator = torch.Generator().manual_seed(4)
    angle = torch.rand(count, generator=generator) * math.pi
    label = torch.arange(count) % 2
    side = 1 - 2 * label
    points = torch.stack([side * angle.cos() + label, side * angle.sin() + 0.5 * label], 1)
    return points + 0.1 * torch.randn(count, 2, generator=generator), label


def trained(seed, x, label):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def two_optima():
    x, label = moons()

    def loss(model, batch=None):
        return nn.functional.cross_entropy(model(x), label)

    return trained(1, x, label), trained(2, x, label), loss


@pytest.mark.parametrize("kind", ["bezier", "chain"])
def test_two_optima_are_joined_by_a_curve_of_low_loss(two_optima, kind):
    first, last, loss = two_optima
    model = copy.deepcopy(first)
    line = Curve(model, first, last, bends=0).evaluate(loss, points=31)
    curve = Curve(model, first, last, kind)
    losses = curve.fit(loss, [0], steps=600, lr=0.05, weight_decay=0.0, progress=False)
    found = curve.evaluate(loss, points=31)
    ends_loss = max(found.loss[0], found.loss[-1])
    # Measured: 0.002 at the ends, 0.37 on the line, 0.022 (Bezier) and 0.011 (chain) on the curve; over three pairs
    # of models at most 0.22 of the line's.
    assert ends_loss < 0.01
    assert line.loss.max() > 0.2
    assert found.loss.max() < 0.3 * line.loss.max()
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])


def test_pictures(two_optima, tmp_path):
    pytest.importorskip("matplotlib")
    first, last, loss = two_optima
    curve = Curve(copy.deepcopy(first), first, last)
    with torch.no_grad():
        for weight in curve.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    line = Curve(copy.deepcopy(first), first, last, bends=0)
    axes = plot_curve({"line": line.evaluate(loss, points=7), "curve": curve.evaluate(loss, points=7)}, over="length")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["line", "curve"]
    plane = curve.plane(lambda m: torch.stack([loss(m), loss(m) * 2]), grid=9)
    torch.testing.assert_close(plane.path[[0, -1]], plane.points[:2])
    flats = [torch.cat([w.detach().double().flatten() for w in point]) for point in curve.points]
    middle = curve.coefficients(0.5) @ torch.stack(flats)
    assert plane.path[30].norm().item() == pytest.approx((middle - flats[0]).norm().item(), rel=1e-9)
    axes = plot_plane(plane, column=1)
    axes.figure.savefig(tmp_path / "plane.png")
    assert (tmp_path / "plane.png").stat().st_size > 5000
    plane.loss[0, 0] = torch.inf
    plot_plane(plane)
    plane.loss.fill_(torch.nan)
    with pytest.raises(ValueError, match="finite nowhere"):
        plot_plane(plane)
