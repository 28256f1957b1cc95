"""``mrgen-evaluate experiment=t1_to_t2/swap`` and ``…/select``: with a judge and without, folds, sweeps, stores."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from mrgen.data.splits import Split
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.errors import UserError
from mrgen.files import write_json
from mrgen.launch.judging.evaluating import evaluate
from mrgen.launch.training import train
from tests.launch.tools import CPU, composed

NETWORK = (
    *("data.sampling.size=[16,16,16]", "data.sampling.divisor=8", "model.filters=4", "model.downs=3"),
    *("model.discriminator_filters=2", "model.discriminator_layers=1", "trainer.max_epochs=1", *CPU),
)


def trained(run_dir: Path, store: Path, preset: str, *overrides: str) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = NETWORK if preset == "pix2pix" else ("tracking=csv",)
    return train(
        composed("train", f"experiment=t1_to_t2/{preset}", f"data.store='{store}'", *settings, *overrides), run_dir
    )


def judged(out_dir: Path, *runs: Path, overrides: tuple[str, ...] = (), preset: str = "swap") -> Path:
    listed = ",".join(f"'{run}'" for run in runs)
    common = (f"experiment=t1_to_t2/{preset}", f"runs=[{listed}]", "trainer.accelerator=cpu")
    return evaluate(composed("evaluate", *common, *overrides), out_dir)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, phantom_store: Path) -> Path:
    """Runs of three families and two baselines, as a sweep leaves them. Read only."""
    folder = tmp_path_factory.mktemp("sweep")
    trained(folder / "0", phantom_store, "pix2pix")
    trained(folder / "1", phantom_store, "clustering", "model.macro=3")
    trained(folder / "2", phantom_store, "clustering", "model.macro=4")
    trained(folder / "3", phantom_store, "clustering", "model.macro=6")
    trained(folder / "4", phantom_store, "random")
    trained(folder / "10", phantom_store, "nothing")
    return folder


METHODS = ["t2/unet-100-0", "t2/clustering-3", "t2/clustering-4", "t2/clustering-6", "t2/random", "t2/nothing"]


def test_all_methods_meet_under_one_judge(tmp_path: Path, snet_run: Path, sweep: Path, capsys):
    out = judged(tmp_path / "out", overrides=(f"sweep='{sweep}'", f"segmenter='{snet_run}'", "smoke=true"))
    found = rows(out / "subjects.csv")
    tested = Split.load(snet_run / "split.json").test
    assert [(row["subject"], row["input"]) for row in found] == [
        (subject, name) for subject in tested for name in ("real", *METHODS)
    ]
    assert all(float(row["agree_dice_WT"]) <= 1 for row in found if row["input"] != "real")
    text = (out / "table.md").read_text()
    assert text.startswith("### SMOKE RUN, not a result: translation")
    assert "Normalised anew, by their own statistics, for the segmenter (zscore): t2/unet-100-0" in text
    for file in ("table.csv", "errors.png", "overlap.png", "overlay.png", "config.yaml"):
        assert (out / file).stat().st_size > 100
    assert "SMOKE RUN" in capsys.readouterr().out


def test_without_a_judge_the_images_are_compared(tmp_path: Path, sweep: Path):
    out = judged(tmp_path / "out", sweep / "1", sweep / "4")
    found = rows(out / "subjects.csv")
    assert set(found[0]) == {
        *("subject", "input", "own_mse_brain", "own_mse_tumour", "unit_mse_brain", "unit_mse_tumour")
    }
    assert not (out / "overlap.png").exists()
    means = {row["input"]: float(row["own_mse_brain"]) for row in rows(out / "table.csv")}
    assert means["t2/clustering-3"] < means["t2/random"]


def test_a_swap_into_a_segmenter_needs_one(tmp_path: Path, sweep: Path):
    conf = composed("evaluate", "experiment=rsnet/swap", f"runs=['{sweep / '1'}']", "trainer.accelerator=cpu")
    with pytest.raises(UserError, match="segmenter is not set"):
        evaluate(conf, tmp_path / "out")


def test_folds_come_together_in_one_table(tmp_path: Path, phantom_store: Path):
    """Every run on its own test subjects: leave-one-out is one table over all of them."""
    folds = ("data.split.kind=folds", "data.split.folds=4", "data.split.val=0", "data.split.test=0")
    runs = [trained(tmp_path / str(i), phantom_store, "clustering", *folds, f"data.split.fold={i}") for i in range(4)]
    found = rows(judged(tmp_path / "out", *runs) / "subjects.csv")
    assert sorted(row["subject"] for row in found) == sorted(Store(phantom_store).subjects)
    assert {row["input"] for row in found} == {"t2/clustering-5"}
    assert [row["n"] for row in rows(tmp_path / "out" / "table.csv")] == ["8"]


def test_all_subjects_of_another_store(tmp_path: Path, phantom_store: Path, snet_run: Path, sweep: Path):
    """The protocol without ground truth: nobody there has a label, and nobody was trained on."""
    other = unlabelled(phantom_store, tmp_path / "other", sweep / "1", brighter=1)
    out = judged(
        tmp_path / "out", sweep / "1", overrides=(f"store='{other}'", "subjects=all", f"segmenter='{snet_run}'")
    )
    found = rows(out / "subjects.csv")
    assert len(found) == 4
    assert not any(row.get("dice_WT") for row in found)
    assert all(row["agree_dice_WT"] for row in found if row["input"] != "real")
    assert "agreement with the segmentation from the real sequences" in (out / "table.md").read_text()


def unlabelled(store: Path, other: Path, run: Path, *, brighter: int) -> Path:
    """Two subjects that a run was trained on, as if they were other people's."""
    known = Store(store)
    write_cohort(other, known.layout, known.modalities)
    for subject in (known.subjects[id] for id in Split.load(run / "split.json").train[:2]):
        arrays = {"image": subject.read_image() + brighter, "brain": subject.read_brain(), "affine": subject.affine}
        write_subject(other, id=f"new_{subject.id}", **arrays)
    return other


def test_scans_that_a_run_was_trained_on_are_found_in_another_store_by_their_voxels(
    tmp_path: Path, phantom_store: Path, sweep: Path
):
    """Under other names, of other patients."""
    other = unlabelled(phantom_store, tmp_path / "other", sweep / "1", brighter=0)
    for path in other.glob("*/subject.json"):  # from before checksums were recorded: by their statistics
        table = json.loads(path.read_text())
        del table["checksum"]
        path.write_text(json.dumps({**table, "checksums": {}}))
        with pytest.raises(
            UserError, match=r"was trained on the voxels of \d of the 2 subjects to evaluate, under other"
        ):
            judged(tmp_path / "out", sweep / "1", overrides=(f"store='{other}'", "subjects=all"))


def test_all_subjects_of_the_training_store_are_a_leak(tmp_path: Path, sweep: Path):
    with pytest.raises(UserError, match="was trained on"):
        judged(tmp_path / "out", sweep / "1", overrides=("subjects=all",))


def test_the_selection_names_two_of_each_family(tmp_path: Path, sweep: Path, capsys):
    out = judged(tmp_path / "out", overrides=(f"sweep='{sweep}'",), preset="select")
    ranked = {row["input"]: row for row in rows(out / "table.csv")}
    assert set(ranked) == set(METHODS)
    clustering = sorted(METHODS[1:4], key=lambda name: float(ranked[name]["own_mse_brain"]))
    assert [ranked[name]["rank"] for name in clustering] == ["1", "2", "3"]
    folders = [Path(line).name for line in (out / "selected.txt").read_text().splitlines()]
    assert folders == ["0", *(str(METHODS.index(name)) for name in clustering[:2])]
    validated = Split.load(sweep / "1" / "split.json").val
    assert {row["subject"] for row in rows(out / "subjects.csv")} == set(validated)
    assert "selected.txt" in capsys.readouterr().out


def test_what_a_sweep_did_not_finish_is_said_and_left_out(tmp_path: Path, sweep: Path, capsys):
    folder = tmp_path / "sweep"
    shutil.copytree(sweep, folder)
    write_json(folder / "2" / "status.json", {"state": "failed", "reason": "full"})
    out = judged(tmp_path / "out", overrides=(f"sweep='{folder}'",))
    assert [row["input"] for row in rows(out / "table.csv")] == [name for name in METHODS if name != METHODS[2]]
    assert f"{folder / '2'}: failed, left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="no finished run there"):
        judged(tmp_path / "out", overrides=(f"sweep='{tmp_path}'",))


def test_an_unknown_kind_of_judgement(tmp_path: Path, sweep: Path):
    with pytest.raises(
        UserError, match=r"evaluation\.kind is taste; expected cross_validation, swap, translation, selection"
    ):
        judged(tmp_path / "out", sweep / "1", overrides=("evaluation.kind=taste",))


# ----- what cannot be compared ---------------------------------------------------------------------------------------


def test_runs_of_one_name_must_not_judge_a_subject_twice(tmp_path: Path, phantom_store: Path):
    """Two seeds of a split overlap: the later run would win without a word."""
    test = "data.split.test=0.5"
    runs = [trained(tmp_path / s, phantom_store, "random", test, f"data.split.seed={s}") for s in ("0", "1")]
    assert set(Split.load(runs[0] / "split.json").test) & set(Split.load(runs[1] / "split.json").test)
    with pytest.raises(UserError, match=r"t2/random would judge .* twice; runs of one name must be the folds"):
        judged(tmp_path / "out", *runs)


def test_methods_must_be_judged_on_the_same_subjects(tmp_path: Path, phantom_store: Path):
    explicit = ("data.split.kind=explicit", "data.split.val=[]", "data.split.stratify=null")
    ids = list(Store(phantom_store).subjects)
    a = trained(
        tmp_path / "a", phantom_store, "random", *explicit, f"data.split.train={ids[2:]}", f"data.split.test={ids[:2]}"
    )
    b = trained(
        tmp_path / "b", phantom_store, "nothing", *explicit, f"data.split.train={ids[2:]}", f"data.split.test={ids[:1]}"
    )
    with pytest.raises(UserError, match="t2/nothing would be judged on 1 of 2 subjects"):
        judged(tmp_path / "out", a, b)


def test_subjects_of_one_id_in_two_stores_are_two(tmp_path: Path, phantom_store: Path):
    """As in two phantoms of another spacing."""
    other = shutil.copytree(phantom_store, tmp_path / "other")
    a = trained(tmp_path / "a", phantom_store, "random")
    b = trained(tmp_path / "b", other, "nothing")
    with pytest.raises(UserError, match="t2/random would be judged on 2 of 4 subjects"):
        judged(tmp_path / "out", a, b)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("subjects=test",), "a selection needs subjects=val"),
        (("evaluation.criterion=dise",), "criterion is dise"),
        (("evaluation.criterion=dice",), "needs a segmenter"),
        (("evaluation.count=0",), "count is 0"),
    ],
)
def test_a_selection_that_cannot_be_is_refused_before_anything_is_judged(
    tmp_path: Path, overrides: tuple[str, ...], message: str
):
    with pytest.raises(UserError, match=message):
        judged(tmp_path / "out", Path("/no/such/run"), overrides=overrides, preset="select")


def test_several_sweeps_are_judged_together(tmp_path: Path, sweep: Path, phantom_store: Path):
    other = tmp_path / "other"
    trained(other / "0", phantom_store, "constant")
    out = judged(tmp_path / "out", overrides=(f"sweep=['{sweep}','{other}']",))
    assert [row["input"] for row in rows(out / "table.csv")] == [*METHODS, "t2/constant"]


def test_jobs_are_in_the_order_of_their_numbers(tmp_path: Path, phantom_store: Path):
    from mrgen.launch.judging.evaluating import _of_sweep

    for name in ("10_b", "2_resnet-1000-0", "3_a", "0_c"):
        write_json_folder(tmp_path / name)
    assert [path.name for path in _of_sweep(tmp_path)] == ["0_c", "2_resnet-1000-0", "3_a", "10_b"]


def write_json_folder(folder: Path) -> None:
    folder.mkdir()
    write_json(folder / "status.json", {"state": "finished"})


def test_a_swap_without_a_label_says_what_judges_such_subjects(
    tmp_path: Path, phantom_store: Path, snet_run: Path, rsnet_run: Path
):
    other = tmp_path / "other"
    shutil.copytree(phantom_store, other)
    for path in other.glob("*/subject.json"):
        table = json.loads(path.read_text())
        del table["checksum"]
        path.write_text(json.dumps({**table, "patient": f"new {table['id']}", "label_counts": None}))
    conf = composed(
        *("evaluate", "experiment=rsnet/swap", f"segmenter='{snet_run}'", f"runs=['{rsnet_run}']", "subjects=all"),
        *(f"store='{other}'", "trainer.accelerator=cpu"),
    )
    with pytest.raises(UserError, match="has a label, which this judgement needs; experiment=t1_to_t2/swap"):
        evaluate(conf, tmp_path / "out")
