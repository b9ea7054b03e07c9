"""Deep tokens: a later block gives the image away where the first ones send nothing."""

import pytest
import torch

from tests import conftest
from tests.conftest import CIFAR_NORMALIZATION
from vitguard import data
from vitguard.attacks.budget import ENDLESS
from vitguard.attacks.cascade.separate import LastBlock
from vitguard.attacks.deep_tokens import DeepTokens, search
from vitguard.attacks.deep_tokens import attack as deep
from vitguard.attacks.deep_tokens.stem import Stem
from vitguard.attacks.ladder import Ladder
from vitguard.core import Normalization
from vitguard.errors import Blocked, NotApplicable
from vitguard.metrics import psnr
from vitguard.models import build_model, load_checkpoint, normalization_of
from vitguard.plan import plan_report
from vitguard.vit import Anatomy

STEM = ("embedding", r"^blocks\.0\.")


def crop(cifar, index):
    return cifar[0][index : index + 1, :, 8:16, 8:16], cifar[1][index : index + 1]


@pytest.fixture
def narrow(small_vit):
    """4 patches of 4 x 4 pixels: seconds instead of minutes."""
    return small_vit(img_size=8, depth=3, embed_dim=64)


@pytest.mark.parametrize("index", [1, pytest.param(21, marks=pytest.mark.slow)])
def test_a_frozen_stem_does_not_hide_the_image(cifar, narrow, observe, index):
    pixels, labels = crop(cifar, index)
    view = observe(narrow, pixels, labels, withhold=STEM, normalization=CIFAR_NORMALIZATION)
    guess = DeepTokens().run(view, torch.Generator().manual_seed(0))
    assert guess.details["block"] == 1 and guess.details["found"] == 5
    assert float(psnr(guess.images, pixels)) > 60, guess.details
    assert bool(guess.verified.all())


def test_what_is_found_is_not_verified_on_an_unrelated_gradient(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, withhold=STEM)
    draw = torch.Generator().manual_seed(3)
    for name, tensor in view.update.tensors.items():
        view.update.tensors[name] = torch.randn(tensor.shape, generator=draw) * tensor.std()
    with pytest.raises(NotApplicable, match="no token"):
        DeepTokens(seconds=5.0).run(view, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "what",
    [pytest.param("a token is missing", marks=pytest.mark.slow), "the image makes others"],
)
def test_nothing_is_verified_where_a_token_is_missing_or_the_image_makes_others(
    cifar, narrow, observe, monkeypatch, what
):
    search, invert = deep.find_tokens, deep.Stem.invert
    if what == "a token is missing":
        monkeypatch.setattr(deep, "find_tokens", lambda *given: search(*given)[:-1])
    else:
        monkeypatch.setattr(
            deep.Stem, "invert", lambda *given, **named: 0.9 * invert(*given, **named)
        )
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, withhold=STEM, normalization=CIFAR_NORMALIZATION)
    guess = DeepTokens().run(view, torch.Generator().manual_seed(0))
    assert guess.verified is not None and not bool(guess.verified.any())
    if what == "a token is missing":
        assert "all tokens were found" in guess.details["unfinished"]


@pytest.fixture
def large(small_vit):
    """4,800 values an image, and patches of 192 pixels in tokens of 160 numbers; 26 tokens."""
    return small_vit(img_size=40, patch_size=8, embed_dim=160, depth=2)


@pytest.mark.slow
def test_all_tokens_of_an_image_of_any_size_are_found_and_the_rest_comes_from_the_prior(
    large, observe, photos
):
    image = torch.nn.functional.interpolate(photos[:1], (40, 40), mode="bilinear")
    view = observe(large, image, defenses="encryption:select=attention/embedding,force=true")
    guess = DeepTokens().run(view, torch.Generator().manual_seed(0))
    assert guess.details["found"] == guess.details["tokens"] == 26
    assert float(psnr(guess.images, image)) > 30, guess.details
    # 192 pixels of 158 numbers: other images make the same tokens, and a proof would be wrong
    assert guess.verified is not None and not bool(guess.verified.any())


def test_a_token_that_was_found_tells_its_own_gradient_and_is_taken_out(large, observe, photos):
    """The reference: each token's gradient behind fc2, by autograd of the public model."""
    image = torch.nn.functional.interpolate(photos[:1], (40, 40), mode="bilinear")
    view = observe(large, image, torch.tensor([3]))
    stem = Stem(view, Anatomy.of(view.model), 0)
    problem = LastBlock.at(view, stem.anatomy.blocks[0], 26, torch.ones(1, dtype=torch.float64))
    with torch.no_grad():
        tokens = stem.tokens(view.normalization.apply(image.double()))[0]
    m = tokens @ problem.inner + problem.constant
    held = []
    layer = stem.model.get_submodule(stem.anatomy.blocks[0].fc2)
    with layer.register_forward_hook(lambda module, given, made: held.append(made)):
        loss = torch.nn.functional.cross_entropy(
            stem.model(view.normalization.apply(image.double())), torch.tensor([3])
        )
    (true,) = torch.autograd.grad(loss, held[0])
    found, apart = search._own_gradients(problem, m)
    assert float(torch.cosine_similarity(found, true[0]).abs().min()) > 0.99
    assert float(apart.max()) < search._APART
    assert float(search._own_gradients(problem, torch.randn_like(m))[1].min()) > search._APART
    _, basis = problem.without(m[:20], found[:20])
    assert basis.shape == (26, 6)
    outside = m[20:] - (m[20:] @ basis) @ basis.T  # the others stay solutions, those found do not
    assert float((outside.norm(dim=1) / m[20:].norm(dim=1)).max()) < 1e-2
    gone = m[:20] - (m[:20] @ basis) @ basis.T
    assert float((gone.norm(dim=1) / m[:20].norm(dim=1)).min()) > 1e-2


def test_the_ladder_leaves_it_work_where_gelu_span_does_not_apply(large, observe, photos):
    """26 + 160 directions fill the width: without the patch gradient a token fits anywhere."""
    image = torch.nn.functional.interpolate(photos[:1], (40, 40), mode="bilinear")
    assert DeepTokens().share(observe(large, image)) == 0
    assert DeepTokens().share(observe(large, image, withhold=("embedding",))) > 0


@pytest.mark.slow
def test_tokens_that_no_natural_start_leads_to_are_found_from_other_directions(
    large, observe, photos
):
    """Natural starts are all the same here; what is left is reached by directions of their size."""
    image = torch.nn.functional.interpolate(photos[:1], (40, 40), mode="bilinear")
    view = observe(large, image)
    stem = Stem(view, Anatomy.of(view.model), 0)
    problem = LastBlock.at(view, stem.anatomy.blocks[0], 26, torch.ones(1, dtype=torch.float64))
    draw = torch.Generator().manual_seed(0)
    pool = stem.natural(1, draw)[0, :1].expand(64, -1)
    assert len(search.find_tokens(problem, pool, ENDLESS, 1e-4, draw)) == 26


@pytest.mark.slow
def test_pretrained_weights_with_attention_and_embedding_encrypted_give_a_photo_away(data_folder):
    model = build_model("vit_small_patch14_dinov2:img_size=112,num_classes=10")
    load_checkpoint(model, data_folder / "weights" / "dinov2_small_timm_fp16.safetensors")
    files = sorted((data_folder / "photos").iterdir())[30:31]
    pixels = data.load_images(files, (112, 112)).pixels
    view = conftest.observe(
        model, pixels, defenses="encryption:select=attention/embedding,force=true,rehearse=0",
        normalization=normalization_of(model),
    )  # fmt: skip
    guess = DeepTokens(seconds=120).run(view, torch.Generator().manual_seed(0))
    assert guess.details["found"] == 65, guess.details
    assert float(psnr(guess.images, pixels)) > 30, guess.details


def test_it_says_what_it_cannot_do(cifar, small_vit, narrow, observe, photos):
    draw = torch.Generator().manual_seed(0)
    pixels, labels = crop(cifar, 1)
    with pytest.raises(Blocked):
        DeepTokens().run(observe(narrow, pixels, labels, withhold=("mlp",)), draw)
    with pytest.raises(NotApplicable, match="batch"):
        DeepTokens().run(observe(small_vit(), photos[:2]), draw)
    with pytest.raises(NotApplicable, match="fill the spans"):
        DeepTokens().run(observe(small_vit(embed_dim=16), photos[:1]), draw)


def test_the_budget_is_work_and_is_kept(cifar, small_vit, observe, photos):
    view = observe(small_vit(depth=3), photos[:1], withhold=STEM, normalization=Normalization())
    with pytest.raises(NotApplicable, match=r"budget|no token"):
        DeepTokens(seconds=0.5).run(view, torch.Generator().manual_seed(0))


def test_plan_names_it_where_a_later_block_is_plain(narrow):
    left = plan_report(narrow, ("embedding", r"^blocks\.0\.")).remaining()
    assert "token-search" in left
    assert "token-search" not in plan_report(narrow, "mlp").remaining()


@pytest.mark.slow
def test_the_ladder_climbs_to_it_where_the_first_block_sends_nothing(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, withhold=STEM, normalization=CIFAR_NORMALIZATION)
    guess = Ladder().run(view, torch.Generator().manual_seed(0))
    assert guess.details["rung"] == "deep-tokens", guess.details["rungs"]
    assert float(psnr(guess.images, pixels)) > 60


def test_it_costs_the_ladder_nothing_where_the_first_block_is_read(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels)
    assert DeepTokens().share(view) == 0
    assert "deep-tokens" not in Ladder().run(view, torch.Generator()).details["rungs"]
