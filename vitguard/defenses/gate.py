"""The client that audits itself: closed forms on its own update, before that leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vitguard.core import Update
from vitguard.defenses.base import Defense
from vitguard.errors import GateClosed, expected

__all__ = ["Decision", "LeakGate", "Tally", "Tried"]

NO_GUARANTEE = "A gate knows the attacks that it ran. It is no guarantee against any other."


@dataclass(frozen=True)
class Tried:
    """What one attack did to the update that was about to leave.

    Args:
        state: `ran`, `blocked` (a tensor cannot be read), `not applicable` (an assumption does not
            hold), `cut` (by the budget of work) or `failed` (it broke).
        reason: Why it did not run to its end.
        gain: dB of the worst image above its own no-information baseline, patches matched.
        psnr: dB of the worst image, patches matched.
        proved: Share of the patches that the attack proved, in [0, 1], whether or not they are of
            the images that were given.
        reproduces: Whether the guess makes the update, so that it shows the images behind it,
            whether or not they are those that were given.
        needs: Tensors that the attack reads, as far as it says so.
        opens: Whether an attack that does not apply would have, to a plain gradient of the batch.
    """

    attack: str
    state: Literal["ran", "blocked", "not applicable", "cut", "failed"]
    reason: str = ""
    gain: float = -math.inf
    psnr: float = -math.inf
    proved: float = 0.0
    reproduces: bool = False
    needs: tuple[str, ...] = ()
    opens: bool = False


@dataclass(frozen=True)
class Decision:
    """What the gate decided of one update, and why. Local: it was made with the images.

    Args:
        verdict: `passed`, `withheld`, `refused`, `not decided`, or `not looked at` (see `every`).
        tried: The attacks, as far as they were run.
        caveat: What the decision does not say.
    """

    verdict: Literal["passed", "withheld", "refused", "not decided", "not looked at"]
    reason: str
    tried: tuple[Tried, ...] = ()
    caveat: str = NO_GUARANTEE


@dataclass
class Tally:
    """How the gate of one client decided so far. Local; a restart begins at the first update."""

    counts: dict[str, int] = field(default_factory=dict)
    last: Decision | None = None
    left: int = 0
    """How many updates left."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(self), ())  # a model that is given away carries nothing made with the images

    @property
    def updates(self) -> int:
        """How many updates came to the gate."""
        return sum(self.counts.values())

    def note(self, decision: Decision, *, left: bool = True) -> None:
        """Count a decision, and whether the update left."""
        self.counts[decision.verdict] = self.counts.get(decision.verdict, 0) + 1
        self.last = decision
        self.left += left


@dataclass(frozen=True)
class LeakGate(Defense):
    """Attack the finished update with every closed form; stop it where one shows the images.

    It acts last, on exactly what would leave, with the client's own images as the truth. The
    adversary is told that it runs, and with which limits.

    Guarantees:
        None: an update that passes withstood the closed forms, within the budget, and nothing else.

    Does not protect against:
        Attacks that it does not run (the ladder, gradient matching), and updates between those
        that it looks at. A wrong `batch=` of `Guard.seal`: beside images that are others, or no
        model input, a good guess looks like a wrong one, unless the attack proves it or the guess
        alone makes the update. Whether an update was refused depends on the images: a server that
        sees no update learns that much, and no differential privacy of the stack covers it.

    Args:
        max_gain: Largest dB above the no-information baseline, of any image; none for no limit.
        max_psnr: Largest dB of any image; none for no limit.
        every: Look at the first update and at each n-th that leaves after it (n = every); those
            between pass unseen. One that is not let out does not count: the next is looked at.
        work: Nominal seconds for all attacks on one update (see `vitguard.attacks.budget`). It is
            no time on a clock; an attack without a budget of its own runs to its end.
        then: Where an update leaks: `refuse` raises, `withhold` seals the tensors that the attack
            reads, looks again, and raises where that does not help.
        undecided: Where no attack could say anything, one broke or was cut, or one does not apply
            that does to a plain gradient of the same batch (`span` to a difference of AdamW steps):
            `refuse` or `pass`.

    Raises:
        InputError: A setting out of range, or no limit at all.
    """

    name: ClassVar[str] = "gate"
    max_gain: float | None = 6.0
    max_psnr: float | None = None
    every: int = 1
    work: float = 20.0
    then: Literal["refuse", "withhold"] = "refuse"
    undecided: Literal["refuse", "pass"] = "refuse"

    def __post_init__(self) -> None:
        for limit, value in (("max_gain", self.max_gain), ("max_psnr", self.max_psnr)):
            if value is not None and not -math.inf < value < math.inf:
                raise expected(f"{limit} as a finite number of dB, or none", value)
        if self.max_gain is None and self.max_psnr is None:
            raise expected("max_gain or max_psnr", "none of both")
        if not self.every >= 1:
            raise expected("every of at least 1", self.every)
        if not 0 < self.work < math.inf:
            raise expected("finite work above 0", self.work)
        if self.then not in ("refuse", "withhold") or self.undecided not in ("refuse", "pass"):
            raise expected(
                "then 'refuse' or 'withhold', undecided 'refuse' or 'pass'",
                f"{self.then!r} and {self.undecided!r}",
            )

    def audit_note(self) -> str:
        """Say that an audit shows the update as if the gate had not been there."""
        return (
            "gate: an audit attacks the update that the gate would have judged, refused or not. "
            + NO_GUARANTEE
        )

    def due(self, tally: Tally) -> bool:
        """Whether the next update is looked at; after one that was not let out it always is."""
        return tally.left % self.every == 0

    def passage(
        self, update: Update, attack: Callable[[Update], Sequence[Tried]], tally: Tally
    ) -> Update:
        """Return the update as it may leave.

        Args:
            attack: Runs the closed forms on an update.

        Raises:
            GateClosed: It may not leave.
        """
        tried = tuple(attack(update))
        leaks = [t for t in tried if self._leaks(t)]
        withheld: dict[str, str] = {}
        while leaks and self.then == "withhold":
            names = {n for t in leaks for n in t.needs if update.can_read(n)}
            if not names:
                break
            held = dict.fromkeys(sorted(names), "the client's gate found that it leaks")
            update, withheld = update.seal(held), withheld | held
            tried = tuple(attack(update))
            leaks = [t for t in tried if self._leaks(t)]
        if leaks:
            raise self._closed(tally, Decision("refused", self._said(leaks[0]), tried))
        if doubt := _doubt(tried):
            decision = Decision("not decided", doubt, tried)
            if self.undecided == "refuse":
                raise self._closed(tally, decision)
        elif withheld:
            decision = Decision("withheld", f"without {', '.join(withheld)} nothing leaked", tried)
        else:
            decision = Decision("passed", "no closed form came above the limits", tried)
        tally.note(decision)
        return update

    def skip(self, tally: Tally) -> None:
        """Count an update that leaves without a look."""
        tally.note(Decision("not looked at", f"every {self.every} updates one is looked at"))

    def _leaks(self, tried: Tried) -> bool:
        return self._over(tried) or tried.proved > 0 or tried.reproduces

    def _over(self, tried: Tried) -> bool:
        over = self.max_gain is not None and tried.gain > self.max_gain
        return over or (self.max_psnr is not None and tried.psnr > self.max_psnr)

    def _said(self, tried: Tried) -> str:
        if tried.reproduces and not self._over(tried):
            return (
                f"{tried.attack} rebuilds images that make the update, whatever images were given"
            )
        if tried.state == "failed":  # there is no dB
            return (
                f"{tried.attack} proves {tried.proved:.0%} of the patches it rebuilds, whatever "
                f"images were given ({tried.reason})"
            )
        proof = f", {tried.proved:.0%} of the patches proved" if tried.proved else ""
        return (
            f"{tried.attack} rebuilds an image at {tried.psnr:.1f} dB, {tried.gain:.1f} dB above "
            f"a guess without information{proof}"
        )

    @staticmethod
    def _closed(tally: Tally, decision: Decision) -> GateClosed:
        tally.note(decision, left=False)
        return GateClosed(
            f"Expected an update that may leave, got one that is {decision.verdict}: "
            f"{decision.reason}. It was not released; what it cost stays in the ledger.",
            decision,
        )


def _doubt(tried: Sequence[Tried]) -> str:
    """Return why nothing can be said of an update in which nothing was found; "" where it can."""
    broken = [t for t in tried if t.state in ("cut", "failed")]
    if broken:
        return "; ".join(f"{t.attack} was {t.state}: {t.reason}" for t in broken)
    if missed := [t for t in tried if t.opens]:
        return "; ".join(f"{t.attack} says nothing of it: {t.reason}" for t in missed)
    if not any(t.state in ("ran", "blocked") for t in tried):
        said = "; ".join(f"{t.attack}: {t.reason}" for t in tried)
        return f"no closed form applies ({said or 'none is registered'})"
    return ""
