"""protect and Guard: what leaves, what stays as it was, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vitguard.core import Batch, Update
from vitguard.defenses.base import (
    BatchDefense,
    Defense,
    Installed,
    ModelDefense,
    StepDefense,
    UpdateDefense,
)
from vitguard.defenses.noise import GradientNoise
from vitguard.defenses.positions import FixedPositions, WithheldPositions
from vitguard.defenses.privacy import ClientPrivacy, DifferentialPrivacy
from vitguard.errors import Incompatible, InputError, Unprotected, UnsupportedModel
from vitguard.guard import Guard, protect
from vitguard.vit import canonical_parameters

IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
LABELS = torch.tensor([1, 2])


class Record(UpdateDefense):
    name = "record"

    def __init__(self, log):
        self.log = log

    def seal(self, update, anatomy, draws):
        self.log.append("update")
        return update


class Halve(BatchDefense):
    name = "halve"

    def __init__(self, log):
        self.log = log

    def transform(self, batch, draws):
        self.log.append("batch")
        return Batch(batch.images / 2, batch.labels)


class Ones(StepDefense):
    name = "ones"

    def __init__(self, log):
        self.log = log

    def gradient(self, model, loss, batch, draws):
        self.log.append(("step", float(batch.images.max())))
        return {n: torch.ones_like(p) for n, p in canonical_parameters(model).items()}


class Fails(ModelDefense):
    name = "fails"

    def install(self, model, anatomy, draws):
        raise RuntimeError("on purpose")


class Adds(ModelDefense):
    """Adds a parameter, reads it in an auxiliary loss, and withholds the class token."""

    name = "adds"

    def install(self, model, anatomy, draws):
        return AddsInstalled()


class AddsInstalled(Installed):
    def __init__(self):
        super().__init__()
        self.unknown = torch.nn.Parameter(torch.full((3,), 2.0))

    def uninstall(self, model):
        pass

    def withheld(self):
        return {"cls_token": "it stays here"}

    def auxiliary_loss(self):
        return self.unknown.square().sum()


def settings_of(cls):
    """The stand-ins above are no dataclasses; give them the two methods that need one."""
    cls.settings = lambda self: {}
    cls.spec = lambda self: self.name


for stand_in in (Record, Halve, Ones, Fails, Adds):
    settings_of(stand_in)


def test_the_gradient_is_that_of_the_plain_loop(small_vit):
    model = small_vit()
    update = protect(model, []).update(IMAGES, LABELS)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    assert update.kind == "gradient" and update.batch_size == 2
    assert set(update.tensors) == {n for n, _ in model.named_parameters()} - {"vitguard"}
    for name, parameter in model.named_parameters():
        assert torch.allclose(update.read(name), parameter.grad, atol=1e-7), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_difference_is_that_of_the_plain_loop_and_the_model_is_unchanged(
    small_vit, optimizer, steps
):
    model, twin = small_vit(), small_vit()
    guard = protect(model, [])
    model.cls_token.grad = torch.ones_like(model.cls_token)
    before = copy.deepcopy(model.state_dict())
    update = guard.update(
        IMAGES, LABELS, learning_rate=0.01, local_steps=steps, optimizer=optimizer
    )
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(model.cls_token.grad, torch.ones_like(model.cls_token))
    assert model.pos_embed.grad is None
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    loop = kind(twin.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(steps):
        loop.zero_grad()
        F.cross_entropy(twin(IMAGES), LABELS).backward()
        loop.step()
    for name, parameter in twin.named_parameters():
        assert torch.allclose(update.read(name), parameter - before[name], atol=1e-6), name
    assert (update.kind, update.local_steps, update.learning_rate, update.optimizer) == (
        "difference", steps, 0.01, optimizer
    )  # fmt: skip


def test_parameters_that_are_not_trained_are_not_in_the_update(small_vit):
    model = small_vit()
    model.patch_embed.requires_grad_(False)
    update = protect(model, []).update(IMAGES, LABELS)
    assert not any(n.startswith("patch_embed") for n in update.tensors)


def test_places_act_in_their_order_whatever_the_list(small_vit):
    log = []
    guard = protect(small_vit(), [Record(log), Ones(log), Halve(log), WithheldPositions()])
    assert [d.name for d in guard.defenses] == ["withheld", "halve", "ones", "record"]
    update = guard.update(IMAGES, LABELS)
    assert log == ["batch", ("step", 0.5), "update"]
    assert update.read("cls_token").eq(1).all() and not update.can_read("pos_embed")


def test_what_a_defense_adds_lives_under_vitguard_and_is_trained(small_vit):
    model = small_vit()
    original = small_vit(seed=3).state_dict()
    guard = protect(model, [Adds()])
    assert "vitguard.adds.unknown" in model.state_dict()
    assert set(guard.extras()) == {"vitguard.adds.unknown"}
    assert "vitguard.adds.unknown" not in guard.export()
    model.load_state_dict(original, strict=True)  # a checkpoint without it
    assert model.vitguard.adds.unknown.eq(2).all()
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict({**original, "vitguard.adds.other": torch.zeros(1)})
    assert guard.auxiliary_loss().item() == 12
    update = guard.update(IMAGES, LABELS)
    assert update.read("vitguard.adds.unknown").eq(4).all()
    assert update.sealed == {"cls_token": "it stays here"}
    own = [p for n, p in model.named_parameters() if not n.startswith("vitguard.")]
    optimizer = torch.optim.SGD(own, lr=0.1)
    assert guard.prepare(optimizer) is optimizer
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.vitguard.adds.unknown) in trained
    guard.prepare(optimizer)  # a second time adds nothing
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trained)


def test_an_error_while_installing_leaves_nothing_behind(small_vit):
    model = small_vit()
    with pytest.raises(RuntimeError, match="on purpose"):
        protect(model, [FixedPositions(), Fails()])
    assert not hasattr(model, "vitguard") and isinstance(model.pos_embed, torch.nn.Parameter)
    protect(model, [FixedPositions()])


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ([GradientNoise(), GradientNoise(0.5)], Incompatible),
        (["positions"], InputError),
        ("position", InputError),
        ([FixedPositions], InputError),
        (FixedPositions, InputError),
        ([[FixedPositions()]], InputError),
        ([type("Nowhere", (Defense,), {"name": "nowhere"})()], InputError),
        (None, InputError),
        ([Ones([]), type("Twos", (Ones,), {"name": "twos"})([])], Incompatible),
    ],
)
def test_stacks_that_cannot_work_are_refused_and_the_model_is_unchanged(small_vit, wrong, error):
    model = small_vit()
    with pytest.raises(error):
        protect(model, wrong)
    assert not hasattr(model, "vitguard")


@pytest.mark.parametrize(
    "stack", ["positions", FixedPositions(), (FixedPositions(),), iter([FixedPositions()])]
)
def test_a_stack_is_several_defenses_a_single_one_or_a_spec(small_vit, stack):
    assert protect(small_vit(), stack).defenses == (FixedPositions(),)


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")]
)
def test_wrapped_models_are_refused(small_vit, wrap):
    with pytest.raises(InputError, match="bare model"):
        protect(wrap(small_vit()), [])


def test_strangers_and_second_protections_are_refused(small_vit):
    with pytest.raises(InputError, match=r"nn\.Module"):
        protect("vit", [])
    with pytest.raises(UnsupportedModel):
        protect(torch.nn.Linear(1, 1), [])
    model = small_vit()
    protect(model, [])
    with pytest.raises(InputError, match="not protected yet"):
        protect(model, [])


def test_nothing_leaves_through_a_guard_after_remove(small_vit):
    model = small_vit()
    guard = protect(model, [FixedPositions()])
    guard.remove()
    guard.remove()  # twice is once
    for leave in (
        lambda: guard.update(IMAGES, LABELS),
        lambda: guard.seal(Update({"cls_token": torch.zeros(1, 1, 96)})),
    ):
        with pytest.raises(Unprotected, match="after remove"):
            leave()


def test_a_sealed_update_has_the_base_models_names_or_is_refused(small_vit):
    guard = protect(small_vit(), [WithheldPositions()])
    wrapped = {
        "module._orig_mod.cls_token": torch.ones(1, 1, 96),
        "module.pos_embed": torch.ones_like(guard.model.pos_embed),
    }
    sealed = guard.seal(Update(wrapped))
    assert set(sealed.tensors) == {"cls_token"} and "pos_embed" in sealed.sealed
    with pytest.raises(InputError, match=r"model\.pos_embed"):
        guard.seal(Update({"model.pos_embed": torch.ones(1)}))


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_a_sealed_update_has_dense_tensors_with_values_or_is_refused(small_vit, kind):
    guard = protect(small_vit(depth=1).train(), "positions")
    bias = torch.zeros(10, device="meta") if kind == "meta" else torch.zeros(10).to_sparse()
    with pytest.raises(InputError, match=r"head\.bias"):
        guard.seal(Update({"head.bias": bias}))


def test_sealed_tensors_carry_no_graph(small_vit):
    guard = protect(small_vit(), [])
    tensor = torch.ones(1, 1, 96, requires_grad=True) * 2
    assert not guard.seal(Update({"cls_token": tensor})).read("cls_token").requires_grad


@pytest.mark.parametrize("defense", [Ones, Halve])
def test_a_finished_update_that_a_defense_never_touched_is_refused(small_vit, defense):
    guard = protect(small_vit(), [defense([])])
    with pytest.raises(Unprotected):
        guard.seal(Update({"cls_token": torch.ones(1, 1, 96)}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"local_steps": 2},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": 0.1, "optimizer": "lion"},
        {"learning_rate": 0.1, "local_steps": 0},
    ],
)
def test_impossible_local_training_is_refused_and_changes_nothing(small_vit, wrong):
    model = small_vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError):
        protect(model, []).update(IMAGES, LABELS, **wrong)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (torch.zeros(2, 3, 32, 32), LABELS, "images of 16 x 16 pixels, got 32 x 32"),
        (torch.zeros(2, 3, 16, 8), LABELS, "images of 16 x 16 pixels, got 16 x 8"),
        (torch.zeros(2, 1, 16, 16), LABELS, r"\(batch, 3, height, width\)"),
        (IMAGES.numpy(), LABELS, "as tensors, got ndarray and Tensor"),
        (IMAGES, LABELS.tolist(), "as tensors, got Tensor and list"),
        (IMAGES, LABELS[:-1], "one label"),
        (IMAGES, LABELS + 10, "labels from 0 to 9"),
        (
            IMAGES,
            LABELS.float(),
            r"indices of type torch.int64 .*got torch.float32 of shape \(2,\)",
        ),
        (IMAGES, LABELS.int(), r"indices of type torch.int64 .*got torch.int32"),
        (IMAGES, LABELS[:, None], r"shape \(batch,\).*got torch.int64 of shape \(2, 1\)"),
    ],
)
@pytest.mark.parametrize("how", [{}, {"learning_rate": 0.1}])
def test_a_batch_that_does_not_fit_the_model_is_refused(small_vit, images, labels, said, how):
    with pytest.raises(InputError, match=said):
        protect(small_vit(), [FixedPositions("frozen")]).update(images, labels, **how)


def test_images_of_another_size_reach_a_model_that_takes_them(small_vit):
    guard = protect(small_vit(dynamic_img_size=True), [FixedPositions("frozen")])
    assert guard.update(torch.zeros(2, 3, 32, 32), LABELS).can_read("cls_token")


def test_an_error_inside_the_loss_leaves_the_weights_as_they_were(small_vit):
    model = small_vit()
    guard = protect(model, [])
    before, calls = copy.deepcopy(model.state_dict()), []

    def loss(logits, labels):
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError
        return F.cross_entropy(logits, labels)

    with pytest.raises(ArithmeticError):
        guard.update(IMAGES, LABELS, loss=loss, learning_rate=0.1, local_steps=3)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_public_model_is_clean_and_its_own(small_vit):
    model = small_vit()
    guard = protect(model, [FixedPositions("random"), GradientNoise()])
    public = guard.public_model()
    assert not hasattr(public, "vitguard") and not public._forward_pre_hooks
    assert torch.equal(public.pos_embed, model.pos_embed)
    assert isinstance(public.pos_embed, torch.nn.Parameter)
    with torch.no_grad():
        public.cls_token.add_(1)
    assert not torch.equal(public.cls_token, model.cls_token)
    assert hasattr(model, "vitguard") and "pos_embed" not in dict(model.named_parameters())


def test_guard_of_finds_protected_models_only(small_vit):
    model = small_vit()
    with pytest.raises(InputError, match="was protected"):
        Guard.of(model)
    protect(model, [FixedPositions("frozen")])
    assert Guard.of(copy.deepcopy(model)).defenses == (FixedPositions("frozen"),)


def test_draws_repeat_from_a_saved_state_and_from_nothing_else(small_vit):
    def guard(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return protect(small_vit(), [GradientNoise(1.0)], generator=generator)

    def draw(guard):
        return guard.update(IMAGES, LABELS).read("cls_token")

    assert torch.equal(draw(guard(1)), draw(guard(1)))
    assert not torch.equal(draw(guard()), draw(guard()))
    first, second = guard(1), guard(2)
    state = first.state_dict()
    expected = draw(first)
    second.load_state_dict(state)
    assert torch.equal(draw(second), expected)
    with pytest.raises(InputError):
        second.load_state_dict({"draws": None})


def test_secret_draws_have_no_state_that_a_checkpoint_could_bring_back(small_vit):
    guard = protect(small_vit(), [GradientNoise(1.0)])
    seeded = protect(small_vit(), [GradientNoise(1.0)], generator=torch.Generator().manual_seed(1))
    state, other = guard.state_dict(), seeded.state_dict()
    assert "draws" not in state
    for loaded in (state, other):
        draws = []
        for _ in range(2):
            guard.load_state_dict(loaded)
            draws.append(guard.update(IMAGES, LABELS).read("cls_token"))
        assert not torch.equal(*draws)


@pytest.mark.parametrize(
    "spoiled",
    [
        {"draws": torch.zeros(3, dtype=torch.uint8)},
        {"ledger": {"client-privacy": None}},  # after one that is sound
    ],
)
def test_a_state_that_is_refused_changes_nothing(small_vit, spoiled):
    stack = [DifferentialPrivacy(noise=1.0), ClientPrivacy(noise=1.0)]
    guard, other = (
        protect(small_vit(depth=1), stack, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    other._ledgers["privacy"].record(1.0, 1.0)
    state = other.state_dict()
    state["ledger"] = {**state["ledger"], **spoiled.get("ledger", {})}
    before = guard._draws.seeded.get_state()
    with pytest.raises(InputError):
        guard.load_state_dict({**state, **{k: v for k, v in spoiled.items() if k == "draws"}})
    assert all(ledger.steps == 0 for ledger in guard._ledgers.values())
    assert torch.equal(guard._draws.seeded.get_state(), before)


def test_secrets_are_in_no_repr_pickle_or_state_dict(small_vit):
    import io

    model = small_vit()
    generator = torch.Generator().manual_seed(20261121)
    guard = protect(model, [GradientNoise(1.0)], generator=generator)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = Guard.of(torch.load(file, weights_only=False))
    assert "draws" not in again.state_dict()  # a fresh source, whatever the first one was
    assert "20261121" not in repr(guard) + repr(model) + str(model.state_dict())


def test_privacy_spent_without_privacy_says_what_is_missing(small_vit):
    with pytest.raises(InputError, match="DifferentialPrivacy"):
        protect(small_vit(), []).privacy_spent()


@pytest.mark.parametrize("stack", ["positions:kind=frozen", "privacy:noise=1"])
def test_checkpoints_that_enter_autograd_again_are_refused_in_words(small_vit, photo, stack):
    model = small_vit().train()
    block = model.blocks[0]
    plain = block.forward
    block.forward = lambda x: checkpoint(plain, x, use_reentrant=True)
    guard = protect(model, stack)
    with pytest.raises(Incompatible, match="use_reentrant=False"):
        guard.update(photo, torch.tensor([1]))


def test_a_difference_leaves_batch_norms_as_they_were(small_vit):
    model = small_vit()
    model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(96), torch.nn.Linear(96, 10))
    guard = protect(model, "shuffle:ratio=0.5,warmup=9,steps=10,schedule=linear")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    guard.update(torch.rand(2, 3, 16, 16), torch.tensor([1, 2]), learning_rate=0.1, local_steps=2)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"vitguard.shuffle.step"}
