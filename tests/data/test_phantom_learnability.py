"""The phantom asks for context: a network beats the best lookup of intensities at every voxel."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mrgen.data.crops import BrainBox
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.layouts import Layout
from mrgen.data.normalisation import ZScore
from mrgen.data.phantom import grow_cohort
from mrgen.data.preparation import prepare_cohort
from mrgen.data.sampler import EvaluationSampler
from mrgen.launch.paths import CONF_DIR
from mrgen.losses.segmentation import class_weights
from mrgen.metrics.segmentation import region_dice
from mrgen.nets.unet3d import SegmentationUNet3d
from mrgen.segmenter import SegmenterModule

pytestmark = pytest.mark.slow
SEQUENCES = ("t1", "t1ce", "t2", "flair")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CohortDataModule:
    folder = tmp_path_factory.mktemp("phantom")
    grow_cohort(folder / "cohort", subjects=20, spacing=3, seed=0)
    layout = Layout.from_conf(CONF_DIR / "data" / "layout" / "brats2019.yaml")
    prepare_cohort(layout, folder / "cohort", folder / "store", workers=2, progress=False)
    split = {"val": 0.0, "test": 0.3, "stratify": "grade"}
    return CohortDataModule(
        store=Path(folder / "store"), modalities=SEQUENCES, split=split, normalisation=ZScore(), sampling=BrainBox()
    )


def _mean_dice(data: CohortDataModule, predict) -> dict[str, float]:
    regions = data.store.layout.regions
    scores = [region_dice(predict(batch), batch["label"], regions) for batch in data.test_dataloader()]
    return {name: float(np.mean([score[name] for score in scores])) for name in regions}


def _lookup(data: CohortDataModule) -> dict[str, float]:
    """Boosted trees on the four intensities of a voxel: the best that a lookup can do."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    rng = np.random.default_rng(0)
    values, labels = [], []
    everyone = EvaluationSampler(len(data.split.train))
    for batch in data._loader(data.dataset(data.split.train, crop=data.whole), everyone, 1):
        inside = batch["brain"][0].numpy()
        values.append(batch["image"][0].numpy()[:, inside].T)
        labels.append(batch["label"][0].numpy()[inside])
    x, y = np.concatenate(values), np.concatenate(labels)
    some = rng.choice(len(y), 200_000, replace=False)
    trees = HistGradientBoostingClassifier(max_iter=80, random_state=0).fit(x[some], y[some])

    def predict(batch) -> torch.Tensor:
        inside = batch["brain"][0].numpy()
        predicted = np.zeros(inside.shape, np.int64)
        predicted[inside] = trees.predict(batch["image"][0].numpy()[:, inside].T)
        return torch.from_numpy(predicted)[None]

    return _mean_dice(data, predict)


def _network(data: CohortDataModule, epochs: int = 40) -> dict[str, float]:
    torch.manual_seed(0)
    model = SegmenterModule(
        net=partial(SegmentationUNet3d, filters=8),
        modalities=SEQUENCES,
        classes=data.classes,
        regions=data.store.layout.regions,
    ).to(memory_format=torch.channels_last_3d)
    # RS-Net's weights favour recall, which costs Dice where a short training must do.
    weights = class_weights(torch.tensor(data.class_counts(), dtype=torch.float32)) ** 0.3
    loader = data.train_dataloader()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.losses(batch, weights)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()

    @torch.no_grad()
    def predict(batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.losses(batch, None)["logits"].argmax(1)

    return _mean_dice(data, predict)


def test_a_lookup_of_intensities_does_not_reach_what_a_network_reaches(data: CohortDataModule) -> None:
    lookup, network = _lookup(data), _network(data)
    print(f"lookup {lookup}\nnetwork {network}")
    assert all(network[region] > lookup[region] for region in lookup)
    assert network["TC"] > lookup["TC"] + 0.05
