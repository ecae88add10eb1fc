"""Networks, one file a system: no kernels and no training loop in here."""

from fastnuggets.models.center_detector import CenterDetector
from fastnuggets.models.char_rnn import CharRNN
from fastnuggets.models.conditional_aae import ConditionalAAE
from fastnuggets.models.fingerprint_autoencoder import FingerprintAAE, FingerprintAutoencoder, FingerprintVAE
from fastnuggets.models.fingerprint_predictor import FingerprintPredictor
from fastnuggets.models.kernel_vae import KernelVAE
from fastnuggets.models.lenet import LeNet
from fastnuggets.models.smiles_aae import SmilesAAE
from fastnuggets.models.smiles_vae import SmilesVAE
from fastnuggets.models.vae import VAE, ConditionalVAE, JointVAE
from fastnuggets.models.vaeac import VAEAC
from fastnuggets.models.vaeac_conv import VAEACConv
from fastnuggets.models.wave_autoencoder import WaveAutoencoder

__all__ = [
    "VAE",
    "VAEAC",
    "CenterDetector",
    "CharRNN",
    "ConditionalAAE",
    "ConditionalVAE",
    "FingerprintAAE",
    "FingerprintAutoencoder",
    "FingerprintPredictor",
    "FingerprintVAE",
    "JointVAE",
    "KernelVAE",
    "LeNet",
    "SmilesAAE",
    "SmilesVAE",
    "VAEACConv",
    "WaveAutoencoder",
]
