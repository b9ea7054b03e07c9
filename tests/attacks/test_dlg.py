"""DLG and iDLG."""

from __future__ import annotations

import pytest
import timm
import torch

from vitguard import metrics
from vitguard.attacks.dlg import DLG, IDLG
from vitguard.core import Normalization
from vitguard.guard import protect
from vitguard.threats import CuriousServer

PATCH = (4, 4)


@pytest.fixture(scope="module")
def attacked():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=64,
        depth=2,
        num_heads=2,
        num_classes=5,
    )
    truth = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    truth = torch.nn.functional.interpolate(truth, (16, 16), mode="bicubic").clamp(0, 1)
    guard = protect(model.train(), [])
    update = guard.update(Normalization().apply(truth), torch.tensor([2]))
    return CuriousServer().view(guard, update, Normalization()), truth


def test_defaults_are_the_papers():
    for attack in (DLG(), IDLG()):
        recipe = attack.recipe(None, None)
        assert attack.iterations == 300 and attack.rate == 1.0 and not attack.line_search
        assert recipe.optimizer == "lbfgs" and not recipe.boxed and not recipe.priors
    assert DLG().recipe(None, None).joint_labels
    assert not IDLG().recipe(None, None).joint_labels


@pytest.mark.parametrize("kind", [DLG, IDLG])
def test_it_ends_3_db_above_its_own_start_and_finds_the_label(attacked, kind):
    view, truth = attacked
    attack = kind.fast(iterations=6)
    guess = attack.run(view, torch.Generator().manual_seed(0))
    start = _start(attack, view)
    gain = metrics.patch_psnr(guess.images, truth, PATCH) - metrics.patch_psnr(start, truth, PATCH)
    assert gain >= 3
    assert guess.labels.tolist() == [2]
    assert guess.details["derivative"] == "exact"


def test_dlg_says_that_it_optimises_labels_and_idlg_that_it_infers_them(attacked):
    view, _ = attacked
    generator = torch.Generator().manual_seed(0)
    assert "optimised" in DLG(iterations=1).run(view, generator).details["labels"]
    assert IDLG(iterations=1).run(view, generator).details["labels"] == "inferred"


def _start(attack, view):
    """The noise that the attack starts from, as pixels."""
    from vitguard.attacks._matching import _Run

    run = _Run(attack, view, torch.Generator().manual_seed(0))
    return run._pixels(run.restarts[0].images())
