"""From attempts of one attack to a verdict beside the control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vitguard.attacks.base import Attack
from vitguard.audit.attempts import Attempt
from vitguard.audit.measure import guesses, measurements, pictures, unmeasured
from vitguard.audit.scale import covered
from vitguard.metrics import identification_p, score
from vitguard.report.finding import LEAK_GAIN, Control, Finding, Verdict

__all__ = ["EQUALS", "LABELS_ONLY", "Beside", "finding_of"]

CHANCE = 0.01
EQUALS = 19
"""An identification counts as one hit among this many equals, so chance is 1 / 20.

A guess without information identifies an image in at most 5 % of cases. Measured over 2,000
CIFAR-10 images a kind (benchmarks/false_leaks.py): the mean image of a data set is the worst kind.
So one image alone is never told from decoys, two of two are.
"""
LABELS_ONLY = "recovers labels, no image"
_ALIKE = 40.0
"""PSNR in dB from which a guess is the image that was given; a flat one is no leak by its gain."""
_WORST = ("failed", "cut", "refused", "not applicable", "bounded", "blocked")
"""Outcomes and states by what they leave open, the most first."""
_CLEAR = 40.0
"""dB of gain from which nothing else is asked of a leak: no limit of a gate allows it."""
_NAMED = 3
"""Updates that a sentence names."""
_REPRODUCED = 0.05
"""Relative error of the simulated update up to which a guess explains the update."""


@dataclass(frozen=True)
class Beside:
    """The undefended control of one attack.

    Args:
        finding: What the attack did there.
        attempts: Its attempts, one for each batch.
        alone: What one part of the attack (`Attack.parts`), run alone there, did.
    """

    finding: Finding
    attempts: Sequence[Attempt]
    alone: Callable[[str], Beside]

    def leaks(self, part: str, batch: int) -> bool:
        """Whether a part of the attack leaks on one batch of the control."""
        return self.alone(part).leaking[batch]

    @cached_property
    def leaking(self) -> list[bool]:
        """Whether the control leaks, batch by batch: what it does on one says nothing of others."""
        return _leaking(self.attempts)


def finding_of(
    defense: str, attack: Attack, attempts: Sequence[Attempt], beside: Beside | None = None
) -> Finding:
    """Return the finding of one attack on one configuration over all batches.

    Args:
        beside: The same attack on the undefended model; None for the control itself.
    """
    control = None if beside is None else Control(beside.finding.verdict, beside.finding.psnr)
    base = Finding(
        defense, attack.name, "inconclusive", settings=attack.settings(), control=control
    )
    guessed = [a for a in attempts if a.guess is not None and len(a.guess.images)]
    failed = [a for a in attempts if a not in guessed and a.guess is None]
    if not guessed and len(failed) < len(attempts):
        return _labels_only(base, [a for a in attempts if a.guess is not None])
    if not guessed:
        return _without_a_guess(base, failed, beside)
    scored = [a for a in guessed if a.scores is not None]
    measured = replace(base, **(measurements(scored) if scored else unmeasured(guessed)))
    verdict, reason, cut = _verdict(measured, attack, scored, beside) if scored else (
        "inconclusive", _truth_unknown(guessed), "")  # fmt: skip
    explained = next((e for a in guessed if (e := _explanation(a))), "")
    unseen = _unseen(measured, scored) or explained
    if verdict != "leaks" and explained:
        # whatever the images are said to be: its guess is what the update was made of
        why = explained
        if scored and (measured.psnr is None or measured.psnr.max < _ALIKE):
            why += ", and is none of the images that were given: check them, mean and deviation"
        verdict, reason, cut = "leaks", why, ""
    if len(guessed) < len(attempts):
        missing = failed[0].reason if failed else "it gave no image"
        reason = f"{reason}; {len(attempts) - len(guessed)} of {len(attempts)} batches: {missing}"
        # the control may leak on the very batches that were not attacked
        verdict, cut = "leaks" if verdict == "leaks" else "inconclusive", cut or missing
    shown = pictures(scored, beside.attempts if beside else scored) if scored else guesses(guessed)
    return replace(
        measured, verdict=verdict, reason=reason, images=shown, undecided=cut, unseen=unseen
    )


def _without_a_guess(base: Finding, failed: Sequence[Attempt], beside: Beside | None) -> Finding:
    """Return the finding of an attack that gave nothing: blocked, not applicable, or failed."""
    # a batch that was blocked does not speak for one that failed
    first = next((a for s in _WORST for a in failed if a.state == s), failed[0])
    if right := _labels_right(failed):
        base, said = replace(base, labels_correct=_share(failed)), f"{first.reason}; {right}"
        first = replace(first, reason=said)
    if first.state == "failed":
        return replace(base, reason=first.reason, undecided=first.reason)
    leaks = beside is not None and beside.finding.verdict == "leaks"
    if leaks and first.state == "not applicable":
        told = f"{base.attack} does not apply here, and the undefended control leaks to it"
        return replace(base, verdict="not applicable", reason=first.reason, undecided=told)
    return replace(base, verdict=first.state, reason=first.reason)  # type: ignore[arg-type]


def _labels_only(base: Finding, attempts: Sequence[Attempt]) -> Finding:
    """Return the finding of an attack that makes no claim on pixels: no metric, no verdict."""
    right = _labels_right(attempts)
    return replace(
        base,
        reason=f"{LABELS_ONLY} ({right})" if right else LABELS_ONLY,
        labels_correct=_share(attempts),
        seconds=sum(a.seconds for a in attempts) / len(attempts),
        details=dict(attempts[0].guess.details) if attempts[0].guess else {},
    )


def _share(attempts: Sequence[Attempt]) -> float | None:
    """Return the share of labels that were read rightly, None where that is not known."""
    known = [a.labels_correct for a in attempts if a.labels_correct is not None]
    return sum(known) / len(known) if known else None


def _labels_right(attempts: Sequence[Attempt]) -> str:
    share = _share(attempts)
    return "" if share is None else f"{100 * share:.0f} % of the labels right"


def _explanation(attempt: Attempt) -> str:
    """Return why the update itself says that a guess is right, "" where it does not.

    A guess that was fitted to the update reproduces it, with images that are nothing like the
    truth. Where the audit made the update, the truth decides.
    """
    guess, error = attempt.guess, attempt.error
    if attempt.facts.certain or guess is None:
        return ""
    if error is not None and error <= _REPRODUCED and not guess.fitted:
        return f"the reconstruction reproduces the update to {100 * error:.2g} %"
    if guess.verified is not None and bool(guess.verified.any()):
        proved, patches = int(guess.verified.sum()), guess.verified.numel()
        return f"{proved} of {patches} patches proved by the attack itself"
    return ""


def _truth_unknown(guessed: Sequence[Attempt]) -> str:
    error = guessed[0].error
    why = "the guess does not reproduce the update"
    if error is None:
        why = "whether the guess reproduces the update could not be checked"
    elif error <= _REPRODUCED:
        why = f"the guess was fitted to the update (to {100 * error:.2g} %): others may fit as well"
    return f"the truth is not known and {why}"


def _verdict(
    measured: Finding, attack: Attack, scored: Sequence[Attempt], beside: Beside | None
) -> tuple[Verdict, str, str]:
    """Return the verdict, its reason, and what would have to run to its end to decide it."""
    if why := _leak(measured, scored):
        return "leaks", why, _closer(measured, attack, scored, beside)
    if beside is None:
        return "inconclusive", "the undefended model does not leak to this attack", _cut(scored)
    control = beside.finding.verdict
    if control != "leaks":
        why = f"the undefended control does not leak either ({control})"
        return "inconclusive", why, _cut(scored) or beside.finding.undecided
    if why := _cut(scored) or _still(scored) or _refused(attack, scored, beside) or _spared(scored):
        return "inconclusive", why, why
    if hits := [n for a in scored for n, h in _identified(a) if h]:
        why = f"{hits[0]} was picked out of {measured.decoys} decoys: more images would decide"
        return "inconclusive", why, why
    if untested := [i for i, leaks in enumerate(beside.leaking) if not leaks]:
        why = f"the undefended control does not leak on {_updates(beside, untested)}"
        unknown = [_open(beside.attempts[i]) for i in untested]
        return "inconclusive", why, next(filter(None, unknown), "")
    if not (parts := _outcomes(attack, scored)):
        return "resisted", f"the undefended control leaks to the same attack{_part(beside)}", ""
    ran = [[n for n, o in _outcomes(attack, [a]).items() if o == "ran"] for a in scored]
    seen = [next((n for n in each if beside.leaks(n, i)), "") for i, each in enumerate(ran)]
    if not all(seen):
        names = ", ".join(dict.fromkeys(n for each in ran for n in each)) or "none"
        why = f"no rung that ran here ({names}) leaks on the undefended control"
        if any(seen):
            why += f" of {_updates(beside, [i for i, n in enumerate(seen) if not n])}"
        return "inconclusive", why, why
    witness = ", ".join(dict.fromkeys(seen))
    why = f"the undefended control leaks to {witness}, which ran to its end here{_part(beside)}"
    if bounded := [n for n, outcome in parts.items() if outcome == "bounded"]:
        said = _said(scored, bounded[0]).rpartition("; ")[2]
        why += f"; {', '.join(bounded)} did not, but {said}"
    return "resisted", why, ""


def _closer(
    measured: Finding, attack: Attack, scored: Sequence[Attempt], beside: Beside | None
) -> str:
    """Return what might have come closer than a leak did, "" where nothing is left open.

    A gate may allow a leak up to a limit, and what was cut or refused is not known to keep to it.
    """
    gain = measured.gain
    if beside is None or (gain is not None and gain >= _CLEAR):
        return ""
    least = LEAK_GAIN if gain is None else max(LEAK_GAIN, gain)
    return _cut(scored) or _refused(attack, scored, beside) or _spared(scored, least)


def _leaking(attempts: Sequence[Attempt]) -> list[bool]:
    """Return for each batch whether its own image, or one of them, leaks."""
    told = _told([a for a in attempts if a.scores is not None])
    return [bool(_explanation(a)) or any(_images(a, told)) for a in attempts]


def _images(attempt: Attempt, told: bool) -> list[bool]:
    """Return for each image of a batch whether it leaks by its own numbers.

    Args:
        told: Whether the images of all batches were told from decoys more often than chance.
    """
    scores, scale = attempt.scores, attempt.facts.scale
    if scores is None or scale is None:
        return [False] * len(attempt.facts.names)
    above = (scores.patch_psnr - scale.baseline.patch_psnr >= LEAK_GAIN).tolist()
    proved = [False] * len(above) if scores.recovered is None else scores.recovered.any(1).tolist()
    hits = [told and hit for _, hit in _identified(attempt)]
    return [any(each) for each in zip(above, proved, hits, strict=True)]


def _part(beside: Beside) -> str:
    """Say of how many images alone the control leaks; "" where it is all of them."""
    told = _told([a for a in beside.attempts if a.scores is not None])
    each = [leaks for a in beside.attempts for leaks in _images(a, told)]
    return f" ({sum(each)} of {len(each)} images leak there)" if 0 < sum(each) < len(each) else ""


def _updates(beside: Beside, which: Sequence[int]) -> str:
    """Name some of the updates by their first images."""
    names = [a.facts.names[0] for a in (beside.attempts[i] for i in which[:_NAMED])]
    more = ", ..." if len(which) > _NAMED else ""
    return f"{len(which)} of {len(beside.attempts)} updates ({', '.join(names)}{more})"


def _open(attempt: Attempt) -> str:
    """Return why nobody knows whether an attempt would have leaked, "" where it ran to its end."""
    return attempt.reason if attempt.state == "failed" else _cut([attempt])


def _leak(measured: Finding, scored: Sequence[Attempt]) -> str:
    """Return why the guesses leak, "" where they do not."""
    gain = measured.gain
    if gain is not None and gain >= LEAK_GAIN:
        return f"{gain:.1f} dB above the best no-information guess"
    return _unseen(measured, scored)


def _unseen(measured: Finding, scored: Sequence[Attempt]) -> str:
    """Return why the guesses leak whatever their dB, "" where they do not."""
    if _told(scored):
        hits = [bool(h) for a in scored for _, h in _identified(a)]
        return f"{sum(hits)} of {len(hits)} images told from {measured.decoys} decoys"
    found = [a.scores.recovered for a in scored if a.scores and a.scores.recovered is not None]
    if exact := sum(int(patches.sum()) for patches in found):
        total = sum(patches.numel() for patches in found)
        return f"{exact} of {total} patches recovered, each proved by the attack itself"
    return ""


def _told(scored: Sequence[Attempt]) -> bool:
    """Whether images were told from decoys more often than chance, over all batches."""
    each: dict[Any, bool] = {}  # a copy of an image is no second chance: its hits go together
    for a in scored:
        for i, (_, hit) in enumerate(_identified(a)):
            shown = None if a.facts.truths is None else a.facts.truths[i].detach().cpu().float()
            each.setdefault(len(each) if shown is None else shown.numpy().tobytes(), hit)
    return identification_p(sum(each.values()), len(each), EQUALS) < CHANCE


def _identified(attempt: Attempt) -> list[tuple[str, bool]]:
    """Return each image's name, and whether it stood out among the decoys."""
    assert attempt.scores is not None
    told = attempt.scores.identified
    hits = [False] * len(attempt.facts.names) if told is None else told.tolist()
    return list(zip(attempt.facts.names, hits, strict=True))


def _cut(scored: Sequence[Attempt]) -> str:
    left = {one for a in scored if a.guess for one in a.guess.details.get("unfinished", ())}
    return f"it ended before {', '.join(sorted(left))}: allow more" if left else ""


def _still(scored: Sequence[Attempt]) -> str:
    still = [n for a in scored if a.mask is not None for n in a.mask.sum(1).tolist() if n < 2]
    why = "warm-up, ratio or probability"
    return f"the shuffle moved no patch of {len(still)} images ({why})" if still else ""


def _outcomes(attack: Attack, scored: Sequence[Attempt]) -> dict[str, str]:
    """Return what became of each part of the attack; the worst over the batches."""
    found: dict[str, str] = {}
    for name in attack.parts():
        each = [a.guess.details.get("outcomes", {}).get(name) for a in scored if a.guess]
        if said := [one for one in each if one is not None]:
            found[name] = next((worst for worst in _WORST if worst in said), "ran")
    return found


def _refused(attack: Attack, scored: Sequence[Attempt], beside: Beside) -> str:
    """Name a part that does not apply here though it may leak on the control, "" where none does.

    A part that stands in for it on a damaged update, and ran to its end, makes up for it.
    """
    parts, outcomes = attack.parts(), _outcomes(attack, scored)
    made_up = {
        name
        for ran, part in parts.items()
        if outcomes.get(ran) == "ran" and part.rung is not None
        for name in part.rung.instead_of
    }
    for name, outcome in outcomes.items():
        if outcome == "failed":
            return f"{name} failed ({_said(scored, name)})"
        if outcome != "refused" or name in made_up:
            continue
        control = beside.alone(name).finding
        if control.verdict == "leaks":
            told = f"{name}, to which the undefended control leaks, does not apply here"
            return f"{told} ({_said(scored, name)})"
        if control.undecided:  # nobody knows that it is useless
            told = f"{name} does not apply here, and on the undefended control"
            return f"{told} it is undecided: {control.undecided}"
    return ""


def _spared(scored: Sequence[Attempt], least: float = LEAK_GAIN) -> str:
    """Name a part whose image leaks though the attack chose another one, "" where there is none.

    The choice never saw the truth and may be wrong; whoever runs that part alone has the image.
    """
    for a in scored:
        facts = a.facts
        if a.guess is None or facts.truths is None or facts.scale is None:
            continue
        truths = covered(facts.truths.cpu(), facts.patch_size)
        for name, images in a.guess.others.items():
            if images.shape[1:] != facts.truths.shape[1:] or not bool(images.isfinite().all()):
                continue
            seen = score(covered(images, facts.patch_size), truths, facts.patch_size).patch_psnr
            gain = float((seen - facts.scale.baseline.patch_psnr).max())
            if gain >= least:
                told = f"{name} by itself comes {gain:.1f} dB above the best no-information guess"
                return f"{told}, but another image was chosen: run {name} alone"
    return ""


def _said(scored: Sequence[Attempt], part: str) -> str:
    """Return what a part of the attack said of itself."""
    every = (a.guess.details.get("rungs", {}).get(part) for a in scored if a.guess)
    return next((said for said in every if said), "")
