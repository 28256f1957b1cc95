"""mrgen-synthesize: what it finds below a folder, what it says of each subject, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

from mrgen.errors import UserError
from tests.launch.synthesis.synthesizing_tools import ONE_PASS, TWO_PASSES, A, B, copied, image, made, values
from tests.launch.tools import Called

Script = Callable[..., Called]


@pytest.fixture
def scans_of_a(phantom_cohort: Path, tmp_path: Path) -> Path:
    """One subject's scans, to spoil, in a cohort's folder."""
    return copied(phantom_cohort, tmp_path / "scans", A)


# ----- what is found -------------------------------------------------------------------------------------------------


def test_one_subjects_folder_gives_what_its_cohort_gives(rsnet_run: Path, phantom_cohort: Path, tmp_path: Path):
    root = copied(phantom_cohort, tmp_path / "scans", A, B)
    cohort = made(rsnet_run, root, tmp_path / "cohort", *ONE_PASS)
    alone = made(rsnet_run / "checkpoints" / "best.ckpt", root / A, tmp_path / "alone", *ONE_PASS)
    assert [path.name for path in alone.iterdir()] == [A]
    assert image(alone).dataobj[:].tobytes() == image(cohort).dataobj[:].tobytes()


def test_a_subject_that_lacks_a_sequence_is_named_and_the_others_are_made(
    mrgen: Script, rsnet_run: Path, phantom_cohort: Path, tmp_path: Path
):
    root = copied(phantom_cohort, tmp_path / "scans", A, B)
    for name in ("t1ce", "flair"):
        (root / A / f"{A}_{name}.nii.gz").unlink()
    called = mrgen("synthesize", f"checkpoint={rsnet_run}", f"input={root}", "output=out", *ONE_PASS)
    assert called.code == 1
    assert "Traceback" not in called.err
    lines = called.out.splitlines()
    assert lines[1] == f"{A}: found t1; needs t1, t1ce, flair; no *_t1ce.nii*, *_flair.nii* in {root}/{A}"
    assert lines[2].startswith(f"{B}: found t1, t1ce, flair; made t2 in")
    assert lines[3] == "1 made, 0 skipped, 1 left out: out"
    assert values(tmp_path / "out", B).any()
    assert not (tmp_path / "out" / A).exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "found a truncated gzip stream"),
        (lambda path: path.write_bytes(b"text"), "found no NIfTI header"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "found a pipe or a device"),
        (lambda path: changed(path, lambda a: np.where(a > 0, a, np.nan).astype(np.float32)), "NaN or infinite voxels"),
        (lambda path: changed(path, lambda a: a[:-1]), "found the shape 47×48×31, expected 48×48×31"),
        (lambda path: changed(path, lambda a: a, shift=10), "found an affine up to 2 voxels off"),
    ],
    ids=["truncated", "no image", "pipe", "NaN", "shape", "affine"],
)
def test_a_bad_scan_is_named_and_the_others_are_made(
    rsnet_run: Path, phantom_cohort: Path, tmp_path: Path, capsys, spoil: Callable[[Path], Any], said: str
):
    root = copied(phantom_cohort, tmp_path / "scans", A, B)
    spoil(root / A / f"{A}_flair.nii.gz")
    output = made(rsnet_run, root, tmp_path / "out", *ONE_PASS, left_out=1)
    bad, good, summary = capsys.readouterr().out.splitlines()[1:]
    assert bad.startswith(f"{A}: {root}/{A}/{A}_flair.nii.gz: ")
    assert said in bad
    assert good.startswith(f"{B}: found")
    assert "1 made, 0 skipped, 1 left out" in summary
    assert [path.name for path in output.iterdir()] == [B]


def test_a_header_that_was_mended_is_said_and_the_synthesis_lies_where_the_scan_does(
    rsnet_run: Path, phantom_cohort: Path, tmp_path: Path, capsys
):
    """An sform of unit sides beside a pixdim and a qform of 5 mm, in the scan whose header the synthesis gets."""
    root = copied(phantom_cohort, tmp_path / "scans", A)
    reference = made(rsnet_run, root, tmp_path / "reference", *ONE_PASS)
    scan = nibabel.load(root / A / f"{A}_t1.nii.gz")
    lacking = scan.affine.copy()
    lacking[:3, :3] /= 5
    volume = nibabel.Nifti1Image(np.asanyarray(scan.dataobj), scan.affine, scan.header)
    volume.set_sform(lacking, 1)
    nibabel.save(volume, root / A / f"{A}_t1.nii.gz")
    capsys.readouterr()
    output = made(rsnet_run, root, tmp_path / "out", *ONE_PASS)
    assert capsys.readouterr().out.splitlines()[1] == (
        f"{A}: {A}_t1.nii.gz: found an sform without voxel sides, but a pixdim and a qform of 5×5×5 mm; took the qform"
    )
    np.testing.assert_allclose(image(output).affine, scan.affine, atol=1e-5)
    np.testing.assert_array_equal(values(output), values(reference))


def changed(path: Path, change: Callable[[np.ndarray], np.ndarray], shift: float = 0) -> None:
    scan = nibabel.load(path)
    affine = scan.affine.copy()
    affine[0, 3] += shift
    nibabel.save(nibabel.Nifti1Image(change(np.asanyarray(scan.dataobj)), affine), path)


def named_as(phantom_cohort: Path, folder: Path, names: dict[str, str], suffix: str = ".nii.gz") -> Path:
    """Subject A under other names."""
    folder.mkdir(parents=True)
    for name, other in names.items():
        shutil.copy(next(phantom_cohort.glob(f"*/{A}/*_{name}.nii.gz")), folder / f"{folder.name}{other}{suffix}")
    return folder


BRATS_2023 = {"t1": "-t1n", "t1ce": "-t1c", "flair": "-t2f"}


def test_another_shipped_layout_is_recognised(rsnet_run: Path, phantom_cohort: Path, tmp_path: Path, capsys):
    folder = named_as(phantom_cohort, tmp_path / "scans" / "BraTS-GLI-00001-000", BRATS_2023)
    output = made(rsnet_run, folder.parent, tmp_path / "out", *ONE_PASS)
    said = f"layout: BraTS 2023; the run's own, BraTS 2019, matches nothing in {folder.parent}"
    assert said in capsys.readouterr().out.splitlines()
    reference = made(rsnet_run, copied(phantom_cohort, tmp_path / "own", A), tmp_path / "reference", *ONE_PASS)
    np.testing.assert_array_equal(values(output, folder.name), values(reference))
    assert record_layout(output, folder.name) == "brats2023"


def record_layout(output: Path, id: str) -> str:
    return json.loads((output / id / f"{id}_t2.json").read_text())["layout"]


def test_a_layout_can_be_named_or_written_down(rsnet_run: Path, phantom_cohort: Path, tmp_path: Path):
    folder = named_as(phantom_cohort, tmp_path / "scans" / "sub-01", {"t1": "_T1w", "t1ce": "_ce", "flair": "_FLAIR"})
    table = {
        "name": "ours",
        "subjects": ["sub-*"],
        "images": {"t1": "*_T1w.nii*", "t1ce": "*_ce.nii*", "flair": "*_FLAIR.nii*"},
    }
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(table))
    output = made(rsnet_run, folder.parent, tmp_path / "out", f"layout='{tmp_path}/ours.yaml'", *ONE_PASS)
    assert record_layout(output, "sub-01") == "ours"
    named_as(phantom_cohort, tmp_path / "named" / "BraTS-GLI-00001-000", BRATS_2023)
    copied(phantom_cohort, tmp_path / "named", A)  # the run's own is there too
    output = made(rsnet_run, tmp_path / "named", tmp_path / "out_named", "layout=brats2023", *ONE_PASS)
    assert [path.name for path in output.iterdir()] == ["BraTS-GLI-00001-000"]


def test_layouts_that_do_not_help(rsnet_run: Path, phantom_cohort: Path, tmp_path: Path):
    root, output = tmp_path / "scans", tmp_path / "out"
    named_as(phantom_cohort, root / "BraTS-GLI-00001-000", BRATS_2023)
    with pytest.raises(
        UserError, match=r"nothing matches BraTS 2021 .*choose what it is: layout=brats2023 \(1 subject\)"
    ):
        made(rsnet_run, root, output, "layout=brats2021")
    named_as(phantom_cohort, root / "BraTS2021_00001", {"t1": "_t1", "t1ce": "_t1ce", "flair": "_flair"})
    with pytest.raises(UserError, match=r"choose what it is: layout=brats20\d\d \(1 subject\), layout=brats20\d\d"):
        made(rsnet_run, root, output)
    with pytest.raises(UserError, match=r"layout=nope: no such file; expected a YAML file, or one of brats2015"):
        made(rsnet_run, root, output, "layout=nope")
    with pytest.raises(UserError, match=r"layout=wmh2017: WMH 2017 has no t1ce; rsnet-t2 needs t1, t1ce, flair"):
        made(rsnet_run, root, output, "layout=wmh2017")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"nothing matches BraTS 2019 .* nor any shipped layout .* layout=mine.yaml"):
        made(rsnet_run, tmp_path / "empty", output)
    assert not output.exists()


# ----- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inside", "around"), [("output", "input"), ("input", "output"), ("output", None)])
def test_input_and_output_in_one_another_are_refused(
    rsnet_run: Path, scans_of_a: Path, inside: str, around: str | None
):
    root, output = scans_of_a, scans_of_a
    if around == "input":
        output = scans_of_a / "out"
    elif around == "output":
        root = scans_of_a / A
    with pytest.raises(UserError, match="lie in one another; the output needs a folder of its own"):
        made(rsnet_run, root, output)
    assert not (scans_of_a / "out").exists()


def test_a_segmenter_is_refused(snet_run: Path, scans_of_a: Path, tmp_path: Path):
    with pytest.raises(UserError, match="is a SegmenterModule, which synthesises nothing; give a run of a synthesizer"):
        made(snet_run, scans_of_a, tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "checkpoint is not set; give its path, such as checkpoint=runs/rsnet-t2/RUN"),
        (["checkpoint=RUN"], "input is not set; give its path"),
        (["checkpoint=RUN", "input=."], "output is not set; give its path"),
        (["checkpoint=RUN", "input=nope", "output=out"], "input=nope: no such folder; expected one subject's folder"),
        (["checkpoint=nope", "input=in", "output=out"], "nope: no such run folder or checkpoint"),
        (
            ["checkpoint=RUN", "input=in", "output=out", "device=tpu"],
            "device is tpu; expected auto, cpu, cuda or cuda:0",
        ),
        (["checkpoint=RUN", "input=in", "output=out", "device=cuda:77"], "CUDA devices are there; try device=auto"),
        (["checkpoint=RUN", "input=in", "output=out", "precision=8"], "precision is 8; expected auto, bf16-mixed or"),
        (["checkpoint=RUN", "inputs=in"], ", checkpoint, input, output, layout, mc_samples"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(
    mrgen: Script, rsnet_run: Path, tmp_path: Path, overrides: list[str], said: str
):
    (tmp_path / "in").mkdir()
    called = mrgen("synthesize", *(text.replace("=RUN", f"={rsnet_run}") for text in overrides))
    assert called.code == 1
    assert said in called.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]  # no run folder of Hydra's


def test_help_shows_examples_and_the_script_starts_light(mrgen: Script):
    called = mrgen("synthesize", "--help")
    assert called.code == 0
    assert called.out.partition("== Examples ==")[2].count("\nmrgen-synthesize ") == 4
    code = "import sys, mrgen.synthesize; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "nibabel", "SimpleITK", "monai", "scipy"} & set(loaded)


# ----- real scans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "id", "scan"),
    [
        ("brats2019", "BraTS19_TCIA_FG6692_1", "_t1.nii.gz"),
        ("brats2023", "BraTS-GLI-00001-000", "-t1n.nii.gz"),
    ],
)
def test_real_scans(rsnet_run: Path, scans: Path, tmp_path: Path, root: str, id: str, scan: str):
    output = made(rsnet_run, scans / root, tmp_path / "out", *TWO_PASSES)
    source = nibabel.load(next((scans / root).rglob(f"{id}{scan}")))
    for what in ("synthetic", "variance"):
        found = image(output, id, what)
        assert found.shape == source.shape
        np.testing.assert_array_equal(found.affine, source.affine)
        for code in ("sform_code", "qform_code", "xyzt_units"):
            assert found.header[code] == source.header[code]
    brain = np.asanyarray(source.dataobj) > 0
    assert (values(output, id)[brain] != 0).mean() > 0.99
    assert (values(output, id)[~brain] != 0).mean() < 0.01
