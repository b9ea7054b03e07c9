"""Every example's gradient against plain autograd, one example at a time."""

import pickle

import pytest
import timm.loss
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.defenses.privacy.privacy_models import FAMILIES, WINDOWED, KeyedDraws, build
from tests.fast import crossed, fast_for
from vitguard.core import Batch
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.defenses.privacy.engine import Engine, clipped_sum
from vitguard.errors import Incompatible, Unprotected
from vitguard.vit import canonical_name, logits_of

CLIP = 0.5


def micro_batches(model, loss, images, labels, *, clip=CLIP, before=None):
    """The slow obvious way: one example at a time, plain autograd."""
    trainable = {canonical_name(k): p for k, p in model.named_parameters() if p.requires_grad}
    total = {k: torch.zeros_like(p) for k, p in trainable.items()}
    for i in range(len(images)):
        if before is not None:
            before(i)
        value = loss(logits_of(model(images[i : i + 1])), labels[i : i + 1])
        gradients = torch.autograd.grad(value, list(trainable.values()), materialize_grads=True)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for k, g in zip(trainable, gradients, strict=True):
            total[k] += g * min(1.0, clip / float(norm))
    return total


def assert_same(got, expected, relative=1e-6):
    size = torch.stack([e.norm() for e in expected.values()]).norm()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).norm() <= relative * value.norm() + 1e-9 * size, name


def some(count=3, dtype=torch.float64):
    torch.manual_seed(3)
    return torch.randn(count, 3, 32, 32, dtype=dtype), torch.randint(0, 10, (count,))


# variants of families that are run: the same layers in another order or size
VARIANTS = {
    "swin-v2", "rope-mixed", "hugging-face-beit", "hugging-face-registers", "deit-distilled",
    "query-key-norm", "frozen-backbone",
}  # fmt: skip


@pytest.mark.parametrize("family", fast_for(FAMILIES, fast=FAMILIES.keys() - VARIANTS))
def test_clipped_sum_equals_a_micro_batch_loop_for_every_family(family):
    model = build(family)
    images, labels = some()
    got = DifferentialPrivacy(clip=CLIP).clipped_sum(model, F.cross_entropy, Batch(images, labels))
    assert_same(got, micro_batches(model, F.cross_entropy, images, labels))
    assert all(p.grad is None for p in model.parameters())


DROPPING = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "cait_xxs24_224",
            "eva02_tiny_patch14_224", "vit_small_patch14_reg4_dinov2"]  # fmt: skip


@pytest.mark.parametrize("family", fast_for(DROPPING, fast=DROPPING[::3]))
def test_clipped_sum_equals_a_micro_batch_loop_with_drop_path_on(family):
    model = build(family, drop_path_rate=0.4, proj_drop_rate=0.2)
    draws = KeyedDraws(model)
    images, labels = some()
    keys = torch.tensor([5, 6, 7])
    draws.keys = keys
    got = DifferentialPrivacy(clip=CLIP).clipped_sum(model, F.cross_entropy, Batch(images, labels))
    assert draws.calls

    def one(i):
        draws.keys = keys[i : i + 1]

    assert_same(got, micro_batches(model, F.cross_entropy, images, labels, before=one))


@pytest.mark.slow
def test_real_drop_path_and_dropout_keep_each_examples_gradient():
    model = build(
        "swin_tiny_patch4_window7_224", sizes=WINDOWED, drop_path_rate=0.3, proj_drop_rate=0.2
    )
    images, labels = some()
    trainable = dict(model.named_parameters())
    torch.manual_seed(11)
    losses = F.cross_entropy(model(images), labels, reduction="none")
    total = {k: torch.zeros_like(p) for k, p in trainable.items()}
    for value in losses:
        gradients = torch.autograd.grad(
            value, list(trainable.values()), retain_graph=True, materialize_grads=True
        )
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for k, g in zip(trainable, gradients, strict=True):
            total[k] += g * min(1.0, CLIP / float(norm))
    torch.manual_seed(11)
    got = DifferentialPrivacy(clip=CLIP).clipped_sum(model, F.cross_entropy, Batch(images, labels))
    assert_same(got, total)


CRITERIA = {
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "ignored index": nn.CrossEntropyLoss(ignore_index=-1),
    "timm label smoothing": timm.loss.LabelSmoothingCrossEntropy(0.1),
    "soft targets": timm.loss.SoftTargetCrossEntropy(),
    "class weights": nn.CrossEntropyLoss(weight=torch.linspace(0.1, 3, 10, dtype=torch.float64)),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "custom": lambda outputs, labels: (outputs.softmax(1)[:, 0] * labels.double()).sum(),
}


# a clip that does not bind shows the scale as well
@pytest.mark.parametrize(("criterion", "clip"), crossed(CRITERIA, [1e6, CLIP]))
def test_clipped_sum_equals_a_micro_batch_loop_for_every_criterion(criterion, clip):
    model, loss = build("vit"), CRITERIA[criterion]
    images, labels = some()
    if criterion == "soft targets":
        labels = F.one_hot(labels, 10).double() * 0.8 + 0.02
    got = DifferentialPrivacy(clip=clip).clipped_sum(model, loss, Batch(images, labels))
    if criterion == "class weights":  # by itself the mean of one example divides by its weight
        loss = nn.CrossEntropyLoss(weight=loss.weight, reduction="sum")
    assert_same(got, micro_batches(model, loss, images, labels, clip=clip))


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_channels_last_gives_the_same_gradients(engine):
    model = build("vit")
    images, labels = some()
    expected = micro_batches(model, F.cross_entropy, images, labels)
    model = model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    defense = DifferentialPrivacy(clip=CLIP, engine=engine)
    assert_same(defense.clipped_sum(model, F.cross_entropy, Batch(images, labels)), expected)


OF_OPACUS = ["vit", "layer-scale", "swin", "torchvision", "registers"]


@pytest.mark.parametrize("family", fast_for(OF_OPACUS, fast=["layer-scale", "torchvision"]))
def test_opacus_engine_gives_the_same_clipped_sum(family):
    model = build(family)
    images, labels = some()
    defense = DifferentialPrivacy(clip=CLIP, engine="opacus")
    got = defense.clipped_sum(model, F.cross_entropy, Batch(images, labels))
    assert_same(got, micro_batches(model, F.cross_entropy, images, labels))
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


@pytest.mark.parametrize("rule", [True, False])
def test_factors_and_formed_gradients_agree(rule, monkeypatch):
    monkeypatch.setattr("vitguard.defenses.privacy.functions.prefer_products", lambda *sizes: rule)
    model = build("vit")
    images, labels = some()
    got = DifferentialPrivacy(clip=CLIP).clipped_sum(model, F.cross_entropy, Batch(images, labels))
    assert_same(got, micro_batches(model, F.cross_entropy, images, labels))


class Odd(nn.Module):
    """Bare parameters met in unusual ways."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4, groups=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mix = nn.Conv1d(64, 64, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.table = nn.Parameter(torch.randn(5, 8))
        self.norm = nn.RMSNorm(8)
        self.groups = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 10)
        self.register_buffer("index", torch.arange(64) % 5)

    def forward(self, x):
        x = self.groups(self.depthwise(self.stem(x)))
        x = x.flatten(2).transpose(1, 2)
        x = x * self.scale.exp() + self.table[self.index]
        x = self.mix(x)
        x = torch.einsum("bnd,de->bne", x, self.matrix) + x @ self.matrix
        x = torch.where(x > 0, x, x * self.scale)
        chosen = torch.where(torch.rand(len(x), 1, 1) > 0.5, self.table[0], self.scale)
        x = x + 0 * chosen + self.table[None, :1]
        x[:, 0] = self.scale
        return self.head(self.norm(x).mean(1))


def test_bare_parameters_in_unusual_places_are_exact():
    torch.manual_seed(0)
    model = Odd().double()
    images, labels = some(4)
    got = DifferentialPrivacy(clip=CLIP).clipped_sum(model, F.cross_entropy, Batch(images, labels))
    assert_same(got, micro_batches(model, F.cross_entropy, images, labels))


def test_a_tensor_with_a_row_for_each_example_made_from_parameters_is_exact():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(8)) for _ in range(2))
            self.stem, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 10)

        def forward(self, x):
            pick = torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None, None]
            rows = pick * self.a + (1 - pick) * self.b
            return self.head((self.stem(x).flatten(2).mT + rows).tanh().mean(1))

    torch.manual_seed(0)
    model = Rows().double()
    images, labels = some(4)
    losses = F.cross_entropy(model(images), labels, reduction="none")
    wanted = torch.stack([torch.autograd.grad(v, model.a, retain_graph=True)[0] for v in losses])
    engine = Engine()
    with engine.watch(model, images) as tape:
        outputs = model(images)
    F.cross_entropy(outputs, labels, reduction="sum").backward()
    assert torch.allclose(tape.collect()["a"].samples(), wanted)


@pytest.mark.parametrize("family", ["vit", "average-pooling", "eva-02", "hugging-face", "swin"])
def test_norms_and_sums_under_bfloat16_autocast_are_those_of_a_micro_batch_loop(family):
    model = build(family, torch.float32)
    images, labels = some(4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        engine = Engine()
        with engine.watch(model, images) as tape:
            outputs = model(images)
        F.cross_entropy(logits_of(outputs), labels, reduction="sum").backward()
        got = clipped_sum(tape, CLIP)
        expected = micro_batches(model, F.cross_entropy, images, labels)
        alone = [
            micro_batches(model, F.cross_entropy, images[i : i + 1], labels[i : i + 1], clip=1e9)
            for i in range(4)
        ]
    norms = torch.stack([torch.stack([g.norm() for g in one.values()]).norm() for one in alone])
    eps = torch.finfo(torch.bfloat16).eps  # 2^-7: one rounding; the passes differ by a few
    assert got.norms.dtype == torch.float32
    assert torch.allclose(got.norms, norms, rtol=4 * eps)
    total = torch.cat([g.flatten() for g in expected.values()])
    moved = torch.cat([got.sums[k].flatten() for k in model_names(model, expected)])
    assert (moved - total).norm() <= 4 * eps * total.norm()
    assert all(s.dtype == torch.float32 for s in got.sums.values())


def test_clipping_keeps_its_precision_inside_an_autocast_block():
    model = build("vit", torch.float32)
    images, labels = some(1, torch.float32)

    def loud(outputs, y):
        return 1e3 * F.cross_entropy(outputs, y)

    with torch.autocast("cpu", torch.bfloat16):
        sums = DifferentialPrivacy(clip=CLIP).clipped_sum(model, loud, Batch(images, labels))
    assert all(s.dtype == torch.float32 for s in sums.values())
    norm = torch.cat([s.double().flatten() for s in sums.values()]).norm().item()
    assert norm == pytest.approx(CLIP, rel=1e-5)


def model_names(model, gradients):
    """Return the model's own names in the order of base names."""
    own = {canonical_name(k): k for k, _ in model.named_parameters()}
    return [own[k] for k in gradients]


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_float16_autocast_is_refused(engine):
    if engine == "opacus":
        pytest.importorskip("opacus")
    model, (images, labels) = build("vit", torch.float32), some(2, torch.float32)
    with torch.autocast("cpu", torch.float16), pytest.raises(Incompatible, match="bfloat16"):
        DifferentialPrivacy(engine=engine).clipped_sum(
            model, F.cross_entropy, Batch(images, labels)
        )


class Reads(nn.Module):
    """Reads the first `count` tokens only, so the others get no gradient in the last layers."""

    def __init__(self, count):
        super().__init__()
        self.count, self.stem = count, nn.Conv2d(3, 8, 8, 8)
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 24), nn.GELU())
        self.out, self.head = nn.Linear(24, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        x = x + self.out(self.mlp(self.norm(x)))
        return self.head(x[:, : self.count].mean(1))


@pytest.mark.parametrize("count", [1, 3, 15, 16])
@pytest.mark.parametrize("rule", [True, False])
def test_tokens_without_a_gradient_are_left_out_exactly(count, rule, monkeypatch):
    monkeypatch.setattr("vitguard.defenses.privacy.functions.prefer_products", lambda *sizes: rule)
    torch.manual_seed(0)
    model = Reads(count).double()
    images, labels = some(4)
    got = DifferentialPrivacy(clip=CLIP).clipped_sum(model, F.cross_entropy, Batch(images, labels))
    assert_same(got, micro_batches(model, F.cross_entropy, images, labels))


def test_a_first_example_without_a_gradient_hides_nobody_elses():
    model = build("average-pooling")
    images, labels = some(4)

    def silent_for_the_first(outputs, y):
        return (F.cross_entropy(outputs, y, reduction="none") * (y != labels[0])).mean()

    labels[1:] = (labels[0] + torch.tensor([1, 2, 3])) % 10
    loss = silent_for_the_first
    got = DifferentialPrivacy(clip=CLIP).clipped_sum(model, loss, Batch(images, labels))
    assert_same(got, micro_batches(model, loss, images[1:], labels[1:]))


@pytest.mark.parametrize("activation", [nn.GELU("tanh"), nn.SiLU(), nn.ReLU(), nn.Dropout(0.0)])
def test_activations_made_again_are_exact(activation):
    torch.manual_seed(0)
    model = Reads(16).double()
    model.mlp[1] = activation
    images, labels = some(4)
    got = DifferentialPrivacy(clip=CLIP).clipped_sum(model, F.cross_entropy, Batch(images, labels))
    assert_same(got, micro_batches(model, F.cross_entropy, images, labels))


def test_an_activation_changed_in_place_is_not_made_again_from_its_input():
    class InPlace(Reads):
        def forward(self, x):
            x = self.stem(x).flatten(2).mT
            middle = F.gelu(self.mlp[0](self.norm(x)))
            middle.mul_(3)
            return self.head((x + self.out(middle)).mean(1))

    torch.manual_seed(0)
    model = InPlace(16).double()
    images, labels = some(4)
    got = DifferentialPrivacy(clip=CLIP).clipped_sum(model, F.cross_entropy, Batch(images, labels))
    assert_same(got, micro_batches(model, F.cross_entropy, images, labels))


# what must be refused


def refused(model, match, images=None):
    images = some()[0] if images is None else images
    with pytest.raises(Incompatible, match=match):
        DifferentialPrivacy().clipped_sum(
            model, F.cross_entropy, Batch(images, torch.zeros(len(images), dtype=torch.long))
        )


def test_shared_parameters_are_refused():
    model = build("vit")
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    refused(model, "shared with")


def test_batch_norm_is_refused():
    model = build("vit")
    model.norm = nn.BatchNorm1d(32).double()
    refused(model, "mix examples")


def test_checkpoints_that_no_switch_tells_of_are_refused_too():
    model = build("vit")
    plain = model.blocks[0].forward
    model.blocks[0].forward = lambda x: checkpoint(plain, x, use_reentrant=False)
    refused(model, "checkpointing in its forward pass")


def test_activation_checkpointing_is_refused():
    model = build("vit")
    model.set_grad_checkpointing(True)
    refused(model, "checkpointing")


class Mixing(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.body, self.head = how, nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.body(x).flatten(2).mean(2)
        if self.how == "mean":
            x = x - x.mean(0)
        if self.how == "roll":
            x = x.roll(1, 0)
        if self.how == "transposed":
            return self.head(x.t().reshape(-1, 8)[: len(x)])
        return self.head(x)


@pytest.mark.parametrize("how", ["mean", "roll", "transposed"])
def test_models_that_mix_examples_are_refused(how):
    torch.manual_seed(0)
    refused(Mixing(how).double(), "that example alone")


def test_a_loss_around_the_clipping_is_refused():
    model = build("vit")
    images, labels = some()

    def leaky(outputs, y):
        return F.cross_entropy(outputs, y) + model.head.weight.square().sum()

    with pytest.raises(Unprotected, match=r"head\.weight"):
        DifferentialPrivacy().clipped_sum(model, leaky, Batch(images, labels))


def test_padding_counts_for_nothing():
    model = build("vit")
    images, labels = some()
    engine = Engine()
    with engine.watch(model, images) as tape:
        outputs = model(images)
    F.cross_entropy(outputs, labels).backward()
    got = clipped_sum(tape, CLIP, scale=3, real=2).sums
    assert_same(got, micro_batches(model, F.cross_entropy, images[:2], labels[:2]))


def test_settings_survive_pickling():
    defense = DifferentialPrivacy(epsilon=8.0, epochs=3)
    assert pickle.loads(pickle.dumps(defense)) == defense
