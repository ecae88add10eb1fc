import io
import itertools
import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastnuggets import demo, demo_vae, report_vae
from fastnuggets.demo_vae import MODELS, Mixture, Plan, active, fit_mixture, load, matching, nats_by_label

TINY = Plan(
    seeds=2, steps=6, samples=5, draws=2, batch=20, hidden=(8,), latent=3, joint_latent=2, validations=2, rounds=3,
    components=(3,), few_components=(1, 2), pseudo=(0.5,), restarts=1, drawn=60, shown=4,
)  # fmt: skip


def test_split():
    data, other = load(0), load(1)
    assert [len(of) for of in data] == [1000, 1000, 200, 200, 597, 597]
    assert set(data.images.unique().tolist()) == {0.0, 1.0} and data.images.shape[1] == 64
    assert not torch.equal(data.images, other.images)
    together = [torch.cat(of[::2]).sum(0) for of in (data, other)]
    assert torch.equal(*together)  # each image is in one part
    assert sorted(torch.cat(data[1::2]).unique().tolist()) == list(range(10))


def test_mixture_is_a_probability():
    mixture = Mixture(torch.tensor([0.3, 0.7]).double(), torch.tensor([[0.2, 0.9, 0.5], [0.6, 0.1, 0.8]]).double())
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    assert mixture.nats(every).exp().sum().item() == pytest.approx(1)
    by_hand = 0.3 * 0.2 * 0.1 * 0.5 + 0.7 * 0.6 * 0.9 * 0.8  # of 1, 0, 1
    assert mixture.nats(torch.tensor([[1.0, 0.0, 1.0]])).item() == pytest.approx(math.log(by_hand))
    drawn = mixture.sample(40000)
    # Means of 0.48, 0.34 and 0.71, each known to within four of its standard errors of 0.0025.
    assert torch.allclose(drawn.mean(0), mixture.weights.float() @ mixture.chances.float(), atol=0.01)
    both = nats_by_label([mixture, Mixture(mixture.weights.flip(0), mixture.chances)], every[:2], torch.tensor([0, 1]))
    assert both[0] == mixture.nats(every[:1]) and both[1] != mixture.nats(every[1:2])


def test_fitted_mixture():
    truth = Mixture(torch.tensor([0.25, 0.75]).double(), torch.tensor([[0.9] * 4 + [0.1] * 4, [0.1] * 4 + [0.9] * 4]))
    images = truth._replace(chances=truth.chances.double()).sample(4000)
    one = fit_mixture(images, 1, 0.5, 1)
    assert torch.allclose(one.chances[0], (images.double().sum(0) + 0.5) / 4001)
    found = fit_mixture(images, 2, 0.5, 50)
    order = found.weights.argsort()
    # With ten seeds the weights were off by at most 0.01, the chances by 0.03.
    assert torch.allclose(found.weights[order], truth.weights, atol=0.03)
    assert torch.allclose(found.chances[order], truth.chances.double(), atol=0.06)
    nats = [fit_mixture(images, 2, 1e-6, rounds).nats(images).mean() for rounds in (0, 30)]
    assert nats[1] > nats[0] and found.nats(images).mean() > one.nats(images).mean() + 1


def test_matching_and_active():
    # Kind k is mostly digit (k + 3) % 10; of kind 0 more are of a digit that another kind has more of.
    found = torch.arange(10).repeat_interleave(10)
    labels = (found + 3) % 10
    labels[:6] = 4
    match = matching(found, labels)
    assert match.tolist() == [(k + 3) % 10 for k in range(10)]
    means = torch.zeros(5, 3)
    means[0, 0], means[0, 1] = 1.0, 0.1  # variances of 0.2, 0.002 and 0
    assert active(means) == 1


def test_png():
    from matplotlib.image import imread

    rows = [np.zeros((3, 64)), np.ones((3, 64))]
    rows[0][1, 0] = 1  # the second image's first pixel
    picture = imread(io.BytesIO(report_vae.png_of(rows, 1)))
    assert picture.shape == (17, 26, 4)
    assert picture[0, 9, 0] == 0 and picture[0, 0, 0] == 1 and picture[10, 0, 0] == 0
    assert picture[8].sum() == 0 and picture[:, 8, 3].sum() == 0  # nothing between images


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_vae, "QUICK", TINY)
    assert demo.main(["vae", "--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "vae.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "NaN" not in page and ">nan" not in page
    scores = json.loads((tmp_path / "vae.json").read_text())["scores"]
    assert len(scores) == 2 and scores[0]["VAE"]["elbo"] != scores[1]["VAE"]["elbo"]
    for kind in MODELS:
        found = scores[0][kind]
        assert found["elbo"] == pytest.approx(found["likelihood"] - found["kl"])
        assert -64 * math.log(2) - 5 < found["elbo"] < found["iwae"] + 0.5 < 0
        assert sum(found["latents"]) <= found["kl"] + 1e-4
    # Untrained networks say next to nothing; mixtures and pixels are what they are.
    baselines = scores[0]["baselines"]
    assert -27 < baselines["pixels apart"]["test"] < -24 < baselines["mixture"]["test"] + 2
    assert baselines["pixels apart, by label"]["test"] > baselines["pixels apart"]["test"] + 3
    assert scores[0]["drawn"]["images"]["asked"] > 0.9 and scores[0]["drawn"]["pixels apart, by label"]["asked"] > 0.5
    assert scores[0]["kinds"]["k-means"] > 0.5
    # Seeds that are done are kept, and a third is an addition.
    again = demo_vae.run(TINY._replace(seeds=3), tmp_path / "vae")
    assert (again.reused, again.parts) == (2, 3)
    assert json.loads(json.dumps(again.scores[:2])) == scores
    assert report_vae.write(again, tmp_path).exists()


def test_training_learns():
    """In 150 steps the bound of the test images rises to about what the pixels apart have, or above."""
    plan = TINY._replace(steps=150, rate=1e-2, hidden=(64,), latent=6, joint_latent=4, batch=100)
    data = load(0)
    for kind in MODELS:
        torch.manual_seed(0)
        model, facts = demo_vae.train(kind, data, plan, lambda _: None)
        batch = demo_vae.given(kind, data.test_images, data.test_labels)
        after = demo_vae.elbo(model, batch, 3)["elbo"]
        # -23.1, -18.0 and -25.7; the pixels apart have -25.2, an untrained network -45.
        print(kind, after, facts)
        assert after > -27 and facts["best step"] in range(76, 151)
