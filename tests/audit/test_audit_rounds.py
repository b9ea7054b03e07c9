"""An audit of federated rounds: each message, each sum, and what two sums give away together."""

import json
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from vitguard import data
from vitguard.attacks.base import Attack
from vitguard.core import Guess
from vitguard.errors import InputError, NotApplicable
from vitguard.federated.local import LocalClient, LocalFederation

NAMES = ("ana", "bea", "cleo")
STEP = vg.LocalTraining(0.05)


@dataclass(frozen=True)
class Watching(Attack):
    """Keeps the updates it is shown."""

    name: ClassVar[str] = "watching"
    family: ClassVar[str] = "closed-form"
    seen: list = field(default_factory=list, compare=False)

    def run(self, view, generator):
        self.seen.append(view.update)
        return Guess(torch.zeros(1, *view.image_shape))


@dataclass(frozen=True)
class OnGradients(Attack):
    """Finds the image in a gradient and nothing in a difference."""

    name: ClassVar[str] = "on-gradients"
    family: ClassVar[str] = "closed-form"
    images: torch.Tensor = field(compare=False, default=None)

    def run(self, view, generator):
        found = view.update.kind == "gradient"
        return Guess(self.images if found else torch.zeros_like(self.images))


@dataclass(frozen=True)
class OnControl(Attack):
    """Finds the images the first time, on the control, and nothing afterwards."""

    name: ClassVar[str] = "on-control"
    family: ClassVar[str] = "closed-form"
    images: torch.Tensor = field(compare=False, default=None)
    shown: list = field(default_factory=list, compare=False)

    def run(self, view, generator):
        self.shown.append(view)
        first = len(self.shown) == 1  # the control is run first
        return Guess(self.images if first else torch.zeros_like(self.images))


@pytest.fixture
def federation(small_vit, photos):
    """Three clients with a photo each."""
    labels = data.assign_labels(len(photos), 10)

    def made(defenses=(), names=NAMES, stacks=None, **settings):
        clients = {
            n: LocalClient(
                photos[i : i + 1], labels[i : i + 1], defenses=(stacks or {}).get(n), **settings
            )
            for i, n in enumerate(names)
        }
        seeded = torch.Generator().manual_seed(0)
        return LocalFederation(
            small_vit(), clients, defenses, training=STEP, generator=seeded, bound=2.0
        )

    return made


def rows(report):
    """The defended rows by exposure."""
    return {f.exposure: f for f in report.findings if f.defended}


@pytest.mark.slow
def test_a_curious_server_rebuilds_the_image_of_each_plain_message(federation):
    report = vg.audit(federation().round(["ana", "bea"]).messages, attacks="position")
    found = rows(report)
    for name in ("ana", "bea"):
        finding = found[f"message of {name}, round 0 (1 image)"]
        assert finding.verdict == "leaks" and finding.psnr.max > 60
        assert finding.control.verdict == "leaks"


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["masking", "encryption"])
def test_a_secure_sum_blocks_each_message_and_its_control_still_leaks(federation, spec):
    report = vg.audit(federation(spec).round().messages[:2], attacks="position")
    assert len(rows(report)) == 2
    for finding in rows(report).values():
        assert finding.verdict == "blocked" and finding.control.verdict == "leaks"


def test_the_sum_of_one_client_is_its_update_and_leaks_as_the_message_does(federation):
    report = vg.audit(federation().round(["ana"]).total, attacks="position")
    found = rows(report)
    finding = found["sum of round 0 (1 image of 1 client)"]
    assert finding.verdict == "leaks" and finding.psnr.max > 60


@pytest.mark.slow
def test_the_sum_of_many_is_attacked_as_a_batch_of_all_their_images_beside_the_same_control(
    federation,
):
    watching = Watching()
    seen = federation("masking").round()
    vg.audit(seen, attacks=[watching])
    batches = [u.batch_size for u in watching.seen]
    assert batches == [1, 1] * 3 + [3, 3]
    control, total = watching.seen[-2:]
    for name, tensor in total.tensors.items():  # the control of a sum is the undefended sum
        assert torch.allclose(control.tensors[name], tensor, atol=1e-6), name


@pytest.mark.slow
def test_clients_that_collude_subtract_themselves_and_the_rest_of_a_masked_sum_leaks(federation):
    seen = federation("masking").round()
    report = vg.audit(seen.without("bea", "cleo"), attacks="position")
    finding = rows(report)["sum of round 0 less bea, cleo (1 image of 1 client)"]
    assert finding.verdict == "leaks" and finding.psnr.max > 50
    assert any("masked sum is read by the server" in note for note in report.notes)
    two = vg.audit(seen.without("cleo"), attacks="position")
    assert rows(two)["sum of round 0 less cleo (2 images of 2 clients)"].psnr.max < 30


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["masking", "encryption:preset=precise"])
def test_two_sums_from_one_model_that_differ_by_one_client_give_that_client_away(federation, spec):
    one = federation(spec, names=(*NAMES, "dora"))
    first = one.round(advance=False)
    second = one.round([*NAMES])
    name = "sum of round 0 less sum of round 1: dora (1 image)"
    difference = first.minus(second)
    finding = rows(vg.audit(difference, attacks="position"))[name]
    assert finding.verdict == "leaks" and finding.psnr.max > 30
    assert finding.control.verdict == "leaks"


@pytest.mark.slow
def test_an_audit_of_several_rounds_takes_their_difference_by_itself(federation):
    one = federation(names=("ana", "bea"))
    watching = Watching()
    second, first = one.round(["ana"], advance=False), one.round()
    report = vg.audit([second, first], attacks=[watching])
    assert "sum of round 1 less sum of round 0: bea (1 image)" in rows(report)
    message, difference = first.messages[1].update, watching.seen[-1]
    for name, tensor in message.tensors.items():
        assert torch.allclose(difference.tensors[name], tensor, atol=1e-6), name


@pytest.mark.slow
def test_a_difference_that_does_not_exist_is_refused_with_the_reason(federation):
    one = federation(names=(*NAMES, "dora"))
    first, second = one.round(), one.round([*NAMES])
    with pytest.raises(NotApplicable, match="another version of the model"):
        first.minus(second)
    third, fourth = one.round(advance=False), one.round(["ana"], advance=False)
    with pytest.raises(NotApplicable, match="differ by 3 clients"):
        third.minus(fourth)
    with pytest.raises(NotApplicable, match="differ by 0 clients"):
        third.minus(one.round(advance=False))
    few = federation("encryption")
    none = few.round(["ana"], advance=False)
    with pytest.raises(NotApplicable, match="no sum"):
        few.round(advance=False).minus(none)
    with pytest.raises(InputError, match="names of clients in the sum"):
        first.without("nobody")


@pytest.mark.slow
def test_an_audit_says_why_two_rounds_have_no_difference(federation):
    report = vg.audit(federation(names=["ana"]).run(2), attacks=[Watching()])
    assert any("another version of the model" in note for note in report.notes)


@pytest.mark.slow
def test_frozen_positions_resist_the_attack_that_reads_them_in_the_sum_as_well(federation):
    report = vg.audit(federation("positions:kind=frozen").round(["ana"]), attacks="position")
    assert {f.verdict for f in rows(report).values()} <= {"blocked", "not applicable"}
    assert all(f.control.verdict == "leaks" for f in rows(report).values())


@pytest.mark.slow
def test_every_form_of_the_report_names_what_was_seen_and_the_rest_of_the_json_is_as_it_was(
    federation, tmp_path
):
    seen = federation("masking").round()
    report = vg.audit([seen.messages[0], seen.total], attacks="position")
    stored = json.loads(report.to_json_text())
    assert stored["outcome"] == (
        "0 of 2 messages and sums leak; 1 was not tested, because every attack was blocked; "
        "1 could not be decided."
    )
    assert stored["schema"] == 1
    names = [f["exposure"] for f in stored["findings"]]
    assert names[0] == names[1] == "message of ana, round 0 (1 image)"
    assert [f["defense"] for f in stored["findings"][:2]] == ["none", "masking"]
    html, text = report.to_html(), report.to_markdown()
    from rich.console import Console

    console = Console(record=True, width=80, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    report.print_to(console)
    printed = console.export_text()
    for name in dict.fromkeys(names):
        assert name in html and name.partition(" (")[0] in text and name in printed
    plain = vg.audit(federation().model, (torch.rand(1, 3, 16, 16), torch.tensor([0])),
                     attacks=[Watching()])  # fmt: skip
    assert [f.exposure for f in plain.findings] == [""]
    assert "message of" not in plain.to_html()


def test_a_client_whose_training_was_not_said_has_no_control_and_never_resists(federation, photos):
    def train(own):
        with torch.no_grad():
            own.model.head.bias += 0.1

    seen = federation(train=train).round(["ana"]).messages
    report = vg.audit(seen, attacks=[OnGradients(photos[:1])])
    (finding,) = rows(report).values()
    assert finding.verdict == "inconclusive" and finding.control.verdict == "leaks"
    assert any("cannot be repeated" in note for note in report.notes)


def test_what_belongs_to_other_audits_is_refused_beside_a_round(federation):
    seen = federation().round()
    with pytest.raises(InputError, match="nothing but rounds"):
        vg.audit(seen, (torch.rand(1, 3, 16, 16), torch.tensor([0])))
    with pytest.raises(InputError, match="nothing but rounds"):
        vg.audit(seen, defenses="noise")
    with pytest.raises(InputError, match="rounds"):
        vg.audit([])
    with pytest.raises(InputError, match="batch"):
        vg.audit(federation().model)


@pytest.mark.slow
def test_the_gate_of_an_audit_of_rounds_falls_by_one_leaking_message(federation):
    report = vg.audit(federation().round(["ana"]).messages, attacks="position")
    assert report.gate(max_gain=6.0) == 1
    masked = vg.audit(federation("masking").round().messages[:1], attacks="position")
    assert masked.gate(max_gain=6.0) == 3  # blocked messages decide nothing


def test_a_sum_of_unlike_stacks_is_said_to_be_one_and_nothing_in_it_has_resisted(
    federation, photos
):
    seen = _unlike(federation)
    report = vg.audit(seen.total, attacks=[OnControl(photos[:2])])
    finding = rows(report)["sum of round 0 (2 images of 2 clients)"]
    assert finding.defense == "ana: client-privacy:noise=5.0; bea: plain"
    assert finding.verdict == "inconclusive" and "different defenses" in finding.reason
    assert "reconstruction_bound" not in finding.details


def test_what_is_left_of_a_sum_has_the_defense_of_whom_it_is_left_of(federation):
    """The bound of the one who is taken out says nothing of the other."""
    seen = _unlike(federation)
    left = seen.without("ana")
    assert left.defense == "" and left.guard.defenses == ()
    finding = rows(vg.audit(left, attacks="position"))[left.name]
    assert finding.defense == "plain" and "reconstruction_bound" not in finding.details
    other = seen.without("bea")
    assert other.defense == "client-privacy:noise=5.0"
    assert [d.name for d in other.guard.defenses] == ["client-privacy"]


def test_a_difference_of_sums_has_the_defense_of_the_client_that_it_is_of(federation):
    one = federation(stacks={"bea": [], "ana": "client-privacy:noise=5"}, names=("bea", "ana"))
    first = one.round(advance=False)
    alone = first.minus(one.round(["bea"]))
    assert alone.defense == "client-privacy:noise=5.0"
    assert [d.name for d in alone.guard.defenses] == ["client-privacy"]


@pytest.mark.slow
@pytest.mark.parametrize("training", [None, vg.LocalTraining(0.05, 1)])
def test_the_bound_of_private_steps_is_not_said_of_training_that_was_not_made_here(
    federation, photos, training
):
    """A callback may take any number of steps, with the noise of its loader."""

    def train(guard):
        loader = DataLoader(TensorDataset(photos[:1], torch.zeros(1).long()), batch_size=1)
        optimizer = torch.optim.SGD(guard.model.parameters(), lr=0.05)
        optimizer, loader = guard.prepare(optimizer, loader)
        for _ in range(3):
            for images, labels in loader:
                F.cross_entropy(guard.model(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()

    made = federation("privacy:noise=1", names=("ana",), train=train, training=training)
    (finding,) = rows(vg.audit(made.round().messages, attacks=[Watching()])).values()
    assert finding.identified is not None and "reconstruction_bound" not in finding.details
    here = federation("privacy:noise=1", names=("ana",)).round().messages
    (finding,) = rows(vg.audit(here, attacks=[Watching()])).values()
    assert finding.details["reconstruction_bound"] < 1


def test_names_that_the_model_lacks_are_one_error_and_not_a_blocked_attack(federation):
    (message,) = federation(names=("ana",)).round().messages
    strange = {f"module.{n}": t for n, t in message.update.tensors.items()}
    wrapped = replace(message, update=replace(message.update, tensors=strange))
    with pytest.raises(InputError, match=r"module\."):
        vg.audit(wrapped, attacks="position")
    cut = {n: t[:1] for n, t in message.update.tensors.items()}
    with pytest.raises(InputError, match="shape"):
        vg.audit(replace(message, update=replace(message.update, tensors=cut)), attacks="position")


def _unlike(federation):
    return federation(stacks={"ana": "client-privacy:noise=5", "bea": []}, names=NAMES[:2]).round()
