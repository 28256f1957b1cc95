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
from mrgen.evaluation.cross_validation import Method
from mrgen.metrics.segmentation import dice, hd95, index_dice, index_mse, region_masks, sensitivity, specificity

__all__ = ["Augmentation"]


class Augmentation(LightningModule):
    """Runs under ``Trainer.test`` on whole volumes in stored intensities, and then has rows of numbers and pictures.

    Args:
        methods: by row name, the segmenters of slices. One that has ``segment_each(volumes)``, which labels slices
            (B, 1, X, Y) from each sequence by itself, is judged by that as well.
        modalities: the batch's sequences.
        labels: what is judged: by name, the numbers of the classes that it is a union of, such as {"edema": [2]}.
        subjects: by id, whose sites and statistics the methods need.
        shown: the sequence that the pictures show.
        judged: the axial slices of a subject that ``rows`` and ``slices`` are of; the others are ignored. Default: all.

    Attributes:
        rows: one a subject, method and label: ``subject``, ``patient``, ``site``, ``input`` (the method), ``label``
            (its name); of the volume ``dice``, ``hd95`` (mm), ``sensitivity``, ``specificity``, ``dice_there``
            (nan without the label in the reference) and ``one_empty`` (it is in just one of reference and prediction).
            Of the axial slices that hold brain: ``slices`` (how many), ``slices_there`` (with the label in the
            reference), ``slices_missed`` (of these, with none predicted), ``slices_false`` (of the others, with some
            predicted); means of the four over these slices, ``slice_dice`` … ``slice_specificity``;
            ``slice_dice_there``, the mean over those with the label; ``slice_hd95_both``, the median over those where
            it is in both. nan where no slice has a value.
        slices: one a subject, method, label and slice that has the label in the reference or the prediction:
            ``subject``, ``input``, ``label``, ``slice`` (z of the stored volume), ``dice``, ``hd95``, ``sensitivity``,
            ``specificity``, ``reference`` and ``predicted`` (voxels). Of all other slices the rule says the values.
        indices: one a subject, method that labels each sequence by itself, and sequence: ``subject``, ``patient``,
            ``site``, ``input``, ``sequence``; ``slices``, how many: those that training shows of such a scan, as they
            are cut for the network, but for those that are ignored as a whole; ``index_dice`` and ``index_mse`` of the
            maps of label numbers, means over these slices (Qu et al., section 3.4).
        kept: by subject, of the axial slice with the most lesion: ``image`` (of ``shown``) and ``label``, (X, Y) each,
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
    ):
        super().__init__()
        # In a list: names of runs have dots, which those of modules may not.
        self.names, self.methods = tuple(methods), nn.ModuleList(methods.values()).eval().requires_grad_(False)
        self.modalities, self.labels, self.shown = tuple(modalities), dict(labels), shown
        self.subjects, self.judged = dict(subjects), judged
        self.rows: list[dict[str, Any]] = []
        self.slices: list[dict[str, Any]] = []
        self.indices: list[dict[str, Any]] = []
        self.kept: dict[str, dict[str, Any]] = {}

    def on_test_epoch_start(self) -> None:
        self.rows, self.slices, self.indices, self.kept = [], [], [], {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        subject, label = self.subjects[batch["subject"][0]], batch["label"][0].cpu()  # (X, Y, Z)
        brain = batch["brain"][0].cpu()
        lesion = (label > 0) & (label != IGNORED)
        z = int((lesion if lesion.any() else brain).sum(dim=(0, 1)).argmax())
        image = volumes(batch, self.modalities)[self.shown][0, 0, ..., z].cpu()
        kept: dict[str, Any] = {"image": image, "label": label[..., z], "predicted": {}}
        references, ignored, seen = region_masks(label, self.labels), label == IGNORED, brain.clone()
        judged = self.judged(subject)
        for beyond in (slice(judged.start), slice(judged.stop, None)):
            ignored[..., beyond], seen[..., beyond] = True, False
        who = {"patient": subject.patient, "site": subject.site}
        for name, method in zip(self.names, self.methods, strict=True):
            assert isinstance(method, Method)
            box = method.slices.box(subject.shape, subject.site)
            cut = self._cut(method, batch, subject, box)
            predicted = self._segment(method, cut, box, subject.shape).cpu()
            kept["predicted"][name] = predicted[..., z].clone()  # not the whole volume behind it
            for what, mask in region_masks(predicted, self.labels).items():
                masks = mask, references[what], ignored
                of_slices = _of_slices(masks, seen, subject.spacing, box)
                named = {"subject": subject.id, "input": name, "label": what}
                self.slices += [{**named, **one} for one in of_slices if one["reference"] or one["predicted"]]
                row: dict[str, Any] = {**named, **who, **_measures(masks, subject.spacing, box)}
                there = bool((masks[1] & ~masks[2]).any())
                row["dice_there"] = row["dice"] if there else math.nan
                row["one_empty"] = bool((masks[0] & ~masks[2]).any()) != there
                self.rows.append(row | _over_slices(of_slices))
            for sequence, measured in self._each(method, cut, label, subject, box).items():
                self.indices.append({"subject": subject.id, **who, "input": name, "sequence": sequence, **measured})
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

    def _segment(self, method: Method, cut: Tensor, box: Box, shape: Sequence[int]) -> Tensor:
        """(X, Y, Z) classes; background outside the slices and in the outermost ones."""
        views = {name: cut[None, i : i + 1] for i, name in enumerate(self.modalities)}  # (1, 1, x, y, z)
        labels = method.segmenter.segment({name: views[name] for name in method.segmenter.sources}).labels[0]
        found = F.pad(labels, [-n for n in _pads(box, shape)])  # (X, Y, Z)
        tested = method.slices.tested(found.shape)
        found[..., : tested.start] = 0
        found[..., tested.stop :] = 0
        return found

    def _each(
        self, method: Method, cut: Tensor, label: Tensor, subject: StoredSubject, box: Box
    ) -> dict[str, dict[str, float]]:
        """By sequence, what the map of label numbers that is made from it alone is worth; none of other methods."""
        segment_each = getattr(method.segmenter.model, "segment_each", None)
        if segment_each is None:
            return {}
        shown = list(method.slices.training(subject.shape, subject.site))
        slices = cut[..., shown].movedim(-1, 0)  # (n, C, x, y)
        reference = F.pad(label, _pads(box, subject.shape))[..., shown].movedim(-1, 0)  # (n, x, y)
        wanted = [(name, self.modalities.index(name)) for name in method.segmenter.sources]
        parts = [
            segment_each({name: part[:, i : i + 1] for name, i in wanted})
            for part in slices.split(method.segmenter.batch)
        ]
        known = (reference != IGNORED).flatten(1).any(dim=1)
        measured: dict[str, dict[str, float]] = {}
        for name, _ in wanted:
            predicted = torch.cat([part[name] for part in parts]).cpu()  # (n, x, y)
            measured[name] = {
                "slices": int(known.sum()),
                "index_dice": float(index_dice(predicted, reference)[known].mean()),
                "index_mse": float(index_mse(predicted, reference)[known].mean()),
            }
        return measured

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


Masks = tuple[Tensor, Tensor, Tensor]  # predicted, reference, ignored; (X, Y, Z) or (X, Y) bool each


def _measures(masks: Masks, spacing: Sequence[float], box: Box) -> dict[str, float]:
    """The four of a volume or of one slice; ``box`` is where the network's slices are cut."""
    predicted, reference, ignore = masks
    inside = tuple(slice(max(a, 0), b) for a, b in box[: predicted.ndim])
    cut = predicted[inside], reference[inside], ignore[inside]
    beyond = math.prod(b - a for a, b in box[: predicted.ndim]) - cut[0].numel()
    return {
        "dice": dice(predicted, reference, ignore),
        "hd95": hd95(predicted, reference, spacing[: predicted.ndim], ignore),
        "sensitivity": sensitivity(predicted, reference, ignore),
        "specificity": specificity(*cut, beyond=beyond),
    }


def _of_slices(masks: Masks, brain: Tensor, spacing: Sequence[float], box: Box) -> list[dict[str, Any]]:
    """One mapping an axial slice that holds brain."""
    rows: list[dict[str, Any]] = []
    for z in brain.any(dim=0).any(dim=0).nonzero()[:, 0].tolist():
        predicted, reference, ignore = (mask[..., z] for mask in masks)
        row: dict[str, Any] = {"slice": z, **_measures((predicted, reference, ignore), spacing, box)}
        rows.append(row | {"reference": int(reference.sum()), "predicted": int((predicted & ~ignore).sum())})
    return rows


def _over_slices(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a subject's row says of its slices."""

    def mean(key: str, of: Sequence[Mapping[str, Any]] = rows) -> float:
        values = [row[key] for row in of if not math.isnan(row[key])]
        return fmean(values) if values else math.nan

    there = [row for row in rows if row["reference"]]
    both = [row["hd95"] for row in there if row["predicted"]]
    return {
        "slices": len(rows),
        "slices_there": len(there),
        "slices_missed": len(there) - len(both),
        "slices_false": sum(bool(row["predicted"]) and not row["reference"] for row in rows),
        **{f"slice_{key}": mean(key) for key in ("dice", "hd95", "sensitivity", "specificity")},
        "slice_dice_there": mean("dice", there),
        "slice_hd95_both": median(both) if both else math.nan,
    }
