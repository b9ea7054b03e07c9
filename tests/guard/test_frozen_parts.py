"""Models of which a part is frozen, unfrozen later or trained through low-rank additions."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.fast import crossed
from vitguard.errors import InputError, Unprotected, VitguardError

pytest.importorskip("opacus")
PRIVATE = "privacy:noise=0,clip=1000,delta=0.001,accountant=rdp"
STACKS = [
    PRIVATE, f"positions:kind=sincos+{PRIVATE}", "shuffle:ratio=0.5",
    "positions:kind=sincos+shuffle:ratio=0.5,dal=tokens", "noise:scale=0", "withheld",
]  # fmt: skip
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3))
DATA = TensorDataset(IMAGES, torch.arange(24) % 10)


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10, embed_dim=32,
        num_heads=2,
    )  # fmt: skip


class LowRank(nn.Module):
    """A frozen linear layer with a trained product of two small matrices beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(0.1 * torch.randn(rank, base.in_features))
        self.up = nn.Parameter(0.1 * torch.randn(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def low_rank(*names):
    def change(model):
        model.requires_grad_(False)
        for name in names:
            path, _, last = name.rpartition(".")
            parent = model.get_submodule(path)
            setattr(parent, last, LowRank(getattr(parent, last)))

    return change


def only(*names):
    def change(model):
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(names))

    return change


PARTS = {
    "the head alone": only("head"),
    "the last block and the head": only("blocks.1", "norm", "head"),
    "biases alone": lambda m: [
        p.requires_grad_(n.endswith("bias")) for n, p in m.named_parameters()
    ],
    "the stem alone": only("patch_embed", "pos_embed", "cls_token"),
    "low-rank in one layer": low_rank("blocks.0.attn.qkv"),
    "low-rank in some layers": low_rank("blocks.0.attn.qkv", "blocks.1.mlp.fc1"),
    "low-rank beside a trained head": lambda m: [
        low_rank("blocks.0.attn.proj", "blocks.1.attn.proj")(m), m.head.requires_grad_(True),
    ],
}  # fmt: skip


def prepared(model, stack, *, batch=6, built="after"):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if built == "before" else None
    generator = torch.Generator().manual_seed(0)  # fresh draws are empty once in a thousand times
    guard = vg.protect(model, stack, generator=generator)
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(held, lr=0.1)
    data = DataLoader(DATA, batch_size=batch)
    optimizer, loader = guard.prepare(optimizer, data)
    return guard, optimizer, loader or data


def step(guard, optimizer, batch):
    images, labels = batch
    (F.cross_entropy(guard.model(images), labels) + guard.auxiliary_loss()).backward()
    optimizer.step()
    optimizer.zero_grad()


def moved(guard, before):
    return {n for n, t in guard.export().items() if not torch.equal(t, before[n])}


@pytest.mark.parametrize(
    ("stack", "part", "built"), crossed(STACKS, PARTS, ["before", "after"], rounds=2)
)
def test_what_is_trained_moves_and_what_is_frozen_stays(stack, part, built):
    model = vit()
    PARTS[part](model)
    guard, optimizer, loader = prepared(model, stack, built=built)
    before = copy.deepcopy(guard.export())
    for batch in loader:
        step(guard, optimizer, batch)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved(guard, before) == {n for n in trained if not n.startswith("vitguard")} != set()
    difference = {n: p.detach() - before.get(n, p.detach()) for n, p in model.named_parameters()}
    sealed = guard.seal(vg.Update(difference, kind="difference"))
    assert any(sealed.can_read(n) and sealed.read(n).any() for n in trained)
    update = guard.update(IMAGES[:2], DATA.tensors[1][:2])
    held = {"pos_embed"} if "withheld" in stack else set()
    assert set(update.tensors) == {n for n, p in model.named_parameters() if p.requires_grad} - held


# frozen whole


@pytest.mark.parametrize("when", ["before protect", "before prepare"])
@pytest.mark.parametrize("stack", STACKS)
def test_training_a_model_that_is_frozen_whole_is_refused_by_protect_or_prepare(stack, when):
    model = vit()
    with pytest.raises(VitguardError, match=r"frozen whole\. Unfreeze"):
        if when == "before protect":
            model.requires_grad_(False)
        guard = vg.protect(model, stack)
        model.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard.prepare(optimizer, DataLoader(DATA, batch_size=6))


@pytest.mark.parametrize("stack", STACKS)
def test_an_update_or_audit_of_a_model_that_is_frozen_whole_is_refused(stack):
    model = vit()
    guard = vg.protect(model, stack)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="frozen whole"):
        guard.update(IMAGES[:2], DATA.tensors[1][:2])


def test_a_model_frozen_whole_after_prepare_is_refused_at_its_next_private_pass():
    model = vit()
    _, _, loader = prepared(model, PRIVATE)
    images, _ = next(iter(loader))
    model.requires_grad_(False)
    with pytest.raises(Unprotected, match=r"got none\. Unfreeze"):
        model(images)


# unfreezing after prepare


LATER = {
    "all": lambda m: m.requires_grad_(True),
    "the blocks": lambda m: m.blocks.requires_grad_(True),
    "one block": lambda m: m.blocks[1].requires_grad_(True),
    "one bias": lambda m: m.blocks[1].mlp.fc1.bias.requires_grad_(True),
    "the stem": lambda m: m.patch_embed.requires_grad_(True),
    "one block, and the head is frozen": lambda m: [
        m.blocks[1].requires_grad_(True), m.head.requires_grad_(False),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("stack", "later"), crossed(["noise:scale=0", PRIVATE], LATER))
def test_unfreezing_after_prepare_trains_as_without_a_guard(stack, later):
    model, plain = vit(), vit()
    for one in (model, plain):
        only("head", "norm")(one)
    guard, optimizer, loader = prepared(model, stack, built="before")
    by_hand = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number, (images, labels) in enumerate(loader):
        if number == 1:
            LATER[later](model), LATER[later](plain)
        step(guard, optimizer, (images, labels))
        share = len(images) / 6  # a private step divides by the batch on average
        (F.cross_entropy(plain(images), labels) * share).backward()
        by_hand.step()
        by_hand.zero_grad()
    start, end = vit().state_dict(), plain.state_dict()
    assert all(torch.allclose(t, end[n], atol=1e-6) for n, t in guard.export().items())
    for n, p in plain.named_parameters():
        if n.startswith(("blocks.1.mlp.fc1.bias", "patch_embed")):
            assert torch.equal(p, start[n]) != p.requires_grad


@pytest.mark.parametrize(("when", "later"), crossed(["before prepare", "after prepare"], LATER))
def test_a_plain_gradient_of_what_was_unfrozen_later_is_not_sealed(later, when):
    model = vit()
    only("head", "norm")(model)
    guard = vg.protect(model, PRIVATE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    if when == "after prepare":
        optimizer, loader = guard.prepare(optimizer, DataLoader(DATA, batch_size=6))
    before = copy.deepcopy(model.state_dict())
    LATER[later](model)
    model.head.requires_grad_(False), model.norm.requires_grad_(False)  # only what came later
    features = model.forward_head(model.forward_features(IMAGES[:4]))
    F.cross_entropy(features, DATA.tensors[1][:4]).backward()
    with pytest.raises(Unprotected, match=r"neither (clipped nor noised|noised nor counted)"):
        other.step()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * (0 if p.grad is None else p.grad)
            p.grad = None
    if when == "before prepare":
        optimizer, loader = guard.prepare(optimizer, DataLoader(DATA, batch_size=6))
    step(guard, optimizer, next(iter(loader)))
    difference = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    update = vg.Update(difference, kind="difference")
    with pytest.raises(Unprotected, match="got a plain one"):
        guard.seal(update)
    model.load_state_dict(before)
    guard.seal(update)


def test_a_layer_that_came_after_prepare_is_refused_with_the_remedy():
    model = vit()
    only("head")(model)
    guard, optimizer, loader = prepared(model, PRIVATE)
    low_rank("blocks.0.attn.qkv")(model)
    model.head.requires_grad_(True)
    added = [p for p in model.blocks.parameters() if p.requires_grad]
    optimizer.add_param_group({"params": added})
    with pytest.raises(Unprotected, match=r"Call guard\.prepare again"):
        step(guard, optimizer, next(iter(loader)))
    optimizer, loader = guard.prepare(optimizer, loader)
    before = copy.deepcopy(guard.export())
    step(guard, optimizer, next(iter(loader)))
    assert len(moved(guard, before)) == 4
