import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from mrgen.callbacks.determinism import SeedSteps
from mrgen.callbacks.provenance import KEY, Provenance
from mrgen.papers.rsnet import RSNet

CONTENT = {
    "version": "0.1.0",
    "model": {"_target_": "mrgen.papers.rsnet.RSNet", "target": "t1", "betas": [0.9, 0.999], "extra_mri": None},
    "data": {"modalities": ["t1", "flair"], "intensity_scale": {"t1": [100.5, 20.25]}},
}


class TinyRSNet(RSNet):
    def on_fit_start(self):
        pass  # no datamodule here


def saved(folder):
    model = TinyRSNet(
        modalities=["t1", "flair"], target="t1", classes=["background", "x"], regions={"x": [1]}, filters=2, levels=2
    )
    sample = {
        "image": torch.randn(2, 4, 4, 4),
        "label": torch.randint(0, 2, (4, 4, 4)),
        "brain": torch.ones(4, 4, 4, dtype=torch.bool),
        "subject": "a",
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[
            SeedSteps(0),
            Provenance(CONTENT),
            ModelCheckpoint(folder, "best", monitor="val/loss", enable_version_counter=False),
        ],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = DataLoader([sample])
    trainer.fit(model, loader, loader)
    return model, folder / "best.ckpt"


def leaves(value):
    """Types of all that a container holds, the container's own included."""
    yield type(value)
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)


def test_a_checkpoint_says_what_it_is_and_loads_as_plain_containers(tmp_path):
    model, path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint[KEY] == {**CONTENT, "training": {"epochs": 1, "steps": 1, "devices": 1}}
    assert set(leaves(checkpoint[KEY])) <= {dict, list, str, int, float, bool, type(None)}
    again = TinyRSNet(
        modalities=["t1", "flair"], target="t1", classes=["background", "x"], regions={"x": [1]}, filters=2, levels=2
    )
    again.load_state_dict(checkpoint["state_dict"], strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
