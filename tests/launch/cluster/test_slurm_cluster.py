"""Sweeps on a real SLURM of one node: arrays, DDP, preemption, detached submission, jobs that fail or are cancelled."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mrgen.launch.status import read_status
from mrgen.launch.sweeps.jobs import read_jobs
from tests.launch.tools import TINY, Called

pytestmark = pytest.mark.slurm

BESIDE = Path(__file__).resolve().parents[4] / "shared" / "slurm-single-node"
RUN = ("-m", "hydra/launcher=slurm", "experiment=rsnet/rsnet", *TINY, "hydra.launcher.timeout_min=10")


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find a cluster of 8 processors that lasts as long as the tests."""
    script = os.environ.get("MRGEN_SLURM_SINGLE_NODE") or str(BESIDE)
    if not Path(script).is_file():
        pytest.skip("MRGEN_SLURM_SINGLE_NODE does not name the script that starts a cluster of one node")
    # Its sockets' paths must be short; pytest's folders are not.
    with tempfile.TemporaryDirectory(prefix="mrgen-slurm-") as folder:
        settings = {**os.environ, "SLURM_SINGLE_NODE_CPUS": "8"}
        started = subprocess.run([script, "start", folder], capture_output=True, text=True, env=settings)
        try:
            if started.returncode:
                pytest.skip(f"no cluster can be started here: {started.stderr.strip().splitlines()[-1]}")
            lines = f'eval "$({script} env {folder})"; printf "%s\\n" "$SLURM_CONF" "$PATH"'
            conf, path = subprocess.run(["bash", "-c", lines], capture_output=True, text=True).stdout.splitlines()
            yield {"SLURM_CONF": conf, "PATH": path}
        finally:
            subprocess.run([script, "stop", folder], capture_output=True)


@pytest.fixture
def sweep(
    cluster: dict[str, str],
    mrgen: Callable[..., Called],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    phantom_store: Path,
) -> Callable[..., Called]:
    """``sweep("name", "seed=0,1")``: a sweep of tiny RS-Nets in a folder of that name below ``tmp_path``."""
    for name, value in {**cluster, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    store = f"data.store='{phantom_store}'"
    return lambda name, *overrides: mrgen("train", *RUN, store, f"hydra.sweep.dir={tmp_path / name}", *overrides)


def when(condition: Callable[[], bool], action: Callable[[], object]) -> None:
    """Does something as soon as a condition holds, while the test waits for its jobs; ends them where it never does."""

    def watch() -> None:
        end = time.monotonic() + 900
        while not condition():
            if time.monotonic() > end:
                subprocess.run(["scancel", "--me"])
                return
            time.sleep(0.2)
        action()

    threading.Thread(target=watch, daemon=True).start()


def command(*words: str) -> str:
    """What one of SLURM's commands prints."""
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps(run_dir: Path) -> int:
    path = run_dir / "metrics.csv"
    with path.open() if path.is_file() else io.StringIO() as file:
        return max((int(row["step"]) for row in csv.DictReader(file) if row["step"]), default=-1)


def state(run_dir: Path) -> str | None:
    return read_status(run_dir).get("state")


def statuses(folder: Path) -> list[dict[str, Any]]:
    return [read_status(folder / job.folder) for job in read_jobs(folder)]


def test_jobs_train_fail_and_are_cancelled_without_the_others(sweep: Callable[..., Called], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    endless = folder / "1_rsnet-t2"
    when(lambda: steps(endless) >= 0, lambda: command("scancel", str(read_jobs(folder)[1].slurm_id)))
    done = sweep("sweep", "seed=0,-1", "trainer.max_epochs=1,100000", "trainer.log_every_n_steps=1")
    assert done.code == 1
    assert [status["state"] for status in statuses(folder)] == ["finished", "failed", "failed", "failed"]
    assert "SLURM's job" in statuses(folder)[1]["reason"]
    assert "CANCELLED" in statuses(folder)[1]["reason"]
    assert statuses(folder)[2]["reason"].startswith("UserError: seed is -1")
    assert "error: 3 of 4 jobs of the sweep failed" in done.err
    assert (folder / "0_rsnet-t2" / "checkpoints" / "best.ckpt").is_file()
    # One array for all, and nothing is left of it.
    assert [job.slurm_id for job in read_jobs(folder)] == [f"{first_id(folder)}_{n}" for n in range(4)]
    assert command("squeue", "--noheader") == ""


def assert_same(one: Path, other: Path) -> None:
    """Two files of metrics; sums over the ranks, which are added up in another order, may differ in the last digit."""
    for cells, others in zip(csv.reader(one.open()), csv.reader(other.open()), strict=True):
        for cell, its in zip(cells, others, strict=True):
            assert cell == its or float(cell) == pytest.approx(float(its), rel=1e-6)


def first_id(folder: Path) -> str:
    return str(read_jobs(folder)[0].slurm_id).partition("_")[0]


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_preempted_job_goes_on_by_itself_as_if_nothing_had_happened(
    sweep: Callable[..., Called], tmp_path: Path, devices: int
) -> None:
    """With the metrics of a run that was left alone; on two devices with a task each."""
    steps_of = ("trainer.max_epochs=1", "data.steps_per_epoch=80", "trainer.log_every_n_steps=5")
    long = (f"trainer.devices={devices}", "data.split.val=0.3", *steps_of)
    done = sweep("whole", *long)
    assert done.code == 0, done.err

    run, told = tmp_path / "preempted" / "0_rsnet-t2", []

    def preempt() -> None:
        command("sbatch", "--partition=urgent", "--ntasks=8", "--output=/dev/null", "--wrap=sleep 1")
        when(lambda: state(run) == "preempted", lambda: told.append(read_status(run)["reason"]))

    when(lambda: steps(run) >= 5, preempt)
    done = sweep("preempted", *long)
    assert done.code == 0, done.err
    # Where saving takes longer than the time of grace SLURM queues it again before us.
    assert re.fullmatch(r"SIGUSR2, before batch [1-9]\d* of epoch 0(; queued again)?", " ".join(told))
    assert state(run) == "finished"
    assert_same(run / "metrics.csv", tmp_path / "whole" / run.name / "metrics.csv")
    assert not (run / "checkpoints" / "resume.ckpt").exists()


def test_a_detached_sweep_goes_on_and_can_be_looked_at(
    sweep: Callable[..., Called], mrgen: Callable[..., Called], tmp_path: Path
) -> None:
    """Jobs of one and of two tasks."""
    folder = tmp_path / "sweep"
    short = ("trainer.max_epochs=1", "data.steps_per_epoch=2", "data.split.val=0.3")
    done = sweep("sweep", "trainer.devices=1,2", *short, "launch.detach=true")
    assert done.code == 0, done.err
    one, two = (job.slurm_id for job in read_jobs(folder))
    assert f"scancel {one} {two}" in done.out
    seen = mrgen("evaluate", f"sweep={folder}")
    assert seen.code == 0, seen.err
    assert re.search("waiting|running", seen.out)
    # The same sweep again waits for the jobs that are there.
    done = mrgen("train", f"resume={folder}", "launch.detach=false")
    assert done.code == 0, done.err
    assert "0 jobs submitted" in done.out
    assert [status["state"] for status in statuses(folder)] == ["finished", "finished"]
    assert not re.search("waiting|running", mrgen("evaluate", f"sweep={folder}").out)
    # Both tasks trained, and the first one alone wrote.
    logs = [folder / ".submitit" / f"{two}_{task}_log.out" for task in (0, 1)]
    assert ["run: " in log.read_text() for log in logs] == [True, False]
    assert ["Job completed successfully" in log.read_text() for log in logs] == [True, True]


SCRIPT = Path(__file__).resolve().parents[3] / "docs" / "apptainer.sbatch"
SMALL = ("--parsable", "--gpus-per-node=0", "--mem=1G", "--cpus-per-task=1")


@pytest.fixture
def apptainer(cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for Apptainer that calls what it would call in the container."""
    path = tmp_path / "bin" / "apptainer"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\nwhile [ "$1" != mrgen-train ]; do shift; done\nexec "$@"\n')
    path.chmod(0o755)
    places = f"{path.parent}:{Path(sys.executable).parent}:{cluster['PATH']}"
    for name, value in {
        **cluster,
        "PATH": places,
        "MRGEN_RUNS": str(tmp_path / "runs"),
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return path


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_the_batch_script_for_an_image_is_queued_again_after_a_signal_before_training(
    apptainer: Path, tmp_path: Path, number: signal.Signals
) -> None:
    apptainer.write_text(f'#!/bin/sh\n[ -n "$SLURM_RESTART_COUNT" ] || kill -{int(number)} $$\n')
    job = command("sbatch", *SMALL, f"--output={tmp_path}/log", str(SCRIPT)).strip()
    while command("squeue", "--noheader"):
        time.sleep(0.5)
    shown = command("scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in shown
    assert "Restarts=1" in shown


@pytest.mark.slow
def test_the_batch_script_for_an_image_goes_on_when_it_is_told_to_end(
    apptainer: Path, tmp_path: Path, phantom_store: Path
) -> None:
    run = ("experiment=rsnet/rsnet", *TINY, f"data.store='{phantom_store}'", "trainer.max_epochs=2")
    steps_of = ("data.steps_per_epoch=60", "trainer.log_every_n_steps=1")
    job = command("sbatch", *SMALL, f"--output={tmp_path}/log", str(SCRIPT), *run, *steps_of).strip()
    folder = tmp_path / "runs" / f"job_{job}"
    when(lambda: steps(folder) >= 5, lambda: command("scancel", "--signal=USR2", job))
    while command("squeue", "--noheader"):
        time.sleep(1)
    log = (tmp_path / "log").read_text()
    assert read_status(folder)["state"] == "finished", log
    assert log.count("resume with: ") == 1  # it was told to end
    assert log.count("epoch 1/2") == 1
