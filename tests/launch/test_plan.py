"""What a run will cost, from shapes alone."""

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from mrgen.errors import UserError
from mrgen.launch.instantiate import instantiate
from mrgen.launch.plan import FULL_SIZE, plan, show
from mrgen.launch.training import build_datamodule, fill_from_store
from mrgen.nets.blocks import Dropout
from tests.launch.tools import CPU, TINY, TINY_SNET, composed

SMALL = {
    "rsnet": ("experiment=rsnet/rsnet", *TINY, "data.batch_size=2"),
    "rnet": ("experiment=rsnet/rnet", *TINY),
    "snet": ("experiment=rsnet/snet", *TINY_SNET),
    "deep": ("experiment=rsnet/rsnet", *CPU, "model.filters=3", "model.levels=3", "model.dropout=0"),
}


@pytest.fixture
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of one TFLOP a second, so that nothing is measured."""
    monkeypatch.setattr("mrgen.launch.plan._rate", lambda half: 1e12)


def activation_bytes(result: dict) -> float:
    return result["memory_gib"] * 2**30 - 16 * result["parameters"]


@pytest.mark.parametrize("name", SMALL)
def test_memory_and_parameters_are_those_of_a_real_step(
    name: str, phantom_store: Path, known_rate: None, monkeypatch: pytest.MonkeyPatch
):
    """In float32 on the processor, everything that autograd keeps is counted, storage by storage.

    With dropout's masks, as a GPU keeps them; a processor keeps the positions of what was dropped, which is less.
    """
    monkeypatch.setattr(Dropout, "forward", nn.Dropout.forward)
    overrides = (*SMALL[name], f"data.store={phantom_store}")
    planned = plan(composed("train", *overrides))

    conf = composed("train", *overrides)
    fill_from_store(conf)
    datamodule, model = build_datamodule(conf.data), instantiate(conf.model)
    batch = next(iter(datamodule.train_dataloader()))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held, kept = [], {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.losses(batch, torch.ones(4))["loss"]
    assert planned["parameters"] == sum(p.numel() for p in model.parameters())
    assert planned["crop"] == tuple(batch["image"].shape[2:])
    assert activation_bytes(planned) == sum(kept.values())
    assert activation_bytes(planned) > batch["image"].numel() * 4


def test_nothing_of_the_full_size_is_allocated():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = plan(composed("train", "experiment=rsnet/rsnet", "trainer.precision=32-true"))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert result["crop"] == FULL_SIZE
    assert result["memory_gib"] > 10
    assert grown < 1  # GiB


def test_steps_are_subjects_times_epochs(phantom_store: Path, known_rate: None):
    overrides = (*SMALL["rsnet"], f"data.store={phantom_store}", "trainer.max_epochs=7")
    result = plan(composed("train", *overrides))  # 5 subjects train, in batches of two
    assert (result["steps_per_epoch"], result["epochs"], result["steps"]) == (3, 7, 21)
    assert result["hours"] == pytest.approx(21 * result["teraflop_per_step"] / 3600)
    result = plan(composed("train", *overrides, "trainer.devices=2"))
    assert result["steps_per_epoch"] == 2
    result = plan(composed("train", *overrides, "data.steps_per_epoch=11"))
    assert result["steps"] == 77


def test_the_estimate_grows_with_the_work(phantom_store: Path, known_rate: None):
    small = plan(composed("train", *SMALL["rsnet"], f"data.store={phantom_store}"))
    wide = plan(composed("train", *SMALL["rsnet"], f"data.store={phantom_store}", "model.filters=8"))
    assert wide["teraflop_per_step"] > 10 * small["teraflop_per_step"]
    assert wide["memory_gib"] > 3 * small["memory_gib"]


def test_without_a_store_the_number_of_subjects_is_unknown():
    result = plan(composed("train", *SMALL["rsnet"], "data.store=/nowhere"))
    assert result["crop"] == FULL_SIZE
    assert (result["steps_per_epoch"], result["steps"], result["hours"]) == (None, None, None)
    sized = ("data/sampling=patch", "data.sampling.size=[16,24,8]", "data.steps_per_epoch=10")
    result = plan(composed("train", *SMALL["rsnet"], "data.store=/nowhere", *sized))
    assert result["crop"] == (16, 24, 8)
    assert result["steps_per_epoch"] == 10
    assert result["hours"] > 0


def test_half_precision_halves_the_activations():
    full = plan(composed("train", *SMALL["rsnet"]))
    half = plan(composed("train", *SMALL["rsnet"], "trainer.precision=bf16-mixed"))
    assert activation_bytes(half) == activation_bytes(full) // 2


def test_a_users_own_cohort_is_planned_from_its_table(tmp_path: Path):
    from mrgen.launch.paths import CONF_DIR

    table = (CONF_DIR / "data" / "layout" / "brats2021.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(table.replace("name: brats2021", "name: mine"))
    own = ("data=own", f"data.layout={tmp_path}/mine.yaml", "data.store=/nowhere")
    result = plan(composed("train", *SMALL["rsnet"], *own))
    assert result["parameters"] == plan(composed("train", *SMALL["rsnet"]))["parameters"]
    with pytest.raises(UserError, match=r"data\.layout is not set"):
        plan(composed("train", *SMALL["rsnet"], "data=own", "data.store=/nowhere"))


def test_a_store_that_does_not_fit_is_no_missing_store(phantom_store: Path):
    with pytest.raises(UserError, match="without apt"):
        plan(composed("train", *SMALL["rsnet"], f"data.store={phantom_store}", "data.modalities=[t1,t2,apt]"))


def test_the_plan_is_printed_whole(capsys: pytest.CaptureFixture, phantom_store: Path, known_rate: None):
    show("rsnet-t2", plan(composed("train", *SMALL["rsnet"], f"data.store={phantom_store}", "trainer.max_epochs=7")))
    printed = capsys.readouterr().out
    for part in ("plan of rsnet-t2", "iB", "32-true", "21 = 7 epochs × 3", "TFLOP", "on this machine"):
        assert part in printed


def test_planning_writes_no_run(mrgen, tmp_path: Path, phantom_store: Path):
    called = mrgen("train", *SMALL["rsnet"], f"data.store={phantom_store}", "plan=true")
    assert called.code == 0, called.err
    assert "plan of rsnet-t2" in called.out
    written = {path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert written <= {"config.yaml", "hydra.yaml", "overrides.yaml"}  # Hydra's own record of the job
