"""``mrgen-evaluate experiment=samr/samples``: sheets, numbers and a reader's study from run folders."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mrgen.callbacks.provenance import KEY
from mrgen.data.splits import Split
from mrgen.data.store import Store
from mrgen.errors import UserError
from mrgen.launch.judging.sampling import draw_samples
from tests.launch.test_training_paper2 import NARROW, UNET, trained
from tests.launch.tools import Called, composed

SHORT = ("trainer.max_epochs=1", "data.steps_per_epoch=1")


@pytest.fixture(scope="module")
def runs(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SAMR with and without its atlas, of one split. Read only."""
    folder = tmp_path_factory.mktemp("generators")
    return {name: trained(folder / name, phantom_store, name, *NARROW, *UNET, *SHORT) for name in ("samr", "no_atlas")}


def sampled(out: Path, runs: list[Path], *overrides: str) -> Path:
    listed = ",".join(f"'{run}'" for run in runs)
    common = ("experiment=samr/samples", f"runs=[{listed}]", "trainer.accelerator=cpu")
    return draw_samples(composed("evaluate", *common, *overrides), out)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def sheets(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sampled(tmp_path_factory.mktemp("sheets") / "out", [*runs.values()], "evaluation.subjects=1", "smoke=true")


def test_sheets_and_numbers_are_of_the_test_subjects(sheets: Path, runs: dict[str, Path]):
    tested = Split.load(runs["samr"] / "split.json").test
    pictures = {path.stem.partition("-")[::2] for path in sheets.glob("*.png")}
    ((_, pictured), *_) = pictures
    assert pictures == {("methods", pictured), ("manipulations", pictured)}
    assert pictured in tested
    found = rows(sheets / "subjects.csv")
    assert {row["subject"] for row in found} == set(tested)
    assert len(found) == len(tested) * 3 * 4  # real and two methods, four sequences
    assert {(row["input"], row["sequence"]) for row in rows(sheets / "table.csv")} == {
        (name, sequence) for name in ("real", *runs) for sequence in ("t1", "t1ce", "t2", "flair")
    }
    assert all(0 < float(row["mae_brain"]) < 2 for row in found if row["input"] != "real")


def test_the_table_says_what_it_is_and_has_the_papers_preference(sheets: Path, runs: dict[str, Path]):
    text = (sheets / "table.md").read_text(encoding="utf-8")
    assert text.startswith("### SMOKE RUN, not a result: samples")
    assert "no measure of usefulness" in text
    assert "| samr | 72.1% | not measured here |" in text
    (donor,) = re.findall(r"the other patient's lesion is (\S+)'s\.", text)
    assert donor in Split.load(runs["samr"] / "split.json").train
    assert str(runs["samr"].parents[1]) not in text  # no place on this machine


def test_the_blind_sheet_stands_alone_and_its_answers_are_scored(
    runs: dict[str, Path], phantom_store: Path, tmp_path: Path, mrgen: Callable[..., Called]
):
    """From the sheet through a reader, who takes all that is real for real and nothing else, to the rates."""
    out = sampled(tmp_path / "out", [*runs.values()], "blind=true", "evaluation.items=5")
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == ["blind/sheet.html", "config.yaml", "key/README.txt", "key/key.csv"]  # no picture tells
    text = re.sub(r"base64,[^\"]+", "", (out / "blind" / "sheet.html").read_text(encoding="utf-8"))
    assert not [name for name in ("samr", "no_atlas", *Store(phantom_store).subjects) if name in text]
    key = rows(out / "key" / "key.csv")
    assert len(key) == 5 * 3
    tested = Split.load(runs["samr"] / "split.json").test
    places = {(line["subject"], line["slice"]) for line in key}
    assert len(places) == 5
    assert {subject for subject, _ in places} == set(tested)  # as many slices of each as can be
    for subject, number in places:
        lookup = Store(phantom_store).subjects[subject].read_label()
        assert lookup[..., int(number)].any()

    lines = [f"{k['sheet']},{k['item']},{k['letter']},{'yes' if k['method'] == 'real' else 'no'}," for k in key]
    (tmp_path / "answers.csv").write_text("\n".join(["sheet,item,letter,real,most", *lines]), encoding="utf-8")
    called = mrgen(
        "evaluate", "experiment=samr/samples", f"answers='{tmp_path / 'answers.csv'}'", f"key='{out / 'key/key.csv'}'"
    )
    assert called.code == 0, called.err
    assert "Human preference" in called.out
    (folder,) = (tmp_path / "runs" / "samr-samples").iterdir()
    rates = [(row["method"], row["n"], row["real"]) for row in rows(folder / "table.csv")]
    assert rates[0] == ("real", "5", "100.0")
    assert sorted(rates[1:]) == [("no_atlas", "5", "0.0"), ("samr", "5", "0.0")]
    assert "72.1" in (folder / "table.md").read_text(encoding="utf-8")


def test_a_seed_draws_the_same_sheet(runs: dict[str, Path], tmp_path: Path):
    out = [sampled(tmp_path / str(i), [runs["no_atlas"]], "blind=true", "evaluation.items=3") for i in range(2)]
    texts = [(folder / "blind" / "sheet.html").read_text(encoding="utf-8") for folder in out]
    assert texts[0] == texts[1]
    other = sampled(tmp_path / "other", [runs["no_atlas"]], "blind=true", "evaluation.items=3", "seed=1")
    assert (other / "blind" / "sheet.html").read_text(encoding="utf-8") != texts[0]


def test_fewer_slices_than_asked_for_are_said(runs: dict[str, Path], tmp_path: Path, capsys):
    sampled(tmp_path / "out", [runs["no_atlas"]], "blind=true", "evaluation.items=1000")
    assert "evaluation.items is 1000; only " in capsys.readouterr().out


# ----- refused -------------------------------------------------------------------------------------------------------


def test_a_run_that_generates_nothing_is_refused(rsnet_run: Path, runs: dict[str, Path], tmp_path: Path):
    with pytest.raises(UserError, match="is a RSNet, which makes no images from label maps; expected runs of gen"):
        sampled(tmp_path / "out", [runs["samr"], rsnet_run])


@pytest.mark.parametrize(
    ("said", "instead", "message"),
    [
        (r"store: .*phantom.*", "store: /elsewhere", r"store is /elsewhere, that of .*; sheets show one slice as all"),
        (r"dropped_elsewhere: 0\.1", "dropped_elsewhere: 0.2", r"data\.sampling is .*'dropped_elsewhere': 0\.2"),
        (r"name: no_atlas", "name: real", "is called real, as the real slices are"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(
    runs: dict[str, Path], tmp_path: Path, said: str, instead: str, message: str
):
    folder = shutil.copytree(runs["no_atlas"], tmp_path / "run")
    text, count = re.subn(said, instead, (folder / "config.yaml").read_text(encoding="utf-8"))
    assert count == 1
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        sampled(tmp_path / "out", [runs["samr"], folder])


def test_runs_of_different_sequences_are_refused(runs: dict[str, Path], tmp_path: Path):
    folder = shutil.copytree(runs["no_atlas"], tmp_path / "run")
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    content[KEY]["data"]["modalities"] = ["t1", "flair"]
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"data.modalities is \['t1', 'flair'\], that of"):
        sampled(tmp_path / "out", [runs["samr"], folder])


def test_a_split_of_its_own_is_refused(runs: dict[str, Path], tmp_path: Path):
    """It would picture somebody whom one of the runs was trained on."""
    folder = shutil.copytree(runs["no_atlas"], tmp_path / "run")
    split = Split.load(folder / "split.json")
    Split(train=(*split.train[1:], split.test[0]), val=(), test=(*split.test[1:], split.train[0])).save(
        folder / "split.json"
    )
    with pytest.raises(UserError, match=r"its split is not that of .*; train all runs with one split"):
        sampled(tmp_path / "out", [runs["samr"], folder])


def test_a_patient_that_was_trained_on_is_refused(runs: dict[str, Path], phantom_store: Path, tmp_path: Path):
    """A second scan of a training patient among the test subjects."""
    store = shutil.copytree(phantom_store, tmp_path / "store")
    split = Split.load(runs["samr"] / "split.json")
    trained_on = Store(store).subjects[split.train[0]].patient
    table = store / split.test[0] / "subject.json"
    assert table.is_file()
    values = json.loads(table.read_text(encoding="utf-8")) | {"patient": trained_on}
    del values["checksum"]
    table.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=rf"visits of one patient must stay in one set, found {trained_on}"):
        sampled(tmp_path / "out", [runs["samr"]], f"store='{store}'")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("subjects=all",), "subjects is all; samples are of subjects that no run has seen"),
        (("subjects=val",), "its split has no val subjects"),
        (("evaluation.subjects=0",), "evaluation.subjects is 0; expected a whole number from 1 on"),
        (("evaluation.items=many",), "evaluation.items is 'many'; expected"),
        (("blind=perhaps",), "blind is 'perhaps'; expected true or false"),
        (("answers=a.csv",), "key is not set; give both"),
        (("key=key.csv",), "answers is not set; give both"),
        (("answers=a.csv", "key=key.csv"), "scored without runs and without blind=true"),
        (("answers=nothing.csv", "key=nothing.csv", "runs=[]"), "nothing.csv: cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(runs: dict[str, Path], tmp_path: Path, overrides: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        sampled(tmp_path / "out", [runs["samr"]], *overrides)


def test_a_run_given_twice_is_refused(runs: dict[str, Path], tmp_path: Path):
    with pytest.raises(UserError, match="runs names a run twice"):
        sampled(tmp_path / "out", [runs["samr"], runs["samr"]])


def test_other_judgements_have_no_blind_sheet(mrgen: Callable[..., Called], rsnet_run: Path):
    called = mrgen("evaluate", "experiment=t1_to_t2/swap", f"runs=['{rsnet_run}']", "blind=true")
    assert "blind=True: only samples have a blind sheet; choose experiment=samr/samples" in called.message
