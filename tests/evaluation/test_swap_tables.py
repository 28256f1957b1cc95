import math

import numpy as np
import pytest
from scipy import stats

from mrgen.evaluation.statistics import bootstrap_interval, holm
from mrgen.evaluation.swap_tables import swap_pairs, swap_summary, swap_tables

PAPER = {"title": "Table 1", "rows": {"real": [68.2, 87.9, 75.7], "t1/rsnet": [67.6, 87.9, 75.5]}}
ORDER = ("ET", "WT", "TC")  # the paper's; not that of the rows below


def row(subject, name, wt, tc, et, **more):
    filled = {f"{m}_{w}": 0.5 for m in ("mse", "mae", "psnr", "ssim") for w in ("brain", "tumour")}
    return {
        "subject": subject,
        "input": name,
        **{f"dice_{region}": value for region, value in (("WT", wt), ("TC", tc), ("ET", et))},
        **{f"hd95_{region}": 10 * (1 - value) for region, value in (("WT", wt), ("TC", tc), ("ET", et))},
        **({} if name == "real" else filled),
        **more,
    }


ROWS = [
    row("a", "real", 0.9, 0.8, 0.7),
    row("a", "t1/rsnet", 0.8, 0.6, 0.4, mse_brain=1.0, psnr_brain=20.0, ssim_brain=0.9, mse_tumour=math.nan),
    row("a", "t1/rsnet#2", 0.1, 0.2, 0.3),
    row("a", "t1/mean", 0.1, 0.2, 0.3),
    row("b", "real", 0.8, 0.8, 0.5),
    row("b", "t1/rsnet", 0.6, 0.7, 0.5, mse_brain=2.0, psnr_brain=23.0, ssim_brain=0.8, mse_tumour=4.0),
    row("b", "t1/rsnet#2", 0.3, 0.2, 0.1),
    row("b", "t1/mean", 0.3, 0.2, 0.1),
]


def cohort(n=12, names=("t1/rsnet", "t1/rnet", "t2/rnet"), seed=0):
    """``n`` subjects; R-Net is worse than RS-Net by about 0.1 in Dice and 0.2 in MSE."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        base = rng.uniform(0.5, 0.8, size=3)
        rows.append(row(f"s{i}", "real", *base))
        for name in names:
            worse = 0.1 * ("rnet" in name) * rng.uniform(0.5, 1.5, size=3)
            error = 1 + 2 * worse[0] + 0.01 * rng.normal()
            rows.append(row(f"s{i}", name, *(base - worse), mse_tumour=error, mse_brain=error / 2))
    return rows


def cells(table):
    return [dict(zip(table.columns, line, strict=True)) for line in table.rows]


def mean_of(cell):
    return cell.partition(" ")[0]


# ----- the numbers -----------------------------------------------------------------------------------------------


def test_a_line_an_input_set_in_the_order_of_the_rows():
    lines = swap_summary(ROWS, regions=ORDER)
    assert [(line["input"], line["synthesised"], line["by"], line["n"], line["n_tumour"]) for line in lines] == [
        ("real", "–", "all real", 2, None),
        ("t1/rsnet", "t1", "rsnet", 2, 1),  # subject a has no lesion
        ("t1/rsnet#2", "t1", "rsnet#2", 2, 2),
        ("t1/mean", "t1", "mean", 2, 2),
    ]


def test_means_and_intervals_over_subjects():
    real, rsnet, *_ = swap_summary(ROWS, regions=ORDER)
    assert [real[f"dice_{region}"] for region in ORDER] == pytest.approx([60, 85, 80])  # in percent, as the paper's
    assert [real[f"hd95_{region}"] for region in ORDER] == pytest.approx([4, 1.5, 2])
    assert (rsnet["mse_brain"], rsnet["psnr_brain"], rsnet["mse_tumour"]) == (1.5, 21.5, 4.0)
    assert (rsnet["mse_brain_low"], rsnet["mse_brain_high"]) == bootstrap_interval([1.0, 2.0])
    assert (rsnet["dice_ET_low"], rsnet["dice_ET_high"]) == pytest.approx((40, 50))
    assert math.isnan(rsnet["mse_tumour_low"])  # of one subject
    assert not [key for key in real if key.startswith(("mse", "mae", "psnr", "ssim"))]  # real scans have no error
    assert not [key for key in rsnet if key.startswith(("variance", "rank"))]


def test_p_against_the_real_row_is_adjusted_within_dice_and_within_hd95():
    rows = cohort()
    lines = swap_summary(rows, regions=("ET", "WT"))
    assert lines[0]["dice_ET_p"] is None
    for measure in ("dice", "hd95"):
        keys = [(line["input"], f"{measure}_{region}") for line in lines[1:] for region in ("ET", "WT")]
        raw = []
        for name, key in keys:
            x, y = ([r[key] for r in rows if r["input"] == which] for which in (name, "real"))
            raw.append(1.0 if x == y else stats.wilcoxon(x, y).pvalue)
        found = [line[f"{measure}_{region}_p"] for line in lines[1:] for region in ("ET", "WT")]
        assert found == pytest.approx(holm(raw))
        assert len(raw) == 6
    rsnet, rnet, _ = lines[1:]
    assert rsnet["dice_WT_p"] == 1.0  # as good as real
    assert rnet["dice_WT_p"] < 0.01


def test_subjects_are_paired_by_id_and_not_by_place():
    rows = cohort()
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    by_name = {line["input"]: line for line in swap_summary(rows, regions=ORDER)}
    for line in swap_summary(shuffled, regions=ORDER):
        assert line["dice_ET_p"] == by_name[line["input"]]["dice_ET_p"]
        assert line["dice_ET"] == pytest.approx(by_name[line["input"]]["dice_ET"])


def test_the_papers_numbers_stand_beside_ours():
    lines = swap_summary(ROWS, regions=ORDER, paper=PAPER)
    assert [[line[f"paper_{region}"] for region in ORDER] for line in lines] == [
        [68.2, 87.9, 75.7],
        [67.6, 87.9, 75.5],
        [67.6, 87.9, 75.5],  # a second seed of the same method
        [None, None, None],  # the paper has no such row
    ]
    keys = list(lines[0])
    assert keys.index("dice_ET") < keys.index("paper_ET") < keys.index("hd95_ET")
    assert not [key for key in swap_summary(ROWS, regions=ORDER)[0] if "paper" in key]


def test_the_change_from_the_real_row_is_paired():
    """Whether a synthesis stays within some points of the real sequence is a question about differences."""
    summary = swap_summary(ROWS, regions=ORDER)
    real, made = ({r["subject"]: r["dice_WT"] for r in ROWS if r["input"] == name} for name in ("real", "t1/rsnet"))
    differences = [100 * (made[subject] - real[subject]) for subject in made]
    assert summary[1]["dice_WT_change"] == pytest.approx(np.mean(differences))
    assert (summary[1]["dice_WT_change_low"], summary[1]["dice_WT_change_high"]) == bootstrap_interval(differences)
    assert "dice_WT_change" not in summary[0]
    shown = cells(swap_tables(ROWS, regions=ORDER, title="")["change"])
    assert [line["by"] for line in shown] == ["rsnet", "rsnet#2", "mean"]  # nothing changes in the real row
    assert mean_of(shown[0]["WT"]) == f"{np.mean(differences):.1f}"


def test_variance_and_rank_correlation_where_there_are():
    rows = [line | {"variance_brain": 0.2, "variance_tumour": math.nan, "rank_correlation": 0.4}
            if line["input"] == "t1/rsnet" else line for line in ROWS]  # fmt: skip
    _, rsnet, again, _ = swap_summary(rows, regions=ORDER)
    assert (rsnet["variance_brain"], rsnet["rank_correlation"]) == pytest.approx((0.2, 0.4))
    assert math.isnan(rsnet["variance_tumour"])
    assert "variance_brain" not in again
    synthesis = cells(swap_tables(rows, regions=ORDER, title="")["synthesis"])
    assert [(line["by"], line["in"], line["variance"], line["rank correlation"]) for line in synthesis[:3]] == [
        ("rsnet", "brain", "0.2000 [0.2000, 0.2000]", "0.400 [0.400, 0.400]"),
        ("rsnet", "tumour", "–", "–"),
        ("rsnet#2", "brain", "–", "–"),
    ]


# ----- methods of one target -------------------------------------------------------------------------------------


def test_every_two_methods_of_a_target_against_each_other():
    rows = cohort(names=("t1/rsnet", "t1/rnet", "t1/rnet#2", "t2/rnet"))
    pairs = swap_pairs(rows)
    assert [(pair["synthesised"], pair["by"], pair["minus"], pair["n"]) for pair in pairs] == [
        ("t1", "rnet", "rsnet", 12), ("t1", "rnet#2", "rsnet", 12), ("t1", "rnet#2", "rnet", 12)  # t2 has one method
    ]  # fmt: skip
    of = {name: np.array([r["mse_tumour"] for r in rows if r["input"] == name]) for name in ("t1/rsnet", "t1/rnet")}
    differences = of["t1/rnet"] - of["t1/rsnet"]
    assert pairs[0]["mse_tumour"] == pytest.approx(differences.mean())
    assert pairs[0]["mse_tumour"] > 0.1  # R-Net's error is the larger one
    assert (pairs[0]["mse_tumour_low"], pairs[0]["mse_tumour_high"]) == bootstrap_interval(differences)
    assert pairs[0]["mse_tumour_p"] == pytest.approx(3 * 2 / 2**12)  # the smallest there is, and three pairs
    table = swap_tables(rows, regions=ORDER, title="Swap")["pairs"]
    assert [line["difference"] for line in cells(table)] == ["rnet − rsnet", "rnet#2 − rsnet", "rnet#2 − rnet"]
    assert cells(table)[0]["p"] == "0.001"


def test_a_pair_takes_the_subjects_that_have_a_lesion():
    rows = cohort()
    for line in rows:
        if line["subject"] in ("s3", "s5") and line["input"] != "real":
            line["mse_tumour"] = math.nan
    assert swap_pairs(rows)[0]["n"] == 10
    none = [line | ({"mse_tumour": math.nan} if line["input"] != "real" else {}) for line in rows]
    (pair,) = swap_pairs(none)
    assert (pair["n"], pair["mse_tumour_p"]) == (0, None)
    assert cells(swap_tables(none, regions=ORDER, title="")["pairs"])[0]["MSE tumour"] == "–"


def test_no_table_of_pairs_without_pairs():
    rows = cohort(names=("t1/rsnet", "t2/rsnet"))
    assert swap_pairs(rows) == []
    assert list(swap_tables(rows, regions=ORDER, title="")) == ["dice", "change", "hd95", "synthesis"]


# ----- the tables ------------------------------------------------------------------------------------------------


def test_dice_with_its_interval_p_and_the_papers():
    table = swap_tables(cohort(), regions=ORDER, title="Swap", paper=PAPER)["dice"]
    assert table.title == "Swap, Dice"
    assert table.columns == [
        "synthesised", "by", "Dice ET", "Dice WT", "Dice TC", "p ET", "p WT", "p TC", "paper ET", "paper WT", "paper TC"
    ]  # fmt: skip
    summary = swap_summary(cohort(), regions=ORDER)
    real, rsnet, rnet, other = cells(table)
    assert [line[:2] for line in table.rows] == [["–", "all real"], ["t1", "rsnet"], ["t1", "rnet"], ["t2", "rnet"]]
    mean, low, high = (summary[2][f"dice_ET{end}"] for end in ("", "_low", "_high"))
    assert rnet["Dice ET"] == f"{mean:.1f} [{low:.1f}, {high:.1f}]"
    assert (real["p ET"], rsnet["p ET"]) == ("–", "1.000")
    assert rnet["p ET"] == f"{summary[2]['dice_ET_p']:.3f}"
    assert (real["paper TC"], rsnet["paper ET"], other["paper WT"]) == ("75.7", "67.6", "–")


def test_hd95_has_a_table_of_its_own():
    table = swap_tables(cohort(), regions=["WT"], title="Swap", paper=PAPER | {"rows": {}})["hd95"]
    assert table.columns == ["synthesised", "by", "HD95 WT", "p WT"]
    (summary, *_) = swap_summary(cohort(), regions=["WT"])
    assert mean_of(cells(table)[0]["HD95 WT"]) == f"{summary['hd95_WT']:.1f}"
    assert any("373.13" in note for note in table.notes)


def test_a_synthesis_is_measured_in_brain_and_tumour():
    table = swap_tables(ROWS, regions=ORDER, title="Swap")["synthesis"]
    assert table.columns == ["synthesised", "by", "in", "n", "MSE", "MAE", "PSNR", "SSIM"]
    brain, tumour, *_ = cells(table)
    assert (brain["in"], brain["n"], tumour["in"], tumour["n"]) == ("brain", "2", "tumour", "1")
    assert [mean_of(brain[key]) for key in ("MSE", "PSNR", "SSIM")] == ["1.500", "21.5", "0.850"]
    assert tumour["MSE"] == "4.000"  # of one subject, so without an interval
    assert not [line for line in table.rows if line[1] == "all real"]


def test_few_subjects_have_no_p_and_one_has_no_interval():
    two, one = (swap_tables(rows, regions=["WT"], title="") for rows in (ROWS, ROWS[:4]))
    assert {line["p WT"] for name in ("dice", "hd95") for line in cells(two[name])} == {"–"}
    assert cells(two["dice"])[0]["Dice WT"] == "85.0 [80.0, 90.0]"
    assert cells(one["dice"])[0]["Dice WT"] == "90.0"
    assert all("[" not in cell for table in one.values() for line in table.rows for cell in line)


def test_a_perfect_synthesis_has_an_infinite_psnr(recwarn):
    rows = [line | ({} if line["input"] == "real" else {"psnr_brain": math.inf}) for line in ROWS]
    rows[1]["psnr_brain"] = 20.0
    rsnet, _, again, *_ = cells(swap_tables(rows, regions=["WT"], title="")["synthesis"])
    assert (rsnet["PSNR"], again["PSNR"]) == ("inf", "inf [inf, inf]")
    assert not recwarn.list


def test_notes_say_on_whom_and_by_which_rule():
    tables = swap_tables(ROWS, regions=ORDER, title="Swap", paper=PAPER, notes=["Subjects: the test part."])
    for name in ("dice", "hd95"):
        notes = "\n".join(tables[name].notes)
        assert notes.startswith("Mean over 2 subjects; in brackets its 95% bootstrap interval")
        assert "a region empty in both maps" in notes
        assert "Wilcoxon signed-rank test against the real row" in notes
        assert "Holm-adjusted over all p of this table; – below 6 subjects." in notes
    assert "Paper: Table 1." in tables["dice"].notes
    assert tables["dice"].notes[-1] == "Subjects: the test part."
    assert not [note for name in ("hd95", "synthesis") for note in tables[name].notes if "Paper" in note]
    assert swap_tables(ROWS[:2], regions=ORDER, title="")["dice"].notes[0].startswith("Mean over 1 subject;")


def test_every_table_fits_a_page_of_200_columns(capsys):
    names = [
        f"{target}/{method}" for target in ("t1", "t1ce", "t2", "flair") for method in ("rsnet", "brainclustering")
    ]
    rows = [line | {"variance_brain": 0.01, "variance_tumour": 0.02, "rank_correlation": 0.3}
            if line["input"] != "real" else line for line in cohort(names=names)]  # fmt: skip
    for table in swap_tables(rows, regions=ORDER, title="Swap", paper=PAPER).values():
        table.show()
        shown = capsys.readouterr().out.splitlines()
        assert max(len(line) for line in shown) <= 200
        body = [line for line in shown if line.startswith("│")]
        assert len(body) == len(table.rows)  # no cell takes a second line
        for line, cells_of_it in zip(body, table.rows, strict=True):
            assert [cell.strip() for cell in line.strip("│").split("│")] == cells_of_it
