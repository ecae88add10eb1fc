"""The demo of sampling: a layer that is nothing but noise, networks that say what they do not know, and the noise."""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import BatchNorm1d, Linear, Module, ReLU, Sequential
from torch.nn.functional import affine_grid, cross_entropy, dropout, grid_sample
from torch.optim.lr_scheduler import LinearLR

from fastnuggets import nn, ops
from fastnuggets.demo_average import predict, score
from fastnuggets.molecules.files import cores, need
from fastnuggets.parts import Parts, command, one_thread, settings

CORNERS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # the centres of the toy's classes
TOY_PASSES = (1, 2, 5, 10, 20, 50, 100)
CLASSES = 8  # the digits that are learned; two are held out
PASSES = (1, 2, 5, 10, 20, 50)
ANGLES = (0, 15, 30, 45, 60, 75, 90)
BASE = "plain"
METHODS = (BASE, "decay", "ensemble", "dropout", "concrete", "bayes", "variance")
SAMPLED = METHODS[3:]
MEANS = ("dropout", "concrete", "bayes", "variance")  # judged once more in one pass, without their noise
STRANGE = ("held out", "shuffled", "white noise")
LAYOUTS = ("1 thread", "3 threads", "transposed", "one less", "bfloat16", "float64", "no vectors")
ROWS, COLUMNS = 16, 64  # of the noise shown


class Task(NamedTuple):
    """How many images are learned from, and by which methods."""

    name: str
    images: int
    methods: tuple[str, ...]


FEW, MORE = TASKS = (Task("few images", 60, METHODS), Task("more images", 250, (BASE, "decay", "dropout", "bayes")))


class Plan(NamedTuple):
    """How much the demo does, and its settings."""

    seeds: int
    steps: int
    toy_steps: int
    members: int  # of the ensemble
    toy_seeds: int = 3
    toy_points: int = 2000
    toy_width: int = 32
    toy_rate: float = 0.01
    toy_penalty: float = 0.001  # of the squared logarithm of variances, so that they stay within a picture
    toy_batch: int = 200
    passes: int = 50
    strange: int = 500  # images at most of each kind that is not learned
    width: int = 100
    batch: int = 50
    rate: float = 0.003
    decay: float = 1.0  # decoupled weight decay of one method
    drop: float = 0.5
    prior_std: float = 2.0  # of Bayesian weights
    concrete_std: float = 3.0
    calls: int = 9  # of each that is timed
    shown: int = 6


STANDARD = Plan(seeds=5, steps=600, toy_steps=1500, members=5)
QUICK = Plan(seeds=2, steps=150, toy_steps=400, members=3, toy_seeds=2, calls=3)


class Data(NamedTuple):
    """Images [N, 64] float32, of which the ones learned from have mean 0 and deviation 1; labels [N] int64."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    strange: dict[str, Tensor]  # images of no class that is learned
    turned: dict[int, Tensor]  # the first test images, by angle in degrees
    names: list[int]  # the digit of each class
    held_out: list[int]  # the two digits


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    toys: list[dict[str, Any]]  # one a seed
    scores: dict[str, dict[str, list[dict[str, Any]]]]  # task -> method -> one a seed
    examples: dict[str, Any]
    noise: dict[str, Any]
    speed: dict[str, Any]
    parameters: int  # of the plain network
    seconds: float  # of all computations, those of earlier calls too
    reused: int  # parts that an earlier call had done
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return command(
        "sample",
        argv,
        run,
        (STANDARD, QUICK),
        description="Four classes are told apart by a layer whose weights are nothing but noise. Then a small network "
        "learns eight of ten handwritten digits from few images: plain, with weight decay, as an ensemble, with "
        "dropout that is sampled, with Gaussian weights; and each says how sure it is of what it knows, and of what it "
        "has never seen. Last, the noise itself. Writes OUT/sample.html, a page that needs no network, and its figures "
        "in OUT/sample.json.",
        repeated="held-out digits, splits, weights and batches to repeat the digits with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The demo without its page. Each seed, the noise and its speed are kept in `cache` when they are done.

    Deterministic: the same settings and versions give the same bits on the same machine, interrupted or not; times
    are as they were measured.
    """
    ticks = {task.name: _trainings(task, plan) * plan.steps for task in TASKS}
    total = plan.toy_seeds * plan.toy_steps + plan.seeds * sum(ticks.values())
    with one_thread(), need("tqdm").tqdm(total=total, unit="step", disable=None) as bar:
        part = Parts(cache, bar, fresh=fresh)
        what = {"part": "noise", "noise": list(LAYOUTS)}
        noise = part("noise", 0, settings(plan, what), compare_noise)
        speed = part("speed", 0, settings(plan, {"part": "speed"}), partial(measure, plan))
        toys = []
        for seed in range(plan.toy_seeds):
            what = settings(plan, {"part": "toy", "seed": seed})
            toys.append(part(f"toy, seed {seed}", plan.toy_steps, what, partial(toy, plan, seed, bar.update)))
        units: dict[str, list[dict[str, Any]]] = {task.name: [] for task in TASKS}
        for task in TASKS:
            for seed in range(plan.seeds):
                what = settings(plan, {"part": list(task), "seed": seed})
                compute = partial(digits, task, plan, seed, bar.update)
                units[task.name].append(part(f"{task.name}, seed {seed}", ticks[task.name], what, compute))
    return Result(
        plan,
        toys,
        {
            name: {method: [unit["scores"][method] for unit in found] for method in found[0]["scores"]}
            for name, found in units.items()
        },
        units[FEW.name][0]["examples"],
        noise,
        speed,
        sum(weight.numel() for weight in network(BASE, plan).parameters()),
        sum(part.seconds),
        sum(part.reused),
        len(part.reused),
    )


def _trainings(task: Task, plan: Plan) -> int:
    return len(task.methods) + (plan.members - 2 if "ensemble" in task.methods else 0)


# A layer that is nothing but noise


def toy_data(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points [n, 2] about four corners, and the corner of each [n]."""
    labels = torch.randint(4, (n,), generator=generator)
    return CORNERS[labels] + 0.25 * torch.randn(n, 2, generator=generator), labels


def toy_network(width: int) -> Sequential:
    """Its third module is the variance layer, of two neurons without a bias: all goes through their noise."""
    noise = nn.VarianceLinear(width, 2, bias=False)
    return Sequential(Linear(2, width), ReLU(), noise, Linear(2, width), ReLU(), Linear(width, 4))


def toy(plan: Plan, seed: int, tick: Callable[[], object]) -> dict[str, Any]:
    """Trains the toy; its accuracy by passes and by the weights' means, and its activations by class."""
    generator = torch.Generator().manual_seed(seed)
    (points, labels), (test, truth) = (toy_data(plan.toy_points, generator) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = toy_network(plan.toy_width)
        optimizer = torch.optim.Adam(model.parameters(), plan.toy_rate)
        rate = LinearLR(optimizer, 1.0, 0.0, plan.toy_steps)
        for _ in range(plan.toy_steps):
            index = torch.randint(len(points), (plan.toy_batch,), generator=generator)
            loss = cross_entropy(model(points[index]), labels[index])
            loss = loss + plan.toy_penalty * _variances(model, points[index]).log().square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
            tick()
        stack = nn.mc_predict(model, test, TOY_PASSES[-1], reduce="none", activation="softmax")
        means = predict(nn.weight_scaling_(copy.deepcopy(model)), test)
        with torch.no_grad():
            activations = model[:3](test)
            deviations = _variances(model, test).sqrt()
    right = partial(_accuracy, truth)
    return {
        "accuracy": by_passes(stack, TOY_PASSES, right),
        "means": right(means),
        "activations": [activations[truth == corner] for corner in range(4)],
        "deviations": [deviations[truth == corner].median(0).values.tolist() for corner in range(4)],
    }


def _variances(model: Sequential, points: Tensor) -> Tensor:
    return model[:2](points).square() @ model[2].weight.square().mT


def _accuracy(labels: Tensor, probabilities: Tensor) -> float:
    return (probabilities.argmax(-1) == labels).double().mean().item()


def by_passes(stack: Tensor, counts: Sequence[int], measure: Callable[[Tensor], float]) -> list[float]:
    """A measure of the mean of so many passes of `stack` [S, N, C], averaged over as many groups as there are."""
    return [statistics.fmean(measure(group.mean(0)) for group in stack[: len(stack) // n * n].split(n)) for n in counts]


# Digits


def load(task: Task, plan: Plan, seed: int) -> Data:
    """Eight of ten digits, split by the seed, and what is strange to who knows them."""
    pixels, found = need("sklearn.datasets").load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32), torch.tensor(found)
    held_out = [2 * seed % 10, (2 * seed + 1) % 10]
    names = [digit for digit in range(10) if digit not in held_out]
    known = torch.isin(labels, torch.tensor(names))
    others, images = images[~known], images[known]
    labels = torch.searchsorted(torch.tensor(names), labels[known])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    images, labels = images[order], labels[order]
    mean, std = images[: task.images].mean(), images[: task.images].std()
    test = images[task.images :]
    few = test[: plan.strange]
    places = torch.rand(few.shape, generator=generator).argsort(1)
    strange = {
        "held out": (others[torch.randperm(len(others), generator=generator)] - mean) / std,
        "shuffled": (few.gather(1, places) - mean) / std,
        "white noise": torch.randn(few.shape, generator=generator),
    }
    turned = {angle: (turn(few, angle) - mean) / std for angle in ANGLES}
    images = (images - mean) / std
    split = task.images
    return Data(images[:split], labels[:split], images[split:], labels[split:], strange, turned, names, held_out)


def turn(images: Tensor, angle: float) -> Tensor:
    """Images [N, 64] turned by so many degrees about their middle, 0 where nothing was."""
    if angle == 0:
        return images
    cos, sin = torch.tensor(angle).deg2rad().cos(), torch.tensor(angle).deg2rad().sin()
    matrix = torch.stack([torch.stack([cos, -sin, cos * 0]), torch.stack([sin, cos, cos * 0])])
    grid = affine_grid(matrix.expand(len(images), 2, 3), [len(images), 1, 8, 8], align_corners=False)
    return grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)


def network(method: str, plan: Plan) -> Module:
    """Three linear layers; what is between or in them is the method's."""
    width = plan.width
    first, last = Linear(64, width), Linear(width, CLASSES)
    between: Module = Linear(width, width)
    if method == "concrete":
        between = nn.ConcreteDropout(Linear(width, width), prior_std=plan.concrete_std)
        return Sequential(first, ReLU(), between, ReLU(), nn.ConcreteDropout(last, prior_std=plan.concrete_std))
    if method == "variance":
        between = Sequential(nn.VarianceLinear(width, width), BatchNorm1d(width))
    drop = [nn.Dropout(plan.drop)] if method == "dropout" else []
    model = Sequential(first, ReLU(), *drop, between, ReLU(), *drop, last)
    return nn.bayesianize(model, prior_std=plan.prior_std) if method == "bayes" else model


def train(method: str, data: Data, plan: Plan, seed: int, tick: Callable[[], object]) -> tuple[Module, float]:
    """The network after its steps, in eval mode, and the seconds that they took."""
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(method, plan)
        decay = plan.decay if method == "decay" else 0.0
        optimizer = torch.optim.AdamW(model.parameters(), plan.rate, weight_decay=decay)
        rate = LinearLR(optimizer, 1.0, 0.0, plan.steps)
        for _ in range(plan.steps):
            index = torch.randperm(len(data.images), generator=generator)[: plan.batch]
            loss = cross_entropy(model(data.images[index]), data.labels[index])
            if method in ("bayes", "concrete"):
                loss = loss + nn.kl(model) / len(data.images)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
            tick()
    return model.eval(), time.perf_counter() - began


def passes(models: Sequence[Module], images: Tensor, samples: int) -> Tensor:
    """Probabilities [S, N, CLASSES] of so many passes of a model that draws, or of one of each of several."""
    if samples > 1:
        return torch.cat([nn.mc_predict(m, images, samples, reduce="none", activation="softmax") for m in models])
    return torch.stack([predict(model, images) for model in models])


class Doubt(NamedTuple):
    """How unsure passes [S, N, CLASSES] are of each image, in nats."""

    entropy: Tensor  # [N] of their mean
    disagreement: Tensor  # [N] that less their mean entropy, the mutual information


def doubt(stack: Tensor) -> Doubt:
    entropy = torch.special.entr(stack.mean(0)).sum(-1)
    return Doubt(entropy, entropy - torch.special.entr(stack).sum(-1).mean(0))


def detection(known: Tensor, strange: Tensor) -> float:
    """The chance that a strange image has the higher score, an equal one counted half: the area under the ROC."""
    truth = torch.cat([torch.zeros(len(known)), torch.ones(len(strange))])
    return float(need("sklearn.metrics").roc_auc_score(truth, torch.cat([known, strange])))


def digits(task: Task, plan: Plan, seed: int, tick: Callable[[], object]) -> dict[str, Any]:
    """All methods of a task with one seed."""
    data = load(task, plan, seed)
    trained: dict[str, tuple[list[Module], int]] = {}
    seconds = {}
    for method in task.methods:
        if method == "ensemble":
            others = [train(BASE, data, plan, 1000 * seed + i, tick) for i in range(1, plan.members)]
            trained[method] = trained[BASE][0] + [model for model, _ in others], 1
            seconds[method] = seconds[BASE] + sum(each for _, each in others)
        else:
            model, seconds[method] = train(method, data, plan, 1000 * seed, tick)
            trained[method] = [model], plan.passes if method in SAMPLED else 1
    for method in (method for method in MEANS if method in task.methods):
        trained[f"{method} mean"] = [nn.weight_scaling_(copy.deepcopy(trained[method][0][0]))], 1
        seconds[f"{method} mean"] = seconds[method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scores = {
            method: judge(models, data, samples) | {"training": seconds[method]}
            for method, (models, samples) in trained.items()
        }
        examples = _examples(plan, data, trained) if seed == 0 and task == FEW else {}
    return {"scores": scores, "examples": examples}


def judge(models: Sequence[Module], data: Data, samples: int) -> dict[str, Any]:
    """How well a method is right, how well it knows it, and whether it doubts what is strange."""
    began = time.perf_counter()
    stack = passes(models, data.test_images, samples)
    testing = time.perf_counter() - began
    known = doubt(stack)
    found = score(stack.mean(0), data.test_labels)
    strange = {name: doubt(passes(models, images, samples)) for name, images in data.strange.items()}
    turned = []
    for images in data.turned.values():
        probabilities = passes(models, images, samples).mean(0)
        of = score(probabilities, data.test_labels[: len(images)])
        turned.append([of.accuracy, of.nll, probabilities.amax(-1).double().mean().item()])

    def nll(probabilities: Tensor) -> float:
        return score(probabilities, data.test_labels).nll

    return {
        "accuracy": found.accuracy,
        "nll": found.nll,
        "ece": found.ece,
        "bins": found.bins,
        "passes": len(stack),
        "testing": testing,
        "known": known.entropy,
        "strange": {name: of.entropy for name, of in strange.items()},
        "entropy": {name: detection(known.entropy, of.entropy) for name, of in strange.items()},
        "disagreement": {name: detection(known.disagreement, of.disagreement) for name, of in strange.items()}
        if len(stack) > 1
        else {},
        "turned": turned,
        "by passes": by_passes(stack, [n for n in PASSES if n <= len(stack)], nll),
    }


def _examples(plan: Plan, data: Data, trained: dict[str, tuple[list[Module], int]]) -> dict[str, Any]:
    """The first held-out images, and the first that are known, with what some methods say of them."""
    few = torch.cat([data.strange["held out"][: plan.shown], data.test_images[: plan.shown]])
    said = {}
    for method in (BASE, "dropout", "bayes"):
        models, samples = trained[method]
        stack = passes(models, few, samples)
        said[method] = {"mean": stack.mean(0), "std": stack.std(0) if len(stack) > 1 else torch.zeros_like(stack[0])}
    return {"images": few, "said": said, "names": data.names, "held out": data.held_out}


# Noise

# Printed by a process that may use no vector instructions: 1024 normals of each, as hexadecimal bytes.
PRINT = """
import torch
from fastnuggets import ops
key = torch.tensor([{seed}, 0])
print(ops.noise("normal", [{n}], key=key).numpy().tobytes().hex())
torch.manual_seed({seed})
print(torch.randn({n}).numpy().tobytes().hex())
"""


def compare_noise() -> dict[str, Any]:
    """Normals of one seed, of ours and of torch, where the same are to be expected: which of them differ."""
    seed, n = 1, ROWS * COLUMNS
    script = PRINT.format(seed=seed, n=n)
    slow = {"FASTNUGGETS_SIMD": "generic", "ATEN_CPU_CAPABILITY": "default"}
    printed = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **slow}, capture_output=True, text=True, check=True
    ).stdout.split()
    differ: dict[str, dict[str, Tensor]] = {}
    shown = {}
    for who, line in zip(("ours", "torch"), printed, strict=True):
        fill = partial(_fill, who, seed)
        found = {}
        for threads, name in ((1, "1 thread"), (3, "3 threads")):
            torch.set_num_threads(threads)
            found[name] = fill(torch.empty(ROWS, COLUMNS))
        torch.set_num_threads(1)
        first = found["1 thread"]
        shown[who] = first
        found["transposed"] = fill(torch.empty(COLUMNS, ROWS).mT)
        found["one less"] = torch.cat([fill(torch.empty(n - 1)), first.flatten()[-1:]]).view(ROWS, COLUMNS)
        found["bfloat16"] = fill(torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16))
        found["float64"] = fill(torch.empty(ROWS, COLUMNS, dtype=torch.float64))
        bits = torch.frombuffer(bytearray.fromhex(line), dtype=torch.float32)
        found["no vectors"] = bits.view(ROWS, COLUMNS)
        differ[who] = {name: made != first.to(made.dtype) for name, made in found.items()}
    return {"values": shown, "differ": differ, "seed": seed}


def _fill(who: str, seed: int, out: Tensor) -> Tensor:
    if who == "ours":
        return ops.noise_(out, "normal", key=seed)
    return out.normal_(generator=torch.Generator().manual_seed(seed))


def measure(plan: Plan) -> dict[str, Any]:
    """Seconds of a call, ours and torch's in turns, for one thread and for all of torch's."""
    n = 2**20
    place, x = torch.empty(n), torch.randn(1024, 1024, requires_grad=True)
    mean, logvar = (torch.randn(2048, 512, requires_grad=True) for _ in range(2))
    logits = torch.randn(2048, 512, requires_grad=True)

    def backward(make: Callable[[], Tensor], *leaves: Tensor) -> None:
        torch.autograd.grad(make().sum(), leaves)

    def ours_kl() -> Tensor:
        z, kl = ops.rsample_normal_kl(mean, logvar, form="logvar")
        return z.sum() + kl.sum()

    def torch_kl() -> Tensor:
        z = mean + (logvar / 2).exp() * torch.randn_like(mean)
        return z.sum() + ((logvar.exp() + mean.square() - 1 - logvar) / 2).sum()

    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "1 M normals": (lambda: ops.noise_(place, "normal"), place.normal_),
        "1 M uniforms": (lambda: ops.noise_(place, "uniform"), place.uniform_),
        "1 M exponentials": (lambda: ops.noise_(place, "exponential"), place.exponential_),
        "dropout, forward and backward": (
            lambda: backward(lambda: ops.dropout(x, 0.5), x),
            lambda: backward(lambda: dropout(x, 0.5), x),
        ),
        "draw and KL, forward and backward": (
            lambda: backward(ours_kl, mean, logvar),
            lambda: backward(torch_kl, mean, logvar),
        ),
        "Gumbel-softmax, forward and backward": (
            lambda: backward(lambda: ops.gumbel_softmax(logits).square(), logits),
            lambda: backward(lambda: torch.nn.functional.gumbel_softmax(logits).square(), logits),
        ),
    }
    found: dict[str, Any] = {}
    for threads in sorted({1, min(2, cores())}):
        torch.set_num_threads(threads)
        found[str(threads)] = {name: _medians(pair, plan.calls) for name, pair in cases.items()}
    torch.set_num_threads(1)
    return {"times": found}


def _medians(pair: Sequence[Callable[[], object]], calls: int) -> list[float]:
    times: list[list[float]] = [[] for _ in pair]
    for _ in range(calls + 1):
        for call, own in zip(pair, times, strict=True):
            began = time.perf_counter()
            call()
            own.append(time.perf_counter() - began)
    return [statistics.median(own[1:]) for own in times]  # the first call warms up


if __name__ == "__main__":
    sys.exit(main())
