"""What remains if only these tensors are encrypted: `vitguard plan`.

Every statement is about what is plain, at batch size 1 where the exact attacks are strongest. It
counts equations and unknowns of METHODS 2.1 to 2.5b; `audit` is what confirms it on images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from vitguard.defenses.encryption import minimal_names, preset, select_names
from vitguard.errors import expected
from vitguard.models import build_model
from vitguard.vit import Anatomy, canonical_parameters

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Cost", "PlanReport", "Remaining", "plan_report"]

Positions = Literal["learnable", "frozen", "random", "sincos", "none", "withheld"]


@dataclass(frozen=True)
class Cost:
    """Parameters that are encrypted, their share, and bytes a round and client."""

    parameters: int
    share: float
    bytes_up: int
    bytes_down: int


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
class PlanReport:
    """What a selection costs and leaves.

    Args:
        model, select, preset, positions: What was asked.
        encrypted: Cost of the selection.
        minimal: Cost of `plan`, the smallest set by role that ends the closed forms.
        attacks: What remains, closed forms first.
    """

    model: str
    select: str
    preset: str
    positions: str
    encrypted: Cost
    minimal: Cost
    attacks: tuple[Remaining, ...]

    def remaining(self) -> tuple[str, ...]:
        """Names of the attacks that remain."""
        return tuple(a.attack for a in self.attacks if a.possible)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"schema": 1, **json.loads(json.dumps(asdict(self)))}

    def to_json_text(self) -> str:
        """Return `to_json` as text; pure ASCII."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"

    def print_to(self, console: Console) -> None:
        """Print costs and a table of attacks."""
        from rich.markup import escape
        from rich.table import Table

        console.print(
            f"{escape(self.model)}, encrypted: [bold]{escape(self.select)}[/], "
            f"positions {self.positions}, preset {self.preset}"
        )
        costs = {self.select: self.encrypted, "plan": self.minimal}
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
    preset: str = "quantised",
    positions: Positions = "learnable",
    anatomy: Anatomy | None = None,
) -> PlanReport:
    """Say which attacks remain if only `select` is encrypted, and what that costs.

    Args:
        model: A model, or its name as in `build_model`.
        select: A selection as in `EncryptedGradients`, or several.
        preset: Name of the encryption preset, for the bytes.
        positions: How positions are trained: `learnable`, or what a defense makes of them.
        anatomy: For a model that is not recognised.

    Raises:
        InputError: Unknown model, selection or preset, or a selection that names nothing.

    Example:
        >>> report = plan_report("vit_tiny_patch16_224:depth=1", "attention")
        >>> "position" in report.remaining()
        True
    """
    if positions not in get_args(Positions):
        raise expected(f"positions among {', '.join(get_args(Positions))}", repr(positions))
    select = select if isinstance(select, str) else "/".join(select)
    name = model if isinstance(model, str) else type(model).__name__
    network = build_model(model) if isinstance(model, str) else model
    anatomy = anatomy or Anatomy.of(network)
    sizes = {n: p.numel() for n, p in canonical_parameters(network).items()}
    if positions != "learnable":
        sizes.pop(anatomy.positions or "", None)
    chosen = select_names(anatomy, select, sizes)
    if not chosen:
        raise expected("a selection that names a parameter", repr(select))
    plain = _Plain(anatomy, sizes, frozenset(sizes) - frozenset(chosen), positions)
    return PlanReport(
        model=name,
        select=select,
        preset=preset,
        positions=positions,
        encrypted=_cost(chosen, sizes, preset),
        minimal=_cost(minimal_names(anatomy, sizes), sizes, preset),
        attacks=tuple(rule(plain) for rule in _RULES),
    )


def _cost(names: Iterable[str], sizes: dict[str, int], preset_name: str) -> Cost:
    count, kind = sum(sizes[n] for n in names), preset(preset_name)
    layout = kind.layout(kind.client_limit)
    slots = layout.chunks(count) * layout.values
    up, down = round(kind.bytes_up * slots), round(kind.bytes_down * slots)
    return Cost(count, count / sum(sizes.values()), up, down)


@dataclass(frozen=True)
class _Plain:
    """What an attack would read: anatomy, all released names, the plain ones of them."""

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
    plain: _Plain, attack: str, needs: tuple[str, ...], obstacle: str, remains: str
) -> Remaining:
    """An obstacle ends it; else a hidden tensor does; else it remains."""
    if obstacle:
        return Remaining(attack, False, needs, obstacle)
    if hidden := plain.hidden(*needs):
        return Remaining(attack, False, needs, plain.why_hidden(hidden[0]))
    return Remaining(attack, True, needs, remains)


def _position(plain: _Plain) -> Remaining:
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
    after: str


def _sites(anatomy: Anatomy) -> Iterator[_Site]:
    """The norms in order, each with the weight whose output joined the stream just before."""
    link = None
    for number, block in enumerate(anatomy.blocks):
        yield _Site(f"block {number}, query-key-value", block.qkv, link, block.name)
        projection = f"{block.proj}.weight"
        yield _Site(f"block {number}, fc1", (f"{block.fc1}.weight",), projection, block.name)
        link = f"{block.fc2}.weight"


def _linear_obstacle(plain: _Plain) -> str:
    a = plain.anatomy
    if a.obstacles:
        return "; ".join(a.obstacles)
    if not a.blocks or not a.blocks[0].pre_norm:
        return "the first block is not x + attention(norm(x))"
    if plain.equations <= 0:
        return f"{a.tokens} tokens fill the {a.width} dimensions: no equation is left"
    if plain.positions in ("sincos", "none"):
        return (
            f"positions '{plain.positions}' are of low rank: the solution is not unique "
            "(minimum norm and the smoothest image remain)"
        )
    return ""


def _span(plain: _Plain) -> Remaining:
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


def _chain(plain: _Plain) -> Remaining:
    """The same equations at every norm that plain projections and fc2 lead to, taken together."""
    obstacle = _linear_obstacle(plain)
    if obstacle:
        return Remaining("span-chain", False, (), obstacle)
    a = plain.anatomy
    reads = [] if plain.hidden(a.patch_weight) else [a.patch_weight]
    unknowns, equations = plain.patch_rank, 0
    for site in _sites(a):
        if site.link is not None:
            if site.link not in plain.plain:
                count = f"{unknowns} unknowns, {equations} equations before it"
                why = f"the chain ends in {site.after}: {plain.why_hidden(site.link)} ({count})"
                return Remaining("span-chain", False, (site.link,), why)
            unknowns += a.tokens
            reads.append(site.link)
        rows = next((n for n in site.rows if n in plain.plain), None)
        if rows is None:
            continue
        reads.append(rows)
        unknowns, equations = unknowns + 1, equations + plain.equations
        if equations >= unknowns:
            why = f"up to {site.where}: {unknowns} unknowns, {equations} equations for each patch"
            return Remaining("span-chain", True, tuple(reads), why)
    why = f"all norms together: {unknowns} unknowns, {equations} equations for each patch"
    return Remaining("span-chain", False, tuple(reads), why)


def _gelu_span(plain: _Plain) -> Remaining:
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
    elif block.gated:
        obstacle = "the MLP multiplies two branches"
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


def _april(plain: _Plain) -> Remaining:
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


def _cascade(plain: _Plain) -> Remaining:
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


def _labels(plain: _Plain) -> Remaining:
    names = [n for n in plain.sizes if plain.anatomy.role(n) == "head"]
    readable = tuple(n for n in names if n in plain.plain)
    if readable:
        return Remaining("labels", True, readable, "the head's gradient tells the labels")
    return Remaining("labels", False, tuple(names), "the head has no plain gradient")


def _tokens(plain: _Plain) -> Remaining:
    """METHODS 4.5, `deep-tokens`: measured, in no list of closed forms."""
    a = plain.anatomy
    if plain.equations <= 0:
        why = f"{a.tokens} tokens fill the {a.width} dimensions: the spans saturate"
        return Remaining("token-search", False, (), why)
    for number, block in enumerate(a.blocks):
        needs = (f"{block.fc1}.weight", f"{block.fc2}.weight")
        if not block.gated and not plain.hidden(*needs):
            why = (
                f"both MLP layers of block {number} are plain: a search finds tokens and inverts "
                "the blocks below (128 wide and 17 tokens: 127 dB); untried at 384 wide and more"
            )
            return Remaining("token-search", True, needs, why)
    return Remaining("token-search", False, (), "no block has both MLP layers plain")


def _matching(plain: _Plain) -> Remaining:
    count = sum(plain.sizes[n] for n in plain.plain)
    if not count:
        return Remaining("matching", False, (), "nothing is plain")
    share = count / sum(plain.sizes.values())
    why = (
        f"{share:.0%} of the gradient is plain and dummy images can be fitted to it; no count "
        "says how far that gets: try it with audit"
    )
    return Remaining("matching", True, tuple(n for n in plain.sizes if n in plain.plain), why)


_RULES: tuple[Callable[[_Plain], Remaining], ...] = (
    _position, _span, _chain, _gelu_span, _april, _cascade, _labels, _tokens, _matching,
)  # fmt: skip
