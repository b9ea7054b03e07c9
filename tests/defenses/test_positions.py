"""Fixed and withheld positions: each guarantee of their docstrings, by its own words."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import untraced
from vitguard.core import Update
from vitguard.defenses.positions import FixedPositions, WithheldPositions, sincos_positions
from vitguard.errors import Incompatible, InputError, Unprotected
from vitguard.guard import Guard, protect
from vitguard.vit import Anatomy

KINDS = ("sincos", "frozen", "random", "none")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
LABELS = torch.tensor([1, 2])


def other_checkpoint(small_vit):
    return small_vit(seed=7).state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", [{}, {"learning_rate": 0.1}, {"learning_rate": 0.1, "local_steps": 2}]
)
def test_no_update_contains_a_position_gradient(small_vit, kind, how):
    model = small_vit()
    everything = {n for n, _ in model.named_parameters()}
    guard = protect(model, [FixedPositions(kind)])
    update = guard.update(IMAGES, LABELS, **how)
    assert set(update.tensors) == everything - {"pos_embed"}


def test_an_update_made_elsewhere_loses_its_position_gradient(small_vit):
    model = small_vit()
    foreign = {f"module.{n}": torch.ones_like(p) for n, p in model.named_parameters()}
    for defense in (FixedPositions("frozen"), WithheldPositions()):
        guard = protect(model, [defense])
        sealed = guard.seal(Update(foreign))
        assert not sealed.can_read("pos_embed") and "pos_embed" in sealed.sealed
        assert sealed.can_read("cls_token")
        guard.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_parameters_and_keys_of_the_state_dict_stay_as_they_are(small_vit, kind):
    model = small_vit()
    keys = set(model.state_dict())
    shapes = {n: p.shape for n, p in model.named_parameters()}
    guard = protect(model, [FixedPositions(kind)])
    drawn = {"vitguard.positions.fixed"} if kind == "random" else set()
    assert set(model.state_dict()) == keys | drawn
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: s for n, s in shapes.items() if n != "pos_embed"
    }
    assert set(guard.export()) == keys
    small_vit().load_state_dict(guard.export())


def test_frozen_leaves_the_output_of_the_model_as_it_is(small_vit):
    model = small_vit().eval()
    before = model(IMAGES)
    protect(model, [FixedPositions("frozen")])
    assert torch.equal(model(IMAGES), before)
    assert torch.equal(model.train()(IMAGES), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strict_load_of_an_original_checkpoint_gives_positions_to_frozen_only(small_vit, kind):
    model = small_vit()
    protect(model, [FixedPositions(kind)])
    fixed = model.pos_embed.clone()
    checkpoint = other_checkpoint(small_vit)
    for assign in (False, True):
        model.load_state_dict(checkpoint, strict=True, assign=assign)
        taken = checkpoint["pos_embed"] if kind == "frozen" else fixed
        assert torch.equal(model.pos_embed, taken)
        assert torch.equal(model.cls_token, checkpoint["cls_token"])
    assert torch.equal(checkpoint["pos_embed"], other_checkpoint(small_vit)["pos_embed"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_through_a_wrapper_does_not_bring_learned_positions_back(small_vit, kind):
    model = small_vit()
    protect(model, [FixedPositions(kind)])
    fixed = model.pos_embed.clone()
    state = {f"module.{k}": v for k, v in other_checkpoint(small_vit).items()}
    torch.nn.DataParallel(model).load_state_dict(state)
    assert torch.equal(model.pos_embed, fixed) == (kind != "frozen")


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_of_whole_state_dicts_does_not_send_what_fixes_positions(small_vit, kind):
    guard = protect(small_vit(), [FixedPositions(kind)])
    state = {n: torch.zeros_like(t) for n, t in guard.model.state_dict().items()}
    sealed = guard.seal(Update(state, kind="difference", learning_rate=0.1))
    assert not {n for n in sealed.tensors if "pos" in n}
    assert not {n for n in guard.shared_names() if "pos" in n}


def hf_vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=32,
        )
    )  # fmt: skip


@pytest.mark.parametrize("stack", ["positions:kind=random", "positions:kind=random+shuffle"])
@pytest.mark.parametrize("family", ["timm", "transformers"])
@pytest.mark.parametrize("how", ["all of it", "assigned", "what defenses added"])
def test_what_a_protected_model_saved_brings_a_draw_of_positions_back(
    small_vit, stack, family, how
):
    build = small_vit if family == "timm" else hf_vit
    guard, again = (protect(build(), stack) for _ in range(2))
    where = guard.anatomy.positions
    wanted = guard.model.get_buffer(where)
    assert not torch.equal(again.model.get_buffer(where), wanted)
    state = guard.extras() if how == "what defenses added" else guard.model.state_dict()
    whole = how != "what defenses added"
    again.model.load_state_dict(state, strict=whole, assign=how == "assigned")
    assert torch.equal(again.model.get_buffer(where), wanted)
    again.verify()
    again.model.load_state_dict(build().state_dict())  # of a model without vitguard
    assert torch.equal(again.model.get_buffer(where), wanted)
    again.remove()
    assert not again.model._load_state_dict_post_hooks


@pytest.mark.parametrize("frozen_by_user", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_remove_restores_order_parameters_and_hooks(small_vit, kind, frozen_by_user):
    model = small_vit().requires_grad_(not frozen_by_user)
    names = [n for n, _ in model.named_parameters()]
    keys, hooks = list(model.state_dict()), len(model._forward_pre_hooks)
    before = model.pos_embed.detach().clone()
    guard = protect(model, [FixedPositions(kind)])
    fixed = model.pos_embed.clone()
    guard.remove()
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    assert isinstance(model.pos_embed, torch.nn.Parameter)
    assert model.pos_embed.requires_grad is not frozen_by_user
    assert torch.equal(model.pos_embed, fixed)
    assert torch.equal(fixed, before) == (kind == "frozen")
    assert len(model._forward_pre_hooks) == hooks and not model._load_state_dict_post_hooks
    assert not hasattr(model, "vitguard")
    model.load_state_dict(other_checkpoint(small_vit))
    assert torch.equal(model.pos_embed, other_checkpoint(small_vit)["pos_embed"])


def test_remove_puts_the_parameter_back_before_those_that_followed_it(small_vit):
    model = small_vit()
    model.later = torch.nn.Parameter(torch.zeros(1))
    names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
    guard = protect(model, [FixedPositions()])
    model.latest = torch.nn.Parameter(torch.zeros(1))
    guard.remove()
    del model.latest
    assert [n for n, _ in model.named_parameters()] == names and list(model.state_dict()) == keys


def roundtrips():
    def saved(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "save": saved,
    }


@pytest.mark.parametrize("how", roundtrips())
def test_a_copy_is_protected_loads_and_unprotects_on_its_own(small_vit, how):
    model = small_vit()
    protect(model, [FixedPositions("sincos")])
    fixed = model.pos_embed.clone()
    twin = roundtrips()[how](model)
    assert torch.equal(twin.eval()(IMAGES), model.eval()(IMAGES))
    assert "pos_embed" not in dict(twin.named_parameters())
    twin.load_state_dict(other_checkpoint(small_vit))
    assert torch.equal(twin.pos_embed, fixed)
    Guard.of(twin).remove()
    twin.load_state_dict(other_checkpoint(small_vit))
    assert isinstance(twin.pos_embed, torch.nn.Parameter)
    assert torch.equal(twin.pos_embed, other_checkpoint(small_vit)["pos_embed"])
    # and the original is still protected
    model.load_state_dict(other_checkpoint(small_vit))
    assert torch.equal(model.pos_embed, fixed)


@pytest.mark.slow
@untraced
def test_compile_fullgraph(small_vit):
    model = small_vit().eval()
    protect(model, [FixedPositions("sincos")])
    expected = model(IMAGES)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(IMAGES), expected, atol=1e-6)
    loss = torch.nn.functional.cross_entropy(compiled(IMAGES), LABELS)
    loss.backward()
    assert model.pos_embed.grad is None and model.cls_token.grad is not None


def test_a_compiled_model_is_refused_in_either_form(small_vit):
    model = small_vit()
    with pytest.raises(InputError, match="Protect the model first"):
        protect(torch.compile(model, backend="eager"), [FixedPositions()])
    model.compile(backend="eager")
    with pytest.raises(InputError, match="Protect the model first"):
        protect(model, [FixedPositions()])


def test_autocast(small_vit):
    model = small_vit()
    protect(model, [FixedPositions("frozen")])
    plain = small_vit()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IMAGES), plain(IMAGES))
        loss = torch.nn.functional.cross_entropy(model(IMAGES), LABELS)
    loss.backward()
    assert model.cls_token.grad is not None


def test_half_precision_and_moves_keep_the_fixed_values(small_vit):
    model = small_vit()
    protect(model, [FixedPositions("sincos")])
    model.double()
    model.load_state_dict(other_checkpoint(small_vit))
    want = sincos_positions((4, 4), 96)
    assert torch.allclose(model.pos_embed[0, 1:], want, atol=1e-6)
    assert model.pos_embed.dtype == torch.float64


def test_dynamic_image_size(small_vit):
    model = small_vit(dynamic_img_size=True).eval()
    larger = torch.linspace(-1, 1, 3 * 24 * 32).view(1, 3, 24, 32)
    before = model(larger)
    guard = protect(model, [FixedPositions("frozen")])
    assert torch.equal(model(larger), before)
    update = guard.update(larger, LABELS[:1])
    assert not update.can_read("pos_embed")


def test_positions_made_learnable_again_are_refused_before_the_forward(small_vit):
    model = small_vit()
    guard = protect(model, [FixedPositions()])
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 17, 96))
    with pytest.raises(Unprotected, match="learnable pos_embed"):
        model(IMAGES)
    with pytest.raises(Unprotected):
        guard.seal(Update({"cls_token": torch.zeros(1, 1, 96)}))


shapes = st.fixed_dictionaries(
    {
        "grid": st.integers(1, 4),
        "patch": st.sampled_from([2, 4]),
        "embed_dim": st.sampled_from([8, 16, 24]),
        "depth": st.integers(1, 2),
        "reg_tokens": st.integers(0, 2),
        "class_token": st.booleans(),
        "no_embed_class": st.booleans(),
        "qk_norm": st.booleans(),
    }
)


def random_vit(shape, grid):
    import timm

    pool = "token" if shape["class_token"] else "avg"
    rest = {k: v for k, v in shape.items() if k not in ("grid", "patch")}
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=grid * shape["patch"], patch_size=shape["patch"],
        num_heads=2, num_classes=3, global_pool=pool, **rest,
    )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(shapes, st.sampled_from(KINDS))
def test_no_tensor_of_the_update_is_position_specific(shape, kind):
    """No tensor grows with the number of patches, and none knows where a patch was."""
    sizes = {}
    for grid in (shape["grid"], shape["grid"] + 1):
        guard = protect(random_vit(shape, grid), [FixedPositions(kind)])
        side = grid * shape["patch"]
        update = guard.update(torch.randn(1, 3, side, side), torch.tensor([0]))
        sizes[grid] = {n: t.shape for n, t in update.tensors.items()}
    first, second = sizes.values()
    assert first == second

    # without positions the whole update is the same wherever the patches lie
    guard = protect(random_vit(shape, grid).double(), [FixedPositions("none")])
    anatomy = guard.anatomy
    images = torch.randn(1, 3, side, side).double()
    order = torch.randperm(anatomy.patches)
    moved = anatomy.unpatchify(anatomy.patchify(images)[:, order])
    here, there = (guard.update(x, torch.tensor([0])) for x in (images, moved))
    for name in here.tensors:
        assert torch.allclose(here.read(name), there.read(name), atol=1e-9)


@settings(max_examples=12, deadline=None)
@given(shapes, st.sampled_from(KINDS))
def test_random_shapes_keep_their_output_shape_and_load_their_checkpoint(shape, kind):
    model, twin = (random_vit(shape, shape["grid"]) for _ in range(2))
    side = shape["grid"] * shape["patch"]
    guard = protect(model, [FixedPositions(kind)])
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 3)
    model.load_state_dict(twin.state_dict())
    guard.remove()
    assert list(model.state_dict()) == list(twin.state_dict())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 8))
def test_sincos_equals_the_formula(rows, columns, quarter):
    found = sincos_positions((rows, columns), 4 * quarter)
    assert found.shape == (rows * columns, 4 * quarter)
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                w = 10000 ** (-4 * k / (4 * quarter))
                here = found[row * columns + column, k::quarter].tolist()
                want = [
                    math.sin(column * w),
                    math.cos(column * w),
                    math.sin(row * w),
                    math.cos(row * w),
                ]
                assert here == pytest.approx(want, abs=1e-12)


def test_the_patch_rows_hold_sincos_and_the_prefix_rows_zero(small_vit):
    model = small_vit(reg_tokens=2)
    protect(model, [FixedPositions("sincos")])
    assert torch.equal(model.pos_embed[0, 3:], sincos_positions((4, 4), 96).float())
    assert not model.pos_embed[0, :3].any()


def test_random_values_come_from_the_generator_given(small_vit):
    def values(seed):
        model = small_vit()
        generator = torch.Generator().manual_seed(seed)
        protect(model, [FixedPositions("random")], generator=generator)
        return model.pos_embed

    assert torch.equal(values(1), values(1)) and not torch.equal(values(1), values(2))
    assert float(values(1).std()) == pytest.approx(0.02, rel=0.1)


def test_models_without_positions_or_with_an_odd_width_are_refused_unchanged(small_vit):
    import timm

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 2}
    beit = timm.create_model("beit_base_patch16_224", **sizes)
    for defense in (FixedPositions(), WithheldPositions()):
        with pytest.raises(Incompatible, match=r"absolute position embedding.*leave \w+ out"):
            protect(beit, [defense])
    odd = small_vit(embed_dim=30, num_heads=2)
    with pytest.raises(Incompatible, match="multiple of 4"):
        protect(odd, [FixedPositions("sincos")])
    assert isinstance(odd.pos_embed, torch.nn.Parameter) and not hasattr(odd, "vitguard")
    protect(odd, [FixedPositions("frozen")])


def test_fixed_and_withheld_together_are_refused(small_vit):
    with pytest.raises(Incompatible, match="either fixed or withheld"):
        protect(small_vit(), [WithheldPositions(), FixedPositions()])


def test_withheld_positions_are_trained_but_never_leave(small_vit):
    model = small_vit()
    everything = {n for n, _ in model.named_parameters()}
    guard = protect(model, [WithheldPositions()])
    loss = torch.nn.functional.cross_entropy(model(IMAGES), LABELS)
    loss.backward()
    assert model.pos_embed.grad.any()
    for how in ({}, {"learning_rate": 0.1}):
        update = guard.update(IMAGES, LABELS, **how)
        assert set(update.tensors) == everything - {"pos_embed"}
        assert update.sealed == {"pos_embed": "withheld positions stay on the client"}


def test_withheld_positions_are_public_only_as_they_were_at_protect(small_vit):
    model = small_vit()
    start = model.pos_embed.detach().clone()
    guard = protect(model, [WithheldPositions()])
    with torch.no_grad():
        model.pos_embed.add_(1)
        model.cls_token.add_(1)
    public = guard.public_model()
    assert torch.equal(public.pos_embed, start)
    assert torch.equal(public.cls_token, model.cls_token)
    assert torch.equal(model.pos_embed, start + 1)


@pytest.mark.parametrize("wrong", ["cosine", "", None, float("nan"), 3])
def test_unknown_kinds_are_refused(wrong):
    with pytest.raises(InputError, match="sincos, frozen, random, none"):
        FixedPositions(wrong)


def test_anatomy_is_still_found_in_the_protected_model(small_vit):
    model = small_vit()
    bare = Anatomy.of(model)
    protect(model, [FixedPositions()])
    assert Anatomy.of(model) == bare


@pytest.mark.parametrize("family", ["timm", "huggingface"])
def test_a_checkpoint_of_drawn_positions_is_loaded_with_them(small_vit, family):
    """Whoever goes on from it would else train and evaluate under positions of another draw."""
    if family == "timm":
        models = [small_vit(seed=seed) for seed in (0, 1)]
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=48,
        )  # fmt: skip
        models = [transformers.ViTForImageClassification(config) for _ in range(2)]
    guards = [protect(model, [FixedPositions("random")]) for model in models]
    models[1].load_state_dict(models[0].state_dict())
    for guard in guards:
        guard.verify()
    first, second = (dict(m.named_buffers())[guards[0].anatomy.positions] for m in models)
    assert torch.equal(first, second)
    images = torch.randn(1, 3, 16, 16)
    outputs = [m.eval()(images) for m in models]
    if family != "timm":
        outputs = [o.logits for o in outputs]
    assert torch.equal(*outputs)
    for guard in guards:
        guard.remove()
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_a_checkpoint_of_a_protected_model_without_its_draw_is_refused(small_vit):
    """As older ones are: another draw would be another model, and nobody would be told."""
    guard, again = (protect(small_vit(), "positions:kind=random+shuffle") for _ in range(2))
    state = guard.model.state_dict()
    state.pop("vitguard.positions.fixed")
    with pytest.raises(RuntimeError, match=r"vitguard\.positions\.fixed"):
        again.model.load_state_dict(state)
