"""Labels of a composed scene, from what can be seen in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fastnuggets.scenes.cutouts import bounding_box
from fastnuggets.scenes.images import coco_masks, opencv

Box = tuple[int, int, int, int]  # x, y, width, height in pixels; COCO's order
_SOLID = 128  # a pixel is the object's where its mask, not feathered, is at least this


@dataclass(frozen=True, eq=False)
class Instance:
    """One object of a scene."""

    number: int  # in Labels.ids, and its place in the order of pasting: a higher one lies on top
    category: str
    name: str  # of the cut-out
    box: Box | None  # of what is visible; None if nothing is
    amodal_box: Box | None  # of the whole object inside the image; None if it lies outside
    area: int  # visible pixels
    amodal_area: int  # pixels inside the image, whatever lies on them
    full_area: int  # pixels with those outside the image
    distractor: bool
    silhouette: tuple[int, int, np.ndarray]  # y, x and bool [h, w], where the object lies; may go beyond the image

    @property
    def visibility(self) -> float:
        """Visible pixels of those inside the image, 0..1."""
        return self.area / self.amodal_area if self.amodal_area else 0.0

    @property
    def truncation(self) -> float:
        """Part of the object that lies outside the image, 0..1."""
        return 1 - self.amodal_area / self.full_area if self.full_area else 0.0


@dataclass(frozen=True, eq=False)
class Labels:
    """Who is seen where: every pixel belongs to the topmost object whose mask is at least one half there.

    Visible masks are disjoint, and each lies in the object's amodal mask.
    """

    ids: np.ndarray  # [H, W] int16, number of the object, -1 for the background
    everything: list[Instance]  # by number
    categories: tuple[str, ...] = field(default=())  # COCO numbers them from 1

    @cached_property
    def instances(self) -> list[Instance]:
        """The labelled objects of which something is visible: no distractors."""
        return [one for one in self.everything if one.area and not one.distractor]

    def category_id(self, one: Instance) -> int:
        return self.categories.index(one.category) + 1

    def mask(self, one: Instance) -> np.ndarray:
        """Visible mask, [H, W] bool."""
        return np.asarray(self.ids == one.number)

    def amodal_mask(self, one: Instance) -> np.ndarray:
        """[H, W] bool: all of the object inside the image, whatever lies on it."""
        whole = np.zeros(self.ids.shape, bool)
        seen, where = clipped(one.silhouette, self.ids.shape)
        whole[where] = seen
        return whole

    def semantic(self) -> np.ndarray:
        """[H, W] int32: the category's number from 1, 0 for the background and distractors."""
        numbers = [0 if one.distractor else self.category_id(one) for one in self.everything]
        return np.array([*numbers, 0], np.int32)[self.ids]

    def rle(self, one: Instance, *, amodal: bool = False) -> dict[str, Any]:
        """COCO's compressed run lengths of the visible or the amodal mask."""
        mask = np.ascontiguousarray(self.amodal_mask(one).T) if amodal else self._columns == one.number
        code = coco_masks().encode(mask.view(np.uint8).T)
        return {"size": list(self.ids.shape), "counts": code["counts"].decode("ascii")}

    @cached_property
    def _columns(self) -> np.ndarray:
        """Column after column, as COCO counts."""
        return np.ascontiguousarray(self.ids.T)


def clipped(silhouette: tuple[int, int, np.ndarray], size: Sequence[int]) -> tuple[np.ndarray, tuple[slice, slice]]:
    """The part of an array at y, x that lies in an image of ``size``, and where; both may be empty."""
    y, x, array = silhouette
    top, left = max(0, y), max(0, x)
    bottom, right = max(top, min(size[0], y + array.shape[0])), max(left, min(size[1], x + array.shape[1]))
    # An object above or left of the image ends before it begins: an empty slice, not one from the end.
    rows = slice(min(top - y, array.shape[0]), max(0, bottom - y))
    columns = slice(min(left - x, array.shape[1]), max(0, right - x))
    return array[rows, columns], (slice(top, bottom), slice(left, right))


@dataclass(frozen=True, eq=False)
class Placed:
    """An object as it lies in a scene, ready to be blended: what labels are made from."""

    image: np.ndarray  # [h, w, 3] uint8
    mask: np.ndarray  # [h, w] uint8
    y: int
    x: int
    category: str
    name: str
    distractor: bool = False

    @cached_property
    def solid(self) -> np.ndarray:
        return np.asarray(self.mask >= _SOLID)


def paint(ids: np.ndarray, one: Placed, number: int) -> None:
    """Mark where an object lies on top of what is in ``ids`` [H, W], in place."""
    seen, where = clipped((one.y, one.x, one.solid), ids.shape)
    if seen.size:  # OpenCV is four times as fast here as NumPy
        place = ids[where]
        opencv().copyTo(np.full_like(place, number), seen.view(np.uint8), place)


def make_labels(placed: Sequence[Placed], ids: np.ndarray, categories: Sequence[str]) -> Labels:
    """Labels of objects painted into ``ids`` in order."""
    return Labels(ids, [_instance(one, number, ids) for number, one in enumerate(placed)], tuple(categories))


def _instance(one: Placed, number: int, ids: np.ndarray) -> Instance:
    silhouette = (one.y, one.x, one.solid)
    inside, where = clipped(silhouette, ids.shape)
    visible = ids[where] == number
    top, left = where[0].start, where[1].start
    return Instance(
        number=number,
        category=one.category,
        name=one.name,
        box=_box(visible, top, left),
        amodal_box=_box(inside, top, left),
        area=int(np.count_nonzero(visible)),
        amodal_area=int(np.count_nonzero(inside)),
        full_area=int(np.count_nonzero(one.solid)),
        distractor=one.distractor,
        silhouette=silhouette,
    )


def _box(mask: np.ndarray, top: int, left: int) -> Box | None:
    found = bounding_box(mask)
    return None if found is None else (left + found[1], top + found[0], found[3], found[2])
