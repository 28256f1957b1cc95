"""``mrgen-evaluate experiment=lesion_vaegan/tables``: segmentors of the availability study, on unseen patients."""

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
from mrgen.data.generated import synthetic_layout
from mrgen.data.splits import Split
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.errors import UserError
from mrgen.launch.judging.availability import _judged_cohort, judge_availability
from mrgen.launch.paths import CONF_DIR
from mrgen.launch.runs import load_run
from mrgen.launch.training import train
from tests.launch.tools import CPU, Called, composed

PRESET = yaml.safe_load((CONF_DIR / "experiment" / "lesion_vaegan" / "tables.yaml").read_text())["evaluation"]
MODALITIES = ("t1", "flair")
TINY = (
    *("data.modalities=[t1,flair]", "data.split.test=0.25", "data.split.stratify=null", "data.sampling.size=[48,48]"),
    *("data.sampling.step=2", "data.batch_size=4", "model.width=2", "trainer.max_epochs=1", *CPU),
)


@pytest.fixture(scope="module")
def first(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row 1, of a network of a few hundred parameters, trained for some steps. Read only."""
    folder = tmp_path_factory.mktemp("availability") / "0_row-1"
    folder.mkdir()
    preset = ("experiment=lesion_vaegan/availability", "row=1", f"data.store='{phantom_store}'")
    return train(composed("train", *preset, *TINY), folder)


def changed(run: Path, folder: Path, *, name: str | None = None, sampling: dict | None = None, **mix) -> Path:
    """A copy of a run that says something else of itself; ``mix`` in shares of ×1, and what else a mix says."""
    shutil.copytree(run, folder)
    conf = OmegaConf.load(folder / "config.yaml")
    conf.name = name or conf.name
    conf.data.sampling.update(sampling or {})
    OmegaConf.save(conf, folder / "config.yaml")
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(len(folder.name))
    for weight in content["state_dict"].values():  # another training
        weight += 0.01 * torch.randn(weight.shape, generator=generator)
    if mix:
        count = content[KEY]["data"]["slices"]
        amounts = {f"{kind}_slices": round(mix.pop(kind, 0) * count) for kind in ("real", "synthetic", "enhanced")}
        said = {"method": "generation", "equal_steps": True, "order": "random", "patients": [], "made": None}
        content[KEY]["data"]["mix"] = {**said, **amounts, **mix}
    torch.save(content, path)
    return folder


@pytest.fixture(scope="module")
def runs(first: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Rows 1, twice, 3 and 25. Read only."""
    folder = tmp_path_factory.mktemp("rows")
    return [
        changed(first, folder / "25", name="row-25", real=1, synthetic=1, order="synthetic_first"),
        first,
        changed(first, folder / "repeat"),
        changed(first, folder / "third", name="row-3", synthetic=1, made={"seed": 1}),
    ]


@pytest.fixture(scope="module")
def cohort(first: Path, phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise and squares that say of themselves that a lesion VAE-GAN made them. Read only."""
    folder, real, rng = tmp_path_factory.mktemp("cohorts") / "synthetic_generation", Store(phantom_store), None
    rng = np.random.default_rng(0)
    write_cohort(folder, synthetic_layout(real.layout), MODALITIES)
    shape = (48, 48, 5)
    for i in range(3):
        brain, label, structure = np.zeros(shape, bool), np.zeros(shape, np.uint8), np.zeros(shape, bool)
        brain[8:40, 4:44], label[10:20, 10:20], structure[8, 4:44] = True, 4, True
        image = rng.integers(1, 500, (2, *shape)).astype(np.int16) * brain
        arrays = {"image": image, "brain": brain, "label": label, "structure": structure}
        write_subject(folder, id=f"syn{i:04d}", affine=np.diag([5, 5, 5, 1]), **arrays)
    patients = sorted(real.subjects[id].patient for id in Split.load(first / "split.json").train)
    said = {"version": 1, "method": "generation", "checkpoint": "sha256:0", "store": real.name, "patients": patients}
    said |= {"subjects": 3, "slices": 15, "manipulations": [], "seed": 0, "complete": True, "scheme": "multiple"}
    said |= {"segmentors": None, "filters": {"candidates": 30, "kept": 15, "dice": 0.812, "mse": 0.051}}
    (folder / "generated.json").write_text(json.dumps(said))
    return folder


def recorded(cohort: Path, folder: Path, **changes) -> Path:
    """A copy of a cohort whose record says something else."""
    shutil.copytree(cohort, folder)
    said = json.loads((folder / "generated.json").read_text())
    (folder / "generated.json").write_text(json.dumps({key: v for key, v in (said | changes).items() if v is not None}))
    return folder


def judged(out: Path, runs: list[Path], *overrides: str, cohorts: tuple[Path, ...] = ()) -> Path:
    each, stores = (",".join(f"'{path}'" for path in paths) for paths in (runs, cohorts))
    common = ("experiment=lesion_vaegan/tables", "trainer.accelerator=cpu", f"runs=[{each}]")
    return judge_availability(composed("evaluate", *common, f"evaluation.cohorts=[{stores}]", *overrides), out)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cells(text: str, title: str) -> list[list[str]]:
    """Of the table with that title, without the heading."""
    part = text.partition(f"### Availability, {title}\n")[2].partition("###")[0]
    return [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")][2:]


def test_rows_are_judged_beside_the_papers(tmp_path: Path, runs: list[Path], cohort: Path, capsys):
    out = judged(tmp_path / "out", runs, cohorts=(cohort,))
    test = Split.load(runs[0] / "split.json").test
    indices = rows(out / "indices.csv")
    names = ["row-25", "row-1", "row-1#2", "row-3"]
    assert [(row["subject"], row["input"], row["sequence"]) for row in indices] == [
        (id, name, sequence) for id in test for name in names for sequence in MODALITIES
    ]
    assert {row["label"] for row in rows(out / "subjects.csv")} == {"ET", "TC", "WT"}
    text = (out / "table.md").read_text()
    table = cells(text, "Table 2")
    assert [row[:6] for row in table] == [
        ["row-1", "×1", "0", "0", "–", "2"],
        ["row-3", "0", "×1", "0", "–", "1"],
        ["row-25", "×1", "×1", "0", "synthetic first", "1"],
    ]
    assert [(row[8], row[11]) for row in table] == [("0.915", "0.026"), ("0.708", "0.205"), ("0.940", "0.021")]
    each = [np.mean([float(row["index_dice"]) for row in indices if row["input"] == name]) for name in names]
    assert table[0][6].startswith(f"{np.mean(each[1:3]):.3f} ± ")
    assert table[0][7] == f"{max(each[1:3]):.3f}"
    real, synthetic = cells(text, "Table 1")
    assert real[:4] == ["4 SEG", "real", "test subjects", "row-1, 2 runs"]
    assert synthetic == [
        *("4 SEG", "30 synthetic, 15 kept", "synthetic_generation", "its own teachers"),
        *("0.051", "0.812", "0.043", "0.838"),
    ]
    assert [row[0] for row in cells(text, "the paper's claims")] == ["row-3 < row-1", "row-25 is best of 3 rows"]
    training = {row[0]: row[1:5] for row in cells(text, "training")}
    count = training["row-1"][0]
    assert training["row-25"] == [count, count, "0", "synthetic_first"]
    assert "20 and 80 %" in text  # the caution
    assert "CIRCULAR" in text
    assert "NOT equal" not in text
    assert {"dice", "slice_dice"} <= rows(out / "subjects.csv")[0].keys()
    assert not {"hd95", "sensitivity", "slice_hd95_both"} & rows(out / "subjects.csv")[0].keys()
    assert "SYNTHETIC SLICES ARE OF 2 COHORTS, and so differ in more than amount: row-25; row-3." in text
    assert str(runs[0].parent) not in text  # no place on this machine
    for file in ("study", "segmentation", "structure-synthetic_generation", "cohort-synthetic_generation"):
        assert (out / f"{file}.png").stat().st_size > 1000
    assert "Table 2" in capsys.readouterr().out


def test_table_1_says_who_judged_a_cohort(tmp_path: Path, first: Path, cohort: Path):
    runs = {"row-1": load_run(first)}
    known = f"sha256:{runs['row-1'].digest()}"
    for name, segmentors, judge in (
        ("known", known, "row-1"),
        ("other", f"sha256:{'0123456789' * 6}abcd", "checkpoint sha256:01234567…"),
    ):
        store = Store(recorded(cohort, tmp_path / name, segmentors=segmentors))
        assert _judged_cohort(name, store, runs)["judge"] == judge
    assert _judged_cohort("own", Store(cohort), runs)["judge"] == "its own teachers"


def test_regions_are_of_the_label_map_and_the_mean_score(tmp_path: Path, runs: list[Path], phantom_store: Path):
    """One run by hand: enhancing tumour is class 4 of the native labels, in all slices that are tested."""
    third = runs[3]
    out = judged(tmp_path / "out", [third])
    assert "No run is called row-1: nothing is compared with all real slices alone." in (out / "table.md").read_text()
    run, store = load_run(third), Store(phantom_store)
    slices = run.slices
    assert slices is not None
    for id in Split.load(third / "split.json").test:
        subject = store.subjects[id]
        box, tested = slices.box(subject.shape, None), slices.tested(subject.shape)
        recorded = [subject.statistics[name] for name in MODALITIES]
        parts = subject.read_image(MODALITIES, box), subject.read_brain(box)
        image = run.normalisation(*map(torch.from_numpy, parts), recorded)
        volumes = {name: image[None, i : i + 1] for i, name in enumerate(MODALITIES)}
        found = run.model.segment(volumes).labels[0, ..., tested.start : tested.stop].numpy() == 4
        reference = subject.read_label(box)[..., tested.start : tested.stop] == 4
        total = found.sum() + reference.sum()
        (row,) = [row for row in rows(out / "subjects.csv") if (row["subject"], row["label"]) == (id, "ET")]
        assert float(row["dice"]) == pytest.approx(2 * (found & reference).sum() / total if total else 1, abs=1e-3)


def test_runs_do_what_the_row_of_their_name_says(tmp_path: Path, first: Path):
    few = changed(first, tmp_path / "few", name="row-25", real=1, synthetic=0.5, order="synthetic_first")
    with pytest.raises(UserError, match=r"called row-25, of ×1 synthetic slices, and was trained on \d+, where ×1 are"):
        judged(tmp_path / "out", [first, few])
    turned = changed(first, tmp_path / "turned", name="row-25", real=1, synthetic=1, order="real_first")
    with pytest.raises(UserError, match=r"row-25, whose order is synthetic_first, and was trained real_first"):
        judged(tmp_path / "out", [first, turned])
    enhanced = changed(first, tmp_path / "enhanced", name="row-1", real=1, enhanced=1)
    with pytest.raises(UserError, match=r"both called row-1 and were trained on other data"):
        judged(tmp_path / "out", [first, enhanced])
    with pytest.raises(UserError, match=r"called row-1, of ×0 enhanced slices"):
        judged(tmp_path / "out", [enhanced])


def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, first: Path, runs: list[Path], snet_run: Path, phantom_store: Path
):
    patient = Store(phantom_store).subjects[Split.load(first / "split.json").test[0]].patient
    leaking = changed(first, tmp_path / "leaking", name="row-3", synthetic=1, patients=[patient])
    with pytest.raises(
        UserError, match=rf"slices are of generation, which was trained on 1 of the 2 patients .*{patient}"
    ):
        judged(tmp_path / "out", [first, leaking])
    other = changed(first, tmp_path / "other", name="row-3", synthetic=1, sampling={"step": 1})
    with pytest.raises(UserError, match=r"row-1 was shown the slices .*; judge runs of one data\.sampling"):
        judged(tmp_path / "out", [first, other])
    with pytest.raises(UserError, match="segments no slices"):
        judged(tmp_path / "out", [snet_run])


def test_cohorts_that_do_not_fit_are_refused(tmp_path: Path, first: Path, cohort: Path, phantom_store: Path):
    patient = Store(phantom_store).subjects[Split.load(first / "split.json").test[0]].patient
    for name, changes, message in (
        ("leaking", {"patients": [patient]}, rf"generation was trained on 1 of the 2 patients .*{patient}"),
        ("half", {"complete": False}, "its making was interrupted"),
        ("samr", {"filters": None}, "which filters nothing; expected a lesion VAE-GAN's cohort"),
    ):
        with pytest.raises(UserError, match=message):
            judged(tmp_path / "out", [first], cohorts=(recorded(cohort, tmp_path / name, **changes),))
    with pytest.raises(UserError, match="found no synthetic cohort there"):
        judged(tmp_path / "out", [first], cohorts=(phantom_store,))
    with pytest.raises(UserError, match="two cohorts called synthetic_generation"):
        judged(tmp_path / "out", [first], cohorts=(cohort, cohort))


def test_the_presets_claims_are_borne_out_by_its_own_numbers():
    rows = PRESET["rows"]
    assert list(rows) == [f"row-{number}" for number in range(1, 26)]
    dice = {name: row["dice"] for name, row in rows.items()}
    for first, relation, second in PRESET["claims"]:
        gap = dice[first] - dice[second]
        assert {"<": gap < 0, ">": gap > 0, "~": abs(gap) <= PRESET["close"]}[relation], (first, second)
    for series in PRESET["peaks"]:
        assert max(series, key=dice.get) not in (series[0], series[-1])
    for first, second in PRESET["tops"]:
        assert max(map(dice.get, first)) > max(map(dice.get, second))
    assert [max(dice, key=dice.get)] == PRESET["best"]


def test_the_console_script_finds_the_judgement(mrgen: Callable[..., Called]):
    called = mrgen("evaluate", "experiment=lesion_vaegan/tables", "subjects=all")
    assert called.code == 1
    assert "runs are judged on their common split: expected test or val" in called.message
