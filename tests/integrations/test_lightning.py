"""Lightning: what a loop by hand gives, private or not, and resumes that count."""

import copy
import json
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.fast import fast_for
from vitguard.errors import Incompatible, InputError, Unprotected

L = pytest.importorskip("lightning")
pytest.importorskip("opacus")
from vitguard.integrations.lightning import GuardCallback, GuardMixin  # noqa: E402

SHUFFLE = "shuffle:ratio=0.5,mask=uniform,dal=tokens,dal_weight=0.5"
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.01,accountant=rdp"
DATA = TensorDataset(
    torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10
)


def build():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, num_classes=10, embed_dim=16,
        num_heads=2,
    )  # fmt: skip


class Lit(L.LightningModule):
    """As people write it, but for the one line that protects."""

    def __init__(self, stack="none", seed=None):
        super().__init__()
        self.save_hyperparameters()
        self.net = build()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        vg.protect(self.net, stack, generator=generator)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def train_dataloader(self):
        return DataLoader(DATA, 4, shuffle="privacy" in str(self.hparams.stack))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Guarded(GuardMixin, Lit):
    pass


def fit(module, *args, folder=None, epochs=2, **settings):
    path = settings.pop("ckpt_path", None)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, **settings,
    )  # fmt: skip
    trainer.fit(module, *args, ckpt_path=path)
    return trainer


def by_hand(stack, epochs=2):
    model = build()
    guard = vg.protect(model, stack, generator=torch.Generator().manual_seed(3))
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)
    optimizer, loader = guard.prepare(plain, DataLoader(DATA, 4))
    for _ in range(epochs):
        for images, labels in loader:
            model.train()
            (F.cross_entropy(model(images), labels) + guard.auxiliary_loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    return model, guard


def gap(one, other):
    other = other.state_dict()
    return max(float((t - other[n]).abs().max()) for n, t in one.state_dict().items())


STACKS = [SHUFFLE, PRIVATE, f"positions:kind=sincos+{SHUFFLE}+{PRIVATE},physical_batch=2"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stack", fast_for(STACKS, fast=STACKS[::2]))  # privacy is in the last
def test_training_ends_at_the_weights_of_a_loop_by_hand(stack):
    module = Guarded(stack, 3)
    start = {n: t.clone() for n, t in module.net.state_dict().items()}
    trainer = fit(module)
    reference, counted = by_hand(stack)
    assert gap(module.net, reference) < 1e-6
    assert not torch.equal(start["head.weight"], module.net.head.weight)
    assert trainer.global_step == 8
    if PRIVATE[:7] in stack:
        spent = module.guard._ledgers["privacy"]
        assert spent.history == counted._ledgers["privacy"].history and spent.steps == 8
        assert "epsilon" in trainer.callback_metrics


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_epsilon_after_a_resume_is_that_of_one_run_and_a_plain_model_loads_the_weights(tmp_path):
    whole = Guarded(PRIVATE)
    fit(whole, epochs=4)
    first = Guarded(PRIVATE)
    path = tmp_path / "half.ckpt"
    fit(first, epochs=2).save_checkpoint(path)
    second = Guarded(PRIVATE)
    trainer = fit(second, epochs=4, ckpt_path=path)
    assert trainer.global_step == 16 == second.guard._ledgers["privacy"].steps
    assert second.guard.privacy_spent() == whole.guard.privacy_spent()
    loaded = Guarded.load_from_checkpoint(path)
    assert gap(loaded.net, first.net) == 0
    state = torch.load(path, weights_only=False)["state_dict"]
    plain = {n.removeprefix("net."): t for n, t in state.items() if ".vitguard." not in n}
    build().load_state_dict(plain, strict=True)


class Tested(Guarded):
    def test_step(self, batch, batch_idx):
        self.log("tested", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_dataloader(self):
        return DataLoader(DATA, 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_an_older_checkpoint_is_tested_and_what_was_spent_stays(tmp_path):
    module = Tested(PRIVATE)
    trainer = fit(module, epochs=1)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    best = {n: t.clone() for n, t in module.net.state_dict().items()}
    trainer = fit(module, epochs=1)
    trainer.test(module, ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert all(torch.equal(t, best[n]) for n, t in module.net.state_dict().items())
    assert module.guard.privacy_spent().steps == 8
    fit(module, epochs=1)
    assert module.guard.privacy_spent().steps == 12
    fresh = Tested(PRIVATE)
    trainer.test(fresh, ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert fresh.guard.privacy_spent().steps == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_loaded_by_themselves_bring_what_was_spent_on_them(tmp_path):
    path = tmp_path / "last.ckpt"
    fit(Guarded(PRIVATE), epochs=1).save_checkpoint(path)
    loaded = Guarded.load_from_checkpoint(path)
    assert loaded.guard.privacy_spent().steps == 4
    fit(loaded, epochs=1)
    assert loaded.guard.privacy_spent().steps == 8
    assert not Guarded.load_from_checkpoint(path, stack=SHUFFLE, strict=False).guard._ledgers
    state = torch.load(path, weights_only=False)
    torch.save({**state, "vitguard": json.dumps({"ledger": {"privacy": {"version": 9}}})}, path)
    with pytest.raises(InputError, match="ledger"):
        Guarded.load_from_checkpoint(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", fast_for(["deepcopy", "pickle"], fast=["pickle"]))
def test_a_copy_of_a_module_after_training_trains_on_its_own(how):
    module = Guarded(PRIVATE)
    fit(module, epochs=1)
    twin = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    fit(twin, epochs=1)
    fit(module, epochs=2)
    spent = [m.guard.privacy_spent().steps for m in (module, twin)]
    assert spent == [12, 8] and gap(module.net, twin.net) > 0


@pytest.mark.filterwarnings("ignore")
def test_a_loader_that_is_made_anew_is_refused_before_the_first_step():
    module = Guarded(PRIVATE)
    with pytest.raises(Incompatible, match="reload_dataloaders_every_n_epochs=1"):
        fit(module, reload_dataloaders_every_n_epochs=1)
    assert module.guard.privacy_spent().steps == 0
    fit(Guarded(SHUFFLE), reload_dataloaders_every_n_epochs=1)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_lightning_leaves_in_eval_mode_is_told_at_the_first_step():
    module = Guarded(SHUFFLE)
    module.net.eval()
    start = module.net.head.weight.clone()
    with pytest.raises(Unprotected, match=r"Call model.train\(\) before the pass"):
        fit(module)
    assert torch.equal(module.net.head.weight, start)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_without_the_guards_state_is_refused(tmp_path):
    path = tmp_path / "half.ckpt"
    fit(Guarded(PRIVATE), epochs=1).save_checkpoint(path)
    state = torch.load(path, weights_only=False)
    del state["vitguard"]
    torch.save(state, path)
    with pytest.raises(InputError, match="What was spent before would not count"):
        fit(Guarded(PRIVATE), ckpt_path=path)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_holds_no_key_of_an_inspection(tmp_path):
    module = Guarded(PRIVATE)
    module.guard.accept(module.net.state_dict())
    path = tmp_path / "one.ckpt"
    fit(module, epochs=1).save_checkpoint(path)
    state = torch.load(path, weights_only=False)
    assert json.loads(state["vitguard"]).keys() == {"version", "ledger"}
    assert str(module.guard.state_dict()["inspection"]["key"]) not in str(state)


@pytest.mark.filterwarnings("ignore")
def test_residuals_of_a_client_stay_with_it_over_a_checkpoint(tmp_path):
    module = Guarded("low-rank:rank=1,feedback=true")
    images, labels = DATA.tensors
    with module.guard.round(1, base="start"):
        module.guard.update(images[:2], labels[:2])
    module.guard.will_seal()
    path = tmp_path / "one.ckpt"
    fit(module, epochs=1).save_checkpoint(path)
    fit(module, epochs=2, ckpt_path=path)
    assert "residuals" not in torch.load(path, weights_only=False)["vitguard"]
    assert module.guard.state_dict()["residuals"]


@pytest.mark.filterwarnings("ignore")
def test_a_training_beyond_the_target_is_refused_before_its_first_step():
    module = Guarded("privacy:epsilon=3,epochs=1,delta=0.01,accountant=rdp")
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(Unprotected, match=r"at most epsilon 3, got a training of 12 more steps"):
        fit(module, epochs=3)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert not module.guard._ledgers["privacy"].history


def half_trained(epochs, batch_size, path):
    """A module whose checkpoint has trained on batches of 4, and one to resume it with others."""
    stack = "privacy:epsilon=3,epochs=4,delta=0.01,accountant=rdp"
    first, second = Weighed(stack), Weighed(stack)
    first.batch_size, second.batch_size = 4, batch_size
    fit(first, epochs=epochs).save_checkpoint(path)
    return first, second


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("batch_size", "steps"), [(16, 2), (8, 4)])
def test_a_resume_with_larger_batches_beyond_the_target_is_refused_before_its_first_step(
    tmp_path, batch_size, steps
):
    first, second = half_trained(2, batch_size, tmp_path / "half.ckpt")
    with pytest.raises(Unprotected, match=f"got a training of {steps} more steps"):
        fit(second, epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert gap(second.net, first.net) == 0
    assert second.guard._ledgers["privacy"].steps == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_resume_with_smaller_batches_plans_the_epochs_that_are_left(tmp_path):
    _, second = half_trained(2, 2, tmp_path / "half.ckpt")
    trainer = fit(second, epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert second.guard._ledgers["privacy"].steps == trainer.global_step == 16
    assert second.guard.privacy_spent().epsilon < 3


class Photos(L.LightningDataModule):
    def train_dataloader(self):
        return self.trainer.lightning_module.private(DataLoader(DATA, 4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["fit", "data module"])
def test_a_loader_from_elsewhere_is_made_private_by_the_module(how):
    module = Guarded(PRIVATE, 3)
    fit(module, module.private(DataLoader(DATA, 4)) if how == "fit" else Photos())
    assert gap(module.net, by_hand(PRIVATE)[0]) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_a_plain_loader_is_refused_before_the_first_step():
    module = Guarded(PRIVATE, 3)
    before = {n: t.clone() for n, t in module.net.state_dict().items()}
    with pytest.raises(Unprotected, match=r"module\.private\(loader\)"):
        fit(module, DataLoader(DATA, 4))
    assert all(torch.equal(t, before[n]) for n, t in module.net.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_accumulation_is_refused_with_what_to_set():
    with pytest.raises(Incompatible, match="set physical_batch"):
        fit(Guarded(PRIVATE), accumulate_grad_batches=2)


@pytest.mark.filterwarnings("ignore")
def test_what_a_defense_added_is_trained_where_the_modules_optimizer_leaves_it_out():
    class Own(Lit):
        def configure_optimizers(self):
            of_the_model = build().state_dict()
            own = [p for n, p in self.net.named_parameters() if n in of_the_model]
            return torch.optim.SGD(own, lr=0.1)

    module = type("Module", (GuardMixin, Own), {})(SHUFFLE)
    known = build().state_dict()
    added = {n: p.clone() for n, p in module.net.named_parameters() if n not in known}
    fit(module, epochs=1)
    trained = dict(module.net.named_parameters())
    assert added and not any(torch.equal(p, trained[n]) for n, p in added.items())


@pytest.mark.filterwarnings("ignore")
def test_accumulation_without_privacy_is_lightnings():
    assert fit(Guarded(SHUFFLE), accumulate_grad_batches=2).global_step == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stack", ["noise:scale=0.1", "client-privacy", "encryption"])
def test_defenses_of_the_update_alone_are_refused_before_the_first_step(stack):
    module = Guarded(stack)
    with pytest.raises(Unprotected, match="would not act on the weights"):
        fit(module)
    module.guard.keep_local()
    fit(module, epochs=1)


class Own(Lit):
    """Prepares by itself."""

    def configure_optimizers(self):
        guard = vg.Guard.of(self.net)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer, self.loader = guard.prepare(optimizer, DataLoader(DATA, 4))
        return optimizer

    def train_dataloader(self):
        return self.loader


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("stack", "settings", "told"),
    [
        (f"{PRIVATE},physical_batch=2", {}, "WholeBatches"),
        (PRIVATE, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, "Leave it out"),
    ],
    ids=["pieces", "clipping by value"],
)
def test_the_callback_alone_refuses_what_lightning_cannot_follow(stack, settings, told):
    module = Own(stack)
    with pytest.raises(Incompatible, match=told):
        fit(module, callbacks=[GuardCallback()], **settings)
    assert not vg.Guard.of(module.net)._ledgers["privacy"].history


@pytest.mark.filterwarnings("ignore")
def test_the_callback_alone_counts_for_a_module_that_prepares_by_itself(tmp_path):
    module = Own(PRIVATE)
    trainer = fit(module, epochs=1, callbacks=[GuardCallback()])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = Own(PRIVATE)
    fit(again, epochs=2, callbacks=[GuardCallback()], ckpt_path=tmp_path / "one.ckpt")
    assert vg.Guard.of(again.net)._ledgers["privacy"].steps == 8


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_steps_by_itself_is_told_what_to_call():
    class Manual(GuardMixin, Lit):
        automatic_optimization = False

    with pytest.raises(Incompatible, match=r"guard\.prepare and guard\.auxiliary_loss"):
        fit(Manual(SHUFFLE))


def forms(kind):
    class Formed(Lit):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return {
                "alone": optimizer,
                "a list": [optimizer],
                "a dictionary": {"optimizer": optimizer, "lr_scheduler": scheduler},
                "nested": {
                    "optimizer": optimizer,
                    "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
                },
            }[kind]

    class Both(GuardMixin, Formed):
        pass

    return Both(PRIVATE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["alone", "a list", "a dictionary", "nested"])
def test_an_optimizer_is_found_in_every_form_that_lightning_takes(kind):
    module = forms(kind)
    fit(module, epochs=1)
    assert module.guard._ledgers["privacy"].steps == 4


class Weighed(Guarded):
    def __init__(self, *args):
        super().__init__(*args)
        self.lr, self.batch_size = 0.1, 2

    def train_dataloader(self):
        return self.private(DataLoader(DATA, self.batch_size))


def test_a_checkpoint_of_weights_alone_brings_what_was_spent_on_them(tmp_path):
    trained = Guarded(PRIVATE)
    fit(trained, epochs=1).save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loaded = Guarded.load_from_checkpoint(tmp_path / "weights.ckpt")
    assert loaded.guard._ledgers["privacy"].history == [(0.5, 0.25, 4)]


@pytest.mark.filterwarnings("ignore")
def test_steps_of_a_tuner_stay_counted_and_training_goes_on(tmp_path):
    from lightning.pytorch.tuner import Tuner

    module = Weighed(PRIVATE)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    start = {n: t.clone() for n, t in module.net.state_dict().items()}
    Tuner(trainer).lr_find(module, num_training=3)
    spent = module.guard._ledgers["privacy"].steps
    assert spent >= 3
    assert all(torch.equal(t, start[n]) for n, t in module.net.state_dict().items())
    trainer.fit(module)
    assert module.guard._ledgers["privacy"].steps == spent + trainer.global_step


FINDERS = {
    "physical_batch": lambda: {"callbacks": [L.pytorch.callbacks.BatchSizeFinder("power", 1)]},
    "lr_find": lambda: {"callbacks": [L.pytorch.callbacks.LearningRateFinder(1e-6, 1, 2)]},
    "gradient_clip_val=0.5": lambda: {
        "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value",
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("told", FINDERS)
def test_what_lightning_would_do_around_a_private_step_is_refused_before_it(tmp_path, told):
    module = Weighed(PRIVATE)
    before = {n: t.clone() for n, t in module.net.state_dict().items()}
    with pytest.raises(Incompatible, match=told):
        fit(module, folder=tmp_path, **FINDERS[told]())
    assert all(torch.equal(t, before[n]) for n, t in module.net.state_dict().items())
    assert not module.guard._ledgers["privacy"].history


def test_a_tuner_of_batch_sizes_is_told_what_bounds_the_memory(tmp_path):
    from lightning.pytorch.tuner import Tuner

    module, trainer = Weighed(PRIVATE), L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(Incompatible, match="physical_batch"):
        Tuner(trainer).scale_batch_size(module)
    assert not module.guard._ledgers["privacy"].history


def test_a_schedule_of_accumulation_is_refused_before_the_first_step():
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    module = Guarded(PRIVATE)
    with pytest.raises(Incompatible, match="physical_batch"):
        fit(module, callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})])
    assert not module.guard._ledgers["privacy"].history


@pytest.mark.parametrize("stack", [SHUFFLE, f"{PRIVATE},physical_batch=2"])
def test_a_batch_whose_step_returns_nothing_is_left_out_or_refused(stack):
    class Choosing(GuardMixin, type("Plain", (Lit,), {})):
        pass

    def training_step(self, batch, batch_idx):
        loss = Lit.training_step(self, batch, batch_idx)
        return loss if batch_idx else None

    Choosing.__mro__[2].training_step = training_step
    module = Choosing(stack)
    if stack == SHUFFLE:
        assert fit(module, epochs=1).global_step == 4
        return
    with pytest.raises(Incompatible, match="got None"):
        fit(module, epochs=1)
    assert not module.guard._ledgers["privacy"].history


def test_a_schedule_counts_lightnings_steps():
    module = Guarded(f"{SHUFFLE},schedule=linear,steps=100")
    trainer = fit(module, epochs=1)
    assert module.net.vitguard.shuffle.step == trainer.global_step == 4
