"""An audit of federated rounds: every message, every sum, and what two sums give away together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitguard import data
from vitguard.attacks.base import Attack
from vitguard.audit.agreement import disagreement
from vitguard.audit.corridor import corridor_of
from vitguard.audit.exposure import Exposure, Facts, Run, bound_of
from vitguard.audit.pipeline import CONTROL, findings, level_of
from vitguard.audit.received import (
    CONTROL_NOTE,
    OTHER_CONTROL,
    check_names,
    sample_photos,
    without_control,
)
from vitguard.audit.scale import Scale, decoys_for
from vitguard.audit.seen import Seen, SeenRound, Share, mean_of, together
from vitguard.audit.spreading import Progress, Work
from vitguard.audit.stated import facts_of
from vitguard.audit.victim import Victim
from vitguard.core import LocalTraining
from vitguard.errors import NotApplicable, expected
from vitguard.registry import AnyAttack, families_not_run, parse_attacks
from vitguard.report.audit_report import AuditReport
from vitguard.report.finding import Finding
from vitguard.threats.curious_server import Threat
from vitguard.vit import Anatomy, canonical_name

__all__ = ["Rounds", "audit_rounds"]

Rounds = SeenRound | Seen | Sequence["SeenRound | Seen"]
"""What an audit of rounds takes: rounds, and things seen of them."""

PLAIN = "plain"
"""The row of clients that run no defense, beside the control `none`."""


def audit_rounds(
    rounds: Rounds,
    *,
    attacks: str | AnyAttack | Sequence[str | AnyAttack] = "ladder",
    adversary: Threat,
    model_name: str | None = None,
    weights: str = "as given",
    notes: Sequence[str] = (),
    seed: int = 0,
    work: Work,
    progress: Progress | None = None,
) -> AuditReport:
    """Attack what was seen of rounds; see `vitguard.audit`.

    Raises:
        InputError: There is nothing to attack, or one thing twice.
    """
    things, said = _things(rounds, adversary)
    first = things[0]
    model = first.guard.public_model()
    asked = parse_attacks(attacks, fast=next(model.parameters()).device.type == "cpu")
    chosen = [a for a in asked if isinstance(a, Attack)]
    known = [s.pixels for t in things for s in t.shares if s.pixels is not None]
    decoys = decoys_for(torch.cat(known), seed) if known else None
    looks = [_Look(thing, adversary, seed, decoys) for thing in things]
    runs = [run for look in looks for run in look.runs()]
    found = findings(runs, chosen, seed=seed, work=work, progress=progress)
    alone = {look.thing.name for look in looks if look.training is None}
    found = [without_control(f) if f.exposure in alone else f for f in found]
    unlike = {t.name for t in things if not t.alike}
    found = [without_control(f, UNLIKE) if f.exposure in unlike else f for f in found]
    resisted = {f.exposure for f in found if f.verdict == "resisted"}
    for look in looks:
        name = look.thing.name
        if name in resisted and (why := look.doubt()):
            found = [without_control(f, why) if f.exposure == name else f for f in found]
    found += [
        Finding(
            t.defense or PLAIN,
            a.name,
            "not applicable",
            ON_INPUT,
            settings=a.settings(),
            exposure=t.name,
        )
        for t in things
        for a in asked
        if not isinstance(a, Attack)
    ]
    if alone:
        said.append(f"{OTHER_CONTROL} So it is of: {', '.join(sorted(alone))}.")
    if unlike:
        said.append(f"{UNLIKE} So it is of: {', '.join(sorted(unlike))}.")
    if any(look.pixels is None for look in looks):
        said.append(CONTROL_NOTE)
    for thing in things:
        said.append(thing.note)
        said += [d.audit_note() for d in thing.guard.defenses]
    every = [facts for run in runs for facts, _ in run.batches]
    trained = dict.fromkeys(str(look.training or "not known") for look in looks)
    return AuditReport(
        model=facts_of(model, Anatomy.of(model), model_name),
        images=tuple(dict.fromkeys(n for t in things for s in t.shares for n in s.names)),
        batch_size=min(t.update.batch_size for t in things),
        baseline=level_of(every),
        findings=tuple(found),
        weights=weights,
        update=f"{'; '.join(trained)}, of federated rounds",
        seed=seed,
        threat=adversary.describe(),
        families_not_run=families_not_run(chosen),
        notes=tuple(note for note in dict.fromkeys((*notes, *said)) if note),
        interrupted=work.stop.is_set(),
    )


STATED = (
    "The images of some of its clients are only stated, and a sum does not show whether they are "
    "right: nothing in it has resisted."
)
UNLIKE = (
    "Its clients ran different defenses, and no adversary here is told of all: nothing in it has "
    "resisted."
)
ON_INPUT = "an attack on the input needs a model to query, and not what leaves a round"


def _things(rounds: Rounds, adversary: Threat) -> tuple[list[Seen], list[str]]:
    """Return everything that is seen, differences of sums too, and why one does not exist.

    An adversary that singles out a client sees its share in place of the sum; one that changes its
    weights by the round also sees its rounds together.
    """
    given = [rounds] if isinstance(rounds, SeenRound | Seen) else list(_iterable(rounds))
    strangers = [g for g in given if not isinstance(g, SeenRound | Seen)]
    if strangers or not given:
        got = type(strangers[0]).__name__ if strangers else "none"
        raise expected("a model and a batch, or rounds of a federation", got)
    whole = [g for g in given if isinstance(g, SeenRound)]
    target = adversary.target
    sums: list[Seen] = []
    things: list[Seen] = []
    for one in given:
        if isinstance(one, Seen):
            things.append(one)
            continue
        things += one.messages
        if one.total is not None:
            sums.append(one.alone(target) if target in one.included else one.total)
            things.append(sums[-1])
    if adversary.changing and len(sums) > 1:
        things.append(together(sums))
    notes = [
        f"Round {r.number} has no sum: {r.failed}" if r.failed else
        f"Round {r.number} refused {c}: {why}"
        for r in whole
        for c, why in (r.refused or {"": ""}).items()
        if r.failed or c
    ]  # fmt: skip
    summed = [r for r in whole if r.total is not None]
    for one, other in itertools.combinations(summed, 2):
        pair = (one, other) if len(one.included) >= len(other.included) else (other, one)
        try:
            things.append(pair[0].minus(pair[1]))
        except NotApplicable as error:
            notes.append(f"No difference of sums: {error}.")
    if not things:
        why = "; ".join(filter(None, notes))
        raise expected("rounds from which something left", f"none: {why}")
    names = [t.name for t in things]
    if twice := next((n for n in names if names.count(n) > 1), ""):
        raise expected("each thing that was seen once", f"{twice} twice")
    return things, notes


def _iterable(rounds: object) -> Iterable[SeenRound | Seen]:
    return rounds if isinstance(rounds, Iterable) else [rounds]  # type: ignore[list-item]


@dataclass
class _Look:
    """One thing that was seen, and the undefended control beside it."""

    thing: Seen
    adversary: Threat
    seed: int
    decoys: Tensor | None

    def __post_init__(self) -> None:
        shares = self.thing.shares
        client = shares[0].client if len(shares) == 1 else ""
        self.threat = self.adversary.at(self.thing.number, client)
        self.earlier = [replace(self, thing=one) for one in self.thing.earlier]
        self.training = LocalTraining.of(self.thing.update)
        pixels = [s.pixels for s in self.thing.shares]
        known = [p for p in pixels if p is not None]
        self.pixels = torch.cat(known) if known and len(known) == len(pixels) else None
        self.model = self.thing.guard.public_model()
        self.anatomy = Anatomy.of(self.model)
        own = {canonical_name(n): t for n, t in self.model.state_dict().items()}
        check_names(own, self.thing.update)

    def runs(self) -> list[Run]:
        """Return the control and the thing itself, beside each other."""
        thing = self.thing
        facts = self._facts()
        seen = facts if self.pixels is not None else self._sample().facts()[0]
        made_here = self.training is not None and all(s.certain for s in thing.shares)
        steps = thing.update.local_steps if made_here else None
        bound = bound_of(thing.guard.defenses, steps)
        return [
            Run(CONTROL, ((seen, self._control),), exposure=thing.name),
            Run(
                thing.defense or PLAIN,
                ((facts, self._exposed),),
                bound,
                thing.name,
                corridor_of(thing.guard.defenses, steps, self.seed),
            ),
        ]

    def _exposed(self) -> Exposure:
        thing = self.thing
        view = self.threat.view(thing.guard, thing.update, thing.normalization, loss=thing.loss)
        view = replace(view, earlier=tuple(look._exposed().view for look in self.earlier))
        masks = [s.mask for s in thing.shares]
        whole = [m for m in masks if m is not None]
        return Exposure(view, torch.cat(whole) if whole and len(whole) == len(masks) else None)

    def _facts(self) -> Facts:
        shares, patch = self.thing.shares, self.anatomy.patch_size
        names = tuple(n for s in shares for n in s.names)
        if self.pixels is None or self.decoys is None:
            told = names or tuple(f"image {i}" for i in range(self.thing.update.batch_size))
            return Facts(told, patch, certain=False)
        labels = [s.labels for s in shares if s.labels is not None]
        return Facts(
            names, patch, self.pixels,
            torch.cat(labels) if len(labels) == len(shares) else None,
            Scale.of(self.pixels, patch, self.decoys, self.seed),
            certain=all(s.certain for s in shares),
        )  # fmt: skip

    def doubt(self) -> str:
        """Return why the images that a caller states may not be behind it, "" where they are."""
        thing = self.thing
        shares = thing.shares
        stated = [(s, s.pixels) for s in shares if not s.certain and s.pixels is not None]
        if not stated:
            return ""
        if len(shares) > 1:
            return STATED
        share, pixels = stated[0]
        victim = self._victim(share, pixels)
        return disagreement(
            victim, thing.guard.defenses, thing.update, self._exposed().view, share.labels
        )

    def _control(self) -> Exposure:
        """Make the same update, or sum of updates, without a defense."""
        victims = (
            [self._sample()]
            if self.pixels is None
            else [self._victim(s, s.pixels) for s in self.thing.shares if s.pixels is not None]
        )
        weights = [1.0] if self.pixels is None else [s.weight for s in self.thing.shares]
        made = [v.made(()) for v in victims]
        update = mean_of([u for _, u in made], weights)
        view = self.threat.control().view(
            made[0][0], update, self.thing.normalization, loss=self.thing.loss
        )
        return Exposure(replace(view, earlier=tuple(e._control().view for e in self.earlier)))

    def _victim(self, share: Share, pixels: Tensor) -> Victim:
        labels = share.labels
        if labels is None:
            labels = data.assign_labels(share.count, self.anatomy.classes)
        return self._undefended(pixels, labels, share.names)

    def _sample(self) -> Victim:
        a, size = self.anatomy, self.thing.update.batch_size
        photos = sample_photos((size, a.channels, *a.image_size))
        names = tuple(f"sample {i}" for i in range(size))
        return self._undefended(photos, data.assign_labels(size, a.classes), names)

    def _undefended(self, pixels: Tensor, labels: Tensor, names: tuple[str, ...]) -> Victim:
        return Victim(
            self.model, self.thing.normalization, self.training or LocalTraining(),
            self.thing.loss, self.seed, pixels, labels, names, len(pixels),
        )  # fmt: skip
