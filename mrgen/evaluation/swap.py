"""The swap: replace one real sequence by its synthesis and see what a frozen segmenter makes of it (RS-Net, section 3).

The segmenter is never retrained on synthetic data, so that its loss of Dice measures the synthesis.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from mrgen.data.batch import IGNORED, Batch, volumes
from mrgen.evaluation.table import Table
from mrgen.metrics.reconstruction import mse, psnr, ssim
from mrgen.metrics.segmentation import region_dice
from mrgen.protocols import Segmenter, Synthesizer

__all__ = ["REAL", "Swap", "swap_table"]

REAL = "real"
QUALITY = ("mse", "psnr", "ssim")


class Swap(LightningModule):
    """Runs under ``Trainer.test``; afterwards ``rows`` (one a subject and input set) and ``slices`` are complete.

    Under several devices every subject is computed on one rank alone, and the rows of all ranks come together.

    Args:
        segmenter: frozen.
        synthesizers: by row name, ``target/method``. Their scale is that of the segmenter's inputs: a synthesis
            enters as it is, because re-normalising it by its own statistics would hide its bias.
        modalities: the batch's sequences.
        regions: evaluation regions and their classes.
        pictured: id of the subject whose slices are kept for the figure.
    """

    def __init__(
        self,
        *,
        segmenter: Segmenter,
        synthesizers: Mapping[str, Synthesizer],
        modalities: Sequence[str],
        regions: Mapping[str, Sequence[int]],
        pictured: str | None = None,
    ):
        super().__init__()
        self.segmenter, self.synthesizers = segmenter, dict(synthesizers)
        # Registered so that Lightning moves the networks; estimators without parameters stay out.
        models = [segmenter, *self.synthesizers.values()]
        self.networks = nn.ModuleList(model for model in models if isinstance(model, nn.Module))
        self.networks.eval().requires_grad_(False)
        self.modalities, self.regions, self.pictured = tuple(modalities), dict(regions), pictured
        self.rows: list[dict[str, Any]] = []
        self.slices: dict[str, dict[str, Any]] = {}

    def on_test_epoch_start(self) -> None:
        self.rows, self.slices = [], {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        real = volumes(batch, self.modalities)
        label, brain, subject = batch["label"], batch["brain"], batch["subject"][0]
        tumour = (label > 0) & (label != IGNORED)
        predicted = self._segment(real)
        self.rows.append({"subject": subject, "input": REAL, **self._dice(predicted, label)})
        self._keep(subject, REAL, None, label, predicted)
        for name, synthesizer in self.synthesizers.items():
            target = synthesizer.targets[0]
            synthesis = synthesizer.synthesize({source: real[source] for source in synthesizer.sources})
            # Background is 0 in this scale; the mask is the prepared one, to which all sequences of the subject voted.
            mean = synthesis.mean.float() * brain[:, None]
            predicted = self._segment({**real, target: mean})
            row = {"subject": subject, "input": name, **self._dice(predicted, label)}
            # One range a subject for all methods: that of its real sequence within the brain.
            inside = real[target][:, 0][brain]
            data_range = float(inside.max() - inside.min())
            for where, mask in (("brain", brain), ("tumour", tumour)):
                pair = mean[0], real[target][0]
                row[f"mse_{where}"] = mse(*pair, mask)
                row[f"psnr_{where}"] = psnr(*pair, mask, data_range=data_range)
                row[f"ssim_{where}"] = ssim(*pair, mask, data_range=data_range)
            self.rows.append(row)
            self._keep(subject, name, (real[target], mean), label, predicted)

    def _segment(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.segmenter.segment({source: inputs[source] for source in self.segmenter.sources}).labels

    def _dice(self, predicted: Tensor, label: Tensor) -> dict[str, float]:
        return {f"dice_{region}": value for region, value in region_dice(predicted, label, self.regions).items()}

    def _keep(
        self, subject: str, name: str, pair: tuple[Tensor, Tensor] | None, label: Tensor, predicted: Tensor
    ) -> None:
        """Keeps the axial slice with the largest lesion of the pictured subject, the middle one where it has none."""
        if subject != self.pictured:
            return
        lesion = (label[0] > 0) & (label[0] != IGNORED)
        z = int(lesion.sum(dim=(0, 1)).argmax()) if lesion.any() else lesion.shape[2] // 2
        self.slices[name] = {"label": label[0, :, :, z].cpu(), "predicted": predicted[0, :, :, z].cpu()}
        if pair is not None:
            self.slices[name] |= {"real": pair[0][0, 0, :, :, z].cpu(), "synthetic": pair[1][0, 0, :, :, z].cpu()}

    def on_test_epoch_end(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.rows, self.slices))
        self.rows = sorted((row for rows, _ in parts for row in rows), key=lambda row: row["subject"])
        self.slices = {name: kept for _, slices in parts for name, kept in slices.items()}


def swap_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    regions: Sequence[str],
    title: str,
    paper: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Table:
    """Means over subjects, the paper's numbers beside them.

    Args:
        rows: of ``Swap``.
        regions: the Dice columns, in the paper's order.
        title: of the table.
        paper: ``title`` and ``rows`` by input name, each the Dice (%) of ``regions``.
        notes: below the table.
    """
    printed = dict((paper or {}).get("rows", {}))
    quality = [f"{metric}_{where}" for where in ("brain", "tumour") for metric in QUALITY]
    columns = ["synthesised", "by", *(f"Dice {region}" for region in regions)]
    columns += [f"paper {region}" for region in regions] if printed else []
    columns += [
        name.replace("mse", "MSE").replace("psnr", "PSNR").replace("ssim", "SSIM").replace("_", " ") for name in quality
    ]
    table = Table(title, columns)
    names = dict.fromkeys(str(row["input"]) for row in rows)
    for name in names:
        mine = [row for row in rows if row["input"] == name]
        target, _, method = name.partition("/")
        cells = ["–", "all real"] if name == REAL else [target, method]
        cells += [f"{100 * _mean(mine, f'dice_{region}'):.1f}" for region in regions]
        if printed:
            # A repeated method carries a running number; the paper has one row for it.
            cells += [f"{value:.1f}" for value in printed.get(name.partition("#")[0], ())] or ["–"] * len(regions)
        for metric in quality:
            cells.append("–" if name == REAL else f"{_mean(mine, metric):.{1 if 'psnr' in metric else 3}f}")
        table.rows.append(cells)
    count = len({row["subject"] for row in rows})
    table.notes = [
        f"Mean over {count} subject{'s' * (count != 1)}. Dice in %; a region empty in both maps scores 100, in one 0.",
        "MSE, PSNR (dB), SSIM on the segmenter's input scale; data range: the real sequence's in the subject's brain.",
        *([f"Paper: {paper['title']}."] if printed and paper else []),
        *notes,
    ]
    return table


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    values = torch.tensor([cast(float, row[key]) for row in rows], dtype=torch.float64)
    return float(values.nanmean())  # a subject without lesion has no MSE in it
