"""``resume=FOLDER``: what was started there once is started again, of a run or of a whole sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mrgen.errors import UserError
from mrgen.files import read_yaml
from mrgen.launch.configs import read_config
from mrgen.launch.paths import CONF_DIR

__all__ = ["MULTIRUN", "as_written", "is_free", "quoted", "resumed", "saved_config", "settled", "unquoted"]

MULTIRUN = "multirun.yaml"
EXPECTED, REMEDY = "what mrgen-train wrote of a sweep", "put back a copy that is whole, or resume its runs one by one"
# What may be another when a run goes on, because it changes nothing of what the weights will be, or only how long they
# are trained. All below a key is meant as well.
FREE = (
    *("callbacks.images", "data.root", "data.store", "data.workers", "launch", "name", "plan", "resume", "tracking"),
    *("trainer.accelerator", "trainer.enable_progress_bar", "trainer.log_every_n_steps"),
    *("trainer.max_epochs", "trainer.max_time"),
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


def unquoted(text: str) -> str:
    """What ``quoted`` wrote, or whoever quotes a path as Hydra's grammar asks for; the text itself without quotes."""
    quote = text[:1]
    if quote not in ("'", '"') or len(text) < 2 or not text.endswith(quote):
        return text
    return text[1:-1].replace(f"\\{quote}", quote)


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
        UserError: nothing of mrgen-train in the folder, or other arguments that would make it another run or sweep.
    """
    folders = [unquoted(a.partition("=")[2]) for a in arguments if a.startswith("resume=")]
    if not folders or folders[-1] in ("", "null") or "--config-path" in arguments:
        return [*arguments]  # the last: a process of a run whose arguments are these already
    folder = Path(folders[-1]).expanduser().resolve()
    others = [a for a in arguments if not a.startswith("resume=")]
    if (folder / MULTIRUN).is_file():
        return _resumed_sweep(folder, others)
    # The run writes config.yaml once its store was found; Hydra's copy is there from the start.
    saved = next((place for place in (folder, folder / ".hydra") if (place / "config.yaml").is_file()), None)
    if saved is None:
        raise UserError(
            f"resume={folders[-1]}: no config.yaml or {MULTIRUN} there; expected the folder of a run or a sweep of "
            "mrgen-train"
        )
    read_config(saved / "config.yaml")  # a damaged one would be Hydra's to complain of
    if {"-m", "--multirun"} & set(arguments):
        raise UserError(f"resume={folders[-1]} goes on with one run; leave -m out")
    for argument in others:
        name = argument.partition("=")[0].lstrip("+~").partition("@")[0]
        if "=" in argument and (CONF_DIR / name).is_dir():
            raise UserError(
                f"{argument}: a resumed run keeps its {name}; only what leaves its weights alone can be changed, and "
                "trainer.max_epochs"
            )
    return [*saved_config(saved, folder), f"resume={quoted(folder)}", *others]


def _resumed_sweep(folder: Path, others: Sequence[str]) -> list[str]:
    """The same sweep in the same folder, each of whose jobs goes on with its own."""
    from mrgen.launch.sweeps.jobs import read_jobs

    read_jobs(folder)  # raises UserError for a sweep of an earlier version, whose runs can be resumed one by one
    content: Any = read_yaml(folder / MULTIRUN, expected=EXPECTED, remedy=REMEDY)
    try:
        content = OmegaConf.create(content)
        hydra = content.hydra
        sweeper = hydra.sweeper
        lists = [as_written(hydra.overrides.hydra), as_written(hydra.overrides.task)]
        sources = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
        if not all(isinstance(text, str) for texts in (*lists, sources) for text in texts):
            raise TypeError("overrides that are no text")
    except Exception as error:  # of whatever is not there
        said = " ".join(str(error).split())
        raise UserError(f"{folder / MULTIRUN}: found {said}, expected {EXPECTED}; {REMEDY}") from None
    if "sampler" in sweeper and "seed" in (sweeper.sampler or {}) and sweeper.sampler.seed is None:
        raise UserError(
            f"resume={folder}: its trials were drawn without a seed and cannot be drawn again; resume its runs one by "
            "one, and set hydra.sweeper.sampler.seed for the next sweep"
        )
    once = [
        argument
        for argument in dict.fromkeys([*lists[0], *lists[1]])
        if not argument.startswith(("resume=", "plan=", "hydra.sweep.dir=", "hydra.mode="))
    ]
    _check_sweep(folder, once, others)
    new = {a.partition("=")[0] for a in others}
    return [
        *(argument for path in sources for argument in ("--config-dir", path)),
        "--multirun",
        *(a for a in once if a.partition("=")[0] not in new),
        *(a for a in others if a not in ("-m", "--multirun")),
        f"hydra.sweep.dir={quoted(folder)}",
        "resume=${hydra:runtime.output_dir}",
    ]


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
