"""The demo of variational autoencoders: digits in black and white, with a label, and with a category of their own."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from fastnuggets import ops
from fastnuggets.models import VAE, ConditionalVAE, JointVAE
from fastnuggets.molecules.files import need
from fastnuggets.parts import Parts, command, one_thread, settings

PIXELS, CLASSES = 64, 10
INK = 8  # of 16, from which on a pixel is black
LEARNED, VALIDATED = 1000, 200  # the others are the test images
PLAIN, CONDITIONAL, JOINT = MODELS = ("VAE", "conditional VAE", "JointVAE")
APART, MIXTURE = "pixels apart", "mixture"  # what a model has to beat
LABELLED = {APART: "pixels apart, by label", MIXTURE: "mixture, by label"}
ACTIVE = 0.01  # variance of a latent's mean over images from which on it is active
COUNTS = (1, 5, 25, 100)  # samples of the importance-weighted bound
REACH = 2.0  # standard deviations, of traversals to either side


class Plan(NamedTuple):
    """How much the demo does, and its settings."""

    seeds: int
    steps: int = 2000  # of each model
    samples: int = 100  # of the importance-weighted bounds in the table
    draws: int = 10  # of what is estimated by one draw
    batch: int = 100
    rate: float = 2e-3  # of Adam, which falls linearly to 0
    decay: float = 0.1  # decoupled weight decay
    latent: int = 16
    joint_latent: int = 10
    hidden: tuple[int, ...] = (200,)
    validations: int = 5  # in the second half of the training
    tau: float = 0.67
    gamma: float = 3.0  # the paper's 30 is for ten times the pixels: here the likelihood then hardly counts
    capacity: float = 3.0  # nats at the end of the training, up to which it grows
    category_capacity: float = 2.0  # of the ln 10 that there are
    components: tuple[int, ...] = (10, 20, 40, 60)  # of mixtures, one of which is chosen
    few_components: tuple[int, ...] = (1, 2, 4, 6, 8)  # of those of a label
    pseudo: tuple[float, ...] = (0.25, 0.5, 1.0)  # counts that are added to each of a mixture's pixels
    rounds: int = 60  # of expectation and maximisation
    restarts: int = 10
    drawn: int = 1000  # images of each sampler that are judged
    shown: int = 12


STANDARD = Plan(seeds=5)
QUICK = Plan(seeds=2, steps=600, samples=25, draws=5, validations=3, components=(20, 40), restarts=3, rounds=30)


class Data(NamedTuple):
    """Images [N, 64] float32 of zeros and ones; labels [N] int64."""

    images: Tensor
    labels: Tensor
    valid_images: Tensor
    valid_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    scores: list[dict[str, Any]]  # one a seed
    pictures: dict[str, Any]  # of the first seed
    sizes: tuple[int, int, int]  # images learned from, validated on and tested on
    parameters: dict[str, int]
    seconds: float  # of all computations, those of earlier calls too
    reused: int
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return command(
        "vae",
        argv,
        run,
        (STANDARD, QUICK),
        description="Variational autoencoders learn handwritten digits in black and white: one as it is, one that is "
        "told the label, and one with a category in its code that finds its own kinds. Their bounds are compared, in "
        "nats an image, with a mixture fitted by expectation and maximisation; what they draw is judged by a "
        "classifier. Writes OUT/vae.html, a page that needs no network, and its figures in OUT/vae.json.",
        repeated="splits, weights and batches to repeat everything with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The demo without its page. Each seed is kept in `cache` when it is done.

    Deterministic: the same settings and versions give the same figures on the same machine; times are as measured.
    """
    ticks = len(MODELS) * plan.steps
    with one_thread(), need("tqdm").tqdm(total=plan.seeds * ticks, unit="step", disable=None) as bar:
        part = Parts(cache, bar, fresh=fresh)
        found = [
            part(f"seed {seed}", ticks, settings(plan, {"seed": seed}), partial(measure, plan, seed, bar.update))
            for seed in range(plan.seeds)
        ]
    data = load(0)
    sizes = tuple(len(of) for of in (data.images, data.valid_images, data.test_images))
    weights = {kind: sum(weight.numel() for weight in build(kind, plan).parameters()) for kind in MODELS}
    scores = [one["scores"] for one in found]
    return Result(
        plan, scores, found[0]["pictures"], sizes, weights, sum(part.seconds), sum(part.reused), len(part.reused)
    )


def load(seed: int) -> Data:
    """The digits of scikit-learn, split by the seed."""
    pixels, labels = need("sklearn.datasets").load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.tensor(pixels >= INK, dtype=torch.float32)[order], torch.tensor(labels)[order]
    ends = [LEARNED, LEARNED + VALIDATED]
    parts = zip(images.tensor_split(ends), labels.tensor_split(ends), strict=True)
    return Data(*(of for pair in parts for of in pair))


def measure(plan: Plan, seed: int, tick: Callable[[int], object]) -> dict[str, Any]:
    """All models and baselines with one seed."""
    data = load(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trained = {kind: train(kind, data, plan, tick) for kind in MODELS}
        with torch.no_grad():
            scores: dict[str, Any] = {
                kind: judge(kind, model, data, plan) | of for kind, (model, of) in trained.items()
            }
            models = {kind: model for kind, (model, _) in trained.items()}
            mixtures = {name: choose(data, plan, name) for name in (APART, MIXTURE)}
            by_label = {name: choose_by_label(data, plan, name) for name in (APART, MIXTURE)}
            scores["baselines"] = baselines(data, mixtures, by_label)
            scores["marginal"] = marginal(models[CONDITIONAL], data, plan)
            scores["relaxation"] = relaxation(models[JOINT], data, plan)
            scores["kinds"] = kinds(models[JOINT], data, plan, seed)
            scores["drawn"] = judge_drawn(models[CONDITIONAL], by_label, data, plan)
            pictures = draw_pictures(models, mixtures[MIXTURE], data, plan) if seed == 0 else {}
    return {"scores": scores, "pictures": pictures}


# Models


def build(kind: str, plan: Plan) -> Any:
    if kind == PLAIN:
        return VAE(PIXELS, latent=plan.latent, hidden=plan.hidden)
    if kind == CONDITIONAL:
        return ConditionalVAE(PIXELS, CLASSES, latent=plan.latent, hidden=plan.hidden)
    return JointVAE(PIXELS, CLASSES, latent=plan.joint_latent, hidden=plan.hidden)


def given(kind: str, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """What the methods of a model take."""
    return (images, labels) if kind == CONDITIONAL else (images,)


def train(kind: str, data: Data, plan: Plan, tick: Callable[[int], object]) -> tuple[Any, dict[str, Any]]:
    """The model with the weights that did best on the validation images; and what the last ones do, and the time."""
    began = time.perf_counter()
    model = build(kind, plan)
    optimizer = torch.optim.AdamW(model.parameters(), plan.rate, weight_decay=plan.decay)
    rate = LinearLR(optimizer, 1.0, 0.0, plan.steps)
    valid = given(kind, data.valid_images, data.valid_labels)
    best, kept, at = math.inf, model.state_dict(), 0
    for step in range(plan.steps):
        index = torch.randint(len(data.images), (plan.batch,))
        loss = loss_of(kind, model, given(kind, data.images[index], data.labels[index]), plan, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
        tick(1)
        # In the second half alone: before, JointVAE's capacities are too small to judge by.
        if step >= plan.steps // 2 and (plan.steps - step - 1) % max(1, plan.steps // 2 // plan.validations) == 0:
            found = -elbo(model, valid, plan.draws)["elbo"]
            if found < best:
                best, kept, at = found, copy.deepcopy(model.state_dict()), step + 1
    last = elbo(model, given(kind, data.test_images, data.test_labels), plan.draws)["elbo"]
    model.load_state_dict(kept)
    return model, {"last": last, "best step": at, "seconds": time.perf_counter() - began}


def loss_of(kind: str, model: Any, batch: tuple[Tensor, ...], plan: Plan, step: int) -> Tensor:
    if kind != JOINT:
        return model.bound(*batch).loss.mean()
    grown = (step + 1) / plan.steps
    parts = model.relaxed(*batch, plan.tau)
    return model.capacity_loss(parts, grown * plan.capacity, grown * plan.category_capacity, gamma=plan.gamma)


@torch.no_grad()
def elbo(model: Any, batch: tuple[Tensor, ...], draws: int) -> dict[str, float]:
    """Means over the images and so many draws, with keys that are the same for all."""
    bounds = [model.bound(*batch, key=key) for key in range(draws)]
    kl = sum(part for name, part in bounds[0]._asdict().items() if name != "likelihood").mean().item()
    likelihood = float(np.mean([bound.likelihood.mean().item() for bound in bounds]))
    return {"elbo": likelihood - kl, "likelihood": likelihood, "kl": kl}


def judge(kind: str, model: Any, data: Data, plan: Plan) -> dict[str, Any]:
    """Nats of test images, and what is in the code."""
    test = given(kind, data.test_images, data.test_labels)
    moments = model.encode(*test)
    each = ops.kl_normal(moments.mean, moments.std).mean(0)
    counts = [count for count in COUNTS if count <= plan.samples]
    return elbo(model, test, plan.draws) | {
        "learned": elbo(model, given(kind, data.images, data.labels), plan.draws)["elbo"],
        "iwae": model.importance_bound(*test, plan.samples, key=1).mean().item(),
        "by samples": [[count, model.importance_bound(*test, count, key=2).mean().item()] for count in counts],
        "active": active(moments.mean),
        "latents": sorted(each.tolist(), reverse=True),
    }


def active(means: Tensor) -> int:
    """How many latents of means [N, latent] vary over the images."""
    return int((means.var(0) > ACTIVE).sum())


def marginal(model: ConditionalVAE, data: Data, plan: Plan) -> dict[str, float]:
    """The label summed out of the conditional model's bound: nats that compare with the others', and the likeliest."""
    count = len(data.test_images)
    ln_prior = (torch.bincount(data.labels, minlength=CLASSES) / len(data.labels)).log()
    joint = [
        model.importance_bound(data.test_images, torch.full((count,), label), plan.samples, key=3) + ln_prior[label]
        for label in range(CLASSES)
    ]
    found = torch.stack(joint, 1)
    return {
        "iwae": found.logsumexp(1).mean().item(),
        "right": (found.argmax(1) == data.test_labels).double().mean().item(),
    }


def relaxation(model: JointVAE, data: Data, plan: Plan) -> dict[str, float]:
    """What training sees, in place of the bound: by how much it is too high or too low."""
    relaxed = [-model.relaxed(data.test_images, plan.tau, key=key).loss.mean().item() for key in range(plan.draws)]
    parts = model.bound(data.test_images, key=0)
    return {
        "relaxed": float(np.mean(relaxed)),
        "kl": parts.kl.mean().item(),
        "category kl": parts.category_kl.mean().item(),
    }


# Baselines


class Mixture(NamedTuple):
    """Of products of Bernoulli distributions."""

    weights: Tensor  # [K]
    chances: Tensor  # [K, pixels]

    def log_joint(self, images: Tensor) -> Tensor:
        """ln p(x, k) [N, K], float64"""
        ink, blank = self.chances.log(), (-self.chances).log1p()
        x = images.double()
        return x @ ink.mT + (1 - x) @ blank.mT + self.weights.log()

    def nats(self, images: Tensor) -> Tensor:
        """ln p(x) [N]"""
        return self.log_joint(images).logsumexp(1)

    def sample(self, count: int) -> Tensor:
        chances = self.chances[torch.multinomial(self.weights, count, replacement=True)]
        return torch.bernoulli(chances).float()


def fit_mixture(images: Tensor, count: int, pseudo: float, rounds: int) -> Mixture:
    """Expectation and maximisation from `count` of the images, with pseudo counts of ink and blank for each pixel."""
    x = images.double()
    start = x[torch.randperm(len(x))[:count]]
    mixture = Mixture(x.new_full((count,), 1 / count), 0.5 + 0.3 * (start - 0.5))
    for _ in range(rounds):
        part = mixture.log_joint(images).softmax(1)
        size = part.sum(0)
        chances = (part.mT @ x + pseudo) / (size[:, None] + 2 * pseudo)
        mixture = Mixture((size + 1) / (len(x) + count), chances)
    return mixture


def choose(data: Data, plan: Plan, name: str) -> Mixture:
    """The mixture, or the pixels apart, which is a mixture of one, that is best on the validation images."""
    counts = (1,) if name == APART else plan.components
    made = [fit_mixture(data.images, count, pseudo, plan.rounds) for count in counts for pseudo in plan.pseudo]
    return max(made, key=lambda mixture: mixture.nats(data.valid_images).mean().item())


def choose_by_label(data: Data, plan: Plan, name: str) -> list[Mixture]:
    """One for each label, all of one size."""
    counts = (1,) if name == APART else plan.few_components
    made = [
        [fit_mixture(data.images[data.labels == label], count, pseudo, plan.rounds) for label in range(CLASSES)]
        for count in counts
        for pseudo in plan.pseudo
    ]
    return max(made, key=lambda several: nats_by_label(several, data.valid_images, data.valid_labels).mean().item())


def nats_by_label(mixtures: Sequence[Mixture], images: Tensor, labels: Tensor) -> Tensor:
    """ln p(x | y) [N]"""
    every = torch.stack([mixture.nats(images) for mixture in mixtures], 1)
    return every.gather(1, labels[:, None])[:, 0]


def baselines(data: Data, mixtures: dict[str, Mixture], by_label: dict[str, list[Mixture]]) -> dict[str, Any]:
    found = {}
    for name, mixture in mixtures.items():
        nats = {"test": mixture.nats(data.test_images), "learned": mixture.nats(data.images)}
        found[name] = {key: of.mean().item() for key, of in nats.items()} | {"components": len(mixture.weights)}
    for name, several in by_label.items():
        nats = {
            "test": nats_by_label(several, data.test_images, data.test_labels),
            "learned": nats_by_label(several, data.images, data.labels),
        }
        sizes = {key: of.mean().item() for key, of in nats.items()} | {"components": len(several[0].weights)}
        found[LABELLED[name]] = sizes
    return found


# Kinds and labels


def kinds(model: JointVAE, data: Data, plan: Plan, seed: int) -> dict[str, float]:
    """Share of test images whose kind, found without labels, is that of their digit."""

    def right(kind: Callable[[Tensor], Tensor]) -> float:
        match = matching(kind(data.images), data.labels)
        return (match[kind(data.test_images)] == data.test_labels).double().mean().item()

    fitted = [fit_mixture(data.images, CLASSES, plan.pseudo[-1], plan.rounds) for _ in range(plan.restarts)]
    mixture = max(fitted, key=lambda one: one.nats(data.images).sum().item())
    means = need("sklearn.cluster").KMeans(CLASSES, n_init=plan.restarts, random_state=seed).fit(data.images.numpy())
    return {
        JOINT: right(lambda x: model.encode(x).chances.argmax(1)),
        "k-means": right(lambda x: torch.tensor(means.predict(x.numpy()), dtype=torch.int64)),
        "mixture of 10": right(lambda x: mixture.log_joint(x).argmax(1)),
    }


def matching(found: Tensor, labels: Tensor) -> Tensor:
    """The label of each kind [CLASSES], one to one, so that as many as can be are right: Hungarian assignment."""
    counts = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    counts.index_put_((found, labels), torch.ones_like(found), accumulate=True)
    _, match = need("scipy.optimize").linear_sum_assignment(counts.numpy(), maximize=True)
    return torch.tensor(match)


def judge_drawn(
    model: ConditionalVAE, by_label: dict[str, list[Mixture]], data: Data, plan: Plan
) -> dict[str, dict[str, float]]:
    """Images drawn for labels: how many a classifier of real ones takes for what was asked; and how well one that has
    learned from them alone knows the test images, which those that are all alike do not teach."""
    labels = torch.arange(CLASSES).repeat_interleave(plan.drawn // CLASSES)
    real = classifier(data.images, data.labels)
    accuracy = float(real.score(data.test_images.numpy(), data.test_labels.numpy()))
    found = {"images": {"asked": accuracy, "taught": accuracy}}
    drawn = {CONDITIONAL: model.sample(labels, key=4)}
    for name, several in by_label.items():
        drawn[LABELLED[name]] = torch.cat([mixture.sample(plan.drawn // CLASSES) for mixture in several])
    for name, images in drawn.items():
        found[name] = {
            "asked": float(real.score(images.numpy(), labels.numpy())),
            "taught": float(classifier(images, labels).score(data.test_images.numpy(), data.test_labels.numpy())),
        }
    return found


def classifier(images: Tensor, labels: Tensor) -> Any:
    return need("sklearn.svm").SVC(C=10.0).fit(images.numpy(), labels.numpy())


# Pictures


def draw_pictures(models: dict[str, Any], mixture: Mixture, data: Data, plan: Plan) -> dict[str, Any]:
    """Rows of images [rows, columns, 64], of values from 0 to 1."""
    shown = plan.shown
    images, labels = data.test_images[:shown], data.test_labels[:shown]
    conditional, joint = models[CONDITIONAL], models[JOINT]
    samples = {
        "test images": images,
        MIXTURE: mixture.sample(shown),
        PLAIN: models[PLAIN].sample(shown, key=5),
        CONDITIONAL: conditional.sample(torch.arange(shown) % CLASSES, key=5),
        JOINT: joint.sample(shown, key=5),
    }
    rebuilt = [model.reconstruct(*given(kind, images, labels)) for kind, model in models.items()]
    codes = ops.noise("normal", [shown, plan.latent], key=6)
    every = torch.arange(CLASSES).repeat_interleave(shown)
    match = matching(joint.encode(data.images).chances.argmax(1), data.labels)
    order = match.argsort()
    joint_codes = ops.noise("normal", [shown, plan.joint_latent], key=7)
    code = joint.encode(images[:1])
    moments = joint.encode(data.test_images)
    kl = ops.kl_normal(moments.mean, moments.std).mean(0)
    latents = kl.argsort(descending=True)
    steps = torch.linspace(-REACH, REACH, shown)
    walked = code.mean.repeat(plan.joint_latent, shown, 1)
    walked[torch.arange(plan.joint_latent), :, latents] = steps
    category = code.chances.argmax(1)
    return {
        "samples": samples,
        "rebuilt": torch.stack([images, *rebuilt]),
        "labels": conditional.decode(codes.repeat(CLASSES, 1), every).view(CLASSES, shown, PIXELS),
        "categories": joint.decode(joint_codes.repeat(CLASSES, 1), order.repeat_interleave(shown)).view(
            CLASSES, shown, PIXELS
        ),
        "category labels": match[order].tolist(),
        "walks": joint.decode(walked.flatten(0, 1), category.expand(len(walked) * shown)).view(
            plan.joint_latent, shown, PIXELS
        ),
        "walk kl": kl[latents].tolist(),
        "walk label": int(match[category]),
        "seen label": int(labels[0]),
    }


if __name__ == "__main__":
    sys.exit(main())
