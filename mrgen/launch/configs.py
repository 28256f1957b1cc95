"""Configs of runs, read back from their folders as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mrgen.errors import UserError
from mrgen.files import read_yaml, write_text
from mrgen.launch.build import check_data
from mrgen.launch.instantiate import plain

__all__ = ["find_config", "read_config", "write_config"]

EXPECTED = "the config that mrgen-train wrote"
REMEDY = "put back a copy that is whole"
HIDDEN = ".hydra"  # Hydra's folder
FOREIGN = ("hydra", "defaults")  # launchers, callbacks, other configs: no config of a run has them
# What every config has, a run's own and Hydra's.
KINDS: dict[str, Any] = {"name": str | int | float, "model": Mapping, "data": Mapping, "trainer": Mapping}
# And what it may have; a run that was called 7 has a number for its name.
GROUPS = ("augmentation", "callbacks", "launch", "tracking")


def find_config(run_dir: Path) -> Path | None:
    """The run's own, or Hydra's copy from before its data were found; None where it has not begun."""
    return next((path for path in (run_dir / "config.yaml", run_dir / HIDDEN / "config.yaml") if path.is_file()), None)


def write_config(conf: DictConfig, path: Path) -> None:
    """Writes a config, resolved, as a whole and through no link."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(plain(conf))))


def read_config(path: Path, *, remedy: str = REMEDY) -> DictConfig:
    """The config of a run.

    Args:
        path: of ``config.yaml``; that of Hydra's folder is not resolved yet.
        remedy: what to do where it is damaged.

    Raises:
        UserError: it cannot be read, lacks what every run's has, or says more than data (``check_data``).
    """
    content = read_yaml(path, expected=EXPECTED, remedy=remedy)
    wrong = _wrong(content)
    if wrong is None:
        check_data(content, path, interpolations=path.parent.name == HIDDEN)
        try:
            conf = OmegaConf.load(path)
            assert isinstance(conf, DictConfig)
            return conf
        except Exception as error:  # of what YAML allows and OmegaConf does not
            wrong = " ".join(str(error).split())
    raise UserError(f"{path}: found {wrong}, expected {EXPECTED}; {remedy}")


def _wrong(content: Any) -> str | None:
    if not isinstance(content, Mapping):
        return "nothing" if content is None else f"a {type(content).__name__}"
    if not all(isinstance(key, str) for key in content):
        return "keys that are no names"
    if foreign := [key for key in FOREIGN if key in content]:
        return f"the key {foreign[0]}, which decides what runs around a training"
    if lacking := [key for key in KINDS if key not in content]:
        return f"no {', '.join(lacking)}"
    key = next((key for key, kind in KINDS.items() if not isinstance(content[key], kind)), None)
    if key is not None:
        return f"{key}: {content[key]!s:.60}"
    if wrong := [key for key in GROUPS if not isinstance(content.get(key) or {}, Mapping)]:
        return f"{wrong[0]}: {content[wrong[0]]!s:.60}"
    sampling = content["data"].get("sampling")
    if not isinstance(sampling, Mapping) or not isinstance(sampling.get("_target_"), str):
        return "no data.sampling with a _target_"
    return None
