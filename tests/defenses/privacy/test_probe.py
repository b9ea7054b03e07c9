"""Models in which examples meet, or that learn from the data in passing, are refused."""

import copy
import itertools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import CHECKED
from tests.defenses.privacy.privacy_models import WINDOWED, build
from tests.fast import crossed
from vitguard.core import Batch
from vitguard.defenses.positions import FixedPositions
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.errors import Incompatible
from vitguard.guard import protect


class Whole(nn.Module):
    """Treats each example alone, whatever it does in between."""

    def forward(self, x):
        return x


class DetachedMean(nn.Module):
    def forward(self, x):
        return x - x.detach().mean(0, keepdim=True)


class DetachedMeanOfOthers(nn.Module):
    """Moves nothing when example 1 or 2 changes: only the first one is looked at."""

    def forward(self, x):
        return x - x[:1].detach()


class AboveAShareOfTheLargest(nn.Module):
    """Keeps the tokens whose norm is above a share of the batch's largest."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        norms = x.detach().norm(dim=-1, keepdim=True)
        return x * (norms > self.share * norms.max())


class RunningMean(nn.Module):
    def __init__(self, *, used=True):
        super().__init__()
        self.register_buffer("average", torch.zeros(()))
        self.used = used

    def forward(self, x):
        if self.training:
            self.average.mul_(0.9).add_(0.1 * x.detach().mean().float())
        return x - self.average if self.used else x


class RunningMeanInAnAttribute(nn.Module):
    average = 0.0

    def forward(self, x):
        before, self.average = self.average, 0.9 * self.average + 0.1 * float(x.detach().mean())
        return x - before


class Queue(nn.Module):
    """A memory bank of the last batch, in a list."""

    def __init__(self):
        super().__init__()
        self.last = [torch.zeros(())]

    def forward(self, x):
        out = x - self.last[0].to(x)
        self.last[0] = x.detach().mean()
        return out


class _ScaledBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g / (g.flatten(1).norm(dim=1).max() + 1e-12)


class ScaledGradient(nn.Module):
    def forward(self, x):
        return _ScaledBack.apply(x)


class _RolledBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g + 0.1 * g.roll(1, 0)


class RolledGradient(nn.Module):
    def forward(self, x):
        return _RolledBack.apply(x)


class BySizeOfBatch(nn.Module):
    def forward(self, x):
        return x * (1 + 1 / len(x))


class ByPlaceInBatch(nn.Module):
    def forward(self, x):
        return x * torch.linspace(1, 2, 8).to(x)[: len(x), None, None]


class LearningParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        self.centre.data.lerp_(x.detach().mean().to(self.centre), 0.1)
        return x


def fake_quantize():
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    return FakeQuantize(MovingAverageMinMaxObserver)


def observer():
    from torch.ao.quantization import MinMaxObserver

    return MinMaxObserver()


MEETING = {
    "detached batch mean": (DetachedMean, "forward pass"),
    "the first example": (DetachedMeanOfOthers, "forward pass"),
    "tokens above half": (lambda: AboveAShareOfTheLargest(0.5), "forward pass"),
    "tokens above a hundredth": (lambda: AboveAShareOfTheLargest(0.01), "forward pass"),
    "tokens above 98 %": (lambda: AboveAShareOfTheLargest(0.98), "forward pass"),
    "fake quantize": (fake_quantize, r"blocks\.0\.norm1\.1\."),
    "observer": (observer, r"min_val|max_val"),
    "running mean": (RunningMean, r"average, which learns"),
    "running mean, unused": (lambda: RunningMean(used=False), r"average, which learns"),
    "running mean in an attribute": (RunningMeanInAnAttribute, "remembers an earlier batch"),
    "queue": (Queue, "remembers an earlier batch"),
    "gradient by the batch's largest": (ScaledGradient, "backward pass|that example alone"),
    "rolled gradient": (RolledGradient, "backward pass|that example alone"),
    "size of the batch": (BySizeOfBatch, "left out"),
    "place in the batch": (ByPlaceInBatch, "left out"),
    "a parameter that learns": (LearningParameter, r"centre, which learns"),
}


def with_layer(layer, dtype=torch.float32, **settings):
    model = build("vit_tiny_patch16_224", dtype, **settings)
    if isinstance(layer, AboveAShareOfTheLargest) and layer.share < 0.9:
        model.norm_pre = layer  # before any norm
    else:
        model.blocks[0].norm1 = nn.Sequential(model.blocks[0].norm1, layer)
    return model.train()


def some(count=3, dtype=torch.float32):
    torch.manual_seed(3)
    return torch.randn(count, 3, 32, 32, dtype=dtype), torch.randint(0, 10, (count,))


def clipped_sum(model, count=3, **settings):
    images, labels = some(count, next(model.parameters()).dtype)
    defense = DifferentialPrivacy(**settings)
    return defense.clipped_sum(model, F.cross_entropy, Batch(images, labels))


@pytest.mark.parametrize(
    ("name", "count", "engine"), crossed(MEETING, [1, 3], ["bookkeeping", "opacus"])
)
def test_a_model_in_which_examples_meet_is_refused_at_the_first_clipped_sum(name, count, engine):
    if engine == "opacus":
        pytest.importorskip("opacus")
    make, match = MEETING[name]
    with pytest.raises(Incompatible, match=match):
        clipped_sum(with_layer(make()), count, engine=engine)


@pytest.mark.parametrize("name", MEETING)
def test_a_model_in_which_examples_meet_is_refused_by_prepare(name):
    pytest.importorskip("opacus")
    make, match = MEETING[name]
    model = with_layer(make())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    guard = protect(model, [DifferentialPrivacy(noise=1.0, delta=1e-3)])
    loader = DataLoader(TensorDataset(*some(24)), batch_size=6)
    with pytest.raises(Incompatible, match=match):
        guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), loader)
    after = guard.export()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


class Counter(nn.Module):
    """Counts passes: a buffer that changes without the data."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.seen = []

    def forward(self, x):
        self.passes.add_(1)
        self.seen.append(len(x))
        return x


class Ramp(nn.Module):
    """Changes from pass to pass, whatever the passes are of."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += self.training
        return x * (1 + 0.1 * self.passes)


class GeneratorOfItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        if not self.training:
            return x
        return x + 0.1 * torch.randn(x.shape, generator=self.generator).to(x)


class SkippedAtRandom(nn.Module):
    """Layer drop for the whole batch, by Python's generator."""

    def forward(self, x):
        return x if self.training and random.random() < 0.5 else 2 * x


FINE = {
    "counter": Counter,
    "ramp": Ramp,
    "dropout": lambda: nn.Dropout(0.3),
    "generator of its own": GeneratorOfItsOwn,
    "skipped at random": SkippedAtRandom,
    "norm of each example": lambda: nn.GroupNorm(1, 17),
}


@pytest.mark.parametrize("name", FINE)
def test_a_model_that_treats_each_example_alone_passes_and_is_left_as_it_was(name):
    layer = FINE[name]()
    model = with_layer(layer, drop_path_rate=0.2, proj_drop_rate=0.1)
    before = copy.deepcopy(model.state_dict())
    images, _ = some()
    torch.manual_seed(8)
    random.seed(8)
    state = torch.random.get_rng_state(), random.getstate()
    from vitguard.defenses.privacy.engine import Engine
    from vitguard.defenses.privacy.probe import probe

    model.head.weight.grad = gradient = torch.ones_like(model.head.weight)
    probe(model, Engine(), (images,))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert CHECKED or random.getstate() == state[1]
    assert model.head.weight.grad is gradient
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert getattr(layer, "seen", []) == [] and getattr(layer, "passes", 0) == 0
    clipped_sum(model)


STACKS = {
    "shuffle": [PatchShuffle(ratio=0.5, mask="uniform")],
    "one draw": [PatchShuffle(ratio=0.5, draw="batch")],
    "dal over tokens": [FixedPositions("sincos"), PatchShuffle(ratio=0.5, dal="tokens")],
    "dal over positions": [PatchShuffle(ratio=0.5, dal="positions", steps=100, warmup=2)],
}


@pytest.mark.slow
@pytest.mark.parametrize(("stack", "drop"), crossed(STACKS, [0.3, 0.0]))
def test_stacks_with_dropout_and_drop_path_pass_and_their_schedules_stay(stack, drop):
    pytest.importorskip("opacus")
    model = build(
        "swin_tiny_patch4_window7_224" if stack == "one draw" else "vit_tiny_patch16_224",
        torch.float32,
        **({"sizes": WINDOWED} if stack == "one draw" else {}),
        drop_path_rate=drop,
        proj_drop_rate=drop,
    )
    guard = protect(model, [*STACKS[stack], DifferentialPrivacy(noise=1.0, delta=1e-3)])
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(TensorDataset(*some(24)), batch_size=6)
    guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), loader)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert guard.truth() == {}


def test_a_pass_of_one_example_proves_nothing_about_a_layer_that_mixes():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True) if len(x) > 1 else x

    with pytest.raises(Incompatible, match="that example alone"):
        clipped_sum(with_layer(Centred()), 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hook", "layer", "forward", "mode"])
def test_what_is_added_to_a_model_later_is_tried_out_anew(how):
    model = with_layer(Whole())
    clipped_sum(model)
    mixing = DetachedMean()
    if how == "hook":
        model.blocks[1].register_forward_hook(lambda module, args, out: mixing(out))
    elif how == "layer":
        model.blocks[0].norm1[1] = mixing
    elif how == "forward":
        model.blocks[0].norm1[1].forward = mixing.forward
    else:
        model.blocks[0].norm1[1] = InTraining().eval()
        clipped_sum(model)
        model.train()
    with pytest.raises(Incompatible, match="forward pass"):
        clipped_sum(model, 1)


class InTraining(nn.Module):
    def forward(self, x):
        return x - x.detach().mean(0) if self.training else x


def test_a_hook_added_in_the_middle_of_training_is_refused_at_the_next_pass():
    pytest.importorskip("opacus")
    model = with_layer(Whole())
    guard = protect(model, [DifferentialPrivacy(noise=1.0, delta=1e-3)])
    loader = DataLoader(TensorDataset(*some(24)), batch_size=6)
    optimizer, loader = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), loader)
    batches = iter(loader)
    images, labels = next(batches)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.blocks[1].register_forward_hook(lambda module, args, out: DetachedMean()(out))
    images, labels = next(batches)
    with pytest.raises(Incompatible, match="forward pass"):
        model(images)


def test_a_model_is_tried_out_once_for_each_structure():
    counter = Counter()
    model = with_layer(counter)
    calls = []
    counter.register_forward_hook(lambda *_: calls.append(1))
    clipped_sum(model)
    first = len(calls)
    clipped_sum(model)
    assert first > 2 and len(calls) == first + 1


def test_what_prepare_has_tried_out_is_not_tried_out_again_by_the_loop():
    pytest.importorskip("opacus")
    counter, calls = Counter(), []
    model = with_layer(counter)
    counter.register_forward_hook(lambda *_: calls.append(1))
    guard = protect(model, [DifferentialPrivacy(noise=1.0, delta=1e-3)])
    loader = DataLoader(TensorDataset(*some(24)), batch_size=6)
    _, loader = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), loader)
    assert len(calls) > 10
    calls.clear()
    model(next(iter(loader))[0])
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"by": "mean"}),
        ({"by": None}, {"by": "mean"}),
        ({"by": "one"}, {"by": "mean"}),
        ({}, {}),
    ],
    ids=["an argument more", "none before", "another word", "autocast"],
)
def test_a_pass_of_another_kind_is_tried_out_anew(first, then):
    pytest.importorskip("opacus")
    under, model = not then, with_layer(Whole())
    plain = model.forward

    def forward(x, by=""):
        meets = torch.is_autocast_enabled("cpu") if under else by == "mean"
        return plain(x - x.detach().mean(0) if meets else x)

    model.forward = forward
    guard = protect(model, [DifferentialPrivacy(noise=1.0, delta=1e-3)])
    loader = DataLoader(TensorDataset(*some(24)), batch_size=6)
    optimizer, loader = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), loader)
    batches = iter(loader)
    images, labels = next(batches)
    F.cross_entropy(model(images, **first), labels).backward()
    optimizer.step()
    images, _ = next(batches)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=under),
        pytest.raises(Incompatible, match="that example alone"),
    ):
        model(images, **then)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_small_share_of_the_batch_mean_is_seen(dtype):
    class Slightly(nn.Module):
        def forward(self, x):
            share = 0.3 if x.dtype == torch.bfloat16 else 1e-2
            return x - share * x.detach().mean(0, keepdim=True)

    model = with_layer(Slightly(), torch.float64 if dtype == torch.float64 else torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        pytest.raises(Incompatible, match="forward pass"),
    ):
        clipped_sum(model)


def test_a_plain_model_passes_under_bfloat16_autocast():
    model = with_layer(Whole(), drop_path_rate=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        clipped_sum(model)


def test_a_model_whose_passes_cannot_be_repeated_says_so():
    passes = itertools.count()  # a source that no seed of torch reaches, and never twice the same

    class Unrepeatable(nn.Module):
        def forward(self, x):
            return x * (1 + next(passes) / 1000) if self.training else x

    with pytest.raises(Incompatible, match="cannot be repeated"):
        clipped_sum(with_layer(Unrepeatable()))
