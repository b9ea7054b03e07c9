"""Scalers, wrappers and optimizers of other libraries, built before `protect` or after it."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.fast import crossed
from vitguard.errors import Incompatible

pytest.importorskip("opacus")
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.001,accountant=rdp"
STACKS = {
    "positions": "positions:kind=sincos",
    "shuffle": "shuffle:ratio=0.5,dal=tokens",
    "privacy": PRIVATE,
    "positions and privacy": f"positions:kind=sincos+{PRIVATE}",
    "noise": "noise:scale=0.1",
}
DATA = TensorDataset(
    torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3)), torch.arange(24) % 10
)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def of_timm(kind):
    def make(model):
        try:
            return create_optimizer_v2(model.parameters(), opt=kind, lr=0.01)
        except ValueError as error:
            pytest.skip(f"this timm has no {kind}: {error}")

    return make


def accelerated(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(sgd(model))


def averaged(model):
    optimizer = sgd(model)
    optimizer.scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    return optimizer


OBJECTS = {
    "GradScaler": sgd, "Lookahead": of_timm("lookahead_sgd"), "Lion": of_timm("lion"),
    "LAMB": of_timm("lamb"), "Adafactor": of_timm("adafactor"), "MADGRAD": of_timm("madgrad"),
    "Muon": of_timm("muon"), "NAdamW": of_timm("nadamw"), "SWALR": averaged,
    "accelerate": accelerated, "foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True),
    "hooked": lambda m: (o := sgd(m), o.register_step_post_hook(lambda *_: None))[0],
}  # fmt: skip


def trained(kind, stack, *, before):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10, embed_dim=32,
        num_heads=2,
    )  # fmt: skip
    optimizer = OBJECTS[kind](model) if before else None
    guard = vg.protect(model, STACKS[stack], generator=torch.Generator().manual_seed(1))
    made = optimizer or OBJECTS[kind](model)
    data = DataLoader(DATA, batch_size=6)
    optimizer, loader = guard.prepare(made, data)
    scaler = torch.amp.GradScaler("cpu", enabled=kind == "GradScaler")
    start = {n: t.clone() for n, t in model.state_dict().items()}
    for images, labels in loader or data:
        loss = F.cross_entropy(model(images), labels) + guard.auxiliary_loss()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if hasattr(made, "scheduler"):
            made.scheduler.step()
    end = model.state_dict()
    still = [n for n, p in model.named_parameters() if torch.equal(p, start[n])]
    return end, still


@pytest.mark.parametrize(("kind", "stack"), crossed(OBJECTS, STACKS))
def test_what_is_built_around_an_optimizer_trains_all_the_same_before_and_after_protect(
    kind, stack
):
    if "privacy" in stack and kind == "GradScaler":
        for before in (True, False):
            with pytest.raises(Incompatible, match="without a GradScaler"):
                trained(kind, stack, before=before)
        return
    (old, still), (new, _) = (trained(kind, stack, before=before) for before in (True, False))
    assert all(torch.equal(t, new[n]) for n, t in old.items()) and not still
