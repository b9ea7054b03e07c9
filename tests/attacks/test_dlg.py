"""DLG and iDLG."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.fast import fast_for
from vitguard import metrics
from vitguard.attacks.dlg import DLG, IDLG
from vitguard.core import Normalization
from vitguard.guard import protect
from vitguard.threats import CuriousServer
from vitguard.vit import Anatomy

PATCH = (4, 4)


def test_defaults_are_the_papers(attacked):
    view, _ = attacked([2])
    anatomy = Anatomy.of(view.model)
    for attack in (DLG(), IDLG()):
        recipe = attack.recipe(view, anatomy)
        assert attack.iterations == 300 and attack.rate == 1.0 and not attack.line_search
        assert recipe.optimizer == "lbfgs" and not recipe.boxed and not recipe.priors
    assert DLG().recipe(view, anatomy).joint_labels == "random"
    assert not IDLG().recipe(view, anatomy).joint_labels


@pytest.mark.slow
@pytest.mark.parametrize("kind", fast_for([DLG, IDLG], fast=[DLG]))  # it finds the label as well
def test_it_ends_3_db_above_its_own_start_and_finds_the_label(attacked, kind):
    view, truth = attacked([2])
    attack = kind.fast(iterations=8, spectrum=0.0)
    guess = attack.run(view, torch.Generator().manual_seed(0))
    start = attack.begins_at(view, torch.Generator().manual_seed(0))
    gain = metrics.patch_psnr(guess.images, truth, PATCH) - metrics.patch_psnr(start, truth, PATCH)
    assert gain >= 3
    assert guess.labels.tolist() == [2]
    assert guess.details["derivative"] == "exact"


@pytest.mark.slow
def test_dlg_says_that_it_optimises_labels_and_idlg_that_it_infers_them(attacked):
    view, _ = attacked([2])
    generator = torch.Generator().manual_seed(0)
    assert "optimised" in DLG(iterations=1).run(view, generator).details["labels"]
    assert IDLG(iterations=1).run(view, generator).details["labels"] == "inferred"


@pytest.mark.slow
def test_whitened_coordinates_get_further_on_a_trained_vit():
    images, labels, model = _trained()
    guard = protect(model.train(), [])
    normalization = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    update = guard.update(normalization.apply(images), labels)
    view = CuriousServer().view(guard, update, normalization)
    matched = {}
    for spectrum in (0.0, 1.0):
        guess = IDLG.fast(iterations=10, spectrum=spectrum).run(
            view, torch.Generator().manual_seed(0)
        )
        matched[spectrum] = float(metrics.patch_psnr(guess.images, images, PATCH))
    assert matched[1.0] > matched[0.0] + 3


def _trained():
    """The first test photo of CIFAR-10 and a ViT trained on the training ones."""
    import io
    import os
    from pathlib import Path

    import numpy
    from PIL import Image
    from safetensors.torch import load_file

    folder = os.environ.get("VITGUARD_DATA")
    if not folder or not (Path(folder) / "weights").is_dir():
        pytest.skip("needs trained weights: set VITGUARD_DATA")
    pack = numpy.load(Path(folder) / "cifar10.npz")
    data, offsets = pack["test_jpeg"], pack["test_off"]
    picture = numpy.asarray(Image.open(io.BytesIO(data[offsets[0] : offsets[1]].tobytes())))
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=128,
        depth=4,
        num_heads=4,
        mlp_ratio=2,
        num_classes=10,
    )
    model.load_state_dict(load_file(Path(folder) / "weights" / "cifar10_vit_b.safetensors"))
    images = torch.tensor(picture).permute(2, 0, 1)[None].float() / 255
    return images, torch.tensor(pack["test_y"][:1].astype("int64")), model
