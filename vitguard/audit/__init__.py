"""The audit: what left a machine, attacked beside an undefended control."""

from vitguard.audit.beside_control import LocalTraining, audit
from vitguard.audit.received import audit_update
from vitguard.audit.seen import Seen, SeenRound, Share

__all__ = ["LocalTraining", "Seen", "SeenRound", "Share", "audit", "audit_update"]
