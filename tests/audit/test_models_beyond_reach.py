"""An attack does not apply to a model that it does not know: nothing is blocked or broken."""

from dataclasses import replace

import pytest
import timm
import torch

from vitguard.attacks.deep_tokens.attack import DeepTokens
from vitguard.attacks.ladder.attack import Ladder
from vitguard.audit.beside_control import audit
from vitguard.core import Normalization
from vitguard.defenses.encryption import EncryptedGradients
from vitguard.guard import protect
from vitguard.plan import plan_report
from vitguard.selectors import minimal_names
from vitguard.vit import Anatomy

SMALL = {"img_size": 16, "patch_size": 4, "num_classes": 10}


def parallel():
    from timm.models.vision_transformer import ParallelThingsBlock

    return timm.create_model(
        "vit_tiny_patch16_224", **SMALL, embed_dim=96, depth=1, num_heads=3,
        block_fn=ParallelThingsBlock,
    )  # fmt: skip


def found(model, photo, attack, defense="positions:kind=frozen"):
    report = audit(
        model, (photo, torch.tensor([3])), defenses=defense, attacks=attack,
        normalization=Normalization(),
    )  # fmt: skip
    return report.findings


@pytest.mark.parametrize(
    "changes", [{"depth": 1}, {"swiglu": True}], ids=["one block, class token", "gated MLP"]
)
def test_where_all_is_plain_no_attack_is_blocked(small_vit, photo, changes):
    """`blocked` names a tensor that cannot be read: here each one can."""
    if changes.pop("swiglu", False):
        from timm.layers import SwiGLU

        changes = {"mlp_layer": SwiGLU}
    model = small_vit(**changes)
    assert {f.verdict for f in found(model, photo, DeepTokens())} == {"not applicable"}


def test_blocked_names_a_tensor_that_is_hidden(small_vit, photo):
    model = small_vit(depth=3, mlp_ratio=2)
    (own,) = (
        f
        for f in found(model, photo, DeepTokens(), "encryption:select=plan")
        if f.defense != "none"
    )
    assert own.verdict == "blocked" and own.reason.startswith("blocks.0.mlp.fc2.weight")


@pytest.mark.parametrize("name", ["convit", "parallel"])
def test_no_rung_breaks_on_a_model_that_it_does_not_know(photo, name):
    model = parallel()
    if name == "convit":
        model = timm.create_model(
            "convit_tiny", **SMALL, embed_dim=96, depth=1, num_heads=4, local_up_to_layer=1
        )
    for attack in ("gelu-span", "span-robust"):
        rung = Ladder().parts()[attack]
        for finding in found(model, photo, rung, "noise:scale=0.01"):
            assert "failed" not in finding.reason, (attack, finding.reason)


def test_a_plan_for_blocks_that_nobody_knows_encrypts_all_and_promises_nothing():
    model = parallel()
    anatomy = Anatomy.of(model)
    names = [n for n, _ in model.named_parameters()]
    assert not anatomy.blocks and minimal_names(anatomy, names) == names
    report = plan_report(model, "embedding/head")
    assert {"span", "gelu-span", "token-search", "cascade"} <= set(report.remaining())
    assert plan_report(model, "all").remaining() == ()
    guard = protect(model, EncryptedGradients("plan"))
    assert guard is not None


def test_a_block_whose_query_and_key_have_no_known_names_is_planned_all_the_same(small_vit):
    model = small_vit()
    known = Anatomy.of(model)
    bare = [replace(block, qkv=(), qkv_bias=()) for block in known.blocks]
    anatomy = replace(known, blocks=tuple(bare))
    said = {a.attack: a for a in plan_report(model, "mlp", anatomy=anatomy).attacks}
    assert said["span"].possible and "nothing shows" in said["span"].reason
    assert "span" not in plan_report(model, "plan", anatomy=anatomy).remaining()


def test_convits_query_and_key_are_read():
    """One layer makes both, without the values: `gelu-span` did not apply, and plans broke."""
    model = timm.create_model("convit_tiny", **SMALL, embed_dim=96, depth=1, num_heads=4)
    (block,) = Anatomy.of(model).blocks
    assert block.qkv == ("blocks.0.attn.qk.weight", "blocks.0.attn.v.weight")
    assert "gelu-span" not in plan_report(model, "plan").remaining()
