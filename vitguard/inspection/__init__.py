"""Noticing weights that a server crafted: what a client can see before anything leaves."""

from vitguard.inspection.look import inspect_model, inspect_weights, load_exactly, weights_of
from vitguard.inspection.memory import Memory
from vitguard.inspection.recorder import Recorder
from vitguard.inspection.signs import SIGNS
from vitguard.inspection.verdict import Inspection, Sign

__all__ = [
    "SIGNS",
    "Inspection",
    "Memory",
    "Recorder",
    "Sign",
    "inspect_model",
    "inspect_weights",
    "load_exactly",
    "weights_of",
]
