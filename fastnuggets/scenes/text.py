"""Text on the plain, flat parts of photographs, with a mask and a quadrilateral for every character and word."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastnuggets import ops
from fastnuggets.molecules.files import need
from fastnuggets.scenes.geometry import Camera, transform
from fastnuggets.scenes.surfaces import Face, faces, segment

Array = np.ndarray[Any, Any]

BLENDS = ("poisson", "alpha")
FINENESS = 2  # glyphs are drawn this many times larger than they will be
MARGIN, FEATHER = 3, 2  # pixels around what is drawn that may change, and by which it is blurred at most
LEAST_CHARACTER, ASPECT_CHANGES = 8.0, (0.4, 2.5)  # height in pixels; how the plane may change height over width
TRIALS, SHRINK = 12, 0.8  # to find a place, first with fewer words and then with smaller ones
LARGEST = 0.6  # a font's size over the free part of a face, the lesser of its median width and height
COLOURS = 32  # that are drawn before black or white is taken
FADING = 1.5  # a colour's contrast is chosen so much larger than what must be left of it
LEAST_SURVIVAL, SURVIVED = 0.35, 0.5  # share of the text's gradients of which so much is left
STRONGER = 1.5
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


class PaintedText(NamedTuple):
    """An image with N words of M characters. Coordinates are (x, y) pixels, their centres at integers."""

    image: Array  # [H, W, 3] uint8
    mask: Array  # [H, W] uint8: opacity of the letters, 0..255, without their borders and shadows
    ids: Array  # [H, W] int32: number of the word where at least half of the pixel is its letters, else -1
    domain: Array  # [H, W] bool: the only pixels that may have changed
    words: list[str]
    word_quads: Array  # [N, 4, 2] float32: clockwise from the top left of the first character
    characters: list[str]
    character_quads: Array  # [M, 4, 2] float32: around the ink
    character_word: Array  # [M] int64
    contrast: Array  # [N] float32: of a word with what is around it in the result, WCAG 2's ratio, 1..21


class TextPainter:
    """Writes words onto regions of even texture, in their plane if there is depth.

    The image is cut into regions (Felzenszwalb); those that are large, full and plain enough are kept, their plane is
    fitted, and seen face to face they get blocks of text where nothing is written yet. A block is blended by Poisson's
    equation with mixed gradients; if too few of its gradients or too little of its contrast are left, with gradients
    1.5 times as strong; then with the sum of both gradients; then by its opacity alone. What cannot be seen even then
    is not written.

    Args:
        words: what to write, in this order from a place drawn by lot; a string is split at white space.
        fonts: font files that FreeType reads; none: Pillow's own font. Characters stand side by side from left to
            right, kerned by pairs; scripts that join them are not shaped. Words of which a font lacks a character are
            passed over.
        height: least and largest size of a font, in pixels of the plane seen face to face.
        regions: that are written on in one image, at most.
        reuse: blocks on one region, at most.
        lines: in a block, at most.
        blend: "poisson", or "alpha" for the opacity alone.
        contrast: of a word with its surroundings in the result, at least; WCAG 2's ratio, 1 to 3.
        texture: mean difference between neighbouring pixels of a region, in grey levels, at most.
        border, shadow: how often a block has one, 0 to 1.

    Raises:
        ValueError: an argument is out of its range.

    Steps and constants follow A. Gupta, A. Vedaldi, A. Zisserman, Synthetic Data for Text Localisation in Natural
    Images, CVPR 2016, arXiv:1604.06646, and its code; regions and colours are found without its data, the lines are
    straight, and Poisson's equation is solved on the surroundings of the letters, not on a rectangle.
    """

    def __init__(
        self,
        words: str | Sequence[str],
        *,
        fonts: Sequence[str | os.PathLike[str]] = (),
        height: tuple[float, float] = (16.0, 120.0),
        regions: int = 7,
        reuse: int = 5,
        lines: int = 3,
        blend: str = "poisson",
        contrast: float = 2.0,
        texture: float = 8.0,
        border: float = 0.15,
        shadow: float = 0.15,
    ) -> None:
        self.words = words.split() if isinstance(words, str) else ["".join(word.split()) for word in words]
        if not any(self.words):
            raise ValueError("words: expected at least one")
        if not 1 <= height[0] <= height[1] < math.inf:
            raise ValueError(f"height: expected least and largest size, 1 or more, got {height}")
        if blend not in BLENDS:
            raise ValueError(f"blend must be one of {', '.join(BLENDS)}, got {blend!r}")
        # Black or white has 4.58 with any colour, which leaves 3 for what fades.
        if not 1 <= contrast <= 3:
            raise ValueError(f"contrast: expected 1 to 3, got {contrast}")
        for name, value in (("regions", regions), ("reuse", reuse), ("lines", lines)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        for name, chance in (("border", border), ("shadow", shadow)):
            if not 0 <= chance <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {chance}")
        self.fonts = [os.fspath(font) for font in fonts]
        self.height, self.regions, self.reuse, self.lines = height, regions, reuse, lines
        self.blend, self.contrast, self.texture, self.border, self.shadow = blend, contrast, texture, border, shadow

    def __call__(
        self,
        image: Array,
        *,
        depth: Tensor | Array | None = None,
        camera: Camera | None = None,
        disparity: bool = False,
        labels: Array | None = None,
        seed: int | Sequence[int] = 0,
    ) -> PaintedText:
        """One image with text.

        Args:
            image: [H, W, 3] uint8; left as it is.
            depth: [H, W] along z, or with `disparity` inverse depth up to a factor; NaN and 0 where unknown. None:
                every region is seen face to face.
            camera: of the depth; None: one that sees 60 degrees.
            labels: [H, W] integers, regions instead of Felzenszwalb's; negative for none.
            seed: one number or several; the same seed gives the same bytes.

        Returns:
            PaintedText, of no words where there is no place for any.

        Raises:
            ValueError, TypeError: an argument is of another shape or kind.
        """
        image = np.asarray(image)
        if image.dtype != np.uint8:
            raise TypeError(f"image: expected uint8, got {image.dtype}")
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image: expected [H, W, 3] of at least one pixel, got {image.shape}")
        for name, value in (("depth", depth), ("labels", labels)):
            if value is not None and tuple(value.shape) != image.shape[:2]:
                raise ValueError(f"{name}: expected {image.shape[:2]}, got {tuple(value.shape)}")
        rng = np.random.default_rng(seed)
        regions = segment(image) if labels is None else np.asarray(labels).astype(np.int64)
        found = faces(
            image, regions, depth=depth, camera=camera, disparity=disparity, texture=self.texture,
            seed=int(rng.integers(2**31)),
        )  # fmt: skip
        page = _Page(image)
        for chosen in rng.permutation(len(found))[: _how_many(rng, min(self.regions, len(found)))]:
            for _ in range(rng.integers(1, self.reuse + 1)):
                if not self._write(page, found[chosen], rng):
                    break
        return page.result()

    def _write(self, page: _Page, face: Face, rng: np.random.Generator) -> bool:
        """One block of text; whether there was a place where it can be read."""
        free = face.seen(face.mask & ~page.taken)
        style = self._style(face, free, rng)
        lines = [int(rng.integers(1, 4)) for _ in range(rng.integers(1, self.lines + 1))]  # words in each
        start = int(rng.integers(len(self.words)))
        size = style.size
        for _ in range(TRIALS):
            if size < self.height[0]:
                return False
            block = _block(self.words, start, lines, style.font, round(size * FINENESS), style.align)
            if block is None:
                return False
            at = _place(free, block.ink.shape, style.reach, rng)
            drawn = None if at is None else _Drawn.of(block, face, at, page.image.shape[:2], style.reach)
            if drawn is not None:
                return self._blend(page, drawn, face, style, rng)
            if sum(lines) > 1:
                lines = lines[:-1] if len(lines) > 1 else [lines[0] - 1]
            else:
                size *= SHRINK
        return False

    def _style(self, face: Face, free: Array, rng: np.random.Generator) -> _Style:
        low, high = self.height
        widths, heights = free.sum(1), free.sum(0)
        room = (
            min(
                np.median(
                    widths[widths > 0],
                ),
                np.median(heights[heights > 0]),
            )
            if free.any()
            else 0
        )
        high = min(high, max(low, LARGEST * room))
        spread = rng.beta(2, 2) if rng.random() < 0.9 else rng.random()
        size = low + (high - low) * spread
        opacity = float(np.clip(rng.normal(0.88, 0.1), 0.72, 1))
        around = face.colour / 255
        colour = _colour(rng, around, opacity, FADING * self.contrast)
        border, shadow = None, None
        if rng.random() < self.border:
            border = _Border(_colour(rng, colour, 1.0, FADING * self.contrast), 1 if size <= 30 else 2)
        if rng.random() < self.shadow:
            offset = rng.normal(*((2, 0) if size <= 15 else (7, 1) if size <= 30 else (15, 3)))
            angle = rng.uniform(0, 2 * math.pi)
            offset = min(max(offset, 1.0), 0.2 * size)  # else it comes apart from its letters
            shift = (round(offset * math.sin(angle)), round(offset * math.cos(angle)))
            shadow = _Shadow(shift, float(np.clip(rng.normal(0.5, 0.1), 0, 1)))
        font = str(rng.choice(self.fonts)) if self.fonts else ""
        return _Style(font, size, str(rng.choice(["left", "center"])), colour, opacity, border, shadow)

    def _blend(self, page: _Page, drawn: _Drawn, face: Face, style: _Style, rng: np.random.Generator) -> bool:
        around = face.colour / 255
        opacity = drawn.feathered(rng) * style.opacity
        domain = _domain(drawn, opacity, style)
        window = drawn.window
        if (domain & page.taken[window]).any():
            return False
        under = page.image[window]
        for result in self._attempts(under / 255, drawn, opacity, domain, around, style):
            levels = np.where(domain[..., None], np.rint(255 * result.clip(0, 1)), under).astype(np.uint8)
            contrast = drawn.contrast(levels, domain & (opacity < 0.02))
            if contrast.min() >= self.contrast:
                page.add(drawn, opacity, domain, levels, contrast)
                return True
        return False

    def _attempts(
        self, under: Array, drawn: _Drawn, opacity: Array, domain: Array, around: Array, style: _Style
    ) -> Iterator[Array]:
        """[h, w, 3] of levels 0..1, the one to be preferred first."""
        if self.blend == "poisson":
            layer = _painted(np.broadcast_to(around, under.shape), drawn, opacity, style)
            stronger = around + STRONGER * (layer - around)
            for front, guidance in ((layer, "mixed"), (stronger, "mixed"), (layer + under, "import")):
                result = _poisson(under, front, domain, guidance)
                if _survival(layer, result) >= LEAST_SURVIVAL:
                    yield result
        yield _painted(under, drawn, opacity, style)


class _Border(NamedTuple):
    colour: Array
    radius: int


class _Shadow(NamedTuple):
    shift: tuple[int, int]  # y, x
    opacity: float


class _Style(NamedTuple):
    font: str
    size: float
    align: str
    colour: Array  # [3], 0..1
    opacity: float
    border: _Border | None
    shadow: _Shadow | None

    @property
    def reach(self) -> int:
        """Pixels around the letters that may change: feather, border or shadow, and the margin."""
        return FEATHER + (self.border.radius if self.border else 0) + max(self._shift) + MARGIN

    @property
    def _shift(self) -> tuple[int, int]:
        return (abs(self.shadow.shift[0]), abs(self.shadow.shift[1])) if self.shadow else (0, 0)


class _Block(NamedTuple):
    """Lines of text, drawn `FINENESS` times as large as they will be."""

    ink: Array  # [h, w] uint8
    label: Array  # [h, w] int32: the word whose box it is, else -1
    words: list[str]
    characters: list[str]
    boxes: Array  # [M, 4] int64: left, top, right, bottom of the characters' ink; the latter two exclusive
    word: Array  # [M] int64


def _block(words: Sequence[str], start: int, lines: Sequence[int], font: str, size: int, align: str) -> _Block | None:
    """Words from number `start` on, so many in each line; None if the font has letters for none of them."""
    drawable = [word for word in words if _drawable(word, font)]
    if not drawable:
        return None
    start += len(drawable) - len(words) if start >= len(drawable) else 0
    chosen = [drawable[(start + i) % len(drawable)] for i in range(sum(lines))]
    pitch = _pitch(font, size)
    space = _advance(font, size, " ")
    glyphs: list[tuple[int, int, Array, int]] = []  # x, y, ink, word
    rows: list[tuple[int, float]] = []  # first glyph and width of each line
    word = 0
    for line, count in enumerate(lines):
        pen, first = 0.0, len(glyphs)
        for _ in range(count):
            text = chosen[word]
            for i, character in enumerate(text):
                ink, x, y = _glyph(font, size, character)
                glyphs.append((round(pen) + x, line * pitch + y, ink, word))
                pen += _advance(font, size, character, text[i + 1 : i + 2])
            pen += space
            word += 1
        rows.append((first, pen - space))
    return _set(glyphs, rows, align, chosen)


def _set(
    glyphs: list[tuple[int, int, Array, int]], rows: list[tuple[int, float]], align: str, words: list[str]
) -> _Block:
    """Puts the lines below one another, aligned."""
    widest = max(width for _, width in rows)
    ends = [first for first, _ in rows[1:]] + [len(glyphs)]
    left = np.concatenate(
        [
            np.full(end - first, round((widest - width) / 2) if align == "center" else 0)
            for (first, width), end in zip(rows, ends, strict=True)
        ]
    )
    boxes = np.array(
        [(x + dx, y, x + dx + g.shape[1], y + g.shape[0]) for (x, y, g, _), dx in zip(glyphs, left, strict=True)]
    )
    boxes -= np.tile(boxes[:, :2].min(0), 2)
    word = np.array([glyph[3] for glyph in glyphs])
    width, height = boxes[:, 2:].max(0)
    ink = np.zeros((height, width), np.uint8)
    label = np.full((height, width), -1, np.int32)
    for (_, _, glyph, _), (x0, y0, x1, y1) in zip(glyphs, boxes, strict=True):
        ink[y0:y1, x0:x1] = np.maximum(ink[y0:y1, x0:x1], glyph)
    for number in range(len(words)):
        x0, y0, x1, y1 = _around(boxes[word == number])
        label[y0:y1, x0:x1] = number
    return _Block(ink, label, words, list("".join(words)), boxes, word)


def _around(boxes: Array) -> Array:
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])


@lru_cache(maxsize=256)
def _font(path: str, size: int) -> Any:
    fonts = need("PIL.ImageFont", "scenes")
    return fonts.truetype(path, size) if path else fonts.load_default(size)


@lru_cache(maxsize=4096)
def _glyph(font: str, size: int, character: str) -> tuple[Array, int, int]:
    """The ink of one character, uint8 [h, w], and where it begins from the pen, x and y; y is 0 on the baseline."""
    images, draws = need("PIL.Image", "scenes"), need("PIL.ImageDraw", "scenes")
    x0, y0, x1, y1 = (round(v) for v in _font(font, size).getbbox(character, anchor="ls"))
    sheet = images.new("L", (max(1, x1 - x0 + 2), max(1, y1 - y0 + 2)))
    draws.Draw(sheet).text((1 - x0, 1 - y0), character, fill=255, font=_font(font, size), anchor="ls")
    ink = np.asarray(sheet)
    rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
    if len(rows) == 0:
        return np.zeros((0, 0), np.uint8), 0, 0
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
    return ink, int(columns[0]) + x0 - 1, int(rows[0]) + y0 - 1


@lru_cache(maxsize=16384)
def _advance(font: str, size: int, character: str, following: str = "") -> float:
    made = _font(font, size)
    return float(made.getlength(character + following) - (made.getlength(following) if following else 0))


def _pitch(font: str, size: int) -> int:
    """From baseline to baseline."""
    ascent, descent = _font(font, size).getmetrics()
    return round(1.1 * (ascent + descent))


@lru_cache(maxsize=16384)
def _drawable(word: str, font: str) -> bool:
    """Whether the font has ink of its own for every character."""
    size = 32
    missing = _glyph(font, size, "\U0010ffff")[0]
    inks = [_glyph(font, size, character)[0] for character in word]
    return bool(word) and all(ink.size and not np.array_equal(ink, missing) for ink in inks)


def _place(free: Array, shape: tuple[int, ...], reach: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """Top left (y, x) in a view of where a block of `shape` lies with its reach on free pixels alone; by lot."""
    cv2 = need("cv2", "scenes")
    h, w = (math.ceil(n / FINENESS) + 2 * reach for n in shape)
    if h > free.shape[0] or w > free.shape[1]:
        return None
    blocked = cv2.integral((~free).astype(np.uint8))
    count = blocked[h:, w:] - blocked[:-h, w:] - blocked[h:, :-w] + blocked[:-h, :-w]
    good = np.flatnonzero(count == 0)
    if len(good) == 0:
        return None
    y, x = divmod(int(good[rng.integers(len(good))]), count.shape[1])
    return y + reach, x + reach


@dataclass(frozen=True)
class _Drawn:
    """A block as it lies in a window of the image."""

    block: _Block
    corner: tuple[int, int]  # y, x of the window
    ink: Array  # [h, w] float32, 0..1
    label: Array  # [h, w] int32
    quads: Array  # [M, 4, 2] float64, in the image
    word_quads: Array  # [N, 4, 2]

    @staticmethod
    def of(block: _Block, face: Face, at: tuple[int, int], size: tuple[int, int], reach: int) -> _Drawn | None:
        """None if a quadrilateral is not inside the image, or the letters are too small or too oblique."""
        cv2 = need("cv2", "scenes")
        fine, half = 1 / FINENESS, 0.5 / FINENESS - 0.5
        to_image = face.to_image @ np.array([[fine, 0, at[1] + half], [0, fine, at[0] + half], [0, 0, 1]])
        words = np.stack([_around(block.boxes[block.word == number]) for number in range(len(block.words))])
        quads, word_quads = (_quads(to_image, boxes) for boxes in (block.boxes, words))
        limit = np.array([size[1] - 1, size[0] - 1])
        if not ((word_quads >= 0) & (word_quads <= limit)).all():  # NaN included
            return None
        change = _height(word_quads) / _width(word_quads) * (words[:, 2] - words[:, 0]) / (words[:, 3] - words[:, 1])
        if np.median(_height(quads)) < LEAST_CHARACTER or not np.all(_between(change, ASPECT_CHANGES)):
            return None
        points = word_quads.reshape(-1, 2)
        low = np.maximum(np.floor(points.min(0)).astype(int) - reach - 1, 0)
        high = np.minimum(np.ceil(points.max(0)).astype(int) + reach + 1, limit) + 1
        shift = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1.0]])
        matrix, window = shift @ to_image, (int(high[0] - low[0]), int(high[1] - low[1]))
        ink = cv2.warpPerspective(block.ink.astype(np.float32) / 255, matrix, window, flags=cv2.INTER_LINEAR)
        # A pixel beside a word's box has ink of it too.
        grown = cv2.dilate(block.label.astype(np.float32), np.ones((2 * FINENESS + 1,) * 2, np.uint8))
        label = cv2.warpPerspective(grown, matrix, window, flags=cv2.INTER_NEAREST, borderValue=-1)
        return _Drawn(block, (int(low[1]), int(low[0])), ink, label.astype(np.int32), quads, word_quads)

    @property
    def window(self) -> tuple[slice, slice]:
        y, x = self.corner
        return slice(y, y + self.ink.shape[0]), slice(x, x + self.ink.shape[1])

    def feathered(self, rng: np.random.Generator) -> Array:
        """The ink, blurred a little, as sharp letters give a composed image away; large letters more."""
        cv2 = need("cv2", "scenes")
        height = float(np.median(_height(self.quads)))
        if height <= 15:
            return self.ink
        size, least, mean, spread = (3, 0.3, 0.5, 0.1) if height <= 30 else (5, 0.5, 1.5, 0.5)
        sigma = max(least, rng.normal(mean, spread))
        blurred = cv2.GaussianBlur(self.ink, (size, size), sigma, borderType=cv2.BORDER_CONSTANT)
        return np.asarray(blurred)

    def ids(self) -> Array:
        return np.where(self.ink >= 0.5, self.label, -1)

    def contrast(self, levels: Array, beside: Array) -> Array:
        """[N]: of each word's letters with what lies beside them; 0 for a word of no pixel."""
        cv2 = need("cv2", "scenes")
        light, ids = luminance(levels), self.ids()
        found = np.zeros(len(self.block.words), np.float32)
        for number in range(len(found)):
            own = ids == number
            near = cv2.dilate(own.astype(np.uint8), np.ones((2 * FEATHER + 2 * MARGIN + 1,) * 2, np.uint8)) > 0
            near &= beside
            if own.any() and near.any():
                found[number] = ratio(light[own].mean(), light[near].mean())
        return found


def _quads(matrix: Array, boxes: Array) -> Array:
    """Corners of boxes of whole pixels [n, 4], clockwise from the top left, mapped: [n, 4, 2]."""
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] - 0.5
    return transform(torch.from_numpy(matrix), torch.from_numpy(corners)).numpy()


def _height(quads: Array) -> Array:
    return np.linalg.norm(quads[:, [3, 2]] - quads[:, [0, 1]], axis=-1).mean(-1)


def _width(quads: Array) -> Array:
    return np.linalg.norm(quads[:, [1, 2]] - quads[:, [0, 3]], axis=-1).mean(-1)


def _between(values: Array, limits: tuple[float, float]) -> Array:
    return (values > limits[0]) & (values < limits[1])


class _Page:
    """An image as it is being written on."""

    def __init__(self, image: Array) -> None:
        self.image = image.copy()
        self.mask = np.zeros(image.shape[:2], np.uint8)
        self.ids = np.full(image.shape[:2], -1, np.int32)
        self.domain = np.zeros(image.shape[:2], bool)
        self.taken = np.zeros(image.shape[:2], bool)  # the domain, and what lies between the letters of a word
        self.drawn: list[tuple[_Drawn, Array]] = []

    def add(self, drawn: _Drawn, opacity: Array, domain: Array, levels: Array, contrast: Array) -> None:
        window = drawn.window
        self.image[window] = levels
        # Domains of two blocks are disjoint, and so are their masks.
        self.mask[window] = np.maximum(self.mask[window], np.rint(255 * opacity).astype(np.uint8))
        before = sum(len(one.block.words) for one, _ in self.drawn)
        ids = drawn.ids()
        self.ids[window] = np.where(ids >= 0, ids + before, self.ids[window])
        self.domain[window] |= domain
        self.taken[window] |= domain | (drawn.label >= 0)
        self.drawn.append((drawn, contrast))

    def result(self) -> PaintedText:
        words = [word for drawn, _ in self.drawn for word in drawn.block.words]
        characters = [character for drawn, _ in self.drawn for character in drawn.block.characters]
        number, before = [np.zeros(0, np.int64)], 0
        for drawn, _ in self.drawn:
            number.append(drawn.block.word + before)
            before += len(drawn.block.words)
        empty = np.zeros((0, 4, 2), np.float32)
        return PaintedText(
            self.image, self.mask, self.ids, self.domain, words,
            np.concatenate([empty, *(drawn.word_quads for drawn, _ in self.drawn)], dtype=np.float32), characters,
            np.concatenate([empty, *(drawn.quads for drawn, _ in self.drawn)], dtype=np.float32),
            np.concatenate(number), np.concatenate([np.zeros(0, np.float32), *(c for _, c in self.drawn)]),
        )  # fmt: skip


def _cover(drawn: _Drawn, opacity: Array, style: _Style) -> tuple[Array, Array]:
    """Opacity of the border and of the shadow, [h, w] each."""
    cv2 = need("cv2", "scenes")
    border = shadow = np.zeros_like(opacity)
    if style.border:
        border = cv2.dilate(opacity, np.ones((2 * style.border.radius + 1,) * 2, np.uint8))
    if style.shadow:
        (dy, dx), (height, width) = style.shadow.shift, opacity.shape
        move = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
        shadow = style.shadow.opacity * cv2.warpAffine(opacity, move, (width, height), flags=cv2.INTER_NEAREST)
    return border, shadow


def _domain(drawn: _Drawn, opacity: Array, style: _Style) -> Array:
    """Where something is painted, and the margin around it, bool [h, w]."""
    cv2 = need("cv2", "scenes")
    border, shadow = _cover(drawn, opacity, style)
    painted = ((opacity > 0) | (border > 0) | (shadow > 0)).astype(np.uint8)
    return np.asarray(cv2.dilate(painted, np.ones((2 * MARGIN + 1,) * 2, np.uint8))) > 0


def _painted(base: Array, drawn: _Drawn, opacity: Array, style: _Style) -> Array:
    """[h, w, 3], 0..1: shadow, border and letters over `base`."""
    border, shadow = _cover(drawn, opacity, style)
    result = base * (1 - shadow)[..., None]
    if style.border:
        result = result + border[..., None] * (style.border.colour - result)
    return np.asarray(result + opacity[..., None] * (style.colour - result))


def _poisson(under: Array, front: Array, domain: Array, guidance: str) -> Array:
    planes = [torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1), np.float32)) for x in (under, front)]
    mask = torch.from_numpy(domain.astype(np.float32))
    position = torch.zeros(1, 2, dtype=torch.int64)
    result = ops.poisson_blend(planes[0], [planes[1]], [mask], position=position, guidance=guidance)
    return result.numpy().transpose(1, 2, 0)


def _survival(layer: Array, result: Array) -> float:
    """Share of the text's gradients of which half is left, along x or along y, whichever has less."""
    shares = [1.0]
    for axis in (0, 1):
        wanted, got = np.diff(layer, axis=axis), np.diff(result, axis=axis)
        strong = np.abs(wanted) > 0.02
        if strong.any():
            shares.append(float((got * np.sign(wanted) >= SURVIVED * np.abs(wanted))[strong].mean()))
    return min(shares)


def luminance(levels: Array) -> Array:
    """Of sRGB levels [..., 3], 0..255, relative to white, as WCAG 2 defines it."""
    c = np.asarray(levels, np.float64) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ LUMINANCE


def ratio(one: Any, other: Any) -> Any:
    """Contrast of two luminances as WCAG 2 defines it, 1..21."""
    return (np.maximum(one, other) + 0.05) / (np.minimum(one, other) + 0.05)


def _colour(rng: np.random.Generator, around: Array, opacity: float, contrast: float) -> Array:
    """A colour [3] that is told from `around` when it is laid over it; black or white if none of those drawn is."""
    drawn = np.concatenate([rng.random((COLOURS, 3)), np.zeros((1, 3)), np.ones((1, 3))])
    ratios = ratio(luminance(255 * (around + opacity * (drawn - around))), luminance(255 * around))
    good = np.flatnonzero(ratios[:COLOURS] >= contrast)
    return drawn[good[0] if len(good) else COLOURS + int(ratios[-1] > ratios[-2])]


def _how_many(rng: np.random.Generator, most: int) -> int:
    """Regions to write on: mostly nearly all."""
    return math.ceil(most * (rng.beta(5, 1) if rng.random() < 0.9 else rng.random()))
