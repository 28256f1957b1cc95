import math

import numpy as np
import pytest
import yaml
from scipy import stats

from mrgen.evaluation.statistics import bootstrap_interval, holm
from mrgen.evaluation.translation_tables import region_means, translation_summary, translation_tables
from mrgen.launch.paths import CONF_DIR
from tests.evaluation.translation_rows import REGIONS, by_hand, cohort, overlap

PAPER = {
    "title": "Baldini",
    "rows": {
        "real": {"dice": {"one": 0.748, "both": 0.774}},
        "t2/random": {"own_mse_brain": {"one": 0.37}, "dice_change": {"one": [-0.0267, 0.0839]}},
        "t2/resnet-100-0": {
            "dice": {"one": 0.744, "two": 0.807},
            "dice_change": {"one": [-0.0038, 0.0561], "two": [-0.0268, 0.0757]},
            "hd95_mean_change": {"one": [-0.7786, 7.4124]},
        },
    },
    "notes": {"agreement": ["Best .858."]},
}


def cells(table):
    return [dict(zip(table.columns, line, strict=True)) for line in table.rows]


def mean_of(cell):
    return cell.partition(" ")[0]


def summary(rows, **settings):
    return {line["input"]: line for line in translation_summary(rows, regions=REGIONS, **settings)}


def tables(rows, **settings):
    return translation_tables(rows, regions=REGIONS, title="T1 to T2", **settings)


# ----- the numbers -----------------------------------------------------------------------------------------------


def test_three_regions_are_averaged_in_each_subject():
    rows = by_hand()
    means = region_means(rows, regions=REGIONS)
    assert means[0]["dice"] == pytest.approx(0.8)
    assert (means[1]["hd95_mean"], means[1]["hd95"], means[1]["agree_dice"]) == pytest.approx((5, 7, 0.9))
    assert "dice" not in means[6]  # an unlabelled subject
    assert "dice" not in rows[0]  # they are copies
    assert "dice" not in region_means([{"dice_WT": 1.0, "dice_TC": 1.0}], regions=REGIONS)[0]  # not all regions
    holed = overlap((1, math.nan, 1), (0, 0, 0), (0, 0, 0))
    assert math.isnan(region_means([holed], regions=REGIONS)[0]["dice"])


def test_a_line_a_method_with_means_spreads_medians_and_counts():
    found = summary(by_hand())
    assert list(found) == ["real", "t2/resnet-100-0", "t2/random"]
    real, resnet, _ = found.values()
    assert (real["synthesised"], real["by"], real["n"], real["dice_n"]) == ("–", "all real", 3, 2)
    assert (resnet["synthesised"], resnet["by"]) == ("t2", "resnet-100-0")
    assert not [key for key in real if "mse" in key or "agree" in key or "change" in key]
    brain = [0.02, 0.04, 0.09]
    assert resnet["own_mse_brain"] == pytest.approx(0.05)
    assert resnet["own_mse_brain_sd"] == pytest.approx(np.std(brain, ddof=1))
    assert resnet["own_mse_brain_median"] == pytest.approx(0.04)
    assert (resnet["own_mse_brain_low"], resnet["own_mse_brain_high"]) == bootstrap_interval(brain)
    assert (resnet["own_mse_tumour"], resnet["own_mse_tumour_n"]) == (pytest.approx(0.03), 2)  # c has no lesion
    assert resnet["unit_mse_brain"] == pytest.approx(0.3)
    assert (resnet["dice"], resnet["hd95_mean"], resnet["hd95"]) == pytest.approx((0.65, 5, 6.5))
    assert (resnet["dice_WT"], resnet["hd95_mean_ET"]) == pytest.approx((0.75, 5.5))
    assert (resnet["agree_dice"], resnet["agree_dice_n"]) == (pytest.approx((0.9 + 0.5 + 1) / 3), 3)


def test_the_change_is_paired_and_negative_where_worse():
    resnet, random = (summary(by_hand())[name] for name in ("t2/resnet-100-0", "t2/random"))
    # a: Dice .7 for .8 and 5 mm for 3; b: .6 for .5 and 5 mm for 7.
    assert resnet["dice_change"] == pytest.approx(0, abs=1e-12)
    assert resnet["dice_change_sd"] == pytest.approx(np.std([-0.1, 0.1], ddof=1))
    assert resnet["hd95_mean_change"] == pytest.approx(0, abs=1e-12)
    assert random["dice_change"] == pytest.approx(-0.3)  # a: .2 for .8, b: the same
    assert random["hd95_mean_change"] == pytest.approx(-3)  # a: 9 mm for 3
    assert (random["dice_change_n"], random["dice_change_p"]) == (2, None)  # of two subjects no test


def test_p_of_the_change_is_wilcoxons_adjusted_over_both_columns():
    names = ("t2/resnet-100-0", "t2/unet-100-0", "t2/complementary")
    rows = region_means(cohort(names), regions=REGIONS)
    raw = []
    for key in ("dice", "hd95_mean"):
        real = [row[key] for row in rows if row["input"] == "real"]
        for name in names:
            made = [row[key] for row in rows if row["input"] == name]
            raw.append(1.0 if made == real else stats.wilcoxon(made, real).pvalue)
    found = summary(rows)
    assert [found[name][f"{key}_change_p"] for key in ("dice", "hd95_mean") for name in names] == pytest.approx(
        holm(raw)
    )
    assert found["t2/resnet-100-0"]["dice_change_p"] == 1  # as good as real
    assert found["t2/complementary"]["dice_change_p"] == pytest.approx(6 * 2 / 2**12, rel=1e-6)  # first of six


def test_a_family_of_tests_survives_a_missing_column():
    rows = [{k: v for k, v in row.items() if "hd95" not in k} for row in cohort(("t2/a", "t2/b"))]
    line = summary(rows)["t2/b"]
    assert line["dice_change_p"] == pytest.approx(2 * 2 / 2**12)
    assert line["hd95_mean_change_p"] is None
    assert cells(tables(rows)["change"])[1]["HD95, mean"] == "–"


def test_the_papers_numbers_are_numbers():
    found = summary(by_hand() + [row | {"input": "t2/random#2"} for row in by_hand()[2:3]], paper=PAPER)
    assert found["real"]["paper_dice_both"] == 0.774
    assert found["t2/random"]["paper_own_mse_brain_one"] == 0.37
    assert found["t2/resnet-100-0"]["paper_dice_change_two_sd"] == 0.0757
    assert found["t2/random#2"]["paper_own_mse_brain_one"] == 0.37  # a second seed of the same method
    assert not [key for line in summary(by_hand()).values() for key in line if "paper" in key]


# ----- the tables ------------------------------------------------------------------------------------------------


def test_errors_in_brain_and_tumour():
    table = tables(by_hand(), paper=PAPER)["mse"]
    assert [line[1:4] for line in table.rows] == [
        ["resnet-100-0", "brain", "3"],
        ["resnet-100-0", "tumour", "2"],
        ["random", "brain", "3"],
        ["random", "tumour", "2"],
    ]
    brain, tumour, random, _ = cells(table)
    assert mean_of(brain["own scaling"]) == "0.0500"
    assert (brain["own scaling, sd"], brain["own scaling, median"]) == (
        f"{np.std([2, 4, 9], ddof=1) / 100:.4f}",
        "0.0400",
    )
    assert (brain["as made"], random["as made"]) == ("0.3000", "–")
    assert tumour["as made, median"] == "0.4000"
    assert [line["paper: one"] for line in cells(table)] == ["–", "–", "0.37", "–"]
    assert not [column for column in tables(by_hand()[2:3])["mse"].columns if "as made" in column]


def test_overlap_is_the_mean_of_the_regions_beside_the_papers():
    real, resnet, random = cells(tables(by_hand(), paper=PAPER)["overlap"])
    assert (real["by"], real["n"], mean_of(real["Dice"])) == ("all real", "2", "0.650")
    assert (resnet["HD95, mean"], resnet["HD95, maximum"]) == ("5.000", "6.500")
    papers = [line["paper Dice: one / both / two"] for line in (real, resnet, random)]
    assert papers == ["0.748 / 0.774 / –", "0.744 / – / 0.807", "–"]


def test_the_change_stands_as_in_the_papers_table():
    resnet, random = cells(tables(by_hand(), paper=PAPER)["change"])
    assert random["Dice"] == f"-0.3000 ± {np.std([-0.6, 0], ddof=1):.4f}"
    assert random["HD95, mean"] == f"-3.0000 ± {np.std([-6, 0], ddof=1):.4f}"
    assert (random["p Dice"], random["n"]) == ("–", "2")
    assert resnet["paper Dice: one / two"] == "-0.0038 ± 0.0561 / -0.0268 ± 0.0757"
    assert (resnet["paper HD95, mean: one"], random["paper HD95, mean: one"]) == ("-0.7786 ± 7.4124", "–")
    better = tables(cohort(("t2/x", "t2/y")))["change"].rows[0]
    assert better[3].startswith(("+", "-"))
    alone = tables(by_hand()[:3])["change"]
    assert cells(alone)[0]["Dice"] == "-0.1000"  # one subject has no spread


def test_regions_and_agreement():
    found = tables(by_hand(), paper=PAPER)
    real, *_ = cells(found["regions"])
    assert (real["Dice WT"], real["HD95, mean ET"], real["HD95, maximum TC"]) == ("0.750", "6.500", "6.000")
    assert real["n"] == "2"
    (resnet,) = cells(found["agreement"])  # neither the real row nor what was not measured
    assert (resnet["by"], resnet["n"], mean_of(resnet["Dice"])) == ("resnet-100-0", "3", "0.800")
    assert "Best .858." in found["agreement"].notes


def test_only_tables_that_rows_have_numbers_for():
    assert list(tables(cohort(("t2/a",)))) == ["mse", "overlap", "change", "regions", "agreement"]
    without_segmenter = tables(cohort(("t2/a",), segmenter=False), paper=PAPER, notes=["Subjects: test."])
    assert list(without_segmenter) == ["mse"]
    assert without_segmenter["mse"].notes[-1] == "Subjects: test."
    unlabelled = [{k: v for k, v in row.items() if k[:4] not in ("dice", "hd95")} for row in cohort(("t2/a",))]
    assert list(tables(unlabelled)) == ["mse", "agreement"]
    nothing = [{"subject": "a", "input": "t2/a", "own_mse_brain": math.nan}]
    assert tables(nothing) == {}


def test_the_rule_of_empty_regions_stands_under_every_table_of_hd95():
    found = tables(by_hand(), paper=PAPER, notes=["Subjects: test."])
    for name, table in found.items():
        assert any("373.13" in note for note in table.notes) == any("HD95" in column for column in table.columns), name
        assert ("Subjects: test." in table.notes) == (name == "mse")
    assert "Paper: Baldini." not in found["regions"].notes


def test_the_preset_prints_all_that_the_paper_stated():
    evaluation = yaml.safe_load((CONF_DIR / "experiment/t1_to_t2/swap.yaml").read_text())["evaluation"]
    names = [name for name in evaluation["paper"]["rows"] if name != "real"]
    assert len(names) == 8
    found = tables(cohort(names), paper=evaluation["paper"])
    change = {line["by"]: line for line in cells(found["change"])}
    assert change["search10-5"]["paper Dice: testBraTS / testOUR"] == "-0.0097 ± 0.1002 / -0.0920 ± 0.1862"
    assert change["unet-500-1000"]["paper HD95, mean: testBraTS / testOUR"] == "+0.0282 ± 4.4942 / -7.1382 ± 10.5381"
    over = {line["by"]: line for line in cells(found["overlap"])}
    assert over["search10-5"]["paper HD95, mean: testBraTS / testOUR / both"] == "8.021 / 12.047 / 9.229"
    # The changes are those of the means, to the digits that were printed.
    rows = evaluation["paper"]["rows"]
    for name in ("t2/resnet-100-0", "t2/search10-5"):
        for where in ("testBraTS", "testOUR"):
            difference = rows[name]["dice"][where] - rows["real"]["dice"][where]
            assert rows[name]["dice_change"][where][0] == pytest.approx(difference, abs=0.001)
    assert {"mse", "overlap", "change", "agreement"} == set(evaluation["paper"]["notes"])


def test_every_table_fits_a_page_of_200_columns(capsys):
    evaluation = yaml.safe_load((CONF_DIR / "experiment/t1_to_t2/swap.yaml").read_text())["evaluation"]
    names = ["t2/conditional_mean-5", *(name for name in evaluation["paper"]["rows"] if name != "real")]
    for table in tables(cohort(names), paper=evaluation["paper"]).values():
        table.show()
        body = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        assert len(body) == len(table.rows)  # no cell takes a second line
