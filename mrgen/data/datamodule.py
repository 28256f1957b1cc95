"""One datamodule for every method: split, crops, order, loaders, and what a method must know of its training set."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from mrgen.data.crops import BrainBox, Crop, WholeVolume
from mrgen.data.dataset import CropDataset
from mrgen.data.generated import read_generated
from mrgen.data.guides import Guide, fit_guides
from mrgen.data.identity import scan_of, twins
from mrgen.data.loader import ResumableLoader, ignore_signals
from mrgen.data.mix import Mix, MixedSlices
from mrgen.data.normalisation import Normalisation, stored_statistics
from mrgen.data.sampler import EvaluationSampler, TrainingSampler, Turn
from mrgen.data.slice_dataset import SliceDataset, SubjectSlices
from mrgen.data.slices import AxialSlice, SiteSlices
from mrgen.data.splits import make_split
from mrgen.data.store import Store, StoredSubject
from mrgen.data.unpaired import SequenceSlices, slices_with_lesion
from mrgen.errors import UserError

__all__ = ["CohortDataModule"]


class CohortDataModule(LightningDataModule):
    """Batches of a prepared cohort.

    Everything that can be wrong with the data is found in the constructor, before a network is built.

    Args:
        store: folder that ``mrgen-prepare`` wrote.
        modalities: sequences to read, in the order of the batch's channels.
        labels: which of the layout's label maps to use, ``regions`` or ``native``.
        split: how to split, see ``mrgen.data.splits.make_split``.
        normalisation: from stored intensities to the network's.
        sampling: which crops training and validation see; testing always sees the whole brain. With ``SiteSlices`` a
            sample is a slice, and a validation batch all slices of a subject.
        batch_size: samples a step on one device.
        steps_per_epoch: steps of an epoch; None is one pass over the training subjects, or over all of their slices.
        augmentation: TorchIO transforms for training, applied in this order.
        workers: loader processes. 0 loads in the training process: a whole brain of four sequences at 1 mm
            takes about 0.15 s on one core.
        seed: of the order, the crops and the augmentation.
        labelled: only labelled subjects. False takes the others as well, without a lesion: for methods that make one
            sequence from another.
        guides: what goes with slices to tell of their anatomy, of ``mrgen.data.guides.GUIDES``.
        mix: how many real, synthetic and enhanced slices are shown, the arguments of ``mrgen.data.mix.Mix``.
        unpaired: training batches are of one sequence each, ``{name: Batch}``, shuffled apart, with ``lesions``; those
            of validation and testing stay paired.
    """

    def __init__(
        self,
        *,
        store: str | Path,
        modalities: Sequence[str],
        labels: str = "regions",
        split: Mapping[str, Any],
        normalisation: Normalisation,
        sampling: Crop | SiteSlices,
        batch_size: int = 1,
        steps_per_epoch: int | None = None,
        augmentation: Sequence[Any] | None = None,
        workers: int = 0,
        seed: int = 0,
        labelled: bool = True,
        guides: Sequence[str] = (),
        mix: Mapping[str, Any] | None = None,
        unpaired: bool = False,
    ):
        super().__init__()
        self.store = Store(store)
        self.modalities = tuple(modalities)
        if missing := [name for name in self.modalities if name not in self.store.modalities]:
            raise UserError(
                f"{self.store.path}: prepared with {', '.join(self.store.modalities)}, without {', '.join(missing)}; "
                "set data.modalities or prepare the cohort with them"
            )
        generated = read_generated(self.store.path)
        if generated is not None and not generated["complete"]:
            raise UserError(f"{self.store.path}: its making was interrupted; run the same mrgen-synthesize again")
        layout = self.store.layout
        self.lookup = layout.label_lookup(labels)
        if labels not in layout.classes:
            raise UserError(f"data.labels={labels}: {layout.title} names classes for {', '.join(layout.classes)} alone")
        self.classes: Sequence[str] = layout.classes[labels]
        self.regions = layout.numbered(labels).regions  # of these classes, for evaluation

        subjects = {id: s for id, s in self.store.subjects.items() if s.labelled or not labelled}
        if not self.store.subjects:
            hidden = f", but {self.store.hidden} of other settings" if self.store.hidden else ""
            raise UserError(
                f"{self.store.path}: holds no prepared subject{hidden}; run mrgen-prepare with the same data=… and "
                "look at what it says"
            )
        if self.store.hidden:
            left_out = f"{self.store.path}: {self.store.hidden} prepared subjects of other settings are left out"
            rank_zero_only(print)(f"{left_out}; mrgen-prepare with the same data=… prepares them anew", flush=True)
        if not subjects:
            raise UserError(
                f"{self.store.path}: none of {len(self.store.subjects)} subjects has a label, which training needs; "
                "data.labelled=false takes subjects without one, for methods that need none"
            )
        self.split = make_split(list(subjects.values()), split)
        self.split.check(subjects)
        if not self.split.train:
            raise UserError("data.split leaves no subject for training")
        if generated is None:  # synthetic subjects may share a brain
            self._check_twins()

        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise UserError(f"data.{name} is {value}; expected a whole number from {least} on")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise UserError(f"data.steps_per_epoch is {steps_per_epoch}; expected a whole number from 1 on, or null")
        self.normalisation, self.sampling = normalisation, sampling
        box = sampling if isinstance(sampling, BrainBox) else BrainBox(divisor=sampling.divisor)
        box.fit(subjects.values())
        if isinstance(sampling, AxialSlice | SiteSlices):
            sampling.fit(subjects.values())
        self.whole: BrainBox | WholeVolume = box  # what testing sees
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.steps_per_epoch = steps_per_epoch
        self.augmentation = list(augmentation or [])
        self.guide_names = tuple(guides)
        self.mix = Mix(**(mix or {})) or None
        if (self.guide_names or unpaired) and self.mix:
            raise UserError("data.mix is for segmenters; a generator is trained on real slices: data.mix.store=null")
        if (self.guide_names or self.mix) and not isinstance(sampling, SiteSlices):
            what = "data.mix" if self.mix else f"a method with {' and '.join(self.guide_names)}"
            raise UserError(f"{what} needs axial slices; set data/sampling=slices")
        if self.mix:
            self.mix.check(self.modalities, self.classes, labels, self.split, self.store)
            self.mix.amounts(self.real_slices())
        self._labels = labels
        self.synthetic = generated is not None
        self._lesioned: np.ndarray | None = None
        if unpaired:
            if not isinstance(sampling, SiteSlices):
                raise UserError("a method of unpaired sequences needs axial slices; set data/sampling=slices")
            self._lesioned = slices_with_lesion(self.training_slices)

    def _check_twins(self) -> None:
        """Raises UserError for one scan under two names on two sides of the split."""
        side = {id: name for name in ("train", "val", "test") for id in getattr(self.split, name)}
        for one, other, sequences in twins(scan_of(self.store.subjects[id]) for id in side):
            if side[one] != side[other]:
                raise UserError(
                    f"{self.store.path}: {one} ({side[one]}) and {other} ({side[other]}) hold the same voxels "
                    f"({', '.join(sequences)}), so that what is learned would be tested; remove the copy from the "
                    "cohort and from the store, or leave it out of data.split"
                )

    @cached_property
    def guides(self) -> dict[str, Guide]:
        """Learned from the training subjects at first use; a resumed run sets those that it was trained with."""
        return fit_guides(self.guide_names, self.training_subjects(), self.modalities, self.normalisation)

    def _subjects(self, ids: Sequence[str]) -> list[StoredSubject]:
        return [self.store.subjects[id] for id in ids]

    def class_counts(self) -> list[int]:
        """Voxels of each class in the training set, background counted within the box of the whole brain.

        The background of the whole scan would only say how much air the scanner saw.
        """
        counts = [0] * len(self.classes)
        assert self.whole.size is not None
        voxels = self.whole.size[0] * self.whole.size[1] * self.whole.size[2]
        for subject in self._subjects(self.split.train):
            if subject.label_counts is None:
                raise UserError(f"{subject.id} has no label, which this method needs; set data.labelled=true")
            background = voxels
            for number, count in subject.label_counts.items():
                mapped = int(self.lookup[number])
                if mapped > 0:  # ignored voxels are of no class, and no background either
                    background -= count
                if 0 < mapped < len(counts):
                    counts[mapped] += count
            counts[0] += max(background, 0)
        return counts

    def training_subjects(self) -> list[StoredSubject]:
        """Those of the split, whole: what estimators and guides learn from."""
        return self._subjects(self.split.train)

    def intensity_scale(self, modality: str) -> tuple[float, float]:
        """(offset, factor) from normalised values of a sequence to intensities, averaged over training subjects."""
        return self.normalisation.training_scale(
            [stored_statistics(self.normalisation, s, [modality])[0] for s in self.training_subjects()]
        )

    def dataset(self, ids: Sequence[str], *, crop: Crop, augmented: bool = False) -> CropDataset:
        """Samples of these subjects."""
        augment = self._augment() if augmented else None
        return CropDataset(self._subjects(ids), crop=crop, augment=augment, seed=self.seed, **self._reading)

    def all_slices(self, ids: Sequence[str]) -> SubjectSlices:
        """Batches of all slices of each of these subjects, of a sampling by ``SiteSlices``."""
        assert isinstance(self.sampling, SiteSlices)
        return SubjectSlices(self._subjects(ids), slices=self.sampling, guides=self.guides, **self._reading)

    @property
    def _reading(self) -> dict[str, Any]:
        """What all datasets are told."""
        return {"modalities": self.modalities, "lookup": self.lookup, "normalisation": self.normalisation}

    def _augment(self) -> Any:
        if not self.augmentation:
            return None
        import torchio as tio

        return tio.Compose(self.augmentation)

    def _loader(self, dataset: Any, sampler: TrainingSampler | EvaluationSampler, batch_size: int | None) -> DataLoader:
        kind = ResumableLoader if isinstance(sampler, TrainingSampler) else DataLoader
        return kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.workers,
            worker_init_fn=ignore_signals,
            persistent_workers=self.workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    @property
    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def train_steps(self, world_size: int = 1) -> int:
        """Optimizer steps of an epoch on each of ``world_size`` devices."""
        samples = len(self.split.train)
        if isinstance(self.sampling, SiteSlices):
            samples = self.real_slices()
            if self.mix and not self.mix.equal_steps:
                samples = sum(self.mix.amounts(samples))
        return self.steps_per_epoch or max(1, -(-samples // (self.batch_size * world_size)))

    def ordered_samples(self, epochs: int | None, world_size: int = 1) -> int | None:
        """Samples of a whole training, which the mix's order divides; None where there is no order.

        Raises:
            UserError: epochs without an end.
        """
        if not self.mix or self.mix.order == "random":
            return None
        if not epochs or epochs < 1:
            raise UserError(
                f"trainer.max_epochs is {epochs}; data.mix.order={self.mix.order} divides the whole training and needs "
                "a number from 1 on"
            )
        return epochs * self.train_steps(world_size) * self.batch_size * world_size

    def real_slices(self) -> int:
        """Slices of the training subjects that an epoch shows once where nothing is mixed: ×1 of a mix."""
        assert isinstance(self.sampling, SiteSlices)
        return sum(len(self.sampling.training(s.shape, s.site)) for s in self.training_subjects())

    @cached_property
    def training_slices(self) -> SliceDataset:
        """Those of the training subjects, held in memory."""
        return SliceDataset(self.training_subjects(), **self._slice_reading)

    @property
    def _slice_reading(self) -> dict[str, Any]:
        shown = {"slices": self.sampling, "augment": self._augment(), "seed": self.seed}
        return {**self._reading, "guides": self.guides, **shown}

    def train_dataloader(self) -> DataLoader | CombinedLoader:
        if self._lesioned is not None:
            seeds = np.random.SeedSequence(self.seed).generate_state(len(self.modalities)).tolist()
            sequences = {
                name: SequenceSlices(self.training_slices, channel, self._lesioned, seed=seed)
                for channel, (name, seed) in enumerate(zip(self.modalities, seeds, strict=True))
            }
            loaders = {name: self._training_loader(slices, seed=slices.seed) for name, slices in sequences.items()}
            return CombinedLoader(loaders, "min_size")  # all are of one length
        if self.mix:
            return self._mixed_loader(self.mix)
        if isinstance(self.sampling, SiteSlices):
            return self._training_loader(self.training_slices, seed=self.seed)
        return self._training_loader(self.dataset(self.split.train, crop=self.sampling, augmented=True), seed=self.seed)

    def _mixed_loader(self, mix: Mix) -> DataLoader:
        count, reading = self.real_slices(), self._slice_reading
        dataset = MixedSlices(lambda: self.training_slices, mix, count=count, labels=self._labels, **reading)
        epochs = 1 if self.trainer is None else self.trainer.max_epochs
        samples = self.ordered_samples(epochs, self._ranks["world_size"])
        turns = None if samples is None else mix.turns(count, samples)
        return self._training_loader(dataset, seed=self.seed, turns=turns)

    def _training_loader(self, dataset: Any, *, seed: int, turns: Sequence[Turn] | None = None) -> DataLoader:
        samples = self.train_steps(self._ranks["world_size"]) * self.batch_size
        sampler = TrainingSampler(turns or len(dataset), samples=samples, seed=seed, **self._ranks)
        return self._loader(dataset, sampler, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        if isinstance(self.sampling, SiteSlices):
            slices = self.all_slices(self.split.val)
            return self._loader(slices, EvaluationSampler(len(slices), **self._ranks), None)
        # Training's crops, the same every epoch: on whole brains instance norms would see other statistics.
        dataset = self.dataset(self.split.val, crop=self.sampling)
        return self._loader(dataset, EvaluationSampler(len(dataset), **self._ranks), 1)

    def test_dataloader(self) -> DataLoader:
        dataset = self.dataset(self.split.test, crop=self.whole)
        return self._loader(dataset, EvaluationSampler(len(dataset), **self._ranks), 1)
