"""Batch floor: few tokens never leave, many do, and one image that dominates is another matter."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitguard as vg
from tests.conftest import small_vit
from vitguard.core import Update
from vitguard.defenses.base import Draws
from vitguard.defenses.batch_floor import BatchFloor
from vitguard.errors import Incompatible, InputError, Unprotected
from vitguard.guard import protect
from vitguard.vit import Anatomy

MODEL = small_vit()
ANATOMY = Anatomy.of(MODEL)  # 17 tokens, 96 wide


@given(st.integers(1, 40), st.sampled_from([1.0, 1.5, 4.0]))
def test_no_update_leaves_whose_tokens_are_fewer_than_a_multiple_of_the_width(images, multiple):
    floor = BatchFloor(multiple)
    update = Update({"blocks.0.mlp.fc1.weight": torch.ones(4, 96)}, batch_size=images)
    if images * ANATOMY.tokens >= multiple * ANATOMY.width:
        assert floor.seal(update, ANATOMY, Draws()) is update
    else:
        with pytest.raises(Unprotected, match="nothing was released"):
            floor.seal(update, ANATOMY, Draws())


@pytest.mark.parametrize(
    "name", ["patch_embed.proj.weight", "pos_embed", "blocks.1.attn.proj.bias"]
)
def test_any_readable_tensor_of_embedding_or_blocks_counts_and_the_head_does_not(name):
    with pytest.raises(Unprotected):
        BatchFloor().seal(Update({name: torch.ones(3)}), ANATOMY, Draws())
    head = Update({"head.weight": torch.ones(10, 96), "norm.weight": torch.ones(96)})
    assert BatchFloor().seal(head, ANATOMY, Draws()) is head
    hidden = head.seal({name: "encrypted"})
    assert BatchFloor().seal(hidden, ANATOMY, Draws()) is hidden


def test_attention_pooling_shows_tokens_and_counts():
    pooled = Anatomy.of(small_vit(global_pool="map", class_token=False))
    update = Update({"attn_pool.kv.weight": torch.ones(4, 96), "head.weight": torch.ones(10, 96)})
    with pytest.raises(Unprotected):
        BatchFloor().seal(update, pooled, Draws())


def test_what_is_accumulated_counts_where_its_images_are_stated():
    guard = protect(small_vit(), "batch-floor:multiple=1")
    made = {n: torch.ones_like(p) for n, p in guard.model.named_parameters() if "vitguard" not in n}
    with pytest.raises(Unprotected):
        guard.seal(Update(made, batch_size=5))
    assert guard.seal(Update(made, batch_size=6)).batch_size == 6


def test_a_floor_that_only_repeats_reach_is_refused_where_the_images_are_seen():
    guard = protect(small_vit(), "batch-floor:multiple=1")  # six images
    images, labels = torch.randn(7, 3, 16, 16), torch.arange(7)
    assert guard.update(images, labels).batch_size == 7
    once, often = images.clone(), images[:1].repeat(7, 1, 1, 1)
    once[6] = once[0]  # six are left
    assert guard.update(once, labels).batch_size == 7
    with pytest.raises(Unprotected, match="got 1 different"):
        guard.update(often, labels)
    zeros = torch.zeros(7, 3, 16, 16)
    zeros[::2] *= -1.0  # of either sign
    with pytest.raises(Unprotected, match="got 1 different"):
        guard.update(zeros, labels)
    made = {n: torch.ones_like(p) for n, p in guard.model.named_parameters() if "vitguard" not in n}
    with pytest.raises(Unprotected, match="repeat"):
        guard.seal(Update(made, batch_size=7), batch=(often, labels))
    head = protect(small_vit(), "frozen-stem:trained=0+batch-floor")
    assert "head.weight" in head.update(often, labels).tensors


@pytest.mark.slow
def test_blocks_of_several_widths_are_refused():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7)
    with pytest.raises(Incompatible, match="one width"):
        protect(swin, "batch-floor")


@pytest.mark.parametrize("multiple", [0, 0.9, float("inf"), float("nan")])
def test_a_multiple_below_one_leaves_equations_and_is_refused(multiple):
    with pytest.raises(InputError):
        BatchFloor(multiple)


def test_an_audit_of_a_batch_below_the_floor_has_nothing_to_attack(small_vit, photo):
    batch = (photo, torch.tensor([1]))
    report = vg.audit(small_vit(), batch, defenses="batch-floor", attacks="position")
    finding = report.findings[-1]
    assert finding.verdict == "blocked" and "at least" in finding.reason


def small(**more):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes, **more).train()


def test_a_model_that_drops_patches_in_training_is_refused():
    with pytest.raises(Incompatible, match="drops some"):
        protect(small(patch_drop_rate=0.75), "batch-floor")
    assert protect(small(), "batch-floor")


def test_images_smaller_than_the_models_count_by_their_own_tokens():
    """A model that takes other sizes: 5 tokens of 8 px in place of 17 of 16 px, 24 wide."""
    guard = protect(small(dynamic_img_size=True), "batch-floor:multiple=1")
    whole = torch.randn(2, 3, 16, 16)
    assert guard.update(whole, torch.arange(2)).batch_size == 2
    with pytest.raises(Unprotected, match="2 of 5 tokens each"):
        guard.update(whole[..., :8, :8].contiguous(), torch.arange(2))
    many = torch.randn(7, 3, 8, 8)
    assert guard.update(many, torch.arange(7)).batch_size == 7
    with pytest.raises(Unprotected, match=r"4 different .* of 5 tokens each"):  # 20 tokens
        guard.update(many[[0, 1, 2, 3, 3, 3, 3]], torch.arange(7))
