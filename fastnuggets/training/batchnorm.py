"""Running statistics of BatchNorm layers, computed anew for weights that no training step has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from fastnuggets.training.weights import Forward, call, device_of, move, track, unwrap

_TINY = torch.finfo(torch.float64).tiny
# Values that are looked at together. On the CPU their float64 copy stays in the cache: 46 ms without, 9 with it for
# [32, 64, 56, 56], which the layer itself takes 31 ms for; 2^14 and 2^16 were slower for small images.
_TOGETHER = {"cpu": 1 << 18}


def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    weight: Callable[[Any], Tensor] | None = None,
    group: Any = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> None:
    """Sets the running statistics of every BatchNorm layer to those of a data set, in one pass over it.

    What is exact: each layer gets the mean and the unbiased variance of all values that reached it during the pass,
    every sample alike, however unevenly the loader cuts them into batches; in float64, rounded once. These values are
    the data set's own in layers that come before any other BatchNorm layer. Deeper layers see activations that the
    layers before normalised batch by batch, as in training; so theirs depend on what was batched with what.

    Only BatchNorm layers (1d, 2d, 3d, SyncBatchNorm and subclasses that take their input layout [N, C, ...]) are put
    in training mode, frozen ones too; dropout stays off. Layers without running statistics and layers that the pass
    does not reach are left alone. A batch with one value a channel has no variance: it is normalised by the statistics
    so far. Momenta are not touched, training flags are put back, and after an error so are the statistics.

    Args:
        loader: batches. Returns at once, without asking for one, if the model has no such layer.
        model: also compiled or wrapped by DistributedDataParallel; the module inside runs, without compilation.
        device: where the tensors of a batch are moved; default: where the model is.
        forward: called with the model and the batch. Default: ``model(**batch)`` for a dict, ``model(batch[0])`` for a
            tuple or list, else ``model(batch)``.
        weight: called with the batch, gives how often each sample counts [N]: 0 for those that only pad a shard.
            The variance's N - 1 is then the sum of these less one.
        group: process group whose ranks each bring a part of the data set; all get the same bits, and each may bring
            another number of batches, or none. An error on one rank is an error on all.
        autocast: type in which the model runs under ``torch.autocast``.
        progress: a bar on stderr, if that is a terminal.

    Raises:
        ValueError: the loader gave no batch; the first batch has one value a channel; an input that is not [N, C, ...]
            or a weight that is not [N], naming the layer. RuntimeError: the batches reached no BatchNorm layer; values
            that are not finite, naming the layer; another rank failed.

    Deterministic for the same batches. Synchronises at the end only.
    """
    model = unwrap(model)
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    layers = {name or "the model": layer for name, layer in norms}
    if not layers:
        return
    place = device_of(model) if device is None else torch.device(device)
    gathered = {name: _Moments() for name in layers}
    with _as_it_was(model, layers) as undo, contextlib.ExitStack() as hooks:
        failure: Exception | None = None
        batches = 0
        try:
            weighing = _Weighing()
            for name, layer in layers.items():
                _watch(name, layer, gathered[name], weighing, hooks)
            hooks.enter_context(torch.no_grad())
            # A compiled part of the model would not run the hooks.
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
            hooks.enter_context(torch.autocast(place.type, dtype=autocast, enabled=autocast is not None))
            for batch in track(loader, "batch norm", progress):
                moved = move(batch, place)
                weighing.weights = None if weight is None else weight(moved).to(place, torch.float64)
                (forward or call)(model, moved)
                batches += 1
        except Exception as error:
            failure = error
        _agree(failure, group, place)
        _finish(layers, _combine(gathered, group, place), batches, group)
        undo.pop_all()


class _Weighing:
    weights: Tensor | None = None  # [N] float64, of the samples of the batch that is running


class _Moments:
    """Count, mean and sum of squared deviations of a layer's input a channel, in float64."""

    def __init__(self) -> None:
        self.batches = 0
        self.count: Tensor | None = None  # []
        self.mean = self.m2 = torch.empty(0)  # [C]

    def add(self, count: Tensor, mean: Tensor, m2: Tensor, batches: int) -> None:
        """Another part: the parallel form of T. Chan, G. Golub, R. LeVeque, 1983, which does not cancel."""
        self.batches += batches
        if self.count is None:
            self.count, self.mean, self.m2 = count, mean, m2
            return
        total = self.count + count
        share = count / total.clamp(min=_TINY)
        step = mean - self.mean
        self.mean = self.mean + step * share
        self.m2 = self.m2 + m2 + step.square() * self.count * share
        self.count = total

    def pack(self, size: int, place: torch.device) -> Tensor:
        """Batches, count, mean and m2 [size] for a collective; zeros if there is nothing."""
        if self.count is None:
            return torch.zeros(size, dtype=torch.float64, device=place)
        parts = (torch.tensor([self.batches]), self.count.view(1), self.mean, self.m2)
        return torch.cat([part.to(place, torch.float64) for part in parts])

    def write(self, layer: _BatchNorm) -> None:
        assert self.count is not None and layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(self.m2 / (self.count - 1))


@contextlib.contextmanager
def _as_it_was(model: nn.Module, layers: dict[str, _BatchNorm]) -> Iterator[contextlib.ExitStack]:
    """Puts the layers alone in training mode; the flags come back, and the statistics unless the stack is emptied."""
    flags = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as undo:
        for layer in layers.values():
            for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked):
                if buffer is not None and not is_lazy(buffer):
                    undo.callback(buffer.copy_, buffer.clone())
        try:
            # The flags themselves: train() and eval() may be overridden, and would go on into a layer's children.
            for module in flags:
                module.training = False
            for layer in layers.values():
                layer.training = True
            yield undo
        finally:
            for module, flag in flags.items():
                module.training = flag


def _watch(name: str, layer: _BatchNorm, moments: _Moments, weighing: _Weighing, hooks: contextlib.ExitStack) -> None:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.dim() < 2 or x.size(1) != layer.num_features:
            raise ValueError(f"{name}: the input must be [N, {layer.num_features}, ...], got {list(x.shape)}")
        if x.numel() == layer.num_features:
            if not moments.batches:
                raise ValueError(f"{name}: the first batch has one value a channel, and so no variance")
            moments.write(layer)
            layer.training = False
        if x.numel():
            _add_input(name, x.detach(), weighing.weights, moments)

    def after(*_: Any) -> None:
        layer.training = True

    for handle in (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, always_call=True),
    ):
        hooks.callback(handle.remove)


def _add_input(name: str, x: Tensor, weights: Tensor | None, moments: _Moments) -> None:
    if weights is not None and weights.shape != x.shape[:1]:
        raise ValueError(f"{name}: weight must give one number a sample, [{x.size(0)}], got {list(weights.shape)}")
    rows = max(1, _TOGETHER.get(x.device.type, 1 << 24) // (x.numel() // x.size(0)))
    for start in range(0, x.size(0), rows):
        part = None if weights is None else weights[start : start + rows]
        moments.add(*_moments(x[start : start + rows], part), batches=0)
    moments.batches += 1


def _moments(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations [C] of an input [N, C, ...], in two passes over a float64 copy."""
    y = x.to(torch.float64, copy=True)
    dims = [0, *range(2, y.dim())]
    shape = [1, -1] + [1] * (y.dim() - 2)
    values = y.numel() // y.size(1)
    if weights is None:
        count = torch.full((), values, dtype=torch.float64, device=y.device)
        mean = y.sum(dims) / count
        return count, mean, y.sub_(mean.view(shape)).square_().sum(dims)
    w = weights.to(y.device).view(-1, *[1] * (y.dim() - 1))
    count = w.sum() * (values // y.size(0))
    mean = (y * w).sum(dims) / count.clamp(min=_TINY)
    return count, mean, y.sub_(mean.view(shape)).square_().mul_(w).sum(dims)


def _agree(failure: Exception | None, group: Any, place: torch.device) -> None:
    """Raises this rank's failure, or says which other ranks failed: none is left waiting in a collective."""
    if group is not None:
        flag = torch.tensor([failure is not None], dtype=torch.int64, device=place)
        failed = [rank for rank, other in enumerate(_gather(flag, group)) if other.item()]
        if failed and failure is None:
            raise RuntimeError(f"update_bn failed on rank {', '.join(map(str, failed))} of the group")
    if failure is not None:
        raise failure


def _gather(tensor: Tensor, group: Any) -> list[Tensor]:
    everywhere = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(everywhere, tensor, group=group)
    return everywhere


def _combine(gathered: dict[str, _Moments], group: Any, place: torch.device) -> dict[str, _Moments]:
    """Every rank's moments, added in the order of the ranks, so that all of them end with the same bits."""
    if group is None:
        return gathered
    # A lazy layer that met no batch here does not know its width: the widest of the ranks is right for all.
    widths = torch.tensor([part.mean.numel() for part in gathered.values()], device=place)
    sizes = [2 + 2 * width for width in torch.stack(_gather(widths, group)).amax(0).tolist()]
    flat = torch.cat([part.pack(size, place) for part, size in zip(gathered.values(), sizes, strict=True)])
    total = {name: _Moments() for name in gathered}
    for rank in _gather(flat, group):
        for part, piece in zip(total.values(), rank.split(sizes), strict=True):
            if batches := int(piece[0]):
                mean, m2 = piece[2:].chunk(2)
                part.add(piece[1], mean, m2, batches)
    return total


def _finish(layers: dict[str, _BatchNorm], gathered: dict[str, _Moments], batches: int, group: Any) -> None:
    reached = {name: part for name, part in gathered.items() if part.batches}
    if not reached and not batches and group is None:
        raise ValueError("the loader gave no batch")
    if not reached:
        raise RuntimeError("no batch reached a BatchNorm layer" + ("" if group is None else " on any rank"))
    for name, part in reached.items():
        assert part.count is not None
        if not (part.count > 1 and part.mean.isfinite().all() and part.m2.isfinite().all()):
            raise RuntimeError(f"{name}: {part.count.item():g} values a channel reached it, or some were not finite")
        part.write(layers[name])
        if (tracked := layers[name].num_batches_tracked) is not None:
            tracked.fill_(part.batches)
