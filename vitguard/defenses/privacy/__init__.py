"""Differential privacy: per record (`DifferentialPrivacy`) and per client (`ClientPrivacy`)."""

from vitguard.defenses.privacy.accounting import Ledger, PrivacySpent
from vitguard.defenses.privacy.defense import DifferentialPrivacy
from vitguard.defenses.privacy.losses import PerExample

__all__ = ["DifferentialPrivacy", "Ledger", "PerExample", "PrivacySpent"]
