"""Sheets of samples in the manner of Guo et al.'s Figures 2 and 3: a row a method or a manipulated mask.

Slices are axial, shown in radiological convention: the patient's left is on the right.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mrgen.data.batch import IGNORED
from mrgen.evaluation.figures import SEQUENCES, axial, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SheetRow", "mask_colours", "mask_picture", "sample_sheet", "surroundings"]

WINDOW = (-1.0, 1.0)  # of all images of a sheet: the scale's ends, so that a bias shows
BACKGROUND, BRAIN, UNKNOWN = "#000000", "#808080", "#7a3b8f"  # the last where 255 says that the label is not known
# The caption of Figure 3: edema green, tumour yellow, cavity blue, for which the core stands in.
# "non-enhancing core" names two of them, and the first that is found counts.
NAMED = {"core": "#2a5fd6", "cavity": "#2a5fd6", "necro": "#2a5fd6", "edema": "#00a651", "enhancing": "#ffd400"}
NAMED |= {"tumour": "#ffd400", "tumor": "#ffd400"}
OTHERS = ("#00a651", "#ffd400", "#2a5fd6", "#d55e00", "#56b4e9")
BOX = "#ff2020"
MARGIN = 4  # pixels around what is shown or boxed


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet.

    Attributes:
        name: what made it.
        label: (X, Y) classes, 255 ignored; the real or the manipulated ones.
        image: (C, X, Y) on [−1, 1]; a text where there is none, which says why.
    """

    name: str
    label: np.ndarray
    image: np.ndarray | str


def sample_sheet(
    rows: Sequence[SheetRow],
    path: Path,
    *,
    brain: np.ndarray,
    modalities: Sequence[str],
    classes: Sequence[str],
    title: str,
) -> None:
    """The label mask and every sequence, a row after the other; a red box around the lesion.

    All images have one window, that of their scale.

    Args:
        rows: the first one is usually real.
        path: PNG to write.
        brain: (X, Y) bool.
        modalities: the images' channels, in order.
        classes: of the label; the first is no lesion.
        title: above the figure.
    """
    save_figure(_sheet(rows, brain, modalities, classes, title), path, dpi=130)


def _sheet(
    rows: Sequence[SheetRow], brain: np.ndarray, modalities: Sequence[str], classes: Sequence[str], title: str
) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = surroundings(brain, *(row.label for row in rows))
    wide, long = (side.stop - side.start for side in shown)
    height = 1.75 * long / wide
    figure = Figure(figsize=(1.75 * (1 + len(modalities)) + 0.5, height * len(rows) + 0.9))
    axes = figure.subplots(len(rows), 1 + len(modalities), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.03, wspace=0, hspace=0)
    for line, row in zip(axes, rows, strict=True):
        line[0].set_ylabel(textwrap.fill(row.name, 18), fontsize=9)
        if isinstance(row.image, str):
            for axis in line:
                axis.spines[:].set_visible(False)
                axis.patch.set_visible(False)
            reason = textwrap.fill(row.image, 60)  # goes over several panels, which are not to be moved for it
            text = line[0].text(0.05, 0.5, reason, transform=line[0].transAxes, fontsize=8, va="center")
            text.set_in_layout(False)
            continue
        line[0].imshow(axial(mask_picture(row.label, brain, classes)[shown].transpose(2, 0, 1)))
        for axis, channel in zip(line[1:], row.image, strict=True):
            axis.imshow(axial(channel[shown]), cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1])
            _box(axis, axial(row.label[shown]))
    headings = ["label", *(SEQUENCES.get(name, name.upper()) for name in modalities)]
    for axis, text in zip(axes[0], headings, strict=True):
        axis.set_title(text, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    colours = mask_colours(classes)
    if any((row.label == IGNORED).any() for row in rows):
        colours["not known"] = UNKNOWN
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=8, frameon=False)
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())), fontsize=11)
    return figure


def mask_colours(classes: Sequence[str]) -> dict[str, str]:
    """Normal brain and every class of lesion, in the colours of the paper's Figure 3 where it names the class.

    Args:
        classes: of the label; the first is no lesion.
    """
    named: dict[str, str] = {}
    for kind in classes[1:]:
        wanted = next((colour for part, colour in NAMED.items() if part in kind.lower()), None)
        if wanted is not None and wanted not in named.values():
            named[kind] = wanted
    free = [colour for colour in OTHERS if colour not in named.values()]
    unnamed = [kind for kind in classes[1:] if kind not in named]
    others = {kind: free[min(i, len(free) - 1)] if free else OTHERS[-1] for i, kind in enumerate(unnamed)}
    return {"normal brain": BRAIN, **{kind: {**named, **others}[kind] for kind in classes[1:]}}


def mask_picture(label: np.ndarray, brain: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """(X, Y, 3) float RGB, 0 to 1, of a slice's label.

    Args:
        label: (X, Y) classes, 255 ignored.
        brain: (X, Y) bool.
        classes: of the label; the first is no lesion.
    """
    from matplotlib.colors import to_rgb

    colours = [BACKGROUND, *mask_colours(classes).values(), UNKNOWN]
    codes = np.where(label == 0, brain.astype(int), label.astype(int) + 1)  # 0 outside, 1 normal brain, then lesions
    codes[label == IGNORED] = len(colours) - 1
    return np.array([to_rgb(colour) for colour in colours])[codes]


def surroundings(*masks: np.ndarray) -> tuple[slice, slice]:
    """Where any of the masks (X, Y) is not 0, with a margin."""
    anywhere = np.any([mask > 0 for mask in masks], axis=0)
    if not anywhere.any():
        anywhere[:] = True
    x, y = (
        slice(max(0, int(along.min()) - MARGIN), min(size, int(along.max()) + 1 + MARGIN))
        for along, size in zip(np.nonzero(anywhere), anywhere.shape, strict=True)
    )
    return x, y


def _box(axis: "Axes", label: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = np.nonzero((label > 0) & (label != IGNORED))
    if not len(rows):
        return
    low = np.maximum([columns.min() - MARGIN // 2, rows.min() - MARGIN // 2], 0) - 0.5
    high = np.minimum([columns.max() + MARGIN // 2, rows.max() + MARGIN // 2], np.array(label.shape)[::-1] - 1) + 0.5
    axis.add_patch(Rectangle(tuple(low), *(high - low), fill=False, edgecolor=BOX, linewidth=1.0))
