"""One scan under two names: the same voxels are found whatever folders and ids say.

A copy called `X (1)` is a patient of its own to a split, and would be tested while `X` trains. A single sequence that
two subjects share is enough: one of the two has somebody else's scan.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrgen.data.stored_subject import IMAGE, StoredSubject

__all__ = ["Scan", "scan_of", "twins"]

_STATISTICS = ("min", "max", "mean", "std", "q1", "q3", "p0_5", "p99_5", "volume_min", "volume_max")


@dataclass(frozen=True)
class Scan:
    """What tells one subject's voxels from another's.

    Attributes:
        name: as messages call it.
        voxels: by sequence, checksums; empty in stores from before they were recorded.
        statistics: by sequence, what is compared there: numbers of full precision over the whole brain.
    """

    name: str
    voxels: Mapping[str, str]
    statistics: Mapping[str, tuple[Any, ...]]


def scan_of(subject: StoredSubject, name: str | None = None) -> Scan:
    """Of a prepared subject.

    Args:
        subject: of any store.
        name: default: its id.
    """
    numbers = {
        modality: (subject.shape, *(values.get(key) for key in _STATISTICS))
        for modality, values in subject.statistics.items()
    }
    return Scan(name or subject.id, subject.checksums.get(IMAGE, {}), numbers)


def twins(scans: Iterable[Scan], others: Iterable[Scan] = ()) -> list[tuple[str, str, Sequence[str]]]:
    """Pairs of subjects that share a sequence.

    Args:
        scans: compared with `others`, or, without them, with one another.
        others: of other stores.

    Returns:
        Two names, the first of `scans`, and the sequences of the first that the second has as well. Of more than two
        alike, each with the first of them.
    """
    scans, others = list(scans), list(others)
    known: dict[Any, Scan] = {}
    for scan in others:
        for mark, _ in _marks(scan):
            known.setdefault(mark, scan)
    shared: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for scan in scans:
        for mark, modality in _marks(scan):
            first = known.get(mark) if others else known.setdefault(mark, scan)
            if first is None or first is scan or (mark[0] == "statistics" and scan.voxels and first.voxels):
                continue
            shared[scan.name, first.name][modality] = None
    return [(a, b, list(sequences)) for (a, b), sequences in shared.items()]


def _marks(scan: Scan) -> Iterable[tuple[tuple[str, Any], str]]:
    for modality, checksum in scan.voxels.items():
        yield ("voxels", checksum), modality
    for modality, numbers in scan.statistics.items():
        yield ("statistics", numbers), modality
