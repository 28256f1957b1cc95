"""What the console scripts share: Hydra around a task, and errors as sentences.

Nothing heavy is imported here: ``--help`` must answer in about a second.
"""

import os
import secrets
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

import hydra
import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mrgen.errors import UserError
from mrgen.launch.paths import CONF_DIR

__all__ = ["TOKEN", "Reported", "fail", "register_resolvers", "run_app", "run_hydra", "sentence"]

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
    try:
        run_hydra(config_name, task)
    except Exception as error:
        if (said := sentence(error)) is None:
            raise
        fail(said)
    except KeyboardInterrupt:
        fail("interrupted")


def run_hydra(config_name: str, task: Callable[[DictConfig], object]) -> None:
    """The same, with every exception as it was raised."""
    register_resolvers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come here whole, and here they are sorted
    if config_name == "train":
        from mrgen.launch.resuming import resumed

        sys.argv[1:] = resumed(sys.argv[1:])
    hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base="1.3")(task)()


def sentence(error: BaseException) -> str | None:
    """What to tell a user who can mend it; None for a bug of ours.

    A ``UserError``, what has been reported, Hydra's own complaints and a YAML file that is none are of the first kind.
    """
    if isinstance(error, UserError | Reported):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        if ours := _of_resolver(error):
            return ours
        hint = "\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."
        return str(error).replace(hint, "") + _valid_keys(error) + _presets(error)
    if isinstance(error, yaml.YAMLError):
        return f"a YAML file cannot be read: {error}"
    return None


def fail(message: str) -> NoReturn:
    """One line on stderr, and exit code 1."""
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


def _presets(error: BaseException) -> str:
    """The presets there are, where one was asked for that is not; or the package that brings what is missing."""
    missing = str(error.missing_cfg_file) if isinstance(error, MissingConfigException) else ""
    if missing.startswith("hydra/sweeper/optuna"):
        return "\nOptuna is not installed: pip install 'mrgen[optuna]'"
    if not missing.startswith("experiment/"):
        return ""
    folder = CONF_DIR / "experiment"
    presets = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return f"\npresets: {', '.join(presets)}"
