"""Search mode: how far a training subject's source lies from the query's, read from where it lies (section 2)."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mrgen.arrays import map_array
from mrgen.errors import UserError
from mrgen.papers.brain_clustering.preprocessing import Box, Scaling

__all__ = ["Location", "SearchScan", "finite"]

SLAB = 2**18  # voxels that are compared at once: they stay in the processor's cache


@dataclass(frozen=True)
class Location:
    """Where a source volume lies: npy files, such as a prepared store's ``image.npy`` and ``brain.npy``.

    Attributes:
        image: path of an (X, Y, Z) array, or of a (C, X, Y, Z) one.
        channel: of a (C, X, Y, Z) array.
        brain: path of the (X, Y, Z) mask that was used in training, or None.
    """

    image: str
    channel: int | None = None
    brain: str | None = None

    def seen_from(self, folder: Path) -> "Location":
        """The same place; a path below ``folder`` counts from there, so that the folder can be moved as a whole."""
        base = folder.absolute()

        def seen(name: str) -> str:
            path = Path(name).absolute()
            return str(path.relative_to(base) if path.is_relative_to(base) else path)

        return replace(self, image=seen(self.image), brain=None if self.brain is None else seen(self.brain))


@dataclass(frozen=True)
class SearchScan:
    """The source of a training subject, as the ranking needs it.

    Attributes:
        kept: where it lies, or the (X, Y, Z) array itself, background 0.
        shape: of the volume.
        box: around its foreground.
        scaling: its preprocessing.
    """

    kept: Location | np.ndarray
    shape: tuple[int, int, int]
    box: Box
    scaling: Scaling

    def squared_error(self, query: np.ndarray, box: Box) -> float:
        """Mean squared difference of two preprocessed sources over the whole volume, background included.

        Args:
            query: (X, Y, Z) unit intensities.
            box: around the query's foreground; outside both boxes both are background.

        Raises:
            UserError: the volumes differ in shape, or the training subject's cannot be read.
        """
        if query.shape != self.shape:
            raise UserError(
                f"found a query of {query.shape}, expected {self.shape}, the shape of the training scans that Search "
                "compares it with; bring them onto one grid, or use mode=train"
            )
        image, brain = self._opened()
        (x0, x1), *plane = ((min(a, c), max(b, d)) for (a, b), (c, d) in zip(self.box, box, strict=True))
        total, step = 0.0, max(1, SLAB // math.prod(b - a for a, b in plane))
        for x in range(x0, x1, step):
            place = (slice(x, min(x + step, x1)), *(slice(a, b) for a, b in plane))
            there = image[place]
            unit = self.scaling(there if brain is None else np.where(brain[place], there, 0))
            unit -= query[place]
            total += float(np.vdot(unit, unit))
        return total / query.size

    def _opened(self) -> tuple[np.ndarray, np.ndarray | None]:
        if isinstance(self.kept, np.ndarray):
            return self.kept, None
        image = _mapped(self.kept.image)
        if self.kept.channel is not None:
            if image.ndim != 4 or self.kept.channel >= len(image):
                raise UserError(
                    f"{self.kept.image}: found {image.shape}, expected volume {self.kept.channel} of several; fit anew"
                )
            image = image[self.kept.channel]
        brain = None if self.kept.brain is None else _mapped(self.kept.brain)
        if image.shape != self.shape or (brain is not None and brain.shape != self.shape):
            raise UserError(f"{self.kept.image}: found {image.shape}, expected {self.shape} as in training; fit anew")
        return image, brain

    def to_json(self) -> dict[str, Any]:
        assert isinstance(self.kept, Location)
        cut = None if math.isinf(self.scaling.cut) else self.scaling.cut
        scaling = {"cut": cut, "top": self.scaling.top}
        return {"location": asdict(self.kept), "shape": self.shape, "box": self.box, "scaling": scaling}

    @classmethod
    def from_json(cls, table: Mapping[str, Any], folder: Path) -> "SearchScan":
        """Paths that are not absolute count from ``folder``."""
        location, scaling = table["location"], table["scaling"]
        names, channel = [location["image"], location["brain"]], location["channel"]
        if (
            not all(isinstance(name, str) and "\0" not in name for name in names if name is not None)
            or names[0] is None
        ):
            raise ValueError(f"the location {names}")
        shape, box = table["shape"], table["box"]
        numbers = [*shape, *(n for ends in box for n in ends), *([] if channel is None else [channel])]
        if not (len(shape) == len(box) == 3 and all(type(n) is int and n >= 0 for n in numbers)):
            raise ValueError(f"the shape {shape} and the box {box}")
        if any(not low < high <= size for (low, high), size in zip(box, shape, strict=True)):
            raise ValueError(f"the box {box} in {shape}")
        brain = None if location["brain"] is None else str(folder / location["brain"])
        cut = float("inf") if scaling["cut"] is None else finite(scaling["cut"])
        return cls(
            kept=Location(str(folder / location["image"]), location["channel"], brain),
            shape=tuple(table["shape"]),
            box=tuple((a, b) for a, b in table["box"]),  # type: ignore[arg-type]
            scaling=Scaling(cut, finite(scaling["top"])),
        )


def finite(value: Any) -> float:
    """A number of an artefact. Raises ValueError for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} where a number should be")
    return float(value)


def _mapped(path: str) -> np.ndarray:
    try:
        return map_array(Path(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}), expected a training subject's volume, which Search compares queries "
            "with; put it back, fit anew, or use mode=train"
        ) from error
