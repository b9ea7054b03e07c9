"""The nouns that defenses, attacks and the audit share: Batch, Update, View, Guess."""

from vitguard.core.batch import Batch, Loss, Normalization
from vitguard.core.crafted import Bins, Crafted
from vitguard.core.guess import AffineSpace, Guess
from vitguard.core.names import tensors_by_name
from vitguard.core.update import LocalTraining, Update
from vitguard.core.view import Objective, Shuffle, Traits, View
from vitguard.errors import Blocked

__all__ = [
    "AffineSpace",
    "Batch",
    "Bins",
    "Blocked",
    "Crafted",
    "Guess",
    "LocalTraining",
    "Loss",
    "Normalization",
    "Objective",
    "Shuffle",
    "Traits",
    "Update",
    "View",
    "tensors_by_name",
]
