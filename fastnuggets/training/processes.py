"""The processes of one training, as torchrun starts them: the same steps everywhere, of gradients averaged over all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Joins the process group that torchrun's environment describes, if there is one and it is not joined yet."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()  # gloo aborts a process that leaves while others still write their results
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(tensors: Sequence[Tensor]) -> None:
    """The first process's values, in place, for all."""
    if world() == 1:
        return
    for tensor in tensors:
        dist.broadcast(tensor.detach(), 0)


def mean_gradients(parameters: Sequence[nn.Parameter], loss: float, device: torch.device) -> float:
    """Averages gradients in place and returns the mean loss. One all-reduce, in float32.

    A parameter without a gradient counts as zero where another process has one, and stays without where none has.
    """
    if world() == 1:
        return loss
    has = [float(p.grad is not None) for p in parameters]
    parts = [torch.tensor([loss, *has], device=device)]
    parts += [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float() for p in parameters]
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    flat /= world()
    head, *means = flat.split([part.numel() for part in parts])
    shares = head.tolist()
    for parameter, mean, some in zip(parameters, means, shares[1:], strict=True):
        if some:
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)
    return float(shares[0])


def mean(value: Tensor) -> Tensor:
    """A number of each process, such as a loss that decides whose turn it is -> the mean, without a gradient."""
    found = value.detach().clone()
    if world() > 1:
        dist.all_reduce(found)
        found /= world()
    return found


def any_of(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Each flag, if any process raised it."""
    if world() == 1:
        return list(flags)
    values = torch.tensor([float(flag) for flag in flags], device=device)
    dist.all_reduce(values)
    return [bool(value) for value in values.tolist()]


def gathered(value: Tensor) -> Tensor:
    """[...] of each process -> [processes, ...], on the CPU."""
    if world() == 1:
        return value[None].cpu()
    every: list[Tensor | None] = [None] * world()
    dist.all_gather_object(every, value.cpu())
    return torch.stack([part for part in every if part is not None])


def of_the_first(function: Callable[[], T]) -> T:
    """What the function returns in the first process, for all; the others wait."""
    if world() == 1:
        return function()
    result = [function() if rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]
