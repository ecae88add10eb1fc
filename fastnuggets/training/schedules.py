"""Learning rates for averages and ensembles: ``torch.optim.lr_scheduler`` classes, each a closed form of the step.

A step is whatever lies between two calls of ``step()``: an iteration or an epoch. Each schedule's formula counts from
its own first step, composes with ``SequentialLR``, and resumes from its ``state_dict``. Rates are one number, or one
for each parameter group.

The cyclic ones say when to take a model, between the optimizer's step and their own::

    optimizer.step()
    if schedule.at_minimum:
        ensemble.collect()
    schedule.step()
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Rates = float | Sequence[float]


class _Schedule(LRScheduler):
    def get_lr(self) -> list[float | Tensor]:
        if self.last_epoch <= 0:
            self._begin()
        done = max(self.last_epoch, 0)
        return [self._rate(done, group) for group in range(len(self.optimizer.param_groups))]

    def _begin(self) -> None:
        """Before the rate of the first step."""

    def _rate(self, done: int, group: int) -> float | Tensor:
        raise NotImplementedError


class SWALR(_Schedule):
    """Anneals to a constant rate in so many steps, and stays there: the arguments of ``torch.optim.swa_utils.SWALR``.

    It starts from the rate it finds, which in ``SequentialLR`` is the one that the schedule before it ended with.

    Args:
        swa_lr: the constant rate, >= 0.
        anneal_epochs: steps until it is reached; 0: at once.
        anneal_strategy: ``"cos"`` or ``"linear"``.
        last_epoch: as in every scheduler of torch.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: Rates,
        anneal_epochs: int = 10,
        anneal_strategy: str = "cos",
        last_epoch: int = -1,
    ) -> None:
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f'anneal_strategy must be "cos" or "linear", got {anneal_strategy!r}')
        self.swa_lrs = _rates(optimizer, "swa_lr", swa_lr)
        self.anneal_epochs, self.anneal_strategy = _count("anneal_epochs", anneal_epochs, 0), anneal_strategy
        self.start_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer, last_epoch)

    def _begin(self) -> None:
        self.start_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]

    def _rate(self, done: int, group: int) -> float:
        t = min(1.0, done / self.anneal_epochs) if self.anneal_epochs else 1.0
        share = t if self.anneal_strategy == "linear" else (1 - math.cos(math.pi * t)) / 2
        return self.swa_lrs[group] * share + self.start_lrs[group] * (1 - share)


class FlatLinearFlatLR(_Schedule):
    """The optimizer's rate for half of the steps, linearly down until 9/10 of them, then flat: the SWA authors' script.

    Args:
        total_steps: for SWA the step where averaging starts; for the training of a curve all steps.
        final_lr: the last rate: of SWA, or 1/100 of the optimizer's rate (the default) without.

    P. Izmailov et al., UAI 2018, arXiv:1803.05407.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, final_lr: Rates | None = None, last_epoch: int = -1
    ) -> None:
        self.total_steps = _count("total_steps", total_steps, 1)
        self.final_lrs = None if final_lr is None else _rates(optimizer, "final_lr", final_lr)
        super().__init__(optimizer, last_epoch)

    def _rate(self, done: int, group: int) -> float | Tensor:
        share = min(1.0, max(0.0, (done / self.total_steps - 0.5) / 0.4))
        first = self.base_lrs[group]
        last = 0.01 * first if self.final_lrs is None else self.final_lrs[group]
        return first + (last - first) * share


class Cyclic(_Schedule):
    """What the cyclic schedules have in common: they say when to take a model."""

    cycle: int  # steps
    _lowest: int  # step of a cycle, from 0, that has the lowest rate

    @property
    def at_minimum(self) -> bool:
        """Whether the rate in place is the lowest of its cycle: after the optimizer's step with it, take the model."""
        # In SequentialLR this schedule stands still while another one sets the rate.
        in_place = all(g["lr"] == rate for g, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True))
        return self.last_epoch >= 0 and self.last_epoch % self.cycle == self._lowest and in_place

    def cycle_ends(self, steps: int) -> list[int]:
        """After how many of `steps` steps models are to be taken."""
        return list(range(self._lowest + 1, steps + 1, self.cycle))


class CosineCyclicLR(Cyclic):
    """Snapshot ensembles' rate, a0 / 2 (cos(π mod(i - 1, L) / L) + 1) in step i = 1, 2, ..., with L = ceil(T / M).

    a0 is the optimizer's rate. A model is taken at the end of each cycle.

    Args:
        total_steps, cycles: T and M, at least 1.

    G. Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, arXiv:1704.00109.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, cycles: int, last_epoch: int = -1) -> None:
        self.cycle = -(-_count("total_steps", total_steps, 1) // _count("cycles", cycles, 1))
        self._lowest = self.cycle - 1
        super().__init__(optimizer, last_epoch)

    def _rate(self, done: int, group: int) -> float | Tensor:
        return self.base_lrs[group] * (0.5 * (1 + math.cos(math.pi * (done % self.cycle) / self.cycle)))


class TriangularCyclicLR(Cyclic):
    """Fast geometric ensembles' rate: in step i = 1, 2, ..., with t = (mod(i - 1, c) + 1) / c, from a1 down to a2 at
    t = 1/2 and up to a1 again at t = 1, linearly. A model is taken in the middle of each cycle.

    Args:
        cycle: c, at least 2; an odd one passes a2 by half a step.
        min_lr: a2.
        max_lr: a1; default the optimizer's rate.

    T. Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018, arXiv:1802.10026.
    """

    def __init__(
        self, optimizer: Optimizer, cycle: int, min_lr: Rates, max_lr: Rates | None = None, last_epoch: int = -1
    ) -> None:
        self.cycle = _count("cycle", cycle, 2)
        self._lowest = self.cycle // 2 - 1
        self.min_lrs = _rates(optimizer, "min_lr", min_lr)
        self.max_lrs = None if max_lr is None else _rates(optimizer, "max_lr", max_lr)
        super().__init__(optimizer, last_epoch)

    def _rate(self, done: int, group: int) -> float | Tensor:
        high = self.base_lrs[group] if self.max_lrs is None else self.max_lrs[group]
        height = abs(1 - 2 * (done % self.cycle + 1) / self.cycle)
        return height * high + (1 - height) * self.min_lrs[group]


class SawtoothCyclicLR(Cyclic):
    """SWA's cyclic rate: (1 - t) a1 + t a2 with t = (mod(i - 1, c) + 1) / c in step i = 1, 2, ...

    A model is averaged at the end of each cycle, where the rate is a2.

    Args:
        cycle: c, at least 1; with 1 the rate is a2 throughout.
        min_lr, max_lr: a2 and a1; a1 by default the optimizer's rate.

    P. Izmailov et al., UAI 2018, arXiv:1803.05407.
    """

    def __init__(
        self, optimizer: Optimizer, cycle: int, min_lr: Rates, max_lr: Rates | None = None, last_epoch: int = -1
    ) -> None:
        self.cycle = _count("cycle", cycle, 1)
        self._lowest = self.cycle - 1
        self.min_lrs = _rates(optimizer, "min_lr", min_lr)
        self.max_lrs = None if max_lr is None else _rates(optimizer, "max_lr", max_lr)
        super().__init__(optimizer, last_epoch)

    def _rate(self, done: int, group: int) -> float | Tensor:
        high = self.base_lrs[group] if self.max_lrs is None else self.max_lrs[group]
        t = (done % self.cycle + 1) / self.cycle
        return (1 - t) * high + t * self.min_lrs[group]


def _rates(optimizer: Optimizer, name: str, value: Rates) -> list[float]:
    groups = len(optimizer.param_groups)
    rates = [float(rate) for rate in value] if isinstance(value, Sequence) else [float(value)] * groups
    if len(rates) != groups:
        raise ValueError(f"{name} must be one rate, or one for each of {groups} parameter groups, got {len(rates)}")
    if not all(rate >= 0 and math.isfinite(rate) for rate in rates):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return rates


def _count(name: str, value: int, least: int) -> int:
    if value < least or int(value) != value:
        raise ValueError(f"{name} must be a whole number of steps, at least {least}, got {value}")
    return int(value)
