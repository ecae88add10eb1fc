"""Layers: thin modules over `fastnuggets.ops`."""

from fastnuggets.nn.inverse import Deconvolution
from fastnuggets.nn.voxelize import Voxelizer, rotations

__all__ = ["Deconvolution", "Voxelizer", "rotations"]
