import math

import pytest

from mrgen.errors import UserError
from mrgen.evaluation.selection import ranking, select, selection_table

FAMILIES = {
    "t2/clustering-3": "clustering",
    "t2/clustering-4": "clustering",
    "t2/clustering-5": "clustering",
    "t2/resnet-0-0": "resnet",
    "t2/random": None,
}
# By method, the error in the brain of the subjects a, b and c.
MEASURED = {
    "t2/random": (0.001, 0.001, 0.001),
    "t2/clustering-3": (0.03, 0.03, 0.03),
    "t2/clustering-4": (0.01, 0.01, 0.04),
    "t2/clustering-5": (0.05, 0.05, 0.05),
    "t2/resnet-0-0": (0.09, 0.09, 0.09),
}


def rows(measured=MEASURED, key="own_mse_brain"):
    found = [{"subject": subject, "input": "real", "dice_WT": 0.9} for subject in "abc"]
    for name, values in measured.items():
        found += [{"subject": s, "input": name, key: x} for s, x in zip("abc", values, strict=True)]
    return found


def chosen(*arguments, **settings):
    return [(line["family"], line["rank"], line["input"]) for line in select(*arguments, **settings)]


def test_the_best_two_of_each_family_on_the_mean_over_subjects():
    assert chosen(rows(), FAMILIES) == [
        ("clustering", 1, "t2/clustering-4"),
        ("clustering", 2, "t2/clustering-3"),
        ("resnet", 1, "t2/resnet-0-0"),  # a family of one gives that one; the baseline is best of all and not chosen
    ]
    first, *_ = select(rows(), FAMILIES, count=1)
    assert (first["own_mse_brain"], first["n"]) == (pytest.approx(0.02), 3)


def test_a_method_without_a_family_is_a_baseline():
    assert chosen(rows(), {"t2/clustering-5": "clustering"}) == [("clustering", 1, "t2/clustering-5")]


def test_ties_go_by_name_whatever_the_order_of_the_rows():
    tied = MEASURED | {name: (0.02,) * 3 for name in ("t2/clustering-5", "t2/clustering-3", "t2/clustering-4")}
    for order in (list(tied), list(tied)[::-1]):
        found = chosen(rows({name: tied[name] for name in order}), FAMILIES)
        names = [name for family, _, name in found if family == "clustering"]
        assert names == ["t2/clustering-3", "t2/clustering-4"]


def test_a_subject_without_a_value_leaves_the_mean_of_the_others():
    holed = MEASURED | {"t2/clustering-5": (math.nan, 0.001, 0.003), "t2/clustering-4": (math.nan,) * 3}
    holed["t2/clustering-3"] = (math.inf, 0.0, 0.0)
    lines = {line["input"]: line for line in ranking(rows(holed), FAMILIES)}
    best = lines["t2/clustering-5"]
    assert (best["rank"], best["n"], best["own_mse_brain"]) == (1, 2, pytest.approx(0.002))
    assert lines["t2/clustering-4"]["rank"] is None  # no value at all
    assert lines["t2/clustering-3"]["rank"] is None  # not finite
    assert [name for family, _, name in chosen(rows(holed), FAMILIES) if family == "clustering"] == ["t2/clustering-5"]


def test_of_dice_the_mean_of_the_regions_counts_and_more_is_better():
    found = []
    for name, whole, core in (
        ("t2/clustering-3", 0.9, 0.1),
        ("t2/clustering-4", 0.6, 0.6),
        ("t2/clustering-5", 0.2, 0.2),
    ):
        found.append({"subject": "a", "input": name, "dice_WT": whole, "dice_TC": core, "own_mse_brain": core})
    names = [name for _, _, name in chosen(found, FAMILIES, "dice", regions=("WT", "TC"))]
    assert names == ["t2/clustering-4", "t2/clustering-3"]
    assert [name for _, _, name in chosen(found, FAMILIES)] == ["t2/clustering-3", "t2/clustering-5"]


def test_the_table_lists_all_and_marks_the_chosen():
    table = selection_table(rows(), FAMILIES, count=2, notes=["Subjects: val."])
    assert table.columns == ["family", "method", "n", "own_mse_brain", "rank", "chosen"]
    assert table.rows == [
        ["clustering", "t2/clustering-4", "3", "0.02000", "1", "yes"],
        ["clustering", "t2/clustering-3", "3", "0.03000", "2", "yes"],
        ["clustering", "t2/clustering-5", "3", "0.05000", "3", ""],
        ["resnet", "t2/resnet-0-0", "3", "0.09000", "1", "yes"],
        ["–", "t2/random", "3", "0.00100", "–", ""],
    ]  # real sequences have no error
    assert "lower is better" in table.notes[0]
    assert table.notes[-1] == "Subjects: val."


def test_the_real_sequences_are_a_baseline_of_dice():
    found = selection_table(rows(), FAMILIES, "dice", regions=["WT"]).rows
    assert found[-1][:4] == ["–", "t2/random", "0", "–"]
    assert ["–", "real", "3", "0.90000", "–", ""] in found


@pytest.mark.parametrize(
    ("criterion", "count", "said"), [("mse", 2, "expected one of own_mse_brain"), ("dice", 0, "count is 0")]
)
def test_what_cannot_be_chosen_by_is_refused(criterion, count, said):
    with pytest.raises(UserError, match=said):
        select(rows(), FAMILIES, criterion, count)
