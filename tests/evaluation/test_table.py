import csv
import math

import pytest

from mrgen.evaluation.table import Table, write_rows

TABLE = Table(
    "Swap of all",
    ["synthesised", "by", "Dice ET"],
    [["–", "all real", "60.0 [50.0, 70.0]"], ["t1", "rsnet#2", "inf [inf, inf]"]],
    ["Mean over 2 subjects.", "Last: [a] :x:"],
)


def test_markdown_is_a_table_with_as_many_cells_in_every_line():
    lines = TABLE.markdown().split("\n")
    assert lines[:2] == ["### Swap of all", ""]
    header, rule, *body = lines[2:6]

    def split(line):
        assert line.startswith("| ")
        assert line.endswith(" |")
        return [cell.strip() for cell in line[1:-1].split("|")]

    assert split(header) == list(TABLE.columns)
    assert split(rule) == ["---"] * 3
    assert [split(line) for line in body] == TABLE.rows
    assert lines[6] == ""  # else the notes would be rows
    assert lines[-2] == "Last: [a] :x:  "


def test_show_prints_every_cell_and_note_as_it_is(capsys):
    TABLE.show()
    shown = capsys.readouterr().out
    for text in ("Swap of all", "rsnet#2", "60.0 [50.0, 70.0]", "inf [inf, inf]", "Mean over 2", "Last: [a] :x:"):
        assert text in shown  # nothing is taken for markup


def test_a_table_wider_than_the_page_loses_no_letter(capsys):
    words = [f"column{i} of many" for i in range(12)]
    Table("Wide", words, [words]).show()
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 200
    assert "…" not in shown
    assert all(shown.count(f"column{i}") >= 2 for i in range(12))


def test_rows_of_a_csv_read_back(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [
        {"subject": "a", "input": "real", "dice_WT": 0.9},
        {"subject": "a", "input": "t1/rsnet", "dice_WT": 1 / 3, "mse_brain": 1.0, "mse_tumour": math.nan},
    ]
    write_rows(path, rows)
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == ["subject", "input", "dice_WT", "mse_brain", "mse_tumour"]
    assert read[0]["mse_brain"] == ""  # real scans have none
    for got, expected in zip(read, rows, strict=True):
        for key, value in expected.items():
            assert got[key] == value if isinstance(value, str) else float(got[key]) == pytest.approx(value, nan_ok=True)


def test_a_csv_of_table_cells_is_utf8_wherever_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    write_rows(tmp_path / "table.csv", [{"by, with": "–", "Dice": "1,5"}])
    assert (tmp_path / "table.csv").read_bytes() == '"by, with",Dice\r\n–,"1,5"\r\n'.encode()


def test_an_empty_table_is_no_error():
    assert Table("Nothing", ["a"]).markdown().startswith("### Nothing\n\n| a |\n| --- |\n")
