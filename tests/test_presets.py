"""Every preset composes with every cohort and is planned at its full size; every option of every group composes."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from omegaconf import DictConfig, OmegaConf

from mrgen.data.layouts import Layout
from mrgen.errors import UserError
from mrgen.launch.instantiate import instantiate
from mrgen.launch.judging.reporting import KINDS
from mrgen.launch.paths import CONF_DIR
from mrgen.launch.plan import FULL_SIZE, plan
from tests.launch.tools import composed

EXPERIMENTS = CONF_DIR / "experiment"
FILES = [file for file in EXPERIMENTS.rglob("*.yaml") if file.parent.name != "smoke"]  # small ones: see test_smoke.py
PRESETS = sorted(file.relative_to(EXPERIMENTS).with_suffix("").as_posix() for file in FILES)


def settings(preset: str) -> dict:
    return yaml.safe_load((EXPERIMENTS / f"{preset}.yaml").read_text())


EVALUATIONS = [preset for preset in PRESETS if "evaluation" in settings(preset)]
SWEEPS = [preset for preset in PRESETS if "hydra" in settings(preset)]  # grids, and what Optuna searches
TRAININGS = [preset for preset in PRESETS if preset not in (*EVALUATIONS, *SWEEPS)]


@cache
def alone(preset: str) -> DictConfig:
    """The preset and nothing else. Read only."""
    return composed("train", f"experiment={preset}")


@cache
def at_full_size(preset: str) -> dict[str, Any]:
    """The plan of the preset on BraTS, of 57 steps an epoch. Needs ``known_rate``."""
    overrides = ("data=brats2019", "data.store=/nowhere", "data.steps_per_epoch=57")
    return plan(composed("train", f"experiment={preset}", *overrides))


# Methods without a network take neither steps nor memory that could be planned.
NETWORKS = [preset for preset in TRAININGS if ".brain_clustering." not in alone(preset).model._target_]
# A preset that only changes another one says nothing of cohorts that the other does not say.
CHANGES = [p for p in PRESETS if any(isinstance(d, str) and "/" in d for d in settings(p).get("defaults", []))]
# To a preset these are BraTS 2019, BraTS 2015 and WMH 2017 over again, of other files: one preset will do.
ALIKE = (
    *(f"brats{year}" for year in ("2017", "2018", "2020", "2021", "2024_gli", "2024_ped")),
    *("phantom_brats2015", "phantom_wmh"),
)
COHORTS = sorted(file.stem for file in (CONF_DIR / "data").glob("*.yaml") if file.stem != "base")
GROUPS = {
    folder.relative_to(CONF_DIR).as_posix(): sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(path for path in CONF_DIR.rglob("*") if path.is_dir())
    if not folder.is_relative_to(EXPERIMENTS)
}


# Of each grid how many jobs, and the names of the first and the last; how many keys each search has.
JOBS = {
    "rsnet/methods_grid": (8, "rsnet-t1", "rnet-flair"),
    "samr/methods_grid": (4, "samr", "pix2pix"),
    "samr/ablations_grid": (4, "no_stretch_out", "no_shape"),
    "joint_imputation/cross_validation_grid": (24, "unimodal", "upper_bound"),
    "lesion_vaegan/availability_grid": (25, "row-1", "row-25"),
    "lesion_vaegan/generation_grid": (3, "generation-multiple", "generation-shared_encoder"),
    "t1_to_t2/clustering_grid": (4, "clustering-3", "clustering-6"),
    "t1_to_t2/clustering_search_grid": (8, "search5-3", "search10-6"),
    "t1_to_t2/pix2pix_grid": (32, "unet-0-0", "resnet-1000-1000"),
}
SEARCHES = {"rsnet": 3, "samr": 3, "joint_imputation": 3, "lesion_vaegan": 5, "t1_to_t2": 4}
SEARCHES = {f"{paper}/search": count for paper, count in SEARCHES.items()}


@pytest.fixture(scope="module")
def own_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of the user's own, of two sequences and one kind of lesion."""
    path = tmp_path_factory.mktemp("own") / "mine.yaml"
    path.write_text(
        "name: mine\nsubjects: ['*']\nimages: {t1: '*t1*', flair: '*flair*'}\nlabel: '*seg*'\n"
        "label_values: {0: background, 1: lesion}\nregions: {lesion: [1]}\n"
    )
    return path


@pytest.fixture
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of one TFLOP a second, so that nothing is measured."""
    monkeypatch.setattr("mrgen.launch.plan._rate", lambda half: 1e12)


def test_there_is_something_to_test():
    assert {"rsnet/rsnet", "rsnet/rnet", "rsnet/rnet_with_mri", "rsnet/snet"} <= set(NETWORKS)
    assert {f"t1_to_t2/{name}" for name in ("pix2pix", "deepmedic", "unet3d")} <= set(NETWORKS)
    methods = ("clustering", "clustering_search", "conditional_mean", "complementary", "random", "constant", "nothing")
    assert {f"t1_to_t2/{name}" for name in methods} == set(TRAININGS) - set(NETWORKS)
    assert "joint_imputation/cross_validation" in NETWORKS
    assert set(SWEEPS) == {*JOBS, *SEARCHES}
    judgements = {"rsnet/swap", "t1_to_t2/swap", "t1_to_t2/select", "joint_imputation/tables"}
    assert judgements | {"samr/tables", "samr/samples", "lesion_vaegan/tables", "bench"} == set(EVALUATIONS)
    assert {"phantom", "phantom_wmh", "brats2015", "brats2019", "brats2023", "wmh2017", "own"} <= set(COHORTS)
    assert {"data", "data/layout", "data/sampling", "model", "trainer", "tracking", "augmentation"} <= set(GROUPS)


@pytest.mark.parametrize(
    ("cohort", "preset"),
    [(c, p) for c in COHORTS if c not in ALIKE for p in TRAININGS if p not in CHANGES or c == "phantom"]
    + [(c, "rsnet/rsnet") for c in ALIKE],
)
def test_every_preset_composes_with_every_cohort(preset: str, cohort: str, own_table: Path):
    """Resolved to the last reference, with a target that the cohort has."""
    own = [f"data.layout={own_table}"] if cohort == "own" else []
    conf = composed("train", f"experiment={preset}", f"data={cohort}", "target=flair", *own)
    if cohort in ("own", "synthetic"):  # the store brings what the file says
        conf.data.layout = Layout.from_conf(own_table).to_conf()
        conf.data.modalities = ["t1", "flair"]
    resolved = OmegaConf.to_container(conf, resolve=True)
    assert isinstance(resolved, dict)
    if preset in NETWORKS:
        assert resolved["model"]["modalities"] == resolved["data"]["modalities"]
    classes = resolved["data"]["layout"]["classes"][resolved["data"]["labels"]]
    assert resolved["model"].get("classes", classes) == classes
    regions = resolved["model"].get("regions", {})
    assert all(number < len(classes) for members in regions.values() for number in members)
    assert "???" not in (resolved["name"], resolved["data"]["store"])


@pytest.mark.parametrize("preset", NETWORKS)
def test_every_preset_is_planned_at_its_full_size(preset: str, known_rate: None):
    conf, result = alone(preset), at_full_size(preset)
    if conf.data.sampling.get("size"):
        assert result["crop"] == tuple(conf.data.sampling.size)
    else:  # a brain of BraTS at 1 mm, or a slice of it, in multiples of what the network divides by
        assert len(result["crop"]) == (2 if "slices" in preset else 3)
        assert all(0 <= n - least < 128 for n, least in zip(result["crop"], FULL_SIZE, strict=False))
    assert result["parameters"] > 100_000
    assert result["memory_gib"] > (0.9 if len(result["crop"]) == 3 else 0.3)
    assert result["steps"] == 57 * conf.trainer.max_epochs  # every preset trains in one stage
    assert result["hours"] == pytest.approx(result["steps"] * result["teraflop_per_step"] / 3600)


@pytest.mark.parametrize("preset", [preset for preset in NETWORKS if preset not in CHANGES])
@pytest.mark.parametrize("cohort", ["phantom_wmh", "own"])
def test_every_preset_plans_on_cohorts_of_two_sequences(preset: str, cohort: str, own_table: Path, known_rate: None):
    """The presets say nothing of the cohort, so that another number of sequences and classes changes the network."""
    own = [f"data.layout={own_table}"] if cohort == "own" else []
    conf = alone(preset)
    whole = conf.data.sampling.get("size") is None and "slices" not in preset  # the others may take no smaller ones
    overrides = ("target=flair", "data.store=/nowhere", *(["data.sampling.size=[32,32,32]"] if whole else []), *own)
    small = plan(composed("train", f"experiment={preset}", f"data={cohort}", *overrides))
    brats = at_full_size(preset)
    one_by_one = preset == "lesion_vaegan/structure"  # or show them to one network one at a time
    if {"source", "sources"}.isdisjoint(conf.model) and not one_by_one:  # others read one sequence whatever there is
        assert small["parameters"] < brats["parameters"]
    else:
        assert small["parameters"] == brats["parameters"]


@pytest.mark.parametrize("preset", sorted(set(TRAININGS) - set(NETWORKS)))
def test_without_a_network_there_is_nothing_to_plan(preset: str):
    with pytest.raises(UserError, match="has no network and takes seconds a subject"):
        plan(composed("train", f"experiment={preset}", "data=brats2019", "data.store=/nowhere"))


@pytest.mark.parametrize("preset", EVALUATIONS)
def test_every_evaluation_composes(preset: str):
    conf = composed("evaluate", f"experiment={preset}", "segmenter=RUN", "runs=[RUN,RUN]")
    resolved = OmegaConf.to_container(conf, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    evaluation = resolved["evaluation"]
    assert evaluation["kind"] in {*KINDS, "cross_validation", "augmentation", "availability", "samples", "bench"}
    for row in evaluation.get("paper", {}).get("rows", {}).values():  # a number a region, or by measure and test set
        assert isinstance(row, dict) or len(row) == len(evaluation["regions"])


def swept(preset: str) -> tuple[DictConfig, list[Override]]:
    """The sweeper of a preset, and its keys with their values."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        sweeper = compose("train", [f"experiment={preset}"], return_hydra_config=True).hydra.sweeper
    return sweeper, OverridesParser.create().parse_overrides(
        [f"{key}={value}" for key, value in sweeper.params.items()]
    )


@pytest.mark.parametrize("preset", JOBS)
def test_a_grid_has_a_job_for_each_of_its_models(preset: str):
    count, *names = JOBS[preset]
    (jobs,) = BasicSweeper.split_arguments(swept(preset)[1], None)
    assert len(jobs) == len(set(map(tuple, jobs))) == count
    assert [composed("train", f"experiment={preset}", *jobs[i]).name for i in (0, -1)] == names


@pytest.mark.parametrize("preset", SEARCHES)
def test_a_search_asks_for_what_the_model_has(preset: str):
    """Its keys are the model's, whose own values lie in the ranges; what it makes small has no such weight in it."""
    sweeper, overrides = swept(preset)
    conf = alone(preset)
    assert len(overrides) == SEARCHES[preset]
    for override in overrides:
        own = OmegaConf.select(conf, override.get_key_element(), throw_on_missing=True)
        sweep = override.value()
        if isinstance(sweep, ChoiceSweep):
            assert str(own) in map(str, sweep.list)
        else:
            assert sweep.start <= own <= sweep.end
    assert (sweeper.sampler.seed, sweeper.n_jobs, sweeper.max_failure_rate) == (0, 1, 1.0)
    assert conf.data.split.val
    with torch.device("meta"):
        model = instantiate(conf.model)
    assert conf.monitor.removeprefix("val/") in model.val_means
    assert "median_stop" in conf.callbacks


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_difference_and_nothing_else(preset: str):
    text = (EXPERIMENTS / f"{preset}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    assert "name" in settings(preset) or alone(preset).name != "train"  # the model's
    assert "optional" not in text


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group, options in GROUPS.items() for option in options]
)
def test_every_option_of_every_group_composes(group: str, option: str):
    composed("train", f"{group}={option}")
    if group == "data" or group == "data/layout":
        composed("prepare", f"{group}={option}")
    if group == "trainer":
        composed("evaluate", f"{group}={option}")


@pytest.mark.parametrize("name", ["joint", "offline", "unimodal", "upper_bound"])
def test_the_models_of_paper_3_are_one_sweep(name: str):
    """``model=`` chooses among them after the preset, and names the run; all else is the same."""
    preset = "experiment=joint_imputation/cross_validation"
    conf = composed("train", preset, f"model={name}", "fold=3", "model.source=t1ce")
    assert conf.name == name
    assert conf.data.split.fold == 3
    first = OmegaConf.to_container(composed("train", preset, "fold=3"), resolve=True)
    resolved = OmegaConf.to_container(conf, resolve=True)
    assert {key for key in first if first[key] != resolved[key]} <= {"name", "model"}
    shared = ("width", "lr", "betas", "segmentation_loss", "target", "modalities")
    assert {key: first["model"][key] for key in shared} == {key: resolved["model"][key] for key in shared}


def test_a_stage_has_all_epochs(known_rate: None):
    preset = ("experiment=joint_imputation/cross_validation", "data.store=/nowhere", "data.steps_per_epoch=70")
    joint, offline = (plan(composed("train", *preset, f"model={name}")) for name in ("joint", "offline"))
    assert (joint["steps"], offline["steps"]) == (70 * 200, 2 * 70 * 200)
