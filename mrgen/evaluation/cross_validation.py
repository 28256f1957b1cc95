"""The judgement of paper 3: lesions in whole volumes of subjects that a fold did not train on, and what was imputed.

Slices are what the networks see; the subject is what is judged. Lesions that a cut slice or an outermost one loses
count as missed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from mrgen.data.batch import IGNORED, Batch, volumes
from mrgen.data.normalisation import Normalisation, stored_statistics
from mrgen.data.slices import SiteSlices
from mrgen.data.store import StoredSubject
from mrgen.evaluation.inference import Box, WholeSegmenter, WholeSynthesizer
from mrgen.evaluation.lesion_places import false_positive_volumes, places
from mrgen.metrics.lesions import lesion_detection, lesion_sizes, volume_difference, voxel_rates
from mrgen.metrics.reconstruction import mae, psnr, ssim
from mrgen.metrics.segmentation import hd95
from mrgen.protocols import Segmenter, Synthesizer, Volumes

__all__ = ["CrossValidation", "Method"]

BATCH = 8  # slices of one pass


class Method(nn.Module):
    """A segmenter of slices, which may impute a sequence on the way, as it is given whole volumes.

    Args:
        model: answers ``Segmenter`` and perhaps ``Synthesizer``.
        normalisation: of its training.
        slices: of its training.
    """

    def __init__(self, model: Any, normalisation: Normalisation, slices: SiteSlices):
        super().__init__()
        self.segmenter = WholeSegmenter(model, [0, 0, 1], BATCH)
        self.imputer = WholeSynthesizer(model, [0, 0, 1], BATCH) if isinstance(model, Synthesizer) else None
        self.normalisation, self.slices = normalisation, slices
        assert isinstance(model, Segmenter)


class CrossValidation(LightningModule):
    """Runs under ``Trainer.test`` on whole volumes in stored intensities, and then has ``rows``, ``lesions``, ``kept``.

    Args:
        methods: by row name, the runs of one fold.
        modalities: the batch's sequences.
        source, target: the sequences that the pictures show; the places of false positives are found in the source.
        subjects: by id, whose sites and statistics the methods need.
        fold: which one, for the rows.
        pictured: ids of the subjects whose slices are kept for the figures.

    Attributes:
        rows: one a subject and method: ``subject``, ``site``, ``fold``, ``input`` (the method); ``dsc``, ``fpr``,
            ``fnr``, ``fdr``, ``lesion_recall``, ``lesion_f1``, ``lesion_fpr``, ``avd`` (fractions), ``hd95`` (mm),
            ``reference_ml``, ``predicted_ml``; the volumes of ``mrgen.evaluation.lesion_places``; and of an imputed
            sequence, in the scale of the method's normalisation and over all that its slices show between the outermost
            ones, ``mae``, ``psnr`` (dB) and ``ssim`` with a data range of 1, ``psnr_own`` with the real sequence's own
            range, and the first three ``_brain``.
        lesions: one a reference lesion and method: ``subject``, ``input``, ``volume_ml``, ``found``, ``share``.
        kept: by pictured subject, of the axial slice with the most lesion: ``load_ml`` (of the subject), ``t1`` (the
            source), ``flair`` (the target) and ``label``, (X, Y) each, ``predicted`` and ``synthetic`` by method.
    """

    def __init__(
        self,
        *,
        methods: Mapping[str, Method],
        modalities: Sequence[str],
        source: str,
        target: str,
        subjects: Mapping[str, StoredSubject],
        fold: int = 0,
        pictured: Sequence[str] = (),
    ):
        super().__init__()
        self.methods = nn.ModuleDict(methods).eval().requires_grad_(False)
        self.modalities, self.source, self.target = tuple(modalities), source, target
        self.subjects, self.fold, self.pictured = dict(subjects), fold, tuple(pictured)
        self.rows: list[dict[str, Any]] = []
        self.lesions: list[dict[str, Any]] = []
        self.kept: dict[str, dict[str, Any]] = {}

    def on_test_epoch_start(self) -> None:
        self.rows, self.lesions, self.kept = [], [], {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        subject, label = self.subjects[batch["subject"][0]], batch["label"][0]  # (X, Y, Z)
        reference, ignore = (label > 0) & (label != IGNORED), label == IGNORED
        where = places(volumes(batch, self.modalities)[self.source][0, 0], batch["brain"][0], subject.spacing)
        millilitres = float(torch.tensor(subject.spacing).prod()) / 1000
        common = {"subject": subject.id, "site": subject.site, "fold": self.fold}
        for name, method in self.methods.items():
            assert isinstance(method, Method)
            views, box = self._views(method, batch, subject), method.slices.box(subject.shape, subject.site)
            predicted = self._segment(method, views, box)
            masks = predicted, reference, ignore
            row: dict[str, Any] = {**common, "input": name, **voxel_rates(*masks), **lesion_detection(*masks)}
            row["avd"] = volume_difference(*masks)
            row["hd95"] = hd95(predicted, reference, subject.spacing, ignore)
            row["reference_ml"] = float(reference.sum()) * millilitres
            row["predicted_ml"] = float((predicted & ~ignore).sum()) * millilitres
            row |= false_positive_volumes(predicted, reference, where, subject.spacing, ignore)
            for lesion in lesion_sizes(predicted, reference, subject.spacing, ignore):
                self.lesions.append({"subject": subject.id, "input": name, **lesion})
            made = None
            if method.imputer is not None:
                made = method.imputer.synthesize({self.source: views[self.source]}, box=box).mean[0, 0].float()
                real = views[method.imputer.targets[0]][0, 0]
                seen = self._seen(method, box, real)
                row |= _likeness(made, real, seen & ~ignore, batch["brain"][0])
                made = torch.where(seen, made, real.min())  # background in the pictures
            self.rows.append(row)
            if subject.id in self.pictured:
                self._keep(name, subject, batch, views, predicted, made, row["reference_ml"])

    def _views(self, method: Method, batch: Batch, subject: StoredSubject) -> Volumes:
        """The subject's sequences as the method sees them."""
        recorded = stored_statistics(method.normalisation, subject, self.modalities)
        image = method.normalisation(batch["image"][0], batch["brain"][0], recorded)[None]
        return volumes({**batch, "image": image}, self.modalities)

    def _segment(self, method: Method, views: Volumes, box: Box) -> Tensor:
        """(X, Y, Z) bool; none in the outermost slices."""
        wanted = {source: views[source] for source in method.segmenter.sources}
        found = method.segmenter.segment(wanted, box=box).labels[0] > 0
        tested = method.slices.tested(found.shape)
        found[..., : tested.start] = False
        found[..., tested.stop :] = False
        return found

    def _seen(self, method: Method, box: Box, like: Tensor) -> Tensor:
        """(X, Y, Z) bool: what the slices show of the scan, between the outermost ones."""
        seen = torch.zeros_like(like, dtype=torch.bool)
        (x0, x1), (y0, y1), _ = box
        tested = method.slices.tested(like.shape)
        seen[max(x0, 0) : x1, max(y0, 0) : y1, tested.start : tested.stop] = True
        return seen

    def _keep(
        self,
        name: str,
        subject: StoredSubject,
        batch: Batch,
        views: Volumes,
        predicted: Tensor,
        made: Tensor | None,
        load_ml: float,
    ) -> None:
        """Keeps a method's part of a subject's slice with the most lesion, or with most brain where there is none."""
        label = batch["label"][0]
        lesion = (label > 0) & (label != IGNORED)
        shown = lesion if lesion.any() else batch["brain"][0]
        z = int(shown.sum(dim=(0, 1)).argmax())
        images = {
            "t1": views[self.source][0, 0, ..., z],
            "flair": views[self.target][0, 0, ..., z],
            "label": label[..., z],
        }
        new = {
            "load_ml": load_ml,
            **{key: image.cpu() for key, image in images.items()},
            "predicted": {},
            "synthetic": {},
        }
        kept = self.kept.setdefault(subject.id, new)
        kept["predicted"][name] = predicted[..., z].long().cpu()
        if made is not None:
            kept["synthetic"][name] = made[..., z].cpu()

    def on_test_epoch_end(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.rows, self.lesions, self.kept))
        by_subject: Callable[[Mapping[str, Any]], str] = lambda row: row["subject"]  # noqa: E731
        self.rows = sorted((row for rows, _, _ in parts for row in rows), key=by_subject)
        self.lesions = sorted((row for _, rows, _ in parts for row in rows), key=by_subject)
        self.kept = {id: slices for _, _, kept in parts for id, slices in kept.items()}


def _likeness(made: Tensor, real: Tensor, seen: Tensor, brain: Tensor) -> dict[str, float]:
    """Errors of an imputed sequence, all (X, Y, Z). The paper states no peak for its PSNR; 1 is a convention."""
    own = float(real[seen].max() - real[seen].min())
    values = {"psnr_own": psnr(made, real, seen, data_range=own)}
    for mask, where in ((seen, ""), (seen & brain, "_brain")):
        values |= {
            f"mae{where}": mae(made, real, mask),
            f"psnr{where}": psnr(made, real, mask, data_range=1.0),
            f"ssim{where}": ssim(made, real, mask, data_range=1.0),
        }
    return values
