"""Masked aggregation: a sum that needs no key that all clients share."""

from vitguard.defenses.masking.client import MaskingClient
from vitguard.defenses.masking.defense import MaskedAggregation
from vitguard.defenses.masking.journal import Journal
from vitguard.defenses.masking.opener import SumOpener
from vitguard.defenses.masking.server import MaskingServer
from vitguard.defenses.masking.terms import Terms

__all__ = ["Journal", "MaskedAggregation", "MaskingClient", "MaskingServer", "SumOpener", "Terms"]
