"""The demo of variance networks: layers that lose their means and go on, and whether noise keeps attackers out."""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy, nll_loss
from torch.optim.lr_scheduler import LinearLR

from fastnuggets import nn, ops
from fastnuggets.demo_average import predict, score
from fastnuggets.demo_sample import by_passes
from fastnuggets.models.lenet import LAYERS, VARIATIONAL, LeNet, with_permuted_deviations, without_means
from fastnuggets.molecules.files import need
from fastnuggets.parts import Parts, command, one_thread, settings

BASE = "plain"
NETWORKS = (BASE, "dropout", "variational", "neuron", "weight", "every layer", "variance")
SHARED = ("variational", "neuron", "weight", "every layer")  # have a divergence, and means to lose
ATTACKED = (BASE, "dropout mean", "dropout", "variational", "variance")
DRAWN = ("dropout", "variational", "variance")  # of these, those that draw while they are attacked
ATTACKS = ("random", "transfer", "one draw", "fgsm", "pgd")


class Plan(NamedTuple):
    """How much the demo does, and its settings."""

    seeds: int
    steps: int
    images: int = 1000  # learned from; the others are for testing
    averaged: tuple[int, ...] = (1, 10, 100)  # passes of a prediction
    attacked: int = 200  # of the test images
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2)  # the most a pixel is changed by, of its range
    shown: float = 0.1  # the one of which more is told
    passes: int = 20  # of a prediction under attack, and of each of its gradients
    ladder: tuple[int, ...] = (1, 3, 10, 20, 60)  # draws a gradient
    pgd_steps: int = 10
    stride: float = 0.25  # of a step of PGD, in epsilons
    batch: int = 100
    rate: float = 0.003
    alpha_rate: float = 0.1  # of ln alpha, which has far to go
    drop: float = 0.5
    channels: tuple[int, int] = (8, 16)
    dense: int = 64
    watched: int = 30  # points of the curves over training
    objective: int = 10  # draws of the loss on the training images


STANDARD = Plan(seeds=5, steps=1500)
QUICK = Plan(
    seeds=2,
    steps=300,
    averaged=(1, 5, 20),
    attacked=60,
    epsilons=(0.1, 0.2),
    passes=5,
    ladder=(1, 5, 20),
    pgd_steps=5,
)


class Data(NamedTuple):
    """Images [N, 1, 8, 8] float32 within 0 and 1, labels [N] int64."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    networks: dict[str, list[dict[str, Any]]]  # name -> one a seed
    attacks: list[dict[str, Any]]  # one a seed
    pictures: dict[str, Any]  # of the first seed
    tested: int
    parameters: int  # of the plain network
    captum: str  # its version
    seconds: float  # of all computations, those of earlier calls too
    reused: int  # parts that an earlier call had done
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return command(
        "variance",
        argv,
        run,
        (STANDARD, QUICK),
        description="A small LeNet learns handwritten digits, a layer of it by variational dropout or with weights of "
        "zero mean. Then the means are set to zero, deviations change places, and the networks are attacked, those "
        "that draw through the average of what they draw. Writes OUT/variance.html, a page that needs no network, and "
        "its figures in OUT/variance.json. Needs captum.",
        repeated="splits, weights and batches to repeat everything with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The demo without its page. Each seed is kept in `cache` when it is done.

    Deterministic: the same settings and versions give the same bits on the same machine, interrupted or not; times
    are as they were measured. ImportError, before anything is computed, without captum.
    """
    need("captum.robust", "demo")
    version = str(need("captum").__version__)
    ticks = len(NETWORKS) * plan.steps + _gradients(plan)
    units = []
    with one_thread(), need("tqdm").tqdm(total=plan.seeds * ticks, unit="step", disable=None) as bar:
        part = Parts(cache, bar, fresh=fresh)
        for seed in range(plan.seeds):
            what = settings(plan, {"seed": seed, "captum": version})
            units.append(part(f"seed {seed}", ticks, what, partial(compare, plan, seed, bar.update)))
    return Result(
        plan,
        {name: [unit["networks"][name] for unit in units] for name in NETWORKS},
        [unit["attacks"] for unit in units],
        units[0]["pictures"],
        len(load(plan, 0).test_images),
        sum(weight.numel() for weight in network(BASE, plan).parameters()),
        version,
        sum(part.seconds),
        sum(part.reused),
        len(part.reused),
    )


def load(plan: Plan, seed: int) -> Data:
    """The digits, split by the seed."""
    pixels, digits = need("sklearn.datasets").load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(digits)[order]
    split = plan.images
    return Data(images[:split], labels[:split], images[split:], labels[split:])


def network(name: str, plan: Plan) -> LeNet:
    """What is noise in it: nothing, what dropout drops, the first dense layer, or every layer."""
    kinds = {"variance": {"dense1": "variance"}, "every layer": dict.fromkeys(LAYERS, "variational")}
    kind = kinds.get(name, {"dense1": "variational"} if name in SHARED else {})
    alpha = name if name in ("neuron", "weight") else "layer"
    drop = plan.drop if name == "dropout" else 0.0
    return LeNet(kind, channels=plan.channels, dense=plan.dense, alpha=alpha, drop=drop)


# Learning


def train(name: str, data: Data, plan: Plan, seed: int, tick: Callable[[], object]) -> tuple[LeNet, dict[str, Any]]:
    """The network after its steps, in eval mode, and what was seen on the way."""
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, list[Any]] = {"step": [], "ln alpha": [], "one draw": [], "mean": []}
    every = max(1, plan.steps // plan.watched)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(name, plan)
        slow = [p for n, p in model.named_parameters() if not n.endswith("log_alpha")]
        fast = [p for n, p in model.named_parameters() if n.endswith("log_alpha")]
        optimizer = torch.optim.Adam([{"params": slow}, {"params": fast, "lr": plan.alpha_rate}], plan.rate, fused=True)
        rate = LinearLR(optimizer, 1.0, 0.0, plan.steps)
        for step in range(plan.steps):
            if name == "variational" and (step % every == 0 or step == plan.steps - 1):
                _watch(model, data, step, seen)
            index = torch.randperm(len(data.images), generator=generator)[: plan.batch]
            loss = cross_entropy(model(data.images[index]), data.labels[index])
            if name in SHARED:
                loss = loss + nn.kl(model) / len(data.images)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
            tick()
    return model.eval(), {"seen": seen, "training": time.perf_counter() - began}


def _watch(model: LeNet, data: Data, step: int, seen: dict[str, list[Any]]) -> None:
    """Accuracy by the means and by one draw, and ln alpha; draws nothing that training would have drawn."""
    model.eval()
    with torch.random.fork_rng(devices=[]):
        with nn.sampling(model):
            drawn = predict(model, data.test_images)
        mean = predict(model, data.test_images)
    model.train()
    seen["step"].append(step)
    seen["ln alpha"].append(ln_alphas(model)["dense1"])
    seen["one draw"].append(score(drawn, data.test_labels).accuracy)
    seen["mean"].append(score(mean, data.test_labels).accuracy)


def ln_alphas(model: LeNet) -> dict[str, float]:
    """Mean ln alpha of each layer that has one."""
    layers = {name: getattr(model, name) for name in LAYERS}
    return {n: layer.ln_alpha().mean().item() for n, layer in layers.items() if isinstance(layer, VARIATIONAL)}


def objective(model: LeNet, data: Data, draws: int) -> float:
    """What the bound maximises, with its sign turned: cross entropy of a draw and divergence / N, nats an image.

    Noise of batch norms is left out: their running statistics are used. Of variance layers the divergence is that of
    alpha -> infinity, 0.
    """
    with torch.no_grad(), nn.sampling(model):
        losses = [cross_entropy(model(data.images), data.labels).item() for _ in range(draws)]
        return sum(losses) / draws + nn.kl(model).item() / len(data.images)


# Predictions


def means_alone(model: LeNet) -> LeNet:
    return nn.weight_scaling_(copy.deepcopy(model))  # type: ignore[return-value]


def judge(model: LeNet, data: Data, passes: Sequence[int]) -> dict[str, Any]:
    """Accuracy and negative log-likelihood by the number of passes that are averaged."""
    stack = nn.mc_predict(model, data.test_images, passes[-1], reduce="none", activation="softmax")
    return {
        "accuracy": by_passes(stack, passes, lambda p: score(p, data.test_labels).accuracy),
        "nll": by_passes(stack, passes, lambda p: score(p, data.test_labels).nll),
    }


def measure(name: str, model: LeNet, data: Data, plan: Plan, seed: int) -> dict[str, Any]:
    """A network as it is, by its means alone, without its means, and with its deviations elsewhere."""
    alone = score(predict(means_alone(model), data.test_images), data.test_labels)
    found: dict[str, Any] = {"mean": alone.accuracy, "mean nll": alone.nll, "ln alpha": ln_alphas(model)}
    if name != BASE:
        found["drawn"] = judge(model, data, plan.averaged)
    if name in (*SHARED, "variance"):
        found["objective"] = objective(model, data, plan.objective)
        permuted = with_permuted_deviations(model, torch.Generator().manual_seed(seed))
        found["permuted"] = judge(permuted, data, plan.averaged)
    if name in SHARED:
        found["zeroed"] = judge(without_means(model), data, plan.averaged)
        found["objective zeroed"] = objective(without_means(model), data, plan.objective)
    if name == "every layer":
        found["one zeroed"] = {layer: judge(without_means(model, [layer]), data, plan.averaged) for layer in LAYERS}
    return found


def compare(plan: Plan, seed: int, tick: Callable[..., object]) -> dict[str, Any]:
    """All networks with one seed, and the attacks on them."""
    data = load(plan, seed)
    models, found = {}, {}
    for name in NETWORKS:
        models[name], found[name] = train(name, data, plan, seed, tick)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, model in models.items():
            found[name] |= measure(name, model, data, plan, seed)
        attacks, pictures = attack_all(models, data, plan, tick)
    return {"networks": found, "attacks": attacks, "pictures": pictures if seed == 0 else {}}


# Attacks


def _gradients(plan: Plan) -> int:
    """How many gradients the attacks of one seed take."""
    one = (1 + plan.pgd_steps) * len(plan.epsilons)
    return len(ATTACKED) * one + len(DRAWN) * plan.pgd_steps * (len(plan.epsilons) + len(plan.ladder))


def mean_log_probabilities(model: Module, samples: int, images: Tensor) -> Tensor:
    """ln of the mean probability of so many passes, [N, C]: what is attacked is what predicts.

    All passes are one call of images that are repeated, so that layers must draw for each row.
    """
    logits = model(images.repeat(samples, 1, 1, 1)).log_softmax(-1)
    return logits.view(samples, len(images), -1).logsumexp(0) - math.log(samples)


def attack(
    model: Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    samples: int,
    steps: int = 0,
    stride: float = 0.25,
    tick: Callable[..., object] = lambda n: None,
) -> Tensor:
    """Images [N, 1, H, W] within 0 and 1, changed by at most `epsilon` a pixel so that the loss grows, by captum.

    Args:
        samples: passes whose mean is attacked, drawn anew for each gradient: expectation over transformation.
        steps: of PGD from a random start, each of `stride` epsilons; 0: FGSM, one step of a whole one.

    I. Goodfellow, J. Shlens, C. Szegedy, arXiv:1412.6572 (FGSM); A. Madry et al., arXiv:1706.06083 (PGD); A. Athalye,
    N. Carlini, D. Wagner, arXiv:1802.00420 (averaging gradients of what is random).
    """
    robust = need("captum.robust", "demo")
    options = {"lower_bound": 0.0, "upper_bound": 1.0}

    def loss(log_probabilities: Tensor, labels: Tensor) -> Tensor:
        return nll_loss(log_probabilities, labels, reduction="sum").view(1)

    what = (partial(mean_log_probabilities, model, samples), loss)
    with warnings.catch_warnings(), nn.sampling(model):
        warnings.filterwarnings("ignore", "Input Tensor", UserWarning)  # that captum asks for a gradient by itself
        method = robust.PGD(*what, **options) if steps else robust.FGSM(*what, **options)
        # By default pixels with a gradient below 1e-6 stay: a network that is sure would look as if it were robust.
        (method.fgsm if steps else method).zero_thresh = 0.0
        if steps:
            found = method.perturb(images, epsilon, stride * epsilon, steps, labels, random_start=True)
        else:
            found = method.perturb(images, epsilon, labels)
    tick(max(1, steps))
    return found.detach()


def attack_all(
    models: dict[str, LeNet], data: Data, plan: Plan, tick: Callable[..., object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracy of each network under each attack, by epsilon; and images that were changed, with what is said of them.

    "random": each pixel up or down by epsilon. "transfer": what PGD makes of the images for the plain network. "one
    draw": PGD with one pass a gradient. "fgsm", "pgd": with as many passes a gradient as a prediction has.
    """
    images, labels = data.test_images[: plan.attacked], data.test_labels[: plan.attacked]
    judged = {name: means_alone(models["dropout"]) if name == "dropout mean" else models[name] for name in ATTACKED}
    pgd = partial(attack, steps=plan.pgd_steps, stride=plan.stride, tick=tick)
    fgsm = partial(attack, tick=tick)

    def said(name: str, changed: Tensor) -> Tensor:
        if name not in DRAWN:
            return predict(judged[name], changed)
        return nn.mc_predict(judged[name], changed, plan.passes, activation="softmax").mean

    def right(name: str, changed: Tensor) -> float:
        return score(said(name, changed), labels).accuracy

    clean = {name: right(name, images) for name in ATTACKED}
    found: dict[str, Any] = {name: {kind: [] for kind in ATTACKS} for name in ATTACKED}
    pictures: dict[str, Any] = {}
    for epsilon in plan.epsilons:
        random = (images + epsilon * ops.random_signs(torch.ones_like(images))).clamp(0, 1)
        made = {}
        for name, model in judged.items():
            samples = plan.passes if name in DRAWN else 1
            made[name] = pgd(model, images, labels, epsilon, samples=samples)
            own = found[name]
            own["random"].append(right(name, random))
            own["pgd"].append(right(name, made[name]))
            own["fgsm"].append(right(name, fgsm(model, images, labels, epsilon, samples=samples)))
            if name != BASE:
                own["transfer"].append(right(name, made[BASE]))
            if name in DRAWN:
                own["one draw"].append(right(name, pgd(model, images, labels, epsilon, samples=1)))
        if epsilon == plan.shown:
            pictures = {
                "images": images[:8],
                "labels": labels[:8],
                "clean": {name: said(name, images)[:8] for name in made},
                "changed": {name: changed[:8] for name, changed in made.items()},
                "said": {name: said(name, changed)[:8] for name, changed in made.items()},
            }
    ladder = {
        name: [right(name, pgd(judged[name], images, labels, plan.shown, samples=samples)) for samples in plan.ladder]
        for name in DRAWN
    }
    return {"clean": clean, "by epsilon": found, "ladder": ladder}, pictures


if __name__ == "__main__":
    sys.exit(main())
