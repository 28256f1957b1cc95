"""Which arguments of a sweep's folder are taken when it is resumed: those that say what is trained, as data.

What runs on this machine around a training (launchers, what they put in front of a job, callbacks, other folders of
configs) comes from ``conf/`` and from who types the command, never from the folder.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString

from mrgen.errors import UserError
from mrgen.launch.build import check_data
from mrgen.launch.paths import CONF_DIR

__all__ = ["check_arguments"]

# Of Hydra's own groups and keys those that hold a name of conf/, a number or a name that the cluster knows.
GROUPS = ("hydra/launcher", "hydra/sweeper", "hydra/sweeper/sampler", "hydra/job_logging", "hydra/hydra_logging")
LAUNCHER = (
    *("account", "array_parallelism", "constraint", "cpus_per_task", "gpu_type", "gpus_per_node", "mem_gb", "nodes"),
    *("partition", "qos", "signal_delay_s", "tasks_per_node", "timeout_min"),
)
SWEEPER = ("direction", "max_batch_size", "max_failure_rate", "n_jobs", "n_trials", "sampler.seed")
KEYS = (*(f"hydra.launcher.{key}" for key in LAUNCHER), *(f"hydra.sweeper.{key}" for key in SWEEPER))
OURS = ("plan", "resume", "trust")  # said by who resumes
PARAMETERS = "hydra.sweeper.params."
QUOTES = "'\""
PLAIN = re.compile(r"[\w.,:|&+\-]*")  # a word: what stands in a batch script ends with its line
OPTION = re.compile(r"([\w,()\[\] '\"\-]|(?<=\w)/)*")  # names of a group's options, none of which lies outside of conf/


def check_arguments(arguments: Sequence[str], where: Path, *, interpolations: bool = True) -> None:
    """Raises UserError for an argument of a saved sweep that is more than data.

    Args:
        arguments: by Hydra's grammar, as the sweep was started.
        where: the file that holds them.
        interpolations: whether they may refer to other keys.
    """
    parser = OverridesParser.create()
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except Exception as error:
            raise UserError(f"{where}: found the argument {argument!r}, which Hydra cannot read ({error})") from None
        key, text = override.key_or_group, argument.partition("=")[2]
        if key.startswith(PARAMETERS):  # each of which becomes an argument of the jobs
            inner = f"{key.removeprefix(PARAMETERS)}={text.strip(QUOTES)}"
            check_arguments([inner], where, interpolations=False)  # whose text is read once more
            continue
        own = key.split(".")[0].split("/")[0] == "hydra"
        if own and not _is_known(key, text):
            raise UserError(
                f"{where}: the sweep was started with {argument!r}, which decides what runs on this machine and is not "
                "taken from a folder; if you want it, say it again behind resume="
            )
        if override.package not in (None, "_global_") or key in OURS:
            raise UserError(f"{where}: found {argument!r}, expected what the jobs train; restore the file")
        if ".." in key or ((CONF_DIR / key).is_dir() and not OPTION.fullmatch(text)):
            raise UserError(f"{where}: found {argument!r}, expected an option that lies in conf/{key}")
        if not own:
            check_data(_values(override), where, interpolations=interpolations)


def _is_known(key: str, text: str) -> bool:
    return key in (*GROUPS, *KEYS) and bool(PLAIN.fullmatch(text.strip(QUOTES)))


def _values(override: Override) -> Any:
    """What an override sets, as plain containers, each of a sweep's choices among them."""
    value = override._value
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    name = override.key_or_group.rpartition(".")[2]
    return [{name: _plain(value)} for value in values]


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    return str(value.__dict__ if hasattr(value, "__dict__") else value)  # a range: numbers
