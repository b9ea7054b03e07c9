"""Writing so that no power cut leaves half a file, and no process takes the place of another."""

import os
import stat

import pytest

from vitguard.errors import InputError
from vitguard.files import check_writable, parsed_json, write_atomically


def test_a_file_and_its_folder_are_flushed_before_and_after_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def flush(handle):
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("name") or replace(a, b))
    write_atomically(tmp_path / "a", b"content")
    assert done == ["file", "name", "folder"]
    assert (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_private_file_is_its_owner_s_alone_from_the_first_byte_on(
    tmp_path, monkeypatch, private, overwrite
):
    modes = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda h: modes.append(stat.S_IMODE(os.fstat(h).st_mode)) or fsync(h)
    )
    write_atomically(tmp_path / "a", "content", private=private, overwrite=overwrite)
    assert modes[0] == 0o600
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == (0o600 if private else 0o644)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_there_is_never_replaced_without_overwrite(tmp_path, monkeypatch, links):
    """Also on file systems without hard links, and where a link to nowhere stands."""
    if not links:

        def refuse(*arguments):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    write_atomically(tmp_path / "new", "mine", overwrite=False)
    assert (tmp_path / "new").read_text() == "mine"
    (tmp_path / "old").write_text("theirs")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for name in ("new", "old", "nowhere"):
        with pytest.raises(InputError, match="which is there already"):
            write_atomically(tmp_path / name, "other", overwrite=False)
    assert (tmp_path / "old").read_text() == "theirs" and not (tmp_path / "missing").exists()
    assert sorted(os.listdir(tmp_path)) == ["new", "nowhere", "old"]


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen", "chmod"])
def test_a_write_that_fails_is_a_clear_error_and_leaves_what_was_there(tmp_path, monkeypatch, call):
    (tmp_path / "a").write_text("before")

    def refuse(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(InputError, match="No space left"):
            write_atomically(tmp_path / "a", "after")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


def test_paths_that_cannot_be_written_are_clear_errors(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(InputError):
            write_atomically(path, "content")
    assert check_writable(tmp_path / "a") == tmp_path / "a" and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        "NaN",
        "[-Infinity]",
        "[1e400]",
        "1" * 5000,
        "",
        b"\xff",
        "{",
    ],
)
def test_every_fault_of_json_is_one_kind_of_error(text):
    with pytest.raises(ValueError):
        parsed_json(text)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("private", [True, False])
def test_what_is_no_file_is_never_replaced_by_one(tmp_path, private, overwrite):
    """A device such as /dev/null would be gone for the whole machine; nobody may read a pipe."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match=r"no file|is there already"):
            write_atomically(tmp_path / name, "content", private=private, overwrite=overwrite)
        with pytest.raises(InputError, match="no file"):
            check_writable(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_report_is_written_where_its_link_points(tmp_path):
    """Else whoever reads the file itself reads an older report."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "5").write_text("old")
    (tmp_path / "latest").symlink_to("runs/5")
    (tmp_path / "next").symlink_to("runs/6")
    for name in ("latest", "next"):
        write_atomically(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == "new"
    assert sorted(os.listdir(tmp_path / "runs")) == ["5", "6"]
    (tmp_path / "gone").symlink_to("missing/7")
    with pytest.raises(InputError, match="gone"):
        check_writable(tmp_path / "gone")


def test_secrets_do_not_follow_a_link(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "key").symlink_to("theirs")
    write_atomically(tmp_path / "key", "secret", private=True)
    assert (tmp_path / "theirs").read_text() == "theirs" and not (tmp_path / "key").is_symlink()
