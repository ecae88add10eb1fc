"""A small detector of objects by their centres, after "Objects as Points" (Zhou et al., arXiv:1904.07850)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 4  # pixels to a cell of the maps, along each axis
SIZE_WEIGHT = 0.1  # of the sizes' error in the loss
PRIOR = 0.1  # what the heat map says before it has learned
PEAK_WIDTH = 6.0  # a box is so many deviations of its peak wide


class Detections(NamedTuple):
    """Boxes of one image, the surest first."""

    boxes: Tensor  # [n, 4] float, x0, y0, x1, y1 in pixels
    scores: Tensor  # [n] in 0 ... 1
    labels: Tensor  # [n] int64


class Targets(NamedTuple):
    """What the maps of B images should be; G boxes in all."""

    heat: Tensor  # [B, K, h, w], 1 at the cell of a centre
    places: Tensor  # [G, 3] int64, image, row and column of each box's cell
    values: Tensor  # [G, 4] offset in the cell (x, y), then width and height in cells


class CenterDetector(nn.Module):
    """Images -> a heat map of centres for each class, and each cell's offset and box size.

    Args:
        classes: K.
        channels: of the images.
        width: features of a cell; half as many at half resolution.
        blocks: residual blocks at a quarter of the resolution.

    Images are [B, channels, H, W] float in 0 ... 1, H and W multiples of 4. Deterministic; differentiable in all.
    """

    def __init__(self, classes: int, *, channels: int = 3, width: int = 48, blocks: int = 3) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes: expected at least 1, got {classes}")
        self.classes = classes
        self.stem = nn.Sequential(_conv(channels, width // 2, 2), _conv(width // 2, width, 2))
        # Dilated, so that a cell sees objects larger than itself at little cost.
        self.blocks = nn.ModuleList(_conv(width, width, 1, dilation=2**i) for i in range(blocks))
        self.heat, self.box = nn.Conv2d(width, classes, 1), nn.Conv2d(width, 4, 1)
        nn.init.constant_(self.heat.bias, torch.tensor(PRIOR).logit().item())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the heat map [B, K, H/4, W/4] and box numbers [B, 4, H/4, W/4] as in `Targets.values`."""
        if images.dim() != 4 or any(n % STRIDE or n == 0 for n in images.shape[2:]):
            raise ValueError(
                f"images: expected [B, C, H, W] with H and W multiples of {STRIDE}, got {tuple(images.shape)}"
            )
        x = self.stem(images - 0.5)
        for block in self.blocks:
            x = x + block(x)
        return self.heat(x), self.box(x)

    @torch.no_grad()
    def detect(self, images: Tensor, limit: int = 20) -> list[Detections]:
        """At most `limit` boxes of each image. Synchronises."""
        heat, box = self(images)
        return decode(heat.sigmoid(), box, limit)


def decode(heat: Tensor, box: Tensor, limit: int) -> list[Detections]:
    """Boxes at the local maxima of heat maps [B, K, h, w] in 0 ... 1, by box numbers [B, 4, h, w]."""
    peaks = heat * (heat == F.max_pool2d(heat, 3, 1, 1))
    scores, order = peaks.flatten(1).topk(min(limit, peaks[0].numel()))
    height, width = heat.shape[2:]
    cell = order % (height * width)
    numbers = box.flatten(2).gather(2, cell[:, None].expand(-1, 4, -1))
    x, y = cell % width + numbers[:, 0], cell // width + numbers[:, 1]
    half_width, half_height = (numbers[:, 2:].clamp_min(0) / 2).unbind(1)
    corners = torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], 2) * STRIDE
    return [Detections(*found) for found in zip(corners, scores, order // (height * width), strict=True)]


def _conv(inputs: int, outputs: int, stride: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def center_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor], classes: int, size: tuple[int, int]) -> Targets:
    """The maps for the boxes [n, 4] (x0, y0, x1, y1 in pixels) and labels [n] of each image of `size` (H, W)."""
    height, width = size[0] // STRIDE, size[1] // STRIDE
    heat = torch.zeros(len(boxes), classes, height, width)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    places, values = [], []
    for image, (own, kinds) in enumerate(zip(boxes, labels, strict=True)):
        for (x0, y0, x1, y1), kind in zip((own / STRIDE).tolist(), kinds.tolist(), strict=True):
            x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
            i, j = min(int(y), height - 1), min(int(x), width - 1)
            far = ((columns - j) * PEAK_WIDTH / max(w, 1.0)) ** 2 + ((rows - i) * PEAK_WIDTH / max(h, 1.0)) ** 2
            heat[image, kind] = torch.maximum(heat[image, kind], torch.exp(-far / 2))
            places.append((image, i, j))
            values.append((x - j, y - i, w, h))
    return Targets(heat, torch.tensor(places).view(-1, 3).long(), torch.tensor(values).view(-1, 4))


def center_loss(heat: Tensor, box: Tensor, targets: Targets) -> Tensor:
    """The penalty-reduced focal loss of the heat map and the mean absolute errors of the boxes, a scalar."""
    log_p, log_q = F.logsigmoid(heat), F.logsigmoid(-heat)
    p = heat.sigmoid()
    centre = targets.heat == 1
    here = centre * (1 - p).square() * log_p
    elsewhere = (1 - targets.heat) ** 4 * p.square() * log_q
    count = max(len(targets.places), 1)
    image, row, column = targets.places.unbind(1)
    off = (box[image, :, row, column] - targets.values).abs().sum(0)
    return (-(here + elsewhere).sum() + off[:2].sum() + SIZE_WEIGHT * off[2:].sum()) / count
