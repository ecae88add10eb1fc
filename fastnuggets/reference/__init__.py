"""Every op in plain differentiable PyTorch: slow, short, and what the kernels are tested against."""

from fastnuggets.reference.inverse import fit_atoms
from fastnuggets.reference.voxelize import atom_relevance, voxelize

__all__ = ["atom_relevance", "fit_atoms", "voxelize"]
