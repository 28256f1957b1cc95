"""The atlas: a mean by hand on tiny subjects, what is saved, and heads that lie differently brought into one space."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK
import torch
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from mrgen.data.alignment import mni_affine, mni_grid
from mrgen.data.atlas import Atlas
from mrgen.data.layouts import Layout
from mrgen.data.normalisation import Gaussian, MinMax, Stored, ZScore
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.errors import UserError
from mrgen.launch.paths import CONF_DIR

LAYOUT = Layout.from_conf(CONF_DIR / "data" / "layout" / "brats2019.yaml")
BOTH = ("t1", "flair")
SHAPE = (4, 3, 5)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def tiny(folder, id, seed, **changed):
    """A subject of random intensities, its brain everywhere but in the first plane, without a lesion."""
    image = np.random.default_rng(seed).integers(1, 100, (2, *changed.pop("shape", SHAPE))).astype(np.int16)
    brain = np.ones(image.shape[1:], bool)
    brain[0] = False
    given = {"image": image, "brain": brain, "label": np.zeros(brain.shape), "affine": AFFINE, **changed}
    return write_subject(folder, id=id, **given)


@pytest.fixture
def folder(tmp_path):
    write_cohort(tmp_path / "store", LAYOUT, BOTH)
    return tmp_path / "store"


@pytest.fixture
def three(folder):
    """Lesions: A at (1, 1, 1) and (2, 1, 1), B at (1, 1, 1) the ignored 255, C at (1, 1, 1)."""
    labels = np.zeros((3, *SHAPE), np.uint8)
    labels[0, 1:3, 1, 1], labels[1, 1, 1, 1], labels[2, 1, 1, 1] = 1, 255, 4
    return [tiny(folder, id, seed, label=labels[seed]) for seed, id in enumerate("ABC")]


# ----- the mean --------------------------------------------------------------------------------------------------


def test_the_mean_by_hand_without_the_lesions(three):
    atlas = Atlas.fit(three, BOTH, Stored(masked=False))
    assert (atlas.mean.dtype, atlas.mean.shape, atlas.shape) == (np.float32, (2, *SHAPE), SHAPE)
    a, b, c = (subject.read_image().astype(float) for subject in three)
    expected = (a + b + c) / 3
    expected[:, 2, 1, 1] = (b + c)[:, 2, 1, 1] / 2  # A's lesion
    everybodys = 1, 1, 1
    kept = np.ones(SHAPE, bool)
    kept[everybodys] = False
    np.testing.assert_allclose(atlas.mean[:, kept], expected[:, kept], rtol=1e-6)
    # where all have a lesion: one of the six voxels beside it
    beside = [(0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)]
    assert any(np.array_equal(atlas.mean[:, 1, 1, 1], atlas.mean[(slice(None), *voxel)]) for voxel in beside)


@pytest.mark.parametrize("normalisation", [ZScore(), MinMax(), Gaussian()])
def test_it_is_on_the_scale_of_the_normalisation(three, normalisation):
    atlas = Atlas.fit(three, ["flair"], normalisation)
    total = np.zeros(SHAPE)
    for subject in three:
        image, brain = torch.from_numpy(subject.read_image(["flair"])), torch.from_numpy(subject.read_brain())
        statistics = [subject.statistics["flair"]]
        if isinstance(normalisation, Gaussian):
            statistics = [normalisation.of(subject, "flair")]
        total += normalisation(image, brain, statistics)[0].numpy()
    np.testing.assert_allclose(atlas.mean[0, 3], total[3] / 3, rtol=1e-5, atol=1e-6)
    assert atlas.scale == normalisation.scale
    if normalisation.outside is not None:
        assert (atlas.mean[0, 0] == 0).all()
        assert atlas.background[0] == 0
    else:
        assert atlas.background[0] < atlas.mean.min()


def test_only_the_given_subjects_count_and_their_order_does_not(three, folder):
    alone = Atlas.fit(three[:2], BOTH, ZScore())
    tiny(folder, "D", 9)  # another subject in the store
    for again in (Atlas.fit(three[1::-1], BOTH, ZScore()), Atlas.fit(three[:2], BOTH, ZScore())):
        np.testing.assert_array_equal(alone.mean, again.mean)
    assert alone.subjects == alone.patients == ("A", "B")
    assert not np.array_equal(alone.mean, Atlas.fit(three, BOTH, ZScore()).mean)


def test_two_visits_of_one_patient_are_one_patient(folder):
    atlas = Atlas.fit([tiny(folder, id, 0, patient="P") for id in ("v2", "v1")], BOTH, ZScore())
    assert (atlas.patients, atlas.subjects) == (("P",), ("v1", "v2"))


def test_what_cannot_be_averaged(three, folder):
    with pytest.raises(UserError, match=r"found no training subjects.*data\.split"):
        Atlas.fit([], BOTH, ZScore())
    with pytest.raises(UserError, match=r"D has no label"):
        Atlas.fit([*three, tiny(folder, "D", 9, label=None)], BOTH, ZScore())
    with pytest.raises(UserError, match=r"the store holds t1, flair, not t2"):
        Atlas.fit(three, ("t1", "t2"), ZScore())


# ----- slices ----------------------------------------------------------------------------------------------------


def test_slices_come_by_sequence_with_the_ends_replicated(three):
    atlas = Atlas.fit(three, BOTH, Stored(masked=False))
    t1, flair = atlas.mean
    for z, (below, above) in {0: (0, 1), 2: (1, 3), 4: (3, 4)}.items():
        expected = [sequence[..., i] for sequence in (t1, flair) for i in (below, z, above)]
        np.testing.assert_array_equal(atlas.slices(z), np.stack(expected))
    for z in (-1, 5):
        with pytest.raises(IndexError):
            atlas.slices(z)


def test_a_crop_is_the_slices_of_its_z_and_background_beyond_the_volume(three):
    atlas = Atlas.fit(three, BOTH, Gaussian())
    crop = atlas.crop(((-1, 3), (1, 5), (3, 6)))
    assert (crop.shape, crop.dtype) == ((6, 4, 4, 3), np.float32)
    for i, z in enumerate((3, 4)):
        np.testing.assert_array_equal(crop[:, 1:, :2, i], atlas.slices(z)[:, :3, 1:])
    outside = np.ones(crop.shape[1:], bool)
    outside[1:, :2, :2] = False
    np.testing.assert_array_equal(crop[:, outside], np.repeat(atlas.background, 3)[:, None].repeat(outside.sum(), 1))
    np.testing.assert_array_equal(
        atlas.crop(((9, 11), (0, 2), (0, 1))), np.repeat(atlas.background, 3)[:, None, None, None] * np.ones((2, 2, 1))
    )


def test_a_crop_is_a_copy(three):
    atlas = Atlas.fit(three, BOTH, ZScore())
    before = atlas.mean.copy()
    atlas.crop([(0, n) for n in SHAPE])[:] = 7
    np.testing.assert_array_equal(atlas.mean, before)


# ----- one space -------------------------------------------------------------------------------------------------


def test_in_one_space_the_atlas_is_every_subjects(phantom_store):
    subjects = list(Store(phantom_store).subjects.values())
    atlas = Atlas.fit(subjects[:4], ("t1", "t1ce", "t2", "flair"), ZScore())
    assert atlas.one_space
    assert all(atlas.on(subject) is atlas for subject in subjects)
    np.testing.assert_array_equal(atlas.affine, subjects[0].affine)
    assert atlas.slices(15).shape == (12, *subjects[0].shape[:2])
    # an average brain looks more like somebody who is not in it than another person's does
    images = [
        ZScore()(torch.from_numpy(s.read_image(["t1"])), torch.from_numpy(s.read_brain()), [s.statistics["t1"]])[0]
        for s in subjects
    ]
    alike = [np.corrcoef(images[4].ravel(), other.ravel())[0, 1] for other in (*images[:4], atlas.mean[0])]
    assert alike[-1] > max(alike[:-1])


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"shape": (4, 3, 6)}, r"4 × 3 × 6 voxels of 2 × 2 × 2 mm from \(0, 0, 0\)"),
        ({"affine": AFFINE + np.eye(4)[:, [3]] * [0, 0, 0, 0] + np.diag([1, 0, 0, 0])}, r"voxels of 3 × 2 × 2 mm"),
        ({"affine": np.block([[AFFINE[:3, :3], np.array([[0], [5], [0]])], [0, 0, 0, 1]])}, r"from \(0, 5, 0\) mm"),
    ],
)
def test_a_subject_on_another_grid_is_refused_where_the_cohort_is_in_one_space(three, folder, changed, found):
    atlas = Atlas.fit(three, BOTH, ZScore())
    with pytest.raises(UserError, match=rf"D: found .*{found}.*expected the atlas's 4 × 3 × 5 voxels.*in one space"):
        atlas.on(tiny(folder, "D", 9, **changed))


# ----- the file --------------------------------------------------------------------------------------------------


def test_saved_and_loaded_bit_for_bit(three, tmp_path):
    atlas = Atlas.fit(three, BOTH, Gaussian())
    atlas.save(tmp_path / "run" / "atlas")
    again = Atlas.load(tmp_path / "run" / "atlas")
    for name in ("mean", "background", "affine"):
        one, other = getattr(atlas, name), getattr(again, name)
        assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes())
    for name in ("one_space", "modalities", "scale", "patients", "subjects", "shape", "pull"):
        assert getattr(again, name) == getattr(atlas, name), name
    assert sorted(path.name for path in (tmp_path / "run" / "atlas").iterdir()) == ["atlas.json", "atlas.npz"]
    table = json.loads((tmp_path / "run" / "atlas" / "atlas.json").read_text())
    assert table["patients"] == ["A", "B", "C"]
    assert table["modalities"] == ["t1", "flair"]
    assert table["shape"] == list(SHAPE)
    assert table["affine"] == AFFINE.tolist()


def test_a_missing_damaged_or_strange_atlas_says_so(three, tmp_path):
    good = tmp_path / "good"
    Atlas.fit(three, BOTH, ZScore()).save(good)

    def damaged(name, change):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        change(bad / name)
        return bad

    with pytest.raises(UserError, match=r"found no atlas\.json"):
        Atlas.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"found no atlas\.npz"):
        Atlas.load(damaged("atlas.npz", lambda path: path.unlink()))
    for change in (
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: np.savez(path, mean=np.array([{}], dtype=object)),  # a pickle
    ):
        with pytest.raises(UserError, match=r"the atlas cannot be read \(atlas\.npz is not what atlas\.json"):
            Atlas.load(damaged("atlas.npz", change))
    for content in ("{", "[]", "{}", '{"version": 1}', "\x00"):
        with pytest.raises(UserError, match=r"the atlas cannot be read|expected the atlas of a run"):
            Atlas.load(damaged("atlas.json", lambda path, content=content: path.write_text(content)))

    def other_type(path):
        path.write_text(path.read_text().replace('"one_space": true', '"one_space": []'))

    with pytest.raises(UserError, match=r"the atlas cannot be read \(one_space \[\]"):
        Atlas.load(damaged("atlas.json", other_type))
    with pytest.raises(UserError, match="found atlas version 9, expected 1"):
        Atlas.load(damaged("atlas.json", lambda path: path.write_text('{"version": 9}')))


def test_no_pickle_is_opened(three, tmp_path):
    """Even where somebody has made the table fit."""
    import hashlib

    Atlas.fit(three, BOTH, ZScore()).save(tmp_path)
    np.savez(tmp_path / "atlas.npz", mean=np.array([{}], dtype=object), background=np.zeros(2), affine=np.eye(4))
    table = json.loads((tmp_path / "atlas.json").read_text())
    table["sha256"] = hashlib.sha256((tmp_path / "atlas.npz").read_bytes()).hexdigest()
    (tmp_path / "atlas.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"cannot be read \(object"):
        Atlas.load(tmp_path)


def test_a_folder_that_cannot_be_written_says_so(three, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the atlas cannot be written.*choose another folder"):
        Atlas.fit(three, BOTH, ZScore()).save(tmp_path / "file")


# ----- heads that lie differently ----------------------------------------------------------------------------------


def moved(subject, angles, shift):
    """The same scan of a head that lay otherwise: turned by degrees about x, y, z and shifted by mm."""
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix(), shift
    return replace(subject, affine=move @ subject.affine), move


@pytest.fixture(scope="module")
def elderly(wmh_store):
    """One subject of each site: three fields of view, and heads that lie as heads do."""
    subjects = {subject.site: subject for subject in Store(wmh_store).subjects.values()}
    ways = {
        "GE3T": ((12, 0, 8), (0, 0, 0)),
        "Singapore": ((-10, 5, 0), (15, -10, 0)),
        "Utrecht": ((0, 0, -12), (0, 8, 20)),
    }
    return [moved(subjects[site], *way)[0] for site, way in ways.items()]


@pytest.fixture(scope="module")
def aligned(elderly):
    return Atlas.fit(elderly, BOTH, ZScore())


def to_subject(atlas, subject):
    """The alignment that a view was made with: MNI mm to the subject's."""
    return subject.affine @ np.linalg.inv(atlas.on(subject).pull) @ np.linalg.inv(atlas.affine)


def mean_dice(masks):
    pairs = [(masks[i], masks[j]) for i in range(len(masks)) for j in range(i)]
    return np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs])


def test_aligned_brains_lie_on_each_other(elderly, aligned):
    assert not aligned.one_space

    def in_mni(subject, to_subject):
        pull = np.linalg.inv(subject.affine) @ to_subject @ aligned.affine
        brain = subject.read_brain().astype(np.float32)
        return affine_transform(brain, pull[:3, :3], pull[:3, 3], aligned.shape, order=1) > 0.5

    before = mean_dice([in_mni(subject, np.eye(4)) for subject in elderly])
    after = mean_dice([in_mni(subject, to_subject(aligned, subject)) for subject in elderly])
    assert before < 0.75
    assert after > 0.84
    # and on the template's brain
    shape, affine = mni_grid(5)
    assert (shape, aligned.shape) == (aligned.shape, shape)
    np.testing.assert_array_equal(affine, aligned.affine)


def test_seen_through_a_subject_the_atlas_lies_on_that_subject(elderly, aligned):
    for subject in elderly:
        image = ZScore()(
            torch.from_numpy(subject.read_image(["t1"])),
            torch.from_numpy(subject.read_brain()),
            [subject.statistics["t1"]],
        )[0].numpy()
        view = aligned.on(subject)
        assert view.shape == subject.shape
        slices = np.stack([view.slices(z) for z in range(subject.shape[2])], axis=-1)
        assert slices.shape == (6, *subject.shape)
        unaligned = replace(view, pull=np.linalg.inv(aligned.affine) @ subject.affine)
        t1 = [np.corrcoef(image.ravel(), a.crop([(0, n) for n in a.shape])[1].ravel())[0, 1] for a in (view, unaligned)]
        assert t1[0] > 0.6
        assert t1[0] > t1[1] + 0.3
        np.testing.assert_array_equal(slices[0, ..., 1:], slices[1, ..., :-1])  # t1 at z − 1 and at z
        np.testing.assert_array_equal(slices[0, ..., 0], slices[1, ..., 0])
        np.testing.assert_array_equal(slices[5, ..., -1], slices[4, ..., -1])  # flair


def test_a_crop_of_a_view_is_cut_from_the_whole(elderly, aligned):
    view = aligned.on(elderly[0])
    whole = view.crop([(0, n) for n in view.shape])
    part = view.crop(((5, 20), (-2, 30), (8, 11)))
    np.testing.assert_allclose(part[:, :, 2:], whole[:, 5:20, :30, 8:11], atol=1e-5)
    assert (part[:, :, :2] == 0).all()


def test_a_head_that_lay_otherwise_ends_in_the_same_place(elderly, aligned):
    subject = elderly[1]
    points = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-90, 60) for z in (-40, 70)]).T  # MNI mm
    other, move = moved(subject, (15, -8, 20), (30, -20, 10))
    off = np.linalg.inv(move) @ mni_affine(other) @ points - to_subject(aligned, subject) @ points
    assert np.linalg.norm(off[:3], axis=0).max() < 2  # mm


def test_the_alignment_is_the_same_bit_for_bit_whatever_the_threads_which_stay_as_they_were(elderly, aligned):
    before = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    try:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(before + 1)
        again = replace(aligned, _known={}).on(elderly[2]).pull
        assert SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads() == before + 1
    finally:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    assert again.tobytes() == aligned.on(elderly[2]).pull.tobytes()


def test_a_subject_is_aligned_once(elderly, aligned, monkeypatch):
    asked = []
    monkeypatch.setattr("mrgen.data.atlas.mni_affine", lambda subject: asked.append(subject.id) or np.eye(4))
    for subject in elderly:  # those of training were when the atlas was made
        aligned.on(subject)
    assert asked == []
    other = replace(elderly[0], revision="prepared anew")
    for _ in range(2):
        view = aligned.on(other)
    assert asked == [other.id]
    np.testing.assert_allclose(view.pull, np.linalg.inv(aligned.affine) @ other.affine, atol=1e-9)


def test_a_loaded_atlas_gives_the_same_views(elderly, aligned, tmp_path):
    aligned.on(elderly[0]).save(tmp_path)  # a view saves the atlas that it is of
    loaded = Atlas.load(tmp_path)
    assert loaded.shape == aligned.shape
    assert loaded.mean.tobytes() == aligned.mean.tobytes()
    np.testing.assert_array_equal(loaded.on(elderly[0]).slices(12), aligned.on(elderly[0]).slices(12))


def test_lesions_leak_into_no_neighbour_when_resampled(elderly, tmp_path, monkeypatch):
    """A constant brain with lesions of 30,000 stays constant."""
    monkeypatch.setattr("mrgen.data.atlas.mni_affine", lambda subject: np.diag([1.03, 0.98, 1.01, 1]))
    write_cohort(tmp_path, LAYOUT, ["flair"])
    subjects = []
    for like in elderly[:2]:
        label = np.random.default_rng(0).integers(0, 2, like.shape)
        image = np.where(label, 30000, 50)[None]
        brain = np.ones(like.shape, bool)
        subjects.append(write_subject(tmp_path, id=like.id, image=image, brain=brain, label=label, affine=like.affine))
    atlas = Atlas.fit(subjects, ["flair"], Stored())
    assert ((atlas.mean < 1) | (abs(atlas.mean - 50) < 1e-2)).all()  # 0 beyond both fields of view
    assert (atlas.mean > 1).mean() > 0.3


def test_without_a_t1_the_first_sequence_is_aligned(elderly, aligned, tmp_path):
    write_cohort(tmp_path, LAYOUT, ["flair"])
    subject = elderly[0]
    alone = write_subject(
        tmp_path,
        id="A",
        image=subject.read_image(["flair"]),
        brain=subject.read_brain(),
        affine=subject.affine,
    )
    points = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-90, 60) for z in (-40, 70)]).T  # MNI mm
    off = mni_affine(alone) @ points - to_subject(aligned, subject) @ points
    assert 0 < np.linalg.norm(off[:3], axis=0).mean() < 6  # mm, near but not the T1's


def test_what_cannot_be_aligned_is_named(elderly, tmp_path):
    write_cohort(tmp_path, LAYOUT, ["t1"])
    subject = elderly[0]
    empty = {"image": np.zeros((1, *subject.shape)), "brain": np.zeros(subject.shape, bool), "affine": subject.affine}
    with pytest.raises(UserError, match=r"A: its t1 could not be aligned.*found nothing in the brain mask"):
        mni_affine(write_subject(tmp_path, id="A", **empty))
    speck = np.zeros(subject.shape, bool)
    speck[10:12, 10:12, 10:12] = True
    other = write_subject(tmp_path, id="B", image=subject.read_image(["t1"]), brain=speck, affine=subject.affine)
    with pytest.raises(UserError, match=r"B: its t1 could not be aligned.*overlap by a Dice of 0\.\d\d, expected 0\.4"):
        mni_affine(other)


def test_a_registration_that_gives_up_is_named_and_the_threads_stay_as_they_were(elderly, monkeypatch):
    def give_up(*_):
        raise RuntimeError("All samples map outside moving image buffer")

    monkeypatch.setattr(SimpleITK.ImageRegistrationMethod, "Execute", give_up)
    before = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    with pytest.raises(UserError, match=rf"{elderly[0].id}: its t1 could not be aligned.*gave up; look at the scan"):
        mni_affine(elderly[0])
    assert SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads() == before
