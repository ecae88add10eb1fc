import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from fastnuggets import cli, demo, demo_prior, nn, report_prior
from fastnuggets.demo_prior import DEEP, FITTED, INIT, METHODS, NORMAL, PLAIN, PUBLISHED, UNIFORM, Plan
from fastnuggets.models import KernelVAE

TINY = Plan(
    seeds=2,
    sources=2,
    source_steps=60,
    vae_steps=20,
    steps=8,
    counts=(10, 20),
    letters=800,
    letters_tested=200,
    channels=(4, 4),
    hidden=(4, 4),
    vae_batch=16,
    least_norm=0.01,
    held=0.5,
    tested=300,
    looks=(2, 5),
    kernels=4,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("prior")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_prior, "QUICK", TINY)
        assert demo.main(["prior", "--quick", "--out", str(out)]) == 0
    return out, demo_prior.run(TINY, out / "prior")


def vaes(scale=0.3):
    torch.manual_seed(0)
    return [KernelVAE(size, latent=2, hidden=3, scale=scale) for size in demo_prior.SIZES]


def test_letters_are_those_that_they_are_called():
    """Nearest means of the undistorted glyphs tell most; as many of each letter."""
    images, labels = demo_prior.letters(TINY, 1000, 0)
    assert images.shape == (1000, 1, 8, 8) and images.isfinite().all()
    assert abs(images.mean()) < 1e-5 and images.std().item() == pytest.approx(1, abs=1e-5)
    assert (labels.bincount(minlength=10) > 60).all()
    others, truth = demo_prior.letters(TINY, 1000, 1)
    assert not torch.equal(images, others)
    means = torch.stack([images[labels == letter].mean(0).flatten() for letter in range(10)])
    right = (torch.cdist(others.flatten(1), means).argmin(1) == truth).double().mean()
    assert right > 0.5  # 0.1 by chance


def test_glyphs_of_all_fonts_are_there():
    bank = demo_prior.glyphs()
    assert bank.shape == (10 * 2 * len(demo_prior.FONTS), 1, 64, 64)
    white = bank.flatten(1).mean(1)
    assert white.min() > 0.02 and white.max() < 0.8
    # A font that lacks a letter draws the same box for all.
    first, last = bank.view(10, -1, 64 * 64)[0], bank.view(10, -1, 64 * 64)[9]
    assert ((first - last).abs().mean(1) > 0.05).all()


def test_labels_are_as_many_of_each_digit_and_never_tested_on():
    few, more = (demo_prior.load(TINY, count, 3) for count in (20, 50))
    assert few.labels.bincount().tolist() == [2] * 10 and more.labels.bincount().tolist() == [5] * 10
    assert torch.equal(few.test_labels, more.test_labels) and len(few.test_labels) == 300
    assert few.images.mean().abs() < 1e-5

    def known(data):
        return {tuple((16 * image).round().int().flatten().tolist()) for image in data.images}

    raw = [data._replace(images=data.images - data.images.min()) for data in (few, more)]
    raw = [data._replace(images=data.images / data.images.max()) for data in raw]
    assert known(raw[0]) < known(raw[1])
    tested = few.test_images - few.images.min()
    assert not known(raw[0]) & known(few._replace(images=tested / (few.images.max() - few.images.min())))
    assert not torch.equal(demo_prior.load(TINY, 20, 4).test_labels, few.test_labels)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_networks_of_the_methods(method):
    made = vaes()
    torch.manual_seed(1)
    model = demo_prior.prepare(method, TINY, made)
    torch.manual_seed(1)
    plain = demo_prior.network(TINY)
    assert torch.equal(model[7].weight, plain[7].weight) and type(model[7]) is torch.nn.Linear
    assert torch.equal(model[0].weight, plain[0].weight) != method.drawn
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    kinds = {"": torch.nn.Conv2d, "uniform": nn.VariationalDropoutConv2d}
    assert type(model[3]) is kinds.get(method.prior, nn.BayesConv2d)
    if method.prior in ("normal", "fitted", "deep"):
        assert model[3].weight_std.max().item() == pytest.approx(math.exp(-5))
        assert model[3].prior_std == pytest.approx(0.3 if method.prior == "fitted" else 1.0)
        assert (model[3].weight_prior is not None) == (method.prior == "deep")
    if method.prior == "uniform":
        assert (model[3].log_sigma2 == -10).all()


def test_a_gaussian_is_what_it_is():
    generator = torch.Generator().manual_seed(0)
    kernels = 0.3 * torch.randn(5, 3, 3, generator=generator)
    known = torch.distributions.Normal(0.1, 0.2).log_prob(kernels).sum((1, 2)).mean().item()
    assert demo_prior._gaussian(torch.full((9,), 0.1), 0.04 * torch.eye(9), kernels) == pytest.approx(known, rel=1e-5)


def test_sources_and_kernels(done):
    result = done[1]
    assert min(result.sources["accuracy"]) > 0.3  # 0.1 by chance
    assert result.sources["all"] == [2 * 4, 2 * 16] and result.sources["kept"][1] <= 32
    for vae in result.vaes:
        assert vae["nats"]["VAE, bound"] <= vae["nats"]["VAE, 100 samples"] + 0.1
        assert vae["nats"]["N(0, 1)"] < vae["nats"]["N(0, s²)"]


def test_methods_are_judged_and_differ(done):
    result = done[1]
    for scores in result.scores.values():
        assert list(scores) == [method.name for method in METHODS]
        assert len({tuple(score["nll"] for score in found) for found in scores.values()}) == len(METHODS)
        for method in METHODS:
            found = scores[method.name][0]
            assert found["nll"] > 0 and (found["kl"] != 0) == bool(method.prior)
            assert list(found["looks"]) == ([] if method.prior else ["2", "5"])
        # Eight of Adam's steps, the mean of whose rates is 9/16 of the first; at that of the means it would be -4.99.
        assert scores[NORMAL.name][0]["log_std"] == pytest.approx(-5 + 8 * 0.06 * 9 / 16, abs=0.05)


def test_page(done):
    out, result = done
    page = (out / "prior.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "NaN" not in page and "nan" not in page
    assert page.count("<svg") == 6 and "$" not in page
    figures = json.loads((out / "prior.json").read_text())
    assert figures["scores"]["20"][PUBLISHED.name] == result.scores["20"][PUBLISHED.name]
    values = [100 * score["accuracy"] for score in result.scores["10"][NORMAL.name]]
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in page
    assert "20 of them 46; the divergences" in page  # ln 10 nats each
    low = [
        report_prior.NAMES[m] for m in METHODS if np.mean([s["accuracy"] for s in result.scores["20"][m.name]]) < 0.2
    ]
    said = page[page.index("as a guess:") :].split("</p>")[0]
    assert low and all(name in said for name in low)


@pytest.mark.parametrize(("change", "said"), [(5.0, "better"), (-5.0, "worse"), (0.0, "not told apart")])
def test_what_is_said_follows_the_figures(done, change, said):
    result = done[1]
    like = result.scores["10"][PLAIN.name][0]

    def scores(shift):
        return [like | {"accuracy": 0.5 + (shift + step) / 100} for step in (0.0, 1.0, 2.0)]

    both = {PUBLISHED.name: scores(change), UNIFORM.name: list(reversed(scores(0.0)))}
    both[UNIFORM.name] = scores(0.0) if change else both[UNIFORM.name]
    changed = result._replace(scores={"10": both, "20": both})
    assert report_prior._verdicts(changed, PUBLISHED, UNIFORM) == f"{said} with 10, 20"


def test_the_start_is_told_by_steps(done):
    result = done[1]
    like = result.scores["20"][PLAIN.name][0]

    def scores(first, last):
        return [like | {"looks": {"2": first, "5": first}, "accuracy": last + step / 1000} for step in range(3)]

    cell = {PLAIN.name: scores(0.2, 0.5), INIT.name: scores(0.25, 0.5)}
    text = report_prior._start_text(result._replace(scores={"20": cell}), "20")
    assert "after 2 steps +5.0 % (ahead); after 5 steps +5.0 % (ahead); after 8 steps +0.0 % (not told apart)" in text


def test_ctrl_c_is_gone_on_from(done, tmp_path, monkeypatch, capsys):
    whole, calls, train = done[1], [], demo_prior.train

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == len(METHODS) + 3:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(demo_prior, "QUICK", TINY)
    monkeypatch.setattr(demo_prior, "train", interrupted)
    assert cli.main(["demo", "prior", "--quick", "--out", str(tmp_path)]) == cli.INTERRUPTED
    assert "The same command goes on" in capsys.readouterr().err
    again = demo_prior.run(TINY, tmp_path / "prior")
    assert again.reused == 4  # sources, two models of kernels, one cell
    for method in (DEEP, FITTED):
        for count in ("10", "20"):
            found, known = (
                [(score["nll"], score["accuracy"]) for score in result.scores[count][method.name]]
                for result in (again, whole)
            )
            assert found == known
