"""Bins adapted to a defense: what it leaves is enough for a server that knows that it runs."""

from itertools import pairwise

import pytest
import torch

import vitguard as vg
from tests.threats.exposed import PLAIN
from tests.threats.exposed import exposed as seen
from vitguard import data
from vitguard.attacks.imprint import ImprintReading
from vitguard.attacks.imprint.sums import _steps
from vitguard.core import Traits
from vitguard.errors import InputError
from vitguard.federated.local import LocalClient, LocalFederation
from vitguard.models import build_model
from vitguard.threats import MaliciousServer
from vitguard.threats.crafts.imprint import Imprint
from vitguard.threats.malicious_server import parse_craft
from vitguard.vit import Anatomy

SPEC = (
    "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=60,depth=3,num_heads=3,mlp_ratio=4,"
    "num_classes=10"
)


@pytest.fixture(scope="module")
def photos():
    return data.sample_images((16, 16), count=2, classes=10).pixels


def exposed(pixels, craft, defenses):
    return seen(build_model(SPEC), pixels, MaliciousServer(craft), defenses)


def near(images, pixels, decibels):
    """Which patches of the truth some guess has within so many dB at the same place."""
    anatomy = Anatomy.of(build_model(SPEC))
    truth, guessed = (anatomy.patchify(i.double()) for i in (pixels, images))
    error = (guessed[:, None] - truth[None]).square().mean(-1)
    return -10 * error.amin(0).log10() >= decibels


@pytest.mark.parametrize(
    "craft, defenses, count, decibels",
    [
        ("imprint", "frozen-stem:trained=2", 1, 60),
        ("imprint:each=1", "pruning:keep=0.1", 1, 60),
        ("imprint", "noise:scale=0.01", 1, 40),
        ("imprint", "noise:scale=0.001", 2, 30),
        ("imprint", "quantised-update:bits=8", 1, 30),
    ],
)
def test_what_a_defense_leaves_is_read_by_a_server_that_knows_of_it(
    photos, craft, defenses, count, decibels
):
    pixels = photos[:count]
    view = exposed(pixels, craft, defenses)
    guess = ImprintReading().run(view, torch.Generator())
    assert float(near(guess.images, pixels, decibels).double().mean()) >= 0.9
    assert view.traits.exact or not guess.verified.any(), "what is not exact proves nothing"


@pytest.mark.slow
def test_tokens_that_were_only_scaled_are_not_read_as_noisy_ones():
    """Noisy ones are guessed; of a batch that shares its bins the tokens alone in one are known."""
    pixels = data.decoys(6, (16, 16), seed=0)
    plain, scaled = (exposed(pixels, "imprint", s) for s in ("none", "sample-normalisation"))
    told = [
        int(near(ImprintReading().run(v, torch.Generator()).images, pixels, 60).sum())
        for v in (plain, scaled)
    ]
    assert told[1] >= 0.9 * told[0] > 20


def test_frozen_blocks_hold_no_bins_and_where_no_other_is_left_only_the_head_is_read(photos):
    view = exposed(photos[:1], "imprint", "frozen-stem:trained=2")
    assert {bins.layer for bins in view.crafted.bins} == {"blocks.1.mlp.fc1"}
    view = exposed(photos[:1], "imprint", "frozen-stem:trained=0")
    assert {bins.layer for bins in view.crafted.bins} == {"head"}
    assert ImprintReading().run(view, torch.Generator()).verified.sum() == 1


def test_of_a_matrix_of_low_rank_the_tokens_of_one_position_are_read_each_round(photos):
    """Bins of one position hold as many directions as there are images: nothing is cut."""
    seen = torch.zeros(16, dtype=torch.bool)
    for turn in range(2):
        view = exposed(photos, f"imprint:turn={turn}", "low-rank:rank=2")
        places = torch.cat([bins.places for bins in view.crafted.bins])
        assert places.tolist() == [2 * turn, 2 * turn + 1]
        guess = ImprintReading().run(view, torch.Generator())
        right = near(guess.images, photos, 60)
        assert right.sum() >= 3 and not right[:, ~torch.isin(torch.arange(16), places)].any()
        seen[places] = True
    assert seen.sum() == 4


def test_rows_that_are_not_bins_have_no_gradient(photos):
    """Else a defense that keeps the largest entries of a tensor, or scales by them, sees those."""
    view = exposed(photos, "imprint:each=3", "none")
    (bins, *_) = view.crafted.bins
    moved = view.update.tensors["blocks.0.mlp.fc1.weight"].abs().sum(1).nonzero()[:, 0]
    assert {*moved.tolist()} <= {*bins.rows.flatten().tolist()} and bins.rows.shape == (16, 3)


@pytest.mark.slow
@pytest.mark.parametrize("sealed", ["masking", "encryption:preset=precise"])
def test_a_quiet_craft_stays_within_the_bound_of_a_secure_sum_and_the_sum_is_read(photos, sealed):
    def total(craft):
        clients = {
            name: LocalClient(photos[i % 2 : i % 2 + 1], torch.tensor([i % 2]))
            for i, name in enumerate(("ana", "bea", "cleo"))
        }
        how = {"training": vg.LocalTraining(0.05), "bound": 1.0}
        return LocalFederation(
            build_model(SPEC), clients, sealed, threat=MaliciousServer(craft), **how
        ).round()

    loud = total("imprint")
    assert loud.total is None and "bound" in str(loud.refused)
    seen = total("imprint:quiet=1e4")
    threat = MaliciousServer("imprint:quiet=1e4")
    view = threat.view(seen.total.guard, seen.total.update, PLAIN)
    guess = ImprintReading().run(view, torch.Generator())
    assert float(near(guess.images, photos, 40).double().mean()) >= 0.5


@pytest.mark.parametrize(
    "setting", [{"places": 0}, {"quiet": 0.5}, {"quiet": float("inf")}, {"quiet": float("nan")}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError, match="at least 1"):
        Imprint(**setting)


def test_the_craft_of_a_low_rank_is_that_of_the_server_unless_it_says_otherwise():
    assert Imprint().under(Traits(rank=2)).places == 1
    assert parse_craft("imprint:places=3").under(Traits(rank=2)).places == 3
    assert Imprint().under(Traits()).places is None


def test_rows_between_which_no_token_lies_have_their_mean():
    """Beside the slow obvious version: walk down the rows, and begin anew where the count jumps."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.tensor([3.0] * 4 + [2.0] * 5 + [2.0 - 1.0] + [0.0] * 6)
    rows = counts[:, None] * torch.tensor([[1.0, -2.0, 1.0]])
    noisy = (rows + 0.05 * torch.randn(rows.shape, generator=generator)).double()
    slow, run = [], [noisy[0]]
    for before, after in pairwise(noisy):
        if abs(float(after[-1] - before[-1])) > 0.5:
            slow += [torch.stack(run).mean(0)] * len(run)
            run = []
        run.append(after)
    slow += [torch.stack(run).mean(0)] * len(run)
    assert torch.allclose(_steps(noisy, 0.45), torch.stack(slow))
