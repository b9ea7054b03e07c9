"""From tokens to images: which tokens belong together, and what the missing ones are."""

from __future__ import annotations

import torch
from torch import Tensor

from vitguard.attacks.equations.attention import Attention
from vitguard.attacks.gelu_span.search import Search

__all__ = ["complete_images", "complete_tokens"]

_WHOLE = 2e-3  # misfit of a complete image; one wrong token makes 1e-2 and more, true ones 5e-5
_LARGEST = 900  # unknowns of one completion
_EQUATIONS = 8  # of the attention for each unknown; more take longer and say no more


def complete_images(search: Search, attention: Attention) -> list[Tensor]:
    """Return the indices (by position) of the tokens of every image that is complete."""
    anatomy, found = search.anatomy, search.found
    count = torch.bincount(found.position, minlength=anatomy.patches)
    if int(count.min()) < 1:
        return []
    embedding = search.frame.embedding
    tokens, attended = search.embedded(found), found.attended
    left = torch.ones_like(found.position, dtype=torch.bool)
    images: list[Tensor] = []
    for seed in found.residual.argsort().tolist()[:40]:
        if not bool(left[seed]) or len(images) == search.view.update.batch_size:
            continue
        member, distance = attention.membership(
            tokens, attended, embedding.prefix, found.position, anatomy.patches, seed
        )
        if distance < _WHOLE and int(member.sum()) == anatomy.patches and bool(left[member].all()):
            rows = torch.nonzero(member)[:, 0]
            images.append(rows[found.position[rows].argsort()])
            left[rows] = False
    return images


def complete_tokens(
    search: Search, attention: Attention, own: Tensor, missing: Tensor, *, last: bool
) -> int:
    """Fill in the missing tokens of one image from its attention; return how many.

    The solution is a start for the MLP's equations. For the last image, where the attention itself
    holds to the accepted residual, it is a proof of its own, which repeated patches need. For an
    earlier one it is not: its own token may only have been counted to another image.

    Args:
        own: Which of the tokens found are of that image.
        missing: Positions of those that are not found, one that several share repeated.
        last: Every other image is complete.
    """
    found, anatomy = search.found, search.anatomy
    several = len(search.wanted) > anatomy.patches + 1  # who shares which is not known
    if several or not len(missing):
        return 0
    basis = search.remainder.basis
    unknowns = len(missing) * basis.shape[1]
    if unknowns > _LARGEST:
        return 0
    asked = torch.nonzero(own)[:, 0]
    asked = asked[torch.randperm(len(asked), generator=search.generator).to(asked.device)]
    asked = asked[: -(-_EQUATIONS * unknowns // anatomy.width)]
    if len(asked) * anatomy.width < 1.5 * unknowns:
        return 0
    embedding = search.frame.embedding
    tokens, attended = search.embedded(found), found.attended
    shift = search.frame.offset
    base = torch.cat([search.remainder.base(int(i)) for i in missing])
    draw = torch.randint(len(found.patch), (len(missing),), generator=search.generator)
    start = (found.patch[draw.to(missing.device)] - base) @ basis
    moved, residual = attention.complete(
        torch.cat([embedding.prefix, tokens[own]]), tokens[asked], attended[asked],
        embedding.weight @ basis, base @ embedding.weight.T + shift[missing], start,
        float(found.patch.std()),
    )  # fmt: skip
    patches = base + moved @ basis.T
    new = search.seed(missing, patches)
    if residual > search.accept or not last:
        return new
    for i, patch in zip(missing.tolist(), patches, strict=True):
        if int(search.missing()[i]) > 0 and _repeated(search, i, patch):
            search.add(i, patch, residual)
            new += 1
    return new


def _repeated(search: Search, position: int, patch: Tensor) -> bool:
    """Whether the patch is, to the attention's precision, one already found at the position."""
    here = search.found.patch[search.found.position == position]
    gap = (here - patch).square().mean(1).sqrt()
    return bool((gap < 0.02 * search.found.patch.std()).any())
