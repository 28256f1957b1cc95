"""The swap: replace one real sequence by its synthesis and see what a frozen segmenter makes of it (RS-Net, section 3).

The segmenter is never retrained on synthetic data, so that its loss of Dice measures the synthesis. Without a segmenter
the syntheses are only compared with the real sequences.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from mrgen.data.batch import IGNORED, Batch, volumes
from mrgen.data.crops import Box
from mrgen.data.normalisation import Normalisation, stored_statistics
from mrgen.data.store import StoredSubject, bounding_box, statistics
from mrgen.errors import UserError
from mrgen.evaluation.unit_scale import rescaled, unit_errors
from mrgen.metrics.reconstruction import mae, mse, psnr, ssim
from mrgen.metrics.segmentation import region_dice, region_hd95_directed
from mrgen.metrics.uncertainty import calibration_bins, rank_correlation
from mrgen.protocols import Segmenter, Synthesis, Synthesizer, Volumes

__all__ = ["REAL", "Swap"]

REAL = "real"
BINS = 20  # of the calibration
FRAME = 3  # voxels around the brain in a picture
VOXELS = 5000  # of the pictured subject, for a scatter plot


@dataclass
class _Subject:
    """The subject that is being judged.

    Attributes:
        batch: of this subject alone.
        id: its id.
        brain: (1, X, Y, Z) bool.
        tumour: (1, X, Y, Z) bool, any lesion.
        labelled: whether the batch's label says something.
        views: its sequences, each (1, 1, X, Y, Z), as every method sees them, by row name.
        brain_box: (start, stop) of x, y, z around the brain.
        from_real: (1, X, Y, Z), what the segmenter makes of the real sequences; None without a segmenter.
    """

    batch: Batch
    id: str
    brain: Tensor
    tumour: Tensor
    labelled: bool
    views: dict[str, Volumes]
    brain_box: list[list[int]]
    from_real: Tensor | None = None


class Swap(LightningModule):
    """Runs under ``Trainer.test``, after which ``rows``, ``calibration`` and ``slices`` are complete.

    Under several devices every subject is computed on one rank alone, and the rows of all ranks come together.

    Args:
        segmenter: frozen; None: nobody judges but the real sequence.
        synthesizers: by row name, ``target/method``.
        modalities: the batch's sequences.
        regions: evaluation regions and their classes.
        normalisations: by row name, what a method sees of the batch, whose intensities are then the stored ones; the
            segmenter's is called ``real``. A synthesis on the segmenter's scale enters as it is, because re-normalising
            it by its own statistics would hide its bias; one on another scale enters through the segmenter's
            normalisation. None: all see the batch as it is, and share its scale.
        subjects: by id, whose recorded statistics the normalisations need.
        boxes: by row name, what a network is to see of a subject, (start, stop) of x, y, z: called with the box of the
            brain, the shape of the volume and the site. Those without a name see the batch.
        pictured: id of the subject whose slices are kept for the figures.
        seed: with subject and row name it seeds what a synthesizer draws.

    Attributes:
        rows: one a subject and input set: ``subject``, ``input``, and, for a labelled subject and with a segmenter,
            ``dice_REGION`` (0 to 1), ``hd95_REGION`` and ``hd95_mean_REGION`` (mm; the larger and the mean of the two
            directions). Of a synthesis also the errors of ``unit_errors``, and with a segmenter: the same three as
            ``agree_…``, against the segmentation from the real sequences; in the segmenter's scale ``mse``, ``mae``,
            ``psnr`` and ``ssim``, each ``_brain`` and ``_tumour``; and where it has a variance ``variance_brain``,
            ``variance_tumour`` (means) and ``rank_correlation`` (Spearman's, of variance and absolute error in the
            brain). A subject without lesion has nan in it.
        calibration: one a subject, synthesis with a variance, and bin: ``subject``, ``input``, ``bin``, ``variance``,
            ``squared_error``, ``voxels``; see ``calibration_bins``.
        slices: of the pictured subject, by row name, each (X, Y): ``label`` where it has one, ``predicted`` with a
            segmenter; of a synthesis ``source``, ``own_real`` and ``own_synthetic`` on [0, 1] (see ``rescaled``), with
            a segmenter ``real`` and ``synthetic`` in its scale; with a variance ``variance`` and ``voxels``, the
            ``variance`` and absolute ``error`` (N,) of up to 5000 brain voxels.
    """

    def __init__(
        self,
        *,
        segmenter: Segmenter | None,
        synthesizers: Mapping[str, Synthesizer],
        modalities: Sequence[str],
        regions: Mapping[str, Sequence[int]],
        normalisations: Mapping[str, Normalisation] | None = None,
        subjects: Mapping[str, StoredSubject] | None = None,
        boxes: Mapping[str, Callable[[Sequence[Sequence[int]], Sequence[int], str | None], Box]] | None = None,
        pictured: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.segmenter, self.synthesizers = segmenter, dict(synthesizers)
        # Registered so that Lightning moves the networks; estimators without parameters stay out.
        models: list[Any] = [segmenter, *self.synthesizers.values()]
        self.networks = nn.ModuleList(model for model in models if isinstance(model, nn.Module))
        self.networks.eval().requires_grad_(False)
        self.modalities, self.regions, self.pictured, self.seed = tuple(modalities), dict(regions), pictured, seed
        self.normalisations, self.boxes = dict(normalisations or {}), dict(boxes or {})
        self.subjects = dict(subjects or {})
        self.rows: list[dict[str, Any]] = []
        self.calibration: list[dict[str, Any]] = []
        self.slices: dict[str, dict[str, Any]] = {}

    def on_test_epoch_start(self) -> None:
        self.rows, self.calibration, self.slices = [], [], {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        subject = self._seen(batch)
        if self.segmenter is not None:
            subject.from_real = self._segment(subject.views[REAL], subject)
            row = {"subject": subject.id, "input": REAL}
            self.rows.append(
                row | (self._overlap(subject.from_real, batch["label"], batch) if subject.labelled else {})
            )
            self._keep(REAL, subject, subject.from_real, {})
        for name in self.synthesizers:
            self.rows.append({"subject": subject.id, "input": name, **self._judge(name, subject)})

    def _seen(self, batch: Batch) -> "_Subject":
        id, brain, label = batch["subject"][0], batch["brain"], batch["label"]
        known = self.subjects.get(id)
        views: dict[str, Volumes] = dict.fromkeys([REAL, *self.synthesizers], volumes(batch, self.modalities))
        done: dict[Normalisation, Volumes] = {}  # methods may share a normalisation
        for name, normalisation in self.normalisations.items():
            if normalisation not in done:
                recorded = stored_statistics(normalisation, self.subjects[id], self.modalities)
                image = normalisation(batch["image"][0], brain[0], recorded)[None]
                done[normalisation] = volumes({**batch, "image": image}, self.modalities)
            views[name] = done[normalisation]
        return _Subject(
            batch=batch,
            id=id,
            brain=brain,
            tumour=(label > 0) & (label != IGNORED),
            labelled=known is None or known.labelled,
            views=views,
            brain_box=bounding_box(brain[0].cpu().numpy()),
        )

    def _judge(self, name: str, subject: "_Subject") -> dict[str, float]:
        """The row of one synthesis."""
        synthesizer, brain, tumour = self.synthesizers[name], subject.brain, subject.tumour
        synthesis, target = self._synthesize(name, subject), synthesizer.targets[0]
        stored = volumes(subject.batch, self.modalities)[target] * brain[:, None]
        images = {
            "source": subject.views[name][synthesizer.sources[0]],
            "own_real": rescaled(stored, "stored" if self.normalisations else synthesis.scale),
            "own_synthetic": rescaled(synthesis.mean.float() * brain[:, None], synthesis.scale),
        }
        row = unit_errors(synthesis, images["own_real"], brain, tumour)
        predicted = None
        if subject.from_real is not None:
            images |= {"real": subject.views[REAL][target], "synthetic": self._entering(synthesis, brain)}
            predicted = self._segment({**subject.views[REAL], target: images["synthetic"]}, subject)
            if subject.labelled:
                row |= self._overlap(predicted, subject.batch["label"], subject.batch)
            agreement = self._overlap(predicted, subject.from_real, subject.batch)
            row |= {f"agree_{key}": value for key, value in agreement.items()}
            row |= _quality(images["synthetic"][0, 0], images["real"][0, 0], brain[0], tumour[0])
            if synthesis.variance is not None:
                images["variance"] = synthesis.variance.float() * brain[:, None]
                row |= self._uncertainty(name, subject, images)
        self._keep(name, subject, predicted, images)
        return row

    def _entering(self, synthesis: Synthesis, brain: Tensor) -> Tensor:
        """A synthesis (1, 1, X, Y, Z) as the segmenter gets it.

        Background is 0 in all scales; the mask is the prepared one, to which all sequences of the subject voted.
        """
        made = synthesis.mean.float() * brain[:, None]
        own = self.normalisations.get(REAL)
        if own is None or own.scale == synthesis.scale:
            return made
        measured = statistics(made[0, 0].cpu().numpy(), brain[0].cpu().numpy())
        return own(made[0], brain[0], [measured])[None]

    def _segment(self, inputs: Volumes, subject: "_Subject") -> Tensor:
        assert self.segmenter is not None
        wanted = {source: inputs[source] for source in self.segmenter.sources}
        return self.segmenter.segment(wanted, **self._around(REAL, self.segmenter, subject)).labels

    def _around(self, name: str, method: Any, subject: "_Subject") -> dict[str, Any]:
        """What a wrapped network is told. Estimators see the volume: Search compares it with training volumes."""
        if name not in self.boxes or not isinstance(method, nn.Module):
            return {}
        known = self.subjects.get(subject.id)
        return {"box": self.boxes[name](subject.brain_box, subject.brain.shape[1:], known.site if known else None)}

    def _synthesize(self, name: str, subject: "_Subject") -> Synthesis:
        """Whatever was judged before, and on whichever rank, dropout draws the same for this subject and row."""
        synthesizer = self.synthesizers[name]
        inputs = {source: subject.views[name][source] for source in synthesizer.sources}
        with torch.random.fork_rng({volume.device for volume in inputs.values() if volume.is_cuda}):
            torch.manual_seed(zlib.crc32(f"{self.seed}/{subject.id}/{name}".encode()))
            try:
                synthesis = synthesizer.synthesize(inputs, **self._around(name, synthesizer, subject))
            except UserError as error:  # of an estimator: a scan that nothing can be made from
                raise UserError(f"{subject.id}, {name}: {error}") from error
        if not torch.isfinite(synthesis.mean[subject.brain[:, None]]).all():
            raise UserError(f"{subject.id}: {name} made NaN or infinite voxels; judge without it, or train it longer")
        return synthesis

    def _overlap(self, predicted: Tensor, reference: Tensor, batch: Batch) -> dict[str, float]:
        """Dice and HD95 of two label maps (1, X, Y, Z)."""
        maps = predicted[0], reference[0], self.regions
        values = {f"dice_{region}": value for region, value in region_dice(*maps).items()}
        for region, both in region_hd95_directed(*maps, batch["spacing"][0].tolist()).items():
            values |= {f"hd95_{region}": max(both), f"hd95_mean_{region}": sum(both) / 2}
        return values

    def _uncertainty(self, name: str, subject: "_Subject", images: Mapping[str, Tensor]) -> dict[str, float]:
        """What a variance says and whether it ranks the errors; its bins are kept."""
        brain, variance = subject.brain[0], images["variance"][0, 0]
        error = (images["synthetic"] - images["real"])[0, 0]
        bins = calibration_bins(variance, error.square(), brain, bins=BINS)
        columns = zip(("variance", "squared_error", "voxels"), bins, strict=True)
        values = {key: column.tolist() for key, column in columns}
        self.calibration += [
            {"subject": subject.id, "input": name, "bin": i, **{key: values[key][i] for key in values}}
            for i in range(BINS)
        ]
        return {
            "variance_brain": float(variance[brain].mean(dtype=torch.float64)),
            "variance_tumour": float(variance[subject.tumour[0]].mean(dtype=torch.float64)),  # nan without a tumour
            "rank_correlation": rank_correlation(variance, error.abs(), brain),
        }

    def _keep(self, name: str, subject: "_Subject", predicted: Tensor | None, images: Mapping[str, Tensor]) -> None:
        """Keeps the axial slice with the largest lesion of the pictured subject, or most brain where it has none."""
        if subject.id != self.pictured:
            return
        shown = subject.tumour[0] if subject.tumour.any() else subject.brain[0]
        z = int(shown.sum(dim=(0, 1)).argmax())
        (x0, x1), (y0, y1), _ = bounding_box(subject.brain[0].cpu().numpy())
        there = slice(max(x0 - FRAME, 0), x1 + FRAME), slice(max(y0 - FRAME, 0), y1 + FRAME), z
        kept: dict[str, Any] = {key: image[0, 0][there].cpu() for key, image in images.items()}
        if subject.labelled:
            kept["label"] = subject.batch["label"][0][there].cpu()
        if predicted is not None:
            kept["predicted"] = predicted[0][there].cpu()
        if "variance" in images:
            error = (images["synthetic"] - images["real"]).abs()
            generator = torch.Generator().manual_seed(self.seed)
            inside = [image[0, 0][subject.brain[0]].cpu() for image in (images["variance"], error)]  # (voxels,) each
            chosen = torch.randperm(len(inside[0]), generator=generator)[:VOXELS]
            kept["voxels"] = {"variance": inside[0][chosen], "error": inside[1][chosen]}
        self.slices[name] = kept

    def on_test_epoch_end(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.rows, self.calibration, self.slices))
        self.rows = sorted((row for rows, _, _ in parts for row in rows), key=lambda row: row["subject"])
        self.calibration = sorted((row for _, rows, _ in parts for row in rows), key=lambda row: row["subject"])
        self.slices = {name: kept for _, _, slices in parts for name, kept in slices.items()}


def _quality(synthetic: Tensor, real: Tensor, brain: Tensor, tumour: Tensor) -> dict[str, float]:
    """Errors of a synthesis, all (X, Y, Z)."""
    # One range a subject for all methods: that of its real sequence within the brain.
    data_range = float(real[brain].max() - real[brain].min())
    values = {}
    for where, mask in (("brain", brain), ("tumour", tumour)):
        values[f"mse_{where}"] = mse(synthetic, real, mask)
        values[f"mae_{where}"] = mae(synthetic, real, mask)
        values[f"psnr_{where}"] = psnr(synthetic, real, mask, data_range=data_range)
        values[f"ssim_{where}"] = ssim(synthetic, real, mask, data_range=data_range)
    return values
