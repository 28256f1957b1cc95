"""Which subjects train, validate and test: always by patient, so that no patient's visits lie on two sides.

BraTS 2015 and 2023 hold several visits of one patient; a split by scan would test on brains that were trained on.

Patients are dealt out in the order of a hash of (seed, patient): the same on every machine and Python, and whatever the
order in which a disk lists the subjects.
"""

import hashlib
import json
import os
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mrgen.errors import UserError
from mrgen.files import open_to_read

SETS = ("train", "val", "test")
_STRATA = ("grade", "site")


class Subject(Protocol):
    """What a split has to know of a subject; the store's records have it."""

    @property
    def id(self) -> str: ...
    @property
    def patient(self) -> str: ...
    @property
    def grade(self) -> str | None: ...
    @property
    def site(self) -> str | None: ...


@dataclass(frozen=True)
class Split:
    """Subject ids of the three sets; any of them may be empty."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` and a human can read; a reader never sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # unique: ranks and jobs may share the folder
        try:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "Split":
        """Read what `save` wrote, or the same by hand: {"train": [ids], "val": [ids], "test": [ids]}."""
        try:
            with open_to_read(Path(path)) as file:
                content = json.loads(file.read().decode("utf-8"))
        except OSError as error:
            raise UserError(
                f"split file {path}: cannot be read ({error.strerror}). Give the path of a saved split."
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"split file {path}: is not JSON ({error}). Write it with Split.save.") from None
        if not isinstance(content, dict) or set(content) != set(SETS):
            found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise UserError(f"split file {path}: expected the keys {', '.join(SETS)}, found {found or 'none'}.")
        return cls(**{name: _ids(content[name], f"{path}, {name}") for name in SETS})

    def check(self, known_ids: Iterable[str]) -> None:
        """Raise a UserError that names ids which stand twice or are not among `known_ids`."""
        times = Counter((*self.train, *self.val, *self.test))
        twice = {
            subject: " and ".join(name for name in SETS for _ in range(getattr(self, name).count(subject)))
            for subject, number in times.items()
            if number > 1
        }
        if twice:
            named = _named([f"{subject} (in {where})" for subject, where in twice.items()])
            raise UserError(
                f"split: every subject may stand in one set and once, found {named}. Remove the repetitions."
            )
        known = set(known_ids)
        unknown = [subject for subject in times if subject not in known]
        if unknown:
            raise UserError(
                f"split: {len(unknown)} of {len(times)} subjects are unknown: {_named(unknown)}. "
                f"The cohort has {len(known)}: {_named(sorted(known))}. Correct the ids or prepare these subjects."
            )


def ratio_split(
    subjects: Sequence[Subject],
    fractions: Sequence[float] = (0.8, 0.2, 0.0),
    *,
    seed: int = 0,
    stratify: str | None = None,
) -> Split:
    """Random sets of given size, counted in patients (0.8, 0.2 of 285 gives RS-Net's 228 and 57).

    A fraction above 0 always gets a patient, even where rounding would leave it none.

    Args:
        subjects: all subjects, in any order.
        fractions: of train, val and test; they sum to 1.
        seed: another seed, another split.
        stratify: "grade" or "site" keeps its proportions in every set; a patient with several takes that of the
            first subject by id.
    """
    if len(fractions) != 3 or any(not 0 <= f <= 1 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            "split: the fractions of train, val and test must be three numbers from 0 to 1 that sum to 1, "
            f"found {', '.join(f'{f:g}' for f in fractions)} with sum {sum(fractions):g}."
        )
    patients = _by_patient(subjects)
    asked = [name for name, fraction in zip(SETS, fractions, strict=True) if fraction > 0]
    if len(patients) < len(asked):
        raise UserError(
            f"split: found {len(patients)} patient(s), needed {len(asked)}: one each for {', '.join(asked)}. "
            "Add patients or set a fraction to 0."
        )
    sizes = _apportion(len(patients), fractions)
    for i, fraction in enumerate(fractions):
        if fraction > 0 and sizes[i] == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[i] = 1
    strata = _strata(patients, stratify, str(seed))
    test = _draw(strata, sizes[2], turn=seed)
    val = _draw(strata, sizes[1], turn=seed)
    return _split(patients, val, test)


def fold_split(
    subjects: Sequence[Subject],
    folds: int,
    fold: int,
    *,
    seed: int = 0,
    val_fraction: float = 0.0,
    val_count: int = 0,
    stratify: str | None = None,
) -> Split:
    """One fold of a cross-validation by patient; over all folds every subject is tested exactly once.

    With `stratify`, a stratum that does not divide by the number of folds gives its surplus to other folds than the
    stratum before: 3 sites of 20 in 6 folds are tested as 3 + 3 + 4, the 4 going round, and 5 validation patients are
    2 + 2 + 1 (Orbes-Arteaga et al.: 45 train, 5 validation, 10 test).

    Args:
        subjects: all subjects, in any order.
        folds: number of folds, at least 2.
        fold: which one is tested, from 0.
        seed: another seed, another partition. Keep it over the folds.
        val_fraction: how much of the patients that are not tested validates (at least one patient when above 0).
        val_count: the same as a number of patients; give one of the two. With neither, the validation set is empty.
        stratify: "grade" or "site", see `ratio_split`.
    """
    patients = _by_patient(subjects)
    if not 2 <= folds <= len(patients):
        raise UserError(f"split: folds must be from 2 to the number of patients, {len(patients)}; found {folds}.")
    if not 0 <= fold < folds:
        raise UserError(f"split: fold must be from 0 to {folds - 1} with {folds} folds; found {fold}.")
    if not 0 <= val_fraction < 1 or val_count < 0 or (val_fraction and val_count):
        raise UserError(
            f"split: give either a validation fraction from 0 to below 1 or a number of patients from 0; "
            f"found val_fraction={val_fraction:g} and val_count={val_count}."
        )
    # Dealing stratum after stratum without starting again at fold 0 is what makes the surplus go round.
    dealt = [patient for stratum in _strata(patients, stratify, str(seed)).values() for patient in stratum]
    test = dealt[fold::folds]
    rest = {patient: patients[patient] for patient in patients if patient not in set(test)}
    if val_fraction:
        val_count = max(1, round(val_fraction * len(rest)))
    if val_count >= len(rest):
        raise UserError(
            f"split: {val_count} validation patients of the {len(rest)} that fold {fold} does not test leave none to "
            f"train on. Ask for at most {len(rest) - 1}, or for more folds."
        )
    val = _draw(_strata(rest, stratify, f"{seed}/{fold}"), val_count, turn=fold)
    return _split(patients, val, test)


def explicit_split(train: Sequence[str], val: Sequence[str], test: Sequence[str], known_ids: Iterable[str]) -> Split:
    """The lists as they are, after `Split.check`."""
    split = Split(_ids(train, "train"), _ids(val, "val"), _ids(test, "test"))
    split.check(known_ids)
    return split


# What each kind of split reads. A conf group may hold all keys at once, so a key that a kind does not read may be there
# with the value below; any other value would be silently ignored and is an error.
_KEYS = {
    "ratio": ("seed", "val", "test", "stratify"),
    "folds": ("seed", "val", "stratify", "sites", "folds", "fold"),
    "explicit": ("train", "val", "test"),
    "file": ("file",),
}
_DEFAULTS: dict[str, Any] = {
    "seed": 0, "val": 0.2, "test": 0.0, "stratify": None, "folds": 6, "fold": 0, "train": None, "file": None,
    "sites": None,
}  # fmt: skip


def make_split(subjects: Sequence[Subject], conf: Mapping[str, Any]) -> Split:
    """The split that a conf describes; whatever its kind, no patient lies in two sets.

    Args:
        subjects: the subjects to split. Leave out those that cannot be used, e.g. the unlabelled.
        conf: `kind` and what it reads:
            ratio (default): `val` 0.2 and `test` 0.0, fractions of the patients; `seed` 0; `stratify` null.
            folds: `folds` 6, `fold` 0; `val` 0.2, a fraction of the patients that are not tested, or a whole number
            of them; `seed`; `stratify`; `sites`, names that must all have subjects where `stratify` is site.
            explicit: `train`, `val`, `test`, lists of subject ids.
            file: `file`, a JSON file as `Split.save` writes it.
    """
    kind = conf.get("kind", "ratio")
    if kind not in _KEYS:
        raise UserError(f"split: unknown kind {kind!r}. Valid: {', '.join(_KEYS)}.")
    unknown = sorted(str(key) for key in conf if key != "kind" and key not in _DEFAULTS)
    if unknown:
        raise UserError(
            f"split: unknown key(s) {', '.join(unknown)}. Valid for {kind}: kind, {', '.join(_KEYS[kind])}."
        )
    # What is left over from another kind is no fault: a cohort's config comes with its own fractions. But a sweep over
    # folds that never makes any would run the same split again and again.
    if conf.get("fold") and kind != "folds":
        raise UserError(f"split: fold={conf['fold']} has no effect on kind {kind}. Set kind to folds or remove it.")
    values = {key: default if conf.get(key) is None else conf[key] for key, default in _DEFAULTS.items()}

    known = [subject.id for subject in subjects]
    if kind == "ratio":
        val, test = _number(values, "val"), _number(values, "test")
        fractions = (round(1 - val - test, 9), val, test)  # rounded, or 1 - 0.8 - 0.2 would be a little below 0
        split = ratio_split(subjects, fractions, seed=_integer(values, "seed"), stratify=values["stratify"])
    elif kind == "folds":
        if values["stratify"] == "site":
            _check_sites(subjects, values["sites"])
        val = _number(values, "val")
        split = fold_split(
            subjects,
            _integer(values, "folds"),
            _integer(values, "fold"),
            seed=_integer(values, "seed"),
            val_fraction=0.0 if isinstance(val, int) else val,
            val_count=val if isinstance(val, int) else 0,
            stratify=values["stratify"],
        )
    elif kind == "explicit":
        # 0 is how the numeric kinds say "none"; 0.2 left over from them is not a list and is refused.
        lists = {name: [] if conf.get(name) in (None, 0) else conf[name] for name in SETS}
        split = explicit_split(**lists, known_ids=known)
    else:
        if values["file"] is None:
            raise UserError("split: kind file needs `file`, the path of a saved split.")
        split = Split.load(values["file"])
        split.check(known)
    _check_patients(split, subjects)
    return split


def _check_sites(subjects: Sequence[Subject], expected: Sequence[str] | None) -> None:
    """A challenge that ships one archive a site is easily unpacked in part, and folds would be of fewer sites."""
    found = Counter(subject.site for subject in subjects)
    if absent := [site for site in expected or () if site not in found]:
        have = ", ".join(f"{site} ({number})" for site, number in found.items())
        raise UserError(
            f"split: data.split.sites expects {', '.join(expected or ())}, found {have}, none of {', '.join(absent)}. "
            "Unpack and prepare them, or set data.split.sites to null."
        )


def _by_patient(subjects: Sequence[Subject]) -> dict[str, list[Subject]]:
    """Patients in the order of their names, each with its subjects in the order of their ids."""
    if not subjects:
        raise UserError("split: there are no subjects to split. Check that the cohort was prepared and is labelled.")
    repeated = [subject for subject, number in Counter(s.id for s in subjects).items() if number > 1]
    if repeated:
        raise UserError(f"split: subject ids must be unique, found more than once: {_named(repeated)}.")
    patients = defaultdict(list)
    for subject in sorted(subjects, key=lambda s: (s.patient, s.id)):
        patients[subject.patient].append(subject)
    return dict(patients)


def _strata(patients: Mapping[str, Sequence[Subject]], stratify: str | None, salt: str) -> dict[str, list[str]]:
    """The patients of each stratum, shuffled by `salt`; one stratum when `stratify` is None."""
    if stratify is not None and stratify not in _STRATA:
        raise UserError(f"split: cannot stratify by {stratify!r}. Valid: null, {', '.join(_STRATA)}.")
    strata = defaultdict(list)
    for patient in sorted(patients, key=lambda p: hashlib.sha256(f"{salt}/{p}".encode()).digest()):
        value = None if stratify is None else getattr(patients[patient][0], stratify)
        strata["" if value is None else str(value)].append(patient)
    if stratify is not None and set(strata) == {""}:
        raise UserError(f"split: cannot stratify by {stratify}, no subject has one. Set stratify to null.")
    return dict(sorted(strata.items()))


def _draw(strata: dict[str, list[str]], count: int, *, turn: int) -> list[str]:
    """Take `count` patients out of the strata, each giving in proportion to its size."""
    drawn = []
    shares = _apportion(count, [len(members) for members in strata.values()], turn=turn)
    for (name, members), share in zip(strata.items(), shares, strict=True):
        drawn += members[:share]
        strata[name] = members[share:]
    return drawn


def _apportion(total: int, shares: Sequence[float], *, turn: int = 0) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `shares`: largest remainders, with ties rotated by `turn`."""
    whole = sum(shares) or 1  # nobody left to draw from, and nobody asked for
    quotas = [total * share / whole for share in shares]
    sizes = [int(quota + 1e-9) for quota in quotas]
    # Rounded, because equal remainders differ in the last digit.
    order = sorted(range(len(shares)), key=lambda i: (-round(quotas[i] - sizes[i], 9), (i - turn) % len(shares)))
    for i in order[: total - sum(sizes)]:
        sizes[i] += 1
    return sizes


def _split(patients: Mapping[str, Sequence[Subject]], val: Iterable[str], test: Iterable[str]) -> Split:
    """The sets as sorted subject ids; whoever neither validates nor tests trains."""
    role = {patient: "train" for patient in patients} | dict.fromkeys(val, "val") | dict.fromkeys(test, "test")
    ids: dict[str, list[str]] = {name: [] for name in SETS}
    for patient, visits in patients.items():
        ids[role[patient]] += [subject.id for subject in visits]
    return Split(**{name: tuple(sorted(ids[name])) for name in SETS})


def _check_patients(split: Split, subjects: Sequence[Subject]) -> None:
    role = {subject: name for name in SETS for subject in getattr(split, name)}
    where = defaultdict(set)
    for subject in subjects:
        if subject.id in role:
            where[subject.patient].add(role[subject.id])
    crossing = [
        f"{patient} (in {' and '.join(name for name in SETS if name in sets)})"
        for patient, sets in sorted(where.items())
        if len(sets) > 1
    ]
    if crossing:
        raise UserError(
            f"split: visits of one patient must stay in one set, found {_named(crossing)}. Move all visits to one side."
        )


def _ids(value: Any, where: str) -> tuple[str, ...]:
    """A list of ids as YAML or JSON gives it."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"split: {where} must be a list of subject ids, found {value!r}. Write [] for none.")
    wrong = [item for item in value if not isinstance(item, str)]
    if wrong:
        raise UserError(
            f"split: {where} holds {_named(map(repr, wrong))}, which is no text. Put quotes around the ids."
        )
    return tuple(value)


def _number(values: Mapping[str, Any], key: str) -> int | float:
    if isinstance(values[key], bool) or not isinstance(values[key], int | float):
        raise UserError(f"split: {key} must be a number, found {values[key]!r}. Lists of ids need kind explicit.")
    return values[key]


def _integer(values: Mapping[str, Any], key: str) -> int:
    if isinstance(values[key], bool) or not isinstance(values[key], int):
        raise UserError(f"split: {key} must be a whole number, found {values[key]!r}.")
    return values[key]


def _named(items: Iterable[str], first: int = 5) -> str:
    """The first few, and how many more there are."""
    items = list(items)
    more = len(items) - first
    return ", ".join(items[:first]) + (f" and {more} more" if more > 0 else "")
