from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from mrgen.callbacks.determinism import SeedSteps


def mask(seed=0, step=0, batch=0, rank=0):
    """A dropout mask as the training step would draw it."""
    trainer = SimpleNamespace(global_step=step, global_rank=rank)
    SeedSteps(seed).on_train_batch_start(trainer, None, None, batch)
    return torch.nn.functional.dropout(torch.ones(64), 0.5)


def test_a_mask_is_a_function_of_seed_step_batch_and_rank():
    first = mask()
    torch.rand(5)
    assert torch.equal(mask(), first)
    others = [mask(seed=1), mask(step=1), mask(batch=1), mask(rank=1), mask(seed=2**40), mask(step=10**7)]
    everything = [first, *others]
    for i, one in enumerate(everything):
        assert not any(torch.equal(one, other) for other in everything[:i])
    assert not torch.equal(mask(seed=1, rank=0), mask(seed=0, rank=1))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63])
def test_every_seed_is_one_that_torch_takes(seed):
    for step in range(50):
        mask(seed=seed, step=step)


class Dropped(pl.LightningModule):
    """Notes the masks of a training."""

    def __init__(self):
        super().__init__()
        self.weight, self.masks = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        dropped = torch.nn.functional.dropout(torch.ones(32), 0.5)
        self.masks.append((dropped > 0).tolist())
        return self.weight * dropped.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, epochs, *, seed=0, ckpt_path=None, callbacks=True):
    model = Dropped()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[SeedSteps(seed)] if callbacks else [],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(torch.zeros(3, 1)), ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return model.masks


def test_a_resumed_training_drops_what_an_uninterrupted_one_drops(tmp_path):
    uninterrupted = fit(tmp_path / "a", 4)
    first = fit(tmp_path / "b", 2)
    torch.rand(17)  # another process would be anywhere in its random numbers
    assert first + fit(tmp_path / "b", 4, ckpt_path=tmp_path / "b" / "2.ckpt") == uninterrupted
    assert len(set(map(tuple, uninterrupted))) == 12
    assert fit(tmp_path / "c", 4, seed=1) != uninterrupted
