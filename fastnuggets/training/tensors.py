"""A model's tensors as the averages see them: by name, each once, as plain memory; and the memory of averages."""

from __future__ import annotations

import contextlib
import fnmatch
import mmap
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastnuggets import _C
from fastnuggets.training.weights import unwrap

# What torch.compile and activation checkpointing put into the names of the modules they wrap.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_ALIGN = 64  # bytes
_HUGE = 1 << 21  # bytes of a large page


def clean(name: str) -> str:
    """A parameter's name in the bare model."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class Walk:
    """A look at a model: what it holds by name, and a cheap answer to whether that is still so.

    Attributes:
        tensors: parameters and buffers by their first names, the objects themselves; tied ones once.
        raw: the same as plain tensors of real numbers: the local shard of a DTensor, [..., 2] of a complex one.
        buffers: names of those that are buffers.
        aliases: each name of a tensor, the first one too, to the first one.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrap(model)
        self.tensors: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] = {}
        self.buffers: set[str] = set()
        self.aliases: dict[str, str] = {}
        self._reshards = _reshards(inner)
        self.reshard()
        modules = list(inner.modules())
        self._dicts: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._values = list(chain.from_iterable(map(dict.values, self._dicts)))
        seen: dict[Any, str] = {}
        for name, parameter in inner.named_parameters(remove_duplicate=False):
            self._add(clean(name), parameter, seen)
        for name, buffer in inner.named_buffers(remove_duplicate=False):
            if self._add(clean(name), buffer, seen):
                self.buffers.add(clean(name))
        self._derived = [(t, self.raw[name].data_ptr()) for name, t in self.tensors.items() if self.raw[name] is not t]

    def _add(self, name: str, tensor: Tensor, seen: dict[Any, str]) -> bool:
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run the model once before averaging it")
        plain = raw(tensor)
        if is_traceable_wrapper_subclass(plain):
            raise TypeError(f"{name} must be a plain tensor or a DTensor, got {type(tensor).__name__}")
        # Parameters of their own that share memory are tied as well.
        at = plain.data_ptr()
        place = (at, plain.device, plain.dtype, plain.shape, plain.stride()) if at else id(tensor)
        first = self.aliases[name] = seen.setdefault(place, name)
        if first != name:
            return False
        self.tensors[name], self.raw[name] = tensor, plain
        return True

    def reshard(self) -> None:
        """Frees the gathered parameters that FSDP2 may hold for its next backward: they would hide a change."""
        for reshard in self._reshards:
            reshard()

    def current(self) -> bool:
        """Whether the model's modules hold the same objects as when it was looked at."""
        if not _C.same_values(self._dicts, self._values):
            return False
        return not self._derived or all(raw(tensor).data_ptr() == place for tensor, place in self._derived)


def _reshards(model: nn.Module) -> list[Callable[[], None]]:
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is None:  # heavy to import, and nobody has used it
        return []
    return [module.reshard for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def raw(tensor: Tensor) -> Tensor:
    """The memory of a parameter as a plain real tensor; the parameter itself if it is one."""
    if is_sharded(tensor):
        with torch.no_grad():  # with gradients it would be a new object each time
            tensor = tensor.to_local()  # type: ignore[attr-defined]
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


def wrapped(plain: Tensor, like: Tensor) -> Tensor:
    """What `raw` takes apart, put together like the parameter; dimensions before those of the parameter are kept."""
    if like.is_complex():
        plain = torch.view_as_complex(plain)
    if not is_sharded(like):
        return plain
    lead = plain.dim() - like.dim()
    shape = (*plain.shape[:lead], *like.shape)
    strides = torch.empty(shape, device="meta").stride()
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return type(like.detach()).from_local(  # type: ignore[attr-defined,no-any-return]
        plain, mesh, _moved(like, lead), run_check=False, shape=torch.Size(shape), stride=strides
    )


def to_raw(value: Tensor, like: Tensor) -> Tensor:
    """The part of a value, whole or sharded, that belongs at the parameter's place, as a plain real tensor.

    A sharded value that is sharded otherwise is redistributed: a collective.
    """
    if is_sharded(like):
        placements = _moved(like, value.dim() - like.dim())
        mesh: Any = like.device_mesh  # type: ignore[attr-defined]
        if is_sharded(value):
            value = value.redistribute(mesh, placements)  # type: ignore[attr-defined]
        else:
            distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
            value = distribute(value.to(like.device), mesh, placements, src_data_rank=None)
    elif is_sharded(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    return raw(value.detach())


def _moved(like: Any, lead: int) -> list[Any]:
    """The placements of a DTensor with so many dimensions in front."""

    def moved(placement: Any) -> Any:
        if not lead or not hasattr(placement, "dim"):
            return placement
        factor = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
        return type(placement)(placement.dim + lead, **factor)

    return [moved(placement) for placement in like.placements]


def stream(name: str, tensor: Tensor) -> int:
    """Number of the tensor's random numbers: shards draw their own, copies the same."""
    if is_sharded(tensor):
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        place = [at for at, p in zip(mesh.get_coordinate(), placements, strict=True) if not p.is_replicate()]
        name = f"{name}{place}"
    return zlib.crc32(name.encode())


class Slot(NamedTuple):
    """A tensor to be made: where, of which type and with the layout of which tensor, behind so many rows."""

    like: Tensor
    dtype: torch.dtype
    device: torch.device
    rows: int | None = None


def arena(slots: Sequence[Slot]) -> list[Tensor]:
    """Tensors of zeros for the slots, one piece of memory for each type and device, each tensor 64-byte aligned."""
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    starts = []
    for slot in slots:
        key = (slot.dtype, slot.device)
        starts.append(sizes.get(key, 0))
        step = _ALIGN // slot.dtype.itemsize
        sizes[key] = starts[-1] + -(-slot.like.numel() * (slot.rows or 1) // step) * step
    pieces = {(dtype, device): _zeros(size, dtype, device) for (dtype, device), size in sizes.items()}
    made = []
    for slot, start in zip(slots, starts, strict=True):
        shape, strides = tuple(slot.like.shape), torch.empty_like(slot.like, device="meta").stride()
        if slot.rows is not None:
            shape, strides = (slot.rows, *shape), (slot.like.numel(), *strides)
        made.append(pieces[slot.dtype, slot.device].as_strided(shape, strides, start))
    return made


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    bytes_ = size * dtype.itemsize
    if device.type != "cpu" or bytes_ < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=dtype, device=device)
    # Memory that is gone through once in each update is read faster from large pages.
    memory = mmap.mmap(-1, bytes_ + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + bytes_].view(dtype)


class Staging:
    """Copies of weights on the devices of their averages, on the host in pinned memory, made without waiting.

    They are queued on the current stream, so no later step changes a weight before it is read.

    Attributes:
        copies: those of the weights, in their order.
        on_host: whether the averages are on the host, where they have to `wait`.
    """

    def __init__(self, weights: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
        self._weights = list(weights)
        self.on_host = all(device.type == "cpu" for device in devices)
        pin = self.on_host and torch.cuda.is_available()
        self.copies = [
            torch.empty_like(weight, device=device, pin_memory=pin, requires_grad=False)
            for weight, device in zip(weights, devices, strict=True)
        ]
        self._done = {w.device: torch.cuda.Event() for w in weights if w.is_cuda} if self.on_host else {}

    @torch.no_grad()
    def take(self) -> None:
        for copy, weight in zip(self.copies, self._weights, strict=True):
            copy.copy_(weight, non_blocking=True)
        for device, done in self._done.items():
            done.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        for done in self._done.values():
            done.synchronize()


def any_rank(here: bool, sharded: Any) -> bool:
    """Whether it is so on any rank of the DTensor's mesh. A collective."""
    mesh = sharded.device_mesh
    flag = torch.tensor(int(here), device=mesh.device_type)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    return bool(flag.item())
