"""Dropout layers, the encoder's head and Monte Carlo predictions: against float64 with the key's noise held still."""

import copy
import math
import os
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastnuggets import nn, reference

KEY = torch.tensor([5, 6])
NEAR = {"rtol": 1e-6, "atol": 1e-6}  # the noise is float32's: 2.0e-7 was the worst seen, 3.5e-7 in gradients


def double(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def concrete(space=0, **options):
    layer = torch.nn.Conv2d(4, 2, 3, groups=2) if space else torch.nn.Linear(6, 3)
    return nn.ConcreteDropout(layer, 0.3, **options).double()


def encoder(**options):
    return nn.GaussianEncoder(6, 4, **options)


LAYERS = {
    "dropout": lambda: nn.Dropout(0.3),
    "gaussian": lambda: nn.GaussianDropout(0.3),
    "row": lambda: nn.StochasticDepth(0.3),
    "batch": lambda: nn.StochasticDepth(0.3, "batch"),
    "concrete": lambda: nn.ConcreteDropout(torch.nn.Linear(6, 6), 0.3),
    "encoder": encoder,
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


def first(out):
    return out[0] if isinstance(out, tuple) else out


def defined(name, x):
    """What the layers are, in differentiable float64."""
    if name == "dropout":
        return x * reference.noise(KEY, "keep", tuple(x.shape), 0.7)
    if name == "gaussian":
        return x * reference.noise(KEY, "gain", tuple(x.shape), math.sqrt(0.3 / 0.7))
    sizes = (len(x) if name == "row" else 1, *[1] * (x.dim() - 1))
    return x * reference.noise(KEY, "keep", sizes, 0.7)


@pytest.mark.parametrize("name", ["dropout", "gaussian", "row", "batch"])
@pytest.mark.parametrize("sizes", [(300, 6), (40, 3, 4, 5)])
def test_masks_by_their_definition(name, sizes):
    x, layer = double(*sizes), LAYERS[name]()
    expected = defined(name, x)
    actual = layer(x, key=KEY)
    torch.testing.assert_close(actual, expected, **NEAR)
    for made, wanted in zip(
        torch.autograd.grad(actual.square().sum(), x), torch.autograd.grad(expected.square().sum(), x), strict=True
    ):
        torch.testing.assert_close(made, wanted, **NEAR)


@pytest.mark.parametrize("sizes", [(50, 6), (5, 4, 7, 6), (4, 7, 6)], ids=str)
def test_concrete_dropout_by_its_definition(sizes):
    space = len(sizes) > 2
    x, layer = double(*sizes), concrete(space)
    noise = reference.noise(KEY, "logistic", (*sizes[:-2], 1, 1) if space else sizes)
    p = torch.sigmoid(layer.logit)
    # The noise's distribution is symmetric, and the mask takes it with the other sign.
    drop = torch.sigmoid((p.log() - (1 - p).log() - noise) / (2 / 3 if space else 0.1))
    expected = layer.layer(x * (1 - drop) / (1 - p))
    actual = layer(x, key=KEY)
    torch.testing.assert_close(actual, expected, **NEAR)
    leaves = [x, layer.logit, layer.layer.weight]
    pairs = zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (actual, expected)), strict=True)
    for made, wanted in pairs:
        torch.testing.assert_close(made, wanted, **NEAR)


@pytest.mark.parametrize("space", [False, True])
def test_concrete_divergence_by_its_definition(space):
    layer = concrete(space, prior_std=0.5)
    p, weight = layer.p, layer.layer.weight
    expected = 4 * weight.square().sum() / (2 * (1 - p))  # 1 / prior_std^2
    expected = expected + (4 if space else 6) * (p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(layer.kl(), expected, rtol=1e-12, atol=1e-12)
    leaves = [layer.logit, weight]
    for a, b in zip(torch.autograd.grad(layer.kl(), leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("logit", [-200.0, -30.0, 30.0])
def test_concrete_dropout_is_finite_at_the_ends(logit):
    layer = nn.ConcreteDropout(torch.nn.Linear(6, 3))
    torch.nn.init.constant_(layer.logit, logit)
    (layer(torch.randn(50, 6)).sum() + layer.kl()).backward()
    assert all(w.grad.isfinite().all() for w in layer.parameters())


def test_concrete_dropout_learns_where_noise_hurts():
    """Where there is something to fit, the noise is trained away; where there is nothing, the prior wins, at 1/2."""
    found = {}
    for signal in (0.0, 1.0):
        torch.manual_seed(0)
        x = torch.randn(100, 20)
        y = signal * x @ torch.randn(20, 1)
        layer = nn.ConcreteDropout(torch.nn.Linear(20, 1), 0.25)
        optimizer = torch.optim.Adam(layer.parameters(), 0.03)
        for _ in range(300):
            optimizer.zero_grad()
            (F.mse_loss(layer(x), y) + layer.kl() / 1000).backward()
            optimizer.step()
        found[signal] = layer.p.item()
    assert found[0.0] > 0.4
    assert found[1.0] < 0.05


@pytest.mark.parametrize("name", ["dropout", "gaussian", "row", "batch"])
def test_moments_and_shares(name):
    """Within 4 standard errors, all elements and draws apart."""
    x = torch.ones(1, 1) if name == "batch" else torch.ones(4000, 1) if name == "row" else torch.ones(100, 100)
    draws = torch.stack([LAYERS[name]()(x) for _ in range(4000 if name == "batch" else 20)]).double().flatten()
    n, variance = draws.numel(), 0.3 / 0.7
    fourth = 3 * variance**2 if name == "gaussian" else 0.3 + 0.7 * (0.3 / 0.7) ** 4
    assert abs(draws.mean() - 1) < 4 * math.sqrt(variance / n)
    assert abs((draws - 1).square().mean() - variance) < 4 * math.sqrt((fourth - variance**2) / n)
    if name != "gaussian":
        assert abs((draws == 0).double().mean() - 0.3) < 4 * math.sqrt(0.21 / n)


def test_stochastic_depth_drops_whole_rows():
    x = torch.randn(200, 3, 4)
    out = nn.StochasticDepth(0.4)(x)
    kept = (out != 0).flatten(1).any(1)
    torch.testing.assert_close(out, torch.where(kept[:, None, None], x / 0.6, 0), rtol=1e-4, atol=0)  # p in 2^-16
    assert 0 < kept.sum() < 200
    whole = [nn.StochasticDepth(0.4, "batch")(x).any().item() for _ in range(20)]
    assert 0 < sum(whole) < 20
    assert not nn.StochasticDepth(1.0)(x).any()


def test_eval_is_the_identity_and_sampling_is_not(layer):
    x = torch.randn(20, 6)
    layer.eval()
    plain = {"concrete": getattr(layer, "layer", None), "encoder": lambda x: layer.linear(x)[:, :4]}
    name = {nn.ConcreteDropout: "concrete", nn.GaussianEncoder: "encoder"}.get(type(layer))
    expected = plain[name](x) if name else x
    before = torch.get_rng_state()
    assert torch.equal(first(layer(x)), expected)
    assert torch.equal(before, torch.get_rng_state())
    with nn.sampling(layer):
        draws = [first(layer(x)) for _ in range(8)]
    assert any(not torch.equal(draw, expected) for draw in draws)
    assert torch.equal(first(layer(x)), expected)
    assert torch.equal(first(nn.weight_scaling_(layer).train()(x)), expected)


def test_key_seed_copy_and_state(layer):
    x = torch.randn(30, 6)
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(first(layer(x, key=KEY)), first(other(x, key=KEY)))
    assert torch.equal(first(layer(x, key=7)), first(layer(x, key=torch.tensor([7, 0]))))
    torch.manual_seed(3)
    draws = [first(layer(x)) for _ in range(20)]
    torch.manual_seed(3)
    assert torch.equal(draws[0], first(layer(x)))
    assert any(not torch.equal(draw, draws[0]) for draw in draws)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_makes_the_same_noise(layer, reentrant):
    def gradients(run):
        torch.manual_seed(4)
        x = torch.randn(30, 6, requires_grad=True)
        layer.zero_grad()
        first(run(x)).square().sum().backward()
        return [x.grad, *(w.grad for w in layer.parameters())]

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compile(layer, training):
    torch._dynamo.reset()
    layer.train(training)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (7, 12):
        grads, outs = [], []
        for run in (compiled, layer):
            x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
            torch.manual_seed(rows)
            outs.append(first(run(x)))
            grads.append(torch.autograd.grad(outs[-1].square().sum(), x)[0])
        torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_autocast_keeps_the_type_of_its_input(layer):
    x = torch.randn(30, 6)
    lowered = isinstance(layer, (nn.ConcreteDropout, nn.GaussianEncoder))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, key=KEY)
        half = layer(x.bfloat16(), key=KEY)
    assert first(out).dtype == (torch.bfloat16 if lowered else torch.float32)
    assert first(half).dtype == torch.bfloat16
    # bfloat16 has a step of 1/128, and the noise is the same for all: 0.006 was the worst seen.
    torch.testing.assert_close(first(half).float(), first(layer(x, key=KEY)), rtol=0.02, atol=0.02)
    if isinstance(out, tuple):
        assert out[1].dtype == half[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay(layer, dtype):
    layer, x = layer.to(dtype), torch.randn(30, 6).to(dtype)
    assert first(layer(x)).dtype == dtype
    if isinstance(layer, nn.ConcreteDropout):
        assert layer.kl().dtype == torch.float32


# --- the encoder's head ---


@pytest.mark.parametrize("form", ["logvar", "log_std", "rho"])
@pytest.mark.parametrize("event_dims", [1, 2])
def test_encoder_by_its_definition(form, event_dims):
    prior = {"prior_mean": torch.full((4,), 0.5), "prior_std": 2.0}
    head, x = encoder(form=form, event_dims=event_dims, **prior).double(), double(7, 5, 6)
    mean, spread = head.linear(x).chunk(2, -1)
    expected = (
        reference.rsample_normal(mean, spread, KEY, form),
        reference.kl_normal(mean, spread, form, 0.5, 2.0, event_dims),
    )
    actual = head(x, key=KEY)
    assert actual[1].shape == (7, 5)[: 3 - event_dims]
    for made, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(made, wanted, **NEAR)
    leaves = [x, *head.parameters()]
    pairs = zip(
        *(torch.autograd.grad(z.sum() + kl.square().sum(), leaves) for z, kl in (actual, expected)), strict=True
    )
    for made, wanted in pairs:
        torch.testing.assert_close(made, wanted, **NEAR)
    head.eval()
    torch.testing.assert_close(head(x)[0], mean)
    torch.testing.assert_close(head(x)[1], expected[1], **NEAR)


@pytest.mark.parametrize("event_dims", [1, 2])
def test_free_bits_are_those_of_the_paper(event_dims):
    """The mean over the rows of sum_j max(free, mean kl_j), and its gradient."""
    torch.manual_seed(1)
    head = encoder(free_bits=0.3, event_dims=event_dims).double()
    x = double(7, 5, 6)
    mean, spread = head.linear(x).chunk(2, -1)
    each = reference.kl_normal(mean, spread, "logvar").flatten(0, 1).mean(0)
    assert 0 < (each < 0.3).sum() < 4, "both sides must be seen"
    expected = each.clamp(min=0.3).sum() * (5 if event_dims == 2 else 1)
    actual = head(x, key=KEY)[1].mean()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(actual, head.linear.weight), torch.autograd.grad(expected, head.linear.weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_prior_that_is_a_tensor_moves_with_the_head():
    head = encoder(prior_mean=torch.zeros(4), prior_std=torch.nn.Parameter(torch.ones(4)))
    assert {"prior_mean", "prior_std"} <= set(head.state_dict())
    head.double()
    assert head.prior_mean.dtype == torch.float64
    head(torch.randn(3, 6, dtype=torch.float64))[1].sum().backward()
    assert head.prior_std.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Dropout(1.5), "p"),
        (lambda: nn.GaussianDropout(1.0), "p"),
        (lambda: nn.StochasticDepth(0.5, "rows"), "mode"),
        (lambda: nn.ConcreteDropout(torch.nn.Linear(2, 2), 0.0), "p"),
        (lambda: nn.ConcreteDropout(torch.nn.Linear(2, 2), temperature=0.0), "temperature"),
        (lambda: nn.ConcreteDropout(torch.nn.Linear(2, 2), prior_std=-1.0), "prior_std"),
        (lambda: encoder(form="std"), "form"),
        (lambda: encoder(event_dims=0), "event_dims"),
        (lambda: encoder(free_bits=math.nan), "free_bits"),
        (lambda: encoder(prior_std=0.0), "prior_std"),
        (lambda: nn.mc_predict(nn.Dropout(), torch.ones(2), 0), "samples"),
        (lambda: nn.mc_predict(nn.Dropout(), torch.ones(2), reduce="sum"), "reduce"),
        (lambda: nn.mc_predict(nn.Dropout(), torch.ones(2), activation="relu"), "activation"),
        (lambda: nn.mc_predict(nn.Dropout(), torch.ones(2), batch_size=0), "batch_size"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        make()


def test_bad_types_are_named():
    with pytest.raises(TypeError, match=r"^layer must be"):
        nn.ConcreteDropout(torch.nn.ReLU())
    with pytest.raises(TypeError, match="the model's output must be a tensor, got tuple"):
        nn.mc_predict(encoder(), torch.randn(3, 6))


# --- Monte Carlo predictions ---


def classifier(drop=nn.Dropout):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), drop(0.5), torch.nn.Linear(32, 3)]
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("drop", [nn.Dropout, torch.nn.Dropout, nn.GaussianDropout])
@pytest.mark.parametrize("activation", [None, "softmax"])
def test_statistics_are_those_of_the_stack(drop, activation):
    model, x = classifier(drop), torch.randn(11, 6)
    torch.manual_seed(1)
    stack = nn.mc_predict(model, x, 30, reduce="none", activation=activation)
    torch.manual_seed(1)
    found = nn.mc_predict(model, x, 30, activation=activation)
    assert stack.shape == (30, 11, 3)
    assert not stack.requires_grad
    stack = stack.double()
    torch.testing.assert_close(found.mean.double(), stack.mean(0), **NEAR)
    torch.testing.assert_close(found.std.double(), stack.std(0), **NEAR)
    if activation is None:
        assert found.entropy is None
        assert found.mutual_information is None
        return
    torch.testing.assert_close(stack.sum(-1), torch.ones(30, 11, dtype=torch.float64), **NEAR)
    entropy = torch.distributions.Categorical(stack.mean(0)).entropy()
    torch.testing.assert_close(found.entropy.double(), entropy, **NEAR)
    mean = torch.distributions.Categorical(stack).entropy().mean(0)
    torch.testing.assert_close(found.mutual_information.double(), entropy - mean, **NEAR)
    assert found.mutual_information.min() > 1e-3


def test_batch_norms_stay_and_every_mode_comes_back():
    model, x = classifier(torch.nn.Dropout), torch.randn(11, 6)
    model.train()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    nn.mc_predict(model, x, 3)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(RuntimeError):
        nn.mc_predict(model, torch.randn(11, 7), 3)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    ours = classifier().eval()
    with pytest.raises(RuntimeError):
        nn.mc_predict(ours, torch.randn(11, 7), 3)
    assert torch.equal(ours(x), ours(x))


def test_batches_and_several_inputs():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.seen = nn.Dropout(0.5), []

        def forward(self, a, b, scale):
            self.seen.append(len(a))
            return scale * (self.drop(a) + b)

    model, a, b = Two(), torch.ones(7, 3), torch.arange(7.0)[:, None]
    stack = nn.mc_predict(model, (a, b, 2.0), 5, reduce="none", batch_size=3)
    assert stack.shape == (5, 7, 3)
    assert set((stack / 2 - b).unique().tolist()) == {0.0, 2.0}
    assert model.seen == [3] * 5 + [3] * 5 + [1] * 5
    found = nn.mc_predict(model, (a, b, 2.0), 50, batch_size=3)
    assert found.mean.shape == found.std.shape == (7, 3)
    torch.testing.assert_close(found.mean, 2 * (1 + b).expand(7, 3), rtol=0, atol=1.2)  # 4 standard errors
    with pytest.raises(ValueError, match="same number of rows"):
        nn.mc_predict(model, (a, b[:4], 2.0), 5, batch_size=3)


def test_one_sample_has_no_spread():
    found = nn.mc_predict(classifier(), torch.randn(4, 6), 1, activation="softmax")
    assert not found.std.any()
    assert not found.mutual_information.any()


@pytest.mark.parametrize("kind", ["transformer", "attention", "recurrent"])
def test_dropout_inside_torch_layers_draws(kind):
    """In eval mode a transformer layer calls a fused kernel, and a forward hook on its dropout sees nothing."""
    if kind == "recurrent":
        model = torch.nn.Sequential(torch.nn.GRU(6, 5, 2, dropout=0.5, batch_first=True))
        x, model.forward = torch.randn(2, 4, 6), lambda x: model[0](x)[0]
    elif kind == "attention":
        model = torch.nn.Sequential(torch.nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True))
        x, model.forward = torch.randn(2, 4, 6), lambda x: model[0](x, x, x)[0]
    else:
        model, x = torch.nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5, batch_first=True), torch.randn(2, 4, 6)
    model.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    found = nn.mc_predict(model, x, 10)
    assert (found.std > 0).float().mean() > 0.9
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(m.training for m in model.modules())
    assert torch.equal(model(x), model(x))


def test_a_model_that_does_not_draw_is_told():
    for model in (torch.nn.Linear(6, 2), torch.nn.GRU(6, 6)):
        model.forward = lambda x: x
        with pytest.warns(UserWarning, match="no module that draws") as warned:
            assert not nn.mc_predict(model, torch.randn(3, 6), 4).std.any()
        assert warned[0].filename == __file__


def every_gradient():
    """DDP gives the gradients of the model alone."""
    from torch.nn.parallel import DistributedDataParallel

    layers = [nn.ConcreteDropout(torch.nn.Linear(6, 6), 0.3), nn.StochasticDepth(0.5, "batch"), nn.Dropout(0.2)]
    model, gradients = torch.nn.Sequential(*layers), []
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    for run in (model, DistributedDataParallel(model)):
        for _ in range(2):  # a parameter without a gradient is an error in the second
            torch.manual_seed(1)
            model.zero_grad()
            (run(torch.ones(40, 6)).square().sum() + layers[0].kl()).backward()
        gradients.append([w.grad.clone() for w in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without process groups")
def test_ddp_sees_every_gradient(program):
    program(__file__)


if __name__ == "__main__":
    try:
        every_gradient()
    except Exception:
        traceback.print_exc()
    os._exit(1)
