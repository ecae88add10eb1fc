"""Every op in plain differentiable PyTorch: slow, short, and what the kernels are tested against."""

from fastnuggets.reference.voxelize import atom_relevance, voxelize

__all__ = ["atom_relevance", "voxelize"]
