"""SGD and AdamW whose step also averages the weights, in the same pass over memory."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnuggets import _C, ops
from fastnuggets.training.averaging import WeightAverager
from fastnuggets.training.averaging_store import Store
from fastnuggets.training.tensors import Walk

_type_of = operator.attrgetter("dtype", "layout")


class _Averaged(torch.optim.Optimizer):
    """What the two have in common: when the fused pass serves, and what it needs at hand.

    It serves weights in float32 or float64 with dense gradients, whose averages are of their type and device. In all
    other cases torch's own step is followed by the update of the averages.
    """

    averager: WeightAverager | None = None
    _prepared: _Prepared | None = None

    def __init__(self, params: Any, *args: Any, averager: WeightAverager, **options: Any) -> None:
        if not isinstance(averager, WeightAverager):
            raise TypeError(f"averager must be a WeightAverager, got {type(averager).__name__}")
        super().__init__(params, *args, **options)
        self.averager = averager
        averager._owner = weakref.ref(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of the optimizer and, after it, of its averages.

        Raises:
            RuntimeError: inside `WeightAverager.swapped`. Others: as `WeightAverager.update`.
        """
        average = self.averager
        if average is not None:
            average._check_at_home("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fused = None if average is None else self._fused(average)
        if fused is None:
            self._plain_step()
        if average is not None:
            average._update(fused)
        return loss

    def _plain_step(self) -> None:
        """torch's step, without the hooks that torch may have put around it: they are around ours."""
        step: Any = super().step.__func__  # type: ignore[attr-defined]
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

    def _fused(self, average: WeightAverager) -> _Fused | None:
        """The pass over memory that does this step and the update of the averages, if there is one."""
        if not average._due() or average.nonfinite != "propagate" or not all(map(self._serves, self.param_groups)):
            return None
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return None  # a GradScaler leaves it to torch's kernels to skip the step
        average._follow()
        store = average._store
        if self._prepared is None or not self._prepared.fits(self, store):
            self._prepared = _Prepared(self, store)
        batches, rest = self._prepared.batches, self._prepared.rest
        grads = [[p.grad for p in batch.params] for batch in batches]
        if not batches or not all(map(_Batch.takes, batches, grads)):
            return None
        return _Fused(self, batches, grads, rest)

    # ---- what differs ----------------------------------------------------------------------------------------------

    def _serves(self, group: dict[str, Any]) -> bool:
        """Whether the fused pass knows the settings of a group."""
        raise NotImplementedError

    def _state(self, group: dict[str, Any], parameter: Tensor) -> tuple[Any, list[Tensor]]:
        """What a parameter's step depends on beside its group, and its state, made if there is none."""
        raise NotImplementedError

    def _step(self, batch: _Batch, grads: list[Tensor], decays: list[float]) -> None:
        raise NotImplementedError


class _Batch(NamedTuple):
    """Parameters that one call steps."""

    group: int
    names: list[str]
    params: list[Tensor]
    moments: list[list[Tensor]]  # of each kind one a parameter
    averages: list[list[Tensor]]
    kind: Any  # see `_Averaged._state`
    counts: Tensor | None  # memory of the parameters' step numbers

    def takes(self, grads: Sequence[Tensor]) -> bool:
        """Whether these gradients, and the step numbers, can go into one call."""
        same_step = self.counts is None or len(set(self.counts.tolist())) == 1
        return same_step and set(map(_type_of, grads)) == {(self.averages[0][0].dtype, torch.strided)}


class _Prepared:
    """The calls that step an optimizer's parameters, good for as long as tensors and state stay where they are."""

    def __init__(self, optimizer: _Averaged, store: Store) -> None:
        self._walk: Walk = store.walk
        self._params = _params(optimizer)
        self._idle = [p.grad is None for p in self._params]
        self._strides = list(map(Tensor.stride, self._params))
        self.batches = _batches(optimizer, store)
        self.rest = store.rest({name for batch in self.batches for name in batch.names}) if self.batches else []
        self._momenta = [bool(group.get("momentum")) for group in optimizer.param_groups]
        self._states = list(optimizer.state.values())
        self._values = list(chain.from_iterable(map(dict.values, self._states)))

    def fits(self, optimizer: _Averaged, store: Store) -> bool:
        params = _params(optimizer)
        return (
            self._walk is store.walk
            and len(params) == len(self._params)
            and all(map(operator.is_, params, self._params))
            and [p.grad is None for p in params] == self._idle
            and list(map(Tensor.stride, params)) == self._strides
            and [bool(group.get("momentum")) for group in optimizer.param_groups] == self._momenta
            and _C.same_values([optimizer.state], self._states)
            and _C.same_values(self._states, self._values)
        )


class _Fused(NamedTuple):
    """A step that updates averages on its way."""

    optimizer: _Averaged
    batches: list[_Batch]
    grads: list[list[Tensor]]
    rest: list[ops.AveragePlan]

    def run(self, decays: Sequence[float]) -> None:
        for batch, grads in zip(self.batches, self.grads, strict=True):
            self.optimizer._step(batch, grads, list(decays))


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _batches(optimizer: _Averaged, store: Store) -> list[_Batch]:
    """None at all where one of the parameters that have a gradient cannot be served."""
    names = store.direct()
    if any(
        id(p) not in names or _type_of(p.grad) != (p.dtype, torch.strided)
        for p in _params(optimizer)
        if p.grad is not None
    ):
        return []
    batches = []
    for number, group in enumerate(optimizer.param_groups):
        found: dict[Any, list[tuple[Tensor, list[Tensor]]]] = {}
        for p in group["params"]:
            if p.grad is not None:
                kind, state = optimizer._state(group, p)
                found.setdefault((p.dtype, p.device, kind), []).append((p, state))
        for (*_, kind), members in found.items():
            params = [p for p, _ in members]
            named = [names[id(p)] for p in params]
            moments = [list(column) for column in zip(*(state for _, state in members), strict=True)]
            states = [optimizer.state[p] for p in params if p in optimizer.state]
            counts = _in_one_piece(states) if states and "step" in states[0] else None
            batches.append(_Batch(number, named, params, moments, store.sets("averages", named), kind, counts))
    return batches


def _in_one_piece(states: Sequence[dict[str, Any]]) -> Tensor:
    """Lets the numbers of steps share memory, so that all are raised at once."""
    counts = torch.stack([state["step"] for state in states])
    for state, count in zip(states, counts.unbind(), strict=True):
        state["step"] = count
    return counts


def _laid_like(parameter: Tensor, state: dict[str, Any], name: str) -> Tensor:
    """The state of this name, zeros at first, in the layout of the parameter: a checkpoint may have another."""
    found = state.get(name)
    if found is None:
        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    elif found.stride() != parameter.stride():
        state[name] = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(found)
    return state[name]  # type: ignore[no-any-return]


class AveragedSGD(_Averaged, torch.optim.SGD):
    """`torch.optim.SGD` whose step also updates a `WeightAverager`, in the same pass over memory.

    ::

        average = WeightAverager(model, "ema", decay=0.999)
        optimizer = AveragedSGD(model.parameters(), lr=0.1, momentum=0.9, averager=average)

    Everything else stays: groups, schedulers, closures, hooks, the state dict, which is that of `torch.optim.SGD`, and
    the averages, which are those of a call of ``average.update()`` after each step; that call itself is now an error.
    All that the averager holds is averaged, be it among the optimizer's parameters or not. The state of the averager is
    its own, to be saved beside the optimizer's.

    One pass serves the modes "swa" and "ema" of averages like their weights, in float32 or float64, whose gradients are
    dense. In all other cases (half and complex weights, DTensors, sparse gradients, "swag", averages on another
    device, ``differentiable``, a tensor as learning rate, a check for ``nonfinite``, weights that the averager leaves
    out) and in steps that are not averaged it is torch's step and then the update, with the same result; ``foreach``
    and ``fused`` are for these. A step that a GradScaler skips updates no averages.

    Args:
        params, lr, momentum, ...: those of `torch.optim.SGD`.
        averager: of the model that has the parameters; an attribute. None makes it a plain optimizer from then on, and
            leaves the updates to ``average.update()`` again.

    Deterministic. Weights are equal to torch's within a rounding or two a step. Does not synchronise where
    `torch.optim.SGD` and `WeightAverager` do not.
    """

    def _serves(self, group: dict[str, Any]) -> bool:
        return not group["differentiable"] and not any(isinstance(value, Tensor) for value in group.values())

    def _state(self, group: dict[str, Any], parameter: Tensor) -> tuple[bool, list[Tensor]]:
        if not group["momentum"]:
            return False, []
        state = self.state[parameter]
        first = state.get("momentum_buffer") is None
        return first, [_laid_like(parameter, state, "momentum_buffer")]

    def _step(self, batch: _Batch, grads: list[Tensor], decays: list[float]) -> None:
        group = self.param_groups[batch.group]
        ops.sgd_ema_step_(
            batch.params,
            grads,
            batch.moments[0] if batch.moments else [],
            batch.averages,
            lr=float(group["lr"]),
            decay=decays,
            momentum_rate=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"] and batch.moments),
            maximize=group["maximize"],
            first=batch.kind,
        )
        if batch.kind:
            self._prepared = None  # the next step is not the first


class AveragedAdamW(_Averaged, torch.optim.AdamW):
    """`torch.optim.AdamW` whose step also updates a `WeightAverager`, in the same pass over memory.

    All of `AveragedSGD` applies. It is torch's step and then the update also for ``amsgrad`` and ``capturable``, and
    for ``fused=True`` on CUDA, where torch keeps the numbers of steps on the device.
    """

    def _serves(self, group: dict[str, Any]) -> bool:
        on_device = group["fused"] and any(p.is_cuda for p in group["params"])
        if group["amsgrad"] or group["capturable"] or group["differentiable"] or on_device:
            return False
        return not any(isinstance(value, Tensor) for value in chain(group.values(), group["betas"]))

    def _state(self, group: dict[str, Any], parameter: Tensor) -> tuple[float, list[Tensor]]:
        state = self.state[parameter]
        state.setdefault("step", torch.tensor(0.0, dtype=torch.get_default_dtype()))
        return state["step"].item(), [_laid_like(parameter, state, name) for name in ("exp_avg", "exp_avg_sq")]

    def _step(self, batch: _Batch, grads: list[Tensor], decays: list[float]) -> None:
        group = self.param_groups[batch.group]
        assert batch.counts is not None
        ops.adamw_ema_step_(
            batch.params,
            grads,
            *batch.moments,
            batch.averages,
            lr=float(group["lr"]),
            decay=decays,
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
            step=int(batch.counts[0]) + 1,
        )
        batch.counts.add_(1)
