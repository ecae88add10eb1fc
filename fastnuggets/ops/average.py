"""Averages of a model's weights along training: one pass over all tensors at once, on the CPU and on CUDA.

All of them write to their first arguments in place, take lists of tensors of mixed types and shapes, record no
gradient, give the same bits for any number of threads, and do not synchronise. On CUDA they are one launch (one
for some 790 tensors, whose table is the launch's parameters) on the current stream, and can be captured in a graph.

Every average must be dense (contiguous, channels_last, ...). A weight of other strides is copied first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnuggets import _C
from fastnuggets.reference.philox import normal

# The order is that of the enum in csrc/average/average.h.
ROUNDINGS = ("nearest", "stochastic", "compensated")

Tensors = Sequence[Tensor]
Rate = float | Sequence[float] | Tensor

# No tensor's number in a list: those below it are the tensors'.
_LOW_RANK_STREAM = 0xFFFFFFFF


def ema_update_(
    averages: Tensors | Sequence[Tensors],
    weights: Tensors,
    decay: Rate,
    *,
    rounding: str = "nearest",
    remainders: Tensors | Sequence[Tensors] = (),
    seed: int = 0,
    step: int = 0,
    streams: Sequence[int] = (),
) -> None:
    """Exponential moving averages: ``a <- a + (1 - decay) (w - a)``, with one read of the weights for several decays.

    Computed in float32 for float32, half and bfloat16 averages, in float64 for float64 ones, whatever the weight's
    type, and rounded once. At decay 0.9999 a bfloat16 average rounded to nearest stands still: its steps are smaller
    than half its spacing. Keep the average in float32, or choose one of the other two roundings.

    Args:
        averages: T tensors [shape of the weight], float32, float64, float16 or bfloat16; or one such list per decay.
        weights: T tensors, of any of these types, on the same device.
        decay: in [0, 1]; one for each list of averages. A float64 tensor [m] on the device is read when the kernel
            runs, which lets a captured graph change it.
        rounding: of bfloat16 averages: ``"nearest"`` (ties to even); ``"stochastic"``, up or down with the
            probabilities that make the expected value exact; ``"compensated"``: ``remainders`` hold what bfloat16
            leaves out, so the average is exactly the float32 one, at 4 bytes an element.
        remainders: for ``"compensated"``: int16 tensors like ``averages``, zeros at first.
        seed, step: of the stochastic rounding: the same numbers give the same bits on every device; use a new step
            each time.
        streams: T numbers below 2^32 that tell the tensors apart in the stochastic rounding. Default: 0, 1, 2, ...

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.

    Not differentiable. Deterministic. Does not synchronise.
    """
    AveragePlan(averages, weights, rounding=rounding, remainders=remainders, streams=streams).ema_(
        decay, seed=seed, step=step
    )


def swa_update_(averages: Tensors, weights: Tensors, num_averaged: int, **how: Any) -> None:
    """Running mean: ``a <- a + (w - a) / (num_averaged + 1)``, where ``averages`` hold the mean of ``num_averaged``.

    Other arguments, types, errors and promises are those of :func:`ema_update_`.

    P. Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018, arXiv:1803.05407.
    """
    AveragePlan(averages, weights, **{k: how.pop(k) for k in ("rounding", "remainders", "streams") if k in how}).swa_(
        num_averaged, **how
    )


class AveragePlan:
    """The update of given averages by given weights, prepared once and repeated at next to no host time.

    Each call looks at the tensors again: one whose memory was replaced (``p.data = ...``, ``model.to(...)``) is noticed
    and the plan made anew. Arguments, errors and promises are those of :func:`ema_update_`.
    """

    def __init__(
        self,
        averages: Tensors | Sequence[Tensors],
        weights: Tensors,
        *,
        rounding: str = "nearest",
        remainders: Tensors | Sequence[Tensors] = (),
        streams: Sequence[int] = (),
    ) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        self._weights = list(weights)
        self._averages, self._sets = _flat("averages", averages)
        if len(self._averages) != self._sets * len(self._weights):
            raise ValueError(f"averages must be {len(self._weights)} tensors like weights, got {len(self._averages)}")
        self._rest = _flat("remainders", remainders)[0]
        self._rounding, self._streams = ROUNDINGS.index(rounding), list(streams)
        self._rates = torch.zeros(self._sets, dtype=torch.float64)
        self._plan: _C.AveragePlan | None = None

    def ema_(self, decay: Rate, *, seed: int = 0, step: int = 0) -> None:
        """:func:`ema_update_` of the plan's tensors."""
        self._update(_rates(decay, self._sets), seed, step)

    def swa_(self, num_averaged: int, *, seed: int = 0, step: int = 0) -> None:
        """:func:`swa_update_` of the plan's tensors."""
        if num_averaged < 0:
            raise ValueError(f"num_averaged must not be negative, got {num_averaged}")
        self._update([1.0 / (num_averaged + 1)] * self._sets, seed, step)

    def _update(self, rates: list[float] | Tensor, seed: int, step: int) -> None:
        if torch.compiler.is_compiling():
            tensors = (self._averages, self._rest, self._weights)
            torch.ops.fastnuggets.average_update_(*tensors, _on_host(rates), self._rounding, seed, step, self._streams)
            return
        if self._plan is None:
            self._plan = _C.AveragePlan(self._averages, self._rest, self._weights, self._rounding, self._streams)
        self._plan.update(rates, seed, step)


def swag_update_(
    mean: Tensors, m2: Tensors, weights: Tensors, num_collected: int, *, deviations: Tensors = (), row: int = 0
) -> None:
    """SWAG's moments after one more set of weights, in one pass: Welford's form, which does not cancel.

    ``d = w - mean; mean <- mean + d / (n + 1); m2 <- m2 + d (w - mean); deviations[row] <- w - mean``, with the new
    mean where it stands after the arrow. The variance is ``m2 / n``.

    Args:
        mean, m2: T tensors each, float32 or float64 [shape of the weight]; zeros at first.
        weights: T tensors, float32, float64, float16 or bfloat16.
        num_collected: n, the sets that ``mean`` and ``m2`` hold already.
        deviations: none, or T tensors [K, *shape] of the type of ``mean``, a ring of the last K deviations.
        row: the row of the ring that is overwritten, usually ``num_collected % K``.

    Promises as :func:`ema_update_`. W. Maddox et al., A Simple Baseline for Bayesian Uncertainty in Deep Learning,
    NeurIPS 2019, arXiv:1902.02476.
    """
    rows = (list(mean), list(m2), list(deviations), list(weights))
    if weights:
        with torch.no_grad():
            torch.ops.fastnuggets.swag_update_(*rows, num_collected, row)


def swag_sample_(
    out: Tensors,
    mean: Tensors,
    m2: Tensors,
    num_collected: int,
    *,
    deviations: Tensors = (),
    scale: float | None = None,
    seed: int = 0,
    step: int = 0,
    streams: Sequence[int] = (),
) -> None:
    """Weights drawn from SWAG's Gaussian, N(mean, scale (diag(m2 / n) + D Dᵀ / (K - 1))), K of D's rows being filled.

    Without deviations it is N(mean, scale diag(m2 / n)). The noise is a function of
    ``(seed, step, stream, element)`` and is never stored.

    Args:
        out: T tensors to write to, of any floating type; usually the model's parameters.
        num_collected: n of :func:`swag_update_`; at least 1, with deviations at least 2.
        scale: factor of the covariance. Default: the paper's, 0.5, and 1 without deviations.
        step: number of the draw.
        Others: as in :func:`swag_update_` and :func:`ema_update_`.
    """
    filled = min(num_collected, len(deviations[0])) if deviations else 0
    least = 2 if deviations else 1
    if num_collected < least:
        raise ValueError(f"num_collected must be at least {least}, got {num_collected}")
    if deviations and filled < 2:
        raise ValueError(f"deviations must have at least 2 rows, got {filled}")
    scale = (0.5 if deviations else 1.0) if scale is None else scale
    if scale < 0:
        raise ValueError(f"scale must not be negative, got {scale}")
    diagonal, columns = scale / num_collected, torch.zeros(0, dtype=torch.float64)
    if filled:
        columns = math.sqrt(scale / (filled - 1)) * _low_rank_noise(filled, seed, step)
    rows = (list(out), list(mean), list(m2), list(deviations))
    if out:
        with torch.no_grad():
            torch.ops.fastnuggets.swag_sample_(*rows, columns, math.sqrt(diagonal), seed, step, list(streams))


def weighted_sum_(out: Tensors, sources: Sequence[Tensors], coefficients: Sequence[float] | Tensor) -> None:
    """``out <- Σ_k coefficients[k] sources[k]`` over K sets of T tensors: soups, points of a curve, ensembles' means.

    Sums in float32 (float64 if ``out`` is) in the order of the sources and rounds once. ``out`` may be one of them.
    """
    flat = [tensor for source in sources for tensor in source]
    if not isinstance(coefficients, Tensor):
        coefficients = torch.tensor(coefficients, dtype=torch.float64)
    if len(coefficients) != len(sources):
        raise ValueError(f"coefficients must be {len(sources)} like sources, got {len(coefficients)}")
    if not len(sources):
        raise ValueError("sources must not be empty")
    if out:
        with torch.no_grad():
            torch.ops.fastnuggets.weighted_sum_(list(out), flat, coefficients.double())


def swap_(first: Tensors, second: Tensors) -> None:
    """Exchanges the values of two lists of tensors of the same shapes and types without a temporary."""
    if first or second:
        with torch.no_grad():
            torch.ops.fastnuggets.swap_tensors_(list(first), list(second))


def first_nonfinite(weights: Tensors) -> int:
    """Index of the first tensor that holds an inf or a NaN, or -1. Synchronises."""
    if not weights:
        return -1
    with torch.no_grad():
        found = int(torch.ops.fastnuggets.first_nonfinite(list(weights)))
    return found if found < len(weights) else -1


def sgd_ema_step_(
    weights: Tensors,
    grads: Tensors,
    momentum: Tensors,
    averages: Tensors | Sequence[Tensors],
    *,
    lr: float,
    decay: Rate,
    momentum_rate: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """A step of ``torch.optim.SGD`` and of the averages of its result in one pass over memory.

    Args:
        weights, grads: T tensors, float32 or float64, all of one type.
        momentum: T tensors, or none where ``momentum_rate`` is 0.
        averages: as in :func:`ema_update_`, of the weights' type.
        first: the momentum is set to the gradient, as in the first step of ``torch.optim.SGD``.
    """
    flat, sets = _flat("averages", averages)
    with torch.no_grad():
        torch.ops.fastnuggets.sgd_ema_step_(
            list(weights), list(grads), list(momentum), flat, _on_host(_rates(decay, sets)), lr, momentum_rate,
            dampening, weight_decay, nesterov, maximize, first,
        )  # fmt: skip


def adamw_ema_step_(
    weights: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    averages: Tensors | Sequence[Tensors],
    *,
    lr: float,
    decay: Rate,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    step: int,
) -> None:
    """Step number ``step`` (from 1) of ``torch.optim.AdamW`` and of the averages of its result in one pass.

    Other arguments as in :func:`sgd_ema_step_`.
    """
    flat, sets = _flat("averages", averages)
    with torch.no_grad():
        torch.ops.fastnuggets.adamw_ema_step_(
            list(weights), list(grads), list(exp_avg), list(exp_avg_sq), flat, _on_host(_rates(decay, sets)), lr,
            *betas, eps, weight_decay, maximize, step,
        )  # fmt: skip


def _flat(name: str, tensors: Tensors | Sequence[Tensors]) -> tuple[list[Tensor], int]:
    """One list or several as one, and how many there were."""
    given: list[Any] = list(tensors)
    if all(isinstance(t, Tensor) for t in given):
        return given, 1
    if any(isinstance(t, Tensor) for t in given) or len({len(part) for part in given}) > 1:
        raise ValueError(f"{name} must be tensors, or lists of equally many tensors")
    return [tensor for part in given for tensor in part], len(given)


def _rates(decay: Rate, sets: int) -> list[float] | Tensor:
    """1 - decay, one for each of the sets: numbers, or a float64 tensor where the given one is."""
    if isinstance(decay, Tensor):
        return 1.0 - decay.detach().double().reshape(-1)
    decays = decay if isinstance(decay, Sequence) else [decay] * sets
    if len(decays) != sets:
        raise ValueError(f"decay must be {sets} numbers, one for each list of averages, got {len(decays)}")
    for d in decays:
        if not 0.0 <= d <= 1.0:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
    return [1.0 - d for d in decays]


def _on_host(rates: list[float] | Tensor) -> Tensor:
    return rates if isinstance(rates, Tensor) else torch.tensor(rates, dtype=torch.float64)


def _low_rank_noise(rank: int, seed: int, step: int) -> Tensor:
    """The normals [rank] that weigh the deviations of one draw, from the same generator as the rest of it."""
    return normal(seed, (step & 0xFFFFFFFF, _LOW_RANK_STREAM), rank)


for _name in (
    "average_update_", "swag_update_", "swag_sample_", "weighted_sum_", "swap_tensors_", "sgd_ema_step_",
    "adamw_ema_step_",
):  # fmt: skip
    torch.library.register_fake(f"fastnuggets::{_name}", lambda *_: None)


@torch.library.register_fake("fastnuggets::first_nonfinite")
def _(weights):  # type: ignore[no-untyped-def]
    return weights[0].new_empty((), dtype=torch.int64)
