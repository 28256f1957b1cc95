"""mrgen-prepare: from a cohort on disk, or one that it grows, to a checked store."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mrgen.data.store import Store
from mrgen.launch.paths import CONF_DIR
from tests.launch.tools import Called

Script = Callable[..., Called]
SMALL = ("data.phantom.subjects=3", "data.phantom.spacing=5", "workers=1")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort in the BraTS 2019 layout, three subjects, as if downloaded. Read only."""
    from mrgen.data.phantom import grow_cohort

    root = tmp_path_factory.mktemp("raw") / "MICCAI_BraTS_2019"
    grow_cohort(root, layout="brats2019", subjects=3, spacing=5, workers=1)
    return root


def files(*folders: Path) -> dict[Path, int]:
    """What lies there and when it was written."""
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def spoilt(raw: Path, tmp_path: Path) -> Path:
    """A copy of the cohort whose first subject has lost a sequence."""
    root = tmp_path / "spoilt"
    shutil.copytree(raw, root)
    sorted(root.rglob("*_t2.nii*"))[0].unlink()
    return root


# ----- the phantom, written in the challenges' layouts ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "name", "layout", "sequences", "patients"),
    [
        (["data/layout=brats2015", "data.phantom.subjects=5"], "phantom_brats2015_5mm_n5_s0", "brats2015", 4, 4),
        (["data/layout=brats2023"], "phantom_brats2023_5mm_n3_s0", "brats2023", 4, 3),
        (["data=phantom_wmh"], "phantom_wmh2017_5mm_n3_s0", "wmh2017", 2, 3),
    ],
)
def test_a_phantom_is_grown_in_a_challenges_layout_and_read_back(
    mrgen: Script, tmp_path: Path, overrides: list[str], name: str, layout: str, sequences: int, patients: int
):
    """BraTS 2015 holds second visits: five scans of four patients."""
    called = mrgen("prepare", *(o for o in overrides if o.startswith("data=")), *SMALL, *overrides)
    assert called.code == 0, called.err
    assert called.out.splitlines()[-1] == f"store: {tmp_path}/stores/{name}"
    store = Store(tmp_path / "stores" / name)
    assert (store.layout.name, len(store.modalities)) == (layout, sequences)
    assert len({subject.patient for subject in store.subjects.values()}) == patients
    assert all(subject.label_counts for subject in store.subjects.values())
    raw = {path.name for path in (tmp_path / "cohorts" / name).rglob("*") if path.is_file()}
    assert any(file.endswith((".mha", "-t1n.nii.gz", "FLAIR.nii.gz")) for file in raw)


def test_a_second_call_prepares_nothing_again(mrgen: Script, tmp_path: Path, raw: Path):
    arguments = ("data=brats2019", f"data.root={raw}", "workers=1")
    assert "3 prepared" in mrgen("prepare", *arguments).out
    subjects = [path for path in (tmp_path / "stores" / "brats2019").iterdir() if path.is_dir()]
    before = files(*subjects)
    called = mrgen("prepare", *arguments)
    assert called.code == 0
    assert "3 unchanged" in called.out
    assert len(subjects) == 3
    assert files(*subjects) == before


def test_sequences_can_be_chosen(mrgen: Script, tmp_path: Path, raw: Path):
    arguments = ("data=brats2019", f"data.root={raw}", "data.modalities=[flair,t1]", f"data.store={tmp_path}/two")
    assert mrgen("prepare", *arguments, "workers=1").code == 0
    assert Store(tmp_path / "two").modalities == ("flair", "t1")


def test_forgetting_the_modalities_leaves_a_good_store_alone_whatever_strict_says(
    mrgen: Script, tmp_path: Path, raw: Path
):
    arguments = ("data=brats2019", f"data.root={raw}", f"data.store={tmp_path}/two", "workers=0")
    assert mrgen("prepare", *arguments, "data.modalities=[flair,t1]").code == 0
    before = files(tmp_path / "two")
    called = mrgen("prepare", *arguments, "strict=false")
    assert called.code == 1
    assert "data.modalities=[flair,t1] keeps them" in called.message
    assert files(tmp_path / "two") == before
    assert "3 unchanged" in mrgen("prepare", *arguments, "data.modalities=[flair,t1]", "verify=true").out
    called = mrgen("prepare", *arguments, "prune=true")
    assert "3 prepared" in called.out
    assert Store(tmp_path / "two").modalities == ("t1", "t1ce", "t2", "flair")


# ----- checking ------------------------------------------------------------------------------------------------------


def test_checking_writes_nothing(mrgen: Script, tmp_path: Path, raw: Path):
    before = files(raw, tmp_path)
    called = mrgen("prepare", "data=brats2019", f"data.root={raw}", "check=true", "workers=1")
    assert called.code == 0, called.err
    assert "3 good" in called.out
    assert "store:" not in called.out
    assert files(raw, tmp_path) == before


def test_a_bad_subject_is_named_and_left_out(mrgen: Script, tmp_path: Path, raw: Path):
    root = spoilt(raw, tmp_path)
    arguments = ("data=brats2019", f"data.root={root}", f"data.store={tmp_path}/store", "workers=1")
    called = mrgen("prepare", *arguments)
    assert called.code == 1
    assert "Traceback" not in called.err
    assert "2 prepared" in called.out
    assert "1 bad" in called.out
    assert "t2" in called.out
    assert len(Store(tmp_path / "store")) == 2  # the good ones are there all the same

    called = mrgen("prepare", *arguments, "strict=false")
    assert called.code == 0
    assert "1 bad" in called.out


def test_a_name_that_the_terminal_cannot_show_is_shown_as_bytes(raw: Path, tmp_path: Path):
    root = spoilt(raw, tmp_path)
    folder = next(path for path in root.rglob("BraTS19_*") if path.is_dir() and not list(path.glob("*_t2.nii*")))
    folder = folder.rename(folder.with_name("BraTS19_X_\udcff_1"))  # a byte that is no UTF-8
    command = [sys.executable, "-m", "mrgen.prepare", "data=brats2019", f"data.root={root}", "check=true", "workers=0"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    ended = subprocess.run(command, capture_output=True, text=True, env=ascii_only, cwd=tmp_path)
    assert ended.returncode == 1
    assert folder.name.encode("ascii", "backslashreplace").decode() in ended.stdout
    assert "2 good, 1 bad" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_checking_a_bad_subject_fails_too(mrgen: Script, tmp_path: Path, raw: Path):
    arguments = ("data=brats2019", f"data.root={spoilt(raw, tmp_path)}", "check=true", "workers=1")
    assert mrgen("prepare", *arguments).code == 1
    assert mrgen("prepare", *arguments, "strict=false").code == 0


def test_without_workers_all_happens_in_this_process(mrgen: Script):
    called = mrgen("prepare", *SMALL, "data.phantom.subjects=1", "workers=0")
    assert called.code == 0, called.err


# ----- what can be wrong ---------------------------------------------------------------------------------------------


def test_a_root_that_is_not_there(mrgen: Script, tmp_path: Path):
    called = mrgen("prepare", "data=brats2019", f"data.root={tmp_path}/nope")
    assert called.code == 1
    assert f"{tmp_path}/nope" in called.message


def test_another_challenges_folder_suggests_its_layout(mrgen: Script, raw: Path):
    called = mrgen("prepare", "data=brats2021", f"data.root={raw}")
    assert called.code == 1
    assert "brats2019" in called.message


def test_a_store_of_another_cohort_is_refused(mrgen: Script, raw: Path, phantom_store: Path, tmp_path: Path):
    called = mrgen("prepare", "data=phantom_wmh", *SMALL, f"data.store={phantom_store}")
    assert called.code == 1
    assert "found a store of brats2019, expected wmh2017 or none" in called.message


# ----- a user's own cohort -------------------------------------------------------------------------------------------


def test_a_users_own_cohort_is_one_yaml_file(mrgen: Script, tmp_path: Path, raw: Path):
    table = """
name: ours
subjects: ["**/BraTS19_*"]
fields: {grade: "(HGG|LGG)/"}
images: {t1: "*_t1.nii*", flair: "*_flair.nii*"}
label: "*_seg.nii*"
label_values: {0: background, 1: core, 2: edema, 4: enhancing}
regions: {WT: [1, 2, 3]}
"""
    (tmp_path / "ours.yaml").write_text(table)
    arguments = ("data=own", "data.layout=ours.yaml", f"data.root={raw}", "workers=1")
    called = mrgen("prepare", *arguments)
    assert called.code == 0, called.err
    store = Store(tmp_path / "stores" / "own")
    assert (store.layout.name, store.modalities, len(store)) == ("ours", ("t1", "flair"), 3)

    # From there on the store says what the cohort is.
    called = mrgen("train", "experiment=rsnet/rsnet", "target=flair", "data=own", "plan=true")
    assert called.code == 0, called.err

    (tmp_path / "ours.yaml").write_text(table.replace("images:", "pictures:"))
    called = mrgen("prepare", *arguments)
    assert called.code == 1
    assert "ours.yaml: unknown key pictures; valid keys are" in called.message


def test_every_layout_of_conf_is_read():
    from mrgen.data.layouts import Layout

    tables = sorted((CONF_DIR / "data" / "layout").glob("*.yaml"))
    assert len(tables) >= 8
    assert [Layout.from_conf(file).name for file in tables] == [file.stem for file in tables]


def test_the_store_may_not_lie_in_the_cohort(mrgen: Script, raw: Path):
    """It would be found as part of the cohort the next time."""
    before = files(raw)
    for store in (raw, raw / "store", raw.parent):
        called = mrgen("prepare", "data=brats2019", f"data.root={raw}", f"data.store={store}")
        assert called.code == 1
        assert "lie in one another" in called.message
    assert files(raw) == before


@pytest.mark.parametrize("workers", ["-1", "1.5", "many"])
def test_workers_that_are_no_number_of_processes_are_refused(mrgen: Script, raw: Path, workers: str):
    called = mrgen("prepare", "data=brats2019", f"data.root={raw}", f"workers={workers}")
    assert called.code == 1
    assert f"workers is {workers}; expected a whole number from 0 on, or null" in called.err
