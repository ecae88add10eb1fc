"""Layers: thin modules over `fastnuggets.ops`."""

from fastnuggets.nn.bayes import BayesConv1d, BayesConv2d, BayesConv3d, BayesLinear, bayesianize
from fastnuggets.nn.deep_prior import DeepWeightPrior, dwp_init_, harvest
from fastnuggets.nn.dropout import ConcreteDropout, Dropout, GaussianDropout, StochasticDepth
from fastnuggets.nn.encoder import GaussianEncoder
from fastnuggets.nn.inverse import Deconvolution
from fastnuggets.nn.paste import Copied, CopyPaste, Pasted, RandomPaste
from fastnuggets.nn.predict import Prediction, mc_predict
from fastnuggets.nn.stochastic import Stochastic, sampling, weight_scaling_
from fastnuggets.nn.variance import (
    VarianceConv1d,
    VarianceConv2d,
    VarianceConv3d,
    VarianceLinear,
    VariationalDropoutConv1d,
    VariationalDropoutConv2d,
    VariationalDropoutConv3d,
    VariationalDropoutLinear,
)
from fastnuggets.nn.voxelize import Voxelizer, rotations
from fastnuggets.nn.weights import kl

__all__ = [
    "BayesConv1d",
    "BayesConv2d",
    "BayesConv3d",
    "BayesLinear",
    "ConcreteDropout",
    "Copied",
    "CopyPaste",
    "Deconvolution",
    "DeepWeightPrior",
    "Dropout",
    "GaussianDropout",
    "GaussianEncoder",
    "Pasted",
    "Prediction",
    "RandomPaste",
    "Stochastic",
    "StochasticDepth",
    "VarianceConv1d",
    "VarianceConv2d",
    "VarianceConv3d",
    "VarianceLinear",
    "VariationalDropoutConv1d",
    "VariationalDropoutConv2d",
    "VariationalDropoutConv3d",
    "VariationalDropoutLinear",
    "Voxelizer",
    "bayesianize",
    "dwp_init_",
    "harvest",
    "kl",
    "mc_predict",
    "rotations",
    "sampling",
    "weight_scaling_",
]
