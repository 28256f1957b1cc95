"""Checkpoints, status and metrics on a disk that is full: a sentence, and what was there before stays whole."""

import errno
import io
import os
import re
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from mrgen.callbacks.provenance import KEY
from mrgen.errors import UserError
from mrgen.files import read_metrics, remove_leftovers, replacing, write_json
from mrgen.launch.checkpoints import WholeCheckpoints, read_checkpoint
from mrgen.launch.csv_logger import CsvLogger
from mrgen.launch.status import read_status, recorded
from tests.launch.tools import tiny_run

LIMIT = 4000  # bytes of a file


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As where a disk fills up in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def content(size: int) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.arange(size)}, "epoch": size}


def save_checkpoint(path: Path, size: int) -> None:
    WholeCheckpoints().save_checkpoint(content(size), path)


def save_json(path: Path, size: int) -> None:
    write_json(path, list(range(size)))


def save_metrics(path: Path, size: int) -> None:
    logger = CsvLogger(path)
    for step in range(size):
        logger.log_metrics({"loss": 0.0}, step)
    logger.save()


@pytest.mark.parametrize("save", [save_checkpoint, save_json, save_metrics])
def test_a_full_disk_is_one_sentence_and_what_was_there_stays(save: Callable[[Path, int], None], tmp_path: Path):
    path = tmp_path / "folder" / "file"
    save(path, 10)
    before = path.read_bytes()
    assert 0 < len(before) < LIMIT
    with no_file_above(LIMIT), pytest.raises(UserError, match=r"file: cannot be written \(File too large\); what was"):
        save(path, LIMIT)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    save(path, LIMIT)
    assert len(path.read_bytes()) > LIMIT


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_room_and_a_share_that_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def full(content: Any, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise RuntimeError("unexpected pos 768 vs 662") from OSError(number, os.strerror(number))  # as torch has it

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=os.strerror(number)):
        save_checkpoint(tmp_path / "last.ckpt", 1)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path):
    with pytest.raises(PermissionError), replacing(tmp_path / "x.json"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(RuntimeError, match="a bug"), replacing(tmp_path / "x.json"):
        raise RuntimeError("a bug")
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_is_what_lightning_loads(tmp_path: Path):
    io = WholeCheckpoints()
    path = tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint(content(5), path)
    loaded = io.load_checkpoint(path, weights_only=True)
    assert torch.equal(loaded["state_dict"]["weight"], torch.arange(5))
    io.remove_checkpoint(path)
    assert not path.exists()


def test_no_folder_is_removed_as_a_checkpoint(tmp_path: Path):
    """Whatever a checkpoint says of the one before it: Lightning's own would remove all that is in there."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "precious").write_text("here")
    WholeCheckpoints().remove_checkpoint(tmp_path / "run" / "checkpoints" / "..")
    assert (tmp_path / "run" / "precious").read_text() == "here"


def test_a_checkpoint_is_written_where_it_will_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not in the system's folder of temporary files, from where it would be copied, bit by bit, to another disk."""
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    during: list[list[str]] = []
    replace = os.replace

    def noted(source: Path, target: Path) -> None:
        during.append([*sorted(path.name for path in target.parent.iterdir()), *(p.name for p in elsewhere.iterdir())])
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    save_checkpoint(tmp_path / "run" / "last.ckpt", 1)
    assert [len(names) for names in during] == [1]
    assert re.fullmatch(r"\.last\.ckpt\.[0-9a-f]+", during[0][0])


def test_a_training_on_a_full_disk_ends_with_the_checkpoint_of_before(
    tmp_path: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch, last_words: list[Callable]
):
    save = torch.save

    def full(content: dict[str, Any], file: io.BufferedWriter) -> None:
        save(content, file)
        if content["epoch"] == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mrgen.launch.checkpoints.torch.save", full)
    run_dir = tmp_path / "run"
    with pytest.raises(UserError, match=r"\w+\.ckpt: cannot be written \(No space left on device\)"):
        tiny_run(run_dir, phantom_store, "trainer.max_epochs=2", "data.steps_per_epoch=1")
    status = read_status(run_dir)
    assert status["state"] == "failed"
    assert "No space left on device" in status["reason"]
    assert torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert len({row["step"] for row in read_metrics(run_dir / "metrics.csv")}) >= 1


def test_a_status_that_cannot_be_written_does_not_hide_what_a_run_failed_for(
    tmp_path: Path, last_words: list[Callable], monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, content: Any) -> None:
        if content["state"] == "failed":
            raise UserError("no room")

    monkeypatch.setattr("mrgen.launch.status.write_json", full)
    with pytest.raises(UserError, match="the store is gone"), recorded(tmp_path, command="mrgen-train"):
        raise UserError("the store is gone")


def test_what_killed_processes_were_writing_is_removed_and_nothing_else(tmp_path: Path):
    left = [".status.json.123", ".metrics.csv.7", ".last.ckpt.99", ".config.yaml.4", ".split.json.0af3"]
    others = [".hydra", ".gitignore", "status.json", "status.json.123", ".submitit", ".notes.json", ".x.doc.12"]
    for name in (*left, *others):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, tmp_path / "not there")
    assert {path.name for path in tmp_path.iterdir()} == set(others)


# ----- reading -------------------------------------------------------------------------------------------------------


def described(**changes: Any) -> dict[str, Any]:
    """What a checkpoint says of itself, its data with changes."""
    data = {"modalities": ["t1"], "normalisation": {"_target_": "mrgen.data.normalisation.ZScore"}}
    return {"model": {"_target_": "mrgen.X"}, "data": {**data, **changes}}


def trained(path: Path, **changes: Any) -> Path:
    content = {KEY: described(), "state_dict": {"weight": torch.arange(64.0)}}
    torch.save({**content, **changes}, path)
    return path


def test_what_is_read_is_what_was_written_whatever_bit_is_another(tmp_path: Path):
    """Of all bits: of the weights, of the archive's directory, and of what nobody reads."""
    path = trained(tmp_path / "x.ckpt")
    whole, content = path.read_bytes(), read_checkpoint(path, remedy="train anew")
    refused, bits = 0, range(0, 8 * len(whole), 5)
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path, remedy="train anew")
        except UserError:
            refused += 1
        else:
            assert read[KEY] == content[KEY]
            assert torch.equal(read["state_dict"]["weight"], content["state_dict"]["weight"])
    assert refused > len(bits) / 4  # the rest is padding, and copies of what the directory says


def test_a_part_that_is_called_a_folder_is_refused(tmp_path: Path):
    """torch reads none of it, and gives what was in memory: the directory's one bit that says so has no sum."""
    path = trained(tmp_path / "x.ckpt")
    content = bytearray(path.read_bytes())
    with ZipFile(path) as archive:
        place = archive.start_dir
    while content[place : place + 4] == b"PK\x01\x02":
        name, extra, comment = struct.unpack_from("<HHH", content, place + 28)
        if content[place + 46 : place + 46 + name].endswith(b"data/0"):
            content[place + 38] |= 0x10
        place += 46 + name + extra + comment
    path.write_bytes(content)
    with pytest.raises(UserError, match="BadZipFile"):
        read_checkpoint(path, remedy="train anew")


def repacked(path: Path) -> None:
    with ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        *(
            (lambda path, box=box: trained(path, **{KEY: described(box=box)}), r"data\.box is")
            for box in ([1, 2], [-8, -8, -8], [8, 8, 0], [10**6] * 3, [8, 8, 8.0], [True, 8, 8])
        ),
        *(
            (lambda path, pair=pair: trained(path, **{KEY: described(intensity_scale={"t1": pair})}), "intensity_scale")
            for pair in (
                [torch.nan, 1],
                [0, torch.inf],
                [5, 0],
                [5, -1],
                [10**400, 1],
                [1],
                [1, 2, 3],
                {},
                "ab",
                [0, True],
            )
        ),
        (repacked, "BadZipFile"),  # of a few bytes any number can be unpacked
        (piped, "a pipe or a device"),  # for which it would wait
        (lambda path: trained(path, state_dict={"weight": torch.tensor([1, torch.nan])}), "weight holds .* not finite"),
        (lambda path: trained(path, state_dict={"weight": torch.zeros(1).expand(2**40)}), "fewer numbers than that"),
        (lambda path: trained(path, state_dict={"weight": 3}), "no mapping of names to weights"),
        (lambda path: trained(path, state_dict=[]), "no mapping of names to weights"),
        (lambda path: trained(path, **{KEY: {"model": {}, "data": {}}}), "model is no mapping with a _target_"),
        (lambda path: trained(path, **{KEY: 3}), "model is no mapping"),
        (lambda path: trained(path, **{KEY: {"model": {"_target_": "x"}, "data": {}}}), "data has no modalities"),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path, spoil: Callable[[Path], Any], said: str):
    spoil(trained(tmp_path / "x.ckpt"))
    with pytest.raises(UserError, match=rf"x\.ckpt: .*{said}"):
        read_checkpoint(tmp_path / "x.ckpt", remedy="train anew")
