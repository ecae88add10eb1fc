"""Poisson blending and the random walker by their definitions: the system as a dense matrix, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

GUIDANCES = ("import", "mixed", "average")
_TIE = 4e-6  # as in csrc/blend/poisson_math.h


def poisson_blend(
    background: Tensor,  # [B, C, H, W], or [B, H, W, C] if channels_last
    pixels: Tensor,  # [P * C]
    mask: Tensor,  # [P]
    table: Tensor,  # [N, 6] image, y, x, h, w, first pixel
    guidance: str = "import",
    soft: bool = False,
    channels_last: bool = False,
) -> Tensor:
    """The images with the objects blended in, in the order of the table; floating values up to 1."""
    images = list(background.movedim(-1, 1) if channels_last else background)
    channels = background.size(-1 if channels_last else 1)
    for image, y, x, h, w, first in table.tolist():
        flat = pixels[first * channels : (first + h * w) * channels]
        fg = flat.view(h, w, channels).movedim(-1, 0) if channels_last else flat.view(channels, h, w)
        images[image] = _blend(images[image], fg, mask[first : first + h * w].view(h, w), y, x, guidance, soft)
    out = torch.stack(images) if images else background.clone()
    return out.movedim(1, -1).contiguous() if channels_last else out


def _blend(bg: Tensor, fg: Tensor, mask: Tensor, y: int, x: int, guidance: str, soft: bool) -> Tensor:
    height, width = bg.shape[1:]
    h, w = mask.shape
    inside = torch.zeros(height, width, dtype=torch.bool, device=bg.device)
    domain = mask > 0 if soft else mask >= 0.5
    rows = [i for i in range(h) if 0 <= y + i < height]
    columns = [j for j in range(w) if 0 <= x + j < width]
    if not rows or not columns:
        return bg
    part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    box = (slice(y + rows[0], y + rows[-1] + 1), slice(x + columns[0], x + columns[-1] + 1))
    inside[box] = domain[part]
    count = int(inside.sum())
    if count == 0:
        return bg
    # The object over the whole image: beyond its rectangle it goes on as its nearest pixel, and its weight is 0.
    i = (torch.arange(height, device=bg.device) - y).clamp(0, h - 1)
    j = (torch.arange(width, device=bg.device) - x).clamp(0, w - 1)
    spread = fg[:, i][:, :, j]
    covered = torch.zeros_like(inside)
    covered[box] = True
    weight = torch.where(covered, mask[i][:, j], torch.zeros_like(bg[0]))
    number = torch.full((height, width), -1, device=bg.device)
    number[inside] = torch.arange(count, device=bg.device)

    matrix, right_side, closed = bg.new_zeros(count, count), torch.zeros_like(bg), True
    for step in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        used = inside & (_neighbour(torch.ones_like(bg[0]), step, beyond=0) > 0)
        other = _neighbour(number, step)
        free = used & (other >= 0)
        matrix[number[used], number[used]] += 1
        matrix[number[free], other[free]] -= 1
        closed = closed and bool((free == used).all())
        fg_difference, bg_difference = spread - _neighbour(spread, step), bg - _neighbour(bg, step)
        v = _guidance(guidance, fg_difference, bg_difference)
        if soft:
            share = (weight + _neighbour(weight, step)) / 2
            v = share * v + (1 - share) * bg_difference
        right_side = right_side + v + torch.where(used & ~free, _neighbour(bg, step), torch.zeros_like(bg))
    b = right_side[:, inside]
    if closed:  # the mean, which is left open, is the object's
        solved = torch.linalg.solve(matrix + 1.0 / count, (b - b.mean(1, keepdim=True)).T).T
        solved = solved + spread.mean((1, 2))[:, None]
    else:
        solved = torch.linalg.solve(matrix, b.T).T
    return torch.where(inside, torch.zeros_like(bg).masked_scatter(inside.expand_as(bg), solved), bg)


def _neighbour(t: Tensor, step: tuple[int, int], beyond: int | None = None) -> Tensor:  # [..., H, W]
    """The value `step` (down, right) further; beyond the image that of the pixel itself, or `beyond`."""
    height, width = t.shape[-2:]
    rows = torch.arange(height, device=t.device) + step[0]
    columns = torch.arange(width, device=t.device) + step[1]
    found = t[..., rows.clamp(0, height - 1), :][..., columns.clamp(0, width - 1)]
    if beyond is None:
        return found
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    return torch.where(inside, found, torch.full_like(found, beyond))


def _guidance(guidance: str, fg: Tensor, bg: Tensor) -> Tensor:
    if guidance == "mixed":
        return torch.where(bg.abs() > fg.abs() + _TIE, bg, fg)
    return (fg + bg) / 2 if guidance == "average" else fg


def random_walker(east: Tensor, south: Tensor, seeds: Tensor, labels: int) -> Tensor:  # [H, W] each -> [labels, H, W]
    """Probabilities that a walker reaches a seed of each label first; edges have the weights `east` and `south`."""
    height, width = seeds.shape
    number = torch.arange(height * width, device=seeds.device).view(height, width)
    laplacian = east.new_zeros(height * width, height * width)
    for p, q, weight in (
        (number[:, :-1], number[:, 1:], east[:, :-1]),
        (number[:-1], number[1:], south[:-1]),
    ):
        for a, b in ((p, q), (q, p)):
            laplacian = laplacian.index_put((a, a), weight, accumulate=True).index_put((a, b), -weight, accumulate=True)
    given = seeds.reshape(-1) > 0
    one_hot = (seeds.reshape(-1, 1) == torch.arange(1, labels + 1, device=seeds.device)).to(east.dtype)
    found = one_hot.clone()
    found[~given] = torch.linalg.solve(laplacian[~given][:, ~given], -laplacian[~given][:, given] @ one_hot[given])
    return found.T.reshape(labels, height, width)
