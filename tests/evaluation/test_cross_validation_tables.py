import numpy as np
import pytest
from scipy import stats

from mrgen.evaluation.cross_validation_tables import (
    SIZES,
    cross_validation_directions,
    cross_validation_sites,
    cross_validation_summary,
    cross_validation_tables,
    recall_by_size,
)
from mrgen.evaluation.statistics import bootstrap_interval, holm
from tests.evaluation.cross_validation_rows import METHODS, PAPER, PLACES, SITES, cohort, lesion

LESIONS = [lesion(f"s{i}", 0.05 * (i + 1), i % 2 == 0, method=name) for i in range(12) for name in METHODS]


def summary(rows, **settings):
    return {line["input"]: line for line in cross_validation_summary(rows, **settings)}


def cells(table):
    return [dict(zip(table.columns, line, strict=True)) for line in table.rows]


def values(rows, name, key):
    return np.array([row[key] for row in rows if row["input"] == name])


def raw_p(rows, name, other, key):
    return stats.wilcoxon(values(rows, name, key), values(rows, other, key)).pvalue


@pytest.fixture(scope="module")
def tables():
    rows = cohort((*METHODS, "upper_bound"))
    return cross_validation_tables(rows, LESIONS, title="WMH", paper=PAPER, notes=["Subjects: all."])


# ----- the numbers -----------------------------------------------------------------------------------------------


def test_means_and_intervals_in_percent_millimetres_and_millilitres():
    rows = [
        {"subject": "a", "fold": 0, "input": "joint", "dsc": 0.5, "fpr": 1.5, "hd95": 10.0, "reference_ml": 2.0},
        {"subject": "b", "fold": 1, "input": "joint", "dsc": 0.8, "fpr": 0.5, "hd95": 30.0, "reference_ml": 4.0},
    ]
    (line,) = cross_validation_summary(rows)
    assert (line["input"], line["n"]) == ("joint", 2)
    assert (line["dsc"], line["fpr"], line["hd95"], line["reference_ml"]) == pytest.approx((65, 100, 20, 3))
    assert (line["dsc_low"], line["dsc_high"]) == bootstrap_interval([50, 80])
    assert not [key for key in line if "avd" in key or "mae" in key or "change" in key or "paper" in key]
    assert (line["dsc_p"], line["fpr_p"]) == (None, None)  # nothing to compare with


def test_segmentation_is_tested_against_the_reference_over_all_methods_and_measures():
    rows = cohort()
    found = summary(rows)
    keys = ("dsc", "fpr", "fnr")
    family = [raw_p(rows, name, "unimodal", key) for name in ("offline", "joint") for key in keys]
    assert [found[name][f"{key}_p"] for name in ("offline", "joint") for key in keys] == pytest.approx(holm(family))
    assert found["joint"]["dsc_p"] == pytest.approx(6 * 2 / 2**12)  # every subject is better: the smallest of 6
    assert found["unimodal"]["dsc_p"] is None
    change = 100 * (values(rows, "joint", "dsc") - values(rows, "unimodal", "dsc"))
    assert found["joint"]["dsc_change"] == pytest.approx(change.mean())
    assert (found["joint"]["dsc_change_low"], found["joint"]["dsc_change_high"]) == pytest.approx(
        bootstrap_interval(change), rel=1e-3
    )


def test_imputation_is_tested_against_offline_in_a_family_of_its_own():
    rows = cohort((*METHODS, "joint#2"))
    found = summary(rows)
    keys = [f"{measure}{end}" for end in ("", "_brain") for measure in ("mae", "psnr", "ssim")]
    family = [raw_p(rows, name, "offline", key) for name in ("joint", "joint#2") for key in keys]
    assert [found[name][f"{key}_p"] for name in ("joint", "joint#2") for key in keys] == pytest.approx(holm(family))
    assert found["joint"]["mae_change"] == pytest.approx(
        (values(rows, "joint", "mae") - values(rows, "offline", "mae")).mean()
    )
    assert (found["offline"]["mae_p"], found["unimodal"]["mae_p"]) == (None, None)
    assert "mae" not in found["unimodal"]
    assert "mae_change" not in found["offline"]


def test_any_method_may_be_the_reference():
    rows = cohort()
    found = summary(rows, reference="offline")
    keys = ("dsc", "fpr", "fnr")
    family = [raw_p(rows, name, "offline", key) for name in ("unimodal", "joint") for key in keys]
    assert [found[name][f"{key}_p"] for name in ("unimodal", "joint") for key in keys] == pytest.approx(holm(family))
    assert found["joint"]["mae_p"] is not None
    missing = summary(rows, reference="ours")
    assert not [key for line in missing.values() for key in line if key in ("dsc_change", "fpr_change")]
    assert {line["dsc_p"] for line in missing.values()} == {None}


def test_methods_of_different_subjects_are_compared_over_those_in_common():
    rows = [row for row in cohort() if not (row["input"] == "joint" and row["fold"] == 0)]
    found = summary(rows)
    assert (found["joint"]["n"], found["unimodal"]["n"]) == (10, 12)
    common = [row for row in rows if row["fold"] != 0]
    change = values(common, "joint", "dsc") - values(common, "unimodal", "dsc")
    assert found["joint"]["dsc_change"] == pytest.approx(100 * change.mean())
    table = cross_validation_tables(rows, [], title="WMH")["segmentation"]
    assert [line["n"] for line in cells(table)] == ["12", "12", "10"]
    assert any("in common" in note for note in table.notes)


def test_the_papers_numbers_are_numbers():
    found = summary(cohort(("joint", "joint#2", "ours"), n=2), paper=PAPER)
    assert (found["joint"]["paper_dsc"], found["joint#2"]["paper_dsc"]) == (57.81, 57.81)
    assert found["joint"]["paper_psnr"] == 11.01
    assert not [key for key in found["ours"] if "paper" in key]


# ----- claims ----------------------------------------------------------------------------------------------------


def test_every_pair_of_a_claim_is_judged_by_means_and_tested():
    rows = cohort()
    lines = cross_validation_directions(rows, paper=PAPER)
    claims = [f"{x['measure']} {x['first']} {x['relation']} {x['second']}" for x in lines]
    assert claims == [
        "dsc joint > unimodal",
        "dsc unimodal > offline",
        "dsc joint > offline",
        "fpr joint < offline",
        "fpr offline < unimodal",
        "fpr joint < unimodal",
        "fnr unimodal < joint",
        "fnr unimodal < offline",
        "mae joint < offline",
        "psnr joint > offline",
    ]
    assert all(line["holds"] for line in lines)
    raw = [raw_p(rows, line["first"], line["second"], line["measure"]) for line in lines]
    assert [line["p"] for line in lines] == pytest.approx(holm(raw))
    first = lines[0]
    assert first["first_mean"] == pytest.approx(100 * values(rows, "joint", "dsc").mean())
    assert first["difference"] == pytest.approx(first["first_mean"] - first["second_mean"])
    assert (first["paper_first"], first["paper_second"]) == (57.81, 55.99)
    for line in lines:  # the paper's own numbers bear its claims out
        above = line["paper_first"] > line["paper_second"]
        assert above == (line["relation"] == ">")


def test_a_claim_that_does_not_hold_and_one_that_cannot_be_judged():
    rows = [
        {"subject": "a", "fold": 0, "input": "joint", "dsc": 0.5, "fpr": 0.5, "fnr": 0.5},
        {"subject": "a", "fold": 0, "input": "unimodal", "dsc": 0.6, "fpr": 0.5, "fnr": 0.4},
        {"subject": "b", "fold": 0, "input": "joint", "dsc": 0.9, "fpr": 0.0, "fnr": 0.0},  # not in common
        {"subject": "c", "fold": 0, "input": "offline", "dsc": 0.9, "fpr": 0.0, "fnr": 0.0},
    ]
    found = {line["measure"]: line for line in cross_validation_directions(rows)}
    assert list(found) == ["dsc", "fpr", "fnr"]
    assert [line["holds"] for line in found.values()] == [False, False, True]  # alike is not lower
    assert (found["dsc"]["n"], found["dsc"]["first_mean"], found["dsc"]["p"]) == (1, 50, None)
    table = cross_validation_tables(rows, [], title="WMH")["directions"]
    assert [line["holds"] for line in cells(table)] == ["no", "no", "yes"]
    assert cells(table)[0]["ours"] == "50.0 / 60.0"
    assert "paper" not in table.columns


# ----- sizes and sites -------------------------------------------------------------------------------------------


def test_lesions_of_all_subjects_are_pooled_by_size():
    found = recall_by_size(
        [
            lesion("a", 0.0199, False),
            lesion("a", 0.02, True, 0.5),
            lesion("b", 0.05, False),
            lesion("b", 0.09, True, 0.7),
            lesion("b", 0.07, True, 0.8),
            lesion("b", 2.5, True, 0.9),
            lesion("b", 2.5, False, method="offline"),
        ]
    )
    assert [(x["size"], x["input"], x["subjects"], x["lesions"]) for x in found] == [
        ("< 0.02", "joint", 1, 1),
        ("0.02–0.1", "joint", 2, 4),
        ("≥ 2.5", "joint", 1, 1),
        ("≥ 2.5", "offline", 1, 1),
    ]
    assert [x["found"] for x in found] == pytest.approx([0, 75, 100, 0])  # 3 of 4 lesions, not the mean of 1/1 and 2/3
    assert found[1]["share"] == pytest.approx(100 * (0.5 + 0 + 0.7 + 0.8) / 4)
    assert np.isnan(found[0]["found_low"])  # one subject


def test_the_interval_of_a_recall_draws_subjects_and_not_lesions():
    """Of one lesion each, the interval of the mean over subjects; of alike lesions in each subject, the same still."""
    hits = [True, False, True, True, False, True, True, False, True, True]
    once = recall_by_size([lesion(str(i), 0.3, hit) for i, hit in enumerate(hits)])[0]
    many = recall_by_size([lesion(str(i), 0.3, hit) for i, hit in enumerate(hits) for _ in range(9)])[0]
    expected = bootstrap_interval([100.0 * hit for hit in hits])
    for line in (once, many):
        assert line["found"] == 70
        assert (line["found_low"], line["found_high"]) == pytest.approx(expected, abs=1e-6)
    alike = recall_by_size([lesion(str(i), 0.3, hit) for i in range(3) for hit in (True, False)])[0]
    assert (alike["found_low"], alike["found_high"]) == (50, 50)


def test_sites_where_there_are_several():
    rows = cohort(("joint", "unimodal"))
    lines = cross_validation_sites(rows)
    assert [(line["site"], line["input"], line["n"]) for line in lines] == [
        (site, name, 4) for site in SITES for name in ("joint", "unimodal")
    ]
    here = [row for row in rows if row["site"] == "Singapore"]
    assert lines[2]["dsc"] == pytest.approx(100 * values(here, "joint", "dsc").mean())
    assert cross_validation_sites([row | {"site": None} for row in rows]) == []
    assert cross_validation_sites([row | {"site": "Utrecht"} for row in rows]) == []
    partly = [row | {"site": None} if row["site"] == "Singapore" else row for row in rows]
    assert {line["site"] for line in cross_validation_sites(partly)} == {"Utrecht", None, "Amsterdam/GE3T"}


# ----- the tables ------------------------------------------------------------------------------------------------


def test_segmentation_stands_beside_the_papers_table(tables):
    unimodal, _, joint, bound = cells(tables["segmentation"])
    found = summary(cohort((*METHODS, "upper_bound")))["joint"]
    assert joint["DSC"] == f"{found['dsc']:.1f} [{found['dsc_low']:.1f}, {found['dsc_high']:.1f}]"
    assert joint["change DSC"] == f"+{found['dsc_change']:.1f}"
    assert joint["p DSC"] == f"{found['dsc_p']:.3f}"
    assert joint["paper DSC / FPR / FNR"] == "57.81 / 58.20 / 41.33"
    assert (unimodal["change DSC"], unimodal["p DSC"], bound["paper DSC / FPR / FNR"]) == ("–", "–", "–")
    text = " ".join(tables["segmentation"].notes)
    for said in ("FP / (TP + FN)", "exceed 100 %", "does not define", "subject being the unit", "label 2", "FPR 100"):
        assert said in text
    assert "Paper: Orbes-Arteaga." in tables["segmentation"].notes
    assert tables["segmentation"].notes[-1] == "Subjects: all."


def test_without_the_reference_there_is_neither_change_nor_p():
    table = cross_validation_tables(cohort(("joint", "offline"), n=2), [], title="WMH")["segmentation"]
    assert list(table.columns) == ["method", "n", "DSC", "FPR", "FNR"]
    assert not any(note.startswith("p:") for note in table.notes)


def test_imputation_stands_beside_the_papers_table(tables):
    table = tables["imputation"]
    offline, _, joint, in_brain = cells(table)
    assert [(line["method"], line["in"]) for line in cells(table)] == [
        (name, where) for name in ("offline", "joint") for where in ("image", "brain")
    ]
    found = summary(cohort((*METHODS, "upper_bound")))["joint"]
    assert joint["MAE"].startswith(f"{found['mae']:.4f} [")
    assert in_brain["PSNR"].startswith(f"{found['psnr_brain']:.2f} [")
    assert joint["PSNR, own range"].startswith(f"{found['psnr_own']:.2f} [")
    assert (joint["paper MAE / PSNR"], in_brain["paper MAE / PSNR"]) == ("0.2566 / 11.01", "–")
    assert (offline["p MAE"], joint["p MAE"]) == ("–", f"{found['mae_p']:.3f}")
    assert "data range 1" in " ".join(table.notes)
    assert "no peak" in " ".join(table.notes)


def test_challenge_places_and_sizes(tables):
    joint = cells(tables["challenge"])[2]
    assert joint["FDR (%)"] == "40.0 [40.0, 40.0]"
    assert joint["HD95 (mm)"].startswith("20.")
    assert "373.13" in " ".join(tables["challenge"].notes)
    places = cells(tables["places"])
    assert [line["place"] for line in places[:3]] == ["periventricular", "cortical", "deep"]
    assert (places[1]["border (ml)"], places[1]["apart (ml)"]) == ("0.300 [0.300, 0.300]", "0.400 [0.400, 0.400]")
    sizes = cells(tables["sizes"])
    assert [line["size (ml)"] for line in sizes] == [size for size in SIZES[1:4] for _ in METHODS]
    # 0.05 ml; 0.1 to 0.45 ml (the tenth, 0.5 ml, begins the next); 0.5 to 0.6 ml
    assert [line["lesions"] for line in sizes[::3]] == ["1", "8", "3"]


def test_only_tables_that_there_are_numbers_for(tables):
    assert list(tables) == ["segmentation", "challenge", "imputation", "places", "sizes", "sites", "directions"]
    row = {"subject": "a", "site": None, "fold": 0, "input": "unimodal", "dsc": 1.0, "fpr": 0.0, "fnr": 0.0}
    found = cross_validation_tables([row], [], title="WMH", paper=PAPER)
    assert list(found) == ["segmentation"]
    assert found["segmentation"].rows == [["unimodal", "1", "100.0", "0.0", "0.0", "55.99 / 78.67 / 38.06"]]
    assert cross_validation_tables([], [], title="WMH") == {}
    ours = cross_validation_tables([row | {"input": "ours"}], [], title="WMH", paper=PAPER)["segmentation"]
    assert not [note for note in ours.notes if note.startswith("Paper")]


def test_every_table_fits_a_page_of_200_columns(tables, capsys):
    for table in tables.values():
        table.show()
        body = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        assert len(body) == len(table.rows)  # no cell takes a second line


def test_places_that_were_not_measured_have_no_line():
    rows = [{key: value for key, value in row.items() if key not in PLACES} for row in cohort(("joint",), n=2)]
    assert "places" not in cross_validation_tables(rows, [], title="WMH")
