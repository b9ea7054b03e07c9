"""Labels from the gradient of the head."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fast import crossed, fast_for
from vitguard.attacks import cascade
from vitguard.attacks.inverting import InvertingGradients
from vitguard.attacks.labels import infer_labels, labels_from_counts, pair_labels, try_labels
from vitguard.audit.attempts import labels_overlap
from vitguard.errors import Blocked, NotApplicable
from vitguard.models import load_checkpoint


@pytest.mark.parametrize("withhold", [(), (r"head\.bias",)])
def test_the_label_of_one_image_is_read_off_the_head(
    small_vit, observe, photos, generator, withhold
):
    model = small_vit()
    for label in range(10):
        view = observe(model, photos[label % 5][None], torch.tensor([label]), withhold=withhold)
        assert infer_labels(view, generator).tolist() == [label]


def test_without_a_bias_at_all(small_vit, observe, photo, generator):
    model = small_vit()
    model.head = torch.nn.Linear(96, 10, bias=False)
    view = observe(model, photo, torch.tensor([7]))
    assert infer_labels(view, generator).tolist() == [7]


@pytest.mark.parametrize("labels", [[7, 3], [4, 1, 1], [9, 0, 5, 2]])
def test_labels_are_put_to_the_images_they_belong_to(small_vit, observe, photos, labels):
    images = photos[: len(labels)]
    view = observe(small_vit(), images, torch.tensor(labels))
    assert pair_labels(view, images, torch.tensor(sorted(labels))).tolist() == labels
    turned = pair_labels(view, images.roll(1, 0), torch.tensor(labels))
    assert turned.tolist() == torch.tensor(labels).roll(1).tolist()
    hidden = observe(small_vit(), images, torch.tensor(labels), withhold=(r"head\.weight",))
    assert pair_labels(hidden, images, torch.tensor(sorted(labels))).tolist() == sorted(labels)


@pytest.mark.parametrize("labels", [[3, 3], [1, 1, 4], [0, 0, 0, 9], [2, 5, 5, 5, 7]])
def test_a_batch_with_repeated_labels(small_vit, observe, photos, generator, labels):
    view = observe(small_vit(), photos[: len(labels)], torch.tensor(labels))
    assert infer_labels(view, generator).tolist() == labels


def test_a_difference_of_one_step_gives_labels_too(small_vit, observe, photo, generator):
    view = observe(small_vit(), photo, torch.tensor([4]), learning_rate=0.1)
    assert infer_labels(view, generator).tolist() == [4]


def test_noise_that_leaves_the_label_standing_does_not_silence_it(
    small_vit, observe, photo, generator
):
    for defense in ("noise:scale=0.05", "pruning:keep=0.1"):
        view = observe(small_vit(), photo, torch.tensor([4]), defenses=defense)
        assert infer_labels(view, generator).tolist() == [4]


@pytest.mark.parametrize(
    ("loss", "count"),
    [
        (lambda out, y: F.cross_entropy(out, 0.5 * (F.one_hot(y, 10) + F.one_hot(y + 3, 10))), 1),
        (lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 10).float()), 2),
    ],
)
def test_soft_labels_and_other_losses_do_not_apply(
    small_vit, observe, photos, generator, loss, count
):
    view = observe(small_vit(), photos[:count], loss=loss)
    with pytest.raises(NotApplicable):
        infer_labels(view, generator)


@pytest.mark.parametrize("count", [2, 5])
def test_mixed_labels_of_a_batch_are_refused(small_vit, observe, photos, generator, count):
    def mixed(out, y):
        return F.cross_entropy(out, 0.6 * F.one_hot(y, 10) + 0.4 * F.one_hot(y.flip(0), 10))

    view = observe(small_vit(), photos[:count], torch.arange(count), loss=mixed)
    with pytest.raises(NotApplicable, match="soft label"):
        infer_labels(view, generator)


def test_hidden_heads_block_and_two_heads_do_not_apply(small_vit, observe, photo, generator):
    hidden = observe(small_vit(), photo, withhold=("head",))
    with pytest.raises(Blocked, match="head"):
        infer_labels(hidden, generator)
    assert try_labels(hidden, generator) is None
    two = observe(small_vit("deit_base_distilled_patch16_224"), photo)
    with pytest.raises(NotApplicable, match="one classification head"):
        infer_labels(two, generator)


@pytest.mark.slow
def test_the_last_block_gives_every_label_of_a_batch(small_vit, observe, photos, generator):
    labels = torch.tensor([7, 2, 2, 9])
    for withhold in ((), (r"head\.bias",)):
        view = observe(small_vit(), photos[:4], labels, withhold=withhold)
        assert infer_labels(view, generator).tolist() == [2, 2, 7, 9]


def hugging_face(kind, moved):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        image_size=16, patch_size=4, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=10, **({"intermediate_size": 96} if kind == "ViT" else {}),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return moved(getattr(transformers, f"{kind}ForImageClassification")(config))


@pytest.mark.parametrize(
    ("kind", "labels"), crossed(["ViT", "Dinov2", "Dinov2WithRegisters"], [[4], [7, 2], [3, 3]])
)
def test_labels_on_hugging_face_models(moved, observe, photos, generator, kind, labels):
    """DINOv2's head reads two tokens: the last block tells nothing, the bias still does."""
    model = hugging_face(kind, moved)
    view = observe(model, photos[: len(labels)], torch.tensor(labels))
    assert infer_labels(view, generator).tolist() == sorted(labels)
    guess = InvertingGradients.fast(iterations=2).run(view, generator)
    assert sorted(guess.labels.tolist()) == sorted(labels)
    if kind == "ViT" and len(labels) > 1:
        assert len(cascade.last_block_samples(view, generator).labels) == len(labels)
    elif len(labels) > 1:
        with pytest.raises(NotApplicable, match="no LayerNorm between"):
            cascade.Cascade().run(view, generator)


def test_a_batch_without_bias_and_last_block_does_not_apply(small_vit, observe, photos, generator):
    view = observe(small_vit(), photos[:2], withhold=(r"head\.bias", r"blocks\.1\.mlp"))
    with pytest.raises(NotApplicable, match="bias"):
        infer_labels(view, generator)


@pytest.mark.parametrize("labels", [[3, 3], [1, 1, 4], [0, 0, 0, 9], [2, 5, 5, 5, 7]])
def test_without_the_last_block_counts_are_estimated(small_vit, observe, photos, generator, labels):
    view = observe(
        small_vit(), photos[: len(labels)], torch.tensor(labels), withhold=(r"blocks\.1\.mlp",)
    )
    assert infer_labels(view, generator).tolist() == labels


@pytest.mark.parametrize("weights", ["a", "b"])
@pytest.mark.parametrize("batch", fast_for([8, 32], fast=[8]))
def test_every_label_of_a_batch_on_trained_weights(
    cifar, cifar_vit, data_folder, observe, weights, batch
):
    from tests.conftest import CIFAR_NORMALIZATION

    model = copy.deepcopy(cifar_vit)
    load_checkpoint(model, data_folder / "weights" / f"cifar10_vit_{weights}.safetensors")
    pixels, labels = cifar[0][:batch], cifar[1][:batch]
    view = observe(model, pixels, labels, normalization=CIFAR_NORMALIZATION)
    got = infer_labels(view, torch.Generator().manual_seed(0))
    assert got.tolist() == labels.sort().values.tolist()


@pytest.mark.slow
def test_what_the_cascade_misses_is_filled_up_from_the_bias(
    small_vit, observe, photos, generator, monkeypatch
):
    view = observe(small_vit(), photos[:5], torch.tensor([2, 5, 5, 9, 7]))
    whole = cascade.last_block_samples(view.gradient(), generator)
    assert len(whole.labels) == 5
    for left in range(5):
        some = whole.where(torch.arange(5) < left)
        monkeypatch.setattr(
            "vitguard.attacks.labels.last_block_samples", lambda *_, some=some: some
        )
        assert infer_labels(view, generator).tolist() == [2, 5, 5, 7, 9]


@pytest.mark.slow
def test_solutions_that_are_no_image_give_no_label(cifar, cifar_vit, observe, generator):
    """A random model hardly tells 32 images apart: what solves the equations need not be one."""
    from tests.conftest import CIFAR_NORMALIZATION

    model = copy.deepcopy(cifar_vit)
    torch.manual_seed(0)
    model.init_weights()
    pixels, labels = cifar[0][:32], cifar[1][:32]
    view = observe(model, pixels, labels, normalization=CIFAR_NORMALIZATION)
    samples = cascade.last_block_samples(view.gradient(), generator)
    told = samples.labels >= 0
    assert int(told.sum()) >= 16
    torch.testing.assert_close(
        samples.weights[told], torch.full_like(samples.weights[told], 1 / 32), rtol=0.05, atol=0
    )
    assert labels_overlap(infer_labels(view, generator), labels) == 1


@pytest.mark.slow
def test_a_trained_model_without_the_cascade_takes_every_class_alike(
    cifar, cifar_vit, observe, generator
):
    from tests.conftest import CIFAR_NORMALIZATION

    pixels, labels = cifar
    view = observe(cifar_vit, pixels[:32], labels[:32], normalization=CIFAR_NORMALIZATION)
    assert labels_overlap(infer_labels(view, generator), labels[:32]) > 0.7


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-3, 9, allow_nan=False), min_size=1, max_size=6), st.integers(1, 8))
def test_counts_are_rounded_to_exactly_one_label_per_image(counts, batch):
    labels = labels_from_counts(torch.tensor(counts).double(), batch)
    assert labels.shape == (batch,)
    assert labels.min() >= 0 and labels.max() < len(counts)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.floats(-0.49, 0.49))
@settings(max_examples=50, deadline=None)
def test_counts_that_are_nearly_whole_are_those_counts(labels, error):
    truth = torch.bincount(torch.tensor(labels), minlength=5).double()
    noise = torch.zeros(5).double()
    noise[0], noise[1] = error / 2, -error / 2
    assert labels_from_counts(truth + noise, len(labels)).tolist() == sorted(labels)
