"""Images in every form people have them, and one clear line for each that cannot be used."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitguard import data, metrics
from vitguard.audit.scale import uninformed
from vitguard.errors import InputError


def gradient(height=20, width=30):
    """An RGB picture in which every pixel differs: red grows downwards, green to the right."""
    rows, columns = np.mgrid[:height, :width]
    blue = np.full_like(rows, 40)
    return np.stack([rows * 8, columns * 8, blue], -1).astype(np.uint8)


def save(path, array=None, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(gradient() if array is None else array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_sample_photos_are_the_seven_in_the_wheel():
    photos = data.sample_photos()
    assert list(photos) == list(data.SAMPLE_NAMES) == [
        "astronaut", "chelsea", "coffee", "retina", "rocket", "hubble_deep_field", "ihc",
    ]  # fmt: skip
    assert all(p.mode == "RGB" and min(p.size) >= 300 for p in photos.values())


@pytest.mark.slow
def test_sample_photos_and_decoys_need_no_network(monkeypatch):
    def refuse(*_arguments):
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HOME", "/nonexistent")
    assert len(data.sample_photos()) == 7 and len(data.decoys(3, (5, 7))) == 3


@pytest.mark.slow  # a process of its own, which imports torch
def test_sample_photos_need_no_network_and_no_downloader():
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('no network here')\n"
        "socket.socket.connect = refuse\n"
        "from vitguard import data\n"
        "data.sample_photos(); data.decoys(3, (16, 16))\n"
        "assert 'pooch' not in sys.modules and 'skimage.data' not in sys.modules\n"
    )
    environment = {**os.environ, "HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_sample_images_are_ready_for_a_model():
    images = data.sample_images((32, 48), count=3, classes=2)
    assert images.names == ("astronaut", "chelsea", "coffee")
    assert images.pixels.shape == (3, 3, 32, 48)
    assert images.pixels.dtype == torch.float32
    assert 0 <= float(images.pixels.min()) < float(images.pixels.max()) <= 1
    assert images.labels.tolist() == [0, 1, 0]
    assert "modulo 2" in images.notes[0]
    assert len(data.sample_images((8, 8))) == 7
    with pytest.raises(InputError, match="1 to 7 images, got count=8"):
        data.sample_images((8, 8), count=8)


def test_same_size_is_kept_bit_for_bit(tmp_path):
    loaded = data.load_images(save(tmp_path / "a.png"), (20, 30))
    pixels = loaded.pixels[0].permute(1, 2, 0).mul(255).round().numpy()
    assert np.array_equal(pixels, gradient())
    assert loaded.names == ("a",) and loaded.labels is None and loaded.notes == ()


def test_short_side_is_scaled_and_the_centre_cut_out(tmp_path):
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, 20:40] = 255
    path = save(tmp_path / "wide.png", array)
    assert float(data.load_images(path, (20, 20)).pixels.min()) == 1.0
    assert float(data.load_images(path, (10, 8)).pixels.min()) > 0.99
    tall = save(tmp_path / "tall.png", array.transpose(1, 0, 2))
    assert float(data.load_images(tall, (20, 20)).pixels.min()) == 1.0


def test_scaling_down_is_antialiased(tmp_path):
    checks = (np.indices((64, 64)).sum(0) % 2)[..., None] * np.full(3, 255)
    loaded = data.load_images(save(tmp_path / "c.png", checks.astype(np.uint8)), (8, 8))
    assert float((loaded.pixels - 0.5).abs().max()) < 0.03


def test_enlarged_images_are_noted(tmp_path):
    save(tmp_path / "a.png")
    loaded = data.load_images(tmp_path, (40, 40))
    assert loaded.pixels.shape == (1, 3, 40, 40)
    assert "1 of 1 images were enlarged to 40 x 40" in loaded.notes


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tiff" if mode == "CMYK" else "png"
    path = save(tmp_path / f"a.{suffix}", mode=mode)
    with Image.open(path) as image:
        assert image.mode == mode
        reference = np.array(image.convert("RGB")) / 255
    loaded = data.load_images(path, (20, 30)).pixels[0].permute(1, 2, 0).numpy()
    assert np.abs(loaded - reference).max() < 1e-6


def test_palette_with_transparency_keeps_its_colours(tmp_path):
    image = Image.fromarray(gradient()).convert("P")
    image.save(tmp_path / "p.png", transparency=bytes([0] * 256))
    loaded = data.load_images(tmp_path / "p.png", (20, 30)).pixels[0].permute(1, 2, 0).numpy()
    assert np.abs(loaded - np.array(image.convert("RGB")) / 255).max() < 1e-6


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    for suffix in ("png", "tiff"):
        loaded = data.load_images(save(tmp_path / f"deep.{suffix}", values), (20, 30)).pixels[0]
        assert np.abs(loaded[1].numpy() - values / 65535).max() < 1 / 255
    deeper = save(tmp_path / "deeper.tiff", values.astype(np.int32) * 4)
    with pytest.raises(InputError, match="8 nor 16 bits"):
        data.load_images(deeper, (20, 30))
    with pytest.raises(InputError, match="8 nor 16 bits"):
        data.load_images(save(tmp_path / "f.tiff", values.astype(np.float32)), (20, 30))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = gradient(24, 24)
    # What a camera stores for each orientation, so that showing it undoes the turn.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "turned.png", np.ascontiguousarray(stored), exif=exif)
    loaded = data.load_images(path, (24, 24)).pixels[0].permute(1, 2, 0).mul(255).round().numpy()
    assert np.array_equal(loaded, upright)


def test_a_folder_is_sorted_and_other_files_are_passed_over(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp", ".hidden.png"):
        save(tmp_path / name)
    (tmp_path / "README.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    assert data.load_images(tmp_path, (8, 8)).names == ("a", "b", "c")
    assert data.load_images(tmp_path, (8, 8), count=2).names == ("a", "b")


def test_counting_reads_no_pixel(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    assert data.count_images(tmp_path) == data.count_images([tmp_path]) == 2
    with pytest.raises(InputError, match="does not exist"):
        data.count_images(tmp_path / "nowhere")


def test_files_keep_their_order_and_names_stay_distinct(tmp_path):
    one, two = save(tmp_path / "x" / "a.png"), save(tmp_path / "y" / "a.png")
    loaded = data.load_images([str(two), one, two.parent], (8, 8), classes=2)
    assert loaded.names == ("a", "a (2)", "a (3)")
    assert loaded.labels.tolist() == [0, 1, 0]


def test_numeric_class_folders_are_the_class_index(tmp_path):
    for folder in ("10", "2", "007"):
        save(tmp_path / folder / "a.png")
    loaded = data.load_images(tmp_path, (8, 8), classes=11)
    assert dict(zip(loaded.names, loaded.labels.tolist(), strict=True)) == {
        "007/a": 7, "10/a": 10, "2/a": 2,
    }  # fmt: skip
    assert loaded.labels.dtype == torch.int64 and loaded.notes == ()


def test_named_class_folders_are_numbered_in_sorted_order(tmp_path):
    for folder in ("dog", "cat", "3"):
        save(tmp_path / folder / "a.png")
    (tmp_path / "cow").mkdir()  # a class without images keeps its number
    loaded = data.load_images(tmp_path, (8, 8))
    assert loaded.names == ("3/a", "cat/a", "dog/a")
    assert loaded.labels.tolist() == [0, 1, 3]


def test_a_class_out_of_range_names_its_folder(tmp_path):
    save(tmp_path / "12" / "a.png")
    with pytest.raises(InputError, match=r"class folders from 0 to 9, got class 12 in .*12\."):
        data.load_images(tmp_path, (8, 8), classes=10)
    named = tmp_path / "named"
    for folder in "abc":
        save(named / folder / "x.png")
    with pytest.raises(InputError, match=r"class 2 in .*c"):
        data.load_images(named, (8, 8), classes=2)


def truncated(path):
    save(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def written(content):
    return lambda path: path.write_bytes(content)


def too_small(path):
    save(path, gradient(3, 30))


BAD = {
    "missing": (lambda path: None, "which does not exist"),
    "empty": (written(b""), "an image file"),
    "text": (written(b"hello"), "which is not one"),
    "header only": (written(b"\x89PNG\r\n\x1a\n"), "image file"),
    "broken png": (
        written(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + b"\xff" * 40),
        "image file",
    ),
    "truncated": (truncated, "readable image file"),
    "small": (too_small, "at least 4 x 4 pixels, one patch, got 3 x 30"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff", ".webp", ".bmp"])
def test_an_unusable_file_is_one_clear_line_that_names_it(tmp_path, case, suffix):
    make, message = BAD[case]
    path = tmp_path / f"photo{suffix}"
    make(path)
    with pytest.raises(InputError, match=message) as caught:
        data.load_images(path, (8, 8), min_size=(4, 4))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"a folder with images, got .* without any"):
        data.load_images(tmp_path, (8, 8))
    with pytest.raises(InputError, match="at least one image"):
        data.load_images([], (8, 8))
    save(tmp_path / "a.png")
    save(tmp_path / "class" / "b.png")
    with pytest.raises(InputError, match="either images or class folders"):
        data.load_images(tmp_path, (8, 8))
    with pytest.raises(InputError, match="labels for all images or for none"):
        save(tmp_path / "t" / "0" / "b.png")
        data.load_images([tmp_path / "a.png", tmp_path / "t"], (8, 8))


def test_a_broken_image_beyond_count_is_not_read(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    assert len(data.load_images(tmp_path, (8, 8), count=1)) == 1
    with pytest.raises(InputError, match=r"b\.png"):
        data.load_images(tmp_path, (8, 8))


@pytest.mark.parametrize("count", [0, -1, 2])
def test_count_outside_what_there_is(tmp_path, count):
    save(tmp_path / "a.png")
    with pytest.raises(InputError, match=f"1 to 1 images, got count={count}"):
        data.load_images(tmp_path, (8, 8), count=count)


def test_labels():
    assert data.assign_labels(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert data.check_labels(torch.tensor([0, 9], dtype=torch.int32), 10).dtype == torch.int64
    for bad in (10, -1):
        with pytest.raises(InputError, match=f"labels from 0 to 9, got {bad}"):
            data.check_labels(torch.tensor([0, bad]), 10)
    with pytest.raises(InputError, match="class indices"):
        data.check_labels(torch.tensor([0.5]), 10)
    with pytest.raises(InputError, match="class"):
        data.assign_labels(3, 0)


def correlations(a, b):
    a, b = (x.double().flatten(1) for x in (a, b))
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (48, 16)])
def test_a_hundred_decoys_without_duplicates(size):
    found = data.decoys(100, size, ["astronaut"])
    assert found.shape == (100, 3, *size) and found.dtype == torch.float32
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert len({image.numpy().tobytes() for image in found}) == 100


@pytest.mark.slow
def test_decoys_depend_on_the_seed_alone():
    assert torch.equal(data.decoys(5, (16, 16), seed=3), data.decoys(5, (16, 16), seed=3))
    assert not torch.equal(data.decoys(5, (16, 16), seed=3), data.decoys(5, (16, 16), seed=4))


@pytest.mark.slow
def test_no_decoy_is_taken_from_an_excluded_photo():
    names = ["astronaut", "retina", "a file of the user"]
    every = data.decoys(25 * 14, (16, 16)).unflatten(0, (25, 14))
    kept = [i for i in range(14) if i not in (0, data.SAMPLE_NAMES.index("retina"))]
    assert torch.equal(data.decoys(25 * 12, (16, 16), names), every[:, kept].flatten(0, 1))
    data.decoys(3, (16, 16)).zero_()  # nobody's decoys are another's
    assert torch.equal(data.decoys(25 * 14, (16, 16)), every.flatten(0, 1))


@pytest.mark.parametrize("grey", [False, True])
def test_a_photo_that_is_a_truth_under_another_name_is_left_out(grey):
    size = (32, 32)
    truth = data.sample_images(size).pixels[3:4]
    truth = truth.mean(1, keepdim=True).expand_as(truth) if grey else truth
    named = data.decoys(60, size, ["retina"], seed=1)
    unnamed = data.decoys(60, size, seed=1, truth=truth)
    assert torch.equal(named, unnamed)
    assert float(correlations(unnamed, truth).max()) < 0.9


@pytest.mark.slow
def test_extra_images_come_first_but_never_a_truth():
    extra = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    found = data.decoys(6, (40, 40), extra=extra)
    assert float((found[:4] - extra).abs().max()) <= 0.5 / 255 + 1e-6
    found = data.decoys(6, (40, 40), extra=extra, truth=extra[2:3])
    assert float(correlations(found, extra[2:3]).max()) < 0.9
    assert float((found[2] - extra[3]).abs().max()) <= 0.5 / 255 + 1e-6


def test_truths_are_identified_among_decoys_and_mirror_images_are_not_the_truth():
    images = data.sample_images((32, 32))
    found = data.decoys(100, (32, 32), images.names, truth=images.pixels)
    assert metrics.identification(images.pixels, images.pixels, found).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 8), (24, 24)])
def test_smooth_guesses_without_information_are_rarely_nearest(size):
    images = data.sample_images(size)
    generator = torch.Generator().manual_seed(0)
    rate = []
    for i, name in enumerate(images.names):
        found = data.decoys(100, size, [name], seed=i)
        for _ in range(30):
            coarse = torch.rand(1, 3, 4, 4, generator=generator)
            guess = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
            truth, nulls = images.pixels[i : i + 1], uninformed(found, i)
            rate.append(metrics.identification(guess.clamp(0, 1), truth, found, nulls))
    # Among equals chance is 1 %, and such guesses are among those that it is calibrated on.
    assert float(torch.cat(rate).double().mean()) < 0.02


def test_decoys_refuse_what_makes_no_sense():
    with pytest.raises(InputError, match="count=0"):
        data.decoys(0, (8, 8))
    with pytest.raises(InputError, match="size"):
        data.decoys(1, (0, 8))
    with pytest.raises(InputError, match="truth of shape"):
        data.decoys(1, (8, 8), truth=torch.rand(1, 3, 9, 9))


def test_mean_image():
    images = torch.rand(4, 3, 5, 5)
    assert torch.equal(data.mean_image(images), images.mean(0))
    with pytest.raises(InputError, match="batch"):
        data.mean_image(images[0])


def test_image_set_counts_must_agree():
    with pytest.raises(InputError, match="2 names"):
        data.ImageSet(("a",), torch.rand(2, 3, 4, 4))
    with pytest.raises(InputError, match="1 labels"):
        data.ImageSet(("a",), torch.rand(1, 3, 4, 4), torch.tensor([1, 2]))


@pytest.mark.skipif("VITGUARD_DATA" not in os.environ, reason="VITGUARD_DATA is not set")
def test_a_folder_of_real_photos():
    folder = Path(os.environ["VITGUARD_DATA"]) / "medical"
    loaded = data.load_images(folder, (32, 32), min_size=(16, 16), classes=10)
    assert len(loaded) == 18 and loaded.names[-1] == "skimage_retina"
    # The retina and the histology image are scikit-image's own, under other names.
    found = data.decoys(100, (32, 32), loaded.names, truth=loaded.pixels)
    assert float(correlations(found, loaded.pixels[-2:]).max()) < 0.9
