"""What `vitguard advise` says: plain values, one sentence, JSON; printed by `console`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["AdviceReport", "Applies", "Option", "Proven"]


@dataclass(frozen=True)
class Applies:
    """What one attack can do with an update of this model.

    Args:
        attack: Its name.
        applies, exact: Whether it applies at this batch, and gives the images themselves.
        reason: Why, or why not.
        exact_until: The largest batch that it is exact for; 0 for none.
        ends_at: The smallest batch at which it no longer applies; None where no batch ends it.
    """

    attack: str
    applies: bool
    exact: bool
    reason: str
    exact_until: int
    ends_at: int | None


@dataclass(frozen=True)
class Option:
    """A stack that stood where it was measured, and what it would mean here.

    Args:
        stack: Its spec, with what this model needs.
        batch: The smallest batch whose update it lets leave, on this model.
        evidence: How it fared and what it costs, in words.
        left: Exact attacks whose count still holds under it at that batch, damage aside.
        hides_from: `server`, or `server and clients`.
        verify: The command that attacks it on this model.
        shows: What its updates still show, as its defenses say it; "" where they say nothing.
    """

    stack: str
    batch: int
    evidence: str
    left: tuple[str, ...]
    hides_from: str
    verify: str
    shows: str = ""


@dataclass(frozen=True)
class Proven:
    """A stack that rests on a proof or on a key and not on what attacks were tried.

    Args:
        stack: Its spec.
        says: What it promises, and to whom it does not.
        verify: The command that audits it on this model.
    """

    stack: str
    says: str
    verify: str


@dataclass(frozen=True)
class AdviceReport:
    """What applies, what stood, what nobody knows, and how to look for oneself. It proves nothing.

    Args:
        model, batch_size, setting, train, see: What was asked.
        tokens, width: Tokens of one image, and their width; 0 where no exact attack is known.
        unsupported: Why there is no advice for this model; "" where there is.
        attacks: What every attack can do, exact ones first.
        options: Stacks that stood in the evidence, the cheapest first.
        fallen: Stacks that were measured in this setting and fell.
        fell_to: What each of them fell to, and how far that came.
        proven: Stacks that rest on a proof or on a key.
        uncovered: What no known attack or proof covers.
        measured: When the evidence was made, and with what.
        notes: What a reader must know of the model.
    """

    model: str
    batch_size: int
    setting: str
    train: str
    see: str
    tokens: int = 0
    width: int = 0
    unsupported: str = ""
    attacks: tuple[Applies, ...] = ()
    options: tuple[Option, ...] = ()
    fallen: tuple[str, ...] = ()
    fell_to: tuple[str, ...] = ()
    proven: tuple[Proven, ...] = ()
    uncovered: tuple[str, ...] = ()
    measured: str = ""
    notes: tuple[str, ...] = ()

    @cached_property
    def exact(self) -> tuple[str, ...]:
        """Names of the attacks that give the images themselves at this batch."""
        return tuple(a.attack for a in self.attacks if a.exact)

    def sentence(self) -> str:
        """Say it in one sentence; it never calls anything safe."""
        if self.unsupported:
            return self.unsupported
        here = f"at batch size {self.batch_size}"
        if self.exact:
            ends = [a.exact_until + 1 for a in self.attacks if a.exact]
            what = f"{', '.join(self.exact)} can give the images back exactly {here}"
            what += f" (none of them exactly from {max(ends)} images on)"
        else:
            parts = ", ".join(a.attack for a in self.attacks if a.applies)
            what = f"no attack gives whole images back by equations alone {here}"
            what += f", but some apply in part: {parts}" if parts else ""
        if not self.options:
            rest = f"use {self.proven[0].stack} and audit it" if self.proven else "audit your own"
            command = f": {self.proven[0].verify}" if self.proven else ""
            return (
                f"{what}; no stack that was measured in full in this setting and fits this model "
                f"has stood, so {rest}{command}"
            )
        best = self.options[0]
        shows = f" ({best.shows})" if best.shows else ""
        return (
            f"{what}; the cheapest stack that stood where it was measured is {best.stack} with at "
            f"least {best.batch} image{'s' if best.batch > 1 else ''} an update{shows}, which is "
            f"evidence and no proof: {best.verify}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values (schema 1)."""
        return {"schema": 1, **json.loads(json.dumps(asdict(self))), "sentence": self.sentence()}

    def print_to(self, console: Console) -> None:
        """Print attacks, stacks, what is not covered, and the command."""
        from vitguard.advise.console import print_advice

        print_advice(self, console)
