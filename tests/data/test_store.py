import json
import os
import pickle

import numpy as np
import pytest
from raw_scans import BRATS_AFFINE, LAYOUTS, ellipsoid, lesion, scan

from mrgen.data.layouts import read_layouts
from mrgen.data.store import (
    Store,
    read_subjects,
    remove_leftovers,
    remove_subject,
    to_original,
    write_cohort,
    write_subject,
)
from mrgen.errors import UserError

LAYOUT = read_layouts(LAYOUTS)["brats2019"]
MODALITIES = ("t1", "t1ce", "t2", "flair")
IMAGE = np.stack([scan(i) for i in range(4)])
ARRAYS = {"image": IMAGE, "brain": ellipsoid(), "label": lesion(), "affine": np.eye(4)}


@pytest.fixture
def store(tmp_path):
    write_cohort(tmp_path, LAYOUT, MODALITIES)
    return tmp_path


@pytest.fixture
def subject(store):
    return write_subject(store, id="A", **ARRAYS)


def test_a_folder_without_a_store_says_to_prepare_one(tmp_path):
    with pytest.raises(UserError, match=r"found no cohort\.json, expected a prepared store; run mrgen-prepare"):
        Store(tmp_path)


def test_a_store_of_another_version_or_with_a_damaged_table_is_refused(store):
    table = json.loads((store / "cohort.json").read_text())
    (store / "cohort.json").write_text(json.dumps({**table, "version": 99}))
    with pytest.raises(UserError, match="found store version 99, expected 1"):
        Store(store)
    (store / "cohort.json").write_text("{")
    with pytest.raises(UserError, match=r"cohort\.json: found no JSON: .*; expected a store's table; mrgen-prepare"):
        Store(store)


def test_what_is_written_is_read_back(store):
    write_subject(store, id="B", patient="P", grade="HGG", site="TCIA", **ARRAYS)
    write_subject(store, id="A", **{**ARRAYS, "label": None, "affine": np.diag([1, 2, 3, 1])})
    opened = Store(store)
    assert (opened.name, opened.modalities, list(opened.subjects)) == ("brats2019", MODALITIES, ["A", "B"])
    assert opened.layout == LAYOUT
    a, b = opened.subjects.values()
    assert (b.patient, b.grade, b.site, b.shape, b.spacing) == ("P", "HGG", "TCIA", (16, 18, 20), (1, 1, 1))
    assert (a.patient, a.grade, a.site, a.spacing, a.label_counts) == ("A", None, None, (1, 2, 3), None)
    assert b.label_counts == {0: IMAGE[0].size - 12, 1: 4, 2: 4, 4: 4}
    np.testing.assert_array_equal(b.read_image(), IMAGE)
    np.testing.assert_array_equal(b.read_label(), lesion())
    np.testing.assert_array_equal(b.read_brain(), ellipsoid())
    assert (b.read_image().dtype, b.read_label().dtype, b.read_brain().dtype) == (np.int16, np.uint8, np.bool_)
    assert b.read_label().flags.writeable
    with pytest.raises(UserError, match="A has no label"):
        a.read_label()


def test_statistics_are_of_the_brain(subject):
    values = IMAGE[2][ellipsoid()].astype(float)
    statistics = subject.statistics["t2"]
    low, high = np.percentile(values, [0.5, 99.5])
    assert statistics["mean"] == pytest.approx(values.mean())
    assert statistics["q3"] == pytest.approx(np.quantile(values, 0.75))
    assert (statistics["p0_5"], statistics["p99_5"]) == (low, high)
    assert statistics["clipped_std"] == pytest.approx(np.clip(values, low, high).std())
    assert (statistics["volume_min"], statistics["volume_max"]) == (0, IMAGE[2].max())
    inside = np.argwhere(ellipsoid())
    assert subject.brain_box == tuple(zip(inside.min(0).tolist(), (inside.max(0) + 1).tolist(), strict=True))


@pytest.mark.parametrize(
    "box",
    [
        ((2, 10), (0, 18), (5, 6)),
        ((-3, 5), (10, 22), (0, 20)),
        ((-5, 30), (-5, 30), (-5, 30)),
        ((40, 44), (0, 4), (0, 4)),
        ((-9, -2), (0, 4), (0, 4)),
    ],
)
@pytest.mark.parametrize("modalities", [None, ["flair", "t1"]])
def test_crops_are_slices_of_the_volume_filled_outside(subject, box, modalities):
    channels = [MODALITIES.index(m) for m in modalities or MODALITIES]
    margin = 50
    padded = np.pad(IMAGE[channels], [(0, 0)] + [(margin, margin)] * 3, constant_values=-7)
    window = tuple(slice(a + margin, b + margin) for a, b in box)
    expected = padded[(slice(None), *window)]
    np.testing.assert_array_equal(subject.read_image(modalities, box, fill=-7), expected)
    out = np.full(expected.shape, 99, np.float32)
    assert subject.read_image(modalities, box, out=out, fill=-7) is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(subject.read_label(box), np.pad(lesion(), margin)[window])
    np.testing.assert_array_equal(subject.read_brain(box), np.pad(ellipsoid(), margin)[window])


def test_buffers_that_cannot_hold_the_crop_are_refused(subject):
    with pytest.raises(ValueError, match="out has the shape"):
        subject.read_image(out=np.empty((4, 1, 1, 1), np.int16))
    with pytest.raises(TypeError):
        subject.read_image(out=np.empty(IMAGE.shape, np.uint8))


def test_unknown_modality_is_refused_with_what_there_is(subject):
    with pytest.raises(UserError, match="the store holds t1, t1ce, t2, flair, not apt"):
        subject.read_image(["apt"])


def test_a_crop_touches_no_more_of_the_file_than_it_needs(subject, monkeypatch):
    """The arrays are mapped, not loaded: np.load is asked for a mapping, once per file."""
    from mrgen.data import stored_subject

    modes = []
    load = np.load

    def record(path, mmap_mode=None, **options):
        modes.append(mmap_mode)
        return load(path, mmap_mode, **options)

    monkeypatch.setattr(stored_subject.np, "load", record)
    for _ in range(3):
        subject.read_image(box=((0, 4), (0, 4), (0, 4)))
    assert modes == ["r"]


def test_subjects_travel_to_workers_without_their_arrays(subject):
    subject.read_image()
    assert len(pickle.dumps(subject)) < 5000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(subject)).read_image(), IMAGE)


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        (np.array([-32768, 32767], np.int32), np.int16),
        (np.array([0.0, 812.0], np.float64), np.int16),
        (np.array([0, 40000], np.uint16), np.float32),
        (np.array([0.0, 0.5], np.float64), np.float32),
    ],
)
def test_whole_numbers_take_two_bytes_and_nothing_is_lost(store, values, stored):
    image = np.resize(values, (4, 4, 4, 4))
    write_cohort(store, LAYOUT, MODALITIES)
    subject = write_subject(store, id="A", image=image, brain=np.ones((4, 4, 4), bool), affine=np.eye(4))
    assert subject.read_image().dtype == stored
    np.testing.assert_array_equal(subject.read_image(), image)


def test_writing_anew_replaces_and_is_not_read_through_the_old_mapping(store):
    first = write_subject(store, id="A", **ARRAYS)
    np.testing.assert_array_equal(first.read_image(), IMAGE)
    write_subject(store, id="A", **{**ARRAYS, "image": IMAGE + 1, "label": None})
    again = Store(store).subjects["A"]
    np.testing.assert_array_equal(again.read_image(), IMAGE + 1)
    assert not again.labelled
    assert sorted(p.name for p in store.iterdir()) == ["A", "cohort.json"]


@pytest.mark.parametrize("fails", ["save", "fsync", "rename"])
def test_a_write_that_fails_leaves_no_half_subject(store, monkeypatch, fails):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    where = {
        "save": (np, "save"),
        "fsync": (os, "fsync"),
        "rename": (os, "rename"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[fails], fail)
        with pytest.raises(UserError, match=r"A cannot be written \(No space left on device\)"):
            write_subject(store, id="A", **ARRAYS)
    assert Store(store).subjects == {}
    assert sorted(p.name for p in store.iterdir()) == ["cohort.json"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spacing", [2.0, 1.0, 1.0]),
        ("affine", np.diag([2.0, 1, 1, 1]).tolist()),
        ("patient", "B"),
        ("label_counts", {"0": 1}),
        ("original_shape", [20, 18, 16]),
        ("settings", "0123456789abcdef"),
    ],
)
def test_a_table_with_other_values_than_were_written_is_damaged(store, subject, key, value):
    path = subject.path / "subject.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=r"is damaged \(subject.json: other values than were written\)"):
        Store(store)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("statistics", {m: {"min": 0.0} for m in MODALITIES}),
        ("checksums", {"image.npy": [1, 2]}),
        ("checksums", {"image.npy": {"t1": 1}}),
        ("checksums", {"brain.npy": {}}),
    ],
)
def test_a_table_that_lacks_what_is_read_of_it_is_damaged(store, subject, key, value):
    path = subject.path / "subject.json"
    table = json.loads(path.read_text())
    del table["checksum"]
    path.write_text(json.dumps({**table, key: value}))
    with pytest.raises(UserError, match=rf"is damaged \(subject.json: {key}: "):
        Store(store)


def test_what_a_killed_writer_left_is_not_seen_and_cleared(store, subject):
    half = store / ".B.12345678.partial"
    half.mkdir()
    (half / "subject.json").write_text("{}")
    (store / "notes").mkdir()
    assert list(Store(store).subjects) == ["A"]
    remove_leftovers(store)
    assert not half.exists()
    assert (store / "notes").exists()


def test_subjects_prepared_with_other_settings_are_not_shown(store, subject):
    write_cohort(store, LAYOUT, ["flair", "t1"])
    assert Store(store).subjects == {}
    assert list(read_subjects(store)) == ["A"]
    write_cohort(store, LAYOUT, MODALITIES)
    assert list(Store(store).subjects) == ["A"]


def test_removing(store, subject):
    remove_subject(store, "A")
    remove_subject(store, "A")
    assert sorted(p.name for p in store.iterdir()) == ["cohort.json"]


def test_more_subjects_than_file_handles(store, monkeypatch):
    import resource

    for i in range(40):
        write_subject(store, id=f"S{i}", image=IMAGE[:, :4, :4, :4], brain=np.ones((4, 4, 4), bool), affine=np.eye(4))
    from mrgen.data import stored_subject

    monkeypatch.setattr(stored_subject, "_opened", stored_subject.lru_cache(8)(stored_subject._opened.__wrapped__))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        for subject in Store(store).subjects.values():
            subject.read_image()
            subject.read_brain()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def oblique():
    a, b = 0.3, 0.2
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([-1, 1.2, 3])
    affine[:3, 3] = (5, -7, 11)
    return affine


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(4),
        BRATS_AFFINE,
        np.array([[0, 0, 2.0, 1], [-1, 0, 0, 2], [0, -1, 0, 3], [0, 0, 0, 1]]),  # PIR: axes permuted and flipped
        np.array([[0, 1.0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]),
        oblique(),
    ],
    ids=["RAS", "LPS", "PIR", "SRA", "oblique"],
)
def test_canonical_arrays_go_back_onto_the_file_they_came_from(tmp_path, affine):
    import nibabel
    from raw_scans import write_nifti

    from mrgen.data.preparation import prepare_cohort

    case = tmp_path / "raw" / "BraTS19_X_1_1"
    for i, name in enumerate(MODALITIES):
        write_nifti(case / f"{case.name}_{name}.nii.gz", scan(i), affine)
    write_nifti(case / f"{case.name}_seg.nii.gz", lesion(), affine)
    prepare_cohort(LAYOUT, tmp_path / "raw", tmp_path / "store", workers=0, progress=False)
    subject = Store(tmp_path / "store").subjects["BraTS19_X_1_1"]

    assert nibabel.aff2axcodes(subject.affine) == ("R", "A", "S")
    np.testing.assert_allclose(subject.original_affine, affine, atol=1e-6)
    np.testing.assert_array_equal(to_original(subject.read_image(), subject)[3], scan(3))
    np.testing.assert_array_equal(to_original(subject.read_label(), subject), lesion())
    assert to_original(subject.read_label(), subject).shape == subject.original_shape
    # nibabel's own way to canonical orientation is the reference
    reference = nibabel.as_closest_canonical(nibabel.Nifti1Image(scan(1), affine))
    np.testing.assert_array_equal(subject.read_image(["t1ce"])[0], np.asanyarray(reference.dataobj))
    np.testing.assert_allclose(subject.affine, reference.affine, atol=1e-6)


def test_importing_the_store_loads_no_image_library():
    import subprocess
    import sys

    code = (
        "import sys, mrgen.data.store; "
        "print([m for m in ('nibabel', 'SimpleITK', 'scipy', 'yaml', 'torch', 'rich') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
