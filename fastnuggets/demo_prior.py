"""The demo of the deep weight prior: kernels of networks that read letters are the prior of those that read digits."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Conv2d, Flatten, LeakyReLU, Linear, MaxPool2d, Sequential
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample
from torch.optim.lr_scheduler import LinearLR

from fastnuggets import nn
from fastnuggets.demo_average import predict, score
from fastnuggets.models import KernelVAE
from fastnuggets.molecules.files import need
from fastnuggets.parts import Parts, command, one_thread, settings

LETTERS = "ABCDEFGHIJ"
FONTS = (  # of matplotlib
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10", "cmmi10", "cmsy10"),
)
STROKES = (0, 3)  # added to a letter's lines, in pixels of CANVAS
CANVAS = 64
SIZES = (5, 3)  # of the kernels of the two convolutions
CONVOLUTIONS = (0, 3)  # where they are in the network
CLASSES = 10


class Method(NamedTuple):
    """How a network learns digits."""

    prior: str  # of the kernels: "", of a plain network; "normal", "fitted" or "uniform"; "deep"
    drawn: bool  # whether the kernels start as draws of the models of kernels, or as torch's

    @property
    def name(self) -> str:
        return f"{self.prior or 'plain'}{', drawn' * self.drawn}"


PLAIN, INIT, NORMAL, FITTED, FITTED_INIT, UNIFORM, DEEP, PUBLISHED = METHODS = (
    Method("", False),
    Method("", True),
    Method("normal", False),  # N(0, 1)
    Method("fitted", False),  # N(0, s²), as wide as the kernels of the sources
    Method("fitted", True),
    Method("uniform", False),  # the logarithm of a weight's size is
    Method("deep", False),
    Method("deep", True),
)


class Plan(NamedTuple):
    """How much the demo does, and its settings."""

    seeds: int
    sources: int  # networks that read letters
    source_steps: int
    vae_steps: int
    steps: int  # of a network that reads digits
    counts: tuple[int, ...] = (10, 20, 50, 100)  # labels, as many of each digit
    letters: int = 4000
    letters_tested: int = 1000
    channels: tuple[int, int] = (8, 16)
    latents: tuple[int, int] = (4, 4)
    hidden: tuple[int, int] = (16, 16)
    source_batch: int = 64
    source_rate: float = 0.01
    source_decay: float = 0.02  # L2
    least_norm: float = 0.2  # of a kernel that is learned from
    held: float = 0.15  # share of the source networks whose kernels the models of kernels are judged on
    vae_batch: int = 128
    vae_rate: float = 3e-3
    rate: float = 0.003
    spread_rate: float = 0.06  # of logarithms of deviations, which have far to go
    log_std: float = -5.0  # of the weights, at first
    passes: int = 10
    tested: int = 1000
    looks: tuple[int, ...] = (5, 10, 20, 40, 80, 200)  # steps after which a plain network is judged too
    kernels: int = 16  # shown of each kind


STANDARD = Plan(seeds=5, sources=40, source_steps=250, vae_steps=500, steps=600)
QUICK = Plan(seeds=2, sources=6, source_steps=150, vae_steps=200, steps=80, counts=(10, 50), looks=(5, 10, 20, 40))


class Data(NamedTuple):
    """Images [N, 1, 8, 8] float32, of which the ones learned from have mean 0 and deviation 1; labels [N] int64."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    letters: Tensor  # [kernels, 1, 8, 8] some of them
    digits: Tensor
    sources: dict[str, Any]
    vaes: list[dict[str, Any]]  # of each size
    scores: dict[str, dict[str, list[dict[str, Any]]]]  # labels -> method -> one a seed
    filters: dict[str, Tensor]  # of the first convolution, by method
    seconds: float  # of all computations, those of earlier calls too
    reused: int
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return command(
        "prior",
        argv,
        run,
        (STANDARD, QUICK),
        description="Small networks learn printed letters; an autoencoder learns what their kernels look like; and it "
        "is the prior of Bayesian networks, and the start of plain ones, that learn handwritten digits from ten to a "
        "hundred labels, beside Gaussian and log-uniform priors. Writes OUT/prior.html, a page that needs no network, "
        "and its figures in OUT/prior.json.",
        repeated="labelled digits, weights and noise to repeat the digits with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The demo without its page. Sources, models of kernels, and each seed and count are kept in `cache` when done.

    Deterministic: the same settings and versions give the same bits on the same machine, interrupted or not; times
    are as they were measured.
    """
    need("PIL")
    cells = [(count, seed) for count in plan.counts for seed in range(plan.seeds)]
    cell = len(METHODS) * plan.steps
    total = plan.sources * plan.source_steps + len(SIZES) * plan.vae_steps + len(cells) * cell
    scores: dict[str, dict[str, list[dict[str, Any]]]] = {str(n): {m.name: [] for m in METHODS} for n in plan.counts}
    shared = plan._replace(counts=())
    with one_thread(), need("tqdm").tqdm(total=total, unit="step", disable=None) as bar:
        part = Parts(cache, bar, fresh=fresh)
        sources = part(
            "source networks",
            plan.sources * plan.source_steps,
            settings(shared, {"part": "sources"}),
            partial(learn_letters, plan, bar.update),
        )
        found = [
            part(
                f"kernels of {size} x {size}",
                plan.vae_steps,
                settings(shared, {"part": "kernels", "size": size}),
                partial(learn_kernels, plan, sources["kernels"][place], place, bar.update),
            )
            for place, size in enumerate(SIZES)
        ]
        vaes = [restore(plan, place, one["state"]) for place, one in enumerate(found)]
        filters: dict[str, Tensor] = {}
        for count, seed in cells:
            what = settings(shared, {"part": "digits", "labels": count, "seed": seed})
            compute = partial(digits, plan, count, seed, vaes, bar.update)
            one = part(f"{count} labels, seed {seed}", cell, what, compute)
            for method in METHODS:
                scores[str(count)][method.name].append(one["scores"][method.name])
            if seed == 0:
                filters = one["filters"]
    return Result(
        plan,
        letters(plan, plan.kernels, 0)[0],
        load(plan, plan.counts[-1], 0).images[: plan.kernels],
        {key: sources[key] for key in ("accuracy", "kept", "all")}
        | {"shown": sources["kernels"][0]["train"], "fonts": len(FONTS)},
        found,
        scores,
        filters,
        sum(part.seconds),
        sum(part.reused),
        len(part.reused),
    )


# Letters, and the networks that read them


@cache
def glyphs() -> Tensor:
    """Each letter in each font and stroke, white on black, as high as the canvas less a margin. [N, 1, 64, 64]

    Sorted by letter: as many of the first as of any other.
    """
    image, draw, fonts = (need(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont"))
    folder = Path(need("matplotlib").get_data_path()) / "fonts" / "ttf"
    faces = [fonts.truetype(folder / f"{name}.ttf", CANVAS) for name in FONTS]
    made = []
    for letter in LETTERS:
        for face in faces:
            for stroke in STROKES:
                page = image.new("L", (4 * CANVAS, 4 * CANVAS))
                draw.Draw(page).text((CANVAS, CANVAS), letter, 255, font=face, stroke_width=stroke)
                cut = page.crop(page.getbbox())
                ratio = 0.85 * CANVAS / max(cut.size)
                cut = cut.resize([max(1, round(ratio * side)) for side in cut.size])
                page = image.new("L", (CANVAS, CANVAS))
                page.paste(cut, [(CANVAS - side) // 2 for side in cut.size])
                pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8)
                made.append(pixels.view(1, CANVAS, CANVAS).float() / 255)
    return torch.stack(made)


def letters(plan: Plan, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Letters turned, sheared, scaled and moved at random, of the size of scikit-learn's digits and made as these are:
    each pixel is the mean of 4 x 4. Mean 0 and deviation 1."""
    bank = glyphs()
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(len(bank), (count,), generator=generator)

    def uniform(bound: float) -> Tensor:
        return bound * (2 * torch.rand(count, generator=generator) - 1)

    angle, shear, x, y = (uniform(bound) for bound in (0.25, 0.2, 0.1, 0.1))
    width, height = 1 + uniform(0.2), 1 + uniform(0.1)
    cos, sin = angle.cos() * width, angle.sin() * height
    matrix = torch.stack([cos, shear - sin, x, angle.sin() * width, angle.cos() * height, y], 1).view(-1, 2, 3)
    grid = affine_grid(matrix, [count, 1, 32, 32], align_corners=False)
    images = avg_pool2d(grid_sample(bank[place], grid, align_corners=False), 4)
    return (images - images.mean()) / images.std(), place // (len(bank) // len(LETTERS))


def network(plan: Plan) -> Sequential:
    """Two convolutions and a linear layer: images [N, 1, 8, 8] to logits of ten classes."""
    first, second = plan.channels
    return Sequential(
        Conv2d(1, first, SIZES[0], padding="same"),
        LeakyReLU(),
        MaxPool2d(2),
        Conv2d(first, second, SIZES[1], padding="same"),
        LeakyReLU(),
        MaxPool2d(2),
        Flatten(),
        Linear(4 * second, CLASSES),
    )


def learn_letters(plan: Plan, tick: Callable[[], object]) -> dict[str, Any]:
    """The source networks' accuracy and kernels; those of the last networks are kept for judging."""
    images, labels = letters(plan, plan.letters, 1)
    test_images, test_labels = letters(plan, plan.letters_tested, 2)
    networks, accuracy = [], []
    for source in range(plan.sources):
        generator = torch.Generator().manual_seed(source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(source)
            model = network(plan)
        optimizer = torch.optim.Adam(model.parameters(), plan.source_rate, weight_decay=plan.source_decay)
        rate = LinearLR(optimizer, 1.0, 0.0, plan.source_steps)
        for _ in range(plan.source_steps):
            index = torch.randint(len(images), (plan.source_batch,), generator=generator)
            _step(optimizer, cross_entropy(model(images[index]), labels[index]))
            rate.step()
            tick()
        with torch.no_grad():
            accuracy.append(score(predict(model, test_images), test_labels).accuracy)
        networks.append(model.state_dict())
    held = max(1, round(plan.held * plan.sources))
    kernels = [
        {
            "train": nn.harvest(networks[:-held], size, least_norm=plan.least_norm),
            "test": nn.harvest(networks[-held:], size, least_norm=plan.least_norm),
        }
        for size in SIZES
    ]
    return {
        "accuracy": accuracy,
        "kernels": kernels,
        "kept": [sum(len(part) for part in of.values()) for of in kernels],
        "all": [len(nn.harvest(networks, size, least_norm=0.0)) for size in SIZES],
    }


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


# The model of kernels


def learn_kernels(plan: Plan, kernels: dict[str, Tensor], place: int, tick: Callable[[], object]) -> dict[str, Any]:
    """The model of one size: its weights, samples, and nats of the held-out kernels beside those of Gaussians."""
    known, tested = kernels["train"], kernels["test"]
    generator = torch.Generator().manual_seed(place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(place)
        vae = _vae(plan, place, known.std().item())
        optimizer = torch.optim.Adam(vae.parameters(), plan.vae_rate)
        rate = LinearLR(optimizer, 1.0, 0.0, plan.vae_steps)
        for _ in range(plan.vae_steps):
            index = torch.randint(len(known), (plan.vae_batch,), generator=generator)
            _step(optimizer, vae.bound(known[index]).loss.mean())
            rate.step()
            tick()
        vae.eval()
        few = tested[torch.randperm(len(tested), generator=generator)[:2000]]
        with torch.no_grad():
            bound = vae.bound(few)
            eye, square = torch.eye(few[0].numel()), known.square().mean()
            # A hundredth of the variance: fewer kernels than they have weights have no covariance to invert.
            full = known.flatten(1).T.cov() + 0.01 * square * eye
            nats = {
                "N(0, 1)": _gaussian(torch.zeros(1), eye, few),
                "N(0, s²)": _gaussian(torch.zeros(1), square * eye, few),
                "full Gaussian": _gaussian(known.flatten(1).mean(0), full, few),
                "VAE, bound": -bound.loss.mean().item(),
                "VAE, 100 samples": vae.importance_bound(few, 100).mean().item(),
            }
        drawn = vae.sample(plan.kernels)
    return {"state": vae.state_dict(), "nats": nats, "kl": bound.kl.mean().item(), "drawn": drawn, "tested": len(few)}


def _vae(plan: Plan, place: int, scale: float = 1.0) -> KernelVAE:
    return KernelVAE(SIZES[place], latent=plan.latents[place], hidden=plan.hidden[place], scale=scale)


def restore(plan: Plan, place: int, state: dict[str, Tensor]) -> KernelVAE:
    vae = _vae(plan, place)
    vae.load_state_dict(state)
    return vae.eval()


def _gaussian(mean: Tensor, covariance: Tensor, kernels: Tensor) -> float:
    """Mean ln of its density, nats a kernel."""
    distances = kernels.flatten(1) - mean
    normal = torch.distributions.MultivariateNormal(torch.zeros(distances.shape[1]), covariance)
    return normal.log_prob(distances).mean().item()


# Digits


def load(plan: Plan, count: int, seed: int) -> Data:
    """So many labelled digits, as many of each, and others to test on: the same ones for any count."""
    pixels, found = need("sklearn.datasets").load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(found)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, rest = order[: plan.tested], order[plan.tested :]
    known = torch.cat([rest[labels[rest] == digit][: count // CLASSES] for digit in range(CLASSES)])
    images = (images - images[known].mean()) / images[known].std()
    return Data(images[known], labels[known], images[test], labels[test])


def prepare(method: Method, plan: Plan, vaes: Sequence[KernelVAE]) -> Sequential:
    """The network of a method, of torch's present seed. The last layer has plain weights in all of them."""
    model = network(plan)
    for place, vae in zip(CONVOLUTIONS, vaes, strict=True):
        layer = model[place]
        if method.drawn:
            nn.dwp_init_(layer, vae)
        if method.prior == "uniform":
            model[place] = nn.VariationalDropoutConv2d(
                layer.in_channels, layer.out_channels, vae.size, padding="same", init=2 * plan.log_std
            )
            model[place].load_state_dict(layer.state_dict())
        elif method.prior:
            std = vae.scale.item() if method.prior == "fitted" else 1.0
            nn.bayesianize(layer, prior_std=std, init_std=math.exp(plan.log_std))
        if method.prior == "deep":
            nn.DeepWeightPrior(vae).attach_(layer)
    return model


def train(
    method: Method, plan: Plan, data: Data, vaes: Sequence[KernelVAE], seed: int, tick: Callable[[], object]
) -> tuple[Sequential, dict[str, float]]:
    """The network after its steps, in evaluation mode, and its test accuracy after some of them.

    The same first weights for all methods, but for those drawn from the models of kernels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = prepare(method, plan, vaes)
        spreads = _spreads(model)
        others = [p for p in model.parameters() if all(p is not spread for spread in spreads)]
        groups = [{"params": others}, {"params": spreads, "lr": plan.spread_rate}]
        optimizer = torch.optim.Adam(groups, plan.rate)
        rate = LinearLR(optimizer, 1.0, 0.0, plan.steps)
        seen = {}
        for step in range(1, plan.steps + 1):
            loss = cross_entropy(model(data.images), data.labels)
            _step(optimizer, loss + nn.kl(model) / len(data.images) if method.prior else loss)
            rate.step()
            tick()
            if step in plan.looks and not method.prior:
                with torch.no_grad():
                    seen[str(step)] = score(predict(model, data.test_images), data.test_labels).accuracy
    return model.eval(), seen


def digits(plan: Plan, count: int, seed: int, vaes: Sequence[KernelVAE], tick: Callable[[], object]) -> dict[str, Any]:
    """All methods on so many labels with one seed."""
    data = load(plan, count, seed)
    scores, filters = {}, {}
    for method in METHODS:
        began = time.process_time()
        model, seen = train(method, plan, data, vaes, seed, tick)
        seconds = time.process_time() - began
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            if method.prior:
                drawn = nn.mc_predict(model, data.test_images, plan.passes, reduce="none", activation="softmax")
                chances = drawn.mean(0)
            else:
                chances = predict(model, data.test_images)
            divergence = nn.kl(model).item() if method.prior else 0.0
        found = score(chances, data.test_labels)
        scores[method.name] = {
            "accuracy": found.accuracy,
            "nll": found.nll,
            "ece": found.ece,
            "kl": divergence,
            "log_std": _log_std(model),
            "looks": seen,
            "seconds": seconds,
        }
        filters[method.name] = model[CONVOLUTIONS[0]].weight.detach().flatten(0, 1)
    return {"scores": scores, "filters": filters}


def _spreads(model: Sequential) -> list[Tensor]:
    """Logarithms of deviations, or of variances, of random weights and biases."""
    return [p for name, p in model.named_parameters() if name.endswith(("_log_std", "log_sigma2"))]


def _log_std(model: Sequential) -> float:
    """Mean ln of the weights' deviations in the convolutions; 0 for a plain network."""
    parts = [p.flatten() for name, p in model.named_parameters() if name.endswith("weight_log_std")]
    parts += [p.flatten() / 2 for name, p in model.named_parameters() if name.endswith("log_sigma2")]
    return torch.cat(parts).mean().item() if parts else 0.0


if __name__ == "__main__":
    sys.exit(main())
