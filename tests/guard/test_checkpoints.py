"""Checkpoints as people have them: wrapped, prefixed, averaged, without a head, of another grid."""

import argparse
import datetime
import pathlib
import pickle
import re
from collections import defaultdict

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import vitguard as vg
from tests.small import vit
from vitguard.cli.main import main
from vitguard.errors import InputError
from vitguard.models import AprilViT, build_model, load_checkpoint


def renamed(weights, prefix):
    return {prefix + k: v for k, v in weights.items()}


def protected(spec):
    model = vit()
    vg.protect(model, spec)
    return model


class Opaque:
    """An object of a training script that no loader knows."""


LAYOUTS = {
    "plain": lambda w: w,
    "averaged weights only": lambda w: {"state_dict_ema": renamed(w, "module."), "epoch": 3},
    "model_ema": lambda w: {"model_ema": w, "optimizer": {"state": {}, "param_groups": []}},
    "ema under a key of its own": lambda w: {"ema": {"state_dict": w}},
    "last weights before averaged ones": lambda w: {
        "state_dict": w, "state_dict_ema": {k: v + 1 for k, v in w.items()},
    },
    "arguments in a namespace": lambda w: {
        "state_dict": w, "args": argparse.Namespace(lr=1.0, output=pathlib.PosixPath("/x")),
    },
    "Lightning": lambda w: {"state_dict": renamed(w, "model."), "epoch": 3, "loops": {}},
    "Lightning with a loss of its own": lambda w: {
        "state_dict": renamed(w, "net.") | {"criterion.weight": torch.ones(3)},
    },
    "a metric that is a number of NumPy": lambda w: {
        "state_dict": w, "metric": np.float64(0.5), "best": np.float32(1), "step": np.int64(3),
    },
    "dates and defaults": lambda w: {
        "state_dict": w, "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "took": datetime.timedelta(1), "log": defaultdict(list, {"loss": [1.0]}),
    },
    "AveragedModel": lambda w: {"n_averaged": torch.tensor(3)} | renamed(w, "module."),
    "FSDP": lambda w: renamed(w, "_fsdp_wrapped_module."),
    "FSDP inside": lambda w: {
        k.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): v for k, v in w.items()
    },
    "activation checkpointing": lambda w: {
        k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v for k, v in w.items()
    },
    "DDP in Lightning": lambda w: {"state_dict": renamed(w, "module.model.")},
    "compiled": lambda w: {"model": renamed(w, "_orig_mod.")},
    "a key nobody lists": lambda w: {"my_weights": w, "epoch": 1},
    "deep": lambda w: {"checkpoint": {"model": {"state_dict": renamed(w, "backbone.")}}},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everyday_layouts_load_the_very_weights(tmp_path, layout):
    weights, target = vit().state_dict(), vit()
    torch.save(LAYOUTS[layout](weights), tmp_path / "w.pt")
    notes = load_checkpoint(target, tmp_path / "w.pt")
    assert all(torch.equal(v, weights[k]) for k, v in target.state_dict().items())
    assert bool(notes) == ("loss of its own" in layout or "before averaged" in layout)


def test_averaged_weights_that_were_left_out_are_named(tmp_path):
    weights = vit().state_dict()
    held = {"epoch": 1, "model": weights, "model_ema": {"state_dict": renamed(weights, "module.")}}
    torch.save(held, tmp_path / "w.pt")
    (note,) = load_checkpoint(vit(), tmp_path / "w.pt")
    assert "under model_ema" in note and "under model are taken" in note


def test_the_weights_of_torchs_averaged_model_load(tmp_path):
    model, target = vit(), vit()
    torch.save(AveragedModel(model).state_dict(), tmp_path / "w.pt")
    load_checkpoint(target, tmp_path / "w.pt")
    assert torch.equal(target.head.weight, model.head.weight)


PROTECTED = [
    "positions:kind=frozen+shuffle:ratio=0.5,dal=tokens",
    "positions:kind=sincos",
    "shuffle:ratio=0.5",
    "shuffle:ratio=0.5,warmup=1,steps=2,schedule=linear",
    "withheld+shuffle:ratio=0.5",
    "noise:scale=0.01",
]


@pytest.mark.parametrize("spec", PROTECTED)
def test_what_a_protected_model_saved_loads_into_a_bare_one_and_back(tmp_path, spec):
    model, bare, again = protected(spec), vit(), protected(spec)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    notes = load_checkpoint(bare, tmp_path / "w.pt")
    assert torch.equal(bare.head.weight, model.head.weight)
    assert bool(notes) == ("shuffle" in spec)
    assert load_checkpoint(again, tmp_path / "w.pt") == ()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize(
    "name", ["w.safetensors", "W.SAFETENSORS", "pytorch_model.bin", "w", "w.pt", "w.ckpt"]
)
def test_a_safetensors_file_is_known_by_what_it_holds(tmp_path, name):
    weights, target = vit().state_dict(), vit()
    save_file(weights, tmp_path / name)
    load_checkpoint(target, tmp_path / name)
    assert torch.equal(target.head.weight, weights["head.weight"])


REFUSED = {
    "two models": (lambda w: renamed(w, "student.") | renamed(w, "teacher."), "student., teacher."),
    "two dictionaries": (lambda w: {"left": w, "right": w}, "left, right"),
    "an object of a class": (lambda w: {"state_dict": w, "config": Opaque()}, "Opaque"),
    "part of the body": (lambda w: {k: w[k] for k in w if "mlp" not in k}, "blocks.0.mlp.fc1.bias"),
    "half a head": (lambda w: {k: w[k] for k in w if k != "head.bias"}, "head.bias; it has"),
    "another architecture": (lambda w: {"conv1.weight": torch.ones(3)}, "such as conv1.weight"),
    "no tensors": (lambda w: {"epoch": 3}, "it has none"),
    "float8": (lambda w: {k: v.to(torch.float8_e5m2) for k, v in w.items()}, "float8_e5m2"),
    "half a head of other classes": (
        lambda w: w | {"head.weight": torch.ones(5, 64)}, "head.weight of",
    ),
    "a head of another width": (
        lambda w: w | {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)},
        "head.weight of",
    ),
    "a norm of another width": (
        lambda w: w | {"norm.weight": torch.ones(5), "norm.bias": torch.ones(5)}, "norm.weight of",
    ),
    "arrays of NumPy": (lambda w: {k: v.numpy() for k, v in w.items()}, "numpy.ndarray"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_names_the_keys_it_saw(tmp_path, case):
    make, named = REFUSED[case]
    torch.save(make(vit().state_dict()), tmp_path / "w.pt")
    target = vit()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(InputError, match=re.escape(named)):
        load_checkpoint(target, tmp_path / "w.pt")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


BACKBONES = {
    "timm": vit,
    "average pooling": lambda: vit(global_pool="avg", fc_norm=False),
    "two heads": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", depth=1, img_size=32, num_classes=5
    ),
    "april": lambda: AprilViT(16, 4, 32, 1, 2, 5),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2),
        window_size=4, num_classes=5,
    ),
    "torchvision": lambda: __import__("torchvision").models.VisionTransformer(
        32, 8, 1, 2, 32, 64, num_classes=5
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_without_a_head_is_taken_and_the_drawn_head_is_named(tmp_path, kind):
    source, target = BACKBONES[kind](), BACKBONES[kind]()
    anatomy = vg.Anatomy.of(source)
    is_head = tuple(f"{head}." for head in anatomy.head)
    body = {k: v for k, v in source.state_dict().items() if not k.startswith(is_head)}
    head = {k: v.clone() for k, v in target.state_dict().items() if k.startswith(is_head)}
    assert head
    torch.save(body, tmp_path / "w.pt")
    (note,) = load_checkpoint(target, tmp_path / "w.pt")
    assert "head was drawn at random" in note
    state = target.state_dict()
    assert all(torch.equal(state[k], v) for k, v in (body | head).items())


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_head_for_other_classes_is_left_out_and_named(tmp_path, kind):
    source, target = BACKBONES[kind](), BACKBONES[kind]()
    heads = tuple(f"{head}." for head in vg.Anatomy.of(source).head)
    names = [k for k in source.state_dict() if k.startswith(heads)]
    wide = {k: torch.ones(1000, *v.shape[1:]) for k, v in source.state_dict().items() if k in names}
    own = {k: v.clone() for k, v in target.state_dict().items() if k in names}
    torch.save(source.state_dict() | wide, tmp_path / "w.pt")
    (note,) = load_checkpoint(target, tmp_path / "w.pt")
    assert note == "the head was drawn at random: that of the checkpoint is for 1000 classes"
    state = target.state_dict()
    assert all(torch.equal(state[k], v) for k, v in (source.state_dict() | own).items())


STAND_INS = {
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "w.pt"),
    "a web page": (b"\n<!DOCTYPE html><html></html>", "w.pth"),
    "an index of several": (b'{"metadata": {}, "weight_map": {}}', "model.safetensors.index.json"),
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_what_lies_where_weights_should_is_named(tmp_path, kind):
    content, name = STAND_INS[kind]
    for file in {name, "model.safetensors"} - ({"model.safetensors"} if "index" in kind else set()):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(InputError, match=f"{kind}.*[.] [A-Z]"):
            load_checkpoint(vit(), tmp_path / file)
    with pytest.raises(InputError, match=r"the folder .* Give the file in it"):
        load_checkpoint(vit(), tmp_path)


def test_a_torch_file_called_safetensors_is_known_by_what_it_holds(tmp_path):
    weights = vit().state_dict()
    for old in (True, False):
        torch.save(weights, tmp_path / "w.safetensors", _use_new_zipfile_serialization=old)
        target = vit()
        load_checkpoint(target, tmp_path / "w.safetensors")
        assert torch.equal(target.head.weight, weights["head.weight"])


@pytest.mark.slow
def test_safetensors_whose_header_begins_like_a_page_load(tmp_path):
    weights = vit().state_dict()
    for length in range(64):  # the header's length decides the first byte of the file
        save_file(weights, tmp_path / "w.safetensors", metadata={"note": "x" * length})
        load_checkpoint(vit(), tmp_path / "w.safetensors")


def test_numbers_of_numpy_run_nothing(tmp_path):
    """What stands in for them keeps no value: a type of objects would be a pointer."""
    torch.save({"state_dict": vit().state_dict(), "metric": np.float64(2)}, tmp_path / "w.pt")
    from vitguard.tensor_files import _harmless

    with torch.serialization.safe_globals(_harmless()):
        metric = torch.load(tmp_path / "w.pt", weights_only=True)["metric"]
    assert not isinstance(metric, np.generic) and vars(metric) == {}
    class_of_numpy = pickle.loads(pickle.dumps(np.float64(2)))
    assert isinstance(class_of_numpy, np.generic)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((64, 32), {}),
        ((32, 64), {}),
        ((64, 24), {"global_pool": "avg", "class_token": False}),
        ((48, 32), {"reg_tokens": 2}),
        ((48, 32), {"reg_tokens": 2, "no_embed_class": True}),
        ((64, (32, 48)), {}),
    ],
)
def test_positions_of_another_grid_are_resampled_as_timm_does(tmp_path, sizes, options):
    source = vit(img_size=sizes[0], **options)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    ours, theirs = vit(img_size=sizes[1], **options), vit(img_size=sizes[1], **options)
    (note,) = load_checkpoint(ours, tmp_path / "w.safetensors")
    want = timm.models.vision_transformer.checkpoint_filter_fn(source.state_dict(), theirs)
    assert torch.allclose(ours.pos_embed, want["pos_embed"]) and "resampled from" in note
    assert ours.pos_embed.shape == theirs.pos_embed.shape


@pytest.mark.parametrize("shape", [(1, 8, 64), (1, 65, 32), (65, 64), (2, 65, 64), (1, 1, 64)])
def test_positions_that_are_no_square_grid_are_refused_with_both_shapes(tmp_path, shape):
    weights = vit().state_dict() | {"pos_embed": torch.zeros(shape)}
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"pos_embed of shape \(1, 17, 64\), got"):
        load_checkpoint(vit(), tmp_path / "w.pt")


def test_an_audit_of_a_pretrained_backbone_says_what_was_drawn_and_resampled(tmp_path, capsys):
    spec = "vit_tiny_patch16_224:img_size=32,patch_size=8,depth=1,embed_dim=48,num_heads=2"
    backbone = build_model(spec.replace("img_size=32", "img_size=48") + ",num_classes=0")
    save_file({k: v.half() for k, v in backbone.state_dict().items()}, tmp_path / "w.safetensors")
    arguments = ["audit", "--model", f"{spec},num_classes=10", "--attack", "position"]
    arguments += ["--checkpoint", str(tmp_path / "w.safetensors"), "--num-images", "1"]
    assert main([*arguments, "--defense", "positions:kind=frozen", "--json", "-"]) == 0
    written = capsys.readouterr().out
    assert "head was drawn at random" in written
    assert "resampled from 6 x 6 to 4 x 4 patches" in written
