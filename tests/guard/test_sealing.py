"""What `seal` takes: a difference of protected steps, whatever was evaluated in between."""

import copy
import pickle
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.fast import crossed
from vitguard.defenses.base import UpdateDefense
from vitguard.errors import InputError, Unprotected

pytest.importorskip("opacus")
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.001,accountant=rdp"
STACKS = {
    "shuffle": "shuffle:ratio=0.5",
    "shuffle and positions": "positions:kind=sincos+shuffle:ratio=0.5,dal=tokens",
    "privacy": PRIVATE,
    "privacy and positions": f"positions:kind=sincos+{PRIVATE}",
    "privacy and shuffle": f"shuffle:ratio=0.5+{PRIVATE}",
    "privacy by Opacus": f"{PRIVATE},engine=opacus",
}
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(24) % 10
PRIVATE_STACKS = [name for name in STACKS if "privacy" in name]


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10, embed_dim=32,
        num_heads=2,
    )  # fmt: skip


def protected(stack):
    model = vit()
    guard = vg.protect(model, STACKS[stack])
    return model, guard, {n: p.detach().clone() for n, p in model.named_parameters()}


def prepare(guard):
    data = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=6)
    optimizer = torch.optim.SGD(guard.model.parameters(), lr=0.1)
    optimizer, loader = guard.prepare(optimizer, data)
    return optimizer, loader or data


def train(guard, optimizer, loader, steps=2):
    guard.model.train()
    for _, (images, labels) in zip(range(steps), loader, strict=False):
        loss = F.cross_entropy(guard.model(images), labels) + guard.auxiliary_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def difference(model, before):
    tensors = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    return vg.Update(tensors, kind="difference", batch_size=6, learning_rate=0.1)


def features(model):
    return model.forward_head(model.forward_features(IMAGES[:4]))


EVALUATIONS = {
    "eval mode is left on": lambda m: m.eval(),
    "accuracy": lambda m: torch.no_grad()(lambda: m.eval()(IMAGES))(),
    "inference mode": lambda m: torch.inference_mode()(lambda: m.eval()(IMAGES))(),
    "features": lambda m: torch.no_grad()(lambda: m.eval().forward_features(IMAGES))(),
    "a graph without a gradient": lambda m: m.eval()(IMAGES),
    "features and back to training": lambda m: [
        torch.no_grad()(lambda: m.eval().forward_features(IMAGES))(), m.train(),
    ],
    "the gradient of an input": lambda m: torch.autograd.grad(
        torch.no_grad()(m.eval)()(x := IMAGES[:2].clone().requires_grad_()).sum(), x
    ),
}  # fmt: skip


@pytest.mark.parametrize(("stack", "evaluate"), crossed(STACKS, EVALUATIONS, rounds=2))
def test_an_evaluation_without_a_gradient_of_the_weights_does_not_keep_training_from_seal(
    stack, evaluate
):
    if evaluate == "the gradient of an input" and "shuffle" in stack:
        pytest.skip("the shuffle cannot tell it from a gradient of the weights")
    model, guard, before = protected(stack)
    if "input" not in evaluate:
        EVALUATIONS[evaluate](model)  # also before prepare
    optimizer, loader = prepare(guard)
    train(guard, optimizer, loader)
    EVALUATIONS[evaluate](model)
    assert guard.seal(difference(model, before)).can_read("head.weight")


PLAIN = {
    "the head alone": lambda m: m.head(torch.randn(4, 32)),
    "features in training mode": lambda m: features(m),
    "features in eval mode": lambda m: features(m.eval()),
    "the model in eval mode": lambda m: m.eval()(IMAGES[:4]),
    "a part of the model": lambda m: m.head(m.norm(m.blocks(m.pos_drop(
        torch.cat([m.cls_token.expand(4, -1, -1), m.patch_embed(IMAGES[:4])], 1)
    ))[:, 0])),
    "a decay of the weights": lambda m: sum(p.square().sum() for p in m.parameters())[None, None],
}  # fmt: skip


WHEN = ["before prepare", "before the private steps", "after them"]


def plain_gradient(model, plain):
    outputs = PLAIN[plain](model)
    if outputs.shape[1] == 1:
        return outputs.sum().backward()
    F.cross_entropy(outputs, LABELS[: len(outputs)] % outputs.shape[1]).backward()


def move(model):
    """A step of nobody's: an optimizer is told off before it moves anything."""
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
                p.grad = None


@pytest.mark.parametrize(
    ("stack", "plain", "when"),
    crossed(PRIVATE_STACKS, [p for p in PLAIN if p != "a part of the model"], WHEN, rounds=2),
)
def test_an_optimizer_that_is_not_the_private_one_moves_nothing_on_a_plain_gradient(
    stack, plain, when
):
    model, guard, _ = protected(stack)
    if when != "before prepare":
        optimizer, loader = prepare(guard)
    if when == "after them":
        train(guard, optimizer, loader)
    before = copy.deepcopy(model.state_dict())
    plain_gradient(model, plain)
    for held in (model.parameters(), model.head.parameters()):
        said = r"neither (clipped nor noised|noised nor counted)|features that were not"
        with pytest.raises(Unprotected, match=said):
            torch.optim.SGD(held, lr=0.1).step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    model.load_state_dict(before)
    model.zero_grad()
    torch.optim.SGD(model.head.parameters(), lr=0.1).step()  # of no gradient
    if when == "before prepare":
        optimizer, loader = prepare(guard)
    train(guard, optimizer, loader)
    assert not all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(("stack", "plain", "when"), crossed(PRIVATE_STACKS, PLAIN, WHEN, rounds=2))
def test_a_plain_step_beside_the_private_ones_keeps_the_difference_from_seal(stack, plain, when):
    if "shuffle" in stack and plain == "a part of the model":
        pytest.skip("the shuffle refuses a part of the model itself")
    model, guard, before = protected(stack)

    def step():
        plain_gradient(model, plain)
        move(model)

    if when == "before prepare":
        step()
    optimizer, loader = prepare(guard)
    if when == "before the private steps":
        step()
    train(guard, optimizer, loader)
    if when == "after them":
        step()
    with pytest.raises(Unprotected, match=r"got a plain one|got one that was taken in eval mode"):
        guard.seal(difference(model, before))
    model.load_state_dict(before, strict=False)
    train(guard, optimizer, loader)
    guard.seal(difference(model, before))


def adapters(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"]))


TRAINED = {
    "the head": lambda m: m.requires_grad_(False).head.requires_grad_(True),
    "the last block": lambda m: m.requires_grad_(False).blocks[-1].mlp.requires_grad_(True),
    "adapters": adapters,
}  # fmt: skip
IDLE = {
    "eval mode": lambda m: m.eval(),
    "all parts but the head in eval mode": lambda m: [
        part.eval() for name, part in m.train().named_children() if name != "head"
    ],
}  # fmt: skip


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("idle", IDLE)
def test_a_part_that_was_trained_on_images_as_they_are_is_not_sealed(trained, idle):
    model, guard, _ = protected("shuffle")
    TRAINED[trained](model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    update = vg.Update({n: torch.zeros_like(model.get_parameter(n)) for n in names})
    IDLE[idle](model)
    with torch.no_grad():
        model(IMAGES[:4])
    model(IMAGES[:4])  # a look without a gradient does no harm
    model.train()(IMAGES[:4]).sum().backward()
    guard.seal(update)
    IDLE[idle](model)
    outputs = features(model) if trained == "the last block" else model(IMAGES[:4])
    outputs.sum().backward()
    model.train()
    with pytest.raises(Unprotected, match="taken in eval mode"):
        guard.seal(update)


@pytest.mark.parametrize("stack", PRIVATE_STACKS)
def test_an_update_while_the_ledger_counts_no_step_is_refused(stack):
    model, guard, before = protected(stack)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01  # such as by a fused kernel, or from another process
    prepare(guard)
    with pytest.raises(Unprotected, match=r"the ledger of privacy counts none.*load_state_dict"):
        guard.seal(difference(model, before))


@pytest.mark.parametrize("stack", PRIVATE_STACKS)
def test_a_restarted_client_seals_once_its_guard_has_its_ledger_back(stack):
    model, guard, before = protected(stack)
    optimizer, loader = prepare(guard)
    train(guard, optimizer, loader)
    weights, ledger = copy.deepcopy(model.state_dict()), guard.state_dict()
    model, guard, _ = protected(stack)
    prepare(guard)
    model.load_state_dict(weights)
    with pytest.raises(Unprotected, match="counts none"):
        guard.seal(difference(model, before))
    guard.load_state_dict(ledger)
    assert guard.seal(difference(model, before)).can_read("head.weight")


@pytest.mark.parametrize("stack", PRIVATE_STACKS)
def test_a_difference_of_nothing_is_sealed_without_a_step(stack):
    model, guard, before = protected(stack)
    prepare(guard)
    sealed = guard.seal(difference(model, before))
    assert not any(t.any() for t in sealed.tensors.values())


def test_a_state_without_the_ledger_of_the_stack_is_refused_and_changes_nothing():
    _, guard, _ = protected("privacy")
    train(guard, *prepare(guard))
    spent = guard.privacy_spent()
    other = vg.protect(vit(), "noise")
    for state in (other.state_dict(), {"ledger": None}, {"ledger": {}}):
        with pytest.raises(InputError, match="the ledger of privacy"):
            guard.load_state_dict(state)
    with pytest.raises(InputError, match="the ledger of privacy"):
        guard.load_state_bytes(other.state_bytes())
    guard.load_state_dict(guard.state_dict())
    assert guard.privacy_spent() == spent


@pytest.mark.parametrize("stack", ["privacy", "shuffle"])
def test_a_load_of_a_part_does_not_clear_a_plain_gradient_and_one_of_all_that_is_sent_does(stack):
    model, guard, before = protected(stack)
    guard.will_seal()
    if stack == "privacy":
        train(guard, *prepare(guard))
    F.cross_entropy(model.eval()(IMAGES[:4]), LABELS[:4]).backward()
    model.train()
    part = {"head.bias": before["head.bias"]}
    for load in (
        lambda: model.load_state_dict(part, strict=False),
        lambda: model.load_state_dict({}, strict=False),
        lambda: model.head.load_state_dict(model.head.state_dict()),
        lambda: model.vitguard.load_state_dict(model.vitguard.state_dict()),
    ):
        load()
        with pytest.raises(Unprotected):
            guard.seal(difference(model, before))
    with pytest.raises(RuntimeError):
        model.load_state_dict({**before, "head.bias": torch.zeros(3)}, strict=False)
    with pytest.raises(Unprotected):
        guard.seal(difference(model, before))
    sent = {n: t for n, t in before.items() if not n.startswith("vitguard.")}
    model.load_state_dict(sent, strict=False)
    if stack == "privacy":
        train(guard, *prepare(guard))
    guard.seal(difference(model, before))


def test_weights_without_what_stays_local_or_frozen_are_all():
    model = vit().train()
    model.head.requires_grad_(False)
    guard = vg.protect(model, "withheld+shuffle:ratio=0.5")
    guard.will_seal()
    F.cross_entropy(model.eval()(IMAGES[:4]), LABELS[:4]).backward()
    sent = {n: model.state_dict()[n] for n in guard.shared_names() if "head" not in n}
    model.train().load_state_dict(sent, strict=False)
    moved = {n: torch.zeros_like(t) for n, t in sent.items()}
    guard.seal(vg.Update(moved, kind="difference", batch_size=4, learning_rate=0.1))


@pytest.mark.parametrize("kind", ["_forward_hooks", "_forward_pre_hooks"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_shuffle_whose_hooks_something_cleared_lets_nothing_leave(kind, copied):
    model, _, before = protected("shuffle")
    guard = vg.Guard.of(model := copied(model).train())
    guard.will_seal()
    guard.update(IMAGES[:4], LABELS[:4])
    for module in model.modules():
        getattr(module, kind).clear()
    with pytest.raises(Unprotected, match="hooks on the model"):
        guard.update(IMAGES[:4], LABELS[:4])
    with pytest.raises(Unprotected, match="hooks on the model"):
        guard.seal(difference(model, before))


def test_blocks_of_threads_that_overlap_leave_nothing_open():
    model, guard, _ = protected("privacy")
    for block in (guard.rehearsing, guard.ungated):
        first, second = block(), block()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # as two threads do, of which the first ends first
        second.__exit__(None, None, None)
    with pytest.raises(Unprotected, match="Expected training through"):
        model(IMAGES[:4])
    with pytest.raises(Unprotected, match="training under prepare"):
        guard.seal(vg.Update({}, kind="difference", batch_size=4, learning_rate=0.1))
    assert not guard._protection.ungating


def test_a_prepare_inside_a_rehearsal_stays():
    _, guard, _ = protected("privacy")
    with guard.rehearsing():
        optimizer, loader = prepare(guard)
    train(guard, optimizer, loader)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_plain_step_of_a_copy_before_its_own_prepare_keeps_the_difference_from_seal(
    copied, prepared
):
    model, guard, _ = protected("privacy")
    if prepared:
        train(guard, *prepare(guard))
    twin = COPIES[copied](model)
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    F.cross_entropy(twin.eval()(IMAGES[:4]), LABELS[:4]).backward()
    with pytest.raises(Unprotected, match="neither clipped nor noised"):
        torch.optim.SGD(twin.parameters(), lr=0.1).step()
    move(twin)
    guard = vg.Guard.of(twin.train())
    train(guard, *prepare(guard))
    with pytest.raises(Unprotected, match="got a plain one"):
        guard.seal(difference(twin, before))
    twin.load_state_dict(before, strict=False)
    train(guard, *prepare(guard))
    guard.seal(difference(twin, before))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: m])
def test_after_remove_no_gradient_is_watched(copied):
    model, _guard, _ = protected("privacy")
    model = copied(model)
    vg.Guard.of(model).remove()
    F.cross_entropy(model(IMAGES[:4]), LABELS[:4]).backward()
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    vg.protect(model, STACKS["privacy"])


class Hides(UpdateDefense):
    """Hides what it is told, as an encryption of a part does."""

    name: ClassVar[str] = "hides"

    def __init__(self, *names):
        self.names = names

    def seal(self, update, anatomy, draws):
        return update.seal(dict.fromkeys(self.names, "hidden"))


def difference_of(model, before):
    after = model.state_dict()
    tensors = {n: after[n] - t for n, t in before.items() if n in after}
    return vg.Update(tensors, kind="difference", batch_size=6, learning_rate=0.1)


@pytest.mark.parametrize("stack", ["withheld", "frozen-stem:trained=0"])
def test_a_second_name_of_what_is_held_does_not_leave(stack):
    model = vit().train()
    model.also = torch.nn.ParameterList([model.pos_embed])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    guard = vg.protect(model, stack)
    guard.will_seal()
    optimizer = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    F.cross_entropy(model(IMAGES[:6]), LABELS[:6]).backward()
    optimizer.step()
    update = guard.seal(difference_of(model, before))
    assert not update.can_read("pos_embed") and not update.can_read("also.0")
    assert update.can_read("head.weight")
    assert "also.0" not in guard.shared_names() and "head.weight" in guard.shared_names()


def test_a_second_name_of_what_a_defense_seals_is_refused():
    model = vit().train()
    model.also = model.blocks[0]
    weights = {n: torch.ones_like(t) for n, t in model.state_dict().items()}
    update = vg.Update(weights, kind="difference", batch_size=6, learning_rate=0.1)
    one, both = "blocks.0.mlp.fc1.weight", "also.mlp.fc1.weight"
    guard = vg.protect(model, [Hides(one, both)])
    assert guard.seal(update).sealed.keys() == {one, both}
    guard.remove()
    with pytest.raises(Unprotected, match="to be sealed with blocks"):
        vg.protect(model, [Hides(one)]).seal(update)


def test_a_second_name_of_what_is_frozen_is_as_frozen():
    model = vit().train()
    model.also = model.blocks[0].requires_grad_(False)
    weights = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
    update = vg.Update(weights, kind="difference", batch_size=6, learning_rate=0.1)
    update = vg.protect(model, "client-privacy:noise=1").seal(update)
    assert {n.partition(".")[0] for n in update.sealed} == {"also", "blocks"}
    assert update.can_read("head.weight")


@pytest.mark.parametrize("stack", [s for s in STACKS if "shuffle" in s and "privacy" not in s])
@pytest.mark.parametrize("idle", IDLE)
def test_an_optimizer_moves_nothing_on_a_gradient_of_images_as_they_are(stack, idle):
    model, guard, _ = protected(stack)
    optimizer, _ = prepare(guard)
    before = copy.deepcopy(model.state_dict())

    def step():
        (F.cross_entropy(model(IMAGES[:4]), LABELS[:4]) + guard.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()

    IDLE[idle](model)
    with pytest.raises(Unprotected, match=r"got an optimizer's step after a pass in eval mode"):
        step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    optimizer.zero_grad()
    images = IMAGES[:2].clone().requires_grad_()
    torch.autograd.grad(model.eval()(images).sum(), images)  # an attack, in the middle of training
    model.train()
    step()
    assert not torch.equal(model.head.weight, before["head.weight"])
    guard.release()  # nobody sees what it trains
    IDLE[idle](model)
    step()


@pytest.mark.parametrize("stack", ["shuffle", "privacy"])
def test_a_closure_in_eval_mode_is_told_at_its_first_step(stack):
    model, _, _ = protected(stack)
    optimizer = torch.optim.SGD(model.eval().parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IMAGES[:4]), LABELS[:4])
        loss.backward()
        return loss

    with pytest.raises(Unprotected, match=r"after a (pass in eval mode|plain gradient)"):
        optimizer.step(closure)


@pytest.mark.parametrize("copied", COPIES)
def test_an_optimizer_of_a_copy_moves_nothing_either_on_images_as_they_are(copied):
    model, _, _ = protected("shuffle")
    twin = COPIES[copied](model).eval()
    F.cross_entropy(twin(IMAGES[:4]), LABELS[:4]).backward()
    with pytest.raises(Unprotected, match="after a pass in eval mode"):
        torch.optim.SGD(twin.parameters(), lr=0.1).step()


@pytest.mark.parametrize("stack", STACKS)
def test_what_a_released_guard_has_trained_is_not_sealed(stack):
    model, guard, before = protected(stack)
    optimizer, loader = prepare(guard)
    train(guard, optimizer, loader)
    state = guard.state_dict()
    model, guard, before = protected(stack)
    guard.load_state_dict(state)
    guard.release()
    model.eval()(IMAGES[:4]).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(Unprotected, match=r"guard\.release"):
        guard.seal(difference(model, before))
