"""The picture of the study, and the figures in the manner of the paper's 8 and 9."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from mrgen.evaluation.availability_figures import _study, study_figure
from mrgen.evaluation.availability_numbers import availability_runs
from mrgen.evaluation.lesion_vaegan_figures import (
    RegisteredSlice,
    _registered,
    _structures,
    registered_figure,
    structure_figure,
)
from tests.evaluation.availability_rows import STUDY, study

CLASSES = ("background", "necrosis", "edema", "non-enhancing core", "enhancing")
MODALITIES = ("t1", "t2")


def one(size=(40, 48), level=0.5, real=False, seed=0):
    """A brain of noise, on air, with a lesion."""
    rng = np.random.default_rng(seed)
    brain = np.zeros(size, bool)
    brain[6:-6, 4:-4] = True
    label = np.zeros(size, np.uint8)
    label[10:14, 30:36] = 2
    edges = brain ^ np.roll(brain, 1, axis=0)
    image = np.where(brain, level * rng.uniform(0.5, 1, (2, *size)), 0)
    image[0][label == 2] = level
    return RegisteredSlice(f"s{seed}", edges, brain, label, image, real)


def test_every_row_of_the_study_has_a_place_in_the_papers_order():
    _, indices = study(("row-25", "row-1", "row-1#2", "row-3"), n=2)
    figure = _study(availability_runs(indices), "A", STUDY["rows"], "row-1", True)
    dice, mse = figure.axes
    ticks = [text.get_text() for text in mse.get_xticklabels()]
    assert ticks == ["1: 1 R", "3: 1 S", "25: 1 R + 1 S, S first"]
    (paper,) = [line for line in dice.lines if line.get_label() == "paper, best of four runs"]
    assert list(paper.get_ydata()) == [0.915, 0.708, 0.940]
    assert mse.get_yscale() == "log"
    without = _study(availability_runs(indices), "A", STUDY["rows"], "row-1", False)
    assert not [line for line in without.axes[0].lines if "paper" in line.get_label()]


def test_structure_maps_are_white_on_black_in_radiological_convention():
    edges = np.zeros((20, 30), bool)
    edges[2, 5], edges[15, 25] = True, True
    figure = _structures([edges] * 9, "A")
    assert len(figure.axes) == 16  # two lines of eight
    shown = np.asarray(figure.axes[0].images[0].get_array())
    (row, column), *_ = np.argwhere(shown)
    assert (row, column) < (shown.shape[0] / 2, shown.shape[1] / 2)  # in front on the patient's right: above, left
    assert len(figure.axes[9].images) == 0


def test_a_row_has_map_mask_label_and_every_sequence_in_the_windows_of_the_real_ones():
    rows = [one(level=0.9, seed=1), one(level=0.4, real=True, seed=2)]
    figure = _registered(rows, MODALITIES, CLASSES, "A")
    assert len(figure.axes) == 2 * (3 + 2)
    assert [axis.get_title() for axis in figure.axes[:5]] == ["structure map", "mask", "label", "T1", "T2"]
    windows = {axis.images[0].get_clim() for axis in (figure.axes[3], figure.axes[8])}
    ((low, high),) = windows
    assert (low, round(high, 2)) == (0, 0.4)  # the synthetic one is too bright, and shows it
    label = np.asarray(figure.axes[2].images[0].get_array())
    assert (np.abs(label - to_rgb("#00a651")).max(axis=2) < 1e-6).sum() == 24  # edema is green
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["normal brain", "edema"]


def test_pictures_are_small(tmp_path: Path):
    _, indices = study(n=2)
    study_figure(availability_runs(indices), tmp_path / "a.png", title="A", rows=STUDY["rows"], reference="row-1")
    noise = [one((240, 240), seed=i) for i in range(4)]  # no picture is harder to pack
    registered_figure(noise, tmp_path / "b.png", modalities=("t1", "t2"), classes=CLASSES, title="B")
    rng = np.random.default_rng(0)
    structure_figure([rng.random((240, 240)) < 0.2 for _ in range(8)], tmp_path / "c.png", title="C")
    for file in tmp_path.iterdir():
        assert 1000 < file.stat().st_size < 300_000, file  # of a quarter of what there is at most


@pytest.mark.parametrize("brain", [True, False])
def test_slices_without_brain_or_lesion_have_a_row_all_the_same(brain: bool):
    empty = np.zeros((16, 16), np.uint8)
    row = RegisteredSlice("x", empty, empty == (0 if brain else 1), empty, np.zeros((1, 16, 16)))
    assert len(_registered([row], ["t1"], CLASSES, "A").axes) == 4
