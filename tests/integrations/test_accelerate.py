"""accelerate: what a loop by hand gives, private or not, and resumes that count."""

import gc
import os
import stat
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.fast import fast_for
from vitguard.errors import Incompatible, InputError, Unprotected

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("opacus")
from vitguard.integrations.accelerate import prepare  # noqa: E402

SHUFFLE = "shuffle:ratio=0.5,mask=uniform,dal=tokens,dal_weight=0.5"
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.01,accountant=rdp"
DATA = TensorDataset(
    torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10
)


def guarded(small_vit, stack, seed=3):
    model = small_vit(depth=1)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return model, vg.protect(model, stack, generator=generator)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(accelerator, model, optimizer, loader, guard, epochs=2):
    for _ in range(epochs):
        for images, labels in loader:
            model.train()
            loss = F.cross_entropy(model(images), labels) + guard.auxiliary_loss()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


class ByHand:
    """Stands for an accelerator."""

    def backward(self, loss):
        loss.backward()


ALL = [SHUFFLE, PRIVATE, f"{SHUFFLE}+{PRIVATE},physical_batch=2"]


@pytest.mark.parametrize("stack", fast_for(ALL, fast=[SHUFFLE, ALL[-1]]))  # privacy is in the last
def test_training_ends_at_the_weights_of_a_loop_by_hand(small_vit, stack):
    accelerator = accelerate.Accelerator(cpu=True)
    model, guard = guarded(small_vit, stack)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    made, optimizer, loader, _ = prepare(
        accelerator, model, optimizer, DataLoader(DATA, 4), scheduler
    )
    train(accelerator, made, optimizer, loader, guard)
    reference, counted = guarded(small_vit, stack)
    given = DataLoader(DATA, 4)
    optimizer, loader = counted.prepare(sgd(reference), given)
    train(ByHand(), reference, optimizer, loader, counted)
    other = reference.state_dict()
    gap = max(float((t - other[n]).abs().max()) for n, t in model.state_dict().items())
    assert gap < 1e-6
    assert not torch.equal(model.head.weight, small_vit(depth=1).head.weight)
    assert counted.state_dict()["ledger"].keys() == guard.state_dict()["ledger"].keys()


@pytest.mark.slow
def test_bfloat16_is_that_of_a_loop_under_autocast(small_vit):
    """accelerate puts autocast around the model's own forward, where a hook does not see it."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, guard = guarded(small_vit, PRIVATE)
    parts = prepare(accelerator, model, sgd(model), DataLoader(DATA, 4))
    train(accelerator, *parts, guard)
    reference, counted = guarded(small_vit, PRIVATE)
    optimizer, loader = counted.prepare(sgd(reference), DataLoader(DATA, 4))
    for _ in range(2):
        for images, labels in loader:
            with torch.autocast("cpu", torch.bfloat16):
                scores = reference.train()(images).float()
            F.cross_entropy(scores, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    other = reference.state_dict()
    assert max(float((t - other[n]).abs().max()) for n, t in model.state_dict().items()) < 1e-6
    assert guard._ledgers["privacy"].history == counted._ledgers["privacy"].history


def test_float16_that_begins_inside_the_model_is_refused_too(small_vit):
    model, guard = guarded(small_vit, PRIVATE)
    _, loader = guard.prepare(sgd(model), DataLoader(DATA, 4))
    model.forward = torch.autocast("cpu", torch.float16)(model.forward)
    with pytest.raises(Incompatible, match="bfloat16"):
        model.train()(next(iter(loader))[0])


@pytest.mark.slow
def test_epsilon_after_a_resume_is_that_of_one_run_and_a_plain_model_loads_the_weights(
    small_vit, tmp_path
):
    def run(epochs, load=None, save=None):
        accelerator = accelerate.Accelerator(cpu=True)
        model, guard = guarded(small_vit, f"{SHUFFLE}+{PRIVATE}", seed=None)
        parts = prepare(accelerator, model, sgd(model), DataLoader(DATA, 4))
        if load:
            accelerator.load_state(load)
        train(accelerator, *parts, guard, epochs)
        if save:
            accelerator.save_state(save)
        return guard

    whole = run(4)
    half = run(2, save=tmp_path / "half")
    resumed = run(2, load=tmp_path / "half")
    assert resumed.privacy_spent() == whole.privacy_spent()
    assert resumed._ledgers["privacy"].steps == 16
    assert stat.S_IMODE(os.stat(tmp_path / "half" / "vitguard.json").st_mode) == 0o600
    plain = small_vit(depth=1)
    plain.load_state_dict(half.export(), strict=True)
    (tmp_path / "half" / "vitguard.json").unlink()
    with pytest.raises(InputError, match="What was spent before would not count"):
        run(1, load=tmp_path / "half")


def test_what_accelerate_prepared_before_is_told_the_order(small_vit):
    accelerator = accelerate.Accelerator(cpu=True)
    model, _ = guarded(small_vit, SHUFFLE)
    optimizer, loader = accelerator.prepare(sgd(model), DataLoader(DATA, 4))
    with pytest.raises(Incompatible, match=r"integrations\.accelerate\.prepare"):
        prepare(accelerator, model, optimizer, loader)


def prepared_before(small_vit, **settings):
    """Everything prepared by accelerate, and only then by the guard."""
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    model, guard = guarded(small_vit, PRIVATE)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, loader, _ = accelerator.prepare(
        model, optimizer, DataLoader(DATA, 4), scheduler
    )
    return accelerator, model, optimizer, loader, guard


@pytest.mark.slow
def test_what_accelerate_prepared_before_is_opened_and_trains_as_a_loop_by_hand(
    small_vit, tmp_path
):
    accelerator, model, before, loader, guard = prepared_before(small_vit)
    optimizer, loader = guard.prepare(before, loader)
    assert optimizer is before, "the accelerator steps and saves what is private"
    train(accelerator, model, optimizer, loader, guard)
    reference, counted = guarded(small_vit, PRIVATE)
    private, draws = counted.prepare(sgd(reference), DataLoader(DATA, 4))
    train(ByHand(), reference, private, draws, counted)
    other = reference.state_dict()
    assert max(float((t - other[n]).abs().max()) for n, t in model.state_dict().items()) < 1e-6
    assert guard.privacy_spent() == counted.privacy_spent() and guard.privacy_spent().steps == 8
    accelerator.save_state(tmp_path / "state")
    again, model, optimizer, loader, later = prepared_before(small_vit)
    later.prepare(optimizer, loader)
    again.load_state(tmp_path / "state")
    assert later.privacy_spent() == guard.privacy_spent()


def test_a_state_without_the_ledger_is_refused_by_what_was_opened(small_vit, tmp_path):
    accelerator, *_ = prepared_before(small_vit)
    accelerator.save_state(tmp_path / "plain")
    again, _, optimizer, loader, guard = prepared_before(small_vit)
    guard.prepare(optimizer, loader)
    with pytest.raises(InputError, match="What was spent before would not count"):
        again.load_state(tmp_path / "plain")


@pytest.mark.parametrize(
    "got", ["several processes", "gradient scaler", "accumulates", "go to meta"]
)
def test_what_accelerate_would_do_around_a_private_step_is_refused(small_vit, got):
    steps = 2 if got == "accumulates" else 1
    _, _, optimizer, loader, guard = prepared_before(small_vit, gradient_accumulation_steps=steps)
    if got == "several processes":
        optimizer.accelerator_state.num_processes = 2
    if got == "gradient scaler":
        optimizer.scaler = torch.amp.GradScaler("cpu")
    if got == "go to meta":
        loader.device = torch.device("meta")
    with pytest.raises(Incompatible, match=f"{got}.*integrations\\.accelerate\\.prepare"):
        guard.prepare(optimizer, loader)
    assert type(optimizer.optimizer) is torch.optim.SGD


@pytest.mark.parametrize("stack", ["noise:scale=0.1", "client-privacy", "encryption"])
def test_defenses_of_the_update_alone_are_refused(small_vit, stack):
    accelerator = accelerate.Accelerator(cpu=True)
    model, guard = guarded(small_vit, stack)
    with pytest.raises(Unprotected, match="would not act on the weights"):
        prepare(accelerator, model, sgd(model), DataLoader(DATA, 4))
    guard.will_seal()
    prepare(accelerator, model, sgd(model), DataLoader(DATA, 4))


def test_accumulation_is_refused_with_what_to_set(small_vit):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, _ = guarded(small_vit, PRIVATE)
    with pytest.raises(Incompatible, match="set physical_batch"):
        prepare(accelerator, model, sgd(model), DataLoader(DATA, 4))


TWO = [PRIVATE, f"{SHUFFLE}+client-privacy:noise=1"]


@pytest.mark.parametrize("stack", fast_for(TWO, fast=TWO[1:]))
def test_two_protected_models_keep_their_own_ledgers(small_vit, tmp_path, stack):
    def both():
        accelerator, made = accelerate.Accelerator(cpu=True), []
        for _ in range(2):
            model, guard = guarded(small_vit, stack, seed=None)
            guard.will_seal()
            accelerator.prepare(small_vit(depth=1))  # of no guard
            made.append((guard, *prepare(accelerator, model, sgd(model), DataLoader(DATA, 4))))
        return accelerator, made

    accelerator, made = both()
    for times, (guard, *parts) in zip((2, 1), made, strict=True):
        if "client" in stack:
            for _ in range(times):
                guard.update(DATA.tensors[0][:2], DATA.tensors[1][:2])
        else:
            train(accelerator, *parts, guard, epochs=times)
    accelerator.save_state(tmp_path / "two")
    again, later = both()
    again.load_state(tmp_path / "two")
    spent = [[g.privacy_spent().steps for g, *_ in pair] for pair in (made, later)]
    assert spent[0] == spent[1] == ([2, 1] if "client" in stack else [8, 4])
    one = accelerate.Accelerator(cpu=True)
    model, guard = guarded(small_vit, stack, seed=None)
    guard.will_seal()
    prepare(one, model, sgd(model), DataLoader(DATA, 4))
    one.load_state(tmp_path / "two")
    assert guard.privacy_spent().steps == spent[0][0]


@pytest.mark.parametrize("stack", [SHUFFLE, PRIVATE])
def test_a_model_that_was_freed_is_kept_alive_by_nobody(small_vit, tmp_path, stack):
    """One after the other on one accelerator: each would take the memory of all before it."""
    accelerator, freed = accelerate.Accelerator(cpu=True), []
    for _ in range(2):
        model, guard = guarded(small_vit, stack)
        parts = prepare(accelerator, model, sgd(model), DataLoader(DATA, 8))
        train(accelerator, *parts, guard, epochs=1)
        accelerator.save_state(str(tmp_path))
        freed.append(weakref.ref(model))
        accelerator.free_memory()
        del model, guard, parts
        gc.collect()
    assert [model() for model in freed] == [None, None]
    model, guard = guarded(small_vit, stack)
    prepare(accelerator, model, sgd(model), DataLoader(DATA, 8))
    accelerator.load_state(str(tmp_path))  # what the last of them saved
    assert guard.privacy_spent().steps == 2 if stack == PRIVATE else True


def test_batches_to_skip_after_a_resume_are_told_to_be_none(small_vit):
    accelerator = accelerate.Accelerator(cpu=True)
    model, _ = guarded(small_vit, PRIVATE)
    _, _, loader = prepare(accelerator, model, sgd(model), DataLoader(DATA, 4))
    with pytest.raises(AttributeError, match=r"every draw is fresh.*nothing to skip"):
        accelerator.skip_first_batches(loader, 1)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("pieces", [8, 2])
def test_a_schedule_counts_a_private_batch_as_a_step(small_vit, monkeypatch, processes, pieces):
    """accelerate steps it once for each process, whose loaders share the batches out."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, guard = guarded(small_vit, f"{PRIVATE},physical_batch={pieces}")
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, private, loader, scheduler = prepare(
        accelerator, model, optimizer, DataLoader(DATA, 8), scheduler
    )
    state = type("State", (), {"num_processes": processes})
    monkeypatch.setattr("accelerate.scheduler.AcceleratorState", state)
    start = optimizer.param_groups[0]["lr"]
    for images, labels in loader:
        accelerator.backward(F.cross_entropy(model(images), labels))
        private.step()
        scheduler.step()
        private.zero_grad()
    steps = guard._ledgers["privacy"].steps
    assert steps == len(loader)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(start * 0.5**steps)
