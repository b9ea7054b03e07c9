"""What every defense must hold of what it draws: noise as claimed, from its own draws, not kept."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitguard.core import Traits
from vitguard.defenses.base import BatchDefense, Defense, ModelDefense, StepDefense
from vitguard.defenses.privacy.verification import measure_noise
from vitguard.errors import Unprotected
from vitguard.guard import Guard, protect
from vitguard.testing.tried import (
    SIZES,
    batch,
    beside,
    embedded,
    first_difference,
    guarded,
    inputs,
    size_for,
    small_model,
)

__all__ = ["check_draws", "check_noise", "check_state"]

_CHANCE = 1e-9
_BARE = 0.2  # share of entries that a draw may leave as they are, by rounding
_ROUNDING = 1e-4  # noise of so little beside the values is lost in large ones of 32 bits
_ALIKE = 0.2
_KEPT = 1e-3  # what rounding may move of a mean or a norm


def check_noise(defense: Defense) -> None:
    """Noise has the standard deviation that the traits claim, at more than one batch size.

    That of one tensor is not that of another, every entry has some, and where it is added to an
    update it does not follow the signs of the values. Of tensors that are said to be rescaled, mean
    and norm are those of before, and the noise is measured with that undone.
    """
    if isinstance(defense, ModelDefense | BatchDefense):
        return
    for size in (size_for(defense, size) for size in SIZES):
        guard, plain, update = beside(defense, size)
        traits, names = guard.traits, [n for n, t in update.tensors.items() if t.numel() > 1]
        added: list[Tensor] = []
        if traits.noise > 0 and not traits.sparse and not math.isfinite(traits.information):
            added = [plain.tensors[n] for n in names if bool(plain.tensors[n].any())]
            pairs = ((update.tensors[n], plain.tensors[n]) for n in names)
            parts = [_added(defense, traits, *pair) for pair in pairs if bool(pair[1].any())]
            claimed = traits.noise
        elif math.isfinite(traits.information):
            clip = defense.settings().get("clip")
            if not isinstance(clip, int | float):
                continue  # nothing says how large the ball is
            again = guard.update(*inputs(size))  # the same sum under fresh noise
            parts = [(update.tensors[n] - again.tensors[n]) / math.sqrt(2) for n in names]
            claimed = clip / math.sqrt(2 * traits.information)
            claimed /= size if isinstance(defense, StepDefense) else 1
        else:
            continue
        if not parts:
            continue
        fit = measure_noise(torch.cat([p.flatten() for p in parts]), claimed)
        assert fit.p_value >= _CHANCE or abs(fit.ratio - 1) < 0.02, (
            f"the noise of {defense.name} on a batch of {size} has {fit.ratio:.4g} times the "
            f"standard deviation that its traits claim (p = {fit.p_value:.2g})"
        )
        bare = max(float((p == 0).double().mean()) for p in parts)
        rounded = bool(added) and claimed < _ROUNDING
        assert bare < _BARE or traits.sparse or rounded, (
            f"{defense.name} leaves {bare:.0%} of the entries of a tensor as they were: its noise "
            "is on the others alone"
        )
        if added:
            signs = torch.cat([t.sign().flatten() for t in added])
            alike = float(F.cosine_similarity(torch.cat([p.flatten() for p in parts]), signs, 0))
            assert abs(alike) < max(_ALIKE, 6 / math.sqrt(len(signs))), (
                f"the noise of {defense.name} follows the signs of the values (cosine {alike:.2f})"
            )
        for one, other in combinations([p.flatten() for p in parts if p.numel() >= 64], 2):
            count = min(len(one), len(other))
            alike = float(F.cosine_similarity(one[:count], other[:count], 0))
            assert abs(alike) < 0.9, (
                f"{defense.name} adds the same noise to two tensors: their difference is without it"
            )


def _added(defense: Defense, traits: Traits, sent: Tensor, plain: Tensor) -> Tensor:
    """Return the noise on a tensor over the root mean square of its values."""
    size = plain.square().mean().sqrt()
    if not traits.rescaled:
        return (sent - plain) / size
    about, own = sent - sent.mean(), plain - plain.mean()
    mean, norm = sent.mean() - plain.mean(), about.norm() / own.norm() - 1
    assert abs(float(mean)) < _KEPT * float(size) and abs(float(norm)) < _KEPT, (
        f"{defense.name} does not keep mean and norm of a tensor, though its traits say so"
    )
    shorter = math.hypot(1, traits.noise * float(size / own.square().mean().sqrt()))
    return (about * shorter - own) / size


def check_draws(defense: Defense) -> None:
    """What is drawn repeats from the generator given to protect, and from no seed of the process.

    Noise that traits claim, and moved tokens that are drawn, are others in each process and each
    update.
    """
    seeded = [_drawn(defense, torch.Generator().manual_seed(0), process) for process in (1, 2)]
    odd = first_difference(*seeded)
    assert odd is None, (
        f"{defense.name} draws {odd} from elsewhere than the draws that it is given: of one "
        "generator it makes two, so that no audit of it repeats, and its seed may be known"
    )
    other = _drawn(defense, torch.Generator().manual_seed(1), 1)
    try:
        secret = [_drawn(defense, None, 1) for _ in range(2)]
    except Unprotected:
        return  # it gives nothing without keys or others, but for a rehearsal
    varying = [n for n, t in seeded[0].items() if not torch.equal(t, other[n])]
    assert not varying or any(not torch.equal(secret[0][n], secret[1][n]) for n in varying), (
        f"{defense.name} draws the same in two processes with the same seeds: who knows them "
        "takes it off again"
    )
    if not _claims_noise(defense):
        return
    for name, tensor in secret[0].items():
        if not name.startswith("update 1") or tensor.numel() == 1 or not bool(tensor.any()):
            continue
        assert not torch.equal(tensor, secret[1][name]), (
            f"{defense.name} adds the same noise in two processes with the same seeds ({name})"
        )
        assert not torch.equal(tensor, secret[0][name.replace("update 1", "update 2")]), (
            f"{defense.name} adds the same noise to two updates ({name})"
        )


def _claims_noise(defense: Defense) -> bool:
    if isinstance(defense, ModelDefense | BatchDefense):
        return False
    traits = guarded(defense).traits
    return not traits.sealed and (traits.noise > 0 or math.isfinite(traits.information))


def _drawn(defense: Defense, generator: torch.Generator | None, process: int) -> dict[str, Tensor]:
    """Return what two updates hold and what the blocks got in four passes.

    Args:
        process: Seed of every generator that a process has.
    """
    with _same_process(process):
        guard = protect(small_model().train(), [defense], generator=generator)
        found = {}
        for i in (1, 2):
            with guard.ungated():
                update = guard.update(*inputs(size_for(defense)))
            found |= {f"update {i}, {n}": t for n, t in update.tensors.items()}
        for i in range(4 if isinstance(defense, ModelDefense) else 0):
            found[f"tokens {i}"] = embedded(guard.model, guard.anatomy.embedded, batch(3)[0])
    return found


@contextmanager
def _same_process(seed: int) -> Iterator[None]:
    """Seed what a process draws from, and put it back afterwards."""
    legacy = np.random.mtrand  # what `np.random.rand` and its like draw from
    states: tuple[Any, Any] = random.getstate(), legacy.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            legacy.seed(seed)
            yield
    finally:
        random.setstate(states[0])
        legacy.set_state(states[1])


def check_state(defense: Defense) -> None:
    """No draw is left in a state dict, nor what is secret in a copy of the model."""
    guard = protect(small_model().train(), [defense])
    twin = Guard.of(copy.deepcopy(guard.model))
    for _ in range(2):  # draws of few patches are alike now and then
        for one in (guard, twin):
            for size in (3, 1, 3, 3):
                with one.rehearsing(), torch.no_grad():
                    one.model.train()(batch(size)[0] * 2 - 1)
            with one.ungated(), suppress(Unprotected):  # keys or others are missing: none is made
                one.update(*inputs(max(size_for(defense), 3)))
        states = [
            {n: t for n, t in g.model.state_dict().items() if isinstance(t, Tensor)}
            for g in (guard, twin)
        ]
        odd = first_difference(*states)
        assert odd is None, (
            f"{defense.name} leaves {odd} in the state dict, which tells of a draw: a checkpoint "
            "or an average would hold it"
        )
    for how, model in (
        ("deepcopy", copy.deepcopy(guard.model)),
        ("pickle", pickle.loads(pickle.dumps(guard.model))),
    ):
        left = sorted(Guard.of(model).truth())
        assert not left, f"a {how} of a model under {defense.name} holds its last draw: {left[:5]}"
