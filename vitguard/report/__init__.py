"""The report of an audit, and its forms."""

from vitguard.report.audit_report import AuditReport
from vitguard.report.corridor import Corridor
from vitguard.report.finding import (
    MEANINGS,
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
    "Corridor",
    "Finding",
    "MEANINGS",
    "Mask",
    "ModelFacts",
    "Pictures",
    "Summary",
    "Verdict",
]
