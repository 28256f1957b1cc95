"""Tables of the swap: what every input set scores, how sure that is, and what the paper printed.

Numbers first (``swap_summary``, ``swap_pairs``), then cells that are made of them (``swap_tables``).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mrgen.evaluation.statistics import FEWEST, bootstrap_interval, holm, paired_wilcoxon
from mrgen.evaluation.swap import REAL
from mrgen.evaluation.table import Table
from mrgen.metrics.segmentation import HD95_ONE_EMPTY

__all__ = [
    "DASH",
    "INTERVAL",
    "Rows",
    "adjust",
    "cell",
    "estimate",
    "p_cell",
    "p_value",
    "paired",
    "scores",
    "swap_pairs",
    "swap_summary",
    "swap_tables",
    "wilcoxon_note",
]

Rows = Sequence[Mapping[str, Any]]

DASH = "–"
PLACES = ("brain", "tumour")
QUALITY = {"mse": 3, "mae": 3, "psnr": 1, "ssim": 3}  # and the digits that are printed
UNCERTAINTY = ("variance_brain", "variance_tumour", "rank_correlation")
INTERVAL = "in brackets its 95% bootstrap interval over subjects (BCa; too narrow for few), for the networks as trained"


def swap_summary(rows: Rows, *, regions: Sequence[str], paper: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """One mapping an input set, in the order of ``rows``: what ``table.csv`` holds.

    Args:
        rows: of ``Swap``.
        regions: in the paper's order.
        paper: ``title`` and ``rows`` by input name, each the Dice (%) of ``regions``.

    Returns:
        ``input``, ``synthesised``, ``by``, ``n`` (subjects) and ``n_tumour`` (of a synthesis: those with a lesion); for
        each region ``dice_R`` (%), ``paper_R`` (%, where there is a paper) and ``hd95_R`` (mm); of a synthesis ``mse``,
        ``mae``, ``psnr`` (dB) and ``ssim``, each ``_brain`` and ``_tumour``; and ``variance_brain``,
        ``variance_tumour`` and ``rank_correlation`` where a row has them. These are means over subjects; with ``_low``
        and ``_high`` behind the name, their 95% bootstrap interval (nan for 1 subject), and so are ``dice_R_change``
        and ``hd95_R_change``, the differences from the real row, paired by subject. ``dice_R_p`` and ``hd95_R_p``:
        p of the paired Wilcoxon test against the real row, Holm-adjusted over all Dice and over all HD95 in turn; None
        for the real row and below 6 subjects.
    """
    printed = (paper or {}).get("rows", {})
    lines: list[dict[str, Any]] = []
    for name in dict.fromkeys(str(row["input"]) for row in rows):
        target, _, method = name.partition("/")
        line: dict[str, Any] = {"input": name, "synthesised": target, "by": method}
        if name == REAL:
            line |= {"synthesised": DASH, "by": "all real"}
        line["n"] = sum(row["input"] == name for row in rows)
        line["n_tumour"] = None if name == REAL else len(scores(rows, name, "mse_tumour"))
        for measure, scale in (("dice", 100), ("hd95", 1)):
            for region in regions:
                key = f"{measure}_{region}"
                line |= estimate(key, [scale * value for value in scores(rows, name, key).values()])
                if name != REAL:
                    pairs = paired(rows, name, REAL, key)
                    line |= estimate(f"{key}_change", [scale * (value - real) for value, real in pairs])
                line[f"{key}_p"] = None if name == REAL else p_value(rows, name, REAL, key)
            if printed and measure == "dice":
                # A repeated method carries a running number; the paper has one row for it.
                values = printed.get(name.partition("#")[0]) or [None] * len(regions)
                line |= {f"paper_{region}": value for region, value in zip(regions, values, strict=True)}
        for key in (*(f"{metric}_{where}" for where in PLACES for metric in QUALITY), *UNCERTAINTY):
            if any(key in row for row in rows if row["input"] == name):
                line |= estimate(key, list(scores(rows, name, key).values()))
        lines.append(line)
    for measure in ("dice", "hd95"):
        adjust(lines, [f"{measure}_{region}_p" for region in regions])
    return lines


def swap_pairs(rows: Rows) -> list[dict[str, Any]]:
    """Every two methods of one target against each other, by the MSE in the tumour, paired by subject.

    Returns:
        One mapping a pair: ``synthesised``, ``by``, ``minus`` (the earlier of the two), ``n`` (subjects with a lesion),
        ``mse_tumour`` (mean difference; above 0 the earlier one is nearer to the real sequence) with ``_low`` and
        ``_high``, and ``mse_tumour_p``, Holm-adjusted over all pairs. Empty where no target has two methods.
    """
    methods: dict[str, list[str]] = {}
    for name in dict.fromkeys(str(row["input"]) for row in rows):
        if name != REAL:
            methods.setdefault(name.partition("/")[0], []).append(name)
    lines: list[dict[str, Any]] = []
    for target, names in methods.items():
        for first, other in itertools.combinations(names, 2):
            pairs = paired(rows, other, first, "mse_tumour")
            lines.append(
                {
                    "synthesised": target,
                    "by": other.partition("/")[2],
                    "minus": first.partition("/")[2],
                    "n": len(pairs),
                    **estimate("mse_tumour", [a - b for a, b in pairs]),
                    "mse_tumour_p": p_value(rows, other, first, "mse_tumour"),
                }
            )
    adjust(lines, ["mse_tumour_p"])
    return lines


def swap_tables(
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
        regions: of Dice and HD95, in the paper's order.
        title: each table's begins with it.
        paper: see ``swap_summary``.
        notes: below the first table.

    Returns:
        ``dice``, ``change``, ``hd95``, ``synthesis``, and ``pairs`` where a target has two methods.
    """
    lines, pairs = swap_summary(rows, regions=regions, paper=paper), swap_pairs(rows)
    count = len({row["subject"] for row in rows})
    over = f"Mean over {count} subject{'s' * (count != 1)}; {INTERVAL}."
    tables = {
        "dice": Table(
            f"{title}, Dice",
            ["synthesised", "by", *(f"{kind} {region}" for kind in ("Dice", "p") for region in regions)],
            [_overlap(line, "dice", regions) for line in lines],
            [over, "Dice in %; a region empty in both maps scores 100, in one 0.", wilcoxon_note("the real row")],
        ),
        "change": Table(
            f"{title}, change of Dice",
            ["synthesised", "by", *regions],
            [
                [line["synthesised"], line["by"], *(cell(line, f"dice_{region}_change", 1) for region in regions)]
                for line in lines
                if line["input"] != REAL
            ],
            [f"Mean difference from the real row in points of Dice over {count} subjects, paired; {INTERVAL}."],
        ),
        "hd95": Table(
            f"{title}, HD95",
            ["synthesised", "by", *(f"{kind} {region}" for kind in ("HD95", "p") for region in regions)],
            [_overlap(line, "hd95", regions) for line in lines],
            [
                over,
                "HD95 in mm: the larger of the two directed 95th percentiles; a region empty in both maps scores 0, "
                f"in one {HD95_ONE_EMPTY}.",
                wilcoxon_note("the real row"),
            ],
        ),
        "synthesis": _synthesis(lines, title),
    }
    if paper and paper.get("rows"):
        tables["dice"].columns = [*tables["dice"].columns, *(f"paper {region}" for region in regions)]
        for cells, line in zip(tables["dice"].rows, lines, strict=True):
            values = [line[f"paper_{region}"] for region in regions]
            cells += [DASH if value is None else f"{value:.1f}" for value in values]
        tables["dice"].notes.append(f"Paper: {paper['title']}.")
    tables["dice"].notes += notes
    if pairs:
        tables["pairs"] = Table(
            f"{title}, MSE in the tumour, methods of one target",
            ["synthesised", "difference", "n", "MSE tumour", "p"],
            [
                [
                    line["synthesised"],
                    f"{line['by']} − {line['minus']}",
                    str(line["n"]),
                    cell(line, "mse_tumour", 3),
                    p_cell(line["mse_tumour_p"]),
                ]
                for line in pairs
            ],
            [
                f"Mean difference over the n subjects with a lesion, paired; {INTERVAL}. "
                "Above 0 the method behind the minus is nearer to the real sequence.",
                wilcoxon_note("no difference"),
            ],
        )
    return tables


def _synthesis(lines: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One line a synthesis and place, so that every number has room for its interval."""
    made = [line for line in lines if line["input"] != REAL]
    uncertain = any("rank_correlation" in line for line in made)
    columns = ["synthesised", "by", "in", "n", *(metric.upper() for metric in QUALITY)]
    table = Table(f"{title}, synthesis", columns + ["variance", "rank correlation"] * uncertain)
    for line in made:
        for where, n in (("brain", line["n"]), ("tumour", line["n_tumour"])):
            cells = [line["synthesised"], line["by"], where, str(n)]
            cells += [cell(line, f"{metric}_{where}", digits) for metric, digits in QUALITY.items()]
            if uncertain:
                cells += [cell(line, f"variance_{where}", 4)]
                cells += [cell(line, "rank_correlation", 3) if where == "brain" else DASH]
            table.rows.append(cells)
    table.notes = [
        f"Mean over n subjects; {INTERVAL}. Without a lesion a subject has no tumour to measure in.",
        "On the segmenter's input scale; PSNR in dB; data range: the real sequence's in the subject's brain.",
    ]
    if uncertain:
        table.notes.append("rank correlation: Spearman's, of variance and absolute error over the voxels of a brain.")
    return table


def _overlap(line: Mapping[str, Any], measure: str, regions: Sequence[str]) -> list[str]:
    keys = [f"{measure}_{region}" for region in regions]
    cells = [line["synthesised"], line["by"], *(cell(line, key, 1) for key in keys)]
    return cells + [p_cell(line[f"{key}_p"]) for key in keys]


def cell(line: Mapping[str, Any], key: str, digits: int) -> str:
    """Mean and interval, without the interval where there is none.

    Args:
        line: of a summary.
        key: the mean's; ``_low`` and ``_high`` behind it are the interval's.
        digits: behind the point.

    Returns:
        Such as ``0.71 [0.65, 0.76]``; a dash where there is no mean.
    """
    mean, low, high = (line.get(f"{key}{end}", math.nan) for end in ("", "_low", "_high"))
    if math.isnan(mean):
        return DASH
    return f"{mean:.{digits}f}" + ("" if math.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def p_cell(p: float | None) -> str:
    """A p-value with three digits; a dash where there was no test."""
    return DASH if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def wilcoxon_note(against: str) -> str:
    """What stands under a table with p-values.

    Args:
        against: what the methods were tested against, such as ``the real row``.

    Returns:
        One line.
    """
    test = f"p: two-sided Wilcoxon signed-rank test against {against}, paired by subject"
    return f"{test}; Holm-adjusted over all p of this table; {DASH} below {FEWEST} subjects."


def scores(rows: Rows, name: str, key: str) -> dict[str, float]:
    """By subject; a subject without lesion has no error in it.

    Args:
        rows: one a subject and input set.
        name: the input set.
        key: the measure.

    Returns:
        The values of the subjects that have one; nan counts as none.
    """
    mine = {row["subject"]: float(row[key]) for row in rows if row["input"] == name and key in row}
    return {subject: value for subject, value in mine.items() if not math.isnan(value)}


def paired(rows: Rows, name: str, reference: str, key: str) -> list[tuple[float, float]]:
    """The values of the subjects that have both.

    Args:
        rows: see ``scores``.
        name: an input set.
        reference: another.
        key: the measure.

    Returns:
        One pair a subject: of ``name``, of ``reference``.
    """
    values, references = scores(rows, name, key), scores(rows, reference, key)
    return [(value, references[subject]) for subject, value in values.items() if subject in references]


def p_value(rows: Rows, name: str, reference: str, key: str) -> float | None:
    """``paired_wilcoxon`` of ``paired``, whose arguments these are."""
    pairs = paired(rows, name, reference, key)
    return paired_wilcoxon([a for a, _ in pairs], [b for _, b in pairs])


def adjust(lines: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Replaces the p-values of these columns, which are one family, by Holm's.

    Args:
        lines: of a summary; changed.
        keys: of the p-values; every line has them all, None where there was no test.
    """
    places = [(line, key) for line in lines for key in keys]
    for (line, key), p in zip(places, holm([line[key] for line, key in places]), strict=True):
        line[key] = p


def estimate(key: str, values: Sequence[float]) -> dict[str, float]:
    """A mean over subjects and its 95% bootstrap interval.

    Args:
        key: its name.
        values: one a subject.

    Returns:
        The mean under the name, the interval under the name with ``_low`` and ``_high``; nan where there is none.
    """
    low, high = bootstrap_interval(values)
    return {key: float(np.mean(values)) if values else math.nan, f"{key}_low": low, f"{key}_high": high}
