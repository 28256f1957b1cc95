"""What is no file is refused at once, and nothing is read beyond what a header claims."""

import os
import socket
import threading
from pathlib import Path

import pytest
from raw_scans import scan, write_mha, write_nifti

from mrgen.data.image_file import beside, check_size, opened
from mrgen.data.reading import BadFileError, read_volume


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.mha", "scan.nrrd"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "zero", "socket", "gone", "empty", "loop"])
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        socket.socket(socket.AF_UNIX).bind(name)
    elif kind == "empty":
        path.touch()
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(BadFileError, match=r"found (a folder|a pipe or a device|an empty file)|cannot be read \("):
        read_volume(path)


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "link.nii").symlink_to(write_nifti(tmp_path / "scan.nii", scan()))
    assert read_volume(tmp_path / "link.nii").array.shape == scan().shape


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", scan())

    def read_slowly():
        with opened(path) as file:
            file.read(100)
            with open(path, "ab") as other:
                other.write(b"more")

    with pytest.raises(BadFileError, match="found a file that changed while it was read"):
        read_slowly()


def test_a_pipe_that_somebody_writes_to_is_refused_too(tmp_path):
    os.mkfifo(tmp_path / "scan.nii")
    writer = threading.Thread(target=lambda: os.close(os.open(tmp_path / "scan.nii", os.O_WRONLY)), daemon=True)
    writer.start()
    with pytest.raises(BadFileError, match="found a pipe or a device"):
        read_volume(tmp_path / "scan.nii")


@pytest.mark.parametrize("name", ["../x.raw", "/dev/zero", "", "..", "sub/x.raw", "LIST", "LIST 2", "x%03d.raw 1 5 1"])
def test_voxels_lie_beside_their_header_in_one_file(name):
    with pytest.raises(BadFileError, match="found voxels in"):
        beside(Path("/raw/scan.mhd"), name)
    assert beside(Path("/raw/scan.mhd"), "./scan.raw") == Path("/raw/scan.raw")
    assert beside(Path("/raw/scan.mhd"), "my scan.raw") == Path("/raw/my scan.raw")


def test_a_size_is_judged_without_overflow():
    check_size((240, 240, 155), 240 * 240 * 155 * 2)
    for shape in ((2**62, 4, 1), (2**31, 2**31, 2**31)):  # their products are 0 in 64 bits
        with pytest.raises(BadFileError, match="expected 536,870,912 or fewer"):
            check_size(shape, 0)


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = write_mha(tmp_path / "scan.mha", scan())

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mrgen.data.image_file.os.open", denied)
    with pytest.raises(BadFileError, match=r"cannot be read \(Permission denied\), expected an image"):
        read_volume(path)
