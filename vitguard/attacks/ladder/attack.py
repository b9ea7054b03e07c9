"""The ladder: every exact attack, cheapest first, and the guess that explains the update best."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, ClassVar

import torch

from vitguard.attacks.base import Attack, InputAttack, Rung, guess_of
from vitguard.attacks.budget import Budget, CutShort, worked
from vitguard.attacks.evidence import likeliest, mismatch
from vitguard.attacks.labels import pair_labels, try_labels
from vitguard.attacks.ladder.polish import polish
from vitguard.attacks.span.attack import SpanInversion
from vitguard.core import AffineSpace, Guess, View
from vitguard.discovery import discover
from vitguard.errors import Blocked, NoImage, NotApplicable, Unprotected, expected
from vitguard.vit import Anatomy

__all__ = ["Ladder"]

_FITS = 1e-2  # residual of `span` below which its space holds the truth
_CONTRADICTED = 0.1  # above it the patches may be right, but not all in their own image
_SHORTEST = 0.5  # nominal seconds of a rung at least
_ONE_BIT = math.log(2)  # nats; less does not give even one number 6 dB (rate-distortion theory)
_EXACT = 1e-3  # a relative mismatch below which no further rung is needed


@dataclass(frozen=True)
class Ladder(Attack):
    """Climb from `position` to `gelu-span`; hand back the guess that verifies itself best.

    Rungs are the attacks that say they are one (`Attack.rung`), third parties' among them. Of
    vitguard: `position`, `span`, `cascade` (labels of a batch), `gelu-span`, `deep-tokens` (where
    the first block cannot be read), `containment` (matrices of low rank, or of later blocks), and
    for damaged gradients `position-robust`, `span-robust` and `map`, which starts from the
    likeliest guess before it. A rung that does not apply says why in the details. The choice never
    sees the truth: the adversary recomputes the update from each guess with the known settings
    (`View.simulate`) and compares, and counts the patches that proved themselves. A single image
    that is nearly right is polished last.

    Details: `rung`, `verified` (share of patches), `mismatch` of the chosen guess, `rungs` (what
    each said), `outcomes` (what became of each, see `Attack.parts`), `exact` (what is known of
    exact attacks: `"no exact attack known"` where T >= D and B >= 2 means that, and not that there
    is none), `unfinished` (rungs that the budget cut or did not reach; an audit then never says
    `resisted`).

    Args:
        seconds: Budget of all rungs, in nominal seconds of work (`Budget`): the same work, and the
            same result, on every machine. What was found by then is returned.
        levels: Grey levels above zero of an image file, to which `polish` may round; None never.

    Raises:
        NotApplicable: No rung applied; the message has every rung's reason.
        Blocked: Every rung needs a tensor that cannot be read.

    References:
        docs/methods.md 2.5d.
    """

    name: ClassVar[str] = "ladder"
    family: ClassVar[str] = "ladder"
    covers: ClassVar[tuple[str, ...]] = ("closed-form",)
    proves_crafted: ClassVar[bool] = True  # each rung says it of itself
    seconds: float = 60.0
    levels: int | None = 255

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise expected("seconds above 0", self.seconds)
        if self.levels is not None and not self.levels >= 1:
            raise expected("levels of at least 1, or None", self.levels)

    def parts(self) -> dict[str, Attack]:
        """Return every rung that is installed, the cheapest first, each with the whole budget."""
        kinds = [k for k in discover("vitguard.attacks", Attack, InputAttack).values() if _rung(k)]
        rungs = [_made(kind) for kind in sorted(kinds, key=lambda k: _rung(k).exact)]
        return {rung.name: _budgeted(rung, self.seconds) for rung in rungs}

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the best guess of all rungs; a keyboard interrupt keeps what was found."""
        if not view.update.tensors and view.update.sealed:
            raise Blocked("every tensor of the update", next(iter(view.update.sealed.values())))
        climb = _Climb(view, generator, Budget.of(self.seconds))
        try:
            climb.all(self.parts().values())
        except KeyboardInterrupt:
            if not climb.guesses:
                raise
            return _cut(climb.best(), "the rest (interrupted)")
        best = climb.best()
        if self._clear(view):
            try:
                best = polish(view, best, generator, climb.budget, levels=self.levels)
            except (NotApplicable, Blocked):  # a rung may need less
                pass
            except KeyboardInterrupt:
                return _cut(best, "polish (interrupted)")
        return best

    def _clear(self, view: View) -> bool:
        return view.update.batch_size == 1 and view.traits.exact


def _rung(kind: type) -> Any:
    rung = getattr(kind, "rung", None)
    if rung is not None and not isinstance(rung, Rung):
        raise expected(f"a Rung as the rung of {kind.__name__}", repr(rung))
    return rung


def _made(kind: type[Attack]) -> Attack:
    if without := [f.name for f in fields(kind) if f.init and _required(f)]:  # type: ignore[arg-type]
        raise expected(f"a default for every setting of the rung {kind.name}", ", ".join(without))
    return kind()


def _required(setting: Field[Any]) -> bool:
    return setting.default is MISSING and setting.default_factory is MISSING


def _budgeted(rung: Attack, seconds: float) -> Attack:
    """Return a rung with a budget of its own, where it takes one."""
    if any(f.name == "seconds" for f in fields(rung)):  # type: ignore[arg-type]
        return replace(rung, seconds=seconds)  # type: ignore[call-arg]
    return rung


def _cut(guess: Guess, what: str) -> Guess:
    left = [*guess.details.get("unfinished", ()), what]
    return replace(guess, details={**guess.details, "unfinished": left, "interrupted": True})


class _Climb:
    """The rungs tried so far."""

    def __init__(self, view: View, generator: torch.Generator, budget: Budget) -> None:
        self.view, self.generator, self.budget = view, generator, budget
        self.guesses: dict[str, Guess] = {}
        self.distance: dict[str, float] = {}
        self.said: dict[str, str] = {}
        self.outcomes: dict[str, str] = {}
        self.crafty: set[str] = set()  # rungs that read what a malicious server wrote
        self.labels: torch.Tensor | None = None

    @property
    def unfinished(self) -> list[str]:
        """Rungs that the budget cut or did not reach."""
        return [name for name, outcome in self.outcomes.items() if outcome == "cut"]

    def all(self, rungs: Iterable[Attack]) -> None:
        """Climb in the order for this update; stop at an exact guess."""
        damaged = not self.view.traits.exact
        for rung in sorted(rungs, key=lambda r: _rung(type(r)).damaged) if damaged else rungs:
            self._try(rung)
            if self._exact():
                return

    def _try(self, rung: Attack) -> None:
        """Run a rung unless less than its `least` nominal seconds are left, or none."""
        if not (share := rung.share(self.view)):
            return
        before = worked()
        try:
            rung.require(self.view)
            if self.budget.over or self.budget.left < rung.least(self.view):
                raise CutShort("not tried: the budget was spent")
            own = _budgeted(rung, max(share * self.budget.left, _SHORTEST))
            if any(f.name == "start" for f in fields(own)):  # type: ignore[arg-type]
                start = self.guesses.get(likeliest(self.view, self.guesses) or "")
                own = replace(own, start=start)  # type: ignore[call-arg]
            guess = guess_of(own, self.view, self.generator)
        except CutShort as why:
            return self._short(rung, str(why))
        except Blocked as why:
            return self._note(rung, "blocked", str(why))
        except NotApplicable as why:
            return self._note(rung, "refused", str(why))
        except Exception as error:  # a rung that breaks takes no other with it
            if isinstance(error, Unprotected):
                raise
            first = (str(error).splitlines() or [""])[0]
            return self._note(rung, "failed", f"it failed: {type(error).__name__}: {first}")
        if rung.proves_crafted:
            self.crafty.add(rung.name)
        whole = len(guess.images)
        distance = self._take(rung.name, guess) if whole else self._learn(guess.labels)
        known = "" if distance is None else f"mismatch {distance:.1e}, "
        proved = ""
        if guess.verified is not None and whole:
            proved = f"verified {self._verified(rung.name):.2f}, "
        said = f"{known}{proved}{1e-9 * (worked() - before):.1f} s"
        if guess.details.get("unfinished"):
            self._short(rung, said)
        else:
            self._note(rung, "ran", said)
        if guess.details.get("interrupted"):
            raise KeyboardInterrupt

    def _short(self, rung: Attack, said: str) -> None:
        """Note a rung that did not come to its end: unless nothing was to be had, it might have."""
        told = self.view.traits.information * self.view.update.local_steps
        if told > _ONE_BIT:
            return self._note(rung, "cut", said)
        why = f"the noise lets at most {told / _ONE_BIT:.2g} bits of an image through"
        self._note(rung, "bounded", f"{said}; {why}")

    def _note(self, rung: Attack, outcome: str, said: str) -> None:
        self.outcomes[rung.name], self.said[rung.name] = outcome, said

    def _learn(self, labels: torch.Tensor | None) -> None:
        """Take labels from a rung that gives no image; what was guessed before gets them too."""
        self.labels = labels
        for name, guess in list(self.guesses.items()) if labels is not None else []:
            self._take(name, guess)

    def _take(self, name: str, guess: Guess) -> float | None:
        """Keep a guess with the labels that are known by now; return its mismatch."""
        labels = guess.labels if self.labels is None else self.labels
        if labels is not None:
            guess = replace(guess, labels=pair_labels(self.view, guess.images, labels))
        self.guesses[name] = guess
        known = guess.details.get("mismatch") if self.view.update.batch_size == 1 else None
        distance = known if isinstance(known, float) else mismatch(self.view, guess)
        if distance is not None:
            self.distance[name] = distance
        return distance

    def _verified(self, name: str) -> float:
        verified = self.guesses[name].verified
        return 0.0 if verified is None else float(verified.double().mean())

    def _exact(self) -> bool:
        return any(self._proved(name) for name in self.guesses)

    def _proved(self, name: str) -> bool:
        """Whether the update, or every patch without the update saying otherwise, proves it."""
        distance = self.distance.get(name)
        if self.guesses[name].fitted:  # to this very distance: it proves nothing
            return False
        if distance is not None and distance < _EXACT:
            return True
        return self._verified(name) == 1.0 and (distance is None or distance < _CONTRADICTED)

    def best(self) -> Guess:
        """Return the chosen guess with what every rung said."""
        if not self.guesses:
            raise self._without_an_image()

        def worth(name: str) -> tuple[bool, float, bool, float, int]:
            share, distance = self._verified(name), self.distance.get(name)
            likeness = -1e9 if distance is None else -distance
            whole = len(self.guesses[name].images) == self.view.update.batch_size
            reads = self.view.crafted is not None and name in self.crafty
            return self._proved(name), share, reads, likeness, int(whole)

        name = max(self.guesses, key=worth)
        guess = self.guesses[name] = self._filled(name)
        explained = self._proved(name) and self.distance.get(name, 1.0) < _EXACT
        if explained and self.view.crafted is None:  # another image would make another update
            proved = torch.ones(len(guess.images), Anatomy.of(self.view.model).patches)
            told = {**guess.details, "told_apart": len(guess.images)}
            guess = replace(guess, verified=proved.bool(), details=told)
            self.guesses[name] = guess
        details: dict[str, Any] = {
            **guess.details,
            "rung": name,
            "verified": self._verified(name),
            "mismatch": self.distance.get(name),
            "rungs": dict(self.said),
            "outcomes": dict(self.outcomes),
            "exact": _known(self.view),
        }
        details.pop("unfinished", None)
        if (left := self.unfinished) and not self._proved(name):
            details["unfinished"] = left
        others = {n: g.images for n, g in self.guesses.items() if n != name}
        return replace(guess, space=self._space(guess), others=others, details=details)

    def _without_an_image(self) -> NoImage:
        """Return why no rung gave an image, with the labels: the head may be all that is sent."""
        known = self.labels
        labels = try_labels(self.view, self.generator) if known is None else known
        reasons = self._reasons() + ("" if labels is None else "; labels can be read from the head")
        if set(self.outcomes.values()) == {"blocked"}:
            ended: NoImage = Blocked("what any rung needs", reasons)
        elif self.unfinished or "failed" in self.outcomes.values():  # what broke tells nothing
            ended = CutShort(f"no rung that came to its end gave an image ({reasons})")
        else:
            ended = NotApplicable(f"no rung applied ({reasons})")
        ended.labels = labels
        return ended

    def _reasons(self) -> str:
        """Return what the rungs said: those that were cut first, and each reason once."""
        alike: dict[tuple[bool, str], dict[str, str]] = {}
        for name, said in self.said.items():
            tensor, blocked, why = said.partition(" cannot be read: ")
            key = self.outcomes[name] != "cut", f"cannot be read: {why}" if blocked else said
            alike.setdefault(key, {})[name] = tensor if blocked else ""
        parts = []
        for (_, why), told in sorted(alike.items(), key=lambda one: one[0][0]):
            tensors = ", ".join(dict.fromkeys(filter(None, told.values())))
            parts.append(
                f"{', '.join(told)}: {tensors} {why}" if tensors else f"{', '.join(told)}: {why}"
            )
        return "; ".join(parts)

    def _filled(self, name: str) -> Guess:
        """Return a guess; where it proves some patches of one image, with the rest of a nearer one.

        A search that proves some patches may know nothing of the others, which another rung has.
        """
        guess, distance = self.guesses[name], self.distance.get(name)
        proved = guess.verified
        if proved is None or not 0 < self._verified(name) < 1 or len(proved) != 1:
            return guess
        alone = {n: d for n, d in self.distance.items() if len(self.guesses[n].images) == 1}
        nearest = min(alone, key=lambda n: alone[n], default=name)
        if distance is None or alone[nearest] >= distance:
            return guess
        anatomy = Anatomy.of(self.view.model)
        own, rest = (anatomy.patchify(self.guesses[n].images.double()) for n in (name, nearest))
        patches = torch.where(proved.to(rest.device)[..., None], own.to(rest), rest)
        images = anatomy.unpatchify(patches).to(guess.images)
        whole = replace(guess, images=images, details={**guess.details, "rest_from": nearest})
        made = mismatch(self.view, whole)
        if made is None or made >= distance:
            return guess
        self.distance[name] = made
        return whole

    def _space(self, guess: Guess) -> AffineSpace | None:
        """What the guess, else `span`, leaves open, where that is known exactly."""
        source = guess if guess.space is not None else self.guesses.get(SpanInversion.name)
        if source is None or (source is not guess and self.view.traits.shuffle is not None):
            return None
        return source.space if source.details.get("residual", 1.0) < _FITS else None


def _known(view: View) -> str:
    """What is known of exact attacks on this many tokens of this width."""
    anatomy, batch = Anatomy.of(view.model), view.update.batch_size
    tokens = batch * anatomy.tokens
    if tokens < anatomy.width:
        return "exact attack known"
    return "no exact attack known" if batch > 1 else "exact only with readable positions or patches"
