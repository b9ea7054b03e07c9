"""What `verified` rests on: equations that images outside the update do not satisfy."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import drawn
from vitguard.attacks.gelu_span import GeluSpan
from vitguard.attacks.ladder import Ladder
from vitguard.vit import Anatomy

FROZEN = "positions:kind=frozen"
SHUFFLED = "positions:kind=sincos+shuffle"
TINY = {"img_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SECONDS = 0.5  # true updates of this size take less, as the first test holds


def images(seed, count=2):
    """Smooth random images: never a photo of the package, and as many as there are seeds."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear").clamp(0, 1)


def spliced(one, other, part):
    """The update `one` with the tensors of `part` out of an unrelated update."""
    tensors = {
        name: (other if part in name else one).update.tensors[name] for name in one.update.tensors
    }
    return replace(one, update=replace(one.update, tensors=tensors))


def run(attack, view, seed):
    return attack.run(view, torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_every_verified_patch_of_a_true_update_is_a_patch_of_its_images(small_vit, observe):
    model, proved = small_vit(**TINY), 0
    for trial in range(20):
        pixels = images(trial)
        view = observe(model, pixels, defenses=FROZEN)
        guess = run(GeluSpan(seconds=SECONDS), view, trial)
        anatomy = Anatomy.of(view.model)
        made = anatomy.patchify(guess.images.double())[guess.verified]
        true = anatomy.patchify(pixels.double()).flatten(0, 1)
        proved += len(made)
        if len(made):
            assert float(torch.cdist(made, true).amin(1).max()) / 48**0.5 < 1e-2, trial
    assert proved > 0.8 * 20 * 8  # so the time is enough to find what is there


@pytest.mark.slow
@pytest.mark.parametrize("part", ["mlp.fc2", "mlp.fc1", "attn.proj", "patch_embed"])
def test_no_patch_is_verified_where_the_images_are_not_in_the_update(small_vit, observe, part):
    """100 trials over the four parts: one layer's gradient is that of other images."""
    model = small_vit(**TINY)
    for trial in range(25):
        views = [observe(model, images(1000 + 2 * trial + i), defenses=FROZEN) for i in range(2)]
        guess = run(GeluSpan(seconds=SECONDS), spliced(*views, part), trial)
        assert int(guess.verified.sum()) == 0, trial


@pytest.mark.slow
@pytest.mark.parametrize("part", ["mlp.fc2", "attn.qkv"])
def test_the_ladder_verifies_nothing_there_either(small_vit, observe, part):
    model = small_vit(**TINY)
    for trial in range(4):
        views = [observe(model, images(3000 + 2 * trial + i, 1), defenses=FROZEN) for i in range(2)]
        guess = run(Ladder(seconds=1.0), spliced(*views, part), trial)
        assert guess.details["verified"] == 0.0, (trial, guess.details)


def patch_of(seed):
    return images(seed, 1)[:, :, 2:6, 2:6]


EASY = {
    "black": lambda: torch.zeros(1, 3, 8, 8),
    "white": lambda: torch.ones(1, 3, 8, 8),
    "one patch four times": lambda: patch_of(1).repeat(1, 1, 2, 2),
    "two patches in turn": lambda: torch.cat((patch_of(1), patch_of(2)), 3).repeat(1, 1, 2, 1),
    "black but for one patch": lambda: torch.nn.functional.pad(patch_of(3), (4, 0, 4, 0)),
    "the same image twice": lambda: images(4, 1).repeat(2, 1, 1, 1),
    "two images that share a half": lambda: torch.cat(
        (images(5), images(6)), 2
    )[:, :, 4:12].index_fill(3, torch.arange(4), 0.5),
    "a black image beside another": lambda: torch.cat((torch.zeros(1, 3, 8, 8), images(7, 1))),
}  # fmt: skip
STACKS = ["none", FROZEN, SHUFFLED, "positions:kind=none"]


@pytest.mark.slow
@pytest.mark.parametrize(  # each image under two stacks, one whose positions are known
    ("easy", "stack"),
    [(easy, STACKS[(n + 2 * part) % 4]) for n, easy in enumerate(EASY) for part in (0, 1)],
)
def test_no_wrong_patch_of_an_easy_image_is_proved(small_vit, observe, easy, stack):
    """Tokens that are equal or zero fulfil equations that others would not."""
    pixels, model = EASY[easy](), drawn(small_vit(**TINY))
    view = observe(model, pixels, torch.zeros(len(pixels), dtype=torch.long), defenses=stack)
    guess = run(Ladder(seconds=1.0), view, 0)
    anatomy = Anatomy.of(view.model)
    made, true = (anatomy.patchify(i.double()) for i in (guess.images, pixels))
    if guess.verified is not None and len(proved := made[guess.verified]):
        error = torch.cdist(proved, true.flatten(0, 1)).amin(1) / true.shape[2] ** 0.5
        assert float(error.max()) < 1e-2, guess.details
    if stack in ("none", FROZEN):  # so the proofs above are not of nothing
        assert guess.verified is not None and bool(guess.verified.all()), guess.details
