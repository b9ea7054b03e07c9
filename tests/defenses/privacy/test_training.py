"""The training loop: prepare, Poisson batches, pieces, the ledger, and what is refused."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from tests.defenses.privacy.privacy_models import build
from vitguard.core import Update
from vitguard.defenses.positions import FixedPositions
from vitguard.defenses.privacy import DifferentialPrivacy, Ledger
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.draws import Draws
from vitguard.errors import Incompatible, InputError, MissingExtra, Unprotected
from vitguard.guard import Guard, protect

pytest.importorskip("opacus")


def data(count=24, dtype=torch.float32):
    torch.manual_seed(5)
    return TensorDataset(torch.randn(count, 3, 32, 32, dtype=dtype), torch.randint(0, 10, (count,)))


def protected(*, stack=(), batch=6, count=24, dtype=torch.float32, seed=0, lr=0.1, **settings):
    """A protected model and what trains it; draws are secret where `seed` is None."""
    settings = {"noise": 1.0, "delta": 1e-3} | settings
    model = build("vit", dtype)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    guard = protect(model, [*stack, DifferentialPrivacy(**settings)], generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loader = DataLoader(data(count, dtype), batch_size=batch)
    return model, guard, optimizer, loader


def train(model, guard, optimizer, loader, passes=1):
    for _ in range(passes):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels) + guard.auxiliary_loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "stack",
    [
        [],
        [FixedPositions("sincos"), PatchShuffle(ratio=0.5, dal="tokens")],
        [PatchShuffle(ratio=0.5, dal="positions")],
    ],
    ids=["plain", "tokens", "positions"],
)
def test_training_steps_and_keys_and_structure_of_the_model_stay(stack):
    model, guard, optimizer, loader = protected(stack=stack)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    before = weights(model)
    private, poisson = guard.prepare(optimizer, loader)
    assert list(model.state_dict()) == keys
    train(model, guard, private, poisson, passes=2)
    assert not torch.equal(before, weights(model))
    assert torch.isfinite(weights(model)).all()
    assert guard.privacy_spent().steps == 2 * len(poisson) == 8
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules() if "Private" not in type(m).__name__] == kinds
    guard.remove()
    assert not model._forward_hooks and not model._forward_pre_hooks
    model(torch.randn(2, 3, 32, 32))


@pytest.mark.slow
def test_a_step_is_the_clipped_sum_over_the_expected_batch():
    model, guard, optimizer, loader = protected(noise=0.0, clip=0.3, dtype=torch.float64, lr=1.0)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    private, poisson = guard.prepare(optimizer, loader)
    images, labels = next(iter(poisson))
    twin = copy.deepcopy(model)
    Guard.of(twin).remove()
    F.cross_entropy(model(images), labels).backward()
    private.step()
    total = {k: torch.zeros_like(p) for k, p in before.items()}
    names, parameters = zip(*twin.named_parameters(), strict=True)
    for i in range(len(images)):
        value = F.cross_entropy(twin(images[i : i + 1]), labels[i : i + 1])
        gradients = torch.autograd.grad(value, parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for k, g in zip(names, gradients, strict=True):
            total[k] += g * min(1.0, 0.3 / float(norm))
    for k, p in model.named_parameters():
        assert torch.allclose(before[k] - p, total[k] / 6, atol=1e-12), k


@pytest.mark.slow
def test_pieces_of_a_batch_make_the_same_step():
    after = []
    for pieces in (None, 2):
        model, guard, optimizer, loader = protected(
            noise=0.5, dtype=torch.float64, physical_batch=pieces
        )
        private, poisson = guard.prepare(optimizer, loader)
        train(model, guard, private, poisson)
        after.append(weights(model))
        assert guard.privacy_spent().steps == len(loader)
    assert torch.allclose(*after, atol=1e-10)


@pytest.mark.slow
def test_pieces_of_a_batch_share_one_mask():
    stack = [PatchShuffle(ratio=0.5, draw="batch")]
    model, guard, optimizer, loader = protected(stack=stack, physical_batch=1)
    private, poisson = guard.prepare(optimizer, loader)
    masks, ends = [], []
    for images, labels in poisson:
        ends.append(model.vitguard.privacy.due.last)
        F.cross_entropy(model(images), labels).backward()
        masks.append(guard.truth()["shuffled"][0])
        private.step()
        private.zero_grad()
    first = ends.index(True) + 1
    assert first > 1
    assert all(torch.equal(m, masks[0]) for m in masks[:first])
    assert not all(torch.equal(m, masks[0]) for m in masks)


@pytest.mark.slow
def test_empty_poisson_batches_step_on_noise_alone():
    model, guard, optimizer, loader = protected(batch=1, count=40, noise=0.0)
    private, poisson = guard.prepare(optimizer, loader)
    empty = 0
    for images, labels in poisson:
        real = model.vitguard.privacy.due.real
        before = weights(model)
        F.cross_entropy(model(images), labels).backward()
        private.step()
        private.zero_grad()
        if not real:
            empty += 1
            assert torch.equal(before, weights(model))
    assert empty and guard.privacy_spent().steps == 40


def test_batches_are_poisson_samples():
    model, guard, optimizer, loader = protected(batch=6, count=24)
    _, poisson = guard.prepare(optimizer, loader)
    sizes = []
    for _ in range(100):
        for _batch in poisson:
            sizes.append(model.vitguard.privacy.due.real)
            poisson.skip()
    sizes = torch.tensor(sizes) * 1.0
    assert sizes.mean().item() == pytest.approx(6, abs=0.5)
    assert sizes.var().item() == pytest.approx(24 * 0.25 * 0.75, rel=0.3)


def test_step_noise_has_standard_deviation_noise_times_clip():
    model, guard, optimizer, loader = protected(noise=2.0, clip=0.25, lr=1.0)
    private, poisson = guard.prepare(optimizer, loader)
    images, labels = next(iter(poisson))
    before = weights(model)
    (0 * F.cross_entropy(model(images), labels)).backward()
    private.step()
    moved = (weights(model) - before) * 6
    assert moved.std().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.slow
def test_ledger_is_plain_data_and_a_resumed_run_continues_it():
    model, guard, optimizer, loader = protected()
    private, poisson = guard.prepare(optimizer, loader)
    train(model, guard, private, poisson)
    saved = guard.state_dict()["ledger"]
    assert json.loads(json.dumps(saved)) == saved
    model, guard, optimizer, loader = protected()
    state = guard.state_dict() | {"ledger": saved}
    guard.load_state_dict(state)
    private, poisson = guard.prepare(optimizer, loader)
    train(model, guard, private, poisson)
    assert guard.privacy_spent().steps == 8
    with pytest.raises(InputError, match="stays counted"):
        guard.load_state_dict(state)  # the four steps since then were released
    assert guard.privacy_spent().steps == 8


@pytest.mark.slow
def test_preparing_again_for_another_round_composes():
    model, guard, optimizer, loader = protected()
    for _ in range(3):
        optimizer, poisson = guard.prepare(optimizer, loader)
        train(model, guard, optimizer, poisson)
    assert guard.privacy_spent().steps == 12
    assert len(model._forward_pre_hooks) == 2  # one of protect, one of prepare: none piles up


@pytest.mark.slow
def test_target_epsilon_is_spent_after_the_epochs_and_not_exceeded():
    model, guard, optimizer, loader = protected(seed=None, noise=None, epsilon=3.0, epochs=2)
    private, poisson = guard.prepare(optimizer, loader)
    train(model, guard, private, poisson, passes=2)
    assert 2.9 < guard.privacy_spent().epsilon <= 3.0
    planned = guard.privacy_spent().steps
    with pytest.raises(Unprotected, match="at most epsilon 3"):
        train(model, guard, private, poisson, passes=2)
    assert guard.privacy_spent().epsilon <= 3.0
    assert guard.privacy_spent().steps <= planned + 1  # one that the rounding of the noise left
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_target_epsilon_holds_over_rounds_of_any_data():
    model, guard, optimizer, loader = protected(seed=None, noise=None, epsilon=3.0, epochs=2)
    private, poisson = guard.prepare(optimizer, loader)
    train(model, guard, private, poisson, passes=2)
    records = loader.dataset
    other = DataLoader(records, batch_size=loader.batch_size // 2)
    private, poisson = guard.prepare(optimizer, other)
    with pytest.raises(Unprotected, match="at most epsilon 3"):
        train(model, guard, private, poisson)
    assert guard.privacy_spent().epsilon <= 3.0


def test_without_noise_epsilon_is_infinite():
    model, guard, optimizer, loader = protected(noise=0.0)
    private, poisson = guard.prepare(optimizer, loader)
    train(model, guard, private, poisson)
    assert guard.privacy_spent().epsilon == math.inf


@pytest.mark.slow
def test_equal_seeds_give_equal_runs_and_checkpoints_resume_exactly():
    runs = []
    for _ in range(2):
        model, guard, optimizer, loader = protected(seed=3)
        private, poisson = guard.prepare(optimizer, loader)
        train(model, guard, private, poisson)
        runs.append(weights(model))
    assert torch.equal(*runs)


def test_copies_refuse_plain_training_until_removed_and_evaluation_is_untouched():
    model, guard, optimizer, loader = protected()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(Unprotected, match="prepare"):  # protect alone does not train privately
        model(images)
    guard.prepare(optimizer, loader)
    twin = copy.deepcopy(model)
    with pytest.raises(Unprotected, match="prepare"):
        twin(images)
    Guard.of(twin).remove()
    F.cross_entropy(twin(images), labels).backward()
    assert twin.head.weight.grad is not None
    model.eval()
    with torch.no_grad():
        model(torch.randn(5, 3, 32, 32))


def test_the_public_model_trains_like_any_other():
    model, guard, optimizer, loader = protected()
    for _ in range(2):
        public = guard.public_model().train()
        assert not public._forward_pre_hooks
        public(torch.randn(2, 3, 32, 32)).sum().backward()
        with pytest.raises(Unprotected):
            model(torch.randn(2, 3, 32, 32))
        guard.prepare(optimizer, loader)


def test_every_release_of_update_is_in_the_ledger():
    _, guard, _, _ = protected()
    for _ in range(2):
        guard.update(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    spent = guard.privacy_spent()
    assert spent.steps == 2 and spent.epsilon > 1


def test_a_release_of_update_does_not_open_seal_to_plain_updates():
    model, guard, optimizer, loader = protected()
    plain = Update({k: torch.zeros_like(p) for k, p in model.named_parameters()})
    guard.update(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    with pytest.raises(Unprotected, match="prepare"):
        guard.seal(plain)
    guard.prepare(optimizer, loader)
    guard.seal(plain)  # what private training made may be sealed


def test_guard_update_works_beside_training():
    _, guard, optimizer, loader = protected()
    guard.prepare(optimizer, loader)
    update = guard.update(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert update.can_read("head.weight")


# what is refused


def test_old_loader_raises():
    model, guard, optimizer, loader = protected()
    guard.prepare(optimizer, loader)
    with pytest.raises(Unprotected, match="loader"):
        model(next(iter(loader))[0])


def test_old_optimizer_raises():
    model, guard, optimizer, loader = protected()
    _, poisson = guard.prepare(optimizer, loader)
    images, labels = next(iter(poisson))
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(Unprotected, match="optimizer"):
        optimizer.step()


def test_float16_autocast_is_refused_at_the_first_pass():
    model, guard, optimizer, loader = protected()
    _, poisson = guard.prepare(optimizer, loader)
    images, _ = next(iter(poisson))
    with torch.autocast("cpu", torch.float16), pytest.raises(Incompatible, match="GradScaler"):
        model(images)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler_is_refused_before_the_first_step(unscaled):
    model, guard, optimizer, loader = protected()
    private, poisson = guard.prepare(optimizer, loader)
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu")
    images, labels = next(iter(poisson))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    if unscaled:
        scaler.unscale_(private)
    with pytest.raises(Incompatible, match="without a GradScaler"):
        scaler.step(private)
    assert torch.equal(weights(model), before) and guard.privacy_spent().steps == 0


def test_a_disabled_scaler_and_bfloat16_autocast_train():
    model, guard, optimizer, loader = protected()
    private, poisson = guard.prepare(optimizer, loader)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = weights(model)
    for images, labels in poisson:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(private)
        private.zero_grad()
    assert guard.privacy_spent().steps == 4
    assert torch.isfinite(weights(model)).all() and not torch.equal(weights(model), before)


def test_two_passes_for_one_batch_raise():
    model, guard, optimizer, loader = protected()
    _, poisson = guard.prepare(optimizer, loader)
    images, _ = next(iter(poisson))
    model(images)
    with pytest.raises(Unprotected, match="one training pass"):
        model(images)


def test_a_step_without_a_pass_raises():
    _, guard, optimizer, loader = protected()
    private, poisson = guard.prepare(optimizer, loader)
    next(iter(poisson))
    with pytest.raises(Unprotected, match="before each step"):
        private.step()


def test_a_loss_beside_the_outputs_raises():
    model, guard, optimizer, loader = protected()
    private, poisson = guard.prepare(optimizer, loader)
    images, labels = next(iter(poisson))
    (F.cross_entropy(model(images), labels) + model.head.weight.square().sum()).backward()
    with pytest.raises(Unprotected, match=r"head\.weight"):
        private.step()


def test_a_pass_in_eval_mode_raises_at_the_step():
    model, guard, optimizer, loader = protected()
    private, poisson = guard.prepare(optimizer, loader)
    images, labels = next(iter(poisson))
    model.eval()
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(Unprotected):
        private.step()


def test_delta_that_is_not_below_one_over_the_records_raises():
    _, guard, optimizer, loader = protected(delta=0.1)
    with pytest.raises(InputError, match="delta below 1 / 24"):
        guard.prepare(optimizer, loader)


def test_target_epsilon_without_epochs_raises():
    _, guard, optimizer, loader = protected(noise=None, epsilon=3.0)
    with pytest.raises(InputError, match="epochs"):
        guard.prepare(optimizer, loader)


def test_missing_opacus_raises_before_training(monkeypatch):
    _, guard, optimizer, loader = protected()
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(MissingExtra, match="opacus"):
        guard.prepare(optimizer, loader)


def test_streams_without_a_length_are_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from data()

    _, guard, optimizer, _ = protected()
    with pytest.raises(Incompatible, match="dataset with a length"):
        guard.prepare(optimizer, DataLoader(Stream(), batch_size=2))


def test_an_optimizer_of_other_parameters_is_refused():
    _, guard, _, loader = protected()
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(Incompatible, match="the model's own parameters, got one of others"):
        guard.prepare(stranger, loader)


def test_batch_norm_is_refused_when_protecting():
    model = build("vit", torch.float32)
    model.norm = torch.nn.BatchNorm1d(32)
    with pytest.raises(Incompatible, match="BatchNorm1d"):
        protect(model, [DifferentialPrivacy(noise=1.0)])


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon": 1.0, "noise": 1.0}, {"epsilon": 0.0}, {"delta": 0.0}, {"delta": 1.0},
        {"clip": 0.0}, {"noise": -1.0}, {"noise": math.nan}, {"epochs": 0}, {"engine": "ghost"},
        {"accountant": "gdp"}, {"physical_batch": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range_raise(settings):
    with pytest.raises(InputError):
        DifferentialPrivacy(**settings)


@pytest.mark.slow
def test_importing_does_not_import_opacus():
    code = "import vitguard.defenses.privacy, sys; assert 'opacus' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_plain_models_can_be_prepared_without_a_guard():
    from vitguard.defenses.base import Draws

    model = build("vit", torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(data(), batch_size=6)
    defense = DifferentialPrivacy(noise=1.0, delta=1e-3)
    private, poisson, ledger = defense.prepare(model, optimizer, loader, Draws())
    for images, labels in poisson:
        F.cross_entropy(model(images), labels).backward()
        private.step()
        private.zero_grad()
    assert isinstance(ledger, Ledger) and ledger.steps == 4


def test_a_head_on_cached_features_trains_on_the_sum_of_its_clipped_gradients():
    features, labels = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 3
    head = torch.nn.Linear(6, 3, bias=False, dtype=torch.float64)
    start = head.weight.detach().clone()
    optimizer, loader, ledger = DifferentialPrivacy(noise=0, clip=0.5, delta=1e-3).prepare(
        head,
        torch.optim.SGD(head.parameters(), lr=1.0),
        DataLoader(TensorDataset(features, labels), batch_size=10),
        Draws(),
    )
    x, y = next(iter(loader))
    F.cross_entropy(head(x), y).backward()
    optimizer.step()
    wrong = (x @ start.T).softmax(-1) - F.one_hot(y, 3)
    each = wrong[:, :, None] * x[:, None]
    clipped = each * (0.5 / each.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    assert torch.allclose(start - head.weight, clipped.sum(0) / 10, atol=1e-12)
    assert ledger.steps == 1


def test_a_loader_without_examples_is_refused():
    head = torch.nn.Linear(6, 3)
    with pytest.raises(InputError, match="images or features"):
        DifferentialPrivacy(noise=1.0, delta=1e-3).prepare(
            head,
            torch.optim.SGD(head.parameters(), lr=1.0),
            DataLoader(TensorDataset(torch.arange(40)), batch_size=10),
            Draws(),
        )


def test_checkpoints_of_activations_that_are_turned_on_after_prepare_are_refused_in_words():
    model, guard, optimizer, loader = protected()
    optimizer, loader = guard.prepare(optimizer, loader)
    train(model, guard, optimizer, loader)
    model.set_grad_checkpointing()
    with pytest.raises(Incompatible, match="activation checkpointing in VisionTransformer"):
        train(model, guard, optimizer, loader)
    model.set_grad_checkpointing(False)
    train(model, guard, optimizer, loader)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_that_a_private_gradient_does_not_pass_are_told_once(kind, recwarn):
    def told():
        return [str(w.message) for w in recwarn if "hooks of their own" in str(w.message)]

    model, guard, optimizer, loader = protected(batch=12)
    train(model, guard, *guard.prepare(optimizer, loader))
    assert not told()
    getattr(model.head.weight, kind)(lambda gradient: None)
    train(model, guard, *guard.prepare(optimizer, loader))
    assert len(told()) == 1 and "head.weight" in told()[0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_a_weight_that_was_pruned_since_is_trained_where_it_is_kept(engine):
    model, guard, optimizer, loader = protected(noise=1e-9, engine=engine, seed=None)
    optimizer, loader = guard.prepare(optimizer, loader)
    layer = model.blocks[0].mlp.fc1
    prune.l1_unstructured(layer, "weight", 0.5)
    before = layer.weight_orig.detach().clone()
    images, labels = next(iter(loader))
    F.cross_entropy(model.train()(images), labels).backward()
    optimizer.step()
    moved = (layer.weight_orig.detach() - before).abs()
    kept = layer.weight_mask.bool()
    assert moved[kept].max() > 1e3 * moved[~kept].max() > 0


@pytest.mark.slow
def test_a_weight_that_was_parametrized_since_is_told_before_the_step():
    model, guard, optimizer, loader = protected()
    optimizer, loader = guard.prepare(optimizer, loader)
    parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    before = weights(model)
    images, labels = next(iter(loader))
    F.cross_entropy(model.train()(images), labels).backward()
    with pytest.raises(Unprotected, match=r"in place of blocks\.0\.mlp\.fc1\.weight"):
        optimizer.step()
    assert torch.equal(weights(model), before)
