"""Tables of paper 3's cross-validation, made of the numbers in ``cross_validation_numbers``."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mrgen.evaluation.cross_validation_numbers import (
    CHALLENGE,
    DEPTHS,
    OFFLINE,
    QUALITY,
    SEGMENTATION,
    SIZES,
    TESTED,
    UNIMODAL,
    WHERE,
    cross_validation_directions,
    cross_validation_sites,
    cross_validation_summary,
    methods_of,
    recall_by_size,
)
from mrgen.evaluation.swap_tables import DASH, INTERVAL, Rows, cell, p_cell, wilcoxon_note
from mrgen.evaluation.table import Table
from mrgen.metrics.segmentation import HD95_ONE_EMPTY

__all__ = [
    "DEPTHS",
    "SIZES",
    "cross_validation_directions",
    "cross_validation_sites",
    "cross_validation_summary",
    "cross_validation_tables",
    "recall_by_size",
]

RATES = (
    "FPR = FP / (TP + FN) and FNR = FN / (TP + FN), voxels of a subject: false positives against the reference's "
    "volume, which may exceed 100 %. The paper does not define its FPR; its numbers fit this one."
)
EMPTY = (
    "Nothing there and nothing predicted: DSC 100, FPR and FNR 0. Nothing there and something predicted: DSC 0, "
    "FPR 100, FNR 0. Something there and nothing predicted: DSC 0, FPR 0, FNR 100."
)
IGNORED = "Other pathology (label 2) is removed from prediction and reference before anything is counted."


def cross_validation_tables(
    rows: Rows,
    lesions: Rows,
    *,
    title: str,
    paper: Mapping[str, Any] | None = None,
    reference: str = UNIMODAL,
    notes: Sequence[str] = (),
) -> dict[str, Table]:
    """The same numbers for readers.

    Args:
        rows: see ``cross_validation_summary``.
        lesions: see ``recall_by_size``.
        title: each table's begins with it.
        paper: see ``cross_validation_summary``.
        reference: likewise.
        notes: below the first table.

    Returns:
        Those of ``segmentation``, ``challenge``, ``imputation``, ``places``, ``sizes``, ``sites`` (of several) and
        ``directions`` that there are numbers for.
    """
    lines = cross_validation_summary(rows, reference=reference, paper=paper)
    folds = len({row["fold"] for row in rows})
    over = f"Mean over n subjects of {folds} fold{'s' * (folds != 1)}, the subject being the unit; {INTERVAL}."
    found = {
        "segmentation": _segmentation(lines, f"{title}, segmentation", over, reference),
        "challenge": _challenge(lines, f"{title}, measures of the WMH challenge", over),
        "imputation": _imputation(lines, f"{title}, imputation", over),
        "places": _places(lines, f"{title}, where false positives lie", over),
        "sizes": _sizes(lesions, f"{title}, lesions found by size"),
        "sites": _sites(rows, f"{title}, sites", over),
        "directions": _directions(cross_validation_directions(rows, paper=paper), f"{title}, the paper's claims"),
    }
    tables = {name: table for name, table in found.items() if table.rows}
    for table in tables.values():
        if any("paper" in column for column in table.columns):
            table.notes.append(f"Paper: {(paper or {})['title']}.")
    subjects = {name: frozenset(row["subject"] for row in rows if row["input"] == name) for name in methods_of(rows)}
    for table in list(tables.values())[:1]:
        if len(set(subjects.values())) > 1:
            table.notes.append("Not all methods have the same subjects: changes and tests are over those in common.")
        table.notes += notes
    return tables


def _segmentation(lines: Sequence[Mapping[str, Any]], title: str, over: str, reference: str) -> Table:
    columns = ["method", "n", *SEGMENTATION.values()]
    compared = len(lines) > 1 and any(line["input"] == reference for line in lines)
    columns += [f"{kind} {name}" for name in SEGMENTATION.values() for kind in ("change", "p")] * compared
    printed = any(f"paper_{key}" in line for line in lines for key in SEGMENTATION)
    table = Table(title, columns + [f"paper {' / '.join(SEGMENTATION.values())}"] * printed)
    for line in lines:
        cells = [line["input"], str(line["n"]), *(cell(line, key, 1) for key in SEGMENTATION)]
        for key in SEGMENTATION if compared else ():
            change = line.get(f"{key}_change")  # its interval would make the table too wide; the summary has it
            cells += [DASH if change is None else f"{change:+.1f}", p_cell(line[f"{key}_p"])]
        table.rows.append(cells + [_several((line.get(f"paper_{key}") for key in SEGMENTATION), 2, 2, 2)] * printed)
    table.notes = [f"In %. {over}", RATES, EMPTY, IGNORED]
    if compared:
        table.notes.append(f"change: the method − {reference} in points, paired by subject.")
        table.notes.append(wilcoxon_note(reference))
    return table


def _challenge(lines: Sequence[Mapping[str, Any]], title: str, over: str) -> Table:
    table = Table(title, ["method", "n", *CHALLENGE.values()])
    for line in lines:
        if any(key in line for key in CHALLENGE):
            table.rows.append([line["input"], str(line["n"]), *(cell(line, key, 1) for key in CHALLENGE)])
    table.notes = [
        over,
        "FDR = FP / (TP + FP), voxels. AVD = |P − R| / R, volumes. HD95: the larger of the two directed 95th "
        "percentiles.",
        "Lesions are 3D components across faces, edges and corners. cluster FPR: the share of those predicted that "
        "touch no reference; lesion recall: of those of the reference with a voxel predicted.",
        "Nothing there and nothing predicted: F1 and recall 100, the others 0. Nothing there and something predicted: "
        "recall, FDR, cluster FPR and AVD 100, F1 0. Something there and nothing predicted: AVD 100, all other "
        f"percentages 0. HD95 with one of the two empty: {HD95_ONE_EMPTY} mm.",
        IGNORED,
    ]
    return table


def _imputation(lines: Sequence[Mapping[str, Any]], title: str, over: str) -> Table:
    """One line a method and place, so that every number has room for its interval."""
    made = [line for line in lines if any(key in line for key in TESTED)]
    compared = len(made) > 1 and any(line["input"] == OFFLINE for line in made)
    printed = any(f"paper_{key}" in line for line in made for key in QUALITY)
    columns = [
        "method",
        "in",
        "n",
        *(name for key in QUALITY for name in [key.upper()] + [f"p {key.upper()}"] * compared),
    ]
    table = Table(title, [*columns, "PSNR, own range", *["paper MAE / PSNR"] * printed])
    for line in made:
        for where, end in WHERE.items():
            cells = [line["input"], where, str(line["n"])]
            for measure, digits in QUALITY.items():
                key = f"{measure}{end}"
                cells += [cell(line, key, digits), *[p_cell(line.get(f"{key}_p"))] * compared]
            cells.append(DASH if end else cell(line, "psnr_own", 2))
            values = {key: None if end else line.get(f"paper_{key}") for key in ("mae", "psnr")}
            table.rows.append(cells + [_several(values.values(), *(QUALITY[key] for key in values))] * printed)
    table.notes = [
        over,
        "On z-scored images; PSNR in dB and SSIM with data range 1, a convention, as the paper states no peak; own "
        "range: the real image's. image: with its background.",
    ]
    if compared:
        table.notes.append(wilcoxon_note(OFFLINE))
    return table


def _places(lines: Sequence[Mapping[str, Any]], title: str, over: str) -> Table:
    table = Table(title, ["method", "n", "place", "border (ml)", "apart (ml)"])
    for line in lines:
        for depth in DEPTHS:
            keys = [f"fp_{depth}_{side}" for side in ("border", "apart")]
            if any(key in line for key in keys):
                table.rows.append([line["input"], str(line["n"]), depth, *(cell(line, key, 3) for key in keys)])
    table.notes = [
        f"Volume of false positives a subject. {over}",
        "border: within 3 mm of a reference lesion; apart: the others. periventricular: within 10 mm of the "
        "ventricles; cortical: the rest within 10 mm of the brain's surface or outside it; deep: the rest.",
    ]
    return table


def _sizes(lesions: Rows, title: str) -> Table:
    table = Table(title, ["size (ml)", "method", "subjects", "lesions", "found (%)", "their voxels (%)"])
    for line in recall_by_size(lesions):
        counts = [str(line["subjects"]), str(line["lesions"])]
        table.rows.append([line["size"], line["input"], *counts, *(cell(line, key, 1) for key in ("found", "share"))])
    table.notes = [
        f"Lesions of the reference, those of all subjects together; {INTERVAL}. found: any voxel of it is predicted; "
        "their voxels: the share of a lesion that is predicted, mean over lesions.",
    ]
    return table


def _sites(rows: Rows, title: str, over: str) -> Table:
    table = Table(title, ["site", "method", "n", *SEGMENTATION.values()], notes=[f"In %. {over}", RATES])
    for line in cross_validation_sites(rows):
        cells = [line["site"] or DASH, line["input"], str(line["n"])]
        table.rows.append(cells + [cell(line, key, 1) for key in SEGMENTATION])
    return table


def _directions(lines: Sequence[Mapping[str, Any]], title: str) -> Table:
    printed = any(line["paper_first"] is not None for line in lines)
    table = Table(title, ["claim", "n", "ours", "difference", "p", "holds", *["paper"] * printed])
    for line in lines:
        digits = QUALITY.get(line["measure"], 1)
        cells = [f"{line['measure'].upper()}: {line['first']} {line['relation']} {line['second']}", str(line["n"])]
        cells.append(_several((line["first_mean"], line["second_mean"]), digits, digits))
        cells += [cell(line, "difference", digits), p_cell(line["p"]), "yes" if line["holds"] else "no"]
        as_printed = max(2, digits)
        cells += [_several((line["paper_first"], line["paper_second"]), as_printed, as_printed)] * printed
        table.rows.append(cells)
    table.notes = [
        f"Means over the n subjects that both methods have, and their difference, paired; {INTERVAL}. "
        "holds: our means stand as the paper's do, which may be chance: see p.",
        "DSC, FPR and FNR in %, PSNR in dB.",
        wilcoxon_note("no difference"),
    ]
    return table


def _several(values: Iterable[float | None], *digits: int) -> str:
    """Numbers in one cell; a dash for one that is missing, and one dash for all."""
    cells = [DASH if value is None else f"{value:.{n}f}" for value, n in zip(values, digits, strict=True)]
    return DASH if set(cells) == {DASH} else " / ".join(cells)
