"""The demo of averages: one training budget, spent on the last iterate, on averages of weights and on ensembles."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from fastnuggets.molecules.files import need
from fastnuggets.parts import Parts, command, one_thread, settings
from fastnuggets.training import (
    Curve,
    FastGeometricEnsemble,
    LossPlane,
    SnapshotEnsemble,
    WeightAverager,
    loss_plane,
    swag_predict,
    update_bn,
)
from fastnuggets.training.schedules import CosineCyclicLR, FlatLinearFlatLR, TriangularCyclicLR

CLASSES = 10
BINS = 15  # of the confidence
MOMENTUM = 0.9
BASE = "last"
METHODS = (BASE, "best", "ema", "high", "high ema", "swa", "swag", "snapshot", "fge")
ANOTHER = 1_000_000  # added to a seed: the weights and batches of the second optimum


class Task(NamedTuple):
    """What is learned from; all other images are for testing."""

    name: str
    images: int
    wrong: float  # share of the labels
    network: str  # "dense" or "convolutional"


NOISY, CONVOLUTIONAL, CLEAN = TASKS = (
    Task("few and noisy labels", 300, 0.2, "dense"),
    Task("the same, better network", 300, 0.2, "convolutional"),
    Task("all labels, clean", 1297, 0.0, "dense"),
)


class Plan(NamedTuple):
    """How much the demo does, and its settings."""

    seeds: int
    steps: int  # the budget of every method
    start: int  # of the averages and of FGE's cycles
    every: int = 6  # steps from one averaged model to the next: an epoch of the small set
    cycles: int = 5  # of the ensembles
    draws: int = 30
    rank: int = 20  # of SWAG
    scale: float = 0.5  # of its covariance
    batch: int = 50
    dense: int = 96  # units a layer
    convolutional: int = 12  # channels of the first layer
    rate: float = 0.05
    high: float = 0.1  # the constant rate of SWA and SWAG, and the top of FGE's cycles
    low: float = 0.01  # the bottom of FGE's cycles
    weight_decay: float = 0.02
    decay: float = 0.98  # of the EMA
    grid: int = 25
    curve_steps: int = 900
    curve_points: int = 41


STANDARD = Plan(seeds=5, steps=600, start=450)
QUICK = Plan(seeds=2, steps=400, start=300, grid=13, curve_steps=300, curve_points=21)


class Data(NamedTuple):
    """Images [N, 1, 8, 8] float32 of mean 0 and deviation 1, and labels [N] int64."""

    images: Tensor
    labels: Tensor  # some of them wrong
    test_images: Tensor
    test_labels: Tensor


class Score(NamedTuple):
    """How one method did with one seed."""

    accuracy: float
    nll: float
    ece: float
    bins: list[list[float]]  # [BINS][3] predictions, their summed confidence, and how many are right
    passes: int  # forward passes for a prediction
    training: float  # seconds: the run and this method's part of it
    ready: float  # seconds, from the end of the run to the first prediction
    testing: float  # seconds, for all test images


class Run(NamedTuple):
    """A training and what watched it."""

    model: nn.Module
    watchers: dict[str, Any]
    seconds: float  # without the watchers
    spent: dict[str, float]  # seconds, by watcher
    rates: list[float]  # of every step
    taken: dict[str, list[int]]  # steps after which a watcher took the model


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    scores: dict[str, dict[str, list[Score]]]  # task -> method -> one a seed
    rates: dict[str, list[float]]  # run -> of every step
    taken: dict[str, list[int]]  # method -> steps
    pictures: dict[str, Any]
    parameters: dict[str, int]  # by network
    seconds: float  # of all computations, those of earlier calls too
    reused: int  # parts that an earlier call had done
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return command(
        "average",
        argv,
        run,
        (STANDARD, QUICK),
        description="A small network learns handwritten digits from few and partly wrong labels, and from many clean "
        "ones. With the same number of training steps: the last iterate, EMA, SWA, SWAG, a snapshot ensemble and FGE, "
        "side by side over several seeds. Writes OUT/average.html, a page that needs no network.",
        repeated="splits, wrong labels, weights and batches to repeat all with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The demo without its page. Each seed of each task, and the pictures, are kept in `cache` when they are done.

    Deterministic: the same settings and versions give the same bits on the same machine, interrupted or not; times
    are as they were measured.
    """
    units: dict[str, list[dict[str, Any]]] = {}
    with one_thread(), _bar(plan) as bar:
        part = Parts(cache, bar, fresh=fresh)
        for task in TASKS:
            units[task.name] = []
            for seed in range(plan.seeds):
                compute = partial(compare, task, plan, seed, bar.update)
                what = settings(plan, {"task": list(task), "seed": seed})
                units[task.name].append(part(f"{task.name}, seed {seed}", 4 * plan.steps, what, compute))
        first = units[NOISY.name][0]
        compute = partial(_pictures, plan, first["weights"], bar.update)
        ticks = plan.steps + 2 * plan.curve_steps
        what = settings(plan, {"task": list(NOISY), "seed": "pictures"})
        pictures = part("loss plane and curves", ticks, what, compute)
    return Result(
        plan,
        {
            name: {method: [Score(**unit["scores"][method]) for unit in found] for method in METHODS}
            for name, found in units.items()
        },
        first["rates"],
        first["taken"],
        pictures,
        {task.network: sum(weight.numel() for weight in network(task, plan).parameters()) for task in TASKS},
        sum(part.seconds),
        sum(part.reused),
        len(part.reused),
    )


def _bar(plan: Plan) -> Any:
    steps = len(TASKS) * plan.seeds * 4 * plan.steps + plan.steps + 2 * plan.curve_steps
    return need("tqdm").tqdm(total=steps, unit="step", disable=None)


def load(task: Task, seed: int) -> Data:
    """The digits, split by the seed; a share of the training labels is replaced by another class, at random."""
    pixels, digits = need("sklearn.datasets").load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(digits)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[: task.images], order[task.images :]
    images = (images - images[train].mean()) / images[train].std()
    given = mislabelled(labels[train], task.wrong, generator)
    return Data(images[train], given, images[test], labels[test])


def mislabelled(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Labels of which a share is replaced by another class, at random."""
    wrong = torch.randperm(len(labels), generator=generator)[: round(len(labels) * share)]
    given = labels.clone()
    given[wrong] = (given[wrong] + torch.randint(1, CLASSES, (len(wrong),), generator=generator)) % CLASSES
    return given


def network(task: Task, plan: Plan) -> nn.Sequential:
    """Two layers with batch norms, and a linear one."""
    width = getattr(plan, task.network)
    if task.network == "dense":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, CLASSES),
        )
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, CLASSES),
    )


def _batches(images: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of `steps` batches, each epoch in another order and without its last, smaller one."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        for batch in torch.randperm(images, generator=generator)[: images // size * size].view(-1, size):
            if done == steps:
                return
            yield batch
            done += 1


def train(
    task: Task,
    data: Data,
    plan: Plan,
    seed: int,
    schedule: Callable[[torch.optim.Optimizer], LRScheduler],
    watch: Callable[[nn.Module, LRScheduler], dict[str, Any]] = lambda model, schedule: {},
    tick: Callable[[], object] = lambda: None,
) -> Run:
    """Trains for the budget. `watch` gives objects whose update(), after each step, says whether it took the model.

    The same seed gives the same first weights and the same batches, whatever the schedule.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(task, plan)
    options = {"lr": plan.rate, "momentum": MOMENTUM, "weight_decay": plan.weight_decay, "fused": True}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    rate = schedule(optimizer)
    run = Run(model, watch(model, rate), 0.0, {}, [], {})
    run.spent.update(dict.fromkeys(run.watchers, 0.0))
    run.taken.update({name: [] for name in run.watchers})
    began = time.perf_counter()
    for step, index in enumerate(_batches(len(data.images), plan.batch, plan.steps, seed), 1):
        run.rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(data.images[index]), data.labels[index]).backward()
        optimizer.step()
        for name, watcher in run.watchers.items():
            before = time.perf_counter()
            if watcher.update():
                run.taken[name].append(step)
            run.spent[name] += time.perf_counter() - before
        rate.step()
        tick()
    return run._replace(seconds=time.perf_counter() - began - sum(run.spent.values()))


def _conventional(plan: Plan) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    return partial(FlatLinearFlatLR, total_steps=plan.steps)


def _kept_high(plan: Plan) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    return partial(FlatLinearFlatLR, total_steps=plan.start, final_lr=plan.high)


def _fast_cycles(plan: Plan, optimizer: torch.optim.Optimizer) -> SequentialLR:
    cycle = (plan.steps - plan.start) // plan.cycles
    parts = [_kept_high(plan)(optimizer), TriangularCyclicLR(optimizer, cycle, plan.low, plan.high)]
    return SequentialLR(optimizer, parts, [plan.start])


class _Path:
    """The iterates that SWA averages, as vectors."""

    def __init__(self, model: nn.Module, average: WeightAverager) -> None:
        self.model, self.average, self.points = model, average, []
        self.seen = 0

    def update(self) -> bool:
        if self.average.count > self.seen:
            self.points.append(parameters_to_vector(self.model.parameters()).detach().clone())
            self.seen = self.average.count
        return False


class _Best:
    """The score of a run at the moment when it was most accurate on the test images, which no method may know."""

    def __init__(self, model: nn.Module, data: Data, plan: Plan) -> None:
        self.model, self.data, self.every = model, data, 2 * plan.every
        self.calls = 0
        self.score = score(torch.full((len(data.test_labels), CLASSES), 1 / CLASSES), data.test_labels)

    def update(self) -> bool:
        self.calls += 1
        if self.calls % self.every == 0:
            found = score(predict(self.model, self.data.test_images), self.data.test_labels)
            self.score = max(self.score, found, key=lambda one: one.accuracy)
        return False


def compare(task: Task, plan: Plan, seed: int, tick: Callable[[], object]) -> dict[str, Any]:
    """All methods with one seed: four trainings of the same budget, from the same weights, on the same batches."""
    data = load(task, seed)
    batches = _bn_batches(data, plan)
    scores: dict[str, Score] = {}
    runs: dict[str, Run] = {}

    def fit(name: str, schedule: Any, watch: Any) -> Run:
        runs[name] = train(task, data, plan, seed, schedule, watch, tick)
        return runs[name]

    def judge(method: str, run: Run, predict: Callable[[Tensor], Tensor], ready: float = 0.0, passes: int = 1) -> None:
        began = time.perf_counter()
        predictions = predict(data.test_images)
        testing = time.perf_counter() - began
        training = run.seconds + run.spent.get(method, 0.0)
        scores[method] = score(predictions, data.test_labels)._replace(
            passes=passes, training=training, ready=ready, testing=testing
        )

    def judge_average(method: str, run: Run) -> dict[str, Tensor]:
        with run.watchers[method].swapped() as model:
            began = time.perf_counter()
            update_bn(batches, model, progress=False)
            judge(method, run, partial(predict, model), time.perf_counter() - began)
            return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    ema = partial(WeightAverager, mode="ema", decay=plan.decay, buffers="recompute")
    late = {"start": plan.start, "every": plan.every, "buffers": "recompute"}

    run = fit("last", _conventional(plan), lambda model, _: {"ema": ema(model), "best": _Best(model, data, plan)})
    judge(BASE, run, partial(predict, run.model))
    weights = {"last": {name: tensor.clone() for name, tensor in run.model.state_dict().items()}}
    judge_average("ema", run)
    scores["best"] = run.watchers["best"].score._replace(training=run.seconds)

    def averages(model: nn.Module, _: LRScheduler) -> dict[str, Any]:
        swa = WeightAverager(model, "swa", **late)
        return {
            "high ema": ema(model),
            "swa": swa,
            "swag": WeightAverager(model, "swag", rank=plan.rank, **late),
            "path": _Path(model, swa),
        }

    run = fit("swa", _kept_high(plan), averages)
    judge("high", run, partial(predict, run.model))
    judge_average("high ema", run)
    weights["swa"] = judge_average("swa", run)
    weights["path"] = {str(i): point for i, point in enumerate(run.watchers["path"].points)}
    draw = {"samples": plan.draws, "scale": plan.scale, "seed": seed, "bn_loader": batches, "progress": False}
    judge("swag", run, lambda images: swag_predict(run.watchers["swag"], [images], **draw), passes=plan.draws)

    cyclic = partial(CosineCyclicLR, total_steps=plan.steps, cycles=plan.cycles)
    run = fit("snapshot", cyclic, lambda model, rate: {"snapshot": SnapshotEnsemble(model, rate)})
    judge("snapshot", run, run.watchers["snapshot"].predict, passes=len(run.watchers["snapshot"]))

    run = fit(
        "fge",
        partial(_fast_cycles, plan),
        lambda model, rate: {"fge": FastGeometricEnsemble(model, rate._schedulers[1])},
    )
    judge("fge", run, run.watchers["fge"].predict, passes=len(run.watchers["fge"]))
    return {
        "scores": {method: scores[method]._asdict() for method in METHODS},
        "rates": {name: run.rates for name, run in runs.items()},
        "taken": {name: steps for run in runs.values() for name, steps in run.taken.items()},
        "weights": weights if seed == 0 and task == NOISY else {},
    }


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Probabilities [N, CLASSES]."""
    training = model.training
    model.eval()
    found = model(images).softmax(-1)
    model.train(training)
    return found


def score(probabilities: Tensor, labels: Tensor) -> Score:
    """Accuracy, mean negative log-likelihood, and the expected calibration error over BINS bins of one width."""
    confidence, chosen = probabilities.double().max(-1)
    right = (chosen == labels).double()
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    columns = torch.stack([torch.ones_like(right), confidence, right], -1)
    bins = torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, place, columns)
    nll = -probabilities.double().gather(-1, labels[:, None]).clamp(min=1e-12).log().mean()
    ece = (bins[:, 1] - bins[:, 2]).abs().sum() / len(labels)
    return Score(right.mean().item(), nll.item(), ece.item(), bins.tolist(), 1, 0.0, 0.0, 0.0)


def _bn_batches(data: Data, plan: Plan) -> list[Tensor]:
    """The training images in batches, for the running statistics."""
    whole = len(data.images) // plan.batch
    return list(data.images[: whole * plan.batch].split(plan.batch))


def _pictures(plan: Plan, weights: dict[str, dict[str, Tensor]], tick: Callable[[int], object]) -> dict[str, Any]:
    """The plane through last iterate, SWA and the first averaged iterate; curves from one optimum to another."""
    data = load(NOISY, 0)
    options: dict[str, Any] = {"bn_loader": _bn_batches(data, plan), "progress": False}

    @torch.no_grad()
    def losses(model: nn.Module) -> Tensor:
        """Loss on the labels trained with, and test error."""
        wrong = (model(data.test_images).argmax(-1) != data.test_labels).double().mean()
        return torch.stack([cross_entropy(model(data.images), data.labels).double(), wrong])

    model = network(NOISY, plan)
    points = [weights["path"][key] for key in sorted(weights["path"], key=int)]
    nn.utils.vector_to_parameters(points[0].clone(), model.parameters())
    first = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    plane = loss_plane(model, weights["last"], weights["swa"], first, losses, grid=plan.grid, margin=0.45, **options)
    names = list(first)
    corners = [torch.cat([w[name].flatten() for name in names]) for w in (weights["last"], weights["swa"], first)]
    path = project(torch.stack(points), corners, plane)

    other = train(NOISY, data, plan, ANOTHER, _conventional(plan), tick=lambda: tick(1)).model.state_dict()
    curves = {}
    batches = [(data.images[i], data.labels[i]) for i in _batches(len(data.images), plan.batch, plan.curve_steps, 0)]
    for name, kind, bends in (("straight", "chain", 0), ("chain", "chain", 1), ("bezier", "bezier", 1)):
        curve = Curve(model, weights["last"], other, kind, bends)
        if bends:
            curve.fit(
                lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
                batches,
                steps=plan.curve_steps,
                lr=plan.rate,
                weight_decay=plan.weight_decay,
                progress=False,
            )
            tick(plan.curve_steps)
        found = curve.evaluate(losses, points=plan.curve_points, **options)
        curves[name] = found._asdict()
    line = Curve(model, weights["last"], weights["swa"], "chain", 0)
    curves["to swa"] = line.evaluate(losses, points=plan.curve_points, **options)._asdict()
    return {"plane": {**plane._asdict(), "path": path}, "curves": curves}


def project(points: Tensor, corners: Sequence[Tensor], plane: LossPlane) -> Tensor:
    """Where points [P, D] lie in a plane through three corners [D], seen at right angles: [P, 2]."""
    origin, second, third = (corner.double() for corner in corners)
    basis = torch.linalg.qr(torch.stack([second - origin, third - origin], 1)).Q
    seen = (points.double() - origin) @ basis
    # QR leaves the signs open: the second corner is to the right, the third above.
    placed = torch.stack([second - origin, third - origin]) @ basis
    return seen * torch.stack([placed[0, 0].sign(), placed[1, 1].sign()])


if __name__ == "__main__":
    sys.exit(main())
