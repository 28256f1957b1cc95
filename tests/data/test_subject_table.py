"""Grades and sites are read from the table however it was saved, or it is said that they are lost."""

import os

import pytest
from raw_scans import LAYOUTS, write_brats_case

from mrgen.data.cohorts import find_subjects
from mrgen.data.layouts import read_layouts

LAYOUT = read_layouts(LAYOUTS)["brats2020"]
COLUMNS = ("Grade", "BraTS_2017_subject_ID", "BraTS_2019_subject_ID", "BraTS_2020_subject_ID")
ROWS = [("HGG", "NA", "BraTS19_CBICA_AAB_1", "BraTS20_Training_001"), ("LGG", "", "NA", "BraTS20_Training_002")]


@pytest.fixture
def root(tmp_path):
    for number in (1, 2):
        write_brats_case(tmp_path / f"BraTS20_Training_00{number}")
    return tmp_path


def fields(root):
    subjects, problems = find_subjects(LAYOUT, root)
    return [(s.grade, s.site) for s in subjects], problems


def table(delimiter=",", end="\n", quote="", blank=""):
    return end.join(delimiter.join(f"{blank}{quote}{cell}{quote}{blank}" for cell in row) for row in (COLUMNS, *ROWS))


@pytest.mark.parametrize(
    "content",
    [
        table().encode(),
        table(";").encode(),
        table("\t").encode(),
        table("|").encode(),
        table(end="\r\n").encode("utf-8-sig"),
        table(end="\r").encode(),
        table(";", "\r\n").encode("utf-16"),
        table("\t").encode("utf-16-le"),
        table().encode("utf-16-be"),
        table(quote='"').encode(),
        table(";", quote='"', blank=" ").encode(),
        table(blank="  ").encode(),
        table(blank="\u00a0").encode("latin-1"),
        ("sep=;\r\n" + table(";", "\r\n")).encode(),
        ("\n\n" + table() + "\n\n\n").encode(),
        table().replace("Grade", "grade ").replace("BraTS_2019_subject_ID", "BRATS_2019_SUBJECT_ID").encode(),
        table().replace("BraTS20_Training_001", "\u200bBraTS20_Training_001\ufeff").replace("LGG", "lgg").encode(),
        table().replace("NA,BraTS19", "M\xfcnchen,BraTS19").encode("cp1252"),
    ],
)
def test_however_a_spreadsheet_saves_the_table_it_says_the_same(root, content):
    (root / "name_mapping.csv").write_bytes(content)
    assert fields(root) == ([("HGG", "CBICA"), ("LGG", None)], [])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found the columns , expected BraTS_2020_subject_ID"),
        (b"\0\0\0\0abc", "is no table"),
        (table().replace("_1,BraTS20", "_1\0,BraTS20").encode(), "is no table (it holds NUL bytes)"),
        (table().replace("BraTS_2020_subject_ID", "ID").encode(), "found the columns grade, brats_2017_subject_id"),
        (table().replace("BraTS20_Training_0", "BraTS21_Training_0").encode(), "found BraTS21_Training_001, BraTS21"),
        (table().replace("HGG,", "HGG,,").encode(), "is no table (5 cells in line 2, where the header has 4)"),
        (table().replace("HGG,", "").encode(), "is no table (3 cells in line 2, where the header has 4)"),
        (table().replace("BraTS_2017_subject_ID", "grade").encode(), "is no table (the column grade twice)"),
        (
            (table() + "\n" + "LGG,,," + ROWS[0][3]).encode(),
            "found LGG for BraTS20_Training_001 in grade, where another",
        ),
        (table().replace("HGG", '"HGG').encode(), "is no table (a quotation mark is not closed)"),
        ((",".join(COLUMNS) + "\n" + "x" * 200_000).encode(), "is no table"),
    ],
)
def test_a_table_that_cannot_be_used_is_a_problem_and_ends_nothing(root, content, found):
    (root / "name_mapping.csv").write_bytes(content)
    got, (problem,) = fields(root)
    assert len(got) == 2
    assert found in str(problem)
    assert str(problem).startswith(f"table: {root}/name_mapping.csv: ")
    assert not problem.of_subject


@pytest.mark.parametrize("name", ["Name_Mapping.csv", "NAME_MAPPING.CSV", "name_mapping.tsv", "name_mapping_2.csv"])
def test_a_table_is_found_however_its_name_is_written(root, name):
    (root / name).write_text(table())
    assert fields(root) == ([("HGG", "CBICA"), ("LGG", None)], [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "found no such table, so Grade and BraTS_2019_subject_ID of the subjects are not known"),
        (table().replace("LGG", ""), "found no row or no Grade for 1 of 2 subjects (BraTS20_Training_002)"),
        (table().rpartition("\n")[0], "found no row or no Grade for 1 of 2 subjects (BraTS20_Training_002)"),
        (table().replace("Grade", "Degree"), "found the columns degree, brats_2017_subject_id"),
    ],
)
def test_grades_that_no_table_tells_are_a_note(root, content, said):
    """A validation set's table has no grades, and its sites are read all the same."""
    if content:
        (root / "name_mapping.csv").write_text(content)
    got, (note,) = fields(root)
    assert (note.kind, note.of_subject) == ("note", False)
    assert said in str(note)
    assert got[0][1] == ("CBICA" if content else None)


def test_what_is_no_file_ends_nothing(root):
    os.mkfifo(root / "name_mapping.csv")
    (root / "name_mapping_2.csv").symlink_to("nowhere")
    (root / "name_mapping_3.csv").mkdir()
    got, problems = fields(root)
    assert len(got) == 2
    assert [problem.message.split("; ")[0] for problem in problems] == [
        "cannot be read (a pipe or a device)",
        "cannot be read (No such file or directory)",
        "cannot be read (a folder)",
    ]


def test_tables_complete_one_another_and_may_not_contradict(root):
    """Of the first, no row is of a subject below the root when it is of another part of the challenge."""
    lines = table().splitlines()
    (root / "name_mapping.csv").write_text("\n".join(lines[:2]))
    (root / "name_mapping_more.csv").write_text("\n".join([lines[0], lines[2]]))
    assert fields(root) == ([("HGG", "CBICA"), ("LGG", None)], [])
    (root / "name_mapping_more.csv").write_text("\n".join([lines[0], lines[1].replace("HGG", "LGG"), lines[2]]))
    got, (problem,) = fields(root)
    assert got == [("HGG", "CBICA"), ("LGG", None)]
    assert "found LGG for BraTS20_Training_001 in grade, where another row says HGG" in str(problem)
