"""An update that other weights or images made has not resisted."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.fast import crossed
from vitguard.audit.agreement import disagreement
from vitguard.audit.received import audit_update
from vitguard.audit.victim import Victim
from vitguard.core import LocalTraining, Normalization
from vitguard.guard import protect, stack_of
from vitguard.threats import CuriousServer

LABEL = torch.tensor([3])
FROZEN, NOISE = "positions:kind=frozen", "noise:scale=0.01"


def sent(model, image, stack, training):
    seed = torch.Generator().manual_seed(5)
    guard = protect(copy.deepcopy(model).train(), stack, generator=seed)
    return guard.update(Normalization().apply(image), LABEL, training=training)


def audited(model, update, stack, truth, attacks):
    report = audit_update(
        model, update, defenses=stack, attacks=attacks, truth=truth,
        normalization=Normalization(),
    )  # fmt: skip
    (finding,) = (f for f in report.findings if f.defended)
    return report, finding


def said(model, update, stack, truth, labels=None, training=LocalTraining()):  # noqa: B008
    """What is said against statements, whatever an attack came to."""
    victim = Victim(
        model, Normalization(), training, F.cross_entropy, 0, truth, LABEL - 1, ("a",), 1
    )
    guard = protect(copy.deepcopy(model).train(), stack)
    view = CuriousServer(()).view(guard, update, Normalization(), loss=F.cross_entropy)
    return disagreement(victim, stack_of(stack), update, view, labels)


@pytest.mark.parametrize(
    ("stack", "training", "given"),
    crossed(
        ["noise:scale=10", NOISE, "sign-update"],
        [LocalTraining(), LocalTraining(1e-3, 2, "adam")],
        [None, LABEL],
    ),
)
def test_what_is_stated_rightly_keeps_its_verdict(small_vit, photo, stack, training, given):
    model = small_vit()
    update = sent(model, photo, stack, training)
    assert said(model, update, stack, photo, given, training) == ""


@pytest.mark.slow
@pytest.mark.parametrize("training", [LocalTraining(), LocalTraining(0.05)], ids=str)
def test_other_weights_have_not_resisted_and_pass_no_gate(small_vit, photo, training):
    model, other = small_vit(), small_vit()
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(p[torch.randperm(len(p), generator=torch.Generator().manual_seed(1))])
    update = sent(model, photo, FROZEN, training)
    report, finding = audited(other, update, FROZEN, photo, attacks="span")
    assert finding.verdict == "inconclusive" and "Check the checkpoint" in finding.reason
    assert report.gate(max_gain=6) == 3


@pytest.mark.slow
def test_other_images_have_not_resisted(small_vit, photos):
    model = small_vit()
    update = sent(model, photos[:1], NOISE, LocalTraining())
    assert "Check the checkpoint" in said(model, update, NOISE, 1 - photos[1:2].flip(-1))
    assert said(model, update, NOISE, photos[:1]) == ""


@pytest.mark.slow
def test_noise_longer_than_the_update_hides_no_other_images(small_vit, photo):
    """Its distance says nothing there; its direction does."""
    model, stack = small_vit(), "noise:scale=3"
    update = sent(model, photo, stack, LocalTraining())
    assert "whose it is" in said(model, update, stack, 1 - photo, LABEL)
    assert said(model, update, stack, photo, LABEL) == ""


@pytest.mark.slow
def test_what_noise_covers_has_not_resisted_whatever_is_stated(small_vit, photo):
    """No rule could tell, or it would tell a record from a private update."""
    pytest.importorskip("opacus")
    model, stack = small_vit(), "privacy:noise=1,clip=1,delta=0.01"
    update = sent(model, photo, stack, LocalTraining())
    for stated in (photo, photo.flip(-1)):
        assert "whose it is" in said(model, update, stack, stated, LABEL)


def test_images_that_make_nearly_the_same_update_are_told_by_what_is_left(small_vit, photo):
    """A head alone that is trained gets nearly the same gradient of every image."""
    model = small_vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "head.bias")
    update = sent(model, photo, "none", LocalTraining())
    assert said(model, update, "none", photo, LABEL) == ""
    assert "whose it is" in said(model, update, "none", 1 - photo, LABEL)


@pytest.mark.parametrize("stack", ["noise:scale=10", "noise:scale=0.5+pruning:keep=0.9"])
def test_noise_that_is_stated_and_not_there_has_not_made_an_attack_fail(small_vit, photo, stack):
    """Without its noise an update is nearer to what is stated than draws are to each other."""
    model = small_vit()
    update = sent(model, photo, "none", LocalTraining())
    assert "nearer" in said(model, update, stack, photo, LABEL)


def test_a_step_of_other_weight_decay_is_not_what_stated_noise_resisted(small_vit, photo):
    model, stack = small_vit(), "noise:scale=10"
    made = sent(model, photo, "none", LocalTraining(0.1, weight_decay=1.0))
    update = replace(made, weight_decay=0.0)
    finding = audited(model, update, stack, photo, attacks="position")[1]
    assert finding.verdict == "inconclusive" and "nearer" in finding.reason
