"""Placed objects blended onto a background, by the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastnuggets import ops
from fastnuggets.ops.filters import KINDS, LENGTHS
from fastnuggets.scenes.labels import Placed, clipped
from fastnuggets.scenes.recipes import Recipe

_GUIDANCE = {"poisson": "import", "mixed": "mixed", "rectangle": "import"}
_WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "motion": {},  # of what is pasted hard
    "gaussian": {"mode": "gaussian"},
    "box": {"mode": "box", "size": 3},  # as Dwibedi 2017
    "difference": {"mode": "difference"},
}


class Motion(NamedTuple):
    """Motion blur of a whole scene, as Dwibedi 2017 draws it."""

    length: int
    angle: float  # degrees
    kind: str  # the whole line, or the half left or right of its middle

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Motion:
        length = int(rng.choice(LENGTHS))
        directions = 4 * (length // 2)
        return cls(length, 180 / directions * int(rng.integers(directions)), KINDS[int(rng.integers(len(KINDS)))])


def blend_all(
    background: np.ndarray, placed: Sequence[Placed], blends: Sequence[str], recipe: Recipe, motion: Motion
) -> dict[str, np.ndarray]:
    """[H, W, 3] uint8 by blend: objects in order on a background [H, W, 3] uint8, which is left alone."""
    under = torch.from_numpy(background)
    if not placed:
        nothing = {name: _blurred(under, motion, recipe) if name == "motion" else under.clone() for name in blends}
        return {name: image.numpy() for name, image in nothing.items()}
    images = [one.image for one in placed]
    position = torch.tensor([(one.y, one.x) for one in placed])
    objects = _pack(images, [one.mask for one in placed])
    made: dict[str, np.ndarray] = {}
    for name in blends:
        if name in ("poisson", "mixed"):
            solid = _pack(images, [_domain(one, recipe.compatible) for one in placed])
            image: Any = ops.poisson_blend(
                under, solid, position=position, guidance=_GUIDANCE[name], channels_last=True
            )
        else:
            way = {**_WAYS[name], "edge": "reflect" if recipe.compatible else "zero"}
            if name == "gaussian":
                way["size"], way["sigma"] = recipe.feather
            image = ops.composite(under, objects, position=position, channels_last=True, **way)
            image = _blurred(image, motion, recipe) if name == "motion" else image
        made[name] = np.asarray(image)
    return made


def _pack(images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> ops.Objects:
    pixels, alphas = ([torch.from_numpy(np.ascontiguousarray(array)) for array in arrays] for arrays in (images, masks))
    return ops.pack_objects(pixels, alphas, channels_last=True)


def _domain(one: Placed, compatible: bool) -> np.ndarray:
    """Where Poisson's equation is solved; the compatible form leaves the border of the object's box out."""
    domain = one.solid.astype(np.uint8) * np.uint8(255)
    if compatible:
        domain[[0, -1]] = 0
        domain[:, [0, -1]] = 0
    return domain


def _blurred(image: Tensor, motion: Motion, recipe: Recipe) -> Tensor:
    border: dict[str, Any] = {"border": 255.0, "truncate": True} if recipe.compatible else {}
    return ops.motion_blur(image, *motion, channels_last=True, **border)


def blend_one(
    background: np.ndarray, foreground: np.ndarray, mask: np.ndarray, at: Sequence[int], mode: str
) -> np.ndarray:
    """[H, W, 3] uint8: a foreground [h, w, 3] with its mask [h, w] uint8 pasted at row and column ``at``.

    mode: none, gaussian, box, difference (`fastnuggets.ops.composite`); poisson, mixed, average, and rectangle, which
    is poisson on the mask's whole rectangle (`fastnuggets.ops.poisson_blend`); multiband.
    """
    if mode == "multiband":
        return _multiband(background, foreground, mask, at)
    under, position = torch.from_numpy(background), torch.tensor([list(at)])
    objects = _pack([foreground], [mask])
    options: dict[str, Any] = {"position": position, "channels_last": True}
    if mode in ("poisson", "mixed", "average", "rectangle"):
        options |= {"guidance": _GUIDANCE.get(mode, mode), "domain": "rectangle" if mode == "rectangle" else "mask"}
        return np.asarray(ops.poisson_blend(under, objects, **options))
    return np.asarray(ops.composite(under, objects, edge="zero", **options, **_WAYS[mode]))


def _multiband(background: np.ndarray, foreground: np.ndarray, mask: np.ndarray, at: Sequence[int]) -> np.ndarray:
    arrays = background, spread(foreground, background.shape, at), on_zeros(mask, background.shape, at)
    return ops.multiband_blend(*map(torch.from_numpy, arrays), channels_last=True).numpy()


def spread(image: np.ndarray, size: Sequence[int], at: Sequence[int]) -> np.ndarray:
    """An image [h, w, C] at row and column ``at`` of a larger one; around it its edge goes on."""
    rows, columns = (np.clip(np.arange(size[axis]) - at[axis], 0, image.shape[axis] - 1) for axis in (0, 1))
    return image[rows[:, None], columns]


def on_zeros(mask: np.ndarray, size: Sequence[int], at: Sequence[int]) -> np.ndarray:
    """A mask [h, w] at row and column ``at`` of a larger one that is 0."""
    whole = np.zeros(size[:2], mask.dtype)
    inside, where = clipped((at[0], at[1], mask), size)
    whole[where] = inside
    return whole
