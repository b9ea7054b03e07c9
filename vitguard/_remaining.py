"""Which attacks remain when only some tensors are plain: one rule for each.

Equations and unknowns of docs/methods.md 2.1 to 2.5b, at batch size 1, where exact attacks are
strongest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vitguard.vit import Anatomy, Block

__all__ = ["RULES", "Released", "Remaining"]


@dataclass(frozen=True)
class Remaining:
    """One attack under a selection: whether it remains, what it reads, and why.

    `needs` are the tensors that it reads where it remains, else those of which one is missing.
    """

    attack: str
    possible: bool
    needs: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Released:
    """What an attack would read of an update.

    Args:
        anatomy: Names and sizes of the model.
        sizes: Number of values of each tensor that is released, plain or encrypted.
        plain: Those of them that can be read.
        positions: How positions are trained.
    """

    anatomy: Anatomy
    sizes: dict[str, int]
    plain: frozenset[str]
    positions: str

    @property
    def patch_rank(self) -> int:
        """Unknowns of a patch: the rank of the patches' span, or all pixels where it is hidden."""
        a = self.anatomy
        if a.patch_weight in self.plain:
            return min(a.patches, a.patch_pixels, a.width)
        return a.patch_pixels

    @property
    def equations(self) -> int:
        """Equations that one norm's plain rows give: D - T."""
        return self.anatomy.width - self.anatomy.tokens

    def hidden(self, *names: str) -> tuple[str, ...]:
        """Those of `names` that cannot be read."""
        return tuple(n for n in names if n not in self.plain)

    def why_hidden(self, name: str) -> str:
        """Say why a name cannot be read."""
        if name in self.sizes:
            return f"{name} is encrypted"
        return f"{name} has no gradient in the update"


def _verdict(
    plain: Released, attack: str, needs: tuple[str, ...], obstacle: str, remains: str
) -> Remaining:
    """An obstacle ends it; else a hidden tensor does; else it remains."""
    if obstacle:
        return Remaining(attack, False, needs, obstacle)
    if hidden := plain.hidden(*needs):
        return Remaining(attack, False, needs, plain.why_hidden(hidden[0]))
    return Remaining(attack, True, needs, remains)


def _position(plain: Released) -> Remaining:
    a = plain.anatomy
    if a.positions is None:
        return Remaining("position", False, (), "no absolute position embedding")
    return _verdict(
        plain,
        "position",
        (a.positions, a.patch_weight),
        "; ".join(a.obstacles),
        "both gradients are plain: G^T X = dL/dW gives the image back by least squares"
        + (", exactly" if a.patches <= a.width else ", in minimum norm"),
    )


@dataclass(frozen=True)
class _Site:
    """A norm along the residual stream: whose rows say what enters it, and how to get there."""

    where: str
    rows: tuple[str, ...]
    link: str | None


def _spanning(anatomy: Anatomy, *, deep: bool = False) -> tuple[Block, ...]:
    """The blocks whose gradient rows span all tokens; with `deep`, of the second MLP layer too.

    With a class token only its own row leaves the last block, and what all tokens send back into
    it passes its attention heads, so that the block before lacks full rank in its last layer.
    """
    cut = (2 if deep else 1) if anatomy.pooling == "token" else 0
    return anatomy.blocks[: len(anatomy.blocks) - cut]


def _sites(anatomy: Anatomy) -> Iterator[_Site]:
    """The norms in order, each with the weight whose output joined the stream just before."""
    link = None
    for number, block in enumerate(_spanning(anatomy)):
        yield _Site(f"block {number}, query-key-value", block.qkv, link)
        fc1 = (f"{block.fc1}.weight",)
        yield _Site(f"block {number}, fc1", fc1, f"{block.proj}.weight")
        link = f"{block.fc2}.weight"


def _linear_obstacle(plain: Released) -> str:
    a = plain.anatomy
    if a.obstacles:
        return "; ".join(a.obstacles)
    if not a.blocks or not a.blocks[0].pre_norm:
        return "the first block is not x + attention(norm(x))"
    if not _spanning(a):
        return "the only block passes a class token alone: its rows do not span the tokens"
    if plain.equations <= 0:
        return f"{a.tokens} tokens fill the {a.width} dimensions: no equation is left"
    if a.positions is None:
        return "without absolute positions every patch has the same equations"
    if plain.positions in ("sincos", "none"):
        return (
            f"positions '{plain.positions}' are of low rank: the solution is not unique "
            "(minimum norm and the smoothest image remain)"
        )
    return ""


def _span(plain: Released) -> Remaining:
    """The two forms of attack `span`: query-key-value, or projection and fc1, of block 0."""
    obstacle = _linear_obstacle(plain)
    if obstacle:
        return Remaining("span", False, (), obstacle)
    a = plain.anatomy
    block, patch = a.blocks[0], a.patch_weight
    reads_patch = () if plain.hidden(patch) else (patch,)
    forms = (
        ("query, key and value", [(name,) for name in block.qkv], 0),
        ("projection and fc1", [(f"{block.proj}.weight", f"{block.fc1}.weight")], a.tokens),
    )
    reasons: list[str] = []
    for what, choices, more in forms:
        unknowns = plain.patch_rank + more + 1
        count = f"{unknowns} unknowns, {plain.equations} equations"
        needs = next((c for c in choices if not plain.hidden(*c)), None)
        if needs is None:
            reasons.append(plain.why_hidden(plain.hidden(*choices[0])[0]))
        elif unknowns > plain.equations:
            reasons.append(f"{what}: {count}")
        else:
            why = f"{what} of block 0 are plain; {count} for each patch"
            without = "" if reads_patch else ", without the patch gradient"
            return Remaining("span", True, (*reads_patch, *needs), why + without)
    return Remaining("span", False, (patch, *block.qkv), "; ".join(dict.fromkeys(reasons)))


def _chain(plain: Released) -> Remaining:
    """The same equations one norm after the other, as far as plain projections and fc2 lead.

    Each step adds the T directions of its layer's inputs to the unknowns. Norms cannot be pooled:
    what one leaves open is a mixture of tokens, and mixtures fit at every later norm as well.
    """
    obstacle = _linear_obstacle(plain)
    if obstacle:
        return Remaining("span-chain", False, (), obstacle)
    a = plain.anatomy
    reads = [] if plain.hidden(a.patch_weight) else [a.patch_weight]
    unknowns, seen = plain.patch_rank + 1, "no norm's rows are plain"
    for site in _sites(a):
        if site.link is not None:
            unknowns += a.tokens
            if site.link not in plain.plain:
                why = f"{plain.why_hidden(site.link)}, which ends the chain; before it {seen}"
                return Remaining("span-chain", False, (site.link,), why)
            reads.append(site.link)
        count = f"{unknowns} unknowns, {plain.equations} equations for each patch"
        if unknowns > plain.equations:
            why = f"at {site.where}: {count}; before it {seen}"
            return Remaining("span-chain", False, (*reads, site.rows[0]), why)
        rows = next((n for n in site.rows if n in plain.plain), None)
        if rows is not None:
            why = f"{site.where}: {count}"
            return Remaining("span-chain", True, (*reads, rows), why)
    return Remaining("span-chain", False, tuple(reads), seen)


def _gelu_span(plain: Released) -> Remaining:
    a = plain.anatomy
    if not a.blocks:
        return Remaining("gelu-span", False, (), "no block is known")
    block = a.blocks[0]
    fc1, fc2 = f"{block.fc1}.weight", f"{block.fc2}.weight"
    patch = () if plain.hidden(a.patch_weight) else (a.patch_weight,)
    unknowns = plain.patch_rank + a.tokens + 1
    equations = plain.equations + plain.sizes.get(fc2, 0) // a.width - a.tokens
    obstacle = "; ".join(a.obstacles)
    if not block.pre_norm:
        obstacle = "the first block is not x + attention(norm(x))"
    elif a.positions is None:
        obstacle = "without absolute positions every patch has the same equations"
    elif block.gated:
        obstacle = "the MLP multiplies two branches"
    elif not _spanning(a, deep=True):
        obstacle = "too few blocks above the first: its last layer's rows do not span the tokens"
    elif plain.equations <= 0:
        obstacle = f"{a.tokens} tokens fill the {a.width} dimensions: the spans saturate"
    elif equations < unknowns:
        obstacle = f"{unknowns} unknowns, {equations} equations for each patch"
    return _verdict(
        plain,
        "gelu-span",
        (*patch, f"{block.proj}.weight", fc1, fc2),
        obstacle,
        "projection, fc1 and fc2 of block 0 are plain: also batches, shuffled patches and "
        "sine-cosine positions, by a search that verifies itself",
    )


def _april(plain: Released) -> Remaining:
    a = plain.anatomy
    block = a.blocks[0] if a.blocks else None
    if block is None or block.pre_norm or block.residual:
        why = "a norm before the first attention or a residual around it: the identity fails"
        return Remaining("april", False, (), why)
    if a.positions is None:
        return Remaining("april", False, (), "no absolute position embedding")
    patch = (a.patch_weight,) if a.patch_pixels > a.width else ()
    needs = (a.positions, *block.qkv, *patch)
    return _verdict(plain, "april", needs, "", "attention reads the embedded sequence itself")


def _cascade(plain: Released) -> Remaining:
    a = plain.anatomy
    if not a.blocks or a.pooling != "token":
        why = f"pooling is {a.pooling!r}: the last MLP sees all tokens"
        return Remaining("cascade", False, (), why if a.blocks else "no block is known")
    last = a.blocks[-1]
    return _verdict(
        plain,
        "cascade",
        (f"{last.fc1}.weight", f"{last.fc2}.weight"),
        "the MLP multiplies two branches" if last.gated else "",
        "labels and features of each image in a batch, but no images",
    )


def _labels(plain: Released) -> Remaining:
    names = [n for n in plain.sizes if plain.anatomy.role(n) == "head"]
    readable = tuple(n for n in names if n in plain.plain)
    if readable:
        return Remaining("labels", True, readable, "the head's gradient tells the labels")
    return Remaining("labels", False, tuple(names), "the head has no plain gradient")


def _tokens(plain: Released) -> Remaining:
    """docs/methods.md 4.5, `deep-tokens`: measured, in no list of closed forms."""
    a = plain.anatomy
    if plain.equations <= 0:
        why = f"{a.tokens} tokens fill the {a.width} dimensions: the spans saturate"
        return Remaining("token-search", False, (), why)
    for number, block in enumerate(_spanning(a, deep=True)):
        needs = (f"{block.fc1}.weight", f"{block.fc2}.weight")
        if not block.gated and not plain.hidden(*needs):
            why = (
                f"both MLP layers of block {number} are plain: a search finds tokens and inverts "
                "the blocks below (128 wide and 17 tokens: 127 dB); untried at 384 wide and more"
            )
            return Remaining("token-search", True, needs, why)
    return Remaining("token-search", False, (), "no block that it could read is plain")


def _matching(plain: Released) -> Remaining:
    count = sum(plain.sizes[n] for n in plain.plain)
    if not count:
        return Remaining("matching", False, (), "nothing is plain")
    share = count / sum(plain.sizes.values())
    why = (
        f"{share:.0%} of the gradient is plain and dummy images can be fitted to it; no count "
        "says how far that gets: try it with audit"
    )
    return Remaining("matching", True, tuple(n for n in plain.sizes if n in plain.plain), why)


RULES: tuple[Callable[[Released], Remaining], ...] = (
    _position, _span, _chain, _gelu_span, _april, _cascade, _labels, _tokens, _matching,
)  # fmt: skip
