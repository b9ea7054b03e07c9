"""The statements of `vitguard plan`, confirmed by the audit and by solving chained equations."""

import pytest
import timm
import torch

from tests.fast import fast_for
from vitguard import data
from vitguard.attacks.equations.rows import complement, row_basis
from vitguard.audit import audit
from vitguard.models import build_model
from vitguard.plan import plan_report
from vitguard.registry import parse_stack
from vitguard.vit import Anatomy


def findings(model, batch, stacks, attacks=("position", "span"), normalization=None):
    report = audit(
        model,
        batch,
        defenses={s: parse_stack(s) for s in stacks},
        attacks=list(attacks),
        batch_size=1,
        normalization=normalization,
    )
    return {(f.defense, f.attack): f for f in report.findings}


def photo(size=224, index=0):
    images = data.sample_images((size, size), count=index + 1, classes=10)
    return images.pixels[index:], images.labels[index:]


@pytest.fixture(scope="module")
def small():
    """Wide for its 16 tokens, so that every closed form has its equations; four blocks."""
    spec = "vit_tiny_patch16_224:img_size=64,patch_size=16,embed_dim=192,depth=4,num_heads=4"
    return build_model(spec + ",num_classes=10")


STACKS = {  # stack -> (positions, selection, attacks that leak)
    "encryption:select=attention,force=true": ("learnable", "attention", {"position"}),
    "positions:kind=frozen+encryption:select=attention,force=true": ("frozen", "attention", set()),
    r"positions:kind=frozen+encryption:select=attn\.qkv,force=true": (
        "frozen",
        r"attn\.qkv",
        {"span"},
    ),
    "encryption:select=mlp,force=true": ("learnable", "mlp", {"position", "span"}),
    "encryption:select=plan": ("learnable", "plan", set()),
    "encryption:select=all": ("learnable", "all", set()),
}


@pytest.mark.slow
@pytest.mark.parametrize("stack", fast_for(STACKS, fast=[s for s in STACKS if "plan" in s]))
def test_the_audit_finds_what_the_plan_states(small, stack):
    positions, select, leaking = STACKS[stack]
    remaining = set(plan_report(small, select, positions=positions).remaining())
    assert remaining & {"position", "span"} == leaking
    found = findings(small, photo(64), [stack])
    for attack in ("position", "span"):
        finding = found[stack, attack]
        assert found["none", attack].verdict == "leaks"
        if attack in leaking:
            assert finding.verdict == "leaks" and finding.psnr.max > 60, finding
        else:
            assert finding.verdict == "blocked", finding


def test_the_trained_cifar_vit_leaks_through_span_without_the_whole_embedding(cifar_vit, cifar):
    from tests.conftest import CIFAR_NORMALIZATION

    pixels, labels = cifar
    stack = "encryption:select=embedding,force=true"
    found = findings(
        cifar_vit, (pixels[:4], labels[:4]), [stack], normalization=CIFAR_NORMALIZATION
    )
    assert found[stack, "position"].verdict == "blocked"
    assert found[stack, "span"].psnr.median > 55
    assert "span" in plan_report(cifar_vit, "embedding").remaining()


SPEC = (
    "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim={},depth={},num_heads={},"
    "num_classes=10"
)
SHALLOW = [  # width, depth, heads, positions, selection, attack, dB
    (96, 1, 4, "sincos", r"attn\.qkv", "gelu-span", None),
    (96, 2, 4, "sincos", r"attn\.qkv", "gelu-span", 60),
    (192, 2, 3, "sincos", r"attn\.qkv", "gelu-span", 60),
    (192, 2, 12, "frozen", "head", "gelu-span", 60),
    (96, 3, 4, "sincos", r"attn\.qkv", "gelu-span", 60),
    (256, 2, 4, "sincos", "embedding", "gelu-span", 60),  # wider than a patch has pixels
    (192, 2, 4, "sincos", "embedding", "gelu-span", None),
    (192, 1, 12, "frozen", "head", "span", 70),  # 2 x heads + 1 rows reach 17 tokens
    (192, 1, 8, "frozen", "head", "span", 70),
    (192, 1, 6, "frozen", "head", "span", None),
    (192, 2, 3, "frozen", r"attn\.qkv", "span", 70),
]


FEW = (SHALLOW[2], *SHALLOW[5:8], *SHALLOW[9:])  # each attack, depth and selection, held and not


@pytest.mark.parametrize(
    "width, depth, heads, positions, select, attack, bar",
    [case if case in FEW else pytest.param(*case, marks=pytest.mark.slow) for case in SHALLOW],
)
def test_few_blocks_under_a_class_token_leak_where_the_plan_says_so(
    width, depth, heads, positions, select, attack, bar
):
    """What the last block sends back has full rank below it, and of itself 2 heads + 1."""
    model = build_model(SPEC.format(width, depth, heads))
    stated = plan_report(model, select, positions=positions).attacks
    assert next(a.exact for a in stated if a.attack == attack) is (bar is not None)
    stack = f"positions:kind={positions}+encryption:select={select},force=true"
    setting = f"{attack}:seconds=8" if attack == "gelu-span" else attack
    (finding,) = (f for f in findings(model, photo(32), [stack], [setting]).values()
                  if f.defense == stack)  # fmt: skip
    if bar is None:
        assert finding.verdict != "leaks", finding
    else:
        assert finding.verdict == "leaks" and finding.psnr.max > bar, finding


@pytest.mark.slow
@pytest.mark.parametrize("width", [96, 192])
def test_positions_of_low_rank_leave_images_that_can_be_told_from_others(width):
    model = build_model(SPEC.format(width, 2, 4))
    span = plan_report(model, "head", positions="sincos").attacks[1]
    assert span.attack == "span" and span.possible and not span.exact
    images = data.sample_images((32, 32), count=3, classes=10)
    found = findings(model, (images.pixels, images.labels), ["positions:kind=sincos"], ["span"])
    finding = found["positions:kind=sincos", "span"]
    assert finding.verdict == "leaks" and finding.psnr.max < 30, finding


def chained(model, pixels, block, norm, weight, bias):
    """PSNR of solving for the patches from the rows of one later layer, all links plain.

    A slow, obvious version: unknowns are the patch in the patches' span, one combination of rows
    for each projection and fc2 on the way, and the standard deviation at the norm.
    """
    anatomy = Anatomy.of(model)
    images = (pixels - 0.5) / 0.5
    loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([3]))
    names = [n for n, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    g = {n: t.double() for n, t in zip(names, gradients, strict=True)}
    w = {n: p.detach().double() for n, p in model.named_parameters()}
    tokens, embed = anatomy.tokens, w[anatomy.patch_weight].flatten(1)
    basis = row_basis(g[anatomy.patch_weight].flatten(1), anatomy.patches)
    offset = w[anatomy.patch_bias] + w["pos_embed"][0, 1:]
    moves = [embed @ basis]
    for number, step in enumerate(anatomy.blocks[: block + 1]):
        links = [step.proj, step.fc2] if number < block else []
        links = [step.proj] if number == block and norm == step.norm2 else links
        for link in links:
            moves.append(w[f"{link}.weight"] @ row_basis(g[f"{link}.weight"], tokens))
            offset = offset + w[f"{link}.bias"]
    outside = complement(torch.cat([g[weight], g[bias][:, None]], 1), tokens)
    width = anatomy.width
    constraint = (w[f"{norm}.weight"][:, None] * outside[:width]).T
    constraint = constraint - constraint.mean(1, keepdim=True)
    deviation = outside[:width].T @ w[f"{norm}.bias"] + outside[width]
    system = torch.cat([constraint @ torch.cat(moves, 1), deviation[:, None]], 1)
    solution = torch.linalg.lstsq(system, -constraint @ offset.T, driver="gelsy").solution
    found = anatomy.unpatchify((basis @ solution[: basis.shape[1]]).T)
    error = (found.clamp(-1, 1) - images[0].double()) / 2
    return float(-10 * error.square().mean().log10())


def later(model, pixels, block, layer):
    step = Anatomy.of(model).blocks[block]
    if layer == "qkv":
        return chained(model, pixels, block, step.norm1, step.qkv[0], step.qkv_bias[0])
    return chained(model, pixels, block, step.norm2, f"{step.fc1}.weight", f"{step.fc1}.bias")


@pytest.mark.parametrize(
    "block, layer, leaks",
    [(0, "qkv", True), (0, "fc1", True), (1, "qkv", True), (1, "fc1", True), (2, "qkv", True),
     (3, "qkv", False), (3, "fc1", False)],
)  # fmt: skip
def test_later_blocks_give_the_image_away_as_counted_but_the_last_one_does_not(
    small, block, layer, leaks
):
    """Encrypting every earlier layer that could answer leaves this one, as `span-chain` says."""
    rows = {"qkv": r"attn\.qkv", "fc1": r"mlp\.fc1"}
    before = [f"blocks\\.{b}\\.{r}" for b in range(block) for r in rows.values()]
    before += [f"blocks\\.{block}\\.{rows['qkv']}"] if layer == "fc1" else []
    stated = plan_report(small, "head/" + "/".join(before or ["head"]), positions="frozen")
    assert ("span-chain" in stated.remaining()) is leaks
    psnr = later(small, photo(64)[0], block, layer)
    assert psnr > 55 if leaks else psnr < 35, psnr


@pytest.mark.slow
@pytest.mark.parametrize(  # of each attack one that is stated to leak; all stand above, smaller
    "stack, attack, bar",
    [
        ("encryption:select=attention,force=true", "position", 95),
        (r"positions:kind=frozen+encryption:select=attn\.qkv,force=true", "span", 55),
        ("encryption:select=plan", "span", None),
    ],
)
def test_vit_base_at_full_depth_on_a_real_photo(data_folder, base, stack, attack, bar):
    model, batch = base
    finding = findings(model, batch, [stack], [attack])[stack, attack]
    if bar is None:
        assert finding.verdict == "blocked", finding
    else:
        assert finding.verdict == "leaks" and finding.psnr.max > bar, finding


@pytest.fixture(scope="module")
def base(data_folder):
    torch.manual_seed(0)
    images = data.load_images(sorted((data_folder / "photos").glob("*.jpg"))[:1], (224, 224))
    return timm.create_model("vit_base_patch16_224"), (images.pixels, torch.tensor([9]))


@pytest.mark.slow
def test_vit_large_leaks_through_span_without_the_whole_embedding(data_folder):
    images = data.load_images(sorted((data_folder / "photos").glob("*.jpg"))[1:2], (224, 224))
    torch.manual_seed(0)
    model = timm.create_model("vit_large_patch16_224", depth=4)
    stack = "encryption:select=embedding,force=true"
    found = findings(model, (images.pixels, torch.tensor([10])), [stack])
    assert found[stack, "position"].verdict == "blocked"
    assert found[stack, "span"].psnr.max > 50
    assert plan_report(model, "embedding").remaining()[0] == "span"
