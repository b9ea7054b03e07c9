"""Imprint reading: what a server that wrote the weights reads from the gradients of its bins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.budget import charge_update
from vitguard.attacks.equations.head import linear_head
from vitguard.attacks.equations.rows import Embedding, guess_from_patches
from vitguard.attacks.imprint.bank import Bank, Single, Tokens, peeled
from vitguard.attacks.imprint.sums import banks_of, lone_features
from vitguard.attacks.imprint.turned import labelled, of_head
from vitguard.attacks.labels import labels_from_counts
from vitguard.core import Guess, View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy, logits_of

__all__ = ["ImprintReading"]

_WRONG = 0.01  # root mean square error, in pixels of [0, 1], that a verified patch has at most
_HIDDEN = 0.01  # share of a patch's directions that the token may lack
_EMPTY = 1e-3  # weight of a token that is none, relative to the largest in the update
_SCANT = 0.2  # the same, where gradients have noise
_FEW = 0.25  # share of the tokens below which gradients that are not exact are read as noisy ones
_AGREE = 3  # tokens of one weight from which each proves that the others are single ones
_APART = 1e-4  # relative difference of two images' weights at least


@dataclass(frozen=True)
class ImprintReading(Attack):
    """Read single tokens from neighbouring rows of a malicious server's bins, then their patches.

    A row of fc1 sums the tokens above its threshold, so that neighbouring rows differ by the tokens
    between their thresholds. One token alone is told from a mixture by its length, which LayerNorm
    makes the same for all; a known token is taken out of its bins along other directions, where it
    may leave another one alone. Rounds of the same images that measure along other directions are
    read together. The constant that the server added gives its scale back, the
    pseudo-inverse of the patch weight its patch. A sum of several clients is read like a batch.
    Patches that the token keeps up to one in a hundred of their directions can be verified.

    Guarantees:
        A patch is marked `verified` only where its token has the length of a single one, up to a
        difference that 40 dB allow, and as much weight as two others at least, as the tokens of one
        image have. Where a class token turned to one position of each image: the weight that some
        label gives it, up to 1e-5 of it; from a head of zeros, a label that no other image has.

    Does not protect against:
        Mixtures of three tokens and more that have both by chance: strong evidence, no proof.
        None was seen among 20,000 patches of batches of 8 to 64.

    Raises:
        NotApplicable: The server did not write such bins, or no token stands alone.
        Blocked: The gradient of fc1 cannot be read.

    References:
        arXiv 2110.13057, docs/methods.md 2.7.
    """

    name: ClassVar[str] = "imprint"
    family: ClassVar[str] = "closed-form"
    rung: ClassVar[Rung | None] = Rung(5, 5)
    proves_crafted: ClassVar[bool] = True

    def share(self, view: View) -> float:
        """Skip the rung where the weights are honest."""
        return float(view.crafted is not None and bool(view.crafted.bins))

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return as many images as are behind the update; patches that were not found are flat."""
        if view.crafted is None or not view.crafted.bins:
            why = view.crafted.unwritten if view.crafted is not None else ""
            raise NotApplicable(why or "the server wrote no bins into the weights")
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        first = view.crafted.bins[0]
        if first.kind == "feature":
            alone = lone_features(view.gradient(steps=True), anatomy, first)
            raise NotApplicable(
                f"the client keeps its own frozen weights: {alone} tokens stand alone in what "
                f"{first.layer} reads, behind attention, and no patch follows from them"
            )
        rounds = (view, *view.earlier)
        embedding = Embedding.of(view, anatomy)
        offset = embedding.offset
        if view.unknown is not None:  # moved patches have one embedding for their position
            moved = view.unknown.to(offset).reshape(1, -1)
            offset = torch.cat([offset, moved + view.bias(anatomy.patch)])
        tokens = Tokens.of(embedding.weight, offset, _eps(view.model, anatomy))
        size = sum(view.normalization.std) / len(view.normalization.std)
        allowed = _WRONG / size * anatomy.patch_pixels**0.5 / _gain(tokens)
        batch = view.update.batch_size
        if first.kind == "head":
            found = of_head(rounds, anatomy, tokens, allowed if view.traits.exact else torch.inf)
            clear, sure = view.traits.noise == 0, [True] * len(found)
            why = "no label stands alone in the batch, or none is missing from it"
        else:
            found, clear = _of_bins(rounds, anatomy, embedding, tokens, allowed)
            sure, why = [], "no bin holds a single token"
        if not found:
            raise NotApplicable(why)
        if first.turned and first.kind != "head":
            found, sure = labelled(found, rounds, anatomy, tokens)
        patches, there, proved = _images(found, tokens, batch, anatomy.patches, clear, sure)
        whole = anatomy.patch_pixels - tokens.rank <= _HIDDEN * anatomy.patch_pixels
        details: dict[str, Any] = {"found": len(found), "tokens": batch * anatomy.patches}
        if left := _unseen(rounds, anatomy):
            details["unfinished"] = [f"all positions were seen ({left} stand in other turns)"]
        return guess_from_patches(
            view,
            anatomy,
            patches,
            labels=_labels(view, anatomy, patches) if bool(there.all()) else None,
            verified=proved if whole and view.traits.exact else torch.zeros_like(there),
            details=details,
        )


def _of_bins(
    rounds: Sequence[View], anatomy: Anatomy, embedding: Embedding, tokens: Tokens, allowed: float
) -> tuple[list[Single], bool]:
    """Return the single tokens of all bins, and whether they were read without averaging rows."""
    view = rounds[0]
    batch, clear = view.update.batch_size, view.traits.noise == 0
    found = _found(_banks(rounds, anatomy, embedding, tokens), tokens, allowed) if clear else []
    if view.traits.exact or len(found) >= _FEW * batch * anatomy.patches:
        return found, clear
    banks = _banks(rounds, anatomy, embedding, tokens, noisy=True)
    guessed = _found(banks, tokens, allowed, batch)
    return (found, True) if len(found) >= len(guessed) else (guessed, False)


def _unseen(rounds: Sequence[View], anatomy: Anatomy) -> int:
    """Return how many positions no bin of any round sees."""
    seen: set[int] = set()
    for one in (bins for view in rounds if view.crafted for bins in view.crafted.bins):
        seen.update(range(anatomy.patches) if one.places is None else one.places.tolist())
    return anatomy.patches - len(seen)


def _labels(view: View, anatomy: Anatomy, patches: Tensor) -> Tensor | None:
    """Return the labels in ascending order: what the head's bias lacks of the images' scores."""
    name = f"{linear_head(view)}.bias"
    if not view.update.can_read(name):
        return None
    like = next(view.model.parameters())
    images = anatomy.unpatchify(patches).to(like)
    with torch.no_grad():
        said = torch.cat([logits_of(view.model(part)) for part in images.split(8)])
    charge_update(view, times=0.3)
    counts = said.double().softmax(-1).sum(0) - len(images) * view.gradient().read(name)
    return labels_from_counts(counts, len(images))


def _eps(model: nn.Module, anatomy: Anatomy) -> float:
    modules = dict(model.named_modules())
    return float(getattr(modules.get(anatomy.blocks[0].norm2), "eps", 0.0))


def _gain(tokens: Tokens) -> float:
    """Return the size of the largest patch that a token of size 1 makes, per its own size."""
    return float(torch.linalg.matrix_norm(tokens.back, 2))


def _banks(
    rounds: Sequence[View],
    anatomy: Anatomy,
    embedding: Embedding,
    tokens: Tokens,
    *,
    noisy: bool = False,
) -> list[Bank]:
    """Return the banks of all rounds."""
    how = (embedding.prefix, tokens.still, tokens.back, tokens.eps, noisy)
    return [
        bank
        for one in rounds
        if one.crafted is not None
        for bank in banks_of(one.gradient(steps=True), anatomy, one.crafted.bins, *how)
    ]


def _found(banks: Sequence[Bank], tokens: Tokens, allowed: float, guessed: int = 0) -> list[Single]:
    """Return the single tokens of all positions.

    Args:
        guessed: Tokens of a position up to which it takes the likeliest ones where none can be told
            for sure; 0 where gradients have no noise.
    """
    least = _SCANT if guessed else _EMPTY
    least *= max(float(bank.bins[..., -1].abs().max()) for bank in banks)
    by_place: dict[int | None, list[Bank]] = {}
    for bank in banks:
        by_place.setdefault(bank.place, []).append(bank)
    found: list[Single] = []
    for place, same in by_place.items():
        many = guessed * (len(tokens.still) if place is None else 1)
        found += peeled(same, tokens, allowed=allowed, least=least, guessed=many)
    return found


def _images(
    found: Sequence[Single],
    tokens: Tokens,
    batch: int,
    places: int,
    clear: bool,
    sure: Sequence[bool],
) -> tuple[
    Float[Tensor, "batch patches pixels"],
    Bool[Tensor, "batch patches"],
    Bool[Tensor, "batch patches"],
]:
    """Return the images that the patches make, where a patch was found, and where it is proved.

    All tokens of one image have the same weight up to their scale; another image with another
    label, or of another brightness, has another one. A patch without a position of its own goes
    where there is room.

    Args:
        sure: Which tokens are proved by themselves; empty where others of their image do it.
    """
    seen = torch.stack([single.token for single in found])
    at = torch.tensor([single.place for single in found])
    patches = tokens.patches(seen, at.to(seen.device))
    marks = torch.tensor([single.mark for single in found], dtype=torch.float64)
    images = patches.new_zeros(batch, places, patches.shape[1])
    there = torch.zeros(batch, places, dtype=torch.bool)
    proved = torch.zeros_like(there)
    left: list[tuple[int, int | None]] = []
    lost = tokens.alike or len(tokens.still) > places
    sorted_in = _sorted_in(marks, [single.whole for single in found], batch, clear)
    alike = Counter(image for _, image in sorted_in)
    for n, image in sorted_in:
        place = found[n].place
        placed = place < places and not tokens.alike
        if image is None or not placed or there[image, place]:
            left.append((n, image))
        else:
            images[image, place], there[image, place] = patches[n], True
            proved[image, place] = sure[n] if sure else alike[image] >= _AGREE
    for n, image in left:
        place = found[n].place
        free = (~there).nonzero()
        if place < places and not tokens.alike:
            free = free[free[:, 1] == place]
        elif image is not None and bool((free[:, 0] == image).any()):
            free = free[free[:, 0] == image]
        if len(free) and (lost or place < places):
            at_free = tuple(free[0])
            images[at_free], there[at_free] = patches[n], True
            agree = image is not None and alike[image] >= _AGREE
            proved[at_free] = sure[n] if sure else agree
    flat = images.sum(1) / there.sum(1, keepdim=True).clamp_min(1).to(images)
    made = torch.where(there[..., None].to(images.device), images, flat[:, None])
    return made, there, proved


def _sorted_in(
    marks: Float[Tensor, " found"], whole: Sequence[bool], batch: int, clear: bool
) -> list[tuple[int, int | None]]:
    """Return each token's number with its image, None where its mark tells none; clear ones first.

    Marks of one image lie closer together than those of two. Where a part of a token's weight is
    elsewhere its mark is wrong.
    """
    order = marks.argsort().tolist()
    apart = _APART * float(marks.abs().median())
    if not clear:  # the widest gaps, whatever they are
        gaps = marks[[n for n in order if whole[n]]].diff().sort(descending=True).values
        apart = float(gaps[batch - 1]) if len(gaps) >= batch else 0.0
    clusters: list[list[int]] = []
    last: float | None = None
    for n in order:
        if not whole[n]:
            continue
        mark = float(marks[n])
        if last is None or mark - last > apart:
            clusters.append([])
        clusters[-1].append(n)
        last = mark
    clusters.sort(key=len, reverse=True)
    image = {n: i for i, cluster in enumerate(clusters[:batch]) for n in cluster}
    ranked = [(n, image.get(n)) for n in order]
    return sorted(ranked, key=lambda one: one[1] is None)
