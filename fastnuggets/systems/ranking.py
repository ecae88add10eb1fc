"""How well scores rank what is true above what is not: the areas under two curves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ranking(NamedTuple):
    """Of K bits; those that are the same for all examples say nothing and are left out."""

    varying: Tensor  # [K] bool
    roc_auc: Tensor  # [K] float64, NaN where a bit does not vary
    average_precision: Tensor  # [K] float64, NaN where a bit does not vary
    micro_roc_auc: float  # of all bits that vary as one
    micro_average_precision: float

    @property
    def macro_roc_auc(self) -> float:
        return float(self.roc_auc[self.varying].mean())

    @property
    def macro_average_precision(self) -> float:
        return float(self.average_precision[self.varying].mean())


def rank(scores: Tensor, truth: Tensor) -> Ranking:
    """Scores [N, K] of any float type, truth [N, K] bool. ValueError if no bit varies."""
    varying = truth.any(0) & ~truth.all(0)
    if not varying.any():
        raise ValueError("every bit is the same for all examples: there is nothing to rank")
    areas = torch.full((2, truth.shape[1]), torch.nan, dtype=torch.float64)
    for bit in varying.nonzero().flatten().tolist():
        areas[0, bit], areas[1, bit] = _areas(scores[:, bit], truth[:, bit])
    roc_auc, precision = _areas(scores[:, varying].flatten(), truth[:, varying].flatten())
    return Ranking(varying, areas[0], areas[1], roc_auc, precision)


def _areas(scores: Tensor, truth: Tensor) -> tuple[float, float]:
    """Under the ROC and, in steps, under the curve of precision by recall; equal scores are one threshold."""
    levels, place = scores.unique(return_inverse=True)
    every = torch.bincount(place, minlength=len(levels)).double().flip(0)
    true = torch.bincount(place, truth.double(), minlength=len(levels)).flip(0)
    hits, taken = true.cumsum(0), every.cumsum(0)
    false = every - true
    roc_auc = (false * (hits - true / 2)).sum() / (hits[-1] * false.sum())
    precision = (true * hits / taken).sum() / hits[-1]
    return float(roc_auc), float(precision)
