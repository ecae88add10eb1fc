"""Training: the fit loop."""

from fastnuggets.training.fit import Checkpoint, Interrupted, fit, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "Interrupted", "fit", "load_checkpoint", "save_checkpoint"]
