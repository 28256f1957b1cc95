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
    brain: "*_mask.nii*"                     # optional: a mask of the brain that somebody else made
    other_collections: {"BraTS-PED-": use data=brats2024_ped}   # paths that look alike, refused with this advice

Patterns of images, of the label and of the brain start at the subject's folder; with a leading `/` they start at the
root; `{id}` in them is the subject's id.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mrgen.data import layout_table as read
from mrgen.data.layout_table import plain_table, read_table, text
from mrgen.data.patterns import check_expression, checked_globs
from mrgen.errors import UserError

FIELD_NAMES = ("id", "patient", "grade", "site")


@dataclass(frozen=True)
class Layout:
    """The table of one cohort; see the module's text for the meaning of each key.

    `label_values` are the numbers in the files, which the store keeps; `label_maps` turn them into those of a task at
    load (255: ignored by losses and metrics), `classes` name the result and `regions` are unions of numbers that
    the map `numbered_for` gives. `other_collections` are regular expressions, searched like those of `fields`.
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
    brain: tuple[str, ...] = ()
    other_collections: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_conf(cls, conf: Mapping[str, Any] | str | Path) -> "Layout":
        """A layout from a mapping (a Hydra node as well) or from a YAML file.

        Raises:
            UserError: an unknown or missing key, a pattern that is none, numbers that do not fit together.
        """
        where = "layout"
        if isinstance(conf, str | Path):
            where = str(conf)
            conf = read_table(Path(conf))
        table = plain_table(conf, where)
        if not isinstance(table, dict):
            raise UserError(f"{where}: found {type(table).__name__}, expected a mapping with the keys {_KEYS}")
        if unknown := sorted(set(map(str, table)) - set(_KEYS)):
            raise UserError(f"{where}: unknown key {', '.join(unknown)}; valid keys are {', '.join(_KEYS)}")
        if missing := [key for key in _REQUIRED if not table.get(key)]:
            raise UserError(f"{where}: missing key {', '.join(missing)}; required are {', '.join(_REQUIRED)}")
        where = f"layout {text(table['name'], f'{where}: name')}"
        given = {key: value for key, value in table.items() if value is not None}
        layout = cls(**{key: _READ[key](value, f"{where}: {key}") for key, value in given.items()})
        layout = replace(layout, title=layout.title or layout.name)
        if not layout.label_maps:
            layout = layout._with_plain_maps()
        layout._check(where)
        return layout

    def to_conf(self) -> dict[str, Any]:
        """The table as plain containers; `from_conf` reads it back."""
        return plain_table({f.name: getattr(self, f.name) for f in fields(self)}, f"layout {self.name}")

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
        for name, members in self.regions.items():
            given = set(self.label_maps[self.numbered_for].values()) - {0, 255}
            if not members or not given.issuperset(members):
                raise UserError(
                    f"{where}: regions.{name} is {members}, expected some of {sorted(given)}, which "
                    f"label_maps.{self.numbered_for} gives"
                )
        if empty := [name for name, patterns in self.images.items() if not patterns]:
            raise UserError(f"{where}: images.{empty[0]} has no pattern; expected one such as '*_{empty[0]}.nii*'")
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


def _fields(value: Any, where: str) -> dict[str, dict[str, str]]:
    def rule(value: Any, where: str) -> dict[str, str]:
        parsed = {"pattern": value} if isinstance(value, str) else read.mapping(value, where, text)
        if not parsed or set(parsed) - {"pattern", "column"} or (where.endswith("fields.id") and "column" in parsed):
            raise UserError(f"{where} has {sorted(parsed)}, expected a pattern or {{column, pattern}}")
        check_expression(parsed.get("pattern", ""), where)
        return parsed

    if isinstance(value, dict) and (unknown := sorted(set(map(str, value)) - set(FIELD_NAMES))):
        layout = where.removesuffix(": fields")
        raise UserError(f"{layout}: unknown field {', '.join(unknown)}; valid fields are {', '.join(FIELD_NAMES)}")
    return read.mapping(value, where, rule)


def _expressions(value: Any, where: str) -> dict[str, str]:
    parsed = read.mapping(value, where, text)
    for pattern in parsed:
        check_expression(pattern, where)
    return parsed


def _table(value: Any, where: str) -> dict[str, str]:
    parsed = read.mapping(value, where, text)
    if "files" in parsed:
        checked_globs(parsed["files"], f"{where}.files")
    return parsed


# How each key is read.
_READ: dict[str, Any] = {
    "name": text,
    "title": text,
    "subjects": checked_globs,
    "exclude": checked_globs,
    "fields": _fields,
    "table": _table,
    "images": lambda value, where: read.mapping(value, where, checked_globs, key=read.word),
    "label": checked_globs,
    "label_values": lambda value, where: read.mapping(value, where, text, key=read.number),
    "label_maps": lambda value, where: read.mapping(
        value, where, lambda v, w: read.mapping(v, w, read.number, key=read.number)
    ),
    "classes": lambda value, where: read.mapping(value, where, read.names),
    "regions": lambda value, where: read.mapping(value, where, read.numbers),
    "numbered_for": text,
    "skull_stripped": read.truth,
    "brain": checked_globs,
    "other_collections": _expressions,
}
