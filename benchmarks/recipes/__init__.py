"""Published defenses, rebuilt to be attacked: one file each, none of them a recommendation.

Each module of this folder holds `JUDGED`, a `Judged`: what the paper claims, how it is rebuilt, and
the attack that decides. Where a defense of vitguard is the published one, the row names its spec;
otherwise the module has a small `Defense` of its own, written from the paper's description, and
where the ladder is blind to it an attack that knows it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass

from vitguard.attacks.base import Attack
from vitguard.defenses.base import Defense

__all__ = ["PLACES", "Judged", "judged"]

PLACES = ("positions", "keys", "features", "images", "update")
"""Where published defenses act, in the order of the page."""


@dataclass(frozen=True)
class Judged:
    """One published defense, and what decides whether it holds.

    Args:
        title: What the paper calls it.
        place: Where it acts, one of `PLACES`.
        source: Authors and arXiv number.
        claim: What the paper claims, in one sentence.
        rebuilt: How it is rebuilt here, and what of the paper could not be checked.
        threat: What the adversary knows beside update, public model and settings.
        stack: The defenses, or a spec of them.
        attack: The attack that decides, or a spec of it.
        found: What it shows, in one sentence.
        side: Pixels on a side of the attacked images, 32 or (the middle) 16.
        images: How many, one update each.
    """

    title: str
    place: str
    source: str
    claim: str
    rebuilt: str
    threat: str
    stack: Sequence[Defense] | str
    attack: Attack | str
    found: str
    side: int = 32
    images: int = 4


def judged() -> dict[str, Judged]:
    """Return every row by the name of its file, in the order of the page."""
    found = {}
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        row = importlib.import_module(info.name).JUDGED
        found[info.name.rpartition(".")[2]] = row
    return dict(sorted(found.items(), key=lambda item: (PLACES.index(item[1].place), item[0])))
