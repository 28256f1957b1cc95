"""A sweep: every job stands for itself, its folder says what has become of it, and it can be started again."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from mrgen.errors import UserError
from mrgen.files import write_json
from mrgen.launch.status import read_status
from mrgen.launch.sweeps import jobs as sweeps
from mrgen.launch.sweeps.jobs import Job, objective, read_jobs, sweep_status, view, write_jobs
from mrgen.launch.sweeps.resuming import resumed
from tests.launch import stand_in
from tests.launch.tools import Called

Script = Callable[..., Called]
pytestmark = pytest.mark.usefixtures("stand_in")
DDP = ("trainer=ddp", "trainer.accelerator=cpu")
SEARCH = ("hydra/sweeper=search", "hydra.sweeper.n_trials=3")


def only_sweep(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "runs").glob("sweep_*")
    return folder


def seen(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(run_dir.glob("rank*.json"))]


# ----- running -----------------------------------------------------------------------------------------------------


def test_a_job_that_fails_leaves_the_others_untouched(mrgen: Script, tmp_path: Path):
    """By a wrong setting, or by a bug; in batches, of which Hydra would start no other one."""
    called = mrgen("train", "-m", "target=t1,wrong,bug,t2", "hydra.sweeper.max_batch_size=2")
    assert called.code == 1
    folder = only_sweep(tmp_path)
    assert [row.state for row in sweep_status(folder)] == ["finished", "failed", "failed", "finished"]
    assert read_status(folder / "1_train")["reason"] == "UserError: a wrong setting"
    assert "job 1 (train) failed: a wrong setting" in called.err
    assert "job 2 (train) failed: RuntimeError: a bug" in called.err
    assert called.err.count("Traceback") == 1  # of the bug
    assert called.err.endswith(
        "error: 2 of 4 jobs of the sweep failed:\n  1_train: a wrong setting\n  2_train: RuntimeError: a bug\n"
    )
    table = called.out.partition(f"sweep {folder}")[2]
    assert re.search(r"0 │ train │ finished │ 2/240 │ \S+ \(val/loss\) │ 0_train │ target=t1 ", table)
    assert re.search(r"1 │ train │ failed   │ 0/240 │ –", table)
    assert f"go on with: mrgen-train resume={folder}" in called.out


def test_a_job_that_another_process_trains_is_left_to_it(
    mrgen: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(conf: Any, run_dir: Path) -> None:
        raise UserError(f"{run_dir}: is being trained by process {os.getppid()}")

    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    status = {"state": "running", "host": socket.gethostname(), "pid": os.getppid(), "started": now}
    write_json(tmp_path / "sweep" / "0_train" / "status.json", status)
    monkeypatch.setattr(stand_in, "train", refused)
    called = mrgen("train", "-m", "target=t1", "hydra.sweep.dir=sweep")
    assert called.code == 1
    assert "1 of 1 jobs of the sweep failed:\n  0_train: " in called.err
    assert read_status(tmp_path / "sweep" / "0_train") == status


def test_a_job_is_counted_once_wherever_its_folder_lies(mrgen: Script):
    called = mrgen("train", "-m", "target=wrong,t1", "hydra.sweep.subdir=${name}/${hydra.job.num}")
    assert called.err.endswith("error: 1 of 2 jobs of the sweep failed:\n  train/0: a wrong setting\n")


def test_a_wrong_name_is_refused_before_the_first_job_trains(mrgen: Script, tmp_path: Path):
    called = mrgen("train", "-m", "target=t1,t2", "name=${nope}")
    assert called.code == 1
    assert "Interpolation key 'nope' not found" in called.message
    assert not list(tmp_path.rglob("rank0.json"))


def test_every_rank_of_every_job_has_its_jobs_config_and_a_fresh_port(mrgen: Script, tmp_path: Path):
    before = dict(os.environ)
    called = mrgen("train", "-m", "target=killed,t1", "model.lr=0.5", *DDP)
    assert called.code == 1
    folder = only_sweep(tmp_path)
    ports = set()
    for number, target in enumerate(("killed", "t1")):
        first, second = seen(folder / f"{number}_train")
        assert first["conf"] == second["conf"]
        assert first["conf"]["target"] == target
        assert first["environment"] == second["environment"]
        ports.add(first["environment"]["MASTER_PORT"])
    assert len(ports) == 2
    assert [row.state for row in sweep_status(folder)] == ["failed", "finished"]
    assert "0_train: rank 1 of 2 was ended by SIGKILL" in called.err
    assert dict(os.environ) == {**before, "HYDRA_FULL_ERROR": "1"}


def test_ranks_know_what_hydra_knows_of_their_job(mrgen: Script, tmp_path: Path):
    own = ("seed=${hydra:job.num}", "+model.of=[${hydra:job.override_dirname}]")
    called = mrgen("train", "-m", "target=t1,t2", *own, *DDP)
    assert called.code == 0, called.err
    for number, target in enumerate(("t1", "t2")):
        assert OmegaConf.load(only_sweep(tmp_path) / f"{number}_train" / ".hydra" / "config.yaml").seed == number
        for rank in seen(only_sweep(tmp_path) / f"{number}_train"):
            assert rank["conf"]["seed"] == number
            assert f"target={target}" in rank["conf"]["model"]["of"][0]


def test_all_jobs_are_listed_from_the_start_and_none_leaves_anything_in_the_environment(
    mrgen: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    waiting = []

    def look(rank: int) -> None:
        waiting.extend(row.state for row in sweep_status(only_sweep(tmp_path)))

    monkeypatch.setenv("MASTER_PORT", "7")
    monkeypatch.setitem(stand_in.ENDS, "t1", look)
    assert mrgen("train", "-m", "target=t1,leaves", "seed=3").code == 0
    assert waiting == ["running", "waiting"]
    jobs = read_jobs(only_sweep(tmp_path))
    assert [job.overrides for job in jobs] == [("target=t1", "seed=3"), ("target=leaves", "seed=3")]
    assert os.environ["MASTER_PORT"] == "7"
    assert "LEFT_BY_A_JOB" not in os.environ


def test_ctrl_c_ends_the_sweep(mrgen: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(rank: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(stand_in.ENDS, "t1", interrupt)
    called = mrgen("train", "-m", "target=t1,t2")
    assert called.code == 1
    assert "error: interrupted" in called.err
    assert [row.state for row in sweep_status(only_sweep(tmp_path))] == ["failed", "waiting"]
    assert f"go on with: mrgen-train resume={only_sweep(tmp_path)}" in called.out


def test_a_sweep_that_is_refused_as_a_whole_has_no_table(mrgen: Script):
    called = mrgen("train", "-m", "target=t1,t2", "hydra.sweeper.max_batch_size=none")
    assert (called.code, called.out) == (1, "")
    assert "max_batch_size" in called.message


def test_a_sweep_of_plans_is_no_sweep(mrgen: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = SimpleNamespace(plan=lambda conf: {}, show=lambda name, costs: None)
    monkeypatch.setitem(sys.modules, "mrgen.launch.plan", plan)
    called = mrgen("train", "-m", "target=t1,t2", "plan=true")
    assert (called.code, called.out) == (0, "")
    assert not list(tmp_path.rglob("sweep.json"))


def test_a_plan_of_a_sweep_that_has_begun_is_not_kept(tmp_path: Path):
    folder = tmp_path / "sweep"
    write_jobs(folder, [])
    (folder / "multirun.yaml").write_text(
        "hydra: {sweeper: {}, runtime: {config_sources: []}, overrides: {hydra: [], task: ['seed=0,1', 'plan=true']}}\n"
    )
    arguments = resumed([f"resume={folder}"])
    assert "seed=0,1" in arguments
    assert "plan=true" not in arguments


def test_a_sweep_that_still_runs_is_left_to_its_command(mrgen: Script, tmp_path: Path):
    assert mrgen("train", "-m", "target=t1,t2", "hydra.sweep.dir=sweep").code == 0
    status = tmp_path / "sweep" / "1_train" / "status.json"
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(status, {"state": "running", "host": socket.gethostname(), "pid": os.getpid(), "started": now})
    called = mrgen("train", f"resume={tmp_path}/sweep")
    assert f"{tmp_path}/sweep: 1_train still runs; wait for the sweep's end" in called.message
    write_json(status, {"state": "running", "host": "another", "pid": os.getpid(), "started": now})
    assert mrgen("train", f"resume={tmp_path}/sweep").code == 0


def test_a_folder_that_holds_a_sweep_is_refused_without_resume(mrgen: Script, tmp_path: Path):
    """Its list of jobs and what it was started with would be another sweep's."""
    assert mrgen("train", "-m", "target=t1,t2", "hydra.sweep.dir=sweep").code == 0
    before = {name: (tmp_path / "sweep" / name).read_text() for name in ("sweep.json", "multirun.yaml")}
    called = mrgen("train", "-m", "target=flair", "name=other", "hydra.sweep.dir=sweep")
    assert called.code == 1
    folder = tmp_path / "sweep"
    assert f"{folder} holds a sweep; give another folder, or go on with resume={folder}" in called.message
    assert {name: (folder / name).read_text() for name in before} == before
    assert not (folder / "0_other").exists()


# ----- Optuna ------------------------------------------------------------------------------------------------------


def test_optuna_gets_the_least_value_of_the_monitor_and_its_ranks_agree_on_what_is_tried(mrgen: Script, tmp_path: Path):
    called = mrgen("train", "-m", *SEARCH, "target=t1", "model.lr=interval(0.1,0.9)", *DDP)
    assert called.code == 0, called.err
    folder = only_sweep(tmp_path)
    tried = []
    for number in range(3):
        first, second = seen(folder / f"{number}_train")
        assert first["conf"] == second["conf"]
        tried.append(first["conf"]["model"]["lr"])
    assert len(set(tried)) == 3
    best = OmegaConf.load(folder / "optimization_results.yaml")
    assert best.best_value == pytest.approx(min(tried))  # stand_in's last epoch has a loss of lr
    assert [row.best for row in sweep_status(folder)] == pytest.approx(tried)


def test_a_trial_that_fails_is_a_failed_trial(mrgen: Script, tmp_path: Path):
    called = mrgen("train", "-m", *SEARCH, "hydra.sweeper.n_trials=4", "target=choice(t1,wrong)")
    assert called.code == 1
    states = [row.state for row in sweep_status(only_sweep(tmp_path))]
    assert len(states) == 4
    assert set(states) == {"finished", "failed"}
    assert f"{states.count('failed')} of 4 jobs of the sweep failed" in called.err


def test_where_all_trials_fail_there_is_no_traceback(mrgen: Script):
    called = mrgen("train", "-m", *SEARCH, "target=choice(wrong)")
    assert called.code == 1
    assert "3 of 3 jobs of the sweep failed" in called.err
    assert "Traceback" not in called.err


def test_a_search_without_a_monitor_is_refused(mrgen: Script):
    called = mrgen("train", "-m", *SEARCH, "model.lr=interval(0.1,0.9)", "monitor=null")
    assert called.code == 1
    assert called.message.startswith("train has no monitor, and the sweeper needs a value to make small: monitor=val")


def test_a_search_without_ranges_is_refused(mrgen: Script, tmp_path: Path):
    assert mrgen("train", "-m", *SEARCH, "target=t1").message.startswith(
        "the sweeper has nothing to search; give ranges"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("hydra/launcher=local",), "hydra/launcher=local starts the jobs of a sweep; add -m"),
        (("launch.detach=true",), "launch.detach=true leaves jobs to SLURM; add -m hydra/launcher=slurm"),
        (("-m", "target=t1,t2", "launch.detach=true"), "launch.detach=true leaves jobs to SLURM"),
    ],
)
def test_what_a_single_run_or_this_machine_cannot_do_is_not_ignored(
    mrgen: Script, arguments: tuple[str, ...], said: str
):
    called = mrgen("train", *arguments)
    assert called.code == 1
    assert said in called.err


# ----- resuming ----------------------------------------------------------------------------------------------------


def test_a_sweep_is_resumed_in_its_folder_with_its_jobs(mrgen: Script, tmp_path: Path):
    """By a preset of the user's own, in a folder that has to be named again: what lies there decides what runs."""
    extra = tmp_path / "mine" / "experiment"
    extra.mkdir(parents=True)
    preset = "# @package _global_\nname: mine\nhydra: {sweeper: {params: {target: 't1,wrong'}}}\n"
    (extra / "mine.yaml").write_text(preset)
    assert mrgen("train", "-m", "--config-dir", str(extra.parent), "experiment=mine", "model.lr=0.5").code == 1
    folder = only_sweep(tmp_path)
    jobs = read_jobs(folder)
    shutil.rmtree(folder / "0_mine")  # never started
    assert f"add --config-dir {extra.parent}" in mrgen("train", f"resume={folder}").message
    for _ in range(2):  # and once more
        own = ("--config-dir", str(extra.parent))
        called = mrgen("train", f"resume={folder}", *own, "trainer.max_epochs=7", "model.lr=0.5")
        assert called.code == 1
        assert only_sweep(tmp_path) == folder
        assert [job.folder for job in read_jobs(folder)] == [job.folder for job in jobs]
        for number in range(2):
            conf = seen(folder / f"{number}_mine")[0]["conf"]
            assert conf["resume"] == str(folder / f"{number}_mine")
            assert (conf["trainer"]["max_epochs"], conf["model"]["lr"]) == (7, 0.5)


def test_trials_are_tried_again_with_the_same_values(mrgen: Script, tmp_path: Path):
    search = ("target=t1", "model.lr=interval(0.1,0.9)")
    assert mrgen("train", "-m", *SEARCH, *search).code == 0
    folder = only_sweep(tmp_path)
    tried = [seen(folder / f"{number}_train")[0]["conf"]["model"]["lr"] for number in range(3)]
    for number in range(3):
        (folder / f"{number}_train" / "rank0.json").unlink()
    called = mrgen("train", f"resume={folder}")
    assert called.code == 0, called.err
    assert [seen(folder / f"{number}_train")[0]["conf"]["model"]["lr"] for number in range(3)] == tried


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["target=t3"], "target=t3: .* goes on with the jobs it has; start another sweep for others"),
        (["seed=1,2"], "seed=1,2: .* goes on with the jobs it has"),
        (
            ["model=rnet"],
            r"model=rnet: a resumed sweep keeps its model; only what leaves its weights alone",
        ),
        (["model.lr=0.1"], r"model\.lr=0\.1: a resumed sweep keeps its model\.lr; only what"),
        (["name=other"], r"name=other: a resumed sweep keeps its name; only what"),  # and folders follow it
    ],
)
def test_arguments_that_would_make_another_sweep_are_refused(
    mrgen: Script, tmp_path: Path, arguments: Sequence[str], said: str
):
    folder = tmp_path / "sweep"
    write_jobs(folder, [])
    (folder / "multirun.yaml").write_text(
        "hydra: {sweeper: {}, runtime: {config_sources: []}, overrides: {hydra: [], task: ['target=t1,t2']}}\n"
    )
    assert re.search(said, mrgen("train", f"resume={folder}", *arguments).message)


def test_trials_that_were_drawn_without_a_seed_cannot_be_drawn_again(mrgen: Script, tmp_path: Path):
    folder = tmp_path / "sweep"
    write_jobs(folder, [])
    (folder / "multirun.yaml").write_text(
        "hydra: {sweeper: {sampler: {seed: null}}, runtime: {config_sources: []}, overrides: {hydra: [], task: []}}\n"
    )
    assert "drawn without a seed and cannot be drawn again" in mrgen("train", f"resume={folder}").message


def test_a_sweep_of_an_earlier_version_is_resumed_run_by_run(mrgen: Script, tmp_path: Path):
    (tmp_path / "multirun.yaml").write_text("hydra: {}\n")
    assert "a sweep of an earlier version, without sweep.json" in mrgen("train", f"resume={tmp_path}").message


# ----- looking -----------------------------------------------------------------------------------------------------


def job(number: int, slurm_id: str | None = None) -> Job:
    return Job(number, "rsnet", (f"seed={number}",), f"{number}_rsnet", slurm_id)


def make(folder: Path, job: Job, status: dict[str, Any] | None) -> None:
    (folder / job.folder).mkdir(parents=True)
    if status is not None:
        write_json(folder / job.folder / "status.json", status)


def test_jobs_keep_their_order_and_are_replaced_by_number(tmp_path: Path):
    write_jobs(tmp_path, [job(2), job(0)])
    write_jobs(tmp_path, [job(1), job(2, "12_2")])
    assert read_jobs(tmp_path) == [job(0), job(1), job(2, "12_2")]


@pytest.mark.parametrize("content", ["[{", "{}", '[{"number": 0}]', "[1]"])
def test_a_broken_list_of_jobs_is_named(tmp_path: Path, content: str):
    (tmp_path / "sweep.json").write_text(content if content != "{}" else "3")
    with pytest.raises(UserError, match=r"sweep\.json: found .+, expected the list of a sweep's jobs|no JSON"):
        read_jobs(tmp_path)


def test_the_state_of_a_job_is_what_it_says_unless_its_process_is_gone(tmp_path: Path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    here = {"state": "running", "host": socket.gethostname(), "started": now}
    statuses: dict[str, dict[str, Any] | None] = {
        "waiting": None,
        "running": {**here, "pid": os.getpid()},
        "lost": {**here, "pid": ended.pid},
        "finished": {**here, "state": "finished", "pid": ended.pid, "stopped": "early"},
        "failed": {"state": "failed", "reason": "UserError: no"},
        "preempted": {"state": "preempted"},
    }
    for number, status in enumerate(statuses.values()):
        make(tmp_path, job(number), status)
    write_jobs(tmp_path, [job(number) for number in range(len(statuses))])
    rows = sweep_status(tmp_path)
    assert [row.state for row in rows] == list(statuses)
    assert rows[3].reason == "early"
    assert rows[4].reason == "UserError: no"


def test_slurm_is_asked_once_for_the_jobs_that_have_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = {"1_0": "PENDING", "1_1": "RUNNING", "1_3": "PENDING", "1_4": "PENDING", "1_6": "OUT_OF_MEMORY"}
    asked = []
    monkeypatch.setattr(sweeps, "job_states", lambda ids: asked.append(list(ids)) or known)
    running = {"state": "running", "host": "node7", "pid": 1}
    statuses = [None, None, running, running, {"state": "preempted"}, {"state": "finished"}, running, None]
    for number, status in enumerate(statuses):
        make(tmp_path, job(number), status)
    write_jobs(tmp_path, [job(number, f"1_{number}") for number in range(len(statuses))])
    rows = sweep_status(tmp_path)
    states = ["waiting", "running", "lost", "waiting", "preempted", "finished", "failed", "lost"]
    assert [row.state for row in rows] == states
    assert rows[6].reason == "SLURM ended it: OUT_OF_MEMORY"
    assert asked == [["1_0", "1_1", "1_2", "1_3", "1_4", "1_6", "1_7"]]
    monkeypatch.setattr(sweeps, "job_states", lambda ids: None)  # squeue does not answer
    assert [row.state for row in sweep_status(tmp_path)][:4] == ["waiting", "waiting", "running", "running"]


def test_a_look_at_a_sweep_leaves_nothing_behind(mrgen: Script, tmp_path: Path):
    folder = tmp_path / "sweep"
    make(folder, job(0), {"state": "failed", "reason": "UserError: no"})
    (folder / "0_rsnet" / "config.yaml").write_text("monitor: val/loss\ntrainer: {max_epochs: 9}\nmodel: {}\n")
    (folder / "0_rsnet" / "metrics.csv").write_text("epoch,step,val/loss\n0,3,0.5\n1,7,nan\n2,11,\n")
    write_jobs(folder, [job(0)])
    called = mrgen("evaluate", f"sweep={folder}")
    assert called.code == 0, called.err
    assert re.search(r"0 │ rsnet │ failed │ 3/9   │ 0.5 \(val/loss\) │ 0_rsnet", called.out)
    assert "0_rsnet: UserError: no" in called.out
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    assert "found no sweep.json; expected the folder of a sweep" in mrgen("evaluate", f"sweep={tmp_path}").message


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("status.json", b'{"state": "finishee"}'),
        ("status.json", b"\xff"),
        ("metrics.csv", b"epoch,step,val/loss\n0,3,o.5\n"),
        ("metrics.csv", b"epoch,step,val/loss\n0,3\n"),
        ("config.yaml", b"monitor: [val/loss"),
        ("config.yaml", "name: é".encode("latin-1")),
    ],
)
def test_one_damaged_job_does_not_hide_the_others(tmp_path: Path, file: str, content: bytes, capsys):
    for number in (0, 1):
        make(tmp_path, job(number), {"state": "finished"})
    (tmp_path / "0_rsnet" / file).write_bytes(content)
    write_jobs(tmp_path, [job(0), job(1)])
    bad, good = sweep_status(tmp_path)
    assert (bad.state, good.state) == ("unreadable", "finished")
    assert re.search(rf"0_rsnet/{re.escape(file)}: .+[,;] expected .+; (put back|remove)", bad.reason)
    view(tmp_path)
    assert "0_rsnet: " + bad.reason in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    ["[1", "- 1", "hydra: 3", "hydra: {sweeper: {}}", "a: &a [1]\nb: [*a, *a]", "hydra: {overrides: {task: 3}}"],
)
def test_a_damaged_sweep_is_not_gone_on_with(mrgen: Script, tmp_path: Path, content: str):
    folder = tmp_path / "sweep"
    write_jobs(folder, [])
    (folder / "multirun.yaml").write_text(content)
    said = mrgen("train", f"resume={folder}").message
    assert re.search(r"multirun\.yaml: found .+; put back a copy that is whole, or resume its runs one by one", said)


def test_the_objective_is_the_least_finite_value_of_the_monitor(tmp_path: Path):
    assert objective(tmp_path) is None
    (tmp_path / "config.yaml").write_text("monitor: val/loss\ntrainer: {max_epochs: 9}\nmodel: {}\n")
    assert objective(tmp_path) is None
    (tmp_path / "metrics.csv").write_text("epoch,step,val/loss\n0,3,0.5\n1,7,nan\n2,11,0.25\n3,15,-inf\n4,19,\n")
    assert objective(tmp_path) == 0.25
    (tmp_path / "config.yaml").write_text("monitor: null\ntrainer: {max_epochs: 9}\nmodel: {}\n")
    assert objective(tmp_path) is None


def test_a_job_does_not_leave_the_sweeps_folder(mrgen: Script, tmp_path: Path):
    called = mrgen("train", "-m", "name=x/../../../out", "target=t1,t2")
    assert called.code == 1
    assert "which is not the sweep's; change it" in called.err
    assert not (tmp_path / "out").exists()
