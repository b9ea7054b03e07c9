"""Span inversion: what fixed positions do not hide, what does, and when it must say so."""

import pytest
import torch

from vitguard import data
from vitguard.attacks.equations.mask import shuffled_positions
from vitguard.attacks.span import SpanInversion
from vitguard.attacks.span.system import span_system
from vitguard.core import Normalization
from vitguard.errors import Blocked, NotApplicable
from vitguard.metrics import psnr
from vitguard.vit import Anatomy

FROZEN = "positions:kind=frozen"


def run(view, generator=None):
    return SpanInversion().run(view, generator or torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["frozen", "random"])
def test_fixed_positions_do_not_hide_one_image(small_vit, observe, photo, kind):
    guess = run(observe(small_vit(), photo, defenses=f"positions:kind={kind}"))
    assert float(psnr(guess.images, photo)) > 90
    assert guess.details["from"] == "qkv" and guess.details["nullity"] == 0
    assert guess.space is None and guess.labels.tolist() == [0]


@pytest.mark.parametrize(
    ("withhold", "source", "reads_patch"),
    [
        (("patch",), "qkv", False),
        ((r"blocks\.0\.attn\.qkv",), "proj+fc1", True),
        ((r"blocks\.0\.attn\.qkv", "patch"), "proj+fc1", False),
        ((r"blocks\.0\.attn\.qkv\.bias", r"mlp\.fc1\.bias"), "qkv", True),
        (("position", "token", "head", "norm"), "qkv", True),
    ],
)
def test_hiding_some_gradients_is_not_enough(
    small_vit, observe, photo, withhold, source, reads_patch
):
    guess = run(observe(small_vit(), photo, defenses=FROZEN, withhold=withhold))
    assert float(psnr(guess.images, photo)) > 60
    assert (guess.details["from"], guess.details["patch_gradient"]) == (source, reads_patch)


@pytest.mark.parametrize(
    "changes",
    [{"qkv_bias": False}, {"init_values": 0.1}, {"proj_bias": False}, {"reg_tokens": 4}],
)
def test_projection_and_fc1_form_on_variants(small_vit, observe, photo, changes):
    model = small_vit(**changes)
    guess = run(observe(model, photo, defenses=FROZEN, withhold=("qkv",)))
    assert guess.details["from"] == "proj+fc1"
    assert float(psnr(guess.images, photo)) > 70


def test_hiding_attention_including_the_projection_blocks_by_name(small_vit, observe, photo):
    with pytest.raises(Blocked) as caught:
        run(observe(small_vit(), photo, defenses=FROZEN, withhold=("attention",)))
    assert caught.value.name == "blocks.0.attn.qkv.weight"


def test_without_the_patch_gradient_a_narrow_model_blocks_with_the_count(small_vit, observe, photo):
    narrow = small_vit(embed_dim=64, num_heads=4)  # 64 - 17 equations for 48 + 1 unknowns
    with pytest.raises(Blocked, match="49 unknowns have 47 equations"):
        run(observe(narrow, photo, defenses=FROZEN, withhold=("patch",)))


def test_as_many_tokens_as_dimensions_leave_no_equation(small_vit, observe, photo, photos):
    with pytest.raises(NotApplicable, match="17 tokens fill the 16 dimensions"):
        run(observe(small_vit(embed_dim=16, num_heads=4), photo, defenses=FROZEN))
    with pytest.raises(NotApplicable, match="fill"):
        run(observe(small_vit(embed_dim=48), photos[:3], defenses=FROZEN))


def test_the_difference_of_one_step_exactly_and_of_several_to_first_order(
    small_vit, observe, photo
):
    one = observe(small_vit(), photo, defenses=FROZEN, learning_rate=0.1)
    assert float(psnr(run(one).images, photo)) > 50
    several = observe(small_vit(), photo, defenses=FROZEN, learning_rate=0.1, local_steps=2)
    guess = run(several)
    assert float(psnr(guess.images, photo)) > 20
    assert "first order" in guess.details["steps"]
    assert guess.space is None and guess.shuffled is None


@pytest.mark.slow
def test_sine_cosine_positions_leave_a_space_that_holds_the_truth(small_vit, observe, photo):
    view = observe(small_vit().double(), photo.double(), defenses="positions:kind=sincos")
    guess = run(view)
    assert guess.space is not None and guess.details["nullity"] > 0
    anatomy = Anatomy.of(view.model)
    truth = anatomy.patchify(Normalization().apply(photo.double()))[0]
    off = truth - guess.space.origin
    basis = guess.space.basis
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-9)
    assert (off - off @ basis @ basis.T).norm() < 1e-5 * off.norm()


@pytest.mark.slow
def test_a_batch_of_two_leaves_the_differences_of_its_patches_free(small_vit, observe, photos):
    view = observe(small_vit(embed_dim=192).double(), photos[:2].double(), defenses=FROZEN)
    guess = run(view)
    assert guess.details["nullity"] == 16
    system = span_system(view.gradient(), Anatomy.of(view.model))
    anatomy = Anatomy.of(view.model)
    for photo in photos[:2].double():
        off = anatomy.patchify(Normalization().apply(photo)) - guess.space.origin
        rest = off - off @ guess.space.basis @ guess.space.basis.T
        assert rest.norm() < 1e-5 * off.norm()
    assert system.solve(system.embedding.offset)[1].max() < 1e-6


def test_the_residual_is_small_for_the_true_offsets_only(small_vit, observe, photo):
    view = observe(small_vit().double(), photo.double(), defenses=FROZEN).gradient()
    system = span_system(view, Anatomy.of(view.model))
    true = system.solve(system.embedding.offset)[1]
    wrong = system.solve(system.embedding.offset + 0.1 * torch.randn(16, 96).double())[1]
    assert true.max() < 1e-8 < 1e-3 < wrong.min()


@pytest.mark.parametrize(
    ("residual", "mask"),
    [
        ([1e-9, 2e-9, 0.1, 3e-9, 0.2], [False, False, True, False, True]),
        ([1e-9, 2e-9, 3e-9], [False] * 3),
        ([0.3, 0.2, 0.4], [True] * 3),
        ([1e-9], [False]),
    ],
)
def test_shuffled_positions_are_a_gap_in_the_residuals(residual, mask):
    assert shuffled_positions(torch.tensor(residual).double()).tolist() == mask


def test_the_ranks_are_those_of_the_geometry_not_of_a_tolerance(small_vit, observe, photo):
    """A tolerance loses 20 to 50 dB on a float32 gradient (docs/methods.md 2.4)."""
    view = observe(small_vit(), photo, defenses=FROZEN).gradient()
    system = span_system(view, Anatomy.of(view.model))
    assert system.rank == 16 + 1 and system.basis.shape == (48, 16)
    assert system.constraint.shape == (97 - 17, 96)


def _cifar(observe, cifar_vit, cifar, count, **how):
    from tests.conftest import CIFAR_NORMALIZATION

    pixels, labels = (x[:count, None] for x in cifar)
    found = []
    for image, label in zip(pixels, labels, strict=True):
        view = observe(
            cifar_vit, image, label, defenses=FROZEN, normalization=CIFAR_NORMALIZATION, **how
        )
        found.append(float(psnr(run(view).images, image)))
    return float(torch.tensor(found).median())


@pytest.mark.slow
def test_trained_cifar_vit_with_fixed_positions(cifar_vit, cifar, observe):
    assert _cifar(observe, cifar_vit, cifar, 40) >= 100


@pytest.mark.slow  # small models above, without each gradient
def test_trained_cifar_vit_without_the_patch_gradient(cifar_vit, cifar, observe):
    assert _cifar(observe, cifar_vit, cifar, 40, withhold=("patch",)) >= 80


def test_trained_cifar_vit_one_step_difference(cifar_vit, cifar, observe):
    assert _cifar(observe, cifar_vit, cifar, 10, learning_rate=0.1) >= 55


@pytest.fixture(scope="module")
def vit_base():
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224")


@pytest.mark.slow
@pytest.mark.parametrize("index", range(2))
def test_vit_base_at_224_from_sample_photos(vit_base, observe, index, generator):
    from vitguard.attacks.position import PositionInversion

    photo = data.sample_images((224, 224), count=3).pixels[index : index + 1]
    control = PositionInversion().run(observe(vit_base, photo), generator)
    assert float(psnr(control.images, photo)) >= 95
    for withhold in ((), (r"blocks\.0\.attn\.qkv",)):
        guess = run(observe(vit_base, photo, defenses=FROZEN, withhold=withhold))
        assert float(psnr(guess.images, photo)) >= 55
