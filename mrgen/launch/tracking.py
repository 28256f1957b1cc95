"""Weights & Biases beside the CSV: online when logged in, offline otherwise, never a prompt."""

import os
import re
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger

from mrgen.errors import UserError

__all__ = ["finish_wandb", "wandb_logger", "wandb_mode"]


def wandb_mode() -> str:
    """``WANDB_MODE`` where it is set, else ``online`` with stored or given credentials, else ``offline``."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "online" if netrc.netrc(os.environ.get("NETRC")).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def wandb_logger(run_dir: Path, *, project: str, name: str, group: str | None, config: dict[str, Any]) -> Logger:
    """A logger whose files lie in the run's folder.

    Args:
        run_dir: the run's folder; its name is the run's id, so that a resumed run goes on in the same W&B run.
        project: W&B project.
        name: shown name.
        group: sweep that the run belongs to, or None.
        config: resolved config.
    """
    try:
        import wandb
    except ImportError as error:  # pragma: no cover - a dependency of the package
        raise UserError("tracking=wandb: the package wandb is not installed; install it or set tracking=csv") from error
    return WandbLogger(
        project=project,
        name=name,
        id=re.sub(r"[^\w.=,-]", "-", "-".join(run_dir.parts[-2:]))[-100:],  # W&B refuses some characters
        group=group,
        save_dir=str(run_dir),
        resume="allow",
        config=config,
        mode=wandb_mode(),
        settings=wandb.Settings(silent=True, console="off", init_timeout=60),
    )


def finish_wandb(run_dir: Path, *, failed: bool) -> None:
    """Ends the run inside the task, with its exit code, and says how to send an offline one."""
    import wandb

    if wandb.run is None:
        return
    offline = wandb.run.settings.mode == "offline"
    wandb.finish(exit_code=int(failed))
    if offline and (folders := sorted((run_dir / "wandb").glob("offline-run-*"))):
        print(f"W&B was offline; send the run with: wandb sync {folders[-1]}")
