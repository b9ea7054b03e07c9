"""Options and settings that would be passed over in silence."""

import pytest

from vitguard.cli.main import main
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
    assert main(["audit", *given]) == 2
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
