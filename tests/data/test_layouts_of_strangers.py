"""A layout is data, whoever wrote it: what it says is typed, stays below the root and ends."""

import json
import time
from dataclasses import replace

import pytest
from raw_scans import LAYOUTS, write_brats_case

from mrgen.data.cohorts import find_subjects
from mrgen.data.layouts import Layout, read_layouts
from mrgen.data.patterns import search
from mrgen.data.store import Store, settings_digest, write_cohort
from mrgen.errors import UserError

SHIPPED = read_layouts(LAYOUTS)
DIGESTS = {"brats2019": "86946bb6e7386b08", "wmh2017": "7f4a45c5fefc68a2"}
OWN = {
    "name": "mine",
    "subjects": ["sub-*"],
    "images": {"t1": "*_T1w.nii*"},
    "label": "*_mask.nii*",
    "label_values": {0: "background", 7: "plaque"},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": "${oc.env:HOME}"}, "found an interpolation in .* a layout is data"),
        ({"images": {"${x}": "*"}}, "found an interpolation"),
        ({"title": "two\nlines"}, "characters that cannot be printed"),
        ({"title": "\x1b[2J"}, "characters that cannot be printed"),
        ({"name": ["mine"]}, r"name has the wrong form: found \"\['mine'\]\", expected text"),
        ({"title": True}, "title has the wrong form: found 'True', expected text"),
        ({"subjects": {"a": 1}}, "subjects: found .* expected a glob"),
        ({"subjects": [1]}, "subjects: 1 is no glob pattern"),
        ({"subjects": ["a/../b"]}, "subjects: 'a/../b' is no glob pattern"),
        ({"label": "../../etc/passwd"}, "label: '../../etc/passwd' is no glob pattern"),
        ({"brain": "../x"}, "brain: '../x' is no glob pattern"),
        ({"table": {"files": "../*.csv", "id": "x"}}, r"table.files: '../\*.csv' is no glob pattern"),
        ({"table": {"files": ["a", "b"], "id": "x"}}, "table.files has the wrong form"),
        ({"subjects": "/".join(["**", "*"] * 9)}, "is too long; expected up to 500 characters and 4 times"),
        ({"exclude": "x" * 501}, "is too long"),
        ({"images": {"../t1": "*"}}, "images has the wrong form: found '../t1', expected letters, digits"),
        ({"images": {"t1": None}}, "layout mine"),
        ({"skull_stripped": "false"}, "skull_stripped has the wrong form: found 'false', expected true or false"),
        ({"skull_stripped": 1}, "expected true or false"),
        ({"label_values": {"zero": "x"}}, "label_values has the wrong form: found 'zero', expected whole numbers"),
        ({"label_values": [0, 1]}, "label_values has the wrong form"),
        ({"label_values": {0: "a", 0.5: "b"}}, "whole numbers"),
        ({"label_values": {0: "a", 10**40: "b"}}, "whole numbers"),
        ({"label_maps": {"regions": {7: "1; import os"}}}, "whole numbers"),
        ({"label_maps": "regions"}, "label_maps has the wrong form"),
        ({"classes": {"regions": "background"}}, "expected a list"),
        ({"regions": {"WT": [9]}}, r"regions.WT is \[9\], expected some of \[1\]"),
        ({"regions": {"WT": 1}}, "expected a list"),
        ({"fields": {"site": "(" * 200 + "a" + ")" * 200}}, None),
        ({"fields": {"site": "a{99999999999999}"}}, "no regular expression"),
        ({"fields": {"site": ["a"]}}, "wrong form"),
        ({"fields": ["site"]}, "fields has the wrong form"),
        ({"other_collections": {"(": "x"}}, r"other_collections: '\(' is no regular expression"),
        ({"other_collections": ["x"]}, "other_collections has the wrong form"),
    ],
)
def test_values_of_the_wrong_kind_are_a_sentence_that_names_the_key(change, message):
    if message is None:
        Layout.from_conf({**OWN, **change})
        return
    with pytest.raises(UserError, match=message):
        Layout.from_conf({**OWN, **change})


@pytest.mark.parametrize(
    "text",
    [
        b"a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\n"
        b"d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e]",
        b"name: &a [*a]",
        b"[" * 5000,
        b"name: 2020-99-99",
        b"name: !!python/object/apply:os.system ['touch pwned']",
        b"\xff\xfe\x00",
        b"name: mine\nsubjects: [a]\nimages: {[1]: x}",
        b"- a list",
        b"",
        b"\0",
    ],
)
def test_yaml_of_strangers_ends_in_a_sentence(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "layout.yaml"
    path.write_bytes(text)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"layout\.yaml"):
        Layout.from_conf(path)
    assert time.monotonic() - start < 5
    assert not (tmp_path / "pwned").exists()


def test_a_pipe_and_a_device_are_no_layouts(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            Layout.from_conf(path)


def test_a_pattern_that_would_never_end_is_given_up(tmp_path):
    """(a+)+$ on 40 letters takes years; the layout and the key are named within a second or two."""
    start = time.monotonic()
    with pytest.raises(UserError, match=r"here: '\(a\+\)\+\$' takes longer than 1 s on 'aaaa"):
        search("(a+)+$", "a" * 40 + "!", "here")
    write_brats_case(tmp_path / ("sub-" + "a" * 40 + "!"), names=("T1w",), label=None)
    layout = Layout.from_conf({**OWN, "fields": {"site": "(a+)+$"}})
    with pytest.raises(UserError, match=r"layout mine: fields\.site: "):
        find_subjects(layout, tmp_path)
    assert time.monotonic() - start < 10


def test_many_stars_in_a_glob_end(tmp_path):
    deep = tmp_path.joinpath(*["a" * 40] * 12)
    deep.mkdir(parents=True)
    layout = Layout.from_conf({**OWN, "subjects": ["/".join(["**"] * 40 + ["*a" * 30 + "b"])]})
    start = time.monotonic()
    with pytest.raises(UserError, match="nothing matches"):
        find_subjects(layout, tmp_path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["__", "   ", "*", "...", "cohort.json", "generated.json", "x" * 230])
def test_folders_whose_names_make_no_id_are_a_problem_and_no_path(tmp_path, name):
    """An empty id would be the store itself."""
    layout = Layout.from_conf({**OWN, "subjects": ["*"]})
    for folder in (name, "sub-01"):
        write_brats_case(tmp_path / folder, names=("x",), label=None)
        (tmp_path / folder / f"{folder}_x.nii.gz").rename(tmp_path / folder / "a_T1w.nii.gz")
    subjects, problems = find_subjects(layout, tmp_path)
    assert [subject.id for subject in subjects] == ["sub-01"]
    assert [problem.kind for problem in problems] == ([] if name == "..." else ["no id"])  # a hidden one is not entered


@pytest.mark.parametrize("id", ["../x", "/x", "a/../../b", ".hidden", "a\nb", "\udcff"])
def test_ids_from_paths_never_leave_the_store(tmp_path, id):
    from mrgen.data.cohorts import subject_id

    made = subject_id(id)
    assert "/" not in made
    assert not made.startswith(".")
    assert made.isprintable()


def test_names_that_no_terminal_can_show_are_written_out(tmp_path):
    folder = tmp_path / "sub-\x1b[2J\nx\udcff"
    folder.mkdir()
    _, (problem,) = find_subjects(Layout.from_conf(OWN), tmp_path)
    assert str(problem).isprintable()
    str(problem).encode("utf-8")


def test_a_stores_layout_is_checked_like_any_other(tmp_path):
    write_cohort(tmp_path, SHIPPED["brats2019"], ["t1"])
    table = json.loads((tmp_path / "cohort.json").read_text())
    for change in ({"title": "${oc.env:HOME}"}, {"images": {"../t1": ["*"]}}, {"label_values": 3}):
        (tmp_path / "cohort.json").write_text(json.dumps({**table, "layout": {**table["layout"], **change}}))
        with pytest.raises(UserError, match="layout"):
            Store(tmp_path)
    for change in ({"modalities": "t1"}, {"modalities": []}, {"settings": None}, {"name": 7}, {"layout": []}):
        (tmp_path / "cohort.json").write_text(json.dumps({**table, **change}))
        with pytest.raises(UserError, match=r"cohort\.json: cannot be read as a store's table"):
            Store(tmp_path)
    old = {key: value for key, value in table["layout"].items() if key not in ("brain", "other_collections")}
    (tmp_path / "cohort.json").write_text(json.dumps({**table, "layout": old}))
    assert Store(tmp_path).layout.name == "brats2019"


def test_digests_of_stores_from_before_are_what_they_were():
    """Recorded from the version before layouts had a brain."""
    four = ["t1", "t1ce", "t2", "flair"]
    assert settings_digest(SHIPPED["brats2019"], four) == DIGESTS["brats2019"]
    assert settings_digest(SHIPPED["wmh2017"], ["t1", "flair"]) == DIGESTS["wmh2017"]
    brought = replace(SHIPPED["brats2019"], brain=("*_mask.nii*",))
    assert settings_digest(brought, four) != DIGESTS["brats2019"]
