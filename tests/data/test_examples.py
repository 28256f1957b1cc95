"""The slices that stand for a cohort: always the same, and with the lesion."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrgen.data.crops import BrainBox, RandomPatch
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.examples import example_subjects, read_example
from mrgen.data.normalisation import ZScore
from mrgen.data.slices import AxialSlice, SiteSlices

SAMPLINGS = {
    "whole": lambda: BrainBox(),
    "patch": lambda: RandomPatch((16, 16, 16)),
    "slice": lambda: AxialSlice(),
    "slices": lambda: SiteSlices((48, 48), zeroed=[0.1, 0.0]),
}


def datamodule(store: Path, sampling: Any, **split: Any) -> CohortDataModule:
    split = split or {"kind": "ratio", "val": 0.25, "test": 0.25, "seed": 0}
    return CohortDataModule(
        store=store, modalities=("t1", "t2"), split=split, normalisation=ZScore(), sampling=sampling
    )


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_the_slices_are_the_scans_own_and_hold_its_largest_lesion(phantom_store: Path, kind: str):
    data = datamodule(phantom_store, SAMPLINGS[kind]())
    (id,) = example_subjects(data, 1)
    assert id == min(data.split.val)
    example, again = (read_example(data, id, 3) for _ in range(2))
    assert example.numbers == again.numbers
    assert torch.equal(example.batch["image"], again.batch["image"])
    stored = data.store.subjects[id]
    label = data.lookup[stored.read_label()]
    lesion = ((label > 0) & (label != 255)).sum((0, 1))  # of the scan's slices
    if kind != "patch":  # which holds a part of it
        assert lesion[list(example.numbers)].max() == lesion.max()
    shown = example.slices(example.batch["label"])
    assert shown.shape[0] == len(example.numbers) == 3
    assert all((one > 0).any() for one in shown)
    for number, one, brain in zip(
        example.numbers, shown, example.slices(example.batch["brain"]), strict=True
    ):  # as they are in the scan, unless a patch cuts them
        if kind != "patch":
            assert (one > 0).sum() == lesion[number]
            assert brain.sum() == stored.read_brain()[..., number].sum()
    image = example.slices(example.batch["image"])
    assert image.shape == (3, 2, *shown.shape[1:])
    assert image.dtype == np.float32


def test_without_validation_subjects_training_ones_are_shown(phantom_store: Path):
    data = datamodule(phantom_store, BrainBox(), kind="ratio", val=0.0, test=0.25, seed=0)
    assert example_subjects(data, 2) == sorted(data.split.train)[:2]


def test_without_a_lesion_the_middle_is_shown(phantom_store: Path):
    data = datamodule(phantom_store, BrainBox())
    data.lookup[:] = 0
    (id,) = example_subjects(data, 1)
    (low, high) = data.store.subjects[id].brain_box[2]
    (number,) = read_example(data, id, 1).numbers
    assert abs(number - (low + high) / 2) <= 1
    assert len(read_example(data, id, 1000).numbers) == high - low  # there are no more
