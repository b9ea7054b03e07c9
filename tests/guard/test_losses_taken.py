"""Losses that are none, and numbers of a training that are none: one line, before any step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitguard as vg
from vitguard.errors import InputError

IMAGES, LABELS = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
LOSSES = {
    "a class": (nn.CrossEntropyLoss, "a function, got .*Give a function or an instance"),
    "a name": ("cross_entropy", "a function, got 'cross_entropy'"),
    "one number each": (nn.CrossEntropyLoss(reduction="none"), r"shape \(2,\).*reduction='mean'"),
    "a tuple": (lambda scores, labels: (F.cross_entropy(scores, labels), 1), "got tuple"),
    "a number of Python": (lambda scores, labels: 1.0, "got float"),
    "cut from the graph": (lambda s, y: F.cross_entropy(s, y).detach(), "without one"),
    "one of other targets": (nn.BCEWithLogitsLoss(), r"scores of shape .* Target size"),
    "one that broadcasts": (nn.MSELoss(), r"labels of shape \(2,\), got an error of it"),
    "one of one argument": (lambda scores: scores.sum(), "takes 1 positional argument"),
}
ONLY_OF_BATCHES = "one number each"


def vit(small_vit):
    return small_vit(img_size=32, patch_size=8, depth=1)


@pytest.mark.parametrize("kind", LOSSES)
def test_an_update_says_what_is_wrong_with_its_loss(small_vit, kind):
    loss, said = LOSSES[kind]
    guard = vg.protect(vit(small_vit), [])
    with pytest.raises(InputError, match=said):
        guard.update(IMAGES, LABELS, loss=loss)


@pytest.mark.parametrize("kind", sorted(LOSSES.keys() - {ONLY_OF_BATCHES}))
def test_a_private_update_says_it_too_and_spends_nothing(small_vit, kind):
    pytest.importorskip("opacus")
    guard = vg.protect(vit(small_vit), "privacy:noise=1,delta=0.001")
    with pytest.raises(InputError):
        guard.update(IMAGES, LABELS, loss=LOSSES[kind][0])
    assert guard.privacy_spent().steps == 0


@pytest.mark.parametrize("kind", LOSSES)
def test_an_audit_says_it_too(small_vit, kind):
    with pytest.raises(InputError, match=LOSSES[kind][1]):
        vg.audit(vit(small_vit), (IMAGES, LABELS), attacks="position", loss=LOSSES[kind][0])


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), None])
def test_cross_entropy_of_a_single_class_is_no_loss(small_vit, loss):
    """It is zero for every score: an update of zeros would leave, and every attack would fail."""
    guard = vg.protect(small_vit(num_classes=1, depth=1), [])
    given = {} if loss is None else {"loss": loss}
    small, none = torch.rand(2, 3, 16, 16), torch.zeros(2).long()
    with pytest.raises(InputError, match="at least two classes"):
        guard.update(small, none, **given)
    with pytest.raises(InputError, match="at least two classes"):
        vg.audit(guard.public_model(), (small, none), attacks="position", **given)
    own = guard.update(
        small, none, loss=lambda s, y: F.binary_cross_entropy_with_logits(s[:, 0], y.to(s))
    )
    assert any(bool(t.any()) for t in own.tensors.values())


def test_what_a_loss_of_ones_own_raises_stays_as_it_is(small_vit):
    def broken(scores, labels):
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        vg.protect(vit(small_vit), []).update(IMAGES, LABELS, loss=broken)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "local steps"),
        ({"steps": 2.5}, "local steps"),
        ({"steps": "2"}, "local steps"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1}, "weight decay"),
        ({"weight_decay": float("inf")}, "weight decay"),
        ({"learning_rate": "0.1"}, "learning rate"),
        ({"learning_rate": float("nan")}, "learning rate"),
    ],
)
def test_numbers_of_a_training_are_checked_where_they_are_said(wrong, said):
    with pytest.raises(InputError, match=said):
        vg.LocalTraining(**{"learning_rate": 0.1, **wrong})


@pytest.mark.parametrize("one", [np.int64(1), torch.tensor(1), np.array(1)])
def test_whole_numbers_of_arrays_count_as_such_and_can_be_saved(tmp_path, one):
    update = vg.Update(
        {"head.bias": torch.ones(3)}, kind="difference", batch_size=one, local_steps=one,
        learning_rate=np.float32(0.5), weight_decay=torch.tensor(0.25),
    )  # fmt: skip
    update.save(tmp_path / "u.safetensors")
    again = vg.Update.load(tmp_path / "u.safetensors")
    assert (again.batch_size, again.local_steps, again.learning_rate) == (1, 1, 0.5)
    assert again.weight_decay == 0.25
    assert vg.LocalTraining.of(again) == vg.LocalTraining(0.5, np.int64(1), weight_decay=0.25)
