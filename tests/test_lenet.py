"""LeNet whose layers are noise: moments of its layers, and what is left when means go and deviations change places."""

import copy

import pytest
import torch
from torch.nn import functional as F

from fastnuggets import nn
from fastnuggets.models.lenet import LAYERS, LeNet, deviations, with_permuted_deviations, without_means

DRAWS = 20_000


def variational(alpha, layer="dense1"):
    model = LeNet({layer: "variational"}, channels=(2, 3), dense=5, alpha=alpha).eval()
    with torch.no_grad():
        for name in ("log_alpha", "log_sigma2"):
            if hasattr(getattr(model, layer), name):
                getattr(getattr(model, layer), name).uniform_(-2, 1)
    return model


def moments(layer, x):
    """Mean and variance of the layer's output for one input, over many rows."""
    rows = x.expand(DRAWS, *x.shape[1:])
    with torch.no_grad(), nn.sampling(layer):
        found = layer(rows).double()
    return found.mean(0), found.var(0)


@pytest.mark.parametrize("alpha", ["layer", "neuron", "weight"])
@pytest.mark.parametrize("name", ["conv2", "dense1"])
def test_without_means_only_the_means_are_gone(alpha, name):
    model = variational(alpha, name)
    layer, zeroed = getattr(model, name), getattr(without_means(model), name)
    assert isinstance(zeroed, nn.VarianceConv2d if name == "conv2" else nn.VarianceLinear)
    w, ln_alpha = layer.weight.detach().double(), layer.ln_alpha().detach().double()
    variances = ln_alpha.exp() * w.square()  # by the definition of alpha
    x = torch.rand(1, 2, 4, 4) if name == "conv2" else torch.rand(1, w.size(1))
    product = (lambda w: F.conv2d(x.double().square(), w, padding=1)) if name == "conv2" else None
    expected = product(variances) if product else x.double().square() @ variances.mT
    mean, var = moments(zeroed, x)
    # 20 000 draws: a mean is off by 0.0071 deviations and a variance by 1 % of itself, standard error; 5 of them.
    assert (mean / expected[0].sqrt()).abs().max() < 0.035
    torch.testing.assert_close(var, expected[0], rtol=0.05, atol=0)
    _, before = moments(layer, x)
    torch.testing.assert_close(before, expected[0], rtol=0.05, atol=0)
    # Nothing else has changed, and the model given is as it was.
    assert isinstance(getattr(model, name), type(layer))
    for other in LAYERS:
        if other != name:
            assert torch.equal(getattr(model, other).weight, getattr(without_means(model), other).weight)


def test_means_go_of_the_layers_named():
    model = LeNet(dict.fromkeys(LAYERS, "variational"), channels=(2, 3), dense=5)
    kinds = [type(getattr(without_means(model, ["conv2", "dense2"]), name)) for name in LAYERS]
    same = (nn.VariationalDropoutConv2d, nn.VarianceConv2d, nn.VariationalDropoutLinear, nn.VarianceLinear)
    assert tuple(kinds) == same
    plain = LeNet()
    assert [type(m) for m in without_means(plain)] == [type(m) for m in plain]


def test_permuted_deviations_are_the_same_ones_elsewhere():
    generator = torch.Generator().manual_seed(0)
    for model in (variational("neuron"), LeNet({"dense1": "variance"}).eval()):
        permuted = with_permuted_deviations(model, generator)
        old, layer = deviations(model.dense1), permuted.dense1
        new = layer.weight_std.detach() if isinstance(layer, nn.BayesLinear) else deviations(layer)
        torch.testing.assert_close(new.flatten().sort().values, old.flatten().sort().values)
        assert not torch.allclose(new, old)
        if isinstance(layer, nn.BayesLinear):
            assert torch.equal(layer.weight, model.dense1.weight)
        assert torch.equal(permuted.conv2.weight, model.conv2.weight)
        assert not permuted.training and not layer.training


def test_state_and_random_numbers_are_left_alone():
    model = variational("layer")
    state = copy.deepcopy(model.state_dict())
    before = torch.get_rng_state()
    without_means(model)
    with_permuted_deviations(model, torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_kinds_are_where_they_were_asked_for():
    x = torch.rand(6, 1, 8, 8)
    for kind, drawing in (("plain", False), ("variational", False), ("variance", True)):
        for name in LAYERS:
            model = LeNet({name: kind}).eval()
            with torch.no_grad():
                assert model(x).shape == (6, 10)
                assert torch.equal(model(x), model(x)) is not drawing  # the variational one in sampling() alone
                with nn.sampling(model):
                    assert torch.equal(model(x), model(x)) is (kind == "plain")
    assert LeNet(size=12)(torch.rand(2, 1, 12, 12)).shape == (2, 10)
    dropping = LeNet(drop=0.5)
    assert dropping.drop.p == 0.5 and not hasattr(LeNet(), "drop")


def test_without_its_noise_a_variance_layer_says_nothing():
    model = nn.weight_scaling_(LeNet({"dense1": "variance"}).eval())
    found = model(torch.rand(5, 1, 8, 8))
    assert torch.equal(found, found[:1].expand(5, -1))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kinds": {"dense3": "plain"}}, "dense3"),
        ({"kinds": {"dense1": "noise"}}, "noise"),
        ({"size": 10}, "size must be a multiple of 4, got 10"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        LeNet(**arguments)
