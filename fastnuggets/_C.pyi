from collections.abc import Sequence

import torch
from torch import Tensor

def build_info() -> dict[str, object]: ...
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
    shape: Sequence[int],
    spacing: Sequence[float],
    density: int,
    combine: int,
    cutoff: float,
    dtype: torch.dtype,
    /,
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
    spacing: Sequence[float],
    density: int,
    combine: int,
    cutoff: float,
    /,
) -> None: ...
