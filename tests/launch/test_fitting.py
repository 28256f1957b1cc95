"""Estimators through ``mrgen-train``: one pass over the training subjects, an artefact, the errors of validation."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from mrgen.data.splits import Split
from mrgen.data.store import Store
from mrgen.errors import UserError
from mrgen.files import read_metrics
from mrgen.launch.runs import load_run
from mrgen.launch.status import read_status
from mrgen.launch.training import train
from mrgen.papers.brain_clustering import BrainClustering, Constant, Pair
from tests.launch.synthesis.synthesizing_tools import A, copied, image, made, record
from tests.launch.tools import composed


def fitted(run_dir: Path, store: Path, *overrides: str, preset: str = "clustering") -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    common = (f"experiment=t1_to_t2/{preset}", f"data.store='{store}'", "tracking=csv")
    return train(composed("train", *common, *overrides), run_dir)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, phantom_store: Path) -> Path:
    """Train&Test with 3 macro clusters. Read only."""
    return fitted(tmp_path_factory.mktemp("clustering") / "run", phantom_store, "model.macro=3", "data.split.val=0.25")


def test_a_run_folder_is_like_any_other(run_dir: Path):
    assert {path.name for path in run_dir.iterdir()} == {
        *("config.yaml", "split.json", "environment.json", "metrics.csv", "status.json"),
        *("description.json", "estimator"),
    }
    assert read_status(run_dir)["state"] == "finished"


def test_it_learned_from_the_training_subjects_alone(run_dir: Path, phantom_store: Path):
    """As a direct fit on the stored intensities of these subjects would."""
    split, store = Split.load(run_dir / "split.json"), Store(phantom_store)
    model = load_run(run_dir).model
    assert [subject.id for subject in model.subjects] == list(split.train)
    subjects = [store.subjects[id] for id in split.train]
    direct = BrainClustering(macro=3).fit(
        Pair(*s.read_image(["t1", "t2"]), brain=s.read_brain(), id=s.id) for s in subjects
    )
    for ours, theirs in zip(model.tables(), direct.tables(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_validation_errors_are_means_over_its_subjects(run_dir: Path, phantom_store: Path):
    """By hand: the synthesis as it was made and the real image over its maximum, where one of them is above 0."""
    store, errors = Store(phantom_store), []
    model = load_run(run_dir).model
    for id in Split.load(run_dir / "split.json").val:
        subject = store.subjects[id]
        brain = subject.read_brain()
        t1, t2 = subject.read_image(["t1", "t2"])
        real, made = np.where(brain, t2, 0) / t2[brain].max(), model.synthesize(t1, brain) * brain
        errors.append(((made - real)[(made > 0) | (real > 0)] ** 2).mean())
    (row,) = read_metrics(run_dir / "metrics.csv")
    assert float(row["val/loss"]) == float(row["val/mse_brain"]) == pytest.approx(np.mean(errors), rel=1e-4)
    assert float(row["val/mse_tumour"]) > 0


def test_a_search_artefact_reads_its_volumes_where_the_store_has_them(tmp_path: Path, phantom_store: Path):
    run_dir = fitted(tmp_path / "run", phantom_store, "model.width=2", preset="clustering_search")
    assert not list((run_dir / "estimator").glob("source_*.npy"))  # no copies
    run = load_run(run_dir)
    subject = Store(phantom_store).subjects[run.split.train[0]]
    answer = run.model.query(subject.read_image(["t1"])[0], subject.read_brain())
    assert answer.subjects[0] == subject.id  # nearest to itself
    assert len(answer.subjects) == 2


@pytest.mark.parametrize("preset", ["complementary", "random", "constant", "nothing"])
def test_baselines_run_like_the_methods(tmp_path: Path, phantom_store: Path, preset: str):
    run = load_run(fitted(tmp_path / "run", phantom_store, preset=preset))
    volumes = {"t1": torch.rand(1, 1, 6, 6, 4)}
    made = run.model.synthesize(volumes)
    assert made.mean.shape == (1, 1, 6, 6, 4)
    assert made.scale == "unit"
    assert run.tile is None
    run.check_scale()


def test_unlabelled_subjects_teach_too(tmp_path: Path, phantom_store: Path):
    """data.labelled=false: the tumour's error is then left out, not 0."""
    import shutil

    store = tmp_path / "store"
    shutil.copytree(phantom_store, store)
    for path in store.glob("*/subject.json"):
        table = json.loads(path.read_text())
        del table["checksum"]
        path.write_text(json.dumps({**table, "label_counts": None}))
        (path.parent / "label.npy").unlink()
    with pytest.raises(UserError, match=r"none of 8 subjects has a label.*data.labelled=false"):
        fitted(tmp_path / "refused", store)
    run_dir = fitted(tmp_path / "run", store, "data.labelled=false", "data.split.stratify=null")
    assert isinstance(load_run(run_dir).model, BrainClustering)
    (row,) = read_metrics(run_dir / "metrics.csv")
    assert "val/mse_tumour" not in row


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.source=apt",), "makes t2 from apt, and data.modalities has no apt"),
        (("model.source=t2",), "source and target are both t2"),
        (
            ("data.normalisation._target_=mrgen.data.normalisation.ZScore",),
            r"works on the scale 'unit' and data\.normalisation gives 'zscore'; set .*MinMax",
        ),
        (("model.macro=3", "model.micro_total=100"), "micro_total is 100, expected a multiple of macro=3, such as 99"),
        (("model.macro=5000",), "t1: found .* distinct intensities, expected 5000 or more"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, phantom_store: Path, overrides: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        fitted(tmp_path / "run", phantom_store, *overrides)
    assert not (tmp_path / "run" / "estimator").exists()


def test_a_finished_run_is_not_overwritten(run_dir: Path, phantom_store: Path, tmp_path: Path):
    import shutil

    shutil.copytree(run_dir, tmp_path / "run")
    with pytest.raises(UserError, match="holds a finished or interrupted run"):
        fitted(tmp_path / "run", phantom_store)


def test_a_finished_run_resumed_stays_as_it_is_and_a_broken_one_starts_over(
    run_dir: Path, phantom_store: Path, tmp_path: Path
):
    import shutil

    shutil.copytree(run_dir, tmp_path / "run")
    before = load_run(tmp_path / "run").digest()
    again = (f"resume='{tmp_path / 'run'}'", "model.macro=3", "data.split.val=0.25")
    fitted(tmp_path / "run", phantom_store, *again)
    assert read_status(tmp_path / "run")["state"] == "finished"
    assert load_run(tmp_path / "run").digest() == before
    shutil.rmtree(tmp_path / "run" / "estimator")  # killed while it learned
    fitted(tmp_path / "run", phantom_store, *again)
    assert load_run(tmp_path / "run").digest() == before


def test_an_artefact_that_asks_for_another_class_is_refused(tmp_path: Path, phantom_store: Path):
    run_dir = fitted(tmp_path / "run", phantom_store, preset="constant")
    path = run_dir / "description.json"
    described = json.loads(path.read_text())
    for target, message in (
        ("os.system", "which is none of the classes that a file may name"),
        ("mrgen.papers.brain_clustering.Nothing", "found Constant 1, expected Nothing 1"),
    ):
        path.write_text(json.dumps({**described, "model": {**described["model"], "_target_": target}}))
        with pytest.raises(UserError, match=message):
            load_run(run_dir)
    path.write_text("{")
    with pytest.raises(UserError, match=r"description\.json: found no JSON"):
        load_run(run_dir)


def test_the_digest_covers_the_tables_too(tmp_path: Path, run_dir: Path):
    import shutil

    shutil.copytree(run_dir, tmp_path / "copy")
    path = tmp_path / "copy" / "description.json"
    described = json.loads(path.read_text())
    copy = load_run(tmp_path / "copy")
    assert copy.digest() == load_run(run_dir).digest()
    with np.load(tmp_path / "copy" / "estimator" / "entries.npz") as file:
        arrays = {**file}
    arrays["key"] = arrays["key"] + 1e-3
    np.savez_compressed(tmp_path / "copy" / "estimator" / "entries.npz", **arrays)
    with pytest.raises(
        UserError, match=r"found another 'entries\.npz' than the one that description\.json has the SHA"
    ):
        load_run(tmp_path / "copy")
    del described["artefact"]  # of older versions
    path.write_text(json.dumps(described))
    assert isinstance(load_run(tmp_path / "copy").model, BrainClustering)
    assert copy.digest() != load_run(run_dir).digest()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("source", 1e308), ("target", ""), ("macro", float("nan")), ("macro", 5.0), ("macro", 10**400)),
        *(("remove_outliers", "a\nb"), ("remove_outliers", 1), ("width", 6), ("other", 1)),
    ],
)
def test_settings_are_those_that_the_description_has(tmp_path: Path, run_dir: Path, key: str, value: Any):
    import shutil

    shutil.copytree(run_dir, tmp_path / "copy")
    table, description = tmp_path / "copy" / "estimator" / "estimator.json", tmp_path / "copy" / "description.json"
    content, described = json.loads(table.read_text()), json.loads(description.read_text())
    del described["artefact"]  # of older versions
    description.write_text(json.dumps(described))
    assert isinstance(load_run(tmp_path / "copy").model, BrainClustering)
    table.write_text(json.dumps({**content, "settings": {**content["settings"], key: value}}))
    with pytest.raises(UserError, match=r"estimator\.json: found .*") as raised:
        load_run(tmp_path / "copy")
    assert "\n" not in str(raised.value)


def test_constant_is_the_mean_of_the_training_targets(tmp_path: Path, phantom_store: Path):
    run = load_run(fitted(tmp_path / "run", phantom_store, preset="constant"))
    assert isinstance(run.model, Constant)
    means = []
    for id in run.split.train:
        subject = Store(phantom_store).subjects[id]
        t2 = subject.read_image(["t2"])[0][subject.read_brain()]
        means.append(t2[t2 > 0].mean() / t2.max())
    assert run.model.mean == pytest.approx(np.mean(means), rel=1e-6)


# ----- mrgen-synthesize ----------------------------------------------------------------------------------------------


def test_an_estimator_writes_files_like_a_network(
    run_dir: Path, phantom_cohort: Path, phantom_store: Path, tmp_path: Path
):
    """Intensities are the training targets': 1 is the mean of their maxima."""
    scans = copied(phantom_cohort, tmp_path / "scans", A)
    (next(scans.glob(f"{A}/*_t2.nii.gz"))).unlink()  # nobody looks at it
    output = made(run_dir, scans, tmp_path / "out")
    subject, store = Store(phantom_store).subjects[A], Store(phantom_store)
    training = Split.load(run_dir / "split.json").train
    factor = np.mean([store.subjects[id].statistics["t2"]["max"] for id in training])
    unit = load_run(run_dir).model.synthesize(subject.read_image(["t1"])[0], subject.read_brain())
    written = to_canonical(image(output))
    assert written.shape == subject.shape
    np.testing.assert_allclose(written, np.where(subject.read_brain(), factor * unit, 0), rtol=1e-3, atol=1e-2 * factor)
    assert record(output)["in_tiles"] is False


def test_a_scan_that_search_cannot_compare_is_left_out_with_a_sentence(
    tmp_path: Path, phantom_store: Path, phantom_cohort: Path, capsys
):
    search = fitted(tmp_path / "run", phantom_store, preset="clustering_search")
    scans = copied(phantom_cohort, tmp_path / "scans", A)
    path = next(scans.glob(f"{A}/*_t1.nii.gz"))
    scan = nibabel.load(path)
    nibabel.save(scan.slicer[:-2], path)
    made(search, scans, tmp_path / "out", left_out=1)
    assert f"{A}: found a query of" in capsys.readouterr().out


def to_canonical(scan: nibabel.Nifti1Image) -> np.ndarray:
    return np.asanyarray(nibabel.as_closest_canonical(scan).dataobj)
