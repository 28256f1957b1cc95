"""Tables 1 and 2 of Qu et al., made of the numbers in ``availability_numbers``."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mrgen.evaluation.augmentation_numbers import MEAN
from mrgen.evaluation.augmentation_tables import least_p, training_table
from mrgen.evaluation.availability_numbers import INDEX, region_labels
from mrgen.evaluation.figures import SEQUENCES
from mrgen.evaluation.statistics import FEWEST
from mrgen.evaluation.swap_tables import DASH, INTERVAL, Rows, cell, p_cell
from mrgen.evaluation.table import Table

__all__ = ["TEACHERS", "availability_tables"]

TEACHERS = "its own teachers"  # what judged a cohort where nobody else was asked

NAMES = {"dice": "Dice", "mse": "MSE"}
ORDERS = {"random": "random", "synthetic_first": "synthetic first", "real_first": "real first"}
TRAINING = {
    "real_slices": "real slices",
    "synthetic_slices": "synthetic slices",
    "enhanced_slices": "enhanced slices",
    "order": "order",
    "epochs": "epochs",
    "steps": "optimiser steps",
    "batch_size": "batch size",
    "equal_steps": "steps equalised",
}
RULE = (
    "Dice and MSE of maps of label numbers (section 3.4): a voxel counts by its label's number, an empty slice that "
    "stays empty scores 1; means over sequences and the slices that training shows of a scan. Not the Dice of regions."
)
BEST = (
    "best: the run with the highest Dice on these very test subjects, as the paper kept the best of four trainings: "
    "optimistic. What to expect of another training is the mean over the runs ± their standard deviation (n − 1)."
)


def availability_tables(
    summary: Rows,
    claims: Rows,
    *,
    title: str,
    study: Mapping[str, Any],
    regions: Sequence[str],
    sequences: Sequence[str],
    reference: str,
    cohorts: Sequence[Mapping[str, Any]] = (),
    training: Mapping[str, Mapping[str, Any]] | None = None,
    paper: bool = True,
    notes: Sequence[str] = (),
) -> dict[str, Table]:
    """The numbers for readers.

    Args:
        summary: of ``availability_numbers.availability_summary``.
        claims: of ``availability_numbers.availability_claims``.
        title: each table's begins with it.
        study: of the preset. ``rows``: by name ``real``, ``synthetic`` and ``enhanced`` (shares of the real training
            slices), ``order``, and the paper's ``mse`` and ``dice``. ``schemes``: by scheme, and ``real``: ``title``,
            ``mse``, ``dice``. ``paper``: ``title`` and ``caution``. ``close``: see ``availability_claims``.
        regions, reference: see ``availability_summary``.
        sequences: that have numbers of their own.
        cohorts: for Table 1: ``name``, ``scheme``, ``candidates`` (slices, before any was left out for its Dice), how
            many of them were ``kept``, ``dice`` and ``mse`` of what segmentors that were trained on real slices make of
            the candidates, and which ones, ``judge`` (a run, a checkpoint, or ``TEACHERS``).
        training: by run, how it was trained: the keys of ``TRAINING``, None where that is not known.
        paper: whether to print the paper's numbers beside ours.
        notes: below the first table.

    Returns:
        ``table 2``, ``table 1``, ``claims``, ``patients``, ``regions``, ``sequences`` and ``training``, as far as there
        are numbers. Rows that were not run are left out; runs that the preset does not name come last.
    """
    ordered = sorted(summary, key=lambda line: _place(line["input"], study))
    found = {
        "table 2": _table_2(ordered, f"{title}, Table 2", study, paper),
        "table 1": _table_1(ordered, cohorts, f"{title}, Table 1", study, reference, paper),
        "claims": _claims(claims, f"{title}, the paper's claims", study, paper),
        "patients": _patients(ordered, f"{title}, by patient", reference),
        "regions": _regions(ordered, f"{title}, Dice of regions", regions, reference),
        "sequences": _sequences(ordered, f"{title}, by sequence", sequences),
    }
    if training:
        first = {name: training[name] for name in sorted(training, key=lambda name: _place(name, study))}
        found["training"] = training_table(first, f"{title}, training", TRAINING)
        found["training"].notes.append("Repeats of a row are trained alike but for the seed.")
        unequal = _unequal(first, reference)
        found["training"].notes += unequal
        found["table 2"].notes[:0] = unequal  # what it says is to be read with this in mind
    tables = {name: table for name, table in found.items() if table.rows}
    for table in list(tables.values())[:1]:
        table.notes += notes
    return tables


def _place(name: str, study: Mapping[str, Any]) -> int:
    """Of a row in the paper's table; behind it where it has none."""
    names = list(study["rows"])
    return names.index(name) if name in names else len(names)


def _table_2(lines: Rows, title: str, study: Mapping[str, Any], paper: bool) -> Table:
    columns = ["row", "real", "synthetic", "enhanced", "mixing", "runs"]
    for name, best in zip(NAMES.values(), ("best Dice", "MSE of the best"), strict=True):
        columns += [name, best, *[f"paper {name}"] * paper]
    table = Table(title, columns)
    for line in lines:
        row = study["rows"].get(line["input"], {})
        cells = [line["input"], *(_times(row.get(key)) for key in ("real", "synthetic", "enhanced"))]
        cells += [ORDERS.get(str(row.get("order")), DASH), str(line["runs"])]
        for key in NAMES:
            spread = line[f"{key}_std"]
            cells.append(_number(line[key]) + ("" if math.isnan(spread) else f" ± {spread:.3f}"))
            cells += [_number(line[f"{key}_best"]), *[_number(row.get(key))] * paper]
        table.rows.append(cells)
    table.notes = [
        RULE,
        BEST,
        "×1: all real slices of training. All rows are to be trained for as many steps; the last table tells them.",
    ]
    if paper:
        table.notes += [
            f"Paper: {study['paper']['title']}.",
            f"Caution: {' '.join(study['paper']['caution'].split())}.",
        ]
    return table


def _table_1(lines: Rows, cohorts: Rows, title: str, study: Mapping[str, Any], reference: str, paper: bool) -> Table:
    """One line of real test slices, then one a cohort."""
    columns = ["guidance", "slices", "of", "judged by", "MSE", "Dice", *["paper MSE", "paper Dice"] * paper]
    table = Table(title, columns)
    real = [line for line in lines if line["input"] == reference] if cohorts else []

    def add(scheme: str, slices: str, of: str, judge: str, measured: Mapping[str, Any]) -> None:
        row = study["schemes"].get(scheme, {})
        cells = [str(row.get("title", scheme)), slices, of, judge]
        cells += [_number(measured[key]) for key in ("mse", "dice")]
        table.rows.append(cells + [_number(row.get(key)) for key in ("mse", "dice")] * paper)

    for line in real:
        runs = f"{line['runs']} run{'s' * (line['runs'] != 1)}"
        add("real", "real", "test subjects", f"{reference}, {runs}", line)
    for cohort in cohorts:
        slices = f"{cohort['candidates']} synthetic, {cohort['kept']} kept"
        add(cohort["scheme"], slices, cohort["name"], cohort["judge"], cohort)
    table.notes = [
        "guidance: the generator's scheme of segmentors (section 2.7). Synthetic slices: all candidates with a fitting "
        "label, before any was left out for its Dice, as segmentors find it that were trained on real slices alone.",
        f"judged by: whose segmentors these were, a run's or a checkpoint's. {TEACHERS}: those that guided the "
        "generator's training, so that its number is CIRCULAR, being what it was trained to make high; "
        "mrgen-synthesize segmentors=RUN asks others.",
        "A high Dice says that lesions look as the label has them, and not that the images look real.",
    ]
    return table


def _claims(lines: Rows, title: str, study: Mapping[str, Any], paper: bool) -> Table:
    columns = ["claim", "n", "ours", "difference", "p", "holds", "region Dice", *["paper"] * paper]
    table = Table(title, columns)
    for line in lines:
        cells = [line["claim"], str(line["n"]), _several(line["ours"]), cell(line, "difference", 3), p_cell(line["p"])]
        cells += ["yes" if line["holds"] else "no", cell(line, "region", 3)]
        table.rows.append(cells + [_several(line["paper"] or ())] * paper)
    table.notes = [
        "By the Dice of maps of label numbers, means over n patients of all runs of a row: they may differ from Table "
        "2's, which are over slices, and so may what holds.",
        f"difference: first − second, paired; {INTERVAL}. holds: our means stand as the paper has them, which may be "
        "chance: see p.",
        f'~: at most {study["close"]:g} apart, which is our reading of the paper\'s "similar" and "very close". '
        "rise, then fall: the best is neither the first nor the last. region Dice: the same difference in the Dice of "
        "regions, mean over the regions.",
        "p: two-sided Wilcoxon signed-rank test of the two rows, paired by patient; Holm-adjusted over all p of this "
        f"table; {DASH} below {FEWEST} patients. It knows the patients' spread and not that of another training.",
        *least_p(lines, "p"),
    ]
    return table


def _patients(lines: Rows, title: str, reference: str) -> Table:
    columns = ["row", "n", *NAMES.values()]
    for name in NAMES.values():
        columns += [f"{name} − {reference}", "p"]
    table = Table(title, columns)
    for line in lines:
        cells = [line["input"], str(line["n"]), *(cell(line, f"patient_{key}", 3) for key in INDEX)]
        for key in INDEX:
            cells += [cell(line, f"patient_{key}_change", 3), p_cell(line[f"patient_{key}_p"])]
        table.rows.append(cells)
    table.notes = [
        RULE,
        f"Means over n patients, of all runs of a row; {INTERVAL}.",
        _test(reference, "of each measure"),
        *least_p(lines, "patient_dice_p"),
    ]
    return table


def _regions(lines: Rows, title: str, regions: Sequence[str], reference: str) -> Table:
    labels = region_labels(regions)
    last = labels[-1]
    said = "mean" if last == MEAN else last
    table = Table(
        title, ["row", "n", *("mean" if name == MEAN else name for name in labels), f"{said} − {reference}", "p"]
    )
    for line in lines:
        cells = [line["input"], str(line["n"]), *(cell(line, f"region_{name}", 3) for name in labels)]
        table.rows.append([*cells, cell(line, f"region_{last}_change", 3), p_cell(line[f"region_{last}_p"])])
    table.notes = [
        "Labels by the mean score over sequences. Dice of all tested slices of a scan together, which is not that of "
        "a whole volume where its top and bottom are left out; a region in neither reference nor prediction scores 1.",
        f"Means over n patients, of all runs of a row; {INTERVAL}.",
        _test(reference, "and regions"),
        *least_p(lines, *(f"region_{name}_p" for name in labels)),
    ]
    return table


def _sequences(lines: Rows, title: str, sequences: Sequence[str]) -> Table:
    shown = {name: SEQUENCES.get(name, name) for name in sequences}
    columns = [f"{NAMES[key]} {said}" for key in INDEX for said in shown.values()]
    table = Table(title, ["row", *columns])
    for line in lines:
        table.rows.append([line["input"], *(_number(line[f"{key}_{name}"]) for key in INDEX for name in sequences)])
    table.notes = ["Labels from one sequence alone; means over slices, and over the runs of a row."]
    return table


def _unequal(training: Mapping[str, Mapping[str, Any]], reference: str) -> list[str]:
    """A note where rows were trained for other numbers of steps than the reference, or the first row."""
    known = {name: facts["steps"] for name, facts in training.items() if facts.get("steps") is not None}
    if len(set(known.values())) < 2:
        return []
    first = reference if reference in known else next(iter(known))
    others = [f"{name} {steps}" for name, steps in known.items() if steps != known[first]]
    return [f"NOT equal: optimiser steps. {first} was trained for {known[first]}, {', '.join(others)}."]


def _test(reference: str, family: str) -> str:
    return (
        f"p: two-sided Wilcoxon signed-rank test against {reference}, paired by patient; Holm-adjusted over all rows "
        f"{family}; {DASH} below {FEWEST} patients."
    )


def _times(share: float | None) -> str:
    return DASH if share is None else "0" if share == 0 else f"×{share:g}"


def _number(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.3f}"


def _several(values: Sequence[float]) -> str:
    return " / ".join(map(_number, values)) if values else DASH
