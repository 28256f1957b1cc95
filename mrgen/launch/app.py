"""What the console scripts share: Hydra around a task, errors as sentences, ``resume=FOLDER``.

Nothing heavy is imported here: ``--help`` must answer in about a second.
"""

import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException
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


def run_app(config_name: str, task: Callable[[DictConfig], None]) -> None:
    """Runs a task as a Hydra application on ``sys.argv``.

    A ``UserError`` and Hydra's own complaints end as one message and exit code 1; anything else keeps its traceback.

    Args:
        config_name: primary config below ``conf/``.
        task: called with the composed config, once a job.
    """
    register_resolvers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come here whole, and here they are sorted
    try:
        sys.argv[1:] = _resumed(sys.argv[1:])
        hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base="1.3")(task)()
    except UserError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(str(error).replace("\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.", ""))
    except KeyboardInterrupt:
        _fail("interrupted")


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def _resumed(arguments: list[str]) -> list[str]:
    """``resume=FOLDER`` becomes the folder's own resolved config, so that nothing else has to be repeated."""
    folders = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    if not folders or folders[-1] in ("", "null"):
        return arguments
    folder = Path(folders[-1]).expanduser().resolve()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"resume={folders[-1]}: no config.yaml there; expected the folder of a run of mrgen-train")
    others = [a for a in arguments if not a.startswith("resume=")]
    return [
        *("--config-path", str(folder), "--config-name", "config"),
        # Quoted, because a path may hold characters that Hydra's grammar reads.
        *(f"resume='{folder}'", f"hydra.run.dir='{folder}'", "hydra.output_subdir=null", *others),
    ]
