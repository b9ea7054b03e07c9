"""Images and models that are not 3 channels in whole patches, dark files, odd suffixes."""

import copy
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import vitguard as vg
from tests.fast import fast_for
from tests.small import vit
from vitguard import data
from vitguard.audit.scale import decoys_for
from vitguard.cli.main import main
from vitguard.vit import Anatomy

SPEC = "vit_tiny_patch16_224:img_size={},patch_size=8,depth=1,embed_dim={},num_heads=2,in_chans={}"


SIZES = [(36, 36), (33, 33), (39, 39), (36, 44), (32, 37), (39, 32)]


# a border on both sides, and on one; the others have borders of other widths
@pytest.mark.slow
@pytest.mark.parametrize("size", fast_for(SIZES, fast=[(39, 32)]))
def test_what_the_patches_cover_is_scored_where_they_do_not_divide_the_image(size):
    torch.manual_seed(0)
    model = vit(img_size=size)
    anatomy = Anatomy.of(model)
    images = torch.rand(1, 3, *size)
    patches = anatomy.patchify(images)
    assert patches.shape == (1, anatomy.patches, 3 * 64)
    back = anatomy.unpatchify(patches)
    assert back.shape == images.shape
    assert torch.equal(anatomy.covered(back), anatomy.covered(images))
    assert torch.equal(model.eval()(back), model(images))  # the border is never seen
    report = vg.audit(
        model.train(), (images, torch.tensor([3])), defenses="noise:scale=0", attacks=["position"]
    )
    assert [f.verdict for f in report.findings] == ["leaks", "leaks"]
    assert min(f.psnr.max for f in report.findings) > 60


def test_images_of_another_size_are_not_taken_for_a_border():
    anatomy = Anatomy.of(vit(img_size=36))
    for size in ((40, 40), (31, 36), (36, 48)):
        with pytest.raises(RuntimeError):
            anatomy.patchify(torch.rand(1, 3, *size))


@pytest.mark.slow
# fewer than 3 channels, and more; the others are as many more
@pytest.mark.parametrize("channels", fast_for([1, 2, 4, 5, 6, 12], fast=[5]))
def test_models_of_any_number_of_channels_are_audited_and_reported(channels, tmp_path):
    torch.manual_seed(0)
    model = vit(in_chans=channels, embed_dim=96)
    batch = torch.rand(1, channels, 32, 32), torch.tensor([3])
    report = vg.audit(model, batch, defenses="positions:kind=frozen", attacks=["position"])
    assert [f.verdict for f in report.findings] == ["leaks", "blocked"]
    report.save(tmp_path / "r.html")
    update = vg.protect(copy.deepcopy(model), []).update(batch[0] * 2 - 1, batch[1])
    received = vg.audit_update(model, update, attacks=["position"], truth=batch[0])
    assert received.findings[-1].verdict == "leaks"
    received.save(tmp_path / "u.html")
    assert decoys_for(batch[0], seed=0).shape == (1000, channels, 32, 32)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 6])
def test_sample_photos_take_the_channels_of_the_model(channels):
    photos = data.sample_images((16, 16), count=2).pixels
    made = data.with_channels(photos, channels)
    assert made.shape == (2, channels, 16, 16)
    for i in range(channels):
        want = photos.mean(1) if channels == 1 else photos[:, i % 3]
        assert torch.equal(made[:, i], want)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_command_line_audits_other_channels_and_says_how_images_were_made(channels, capsys):
    arguments = ["audit", "--model", SPEC.format(32, 96, channels), "--attack", "position"]
    arguments += ["--num-images", "1", "--defense", "positions:kind=frozen", "--json", "-"]
    assert main(arguments) == 0
    assert f"the model takes {channels} channels; the images were made" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["0.5,0.5,0.5", "0.5", "a,b"])
def test_a_mean_of_other_channels_says_how_many_numbers(given, capsys):
    arguments = ["audit", "--model", SPEC.format(32, 96, 2), "--mean", given, "--std", given]
    assert main(arguments) == 2
    assert "--mean as 2 numbers, one a channel" in capsys.readouterr().err


def write(path, values):
    Image.fromarray(values).save(path)
    return path


RAMP = np.tile(np.arange(64) * 4, (64, 1))
DARK = {
    "12 bits in 16": ("a.png", (RAMP * 16).astype(np.uint16), True),
    "10 bits in 16": ("a.png", (RAMP * 4).astype(np.uint16), True),
    "14 bits in 16": ("a.png", (RAMP * 64).astype(np.uint16), True),
    "8 bits in 32": ("a.tif", RAMP.astype(np.int32), True),
    "all black in 16": ("a.png", np.zeros((64, 64), np.uint16), True),
    "16 bits in 16": ("a.png", (RAMP * 257).astype(np.uint16), False),
    "8 bits in 8": ("a.png", RAMP.astype(np.uint8), False),
}


@pytest.mark.parametrize("kind", DARK)
def test_sixteen_bit_files_that_do_not_use_their_range_are_noted(kind, tmp_path):
    name, values, dark = DARK[kind]
    images = data.load_images(write(tmp_path / name, values), (32, 32))
    assert any("1 of 1 images are dark" in note for note in images.notes) == dark


def deep_png(path, values):
    """Write a PNG of 16 bits a channel, which Pillow reads and cannot write."""
    kind = {2: 4, 3: 2, 4: 6}[values.shape[2]]  # grey with alpha, colour, colour with alpha
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in parts
        )
    )
    return path


@pytest.mark.parametrize("bits", [12, 14, 16])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_colours_that_do_not_use_their_range_are_noted(channels, bits, tmp_path):
    values = np.repeat((RAMP[..., None] * 257) >> (16 - bits), channels, axis=2)
    if channels != 3:
        values[..., -1] = 65535  # alpha, of which nothing is said
    images = data.load_images(deep_png(tmp_path / "a.png", values), (32, 32))
    assert any("1 of 1 images are dark" in note for note in images.notes) == (bits < 16)


SUFFIXES = {
    ".jfif": "JPEG", ".jpe": "JPEG", ".JPG": "JPEG", ".avif": "AVIF", ".j2k": "JPEG2000",
    ".jp2": "JPEG2000", ".dib": "DIB", ".apng": "PNG",
}  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_gives_every_file_that_is_read_when_named(suffix, tmp_path):
    Image.init()
    if SUFFIXES[suffix] not in Image.SAVE:
        pytest.skip("this Pillow does not write the format")
    file = tmp_path / f"picture{suffix}"
    picture = Image.fromarray(np.tile(RAMP.astype(np.uint8)[..., None], (1, 1, 3)))
    picture.save(file, format=SUFFIXES[suffix])
    named, folder = (data.load_images(p, (32, 32)) for p in (file, tmp_path))
    assert torch.equal(named.pixels, folder.pixels) and folder.notes == ()


def test_a_folder_says_how_many_files_it_skipped(tmp_path):
    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.png", RAMP.astype(np.uint8))
        (tmp_path / folder / "a.heic").write_bytes(b"")
    (tmp_path / "labels.csv").write_text("")
    (tmp_path / "README").write_text("")
    (tmp_path / ".DS_Store").write_text("")
    (note,) = data.load_images(tmp_path, (32, 32), classes=2).notes
    assert note == f"4 files in {tmp_path} were skipped (.csv, .heic, no suffix)"
