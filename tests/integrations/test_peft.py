"""PEFT before protect and after it: what is trained, private over the adapters, and sealed."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from vitguard.errors import Unprotected
from vitguard.trained import trained_sizes
from vitguard.vit import Anatomy

peft = pytest.importorskip("peft")

SHUFFLE = "shuffle:ratio=0.5,mask=uniform"
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.01,accountant=rdp"
DATA = TensorDataset(
    torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 10
)
KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]),
    "IA3": lambda: peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"]),
}
ORDERS = ["protect first", "PEFT first"]


def adapted(small_vit, order, stack=SHUFFLE, kind="LoRA", seed=3):
    torch.manual_seed(0)
    model = small_vit(depth=1)
    generator = torch.Generator().manual_seed(seed)
    if order == "protect first":
        guard = vg.protect(model, stack, generator=generator)
        return peft.get_peft_model(model, KINDS[kind]()), guard
    wrapped = peft.get_peft_model(model, KINDS[kind]())
    return wrapped, vg.protect(wrapped, stack, generator=generator)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def step(model, guard, optimizer):
    images, labels = DATA.tensors
    (F.cross_entropy(model(images), labels) + guard.auxiliary_loss()).backward()
    optimizer.step()
    optimizer.zero_grad()


def moved(model, before):
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def kept(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_and_what_a_defense_added_are_trained_and_nothing_else(small_vit, order, kind):
    model, guard = adapted(small_vit, order, kind=kind)
    optimizer = guard.prepare(sgd(model))
    before = kept(model)
    for _ in range(2):
        step(model.train(), guard, optimizer)
    names = moved(model, before)
    assert any(n.endswith("vitguard.shuffle.unknown") for n in names)
    own = ("lora_", "ia3_", "modules_to_save", "vitguard.")
    assert names and all(any(part in n for part in own) for n in names)
    assert any("lora_B" in n or "ia3_" in n for n in names)


def test_both_orders_train_to_the_same_weights(small_vit):
    ends = []
    for order in ORDERS:
        model, guard = adapted(small_vit, order)
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.data.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        optimizer = guard.prepare(sgd(model))
        for _ in range(2):
            step(model.train(), guard, optimizer)
        ends.append(dict(guard.model.named_parameters()))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.allclose(p, ends[1][n], atol=1e-6) for n, p in ends[0].items())


def test_without_prepare_a_frozen_embedding_is_told_at_the_first_step(small_vit):
    model, guard = adapted(small_vit, "protect first")
    optimizer = sgd(model)
    with pytest.raises(Unprotected, match=r"guard\.prepare\(optimizer\)"):
        step(model.train(), guard, optimizer)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stack", [PRIVATE, f"{SHUFFLE}+{PRIVATE}"])
def test_privacy_clips_over_the_adapters_alone(small_vit, order, stack):
    pytest.importorskip("opacus")
    quiet = stack.replace("noise=0.5", "noise=0")
    model, guard = adapted(small_vit, order, quiet)
    optimizer, loader = guard.prepare(sgd(model), DataLoader(DATA, 8))
    before = kept(model)
    model.train()
    for images, labels in loader:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    after = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved(model, before) <= trained
    # a mean of 8 clipped gradients, times the learning rate
    norm = float(torch.stack([d.norm() for d in after.values()]).norm())
    assert 0 < norm <= 0.5 * (1 + 1e-5)
    assert guard._ledgers["privacy"].steps == 1
    assert all("lora" in n or "modules_to_save" in n or "vitguard" in n for n in trained)


HIDDEN = {  # their parameters pass by a torch.autograd.Function
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["qkv"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["proj"]),
}


@pytest.mark.parametrize("stack", [PRIVATE, f"{SHUFFLE}+{PRIVATE}"])
@pytest.mark.parametrize("kind", HIDDEN)
def test_adapters_whose_use_cannot_be_followed_are_refused_before_a_weight_moves(
    small_vit, kind, stack
):
    pytest.importorskip("opacus")
    model = small_vit(depth=1)
    guard = vg.protect(model, stack)
    wrapped = peft.get_peft_model(model, HIDDEN[kind]())
    before = kept(wrapped)
    with pytest.raises(Unprotected, match=r"torch.autograd.Function of one's own .*(LoHa|OFT)"):
        optimizer, loader = guard.prepare(sgd(wrapped), DataLoader(DATA, 8))
        images, labels = next(iter(loader))
        F.cross_entropy(wrapped.train()(images), labels).backward()
        optimizer.step()
    assert not moved(wrapped, before) and guard.privacy_spent().steps == 0


def test_physical_batch_changes_neither_the_steps_nor_the_adapters(small_vit):
    pytest.importorskip("opacus")
    ends = []
    for pieces in ("", ",physical_batch=2"):
        quiet = f"{PRIVATE}{pieces}".replace("noise=0.5", "noise=0")
        model, guard = adapted(small_vit, "PEFT first", quiet)
        optimizer, loader = guard.prepare(sgd(model), DataLoader(DATA, 4))
        for images, labels in loader:
            F.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert guard._ledgers["privacy"].steps == 2
        ends.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert ends[0] and all(map(lambda a, b: torch.allclose(a, b, atol=1e-6), *ends))


@pytest.mark.parametrize("order", ORDERS)
def test_an_update_of_adapters_is_sealed_by_the_names_of_the_wrapped_model(small_vit, order):
    model, guard = adapted(small_vit, order, "client-privacy:noise=0,clip=0.01")
    guard.will_seal()
    optimizer = guard.prepare(sgd(model))
    before = kept(model)
    step(model.train(), guard, optimizer)
    difference = {n: p.detach() - before[n] for n, p in model.named_parameters() if p.requires_grad}
    sealed = guard.seal(vg.Update(difference, kind="difference", batch_size=8))
    assert len(sealed.tensors) == len(difference)
    norm = float(torch.stack([t.norm() for t in sealed.tensors.values()]).norm())
    assert norm == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_guard_update_holds_the_adapters_alone(small_vit, order):
    model, guard = adapted(small_vit, order, "noise:scale=0")
    model.train()
    update = guard.update(*DATA.tensors)
    assert any("lora_A" in n for n in update.tensors)
    assert "patch_embed.proj.weight" not in update.tensors


def test_an_update_of_lora_holds_what_the_plan_says_that_it_does(small_vit):
    model, guard = adapted(small_vit, "PEFT first", "none")
    model.train()
    update = guard.update(*DATA.tensors)
    plain = small_vit(depth=1)
    planned = trained_sizes(plain, Anatomy.of(plain), "lora:r=2/head")
    held = {n.replace(".modules_to_save.default", ""): t for n, t in update.tensors.items()}
    assert {n: t.numel() for n, t in held.items()} == planned


@pytest.mark.parametrize("order", ORDERS)
def test_a_model_of_transformers_with_adapters_is_protected_too(order):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_labels=10,
            num_attention_heads=2, intermediate_size=32,
        )
    )  # fmt: skip
    modules = {n.rpartition(".")[2] for n, _ in model.named_modules()}
    config = peft.LoraConfig(
        r=2, target_modules=[n for n in ("q_proj", "query") if n in modules],
        modules_to_save=["classifier"],
    )  # fmt: skip
    if order == "PEFT first":
        model = peft.get_peft_model(model, config)
    guard = vg.protect(model, SHUFFLE)
    if order == "protect first":
        model = peft.get_peft_model(model, config)
    optimizer = guard.prepare(sgd(model))
    before = kept(model)
    images, labels = DATA.tensors
    for _ in range(2):
        model.train()(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
    names = moved(model, before)
    assert any("unknown" in n for n in names) and any("lora_B" in n for n in names)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_adapters_has_the_parts_that_it_has_without(small_vit, order, kind):
    plain = Anatomy.of(small_vit(depth=1))
    _, guard = adapted(small_vit, order, kind=kind)
    assert guard.anatomy == plain == Anatomy.of(guard.model)
    assert plain.blocks[0].qkv


def test_merged_adapters_load_into_a_plain_model(small_vit):
    model, guard = adapted(small_vit, "protect first")
    optimizer = guard.prepare(sgd(model))
    step(model.train(), guard, optimizer)
    merged = model.merge_and_unload()
    plain = small_vit(depth=1)
    plain.load_state_dict(vg.Guard.of(merged).export(), strict=True)
    images = DATA.tensors[0]
    assert torch.allclose(plain.eval()(images), merged.eval()(images), atol=1e-5)


def test_adapters_that_the_private_optimizer_does_not_hold_are_told_before_the_next_step(small_vit):
    pytest.importorskip("opacus")
    model, guard = adapted(small_vit, "protect first", PRIVATE)
    model.add_adapter("other", KINDS["LoRA"]())
    model.set_adapter("other")
    optimizer, loader = guard.prepare(sgd(model), DataLoader(DATA, 4))
    model.set_adapter("default")
    before = kept(model)
    with pytest.raises(Unprotected, match="set_adapter"):
        for images, labels in loader:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert not moved(model, before) and not guard._ledgers["privacy"].history


def test_every_linear_layer_but_those_of_a_defense_takes_an_adapter(small_vit, tmp_path):
    """As docs/integrations.md says it: the head of DAL is no layer of the model."""
    model = small_vit(depth=1)
    guard = vg.protect(model, f"{SHUFFLE},dal=tokens")
    chosen = {"target_modules": "all-linear", "exclude_modules": r"vitguard\..*"}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **chosen))
    optimizer, before = guard.prepare(sgd(model)), kept(model)
    for _ in range(2):
        step(model, guard, optimizer)
    changed = moved(model, before)
    assert {n for n in changed if "vitguard" in n} == {n for n in before if "vitguard" in n}
    assert any("fc1.lora_A" in n for n in changed)
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(small_vit(depth=1), tmp_path).eval()
    images = DATA.tensors[0]
    assert torch.allclose(plain(images), model.eval()(images), atol=1e-6)
