"""States of averages: ours, and those of other libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastnuggets.training.tensors import Walk, clean, is_sharded, to_raw

_VERSION = 1
_SHOWN = 5  # names in a message


def pack(settings: dict[str, Any]) -> Tensor:
    """Plain values as a tensor of bytes."""
    return torch.tensor(list(json.dumps({"version": _VERSION, **settings}).encode()), dtype=torch.uint8)


def unpack(state: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        found = json.loads(bytes(state["settings"].tolist()))
        version = found.pop("version")
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError("not a state of a WeightAverager; load_averages() reads those of other libraries") from error
    if version != _VERSION:
        raise ValueError(f"a state of version {version}; this program reads version {_VERSION}")
    return dict(found)


def check_settings(found: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    other = [f"{name} {found.get(name)!r}, here {value!r}" for name, value in ours.items() if found.get(name) != value]
    if other:
        raise ValueError("the state is of other settings: " + "; ".join(other))


def check_names(found: Iterable[str], ours: Iterable[str]) -> None:
    found, ours = set(found), set(ours)
    for what, names in (("lacks", ours - found), ("has too many:", found - ours)):
        if names:
            more = ", ..." if len(names) > _SHOWN else ""
            raise ValueError(f"the state {what} {', '.join(sorted(names)[:_SHOWN])}{more}")


def kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def bare(model: nn.Module, average: Callable[[str], Tensor | None]) -> dict[str, Any]:
    """The model's state dict under clean names, with the averages there are, copied."""
    made = {}
    for name, value in model.state_dict().items():
        held = average(clean(name))
        value = value if held is None else held
        made[clean(name)] = value.detach().clone() if isinstance(value, Tensor) else value
    return made


def gathered(state: Mapping[str, Any], everywhere: bool) -> dict[str, Any]:
    """Whole tensors on the CPU, one after the other; a collective of all ranks if there are DTensors."""
    sharded = any(isinstance(value, Tensor) and is_sharded(value) for value in state.values())
    keep = everywhere or not sharded or torch.distributed.get_rank() == 0
    made = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            value = (value.full_tensor() if is_sharded(value) else value).cpu()  # type: ignore[attr-defined]
        if keep:
            made[name] = value
    return made


def foreign(state: Mapping[str, Any], parameters: Sequence[str]) -> tuple[dict[str, Tensor], int | None]:
    """Averages by the name that the state gives them, and the number of updates if it says it."""
    if "shadow_params" in state:  # diffusers, torch-ema
        values = state["shadow_params"]
        if len(values) != len(parameters):
            raise ValueError(f"the state has {len(values)} parameters, the model {len(parameters)}")
        return dict(zip(parameters, values, strict=True)), state.get("optimization_step", state.get("num_updates"))
    if "averaging_state" in state:  # Lightning
        return _tensors(state["state_dict"]), _number(state["averaging_state"].get("n_averaged"))
    if "state_dict_ema" in state:  # timm
        return _tensors(state["state_dict_ema"]), None
    if "n_averaged" in state:  # torch
        return _under("module.", state), _number(state["n_averaged"])
    if any(name.startswith("ema_model.") for name in state):  # ema-pytorch
        return _under("ema_model.", state), _number(state.get("step"))
    return _tensors(state), None


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


def _under(prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return _tensors({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {clean(name): value for name, value in state.items() if isinstance(value, Tensor)}


def matched(state: Mapping[str, Tensor], walk: Walk, kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """For each averaged name its value, checked, as plain memory."""
    if not state.keys() & walk.aliases.keys() and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    unknown = sorted(state.keys() - walk.aliases.keys())
    if unknown:
        raise ValueError(f"the model has no {', '.join(unknown[:_SHOWN])}")
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        first = walk.aliases[name]
        if first not in kinds:
            continue
        if value.shape != walk.tensors[first].shape:
            raise ValueError(f"{name} must be {list(walk.tensors[first].shape)}, got {list(value.shape)}")
        found[first] = to_raw(value, walk.tensors[first])
    missing = [name for name in kinds if name not in found and name not in walk.buffers]
    if missing:
        raise ValueError(f"the state lacks {', '.join(missing[:_SHOWN])}")
    return found
