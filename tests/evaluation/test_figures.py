import matplotlib.figure
import numpy as np
import pytest
import torch

from mrgen.evaluation.figures import swap_figure


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
