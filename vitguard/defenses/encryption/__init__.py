"""Encrypted gradients: CKKS that costs less than the plain upload."""

from vitguard.defenses.encryption.client import Decryptor, Encryptor, worst_error
from vitguard.defenses.encryption.defense import EncryptedGradients
from vitguard.defenses.encryption.keys import KeySet, ServerKeys
from vitguard.defenses.encryption.manifest import Entry, Manifest, model_version
from vitguard.defenses.encryption.presets import PRESETS, Preset, preset
from vitguard.defenses.encryption.server import Aggregator
from vitguard.defenses.encryption.signing import SigningKey
from vitguard.selectors import minimal_names, require_all_match, select_names

__all__ = [
    "Aggregator",
    "Decryptor",
    "EncryptedGradients",
    "Encryptor",
    "Entry",
    "KeySet",
    "Manifest",
    "PRESETS",
    "Preset",
    "ServerKeys",
    "SigningKey",
    "minimal_names",
    "model_version",
    "preset",
    "require_all_match",
    "select_names",
    "worst_error",
]
