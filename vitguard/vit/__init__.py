"""Anatomy: where a Vision Transformer keeps its patches, positions, tokens and blocks.

The only folder that knows the attribute names of timm, transformers and torchvision, one reader
each. Everything else asks an `Anatomy`, which names parameters and modules by role.
"""

from vitguard.core.parameters import canonical_name, canonical_parameters
from vitguard.vit import huggingface, timm, torchvision
from vitguard.vit.anatomy import READERS, Anatomy, Block
from vitguard.vit.passes import (
    checkpoints_refused,
    drops_patches,
    logits_of,
    loss_of,
    math_attention,
)

__all__ = [
    "Anatomy",
    "Block",
    "canonical_name",
    "canonical_parameters",
    "checkpoints_refused",
    "drops_patches",
    "logits_of",
    "loss_of",
    "math_attention",
]

READERS[:] = [timm.read, huggingface.read, torchvision.read]
