"""Flower: a client mod that seals what leaves, and a strategy that adds what it cannot read."""

from __future__ import annotations

from importlib.util import find_spec

from vitguard.errors import missing_extra

if find_spec("flwr") is None:
    raise missing_extra("vitguard.federated.flower", "flwr", "flower")

from vitguard.federated.flower.adding import aggregate_metrics
from vitguard.federated.flower.client import ProtectMod, attach, encryptor
from vitguard.federated.flower.grid import InProcessGrid
from vitguard.federated.flower.keys import ClientKeys, Federation, make_keys
from vitguard.federated.flower.ledgers import LedgerGrid, Ledgers
from vitguard.federated.flower.masked_client import masker
from vitguard.federated.flower.masked_keys import (
    MaskedFederation,
    MaskingIdentity,
    write_masked_keys,
)
from vitguard.federated.flower.masked_server import MaskedFedAvg
from vitguard.federated.flower.server import EncryptedFedAvg

__all__ = [
    "ClientKeys",
    "EncryptedFedAvg",
    "Federation",
    "InProcessGrid",
    "LedgerGrid",
    "Ledgers",
    "MaskedFedAvg",
    "MaskedFederation",
    "MaskingIdentity",
    "ProtectMod",
    "aggregate_metrics",
    "attach",
    "encryptor",
    "make_keys",
    "masker",
    "write_masked_keys",
]
