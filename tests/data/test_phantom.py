"""The phantom: same seed, same subject; sequences show what they can show; files lie as the challenges ship them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mrgen.data.phantom import PhantomSubject, grow_cohort, grow_subject
from mrgen.errors import UserError

SPACING = 4.0
SEQUENCES = ("t1", "t1ce", "t2", "flair", "apt")


@pytest.fixture(scope="module")
def tumours() -> list[PhantomSubject]:
    return [grow_subject(seed=0, index=i, spacing=SPACING, sequences=SEQUENCES) for i in range(8)]


@pytest.fixture(scope="module")
def elderly() -> list[PhantomSubject]:
    return [grow_subject(seed=0, index=i, spacing=2.0, pathology="wmh") for i in range(3)]


def white_matter(subject: PhantomSubject) -> np.ndarray:
    """Bright in t1, far from lesions: a rough white matter mask that needs nothing from the phantom's inside."""
    t1 = subject.images["t1"]
    healthy = subject.brain & (subject.label == 0)
    return healthy & (t1 > np.percentile(t1[healthy], 65)) & (t1 < np.percentile(t1[healthy], 95))


def relative(subject: PhantomSubject, sequence: str, mask: np.ndarray) -> float:
    image = subject.images[sequence]
    return float(np.median(image[mask]) / np.median(image[white_matter(subject)]))


# --- one subject -----------------------------------------------------------------------------------------------------


def test_same_seed_same_subject_and_others_differ(tumours: list[PhantomSubject]) -> None:
    again = grow_subject(seed=0, index=0, spacing=SPACING, sequences=SEQUENCES)
    for sequence in SEQUENCES:
        np.testing.assert_array_equal(again.images[sequence], tumours[0].images[sequence])
    np.testing.assert_array_equal(again.native_label, tumours[0].native_label)

    other_seed = grow_subject(seed=1, index=0, spacing=SPACING)
    for other in (tumours[1], other_seed):
        assert not np.array_equal(other.brain, tumours[0].brain)  # another head, not only other noise
        assert not np.array_equal(other.label, tumours[0].label)


def test_sequences_do_not_depend_on_which_are_asked_for(tumours: list[PhantomSubject]) -> None:
    alone = grow_subject(seed=0, index=0, spacing=SPACING, sequences=["flair"])
    np.testing.assert_array_equal(alone.images["flair"], tumours[0].images["flair"])


def test_spacing_changes_the_sampling_and_not_the_subject(tumours: list[PhantomSubject]) -> None:
    fine = grow_subject(seed=0, index=0, spacing=2.5, sequences=["t1"])
    assert fine.label.shape == (96, 96, 62)
    coarse = tumours[0]
    for number in (1, 2, 4):
        here, there = (np.sum(s.label == number) * s.affine[0, 0] ** 3 for s in (fine, coarse))
        assert here == pytest.approx(there, rel=0.15)
    centre = [s.affine @ [*np.mean(np.argwhere(s.label > 0), axis=0), 1] for s in (fine, coarse)]
    np.testing.assert_allclose(centre[0], centre[1], atol=1.5)


def test_anatomy_is_plausible(tumours: list[PhantomSubject]) -> None:
    for subject in tumours:
        litres = subject.brain.sum() * SPACING**3 / 1e6
        assert 1.1 < litres < 2.1
        for axis in range(3):  # the field of view holds the brain
            where = np.flatnonzero(subject.brain.any(axis=tuple(a for a in range(3) if a != axis)))
            assert where[0] > 0
            assert where[-1] < subject.brain.shape[axis] - 1
        mirrored = subject.brain[::-1]
        assert 2 * (subject.brain & mirrored).sum() / (2 * subject.brain.sum()) < 0.99  # no one is symmetric
        for image in subject.images.values():
            assert image.dtype == np.float32
            assert np.all(image[~subject.brain] == 0)
            assert np.all(image[subject.brain] > 0)


def test_tumour_lies_in_the_brain_and_has_a_plausible_size(tumours: list[PhantomSubject]) -> None:
    for subject in tumours:
        assert subject.label.dtype == np.uint8
        assert not (subject.label[~subject.brain] > 0).any()
        assert set(np.unique(subject.label)) <= {0, 1, 2, 4}
        assert 5 < np.sum(subject.label > 0) * SPACING**3 / 1000 < 300  # ml
        np.testing.assert_array_equal(subject.label, np.where(subject.native_label == 3, 1, subject.native_label))


def test_a_quarter_is_low_grade_and_without_enhancement(tumours: list[PhantomSubject]) -> None:
    assert [s.grade for s in tumours].count("LGG") == 2
    for subject in tumours:
        assert (subject.label == 4).any() == (subject.grade == "HGG")


# --- what sequences show, after the medians of real scans ------------------------------------------------------------


def test_tissue_contrast(tumours: list[PhantomSubject]) -> None:
    for subject in tumours:
        # fluid: by its darkness in t1, with a margin to the brain's edge
        from scipy import ndimage

        inner = ndimage.binary_erosion(subject.brain, iterations=3) & (subject.label == 0)
        t1 = subject.images["t1"]
        fluid = inner & (t1 < 0.62 * np.median(t1[white_matter(subject)]))
        assert relative(subject, "t2", fluid) > 1.3
        assert relative(subject, "flair", fluid) < 0.9


def test_tumour_contrast(tumours: list[PhantomSubject]) -> None:
    def typical(sequence: str, number: int) -> float:
        with_it = [s for s in tumours if np.sum(s.native_label == number) > 50]
        return float(np.median([relative(s, sequence, s.native_label == number) for s in with_it]))

    necrosis, edema, solid, enhancing = 1, 2, 3, 4
    assert 1.2 < typical("flair", edema) < 1.9
    assert 1.2 < typical("t2", edema) < 1.9
    assert 0.7 < typical("t1", edema) < 0.95  # hardly visible: as dark as cortex
    assert 1.2 < typical("t1ce", enhancing) < 2.7
    assert typical("t1ce", necrosis) < typical("t1ce", solid) < typical("t1ce", enhancing)
    for sequence in ("t1", "t2", "flair"):
        assert typical(sequence, enhancing) == pytest.approx(typical(sequence, solid), abs=0.12)
    assert typical("apt", enhancing) > typical("apt", edema) + 0.3 > 1.3


def test_metabolism_tells_the_grade_in_apt_alone() -> None:
    high, low = (
        grow_subject(seed=0, index=2, spacing=SPACING, sequences=["t1", "apt"], grade=grade) for grade in ("HGG", "LGG")
    )
    core = np.isin(high.label, (1, 4))
    assert relative(high, "apt", core) > relative(low, "apt", core) + 0.15


def test_without_contrast_agent_nothing_tells_whether_or_where_a_tumour_enhances() -> None:
    """The same subject as high and as low grade: t1, t2, flair are the same, t1ce is not."""
    high, low = (grow_subject(seed=3, index=1, spacing=SPACING, grade=grade) for grade in ("HGG", "LGG"))
    enhancing = high.label == 4
    assert enhancing.sum() > 50
    for sequence in ("t1", "t2", "flair"):
        np.testing.assert_allclose(high.images[sequence], low.images[sequence], rtol=1e-3)
    np.testing.assert_array_equal(np.isin(high.label, (1, 4)), low.label == 1)
    np.testing.assert_array_equal(high.label == 2, low.label == 2)
    assert np.median(high.images["t1ce"][enhancing] / low.images["t1ce"][enhancing]) > 1.3


def test_enhancing_and_solid_tumour_overlap_without_contrast_agent(tumours: list[PhantomSubject]) -> None:
    """How often an enhancing voxel is brighter than a solid one: a coin toss, but in t1ce."""

    def brighter(sequence: str) -> float:
        chances = []
        for subject in tumours:
            image = subject.images[sequence]
            enhancing, solid = image[subject.native_label == 4], image[subject.native_label == 3]
            if min(len(enhancing), len(solid)) > 40:
                chances.append(np.mean(enhancing[:, None] > solid[None, :]))
        assert len(chances) >= 4
        return float(np.mean(chances))

    for sequence in ("t1", "t2", "flair"):
        assert 0.35 < brighter(sequence) < 0.65
    assert brighter("t1ce") > 0.9


def test_brightness_in_flair_alone_does_not_find_the_tumour(tumours: list[PhantomSubject]) -> None:
    """One threshold for all (after z-scoring): far from a perfect Dice, so that context is worth something."""
    scores = []
    for threshold in np.arange(0.5, 3.0, 0.25):
        dice = []
        for subject in tumours:
            flair, brain = subject.images["flair"], subject.brain
            found = brain & ((flair - flair[brain].mean()) / flair[brain].std() > threshold)
            dice.append(2 * np.sum(found & (subject.label > 0)) / (found.sum() + np.sum(subject.label > 0)))
        scores.append(np.mean(dice))
    assert 0.3 < max(scores) < 0.8


def test_second_visit_is_the_same_head_with_a_larger_tumour() -> None:
    first, second = (grow_subject(seed=0, index=3, spacing=SPACING, visit=visit) for visit in (0, 1))
    assert 2 * np.sum(first.brain & second.brain) / (first.brain.sum() + second.brain.sum()) > 0.97
    assert np.sum(second.label > 0) > 1.1 * np.sum(first.label > 0)
    assert not np.array_equal(first.images["t1"], second.images["t1"])


# --- white matter hyperintensities -----------------------------------------------------------------------------------


def test_hyperintensities_are_many_bright_in_flair_and_faint_in_t1(elderly: list[PhantomSubject]) -> None:
    from scipy import ndimage

    for subject in elderly:
        lesion = subject.label == 1
        assert set(np.unique(subject.label)) <= {0, 1, 2}
        assert 1 < lesion.sum() * 0.008 < 60  # ml
        assert ndimage.label(lesion)[1] > 15
        assert not (lesion & ~subject.brain).any()
        # beside the white matter that lies around them, so that the bias field does not count
        around = ndimage.binary_dilation(lesion, iterations=3) & white_matter(subject)
        flair, t1 = (
            np.median(subject.images[s][lesion]) / np.median(subject.images[s][around]) for s in ("flair", "t1")
        )
        assert flair > 1.2
        assert 0.75 < t1 < 0.98


def test_some_have_another_pathology() -> None:
    found = [
        bool((grow_subject(seed=0, index=i, spacing=4.0, pathology="wmh", sequences=["t1"]).label == 2).any())
        for i in range(6)
    ]
    assert sum(found) == 1


def test_wmh_scans_keep_the_skull(elderly: list[PhantomSubject]) -> None:
    for subject in elderly:
        outside = subject.images["t1"][~subject.brain]
        assert (outside > 0).mean() > 0.99  # noise in the air
        assert np.percentile(outside, 95) > 0.5 * np.median(subject.images["t1"][subject.brain])  # scalp


# --- on disk ---------------------------------------------------------------------------------------------------------


def files_below(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


GRADED = r"(HGG|LGG)/({0}_(CBICA_A[A-Z]{{2}}|(TCIA|TMC|2013)_\d+)_1)/\2_(t1|t1ce|t2|flair|seg)\.nii\.gz"
NAMES = {
    "brats2017": GRADED.format("Brats17"),
    "brats2018": GRADED.format("Brats18"),
    "brats2019": GRADED.format("BraTS19"),
    "brats2020": r"(BraTS20_Training_\d{3})/\1_(t1|t1ce|t2|flair|seg)\.nii\.gz",
    "brats2021": r"(BraTS2021_\d{5})/\1_(t1|t1ce|t2|flair|seg)\.nii\.gz",
    "brats2023": r"(BraTS-GLI-\d{5}-00[01])/\1-(t1n|t1c|t2w|t2f|seg)\.nii\.gz",
    "brats2015": r"(HGG|LGG)/(brats_2013_pat\d{4}_1|brats_tcia_pat\d{3}_\d{4})/"
    r"(VSD\.Brain\.XX\.O\.MR_(T1|T1c|T2|Flair)\.\d+|VSD\.Brain_3more\.XX\.O\.OT\.\d+)/\3\.mha",
    "wmh2017": r"(Utrecht|Singapore|Amsterdam/GE3T)/\d+/((pre|orig)/(3DT1|T1|FLAIR)|wmh)\.nii\.gz",
}


@pytest.mark.parametrize("layout", NAMES)
def test_layout(layout: str, tmp_path: Path) -> None:
    import nibabel
    import SimpleITK

    count = 5 if layout in ("brats2015", "brats2023") else 1
    folders = grow_cohort(tmp_path, layout=layout, subjects=count, spacing=5.0)
    assert len(set(folders)) == count
    assert all(folder.is_dir() for folder in folders)
    extra = {"phantom.json", "name_mapping.csv"}
    names = [name for name in files_below(tmp_path) if name not in extra]
    assert len(names) == count * (7 if layout == "wmh2017" else 5)
    for name in names:
        assert re.fullmatch(NAMES[layout], name), name

    numbers = set()
    for name in names:
        is_label = "seg" in name or "OT" in name or "wmh" in name
        if name.endswith(".mha"):
            image = SimpleITK.ReadImage(str(tmp_path / name))
            volume = SimpleITK.GetArrayFromImage(image).T
            assert image.GetSpacing() == (5.0, 5.0, 5.0)
        else:
            image = nibabel.load(tmp_path / name)
            volume = np.asarray(image.dataobj)
            np.testing.assert_allclose(image.header.get_zooms(), 5.0)
        assert volume.dtype == (np.uint8 if is_label else np.int16)
        if layout != "wmh2017":
            assert volume.shape == (48, 48, 31)
            assert volume[0, 0, 0] == 0
        if is_label:
            numbers |= set(np.unique(volume).tolist())
    expected = {"brats2015": {0, 1, 2, 3, 4}, "brats2023": {0, 1, 2, 3}, "wmh2017": {0, 1}}.get(layout, {0, 1, 2, 4})
    assert numbers - {2} == expected - {2}  # 2 is edema (always) or other pathology (sometimes)
    if layout in ("brats2015", "brats2023"):
        assert folders[3].name[:-4] == folders[4].name[:-4]  # two visits of one patient


def test_files_hold_the_subject_whatever_the_axes(tmp_path: Path) -> None:
    import nibabel

    folder = grow_cohort(tmp_path, layout="brats2019", subjects=1, spacing=4.0)[0]
    image = nibabel.load(next(folder.glob("*_t1.nii.gz")))
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    turned = np.asarray(nibabel.as_closest_canonical(image).dataobj)
    subject = grow_subject(seed=0, index=0, spacing=4.0)
    np.testing.assert_allclose(turned, subject.images["t1"], atol=0.51)


def test_singapore_comes_in_two_orientations_of_one_head(tmp_path: Path) -> None:
    import nibabel

    folders = grow_cohort(tmp_path, layout="wmh2017", subjects=5, spacing=4.0)
    images = [nibabel.load(folders[i] / "pre" / "FLAIR.nii.gz") for i in (1, 4)]
    assert {image.shape for image in images} == {(58, 64, 36), (64, 58, 36)}
    assert {nibabel.as_closest_canonical(image).shape for image in images} == {(58, 64, 36)}


def test_stopped_and_resumed_is_the_same_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mrgen.data.phantom.subject as module

    real, calls = module.grow_subject, []

    def stop_at_second(**settings: object) -> PhantomSubject:
        calls.append(settings)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(**settings)  # type: ignore[arg-type]

    grow_cohort(tmp_path / "whole", subjects=3, spacing=5.0)
    monkeypatch.setattr(module, "grow_subject", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        grow_cohort(tmp_path / "stopped", subjects=3, spacing=5.0, workers=1)
    there = [name for name in files_below(tmp_path / "stopped") if name.endswith("_seg.nii.gz")]
    assert len(there) in (1, 2)  # the worker may have finished one more
    calls += [{}] * 3  # not to be stopped again
    before = len(calls)
    grow_cohort(tmp_path / "stopped", subjects=3, spacing=5.0)
    assert len(calls) - before == 3 - len(there)  # what was there was kept
    assert files_below(tmp_path / "stopped") == files_below(tmp_path / "whole")


def test_more_subjects_are_added(tmp_path: Path) -> None:
    first = grow_cohort(tmp_path, subjects=1, spacing=5.0)
    before = files_below(first[0])
    assert grow_cohort(tmp_path, subjects=2, spacing=5.0)[:1] == first
    assert files_below(first[0]) == before
    with pytest.raises(UserError, match="subjects is 2, asked for is 1"):
        grow_cohort(tmp_path, subjects=1, spacing=5.0)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One subject at 5 mm. Read only."""
    folder = tmp_path_factory.mktemp("cohort")
    grow_cohort(folder, subjects=1, spacing=5.0)
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed is 0, asked for is 1"),
        ({"spacing": 4.0}, "spacing is 5.0, asked for is 4.0"),
        ({"layout": "brats2018"}, "layout is brats2019"),
        ({"sequences": ["t1"]}, "sequences is"),
        ({"skull": True}, "skull is False"),
    ],
)
def test_other_settings_are_refused(change: dict, named: str, cohort: Path) -> None:
    before = files_below(cohort)
    with pytest.raises(UserError, match=named):
        grow_cohort(cohort, **{"subjects": 1, "spacing": 5.0, **change})
    assert files_below(cohort) == before


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="holds no phantom"):
        grow_cohort(tmp_path, subjects=1, spacing=5.0)
    assert list(files_below(tmp_path)) == ["scan.nii.gz"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"layout": "brats2016"}, "valid layouts are brats2015"),
        ({"sequences": ["t1", "pd"]}, "no sequence pd"),
        ({"layout": "wmh2017", "sequences": ["t2"]}, "no sequence t2"),
        ({"subjects": 0}, "subjects is 0"),
        ({"spacing": 0.0}, "spacing is 0"),
    ],
)
def test_what_cannot_be_grown_is_said(wrong: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        grow_cohort(tmp_path / "cohort", **wrong)
    assert not (tmp_path / "cohort").exists()


def test_apt_and_skull_are_written_when_asked_for(tmp_path: Path) -> None:
    import nibabel

    sequences = ["t1", "t1ce", "t2", "flair", "apt"]
    folder = grow_cohort(tmp_path, subjects=1, spacing=5.0, sequences=sequences, skull=True)[0]
    assert len(list(folder.glob("*_apt.nii.gz"))) == 1
    t1 = np.asarray(nibabel.load(next(folder.glob("*_t1.nii.gz"))).dataobj)
    assert (t1 > 0).mean() > 0.9


def test_import_is_cheap() -> None:
    heavy = ("scipy", "nibabel", "nilearn", "SimpleITK", "torch")
    code = f"import sys, mrgen.data.phantom; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
