import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch

from mrgen.evaluation.translation_figures import COLUMNS, box_figure, overlay_figure
from mrgen.evaluation.translation_tables import region_means
from tests.evaluation.translation_rows import REGIONS, cohort

MSE = {"own_mse_brain": "MSE in the brain", "own_mse_tumour": "MSE in the tumour"}
OVERLAP = {"dice": "Dice", "hd95_mean": "HD95 (mm)"}
NAMES = ("t2/complementary", "t2/clustering-5", "t2/resnet-100-0")
SIZE = (12, 16)


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, still open; small on disk, which is quicker."""
    saved, save = [], matplotlib.figure.Figure.savefig

    def keep(self, path, **settings):
        saved.append(self)
        save(self, path, **settings | {"dpi": 40})

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return saved


def boxes(rows, measures, tmp_path, figures):
    box_figure(rows, measures, tmp_path / "boxes.png", title="T1 to T2")
    assert matplotlib.image.imread(tmp_path / "boxes.png")[..., :3].std() > 0.05  # something is drawn
    return figures[-1]


def drawn(axis):
    """By row of the panel, the box."""
    return {round(float(np.mean(patch.get_path().vertices[:4, 1]))): patch for patch in axis.patches}


def written(axis):
    return {round(text.get_position()[1]): text.get_text() for text in axis.texts}


# ----- boxes -----------------------------------------------------------------------------------------------------


def test_one_panel_a_measure_and_one_box_a_method(tmp_path, figures):
    rows = region_means(cohort(NAMES), regions=REGIONS)
    figure = boxes(rows, OVERLAP, tmp_path, figures)
    assert [axis.get_xlabel() for axis in figure.axes] == ["Dice", "HD95 (mm)"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["real", *NAMES]
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]  # the first above
    for axis, key in zip(figure.axes, OVERLAP, strict=True):
        for place, name in enumerate(("real", *NAMES)):
            values = [row[key] for row in rows if row["input"] == name]
            sides = drawn(axis)[place].get_path().vertices[:4, 0]
            assert (min(sides), max(sides)) == pytest.approx(tuple(np.percentile(values, (25, 75))))
    text = figure.get_supxlabel()
    assert text.startswith("12 subjects.")
    assert "median of the real sequences" in text.replace("\n", " ")
    assert "off the scale" not in text.lower()


def test_bars_are_medians_and_crosses_means(tmp_path, figures):
    rows = cohort(NAMES, segmenter=False)
    axis = boxes(rows, {"own_mse_brain": "MSE"}, tmp_path, figures).axes[0]
    values = [row["own_mse_brain"] for row in rows if row["input"] == NAMES[0]]
    thick = [line for line in axis.lines if line.get_linewidth() == 2.5]
    crosses = [line for line in axis.lines if line.get_marker() == "x"]
    assert thick[0].get_xdata()[0] == pytest.approx(np.median(values))
    assert crosses[0].get_xdata()[0] == pytest.approx(np.mean(values))
    assert len(thick) == len(crosses) == 3


def test_what_would_squash_the_scale_is_written_instead(tmp_path, figures):
    rows = cohort(("t2/random", *NAMES), segmenter=False)
    figure = boxes(rows, MSE, tmp_path, figures)
    for axis, key in zip(figure.axes, MSE, strict=True):
        median = np.median([row[key] for row in rows if row["input"] == "t2/random"])
        assert written(axis) == {0: f"off the scale, median {median:.2g}"}
        assert list(drawn(axis)) == [1, 2, 3]
        assert axis.get_xlim()[1] < 0.1
    assert "Off the scale" in figure.get_supxlabel()


def test_a_few_outliers_do_not_squash_it_either(tmp_path, figures):
    rows = region_means(cohort(NAMES, n=30), regions=REGIONS)
    for row in rows:
        if row["subject"] == "s3" and row["input"] == NAMES[1]:
            row["hd95_mean"] = 373.13
    axis = boxes(rows, {"hd95_mean": "HD95"}, tmp_path, figures).axes[0]
    assert axis.get_xlim()[1] < 100
    assert written(axis) == {2: "1 beyond ▸"}
    assert "Beyond" in figures[-1].get_supxlabel()


def test_measures_and_methods_without_values_are_left_out(tmp_path, figures):
    rows = [*cohort(NAMES, segmenter=False), {"subject": "s0", "input": "real"}]
    figure = boxes(rows, MSE | OVERLAP, tmp_path, figures)
    assert [axis.get_xlabel() for axis in figure.axes] == list(MSE.values())
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(NAMES)


def test_four_panels_stand_two_by_two(tmp_path, figures):
    rows = region_means(cohort(NAMES), regions=REGIONS)
    figure = boxes(rows, MSE | OVERLAP, tmp_path, figures)
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 2)
    three = boxes(rows, MSE | {"dice": "Dice"}, tmp_path, figures)
    assert [axis.get_xlabel() for axis in three.axes] == [*MSE.values(), "Dice"]


# ----- overlays --------------------------------------------------------------------------------------------------


def slices(names=NAMES, label=True, segmenter=True):
    """A subject whose images are noise in a disc, whose predictions are all label 3, whose label is 2 and 255."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in SIZE), indexing="ij")
    brain = x**2 + y**2 < 0.8

    def image():
        return torch.from_numpy(np.where(brain, rng.normal(size=SIZE), 0))

    truth, predicted = torch.zeros(SIZE, dtype=torch.int64), torch.zeros(SIZE, dtype=torch.int64)
    truth[3:6, 4:9], truth[8, 8], predicted[3:7, 4:9] = 2, 255, 3
    own = {"own_real": image().abs(), "source": image()}
    real = image()
    kept = {}
    for name in names:
        kept[name] = own | {"own_synthetic": image().abs()} | ({"label": truth} if label else {})
        if segmenter:
            kept[name] |= {"real": real, "synthetic": image(), "predicted": predicted}
    return ({"real": {"predicted": torch.roll(predicted, 2, 0)}} if segmenter else {}) | kept


def panels(kept, tmp_path, figures, **settings):
    """By block and picture, the two axes."""
    overlay_figure(kept, tmp_path / "overlay.png", title="T1 to T2, a", **settings)
    assert matplotlib.image.imread(tmp_path / "overlay.png")[..., :3].std() > 0.05
    grid = figures[-1].axes[0].get_subplotspec().get_gridspec()
    return np.array(figures[-1].axes, dtype=object).reshape(grid.nrows, grid.ncols)


def shown(tensor):
    return np.asarray(tensor).T[::-1, ::-1]


def test_a_column_a_method_then_the_real_target_and_source(tmp_path, figures):
    kept = slices()
    above, below = panels(kept, tmp_path, figures)
    titles = ["complementary", "clustering-5", "resnet-100-0", "real T2", "real source,\nground truth"]
    assert [axis.get_title() for axis in above] == titles
    brain = shown(kept[NAMES[0]]["real"]) != 0
    expected = [*(kept[name]["synthetic"] for name in NAMES), kept[NAMES[0]]["real"], kept[NAMES[0]]["source"]]
    for upper, lower, image in zip(above, below, expected, strict=True):
        assert len(upper.images) == 1
        assert len(lower.images) == 2
        assert np.array_equal(np.asarray(upper.images[0].get_array())[brain], shown(image)[brain])
        assert np.array_equal(upper.images[0].get_array(), lower.images[0].get_array())
    windows = [axis.images[0].get_clim() for axis in above]
    assert len(set(windows[:4])) == 1  # the real target's for all, so that a bias shows
    assert windows[4] != windows[0]


def test_what_is_superimposed(tmp_path, figures):
    kept = slices()
    _, below = panels(kept, tmp_path, figures)
    maps = [axis.images[1].get_array() for axis in below]
    assert np.array_equal(maps[0].filled(0), shown(kept[NAMES[0]]["predicted"]))
    assert np.array_equal(maps[3].filled(0), shown(kept["real"]["predicted"]))
    truth = shown(kept[NAMES[0]]["label"])
    assert np.array_equal(maps[4].filled(0), np.where(truth == 255, 0, truth))  # ignored voxels are not drawn
    assert [text.get_text() for text in figures[-1].legends[0].get_texts()][1:] == ["edema", "enhancing"]


def test_the_background_is_black_in_any_scale(tmp_path, figures):
    """0 is a mid grey among z-scores, and so is what it becomes when they are rescaled to [0, 1]."""
    rescaled = slices(segmenter=False)
    for name in NAMES:
        rescaled[name]["own_synthetic"] = (rescaled[name]["source"] + 4) / 8
    for kept in (slices(), rescaled):
        above = panels(kept, tmp_path, figures)[0]
        for axis in above:
            assert np.asarray(axis.images[0].get_array())[0, 0] == axis.images[0].get_clim()[0]


def test_without_a_segmenter_there_are_images_alone(tmp_path, figures):
    kept = slices(segmenter=False, label=False)
    (above,) = panels(kept, tmp_path, figures)
    assert [axis.get_title() for axis in above][-2:] == ["real T2", "real source"]
    assert np.array_equal(above[0].images[0].get_array().max(), shown(kept[NAMES[0]]["own_synthetic"]).max())
    assert not figures[-1].legends


def test_without_a_segmenter_the_ground_truth_is_there_still(tmp_path, figures):
    _, below = panels(slices(segmenter=False), tmp_path, figures)
    assert [len(axis.images) for axis in below] == [0, 0, 0, 0, 2]


def test_many_methods_wrap(tmp_path, figures):
    names = [f"t2/search10-{i}" for i in range(11)]
    axes = panels(slices(names), tmp_path, figures)
    assert axes.shape[1] <= COLUMNS
    titles = [axis.get_title() for row in axes[::2] for axis in row if axis.images]
    assert titles == [*(name[3:] for name in names), "real T2", "real source,\nground truth"]
    assert not [axis for axis in axes.flat if axis.axison]  # what stays empty has no frame


def test_several_targets_are_told_apart(tmp_path, figures):
    above, _ = panels(slices(("t2/a", "flair/a")), tmp_path, figures)
    assert [axis.get_title() for axis in above[:4]] == ["T2, a", "FLAIR, a", "real T2", "real FLAIR"]
