"""Objects built around an optimizer before `prepare` go on as if it had been built after it."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim._param_groups import param_groups_layer_decay as layer_decay
from torch.optim import lr_scheduler as schedulers

import vitguard as vg
from vitguard.errors import InputError

STACK = "shuffle:ratio=0.5,dal=tokens"
IMAGES, LABELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32), torch.tensor([1, 2])


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10, embed_dim=64,
        num_heads=2,
    )  # fmt: skip


def timm_cosine(optimizer):
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(optimizer, t_initial=6, warmup_t=2, warmup_lr_init=0.01)


def transformers_linear(optimizer):
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, 2, 8)


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (step + 1)),
    "LambdaLR with a list": lambda o: schedulers.LambdaLR(o, [lambda step: 1 / (step + 1)]),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "timm": timm_cosine,
    "transformers": transformers_linear,
}


def trained(scheduler_of, *, before):
    model = vit()
    guard = vg.protect(model, STACK, generator=torch.Generator().manual_seed(1))
    if before:
        own = [p for n, p in model.named_parameters() if not n.startswith("vitguard.")]
        optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9)
        scheduler = scheduler_of(optimizer)
        optimizer = guard.prepare(optimizer)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = scheduler_of(optimizer)
        optimizer = guard.prepare(optimizer)
    for step in range(5):
        (F.cross_entropy(model(IMAGES), LABELS) + guard.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif hasattr(scheduler, "step_update"):
            scheduler.step(step + 1)
        else:
            scheduler.step()
    return model.state_dict(), {group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_built_before_prepare_trains_to_the_same_weights(kind):
    torch.manual_seed(0)
    built_before, rates = trained(SCHEDULERS[kind], before=True)
    torch.manual_seed(0)
    reference, wanted = trained(SCHEDULERS[kind], before=False)
    assert rates == wanted and len(rates) == 1
    assert all(torch.equal(v, reference[k]) for k, v in built_before.items())
    start = vit().state_dict()
    assert not torch.equal(built_before["head.weight"], start["head.weight"])


def added_of(model, part):
    return next(p for n, p in model.named_parameters() if n.startswith("vitguard") and part in n)


def group_with(optimizer, parameter):
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


SPLITS = {
    "no decay for biases, norms and tokens": lambda m: [
        {"params": [p for n, p in m.named_parameters() if p.dim() > 1 and "embed" not in n]},
        {"params": [p for n, p in m.named_parameters() if not (p.dim() > 1 and "embed" not in n)],
         "weight_decay": 0.0},
    ],
    "the body slower than the head": lambda m: [
        {"params": [p for n, p in m.named_parameters() if "head" not in n], "lr": 1e-3},
        {"params": list(m.head.parameters()), "lr": 1e-1},
    ],
    "the head first": lambda m: [
        {"params": list(m.head.parameters()), "lr": 1e-1},
        {"params": [p for n, p in m.named_parameters() if "head" not in n], "lr": 1e-3},
    ],
    "one group for each parameter": lambda m: [
        {"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(m.parameters())
    ],
    "timm's layer decay": lambda m: layer_decay(m, weight_decay=0.05, layer_decay=0.5),
}  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
def test_added_parameters_share_the_settings_of_their_like(split):
    model = vit()
    optimizer = torch.optim.AdamW(SPLITS[split](model), lr=1e-2, weight_decay=0.1)
    groups = len(optimizer.param_groups)
    guard = vg.protect(model, STACK)
    guard.prepare(optimizer)
    assert len(optimizer.param_groups) == groups
    for part, like in (
        ("unknown", model.pos_embed),
        ("head.layers.0.weight", model.head.weight),
        ("head.layers.0.bias", model.head.bias),
    ):
        assert group_with(optimizer, added_of(model, part)) is group_with(optimizer, like)


def test_with_fixed_positions_the_unknown_embedding_joins_a_token():
    model = vit()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    guard = vg.protect(model, "positions:kind=sincos+shuffle:ratio=0.5")
    position = optimizer.param_groups[1]["params"][0]  # no longer the model's
    assert all(position is not p for p in model.parameters())
    guard.prepare(optimizer)
    added = group_with(optimizer, added_of(model, "unknown"))
    assert added is group_with(optimizer, model.cls_token)


def test_lbfgs_trains_what_a_defense_added():
    model = vit()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    guard = vg.protect(model, "shuffle:ratio=0.5")
    guard.prepare(optimizer)
    unknown = added_of(model, "unknown")
    before = unknown.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IMAGES), LABELS)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(unknown, before)


def test_named_parameters_of_an_optimizer_stay_named():
    model = vit()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    vg.protect(model, "shuffle:ratio=0.5")
    vg.Guard.of(model).prepare(optimizer)
    assert optimizer.param_groups[0]["param_names"][-1] == "vitguard.shuffle.unknown"


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.1),
        lambda p: torch.optim.Adadelta(p, lr=0.1),
        lambda p: torch.optim.Adamax(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    ],
)
def test_other_optimizers_step_what_joined(kind):
    model = vit()
    optimizer = kind(model.parameters())
    guard = vg.protect(model, "shuffle:ratio=0.5")
    guard.prepare(optimizer)
    unknown = added_of(model, "unknown")
    before = unknown.detach().clone()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    optimizer.step()
    assert not torch.equal(unknown, before)


def test_an_optimizer_that_nothing_can_join_says_what_to_do():
    model = vit()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    guard = vg.protect(model, "shuffle:ratio=0.5")
    with pytest.raises(InputError, match="Build it after protect"):
        guard.prepare(optimizer)
    guard.prepare(torch.optim.Adagrad(model.parameters(), lr=0.1))
