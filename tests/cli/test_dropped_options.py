"""Options and settings that would be passed over in silence."""

import pytest
from PIL import Image

from vitguard.cli.main import main
from vitguard.data import load_images
from vitguard.errors import InputError
from vitguard.models import build_model
from vitguard.registry import parse_attack, parse_stack


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--optimizer", "adamw"], "--optimizer"),
        (["--lr", "0.1", "--optimizer", "sgd"], "--lr and --optimizer"),
        (["--local-steps", "2"], "--local-steps"),
    ],
)
def test_a_training_that_a_gradient_does_not_have_is_refused(given, named, capsys):
    small = ["--model", "vit_tiny_patch16_224:img_size=32,patch_size=8,depth=1"]  # if it runs
    assert main(["audit", *small, "--defense", "none", "--attack", "position", *given]) == 2
    assert f"--update difference with {named}, got --update gradient" in capsys.readouterr().err


def test_a_setting_is_said_once():
    with pytest.raises(InputError, match="noise:scale once, got it twice"):
        parse_stack("noise:scale=0.1,scale=0.2")
    with pytest.raises(InputError, match="inverting:iterations once"):
        parse_attack("inverting:iterations=3,iterations=4")
    with pytest.raises(InputError, match="img_size once"):
        build_model("vit_tiny_patch16_224:img_size=32,depth=1,img_size=64")


def test_a_shortened_name_is_answered_by_names_that_begin_so():
    with pytest.raises(InputError, match="Close to it: vit_tiny_"):
        build_model("vit_tiny")


def test_an_empty_path_is_not_the_working_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("own.png")
    assert main(["audit", "--images", ""]) == 2
    assert "Expected --images FILE or FOLDER, got an empty path" in capsys.readouterr().err
    with pytest.raises(InputError, match="an image file or a folder, got an empty path"):
        load_images("", (32, 32))
    assert len(load_images(".", (32, 32))) == 1


@pytest.mark.parametrize(
    "given",
    [
        ["--html", "a.html", "--json", "./a.html"],
        ["--json", "w.pt", "--checkpoint", "w.pt"],
        ["--json", "u.safetensors", "--update-file", "u.safetensors"],
        ["--json", "i.png", "--images", "i.png"],
    ],
)
def test_no_report_is_written_over_another_or_over_what_is_read(
    given, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("w.pt", "u.safetensors", "i.png"):
        (tmp_path / name).write_bytes(b"precious")
    assert main(["audit", *given]) == 2
    assert "files of their own for --html and --json" in capsys.readouterr().err
    assert all(p.read_bytes() == b"precious" for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    "given",
    [
        ["audit", "--checkpoint", ""], ["audit", "--update-file", ""], ["audit", "--before", " "],
        ["audit", "--mean", "", "--std", ""], ["audit", "--tensorboard", ""],
        ["audit", "--html", ""], ["audit", "--json", ""], ["advise", "--json", ""],
        ["plan", "--encrypt", "all", "--json", ""],
    ],
)  # fmt: skip
def test_an_empty_value_is_not_an_option_left_out(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([given[0], "--model", "april_vit", *given[1:]]) == 2
    assert f"Expected {given[-2]} with a value" in capsys.readouterr().err.replace(
        "--mean", "--std"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "do"),
    [
        ("pretrained=true", "--pretrained"), ("pretrained=1", "--pretrained"),
        ("checkpoint_path=w.pt", "--checkpoint"),
    ],
)  # fmt: skip
def test_weights_come_by_an_option_that_the_report_names(argument, do, capsys):
    for command in ("audit", "advise"):
        assert main([command, "--model", f"vit_tiny_patch16_224:{argument}"]) == 2
        said = capsys.readouterr().err
        assert f"got {argument.partition('=')[0]}" in said
        assert do in said


@pytest.mark.parametrize(
    "given", [["--seed", str(2**64)], ["--seed", str(2**63)], ["--device", "meta"]]
)
def test_a_seed_or_device_that_torch_cannot_use_is_one_line(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["audit", "--model", "april_vit", *given]) == 2
    assert "vitguard: error: Expected" in capsys.readouterr().err
