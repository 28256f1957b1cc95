"""What lets the methods meet: the small protocols that every synthesis or segmentation system answers.

Volumes travel as a mapping from sequence name to a tensor (B, 1, X, Y, Z), float32, in the scale of the method's own
normalisation. Nothing here imports mrgen.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Generated", "Generator", "LabelMaps", "Segmentation", "Segmenter", "Synthesis", "Synthesizer", "Volumes"]

Volumes = Mapping[str, Tensor]


@dataclass(frozen=True)
class Synthesis:
    """A synthesised sequence.

    Attributes:
        mean: (B, 1, X, Y, Z), the synthesis.
        variance: the same shape, the variance over Monte Carlo samples, or None where the method has none.
        scale: what the numbers are, the name of a normalisation (``zscore`` …). Two methods share a scale when the
            names are equal.
    """

    mean: Tensor
    variance: Tensor | None
    scale: str


@dataclass(frozen=True)
class Segmentation:
    """A segmentation.

    Attributes:
        labels: (B, X, Y, Z) int64, the most probable class.
        probabilities: (B, C, X, Y, Z), sum to 1 over C.
    """

    labels: Tensor
    probabilities: Tensor


@runtime_checkable
class Synthesizer(Protocol):
    """Makes ``targets`` from ``sources``."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def synthesize(self, volumes: Volumes) -> Synthesis: ...


@runtime_checkable
class Segmenter(Protocol):
    """Labels every voxel from ``sources``."""

    sources: tuple[str, ...]

    def segment(self, volumes: Volumes) -> Segmentation: ...


@dataclass(frozen=True)
class LabelMaps:
    """What a generator is given of one subject, whose lesion may have been manipulated.

    Attributes:
        label: (Z, X, Y) int64, mapped classes, axial slices one after the other; 255 where ignored.
        brain: (Z, X, Y) bool.
        guides: by name (``atlas``, ``tissue``) what tells of its anatomy, (Z, n, X, Y) float32 each.
    """

    label: Tensor
    brain: Tensor
    guides: Mapping[str, Tensor]


@dataclass(frozen=True)
class Generated:
    """One synthetic subject.

    Attributes:
        image: (Z, C, X, Y) float32, in the generator's ``scale``, all sequences registered.
        label: (Z, X, Y) int64, as of ``LabelMaps``.
        brain: (Z, X, Y) bool.
        structure: (Z, X, Y) bool, the structure maps that it was made from; None of a generator without any.
        records: what a generator that filters what it makes tells of each slice, in plain containers.
        filters: what it tells of the subject: how much it drew and how much of that each filter left.
    """

    image: Tensor
    label: Tensor
    brain: Tensor
    structure: Tensor | None = None
    records: Sequence[Mapping[str, Any]] = ()
    filters: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Generator(Protocol):
    """Makes whole subjects: ``generate`` yields one at a time, all of its ``modalities`` registered.

    Attributes:
        modalities: the channels of its images, in order.
        guides: what it needs beside labels, the names of ``LabelMaps.guides``.
        scale: what the numbers are, the name of a normalisation.
    """

    modalities: tuple[str, ...]
    guides: tuple[str, ...]
    scale: str

    def generate(self, labels: Iterable[LabelMaps], seed: int) -> Iterator[Generated]: ...
