"""Tables of paper 5's judgement: how near a translated sequence is to the real one, and what it costs a segmenter.

Numbers first (``translation_summary``), then cells that are made of them (``translation_tables``). What the paper
printed comes from the preset, by row name and measure.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mrgen.evaluation.statistics import bootstrap_interval
from mrgen.evaluation.swap import REAL
from mrgen.evaluation.swap_tables import (
    DASH,
    INTERVAL,
    Rows,
    adjust,
    cell,
    p_cell,
    p_value,
    paired,
    scores,
    wilcoxon_note,
)
from mrgen.evaluation.table import Table
from mrgen.metrics.segmentation import HD95_ONE_EMPTY

__all__ = ["region_means", "translation_summary", "translation_tables"]

ERRORS = tuple(f"{kind}_mse_{place}" for kind in ("own", "unit") for place in ("brain", "tumour"))
OVERLAP = ("dice", "hd95_mean", "hd95")
AGREEMENT = tuple(f"agree_{measure}" for measure in OVERLAP)
CHANGES = {"dice": 1, "hd95_mean": -1}  # and the sign with which a negative change is a worse one
WITH_INTERVAL = ("own_mse_brain", "own_mse_tumour", "dice", "dice_change", "agree_dice")
NAMES = {"dice": "Dice", "hd95_mean": "HD95, mean", "hd95": "HD95, maximum"}
HD95_NOTE = (
    "HD95 in mm: of the two directed 95th percentiles the mean (Plastimatch's, which the paper cites) and the maximum; "
    f"a region empty in both maps scores 0, in one {HD95_ONE_EMPTY}."
)


def region_means(rows: Rows, *, regions: Sequence[str]) -> list[dict[str, Any]]:
    """The rows with what the paper averages over whole, core and active tumour.

    Args:
        rows: of ``Swap``.
        regions: those that are averaged.

    Returns:
        Copies, with ``dice``, ``hd95_mean``, ``hd95`` and the same after ``agree_`` where a row has all regions of it;
        nan where one of them is.
    """
    made = []
    for row in rows:
        parts = {measure: [f"{measure}_{region}" for region in regions] for measure in (*OVERLAP, *AGREEMENT)}
        there = {measure: keys for measure, keys in parts.items() if keys and all(key in row for key in keys)}
        means = {measure: float(np.mean([row[key] for key in keys])) for measure, keys in there.items()}
        made.append({**row, **means})
    return made


def translation_summary(
    rows: Rows, *, regions: Sequence[str], paper: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One mapping an input set, in the order of ``rows``: what ``table.csv`` holds.

    Args:
        rows: of ``Swap``.
        regions: whole, core and active tumour.
        paper: ``title``; ``rows`` by input name, each by measure (a name of these columns without ``paper_``) and test
            set a number, or mean and standard deviation; ``notes`` by table.

    Returns:
        ``input``, ``synthesised``, ``by``, ``n`` (subjects), and where a row has it: ``own_mse_brain``,
        ``own_mse_tumour``, ``unit_mse_brain``, ``unit_mse_tumour``; ``dice`` (0 to 1), ``hd95_mean`` and ``hd95`` (mm),
        means of the regions; ``agree_`` before these three; ``dice_change`` (method − real) and ``hd95_mean_change``
        (real − method), paired by subject, with ``_p``, of the paired Wilcoxon test, Holm-adjusted over both columns.
        These are means over subjects, with ``_sd`` (of the sample), ``_median`` and ``_n`` behind the name, and of
        ``own_mse_…``, ``dice``, ``dice_change`` and ``agree_dice`` the ends ``_low`` and ``_high`` of the mean's 95%
        bootstrap interval. Of single regions the means: ``dice_R``, ``hd95_mean_R``, ``hd95_R``. At last
        ``paper_MEASURE_SET``, with ``_sd`` behind it.
    """
    rows = region_means(rows, regions=regions)
    lines: list[dict[str, Any]] = []
    for name in dict.fromkeys(str(row["input"]) for row in rows):
        target, _, method = name.partition("/")
        line: dict[str, Any] = {"input": name, "synthesised": target, "by": method}
        if name == REAL:
            line |= {"synthesised": DASH, "by": "all real"}
        line["n"] = sum(row["input"] == name for row in rows)
        for key in (*ERRORS, *OVERLAP, *AGREEMENT):
            line |= _described(key, list(scores(rows, name, key).values()))
        for key in (f"{measure}_{region}" for measure in OVERLAP for region in regions):
            if found := list(scores(rows, name, key).values()):
                line[key] = float(np.mean(found))
        for measure, sign in CHANGES.items():
            if name != REAL and (pairs := paired(rows, name, REAL, measure)):
                line |= _described(f"{measure}_change", [sign * (value - real) for value, real in pairs])
                line[f"{measure}_change_p"] = p_value(rows, name, REAL, measure)
        for measure, printed in _printed(paper, name).items():
            for test_set, value in printed.items():
                mean, *sd = value if isinstance(value, Sequence) else [value]
                line |= {f"paper_{measure}_{test_set}": mean, **{f"paper_{measure}_{test_set}_sd": x for x in sd}}
        lines.append(line)
    tested = [f"{measure}_change_p" for measure in CHANGES]
    changed = [line for line in lines if any(key in line for key in tested)]
    for line in changed:
        line |= {key: line.get(key) for key in tested}
    adjust(changed, tested)
    return lines


def translation_tables(
    rows: Rows,
    *,
    regions: Sequence[str],
    title: str,
    paper: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Table]:
    """The same numbers for readers.

    Args:
        rows: of ``Swap``.
        regions: whole, core and active tumour.
        title: each table's begins with it.
        paper: see ``translation_summary``.
        notes: below the first table.

    Returns:
        Those of ``mse``, ``overlap``, ``change``, ``regions`` and ``agreement`` that the rows have numbers for.
    """
    if not any(row["input"] in (paper or {}).get("rows", {}) for row in rows if row["input"] != REAL):
        paper = None  # of another target, say
    lines = translation_summary(rows, regions=regions, paper=paper)
    over = f"Mean of {', '.join(regions)} in each subject; n: subjects; {INTERVAL}."
    found = {
        "mse": _mse(lines, title, paper),
        "overlap": _overlap(lines, "", [f"Against the ground truth. {over}", HD95_NOTE], f"{title}, overlap", paper),
        "change": _change(lines, title, paper),
        "regions": _regions(lines, regions, title),
        "agreement": _overlap(
            lines,
            "agree_",
            [f"Against what the same segmenter makes of the real sequences, without ground truth. {over}", HD95_NOTE],
            f"{title}, agreement with the segmentation from the real sequences",
            paper,
        ),
    }
    tables = {name: table for name, table in found.items() if table.rows}
    for name, table in tables.items():
        said = list((paper or {}).get("notes", {}).get(name, []))
        if paper and (said or any(column.startswith("paper") for column in table.columns)):
            table.notes += [f"Paper: {paper['title']}.", *said]
    for table in list(tables.values())[:1]:
        table.notes += notes
    return tables


def _mse(lines: Sequence[Mapping[str, Any]], title: str, paper: Mapping[str, Any] | None) -> Table:
    """One line a synthesis and place, so that every number has room."""
    made = [line for line in lines if "own_mse_brain" in line]
    unit = any("unit_mse_brain" in line for line in made)
    scalings = ["own scaling", "as made"] if unit else ["own scaling"]
    numbers = [f"{scaling}{of}" for scaling in scalings for of in ("", ", sd", ", median")]
    table = Table(f"{title}, MSE", ["synthesised", "by", "in", "n", *numbers])
    places = [(line, place) for line in made for place in ("brain", "tumour")]
    for line, place in places:
        own, as_made = f"own_mse_{place}", f"unit_mse_{place}"
        cells = [*_names(line), place, str(line.get(f"{own}_n", 0)), cell(line, own, 4)]
        cells += [cell(line, key, 4) for key in (f"{own}_sd", f"{own}_median")]
        table.rows.append(cells + [cell(line, f"{as_made}{end}", 4) for end in ("", "_sd", "_median")] * unit)
    _beside(table, "paper", [(line["input"], f"own_mse_{place}") for line, place in places], paper, ".2f")
    table.notes = [
        f"Mean, standard deviation and median over n subjects; {INTERVAL}. "
        "Without a lesion a subject has no tumour to measure in.",
        "own scaling: both images rescaled to [0, 1] by their own extremes, as the paper does; brain: the union of "
        "their foregrounds.",
    ]
    if unit:
        table.notes.append("as made: in units of the real scan's range and not rescaled, so that a bias counts.")
    return table


def _overlap(
    lines: Sequence[Mapping[str, Any]], prefix: str, notes: list[str], title: str, paper: Mapping[str, Any] | None
) -> Table:
    judged = [line for line in lines if f"{prefix}dice" in line]
    table = Table(title, ["synthesised", "by", "n", *NAMES.values()], notes=notes)
    for line in judged:
        cells = [cell(line, f"{prefix}{measure}", 3) for measure in OVERLAP]
        table.rows.append([*_names(line), str(line[f"{prefix}dice_n"]), *cells])
    for measure in OVERLAP:
        places = [(line["input"], f"{prefix}{measure}") for line in judged]
        _beside(table, f"paper {NAMES[measure]}", places, paper, ".3f")
    return table


def _change(lines: Sequence[Mapping[str, Any]], title: str, paper: Mapping[str, Any] | None) -> Table:
    judged = [line for line in lines if "dice_change" in line]
    table = Table(f"{title}, change against the real sequence", ["synthesised", "by", "n"])
    for measure in CHANGES:
        table.columns = [*table.columns, NAMES[measure], f"p {NAMES[measure]}"]
    for line in judged:
        cells = [*_names(line), str(line["dice_change_n"])]
        for key in (f"{measure}_change" for measure in CHANGES):
            mean, sd = line.get(key, math.nan), line.get(f"{key}_sd", math.nan)
            cells += [DASH if math.isnan(mean) else _number((mean, sd), "+.4f"), p_cell(line.get(f"{key}_p"))]
        table.rows.append(cells)
    for measure in CHANGES:
        places = [(line["input"], f"{measure}_change") for line in judged]
        _beside(table, f"paper {NAMES[measure]}", places, paper, "+.4f")
    table.notes = [
        "Mean ± standard deviation over n subjects, paired, of the mean of the regions. Dice: method − real; HD95: "
        "real − method. Negative is worse in both.",
        HD95_NOTE,
        wilcoxon_note("no change"),
    ]
    return table


def _regions(lines: Sequence[Mapping[str, Any]], regions: Sequence[str], title: str) -> Table:
    places = [(measure, region) for measure in OVERLAP for region in regions]
    columns = [f"{NAMES[measure]} {region}" for measure, region in places]
    table = Table(f"{title}, regions", ["synthesised", "by", "n", *columns])
    keys = [f"{measure}_{region}" for measure, region in places]
    for line in lines:
        if "dice" in line:
            table.rows.append([*_names(line), str(line["dice_n"]), *(cell(line, key, 3) for key in keys)])
    table.notes = ["Mean over n subjects, against the ground truth.", HD95_NOTE]
    return table


def _names(line: Mapping[str, Any]) -> list[str]:
    return [line["synthesised"], line["by"]]


def _described(key: str, values: Sequence[float]) -> dict[str, Any]:
    """Nothing of no values, so that what was not measured has no column."""
    if not values:
        return {}
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    line: dict[str, Any] = {key: float(np.mean(values))}
    if key in WITH_INTERVAL:
        line[f"{key}_low"], line[f"{key}_high"] = bootstrap_interval(values)
    return line | {f"{key}_sd": sd, f"{key}_median": float(np.median(values)), f"{key}_n": len(values)}


def _printed(paper: Mapping[str, Any] | None, name: str) -> Mapping[str, Mapping[str, Any]]:
    """By measure and test set. A repeated method carries a running number; the paper has one row for it."""
    return (paper or {}).get("rows", {}).get(name.partition("#")[0]) or {}


def _beside(
    table: Table, heading: str, places: Iterable[tuple[str, str]], paper: Mapping[str, Any] | None, style: str
) -> None:
    """Sets the paper's numbers beside the rows: one column, a number a test set, where it printed any of the measure.

    Args:
        table: gets the column.
        heading: of the column, before the names of the test sets.
        places: input name and measure of every row.
        paper: see ``translation_summary``.
        style: of a number.
    """
    printed = [_printed(paper, name).get(measure, {}) for name, measure in places]
    sets = list(dict.fromkeys(test_set for values in printed for test_set in values))
    if not sets:
        return
    table.columns = [*table.columns, f"{heading}: {' / '.join(sets)}"]
    for cells, values in zip(table.rows, printed, strict=True):
        cells.append(" / ".join(_number(values.get(test_set), style) for test_set in sets) if values else DASH)


def _number(value: float | Sequence[float] | None, style: str) -> str:
    """A number, or mean and standard deviation."""
    if value is None:
        return DASH
    if isinstance(value, Sequence):
        mean, sd = value
        return format(mean, style) + ("" if math.isnan(sd) else f" ± {format(sd, style.lstrip('+'))}")
    return format(value, style)
