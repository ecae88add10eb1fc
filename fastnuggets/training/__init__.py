"""Training: the fit loop, averages of weights and what belongs to them."""

from fastnuggets.training import schedules
from fastnuggets.training.averaging import WeightAverager
from fastnuggets.training.batchnorm import update_bn
from fastnuggets.training.curves import Curve, CurveLoss, LossPlane, loss_plane, plot_curve, plot_plane
from fastnuggets.training.decay import EmaDecay
from fastnuggets.training.distributed import DistributedAverager
from fastnuggets.training.ensembles import FastGeometricEnsemble, SnapshotEnsemble, swag_predict
from fastnuggets.training.fit import (
    Checkpoint,
    Interrupted,
    Update,
    Validation,
    fit,
    load_checkpoint,
    save_checkpoint,
)
from fastnuggets.training.log import read_log
from fastnuggets.training.optimizers import AveragedAdamW, AveragedSGD
from fastnuggets.training.soup import GreedySoup, Soup, average_checkpoints, greedy_soup

__all__ = [
    "AveragedAdamW",
    "AveragedSGD",
    "Checkpoint",
    "Curve",
    "CurveLoss",
    "DistributedAverager",
    "EmaDecay",
    "FastGeometricEnsemble",
    "GreedySoup",
    "Interrupted",
    "LossPlane",
    "SnapshotEnsemble",
    "Soup",
    "Update",
    "Validation",
    "WeightAverager",
    "average_checkpoints",
    "fit",
    "greedy_soup",
    "load_checkpoint",
    "loss_plane",
    "plot_curve",
    "plot_plane",
    "read_log",
    "save_checkpoint",
    "schedules",
    "swag_predict",
    "update_bn",
]
