import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from raw_scans import (
    LAYOUTS,
    scan,
    write_brats2015_case,
    write_brats_case,
    write_nifti,
    write_wmh_case,
)

from mrgen.data.cohorts import find_subjects, recognise_layouts
from mrgen.data.layouts import Layout, read_layouts
from mrgen.errors import UserError

SHIPPED = read_layouts(LAYOUTS)
SCANS = os.environ.get("MRGEN_SCANS")
OWN = {
    "name": "mine",
    "subjects": ["sub-*"],
    "images": {"t1": "*_T1w.nii*", "flair": "*_FLAIR.nii*"},
    "label": "*_mask.nii*",
    "label_values": {0: "background", 7: "plaque"},
}


def summary(subjects):
    return [(s.id, s.patient, s.grade, s.site, s.label is not None) for s in subjects]


def test_every_shipped_layout_is_valid_and_maps_its_own_numbers_to_contiguous_classes():
    years = ("15", "17", "18", "19", "20", "21", "23", "24_gli", "24_ped")
    assert list(SHIPPED) == [*(f"brats20{year}" for year in years), "wmh2017"]
    for layout in SHIPPED.values():
        mapped = set(layout.label_maps["regions"].values()) - {255}
        assert mapped == set(range(1, len(layout.classes["regions"])))


def test_shipped_layouts_survive_omegaconf_and_json():
    import json

    from omegaconf import OmegaConf

    for name, layout in SHIPPED.items():
        assert Layout.from_conf(OmegaConf.load(LAYOUTS / f"{name}.yaml")) == layout
        assert Layout.from_conf(json.loads(json.dumps(layout.to_conf()))) == layout


def test_enhancing_tumour_is_4_until_2021_and_3_in_2023():
    assert SHIPPED["brats2021"].label_lookup("regions")[[0, 1, 2, 4]].tolist() == [0, 1, 2, 3]
    assert SHIPPED["brats2023"].label_lookup("regions")[[0, 1, 2, 3]].tolist() == [0, 1, 2, 3]
    assert SHIPPED["brats2015"].label_lookup("regions")[:5].tolist() == [0, 1, 2, 1, 3]
    assert SHIPPED["brats2015"].label_lookup("native")[:5].tolist() == [0, 1, 2, 3, 4]


def test_other_pathology_of_wmh_is_ignored():
    assert SHIPPED["wmh2017"].label_lookup("regions")[:3].tolist() == [0, 1, 255]


def test_unknown_label_map_is_refused_with_the_valid_names():
    with pytest.raises(UserError, match=r"no labels 'whole'; valid names are regions, native"):
        SHIPPED["brats2019"].label_lookup("whole")


def test_regions_are_numbered_for_the_label_map_that_is_chosen():
    """Of BraTS 2015's own numbers: 1 necrosis, 2 edema, 3 non-enhancing core, 4 enhancing."""
    native = SHIPPED["brats2015"].numbered("native")
    assert native.regions == {"ET": [4], "WT": [1, 2, 3, 4], "TC": [1, 3, 4]}
    assert SHIPPED["brats2019"].numbered("native").regions == {"ET": [4], "WT": [1, 2, 4], "TC": [1, 4]}
    assert SHIPPED["wmh2017"].numbered("native").regions == {"WMH": [1]}  # other pathology is of no region
    assert SHIPPED["brats2015"].numbered("regions") is SHIPPED["brats2015"]
    again = Layout.from_conf(native.to_conf())  # as a run's config keeps it
    assert again == native
    assert again.numbered("native") == native
    assert again.numbered("regions") == SHIPPED["brats2015"]


def test_a_label_map_that_tells_no_regions_apart_is_refused():
    layout = SHIPPED["brats2015"]
    maps = {**layout.label_maps, "whole": {1: 1, 2: 1, 3: 1, 4: 1}, "solid": {1: 255, 2: 1, 3: 2, 4: 255}}
    classes = {**layout.classes, "whole": ["background", "tumour"], "solid": ["background", "edema", "core"]}
    layout = replace(layout, label_maps=maps, classes=classes)
    with pytest.raises(UserError, match=r"labels=whole: .* does not tell its region ET \(enhancing\) from the rest"):
        layout.numbered("whole")
    with pytest.raises(UserError, match=r"region ET .* set data\.labels=regions"):
        layout.numbered("solid")
    assert replace(layout, regions={"WT": [1, 2, 3]}).numbered("whole").regions == {"WT": [1]}
    with pytest.raises(UserError, match=r"no labels 'lobes'; valid names are regions, native, whole, solid"):
        layout.numbered("lobes")
    with pytest.raises(UserError, match=r"data\.labels=whole: BraTS 2015 names classes for regions alone"):
        replace(layout, classes={"regions": classes["regions"]}).numbered("whole")
    with pytest.raises(UserError, match="numbered_for is lobes, expected one of label_maps: regions, native"):
        Layout.from_conf({**SHIPPED["brats2015"].to_conf(), "numbered_for": "lobes"})


def test_brats2015_with_visits_both_nestings_and_one_name_in_both_grades(tmp_path):
    root = tmp_path / "BRATS2015_Training"
    write_brats2015_case(root / "HGG" / "brats_2013_pat0001_1")
    write_brats2015_case(root / "LGG" / "brats_2013_pat0001_1")
    write_brats2015_case(root / "HGG" / "brats_tcia_pat105_0001", flat=True)
    write_brats2015_case(root / "HGG" / "brats_tcia_pat105_0308", flat=True)
    subjects, problems = find_subjects(SHIPPED["brats2015"], root)
    assert not problems
    assert summary(subjects) == [
        ("HGG_brats_2013_pat0001_1", "HGG_brats_2013_pat0001", "HGG", "2013", True),
        ("LGG_brats_2013_pat0001_1", "LGG_brats_2013_pat0001", "LGG", "2013", True),
        ("brats_tcia_pat105_0001", "brats_tcia_pat105", "HGG", "tcia", True),
        ("brats_tcia_pat105_0308", "brats_tcia_pat105", "HGG", "tcia", True),
    ]
    for subject in subjects:  # *T1* would have found T1c as well
        assert "MR_T1." in subject.images["t1"].name
        assert "MR_T1c." in subject.images["t1ce"].name


def test_brats2015_test_folder_has_neither_grade_nor_label(tmp_path):
    write_brats2015_case(tmp_path / "BRATS2015_Testing" / "HGG_LGG" / "brats_2013_pat0103_1", label=False)
    subjects, problems = find_subjects(SHIPPED["brats2015"], tmp_path)
    assert not problems
    assert summary(subjects) == [("brats_2013_pat0103_1", "brats_2013_pat0103", None, "2013", False)]


@pytest.mark.parametrize(("year", "prefix"), [(2017, "Brats17"), (2018, "Brats18"), (2019, "BraTS19")])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_brats_2017_to_2019_training_and_validation(tmp_path, year, prefix, suffix):
    write_brats_case(tmp_path / "Training" / "HGG" / f"{prefix}_CBICA_AAB_1", suffix=suffix)
    write_brats_case(tmp_path / "Training" / "LGG" / f"{prefix}_TCIA10_103_2", suffix=suffix)
    write_brats_case(tmp_path / "Validation" / f"{prefix}_TMC_27374_1", suffix=suffix, label=None)
    (tmp_path / "Training" / "survival_data.csv").write_text("id,age\n")
    subjects, problems = find_subjects(SHIPPED[f"brats{year}"], tmp_path)
    assert not problems
    assert summary(subjects) == [
        (f"{prefix}_CBICA_AAB_1", f"{prefix}_CBICA_AAB", "HGG", "CBICA", True),
        (f"{prefix}_TCIA10_103_2", f"{prefix}_TCIA10_103", "LGG", "TCIA10", True),
        (f"{prefix}_TMC_27374_1", f"{prefix}_TMC_27374", None, "TMC", False),
    ]
    assert [p.name for p in subjects[0].images.values()] == [
        f"{prefix}_CBICA_AAB_1_{m}{suffix}" for m in ("t1", "t1ce", "t2", "flair")
    ]


def test_brats2020_takes_grade_and_site_from_name_mapping(tmp_path):
    train = tmp_path / "MICCAI_BraTS2020_TrainingData"
    write_brats_case(train / "BraTS20_Training_001")
    odd = write_brats_case(train / "BraTS20_Training_355", label=None)
    write_nifti(odd / "W39_1998.09.19_Segm.nii", scan())
    write_brats_case(train / "BraTS20_Training_369")
    (train / "name_mapping.csv").write_text(
        "Grade,BraTS_2017_subject_ID,BraTS_2019_subject_ID,BraTS_2020_subject_ID\n"
        "HGG,NA,BraTS19_CBICA_AAB_1,BraTS20_Training_001\n"
        "LGG,NA,NA,BraTS20_Training_355\n"
    )
    subjects, (note,) = find_subjects(SHIPPED["brats2020"], tmp_path)
    assert "found no row or no Grade for 1 of 3 subjects (BraTS20_Training_369)" in str(note)
    assert summary(subjects) == [
        ("BraTS20_Training_001", "BraTS20_Training_001", "HGG", "CBICA", True),
        ("BraTS20_Training_355", "BraTS20_Training_355", "LGG", None, True),
        ("BraTS20_Training_369", "BraTS20_Training_369", None, None, True),
    ]


def test_brats2021_with_and_without_grade_folders_and_a_subject_wrapped_in_its_own_name(tmp_path):
    write_brats_case(tmp_path / "BraTS2021_00000")
    write_brats_case(tmp_path / "LGG" / "BraTS2021_00002")
    write_brats_case(tmp_path / "BraTS2021_00003" / "BraTS2021_00003")
    subjects, problems = find_subjects(SHIPPED["brats2021"], tmp_path)
    assert not problems
    assert [(s.id, s.grade) for s in subjects] == [
        ("BraTS2021_00000", None),
        ("BraTS2021_00002", "LGG"),
        ("BraTS2021_00003", None),
    ]


def test_brats2023_has_new_sequence_names_and_visits(tmp_path):
    folder = tmp_path / "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData"
    for visit in ("000", "001"):
        write_brats_case(
            folder / f"BraTS-GLI-00005-{visit}", label=(1, 2, 3), names=("t1n", "t1c", "t2w", "t2f"), joint="-"
        )
    subjects, problems = find_subjects(SHIPPED["brats2023"], tmp_path)
    assert not problems
    assert [(s.id, s.patient) for s in subjects] == [
        ("BraTS-GLI-00005-000", "BraTS-GLI-00005"),
        ("BraTS-GLI-00005-001", "BraTS-GLI-00005"),
    ]
    assert {m: p.name[-10:] for m, p in subjects[0].images.items()} == {
        "t1": "t1n.nii.gz",
        "t1ce": "t1c.nii.gz",
        "t2": "t2w.nii.gz",
        "flair": "t2f.nii.gz",
    }


def test_wmh_sites_in_both_nestings_take_pre_images_and_leave_other_observers_alone(tmp_path):
    write_wmh_case(tmp_path / "training" / "Utrecht" / "0")
    write_wmh_case(tmp_path / "training" / "Singapore" / "50")
    write_wmh_case(tmp_path / "training" / "Amsterdam" / "GE3T" / "100")
    write_wmh_case(tmp_path / "GE3T" / "101")
    write_wmh_case(tmp_path / "test" / "Amsterdam" / "Philips_VU .PETMR_01." / "161", label=None)
    write_nifti(tmp_path / "additional_annotations" / "observer_o3" / "training" / "Utrecht" / "0" / "r.nii", scan())
    (tmp_path / "training" / "Utrecht" / "readme.txt").write_text("hello")
    subjects, problems = find_subjects(SHIPPED["wmh2017"], tmp_path)
    assert not problems
    assert summary(subjects) == [
        ("GE3T_100", "GE3T_100", None, "GE3T", True),
        ("GE3T_101", "GE3T_101", None, "GE3T", True),
        ("Philips_VU_.PETMR_01._161", "Philips_VU .PETMR_01._161", None, "Philips_VU", False),
        ("Singapore_50", "Singapore_50", None, "Singapore", True),
        ("Utrecht_0", "Utrecht_0", None, "Utrecht", True),
    ]
    assert all(p.parent.name == "pre" for s in subjects for p in s.images.values())
    assert subjects[0].images["t1"].name == "T1.nii.gz"  # not 3DT1


def test_root_may_be_a_grade_a_site_or_one_subject(tmp_path):
    case = write_brats_case(tmp_path / "HGG" / "BraTS19_CBICA_AAB_1")
    write_wmh_case(tmp_path / "Utrecht" / "0")
    for root in (tmp_path / "HGG", case):
        (subject,), _ = find_subjects(SHIPPED["brats2019"], root)
        assert (subject.id, subject.patient, subject.grade) == ("BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAB", "HGG")
    (subject,), _ = find_subjects(SHIPPED["wmh2017"], tmp_path / "Utrecht")
    assert (subject.id, subject.site) == ("Utrecht_0", "Utrecht")


def test_images_wrapped_in_folders_of_their_own_name_and_hidden_files(tmp_path):
    case = write_brats_case(tmp_path / "BraTS19_CBICA_AAB_1")
    name = "BraTS19_CBICA_AAB_1_t1.nii"
    (case / f"{name}.gz").unlink()
    inner = write_nifti(case / name / name, scan())
    (case / "._BraTS19_CBICA_AAB_1_t2.nii.gz").write_bytes(b"Mac OS X")
    (subject,), problems = find_subjects(SHIPPED["brats2019"], tmp_path)
    assert not problems
    assert subject.images["t1"] == inner


def test_own_layout_from_a_yaml_file_gets_label_maps_by_itself(tmp_path):
    for name in ("sub-01", "sub-02"):
        for i, file in enumerate((f"{name}_T1w.nii.gz", f"{name}_FLAIR.nii.gz", f"{name}_mask.nii.gz")):
            write_nifti(tmp_path / "data" / name / file, scan(i))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(OWN))
    layout = Layout.from_conf(path)
    subjects, problems = find_subjects(layout, tmp_path / "data", ["flair"])
    assert not problems
    assert [(s.id, s.patient, list(s.images)) for s in subjects] == [
        ("sub-01", "sub-01", ["flair"]),
        ("sub-02", "sub-02", ["flair"]),
    ]
    assert layout.label_lookup("regions")[7] == 1
    assert layout.label_lookup("native")[7] == 7
    assert layout.classes["regions"] == ["background", "plaque"]


def test_own_layout_of_flat_files_as_nnunet_has_them(tmp_path):
    layout = Layout.from_conf(
        {
            "name": "flat",
            "subjects": ["imagesTr/*_0000.nii.gz"],
            "fields": {"id": "([^/]+)_0000", "patient": "(P[0-9]+)"},
            "images": {"t1": "/imagesTr/{id}_0000.nii.gz", "flair": "/imagesTr/{id}_0001.nii.gz"},
            "label": "/labelsTr/{id}.nii.gz",
            "label_values": {0: "background", 1: "lesion"},
        }
    )
    for i in (1, 10):  # P1 is a prefix of P10
        for channel in (0, 1):
            write_nifti(tmp_path / "imagesTr" / f"P{i}_v1_000{channel}.nii.gz", scan())
    write_nifti(tmp_path / "labelsTr" / "P1_v1.nii.gz", scan())
    subjects, problems = find_subjects(layout, tmp_path)
    assert not problems
    assert summary(subjects) == [("P10_v1", "P10", None, None, False), ("P1_v1", "P1", None, None, True)]
    assert subjects[1].images["flair"].name == "P1_v1_0001.nii.gz"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lable": "x"}, "unknown key lable; valid keys are name, subjects, images, title"),
        ({"subjects": None}, "missing key subjects; required are name, subjects, images"),
        ({"fields": {"grade": "(HGG"}}, r"fields.grade: '\(HGG' is no regular expression"),
        ({"fields": {"age": "x"}}, "unknown field age; valid fields are id, patient, grade, site"),
        ({"images": {"t1": ["../x"]}}, "images.t1: '../x' is no glob pattern"),
        ({"images": ["t1"]}, "wrong form"),
        ({"label_values": {1: "lesion"}}, r"lacks 0 \(background\)"),
        ({"label_maps": {"regions": {1: 1}}}, r"maps \[1\], expected every one of \[7\]"),
        ({"label_maps": {"regions": {7: 1}}}, "classes.regions has 0 names, expected 2"),
        ({"fields": {"grade": {"column": "Grade"}}}, "names a column, but there is no table"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused_with_what_would(change, message):
    with pytest.raises(UserError, match=message):
        Layout.from_conf({**OWN, **change})


def test_a_layout_file_that_is_no_yaml_says_so(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("subjects: *_t1")
    with pytest.raises(UserError, match=r"bad\.yaml: is no YAML .*quote patterns that start with \*"):
        Layout.from_conf(path)
    with pytest.raises(UserError, match=r"absent\.yaml: cannot be read"):
        Layout.from_conf(tmp_path / "absent.yaml")


def test_missing_sequence_names_subject_folder_expectation_and_way_out(tmp_path):
    case = write_brats_case(tmp_path / "BraTS19_X_1_1")
    write_brats_case(tmp_path / "BraTS19_X_2_1")
    (case / "BraTS19_X_1_1_flair.nii.gz").unlink()
    subjects, problems = find_subjects(SHIPPED["brats2019"], tmp_path)
    assert [s.id for s in subjects] == ["BraTS19_X_2_1"]
    assert [str(p) for p in problems] == [
        f"BraTS19_X_1_1: {case}: found no flair, expected *_flair.nii* (BraTS 2019); "
        "restore the file, or do without: data.modalities=[t1,t1ce,t2]"
    ]
    assert len(find_subjects(SHIPPED["brats2019"], tmp_path, ["t2", "t1"])[0]) == 2


def test_two_files_for_one_sequence_are_a_problem(tmp_path):
    case = write_brats_case(tmp_path / "BraTS19_X_1_1")
    write_nifti(case / "BraTS19_X_1_1_t2.nii", scan())
    subjects, (problem,) = find_subjects(SHIPPED["brats2019"], tmp_path)
    assert not subjects
    assert str(problem) == (
        f"BraTS19_X_1_1: {case}: found 2 files for t2 (BraTS19_X_1_1_t2.nii, BraTS19_X_1_1_t2.nii.gz), "
        "expected one *_t2.nii*; remove the others"
    )


def test_duplicate_ids_are_named_with_both_folders_and_neither_is_taken(tmp_path):
    a = write_brats_case(tmp_path / "HGG" / "BraTS19_X_1_1")
    b = write_brats_case(tmp_path / "copy" / "BraTS19_X_1_1")
    write_brats_case(tmp_path / "HGG" / "BraTS19_X_2_1")
    subjects, (problem,) = find_subjects(SHIPPED["brats2019"], tmp_path)
    assert [s.id for s in subjects] == ["BraTS19_X_2_1"]
    assert str(problem) == (
        f"BraTS19_X_1_1: {a}: found the id BraTS19_X_1_1 2 times (also in {b}), expected once; "
        "remove a copy or tell them apart with fields.id"
    )


def test_unreadable_folders_are_one_line_each_and_the_rest_is_found(tmp_path, monkeypatch):
    """Root may read everything, so the refusal is simulated."""
    case = write_brats_case(tmp_path / "HGG" / "BraTS19_X_1_1")
    write_brats_case(tmp_path / "HGG" / "BraTS19_X_2_1")
    locked = tmp_path / "LGG"
    locked.mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path) in (case, locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("mrgen.data.folders.os.scandir", refuse)
    subjects, problems = find_subjects(SHIPPED["brats2019"], tmp_path)
    assert [s.id for s in subjects] == ["BraTS19_X_2_1"]
    assert [str(p) for p in problems] == [
        f"BraTS19_X_1_1: {case}: cannot be read (Permission denied), expected the subject's folder; "
        "chmod u+rx or mount it",
        f"LGG: {locked}: cannot be read (Permission denied), expected a folder; chmod u+rx or mount it",
    ]


def test_a_root_that_matches_nothing_says_which_layout_it_looks_like(tmp_path):
    write_brats_case(tmp_path / "BraTS2021_00001")
    write_brats_case(tmp_path / "BraTS2021_00002")
    with pytest.raises(UserError) as error:
        find_subjects(SHIPPED["brats2019"], tmp_path, known_layouts=SHIPPED)
    assert str(error.value) == (
        f"data.root={tmp_path}: nothing matches BraTS 2019 (expected **/[Bb]ra[Tt][Ss]19_*_*_*); "
        "the folder looks like BraTS 2021 (2 subjects): use data=brats2021"
    )
    assert recognise_layouts(tmp_path, SHIPPED) == {"brats2021": 2}


def test_a_root_that_looks_like_nothing_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match="it holds nothing at all"):
        find_subjects(SHIPPED["brats2019"], tmp_path, known_layouts=SHIPPED)
    (tmp_path / "archive.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"it holds archive.zip\. Point data.root at the unpacked cohort"):
        find_subjects(SHIPPED["brats2019"], tmp_path, known_layouts=SHIPPED)
    with pytest.raises(UserError, match="no such folder; expected the folder that holds BraTS 2019"):
        find_subjects(SHIPPED["brats2019"], tmp_path / "absent")


def test_unknown_modality_is_refused_with_the_valid_ones(tmp_path):
    with pytest.raises(UserError, match="BraTS 2019 has no apt; it has t1, t1ce, t2, flair"):
        find_subjects(SHIPPED["brats2019"], tmp_path, ["t1", "apt"])
    with pytest.raises(UserError, match=r"data.modalities: found t1 more than once, expected each sequence once"):
        find_subjects(SHIPPED["brats2019"], tmp_path, ["t1", "t2", "t1"])


def test_a_link_that_leads_back_does_not_hang_the_walk(tmp_path):
    case = write_brats_case(tmp_path / "HGG" / "BraTS19_X_1_1")
    (case / "up").symlink_to(tmp_path)
    subjects, problems = find_subjects(SHIPPED["brats2019"], tmp_path)
    assert [s.id for s in subjects] == ["BraTS19_X_1_1"]
    assert not problems


@pytest.mark.skipif(not SCANS, reason="MRGEN_SCANS is unset: real scans are not part of the repository")
@pytest.mark.parametrize("name", ["brats2015", "brats2019", "brats2023"])
def test_real_scans_are_recognised(name):
    assert next(iter(recognise_layouts(Path(SCANS) / name, SHIPPED))) == name


@pytest.mark.parametrize("ending", [".part", ".bak", ".crdownload", "~"])
def test_half_a_download_is_no_scan(tmp_path, ending):
    case = write_brats_case(tmp_path / "HGG" / "BraTS19_X_1_1")
    scan = case / f"{case.name}_t1.nii.gz"
    scan.rename(scan.with_name(scan.name + ending))
    subjects, (problem,) = find_subjects(SHIPPED["brats2019"], tmp_path)
    assert not subjects
    assert problem.kind == "missing sequence: t1"


@pytest.mark.parametrize("link", ["latest", "A"])
def test_a_link_to_a_folder_of_subjects_is_no_second_copy(tmp_path, link):
    write_brats_case(tmp_path / "HGG" / "BraTS19_X_1_1")
    (tmp_path / link).symlink_to("HGG")
    (subject,), problems = find_subjects(SHIPPED["brats2019"], tmp_path)
    assert (subject.grade, problems) == ("HGG", [])
