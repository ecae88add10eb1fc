"""The demo of masks and depth: dropout, stochastic depth and very large dropout beside averages and ensembles."""

from __future__ import annotations

import string
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import LayerNorm, Linear, Module, ReLU, Sequential
from torch.nn.functional import affine_grid, avg_pool2d, conv2d, cross_entropy, grid_sample, pad

from fastnuggets import nn
from fastnuggets.demo_average import CLASSES, mislabelled, predict, score
from fastnuggets.demo_sample import turn
from fastnuggets.molecules.files import need
from fastnuggets.parts import Parts, command, one_thread, settings
from fastnuggets.training import WeightAverager
from fastnuggets.training.schedules import FlatLinearFlatLR

LETTERS = string.ascii_letters
FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmr10",
    "cmss10",
    "cmtt10",
)
BASE = "plain"
TRAINED = (BASE, "swa", "dropout", "depth", "large", "larger")  # each a training of its own
METHODS = (BASE, "ema", "swa", "ensemble", "dropout mean", "dropout", "depth mean", "depth", "large", "larger")
SAMPLED = ("dropout", "depth")
SHIFTS = ("turned", "blurred", "noisy", "moved", "hidden")
CLEAN = "clean"


class Task(NamedTuple):
    """What is learned from, and from where."""

    name: str
    images: int
    wrong: float  # share of the labels
    letters: bool  # whether the network has learned letters before


TASKS = (
    Task("few labels", 100, 0.0, False),
    Task("noisy labels", 300, 0.2, False),
    Task("few labels, after letters", 100, 0.0, True),
    Task("noisy labels, after letters", 300, 0.2, True),
)


class Plan(NamedTuple):
    """How much the demo does, and its settings."""

    seeds: int
    steps: int
    letter_steps: int
    members: int = 5  # of the ensemble
    passes: int = 20
    tested: int = 1000
    width: int = 64
    blocks: int = 4
    batch: int = 50
    rate: float = 0.002
    weight_decay: float = 0.01
    drop: float = 0.5  # of the representation and inside each block
    depth: float = 0.5  # of the last block; of the others less, linearly
    large: float = 0.9  # of the representation
    larger: float = 0.95
    decay: float = 0.98  # of the EMA
    start: float = 0.6  # of the steps, from which SWA averages
    every: int = 5
    high: float = 0.5  # of the rate, at which SWA stays


STANDARD = Plan(seeds=5, steps=250, letter_steps=1000)
QUICK = Plan(seeds=2, steps=60, letter_steps=100, members=3, passes=5, tested=300)


class Data(NamedTuple):
    """Images [N, 64] float32 of which those learned from have mean 0 and deviation 1, labels [N] int64."""

    images: Tensor
    labels: Tensor  # some of them wrong
    tests: dict[str, Tensor]  # clean, and as each shift has them
    test_labels: Tensor


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    scores: dict[str, dict[str, list[dict[str, Any]]]]  # task -> method -> one a seed
    letters: list[float]  # accuracy on letters that were drawn anew, one a seed
    pictures: dict[str, Tensor]
    parameters: int
    seconds: float  # of all computations, those of earlier calls too
    reused: int  # parts that an earlier call had done
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return command(
        "dropout",
        argv,
        run,
        (STANDARD, QUICK),
        description="A residual network learns handwritten digits from few labels, and from more of which some are "
        "wrong; from scratch, and after it has learned letters. Plain, with dropout, with stochastic depth, with very "
        "large dropout of the representation, as averages of weights and as an ensemble, each is tested on digits as "
        "they are and on digits that are turned, blurred, noisy, moved or half hidden. Writes OUT/dropout.html, a page "
        "that needs no network, and its figures in OUT/dropout.json.",
        repeated="splits, labels, weights and batches to repeat everything with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The demo without its page. Each seed of a task is kept in `cache` when it is done.

    Deterministic: the same settings and versions give the same bits on the same machine, interrupted or not; times
    are as they were measured.
    """
    ticks = (len(TRAINED) + plan.members - 1) * plan.steps
    total = plan.seeds * (plan.letter_steps + len(TASKS) * ticks)
    scores: dict[str, list[dict[str, Any]]] = {task.name: [] for task in TASKS}
    letters = []
    with one_thread(), need("tqdm").tqdm(total=total, unit="step", disable=None) as bar:
        part = Parts(cache, bar, fresh=fresh)
        for seed in range(plan.seeds):
            what = settings(plan, {"part": "letters", "faces": list(FACES), "seed": seed})
            first = part(
                f"letters, seed {seed}", plan.letter_steps, what, partial(learn_letters, plan, seed, bar.update)
            )
            letters.append(first["accuracy"])
            for task in TASKS:
                what = settings(plan, {"part": list(task), "seed": seed})
                compute = partial(compare, task, plan, seed, first["weights"], bar.update)
                scores[task.name].append(part(f"{task.name}, seed {seed}", ticks, what, compute)["scores"])
    data = load(TASKS[0], plan, 0)
    pictures = {name: images[:8] for name, images in data.tests.items()}
    glyphs = draw_letters(8, torch.Generator().manual_seed(0))[0]
    return Result(
        plan,
        {name: {method: [unit[method] for unit in found] for method in METHODS} for name, found in scores.items()},
        letters,
        pictures | {"letters": glyphs},
        sum(weight.numel() for weight in network(BASE, plan, CLASSES).parameters()),
        sum(part.seconds),
        sum(part.reused),
        len(part.reused),
    )


# Data


def load(task: Task, plan: Plan, seed: int) -> Data:
    """The digits, split by the seed; a share of the training labels is replaced by another class, at random."""
    pixels, digits = need("sklearn.datasets").load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pixels), generator=generator)
    images, labels = torch.tensor(pixels, dtype=torch.float32)[order], torch.tensor(digits)[order]
    train, given = images[: task.images], mislabelled(labels[: task.images], task.wrong, generator)
    # The last images are the tests of all tasks alike.
    test, test_labels = images[-plan.tested :], labels[-plan.tested :]
    tests = {CLEAN: test} | {shift: shifted(shift, test, generator) for shift in SHIFTS}
    mean, std = train.mean(), train.std()
    tests = {name: (changed - mean) / std for name, changed in tests.items()}
    return Data((train - mean) / std, given, tests, test_labels)


def shifted(shift: str, images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, 64] of pixels from 0 to 16, changed as no training image is."""
    square = images.view(-1, 1, 8, 8)
    n = len(images)
    if shift == "turned":
        return turn(images, 25)
    if shift == "blurred":
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        return conv2d(square, (line[:, None] * line).view(1, 1, 3, 3), padding=1).flatten(1)
    if shift == "noisy":
        return (images + 5 * torch.randn(images.shape, generator=generator)).clamp(0, 16)
    if shift == "moved":  # by a pixel to any of the four sides
        sides = torch.randint(4, (n,), generator=generator)
        grown = pad(square, (1, 1, 1, 1))
        moved = torch.stack([grown[:, 0, i : i + 8, j : j + 8] for i, j in ((0, 1), (2, 1), (1, 0), (1, 2))])
        return moved[sides, torch.arange(n)].flatten(1)
    if shift == "hidden":  # a square of three pixels
        rows, columns = (torch.randint(6, (n, 1, 1), generator=generator) for _ in range(2))
        place = torch.arange(8)
        down, across = place[:, None] - rows, place[None, :] - columns
        hidden = (down >= 0) & (down < 3) & (across >= 0) & (across < 3)
        return square[:, 0].masked_fill(hidden, 0).flatten(1)
    raise ValueError(f"shift must be one of {', '.join(SHIFTS)}, got {shift!r}")


@cache
def glyphs() -> Tensor:
    """Every letter in every face, [faces, letters, 32, 32] from 0 to 1: of the fonts that matplotlib brings along."""
    fonts = Path(need("matplotlib").get_data_path()) / "fonts" / "ttf"
    image, draw, font = need("PIL.Image"), need("PIL.ImageDraw"), need("PIL.ImageFont")
    made = []
    for face in FACES:
        letters = font.truetype(str(fonts / f"{face}.ttf"), 24)
        for letter in LETTERS:
            sheet = image.new("L", (32, 32))
            draw.Draw(sheet).text((16, 16), letter, fill=255, font=letters, anchor="mm")
            made.append(torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(32, 32))
    return torch.stack(made).view(len(FACES), len(LETTERS), 32, 32).float() / 255


def draw_letters(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [n, 64] of mean 0 and deviation 1, and their letters [n]: turned, sheared, scaled and moved at random."""
    every = glyphs()
    faces, letters = (torch.randint(size, (n,), generator=generator) for size in every.shape[:2])
    angle, shear, size = ((2 * torch.rand(n, generator=generator) - 1) * most for most in (0.45, 0.3, 0.25))
    move = 0.25 * (2 * torch.rand(n, 2, generator=generator) - 1)
    cos, sin = (0.8 + size) * angle.cos(), (0.8 + size) * angle.sin()
    first, second = torch.stack([cos, shear * cos - sin], -1), torch.stack([sin, shear * sin + cos], -1)
    matrix = torch.cat([torch.stack([first, second], 1), move[..., None]], 2)
    grid = affine_grid(matrix, [n, 1, 16, 16], align_corners=False)
    images = grid_sample(every[faces, letters][:, None], grid, align_corners=False)
    images = avg_pool2d(images, 2).flatten(1)
    return (images - images.mean()) / images.std(), letters


# Networks


class Block(Module):
    """x + a branch of two layers, which stochastic depth may leave out."""

    def __init__(self, width: int, drop: float, depth: float) -> None:
        super().__init__()
        # A dropout of 0 is nothing; without it the other modules, and so the weights, would have other names.
        layers = (Linear(width, width), ReLU(), nn.Dropout(drop), Linear(width, width))
        self.branch = Sequential(LayerNorm(width), *layers)
        self.depth = nn.StochasticDepth(depth)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.depth(self.branch(x))


def network(method: str, plan: Plan, classes: int) -> Sequential:
    """Residual blocks, a representation, and a linear layer, which is the last module; masks are the method's."""
    depth = plan.depth if method == "depth" else 0.0
    drop = plan.drop if method == "dropout" else 0.0
    blocks = [Block(plan.width, drop, depth * i / plan.blocks) for i in range(1, plan.blocks + 1)]
    mask = nn.Dropout({"dropout": plan.drop, "large": plan.large, "larger": plan.larger}.get(method, 0.0))
    last = Linear(plan.width, classes)
    return Sequential(Linear(64, plan.width), *blocks, LayerNorm(plan.width), ReLU(), mask, last)


def learn_letters(plan: Plan, seed: int, tick: Callable[[], object]) -> dict[str, Any]:
    """Weights of the plain network, without its last layer, after letters; and its accuracy on letters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(BASE, plan, len(LETTERS))
        optimizer = torch.optim.AdamW(model.parameters(), plan.rate, weight_decay=plan.weight_decay, fused=True)
        rate = FlatLinearFlatLR(optimizer, plan.letter_steps)
        for _ in range(plan.letter_steps):
            images, letters = draw_letters(plan.batch, generator)
            _step(model, optimizer, images, letters)
            rate.step()
            tick()
    images, letters = draw_letters(1000, generator)
    right = score(predict(model, images), letters).accuracy
    last = f"{len(model) - 1}."
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(last)}
    return {"weights": weights, "accuracy": right}


def _step(model: Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    cross_entropy(model(images), labels).backward()
    optimizer.step()


def begin(method: str, task: Task, plan: Plan, letters: dict[str, Tensor]) -> Sequential:
    """The network before its first step; `letters` has all weights but those of the last layer."""
    model = network(method, plan, CLASSES)
    if task.letters:
        model.load_state_dict(letters, strict=False)
    return model


class Run(NamedTuple):
    """A training and the average that went along."""

    model: Module
    average: WeightAverager | None
    seconds: float


def train(
    method: str, task: Task, data: Data, plan: Plan, seed: int, letters: dict[str, Tensor], tick: Callable[[], object]
) -> Run:
    """The network after its steps: the same first weights and batches of a seed, whatever the method."""
    generator = torch.Generator().manual_seed(seed)
    start = round(plan.start * plan.steps)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = begin(method, task, plan, letters)
        optimizer = torch.optim.AdamW(model.parameters(), plan.rate, weight_decay=plan.weight_decay, fused=True)
        average = None
        if method == BASE:
            average = WeightAverager(model, "ema", decay=plan.decay)
        elif method == "swa":
            average = WeightAverager(model, "swa", start=start, every=plan.every)
        # SWA's rate falls until the averaging starts, and then stays high.
        late = {"total_steps": start, "final_lr": plan.high * plan.rate}
        rate = FlatLinearFlatLR(optimizer, **(late if method == "swa" else {"total_steps": plan.steps}))
        for _ in range(plan.steps):
            index = torch.randperm(len(data.images), generator=generator)[: plan.batch]
            _step(model, optimizer, data.images[index], data.labels[index])
            if average is not None:
                average.update()
            rate.step()
            tick()
    return Run(model.eval(), average, time.perf_counter() - began)


# Comparison


def compare(
    task: Task, plan: Plan, seed: int, letters: dict[str, Tensor], tick: Callable[[], object]
) -> dict[str, Any]:
    """All methods of a task with one seed."""
    data = load(task, plan, seed)
    runs = {method: train(method, task, data, plan, 1000 * seed, letters, tick) for method in TRAINED}
    others = [train(BASE, task, data, plan, 1000 * seed + i, letters, tick) for i in range(1, plan.members)]
    members = [runs[BASE].model, *(run.model for run in others)]
    scores = {}

    def judge(method: str, run: Run, predictions: Callable[[Tensor], Tensor], seconds: float, passes: int = 1) -> None:
        began = time.perf_counter()
        found = {name: score(predictions(images), data.test_labels) for name, images in data.tests.items()}
        testing = (time.perf_counter() - began) / len(data.tests)
        scores[method] = {
            name: {"accuracy": each.accuracy, "nll": each.nll, "ece": each.ece, "bins": each.bins}
            for name, each in found.items()
        } | {"passes": passes, "training": seconds, "testing": testing}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for method in METHODS:
            name = method.removesuffix(" mean")
            run = runs[{"ema": BASE, "ensemble": BASE}.get(name, name)]
            if method in ("ema", "swa"):
                assert run.average is not None
                with run.average.swapped() as model:
                    judge(method, run, partial(predict, model), run.seconds)
            elif method == "ensemble":
                mean = partial(_mean_of, members)
                judge(method, run, mean, sum(each.seconds for each in (runs[BASE], *others)), len(members))
            elif method in SAMPLED:
                drawn = partial(_drawn, run.model, plan.passes)
                judge(method, run, drawn, run.seconds, plan.passes)
            else:
                judge(method, run, partial(predict, run.model), run.seconds)
    return {"scores": scores}


def _mean_of(models: Sequence[Module], images: Tensor) -> Tensor:
    return torch.stack([predict(model, images) for model in models]).mean(0)


def _drawn(model: Module, passes: int, images: Tensor) -> Tensor:
    found = nn.mc_predict(model, images, passes, activation="softmax")
    assert isinstance(found, nn.Prediction)
    return found.mean


if __name__ == "__main__":
    sys.exit(main())
