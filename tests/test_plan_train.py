"""`vitguard plan --train`: what is trained is what an update holds, said before any training."""

import json

import pytest
import timm
import torch

from tests.conftest import CIFAR_VIT, small_vit
from vitguard.attacks.gelu_span import GeluSpan
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.span import SpanInversion
from vitguard.cli.main import main
from vitguard.core import Normalization
from vitguard.errors import Blocked, InputError, NotApplicable
from vitguard.guard import protect
from vitguard.models import build_model
from vitguard.plan import plan_report
from vitguard.threats import CuriousServer
from vitguard.trained import train_only, trained_sizes
from vitguard.vit import Anatomy

WIDE = (
    "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=256,depth=2,num_heads=4,num_classes=10"
)
FIRST = r"^blocks\.0\."


def said(model, train, **settings):
    return {a.attack: a for a in plan_report(model, (), train=train, **settings).attacks}


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return build_model(WIDE)


@pytest.mark.parametrize(
    "train, remain",
    [
        ("all", {"position", "span", "span-chain", "gelu-span", "token-search", "labels"}),
        ("head", {"labels"}),
        ("last-block", {"containment"}),  # 9 rows of attention: 3,636 equations for 3,072 pixels
        ("last-block/head", {"containment", "labels"}),
        (r"^blocks\.1\.mlp\.fc1", set()),  # under a class token it sends one row
        (FIRST, {"span", "span-chain", "gelu-span", "token-search"}),
        ("lora:r=4", {"containment"}),
        ("lora:r=4/head", {"containment", "labels"}),
        ("adapters:r=16/head", {"containment", "labels"}),
        ("embedding", {"position"}),
        ("norm", set()),
    ],
)
def test_what_is_trained_decides_which_exact_attacks_remain(wide, train, remain):
    left = set(plan_report(wide, (), train=train).remaining()) - {"matching", "cascade"}
    assert left == remain


def test_the_last_block_of_many_tokens_has_fewer_equations_than_pixels():
    report = plan_report(CIFAR_VIT, (), train="last-block/head")
    assert set(report.remaining()) == {"cascade", "labels", "matching"}
    (told,) = (a for a in report.attacks if a.attack == "containment")
    assert "3,072 pixels by 884 equations" in told.reason


@pytest.mark.parametrize("train", ["all", "head", "last-block/head", FIRST, "embedding", "mlp"])
def test_the_plan_says_of_a_selection_what_it_says_of_a_model_that_is_frozen_so(wide, train):
    frozen = build_model(WIDE)
    chosen = trained_sizes(frozen, Anatomy.of(frozen), train)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(name in chosen)
    assert plan_report(wide, (), train=train).attacks == plan_report(frozen, ()).attacks


@pytest.mark.parametrize("train", ["all", "head", "last-block/head", FIRST, "embedding"])
def test_closed_forms_run_on_an_update_exactly_where_the_plan_says_so(train):
    torch.manual_seed(0)
    model = build_model(WIDE)
    chosen = trained_sizes(model, Anatomy.of(model), train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    guard = protect(model.train(), [])
    update = guard.update(torch.rand(1, 3, 32, 32), torch.tensor([3]))
    assert set(update.tensors) == set(chosen)
    view = CuriousServer().view(guard, update, Normalization())
    plan = said(model, train)
    for attack in (PositionInversion(), SpanInversion(), GeluSpan(seconds=0.01)):
        try:
            attack.run(view, torch.Generator().manual_seed(0))
            ran = True
        except (Blocked, NotApplicable):
            ran = False
        names = ("span", "span-chain") if attack.name == "span" else (attack.name,)
        assert ran is any(plan[name].possible for name in names), (attack.name, plan)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_of_the_head_alone_an_update_holds_the_features_that_it_reads_exactly(pool):
    kind = {"depth": 1, "global_pool": pool, "class_token": pool == "token"}
    model = small_vit(**kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    images, held = torch.rand(1, 3, 16, 16), {}
    model.head.register_forward_pre_hook(lambda _, given: held.update(x=given[0]))
    update = protect(model.train(), []).update(images, torch.tensor([3]))
    weight, bias = update.tensors["head.weight"], update.tensors["head.bias"]
    row = int(bias.abs().argmax())
    assert torch.allclose(weight[row] / bias[row], held["x"][0], atol=1e-5)
    assert int(bias.argmin()) == 3
    read = "class token's" if pool == "token" else "pooled"
    assert f"{read} features" in said(small_vit(**kind), "head")["labels"].reason


def test_a_frozen_head_that_reads_more_than_the_class_token_still_counts():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_labels=10,
    )  # fmt: skip
    model = transformers.Dinov2ForImageClassification(config)
    everything = said(model, "all", positions="frozen")["span"]
    assert everything.possible
    assert said(model, "attention/mlp/norm/patch", positions="frozen")["span"].possible


SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_hidden_layers": 2, "num_labels": 10,
}  # fmt: skip


def averaging(kind):
    """A model whose head reads all tokens, though nothing of timm's says so."""
    if kind == "CaiT":
        return build_model(WIDE.replace("vit_tiny_patch16_224", "cait_xxs24_224"))
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


@pytest.mark.parametrize("kind", ["CaiT", "Beit", "IJepa"])
def test_the_last_block_shows_all_tokens_where_all_of_them_are_read_behind_it(kind):
    """The head of BEiT and I-JEPA reads the mean; CaiT's class token joins behind the blocks."""
    model = averaging(kind)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    update = protect(model, []).update(torch.randn(1, 3, 32, 32), torch.tensor([3]))
    last = Anatomy.of(model).blocks[-1]
    values = torch.linalg.svdvals(update.read(f"{last.fc1}.weight").double())
    assert int((values > 1e-5 * values[0]).sum()) >= 16
    assert said(model, "last-block")["token-search"].possible
    assert not said(model, "head")["token-search"].possible


def test_the_sizes_of_adapters_are_counted(wide):
    anatomy = Anatomy.of(wide)
    lora = trained_sizes(wide, anatomy, "lora:r=4")
    assert lora["blocks.0.attn.qkv.lora_A.default.weight"] == 4 * 256
    assert lora["blocks.1.attn.qkv.lora_B.default.weight"] == 4 * 768 and len(lora) == 4
    assert sum(trained_sizes(wide, anatomy, "lora").values()) == 2 * sum(lora.values())
    bottleneck = sum(trained_sizes(wide, anatomy, "adapters:r=16").values())
    assert bottleneck == 2 * (2 * 16 * 256 + 16 + 256)
    report = plan_report(wide, (), train="lora:r=4").to_json()
    assert report["train"] == "lora:r=4" and report["select"] == ""
    assert report["trained"]["parameters"] == sum(lora.values())
    assert report["encrypted"]["parameters"] == 0


@pytest.mark.parametrize(
    "train, told",
    [
        ("lora:rank=4", "lora:r=N"), ("lora:r=0", "lora:r=N"), ("adapters:r=x", "adapters:r=N"),
        ("", "an empty part"), ("last_block", "a regular expression"), ("head/", "an empty part"),
    ],
)  # fmt: skip
def test_what_names_nothing_is_refused(wide, train, told):
    with pytest.raises(InputError, match=told):
        plan_report(wide, (), train=train)


@pytest.mark.parametrize("positions", ["frozen", "none"])
def test_positions_alone_that_a_defense_does_not_train_are_nothing_to_plan(wide, positions):
    with pytest.raises(InputError, match=f"none of position under {positions} positions"):
        plan_report(wide, (), train="position", positions=positions)


@pytest.mark.parametrize("train", ["head", "lora:r=4/head"])
def test_the_head_of_a_model_without_classes_is_told_to_be_none(small_vit, train):
    """Backbones such as DINOv2's come without: their plan would leave out the labels."""
    with pytest.raises(InputError, match=r"'head', of which the model has none.*num_classes"):
        plan_report(small_vit(num_classes=0), (), train=train)


def test_lora_beside_weights_that_are_no_layer_is_refused():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(16, 4, 1, 2, 32, 64, num_classes=10)
    with pytest.raises(InputError, match="linear layers"):
        plan_report(model, (), train="lora:r=4")


def test_lora_that_the_model_never_calls_is_refused():
    """BEiT's attention reads the weight of its projection by itself, past what is beside it."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 2}
    beit = timm.create_model("beit_base_patch16_224", num_classes=10, **sizes).train()
    with pytest.raises(InputError, match="never calls"):
        train_only(beit, "lora:r=4/head")
    assert all(m.training for m in beit.modules())
    assert not any(m._forward_pre_hooks for m in beit.modules())


def test_adapters_are_as_wide_as_the_mlp_they_stand_beside():
    sizes = {"img_size": 56, "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16}
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **sizes)
    planned = trained_sizes(swin, Anatomy.of(swin), "adapters:r=4")
    made = {n: p.numel() for n, p in train_only(swin, "adapters:r=4").named_parameters()}
    assert planned == {n: made[n] for n in made if ".adapter." in n}
    assert swin(torch.zeros(1, 3, 56, 56)).shape == (1, 10)


def test_training_and_encryption_are_counted_together(wide):
    both = plan_report(wide, "head", train="head")
    assert not both.remaining() and both.encrypted.share == 1
    assert "labels" not in plan_report(wide, "head", train="last-block/head").remaining()


def test_the_command_line_takes_train_alone_or_with_encrypt(capsys):
    model = ["--model", WIDE]
    assert main(["plan", *model, "--train", "lora:r=4", "--train", "head", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train"] == "lora:r=4/head" and report["schema"] == 1
    assert {a["attack"] for a in report["attacks"] if a["possible"]} == {
        "containment", "labels", "matching",
    }  # fmt: skip
    assert main(["plan", *model, "--train", "head"]) == 0
    assert "trained: head" in capsys.readouterr().out
    assert main(["plan", *model]) == 2
    assert "--train WHAT" in capsys.readouterr().err
