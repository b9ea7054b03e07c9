"""What every attack must hold: knowing less never makes its verdict stronger.

    from vitguard.testing.weakening import check_weaker

    def test_contract():
        check_weaker(MyAttack())

`resisted` says that an attack which works came to its end and got nothing. An attack that misses a
tensor or ran out of work has to say so: grey in silence would be called resistance.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import nn

from vitguard import data
from vitguard.attacks.base import Attack
from vitguard.audit.attempts import Attempt, attempt
from vitguard.audit.exposure import Exposure, Facts
from vitguard.audit.scale import Scale, decoys_for
from vitguard.audit.verdicts import Beside, finding_of
from vitguard.core import Normalization, View
from vitguard.defenses.base import Defense
from vitguard.defenses.low_rank import LowRankUpdate
from vitguard.defenses.noise import GradientNoise
from vitguard.defenses.quantised_update import QuantisedUpdate
from vitguard.defenses.sign_update import SignUpdate
from vitguard.errors import Inconclusive
from vitguard.guard import Guard, protect
from vitguard.threats.curious_server import CuriousServer

__all__ = ["check_proofs", "check_weaker", "less_work"]

ROLES = ("patch", "position", "attention", "mlp", "norm", "head")
"""Parts of a ViT that are hidden one by one."""
_LITTLE = 1e-3
"""Nominal seconds of work in which no attack comes to its end."""
_DAMAGE = (
    *(GradientNoise(scale) for scale in (0.0, 1e-6, 1e-3, 0.1)),
    *(LowRankUpdate(rank) for rank in (1, 3)),
    SignUpdate(),
    QuantisedUpdate(4),
)


def check_weaker(attack: Attack, model: nn.Module | None = None) -> None:
    """Hiding a tensor, or cutting the work, turns no verdict into `resisted`.

    The attack runs on one photo of 8 x 8 pixels and a plain gradient of it. Where it works, the
    weaker runs must leak, be blocked, not apply, or be inconclusive.

    Args:
        model: One on which the attack works, for images of 8 x 8 pixels in patches of 4 x 4; a
            small ViT by default.

    Raises:
        Inconclusive: With all it needs the attack does not work on that model: nothing is shown.
    """
    guard, facts, whole = _exposed(model)
    beside = _control(attack, facts, whole)
    if beside.finding.verdict != "leaks":
        raise Inconclusive(
            f"Nothing was shown of {attack.name}: with all it needs it {beside.finding.verdict} "
            f"({beside.finding.reason}). Give a model on which it works."
        )
    for what, one, view in _weaker(attack, guard, whole):
        found = finding_of(what, one, [_tried(one, facts, view)], beside)
        assert found.verdict != "resisted", (
            f"{attack.name} is said to have been resisted though {what}; with all it needs it "
            f"{beside.finding.verdict}. It must raise Blocked or NotApplicable, or name what is "
            f"unfinished in its details: {found.reason}"
        )


def check_proofs(attack: Attack, model: nn.Module | None = None) -> None:
    """A patch that an attack calls proved is right, also where a defense changed the update.

    Noise of several sizes, low ranks, signs and few bits: each leaves other equations standing.

    Args:
        model: As for `check_weaker`.
    """
    for defense in _DAMAGE:
        _, facts, view = _exposed(model, defense)
        made = _tried(attack, facts, view)
        if made.guess is None or made.guess.verified is None or made.scores is None:
            continue
        claimed, right = made.guess.verified, made.scores.recovered
        wrong = int(claimed.sum()) - (0 if right is None else int(right.sum()))
        assert wrong <= 0, (
            f"{attack.name} calls {wrong} of {int(claimed.sum())} patches proved that are wrong, "
            f"under {defense.spec()}"
        )


def less_work(attack: Attack) -> Attack | None:
    """Return the attack with a budget that cuts it; None where it has none (`seconds`).

    A number of iterations is no budget: the control has the same one.
    """
    if all(f.name != "seconds" for f in fields(attack)):  # type: ignore[arg-type]
        return None
    return replace(attack, seconds=_LITTLE)  # type: ignore[call-arg]


def _weaker(attack: Attack, guard: Guard, view: View) -> Iterator[tuple[str, Attack, View]]:
    """Yield in words what is missing, and the attack and the view that miss it."""
    for role in ROLES:
        if guard.anatomy.select(role, view.update.tensors):
            threat = CuriousServer((role,))
            yield f"{role} is hidden", attack, threat.view(guard, view.update, view.normalization)
    if (cut := less_work(attack)) is not None:
        yield "its budget cut it", cut, view


def _control(attack: Attack, facts: Facts, view: View) -> Beside:
    def beside(one: Attack) -> Beside:
        attempts = [_tried(one, facts, view)]
        finding = finding_of("none", one, attempts)
        return Beside(finding, attempts, lambda part: beside(attack.parts()[part]))

    return beside(attack)


def _tried(attack: Attack, facts: Facts, view: View) -> Attempt:
    return attempt(attack, facts, Exposure(view), 0)


def _exposed(model: nn.Module | None, *defenses: Defense) -> tuple[Guard, Facts, View]:
    """Return what an adversary sees of one photo's gradient."""
    model = _small_vit() if model is None else copy.deepcopy(model)
    facts, normalization = _facts(), Normalization()
    guard = protect(model.train(), defenses, generator=torch.Generator().manual_seed(0))
    update = guard.update(normalization.apply(facts.truths), facts.labels)  # type: ignore[arg-type]
    return guard, facts, CuriousServer().view(guard, update, normalization)


def _small_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=8, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=3
        )


@functools.cache
def _facts() -> Facts:
    photo, patch = data.sample_images((8, 8), count=1).pixels, (4, 4)
    scale = Scale.of(photo, patch, decoys_for(photo, 0), 0)
    return Facts(("photo",), patch, photo, torch.tensor([1]), scale)
