"""Synthetic slices of the lesion VAE-GAN: drawn from noise, filtered three times, and kept (Qu et al., section 2.8).

A structure map is drawn and has to pass Algorithm 3; a random lesion label has to fit into its brain; all sequences are
made of both; and segmentors that know real slices alone have to find the label again in what was made. No slice of it
depends on a scan but through the networks and the labels.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mrgen.data.batch import IGNORED
from mrgen.errors import UserError
from mrgen.papers.lesion_vaegan.filters import Selection, agreement, outline_error
from mrgen.papers.lesion_vaegan.labels import RandomLabel, random_label
from mrgen.papers.lesion_vaegan.maps import fits
from mrgen.protocols import Generated, LabelMaps

__all__ = ["Exhausted", "LesionCohort", "LesionGenerator", "Segment", "StructureModel"]

SLICES = 16  # that are computed at once

Segment = Callable[[Tensor], Tensor]
"""Images (n, C, X, Y) in [0, 1] to the labels that are found in each sequence, (n, C, X, Y) int64."""


@runtime_checkable
class StructureModel(Protocol):
    """What the cohort asks of the first stage. ``size`` is (X, Y) of its maps."""

    size: tuple[int, int]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 1, X, Y) structure maps, 0 and 1, of codes from the normal distribution."""
        ...

    def mask(self, maps: Tensor) -> Tensor:
        """MASK: (n, 1, X, Y), 1 outside the brain and else 0."""
        ...

    def realness(self, maps: Tensor) -> Tensor:
        """(n,), mean of D_f's patches; 1 is real."""
        ...


@runtime_checkable
class LesionGenerator(Protocol):
    """What the cohort asks of the second stage."""

    modalities: tuple[str, ...]
    scale: str

    def synthesise(self, maps: Tensor, labels: Tensor) -> Tensor:
        """Structure maps (n, 1, X, Y) and labels (n, X, Y) to images (n, C, X, Y) in [0, 1]."""
        ...


class Exhausted(UserError):
    """The tries ran out on one donor's lesions; another donor's may pass.

    Attributes:
        filters: what was drawn in vain, as of ``Generated.filters``.
    """

    def __init__(self, message: str, filters: dict[str, float]):
        super().__init__(message)
        self.filters = filters


# ----- the procedure -------------------------------------------------------------------------------------------------


@dataclass
class _Slice:
    """A candidate, on the processor: map, mask and label (X, Y), image (C, X, Y), and what is told of it."""

    structure: Tensor
    outside: Tensor
    label: Tensor
    told: dict[str, Any]
    image: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class _Tally:
    """What happened to a subject's slices so far; ``least`` and ``most`` are what errors tell."""

    maps_drawn: int = 0
    maps_accepted: int = 0
    labels_drawn: int = 0
    labels_accepted: int = 0
    candidates: int = 0
    kept: int = 0
    dice: float = 0.0
    mse: float = 0.0
    least_error: float = math.inf
    most_dice: float = 0.0

    def filters(self) -> dict[str, float]:
        """As of ``Generated.filters``."""
        made = max(self.candidates, 1)
        return {
            "maps_drawn": self.maps_drawn,
            "maps_accepted": self.maps_accepted,
            "labels_drawn": self.labels_drawn,
            "labels_accepted": self.labels_accepted,
            "candidates": self.candidates,
            "kept": self.kept,
            "dice": self.dice / made,
            "mse": self.mse / made,
        }


class LesionCohort:
    """Both stages as one ``mrgen.protocols.Generator``: it draws anatomy first and then fits labels.

    Args:
        structure: the first stage, in eval mode.
        generator: the second, likewise.
        segment: finds labels in each sequence by itself; trained on real slices alone.
        selection: what a slice has to pass.
    """

    guides: tuple[str, ...] = ()

    def __init__(
        self,
        structure: StructureModel,
        generator: LesionGenerator,
        segment: Segment,
        selection: Selection,
    ):
        self.structure, self.generator, self.segment, self.selection = structure, generator, segment, selection
        self.modalities, self.scale = generator.modalities, generator.scale

    @torch.no_grad()
    def generate(self, labels: Iterable[LabelMaps], seed: int) -> Iterator[Generated]:
        """As many slices of each subject as it has labels; none is any particular one's of them.

        Args:
            labels: of each the donor's slices, of whose lesions its random labels are made; on the device that the
                networks are on. The brain is not looked at.
            seed: of subject k depends all that is drawn on it and k alone.

        Returns:
            Subjects on the processor, with ``structure``, ``records`` and ``filters``; image 0 to 1.

        Raises:
            Exhausted: labels that do not fit, or segmentors that do not agree, which depends on the donor.
            UserError: a donor without lesion, or structure maps of which Algorithm 3 rejects too many.
        """
        for k, maps in enumerate(labels):
            # 255, what no metric looks at, is no lesion that could be asked for.
            known = maps.label.masked_fill(maps.label == IGNORED, 0)
            lesions = known.flatten(1).any(dim=1)
            pool = known[lesions].cpu().numpy().astype(np.uint8)
            if not len(pool):
                raise UserError("none of its slices has a lesion, of which random labels could be made")
            places = lesions.nonzero()[:, 0].tolist()
            yield self._subject(pool, places, len(known), np.random.default_rng([seed, k]), maps.label.device)

    def _subject(
        self, pool: np.ndarray, places: list[int], wanted: int, rng: np.random.Generator, device: torch.device
    ) -> Generated:
        """Draws on until enough slices are accepted, or until enough were made to keep the best of them."""
        best, tally = self.selection.best, _Tally()
        codes = torch.Generator().manual_seed(int(rng.integers(2**31)))
        most = wanted * self.selection.dice_tries if best is None else math.ceil(wanted / best)
        kept: list[_Slice] = []
        while tally.candidates < most and (best is not None or len(kept) < wanted):
            # No batch depends on a bound on the tries, so that one can be raised and all else stays as it was.
            left = wanted - len(kept)
            count = most - tally.candidates if best is not None else _needed(left, len(kept), tally.candidates)
            made = self._made(self._drawn(min(count, SLICES), pool, rng, codes, device, tally), tally, device)
            if best is None:
                kept += [one for one in made if one.told["dice"] >= self.selection.dice]
            else:  # no more are held than are wanted
                kept = sorted([*kept, *made], key=lambda one: -one.told["dice"])[:wanted]
            tally.kept = len(kept)
        if len(kept) < wanted:
            raise Exhausted(
                f"the segmentors agree with {len(kept)} of {tally.candidates} slices, where {wanted} are wanted; the "
                f"best Dice is {tally.most_dice:.3f}, selection.dice={self.selection.dice:g}; train the generator "
                "longer, lower selection.dice, go on with a higher selection.dice_tries, or keep the best share of "
                "all: selection.best=0.5",
                tally.filters(),
            )
        kept = sorted(kept[:wanted], key=lambda one: one.told["candidate"])
        for one in kept:
            one.told["lesion_of"] = places[one.told["lesion_of"]]
        return Generated(
            image=torch.stack([one.image for one in kept]),
            label=torch.stack([one.label for one in kept]),
            brain=torch.stack([one.outside == 0 for one in kept]),
            structure=torch.stack([one.structure > 0 for one in kept]),
            records=[one.told for one in kept],
            filters=tally.filters(),
        )

    def _drawn(
        self,
        count: int,
        pool: np.ndarray,
        rng: np.random.Generator,
        codes: torch.Generator,
        device: torch.device,
        tally: _Tally,
    ) -> list[_Slice]:
        """``count`` structure maps that pass Algorithm 3, each with a label that fits it."""
        found: list[_Slice] = []
        budget = (tally.candidates + count) * self.selection.map_tries
        while len(found) < count:
            if tally.maps_drawn >= budget:
                raise self._exhausted(tally)
            asked = _needed(count - len(found), tally.labels_accepted, tally.maps_drawn)
            maps = self.structure.draw(min(asked, SLICES), codes)
            mask = self.structure.mask(maps)
            errors = outline_error(maps, mask)
            passed = errors <= self.selection.outline_error
            if self.selection.realness is not None:
                passed |= self.structure.realness(maps).float().cpu() >= self.selection.realness
            places = passed.nonzero()[:, 0].tolist()
            for place, fitted in zip(places, self._fitted(mask[places], pool, rng, tally), strict=True):
                if fitted is None or len(found) == count:
                    continue
                label, tries = fitted
                told = {
                    "map": tally.maps_drawn + place,
                    "outline_error": round(float(errors[place]), 4),
                    "label_tries": tries,
                    "lesion_of": label.source,
                    "operations": list(label.operations),
                }
                asked_for = torch.from_numpy(label.label.astype(np.int64))
                found.append(_Slice(maps[place, 0].float().cpu(), mask[place, 0].float().cpu(), asked_for, told))
            tally.maps_drawn, tally.maps_accepted = tally.maps_drawn + len(maps), tally.maps_accepted + len(places)
            tally.least_error = min(tally.least_error, float(errors.min()))
        return found

    def _fitted(
        self, mask: Tensor, pool: np.ndarray, rng: np.random.Generator, tally: _Tally
    ) -> list[tuple[RandomLabel, int] | None]:
        """For each mask (n, 1, X, Y) a random label whose lesion lies within the brain and the tries, or None."""
        fitting: list[tuple[RandomLabel, int] | None] = [None] * len(mask)
        without = list(range(len(mask)))
        for k in range(self.selection.label_tries):
            if not without:
                break
            tried = [random_label(pool, rng) for _ in without]
            labels = torch.from_numpy(np.stack([one.label for one in tried])).to(mask.device)
            within = fits(mask[without], labels).tolist()
            for place, label, fit in zip(without, tried, within, strict=True):
                fitting[place] = (label, k + 1) if fit else None
            tally.labels_drawn += len(tried)
            tally.labels_accepted += sum(within)
            without = [place for place, fit in zip(without, within, strict=True) if not fit]
        return fitting

    def _made(self, slices: list[_Slice], tally: _Tally, device: torch.device) -> list[_Slice]:
        """The slices with their images, and what the segmentors find in these."""
        maps, labels = (
            torch.stack([getattr(one, name) for one in slices]).to(device) for name in ("structure", "label")
        )
        images = self.generator.synthesise(maps[:, None], labels).float()  # (n, C, X, Y)
        if not torch.isfinite(images).all():
            raise UserError("the generator made NaN or infinite voxels; try precision=32-true, then another checkpoint")
        brain = torch.stack([one.outside == 0 for one in slices]).to(device)
        images = images * brain[:, None]  # as it is stored, and as the segmentors saw real slices
        dice, mse = agreement(self.segment(images), labels)
        for k, one in enumerate(slices):
            one.image = images[k].cpu()
            one.told |= {"candidate": tally.candidates + k, "dice": float(dice[k]), "mse": float(mse[k])}
        tally.candidates += len(slices)
        tally.dice, tally.mse = tally.dice + float(dice.sum()), tally.mse + float(mse.sum())
        tally.most_dice = max(tally.most_dice, float(dice.max()))
        return slices

    def _exhausted(self, tally: _Tally) -> UserError:
        """Names the filter that left the smaller share of the structure maps."""
        drawn, accepted, fitted = tally.maps_drawn, tally.maps_accepted, tally.labels_accepted
        chosen = self.selection
        if accepted * accepted <= drawn * fitted:
            return UserError(
                f"Algorithm 3 accepts {accepted} of {drawn} structure maps; their least outline error is "
                f"{tally.least_error:.3f}, selection.outline_error={chosen.outline_error:g}; train the structure "
                "VAE-GAN longer, raise selection.outline_error, or go on with a higher selection.map_tries"
            )
        return Exhausted(
            f"random lesion labels fit {fitted} of {accepted} generated brains, with selection.label_tries="
            f"{chosen.label_tries} on each; raise it, or train the structure VAE-GAN longer if its brains are small",
            tally.filters(),
        )


def _needed(missing: int, passed: int, tried: int) -> int:
    """How many are to be tried for so many that are missing, as the rate was until now."""
    return math.ceil(missing * (tried + 1) / (passed + 1))
