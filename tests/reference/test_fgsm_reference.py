"""FGSM equals torchattacks, foolbox and the Adversarial Robustness Toolbox to 1e-6."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from vitguard.attacks.fgsm import FGSM
from vitguard.core import Normalization

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
EPSILON = 8 / 255


class Normalised(nn.Module):
    """A model that takes pixels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(Normalization(MEAN, STD).apply(pixels))


def _folder():
    folder = os.environ.get("VITGUARD_DATA")
    if not folder or not (Path(folder) / "weights").is_dir():
        pytest.skip("needs trained weights: set VITGUARD_DATA")
    return Path(folder)


@pytest.fixture(scope="module", params=["a", "b"])
def trained(request):
    from safetensors.torch import load_file

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
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5 if request.param == "a" else 1e-6
    path = _folder() / "weights" / f"cifar10_vit_{request.param}.safetensors"
    model.load_state_dict(load_file(path))
    return model.eval()


@pytest.fixture(scope="module")
def images():
    import numpy
    from PIL import Image

    pack = numpy.load(_folder() / "cifar10.npz")
    data, offsets = pack["test_jpeg"], pack["test_off"]
    decoded = [
        numpy.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())))
        for i in range(16)
    ]
    pixels = torch.tensor(numpy.stack(decoded)).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.tensor(pack["test_y"][:16].astype("int64"))


@pytest.mark.parametrize("targeted", [False, True])
def test_equals_torchattacks(trained, images, targeted):
    torchattacks = pytest.importorskip("torchattacks")
    pixels, labels = images
    aims = (labels + 1) % 10 if targeted else labels
    theirs = torchattacks.FGSM(Normalised(trained), eps=EPSILON)
    if targeted:
        theirs.set_mode_targeted_by_function(lambda _, true: (true + 1) % 10)
    _compare(trained, pixels, aims, targeted, theirs(pixels, labels))


def test_equals_foolbox(trained, images):
    foolbox = pytest.importorskip("foolbox")  # its FGSM is untargeted only
    pixels, labels = images
    model = foolbox.PyTorchModel(Normalised(trained).eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfFastGradientAttack()
    _, theirs, _ = attack(
        model, pixels, foolbox.criteria.Misclassification(labels), epsilons=EPSILON
    )
    _compare(trained, pixels, labels, False, theirs)


@pytest.mark.parametrize("targeted", [False, True])
def test_equals_art(trained, images, targeted):
    pytest.importorskip("art")
    from art.attacks.evasion import FastGradientMethod
    from art.estimators.classification import PyTorchClassifier

    pixels, labels = images
    aims = (labels + 1) % 10 if targeted else labels
    classifier = PyTorchClassifier(
        Normalised(trained),
        nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = FastGradientMethod(classifier, eps=EPSILON, targeted=targeted)
    theirs = torch.tensor(attack.generate(pixels.numpy(), nn.functional.one_hot(aims).numpy()))
    _compare(trained, pixels, aims, targeted, theirs)


def _compare(model, pixels, labels, targeted, theirs):
    mine = FGSM(EPSILON, targeted=targeted).perturb(
        model, pixels, labels, normalization=Normalization(MEAN, STD)
    )
    assert (mine - theirs).abs().max() <= 1e-6
    assert (mine - pixels).abs().max() > 0.9 * EPSILON
