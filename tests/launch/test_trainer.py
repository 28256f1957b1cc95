"""The trainer presets, and what they make of a run."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig

from mrgen.callbacks.compiling import CompileNetworks, networks
from mrgen.errors import UserError
from mrgen.files import read_metrics
from mrgen.launch.instantiate import instantiate
from mrgen.launch.paths import CONF_DIR
from mrgen.launch.runs import load_run
from mrgen.launch.status import read_status
from mrgen.launch.trainer import Checkpoint, build_trainer
from mrgen.papers.lesion_vaegan.generation import LesionVAEGAN
from mrgen.papers.rsnet import RSNet
from tests.launch.test_training import resumed
from tests.launch.test_training_paper3 import trained as trained_paper3
from tests.launch.test_training_paper4 import trained as trained_paper4
from tests.launch.test_training_paper5 import PIX2PIX
from tests.launch.test_training_paper5 import trained as trained_paper5
from tests.launch.tools import TINY, Called, composed, tiny_run

Script = Callable[..., Called]
PATCHES = ("data/sampling=patch", "data.sampling.size=[16,16,16]", "data.steps_per_epoch=1")
PRESETS = sorted(file.stem for file in (CONF_DIR / "trainer").glob("*.yaml"))


def built(tmp_path: Path, *overrides: str) -> Any:
    conf = composed("train", "trainer.accelerator=cpu", *overrides)
    return build_trainer(conf.trainer, tmp_path, callbacks=[], loggers=[])


# ----- presets ----------------------------------------------------------------------------------------------------


def test_presets_are_taken_one_by_one_or_together():
    assert {"cpu", "gpu", "ddp", "bf16", "compile", "deterministic", "debug", "fast_dev_run"} == set(PRESETS)

    def trainer(*overrides: str, script: str = "train") -> DictConfig:
        return composed(script, *overrides).trainer

    alone = trainer()
    assert (alone.devices, alone.precision, alone.compile) == (1, "auto", False)
    several = trainer("trainer=ddp", "trainer.devices=3")
    assert (several.devices, several.strategy) == (3, "ddp_find_unused_parameters_true")
    together = trainer("experiment=samr/samr", "trainer=[gpu,bf16,compile,ddp]")
    assert (together.accelerator, together.precision, together.compile) == ("gpu", "bf16-mixed", True)
    assert (together.devices, together.max_epochs) == (2, 500)  # the experiment's
    assert trainer("trainer=[cpu,bf16]", "experiment=rsnet/swap", script="evaluate").precision == "bf16-mixed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=r"trainer\.accelerator is gpu, and PyTorch found no GPU"):
        built(tmp_path, "trainer.accelerator=gpu")


def test_determinism_ends_with_the_job_that_asked_for_it(tmp_path: Path):
    try:
        built(tmp_path, "trainer=deterministic")
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        built(tmp_path)  # the next job of a sweep
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# ----- debug ------------------------------------------------------------------------------------------------------


def test_debug_learns_one_batch_by_heart(tmp_path: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch):
    shown = []
    step = RSNet.training_step

    def spying(self: RSNet, batch: Any, batch_idx: int) -> Any:
        shown.append((batch["subject"], batch["image"].sum().item()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RSNet, "training_step", spying)
    more = (
        "augmentation=light",
        "data.steps_per_epoch=5",
        "trainer=debug",
        "trainer.max_epochs=12",
        "model.lr=0.01",
        "model.dropout=0.0",
        "trainer.log_every_n_steps=1",
    )
    run_dir = tiny_run(tmp_path / "run", phantom_store, *PATCHES, *more)
    assert len(shown) == 12
    assert len(set(map(str, shown))) == 1
    rows = read_metrics(run_dir / "metrics.csv")
    losses = [float(row["train/loss_epoch"]) for row in rows if row["train/loss_epoch"]]
    assert losses[-1] < 0.7 * losses[0]
    assert not [name for name in rows[0] if name.startswith("val/")]


def test_debug_shows_the_same_slices_of_unpaired_sequences(
    tmp_path: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch
):
    shown = []
    step = LesionVAEGAN.training_step

    def spying(self: LesionVAEGAN, batch: Any, batch_idx: int) -> Any:
        shown.append({name: part["image"].sum().item() for name, part in batch.items()})
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LesionVAEGAN, "training_step", spying)
    trained_paper4(tmp_path / "run", phantom_store, "generation", "trainer=debug")
    assert len(shown) == 2
    assert shown[0] == shown[1]
    assert len(shown[0]) == 4


def test_bf16_computes_in_it(tmp_path: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch):
    found = set()
    forward = torch.nn.Conv3d.forward

    def spying(self: torch.nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
        answer = forward(self, x)
        found.add(answer.dtype)
        return answer

    monkeypatch.setattr(torch.nn.Conv3d, "forward", spying)
    precision = composed("train", "trainer=bf16").trainer.precision
    run_dir = tiny_run(tmp_path / "run", phantom_store, *PATCHES, f"trainer.precision={precision}")
    assert found == {torch.bfloat16}
    assert {weight.dtype for weight in load_run(run_dir).model.parameters()} == {torch.float32}


def test_fast_dev_run_goes_through_and_leaves_what_it_says(mrgen: Script, tmp_path: Path, phantom_store: Path):
    called = mrgen(
        *("train", "experiment=rsnet/rsnet", "trainer=fast_dev_run", "callbacks=[ema,early_stopping,median_stop]"),
        *(*TINY, *PATCHES, f"data.store='{phantom_store}'", f"hydra.run.dir='{tmp_path}/run'"),
    )
    assert called.code == 0, called.err
    status = read_status(tmp_path / "run")
    assert status["state"] == "finished"
    assert status["stopped"] == "trainer.fast_dev_run: one batch, and no checkpoint"
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    with pytest.raises(UserError, match=r"no checkpoints/best\.ckpt or last\.ckpt .*; its status is finished"):
        load_run(tmp_path / "run")


# ----- the end ----------------------------------------------------------------------------------------------------


def test_a_time_limit_ends_after_an_epoch_and_counts_on(tmp_path: Path, phantom_store: Path):
    limit = ("trainer.max_time=00:00:00:01", "trainer.max_epochs=1000", "data.steps_per_epoch=2")
    run_dir = tiny_run(tmp_path / "run", phantom_store, *PATCHES, *limit)

    def trained() -> int:
        return int(read_metrics(run_dir / "metrics.csv")[-1]["step"]) + 1

    steps = trained()
    assert 2 <= steps < 2000
    assert steps % 2 == 0
    status = read_status(run_dir)
    assert status["state"] == "finished"
    assert status["stopped"].startswith("trainer.max_time: ")
    resumed(run_dir)  # its second is over
    assert trained() == steps
    resumed(run_dir, "trainer.max_time=null", f"trainer.max_epochs={steps // 2 + 1}")
    assert trained() == steps + 2
    assert "stopped" not in read_status(run_dir)


@pytest.mark.parametrize("duration", ["12:00", "soon", "60"])
def test_a_duration_that_is_none_is_refused(tmp_path: Path, duration: str):
    with pytest.raises(UserError, match=r"trainer\.max_time is .*; expected DD:HH:MM:SS, such as 00:12:00:00"):
        built(tmp_path, f"trainer.max_time='{duration}'" if ":" in duration else f"trainer.max_time={duration}")


def test_early_stopping_says_why(tmp_path: Path, phantom_store: Path):
    rule = ("callbacks=[early_stopping]", "callbacks.early_stopping.patience=2")
    run_dir = tiny_run(tmp_path / "run", phantom_store, *PATCHES, *rule, "trainer.max_epochs=9", "model.lr=0.0")
    status = read_status(run_dir)
    assert status["state"] == "finished"
    assert status["stopped"].startswith(
        "early_stopping: Monitored metric val/loss did not improve in the last 2 records"
    )
    assert [row["epoch"] for row in read_metrics(run_dir / "metrics.csv") if row["val/loss"]] == ["0", "1", "2"]


def test_a_monitor_that_is_not_logged_is_refused_before_the_first_batch(tmp_path: Path, phantom_store: Path):
    with pytest.raises(UserError, match=r"monitor is val/los; RSNet logs val/loss, val/synthesis, .*val/dice_TC"):
        tiny_run(tmp_path / "run", phantom_store, "monitor=val/los")
    assert not (tmp_path / "run" / "metrics.csv").exists()


# ----- compiling --------------------------------------------------------------------------------------------------


def test_the_networks_of_a_method_are_compiled_where_they_are_called():
    def names(*overrides: str) -> list[str]:
        return list(networks(instantiate(composed("train", *overrides, "model.discriminator_filters=2").model)))

    six = [f"discriminators.discriminators.{i}" for i in range(6)]
    found = names("experiment=samr/samr", "model.unet_filters=2")
    assert found == ["generator", *six, "segmenter"]
    assert names("experiment=t1_to_t2/pix2pix", "model.filters=4") == ["generator", "discriminator"]


def test_a_compiled_network_answers_the_same_and_keeps_its_names():
    """By the backend that generates no code: what inductor makes of a network takes minutes."""
    module = torch.nn.ModuleDict({"net": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())})
    names, x = list(module.state_dict()), torch.randn(3, 2)
    before = module["net"](x)
    callback: Any = CompileNetworks("aot_eager")
    callback.setup(None, module, "fit")
    assert module["net"]._compiled_call_impl is not None
    torch.testing.assert_close(module["net"](x), before)
    assert list(module.state_dict()) == names
    assert copy.deepcopy(module)["net"]._compiled_call_impl is None  # of an average of it
    callback.teardown(None, module, "fit")


def test_a_missing_compiler_is_said_before_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"trainer\.compile=true needs a C\+\+ compiler, and there is none"):
        CompileNetworks().setup(None, torch.nn.ModuleDict(), "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"trainer\.compile is 'faster'; expected true or false"):
        built(tmp_path, "trainer.compile=faster")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize("paper", [3, 5])
def test_two_players_are_compiled_and_learn_as_before(tmp_path: Path, phantom_store: Path, wmh_store: Path, paper: int):
    """Manual optimisation, one player frozen in the other's step; of paper 3, edges that are filled up."""
    runs = []
    for compiled in ("false", "true"):
        run_dir, overrides = tmp_path / compiled, (f"trainer.compile={compiled}",)
        if paper == 3:
            runs.append(trained_paper3(run_dir, wmh_store, "joint", *overrides))
        else:
            runs.append(trained_paper5(run_dir, phantom_store, "pix2pix", *PIX2PIX, "model.dropout=0.0", *overrides))
    losses = [
        [float(row["train/loss_step"]) for row in read_metrics(run / "metrics.csv") if row["train/loss_step"]]
        for run in runs
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert load_run(runs[1]).model._compiled_call_impl is None


# ----- sweeps -----------------------------------------------------------------------------------------------------


def test_a_run_of_a_sweep_that_lags_behind_is_ended(mrgen: Script, tmp_path: Path, phantom_store: Path):
    called = mrgen(
        *("train", "-m", "experiment=rsnet/rsnet", "model.lr=0.01,1e-9", "callbacks=[median_stop]", *TINY, *PATCHES),
        *("callbacks.median_stop.siblings=1", "callbacks.median_stop.warmup=1", "trainer.max_epochs=3"),
        *(f"data.store='{phantom_store}'", f"hydra.sweep.dir='{tmp_path}/sweep'"),
    )
    assert called.code == 0, called.err
    runs = sorted((tmp_path / "sweep").glob("*_rsnet-t2"))
    statuses = [read_status(run) for run in runs]
    assert [status["state"] for status in statuses] == ["finished"] * 2
    assert ["stopped" in status for status in statuses] == [False, True]
    assert "of 1 siblings" in statuses[1]["stopped"]
    validated = [sum(row["val/loss"] != "" for row in read_metrics(run / "metrics.csv")) for run in runs]
    assert validated == [3, 2]
    assert load_run(runs[1]).checkpoint.name == "best.ckpt"


def test_optuna_searches_what_a_preset_says(mrgen: Script, tmp_path: Path, phantom_store: Path):
    pytest.importorskip("optuna")
    called = mrgen(
        *("train", "-m", "experiment=rsnet/search", "hydra.sweeper.n_trials=2", "trainer.max_epochs=1", *TINY),
        *(*PATCHES, f"data.store='{phantom_store}'", f"hydra.sweep.dir='{tmp_path}/sweep'"),
    )
    assert called.code == 0, called.err
    runs = [load_run(run) for run in sorted((tmp_path / "sweep").glob("*_rsnet-t2"))]
    assert len(runs) == 2
    rates = [run.conf.model.lr for run in runs]
    assert len(set(rates)) == 2
    assert all(2e-5 <= rate <= 2e-3 for rate in rates)
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    values = [min(float(row["val/mse_tumour"]) for row in read_metrics(run.path / "metrics.csv")) for run in runs]
    assert best["best_value"] == pytest.approx(min(values))
    assert best["best_params"]["model.lr"] == pytest.approx(rates[values.index(min(values))])


@pytest.mark.parametrize("name", ["/x/..", "/x/notes", 3, None])
def test_a_checkpoint_names_no_other_file_as_one(tmp_path: Path, name: Any):
    """Lightning would remove it, with all that is in it, as soon as there is a better one."""
    best = Checkpoint(tmp_path / "checkpoints", "best", monitor="val/loss")
    state = dict(best.state_dict(), best_model_path=name)
    with pytest.raises(UserError, match=r"as one; expected best\.ckpt"):
        best.load_state_dict(state)
    best.load_state_dict(dict(state, best_model_path="/moved/checkpoints/best.ckpt"))
    assert best.best_model_path == str(tmp_path / "checkpoints" / "best.ckpt")


@pytest.mark.usefixtures("stand_in")
def test_a_grid_of_presets_is_one_sweep(mrgen: Script, tmp_path: Path):
    called = mrgen("train", "-m", "experiment=rsnet/methods_grid", f"hydra.sweep.dir='{tmp_path}/sweep'")
    assert called.code == 0, called.err
    runs = sorted((tmp_path / "sweep").glob("*/config.yaml"))
    names = [f"{method}-{target}" for method in ("rsnet", "rnet") for target in ("t1", "t2", "t1ce", "flair")]
    assert [run.parent.name for run in runs] == [f"{i}_{name}" for i, name in enumerate(names)]
    segment = [yaml.safe_load(run.read_text())["model"]["segment"] for run in runs]
    assert segment == [True] * 4 + [False] * 4


@pytest.mark.parametrize("preset", ["rsnet/search", "t1_to_t2/pix2pix_grid"])
def test_a_sweep_that_is_started_as_one_run_is_told_so(mrgen: Script, preset: str):
    called = mrgen("train", f"experiment={preset}")
    assert called.code == 1
    assert f"start it with -m: mrgen-train -m experiment={preset}" in called.message
