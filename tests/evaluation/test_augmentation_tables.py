"""Tables of augmentation: the patient is the unit, the preset says what is compared."""

import math

import numpy as np
import pytest
from scipy import stats

from mrgen.evaluation.augmentation_numbers import (
    MEAN,
    augmentation_directions,
    augmentation_repeats,
    augmentation_summary,
    by_patient,
)
from mrgen.evaluation.augmentation_tables import augmentation_tables
from mrgen.evaluation.statistics import bootstrap_interval, holm
from tests.evaluation.augmentation_rows import EXPERIMENTS, LABELS, PAPER, PRINTED, RUNS, cohort, row

CLAIMS = [["samr-1.0", ">", "real"], ["pix2pix-1.0", "<", "real"], ["shin-1.0", ">", "real"]]


def summary(rows, reference="real", labels=tuple(LABELS)):
    lines = augmentation_summary(rows, labels=labels, reference=reference)
    return {(line["input"], line["label"]): line for line in lines}


def values(rows, name, label, key="dice"):
    return np.array([line[key] for line in rows if (line["input"], line["label"]) == (name, label)])


def cells(table):
    return [dict(zip(table.columns, line, strict=True)) for line in table.rows]


@pytest.fixture(scope="module")
def tables():
    training = {
        "real": {"real_slices": 90, "synthetic_slices": 0, "epochs": 2, "steps": 12, "batch_size": 16},
        "samr-1.0": {"real_slices": 90, "synthetic_slices": 90, "epochs": 2, "steps": 24, "equal_steps": False},
    }
    return augmentation_tables(
        cohort((*RUNS, "mine")),
        title="Augmentation",
        labels=LABELS,
        reference="real",
        experiments=EXPERIMENTS,
        claims=CLAIMS,
        training=training,
        paper=PAPER,
        notes=["Subjects: all."],
    )


# ----- the numbers -----------------------------------------------------------------------------------------------


def test_scans_of_one_patient_count_once():
    rows = [
        row("a", "real", "edema", 0.2, sensitivity=math.nan, one_empty=True),
        row("a", "real", "edema", 0.6, sensitivity=0.8) | {"subject": "a_2"},
        row("b", "real", "edema", 0.9),
        row("b", "real", "else", 0.1),
    ]
    first, second = by_patient(rows, ["edema"])
    assert (first["subject"], first["dice"], first["sensitivity"]) == ("a", pytest.approx(0.4), 0.8)
    assert (first["slices"], first["one_empty"], second["slices"]) == (20, 1, 10)  # counts are added up
    line = summary(rows, labels=["edema"])["real", "edema"]
    assert (line["n"], line["dice"]) == (2, pytest.approx(0.65))
    assert (line["dice_low"], line["dice_high"]) == pytest.approx(bootstrap_interval([0.4, 0.9]), rel=1e-3)
    assert (line["slices"], line["one_empty"]) == (30, 1)


def test_labels_come_in_the_order_asked_for_and_then_their_mean():
    rows = [row("a", "real", "necrotic core", 0.2, sensitivity=math.nan), row("a", "real", "edema", 0.6)]
    found = by_patient(rows, list(LABELS))
    assert [line["label"] for line in found] == ["edema", "necrotic core", MEAN]
    assert (found[2]["dice"], found[2]["sensitivity"]) == (pytest.approx(0.4), 0.5)  # of what there is
    assert [line["label"] for line in by_patient(rows, ["edema"])] == ["edema"]


def test_runs_are_tested_against_real_only_a_measure_a_family():
    rows = cohort()
    found = summary(rows)
    places = [(name, label) for name in RUNS[1:] for label in (*LABELS, MEAN)]
    patients = by_patient(rows, list(LABELS))
    for key in ("dice", "hd95", "slice_dice"):
        family = [
            stats.wilcoxon(values(patients, name, label, key), values(patients, "real", label, key)).pvalue
            for name, label in places
        ]
        assert [found[place][f"{key}_p"] for place in places] == pytest.approx(holm(family))
    change = values(rows, "samr-1.0", "edema") - values(rows, "real", "edema")
    line = found["samr-1.0", "edema"]
    assert line["dice_change"] == pytest.approx(change.mean())
    assert (line["dice_change_low"], line["dice_change_high"]) == pytest.approx(bootstrap_interval(change), rel=1e-3)
    assert found["real", "edema"]["dice_p"] is None
    assert math.isnan(found["real", "edema"]["dice_change"])
    assert {line["dice_p"] for line in summary(rows, reference="nobody").values()} == {None}


def test_repeated_references_are_averaged():
    rows = cohort(("real", "real#2", "samr-1.0"), n=7)
    found = summary(rows)
    both = (values(rows, "real", "edema") + values(rows, "real#2", "edema")) / 2
    line = found["samr-1.0", "edema"]
    assert line["dice_change"] == pytest.approx((values(rows, "samr-1.0", "edema") - both).mean())
    assert found["real#2", "edema"]["dice_p"] is None  # is the reference, too


def test_directions_are_of_the_mean_over_labels_and_of_all_repeats():
    rows = cohort(("real", "samr-1.0", "samr-1.0#2"))
    (line,) = augmentation_directions(rows, labels=list(LABELS), claims=CLAIMS, paper=PRINTED)  # of what was run
    ours = np.mean([values(rows, name, label) for name in ("samr-1.0", "samr-1.0#2") for label in LABELS], axis=0)
    real = np.mean([values(rows, "real", label) for label in LABELS], axis=0)
    assert (line["first"], line["relation"], line["second"], line["n"]) == ("samr-1.0", ">", "real", 12)
    assert (line["first_mean"], line["second_mean"]) == pytest.approx((ours.mean(), real.mean()))
    assert line["difference"] == pytest.approx((ours - real).mean())
    assert (line["holds"], line["p"]) == (True, pytest.approx(2 / 2**12))
    assert (line["paper_first"], line["paper_second"]) == pytest.approx((0.8035, 0.6295))
    (other,) = augmentation_directions(rows, labels=["edema"], claims=[["real", ">", "samr-1.0"]])
    assert (other["holds"], other["paper_first"]) == (False, None)


def test_a_label_that_is_not_there_decides_no_claim_alone():
    """Nothing predicted where nothing is scores 1: so one run may be better, though it finds less of what is there."""
    rows = [
        row("a", "cautious", "edema", 0.4),
        row("a", "cautious", "necrotic core", 1.0, dice_there=math.nan),
        row("a", "bold", "edema", 0.6),
        row("a", "bold", "necrotic core", 0.0, dice_there=math.nan),
    ]
    (line,) = augmentation_directions(rows, labels=list(LABELS), claims=[["cautious", ">", "bold"]])
    assert (line["holds"], line["difference"], line["there"]) == (True, pytest.approx(0.4), pytest.approx(-0.2))


def test_repeats_have_a_spread():
    rows = [
        row(patient, name, "edema", dice)
        for name, dice in (("samr", 0.5), ("samr#2", 0.8), ("real", 0.6))
        for patient in ("a", "b")
    ]
    (line,) = augmentation_repeats(rows, labels=["edema"])
    assert (line["input"], line["runs"], line["dice"]) == ("samr", 2, pytest.approx(0.65))
    assert line["dice_std"] == pytest.approx(np.std([0.5, 0.8], ddof=1))
    assert (line["dice_least"], line["dice_most"]) == (0.5, 0.8)


# ----- the tables ------------------------------------------------------------------------------------------------


def test_a_table_an_experiment_with_the_papers_beside(tables):
    expected = ["training", "experiment 1", "experiment 2", "others", "differences", "slices", "slice differences"]
    assert list(tables) == [*expected, "empty", "directions", "preference"]  # Exp. 4 was not run, nothing repeated
    table = tables["experiment 1"]
    assert [line["run"] for line in cells(table)[::3]] == ["real", "pix2pix-1.0", "samr-1.0"]
    real, pix2pix, samr = cells(table)[::3]
    found = summary(cohort((*RUNS, "mine")))["samr-1.0", "edema"]
    assert samr["Dice"].startswith(f"{found['dice']:.3f} [")
    paper = "paper Dice / HD95 / sensitivity / specificity"
    assert samr[paper] == "0.794 / 6.049 / – / 0.997"
    assert pix2pix[paper] == "0.589 / 13.180 / 0.626 / –"
    assert real[paper] == "–"  # which stands in another experiment
    assert cells(table)[-1]["label"] == MEAN
    assert cells(table)[-1][paper].startswith("0.803 / 3.809 / ")  # made of the two labels
    assert cells(tables["experiment 2"])[0][paper].startswith("0.646 / ")
    assert "Its labels: necrotic core for its cavity." in table.notes
    others = cells(tables["others"])
    assert [line["run"] for line in others[::3]] == ["real", "mine"]
    assert "preset" in tables["others"].title
    assert "Subjects: all." in tables["training"].notes  # the first table's


def test_the_training_of_every_run_is_told(tables):
    real, samr = cells(tables["training"])
    assert list(real.values()) == ["real", "90", "0", "2", "12", "16", "–"]
    assert list(samr.values()) == ["samr-1.0", "90", "90", "2", "24", "–", "no"]
    assert "differ in their number of optimiser steps" in " ".join(tables["training"].notes)


def test_differences_and_what_is_empty(tables):
    first = cells(tables["differences"])[0]
    found = summary(cohort((*RUNS, "mine")))["pix2pix-1.0", "edema"]
    assert (first["run"], first["label"]) == ("pix2pix-1.0", "edema")
    assert first["Dice"].startswith(f"{found['dice_change']:.3f} [")
    assert len(tables["differences"].rows) == 3 * 3  # not of the reference itself
    empty = cells(tables["empty"])[0]
    assert [empty[key] for key in ("one empty", "slices", "with it", "missed", "false")] == [
        "0",
        "120",
        "48",
        "12",
        "24",
    ]
    assert (empty["slice Dice if there"], empty["slice HD95 if in both"]) == ("0.400", "3.00")
    assert "373.13" in " ".join(tables["slices"].notes)


def test_the_preference_is_printed_as_not_measured(tables):
    assert tables["preference"].rows == [["real", "100"], ["SAMR", "72.1"]]
    assert "NOT measured" in tables["preference"].notes[0]


def test_without_a_paper_or_a_reference():
    rows = cohort(("one", "other"), n=2)
    found = augmentation_tables(rows, title="A", labels={"edema": "edema"}, reference="real")
    assert list(found) == ["others", "slices", "empty"]
    assert found["others"].title == "A, volumes"
    assert not [column for table in found.values() for column in table.columns if "paper" in column]
    found = augmentation_tables(rows, title="A", labels=LABELS, reference="one", experiments=EXPERIMENTS, claims=CLAIMS)
    assert not [note for table in found.values() for note in table.notes if "Guo" in note]
    assert list(found) == ["others", "differences", "slices", "slice differences", "empty"]


def test_every_table_fits_a_page_of_200_columns(tables, capsys):
    for table in tables.values():
        table.show()
        body = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        assert len(body) == len(table.rows)  # no cell takes a second line


def test_repeated_runs_have_a_table():
    rows = cohort(("real", "samr-1.0", "samr-1.0#2"), n=3)
    found = augmentation_tables(rows, title="A", labels=LABELS, reference="real", experiments=EXPERIMENTS, paper=PAPER)
    assert [line["run"] for line in cells(found["experiment 1"])[::3]] == ["real", "samr-1.0", "samr-1.0#2"]
    assert [line["label"] for line in cells(found["repeats"])] == [*LABELS, MEAN]
    assert found["repeats"].rows[0][:3] == ["samr-1.0", "edema", "2"]
    assert " ± " in found["repeats"].rows[0][3]
