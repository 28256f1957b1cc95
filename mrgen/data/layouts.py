"""Layouts, cohorts as tables: where each sequence of each subject lies, and which label number means what.

A layout is a YAML file (`conf/data/layout/*.yaml`, or the user's own), so that a new cohort is data and not a class:

    name: brats2019
    title: BraTS 2019                        # in messages; default: the name
    subjects: ["**/BraTS19_*"]               # globs of subjects' folders (or files) below the root
    exclude: ["**/additional_annotations"]   # folders not to enter
    fields:                                  # regular expressions, searched in the subject's path below the root:
      grade: "(HGG|LGG)/[^/]+$"              #   the first group, or the whole match, is the value
      site: {column: Site, pattern: "^\\w+"}  #   or a column of the table, where there is one
    table: {files: "**/*.csv", id: Subject}  # a CSV with one row a subject, and its column of subject ids
    images: {t1: "*_t1.nii*", flair: ["*_flair.nii*", "*_fla.nii*"]}   # alternatives are tried in order
    label: "*_seg.nii*"
    label_values: {0: background, 1: necrotic core, 2: edema, 4: enhancing}
    label_maps: {regions: {1: 1, 2: 2, 4: 3}}
    classes: {regions: [background, necrotic core, edema, enhancing]}
    regions: {ET: [3], WT: [1, 2, 3], TC: [1, 3]}   # numbers that label_maps.regions gives
    numbered_for: regions                    # or those of another map
    skull_stripped: true

Patterns of images and of the label start at the subject's folder; with a leading `/` they start at the root; `{id}` in
them is the subject's id.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mrgen.errors import UserError

FIELD_NAMES = ("id", "patient", "grade", "site")


@dataclass(frozen=True)
class Layout:
    """The table of one cohort; see the module's text for the meaning of each key.

    `label_values` are the numbers in the files, which the store keeps; `label_maps` turn them into those of a task at
    load (255: ignored by losses and metrics), `classes` name the result and `regions` are unions of numbers that
    the map `numbered_for` gives.
    """

    name: str
    subjects: tuple[str, ...]
    images: dict[str, tuple[str, ...]]
    title: str = ""
    exclude: tuple[str, ...] = ()
    fields: dict[str, dict[str, str]] = field(default_factory=dict)
    table: dict[str, str] = field(default_factory=dict)
    label: tuple[str, ...] = ()
    label_values: dict[int, str] = field(default_factory=dict)
    label_maps: dict[str, dict[int, int]] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    regions: dict[str, list[int]] = field(default_factory=dict)
    numbered_for: str = "regions"
    skull_stripped: bool = True

    @classmethod
    def from_conf(cls, conf: Mapping[str, Any] | str | Path) -> "Layout":
        """A layout from a mapping (a Hydra node as well) or from a YAML file.

        Raises:
            UserError: an unknown or missing key, a pattern that is none, numbers that do not fit together.
        """
        where = "layout"
        if isinstance(conf, str | Path):
            where = str(conf)
            conf = _read_yaml(Path(conf))
        table = _plain(conf)
        if not isinstance(table, dict):
            raise UserError(f"{where}: found {type(table).__name__}, expected a mapping with the keys {_KEYS}")
        if unknown := sorted(set(map(str, table)) - set(_KEYS)):
            raise UserError(f"{where}: unknown key {', '.join(unknown)}; valid keys are {', '.join(_KEYS)}")
        if missing := [key for key in _REQUIRED if not table.get(key)]:
            raise UserError(f"{where}: missing key {', '.join(missing)}; required are {', '.join(_REQUIRED)}")
        where = f"layout {table['name']}"
        try:
            layout = cls(
                name=str(table["name"]),
                title=str(table.get("title") or table["name"]),
                subjects=_globs(table["subjects"], where, "subjects"),
                exclude=_globs(table.get("exclude"), where, "exclude"),
                fields=_fields(table.get("fields") or {}, where),
                table=dict(table.get("table") or {}),
                images={str(k): _globs(v, where, f"images.{k}") for k, v in table["images"].items()},
                label=_globs(table.get("label"), where, "label"),
                label_values={int(k): str(v) for k, v in (table.get("label_values") or {}).items()},
                label_maps={
                    name: {int(k): int(v) for k, v in numbers.items()}
                    for name, numbers in (table.get("label_maps") or {}).items()
                },
                classes={name: [str(c) for c in names] for name, names in (table.get("classes") or {}).items()},
                regions={name: [int(n) for n in numbers] for name, numbers in (table.get("regions") or {}).items()},
                numbered_for=str(table.get("numbered_for") or "regions"),
                skull_stripped=bool(table.get("skull_stripped", True)),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: a value has the wrong form ({error}); see docs on cohort layouts") from error
        if not layout.label_maps:
            layout = layout._with_plain_maps()
        layout._check(where)
        return layout

    def to_conf(self) -> dict[str, Any]:
        """The table as plain containers; `from_conf` reads it back."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def label_lookup(self, labels: str) -> np.ndarray:
        """A table that maps the store's label numbers at load: `lookup[label]`.

        Args:
            labels: a name in `label_maps`, such as `regions` or `native`.

        Returns:
            (256,) uint8; 255 means ignored.

        Raises:
            UserError: the layout has no such map.
        """
        if labels not in self.label_maps:
            raise UserError(f"{self.title} has no labels '{labels}'; valid names are {', '.join(self.label_maps)}")
        lookup = np.zeros(256, dtype=np.uint8)
        for own, mapped in self.label_maps[labels].items():
            lookup[own] = mapped
        return lookup

    def numbered(self, labels: str) -> "Layout":
        """The same with `regions` numbered for another label map: what was of a region stays of it.

        Args:
            labels: a name in `label_maps`. Classes that it ignores (255) are of no region.

        Raises:
            UserError: no such map, no classes named for it, or one that does not tell a region from the rest.
        """
        if labels == self.numbered_for:
            return self
        chosen = self.label_lookup(labels)
        if labels not in self.classes:
            raise UserError(f"data.labels={labels}: {self.title} names classes for {', '.join(self.classes)} alone")
        before = self.label_lookup(self.numbered_for)
        regions = {}
        for region, numbers in self.regions.items():
            own = {number for number in self.label_values if before[number] in numbers}
            inside, beyond = ({int(chosen[n]) for n in part} - {255} for part in (own, {*self.label_values} - own))
            if not inside or inside & beyond:
                raise UserError(
                    f"data.labels={labels}: label_maps.{labels} of {self.title} does not tell its region {region} "
                    f"({', '.join(self.label_values[n] for n in sorted(own))}) from the rest; set "
                    f"data.labels={self.numbered_for}"
                )
            regions[region] = sorted(inside)
        return replace(self, regions=regions, numbered_for=labels)

    def _with_plain_maps(self) -> "Layout":
        """A user's own layout may leave the maps out: `native` keeps the numbers, `regions` counts them through."""
        numbers = [n for n in self.label_values if n]
        maps = {"regions": {n: i for i, n in enumerate(numbers, start=1)}, "native": {n: n for n in numbers}}
        names = [self.label_values.get(0, "background"), *(self.label_values[n] for n in numbers)]
        regions = self.regions or {name: [i] for i, name in enumerate(names) if i}
        native = [self.label_values.get(n, "unused") for n in range(max(numbers, default=0) + 1)]
        classes = {"regions": names, "native": native}
        return replace(self, label_maps=maps, classes=classes, regions=regions) if numbers else self

    def _check(self, where: str) -> None:
        if self.label and not self.label_values:
            raise UserError(
                f"{where}: has a label but no label_values; list its numbers, such as {{0: background, 1: …}}"
            )
        if self.label_values and 0 not in self.label_values:
            raise UserError(f"{where}: label_values lacks 0 (background)")
        if bad := [n for n in self.label_values if not 0 <= n <= 255]:
            raise UserError(f"{where}: label_values {bad} lie outside 0…255")
        for name, numbers in self.label_maps.items():
            if set(numbers) | {0} != set(self.label_values):
                raise UserError(
                    f"{where}: label_maps.{name} maps {sorted(numbers)}, expected every one of "
                    f"{sorted(set(self.label_values) - {0})}"
                )
            if bad := [n for n in numbers.values() if not 0 <= n <= 255]:
                raise UserError(f"{where}: label_maps.{name} maps to {bad}, expected 0…255")
        for name, numbers in self.label_maps.items():
            largest = max((n for n in numbers.values() if n != 255), default=0)
            if len(self.classes.get(name, ())) != largest + 1:
                raise UserError(
                    f"{where}: classes.{name} has {len(self.classes.get(name, ()))} names, expected {largest + 1}: "
                    f"one for each number that label_maps.{name} maps to, 0 to {largest}"
                )
        if self.regions and self.numbered_for not in self.label_maps:
            maps = ", ".join(self.label_maps)
            raise UserError(f"{where}: numbered_for is {self.numbered_for}, expected one of label_maps: {maps}")
        if self.table and (set(self.table) != {"files", "id"}):
            raise UserError(f"{where}: table has the keys {sorted(self.table)}, expected files, id")
        if columns := [key for key, rule in self.fields.items() if "column" in rule and not self.table]:
            raise UserError(f"{where}: fields.{columns[0]} names a column, but there is no table")


_KEYS = tuple(f.name for f in fields(Layout))
_REQUIRED = tuple(f.name for f in fields(Layout) if f.default is MISSING and f.default_factory is MISSING)


def read_layouts(folder: Path) -> dict[str, Layout]:
    """All layouts in a folder of YAML files (the shipped ones lie in `conf/data/layout`), by name."""
    layouts = [Layout.from_conf(path) for path in sorted(folder.glob("*.yaml"))]
    return {layout.name: layout for layout in layouts}


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a layout as YAML") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: is no YAML ({first}), expected a layout; quote patterns that start with *") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _globs(value: Any, where: str, key: str) -> tuple[str, ...]:
    patterns = [value] if isinstance(value, str) else list(value or ())
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip("/") or ".." in pattern.split("/"):
            raise UserError(f"{where}: {key}: {pattern!r} is no glob pattern; expected something like '*_t1.nii*'")
    return tuple(patterns)


def _fields(rules: Mapping[str, Any], where: str) -> dict[str, dict[str, str]]:
    if unknown := sorted(set(rules) - set(FIELD_NAMES)):
        raise UserError(f"{where}: unknown field {', '.join(unknown)}; valid fields are {', '.join(FIELD_NAMES)}")
    parsed = {}
    for name, rule in rules.items():
        rule = {"pattern": rule} if isinstance(rule, str) else dict(rule)
        if not rule or set(rule) - {"pattern", "column"} or (name == "id" and "column" in rule):
            raise UserError(f"{where}: fields.{name} has {sorted(rule)}, expected a pattern or {{column, pattern}}")
        try:
            re.compile(rule.get("pattern", ""))
        except re.error as error:
            raise UserError(f"{where}: fields.{name}: {rule['pattern']!r} is no regular expression: {error}") from error
        parsed[name] = {key: str(text) for key, text in rule.items()}
    return parsed
