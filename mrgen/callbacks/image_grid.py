"""A grid of axial slices, a row a slice and a column a kind of picture. The patient's left is on the right."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mrgen.data.batch import IGNORED
from mrgen.evaluation.figures import axial, save_figure
from mrgen.evaluation.samples_figures import UNKNOWN, mask_colours, mask_picture, surroundings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Column", "difference", "draw_grid", "edges", "greys", "labels", "variances", "window"]

SIDE = 1.5  # inches of a picture's width
CLIP = 99.5  # percentile of the variance at which its window ends: a few voxels would darken all others


@dataclass(frozen=True)
class Column:
    """Pictures of one kind.

    Attributes:
        title: above the column.
        pictures: (n, X, Y), or (n, X, Y, 3) RGB.
        low, high: the window.
        cmap: matplotlib's name of a colour map.
    """

    title: str
    pictures: np.ndarray
    low: float = 0.0
    high: float = 1.0
    cmap: str = "gray"


def window(real: np.ndarray, brain: np.ndarray) -> tuple[float, float]:
    """From dark to bright of what a scan shows within its brain, arrays (n, X, Y): one window for it and its copies."""
    inside = real[brain]
    low, high = np.percentile(inside, (0.5, 99.8)) if inside.size else (0.0, 1.0)
    return float(low), float(high if high > low else low + 1)


def greys(title: str, images: np.ndarray, ends: tuple[float, float], brain: np.ndarray | None = None) -> Column:
    """Images (n, X, Y) in a window; with ``brain`` what lies outside is dark, which on some scales it is not."""
    low, high = ends
    return Column(title, images if brain is None else np.where(brain, images, low), low, high)


def difference(made: np.ndarray, real: np.ndarray, ends: tuple[float, float], brain: np.ndarray) -> Column:
    """What is too bright (red) and too dark (blue), up to half of the window."""
    most = (ends[1] - ends[0]) / 2
    return Column(f"error (±{most:.2g})", np.where(brain, made - real, 0), -most, most, "RdBu_r")


def variances(values: np.ndarray, brain: np.ndarray) -> Column:
    """Variances (n, X, Y) within the brain, in a window of their own."""
    inside = values[brain]
    most = float(np.percentile(inside, CLIP)) if inside.size else 0.0
    return Column(f"variance (≤ {most:.2g})", np.where(brain, values, 0), 0, most if most > 0 else 1.0, "inferno")


def labels(title: str, label: np.ndarray, brain: np.ndarray, classes: Sequence[str]) -> Column:
    """Classes (n, X, Y) in colours; 255 is not known."""
    pictures = [mask_picture(*pair, classes) for pair in zip(label, brain, strict=True)]
    return Column(title, np.stack(pictures))


def edges(title: str, maps: np.ndarray) -> Column:
    """Maps (n, X, Y) of 0 and 1."""
    return Column(title, maps)


def draw_grid(
    columns: Sequence[Column],
    rows: Sequence[str],
    path: Path,
    *,
    title: str,
    shown: np.ndarray,
    label: np.ndarray | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Writes a PNG, whole or not at all.

    Args:
        columns: of as many pictures as there are rows.
        rows: names of the slices.
        path: the file.
        title: above the grid.
        shown: (n, X, Y), not 0 in what is to be seen; the rest is cut off.
        label: (n, X, Y), which the legend explains.
        classes: the label's classes, the first no lesion.
    """
    figure = _grid(columns, rows, title, shown, _colours(label, classes))
    save_figure(figure, path, dpi=110)


def _grid(
    columns: Sequence[Column], rows: Sequence[str], title: str, shown: np.ndarray, colours: dict[str, str]
) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cut = surroundings(*shown)
    wide, long = (side.stop - side.start for side in cut)
    size = (max(SIDE * len(columns), 3.0) + 0.4, SIDE * long / wide * len(rows) + (0.9 if colours else 0.6))
    figure = Figure(figsize=size)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for line, column in zip(axes.T, columns, strict=True):
        line[0].set_title(textwrap.fill(column.title, 18), fontsize=8)
        for axis, picture in zip(line, column.pictures, strict=True):
            flat = picture[cut].transpose(2, 0, 1) if picture.ndim == 3 else picture[cut]
            axis.imshow(axial(flat), cmap=column.cmap, vmin=column.low, vmax=column.high, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(name, fontsize=7)
    if colours:
        handles = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
        columns_of_legend = max(1, int(figure.get_figwidth() / 1.6))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns_of_legend, fontsize=7, frameon=False)
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=9)
    return figure


def _colours(label: np.ndarray | None, classes: Sequence[str]) -> dict[str, str]:
    """Of the classes of lesion, and of what is not known where there is such."""
    if label is None:
        return {}
    colours = dict(list(mask_colours(classes).items())[1:])
    return colours | ({"not known": UNKNOWN} if (label == IGNORED).any() else {})
