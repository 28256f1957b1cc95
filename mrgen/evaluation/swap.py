"""The swap: replace one real sequence by its synthesis and see what a frozen segmenter makes of it (RS-Net, section 3).

The segmenter is never retrained on synthetic data, so that its loss of Dice measures the synthesis.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from mrgen.data.batch import IGNORED, Batch, volumes
from mrgen.metrics.reconstruction import mae, mse, psnr, ssim
from mrgen.metrics.segmentation import region_dice, region_hd95
from mrgen.metrics.uncertainty import calibration_bins, rank_correlation
from mrgen.protocols import Segmenter, Synthesis, Synthesizer, Volumes

__all__ = ["REAL", "Swap"]

REAL = "real"
BINS = 20  # of the calibration
VOXELS = 5000  # of the pictured subject, for a scatter plot


class Swap(LightningModule):
    """Runs under ``Trainer.test``, after which ``rows``, ``calibration`` and ``slices`` are complete.

    Under several devices every subject is computed on one rank alone, and the rows of all ranks come together.

    Args:
        segmenter: frozen.
        synthesizers: by row name, ``target/method``. Their scale is that of the segmenter's inputs: a synthesis
            enters as it is, because re-normalising it by its own statistics would hide its bias.
        modalities: the batch's sequences.
        regions: evaluation regions and their classes.
        pictured: id of the subject whose slices are kept for the figures.
        seed: with subject and row name it seeds what a synthesizer draws.

    Attributes:
        rows: one a subject and input set: ``subject``, ``input``, ``dice_REGION`` (0 to 1) and ``hd95_REGION`` (mm). Of
            a synthesis also ``mse``, ``mae``, ``psnr`` and ``ssim``, each ``_brain`` and ``_tumour``, and where it has
            a variance ``variance_brain``, ``variance_tumour`` (means) and ``rank_correlation`` (Spearman's, of variance
            and absolute error in the brain). A subject without lesion has nan in it.
        calibration: one a subject, synthesis with a variance, and bin: ``subject``, ``input``, ``bin``, ``variance``,
            ``squared_error``, ``voxels``; see ``calibration_bins``.
        slices: of the pictured subject, by row name: ``label`` and ``predicted`` (X, Y); of a synthesis ``real`` and
            ``synthetic`` (X, Y); with a variance ``variance`` (X, Y) and ``voxels``, the ``variance`` and absolute
            ``error`` (N,) of up to 5000 brain voxels.
    """

    def __init__(
        self,
        *,
        segmenter: Segmenter,
        synthesizers: Mapping[str, Synthesizer],
        modalities: Sequence[str],
        regions: Mapping[str, Sequence[int]],
        pictured: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.segmenter, self.synthesizers = segmenter, dict(synthesizers)
        # Registered so that Lightning moves the networks; estimators without parameters stay out.
        models = [segmenter, *self.synthesizers.values()]
        self.networks = nn.ModuleList(model for model in models if isinstance(model, nn.Module))
        self.networks.eval().requires_grad_(False)
        self.modalities, self.regions, self.pictured, self.seed = tuple(modalities), dict(regions), pictured, seed
        self.rows: list[dict[str, Any]] = []
        self.calibration: list[dict[str, Any]] = []
        self.slices: dict[str, dict[str, Any]] = {}

    def on_test_epoch_start(self) -> None:
        self.rows, self.calibration, self.slices = [], [], {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        real, brain, subject = volumes(batch, self.modalities), batch["brain"], batch["subject"][0]
        tumour = (batch["label"] > 0) & (batch["label"] != IGNORED)
        predicted = self._segment(real)
        self.rows.append({"subject": subject, "input": REAL, **self._overlap(predicted, batch)})
        self._keep(REAL, batch, predicted, {})
        for name, synthesizer in self.synthesizers.items():
            target = synthesizer.targets[0]
            synthesis = self._synthesize(name, subject, real)
            # Background is 0 in this scale; the mask is the prepared one, to which all sequences of the subject voted.
            images = {"real": real[target], "synthetic": synthesis.mean.float() * brain[:, None]}
            predicted = self._segment({**real, target: images["synthetic"]})
            row = {"subject": subject, "input": name, **self._overlap(predicted, batch)}
            row |= _quality(images["synthetic"][0, 0], real[target][0, 0], brain[0], tumour[0])
            if synthesis.variance is not None:
                images["variance"] = synthesis.variance.float() * brain[:, None]
                error = images["synthetic"] - images["real"]
                row |= _uncertainty(images["variance"][0, 0], error[0, 0], brain[0], tumour[0])
                bins = calibration_bins(images["variance"][0, 0], error[0, 0].square(), brain[0], bins=BINS)
                columns = zip(("variance", "squared_error", "voxels"), bins, strict=True)
                values = {key: column.tolist() for key, column in columns}
                self.calibration += [
                    {"subject": subject, "input": name, "bin": i, **{key: values[key][i] for key in values}}
                    for i in range(BINS)
                ]
            self.rows.append(row)
            self._keep(name, batch, predicted, images)

    def _segment(self, inputs: Volumes) -> Tensor:
        return self.segmenter.segment({source: inputs[source] for source in self.segmenter.sources}).labels

    def _synthesize(self, name: str, subject: str, real: Volumes) -> Synthesis:
        """Whatever was judged before, and on whichever rank, dropout draws the same for this subject and row."""
        synthesizer = self.synthesizers[name]
        inputs = {source: real[source] for source in synthesizer.sources}
        with torch.random.fork_rng({volume.device for volume in inputs.values() if volume.is_cuda}):
            torch.manual_seed(zlib.crc32(f"{self.seed}/{subject}/{name}".encode()))
            return synthesizer.synthesize(inputs)

    def _overlap(self, predicted: Tensor, batch: Batch) -> dict[str, float]:
        maps = predicted[0], batch["label"][0], self.regions
        dice, distances = region_dice(*maps), region_hd95(*maps, batch["spacing"][0].tolist())
        values = {f"dice_{region}": value for region, value in dice.items()}
        return values | {f"hd95_{region}": value for region, value in distances.items()}

    def _keep(self, name: str, batch: Batch, predicted: Tensor, images: Mapping[str, Tensor]) -> None:
        """Keeps the axial slice with the largest lesion of the pictured subject, the middle one where it has none."""
        if batch["subject"][0] != self.pictured:
            return
        label = batch["label"][0]
        lesion = (label > 0) & (label != IGNORED)
        z = int(lesion.sum(dim=(0, 1)).argmax()) if lesion.any() else lesion.shape[2] // 2
        kept: dict[str, Any] = {"label": label[:, :, z].cpu(), "predicted": predicted[0, :, :, z].cpu()}
        kept |= {key: image[0, 0, :, :, z].cpu() for key, image in images.items()}
        if "variance" in images:
            error = (images["synthetic"] - images["real"]).abs()
            generator = torch.Generator().manual_seed(self.seed)
            inside = [image[0, 0][batch["brain"][0]].cpu() for image in (images["variance"], error)]  # (voxels,) each
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


def _uncertainty(variance: Tensor, error: Tensor, brain: Tensor, tumour: Tensor) -> dict[str, float]:
    """What a variance says and whether it ranks the errors, all (X, Y, Z)."""
    return {
        "variance_brain": float(variance[brain].mean(dtype=torch.float64)),
        "variance_tumour": float(variance[tumour].mean(dtype=torch.float64)),  # nan without a tumour
        "rank_correlation": rank_correlation(variance, error.abs(), brain),
    }
