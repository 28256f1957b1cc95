"""``make demo``, smaller."""

import csv
from pathlib import Path

import pytest

from mrgen.launch import demo as module
from mrgen.launch.status import read_status

RUNS = ["rnet-t1ce", "rnet-t2", "rsnet-t1ce", "rsnet-t2", "snet"]


def test_the_demo_goes_from_an_empty_folder_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    small = {"snet": "model.net={filters: 2, levels: 2}", "rsnet": "model={filters: 2, levels: 2, mc_samples: 2}"}
    monkeypatch.setattr(module, "NARROW", small | {"rnet": small["rsnet"]})
    out_dir = module.demo(tmp_path / "demo", spacing=5, subjects=8, epochs=1)
    assert sorted(path.name for path in (tmp_path / "demo" / "runs").iterdir()) == RUNS
    assert {read_status(tmp_path / "demo" / "runs" / name)["state"] for name in RUNS} == {"finished"}
    with (out_dir / "table.csv").open(newline="") as file:
        table = [(row["synthesised"], row["by"]) for row in csv.DictReader(file)]
    assert table == [("–", "all real"), ("t2", "rsnet"), ("t2", "rnet"), ("t1ce", "rsnet"), ("t1ce", "rnet")]
    assert "SMOKE RUN, not a result" in (out_dir / "table.md").read_text()
    assert (out_dir / "figure.png").is_file()
    assert "SMOKE RUN" in capsys.readouterr().out

    # A second call finds everything there: it trains nothing again, and judges the same runs.
    def trained(*_: object) -> None:
        raise AssertionError("trained again")

    judged: list[list[Path]] = []
    monkeypatch.setattr(module, "train", trained)
    monkeypatch.setattr(module, "evaluate", lambda conf, out_dir: judged.append(sorted(map(Path, conf.runs))))
    assert module.demo(tmp_path / "demo", spacing=5, subjects=8, epochs=1) == out_dir
    assert judged == [[tmp_path / "demo" / "runs" / name for name in RUNS if name != "snet"]]


def test_the_demo_goes_on_with_a_training_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a checkpoint is there it resumes, where none is it starts."""
    monkeypatch.setattr(module, "prepare", lambda conf: None)
    monkeypatch.setattr(module, "evaluate", lambda conf, out_dir: out_dir)
    asked: dict[str, object] = {}
    monkeypatch.setattr(module, "train", lambda conf, run_dir: asked.update({run_dir.name: conf.resume}))
    stopped = tmp_path / "runs" / "rnet-t2"
    (stopped / "checkpoints").mkdir(parents=True)
    (stopped / "checkpoints" / "last.ckpt").touch()
    (stopped / "status.json").write_text('{"state": "failed", "reason": "killed"}')
    done = tmp_path / "runs" / "snet"
    done.mkdir()
    (done / "status.json").write_text('{"state": "finished"}')
    module.demo(tmp_path)
    assert asked == {"rsnet-t2": None, "rnet-t2": str(stopped), "rsnet-t1ce": None, "rnet-t1ce": None}
