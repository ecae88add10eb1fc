"""The ops: checked arguments in, registered kernels underneath, each with its contract in its docstring."""

from fastnuggets.ops.average import (
    AveragePlan,
    adamw_ema_step_,
    ema_update_,
    first_nonfinite,
    sgd_ema_step_,
    swa_update_,
    swag_sample_,
    swag_update_,
    swap_,
    weighted_sum_,
)
from fastnuggets.ops.inverse import Atoms, Conditioning, condition_number, deconvolve, find_atoms, kernel_warnings
from fastnuggets.ops.voxelize import GridBuffer, atom_relevance, voxelize

__all__ = [
    "Atoms",
    "AveragePlan",
    "Conditioning",
    "GridBuffer",
    "adamw_ema_step_",
    "atom_relevance",
    "condition_number",
    "deconvolve",
    "ema_update_",
    "find_atoms",
    "first_nonfinite",
    "kernel_warnings",
    "sgd_ema_step_",
    "swa_update_",
    "swag_sample_",
    "swag_update_",
    "swap_",
    "voxelize",
    "weighted_sum_",
]
