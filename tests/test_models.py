"""Models by name, checkpoints that are not trusted, and the architecture of APRIL."""

import pickle
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vitguard.core import Normalization
from vitguard.errors import InputError
from vitguard.models import (
    AprilViT,
    build_model,
    check_finite,
    find_device,
    load_checkpoint,
    normalization_of,
)
from vitguard.vit import Anatomy

SPEC = (
    "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=48,depth=1,num_heads=2,num_classes=3"
)
APRIL = "april_vit:img_size=8,patch_size=4,embed_dim=16,depth=1,num_heads=2,num_classes=3"


def test_a_spec_gives_the_constructors_keywords():
    anatomy = Anatomy.of(build_model(f"{SPEC},class_token=false,global_pool=avg,init_values=0.1"))
    assert (anatomy.image_size, anatomy.patch_size, anatomy.width) == ((16, 16), (4, 4), 48)
    assert anatomy.classes == 3 and anatomy.prefix == () and anatomy.blocks[0].scale1 is not None


def test_none_is_not_left_out_of_a_models_arguments_in_silence():
    assert Anatomy.of(build_model(f"{SPEC},pos_embed=none")).positions is None
    for argument in ("init_values=none", "global_pool=None"):
        with pytest.raises(InputError, match=rf"a value for {argument[:8]}.*leaves out"):
            build_model(f"{SPEC},{argument}")


@pytest.mark.parametrize(
    ("size", "want"), [("32x64", (32, 64)), ("64x16", (64, 16)), ("32", (32, 32))]
)
def test_a_size_that_is_not_square_can_be_written(size, want):
    spec = f"vit_tiny_patch16_224:patch_size=8,depth=1,embed_dim=48,num_heads=2,img_size={size}"
    assert Anatomy.of(build_model(spec)).image_size == want


def test_random_weights_come_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (build_model(APRIL, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.pos_embed, again.pos_embed)
    assert not torch.equal(first.pos_embed, other.pos_embed)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("vit_tinny_patch16_224", "vit_tinny_patch16_224"),
        ("", "''"),
        (f"{SPEC},depth", "'depth'"),
        (f"{SPEC},wings=2", "wings"),
        ("vit_tiny_patch16_224:embed_dim=50,num_heads=3", "embed_dim=50"),
        ("april_vit:img_size=9,patch_size=4", "img_size"),
        ("april_vit:img_size=8,patch_size=0", "patch_size=0"),
    ],
)
def test_specs_that_cannot_be_built_name_what_is_wrong(spec, named):
    with pytest.raises(InputError, match=named):
        build_model(spec)


def test_the_april_vit_is_what_its_proof_needs():
    anatomy = Anatomy.of(build_model(APRIL))
    block = anatomy.blocks[0]
    assert not block.pre_norm and not block.residual and anatomy.position_prefix == 0
    assert AprilViT(8, 4, 16, 1, 2, 3)(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_checkpoints_of_either_format_load_strictly(tmp_path, wrap, prefix):
    source, model = build_model(APRIL, seed=1), build_model(APRIL, seed=2)
    state = {f"{prefix}{k}": v for k, v in source.state_dict().items()}
    torch.save(wrap(state), tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        target = build_model(APRIL, seed=2)
        load_checkpoint(target, tmp_path / name)
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())
    assert not torch.equal(model.pos_embed, source.pos_embed)


def changed(**changes):
    state = dict(build_model(APRIL, seed=1).state_dict())
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (changed(pos_embed=None), "1 missing, such as pos_embed"),
        (changed(stranger=torch.zeros(1)), "1 unknown, such as stranger"),
        (changed(pos_embed=torch.zeros(1, 8, 16)), "pos_embed of shape"),
        (changed(head__bias=torch.tensor([0.0, float("nan"), 0])), "NaN or infinity in head.bias"),
        (changed(head__bias=torch.tensor([0.0, float("inf"), 0])), "NaN or infinity in head.bias"),
        ([1, 2], "state dict"),
        ({1: torch.zeros(1)}, "1 unknown, such as 1"),
        (torch.nn.Linear(1, 1), r"w\.pt, which is none .*model\.state_dict\(\)"),
    ],
)
def test_a_wrong_checkpoint_is_refused_and_changes_nothing(tmp_path, state, named):
    torch.save(state, tmp_path / "w.pt")
    model = build_model(APRIL, seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=named) as caught:
        load_checkpoint(model, tmp_path / "w.pt")
    assert not re.search("\x1b|weights_only|\n", str(caught.value))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Mine:
    """Would run on unpickling."""

    ran = False

    def __reduce__(self):
        return (setattr, (Mine, "ran", True))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"state_dict": Mine()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Mine()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError):
            load_checkpoint(build_model(APRIL), tmp_path / name)
    assert not Mine.ran


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=120), st.sampled_from(["w.pt", "w.safetensors"]), st.booleans())
def test_arbitrary_bytes_are_one_clear_error(tmp_path, content, name, pickled):
    start = b"\x80\x02" if pickled else b""
    (tmp_path / name).write_bytes(start + content)
    with pytest.raises(InputError):
        load_checkpoint(AprilViT(8, 4, 16, 1, 2, 3), tmp_path / name)


def test_a_checkpoint_of_masked_pretraining_is_refused_with_a_hint(small_vit, tmp_path):
    """MAE's own files: the encoder under timm's names, a decoder beside it, and no head."""
    model = small_vit(img_size=8, embed_dim=12, depth=1, num_heads=3)
    state = {k: t for k, t in model.state_dict().items() if not k.startswith("head")}
    encoder = dict(state)
    state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 12)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    with pytest.raises(InputError, match=r"MAE.*without decoder_"):
        load_checkpoint(model, tmp_path / "mae.pth")
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    assert "the head was drawn" in load_checkpoint(model, tmp_path / "encoder.pth")[0]


def test_a_missing_file_and_a_folder(tmp_path):
    for path, said in ((tmp_path / "none.pt", "no file"), (tmp_path, "the folder")):
        with pytest.raises(InputError, match=said):
            load_checkpoint(AprilViT(), path)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named(name):
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=f"device of this machine, got '{name}'"):
        find_device(name)


def test_weights_that_are_not_finite_are_named():
    model = build_model(APRIL)
    check_finite(model)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.proj\.weight"):
        check_finite(model)


def test_normalization_is_the_models_own():
    config = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    model = build_model(SPEC)
    model.pretrained_cfg = config
    assert normalization_of(model) == Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert normalization_of(AprilViT()) == Normalization()
    grey = build_model(f"{SPEC},in_chans=1")
    grey.pretrained_cfg = config
    assert normalization_of(grey).mean == pytest.approx((0.2,))


def test_the_trained_model_of_the_data_folder_loads(cifar_vit):
    assert Anatomy.of(cifar_vit).patches == 64
