"""Networks, one file a system: no kernels and no training loop in here."""

from fastnuggets.models.center_detector import CenterDetector
from fastnuggets.models.fingerprint_predictor import FingerprintPredictor
from fastnuggets.models.wave_autoencoder import WaveAutoencoder

__all__ = ["CenterDetector", "FingerprintPredictor", "WaveAutoencoder"]
