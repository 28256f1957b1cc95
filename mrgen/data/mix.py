"""Real, synthetic and classically augmented slices in one training: what judges a generator is trained on.

Guo et al., section 3, add synthetic slices to all real ones; Qu et al., Table 2, vary the amounts of all three and the
order in which they are shown.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mrgen.data.generated import read_generated
from mrgen.data.sampler import Key, Turn
from mrgen.data.slice_dataset import SliceDataset
from mrgen.data.splits import Split
from mrgen.data.store import Store, StoredSubject
from mrgen.errors import UserError

__all__ = ["Mix", "MixedSlices"]

ORDERS = ("random", "synthetic_first", "real_first")
KEPT = 2**32  # bytes of enhanced slices that a process keeps, ours: some 7000 of four sequences of 240 × 240


class Mix:
    """How many slices of each kind training sees, and when. ×1 is the number of the training set's real slices.

    Args:
        store: a synthetic cohort that ``mrgen-synthesize`` wrote; None: no synthetic slices.
        fraction: synthetic slices for each of ×1; 1 and 0.5 in the experiments 1 and 2 of Guo et al.
        equal_steps: an epoch has as many steps as of ×1 alone, so that all mixes are trained equally long; else every
            slice is shown once an epoch, and more slices train longer.
        real: share of ×1 that is used, 0 to 1. Slices are drawn, not subjects.
        enhanced: slices for each of ×1 that ``enhancement`` makes of the real ones in use: a fixed set, every real
            slice changed once before any is changed twice.
        enhancement: TorchIO transforms, applied in this order.
        order: ``random``; or all steps of one kind before those of the other, ``synthetic_first`` or ``real_first``:
            the training's steps are divided as the amounts are. Enhanced slices are of the real kind.

    A smaller amount is part of a larger one, of every kind.

    Attributes:
        subjects: of the synthetic cohort, by id.
        made_from: patients that the generator was trained on.
        method: the name of its run; None without synthetic slices.

    Raises:
        UserError: amounts that are none or leave nothing, no synthetic cohort, or one that is not finished.
    """

    def __init__(
        self,
        *,
        store: str | Path | None = None,
        fraction: float = 1.0,
        equal_steps: bool = False,
        real: float = 1.0,
        enhanced: float = 0.0,
        enhancement: Sequence[Callable[[Any], Any]] = (),
        order: str = "random",
    ):
        for name, value, most, expected in (("real", real, 1.0, "0 to 1"), ("enhanced", enhanced, 1e6, "0 or more")):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
                raise UserError(f"data.mix.{name} is {value!r}; expected a number, {expected}")
        self.real, self.enhanced = float(real), float(enhanced)
        self.enhancement, self.order, self.equal_steps = list(enhancement or ()), order, bool(equal_steps)
        if order not in ORDERS:
            raise UserError(f"data.mix.order is {order!r}; expected one of {', '.join(ORDERS)}")
        if not self.real and store is None:
            raise UserError("data.mix.real is 0 and data.mix.store null, which leaves no slice; set one of them")
        if self.enhanced and not (self.real and self.enhancement):
            lacking = "data.mix.enhancement, transforms that make them" if self.real else "real slices, data.mix.real"
            raise UserError(f"data.mix.enhanced is {self.enhanced:g}, which needs {lacking}; set it, or enhanced=0")
        if order != "random" and (store is None or not self.real):
            raise UserError(
                f"data.mix.order is {order}, and there are no {'synthetic' if store is None else 'real'} slices; "
                f"expected both kinds: set data.mix.{'store' if store is None else 'real'}, or order=random"
            )
        self.store: Store | None = None
        self.fraction, self.method = 0.0, cast(str | None, None)
        self.subjects: Mapping[str, StoredSubject] = {}
        self.made_from: frozenset[str] = frozenset()
        self._of, self._made = "", cast(dict[str, Any] | None, None)
        if store is not None:
            self._read(store, fraction)

    def _read(self, store: str | Path, fraction: float) -> None:
        if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not fraction > 0:
            raise UserError(
                f"data.mix.fraction is {fraction!r}; expected a number above 0, or data.mix.store=null for none"
            )
        record = read_generated(Path(store))
        if record is None:
            raise UserError(
                f"data.mix.store={store}: found no synthetic cohort there, expected one; make it with "
                "mrgen-synthesize checkpoint=RUN output=STORE"
            )
        if not record["complete"]:
            raise UserError(f"data.mix.store={store}: its making was interrupted; run the same mrgen-synthesize again")
        self.store, self.fraction = Store(store), float(fraction)
        self.subjects = self.store.subjects
        self.method, self.made_from = str(record["method"]), frozenset(record["patients"])
        self._of = str(record["store"])
        self._made = {key: record[key] for key in ("checkpoint", "seed", "slices")}

    def __bool__(self) -> bool:
        """Whether training sees anything but all real slices."""
        return self.store is not None or self.real < 1 or self.enhanced > 0

    def check(self, modalities: Sequence[str], classes: Sequence[str], labels: str, split: Split, real: Store) -> None:
        """Raises UserError where the cohort does not fit the real one, or knows its held-out patients."""
        if self.store is None:
            return
        where = f"data.mix.store={self.store.path}"
        if lacking := [name for name in modalities if name not in self.store.modalities]:
            raise UserError(
                f"{where}: holds {', '.join(self.store.modalities)}, without {', '.join(lacking)}; set data.modalities"
            )
        found = self.store.layout.classes.get(labels, ())
        if tuple(found) != tuple(classes):
            raise UserError(f"{where}: its classes are {list(found)}, those of {real.path} {list(classes)}")
        sides, others = (
            {tuple(round(side, 2) for side in subject.spacing[:2]) for subject in store.subjects.values()}
            for store in (self.store, real)
        )
        if self._of != real.name or not sides & others:
            raise UserError(
                f"{where}: made from {self._of}, with pixels of {_sides(sides)}; the real cohort is {real.name}, with "
                f"pixels of {_sides(others)}; mix it with the cohort that it was made from"
            )
        held_out = {real.subjects[id].patient for id in (*split.val, *split.test)}
        if known := sorted(held_out & self.made_from):
            raise UserError(
                f"{where}: {self.method} was trained on {len(known)} of the {len(held_out)} patients that are held out "
                f"here ({', '.join(known[:3])}{' …' if len(known) > 3 else ''}); train with its split: "
                "data.split.kind=file data.split.file=RUN/split.json"
            )

    def slices(self) -> int:
        """How many synthetic ones there are."""
        return sum(subject.shape[2] for subject in self.subjects.values())

    def wanted(self, real: int) -> int:
        """How many synthetic slices go with ×1 = ``real``. Raises UserError where there are too few."""
        if self.store is None:
            return 0
        wanted = max(1, round(self.fraction * real))
        if wanted > self.slices():
            raise UserError(
                f"data.mix: {self.fraction:g} synthetic slices for each of {real} real ones are {wanted}, and "
                f"{self.store.path} holds {self.slices()}; make more (mrgen-synthesize … slices={wanted}) or lower "
                "data.mix.fraction"
            )
        return wanted

    def amounts(self, real: int) -> tuple[int, int, int]:
        """Real, enhanced and synthetic slices at ×1 = ``real``; one at least of each kind that there is."""
        kept, enhanced = (max(1, round(share * real)) if share else 0 for share in (self.real, self.enhanced))
        return kept, enhanced, self.wanted(real)

    def turns(self, real: int, samples: int) -> list[Turn]:
        """Which places of ``MixedSlices`` have which of so many samples of a whole training."""
        kept, enhanced, synthetic = self.amounts(real)
        total, of_synthetic = kept + enhanced + synthetic, range(kept + enhanced, kept + enhanced + synthetic)
        if self.order == "random":
            return [Turn(range(total), samples)]
        theirs = round(samples * synthetic / total)
        turns = [Turn(of_synthetic, theirs), Turn(range(kept + enhanced), samples - theirs)]
        return turns if self.order == "synthetic_first" else turns[::-1]

    def describe(self, real: int, samples: int | None = None) -> dict[str, Any]:
        """For a checkpoint: plain containers; ``samples`` of a whole training where the order divides them."""
        kept, enhanced, synthetic = self.amounts(real)
        return {
            "method": self.method,
            "fraction": self.fraction,
            "equal_steps": self.equal_steps,
            "real": self.real,
            "real_slices": kept,
            "enhanced_slices": enhanced,
            "synthetic_slices": synthetic,
            "order": self.order,
            "samples": samples,
            "patients": sorted(self.made_from),
            "made": self._made,  # of which checkpoint, how many
        }


def _sides(sides: set[tuple[float, ...]]) -> str:
    return " or ".join(" × ".join(f"{side:g}" for side in pair) + " mm" for pair in sorted(sides))


class MixedSlices(Dataset):
    """Real slices, then enhanced and synthetic ones.

    Args:
        real: gives all of them; not asked where none is used.
        mix: how many of which.
        count: how many real ones there are, ×1.
        seed: chooses.
        labels: the label map of the synthetic cohort's layout.
        **reading: as of ``SliceDataset``.
    """

    def __init__(
        self, real: Callable[[], SliceDataset], mix: Mix, *, count: int, seed: int, labels: str, **reading: Any
    ):
        kept, enhanced, synthetic = mix.amounts(count)
        self.parts: list[tuple[Dataset, np.ndarray]] = []  # a data set and the places in it, for each kind
        if kept:
            slices = real()
            places = np.random.default_rng([seed, count, 0]).permutation(count)[:kept]
            places = np.sort(places) if kept == count else places
            self.parts.append((slices, places))
            made = EnhancedSlices(slices, places, mix.enhancement, count=enhanced, seed=seed)
            self.parts.append((made, np.arange(enhanced)))
        if mix.store is not None:
            lookup = mix.store.layout.label_lookup(labels)
            reading = {**reading, "lookup": lookup, "seed": seed, "whole": True}
            others = SliceDataset(list(mix.subjects.values()), **reading)
            order = np.random.default_rng([seed, len(others)]).permutation(len(others))
            self.parts.append((others, order[:synthetic]))

    def __len__(self) -> int:
        return sum(len(places) for _, places in self.parts)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, which = key
        for slices, places in self.parts:
            if which < len(places):
                return slices[epoch, index, int(places[which])]
            which -= len(places)
        raise IndexError(f"place {key[2]} of {len(self)}")


class EnhancedSlices(Dataset):
    """Slices through transforms that are seeded by their place: the same whenever they are looked at.

    What was made once is kept in memory, by every process (each of ``data.workers``) for itself and up to ``KEPT``
    bytes: images in half precision, to which those beyond are rounded as well.

    Args:
        slices: those that are changed, at these ``places``.
        transforms: TorchIO's; training's own augmentation follows them.
        count: how many there are, in shuffled passes over the places.
        seed: shuffles and changes.
    """

    def __init__(
        self,
        slices: SliceDataset,
        places: np.ndarray,
        transforms: Sequence[Callable[[Any], Any]],
        *,
        count: int,
        seed: int,
    ):
        self.slices, self.transforms, self.seed = slices, list(transforms), seed
        passes = -(-count // len(places))
        shuffled = [np.random.default_rng([seed, len(places), 1, n]).permutation(places) for n in range(passes)]
        self.places = np.concatenate([*shuffled, np.empty(0, int)])[:count]
        self._kept: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, which = key
        place = int(self.places[which])
        parts = self._kept.get(which) or self._made(place, which)
        parts = {"image": parts["image"].float(), "label": parts["label"].long(), "brain": parts["brain"].clone()}
        augmenting = self.slices.augment, (self.slices.seed, epoch, index)
        return self.slices.through(parts, augmenting) | self.slices.named(place)

    def _made(self, place: int, which: int) -> dict[str, Tensor]:
        """Image (C, X, Y) float16, label (X, Y) uint8 and brain (X, Y) bool, kept where there is room."""
        enhancing = [(transform, (self.seed, which, n)) for n, transform in enumerate(self.transforms)]
        parts = self.slices.through(self.slices.parts(place), *enhancing)
        small = {"image": torch.float16, "label": torch.uint8, "brain": torch.bool}
        parts = {name: parts[name].to(kind) for name, kind in small.items()}
        if len(self._kept) < KEPT // sum(part.nbytes for part in parts.values()):
            self._kept[which] = parts
        return parts
