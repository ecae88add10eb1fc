"""Photographs that ship inside scikit-image and scikit-learn, and masks that try a solver.

The photographs need `fastnuggets[scenes]` and scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "china", "flower")
# A cat cut out by hand, a cup with its handle's hole, thin strokes, and islands with holes.
MASKS = ("cat", "cup", "text", "blob")
ADVERSARIAL = ("comb", "spiral", "pinholes", "walls", "random", "full", "border", "pixel", "empty")

Array = np.ndarray[Any, Any]

# Outline of the cat's head in "chelsea", (x, y) as fractions of the photograph.
_CAT = (
    *((0.18, 0.05), (0.27, 0.02), (0.36, 0.20), (0.45, 0.24), (0.55, 0.21), (0.66, 0.06), (0.73, 0.05), (0.76, 0.30)),
    *((0.80, 0.48), (0.78, 0.66), (0.70, 0.80), (0.62, 0.93), (0.52, 0.96), (0.40, 0.94), (0.30, 0.85), (0.22, 0.70)),
    *((0.17, 0.50), (0.18, 0.28)),
)


def photo(name: str, size: tuple[int, int] | None = None) -> Array:
    """One of `PHOTOS`, uint8 [H, W, 3]; resized to `size` (height, width) if given.

    Raises:
        ValueError: there is no such photograph.
        ImportError: scikit-image or scikit-learn is not installed.
    """
    if name not in PHOTOS:
        raise ValueError(f"name must be one of {', '.join(PHOTOS)}, got {name!r}")
    image = _photo(name)
    if size is None:
        return image.copy()
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS))


@lru_cache(maxsize=len(PHOTOS))
def _photo(name: str) -> Array:
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return np.asarray(load_sample_image(f"{name}.jpg"))
    from skimage import data

    return np.asarray(getattr(data, name)())


def mask(name: str, size: tuple[int, int]) -> Array:
    """One of `MASKS` or `ADVERSARIAL`, bool [H, W]; always the same, as far as Pillow draws "text" alike.

    Raises:
        ValueError: there is no such mask.
    """
    if name not in _DRAWN:
        raise ValueError(f"name must be one of {', '.join(_DRAWN)}, got {name!r}")
    return _DRAWN[name](*size)


def _grid(height: int, width: int) -> tuple[Array, Array]:
    """Pixel centres as fractions of the height and width, [H, 1] and [1, W]."""
    return (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None] + 0.5) / width


def _cat(height: int, width: int) -> Array:
    y, x = _grid(height, width)
    inside = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(_CAT, _CAT[1:] + _CAT[:1], strict=True):  # each edge to the right of a pixel
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _cup(height: int, width: int) -> Array:
    y, x = _grid(height, width)
    turned = math.radians(20)
    u, v = x - 0.43, y - 0.5
    along, across = u * math.cos(turned) + v * math.sin(turned), v * math.cos(turned) - u * math.sin(turned)
    body = (along / 0.33) ** 2 + (across / 0.38) ** 2 <= 1
    ring = np.hypot(x - 0.78, y - 0.5)
    return body | ((ring <= 0.17) & (ring >= 0.10))


def _text(height: int, width: int) -> Array:
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("L", (width, height))
    draw = ImageDraw.Draw(page)
    lines = ("exact on", "the true", "mask 0.25")
    for row, line in enumerate(lines):
        font = ImageFont.load_default(height / 4.5)
        wide = draw.textlength(line, font)
        font = ImageFont.load_default(height / 4.5 * min(1.0, 0.9 * width / wide))
        draw.text((0.05 * width, (0.06 + 0.31 * row) * height), line, fill=255, font=font)
    return np.asarray(page) > 127


def _blob(height: int, width: int) -> Array:
    from scipy.ndimage import gaussian_filter

    noise = np.random.Generator(np.random.Philox(7)).standard_normal((height, width))
    smooth = gaussian_filter(noise, min(height, width) / 24, mode="reflect")
    inside = np.zeros((height, width), bool)
    margin = max(1, min(height, width) // 32)
    inside[margin:-margin, margin:-margin] = True
    return (smooth > 0) & inside


def _framed(draw: Callable[[Array, Array, int, int], Array]) -> Callable[[int, int], Array]:
    """A mask of pixel indices y [H, 1], x [1, W], without the outermost pixels."""

    def framed(height: int, width: int) -> Array:
        y, x = np.arange(height)[:, None], np.arange(width)[None]
        inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
        return np.asarray(draw(y, x, height, width) & inside)

    return framed


def _spiral(y: Array, x: Array, height: int, width: int) -> Array:
    v, u = (y - height / 2) / height, (x - width / 2) / width
    turns = np.hypot(u, v) * 16 - np.arctan2(v, u) / (2 * math.pi)
    return (turns % 1 < 0.5) & (np.hypot(u, v) < 0.49)


def _random(y: Array, x: Array, height: int, width: int) -> Array:
    return np.random.Generator(np.random.Philox(11)).random((height, width)) < 0.7


def _pixel(height: int, width: int) -> Array:
    found = np.zeros((height, width), bool)
    found[height // 2, width // 2] = True
    return found


_DRAWN: dict[str, Callable[[int, int], Array]] = {
    "cat": _cat,
    "cup": _cup,
    "text": _text,
    "blob": _blob,
    # Teeth of two pixels on a bar; a band that winds to the middle; holes of one pixel; walls of one pixel.
    "comb": _framed(lambda y, x, h, w: (x % 4 < 2) | (y < h // 8)),
    "spiral": _framed(_spiral),
    "pinholes": _framed(lambda y, x, h, w: (y % 7 != 3) | (x % 5 != 2)),
    "walls": _framed(lambda y, x, h, w: (x % 9 != 4) | (y % 16 == 8)),
    "random": _framed(_random),
    # These reach the border of the object, and of the background when it lies there.
    "full": lambda h, w: np.ones((h, w), bool),
    "border": lambda h, w: np.broadcast_to(np.arange(w)[None] < w // 2, (h, w)).copy(),
    "pixel": _pixel,
    "empty": lambda h, w: np.zeros((h, w), bool),
}
