"""A curious server: what it kept of a run is attacked afterwards, from its files alone."""

import copy
import stat

import pytest
import torch

import vitguard as vg
from vitguard import data
from vitguard.attacks.position import PositionInversion
from vitguard.core import Guess, Update
from vitguard.errors import InputError
from vitguard.federated.curious import Recording, update_of
from vitguard.federated.local import LocalClient, LocalFederation

RATE = 0.05


@pytest.fixture
def kept(small_vit, photos, tmp_path):
    """A recording of one round of two clients under a stack."""

    def recorded(defenses=(), **settings):
        model = small_vit()
        labels = data.assign_labels(2, 10)
        clients = {
            n: LocalClient(photos[i : i + 1], labels[i : i + 1])
            for i, n in enumerate(("ana", "b/c"))
        }
        training = vg.LocalTraining(RATE)
        one = LocalFederation(model, clients, defenses, training=training, bound=2.0, **settings)
        seen = one.round()
        recording = Recording(tmp_path / "kept")
        for message in seen.messages:
            (client,) = (s.client for s in message.shares)
            recording.keep(1, client, message.update, seen.weights)
        images = {n: (c.images, c.labels) for n, c in clients.items()}
        return model, recording, images

    return recorded


def rows(report):
    return {f.exposure: f for f in report.findings if f.defended}


@pytest.mark.slow
def test_a_recording_of_plain_updates_leaks_with_and_without_the_images(kept):
    model, recording, images = kept()
    strange = copy.deepcopy(model)
    with torch.no_grad():
        strange.head.bias += 1  # the recording holds the weights of its round
    found = rows(vg.audit(recording.rounds(strange, images=images), attacks="position"))
    assert found.keys() == {
        "message of ana, round 1 (1 image)", "message of b/c, round 1 (1 image)",
    }  # fmt: skip
    for finding in found.values():
        assert finding.verdict == "leaks" and finding.psnr.max > 60
    wrong = {"ana": (images["b/c"][0].flip(3), images["ana"][1])}
    lied = vg.audit(recording.rounds(model, images=wrong)[0].messages[0], attacks="position")
    (finding,) = rows(lied).values()
    assert finding.verdict == "leaks" and "none of the images" in finding.reason
    blind = vg.audit(recording.rounds(model)[0].messages[0], attacks="position")
    (finding,) = rows(blind).values()
    assert finding.verdict == "leaks" and "reproduces the update" in finding.reason
    assert finding.psnr is None


class BlindUnderNoise(PositionInversion):
    name = "blind-under-noise"

    def run(self, view, generator):
        if view.traits.noise:
            return Guess(torch.full((1, *view.image_shape), 0.5))
        return super().run(view, generator)


def test_a_recording_has_not_resisted_with_images_that_are_not_behind_it(kept):
    model, recording, images = kept("noise:scale=0.01")
    wrong = {"ana": (images["b/c"][0].flip(3), images["ana"][1])}
    for said, verdict in ((images, "resisted"), (wrong, "inconclusive")):
        message = recording.rounds(model, "noise:scale=0.01", images=said)[0].messages[0]
        (finding,) = rows(vg.audit(message, attacks=[BlindUnderNoise()])).values()
        assert finding.verdict == verdict, finding
    assert "Check the checkpoint" in finding.undecided


@pytest.mark.slow
def test_a_recording_of_ciphertext_is_blocked_beside_a_control_that_leaks(kept):
    model, recording, images = kept("encryption")
    seen = recording.rounds(model, "encryption", images=images, title="sealed")
    report = vg.audit(seen, attacks="position")
    for name, finding in rows(report).items():
        assert name.startswith("sealed: message of")
        assert finding.verdict == "blocked" and finding.control.verdict == "leaks"
    assert not any("sum" in note for note in report.notes)


def test_whole_weights_that_arrive_become_the_difference_and_bytes_stand_for_the_rest():
    before = {"a": torch.ones(2), "b": torch.zeros(3), "count": torch.tensor(3)}
    after = {"a": torch.full((2,), 3.0), "b": torch.zeros(3), "count": torch.tensor(4)}
    update = update_of(after, before, whole=True, batch_size=2, learning_rate=RATE)
    assert torch.equal(update.tensors["a"], torch.full((2,), 2.0)) and "count" not in update.tensors
    assert (update.kind, update.batch_size) == ("difference", 2)
    sealed = update_of({"vitguard.sealed": b"xyz", "a": torch.ones(2)}, before)
    assert sealed.sealed.keys() == {"b", "count"} and sealed.payloads == {"vitguard.sealed": b"xyz"}
    with pytest.raises(InputError, match="shape"):
        update_of({"a": torch.ones(3)}, before, whole=True)
    with pytest.raises(InputError, match="was sent"):
        update_of({"c": torch.ones(3)}, before, whole=True)


def test_an_empty_recording_or_other_images_are_one_clear_error(kept, tmp_path):
    with pytest.raises(InputError, match="recorded rounds"):
        Recording(tmp_path / "none").rounds(None)
    model, recording, images = kept()
    with pytest.raises(InputError, match="1 images of ana"):
        recording.rounds(model, images=images | {"ana": (torch.rand(2, 3, 16, 16), None)})


def test_a_second_run_in_the_same_folder_is_refused_and_hides_nothing(kept):
    """The first run's weights before a round beside the second one's updates would be nonsense."""
    model, recording, _ = kept()
    (one, _) = recording.rounds(model)[0].messages
    before = recording.rounds(model)[0].weights
    with pytest.raises(InputError, match="another folder"):
        recording.keep(1, "ana", one.update, before)
    other = {n: t + 1 for n, t in before.items()}
    with pytest.raises(InputError, match="another folder"):
        recording.keep(1, "cleo", one.update, other)
    assert len(recording.rounds(model)[0].messages) == 2


def test_a_second_run_of_other_clients_is_no_part_of_the_first(tmp_path):
    """From the same weights nothing but the run tells their updates apart."""
    weights, update = {"a": torch.zeros(2)}, Update({"a": torch.ones(2)}, kind="difference")
    first = Recording(tmp_path / "kept")
    first.keep(1, "ana", update, weights)
    for number in (1, 2):
        with pytest.raises(InputError, match="another folder"):
            Recording(tmp_path / "kept").keep(number, "bea", update, weights)
    first.keep(1, "bea", update, weights)
    named = Recording(tmp_path / "named", run="monday")
    named.keep(1, "ana", update, weights)
    Recording(tmp_path / "named", run="monday").keep(2, "ana", update, weights)  # a restart
    with pytest.raises(InputError, match=r"'tuesday', got .* of 'monday'"):
        Recording(tmp_path / "named", run="tuesday").keep(3, "ana", update, weights)


def test_what_was_recorded_before_runs_had_names_is_not_gone_on_with(tmp_path):
    weights, update = {"a": torch.zeros(2)}, Update({"a": torch.ones(2)}, kind="difference")
    Recording(tmp_path).keep(1, "ana", update, weights)
    (tmp_path / "run").unlink()
    with pytest.raises(InputError, match="another folder"):
        Recording(tmp_path).keep(2, "ana", update, weights)


@pytest.mark.parametrize("run", ["", " ", "a\nb", 7, None, "x" * 200])
def test_a_run_has_a_name_of_one_line(tmp_path, run):
    with pytest.raises(InputError, match="name of a run"):
        Recording(tmp_path, run=run)


def test_what_was_recorded_is_for_its_owner_alone(tmp_path):
    weights, update = {"a": torch.zeros(2)}, Update({"a": torch.ones(2)}, kind="difference")
    Recording(tmp_path / "kept").keep(1, "ana", update, weights)
    for path in (tmp_path / "kept").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    update = Update({"a": torch.ones(2)}, kind="difference")
    with pytest.raises(InputError, match="folder"):
        Recording(tmp_path / "file").keep(1, "ana", update, {"a": torch.zeros(2)})


@pytest.mark.parametrize("change", [lambda n: f"net.{n}", lambda n: n.replace("blocks", "layers")])
def test_weights_before_a_round_that_are_of_another_model_are_refused(kept, tmp_path, change):
    model, recording, _ = kept()
    seen = recording.rounds(model)[0]
    strange = Recording(tmp_path / "strange")
    renamed = {change(n): t for n, t in seen.weights.items()}
    strange.keep(1, "ana", seen.messages[0].update, renamed)
    with pytest.raises(InputError, match="weights of the model"):
        strange.rounds(model)


def test_weights_before_a_round_must_hold_what_its_updates_change(kept, tmp_path):
    model, recording, _ = kept()
    seen = recording.rounds(model)[0]
    part = Recording(tmp_path / "part")
    lacking = {n: t for n, t in seen.weights.items() if "head" not in n}
    part.keep(1, "ana", seen.messages[0].update, lacking)
    with pytest.raises(InputError, match=r"head\."):
        part.rounds(model)
    cut = Recording(tmp_path / "cut")
    cut.keep(1, "ana", seen.messages[0].update, {n: t[:1] for n, t in seen.weights.items()})
    with pytest.raises(InputError, match="shape"):
        cut.rounds(model)
