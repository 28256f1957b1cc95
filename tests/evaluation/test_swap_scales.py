"""Methods that see a subject in other normalisations than the segmenter, subjects without a label, no segmenter."""

import numpy as np
import pytest
import torch

from mrgen.data.crops import BrainBox, WholeVolume
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.normalisation import MinMax, Stored, ZScore
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.evaluation.swap import Swap
from mrgen.protocols import Synthesis
from tests.evaluation.tools import MODALITIES, REGIONS, Thresholds


class Unit:
    """Makes FLAIR on [0, 1], by ``make``; keeps what it saw."""

    sources, targets = ("t2",), ("flair",)

    def __init__(self, make):
        self.make, self.saw = make, []

    def synthesize(self, volumes):
        self.saw.append({name: volume.clone() for name, volume in volumes.items()})
        return Synthesis(self.make(volumes["t2"]), None, "unit")


@pytest.fixture
def batches(phantom_store):
    """Two subjects in stored intensities, on their whole grids."""
    store = Store(phantom_store)
    ids = list(store.subjects)[:2]
    datamodule = CohortDataModule(
        store=phantom_store,
        modalities=MODALITIES,
        split={"kind": "explicit", "train": list(store.subjects)[2:], "val": [], "test": ids},
        normalisation=Stored(),
        sampling=BrainBox(divisor=1),
    )
    datamodule.whole = WholeVolume()
    return store, list(datamodule.test_dataloader())


def judged(store, batches, synthesizers, segmenter, **settings):
    normalisations = {"real": ZScore()} if segmenter else {}
    unit = MinMax()
    swap = Swap(
        segmenter=segmenter,
        synthesizers=synthesizers,
        modalities=MODALITIES,
        regions=REGIONS,
        normalisations={**normalisations, **dict.fromkeys(synthesizers, unit)},
        subjects=settings.pop("subjects", store.subjects),
        **settings,
    )
    for i, batch in enumerate(batches):
        swap.test_step(batch, i)
    return swap


def test_every_method_sees_its_own_normalisation(batches):
    store, given = batches
    method, segmenter = Unit(lambda t2: t2), Thresholds()
    judged(store, given, {"flair/x": method}, segmenter)
    for batch, saw, (real, _) in zip(
        given, method.saw, zip(segmenter.saw[::2], segmenter.saw[1::2], strict=True), strict=True
    ):
        subject = store.subjects[batch["subject"][0]]
        brain = torch.from_numpy(subject.read_brain())
        stored = [torch.from_numpy(subject.read_image([name])) for name in ("t2", "flair")]
        assert torch.equal(saw["t2"][0], MinMax()(stored[0], brain, [subject.statistics["t2"]]))
        assert torch.equal(real["flair"][0], ZScore()(stored[1], brain, [subject.statistics["flair"]]))


def test_a_synthesis_on_another_scale_enters_through_the_segmenters_normalisation(batches):
    """Its own statistics, since it has no others: any brightness and contrast give the segmenter the same."""
    store, given = batches
    bright, dark = Unit(lambda t2: t2), Unit(lambda t2: 0.25 * t2)
    segmenter = Thresholds()
    judged(store, given[:1], {"flair/bright": bright, "flair/dark": dark}, segmenter)
    _, first, second = segmenter.saw
    brain = given[0]["brain"][:, None]
    assert torch.allclose(first["flair"], second["flair"], atol=1e-4)
    assert float(first["flair"][brain].mean()) == pytest.approx(0, abs=1e-4)
    assert float(first["flair"][brain].std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not first["flair"][~brain].any()


def test_nothing_and_a_constant_are_the_same_to_the_segmenter_and_not_to_the_error(batches):
    store, given = batches
    methods = {
        "flair/nothing": Unit(torch.zeros_like),
        "flair/constant": Unit(lambda t2: torch.where(t2 > 0, 0.4, 0.0)),
    }
    segmenter = Thresholds()
    rows = judged(store, given[:1], methods, segmenter).rows
    _, nothing, constant = segmenter.saw
    assert not nothing["flair"].any()
    inside = given[0]["brain"][:, None]
    assert float(constant["flair"][inside].abs().max()) < 1e-2 or torch.equal(nothing["flair"], constant["flair"])
    assert rows[1]["unit_mse_brain"] != rows[2]["unit_mse_brain"]


def test_without_a_segmenter_images_alone_are_compared(batches):
    store, given = batches
    swap = judged(store, given, {"flair/x": Unit(lambda t2: t2)}, None, pictured=given[0]["subject"][0])
    assert len(swap.rows) == 2
    errors = {f"{kind}_mse_{place}" for kind in ("own", "unit") for place in ("brain", "tumour")}
    assert all(set(row) == {"subject", "input"} | errors for row in swap.rows)
    assert set(swap.slices["flair/x"]) == {"source", "own_real", "own_synthetic", "label"}


def test_a_perfect_synthesis_has_no_error_on_either_scale(batches):
    store, given = batches
    subject = store.subjects[given[0]["subject"][0]]
    brain = torch.from_numpy(subject.read_brain())
    real = MinMax()(torch.from_numpy(subject.read_image(["flair"])), brain, [subject.statistics["flair"]])[None]
    row = judged(store, given[:1], {"flair/x": Unit(lambda _: real)}, None).rows[0]
    assert row["unit_mse_brain"] == pytest.approx(0, abs=1e-12)
    assert row["own_mse_brain"] == pytest.approx(0, abs=1e-12)


def test_an_unlabelled_subject_is_judged_by_what_the_real_sequences_give(batches, tmp_path):
    store, given = batches
    write_cohort(tmp_path, store.layout, store.modalities)
    labelled = store.subjects[given[0]["subject"][0]]
    subject = write_subject(
        tmp_path, id="new", image=labelled.read_image(), brain=labelled.read_brain(), affine=np.eye(4)
    )
    batch = {**given[0], "subject": ["new"], "label": torch.zeros_like(given[0]["label"])}
    swap = judged(store, [batch], {"flair/x": Unit(lambda t2: t2)}, Thresholds(), subjects={"new": subject})
    real, row = swap.rows
    assert set(real) == {"subject", "input"}
    assert not [key for key in row if key.startswith(("dice_", "hd95_"))]
    assert 0 <= row["agree_dice_WT"] < 1
    assert np.isnan(row["own_mse_tumour"])
