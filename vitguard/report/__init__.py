"""The report of an audit, and its forms."""

from vitguard.report.audit_report import (
    MEANINGS,
    AuditReport,
    Baseline,
    Control,
    Finding,
    Mask,
    ModelFacts,
    Pictures,
    Summary,
    Verdict,
)

__all__ = [
    "AuditReport",
    "Baseline",
    "Control",
    "Finding",
    "MEANINGS",
    "Mask",
    "ModelFacts",
    "Pictures",
    "Summary",
    "Verdict",
]
