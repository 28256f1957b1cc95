"""Files of a stranger, through every door: whatever they say, nothing is run, and no file is touched."""

import json
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.faults import doors
from tests.faults.damaging import copy_parts
from tests.faults.doors import Door
from tests.faults.outcome import Outcome, lost, tree
from tests.faults.payloads import (
    SECRET,
    TARGETS,
    WRAPPED,
    pickled,
    pickled_archive,
    pickled_array,
    pickled_checkpoint,
    plant_helpers,
)
from tests.faults.process import Ended, run
from tests.faults.watching import CANARY

__all__ = ["PLACES", "attempts"]

Attempt = tuple[str, str, Callable[[Path], tuple[str, Outcome]]]


@dataclass(frozen=True)
class Place:
    """Where a payload is put: keys of a file that a door reads.

    Attributes:
        door: the command.
        file: below the world.
        keys: the path in the file.
        moved: a file that is moved away before, so that this one is read.
    """

    door: Door
    file: str
    keys: tuple[Any, ...]
    moved: str | None = None


SYNTHESIZE, CLUSTERING = doors._synthesize("rsnet"), doors._synthesize("clustering")
CONFIG, HYDRA = "runs/rsnet/config.yaml", "runs/rsnet/.hydra/config.yaml"
CHECKPOINT = "runs/rsnet/checkpoints/best.ckpt"
RESUMED = (
    *(("model",), ("model", "lr"), ("callbacks", "stranger"), ("augmentation", "transforms"), ("data", "augmentation")),
    *(
        ("data", "normalisation"),
        ("data", "sampling"),
        ("data", "split"),
        ("data", "mix", "enhancement"),
        ("tracking",),
    ),
    *(("trainer", "strategy"), ("trainer", "profiler"), ("trainer", "logger"), ("trainer", "plugins"), ("launch",)),
    *(("trainer", "callbacks"), ("trainer", "default_root_dir"), ("trainer", "precision"), ("seed",), ("name",)),
    *(("hydra", "callbacks", "stranger"), ("hydra", "launcher"), ("hydra", "sweeper"), ("hydra", "job_logging")),
)
PLACES: dict[str, Place] = {
    **{f"config.yaml in resume: {'.'.join(keys)}": Place(doors.RESUME, CONFIG, keys) for keys in RESUMED},
    **{f".hydra/config.yaml: {'.'.join(keys)}": Place(doors.RESUME, HYDRA, keys, CONFIG) for keys in RESUMED[::3]},
    **{
        f"config.yaml of a run: {'.'.join(keys)}": Place(SYNTHESIZE, CONFIG, keys)
        for keys in (("model",), ("data", "sampling"), ("data", "normalisation"), ("data", "layout"), ("name",))
    },
    **{
        f"checkpoint: {'.'.join(keys)}": Place(SYNTHESIZE, CHECKPOINT, keys)
        for keys in (("model",), ("model", "target"), ("model", "filters"), ("data", "normalisation"), ("data", "box"))
    },
    **{
        f"estimator: {'.'.join(keys)}": Place(CLUSTERING, "runs/clustering/description.json", keys)
        for keys in (("model",), ("model", "source"), ("model", "_target_"), ("data", "normalisation"))
    },
    "estimator.json": Place(CLUSTERING, "runs/clustering/estimator/estimator.json", ("settings",)),
    "split.json in resume": Place(doors.RESUME, "runs/rsnet/split.json", ("train",)),
    "split.json of a run": Place(doors.SWAP, "runs/snet/split.json", ("test",)),
    "status.json": Place(doors.VIEW, "sweep/0_rsnet-t2/status.json", ("reason",)),
    "layout": Place(doors._scans("nifti"), "scans/nifti/layout.yaml", ("images",)),
    "layout: fields": Place(doors._scans("nifti"), "scans/nifti/layout.yaml", ("fields", "patient")),
    "cohort.json: layout": Place(doors.TRAIN, "store/cohort.json", ("layout", "title")),
    "cohort.json: name": Place(doors.TRAIN, "store/cohort.json", ("name",)),
    "subject.json": Place(doors.TRAIN, "store/BraTS19_CBICA_AAE_1/subject.json", ("site",)),
    "generated.json": Place(doors.ON_SYNTHETIC, "synthetic/generated.json", ("method",)),
    "record of a synthesis": Place(
        doors._synthesize("rsnet", "made", "made"), "made/BraTS19_2013_102_1/BraTS19_2013_102_1_t2.json", ("made_from",)
    ),
    "atlas.json": Place(doors.GENERATE, "runs/samr/atlas.json", ("modalities",)),
    "sweep.json: folder": Place(doors.VIEW, "sweep/sweep.json", (0, "folder")),
    "sweep.json: overrides": Place(doors.RESUME_SWEEP, "sweep/sweep.json", (0, "overrides")),
    "multirun.yaml: task": Place(doors.RESUME_SWEEP, "sweep/multirun.yaml", ("hydra", "overrides", "task", 0)),
    "multirun.yaml: launcher": Place(doors.RESUME_SWEEP, "sweep/multirun.yaml", ("hydra", "launcher")),
    "multirun.yaml: sweeper": Place(doors.RESUME_SWEEP, "sweep/multirun.yaml", ("hydra", "sweeper")),
    "multirun.yaml: callbacks": Place(doors.RESUME_SWEEP, "sweep/multirun.yaml", ("hydra", "callbacks")),
}
FLOW = "{_target_:os.system,command:'touch canary'}"
OVERRIDES = (  # of a sweep's task or of Hydra, as multirun.yaml and sweep.json hold them
    *(f"+callbacks.stranger={FLOW}", f"+callbacks.stranger={{_target_:os.system,_args_:['touch {CANARY}']}}"),
    *(
        f"++hydra.callbacks.stranger={FLOW}",
        f"+hydra.launcher.stranger={FLOW}",
        f"hydra.launcher._target_={CANARY}_module",
    ),
    *("hydra.searchpath=[file://victims]", "--config-dir=victims", "hydra.run.dir=victims", "hydra.sweep.dir=victims"),
    *(
        "model._target_=os.system",
        "~model",
        "launch.detach=true",
        "+model.x=${oc.env:FAULT_SECRET}",
        "hydra.job.chdir=true",
    ),
    *("hydra.sweep.subdir=../../victims", "name=../victims", "+trainer.default_root_dir=canary"),
)
PICKLES = {
    "store/BraTS19_CBICA_AAE_1/image.npy": (doors.TRAIN, pickled_array),
    "store/BraTS19_CBICA_AAE_1/label.npy": (doors._prepared("verify=true"), pickled_array),
    "store/BraTS19_CBICA_AAE_1/brain.npy": (doors.TRAIN, pickled),
    CHECKPOINT: (SYNTHESIZE, pickled_checkpoint),
    f"{CHECKPOINT} ": (SYNTHESIZE, pickled),
    "runs/rsnet/checkpoints/last.ckpt": (doors.RESUME, pickled_checkpoint),
    "runs/rsnet/checkpoints/resume.ckpt": (doors.RESUME, pickled_checkpoint),
    "runs/clustering/estimator/entries.npz": (CLUSTERING, pickled_archive),
    "runs/samr/atlas.npz": (doors.GENERATE, pickled_archive),
    "patients/HGG/BraTS19_2013_102_1/BraTS19_2013_102_1_t1.nii.gz": (SYNTHESIZE, pickled),
}
PREPARE, STARTED = doors._prepared(), doors.TRAIN
LINKS: dict[str, Door] = {  # what a command writes, where somebody has put a link
    **{f"store/{name}": PREPARE for name in (".lock", "cohort.json")},
    **{f"runs/rsnet/{name}": doors.RESUME for name in ("status.json", "metrics.csv", "config.yaml", "split.json")},
    **{f"runs/rsnet/{name}": doors.RESUME for name in ("environment.json", "checkpoints/resume.ckpt", "images")},
    **{f"new/{name}": STARTED for name in ("status.json", "metrics.csv", "config.yaml", "split.json", "checkpoints")},
    **{f"new/{name}": STARTED for name in ("environment.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt")},
    **{f"new/.hydra/{name}": STARTED for name in ("config.yaml", "overrides.yaml", "hydra.yaml")},
    **{f"judged/{name}": doors.SWAP for name in ("table.md", "table.csv", "subjects.csv", "config.yaml", "figure.png")},
    **{f"judged/{name}": doors.SWAP for name in ("calibration.csv", "uncertainty.png", "synthesis-rsnet.png")},
    **{
        f"again/BraTS19_2013_102_1/{name}": SYNTHESIZE
        for name in ("BraTS19_2013_102_1_t2_synthetic.nii.gz", "BraTS19_2013_102_1_t2.json")
    },
    "again/BraTS19_2013_102_1/.BraTS19_2013_102_1_t2.json.partial": SYNTHESIZE,
    "again/BraTS19_2013_102_1": SYNTHESIZE,
    **{f"more/{name}": doors.GENERATE for name in (".lock", "cohort.json", "generated.json")},
}


def attempts(world: Path, *, thorough: bool) -> list[Attempt]:
    """Payloads through doors; not thorough: through each door a few."""
    found: list[Attempt] = []
    places = [*PLACES] if thorough else _few_of_each([*PLACES])
    for place_name in places:
        pairs = [(target, way) for target in TARGETS for way in WRAPPED if way != "environment"]
        pairs.append(("os.system", "environment"))
        rng = random.Random(place_name)
        chosen = [("os.system", "plain"), ("torch.load", "interpolated"), *rng.sample(pairs, 8), pairs[-1]]
        for target, way in chosen if thorough else rng.sample(chosen, 1):
            found.append(
                (
                    place_name.partition(":")[0],
                    f"{place_name} {target} {way}",
                    partial(_said, place_name, target, way, world),
                )
            )
    for override in OVERRIDES if thorough else OVERRIDES[:3]:
        found.append(("multirun.yaml", override, partial(_overridden, override, world)))
    for file in PICKLES if thorough else [*PICKLES][:4]:
        found.append(("pickles", file, partial(_pickled, file, world)))
    for file in LINKS if thorough else [*LINKS][::6]:
        for dangling in (False, True) if thorough else (False,):
            found.append(("links", f"{file}{' to nothing' * dangling}", partial(_linked, file, dangling, world)))
    for variable in ("", "GIT_DIR"):
        found.append(("git", f"fsmonitor {variable}".strip(), partial(_repository, variable, world)))
    return found


def _few_of_each(names: list[str], most: int = 3) -> list[str]:
    """So many places of every file."""
    counts: Counter[str] = Counter()
    for name in names:
        counts[name.partition(":")[0]] += 1
    kept = []
    for name in reversed(names):  # the odd ones come last
        file = name.partition(":")[0]
        counts[file] -= 1
        if counts[file] < most:
            kept.append(name)
    return kept


def _open(door: Door, world: Path, scratch: Path) -> Path:
    here = copy_parts(world, door, scratch)
    plant_helpers(here)
    return here


def _judged(door: Door, here: Path, also: str = "", **environment: str) -> Outcome:
    """Runs the door and looks whether anything was done that the file said."""
    before = tree(here)
    ended = run(door.script, door.arguments, here, environment={"FAULT_SECRET": SECRET, **environment})
    after = tree(here)
    said = " ".join(ended.said.split())[-250:]
    if ended.forbidden:
        return Outcome("executed", ended.forbidden[0])
    if made := [path for path in after if path not in before and CANARY in path and "__pycache__" not in path]:
        return Outcome("executed", f"made {made[0]}")
    if told := _told(here, before, after, ended):
        return Outcome("executed", f"the environment was told to {told}")
    written = (*door.writes, also) if also else door.writes
    if gone := lost(before, after, written):
        return Outcome("executed" if "victim" in gone[0] else "lost", f"{gone[0]} is gone or another; {said}")
    strange = [path for path in after if path not in before and path.startswith(("victims", ".."))]
    if strange:
        return Outcome("executed", f"made {strange[0]}")
    if ended.hung:
        return Outcome("hang", said)
    if "Traceback" in ended.said or ended.code < 0:
        return Outcome("traceback", said)
    if ended.code and ended.said.count("error: ") > 1:
        return Outcome("unclear", said)
    return Outcome("clear error" if ended.code else "right", said)


def _told(here: Path, before: dict[str, str], after: dict[str, str], ended: Ended) -> str:
    """A file, or the terminal, that holds a value of the environment."""
    changed = [path for path in after if after[path] != before.get(path) and not (here / path).is_symlink()]
    if found := [path for path in changed if SECRET.encode() in (here / path).read_bytes()]:
        return found[0]
    return "the terminal" if SECRET in ended.said else ""


def _said(name: str, target: str, way: str, world: Path, scratch: Path) -> tuple[str, Outcome]:
    place = PLACES[name]
    here = _open(place.door, world, scratch)
    if place.moved:
        (here / place.moved).unlink()
    path = here / place.file
    payload = WRAPPED[way](TARGETS[target])
    if path.suffix == ".ckpt":
        content = torch.load(path, weights_only=True, map_location="cpu")
        from mrgen.callbacks.provenance import KEY

        _put(content[KEY], place.keys, payload)
        torch.save(content, path)
    elif path.suffix == ".json":
        content = json.loads(path.read_text())
        _put(content, place.keys, payload)
        if path.name == "subject.json":
            content.pop("checksum", None)  # the value itself is to be judged
        path.write_text(json.dumps(content))
    else:
        content = yaml.safe_load(path.read_text())
        _put(content, place.keys, payload)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    outcome = _judged(place.door, here)
    shutil.rmtree(scratch, ignore_errors=True)
    return f"{target}, {way}, at {'.'.join(map(str, place.keys))} of {place.file}", outcome


def _put(content: Any, keys: tuple[Any, ...], payload: Any) -> None:
    for key in keys[:-1]:
        if isinstance(content, dict) and not isinstance(content.get(key), dict | list):
            content[key] = {}
        content = content[key]
    old = content.get(keys[-1]) if isinstance(content, dict) else content[keys[-1]]
    content[keys[-1]] = _completed(old, payload)


def _completed(old: Any, payload: Any) -> Any:
    """A payload in the place of a class's settings keeps them where it is one of their values."""
    if isinstance(old, dict) and "_target_" in old and isinstance(payload, list):
        return {**old, "_args_": payload}
    return payload


def _overridden(override: str, world: Path, scratch: Path) -> tuple[str, Outcome]:
    here = _open(doors.RESUME_SWEEP, world, scratch)
    path = here / "sweep" / "multirun.yaml"
    content = yaml.safe_load(path.read_text())
    overrides = content["hydra"]["overrides"]
    overrides["hydra" if "hydra." in override or override.startswith("--") else "task"].append(override)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    jobs = json.loads((here / "sweep" / "sweep.json").read_text())
    for job in jobs:
        job["overrides"] = [*job["overrides"], override]
    (here / "sweep" / "sweep.json").write_text(json.dumps(jobs))
    _hostile_conf(here / "victims")
    return f"override {override}", _judged(doors.RESUME_SWEEP, here)


def _hostile_conf(folder: Path) -> None:
    """A folder of configs in which a group of ours says something else."""
    for group, name in (("callbacks", "images"), ("experiment/rsnet", "rsnet"), ("model", "rsnet")):
        (folder / group).mkdir(parents=True, exist_ok=True)
        said = {"stranger": {"_target_": "os.system", "command": f"touch {CANARY}"}}
        (folder / group / f"{name}.yaml").write_text(yaml.safe_dump(said))


def _pickled(file: str, world: Path, scratch: Path) -> tuple[str, Outcome]:
    door, made = PICKLES[file]
    here = _open(door, world, scratch)
    (here / file.strip()).write_bytes(made())
    return f"{made.__name__} as {file}", _judged(door, here)


def _linked(file: str, dangling: bool, world: Path, scratch: Path) -> tuple[str, Outcome]:
    door = LINKS[file]
    here = _open(door, world, scratch)
    path, victims = here / file, here / "victims"
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.is_dir() or (not path.suffix and not path.name.startswith("."))
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(victims / "new" if dangling else victims if folder else victims / "file.txt")
    return f"a link to {'nothing' if dangling else 'a victim'} as {file}", _judged(door, here, also=file)


def _repository(variable: str, world: Path, scratch: Path) -> tuple[str, Outcome]:
    here = _open(STARTED, world, scratch)
    subprocess.run(["git", "init", "-q", here], check=True, capture_output=True)
    hook = here / "monitor.sh"
    hook.write_text(f"#!/bin/sh\ntouch {here}/{CANARY}\n")
    hook.chmod(0o755)
    subprocess.run(["git", "-C", here, "config", "core.fsmonitor", str(hook)], check=True)
    for name in ("post-index-change", "pre-commit", "post-checkout"):
        shutil.copy(hook, here / ".git" / "hooks" / name)
    told = {variable: str(here / ".git")} if variable else {}
    outcome = _judged(STARTED, here, also=".git/*", **told)
    return f"core.fsmonitor and hooks of a repository around the run {variable}".strip(), outcome
