"""What averaging, ensembles and curves all do to a model: find its tensors, write over them, put them back."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DistributedDataParallel and DataParallel, whose names have no prefix."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, detached, tied ones once."""
    return {name: tensor.detach() for name, tensor in unwrap(model).named_parameters()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers by name that a state dict would hold, shared ones once."""
    inner = unwrap(model)
    saved = inner.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in inner.named_buffers() if name in saved}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return parameters(model) | buffers(model)


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Inside, weights, buffers and training flags may change; afterwards they are what they were."""
    held = tensors(model)
    saved = {name: tensor.clone() for name, tensor in held.items()}
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for name, tensor in held.items():
            tensor.copy_(saved[name])
        for module, flag in flags.items():
            module.training = flag


def check_fit(held: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """ValueError if names or shapes differ, with those that do."""
    odd = sorted(held.keys() ^ given.keys()) or [name for name in held if held[name].shape != given[name].shape]
    if odd:
        raise ValueError(f"{what} does not fit the model: {', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}")


def write(held: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    """Copies values over tensors of the same names and shapes, of any type and device; else as `check_fit`."""
    check_fit(held, values, what)
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(values[name])


def evaluation(model: nn.Module) -> None:
    """Clears every training flag, without ``eval()``, which may be overridden to do more."""
    for module in model.modules():
        module.training = False


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies."""
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))


def move(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on the device: tensors, dicts, tuples, named tuples and lists, nested."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(move(value, device) for value in batch)
    return batch


def call(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a dict, ``model(batch[0])`` for a tuple or list (data, label), else ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


Forward = Callable[[nn.Module, Any], Any]


def track(items: Iterable[Any], what: str, progress: bool, total: int | None = None) -> Iterable[Any]:
    """The items, under a bar on stderr if that is a terminal and tqdm is installed."""
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, total=total, disable=None, leave=False)
