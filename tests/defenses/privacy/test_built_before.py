"""An optimizer built before `protect`, whose stack takes positions out of the model."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.fast import crossed, fast_for
from vitguard.errors import Incompatible

pytest.importorskip("opacus")
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.001,accountant=rdp"
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3))
DATA = TensorDataset(IMAGES, torch.arange(24) % 10)


def vit(**change):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 10, "embed_dim": 32}
    return timm.create_model("vit_tiny_patch16_224", num_heads=2, **(sizes | change))


def hugging_face():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def torchvision():
    torch.manual_seed(0)
    tv = pytest.importorskip("torchvision")
    return tv.models.VisionTransformer(32, 8, 1, 2, 32, 32, num_classes=10)


def eva():
    torch.manual_seed(0)
    return timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=10)


MODELS = {
    "timm": vit, "registers": lambda: vit(reg_tokens=2), "transformers": hugging_face,
    "torchvision": torchvision, "EVA": eva,
}  # fmt: skip
POSITIONS = [f"positions:kind={kind}" for kind in ("sincos", "frozen", "random", "none")]
OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "named": lambda m: torch.optim.SGD(m.named_parameters(), lr=0.1),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01),
    "one group each": lambda m: torch.optim.SGD([{"params": [p]} for p in m.parameters()], lr=0.1),
    "two groups": lambda m: torch.optim.SGD(
        [{"params": [p for n, p in m.named_parameters() if "pos" not in n]},
         {"params": [p for n, p in m.named_parameters() if "pos" in n], "lr": 0.01}], lr=0.1,
    ),
}  # fmt: skip


def trained(make, stack, optimizer_of, *, before, steps=3):
    model = make()
    images = IMAGES[..., : 28 if "Eva" in type(model).__name__ else 32, :]
    images = images[..., : images.shape[-2]]
    data = DataLoader(TensorDataset(images, DATA.tensors[1]), batch_size=6)
    if before:
        optimizer = optimizer_of(model)
        scheduler = schedulers.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    guard = vg.protect(model, stack, generator=torch.Generator().manual_seed(1))
    if not before:
        optimizer = optimizer_of(model)
        scheduler = schedulers.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    optimizer, loader = guard.prepare(optimizer, data)
    batches = iter(loader or data)
    for _ in range(steps):
        images, labels = next(batches)
        outputs = model(images)
        outputs = getattr(outputs, "logits", outputs)
        (F.cross_entropy(outputs, labels) + guard.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return guard, optimizer


def same(a, b):
    return all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.parametrize(("positions", "optimizer"), crossed(POSITIONS, OPTIMIZERS))
def test_a_private_run_is_the_same_whether_the_optimizer_is_older_than_the_protection(
    positions, optimizer
):
    runs = [
        trained(vit, f"{positions}+{PRIVATE}", OPTIMIZERS[optimizer], before=before)
        for before in (True, False)
    ]
    (old, holds), (new, _) = runs
    assert same(old.export(), new.export()) and old.privacy_spent().steps == 3
    known = {id(p) for p in old.model.parameters()}
    assert all(id(p) in known for group in holds.param_groups for p in group["params"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", fast_for(MODELS, fast=["timm", "registers"]))
def test_positions_leave_the_optimizer_of_every_family(kind):
    sgd = OPTIMIZERS["SGD"]
    for stack in (f"{POSITIONS[0]}+{PRIVATE}", f"{POSITIONS[0]}+shuffle:ratio=0.5+{PRIVATE}"):
        old, new = (trained(MODELS[kind], stack, sgd, before=before)[0] for before in (True, False))
        assert same(old.export(), new.export())


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "named", "one group each", "LBFGS"])
def test_without_privacy_they_leave_too_and_groups_stay_with_their_names(kind):
    model = vit()
    make = OPTIMIZERS.get(kind, lambda m: torch.optim.LBFGS(m.parameters(), max_iter=2))
    optimizer = make(model)
    groups, positions = len(optimizer.param_groups), model.pos_embed
    guard = vg.protect(model, POSITIONS[0])
    assert guard.prepare(optimizer) is optimizer

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IMAGES[:4]), DATA.tensors[1][:4])
        loss.backward()
        return loss

    optimizer.step(closure)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(optimizer.param_groups) == groups and all(p is not positions for p in held)
    assert len(held) == len(list(model.parameters()))
    if kind == "named":
        assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


def test_what_the_optimizer_knew_of_the_positions_goes_with_them():
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    F.cross_entropy(model(IMAGES[:4]), DATA.tensors[1][:4]).backward()
    optimizer.step()  # plain training before the protection: the optimizer has a state
    guard = vg.protect(model, f"{POSITIONS[0]}+{PRIVATE}")
    private, _ = guard.prepare(optimizer, DataLoader(DATA, batch_size=6))
    assert set(optimizer.state) == set(model.parameters())
    again = torch.optim.AdamW(model.parameters(), lr=0.01)
    again.load_state_dict(private.state_dict())


STRANGERS = {
    "another model's parameter": lambda m: list(vit().parameters()),
    "a temperature of the loss": lambda m: [*m.parameters(), nn.Parameter(torch.ones(()))],
    "a copy of the model": lambda m: list(copy.deepcopy(m).parameters()),
    "a head that was replaced": lambda m: [*m.parameters(), *nn.Linear(32, 10).parameters()],
    "a position embedding of one's own": lambda m: [*m.parameters(), nn.Parameter(torch.ones(17))],
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_parameter_that_never_was_the_models_is_still_refused(kind):
    model = vit()
    optimizer = torch.optim.SGD(STRANGERS[kind](model), lr=0.1)
    guard = vg.protect(model, f"{POSITIONS[0]}+{PRIVATE}")
    with pytest.raises(Incompatible, match="the model's own parameters"):
        guard.prepare(optimizer, DataLoader(DATA, batch_size=6))


def test_the_optimizer_of_a_model_copied_after_protect_is_refused_with_the_remedy():
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    vg.protect(model, f"{POSITIONS[0]}+{PRIVATE}")
    model, optimizer = copy.deepcopy((model, optimizer))
    with pytest.raises(Incompatible, match="build it after protect"):
        vg.Guard.of(model).prepare(optimizer, DataLoader(DATA, batch_size=6))
