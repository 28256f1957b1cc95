"""What generators make of real and of manipulated label maps, slice by slice: numbers that describe, and their tables.

Nothing here says how useful a synthesis is: a generator that is given other anatomy than the slice's own may be far
from it and right. The lesion's contrast at least tells whether it has the signal that it should.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrgen.data.batch import IGNORED
from mrgen.data.guides import Guide, label_maps
from mrgen.data.lesions import enlarge, mirror, move, shrink, transplant
from mrgen.data.normalisation import Normalisation
from mrgen.data.slice_dataset import SliceDataset
from mrgen.data.slices import SiteSlices
from mrgen.data.store import StoredSubject
from mrgen.errors import UserError
from mrgen.evaluation.figures import SEQUENCES
from mrgen.evaluation.swap import REAL
from mrgen.evaluation.swap_tables import INTERVAL, Rows, cell, estimate, scores
from mrgen.evaluation.table import Table
from mrgen.metrics.reconstruction import mae
from mrgen.protocols import Generator, LabelMaps

__all__ = [
    "Method",
    "Reading",
    "manipulations",
    "most_lesion",
    "preference_reference",
    "sample_rows",
    "sample_summary",
    "sample_tables",
]

PLACES = {"mae_brain": "normal brain", "mae_lesion": "lesion"}


@dataclass(frozen=True)
class Reading:
    """Slices of a subject as training shows them.

    Attributes:
        modalities, lookup, normalisation: as of ``mrgen.data.dataset.CropDataset``.
        slices: which there are, and how they are cut.
    """

    modalities: tuple[str, ...]
    lookup: np.ndarray
    normalisation: Normalisation
    slices: SiteSlices

    def numbers(self, subject: StoredSubject) -> range:
        """Which of the subject's slices there are."""
        return self.slices.training(subject.shape, subject.site)

    def images(self, subject: StoredSubject) -> Tensor:
        """(Z, C, X, Y) float32, all of ``numbers``, normalised."""
        dataset = SliceDataset(
            [subject],
            slices=self.slices,
            modalities=self.modalities,
            lookup=self.lookup,
            normalisation=self.normalisation,
        )
        return torch.stack([dataset[0, 0, z]["image"] for z in range(len(dataset))])

    def maps(self, subject: StoredSubject, numbers: range, guides: Mapping[str, Guide] | None = None) -> LabelMaps:
        """Label, brain and guides of some of the subject's slices."""
        x, y, _ = self.slices.box(subject.shape, subject.site)
        box = (x, y, (numbers.start, numbers.stop))
        return label_maps(subject, box, self.lookup, guides or {}, numbers.step)


@dataclass(frozen=True)
class Method:
    """A generator on its device, and the guides that it was trained with."""

    generator: Generator
    guides: Mapping[str, Guide]
    device: torch.device

    def images(self, maps: Iterable[LabelMaps], seed: int) -> list[Tensor]:
        """(Z, C, X, Y) float32 of each label map, on the CPU."""

        def moved(part: LabelMaps) -> LabelMaps:
            guides = {name: guide.to(self.device) for name, guide in part.guides.items()}
            return LabelMaps(part.label.to(self.device), part.brain.to(self.device), guides)

        return [made.image.float().cpu() for made in self.generator.generate(map(moved, maps), seed)]


def most_lesion(label: Tensor) -> int:
    """Which of the slices (Z, X, Y) has the most lesion; 255 is none."""
    return int(_lesion(label).sum((1, 2)).argmax())


def manipulations(maps: LabelMaps, donor: np.ndarray | None, rng: np.random.Generator) -> dict[str, LabelMaps | str]:
    """The maps of the paper's Figure 3, in its order, and a lesion that moved, which its text names.

    Args:
        maps: of one slice.
        donor: (X, Y) classes of another patient's slice with a lesion, of the same voxel size; None: there is none.
        rng: draws places.

    Returns:
        By what was done; in place of a map why it is impossible for this slice.
    """
    label, brain = maps.label[0].numpy(), maps.brain[0].numpy()

    def transplanted() -> np.ndarray:
        if donor is None:
            raise UserError("no training subject with a lesion has this voxel size")
        return transplant(label, brain, donor, rng)

    ways = {
        "mirrored": lambda: mirror(label, brain),
        "enlarged to 200%": lambda: enlarge(label, brain),
        "another patient's": transplanted,
        "shrunk to 50%": lambda: shrink(label, brain),
        "moved": lambda: move(label, brain, rng),
    }
    made: dict[str, LabelMaps | str] = {}
    for name, way in ways.items():
        try:
            made[name] = replace(maps, label=torch.from_numpy(way())[None])
        except UserError as error:
            made[name] = str(error).removeprefix("lesions: ")
    return made


# ----- numbers -------------------------------------------------------------------------------------------------------


def sample_rows(
    subject: str,
    real: Tensor,
    made: Mapping[str, Tensor],
    maps: LabelMaps,
    *,
    modalities: Sequence[str],
    classes: Sequence[str],
) -> list[dict[str, Any]]:
    """One mapping a sequence and input: the real slices, and what each method made of their label maps.

    Args:
        subject: its id.
        real: (Z, C, X, Y) on the generators' scale.
        made: by method, the same shape and scale.
        maps: label and brain of these slices.
        modalities: the channels, in order.
        classes: of the label; the first is no lesion.

    Returns:
        ``subject``, ``input``, ``sequence``; of a method ``mae_brain`` and ``mae_lesion``, mean absolute errors in
        normal brain and in the lesion; ``contrast_CLASS``, the class's mean minus that of normal brain. Over all of
        the subject's slices; nan where there is no such voxel. Voxels of 255 are of neither.
    """
    brain, lesion = maps.brain & (maps.label == 0), _lesion(maps.label)
    rows = []
    for channel, sequence in enumerate(modalities):
        for name, images in {REAL: real, **made}.items():
            image = images[:, channel]  # (Z, X, Y)
            row: dict[str, Any] = {"subject": subject, "input": name, "sequence": sequence}
            if name != REAL:
                row["mae_brain"] = mae(image, real[:, channel], brain)
                row["mae_lesion"] = mae(image, real[:, channel], lesion)
            for number, kind in enumerate(classes[1:], start=1):
                row[_contrast(kind)] = float(image[maps.label == number].mean() - image[brain].mean())
            rows.append(row)
    return rows


def sample_summary(rows: Rows) -> list[dict[str, Any]]:
    """One mapping an input and sequence: means of ``sample_rows`` over subjects, ``_low`` and ``_high`` their interval.

    ``n`` and ``n_lesion`` are the subjects, and those with a lesion.
    """
    lines = []
    for name, sequence in dict.fromkeys((str(row["input"]), str(row["sequence"])) for row in rows):
        mine = [row for row in rows if row["input"] == name and row["sequence"] == sequence]
        keys = list(dict.fromkeys(key for row in mine for key in row if key.startswith(("mae_", "contrast_"))))
        values = {key: list(scores(mine, name, key).values()) for key in keys}
        lesions = {subject for key in keys if key.startswith("contrast_") for subject in scores(mine, name, key)}
        line: dict[str, Any] = {"input": name, "sequence": sequence, "n": len(mine), "n_lesion": len(lesions)}
        for key in keys:
            line |= estimate(key, values[key])
        lines.append(line)
    return lines


def sample_tables(summary: Rows, *, classes: Sequence[str], title: str, notes: Sequence[str] = ()) -> dict[str, Table]:
    """``error`` and ``contrast``, a column a sequence.

    Args:
        summary: of ``sample_summary``.
        classes: see ``sample_rows``.
        title: above each table.
        notes: below the first.
    """
    lines = {(line["input"], line["sequence"]): line for line in summary}
    names, sequences = (list(dict.fromkeys(key[i] for key in lines)) for i in (0, 1))
    headings = [SEQUENCES.get(sequence, sequence.upper()) for sequence in sequences]

    def cells(name: str, key: str, digits: int) -> list[str]:
        return [cell(lines[name, sequence], key, digits) for sequence in sequences]

    count = max(line["n"] for line in summary)
    over = f"Mean over {count} subject{'s' * (count != 1)}; {INTERVAL}."
    return {
        "error": Table(
            f"{title}, mean absolute error of the original masks",
            ["method", "in", *headings],
            [[name, where, *cells(name, key, 3)] for name in names if name != REAL for key, where in PLACES.items()],
            [
                over,
                "On [−1, 1]. It describes and is no measure of usefulness: who is given a mask cannot know the slice, "
                "but for what tissue probabilities (shin), which are taken from it, tell.",
                *notes,
            ],
        ),
        "contrast": Table(
            f"{title}, contrast of lesions to normal brain",
            ["class", "images", *headings],
            [[kind, name, *cells(name, _contrast(kind), 2)] for kind in classes[1:] for name in names],
            [
                f"The class's mean minus that of normal brain, on [−1, 1]. {over}",
                "A synthetic lesion should have the real one's contrast: bright where that is bright.",
            ],
        ),
    }


def preference_reference(paper: Mapping[str, Any]) -> Table:
    """The paper's rates of preference, which only a reader could measure here.

    Args:
        paper: ``title`` and ``preference``, percent by method.
    """
    return Table(
        "Human preference",
        ["method", "paper", "here"],
        [[name, f"{rate:.1f}%", "not measured here"] for name, rate in paper["preference"].items()],
        [f"Paper: {paper['title']}. blind=true writes the sheet for such a study."],
    )


def _lesion(label: Tensor) -> Tensor:
    return (label > 0) & (label != IGNORED)


def _contrast(kind: str) -> str:
    return f"contrast_{kind.replace(' ', '_')}"
