"""Figures 8 and 9 of Qu et al.: structure maps from noise, and what is made of a map and a label.

Slices are axial, shown in radiological convention: the patient's left is on the right.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mrgen.data.batch import IGNORED
from mrgen.evaluation.figures import SEQUENCES, axial, save_figure
from mrgen.evaluation.samples_figures import UNKNOWN, mask_colours, mask_picture, surroundings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RegisteredSlice", "registered_figure", "structure_figure"]

COLUMNS = 8  # of structure maps
BRIGHTEST = 99.8  # percentile of a sequence's brain at which its window ends


@dataclass(frozen=True)
class RegisteredSlice:
    """One row of a figure.

    Attributes:
        name: whose slice it is.
        structure: (X, Y), not 0 on edges.
        brain: (X, Y) bool.
        label: (X, Y) classes, 255 ignored.
        image: (C, X, Y) on [0, 1], all sequences.
        real: whether it was scanned.
    """

    name: str
    structure: np.ndarray
    brain: np.ndarray
    label: np.ndarray
    image: np.ndarray
    real: bool = False


def structure_figure(maps: Sequence[np.ndarray], path: Path, *, title: str) -> None:
    """A grid of structure maps, edges white.

    Args:
        maps: (X, Y) each, not 0 on edges.
        path: PNG to write.
        title: above the figure.
    """
    save_figure(_structures(maps, title), path, dpi=110)


def _structures(maps: Sequence[np.ndarray], title: str) -> "Figure":
    from matplotlib.figure import Figure

    shown = surroundings(*maps)
    columns = min(COLUMNS, len(maps))
    lines = math.ceil(len(maps) / columns)
    height = 1.4 * _proportion(shown)
    figure = Figure(figsize=(max(4.0, 1.4 * columns), height * lines + 0.5), facecolor="white")
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, edges in zip(axes.flat, maps, strict=False):
        axis.imshow(axial(edges[shown] != 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())), fontsize=11)
    return figure


def registered_figure(
    rows: Sequence[RegisteredSlice], path: Path, *, modalities: Sequence[str], classes: Sequence[str], title: str
) -> None:
    """Of every slice its structure map, brain mask, label and sequences, synthetic ones first.

    Each sequence has one window for all rows, that of the real slices where there are some: so that a bias shows.

    Args:
        rows: in order.
        path: PNG to write.
        modalities: the images' channels, in order.
        classes: of the labels; the first is no lesion.
        title: above the figure.
    """
    save_figure(_registered(rows, modalities, classes, title), path, dpi=85)


def _registered(
    rows: Sequence[RegisteredSlice], modalities: Sequence[str], classes: Sequence[str], title: str
) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    judge = [row for row in rows if row.real] or list(rows)
    windows = [_brightest([row.image[i][row.brain] for row in judge]) for i in range(len(modalities))]
    # Slices of one cohort are of one size; a brain is looked at as it lies in its own.
    boxes = {row.image.shape[1:]: surroundings(*_outlines(rows, row.image.shape[1:])) for row in rows}
    tall = max(map(_proportion, boxes.values()))
    figure = Figure(figsize=(1.45 * (3 + len(modalities)) + 0.5, 1.45 * tall * len(rows) + 0.9))
    axes = figure.subplots(len(rows), 3 + len(modalities), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for line, row in zip(axes, rows, strict=True):
        shown = boxes[row.image.shape[1:]]
        line[0].set_ylabel(textwrap.fill(row.name, 16), fontsize=8)
        for axis, mask in zip(line, (row.structure, row.brain), strict=False):
            axis.imshow(axial(mask[shown] != 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        picture = mask_picture(row.label, row.brain, classes)[shown]
        line[2].imshow(axial(picture.transpose(2, 0, 1)), interpolation="nearest")
        for axis, channel, high in zip(line[3:], row.image, windows, strict=True):
            axis.imshow(axial(channel[shown]), cmap="gray", vmin=0, vmax=high)
    headings = ["structure map", "mask", "label", *(SEQUENCES.get(name, name.upper()) for name in modalities)]
    for axis, text in zip(axes[0], headings, strict=True):
        axis.set_title(text, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    there = {int(number) for row in rows for number in np.unique(row.label)}
    colours = [(kind, colour) for number, (kind, colour) in enumerate(mask_colours(classes).items()) if number in there]
    colours += [("not known", UNKNOWN)] * (IGNORED in there)
    handles = [Patch(color=colour, label=kind) for kind, colour in colours]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=8, frameon=False)
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())), fontsize=11)
    return figure


def _outlines(rows: Sequence[RegisteredSlice], shape: Sequence[int]) -> list[np.ndarray]:
    mine = [row for row in rows if row.image.shape[1:] == shape]
    return [mask for row in mine for mask in (row.brain, row.label, row.structure)]


def _brightest(values: Sequence[np.ndarray]) -> float:
    """Where a window from 0 on ends."""
    inside = np.concatenate([part.ravel() for part in values])
    high = float(np.percentile(inside, BRIGHTEST)) if inside.size else 0.0
    return high if high > 0 else 1.0


def _proportion(shown: tuple[slice, slice]) -> float:
    """Height over width of a picture of it."""
    wide, long = (side.stop - side.start for side in shown)
    return long / wide
