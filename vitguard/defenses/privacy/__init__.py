"""Differential privacy: per record (`DifferentialPrivacy`) and per client (`ClientPrivacy`)."""

from vitguard.defenses.privacy.accounting import Ledger, PrivacySpent
from vitguard.defenses.privacy.canaries import NoiseProof, canary_scores, prove_noise
from vitguard.defenses.privacy.client import ClientPrivacy
from vitguard.defenses.privacy.defense import DifferentialPrivacy
from vitguard.defenses.privacy.distortion import mse_bound, unbiased_mse_bound
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
    "NoiseProof",
    "PerExample",
    "PrivacySpent",
    "audit_epsilon",
    "canary_audit",
    "canary_bound",
    "canary_scores",
    "measure_noise",
    "measure_sensitivity",
    "membership_bound",
    "mse_bound",
    "one_run_audit",
    "prove_noise",
    "reconstruction_bound",
    "unbiased_mse_bound",
]
