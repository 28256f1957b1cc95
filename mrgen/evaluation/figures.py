"""Pictures of results. Slices are axial, shown in radiological convention: the patient's left is on the right."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["swap_figure"]


def _axial(slice_xy: Any) -> np.ndarray:
    """(X, Y) in RAS+ to rows from anterior to posterior and columns from the patient's right to left."""
    return np.asarray(slice_xy).T[::-1, ::-1]


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
        real, synthetic = _axial(part["real"]), _axial(part["synthetic"])
        low, high = np.percentile(real, (1, 99.8))
        label = _axial(part["label"])
        lesion = (label > 0) & (label != 255)
        row[0].imshow(real, cmap="gray", vmin=low, vmax=high)
        row[1].imshow(synthetic, cmap="gray", vmin=low, vmax=high)  # the real window: a bias must show
        row[2].imshow(synthetic - real, cmap="RdBu_r", vmin=-2, vmax=2)
        for axis in row[:3]:
            if lesion.any():
                axis.contour(lesion, levels=[0.5], colors="#ffd400", linewidths=0.6)
        maps = (label, _axial(slices["real"]["predicted"]), _axial(part["predicted"]))
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
    figure.savefig(path, dpi=130)
