"""Pictures of the judgement of augmentation: what each run segments, and the spread of Dice over patients.

Slices are axial, shown in radiological convention: the patient's left is on the right.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mrgen.evaluation.augmentation_numbers import by_patient, method_of, runs_of
from mrgen.evaluation.figures import axial, save_figure
from mrgen.evaluation.samples_figures import mask_colours
from mrgen.evaluation.swap_tables import Rows, scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["dice_figure", "label_figure", "median_and_low"]

COLUMNS = 8  # of panels before they go on below
LOW = 0.1  # of the subjects ordered by Dice


def median_and_low(rows: Rows) -> list[str]:
    """The subjects of median Dice and of that at the lowest tenth, over all runs and labels.

    Args:
        rows: of ``mrgen.evaluation.augmentation.Augmentation``.

    Returns:
        Two ids, or one where there is just one subject.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(str(row["subject"]), []).append(float(row["dice"]))
    ordered = sorted(found, key=lambda id: (np.mean(found[id]), id))
    places = len(ordered) // 2, int(LOW * (len(ordered) - 1))
    return list(dict.fromkeys(ordered[place] for place in places))


def label_figure(
    kept: Mapping[str, Mapping[str, Any]], path: Path, *, title: str, shown: str, classes: Sequence[str]
) -> None:
    """A slice of each subject with the reference and what each run makes of it.

    Args:
        kept: by subject: ``image`` (X, Y) in RAS+; ``label`` (X, Y), 255 where ignored; ``predicted`` by run, (X, Y).
        path: PNG to write.
        title: above the figure.
        shown: name of the image's sequence.
        classes: names of the labels from 1 on.
    """
    save_figure(_labels(kept, title, shown, classes), path, dpi=150)


def _labels(kept: Mapping[str, Mapping[str, Any]], title: str, shown: str, classes: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = {
        id: {shown: None, "reference": part["label"], **part["predicted"]} for id, part in kept.items()
    }  # what is laid upon the image
    colours = {name: colour for name, colour in mask_colours(["", *classes]).items() if name in classes}
    most = max(len(part) for part in panels.values())
    blocks = math.ceil(most / COLUMNS)  # rows of a subject
    columns = math.ceil(most / blocks)
    tall = max(axial(part["image"]).shape[0] / axial(part["image"]).shape[1] for part in kept.values())
    size = max(4.8, 1.7 * columns + 0.3), len(kept) * blocks * (1.7 * tall + 0.25) + 1.0
    figure = Figure(figsize=size, layout="compressed")
    axes = figure.subplots(len(kept) * blocks, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for first, (id, part) in zip(range(0, len(axes), blocks), panels.items(), strict=True):
        image = axial(kept[id]["image"])
        low, high = np.percentile(image, (1, 99.8))
        for i, (name, labels) in enumerate(part.items()):
            axis = axes[first + i // columns, i % columns]
            axis.imshow(image, cmap="gray", vmin=low, vmax=high if high > low else low + 1)
            axis.set_title(name, fontsize=8)
            if labels is not None:
                _superimpose(axis, axial(labels), list(colours.values()))
        axes[first, 0].set_ylabel(id, fontsize=8)
    names = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=names, loc="outside lower center", ncols=max(1, len(names)), fontsize=8, frameon=False)
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=11)
    return figure


def _superimpose(axis: "Axes", labels: np.ndarray, colours: Sequence[str]) -> None:
    from matplotlib.colors import ListedColormap

    lesion = np.ma.masked_where((labels < 1) | (labels == 255), labels)
    axis.imshow(
        lesion, cmap=ListedColormap(colours), vmin=1, vmax=len(colours) + 1e-3, alpha=0.6, interpolation="nearest"
    )


def dice_figure(rows: Rows, path: Path, *, title: str, labels: Sequence[str], reference: str) -> None:
    """One panel a label, in it one box a run and one dot a patient; the dashed line is the reference's median.

    Args:
        rows: of ``mrgen.evaluation.augmentation.Augmentation``.
        path: PNG to write.
        title: above the figure.
        labels: names of classes, in order; the mean over several is added.
        reference: the run that was trained on real slices alone.
    """
    save_figure(_boxes(rows, title, labels, reference), path, dpi=150)


def _boxes(rows: Rows, title: str, labels: Sequence[str], reference: str) -> "Figure":
    from matplotlib.figure import Figure

    patients = by_patient(rows, labels)
    names, panels = runs_of(rows), list(dict.fromkeys(str(row["label"]) for row in patients))
    figure = Figure(figsize=(2.6 * len(panels) + 1.8, 0.34 * len(names) + 1.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, label in zip(axes, panels, strict=True):
        mine = [row for row in patients if row["label"] == label]
        values = {name: list(scores(mine, name, "dice").values()) for name in names}
        boxes = axis.boxplot(
            list(values.values()),
            positions=range(len(names)),
            orientation="horizontal",
            widths=0.6,
            patch_artist=True,
            showmeans=True,
            showfliers=False,  # all patients are drawn
            medianprops={"color": "black", "linewidth": 2.5, "solid_capstyle": "butt"},
            meanprops={"marker": "x", "markeredgecolor": "#b2182b", "markersize": 6, "markeredgewidth": 1.5},
            boxprops={"linewidth": 0.8},
        )
        for i, (name, box) in enumerate(zip(names, boxes["boxes"], strict=True)):
            box.set_facecolor("0.85" if method_of(name) == reference else "#cfe3f2")
            spread = np.linspace(-0.2, 0.2, len(values[name]))  # so that equal values are seen
            axis.plot(values[name], i + spread, ".", color="0.3", markersize=3, alpha=0.7)
        if reference in values:
            axis.axvline(float(np.median(values[reference])), color="0.4", linestyle="--", linewidth=0.9, zorder=0)
        axis.set_title(textwrap.fill(label, 26), fontsize=9)
        axis.set_xlabel("Dice", fontsize=9)
        axis.set_xlim(-0.03, 1.03)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3, linewidth=0.5)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)  # the first above
    count = len({row["subject"] for row in patients})
    text = f"{count} patient{'s' * (count != 1)}, volumes. Thick bars: medians; crosses: means; boxes: quartiles."
    text += f" Dashed: the median of {reference}." if reference in names else ""
    figure.supxlabel(textwrap.fill(text, int(13 * figure.get_figwidth())), fontsize=8)
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=11)
    return figure
