"""Images that show next to nothing, files of several frames, and folders one level too high."""

import numpy as np
import pytest
import torch
from PIL import Image

import vitguard as vg
from vitguard.cli.main import main
from vitguard.data import faint_note, load_images, sample_images
from vitguard.errors import InputError
from vitguard.models import build_model

RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)
HOT = RAMP.astype(np.uint16) * 16
HOT[3, 4] = 65535

FAINT = {
    "8 bits of 32": np.ascontiguousarray(COLOUR // 32),
    "black": COLOUR * 0,
    "white": COLOUR * 0 + 255,
    "one colour": np.ascontiguousarray(np.broadcast_to(COLOUR[5, 9], (64, 64, 3))),
    "12 bits with a hot pixel": HOT,
    "12 bits with a signed offset": RAMP.astype(np.uint16) * 16 + 32768,
}


def noted(notes):
    return any("nearly black or of one value" in note for note in notes)


@pytest.mark.parametrize("kind", FAINT)
def test_an_image_that_shows_next_to_nothing_is_told(tmp_path, kind):
    Image.fromarray(FAINT[kind]).save(tmp_path / "a.png")
    Image.fromarray(COLOUR).save(tmp_path / "b.png")
    images = load_images(tmp_path, (32, 32))
    assert noted(images.notes) and any(n.startswith("1 of 2 images are") for n in images.notes)


@pytest.mark.parametrize("values", [COLOUR, RAMP, RAMP.astype(np.uint16) * 257, COLOUR // 4 + 90])
def test_an_image_that_shows_something_is_not(tmp_path, values):
    Image.fromarray(np.ascontiguousarray(values)).save(tmp_path / "a.png")
    assert not noted(load_images(tmp_path, (32, 32)).notes)


@pytest.mark.parametrize("size", [(16, 16), (224, 224)])
def test_no_sample_photo_is(size):
    assert faint_note(sample_images(size).pixels) == ""


def test_large_images_and_borders_do_not_hide_it():
    image = torch.zeros(1, 3, 4200, 4200)
    assert faint_note(image)
    image[..., ::10] = 1.0
    assert not faint_note(image)


@pytest.mark.slow
def test_audits_of_tensors_and_of_updates_say_it_too(small_vit):
    model = small_vit(img_size=32, patch_size=8, depth=1)
    once, label = torch.rand(1, 3, 32, 32), torch.tensor([3])
    twice = once / 255  # of who divides what ToTensor has divided
    assert noted(vg.audit(model, (twice, label), attacks="position").notes)
    assert not noted(vg.audit(model, (once, label), attacks="position").notes)
    guard = vg.protect(model, [])
    update, public = guard.update(twice, label), guard.public_model()
    assert noted(vg.audit_update(public, update, attacks="position", truth=twice).notes)
    assert not noted(vg.audit_update(public, update, attacks="position").notes)


@pytest.mark.slow
def test_notes_on_the_images_behind_a_saved_update_are_in_its_report(tmp_path):
    name = "vit_tiny_patch16_224:img_size=32,patch_size=8,depth=1,num_classes=10"
    update = vg.protect(build_model(name), []).update(torch.rand(1, 3, 32, 32), torch.tensor([3]))
    update.save(tmp_path / "u.safetensors")
    (tmp_path / "photos").mkdir()
    Image.fromarray(HOT).save(tmp_path / "photos" / "a.png")
    given = ["--update-file", str(tmp_path / "u.safetensors"), "--images"]
    code = main(
        ["audit", "--model", name, *given, str(tmp_path / "photos"), "--attack", "position",
         "--html", str(tmp_path / "r.html"), "--json", str(tmp_path / "r.json")]
    )  # fmt: skip
    assert code == 0
    assert "nearly black" in (tmp_path / "r.json").read_text()


def test_frames_that_are_left_out_are_told(tmp_path):
    first, other = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    first.save(tmp_path / "a.tif", save_all=True, append_images=[other, other])
    first.save(tmp_path / "b.gif", save_all=True, append_images=[other])
    first.save(tmp_path / "c.png")
    assert "2 of 3 files have several frames" in " ".join(load_images(tmp_path, (32, 32)).notes)
    assert "several frames" not in " ".join(load_images(tmp_path / "c.png", (32, 32)).notes)


def test_a_data_set_given_one_level_too_high_names_the_folder_to_give(tmp_path):
    (tmp_path / "val" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "loop").symlink_to(tmp_path)
    Image.fromarray(COLOUR).save(tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(InputError, match=r"without any\. There are some in .*train: give that"):
        load_images(tmp_path, (32, 32))
    assert len(load_images(tmp_path / "train", (32, 32))) == 1
    with pytest.raises(InputError, match=r"without any\.$"):
        load_images(tmp_path / "val", (32, 32))
