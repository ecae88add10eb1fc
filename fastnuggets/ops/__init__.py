"""The ops: checked arguments in, registered kernels underneath, each with its contract in its docstring."""

from fastnuggets.ops.voxelize import atom_relevance, voxelize

__all__ = ["atom_relevance", "voxelize"]
