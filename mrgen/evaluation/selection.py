"""Which settings of a family go on to the test set: those that did best on validation subjects (paper 5, section 5.2).

The choice is made on subjects that no method was trained on and that no table of results shows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mrgen.errors import UserError
from mrgen.evaluation.swap import REAL
from mrgen.evaluation.swap_tables import DASH, Rows, scores
from mrgen.evaluation.table import Table
from mrgen.evaluation.translation_tables import region_means

__all__ = ["ranking", "select", "selection_table"]

BETTER = {"own_mse_brain": "lower", "own_mse_tumour": "lower", "dice": "higher"}
REGIONS = ("WT", "TC", "ET")


def select(
    rows: Rows,
    families: Mapping[str, str | None],
    criterion: str = "own_mse_brain",
    count: int = 2,
    *,
    regions: Sequence[str] = REGIONS,
) -> list[dict[str, Any]]:
    """The best ``count`` methods of every family.

    Args:
        rows: of a ``Swap`` of validation subjects.
        families: by input name, such as ``clustering``, ``resnet`` and ``unet``; None, or no name here: a baseline.
        criterion: ``own_mse_brain``, ``own_mse_tumour``, or ``dice``, the mean of ``regions``.
        count: of each family; a family with fewer finite candidates gives those.
        regions: that ``dice`` is the mean of.

    Returns:
        The lines of ``ranking`` that were chosen, family by family, the best first.

    Raises:
        UserError: an unknown criterion, or a count below 1.
    """
    if count < 1:
        raise UserError(f"count is {count}; expected 1 or more methods of each family")
    return [line for line in ranking(rows, families, criterion, regions=regions) if (line["rank"] or math.inf) <= count]


def ranking(
    rows: Rows,
    families: Mapping[str, str | None],
    criterion: str = "own_mse_brain",
    *,
    regions: Sequence[str] = REGIONS,
) -> list[dict[str, Any]]:
    """All methods, family by family and the baselines last, the best first.

    Args:
        rows: see ``select``.
        families: see ``select``.
        criterion: see ``select``.
        regions: see ``select``.

    Returns:
        One mapping a method: ``input``, ``family``, ``rank`` (from 1 within its family; None for baselines and where
        the mean is not finite), ``n`` (subjects with a value) and, named by the criterion, the mean over these. Equal
        means are ranked by name. The real sequences are listed where they have a value.

    Raises:
        UserError: an unknown criterion.
    """
    if criterion not in BETTER:
        raise UserError(f"criterion is {criterion}; expected one of {', '.join(BETTER)}")
    rows = region_means(rows, regions=regions)
    lines: list[dict[str, Any]] = []
    for name in dict.fromkeys(str(row["input"]) for row in rows):
        values = list(scores(rows, name, criterion).values())
        if values or name != REAL:
            mean = float(np.mean(values)) if values else math.nan
            family = families.get(name)
            lines.append({"input": name, "family": family, "rank": None, "n": len(values), criterion: mean})
    sign = -1 if BETTER[criterion] == "higher" else 1
    order = list(dict.fromkeys(line["family"] for line in lines if line["family"] is not None))

    def place(line: Mapping[str, Any]) -> tuple[int, float, str]:
        family = len(order) if line["family"] is None else order.index(line["family"])
        return family, sign * line[criterion] if math.isfinite(line[criterion]) else math.inf, line["input"]

    lines.sort(key=place)
    ranks = dict.fromkeys(order, 0)
    for line in lines:
        if line["family"] is not None and math.isfinite(line[criterion]):
            ranks[line["family"]] += 1
            line["rank"] = ranks[line["family"]]
    return lines


def selection_table(
    rows: Rows,
    families: Mapping[str, str | None],
    criterion: str = "own_mse_brain",
    count: int = 2,
    *,
    regions: Sequence[str] = REGIONS,
    title: str = "Selection",
    notes: Sequence[str] = (),
) -> Table:
    """All methods with their rank, those that ``select`` chooses marked.

    Args:
        rows: see ``select``.
        families: see ``select``.
        criterion: see ``select``.
        count: see ``select``.
        regions: see ``select``.
        title: of the table.
        notes: below it.

    Returns:
        Columns ``family``, ``method``, ``n``, the criterion, ``rank`` and ``chosen``.

    Raises:
        UserError: see ``select``.
    """
    chosen = {line["input"] for line in select(rows, families, criterion, count, regions=regions)}
    table = Table(title, ["family", "method", "n", criterion, "rank", "chosen"])
    for line in ranking(rows, families, criterion, regions=regions):
        name, mean, rank = line["input"], line[criterion], line["rank"]
        table.rows.append(
            [
                line["family"] or DASH,
                name,
                str(line["n"]),
                DASH if math.isnan(mean) else f"{mean:.5f}",
                str(rank or DASH),
                "yes" if name in chosen else "",
            ]
        )
    of = f"{criterion}, mean of {', '.join(regions)}," if criterion == "dice" else criterion
    table.notes = [
        f"Mean of {of} over the n subjects that have it; {BETTER[criterion]} is better. "
        f"yes: the best {count} of a family. Baselines belong to none and are not chosen.",
        *notes,
    ]
    return table
