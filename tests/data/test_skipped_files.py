"""A folder of images counts what it leaves out, whatever that is."""

import numpy as np
import pytest
from PIL import Image

from vitguard import data
from vitguard.errors import InputError

PICTURE = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))

LEFT_OUT = {
    "a text": ("notes.txt", ".txt"),
    "a film": ("film.mp4", ".mp4"),
    "raw camera data": ("a.CR2", ".cr2"),
    "an array": ("a.npy", ".npy"),
    "an archive": ("a.tar.gz", ".gz"),
    "no suffix": ("README", "no suffix"),
    "medical": ("scan.dcm", ".dcm"),
    "in a class folder": ("0/labels.csv", ".csv"),
}


@pytest.mark.parametrize("inside", ["", "0"])
def test_a_link_to_nothing_is_told_and_not_passed_over(tmp_path, inside):
    root, away = tmp_path / "root", tmp_path / "moved.png"
    folder = root / inside
    folder.mkdir(parents=True)
    PICTURE.save(folder / "a.png")
    (folder / "b.png").symlink_to(away)
    with pytest.raises(InputError, match=r"1 link to nothing, such as b\.png"):
        data.load_images(root, (8, 8))
    PICTURE.save(away)
    assert len(data.load_images(root, (8, 8))) == 2


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_file_that_is_no_image_is_counted_with_its_suffix(kind, tmp_path):
    name, suffix = LEFT_OUT[kind]
    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
        PICTURE.save(tmp_path / folder / "a.png")
    (tmp_path / name).write_bytes(b"x")
    images = data.load_images(tmp_path, (32, 32), classes=2)
    assert len(images.pixels) == 2
    (note,) = images.notes
    assert note == f"1 file in {tmp_path} was skipped ({suffix})"


@pytest.mark.parametrize("name", [".DS_Store", ".a.png", "0/.hidden", "1/.gitkeep", ".nomedia"])
def test_hidden_files_are_no_images_and_need_no_note(name, tmp_path):
    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
        PICTURE.save(tmp_path / folder / "a.png")
    (tmp_path / name).write_bytes(b"x")
    images = data.load_images(tmp_path, (32, 32), classes=2)
    assert len(images.pixels) == 2 and images.notes == ()


def test_a_folder_without_any_image_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="image"):
        data.load_images(tmp_path, (32, 32))
