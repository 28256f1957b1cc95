"""``mrgen-evaluate experiment=samr/tables``: segmenters with and without synthetic slices, on unseen patients."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from mrgen.callbacks.provenance import KEY
from mrgen.data.splits import Split
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.errors import UserError
from mrgen.launch.judging.augmenting import judge_augmentation
from mrgen.launch.judging.evaluating import check_leaks
from mrgen.launch.paths import CONF_DIR
from mrgen.launch.runs import load_run
from mrgen.launch.training import build_datamodule, train
from tests.launch.test_training import resumed
from tests.launch.tools import CPU, Called, composed

PRESET = yaml.safe_load((CONF_DIR / "experiment" / "samr" / "tables.yaml").read_text())["evaluation"]
MODALITIES = ("t1ce", "flair")
TINY = (
    *("data=phantom", "data.modalities=[t1ce,flair]", "data.split.val=0", "data.split.test=0.25"),
    *("data.split.stratify=null", "data.sampling.size=[48,48]", "data.sampling.step=4", "data.batch_size=4"),
    *("model.net.filters=2", "model.net.downs=2", "trainer.max_epochs=1", *CPU),
)


def trained(folder: Path, store: Path, preset: str, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    return train(composed("train", f"experiment=samr/{preset}", *TINY, f"data.store='{store}'", *overrides), folder)


def synthetic(folder: Path, real: Store, patients: list[str]) -> Path:
    """Noise that says of itself that a generator made it."""
    rng = np.random.default_rng(0)
    write_cohort(folder, real.layout, MODALITIES)
    for i in range(3):
        brain, label = np.ones((48, 48, 20), bool), np.zeros((48, 48, 20), np.uint8)
        label[10:20, 10:20] = 4
        image = rng.integers(1, 500, (2, 48, 48, 20)).astype(np.int16)
        write_subject(folder, id=f"syn{i:04d}", image=image, brain=brain, label=label, affine=np.diag([5, 5, 5, 1]))
    said = {"version": 1, "method": "samr", "checkpoint": "sha256:0", "store": "brats2019", "patients": patients}
    said |= {"subjects": 3, "slices": 60, "manipulations": ["mirror"], "seed": 0, "complete": True}
    (folder / "generated.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def runs(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real slices alone with two seeds, and half as many synthetic ones as well. Read only."""
    folder, store = tmp_path_factory.mktemp("augmenting"), Store(phantom_store)
    found = {"real": trained(folder / "0_real", phantom_store, "unet")}
    split = ("data.split.kind=file", f"data.split.file='{found['real'] / 'split.json'}'")
    found["again"] = trained(folder / "1_real", phantom_store, "unet", *split, "seed=1")
    patients = sorted(store.subjects[id].patient for id in Split.load(found["real"] / "split.json").train)
    made = f"data.mix.store='{synthetic(folder / 'synthetic', store, patients)}'"
    mixed = ("synthetic=samr", "data.mix.fraction=0.5", made)
    found["samr-0.5"] = trained(folder / "2_samr", phantom_store, "unet_mixed", *split, *mixed)
    return found


def judged(out: Path, runs: list[Path], *overrides: str) -> Path:
    each = ",".join(f"'{run}'" for run in runs)
    common = ("experiment=samr/tables", "trainer.accelerator=cpu", f"runs=[{each}]")
    return judge_augmentation(composed("evaluate", *common, *overrides), out)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_are_judged_on_the_patients_that_none_has_seen(tmp_path: Path, runs: dict[str, Path], capsys):
    out = judged(tmp_path / "out", list(runs.values()), "smoke=true")
    split = Split.load(runs["real"] / "split.json")
    found = rows(out / "subjects.csv")
    assert len(split.test) == 2
    assert {row["subject"] for row in found} == set(split.test)
    names = ["real", "real#2", "samr-0.5"]
    labels = ["edema", "necrotic and non-enhancing core", "enhancing", "mean of the labels"]
    assert [(row["input"], row["label"], row["n"]) for row in rows(out / "table.csv")] == [
        (name, label, "2") for name in names for label in labels
    ]
    text = (out / "table.md").read_text()
    assert text.startswith("### SMOKE RUN, not a result: augmentation, training")
    assert "0.745 / 8.779 / 0.760 / 0.997" in text  # edema of SAMR, Exp. 2
    for title in ("Exp. 2: half", "Exp. 3: real", "repeated trainings", "paper's claims", "preference of one"):
        assert title in text
    for title in ("Exp. 1", "Exp. 4"):  # were not run
        assert title not in text
    real, _, samr = (line.split(" | ") for line in text.splitlines()[4:7])
    slices, extra, _, steps, batch, equal = (cell.strip("| ") for cell in samr[1:])
    assert int(extra) == round(int(slices) / 2)
    assert int(steps) == -(-(int(slices) + int(extra)) // 4)
    assert (batch, equal, real[2], real[1]) == ("4", "no", "0", slices)
    assert str(runs["real"].parent) not in text  # no place on this machine
    assert {row["input"] for row in rows(out / "slices.csv")} == set(names)
    for file in ("segmentation.png", "dice.png", "config.yaml"):
        assert (out / file).stat().st_size > 100
    assert "preference" in capsys.readouterr().out


def changed(run: Path, folder: Path, **mix) -> Path:
    """A copy of a run whose checkpoint says something else of its synthetic slices."""
    shutil.copytree(run, folder)
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content[KEY]["data"]["mix"] |= mix
    torch.save(content, path)
    return folder


def test_a_generator_that_knew_a_judged_patient_is_refused(tmp_path: Path, runs: dict[str, Path], phantom_store: Path):
    patient = Store(phantom_store).subjects[Split.load(runs["real"] / "split.json").test[0]].patient
    leaking = changed(runs["samr-0.5"], tmp_path / "leaking", patients=["x", patient])
    with pytest.raises(UserError, match=rf"slices are of samr, which was trained on 1 of the 2 patients .*{patient}"):
        judged(tmp_path / "out", [runs["real"], leaking])


def test_no_other_judgement_takes_such_a_segmenter_either(tmp_path: Path, runs: dict[str, Path], phantom_store: Path):
    store = Store(phantom_store)
    (id, *_) = Split.load(runs["real"] / "split.json").test
    leaking = load_run(changed(runs["samr-0.5"], tmp_path / "leaking", patients=[store.subjects[id].patient]))
    module = build_datamodule(leaking.conf.data, mix=None)
    with pytest.raises(UserError, match="slices are of samr"):
        check_leaks(module, [leaking], (id,))


def test_a_resumed_run_is_not_trained_on_another_cohort(tmp_path: Path, runs: dict[str, Path]):
    grown = changed(runs["samr-0.5"], tmp_path / "grown", made={"checkpoint": "sha256:0", "seed": 0, "slices": 40})
    with pytest.raises(UserError, match=r"not the cohort any more that this run was trained on; restore it, or train"):
        resumed(grown, "trainer.max_epochs=3")


def test_runs_of_one_name_must_differ_in_their_seed_alone(tmp_path: Path, runs: dict[str, Path]):
    other = changed(runs["samr-0.5"], tmp_path / "other", equal_steps=True)
    with pytest.raises(UserError, match=r"both called samr-0\.5 .* another name"):
        judged(tmp_path / "out", [runs["samr-0.5"], other])


def test_an_older_checkpoint_that_says_less_has_dashes(tmp_path: Path, runs: dict[str, Path]):
    older = tmp_path / "older"
    shutil.copytree(runs["real"], older)
    content = torch.load(older / "checkpoints" / "last.ckpt", weights_only=True)
    for key in ("mix", "slices"):
        del content[KEY]["data"][key]
    del content[KEY]["training"]
    torch.save(content, older / "checkpoints" / "last.ckpt")
    out = judged(tmp_path / "out", [older])
    assert "| real | – | – | – | – | – | – |" in (out / "table.md").read_text()


def test_other_test_subjects_other_classes_and_other_methods_are_refused(
    tmp_path: Path, runs: dict[str, Path], snet_run: Path
):
    with pytest.raises(UserError, match=r"names a run twice"):
        judged(tmp_path / "out", [runs["real"], runs["real"]])
    with pytest.raises(UserError, match=r"SegmenterModule, which segments no slices"):
        judged(tmp_path / "out", [snet_run])
    for name in ("other", "native"):
        shutil.copytree(runs["real"], tmp_path / name)
    split = json.loads((tmp_path / "other" / "split.json").read_text())
    split["train"], split["test"] = [*split["train"][1:], split["test"][0]], [split["train"][0], split["test"][1]]
    (tmp_path / "other" / "split.json").write_text(json.dumps(split))
    with pytest.raises(UserError, match=r"have other test subjects or stores"):
        judged(tmp_path / "out", [runs["real"], tmp_path / "other"])
    conf = OmegaConf.load(tmp_path / "native" / "config.yaml")
    conf.data.labels = "native"
    OmegaConf.save(conf, tmp_path / "native" / "config.yaml")
    with pytest.raises(UserError, match=r"knows the classes background, .* unused, enhancing; judge those of one kind"):
        judged(tmp_path / "out", [runs["real"], tmp_path / "native"])
    with pytest.raises(UserError, match=r"subjects is all; .* expected test or val"):
        judged(tmp_path / "out", [runs["real"]], "subjects=all")


def test_a_cohort_without_the_papers_labels_has_its_own(tmp_path: Path, wmh_store: Path):
    run = trained(
        tmp_path / "wmh",
        wmh_store,
        "unet",
        "data=phantom_wmh",
        "data.modalities=[t1,flair]",
        "name=mine",
        "data/sampling=slices",
    )
    out = judged(tmp_path / "out", [run])
    assert {row["label"] for row in rows(out / "table.csv")} == {"white matter hyperintensity"}
    assert "paper" not in (out / "table.md").read_text().lower().replace("the paper's claims", "")


def test_the_preset_has_a_number_a_label_and_claims_that_its_numbers_bear_out():
    printed = {name: row for part in PRESET["experiments"] for name, row in part["rows"].items()}
    for part in PRESET["experiments"]:
        for row in part["rows"].values():
            assert set(row) == {"dice", "hd95", "sensitivity", "specificity"}
            assert {len(values) for values in row.values()} == {len(PRESET["labels"])}
    means = {name: np.mean(row["dice"]) for name, row in printed.items()}
    assert len(PRESET["claims"]) == len({tuple(claim) for claim in PRESET["claims"]}) == 19
    for first, relation, second in PRESET["claims"]:
        assert (means[first] > means[second]) == (relation == ">")


def test_the_console_script_finds_the_judgement(mrgen: Callable[..., Called]):
    called = mrgen("evaluate", "experiment=samr/tables", "subjects=all")
    assert called.code == 1
    assert "runs are judged on their common split: expected test or val" in called.message
