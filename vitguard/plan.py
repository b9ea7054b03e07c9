"""What remains if only these tensors are trained, or encrypted: `vitguard plan`.

Every statement is about what is plain, at batch size 1 where the exact attacks are strongest. It
counts equations and unknowns of docs/methods.md 2.1 to 2.5b; `audit` is what confirms it on images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from vitguard.analysis import released, remaining
from vitguard.defenses.base import Defense, traits_of
from vitguard.defenses.encryption import preset
from vitguard.defenses.positions import FixedPositions, Kind, WithheldPositions
from vitguard.errors import expected
from vitguard.models import build_model
from vitguard.released import Remaining
from vitguard.selectors import minimal_names, require_all_match
from vitguard.trained import trained_sizes
from vitguard.vit import Anatomy, canonical_parameters

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Cost", "PlanReport", "Remaining", "plan_report"]

Positions = Literal["learnable", "frozen", "random", "sincos", "none", "withheld"]
_DEFENSES: dict[str, tuple[Defense, ...]] = {
    "learnable": (),
    WithheldPositions.name: (WithheldPositions(),),
    **{kind: (FixedPositions(kind),) for kind in get_args(Kind)},
}


@dataclass(frozen=True)
class Cost:
    """Parameters that are encrypted, their share, and bytes a round and client."""

    parameters: int
    share: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Trained:
    """Parameters that are trained and so are in the update, and their share of the model's own."""

    parameters: int
    share: float


@dataclass(frozen=True)
class PlanReport:
    """What a selection costs and leaves.

    Args:
        model, select, preset, positions, train: What was asked; `select` is "" where nothing is
            encrypted.
        encrypted: Cost of the selection.
        minimal: Cost of `plan`, the smallest set by role that ends the closed forms.
        attacks: What remains, closed forms first.
        trained: What the update holds.
    """

    model: str
    select: str
    preset: str
    positions: str
    encrypted: Cost
    minimal: Cost
    attacks: tuple[Remaining, ...]
    train: str = "all"
    trained: Trained | None = None

    def remaining(self) -> tuple[str, ...]:
        """Names of the attacks that remain."""
        return tuple(a.attack for a in self.attacks if a.possible)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        report = json.loads(json.dumps(asdict(self)))
        for attack in report["attacks"]:
            del attack["exact"], attack["near"]  # the reason says it in words
        return {"schema": 1, **report}

    def to_json_text(self) -> str:
        """Return `to_json` as text; pure ASCII."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"

    def print_to(self, console: Console) -> None:
        """Print costs and a table of attacks."""
        from rich.markup import escape
        from rich.table import Table

        console.print(
            f"{escape(self.model)}, encrypted: [bold]{escape(self.select or 'nothing')}[/], "
            f"positions {self.positions}, preset {self.preset}"
        )
        if self.trained is not None:
            console.print(
                f"  trained: [bold]{escape(self.train)}[/], {self.trained.parameters:,} parameters "
                f"({self.trained.share:.1%} of the model)"
            )
        costs = {self.select: self.encrypted, "plan": self.minimal} if self.select else {}
        for name, cost in costs.items():
            console.print(
                f"  {escape(name)}: {cost.parameters:,} parameters ({cost.share:.1%}), "
                f"{cost.bytes_up / 1e6:.1f} MB up, {cost.bytes_down / 1e6:.1f} MB down a round"
            )
        table = Table("attack", "remains", "why")
        for a in self.attacks:
            table.add_row(a.attack, "[red]yes[/]" if a.possible else "no", escape(a.reason))
        console.print(table)


def plan_report(
    model: str | nn.Module,
    select: str | Sequence[str] = "all",
    *,
    train: str | Sequence[str] | None = None,
    preset: str = "quantised",
    positions: Positions = "learnable",
    anatomy: Anatomy | None = None,
) -> PlanReport:
    """Say which attacks remain if `train` is trained and `select` encrypted, and what that costs.

    Args:
        model: A model, or its name as in `build_model`.
        select: A selection as in `EncryptedGradients`, or several; `()` encrypts nothing.
        train: What is trained, see `trained_sizes`, or several; None takes the parameters of the
            model that ask for a gradient.
        preset: Name of the encryption preset, for the bytes.
        positions: How positions are trained: `learnable`, or what a defense makes of them.
        anatomy: For a model that is not recognised.

    Raises:
        InputError: Unknown model, selection or preset, a selection that names nothing, or nothing
            that is trained.
        Incompatible: Positions that a defense cannot make of those of this model, or of none.

    Examples:
        >>> report = plan_report("vit_tiny_patch16_224:depth=1", "attention")
        >>> "position" in report.remaining()
        True
    """
    if positions not in get_args(Positions):
        raise expected(f"positions among {', '.join(get_args(Positions))}", repr(positions))
    nothing = not isinstance(select, str) and not select
    select = select if isinstance(select, str) else "/".join(select)
    name = model if isinstance(model, str) else type(model).__name__
    network = build_model(model) if isinstance(model, str) else model
    anatomy = anatomy or Anatomy.of(network)
    trained = None
    if train is not None:
        train = train if isinstance(train, str) else "/".join(train)
        trained = trained_sizes(network, anatomy, train)
    own = sum(p.numel() for p in network.parameters())
    if not nothing:
        every = trained or {n: p.numel() for n, p in canonical_parameters(network).items()}
        require_all_match(anatomy, select, every)
    stack = () if positions == "none" and anatomy.positions is None else _DEFENSES[positions]
    for defense in stack:
        defense.check(network, anatomy, stack)
    traits = replace(traits_of(stack, anatomy), sealed=() if nothing else (select,))
    plain = released(network, anatomy, traits, trained=trained)
    if not plain.sizes:
        raise expected(
            "a parameter that is trained",
            f"none of {train or 'the model'} under {positions} positions",
            "Name more of the model with --train, or leave positions learnable.",
        )  # fmt: skip
    chosen = plain.sizes.keys() - plain.plain
    if not chosen and not nothing:
        raise expected("a selection that names a parameter", repr(select))
    held = sum(plain.sizes.values())
    return PlanReport(
        model=name,
        select=select,
        preset=preset,
        positions=positions,
        encrypted=_cost(chosen, plain.sizes, preset),
        minimal=_cost(minimal_names(anatomy, plain.sizes), plain.sizes, preset),
        attacks=remaining(plain),
        train="all" if train is None else train,
        trained=Trained(held, held / own),
    )


def _cost(names: Iterable[str], sizes: dict[str, int], preset_name: str) -> Cost:
    count, kind = sum(sizes[n] for n in names), preset(preset_name)
    layout = kind.layout(kind.client_limit)
    slots = layout.chunks(count) * layout.values
    up, down = round(kind.bytes_up * slots), round(kind.bytes_down * slots)
    return Cost(count, count / sum(sizes.values()), up, down)
