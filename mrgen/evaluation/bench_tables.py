"""The bench: all imputers of one sequence under the same judges, all generators in the same mixes.

Numbers are those of the swap (``swap_summary``) and of augmentation (``augmentation_summary``), brought together: one
line a method, the best first. None of the papers has these two tables.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mrgen.evaluation.augmentation_numbers import augmentation_summary, method_of
from mrgen.evaluation.statistics import FEWEST
from mrgen.evaluation.swap import REAL
from mrgen.evaluation.swap_tables import DASH, INTERVAL, Rows, cell, estimate, p_cell, scores, swap_summary
from mrgen.evaluation.table import Table
from mrgen.evaluation.translation_tables import region_means

__all__ = ["augmentation_bench", "augmentation_bench_tables", "imputation_bench", "imputation_bench_tables"]

REGIONS_MEAN = "mean"
ERRORS = {  # and the digits that are printed
    "own_mse_brain": 4,
    "own_mse_tumour": 4,
    "mse_brain": 3,
    "mse_tumour": 3,
    "ssim_brain": 3,
    "ssim_tumour": 3,
}
HEADINGS = ("own MSE brain", "own MSE tumour", "MSE brain", "MSE tumour", "SSIM brain", "SSIM tumour")


def imputation_bench(judged: Mapping[str, Rows], *, regions: Sequence[str]) -> list[dict[str, Any]]:
    """One mapping an input set: the real sequences, then the methods from the best to the worst.

    Args:
        judged: by judge, the rows of ``Swap`` of the same methods and subjects.
        regions: of Dice.

    Returns:
        ``by`` (the method); of a synthesis the errors of ``ERRORS``, ``mse`` and ``ssim`` on the scale of the first
        judge: means over subjects, with ``_low`` and ``_high`` behind the name their 95% bootstrap interval; and for
        each judge ``JUDGE_dice_R``, ``JUDGE_dice_R_change`` (points of Dice, %) with their intervals, and
        ``JUDGE_dice_R_p``, as of ``swap_summary``: of every region and of ``mean``, each subject's mean of the
        regions. Lines are in the order of this mean, averaged over the judges.
    """
    lines: dict[str, dict[str, Any]] = {}
    measured = [*regions, REGIONS_MEAN]
    for judge, rows in judged.items():
        with_mean = [
            {**row, **({f"dice_{REGIONS_MEAN}": row["dice"]} if "dice" in row else {})}
            for row in region_means(rows, regions=regions)
        ]
        for found in swap_summary(with_mean, regions=measured):
            line = lines.setdefault(found["input"], {"by": found["by"]})
            if len(line) == 1 and found["input"] != REAL:
                line |= _errors(rows, found)
            for key in (f"dice_{region}" for region in measured):
                ends = ("", "_low", "_high", "_change", "_change_low", "_change_high", "_p")
                line |= {f"{judge}_{key}{end}": found[f"{key}{end}"] for end in ends if f"{key}{end}" in found}

    def rank(name: str) -> tuple[bool, float]:
        return name != REAL, -float(np.mean([lines[name][f"{judge}_dice_{REGIONS_MEAN}"] for judge in judged]))

    return [lines[name] for name in sorted(lines, key=rank)]


def _errors(rows: Rows, found: Mapping[str, Any]) -> dict[str, Any]:
    """``swap_summary`` has those on the judge's scale; the others come from the rows."""
    line: dict[str, Any] = {}
    for key in ERRORS:
        if key in found:
            line |= {f"{key}{end}": found[f"{key}{end}"] for end in ("", "_low", "_high")}
        else:
            line |= estimate(key, list(scores(rows, found["input"], key).values()))
    return line


def imputation_bench_tables(
    lines: Sequence[Mapping[str, Any]],
    *,
    judges: Sequence[str],
    regions: Sequence[str],
    title: str,
    subjects: int,
    notes: Sequence[str] = (),
) -> list[Table]:
    """The same for readers: all at a glance, then errors with their intervals, then each judge's changes with p.

    Args:
        lines: of ``imputation_bench``.
        judges: their names.
        regions: as there.
        title: each table's begins with it.
        subjects: how many.
        notes: below the first table.
    """
    measured = [*regions, REGIONS_MEAN]
    glance = Table(
        title, ["by", "MSE brain", "MSE tumour", *(f"{judge} {part}" for judge in judges for part in measured)]
    )
    for line in lines:
        cells = [line["by"], *(_mean(line, key, 3) for key in ("mse_brain", "mse_tumour"))]
        glance.rows.append(cells + [_with_change(line, f"{j}_dice_{part}") for j in judges for part in measured])
    glance.notes = [
        f"Means over {subjects} held-out subjects, the same for all. MSE on the first judge's scale; Dice in %, in "
        "brackets its change against the real sequence in points; mean: of the regions in each subject. From the best "
        "to the worst by this mean over the judges; all real and nothing, the sequence left out, are the bounds.",
        *notes,
    ]
    errors = Table(f"{title}, errors of the images", ["by", *HEADINGS])
    for line in lines:
        if "own_mse_brain" in line:
            errors.rows.append([line["by"], *(cell(line, key, digits) for key, digits in ERRORS.items())])
    errors.notes = [
        f"Mean over subjects; {INTERVAL}. Without a lesion a subject has no tumour to measure in.",
        "own MSE: both images rescaled to [0, 1] by their own extremes, all methods alike. MSE and SSIM: as the first "
        "judge gets the image, z-scored: what was made on another scale is normalised anew by its own statistics.",
    ]
    tables = [glance, errors]
    for judge in judges:
        columns = [column for part in measured for column in (part, "p")]
        table = Table(f"{title}, change of Dice, judged by {judge}", ["by", *columns])
        for line in lines:
            keys = [f"{judge}_dice_{part}" for part in measured]
            if f"{keys[0]}_change" in line:
                cells = [(cell(line, f"{key}_change", 1), p_cell(line[f"{key}_p"])) for key in keys]
                table.rows.append([line["by"], *(part for pair in cells for part in pair)])
        table.notes = [
            f"Mean difference from the real row in points of Dice, paired by subject; {INTERVAL}.",
            _test("the real row"),
        ]
        tables.append(table)
    return tables


def augmentation_bench(rows: Rows, *, labels: Sequence[str], reference: str) -> list[dict[str, Any]]:
    """``augmentation_summary`` of rows in which repeated trainings are averaged, from the best run to the worst.

    Args:
        rows: of ``mrgen.evaluation.augmentation.Augmentation``.
        labels: names of classes.
        reference: the run on real slices alone, which comes first.

    Returns:
        Its lines, with ``trainings``, how many were averaged within each patient; a run's lines stay together, and runs
        are in the order of their last line's Dice, the mean of the labels.
    """
    names = list(dict.fromkeys(str(row["input"]) for row in rows))
    averaged = [{**row, "input": method_of(row["input"])} for row in rows]
    of_runs: dict[str, list[dict[str, Any]]] = {}
    for line in augmentation_summary(averaged, labels=labels, reference=reference):
        count = sum(method_of(name) == line["input"] for name in names)
        of_runs.setdefault(line["input"], []).append({**line, "trainings": count})
    ordered = sorted(of_runs, key=lambda name: (name != reference, -of_runs[name][-1]["dice"]))
    return [line for name in ordered for line in of_runs[name]]


def augmentation_bench_tables(
    lines: Sequence[Mapping[str, Any]], *, reference: str, title: str, notes: Sequence[str] = ()
) -> list[Table]:
    """The same for readers: all at a glance, then the changes with intervals and p.

    Args:
        lines: of ``augmentation_bench``.
        reference: as there.
        title: each table's begins with it.
        notes: below the first table.
    """
    labels = list(dict.fromkeys(line["label"] for line in lines))
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        runs.setdefault(line["input"], []).append(line)
    patients = max((line["n"] for line in lines), default=0)
    glance = Table(title, ["trained on", "trainings", *labels])
    change = Table(f"{title}, change of Dice", ["trained on", *(part for label in labels for part in (label, "p"))])
    for name, parts in runs.items():
        glance.rows.append([name, str(parts[0]["trainings"]), *(_with_change(part, "dice", 3) for part in parts)])
        if name != reference and "dice_change" in parts[0] and not np.isnan(parts[0]["dice_change"]):
            cells = [(cell(part, "dice_change", 3), p_cell(part["dice_p"])) for part in parts]
            change.rows.append([name, *(part for pair in cells for part in pair)])
    glance.notes = [
        f"Dice of volumes, means over {patients} unseen patients, trainings averaged within each; in brackets the "
        f"change against {reference}, real slices alone. A run is called as its generator and as the number of its "
        "synthetic slices for each real one. From the best to the worst by the last column.",
        *notes,
    ]
    change.notes = [f"Mean difference from {reference}, paired by patient; {INTERVAL}.", _test(reference)]
    return [table for table in (glance, change) if table.rows]


def _mean(line: Mapping[str, Any], key: str, digits: int) -> str:
    value = line.get(key, np.nan)
    return DASH if np.isnan(value) else f"{value:.{digits}f}"


def _with_change(line: Mapping[str, Any], key: str, digits: int = 1) -> str:
    change = line.get(f"{key}_change", np.nan)
    return _mean(line, key, digits) + ("" if np.isnan(change) else f" ({change:+.{digits}f})")


def _test(against: str) -> str:
    test = f"p: two-sided Wilcoxon signed-rank test against {against}, paired"
    return f"{test}; Holm-adjusted over all p of this table; {DASH} below {FEWEST} pairs."
