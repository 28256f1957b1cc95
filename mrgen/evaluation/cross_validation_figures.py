"""Pictures of paper 3's cross-validation: segmentations (its Table 2), imputations (its Table 4), places and sizes.

Slices are axial, shown in radiological convention: the patient's left is on the right.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mrgen.evaluation.cross_validation_numbers import DEPTHS, OFFLINE, SIZES, methods_of, recall_by_size
from mrgen.evaluation.figures import axial, save_figure
from mrgen.evaluation.swap_tables import Rows, scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["imputation_figure", "places_figure", "segmentation_figure"]

Kept = Mapping[str, Mapping[str, Any]]

IGNORED = 255
OVERLAY = {"true positive": "#0072b2", "false positive": "#009e73", "false negative": "#f0e442"}  # Okabe and Ito's
MISSED, FOUND, LESION = "#ff4040", "#50ffb0", "#ffd400"  # the paper's red and green, apart in brightness too
METHODS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: for all kinds of sight
DEPTH_COLOURS = ("#0072b2", "#e69f00", "#888888")
MARKERS = "osD^vP"


def segmentation_figure(
    kept: Kept,
    path: Path,
    *,
    title: str,
    methods: Sequence[str],
    source: str = "T1",
    target: str = "FLAIR",
) -> None:
    """The paper's Table 2: where the methods are right and wrong, a column a subject and a row a method.

    Above, the target sequence, which no method sees; below, upon the source, true positives in blue, false positives in
    green and false negatives in yellow. Ignored voxels are in none of them.

    Args:
        kept: by subject: ``load_ml``, volume of the reference lesions; one slice of ``t1``, the source, and ``flair``,
            the target, whatever these are, (X, Y) in RAS+; ``label`` (X, Y), a lesion above 0, 255 ignored;
            ``predicted`` by method, (X, Y), a lesion above 0. A method that a subject does not have stays empty.
        path: PNG to write.
        title: above the figure.
        methods: the rows.
        source: name of the source sequence.
        target: name of the target sequence.
    """
    save_figure(
        _segmentations(kept, title, methods, source, target), path, dpi=200, bbox_inches="tight", pad_inches=0.1
    )


def _segmentations(kept: Kept, title: str, methods: Sequence[str], source: str, target: str) -> "Figure":
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes = _grid(kept, [target, *methods], title)
    for column, part in zip(axes.T, kept.values(), strict=False):
        _show(column[0], part["flair"], part["flair"])
        label = axial(part["label"])
        lesion, counted = _lesion(label), label != IGNORED
        for axis, method in zip(column[1:], methods, strict=True):
            if method not in part["predicted"]:
                continue
            _show(axis, part["t1"], part["t1"])
            predicted = (axial(part["predicted"][method]) > 0) & counted
            kinds = np.select([predicted & lesion, predicted, lesion], [1, 2, 3], 0)
            colours = ListedColormap(list(OVERLAY.values()))
            axis.imshow(np.ma.masked_equal(kinds, 0), cmap=colours, vmin=1, vmax=3, interpolation="nearest")
    handles = [Patch(color=colour, label=name) for name, colour in OVERLAY.items()]
    figure.legend(
        handles=handles,
        title=f"upon {source}; in ml: all lesions of the reference",
        loc="outside lower center",
        ncols=len(handles),
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )
    return figure


def imputation_figure(kept: Kept, path: Path, *, title: str, target: str) -> None:
    """The paper's Table 4: the real target sequence and the imputed ones, a column a subject, in the real one's window.

    Outlined thinly, all lesions of the reference; in the rows of the methods, a margin around those that the method's
    own segmentation misses (red) and those that it finds and another method that imputes misses (green). A lesion
    is a connected component of the slice; it is found where any of its pixels is predicted.

    Args:
        kept: see ``segmentation_figure``; ``synthetic`` by method, (X, Y) in the scale of ``flair``, where it imputes.
        path: PNG to write.
        title: above the figure.
        target: name of the target sequence.
    """
    save_figure(_imputations(kept, title, target), path, dpi=200, bbox_inches="tight", pad_inches=0.1)


def _imputations(kept: Kept, title: str, target: str) -> "Figure":
    from matplotlib.lines import Line2D
    from scipy.ndimage import binary_dilation

    there = list(dict.fromkeys(name for part in kept.values() for name in part["synthetic"]))
    methods = sorted(there, key=lambda name: name.partition("#")[0] != OFFLINE)  # the paper's order: offline first
    figure, axes = _grid(kept, [f"real {target}", *methods], title)
    for column, part in zip(axes.T, kept.values(), strict=False):
        _show(column[0], part["flair"], part["flair"])
        label = axial(part["label"])
        if _lesion(label).any():
            column[0].contour(_lesion(label), levels=[0.5], colors=LESION, linewidths=0.5)
        lesions = _components(label)
        found = {
            name: [bool((lesion & (axial(part["predicted"][name]) > 0)).any()) for lesion in lesions]
            for name in methods
            if name in part["predicted"]
        }
        for axis, method in zip(column[1:], methods, strict=True):
            if method not in part["synthetic"]:
                continue
            _show(axis, part["synthetic"][method], part["flair"])
            for i, lesion in enumerate(lesions if method in found else ()):
                if not found[method][i]:
                    colour, style = MISSED, "dotted"
                elif not all(others[i] for others in found.values()):
                    colour, style = FOUND, "solid"
                else:
                    continue
                around = binary_dilation(lesion, iterations=2)  # so that the outline leaves the lesion to be seen
                axis.contour(around, levels=[0.5], colors=colour, linewidths=1.2, linestyles=style)
    handles = [Line2D([], [], color=LESION, linewidth=0.8, label="lesion of the reference")]
    handles.append(Line2D([], [], color=MISSED, linestyle="dotted", label="missed by the method's segmentation"))
    if len(methods) > 1:
        handles.append(Line2D([], [], color=FOUND, label="found, and missed with another imputation"))
    legend = figure.legend(handles=handles, loc="outside lower center", fontsize=8)
    legend.get_frame().set(facecolor="0.35", edgecolor="none")  # the outlines are made for grey
    for text in legend.get_texts():
        text.set_color("white")
    return figure


def places_figure(rows: Rows, lesions: Rows, path: Path, *, title: str) -> None:
    """Where false positives lie (the paper's section 3.2), and how large a lesion has to be to be found.

    On the left, mean volumes of false positives, a group a method and a bar a place, the part at the border of a lesion
    below that apart from all. On the right, the share of lesions found by size, with its 95% bootstrap interval over
    subjects, and how many lesions there are.

    Args:
        rows: see ``cross_validation_summary``.
        lesions: see ``recall_by_size``.
        path: PNG to write.
        title: above the figure.
    """
    save_figure(_two_panels(rows, lesions, title), path, dpi=200)


def _two_panels(rows: Rows, lesions: Rows, title: str) -> "Figure":
    from matplotlib.figure import Figure

    methods = methods_of([*rows, *lesions])
    figure = Figure(figsize=(max(9.0, 7.0 + 0.9 * len(methods)), 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _places(left, rows)
    _recall(right, lesions, methods)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", alpha=0.3, linewidth=0.5)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())), fontsize=11)
    return figure


def _places(axis: "Axes", rows: Rows) -> None:
    from matplotlib.patches import Patch

    volumes = {
        name: [[scores(rows, name, f"fp_{depth}_{side}") for side in ("border", "apart")] for depth in DEPTHS]
        for name in methods_of(rows)
    }
    groups = {name: sides for name, sides in volumes.items() if any(part for pair in sides for part in pair)}
    width = 0.8 / len(DEPTHS)
    for group, depths in enumerate(groups.values()):
        for i, (pair, colour) in enumerate(zip(depths, DEPTH_COLOURS, strict=True)):
            border, apart = (float(np.mean(list(part.values()))) if part else 0.0 for part in pair)
            x = group + (i - (len(DEPTHS) - 1) / 2) * width
            axis.bar(x, border, 0.9 * width, color=colour, edgecolor="black", linewidth=0.5)
            axis.bar(
                x, apart, 0.9 * width, bottom=border, color=colour, alpha=0.5, hatch="////", edgecolor="black", lw=0.5
            )
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_xlim(-0.6, max(len(groups), 1) - 0.4)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("false positives (ml, mean of subjects)", fontsize=9)
    handles = [Patch(color=colour, label=depth) for depth, colour in zip(DEPTHS, DEPTH_COLOURS, strict=True)]
    handles.append(Patch(facecolor="0.6", edgecolor="black", lw=0.5, label="at the border of a lesion"))
    handles.append(Patch(facecolor="0.85", edgecolor="black", lw=0.5, hatch="////", label="apart from all lesions"))
    axis.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)
    if not groups:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", fontsize=9)


def _recall(axis: "Axes", lesions: Rows, methods: Sequence[str]) -> None:
    lines = recall_by_size(lesions)
    there = [name for name in methods if any(line["input"] == name for line in lines)]
    for i, name in enumerate(there):
        mine = {line["size"]: line for line in lines if line["input"] == name}
        places = [SIZES.index(size) + 0.1 * (i - (len(there) - 1) / 2) for size in mine]  # no bar upon another
        found = np.array([[line[f"found{end}"] for end in ("", "_low", "_high")] for line in mine.values()])  # (S, 3)
        reach = np.nan_to_num(np.abs(found[:, 1:] - found[:, :1])).T  # (2, S); of one subject there is no interval
        colour, marker = METHODS[i % len(METHODS)], MARKERS[i % len(MARKERS)]
        axis.errorbar(
            places, found[:, 0], reach, color=colour, marker=marker, markersize=5, lw=1.3, elinewidth=1, label=name
        )
    axis.set_xticks(range(len(SIZES)), [f"{size}\n{_counts(lines, size)}" for size in SIZES])
    axis.set_xlim(-0.5, len(SIZES) - 0.5)
    axis.set_ylim(-3, 103)
    axis.set_xlabel("size (ml); number of lesions of all subjects", fontsize=9)
    axis.set_ylabel("lesions found (%)", fontsize=9)
    if there:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(there)), fontsize=8, frameon=False)
    else:
        axis.text(0.5, 0.5, "no lesion", transform=axis.transAxes, ha="center", fontsize=9)


def _counts(lines: Sequence[Mapping[str, Any]], size: str) -> str:
    """How many lesions of this size; two numbers where not all methods have the same subjects."""
    counts = {name: 0 for name in (line["input"] for line in lines)}
    counts |= {line["input"]: line["lesions"] for line in lines if line["size"] == size}
    fewest, most = min(counts.values(), default=0), max(counts.values(), default=0)
    return f"n = {most}" if fewest == most else f"n = {fewest}–{most}"


def _grid(kept: Kept, names: Sequence[str], title: str) -> tuple["Figure", np.ndarray]:
    """One column a subject with its load above, one row a name, axes without ticks."""
    from matplotlib.figure import Figure

    shapes = [axial(part["flair"]).shape for part in kept.values()]
    wide = [columns / rows for rows, columns in shapes] or [1.0]  # of panels of one height
    size = max(4.8, 2.4 * sum(wide) + 0.4), 2.4 * len(names) + 1.2
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(names), len(wide), squeeze=False, width_ratios=wide)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, (subject, part) in zip(axes[0], kept.items(), strict=False):
        axis.set_title(f"{subject}\n{part['load_ml']:.1f} ml", fontsize=9)
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, fontsize=10)
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=11)
    return figure, axes


def _show(axis: "Axes", image: Any, real: Any) -> None:
    """In the window of the real image, so that a bias shows."""
    low, high = np.percentile(np.asarray(real), (1, 99.8))
    axis.imshow(axial(image), cmap="gray", vmin=low, vmax=high if high > low else low + 1)


def _lesion(label: np.ndarray) -> np.ndarray:
    return (label > 0) & (label != IGNORED)


def _components(label: np.ndarray) -> list[np.ndarray]:
    """(N, M) bool, one a lesion of the slice."""
    from scipy.ndimage import label as components

    numbered, count = components(_lesion(label))
    return [numbered == i for i in range(1, count + 1)]
