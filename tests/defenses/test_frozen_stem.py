"""Frozen stem: what is frozen sends nothing; what is not may still show the image."""

import pytest
import torch

import vitguard as vg
from tests.conftest import small_vit
from vitguard.analysis import released, remaining
from vitguard.core import Update
from vitguard.defenses.base import traits_of
from vitguard.errors import Incompatible, InputError, Unprotected
from vitguard.guard import protect
from vitguard.registry import parse_stack
from vitguard.vit import Anatomy

IMAGES, LABELS = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
STEM = ("pos_embed", "cls_token", "patch_embed.", "blocks.0.")


def test_no_update_shows_a_tensor_of_the_stem_not_even_one_made_elsewhere():
    guard = protect(small_vit(), "frozen-stem")
    names = set(guard.update(IMAGES, LABELS).tensors)
    assert not [n for n in names if n.startswith(STEM)] and "blocks.1.mlp.fc1.weight" in names
    made = {n: torch.ones_like(p) for n, p in guard.model.named_parameters()}
    sealed = guard.seal(Update(made, kind="difference"))
    assert not [n for n in sealed.tensors if n.startswith(STEM)]
    assert [n for n in sealed.sealed if n.startswith("blocks.0.")]
    assert not [n for n in guard.shared_names() if n.startswith(STEM)]


def test_a_norm_right_after_the_embedding_is_frozen_with_it():
    guard = protect(small_vit(pre_norm=True), "frozen-stem")
    assert not [n for n in guard.update(IMAGES, LABELS).tensors if "norm_pre" in n]
    assert not guard.model.norm_pre.weight.requires_grad
    made = {"norm_pre.weight": torch.ones(96), "norm.weight": torch.ones(96)}
    assert set(guard.seal(Update(made, kind="difference")).tensors) == {"norm.weight"}
    assert guard.traits.freezes("norm_pre.bias")


def test_of_the_head_alone_attention_pooling_is_frozen_too():
    pooled = {"global_pool": "map", "class_token": False}
    alone = protect(small_vit(**pooled), "frozen-stem:trained=0").update(IMAGES, LABELS)
    assert {n for n in alone.tensors if "norm" not in n} == {"head.weight", "head.bias"}
    assert "attn_pool.kv.weight" in protect(small_vit(**pooled), "frozen-stem").shared_names()


def test_all_embeddings_of_transformers_are_frozen_and_nothing_behind_them():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_hidden_layers=2, **sizes)
    model = transformers.ViTForImageClassification(config)
    model.vit.embeddings.mask_token = torch.nn.Parameter(torch.zeros(1, 1, 96))
    protect(model, "frozen-stem")
    trained = {n.split(".")[1] for n, p in model.vit.named_parameters("vit") if p.requires_grad}
    assert trained == {"layers", "layernorm"} or trained == {"encoder", "layernorm"}


@pytest.mark.parametrize("place", ["", "blocks.0.mlp", "patch_embed"])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_what_is_added_to_the_stem_later_stays_like_the_rest_of_it(place, kind):
    guard = protect(small_vit(), "frozen-stem")
    module, name = guard.model.get_submodule(place), f"{place}.late".lstrip(".")
    if kind == "buffer":
        module.register_buffer("late", torch.zeros(3))
    else:
        module.register_parameter("late", torch.nn.Parameter(torch.zeros(3), requires_grad=False))
    sealed = guard.seal(Update({name: torch.ones(3), "norm.weight": torch.ones(96)}))
    assert (name in sealed.tensors) is (name in guard.shared_names()) is (place == "")
    if place and kind == "parameter":
        module.late.requires_grad_(True)
        with pytest.raises(Unprotected, match="late"):
            guard.seal(Update({name: torch.ones(3)}))


def test_a_model_in_which_a_parameter_was_unfrozen_is_refused():
    guard = protect(small_vit(), "frozen-stem")
    guard.model.blocks[0].mlp.fc1.bias.requires_grad_(True)
    with pytest.raises(Unprotected, match=r"blocks\.0\.mlp\.fc1\.bias"):
        guard.update(IMAGES, LABELS)


def test_training_moves_the_rest_alone():
    model = small_vit()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    protect(model, "frozen-stem")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not [n for n in moved if n.startswith(STEM)]


def test_remove_gives_back_what_was_trained_and_no_more():
    model = small_vit()
    model.blocks[0].requires_grad_(False)
    guard = protect(model, "frozen-stem")
    guard.remove()
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    assert model.pos_embed.requires_grad and model.patch_embed.proj.weight.requires_grad


def test_positions_that_are_trained_and_withheld_do_not_go_with_it():
    with pytest.raises(Incompatible, match="withheld"):
        protect(small_vit(), "withheld+frozen-stem")
    model = small_vit(num_classes=0, depth=1)
    model.norm.requires_grad_(False)
    with pytest.raises(Incompatible, match="parameter to train"):
        protect(model, "frozen-stem:trained=0")
    with pytest.raises(InputError):
        parse_stack("frozen-stem:trained=-1")


@pytest.mark.parametrize("trained, search", [(1, False), (2, True), (3, True)])
def test_the_attacks_say_what_a_stem_leaves(trained, search):
    """A block before the last one shows every token; the last one under a class token does not."""
    model = small_vit(depth=3)
    anatomy = Anatomy.of(model)
    traits = traits_of(parse_stack(f"frozen-stem:trained={trained}"), anatomy)
    said = {one.attack: one.possible for one in remaining(released(model, anatomy, traits))}
    assert said["token-search"] is search
    assert not said["position"]
    assert said["span"] is said["gelu-span"] is (trained == 3)  # block 0 is read again
    assert said["cascade"] and said["labels"]


def test_positions_that_another_defense_withholds_are_refused_whatever_its_name(small_vit):
    class Theirs(vg.WithheldPositions):
        name = "theirs"

    with pytest.raises(Incompatible, match="trained and withheld"):
        protect(small_vit(), [Theirs(), vg.FrozenStem()])


def test_a_step_that_would_train_the_stem_is_refused_before_it_moves():
    """Trainers and schedules of fine-tuning unfreeze what they find frozen."""
    guard = protect(small_vit(), "frozen-stem")
    optimizer = guard.prepare(torch.optim.SGD(guard.model.requires_grad_(True).parameters(), 0.1))
    torch.nn.functional.cross_entropy(guard.model(IMAGES), LABELS).backward()
    before = {n: p.detach().clone() for n, p in guard.model.named_parameters()}
    with pytest.raises(Unprotected, match="Freeze it again"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in guard.model.named_parameters())
