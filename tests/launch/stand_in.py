"""In the place of ``mrgen.launch.training``, for tests of what happens around a training: it starts without torch.

``target`` says what becomes of it.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


def train(conf: DictConfig, run_dir: Path) -> Path:
    """Notes what a rank was given, and ends as ``conf.target`` says."""
    from mrgen.launch.status import recorded

    rank = int(os.environ.get("LOCAL_RANK", 0))
    with recorded(run_dir, command="mrgen-train", enabled=rank == 0) as outcome:
        outcome.begun = True
        OmegaConf.save(OmegaConf.create(OmegaConf.to_container(conf, resolve=True)), run_dir / "config.yaml")
        seen: dict[str, Any] = {
            "conf": OmegaConf.to_container(conf, resolve=True),
            "environment": {name: os.environ.get(name) for name in ("WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")},
            "pid": os.getpid(),
        }
        (run_dir / f"rank{rank}.json").write_text(json.dumps(seen))
        ENDS.get(conf.target, lambda rank: None)(rank)
        if rank == 0:
            rows = "".join(f"{epoch},{epoch},{conf.model.lr * (2 - epoch)}\n" for epoch in range(2))
            (run_dir / "metrics.csv").write_text(f"epoch,step,{conf.monitor}\n{rows}")
    return run_dir


def _wrong(rank: int) -> None:
    from mrgen.errors import UserError

    raise UserError("a wrong setting")


def _wrong_in_one(rank: int) -> None:
    from mrgen.errors import UserError

    if rank == 1:
        raise UserError("no store here")
    _hang(rank)


def _bug(rank: int) -> None:
    raise RuntimeError("a bug")


def _follows(rank: int) -> None:
    """The first rank fails because the other one was killed."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    raise RuntimeError("connection closed by peer")


def _hang(rank: int) -> None:
    """As in a collective operation that others do not join."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def _patient(rank: int) -> None:
    """Ends by itself once it is told to."""
    time.sleep(60)


def _leave(rank: int) -> None:
    os.environ["MASTER_PORT"] = "1"
    os.environ["LEFT_BY_A_JOB"] = "yes"


ENDS = {
    "wrong": _wrong,
    "wrong_in_one": _wrong_in_one,
    "bug": _bug,
    "killed": _follows,
    "hangs": _hang,
    "patient": _patient,
    "leaves": _leave,
}
