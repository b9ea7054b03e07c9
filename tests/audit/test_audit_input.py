"""Attacks on the input in an audit: every dtype, one seed one report, and no failure ends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from vitguard.attacks.base import Attack, InputAttack, InputResult
from vitguard.attacks.fgsm import FGSM
from vitguard.attacks.position import PositionInversion
from vitguard.audit import audit
from vitguard.errors import Blocked, NotApplicable, Unprotected, expected


@dataclass(frozen=True)
class Fake(InputAttack):
    """Raises what it is told to, or notes what it was given."""

    name: ClassVar[str] = "fake"
    error: Exception | None = None

    def evaluate(self, model, images, labels, *, normalization=None, generator=None):
        if self.error is not None:
            raise self.error
        like = next(model.parameters())
        assert images.dtype == like.dtype and images.device == labels.device == like.device
        return InputResult(1.0, {0.1: 0.5})


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 16, generator=generator), torch.arange(count) % 10


@pytest.mark.slow
def test_every_attack_that_was_asked_for_has_a_finding_on_every_stack(small_vit):
    surrogates = small_vit(embed_dim=32, seed=1), small_vit(embed_dim=32, seed=2)
    attacks = [FGSM((0.1,)), *(FGSM((0.1,), surrogate=s) for s in surrogates)]
    found = audit(small_vit(), images(8), attacks=attacks, defenses="noise:scale=0.1").findings
    assert [f.defense for f in found] == ["none", "noise:scale=0.1"] * 3
    assert [f.settings["surrogate"] for f in found[::2]] == [None, *["VisionTransformer"] * 2]
    assert [f.details["threat"] for f in found[::2]] == ["white-box", "transfer", "transfer"]
    # noise on the update changes nothing here, so each control says what its own attack did
    assert [f.robust_accuracy for f in found[::2]] == [f.robust_accuracy for f in found[1::2]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_any_dtype_is_audited(small_vit, dtype):
    attacks = [Fake(), FGSM((0.1,), targeted=True)]
    report = audit(small_vit().to(dtype), images(4), attacks=attacks)
    fake, fgsm = report.findings
    assert fake.reason == fgsm.reason and "robustness" in fake.reason
    assert fake.robust_accuracy == {0.1: 0.5} and len(fgsm.examples) == 4
    assert "Attacks on the input" in report.to_html()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_robustness(small_vit):
    def confidences(seed):
        how = {"attacks": FGSM((0.03,)), "defenses": "positions:kind=random", "seed": seed}
        return [e.before for e in audit(small_vit(), images(4), **how).findings[1].examples]

    assert confidences(0) == confidences(0) != confidences(1)


@pytest.mark.parametrize(
    ("error", "verdict", "reason"),
    [
        (RuntimeError("out of memory\nand more"), "inconclusive", "RuntimeError: out of memory"),
        (expected("a surrogate that fits", 3), "inconclusive", "InputError: Expected a surrogate"),
        (AssertionError("Input height"), "inconclusive", "AssertionError: Input height"),
        (ValueError(), "inconclusive", "the attack failed: ValueError: "),
        (NotApplicable("no classes"), "not applicable", "no classes"),
        (Blocked("head", "withheld"), "blocked", "withheld"),
    ],
)
def test_an_attack_that_fails_never_loses_the_report(small_vit, error, verdict, reason):
    attacks = [PositionInversion(), Fake(error), Fake()]
    closed, failed, fine = audit(small_vit(), images(1), attacks=attacks).findings
    assert closed.verdict == "leaks" and fine.robust_accuracy == {0.1: 0.5}
    assert failed.verdict == verdict and reason in failed.reason and "more" not in failed.reason
    assert failed.clean_accuracy is None and failed.robust_accuracy is None
    assert failed.settings == {"error": error}


def test_a_surrogate_of_another_size_is_a_failed_attack(small_vit):
    attacks = [FGSM(surrogate=small_vit(img_size=32)), FGSM(surrogate=small_vit(num_classes=2))]
    found = audit(small_vit(), images(4), attacks=attacks).findings
    assert all(f.reason.startswith("the attack failed") for f in found)


def test_a_defense_that_would_not_act_is_never_passed_over(small_vit):
    with pytest.raises(Unprotected):
        audit(small_vit(), images(1), attacks=[Fake(Unprotected("not shuffled"))])


@pytest.mark.slow
def test_an_attack_that_fails_says_so_whether_it_attacks_an_update_or_an_input(small_vit, photo):
    @dataclass(frozen=True)
    class Breaks(Attack):
        error: Exception
        name: ClassVar[str] = "breaks"
        family: ClassVar[str] = "closed-form"

        def run(self, view, generator):
            raise self.error

    model, batch = small_vit(), (photo, torch.tensor([1]))
    for error in (RuntimeError("shape"), KeyError("k"), expected("a start", "none"), OSError("x")):
        both = [Breaks(error), Fake(error)]
        for finding in audit(model, batch, attacks=both).findings:
            assert finding.verdict == "inconclusive"
            assert finding.reason.startswith(f"the attack failed: {type(error).__name__}: ")
    for kind in (Breaks, Fake):
        with pytest.raises(Unprotected, match="would not act"):
            audit(model, batch, attacks=[kind(Unprotected("it would not act"))])
