"""The demo of inpainting: what is hidden of digits and of patches of photographs, drawn by VAEACConv and by others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from fastnuggets import ops
from fastnuggets.models import VAEACConv
from fastnuggets.molecules.files import need
from fastnuggets.parts import Parts, command, one_thread, settings
from fastnuggets.systems import masks
from fastnuggets.systems.vaeac import DRAWN, interval

SETS = ("digits", "photographs")
# Three are held out at a time, a texture among each.
PHOTOGRAPHS = (
    *("china", "astronaut", "brick", "flower", "coffee", "grass"),
    *("rocket", "chelsea", "gravel", "stereo_motorcycle", "camera", "coins"),
)
HELD_OUT = 3
SHRUNK = 4  # pixels of a photograph, along each axis, that become one
SIDE = {"digits": 8, "photographs": 16}
LEVELS = 17  # of grey, of a digit's pixel
KINDS = ("half", "rectangle", "small hole", "50 % of pixels", "95 % of pixels")
OURS = "VAEACConv"
SAMPLED = ("nearest", "normal", OURS)
METHODS = ("mean", "nearest", "normal", "biharmonic", "Telea", OURS)
AVERAGED = 10
PICTURED = 2  # images of a kind
SHOWN = 5  # draws of each
BOUND = 25  # samples of the bound
POOL = 512  # masks of each kind that training chooses from


class Plan(NamedTuple):
    """How much the demo does, and its settings."""

    seeds: int
    steps: int
    tested: int  # images, each hidden in every kind of way
    kinds: tuple[str, ...] = KINDS
    batch: int = 32
    rate: float = 3e-3
    warmed: float = 0.4  # share of the steps in which the weight of the divergence grows from 0 to 1
    widths: tuple[int, ...] = (16, 32, 32, 64)  # photographs have one scale more, as wide as the last
    blocks: int = 1
    latent: int = 32
    least_sigma: float = 0.05  # in deviations of a pixel, which are about a fifth of the range: published, 0.01 of that


STANDARD = Plan(seeds=3, steps=4000, tested=99)
QUICK = Plan(seeds=2, steps=60, tested=21, kinds=("half", "small hole"))


class Data(NamedTuple):
    """Images [N, 1, H, W] float32 in 0 ... 1; of values in steps, their middles."""

    train: Tensor
    test: Tensor
    step: float  # between two levels of grey; 0 if there are none

    def spread(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Levels made continuous, so that they have a density: each becomes a value of its step."""
        noise = ops.noise("uniform", images.shape, loc=-0.5, key=ops.noise_key(generator=generator))
        return images + self.step * noise if self.step else images


class Filled(NamedTuple):
    """What a method makes of T images."""

    mean: Tensor  # [T, H, W] its best guess
    draws: Tensor | None = None  # [DRAWN, T, H, W]
    guesses: Tensor | None = None  # [AVERAGED, T, H, W] means given one z
    nats: float = math.nan  # ln of the density of all hidden pixels together, or a bound on it


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    scores: dict[str, dict[str, list[dict[str, dict[str, float]]]]]  # set -> kind -> one a seed -> method -> figures
    facts: dict[str, list[dict[str, Any]]]  # set -> one a seed
    pictures: dict[str, dict[str, dict[str, Tensor]]]  # set -> kind -> what -> images of the first seed
    seconds: float  # of all computations, those of earlier calls too
    reused: int
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return command(
        "inpaint",
        argv,
        run,
        (STANDARD, QUICK),
        description="Handwritten digits and patches of photographs are hidden in part, and filled again by VAEACConv, "
        "the mean image, the most similar images, a normal distribution, and the inpainting of scikit-image and of "
        "OpenCV: errors, densities, and whether what is drawn is as uncertain as it says. Writes OUT/inpaint.html, a "
        "page that needs no network, and its figures in OUT/inpaint.json.",
        repeated="held-out images, masks and weights to repeat everything with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The demo without its page. Each set and seed is kept in `cache` when it is done.

    Deterministic: the same settings and versions give the same figures on the same machine; times are as measured.
    """
    for module in ("skimage.restoration", "cv2", "sklearn.covariance"):  # before minutes are spent
        need(module, "demo")
    units: dict[str, list[dict[str, Any]]] = {name: [] for name in SETS}
    total = len(SETS) * plan.seeds * plan.steps
    with one_thread(), need("tqdm").tqdm(total=total, unit="step", disable=None) as bar:
        part = Parts(cache, bar, fresh=fresh)
        for seed in range(plan.seeds):
            for name in SETS:
                what = settings(plan, {"set": name, "seed": seed})
                compute = partial(measure, plan, name, seed, bar.update)
                units[name].append(part(f"{name}, seed {seed}", plan.steps, what, compute))
    scores = {name: {kind: [unit["scores"][kind] for unit in units[name]] for kind in plan.kinds} for name in SETS}
    facts = {name: [unit["facts"] for unit in units[name]] for name in SETS}
    pictures = {name: units[name][0]["pictures"] for name in SETS}
    return Result(plan, scores, facts, pictures, sum(part.seconds), sum(part.reused), len(part.reused))


# Images and masks


def load(name: str, tested: int, seed: int) -> Data:
    """Digits are split at random; of photographs some are held out whole, others with each seed."""
    generator = torch.Generator().manual_seed(seed)
    if name == "digits":
        pixels = need("sklearn.datasets").load_digits().images
        images = (torch.tensor(pixels, dtype=torch.float32)[:, None] + 0.5) / LEVELS
        images = images[torch.randperm(len(images), generator=generator)]
        return Data(images[tested:], images[:tested], 1 / LEVELS)
    side = SIDE[name]
    others, test = [], []
    gone = held_out(seed)
    for photograph in PHOTOGRAPHS:
        if photograph not in gone:
            others.append(patches(_photograph(photograph), side, side // 4))
            continue
        found = patches(_photograph(photograph), side, side)
        count = tested // HELD_OUT + (gone.index(photograph) < tested % HELD_OUT)
        test.append(found[torch.randperm(len(found), generator=generator)[:count]])
    return Data(torch.cat(others), torch.cat(test), 0.0)


def held_out(seed: int) -> list[str]:
    first = HELD_OUT * seed
    return [PHOTOGRAPHS[(first + i) % len(PHOTOGRAPHS)] for i in range(HELD_OUT)]


def patches(image: Tensor, side: int, step: int) -> Tensor:
    """[N, 1, side, side], a new one every `step` pixels."""
    return image.unfold(0, side, step).unfold(1, side, step).reshape(-1, 1, side, side)


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _photograph(name: str) -> Tensor:
    """[H, W] grey in 0 ... 1, each pixel the mean of several."""
    if name in ("china", "flower"):
        image = need("sklearn.datasets").load_sample_image(f"{name}.jpg")
    else:
        image = getattr(need("skimage.data"), name)()
    image = image[0] if isinstance(image, tuple) else image  # the left one of two
    grey = need("skimage.color").rgb2gray(image) if image.ndim == 3 else image / 255
    height, width = (side // SHRUNK * SHRUNK for side in grey.shape)
    blocks = grey[:height, :width].reshape(height // SHRUNK, SHRUNK, width // SHRUNK, SHRUNK)
    return torch.tensor(blocks.mean((1, 3)), dtype=torch.float32)


def hide(kind: str, count: int, side: int, generator: torch.Generator) -> Tensor:
    """[count, side, side], True where hidden; something of each is seen."""
    if kind == "half":
        return masks.half(count, side, side, generator)
    if kind in ("rectangle", "small hole"):
        area = (0.3, 0.7) if kind == "rectangle" else (0.03, 0.1)
        return masks.rectangle(count, side, side, generator, area=area)
    share = {"50 % of pixels": 0.5, "95 % of pixels": 0.95}[kind]
    found = masks.mcar(count, side * side, share, generator)
    found[found.all(1), side * side // 2] = False
    return found.view(count, side, side)


# VAEACConv


def network(plan: Plan, name: str) -> VAEACConv:
    """The last scale of either is a single cell, and z a vector."""
    widths = (*plan.widths, plan.widths[-1]) if name == "photographs" else plan.widths
    return VAEACConv(1, widths=widths, blocks=plan.blocks, latent=plan.latent, least_sigma=plan.least_sigma)


def train(plan: Plan, name: str, data: Data, seed: int, tick: Callable[[], object]) -> VAEACConv:
    """Half of the masks are the published mixture's, the others of the kinds that are tested.

    The divergence counts less at first, or the code is given up before it says anything: S. Bowman and others,
    Generating Sentences from a Continuous Space, CoNLL 2016, arXiv:1511.06349.
    """
    generator = torch.Generator().manual_seed(seed)
    side = SIDE[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(plan, name).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), plan.rate, fused=True)
    rate = LinearLR(optimizer, 1.0, 0.0, plan.steps)
    tested = torch.cat([hide(kind, POOL, side, generator) for kind in plan.kinds])
    centre, scale = standard(data)
    pool = torch.cat([tested, masks.inpainting(len(tested), side, side, generator)])
    for step in range(plan.steps):
        images = data.train[torch.randint(len(data.train), (plan.batch,), generator=generator)]
        if name == "photographs":
            images = varied(images, generator)
        mask = pool[torch.randint(len(pool), (plan.batch,), generator=generator)][:, None]
        images, key = (data.spread(images, generator) - centre) / scale, ops.noise_key(generator=generator)
        bound = model.bound(images, mask, key=key)
        weight = min(1.0, (step + 1) / (plan.warmed * plan.steps))
        loss = (bound.loss - (1 - weight) * bound.kl).mean() / side**2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        tick()
    return model.eval()


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Photographs that might have been: mirrored, on their side, of another contrast and brightness."""

    def uniform() -> Tensor:
        return torch.rand(len(images), 1, 1, 1, generator=generator)

    images = torch.where(uniform() < 0.5, images.flip(3), images)
    images = torch.where(uniform() < 0.5, images.flip(2), images)
    images = torch.where(uniform() < 0.5, images.mT, images)
    middle = images.mean((1, 2, 3), keepdim=True)
    return (0.4 + 0.8 * uniform()) * (images - middle) + middle + 0.3 * (uniform() - 0.5)


def standard(data: Data) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each pixel, [1, H, W] each, of what is learned from.

    Otherwise a digit's margin, where nothing varies but the noise inside a step, has most of the gradient.
    """
    variance = data.train.var(0) + data.step**2 / 12
    return data.train.mean(0), variance.sqrt()


@torch.no_grad()
def ours(model: VAEACConv, data: Data, images: Tensor, mask: Tensor, seed: int) -> Filled:
    """The mean is that of the means given ten z."""
    centre, scale = standard(data)
    x, hidden = ((images - centre) / scale)[:, None], mask[:, None]

    def made(number: int, likeliest: bool) -> Tensor:
        key = torch.tensor([seed, 4 * number])  # a call takes three
        drawn = model.impute(x, hidden, likeliest=likeliest, key=key)[:, 0]
        return torch.where(mask, drawn * scale + centre, images)

    draws = torch.stack([made(number, False) for number in range(DRAWN)])
    guesses = torch.stack([made(number, True) for number in range(AVERAGED)])
    nats = model.importance_bound(x, hidden, BOUND, key=seed + 1).sum() - (scale.log() * mask).sum()
    return Filled(guesses.mean(0), draws, guesses, nats.item())


# What else there is


def mean(train: Tensor, images: Tensor, mask: Tensor) -> Filled:
    return Filled(torch.where(mask, train.mean(0), images))


def nearest(train: Tensor, images: Tensor, mask: Tensor) -> Filled:
    """Draws are of the most similar images of the training set, by what is seen, the most similar first."""
    seen = (~mask).flatten(1).float()
    known, all_ = images.flatten(1) * seen, train.flatten(1)
    distance = seen @ all_.square().T - 2 * known @ all_.T  # less what is the same for all
    found = train[distance.topk(DRAWN, largest=False).indices.T]
    return Filled(torch.where(mask, found[:AVERAGED].mean(0), images), torch.where(mask, found, images))


def normal(
    train: Tensor, images: Tensor, mask: Tensor, generator: torch.Generator, fitted: tuple[Tensor, Tensor] | None = None
) -> Filled:
    """The conditional of a normal distribution: linear regression of each hidden pixel on all that are seen."""
    centre, cov = fitted if fitted is not None else fit_normal(train)
    noise = torch.randn(DRAWN, *images.shape, generator=generator, dtype=torch.float64)
    best, draws, nats = images.clone(), images.expand(DRAWN, *images.shape).clone(), 0.0
    for i, (image, gone) in enumerate(zip(images.double(), mask, strict=True)):
        h, s = gone.flatten(), ~gone.flatten()
        gain = torch.linalg.solve(cov[s][:, s], cov[s][:, h])
        middle = centre[h] + (image.flatten()[s] - centre[s]) @ gain
        root = torch.linalg.cholesky(cov[h][:, h] - cov[h][:, s] @ gain)
        found = torch.distributions.MultivariateNormal(middle, scale_tril=root, validate_args=False)
        nats += found.log_prob(image.flatten()[h]).item()
        best[i][gone] = middle.float()
        draws[:, i, gone] = (middle + noise[:, i, gone] @ root.T).float()
    return Filled(best, draws, None, nats)


def fit_normal(train: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance, float64, this shrunk after Ledoit and Wolf (2004)."""
    found = need("sklearn.covariance").LedoitWolf().fit(train.flatten(1).double().numpy())
    return torch.tensor(found.location_), torch.tensor(found.covariance_)


def biharmonic(train: Tensor, images: Tensor, mask: Tensor) -> Filled:
    fill = need("skimage.restoration").inpaint_biharmonic
    pairs = zip(images.double().numpy(), mask.numpy(), strict=True)
    return Filled(torch.tensor(np.stack([fill(*pair) for pair in pairs]), dtype=torch.float32))


def telea(train: Tensor, images: Tensor, mask: Tensor) -> Filled:
    """OpenCV's takes 8 bits; what is seen stays as it was."""
    cv2 = need("cv2")
    found = []
    for image, gone in zip(images.numpy(), mask.numpy(), strict=True):
        grey = np.where(gone, 0, np.clip(np.rint(255 * image), 0, 255)).astype(np.uint8)
        found.append(cv2.inpaint(grey, gone.astype(np.uint8), 3, cv2.INPAINT_TELEA) / 255)
    return Filled(torch.where(mask, torch.tensor(np.stack(found), dtype=torch.float32), images))


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Filled]] = {
    "mean": mean,
    "nearest": nearest,
    "biharmonic": biharmonic,
    "Telea": telea,
}


# What is measured


def measure(plan: Plan, name: str, seed: int, tick: Callable[[], object]) -> dict[str, Any]:
    """Every method on one set with one seed."""
    data = load(name, plan.tested, seed)
    began = time.process_time()
    model = train(plan, name, data, seed, tick)
    trained = time.process_time() - began
    generator = torch.Generator().manual_seed(1000 + seed)
    began = time.process_time()
    fitted = fit_normal(data.spread(data.train, generator))
    facts = {
        "learned": len(data.train),
        "tested": len(data.test),
        "held out": held_out(seed) if name == "photographs" else [],
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": {OURS: trained, "normal": time.process_time() - began},
    }
    truth = data.spread(data.test, generator)[:, 0]
    known = data.train[:, 0]
    scores: dict[str, dict[str, dict[str, float]]] = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    for kind in plan.kinds:
        mask = hide(kind, len(truth), SIDE[name], generator)
        filled, scores[kind] = {}, {}
        for method in METHODS:
            began = time.process_time()
            if method == OURS:
                filled[method] = ours(model, data, truth, mask, seed)
            elif method == "normal":
                filled[method] = normal(known, truth, mask, generator, fitted)
            else:
                filled[method] = PEERS[method](known, truth, mask)
            taken = 1000 * (time.process_time() - began) / len(truth)
            scores[kind][method] = judge(filled[method], truth, mask) | {"milliseconds": taken}
        pictures[kind] = _pictures(filled, truth, mask) if seed == 0 else {}
    return {"scores": scores, "facts": facts, "pictures": pictures}


def judge(filled: Filled, truth: Tensor, mask: Tensor) -> dict[str, float]:
    """Of the hidden pixels of all images together: root mean squared errors, of the mean, of the first draw and
    of the first mean given one z; nats a pixel; and the share inside the interval of 90 % of the draws, with its mean
    width."""

    def rmse(image: Tensor) -> float:
        return (image - truth)[mask].double().square().mean().sqrt().item()

    found = {"rmse": rmse(filled.mean)}
    found["psnr"] = -20 * math.log10(found["rmse"])
    if filled.draws is not None:
        low, high = interval(filled.draws)
        found["draw"] = rmse(filled.draws[0])
        found["coverage"] = ((truth >= low) & (truth <= high))[mask].double().mean().item()
        found["width"] = (high - low)[mask].double().mean().item()
    if filled.guesses is not None:
        found["guess"] = rmse(filled.guesses[0])
    if not math.isnan(filled.nats):
        found["nats"] = filled.nats / int(mask.sum())
    return found


def _pictures(filled: dict[str, Filled], truth: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Of some test images, evenly spread and not chosen: what was there, what was hidden, and what was made of it."""
    some = torch.linspace(0, len(truth) - 1, PICTURED).long()
    guesses, draws = filled[OURS].guesses, filled[OURS].draws
    assert guesses is not None and draws is not None
    return {
        "original": truth[some],
        "hidden": mask[some],
        "guesses": guesses[:SHOWN, some],
        "draws": draws[:1, some],
        **{method: found.mean[some] for method, found in filled.items()},
    }
