"""Tables of the availability study: the paper's averages, patients as the unit of what is compared, and its claims."""

import math

import numpy as np
import pytest
from scipy import stats

from mrgen.evaluation.augmentation_numbers import MEAN
from mrgen.evaluation.availability_numbers import availability_claims, availability_runs, availability_summary
from mrgen.evaluation.availability_tables import availability_tables
from mrgen.evaluation.statistics import bootstrap_interval, holm
from tests.evaluation.augmentation_rows import row
from tests.evaluation.availability_rows import DICE, REGIONS, SEQUENCES, STUDY, index, study


def summary(rows, indices, regions=REGIONS):
    return {line["input"]: line for line in availability_summary(rows, indices, regions=regions, reference="row-1")}


def claims(rows, indices, **others):
    found = availability_claims(rows, indices, regions=REGIONS, study={**STUDY, **others})
    return {line["claim"]: line for line in found}


def patients(indices, name):
    """Of each, over the sequences."""
    own = [line["index_dice"] for line in indices if line["input"] == name]
    return np.array(own).reshape(-1, len(SEQUENCES)).mean(axis=1)


def cells(table):
    return [dict(zip(table.columns, line, strict=True)) for line in table.rows]


@pytest.fixture(scope="module")
def tables():
    rows, indices = study(("row-25", "mine", "row-1", "row-1#2", "row-3", "row-12"), dices={**DICE, "mine": 0.9})
    found = availability_summary(rows, indices, regions=REGIONS, reference="row-1")
    training = {"real_slices": 90, "synthetic_slices": 0, "enhanced_slices": 0, "order": None, "steps": 900}
    return availability_tables(
        found,
        availability_claims(rows, indices, regions=REGIONS, study=STUDY),
        title="Availability",
        study=STUDY,
        regions=REGIONS,
        sequences=SEQUENCES,
        reference="row-1",
        cohorts=[
            {"name": "cohort", "scheme": "single", "judge": "row-1", "candidates": 40, "kept": 20}
            | {"dice": 0.7, "mse": 0.1}
        ],
        training={"row-3": {**training, "steps": 800}, "row-1": training},
        notes=["Subjects: all."],
    )


# ----- the numbers -----------------------------------------------------------------------------------------------


def test_a_run_is_averaged_over_slices_and_sequences_as_the_paper_does():
    indices = [
        index("a", "row-1", "t1", 0.5, mse=0.4, slices=10),
        index("a", "row-1", "flair", 0.7, mse=0.2, slices=10),
        index("b", "row-1", "t1", 1.0, mse=0.0, slices=30),
        index("b", "row-1", "flair", 1.0, mse=0.0, slices=30),
        index("c", "row-1", "t1", math.nan, mse=math.nan, slices=0),  # nothing of it is known
    ]
    (line,) = availability_runs(indices)
    assert line["dice"] == pytest.approx((10 * 0.5 + 10 * 0.7 + 60) / 80)
    assert line["mse"] == pytest.approx((10 * 0.4 + 10 * 0.2) / 80)
    assert line["dice_t1"] == pytest.approx((10 * 0.5 + 30) / 40)
    found = summary([row(patient, "row-1", "ET", 0.5) for patient in "ab"], indices, ["ET"])["row-1"]
    assert (found["dice"], found["n"]) == (line["dice"], 2)
    assert found["patient_dice"] == pytest.approx((0.6 + 1.0) / 2)  # here every patient counts once


def test_repeats_have_a_mean_a_spread_and_a_best():
    dices = {"row-1": (0.5, 0.2), "row-1#2": (0.8, 0.3), "row-1#3": (0.6, 0.1)}
    indices = [index(patient, name, "t1", *scores) for name, scores in dices.items() for patient in "ab"]
    rows = [row(patient, name, "ET", scores[0]) for name, scores in dices.items() for patient in "ab"]
    line = summary(rows, indices, ["ET"])["row-1"]
    assert (line["runs"], line["dice"], line["mse"]) == (3, pytest.approx(1.9 / 3), pytest.approx(0.2))
    assert line["dice_std"] == pytest.approx(np.std([0.5, 0.8, 0.6], ddof=1))
    assert (line["dice_best"], line["mse_best"]) == (0.8, 0.3)  # of one and the same run
    assert line["patient_dice"] == line["region_ET"] == pytest.approx(1.9 / 3)
    assert math.isnan(summary(rows[:2], indices[:2], ["ET"])["row-1"]["dice_std"])


def test_rows_are_tested_against_the_first_by_patient_and_adjusted_over_all_of_them():
    rows, indices = study(("row-1", "row-3", "row-12"))
    found = summary(rows, indices)
    change = patients(indices, "row-3") - patients(indices, "row-1")
    line = found["row-3"]
    assert line["patient_dice_change"] == pytest.approx(change.mean())
    interval = line["patient_dice_change_low"], line["patient_dice_change_high"]
    assert interval == pytest.approx(bootstrap_interval(change), rel=1e-3)
    family = [
        stats.wilcoxon(patients(indices, name), patients(indices, "row-1")).pvalue for name in ("row-3", "row-12")
    ]
    assert [found[name]["patient_dice_p"] for name in ("row-3", "row-12")] == pytest.approx(holm(family))
    assert found["row-1"]["patient_dice_p"] is None
    assert line[f"region_{MEAN}_change"] == pytest.approx(change.mean(), abs=0.002)
    assert line["region_ET"] == pytest.approx(patients(indices, "row-3").mean() - 0.2)


def test_the_papers_claims_by_its_own_numbers_all_hold():
    found = claims(*study())
    assert list(found) == [
        "row-3 < row-1",
        "row-12 ~ row-1",
        "row-12 > row-1",
        "row-12 to row-14 rise, then fall",
        "best of row-12 to row-14 > best of row-19 to row-19",
        "row-25 is best of 7 rows",
    ]  # what was not run is left out
    assert all(line["holds"] for line in found.values())
    pair = found["row-3 < row-1"]
    assert pair["difference"] == pytest.approx(0.708 - 0.915, abs=0.003)
    assert pair["region"] == pytest.approx(pair["difference"], abs=1e-6)
    assert pair["paper"] == [0.708, 0.915]
    assert pair["p"] == pytest.approx(min(1, 3 * 2 / 2**8))  # of three pairs
    shape = found["row-12 to row-14 rise, then fall"]
    assert (shape["p"], shape["paper"]) == (None, [0.921, 0.939, 0.916])
    assert math.isnan(shape["difference"])
    assert found["row-25 is best of 7 rows"]["paper"] == [0.940, 0.939]


def test_claims_that_do_not_hold():
    worse = {**DICE, "row-3": 0.92, "row-12": 0.95, "row-25": 0.8, "row-19": 0.96}
    found = claims(*study(dices=worse))
    assert [line["holds"] for line in found.values()] == [False, False, True, False, False, False]
    assert found["row-25 is best of 7 rows"]["ours"] == pytest.approx([0.8, 0.96], abs=0.02)


def test_claims_need_two_rows_at_least():
    assert claims(*study(("row-25",))) == {}
    assert list(claims(*study(("row-1", "row-25")))) == ["row-25 is best of 2 rows"]
    without = availability_claims(*study(), regions=REGIONS, study=STUDY, paper=False)
    assert {line["paper"] for line in without} == {None}


# ----- the tables ------------------------------------------------------------------------------------------------


def test_table_2_is_in_the_papers_order_with_its_numbers_beside(tables):
    table = tables["table 2"]
    assert [line[0] for line in table.rows] == ["row-1", "row-3", "row-12", "row-25", "mine"]
    first, *_, last, mine = table.rows
    assert first[1:6] == ["×1", "0", "0", "–", "2"]
    assert last[1:6] == ["×1", "×1", "0", "synthetic first", "1"]
    assert mine[1:5] == ["–"] * 4
    assert table.columns[6:] == ["Dice", "best Dice", "paper Dice", "MSE", "MSE of the best", "paper MSE"]
    assert " ± " in first[6]
    assert " ± " not in last[6]
    assert (first[8], first[11], mine[8]) == ("0.915", "0.026", "–")
    notes = " ".join(table.notes)
    assert "optimistic" in notes
    assert "Caution: the planning sheet has 0.20 less." in notes
    assert "Subjects: all." in notes


def test_table_1_has_real_slices_and_a_line_a_cohort(tables):
    real, synthetic = cells(tables["table 1"])
    assert (real["guidance"], real["slices"], real["judged by"]) == ("4 SEG", "real", "row-1, 2 runs")
    assert (real["paper MSE"], real["paper Dice"]) == ("0.026", "0.915")
    assert list(synthetic.values()) == [
        *("1 SEG", "40 synthetic, 20 kept", "cohort", "row-1", "0.100", "0.700"),
        *("0.053", "0.741"),
    ]


def test_other_tables(tables):
    assert list(tables) == ["table 2", "table 1", "claims", "patients", "regions", "sequences", "training"]
    assert tables["regions"].columns == ["row", "n", "ET", "WT", "mean", "mean − row-1", "p"]
    assert tables["sequences"].columns == ["row", "Dice T1", "Dice FLAIR", "MSE T1", "MSE FLAIR"]
    claim = cells(tables["claims"])[0]
    assert (claim["claim"], claim["holds"], claim["paper"]) == ("row-3 < row-1", "yes", "0.708 / 0.915")
    reference, other = tables["patients"].rows[:2]
    assert reference[4:] == ["–", "–", "–", "–"]
    assert other[4].startswith("-0.2")
    assert [line[0] for line in tables["training"].rows] == ["row-1", "row-3"]
    assert "no p can fall below 0.031" in " ".join(tables["patients"].notes)  # 4 tests, 8 patients


def test_unequal_steps_are_told_first_below_table_2(tables):
    said = "NOT equal: optimiser steps. row-1 was trained for 900, row-3 800."
    assert tables["table 2"].notes[0] == said
    assert said in tables["training"].notes


def test_claims_say_that_their_means_are_not_those_of_table_2(tables):
    assert "means over n patients of all runs of a row: they may differ from Table 2's" in tables["claims"].notes[0]


def test_every_table_fits_a_page_of_200_columns(tables, capsys):
    for table in tables.values():
        table.show()
        body = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        assert len(body) == len(table.rows)  # no cell takes a second line


def test_without_the_papers_numbers_and_without_cohorts():
    rows, indices = study(("row-1", "row-3"), n=2)
    found = availability_tables(
        availability_summary(rows, indices, regions=["WT"], reference="row-1"),
        [],
        title="A",
        study=STUDY,
        regions=["WT"],
        sequences=SEQUENCES,
        reference="row-1",
        paper=False,
    )
    assert list(found) == ["table 2", "patients", "regions", "sequences"]
    assert not [column for table in found.values() for column in table.columns if "paper" in column]
    assert "Caution" not in " ".join(found["table 2"].notes)
    assert found["regions"].columns == ["row", "n", "WT", "WT − row-1", "p"]
