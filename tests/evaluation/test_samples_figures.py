"""Sheets of samples: what is in which panel, in which window and colour."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mrgen.evaluation.samples_figures import SheetRow, mask_colours, mask_picture, sample_sheet, surroundings

CLASSES = ["background", "necrotic and non-enhancing core", "edema", "enhancing"]
GREEN, YELLOW, BLUE = "#00a651", "#ffd400", "#2a5fd6"


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    save = Figure.savefig

    def kept(figure, path, **settings):
        saved.append(figure)
        save(figure, path, **settings)

    monkeypatch.setattr(Figure, "savefig", kept)
    return saved


@pytest.fixture
def brain():
    brain = np.zeros((24, 30), bool)
    brain[6:20, 8:26] = True
    return brain


@pytest.fixture
def label():
    label = np.zeros((24, 30), np.int64)
    label[8:12, 10:14] = 2
    label[9:11, 11:13] = 3
    return label


@pytest.mark.parametrize(
    ("classes", "colours"),
    [
        (CLASSES, [BLUE, GREEN, YELLOW]),
        (["normal", "edema", "cavity", "tumour"], [GREEN, BLUE, YELLOW]),
        (["background", "white matter hyperintensities"], [GREEN]),
        (["background", "necrosis", "edema", "non-enhancing tumour", "enhancing tumour"], [BLUE, GREEN, YELLOW]),
    ],
)
def test_classes_have_the_papers_colours_and_none_twice(classes, colours):
    found = mask_colours(classes)
    assert list(found) == ["normal brain", *classes[1:]]
    assert list(found.values())[1:][: len(colours)] == colours
    assert len(set(found.values())) == len(classes)


def test_the_mask_is_painted_by_class(brain, label):
    label[19, 25] = 255
    picture = mask_picture(label, brain, CLASSES)
    places = {(0, 0): "#000000", (7, 9): "#808080", (8, 10): GREEN, (9, 11): YELLOW}
    assert {place: to_hex(picture[place]) for place in places} == places
    assert to_hex(picture[19, 25]) not in (*places.values(), BLUE)


def test_what_is_shown_holds_every_mask(brain, label):
    assert surroundings(brain, label) == (slice(2, 24), slice(4, 30))
    assert surroundings(np.zeros((5, 6), bool)) == (slice(0, 5), slice(0, 6))


def test_a_row_a_method_a_column_a_sequence(tmp_path, figures, brain, label):
    rng = np.random.default_rng(0)
    rows = [SheetRow(name, label, rng.uniform(-1, 1, (3, 24, 30))) for name in ("real", "samr")]
    rows.append(SheetRow("mirrored", label, "impossible here: no room"))
    settings = {"brain": brain, "modalities": ["t1", "t1ce", "apt"], "classes": CLASSES}
    sample_sheet(rows, tmp_path / "sheet.png", title="Samples, a, slice 3", **settings)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    axes = np.array(figures[0].axes).reshape(3, 4)
    assert [axis.get_title() for axis in axes[0]] == ["label", "T1", "T1ce", "APTw"]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["real", "samr", "mirrored"]
    shown = np.asarray(axes[1, 2].images[0].get_array())
    assert np.array_equal(shown, rows[1].image[1][2:24, 4:30].T[::-1, ::-1])  # the left of the patient on the right
    assert {axis.images[0].get_clim() for axis in axes[:2, 1:].flat} == {(-1.0, 1.0)}
    assert not axes[2, 1].images
    assert "no room" in axes[2, 0].texts[0].get_text()
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["normal brain", *CLASSES[1:]]


def test_the_red_box_holds_the_lesion_as_it_was_manipulated(tmp_path, figures, brain, label):
    moved = np.roll(label, (5, 4), axis=(0, 1))
    label[6, 8] = 255  # no lesion
    rows = [SheetRow("real", label, np.zeros((1, 24, 30))), SheetRow("moved", moved, np.zeros((1, 24, 30)))]
    sample_sheet(rows, tmp_path / "a.png", brain=brain, modalities=["t1"], classes=CLASSES, title="a")
    axes = np.array(figures[0].axes).reshape(2, 2)
    for row, axis in zip(rows, axes[:, 1], strict=True):
        (box,) = axis.patches
        lesion = (row.label > 0) & (row.label < 255)
        rows_, columns = np.nonzero(lesion[2:24, 4:30].T[::-1, ::-1])
        assert box.get_x() == columns.min() - 2.5
        assert box.get_x() + box.get_width() == columns.max() + 2.5
        assert box.get_y() == rows_.min() - 2.5
        assert box.get_y() + box.get_height() == rows_.max() + 2.5
    assert "not known" in [text.get_text() for text in figures[0].legends[0].get_texts()]


def test_without_a_lesion_there_is_no_box(tmp_path, figures, brain):
    rows = [SheetRow("real", np.zeros((24, 30), np.int64), np.zeros((1, 24, 30)))]
    sample_sheet(rows, tmp_path / "a.png", brain=brain, modalities=["t1"], classes=CLASSES, title="a")
    assert not figures[0].axes[1].patches
