"""What synthetic training slices are worth: segmenters trained with and without them, on the same test subjects.

That is how Guo et al. judge their synthesis (section 3, "Data Augmentation Results"), and Qu et al. theirs (3.6).

Each label is judged for itself, in whole volumes and slice by slice. What a cut slice or an outermost one does not show
counts as not predicted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mrgen.data.batch import IGNORED, Batch, volumes
from mrgen.data.crops import Box
from mrgen.data.normalisation import stored_statistics
from mrgen.data.store import StoredSubject
from mrgen.evaluation.augmentation_numbers import MEASURES
from mrgen.evaluation.cross_validation import Method
from mrgen.metrics.segmentation import dice, hd95, index_dice, index_mse, region_masks, sensitivity, specificity
from mrgen.protocols import Volumes

__all__ = ["Augmentation"]

Masks = tuple[Tensor, Tensor, Tensor]  # predicted, reference, ignored; (X, Y, Z) or (X, Y) bool each


class Augmentation(LightningModule):
    """Runs under ``Trainer.test`` on whole volumes in stored intensities, and then has rows of numbers and pictures.

    Args:
        methods: by row name, the segmenters of slices. One that has ``segment_all(volumes)``, which of volumes
            (B, 1, X, Y, Z) answers a ``Segmentation`` and by sequence the labels (B, X, Y, Z) that it shows by itself,
            is judged by these as well.
        modalities: the batch's sequences.
        labels: what is judged: by name, the numbers of the classes that it is a union of, such as {"edema": [2]}.
        subjects: by id, whose sites and statistics the methods need.
        shown: the sequence that the pictures show.
        judged: the axial slices of a subject that ``rows`` and ``slices`` are of; the others are ignored. Default: all.
        measures: of each label; ``dice`` is one of them. HD95 takes longer than all else.

    Attributes:
        rows: one a subject, method and label: ``subject``, ``patient``, ``site``, ``input`` (the method), ``label``
            (its name); of the volume the ``measures``, all of which are ``dice``, ``hd95`` (mm), ``sensitivity`` and
            ``specificity``; ``dice_there`` (nan without the label in the reference) and ``one_empty`` (it is in just
            one of reference and prediction). Of the axial slices that hold brain: ``slices`` (how many),
            ``slices_there`` (with the label in the reference), ``slices_missed`` (of these, with none predicted),
            ``slices_false`` (of the others, with some predicted); means of the measures over these slices,
            ``slice_dice`` … ``slice_specificity``; ``slice_dice_there``, the mean over those with the label; with HD95
            ``slice_hd95_both``, the median over those where it is in both. nan where no slice has a value.
        slices: one a subject, method, label and slice that has the label in the reference or the prediction:
            ``subject``, ``input``, ``label``, ``slice`` (z of the stored volume), the measures, ``reference``
            and ``predicted`` (voxels). Of all other slices the rule says the values.
        indices: one a subject, method that labels each sequence by itself, and sequence: ``subject``, ``patient``,
            ``site``, ``input``, ``sequence``; ``slices``, how many: those that training shows of such a scan, as they
            are cut for the network, but for those that are ignored as a whole; ``index_dice`` and ``index_mse`` of the
            maps of label numbers, means over these slices (Qu et al., section 3.4).
        kept: by subject, of the judged slice with the most lesion: ``image`` (of ``shown``) and ``label``, (X, Y) each,
            and ``predicted`` by method.

    Both empty scores a Dice of 1 and an HD95 of 0, one empty 0 and 373.13 mm. Sensitivity is nan without reference.
    Specificity is over all voxels that the network's slices have, air and padding included, and ignored ones not.
    """

    def __init__(
        self,
        *,
        methods: Mapping[str, Method],
        modalities: Sequence[str],
        labels: Mapping[str, Sequence[int]],
        subjects: Mapping[str, StoredSubject],
        shown: str,
        judged: Callable[[StoredSubject], range] = lambda subject: range(subject.shape[2]),
        measures: Sequence[str] = tuple(MEASURES),
    ):
        super().__init__()
        # In a list: names of runs have dots, which those of modules may not.
        self.names, self.methods = tuple(methods), nn.ModuleList(methods.values()).eval().requires_grad_(False)
        self.modalities, self.labels, self.shown = tuple(modalities), dict(labels), shown
        self.subjects, self.judged, self.measures = dict(subjects), judged, tuple(measures)
        self.rows: list[dict[str, Any]] = []
        self.slices: list[dict[str, Any]] = []
        self.indices: list[dict[str, Any]] = []
        self.kept: dict[str, dict[str, Any]] = {}

    def on_test_epoch_start(self) -> None:
        self.rows, self.slices, self.indices, self.kept = [], [], [], {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        subject, label = self.subjects[batch["subject"][0]], batch["label"][0].cpu()  # (X, Y, Z)
        brain = batch["brain"][0].cpu()
        judged = self.judged(subject)
        inside = slice(judged.start, judged.stop)
        lesion = ((label > 0) & (label != IGNORED))[..., inside]
        z = judged[int((lesion if lesion.any() else brain[..., inside]).sum(dim=(0, 1)).argmax())]
        image = volumes(batch, self.modalities)[self.shown][0, 0, ..., z].cpu()
        kept: dict[str, Any] = {"image": image, "label": label[..., z], "predicted": {}}
        references, ignored, seen = region_masks(label, self.labels), label == IGNORED, brain.clone()
        for beyond in (slice(judged.start), slice(judged.stop, None)):
            ignored[..., beyond], seen[..., beyond] = True, False
        who = {"patient": subject.patient, "site": subject.site}
        for name, method in zip(self.names, self.methods, strict=True):
            assert isinstance(method, Method)
            box = method.slices.box(subject.shape, subject.site)
            predicted, each = self._segment(method, self._cut(method, batch, subject, box), subject, judged)
            kept["predicted"][name] = predicted[..., z].clone()  # not the whole volume behind it
            for what, mask in region_masks(predicted, self.labels).items():
                masks = mask, references[what], ignored
                of_slices = self._of_slices(masks, seen, subject.spacing, box)
                named = {"subject": subject.id, "input": name, "label": what}
                self.slices += [{**named, **one} for one in of_slices if one["reference"] or one["predicted"]]
                row: dict[str, Any] = {**named, **who, **self._measured(masks, subject.spacing, box)}
                there = bool((masks[1] & ~masks[2]).any())
                row["dice_there"] = row["dice"] if there else math.nan
                row["one_empty"] = bool((masks[0] & ~masks[2]).any()) != there
                self.rows.append(row | self._over_slices(of_slices))
            shown = list(method.slices.training(subject.shape, subject.site))
            reference = F.pad(label[..., shown], _pads(box, subject.shape)).movedim(-1, 0)  # (n, x, y)
            for sequence, found in each.items():
                measured = {"input": name, "sequence": sequence, **_index_measures(found, reference)}
                self.indices.append({"subject": subject.id, **who, **measured})
        self.kept[subject.id] = kept

    def _cut(self, method: Method, batch: Batch, subject: StoredSubject, box: Box) -> Tensor:
        """(C, x, y, z): the scan normalised and cut to what the network sees."""
        recorded = stored_statistics(method.normalisation, subject, self.modalities)
        image = method.normalisation(batch["image"][0], batch["brain"][0], recorded)  # (C, X, Y, Z)
        # Padded as in training: a scale's background need not be 0.
        outside = method.normalisation.outside
        fills = [float(channel.min()) if outside is None else outside for channel in image]
        pads = _pads(box, subject.shape)
        return torch.stack([F.pad(channel, pads, value=fill) for channel, fill in zip(image, fills, strict=True)])

    def _segment(
        self, method: Method, cut: Tensor, subject: StoredSubject, judged: range
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What a method makes of the slices that are asked for; the others are not shown to it.

        Args:
            method: whose ``cut`` it is.
            cut: (C, x, y, z), the scan as the method sees it.
            subject: the scan.
            judged: its slices that are.

        Returns:
            (X, Y, Z) classes, background outside the slices, in the outermost ones and in those that are not judged;
            and by sequence, of methods that label each by itself, (n, x, y) of the slices that training shows.
        """
        tested = method.slices.tested(subject.shape)
        tested = range(max(tested.start, judged.start), min(tested.stop, judged.stop))
        segmenter, each_too = method.segmenter, hasattr(method.segmenter.model, "segment_all")
        training = method.slices.training(subject.shape, subject.site) if each_too else range(0)
        places = sorted({*tested, *training})
        wanted = {name: self.modalities.index(name) for name in segmenter.sources}
        views = {name: cut[None, i : i + 1][..., places] for name, i in wanted.items()}  # (1, 1, x, y, n)
        if each_too:
            labels, each = _segment_all(segmenter.model, views, segmenter.batch)
        else:
            labels, each = segmenter.segment(views).labels[0], {}
        uncut = F.pad(labels, [-n for n in _pads(method.slices.box(subject.shape, subject.site), subject.shape)])
        predicted = torch.zeros(tuple(subject.shape), dtype=labels.dtype)
        predicted[..., list(tested)] = uncut[..., [places.index(z) for z in tested]].cpu()
        of_training = [places.index(z) for z in training]
        return predicted, {name: found[..., of_training].movedim(-1, 0).cpu() for name, found in each.items()}

    def _measured(self, masks: Masks, spacing: Sequence[float], box: Box) -> dict[str, float]:
        """Of a volume or of one slice; ``box`` is where the network's slices are cut."""
        predicted, reference, ignore = masks
        inside = tuple(slice(max(a, 0), b) for a, b in box[: predicted.ndim])
        cut = predicted[inside], reference[inside], ignore[inside]
        beyond = math.prod(b - a for a, b in box[: predicted.ndim]) - cut[0].numel()
        known: dict[str, Callable[[], float]] = {
            "dice": lambda: dice(predicted, reference, ignore),
            "hd95": lambda: hd95(predicted, reference, spacing[: predicted.ndim], ignore),
            "sensitivity": lambda: sensitivity(predicted, reference, ignore),
            "specificity": lambda: specificity(*cut, beyond=beyond),
        }
        return {measure: known[measure]() for measure in self.measures}

    def _of_slices(self, masks: Masks, brain: Tensor, spacing: Sequence[float], box: Box) -> list[dict[str, Any]]:
        """One mapping an axial slice that holds brain."""
        rows: list[dict[str, Any]] = []
        for z in brain.any(dim=0).any(dim=0).nonzero()[:, 0].tolist():
            predicted, reference, ignore = (mask[..., z] for mask in masks)
            row: dict[str, Any] = {"slice": z, **self._measured((predicted, reference, ignore), spacing, box)}
            rows.append(row | {"reference": int(reference.sum()), "predicted": int((predicted & ~ignore).sum())})
        return rows

    def _over_slices(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What a subject's row says of its slices."""

        def mean(key: str, of: Sequence[Mapping[str, Any]] = rows) -> float:
            values = [row[key] for row in of if not math.isnan(row[key])]
            return fmean(values) if values else math.nan

        there = [row for row in rows if row["reference"]]
        both = [row for row in there if row["predicted"]]
        found = {
            "slices": len(rows),
            "slices_there": len(there),
            "slices_missed": len(there) - len(both),
            "slices_false": sum(bool(row["predicted"]) and not row["reference"] for row in rows),
            **{f"slice_{key}": mean(key) for key in self.measures},
            "slice_dice_there": mean("dice", there),
        }
        if "hd95" in self.measures:
            found["slice_hd95_both"] = median(row["hd95"] for row in both) if both else math.nan
        return found

    def on_test_epoch_end(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.rows, self.slices, self.indices, self.kept))
        by_subject: Callable[[Mapping[str, Any]], str] = lambda row: row["subject"]  # noqa: E731
        self.rows = sorted((row for rows, *_ in parts for row in rows), key=by_subject)
        self.slices = sorted((row for _, rows, _, _ in parts for row in rows), key=by_subject)
        self.indices = sorted((row for _, _, rows, _ in parts for row in rows), key=by_subject)
        self.kept = {id: slices for *_, kept in parts for id, slices in kept.items()}


def _pads(box: Box, shape: Sequence[int]) -> list[int]:
    """What ``F.pad`` makes a box's view of a volume with: the last axis first; negative ones cut."""
    x, y, z = ((-start, stop - size) for (start, stop), size in zip(box, shape, strict=True))
    return [*z, *y, *x]


def _segment_all(model: Any, views: Volumes, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(x, y, n) labels of slices (1, 1, x, y, n) from all sequences together, and those from each by itself."""
    split = zip(*(view.split(batch, dim=-1) for view in views.values()), strict=True)
    parts = [model.segment_all(dict(zip(views, part, strict=True))) for part in split]
    together = torch.cat([whole.labels[0] for whole, _ in parts], dim=-1)
    return together, {name: torch.cat([each[name][0] for _, each in parts], dim=-1) for name in views}


def _index_measures(predicted: Tensor, reference: Tensor) -> dict[str, float]:
    """Of maps of label numbers, (n, x, y) both; what is ignored as a whole counts for nothing."""
    known = (reference != IGNORED).flatten(1).any(dim=1)
    return {
        "slices": int(known.sum()),
        "index_dice": float(index_dice(predicted, reference)[known].mean()),
        "index_mse": float(index_mse(predicted, reference)[known].mean()),
    }
