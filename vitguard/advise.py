"""What to use for one's own model, batch and setting: `vitguard advise`.

Which exact attacks apply is what the attacks themselves say of the counts (docs/methods.md 2.1 to
2.5b and 4.5); which stacks stood is what was measured (`vitguard.evidence`). No model is built with
values: names and sizes are enough.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from vitguard.analysis import released, remaining
from vitguard.core import Traits
from vitguard.defenses.base import traits_of
from vitguard.errors import InputError, UnsupportedModel, VitguardError, expected
from vitguard.evidence import Evidence, Stack, evidence
from vitguard.models import build_model
from vitguard.registry import parse_stack
from vitguard.released import Remaining
from vitguard.trained import trained_sizes
from vitguard.vit import Anatomy

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["AdviceReport", "Applies", "Option", "advise_report"]

Setting = Literal["finetune", "scratch"]
See = Literal["server", "clients", "both"]
_MOST = 1 << 16  # images of a batch that are looked at
_NAMED = 3  # stacks that the table shows
_CLASSES = 10  # of a head that a bare backbone is given


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
    """

    stack: str
    batch: int
    evidence: str
    left: tuple[str, ...]
    hides_from: str
    verify: str


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
            what += f" (no exact count holds from {max(ends)} images on)"
        else:
            what = f"no exact attack's count holds {here}, which protects no image that dominates"
        if not self.options:
            return (
                f"{what}; no stack that was measured in full for this setting and fits this model "
                "has stood: use privacy, encryption or masks, and audit it."
            )
        best = self.options[0]
        return (
            f"{what}; the cheapest stack that stood where it was measured is {best.stack} with at "
            f"least {best.batch} image{'s' if best.batch > 1 else ''} an update, which is evidence "
            f"and no proof: {best.verify}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values (schema 1)."""
        return {"schema": 1, **json.loads(json.dumps(asdict(self))), "sentence": self.sentence()}

    def print_to(self, console: Console) -> None:
        """Print attacks, stacks, what is not covered, and the command."""
        from rich.table import Table

        def say(text: str, style: str = "", *, whole: bool = False) -> None:
            """Print a line, wrapped under its own indent; a command stays `whole`, to be copied."""
            indent = " " * (len(text) - len(text.lstrip()))
            lines = (
                [text]
                if whole
                else textwrap.wrap(
                    text, console.width, subsequent_indent=indent, break_on_hyphens=False
                )
            )
            for line in lines:
                console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

        if self.unsupported:
            return say(self.unsupported)
        say(
            f"{self.model}, batch size {self.batch_size}, {self.setting}, trained: {self.train}, "
            f"seen by: {self.see}; {self.tokens} tokens an image, {self.width} wide",
            "bold",
        )
        for note in self.notes:
            say(f"Note: {note}")
        table = Table("attack", "applies", "exact up to batch", "ends at batch")
        for a in self.attacks:
            table.add_row(
                a.attack,
                "[red]exactly[/]" if a.exact else "[yellow]in part[/]" if a.applies else "no",
                str(a.exact_until or "-"),
                str(a.ends_at or "none"),
            )
        console.print(table)
        for a in self.attacks:
            if a.exact:
                say(f"  {a.attack}: {a.reason}", "dim")
        say("Stacks that stood where they were measured, the cheapest first:", "bold")
        for option in self.options[:_NAMED]:
            say(f"  {option.stack}", "bold")
            say(f"    {option.evidence}")
            counts = ", ".join(option.left) or "no exact attack's"
            say(
                f"    here: at least {option.batch} images an update; counts that hold then: "
                f"{counts}; hides from: {option.hides_from}"
            )
            say(f"    {option.verify}", whole=True)
        if not self.options:
            say("  none that was measured in full in this setting and fits this model")
        if self.fallen:
            say(f"Fell: {', '.join(self.fallen)}")
        say("What holds by proof or by a key, whatever the attack:", "bold")
        for one in self.proven:
            say(f"  {one.stack}: {one.says}")
            say(f"    {one.verify}", whole=True)
        say("What no known attack or proof covers:", "bold")
        for line in self.uncovered:
            say(f"  {line}")
        say(self.measured)
        say(self.sentence(), "bold")


def advise_report(
    model: str | nn.Module,
    *,
    batch_size: int = 1,
    setting: Setting = "scratch",
    train: str = "all",
    see: See = "both",
    anatomy: Anatomy | None = None,
    table: Evidence | None = None,
) -> AdviceReport:
    """Say which exact attacks apply, which stacks stood, and how to verify it.

    Args:
        model: A model, or its name as in `build_model`; of a name only sizes are built.
        batch_size: Images behind one update, at least 1.
        setting: `finetune` (weights that somebody trained) or `scratch`.
        train: What is trained and sent, see `trained_sizes`.
        see: Who must not learn the images: the `server`, the other `clients` (who see the model
            and so the sum of updates), or `both`.
        anatomy: For a model that is not recognised.
        table: Evidence in place of what this package carries.

    Raises:
        InputError: An unknown model, setting or part, or a batch of no image.
        UnsupportedModel: No Vision Transformer.

    Examples:
        >>> advise_report("vit_base_patch32_224", batch_size=1).exact
        ('position', 'span', 'span-chain', 'gelu-span')
    """
    if batch_size < 1:
        raise expected("a batch size of at least 1", batch_size)
    for name, value, kinds in (("setting", setting, Setting), ("see", see, See)):
        if value not in get_args(kinds):
            raise expected(f"{name} among {', '.join(get_args(kinds))}", repr(value))
    name = model if isinstance(model, str) else type(model).__name__
    network, notes = _sized(model) if isinstance(model, str) else (model, [])
    anatomy = anatomy or Anatomy.of(network)
    asked: dict[str, Any] = {
        "model": name, "batch_size": batch_size, "setting": setting, "train": train, "see": see,
        "notes": tuple(notes),
    }  # fmt: skip
    if why := _odd(network, anatomy):
        said = (
            f"{name} is no plain Vision Transformer ({why}): no exact attack of vitguard reads it, "
            "no stack was measured on it, and matching attacks and labels remain; vitguard audit "
            f"--model {name} --attack matching is all that can be said."
        )
        return AdviceReport(**asked, unsupported=said)
    counts = _Counts(network, anatomy, train)
    table = evidence() if table is None else table
    measured = table.stacks(setting)
    attacks = tuple(counts.attacks(batch_size))
    options = tuple(counts.options(name, batch_size, see, [s for s in measured if s.stood]))
    return AdviceReport(
        **asked,
        tokens=anatomy.tokens,
        width=anatomy.width,
        attacks=attacks,
        options=options,
        fallen=tuple(s.spec for s in measured if s.fell),
        proven=tuple(_proven(name, batch_size, see)),
        uncovered=tuple(_uncovered(attacks, see)),
        measured=_when(table),
    )


def _sized(spec: str) -> tuple[nn.Module, list[str]]:
    """Build a model of a name without values; a backbone gets a head."""
    with torch.device("meta"):
        model = build_model(spec)
        try:
            bare = Anatomy.of(model).classes == 0
        except UnsupportedModel:
            return model, []
        if not bare:
            return model, []
        headed = f"{spec}{',' if ':' in spec else ':'}num_classes={_CLASSES}"
        note = f"{spec} has no head: one of {_CLASSES} classes is assumed"
        try:
            return build_model(headed), [note]
        except InputError:
            return model, [f"{spec} has no head, and takes none"]


def _odd(model: nn.Module, anatomy: Anatomy) -> str:
    """Say why the equations of a plain Vision Transformer do not describe a model."""
    if not anatomy.blocks:
        return "its blocks were not recognised"
    sizes = {n: p.shape for n, p in model.named_parameters()}
    widths = [sizes.get(f"{block.fc1}.weight", (0, 0))[-1] for block in anatomy.blocks]
    if len(set(widths)) > 1:
        return f"its blocks are {min(widths)} to {max(widths)} wide"
    return ""


@dataclass(frozen=True)
class _Counts:
    """The attacks' own statements about updates of one model, for any batch and stack."""

    model: nn.Module
    anatomy: Anatomy
    train: str

    @cached_property
    def sent(self) -> dict[str, int]:
        return trained_sizes(self.model, self.anatomy, self.train)

    def at(self, batch_size: int, traits: Traits | None = None) -> dict[str, Remaining]:
        traits = traits_of([], self.anatomy) if traits is None else traits
        plain = released(self.model, self.anatomy, traits, trained=self.sent, batch_size=batch_size)
        return {one.attack: one for one in remaining(plain)}

    @cached_property
    def series(self) -> dict[int, dict[str, Remaining]]:
        return {}

    def _seen(self, batch_size: int) -> dict[str, Remaining]:
        if batch_size not in self.series:
            self.series[batch_size] = self.at(batch_size)
        return self.series[batch_size]

    def attacks(self, batch_size: int) -> Iterator[Applies]:
        for name, one in self._seen(batch_size).items():
            applies = one.possible
            yield Applies(
                name,
                applies,
                applies and one.exact,
                one.reason,
                self._last(name, exact=True),
                None if (last := self._last(name, exact=False)) >= _MOST else last + 1,
            )

    def _last(self, name: str, *, exact: bool) -> int:
        """Return the largest batch at which an attack applies, or is exact; 0 for none."""

        def holds(size: int) -> bool:
            one = self._seen(size).get(name)
            return one is not None and one.possible and (one.exact or not exact)

        if not holds(1):
            return 0
        low = 1
        while low < _MOST and holds(2 * low):
            low *= 2
        if low >= _MOST:
            return low
        high = 2 * low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    def options(self, name: str, batch_size: int, see: See, stood: list[Stack]) -> Iterator[Option]:
        for stack in stood:
            try:
                defenses = parse_stack(stack.spec)
                for defense in defenses:
                    defense.check(self.model, self.anatomy, defenses)
                traits = traits_of(defenses, self.anatomy)
            except VitguardError:
                continue  # it does not go with this model
            keyed, proven = bool(traits.sealed), math.isfinite(traits.information)
            if keyed and see != "server" and not proven:
                continue
            batch = max(batch_size, *(d.least_batch(self.anatomy) for d in defenses))
            left = tuple(a.attack for a in self.at(batch, traits).values() if a.gives_away)
            if left and traits.exact:
                continue  # it stood elsewhere; here a count says that it would not
            yield Option(
                stack.spec,
                batch,
                stack.said(),
                () if proven else left,
                "server" if keyed else "server and clients",
                _command(name, batch, stack.spec, stack.measured[0].attack),
            )


def _command(model: str, batch: int, stack: str, attack: str) -> str:
    size = f" --batch-size {batch} --num-images {batch}" if batch > 1 else ""
    return f"vitguard audit --model {model}{size} --defense {stack} --attack {attack}"


def _proven(name: str, batch_size: int, see: See) -> Iterator[Proven]:
    stacks = {
        "privacy:epsilon=8.0": "its epsilon bounds what anyone learns of an image, over all steps "
        "that it counts; it costs accuracy",
    }
    if see == "server":
        stacks["encryption"] = "the server adds ciphertext; clients open the sum and read it"
        stacks["masking"] = "the server reads the sum of the clients, and no single update"
    for stack, says in stacks.items():
        yield Proven(stack, says, _command(name, batch_size, stack, "ladder"))


def _uncovered(attacks: tuple[Applies, ...], see: See) -> Iterator[str]:
    named = {a.attack: a for a in attacks}
    yield "any attack that nobody has written: only privacy with its epsilon is a proof"
    if (matching := named.get("matching")) and matching.applies:
        yield f"matching: {matching.reason}"
    labels = [n for n in ("labels", "cascade") if n in named and named[n].applies]
    if labels:
        ends = [named[n].ends_at for n in labels]
        until = f" below batch {max(e for e in ends if e)}" if all(ends) else ""
        yield f"labels and class-token features, which {', '.join(labels)} read{until}"
    if (search := named.get("token-search")) and search.applies:
        yield f"token-search: {search.reason}"
    yield "one image whose gradient outweighs its batch, unless each one's is made as large"
    yield "many rounds on the same images, and a server that writes the weights"
    if see != "server":
        yield "a sum of few clients, which every client sees"


def _when(table: Evidence) -> str:
    if not table.date:
        return "This package carries no evidence."
    made = ", ".join(f"{k} {v}" for k, v in table.versions.items())
    return f"Evidence of {table.date} ({made}); again: {table.command}"
