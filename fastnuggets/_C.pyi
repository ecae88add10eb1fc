from typing import Any

from torch import Tensor, dtype

def build_info() -> dict[str, object]: ...
def same_values(dicts: list[dict[str, Any]], values: list[Any]) -> bool: ...
def voxelize(
    coords: Tensor,
    ptr: Tensor,
    channel: Tensor | None,
    weight: Tensor,
    size: Tensor | None,
    omega: Tensor | None,
    center: Tensor | None,
    rotation: Tensor | None,
    translation: Tensor | None,
    shape: list[int],
    spacing: list[float],
    density: int,
    combine: int,
    cutoff: float,
    dtype: dtype,
) -> Tensor: ...
def voxelize_(
    out: Tensor,
    coords: Tensor,
    ptr: Tensor,
    channel: Tensor | None,
    weight: Tensor,
    size: Tensor | None,
    omega: Tensor | None,
    center: Tensor | None,
    rotation: Tensor | None,
    translation: Tensor | None,
    spacing: list[float],
    density: int,
    combine: int,
    cutoff: float,
    filled: Tensor | None,
) -> None: ...
def composite(
    background: Tensor,
    pixels: Tensor,
    mask: Tensor,
    sizes: Tensor,
    ptr: Tensor | None,
    place: Tensor | None,
    matrix: Tensor | None,
    mix: int,
    nearest: bool,
    taps: list[float],
    zero_edge: bool,
    channels_last: bool,
    labels: bool,
) -> tuple[Tensor, Tensor, Tensor]: ...

class AveragePlan:
    def __init__(
        self,
        averages: list[Tensor],
        remainders: list[Tensor],
        weights: list[Tensor],
        rounding: int,
        streams: list[int],
    ) -> None: ...
    def update(self, rates: Tensor | list[float], seed: int, step: int) -> None: ...
