"""Every example runs in under a minute, and the training script resumes exactly."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vitguard as vg
from vitguard.errors import InputError
from vitguard.models import build_model

ROOT = Path(__file__).parent.parent
SMALL = "vit_tiny_patch16_224:img_size=32,patch_size=4,depth=1"
# arguments that keep it short; {tmp} is an empty folder, {folder} has two classes of images
ARGUMENTS = {
    "audit_photo.py": ["--model", SMALL, "--out", "{tmp}/result.png"],
    "train_cifar10.py": [
        "--data", "{folder}", "--epochs", "2", "--width", "32", "--depth", "1", "--batch-size", "8",
        "--defense", "positions:kind=sincos+shuffle:ratio=0.7,dal=tokens", "--mixup", "0.2",
        "--out", "{tmp}/run", "--tensorboard", "{tmp}/board",
    ],
    "huggingface_trainer.py": ["--out", "{tmp}/run"],
    "lightning_trainer.py": ["--out", "{tmp}/run"],
    "accelerate_loop.py": ["--out", "{tmp}/run"],
    "timm_training.py": ["--out", "{tmp}/run"],
    "private_head.py": ["--images", "{folder}", "--out", "{tmp}/run"],
    "private_lora.py": ["--images", "{folder}", "--epochs", "2", "--out", "{tmp}/run"],
}  # fmt: skip
NEEDS = {  # beside vitguard's own requirements
    "huggingface_trainer.py": ("transformers", "accelerate"),
    "lightning_trainer.py": ("lightning",),
    "accelerate_loop.py": ("accelerate",),
    "private_lora.py": ("peft",),
}  # fmt: skip
FILES = {
    "audit_photo.py": ["result.png"],
    "train_cifar10.py": ["run/checkpoint.pt", "run/seen.png", "board"],
    "huggingface_trainer.py": ["run"],
    "lightning_trainer.py": ["run/last.ckpt"],
    "accelerate_loop.py": ["run/state/vitguard.json", "run/plain.pt"],
    "timm_training.py": ["run/averaged.pt"],
    "private_head.py": ["run/model.pt", "run/privacy.json"],
    "private_lora.py": ["run/model.pt", "run/privacy.json"],
}


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten images."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def pytest_of_the_project(folder, *arguments):
    """Run pytest in a copy of the project that property-tests its own loop."""
    shutil.copytree(ROOT / "examples" / "property_tests", folder, dirs_exist_ok=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "vitguard.testing.plugin", "--tb=short",
         "-p", "no:cacheprovider", *arguments],
        cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_a_project_of_its_own_property_tests_its_training_loop(tmp_path):
    done = pytest_of_the_project(tmp_path, "-m", "vitguard")
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout
    assert "0 fails, 0 inconclusive" in done.stdout


@pytest.mark.slow
def test_a_failure_says_what_the_docs_show_and_saves_the_picture(tmp_path):
    done = pytest_of_the_project(tmp_path, "shown_failing")
    assert done.returncode == 1, done.stdout
    page = (ROOT / "docs" / "testing.md").read_text()
    shown = page.partition("$ python -m pytest shown_failing\n")[2].partition("```")[0]

    def words(text):  # numbers and names of files follow the machine
        text = " ".join(text.split())
        return re.sub(r"[0-9a-f]{8}\.png|\d+(\.\d+)?", "#", text)

    assert shown and words(shown) in words(done.stdout), done.stdout
    (picture,) = (tmp_path / "vitguard-failures").glob("*.png")
    saved, docs = (Image.open(p) for p in (picture, ROOT / "docs/images/testing-failure.png"))
    assert saved.size == docs.size
    assert np.abs(np.asarray(saved, float) - np.asarray(docs, float)).mean() < 8


@pytest.mark.slow
def test_a_private_head_is_part_of_a_plain_model_that_knows_the_classes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import private_head

    private_head.main(["--epsilon", "8", "--out", str(tmp_path)])
    assert 0 < json.loads((tmp_path / "privacy.json").read_text())["epsilon"] <= 8
    model = build_model(f"{private_head.SMALL},num_classes=4").eval()
    model.load_state_dict(torch.load(tmp_path / "model.pt"))
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    data = private_head.made_here(timm.data.create_transform(**config))
    images, labels = data.tensors
    with torch.inference_mode():
        assert float((model(images).argmax(1) == labels).double().mean()) > 0.95


@pytest.mark.slow
def test_private_adapters_are_folded_into_a_plain_model_that_says_the_same(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import private_head
    import private_lora

    name = "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=48,depth=1,num_heads=3"
    transform = timm.data.create_transform(input_size=32)
    images, labels = private_head.made_here(transform, 24).tensors
    backbone = build_model(f"{name},num_classes=0")
    before = {n: p.detach().clone() for n, p in backbone.state_dict().items()}
    model = private_lora.with_adapters(backbone, images[:4], 4, rank=2, strength=4.0)
    moving = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "modules_to_save" in n for n in moving) and len(moving) == 4
    data = torch.utils.data.TensorDataset(images, labels)
    private = vg.DifferentialPrivacy(epsilon=8, epochs=2, delta=1e-2)
    guard = private_lora.train(model, data, private, epochs=2, batch=8, rate=0.02)
    spent = guard.privacy_spent()
    assert 0 < spent.epsilon <= 8 and spent.steps == 6
    with torch.inference_mode():
        said = model.eval()(images)
        plain = private_lora.folded(model, build_model(f"{name},num_classes=4"))
        assert torch.allclose(plain(images), said, atol=1e-4) and said.std() > 0
    after = plain.state_dict()
    still = [n for n, p in before.items() if torch.equal(p, after[n])]
    assert set(before) - set(still) == {"blocks.0.attn.qkv.weight"}  # what the adapters moved


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_cifar10

    return train_cifar10


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_example_runs_in_under_a_minute(path, tmp_path, folder):
    for package in NEEDS.get(path.name, ()):
        pytest.importorskip(package)
    assert path.name in ARGUMENTS, f"say in ARGUMENTS how to run {path.name}"
    places = {"tmp": str(tmp_path), "folder": str(folder)}
    arguments = [a.format(**places) for a in ARGUMENTS[path.name]]
    started = sum(os.times()[2:4])
    ran = subprocess.run(
        [sys.executable, str(path), *arguments], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip()
    assert sum(os.times()[2:4]) - started < 60  # processor seconds of the child
    for file in FILES[path.name]:
        assert (tmp_path / file).exists(), file


def test_tensorboard_shows_scalars_and_originals_beside_what_a_shuffle_makes_of_them(
    script, folder, tmp_path
):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    script.main([
        "--data", str(folder), "--epochs", "2", "--width", "32", "--depth", "1", "--batch-size",
        "4", "--defense", "shuffle:ratio=0.5,mask=uniform,derangement=true,dal=positions",
        "--device", "cpu", "--tensorboard", str(tmp_path / "board"),
    ])  # fmt: skip
    events = accumulator.EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0})
    events.Reload()
    assert {
        "training/loss task", "training/loss auxiliary", "training/learning rate",
        "training/test accuracy",
    } <= set(events.Tags()["scalars"])  # fmt: skip
    assert [e.step for e in events.Scalars("training/test accuracy")] == [4, 8]
    for what, at_least, at_most in (("what the model saw", 32, 32), ("shuffled at 70 %", 35, 44)):
        shown = events.Images(f"training/{what}")
        assert [e.step for e in shown] == [1, 5]  # once an epoch: a warm-up shows nothing at first
        image = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)))
        assert image.shape == (4 * 32, 64, 3)
        cut = image[:32].reshape(8, 4, 2, 8, 4, 3).transpose(2, 0, 3, 1, 4, 5).reshape(2, 64, 48)
        assert at_least <= (cut[0] != cut[1]).any(1).sum() <= at_most
        assert sorted(map(bytes, cut[0])) == sorted(map(bytes, cut[1]))


STACKS = [
    "none",
    "shuffle:ratio=0.7,schedule=linear,steps=4,dal=positions,dal_head=mlp",
    "positions:kind=sincos+shuffle:ratio=0.5,draw=batch,probability=0.5,warmup=2,steps=8,dal=tokens",
]


@pytest.mark.slow
@pytest.mark.parametrize("defense", STACKS)
def test_a_stopped_run_resumes_to_the_same_weights(script, folder, tmp_path, defense):
    common = [
        "--data", str(folder), "--epochs", "2", "--width", "32", "--depth", "1", "--batch-size",
        "4", "--defense", defense, "--device", "cpu", "--repeatable", "--mixup", "0.4",
    ]  # fmt: skip
    script.main([*common, "--out", str(tmp_path / "whole")])
    script.main([*common, "--out", str(tmp_path / "parts"), "--stop-after", "1"])
    script.main([*common, "--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "parts")
    )
    assert whole["step"] == parts["step"] == 8
    assert torch.equal(whole["guard"]["draws"], parts["guard"]["draws"])
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def test_a_resumed_run_draws_afresh(script, folder, tmp_path):
    """A checkpoint that brought draws back would let two runs share their masks and noise."""
    arguments = [
        "--data", str(folder), "--epochs", "2", "--width", "32", "--depth", "1", "--batch-size",
        "4", "--defense", "shuffle:ratio=0.5", "--device", "cpu", "--out", str(tmp_path),
    ]  # fmt: skip
    script.main([*arguments, "--stop-after", "1"])
    options = script.parser().parse_args(arguments)
    data = script.load_data(str(folder), images=None, image_size=32)
    masks = []
    for _ in range(2):
        training = script.Training(options, data)
        training.load(tmp_path / "checkpoint.pt")
        list(training.one_epoch())
        masks.append(training.guard.truth()["source"])
    assert not torch.equal(*masks)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--defense", "shuffle:ratio=0.7"], "--defense shuffle:ratio=0.5, as before"),
        (["--defense", "none"], "--defense shuffle:ratio=0.5, as before, got none"),
        (["--width", "64"], "a checkpoint of this run.*options of the first run"),
        (["--device", "cuda:99"], "device of this machine, got 'cuda:99'"),
    ],
)
def test_a_run_is_not_resumed_with_other_options(script, folder, tmp_path, changed, said):
    arguments = [
        "--data", str(folder), "--epochs", "1", "--width", "32", "--depth", "1", "--batch-size",
        "8", "--defense", "shuffle:ratio=0.5", "--device", "cpu", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    script.main(arguments)
    with pytest.raises(InputError, match=said):
        script.main([*arguments, *changed, "--resume"])


@pytest.mark.parametrize("content", [b"noise", b"", None])
def test_a_file_that_is_no_checkpoint_is_not_resumed(script, folder, tmp_path, content):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "checkpoint.pt")
    if content is not None:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint of this run, got .*checkpoint\.pt"):
        script.main(["--data", str(folder), "--out", str(tmp_path), "--resume", "--width", "32"])


@pytest.mark.slow
def test_training_learns_something(script, tmp_path):
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = (
                np.random.default_rng(i).integers(level, level + 50, (16, 16, 3)).astype("uint8")
            )
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    accuracy = script.main(
        ["--data", str(tmp_path), "--image-size", "16", "--epochs", "10", "--width", "32",
         "--depth", "1", "--batch-size", "6", "--lr", "0.003", "--defense", "shuffle:ratio=0.5"]
    )  # fmt: skip
    assert accuracy == 1.0


def test_cifar_arrays_are_read(script, data_folder):
    data = script.load_data(str(data_folder), images=20, image_size=32)
    assert data.train[:][0].shape == (20, 3, 32, 32) and data.train[:][0].dtype == torch.uint8
    assert len(data.test) == 2000
    assert data.classes <= 10


def test_clear_errors(script, tmp_path, monkeypatch):
    monkeypatch.delenv("VITGUARD_DATA", raising=False)
    with pytest.raises(InputError, match="VITGUARD_DATA"):
        script.main([])
    with pytest.raises(InputError, match="folder with images"):
        script.main(["--data", str(tmp_path)])
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "a.png")
    with pytest.raises(InputError, match="class folders"):
        script.main(["--data", str(tmp_path / "photos")])


def test_augmentation_moves_and_mirrors_each_image_on_its_own(script):
    pixels = torch.arange(16.0).expand(64, 3, 16, 16).clone()
    moved = script.augment(pixels, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape
    rows = {tuple(image[0, 0].tolist()) for image in moved}
    assert len(rows) > 6
    assert all(set(row) <= set(range(16)) for row in rows)


@pytest.mark.slow
def test_the_tradeoff_benchmark_goes_on_where_it_was_stopped(
    folder, tmp_path, script, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    path = ROOT / "benchmarks" / "shuffle_tradeoff.py"
    common = ["--out", str(tmp_path / "runs"), "--data", str(folder), "--seeds", "1"]
    small = ["--epochs", "1", "--batch-size", "8", "--depth", "1", "--images", "20"]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "shuffle.md").write_text(
        "before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n"
    )

    def run(*arguments):
        """What it prints, started anew: nothing but files goes on from one run to the next."""
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    assert run("train", *common, *small).count("seed 0") == 11
    assert run("train", *common, *small) == ""
    attacks = ["--photos", "1", "--attacks", "position", "span"]
    assert run("audit", *common, *attacks).count("\n") == 22
    assert run("audit", *common, *attacks) == ""
    run("report", "--out", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs"))
    page = (tmp_path / "docs" / "shuffle.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert page.count("| shuffle | ") == 6
    assert (tmp_path / "docs" / "images" / "shuffle-tradeoff.png").is_file()
