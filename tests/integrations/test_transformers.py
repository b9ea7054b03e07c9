"""Hugging Face's Trainer: what a loop by hand gives, private or not, and resumes that count."""

import functools
import inspect
import os
import stat

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import vitguard as vg
from tests.fast import fast_for
from vitguard.errors import Incompatible, InputError, Unprotected, VitguardError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("opacus")
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification  # noqa: E402

from vitguard.integrations.transformers import GuardedTrainer, GuardMixin  # noqa: E402

SHUFFLE = "shuffle:ratio=0.5,mask=uniform,dal=tokens,dal_weight=0.5"
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.01,accountant=rdp"
RECORDS = 16
IMAGES = torch.randn(RECORDS, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Photos(torch.utils.data.Dataset):
    """As the hub's examples have it: dictionaries, put together by a collate function."""

    def __len__(self):
        return RECORDS

    def __getitem__(self, i):
        return {"pixel_values": IMAGES[i], "labels": i % 10}


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {
        "pixel_values": pixel_values, "labels": torch.tensor([e["labels"] for e in examples]),
    }  # fmt: skip


def build():
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_labels=10,
            num_attention_heads=2, intermediate_size=32, hidden_dropout_prob=0.0,
        )
    )  # fmt: skip


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_train_epochs": 2,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
        "learning_rate": 0.1, "disable_tqdm": True, "lr_scheduler_type": "constant",
        "remove_unused_columns": False, "max_grad_norm": 0.0, "optim": "sgd",
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def trainer(model, folder, kind=GuardedTrainer, **changes):
    return kind(
        model=model, args=arguments(folder, **changes), train_dataset=Photos(),
        data_collator=collate_fn,
    )  # fmt: skip


def guarded(stack, seed=3):
    model = build()
    return model, vg.protect(model, stack, generator=torch.Generator().manual_seed(seed))


def by_hand(stack, epochs=2, batch=4, order=None):
    """The same training without a trainer, on the same draws."""
    model, guard = guarded(stack)
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "norm" not in n]
    rest = [p for n, p in model.named_parameters() if "bias" in n or "norm" in n]
    optimizer = torch.optim.SGD([{"params": decayed}, {"params": rest}], lr=0.1)
    data = DataLoader(Photos(), batch, shuffle="privacy" not in stack, collate_fn=collate_fn)
    optimizer, loader = guard.prepare(optimizer, data)
    for _ in range(epochs):
        batches = loader if "privacy" in stack else next(order)
        for inputs in batches:
            model.train()
            outputs = model(**inputs)
            (outputs.loss + guard.auxiliary_loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, guard


hand = functools.cache(by_hand)  # nobody changes what it returns


def gap(one, other):
    other = other.state_dict()
    return max(float((t - other[n]).abs().max()) for n, t in one.state_dict().items())


BOTH = f"{SHUFFLE}+{PRIVATE}"


@pytest.mark.slow
@pytest.mark.parametrize("stack", fast_for([PRIVATE, BOTH], fast=[BOTH]))  # one is in the other
def test_private_training_ends_at_the_weights_of_a_loop_by_hand(tmp_path, stack):
    model, guard = guarded(stack)
    made = trainer(model, tmp_path)
    made.train()
    reference, counted = hand(stack)
    assert gap(model, reference) < 1e-6 < gap(model, guarded(stack)[0])
    assert guard._ledgers["privacy"].history == counted._ledgers["privacy"].history
    assert made.state.global_step == 8 == guard._ledgers["privacy"].steps


class Watched(GuardedTrainer):
    """Keeps the batches that it was given."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), {k: v.clone() for k, v in inputs.items()}]
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.slow
def test_a_shuffle_with_its_loss_ends_at_the_weights_of_a_loop_by_hand(tmp_path):
    model, _ = guarded(SHUFFLE)
    made = trainer(model, tmp_path, Watched)
    made.train()
    reference, _ = by_hand(SHUFFLE, order=iter([made.seen[:4], made.seen[4:]]))
    assert gap(model, reference) < 1e-6 < gap(model, guarded(SHUFFLE)[0])
    assert made.state.log_history[0]["auxiliary_loss"] > 0


@pytest.mark.skipif(
    "loss_is_scaled_for_ga" not in inspect.getsource(transformers.Trainer),
    reason="older Trainers divide a short accumulation by what it would have had",
)
@pytest.mark.parametrize("scaled", [None, False])
def test_accumulated_batches_weigh_the_loss_of_a_defense_as_one_batch_does(tmp_path, scaled):
    class Accumulated(Watched):
        loss_is_scaled_for_ga = scaled
        model_accepts_loss_kwargs = property(lambda self: scaled is None, lambda self, value: None)

    model, _ = guarded(SHUFFLE)
    size = 6 if scaled is None else 8  # 6, 6 and 4: a mean of means is another loss
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 3}
    made = trainer(model, tmp_path, Accumulated, num_train_epochs=1, **settings)
    made.train()
    reference, guard = guarded(SHUFFLE)
    optimizer = guard.prepare(torch.optim.SGD(reference.parameters(), lr=0.1))
    for inputs in made.seen:
        loss = reference.train()(**inputs).loss + guard.auxiliary_loss()
        (loss * len(inputs["labels"]) / RECORDS).backward()
    optimizer.step()
    assert gap(model, reference) < 1e-6 < gap(model, guarded(SHUFFLE)[0])


def test_the_unknown_embedding_shares_the_group_of_the_positions(tmp_path):
    model, _ = guarded(SHUFFLE)
    made = trainer(model, tmp_path, weight_decay=0.1)
    optimizer = made.create_optimizer()

    def group(name):
        own = model.get_parameter(name)
        return next(g for g in optimizer.param_groups if any(p is own for p in g["params"]))

    assert group("vitguard.shuffle.unknown") is group("vit.embeddings.position_embeddings")


@pytest.mark.slow
def test_bfloat16_trains_privately_close_to_full_precision(tmp_path):
    model, guard = guarded(PRIVATE)
    trainer(model, tmp_path, bf16=True).train()
    assert guard._ledgers["privacy"].steps == 8
    assert 0 < gap(model, hand(PRIVATE)[0]) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", fast_for([1, 4], fast=[4]))  # of 1 there is nothing to add
def test_accumulation_is_one_private_step_on_one_batch_of_that_many_images(tmp_path, accumulated):
    model, guard = guarded(PRIVATE)
    size = 8 // accumulated
    made = trainer(
        model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated
    )
    made.train()
    reference, _ = by_hand(f"{PRIVATE},physical_batch={size}", batch=8)
    assert gap(model, reference) < 1e-6
    assert guard._ledgers["privacy"].history == [(0.5, 0.5, 4)]
    assert made.state.global_step == 4


@pytest.mark.slow
def test_physical_batch_changes_neither_the_steps_nor_the_weights(tmp_path):
    model, guard = guarded(f"{PRIVATE},physical_batch=2")
    made = trainer(model, tmp_path)
    made.train()
    assert gap(model, by_hand(f"{PRIVATE},physical_batch=2")[0]) < 1e-6
    assert made.state.global_step == 8 == guard._ledgers["privacy"].steps


@pytest.mark.slow
def test_epsilon_after_a_resume_is_that_of_one_run(tmp_path):
    whole, _ = guarded(PRIVATE, seed=1)
    one = trainer(whole, tmp_path / "whole", max_steps=16, logging_steps=8)
    one.train()
    first = build()
    vg.protect(first, PRIVATE)
    trainer(first, tmp_path / "parts", save_strategy="steps", save_steps=8, max_steps=8).train()
    second = build()
    guard = vg.protect(second, PRIVATE)
    made = trainer(second, tmp_path / "parts", max_steps=16, logging_steps=8)
    made.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert made.state.global_step == 16 == guard._ledgers["privacy"].steps
    spent = guard.privacy_spent().epsilon
    assert spent == vg.Guard.of(whole)._ledgers["privacy"].spent(0.01, "rdp").epsilon
    assert [e["epsilon"] for e in made.state.log_history if "loss" in e][-1] == spent


ONE_EPOCH = {"num_train_epochs": 1, "save_strategy": "epoch"}


def saved(folder, stack=PRIVATE, **changes):
    model = build()
    vg.protect(model, stack)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(model, folder, **(changes or settings)).train()
    return model, folder / ("checkpoint-4" if changes else "checkpoint-2")


def test_the_state_of_the_guard_is_the_owners_alone_and_a_plain_model_loads_the_weights(tmp_path):
    model, checkpoint = saved(tmp_path, f"{SHUFFLE}+{PRIVATE}")
    assert stat.S_IMODE(os.stat(checkpoint / "vitguard.json").st_mode) == 0o600
    plain = ViTForImageClassification.from_pretrained(checkpoint)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in plain.named_parameters())
    assert not any("vitguard" in n for n in plain.state_dict())


def test_a_checkpoint_without_the_guards_state_is_refused_and_loads_nothing(tmp_path):
    _, checkpoint = saved(tmp_path)
    (checkpoint / "vitguard.json").unlink()
    model = build()
    vg.protect(model, PRIVATE)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(InputError, match="What was spent before would not count"):
        trainer(model, tmp_path, max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.slow
def test_the_plain_trainers_checkpoint_counts_too_when_the_optimizer_is_private(tmp_path):
    """Whoever writes the four lines by hand: the optimizer's state carries the ledger."""

    class ByHand(Trainer):
        def get_train_dataloader(self):
            guard = vg.Guard.of(self.model)
            loader = DataLoader(Photos(), 4, shuffle=True, collate_fn=collate_fn)
            optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            self.optimizer, loader = guard.prepare(optimizer, loader)
            return loader

    model, _ = guarded(PRIVATE)
    trainer(model, tmp_path, ByHand, save_strategy="steps", save_steps=2, max_steps=2).train()
    second, guard = guarded(PRIVATE)
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer(second, tmp_path, ByHand, max_steps=4, ignore_data_skip=True).train(checkpoint)
    assert guard._ledgers["privacy"].steps == 4


OF_THE_UPDATE = ["noise:scale=0.1", "client-privacy", "encryption", "pruning"]


@pytest.mark.parametrize("stack", fast_for(OF_THE_UPDATE, fast=["encryption"]))  # by one trait
def test_defenses_of_the_update_alone_are_refused_before_the_first_step(tmp_path, stack):
    model, guard = guarded(stack)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(Unprotected, match="would not act on the weights"):
        trainer(model, tmp_path).train()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    guard.keep_local()
    trainer(model, tmp_path, max_steps=1).train()


def test_a_local_training_in_a_round_may_be_the_trainers(tmp_path):
    model, guard = guarded("noise:scale=0.1")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with guard.round(1, base="start"):
        trainer(model, tmp_path, max_steps=1).train()
        moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        sealed = guard.seal(vg.Update(moved, kind="difference", batch_size=4))
    assert not torch.equal(sealed.tensors["classifier.weight"], moved["classifier.weight"])


REFUSED = {
    "fp16": ({"fp16": True}, "bf16=True"),
    "torch_compile": ({"torch_compile": True}, "Leave it out"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_privacy_cannot_have_is_refused_when_the_trainer_is_made(tmp_path, what):
    model, _ = guarded(PRIVATE)
    changes, remedy = REFUSED[what]
    made = arguments(tmp_path)
    for name, value in changes.items():
        setattr(made, name, value)
    with pytest.raises(Incompatible, match=remedy):
        GuardedTrainer(model=model, args=made, train_dataset=Photos(), data_collator=collate_fn)


def test_a_model_that_is_not_protected_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"Call vg\.protect"):
        trainer(build(), tmp_path)


def test_a_mixing_collate_function_is_refused(tmp_path):
    def mixing(examples):
        batch = collate_fn(examples)
        batch["pixel_values"] = 0.5 * batch["pixel_values"] + 0.5 * batch["pixel_values"].flip(0)
        return batch

    model, _ = guarded(PRIVATE)
    with pytest.raises(Incompatible, match="mixes examples"):
        GuardedTrainer(
            model=model, args=arguments(tmp_path), train_dataset=Photos(), data_collator=mixing
        ).train()


@pytest.mark.slow
def test_a_target_epsilon_is_kept_over_a_second_call_of_train(tmp_path):
    model, guard = guarded("privacy:epsilon=3,epochs=1,delta=0.01,accountant=rdp")
    guard.redraw(None)
    made = trainer(model, tmp_path, num_train_epochs=1)
    made.train()
    assert 2.5 < guard.privacy_spent().epsilon <= 3
    with pytest.raises(VitguardError, match="at most epsilon 3"):
        made.train()


def test_a_training_beyond_the_target_is_refused_before_its_first_step(tmp_path):
    model, guard = guarded("privacy:epsilon=3,epochs=1,delta=0.01,accountant=rdp")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(VitguardError, match=r"at most epsilon 3, got a training of 12 more steps"):
        trainer(model, tmp_path, num_train_epochs=3).train()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not guard._ledgers["privacy"].history


@pytest.mark.slow
def test_evaluation_during_private_training_works_and_label_smoothing_too(tmp_path):
    model, guard = guarded(f"{SHUFFLE}+{PRIVATE}")
    made = GuardedTrainer(
        model=model, train_dataset=Photos(), eval_dataset=Photos(), data_collator=collate_fn,
        args=arguments(
            tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, label_smoothing_factor=0.1
        ),
    )  # fmt: skip
    made.train()
    assert sum("eval_loss" in e for e in made.state.log_history) == 2
    assert guard._ledgers["privacy"].steps == 4


def test_the_mixin_goes_before_any_trainer_of_ones_own(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(inputs["pixel_values"])
            loss = F.cross_entropy(outputs.logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    class Both(GuardMixin, Own):
        pass

    model, _ = guarded(PRIVATE)
    trainer(model, tmp_path, Both).train()
    assert gap(model, hand(PRIVATE)[0]) < 1e-6


RANDOM = f"positions:kind=random+{SHUFFLE},warmup=1"


@pytest.mark.slow
@pytest.mark.parametrize("stack", fast_for([RANDOM, BOTH], fast=[RANDOM]))
def test_a_resume_goes_on_from_every_weight_of_the_checkpoint(tmp_path, stack):
    model, checkpoint = saved(tmp_path, stack, **ONE_EPOCH)
    again = build()
    vg.protect(again, stack)
    assert gap(again, model) > 1e-3
    made = trainer(again, tmp_path, **ONE_EPOCH)
    made.train(resume_from_checkpoint=str(checkpoint))
    assert gap(again, model) == 0 and made.state.global_step == 4


def test_the_best_model_at_the_end_has_every_weight_of_its_checkpoint(tmp_path):
    model, _ = guarded(SHUFFLE)
    made = GuardedTrainer(
        model=model, train_dataset=Photos(), eval_dataset=Photos(), data_collator=collate_fn,
        args=arguments(
            tmp_path, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
            greater_is_better=True,
        ),
    )  # fmt: skip
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-4") and made.state.global_step == 8
    best = ViTForImageClassification.from_pretrained(made.state.best_model_checkpoint)
    assert gap(best, model) == 0


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    _, checkpoint = saved(tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    weights = {n: t for n, t in weights.items() if "layernorm_before" not in n}
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    model = build()
    vg.protect(model, PRIVATE)
    with pytest.raises(InputError, match=r"all that the model has, got .* without .*layernorm"):
        trainer(model, tmp_path, max_steps=4).train(resume_from_checkpoint=str(checkpoint))


def with_adapters(stack):
    peft = pytest.importorskip("peft")
    guard = vg.protect(build(), stack)
    wanted = ["q_proj", "query"]  # by release
    return guard, peft.get_peft_model(
        guard.model, peft.LoraConfig(r=2, target_modules=wanted, modules_to_save=["classifier"])
    )


def test_a_resume_of_adapters_goes_on_from_what_defenses_added(tmp_path):
    guard, model = with_adapters(RANDOM)
    trainer(model, tmp_path, **ONE_EPOCH).train()
    again, other = with_adapters(RANDOM)
    assert gap(again.model, guard.model) > 1e-3
    checkpoint = tmp_path / "checkpoint-4"
    trainer(other, tmp_path, **ONE_EPOCH).train(resume_from_checkpoint=str(checkpoint))
    assert gap(again.model, guard.model) == 0
    (checkpoint / "vitguard.safetensors").unlink()
    with pytest.raises(InputError, match=r"all that the model has, got .* without vitguard"):
        trainer(with_adapters(RANDOM)[1], tmp_path, **ONE_EPOCH).train(
            resume_from_checkpoint=str(checkpoint)
        )


@pytest.mark.slow
def test_every_model_that_model_init_makes_is_trained_privately_on_one_ledger(tmp_path):
    made = GuardedTrainer(
        model_init=lambda: vg.protect(build(), PRIVATE).model, train_dataset=Photos(),
        args=arguments(tmp_path, max_steps=2), data_collator=collate_fn,
    )  # fmt: skip
    models = [made.model]
    for trials in (1, 2):
        made.train()
        models.append(made.model)
        assert made.guard.model is made.model
        assert made.guard.privacy_spent().steps == 2 * trials
    assert len(set(map(id, models))) == 3
