"""A cut-out at another size, turned, mirrored and recoloured: pixels before they are placed."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastnuggets.scenes.backgrounds import resize
from fastnuggets.scenes.cutouts import bounding_box
from fastnuggets.scenes.images import opencv, pillow

_HALF = 128


class Form(NamedTuple):
    """What an object looks like, wherever it comes to lie."""

    image: np.ndarray  # [h, w, 3] uint8
    mask: np.ndarray  # [h, w] uint8


def turned_size(height: float, width: float, angle: float) -> tuple[float, float]:
    """Height and width of the upright box about a rectangle turned by ``angle`` degrees."""
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    return height * cos + width * sin, height * sin + width * cos


def transform(form: Form, scale: float, angle: float, flip: bool, soft: bool) -> Form:
    """Scaled, mirrored, turned counter-clockwise by ``angle`` degrees, and cropped to what is left of the mask.

    By areas where it shrinks, else bicubic, then bilinear for the turn. soft: keep the mask's edge; else it is cut at
    one half.
    """
    height, width = form.mask.shape
    size = max(1, round(height * scale)), max(1, round(width * scale))
    image, mask = resize(form.image, size), resize(form.mask, size)
    if flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if angle:
        image, mask = _turn(image, mask, angle)
    if not soft:
        mask = opencv().threshold(np.ascontiguousarray(mask), _HALF - 1, 255, 0)[1]
    box = bounding_box(np.ascontiguousarray(mask))
    y, x, h, w = box or (0, 0, 1, 1)
    return Form(image[y : y + h, x : x + w], mask[y : y + h, x : x + w])


def _turn(image: np.ndarray, mask: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cv2 = opencv()
    height, width = mask.shape
    tall, wide = (math.ceil(side - 1e-6) for side in turned_size(height, width, angle))
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
    matrix[:, 2] += (wide - width) / 2, (tall - height) / 2
    image = cv2.warpAffine(
        np.ascontiguousarray(image), matrix, (wide, tall), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    # A mask of a photograph ends at its box: what lies outside is not the object.
    mask = cv2.warpAffine(np.ascontiguousarray(mask), matrix, (wide, tall), flags=cv2.INTER_LINEAR)
    return image, mask


def transform_compatible(form: Form, size: tuple[int, int], angle: int) -> Form:
    """As the code of Dwibedi 2017: Lanczos to ``size``, 1-bit mask by nearest neighbour, both turned so."""
    pil = pillow()
    height, width = size
    image = pil.fromarray(form.image).resize((width, height), pil.Resampling.LANCZOS)
    mask = pil.fromarray(form.mask).resize((width, height), pil.Resampling.NEAREST)
    image, mask = image.rotate(angle, expand=True), mask.rotate(angle, expand=True)
    return Form(np.array(image), np.array(mask))


def jitter(
    image: np.ndarray, rng: np.random.Generator, brightness: float, contrast: float, colour: float
) -> np.ndarray:
    """Levels times a random factor, about mid-grey and for each channel; [h, w, 3] uint8. Five numbers are drawn."""
    draws = rng.uniform(-1, 1, 5)
    if not (brightness or contrast or colour):
        return image
    gains = (1 + brightness * draws[0]) * (1 + colour * draws[2:])
    levels = ((np.arange(256)[:, None] - 127.5) * (1 + contrast * draws[1]) + 127.5) * gains
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return np.asarray(opencv().LUT(np.ascontiguousarray(image), table[None]))
