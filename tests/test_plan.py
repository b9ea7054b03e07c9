"""What `vitguard plan` states, as a table; the audit confirms it in test_plan_confirmed.py."""

import io
import json

import pytest
import timm
from rich.console import Console

from vitguard.analysis import refuse_given_away
from vitguard.defenses.encryption import EncryptedGradients, minimal_names, select_names
from vitguard.defenses.positions import FixedPositions, WithheldPositions
from vitguard.errors import Incompatible, InputError
from vitguard.models import build_model
from vitguard.plan import plan_report
from vitguard.vit import Anatomy

BASE, LARGE, SMALL = (f"vit_{size}_patch16_224:depth=4" for size in ("base", "large", "small"))
WIDE, SHALLOW = "vit_base_patch32_224:depth=4", "vit_base_patch32_224:depth=1"
CIFAR = (
    "vit_tiny_patch16_224:img_size=32,patch_size=4,embed_dim=128,depth=4,num_heads=4,"
    "mlp_ratio=2,num_classes=10"
)
CLOSED = ("position", "span", "span-chain", "gelu-span", "april", "cascade", "labels")
NEAR = "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=192,depth=2,num_heads=3"
TINY = (
    "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=192,depth={},num_heads={},"
    "num_classes=10"
)
OPEN = TINY.replace("=192", "=256")  # wider than the 192 pixels of a patch
PART = "not exactly"
MODELS = {}


def report(spec, select, positions="learnable"):
    if spec not in MODELS:
        MODELS[spec] = build_model(spec)
    return plan_report(MODELS[spec], select, positions=positions)


TABLE = [
    # model, encrypted, positions, attack, remains
    (BASE, "attention", "learnable", "position", True),
    (BASE, "attention", "frozen", "position", False),
    (BASE, "attention", "frozen", "span", False),
    (BASE, "attention", "frozen", "span-chain", False),
    (BASE, "attention", "frozen", "gelu-span", False),
    (BASE, "attention", "frozen", "token-search", True),
    (BASE, r"attn\.qkv", "frozen", "span", True),
    (BASE, r"attn\.qkv", "withheld", "span", True),
    (BASE, r"attn\.qkv", "sincos", "span", PART),  # low rank: the smoothest image
    (BASE, r"attn\.qkv", "sincos", "span-chain", PART),
    (BASE, r"attn\.qkv", "sincos", "gelu-span", True),
    (BASE, r"0\.attn\.qkv|0\.mlp\.fc1", "frozen", "span", False),
    (BASE, r"0\.attn\.qkv|0\.mlp\.fc1", "frozen", "span-chain", PART),  # 591 > 571
    (LARGE, r"0\.attn\.qkv|0\.mlp\.fc1", "frozen", "span-chain", True),  # block 1 answers
    (LARGE, r"0\.attn\.qkv|0\.mlp\.fc", "frozen", "span-chain", False),
    (LARGE, r"[01]\.attn\.qkv|[01]\.mlp\.fc1", "frozen", "span-chain", PART),  # 985 > 827
    (LARGE, r"[01]\.attn\.qkv|[01]\.mlp\.fc1|patch_embed", "frozen", "span-chain", False),
    (LARGE, r"[012]\.attn\.qkv|[01]\.mlp\.fc1", "frozen", "span-chain", False),  # 5 x 197 > 827
    (WIDE, r"[01]\.attn\.qkv|[01]\.mlp\.fc1", "frozen", "span-chain", True),  # block 2 answers
    (WIDE, r"[012]\.attn\.qkv|[012]\.mlp\.fc1", "frozen", "span-chain", False),  # last block
    (WIDE, "embedding", "frozen", "span", False),
    (SHALLOW, "head", "frozen", "span", False),
    (SHALLOW, "head", "frozen", "span-chain", False),
    (BASE, "embedding", "learnable", "position", False),
    (BASE, "embedding", "learnable", "span", False),
    (BASE, "embedding", "learnable", "span-chain", False),
    (LARGE, "embedding", "learnable", "span-chain", True),
    (BASE, "patch", "learnable", "position", False),
    (BASE, "position", "learnable", "span", True),
    (LARGE, "embedding", "learnable", "span", True),
    (CIFAR, "embedding", "learnable", "span", True),
    (NEAR, "embedding", "frozen", "span", "not exactly"),  # 18 of 193 unknowns open: 7 to 13 dB
    (CIFAR, r"attn\.qkv", "frozen", "span", False),
    (SMALL, "head", "frozen", "span", PART),  # 26 dB
    (SMALL, "head", "learnable", "position", True),
    (BASE, "head", "learnable", "labels", False),
    (BASE, "attention", "learnable", "cascade", True),
    (BASE, "attention", "learnable", "matching", True),
    ("april_vit", "mlp", "learnable", "april", True),
    ("april_vit", "attention", "learnable", "april", False),
    (BASE, "head", "learnable", "april", False),
    (TINY.format(1, 12), "head", "frozen", "span", True),  # 2 x 12 + 1 rows for 17 tokens
    (TINY.format(1, 8), "head", "frozen", "span", True),
    (TINY.format(1, 6), "head", "frozen", "span", False),
    (TINY.format(1, 12), r"attn\.qkv", "frozen", "span", False),
    (TINY.format(1, 12), "head", "frozen", "gelu-span", False),
    (TINY.format(1, 12), "head", "frozen", "token-search", False),
    (TINY.format(2, 3), r"attn\.qkv", "sincos", "gelu-span", True),
    (TINY.format(2, 3), r"attn\.qkv", "sincos", "token-search", True),
    (TINY.format(2, 3), r"0\.mlp", "sincos", "token-search", False),
    (TINY.format(3, 3), r"0\.mlp", "sincos", "token-search", True),
    (TINY.format(3, 12), r"[01]\.attn\.qkv|[01]\.mlp\.fc1", "frozen", "span-chain", True),
    (TINY.format(3, 3), r"[01]\.attn\.qkv|[01]\.mlp\.fc1", "frozen", "span-chain", False),
    (TINY.format(2, 3), "embedding", "learnable", "gelu-span", False),  # fits at any position
    (OPEN.format(2, 4), "embedding", "learnable", "gelu-span", True),
]


@pytest.mark.parametrize("spec, select, positions, attack, remains", TABLE)
def test_the_statement_on(spec, select, positions, attack, remains):
    found = {a.attack: a for a in report(spec, select, positions).attacks}[attack]
    assert found.possible is bool(remains), found
    assert (PART in found.reason) is (remains == PART) and not (found.exact and remains == PART)
    plain = set(MODELS[spec].state_dict()) - set(
        select_names(Anatomy.of(MODELS[spec]), select, MODELS[spec].state_dict())
    )
    assert found.reason
    if remains:
        assert set(found.needs) <= plain and found.needs


@pytest.mark.parametrize("spec", [BASE, LARGE, SMALL, CIFAR, "april_vit"])
@pytest.mark.parametrize("positions", ["learnable", "frozen", "sincos"])
def test_the_minimal_plan_ends_every_closed_form_but_not_matching(spec, positions):
    remaining = report(spec, "plan", positions).remaining()
    assert not set(remaining) & {*CLOSED, "token-search"}
    assert "matching" in remaining


PARTS = ["embedding", r"blocks\.0\.attn", "head", r"blocks\.1\.mlp\.fc2", r"blocks\.0\.mlp\.fc2"]


@pytest.mark.parametrize("drop", PARTS)
def test_no_part_of_the_minimal_plan_can_be_dropped(drop):
    """On the CIFAR shape with two blocks each part alone opens an attack again."""
    spec = CIFAR.replace("depth=4", "depth=2")
    model = build_model(spec)
    anatomy = Anatomy.of(model)
    names = [n for n, _ in model.named_parameters()]
    kept = set(minimal_names(anatomy, names)) - set(select_names(anatomy, drop, names))
    pattern = "|".join(f"^{n}$".replace(".", r"\.") for n in kept)
    assert set(plan_report(model, pattern).remaining()) & {*CLOSED, "token-search"}


def test_tokens_that_fill_the_width_are_searched_by_fc2_alone_and_found_in_part():
    spec = "vit_tiny_patch16_224:img_size=32,patch_size=4,embed_dim={},depth=3,num_heads=3"
    for width, remains in ((48, True), (24, True), (18, False)):  # 65 tokens, 4 times as wide MLPs
        found = {a.attack: a for a in plan_report(spec.format(width), "embedding").attacks}
        search = found["token-search"]
        assert search.possible is remains and not search.gives_away
        assert f"65 tokens fill the {width} dimensions" in search.reason
    assert "token-search" not in plan_report(spec.format(48), "plan").remaining()


@pytest.mark.slow
def test_the_shares_of_vit_base_are_those_of_the_full_model():
    found = plan_report("vit_base_patch16_224", "attention")
    assert abs(found.encrypted.share - 0.33) < 0.01
    assert abs(found.minimal.share - 0.372) < 0.002
    everything = plan_report("vit_base_patch16_224", "all").encrypted
    assert everything.parameters == 86_567_656 and everything.share == 1


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["none", "learnable"])
def test_without_positions_the_patches_fall_to_the_search_and_to_no_closed_form(positions):
    learnable = positions == "none"  # the defense takes them away, or the model has none
    model = timm.create_model(
        "vit_base_patch32_224", depth=4, **({} if learnable else {"pos_embed": "none"})
    )
    remaining = plan_report(model, "head", positions=positions).remaining()
    assert not {"position", "span", "span-chain"} & set(remaining)
    assert "gelu-span" in remaining


@pytest.mark.parametrize("positions", ["frozen", "random", "sincos", "withheld"])
def test_positions_that_the_model_does_not_have_cannot_be_planned(small_vit, positions):
    model = small_vit(img_size=8, embed_dim=12, depth=1, num_heads=3, pos_embed="none")
    with pytest.raises(Incompatible, match="position"):
        plan_report(model, "head", positions=positions)
    for truth in ("learnable", "none"):
        assert plan_report(model, "head", positions=truth).attacks


def test_everything_encrypted_leaves_nothing():
    assert report(BASE, "all").remaining() == ()


def test_bytes_are_those_of_a_message(make_sizes=(8188, 20_000)):
    import torch

    from vitguard.defenses.encryption import PRESETS, Encryptor, KeySet, Manifest
    from vitguard.plan import _cost

    for name in PRESETS:
        keys = KeySet.generate(preset=name, max_clients=PRESETS[name].client_limit)
        for size in make_sizes:
            tensors = {"w": torch.randn(size).clamp(-3, 3)}
            manifest = Manifest.of(tensors, bounds=3.0)
            message = Encryptor(keys, manifest, client_id="a").encrypt(tensors, round_id=0)
            cost = _cost(["w"], {"w": size}, name)
            assert abs(cost.bytes_up / len(message) - 1) < 0.03, (name, size)


def test_the_json_is_the_stated_one():
    found = report(BASE, "attention").to_json()
    assert found["schema"] == 1
    assert set(found["encrypted"]) == {"parameters", "share", "bytes_up", "bytes_down"}
    first = found["attacks"][0]
    assert first == {
        "attack": "position",
        "possible": True,
        "needs": ["pos_embed", "patch_embed.proj.weight"],
        "reason": first["reason"],
    }
    assert json.loads(report(BASE, "attention").to_json_text()) == found


def test_the_printout_names_the_attacks_and_promises_nothing():
    console = Console(file=io.StringIO(), width=100)
    report(BASE, ["attention", "head"]).print_to(console)
    text = console.file.getvalue()
    assert all(name in text for name in CLOSED) and "attention/head" in text
    assert "secure" not in text.lower() and "[" not in text.replace("[/]", "")


def test_wrong_requests_are_refused():
    for select in ("", "no_such_name", "attention/", "[", r"embedding|attn\.qkv"):
        with pytest.raises(InputError):
            report(BASE, select)
    with pytest.raises(InputError, match="positions among"):
        report(BASE, "all", "fixed")
    with pytest.raises(InputError, match="as the preset"):
        plan_report(MODELS[BASE], "all", preset="strong")


@pytest.mark.parametrize("positions", ["learnable", "frozen", "sincos", "withheld"])
@pytest.mark.parametrize("spec", [TINY.format(2, 4), OPEN.format(2, 4), TINY.format(1, 6), CIFAR])
def test_the_defense_refuses_exactly_where_the_plan_says_that_an_exact_attack_remains(
    spec, positions
):
    model = build_model(spec)
    anatomy = Anatomy.of(model)
    stack = {"learnable": [], "withheld": [WithheldPositions()]}
    stack = stack[positions] if positions in stack else [FixedPositions(positions)]
    for select in ("attention", "mlp", "patch", r"attn\.qkv", "plan", "all", "head", "embedding"):
        found = plan_report(model, select, positions=positions).attacks
        remains = [a.attack for a in found if a.gives_away]
        defense = EncryptedGradients(select)
        if remains:
            with pytest.raises(Incompatible, match=f"leaves `{remains[0]}`"):
                refuse_given_away(model, anatomy, [*stack, defense])
        else:
            refuse_given_away(model, anatomy, [*stack, defense])
        refuse_given_away(model, anatomy, [*stack, EncryptedGradients(select, force=True)])


def test_heads_are_counted_in_every_family_and_where_unknown_the_last_block_may_answer():
    from dataclasses import replace

    model = build_model(TINY.format(1, 6))
    anatomy = Anatomy.of(model)
    assert [b.heads for b in anatomy.blocks] == [6]
    assert "span" not in plan_report(model, "head", positions="frozen").remaining()
    unknown = replace(anatomy, blocks=(replace(anatomy.blocks[0], heads=0),))
    found = plan_report(model, "head", positions="frozen", anatomy=unknown)
    assert "span" in found.remaining()
    torchvision = pytest.importorskip("torchvision")
    other = torchvision.models.VisionTransformer(16, 4, 2, 4, 96, 192, num_classes=10)
    assert [b.heads for b in Anatomy.of(other).blocks] == [4, 4]


@pytest.mark.parametrize("kind, remains", [("ViT", False), ("Dinov2", True)])
def test_a_head_that_also_reads_the_mean_of_patches_lets_the_last_block_answer(kind, remains):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "image_size": 32, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_labels": 10,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    assert [b.heads for b in Anatomy.of(model).blocks] == [4]
    remaining = plan_report(model, "head", positions="frozen").remaining()
    assert ("span" in remaining) is remains
