"""The last stage of SynthText: text that is drawn already comes onto an image.

A. Gupta, A. Vedaldi, A. Zisserman, Synthetic Data for Text Localisation in Natural Images, CVPR 2016, arXiv:1604.06646,
by the released code. `TextPainter` does the whole of it in its own way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastnuggets import ops
from fastnuggets.scenes.blending import on_zeros, spread
from fastnuggets.scenes.cutouts import bounding_box
from fastnuggets.scenes.images import opencv

PAD = 20  # pixels around the text where the image may change
STRONGER = 1.5
LEAST = 0.35  # share of the text's differences that must win against the image's


def paste_text(
    background: np.ndarray,
    text: np.ndarray,
    mask: np.ndarray,
    at: Sequence[int],
    *,
    height: float,
    seed: int | np.random.Generator = 0,
) -> np.ndarray:
    """Text blended into an image, [H, W, 3] uint8.

    The mask is feathered by the height of the characters (not up to 15 pixels, 3 x 3 up to 30, else 5 x 5) and made
    0.72 to 1 times as strong, the text laid over the image's mean colour there, and the larger of the two's differences
    taken for Poisson's equation on the text's rectangle and 20 pixels around it. Where 35 % or less of the text's
    differences win, they are taken 1.5 times; where that does not help either, added to the image's.

    Args:
        background: [H, W, 3] uint8; not written to.
        text: [h, w, 3] uint8, the colour of each pixel of the text, its border and shadow included.
        mask: [h, w] uint8, 0..255.
        at: row and column where the text begins; it may lie partly outside.
        height: of the lowest character, in pixels.
        seed: of the draws, or a generator.

    Pixels beyond 20 around the text keep their bits; an empty text changes nothing. Solved to a quarter of a grey level
    and rounded, where the code truncates. ValueError if shapes do not fit.
    """
    if text.shape != (*mask.shape, 3):
        raise ValueError(f"text and mask must be [h, w, 3] and [h, w], got {list(text.shape)} and {list(mask.shape)}")
    rng = np.random.default_rng(seed)
    alpha = on_zeros(mask, background.shape, at)
    box = bounding_box(alpha)
    result = background.copy()
    if box is None:
        return result
    y, x, h, w = box
    window = np.s_[max(0, y - PAD) : y + h + PAD, max(0, x - PAD) : x + w + PAD]
    under = background[window].astype(np.float32)
    around = under.mean((0, 1))
    soft = feathered(alpha[window].astype(np.float32) / 255, height, rng) * np.clip(rng.normal(0.88, 0.1), 0.72, 1)
    layer = around + soft[..., None] * (spread(text, background.shape, at)[window] - around)
    result[window] = np.rint(np.clip(_blended(under, layer, around), 0, 255)).astype(np.uint8)
    return result


def feathered(mask: np.ndarray, height: float, rng: np.random.Generator) -> np.ndarray:
    """A mask [h, w] blurred as its characters are high."""
    if height <= 15:
        return mask
    size, least, mean, deviation = (3, 0.3, 0.5, 0.1) if height <= 30 else (5, 0.5, 1.5, 0.5)
    return np.asarray(opencv().GaussianBlur(mask, (size, size), max(least, rng.normal(mean, deviation))))


def _blended(under: np.ndarray, layer: np.ndarray, around: np.ndarray) -> np.ndarray:
    """[h, w, 3] levels: Poisson's equation on all but the outermost pixels."""
    stronger = around + STRONGER * (layer - around)
    if _share(under, layer) > LEAST:
        front, guidance = layer, "mixed"
    elif _share(under, stronger) > LEAST:
        front, guidance = stronger, "mixed"
    else:
        front, guidance = stronger + under, "import"  # the differences of a sum are the sum of the differences
    inner = np.zeros(under.shape[:2], np.float32)
    inner[1:-1, 1:-1] = 1
    images = [torch.from_numpy(np.ascontiguousarray(image, np.float32) / 255) for image in (under, front)]
    made = ops.poisson_blend(images[0], [images[1]], [torch.from_numpy(inner)], guidance=guidance, channels_last=True)
    return 255 * made.numpy()


def _share(under: np.ndarray, layer: np.ndarray) -> float:
    """Least share of the text's differences that are not smaller than the image's, over both axes and the channels."""
    shares = []
    for axis in (0, 1):
        wanted, other = np.abs(np.diff(layer, axis=axis)), np.abs(np.diff(under, axis=axis))
        given = wanted > 1e-3  # rounding aside
        wins = (given & (wanted >= other)).sum((0, 1))
        shares.append(wins / (given.sum((0, 1)) + 1e-6))
    return float(np.min(shares))
