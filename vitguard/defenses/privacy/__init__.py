"""Differential privacy: per record (`DifferentialPrivacy`) and per client (`ClientPrivacy`)."""

from vitguard.defenses.privacy.accounting import Ledger, PrivacySpent
from vitguard.defenses.privacy.client import ClientPrivacy
from vitguard.defenses.privacy.defense import DifferentialPrivacy
from vitguard.defenses.privacy.losses import PerExample
from vitguard.defenses.privacy.membership import membership_bound
from vitguard.defenses.privacy.reconstruction import reconstruction_bound
from vitguard.defenses.privacy.verification import (
    audit_epsilon,
    canary_audit,
    canary_bound,
    measure_noise,
    measure_sensitivity,
    one_run_audit,
)

__all__ = [
    "ClientPrivacy",
    "DifferentialPrivacy",
    "Ledger",
    "PerExample",
    "PrivacySpent",
    "audit_epsilon",
    "canary_audit",
    "canary_bound",
    "measure_noise",
    "measure_sensitivity",
    "membership_bound",
    "one_run_audit",
    "reconstruction_bound",
]
