"""Many starts, few tokens: collect the true tokens of every position.

Each round gives every unfinished position a few starts (`_starts`); one that ends below `accept` is
a token: local minima mostly end a hundred times above. What is found is taken out of the gradient
(`_tokens`), which leaves fewer directions free and little that later starts could find again. The
equations of the whole gradient decide on every token: each token taken out leaves its rounding
error behind. They are searched directly where the remainder brings no more tokens.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks.budget import Budget, charge
from vitguard.attacks.equations.attention import Attention
from vitguard.attacks.equations.family import Frame, Solver
from vitguard.attacks.equations.steps import directions
from vitguard.attacks.gelu_span.found import Found
from vitguard.attacks.gelu_span.groups import group_tokens
from vitguard.attacks.gelu_span.newton import Pull
from vitguard.attacks.gelu_span.remainder import Remainder
from vitguard.attacks.gelu_span.starts import Starts
from vitguard.attacks.gelu_span.tokens import Parts, TokenGradients
from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["Search"]

_UNGUIDED = 3  # in a batch, every third round also starts without a pull
_AT_ONCE = 16  # tokens taken out between two looks at the budget

_LOG = logging.getLogger("vitguard.attacks")


@dataclass
class Search:
    """One search over the positions of a view.

    Args:
        view: The gradient of all tokens.
        unknown: The embedding that the positions of a shuffle share.
        together: A position of each crowd (`places`); its tokens stand in rows behind the others.
        room: Tokens of one image at each position, where that is more than one.
        enough: Tokens that there are in all, where `wanted` counts some of them twice.
        wanted: Tokens wanted at each position, shape (positions,).
        exact: Whether just as many are there, and not only at most.
        near: By position, residual and patch of the best candidate that was not accepted.
        budget: Of work; once it is spent no start is begun.
        accept: Residual below which a token counts as found.
        found: Tokens so far.
        tokens: Directions that they span; of several local steps together.
        whole, remainder: The equations of all tokens, and of those not taken out.

    Raises:
        NotApplicable: The spans are full, or the block is not of this form.
        Blocked: The gradient of fc1, fc2 or the attention projection cannot be read.
    """

    view: View
    anatomy: Anatomy
    attention: Attention | None
    unknown: Tensor | None
    wanted: Int[Tensor, " positions"]
    exact: bool
    budget: Budget
    generator: torch.Generator
    accept: float = 1e-3
    patience: int = 40
    together: tuple[int, ...] = ()
    room: tuple[int, ...] = ()
    enough: float = math.inf
    near: dict[int, tuple[float, Tensor]] = field(default_factory=dict)
    found: Found = field(init=False)
    tokens: int = field(init=False)
    frame: Frame = field(init=False)
    whole: Remainder = field(init=False)
    remainder: Remainder = field(init=False)
    _gradients: TokenGradients | None = None
    _parts: list[Parts] = field(default_factory=list)
    _taken: Tensor = field(init=False)
    _rounds: int = 0
    _idle: int = 0

    def __post_init__(self) -> None:
        batch, block = self.view.update.batch_size, self.anatomy.blocks[0]
        tokens = batch * self.anatomy.tokens
        most = min(tokens * self.view.update.local_steps, self.anatomy.width - 1)
        names = tuple(f"{layer}.weight" for layer in (block.fc1, block.fc2, block.proj))
        self.tokens = directions(self.view, names, tokens, most)
        self.frame = Frame.of(self.view, self.anatomy, self.unknown, self.together)
        self.found = Found.none(self.frame.offset, self.anatomy.patch_pixels)
        self._taken = torch.zeros(0, dtype=torch.bool, device=self.frame.offset.device)
        self.whole = self.remainder = self._remainder(self.view)

    def _remainder(self, view: View) -> Remainder:
        tokens = self.tokens - int(self._taken.sum())
        left = self.found.pick(self._taken).missing(self.wanted) if self.exact else None
        return Remainder.of(self.frame, view, self.anatomy, tokens, left, self.generator)

    @property
    def done(self) -> bool:
        """Whether every position has as many tokens as were wanted."""
        return len(self.found) >= self.enough or not bool(self.missing().any())

    @property
    def grouped(self) -> bool:
        """Whether there are several images, each with one token at every position."""
        return len(self.wanted) == self.anatomy.patches and int(self.wanted.max()) > 1

    def missing(self) -> Int[Tensor, " positions"]:
        """Return how many tokens each position lacks."""
        return self.found.missing(self.wanted)

    def run(self, rounds: int) -> str:
        """Search for some rounds; return `done`, `budget`, `idle`, or `""` where more may help."""
        for _ in range(rounds):
            if self.done:
                return "done"
            self._take_out()
            if self.budget.over:
                return "budget"
            rest = self.remainder
            if self._idle % 2:
                self.remainder = self.whole
            new = 0
            if self.grouped and len(self.found):
                groups = self.groups(self.found, int(self.wanted.max()))
                new = self._harvest(*self._starts().guided(groups))
            if not self.done and (not new or self._rounds % _UNGUIDED == 0):
                # A start costs hidden units times unknowns: fewer of them on wide models.
                work = self.remainder.hidden * self.remainder.free
                each = 1 if new else min(1 + self._rounds, 4 if work > 1.5e5 else 12)
                new += self._harvest(*self._starts().free(each, first=self._rounds == 0))
            self.remainder = rest
            self._rounds += 1
            self._idle = 0 if new else self._idle + 1
            _LOG.info("round %d: %d tokens found, %d wanted", self._rounds, len(self.found),
                      int(self.missing().sum()))  # fmt: skip
        # Without a single token the update is hardly one of these images': give up early.
        patience = self.patience if len(self.found) else 4
        return "done" if self.done else "idle" if self._idle >= patience else ""

    def seed(self, positions: Tensor, patches: Float[Tensor, "tokens pixels"]) -> int:
        """Start from given patches; return how many tokens that brought."""
        new = 0
        if not len(positions):
            return 0
        for p, x in zip(positions.split(32), patches.split(32), strict=True):
            v = [self.remainder.project(int(i), row[None]) for i, row in zip(p, x, strict=True)]
            new += self._accept(p, torch.cat(v), None)
        self._idle = 0 if new else self._idle
        return new

    def add(self, position: int, patch: Float[Tensor, " pixels"], residual: float) -> None:
        """Take a token that was proved in another way, a repeated one included."""
        where = torch.tensor([position], device=self.found.position.device)
        remainder = self.remainder
        y = remainder.family.at(where, remainder.project(position, patch[None]))
        attended = remainder.solver.values_attended(y)
        self.keep(Found(where, attended, patch[None], attended.new_tensor([residual])))

    def keep(self, some: Found) -> None:
        """Take tokens that are known."""
        self.found = self.found.plus(some)

    def embedded(self, some: Found) -> Float[Tensor, "tokens width"]:
        """Return the embedded tokens z of what was found."""
        return some.patch @ self.frame.embedding.weight.T + self.frame.offset[some.position]

    def groups(self, some: Found, images: int) -> Int[Tensor, " tokens"]:
        """Return which of so many images each token is of, where attention tells."""
        draws = None
        if self.attention is not None:
            prefix, patches = self.frame.embedding.prefix, self.anatomy.patches
            draws = self.attention.draws(self.embedded(some), prefix, patches)
        return group_tokens(some.attended, some.position, images, draws, self.room)

    def _starts(self) -> Starts:
        return Starts(
            self.found, self.remainder, self.wanted, self.missing(), self.anatomy,
            self.view.normalization, self.generator,
        )  # fmt: skip

    def _take_out(self) -> None:
        """Take what was found since the last time out of the equations, if it proves itself."""
        fresh = torch.arange(len(self._taken), len(self.found))
        if not len(fresh) or self.budget.over:
            return
        before = len(self._parts)
        if self._gradients is None:
            self._gradients = TokenGradients.of(self.view, self.anatomy, self.tokens)
        for rows in fresh.split(_AT_ONCE):
            if self.budget.over:
                return
            some = self.found.pick(rows)
            stream = some.attended @ self.frame.project.T + self.frame.bias + self.embedded(some)
            parts, proved = self._gradients.parts(stream, some.attended)
            self._taken = torch.cat([self._taken, proved])
            if len(parts):
                self._parts.append(parts)
        if len(self._parts) > before:
            try:
                self.remainder = self._remainder(self._gradients.without(self._parts))
            except NotApplicable:  # rounding was all that was left
                self.remainder = self.whole

    def _harvest(self, positions: Tensor, start: Tensor, pull: Pull | None) -> int:
        """Iterate all starts, in slices that respect the budget; return how many were new."""
        new = 0
        charge(calls=10 * len(positions))  # the starts were made one by one
        for rows in torch.arange(len(positions), device=positions.device).split(64):
            rows = rows[self.missing()[positions[rows]] > 0]
            if len(rows):
                drawn = None if pull is None else Pull(pull.target[rows], pull.strength[rows])
                new += self._accept(positions[rows], start[rows], drawn)
            if self.budget.over:
                break
        return new

    def _accept(self, positions: Tensor, start: Tensor, pull: Pull | None) -> int:
        remainder, solver = self.remainder, self.remainder.solver
        rough = remainder.quick.solve(
            positions, start.float(), iterations=20, pull=pull, budget=self.budget
        )
        good = rough.residual < 10 * self.accept
        if not bool(good.any()):
            return 0
        positions = positions[good]
        y = remainder.family.at(positions, rough.v[good].double())
        keep = self.found.new(self._tokens(solver, positions, y, rough.residual[good]), self.wanted)
        positions, y = positions[keep], y[keep]
        y, residual = _solved(remainder, positions, y, 20)
        if remainder is not self.whole:
            y = torch.cat(
                [y[:, : solver.patch.shape[1]],
                 solver.values_attended(y) @ self.whole.solver.attended,
                 y[:, solver.scale_index :]], 1,
            )  # fmt: skip
            solver, near = self.whole.solver, residual < 10 * self.accept
            positions, y = positions[near], y[near]
            y, residual = _solved(self.whole, positions, y, 4)
        good = residual < self.accept
        self._remember(positions[~good], solver.pixels(y[~good]), residual[~good])
        some = self._tokens(solver, positions[good], y[good], residual[good])
        some = some.pick(self.found.new(some, self.wanted))
        self.keep(some)
        return len(some)

    @staticmethod
    def _tokens(solver: Solver, positions: Tensor, y: Tensor, residual: Tensor) -> Found:
        return Found(positions, solver.values_attended(y), solver.pixels(y), residual.to(y))

    def _remember(self, positions: Tensor, patches: Tensor, residuals: Tensor) -> None:
        """Keep the best candidate that just missed: noise can hide a true token."""
        for i, patch, residual in zip(positions.tolist(), patches, residuals.tolist(), strict=True):
            if residual < min(10 * self.accept, self.near.get(i, (1.0, patch))[0]):
                self.near[i] = (residual, patch)


def _solved(
    remainder: Remainder, positions: Tensor, y: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Solve all equations of a remainder from tokens y; return new ones and their residuals."""
    fine = remainder.fine
    v = fine.family.coordinates(positions, y)
    solved = fine.solve(positions, v, iterations=iterations)
    return fine.family.at(positions, solved.v), solved.residual
