"""The ops: checked arguments in, registered kernels underneath, each with its contract in its docstring."""

from fastnuggets.ops.inverse import Atoms, Conditioning, condition_number, deconvolve, find_atoms, kernel_warnings
from fastnuggets.ops.voxelize import GridBuffer, atom_relevance, voxelize

__all__ = [
    "Atoms",
    "Conditioning",
    "GridBuffer",
    "atom_relevance",
    "condition_number",
    "deconvolve",
    "find_atoms",
    "kernel_warnings",
    "voxelize",
]
