"""Draws docs/lesions.png: a phantom subject's lesion and what each manipulation makes of it."""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mrgen.data.lesions import enlarge, mirror, move, shrink, transplant
from mrgen.data.phantom.subject import grow_subject
from mrgen.evaluation.figures import axial

CLASSES = {"necrotic and non-enhancing core": "#d1495b", "edema": "#66c2ff", "enhancing": "#edae49"}


def largest(label: np.ndarray) -> int:
    """The axial slice with most lesion."""
    return int((label > 0).sum((0, 1)).argmax())


subject, other = (grow_subject(seed=0, index=index, spacing=2.0, sequences=("t1ce",)) for index in (0, 3))
z = largest(subject.label)
image, brain = subject.images["t1ce"][..., z], subject.brain[..., z]
label = np.where(subject.label == 4, 3, subject.label)[..., z]
donor = np.where(other.label == 4, 3, other.label)[..., largest(other.label)]
panels = {
    "original": label,
    "mirror": mirror(label, brain),
    "move": move(label, brain, np.random.default_rng(4)),
    "enlarge": enlarge(label, brain),
    "shrink": shrink(label, brain),
    "transplant": transplant(label, brain, donor, np.random.default_rng(0)),
}

x, y = (slice(max(0, side.min() - 3), side.max() + 4) for side in np.nonzero(brain))
figure = Figure(figsize=(7.2, 6.2), layout="constrained")
for axis, (name, panel) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
    shown = axial(panel[x, y])
    axis.imshow(axial(image[x, y]), cmap="gray", vmin=0, vmax=np.percentile(image[brain], 99.5))
    axis.imshow(
        np.ma.masked_equal(shown, 0),
        cmap=ListedColormap(list(CLASSES.values())),
        vmin=1,
        vmax=3,
        alpha=0.75,
        interpolation="nearest",
    )
    axis.contour(axial(label[x, y]) > 0, levels=[0.5], colors="white", linewidths=0.8, linestyles="dashed")
    axis.set_title(f"{name}: {np.count_nonzero(panel) * 0.04:.1f} cm²", fontsize=10)  # voxels of 2 mm
    axis.set_axis_off()
figure.legend(
    handles=[Patch(color=colour, label=name) for name, colour in CLASSES.items()],
    loc="outside lower center",
    ncols=3,
    fontsize=9,
    frameon=False,
)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
