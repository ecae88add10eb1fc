"""Layers: thin modules over `fastnuggets.ops`."""

from fastnuggets.nn.inverse import Deconvolution
from fastnuggets.nn.stochastic import Stochastic, sampling, weight_scaling_
from fastnuggets.nn.voxelize import Voxelizer, rotations

__all__ = ["Deconvolution", "Stochastic", "Voxelizer", "rotations", "sampling", "weight_scaling_"]
