"""What stands beside class folders shifts no class number in silence."""

import numpy as np
import pytest
from PIL import Image

from vitguard import data
from vitguard.errors import InputError

PICTURE = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))


def folders(path, *names, empty=()):
    for name in names:
        (path / name).mkdir(parents=True)
        PICTURE.save(path / name / "a.png")
    for name in empty:
        (path / name).mkdir(parents=True)
    return path


def loaded(path, classes=20):
    images = data.load_images(path, (32, 32), classes=classes)
    assert data.count_images(path) == len(images)
    return dict(zip(images.names, images.labels.tolist(), strict=True)), images.notes


@pytest.mark.parametrize("stray", ["__MACOSX", ".ipynb_checkpoints", "notes"])
def test_a_stray_folder_leaves_numeric_classes_their_numbers(tmp_path, stray):
    labels, notes = loaded(folders(tmp_path, "3", "10", empty=[stray]))
    assert labels == {"3/a": 3, "10/a": 10}
    told = (f"1 folder in {tmp_path} without an image is passed over (notes)",)
    assert notes == (told if stray == "notes" else ())


@pytest.mark.parametrize("stray", ["__MACOSX", ".cache"])
def test_what_archives_and_tools_leave_is_no_class(tmp_path, stray):
    (tmp_path / stray / "cat").mkdir(parents=True)
    (tmp_path / stray / "cat" / "._a.png").write_bytes(b"x")
    labels, notes = loaded(folders(tmp_path, "a", "z"))
    assert labels == {"a/a": 0, "z/a": 1} and notes == ()


def test_a_class_without_an_image_keeps_its_number_and_a_note_says_so(tmp_path):
    labels, notes = loaded(folders(tmp_path, "cat", "dog", empty=["cow"]))
    assert labels == {"cat/a": 0, "dog/a": 2}
    assert notes == (f"1 folder in {tmp_path} without an image counts as a class (cow)",)
    (tmp_path / "cup").mkdir()
    notes = loaded(tmp_path)[1]
    assert notes == (f"2 folders in {tmp_path} without an image count as classes (cow, cup)",)


def test_names_of_which_some_are_numbers_are_counted_and_a_note_says_so(tmp_path):
    labels, notes = loaded(folders(tmp_path, "7", "10", "cat"))
    assert labels == {"10/a": 0, "7/a": 1, "cat/a": 2}
    (note,) = notes
    assert note == (
        f"class folders of {tmp_path} are counted in sorted order, for not all of their names are "
        "numbers (10 is class 0, 7 is class 1, cat is class 2)"
    )


def test_two_folders_of_one_number_are_no_one_class(tmp_path):
    folders(tmp_path, "1", "001", "2")
    with pytest.raises(InputError, match=r"one folder a class.*001 and 1 for class 1.*Rename"):
        loaded(tmp_path)


def test_an_empty_folder_of_the_same_number_is_no_second_one(tmp_path):
    labels, notes = loaded(folders(tmp_path, "01", "2", empty=["1"]))
    assert labels == {"01/a": 1, "2/a": 2} and notes == ()


def test_several_folders_of_classes_number_them_alike(tmp_path):
    one, two = folders(tmp_path / "one", "cat", "dog"), folders(tmp_path / "two", "cow", "dog")
    with pytest.raises(InputError, match=r"the same class folders.*cow.*numbers"):
        data.load_images([one, two], (32, 32), classes=20)
    with pytest.raises(InputError, match="the same class folders"):
        data.load_images([folders(tmp_path / "three", "0", "5"), two], (32, 32), classes=20)
    images = data.load_images([one, one], (32, 32), classes=20)
    assert images.labels.tolist() == [0, 1, 0, 1]
    numbers = [folders(tmp_path / "a", "0", "7"), folders(tmp_path / "b", "7", "9")]
    images = data.load_images(numbers, (32, 32), classes=20)
    assert images.labels.tolist() == [0, 7, 7, 9]


def test_folders_inside_class_folders_are_told(tmp_path):
    folders(tmp_path, "cat", "dog", "dog/more")
    labels, notes = loaded(tmp_path)
    assert len(labels) == 2
    assert notes == (f"1 folder inside class folders of {tmp_path} was not looked at (dog/more)",)


def test_an_empty_number_out_of_range_is_refused_as_before(tmp_path):
    with pytest.raises(InputError, match="class 99"):
        loaded(folders(tmp_path, "1", empty=["99"]), classes=10)


def test_a_folder_of_nothing_but_leftovers_is_refused(tmp_path):
    with pytest.raises(InputError, match="a folder with images"):
        loaded(folders(tmp_path, "__MACOSX"))
