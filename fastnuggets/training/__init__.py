"""Training: the fit loop, averages of weights and what belongs to them."""

from fastnuggets.training import schedules
from fastnuggets.training.batchnorm import update_bn
from fastnuggets.training.fit import Checkpoint, Interrupted, fit, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "Interrupted", "fit", "load_checkpoint", "save_checkpoint", "schedules", "update_bn"]
