"""Whole volumes for networks that were trained on patches."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mrgen.protocols import Segmentation, Segmenter, Synthesis, Synthesizer, Volumes

__all__ = ["TiledSegmenter", "TiledSynthesizer"]


class TiledSynthesizer(nn.Module):
    """A synthesizer that sees a volume in overlapping tiles of the size it was trained on.

    Instance norms take their statistics from what they see; on a whole brain they would see others than in training.

    Args:
        model: a module that answers ``Synthesizer``.
        tile: voxels along x, y, z.
    """

    def __init__(self, model: nn.Module, tile: Sequence[int]):
        super().__init__()
        self.model, self.tile = model, tuple(tile)
        synthesizer = cast(Synthesizer, model)
        self.sources, self.targets = synthesizer.sources, synthesizer.targets

    @torch.no_grad()
    def synthesize(self, volumes: Volumes) -> Synthesis:
        """As ``Synthesizer.synthesize``; the variance is not tiled."""
        scale = ""

        def predict(x: Tensor) -> Tensor:
            nonlocal scale
            part = cast(Synthesizer, self.model).synthesize(_apart(x, self.sources))
            scale = part.scale
            return part.mean.float()

        return Synthesis(mean=_slide(volumes, self.sources, self.tile, predict), variance=None, scale=scale)


class TiledSegmenter(nn.Module):
    """A segmenter that sees a volume in overlapping tiles of the size it was trained on; see ``TiledSynthesizer``."""

    def __init__(self, model: nn.Module, tile: Sequence[int]):
        super().__init__()
        self.model, self.tile = model, tuple(tile)
        self.sources = cast(Segmenter, model).sources

    @torch.no_grad()
    def segment(self, volumes: Volumes) -> Segmentation:
        """As ``Segmenter.segment``: the tiles' probabilities are averaged."""

        def predict(x: Tensor) -> Tensor:
            return cast(Segmenter, self.model).segment(_apart(x, self.sources)).probabilities.float()

        probabilities = _slide(volumes, self.sources, self.tile, predict)
        return Segmentation(labels=probabilities.argmax(dim=1), probabilities=probabilities)


def _apart(x: Tensor, sources: Sequence[str]) -> dict[str, Tensor]:
    return {name: x[:, i : i + 1] for i, name in enumerate(sources)}


def _slide(volumes: Volumes, sources: Sequence[str], tile: Sequence[int], predict) -> Tensor:
    from monai.inferers import sliding_window_inference

    x = torch.cat([volumes[name] for name in sources], dim=1)  # (B, sources, X, Y, Z)
    return cast(Tensor, sliding_window_inference(x, tile, 1, predict, overlap=0.25, mode="gaussian"))
