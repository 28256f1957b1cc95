import csv
import math

import pytest

from mrgen.evaluation.swap import swap_table
from mrgen.evaluation.table import Table, write_rows

PAPER = {"title": "Table 1", "rows": {"real": [68.2, 87.9, 75.7], "t1/rsnet": [67.6, 87.9, 75.5]}}
ORDER = ("ET", "WT", "TC")  # the paper's; not that of the rows below


def row(subject, name, wt, tc, et, **quality):
    filled = {f"{m}_{w}": 0.5 for m in ("mse", "psnr", "ssim") for w in ("brain", "tumour")} | quality
    return {
        "subject": subject,
        "input": name,
        "dice_WT": wt,
        "dice_TC": tc,
        "dice_ET": et,
        **({} if name == "real" else filled),
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


def cells(table):
    return [dict(zip(table.columns, line, strict=True)) for line in table.rows]


def test_means_over_subjects_in_percent():
    real, rsnet, *_ = cells(swap_table(ROWS, regions=ORDER, title="Swap", paper=PAPER))
    assert (real["Dice ET"], real["Dice WT"], real["Dice TC"]) == ("60.0", "85.0", "80.0")
    assert (rsnet["Dice ET"], rsnet["Dice WT"], rsnet["Dice TC"]) == ("45.0", "70.0", "65.0")
    assert (rsnet["MSE brain"], rsnet["PSNR brain"], rsnet["SSIM brain"]) == ("1.500", "21.5", "0.850")
    assert rsnet["MSE tumour"] == "4.000"  # subject a has no lesion


def test_columns_in_the_papers_order_beside_its_numbers():
    table = swap_table(ROWS, regions=ORDER, title="Swap", paper=PAPER)
    assert table.columns[:8] == [
        "synthesised", "by", "Dice ET", "Dice WT", "Dice TC", "paper ET", "paper WT", "paper TC"
    ]  # fmt: skip
    assert [line[:2] for line in table.rows] == [["–", "all real"], ["t1", "rsnet"], ["t1", "rsnet#2"], ["t1", "mean"]]
    papers = [line[5:8] for line in table.rows]
    assert papers[0] == ["68.2", "87.9", "75.7"]
    assert papers[1] == ["67.6", "87.9", "75.5"]
    assert papers[2] == papers[1]  # a second seed of the same method
    assert papers[3] == ["–", "–", "–"]  # the paper has no such row


def test_real_scans_have_no_error():
    real = cells(swap_table(ROWS, regions=ORDER, title="Swap"))[0]
    assert {value for name, value in real.items() if name.startswith(("MSE", "PSNR", "SSIM"))} == {"–"}


def test_without_a_paper_there_are_no_columns_for_it():
    table = swap_table(ROWS, regions=["WT"], title="Swap")
    assert table.columns[:3] == ["synthesised", "by", "Dice WT"]
    assert not [column for column in table.columns if "paper" in column]
    assert not [note for note in table.notes if "Paper" in note]


def test_notes_say_on_whom_and_by_which_rule():
    table = swap_table(ROWS, regions=ORDER, title="Swap", paper=PAPER, notes=["Subjects: the test part."])
    assert table.notes[0].startswith("Mean over 2 subjects. Dice in %; a region empty in both maps scores 100")
    assert "Paper: Table 1." in table.notes
    assert table.notes[-1] == "Subjects: the test part."
    assert swap_table(ROWS[:2], regions=ORDER, title="").notes[0].startswith("Mean over 1 subject. ")


def test_markdown_is_a_table_with_as_many_cells_in_every_line():
    table = swap_table(ROWS, regions=ORDER, title="Swap", paper=PAPER, notes=["Last."])
    lines = table.markdown().split("\n")
    assert lines[:2] == ["### Swap", ""]
    header, rule, *body = lines[2 : 4 + len(table.rows)]

    def split(line):
        assert line.startswith("| ")
        assert line.endswith(" |")
        return [cell.strip() for cell in line[1:-1].split("|")]

    assert split(header) == list(table.columns)
    assert split(rule) == ["---"] * len(table.columns)
    assert [split(line) for line in body] == table.rows
    assert lines[4 + len(table.rows)] == ""  # else the notes would be rows
    assert lines[-2] == "Last.  "


def test_rows_of_a_csv_read_back(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, ROWS)
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0])[:5] == ["subject", "input", "dice_WT", "dice_TC", "dice_ET"]
    assert read[0]["mse_brain"] == ""  # real scans have none
    for got, expected in zip(read, ROWS, strict=True):
        for key, value in expected.items():
            assert got[key] == value if isinstance(value, str) else float(got[key]) == pytest.approx(value, nan_ok=True)


def test_a_csv_of_table_cells_is_utf8_wherever_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    write_rows(tmp_path / "table.csv", [{"by, with": "–", "Dice": "1,5"}])
    assert (tmp_path / "table.csv").read_bytes() == '"by, with",Dice\r\n–,"1,5"\r\n'.encode()


def test_show_prints_every_cell_and_note(capsys):
    swap_table(ROWS, regions=ORDER, title="Swap of all", paper=PAPER, notes=["Last."]).show()
    shown = capsys.readouterr().out
    for text in ("Swap of all", "rsnet#2", "45.0", "67.6", "Last."):
        assert text in shown


def test_an_empty_table_is_no_error():
    assert Table("Nothing", ["a"]).markdown().startswith("### Nothing\n\n| a |\n| --- |\n")
