"""What the console scripts share: Hydra around a task, and errors as sentences.

Nothing heavy is imported here: ``--help`` must answer in about a second.
"""

import errno
import functools
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mrgen.errors import UserError
from mrgen.files import FULL
from mrgen.launch.memory import out_of_memory
from mrgen.launch.paths import CONF_DIR

__all__ = ["TOKEN", "Reported", "fail", "leave_nothing", "register_resolvers", "run_app", "run_hydra", "sentence"]

# What a library meets in a place that the user gave it: no permission, a file system that is read only, no room.
PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, *FULL}
# What lies in a folder of which nothing came.
NOTHING = {".hydra", "config.yaml", "environment.json", "split.json", "status.json"}

LONGEST = 2000  # characters of a message that somebody reads
# One token a process: two runs or sweeps that start in the same second must not share a folder.
TOKEN = secrets.token_hex(2)


class Reported(Exception):
    """A bug or an accident whose details have been printed; its message is one sentence."""


def register_resolvers() -> None:
    """The resolvers that ``conf/`` uses beyond OmegaConf's own."""
    OmegaConf.register_new_resolver("token", lambda: TOKEN, replace=True)
    OmegaConf.register_new_resolver("float", _float, replace=True)
    OmegaConf.register_new_resolver("row", _row, replace=True)
    OmegaConf.register_new_resolver("synthetic_store", _synthetic_store, replace=True)


def _float(value: object) -> object:
    """1, 1.0 and 1.00 are one name; what is no number is refused where it is used."""
    return float(value) if isinstance(value, int | float) else value


def _row(rows: Mapping[int, Mapping[str, object]], row: object, key: str) -> object:
    """One value of a row of a preset's table."""
    if row not in rows:
        raise UserError(f"row={row}: found no such row; expected one of {', '.join(map(str, rows))}")
    return rows[row][key]  # type: ignore[index]


def _synthetic_store(name: str, fraction: float) -> str | None:
    """The synthetic cohort of a generator's run, or at a path; None where no slice of it is asked for."""
    if not fraction:
        return None
    return name if os.sep in name else f"{os.environ.get('MRGEN_STORES', 'stores')}/synthetic_{name}"


def run_app(config_name: str, task: Callable[[DictConfig], object]) -> None:
    """Runs a task as a Hydra application on ``sys.argv``.

    What ``sentence`` knows ends as one message and exit code 1; anything else keeps its traceback.

    Args:
        config_name: primary config below ``conf/``.
        task: called with the composed config, once a job.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a file's name may hold what the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    pressed = _end_at_the_second_interrupt()
    try:
        run_hydra(config_name, _refusing(task))
    except Exception as error:
        if pressed:  # in the middle of a library, which made another error of it
            fail("interrupted")
        if (said := sentence(error)) is None:
            raise
        fail(said)
    except KeyboardInterrupt:
        fail("interrupted")


def _end_at_the_second_interrupt() -> list[int]:
    """Ctrl-C raises KeyboardInterrupt, as ever; once more, while what was begun is being ended, it ends the process.

    Returns:
        A list that is no longer empty once it was pressed.
    """
    process, pressed = os.getpid(), list[int]()
    if threading.current_thread() is not threading.main_thread():
        return pressed
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # nohup, or whoever calls this
        return pressed

    def interrupt(number: int, frame: object) -> None:
        if pressed:
            if os.getpid() == process:  # and not one that was forked
                os.write(2, b"error: interrupted twice, and ended at once; what was saved before is whole\n")
            os._exit(130)
        pressed.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    return pressed


def _refusing(task: Callable[[DictConfig], object]) -> Callable[[DictConfig], object]:
    """A task that says itself what its user can mend: Hydra would put a line of its own in front."""

    @functools.wraps(task)
    def refusing(conf: DictConfig) -> object:
        try:
            return task(conf)
        except Exception as error:
            hydra_conf = HydraConfig.get()
            if hydra_conf.mode != RunMode.RUN or (said := sentence(error)) is None:
                raise
            leave_nothing(Path(hydra_conf.runtime.output_dir))
            fail(said)

    return refusing


def leave_nothing(folder: Path) -> None:
    """Removes the folder that a process made for what then was refused; one that a user has named stays."""
    if TOKEN in folder.name and folder.is_dir() and all(path.name in NOTHING for path in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # others lie beside it
            folder.parent.rmdir()


def run_hydra(config_name: str, task: Callable[[DictConfig], object]) -> None:
    """The same, with every exception as it was raised."""
    register_resolvers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come here whole, and here they are sorted
    if config_name == "train":
        from mrgen.launch.sweeps.resuming import resumed

        sys.argv[1:] = resumed(sys.argv[1:])
    hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base="1.3")(task)()


def sentence(error: BaseException) -> str | None:
    """What to tell a user who can mend it; None for a bug of ours.

    A ``UserError``, what has been reported, Hydra's own complaints, a YAML file that is none, a place that cannot be
    written to and memory that ran out are of the first kind.
    """
    if isinstance(error, UserError | Reported):
        return str(error)
    if said := out_of_memory(error):
        return said
    if isinstance(error, HydraException | OmegaConfBaseException):
        if ours := _of_resolver(error):
            return ours
        if isinstance(error, MissingConfigException):
            return _missing(error)
        # Of Hydra's advice what would end in a key that nobody reads, or in a traceback.
        unwanted = ("Set the environment variable HYDRA_FULL_ERROR", "To append to your config use")
        lines = [line for line in str(error).splitlines() if not line.startswith(unwanted)]
        return "\n".join(lines) + _valid_keys(error) + _elsewhere(str(error))
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):
        return f"{error}\nFor none of a group's options write an empty list: callbacks=[]"
    if isinstance(error, yaml.YAMLError):
        return f"a YAML file cannot be read: {error}"
    if isinstance(error, OSError) and error.errno in PLACE:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{os.strerror(error.errno)}; this process must be able to read and write there, and needs room"
    return None


def fail(message: str) -> NoReturn:
    """One line on stderr, and exit code 1. Of a value without an end, which a damaged file may hold, only the start."""
    if len(message) > LONGEST:
        message = f"{message[:LONGEST]}… ({len(message) - LONGEST:,} more characters)"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def _of_resolver(error: BaseException) -> str | None:
    """What one of our resolvers said, without what OmegaConf and Hydra put around it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else str(cause)


def _valid_keys(error: BaseException) -> str:
    """The names beside a key that the config does not have; Hydra says only that it is not there."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and "not in struct" in str(cause):
            parent = cause.parent_node
            return f"\nvalid keys: {', '.join(map(str, parent))}" if isinstance(parent, DictConfig) else ""
        cause = cause.__cause__ or cause.__context__
    return ""


def _elsewhere(said: str) -> str:
    """Where what was asked for would be right."""
    if "No match in the defaults list" in said and "'experiment/" in said:
        return "\nIt is a preset of another command: mrgen-train trains, mrgen-evaluate judges."
    options = (path.stem for path in (CONF_DIR / "callbacks").glob("*.yaml"))
    asked = next((name for name in options if f"'callbacks.{name}." in said), None)
    return f"\nThis run has no such callback: callbacks=[images,{asked}] adds it." if asked else ""


def _missing(error: MissingConfigException) -> str:
    """What there is in a group, where an option was asked for that is not; or the package that brings it."""
    said = str(error).partition("\nConfig search path:")[0].rstrip()
    missing = str(error.missing_cfg_file)
    if missing.startswith("hydra/sweeper/optuna"):
        return f"{said}\nOptuna is not installed: pip install 'mrgen[optuna]'"
    group, _, asked = missing.partition("/")
    folder = CONF_DIR / group
    if group not in ("experiment", "trainer", "callbacks"):  # of the others Hydra tells
        return said
    options = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    near = get_close_matches(asked, options, 3)
    return (
        said.partition("\n")[0]
        + (f"\nnearest: {', '.join(near)}" if near else "")
        + f"\n{'presets' if group == 'experiment' else 'options'}: {', '.join(options)}"
    )
