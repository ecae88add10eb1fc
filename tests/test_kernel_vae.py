"""Models of kernels against a linear one, whose density is known; the deep weight prior; harvest and initialisation."""

import copy
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from fastnuggets import nn, ops, reference
from fastnuggets.models import KernelVAE
from fastnuggets.models.kernel_vae import Normal

KEY = torch.tensor([5, 7])
SIZE, LATENT, NOISE = 3, 2, 0.3


class Linear(KernelVAE):
    """w = A z + b + noise, with columns of A that are orthogonal: the posterior of z has independent components."""

    def __init__(self, wrong=0.0):
        super().__init__(SIZE, latent=LATENT, hidden=2)
        self.double()
        generator = torch.Generator().manual_seed(3)
        a = torch.linalg.qr(torch.randn(9, LATENT, dtype=torch.float64, generator=generator))[0]
        self.a, self.wrong = a * torch.tensor([0.8, 0.5]), wrong
        self.b = 0.2 * torch.randn(9, dtype=torch.float64, generator=generator)

    def encode(self, w):
        var = 1 / (1 + self.a.square().sum(0) / NOISE**2)
        mean = var * ((w.flatten(1) - self.b) @ self.a) / NOISE**2
        return Normal(mean + self.wrong, var.expand_as(mean) * (1 + self.wrong))

    def decode(self, z):
        mean = (z @ self.a.mT + self.b).view(-1, SIZE, SIZE)
        return Normal(mean, torch.full_like(mean, NOISE**2))

    def truth(self):
        return MultivariateNormal(self.b, self.a @ self.a.mT + NOISE**2 * torch.eye(9, dtype=torch.float64))


def kernels(n=40, seed=0):
    return 0.5 * torch.randn(n, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(size=3, **options):
    torch.manual_seed(0)
    return KernelVAE(size, **{"latent": 2, "hidden": 3, "scale": 0.2, **options}).double()


# --- the model of kernels ---------------------------------------------------------------------------------------------


def test_importance_bound_of_the_exact_posterior_is_the_truth():
    """Every sample then says p(w), whatever z is."""
    w = kernels()
    found = Linear().importance_bound(w, 3, key=KEY)
    torch.testing.assert_close(found, Linear().truth().log_prob(w.flatten(1)))


def test_bounds_of_a_wrong_posterior_are_below_the_truth_and_rise_to_it():
    vae, w = Linear(wrong=0.3), kernels(1).repeat(4000, 1, 1)
    truth = vae.truth().log_prob(w[:1].flatten(1)).item()
    exact, wrong = Linear().encode(w[:1]), vae.encode(w[:1])
    gap = (
        (exact.var / wrong.var).log() + (wrong.var + (wrong.mean - exact.mean) ** 2) / exact.var - 1
    ).sum().item() / 2
    once = -vae.bound(w, key=KEY).loss
    assert abs(once.mean().item() - (truth - gap)) < 4 * once.std().item() / len(w) ** 0.5
    many = [vae.importance_bound(w, n, key=KEY).mean().item() for n in (2, 10, 100)]
    assert truth - gap < many[0] < many[1] < many[2] < truth + 1e-3


def test_bound_is_its_definition():
    """Of a network: one z, by torch.distributions."""
    vae, w = small(5), 0.2 * torch.randn(6, 5, 5, dtype=torch.float64)
    posterior = torch.distributions.Normal(vae.encode(w).mean, vae.encode(w).var.sqrt())
    z = posterior.loc + posterior.scale * reference.noise(KEY, "normal", (6, 2))
    mean, var = vae.decode(z)
    found = vae.bound(w, key=KEY)
    likelihood = torch.distributions.Normal(mean, var.sqrt()).log_prob(w).sum((1, 2))
    # The noise is float32's. Seen: 3e-7 of the likelihood.
    torch.testing.assert_close(found.likelihood, likelihood, rtol=1e-5, atol=1e-5)
    standard = torch.distributions.Normal(torch.zeros_like(z), 1.0)
    torch.testing.assert_close(found.kl, torch.distributions.kl_divergence(posterior, standard).sum(1))
    torch.testing.assert_close(found.loss, found.kl - found.likelihood)


@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_sizes(size):
    vae, w = small(size), torch.zeros(4, size, size, dtype=torch.float64)
    assert vae.encode(w).mean.shape == (4, 2) and vae.decode(torch.zeros(4, 2).double()).var.shape == w.shape
    assert vae.sample(5, key=1).shape == (5, size, size)


@pytest.mark.parametrize(
    ("size", "latent", "hidden", "encoder", "decoder"),
    [
        (7, 2, 32, [(1, 32), (32, 64), (64, 64), (64, 4)], [(2, 64), (64, 64), (64, 32), (32, 2)]),
        (
            5,
            4,
            64,
            [(1, 64), (64, 64), (64, 128), (128, 128), (128, 8)],
            [(4, 128), (128, 128), (128, 128), (128, 64), (64, 2)],
        ),
    ],
)
def test_published_networks(size, latent, hidden, encoder, decoder):
    vae = KernelVAE(size, latent=latent, hidden=hidden)
    for network, widths in ((vae.encoder, encoder), (vae.decoder, decoder)):
        assert [(m.in_channels, m.out_channels) for m in network if hasattr(m, "in_channels")] == widths


def test_samples_have_the_moments_of_the_model():
    """Seen: 0.006 and 0.008."""
    drawn = Linear().sample(20000, key=KEY).flatten(1)
    truth = Linear().truth()
    torch.testing.assert_close(drawn.mean(0), truth.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.T.cov(), truth.covariance_matrix, rtol=0, atol=0.03)
    clean = Linear().sample(20000, noise=False, key=KEY).flatten(1)
    known = truth.covariance_matrix - NOISE**2 * torch.eye(9)
    torch.testing.assert_close(clean.T.cov(), known, rtol=0, atol=0.03)
    # z is the same; what is left is the noise.
    assert (drawn - clean).std().item() == pytest.approx(NOISE, rel=0.01)


def test_scale_is_that_of_the_kernels():
    one, w = small(scale=1.0), kernels(10)
    other = small(scale=0.1)
    shift = 9 * math.log(10)
    torch.testing.assert_close(other.bound(0.1 * w, key=KEY).loss, one.bound(w, key=KEY).loss - shift)
    torch.testing.assert_close(other.sample(3, key=KEY), 0.1 * one.sample(3, key=KEY))


def test_what_is_learned_is_more_probable():
    """Smooth kernels: after a short training held-out ones are more probable than under a Gaussian as wide as they."""
    torch.manual_seed(1)
    places = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    mix = torch.linalg.cholesky((-0.5 * torch.cdist(places, places) ** 2).exp() + 0.01 * torch.eye(9))
    w = (0.1 * torch.randn(1000, 9) @ mix.T).view(-1, 3, 3)
    vae = KernelVAE(3, latent=4, hidden=8, scale=w.std().item())
    adam = torch.optim.Adam(vae.parameters(), 5e-3)
    for _ in range(300):
        loss = vae.bound(w[torch.randint(800, (64,))]).loss.mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    gaussian = torch.distributions.Normal(0.0, w.std()).log_prob(w[800:]).sum((1, 2)).mean()
    with torch.no_grad():
        assert vae.importance_bound(w[800:], 20).mean() > gaussian + 1


def test_state_dict_round_trip():
    vae = small(5)
    again = KernelVAE(5, latent=2, hidden=3).double()
    again.load_state_dict(vae.state_dict())
    w = torch.randn(3, 5, 5, dtype=torch.float64)
    assert again.scale == vae.scale != 1
    torch.testing.assert_close(again.bound(w, key=KEY).loss, vae.bound(w, key=KEY).loss, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": 4}, "size"),
        ({"size": 1}, "size"),
        ({"size": 3, "latent": 0}, "latent"),
        ({"size": 3, "scale": 0.0}, "scale"),
    ],
)
def test_arguments_that_cannot_be(arguments, named):
    with pytest.raises(ValueError, match=named):
        KernelVAE(**arguments)


def test_kernels_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected \[N, 3, 3\]"):
        small().bound(torch.zeros(2, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="samples"):
        small().importance_bound(kernels(), 0)


# --- the prior --------------------------------------------------------------------------------------------------------


def posterior(n=(50, 40), seed=1):
    generator = torch.Generator().manual_seed(seed)
    mean = (0.5 * torch.randn(9, dtype=torch.float64, generator=generator)).view(SIZE, SIZE)
    log_std = (0.3 * torch.randn(9, dtype=torch.float64, generator=generator) - 1).view(SIZE, SIZE)
    return mean.expand(*n, SIZE, SIZE), log_std.expand(*n, SIZE, SIZE)


def exact(mean, log_std, truth):
    q = MultivariateNormal(mean[0, 0].flatten(), torch.diag((2 * log_std[0, 0]).exp().flatten()))
    return torch.distributions.kl_divergence(q, truth).item()


def estimates(vae, mean, log_std, rounds=40):
    """Of the divergence of one kernel, each the mean of 2000."""
    return torch.stack([nn.DeepWeightPrior(vae).kl(mean, log_std, key=seed) for seed in range(rounds)]) / 2000


def test_bound_of_the_divergence_is_tight_for_the_exact_posterior():
    mean, log_std = posterior()
    known = exact(mean, log_std, Linear().truth())
    found = estimates(Linear(), mean, log_std)
    error = found.std().item() / len(found) ** 0.5
    assert abs(found.mean().item() - known) < 4 * error
    assert error < 0.02  # of 2.744. Seen: 0.013


def test_bound_of_a_wrong_posterior_is_above_by_what_it_is_wrong():
    mean, log_std = posterior()
    wrong = Linear(wrong=0.3)
    known = exact(mean, log_std, Linear().truth())
    true, guess = Linear().encode(mean[0]), wrong.encode(mean[0])  # the variances, and the shift, are those of any w
    gap = ((true.var / guess.var).log() + (guess.var + 0.3**2) / true.var - 1).sum(1)[0].item() / 2
    found = estimates(wrong, mean, log_std)
    assert abs(found.mean().item() - known - gap) < 4 * found.std().item() / len(found) ** 0.5
    assert gap > 0.3


@pytest.mark.parametrize("form", ["log_std", "logvar", "rho"])
def test_gradients_are_those_of_finite_differences(form):
    prior = nn.DeepWeightPrior(small())
    mean, spread = (0.2 * torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
                    for i in range(2))  # fmt: skip
    tensors = [mean.requires_grad_(), (spread - 2).detach().requires_grad_()]
    assert torch.autograd.gradcheck(lambda m, s: prior.kl(m, s, form=form, key=KEY), tensors)


@pytest.mark.parametrize("form", ["log_std", "logvar", "rho"])
def test_forms_say_the_same(form):
    mean, log_std = (t.contiguous() for t in posterior((3, 2)))
    std = log_std.exp()
    spread = {"log_std": log_std, "logvar": 2 * log_std, "rho": torch.log(torch.expm1(std))}[form]
    known = nn.DeepWeightPrior(Linear()).kl(mean, log_std, key=KEY)
    torch.testing.assert_close(nn.DeepWeightPrior(Linear()).kl(mean, spread, form=form, key=KEY), known)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 5), torch.nn.ReLU(), torch.nn.Conv2d(4, 6, 3), torch.nn.Flatten(), torch.nn.Linear(24, 2)
    )


def test_layers_of_its_size_have_it():
    """The others keep their Gaussian, and the divergence of a model is the sum."""
    model = nn.bayesianize(network(), form="logvar", bayesian_bias=True).double()
    plain = [layer.kl() for layer in (model[0], model[4])]
    prior = nn.DeepWeightPrior(small()).attach_(model)
    assert model[2].weight_prior is prior and model[0].weight_prior is None
    assert "DeepWeightPrior(3 x 3)" in repr(model[2]) and "prior_std" in repr(model[0])
    model(torch.randn(3, 1, 8, 8, dtype=torch.float64))
    torch.manual_seed(4)
    found = nn.kl(model)
    torch.manual_seed(4)
    deep = prior.kl(model[2].weight, model[2].weight_logvar, form="logvar")
    bias = ops.kl_normal(model[2].bias, model[2].bias_logvar, form="logvar", event_dims=1)
    torch.testing.assert_close(found, sum(plain) + deep + bias)
    assert nn.kl(model) != found  # it draws anew
    model[2].weight_prior = None
    model(torch.randn(3, 1, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(nn.kl(model), sum(plain) + model[2].kl())


@pytest.mark.parametrize("sampling", ["local", "weight", "flipout"])
def test_gradients_reach_the_layer_and_not_the_model_of_kernels(sampling):
    model = nn.bayesianize(network(), sampling=sampling).double()
    vae = small()
    nn.DeepWeightPrior(vae).attach_(model)
    loss = model(torch.randn(3, 1, 8, 8, dtype=torch.float64)).square().mean() + nn.kl(model) / 100
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in vae.parameters())


def test_it_is_no_part_of_the_state():
    model = nn.bayesianize(network())
    before, count = set(model.state_dict()), len(list(model.parameters()))
    nn.DeepWeightPrior(small().float()).attach_(model)
    assert set(model.state_dict()) == before and len(list(model.parameters())) == count
    model.load_state_dict(network().state_dict())
    copied = copy.deepcopy(model)
    torch.manual_seed(0)
    first = nn.kl(model)
    torch.manual_seed(0)
    assert nn.kl(copied) == first
    assert type(model[2].to_plain()) is torch.nn.Conv2d


def test_a_divergence_that_is_held_is_not_that_of_another_prior():
    model = nn.bayesianize(network())
    model(torch.randn(3, 1, 8, 8))
    nn.DeepWeightPrior(small().float()).attach_(model)
    torch.manual_seed(0)
    found = nn.kl(model)
    torch.manual_seed(0)
    assert found == sum(layer.kl() for layer in (model[0], model[2], model[4]))


def test_training_under_it_makes_kernels_more_probable():
    vae = small()
    model = nn.bayesianize(network()).double()
    nn.DeepWeightPrior(vae).attach_(model)

    def probable():
        with torch.no_grad():
            return vae.importance_bound(nn.harvest(model, 3, least_norm=0.0), 50, key=KEY).mean().item()

    before = probable()
    adam = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        adam.zero_grad()
        nn.kl(model).backward()
        adam.step()
    assert probable() > before + 1


def test_layers_of_no_fitting_size_are_refused():
    with pytest.raises(ValueError, match="no BayesConv2d of the model has 7 x 7 kernels"):
        nn.DeepWeightPrior(small(7)).attach_(nn.bayesianize(network()))
    with pytest.raises(ValueError, match="no BayesConv2d"):
        nn.DeepWeightPrior(small()).attach_(network())
    with pytest.raises(ValueError, match=r"expected \[out, in, 3, 3\]"):
        nn.DeepWeightPrior(small()).kl(torch.zeros(2, 2, 5, 5), torch.zeros(2, 2, 5, 5))


# --- harvest and start ------------------------------------------------------------------------------------------------


def by_hand():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Conv2d(2, 1, 3), torch.nn.Conv2d(1, 1, 5))
    with torch.no_grad():
        for value, layer in enumerate(model):
            layer.weight.fill_(value + 1.0)
        model[1].weight[0, 1] = 0.001  # a norm of 0.003
    return model


def test_harvest_by_hand():
    model = by_hand()
    found = nn.harvest(model, 3)
    assert found.shape == (3, 3, 3) and not found.requires_grad
    assert found[:, 0, 0].tolist() == [1, 1, 2]
    assert torch.equal(nn.harvest(model.state_dict(), 3), found)
    assert len(nn.harvest([model, model.state_dict()], 3)) == 6
    assert len(nn.harvest(model, 3, least_norm=0.0)) == 4
    assert len(nn.harvest(model, 3, least_norm=4.0)) == 1
    assert nn.harvest(nn.bayesianize(model, inplace=False), 5).tolist() == torch.full((1, 5, 5), 3.0).tolist()


def test_harvest_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no source has a convolution of 7 x 7"):
        nn.harvest(by_hand(), 7)
    with pytest.raises(ValueError, match="least_norm = 100"):
        nn.harvest(by_hand(), 3, least_norm=100)


def test_init_sets_the_kernels_of_its_size():
    vae, model = small().float(), network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert nn.dwp_init_(model, vae, key=3) is model
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"2.weight"}
    assert torch.equal(model[2].weight.detach(), vae.sample(24, key=3).view(6, 4, 3, 3))
    weight = torch.zeros(6, 4, 3, 3)
    assert nn.dwp_init_(weight, vae, key=3) is weight
    assert torch.equal(weight, model[2].weight)


def test_init_draws_each_layer_anew_and_again_for_the_same_generator():
    layers = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.Conv2d(2, 2, 3))
    vae = small().float()
    nn.dwp_init_(layers, vae, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(layers[0].weight, layers[1].weight)
    first = layers[0].weight.detach().clone()
    nn.dwp_init_(layers, vae, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layers[0].weight, first)
    nn.dwp_init_(layers, vae, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(layers[0].weight, first)


def test_init_draws_what_the_model_says():
    """Seen: 0.008."""
    weight = nn.dwp_init_(torch.zeros(100, 100, SIZE, SIZE, dtype=torch.float64), Linear(), key=2)
    found = weight.flatten(0, 1).flatten(1)
    torch.testing.assert_close(found.T.cov(), Linear().truth().covariance_matrix, rtol=0, atol=0.04)


def test_init_of_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"expected \[out, in, 3, 3\]"):
        nn.dwp_init_(torch.zeros(2, 2, 5, 5), small())
    with pytest.raises(ValueError, match="no Conv2d of the model has 7 x 7"):
        nn.dwp_init_(network(), small(7))
