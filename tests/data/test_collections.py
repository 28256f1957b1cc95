"""Collections of one name's pattern and other label numbers are told apart; masks that users bring are checked."""

import numpy as np
import pytest
from raw_scans import BRATS_AFFINE, LAYOUTS, ellipsoid, lesion, write_brats_case, write_nifti, write_wmh_case

from mrgen.data.cohorts import find_subjects, recognise_layouts
from mrgen.data.layouts import Layout, read_layouts
from mrgen.data.preparation import prepare_cohort
from mrgen.data.store import Store

SHIPPED = read_layouts(LAYOUTS)
NAMES = {"names": ("t1n", "t1c", "t2w", "t2f"), "joint": "-"}
FOLDERS = {
    "brats2023": ["BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-SSA-00002-000"],
    "brats2024_gli": ["BraTS-GLI-00005-100", "BraTS-GLI-00008-103"],
    "brats2024_ped": ["BraTS-PED-00002-000"],
    None: ["BraTS-MEN-00004-000", "BraTS-MET-00001-000"],
}


def prepare(layout, root, store, **options):
    return prepare_cohort(layout, root, store, workers=0, progress=False, **options)


@pytest.mark.parametrize("name", ["brats2023", "brats2024_gli", "brats2024_ped"])
def test_each_layout_takes_its_own_collections_and_names_the_layout_of_the_others(tmp_path, name):
    for folders in FOLDERS.values():
        for folder in folders:
            write_brats_case(tmp_path / folder, label=(1, 2, 3), **NAMES)
    subjects, problems = find_subjects(SHIPPED[name], tmp_path)
    assert [subject.id for subject in subjects] == sorted(FOLDERS[name])
    told = {problem.subject: problem.message for problem in problems}
    for other, folders in FOLDERS.items():
        for folder in folders if other != name else ():
            assert told[folder].startswith("found a scan of another collection")
            assert told[folder].endswith(f"data={other}" if other else "(docs/cohorts.md)")


@pytest.mark.parametrize("name", ["brats2023", "brats2024_gli", "brats2024_ped"])
def test_a_root_of_another_collection_is_recognised(tmp_path, name):
    for folder in FOLDERS[name]:
        write_brats_case(tmp_path / folder, label=(1, 2, 3), **NAMES)
    assert list(recognise_layouts(tmp_path, SHIPPED)) == [name]


@pytest.mark.parametrize("name", ["brats2023", "brats2024_gli", "brats2024_ped"])
@pytest.mark.parametrize("other", ["GoAT", "Africa", "PEDs", "MEN-RT", "Men"])
def test_collections_in_any_case_are_refused(tmp_path, name, other):
    write_brats_case(tmp_path / f"BraTS-{other}-00004-000", label=(1, 2, 3), **NAMES)
    subjects, (problem,) = find_subjects(SHIPPED[name], tmp_path)
    assert not subjects
    assert problem.kind == "another collection"


@pytest.mark.parametrize(
    "folder",
    ["ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData", "BraTS_2023_PED", "BraTS 2023 PED", "brats23-ped", "PED2023"],
)
def test_the_pediatric_tumours_of_2023_are_not_those_of_2024(tmp_path, folder):
    write_brats_case(tmp_path / folder / "BraTS-PED-00002-000", **NAMES)
    subjects, (problem,) = find_subjects(SHIPPED["brats2024_ped"], tmp_path)
    assert not subjects
    assert "the PED of 2023 is numbered otherwise" in problem.message


def test_the_cavity_is_a_region_of_its_own_and_no_part_of_the_tumour():
    layout = SHIPPED["brats2024_gli"]
    assert layout.label_lookup("regions")[:5].tolist() == [0, 1, 2, 3, 4]
    assert layout.classes["regions"][4] == "resection cavity"
    assert layout.regions == {"ET": [3], "WT": [1, 2, 3], "TC": [1, 3], "RC": [4]}


def test_childrens_enhancing_tumour_is_1_in_the_files_and_3_among_the_classes():
    """ET 1, NET 2, CC 3, ED 4 in the files; classes 1 to 3 mean what they mean in the other years."""
    layout, other = SHIPPED["brats2024_ped"], SHIPPED["brats2023"]
    assert layout.label_lookup("regions")[:5].tolist() == [0, 3, 1, 4, 2]
    assert layout.classes["regions"][2:4] == other.classes["regions"][2:4] == ["edema", "enhancing"]
    assert layout.numbered("native").regions == {"ET": [1], "WT": [1, 2, 3, 4], "TC": [1, 2, 3], "CC": [3]}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_are_rounded_within_a_thousandth(tmp_path, dtype):
    case = write_brats_case(tmp_path / "raw" / "BraTS19_X_1_1")
    file = case / f"{case.name}_seg.nii.gz"
    write_nifti(file, lesion().astype(dtype) * dtype(0.99999999775))  # 3.9999999991 for 4
    assert not prepare(SHIPPED["brats2019"], tmp_path / "raw", tmp_path / "store").problems
    (subject,) = Store(tmp_path / "store").subjects.values()
    np.testing.assert_array_equal(subject.read_label(), lesion()[::-1, ::-1])


@pytest.mark.parametrize(
    ("value", "found"),
    [(3.9985, "3.9985 (4 voxels)"), (-1, "-1 (4 voxels)"), (300, "300 (4 voxels)"), (np.nan, "nan (4 voxels)")],
)
def test_label_numbers_that_are_none_are_written_out(tmp_path, value, found):
    case = write_brats_case(tmp_path / "raw" / "BraTS19_X_1_1")
    label = lesion().astype(np.float64)
    label[label == 4] = value
    write_nifti(case / f"{case.name}_seg.nii.gz", label)
    report = prepare(SHIPPED["brats2019"], tmp_path / "raw", None, check=True)
    assert report.bad == [case.name]
    assert any(f"{found}, expected 0, 1, 2, 4 (BraTS 2019)" in str(p) or "NaN" in str(p) for p in report.problems)


# ----- masks of the brain ---------------------------------------------------------------------------------------------


def brought(pattern="*_mask.nii*", layout="brats2019"):
    return Layout.from_conf({**SHIPPED[layout].to_conf(), "brain": pattern})


def test_a_mask_that_the_user_brings_is_the_brain(tmp_path):
    case, brain = write_brats_case(tmp_path / "raw" / "BraTS19_X_1_1"), ellipsoid(size=0.34)
    write_nifti(case / f"{case.name}_mask.nii.gz", brain.astype(np.uint8))
    assert prepare(brought(), tmp_path / "raw", tmp_path / "store").prepared == [case.name]
    (subject,) = Store(tmp_path / "store").subjects.values()
    assert subject.brain_method == "mask"
    np.testing.assert_array_equal(subject.read_brain(), brain[::-1, ::-1])
    assert prepare(brought(), tmp_path / "raw", tmp_path / "store").unchanged == [case.name]
    write_nifti(case / f"{case.name}_mask.nii.gz", ellipsoid(size=0.36).astype(np.float32))
    assert prepare(brought(), tmp_path / "raw", tmp_path / "store").prepared == [case.name]


def test_a_mask_of_a_whole_head(tmp_path):
    from raw_scans import HEAD_AFFINE, head

    case = write_wmh_case(tmp_path / "raw" / "Utrecht" / "0")
    write_nifti(tmp_path / "raw" / "masks" / "Utrecht_0.nii.gz", head()[2].astype(np.uint8), HEAD_AFFINE)
    layout = brought("/masks/Utrecht_0.nii.gz", "wmh2017")
    assert prepare(layout, tmp_path / "raw", tmp_path / "store").prepared == ["Utrecht_0"]
    (subject,) = Store(tmp_path / "store").subjects.values()
    np.testing.assert_array_equal(subject.read_brain(), head()[2])
    assert case.name == "0"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, r"found no brain mask, expected \*_mask.nii\*"),
        (np.zeros((16, 18, 20)), "found an empty mask"),
        (np.ones((16, 18, 20)), "found a mask of 100% of the grid"),
        (2 * ellipsoid(), r"found 2 \(\d+ voxels\), expected 0 and 1"),
        (0.5 * ellipsoid(), r"found 0.5 \(\d+ voxels\), expected 0 and 1"),
        (ellipsoid((16, 18, 19)), "found the shape 16×18×19, expected 16×18×20"),
        (
            np.arange(16)[:, None, None] * np.ones((1, 18, 20)) < 3,
            "found a mask of which .* is it another's, or flipped",
        ),
        (ellipsoid(size=0.1), "which holds .* is it another's"),
    ],
)
def test_a_mask_that_cannot_be_the_brain_is_refused(tmp_path, mask, message):
    case = write_brats_case(tmp_path / "raw" / "BraTS19_X_1_1")
    if mask is not None:
        write_nifti(case / f"{case.name}_mask.nii.gz", np.asarray(mask, np.float32))
    report = prepare(brought(), tmp_path / "raw", None, check=True)
    assert report.bad == [case.name]
    import re

    assert re.search(message, "\n".join(map(str, report.problems)))


def test_a_mask_on_another_grid_is_refused_and_a_store_without_masks_is_not_overwritten(tmp_path):
    from mrgen.errors import UserError

    case = write_brats_case(tmp_path / "raw" / "BraTS19_X_1_1")
    prepare(SHIPPED["brats2019"], tmp_path / "raw", tmp_path / "store")
    affine = BRATS_AFFINE.copy()
    affine[1, 3] += 5
    write_nifti(case / f"{case.name}_mask.nii.gz", ellipsoid().astype(np.uint8), affine)
    with pytest.raises(UserError, match=r"other settings \(label_values, skull_stripped or brain of the layout\)"):
        prepare(brought(), tmp_path / "raw", tmp_path / "store")
    report = prepare(brought(), tmp_path / "raw", None, check=True)
    assert "found an affine up to 5 voxels off" in str(report.problems[0])
