"""timm's own parts around a protected model: groups, averages, schedules, savers, mixup."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV3
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from vitguard.errors import InputError

PRIVATE = "privacy:noise=0.5,clip=1,delta=0.01,accountant=rdp"
SHUFFLE = "shuffle:ratio=0.5,mask=uniform,dal=tokens,dal_weight=0.5"
DATA = TensorDataset(
    torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10
)


def build():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, num_classes=10, embed_dim=16,
        num_heads=2,
    )  # fmt: skip


class Script:
    """What a copy of timm's train.py makes and does."""

    def __init__(self, stack, folder=None, resume=None, batch=4, resume_opt=True):
        self.model = build()
        self.guard = vg.protect(self.model, stack)
        optimizer = create_optimizer_v2(
            self.model, "sgd", lr=0.1, weight_decay=0.05, layer_decay=0.75
        )
        loader = DataLoader(DATA, batch, shuffle=True, drop_last="privacy" not in stack)
        self.optimizer, self.loader = self.guard.prepare(optimizer, loader)
        if resume:
            held = self.optimizer if resume_opt else None
            resume_checkpoint(self.model, str(resume), optimizer=held, log_info=False)
        self.average = ModelEmaV3(self.model, decay=0.9)
        self.schedule = CosineLRScheduler(self.optimizer, t_initial=4)
        self.saver = None
        if folder:
            self.saver = CheckpointSaver(
                self.model, self.optimizer, model_ema=self.average, checkpoint_dir=str(folder)
            )

    def train(self, epochs, mix=None, criterion=F.cross_entropy):
        for epoch in range(epochs):
            for images, labels in self.loader:
                if mix:
                    images, labels = mix(images, labels)
                scores = self.model.train()(images)
                (criterion(scores, labels) + self.guard.auxiliary_loss()).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.average.update(self.model)
            self.schedule.step(epoch + 1)
            if self.saver:
                self.saver.save_checkpoint(epoch, metric=float(epoch))
        return self


def loads_strictly(average):
    plain = build()
    plain.load_state_dict(vg.Guard.of(average.module).export(), strict=True)
    images = DATA.tensors[0]
    assert torch.equal(plain.eval()(images), copy.deepcopy(average.module).eval()(images))
    return plain


@pytest.mark.slow
def test_averaged_weights_of_private_training_load_strictly_into_a_plain_model():
    pytest.importorskip("opacus")
    made = Script(f"{SHUFFLE}+{PRIVATE},physical_batch=2").train(1)
    assert made.guard._ledgers["privacy"].steps == 4
    plain = loads_strictly(made.average)
    assert not torch.equal(plain.head.weight, build().head.weight)


AVERAGES = {
    "timm's": (ModelEmaV3, lambda average, model: average.update(model)),
    "torch's": (AveragedModel, lambda average, model: average.update_parameters(model)),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_weights_say_whose_ledger_counts(kind):
    pytest.importorskip("opacus")
    make, follow = AVERAGES[kind]
    model = build()
    guard = vg.protect(model, PRIVATE)
    average, still = make(model), copy.deepcopy(model)
    images, labels = DATA.tensors
    guard.update(images[:2], labels[:2])
    follow(average, model)
    assert "ask the guard" in vg.Guard.of(average.module).privacy_spent().note
    assert guard.privacy_spent().steps == 1
    assert not any(g.privacy_spent().note for g in (guard, vg.Guard.of(still)))


@pytest.mark.slow
def test_a_resume_by_timms_saver_counts_what_was_spent_before(tmp_path):
    pytest.importorskip("opacus")
    stack = f"{SHUFFLE}+{PRIVATE}"
    Script(stack, tmp_path).train(2)
    resumed = Script(stack, resume=tmp_path / "last.pth.tar").train(2)
    whole = Script(stack).train(4)
    assert resumed.guard.privacy_spent() == whole.guard.privacy_spent()
    assert resumed.guard._ledgers["privacy"].steps == 16


def test_a_checkpoint_of_timms_saver_without_the_ledger_is_refused(tmp_path):
    pytest.importorskip("opacus")
    Script(SHUFFLE, tmp_path).train(1)
    with pytest.raises(InputError, match="one without a ledger"):
        Script(f"{SHUFFLE}+{PRIVATE}", resume=tmp_path / "last.pth.tar")


@pytest.mark.slow
@pytest.mark.parametrize("resume_opt", [True, False])
def test_a_resume_without_the_optimizer_is_told_that_it_leaves_the_ledger_behind(
    tmp_path, resume_opt
):
    pytest.importorskip("opacus")
    Script(PRIVATE, tmp_path).train(1)
    resumed = Script(PRIVATE, resume=tmp_path / "last.pth.tar", resume_opt=resume_opt)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resumed.train(1)
    said = [str(w.message) for w in told if "--no-resume-opt" in str(w.message)]
    assert len(said) == (not resume_opt)
    assert resumed.guard._ledgers["privacy"].steps == (8 if resume_opt else 4)


def test_layer_decay_gives_the_unknown_embedding_the_rate_and_decay_of_the_positions():
    made = Script(SHUFFLE)

    def group(name):
        own = made.model.get_parameter(name)
        return next(g for g in made.optimizer.param_groups if any(p is own for p in g["params"]))

    assert group("vitguard.shuffle.unknown") is group("pos_embed")
    assert group("pos_embed")["weight_decay"] == 0 and group("pos_embed")["lr_scale"] < 0.75


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_timms_mixup_and_cutmix_train_with_a_shuffle(mode):
    mix = Mixup(mixup_alpha=0.5, cutmix_alpha=1.0, mode=mode, num_classes=10)
    made = Script(SHUFFLE).train(1, mix, SoftTargetCrossEntropy())
    loads_strictly(made.average)
    assert not torch.equal(made.model.head.weight, build().head.weight)


def test_timms_mixup_stops_at_an_odd_batch_before_the_model_sees_it():
    made = Script(SHUFFLE, batch=5)
    before = made.model.head.weight.detach().clone()
    with pytest.raises(AssertionError, match="should be even"):
        made.train(1, Mixup(mixup_alpha=1.0, num_classes=10), SoftTargetCrossEntropy())
    assert torch.equal(before, made.model.head.weight)
