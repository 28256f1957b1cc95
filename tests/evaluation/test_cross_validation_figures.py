import io
import warnings

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from mrgen.evaluation.cross_validation_figures import (
    FOUND,
    LESION,
    MISSED,
    OVERLAY,
    imputation_figure,
    places_figure,
    segmentation_figure,
)
from mrgen.evaluation.cross_validation_tables import SIZES
from tests.evaluation.cross_validation_rows import METHODS, cohort, lesion

SIZE = (20, 24)


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


def subject(load=3.0, size=SIZE, lesions=True, methods=METHODS):
    """Two lesions, of class 1 and 2, and an ignored patch. Unimodal finds both and more, offline one, joint the other;
    all predict the ignored patch."""
    rng = np.random.default_rng(0)
    label = torch.zeros(size, dtype=torch.int64)
    if lesions:
        label[4:8, 4:8], label[12:14, 5:7] = 1, 2
    predicted = {name: torch.zeros(size, dtype=torch.int64) for name in methods}
    predicted |= {"unimodal": (label > 0).long()} if "unimodal" in methods else {}
    for name in methods:
        if name == "unimodal":
            predicted[name][15:18, 15:18] = 1
        elif name == "offline":
            predicted[name][6:9, 6:9] = 1
        else:
            predicted[name][12, 5] = 1
        predicted[name][2:4, 18:20] = 1
    label[2:4, 18:20] = 255
    image = torch.from_numpy(rng.normal(size=size))
    synthetic = {name: image + rng.normal() for name in methods if name != "unimodal"}
    return {
        "load_ml": load,
        "flair": image,
        "t1": -image,
        "label": label,
        "predicted": predicted,
        "synthetic": synthetic,
    }


def three():
    return {f"s{i}": subject(load, (20 + i, 24)) for i, load in enumerate((0.5, 5.0, 51.26))}


def grid(figure):
    """Axes by row and column."""
    shape = figure.axes[0].get_subplotspec().get_gridspec().get_geometry()
    return np.array(figure.axes, dtype=object).reshape(shape)


def shown(tensor):
    return np.asarray(tensor).T[::-1, ::-1]


def outlines(axis):
    """Colours of the outlines, sorted."""
    return sorted(to_hex(outline.get_edgecolor()[0]) for outline in axis.collections)


# ----- segmentations ---------------------------------------------------------------------------------------------


def segmentations(kept, tmp_path, figures, methods=METHODS, **names):
    segmentation_figure(kept, tmp_path / "figure.png", title="WMH", methods=methods, **names)
    return grid(figures[-1])


def test_a_column_a_subject_with_its_load_and_a_row_a_method(tmp_path, figures):
    kept = three()
    axes = segmentations(kept, tmp_path, figures)
    assert axes.shape == (4, 3)
    assert [axis.get_title() for axis in axes[0]] == ["s0\n0.5 ml", "s1\n5.0 ml", "s2\n51.3 ml"]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["FLAIR", *METHODS]
    assert np.array_equal(axes[0, 1].images[0].get_array(), shown(kept["s1"]["flair"]))  # alone: nothing upon it
    assert len(axes[0, 1].images) == 1
    assert np.array_equal(axes[2, 1].images[0].get_array(), shown(kept["s1"]["t1"]))
    assert figures[-1].get_suptitle() == "WMH"


def test_true_positives_blue_false_positives_green_false_negatives_yellow(tmp_path, figures):
    kept = three()
    _, unimodal, offline, _ = segmentations(kept, tmp_path, figures)[:, 0]
    lesions = shown(kept["s0"]["label"] % 255 > 0)  # both classes; 255 % 255 is 0
    more = np.zeros(SIZE, dtype=bool)
    more[15:18, 15:18] = True
    kinds = unimodal.images[1].get_array()
    assert np.array_equal(kinds.filled(0), np.where(lesions, 1, 0) + np.where(shown(more), 2, 0))
    colours = [to_hex(kinds_of) for kinds_of in unimodal.images[1].cmap(unimodal.images[1].norm([1, 2, 3]))]
    assert colours == list(OVERLAY.values())
    counts = np.bincount(offline.images[1].get_array().filled(0).ravel(), minlength=4)
    assert counts[1:].tolist() == [4, 5, 12 + 4]  # 2 × 2 of the first lesion, 5 beside it, all of the second missed
    assert [text.get_text() for text in figures[-1].legends[0].get_texts()] == list(OVERLAY)


def test_ignored_voxels_are_in_none_of_the_colours(tmp_path, figures):
    axes = segmentations({"a": subject()}, tmp_path, figures)
    for axis in axes[1:, 0]:
        kinds = np.asarray(axis.images[1].get_array().filled(0))[::-1, ::-1].T
        assert not kinds[2:4, 18:20].any()


def test_a_method_that_a_subject_does_not_have_stays_empty(tmp_path, figures):
    kept = {"a": subject(), "b": subject(methods=("joint",))}
    axes = segmentations(kept, tmp_path, figures)
    assert [len(axis.images) for axis in axes[:, 1]] == [1, 0, 0, 2]


def test_other_sequences_have_other_names(tmp_path, figures):
    kept = {"a": subject(methods=("joint",))}
    axes = segmentations(kept, tmp_path, figures, methods=("joint",), source="PD", target="T2")
    assert axes.shape == (2, 1)
    assert axes[0, 0].get_ylabel() == "T2"
    assert "PD" in figures[-1].legends[0].get_title().get_text()


def test_no_lesion_and_images_of_one_value_are_drawn(tmp_path, figures):
    kept = {"a": subject(0.0, lesions=False)}
    kept["a"]["flair"] = kept["a"]["t1"] = torch.zeros(SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segmentations(kept, tmp_path, figures)
        imputation_figure(kept, tmp_path / "figure.png", title="", target="FLAIR")
    assert all(not axis.collections for axis in grid(figures[-1]).flat)


def test_no_pictured_subject_gives_an_empty_figure(tmp_path, figures):
    segmentations({}, tmp_path, figures)


# ----- imputations -----------------------------------------------------------------------------------------------


def imputations(kept, tmp_path, figures):
    imputation_figure(kept, tmp_path / "figure.png", title="WMH", target="FLAIR")
    return grid(figures[-1])


def test_the_real_sequence_then_the_imputed_ones_in_its_window(tmp_path, figures):
    kept = three()
    for part in kept.values():
        part["synthetic"] = dict(reversed(part["synthetic"].items()))  # joint before offline
    axes = imputations(kept, tmp_path, figures)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["real FLAIR", "offline", "joint"]  # as in the paper
    for column, part in zip(axes.T, kept.values(), strict=True):
        images = (part["flair"], part["synthetic"]["offline"], part["synthetic"]["joint"])
        for axis, image in zip(column, images, strict=True):
            assert np.array_equal(axis.images[0].get_array(), shown(image))
            assert axis.images[0].get_clim() == pytest.approx(tuple(np.percentile(part["flair"], (1, 99.8))))


def test_missed_lesions_are_red_and_those_that_only_this_one_finds_green(tmp_path, figures):
    real, offline, joint = imputations({"a": subject()}, tmp_path, figures)[:, 0]
    assert outlines(real) == [LESION]
    assert outlines(offline) == outlines(joint) == sorted([FOUND, MISSED])
    for axis, missed, found in ((offline, (12, 14), (4, 8)), (joint, (4, 8), (12, 14))):
        for colour, (low, high) in ((MISSED, missed), (FOUND, found)):
            (outline,) = [line for line in axis.collections if to_hex(line.get_edgecolor()[0]) == colour]
            columns = outline.get_paths()[0].vertices[:, 0]  # from the patient's right: x counts backwards
            around = SIZE[0] - 1 - (low + high - 1) / 2
            assert (columns.min() + columns.max()) / 2 == pytest.approx(around)
    assert len(figures[-1].legends[0].get_texts()) == 3


def test_what_all_find_has_no_outline_and_what_all_miss_is_red(tmp_path, figures):
    kept = {"a": subject()}
    for name in ("offline", "joint"):
        kept["a"]["predicted"][name] = torch.zeros(SIZE, dtype=torch.int64)
        kept["a"]["predicted"][name][4, 4] = 1  # one pixel of the first is enough
    _, offline, joint = imputations(kept, tmp_path, figures)[:, 0]
    assert outlines(offline) == outlines(joint) == [MISSED]


def test_one_imputing_method_and_one_that_a_subject_lacks(tmp_path, figures):
    axes = imputations({"a": subject(methods=("unimodal", "joint"))}, tmp_path, figures)
    assert axes.shape == (2, 1)
    assert outlines(axes[1, 0]) == [MISSED]  # found ones are found by all
    assert len(figures[-1].legends[0].get_texts()) == 2
    axes = imputations({"a": subject(), "b": subject(methods=("joint",))}, tmp_path, figures)
    assert [len(axis.images) for axis in axes[:, 1]] == [1, 0, 1]


# ----- places and sizes ------------------------------------------------------------------------------------------


def places(rows, lesions, tmp_path, figures):
    places_figure(rows, lesions, tmp_path / "figure.png", title="WMH")
    return figures[-1].axes


def test_bars_are_mean_volumes_border_below_apart(tmp_path, figures):
    left, _ = places(cohort(), [], tmp_path, figures)
    assert [label.get_text() for label in left.get_xticklabels()] == list(METHODS)
    bars = sorted(left.patches, key=lambda bar: (bar.get_x(), bar.get_y()))
    assert len(bars) == len(METHODS) * 3 * 2
    assert [bar.get_height() for bar in bars[:6]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert [bar.get_y() for bar in bars[:6]] == pytest.approx([0, 0.1, 0, 0.3, 0, 0.5])  # apart stands on border
    assert [bool(bar.get_hatch()) for bar in bars[:6]] == [False, True] * 3


def test_lines_are_shares_found_with_counts_below(tmp_path, figures):
    lesions = [lesion(f"s{i}", 0.05, i > 2) for i in range(8)]
    lesions += [lesion("s0", 3.0, True), lesion("s0", 0.05, False, method="offline")]
    _, right = places(cohort(("joint", "offline"), n=2), lesions, tmp_path, figures)
    labels = [label.get_text() for label in right.get_xticklabels()]
    assert labels == [
        f"{size}\nn = {n}" for size, n in zip(SIZES, (0, "1–8", 0, 0, "0–1"), strict=True)
    ]  # not all methods have the same subjects
    joint, offline = (container.lines[0] for container in right.containers)
    assert joint.get_ydata().tolist() == pytest.approx([62.5, 100])
    assert [round(x) for x in joint.get_xdata()] == [1, 4]
    assert offline.get_ydata().tolist() == [0]
    (bars,) = right.containers[0].lines[2]
    (first, second) = (segment[:, 1] for segment in bars.get_segments())
    assert 0 <= first[0] < 62.5 < first[1] <= 100
    assert second.tolist() == [100, 100]  # of one subject no interval


def test_one_subject_one_method_no_lesion_and_nothing_measured(tmp_path, figures):
    one = cohort(("joint",), n=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, right = places(one, [], tmp_path, figures)
        assert [text.get_text() for text in right.texts] == ["no lesion"]
        assert right.get_xticklabels()[0].get_text() == "< 0.02\nn = 0"
        bare = {key: one[0][key] for key in ("subject", "fold", "input", "dsc")}
        left, right = places([bare], [lesion("s0", 0.3, True)], tmp_path, figures)
    assert [text.get_text() for text in left.texts] == ["not measured"]
    assert len(right.containers) == 1
