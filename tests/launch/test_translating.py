"""``mrgen-evaluate experiment=t1_to_t2/swap`` and ``…/select``: with a judge and without, folds, sweeps, stores."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from mrgen.data.splits import Split
from mrgen.data.store import Store
from mrgen.errors import UserError
from mrgen.launch.evaluating import evaluate
from mrgen.launch.status import write_json
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
    other = tmp_path / "other"
    shutil.copytree(phantom_store, other)
    for path in other.glob("*/subject.json"):
        table = json.loads(path.read_text())
        path.unlink()
        if path.parent.name.endswith("1") and len(list(other.glob("new_*"))) < 2:
            table |= {"id": f"new_{table['id']}", "patient": f"new_{table['id']}", "label_counts": None}
            path.parent.rename(other / table["id"])
            (other / table["id"] / "subject.json").write_text(json.dumps(table))
    out = judged(
        tmp_path / "out", sweep / "1", overrides=(f"store='{other}'", "subjects=all", f"segmenter='{snet_run}'")
    )
    found = rows(out / "subjects.csv")
    assert len(found) == 4
    assert not any(row.get("dice_WT") for row in found)
    assert all(row["agree_dice_WT"] for row in found if row["input"] != "real")
    assert "agreement with the segmentation from the real sequences" in (out / "table.md").read_text()


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
    with pytest.raises(UserError, match=r"evaluation\.kind is taste; expected swap, translation, selection"):
        judged(tmp_path / "out", sweep / "1", overrides=("evaluation.kind=taste",))
