"""Tables of the judgement of augmentation, made of the numbers in ``augmentation_numbers``."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mrgen.evaluation.augmentation_numbers import (
    MEAN,
    MEASURES,
    augmentation_directions,
    augmentation_repeats,
    augmentation_summary,
    method_of,
    runs_of,
)
from mrgen.evaluation.statistics import FEWEST
from mrgen.evaluation.swap_tables import DASH, INTERVAL, Rows, cell, p_cell, wilcoxon_note
from mrgen.evaluation.table import Table
from mrgen.metrics.segmentation import HD95_ONE_EMPTY

__all__ = ["augmentation_tables", "least_p", "training_table"]

NAMES = {"dice": "Dice", "hd95": "HD95 (mm)", "sensitivity": "sensitivity", "specificity": "specificity"}
TRAINING = {
    "real_slices": "real slices",
    "synthetic_slices": "synthetic slices",
    "epochs": "epochs",
    "steps": "optimiser steps",
    "batch_size": "batch size",
    "equal_steps": "steps equalised",
}
RULES = (
    f"A label in neither reference nor prediction: Dice 1, HD95 0; in just one: Dice 0, HD95 {HD95_ONE_EMPTY} mm. "
    "HD95: the larger of the two directed 95th percentiles. Sensitivity: of patients whose reference has the label. "
    "Specificity: over all voxels of the network's slices, air included."
)


def augmentation_tables(
    rows: Rows,
    *,
    title: str,
    labels: Mapping[str, str],
    reference: str,
    experiments: Sequence[Mapping[str, Any]] = (),
    claims: Sequence[Sequence[str]] = (),
    training: Mapping[str, Mapping[str, Any]] | None = None,
    paper: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Table]:
    """The numbers for readers.

    Args:
        rows: of ``mrgen.evaluation.augmentation.Augmentation``.
        title: each table's begins with it.
        labels: names of the classes to report, and what stands for each in the paper.
        reference: the run that was trained on real slices alone.
        experiments: of the paper, a table each: ``title``, and ``rows`` by run name: ``dice``, ``hd95``,
            ``sensitivity`` and ``specificity`` as printed, a number a label, as far as they are. Rows that were not run
            are left out; runs that are in none have a table of their own.
        claims: see ``augmentation_numbers.augmentation_directions``.
        training: by run, how it was trained: the keys of ``TRAINING``, None where that is not known.
        paper: ``title``, and ``preference``: ``title`` and ``rows``, numbers to be printed as reference only. None
            leaves out all that a paper printed, also that of ``experiments``.
        notes: below the first table.

    Returns:
        ``training``, one a part of the experiments (``experiment 1`` …), ``others``, ``differences``, ``slices``,
        ``slice differences``, ``empty``, ``repeats``, ``directions`` and ``preference``, as far as there are numbers.
    """
    lines = augmentation_summary(rows, labels=list(labels), reference=reference)
    patients = len({row["patient"] for row in rows})
    over = f"Mean over {patients} patient{'s' * (patients != 1)}, who are the subjects; {INTERVAL}."
    stands = [f"{label} for its {name}" for label, name in labels.items() if label != name]
    source = (
        [] if paper is None else [f"Paper: {paper['title']}.", *([f"Its labels: {', '.join(stands)}."] * bool(stands))]
    )
    printed = {} if paper is None else {name: row for part in experiments for name, row in part["rows"].items()}
    found: dict[str, Table] = {}
    if training:
        found["training"] = training_table(training, f"{title}, training", TRAINING)
    for number, part in enumerate(experiments, start=1):
        names = [name for wanted in part["rows"] for name in runs_of(rows) if method_of(name) == wanted]
        values = part["rows"] if paper else None
        table = _scores(lines, _led(names, rows, reference), f"{title}, {part['title']}", values)
        table.notes = [f"Volumes. {over}", RULES, *source]
        found[f"experiment {number}"] = table
    named = {name for part in experiments for name in part["rows"]}
    others = [name for name in runs_of(rows) if method_of(name) not in {*named, reference}]
    if not experiments:
        others = runs_of(rows)
    heading = f"{title}, runs that the preset does not name" if experiments else f"{title}, volumes"
    found["others"] = _scores(lines, _led(others, rows, reference), heading, None)
    found["others"].notes = [f"Volumes. {over}", RULES]
    found["differences"] = _differences(lines, "", f"{title}, differences from {reference}", reference)
    found["slices"] = _scores(lines, runs_of(rows), f"{title}, slices", None, "slice_")
    found["slices"].notes = [
        f"Axial slices of the test scans that hold brain, averaged within the patient first. {over}",
        f"{RULES} So slices without the label count much: see the table of empty labels.",
    ]
    found["slice differences"] = _differences(
        lines, "slice_", f"{title}, slices, differences from {reference}", reference
    )
    found["empty"] = _empty(lines, f"{title}, where a label is empty")
    found["repeats"] = _repeats(augmentation_repeats(rows, labels=list(labels)), f"{title}, repeated trainings")
    directions = augmentation_directions(rows, labels=list(labels), claims=claims, paper=printed)
    found["directions"] = _directions(directions, f"{title}, the paper's claims", len(labels))
    if paper and paper.get("preference"):
        preference = paper["preference"]
        cells = [[name, str(value)] for name, value in preference["rows"].items()]
        found["preference"] = Table(str(preference["title"]), ["method", "paper"], cells)
        found["preference"].notes = ["As printed, for reference only: NOT measured here."]
    tables = {name: table for name, table in found.items() if table.rows}
    for table in list(tables.values())[:1]:
        table.notes += notes
    return tables


def _led(names: Sequence[str], rows: Rows, reference: str) -> list[str]:
    """The reference first, where there is anything to compare with it."""
    if not names:
        return []
    leading = [name for name in runs_of(rows) if method_of(name) == reference]
    return [*leading, *(name for name in names if name not in leading)]


def training_table(training: Mapping[str, Mapping[str, Any]], title: str, columns: Mapping[str, str]) -> Table:
    """How every run was trained.

    Args:
        training: by run, what is known of it; ``steps`` must be equal, or a note says that they are not.
        title: the table's.
        columns: headings of what is shown, by its key in ``training``.
    """
    table = Table(title, ["run", *columns.values()])
    for name, facts in training.items():
        values = [facts.get(key) for key in columns]
        table.rows.append([name, *(_said(value) for value in values)])
    table.notes = ["steps equalised: an epoch has as many as of the real slices alone. batch size: of all devices."]
    known = {facts.get("steps") for facts in training.values()} - {None}
    if len(known) > 1:
        table.notes.append("The runs differ in their number of optimiser steps, and not in their data alone.")
    return table


def _said(value: Any) -> str:
    return DASH if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _scores(
    lines: Rows,
    names: Sequence[str],
    title: str,
    printed: Mapping[str, Mapping[str, Sequence[float]]] | None,
    place: str = "",
) -> Table:
    """One line a run and label; what was printed stands in one cell."""
    with_paper = printed is not None and any(printed.get(method_of(name)) for name in names)
    columns = ["run", "label", *(NAMES[key] for key in MEASURES)]
    table = Table(
        title, columns + [f"paper {' / '.join(name.partition(' ')[0] for name in NAMES.values())}"] * with_paper
    )
    for name in names:
        mine = [line for line in lines if line["input"] == name]
        for i, line in enumerate(mine):
            cells = [name, line["label"], *(cell(line, f"{place}{key}", digits) for key, digits in MEASURES.items())]
            if with_paper:
                row = (printed or {}).get(method_of(name)) or {}
                values = [_printed(row.get(key), i, line["label"]) for key in MEASURES]
                cells.append(_several(values, [min(3, digits) + (key == "hd95") for key, digits in MEASURES.items()]))
            table.rows.append(cells)
    return table


def _printed(values: Sequence[float] | None, place: int, label: str) -> float | None:
    """A paper prints no mean over its labels; it is made here."""
    if values is None:
        return None
    return float(np.mean(values)) if label == MEAN else values[place]


def _differences(lines: Rows, place: str, title: str, reference: str) -> Table:
    against = any(method_of(line["input"]) == reference for line in lines)
    columns = ["run", "label", *(column for key in MEASURES for column in (NAMES[key], "p"))]
    table = Table(title, columns)
    for line in lines if against else ():
        if method_of(line["input"]) != reference:
            cells = [line["input"], line["label"]]
            for key, digits in MEASURES.items():
                cells += [cell(line, f"{place}{key}_change", digits), p_cell(line[f"{place}{key}_p"])]
            table.rows.append(cells)
    table.notes = [
        f"The run − {reference}, paired by patient; {INTERVAL}.",
        f"p: two-sided Wilcoxon signed-rank test against {reference}, paired by patient; Holm-adjusted over all runs "
        f"and labels, of each measure in turn; {DASH} below {FEWEST} patients.",
    ]
    table.notes += least_p(lines, "dice_p")
    return table


def least_p(lines: Rows, *keys: str) -> list[str]:
    """A note where Holm's adjustment leaves nothing to find.

    Args:
        lines: with ``n``, the number of patients.
        keys: of the p-values of one family, None where there was no test.
    """
    tests = sum(line[key] is not None for line in lines for key in keys)
    least = tests * 2 / 2 ** max((line["n"] for line in lines), default=0)
    few = f"So many tests of so few patients: no p can fall below {p_cell(min(1.0, least))}."
    return [few] if least >= 0.01 else []


def _empty(lines: Rows, title: str) -> Table:
    columns = ["run", "label", "one empty", "median HD95", "Dice if there", "slices", "with it", "missed", "false"]
    table = Table(title, [*columns, "slice Dice if there", "slice HD95 if in both"])
    for line in lines:
        if line["label"] == MEAN:
            continue
        cells = [line["input"], line["label"], str(line["one_empty"]), _number(line["hd95_median"], 2)]
        cells.append(_number(line["dice_there"], 3))
        cells += [str(line[key]) for key in ("slices", "slices_there", "slices_missed", "slices_false")]
        table.rows.append([*cells, _number(line["slice_dice_there"], 3), _number(line["slice_hd95_both"], 2)])
    table.notes = [
        "one empty: scans whose label is in just one of reference and prediction; median HD95: over patients; "
        "Dice if there: mean over patients whose reference has the label.",
        "slices: those with brain, of all scans; with it: with the label in the reference; missed: of these, with none "
        "predicted; false: of the others, with some predicted. slice Dice if there: mean over patients of that over "
        "slices with it. slice HD95 if in both: mean over patients of the median over slices with it in both.",
    ]
    return table


def _repeats(lines: Rows, title: str) -> Table:
    table = Table(title, ["run", "label", "runs", "Dice", "least to most", "Dice of slices", "least to most"])
    for line in lines:
        cells = [line["input"], line["label"], str(line["runs"])]
        for key in ("dice", "slice_dice"):
            cells.append(f"{line[key]:.3f} ± {line[f'{key}_std']:.3f}")
            cells.append(f"{line[f'{key}_least']:.3f} to {line[f'{key}_most']:.3f}")
        table.rows.append(cells)
    table.notes = ["Mean ± standard deviation (n − 1) over trainings of one name, of their means over patients."]
    return table


def _directions(lines: Rows, title: str, labels: int) -> Table:
    printed = any(line["paper_first"] is not None for line in lines)
    table = Table(
        title, ["claim", "n", "ours", "difference", "p", "holds", "difference if there", *["paper"] * printed]
    )
    for line in lines:
        cells = [f"{line['first']} {line['relation']} {line['second']}", str(line["n"])]
        cells.append(_several((line["first_mean"], line["second_mean"]), (3, 3)))
        holds = "yes" if line["holds"] else "no" if line["difference"] else "tie"
        cells += [cell(line, "difference", 3), p_cell(line["p"]), holds]
        cells.append(cell(line, "there", 3))
        table.rows.append(cells + [_several((line["paper_first"], line["paper_second"]), (3, 3))] * printed)
    of = "mean over the labels" if labels > 1 else "of the label"
    table.notes = [
        f"Dice of volumes, {of}; means over n patients and their difference, paired; {INTERVAL}. Repeated runs are "
        "averaged within each patient. holds: our means stand as the paper has them, which may be chance: see p.",
        "difference if there: over the labels that a patient's reference has. Of the others, nothing predicted scores "
        "1 and anything 0.",
        wilcoxon_note("no difference"),
    ]
    return table


def _number(value: float, digits: int) -> str:
    return DASH if math.isnan(value) else f"{value:.{digits}f}"


def _several(values: Iterable[float | None], digits: Sequence[int]) -> str:
    """Numbers in one cell; a dash for one that is missing, and one dash for all."""
    cells = [DASH if value is None else f"{value:.{n}f}" for value, n in zip(values, digits, strict=True)]
    return DASH if set(cells) == {DASH} else " / ".join(cells)
