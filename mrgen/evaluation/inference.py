"""Whole volumes through networks that see volumes, patches or slices, behind one function, ``infer``."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrgen.evaluation.memory import free_bytes, peak_bytes
from mrgen.protocols import Segmentation, Segmenter, Synthesis, Synthesizer, Volumes

__all__ = ["Box", "WholeSegmenter", "WholeSynthesizer", "infer"]

Box = Sequence[tuple[int, int]]  # (start, stop) of x, y, z; may exceed the volume
Predict = Callable[[Tensor], Tensor]

OVERLAP = 0.25  # of neighbouring patches


def infer(
    predict: Predict,
    image: Tensor,
    *,
    box: Box | None = None,
    tile: Sequence[int] = (0, 0, 0),
    divisor: int = 1,
    reach: int | None = None,
    margin: int = 0,
    fits: int | None = None,
    batch: int = 1,
    minimum: bool = False,
) -> Tensor:
    """The network's answer for a whole volume.

    A network that was trained on whole volumes makes one pass over the box. Where that does not fit into memory it is
    cut into tiles: exactly, each with the ``reach`` around it that its voxels depend on, or, for networks whose norms
    look at the whole sample and which therefore cannot agree with one pass, overlapping and blended. A network that was
    trained on patches sees patches of that size, overlapping and blended; one that was trained on slices sees slices.

    Args:
        predict: (B, C, x, y, z) to (B, C', x, y, z), or (B, C, a, b) to (B, C', a, b) for slices.
        image: (B, C, X, Y, Z).
        box: what is computed, such as the brain's box; what exceeds the volume is padded, and the answer is 0 outside
            it. Default: the volume.
        tile: voxels along x, y, z that the network was trained to see; 0 is the whole axis, and one axis of 1 makes
            slices.
        divisor: what every axis that the network sees must be a multiple of; padded with 0 where it is not.
        reach: how many voxels away an input can still change an output, or None where there is no such bound.
        margin: voxels with which ``predict`` surrounds what it is given, on each side.
        fits: the most voxels that a pass may have, margins included; None is no limit.
        batch: patches or slices of one pass.
        minimum: what exceeds the volume is padded with each channel's least value and not with 0.

    Returns:
        (B, C', X, Y, Z) float32.
    """
    if len(tile) != 3 or list(tile).count(1) > 1 or any(n < 0 for n in tile):
        raise ValueError(f"tile is {tuple(tile)}; expected voxels along x, y, z, 0 for a whole axis, 1 for at most one")
    x = image
    if box is not None:
        x = _crop(image, box)
        if minimum:
            inside = _crop(torch.ones_like(image[:1, :1], dtype=torch.bool), box)  # (1, 1, x, y, z)
            x = torch.where(inside, x, image.amin((2, 3, 4), keepdim=True))
    if 1 in tile:
        axis = list(tile).index(1)
        size = [n for i, n in enumerate(tile) if i != axis]
        slices = x.movedim(2 + axis, 1).flatten(0, 1)  # (B · slices, C, a, b)
        parts = [_pass(predict, part, size, divisor, None, margin, fits, 1) for part in slices.split(batch)]
        answer = torch.cat(parts).unflatten(0, (x.shape[0], -1)).movedim(1, 2 + axis)
    else:
        answer = _pass(predict, x, tile, divisor, reach, margin, fits, batch)
    if box is None:
        return answer
    # Back to the volume: a crop by the box that the volume is, seen from the crop.
    return _crop(answer, [(-start, size - start) for (start, _), size in zip(box, image.shape[2:], strict=True)])


def _crop(x: Tensor, box: Box) -> Tensor:
    """(B, C, X, Y, Z) cut to the box, 0 where it exceeds the volume."""
    ends = [(-start, stop - size) for (start, stop), size in zip(box, x.shape[2:], strict=True)]
    return F.pad(x, [n for pair in reversed(ends) for n in pair])  # a negative pad cuts


def _pass(
    predict: Predict,
    x: Tensor,
    tile: Sequence[int],
    divisor: int,
    reach: int | None,
    margin: int,
    fits: int | None,
    batch: int,
) -> Tensor:
    """(B, C, *space) to (B, C', *space): one pass, or tiles."""
    space = x.shape[2:]
    padded = F.pad(x, [n for size in reversed(space) for n in (0, -size % divisor)])
    if not any(tile):
        if fits is None or _product([n + 2 * margin for n in padded.shape[2:]]) <= fits:
            answer = predict(padded).float()
        elif reach is not None:
            answer = _exact_tiles(predict, padded, divisor, reach, margin, fits)
        else:
            answer = _blended_tiles(predict, padded, _side(padded.shape[2:], divisor, fits), batch=1)
    else:
        size = [n or whole for n, whole in zip(tile, padded.shape[2:], strict=True)]
        answer = _blended_tiles(predict, padded, size, batch)
    cut: tuple[Any, ...] = (..., *(slice(n) for n in space))
    return answer[cut]


def _side(space: Sequence[int], divisor: int, fits: int) -> list[int]:
    """The largest tile that fits, as near to a cube as the volume allows; at least one ``divisor`` along an axis."""
    tile = [divisor] * len(space)
    while growing := [axis for axis, n in enumerate(tile) if n < space[axis]]:
        axis = min(growing, key=lambda axis: tile[axis])
        larger = [n + divisor * (i == axis) for i, n in enumerate(tile)]
        if _product(larger) > fits:
            break
        tile = larger
    return tile


def _blended_tiles(predict: Predict, x: Tensor, tile: Sequence[int], batch: int) -> Tensor:
    from monai.inferers import sliding_window_inference

    def as_float(part: Tensor) -> Tensor:
        return predict(part).to(torch.float32, copy=True)  # MONAI weighs it in place, and it may be the input itself

    return cast(Tensor, sliding_window_inference(x, tile, batch, as_float, overlap=OVERLAP, mode="gaussian"))


def _exact_tiles(predict: Predict, x: Tensor, divisor: int, reach: int, margin: int, fits: int) -> Tensor:
    """Tiles that are computed with all that their voxels depend on, and then cut free of it."""
    halo = -(-reach // divisor) * divisor  # pooling must fall on the same voxels as in one pass
    space = x.shape[2:]
    parts = [1] * len(space)  # along every axis

    def core(axis: int) -> int:
        return -(-space[axis] // (parts[axis] * divisor)) * divisor

    def seen(axis: int) -> int:
        return min(core(axis) + 2 * halo, space[axis])

    while _product([seen(axis) + 2 * margin for axis in range(len(space))]) > fits:
        cut = [axis for axis in range(len(space)) if core(axis) > divisor]
        if not cut:
            break  # the smallest there is
        parts[max(cut, key=core)] += 1
    answer: Tensor | None = None
    starts = torch.cartesian_prod(*(torch.arange(0, space[a], core(a)) for a in range(len(space)))).tolist()
    for start in starts:
        stop = [min(a + core(axis), space[axis]) for axis, a in enumerate(start)]
        low = [max(a - halo, 0) for a in start]
        high = [min(b + halo, n) for b, n in zip(stop, space, strict=True)]
        seen_by_it: tuple[Any, ...] = (..., *map(slice, low, high))
        part = predict(x[seen_by_it]).float()
        if answer is None:
            answer = x.new_empty((part.shape[0], part.shape[1], *space), dtype=torch.float32)
        inside: tuple[Any, ...] = (..., *(slice(a - i, b - i) for a, b, i in zip(start, stop, low, strict=True)))
        place: tuple[Any, ...] = (..., *map(slice, start, stop))
        answer[place] = part[inside]
    assert answer is not None
    return answer


def _product(numbers: Sequence[int]) -> int:
    product = 1
    for n in numbers:
        product *= n
    return product


class _Whole(nn.Module):
    """A method and how it is to see a volume.

    Args:
        model: answers ``Synthesizer`` or ``Segmenter``; networks may say their ``divisor`` and ``reach``, a ``grid`` of
            which tiles must be multiples where it is not the divisor, a ``margin`` that they surround volumes with, and
            that they want volumes padded with their minimum (``pads_with_minimum``).
        tile: what the method was trained to see, as in ``infer``; None is the whole volume.
        batch: patches or slices of one pass.

    Attributes:
        tiled: whether memory was too short for one pass, so that an answer came from tiles that differ from it.
    """

    def __init__(self, model: Any, tile: Sequence[int] | None = None, batch: int = 1):
        super().__init__()
        self.model, self.tile, self.batch = model, tuple(tile or (0, 0, 0)), batch
        self.sources = tuple(model.sources)
        grid = getattr(model, "grid", None)
        self.divisor = int(getattr(model, "divisor", 1) if grid is None else grid)
        self.margin = int(getattr(model, "margin", 0))
        self.tiled = False
        self._bytes_a_voxel: float | None = None

    def _infer(self, predict: Callable[[object, Tensor], Tensor], volumes: Volumes, box: Box | None) -> Tensor:
        x = torch.cat([volumes[name] for name in self.sources], dim=1)  # (B, sources, X, Y, Z)
        reach = getattr(self.model, "reach", None)
        fits = self._fits(predict, x) if isinstance(self.model, nn.Module) and not any(self.tile) else None
        sides = x.shape[2:] if box is None else [stop - start for start, stop in box]
        needed = _product([side + -side % self.divisor for side in sides])
        if fits is not None and needed > fits and reach is None:
            if not self.tiled:
                warnings.warn(
                    f"{type(self.model).__name__} sees {needed:,} voxels in tiles, because memory is free for {fits:,} "
                    "at once; its norms look at the whole sample, so that the answer differs from one pass",
                    stacklevel=2,
                )
            self.tiled = True
        return infer(
            lambda part: predict(self.model, part),
            x,
            box=box,
            tile=self.tile,
            divisor=self.divisor,
            reach=reach,
            margin=self.margin,
            fits=fits,
            batch=self.batch,
            minimum=getattr(self.model, "pads_with_minimum", False),
        )

    def _fits(self, predict: Callable[[object, Tensor], Tensor], x: Tensor) -> int | None:
        """How many voxels a pass may have in the memory that is free now, margins included; None where nobody knows."""
        free = free_bytes(x.device)
        if free is None:
            return None
        if self._bytes_a_voxel is None:
            side = 4 * self.divisor + 8 * self.margin  # enough that the margin, which is little but input, is not most
            model = copy.deepcopy(cast(nn.Module, self.model)).to("meta")
            probe = torch.empty(x.shape[0], x.shape[1], side, side, side, device="meta")
            self._bytes_a_voxel = peak_bytes(lambda: predict(model, probe)) / (side + 2 * self.margin) ** 3
        return int(free / self._bytes_a_voxel) if self._bytes_a_voxel else None


class WholeSynthesizer(_Whole):
    """A synthesizer that is given whole volumes, whatever its network was trained to see."""

    def __init__(self, model: Synthesizer, tile: Sequence[int] | None = None, batch: int = 1):
        super().__init__(model, tile, batch)
        self.targets = tuple(model.targets)

    @torch.no_grad()
    def synthesize(self, volumes: Volumes, box: Box | None = None) -> Synthesis:
        """As ``Synthesizer.synthesize``; 0 outside the box. Blended tiles blend the variance like the mean."""
        scale = ""

        def predict(model: object, x: Tensor) -> Tensor:
            nonlocal scale
            part = cast(Synthesizer, model).synthesize(_apart(x, self.sources))
            scale = part.scale
            return part.mean if part.variance is None else torch.cat([part.mean, part.variance], dim=1)

        answer = self._infer(predict, volumes, box)  # (B, 1 or 2, X, Y, Z)
        return Synthesis(mean=answer[:, :1], variance=answer[:, 1:] if answer.shape[1] == 2 else None, scale=scale)


class WholeSegmenter(_Whole):
    """A segmenter that is given whole volumes, whatever its network was trained to see."""

    @torch.no_grad()
    def segment(self, volumes: Volumes, box: Box | None = None) -> Segmentation:
        """As ``Segmenter.segment``: the tiles' probabilities are blended. Background outside the box."""

        def predict(model: object, x: Tensor) -> Tensor:
            return cast(Segmenter, model).segment(_apart(x, self.sources)).probabilities

        probabilities = self._infer(predict, volumes, box)  # (B, classes, X, Y, Z)
        if box is not None:
            probabilities[:, 0] += probabilities.sum(dim=1) == 0
        return Segmentation(labels=probabilities.argmax(dim=1), probabilities=probabilities)


def _apart(x: Tensor, sources: Sequence[str]) -> dict[str, Tensor]:
    return {name: x[:, i : i + 1] for i, name in enumerate(sources)}
