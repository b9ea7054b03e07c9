"""What imprint writes: a gradient for every image, and turns that leave its tokens as they are."""

import pytest
import torch

import vitguard as vg
from vitguard import data
from vitguard.attacks.imprint import ImprintReading
from vitguard.attacks.ladder import Ladder
from vitguard.core import LocalTraining, Normalization
from vitguard.errors import InputError, NotApplicable
from vitguard.guard import protect
from vitguard.metrics import recovered
from vitguard.models import build_model
from vitguard.threats import MaliciousServer
from vitguard.threats.crafts.imprint import Imprint

SPEC = "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=60,depth=3,num_heads=3,mlp_ratio=4,"
MODELS = {
    "class token": "num_classes=10",
    "average": "num_classes=10,class_token=False,global_pool=avg",
    "two classes": "num_classes=2",
    "average, two classes": "num_classes=2,class_token=False,global_pool=avg",
}


def images():
    """Decoys, and the extremes: black, white, one half of each."""
    flat = torch.stack([torch.full((3, 16, 16), level) for level in (0.0, 1.0)])
    half = flat[:1].clone()
    half[..., 8:] = 1.0
    return torch.cat([data.decoys(13, (16, 16), seed=1), flat, half])


@pytest.mark.parametrize("kind", MODELS)
def test_no_image_is_predicted_so_surely_that_its_gradient_vanishes(kind):
    """The slow obvious way: the gradient of each image by itself, for every label."""
    model = build_model(SPEC + MODELS[kind])
    model.load_state_dict(Imprint().weights(model))
    logits = model(Normalization().apply(images())).detach().double()
    classes = logits.shape[1]
    head = model.head.weight.detach().double()
    error = logits.softmax(-1)[:, None] - torch.eye(classes).double()  # images, labels, classes
    sizes = (error @ head).norm(dim=-1) / head.norm(dim=1).mean()
    assert sizes.min() > 0.25
    assert logits.softmax(-1).max() < 1.7 / classes


@pytest.mark.parametrize("kind", ["average", "class token"])
def test_images_of_the_class_that_the_head_favours_are_read_like_others(kind):
    model, pixels = build_model(SPEC + MODELS[kind]), images()[:13]
    threat = MaliciousServer()
    guard = protect(build_model(SPEC + MODELS[kind]).train(), ())
    guard.model.load_state_dict(threat.hand_out(guard))
    model.load_state_dict(guard.model.state_dict())
    favoured = model(Normalization().apply(pixels)).argmax(1)
    with guard.rewound():
        update = guard.update(Normalization().apply(pixels), favoured)
    guess = ImprintReading().run(threat.view(guard, update, Normalization()), torch.Generator())
    share = recovered(guess.images, guess.verified, pixels, (4, 4)).double().mean()
    assert share > 0.5


@pytest.mark.slow
def test_the_ladder_takes_what_reads_the_bins_before_attacks_made_for_honest_weights():
    """Patches of 192 pixels in tokens of 96 numbers: read, and none of them proved."""
    sizes = "img_size=32,patch_size=8,embed_dim=96,depth=2,num_heads=4,"
    model = build_model(f"vit_tiny_patch16_224:{sizes}{MODELS['average']}")
    batch = data.sample_images((32, 32), count=4).pixels, torch.arange(4)
    attacks = [ImprintReading(), Ladder(seconds=0.5)]
    alone, ladder = vg.audit(
        model, batch, threat=MaliciousServer(), attacks=attacks, batch_size=4
    ).findings
    assert alone.verdict == "leaks", alone.reason
    assert ladder.details["rung"] == "imprint"
    assert (ladder.verdict, ladder.gain) == (alone.verdict, pytest.approx(alone.gain))


@pytest.mark.parametrize("kind", ["Dinov2", "ViT"])
def test_models_of_transformers_are_read_whatever_their_head_pools(kind):
    """The head of Dinov2 reads the class token and the mean of the patches, side by side."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        image_size=16, patch_size=4, hidden_size=60, num_hidden_layers=2, num_attention_heads=3,
        num_labels=10, **({} if kind == "Dinov2" else {"intermediate_size": 240}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    batch = images()[:2], torch.tensor([1, 2])
    (found,) = vg.audit(
        model, batch, threat=MaliciousServer(), attacks=[ImprintReading()], batch_size=2,
        normalization=Normalization(),
    ).findings  # fmt: skip
    assert found.verdict == "leaks", found.reason
    assert found.details["found"] >= 16
    assert found.details["verified"] > 0


def test_turns_change_the_rows_and_leave_every_token_and_its_weight_as_they_are():
    model = build_model(SPEC + MODELS["class token"])
    first, second = (Imprint().turned(n).weights(model) for n in (0, 1))
    moved = {n for n in first if not torch.equal(first[n], second[n])}
    assert {n.split(".", 2)[-1] for n in moved} <= {
        "cls_token", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight"
    }  # fmt: skip
    pixels = Normalization().apply(images())
    scores = []
    for weights in (first, second):
        model.load_state_dict(weights)
        scores.append(model(pixels).detach())
    assert torch.allclose(*scores, atol=1e-4)


def test_of_several_local_steps_nothing_is_called_proved():
    """The first step moves fc2, whose gradient is as large as the rows are steep."""
    spec, pixels = SPEC + MODELS["class token"], images()[:2]
    threat = MaliciousServer()
    guard = protect(build_model(spec).train(), ())
    guard.model.load_state_dict(threat.hand_out(guard))
    labels, training = torch.tensor([0, 1]), LocalTraining(0.01, 2)
    with guard.rewound():
        update = guard.update(Normalization().apply(pixels), labels, training=training)
    with pytest.raises(NotApplicable):
        ImprintReading().run(threat.view(guard, update, Normalization()), torch.Generator())


def test_a_turn_below_0_is_refused():
    with pytest.raises(InputError, match="turn"):
        Imprint(turn=-1)
