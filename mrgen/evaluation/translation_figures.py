"""Pictures of paper 5's judgement: distributions over patients (its Figures 6 and 7) and slices (Figures 3 to 5).

Slices are axial, shown in radiological convention: the patient's left is on the right.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mrgen.evaluation.figures import axial, save_figure
from mrgen.evaluation.swap import REAL
from mrgen.evaluation.swap_tables import Rows, scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["box_figure", "overlay_figure"]

COLUMNS = 9  # of pictures before they go on below
OFF_SCALE = 4.0  # times the median of the other methods' medians: a box there would squash all others
BEYOND = 3.0  # times the largest whisker or mean: so would a dot there
COLOURS = ("#d1495b", "#edae49", "#66c2ff")  # of the labels 1, 2 and 3
Picture = tuple[str, np.ndarray, tuple[float, float], np.ndarray | None]  # title, image, window, labels upon it


def box_figure(rows: Rows, measures: Mapping[str, str], path: Path, *, title: str) -> None:
    """The paper's Figures 6 and 7: one panel a measure, in it one box a method, over subjects.

    The thick bar is the median, the cross the mean, dots are subjects beyond 1.5 times the box. Where there is a real
    row, a dashed line through its median shows what is achievable. What would squash the scale is written and not
    drawn: a method whose median is beyond four times the median of the others' (the paper leaves out Random), and
    outliers beyond three times all whiskers and means (where one of two regions is empty, HD95 is 373.13 mm).

    Args:
        rows: of ``Swap``; for means over regions after ``region_means``.
        measures: the panels: key of the rows and the axis' name, such as ``own_mse_brain`` and ``MSE in the brain``.
            Those that no row has are left out.
        path: PNG to write.
        title: above the figure.
    """
    save_figure(_boxes(rows, measures, title), path, dpi=150)


def _boxes(rows: Rows, measures: Mapping[str, str], title: str) -> "Figure":
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(str(row["input"]) for row in rows))
    values = {key: {name: list(scores(rows, name, key).values()) for name in names} for key in measures}
    panels = [key for key in measures if any(values[key].values())]
    names = [name for name in names if any(values[key][name] for key in panels)]
    columns, lines = min(2, max(1, len(panels))), max(1, math.ceil(len(panels) / 2))
    size = 4.4 * columns + 1.6, lines * (0.32 * len(names) + 1.0) + 1.0
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    count = len({row["subject"] for row in rows})
    caption = [
        f"{count} subject{'s' * (count != 1)}. Thick bars: medians; crosses: means; boxes: quartiles; dots: outliers."
    ]
    for axis, key in zip(axes, panels, strict=False):
        caption += _panel(axis, {name: values[key][name] for name in names})
        axis.set_xlabel(measures[key], fontsize=10)
        axis.tick_params(labelsize=9)
        axis.grid(axis="x", alpha=0.3, linewidth=0.5)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(max(len(names), 1) - 0.5, -0.5)  # the first above
    for axis in axes[len(panels) :]:
        axis.remove()
    text = " ".join(dict.fromkeys(caption))
    figure.supxlabel(textwrap.fill(text, int(13 * figure.get_figwidth())), fontsize=8)
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=11)
    return figure


def _panel(axis: "Axes", values: Mapping[str, Sequence[float]]) -> list[str]:
    """Draws one box a method with values, in the row of its place, and returns what the caption has to explain."""
    names = list(values)
    there = {name: found for name, found in values.items() if found}
    notes = {name: f"off the scale, median {median:.2g}" for name, median in _off_scale(there).items()}
    drawn = {name: found for name, found in there.items() if name not in notes}
    explained = []
    if notes:
        explained.append(f"Off the scale: the median is above {OFF_SCALE:g} times the median of the others'.")
    boxes = axis.boxplot(
        list(drawn.values()),
        positions=[names.index(name) for name in drawn],
        orientation="horizontal",
        widths=0.6,
        patch_artist=True,
        showmeans=True,
        medianprops={"color": "black", "linewidth": 2.5, "solid_capstyle": "butt"},
        meanprops={"marker": "x", "markeredgecolor": "#b2182b", "markersize": 6, "markeredgewidth": 1.5},
        flierprops={"marker": ".", "markersize": 4, "markerfacecolor": "0.3", "markeredgewidth": 0},
        boxprops={"linewidth": 0.8},
    )
    for name, box in zip(drawn, boxes["boxes"], strict=True):
        box.set_facecolor("0.85" if name == REAL else "#cfe3f2")
    if REAL in drawn:
        axis.axvline(float(np.median(drawn[REAL])), color="0.4", linestyle="--", linewidth=0.9, zorder=0)
        explained.append("Dashed: the median of the real sequences.")
    reach = max(float(np.max(line.get_xdata())) for line in (*boxes["whiskers"], *boxes["means"]))
    if max(map(max, drawn.values())) > BEYOND * reach > 0:
        edge = 1.3 * reach  # room for what is written
        axis.set_xlim(axis.get_xlim()[0] * edge / axis.get_xlim()[1], edge)
        counts = {name: sum(value > edge for value in found) for name, found in drawn.items()}
        notes |= {name: f"{n} beyond ▸" for name, n in counts.items() if n}
        explained.append("Beyond: outliers that the axis does not reach.")
    for name, note in notes.items():  # at the right edge of the method's row
        place = axis.get_yaxis_transform()
        axis.text(0.99, names.index(name), note, transform=place, fontsize=8, ha="right", va="center")
    return explained


def _off_scale(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Methods that are not drawn, with their medians."""
    medians = {name: float(np.median(found)) for name, found in values.items()}
    off = {}
    for name, median in medians.items():
        others = [other for which, other in medians.items() if which != name]
        if others and median > OFF_SCALE * max(float(np.median(others)), 0) > 0:
            off[name] = median
    return off


def overlay_figure(
    slices: Mapping[str, Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    classes: Sequence[str] = ("necrotic and non-enhancing core", "edema", "enhancing"),
) -> None:
    """The paper's Figures 3 to 5: every synthesis, and below it the segmentation that was made with it.

    One column a method, then the real target with the segmentation from the real sequences and the real source with
    the ground truth. All images of a target have the window of the real one.

    Args:
        slices: by row name, ``target/method``, each (X, Y): ``synthetic`` and ``real`` in one scale (or, where there is
            no segmenter's, ``own_synthetic`` and ``own_real``) and ``source``; ``label`` and ``predicted`` where there
            are, 0 background, 255 ignored. The real row's, where there is one: ``predicted``.
        path: PNG to write.
        title: above the figure.
        classes: names of the labels 1, 2 and 3, or of those that there are.
    """
    save_figure(_overlays(slices, title, classes), path, dpi=150, bbox_inches="tight", pad_inches=0.1)


def _overlays(slices: Mapping[str, Mapping[str, Any]], title: str, classes: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    pictures = _pictures(slices)
    superimposed = any(labels is not None for *_, labels in pictures)
    blocks = max(1, math.ceil(len(pictures) / COLUMNS))
    columns = max(1, math.ceil(len(pictures) / blocks))  # as many in every block
    rows = 2 if superimposed else 1
    tall = max((image.shape[0] / image.shape[1] for _, image, *_ in pictures), default=1.0)
    size = 1.5 * columns + 0.2, blocks * (rows * 1.5 * tall + 0.45) + 0.8
    figure = Figure(figsize=(max(4.5, size[0]), size[1]), layout="compressed")
    axes = figure.subplots(blocks * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (heading, image, (low, high), labels) in enumerate(pictures):
        block, column = divmod(i, columns)
        for axis in axes[block * rows : (block + 1) * rows, column]:
            axis.imshow(image, cmap="gray", vmin=low, vmax=high)
        axes[block * rows, column].set_title(heading, fontsize=8)
        if labels is not None:
            _superimpose(axes[block * rows + 1, column], labels)
        elif superimposed:
            axes[block * rows + 1, column].clear()
            axes[block * rows + 1, column].set_axis_off()
    if superimposed:
        names = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, classes, strict=False)]
        figure.legend(handles=names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=11)
    return figure


def _pictures(slices: Mapping[str, Mapping[str, Any]]) -> list[Picture]:
    """Methods, real targets, the source, each ready to be shown."""
    made: list[Picture] = []
    real: dict[str, Picture] = {}
    source: list[Picture] = []
    for name, kept in slices.items():
        scale = "" if "synthetic" in kept else "own_"
        if f"{scale}synthetic" not in kept:
            continue
        target, _, method = name.partition("/")
        images = {key: axial(kept[f"{scale}{key}"]) for key in ("real", "synthetic")}
        brain = _foreground(images["real"]) | _foreground(images["synthetic"])
        window = _window(images["real"], brain)
        labels = {key: axial(kept[key]) if key in kept else None for key in ("predicted", "label")}
        several = len({str(other).partition("/")[0] for other in slices if other != REAL}) > 1
        heading = f"{target.upper()}, {method}" if several else method
        # The background is black on every scale; the 0 of z-scores would be a mid grey.
        made.append((heading, np.where(brain, images["synthetic"], window[0]), window, labels["predicted"]))
        if target not in real:
            from_real = slices.get(REAL, {}).get("predicted")
            shown = None if from_real is None else axial(from_real)
            real[target] = f"real {target.upper()}", np.where(brain, images["real"], window[0]), window, shown
        if not source and "source" in kept:
            image = axial(kept["source"])
            inside = _foreground(image)
            window = _window(image, inside)
            heading = "real source" if labels["label"] is None else "real source,\nground truth"
            source = [(heading, np.where(inside, image, window[0]), window, labels["label"])]
    return [*made, *real.values(), *source]


def _foreground(image: np.ndarray) -> np.ndarray:
    """Where an image is not what it is in its corner: background has one value, a brain hardly ever that."""
    return image != image[0, 0]


def _window(image: np.ndarray, brain: np.ndarray) -> tuple[float, float]:
    """From the 0.5th to the 99.8th percentile in the brain."""
    if not brain.any():
        return 0.0, 1.0
    low, high = np.percentile(image[brain], (0.5, 99.8))
    return float(low), float(high)


def _superimpose(axis: "Axes", labels: np.ndarray) -> None:
    from matplotlib.colors import ListedColormap

    lesion = np.ma.masked_where((labels < 1) | (labels == 255), labels)
    axis.imshow(lesion, cmap=ListedColormap(COLOURS), vmin=1, vmax=3, alpha=0.6, interpolation="nearest")
