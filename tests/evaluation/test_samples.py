"""Numbers of samples by hand, and manipulated maps, on a slice of a few voxels."""

import math

import numpy as np
import pytest
import torch

from mrgen.evaluation.samples import (
    Method,
    manipulations,
    most_lesion,
    preference_reference,
    sample_rows,
    sample_summary,
    sample_tables,
)
from mrgen.protocols import Generated, LabelMaps

CLASSES = ("no lesion", "core", "edema")
DESCRIBED = {"modalities": ("t1", "apt"), "classes": CLASSES}


def maps(label, brain=None):
    label = torch.tensor(label)[None]
    return LabelMaps(
        label, torch.ones_like(label, dtype=torch.bool) if brain is None else torch.tensor(brain)[None], {}
    )


def two_sequences(t1, apt=None):
    return torch.stack([torch.tensor(t1), torch.tensor(t1 if apt is None else apt)])[None]  # (1, 2, X, Y)


def test_errors_and_contrast_by_hand():
    """Normal brain is brain of class 0: neither what lies outside nor what is ignored counts."""
    known = maps([[0, 0, 1], [2, 255, 0]], [[True, True, True], [True, True, False]])
    real = two_sequences([[0.0, 0.2, 0.5], [-0.5, 0.9, -1.0]])
    made = two_sequences([[0.1, 0.2, 0.1], [-0.1, -0.9, 1.0]], [[0.0, 0.2, 0.5], [-0.5, 0.9, -1.0]])
    rows = sample_rows("a", real, {"samr": made}, known, **DESCRIBED)
    found = {(row["input"], row["sequence"]): row for row in rows}
    assert list(found) == [("real", "t1"), ("samr", "t1"), ("real", "apt"), ("samr", "apt")]
    assert found["samr", "t1"]["mae_brain"] == pytest.approx((0.1 + 0.0) / 2)
    assert found["samr", "t1"]["mae_lesion"] == pytest.approx((0.4 + 0.4) / 2)
    assert found["real", "t1"]["contrast_core"] == pytest.approx(0.5 - 0.1)
    assert found["real", "t1"]["contrast_edema"] == pytest.approx(-0.5 - 0.1)
    assert found["samr", "t1"]["contrast_core"] == pytest.approx(0.1 - 0.15)
    assert found["samr", "apt"]["mae_brain"] == found["samr", "apt"]["mae_lesion"] == 0
    assert "mae_brain" not in found["real", "t1"]


def test_subjects_without_a_class_are_left_out_of_its_mean():
    real = two_sequences([[0.0, 0.2, 0.6]])
    rows = sample_rows("a", real, {"samr": real + 0.1}, maps([[0, 0, 1]]), **DESCRIBED)
    rows += sample_rows("b", real, {"samr": real + 0.3}, maps([[0, 0, 0]]), **DESCRIBED)
    assert math.isnan(rows[0]["contrast_edema"])
    lines = {(line["input"], line["sequence"]): line for line in sample_summary(rows)}
    line = lines["samr", "t1"]
    assert (line["n"], line["n_lesion"]) == (2, 1)
    assert line["mae_brain"] == pytest.approx(0.2)
    assert line["mae_brain_low"] == pytest.approx(0.1, abs=1e-6)
    assert line["mae_brain_high"] == pytest.approx(0.3)
    assert line["mae_lesion"] == pytest.approx(0.1)
    assert math.isnan(line["contrast_edema"])


def test_the_tables_say_what_the_error_is_not():
    real = two_sequences([[0.0, 0.2, 0.6]])
    rows = sample_rows("a", real, {"samr": real + 0.1, "shin": real}, maps([[0, 0, 1]]), **DESCRIBED)
    tables = sample_tables(sample_summary(rows), classes=CLASSES, title="Samples", notes=["of the test part"])
    error, contrast = tables["error"], tables["contrast"]
    assert error.columns == ["method", "in", "T1", "APTw"]
    assert error.rows[0] == ["samr", "normal brain", "0.100", "0.100"]
    assert [row[:2] for row in error.rows[2:]] == [["shin", "normal brain"], ["shin", "lesion"]]
    assert any("no measure of usefulness" in note for note in error.notes)
    assert "of the test part" in error.notes
    assert [row[:2] for row in contrast.rows[:3]] == [["core", "real"], ["core", "samr"], ["core", "shin"]]
    assert contrast.rows[0][2] == "0.50"
    assert contrast.rows[3] == ["edema", "real", "–", "–"]
    reference = preference_reference({"title": "A paper", "preference": {"real": 100.0, "samr": 72.1}})
    assert reference.rows[1] == ["samr", "72.1%", "not measured here"]


def test_the_slice_with_most_lesion_counts_no_ignored_voxels():
    label = torch.zeros(3, 4, 4, dtype=torch.int64)
    label[0, :2, :2], label[1], label[2, :3, :2] = 1, 255, 2
    assert most_lesion(label) == 2


@pytest.fixture
def slice_maps():
    brain = np.zeros((20, 20), bool)
    brain[2:18, 2:18] = True
    label = np.zeros((20, 20), np.int64)
    label[3:7, 8:12], label[4:6, 9:11] = 2, 1
    guide = torch.rand(1, 3, 20, 20)
    return LabelMaps(torch.from_numpy(label)[None], torch.from_numpy(brain)[None], {"atlas": guide})


def test_manipulations_are_the_papers_and_leave_the_guides(slice_maps):
    donor = np.zeros((20, 20), np.int64)
    donor[5:8, 5:8] = 2
    ways = manipulations(slice_maps, donor, np.random.default_rng(0))
    assert list(ways) == ["mirrored", "enlarged to 200%", "another patient's", "shrunk to 50%", "moved"]
    area = {name: int((way.label > 0).sum()) for name, way in ways.items()}
    assert area == {
        "mirrored": 16,
        "enlarged to 200%": 32,
        "another patient's": 9,
        "shrunk to 50%": 8,
        "moved": 16,
    }
    assert torch.equal(ways["mirrored"].label[0].flip(0), slice_maps.label[0])
    assert all(way.guides is slice_maps.guides and way.label.shape == (1, 20, 20) for way in ways.values())
    assert all(bool(way.brain[way.label > 0].all()) for way in ways.values())


def test_what_is_impossible_is_said(slice_maps):
    label = torch.zeros_like(slice_maps.label)
    label[0, 9, 9] = 1
    tiny = LabelMaps(label, label > 0, {})  # a brain of one voxel, all of it lesion
    ways = manipulations(tiny, None, np.random.default_rng(0))
    assert "voxels" in ways["enlarged to 200%"]
    assert "brain" in ways["moved"]
    assert ways["another patient's"] == "no training subject with a lesion has this voxel size"
    assert not any(str(way).startswith("lesions:") for way in ways.values())


def test_a_method_gets_its_maps_in_order_and_answers_on_the_cpu(slice_maps):
    class Painter:
        """Paints the label: what is asked for comes out."""

        modalities, guides, scale = ("t1",), ("atlas",), "symmetric"

        def generate(self, labels, seed):
            for one in labels:
                assert set(one.guides) == {"atlas"}
                yield Generated(one.label[:, None].float() + seed, one.label, one.brain)

    other = LabelMaps(slice_maps.label * 0, slice_maps.brain, slice_maps.guides)
    images = Method(Painter(), {}, torch.device("cpu")).images([slice_maps, other], seed=1)
    assert torch.equal(images[0][0, 0] - 1, slice_maps.label[0].float())
    assert images[1].unique().tolist() == [1.0]
