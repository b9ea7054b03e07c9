"""Adapters behind the attention: a server lets it turn to one position in each block."""

from dataclasses import replace

import pytest
import torch

from tests.threats.adapted import SPEC, adapters, reads_output
from tests.threats.exposed import PLAIN
from tests.threats.exposed import exposed as seen
from vitguard import data
from vitguard.attacks.imprint import ImprintReading
from vitguard.errors import NotApplicable
from vitguard.guard import protect
from vitguard.metrics import recovered
from vitguard.threats import MaliciousServer
from vitguard.threats.crafts.imprint import Imprint
from vitguard.vit import Anatomy

DEEP = SPEC.replace("depth=3", "depth=4")


def behind(rank=8, spec=DEEP, hook=reads_output, at=("attn",)):
    return adapters(rank, hook, spec=spec, at=at)


def alone(module, _, output):
    return module.adapter(output)


@pytest.fixture(scope="module")
def photos():
    return data.sample_images((16, 16), count=2, classes=10).pixels


def read(views):
    view = replace(views[-1], earlier=tuple(views[:-1]))
    return ImprintReading().run(view, torch.Generator())


def proved(guess, pixels):
    return float(recovered(guess.images, guess.verified, pixels, (4, 4)).double().sum())


def without_bias():
    model = behind()
    for block in model.blocks:
        block.attn.adapter.down.bias = None
    return model


KINDS = {
    "behind": (behind, 3),
    "in its place": (lambda: behind(hook=alone), 3),
    "without a bias": (without_bias, 3),
    "under an average": (lambda: behind(spec=f"{SPEC},global_pool=avg,class_token=False"), 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_block_shows_the_patches_of_one_position(photos, kind):
    make, places = KINDS[kind]
    view = seen(make(), photos[:1], MaliciousServer())
    assert all("adapter" in n or n.startswith("head") for n in view.update.tensors)
    guess = read([view])
    assert guess.verified[0].nonzero()[:, 0].tolist() == list(range(places))
    assert proved(guess, photos[:1]) == places


def test_turns_see_other_positions_of_several_images(photos):
    rounds = [seen(behind(16), photos, MaliciousServer(f"imprint:turn={t}")) for t in range(3)]
    guess = read(rounds)
    assert not guess.verified[:, 9:].any() and "7 stand" in guess.details["unfinished"][0]
    assert guess.verified.sum() >= 12
    anatomy = Anatomy.of(behind())
    truth, guessed = (anatomy.patchify(i.double()) for i in (photos, guess.images))
    error = (guessed[:, None] - truth[None]).square().mean(-1).amin(1)
    assert error[guess.verified].max() < 1e-4


def test_the_slow_obvious_reading_of_adapters_behind_the_attention_finds_the_same_patches(photos):
    """Every row whose bin holds the token sums it once for each query: no bookkeeping."""
    view = seen(behind(), photos[:1], MaliciousServer())
    guess = read([view])
    anatomy = Anatomy.of(view.model)
    weight = view.weight("patch_embed.proj.weight").flatten(1)
    fast = anatomy.patchify(PLAIN.apply(guess.images))[0]
    for bins in view.crafted.bins:
        (place,) = bins.places.tolist()
        row = view.read(f"{bins.layer}.bias").abs().argmax()
        token = view.read(f"{bins.layer}.weight")[row]
        token = token / token.norm() * anatomy.width**0.5  # after LayerNorm, whatever its sign
        still = view.weight("patch_embed.proj.bias") + view.weight("pos_embed")[0, 1 + place]
        system = torch.cat([weight, -token[:, None]], 1)
        solved = torch.linalg.lstsq(system, -(still - still.mean())).solution[:-1]
        assert torch.allclose(fast[place], solved, atol=1e-2)


def test_of_two_adapters_in_a_block_the_one_behind_the_mlp_sees_every_position(photos):
    view = seen(behind(at=("attn", "mlp"), spec=SPEC), photos[:1], MaliciousServer())
    assert {bins.kind for bins in view.crafted.bins} == {"serial"}
    assert proved(read([view]), photos[:1]) == 16


def test_a_craft_for_adapters_behind_the_attention_changes_neither_keys_shapes_nor_dtypes():
    own = protect(behind(), ()).public_model()
    before = {k: t.clone() for k, t in own.state_dict().items()}
    made = Imprint().weights(own)
    assert [(k, t.shape, t.dtype) for k, t in made.items()] == [
        (k, t.shape, t.dtype) for k, t in before.items()
    ]
    name = "blocks.0.attn.adapter.down.weight"
    assert not torch.equal(made[name], before[name])
    assert all(torch.equal(t, before[k]) for k, t in own.state_dict().items())


def test_patches_without_positions_are_refused_with_the_reason(photos):
    with pytest.raises(NotApplicable, match="turns to a position"):
        seen(behind(), photos[:1], MaliciousServer(), "shuffle:ratio=0.5")


@pytest.mark.parametrize("rank", [4, 16])
def test_inspection_refuses_attention_that_turns_to_a_position(rank):
    guard = protect(behind(rank).train(), ())
    crafted = Imprint().weights(guard.public_model())
    pixels = data.decoys(4, (16, 16), seed=3)
    assert guard.inspect(crafted, pixels, torch.arange(4)).suspicious


@pytest.mark.slow
def test_no_patch_behind_the_attention_is_proved_wrong_where_tokens_share_few_rows():
    claims = 0
    for seed in range(6):
        pixels = data.decoys(8, (16, 16), seed=seed)
        rounds = [seen(behind(16), pixels, MaliciousServer(f"imprint:turn={t}")) for t in (0, 1)]
        guess = read(rounds)
        anatomy = Anatomy.of(behind())
        truth, guessed = (anatomy.patchify(i.double()) for i in (pixels, guess.images))
        error = (guessed[:, None] - truth[None]).square().mean(-1).amin(1)
        claims += int(guess.verified.sum())
        assert not (error[guess.verified] > 1e-4).any()
    assert claims >= 60
