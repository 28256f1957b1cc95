"""Training on several devices of one machine: a fresh process each, from the job's own config.

Lightning would start the other ranks with this process's command line, and with ``-m`` each would run a sweep of its
own; the next job would find the port and the rank of the one before it in the environment. Here the parent trains
nothing, waits for its ranks, and keeps its environment.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from mrgen.errors import UserError
from mrgen.files import write_json
from mrgen.launch import app
from mrgen.launch.cluster.slurm import step_tasks
from mrgen.launch.status import UNREADABLE, is_alive, seen_status
from mrgen.launch.sweeps.resuming import saved_config, settled

__all__ = [
    "check_ranks",
    "count_devices",
    "first_rank",
    "is_estimator",
    "is_rank",
    "needs_processes",
    "rank_arguments",
    "record_failure",
    "train_on_devices",
]

GRACE = 10.0  # seconds for the other ranks to end by themselves once one has failed, and again once they were told to
STOP = 60.0  # seconds to save and end after SIGTERM or Ctrl-C
FILE = "MRGEN_RANK_FILE"  # where a rank writes what it died of
PARENT = "MRGEN_RANK_PARENT"


def is_rank() -> bool:
    """Whether this process is one of several that train together, started here, by torchrun or by srun."""
    return "LOCAL_RANK" in os.environ or step_tasks() > 1


def first_rank() -> bool:
    """Whether this process is the one that prints and writes."""
    named = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in named if rank is not None), "0") == "0"


def count_devices(trainer: DictConfig) -> int:
    """Devices on this machine that the ``trainer`` config asks for, in Lightning's notations.

    Args:
        trainer: with ``devices``, a number, a number as text, a list of GPUs (``[0,2]``, ``"0,2"``), ``auto`` or -1.

    Raises:
        UserError: none of these.
    """
    asked, accelerator = trainer.devices, trainer.get("accelerator", "auto")
    if isinstance(asked, str) and "," in asked:
        asked = [part for part in asked.split(",") if part.strip()]
    if isinstance(asked, list | ListConfig):
        if accelerator == "cpu":
            raise UserError(f"trainer.devices={trainer.devices} names GPUs; the CPU takes a number: trainer.devices=2")
        if asked and len({str(part).strip() for part in asked}) == len(asked):
            return len(asked)
    if str(asked) in ("auto", "-1"):
        if accelerator == "cpu":
            return 1
        import torch

        return max(1, torch.cuda.device_count())
    with suppress(ValueError, TypeError):
        if not isinstance(asked, bool) and int(asked) == float(asked) >= 1:
            return int(asked)
    raise UserError(
        f"trainer.devices is {trainer.devices}; expected a number from 1 on, auto, or a list of GPUs such as [0,2]"
    )


def needs_processes(conf: DictConfig) -> bool:
    """Whether a run's ranks are to be started here: several devices, or a strategy for several, and no rank yet.

    Raises:
        UserError: several machines, or a strategy that starts processes of its own.
    """
    if is_rank():
        return False
    strategy = str(conf.trainer.get("strategy", "auto"))
    if (nodes := conf.trainer.get("num_nodes", 1)) != 1:
        raise UserError(
            f"trainer.num_nodes is {nodes}, and mrgen-train starts processes on one machine; use hydra/launcher=slurm, "
            "or start it on every machine with torchrun"
        )
    if any(part in strategy for part in ("spawn", "fork", "notebook")):
        raise UserError(
            f"trainer.strategy is {strategy}; mrgen-train starts the processes itself: trainer.strategy=ddp"
        )
    # One rank of DDP as well: Lightning would leave its rank and port in this process's environment.
    return count_devices(conf.trainer) > 1 or strategy not in ("auto", "single_device")


def is_estimator(model: Mapping[str, Any]) -> bool:
    """Whether a ``model`` config is a method without a network, which is fitted in one process."""
    return str(model.get("_target_", "")).startswith("mrgen.papers.brain_clustering.")


def check_ranks(conf: DictConfig, run_dir: Path) -> None:
    """Raises UserError where ranks that torchrun or srun started would not train together."""
    if FILE in os.environ:  # ours
        return
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError("a sweep starts its own processes; start it once, without torchrun or srun")
    world = int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else step_tasks()
    nodes = conf.trainer.get("num_nodes", 1)
    devices = count_devices(conf.trainer)
    if world != nodes * devices:
        raise UserError(
            f"{world} processes were started for trainer.devices={conf.trainer.devices} on {nodes} machine(s); start "
            "as many as there are devices, or set trainer.devices and trainer.num_nodes"
        )
    if world > 1 and app.TOKEN in run_dir.name:  # in which every process differs
        raise UserError(
            "each of several processes would train into a folder of its own; give them one: hydra.run.dir=FOLDER"
        )


def rank_arguments(run_dir: Path, config_dir: Path | None = None) -> list[str]:
    """Arguments of mrgen-train for one rank of a run.

    Args:
        run_dir: the run's folder.
        config_dir: folder of the config, where it is not the one that Hydra saved in the run's.
    """
    return saved_config(config_dir or run_dir / ".hydra", run_dir)


def train_on_devices(conf: DictConfig, run_dir: Path) -> None:
    """Trains a run on several devices of this machine and waits for the end.

    Args:
        conf: the run's config, as it was composed.
        run_dir: the run's folder, which exists.

    Raises:
        UserError: that of the first rank that ended with one.
        Reported: a rank ended with an error of another kind, or was killed; the others were ended then.
        KeyboardInterrupt: this process was interrupted, and the ranks with it.
        SystemExit: the ranks ended early, as they were told by a signal.
    """
    devices = count_devices(conf.trainer)
    with tempfile.TemporaryDirectory(prefix="mrgen-ranks-") as name:
        folder = Path(name)
        OmegaConf.save(settled(conf), folder / "config.yaml")
        command = [sys.executable, "-m", "mrgen.launch.ranks", *rank_arguments(run_dir, folder)]
        sys.stdout.flush()
        processes: list[subprocess.Popen[bytes]] = []
        with _forwarding(processes) as received:
            environment = _environment(devices)
            for rank in range(devices):
                own = {"LOCAL_RANK": str(rank), FILE: str(folder / f"{rank}.json"), PARENT: str(os.getpid())}
                with open(folder / f"{rank}.err", "wb") as said:
                    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": said} if rank else {}
                    # In a session of its own, so that Ctrl-C reaches it once: from here.
                    processes.append(subprocess.Popen(command, env=environment | own, start_new_session=True, **quiet))
                if received:
                    break
            try:
                hung = _wait(processes, received)
            finally:
                _end(processes, signal.SIGKILL, 0)
        codes = [process.returncode for process in processes]
        _stopped(run_dir, codes, received, preempted=_is_preempted(run_dir, processes))
        _failed(run_dir, codes, hung, folder)


def _environment(devices: int) -> dict[str, str]:
    """The ranks' environment but for their number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // devices)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP's advice on settings that are as they should be
        **os.environ,
        "NODE_RANK": "0",
        "WORLD_SIZE": str(devices),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",  # lines of this process and of the first rank keep their order
    }


@contextmanager
def _forwarding(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[signal.Signals]]:
    """Hands signals on to the ranks while the block lasts; gives the list of those that came."""
    received: list[signal.Signals] = []

    def forward(number: int, _: Any) -> None:
        sent = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
        if sent == signal.SIGINT and sent in received:
            sent = signal.SIGKILL  # Ctrl-C twice
        received.append(sent)
        for process in processes:
            process.send_signal(sent)

    known = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    # What nohup, or a shell in the background, lets processes ignore stays ignored.
    before = {n: signal.signal(n, forward) for n in known if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]], received: Sequence[signal.Signals]) -> set[int]:
    """Until all have ended. Gives the ranks that hung, after another had failed or after a signal, and were ended."""
    deadline, hung = None, set[int]()
    while None in (codes := [process.poll() for process in processes]):
        failed = any(codes)
        if deadline is None and (failed or {signal.SIGTERM, signal.SIGINT} & {*received}):
            deadline = time.monotonic() + (STOP if received else GRACE)
        if deadline is not None and time.monotonic() > deadline:
            hung = {rank for rank, process in enumerate(processes) if process.poll() is None}
            _end(processes, signal.SIGTERM, GRACE)
        time.sleep(0.05)
    return hung


def _end(processes: Sequence[subprocess.Popen[bytes]], by: signal.Signals, seconds: float) -> None:
    """Ends whatever still runs: with a signal, and with SIGKILL after some seconds."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(by)
    until = time.monotonic() + seconds
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        process.kill()
        process.wait()


def _is_preempted(run_dir: Path, processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether these ranks, and not those of an earlier start, saved and ended because they were told to."""
    status = seen_status(run_dir)
    return status.get("state") == "preempted" and status.get("pid") in {process.pid for process in processes}


def _stopped(run_dir: Path, codes: Sequence[int], received: Sequence[signal.Signals], *, preempted: bool) -> None:
    """Raises what it amounts to that ranks ended early because they were told to; returns where they were not."""
    if not preempted and not (received and any(codes)):
        return
    interrupted = signal.SIGINT in received
    if not preempted:
        record_failure(run_dir, "interrupted" if interrupted else f"ended by {received[-1].name}")
    if interrupted:
        raise KeyboardInterrupt
    raise SystemExit(next((code for code in codes if code > 0), 143))


def _failed(run_dir: Path, codes: Sequence[int], hung: set[int], folder: Path) -> None:
    """Raises the error that all others follow from; returns where there is none.

    A rank that was killed cannot have followed from another's error; of errors the earliest is the first, and that of
    the lowest rank where all have the same, as with a wrong setting.
    """
    files = {rank: folder / f"{rank}.json" for rank, code in enumerate(codes) if code and rank not in hung}
    if not files:
        return
    errors = {rank: json.loads(path.read_text()) for rank, path in files.items() if path.is_file()}
    killed = next((rank for rank in files if rank not in errors), None)
    if killed is not None:
        reason = f"rank {killed} of {len(codes)} {_end_of(codes[killed])}"
        if killed and (said := (folder / f"{killed}.err").read_text(errors="replace").strip()):
            print("\n".join(said.splitlines()[-20:]), file=sys.stderr)
        record_failure(run_dir, reason)
        raise app.Reported(reason)
    earliest = min(errors.values(), key=lambda error: error["time"])
    same = [rank for rank, error in errors.items() if error["reason"] == earliest["reason"]]
    of = "" if len(same) == len(codes) else f"rank {same[0]} of {len(codes)}: "
    record_failure(run_dir, of + earliest["reason"])
    if earliest["sentence"] is not None:
        raise UserError(of + earliest["sentence"])
    print(earliest["traceback"], file=sys.stderr)
    raise app.Reported(of + earliest["reason"])


def _end_of(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    memory = ", as where memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{memory}"


def record_failure(run_dir: Path, reason: str) -> None:
    """What the first rank could not know, or had no time to write; not where another process trains the run."""
    status = seen_status(run_dir)
    state, own = status.get("state"), status.get("pid") == os.getpid()
    if state in ("finished", "preempted", UNREADABLE) or (state == "running" and not own and is_alive(status)):
        return
    with suppress(UserError, OSError):  # the disk is full, which may be the reason
        write_json(run_dir / "status.json", {**status, "state": "failed", "reason": reason})


def main() -> None:
    """A rank of ``train_on_devices``: mrgen-train, which leaves to its parent to say what it died of."""
    from mrgen.train import task

    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)  # no orphans, however the parent ends
    if os.getppid() != int(os.environ[PARENT]):
        sys.exit(1)
    # Around the task as well: Hydra would say more of its failure than the parent wants to.
    with _died_of():
        app.run_hydra("train", _died_of()(task))


@contextmanager
def _died_of() -> Iterator[None]:
    """Leaves an error to the parent, and ends this process."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        died = {
            "time": time.time(),
            "reason": f"{type(error).__name__}: {error}",
            "sentence": app.sentence(error),
            "traceback": traceback.format_exc(),
        }
        write_json(Path(os.environ[FILE]), died)
        sys.exit(1)


if __name__ == "__main__":
    main()
