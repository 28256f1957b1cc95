"""What the console scripts share: Hydra around a task, errors as sentences, ``resume=FOLDER``.

Nothing heavy is imported here: ``--help`` must answer in about a second.
"""

import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import hydra
import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mrgen.errors import UserError
from mrgen.launch.paths import CONF_DIR

__all__ = ["register_resolvers", "run_app"]

# One token a process: two runs or sweeps that start in the same second must not share a folder.
_token = secrets.token_hex(2)


def register_resolvers() -> None:
    """The resolvers that ``conf/`` uses beyond OmegaConf's own."""
    OmegaConf.register_new_resolver("token", lambda: _token, replace=True)
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


def run_app(config_name: str, task: Callable[[DictConfig], None]) -> None:
    """Runs a task as a Hydra application on ``sys.argv``.

    A ``UserError``, Hydra's own complaints and a YAML file that is none end as one message and exit code 1; anything
    else keeps its traceback.

    Args:
        config_name: primary config below ``conf/``.
        task: called with the composed config, once a job.
    """
    register_resolvers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come here whole, and here they are sorted
    try:
        if config_name == "train":
            sys.argv[1:] = _resumed(sys.argv[1:])
        hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base="1.3")(task)()
    except UserError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        if ours := _of_resolver(error):
            _fail(ours)
        hint = "\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."
        _fail(str(error).replace(hint, "") + _valid_keys(error) + _presets(error))
    except yaml.YAMLError as error:
        _fail(f"a YAML file cannot be read: {error}")
    except KeyboardInterrupt:
        _fail("interrupted")


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
    """The presets there are, where one was asked for that is not."""
    if not isinstance(error, MissingConfigException) or not str(error.missing_cfg_file).startswith("experiment/"):
        return ""
    folder = CONF_DIR / "experiment"
    presets = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return f"\npresets: {', '.join(presets)}"


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def _resumed(arguments: list[str]) -> list[str]:
    """``resume=FOLDER`` becomes the folder's own resolved config, so that nothing else has to be repeated."""
    folders = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    if not folders or folders[-1] in ("", "null") or "--config-path" in arguments:
        return arguments  # the last: another rank of a resumed run, whose arguments are these already
    if {"-m", "--multirun"} & set(arguments):
        raise UserError("resume goes on with one run; leave -m out and resume the runs of a sweep one by one")
    folder = Path(folders[-1]).expanduser().resolve()
    # The run writes config.yaml once its store was found; Hydra's copy is there from the start.
    saved = next((place for place in (folder, folder / ".hydra") if (place / "config.yaml").is_file()), None)
    if saved is None:
        raise UserError(f"resume={folders[-1]}: no config.yaml there; expected the folder of a run of mrgen-train")
    quoted = "'" + str(folder).replace("'", r"\'") + "'"  # a path may hold characters that Hydra's grammar reads
    others = [a for a in arguments if not a.startswith("resume=")]
    for argument in others:
        name = argument.partition("=")[0].lstrip("+~").partition("@")[0]
        if "=" in argument and (CONF_DIR / name).is_dir():
            raise UserError(
                f"{argument}: a resumed run keeps its {name}; single values can be changed: {name}.KEY=VALUE"
            )
    return [
        *("--config-path", str(saved), "--config-name", "config"),
        *("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.job.name=mrgen-train"),
        *(f"resume={quoted}", f"hydra.run.dir={quoted}", "hydra.output_subdir=null", *others),
    ]
