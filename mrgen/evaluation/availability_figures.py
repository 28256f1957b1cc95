"""A picture of the availability study: every row's Dice and squared error beside the paper's."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrgen.evaluation.augmentation_numbers import method_of
from mrgen.evaluation.figures import save_figure
from mrgen.evaluation.swap_tables import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["study_figure"]

OURS, PAPER = "#0072b2", "#d55e00"  # Okabe and Ito: for all kinds of sight
FIRST = {"synthetic_first": "S first", "real_first": "R first"}


def study_figure(
    runs: Rows, path: Path, *, title: str, rows: Mapping[str, Mapping[str, Any]], reference: str, paper: bool = True
) -> None:
    """Above the Dice, below the squared error of maps of label numbers, one place a row of the study.

    Args:
        runs: of ``availability_numbers.availability_runs``.
        path: PNG to write.
        title: above the figure.
        rows: of the preset, by name: ``real``, ``synthetic``, ``enhanced``, ``order``; the paper's ``dice``, ``mse``.
        reference: the row whose mean is the dashed line.
        paper: whether to draw the paper's numbers.
    """
    save_figure(_study(runs, title, rows, reference, paper), path, dpi=120)


def _study(runs: Rows, title: str, rows: Mapping[str, Mapping[str, Any]], reference: str, paper: bool) -> "Figure":
    from matplotlib.figure import Figure

    known = list(dict.fromkeys(method_of(str(run["input"])) for run in runs))
    names = [name for name in rows if name in known] + [name for name in known if name not in rows]
    figure = Figure(figsize=(max(6.0, 0.42 * len(names) + 2.0), 7.5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, key, what in zip(axes, ("dice", "mse"), ("Dice", "MSE"), strict=True):
        for i, name in enumerate(names):
            values = [run[key] for run in runs if method_of(str(run["input"])) == name]
            mean = sum(values) / len(values)
            if len(values) > 1:
                axis.plot([i, i], [min(values), max(values)], color=OURS, linewidth=1.5, zorder=2)
                axis.plot([i] * len(values), values, ".", color=OURS, markersize=4, zorder=3)
            label = "ours, mean of the runs" if not i else None
            axis.plot(i, mean, "o", color=OURS, markersize=7, label=label, zorder=4)
            if name == reference:
                axis.axhline(mean, color=OURS, linestyle="--", linewidth=0.8, label=f"ours, {reference}", zorder=1)
        printed = {i: rows[name][key] for i, name in enumerate(names) if paper and name in rows}
        if printed:
            marks = {"markerfacecolor": "none", "markeredgecolor": PAPER, "markersize": 7}
            axis.plot(list(printed), list(printed.values()), "D", label="paper, best of four runs", zorder=3, **marks)
        axis.set_ylabel(f"{what} of label numbers", fontsize=10)
        axis.grid(axis="y", alpha=0.3, linewidth=0.5)
        axis.margins(x=0.5 / len(names))
    axes[1].set_yscale("log")
    axes[1].set_xticks(range(len(names)), [_said(name, rows.get(name)) for name in names], rotation=60, ha="right")
    axes[1].tick_params(axis="x", labelsize=8)
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)
    text = (
        "R real, S synthetic, E enhanced slices, in shares of the real ones. Small dots and lines: runs of other seeds."
    )
    figure.supxlabel(textwrap.fill(text, int(13 * figure.get_figwidth())), fontsize=8)
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=11)
    return figure


def _said(name: str, row: Mapping[str, Any] | None) -> str:
    """A row as a tick tells it."""
    if row is None:
        return name
    parts = [
        f"{row[key]:g} {letter}" for key, letter in (("real", "R"), ("synthetic", "S"), ("enhanced", "E")) if row[key]
    ]
    first = FIRST.get(str(row["order"]))
    return f"{name.removeprefix('row-')}: {' + '.join(parts)}" + (f", {first}" if first else "")
