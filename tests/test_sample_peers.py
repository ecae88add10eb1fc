"""Layers of Gaussian weights beside bayesian-torch, torchbnn and blitz: equal where they say the same, and where not.

The peers are given our noise and, for flipout, our signs. Where one is wrong the test shows it, so that it is noticed
when it is mended. `make bench` installs them.
"""

import importlib

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.nn import BayesConv2d, BayesLinear, kl
from fastnuggets.ops.sample import FORMS

PEERS = {"bayesian-torch": "bayesian_torch.layers", "torchbnn": "torchbnn", "blitz": "blitz.modules"}


def peer(name):
    pytest.importorskip(PEERS[name].split(".")[0])
    return importlib.import_module(PEERS[name])


def key(call=0, part=0):
    """Of a call; ours takes part 0 for the weights, 1 for the bias, 2 and 3 for the signs of inputs and outputs."""
    return torch.tensor([31, 4 * call + part])


def noise(layer, call=0):
    return [ops.noise("normal", t.shape, key=key(call, i)) for i, t in enumerate((layer.weight, layer.bias))]


@pytest.fixture
def give(monkeypatch):
    """The normals, and the signs, that torch's functions then give in turn."""

    def give(normals, signs=()):
        normals, signs = iter(normals), iter(signs)
        monkeypatch.setattr(torch.Tensor, "normal_", lambda self: self.copy_(next(normals)))
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.copy_(next(signs)))
        monkeypatch.setattr(torch, "randn_like", lambda _: next(normals))

    return give


def make(kind=BayesLinear, sizes=(9, 5), rho=-1.0, **options):
    """One of ours with a random bias; its deviations differ."""
    layer = kind(*sizes, bayesian_bias=True, **{"sampling": "weight", "form": "rho", **options})
    with torch.no_grad():
        for spread in [p for name, p in layer.named_parameters() if name not in ("weight", "bias")]:
            spread.uniform_(rho - 0.5, rho + 0.5)
    return layer


def share(layer, theirs):
    """Gives a peer our parameters; ours and theirs, the weights' before the bias' and means before spreads."""
    if hasattr(theirs, "weight_sampler"):  # blitz
        found = [getattr(s, n) for s in (theirs.weight_sampler, theirs.bias_sampler) for n in ("mu", "rho")]
    elif hasattr(theirs, "weight_log_sigma"):  # torchbnn
        found = [theirs.weight_mu, theirs.weight_log_sigma, theirs.bias_mu, theirs.bias_log_sigma]
    else:
        weight = "kernel" if hasattr(theirs, "mu_kernel") else "weight"
        found = [getattr(theirs, f"{n}_{part}") for part in (weight, "bias") for n in ("mu", "rho")]
    form = layer.form
    mine = [getattr(layer, n) for n in ("weight", f"weight_{form}", "bias", f"bias_{form}")]
    with torch.no_grad():
        for a, b in zip(mine, found, strict=True):
            b.copy_(a)
    return mine, found


def assert_same(output, other, parameters, x):
    """Values, and gradients of all parameters and of the input."""
    # Seen: 9.6e-7 of values up to 33; 3.9e-6 of gradients up to 72.
    torch.testing.assert_close(output, other, rtol=2e-6, atol=2e-6)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    mine, theirs = (
        torch.autograd.grad(y, [*ps, x], cotangent) for y, ps in zip((output, other), parameters, strict=True)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-6)


def truth(layer, prior_std=1.0):
    """KL to N(0, prior_std^2) of each weight and of each bias, float64."""
    normal, zero = torch.distributions.Normal, torch.zeros((), dtype=torch.float64)
    return [
        torch.distributions.kl_divergence(
            normal(mean.detach().double(), F.softplus(rho.detach().double())), normal(zero, prior_std)
        )
        for mean, rho in ((layer.weight, layer.weight_rho), (layer.bias, layer.bias_rho))
    ]


# --- the same ---------------------------------------------------------------------------------------------------------


def test_linear_of_bayesian_torch(give):
    theirs = peer("bayesian-torch").LinearReparameterization(9, 5)
    layer, x = make(), torch.randn(20, 9, requires_grad=True)
    parameters = share(layer, theirs)
    give(noise(layer))
    assert_same(layer(x, key=key()), theirs(x, return_kl=False), parameters, x)


def test_convolution_of_bayesian_torch(give):
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    theirs = peer("bayesian-torch").Conv2dReparameterization(4, 6, 3, **options)
    layer, x = make(BayesConv2d, (4, 6, 3), **options), torch.randn(3, 4, 12, 11, requires_grad=True)
    parameters = share(layer, theirs)
    give(noise(layer))
    assert_same(layer(x, key=key()), theirs(x, return_kl=False), parameters, x)


def signs(x, out, call=0):
    return [ops.noise("sign", size, key=key(call, 2 + i)) for i, size in enumerate((x.shape, (len(x), out)))]


def test_flipout_of_bayesian_torch(give):
    theirs = peer("bayesian-torch").LinearFlipout(9, 5)
    layer, x = make(sampling="flipout"), torch.randn(20, 9, requires_grad=True)
    parameters = share(layer, theirs)
    give(noise(layer), signs(x, 5))
    assert_same(layer(x, key=key()), theirs(x, return_kl=False), parameters, x)


@pytest.mark.parametrize("convolution", [False, True])
def test_torchbnn(convolution, give):
    """Outputs, and the divergence with its gradients."""
    package, form = peer("torchbnn"), {"form": "log_std", "prior_std": 0.5}
    if convolution:
        theirs, layer = package.BayesConv2d(0, 0.5, 4, 6, 3, stride=2), make(BayesConv2d, (4, 6, 3), stride=2, **form)
    else:
        theirs, layer = package.BayesLinear(0, 0.5, 11, 5), make(sizes=(11, 5), **form)
    x = torch.randn(3, 4, 12, 11, requires_grad=True)
    parameters = share(layer, theirs)
    give(noise(layer))
    assert_same(layer(x, key=key()), theirs(x), parameters, x)
    for reduction in ("sum", "mean"):
        mine, other = kl(layer, reduction=reduction), package.BKLLoss(reduction)(theirs)[0]
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=0)
        gradients = (torch.autograd.grad(y, ps) for y, ps in zip((mine, other), parameters, strict=True))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-6)


def test_linear_of_blitz(give):
    theirs = peer("blitz").BayesianLinear(9, 5)
    layer, x = make(), torch.randn(20, 9, requires_grad=True)
    parameters = share(layer, theirs)
    give(noise(layer))
    assert_same(layer(x, key=key()), theirs(x), parameters, x)


# --- not the same: the divergence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LinearReparameterization", "LinearFlipout"])
def test_bayesian_torch_takes_the_mean_of_the_divergence(name):
    """Of the weights, and again of the bias: the bias weighs as much as all weights."""
    theirs = getattr(peer("bayesian-torch"), name)(40, 30)
    layer = make(sizes=(40, 30))
    share(layer, theirs)
    weight, bias = truth(layer)
    assert theirs.kl_loss().item() == pytest.approx((weight.mean() + bias.mean()).item(), rel=1e-6)
    assert kl(layer).item() == pytest.approx((weight.sum() + bias.sum()).item(), rel=1e-6)
    assert kl(layer).item() > 500 * theirs.kl_loss().item()


def test_bayesian_torch_takes_the_variance_for_a_deviation():
    theirs = peer("bayesian-torch").LinearReparameterization(9, 5, prior_variance=4.0)
    layer = make(prior_std=2.0)
    share(layer, theirs)
    for std in (2.0, 4.0):
        mean = sum(part.mean() for part in truth(layer, std)).item()
        assert (theirs.kl_loss().item() == pytest.approx(mean, rel=1e-5)) == (std == 4.0)
    assert kl(layer).item() == pytest.approx(sum(part.sum() for part in truth(layer, 2.0)).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["bayesian-torch", "blitz"])
def test_softplus_of_the_peers_overflows(name):
    """ln(1 + exp(rho)) as it is written: infinite above 88."""
    package = peer(name)
    theirs = package.BayesianLinear(9, 5) if name == "blitz" else package.LinearReparameterization(9, 5)
    layer, x = make(rho=100.0), torch.randn(2, 9)
    share(layer, theirs)
    assert not (theirs(x) if name == "blitz" else theirs(x, return_kl=False)).isfinite().any()
    assert layer(x).isfinite().all()
    assert kl(layer).item() == pytest.approx(sum(part.sum() for part in truth(layer)).item(), rel=1e-6)


def test_blitz_estimates_another_divergence():
    """From one draw; half a nat is taken from each logarithm, and 1e-6 is added to the prior's density."""
    package = peer("blitz")
    theirs = package.BayesianLinear(9, 5)
    share(make(), theirs)
    sampler, normal = theirs.weight_sampler, torch.distributions.Normal
    drawn = sampler.sample()
    exact = normal(sampler.mu, sampler.sigma).log_prob(drawn).sum()
    assert (sampler.log_posterior() - exact).item() == pytest.approx(-45 / 2, abs=1e-4)
    far = torch.full((3,), 20 * 0.1)
    assert normal(0, 0.1).log_prob(far).sum() < -590
    assert theirs.weight_prior_dist.log_prior(far) > -44


def test_blitz_has_every_parameter_twice():
    theirs = peer("blitz").BayesianLinear(9, 5)
    layer = make()
    share(layer, theirs)
    theirs(torch.randn(2, 9)).sum().backward()
    assert sum(p.numel() for p in theirs.parameters()) == 2 * sum(p.numel() for p in layer.parameters())
    assert theirs.weight_mu.data_ptr() == theirs.weight_sampler.mu.data_ptr()
    assert theirs.weight_mu.grad is None


# --- not the same: several forwards before one backward ---------------------------------------------------------------


def loss_of(outputs):
    return sum((y**2).sum() for y in outputs)


def right(layer, x, calls):
    """The gradient of the weights' spread by the definition, with the noise of each call in tensors of its own."""
    to_std = {"rho": F.softplus, "log_std": torch.exp}[layer.form]
    named = {name: p.detach().double() for name, p in layer.named_parameters()}
    weight, spread, bias, bias_spread = (
        named[n.format(layer.form)] for n in ("weight", "weight_{}", "bias", "bias_{}")
    )
    x, spread = x.double(), spread.requires_grad_()
    outputs = []
    for call in range(calls):
        eps, bias_eps = noise(layer, call)
        change, bias_change = to_std(spread) * eps, to_std(bias_spread) * bias_eps
        before, after = signs(x, len(bias), call) if layer.sampling == "flipout" else (1, 1)
        outputs.append(F.linear(x, weight, bias) + after * F.linear(before * x, change, bias_change))
    return torch.autograd.grad(loss_of(outputs), spread)[0]


def wrong_by(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# Arguments before the sizes, options of a call, and how ours does the same; whether they store noise.
LAYERS = {
    "bayesian-torch LinearReparameterization": ((), {"return_kl": False}, {}, True),
    "bayesian-torch LinearFlipout": ((), {"return_kl": False}, {"sampling": "flipout"}, True),
    "blitz BayesianLinear": ((), {}, {}, True),
    "torchbnn BayesLinear": ((0, 1.0), {}, {"form": "log_std"}, False),
}


def layer_of(name, *sizes):
    package, class_ = name.split()
    return getattr(peer(package), class_)(*LAYERS[name][0], *sizes)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("calls", [1, 2])
def test_two_forwards_before_a_backward(name, calls, give):
    """A buffer that the second forward overwrites, by `.data` and so in silence, makes the first's gradient wrong."""
    theirs, (_, options, as_ours, stores) = layer_of(name, 9, 5), LAYERS[name]
    layer, x = make(**as_ours), torch.randn(20, 9)
    (_, mine, *_), (_, other, *_) = share(layer, theirs)
    expected = right(layer, x, calls)

    outputs = [layer(x, key=key(call)) for call in range(calls)]
    assert wrong_by(torch.autograd.grad(loss_of(outputs), mine)[0], expected) < 1e-6  # seen: 1.5e-7, as theirs

    give(
        [t for call in range(calls) for t in noise(layer, call)],
        [t for call in range(calls) for t in signs(x, 5, call)],
    )
    outputs = [theirs(x, **options) for _ in range(calls)]
    error = wrong_by(torch.autograd.grad(loss_of(outputs), other)[0], expected)
    # Seen: 0.53, 0.68 and 0.53.
    assert error > 0.3 if stores and calls == 2 else error < 1e-6


@pytest.mark.parametrize("sampling", ["weight", "local", "flipout"])
def test_two_forwards_of_ours_against_finite_differences(sampling):
    layer, x = make(sampling=sampling).double(), torch.randn(4, 9, dtype=torch.float64)

    def loss(weight, rho):
        parameters = {"weight": weight, "weight_rho": rho}
        return loss_of([functional_call(layer, parameters, (x,), {"key": key(call)}) for call in range(2)])

    assert torch.autograd.gradcheck(loss, (layer.weight, layer.weight_rho))


# --- what is kept for backward ----------------------------------------------------------------------------------------


def kept(function, *given):
    """Bytes of each memory kept for backward that is none of the given tensors' nor a key's."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = function()
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    del result
    return [n for at, n in memory.items() if n > 16 and at not in {t.untyped_storage().data_ptr() for t in given}]


def leaf(*size):
    return (torch.rand(size) + 0.5).requires_grad_()


@pytest.mark.parametrize("form", FORMS)
def test_draws_keep_nothing_beside_their_inputs(form):
    mean, spread = leaf(64, 32), leaf(64, 32)
    for function in (ops.rsample_normal, ops.rsample_normal_kl, ops.kl_normal):
        assert kept(lambda function=function: function(mean, spread, form=form), mean, spread) == []


def test_masks_keep_nothing():
    x = leaf(64, 32)
    for function in (ops.dropout, ops.gaussian_dropout, ops.random_signs):
        assert kept(lambda function=function: function(x)) == []
    assert kept(lambda: ops.rsample("laplace", x, x)) == []


def test_torch_keeps_more():
    mean, logvar = leaf(64, 32), leaf(64, 32)

    def eager():
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return z, 0.5 * (mean * mean + logvar.exp() - 1 - logvar).sum(-1)

    def distributions():
        q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
        return q.rsample(), torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)

    assert len(kept(eager, mean, logvar)) >= 3
    assert len(kept(distributions, mean, logvar)) >= 5
    assert len(kept(lambda: F.dropout(mean), mean)) >= 1


@pytest.mark.parametrize("sampling", ["weight", "local", "flipout"])
def test_layers_keep_one_tensor_of_the_weights_size(sampling):
    """The drawn weights, their variances, or their perturbation."""
    layer, x = make(sizes=(300, 200), sampling=sampling), leaf(20, 300)
    sizes = kept(lambda: (layer(x), kl(layer)), x, *layer.parameters())
    assert sum(size >= 4 * 60_000 for size in sizes) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_peers_keep_more(name):
    theirs, x = layer_of(name, 300, 200), leaf(20, 300)
    sizes = kept(lambda: theirs(x), x, *theirs.parameters())
    assert sum(size >= 4 * 60_000 for size in sizes) >= 3
