"""The blind sheet tells nothing, its key tells which is which, and answers are counted by hand."""

import base64
import csv
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import norm

from mrgen.errors import UserError
from mrgen.evaluation.blind_sheet import (
    BlindItem,
    preference_table,
    read_answers,
    read_key,
    score,
    write_blind_sheet,
)

METHODS = {"real": 0.8, "samr": 0.2, "no_atlas": -0.2, "pix2pixhd": -0.6}  # by grey, so that pictures can be told
DESCRIBED = {"modalities": ("t1", "apt"), "classes": ("background", "edema")}


def item(i):
    brain, label = np.zeros((16, 20), bool), np.zeros((16, 20), np.int64)
    brain[5:12, 5:16] = True
    label[6:8, 7:9] = 1
    noise = np.random.default_rng(i).uniform(-0.01, 0.01, (2, 16, 20))
    images = {name: np.full((2, 16, 20), grey) + noise for name, grey in METHODS.items()}
    images["real"] = np.where(brain, images["real"], -1)  # as it was read, unlike what generators make
    return BlindItem(f"BraTS19_TCIA_{i}", 30 + i, label, brain, images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_blind_sheet([item(i) for i in range(12)], folder, **DESCRIBED, seed=0)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "blind" / "sheet.html").read_text(encoding="utf-8")


def pictures(section):
    return [base64.b64decode(part) for part in re.findall(r'base64,([^"]+)"', section)]


def test_the_sheet_names_nobody(page):
    """Nor does it point elsewhere, or hold more than pixels in its pictures."""
    text = re.sub(r"base64,[^\"]+", "", page)
    for telling in ("samr", "atlas", "pix2pix", "BraTS", "TCIA", "subject", "seed", "http", 'src="/', "key"):
        assert telling not in text
    assert set(re.findall(r'alt="([^"]*)"', text)) == {""}
    assert not re.findall(r'title="', text)
    kinds = {
        tuple(
            png[i : i + 4] for i in range(len(png)) if png[i : i + 4] in (b"IHDR", b"tEXt", b"iTXt", b"tIME", b"eXIf")
        )
        for png in pictures(page)
    }
    assert kinds == {(b"IHDR",)}


def test_the_page_is_well_formed_and_asks_for_each_picture(page):
    class Parser(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.radios = [], []

        def handle_starttag(self, tag, attributes):
            if tag == "input":
                self.radios.append(dict(attributes)["name"])
            elif tag not in ("img", "meta"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Parser()
    parser.feed(page)
    assert parser.open == []
    assert {name: parser.radios.count(name) for name in ("real-1-A", "real-12-D", "most-1")} == {
        "real-1-A": 2, "real-12-D": 2, "most-1": 4
    }  # fmt: skip
    assert "APTw" in page
    assert "real-13-A" not in page
    assert "real-1-E" not in page


def test_the_key_resolves_the_pictures(folder, page):
    """Each letter's pictures are of the method that the key names; outside the brain all are alike."""
    key = {(line["item"], line["letter"]): line for line in read_key(folder / "key" / "key.csv")}
    for number, section in enumerate(page.split("<section>")[1:], start=1):
        _, *shown = [imread(io.BytesIO(png))[..., 0] for png in pictures(section)]
        assert len(shown) == 2 * len(METHODS)  # sequences, in each the letters
        for i, picture in enumerate(shown):
            line = key[str(number), "ABCD"[i % 4]]
            assert 2 * np.median(picture[picture > 0]) - 1 == pytest.approx(METHODS[line["method"]], abs=0.02)
            assert (picture == 0).sum() == picture.size - 7 * 11
            assert line["subject"] == f"BraTS19_TCIA_{number - 1}"
            assert line["slice"] == str(29 + number)


def test_the_order_is_another_in_every_item_and_follows_the_seed(folder, tmp_path):
    def orders(path):
        lines = read_key(path / "key" / "key.csv")
        return [tuple(lines[i + k]["method"] for k in range(4)) for i in range(0, len(lines), 4)]

    found = orders(folder)
    assert all(sorted(order) == sorted(METHODS) for order in found)
    assert len(set(found)) > 6
    assert {order.index("real") for order in found} == {0, 1, 2, 3}
    write_blind_sheet([item(i) for i in range(12)], tmp_path, **DESCRIBED, seed=0)
    assert orders(tmp_path) == found
    write_blind_sheet([item(i) for i in range(12)], tmp_path, **DESCRIBED, seed=1)
    assert orders(tmp_path) != found
    assert "Do not open key.csv" in (folder / "key" / "README.txt").read_text()


def key_of(*methods):
    return [
        {"sheet": "s", "item": str(i), "letter": letter, "method": method, "subject": "a", "slice": "1"}
        for i, order in enumerate(methods, start=1)
        for letter, method in zip("AB", order, strict=True)
    ]


def answered(*given):
    return [
        dict(zip(("sheet", "item", "letter", "real", "most"), ("s", *line.split(",")), strict=True)) for line in given
    ]


def test_rates_by_hand():
    key = key_of(("samr", "real"), ("real", "samr"), ("samr", "real"))
    answers = answered("1,A,yes,no", "1,B,yes,yes", "2,A,yes,", "2,B,no,", "3,A,,yes", "3,B,yes,no")
    real, samr = score(answers, key)
    assert (real["method"], real["n"], real["real"], real["n_most"], real["most"]) == ("real", 3, 100.0, 2, 50.0)
    assert (samr["method"], samr["n"], samr["real"], samr["n_most"], samr["most"]) == ("samr", 2, 50.0, 2, 50.0)
    z, n, p = norm.ppf(0.975), 2, 0.5  # Wilson's interval
    centre, half = (p + z**2 / 2 / n), z * math.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    assert samr["real_low"] == pytest.approx(100 * (centre - half) / (1 + z**2 / n))
    assert samr["real_high"] == pytest.approx(100 * (centre + half) / (1 + z**2 / n))

    table = preference_table(
        [real, samr], subjects=1, items=3, paper={"title": "A paper", "preference": {"real": 100.0, "samr": 72.1}}
    )
    assert [row[0] for row in table.rows] == ["real", "samr"]
    assert table.rows[1][-1] == "72.1"
    assert table.columns[-1] == "paper (%)"
    assert table.rows[0][2].startswith("100.0 [")


def test_what_nobody_answered_is_no_rate():
    key = key_of(("samr", "real"))
    real, samr = score(answered("1,A,,", "1,B,yes,"), key)
    assert math.isnan(samr["real"])
    assert samr["n"] == 0
    table = preference_table([real, samr], subjects=1, items=1, paper=None)
    assert table.rows[1] == ["samr", "0", "–", "0", "–"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("1,A,yes,", "1,A,no,"), "item 1, A stands twice"),
        (("1,C,yes,",), "item 1, C is not in the key"),
        (("9,A,yes,",), "item 9, A is not in the key"),
    ],
)
def test_answers_that_do_not_fit_the_key_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        score(answered(*given), key_of(("samr", "real")))


def test_answers_to_another_sheet_are_refused():
    with pytest.raises(UserError, match="to sheet other, the key to s;"):
        score([{**answered("1,A,yes,")[0], "sheet": "other"}], key_of(("samr", "real")))


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return path


def test_answers_are_read_as_the_sheet_and_as_a_spreadsheet_saves_them(tmp_path):
    path = write(tmp_path / "a.csv", "sheet,item,letter,real,most", "s,1,A, yes,", "s,1,B,,no")
    assert [line["real"] for line in read_answers(path)] == ["yes", ""]
    with path.open(newline="", encoding="utf-8-sig") as file:
        assert len(list(csv.DictReader(file))) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("sheet;item;letter;real;most", "s;1;A;yes;"), "found sheet;item;letter;real;most; expected the answers.csv"),
        (
            ("sheet,item,letter,real,most", "s,1,A,perhaps,"),
            "item 1, A: real is 'perhaps'; expected yes, no or nothing",
        ),
        (("sheet,item,letter,real,most",), "found no lines"),
    ],
)
def test_another_file_is_refused(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_answers(write(tmp_path / "a.csv", *lines))
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "nothing.csv")


def test_more_methods_than_letters_are_refused(tmp_path):
    one = item(0)
    images = {str(i): one.images["samr"] for i in range(27)}
    with pytest.raises(UserError, match="found 26 runs, expected 25 or fewer"):
        write_blind_sheet([BlindItem("a", 1, one.label, one.brain, images)], tmp_path, **DESCRIBED, seed=0)
