import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from raw_scans import (
    HEAD_AFFINE,
    LAYOUTS,
    head,
    lesion,
    scan,
    scan_of,
    write_brats_case,
    write_mha,
    write_nifti,
    write_wmh_case,
)
from rich.console import Console

from mrgen.data import preparation
from mrgen.data.cohorts import Problem
from mrgen.data.layouts import Layout, read_layouts
from mrgen.data.preparation import prepare_cohort, render
from mrgen.data.store import Store, read_subjects
from mrgen.errors import UserError

SHIPPED = read_layouts(LAYOUTS)
SCANS = os.environ.get("MRGEN_SCANS")
IDS = [f"BraTS19_X_{i}_1" for i in (1, 2, 3)]


@pytest.fixture
def root(tmp_path):
    for i in IDS:
        write_brats_case(tmp_path / "raw" / "HGG" / i)
    return tmp_path / "raw"


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def prepare(root, store, layout="brats2019", **options):
    options = {"workers": 0, "progress": False, **options}
    return prepare_cohort(SHIPPED[layout], root, store, **options)


def text(report):
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render(report))
    return shown.get()


def test_a_cohort_becomes_a_store(root, store):
    report = prepare(root, store)
    assert (report.prepared, report.unchanged, report.problems, report.exit_code) == (IDS, [], [], 0)
    subjects = Store(store).subjects
    assert list(subjects) == IDS
    subject = subjects[IDS[0]]
    assert (subject.patient, subject.grade, subject.site) == ("BraTS19_X_1", "HGG", "X")
    np.testing.assert_array_equal(subject.read_image(["flair"])[0], scan_of(IDS[0], "flair")[::-1, ::-1])
    np.testing.assert_array_equal(subject.read_label(), lesion()[::-1, ::-1])
    assert report.summary == "BraTS 2019: 3 prepared"


def test_worker_processes_give_the_same_store(root, tmp_path):
    prepare(root, tmp_path / "a")
    report = prepare(root, tmp_path / "b", workers=2)
    assert report.prepared == IDS
    for a, b in zip(Store(tmp_path / "a").subjects.values(), Store(tmp_path / "b").subjects.values(), strict=True):
        np.testing.assert_array_equal(a.read_image(), b.read_image())
        assert a.statistics == b.statistics


def test_only_what_changed_is_prepared_again(root, store):
    prepare(root, store)
    revisions = {i: s.revision for i, s in Store(store).subjects.items()}
    assert prepare(root, store).unchanged == IDS
    write_nifti(root / "HGG" / IDS[1] / f"{IDS[1]}_t1.nii.gz", scan(77))
    write_brats_case(root / "LGG" / "BraTS19_Y_9_1")
    report = prepare(root, store)
    assert report.prepared == [IDS[1], "BraTS19_Y_9_1"]
    assert report.unchanged == [IDS[0], IDS[2]]
    now = {i: s.revision for i, s in Store(store).subjects.items()}
    assert [i for i in IDS if now[i] != revisions[i]] == [IDS[1]]
    np.testing.assert_array_equal(Store(store).subjects[IDS[1]].read_image(["t1"])[0], scan(77)[::-1, ::-1])


@pytest.mark.parametrize("change", ["label appears", "label goes", "grade"])
def test_a_label_or_a_grade_that_changes_counts_as_change(root, store, change):
    label = root / "HGG" / IDS[0] / f"{IDS[0]}_seg.nii.gz"
    if change == "label appears":
        label.unlink()
    prepare(root, store)
    if change == "label appears":
        write_nifti(label, lesion())
    elif change == "label goes":
        label.unlink()
    else:
        shutil.move(root / "HGG" / IDS[0], root / "LGG" / IDS[0])
    if change == "label goes":
        report = prepare(root, store)
        assert (report.kept, report.exit_code) == ([IDS[0]], 1)
        assert "found no label, expected one, as the store has" in str(report.problems[0])
        assert "unlabelled" not in report.summary
        assert Store(store).subjects[IDS[0]].labelled
    report = prepare(root, store, prune=change == "label goes")
    assert report.prepared == [IDS[0]]
    assert any("found no label any more" in str(note) for note in report.notes) == (change == "label goes")
    subject = Store(store).subjects[IDS[0]]
    assert subject.labelled == (change != "label goes")
    assert subject.grade == ("LGG" if change == "grade" else "HGG")


def test_a_damaged_subject_whose_label_vanished_keeps_the_stored_one(root, store):
    prepare(root, store)
    (store / IDS[0] / "image.npy").write_bytes(b"")
    (root / "HGG" / IDS[0] / f"{IDS[0]}_seg.nii.gz").unlink()
    assert prepare(root, store).bad == [IDS[0]]
    assert (store / IDS[0] / "label.npy").stat().st_size > 0


def test_a_grade_that_no_folder_says_any_more_stays_until_it_is_pruned(root, store):
    prepare(root, store)
    (root / "HGG").rename(root / "all")
    assert prepare(root, store).exit_code == 0
    assert {subject.grade for subject in Store(store).subjects.values()} == {"HGG"}
    prepare(root, store, prune=True)
    assert {subject.grade for subject in Store(store).subjects.values()} == {None}


def test_a_cohort_that_was_moved_is_unchanged(root, store, tmp_path):
    prepare(root, store)
    root.rename(tmp_path / "elsewhere")
    assert prepare(tmp_path / "elsewhere", store).unchanged == IDS


@pytest.mark.parametrize("blow", [KeyboardInterrupt, SystemExit])
def test_stopped_in_the_middle_the_store_is_whole_and_the_next_run_goes_on(root, store, monkeypatch, blow):
    check, calls = preparation.check_subject, []

    def stopped(files, layout):
        calls.append(files.id)
        if len(calls) == 2:
            raise blow
        return check(files, layout)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "check_subject", stopped)
        with pytest.raises(blow):
            prepare(root, store)
    assert list(Store(store).subjects) == IDS[:1]
    Store(store).subjects[IDS[0]].read_image()
    report = prepare(root, store)
    assert (report.unchanged, report.prepared) == (IDS[:1], IDS[1:])


def test_stopped_while_a_subject_is_being_written_nothing_of_it_is_seen(root, store, monkeypatch):
    save, calls = np.save, []

    def stopped(file, array, **options):
        calls.append(1)
        if len(calls) == 5:  # the second subject's label: its image lies on disk already
            raise KeyboardInterrupt
        save(file, array, **options)

    with monkeypatch.context() as patch:
        patch.setattr("mrgen.data.store.np.save", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, store)
    assert list(Store(store).subjects) == IDS[:1]


def test_a_killed_process_leaves_whole_subjects_only(root, store):
    """The real thing: SIGKILL at a moment of the kernel's choosing."""
    import subprocess
    import sys
    import time

    for i in range(20):
        write_brats_case(root / "LGG" / f"BraTS19_Z_{i}_1")
    code = (
        "import sys; from pathlib import Path; from mrgen.data.layouts import Layout; "
        "from mrgen.data.preparation import prepare_cohort; "
        "prepare_cohort(Layout.from_conf(Path(sys.argv[1])), sys.argv[2], sys.argv[3], workers=0, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(LAYOUTS / "brats2019.yaml"), str(root), str(store)])
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (store / "cohort.json").exists():
        time.sleep(0.005)
    while time.monotonic() < deadline and not read_subjects(store):
        time.sleep(0.001)
    process.kill()
    process.wait()
    there = Store(store).subjects
    assert there
    for subject in there.values():
        assert subject.read_image().shape == (4, 16, 18, 20)
        assert subject.read_label().shape == subject.read_brain().shape == (16, 18, 20)
    report = prepare(root, store)
    assert set(report.unchanged) == set(there)
    assert len(Store(store).subjects) == 23
    assert not [p for p in store.iterdir() if p.name.endswith((".partial", ".gone"))]


def test_bad_subjects_are_reported_and_the_rest_is_prepared(root, store):
    (root / "HGG" / IDS[0] / f"{IDS[0]}_flair.nii.gz").unlink()
    (root / "HGG" / IDS[1] / f"{IDS[1]}_t2.nii.gz").write_bytes(b"")
    report = prepare(root, store)
    assert report.prepared == [IDS[2]]
    assert report.bad == IDS[:2]
    assert report.exit_code == 1
    assert list(Store(store).subjects) == [IDS[2]]
    assert report.summary == (
        "BraTS 2019: 1 prepared, 2 bad; 2 problems (missing sequence: flair: 1, not an image: 1); "
        "strict=false goes on without them"
    )
    assert prepare(root, store, strict=False).exit_code == 0


def test_a_subject_that_became_bad_stays_in_the_store_until_it_is_pruned(root, store):
    prepare(root, store)
    voxels = Store(store).subjects[IDS[1]].read_label()
    (root / "HGG" / IDS[0] / f"{IDS[0]}_flair.nii.gz").unlink()
    write_nifti(root / "HGG" / IDS[1] / f"{IDS[1]}_seg.nii.gz", lesion((3,)))
    for strict, code in ((True, 1), (False, 0)):
        report = prepare(root, store, strict=strict)
        assert (report.unchanged, report.kept, report.bad, report.exit_code) == ([IDS[2]], IDS[:2], [], code)
    assert "1 unchanged, 2 kept; 2 problems" in report.summary
    assert list(Store(store).subjects) == IDS
    np.testing.assert_array_equal(Store(store).subjects[IDS[1]].read_label(), voxels)
    report = prepare(root, store, prune=True)
    assert (report.unchanged, report.removed) == ([IDS[2]], IDS[:2])
    assert list(Store(store).subjects) == [IDS[2]]


def test_subjects_that_vanished_are_kept_and_reported(root, store):
    prepare(root, store)
    shutil.rmtree(root / "HGG" / IDS[0])
    report = prepare(root, store)
    (problem,) = report.problems
    assert f"found 1 prepared subjects ({IDS[0]}) that no longer lie below data.root={root}" in str(problem)
    assert (report.kept, report.exit_code) == ([IDS[0]], 1)
    assert list(Store(store).subjects) == IDS
    assert prepare(root, store, prune=True).removed == [IDS[0]]


@pytest.mark.parametrize("options", [{}, {"modalities": ["flair", "t1"]}])
def test_a_root_of_one_grade_alone_prunes_nobody_of_the_other(root, store, options):
    """Their files are there, above the root; a second time as well, when the others' places are known by it."""
    write_brats_case(root / "LGG" / "BraTS19_Y_9_1")
    prepare(root, store)
    for _ in range(2):
        report = prepare(root / "HGG", store, prune=True, **options)
        assert report.removed == []
        assert (store / "BraTS19_Y_9_1" / "image.npy").exists()
    shutil.rmtree(root / "LGG" / "BraTS19_Y_9_1")
    assert prepare(root, store, prune=True, **options).removed == []  # nobody's files lie where they were, now
    assert prepare(root, store, prune=True, **options).removed == ["BraTS19_Y_9_1"]


def test_another_copy_of_a_part_of_the_cohort_prunes_nobody(root, store, tmp_path):
    prepare(root, store)
    shutil.copytree(root / "HGG" / IDS[0], tmp_path / "usb" / IDS[0])
    assert prepare(tmp_path / "usb", store, prune=True).removed == []
    assert list(Store(store).subjects) == IDS


def test_other_modalities_are_refused_before_anything_is_touched(root, store):
    """Forgetting data.modalities would hide a store of two sequences, and most BraTS 2015 subjects have no others."""
    prepare(root, store, modalities=["flair", "t1"])
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    (root / "HGG" / IDS[0] / f"{IDS[0]}_t2.nii.gz").unlink()
    with pytest.raises(
        UserError, match=r"holds 3 subjects prepared with flair, t1, and t1, t1ce, t2, flair are asked"
    ) as e:
        prepare(root, store, strict=False)
    assert "data.modalities=[flair,t1] keeps them, another data.store=… makes a store beside them" in str(e.value)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before
    assert prepare(root, store, modalities=["flair", "t1"]).unchanged == IDS


def test_replacing_a_store_of_other_modalities_hides_it_only_once_there_is_better(root, store, monkeypatch):
    prepare(root, store)
    (root / "HGG" / IDS[0] / f"{IDS[0]}_t1.nii.gz").write_bytes(b"")  # the first that is read is bad
    check, calls = preparation.check_subject, []

    def stopped(files, layout):
        calls.append(files.id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return check(files, layout)

    with monkeypatch.context() as patch:
        problem = Problem("x", "x", "is bad", "bad")
        patch.setattr(preparation, "check_subject", lambda files, layout: (None, [replace(problem, subject=files.id)]))
        report = prepare(root, store, modalities=["flair", "t1"], prune=True, strict=False)
    assert (report.kept, report.bad, report.exit_code) == ([], IDS, 1)  # of the settings asked for there are none
    assert list(Store(store).subjects) == IDS  # and the store is what it was
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "check_subject", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, store, modalities=["flair", "t1"], prune=True)
    half = Store(store)
    assert (half.modalities, list(half.subjects), half.hidden) == (("flair", "t1"), [IDS[1]], 2)
    report = prepare(root, store, modalities=["flair", "t1"], prune=True)
    assert (report.unchanged, report.prepared, report.removed) == ([IDS[1]], [IDS[2]], [IDS[0]])
    whole = Store(store)
    assert (list(whole.subjects), whole.hidden) == (IDS[1:], 0)
    np.testing.assert_array_equal(whole.subjects[IDS[2]].read_image()[0], scan_of(IDS[2], "flair")[::-1, ::-1])


@pytest.mark.parametrize(
    "copy", ["incoming/HGG/{}", "__MACOSX/HGG/{}", ".Trash/{}", "@eaDir/{}", "@Recycle/{}", "found.000/{}"]
)
def test_a_stray_copy_that_lacks_sequences_costs_nothing(root, store, copy):
    """Further runs say the same: the good one is unchanged, the other is reported where it is no system's."""
    prepare(root, store)
    stray = root / copy.format(IDS[0])
    write_nifti(stray / f"{IDS[0]}_t1.nii.gz", scan(77))
    for _ in range(3):
        report = prepare(root, store)
        assert (report.unchanged, report.kept, report.bad) == (IDS, [], [])
        assert list(Store(store).subjects) == IDS
        assert len(report.problems) == (3 if copy.startswith("incoming") else 0)  # t1ce, t2, flair
        assert report.exit_code == bool(report.problems)


def test_two_whole_copies_keep_what_the_store_has_whatever_is_pruned(root, store):
    prepare(root, store)
    shutil.copytree(root / "HGG" / IDS[0], root / "incoming" / IDS[0])
    for prune in (False, True):
        report = prepare(root, store, prune=prune)
        assert (report.unchanged, report.kept, report.removed) == (IDS[1:], IDS[:1], [])
        assert "found the id" in str(report.problems[0])
    assert list(Store(store).subjects) == IDS


def test_without_a_good_subject_the_exit_code_is_never_0(root, store):
    for id in IDS:
        (root / "HGG" / id / f"{id}_t2.nii.gz").write_bytes(b"")
    for options in ({}, {"strict": False}, {"check": True}, {"check": True, "strict": False}):
        report = prepare(root, store, **options)
        assert (report.bad, report.exit_code) == (IDS, 1)
        assert report.summary.endswith("; no subject came out well")


@pytest.mark.parametrize("name", ["{} (1)", "{} 2", "{} - Copy", "{}_old", "BraTS19_Y_8_1"])
def test_the_same_voxels_under_two_ids_are_refused_and_the_known_one_stays(root, store, name):
    prepare(root, store)
    copy = root / "HGG" / name.format(IDS[0])
    shutil.copytree(root / "HGG" / IDS[0], copy)
    for _ in range(2):
        report = prepare(root, store)
        assert set(IDS[1:]) <= set(report.unchanged)
        assert len(report.bad) == 1
        assert list(Store(store).subjects) == IDS
    assert prepare(root, store.with_name("other"), check=True).exit_code == 1


def test_one_sequence_of_another_subject_is_enough_and_of_two_new_ones_neither_is_taken(root, store):
    shutil.copy(root / "HGG" / IDS[0] / f"{IDS[0]}_t1.nii.gz", root / "HGG" / IDS[1] / f"{IDS[1]}_t1.nii.gz")
    for options in ({"check": True}, {}):
        report = prepare(root, store, **options)
        assert report.bad == IDS[:2]
        assert f"found the same voxels (t1) as in {IDS[1]}, expected every scan under one id" in str(report.problems[0])
    assert list(Store(store).subjects) == [IDS[2]]


def test_a_subject_that_was_renamed_takes_the_place_of_the_old_one_when_pruned(root, store):
    prepare(root, store)
    (root / "HGG" / IDS[0]).rename(root / "HGG" / "BraTS19_Z_1_1")
    for file in (root / "HGG" / "BraTS19_Z_1_1").iterdir():
        file.rename(file.with_name(file.name.replace(IDS[0], "BraTS19_Z_1_1")))
    report = prepare(root, store)
    assert (report.kept, report.bad) == ([IDS[0]], ["BraTS19_Z_1_1"])
    report = prepare(root, store, prune=True)
    assert (report.removed, report.prepared, report.problems) == ([IDS[0]], ["BraTS19_Z_1_1"], [])
    assert list(Store(store).subjects) == [*IDS[1:], "BraTS19_Z_1_1"]


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"\xff\xfe no array"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "dead link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["image.npy", "label.npy", "brain.npy", "subject.json", "cohort.json"])
def test_a_damaged_store_is_named_by_a_training_and_mended_by_a_preparation(root, store, name, damage):
    prepare(root, store)
    voxels = Store(store).subjects[IDS[1]].read_image()
    file = store / name if name == "cohort.json" else store / IDS[1] / name
    DAMAGE[damage](file)
    with pytest.raises(UserError, match="mrgen-prepare") as error:
        Store(store)
    assert str(store) in str(error.value)
    assert name == "cohort.json" or IDS[1] in str(error.value)
    if (name, damage) == ("cohort.json", "folder"):  # somebody's, and no damage
        with pytest.raises(UserError, match="found a folder, expected a store's table; move it away"):
            prepare(root, store)
        return
    report = prepare(root, store)
    assert report.exit_code == 0
    assert len(report.mended) == (name != "cohort.json" or damage != "missing")
    assert report.prepared == ([] if name == "cohort.json" else [IDS[1]])
    assert list(Store(store).subjects) == IDS
    np.testing.assert_array_equal(Store(store).subjects[IDS[1]].read_image(), voxels)
    assert prepare(root, store, verify=True).unchanged == IDS


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "brain.npy"])
def test_another_subjects_voxels_are_found_when_verified(root, store, name):
    write_brats_case(root / "HGG" / IDS[1], label=(4, 1, 2))
    prepare(root, store)
    array = np.load(store / IDS[0] / name)
    array[..., 5, 5, 5] += 1
    np.save(store / IDS[0] / name, array)
    assert prepare(root, store).unchanged == IDS
    report = prepare(root, store, verify=True)
    assert (report.prepared, report.mended) == ([IDS[0]], {IDS[0]: f"{name}: other voxels than were prepared"})
    assert prepare(root, store, verify=True).unchanged == IDS


def test_a_store_from_before_checksums_opens_is_unchanged_and_gets_them_when_verified(root, store):
    prepare(root, store)
    for file in store.glob("*/subject.json"):
        table = json.loads(file.read_text())
        del table["checksums"], table["checksum"]
        file.write_text(json.dumps(table))
    assert len(Store(store)) == 3
    assert prepare(root, store).unchanged == IDS
    shutil.copytree(root / "HGG" / IDS[0], root / "HGG" / "BraTS19_Y_8_1")
    assert prepare(root, store).bad == ["BraTS19_Y_8_1"]  # by its statistics
    shutil.rmtree(root / "HGG" / "BraTS19_Y_8_1")
    scan = root / "HGG" / IDS[0] / f"{IDS[0]}_t1.nii.gz"
    scan.rename(scan.with_name("elsewhere"))
    report = prepare(root, store, verify=True)
    assert (report.prepared, report.kept) == (IDS[1:], IDS[:1])  # it is no damage
    assert all("damaged" not in str(problem) for problem in report.problems)
    scan.with_name("elsewhere").rename(scan)
    assert prepare(root, store, verify=True).prepared == IDS[:1]
    assert prepare(root, store, verify=True).unchanged == IDS


def test_sequences_in_another_order_are_prepared_anew(root, store):
    prepare(root, store)
    path = store / IDS[0] / "subject.json"
    table = json.loads(path.read_text())
    del table["checksum"]
    path.write_text(json.dumps({**table, "modalities": table["modalities"][::-1]}))
    with pytest.raises(UserError, match="other sequences than the store"):
        Store(store)
    assert prepare(root, store).prepared == [IDS[0]]
    assert list(Store(store).subjects) == IDS


def test_what_is_damaged_and_has_no_good_files_is_reported_until_it_is_pruned(root, store):
    prepare(root, store)
    (store / IDS[0] / "image.npy").write_bytes(b"")
    (root / "HGG" / IDS[0] / f"{IDS[0]}_t2.nii.gz").write_bytes(b"")
    report = prepare(root, store)
    assert (report.unchanged, report.bad, report.mended) == (IDS[1:], [IDS[0]], {})
    assert any("found a damaged copy in the store (image.npy: " in str(problem) for problem in report.problems)
    assert (store / IDS[0] / "label.npy").exists()
    assert prepare(root, store, prune=True).removed == [IDS[0]]
    assert list(Store(store).subjects) == IDS[1:]


def test_links_in_a_store_are_not_followed(root, store, tmp_path):
    """The store may be somebody else's."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter").write_text("dear")
    prepare(root, store)
    (store / ".lock").unlink()
    (store / ".lock").symlink_to(precious / "letter")
    with pytest.raises(UserError, match=r"\.lock: found a link, expected a file or nothing; remove it"):
        prepare(root, store)
    (store / ".lock").unlink()
    shutil.rmtree(store / IDS[0])
    (store / IDS[0]).symlink_to(precious)
    (store / f".{IDS[1]}.12345678.gone").symlink_to(precious)
    (store / ".cohort.json.12345678").symlink_to(precious / "letter")
    (store / "cohort.json").unlink()
    (store / "cohort.json").symlink_to(precious / "letter")
    assert prepare(root, store).prepared == [IDS[0]]
    assert list(Store(store).subjects) == IDS
    assert (precious / "letter").read_text() == "dear"
    assert not [path for path in store.iterdir() if path.is_symlink()]


def test_killed_between_old_and_new_the_old_one_is_put_back(root, store):
    prepare(root, store)
    (store / IDS[0]).rename(store / f".{IDS[0]}.0123abcd.old")
    assert prepare(root, store).unchanged == IDS


def test_somebodys_own_files_where_a_subject_would_be_written_are_left_alone(root, store):
    (store / IDS[0]).mkdir(parents=True)
    (store / IDS[0] / "thesis.tex").write_text("x")
    report = prepare(root, store)
    assert (report.prepared, report.bad) == (IDS[1:], [IDS[0]])
    assert (store / IDS[0] / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("now", ["\0\0a", None, "header", "no grade"])
def test_a_table_that_becomes_unreadable_or_says_less_costs_no_grade(tmp_path, store, now):
    root = tmp_path / "raw"
    for i in (1, 2):
        write_brats_case(root / f"BraTS20_Training_00{i}")
    header = "Grade,BraTS_2019_subject_ID,BraTS_2020_subject_ID\n"
    rows = "{},BraTS19_X_1_1,BraTS20_Training_001\nLGG,BraTS19_X_2_1,BraTS20_Training_002\n"
    table = root / "name_mapping.csv"
    table.write_text(header + rows.format("HGG"))
    prepare(root, store, "brats2020")
    table.write_text({"header": header, "no grade": header + rows.format("")}.get(now, now or ""))
    if now is None:
        table.unlink()
    report = prepare(root, store, "brats2020")
    said = [line for line in (*report.problems, *report.notes) if line.subject == "table"]
    assert len(said) == 1
    assert (len(report.unchanged), len(report.rows)) == (2, 2)
    subjects = Store(store).subjects.values()
    assert [(s.grade, s.site) for s in subjects] == [("HGG", "X"), ("LGG", "X")]
    (store / "BraTS20_Training_001" / "image.npy").write_bytes(b"")
    assert prepare(root, store, "brats2020", prune=True).prepared == ["BraTS20_Training_001"]
    assert Store(store).subjects["BraTS20_Training_001"].grade == "HGG"


def test_what_systems_leave_in_a_store_is_nobodys(root, store):
    prepare(root, store)
    shutil.copytree(store / IDS[0], store / "@eaDir")
    (store / IDS[0] / "Thumbs.db").write_bytes(b"x")
    assert list(Store(store).subjects) == IDS
    write_nifti(root / "HGG" / IDS[0] / f"{IDS[0]}_t1.nii.gz", scan(77))
    assert prepare(root, store).prepared == [IDS[0]]


def test_a_damaged_subject_that_is_nowhere_is_told_of_once(root, store):
    prepare(root, store)
    (store / IDS[0] / "subject.json").write_text("{")
    shutil.rmtree(root / "HGG" / IDS[0])
    (problem,) = prepare(root, store).problems
    assert "(subject.json: found no JSON" in str(problem)
    assert "expected ;" not in str(problem)
    assert "no longer" not in str(problem)


def test_a_store_of_another_cohort_is_refused_and_left_alone(root, store, tmp_path):
    prepare(root, store)
    write_brats_case(tmp_path / "other" / "BraTS2021_00001")
    with pytest.raises(UserError, match="found a store of brats2019, expected brats2021 or none; choose another"):
        prepare(tmp_path / "other", store, "brats2021")
    assert list(Store(store).subjects) == IDS


def test_check_writes_nothing_and_shows_a_table(root, store):
    (root / "HGG" / IDS[1] / f"{IDS[1]}_t1.nii.gz").write_bytes(b"no image")
    (root / "HGG" / IDS[2] / f"{IDS[2]}_seg.nii.gz").unlink()
    report = prepare(root, store, check=True)
    assert not store.exists()
    assert [row.status for row in report.rows] == ["good", "bad", "good"]
    shown = text(report)
    lines = [line.split() for line in shown.splitlines() if line.strip().startswith("BraTS19_X")]
    assert lines[0] == [IDS[0], "HGG", "X", "16×18×20", "1×1×1", "yes", "good"]
    assert lines[1] == [IDS[1], "HGG", "X", "–", "–", "yes", "bad"]
    assert lines[2] == [IDS[2], "HGG", "X", "16×18×20", "1×1×1", "no", "good"]
    assert f"{IDS[1]}_t1.nii.gz: found no NIfTI header" in shown
    assert "BraTS 2019: 2 good, 1 bad (1 unlabelled); 1 problem (not an image: 1)" in shown


def test_the_table_shows_patients_where_they_have_several_visits(tmp_path, store):
    for visit in (1, 2):
        write_brats_case(tmp_path / "raw" / f"BraTS19_X_7_{visit}")
    shown = text(prepare(tmp_path / "raw", store))
    assert shown.count("BraTS19_X_7 ") == 2


def test_a_second_preparation_at_the_same_time_is_refused(root, store):
    prepare(root, store)
    with open(store / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing to it"):
            prepare(root, store)
    assert prepare(root, store).unchanged == IDS


def test_a_store_that_cannot_be_written_says_so(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.store=.*file/store: cannot be written \(Not a directory\)"):
        prepare(root, tmp_path / "file" / "store")
    with pytest.raises(UserError, match=r"data\.store is not set"):
        prepare(root, None)


def own_cohort(root):
    """A cohort of MetaImages with their voxels in files beside them, and its layout."""
    for i in range(4):
        write_mha(root / f"S{i}" / "t1.mhd", scan(i), compress=False)
    return Layout.from_conf({"name": "ours", "subjects": ["S*"], "images": {"t1": "t1.*"}})


@pytest.mark.parametrize("workers", [0, 2])
def test_files_made_to_break_a_reader_cost_their_own_subjects(tmp_path, store, workers):
    root = tmp_path / "raw"
    layout = own_cohort(root)
    header = root / "S0" / "t1.mhd"
    header.write_text(header.read_text().replace("NDims = 3", "NDims = -1"))  # a segmentation fault inside ITK
    header = root / "S1" / "t1.mhd"
    header.write_text(header.read_text().replace("t1.raw", "/dev/zero"))
    (root / "S2" / "t1.raw").unlink()
    os.mkfifo(root / "S2" / "t1.raw")
    report = prepare_cohort(layout, root, store, workers=workers, progress=False)
    assert report.prepared == list(Store(store).subjects) == ["S3"]
    assert [problem.subject for problem in report.problems] == ["S0", "S1", "S2"]
    assert report.exit_code == 1


def test_other_voxels_behind_the_same_header_are_prepared_anew(tmp_path, store):
    root = tmp_path / "raw"
    layout = own_cohort(root)
    prepare_cohort(layout, root, store, workers=0, progress=False)
    (root / "S1" / "t1.raw").write_bytes(scan(7).tobytes("F"))
    report = prepare_cohort(layout, root, store, workers=0, progress=False)
    assert (report.prepared, report.unchanged) == (["S1"], ["S0", "S2", "S3"])
    np.testing.assert_array_equal(Store(store).subjects["S1"].read_image()[0], scan(7)[::-1, ::-1])


def test_voxels_that_vanished_behind_their_header_are_one_line(tmp_path, store):
    root = tmp_path / "raw"
    layout = own_cohort(root)
    prepare_cohort(layout, root, store, workers=0, progress=False)
    (root / "S1" / "t1.raw").unlink()
    report = prepare_cohort(layout, root, store, workers=0, progress=False)
    assert report.unchanged == ["S0", "S2", "S3"]
    (problem,) = report.problems
    assert "S1/t1.mhd: its voxels in t1.raw cannot be read (No such file or directory), expected an image" in str(
        problem
    )


def test_what_headers_left_open_is_said_and_no_problem(root, store):
    report = prepare(root, store)
    assert len(report.notes) == 15
    assert report.exit_code == 0
    line = f"{IDS[0]} and 2 more: {IDS[0]}_t1.nii.gz and 4 more: found no unit of length in the header; took mm"
    assert line in text(report).splitlines()


def test_a_file_that_vanishes_during_the_run_is_one_line(root, store, monkeypatch):
    check = preparation.check_subject

    def vanish(files, layout):
        if files.id == IDS[1]:
            files.images["t2"].unlink()
        return check(files, layout)

    monkeypatch.setattr(preparation, "check_subject", vanish)
    report = prepare(root, store)
    assert report.prepared == [IDS[0], IDS[2]]
    (problem,) = report.problems
    assert f"{IDS[1]}_t2.nii.gz: cannot be read (No such file or directory)" in str(problem)


def test_a_cohort_that_is_not_skull_stripped(tmp_path, store):
    write_wmh_case(tmp_path / "raw" / "Amsterdam" / "GE3T" / "100")
    write_wmh_case(tmp_path / "raw" / "Utrecht" / "0", label=None)
    report = prepare(tmp_path / "raw", store, "wmh2017")
    assert report.prepared == ["GE3T_100", "Utrecht_0"]
    a, b = Store(store).subjects.values()
    assert (a.site, a.labelled, b.site, b.labelled) == ("GE3T", True, "Utrecht", False)
    assert a.brain_method == "head"
    assert a.spacing == (3, 3, 6)


def test_a_flair_on_another_grid_than_the_t1_is_refused(tmp_path, store):
    """WMH 2017 ships a 3DT1 on its own grid beside the T1 that was resampled onto the FLAIR's."""
    _, flair, _ = head()
    write_wmh_case(tmp_path / "raw" / "Utrecht" / "0")
    shape = write_wmh_case(tmp_path / "raw" / "Singapore" / "50") / "pre" / "FLAIR.nii.gz"
    write_nifti(shape, flair[:, :, 1:], HEAD_AFFINE)
    moved = write_wmh_case(tmp_path / "raw" / "GE3T" / "100") / "pre" / "FLAIR.nii.gz"
    affine = HEAD_AFFINE.copy()
    affine[1, 3] += 6  # mm to the front
    write_nifti(moved, flair, affine)
    report = prepare(tmp_path / "raw", store, "wmh2017")
    assert report.prepared == list(Store(store).subjects) == ["Utrecht_0"]
    assert report.exit_code == 1
    assert [str(problem) for problem in report.problems] == [
        f"GE3T_100: {moved}: found an affine up to 2 voxels off, expected that of T1.nii.gz; bring them onto one grid",
        f"Singapore_50: {shape}: found the shape 64×72×23, expected 64×72×24 as in T1.nii.gz; bring them onto one grid",
    ]


@pytest.mark.skipif(not SCANS, reason="MRGEN_SCANS is unset: real scans are not part of the repository")
@pytest.mark.parametrize(
    ("name", "modalities", "n", "labels"),
    [
        ("brats2015", ["t1ce", "flair"], 4, {0, 1, 2, 3, 4}),
        ("brats2019", None, 1, {0, 1, 2, 4}),
        ("brats2023", None, 1, None),
    ],
)
def test_real_cohorts(store, name, modalities, n, labels):
    root = Path(SCANS) / name
    report = prepare(root, store, name, modalities=modalities, known_layouts=SHIPPED)
    assert not report.problems
    assert len(report.prepared) == n
    for subject in Store(store).subjects.values():
        assert subject.shape == (240, 240, 155)
        assert (set(subject.label_counts) if subject.label_counts else None) == labels
        assert 1e6 < subject.read_brain().sum() < 2e6
        assert subject.read_image(box=((100, 101),) * 3).dtype == np.int16
    assert len(prepare(root, store, name, modalities=modalities).unchanged) == n


@pytest.mark.skipif(not SCANS, reason="MRGEN_SCANS is unset: real scans are not part of the repository")
def test_real_cohort_without_two_sequences_says_what_would_do(store):
    report = prepare(Path(SCANS) / "brats2015", store, "brats2015")
    assert len(report.problems) == 8
    assert all("or do without: data.modalities=[t1ce,flair]" in str(p) for p in report.problems)
    assert not Store(store).subjects
