"""Sweeps on a real SLURM of one node: arrays, DDP, preemption, detached submission, jobs that fail or are cancelled."""

import csv
import io
import os
import re
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
from mrgen.launch.sweeps import read_jobs
from tests.launch.tools import TINY, Called

pytestmark = pytest.mark.slurm

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "slurm-single-node"
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
        end = time.monotonic() + 300
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


def test_a_preempted_job_goes_on_by_itself_as_if_nothing_had_happened(
    sweep: Callable[..., Called], tmp_path: Path
) -> None:
    """On one device and on two, each a task of its own: with the metrics of runs that were left alone."""
    long = ("trainer.devices=1,2", "data.split.val=0.3", "trainer.max_epochs=1", "data.steps_per_epoch=150")
    long += ("trainer.log_every_n_steps=5",)
    done = sweep("whole", *long)
    assert done.code == 0, done.err

    folder, told = tmp_path / "preempted", []
    runs = [folder / "0_rsnet-t2", folder / "1_rsnet-t2"]

    def preempt() -> None:
        command("sbatch", "--partition=urgent", "--ntasks=8", "--output=/dev/null", "--wrap=sleep 1")
        when(
            lambda: all(read_status(run).get("state") == "preempted" for run in runs),
            lambda: told.extend(read_status(run)["reason"] for run in runs),
        )

    when(lambda: all(steps(run) >= 5 for run in runs), preempt)
    done = sweep("preempted", *long)
    assert done.code == 0, done.err
    assert len(told) == 2
    for reason in told:  # where saving took longer than the time of grace SLURM has queued it again before us
        assert re.fullmatch(r"SIGUSR2, before batch [1-9]\d* of epoch 0(; queued again)?", reason)
    for run in runs:
        assert read_status(run)["state"] == "finished"
        assert_same(run / "metrics.csv", tmp_path / "whole" / run.name / "metrics.csv")
        assert not (run / "checkpoints" / "resume.ckpt").exists()


def test_a_detached_sweep_goes_on_and_can_be_looked_at(
    sweep: Callable[..., Called], mrgen: Callable[..., Called], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    begun, one_by_one = time.monotonic(), ("hydra.launcher.array_parallelism=1",)
    done = sweep("sweep", "seed=0,1", "trainer.max_epochs=1", "launch.detach=true", *one_by_one)
    assert done.code == 0, done.err
    assert time.monotonic() - begun < 30
    assert f"scancel {first_id(folder)}" in done.out
    seen = mrgen("evaluate", f"sweep={folder}")
    assert seen.code == 0, seen.err
    assert "waiting" in seen.out
    # The same sweep again waits for the jobs that are there.
    done = mrgen("train", f"resume={folder}", "launch.detach=false")
    assert done.code == 0, done.err
    assert "0 jobs submitted" in done.out
    assert [status["state"] for status in statuses(folder)] == ["finished", "finished"]
    assert "waiting" not in mrgen("evaluate", f"sweep={folder}").out


@pytest.mark.slow
def test_the_batch_script_for_an_image_goes_on_when_it_is_told_to_end(
    cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phantom_store: Path
) -> None:
    """With a stand-in for Apptainer that calls what it would call in the container."""
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text('#!/bin/sh\nwhile [ "$1" != mrgen-train ]; do shift; done\nexec "$@"\n')
    apptainer.chmod(0o755)
    path = f"{apptainer.parent}:{Path(sys.executable).parent}:{cluster['PATH']}"
    for name, value in {**cluster, "PATH": path, "MRGEN_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    options = ("--parsable", "--gpus-per-node=0", "--mem=1G", "--cpus-per-task=1", f"--output={tmp_path}/log")
    run = ("experiment=rsnet/rsnet", *TINY, f"data.store='{phantom_store}'", "trainer.max_epochs=2")
    steps_of = ("data.steps_per_epoch=60", "trainer.log_every_n_steps=1")
    script = Path(__file__).resolve().parents[2] / "docs" / "apptainer.sbatch"
    job = command("sbatch", *options, str(script), *run, *steps_of).strip()
    folder = tmp_path / "runs" / f"job_{job}"
    when(lambda: steps(folder) >= 5, lambda: command("scancel", "--signal=USR2", job))
    while command("squeue", "--noheader"):
        time.sleep(1)
    log = (tmp_path / "log").read_text()
    assert read_status(folder)["state"] == "finished", log
    assert log.count("resume with: ") == 1  # it was told to end
    assert log.count("epoch 1/2") == 1
