"""Masked patch shuffle: its guarantees, on every family of models, and how it fails closed."""

from __future__ import annotations

import copy
import math
import pickle
import threading

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vitguard as vg
from tests.conftest import untraced
from vitguard.core import Normalization, Update
from vitguard.defenses.positions import FixedPositions
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.errors import Incompatible, InputError, Unprotected
from vitguard.guard import Guard, protect
from vitguard.registry import parse_stack, stack_name
from vitguard.vit import Anatomy, logits_of


def net(size=16, width=16, depth=2, **settings):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=4, embed_dim=width, depth=depth,
        num_heads=2, num_classes=5, **settings,
    )  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


IMAGES, LABELS = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])


def embedded(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the sequence that enters the first block."""
    seen = []
    first = model.get_submodule(Anatomy.of(model).blocks[0].name)
    handle = first.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(images)
    handle.remove()
    return seen[0]


# guarantees

SETTINGS = {
    "mask": st.sampled_from(["blockwise", "uniform"]),
    "draw": st.sampled_from(["image", "batch"]),
    "derangement": st.booleans(),
}


@given(
    ratio=st.floats(0, 1), seed=st.integers(0, 2**60), rows=st.integers(1, 4),
    columns=st.integers(1, 4), fixed=st.booleans(), options=st.fixed_dictionaries(SETTINGS),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_permutation_inside_the_mask_identity_outside_and_prefix_untouched(
    ratio, seed, rows, columns, fixed, options
):
    plain = net(size=(4 * rows, 4 * columns), depth=1, reg_tokens=2).double()
    model = copy.deepcopy(plain).train()
    stack = [FixedPositions("frozen")] if fixed else []
    guard = protect(model, [*stack, PatchShuffle(ratio, **options)], generator=seeded(seed))
    with torch.no_grad():
        model.vitguard.shuffle.unknown.normal_()
    images = torch.rand(2, 3, 4 * rows, 4 * columns, dtype=torch.float64)
    before, after = embedded(plain, images), embedded(model, images)
    mask, source = guard.truth()["shuffled"], guard.truth()["source"]
    patches = plain.patch_embed(images)
    for i in range(2):
        kept = ~mask[i]
        assert torch.equal(after[i, 3:][kept], before[i, 3:][kept])
        wanted = patches[i][source[i]] + model.vitguard.shuffle.unknown
        assert torch.equal(after[i, 3:][mask[i]], wanted[mask[i]])
        assert sorted(source[i][mask[i]].tolist()) == mask[i].nonzero().flatten().tolist()
    assert torch.equal(after[:, :3], before[:, :3])
    limit = math.floor(ratio * rows * columns + 1e-9)
    assert (mask.sum(1) <= limit).all()
    if options["mask"] == "uniform":
        assert (mask.sum(1) == limit).all()
    if options["draw"] == "batch":
        assert torch.equal(mask[0], mask[1]) and torch.equal(source[0], source[1])


def reference_gradients(model, images, labels, mask, source, unknown):
    """Shuffle in image space and replace positions, one image and one patch at a time."""
    anatomy = Anatomy.of(model)
    parameters = dict(model.named_parameters())
    total = 0.0
    for image, label, inside, order in zip(images, labels, mask, source, strict=True):
        patches = anatomy.patchify(image)
        moved = anatomy.unpatchify(torch.stack([patches[int(j)] for j in order]))
        tokens = model.patch_embed(moved[None])
        tokens = torch.cat([model.cls_token, tokens], dim=1)
        rows = [model.pos_embed[0, 0]]
        own = model.pos_embed[0, 1:]
        rows += [unknown if hidden else row for row, hidden in zip(own, inside, strict=True)]
        tokens = tokens + torch.stack(rows)
        out = model.forward_head(model.norm(model.blocks(tokens)))
        total = total + nn.functional.cross_entropy(out, label[None]) / len(images)
    names = [*parameters, "unknown"]
    gradients = torch.autograd.grad(total, [*parameters.values(), unknown])
    return dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("draw", ["image", "batch"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_gradient_equals_that_of_image_space_shuffling(ratio, draw):
    plain = net().double()
    model = copy.deepcopy(plain).train()
    guard = protect(model, [PatchShuffle(ratio, draw=draw)], generator=seeded())
    unknown = model.vitguard.shuffle.unknown.detach()[0].clone().requires_grad_()
    update = guard.update(IMAGES.double(), LABELS)
    truth = guard.truth()
    wanted = reference_gradients(
        plain, IMAGES.double(), LABELS, truth["shuffled"], truth["source"], unknown
    ) if ratio else {}  # fmt: skip
    for name, gradient in wanted.items():
        got = update.read("vitguard.shuffle.unknown")[0] if name == "unknown" else update.read(name)
        assert (got - gradient).abs().max() <= 1e-12 * max(1, gradient.abs().max()), name
    if not ratio:
        protected = {k for k in update.tensors if k.startswith("vitguard.")}
        assert all(update.read(k).eq(0).all() for k in protected)
        bare = protect(copy.deepcopy(plain).train(), []).update(IMAGES.double(), LABELS)
        assert all(torch.allclose(t, update.read(k), atol=1e-14) for k, t in bare.tensors.items())


def test_masked_positions_get_exactly_no_gradient_and_the_others_some():
    guard = protect(net(), [PatchShuffle(0.5)], generator=seeded())
    update = guard.update(IMAGES[:1], LABELS[:1])
    rows = update.read("pos_embed")[0, 1:].abs().sum(1)
    mask = guard.truth()["shuffled"][0]
    assert 0 < int(mask.sum()) < len(mask)
    assert (rows[mask] == 0).all() and (rows[~mask] > 0).all()


def test_eval_mode_is_bit_identical_to_the_model_without_it():
    for build in (net, swin):
        plain = build().eval()
        images = torch.rand(2, 3, *Anatomy.of(plain).image_size)
        wanted = plain(images)
        guard = protect(plain, [PatchShuffle(0.7)])
        assert torch.equal(plain.eval()(images), wanted)
        assert not torch.equal(plain.train()(images), wanted)
        guard.remove()
        assert torch.equal(plain.train()(images), wanted)


def test_no_draw_depends_on_pixels_or_on_the_other_images():
    guard = protect(net(), [PatchShuffle(0.5)], generator=seeded())
    guard.model(IMAGES)
    first = guard.truth()
    guard.redraw(seeded())
    guard.model(1 - IMAGES)
    for secret in ("shuffled", "source"):
        assert torch.equal(first[secret], guard.truth()[secret]), secret
    piece = guard.model.vitguard.shuffle
    piece.key_examples(torch.tensor([7, 8, 9]))
    guard.model(IMAGES)
    mask, together = guard.truth()["shuffled"], guard.truth()["source"]
    piece.key_examples(torch.tensor([9, 7]))
    for _ in range(2):
        guard.model(IMAGES[:2])
        assert torch.equal(guard.truth()["source"], together[[2, 0]])
        assert torch.equal(guard.truth()["shuffled"], mask[[2, 0]])
    with pytest.raises(InputError, match="one key for each of 3 examples"):
        guard.model(IMAGES)
    piece.key_examples(None)
    guard.model(IMAGES)
    assert not torch.equal(guard.truth()["source"][:2], together[[2, 0]])


def test_same_generator_same_draw_and_draws_differ_between_images_and_steps():
    draws = []
    for _ in range(2):
        guard = protect(net(), [PatchShuffle(0.7)], generator=seeded(3))
        for _ in range(2):
            guard.model(IMAGES)
            draws.append(guard.truth()["source"])
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0][0], draws[0][1])


def test_one_patch_and_one_image():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=4, patch_size=4, embed_dim=16, depth=1, num_heads=2,
        num_classes=5,
    )  # fmt: skip
    guard = protect(model, [PatchShuffle(1.0, derangement=True)])
    assert torch.isfinite(guard.update(torch.rand(1, 3, 4, 4), LABELS[:1]).read("pos_embed")).all()
    assert guard.truth()["shuffled"].tolist() == [[True]]


# schedules


def test_probability_is_the_chance_that_an_image_is_shuffled():
    guard = protect(net(), [PatchShuffle(0.5, probability=0.3)], generator=seeded())
    with torch.no_grad():
        guard.model(torch.rand(1000, 3, 16, 16))
    share = guard.truth()["shuffled"].any(1).float().mean()
    assert 0.25 < share < 0.35
    guard = protect(net(), [PatchShuffle(0.5, probability=0.0)])
    guard.model(IMAGES)
    assert not guard.truth()["shuffled"].any()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_ratio_follows_its_schedule_over_optimizer_steps(schedule):
    model = net(depth=1)
    shuffle = PatchShuffle(1.0, mask="uniform", warmup=2, steps=6, schedule=schedule)
    guard = protect(model, [shuffle])
    optimizer = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
    ratios = []
    for _ in range(8):
        model(IMAGES).sum().backward()
        model(IMAGES).sum().backward()  # a second micro-batch is no step
        ratios.append(float(guard.truth()["shuffled"].float().mean()))
        optimizer.step()
    middle = {
        "constant": [1.0, 1.0, 1.0, 1.0],
        "linear": [0, 0.25, 0.5, 0.75],
        "cosine": [0, 0.125, 0.5, 0.8125],  # 16 patches, rounded down
    }[schedule]
    assert ratios == [0, 0, *middle, 1, 1]
    copied = net(depth=1)
    protect(copied, [shuffle])
    copied.load_state_dict(model.state_dict())
    assert int(copied.vitguard.shuffle.step) == 8


# models


def swin():
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2),
        window_size=4, num_classes=5, drop_path_rate=0.0,
    )  # fmt: skip


def eva():
    return timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, embed_dim=48, depth=1, num_heads=2, num_classes=5
    )


def deit():
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2,
        num_classes=5,
    )  # fmt: skip


def registers():
    return net(reg_tokens=4, no_embed_class=True, global_pool="avg", class_token=False)


def any_size():
    return net(dynamic_img_size=True)


def torchvision_vit():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=16, patch_size=4, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=32,
        num_classes=5,
    )  # fmt: skip
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero: no gradient
    return model


def hf_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def hf_dinov2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        mlp_ratio=1, num_labels=5,
    )  # fmt: skip
    return transformers.Dinov2ForImageClassification(config)


MODELS = [net, registers, any_size, deit, eva, swin, torchvision_vit, hf_vit, hf_dinov2]


@pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
def test_works_on(build):
    model = build().double()
    names = {n for n, _ in model.named_parameters()}
    plain = copy.deepcopy(model)
    anatomy = Anatomy.of(model)
    images = torch.rand(2, 3, *anatomy.image_size, dtype=torch.float64)
    wanted = logits_of(plain.eval()(images))
    guard = protect(model, [PatchShuffle(0.8, derangement=True)], generator=seeded())
    assert torch.equal(logits_of(model.eval()(images)), wanted)
    update = guard_update(guard, images)
    truth = guard.truth()
    assert truth["shuffled"].shape == (2, anatomy.patches)
    assert set(update.tensors) == names | {"vitguard.shuffle.unknown"}
    assert update.read("vitguard.shuffle.unknown").abs().sum() > 0
    shuffled = logits_of(model(images))
    if anatomy.positions is None:
        # the same as image-space shuffling, but for the mark
        with torch.no_grad():
            model.vitguard.shuffle.unknown.zero_()
        model.vitguard.shuffle.key_examples(torch.tensor([1, 2]))
        shuffled = logits_of(model(images))
        source = guard.truth()["source"]
        patches = anatomy.patchify(images)
        moved = patches.gather(1, source[..., None].expand_as(patches))
        moved = logits_of(plain.train()(anatomy.unpatchify(moved)))
        assert torch.allclose(shuffled, moved, atol=1e-10)
    model.load_state_dict(plain.state_dict())
    guard.remove()
    assert {n for n, _ in model.named_parameters()} == names
    assert torch.equal(logits_of(model.eval()(images)), wanted)


def guard_update(guard: Guard, images: torch.Tensor) -> Update:
    guard.model.train()
    return guard.update(images, torch.tensor([0, 1]))


def test_images_of_another_size_and_a_grid_that_is_not_square():
    guard = protect(any_size(), [PatchShuffle(0.6)], generator=seeded())
    guard.model(torch.rand(2, 3, 12, 24))
    assert guard.truth()["shuffled"].shape == (2, 18)
    guard = protect(net(size=(8, 24)), [PatchShuffle(0.6)], generator=seeded())
    guard.model(torch.rand(2, 3, 8, 24))
    assert guard.truth()["shuffled"].shape == (2, 12)
    assert guard.truth()["shuffled"].any()


# how it fails closed


def test_update_refuses_a_model_in_eval_mode_and_seal_what_was_made_in_it():
    guard = protect(net(), [PatchShuffle(0.5)])
    guard.model.eval()
    with pytest.raises(Unprotected, match="training mode"):
        guard.update(IMAGES, LABELS)
    update = Update({n: torch.zeros_like(p) for n, p in guard.model.named_parameters()})
    guard.seal(update)  # trained before, evaluated since
    guard.model(IMAGES).sum().backward()
    with pytest.raises(Unprotected, match="taken in eval mode"):
        guard.seal(update)


def test_seal_refuses_a_gradient_that_was_taken_in_eval_mode():
    model = net()
    guard = protect(model, [PatchShuffle(0.5)])
    model.eval()(IMAGES).sum().backward()
    model.train()
    update = Update({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    with pytest.raises(Unprotected, match="taken in eval mode"):
        guard.seal(update)
    guard.update(IMAGES, LABELS)  # makes its own gradient
    model.load_state_dict(model.state_dict())
    model.eval()(IMAGES)  # a look without a gradient does no harm
    model.train()(IMAGES).sum().backward()
    assert guard.seal(update).tensors


def test_an_optimizer_without_the_unknown_embedding_raises_at_its_step():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = protect(model, [PatchShuffle(0.5)])
    before = model.patch_embed.proj.weight.detach().clone()
    model(IMAGES).sum().backward()
    with pytest.raises(Unprotected, match=r"guard.prepare\(optimizer\)"):
        optimizer.step()
    assert torch.equal(model.patch_embed.proj.weight, before)
    guard.prepare(optimizer).step()
    assert not torch.equal(model.patch_embed.proj.weight, before)
    other = nn.Linear(2, 2)
    torch.optim.SGD(other.parameters(), lr=0.1).step()  # another model's optimizer is free


def test_several_optimizers_may_share_the_parameters():
    model = net()
    guard = protect(model, [PatchShuffle(0.5)])
    parts = [list(model.blocks.parameters()), list(model.head.parameters())]
    both = [torch.optim.SGD(p, lr=0.1) for p in parts]
    rest = torch.optim.SGD(model.vitguard.parameters(), lr=0.1)
    for _ in range(3):
        model(IMAGES).sum().backward()
        for optimizer in (*both, rest):
            optimizer.step()
    model(IMAGES).sum().backward()
    both[0].step()
    model(IMAGES).sum().backward()
    with pytest.raises(Unprotected):
        both[0].step()
    guard.remove()
    both[0].step()


def test_a_copy_is_watched_like_the_original():
    model = net()
    protect(model, [PatchShuffle(0.5)])
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        [p for n, p in model.named_parameters() if not n.startswith("vitguard.")], lr=0.1
    )
    model(IMAGES).sum().backward()
    with pytest.raises(Unprotected):
        optimizer.step()


def test_a_part_of_the_model_that_skips_the_patch_embedding_is_refused():
    model = net()
    protect(model, [PatchShuffle(0.5)])
    with pytest.raises(Unprotected, match="did not come from it"):
        model._pos_embed(torch.rand(3, 16, 16))


def test_a_step_on_a_model_whose_part_was_replaced_is_refused():
    model = net()
    guard = protect(model, [PatchShuffle(0.5)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.pos_drop = nn.Dropout(0.1)  # whose hook put the patches in their places
    before = model.patch_embed.proj.weight.detach().clone()
    with pytest.raises(Unprotected, match="never reached pos_drop"):
        model(IMAGES)
    model.forward_head(model.forward_features(IMAGES)).sum().backward()
    with pytest.raises(Unprotected, match="some that are gone"):
        optimizer.step()
    assert torch.equal(model.patch_embed.proj.weight, before)
    guard.remove()
    optimizer.step()


def test_a_pass_that_goes_round_the_shuffle_is_refused():
    model = net()
    guard = protect(model, [PatchShuffle(0.5)])

    def embed(tokens):
        sequence = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        return sequence + model.pos_embed

    model._pos_embed = embed
    with pytest.raises(Unprotected, match="never reached pos_drop"):
        model(IMAGES)
    with pytest.raises(Unprotected, match="never reached pos_drop"):
        guard.update(IMAGES, LABELS)
    model.eval()(IMAGES)
    del model._pos_embed
    model.train()(IMAGES).sum().backward()
    assert guard.update(IMAGES, LABELS).tensors


def test_threads_that_share_a_model_are_refused_and_never_get_each_others_images():
    model = net()
    protect(model, [PatchShuffle(0.5)])
    inside, go_on, refused = threading.Event(), threading.Event(), []

    def wait(module, args, output):  # behind the shuffle's hook: the draws are made
        if threading.current_thread() is other:
            inside.set()
            go_on.wait(30)

    def pass_through():
        try:
            model(IMAGES)
        except Unprotected as error:
            refused.append(str(error))

    model.patch_embed.register_forward_hook(wait)
    other = threading.Thread(target=pass_through)
    other.start()
    assert inside.wait(30)
    model(IMAGES)  # a whole pass in between
    go_on.set()
    other.join()
    other = threading.Thread(target=pass_through)
    inside.clear(), go_on.clear()
    other.start()
    assert inside.wait(30)
    model.patch_embed(IMAGES)  # begun in between, and not ended
    go_on.set()
    other.join()
    assert len(refused) == 2
    assert "of another thread" in refused[1]
    assert embedded(model, IMAGES).shape == (3, 17, 16)


def test_checkpointing_around_the_patch_embedding_is_refused():
    from torch.utils.checkpoint import checkpoint

    model = net()
    protect(model, [PatchShuffle(0.5)])
    out = checkpoint(model, IMAGES, use_reentrant=False)
    with pytest.raises(Incompatible, match="Checkpoint the blocks only"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"ratio": 1.3}, r"Expected ratio in \[0, 1\], got 1.3."),
        ({"ratio": -0.1}, "ratio in"),
        ({"ratio": float("nan")}, "ratio in"),
        ({"ratio": "0.7"}, "Expected ratio as a number, got '0.7'"),
        ({"ratio": None}, "ratio as a number"),
        ({"ratio": True}, "ratio as a number"),
        ({"ratio": torch.tensor(0.5)}, "ratio as a number"),
        ({"probability": "1"}, "probability as a number"),
        ({"derangement": "no"}, "derangement to be true or false, got 'no'"),
        ({"warmup": math.inf}, "warmup as a whole number of at least 0, got inf"),
        ({"warmup": 1.5}, "warmup as a whole number"),
        ({"warmup": "3"}, "warmup as a whole number"),
        ({"steps": True}, "steps as a whole number"),
        ({"dal_weight": "x"}, "dal_weight as a number"),
        ({"probability": 2}, "probability in"),
        ({"mask": "round"}, "mask among blockwise, uniform"),
        ({"draw": "epoch"}, "draw among"),
        ({"warmup": -1}, "at least 0"),
        ({"schedule": "linear"}, "steps beyond the warm-up"),
        ({"warmup": 5, "steps": 5}, "steps beyond the warm-up"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        PatchShuffle(**setting)


def test_models_without_patches_are_refused():
    with pytest.raises(InputError, match="Vision Transformer"):
        protect(nn.Sequential(nn.Linear(2, 2)), [PatchShuffle()])


# living with the rest


def test_deepcopy_and_pickle_keep_protecting_and_hold_no_secret():
    model = net()
    guard = protect(model, [PatchShuffle(0.5, dal="tokens")], generator=seeded())
    model(IMAGES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert Guard.of(other).truth() == {}
        other.train()(IMAGES)
        again = Guard.of(other).truth()["source"]
        assert again.shape == (3, 16)
        assert Guard.of(other).auxiliary_loss() > 0
        assert torch.equal(other.eval()(IMAGES), copy.deepcopy(model).eval()(IMAGES))
        guard.redraw(seeded())
    assert guard.auxiliary_loss() > 0
    text = repr(model) + repr(guard)
    assert "source" not in text and "generator" not in text.lower()


def test_checkpoints_of_the_original_load_strictly_and_export_is_plain():
    plain, model = net(), net()
    guard = protect(model, [PatchShuffle(0.5, dal="tokens", warmup=1, steps=5)])
    assert not model.load_state_dict(plain.state_dict()).missing_keys
    assert set(guard.export()) == set(plain.state_dict())
    added = set(model.state_dict()) - set(plain.state_dict())
    assert all(k.startswith("vitguard.shuffle.") for k in added) and len(added) == 4
    other = net()
    protect(other, [PatchShuffle(0.5, dal="tokens", warmup=1, steps=5)])
    other.load_state_dict(model.state_dict())


def test_exact_resume_needs_both_states():
    def run(steps, model, guard, optimizer):
        for _ in range(steps):
            loss = model(IMAGES).square().sum() + guard.auxiliary_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def fresh():
        model = net()
        settings_ = PatchShuffle(0.8, dal="tokens", schedule="linear", steps=8)
        guard = protect(model, [settings_], generator=seeded(5))
        return model, guard, torch.optim.AdamW(model.parameters(), lr=1e-3)

    whole = run(6, *fresh())
    model, guard, optimizer = fresh()
    run(3, model, guard, optimizer)
    saved = (model.state_dict(), guard.state_dict(), optimizer.state_dict())
    other, other_guard, other_optimizer = fresh()
    for thing, state in zip((other, other_guard, other_optimizer), saved, strict=True):
        thing.load_state_dict(copy.deepcopy(state))
    assert run(3, other, other_guard, other_optimizer) == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    model = net()
    guard = protect(model, [PatchShuffle(0.5, dal="tokens")], generator=seeded())
    piece = model.vitguard.shuffle
    gradients = []
    for enabled in (False, True):
        piece.key_examples(torch.arange(3))
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = nn.functional.cross_entropy(model(IMAGES), LABELS) + guard.auxiliary_loss()
        loss.backward()
        gradients.append(piece.unknown.grad.clone())
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.95
    half = net().to(torch.bfloat16)
    guard = protect(half, [PatchShuffle(0.5, dal="tokens")])
    half(IMAGES.bfloat16())
    assert guard.auxiliary_loss().dtype == torch.bfloat16


@pytest.mark.slow
@untraced
def test_a_compiled_model_shuffles_and_takes_the_same_gradient():
    torch._dynamo.reset()
    backend = "aot_eager"  # inductor needs a C++ compiler
    model = net(depth=1)
    guard = protect(model, [PatchShuffle(0.5, dal="tokens")], generator=seeded())
    piece = model.vitguard.shuffle
    compiled = torch.compile(model, backend=backend)
    results, draws = [], []
    for call in (model, compiled, compiled):
        piece.key_examples(torch.arange(3))
        model.zero_grad()
        (call(IMAGES).square().sum() + guard.auxiliary_loss()).backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
        draws.append(guard.truth()["source"])
    assert torch.equal(draws[0], draws[1])
    for other in results[1:]:
        assert all(torch.allclose(results[0][n], other[n], atol=1e-5) for n in other)
    piece.key_examples(None)
    compiled(IMAGES)
    guard.auxiliary_loss()
    first = guard.truth()["source"]
    compiled(IMAGES)
    assert not torch.equal(first, guard.truth()["source"])
    model.eval()
    with torch.no_grad():
        whole = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.allclose(whole(IMAGES), model(IMAGES), atol=1e-6)


@pytest.mark.parametrize("probability", [1.0, 0.0])
def test_distributed_training_reduces_the_new_parameters_too(tmp_path, probability):
    """Also where no image of a batch is shuffled, or the reducer would wait for a gradient."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = net()
        guard = protect(model, [PatchShuffle(0.5, probability=probability, dal="tokens")])
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for _ in range(2):
            (wrapped(IMAGES).sum() + guard.auxiliary_loss()).backward()
            optimizer.step()
            assert model.vitguard.shuffle.unknown.grad is not None
            optimizer.zero_grad()
    finally:
        dist.destroy_process_group()


def test_the_adversary_can_simulate_and_differentiate_twice():
    guard = protect(net(), [FixedPositions(), PatchShuffle(0.5, dal="tokens")], generator=seeded())
    model = guard.model
    for settings_ in ({}, {"learning_rate": 0.1, "local_steps": 2}):
        update = guard.update(IMAGES, LABELS, **settings_)
        view = vg.CuriousServer().view(guard, update, Normalization())
        dummy = IMAGES.clone().requires_grad_()
        made = view.simulate(dummy, LABELS, seeded(1))
        again = view.simulate(dummy, LABELS, seeded(1))
        assert all(torch.equal(made.read(k), again.read(k)) for k in made.tensors)
        error = sum((made.read(k) - update.read(k)).square().sum() for k in made.tensors)
        (gradient,) = torch.autograd.grad(error, dummy)
        assert gradient.abs().sum() > 0
    assert "vitguard.shuffle.unknown" in view.extras
    assert view.settings["shuffle"]["ratio"] == 0.5
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in view.model.modules())
    assert model.training


def test_spec_round_trip():
    stack = parse_stack("positions:kind=sincos+shuffle:ratio=0.7,dal=tokens,mask=uniform")
    assert stack[1] == PatchShuffle(0.7, mask="uniform", dal="tokens")
    assert parse_stack(stack_name(stack)) == stack


# what moves nothing is said


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"ratio": 0.1}, "at least 2 of 16 patches"),
        ({"ratio": 0.0}, "at least 2 of 16 patches"),
        ({"warmup": 2}, "Step 0 is in the warm-up of 2 steps"),
        ({"schedule": "linear", "steps": 9}, "At step 0 of 9 the linear schedule"),
    ],
)
def test_a_shuffle_that_moves_nothing_says_so_once(settings, why):
    model = net().train()
    protect(model, [PatchShuffle(**settings)])
    with pytest.warns(UserWarning, match=why) as caught:
        for _ in range(3):
            model(IMAGES)
    assert len(caught) == 1


def test_a_shuffle_that_moves_something_warns_of_nothing(recwarn):
    model = net().train()
    protect(model, [PatchShuffle(2 / 16)])
    model(IMAGES)
    model.eval()(IMAGES)
    assert not recwarn.list


@pytest.mark.parametrize("settings", [{"ratio": 0.1}, {"warmup": 2}, {"probability": 0.0}])
def test_an_audit_never_says_that_a_shuffle_which_moved_nothing_resisted(settings):
    report = vg.audit(
        net(width=64), (IMAGES[:1], LABELS[:1]), defenses=[PatchShuffle(**settings)],
        attacks=["position", "span"],
    )  # fmt: skip
    assert {f.verdict for f in report.findings if f.defense != "none"} <= {"leaks", "inconclusive"}


def test_dal_over_positions_registers_no_second_name_for_them():
    """A hook that kept the position embedding as an attribute made it a parameter of the piece."""
    model = net().train()
    guard = protect(model, [PatchShuffle(0.5, dal="positions")])

    def names():
        return {n for n, _ in model.named_parameters(remove_duplicate=False)}

    before, within = names(), set()
    hook = model.head.register_forward_hook(lambda m, i, o: within.update(names()))
    model(IMAGES)
    hook.remove()
    guard.auxiliary_loss()
    assert within == names() == before
    with torch.no_grad():
        model.forward_features(IMAGES)  # stops before the hook that computes the loss
    assert names() == set(model.state_dict()) == before
