"""Deep tokens: a later block gives the image away where the first ones send nothing."""

from vitguard.attacks.deep_tokens.attack import DeepTokens

__all__ = ["DeepTokens"]
