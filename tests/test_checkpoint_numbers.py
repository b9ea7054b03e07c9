"""Checkpoints in numbers that are not those of the model; sizes on the command line."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from vitguard.cli.main import main
from vitguard.errors import InputError
from vitguard.models import build_model, load_checkpoint
from vitguard.vit import Anatomy

SCALES = [t for t in (getattr(torch, "float8_e8m0fnu", None),) if t]  # not in torch 2.6


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10, embed_dim=32,
        num_heads=2,
    )  # fmt: skip


LOADED = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REFUSED = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    *SCALES, torch.complex64, torch.int8, torch.int64, torch.bool,
]  # fmt: skip


def write(folder, form, state):
    path = folder / f"w.{form}"
    try:
        save_file(state, path) if form == "safetensors" else torch.save(state, path)
    except (KeyError, RuntimeError, NotImplementedError):
        pytest.skip("this library does not write the type")
    return path


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", LOADED)
def test_other_floating_point_numbers_are_taken(tmp_path, form, kind):
    state = {k: v.to(kind) for k, v in vit().state_dict().items()}
    target = vit()
    load_checkpoint(target, write(tmp_path, form, state))
    assert torch.equal(target.head.weight, state["head.weight"].float())


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("part", ["all", "one"])
@pytest.mark.parametrize("kind", REFUSED)
def test_numbers_that_are_no_weights_are_refused_by_type_and_name(tmp_path, form, part, kind):
    state = vit().state_dict()
    chosen = [*state] if part == "all" else ["head.weight"]
    target, before = vit(), vit().state_dict()
    path = write(tmp_path, form, state | {k: state[k].to(kind) for k in chosen})
    named = str(kind).removeprefix("torch.")
    if (form, kind) in [("safetensors", scale) for scale in SCALES]:
        named = "F8_E8M0"  # the reader of the file knows no more
    elif part == "one":
        named = f"head.weight.*{named}"
    with pytest.raises(InputError, match=named):
        load_checkpoint(target, path)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


SPEC = "vit_tiny_patch16_224:patch_size=8,depth=1,embed_dim=32,num_heads=2,img_size="


@pytest.mark.parametrize(
    ("size", "want"),
    [("32x64", (32, 64)), ("64X32", (64, 32)), ("32\u00d764", (32, 64)), ("40", (40, 40)),
     ("36x44", (36, 44))],
)  # fmt: skip
def test_a_size_can_be_written_as_height_and_width(size, want):
    assert Anatomy.of(build_model(SPEC + size)).image_size == want


@pytest.mark.parametrize(
    "size", ["32*64", "(32,64)", "[32,64]", "32,64", "32 x 64", "32x64x3", "x64", "32px", "32.0"]
)
def test_a_size_written_otherwise_is_refused_with_how_to_write_it(size, capsys):
    with pytest.raises(InputError, match="img_size=32x64"):
        build_model(SPEC + size)
    assert main(["audit", "--model", SPEC + size]) == 2
    assert "written img_size=32x64" in capsys.readouterr().err
