"""The swap, from run folders to a table; and the runs that it must not judge together."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mrgen.callbacks.provenance import KEY
from mrgen.data.splits import Split
from mrgen.data.store import Store
from mrgen.errors import UserError
from mrgen.launch.judging.evaluating import evaluate
from mrgen.launch.runs import load_run
from mrgen.papers.rsnet import RSNet
from mrgen.segmenter import SegmenterModule
from tests.launch.tools import composed, tiny_run


def swapped(out_dir: Path, segmenter: Path, *runs: Path, overrides: tuple[str, ...] = ()) -> Path:
    listed = ",".join(f"'{run}'" for run in runs)
    common = ("experiment=rsnet/swap", f"segmenter='{segmenter}'", f"runs=[{listed}]", "trainer.accelerator=cpu")
    return evaluate(composed("evaluate", *common, *overrides), out_dir)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run_dir(rsnet_run: Path, tmp_path: Path) -> Path:
    """A run to spoil."""
    shutil.copytree(rsnet_run, tmp_path / "run")
    return tmp_path / "run"


def described(run_dir: Path, **data: Any) -> None:
    """Changes what the best checkpoint says of its data."""
    path = run_dir / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content[KEY]["data"] |= data
    torch.save(content, path)


def dealt(run_dir: Path, **parts: tuple[str, ...]) -> None:
    """Changes what split.json says of a run's training."""
    split = Split.load(run_dir / "split.json")
    Split(**{name: parts.get(name, getattr(split, name)) for name in ("train", "val", "test")}).save(
        run_dir / "split.json"
    )


# ----- the judgement -------------------------------------------------------------------------------------------------


def test_a_swap_writes_tables_and_a_figure(snet_run: Path, rsnet_run: Path, tmp_path: Path, capsys):
    """Two seeds of one method and target are two rows, and the paper's numbers stand beside both."""
    again = shutil.copytree(rsnet_run, tmp_path / "again")
    out_dir = swapped(tmp_path / "swap", snet_run, rsnet_run, again)
    figures = {"figure.png", "synthesis-rsnet.png", "synthesis-rsnet#2.png", "uncertainty.png"}
    texts = {"calibration.csv", "config.yaml", "pairs.csv", "subjects.csv", "table.csv", "table.md"}
    assert {path.name for path in out_dir.iterdir()} == figures | texts
    assert all((out_dir / name).read_bytes().startswith(b"\x89PNG") for name in figures)

    tested = Split.load(snet_run / "split.json").test
    subjects = rows(out_dir / "subjects.csv")
    assert [(row["subject"], row["input"]) for row in subjects] == [
        (subject, name) for subject in tested for name in ("real", "t2/rsnet", "t2/rsnet#2")
    ]
    first, second = ([row for row in subjects if row["input"] == name] for name in ("t2/rsnet", "t2/rsnet#2"))
    for a, b in zip(first, second, strict=True):  # copies of one run, which draw their own dropout
        assert 0 < abs(float(a["mse_brain"]) - float(b["mse_brain"])) < 0.2 * float(a["mse_brain"])

    table = rows(out_dir / "table.csv")
    assert [(row["synthesised"], row["by"]) for row in table] == [("–", "all real"), ("t2", "rsnet"), ("t2", "rsnet#2")]
    assert [row["paper_ET"] for row in table] == ["68.2", "66.3", "66.3"]
    assert [row["n"] for row in table] == [str(len(tested))] * 3
    for key, scale in (("dice_WT", 100), ("hd95_ET", 1), ("mse_tumour", 1), ("rank_correlation", 1)):
        mean = scale * sum(float(row[key]) for row in first) / len(first)
        assert float(table[1][key]) == pytest.approx(mean)
        assert float(table[1][f"{key}_low"]) <= mean <= float(table[1][f"{key}_high"])
    assert table[1]["dice_ET_p"] == table[0]["mse_brain"] == ""  # two subjects are no test, and real is no synthesis
    (pair,) = rows(out_dir / "pairs.csv")
    assert (pair["by"], pair["minus"], pair["n"]) == ("rsnet#2", "rsnet", "2")
    bins = rows(out_dir / "calibration.csv")
    assert {(row["subject"], row["input"]) for row in bins} == {
        (subject, name) for subject in tested for name in ("t2/rsnet", "t2/rsnet#2")
    }
    markdown = (out_dir / "table.md").read_text()
    titles = [line for line in markdown.splitlines() if line.startswith("###")]
    assert titles == [
        "### Swap, Dice",
        "### Swap, change of Dice",
        "### Swap, HD95",
        "### Swap, synthesis",
        "### Swap, MSE in the tumour, methods of one target",
    ]
    assert "Mehta and Arbel, Table 1" in markdown
    assert f"Mean over {len(tested)} subjects" in markdown
    assert "Optimistic" not in markdown
    assert "all real" in capsys.readouterr().out

    # What dropout draws hangs on seed, subject and row: the copies in the other order, the same numbers.
    exchanged = swapped(tmp_path / "exchanged", snet_run, again, rsnet_run)
    assert (exchanged / "table.csv").read_text() == (out_dir / "table.csv").read_text()


def test_without_dropout_there_is_no_uncertainty_to_show(snet_run: Path, tmp_path: Path, phantom_store: Path):
    run_dir = tiny_run(tmp_path / "run", phantom_store, "model.dropout=0")
    out_dir = swapped(tmp_path / "swap", snet_run, run_dir)
    written = {"config.yaml", "figure.png", "subjects.csv", "table.csv", "table.md"}
    assert {path.name for path in out_dir.iterdir()} == written
    assert "rank correlation" not in (out_dir / "table.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_one_subject_is_judged_too(snet_run: Path, rsnet_run: Path, tmp_path: Path):
    shutil.copytree(snet_run, tmp_path / "snet")
    dealt(tmp_path / "snet", test=Split.load(snet_run / "split.json").test[:1])
    out_dir = swapped(tmp_path / "swap", tmp_path / "snet", rsnet_run)
    assert "Mean over 1 subject;" in (out_dir / "table.md").read_text()
    assert {row["n"] for row in rows(out_dir / "table.csv")} == {"1"}


@pytest.mark.usefixtures("no_pictures")
def test_a_smoke_run_says_so_and_subjects_that_chose_the_checkpoint_are_called_optimistic(
    snet_run: Path, rsnet_run: Path, tmp_path: Path
):
    out_dir = swapped(tmp_path / "swap", snet_run, rsnet_run, overrides=("smoke=true", "subjects=val"))
    markdown = (out_dir / "table.md").read_text()
    assert "### SMOKE RUN, not a result: swap" in markdown
    assert "the val part of the segmenter's split" in markdown
    assert "Optimistic: 1 of these subjects chose the checkpoint of run." in markdown
    assert {row["subject"] for row in rows(out_dir / "subjects.csv")} == set(Split.load(snet_run / "split.json").val)


@pytest.mark.usefixtures("no_pictures")
def test_another_store_of_the_same_subjects_can_be_judged_on(
    snet_run: Path, rsnet_run: Path, tmp_path: Path, phantom_store: Path
):
    shutil.copytree(phantom_store, tmp_path / "elsewhere")
    out_dir = swapped(tmp_path / "swap", snet_run, rsnet_run, overrides=(f"store={tmp_path}/elsewhere",))
    assert "elsewhere" in (out_dir / "table.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_runs_trained_on_patches_are_judged_on_whole_brains(snet_run: Path, tmp_path: Path, phantom_store: Path):
    patches = ("data/sampling=patch", "data.sampling.size=[16,16,16]", "data.steps_per_epoch=1")
    run_dir = tiny_run(tmp_path / "run", phantom_store, *patches)
    out_dir = swapped(tmp_path / "swap", snet_run, run_dir)
    assert [row["by"] for row in rows(out_dir / "table.csv")] == ["all real", "rsnet"]


# ----- what is refused -----------------------------------------------------------------------------------------------


def test_a_run_that_was_trained_on_an_evaluated_patient_is_refused(snet_run: Path, run_dir: Path, tmp_path: Path):
    split = Split.load(run_dir / "split.json")
    dealt(run_dir, train=(*split.train, split.test[0]), test=split.test[1:])
    with pytest.raises(UserError, match=r"was trained on 1 of the 2 patients to evaluate .*data\.split\.kind=file"):
        swapped(tmp_path / "swap", snet_run, run_dir)
    assert not (tmp_path / "swap" / "table.md").exists()


def test_another_visit_of_an_evaluated_patient_is_a_leak_too(
    snet_run: Path, run_dir: Path, tmp_path: Path, phantom_store: Path
):
    """Not the scan but the patient counts."""
    import json

    store, segmenter = tmp_path / "store", tmp_path / "snet"
    shutil.copytree(phantom_store, store)
    shutil.copytree(snet_run, segmenter)
    split = Split.load(run_dir / "split.json")
    dealt(segmenter, train=split.train[1:])
    patient = Store(store).subjects[split.test[0]].patient
    record = store / split.train[0] / "subject.json"
    table = json.loads(record.read_text()) | {"patient": patient}
    del table["checksum"]
    record.write_text(json.dumps(table))
    with pytest.raises(UserError, match=rf"run was trained on 1 of the 2 patients to evaluate \({patient}\)"):
        swapped(tmp_path / "swap", segmenter, run_dir, overrides=(f"store={store}",))


def test_the_segmenter_itself_must_not_have_seen_the_subjects(snet_run: Path, rsnet_run: Path, tmp_path: Path):
    shutil.copytree(snet_run, tmp_path / "snet")
    split = Split.load(snet_run / "split.json")
    dealt(tmp_path / "snet", train=split.train[1:], test=(*split.test, split.train[0]))
    with pytest.raises(UserError, match=r"run was trained on 1 of the 3 patients"):
        swapped(tmp_path / "swap", tmp_path / "snet", rsnet_run)


def test_a_split_without_test_subjects_suggests_val(snet_run: Path, rsnet_run: Path, tmp_path: Path):
    shutil.copytree(snet_run, tmp_path / "snet")
    dealt(tmp_path / "snet", test=())
    with pytest.raises(UserError, match=r"has no test subjects; choose subjects=val, or train with data\.split\.test"):
        swapped(tmp_path / "swap", tmp_path / "snet", rsnet_run)


def test_an_unknown_part_of_the_split(snet_run: Path, rsnet_run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="subjects is train; expected test, val or all"):
        swapped(tmp_path / "swap", snet_run, rsnet_run, overrides=("subjects=train",))


def test_kinds_of_run_are_not_mixed_up(snet_run: Path, rsnet_run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"segmenter=.* is a RSNet; expected a segmenter such as S-Net"):
        swapped(tmp_path / "swap", rsnet_run, rsnet_run)
    with pytest.raises(UserError, match="is a SegmenterModule, which synthesises nothing"):
        swapped(tmp_path / "swap", snet_run, snet_run)


def test_no_runs(snet_run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="runs is empty"):
        swapped(tmp_path / "swap", snet_run)


def test_a_synthesis_on_another_scale_than_its_data_is_refused(snet_run: Path, run_dir: Path, tmp_path: Path):
    described(run_dir, normalisation={"_target_": "mrgen.data.normalisation.MinMax"})
    with pytest.raises(
        UserError, match=r"makes values on the scale 'zscore' and was trained on data on the scale 'unit'"
    ):
        swapped(tmp_path / "swap", snet_run, run_dir)


def test_a_synthesis_that_the_segmenter_does_not_read_is_refused(rsnet_run: Path, tmp_path: Path, phantom_store: Path):
    narrow = tiny_run(tmp_path / "snet", phantom_store, "data.modalities=[t1,flair]", preset="snet")
    with pytest.raises(UserError, match=r"makes t2 from t1, t1ce, flair; the segmenter was trained on t1, flair"):
        swapped(tmp_path / "swap", narrow, rsnet_run)


def test_a_run_counts_once(snet_run: Path, rsnet_run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="names a run twice"):
        swapped(tmp_path / "swap", snet_run, rsnet_run, rsnet_run)


@pytest.mark.usefixtures("no_pictures")
def test_every_network_is_judged_in_the_box_that_it_was_trained_in(
    snet_run: Path, rsnet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Norms take their statistics from the volume that they see, so a tighter box would be another network."""
    trained = load_run(snet_run)
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    wider = [n + 16 for n in checkpoint["mrgen"]["data"]["box"]]
    checkpoint["mrgen"]["data"]["box"] = wider
    other = shutil.copytree(snet_run, tmp_path / "wider")
    torch.save(checkpoint, other / "checkpoints" / trained.checkpoint.name)
    saw: dict[str, set[tuple[int, ...]]] = {}
    for cls, method in ((SegmenterModule, "segment"), (RSNet, "synthesize")):
        original = getattr(cls, method)

        def spied(self: Any, volumes: Any, original: Any = original) -> Any:
            first = next(iter(volumes.values()))
            if first.device.type != "meta":  # which only tells how much memory a pass takes
                saw.setdefault(type(self).__name__, set()).add(tuple(first.shape[2:]))
            return original(self, volumes)

        monkeypatch.setattr(cls, method, spied)
    swapped(tmp_path / "swap", other, rsnet_run)
    assert saw == {"SegmenterModule": {tuple(wider)}, "RSNet": {tuple(n - 16 for n in wider)}}
