"""metrics.csv: one row a step, whole at every moment, continued by a resumed run."""

from pathlib import Path

import pytest

from mrgen.errors import UserError
from mrgen.files import read_metrics
from mrgen.launch.csv_logger import CsvLogger


@pytest.fixture
def logger(tmp_path: Path) -> CsvLogger:
    return CsvLogger(tmp_path / "metrics.csv")


def test_one_row_a_step_with_epoch_and_step_first(logger: CsvLogger):
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, step=0)
    logger.log_metrics({"val/loss": 1.5, "epoch": 0}, step=0)
    logger.log_metrics({"train/loss": 1.0, "epoch": 1.0}, step=4)
    logger.save()
    assert logger.path.read_text().splitlines() == [
        "epoch,step,train/loss,val/loss",
        "0,0,2.0,1.5",
        "1,4,1.0,",
    ]
    assert read_metrics(logger.path)[1] == {"epoch": "1", "step": "4", "train/loss": "1.0", "val/loss": ""}


def test_numbers_are_written_exactly(logger: CsvLogger):
    logger.log_metrics({"x": 0.1 + 0.2, "y": 1e-300}, step=0)
    logger.save()
    (row,) = read_metrics(logger.path)
    assert (float(row["x"]), float(row["y"])) == (0.1 + 0.2, 1e-300)


def test_a_later_logger_continues_the_file(logger: CsvLogger):
    logger.log_metrics({"loss": 2.0}, step=0)
    logger.save()
    later = CsvLogger(logger.path)
    later.log_metrics({"loss": 1.0, "new": 3.0}, step=1)
    later.finalize("success")
    assert [(row["step"], row["loss"], row["new"]) for row in read_metrics(logger.path)] == [
        ("0", "2.0", ""),
        ("1", "1.0", "3.0"),
    ]


def test_rows_after_the_checkpoint_are_forgotten(logger: CsvLogger):
    for step in range(4):
        logger.log_metrics({"loss": float(step)}, step=step)
    logger.save()
    resumed = CsvLogger(logger.path)
    resumed.go_on_from(1)
    resumed.log_metrics({"loss": 20.0}, step=2)
    resumed.save()
    assert [row["loss"] for row in read_metrics(logger.path)] == ["0.0", "1.0", "20.0"]


def test_nothing_logged_writes_nothing_and_no_partial_file_stays(logger: CsvLogger):
    logger.save()
    assert not logger.path.exists()
    assert read_metrics(logger.path) == []
    logger.log_metrics({"loss": 1.0})
    logger.save()
    assert [path.name for path in logger.path.parent.iterdir()] == ["metrics.csv"]


def test_a_reader_never_sees_half_a_file(logger: CsvLogger, monkeypatch: pytest.MonkeyPatch):
    """The new file takes the old one's place in one step; killed before that, the old one is whole."""
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    before = logger.path.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mrgen.files.os.replace", killed)
    logger.log_metrics({"loss": 2.0}, step=1)
    with pytest.raises(KeyboardInterrupt):
        logger.save()
    assert logger.path.read_text() == before


@pytest.mark.parametrize(
    "content",
    [
        b"epoch,step,loss\n0,x,1\n",
        b"epoch,step,loss\n0,1,one\n",
        b"epoch,step,loss\n0,1\n",
        b"epoch,step,loss\n0,1,2,3\n",
        b"epoch,loss\n0,1\n",
        b"epoch,step,step\n0,1,2\n",
        b"epoch,step,loss\n0,1,\x00\n",
        b"epoch,step,loss\n0,1,\xe9\n",
        b"epoch,step,loss\n0,1," + b"9" * 200_000 + b"\n",
        "epoch,step,loss\n0,1,2\n".encode("utf-16"),
    ],
)
def test_a_damaged_file_is_one_sentence_and_stays(tmp_path: Path, content: bytes):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.csv: .*expected epochs, steps and metrics.*; put back a copy"):
        CsvLogger(path)
    assert path.read_bytes() == content


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path):
    """It may be a part of a number: 0.12 of 0.123."""
    (tmp_path / "metrics.csv").write_text("epoch,step,loss\n0,1,0.5\n0,2,0.12")
    assert read_metrics(tmp_path / "metrics.csv") == [{"epoch": "0", "step": "1", "loss": "0.5"}]
    (tmp_path / "metrics.csv").write_text("epoch,step,loss\n")
    assert read_metrics(tmp_path / "metrics.csv") == []
