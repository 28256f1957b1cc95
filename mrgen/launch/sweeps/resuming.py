"""``resume=FOLDER``: what was started there once is started again, of a run or of a whole sweep.

The folder may be somebody else's. What it says of a run or a sweep is data (``mrgen.launch.build``); Hydra never looks
for configs in it.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mrgen.errors import UserError
from mrgen.files import read_yaml
from mrgen.launch.paths import CONF_DIR

__all__ = ["MULTIRUN", "as_written", "is_free", "quoted", "refuse_links", "resumed", "saved_config", "settled"]

MULTIRUN = "multirun.yaml"
SUBMITIT = ".submitit"
# What may be another when a run goes on, because it changes nothing of what the weights will be, or only how long they
# are trained. All below a key is meant as well.
FREE = (
    *("callbacks.images", "data.root", "data.store", "data.workers", "launch", "name", "plan", "resume", "tracking"),
    *("trainer.accelerator", "trainer.enable_progress_bar", "trainer.log_every_n_steps"),
    *("trainer.max_epochs", "trainer.max_time", "trust"),
    # Of a layout what says which folders and masks a preparation takes; earlier versions had neither.
    *("data.layout.brain", "data.layout.other_collections"),
)


def is_free(key: str) -> bool:
    """Whether a key of the config may be another when a run goes on."""
    return any(f"{key}.".startswith(f"{free}.") for free in FREE)


def as_written(overrides: Any) -> list[str]:
    """A list of arguments that a config holds, with interpolations that are for a job to resolve."""
    return OmegaConf.to_container(overrides, resolve=False)  # type: ignore[return-value]


def settled(config: DictConfig) -> DictConfig:
    """A copy with the values of ``${hydra:…}``, which another process would look up in a Hydra of its own."""
    content = OmegaConf.to_container(config, resolve=False)

    def settle(here: Any, node: Any) -> None:
        for key, value in list(here.items() if isinstance(here, dict) else enumerate(here)):
            if isinstance(value, dict | list):
                settle(value, node[key])
            elif isinstance(value, str) and "${hydra:" in value:
                here[key] = node[key]

    settle(content, config)
    return OmegaConf.create(content)  # type: ignore[arg-type,return-value]


def quoted(path: Path) -> str:
    """A path as Hydra's grammar reads it back, whatever characters it holds."""
    return "'" + str(path).replace("'", r"\'") + "'"


def saved_config(config_dir: Path, run_dir: Path) -> list[str]:
    """Arguments of mrgen-train for the ``config.yaml`` of a folder, in the folder of its run.

    Args:
        config_dir: holds ``config.yaml``.
        run_dir: the run's folder.
    """
    return [
        *("--config-path", str(config_dir.resolve()), "--config-name", "config"),
        *("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.job.name=mrgen-train", "hydra.mode=RUN"),
        *(f"hydra.run.dir={quoted(run_dir.resolve())}", "hydra.output_subdir=null"),
    ]


def resumed(arguments: Sequence[str]) -> list[str]:
    """``resume=FOLDER`` becomes the folder's own config, so that nothing else has to be repeated.

    Args:
        arguments: of mrgen-train.

    Returns:
        Arguments for Hydra; those of before where nothing is resumed.

    Raises:
        UserError: nothing of mrgen-train in the folder, a config that is more than data, or other arguments that would
            make it another run or sweep.
    """
    folders = [_unquoted(a.partition("=")[2]) for a in arguments if a.startswith("resume=")]
    if not folders or folders[-1] in ("", "null") or "--config-path" in arguments:
        return [*arguments]  # the last: a process of a run whose arguments are these already
    # Imported here: of the commands that do not resume it would be half of the time until they answer.
    from mrgen.launch.build import trust
    from mrgen.launch.configs import find_config, read_config

    folder = Path(folders[-1]).expanduser().resolve()
    others = [a for a in arguments if not a.startswith("resume=")]
    trust(_trusted(others))
    refuse_links(folder)
    if (folder / MULTIRUN).is_file():
        return _resumed_sweep(folder, others)
    # The run writes config.yaml once its store was found; Hydra's copy, not resolved, is there from the start.
    saved = find_config(folder)
    if saved is None:
        raise UserError(
            f"resume={folder}: no config.yaml or {MULTIRUN} there; expected the folder of a run or a sweep of "
            "mrgen-train"
        )
    if {"-m", "--multirun"} & set(arguments):
        raise UserError(f"resume={folder} goes on with one run; leave -m out")
    for argument in others:
        name = argument.partition("=")[0].lstrip("+~").partition("@")[0]
        if "=" in argument and (CONF_DIR / name).is_dir():
            raise UserError(
                f"{argument}: a resumed run keeps its {name}; only what leaves its weights alone can be changed, and "
                "trainer.max_epochs"
            )
    conf = read_config(saved)
    conf["trust"] = []  # is said by who resumes, not by the folder
    copy = Path(tempfile.mkdtemp(prefix="mrgen-resume-"))  # which nobody else can write to
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    OmegaConf.save(conf, copy / "config.yaml")
    return [*saved_config(copy, folder), f"resume={quoted(folder)}", *others]


def _unquoted(text: str) -> str:
    """A path without the quotes that Hydra's grammar asks for around some."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("\\" + text[0], text[0])
    return text


def _trusted(arguments: Sequence[str]) -> Any:
    """The value of ``trust=…`` on the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [a for a in arguments if a.startswith("trust=")]
    return OverridesParser.create().parse_override(given[-1]).value() if given else []


def refuse_links(folder: Path) -> None:
    """Raises UserError where a link lies in a folder that is to be written to: what it points to is somebody else's.

    Those that W&B puts into its own folder are left alone, as it replaces them, and submitit's to files beside them.
    """
    if folder.is_symlink():
        raise _linked(folder)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not (path.parent.name == SUBMITIT and path.resolve().parent == path.parent):
                raise _linked(path)
        if {".hydra", "config.yaml"} & {*folders, *files}:  # of a run
            folders[:] = [name for name in folders if name != "wandb"]


def _linked(path: Path) -> UserError:
    return UserError(
        f"{path}: found a link to {os.readlink(path)}, expected what mrgen-train wrote; put back what it stands for, "
        "or remove it"
    )


def _resumed_sweep(folder: Path, others: Sequence[str]) -> list[str]:
    """The same sweep in the same folder, each of whose jobs goes on with its own."""
    from mrgen.launch.sweeps.jobs import read_jobs
    from mrgen.launch.sweeps.saved_arguments import check_arguments

    read_jobs(folder)  # raises UserError for a sweep of an earlier version, whose runs can be resumed one by one
    content = _read_multirun(folder / MULTIRUN)
    if content.sampler.get("seed", 0) is None:
        raise UserError(
            f"resume={folder}: its trials were drawn without a seed and cannot be drawn again; resume its runs one by "
            "one, and set hydra.sweeper.sampler.seed for the next sweep"
        )
    options, others = _split(others)
    new = {a.partition("=")[0] for a in others}
    once = [
        argument
        for argument in dict.fromkeys(content.overrides)
        if not argument.startswith(("resume=", "plan=", "trust=", "hydra.sweep.dir=", "hydra.mode="))
    ]
    check_arguments([a for a in once if a.partition("=")[0] not in new], folder / MULTIRUN)
    for path in content.config_dirs:
        if path not in {str(Path(option).expanduser().resolve()) for option in options}:
            raise UserError(
                f"resume={folder}: the sweep was started with configs of a folder, which decide what runs and are not "
                f"taken from here; if they are yours, add --config-dir {path}"
            )
    _check_sweep(folder, once, others)
    return [
        *(argument for path in options for argument in ("--config-dir", path)),
        "--multirun",
        *(a for a in once if a.partition("=")[0] not in new),
        *(a for a in others if a not in ("-m", "--multirun")),
        f"hydra.sweep.dir={quoted(folder)}",
        "resume=${hydra:runtime.output_dir}",
    ]


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The folders behind ``--config-dir`` or ``-cd``, and all other arguments."""
    options, others, rest = [], [], iter(arguments)
    for argument in rest:
        if argument in ("--config-dir", "-cd"):
            options.append(next(rest, ""))
        elif argument.startswith("--config-dir="):
            options.append(argument.partition("=")[2])
        else:
            others.append(argument)
    return options, others


@dataclass(frozen=True)
class _Multirun:
    """What counts of a sweep's ``multirun.yaml``.

    Attributes:
        overrides: what the sweep was started with.
        config_dirs: further folders of configs.
        sampler: what draws the jobs of a search.
    """

    overrides: list[str]
    config_dirs: list[str]
    sampler: dict[str, Any]


def _read_multirun(path: Path) -> _Multirun:
    """Raises UserError where the file is damaged. Its interpolations are Hydra's business, and are not resolved."""
    remedy = "put back a copy that is whole, or resume its runs one by one"
    content = read_yaml(path, expected="the config of a sweep", remedy=remedy)
    try:
        hydra = content["hydra"]
        overrides = [*hydra["overrides"]["hydra"], *hydra["overrides"]["task"]]
        sources = hydra["runtime"]["config_sources"]
        dirs = [source["path"] for source in sources if source["provider"] == "command-line"]
        sampler = dict(hydra["sweeper"].get("sampler") or {})
        if all(isinstance(text, str) for text in (*overrides, *dirs)):
            return _Multirun(overrides, dirs, sampler)
        found = "arguments that are no text"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise UserError(f"{path}: found {found}, expected the config of a sweep; {remedy}")


def _check_sweep(folder: Path, once: Sequence[str], others: Sequence[str]) -> None:
    """Raises UserError for arguments that would make other jobs of a sweep, or give them other numbers."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parse = OverridesParser.create().parse_override
    swept = {key for a in once if (o := parse(a)).is_sweep_override() and (key := o.get_key_element())}
    for argument in others:
        if argument.startswith("-"):
            continue
        override = parse(argument)
        key = override.get_key_element()
        if override.is_sweep_override() or key in swept:
            raise UserError(f"{argument}: {folder} goes on with the jobs it has; start another sweep for others")
        # Otherwise jobs that have not begun would train with it, and those that have would refuse it ever after; by
        # another name they would begin anew in other folders.
        kept = key == "name" or not is_free(key) or (CONF_DIR / key).is_dir()
        if kept and argument not in once and not key.startswith(("hydra/", "hydra.")):
            raise UserError(
                f"{argument}: a resumed sweep keeps its {key}; only what leaves its weights alone can be changed, and "
                "trainer.max_epochs"
            )
