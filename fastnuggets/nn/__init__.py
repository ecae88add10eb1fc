"""Layers: thin modules over `fastnuggets.ops`."""

from fastnuggets.nn.dropout import ConcreteDropout, Dropout, GaussianDropout, StochasticDepth
from fastnuggets.nn.encoder import GaussianEncoder
from fastnuggets.nn.inverse import Deconvolution
from fastnuggets.nn.predict import Prediction, mc_predict
from fastnuggets.nn.stochastic import Stochastic, sampling, weight_scaling_
from fastnuggets.nn.voxelize import Voxelizer, rotations

__all__ = [
    "ConcreteDropout",
    "Deconvolution",
    "Dropout",
    "GaussianDropout",
    "GaussianEncoder",
    "Prediction",
    "Stochastic",
    "StochasticDepth",
    "Voxelizer",
    "mc_predict",
    "rotations",
    "sampling",
    "weight_scaling_",
]
