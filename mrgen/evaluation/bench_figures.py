"""The bench at a glance: what every method changes, with its interval."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrgen.evaluation.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["change_figure", "changes"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # of Okabe and Ito: for all kinds of sight
Change = tuple[float, float, float]  # mean, and the ends of its interval


def changes(lines: Sequence[Mapping[str, Any]], key: str, name: str) -> dict[str, Change]:
    """By ``line[name]``, the means and intervals of ``KEY_change``, of the lines that have it.

    Args:
        lines: of ``imputation_bench`` or ``augmentation_bench``.
        key: of a Dice.
        name: key of the method.
    """
    ends = [f"{key}_change{end}" for end in ("", "_low", "_high")]
    found = {str(line[name]): tuple(float(line.get(end, math.nan)) for end in ends) for line in lines}
    return {method: change for method, change in found.items() if not math.isnan(change[0])}  # type: ignore[misc]


def change_figure(
    panels: Mapping[str, Mapping[str, Mapping[str, Change]]], path: Path, *, title: str, measure: str
) -> None:
    """One panel a judge, in it one line a method, on it a mean and an interval for each region.

    Args:
        panels: by heading and region the ``changes`` of the methods, which stand in the order of the first.
        path: PNG to write.
        title: above the figure.
        measure: names the axis.
    """
    save_figure(_changes(panels, title, measure), path, dpi=150)


def _changes(panels: Mapping[str, Mapping[str, Mapping[str, Change]]], title: str, measure: str) -> "Figure":
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(name for parts in panels.values() for found in parts.values() for name in found))
    size = 3.6 * len(panels) + 2.0, 0.42 * len(methods) + 1.9
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (heading, parts) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color="0.4", linestyle="--", linewidth=0.9, zorder=0)
        for k, (part, found) in enumerate(parts.items()):
            shift = 0.2 * (k - (len(parts) - 1) / 2)
            colour, label = COLOURS[k % len(COLOURS)], part
            for name, (mean, low, high) in found.items():
                y = methods.index(name) + shift
                if not math.isnan(low):
                    axis.plot([low, high], [y, y], color=colour, linewidth=1.4, solid_capstyle="butt")
                axis.plot(mean, y, "o", color=colour, markersize=4.5, label=label)
                label = "_nolegend_"
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel(measure, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3, linewidth=0.5)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)  # the first above
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=11)
    return figure
