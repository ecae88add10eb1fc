"""Which cells are hidden: distributions of masks, True where UNOBSERVED.

Each is noise of one key, which the generator gives: element i depends on the key and i alone. So more rows begin with
the same masks, and every device draws the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastnuggets import ops

_TRIES = 256  # rectangles drawn for each mask; the share of those large enough is 7.7 % for areas above 0.3


def mcar(rows: int, columns: int, share: float, generator: torch.Generator) -> Tensor:
    """Missing completely at random [rows, columns]: each cell with probability `share`."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    return _uniform((rows, columns), generator) < share


def pattern(missing: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """[rows, columns]: each row has the gaps of a row of the data, `missing` [N, columns] bool, drawn at random."""
    if missing.dim() != 2 or not len(missing):
        raise ValueError(f"missing: expected rows and columns, got {list(missing.shape)}")
    places = (_uniform((rows,), generator) * len(missing)).long().clamp(max=len(missing) - 1)
    return missing[places.to(missing.device)]


def rectangle(
    count: int, height: int, width: int, generator: torch.Generator, *, area: tuple[float, float] = (0.3, 1.0)
) -> Tensor:
    """[count, height, width]: a rectangle between two random corners, of those whose share of the area is allowed.

    The whole image where none of 256 is.
    """
    least, most = area
    if not 0 <= least < most or most > 1:
        raise ValueError(f"area: expected two shares, the first below the second, got {area}")
    corners = _uniform((count, _TRIES, 2, 2), generator) * torch.tensor([height, width])
    first, last = corners.floor().amin(2), corners.floor().amax(2)  # [count, tries, 2], both inside
    share = (last - first + 1).prod(-1) / (height * width)
    allowed = (share >= least) & (share <= most)
    chosen = allowed.to(torch.uint8).argmax(1)
    low, high = (of[torch.arange(count), chosen] for of in (first, last))
    none = ~allowed.any(1)
    low[none], high[none] = 0.0, torch.tensor([height - 1.0, width - 1.0])
    y, x = torch.arange(height)[:, None], torch.arange(width)
    top, left, bottom, right = (of[:, None, None] for of in (*low.unbind(1), *high.unbind(1)))
    return (y >= top) & (y <= bottom) & (x >= left) & (x <= right)


def half(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """[count, height, width]: the upper, lower, left or right half; of an odd number of pixels, the lesser."""
    which = (_uniform((count,), generator) * 4).long()[:, None, None]
    y, x = torch.arange(height)[:, None], torch.arange(width)
    upper, left = (y < height // 2).expand(height, width), (x < width // 2).expand(height, width)
    lower, right = (y >= height - height // 2).expand(height, width), (x >= width - width // 2).expand(height, width)
    halves = torch.stack([upper, lower, left, right])
    return halves[which[:, 0, 0].clamp(max=3)]


def centre(count: int, height: int, width: int) -> Tensor:
    """[count, height, width]: the middle half of the rows and of the columns, a quarter of the area."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    inside = (y >= height // 4) & (y < height - height // 4) & (x >= width // 4) & (x < width - width // 4)
    return inside.expand(count, height, width)


def blobs(
    count: int, height: int, width: int, generator: torch.Generator, *, share: float = 0.25, cell: int | None = None
) -> Tensor:
    """[count, height, width]: spots of no particular shape, so large a share of each image together.

    Where uniform noise of one number for every `cell` x `cell` pixels (by default an eighth of the larger side, and two
    at least), made smooth by cubic interpolation and shifted at random, is greatest.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    cell = max(2, max(height, width) // 8) if cell is None else cell
    if cell < 1:
        raise ValueError(f"cell must be at least 1, got {cell}")
    rows, columns = (-(-side // cell) + 1 for side in (height, width))
    noise = _uniform((count, 1, rows, columns), generator)
    smooth = interpolate(noise, scale_factor=float(cell), mode="bicubic", align_corners=False)[:, 0]
    shift = (_uniform((count, 2), generator) * cell).long().clamp(max=cell - 1)
    y = (shift[:, :1] + torch.arange(height))[:, :, None]
    x = (shift[:, 1:] + torch.arange(width))[:, None]
    cut = smooth[torch.arange(count)[:, None, None], y, x].flatten(1)
    rank = cut.argsort(dim=1, descending=True, stable=True).argsort(1)
    return (rank < round(share * height * width)).view(count, height, width)


def inpainting(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """[count, height, width]: the mixture that VAEAC's publication learned inpainting with, but for one part.

    Two thirds: a rectangle of 30 to 100 % of the area. The rest in tenths: two the centre, two spots of a quarter of
    the area, two 95 % of the pixels, four a half. There the first were one half and the last a quarter; left out is
    the other quarter, six rectangles about parts of a face (O1 to O6).
    O. Ivanov, M. Figurnov, D. Vetrov, Variational Autoencoder with Arbitrary Conditioning, ICLR 2019, arXiv:1806.02382.
    """
    which = _uniform((count, 1, 1), generator)
    mask = rectangle(count, height, width, generator)
    others = (
        (1 / 3, centre(count, height, width)),
        (0.8 / 3, blobs(count, height, width, generator)),
        (0.6 / 3, mcar(count, height * width, 0.95, generator).view(count, height, width)),
        (0.4 / 3, half(count, height, width, generator)),
    )
    for below, other in others:
        mask = torch.where(which < below, other, mask)
    return mask


def _uniform(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return ops.noise("uniform", size, key=ops.noise_key(generator=generator))
