"""Services beside the CSV: Weights & Biases, online when logged in, offline otherwise, never a prompt; or TensorBoard.

The CSV is the source of truth. No service can end a training, or keep it waiting for more than seconds.
"""

import configparser
import csv
import hashlib
import os
import re
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from mrgen.errors import Preempted, UserError
from mrgen.files import read_json, read_yaml
from mrgen.launch.guarded import Guarded, within
from mrgen.launch.instantiate import plain

__all__ = ["loggers", "run_group", "run_name", "source_commit", "track_results", "wandb_mode"]

MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline"}
MODES |= {"disabled": "disabled", "shared": "shared"}
START, END = 60.0, 120.0  # seconds that W&B has to begin a run, and to send what is left of it,
HURRY = 20.0  # or of a preempted one, whose process is soon killed
GRACE, RELEASE = 15.0, 5.0  # that its own limit at the start may be late, and to let go of a service that failed
NAME = 128  # characters that W&B shows
# Overrides that say nothing of a run, or that its preset's name says.
UNNAMED = (
    *("experiment", "name", "resume", "plan", "tracking", "launch", "callbacks.images"),
    *("data.root", "data.store", "data.workers"),
)


# ----- what a run is called ------------------------------------------------------------------------------------------


def run_name(name: str, run_dir: Path) -> str:
    """The preset's name and the overrides of the command line, those first by which a sweep's jobs differ.

    Args:
        name: of the preset, ``conf.name``.
        run_dir: Hydra keeps the overrides there, whoever trains in it: the command, a rank of it, or a resumed run.

    Returns:
        At most 128 characters, such as ``rsnet-t2 model.lr=0.001 seed=1``.
    """
    overrides = _yaml(run_dir / ".hydra" / "overrides.yaml")
    overrides = overrides if isinstance(overrides, list) else []
    sweep = _sweep_dir(run_dir)
    asked: Any = _yaml(sweep / "multirun.yaml") if sweep else None
    try:
        common = asked["hydra"]["overrides"]["task"] or []
    except (KeyError, TypeError):
        common = []
    silent = re.compile(rf"[+~]*({'|'.join(map(re.escape, UNNAMED))})([=.@/].*)?", re.DOTALL)
    told = [text for text in map(str, overrides) if not silent.fullmatch(text)]
    text = " ".join([name, *sorted(told, key=lambda override: override in common)])
    return text if len(text) <= NAME else f"{text[: NAME - 1]}…"


def run_group(run_dir: Path) -> str | None:
    """The name of the sweep's folder that a run lies in, or None."""
    sweep = _sweep_dir(run_dir)
    return None if sweep is None else sweep.name


def _sweep_dir(run_dir: Path) -> Path | None:
    parent = run_dir.absolute().parent
    return parent if any((parent / name).is_file() for name in ("multirun.yaml", "sweep.json")) else None


def _yaml(path: Path) -> Any:
    """What a service is told of a run; nothing where it is not there, or damaged."""
    with suppress(UserError):
        return read_yaml(path, expected="what Hydra wrote", remedy="put back a copy that is whole")
    return None


def source_commit() -> str | None:
    """The git commit of mrgen's source, with ``-dirty`` where it was changed; None where it is in no repository."""
    import subprocess

    # The repository may be another's, in which mrgen is only installed: it may neither run programs nor hooks, and what
    # the environment says of a repository is of another one.
    git = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C", str(Path(__file__).parent)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_ALLOW_PROTOCOL"] = "none"  # or what a partial clone lacks would be fetched, by any program
    run = partial(subprocess.run, capture_output=True, check=True, timeout=20, env=environment)
    known = ["ls-files", "--error-unmatch", Path(__file__).name]  # a wheel may be installed inside another repository
    try:
        run([*git, *known])
        commit = run([*git, "rev-parse", "HEAD"], text=True).stdout.strip()
        tracked = run([*git, "ls-tree", "-r", "-z", "--full-tree", "HEAD"], text=True).stdout
        root = Path(run([*git, "rev-parse", "--show-toplevel"], text=True).stdout.removesuffix("\n"))
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    # Compared here: git would run the filters that the repository names.
    lines = [line.partition("\t") for line in tracked.split("\0") if line]
    changed = any(_blob(root / name, len(about.split()[2])) != about.split()[2] for about, _, name in lines)
    return commit + "-dirty" * changed


def _blob(path: Path, digits: int) -> str | None:
    """What git calls a file's content, by SHA-1 or SHA-256; None where there is no such file."""
    try:
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
    except OSError:
        return None
    digest = hashlib.sha1 if digits == 40 else hashlib.sha256
    return digest(b"blob %d\0" % len(content) + content).hexdigest()


# ----- W&B: who is asked, and how ------------------------------------------------------------------------------------


def wandb_mode() -> str:
    """``WANDB_MODE`` or what ``wandb offline`` left, else ``online`` with credentials, else ``offline``.

    Raises:
        UserError: ``WANDB_MODE`` is none of W&B's, or online while nobody is logged in, which W&B would ask about.
    """
    asked = os.environ.get("WANDB_MODE")
    if asked and asked not in MODES:
        raise UserError(f"WANDB_MODE is {asked!r}; expected one of {', '.join(MODES)}; change it, or unset it")
    mode = MODES.get(asked or _settled("mode") or "")
    if mode in ("offline", "disabled"):
        return mode
    if _logged_in():
        return mode or "online"
    if asked:
        raise UserError(
            f"WANDB_MODE is {asked} and nobody is logged in; call wandb login, set WANDB_API_KEY, or unset WANDB_MODE"
        )
    return "offline"


def _settled(key: str) -> str | None:
    """What ``wandb offline`` (``mode``) or ``wandb login --host`` (``base_url``) wrote, for this folder or the user."""
    home = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read([home / "settings", Path("wandb") / "settings"], encoding="utf-8")  # the later one counts
    return settings.get("default", key, fallback=None)


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import netrc
    from urllib.parse import urlparse

    server = os.environ.get("WANDB_BASE_URL") or _settled("base_url") or "https://api.wandb.ai"
    host = urlparse(server).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb(conf: DictConfig, folder: Path, mode: str, **settings: Any) -> Guarded | None:
    """A run of W&B whose files lie in the folder; offline where it cannot begin online, None where it cannot at all."""
    try:
        import wandb
    except ImportError as error:  # pragma: no cover - a dependency of the package
        raise UserError("tracking=wandb: the package wandb is not installed; install it or set tracking=csv") from error

    own = _wandb_id(folder)

    def begin(mode: str) -> Any:
        run = wandb.init(
            project=conf.tracking.project,
            id=own,
            dir=str(folder),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",  # leaves alone whatever else the process tracks
            # Without git, which would run what the repository of the working folder says; environment.json has ours.
            settings=wandb.Settings(silent=True, console="off", init_timeout=START, disable_git=True),
            **settings,
        )
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    for attempt in dict.fromkeys((mode, "offline")):
        try:
            run = within(START + GRACE, partial(begin, attempt))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().rstrip(":")
            then = "tracked offline" if attempt != "offline" else "not tracked but in metrics.csv"
            print(f"W&B could not begin a run ({reason}); this one is {then}", flush=True)
            _let_go()
        else:
            if attempt == "online":
                print(f"W&B: {run.url}", flush=True)
            return Guarded(WandbLogger(experiment=run), "W&B", release=partial(_let_go, run))
    return None


def _let_go(run: Any = None) -> None:
    """Forgets a service that failed, and what it would do at the process's end."""
    import wandb

    for call in (run.finish, wandb.teardown) if run is not None else (wandb.teardown,):
        with suppress(Exception):
            within(RELEASE, call)


def _end_wandb(guarded: Guarded, folder: Path, *, exit_code: int, preempted: bool) -> None:
    """Ends the run inside the task, and says how to send what has not been sent."""
    run = guarded.logger.experiment  # type: ignore[attr-defined]
    offline = run.settings.mode in ("offline", "dryrun")
    if preempted:
        guarded.attempt(run.mark_preempting)  # with an exit code other than 0 it is preempted and not failed
    guarded.attempt(partial(run.finish, exit_code=exit_code), HURRY if preempted else END)
    parts = sorted((folder / "wandb").glob(f"{'offline-' if offline else ''}run-*"))
    if parts and (offline or not guarded.alive):
        # Of runs that were online W&B sends nothing unless it is told to.
        why, how = ("was offline", ()) if offline else ("did not get everything", ("--include-online",))
        print(f"W&B {why}; send the run with: {shlex.join(['wandb', 'sync', *how, *map(str, parts)])}", flush=True)


def _wandb_id(folder: Path) -> str:
    """That of the run whose files lie in the folder, so that it goes on in its own; else a new one.

    The folder's name would not do: a sweep of the same name on another machine would be tracked as one with it.
    """
    names = (re.search(r"run-\d{8}_\d{6}-(.+)", path.name) for path in (folder / "wandb").glob("*run-*"))
    return next((name[1] for name in names if name), secrets.token_hex(8))


# ----- TensorBoard ---------------------------------------------------------------------------------------------------


class _TensorBoard(TensorBoardLogger):
    """Lightning's, with the pictures and tables that its logger of W&B has."""

    def log_image(self, key: str, images: Sequence[str], step: int | None = None) -> None:
        from matplotlib.image import imread

        for path in images:
            self.experiment.add_image(key, imread(path)[..., :3], step, dataformats="HWC")

    def log_table(self, key: str, columns: Sequence[str], data: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *data]
        self.experiment.add_text(key, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))


def _tensorboard(folder: Path, config: Mapping[str, Any]) -> Guarded:
    try:
        logger = _TensorBoard(folder, name=None, version="tensorboard")
    except ModuleNotFoundError as error:
        raise UserError(
            "tracking.tensorboard: the package tensorboard is not installed; install it with pip install "
            "mrgen[tensorboard], or choose tracking=wandb or tracking=csv"
        ) from error
    guarded = Guarded(logger, "TensorBoard")
    text = "\n".join(f"    {line}" for line in OmegaConf.to_yaml(OmegaConf.create(dict(config))).splitlines())
    guarded.attempt(lambda: logger.experiment.add_text("config", text))
    return guarded


# ----- runs and results ----------------------------------------------------------------------------------------------


@contextmanager
def loggers(conf: DictConfig, folder: Path, first: Sequence[Logger] = (), *, job: str = "train") -> Iterator[list[Any]]:
    """``first`` and the services that ``conf.tracking`` asks for; these end with the block, as failed where it fails.

    Args:
        conf: composed config, which they are told.
        folder: of the run or of the results; its ``split.json`` and ``environment.json`` are told as well.
        first: loggers that no service can harm, on every rank.
        job: W&B's job type.

    Raises:
        UserError: a package is missing, or ``WANDB_MODE`` cannot be.
    """
    mode = wandb_mode() if conf.tracking.wandb else "disabled"
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield [*first]
        return
    config = {**plain(conf), **_told(folder)}
    wandb_run = None
    services = [_tensorboard(folder, config)] if conf.tracking.get("tensorboard") else []
    if mode != "disabled":
        wandb_run = _wandb(
            conf,
            folder,
            mode,
            name=run_name(conf.name, folder),
            group=conf.tracking.group or run_group(folder),
            job_type=job,
            config=config,
        )
    services += [wandb_run] if wandb_run is not None else []
    exit_code, preempted = 1, False
    try:
        yield [*first, *services]
        exit_code = 0
    except BaseException as error:
        preempted = isinstance(error, Preempted)
        raise
    finally:
        for service in services:
            service.finalize("success" if exit_code == 0 else "failed")
        if wandb_run is not None:
            _end_wandb(wandb_run, folder, exit_code=exit_code, preempted=preempted)


def _told(folder: Path) -> dict[str, Any]:
    paths = {name: folder / f"{name}.json" for name in ("split", "environment")}
    remedy = "put back a copy that is whole, or remove it"
    return {name: read_json(path, expected="JSON", remedy=remedy) for name, path in paths.items() if path.is_file()}


def track_results(conf: DictConfig, folder: Path) -> None:
    """Shows an evaluation's tables (CSV) and figures (PNG) in the services, as one run of the job type ``evaluation``.

    Args:
        conf: composed config of ``conf/evaluate.yaml``.
        folder: the results'; of what lies in folders below it, such as a blind sheet's key, nothing is shown.
    """
    tables, figures = sorted(folder.glob("*.csv")), sorted(folder.glob("*.png"))
    if not tables and not figures:
        return
    with loggers(conf, folder, job="evaluation") as services:
        for service in services:
            for path in tables:
                columns, rows = _typed(path)
                if rows:
                    service.log_table(path.stem, columns, rows)
            for path in figures:
                service.log_picture(path.stem, path)


def _typed(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a CSV file; a column whose cells are numbers or empty has numbers and None."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restval="")
        rows = list(reader)
        columns = list(reader.fieldnames or [])

    def numbers(cells: Sequence[str]) -> Sequence[Any]:
        try:
            return [float(cell) if cell else None for cell in cells]
        except ValueError:
            return cells

    typed = [numbers([row[column] for row in rows]) for column in columns]
    return columns, [list(row) for row in zip(*typed, strict=True)]
