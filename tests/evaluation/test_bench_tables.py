"""The bench's lines: one a method, the best first, with the numbers of the judgements that they come from."""

import math

import pytest

from mrgen.evaluation.augmentation_numbers import MEAN, augmentation_summary
from mrgen.evaluation.bench_tables import (
    augmentation_bench,
    augmentation_bench_tables,
    imputation_bench,
    imputation_bench_tables,
)
from mrgen.evaluation.swap_tables import swap_summary
from tests.evaluation.augmentation_rows import LABELS
from tests.evaluation.augmentation_rows import cohort as augmented
from tests.evaluation.translation_rows import REGIONS, by_hand
from tests.evaluation.translation_rows import cohort as translated

NAMES = ("t2/rsnet", "t2/unet", "t2/nothing")  # later ones are worse


def test_methods_stand_from_the_best_to_the_worst_by_all_judges():
    """``rsnet`` leads under the one judge by more than ``unet`` under the other."""
    one, other = translated(NAMES), translated(("t2/unet", "t2/rsnet", "t2/nothing"), seed=1)
    lines = imputation_bench({"snet": one, "deepmedic": other[:]}, regions=REGIONS)
    assert [line["by"] for line in lines][0::3] == ["all real", "nothing"]
    means = [(line["snet_dice_mean"] + line["deepmedic_dice_mean"]) / 2 for line in lines[1:]]
    assert means == sorted(means, reverse=True)


def test_the_numbers_are_those_of_the_swap():
    rows = translated(NAMES)
    lines = {line["by"]: line for line in imputation_bench({"snet": rows}, regions=REGIONS)}
    for found in swap_summary(rows, regions=REGIONS):
        line = lines[found["by"]]
        for key in ("dice_WT", "dice_ET_low", "dice_TC_high"):
            assert line[f"snet_{key}"] == found[key]
        if found["input"] != "real":
            assert line["snet_dice_WT_change"] == found["dice_WT_change"]
            assert line["snet_dice_WT_p"] >= found["dice_WT_p"]  # of a larger family, with the mean of the regions
    means = [line["own_mse_brain"] for line in lines.values() if "own_mse_brain" in line]
    assert len(means) == 3
    assert all(line["own_mse_brain_low"] <= line["own_mse_brain"] <= line["own_mse_brain_high"]
               for line in lines.values() if "own_mse_brain" in line)  # fmt: skip


def test_the_mean_of_the_regions_is_of_each_subject():
    lines = {line["by"]: line for line in imputation_bench({"snet": by_hand()}, regions=REGIONS)}
    assert lines["resnet-100-0"]["snet_dice_mean"] == pytest.approx((70 + 60) / 2)  # the third has no label
    assert lines["resnet-100-0"]["snet_dice_mean_change"] == pytest.approx((-10 + 10) / 2)
    assert lines["all real"]["snet_dice_mean"] == pytest.approx((80 + 50) / 2)
    assert "snet_dice_mean_change" not in lines["all real"]
    assert lines["random"]["snet_dice_mean_p"] is None  # two pairs


def test_the_tables_show_every_method_and_say_what_no_one_measured():
    rows = translated(NAMES)
    judged = {"snet": rows, "deepmedic": rows}
    lines = imputation_bench(judged, regions=REGIONS)
    told = {"judges": list(judged), "regions": REGIONS, "title": "Bench", "subjects": 12, "notes": ["a leak"]}
    glance, errors, *changes = imputation_bench_tables(lines, **told)
    assert [row[0] for row in glance.rows] == ["all real", "rsnet", "unet", "nothing"]
    assert glance.rows[0][1:3] == ["–", "–"]  # the real sequence has no error
    assert glance.rows[3][3].endswith(f"({lines[3]['snet_dice_WT_change']:+.1f})")
    assert glance.notes[-1] == "a leak"
    assert [row[0] for row in errors.rows] == ["rsnet", "unet", "nothing"]
    assert [table.title for table in changes] == [f"Bench, change of Dice, judged by {name}" for name in judged]
    assert [row[0] for row in changes[0].rows] == ["rsnet", "unet", "nothing"]
    assert all(len(row) == len(table.columns) for table in (glance, errors, *changes) for row in table.rows)


def test_repeated_trainings_are_averaged_within_each_patient():
    rows = augmented(("real", "samr-1.0", "samr-1.0#2"))
    for row in rows:  # two patients of one training lie apart, their mean is what the other has
        if row["input"] == "samr-1.0#2":
            row["dice"] += 0.02
    lines = augmentation_bench(rows, labels=list(LABELS), reference="real")
    assert [(line["input"], line["trainings"]) for line in lines] == [("real", 1)] * 3 + [("samr-1.0", 2)] * 3
    alone = {
        (line["input"], line["label"]): line["dice"]
        for line in augmentation_summary(rows, labels=list(LABELS), reference="real")
    }
    for line in lines[3:]:
        both = [alone[name, line["label"]] for name in ("samr-1.0", "samr-1.0#2")]
        assert line["dice"] == pytest.approx(sum(both) / 2)
        assert line["n"] == 12  # patients, not trainings


def test_generators_stand_from_the_best_to_the_worst_behind_the_reference():
    lines = augmentation_bench(augmented(("pix2pix-1.0", "real", "samr-1.0")), labels=list(LABELS), reference="real")
    assert [line["input"] for line in lines if line["label"] == MEAN] == ["real", "samr-1.0", "pix2pix-1.0"]
    glance, change = augmentation_bench_tables(lines, reference="real", title="Bench", notes=["x"])
    assert [row[0] for row in glance.rows] == ["real", "samr-1.0", "pix2pix-1.0"]
    assert [row[0] for row in change.rows] == ["samr-1.0", "pix2pix-1.0"]
    assert all(len(row) == len(table.columns) for table in (glance, change) for row in table.rows)


def test_without_the_reference_there_are_no_changes():
    lines = augmentation_bench(augmented(("pix2pix-1.0", "samr-1.0")), labels=list(LABELS), reference="real")
    assert all(math.isnan(line["dice_change"]) for line in lines)
    (glance,) = augmentation_bench_tables(lines, reference="real", title="Bench")
    assert "(" not in glance.rows[0][-1]
