"""Dense absolute localization: its loss, its heads and its weight."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

from tests.fast import crossed
from vitguard.core import Update
from vitguard.defenses.positions import FixedPositions
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.defenses.shuffle.localization import (
    LocalizationHead,
    coordinates,
    dal_weight,
    localization_loss,
)
from vitguard.errors import Incompatible, InputError, Unprotected
from vitguard.guard import protect


def net(**settings):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2,
        num_classes=5, **settings,
    )  # fmt: skip


def seeded():
    return torch.Generator().manual_seed(0)


IMAGES, LABELS = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])


def test_coordinates_are_row_and_column_in_the_unit_interval():
    c = coordinates((3, 5))
    assert c.shape == (15, 2)
    assert c[7].tolist() == [0.5, 0.5]
    assert c[4].tolist() == [0.0, 1.0]
    assert coordinates((1, 1)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("kind", ["linear", "mlp", "pca"])
def test_the_loss_is_the_mean_error_over_kept_patches(kind):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 12, 8, generator=generator)
    kept = torch.rand(3, 12, generator=generator) > 0.3
    head = None if kind == "pca" else LocalizationHead(8, kind, generator)
    loss = localization_loss(vectors, kept, (3, 4), head)
    for i in range(3):
        alone = localization_loss(vectors[i : i + 1], kept[i : i + 1], (3, 4), head)
        assert torch.allclose(loss[i], alone[0], atol=1e-6)
        if head is not None:
            wanted = (head(vectors[i]) - coordinates((3, 4))).abs().sum(1)[kept[i]].mean()
            assert torch.allclose(loss[i], wanted)


@pytest.mark.parametrize("kind", ["linear", "pca"])
def test_shuffled_patches_have_no_part_in_the_loss(kind):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 12, 8, generator=generator, requires_grad=True)
    kept = torch.rand(2, 12, generator=generator) > 0.4
    kept[1] = False
    head = None if kind == "pca" else LocalizationHead(8, "linear", generator)
    loss = localization_loss(vectors, kept, (3, 4), head)
    (gradient,) = torch.autograd.grad(loss.sum(), vectors)
    assert loss[1] == 0
    assert (gradient[~kept] == 0).all()
    assert (gradient[0][kept[0]].abs().sum(1) > 0).all()


def test_principal_components_find_positions_that_lie_on_a_plane():
    plane = coordinates((6, 6)) @ torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    kept = torch.ones(1, 36, dtype=torch.bool)
    assert float(localization_loss(3 * plane[None] + 1, kept, (6, 6), None)) < 1e-3
    noise = torch.randn(1, 36, 20, generator=torch.Generator().manual_seed(2))
    assert float(localization_loss(noise, kept, (6, 6), None)) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "dal"), crossed(["linear", "mlp", "pca"], ["positions", "tokens"])
)
def test_dal_learns_to_localize(dal, head):
    model = net()
    guard = protect(
        model, [PatchShuffle(0.3, dal=dal, dal_head=head, dal_weight=1.0)],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        model(IMAGES)
        loss = guard.auxiliary_loss()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("dal", ["positions", "tokens"])
def test_per_example_losses_average_to_the_auxiliary_loss_and_are_read_once(dal):
    guard = protect(net(), [PatchShuffle(0.5, dal=dal)], generator=torch.Generator())
    piece = guard.model.vitguard.shuffle
    piece.key_examples(torch.tensor([5, 6, 7]))
    guard.model(IMAGES)
    each = piece.per_example_auxiliary()
    assert each.shape == (3,)
    guard.model(IMAGES)
    assert torch.allclose(each.mean(), guard.auxiliary_loss())
    assert guard.auxiliary_loss() == 0


def test_dal_of_an_example_does_not_depend_on_the_others():
    guard = protect(net(), [PatchShuffle(0.5, dal="tokens")])
    piece = guard.model.vitguard.shuffle
    piece.key_examples(torch.tensor([5, 6, 7]))
    guard.model(IMAGES)
    together = piece.per_example_auxiliary()
    piece.key_examples(torch.tensor([6]))
    guard.model(IMAGES[1:2])
    assert torch.allclose(together[1], piece.per_example_auxiliary()[0], atol=1e-6)


def test_an_auxiliary_loss_never_read_makes_the_next_training_forward_raise():
    guard = protect(net(), [PatchShuffle(0.5, dal="tokens")])
    guard.model(IMAGES)
    with pytest.raises(Unprotected, match="never read"):
        guard.model(IMAGES)
    guard.model(IMAGES)  # said once, then the loop may go on
    guard.auxiliary_loss()
    with torch.no_grad():  # nothing to read without a gradient
        guard.model(IMAGES)
        guard.model(IMAGES)
    guard.model.eval()(IMAGES)
    assert guard.auxiliary_loss() == 0


def test_an_auxiliary_loss_never_read_makes_the_step_and_the_seal_after_one_pass_raise():
    model = net()
    guard = protect(model, [PatchShuffle(0.5, dal="tokens")])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.head.weight.detach().clone()
    model(IMAGES).sum().backward()
    with pytest.raises(Unprotected, match="never read before the optimizer's step"):
        optimizer.step()
    assert torch.equal(model.head.weight, before)
    model(IMAGES).sum().backward()
    update = Update({"head.weight": model.head.weight.grad})
    with pytest.raises(Unprotected, match="never read before the update was sealed"):
        guard.seal(update)
    (model(IMAGES).sum() + guard.auxiliary_loss()).backward()
    optimizer.step()
    assert guard.seal(update).tensors


@pytest.mark.parametrize("dal", ["tokens", "positions"])
def test_the_loss_of_an_empty_batch_is_zero(dal):
    model = net()
    guard = protect(model, [PatchShuffle(0.5, dal=dal)])
    model(IMAGES[:0])
    loss = guard.auxiliary_loss()
    loss.backward()
    assert loss == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_dal_over_positions_leaves_masked_rows_without_gradient():
    model = net()
    guard = protect(model, [PatchShuffle(0.5, dal="positions")])
    update = guard.update(IMAGES[:1], LABELS[:1])
    zero = update.read("pos_embed")[0, 1:].eq(0).all(1)
    assert torch.equal(zero, guard.truth()["shuffled"][0])


def test_weight_rises_over_the_warm_up_and_falls_along_a_cosine():
    weights = [dal_weight(t, weight=0.01, final=0.005, warmup=10, steps=110) for t in range(130)]
    assert weights[0] == pytest.approx(0.001)
    assert weights[9] == weights[10] == pytest.approx(0.01)
    assert weights[60] == pytest.approx(0.0075)
    assert weights[110] == weights[129] == pytest.approx(0.005)
    assert weights[35] == pytest.approx(0.005 + 0.005 * (1 + math.cos(math.pi / 4)) / 2)
    assert dal_weight(500, weight=0.01, final=0.005, warmup=0, steps=0) == 0.01


def test_weight_follows_the_optimizer_steps():
    model = net()
    guard = protect(model, [PatchShuffle(0.0, dal="tokens", dal_weight=1, warmup=4, steps=10)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = []
    for _ in range(4):
        model(IMAGES)
        losses.append(guard.auxiliary_loss())
        losses[-1].backward()
        optimizer.step()
    ratios = [(x / losses[-1]).item() for x in losses]
    assert ratios == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=1e-4)


def test_dal_over_fixed_positions_is_refused_with_what_to_change():
    for stack in (
        [FixedPositions(), PatchShuffle(dal="positions")],
        [PatchShuffle(dal="positions"), FixedPositions("frozen")],
    ):
        with pytest.raises(Incompatible, match="Use dal='tokens'"):
            protect(net(), stack)
    protect(net(), [FixedPositions(), PatchShuffle(dal="tokens")])
    with pytest.raises(Incompatible, match="learnable positions"):
        protect(net(pos_embed="none"), [PatchShuffle(dal="positions")])


def test_dal_over_tokens_is_refused_where_tokens_merge_or_drop():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2),
        window_size=4, num_classes=5,
    )  # fmt: skip
    with pytest.raises(Incompatible, match="width 16 instead of 8"):
        protect(swin, [PatchShuffle(dal="tokens")])
    with pytest.raises(Incompatible, match="patch dropout"):
        protect(net(patch_drop_rate=0.5), [PatchShuffle(dal="tokens")])


def test_dal_needs_the_whole_model():
    guard = protect(net(), [PatchShuffle(0.5, dal="positions")])
    guard.model.forward_features(IMAGES)
    with pytest.raises(Unprotected, match="Call the model itself"):
        guard.auxiliary_loss()


class Reentrant(torch.nn.Sequential):
    def forward(self, x):
        for block in self:
            x = checkpoint(block, x, use_reentrant=True)
        return x


def test_checkpointing_of_the_blocks_changes_no_gradient():
    plain, reentrant = net(), net()
    reentrant.blocks = Reentrant(*reentrant.blocks)
    gradients = []
    for model, enabled in ((plain, False), (plain, True), (reentrant, False)):
        if model is not plain or not enabled:
            guard = protect(
                model, [PatchShuffle(0.5, dal="tokens", dal_weight=1)], generator=seeded()
            )
        model.set_grad_checkpointing(enabled)
        model.vitguard.shuffle.key_examples(torch.arange(3))
        model.zero_grad()
        (model(IMAGES).sum() + guard.auxiliary_loss()).backward()
        gradients.append(model.patch_embed.proj.weight.grad.clone())
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)
    assert torch.allclose(gradients[0], gradients[2], atol=1e-5)


@pytest.mark.parametrize("setting", [{"dal": "pixels"}, {"dal_head": "deep"}, {"dal_weight": -1.0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError):
        PatchShuffle(**setting)
