"""Scenes: objects drawn, placed and blended onto backgrounds, with their labels. All of it follows from a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fastnuggets.scenes.backgrounds import Background, fitted
from fastnuggets.scenes.blending import Motion, blend_all
from fastnuggets.scenes.cutouts import Cutout, LeastRecent, bounding_box
from fastnuggets.scenes.images import BrokenFileError
from fastnuggets.scenes.labels import Labels, Placed, clipped, make_labels, paint
from fastnuggets.scenes.recipes import Recipe, preset
from fastnuggets.scenes.transforms import Form, jitter, transform, transform_compatible, turned_size

T = TypeVar("T")
Points = Mapping[str, Sequence[Sequence[float]]]

_BROKEN = 64  # broken files in a row before it is an error
_REDRAWS = 1000  # of a scale or an angle until the object fits, and of a scene, where the compatible form does so
_PLACES, _LOOK = 0, 1  # streams of random numbers: the places are the same for whatever blend is drawn


@dataclass(frozen=True, eq=False)
class Scene:
    """One scene, in one blend or in several with the same places and one set of labels."""

    number: int
    images: dict[str, np.ndarray]  # by blend, [H, W, 3] uint8 RGB
    labels: Labels
    placed: list[Placed]  # what was pasted, in order
    background: np.ndarray  # [H, W, 3] uint8
    background_name: str
    left_out: int  # objects for which no place was found

    @property
    def image(self) -> np.ndarray:
        """The image of the first blend, [H, W, 3] uint8."""
        return next(iter(self.images.values()))


class SceneComposer:
    """Makes scene k from (seed, k) alone: on any machine, in any order, and again, byte for byte.

    That holds for the same files, recipe and versions of fastnuggets, NumPy, OpenCV and Pillow.

        composer = SceneComposer(Cutouts.from_folder("objects"), Backgrounds.from_folder("rooms"), seed=1)
        scene = composer.scene(0)
        scene.image, scene.labels.instances

    Args:
        cutouts: a `Cutouts` or any sequence of `Cutout`; broken ones are replaced by others.
        backgrounds: a `Backgrounds` or any sequence of `Background` or of [H, W, 3] uint8 arrays.
        recipe: a `Recipe`, or the name of a preset.
        seed: a number from 0.
        distractors: cut-outs that are pasted after the objects and not labelled, as many as the recipe says.
        support: points that objects stand on: by the background's name rows (y, x, scale), in pixels of the file. The
            middle of an object's foot comes to a point drawn from them, and ``scale`` is its size in pixels of the file
            over that of the cut-out, times the scale that the recipe draws. Other backgrounds are used freely. Of
            `Places` they are ``np.column_stack([places.points[:, ::-1], places.scale(reference)])``.
        cache_bytes: memory for backgrounds at their size.

    ValueError where something is empty or does not fit together. Needs `fastnuggets[scenes]`.
    """

    def __init__(
        self,
        cutouts: Sequence[Cutout],
        backgrounds: Sequence[Any],
        recipe: Recipe | str = "default",
        *,
        seed: int = 0,
        distractors: Sequence[Cutout] = (),
        support: Points | None = None,
        cache_bytes: int = 1 << 28,
    ) -> None:
        self.recipe = preset(recipe) if isinstance(recipe, str) else recipe
        if not len(cutouts) or not len(backgrounds):
            raise ValueError(f"there must be cut-outs and backgrounds, got {len(cutouts)} and {len(backgrounds)}")
        if (self.recipe.distractors[1] > 0) != (len(distractors) > 0):
            raise ValueError("distractors: give both the cut-outs and, in the recipe, how many of them are in a scene")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.cutouts, self.backgrounds, self.distractors = cutouts, backgrounds, distractors
        self.seed, self.support = seed, dict(support or {})
        self.categories = tuple(sorted({*_categories(cutouts), *getattr(backgrounds, "categories", ())}))
        self.skipped: dict[str, str] = {}  # broken files met so far, by name with the reason
        self._fitted: LeastRecent[_Fitted] = LeastRecent(cache_bytes)
        self._groups = [_groups(items) if self.recipe.balance else [] for items in (cutouts, distractors)]

    def scene(self, number: int, blends: Sequence[str] | None = None) -> Scene:
        """Scene ``number``, from 0.

        blends: which of the recipe's to make; None: all with ``same_scene``, else the one that is drawn. ValueError if
        file after file is broken, or if the compatible form finds no end.
        """
        if number < 0:
            raise ValueError(f"number must be at least 0, got {number}")
        look = _generator(self.seed, number, _LOOK)
        motion = Motion.draw(look)
        drawn = self.recipe.blend[int(look.integers(len(self.recipe.blend)))]
        if blends is None:
            blends = self.recipe.blend if self.recipe.same_scene else (drawn,)
        layout = self._layout(number)
        image, placed = layout.background.image, layout.placed
        return Scene(
            number=number,
            images=blend_all(image, placed, blends, self.recipe, motion),
            labels=make_labels([*layout.known, *placed], layout.ids, self.categories),
            placed=placed,
            background=image,
            background_name=layout.background.name,
            left_out=layout.left_out,
        )

    def _layout(self, number: int) -> _Layout:
        rng = _generator(self.seed, number, _PLACES)
        for _ in range(_REDRAWS):
            layout = _Layout(self, rng)
            if not layout.again:
                return layout
        raise ValueError(f"scene {number}: no place for the last object, and that {_REDRAWS} times")

    def draw_background(self, rng: np.random.Generator) -> tuple[Background, tuple[float, float, int, int]]:
        """A background cropped to the image, and how it was: its enlargement in y and x, and the first row, column."""
        item = self._draw(lambda: int(rng.integers(len(self.backgrounds))), self._fit)
        height, width = self.recipe.size
        tall, wide = item.background.image.shape[:2]
        y, x = int(rng.integers(tall - height + 1)), int(rng.integers(wide - width + 1))
        inside = np.s_[y : y + height, x : x + width]
        known = [one._replace(mask=one.mask[inside]) for one in item.background.known]
        return Background(item.background.image[inside].copy(), item.background.name, known), (*item.enlarged, y, x)

    def draw_cutout(self, rng: np.random.Generator, distractor: bool) -> Cutout:
        items, groups = self.distractors if distractor else self.cutouts, self._groups[distractor]

        def pick() -> int:
            if not groups:
                return int(rng.integers(len(items)))
            group = groups[int(rng.integers(len(groups)))]
            return group[int(rng.integers(len(group)))]

        return self._draw(pick, items.__getitem__)

    def _draw(self, pick: Callable[[], int], get: Callable[[int], T]) -> T:
        """An item that can be read: a broken one is put down and another drawn, which depends on the files alone."""
        last = None
        for _ in range(_BROKEN):
            try:
                return get(pick())
            except BrokenFileError as error:
                self.skipped[error.name] = error.reason
                last = error
        raise ValueError(f"{_BROKEN} files in a row cannot be used; the last of them is {last}")

    def _fit(self, index: int) -> _Fitted:
        return self._fitted.get(index, self._load, lambda item: item.background.image.nbytes)

    def _load(self, index: int) -> _Fitted:
        item = self.backgrounds[index]
        if not isinstance(item, Background):
            item = Background(item, f"background {index}")
        if item.image.ndim != 3 or item.image.shape[2] != 3 or item.image.dtype != np.uint8:
            raise ValueError(
                f"backgrounds: expected [H, W, 3] uint8, got {list(item.image.shape)} {item.image.dtype} at {index}"
            )
        fit = fitted(item, self.recipe.size, self.recipe.fit, exact=self.recipe.compatible)
        after, before = fit.image.shape, item.image.shape
        return _Fitted(fit, (after[0] / before[0], after[1] / before[1]))


@dataclass(frozen=True, eq=False)
class _Fitted:
    background: Background
    enlarged: tuple[float, float]  # its height and width over those of the file


def _categories(cutouts: Sequence[Cutout]) -> Sequence[str]:
    known = getattr(cutouts, "categories", None)
    return [one.category for one in cutouts] if known is None else known


def _groups(cutouts: Sequence[Any]) -> list[list[int]]:
    """The numbers of the cut-outs of each category."""
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(getattr(cutouts, "entries", cutouts)):
        groups.setdefault(one.category, []).append(index)
    return list(groups.values())


def _generator(seed: int, number: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number, stream))))


class _Layout:
    """Objects drawn and placed on one background, and who is seen where."""

    def __init__(self, composer: SceneComposer, rng: np.random.Generator) -> None:
        self.composer, self.recipe, self.rng = composer, composer.recipe, rng
        self.background, self.enlarged = composer.draw_background(rng)
        self.points = composer.support.get(self.background.name, ())
        self.ids = np.full(self.recipe.size, -1, np.int16)
        self.known = [_as_placed(one.mask, one.category, one.name) for one in self.background.known]
        self.placed: list[Placed] = []
        self.boxes: list[tuple[int, int, int, int]] = []  # y, x, height, width of each placed object, whole
        self.visible: list[int] = []  # pixels of each object, known or placed, that are visible now
        self.least: list[float] = []  # and that must stay
        self.left_out, self.again = 0, False
        for number, one in enumerate(self.known):
            paint(self.ids, one, number)
        for number in range(len(self.known)):
            self._account(int(np.count_nonzero(self.ids == number)))
        self._fill()

    def _fill(self) -> None:
        recipe, rng = self.recipe, self.rng
        count, more = (int(rng.integers(low, high + 1)) for low, high in (recipe.objects, recipe.distractors))
        for distractor in [False] * count + [True] * more:
            cutout = self.composer.draw_cutout(rng, distractor)
            one = (self._compatible if recipe.compatible else self._place)(cutout, distractor)
            if one is None:
                self.left_out += 1
            else:
                self._put(one)

    def _place(self, cutout: Cutout, distractor: bool) -> Placed | None:
        recipe = self.recipe
        mask = np.full_like(cutout.mask, 255) if recipe.level == "box" else cutout.mask
        whole = Form(cutout.image, mask)
        form = None
        for _ in range(recipe.tries):
            if form is None or len(self.points):
                point = self._point()
                form = self._form(whole, point)
            tall, wide = form.mask.shape
            y, x = self._foot(form, point) if point else (self._corner(tall, 0), self._corner(wide, 1))
            one = Placed(form.image, form.mask, y, x, cutout.category, cutout.name, distractor)
            if self._allowed(one):
                return one
        return None

    def _form(self, whole: Form, point: tuple[float, float, float] | None) -> Form:
        """The object at a scale and an angle at which it fits into the image."""
        recipe, rng = self.recipe, self.rng
        height, width = whole.mask.shape
        angle, flip = float(rng.uniform(*recipe.angle)), bool(rng.random() < recipe.flip)
        low, high = recipe.scale
        unit = min(recipe.size) / max(height, width) if recipe.scale_of == "canvas" else 1.0
        tall, wide = turned_size(height, width, angle)
        limit = min(recipe.size[0] / tall, recipe.size[1] / wide)
        if point:
            unit *= point[2]
        else:
            low, high = min(low, limit / unit), min(high, limit / unit)
        form = transform(whole, unit * float(rng.uniform(low, high)), angle, flip, recipe.soft)
        return form._replace(image=jitter(form.image, rng, recipe.brightness, recipe.contrast, recipe.colour))

    def _corner(self, side: int, axis: int) -> int:
        """First row or column, uniform where at most ``max_truncation`` of the side lies outside."""
        out = int(self.recipe.max_truncation * side)
        return int(self.rng.integers(-out, max(-out, self.recipe.size[axis] - side + out) + 1))

    def _point(self) -> tuple[float, float, float] | None:
        """A point of support in the image's pixels, and the scale there."""
        if not len(self.points):
            return None
        y, x, scale = map(float, self.points[int(self.rng.integers(len(self.points)))])
        tall, wide, top, left = self.enlarged
        return (y + 0.5) * tall - 0.5 - top, (x + 0.5) * wide - 0.5 - left, scale * (tall * wide) ** 0.5

    def _foot(self, form: Form, point: tuple[float, float, float]) -> tuple[int, int]:
        """Where an object lies whose last row's middle is on the point."""
        columns = np.flatnonzero(form.mask[-1])
        middle = (columns[0] + columns[-1]) / 2 if len(columns) else (form.mask.shape[1] - 1) / 2
        return round(point[0]) - form.mask.shape[0] + 1, round(point[1] - middle)

    def _allowed(self, one: Placed) -> bool:
        """Whether the object is seen enough here, and leaves enough of the others to be seen."""
        recipe = self.recipe
        full = int(np.count_nonzero(one.solid))
        inside, where = clipped((one.y, one.x, one.solid), recipe.size)
        count = full if inside.size == one.solid.size else int(np.count_nonzero(inside))
        if count == 0 or count < (1 - recipe.max_truncation) * full:
            return False
        if recipe.max_overlap is not None and self._overlaps(self._box(one), recipe.max_overlap):
            return False
        if not recipe.min_visibility:
            return True
        covered = np.bincount(self.ids[where][inside] + 1, minlength=len(self.visible) + 1)[1:]
        return bool((np.subtract(self.visible, covered) >= self.least).all())

    def _overlaps(self, box: tuple[int, int, int, int], limit: float) -> bool:
        for other in self.boxes:
            tall = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
            wide = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
            common = max(0, tall) * max(0, wide)
            area = other[2] * other[3]
            if self.recipe.overlap == "iou":
                area += box[2] * box[3] - common
            if common > limit * area:
                return True
        return False

    def _box(self, one: Placed) -> tuple[int, int, int, int]:
        y, x, height, width = bounding_box(one.solid) or (0, 0, 0, 0)
        less = int(self.recipe.compatible)  # there the last row and column are not counted
        return one.y + y, one.x + x, height - less, width - less

    def _put(self, one: Placed) -> None:
        seen, where = clipped((one.y, one.x, one.solid), self.recipe.size)
        if self.recipe.min_visibility:
            covered = np.bincount(self.ids[where][seen] + 1, minlength=len(self.visible) + 1)[1:]
            self.visible = np.subtract(self.visible, covered).tolist()
        paint(self.ids, one, len(self.known) + len(self.placed))
        self.placed.append(one)
        self.boxes.append(self._box(one))
        self._account(int(np.count_nonzero(seen)))

    def _account(self, pixels: int) -> None:
        self.visible.append(pixels)
        self.least.append(self.recipe.min_visibility * pixels)

    def _compatible(self, cutout: Cutout, distractor: bool) -> Placed | None:
        """As the code of Dwibedi 2017 places, see `recipes.preset`; None if the object fits at no scale."""
        recipe, rng = self.recipe, self.rng
        mask = np.where(cutout.mask >= 128, np.uint8(255), np.uint8(0))
        mask = np.full_like(mask, 255) if recipe.level == "box" else mask
        whole = Form(np.ascontiguousarray(cutout.image[:-1, :-1]), np.ascontiguousarray(mask[:-1, :-1]))
        size = self._redraw(lambda: _scaled(whole, rng.uniform(*recipe.scale)), lambda size: size)
        if size is None:
            return None
        low, high = map(int, recipe.angle)
        form = self._redraw(
            lambda: transform_compatible(whole, size, int(rng.integers(low, high + 1))), lambda form: form.mask.shape
        )
        if form is None:
            return None
        for _ in range(recipe.tries):
            y, x = (self._corner(side, axis) for axis, side in enumerate(form.mask.shape))
            one = Placed(form.image, form.mask, y, x, cutout.category, cutout.name, distractor)
            self.again = recipe.max_overlap is not None and self._overlaps(self._box(one), recipe.max_overlap)
            if not self.again:
                break
        return one

    def _redraw(self, draw: Callable[[], T], side: Callable[[T], tuple[int, ...]]) -> T | None:
        """Draws until the sides are above zero and smaller than the image."""
        for _ in range(_REDRAWS):
            value = draw()
            if all(0 < length < limit for length, limit in zip(side(value), self.recipe.size, strict=True)):
                return value
        return None


def _scaled(form: Form, scale: float) -> tuple[int, int]:
    return int(scale * form.mask.shape[0]), int(scale * form.mask.shape[1])


def _as_placed(mask: np.ndarray, category: str, name: str) -> Placed:
    levels = mask.astype(np.uint8) * np.uint8(255)
    return Placed(np.empty((*mask.shape, 0), np.uint8), levels, 0, 0, category, name)
