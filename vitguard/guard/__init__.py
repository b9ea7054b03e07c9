"""protect(), and Guard: defenses folded around a model and one local step."""

from vitguard.defenses.protection import Protection
from vitguard.guard.handle import Guard
from vitguard.guard.protect import Stack, protect, stack_of

__all__ = ["Guard", "Protection", "Stack", "protect", "stack_of"]
