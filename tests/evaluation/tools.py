"""Segmenters and synthesisers that are no networks, subjects that are noise, and a swap without a trainer."""

import torch

from mrgen.evaluation.swap import Swap
from mrgen.protocols import Segmentation, Synthesis

MODALITIES = ("t1", "t1ce", "t2", "flair")
REGIONS = {"ET": [3], "WT": [1, 2, 3], "TC": [1, 3]}


class Thresholds:
    """A segmenter that is no network: edema where FLAIR is bright, enhancement where T1ce is. Keeps what it saw."""

    sources = ("flair", "t1ce")

    def __init__(self):
        self.saw = []

    def segment(self, volumes):
        self.saw.append({name: volume.clone() for name, volume in volumes.items()})
        labels = torch.where(volumes["flair"][:, 0] > 0.8, 2, 0)
        labels = torch.where(volumes["t1ce"][:, 0] > 1.0, 3, labels)
        return Segmentation(labels=labels, probabilities=torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float())


class Made:
    """A synthesiser that is no network: ``make``, and ``doubt``, of the sources' volumes. Keeps what it saw."""

    def __init__(self, target, make, sources=None, doubt=lambda _: None):
        self.targets = (target,)
        self.sources = tuple(sources or (name for name in MODALITIES if name != target))
        self.make, self.doubt, self.saw = make, doubt, []

    def synthesize(self, volumes):
        self.saw.append(set(volumes))
        return Synthesis(mean=self.make(volumes), variance=self.doubt(volumes), scale="zscore")


def example(subject="a", seed=0, lesion=True, size=12):
    """z-scored noise within a brain, 0 outside; labels that the thresholds find in part."""
    generator = torch.Generator().manual_seed(seed)
    brain = torch.zeros(1, size, size, size, dtype=torch.bool)
    brain[:, 1:-1, 2:-2, 1:-2] = True
    image = torch.randn(1, 4, size, size, size, generator=generator) * brain[:, None]
    label = torch.zeros(1, size, size, size, dtype=torch.int64)
    if lesion:
        label[:, 3:9, 4:9, 3:8] = torch.where(image[:, 1, 3:9, 4:9, 3:8] > 0.5, 3, 2)
        label[:, 3, 4, 3:8] = 1
    spacing = torch.tensor([[1.0, 2.0, 3.0]])
    return {"image": image, "label": label, "brain": brain, "subject": [subject], "spacing": spacing}


def run(synthesizers, batches, segmenter=None, **settings):
    """The steps of a test without a trainer."""
    segmenter = segmenter or Thresholds()
    swap = Swap(segmenter=segmenter, synthesizers=synthesizers, modalities=MODALITIES, regions=REGIONS, **settings)
    for i, batch in enumerate(batches):
        swap.test_step(batch, i)
    swap.on_test_epoch_end()
    return swap, segmenter


def seeded(target):
    """A synthesiser that draws, as dropout does."""
    return Made(target, lambda v: torch.rand_like(v["t2"]), sources=("t2",), doubt=lambda v: torch.rand_like(v["t2"]))
