import itertools
import math

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from fastnuggets import nn, ops
from fastnuggets.models import VAE, ConditionalVAE, JointVAE
from fastnuggets.models.vae import JointBound

PIXELS, LABELS = 4, 3
KEY = torch.tensor([5, 7])
EVERY = torch.tensor(list(itertools.product([0.0, 1.0], repeat=PIXELS)), dtype=torch.float64)  # image there is


def model(kind, latent=1, **options):
    """A decoder with something to say, and an encoder that is wide rather than narrow: importance weights are tame."""
    torch.manual_seed(3)
    size = (PIXELS,) if kind is VAE else (PIXELS, LABELS)
    net = kind(*size, latent=latent, hidden=(6,), **options).double()
    with torch.no_grad():
        for weight in net.decoder.parameters():
            weight *= 2.5
        net.encoder[-1].bias[latent : 2 * latent] += 0.4
    return net


def given(net, images, label=1):
    return (images, torch.full((len(images),), label)) if isinstance(net, ConditionalVAE) else (images,)


def ln_p(net, images, label=1):
    """ln p(x) of one latent number, integrated over a grid from -9 to 9 and summed over categories."""
    z = torch.linspace(-9, 9, 1801, dtype=torch.float64)[:, None]
    weight = Normal(0.0, 1.0).log_prob(z[:, 0].double()) + math.log(18 / 1800)

    def chance(of):  # ln p(x | z) by the definition of a Bernoulli variable
        return (torch.where(images[:, None] == 1, of, 1 - of)).log().sum(-1)

    with torch.no_grad():
        if isinstance(net, ConditionalVAE):
            return torch.logsumexp(chance(net.decode(z, torch.full((len(z),), label))) + weight, 1)
        if isinstance(net, JointVAE):
            every = [chance(net.decode(z, torch.full((len(z),), c))) + weight for c in range(LABELS)]
            return torch.logsumexp(torch.cat(every, 1), 1) - math.log(LABELS)
        return torch.logsumexp(chance(net.decode(z)) + weight, 1)


def elbo(net, images, label=1):
    """The bound itself: the expectation over q(z | x) on a grid of each image's standard deviations."""
    steps = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    weight = Normal(0.0, 1.0).log_prob(steps).double().exp() * 16 / 2000
    found = []
    with torch.no_grad():
        for x in images:
            batch = given(net, x[None], label)
            code = net.encode(*batch)
            z = (code.mean + code.std * steps[:, None]).view(-1, 1)
            kl = kl_divergence(Normal(code.mean, code.std), Normal(0.0, 1.0)).sum()
            parts = [(1.0, given(net, z, label)[1:])]
            if isinstance(net, JointVAE):
                parts = [(q.item(), (torch.full((len(z),), c),)) for c, q in enumerate(code.chances[0])]
                uniform = Categorical(torch.full((1, LABELS), 1 / LABELS, dtype=torch.float64))
                kl = kl + kl_divergence(Categorical(code.chances), uniform).sum()
            likelihood = 0.0
            for q, more in parts:
                of = net.decode(z, *more)
                likelihood += q * (torch.where(x == 1, of, 1 - of).log().sum(1) * weight).sum()
            found.append(likelihood - kl)
    return torch.stack(found)


KINDS = pytest.mark.parametrize("kind", [VAE, ConditionalVAE, JointVAE])


@KINDS
def test_probabilities_sum_to_one(kind):
    for label in range(LABELS if kind is ConditionalVAE else 1):
        assert ln_p(model(kind), EVERY, label).logsumexp(0).item() == pytest.approx(0, abs=1e-9)


@KINDS
def test_bounds_against_the_integral(kind):
    net, samples = model(kind), 4000
    truth, below = ln_p(net, EVERY), elbo(net, EVERY)
    assert bool((below < truth - 0.001).all()) and (truth - below).max() > 0.1
    rows = EVERY.repeat_interleave(samples, 0)
    with torch.no_grad():
        drawn = -net.bound(*given(net, rows), key=1).loss.view(-1, samples)
        ones = net.importance_bound(*given(net, rows), 1, key=2).view(-1, samples)
        tens = net.importance_bound(*given(net, rows[::10]), 10, key=3).view(-1, samples // 10)
        many = net.importance_bound(*given(net, EVERY), 1000, key=4)

    def off(drawn, expected):  # standard errors
        return ((drawn.mean(1) - expected) / (drawn.std(1) / drawn.shape[1] ** 0.5)).abs().max()

    slack = 4 * (ones.std(1) + tens.std(1) * 10**0.5) / samples**0.5  # four standard errors of the means
    assert off(drawn, below) < 4.5  # 16 images
    if kind is JointVAE:  # the category is summed out of every sample
        assert bool((ones.mean(1) > below - slack).all()) and (ones.mean(1) - below).max() > 0.05
    else:
        assert off(ones, below) < 4.5
    assert bool((ones.mean(1) < tens.mean(1) + slack).all()) and bool((tens.mean(1) < truth + slack).all())
    assert (tens.mean(1) - ones.mean(1)).max() > 0.05
    torch.testing.assert_close(many, truth, atol=0.1, rtol=0)
    # The weights of so many single samples are those of one bound.
    torch.testing.assert_close(ones.logsumexp(1) - math.log(samples), truth, atol=0.05, rtol=0)


@KINDS
def test_samples_are_of_the_model(kind):
    net, count = model(kind), 200000
    label = 2
    drawn = net.sample(torch.full((count,), label) if kind is ConditionalVAE else count, key=9)
    assert drawn.shape == (count, PIXELS) and drawn.dtype == torch.float64
    place = (drawn @ torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)).long()
    share = torch.bincount(place, minlength=16) / count
    chance = ln_p(net, EVERY, label).exp()
    assert ((share - chance) / (chance * (1 - chance) / count).sqrt()).abs().max() < 4.5
    some = torch.full((50,), label) if kind is ConditionalVAE else 50
    assert torch.equal(net.sample(some, key=9), drawn[:50])  # fewer are the first of more
    expected = net.sample(some, expected=True, key=9)
    assert bool(((expected > 0) & (expected < 1)).all())
    assert not torch.equal(net.sample(some, key=8), net.sample(some, key=9))


def test_categories_and_pixels_have_noise_of_their_own():
    net = JointVAE(2, 2, latent=1, hidden=(1,))
    with torch.no_grad():  # the first pixel is a fair coin, the second says the category
        for weight in net.decoder.parameters():
            weight.zero_()
        net.decoder[0].weight[0, 1] = 1
        net.decoder[2].weight[1], net.decoder[2].bias[1] = 40, -20
    drawn = net.sample(10000, key=3)
    both = drawn.T @ drawn / len(drawn)  # a deviation is 0.005
    torch.testing.assert_close(both, torch.tensor([[0.5, 0.25], [0.25, 0.5]]), atol=0.02, rtol=0)


@KINDS
def test_gradient_with_frozen_noise(kind):
    net = model(kind, latent=2)
    batch = given(net, EVERY[5:9])
    names, values = zip(*net.named_parameters(), strict=True)

    class Loss(torch.nn.Module):
        def __init__(self, method, *more):
            super().__init__()
            self.net, self.method, self.more = net, method, more

        def forward(self, *batch):
            found = getattr(self.net, self.method)(*batch, *self.more, key=KEY)
            return found if isinstance(found, torch.Tensor) else torch.stack(found)

    methods = [("bound",), ("importance_bound", 3)] + ([("relaxed", 0.8)] if kind is JointVAE else [])
    for method in methods:
        loss = Loss(*method)

        def call(*values, loss=loss):
            named = {f"net.{name}": value for name, value in zip(names, values, strict=True)}
            return torch.func.functional_call(loss, named, batch)

        assert torch.autograd.gradcheck(call, values, fast_mode=True)


@KINDS
def test_reconstruction_and_mode(kind):
    net = model(kind, latent=2)
    batch = given(net, EVERY)
    code = net.encode(*batch)
    more = (code.chances.argmax(1),) if kind is JointVAE else batch[1:]
    torch.testing.assert_close(net.reconstruct(*batch), net.decode(code.mean, *more))
    drawn = [net.train(mode).bound(*batch, key=KEY).loss for mode in (True, False)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], net.bound(*batch, key=8).loss)
    assert torch.equal(nn.weight_scaling_(net).bound(*batch, key=KEY).loss, drawn[0])


@KINDS
def test_state_dict(kind, tmp_path):
    net = model(kind, latent=2)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = kind(*((PIXELS,) if kind is VAE else (PIXELS, LABELS)), latent=2, hidden=(6,)).double()
    batch = given(net, EVERY)
    assert not torch.equal(other.bound(*batch, key=KEY).loss, net.bound(*batch, key=KEY).loss)
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(other.bound(*batch, key=KEY).loss, net.bound(*batch, key=KEY).loss)


def test_noise_is_the_ops():
    net = model(VAE, latent=2)
    code = net.encode(EVERY)
    z = code.mean + code.std * ops.noise("normal", [16, 2], dtype=torch.float64, key=KEY)
    of = net.decode(z)
    wanted = torch.distributions.Bernoulli(of).log_prob(EVERY).sum(1)
    torch.testing.assert_close(net.bound(EVERY, key=KEY).likelihood, wanted)
    kl = kl_divergence(Normal(code.mean, code.std), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(net.bound(EVERY, key=KEY).kl, kl)


def test_the_label_says_what_is_drawn():
    net = model(ConditionalVAE)
    with torch.no_grad():  # a pixel of ink for each label
        for weight in net.decoder.parameters():
            weight.zero_()
        net.decoder[0].weight[:LABELS, 1:] = 10 * torch.eye(LABELS)
        net.decoder[2].weight[:LABELS, :LABELS] = torch.eye(LABELS)
        net.decoder[2].bias[:] = -5
    labels = torch.arange(LABELS).repeat(1000)
    drawn = net.sample(labels, key=1)
    own = torch.eye(LABELS, PIXELS)[labels]
    # A logit of 5 or of -5: 0.9933 or 0.0067, of 3 000 and of 9 000.
    assert drawn[own == 1].mean() > 0.985 and drawn[own == 0].mean() < 0.012


def test_both_networks_are_told():
    net = model(ConditionalVAE)
    one, two = (torch.full((16,), label) for label in (0, 1))
    assert (net.encode(EVERY, one).mean - net.encode(EVERY, two).mean).abs().max() > 0.1
    assert (net.decode(EVERY[:, :1], one) - net.decode(EVERY[:, :1], two)).abs().max() > 0.1
    assert (net.bound(EVERY, one, key=KEY).loss - net.bound(EVERY, two, key=KEY).loss).abs().max() > 0.1
    assert (ln_p(net, EVERY, 0) - ln_p(net, EVERY, 1)).abs().max() > 0.1


def test_category_kl():
    net = model(JointVAE, latent=2)
    logits = torch.log(net.encode(EVERY).chances)
    wanted = kl_divergence(Categorical(logits=logits), Categorical(logits=torch.zeros_like(logits)))
    for parts in (net.bound(EVERY), net.relaxed(EVERY)):
        torch.testing.assert_close(parts.category_kl, wanted)
    with torch.no_grad():
        net.encoder[-1].bias[-LABELS:] = torch.tensor([0.0, 2000.0, -2000.0])  # sure of one: ln 3, and no NaN
    kl = net.bound(EVERY).category_kl
    torch.testing.assert_close(kl, torch.full_like(kl, math.log(LABELS)))
    grads = torch.autograd.grad(kl.sum(), list(net.encoder.parameters()))
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_the_relaxation_is_no_bound():
    """Ink only where two categories are mixed, which no image of the model has: the relaxed sum is far above ln p."""
    net = JointVAE(1, 2, latent=1, hidden=(2,)).double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
        net.decoder[0].weight[:] = torch.tensor([[0.0, 1.0, -1.0], [0.0, -1.0, 1.0]])
        net.decoder[2].weight[:] = -10
        net.decoder[2].bias[:] = 5  # a logit of 5 - 10 |c1 - c2|
    x = torch.ones(4000, 1, dtype=torch.float64)
    truth = -math.log1p(math.exp(5))
    assert -net.bound(x, key=1).loss.mean().item() == pytest.approx(truth)
    assert net.importance_bound(x, 5, key=1).mean().item() == pytest.approx(truth)
    assert -net.relaxed(x, tau=5.0, key=1).loss.mean() > truth + 4
    # Towards a temperature of 0 it is a whole category again, but for one draw in 4 000 or so.
    assert -net.relaxed(x, tau=0.0001, key=1).loss.mean().item() == pytest.approx(truth, abs=0.02)


def test_relaxed_by_hand():
    net = model(JointVAE, latent=2)
    parts = net.relaxed(EVERY, tau=0.5, key=KEY)
    code = net.encode(EVERY)
    z = code.mean + code.std * ops.noise("normal", [16, 2], dtype=torch.float64, key=KEY)
    # The noise of the category is not that of the numbers.
    for key, same in ((KEY ^ (1 << 60), True), (KEY, False)):
        gumbel = ops.noise("gumbel", [16, LABELS], dtype=torch.float64, key=key)
        c = ((code.chances.log() + gumbel) / 0.5).softmax(1)
        of = net.decoder(torch.cat([z, c], 1)).sigmoid()
        wanted = torch.distributions.Bernoulli(of).log_prob(EVERY).sum(1)
        assert torch.allclose(parts.likelihood, wanted, atol=1e-5) == same


def test_capacity_loss_by_hand():
    net = JointVAE(PIXELS, 4)
    parts = JointBound(torch.tensor([-10.0, -20.0]), torch.tensor([1.0, 5.0]), torch.tensor([0.5, 0.7]))
    # 15 + 2 (|3 - 4| + |0.6 - 1|); then the categories' capacity is ln 4 at most.
    assert net.capacity_loss(parts, 4.0, 1.0, gamma=2.0).item() == pytest.approx(15 + 2 * 1.4)
    assert net.capacity_loss(parts, 2.5, 9.0).item() == pytest.approx(15 + 30 * (0.5 + math.log(4) - 0.6))
    for bad in ((-1.0, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="at least 0"):
            net.capacity_loss(parts, *bad)
    assert parts.loss.tolist() == pytest.approx([11.5, 25.7])


def test_half_types():
    net, x = model(JointVAE, latent=2).float(), EVERY.float()
    with torch.autocast("cpu", torch.bfloat16):
        parts = net.bound(x, key=KEY)
        assert all(part.dtype == torch.float32 for part in parts)
        assert net.importance_bound(x, 2, key=KEY).dtype == torch.float32
    torch.testing.assert_close(parts.loss, net.bound(x, key=KEY).loss, atol=0.3, rtol=0.05)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: VAE(0), "pixels"),
        (lambda: VAE(4, latent=0), "latent"),
        (lambda: VAE(4, hidden=()), "hidden"),
        (lambda: ConditionalVAE(4, 1), "classes"),
        (lambda: JointVAE(4, 1), "categories"),
        (lambda: model(VAE).bound(EVERY[:, :3]), "x: expected"),
        (lambda: model(VAE).bound(EVERY.long()), "x: expected"),
        (lambda: model(VAE).importance_bound(EVERY, 0), "samples"),
        (lambda: model(JointVAE).relaxed(EVERY, 0.0), "tau"),
        (lambda: model(JointVAE).decode(torch.zeros(2, 1), torch.zeros(3).long()), "c: expected"),
        (lambda: model(ConditionalVAE).bound(EVERY, torch.zeros(3).long()), "y: expected"),
        (lambda: model(ConditionalVAE).bound(EVERY, torch.zeros(16)), "y: expected"),
    ],
)
def test_errors(make, wrong):
    with pytest.raises(ValueError, match=wrong):
        make()


@pytest.mark.parametrize("label", [-1, LABELS])
def test_no_such_label(label):
    with pytest.raises(IndexError):
        model(ConditionalVAE).sample(torch.tensor([0, label]))
