"""What is asked of SLURM and refused before it, and how a job answers signals: with stand-ins for SLURM's commands."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrgen.errors import UserError
from mrgen.files import write_json
from mrgen.launch.cluster import slurm
from mrgen.launch.cluster.resources import Resources, check_partition, checked_settings, derive, partitions
from mrgen.launch.cluster.submission import HELD_BACK
from mrgen.launch.cluster.waiting import conclude, wait
from mrgen.launch.status import read_status
from mrgen.launch.sweeps.jobs import Job
from tests.launch.tools import Called, composed

ROOT = Path(__file__).resolve().parents[3]
SINFO = r"""cpu*|8|32000|(null)|4|4:00:00
big|64|512000|(null)|2|infinite
gpu|32|256000|gpu:a100:4(S:0-1),gpu:v100:2|3|1-00:00:00
gpu|16|128000|gpu:a100:8|1|1-00:00:00"""
SMALL = ("experiment=rsnet/rsnet", "data.store=nowhere", "tracking=csv", "trainer.accelerator=cpu")


class Slurm:
    """Commands on the PATH that answer as SLURM's would, and write down how they were called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            monkeypatch.delenv(name)
        self.answer("sinfo", SINFO)
        for name in ("squeue", "srun", "scancel"):
            self.answer(name, "")
        # Each call gets the next id, and keeps its script and environment.
        self.command(
            "sbatch",
            f'n=$(ls {folder} | grep -c "^script"); n=$((n + 12)); cp "$1" {folder}/script$n; env > {folder}/env$n\n'
            "echo Submitted batch job $n",
        )

    def command(self, name: str, lines: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {self.folder}/calls\n{lines}\n')
        path.chmod(0o755)

    def answer(self, name: str, text: str) -> None:
        (self.folder / f"{name}.txt").write_text(text)
        self.command(name, f"cat {self.folder}/{name}.txt")

    def calls(self, name: str) -> list[str]:
        path = self.folder / "calls"
        return [line for line in (path.read_text().splitlines() if path.is_file() else []) if line.split()[0] == name]

    def scripts(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("script*"))]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(tmp_path / "slurm", monkeypatch)


def settings(**changes: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from mrgen.launch.paths import CONF_DIR

    conf = OmegaConf.merge(OmegaConf.load(CONF_DIR / "hydra" / "launcher" / "slurm.yaml"), {"name": "mrgen-train"})
    known = OmegaConf.to_container(conf, resolve=True)
    assert isinstance(known, dict)
    del known["_target_"]
    return {**known, **changes}


# ----- what a job needs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "changes", "expected"),
    [
        ((), {}, Resources(1, 1, 1, 1, 8)),  # auto is a GPU on a cluster
        (("trainer.accelerator=cpu", "data.workers=3"), {}, Resources(1, 1, 4, 0, 14)),
        (("trainer.accelerator=cpu",), {"cpus_per_task": 16, "mem_gb": 4.5}, Resources(1, 1, 16, 0, 4.5)),
        (("trainer.devices=4", "+trainer.num_nodes=2", "data.workers=2"), {}, Resources(2, 4, 3, 4, 48)),
        (("trainer.devices=4",), {"gpus_per_node": 4, "tasks_per_node": 4}, Resources(1, 4, 1, 4, 32)),
        ((), {"mem_gb": 0}, Resources(1, 1, 1, 1, 0)),
        # Without a network, in one process.
        (("experiment=t1_to_t2/clustering", "trainer=ddp", "+trainer.num_nodes=2"), {}, Resources(1, 1, 1, 0, 8)),
    ],
)
def test_resources_follow_from_the_trainer(
    overrides: Sequence[str], changes: dict[str, Any], expected: Resources
) -> None:
    assert derive(composed("train", "experiment=rsnet/rsnet", *overrides), settings(**changes)) == expected


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        (("trainer.devices=2",), {"tasks_per_node": 1}, r"tasks_per_node=1: the trainer needs 2"),
        (("trainer.devices=2",), {"gpus_per_node": 4}, r"gpus_per_node=4: the trainer needs 2"),
        (("trainer.accelerator=cpu",), {"gpus_per_node": 1}, r"gpus_per_node=1: the trainer needs 0"),
        (("+trainer.num_nodes=2",), {"nodes": 1}, r"nodes=1: the trainer needs 2"),
        (("trainer.devices=auto",), {}, r"trainer.devices=auto: .* expected 1, 2"),
        (("trainer.devices=-1",), {}, r"trainer.devices=-1: .* expected 1, 2"),
        (("trainer.devices=[0,1]",), {}, r"trainer.devices=\[0, 1\]: .* expected 1, 2"),
        (("+trainer.num_nodes=auto",), {}, r"trainer.num_nodes=auto: expected a whole number from 1 on"),
        (("data.workers=-1",), {}, r"data.workers=-1: expected a whole number from 0 on"),
    ],
)
def test_contradictions_are_refused(overrides: Sequence[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        derive(composed("train", "experiment=rsnet/rsnet", *overrides), settings(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signal_delay_s": 600, "timeout_min": 10}, r"signal_delay_s=600: .* has, 600"),
        ({"timeout_min": "2h"}, r"timeout_min=2h: expected a whole number"),
        ({"mem_gb": "8GB"}, r"mem_gb=8GB: expected"),
        ({"additional_parameters": {"ntasks_per_node": 2}}, r"has a key of its own, hydra.launcher.tasks_per_node"),
        ({"additional_parameters": {"ntasks": 2}}, r"has a key of its own, hydra.launcher.tasks_per_node"),
        ({"additional_parameters": "comment=mine"}, r"additional_parameters=comment=mine: expected the like of"),
        ({"setup": "module load cuda"}, r"setup=module load cuda: expected the like of \[module load cuda\]"),
        ({"partition": ["gpu", "long"]}, r"several partitions are written 'hydra.launcher.partition=\"gpu,long\"'"),
        ({"gres": "gpu:2"}, r"hydra.launcher.gres: found no such key"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked_settings(settings(**changes))


def test_names_may_be_numbers() -> None:
    assert checked_settings(settings(account=4711, gpu_type=3090)) == settings(account="4711", gpu_type="3090")


@pytest.mark.parametrize(
    ("needed", "partition", "gpu_type", "minutes", "message"),
    [
        (Resources(1, 1, 1, 0, 8), "night", None, 60, r"partition=night: found no such .* names big, cpu, gpu"),
        (
            Resources(1, 1, 1, 1, 8),
            "",
            None,
            60,
            r"needs 1 GPUs .* the default partition have 0",
        ),
        (Resources(1, 8, 1, 8, 8), "gpu", "v100", 60, r"8 GPUs of type v100 .* partition gpu have 2"),
        (Resources(1, 9, 1, 9, 8), "gpu", None, 60, r"9 GPUs on a node, .* have 8"),
        (Resources(1, 2, 5, 0, 8), "cpu", None, 60, r"needs 10 processors on a node \(2 tasks with 5 each\)"),
        (Resources(1, 1, 1, 0, 32), "cpu", None, 60, r"needs 32 GB of memory on a node, .* have 31.2"),
        (Resources(5, 1, 1, 0, 8), "cpu", None, 60, r"needs 5 nodes .* has 4"),
        (Resources(1, 8, 4, 8, 8), "gpu", None, 60, r"needs 1 nodes with 32 processors, 8 GPUs .* has 0 of that kind"),
        (Resources(1, 1, 1, 0, 8), "", None, 241, r"timeout_min=241: .* after 240 minutes"),
        (Resources(1, 1, 1, 1, 8), "gpu", None, 1441, r"after 1440 minutes"),
    ],
)
def test_what_no_node_has_is_refused(
    cluster: Slurm, needed: Resources, partition: str, gpu_type: str | None, minutes: float, message: str
) -> None:
    known = partitions()
    assert known is not None
    with pytest.raises(UserError, match=message):
        check_partition(needed, known, partition=partition, gpu_type=gpu_type, minutes=minutes)


@pytest.mark.parametrize(
    ("needed", "partition", "gpu_type", "minutes"),
    [
        (Resources(4, 8, 1, 0, 31), "", None, 240),
        (Resources(1, 1, 60, 0, 400), "cpu,big", None, 100_000),
        (Resources(3, 6, 4, 6, 64), "gpu", None, 60),
        (Resources(4, 4, 4, 4, 64), "gpu", "a100", 60),
    ],
)
def test_what_a_node_has_is_let_through(
    cluster: Slurm, needed: Resources, partition: str, gpu_type: str | None, minutes: float
) -> None:
    known = partitions()
    assert known is not None
    check_partition(needed, known, partition=partition, gpu_type=gpu_type, minutes=minutes)


# ----- submitting ----------------------------------------------------------------------------------------------------


def test_jobs_that_need_the_same_share_an_array(
    cluster: Slurm, mrgen: Callable[..., Called], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1000")  # of an interactive job that the command is called in
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    monkeypatch.setenv("SBATCH_PARTITION", "big")  # of the user's own
    monkeypatch.setenv("SBATCH_TIMELIMIT", "5")
    cluster.answer("squeue", "12_0 PENDING\n12_1 PENDING\n13_0 PENDING\n13_1 PENDING")
    sweep = tmp_path / "sweep"
    swept = ("trainer.devices=1,2", "seed=0,1", "launch.detach=true", f"hydra.sweep.dir={sweep}")
    kept = ("+hydra.launcher.additional_parameters.comment=mine", "hydra.launcher.setup=['module load x']")
    done = mrgen("train", "-m", "hydra/launcher=slurm", *SMALL, *swept, *kept)
    assert done.code == 0, done.err
    assert "4 jobs submitted to SLURM; cancel them with: scancel 12 13" in done.out

    one, two = cluster.scripts()
    for script, tasks in ((one, 1), (two, 2)):
        options = dict(re.findall(r"#SBATCH --([\w-]+)(?:=(.*))?", script))
        assert options["array"] == "0-1%2"
        assert (options["nodes"], options["ntasks-per-node"], options["cpus-per-task"]) == ("1", str(tasks), "1")
        assert options["mem"] == f"{tasks * 8192}MB"
        assert options["signal"] == "USR2@120"
        assert (options["partition"], options["time"]) == ("big", "240")
        assert "requeue" in options
        assert options["comment"] == "mine"
        assert "gpus-per-node" not in options
        assert "module load x" in script
        assert "--kill-on-bad-exit=1" in script
    environment = (cluster.folder / "env12").read_text()
    assert "SLURM_MEM_PER_CPU" not in environment
    assert "SBATCH_" not in environment  # sbatch would prefer it to its script
    assert "SLURM_CONF=/etc/other.conf" in environment
    assert os.environ["SLURM_MEM_PER_CPU"] == "1000"

    from mrgen.launch.sweeps.jobs import read_jobs

    jobs = read_jobs(sweep)
    assert [job.slurm_id for job in jobs] == ["12_0", "12_1", "13_0", "13_1"]
    for job, devices in zip(jobs, (1, 1, 2, 2), strict=True):
        config = (sweep / job.folder / ".hydra" / "config.yaml").read_text()
        assert f"devices: {devices}\n" in config
        assert {path.name for path in (sweep / job.folder / ".hydra").iterdir()} == {
            *("config.yaml", "hydra.yaml", "overrides.yaml")
        }


def test_a_job_in_the_queue_is_not_submitted_again(
    cluster: Slurm, mrgen: Callable[..., Called], tmp_path: Path
) -> None:
    """Two processes in one folder would write over each other."""
    sweep = tmp_path / "sweep"
    arguments = ("-m", "hydra/launcher=slurm", *SMALL, "launch.detach=true", f"hydra.sweep.dir={sweep}", "seed=0,1")
    cluster.answer("squeue", "12_0 PENDING\n12_1 PENDING")
    assert mrgen("train", *arguments).code == 0
    cluster.answer("squeue", "12_0 PENDING\n12_1 CANCELLED\n13 PENDING")
    done = mrgen("train", f"resume={sweep}")
    assert done.code == 0, done.err
    assert "1 jobs submitted to SLURM" in done.out
    assert len(cluster.calls("sbatch")) == 2
    assert "array" not in cluster.scripts()[1]

    cluster.command("squeue", "exit 1")
    assert "squeue does not answer" in mrgen("train", f"resume={sweep}").err
    assert len(cluster.calls("sbatch")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hydra.launcher.partition=night",), "hydra.launcher.partition=night: found no such partition"),
        (("hydra.launcher.tasks_per_node=2",), "hydra.launcher.tasks_per_node=2: the trainer needs 1"),
        (("plan=true",), "leave hydra/launcher=slurm out"),
        (("launch.max_requeues=null",), "launch.max_requeues=None: expected a whole number from 0 on"),
    ],
)
def test_a_refused_sweep_leaves_nothing_in_the_queue(
    cluster: Slurm, mrgen: Callable[..., Called], tmp_path: Path, arguments: Sequence[str], message: str
) -> None:
    done = mrgen("train", "-m", "hydra/launcher=slurm", *SMALL, *arguments)
    assert done.code == 1
    assert message in done.message
    assert not cluster.calls("sbatch")


def test_sbatch_is_missed_in_a_sentence(
    cluster: Slurm, mrgen: Callable[..., Called], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "found no sbatch and srun on the PATH" in mrgen("train", "-m", "hydra/launcher=slurm", *SMALL).message


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("echo no account >&2; exit 1", r"sbatch refused the job: (.|\n)*no account"),
        ("echo well; exit", r"sbatch refused the job: (.|\n)*well"),
        ("kill -INT $PPID; sleep 9", r"error: interrupted"),
    ],
)
def test_where_one_of_two_arrays_is_not_submitted_the_other_is_cancelled(
    cluster: Slurm, mrgen: Callable[..., Called], second: str, message: str
) -> None:
    cluster.command("sbatch", f'if grep -q "ntasks-per-node=2" "$1"; then {second}; fi\necho job 12')
    done = mrgen("train", "-m", "hydra/launcher=slurm", *SMALL, "trainer.devices=1,2")
    assert done.code == 1
    assert re.search(message, done.err)
    assert cluster.calls("scancel") == ["scancel 12"]


def commands(text: str) -> list[str]:
    """The commands of a document that submit a sweep, on one line each."""
    return [
        line
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("mrgen-train -m hydra/launcher=slurm")
    ]


COMMANDS = {name: commands((ROOT / name).read_text()) for name in ("README.md", "docs/cluster.md")}


def test_the_documentation_has_commands() -> None:
    assert all(COMMANDS.values())


@pytest.mark.parametrize("line", dict.fromkeys(line for lines in COMMANDS.values() for line in lines))
def test_the_commands_of_the_documentation_submit(cluster: Slurm, mrgen: Callable[..., Called], line: str) -> None:
    cluster.answer("sinfo", "gpu*|64|512000|gpu:8|4|infinite")
    cluster.answer("squeue", "\n".join(f"12_{number} PENDING" for number in range(4)))
    done = mrgen("train", *shlex.split(line, comments=True)[1:], "launch.detach=true")
    assert done.code == 0, done.err
    assert "jobs submitted to SLURM" in done.out
    assert "#SBATCH --gpus-per-node=" in cluster.scripts()[0]


def test_a_sweep_that_chooses_by_results_cannot_be_detached(cluster: Slurm, mrgen: Callable[..., Called]) -> None:
    swept = ("hydra/sweeper=optuna", "seed=choice(0,1)", "launch.detach=true")
    done = mrgen("train", "-m", "hydra/launcher=slurm", *SMALL, *swept)
    assert "launch.detach=true: OptunaSweeper chooses jobs by the results" in done.message


# ----- waiting -------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_the_jobs_alone(
    cluster: Slurm, mrgen: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.answer("squeue", "12 RUNNING")
    monkeypatch.setattr("mrgen.launch.cluster.waiting.time", SimpleNamespace(sleep=interrupt))
    done = mrgen("train", "-m", "hydra/launcher=slurm", *SMALL)
    assert done.code == 1
    assert "the jobs go on without this command; cancel them with: scancel 12" in done.err
    assert not cluster.calls("scancel")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_slurm_says_is_kept_until_the_last_job_has_ended(
    cluster: Slurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It forgets jobs some minutes after their end, and does not always answer."""
    cluster.answer("squeue", "12_0 OUT_OF_MEMORY\n12_1 RUNNING")
    nexts = iter([lambda: cluster.command("squeue", "exit 1")] * 2 + [lambda: cluster.answer("squeue", "12_1 FAILED")])
    monkeypatch.setattr("mrgen.launch.cluster.waiting.time", SimpleNamespace(sleep=lambda _: next(nexts)()))
    assert wait([Job(n, "mine", (), f"{n}_mine", f"12_{n}") for n in (0, 1)]) == {
        "12_0": "OUT_OF_MEMORY",
        "12_1": "FAILED",
    }
    assert capsys.readouterr().out.splitlines() == [
        "SLURM: 0 waiting, 1 running, 1 ended",
        "SLURM: squeue does not answer; it is asked again until it does",
        "SLURM: 0 waiting, 0 running, 2 ended",
    ]


FAILED = {"state": "failed", "reason": "UserError: no"}


@pytest.mark.parametrize(
    ("before", "status", "slurm_says", "reason"),
    [
        ({}, {"state": "finished"}, "COMPLETED", None),
        (FAILED, {"state": "finished"}, "COMPLETED", None),
        ({}, FAILED, "FAILED", "UserError: no"),
        ({}, {}, "CANCELLED", "ended without a word: SLURM's job 12_0 is CANCELLED, its log is "),
        ({}, {"state": "running"}, "OUT_OF_MEMORY", "SLURM's job 12_0 is OUT_OF_MEMORY"),
        ({}, {"state": "running"}, "forgotten", "SLURM's job 12_0 is forgotten"),
        ({}, {"state": "preempted"}, "FAILED", "saved, and not started again: SLURM's job 12_0 is FAILED"),
        (FAILED, FAILED, "NODE_FAIL", "ended without a word: SLURM's job 12_0 is NODE_FAIL"),  # what was said is old
        (FAILED, {"state": "running"}, "TIMEOUT", "SLURM's job 12_0 is TIMEOUT"),
    ],
)
def test_a_job_ends_as_it_says_or_as_slurm_does(
    tmp_path: Path, before: Any, status: Any, slurm_says: str, reason: str | None
) -> None:
    entry = Job(0, "mine", (), "0_mine", "12_0")
    (tmp_path / "0_mine").mkdir()
    if status:
        write_json(tmp_path / "0_mine" / "status.json", status)
    logs = tmp_path / ".submitit"
    logs.mkdir()
    for name, text in {"12_0_0": "one\n", "12_0_1": "Error: two\nthree\n", "12_00_0": "Error: another's"}.items():
        (logs / f"{name}_log.out").write_text(text)

    found = conclude(entry, tmp_path, before, slurm_says)
    if reason is None:
        assert found is None
        assert read_status(tmp_path / "0_mine") == status
        return
    assert found is not None
    assert reason in found
    kept = read_status(tmp_path / "0_mine")
    assert kept["state"] == "failed"
    assert reason in kept["reason"]
    if "SLURM" in reason:
        assert found.endswith("\n  | Error: two\n  | three")


def test_a_finished_run_that_was_to_go_on_and_was_cancelled_fails_the_sweep(
    cluster: Slurm, mrgen: Callable[..., Called], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    run = sweep / "0_rsnet-t2"
    cluster.answer("squeue", "12 PENDING")
    arguments = ("-m", "hydra/launcher=slurm", *SMALL, "launch.detach=true", f"hydra.sweep.dir={sweep}")
    assert mrgen("train", *arguments).code == 0
    write_json(run / "status.json", {"state": "finished"})
    conf = "name: x\nmonitor: null\nmodel: {}\ntrainer: {max_epochs: 2}\n"
    (run / "config.yaml").write_text(conf + "data: {sampling: {_target_: mrgen.data.crops.BrainBox}}\n")
    cluster.answer("squeue", "12 COMPLETED\n13 CANCELLED")
    done = mrgen("train", f"resume={sweep}", "trainer.max_epochs=3", "launch.detach=false")
    assert done.code == 1
    assert "error: ended without a word: SLURM's job 13 is CANCELLED" in done.err
    assert read_status(run)["state"] == "finished"  # for fewer epochs


# ----- inside of a job -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ("12_0 RUNNING\n12_1 PENDING\n13 RUNNING\n", {"12_0": "RUNNING", "12_1": "PENDING"}),
        ("12_0 COMPLETED\n12_1 COMPLETING\n", {"12_1": "COMPLETING"}),
        ("", {}),
    ],
)
def test_jobs_wait_or_run_until_slurm_has_them_no_longer(
    cluster: Slurm, monkeypatch: pytest.MonkeyPatch, states: str, expected: dict[str, str]
) -> None:
    cluster.answer("squeue", states)
    assert slurm.queue_states(["12_0", "12_1"]) == expected
    cluster.command("squeue", f'[ -n "$SQUEUE_PARTITION" ] || cat {cluster.folder}/squeue.txt')
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    assert slurm.queue_states(["12_0", "12_1"]) == expected
    cluster.command("squeue", "exit 1")
    assert slurm.queue_states(["12_0", "12_1"]) is None


@pytest.mark.parametrize(
    ("environment", "state", "expected"),
    [
        ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "RUNNING", "12_3"),
        ({}, "RUNNING", "15"),
        ({"SLURM_RESTART_COUNT": "1"}, "RUNNING", "15"),
        ({"SLURM_RESTART_COUNT": "2"}, "RUNNING", None),  # often enough
        ({"MRGEN_MAX_REQUEUES": "0"}, "RUNNING", None),
        ({}, "COMPLETING", None),  # cancelled: it would come back
    ],
)
def test_a_job_is_queued_again(
    cluster: Slurm, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], state: str, expected: str | None
) -> None:
    cluster.answer("scontrol", f"JobId=15 JobName=x JobState={state} Reason=None")
    for name, value in {"SLURM_JOB_ID": "15", slurm.MAX_REQUEUES: "2", **environment}.items():
        monkeypatch.setenv(name, value)
    assert slurm.requeue() is (expected is not None)
    asked = [call for call in cluster.calls("scontrol") if " requeue " in call]
    assert asked == ([f"scontrol requeue {expected}"] if expected else [])


def test_a_batch_script_of_the_users_own_is_not_queued_again(cluster: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.answer("scontrol", "JobState=RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    assert slurm.requeue() is False


@pytest.mark.parametrize("sent", slurm.SIGNALS)
def test_a_signal_before_training_is_answered(cluster: Slurm, tmp_path: Path, sent: signal.Signals) -> None:
    """It comes while the interpreter starts, where it would end the process, and the job with it."""
    cluster.answer("scontrol", "JobState=RUNNING")
    code = "import time; time.sleep(1); from mrgen.launch.cluster.slurm import run_rank; run_rank('nowhere', 1)"
    # The shell holds the process up, so that the signal comes first; a mask outlives exec.
    command = [sys.executable, "-I", "-S", "-c", HELD_BACK, "-c", code]
    environment = {**os.environ, "SLURM_JOB_ID": "15", "SLURM_PROCID": "0"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not _holds_back(process.pid, sent):
            pass
        process.send_signal(sent)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + sent
    assert said == f"{sent.name}: queued again\n"
    assert "scontrol requeue 15" in cluster.calls("scontrol")


def _holds_back(pid: int, sent: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = re.search(r"SigBlk:\s*(\w+)", status)
    return mask is not None and bool(int(mask[1], 16) >> (sent - 1) & 1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, "LightningEnvironment"),
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, "LightningEnvironment"),  # its shell
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, "LightningEnvironment"),
        (
            {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2"},
            "SLURMEnvironment",
        ),
        ({"SLURM_JOB_ID": "12", "SLURM_STEP_NUM_TASKS": "2", "TORCHELASTIC_RUN_ID": "1"}, None),
    ],
)
def test_lightning_learns_which_processes_are_ranks(
    cluster: Slurm, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugins = slurm.cluster_environment()
    assert [type(plugin).__name__ for plugin in plugins] == ([expected] if expected else [])
    assert not any(getattr(plugin, "auto_requeue", False) for plugin in plugins)


def test_tasks_without_a_number_for_each_node_are_refused(cluster: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--ntasks-per-node"):
        slurm.cluster_environment()


def test_hydra_finds_the_launcher_beside_those_of_others() -> None:
    """Below a namespace: a package of that name would hide every other launcher and sweeper."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.launcher import Launcher

    assert not (ROOT / "hydra_plugins" / "__init__.py").exists()
    names = {plugin.__name__ for plugin in Plugins.instance().discover(Launcher)}
    assert {"SlurmLauncher", "LocalLauncher", "BasicLauncher"} <= names
