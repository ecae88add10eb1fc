"""The demo of blending: one object under every mode, exact or not; and detectors that learn from composed scenes."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from fastnuggets import ops
from fastnuggets.models.center_detector import CenterDetector, Detections, Targets, center_loss, center_targets
from fastnuggets.molecules.files import need
from fastnuggets.parts import Parts, command, one_thread, settings
from fastnuggets.scenes import Cutout, Recipe, SceneComposer, samples
from fastnuggets.scenes.geometry import Camera
from fastnuggets.scenes.recipes import ALL_BLENDS
from fastnuggets.scenes.render import Rendering, Shape, Texture, World, pose, render_scene

# What a detector learns from: scenes of one blend, each scene in all of them, whole boxes pasted, or rendered ones.
WHOLE_BOX, EVERY, RENDERED = "whole box", "all", "rendered"
SOURCES = (WHOLE_BOX, "none", "gaussian", "box", "motion", "poisson", EVERY, RENDERED)
SIDE = 64  # pixels of a scene
TEST_SEED = 10**6  # of the rendered scenes that all detectors are tested on
SURE = 0.3  # score from which a box is drawn
SHOWN = 6  # scenes
CALLS = 5  # of each blend that is timed
THRESHOLD = 0.5  # intersection over union from which a box counts as found


class Plan(NamedTuple):
    """How much the demo does, and its settings."""

    seeds: int
    steps: int
    cutouts: int  # of each kind
    backgrounds: int
    scenes: int  # to learn from, of each source
    tested: int
    batch: int = 16
    rate: float = 0.003
    width: int = 32
    blocks: int = 3
    rays: int = 2  # along each side of a pixel


# One object under every mode. The Poisson modes have an exact answer that they are compared with.
OBJECT, BACKGROUND, MASK = "chelsea", "coffee", "cat"
PLAIN = ("none", "gaussian", "box", "motion", "difference", "multiband")
POISSON = ("import", "mixed", "average")
GALLERY = 256  # pixels a side
LEVELS = 255

STANDARD = Plan(seeds=4, steps=400, cutouts=20, backgrounds=60, scenes=300, tested=200)
QUICK = Plan(seeds=2, steps=60, cutouts=4, backgrounds=10, scenes=40, tested=40)


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    gallery: dict[str, Any]
    scores: dict[str, list[dict[str, float]]]  # source -> average precision by thing and their mean, one a seed
    examples: dict[str, Any]
    parameters: int  # of a detector
    seconds: float  # of all computations, those of earlier calls too
    reused: int  # parts that an earlier call had done
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return command(
        "blend",
        argv,
        run,
        (STANDARD, QUICK),
        description="One object on one photograph under every blend, and how far the blends that solve an equation are "
        "from its exact solution, other packages' too where they are installed. Then small detectors learn from scenes "
        "composed under each blend, and are tested on scenes that were rendered as a whole. Writes OUT/blend.html, a "
        "page that needs no network, and its figures in OUT/blend.json.",
        repeated="views, rooms, scenes, weights and batches to repeat the detectors with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The demo without its page. The gallery and each seed are kept in `cache` when they are done.

    Deterministic: the same settings and versions give the same bits on the same machine, interrupted or not; times
    are as they were measured.
    """
    ticks = len(SOURCES) * plan.steps
    with one_thread(), need("tqdm").tqdm(total=plan.seeds * ticks, unit="step", disable=None) as bar:
        part = Parts(cache, bar, fresh=fresh)
        gallery = part("gallery", 0, settings(plan, {"part": "gallery", "peers": list(peers())}), compare)
        units = []
        for seed in range(plan.seeds):
            what = settings(plan, {"part": "detectors", "seed": seed})
            units.append(part(f"detectors, seed {seed}", ticks, what, partial(detectors, plan, seed, bar.update)))
    return Result(
        plan,
        gallery,
        {source: [unit["scores"][source] for unit in units] for source in SOURCES},
        units[0]["examples"],
        sum(weight.numel() for weight in network(plan).parameters()),
        sum(part.seconds),
        sum(part.reused),
        len(part.reused),
    )


# One object under every blend


def compare() -> dict[str, Any]:
    """Pictures [H, W, 3] uint8 by mode; the exact answers; errors and times of all who solve the equation."""
    size = (GALLERY, GALLERY)
    fg, bg, inside = samples.photo(OBJECT, size), samples.photo(BACKGROUND, size), samples.mask(MASK, size)
    exact = {guidance: solved(fg, bg, inside, guidance) for guidance in POISSON}
    made = {name: (partial(paste, fg, bg, inside, name), None) for name in PLAIN}
    made |= {name: (partial(poisson, fg, bg, inside, name), name) for name in POISSON}
    made |= {"rectangle": (partial(poisson, fg, bg, inside, "import", domain="rectangle"), "import")}
    for name, (function, guidance) in peers().items():
        made[name] = (partial(function, fg, bg, inside, guidance), guidance)
    rows = {}
    for name, (function, guidance) in made.items():
        picture, seconds = timed(function)
        row: dict[str, Any] = {"picture": torch.tensor(picture), "ms": 1e3 * seconds}
        if guidance:
            row |= {"guidance": guidance, **judged(picture, exact[guidance].clip(0, LEVELS), inside, bg)}
        rows[name] = row
    given = {"object": torch.tensor(fg), "background": torch.tensor(bg), "mask": torch.tensor(inside)}
    return {"rows": rows, "given": given}


def judged(picture: np.ndarray, exact: np.ndarray, inside: np.ndarray, background: np.ndarray) -> dict[str, Any]:
    """The distance to the exact answer in grey levels, and the share of the pixels outside the mask that changed."""
    off = np.abs(picture - exact)
    return {
        "error": torch.tensor(off.max(-1)).float(),
        "largest": float(off[inside].max()),
        "mean": float(off[inside].mean()),
        "outside": float((picture != background).any(-1)[~inside].mean()),
    }


def solved(fg: np.ndarray, bg: np.ndarray, inside: np.ndarray, guidance: str) -> np.ndarray:
    """Pérez' equation on the true mask, solved directly in float64 and not rounded, [H, W, 3] in grey levels."""
    matrix, right, rows = equations(fg.astype(float), bg.astype(float), inside, guidance)
    result = bg.astype(float)
    result[rows[:, 0], rows[:, 1]] = need("scipy.sparse.linalg").splu(matrix.tocsc()).solve(right)
    return result


def equations(fg: np.ndarray, bg: np.ndarray, inside: np.ndarray, guidance: str) -> tuple[Any, np.ndarray, np.ndarray]:
    """Matrix, right side [n, 3] and the unknowns' (y, x) [n, 2]; edges that leave the image are left out."""
    rows = np.argwhere(inside)
    number = np.full(inside.shape, -1)
    number[inside] = np.arange(len(rows))
    diagonal, right = np.zeros(len(rows)), np.zeros((len(rows), 3))
    entries: list[np.ndarray] = []
    for step in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        there = rows + step
        legal = ((there >= 0) & (there < inside.shape)).all(1)
        p, q = tuple(rows[legal].T), tuple(there[legal].T)
        own, other = number[p], number[q]
        guide, under = fg[p] - fg[q], bg[p] - bg[q]
        stronger = np.where(np.abs(under) > np.abs(guide), under, guide)
        right[own] += {"import": guide, "mixed": stronger, "average": (guide + under) / 2}[guidance]
        diagonal[own] += 1
        known = other < 0
        np.add.at(right, own[known], bg[q][known])
        entries.append(np.stack([own[~known], other[~known]]))
    at = np.concatenate([np.stack([np.arange(len(rows))] * 2), *entries], 1)
    values = np.concatenate([diagonal, -np.ones(at.shape[1] - len(rows))])
    return need("scipy.sparse").coo_matrix((values, tuple(at)), (len(rows),) * 2), right, rows


def paste(fg: np.ndarray, bg: np.ndarray, inside: np.ndarray, mode: str) -> np.ndarray:
    """A blend that solves nothing."""
    back, front = (torch.tensor(a).permute(2, 0, 1) for a in (bg, fg))
    if mode == "multiband":
        made = ops.multiband_blend(back, front, torch.tensor(inside))
    else:
        own = "none" if mode == "motion" else mode
        size = {"gaussian": 5, "box": 3}.get(own, 5)
        made = ops.composite(back, [front], [torch.tensor(inside)], position=[[0, 0]], mode=own, size=size)
    if mode == "motion":
        made = ops.motion_blur(made, 9, 45)
    return made.permute(1, 2, 0).numpy()


def poisson(fg: np.ndarray, bg: np.ndarray, inside: np.ndarray, guidance: str, **options: Any) -> np.ndarray:
    back, front = torch.tensor(bg), torch.tensor(fg)
    return ops.poisson_blend(
        back, [front], [torch.tensor(inside)], position=[[0, 0]], guidance=guidance, channels_last=True, **options
    ).numpy()


Blend = Callable[[np.ndarray, np.ndarray, np.ndarray, str], np.ndarray]


def peers() -> dict[str, tuple[Blend, str]]:
    """Other packages that blend so, if they are installed, and the guidance that each is asked for."""
    found: dict[str, tuple[Blend, str]] = {}
    for package, function in (("cv2", opencv), ("pietorch", pietorch), ("fpie", fpie)):
        if find_spec(package) is not None:
            name = {"cv2": "OpenCV seamlessClone"}.get(package, package)
            found |= {f"{name}, {guidance}": (function, guidance) for guidance in POISSON[:2]}
    return found


def opencv(fg: np.ndarray, bg: np.ndarray, inside: np.ndarray, guidance: str) -> np.ndarray:
    cv2 = need("cv2", "scenes")
    y, x = np.nonzero(inside)
    # The middle of the mask's box, which it puts there. It writes into the mask.
    middle = (int(x.min() + (x.max() - x.min() + 1) // 2), int(y.min() + (y.max() - y.min() + 1) // 2))
    flag = cv2.NORMAL_CLONE if guidance == "import" else cv2.MIXED_CLONE
    cv2.setNumThreads(torch.get_num_threads())
    return np.asarray(cv2.seamlessClone(fg, bg, inside.astype(np.uint8) * LEVELS, middle, flag))


def pietorch(fg: np.ndarray, bg: np.ndarray, inside: np.ndarray, guidance: str) -> np.ndarray:
    front, back = (torch.tensor(a).permute(2, 0, 1).float() / LEVELS for a in (fg, bg))
    corner, mask = torch.tensor([0, 0]), torch.tensor(inside).float()
    made = need("pietorch").blend(back, front, mask, corner, guidance == "mixed", channels_dim=0)
    return np.asarray((made.permute(1, 2, 0).clamp(0, 1) * LEVELS).round().byte())


def fpie(fg: np.ndarray, bg: np.ndarray, inside: np.ndarray, guidance: str) -> np.ndarray:
    """Its default of 5000 sweeps, by the fastest of its cores for one thread that was built."""
    process = need("fpie.process")
    core = next(name for name in ("openmp", "gcc", "numpy") if name in process.ALL_BACKEND)
    solver = process.EquProcessor("src" if guidance == "import" else "max", core, 1)
    solver.reset(fg, inside.astype(np.uint8) * LEVELS, bg, (0, 0), (0, 0))
    return np.asarray(solver.step(5000)[0])


def timed(function: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """What it gives, and the shortest of a few calls in seconds."""
    made, best, total = function(), math.inf, 0.0
    for _ in range(CALLS):
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
        total += time.perf_counter() - began
        if total > 1:
            break
    return made, best


class Pictures(NamedTuple):
    """Scenes with their boxes."""

    images: Tensor  # [N, 3, SIDE, SIDE] uint8
    boxes: list[Tensor]  # [n, 4] float32, x0, y0, x1, y1
    labels: list[Tensor]  # [n] int64, index into KINDS


# Rendered rooms


class Thing(NamedTuple):
    """One of the objects that are to be found again."""

    name: str
    kind: str  # of its shape
    size: tuple[float, float, float]  # half its extent
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    cell: float
    photo: str | None = None  # on its surface, instead of the colours


THINGS = (
    Thing("ball", "ellipsoid", (0.34, 0.34, 0.34), ((0.9, 0.2, 0.5), (0.95, 0.95, 0.9)), 0.25),
    Thing("egg", "ellipsoid", (0.27, 0.4, 0.27), ((0.9, 0.75, 0.2), (0.9, 0.75, 0.2)), 0.6, "flower"),
    Thing("dice", "box", (0.3, 0.3, 0.3), ((0.1, 0.5, 0.3), (0.85, 0.9, 0.6)), 0.2),
    Thing("crate", "box", (0.36, 0.26, 0.28), ((0.6, 0.4, 0.2), (0.6, 0.4, 0.2)), 0.6, "astronaut"),
    Thing("plate", "disc", (0.36, 0.36, 0.0), ((0.5, 0.3, 0.2), (0.5, 0.3, 0.2)), 0.72, "coffee"),
)
KINDS = tuple(thing.name for thing in THINGS)
FIRST_THING = 2  # shapes of a room before its things


def photographs() -> dict[str, Tensor]:
    """For half of the surfaces, [3, 96, 128] float 0 ... 1."""
    made = {name: samples.photo(name, (96, 128)) for name in samples.PHOTOS}
    return {name: torch.tensor(image).permute(2, 0, 1).float() / 255 for name, image in made.items()}


def room(seed: int, things: int, photos: dict[str, Tensor], side: int = SIDE) -> tuple[World, list[int]]:
    """A floor, a wall and things on the floor under a light of some direction; and which of `THINGS` they are."""
    rng = np.random.default_rng(seed)

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def surface(at: Tensor, size: tuple[float, float, float], cell: float) -> Shape:
        first = (between(0.1, 0.95), between(0.1, 0.95), between(0.1, 0.95))
        darker = between(0.4, 0.9)
        kind = rng.integers(4)
        second = first if kind == 2 else (first[0] * darker, first[1] * darker, first[2] * darker)
        photo = list(photos.values())[rng.integers(len(photos))] if kind < 2 else None
        return Shape(
            "rectangle", size, torch.stack([at, at]), Texture((first, second), 4 * cell if kind < 2 else cell, photo)
        )

    def thing(number: int) -> Shape:
        own = THINGS[number]
        flat = own.kind == "disc"
        scale = between(0.8, 1.2)
        size = (own.size[0] * scale, own.size[1] * scale, own.size[2] * scale)
        where = (between(-1.1, 1.1), -size[1], between(1.9, 3.6))
        at = pose(where, yaw=between(-50, 50) if flat else between(-180, 180), pitch=-15 * flat)
        photo = photos[own.photo] if own.photo else None
        return Shape(own.kind, size, torch.stack([at, at]), Texture(own.colours, own.cell * scale, photo))

    shapes = [
        surface(pose(pitch=90), (20, 20, 0), between(0.2, 0.8)),
        surface(pose((0, 0, between(4.5, 6)), yaw=between(-25, 25)), (20, 6, 0), 0.7),
    ]
    numbers = rng.permutation(len(THINGS))[:things].tolist()
    shapes += [thing(number) for number in numbers]
    at = pose((between(-0.2, 0.2), between(-1.5, -1.0), 0), yaw=between(-8, 8), pitch=between(-25, -12))
    view = torch.linalg.inv(at)
    light = (between(-0.8, 0.8), -1.0, between(-0.9, -0.2))
    size = (side, side)
    scene = World(tuple(shapes), Camera.of(size), size, torch.stack([view, view]), light, between(0.2, 0.5))
    return scene, numbers


def as_bytes(rendering: Rendering) -> np.ndarray:
    """[H, W, 3] uint8."""
    return (rendering.image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()


def rendered(first: int, count: int, rays: int) -> Pictures:
    """Whole scenes; boxes of at least 12 visible pixels and 3 on a side."""
    photos, images, boxes, labels = photographs(), [], [], []
    for seed in range(first, first + count):
        scene, numbers = room(seed, 1 + seed % 4, photos)
        picture = render_scene(scene, antialias=rays)
        own, kinds = [], []
        for index, number in enumerate(numbers, FIRST_THING):
            rows, columns = (picture.instance == index).nonzero(as_tuple=True)
            if len(rows) < 12 or min(rows.max() - rows.min(), columns.max() - columns.min()) < 2:
                continue
            own.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            kinds.append(number)
        images.append(torch.tensor(as_bytes(picture)).permute(2, 0, 1))
        boxes.append(torch.tensor(own, dtype=torch.float32).view(-1, 4))
        labels.append(torch.tensor(kinds, dtype=torch.long))
    return Pictures(torch.stack(images), boxes, labels)


def cut_out(first: int, count: int) -> list[Cutout]:
    """So many views of each thing at twice the scenes' resolution, each alone in a room of its own."""
    photos = photographs()
    found: dict[int, list[Cutout]] = {number: [] for number in range(len(THINGS))}
    seed = first
    while any(len(own) < count for own in found.values()):
        seed += 1
        scene, (number,) = room(seed, 1, photos, 2 * SIDE)
        if len(found[number]) == count:
            continue
        picture = render_scene(scene)
        own = picture.instance == FIRST_THING
        rows, columns = own.nonzero(as_tuple=True)
        if len(rows) < 240:
            continue
        where = (slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1))
        mask = own[where].byte().numpy() * 255
        found[number].append(Cutout(as_bytes(picture)[where], mask, KINDS[number], f"room {seed}"))
    return [one for own in found.values() for one in own]


def empty_rooms(first: int, count: int, rays: int) -> list[np.ndarray]:
    photos = photographs()
    return [as_bytes(render_scene(room(first + n, 0, photos)[0], antialias=rays)) for n in range(count)]


# Learning from composed scenes


def recipe(source: str) -> Recipe:
    blends = ALL_BLENDS if source == EVERY else ("none",) if source == WHOLE_BOX else (source,)
    return Recipe(
        size=(SIDE, SIDE),
        objects=(1, 4),
        blend=blends,
        same_scene=True,
        level="box" if source == WHOLE_BOX else "object",
        scale=(0.3, 0.65),
        angle=(-15.0, 15.0),
        flip=0.5,
        max_overlap=0.5,
        min_visibility=0.3,
        brightness=0.2,
        feather=(3, 0.8),  # objects are a tenth as large as those of 640 x 480
    )


def composed(
    source: str, cutouts: list[Cutout], backgrounds: list[np.ndarray], count: int, seed: int
) -> list[Pictures]:
    """The scenes in each blend of the source; the places are those of all other sources."""
    composer = SceneComposer(cutouts, backgrounds, recipe(source), seed=seed)
    scenes = [composer.scene(number) for number in range(count)]
    boxes, labels = [], []
    for scene in scenes:
        corners = [(x, y, x + w, y + h) for one in scene.labels.instances for x, y, w, h in [one.box]]
        boxes.append(torch.tensor(corners, dtype=torch.float32).view(-1, 4))
        labels.append(torch.tensor([KINDS.index(one.category) for one in scene.labels.instances], dtype=torch.long))
    return [
        Pictures(torch.stack([torch.tensor(s.images[blend]).permute(2, 0, 1) for s in scenes]), boxes, labels)
        for blend in recipe(source).blend
    ]


def network(plan: Plan) -> CenterDetector:
    return CenterDetector(len(KINDS), width=plan.width, blocks=plan.blocks)


def train(pictures: list[Pictures], plan: Plan, seed: int, tick: Callable[[], object]) -> CenterDetector:
    """A detector after its steps, in eval mode; of several blends each scene is taken in one, drawn anew each time."""
    generator = torch.Generator().manual_seed(seed)
    labelled = zip(pictures[0].boxes, pictures[0].labels, strict=True)
    targets = [center_targets([boxes], [kinds], len(KINDS), (SIDE, SIDE)) for boxes, kinds in labelled]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(plan)
        optimizer = torch.optim.AdamW(model.parameters(), plan.rate)
        rate = LinearLR(optimizer, 1.0, 0.02, plan.steps)
        for _ in range(plan.steps):
            index = torch.randint(len(targets), (plan.batch,), generator=generator).tolist()
            blends = torch.randint(len(pictures), (plan.batch,), generator=generator).tolist()
            images = torch.stack([pictures[b].images[i] for b, i in zip(blends, index, strict=True)]).float() / LEVELS
            optimizer.zero_grad(set_to_none=True)
            center_loss(*model(images), stacked([targets[i] for i in index])).backward()
            optimizer.step()
            rate.step()
            tick()
    return model.eval()


def stacked(single: Sequence[Targets]) -> Targets:
    """Targets of a batch from those of its images."""
    places = torch.cat([one.places + torch.tensor([n, 0, 0]) for n, one in enumerate(single)])
    return Targets(torch.cat([one.heat for one in single]), places, torch.cat([one.values for one in single]))


def average_precision(found: list[Detections], truth: Pictures) -> dict[str, float]:
    """COCO's average precision at an overlap of one half, by kind, and their mean."""
    coco_class, coco_eval = need("pycocotools.coco", "scenes").COCO, need("pycocotools.cocoeval", "scenes").COCOeval
    annotations, results = [], []
    for image, (boxes, kinds, seen) in enumerate(zip(truth.boxes, truth.labels, found, strict=True)):
        for (x0, y0, x1, y1), kind in zip(boxes.tolist(), kinds.tolist(), strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": kind, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": 0}
            )  # fmt: skip
        for (x0, y0, x1, y1), score, kind in zip(*(t.tolist() for t in seen), strict=True):
            results.append({"image_id": image, "category_id": kind, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco_class()
        known.dataset = {
            "info": {},
            "images": [{"id": n} for n in range(len(found))],
            "categories": [{"id": n, "name": kind} for n, kind in enumerate(KINDS)],
            "annotations": annotations,
        }
        known.createIndex()
        judge = coco_eval(known, known.loadRes(results), "bbox")
        judge.params.iouThrs = np.array([THRESHOLD])
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][0, :, :, 0, -1]  # [recall, kind] of all areas and up to 100 boxes
    by_kind = {kind: float(precision[:, n].mean()) for n, kind in enumerate(KINDS)}
    return by_kind | {"mean": float(np.mean(list(by_kind.values())))}


def detectors(plan: Plan, seed: int, tick: Callable[[], object]) -> dict[str, Any]:
    """Average precision by source of one seed: its cut-outs, backgrounds, scenes, first weights and batches."""
    truth = rendered(TEST_SEED, plan.tested, plan.rays)
    first = (seed + 1) * 10_000
    cutouts = cut_out(first, plan.cutouts)
    backgrounds = empty_rooms(first + 5000, plan.backgrounds, plan.rays)
    scores, examples = {}, {}
    for source in SOURCES:
        if source == RENDERED:
            pictures = [rendered(first + 7000, plan.scenes, plan.rays)]
        else:
            pictures = composed(source, cutouts, backgrounds, plan.scenes, seed)
        model = train(pictures, plan, seed, tick)
        found = [one for part in truth.images.split(64) for one in model.detect(part.float() / LEVELS)]
        scores[source] = average_precision(found, truth)
        if seed == 0 and source != EVERY:
            examples[source] = pictures[0].images[:SHOWN]
        if seed == 0 and source == EVERY:
            examples["tests"] = truth.images[:SHOWN]
            examples["found"] = [
                {"boxes": f.boxes[sure], "labels": f.labels[sure], "scores": f.scores[sure]}
                for f in found[:SHOWN]
                for sure in [f.scores > SURE]
            ]
    return {"scores": scores, "examples": examples}
