"""Networks, one file a system: no kernels and no training loop in here."""

from fastnuggets.models.center_detector import CenterDetector
from fastnuggets.models.conditional_aae import ConditionalAAE
from fastnuggets.models.fingerprint_autoencoder import FingerprintAAE, FingerprintAutoencoder, FingerprintVAE
from fastnuggets.models.fingerprint_predictor import FingerprintPredictor
from fastnuggets.models.wave_autoencoder import WaveAutoencoder

__all__ = [
    "CenterDetector",
    "ConditionalAAE",
    "FingerprintAAE",
    "FingerprintAutoencoder",
    "FingerprintPredictor",
    "FingerprintVAE",
    "WaveAutoencoder",
]
