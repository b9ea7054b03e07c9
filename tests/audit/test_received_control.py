"""The control of a received update is trained as the update says that it was."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from vitguard import data
from vitguard.attacks.base import Attack
from vitguard.attacks.position import PositionInversion
from vitguard.audit import audit
from vitguard.audit.received import audit_update
from vitguard.core import Guess, LocalTraining, Normalization, Update
from vitguard.errors import InputError
from vitguard.guard import protect

LABEL = torch.tensor([3])


@dataclass(frozen=True)
class Watching(Attack):
    """Keeps the updates it is shown: the control's, then the received one."""

    name: ClassVar[str] = "watching"
    family: ClassVar[str] = "closed-form"
    seen: list = field(default_factory=list, compare=False)

    def run(self, view, generator):
        self.seen.append(view.update)
        return Guess(torch.zeros(1, *view.image_shape))


def by_hand(model, images, labels, training):
    """The difference of full-batch steps, by torch's own optimizer."""
    model = copy.deepcopy(model).train()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    rate, decay = training.learning_rate, training.weight_decay
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    settings = {"momentum": training.momentum} if training.optimizer == "sgd" else {}
    optimizer = kind[training.optimizer](
        model.parameters(), lr=rate, weight_decay=decay, **settings
    )
    for _ in range(training.steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {k: p.detach() - before[k] for k, p in model.named_parameters()}


TRAININGS = [
    LocalTraining(1e-3, 2, "adam"),
    LocalTraining(1e-3, 1, "adamw", weight_decay=0.1),
    LocalTraining(1e-3, 1, "adam", weight_decay=0.1),
    LocalTraining(0.01, 3, "sgd", momentum=0.9, weight_decay=1e-2),
    LocalTraining(0.05, 1),
    LocalTraining(),
]


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_the_control_is_trained_by_the_optimizer_momentum_decay_and_steps_of_the_update(
    small_vit, photo, tmp_path, training
):
    model, normalization = small_vit(), Normalization()
    guard = protect(copy.deepcopy(model).train(), [])
    update = guard.update(normalization.apply(photo), LABEL, training=training)
    update.save(tmp_path / "update.safetensors")
    update = Update.load(tmp_path / "update.safetensors")
    watching = Watching()
    report = audit_update(model, update, attacks=[watching], normalization=normalization)
    control, received = watching.seen
    assert LocalTraining.of(control) == LocalTraining.of(received) == training
    assert report.update == f"{training}, from a file"
    if training.learning_rate is not None:
        photos = data.sample_images((16, 16)).pixels[:1]
        labels = data.assign_labels(1, 10)
        wanted = by_hand(model, normalization.apply(photos), labels, training)
        for name, tensor in wanted.items():
            assert (control.tensors[name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-9, name


@pytest.mark.parametrize("optimizer", ["lamb", "sgd with a rate nobody said"])
def test_an_update_whose_training_cannot_be_repeated_has_no_control_and_never_resists(
    small_vit, photo, optimizer
):
    model = small_vit()
    tensors = {k: 1e-3 * torch.randn_like(p) for k, p in model.named_parameters()}
    rate = None if " " in optimizer else 0.01
    update = Update(tensors, kind="difference", learning_rate=rate, optimizer=optimizer.split()[0])
    watching = Watching()
    report = audit_update(model, update, attacks=[watching, "position"], truth=photo)
    (note,) = report.notes
    assert "cannot be repeated" in note
    assert "unknown rate" in report.update if rate is None else "lamb" in report.update
    assert all(f.verdict != "resisted" for f in report.findings)


@dataclass(frozen=True)
class OfGradients(Attack):
    """Finds the image behind a gradient, such as that of the control, and grey behind others."""

    name: ClassVar[str] = "of-gradients"
    family: ClassVar[str] = "closed-form"

    def run(self, view, generator):
        if view.update.kind == "gradient":
            return PositionInversion().run(view, generator)
        return Guess(torch.full((1, *view.image_shape), 0.5))


def test_a_control_that_was_trained_otherwise_makes_no_resistance(small_vit, photo):
    model = small_vit()
    tensors = {k: 1e-3 * torch.randn_like(p) for k, p in model.named_parameters()}
    lamb = Update(tensors, kind="difference", learning_rate=0.01, optimizer="lamb")
    report = audit_update(model, lamb, attacks=[OfGradients()], truth=photo)
    (control, received) = report.findings
    assert control.verdict == "leaks"
    assert received.verdict == "inconclusive" and "cannot be repeated" in received.reason


def test_an_attack_on_the_input_is_reported_as_not_applicable_and_not_dropped(small_vit, photo):
    model = small_vit()
    update = protect(copy.deepcopy(model).train(), []).update(Normalization().apply(photo), LABEL)
    report = audit_update(model, update, attacks=["position", "fgsm"])
    (finding,) = [f for f in report.findings if f.attack == "fgsm"]
    assert finding.verdict == "not applicable" and "saved update" in finding.reason


@pytest.mark.slow
def test_labels_that_are_given_are_scored(small_vit, photo):
    model = small_vit()
    update = protect(copy.deepcopy(model).train(), []).update(Normalization().apply(photo), LABEL)
    for labels, right in ((LABEL, 1.0), (LABEL + 1, 0.0), (None, None)):
        report = audit_update(
            model, update, attacks=[PositionInversion()], truth=photo, labels=labels,
            normalization=Normalization(),
        )  # fmt: skip
        assert report.findings[-1].labels_correct == right
    with pytest.raises(InputError, match="labels beside the images"):
        audit_update(model, update, labels=LABEL)


def test_an_audit_trains_with_momentum_as_it_is_told(small_vit, photo):
    watching = Watching()
    training = LocalTraining(0.05, 2, momentum=0.9, weight_decay=0.01)
    audit(small_vit(), (photo, LABEL), attacks=[watching], training=training)
    assert {LocalTraining.of(u) for u in watching.seen} == {training}
    with pytest.raises(InputError, match="momentum with sgd"):
        LocalTraining(0.05, 2, "adam", momentum=0.9)
    with pytest.raises(InputError, match="optimizer among sgd, adam, adamw"):
        LocalTraining(0.05, optimizer="lamb")


def test_steps_that_are_said_twice_are_refused_and_none_is_dropped(small_vit, photo):
    guard = protect(small_vit().train(), [])
    images = Normalization().apply(photo)
    for twice in ({"learning_rate": 0.1}, {"learning_rate": 0.1, "local_steps": 2}):
        with pytest.raises(InputError, match="LocalTraining says all of them"):
            guard.update(images, LABEL, training=LocalTraining(0.05), **twice)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["update", "rounds"])
def test_the_control_is_no_configuration_from_which_something_is_withheld(small_vit, photo, kind):
    """It shows what the attack does with everything: it decides no gate, and says what it is."""
    model, told = small_vit(), {"attacks": "position", "withhold": ["position"]}
    if kind == "update":
        update = protect(copy.deepcopy(model), []).update(Normalization().apply(photo), LABEL)
        report = audit_update(model, update, truth=photo, normalization=Normalization(), **told)
    else:
        from vitguard.federated.local import LocalClient, LocalFederation

        clients = {name: LocalClient(photo, LABEL) for name in "ab"}
        report = audit(LocalFederation(model, clients).round(), **told)
    control, seen = report.findings[0], report.findings[1]
    assert control.verdict == "leaks" and seen.verdict == "blocked"
    assert report.is_control(control) and not report.is_control(seen)
    assert report.gate(max_gain=6) == 3
    assert "not tested, because every attack was blocked" in report.outcome()
    assert "leak." not in report.outcome() and "leaks." not in report.outcome()
    page, text = report.to_html(), io.StringIO()
    report.print_to(Console(file=text, width=80))
    assert "tensors withheld" not in page and "tensors withheld" not in text.getvalue()
    assert "the undefended control" in text.getvalue()


@pytest.mark.parametrize(
    "attack",
    ["gelu-span", "span", "position", pytest.param("deep-tokens", marks=pytest.mark.slow)],
)
def test_an_update_of_nothing_but_ciphertext_blocks_and_is_not_called_zero(
    small_vit, photo, attack
):
    model = small_vit()
    sealed = dict.fromkeys((n for n, _ in model.named_parameters()), "ciphertext")
    report = audit_update(model, Update({}, batch_size=1, sealed=sealed), attacks=attack)
    found = report.findings[-1]
    assert (found.verdict, report.gate(max_gain=6)) == (
        "blocked",
        3,
    ) and "cannot be read" in found.reason
