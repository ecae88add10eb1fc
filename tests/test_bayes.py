"""Layers of random weights: against float64 with the key's noise held still, their divergence, models made of them."""

import copy
import gc
import io
import math
import os
import socket
import sys
import traceback
import weakref
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fastnuggets import nn, ops, reference

KEY = torch.tensor([5, 6])
# The noise is float32's, 2.4e-7 of a value at worst. Seen: 1.2e-7 in outputs, 3.1e-7 in gradients.
NEAR = {"rtol": 1e-6, "atol": 1e-6}
SAMPLINGS = ("local", "weight", "flipout")
FAMILIES = {"Bayes": nn.BayesLinear, "Variance": nn.VarianceLinear, "VariationalDropout": nn.VariationalDropoutLinear}

# The name of torch's layer, its arguments, the input's sizes.
SHAPES = {
    "linear": ("Linear", (5, 4), {}, (7, 5)),
    "rows": ("Linear", (5, 4), {"bias": False}, (2, 3, 5)),
    "conv1d": ("Conv1d", (4, 6, 3), {"padding": "same", "dilation": 2, "groups": 2}, (3, 4, 9)),
    "conv2d": ("Conv2d", (4, 6, (3, 2)), {"stride": 2, "padding": 1, "padding_mode": "circular"}, (2, 4, 6, 5)),
    "one image": ("Conv2d", (4, 3, 3), {"padding_mode": "reflect", "padding": 1, "bias": False}, (4, 5, 5)),
    "conv3d": ("Conv3d", (2, 3, 2), {"stride": (1, 2, 1)}, (2, 2, 3, 4, 3)),
}


def made(family, shape, **options):
    """The layer in float64 with a spread of its own for each weight, torch's, and an input."""
    name, args, kwargs, sizes = SHAPES[shape]
    torch.manual_seed(1)
    layer = getattr(nn, family + name)(*args, dtype=torch.float64, **kwargs, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.rand_like(p) - 0.5)
    return layer, getattr(torch.nn, name)(*args, **kwargs), torch.randn(sizes, dtype=torch.float64, requires_grad=True)


def noise(kind, like, i=0):
    return reference.noise(KEY + torch.tensor([0, i]), kind, tuple(like.shape))


def call(plain, x, weight, bias):
    return functional_call(plain, {"weight": weight, **({} if bias is None else {"bias": bias})}, x)


def without_bias(plain, x, weight):
    return call(plain, x, weight, None if plain.bias is None else torch.zeros_like(plain.bias, dtype=x.dtype))


def signed(plain, x, i):
    axes = plain.weight.dim() - 2
    return x * noise("sign", x.detach()[(..., *[slice(0, 1)] * axes)], i)


def bayes(layer, plain, x):
    std, bias_std = (None if s is None else s.exp() for s in (layer.weight_log_std, layer.bias_log_std))
    weight, bias = layer.weight, layer.bias
    if layer.sampling == "local":
        mean = call(plain, x, weight, bias)
        var = without_bias(plain, x**2, std**2) if bias_std is None else call(plain, x**2, std**2, bias_std**2)
        return mean + var.sqrt() * noise("normal", mean)
    change, bias_change = std * noise("normal", std), None
    if bias_std is not None:
        bias_change = bias_std * noise("normal", bias_std, 1)
    if layer.sampling == "weight":
        return call(plain, x, weight + change, bias if bias_std is None else bias + bias_change)
    x_signed = signed(plain, x, 2)
    change = without_bias(plain, x_signed, change) if bias_std is None else call(plain, x_signed, change, bias_change)
    return call(plain, x, weight, bias) + signed(plain, change, 3)


def compare(layer, x, y, expected):
    """Values, and gradients of everything, of a function whose second derivative is not 0."""
    torch.testing.assert_close(y, expected, **NEAR)
    inputs = [x, *layer.parameters()]
    found, known = (torch.autograd.grad((t**3).sum(), inputs, retain_graph=True) for t in (y, expected))
    scale = max(g.abs().max() for g in known)
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a / scale, b / scale, **NEAR)


# --- the layers against their definitions -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("bayesian_bias", [False, True], ids=["bias", "random bias"])
def test_bayes_is_its_definition(shape, sampling, bayesian_bias):
    layer, plain, x = made("Bayes", shape, sampling=sampling, bayesian_bias=bayesian_bias)
    compare(layer, x, layer(x, key=KEY), bayes(layer, plain, x))
    with nn.sampling(layer.eval()):
        compare(layer, x, layer(x, key=KEY), bayes(layer, plain, x))
    torch.testing.assert_close(layer(x), call(plain, x, layer.weight, layer.bias), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["rho", "logvar", "log_std"])
def test_forms_say_the_same_deviation(form):
    torch.manual_seed(1)
    layer = nn.BayesLinear(5, 4, init_std=0.3, form=form, dtype=torch.float64)
    assert layer.state_dict().keys() == {"weight", "bias", f"weight_{form}"}
    torch.testing.assert_close(layer.weight_std, torch.full((4, 5), 0.3, dtype=torch.float64), rtol=1e-14, atol=0)
    expected = reference.kl_normal(layer.weight, torch.full_like(layer.weight, 0.3), "std").sum()
    torch.testing.assert_close(nn.kl(layer), expected, rtol=1e-13, atol=0)
    x = torch.randn(3, 5, dtype=torch.float64)
    for sampling in SAMPLINGS:
        layer.sampling = sampling
        torch.manual_seed(1)
        other = nn.BayesLinear(5, 4, init_std=0.3, sampling=sampling, dtype=torch.float64)
        torch.testing.assert_close(layer(x, key=KEY), other(x, key=KEY), rtol=1e-13, atol=1e-13)


def test_the_first_deviation_is_a_tenth_of_the_bound_of_the_means():
    for layer in (nn.BayesLinear(64, 3), nn.BayesConv2d(4, 2, 4)):
        torch.testing.assert_close(layer.weight_std, torch.full_like(layer.weight, 0.1 / 8), rtol=1e-6, atol=0)
        with torch.no_grad():
            layer.weight.fill_(7)
            layer.weight_log_std.fill_(7)
        layer.reset_parameters()
        assert layer.weight.abs().max() <= 1 / 8
        torch.testing.assert_close(layer.weight_std, torch.full_like(layer.weight, 0.1 / 8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["normal", "bernoulli", "uniform"])
def test_variance_layer_is_its_definition(shape, kind):
    layer, plain, x = made("Variance", shape, noise=kind)
    if kind == "normal":
        # Without the bias, which conv and linear add at an end of their own.
        mean = call(plain, x, torch.zeros_like(layer.weight), layer.bias)
        expected = mean + without_bias(plain, x**2, layer.weight**2).sqrt() * noise("normal", mean)
    else:
        unit = noise("sign", layer.weight) / 2 if kind == "bernoulli" else noise("uniform", layer.weight) - 0.5
        expected = call(plain, x, layer.weight * unit, layer.bias)
    compare(layer, x, layer(x, key=KEY), expected)
    # It draws in eval mode too, until it is told not to.
    compare(layer, x, layer.eval()(x, key=KEY), expected)
    nn.weight_scaling_(layer)
    torch.testing.assert_close(layer.train()(x), call(plain, x, 0 * layer.weight, layer.bias))
    assert nn.kl(layer) == 0


def alphas(layer):
    return layer.log_sigma2 - (layer.weight**2 + 1e-16).log() if layer.alpha == "weight" else layer.log_alpha


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", ["weight", "neuron", "layer"])
def test_variational_dropout_is_its_definition(shape, alpha):
    layer, plain, x = made("VariationalDropout", shape, alpha=alpha, init=-1.0)
    ln_alpha = alphas(layer)
    var = without_bias(plain, x**2, ln_alpha.exp() * (layer.weight**2 + 1e-16))
    mean = call(plain, x, layer.weight, layer.bias)
    compare(layer, x, layer(x, key=KEY), mean + var.sqrt() * noise("normal", mean))
    expected = reference.kl_log_uniform(ln_alpha.expand_as(layer.weight)).sum()
    torch.testing.assert_close(nn.kl(layer), expected, rtol=1e-12, atol=0)
    assert (layer.weight.size(0) == ln_alpha.numel()) is (alpha == "neuron")


def test_outputs_have_the_moments_of_their_weights():
    """Within five deviations of each estimate. Examples that are alike share the noise of a set of weights, and no
    other."""
    x = torch.randn(1, 3).expand(2, 3)
    n = 40_000
    for sampling in SAMPLINGS:
        layer = nn.BayesLinear(3, 1, sampling=sampling, init_std=0.5, bayesian_bias=True)
        if sampling == "local":
            y = layer(x[:1].expand(2 * n, 3)).view(n, 2)
        else:
            y = torch.stack([layer(x).squeeze(1) for _ in range(n // 20)])
        with torch.no_grad():
            z = (y - F.linear(x, layer.weight, layer.bias).squeeze(1)).double() / (
                0.5 * (x[0] ** 2).sum().add(1).sqrt()
            )
        draws = len(z)
        assert z.mean(0).abs().max() < 5 / math.sqrt(draws)
        assert (z.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / draws)
        common = (z[:, 0] * z[:, 1]).mean().item()
        assert abs(common - (sampling == "weight")) < 5 * math.sqrt(2 / draws)


# --- gradients of several forwards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("order", ["one divergence", "each its own"])
def test_several_forwards_before_one_backward(sampling, order):
    """Against finite differences: the peers that keep their noise in the layer's buffer fail this silently."""
    layer, _, x = made("Bayes", "linear", sampling=sampling, bayesian_bias=True)

    def loss():
        torch.manual_seed(3)
        total = 0.0
        for _ in range(3):
            total = total + (layer(x) ** 3).sum()
            if order == "each its own":
                total = total + nn.kl(layer)
        return total + nn.kl(layer)

    parameters = list(layer.parameters())
    slopes = torch.autograd.grad(loss(), parameters)
    for p, slope in zip(parameters, slopes, strict=True):
        along = torch.randn_like(p)
        with torch.no_grad():
            p.add_(along, alpha=1e-4)
            above = loss()
            p.add_(along, alpha=-2e-4)
            below = loss()
            p.add_(along, alpha=1e-4)
        # Seen: 4e-7, of the third derivative.
        torch.testing.assert_close((above - below) / 2e-4, (slope * along).sum(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_parts_have_no_gradient(family):
    for frozen in ("weight", "bias", "all"):
        layer, _, x = made(family, "linear")
        for name, p in layer.named_parameters():
            p.requires_grad_(frozen not in ("all", name))
        (layer(x).sum() + nn.kl(layer)).backward()
        assert {n for n, p in layer.named_parameters() if p.grad is not None} == {
            n for n, _ in layer.named_parameters() if frozen not in ("all", n)
        }


# --- the divergence ---------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """How often a divergence was computed apart from a draw."""
    counted = []
    plain = ops.kl_normal
    monkeypatch.setattr(ops, "kl_normal", lambda *a, **k: counted.append(1) or plain(*a, **k))
    return counted


def closed(layer):
    return sum(
        reference.kl_normal(mean, log_std.exp(), "std", layer.prior_mean, layer.prior_std).sum()
        for mean, log_std in ((layer.weight, layer.weight_log_std), (layer.bias, layer.bias_log_std))
        if log_std is not None
    )


@pytest.mark.parametrize("bayesian_bias", [False, True], ids=["bias", "random bias"])
@pytest.mark.parametrize("sampling", ["local", "weight"])
def test_the_divergence_of_a_forward_is_used_once(sampling, bayesian_bias, passes):
    layer, _, x = made(
        "Bayes", "conv2d", sampling=sampling, bayesian_bias=bayesian_bias, prior_mean=0.2, prior_std=0.75
    )
    each = 1 + bayesian_bias
    for _ in range(2):
        y = layer(x)
        with torch.no_grad():
            assert not nn.kl(layer).requires_grad  # to look at it takes nothing away
        passes.clear()
        found = nn.kl(layer)
        assert not passes
    again = nn.kl(layer)
    assert len(passes) == each
    for k in (found, again):
        torch.testing.assert_close(k, closed(layer), rtol=1e-12, atol=0)
    everything = list(layer.parameters())
    known = torch.autograd.grad((y**2).sum() + closed(layer), everything, retain_graph=True)
    for k in (again, found):
        for a, b in zip(torch.autograd.grad((y**2).sum() + k, everything, retain_graph=True), known, strict=True):
            torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_makes_the_divergence_be_computed_anew(sampling, passes):
    layer, _, x = made("Bayes", "linear", sampling=sampling)

    def changed():
        layer(x)
        with torch.no_grad():
            layer.weight_log_std.add_(0.1)

    def replaced():
        layer(x)
        other = torch.nn.Parameter(layer.weight.detach() + 1)
        with torch.no_grad():
            for _ in range(layer.weight._version):  # the same number
                other.mul_(1)
        layer.weight = other

    def gone_through():
        layer(x).sum().backward()

    def without_gradient():
        with torch.no_grad():
            layer(x)

    def in_eval_mode():
        layer.eval()(x)
        layer.train()

    for before in (changed, replaced, gone_through, without_gradient, in_eval_mode, lambda: None):
        layer.zero_grad()
        before()
        passes.clear()
        k = nn.kl(layer)
        assert len(passes) == 1
        torch.testing.assert_close(k, closed(layer), rtol=1e-12, atol=0)
        grads = torch.autograd.grad(k, [layer.weight, layer.weight_log_std])
        known = torch.autograd.grad(closed(layer), [layer.weight, layer.weight_log_std])
        for a, b in zip(grads, known, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    layer(x)
    with torch.no_grad():
        assert not nn.kl(layer).requires_grad
    layer(x)
    layer.requires_grad_(False)
    layer(x)
    assert not nn.kl(layer).requires_grad


def test_reductions_sum_over_layers_and_shared_weights_count_once():
    first, second = nn.BayesLinear(4, 4, bayesian_bias=True), nn.BayesLinear(4, 4)
    model = torch.nn.Sequential(first, second, torch.nn.Linear(4, 4), nn.VarianceLinear(4, 4), first)
    x = torch.randn(2, 4)
    expected = closed(first) + closed(second)
    for _ in range(2):
        torch.testing.assert_close(nn.kl(model), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(nn.kl(model, reduction="mean"), expected / 36, rtol=1e-6, atol=0)
        model(x)
    second.weight, second.weight_log_std = first.weight, first.weight_log_std
    first.bayesian_bias = False
    model(x)
    torch.testing.assert_close(nn.kl(model[:2]), first.kl(), rtol=1e-6, atol=0)
    drop = nn.ConcreteDropout(torch.nn.Linear(3, 3))
    torch.testing.assert_close(nn.kl(torch.nn.Sequential(drop)), drop.kl(), rtol=0, atol=0)
    assert nn.kl(torch.nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_hold_nothing(family):
    layer, _, x = made(family, "linear")
    layer(x)
    state = set(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert set(other.state_dict()) == state
        torch.testing.assert_close(nn.kl(other), nn.kl(layer), rtol=1e-12, atol=0)
        assert torch.equal(other(x, key=KEY), layer(x, key=KEY))
    with nn.sampling(layer.eval()):
        assert copy.deepcopy(layer).samples


def test_no_more_than_the_last_forward_is_held():
    layer, _, x = made("Bayes", "linear")
    graphs = []
    for _ in range(5):
        layer(x)
        graphs.append(weakref.ref(layer._held._found[1]))
    gc.collect()
    assert [g() is not None for g in graphs] == [False] * 4 + [True]
    held = weakref.ref(layer._held)
    del layer
    gc.collect()
    assert held() is None and graphs[-1]() is None


# --- checkpoints, types, compiled graphs, ranks -----------------------------------------------------------------------


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_checkpoints_draw_the_same_noise_again(reentrant, sampling):
    model = torch.nn.Sequential(
        *(nn.BayesLinear(6, 6, sampling=sampling, bayesian_bias=True), torch.nn.Tanh(), nn.BayesLinear(6, 6))
    ).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(4)
    plain = gradients(model, model(x).square().sum() + nn.kl(model))
    torch.manual_seed(4)
    y = checkpoint(model, x, use_reentrant=reentrant)
    kept = gradients(model, y.square().sum() + nn.kl(model))
    torch.manual_seed(4)
    y, inside = checkpoint(lambda x: (model(x), nn.kl(model)), x, use_reentrant=reentrant)
    both = gradients(model, y.square().sum() + inside)
    for a, *others in zip(plain, kept, both, strict=True):
        for b in others:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # What the forward that was repeated computed may be used too.
    alone = gradients(model, nn.kl(model))
    known = gradients(model, closed(model[0]) + closed(model[2]))
    for a, b in zip(alone, known, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "sampling"), [*(("Bayes", s) for s in SAMPLINGS), ("Variance", ""), ("VariationalDropout", "")]
)
def test_autocast_and_half_weights(dtype, family, sampling):
    """Deviations are of the size of float16's smallest numbers, once squared, and inputs beyond its largest."""
    options = {"sampling": sampling, "init_std": 2e-4} if sampling else {}
    layer = FAMILIES[family](40, 30, bias=False, **options)
    if family == "Bayes":
        torch.nn.init.zeros_(layer.weight)
    x = torch.randn(20, 40) * 500
    exact = layer(x, key=KEY)
    # Seen: 1.9 % of the largest, of rho = -8.5 in bfloat16, and 0.18 % in float16.
    tolerance = 0.03 if dtype == torch.bfloat16 else 0.003
    with torch.autocast("cpu", dtype):
        y = layer(x, key=KEY)
    (y.float().sum() + nn.kl(layer)).backward()
    half = copy.deepcopy(layer).to(dtype)
    z = half(x.to(dtype), key=KEY)
    (z.float().sum() + nn.kl(half)).backward()
    for found, of in ((y, layer), (z, half)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, rtol=0, atol=tolerance * exact.abs().max().item())
        assert all(p.grad.isfinite().all() and p.grad.any() for p in of.parameters())
    if family != "Variance":
        torch.testing.assert_close(half.kl(), layer.kl(), rtol=0.01, atol=0)


def twins():
    torch.manual_seed(2)
    return torch.nn.Sequential(
        nn.BayesLinear(6, 5, bayesian_bias=True),
        torch.nn.Tanh(),
        nn.BayesLinear(5, 4, sampling="weight"),
        torch.nn.Unflatten(1, (2, 2)),
        nn.BayesConv1d(2, 4, 2, sampling="flipout"),
        torch.nn.Flatten(),
        nn.VarianceLinear(4, 3),
        nn.VariationalDropoutLinear(3, 2),
    )


def test_compiled_in_one_graph():
    """By inductor too, which took 10 to 20 s a layer for its compiler."""
    model, x = twins(), torch.randn(7, 6)

    def step(x):
        return model(x).square().sum() + nn.kl(model) / 100

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = []
    for f in (step, compiled):
        model(x)  # what it holds is not the graph's
        torch.manual_seed(5)
        losses.append((f(x), f(x)))
        assert losses[-1][0] != losses[-1][1]
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in (a, b)]
        for g, h in zip(*grads, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-4)


def test_a_compiled_forward_and_the_divergence_outside():
    layer, x = nn.BayesLinear(6, 5), torch.randn(7, 6)
    torch._dynamo.reset()
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        layer(x)  # its divergence must not be taken for the compiled forward's
        with torch.no_grad():
            layer.weight.add_(1)
        layer.zero_grad()
        (forward(x).sum() + nn.kl(forward)).backward()
        torch.testing.assert_close(nn.kl(layer), closed(layer), rtol=1e-6, atol=0)
        assert layer.weight_log_std.grad.all()


def rank_of(rank, port):
    """DDP's gradients are the mean of those that each rank has for itself, with noise of its own."""
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=30), 2, rank)
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        model, alone = twins(), twins()
        ddp = DistributedDataParallel(model, **options)
        for step in range(2):
            found = []
            for net in (ddp, alone):
                torch.manual_seed(10 * rank + step)
                x = torch.randn(7, 6)
                net.zero_grad()
                (net(x).square().sum() + nn.kl(net) / 100).backward()
                found.append([p.grad.clone() for p in net.parameters()])
            for mine, other in zip(*found, strict=True):
                torch.distributed.all_reduce(other)
                torch.testing.assert_close(mine, other / 2, rtol=1e-5, atol=1e-5)
    torch.distributed.barrier()
    os._exit(0)  # at once: to take the group's threads down while the other rank does has been seen to hang


@pytest.mark.skipif(not hasattr(os, "fork") or not torch.distributed.is_available(), reason="processes of POSIX")
def test_ranks_average_the_gradients_of_both_terms(program):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    program(__file__, port)


# --- variational dropout: what it removes -----------------------------------------------------------------------------


def test_a_weight_of_zero_has_finite_gradients():
    layer = nn.VariationalDropoutLinear(3, 2, init=-10.0)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0] = 1.0
    (layer(torch.ones(4, 3)).sum() + nn.kl(layer)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    # The limit of the divergence is 0, ln alpha of the other weight is -10.
    known = reference.kl_log_uniform(torch.tensor(-10.0, dtype=torch.float64))
    torch.testing.assert_close(nn.kl(layer).double(), known, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", ["weight", "neuron"])
def test_removed_weights_stay_removed(alpha):
    layer = nn.VariationalDropoutConv2d(2, 3, 3, padding=1, alpha=alpha)
    with torch.no_grad():
        if alpha == "weight":
            layer.log_sigma2.copy_(layer.weight.square().log() + torch.arange(54.0).view(3, 2, 3, 3) / 9)
        else:
            layer.log_alpha.copy_(torch.tensor([1.0, 3.5, 2.9]).view(3, 1, 1, 1))
    # ln alpha is above 3 from the 28th, which is 27 / 9 = 3 but for rounding, or the second channel.
    removed = 26 / 54 if alpha == "weight" else 1 / 3
    assert abs(layer.sparsity() - removed) <= 1 / 54
    assert layer.sparsity(100.0) == 0
    x, plain = torch.randn(2, 2, 5, 5), layer.eval().to_plain()
    assert type(plain) is torch.nn.Conv2d and not plain.training
    assert (plain.weight == 0).float().mean() == pytest.approx(layer.sparsity())
    assert torch.equal(plain(x), layer(x))
    before = layer.kl()

    layer.prune_()
    kept = layer.kept()
    assert torch.equal(layer.weight != 0, kept) and torch.equal(layer.kept(100.0), kept)
    assert layer.kl() < before
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer.train()(x).square().sum() + nn.kl(layer)).backward()
        assert not layer.weight.grad[~kept].any()
        optimizer.step()
    assert not layer.eval().to_plain().weight[~kept].any()

    fresh = nn.VariationalDropoutConv2d(2, 3, 3, padding=1, alpha=alpha)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.mask, layer.mask)
    assert torch.equal(fresh.eval()(x), layer(x))
    assert torch.equal(fresh.train()(x, key=KEY), layer.train()(x, key=KEY))
    fresh.reset_parameters()
    assert fresh.mask is None and fresh.sparsity(100.0) == 0


def test_kingmas_approximation_holds_alpha_below_one():
    layer, plain, x = made("VariationalDropout", "linear", approximation="kingma")
    with torch.no_grad():
        layer.log_sigma2.fill_(1.0)
    mean, var = (
        call(plain, t, w, b) for t, w, b in ((x, layer.weight, layer.bias), (x**2, layer.weight**2, 0 * layer.bias))
    )
    expected = mean + var.sqrt() * noise("normal", mean)
    torch.testing.assert_close(layer(x, key=KEY), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        nn.kl(layer), 20 * reference.kl_log_uniform(torch.zeros(()).double(), "kingma"), rtol=1e-12, atol=0
    )


# --- whole models -----------------------------------------------------------------------------------------------------


class Odd(torch.nn.Linear):
    pass


def network():
    torch.manual_seed(3)
    head = torch.nn.Linear(8, 8)
    tied = torch.nn.Linear(8, 8, bias=False)
    tied.weight = head.weight
    return torch.nn.Sequential(
        torch.nn.Conv1d(2, 4, 2, dtype=torch.float64), torch.nn.ReLU(), head, tied, Odd(8, 8), torch.nn.Linear(8, 2)
    )


def test_models_become_bayesian_in_place():
    model = network()
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    model[5].weight.requires_grad_(False)
    layers, before = list(model), {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(3, 2, 9, dtype=torch.float64)
    expected = model[0](x)
    optimized = [model[0].weight, model[2].weight]

    found = nn.bayesianize(model, sampling="weight", prior_std=0.5, init_std=0.01, bayesian_bias=True, skip=["1"])
    assert found is model and all(a is b for a, b in zip(model, layers, strict=True))
    assert [type(m).__name__ for m in model] == [
        *("BayesConv1d", "ReLU", "BayesLinear", "BayesLinear", "Odd", "BayesLinear")
    ]
    assert optimized[0] is model[0].weight and optimized[1] is model[2].weight is model[3].weight
    assert model[3].weight_log_std is model[2].weight_log_std
    assert model[0].weight_log_std.dtype == torch.float64
    assert not model[5].weight_log_std.requires_grad and model[5].bias_log_std.requires_grad
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    torch.testing.assert_close(model[5].weight_std, torch.full((2, 8), 0.01), rtol=1e-5, atol=0)
    assert torch.equal(model[0].eval()(x), expected)
    model[2](torch.randn(1, 8))
    assert calls == [1]
    assert nn.bayesianize(model) is model and model[0].prior_std == 0.5  # what is Bayesian is left


def test_a_plain_checkpoint_loads_and_so_does_a_new_one():
    plain = network()
    for prior in ("standard", "weights"):
        model = nn.bayesianize(plain, inplace=False, prior=prior, init_std=lambda w: 0.1 * w.abs(), bayesian_bias=True)
        assert type(plain[2]) is torch.nn.Linear
        torch.testing.assert_close(model[5].weight_std, 0.1 * plain[5].weight.abs(), rtol=1e-5, atol=1e-8)
        rho = model[5].weight_log_std.detach().clone()
        model.load_state_dict({k: v + 1 for k, v in plain.state_dict().items()})
        assert torch.equal(model[5].weight, plain[5].weight + 1)
        assert torch.equal(model[5].weight_log_std, rho)
        (model[2](torch.randn(1, 8)).sum() + nn.kl(model)).backward()
        other = nn.bayesianize(network())
        other = nn.bayesianize(network(), bayesian_bias=True)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(nn.kl(other), nn.kl(model), rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "5.weight"})
    # Of weights at their prior's mean only the deviation is left.
    model = nn.bayesianize(torch.nn.Linear(3, 2), prior="weights", init_std=1.0)
    torch.testing.assert_close(nn.kl(model), torch.zeros(()), rtol=0, atol=1e-6)
    assert torch.equal(model.weight_prior_mean, model.weight)


def test_layers_are_skipped_by_name_and_by_a_function():
    assert type(nn.bayesianize(network(), skip=["0"])[0]) is torch.nn.Conv1d
    model = nn.bayesianize(network(), skip=lambda name, layer: layer.weight.size(0) == 8)
    assert [isinstance(m, nn.BayesLinear) for m in model] == [False] * 5 + [True]


def test_plain_layers_come_back():
    layer = nn.BayesConv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect", groups=2, bias=False).eval()
    x, plain = torch.randn(2, 4, 7, 7), layer.to_plain()
    assert type(plain) is torch.nn.Conv2d
    assert torch.equal(plain(x), layer(x))
    with torch.no_grad():
        plain.weight.zero_()
    assert layer.weight.any()


def test_weight_scaling_turns_off_what_draws():
    model = torch.nn.Sequential(nn.BayesLinear(4, 4), nn.Dropout(0.5), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4))
    x = torch.randn(6, 4)
    assert nn.weight_scaling_(model) is model
    for _ in range(2):
        assert torch.equal(model(x), model(x))
        with nn.sampling(model[:2]) as inner:
            assert torch.equal(inner(x), inner(x))
        model.eval()
    assert not model[0].samples
    model[0].train()
    assert not model[0].samples


def test_sampling_in_eval_mode_is_undone():
    model = torch.nn.Sequential(nn.BayesLinear(4, 4), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4)).eval()
    x = torch.randn(6, 4)
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), nn.sampling(model), nn.sampling(model[0]):
        assert not torch.equal(model(x), model(x))
        assert not model[2].training
        raise KeyError
    assert torch.equal(model(x), model(x))
    assert not any(m.training for m in model)
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_sampling_reaches_into_torchs_transformers():
    """Whose fast path reads weights and calls no layer."""
    model = nn.bayesianize(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    assert type(model.self_attn.out_proj) is not nn.BayesLinear  # of a class of its own
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        with nn.sampling(model):
            assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: nn.BayesLinear(2, 2, sampling="loc"), "sampling must be one of local, weight, flipout, got 'loc'"),
        (lambda: nn.BayesLinear(2, 2, form="std"), "form must be one of log_std, logvar, rho, got 'std'"),
        (lambda: nn.BayesLinear(2, 2, prior_std=0.0), "prior_std must be above 0, got 0.0"),
        (lambda: nn.BayesLinear(2, 2, init_std=-1.0), "init_std must be above 0, got -1.0"),
        (lambda: nn.VarianceLinear(2, 2, noise="gumbel"), "noise must be one of normal, bernoulli, uniform, got 'gumb"),
        (
            lambda: nn.VariationalDropoutLinear(2, 2, alpha="row"),
            "alpha must be one of weight, neuron, layer, got 'row",
        ),
        (
            lambda: nn.VariationalDropoutLinear(2, 2, approximation="x"),
            "approximation must be one of molchanov, kingma, ard, got 'x'",
        ),
        (lambda: nn.kl(torch.nn.Linear(2, 2), reduction="none"), "reduction must be sum or mean, got 'none'"),
        (lambda: nn.bayesianize(network(), prior="mean"), "prior must be standard or weights, got 'mean'"),
        (lambda: nn.bayesianize(network(), skip=["5", "7"]), "skip: model has no layer named 7"),
        (lambda: nn.bayesianize(network(), prior_std=float("nan")), "prior_std must be above 0, got nan"),
    ],
)
def test_errors_name_the_argument(what, message):
    with pytest.raises(ValueError, match=message):
        what()


if __name__ == "__main__":
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            try:
                rank_of(rank, sys.argv[1])
            except Exception:
                traceback.print_exc()
            os._exit(1)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(codes))
