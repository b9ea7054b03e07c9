"""What an update still lets the exact attacks of a block do: equations against unknowns.

Counts of docs/methods.md 2.4, 2.4b and 4.5, of as many images as are behind the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vitguard.attacks.equations.places import SAME_EQUATIONS
from vitguard.released import Released, Remaining

__all__ = ["chain_remains", "gelu_span_remains", "span_remains", "token_search_remains"]

_OPEN = 1 / 8  # leaks were measured at 0.03 and 0.09
_ROOM = 2  # up to half the positions beyond the width: 24 of 49 and 18 of 196 were still apart


@dataclass(frozen=True)
class _Site:
    """A norm along the residual stream: whose rows say what enters it, and how to get there."""

    where: str
    rows: tuple[str, ...]
    link: str | None


def _sites(plain: Released) -> Iterator[_Site]:
    """The norms in order, each with the weight whose output joined the stream just before."""
    link = None
    for number, block in enumerate(plain.anatomy.blocks):
        if not plain.spans_attention(block):
            return
        yield _Site(f"block {number}, query-key-value", block.qkv, link)
        if block not in plain.spanning:
            return
        fc1 = (f"{block.fc1}.weight",)
        yield _Site(f"block {number}, fc1", fc1, f"{block.proj}.weight")
        link = f"{block.fc2}.weight"


def _linear_obstacle(plain: Released) -> str:
    a = plain.anatomy
    if a.obstacles:
        return "; ".join(a.obstacles)
    if not a.blocks or not a.blocks[0].pre_norm:
        return "the first block is not x + attention(norm(x))"
    if not plain.spans_attention(a.blocks[0]):
        return (
            f"the only block passes a class token alone, through {a.blocks[0].heads} heads: "
            "its rows do not span the tokens"
        )
    if plain.saturated:
        return f"{plain.saturated}: no equation is left"
    if a.positions is None or plain.traits.positions == "none":
        return SAME_EQUATIONS
    return ""


def _solved(
    plain: Released, attack: str, where: str, needs: tuple[str, ...], nuisance: int
) -> Remaining:
    """Count the equations of one norm against a patch, its scale and `nuisance` other unknowns.

    Where they leave something open, the smoothest image that fits them can still be the image
    (26 dB of ViT-S/16, whose count lacks 10) or tell it from others (all of 6 images from 100
    decoys at depth 2, 32 and 48 px, sine-cosine positions). Without the patch gradient it came 9 to
    24 dB above the best blind guess on 6 of 6 images where 6 of 193 unknowns are open, 7 to 13 dB
    on 4 of 6 where 18 are. So that remains too where the equations are not used up by what is no
    patch; without the patch gradient up to a share of open unknowns.
    """
    reads = () if plain.hidden(plain.anatomy.patch_weight) else (plain.anatomy.patch_weight,)
    unknowns = plain.patch_rank + nuisance + 1
    count = f"{unknowns} unknowns, {plain.equations} equations for each patch"
    count += "" if reads else ", without the patch gradient"
    enough = unknowns <= plain.equations
    if plain.batch_size > 1 and nuisance < plain.equations:
        why = f"not exactly ({where}: {plain.batch_size} images share each position's equations)"
        return Remaining(attack, True, (*reads, *needs), f"{why}, but as the smoothest image")
    if enough and not plain.low_rank:
        return Remaining(attack, True, (*reads, *needs), f"{where}: {count}", exact=True)
    open_share = 1 - plain.equations / unknowns
    if enough or (nuisance < plain.equations and (reads or open_share <= _OPEN)):
        why = f"not exactly ({where}: {plain.low_rank or count}), but as the smoothest image"
        return Remaining(attack, True, (*reads, *needs), why)
    return Remaining(attack, False, (*reads, *needs), f"{where}: {count}")


def span_remains(plain: Released) -> Remaining:
    """The two forms of attack `span`: query-key-value, or projection and fc1, of block 0."""
    if not plain.anatomy.blocks:
        return plain.without_blocks("span")
    obstacle = _linear_obstacle(plain)
    if obstacle:
        return Remaining("span", False, (), obstacle)
    a = plain.anatomy
    block = a.blocks[0]
    if not block.qkv:
        return _unnamed(plain, f"{block.attention}.")
    attention: list[tuple[str, ...]] = [(name,) for name in block.qkv]
    forms = [("query, key and value", attention, 0)]
    if block in plain.spanning:
        layer = (f"{block.proj}.weight", f"{block.fc1}.weight")
        forms.append(("projection and fc1", [layer], plain.tokens))
    found: list[Remaining] = []
    reasons: list[str] = []
    for what, choices, nuisance in forms:
        needs = next((c for c in choices if not plain.hidden(*c)), None)
        if needs is None:
            reasons.append(plain.why_hidden(plain.hidden(*choices[0])[0]))
            continue
        found.append(_solved(plain, "span", f"{what} of block 0", needs, nuisance))
        reasons.append(found[-1].reason)
    best = max(found, key=lambda f: (f.exact, f.possible), default=None)
    if best is not None and best.possible:
        return best
    needs = (a.patch_weight, *block.qkv)
    return Remaining("span", False, needs, "; ".join(dict.fromkeys(reasons)))


def _unnamed(plain: Released, inside: str) -> Remaining:
    """What can be said of `span` where nobody knows which layer makes query, key and value."""
    needs = tuple(n for n in plain.sizes if n in plain.plain and n.startswith(inside))[:1]
    why = "which layers make query, key and value of block 0 is not known"
    why += ": nothing shows that it ends" if needs else ", and none is plain"
    return Remaining("span", bool(needs), needs, why)


def chain_remains(plain: Released) -> Remaining:
    """The same equations, norm by norm, up to the first projection or fc2 that is not plain.

    Each step adds the T directions of its layer's inputs to the unknowns. Norms cannot be pooled:
    what one leaves open is a mixture of tokens, and mixtures fit at every later norm as well. So
    the first norm whose rows are plain says most.
    """
    if not plain.anatomy.blocks:
        return plain.without_blocks("span-chain")
    obstacle = _linear_obstacle(plain)
    if obstacle:
        return Remaining("span-chain", False, (), obstacle)
    reads: list[str] = []
    for site in _sites(plain):
        if site.link is not None:
            if site.link not in plain.plain:
                why = f"{plain.why_hidden(site.link)}, which ends the chain; before it no norm's"
                return Remaining("span-chain", False, (site.link,), f"{why} rows are plain")
            reads.append(site.link)
        rows = next((n for n in site.rows if n in plain.plain), None)
        if rows is not None:
            nuisance = plain.tokens * len(reads)
            return _solved(plain, "span-chain", site.where, (*reads, rows), nuisance)
    return Remaining("span-chain", False, tuple(reads), "no norm's rows are plain")


def gelu_span_remains(plain: Released) -> Remaining:
    a = plain.anatomy
    if not a.blocks:
        return plain.without_blocks("gelu-span")
    block = a.blocks[0]
    fc1, fc2 = f"{block.fc1}.weight", f"{block.fc2}.weight"
    patch = () if plain.hidden(a.patch_weight) else (a.patch_weight,)
    unknowns = plain.patch_rank + plain.tokens + 1
    attention = any(n in plain.plain for n in block.qkv)  # whose norm sees no attention output
    moves = plain.patch_rank + (0 if attention else plain.tokens)
    equations = plain.equations + plain.sizes.get(fc2, 0) // a.width - plain.tokens
    obstacle = "; ".join(a.obstacles)
    if not block.pre_norm:
        obstacle = "the first block is not x + attention(norm(x))"
    elif block.gated:
        obstacle = "the MLP multiplies two branches"
    elif block not in plain.spanning:
        obstacle = (
            "the only block passes a class token alone: its MLP's rows do not span the tokens"
        )
    elif plain.saturated:
        obstacle = f"{plain.saturated}: the spans saturate"
    elif equations < unknowns:
        obstacle = f"{unknowns} unknowns, {equations} equations for each patch"
    elif not patch and moves >= a.width:
        # measured at 192 wide and 192 pixels a patch; at 256 wide it gives 92 to 113 dB
        obstacle = f"{moves} directions fill the {a.width}: without the patch gradient a token fits"
        obstacle += " at any position"
    elif plain.patch_rank + plain.tokens > a.width + a.patches / _ROOM and _told(plain):
        # a batch whose positions the attack found too near each other (17 and 5 tokens an image,
        # width 64 to 192) had at least that many, one that it could search had fewer
        why = (
            f"not exactly: {plain.tokens} tokens and {plain.patch_rank} directions of patches fill "
        )
        why += f"the {a.width}, so that a token may fit at positions that are not its own"
        needs = (*patch, f"{block.proj}.weight", fc1, fc2)
        if not plain.hidden(*needs):
            return Remaining("gelu-span", True, needs, why)
    return plain.verdict(
        "gelu-span",
        (*patch, f"{block.proj}.weight", fc1, fc2),
        obstacle,
        "projection, fc1 and fc2 of block 0 are plain: also batches, shuffled patches, no and "
        "sine-cosine positions, by a search that verifies itself",
    )


def _told(plain: Released) -> bool:
    """Whether several images have positions of their own, which a token may be mistaken in."""
    own = plain.anatomy.positions is not None and plain.traits.positions != "none"
    return plain.batch_size > 1 and own


def token_search_remains(plain: Released) -> Remaining:
    """docs/methods.md 2.5e: what attack `deep-tokens` searches, in no list of closed forms.

    Every block that it could read has full rank, see `Released.spanning`: at depth 2 true tokens
    lie within 4e-5 of both spans of block 0, at depth 3 within 9e-5 of those of block 1. The tokens
    are the image itself where a patch has no more pixels than they have numbers, less the two of a
    norm; else the most natural image of these tokens (DINOv2-small, 588 pixels and 384: 35 dB).
    Where they fill the width, fc2 leaves hidden - T equations for D unknowns: six rounds found 14
    of 64 tokens of width 64 with mean pooling, 2 of 65 with a class token, none of 128.
    """
    a = plain.anatomy
    if not a.blocks:
        return plain.without_blocks("token-search")
    for number, block in enumerate(plain.spanning):
        needs = (f"{block.fc1}.weight", f"{block.fc2}.weight")
        if not block.pre_norm or block.gated or plain.hidden(*needs):
            continue
        why = f"both MLP layers of block {number} are plain"
        if plain.saturated:
            left = plain.sizes[needs[1]] // a.width - plain.tokens
            if left <= a.width:
                return Remaining("token-search", False, (), f"{plain.saturated}, and the MLP's")
            why += f" ({plain.saturated}): a search by fc2 alone finds single tokens"
            return Remaining("token-search", True, needs, why)
        why += ": a search finds all tokens and inverts the blocks below"
        if plain.batch_size > 1 or plain.traits.shuffle is not None:
            why += "; untried on batches and on shuffled patches"
            return Remaining("token-search", True, needs, why)
        exact = a.patch_pixels <= a.width - 2
        why += "" if exact else f", the rest of {a.patch_pixels} pixels a patch by a prior"
        return Remaining("token-search", True, needs, why, exact=exact, near=not exact)
    return Remaining("token-search", False, (), "no block that it could read is plain")
