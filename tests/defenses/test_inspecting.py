"""A client under InspectWeights refuses rounds with crafted weights, and no honest one."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import vitguard as vg
from tests.inspection.crafts import PUBLISHED, imprint
from tests.inspection.test_look import batch, make
from vitguard.errors import Incompatible, InputError, SuspiciousWeights, Unprotected
from vitguard.guard import Guard
from vitguard.inspection.recorder import Recorder
from vitguard.vit import Anatomy


def guarded(*more, **settings):
    return vg.protect(make().train(), [vg.InspectWeights(**settings), *more])


def step(guard, images, labels):
    """One step of a loop of one's own; returns the difference."""
    model = guard.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    after = dict(model.named_parameters())
    return vg.Update({n: after[n].detach() - t for n, t in before.items()}, kind="difference")


@pytest.mark.parametrize("craft", PUBLISHED)
def test_suspicious_weights_train_no_step_and_no_update_leaves(craft):
    guard = guarded()
    guard.model.load_state_dict(PUBLISHED[craft](make()), strict=False)
    passes = []
    guard.model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(SuspiciousWeights, match=r"signs of a craft.*Nothing was computed") as seen:
        guard.update(*batch())
    assert seen.value.inspection.suspicious
    with pytest.raises(SuspiciousWeights):
        guard.model(batch()[0])
    with pytest.raises(Unprotected):
        guard.seal(vg.Update({"head.bias": torch.zeros(10)}, kind="difference"))
    assert not passes


def test_weights_are_inspected_again_after_they_arrive_and_after_each_update():
    guard = guarded()
    guard.update(*batch())
    with torch.no_grad():  # without load_state_dict
        for name, tensor in imprint(make()).items():
            guard.model.state_dict()[name].copy_(tensor)
    with pytest.raises(SuspiciousWeights):
        guard.update(*batch())
    guard.model.load_state_dict(make().state_dict(), strict=False)
    guard.update(*batch())
    guard.model.load_state_dict(imprint(make()), strict=False)
    with pytest.raises(SuspiciousWeights):
        guard.model(batch()[0])


def copied(model, weights):
    for name, tensor in weights.items():
        model.state_dict()[name].copy_(tensor)


def replaced(model, weights):
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name].clone()


def in_parts(model, weights):
    inner = {n.removeprefix("blocks."): t for n, t in weights.items() if n.startswith("blocks.")}
    model.blocks.load_state_dict(inner, strict=False)


@pytest.mark.parametrize("write", [copied, replaced, in_parts])
@pytest.mark.parametrize("send", ["update", "loop"])
def test_weights_written_over_in_the_middle_of_a_round_are_inspected(write, send):
    """After an honest pass nothing but an optimizer may move the weights unseen."""
    guard = guarded()
    images, labels = batch()
    F.cross_entropy(guard.model(images), labels).backward()
    with torch.no_grad():
        write(guard.model, imprint(make()))
    with pytest.raises(SuspiciousWeights):
        guard.update(images, labels) if send == "update" else step(guard, images, labels)


@pytest.mark.parametrize("loop", [False, True])
def test_no_update_leaves_whose_gradient_is_suspicious(loop, monkeypatch):
    """Weights that look honest by themselves: the gradient of the first pass is judged."""
    monkeypatch.setattr("vitguard.inspection.look.structure_signs", lambda *_: [])
    guard = guarded()
    guard.model.load_state_dict(imprint(make()), strict=False)
    guard.will_seal()
    with pytest.raises(SuspiciousWeights, match="Nothing has left") as seen:
        if loop:
            guard.seal(step(guard, *batch()))
        else:
            guard.update(*batch())
    assert "lone token in pairs" in str(seen.value)
    assert not any(character.isdigit() for character in str(seen.value))  # they tell of the images


def test_what_was_not_inspected_does_not_leave():
    guard = guarded()
    guard.will_seal()
    made = vg.Update({"head.bias": torch.zeros(10)}, kind="difference")
    with pytest.raises(Unprotected, match="inspected"):
        guard.seal(made)
    guard.verify()  # the weights alone
    with pytest.raises(Unprotected, match="whose gradient was inspected"):
        guard.seal(made)
    guard.model.eval()
    update = step(guard, *batch())  # a gradient that was taken in eval mode is read as well
    guard.model.train()
    guard.seal(update)


def test_weights_that_cannot_be_inspected_are_refused_with_a_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such projection")

    monkeypatch.setattr("vitguard.inspection.look.structure_signs", broken)
    with pytest.raises(Unprotected, match="can be inspected, got RuntimeError: no such projection"):
        guarded().update(*batch())


def test_a_model_without_known_blocks_is_refused():
    model = make()
    from dataclasses import replace

    with pytest.raises(Incompatible, match="blocks"):
        vg.protect(model, [vg.InspectWeights()], anatomy=replace(Anatomy.of(model), blocks=()))


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limits_that_are_not_above_zero_are_refused(limit):
    with pytest.raises(InputError):
        vg.InspectWeights(limit=limit)


def test_the_model_computes_as_without_it_and_evaluation_is_never_refused():
    plain, guard = make(), guarded()
    images, labels = batch()
    plain.train()
    torch.manual_seed(1)
    wanted = plain(images)
    torch.manual_seed(1)
    assert torch.equal(guard.model(images), wanted)
    plain_update = vg.protect(plain, []).update(images, labels)
    update = guard.update(images, labels)
    assert all(torch.equal(t, plain_update.tensors[n]) for n, t in update.tensors.items())
    guard.model.load_state_dict(imprint(make()), strict=False)
    plain = make()
    plain.load_state_dict(imprint(make()))
    for grad in (torch.no_grad(), torch.enable_grad()):
        with grad:
            assert torch.equal(guard.model.eval()(images), plain.eval()(images))
    with torch.no_grad():
        assert torch.equal(guard.model.train()(images), plain.train()(images))


def test_a_loop_of_ones_own_is_inspected_and_its_update_leaves():
    guard = guarded()
    guard.will_seal()
    for _ in range(3):
        for _ in range(2):
            update = step(guard, *batch())
        assert guard.seal(update).tensors
    assert guard.state_dict()["inspection"]["rounds"] == 3


@pytest.mark.parametrize(
    "other",
    [
        vg.PatchShuffle(ratio=0.5),
        vg.FixedPositions("sincos"),
        vg.DifferentialPrivacy(),
        vg.GradientNoise(),
    ],
    ids=lambda d: d.name,
)
def test_it_acts_beside_other_defenses(other):
    guard = guarded(other)
    guard.update(*batch())
    guard.model.load_state_dict(imprint(make()), strict=False)
    with pytest.raises(SuspiciousWeights):
        guard.update(*batch())


def test_copies_and_pickles_inspect_too():
    guard = guarded()
    for model in (copy.deepcopy(guard.model), pickle.loads(pickle.dumps(guard.model))):
        twin = Guard.of(model)
        twin.update(*batch())
        model.load_state_dict(imprint(make()), strict=False)
        with pytest.raises(SuspiciousWeights):
            twin.update(*batch())
    guard.update(*batch())  # the original's recorder is its own


def test_gradient_checkpointing_is_inspected():
    model = make().train()
    model.set_grad_checkpointing(True)
    guard = vg.protect(model, [vg.InspectWeights()])
    try:
        guard.update(*batch())
    except Incompatible as error:
        assert "use_reentrant" in str(error)
        pytest.skip("checkpoints of this timm enter autograd again")


def test_removed_it_leaves_no_hooks():
    guard = guarded()
    guard.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in guard.model.modules())


def test_the_shares_of_samples_are_those_of_the_book_keeping_engine():
    """D-SNR of the head from the recorder, and from each example's own gradient."""
    from vitguard.defenses.privacy.engine import Engine
    from vitguard.inspection.shares import separation

    model = make().train()
    images, labels = batch(3)
    engine = Engine()
    with engine.watch(model, images) as tape:
        logits = model(images)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    own = tape.collect()["head.weight"].samples().flatten(1).double()
    recorder = Recorder(1)
    handles = recorder.attach(model, Anatomy.of(model))
    recorder.arm()
    F.cross_entropy(model(images), labels).backward()
    assert recorder.numbers["head"]["lone sample"] == pytest.approx(
        separation(own @ own.T), rel=1e-4
    )
    slow = max(float(own[i].norm() / (own.sum(0) - own[i]).norm()) for i in range(len(images)))
    assert separation(own @ own.T) == pytest.approx(slow, rel=1e-6)
    for handle in handles:
        handle.remove()


def test_the_shares_of_tokens_are_those_of_outer_products():
    from vitguard.inspection.rows import fresh_generator
    from vitguard.inspection.shares import token_shares

    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(2, 5, n, generator=generator) for n in (7, 6))
    outputs[1, 2, 3] = 100
    shares = token_shares(inputs, outputs, 1, fresh_generator())
    outer = torch.einsum("bti,bto->btoi", inputs, outputs).norm(dim=3)  # by token and row
    wanted = outer[:, 1:].amax((0, 1)) / outer.sum((0, 1))
    assert torch.allclose(shares.rows, wanted, rtol=1e-4)
    assert shares.rows.argmax() == 3


@pytest.mark.parametrize("size", [1, 4])
def test_a_pass_that_overflowed_is_no_pass_and_the_next_one_is_read(size):
    """Under a scaler of 16-bit training the first gradient of a round is often infinite."""
    guard = guarded()
    guard.will_seal()
    images, labels = batch(size)
    before = {n: p.detach().clone() for n, p in guard.model.named_parameters()}
    (F.cross_entropy(guard.model(images), labels) * math.inf).backward()
    guard.model.zero_grad()  # the scaler skips the step
    nothing = vg.Update({n: torch.zeros_like(t) for n, t in before.items()}, kind="difference")
    with pytest.raises(Unprotected, match="none with finite values"):
        guard.seal(nothing)
    assert guard.seal(step(guard, images, labels)).tensors


def test_a_craft_behind_a_pass_that_overflowed_does_not_leave(monkeypatch):
    """The backward pass alone is asked: it shows these bins on any weights."""
    monkeypatch.setattr("vitguard.inspection.look.structure_signs", lambda *_: [])
    guard = guarded()
    guard.model.load_state_dict(imprint(make(), steepness=4.0), strict=False)
    guard.will_seal()
    images, labels = batch(1)
    (F.cross_entropy(guard.model(images), labels) * math.inf).backward()
    guard.model.zero_grad()
    with pytest.raises(SuspiciousWeights):
        guard.seal(step(guard, images, labels))


def test_a_loop_on_a_copy_is_inspected_and_its_update_leaves():
    guard = guarded()
    for model in (copy.deepcopy(guard.model), pickle.loads(pickle.dumps(guard.model))):
        twin = Guard.of(model)
        twin.will_seal()
        for _ in range(2):
            step(twin, *batch())
            assert twin.seal(step(twin, *batch())).tensors


def test_weights_that_arrived_after_an_update_left_do_not_leave_by_a_pass_in_eval_mode():
    guard = guarded()
    guard.will_seal()
    images, labels = batch()
    step(guard, images, labels)
    guard.seal(step(guard, images, labels))
    with torch.no_grad():
        copied(guard.model, imprint(make()))
    guard.model.eval()
    F.cross_entropy(guard.model(images), labels).backward()
    gradients = {n: p.grad for n, p in guard.model.named_parameters()}
    with pytest.raises(Unprotected, match="inspected when they arrived"):
        guard.seal(vg.Update(gradients, batch_size=len(labels)))
