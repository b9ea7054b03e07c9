"""Which stacks to use: those that stood where they were measured, and those with a promise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields

from vitguard.advise.commands import Audited
from vitguard.advise.counts import Counts
from vitguard.advise.report import Applies, Option, Proven
from vitguard.defenses.base import Defense, traits_of
from vitguard.errors import InputError, VitguardError
from vitguard.evidence import Stack
from vitguard.registry import defense_types, parse_stack

__all__ = ["options", "proven", "uncovered"]

_EPSILON = 8.0  # of a stack that asks for one


def options(
    counts: Counts, audited: Audited, batch_size: int, see: str, stood: Sequence[Stack]
) -> Iterator[Option]:
    """Yield the stacks that stood, where they go with this model and no count says otherwise."""
    for stack in stood:
        try:
            defenses = parse_stack(stack.spec)
            for defense in defenses:
                defense.check(counts.trained, counts.anatomy, defenses)
            traits = traits_of(defenses, counts.anatomy)
        except VitguardError:
            continue  # it does not go with this model
        keyed, proven = bool(traits.sealed), math.isfinite(traits.information)
        if keyed and see != "server" and not proven:
            continue
        batch = max(batch_size, *(d.least_batch(counts.anatomy) for d in defenses))
        left = tuple(a.attack for a in counts.at(batch, traits).values() if a.gives_away)
        if left and traits.exact:
            continue  # it stood elsewhere; here a count says that it would not
        yield Option(
            stack.spec,
            batch,
            stack.said(),
            () if proven else left,
            "server" if keyed else "server and clients",
            audited.command(batch, stack.spec),
            "" if proven else "; ".join(filter(None, (d.audit_note() for d in defenses))),
        )


def proven(counts: Counts, audited: Audited, batch_size: int, see: str) -> Iterator[Proven]:
    """Yield the installed defenses with a promise that holds whatever the attack, and that fit.

    What keys hide is hidden from the server alone. Those without keys come first.
    """
    promised = [cls for cls in defense_types().values() if cls.promise]
    named = [
        cls(epsilon=_EPSILON) if "epsilon" in {f.name for f in fields(cls)} else cls()  # type: ignore
        for cls in promised
    ]
    # asked of the settings that need no noise to be found for an epsilon, which takes a while
    keyed = {d.spec(): bool(traits_of([type(d)()], counts.anatomy).sealed) for d in named}
    for defense in sorted(named, key=lambda d: keyed[d.spec()]):
        if (see == "server" or not keyed[defense.spec()]) and _fits(defense, counts):
            command = audited.command(batch_size, defense.spec())
            yield Proven(defense.spec(), defense.promise, command)


def _fits(defense: Defense, counts: Counts) -> bool:
    try:
        defense.check(counts.trained, counts.anatomy, [defense])
    except InputError:
        return False
    return True


def uncovered(attacks: Sequence[Applies], batch_size: int, see: str) -> Iterator[str]:
    """Yield what no known attack or proof covers."""
    named = {a.attack: a for a in attacks}
    yield "an attack that nobody has written yet: no proof covers it but that of privacy"
    if (matching := named.get("matching")) and matching.applies:
        yield f"{matching.attack}: how far it gets is known only when it has run"
    labels = [n for n in ("labels", "cascade") if n in named and named[n].applies]
    if labels:
        ends = [named[n].ends_at for n in labels]
        until = f" below batch {max(e for e in ends if e)}" if all(ends) else ""
        yield (
            "labels, and the features that the classification head reads: the attacks "
            f"{' and '.join(labels)} find them{until}"
        )
    if (search := named.get("token-search")) and search.applies:
        yield f"{search.attack}: how far it gets is known only when it has run"
    if batch_size > 1:
        yield (
            "one image whose gradient is larger than all others' of its batch, unless each one's "
            "is brought to the same size"
        )
    yield "many updates of the same images"
    yield "a server that writes the weights on which clients train"
    if see != "server":
        yield "the sum of a few clients' updates, which every client sees"
