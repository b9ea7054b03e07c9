"""Published defenses: page and rows stand together, and each recipe is what it says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import CIFAR_NORMALIZATION, small_vit
from vitguard import data
from vitguard.core import Batch
from vitguard.defenses.base import Defense, Draws
from vitguard.errors import NotApplicable
from vitguard.guard import protect
from vitguard.registry import defense_types, parse_stack
from vitguard.testing import contracts
from vitguard.threats import CuriousServer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import published
    from recipes import ats, binary_weights, blockwise_images, judged, position_shuffling, soteria
finally:
    sys.path.remove(str(ROOT / "benchmarks"))
TEXT = (ROOT / "docs" / "published-defenses.md").read_text()
ROWS = judged()
OWN = [d for row in ROWS.values() if not isinstance(row.stack, str) for d in row.stack]


@pytest.fixture(scope="module")
def tiny():
    photos = data.sample_images((16, 16), count=2).pixels
    return small_vit(), CIFAR_NORMALIZATION, photos, torch.tensor([3, 5])


def drawn(seed=0):
    return Draws(torch.Generator().manual_seed(seed))


def test_every_row_is_on_the_page_with_its_claim_its_command_and_a_verdict():
    assert len(ROWS) >= 10
    table = TEXT.partition(published.MARKS[0])[2].partition("\n## ")[0]
    for name, row in ROWS.items():
        assert f"### {row.title}" in TEXT and row.source in TEXT and row.claim in TEXT
        assert f"--only {name}`" in TEXT
        (line,) = (one for one in table.splitlines() if f"[{row.title}]" in one)
        verdict = line.split("|")[-2].strip(" *")
        assert verdict.startswith(("leaks", "resisted", "inconclusive", "not run: "))


def test_the_page_is_what_the_benchmark_writes():
    """Of the numbers that stand on it: the words around them are those of the recipes."""
    between = TEXT.partition(published.MARKS[0] + "\n")[2].partition("\n" + published.MARKS[1])[0]
    blank = [line.partition(" Verdict: ")[0] for line in published.page([]).splitlines()]
    shown = [line.partition(" Verdict: ")[0] for line in between.splitlines()]
    assert [x for x in shown if x[:1] != "|"] == [x for x in blank if x[:1] != "|"]
    assert len(shown) == len(blank)


def test_no_published_defense_is_a_product_and_no_row_calls_one_safe():
    assert not {d.name for d in OWN} & set(defense_types())
    assert not [w for w in ("secure", "safe ", "protects") if w in published.page([]).lower()]


@pytest.mark.parametrize("defense", OWN, ids=lambda d: d.name)
def test_a_recipe_is_a_defense_with_plain_settings_and_leaves_no_trace(defense, tiny):
    contracts.check_documented(type(defense))
    contracts.check_plain(defense)
    assert isinstance(defense, Defense)
    model = small_vit()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    guard = protect(model.train(), [defense], generator=torch.Generator().manual_seed(0))
    update = guard.update(tiny[2][:1], tiny[3][:1])
    assert all(bool(t.isfinite().all()) for t in update.tensors.values())
    guard.remove()
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("precode", "position_shuffling")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soteria", "token_noise", *SLOW])
def test_a_defense_of_features_or_order_leaks_to_position_on_a_tiny_model(name, tiny):
    found = published.measured(name, ROWS[name], given=tiny)
    assert found["verdict"] == "leaks" and found["control verdict"] == "leaks"
    assert found["matched"] > 60 > found["floor"]
    assert json.loads(json.dumps(found)) == found
    assert f"{found['matched']:.1f}" in published.page([found])


def test_soteria_touches_the_head_alone_and_zeroes_the_share_that_it_says(tiny):
    plain, masked = (
        protect(small_vit().train(), stack).update(tiny[2], tiny[3]).tensors
        for stack in ([], [soteria.Soteria(pruned=0.75)])
    )
    assert all(torch.allclose(plain[n], masked[n]) for n in plain if n != "head.weight")
    columns = masked["head.weight"].eq(0).all(0)
    assert int(columns.sum()) == 72  # of 96
    assert torch.allclose(plain["head.weight"][:, ~columns], masked["head.weight"][:, ~columns])


def test_a_shuffled_or_encrypted_image_has_the_same_values_under_one_order(tiny):
    batch = Batch(tiny[2], tiny[3])
    for defense, shared in (
        (position_shuffling.PatchOrder(), False),
        (blockwise_images.BlockwiseEncryption(), True),
    ):
        made = defense.transform(batch, drawn()).images
        assert made.shape == batch.images.shape and not torch.equal(made, batch.images)
        assert torch.equal(made.flatten().sort()[0], batch.images.flatten().sort()[0])
        cut = [torch.nn.functional.unfold(x, 4, stride=4) for x in (batch.images, made)]
        spread = [x.mean(1).sort()[0] for x in cut]  # of each block, in any order of blocks
        assert torch.allclose(*spread, atol=1e-6)
        in_place = torch.allclose(cut[0].mean(1), cut[1].mean(1), atol=1e-6)
        assert in_place is shared


def test_binary_weights_keep_entries_exactly_and_a_mimic_keeps_the_same(tiny):
    defense = binary_weights.BinaryWeights(keep=0.5)
    plain = protect(small_vit().train(), []).update(tiny[2], tiny[3])
    sent = defense.seal(plain, None, drawn())
    again = defense.mimic(plain.tensors, sent)
    for name, tensor in plain.tensors.items():
        kept = sent.tensors[name] != 0
        assert torch.equal(sent.tensors[name][kept], tensor[kept])
        assert torch.equal(again[name], sent.tensors[name])
    share = np.mean([float((t != 0).float().mean()) for t in sent.tensors.values() if t.dim() > 1])
    assert abs(share - 0.5) < 0.05


def guessed(attack, stack, size=8, patch=2):
    """Return the guess of an attack on one photo under a stack, and the photo."""
    photo = data.sample_images((size, size), count=1).pixels
    model = small_vit(img_size=size, patch_size=patch).train()
    guard = protect(model, stack, generator=torch.Generator().manual_seed(0))
    update = guard.update(CIFAR_NORMALIZATION.apply(photo), torch.tensor([3]))
    view = CuriousServer().view(guard, update, CIFAR_NORMALIZATION)
    return attack.run(view, torch.Generator().manual_seed(0)), photo


@pytest.mark.slow
def test_entries_that_were_not_sent_are_solved_for_and_the_solution_proves_itself():
    attack = binary_weights.MissingEntries()
    for stack in ([], [binary_weights.BinaryWeights(keep=0.5)]):
        guess, photo = guessed(attack, stack, patch=4)
        assert float((guess.images - photo).abs().max()) < 1e-4
        assert bool(guess.verified.all())
    with pytest.raises(NotApplicable, match="unknown"):
        guessed(attack, [binary_weights.BinaryWeights(keep=0.1)], patch=4)


def test_what_a_transformation_left_in_the_frame_comes_back_proved():
    guess, photo = guessed(ats.Undone(), [ats.Transformed()], size=32, patch=8)
    cut = [torch.nn.functional.unfold(x, 8, stride=8)[0].T for x in (guess.images.float(), photo)]
    right = (cut[0] - cut[1]).abs().amax(1) < 1e-3
    assert 0.2 < float(right.float().mean()) < 0.6
    assert bool(right[guess.verified[0]].all()) and bool(guess.verified.any())
    plain, photo = guessed(ats.Undone(), [], size=32, patch=8)
    assert float((plain.images - photo).abs().max()) < 1e-4


def test_an_image_that_was_not_transformed_is_left_as_it_is(tiny):
    image = tiny[2][0].double()
    assert not ats._flat_end(image, 3, 1) and not ats._flat_end(image, 3, 2)
    moved = ats.shifted(image, -3, 1)
    assert ats._flat_end(moved, 3, 1) == -3


def test_a_key_that_all_blocks_share_is_found_from_the_statistics_of_photos():
    """Of values drawn from the prior itself, of which there are enough, the key is the true one."""
    from vitguard.attacks.robust.natural_images import NaturalImages
    from vitguard.vit import Anatomy

    anatomy = Anatomy.of(small_vit(img_size=8, patch_size=2))
    prior = NaturalImages.shaped(anatomy, (3, 8, 8), CIFAR_NORMALIZATION)
    generator, chance = torch.Generator().manual_seed(0), np.random.default_rng(0)
    white = torch.randn(200, 3, 8, 8, generator=generator, dtype=torch.float64)
    blocks = (prior.colour(white) - prior.mean).flatten(0, 1)
    hidden, shape = chance.permutation(12), (3, 2, 2)
    cost = blockwise_images._Cost.of(prior, blocks[:, hidden], generator)
    found = cost.found(shape, chance, starts=4, kicks=4)
    turns = blockwise_images._turns(shape)
    alike = hidden.argsort()[turns][:, turns].reshape(-1, 12)  # mirrored, or other channels
    assert (alike == found).all(1).any()


@pytest.mark.parametrize("name", [n for n, r in ROWS.items() if isinstance(r.stack, str)])
def test_a_row_of_a_defense_of_vitguard_names_one(name):
    assert parse_stack(ROWS[name].stack)
