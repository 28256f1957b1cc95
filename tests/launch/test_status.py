"""status.json: running, finished, or failed with the reason; and the line that resumes a failed run comes last."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from mrgen.errors import Preempted, UserError
from mrgen.files import write_json
from mrgen.launch.status import has_begun, read_status, recorded, seen_status


def test_running_then_finished(tmp_path: Path):
    with recorded(tmp_path, command="mrgen-train"):
        during = read_status(tmp_path)
        assert during["state"] == "running"
        assert during["pid"] == os.getpid()
        assert "ended" not in during
    after = read_status(tmp_path)
    assert after["state"] == "finished"
    assert after["started"] == during["started"] <= after["ended"]


def test_a_finished_run_may_say_why_it_ended_early(tmp_path: Path):
    with recorded(tmp_path, command="mrgen-train") as outcome:
        outcome.stopped = "trainer.max_time: 3600 s"
    status = read_status(tmp_path)
    assert (status["state"], status["stopped"]) == ("finished", "trainer.max_time: 3600 s")


def test_a_run_that_was_told_to_end_is_no_failure(tmp_path: Path, last_words: list[Callable], capsys):
    with pytest.raises(SystemExit) as end, recorded(tmp_path, command="mrgen-train"):
        raise Preempted("SIGUSR2, before batch 7 of epoch 3")
    assert end.value.code == 143
    status = read_status(tmp_path)
    assert (status["state"], status["reason"]) == ("preempted", "SIGUSR2, before batch 7 of epoch 3")
    last_words[0]()
    assert capsys.readouterr().err.startswith(f"resume with: mrgen-train resume={tmp_path}")


def test_a_failure_is_kept_with_its_reason_and_goes_on(tmp_path: Path, last_words: list[Callable], capsys):
    with pytest.raises(UserError), recorded(tmp_path, command="mrgen-train"):
        raise UserError("the store is gone")
    status = read_status(tmp_path)
    assert (status["state"], status["reason"]) == ("failed", "UserError: the store is gone")
    assert capsys.readouterr().err == ""  # not now: the error itself is printed later, and this line comes last
    (word,) = last_words
    word()
    assert capsys.readouterr().err == (
        f"resume with: mrgen-train resume={tmp_path}  (no checkpoint yet: it starts over)\n"
    )


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_refused_leaves_the_status_of_a_run_as_it_was(tmp_path: Path, last_words: list[Callable], begun: bool):
    earlier = {"state": "finished", "started": "2026-01-01T00:00:00+0000", "ended": "2026-01-01T01:00:00+0000"}
    write_json(tmp_path / "status.json", earlier)

    def refuse() -> None:
        with recorded(tmp_path, command="mrgen-train") as outcome:
            assert read_status(tmp_path)["state"] == "running"
            outcome.begun = begun
            raise UserError("no GPU here")

    with pytest.raises(UserError):
        refuse()
    assert (read_status(tmp_path) == earlier) is not begun


def test_nothing_is_advised_of_a_folder_that_is_gone_or_one_of_a_sweep(
    tmp_path: Path, last_words: list[Callable], capsys
):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with pytest.raises(UserError), recorded(run_dir, command="mrgen-train"):
        raise UserError("no")
    (run_dir / "status.json").unlink()
    run_dir.rmdir()
    last_words.pop()()
    assert capsys.readouterr().err == ""
    run_dir.mkdir()
    (tmp_path / "sweep.json").touch()
    with pytest.raises(UserError), recorded(run_dir, command="mrgen-train"):
        raise UserError("no")
    assert not last_words


def test_a_run_has_begun_once_something_was_learned(tmp_path: Path):
    from mrgen.callbacks.preemption import RESUME
    from mrgen.launch.fitting import ESTIMATOR

    assert not has_begun(tmp_path)
    for number, name in enumerate((f"checkpoints/{RESUME}", "checkpoints/last.ckpt", str(ESTIMATOR))):
        (tmp_path / str(number) / name).parent.mkdir(parents=True)
        (tmp_path / str(number) / name).touch()
        assert has_begun(tmp_path / str(number))


def test_with_a_checkpoint_the_line_is_a_command_and_nothing_else(tmp_path: Path, last_words: list[Callable], capsys):
    run_dir = tmp_path / "a run (2)"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ValueError, match="x"), recorded(run_dir, command="mrgen-train"):
        raise ValueError("x")
    last_words[0]()
    line = capsys.readouterr().err
    assert shlex.split(line.removeprefix("resume with: ")) == ["mrgen-train", f"resume={run_dir}"]


@pytest.mark.parametrize("how", ["at once", "by way of Lightning"])
def test_ctrl_c_is_called_interrupted(tmp_path: Path, how: str):
    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if how == "at once":
                raise
            raise SystemExit(1)  # noqa: B904 - as Lightning ends a fit

    with pytest.raises(BaseException), recorded(tmp_path, command="mrgen-train"):  # noqa: B017
        interrupted()
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["reason"]) == ("failed", "interrupted")


def test_other_ranks_write_nothing(tmp_path: Path, last_words: list[Callable]):
    with pytest.raises(ValueError, match="x"), recorded(tmp_path, command="mrgen-train", enabled=False):
        raise ValueError("x")
    assert list(tmp_path.iterdir()) == []
    assert last_words == []


def test_no_status_is_an_empty_one(tmp_path: Path):
    assert read_status(tmp_path) == {}


def test_json_is_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"state": "finishee"}', '{"state": "failed", "pid": ""}', "\ud800"]
)
def test_a_damaged_status_says_what_to_do(tmp_path: Path, content: str):
    (tmp_path / "status.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"status\.json: .*expected what the run says of itself; remove the file"):
        read_status(tmp_path)
    assert seen_status(tmp_path)["state"] == "unreadable"
    with pytest.raises(UserError), recorded(tmp_path, command="mrgen-train"):
        pass
    assert (tmp_path / "status.json").read_bytes() == content.encode("utf-8", "surrogatepass")  # it is not written over
    (tmp_path / "status.json").unlink()
    with recorded(tmp_path, command="mrgen-train"):
        pass
    assert read_status(tmp_path)["state"] == "finished"


def test_memory_that_ran_out_says_what_to_lower(tmp_path: Path, last_words: list[Callable]):
    with pytest.raises(MemoryError), recorded(tmp_path, command="mrgen-train"):
        raise MemoryError
    assert "memory ran out (MemoryError); in a training lower data.batch_size" in read_status(tmp_path)["reason"]
