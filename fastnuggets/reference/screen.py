"""The nearest rows of a database of bits by their definition: every pair, sorted."""

from __future__ import annotations

import torch
from torch import Tensor


def tanimoto(queries: Tensor, database: Tensor) -> Tensor:  # [Q, B], [N, B] uint8 -> [Q, N] float64
    """Bits in common over bits in either; 0 for two empty rows."""
    a, b = (_bits(rows) for rows in (queries, database))
    common = a @ b.T
    united = a.sum(1)[:, None] + b.sum(1) - common
    return torch.where(united == 0, 0.0, common / united)


def tanimoto_topk(queries: Tensor, database: Tensor, k: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Similarity [Q, k] float64 and index [Q, k] int64; 0 and -1 where there is no row."""
    similarity = tanimoto(queries, database)
    order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]
    best = similarity.gather(1, order)
    best, order = torch.where(best < threshold, 0.0, best), torch.where(best < threshold, -1, order)
    missing = k - order.shape[1]
    return torch.nn.functional.pad(best, (0, missing)), torch.nn.functional.pad(order, (0, missing), value=-1)


def _bits(rows: Tensor) -> Tensor:  # [N, B] uint8 -> [N, 8 B] float64
    shifts = torch.arange(8, dtype=torch.uint8, device=rows.device)
    return (rows[:, :, None] >> shifts & 1).flatten(1).double()
