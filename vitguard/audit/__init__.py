"""The audit: what left a machine, attacked beside an undefended control."""

from vitguard.audit.beside_control import LocalTraining, audit
from vitguard.audit.received import audit_update

__all__ = ["LocalTraining", "audit", "audit_update"]
