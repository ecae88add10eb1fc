"""Compositing by its definition: each object's colours and alpha on its box, then one formula, in plain PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Span = tuple[int, int, int, int]  # first row and column, and the ends


def composite(
    background: Tensor,  # [B, C, H, W] floating, or uint8
    images: Sequence[Tensor],  # N of [C, h, w]
    masks: Sequence[Tensor],  # N of [h, w]
    ptr: Sequence[int],
    *,
    place: Tensor | None = None,  # [N, 2] int64
    matrix: Tensor | None = None,  # [N, 3, 3]
    difference: bool = False,
    premultiplied: bool = False,
    nearest: bool = False,
    taps: Sequence[float] = (),
    zero_edge: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, numbers of the topmost objects [B, H, W] and their areas [N], as `fastnuggets.ops.composite`.

    `taps` are those of a symmetric blur, from the middle outwards. uint8 is rounded after each object.
    """
    byte = background.dtype == torch.uint8
    canvas = list((background.double() if byte else background).unbind(0))
    height, width = background.shape[2:]
    ids = torch.full((len(canvas), height, width), -1, dtype=torch.int32, device=background.device)
    area = torch.zeros(len(images), dtype=torch.int64, device=background.device)
    for b, (start, end) in enumerate(itertools.pairwise(ptr)):
        for n in range(start, end):
            colours, mask = (images[n].double(), masks[n].double() / 255) if byte else (images[n], masks[n])
            box = _box(mask, place[n] if matrix is None else matrix[n], (height, width))  # type: ignore[index]
            grow = len(taps) - 1 if taps and zero_edge else 0
            box = (box[0] - grow, box[1] - grow, box[2] + grow, box[3] + grow)
            y0, x0, y1, x1 = max(box[0], 0), max(box[1], 0), min(box[2], height), min(box[3], width)
            if mask.numel() == 0 or y0 >= y1 or x0 >= x1:
                continue
            where = _positions(box, place[n] if matrix is None else matrix[n])  # type: ignore[index]
            crop = slice(y0 - box[0], y1 - box[0]), slice(x0 - box[1], x1 - box[1])
            hard = _sampled(mask[None], *where, nearest or matrix is None, clamped=False)[0]
            alpha = _blurred(hard, taps, zero_edge)[crop] if taps else hard[crop]
            top = _sampled(colours, *where, nearest or matrix is None, clamped=not premultiplied)[:, crop[0], crop[1]]
            under = canvas[b][:, y0:y1, x0:x1]
            mixed = _mixed(top, alpha, under, difference, premultiplied)
            canvas[b] = canvas[b].clone()
            canvas[b][:, y0:y1, x0:x1] = (mixed + 0.5).floor().clamp(0, 255) if byte else mixed
            inside = hard[crop] >= 0.5
            ids[b, y0:y1, x0:x1][inside] = n
            area[n] = inside.sum()
    image = torch.stack(canvas) if canvas else background
    return image.to(background.dtype), ids, area


def _mixed(top: Tensor, alpha: Tensor, under: Tensor, difference: bool, premultiplied: bool) -> Tensor:
    if premultiplied:
        return ((top - alpha * under).abs() if difference else top) + (1 - alpha) * under
    return alpha * ((top - under).abs() if difference else top) + (1 - alpha) * under


def _box(mask: Tensor, where: Tensor, image: tuple[int, int]) -> Span:
    """The pixels of the image strictly inside what the object's outline, a pixel beyond its centres, becomes."""
    h, w = mask.shape
    if where.dim() == 1:
        y, x = where.tolist()
        return y, x, y + h, x + w
    corners = torch.tensor([[x, y, 1.0] for x in (-1.0, w) for y in (-1.0, h)], dtype=torch.float64)
    x, y, depth = (corners @ where.detach().double().cpu().T).unbind(1)
    if not bool(depth.min() > 1e-9):
        return 0, 0, *image
    x, y = x / depth, y / depth
    first = (math.floor(v.min().item() + 1e-6) + 1 for v in (y, x))
    end = (math.ceil(v.max().item() - 1e-6) for v in (y, x))
    return *first, *end  # type: ignore[return-value]


def _positions(box: Span, where: Tensor) -> tuple[Tensor, Tensor]:
    """The object's row and column under each pixel of the box; behind the horizon there is nothing."""
    rows = torch.arange(box[0], box[2], device=where.device, dtype=torch.float64)
    columns = torch.arange(box[1], box[3], device=where.device, dtype=torch.float64)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    if where.dim() == 1:
        return y - where[0], x - where[1]
    from_image = torch.linalg.inv(where.double())
    x, y, depth = (torch.stack([x, y, torch.ones_like(x)], -1) @ from_image.T).unbind(-1)
    ahead = depth > 0
    safe = torch.where(ahead, depth, 1)
    return torch.where(ahead, y / safe, -9.0), torch.where(ahead, x / safe, -9.0)


def _sampled(values: Tensor, y: Tensor, x: Tensor, nearest: bool, *, clamped: bool) -> Tensor:
    """[C, h, w] at positions, by the nearest pixel or between four; beyond the edge 0, or clamped to it."""
    h, w = values.shape[1:]
    if nearest:
        y, x = (y + 0.5).floor(), (x + 0.5).floor()
    total = torch.zeros_like(values[:, :1, :1])
    for dy, dx in itertools.product((0, 1), (0, 1)):
        i, j = y.detach().floor().long() + dy, x.detach().floor().long() + dx
        share = (1 - (y - i).abs()) * (1 - (x - j).abs())
        inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
        counts = share if clamped else torch.where(inside, share, 0)
        total = total + counts.to(values.dtype) * values[:, i.clamp(0, h - 1), j.clamp(0, w - 1)]
    return total


def _blurred(mask: Tensor, taps: Sequence[float], zero_edge: bool) -> Tensor:
    rows, columns = (_blur_matrix(n, taps, zero_edge).to(mask) for n in mask.shape)
    return rows @ mask @ columns.T


def _blur_matrix(n: int, taps: Sequence[float], zero_edge: bool) -> Tensor:
    """[n, n] float64; beyond its ends a row is 0, or mirrored without repeating the end."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for offset in range(1 - len(taps), len(taps)):
            j = i + offset
            while not zero_edge and not 0 <= j < n:
                j = 0 if n == 1 else -j if j < 0 else 2 * (n - 1) - j
            if 0 <= j < n:
                matrix[i, j] += taps[abs(offset)]
    return matrix
