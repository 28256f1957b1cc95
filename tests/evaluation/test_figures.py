import math
import warnings

import matplotlib.figure
import numpy as np
import pytest
import torch

from mrgen.evaluation.figures import calibration_figure, swap_figure, synthesis_figure


def slices(names=("t1/rsnet", "flair/rsnet"), size=(16, 20), lesion=True):
    rng = np.random.default_rng(0)

    def image():
        return torch.from_numpy(rng.normal(size=size).astype(np.float32))

    label = torch.zeros(size, dtype=torch.int64)
    if lesion:
        label[4:9, 5:12] = 2
    kept = {"real": {"label": label, "predicted": label}}
    return kept | {n: {"label": label, "predicted": label, "real": image(), "synthetic": image()} for n in names}


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, still open."""
    saved, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1]
    )
    return saved


def panels(figure):
    """Images shown, by row and column."""
    rows = figure.axes[0].get_subplotspec().get_gridspec().nrows
    return np.array(figure.axes, dtype=object).reshape(rows, -1)


@pytest.mark.parametrize("names", [("t1/rsnet",), ("t1/rsnet", "t1/rnet", "flair/rsnet")])
def test_one_row_a_synthesis_and_six_panels_in_it(tmp_path, figures, names):
    swap_figure(slices(names), tmp_path / "figure.png", title="Swap, subject 1")
    axes = panels(figures[0])
    assert axes.shape == (len(names), 6)
    assert [row[0].get_ylabel() for row in axes] == list(names)  # the real row has no picture of its own
    assert all(len(axis.images) == 1 for axis in axes.flat)
    assert figures[0].get_suptitle() == "Swap, subject 1"
    written = matplotlib.image.imread(tmp_path / "figure.png")
    width, height = (figures[0].get_size_inches() * 130).round()
    assert abs(written.shape[1] - width) <= 1
    assert abs(written.shape[0] - height) <= 1
    assert written[..., :3].std() > 0.05  # something is drawn


def test_slices_stand_in_radiological_convention(tmp_path, figures):
    kept = slices(("t1/x",))
    kept["t1/x"]["real"] = torch.zeros(16, 20)
    kept["t1/x"]["real"][15, 19] = 9.0  # RAS+: the most right, the most anterior voxel
    swap_figure(kept, tmp_path / "figure.png", title="")
    shown = np.asarray(panels(figures[0])[0, 0].images[0].get_array())
    assert shown.shape == (20, 16)
    assert shown[0, 0] == 9.0  # anterior above, the patient's right on the left


def test_panels_show_what_their_titles_say(tmp_path, figures):
    kept = slices(("t1/x",))
    kept["real"]["predicted"] = kept["real"]["label"] * 0 + 1
    kept["t1/x"]["predicted"] = kept["real"]["label"] * 0 + 3
    swap_figure(kept, tmp_path / "figure.png", title="")
    axes = panels(figures[0])[0]
    shown = {axis.get_title(): np.asarray(axis.images[0].get_array()) for axis in axes}
    x = {key: np.asarray(value).T[::-1, ::-1] for key, value in kept["t1/x"].items()}
    assert np.array_equal(shown["real, lesion outlined"], x["real"])
    assert np.array_equal(shown["synthetic"], x["synthetic"])
    assert np.array_equal(shown["synthetic − real"], x["synthetic"] - x["real"])
    assert np.array_equal(shown["reference"], x["label"])
    assert (shown["segmented from real"] == 1).all()
    assert (shown["from swapped"] == 3).all()
    assert axes[0].images[0].get_clim() == axes[1].images[0].get_clim()  # one window, so that a bias shows


def test_a_slice_without_lesion_and_an_empty_one_are_drawn(tmp_path, figures, recwarn):
    kept = slices(("t1/x",), lesion=False)
    kept["t1/x"]["real"] = torch.zeros(16, 20)
    swap_figure(kept, tmp_path / "figure.png", title="")
    assert not panels(figures[0])[0, 0].collections
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_ignored_voxels_are_neither_outlined_nor_coloured(tmp_path, figures):
    kept = slices(("t1/x",), lesion=False)
    kept["t1/x"]["label"][4:9, 5:12] = 255
    swap_figure(kept, tmp_path / "figure.png", title="")
    axes = panels(figures[0])[0]
    assert not axes[0].collections
    assert not np.asarray(axes[3].images[0].get_array()).any()
    lesion = slices(("t1/x",))
    swap_figure(lesion, tmp_path / "figure.png", title="")
    assert len(panels(figures[1])[0, 0].collections) == 1  # a lesion is


def test_no_pictured_subject_gives_an_empty_figure(tmp_path):
    swap_figure({}, tmp_path / "figure.png", title="Nothing")
    assert (tmp_path / "figure.png").is_file()


def syntheses(names=("flair/rsnet", "t1ce/rsnet", "t2/rsnet", "t1/rsnet"), lesion=True):
    """Slices with a border of background, where the images are 0."""
    kept = slices(names, lesion=lesion)
    for name in names:
        part = kept[name]
        part["variance"] = part["synthetic"].square() * 0.01
        for key in ("real", "synthetic", "variance"):
            part[key][:2] = 0
    return kept


def shown(axis):
    return np.asarray(axis.images[0].get_array())


def test_columns_are_the_papers_and_rows_real_synthetic_variance(tmp_path, figures):
    kept = syntheses(("apt/rsnet", "flair/rsnet", "t1ce/rsnet", "t1ce/rnet", "t2/rsnet", "t2/rsnet#2", "t1/rsnet"))
    synthesis_figure(kept, tmp_path / "figure.png", title="rsnet, subject 1", method="rsnet")
    axes = panels(figures[0])
    assert [axis.get_title() for axis in axes[0]] == ["T1", "T2", "T1ce", "FLAIR", "APTw"]
    assert [row[0].get_ylabel() for row in axes[:2]] == ["real", "synthetic"]
    assert "variance (z²)" in axes[2, 0].get_ylabel()
    assert "99.5th percentile" in axes[2, 0].get_ylabel()
    assert figures[0].get_suptitle() == "rsnet, subject 1"
    for column, target in zip(axes.T, ("t1", "t2", "t1ce", "flair", "apt"), strict=True):
        part = kept[f"{target}/rsnet"]
        for axis, key in zip(column, ("real", "synthetic", "variance"), strict=True):
            expected = part[key].numpy().T[::-1, ::-1]  # anterior above, the patient's right on the left
            assert np.array_equal(shown(axis)[:, :-2], expected[:, :-2])
    written = matplotlib.image.imread(tmp_path / "figure.png")
    assert written[..., :3].std() > 0.05


def test_another_run_of_the_method_has_a_figure_of_its_own(tmp_path, figures):
    kept = syntheses(("t2/rsnet", "t2/rsnet#2", "t1/rsnet"))
    synthesis_figure(kept, tmp_path / "figure.png", title="", method="rsnet#2")
    axes = panels(figures[0])
    assert axes.shape == (3, 1)
    assert np.array_equal(shown(axes[0, 0])[:, :-2], kept["t2/rsnet#2"]["real"].numpy().T[::-1, ::-1][:, :-2])


def test_a_bias_shows_because_the_synthetic_has_the_window_of_the_real(tmp_path, figures):
    kept = syntheses(("t1/rsnet", "t2/rsnet"))
    kept["t1/rsnet"]["synthetic"] += 3 * (kept["t1/rsnet"]["synthetic"] != 0)
    synthesis_figure(kept, tmp_path / "figure.png", title="", method="rsnet")
    for name, column in zip(("t1/rsnet", "t2/rsnet"), panels(figures[0]).T, strict=True):
        brain = kept[name]["real"].numpy()[2:]
        window = column[0].images[0].get_clim()
        assert column[1].images[0].get_clim() == window == tuple(np.percentile(brain, (0.5, 99.8)))
        # 0 would be a mid grey in the z-scored window: the background is at its lower end.
        assert (shown(column[0])[:, -2:] == window[0]).all()
        assert (shown(column[1])[:, -2:] == window[0]).all()


def test_every_variance_has_a_window_and_a_bar_of_its_own(tmp_path, figures):
    kept = syntheses(("t1/rsnet", "t2/rsnet"))
    kept["t2/rsnet"]["variance"] *= 1e-5
    synthesis_figure(kept, tmp_path / "figure.png", title="", method="rsnet")
    for name, axis in zip(("t1/rsnet", "t2/rsnet"), panels(figures[0])[2], strict=True):
        variance = kept[name]["variance"].numpy()
        low, high = axis.images[0].get_clim()
        assert (low, high) == (0, pytest.approx(np.percentile(variance[2:], 99.5)))
        assert high < variance.max()  # a few voxels do not darken the others
        assert not shown(axis)[:, -2:].any()
        (bar,) = axis.child_axes
        numbers = [float(text.get_text().replace("−", "-")) for text in bar.get_xticklabels()]
        inside = [number for number in numbers if 0 <= number <= high]
        assert 3 <= len(inside) == len(set(inside))


@pytest.mark.parametrize("lesion", [True, False])
def test_a_lesion_is_outlined_in_all_three_rows(tmp_path, figures, lesion):
    kept = syntheses(lesion=lesion)
    for name in list(kept)[1:]:
        kept[name]["label"][12:14, 3:5] = 255  # ignored voxels are no lesion
    synthesis_figure(kept, tmp_path / "figure.png", title="", method="rsnet")
    for axis in panels(figures[0]).flat:
        assert len(axis.collections) == lesion
        if lesion:  # around [4:9, 5:12] of RAS+, both axes mirrored
            (x0, y0), (x1, y1) = axis.collections[0].get_datalim(axis.transData).get_points()
            assert (x0, x1, y0, y1) == pytest.approx((6.5, 11.5, 7.5, 14.5))


def test_nothing_to_show_is_still_a_figure(tmp_path, recwarn):
    empty = torch.zeros(16, 20)
    blank = {"real": empty, "synthetic": empty, "variance": empty, "label": empty.long()}
    synthesis_figure({}, tmp_path / "none.png", title="", method="rsnet")
    synthesis_figure(slices(("t1/rsnet",)), tmp_path / "without.png", title="", method="rsnet")  # no variance
    synthesis_figure({"t1/rsnet": blank}, tmp_path / "blank.png", title="", method="rsnet")
    calibration_figure([], {}, {}, tmp_path / "empty.png", title="")
    assert all((tmp_path / f"{name}.png").is_file() for name in ("none", "without", "blank", "empty"))
    assert not recwarn


NAMES = ("flair/rnet", "t1/rsnet", "t1/rnet", "t1/rsnet#2")


def calibration_rows(names=NAMES, subjects=("a", "b"), bins=5, factor=1.0):
    """Mean squared errors of ``factor`` times the variance in the first subject, and thrice that in the second."""
    return [
        {
            "subject": subject,
            "input": name,
            "bin": i,
            "variance": 10.0 ** (i - bins),
            "squared_error": factor * (1 + 2 * j) * 10.0 ** (i - bins),
            "voxels": 100,
        }
        for j, subject in enumerate(subjects)
        for name in names
        for i in range(bins)
    ]


def voxels(names=NAMES, count=8000):
    rng = np.random.default_rng(0)
    variance = 10 ** rng.uniform(-5, -1, count)
    error = np.abs(rng.normal(size=count)) * np.sqrt(variance)
    return {
        name: {"voxels": {"variance": torch.from_numpy(variance), "error": torch.from_numpy(error)}} for name in names
    }


def lines(axis, marker):
    return [line for line in axis.lines if line.get_marker() == marker]


def test_calibration_has_a_column_a_target_and_a_colour_a_method(tmp_path, figures):
    correlations = {"t1/rsnet": 0.512, "t1/rnet": math.nan, "flair/rnet": -0.2}
    calibration_figure(
        calibration_rows(), {"real": {}, **voxels()}, correlations, tmp_path / "figure.png", title="Uncertainty"
    )
    upper, lower = panels(figures[0])
    assert [axis.get_legend().get_title().get_text() for axis in upper] == ["T1", "FLAIR"]
    legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in upper]
    assert legends == [["rsnet, ρ = 0.51", "rnet, ρ = –", "rsnet#2, ρ = –"], ["rnet, ρ = -0.20"]]
    for row in (upper, lower):
        colours = [[line.get_color() for line in lines(axis, "o")] for axis in row]
        assert len(set(colours[0])) == 3
        assert colours[1] == colours[0][1:2]  # the same method, the same colour
    assert upper[0].get_ylabel() == "absolute error (z)"
    assert lower[0].get_ylabel() == "mean squared error (z²)"
    assert [axis.get_xlabel() for axis in lower] == ["variance (z²)"] * 2
    assert all(axis.get_xscale() == axis.get_yscale() == "log" for axis in (*upper, *lower))
    assert "mean of 2 subjects" in figures[0].get_supxlabel()
    assert figures[0].get_suptitle() == "Uncertainty"
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_curves_are_means_over_subjects_and_their_roots(tmp_path, figures):
    calibration_figure(calibration_rows(("t1/rsnet",)), {}, {}, tmp_path / "figure.png", title="")
    upper, lower = panels(figures[0])[:, 0]
    variance = 10.0 ** np.arange(-5, 0)
    (root,), (curve,) = lines(upper, "o"), lines(lower, "o")
    assert curve.get_xdata() == pytest.approx(variance)
    assert curve.get_ydata() == pytest.approx(2 * variance)  # of one and three times the variance
    assert root.get_xdata() == pytest.approx(variance)
    assert root.get_ydata() == pytest.approx(np.sqrt(2 * variance))


@pytest.mark.parametrize("factor", [1, 300, 1 / 300])
def test_the_identity_is_in_sight_however_far_the_curve_is(tmp_path, figures, factor):
    rows = calibration_rows(("t1/rsnet",), ("a",), factor=factor)
    calibration_figure(rows, voxels(("t1/rsnet",)), {}, tmp_path / "figure.png", title="")
    lower = panels(figures[0])[1, 0]
    assert [text.get_text() for text in lower.get_legend().get_texts()] == ["calibrated"]
    (identity,) = (line for line in lower.lines if line.get_label() == "calibrated")
    assert all(x == y for x, y in (identity.get_xy1(), identity.get_xy2()))
    (left, right), (bottom, top) = lower.get_xlim(), lower.get_ylim()
    assert max(left, bottom) * 100 < min(right, top)  # two decades of it
    on_it = np.allclose(lines(lower, "o")[0].get_xdata(), lines(lower, "o")[0].get_ydata())
    assert on_it == (factor == 1)


def test_voxels_are_thinned_evenly(tmp_path, figures):
    calibration_figure([], voxels(("t1/rsnet",)), {}, tmp_path / "figure.png", title="")
    (dots,) = lines(panels(figures[0])[0, 0], ".")
    given = voxels(("t1/rsnet",))["t1/rsnet"]["voxels"]
    assert np.array_equal(dots.get_xdata(), given["variance"][::3])
    assert dots.get_linestyle() == "None"


def test_zeros_and_empty_bins_have_a_place_on_logarithmic_axes(tmp_path, figures):
    kept = voxels(("t1/rsnet",), count=200)
    kept["t1/rsnet"]["voxels"]["variance"][:50] = 0
    kept["t1/rsnet"]["voxels"]["error"][25:75] = 0
    rows = calibration_rows(("t1/rsnet",), ("a",))
    rows[0]["variance"] = 0.0
    rows.append({**rows[0], "bin": 5, "variance": math.nan, "squared_error": math.nan, "voxels": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration_figure(rows, kept, {"t1/rsnet": 0.5}, tmp_path / "figure.png", title="")
    upper, lower = panels(figures[0])[:, 0]
    (dots,), (curve,) = lines(upper, "."), lines(lower, "o")
    assert len(dots.get_xdata()) == 200
    assert (dots.get_xdata()[:50] == upper.get_xlim()[0]).all()
    assert (dots.get_ydata()[25:75] == upper.get_ylim()[0]).all()
    assert curve.get_xdata()[0] == lower.get_xlim()[0]
    assert len(curve.get_xdata()) == 5  # the bin without voxels is no point
    assert "mean of 1 subject." in figures[0].get_supxlabel()


@pytest.mark.parametrize("value", [0.0, 0.02])
def test_a_single_value_has_axes_around_it(tmp_path, figures, value):
    rows = [{"subject": "a", "input": "t1/x", "bin": 0, "variance": value, "squared_error": value, "voxels": 1}]
    calibration_figure(rows, {}, {}, tmp_path / "figure.png", title="")
    for axis in figures[0].axes:
        for low, high in (axis.get_xlim(), axis.get_ylim()):
            assert low > 0
            assert high / low == pytest.approx(100)  # two decades have a number to read
