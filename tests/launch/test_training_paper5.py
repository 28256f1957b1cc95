"""Paper 5's networks through ``mrgen-train``: two optimizers, crops with a margin, slices."""

from pathlib import Path

import pytest
import torch

from mrgen.errors import UserError
from mrgen.files import read_metrics
from mrgen.launch.runs import load_run
from mrgen.launch.training import train
from tests.launch.test_training import checkpoint, differences
from tests.launch.tools import CPU, composed

PIX2PIX = (
    *("data.sampling.size=[16,16,16]", "data.sampling.divisor=8", "model.filters=4", "model.downs=3"),
    *("model.discriminator_filters=2", "model.discriminator_layers=1", "model.constant_epochs=1"),
    *("model.decay_epochs=1", "data.steps_per_epoch=3", "trainer.log_every_n_steps=1"),
)
DEEPMEDIC = (
    *("model.net.widths=[4,4]", "model.net.hidden=[4]", "model.net.factors=[2]", "model.net.residual=[]"),
    *("data.sampling.size=[15,15,15]", "data.batch_size=2", "data.steps_per_epoch=2"),
)


def trained(run_dir: Path, store: Path, preset: str, *overrides: str) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    common = (f"experiment=t1_to_t2/{preset}", f"data.store='{store}'", "trainer.max_epochs=1", *CPU)
    return train(composed("train", *common, *overrides), run_dir)


def test_a_gan_that_stopped_after_an_epoch_goes_on_to_the_same_weights_and_rows(tmp_path: Path, phantom_store: Path):
    """Lightning counts two steps a batch there; rows of the CSV count batches."""
    whole = trained(tmp_path / "whole", phantom_store, "pix2pix", *PIX2PIX, "trainer.max_epochs=2")
    parts = trained(tmp_path / "parts", phantom_store, "pix2pix", *PIX2PIX)
    resumed = composed(
        *("train", "experiment=t1_to_t2/pix2pix", f"data.store='{phantom_store}'", *CPU, *PIX2PIX),
        *("trainer.max_epochs=2", f"resume='{parts}'"),
    )
    train(resumed, parts)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert differences(checkpoint(parts)[part], checkpoint(whole)[part]) == []
    assert (parts / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    rows = read_metrics(whole / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["train/loss_step"]] == list(range(6))
    assert checkpoint(whole)["global_step"] == 12
    rates = [float(row["lr-generator"]) for row in rows if row["lr-generator"]]
    assert rates == pytest.approx([2e-4, 1e-4])  # constant, then on the way to 0


def test_deepmedic_learns_on_segments_and_answers_for_whole_brains(tmp_path: Path, phantom_store: Path):
    run = load_run(trained(tmp_path / "run", phantom_store, "deepmedic", *DEEPMEDIC))
    assert run.tile is None  # exact in one pass, whatever it was trained on
    sides = [stop - start for start, stop in run.view([[3, 10], [2, 8], [1, 7]], (20, 20, 20), None)]
    assert all(
        n <= side < n + run.model.grid and side % run.model.grid == 0 for n, side in zip((7, 6, 6), sides, strict=True)
    )
    volumes = {name: torch.randn(1, 1, 11, 13, 9) for name in run.model.sources}
    labels = run.model.segment(volumes).labels
    assert labels.shape == (1, 11, 13, 9)
    (row,) = [row for row in read_metrics(run.path / "metrics.csv") if row["val/loss"]]
    assert 0 <= float(row["val/dice_WT"]) <= 1


def test_segments_below_the_margin_are_refused(tmp_path: Path, phantom_store: Path):
    with pytest.raises(UserError, match=r"answer loses 5 on each side; set data\.sampling\.size to 11 or more"):
        trained(tmp_path / "run", phantom_store, "deepmedic", *DEEPMEDIC, "data.sampling.size=[5,5,5]")


def test_slices_train_a_network_of_two_dimensions_that_is_given_slices(tmp_path: Path, phantom_store: Path):
    narrow = (*PIX2PIX[1:], "data.batch_size=2")
    run = load_run(trained(tmp_path / "run", phantom_store, "pix2pix_slices", *narrow))
    assert run.tile == [0, 0, 1]
    saw = []

    def spy(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        saw.append(tuple(inputs[0].shape))

    run.model.generator.register_forward_pre_hook(spy)
    made = run.synthesizer().synthesize({"t1": torch.rand(1, 1, 10, 12, 3)})
    assert made.mean.shape == (1, 1, 10, 12, 3)
    assert saw == [(1, 1, 16, 16)] * 3  # padded to what the network divides by
