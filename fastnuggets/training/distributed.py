"""Averages of weights over the ranks of torch.distributed: local SGD, and SWA in parallel."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastnuggets import ops
from fastnuggets.training.averaging import WeightAverager

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 5  # differences in a message
_ASKING = 5.0  # seconds that the store has to say who is missing

_MADE = itertools.count()  # averagers; ranks make them in the same order

_Layout: TypeAlias = list[tuple[str, str, list[int], list[int]]]  # name, dtype, shape, strides


class DistributedAverager:
    """Averages what each rank has trained on its own, every so many steps.

    ::

        averager = DistributedAverager(model, every=8)
        for batch in loader:
            step(model, batch)
            averager.update(samples=len(batch))

    All floating-point parameters and buffers of a model are averaged in place, or, of a `WeightAverager`, its running
    averages; integers stay as they are on each rank, and so does the optimizer. Tensors travel in flat buckets, one
    all-reduce each: float32 for half, bfloat16 and float32 tensors, which are rounded once, and float64. Afterwards all
    ranks hold the same bits.

    Args:
        target: a model, or a WeightAverager, all of whose averages are averaged.
        every: steps between averages: S. U. Stich, Local SGD, ICLR 2019, arXiv:1805.09767. For one average at the end
            (V. Gupta et al., Stochastic Weight Averaging in Parallel, ICLR 2020, arXiv:2001.02312) call `average`.
        group: the ranks, used as it is. Default: all of them, in a new group with this time limit, which all ranks
            make when they come here.
        timeout: seconds. A rank that is dead, or does not come to an average in this time (a quarter more if the group
            is given), is an error on all others, which names it if the group's store still knows. The tensors may then
            be averaged in part, and the group cannot be used again.
        bucket_bytes: of a bucket, which is allocated once.

    Raises:
        RuntimeError: torch.distributed is not initialised. TypeError, ValueError: a tensor that cannot be averaged,
            naming it: shards (DTensor), tensors with gaps; SWAG's moments and compensated averages.

    Not differentiable. Deterministic for a given number of ranks and size of buckets. Synchronises when it averages.
    """

    def __init__(
        self,
        target: nn.Module | WeightAverager,
        every: int = 1,
        *,
        group: dist.ProcessGroup | None = None,
        timeout: float = 60.0,
        bucket_bytes: int = 1 << 26,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialised: call init_process_group first")
        for name, value, least in (("every", every, 1), ("timeout", timeout, 1e-3), ("bucket_bytes", bucket_bytes, 8)):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if isinstance(target, WeightAverager):
            columns = {key.partition("/")[0].partition(".")[0] for key in target.state_dict()}
            if columns & {"m2", "ring", "remainders"}:
                raise ValueError("averages over ranks are of plain averages: no SWAG, no compensated rounding")
        self.target, self.every, self.timeout, self.bucket_bytes = target, every, timeout, bucket_bytes
        self.step = 0  # calls of update()
        self._samples = 0.0
        self._round = 0
        self._buckets: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        on_cpu = _views(self._tensors())[0].device.type == "cpu"
        # When the group's time is over gloo raises, but NCCL's watchdog ends the process: wait() has to be earlier.
        self._group = group or dist.new_group(timeout=timedelta(seconds=timeout if on_cpu else 2 * timeout))
        self._limit = timedelta(seconds=1.25 * timeout if on_cpu else timeout)
        self._ranks = dist.get_process_group_ranks(self._group)
        self._key = f"averager/{next(_MADE)}"

    def update(self, samples: float = 1.0) -> bool:
        """Counts a step; every so many, averages, and returns True.

        Args:
            samples: that this rank saw in the step. Its share in the average is its sum since the last one.
        """
        self.step += 1
        self._samples += samples
        if self.step % self.every:
            return False
        samples, self._samples = self._samples, 0.0
        self.average(samples)
        return True

    @torch.no_grad()
    def average(self, weight: float = 1.0) -> None:
        """Averages now; ``weight`` is this rank's share, at least 0. What a rank of weight 0 holds does not matter.

        Raises:
            ValueError: the ranks have other tensors, or are at other steps, naming both; or no weight is above zero.
            RuntimeError: a rank was lost.
        """
        tensors = self._tensors()
        views = _views(tensors)
        self._round += 1
        self._group.get_group_store().set(f"{self._key}/{dist.get_rank()}", json.dumps([self._round, self.step]))
        share = self._agree(_layout(tensors), weight, views[0].device)
        for pieces in _pieces(views, self.bucket_bytes):
            self._reduce(pieces, share)

    def _tensors(self) -> dict[str, Tensor]:
        if isinstance(self.target, WeightAverager):
            sets = max(1, len(self.target.decays))
            return {
                f"{name} ({k})": t for k in range(sets) for name, t in self.target.average(k).items() if _is_float(t)
            }
        buffers = {name: buffer for name, buffer in self.target.named_buffers() if _is_float(buffer)}
        return {**dict(self.target.named_parameters()), **buffers}

    def _agree(self, layout: _Layout, weight: float, device: torch.device) -> float:
        """This rank's share in the average, once all ranks are known to mean the same."""
        digest = int.from_bytes(hashlib.sha256(json.dumps(layout).encode()).digest()[:8], "little", signed=True)
        bits = torch.tensor([weight], dtype=torch.float64).view(torch.int64).item()
        mine = torch.tensor([digest, self.step, bits], device=device)
        gathered = [torch.empty_like(mine) for _ in self._ranks]
        self._wait(lambda: dist.all_gather(gathered, mine, group=self._group, async_op=True))
        said = torch.stack(gathered).cpu()
        digests, steps, weights = said[:, 0].tolist(), said[:, 1].tolist(), said[:, 2].view(torch.float64).tolist()
        if len(set(steps)) > 1:
            where = ", ".join(f"rank {rank} at step {step}" for rank, step in zip(self._ranks, steps, strict=True))
            raise ValueError(f"the ranks average at different steps: {where}")
        if len(set(digests)) > 1:
            self._tell_difference(layout, digests)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
            raise ValueError(f"weights must be at least 0, one of them more; ranks {self._ranks} gave {weights}")
        return weight / sum(weights)

    def _tell_difference(self, layout: _Layout, digests: Sequence[int]) -> None:
        layouts: list[Any] = [None] * len(self._ranks)
        dist.all_gather_object(layouts, layout, group=self._group)
        other = next(i for i, digest in enumerate(digests) if digest != digests[0])
        first, second = ({name: rest for name, *rest in layouts[i]} for i in (0, other))
        a, b = self._ranks[0], self._ranks[other]
        lines = [
            f"{name} is {_said(first.get(name))} on rank {a} and {_said(second.get(name))} on rank {b}"
            for name in dict.fromkeys([*first, *second])
            if first.get(name) != second.get(name)
        ]
        if not lines:
            lines = [f"ranks {a} and {b} have the same tensors in another order"]
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise ValueError("the ranks have different tensors: " + "; ".join([*lines[:_SHOWN], *more]))

    def _reduce(self, pieces: list[Tensor], share: float) -> None:
        device, dtype = pieces[0].device, _wide(pieces[0].dtype)
        bucket = self._buckets.get((device, dtype))
        if bucket is None:
            bucket = torch.empty(self.bucket_bytes // dtype.itemsize, dtype=dtype, device=device)
            self._buckets[device, dtype] = bucket
        flat = bucket[: sum(piece.numel() for piece in pieces)]
        parts = list(flat.split([piece.numel() for piece in pieces]))
        if share > 0:
            ops.weighted_sum_(parts, [pieces], [share])
        else:
            flat.zero_()  # 0 times a NaN is none
        self._wait(lambda: dist.all_reduce(flat, group=self._group, async_op=True))
        ops.weighted_sum_(pieces, [parts], [1.0])

    def _wait(self, start: Callable[[], dist.Work]) -> None:
        try:
            start().wait(self._limit)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise RuntimeError(
                f"a rank was lost in the average at step {self.step}: {self._missing()} ({reason})"
            ) from error

    def _missing(self) -> str:
        """Who had not come to this average, as far as the store knows."""
        seen: dict[int, list[int]] = {}
        done = []

        def ask() -> None:
            store = self._group.get_group_store()
            for rank in self._ranks:
                key = f"{self._key}/{rank}"
                seen[rank] = json.loads(store.get(key)) if store.check([key]) else [0, 0]
            done.append(True)

        # The store lives in a process that may be the lost one, and may not answer.
        thread = threading.Thread(target=_quietly, args=(ask,), daemon=True)
        thread.start()
        thread.join(min(_ASKING, self.timeout))
        if not done:
            return "the store that could say which does not answer"
        late = [f"rank {rank} (last seen at step {s})" for rank, (number, s) in seen.items() if number < self._round]
        return f"not come were {', '.join(late)}" if late else "all had come, one was lost after that"


def _quietly(call: Callable[[], None]) -> None:
    try:
        call()
    except RuntimeError:
        return


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layout(tensors: Mapping[str, Tensor]) -> _Layout:
    return [(name, str(t.dtype).removeprefix("torch."), list(t.shape), list(t.stride())) for name, t in tensors.items()]


def _said(entry: Sequence[Any] | None) -> str:
    return "missing" if entry is None else f"{entry[0]} {entry[1]} with strides {entry[2]}"


def _views(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors' memory, as one-dimensional tensors."""
    if not tensors:
        raise ValueError("nothing to average: there is no floating-point tensor")
    views = []
    for name, tensor in tensors.items():
        if hasattr(tensor, "to_local"):
            raise TypeError(f"{name} is a DTensor: ranks hold other shards of it, not other values")
        real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        if real.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {real.dtype}")
        strides = real.stride()
        dense = real.permute(sorted(range(real.dim()), key=strides.__getitem__, reverse=True))
        if not dense.is_contiguous():
            raise ValueError(f"{name} must be dense, got {list(real.shape)} with strides {list(strides)}")
        views.append(dense.view(-1))
    return views


def _pieces(views: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Groups of slices of one device and type of bucket that fill one bucket each."""
    kinds = dict.fromkeys((view.device, _wide(view.dtype)) for view in views)
    for device, dtype in kinds:
        room = limit = size // dtype.itemsize
        group: list[Tensor] = []
        for view in views:
            if (view.device, _wide(view.dtype)) != (device, dtype):
                continue
            while view.numel():
                group.append(view[:room])
                room -= group[-1].numel()
                view = view[group[-1].numel() :]
                if room == 0:
                    yield group
                    group, room = [], limit
        if group:
            yield group
