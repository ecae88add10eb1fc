"""Every op in plain differentiable PyTorch: slow, short, and what the kernels are tested against."""

from fastnuggets.reference.average import (
    adamw_step,
    average_update,
    join,
    sgd_step,
    split,
    stochastic_bfloat16,
    swag_update,
    weighted_sum,
)
from fastnuggets.reference.blend import composite
from fastnuggets.reference.filters import filter_taps, multiband_blend, pyr_down, pyr_up, transposed
from fastnuggets.reference.inverse import fit_atoms
from fastnuggets.reference.poisson import poisson_blend, random_walker
from fastnuggets.reference.sample import (
    gumbel_softmax,
    kl_log_uniform,
    kl_normal,
    noise,
    rsample_normal,
    scaled_noise,
    std_of,
)
from fastnuggets.reference.screen import tanimoto, tanimoto_topk
from fastnuggets.reference.voxelize import atom_relevance, voxelize

__all__ = [
    "adamw_step",
    "atom_relevance",
    "average_update",
    "composite",
    "filter_taps",
    "fit_atoms",
    "gumbel_softmax",
    "join",
    "kl_log_uniform",
    "kl_normal",
    "multiband_blend",
    "noise",
    "poisson_blend",
    "pyr_down",
    "pyr_up",
    "random_walker",
    "rsample_normal",
    "scaled_noise",
    "sgd_step",
    "split",
    "std_of",
    "stochastic_bfloat16",
    "swag_update",
    "tanimoto",
    "tanimoto_topk",
    "transposed",
    "voxelize",
    "weighted_sum",
]
