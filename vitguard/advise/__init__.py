"""What to use for one's own model, batch and setting: `vitguard advise`."""

from vitguard.advise.advice import advise_report
from vitguard.advise.report import AdviceReport, Applies, Option, Proven

__all__ = ["AdviceReport", "Applies", "Option", "Proven", "advise_report"]
