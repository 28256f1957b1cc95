"""Pictures of results. Slices are axial, shown in radiological convention: the patient's left is on the right."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mrgen.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SEQUENCES", "axial", "calibration_figure", "save_figure", "swap_figure", "synthesis_figure"]

SEQUENCES = {"t1": "T1", "t2": "T2", "t1ce": "T1ce", "flair": "FLAIR", "apt": "APTw"}  # the order of RS-Net's Figure 2
_METHODS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: for all kinds of sight
_CLIP = 99.5  # percentile of the variance at which its window ends: a few voxels would darken all others
_DOTS = 3000  # voxels drawn an input


def axial(slice_xy: Any) -> np.ndarray:
    """(X, Y) in RAS+ to rows from anterior to posterior and columns from the patient's right to left."""
    return np.asarray(slice_xy).T[::-1, ::-1]


def save_figure(figure: "Figure", path: Path, **settings: Any) -> None:
    """Writes a PNG, whole or not at all, through no link; ``settings`` are those of matplotlib's ``savefig``."""
    with replacing(path) as file:
        figure.savefig(file, format="png", **settings)


def swap_figure(slices: Mapping[str, Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Real, synthetic and error of every synthesis, with what the segmenter makes of real and swapped inputs.

    Args:
        slices: by row name; ``label`` and ``predicted`` (X, Y), and ``real`` and ``synthetic`` (X, Y) where there are.
        path: PNG to write.
        title: above the figure.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    names = [name for name in slices if "synthetic" in slices[name]]
    columns = (
        "real, lesion outlined",
        "synthetic",
        "synthetic − real",
        "reference",
        "segmented from real",
        "from swapped",
    )
    figure = Figure(figsize=(2.1 * len(columns), 2.25 * max(1, len(names)) + 0.6), layout="constrained")
    axes = figure.subplots(max(1, len(names)), len(columns), squeeze=False)
    classes = ListedColormap(["black", "#d1495b", "#edae49", "#66c2ff"])
    for row, name in zip(axes, names, strict=False):
        part = slices[name]
        real, synthetic = axial(part["real"]), axial(part["synthetic"])
        low, high = np.percentile(real, (1, 99.8))
        label = axial(part["label"])
        lesion = (label > 0) & (label != 255)
        row[0].imshow(real, cmap="gray", vmin=low, vmax=high)
        row[1].imshow(synthetic, cmap="gray", vmin=low, vmax=high)  # the real window: a bias must show
        row[2].imshow(synthetic - real, cmap="RdBu_r", vmin=-2, vmax=2)
        for axis in row[:3]:
            if lesion.any():
                axis.contour(lesion, levels=[0.5], colors="#ffd400", linewidths=0.6)
        maps = (label, axial(slices["real"]["predicted"]), axial(part["predicted"]))
        for axis, classes_map in zip(row[3:], maps, strict=True):
            axis.imshow(
                np.where(classes_map == 255, 0, classes_map), cmap=classes, vmin=0, vmax=3, interpolation="nearest"
            )
        row[0].set_ylabel(name, fontsize=9)
    for axis, text in zip(axes[0], columns, strict=True):
        axis.set_title(text, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=130)


def synthesis_figure(slices: Mapping[str, Mapping[str, Any]], path: Path, *, title: str, method: str) -> None:
    """One method's syntheses and what it is unsure of: RS-Net's Figure 2.

    Above the real sequences, then the synthetic ones in the windows of the real, then the variances, each in a window
    of its own from 0 to its 99.5th percentile in the brain. The lesion is outlined throughout.

    Args:
        slices: by row name, ``target/method``. Of the method's: ``real``, ``synthetic`` and ``variance`` (X, Y) in the
            z-scored scale, background 0, and ``label`` (X, Y), where a lesion is above 0 and not 255. Names without
            a variance are left out.
        path: PNG to write.
        title: above the figure.
        method: the part of the row names after the slash, such as ``rsnet`` or ``rsnet#2``.
    """
    save_figure(_synthesis(slices, title, method), path, dpi=200)


def _synthesis(slices: Mapping[str, Mapping[str, Any]], title: str, method: str) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = {}
    for name, kept in slices.items():
        target, _, by = name.partition("/")
        if by == method and kept.get("variance") is not None:
            columns[target] = {key: axial(kept[key]) for key in ("real", "synthetic", "variance", "label")}
    targets = _in_order(columns)
    tall = max((part["real"].shape[0] / part["real"].shape[1] for part in columns.values()), default=1.0)
    figure = Figure(figsize=(max(3.6, 2.1 * len(targets) + 0.4), 3 * 2.05 * tall + 1.1), layout="constrained")
    axes = figure.subplots(3, max(1, len(targets)), squeeze=False)
    for column, target in zip(axes.T, targets, strict=False):
        part = columns[target]
        brain = (part["real"] != 0) | (part["synthetic"] != 0)  # the z-scored background is 0, its brain hardly ever
        low, high = np.percentile(part["real"][brain], (0.5, 99.8)) if brain.any() else (0.0, 1.0)
        # One window for both, so that a bias shows. Zero would be a mid grey in it.
        for axis, key in zip(column[:2], ("real", "synthetic"), strict=True):
            axis.imshow(np.where(brain, part[key], low), cmap="gray", vmin=low, vmax=high)
        top = np.percentile(part["variance"][brain], _CLIP) if brain.any() else 0.0
        shown = column[2].imshow(
            np.where(brain, part["variance"], 0), cmap="inferno", vmin=0, vmax=top if top > 0 else 1.0
        )
        below = column[2].inset_axes((0, -0.08, 1, 0.05))  # as wide as the picture
        ticks = MaxNLocator(4, steps=[1, 2, 4, 5, 10])  # three numbers at least, and short ones
        figure.colorbar(shown, below, orientation="horizontal", extend="max", ticks=ticks, format="{x:.3g}")
        below.tick_params(labelsize=8)
        lesion = (part["label"] > 0) & (part["label"] != 255)
        if lesion.any():
            for axis in column:
                axis.contour(lesion, levels=[0.5], colors="#39e6c8", linewidths=0.8)
        column[0].set_title(SEQUENCES.get(target, target.upper()), fontsize=11)
    rows = ("real", "synthetic", f"variance (z²)\nup to its {_CLIP}th percentile")
    for axis, text in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(text, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())), fontsize=11)
    return figure


def calibration_figure(
    calibration_rows: Sequence[Mapping[str, Any]],
    slices: Mapping[str, Mapping[str, Any]],
    correlations: Mapping[str, float],
    path: Path,
    *,
    title: str,
) -> None:
    """Is the error larger where the variance is, and as large as it says? One column a target, one colour a method.

    Above, the absolute errors of one subject's voxels against their variance, and the root mean squared error of all
    subjects in bins of the variance. Below, the mean squared error of the bins against their mean variance, where a
    calibrated variance lies on the identity. Axes are logarithmic: what is 0 or beyond them is drawn at their edge.

    Args:
        calibration_rows: one a subject, input (``target/method``) and bin: ``subject``, ``input``, ``bin``,
            ``variance`` and ``squared_error`` (means over the bin, z²) and ``voxels``. Bins without voxels are skipped;
            every subject weighs the same.
        slices: by row name; ``voxels`` of the pictured subject where there are: ``variance`` (N,) in z² and ``error``
            (N,), absolute, in z.
        correlations: by row name, Spearman's ρ of variance and error, mean over subjects.
        path: PNG to write.
        title: above the figure.
    """
    save_figure(_calibration(calibration_rows, slices, correlations, title), path, dpi=200)


def _calibration(
    calibration_rows: Sequence[Mapping[str, Any]],
    slices: Mapping[str, Mapping[str, Any]],
    correlations: Mapping[str, float],
    title: str,
) -> "Figure":
    from matplotlib.figure import Figure

    dots = {name: _dots(kept["voxels"]) for name, kept in slices.items() if kept.get("voxels") is not None}
    curves = _curves(calibration_rows)
    names = list(dict.fromkeys([*curves, *dots]))
    targets = _in_order(name.partition("/")[0] for name in names)
    methods = list(dict.fromkeys(name.partition("/")[2] for name in names))
    figure = Figure(figsize=(max(4.5, 2.6 * len(targets) + 0.7), 6.6), layout="constrained")
    axes = figure.subplots(2, max(1, len(targets)), squeeze=False, sharex="col", sharey="row")
    # Three decades below the largest error hold all but some per mille of normal errors.
    errors = _limits([*(dot[1] for dot in dots.values()), *(curve[2] for curve in curves.values())], 3)
    # With the variances, so that the identity is in sight however far the curves are from it.
    squares = _limits([curve[:2] for curve in curves.values()], 6)
    for (upper, lower), target in zip(axes.T, targets, strict=False):
        mine = [name for name in names if name.partition("/")[0] == target]
        variances = _limits([kept[name][0] for kept in (dots, curves) for name in mine if name in kept], 6)
        upper.set(xscale="log", yscale="log", xlim=variances, ylim=errors)
        lower.set(xscale="log", yscale="log", xlim=variances, ylim=squares)
        for name in mine:
            method = name.partition("/")[2]
            colour = _METHODS[methods.index(method) % len(_METHODS)]
            if name in dots:
                _plot(upper, *dots[name], ".", color=colour, markersize=2, alpha=0.15, markeredgewidth=0)
            variance, squared, root = curves.get(name, np.empty((3, 0)))
            rho = correlations.get(name, math.nan)
            label = f"{method}, ρ = " + ("–" if math.isnan(rho) else f"{rho:.2f}")
            _plot(upper, variance, root, "o-", color=colour, markersize=3, linewidth=1.2, label=label)
            _plot(lower, variance, squared, "o-", color=colour, markersize=3, linewidth=1.2)
        lower.axline((1e-3, 1e-3), (1, 1), color="0.3", linestyle="--", linewidth=1, label="calibrated", zorder=1)
        heading = SEQUENCES.get(target, target.upper())
        upper.legend(title=heading, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, frameon=False)
        lower.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, fontsize=8, frameon=False)
        lower.set_xlabel("variance (z²)", fontsize=9)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.tick_params(which="minor", labelbottom=False, labelleft=False)
        axis.grid(alpha=0.25, linewidth=0.5)
    axes[0, 0].set_ylabel("absolute error (z)", fontsize=9)
    axes[1, 0].set_ylabel("mean squared error (z²)", fontsize=9)
    count = len({row["subject"] for row in calibration_rows})
    caption = (
        "Dots: voxels of the pictured subject; ρ: Spearman's, mean over subjects.",
        "Lines: root mean squared (above) and mean squared error (below) in bins of variance, "
        f"mean of {count} subject{'s' * (count != 1)}.",
    )
    width = int(15 * figure.get_figwidth())
    figure.supxlabel("\n".join(textwrap.fill(sentence, width) for sentence in caption), fontsize=8)
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())), fontsize=11)
    return figure


def _in_order(targets: Iterable[str]) -> list[str]:
    """The paper's sequences in the paper's order, others after them."""
    there = list(dict.fromkeys(targets))
    return [name for name in SEQUENCES if name in there] + [name for name in there if name not in SEQUENCES]


def _dots(voxels: Mapping[str, Any]) -> np.ndarray:
    """(2, at most _DOTS) variance and absolute error of voxels that are evenly spread over those given."""
    both = np.stack([np.asarray(voxels["variance"], dtype=float), np.asarray(voxels["error"], dtype=float)])
    return both[:, :: max(1, math.ceil(both.shape[1] / _DOTS))]


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """By input, (3, bins) mean variance, mean squared error and its root; means over the subjects with such a bin."""
    bins: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        pair = float(row["variance"]), float(row["squared_error"])
        if np.isfinite(pair).all():
            bins.setdefault(str(row["input"]), {}).setdefault(int(row["bin"]), []).append(pair)
    means = {name: np.array([np.mean(kept[i], axis=0) for i in sorted(kept)]).T for name, kept in bins.items()}
    return {name: np.stack([variance, squared, np.sqrt(squared)]) for name, (variance, squared) in means.items()}


def _limits(values: Iterable[np.ndarray], decades: int) -> tuple[float, float]:
    """Limits of a logarithmic axis that hold the positive ones of all values, or the uppermost decades of them."""
    there = np.concatenate([np.ravel(part) for part in values] or [np.empty(0)])
    there = there[np.isfinite(there) & (there > 0)]
    if not there.size:
        return 0.01, 1.0
    high = float(there.max())
    low = max(float(there.min()), high / 10**decades)
    margin = max(1.5, math.sqrt(100 * low / high))  # at least two decades, so that two ticks or three have numbers
    return low / margin, high * margin


def _plot(axis: "Axes", x: np.ndarray, y: np.ndarray, *style: Any, **styles: Any) -> None:
    """Plots within the limits: a logarithmic axis has no place for 0."""
    axis.plot(np.maximum(x, axis.get_xlim()[0]), np.maximum(y, axis.get_ylim()[0]), *style, **styles)
