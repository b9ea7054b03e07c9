"""What an update lets an attack read, and what that decides about one attack.

Counts are of docs/methods.md 2.1 to 2.5b, at batch size 1 unless a larger one is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from vitguard.core import Traits
from vitguard.vit import Anatomy, Block

__all__ = ["Released", "Remaining"]


@dataclass(frozen=True)
class Remaining:
    """One attack under a selection: whether it remains, what it reads, and why.

    `needs` are the tensors that it reads where it remains, else those of which one is missing.
    `exact` says that it gives the image itself, and not only something about it; `near`, that what
    it gives is the image in minimum norm.
    """

    attack: str
    possible: bool
    needs: tuple[str, ...]
    reason: str
    exact: bool = False
    near: bool = False

    @property
    def gives_away(self) -> bool:
        """Whether it gives the image away, exactly or in minimum norm."""
        return self.possible and (self.exact or self.near)


@dataclass(frozen=True)
class Released:
    """What an attack would read of an update.

    Args:
        anatomy: Names and sizes of the model.
        sizes: Number of values of each tensor that is released, plain or encrypted.
        plain: Those of them that can be read.
        traits: What the defenses make true of the update.
        every: Number of values of every parameter of the model, frozen ones too; empty where only
            the update is known.
        batch_size: Images behind the update.
    """

    anatomy: Anatomy
    sizes: dict[str, int]
    plain: frozenset[str]
    traits: Traits
    every: Mapping[str, int] = field(default_factory=dict)
    batch_size: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of all images together, T."""
        return self.batch_size * self.anatomy.tokens

    @property
    def patch_rank(self) -> int:
        """Unknowns of a patch: the rank of the patches' span, or all pixels where it is hidden."""
        a = self.anatomy
        if a.patch_weight in self.plain:
            return min(self.batch_size * a.patches, a.patch_pixels, a.width)
        return a.patch_pixels

    @property
    def equations(self) -> int:
        """Equations that one norm's plain rows give: D - T."""
        return self.anatomy.width - self.tokens

    @property
    def saturated(self) -> str:
        """Why no equation is left: the tokens fill the width; empty where some are."""
        if self.equations > 0:
            return ""
        whose = "" if self.batch_size == 1 else f" of {self.batch_size} images"
        return f"{self.tokens} tokens{whose} fill the {self.anatomy.width} dimensions"

    @property
    def low_rank(self) -> str:
        """Why the equations leave the patches open however many there are; empty if they do not."""
        return "the fixed positions are of low rank" if self.traits.low_rank else ""

    @cached_property
    def class_token_alone(self) -> bool:
        """Whether nothing but a class token leaves the last block.

        Not where the head is wider than one token: that of Dinov2 in transformers also reads the
        mean of the patches (one block: `span` 118 dB, where ViT's 4 heads end at rank 9). Nor where
        a class token joins behind the blocks (CaiT), and reads every patch of the last one.
        """
        a = self.anatomy
        known = self.every or self.sizes
        head = [size for name, size in known.items() if a.role(name) == "head"]
        one = max(head, default=0) <= a.classes * a.width
        return a.pooling == "token" and one and not a.readers

    @property
    def spanning(self) -> tuple[Block, ...]:
        """The blocks in which the gradient rows of every layer span all tokens.

        All of them but the last one under a class token: only its own row leaves that block. What
        the block before gets from it does pass few heads, but the norm in between turns every
        token's share its own way (its Jacobian subtracts the token itself), so that no layer there
        lacks rank. Measured at 17 tokens, widths 96 and 192, 3 to 12 heads, float32: at depth 2
        true tokens lie within 1e-5 (query-key-value, fc1) and 4e-5 (projection, fc2) of the spans
        of block 0, as close as at depth 3; `gelu-span` gives 72 to 101 dB. In the last block
        they lie 0.05 to 1 away.
        """
        blocks = self.anatomy.blocks
        return blocks[:-1] if self.class_token_alone else blocks

    def spans_attention(self, block: Block) -> bool:
        """Whether the query-key-value rows of a block span all tokens.

        In the last block under a class token each head adds one row of keys and one of values to
        the class token's query: 2 heads + 1 directions. At depth 1 and 17 tokens, `span` gives
        88 to 128 dB with 8 or 12 heads, and finds rank 13 and 7 with 6 and 3.
        """
        a = self.anatomy
        readers = max(len(a.head), 1)
        return (
            block in self.spanning
            or not block.heads
            or (readers * (2 * block.heads + 1) >= a.tokens)
        )

    @property
    def unknown(self) -> tuple[str, ...]:
        """Plain tensors of blocks that were not recognised: what these tell cannot be counted."""
        if self.anatomy.blocks:
            return ()
        a = self.anatomy
        unread = (n for n in self.sizes if a.role(n) in ("other", "position") and n != a.positions)
        return tuple(n for n in unread if n in self.plain)

    def without_blocks(self, attack: str) -> Remaining:
        """What can be said of an attack on blocks where none is known: it ends if all is hidden."""
        needs, why = self.unknown[:1], "no block is known"
        return Remaining(
            attack, bool(needs), needs, f"{why}: nothing shows that it ends" if needs else why
        )

    def verdict(
        self, attack: str, needs: tuple[str, ...], obstacle: str, remains: str
    ) -> Remaining:
        """An obstacle ends an attack; else a hidden tensor does; else it remains, and is exact."""
        if obstacle:
            return Remaining(attack, False, needs, obstacle)
        if hidden := self.hidden(*needs):
            return Remaining(attack, False, needs, self.why_hidden(hidden[0]))
        return Remaining(attack, True, needs, remains, exact=True)

    def hidden(self, *names: str) -> tuple[str, ...]:
        """Those of `names` that cannot be read."""
        return tuple(n for n in names if n not in self.plain)

    def why_hidden(self, name: str) -> str:
        """Say why a name cannot be read."""
        if name in self.sizes:
            return f"{name} is encrypted"
        return f"{name} has no gradient in the update"
