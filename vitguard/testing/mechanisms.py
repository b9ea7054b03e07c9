"""Assertions about what leaves a client: sensitivity, epsilon, sealed names, files, refusals."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitguard.core import Update
from vitguard.defenses.privacy.verification import canary_audit, canary_bound, measure_sensitivity
from vitguard.errors import (
    Blocked,
    Incompatible,
    Inconclusive,
    InputError,
    Unprotected,
    VitguardError,
    expected,
)
from vitguard.testing.noted import noted

__all__ = [
    "assert_epsilon_not_exceeded",
    "assert_fails_closed",
    "assert_round_trip",
    "assert_sealed",
    "assert_sensitivity",
    "bytes_of",
    "encodings",
    "needles",
]


@noted
def assert_sensitivity(
    total: Callable[[Sequence[int]], Tensor], count: int, *, clip: float
) -> None:
    """Assert that a clipped sum moves by at most `clip` when one of `count` examples leaves.

    Control: the bound is reached within 1 %, so that some example was clipped.

    Args:
        total: Returns the flat clipped sum of the examples with these indices, without noise. Draws
            (masks, dropout) must follow the example's index.
        clip: The claimed bound on the 2-norm, above 0.

    Raises:
        AssertionError: An example moves the sum further.
        Inconclusive: No example reaches the clip, so a missing clip would not show.
        InputError: A clip of zero or less, or no example.
    """
    if not 0 < clip < math.inf:
        raise expected("a finite clip above 0", clip)
    moved = measure_sensitivity(total, count)
    if not moved <= clip * (1 + 1e-4):  # so that NaN fails
        raise AssertionError(
            f"One example moves the sum by {moved:.6g}, where at most {clip:g} is claimed "
            f"({moved / clip:.3g} times as far)."
        )
    if moved < 0.99 * clip:
        raise Inconclusive(
            f"No example reaches the clip: the sum moves by {moved:.6g} of {clip:g}, so that a "
            "missing clip would not show. Use a smaller clip or larger gradients."
        )


@noted
def assert_epsilon_not_exceeded(
    release: Callable[[bool], float],
    *,
    epsilon: float,
    delta: float,
    trials: int = 200,
    confidence: float = 1 - 1e-6,
) -> None:
    """Assert that canaries prove no larger epsilon than the claimed one.

    Control: the same scores with a quarter of the noise must prove more than the claim. An audit
    that could not tell that much less noise could not have failed.

    Args:
        release: Makes a release with or without the canary and returns its score (mean 0 or 1), as
            `vitguard.defenses.privacy.canary_audit` takes it.
        epsilon, delta: The claim for one release.
        trials: Releases on each side; even, at least 40.
        confidence: Chance that the lower bound holds: how seldom a sound mechanism fails this.

    Raises:
        AssertionError: The lower bound exceeds the claim.
        Inconclusive: The canary is not seen, or the trials are too few to prove anything.
    """
    if not 0 < epsilon < math.inf:
        raise Inconclusive(f"Expected a finite epsilon above 0, got {epsilon}: nothing is claimed.")
    scores: dict[bool, list[float]] = {False: [], True: []}

    def recorded(included: bool) -> float:
        score = float(release(included))
        scores[included].append(score)
        return score

    bound = canary_audit(recorded, trials=trials, delta=delta, confidence=confidence)
    seen = ", ".join(f"{k} {getattr(bound, k):.3g}" for k in ("thresholds", "gaussian", "ratio"))
    if not bound.epsilon <= epsilon:
        raise AssertionError(
            f"Canaries prove epsilon of at least {bound.epsilon:.4g} at delta {delta:g}, where "
            f"{epsilon:.4g} is claimed ({seen}; {trials} trials a side)."
        )

    def quieter(values: list[float]) -> Tensor:
        given = torch.tensor(values, dtype=torch.float64)
        return given.mean() + (given - given.mean()) / 4

    control = canary_bound(quieter(scores[False]), quieter(scores[True]), delta, confidence)
    if not control.epsilon > epsilon:
        raise Inconclusive(
            f"With a quarter of the noise canaries would prove epsilon {control.epsilon:.4g} only, "
            f"not more than the claimed {epsilon:.4g}. Use more trials than {trials}, or a score "
            "that sees the canary."
        )


@noted
def assert_sealed(
    update: Update, names: Iterable[str], *, plain: Mapping[str, Tensor] | None = None
) -> None:
    """Assert that no part of an update shows the tensors called `names`.

    Control: with `plain`, the values are looked for byte by byte, in each type of floating point,
    and are found in an update that carries them.

    Args:
        update: What leaves the client.
        names: The names that must be sealed, or one.
        plain: The tensors before they were sealed, by name.

    Raises:
        AssertionError: A name can be read or is not listed as sealed, or its values are there.
        Inconclusive: There is no name, or a plain tensor is constant and cannot be told.
    """
    _require_update(update)
    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise Inconclusive("Expected names that must be sealed, got none.")
    readable = [n for n in wanted if update.can_read(n)]
    absent = [n for n in wanted if n not in update.sealed and n not in readable]
    if readable or absent:
        raise AssertionError(
            f"Of {len(wanted)} names {len(readable)} can be read ({readable[:5]}) and "
            f"{len(absent)} are not listed as sealed ({absent[:5]})."
        )
    for name in wanted if plain is not None else ():
        assert plain is not None
        tensor = plain.get(name)
        if tensor is None or tensor.numel() < 4 or bool((tensor == tensor.flatten()[0]).all()):
            raise Inconclusive(f"{name} has no plain values that could be told in the update.")
        for needle in needles(tensor.detach().cpu().flatten()):
            if not _shows(replace(update, payloads={"control": bytes_of(needle)}), needle):
                raise Inconclusive(f"The values of {name} are not found where they are.")
            if _shows(update, needle):
                raise AssertionError(f"{name} is sealed, but its values are in the update.")


def _require_update(update: Any) -> None:
    if not isinstance(update, Update):
        raise expected(
            "a vitguard.Update", type(update).__name__, "Make one of tensors: Update(tensors, ...)."
        )


def needles(flat: Tensor) -> list[Tensor]:
    """Return some runs of four values that differ, from all over a tensor."""
    starts = torch.linspace(0, len(flat) - 4, min(8, len(flat) - 3)).long().tolist()
    runs = [flat[i : i + 4] for i in dict.fromkeys(starts)]
    telling = [run for run in runs if bool((run != run[0]).any())]
    return telling or runs[:1]


def _shows(update: Update, needle: Tensor) -> bool:
    where = [bytes_of(t) for t in update.tensors.values()] + list(update.payloads.values())
    return any(written in part for written in encodings(needle) for part in where)


def encodings(needle: Tensor) -> list[bytes]:
    """Return a run of values as bytes, in its own type and in other floating-point ones."""
    kinds = {needle.dtype}
    if needle.is_floating_point() and bool(needle.half().all()):  # zeros are everywhere
        kinds |= {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    return [bytes_of(needle.to(kind)) for kind in kinds]


def bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor as a file or message would hold them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@noted
def assert_round_trip(update: Update, folder: str | Path | None = None) -> None:
    """Assert that an update comes back from its file as it was, to the last bit.

    Control: the comparison tells an update in which one bit of one tensor differs.

    Raises:
        AssertionError: A fact, name, type or value is another one.
        Inconclusive: The update has nothing whose loss would show.
    """
    _require_update(update)
    filled = [n for n, t in update.tensors.items() if t.numel()]
    if not filled and not update.sealed and not update.payloads:
        raise Inconclusive("The update is empty: a file that loses everything would not show.")
    if filled:
        name = filled[0]
        changed = update.tensors[name].detach().clone().contiguous().reshape(-1)
        changed.view(torch.uint8)[0] ^= 1
        other = {**update.tensors, name: changed.reshape(update.tensors[name].shape)}
        if not _differences(update, replace(update, tensors=other)):
            raise Inconclusive(f"A changed bit of {name} is not told.")
    with tempfile.TemporaryDirectory(dir=folder) as where:
        path = Path(where) / "update.safetensors"
        update.save(path)
        if odd := _differences(update, Update.load(path)):
            raise AssertionError(f"{len(odd)} parts differ after a round trip: {odd[:5]}.")


def _differences(a: Update, b: Update) -> list[str]:
    facts = [
        k
        for k in vars(a)
        if k not in ("tensors", "payloads", "sealed") and getattr(a, k) != getattr(b, k)
    ]
    facts += [k for k in ("payloads", "sealed") if dict(getattr(a, k)) != dict(getattr(b, k))]
    for name in {**a.tensors, **b.tensors}:
        x, y = a.tensors.get(name), b.tensors.get(name)
        same = x is not None and y is not None and (x.dtype, x.shape) == (y.dtype, y.shape)
        if not same or bytes_of(x) != bytes_of(y):  # type: ignore[arg-type]
            facts.append(name)
    return facts


@noted
def assert_fails_closed(attempt: Callable[[], Any], *, control: Callable[[], Any]) -> None:
    """Assert that `attempt` is refused on purpose, and gives nothing.

    Control: `control`, the same with the defense in place, works.

    Raises:
        AssertionError: It went through, or it broke with an error that is no refusal.
        Inconclusive: The control does not work either, so that the refusal says nothing.
    """
    try:
        control()
    except Exception as error:
        raise Inconclusive(
            f"The control does not work either: {type(error).__name__}: {error}"
        ) from error
    try:
        got = attempt()
    except (Unprotected, Incompatible, InputError, Blocked):
        return
    except Exception as error:
        kind = "" if isinstance(error, VitguardError) else ", which is no error of vitguard"
        raise AssertionError(
            f"Expected a refusal, got {type(error).__name__}{kind}: {error}"
        ) from error
    raise AssertionError(f"Expected a refusal, got {type(got).__name__}: it went through.")
