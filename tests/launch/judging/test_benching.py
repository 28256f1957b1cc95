"""``mrgen-evaluate experiment=bench``: imputers under several judges, segmenters with and without synthetic slices."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mrgen.data.splits import Split
from mrgen.data.store import Store
from mrgen.launch.paths import CONF_DIR
from mrgen.launch.training import train
from tests.launch.judging.test_augmenting import synthetic
from tests.launch.judging.test_augmenting import trained as unet
from tests.launch.tools import CPU, Called, composed, tiny_run

TINY = {
    "bench/rsnet": ("model.filters=2", "model.levels=2", "model.mc_samples=2", "trainer.max_epochs=1", *CPU),
    "bench/joint": (
        *("data.sampling.size=[48,48]", "data.steps_per_epoch=2", "data.batch_size=4", "model.width=2"),
        *("trainer.max_epochs=1", *CPU),
    ),
}
METHODS = {"rsnet", "joint", "complementary", "nothing"}


def trained(folder: Path, store: Path, preset: str, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    settings = TINY.get(preset, ("tracking=csv",))
    return train(composed("train", f"experiment={preset}", f"data.store='{store}'", *settings, *overrides), folder)


@pytest.fixture(scope="module")
def judge(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second one beside S-Net. Read only."""
    folder = tmp_path_factory.mktemp("judge") / "run"
    return tiny_run(folder, phantom_store, "name=second", "seed=1", preset="snet")


@pytest.fixture(scope="module")
def imputers(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T2 from T1 by two papers' networks and between two baselines, as a sweep leaves them. Read only."""
    folder = tmp_path_factory.mktemp("imputers")
    for job, preset in enumerate(("bench/rsnet", "bench/joint", "t1_to_t2/complementary", "t1_to_t2/nothing")):
        trained(folder / str(job), phantom_store, preset)
    return folder


@pytest.fixture(scope="module")
def segmenters(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real slices alone, and with synthetic ones, twice. Read only."""
    folder, store = tmp_path_factory.mktemp("segmenters"), Store(phantom_store)
    real = unet(folder / "0", phantom_store, "unet")
    patients = sorted(store.subjects[id].patient for id in Split.load(real / "split.json").train)
    made = f"data.mix.store='{synthetic(folder.parent / 'synthetic', store, patients)}'"
    for job in (1, 2):
        unet(folder / str(job), phantom_store, "unet_mixed", "data.mix.fraction=0.5", made, f"seed={job}")
    return folder


@pytest.fixture
def bench(mrgen: Callable[..., Called], tmp_path: Path) -> Callable[..., Called]:
    """``mrgen-evaluate experiment=bench`` into ``tmp_path / "out"``."""

    def call(*overrides: str) -> Called:
        into = f"hydra.run.dir='{tmp_path / 'out'}'"
        return mrgen("evaluate", "experiment=bench", "trainer.accelerator=cpu", "tracking=csv", into, *overrides)

    return call


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_command_makes_both_tables(
    bench: Callable[..., Called],
    tmp_path: Path,
    snet_run: Path,
    judge: Path,
    imputers: Path,
    segmenters: Path,
    no_pictures: None,
):
    done = bench(f"segmenter=['{snet_run}','{judge}']", f"sweep=['{imputers}','{segmenters}']", "smoke=true")
    assert done.code == 0, done.err
    out = tmp_path / "out"
    lines = rows(out / "imputation.csv")
    assert lines[0]["by"] == "all real"
    assert {line["by"] for line in lines[1:]} == METHODS
    means = [(float(line["snet_dice_mean"]) + float(line["second_dice_mean"])) / 2 for line in lines[1:]]
    assert means == sorted(means, reverse=True)
    for name in ("snet", "second"):  # each judge's own tables, whose numbers these are
        per_subject = rows(out / f"imputation-{name}" / "subjects.csv")
        assert {row["input"] for row in per_subject} == {"real", *(f"t2/{method}" for method in METHODS)}
        for line in lines[1:]:
            found = [row for row in per_subject if row["input"] == f"t2/{line['by']}"]
            whole = 100 * sum(float(row["dice_WT"]) for row in found) / len(found)
            assert float(line[f"{name}_dice_WT"]) == pytest.approx(whole)
            error = sum(float(row["own_mse_brain"]) for row in found) / len(found)  # whoever judges
            assert float(line["own_mse_brain"]) == pytest.approx(error, rel=1e-4)
    augmented = rows(out / "augmentation.csv")
    assert [(line["input"], line["trainings"]) for line in augmented[::4]] == [("real", "1"), ("samr-0.5", "2")]
    text = (out / "table.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert titles == [
        f"### SMOKE RUN, not a result: bench, {name}"
        for name in (
            *("T2 from T1", "T2 from T1, errors of the images", "T2 from T1, change of Dice, judged by snet"),
            *("T2 from T1, change of Dice, judged by second", "synthetic training slices"),
            "synthetic training slices, change of Dice",
        )
    ]
    assert str(tmp_path.parent) not in text  # no place on this machine
    for file in ("config.yaml", "imputation-second/table.md", "augmentation/table.md"):
        assert (out / file).stat().st_size > 100


def test_judges_may_lie_among_the_runs_and_one_table_does(
    bench: Callable[..., Called], tmp_path: Path, snet_run: Path, imputers: Path, no_pictures: None
):
    done = bench(f"runs=['{imputers / '2'}','{snet_run}','{imputers / '3'}']")
    assert done.code == 0, done.err
    assert {line["by"] for line in rows(tmp_path / "out" / "imputation.csv")} == {
        "all real",
        "complementary",
        "nothing",
    }
    assert not (tmp_path / "out" / "augmentation.csv").exists()


def test_what_cannot_stand_in_one_table_is_refused(
    bench: Callable[..., Called],
    mrgen: Callable[..., Called],
    tmp_path: Path,
    phantom_store: Path,
    snet_run: Path,
    rsnet_run: Path,
    imputers: Path,
):
    listed = f"runs=['{imputers / '3'}','{rsnet_run}']"
    more = bench(listed, f"segmenter='{snet_run}'").message
    assert "makes t2 from t1, " in more
    assert "t2 from t1, t1ce, flair; the bench compares what is made from the same" in more
    assert "no judge for the imputers" in bench(listed).message
    assert "found neither imputers nor segmenters of slices" in bench(f"runs=['{snet_run}']").message
    assert "subjects is all; the bench is of held-out subjects" in bench(listed, "subjects=all").message
    assert "is a Nothing; expected a segmenter" in bench(listed, f"segmenter=['{imputers / '3'}']").message
    other = tiny_run(tmp_path / "other", phantom_store, "data.split.seed=1", preset="snet")
    assert Split.load(other / "split.json").test != Split.load(snet_run / "split.json").test
    judges = f"segmenter=['{snet_run}','{other}']"
    assert "train all judges with one split" in bench(f"runs=['{imputers / '3'}']", judges).message
    assert "was trained on" in bench(f"runs=['{imputers / '1'}']", f"segmenter='{other}'").message
    elsewhere = mrgen("evaluate", "experiment=t1_to_t2/swap", f"runs=['{imputers / '3'}']", judges)
    assert "expected one run; several judge in experiment=bench alone" in elsewhere.message


MINIATURE = """#!/usr/bin/env bash
# Each command as it is, with settings behind its own that make it small.
phantom="data.phantom.subjects=10 data.phantom.spacing=5"
brief="trainer.max_epochs=1 data.steps_per_epoch=2 data.batch_size=2"
small=""
case "$*" in
    *resume=*) ;;
    *mrgen.prepare*) small="$phantom" ;;
    *t1_to_t2/pix2pix*) small="$phantom $brief data.sampling.size=[32,32,32] model.filters=4 model.downs=3" ;;
    *t1_to_t2/deepmedic*) small="$phantom $brief data.sampling.size=[61,61,61]" ;;
    *model.*filters=* | *model.*width*) small="$phantom $brief" ;;
    *mrgen.train*) small="$phantom" ;;
    *mrgen.synthesize*slices=*) small="slices=200 selection.outline_error=1" ;;
    *mrgen.evaluate*) small="smoke=true mc_samples=2" ;;
esac
echo "$@" >> "$SAID"
exec PYTHON "$@" $small
"""


@pytest.mark.slow
def test_the_experiment_goes_through_all_of_its_steps_and_again_only_judges(tmp_path: Path):
    """``experiments/bench/run.sh`` itself, of so few steps that nothing is learned."""
    stub, said = tmp_path / "bin" / "python", tmp_path / "said"
    stub.parent.mkdir()
    stub.write_text(MINIATURE.replace("PYTHON", sys.executable))
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    command = ["bash", CONF_DIR.parent / "experiments" / "bench" / "run.sh", tmp_path / "work"]

    def run() -> list[str]:
        said.write_text("")
        environment = {**os.environ, "PATH": path, "SAID": str(said)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        logs = "".join(f"\n{log.name}: {log.read_text()[-500:]}" for log in (tmp_path / "work" / "logs").glob("*.log"))
        assert done.returncode == 0, done.stderr + logs
        return said.read_text().splitlines()

    first = run()
    tables = tmp_path / "work" / "tables"
    methods = {line["by"] for line in rows(tables / "imputation.csv")}
    networks = {"rsnet", "joint", "unet-100-0", "resnet-100-0"}
    assert methods == {
        *networks,
        "clustering-5",
        "search5-5",
        "complementary",
        "random",
        "constant",
        "nothing",
        "all real",
    }
    generators = ("samr", "shin", "pix2pixhd", "pix2pix", "lesion_vaegan")
    lines = rows(tables / "augmentation.csv")
    assert {line["input"] for line in lines} == {"real", *(f"{name}-{n}" for name in generators for n in (1.0, 0.5))}
    assert {line["trainings"] for line in lines} == {"2"}
    text = (tables / "table.md").read_text()
    assert all(f"judged by {judge}" in text for judge in ("snet", "deepmedic"))
    pictures = ("imputation.png", "augmentation.png", "imputation-snet/overlay.png", "augmentation/segmentation.png")
    assert all((tables / picture).stat().st_size > 100 for picture in pictures)
    again = run()
    assert sum("mrgen.train" in command for command in first) > 30
    assert not [command for command in again if "mrgen.train" in command]
    assert (tables / "table.md").read_text() == text
