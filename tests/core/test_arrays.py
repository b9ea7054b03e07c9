"""Arrays, whole state dicts and several devices, taken in at the door or refused in one line."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import vitguard as vg
from tests.small import vit
from vitguard.core import tensors_by_name
from vitguard.defenses.encryption import Encryptor, KeySet, Manifest
from vitguard.errors import Blocked, InputError, Unprotected

FACTS = {"kind": "difference", "batch_size": 1, "learning_rate": 0.1}
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def read_only():
    array = VALUES.copy()
    array.flags.writeable = False
    return array


TAKEN = {
    "array": VALUES,
    "double": VALUES.astype(np.float64),
    "half": VALUES.astype(np.float16),
    "other byte order": VALUES.astype(">f4"),
    "reversed view": VALUES[::-1],
    "Fortran order": np.asfortranarray(VALUES),
    "read-only": read_only(),
    "scalar": np.float32(3),
    "no dimension": np.array(3.0),
    "integers": VALUES.astype(np.int64),
    "empty": VALUES[:0],
    "tensor": torch.from_numpy(VALUES),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_arrays_are_taken_in_as_tensors_of_their_values(kind):
    taken = vg.Update({"w": TAKEN[kind]}).read("w")
    assert isinstance(taken, torch.Tensor)
    assert np.array_equal(taken.numpy(), np.asarray(TAKEN[kind]))
    assert str(taken.dtype).removeprefix("torch.") == np.asarray(TAKEN[kind]).dtype.name


def test_an_array_that_changes_later_does_not_change_the_update():
    array = VALUES.copy()
    update = vg.Update({"w": array})
    array[:] = 7
    assert update.read("w").flatten().tolist() == [0, 1, 2, 3, 4, 5]


REFUSED = {
    "a list": ([VALUES], "got list. Pair a list with its names"),
    "nothing": (None, "got NoneType"),
    "lists by name": ({"w": [1.0, 2.0]}, "for w, got list"),
    "text": ({"w": np.array(["a"])}, "torch knows for w"),
    "objects": ({"w": np.array([None])}, "torch knows for w"),
    "long double": ({"w": VALUES.astype(np.longdouble)}, "torch knows for w"),
    "a number for a name": ({1: VALUES}, "names that are text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_tensor_by_name_is_refused_at_the_door(kind):
    given, named = REFUSED[kind]
    with pytest.raises(InputError, match=named):
        vg.Update(given)
    with pytest.raises(InputError, match=named):
        tensors_by_name(given)
    with pytest.raises(InputError, match=named):
        Manifest.of(given, bounds=1.0)


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = vit()
    return model, {n: 0.01 * torch.randn_like(p) for n, p in model.named_parameters()}


@pytest.mark.slow
def test_seal_save_audit_and_encryption_take_arrays(plain, tmp_path):
    model, tensors = plain
    arrays = {n: t.numpy() for n, t in tensors.items()}
    guard = vg.protect(copy.deepcopy(model), "pruning:keep=1")
    sealed = guard.seal(vg.Update(arrays, **FACTS))
    assert torch.equal(sealed.read("cls_token"), tensors["cls_token"])
    vg.Update(arrays, **FACTS).save(tmp_path / "u.safetensors")
    again = vg.Update.load(tmp_path / "u.safetensors")
    assert all(torch.equal(again.read(n), t) for n, t in tensors.items())
    report = vg.audit_update(model, vg.Update(arrays, **FACTS), attacks=["position"])
    assert len(report.findings) == 2
    keys = KeySet.generate()
    manifest = Manifest.of(arrays, bounds=1.0, run="r")
    assert manifest == Manifest.of(tensors, bounds=1.0, run="r")
    made = [
        Encryptor(keys, manifest, client_id="a", rounding="nearest")._integers(t, 1.0)
        for t in (tensors_by_name(arrays), tensors)
    ]
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))
    assert Encryptor(keys, manifest, client_id="a").encrypt(arrays, round_id=1)


WEIGHTS = [torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5), np.array(0.5), 0.5]


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
def test_a_weight_of_one_number_is_taken_however_it_is_held(plain, weight):
    tensors = {"w": torch.ones(2)}
    encryptor = Encryptor(KeySet.generate(), Manifest.of(tensors, bounds=1.0), client_id="a")
    assert encryptor.encrypt(tensors, round_id=1, weight=weight)


def test_a_dictionary_in_place_of_an_update_says_how_to_wrap_it(plain):
    model, tensors = plain
    for do in (
        lambda: vg.protect(copy.deepcopy(model), "noise").seal(tensors),
        lambda: vg.audit_update(model, tensors, attacks=["position"]),
    ):
        with pytest.raises(InputError, match=r"Expected an Update, got dict\. Wrap the tensors"):
            do()


# differences of whole state dicts


class Normed(nn.Module):
    """A Vision Transformer with a batch norm before it: statistics and a counter."""

    def __init__(self):
        super().__init__()
        whole = vit()
        self.patch_embed, self.cls_token, self.pos_embed = (
            whole.patch_embed, whole.cls_token, whole.pos_embed,
        )  # fmt: skip
        self.pos_drop, self.blocks, self.head = whole.pos_drop, whole.blocks, whole.head
        self.num_prefix_tokens, self.global_pool = 1, "token"
        self.stem = nn.BatchNorm2d(3)

    def forward(self, images):
        tokens = self.patch_embed(self.stem(images))
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        return self.head(self.blocks(self.pos_drop(tokens + self.pos_embed))[:, 0])


COUNTERS = ("stem.num_batches_tracked", "vitguard.shuffle.step")
STATISTICS = ("stem.running_mean", "stem.running_var")


def trained(stack, *, frozen=(), leave_out=()):
    """Train one step and return the guard and the difference of the whole state dict."""
    torch.manual_seed(0)
    model = Normed()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    shuffle = "shuffle:ratio=0.5,warmup=0,steps=4"
    guard = vg.protect(model, f"{shuffle}+{stack}", generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = guard.prepare(torch.optim.SGD(trainable, lr=0.1))
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    loss = nn.functional.cross_entropy(model(images), labels) + guard.auxiliary_loss()
    loss.backward()
    optimizer.step()
    after = model.state_dict()
    tensors = {k: after[k] - before[k] for k in after if k not in leave_out}
    return guard, vg.Update(tensors, **(FACTS | {"batch_size": 2}))


@pytest.mark.parametrize("stack", ["noise:scale=0.5", "noise:scale=0.5,keep_statistics=true"])
def test_noise_moves_statistics_and_leaves_counters_as_they_are(stack):
    guard, update = trained(stack)
    sealed = guard.seal(update)
    assert all(torch.equal(sealed.read(n), update.read(n)) for n in COUNTERS)
    assert all(sealed.read(n).dtype == torch.int64 and bool(sealed.read(n)) for n in COUNTERS)
    for name in (*STATISTICS, "head.weight"):
        assert not torch.equal(sealed.read(name), update.read(name))


def test_pruning_thins_weights_and_leaves_counters_as_they_are():
    guard, update = trained("pruning:keep=0.1")
    sealed = guard.seal(update)
    assert all(torch.equal(sealed.read(n), update.read(n)) for n in COUNTERS)
    assert int((sealed.read("head.weight") != 0).sum()) == 64
    assert int((sealed.read("stem.running_mean") != 0).sum()) == 1


def test_client_privacy_noises_statistics_and_sends_no_counter():
    guard, update = trained("client-privacy:noise=1,delta=1e-5")
    sealed = guard.seal(update)
    for name in COUNTERS:
        with pytest.raises(Blocked, match="an integer, which cannot be noised"):
            sealed.read(name)
    for name in (*STATISTICS, "head.weight"):
        assert not torch.equal(sealed.read(name), update.read(name))


@pytest.mark.parametrize("frozen", [["blocks"], ["patch_embed"], ["stem"], ["head", "blocks"]])
def test_client_privacy_neither_moves_nor_sends_what_is_frozen(frozen):
    guard, update = trained("client-privacy:noise=1,delta=1e-5", frozen=frozen)
    sealed = guard.seal(update)
    names = {n for n, p in guard.model.named_parameters() if not p.requires_grad}
    assert names and not names & set(sealed.tensors)
    with pytest.raises(Blocked, match="frozen"):
        sealed.read(sorted(names)[0])
    trained_names = {n for n, p in guard.model.named_parameters() if p.requires_grad}
    assert trained_names <= set(sealed.tensors)


def test_client_privacy_refuses_a_change_of_what_is_frozen_by_now():
    guard, update = trained("client-privacy:noise=1,delta=1e-5")
    guard.model.blocks.requires_grad_(False)
    with pytest.raises(InputError, match="which is frozen"):
        guard.seal(update)
    assert guard.privacy_spent().epsilon == 0


@pytest.mark.parametrize("frozen", [[], ["blocks"], ["head"]])
def test_encryption_hides_statistics_and_sends_no_counter(frozen):
    guard, update = trained("encryption:select=all", frozen=frozen)
    sealed = guard.seal(update)
    assert not sealed.tensors
    for name in COUNTERS:
        with pytest.raises(Blocked, match="an integer, not encrypted"):
            sealed.read(name)
    for name in (*STATISTICS, "head.weight"):
        with pytest.raises(Blocked, match="encrypted"):
            sealed.read(name)


@pytest.mark.parametrize(
    "stack",
    ["noise", "pruning:keep=0.5", "client-privacy:noise=1,delta=1e-5", "encryption:select=all"],
)
@pytest.mark.parametrize("missing", ["head.weight", "pos_embed", "stem.running_var"])
def test_a_parameter_that_is_missing_stays_missing(stack, missing):
    guard, update = trained(stack, leave_out=[missing])
    sealed = guard.seal(update)
    with pytest.raises(Blocked, match="not in the update"):
        sealed.read(missing)


@pytest.mark.slow
def test_an_audit_takes_a_difference_of_a_whole_state_dict():
    guard, update = trained("noise:scale=0")
    model = guard.public_model()
    tensors = {k: t for k, t in update.tensors.items() if not k.startswith("vitguard.")}
    report = vg.audit_update(
        model, vg.Update(tensors, **(FACTS | {"batch_size": 2})), attacks=["position"]
    )
    assert len(report.findings) == 2


def test_a_manifest_of_a_state_dict_leaves_counters_out_and_refuses_them_by_name():
    state = Normed().state_dict()
    manifest = Manifest.of(state, bounds=1.0)
    assert set(manifest.names) == {n for n, t in state.items() if t.is_floating_point()}
    with pytest.raises(InputError, match=r"num_batches_tracked, got torch\.int64"):
        Manifest.of(state, ["stem.num_batches_tracked"], bounds=1.0)


# a model that is frozen whole


@pytest.mark.parametrize("stack", ["noise", "positions:kind=sincos", "shuffle", "withheld", ""])
@pytest.mark.parametrize("how", [{}, {"learning_rate": 0.1}])
def test_a_model_that_is_frozen_whole_is_refused_in_words(stack, how):
    model = vit()
    model.requires_grad_(False)
    guard = vg.protect(model, stack or [])
    with pytest.raises(InputError, match="one that is frozen whole"):
        guard.update(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]), **how)


# sealing after an evaluation


def difference(model, before):
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda m, x: m.eval(),
        lambda m, x: torch.no_grad()(lambda: m.eval()(x))(),
        lambda m, x: torch.inference_mode()(lambda: m.eval()(x))(),
        lambda m, x: m.eval()(x),  # a graph, of which nobody takes a gradient
        lambda m, x: [torch.no_grad()(lambda: m.eval()(x))() for _ in range(3)],
    ],
    ids=["eval", "no_grad", "inference", "graph without backward", "several"],
)
@pytest.mark.parametrize("stack", ["shuffle:ratio=0.5", "positions:kind=sincos+shuffle:ratio=0.5"])
def test_an_evaluation_between_training_and_seal_is_no_fault(stack, evaluate):
    model = vit()
    guard = vg.protect(model, stack)
    optimizer = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    evaluate(model, images)
    sealed = guard.seal(vg.Update(difference(model, before), **FACTS))
    assert sealed.can_read("head.weight") and not model.training


def test_a_gradient_in_eval_mode_is_still_refused_and_so_is_update():
    model = vit()
    guard = vg.protect(model, "shuffle:ratio=0.5")
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    model.eval()
    with pytest.raises(Unprotected, match="training mode"):
        guard.update(images, labels)
    nn.functional.cross_entropy(model(images), labels).backward()
    gradient = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for mode in (False, True):
        model.train(mode)
        with pytest.raises(Unprotected, match="taken in eval mode"):
            guard.seal(vg.Update(gradient))
