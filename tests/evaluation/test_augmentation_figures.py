"""Pictures of augmentation: every run beside the reference, every patient in the box plot."""

import io

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch

from mrgen.evaluation.augmentation_figures import COLUMNS, dice_figure, label_figure, median_and_low
from mrgen.evaluation.augmentation_numbers import MEAN
from tests.evaluation.augmentation_rows import LABELS, RUNS, cohort, row


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, still open; small on disk, which is quicker."""
    saved, save = [], matplotlib.figure.Figure.savefig

    def keep(self, file, **settings):
        saved.append(self)
        save(self, file, **settings | {"dpi": 40})
        file.seek(0)
        assert matplotlib.image.imread(io.BytesIO(file.read()))[..., :3].std() > 0.02  # something is drawn

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return saved


def subject(names, size=(20, 24)):
    """A lesion of two labels and an ignored patch; each run finds it further to the right."""
    label = torch.zeros(size, dtype=torch.int64)
    label[4:8, 4:8], label[5:6, 5:6] = 2, 1
    predicted = {name: torch.roll(label, i + 1, 0) for i, name in enumerate(names)}
    label[15:17, 15:17] = 255
    return {"image": torch.from_numpy(np.random.default_rng(0).random(size)), "label": label, "predicted": predicted}


def test_the_median_and_a_low_subject_are_pictured():
    rows = [row(f"p{i}", name, "edema", i / 20) for i in (3, 0, 2, 1, 4) for name in RUNS]
    assert median_and_low(rows) == ["p2_1", "p0_1"]
    assert median_and_low(rows[:3]) == ["p3_1"]
    assert median_and_low(rows[:6]) == ["p3_1", "p0_1"]
    many = [row(f"p{i:02}", "real", "edema", i / 40) for i in range(31)]
    assert median_and_low(many) == ["p15_1", "p03_1"]  # not the worst of many


def test_every_run_is_laid_upon_the_image(tmp_path, figures):
    names = [f"run-{i}" for i in range(COLUMNS)]  # with image and reference more than a row holds
    kept = {"a": subject(names), "b": subject(names)}
    classes = ["core", "edema"]
    label_figure(kept, tmp_path / "a.png", title="Augmentation", shown="FLAIR", classes=classes)
    axes = figures[0].axes
    titles = [axis.get_title() for axis in axes if axis.get_title()]
    assert titles == ["FLAIR", "reference", *names] * 2
    assert [axis.get_ylabel() for axis in axes if axis.get_ylabel()] == ["a", "b"]
    shown = {axis.get_title(): axis.images for axis in axes[: COLUMNS + 2]}
    assert len(shown["FLAIR"]) == 1
    reference = shown["reference"][1].get_array()
    assert np.array_equal(
        reference.filled(0), np.asarray(torch.where(kept["a"]["label"] == 255, 0, kept["a"]["label"])).T[::-1, ::-1]
    )
    assert np.array_equal(
        shown["run-0"][1].get_array().filled(0), np.asarray(kept["a"]["predicted"]["run-0"]).T[::-1, ::-1]
    )
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == classes


def test_boxes_hold_every_patient(tmp_path, figures):
    dice_figure(cohort(n=7), tmp_path / "b.png", title="Augmentation", labels=list(LABELS), reference="real")
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == ["edema", "necrotic core", MEAN]
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == list(RUNS)
    dots = [line for line in axes[0].lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in dots] == [7] * len(RUNS)
    assert "Dashed: the median of real." in figures[0].get_supxlabel()


def test_one_run_of_one_label_and_one_patient(tmp_path, figures):
    dice_figure([row("p", "mine", "edema", 0.5)], tmp_path / "c.png", title="A", labels=["edema"], reference="real")
    assert [axis.get_title() for axis in figures[0].axes] == ["edema"]
    assert "Dashed" not in figures[0].get_supxlabel()
    label_figure({"a": subject(["mine"])}, tmp_path / "d.png", title="A", shown="T1", classes=["edema"])
