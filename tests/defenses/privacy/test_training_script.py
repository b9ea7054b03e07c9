"""The training script under privacy: steps are counted as steps, and mixing is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitguard.errors import InputError

pytest.importorskip("opacus")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Return a function that makes a small private training run of the script."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_cifar10

    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")

    def make(defense, *more):
        options = train_cifar10.parser().parse_args([
            "--data", str(tmp_path / "photos"), "--epochs", "2", "--batch-size", "9", "--width",
            "32", "--depth", "1", "--patch-size", "8", "--device", "cpu", "--defense", defense,
            *more,
        ])  # fmt: skip
        data = train_cifar10.load_data(options.data, images=None, image_size=32)
        return train_cifar10.Training(options, data)

    return make


@pytest.mark.slow
def test_pieces_of_a_batch_are_one_step_of_the_schedule(train):
    run = train("privacy:noise=1,delta=0.001,physical_batch=2")
    rates = []
    while run.epoch < 2:
        rates += [(run.step, run.optimizer.param_groups[0]["lr"]) for _ in run.one_epoch()]
        run.epoch += 1
    assert run.step == run.steps == len(rates) == run.guard.privacy_spent().steps
    assert [step for step, _ in rates] == list(range(1, run.steps + 1))
    assert rates[-1][1] > 0  # a schedule that counted pieces would have ended long before


def test_mixup_is_refused_under_privacy(train):
    with pytest.raises(InputError, match="mixup 0"):
        train("privacy:noise=1,delta=0.001", "--mixup", "0.2")


def test_images_stay_as_they_are_without_augmentation(train):
    run = train("privacy:noise=1,delta=0.001", "--no-augment", "--batch-size", "40")
    import train_cifar10

    _, images = next(iter(run.one_epoch()))
    known = {tuple(p.flatten().tolist()) for p in run.data.train.tensors[0]}
    pixels = (
        (train_cifar10.NORMALIZATION.invert(images) * 255).round().to(run.data.train.tensors[0])
    )
    assert all(tuple(p.flatten().tolist()) in known for p in pixels)
