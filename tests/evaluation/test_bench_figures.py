"""The bench's figure: a mean and an interval for every method and region, in the order of the table."""

import math

from mrgen.evaluation.bench_figures import _changes, change_figure, changes

LINES = [
    {"by": "all real", "dice_WT": 80.0},
    {"by": "rsnet", "dice_WT_change": -1.0, "dice_WT_change_low": -2.0, "dice_WT_change_high": 0.5},
    {"by": "nothing", "dice_WT_change": -30.0, "dice_WT_change_low": math.nan, "dice_WT_change_high": math.nan},
]


def test_what_has_no_change_is_left_out():
    assert changes(LINES, "dice_WT", "by")["rsnet"] == (-1.0, -2.0, 0.5)
    assert list(changes(LINES, "dice_WT", "by")) == ["rsnet", "nothing"]


def test_every_method_is_drawn_in_its_place(tmp_path):
    panel = {"WT": changes(LINES, "dice_WT", "by"), "ET": {"rsnet": (1.0, 0.0, 2.0)}}
    figure = _changes({"judged by snet": panel, "judged by deepmedic": panel}, "Bench", "change")
    assert len(figure.axes) == 2
    for axis in figure.axes:
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [(float(dot.get_xdata()[0]), round(float(dot.get_ydata()[0]))) for dot in dots] == [
            (-1.0, 0),
            (-30.0, 1),
            (1.0, 0),
        ]
    first = figure.axes[0]
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["rsnet", "nothing"]
    assert first.get_ylim()[0] > first.get_ylim()[1]  # the best above
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["WT", "ET"]
    change_figure({"": panel}, tmp_path / "figure.png", title="Bench", measure="change")
    assert (tmp_path / "figure.png").stat().st_size > 100
