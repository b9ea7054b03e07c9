"""vitguard keeps training images private when Vision Transformers train on others' machines.

Defenses: a thing in, a safer thing of the same kind out. Attacks: what the adversary sees in, a
guess out. The audit compares the guess with the truth beside an undefended control.

    import vitguard as vg

    guard = vg.protect(model, [vg.FixedPositions("sincos"), vg.PatchShuffle(ratio=0.5)])
    report = vg.audit(model, (images, labels), defenses=[vg.FixedPositions("frozen")])
    report.save("report.html")

Names load when they are used: importing vitguard imports nothing else, not even torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Anatomy": "vitguard.vit",
    "AuditReport": "vitguard.report",
    "BatchFloor": "vitguard.defenses.batch_floor",
    "CuriousServer": "vitguard.threats",
    "ClientPrivacy": "vitguard.defenses.privacy",
    "DifferentialPrivacy": "vitguard.defenses.privacy",
    "EncryptedGradients": "vitguard.defenses.encryption",
    "FGSM": "vitguard.attacks.fgsm",
    "FixedPositions": "vitguard.defenses.positions",
    "FrozenStem": "vitguard.defenses.frozen_stem",
    "GradientNoise": "vitguard.defenses.noise",
    "GradientPruning": "vitguard.defenses.pruning",
    "InspectWeights": "vitguard.defenses.inspecting",
    "LeakGate": "vitguard.defenses.gate",
    "Guard": "vitguard.guard",
    "LocalTraining": "vitguard.audit",
    "LowRankUpdate": "vitguard.defenses.low_rank",
    "MaliciousServer": "vitguard.threats",
    "MaskedAggregation": "vitguard.defenses.masking",
    "Normalization": "vitguard.core",
    "PatchShuffle": "vitguard.defenses.shuffle",
    "QuantisedUpdate": "vitguard.defenses.quantised_update",
    "SampleNormalisation": "vitguard.defenses.sample_normalisation",
    "SignUpdate": "vitguard.defenses.sign_update",
    "Update": "vitguard.core",
    "WithheldPositions": "vitguard.defenses.positions",
    "audit": "vitguard.audit",
    "audit_update": "vitguard.audit.received",
    "protect": "vitguard.guard",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from vitguard.attacks.fgsm import FGSM as FGSM
    from vitguard.audit import LocalTraining as LocalTraining
    from vitguard.audit import audit as audit
    from vitguard.audit.received import audit_update as audit_update
    from vitguard.core import Normalization as Normalization
    from vitguard.core import Update as Update
    from vitguard.defenses.batch_floor import BatchFloor as BatchFloor
    from vitguard.defenses.encryption import EncryptedGradients as EncryptedGradients
    from vitguard.defenses.frozen_stem import FrozenStem as FrozenStem
    from vitguard.defenses.gate import LeakGate as LeakGate
    from vitguard.defenses.inspecting import InspectWeights as InspectWeights
    from vitguard.defenses.low_rank import LowRankUpdate as LowRankUpdate
    from vitguard.defenses.masking import MaskedAggregation as MaskedAggregation
    from vitguard.defenses.noise import GradientNoise as GradientNoise
    from vitguard.defenses.positions import FixedPositions as FixedPositions
    from vitguard.defenses.positions import WithheldPositions as WithheldPositions
    from vitguard.defenses.privacy import ClientPrivacy as ClientPrivacy
    from vitguard.defenses.privacy import DifferentialPrivacy as DifferentialPrivacy
    from vitguard.defenses.pruning import GradientPruning as GradientPruning
    from vitguard.defenses.quantised_update import QuantisedUpdate as QuantisedUpdate
    from vitguard.defenses.sample_normalisation import SampleNormalisation as SampleNormalisation
    from vitguard.defenses.shuffle import PatchShuffle as PatchShuffle
    from vitguard.defenses.sign_update import SignUpdate as SignUpdate
    from vitguard.guard import Guard as Guard
    from vitguard.guard import protect as protect
    from vitguard.report import AuditReport as AuditReport
    from vitguard.threats import CuriousServer as CuriousServer
    from vitguard.threats import MaliciousServer as MaliciousServer
    from vitguard.vit import Anatomy as Anatomy


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitguard' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


class _Package(ModuleType):
    """Importing the module `vitguard.audit` must not put it in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
