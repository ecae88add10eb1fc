"""Published systems, one file each: a network of `models`, its data and its losses, for `fastnuggets train`."""

from importlib import import_module

from fastnuggets.systems.base import Draw, Section, Settings, System, option

# The file is imported when the system is asked for.
SYSTEMS = {
    "wave-autoencoder": "wave_autoencoder:WaveAutoencoderSystem",
    "maccs-predictor": "maccs_predictor:MaccsPredictorSystem",
    "fingerprint-vae": "fingerprint_autoencoder:FingerprintVAESystem",
    "fingerprint-aae": "fingerprint_autoencoder:FingerprintAAESystem",
    "conditional-aae": "conditional_aae:ConditionalAAESystem",
    "char-rnn": "char_rnn:CharRNNSystem",
    "smiles-vae": "smiles_autoencoder:SmilesVAESystem",
    "smiles-aae": "smiles_autoencoder:SmilesAAESystem",
    "vaeac": "vaeac:VaeacSystem",
}


def find(name: str) -> type[System]:
    """The system of a name; ValueError that says which there are."""
    if name not in SYSTEMS:
        raise ValueError(f"there is no system {name!r}: {', '.join(SYSTEMS)}")
    module, kind = SYSTEMS[name].split(":")
    return getattr(import_module(f"fastnuggets.systems.{module}"), kind)


__all__ = ["SYSTEMS", "Draw", "Section", "Settings", "System", "find", "option"]
