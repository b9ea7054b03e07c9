"""Clients that train the last block and the head: what a server that writes the rest reads."""

from dataclasses import replace

import pytest
import torch

from tests.threats.adapted import adapters, lora, reads_input
from tests.threats.exposed import PLAIN
from tests.threats.exposed import exposed as seen
from vitguard import data
from vitguard.attacks.imprint import ImprintReading
from vitguard.core import LocalTraining
from vitguard.errors import Blocked, NotApplicable
from vitguard.guard import protect
from vitguard.metrics import recovered
from vitguard.models import build_model
from vitguard.threats import MaliciousServer
from vitguard.threats.crafts.imprint import Imprint
from vitguard.trained import train_only
from vitguard.vit import Anatomy

SIZES = "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=60,depth=3,num_heads=3,mlp_ratio=4"
AVERAGES = {
    "average": "global_pool=avg,class_token=False",
    "average beside a class token": "global_pool=avg",
    "average of tokens after their norm": "global_pool=avg,class_token=False,fc_norm=False",
}
TURNED = {"class token": "global_pool=token", "class token and registers": "reg_tokens=2"}
LAST = "blocks.2.mlp.fc1"


def model(kind="average", classes=10):
    return build_model(f"{SIZES},{({**AVERAGES, **TURNED})[kind]},num_classes={classes}")


@pytest.fixture(scope="module")
def photos():
    return data.sample_images((16, 16), count=2, classes=10).pixels


def read(made, pixels, craft="imprint", defenses="none", **how):
    view = seen(made, pixels, MaliciousServer(craft), defenses, **how)
    return view, ImprintReading().run(view, torch.Generator())


def proved(guess, pixels):
    return float(recovered(guess.images, guess.verified, pixels, (4, 4)).double().mean())


def wrong(guess, pixels):
    """Return how many verified patches are no true patch of their position."""
    anatomy = Anatomy.of(model())
    truth, guessed = (anatomy.patchify(i.double()) for i in (pixels, guess.images))
    error = (guessed[:, None] - truth[None]).square().mean(-1).amin(1)
    return int((error[guess.verified] > 1e-4).sum())


@pytest.mark.parametrize("kind", AVERAGES)
def test_under_an_average_the_last_block_alone_gives_every_patch_of_an_image(photos, kind):
    view, guess = read(model(kind), photos[:1], defenses="frozen-stem")
    assert {n.split(".")[1] for n in view.update.tensors if n.startswith("blocks.")} == {"2"}
    assert {bins.layer for bins in view.crafted.bins} == {LAST}
    assert proved(guess, photos[:1]) == 1.0


def test_a_training_of_the_last_block_by_name_is_read_as_behind_the_defense(photos):
    view, guess = read(train_only(model(), "last-block/head"), photos[:1])
    assert {bins.layer for bins in view.crafted.bins} == {LAST}
    assert proved(guess, photos[:1]) == 1.0


def test_a_model_of_one_block_is_read_under_an_average(photos):
    spec = SIZES.replace("depth=3", "depth=1")
    made = build_model(f"{spec},{AVERAGES['average']},num_classes=10")
    assert proved(read(made, photos[:1])[1], photos[:1]) == 1.0


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("stack", ["none", "frozen-stem"])
def test_of_a_batch_under_an_average_every_patch_that_is_called_proved_is_right(kind, stack):
    pixels = data.decoys(8, (16, 16), seed=1)
    _, guess = read(model(kind), pixels, defenses=stack)
    assert guess.verified.double().mean() > (0.2 if stack == "frozen-stem" else 0.8)
    assert not wrong(guess, pixels)


@pytest.mark.parametrize(
    "make", [lambda s: adapters(6, reads_input, spec=s), lambda s: lora(6, spec=s)]
)
def test_adapters_of_all_blocks_hold_bins_under_an_average(photos, make):
    """Six rows in each of three blocks for 16 positions; a class token leaves room in two."""
    view, guess = read(make(f"{SIZES},{AVERAGES['average']},num_classes=10"), photos[:1])
    assert len(view.crafted.bins) == 3
    assert proved(guess, photos[:1]) == 1.0


def test_adapters_behind_each_mlp_are_read_under_an_average_too(photos):
    """They make tokens longer: the last block spreads the gradient as under a class token."""
    made = adapters(64, spec=f"{SIZES},{AVERAGES['average']},num_classes=10")
    assert proved(read(made, photos[:1])[1], photos[:1]) == 1.0


@pytest.mark.parametrize("kind", TURNED)
def test_under_a_class_token_the_last_block_gives_one_patch_of_each_image_in_each_round(
    photos, kind
):
    view, guess = read(model(kind), photos, defenses="frozen-stem")
    (bins,) = view.crafted.bins
    assert (bins.layer, bins.places.tolist()) == (LAST, [0])
    assert guess.verified[:, 0].all() and guess.verified.sum() == len(photos)
    assert proved(guess, photos) == 1 / 16
    assert "15 stand in other turns" in guess.details["unfinished"][0]


def test_a_head_that_reads_the_mean_beside_the_class_token_gives_a_patch_of_each_image(photos):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        image_size=16, patch_size=4, hidden_size=60, num_hidden_layers=3, num_attention_heads=3,
        num_labels=10,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.Dinov2ForImageClassification(config)
    assert proved(read(made, photos, defenses="frozen-stem")[1], photos) == 1 / 16


@pytest.mark.parametrize("kind, least", [("average", 0.8), ("class token", 1 / 16)])
def test_the_difference_of_one_step_of_the_last_block_is_read(photos, kind, least):
    how = {"training": LocalTraining(0.01), "defenses": "frozen-stem"}
    view, guess = read(model(kind), photos, **how)
    assert view.update.kind == "difference"
    assert proved(guess, photos) >= least and not wrong(guess, photos)


def test_turns_of_a_class_token_give_all_patches_of_an_image(photos):
    """The label of an image says whose patches they are; one lies on a threshold."""
    rounds = [
        seen(model("class token"), photos, MaliciousServer(f"imprint:turn={t}"), "frozen-stem")
        for t in range(16)
    ]
    view = replace(rounds[-1], earlier=tuple(rounds[:-1]))
    guess = ImprintReading().run(view, torch.Generator())
    assert proved(guess, photos) >= 0.9 and "unfinished" not in guess.details
    together = (guess.images[:, None] - photos[None]).square().mean((2, 3, 4))
    assert together.amin(0).max() < 1e-4, "each image is whole"


def test_the_slow_obvious_reading_of_a_turned_class_token_finds_the_same_patch(photos):
    """All rows of one image sum one token: no bins, no labels, no bookkeeping of the package."""
    view, guess = read(model("class token"), photos[:1], defenses="frozen-stem")
    anatomy = Anatomy.of(view.model)
    total = view.read(f"{LAST}.weight")
    token = total[view.read(f"{LAST}.bias").abs().argmax()]
    still = view.weight("patch_embed.proj.bias") + view.weight("pos_embed")[0, 1]
    # size * token = W x + still - mean: the patch and the size together
    system = torch.cat([view.weight("patch_embed.proj.weight").flatten(1), -token[:, None]], 1)
    solved = torch.linalg.lstsq(system, -(still - still.mean())).solution[:-1]
    fast = anatomy.patchify(PLAIN.apply(guess.images))[0, 0]
    assert guess.verified[0, 0] and torch.allclose(fast, solved, atol=1e-3)


@pytest.mark.parametrize("classes", [10, 1000])
def test_of_many_images_under_a_class_token_every_patch_that_is_called_proved_is_right(classes):
    """40 tokens in 40 bins: most share one."""
    pixels, claims = data.decoys(40, (16, 16), seed=1), 0
    for each in (240, 40):
        craft = f"imprint:each={each},turn=5"
        _, guess = read(model("class token", classes), pixels, craft, "frozen-stem")
        claims += int(guess.verified.sum())
        assert not guess.verified[:, :5].any() and not guess.verified[:, 6:].any()
        assert not wrong(guess, pixels)
    assert claims >= 12


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("kind", TURNED)
def test_a_head_that_is_trained_alone_gives_one_patch_of_each_image_in_each_round(kind, classes):
    pixels = data.decoys(8, (16, 16), seed=1)
    how = {"craft": "imprint:turn=3", "defenses": "frozen-stem:trained=0"}
    view, guess = read(model(kind, classes), pixels, **how)
    assert not any(n.startswith("blocks.") for n in view.update.tensors)
    assert guess.verified[:, 3].all() and guess.verified.sum() == 8
    assert not wrong(guess, pixels)


def test_rounds_of_a_head_give_whole_images(photos):
    rounds = [
        seen(train_only(model("class token"), "head"), photos, MaliciousServer(f"imprint:turn={t}"))
        for t in range(16)
    ]
    view = replace(rounds[-1], earlier=tuple(rounds[:-1]))
    assert proved(ImprintReading().run(view, torch.Generator()), photos) == 1.0


def test_the_slow_obvious_reading_of_a_head_finds_the_same_patch(photos):
    view, guess = read(model("class token"), photos[:1], defenses="frozen-stem:trained=0")
    anatomy = Anatomy.of(view.model)
    token = view.read("head.weight")[0] / view.read("head.bias")[0]  # of its label
    still = view.weight("patch_embed.proj.bias") + view.weight("pos_embed")[0, 1]
    system = torch.cat([view.weight("patch_embed.proj.weight").flatten(1), -token[:, None]], 1)
    solved = torch.linalg.lstsq(system, -(still - still.mean())).solution[:-1]
    fast = anatomy.patchify(PLAIN.apply(guess.images))[0, 0]
    assert guess.verified[0, 0] and torch.allclose(fast, solved, atol=1e-3)


def test_images_that_share_their_label_are_not_read_from_a_head():
    """Of ten classes nine have one image each, and the first has two nearly equal ones."""
    pixels = data.decoys(9, (16, 16), seed=1)
    pixels = torch.cat([pixels, pixels[:1].clone()])
    pixels[-1, :, 0, 0] += 0.02
    guard = protect(train_only(model("class token"), "head").train(), ())
    guard.model.load_state_dict(MaliciousServer().hand_out(guard))
    with guard.rewound():
        update = guard.update(PLAIN.apply(pixels), torch.tensor([*range(9), 0]))
    view = MaliciousServer().view(guard, update, PLAIN)
    guess = ImprintReading().run(view, torch.Generator())
    assert guess.details["found"] == 8 and guess.verified.sum() == 8


def test_a_head_whose_counts_are_no_whole_numbers_is_not_read(photos):
    view, _ = read(model("class token"), photos, defenses="frozen-stem:trained=0")
    view = replace(view, update=replace(view.update, batch_size=3))
    with pytest.raises(NotApplicable, match="no label stands alone"):
        ImprintReading().run(view, torch.Generator())


def test_under_an_average_the_head_alone_shows_no_patch(photos):
    with pytest.raises(Blocked, match="not in the update"):
        read(model(), photos, defenses="frozen-stem:trained=0")


def test_what_has_the_weight_of_no_label_is_not_called_proved(photos):
    """An update of another batch size: every weight is off, and every token is as it was."""
    view, guess = read(model("class token"), photos, defenses="frozen-stem")
    assert guess.verified.sum() == 2
    view = replace(view, update=replace(view.update, batch_size=3))
    assert not ImprintReading().run(view, torch.Generator()).verified.any()


def test_a_class_token_turns_to_no_position_where_patches_have_none(photos):
    with pytest.raises(Blocked, match="not in the update"):
        read(model("class token"), photos, defenses="frozen-stem+shuffle:ratio=0.5")


@pytest.mark.parametrize(
    "kind, trained",
    [*((kind, "last-block/head") for kind in {**AVERAGES, **TURNED}), ("class token", "head")],
)
def test_a_craft_for_the_last_block_changes_neither_keys_shapes_nor_dtypes(kind, trained):
    guard = protect(train_only(model(kind), trained), ())
    own = guard.public_model()
    before = {k: t.clone() for k, t in own.state_dict().items()}
    made = Imprint().weights(own)
    assert [(k, t.shape, t.dtype) for k, t in made.items()] == [
        (k, t.shape, t.dtype) for k, t in before.items()
    ]
    assert all(torch.equal(t, before[k]) for k, t in own.state_dict().items())
    name = "head" if trained == "head" else LAST
    assert not torch.equal(made[f"{name}.weight"], before[f"{name}.weight"])


@pytest.mark.parametrize(
    "kind, trained",
    [*((kind, "last-block/head") for kind in {**AVERAGES, **TURNED}), ("class token", "head")],
)
def test_inspection_refuses_bins_in_the_last_block(kind, trained):
    made = train_only(model(kind), trained).train()
    guard = protect(made, ())
    crafted = Imprint().weights(guard.public_model())
    pixels = data.decoys(4, (16, 16), seed=3)
    assert guard.inspect(crafted, pixels, torch.arange(4)).suspicious
