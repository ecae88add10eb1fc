"""Where averages are kept: which of a model's tensors, in which memory, and the passes that update them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastnuggets import ops
from fastnuggets.training.tensors import Slot, Staging, Walk, any_rank, arena, is_sharded, matches, stream

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Layout:
    """What is kept of a model; the arguments of `fastnuggets.training.WeightAverager`."""

    sets: int  # averages of each tensor
    moments: bool  # SWAG's
    rank: int
    dtype: torch.dtype | None
    rounding: str
    device: torch.device | None
    buffers: str
    include: Sequence[str] | None
    exclude: Sequence[str]

    def kind(self, walk: Walk, name: str) -> str | None:
        """What becomes of a tensor: "averaged", "copied" in each update, "fetched" when it is used, or None."""
        if matches(name, self.exclude) or not (self.include is None or matches(name, self.include)):
            return None
        is_buffer, dtype = name in walk.buffers, walk.raw[name].dtype
        if is_buffer and self.buffers != "average":
            return {"copy": "copied", "recompute": "fetched"}[self.buffers]
        if dtype in FLOATS:
            return "averaged"
        if dtype.is_floating_point and not is_buffer:
            raise TypeError(
                f"{name} must be float32, float64, float16, bfloat16 or an integer, got {dtype}; exclude it"
            )
        return "fetched"

    def held_dtype(self, weight: Tensor) -> torch.dtype:
        """The type of a tensor's average."""
        if self.dtype is not None and not (weight.is_complex() and self.dtype.itemsize < 4):
            return self.dtype
        plain = weight.dtype.to_real()
        exact = plain == torch.bfloat16 and self.rounding != "nearest" and not self.moments
        return plain if exact or plain.itemsize >= 4 else torch.float32

    def check_patterns(self, names: Sequence[str]) -> None:
        for argument, patterns in (("include", self.include or ()), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(matches(name, [pattern]) for name in names):
                    raise ValueError(f"{argument}: {pattern!r} matches no parameter and no buffer")


class _Moments(NamedTuple):
    """The lists that SWAG's ops take."""

    names: list[str]
    mean: list[Tensor]
    m2: list[Tensor]
    ring: list[Tensor]
    weights: list[Tensor]
    streams: list[int]


class Step(Protocol):
    """An optimizer's step that updates some of the averages on its way."""

    rest: Sequence[ops.AveragePlan]  # the updates of all others

    def run(self, decays: Sequence[float]) -> None: ...


class Store:
    """The averages of a model's tensors, which follow it while its names and shapes stay.

    Attributes:
        walk: the model as it was last looked at.
        kinds: what becomes of each tensor that is kept; see `Layout.kind`.
        columns: column, name -> tensor. "averages.0", "averages.1", ...; "remainders.0", ... of compensated rounding;
            "m2" and "ring" of SWAG; "copied" for what is not averaged.
        staging: where weights of another device than their averages are copied to, or None.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.kinds: dict[str, str] = {}
        self.columns: dict[str, dict[str, Tensor]] = {}
        self.bind()
        layout.check_patterns(list(self.walk.tensors))
        if "averaged" not in self.kinds.values():
            raise ValueError("nothing to average: the model has no floating-point tensor that is included")

    # ---- following the model ---------------------------------------------------------------------------------------

    def unchanged(self) -> bool:
        """Whether the plans still fit the model. Memory that was replaced on the same device they follow themselves."""
        self.walk.reshard()
        return self.walk.current() and all(tensor.device == device for tensor, device in self._probes)

    def bind(self) -> None:
        """Looks at the model, and makes or moves the averages and the plans that update them."""
        walk = Walk(self.model)
        kinds = {name: kind for name in walk.tensors if (kind := self.layout.kind(walk, name))}
        if self.columns:
            self._check_same(walk, kinds)
        self.walk, self.kinds = walk, kinds
        self._allocate()
        self._prepare()

    def _check_same(self, walk: Walk, kinds: dict[str, str]) -> None:
        for what, names in (("no longer has", self.kinds.keys() - kinds), ("now also has", kinds.keys() - self.kinds)):
            if names:
                raise ValueError(
                    f"the averages do not fit the model any more: it {what} {', '.join(sorted(names)[:_SHOWN])}"
                )
        for name in kinds:
            shape = self.held(name).shape
            if walk.raw[name].shape != shape:
                raise ValueError(f"{name} must be {list(shape)} like its average, got {list(walk.raw[name].shape)}")

    def _slots(self) -> dict[tuple[str, str], Slot]:
        slots = {}
        for name, kind in self.kinds.items():
            like = self.walk.raw[name]
            device = self.layout.device or like.device
            if kind != "averaged":
                slots["copied", name] = Slot(like, like.dtype, device)
                continue
            dtype = self.layout.held_dtype(self.walk.tensors[name])
            for k in range(self.layout.sets):
                slots[f"averages.{k}", name] = Slot(like, dtype, device)
                if self.layout.rounding == "compensated" and dtype == torch.bfloat16:
                    slots[f"remainders.{k}", name] = Slot(like, torch.int16, device)
            if self.layout.moments and name not in self.walk.buffers:
                slots["m2", name] = Slot(like, dtype, device)
                if self.layout.rank:
                    slots["ring", name] = Slot(like, dtype, device, self.layout.rank)
        return slots

    @torch.no_grad()
    def _allocate(self) -> None:
        """The averages' memory: at first, and after the model moved to another device."""
        before, slots = self.columns, self._slots()
        if before:  # a type, once chosen, stays
            slots = {(c, n): slot._replace(dtype=before[c][n].dtype) for (c, n), slot in slots.items()}
            if all(before[column][name].device == slot.device for (column, name), slot in slots.items()):
                return
        self.columns = {}
        for ((column, name), _), tensor in zip(slots.items(), arena(list(slots.values())), strict=True):
            self.columns.setdefault(column, {})[name] = tensor
            if before:
                tensor.copy_(before[column][name])
        for name in () if before else self.kinds:
            for which in range(self.layout.sets):
                self.put(name, self.walk.raw[name], which)

    def _prepare(self) -> None:
        """The plans of the update, one for each device and rounding."""
        names = self.names("averaged")
        sources = {name: self.walk.raw[name] for name in names}
        self.staging = None
        if any(self.held(name).device != weight.device for name, weight in sources.items()):
            self.staging = Staging(list(sources.values()), [self.held(name).device for name in names])
            sources = dict(zip(names, self.staging.copies, strict=True))
        groups = self._groups(names)
        self._plans: list[ops.AveragePlan] = []
        self._moments: list[_Moments] = []
        for (_, treatment), group in groups.items():
            weights = [sources[name] for name in group]
            if treatment == "moments":
                mean, m2 = ([self.columns[column][name] for name in group] for column in ("averages.0", "m2"))
                ring = [self.columns["ring"][name] for name in group] if self.layout.rank else []
                self._moments.append(_Moments(group, mean, m2, ring, weights, self._streams(group)))
            else:
                self._plans.append(self._plan(group, weights, treatment))
        self._probes = [(self.walk.raw[group[0]], self.walk.raw[group[0]].device) for group in groups.values()]

    def _groups(self, names: Sequence[str]) -> dict[tuple[torch.device, str], list[str]]:
        groups: dict[tuple[torch.device, str], list[str]] = {}
        for name in names:
            groups.setdefault((self.held(name).device, self._treatment(name)), []).append(name)
        return groups

    def _treatment(self, name: str) -> str:
        if name in self.columns.get("m2", {}):
            return "moments"
        return self.layout.rounding if self.held(name).dtype == torch.bfloat16 else "nearest"

    def _plan(self, names: list[str], weights: list[Tensor], rounding: str) -> ops.AveragePlan:
        remainders = self.sets("remainders", names) if rounding == "compensated" else ()
        averages, streams = self.sets("averages", names), self._streams(names)
        return ops.AveragePlan(averages, weights, rounding=rounding, remainders=remainders, streams=streams)

    def sets(self, kind: str, names: Sequence[str]) -> list[list[Tensor]]:
        """The tensors' averages, or what belongs to them: a list for each decay."""
        return [[self.columns[f"{kind}.{k}"][name] for name in names] for k in range(self.layout.sets)]

    # ---- in an optimizer's step ------------------------------------------------------------------------------------

    def direct(self) -> dict[int, str]:
        """By id, the tensors whose averages are plain ones like them in memory: a step can update them on its way."""
        found = {}
        for name in self.names("averaged") if self.staging is None else ():
            weight, held = self.walk.tensors[name], self.held(name)
            alike = (weight.dtype, weight.device, weight.stride()) == (held.dtype, held.device, held.stride())
            plain = self.walk.raw[name] is weight and weight.dtype in FLOATS[:2]
            if alike and plain and self._treatment(name) == "nearest":
                found[id(weight)] = name
        return found

    def rest(self, updated: set[str]) -> list[ops.AveragePlan]:
        """The update of all averages but these, where there are no moments and nothing is staged."""
        groups = self._groups([name for name in self.names("averaged") if name not in updated])
        return [self._plan(names, [self.walk.raw[n] for n in names], how) for (_, how), names in groups.items()]

    def _streams(self, names: Sequence[str]) -> list[int]:
        return [stream(name, self.walk.tensors[name]) for name in names]

    # ---- what is where ---------------------------------------------------------------------------------------------

    def names(self, kind: str) -> list[str]:
        return [name for name, found in self.kinds.items() if found == kind]

    def by_device(self, names: Sequence[str]) -> list[list[str]]:
        """The names apart by the device of the model's tensors, for ops of one device."""
        groups: dict[torch.device, list[str]] = {}
        for name in names:
            groups.setdefault(self.walk.raw[name].device, []).append(name)
        return list(groups.values())

    def held(self, name: str, which: int = 0) -> Tensor:
        """A tensor's average, or the copy of one that is not averaged."""
        return self.columns[f"averages.{which}" if self.kinds[name] == "averaged" else "copied"][name]

    @torch.no_grad()
    def put(self, name: str, value: Tensor, which: int = 0) -> None:
        """Sets the average of a tensor."""
        held, remainder = self.held(name, which), self.columns.get(f"remainders.{which}", {}).get(name)
        if remainder is None:
            held.copy_(value)
            return
        bits = value.detach().float().contiguous().view(torch.int32).to(torch.int64)
        high = (bits + 0x8000) >> 16  # ties away from zero: the rest fits into 16 bits
        held.copy_((high << 16).to(torch.int32).view(torch.float32))
        remainder.copy_(bits - (high << 16))

    def is_exchangeable(self, name: str, which: int) -> bool:
        """Whether weight and average can change places, and the average is not needed meanwhile."""
        weight, held = self.walk.raw[name], self.held(name, which)
        same = (weight.dtype, weight.device, weight.stride()) == (held.dtype, held.device, held.stride())
        return same and weight.dtype in FLOATS and name not in self.columns.get("m2", {})

    # ---- passes over it --------------------------------------------------------------------------------------------

    def stage(self) -> bool:
        """Takes the weights for `average` to the averages' device; whether a thread should do the rest."""
        if self.staging is None:
            return False
        self.staging.take()
        return self.staging.on_host

    def average(self, count: int, decays: Sequence[float], seed: int, step: Step | None = None) -> None:
        """Update number ``count``, from 0; a plain mean if there are no decays."""
        if self.staging is not None:
            self.staging.wait()
        if count == 0:
            self._clear()
        try:
            self._update(count, decays, seed, step)
        except (ValueError, TypeError):
            self.bind()  # says which parameter no longer fits
            raise

    def _update(self, count: int, decays: Sequence[float], seed: int, step: Step | None) -> None:
        if step is not None:
            step.run(decays or [1 - 1 / (count + 1)])
        for plan in self._plans if step is None else step.rest:
            if decays:
                plan.ema_(decays, seed=seed, step=count)
            else:
                plan.swa_(count, seed=seed, step=count)
        for m in self._moments if step is None else ():
            row = count % self.layout.rank if self.layout.rank else 0
            ops.swag_update_(m.mean, m.m2, m.weights, count, deviations=m.ring, row=row)

    @torch.no_grad()
    def _clear(self) -> None:
        """Makes the first update exact, whatever was there."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("call update() once before capturing it in a graph: the first update is another one")
        for column, tensors in self.columns.items():
            for tensor in tensors.values() if column != "copied" else ():
                tensor.zero_()

    @torch.no_grad()
    def copy(self, kind: str) -> None:
        """Takes the tensors of a kind over from the model."""
        for name in self.names(kind):
            self.held(name).copy_(self.walk.raw[name])

    def exchange(self, names: Sequence[str], which: int) -> None:
        """Weights and averages change places."""
        for group in self.by_device(names):
            ops.swap_([self.walk.raw[n].detach() for n in group], [self.held(n, which) for n in group])

    def sample(self, count: int, seed: int, scale: float | None) -> None:
        """Writes weights drawn from SWAG's Gaussian into the model."""
        for m in self._moments:
            for group in self.by_device(m.names):
                picked = [m.names.index(name) for name in group]
                out = [self.walk.raw[name].detach() for name in group]
                mean, m2, ring = (
                    [held[i].to(out[0].device) for i in picked if held] for held in (m.mean, m.m2, m.ring)
                )
                streams = [m.streams[i] for i in picked]
                ops.swag_sample_(out, mean, m2, count, deviations=ring, scale=scale, seed=seed, streams=streams)

    def nonfinite(self) -> str | None:
        """The first averaged tensor that holds an inf or a NaN; "" if it is on another rank. Synchronises."""
        bad = None
        for names in self.by_device(self.names("averaged")):
            found = ops.first_nonfinite([self.walk.raw[name].detach() for name in names])
            if bad is None and found >= 0:
                bad = names[found]
        sharded = next((tensor for tensor in self.walk.tensors.values() if is_sharded(tensor)), None)
        if sharded is not None and any_rank(bad is not None, sharded):
            return bad or ""
        return bad
