"""GELU-span: batches, shuffles and sine-cosine positions fall where tokens are fewer than D."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.budget import Budget, nominal, worked
from vitguard.attacks.equations.attention import Attention
from vitguard.attacks.equations.counts import gelu_span_remains
from vitguard.attacks.equations.mask import shuffled_count, shuffled_positions
from vitguard.attacks.equations.places import crowds, meets, members
from vitguard.attacks.equations.rows import Embedding, guess_from_patches
from vitguard.attacks.evidence import require_finite
from vitguard.attacks.gelu_span.assemble import complete_images, complete_tokens
from vitguard.attacks.gelu_span.peel import peel
from vitguard.attacks.gelu_span.seams import place_by_seams
from vitguard.attacks.gelu_span.search import Search
from vitguard.attacks.labels import try_labels
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable, expected
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["GeluSpan"]

_TRIES = 3  # fruitless completions before a complete image is peeled off
_APART = 2e-2  # distance of positions below which tokens cannot be told from those of another
_DROP = 1e-2  # rank drop of the head gradient above which a subtraction was wrong


@dataclass(frozen=True)
class GeluSpan(Attack):
    """Find the tokens of the first block that its MLP's gradient allows; each proves itself.

    The linear equations of `span` leave an affine family of tokens at each position (a batch, a
    shuffle's shared position, low-rank positions). A true token's activation also lies in the row
    space of dL/dW_fc2, which leaves hidden - T equations: many-start Levenberg-Marquardt finds the
    members that satisfy them, to rounding error. Positions that share one embedding, as all do
    where there are none, are searched as one. What a token found put into the gradient is taken
    out, which leaves less to search. In a batch, starts are pulled to what the tokens found of each
    image attend to. The attention equation then says which tokens form an image and fills in the
    last missing ones; a complete image is subtracted and the rest is a smaller batch. An incomplete
    image has the tokens that fit together by what their queries draw.

    Several local SGD steps on one image are to the equations what a batch of as many is: the rows
    of the summed gradient span the tokens of every step, and those of the first belong to the
    public weights. They prove themselves to the same `accept`.

    Guarantees:
        A patch marked `verified` satisfies hidden - T equations to below `accept`, and that of the
        norm; or, of the last image of a batch, those of the attention.

    Under a shuffle, and without positions, what is verified is the content of a patch; its place is
    a guess by seams, and so is its image in a batch.

    Args:
        seconds: Budget of work, in nominal seconds (`Budget`); what was found by then is returned.
        accept: Relative residual below which a token counts as found.

    Raises:
        NotApplicable: T >= D (no exact attack is known); local steps on a batch; a fit would prove
            nothing (positions that are not told apart, too few hidden units); no plain embedding,
            no first block of the form x + attention(norm(x)), x + fc2(act(fc1(norm(x)))).
        Blocked: The gradient of fc1, fc2 or the attention projection is not in the update.

    References:
        docs/methods.md 2.4b.
    """

    name: ClassVar[str] = "gelu-span"
    family: ClassVar[str] = "ladder"
    rung: ClassVar[Rung | None] = Rung(40, 70)
    seconds: float = 60.0
    accept: float = 1e-3

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise expected("seconds above 0", self.seconds)
        if not 0 < self.accept < 0.01:
            raise expected("accept between 0 and 0.01", self.accept)

    def share(self, view: View) -> float:
        """Return the share of the ladder's work left; one image is polished with the rest."""
        return 0.5 if view.update.batch_size == 1 and view.traits.shuffle is None else 0.8

    def least(self, view: View) -> float:
        """Return about how many nominal seconds pass before the first start."""
        anatomy, batch = Anatomy.of(view.model), view.update.batch_size
        width, tokens = anatomy.width, batch * anatomy.tokens
        unknowns = min(batch * anatomy.patches, anatomy.patch_pixels) + tokens
        return nominal(svd=5.0 * width**3 + unknowns**3, qr=20.0 * width**3)

    def require(self, view: View) -> None:
        """Check the embedding, the first block, and that the tokens do not fill its width."""
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        if not anatomy.blocks or not anatomy.blocks[0].pre_norm:
            raise NotApplicable("the first block is not x + attention(norm(x))")
        if view.update.local_steps > 1 and view.update.batch_size > 1:
            raise NotApplicable("several local steps on a batch leave too much open")
        tokens = view.update.batch_size * anatomy.tokens
        if tokens >= anatomy.width:
            raise NotApplicable(
                f"{tokens} tokens fill the spans of width {anatomy.width}: no exact attack known"
            )

    def remains(self, plain: Released) -> tuple[Remaining, ...]:
        """Count the equations of the first block's MLP."""
        return (gelu_span_remains(plain),)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return one image per member of the batch; what is not verified is minimum norm."""
        budget, before = Budget.of(self.seconds), worked()
        view = view.gradient(steps=True)
        anatomy = Anatomy.of(view.model)
        self.require(view)
        require_finite(view)
        labels = try_labels(view, generator)
        state = _State(view, anatomy, generator, budget, self.accept)
        try:
            while state.step():
                pass
        except KeyboardInterrupt:
            state.keep()
            state.stopped = "interrupted"
        details = {
            "free": state.free,
            "tokens": state.tokens,
            "found": int(state.verified.sum()),
            "verified": float(state.verified.double().mean()),
            "peeled": state.peeled,
            "told_apart": state.told_apart,
            "stopped": state.stopped or "",
            "seconds": round(1e-9 * (worked() - before), 2),
        }
        if state.stopped in ("budget", "interrupted"):
            details["unfinished"] = [f"all tokens were found ({state.stopped})"]
        if state.stopped == "interrupted":
            details["interrupted"] = True
        if state.masked is not None or state.crowds:
            moved = state.pooled if state.masked is None else state.pooled | state.masked
            details["order"] = "by seams" if bool(moved.any()) else "known"
        return guess_from_patches(
            view, anatomy, state.patches, labels=labels,
            verified=state.verified,
            shuffled=None if state.masked is None else state.masked[None],
            details=details,
        )  # fmt: skip


class _State:
    """The attack under way: what is left of the batch, and the images made so far."""

    def __init__(
        self,
        view: View,
        anatomy: Anatomy,
        generator: torch.Generator,
        budget: Budget,
        accept: float,
    ) -> None:
        self.view, self.anatomy, self.generator = view, anatomy, generator
        self.budget, self.accept = budget, accept
        self.stopped, self.peeled, self.filled, self.tries, self.told_apart = "", 0, 0, 0, 0
        self.tokens = view.update.batch_size * anatomy.tokens
        offset = Embedding.of(view, anatomy).offset
        self.crowds = crowds(offset)
        self.pooled = members(self.crowds, offset)
        self.unknown = None if meets(view, anatomy, self.crowds) else view.unknown
        batch = view.update.batch_size
        weight = view.weight(anatomy.patch_weight)
        self.patches = weight.new_zeros(batch, anatomy.patches, anatomy.patch_pixels)
        self.verified = torch.zeros(batch, anatomy.patches, dtype=torch.bool, device=weight.device)
        self.masked: Tensor | None = None
        try:
            self.attention: Attention | None = Attention.of(view, anatomy)
        except NotApplicable:
            self.attention = None
        self.search = self._search(view)
        self.free = self.search.whole.free

    def _search(self, view: View) -> Search:
        """Set up the search for a view of the batch that is left."""
        anatomy, batch = self.anatomy, view.update.batch_size
        shared = 0 if self.unknown is None else self.unknown.numel() // anatomy.width
        rows = anatomy.patches + shared + len(self.crowds)
        wanted = torch.full((rows,), batch, device=self.patches.device)
        wanted[: anatomy.patches][self.pooled] = 0
        wanted[anatomy.patches : anatomy.patches + shared] = batch * anatomy.patches
        for row, crowd in enumerate(self.crowds, anatomy.patches + shared):
            wanted[row] = batch * len(crowd)
        alone = not shared and view.update.local_steps == 1
        search = Search(
            view, anatomy, self.attention, self.unknown, wanted, alone,
            self.budget, self.generator, accept=self.accept,
            together=tuple(int(crowd[0]) for crowd in self.crowds),
            room=tuple((wanted // batch).tolist()) if self.crowds else (),
        )  # fmt: skip
        solver = search.whole.solver
        if solver.positions_apart(search.whole.fine.family, torch.nonzero(wanted)[:, 0]) < _APART:
            raise NotApplicable(
                f"{batch * anatomy.tokens} tokens of width {anatomy.width} leave so much free that "
                "a token fits at positions that are not its own"
            )
        if shared and view.update.local_steps > 1:  # drift hides which fit: what is found tells
            wanted[anatomy.patches :] = shuffled_count(view, anatomy)[0]
            search.enough = anatomy.patches
            self.masked = torch.ones_like(self.pooled)
        elif shared and batch == 1:
            misfit = solver.family(max(solver.free(1e-4), 1)).misfit[: anatomy.patches]
            self.masked = masked = shuffled_positions(misfit) & ~self.pooled
            wanted[: anatomy.patches][masked] = 0
            if not self.crowds:
                wanted[anatomy.patches :] = int(masked.sum())
                search.exact = shared == 1 and view.update.local_steps == 1
        return search

    def step(self) -> bool:
        """Search some rounds, use the attention, take complete images out; False when over."""
        batch = self.view.update.batch_size
        before = len(self.search.found)
        state = self.search.run(rounds=2)
        new, missing = len(self.search.found) - before, int(self.search.missing().sum())
        whole: list[Tensor] = []
        attention = self.attention if batch == 1 or not self._pooled else None
        if attention is not None and batch > 1:
            whole = complete_images(self.search, attention)
        self._store(whole)
        if state == "done" and (batch == 1 or len(whole) == batch):
            return False
        if new > missing:  # the search does well: no need to solve for what it may find
            return True
        if attention is not None and state not in ("done", "budget"):
            if self._complete(attention, whole):
                self.tries = 0
                return True
            self.tries += len(whole) == batch - 1
        if whole and (self.tries >= _TRIES or len(whole) < batch - 1 or state):
            return self._peel(whole)
        self.stopped = "" if state == "done" else state
        return not state

    def _complete(self, attention: Attention, whole: list[Tensor]) -> int:
        """Fill in what the images that are not whole lack; return how many tokens that brought."""
        search, patches = self.search, self.anatomy.patches
        own = torch.ones_like(search.found.position, dtype=torch.bool)
        for rows in whole:
            own[rows] = False
        if not search.grouped:
            missing = torch.repeat_interleave(search.missing())
            return complete_tokens(search, attention, own, missing, last=True)
        drafts, new = self._drafts(own, len(whole)), 0
        where = search.found.position
        left = len(self.patches) - self.filled - len(whole)
        last = left == 1
        for index in range(left):
            if self.budget.over:
                break
            mine = torch.zeros(len(search.found.position), dtype=torch.bool, device=own.device)
            mine[: len(drafts)] = drafts == index
            absent = torch.ones(patches, dtype=torch.bool, device=own.device)
            absent[where[: len(drafts)][drafts == index]] = False
            missing = torch.nonzero(absent)[:, 0]
            new += complete_tokens(search, attention, mine, missing, last=last)
        return new

    @property
    def _pooled(self) -> bool:
        """Whether tokens of several positions are searched as if of one."""
        return self.unknown is not None or bool(self.crowds)

    def keep(self) -> None:
        """Write what was found so far into the images."""
        self._store([])

    def _store(self, whole: list[Tensor]) -> None:
        """Write the images that are complete, and drafts of the others, behind those peeled."""
        found, anatomy = self.search.found, self.anatomy
        if self.masked is not None and self.view.update.local_steps > 1:
            self.masked = torch.ones_like(self.pooled)
            self.masked[found.position[found.position < anatomy.patches]] = False
        sure = self.filled + len(whole)
        self.told_apart = sure + (
            sure == len(self.patches) - 1
        )  # the last one has all that is left
        base = torch.cat([self.search.whole.base(i) for i in range(anatomy.patches)])
        rest = torch.ones_like(found.position, dtype=torch.bool)
        for index, rows in enumerate(whole):
            self.patches[self.filled + index] = found.patch[rows]
            self.verified[self.filled + index] = True
            rest[rows] = False
        sorted_by = rest if self.unknown is None else rest & (found.position < anatomy.patches)
        drafts = self._drafts(sorted_by, len(whole))
        for index in range(self.filled + len(whole), len(self.patches)):
            patches, put = base.clone(), torch.zeros_like(self.verified[0])
            if self.view.update.batch_size == 1:
                for where, (_, patch) in self.search.near.items():
                    if where < anatomy.patches:
                        patches[where] = patch
            own = drafts == index - self.filled - len(whole)
            for row in torch.nonzero(own & (found.position < anatomy.patches))[:, 0].tolist():
                where = int(found.position[row])
                patches[where], put[where] = found.patch[row], True
            mine = rest if self.unknown is not None else own
            loose = torch.nonzero(mine & (found.position >= anatomy.patches))[:, 0]
            if len(loose):
                holes = ~put if self.masked is None else (self.masked | self.pooled) & ~put
                loose = loose[: int(holes.sum())]
                rest[loose] = False
                patches, filled = place_by_seams(
                    anatomy, patches, ~holes, found.patch[loose], self.generator
                )
                put = put | filled
            self.patches[index], self.verified[index] = patches, put

    def _drafts(self, rest: Tensor, whole: int) -> Tensor:
        """Return the number of the image not whole that each token of `rest` goes to, else -1.

        By what it attends to; the draft with the most tokens comes first.
        """
        drafts = torch.full_like(self.search.found.position, -1)
        if bool(rest.any()):
            images = len(self.patches) - self.filled - whole
            groups = self.search.groups(self.search.found.pick(rest), images)
            order = torch.bincount(groups, minlength=images).argsort(descending=True, stable=True)
            drafts[rest] = order.argsort()[groups]
        return drafts

    def _peel(self, whole: list[Tensor]) -> bool:
        """Subtract the complete images and go on with the rest of the batch."""
        found, view, anatomy = self.search.found, self.view, self.anatomy
        left = torch.ones_like(found.position, dtype=torch.bool)
        for rows in whole:
            left[rows] = False
            try:
                view, _, drop = peel(view, anatomy.unpatchify(found.patch[rows]))
            except (NotApplicable, Blocked):
                drop = 1.0
            if drop > _DROP:
                self.stopped = "peeling"
                return False
        try:
            search = self._search(view)
        except NotApplicable:
            self.stopped = "peeling"
            return False
        search.keep(found.pick(left))  # proved before, and still true
        self.peeled, self.filled = self.peeled + len(whole), self.filled + len(whole)
        self.view, self.search, self.tries = view, search, 0
        self._store([])
        return True
