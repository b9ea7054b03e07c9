"""What was measured of stacks of defenses: the table that `vitguard advise` reads.

`benchmarks/evidence.py` makes `evidence.json`. A cell that was not run says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

__all__ = ["WITHIN", "Cell", "Cost", "Evidence", "Stack", "evidence", "read_evidence"]

WITHIN = 2.0
"""dB above the thumbnail (every patch flat in its own colour) within which a stack has stood."""


@dataclass(frozen=True)
class Cell:
    """One stack of defenses under one attack on one model.

    Args:
        stack: Spec of the stack.
        model: What it was measured on, in words.
        setting: `finetune` or `scratch`.
        batch: Images behind the update.
        case: `natural`, or `dominant`: one image's gradient outweighs the others.
        attack: Spec of the attack.
        psnr: dB of the best image, patches matched; None where it is not measured.
        above: dB of that above the thumbnail.
        verdict: The audit's; "" where it was not run.
        proved: Share of patches that the attack proved, in [0, 1].
        cut: Attacks that their budget ended, by name.
        note: The audit's reason, or why the cell was not run.
    """

    stack: str
    model: str
    setting: str
    batch: int
    case: str
    attack: str
    psnr: float | None = None
    above: float | None = None
    verdict: str = ""
    proved: float = 0.0
    cut: str = ""
    note: str = ""

    @property
    def run(self) -> bool:
        """Whether it was measured; `cut` says what did not come to its end."""
        return bool(self.verdict)

    @property
    def leaked(self) -> bool:
        """Whether it fell: to the verdict, more than 2 dB above the thumbnail, or a proof."""
        over = self.above is not None and self.above > WITHIN
        return self.verdict == "leaks" or over or self.proved > 0


@dataclass(frozen=True)
class Cost:
    """What a stack costs on one model.

    Args:
        accuracy: Of the trained model on held-out images, in [0, 1], mean over seeds.
        plain: The same without a defense, by the same steps.
        seeds: Runs behind both.
        steps: Steps of each run.
        time: Time of a step over that of the undefended one; processor time.
        bytes: Bytes that are sent over those of the undefended update in float32.
        note: What to know of the accuracies.
    """

    stack: str
    model: str
    setting: str
    accuracy: float | None = None
    plain: float | None = None
    seeds: int = 0
    steps: int = 0
    time: float | None = None
    bytes: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Stack:
    """Everything that was measured of one stack in one setting."""

    spec: str
    setting: str
    cells: tuple[Cell, ...]
    costs: tuple[Cost, ...]
    elsewhere: tuple[Cell, ...] = ()

    @property
    def measured(self) -> tuple[Cell, ...]:
        """The cells that were run."""
        return tuple(c for c in self.cells if c.run)

    @property
    def stood(self) -> bool:
        """Whether on one model and batch every attack came to its end, one resisted, none leaked.

        What does not apply, is blocked or fails on the control as well shows nothing, and neither
        does an attack that resisted beside one that was cut: that may be the one made for it.
        """
        held = any(
            all(c.run and not c.cut for c in group) and any(c.verdict == "resisted" for c in group)
            for group in self._groups()
        )
        return held and not self.fell

    @property
    def fell(self) -> bool:
        """Whether it fell in a cell, of this setting or of another."""
        return any(c.leaked for c in self._tried)

    @property
    def _tried(self) -> tuple[Cell, ...]:
        return (*self.measured, *(c for c in self.elsewhere if c.run))

    def fell_to(self) -> str:
        """Say what it fell to: the attack that came farthest, and how far; "" where it stood."""
        cells = [c for c in self.measured if c.leaked] or [c for c in self._tried if c.leaked]
        if not cells:
            return ""
        worst = max(cells, key=lambda c: -math.inf if c.above is None else c.above)
        attack = worst.attack.partition(":")[0]
        over = worst.above is not None and worst.above > WITHIN
        said = f"{attack}, {worst.above:+.1f} dB from the thumbnail" if over else f"{attack} leaks"
        return said if worst.setting == self.setting else f"{said}; in {worst.setting}"

    def _groups(self) -> Iterable[list[Cell]]:
        """Return the cells of each model, batch and case."""
        groups: dict[tuple[str, int, str], list[Cell]] = {}
        for c in self.cells:
            groups.setdefault((c.model, c.batch, c.case), []).append(c)
        return groups.values()

    def said(self) -> str:
        """Say how it fared and what it costs, in one line."""
        measured, models = self.measured, dict.fromkeys(c.model for c in self.measured)
        attacks = dict.fromkeys(c.attack.partition(":")[0] for c in measured)
        cut = sum(bool(c.cut) for c in measured)
        above = max((c.above for c in measured if c.above is not None), default=None)
        words = [
            f"stood in {len(measured)} of {len(measured)} measurements ({', '.join(attacks)}; "
            f"{', '.join(models)})"
        ]
        if left := len(self.cells) - len(measured):
            words.append(f"{left} more {'were' if left > 1 else 'was'} not run")
        if cut:
            words.append(f"in {cut} of them an attack was cut by its budget")
        if above is not None:
            words.append(f"worst {above:+.1f} dB from the thumbnail")
        for cost in self.costs:
            if cost.accuracy is not None and cost.plain is not None:
                words.append(
                    f"accuracy {cost.accuracy:.1%} where undefended has {cost.plain:.1%} "
                    f"({', '.join(filter(None, (cost.model, cost.note)))}, {cost.seeds} seeds)"
                )
        if times := [c.time for c in self.costs if c.time is not None]:
            words.append(f"a step takes {max(times):.1f} times as long")
        if sizes := [c.bytes for c in self.costs if c.bytes is not None]:
            words.append(f"{max(sizes):.2g} times the bytes are sent")
        return "; ".join(words)

    @property
    def price(self) -> tuple[float, float, float]:
        """Points of accuracy lost (in steps of one half), time and bytes: for sorting."""
        pairs = [(c.plain or 0) - c.accuracy for c in self.costs if c.accuracy is not None]
        lost = round(200 * max(pairs)) / 2 if pairs else 100.0
        times = [c.time for c in self.costs if c.time is not None]
        sizes = [c.bytes for c in self.costs if c.bytes is not None]
        return max(lost, 0.0), max(times, default=9.0), max(sizes, default=9.0)


@dataclass(frozen=True)
class Evidence:
    """The table, with when and with what it was made."""

    date: str
    versions: dict[str, str]
    command: str
    cells: tuple[Cell, ...] = ()
    costs: tuple[Cost, ...] = ()

    def stacks(self, setting: str) -> list[Stack]:
        """Return what was measured in a setting, by stack; the undefended one left out."""
        specs = dict.fromkeys(c.stack for c in self.cells if c.setting == setting)
        found = [
            Stack(
                spec,
                setting,
                tuple(c for c in self.cells if (c.stack, c.setting) == (spec, setting)),
                tuple(c for c in self.costs if (c.stack, c.setting) == (spec, setting)),
                tuple(c for c in self.cells if c.stack == spec and c.setting != setting),
            )
            for spec in specs
            if spec != "none"
        ]
        return sorted(found, key=lambda s: s.price)


@cache
def evidence() -> Evidence:
    """Return the table that this package carries; empty where it has none."""
    file = resources.files("vitguard").joinpath("evidence.json")
    if not file.is_file():
        return Evidence("", {}, "")
    return read_evidence(json.loads(file.read_text("utf-8")))


def read_evidence(stored: dict[str, Any]) -> Evidence:
    """Return a table from its JSON values."""
    cells: Sequence[dict[str, Any]] = stored["cells"]
    costs: Sequence[dict[str, Any]] = stored["costs"]
    return Evidence(
        stored["date"],
        stored["versions"],
        stored["command"],
        tuple(Cell(**c) for c in cells),
        tuple(Cost(**c) for c in costs),
    )
