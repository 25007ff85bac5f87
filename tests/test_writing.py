"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from file_helpers import SUFFIXES, refused, sample

import cupy_attn as ca
from cupy_attn import io


def listing(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


FAILURES = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), ca.FileError),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt),
    "a bug": (ZeroDivisionError(), ZeroDivisionError),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, failure, existing):
    raised, expected = FAILURES[failure]
    path = tmp_path / "out.npy"
    if existing:
        path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        file.flush()
        assert len(listing(tmp_path)) == 1 + existing  # what is being written lies beside the old file
        raise raised

    with pytest.raises(expected):
        io.write_whole(path, write)
    assert listing(tmp_path) == ["out.npy"] * existing
    assert not existing or path.read_bytes() == b"old"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_late_leaves_nothing(tmp_path, monkeypatch, suffix, step):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    message = refused(ca.FileError, io.save_arrays, tmp_path / f"out{suffix}", {"x": sample()})
    assert "No space left on device" in message
    assert listing(tmp_path) == []


FULL_DISK = """
import resource, sys, numpy as np
from cupy_attn import io
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # Python ignores SIGXFSZ, so writes fail with EFBIG
try:
    io.save_arrays(sys.argv[1], {"x": np.ones((100, 100), np.float32)})
except io.FileError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_the_system_cuts_short_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout
    assert listing(tmp_path) == [path.name]
    assert path.read_bytes() == b"old"


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    io.save_arrays(tmp_path / "out.npy", {"x": sample()})
    assert (tmp_path / "out.npy").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_places_that_cannot_be_written_are_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npy").mkdir()
    assert "is a folder" in refused(ca.FileError, io.check_output, tmp_path / "folder.npy")
    assert "does not exist" in refused(ca.FileError, io.check_output, tmp_path / "absent" / "x.npy")
    assert "does not exist" in refused(ca.FileError, io.check_output, tmp_path / "file" / "x.npy")
    assert "holds one" in refused(ca.FileError, io.check_output, tmp_path / "x.npy", 2)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not writable" in refused(ca.FileError, io.check_output, tmp_path / "x.npy")
    assert listing(tmp_path) == ["file", "folder.npy"]


def test_a_place_that_turns_out_unwritable_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.npy", tmp_path / ("x" * 300), tmp_path / "absent" / "x.npy"):
        assert path.name in refused(ca.FileError, io.write_whole, path, lambda file: file.write(b"new"))
    assert listing(tmp_path) == ["file"]


# Folders.

OURS = re.compile(r"ours\d")


def fill(path, *names, then=None, **options):
    with io.new_folder(path, **options) as folder:
        for name in names:
            (folder / name).write_text("new")
        if then is not None:
            raise then


def test_a_folder_appears_whole(tmp_path):
    with io.new_folder(tmp_path / "deep" / "made") as folder:
        (folder / "a").write_text("new")
        assert not (tmp_path / "deep" / "made").exists()
    assert listing(tmp_path / "deep") == ["made"]
    assert listing(tmp_path / "deep" / "made") == ["a"]
    assert (tmp_path / "deep" / "made").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_no_folder_and_changes_none(tmp_path, failure, there):
    raised, expected = FAILURES[failure]
    path = tmp_path / "made"
    if there:
        path.mkdir()
        (path / "ours1").write_text("old")
    with pytest.raises(expected):
        fill(path, "ours1", replaceable=OURS, then=raised)
    assert listing(tmp_path) == ["made"] * there
    assert not there or ((path / "ours1").read_text(), listing(path)) == ("old", ["ours1"])


def test_a_folder_with_anything_foreign_is_refused(tmp_path):
    (tmp_path / "ours1").write_text("old")
    assert "is not empty" in refused(ca.FileError, fill, tmp_path, "ours1")
    fill(tmp_path, "ours1", "ours2", replaceable=OURS)
    assert listing(tmp_path) == ["ours1", "ours2"]
    (tmp_path / "thesis.tex").write_text("mine")
    assert "thesis.tex" in refused(ca.FileError, fill, tmp_path, "ours1", replaceable=OURS)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert "is a file" in refused(ca.FileError, fill, tmp_path / "thesis.tex", "ours1")


def test_a_replaced_folder_stays_the_same_folder_and_loses_what_is_old(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    (tmp_path / "ours7").write_text("old")
    fill(Path("."), "ours1", replaceable=OURS)
    assert listing(tmp_path) == ["ours1"]
    assert tmp_path.stat().st_ino == inode


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(ca.FileError, fill, tmp_path / "file" / "made", "ours1")
