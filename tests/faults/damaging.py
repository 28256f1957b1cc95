"""One damaged file: a fresh copy of the world, one mutation, the command, the outcome."""

import json
import os
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.faults.doors import KINDS, Door, Kind
from tests.faults.mutations import PLACES, Unfit
from tests.faults.outcome import Outcome, Product, judge, tree
from tests.faults.process import NOTHING, run
from tests.faults.products import content

__all__ = ["copy_parts", "damage", "expected"]

BY_NAME = {kind.name: kind for kind in KINDS}
TRIES = 30
HERE = "here"


def copy_parts(world: Path, door: Door, scratch: Path) -> Path:
    """A folder with the door's parts of the world, fresh."""
    shutil.rmtree(scratch, ignore_errors=True)
    here = scratch / HERE
    here.mkdir(parents=True)
    for part in door.parts:
        (here / part).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (world / part).is_dir() else shutil.copy2)(world / part, here / part)
    return here


@cache
def expected(door: Door, world: Path, *, twice: bool = False) -> Product:
    """What a door makes of undamaged files. Raises where the command fails, or makes another product ``twice``."""
    products = []
    for _ in range(1 + twice):
        here = copy_parts(world, door, world.parent / f"expected of {os.getpid()}")
        ended = run(door.script, door.arguments, here)
        if ended.code or ended.forbidden:
            raise RuntimeError(f"mrgen-{door.script} {door.arguments}: {ended.code} {ended.forbidden}\n{ended.said}")
        products.append(dict(door.product(here, ended)))
        shutil.rmtree(here.parent)
    if not products[0] or products[0] != products[-1]:
        raise RuntimeError(f"mrgen-{door.script} {door.arguments}: made {products}")
    return products[0]


@cache
def _order(kind: Kind) -> list[Any]:
    candidates = list(kind.candidates)
    random.Random(kind.name).shuffle(candidates)
    return candidates


def damage(name: str, seed: int, world: Path, scratch: Path) -> tuple[str, Outcome]:
    """Runs one case.

    Args:
        name: of the kind.
        seed: of the file, the mutation and its place.
        world, scratch: folders: of what is copied, and of this case.

    Returns:
        What was done, and what became of it.
    """
    kind, rng = BY_NAME[name], random.Random(f"{name} {seed}")
    whole = expected(kind.door, world)
    here = copy_parts(world, kind.door, scratch)
    files = sorted({path for glob in kind.files for path in here.glob(glob)})
    mutator, path, before = _mutate(kind, files, seed, rng)
    place = path.relative_to(here).as_posix()
    trees, initial = [tree(here)], kind.door.product(here, NOTHING)
    ended = run(kind.door.script, kind.door.arguments, here)
    trees.append(tree(here))
    excused = kind.excuse(path, before, here)  # the command may have mended the file
    was, now = ({name: content for name, content in each.items() if name != place} for each in trees)
    found = kind.door.product(here, ended)
    outcome = judge(
        ended,
        expected=whole,
        found=found,
        initial=initial,
        own=_own(kind, place, whole),
        names=_names(kind, path, here, before),
        before=was,
        after=now,
        writes=kind.door.writes,
        excused=excused,
    )
    shutil.rmtree(scratch, ignore_errors=True)
    return f"{mutator.__name__} of {place}", outcome


def _mutate(kind: Kind, files: list[Path], seed: int, rng: random.Random) -> tuple[Any, Path, bytes]:
    """Damages one of the files so that it is another."""
    order = _order(kind)
    for attempt in range(TRIES):
        mutator, path = order[(seed + attempt) % len(order)], rng.choice(files)
        before = path.read_bytes()
        if mutator in PLACES:
            mutator(path)
            return mutator, path, before
        try:
            after = mutator(before, rng)
        except (Unfit, ValueError, IndexError, UnicodeDecodeError):
            continue
        if after != before:
            path.write_bytes(after)
            return mutator, path, before
    raise RuntimeError(f"{kind.name}: nothing to damage")


def _own(kind: Kind, place: str, expected: Product) -> list[str]:
    """The parts of the product that depend on a file: of a subject's or a job's its own, of others all."""
    parts = [part for part in expected if part in place.split("/")] if kind.door.apart else []
    return parts or list(expected)


def _names(kind: Kind, path: Path, here: Path, before: bytes) -> set[str]:
    """By which a message may call a damaged file: its name, its folder's, and what of its content is another."""
    place = path.relative_to(here)
    folder = {"checkpoints", "estimator", "raw", "key"}
    run = [parent.as_posix() for parent in place.parents if parent.name and parent.name not in folder]
    near = [parent for parent in run if "/" in parent] or run
    names = {place.name, place.stem, *kind.names, *near, Path(near[0]).name if near else ""}
    if path.suffix in (".json", ".yaml"):
        names |= _changed_keys(path, before)
    return {name for name in names if len(name) > 1}


def _changed_keys(path: Path, before: bytes) -> set[str]:
    read = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        return {name[:200] for name in _differences(read(before), read(content(path))) if len(name) > 3}
    except (OSError, ValueError, yaml.YAMLError, RecursionError, AttributeError):
        return set()


def _differences(old: Any, new: Any, key: str = "") -> set[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return {found for name in old for found in _differences(old[name], new.get(name, ...), str(name))}
    if old == new:
        return set()
    listed = [item for item in new if item not in old] if isinstance(old, list) and isinstance(new, list) else [new]
    return {key, *(item.partition("=")[0] for item in listed if isinstance(item, str))}
