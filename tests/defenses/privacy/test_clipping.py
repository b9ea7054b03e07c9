"""Each way to clip: beside a slow loop, in the loop of a trainer, and attacked."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.conftest import small_vit
from tests.defenses.privacy.privacy_models import build
from vitguard import data
from vitguard.core import Batch
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.defenses.privacy.clipping import clipping_factors
from vitguard.errors import InputError
from vitguard.guard import protect
from vitguard.registry import parse_stack

KINDS = ["flat", "automatic", "per_layer"]
CLIP = 0.5


def one_by_one(model, images, labels, clipping):
    """The slow obvious way: plain autograd of one example, clipped as the papers have it."""
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    total = {k: torch.zeros_like(p) for k, p in trained.items()}
    layers = sorted({k.rsplit(".", 1)[0] if "." in k else "" for k in trained})
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        found = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
        gradient = dict(zip(trained, found, strict=True))
        groups = [list(trained)]
        if clipping == "per_layer":
            groups = [[k for k in trained if k.rpartition(".")[0] == name] for name in layers]
        for names in groups:
            bound = CLIP / math.sqrt(len(groups))
            length = math.sqrt(sum(float(gradient[k].square().sum()) for k in names))
            shrink = bound / (length + 0.01) if clipping == "automatic" else min(
                1.0, bound / max(length, 1e-300)
            )  # fmt: skip
            for k in names:
                total[k] += gradient[k] * shrink
    return total


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
@pytest.mark.parametrize("clipping", KINDS)
def test_every_way_to_clip_is_that_of_a_slow_loop(clipping, engine):
    model = build("vit")
    torch.manual_seed(4)
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    defense = DifferentialPrivacy(clip=CLIP, clipping=clipping, engine=engine)
    got = defense.clipped_sum(model, F.cross_entropy, Batch(images, labels))
    wanted = one_by_one(model, images, labels, clipping)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-6 * value.norm() + 1e-12, name


def test_no_way_to_clip_lets_an_example_move_the_sum_by_more_than_the_clip():
    torch.manual_seed(5)
    for _ in range(200):
        names = [f"blocks.{i}.{part}" for i in range(5) for part in ("weight", "bias")]
        size = 10 ** float(torch.empty(1).uniform_(-6, 9))
        norms = {k: torch.rand(3, dtype=torch.float64) * size for k in names}
        for clipping in KINDS:
            some = dict(list(norms.items())[: int(torch.randint(1, 11, (1,)))])
            factors = clipping_factors(some, CLIP, clipping, names)
            moved = sum((norms[k] * factors[k]).square() for k in some)
            assert bool((moved.sqrt() <= CLIP * (1 + 1e-12)).all()), clipping


def test_layers_that_an_example_does_not_meet_keep_their_share_of_the_clip():
    """A bound that hung on what a batch meets would tell which records are in it."""
    names = ["stem.weight", "head.weight", "adapter.weight", "adapter.bias"]
    norms = {"head.weight": torch.tensor([9.0])}
    factors = clipping_factors(norms, CLIP, "per_layer", names)
    assert float(factors["head.weight"]) * 9 == pytest.approx(CLIP / math.sqrt(3))


@pytest.mark.parametrize("clipping", KINDS)
def test_the_loop_clips_as_the_update_does_and_the_ledger_is_the_same(clipping):
    records = TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6))
    model = build("vit", torch.float32)
    start = copy.deepcopy(model)
    guard = protect(
        model, [DifferentialPrivacy(noise=0.0, clip=CLIP, clipping=clipping, delta=0.1)]
    )
    optimizer, loader = guard.prepare(
        torch.optim.SGD(model.parameters(), 1.0), DataLoader(records, 6)
    )
    assert len(loader) == 1  # every record takes part
    images, labels = next(iter(loader))
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    moved = {k: (start.get_parameter(k) - p.detach()) * 6 for k, p in model.named_parameters()}
    alone = DifferentialPrivacy(clip=CLIP, clipping=clipping)
    wanted = alone.clipped_sum(start, F.cross_entropy, Batch(images, labels))
    for name, value in wanted.items():
        assert (moved[name] - value).norm() <= 1e-3 * CLIP, name
    plain = protect(build("vit"), [DifferentialPrivacy(noise=1.3, delta=0.1)])
    other = protect(build("vit"), [DifferentialPrivacy(noise=1.3, delta=0.1, clipping=clipping)])
    for each in (plain, other):
        each.update(torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.arange(2))
    assert plain.privacy_spent() == other.privacy_spent()


def test_settings_are_read_from_a_spec_and_other_words_are_refused():
    (defense,) = parse_stack("privacy:noise=1.0,clipping=per_layer")
    assert defense == DifferentialPrivacy(noise=1.0, clipping="per_layer")
    assert list(parse_stack(defense.spec())) == [defense]
    with pytest.raises(InputError, match="flat, automatic or per_layer, got 'ghost'"):
        DifferentialPrivacy(clipping="ghost")


@pytest.mark.parametrize("clipping", KINDS)
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_clipping_without_noise_is_no_protection_however_it_is_done(clipping, noise, photo):
    """Layers that are clipped one by one have factors that the adversary has to find first."""
    stack = [DifferentialPrivacy(noise=noise, clipping=clipping)]
    batch, attacks = (photo, torch.tensor([3])), ["position", "position-robust"]
    report = vg.audit(small_vit(), batch, defenses=stack, attacks=attacks)
    assert [f.verdict for f in report.findings if f.defended] == ["leaks", "leaks"]
    assert all(f.patch_psnr.max > 50 for f in report.findings)


def test_positions_are_no_longer_read_where_nothing_tells_the_factor_of_their_layer(photo):
    """What does not apply says nothing, and `resisted` would be a lie: other attacks read it."""
    model = small_vit()
    model.patch_embed.proj.bias = None
    stack = [DifferentialPrivacy(noise=0.0, clip=1e-3, clipping="per_layer")]
    report = vg.audit(model, (photo, torch.tensor([3])), defenses=stack, attacks="position")
    (found,) = (f for f in report.findings if f.defended)
    assert found.verdict == "not applicable" and "a factor of its own" in found.reason


@pytest.mark.slow
def test_a_batch_whose_layers_are_clipped_one_by_one_is_read_by_what_reads_it_clipped_as_a_whole():
    """In a batch every example has its own factor in every layer; row spaces do not see them."""
    images = data.sample_images((16, 16), count=2).pixels
    stacks = {k: [DifferentialPrivacy(noise=0.0, clipping=k)] for k in ("flat", "per_layer")}
    report = vg.audit(
        small_vit(), (images, torch.arange(2)), defenses=stacks, attacks="gelu-span:seconds=8",
        batch_size=2,
    )  # fmt: skip
    assert {f.defense: f.verdict for f in report.findings if f.defended} == {
        "flat": "leaks", "per_layer": "leaks",
    }  # fmt: skip
