"""All real slices and some synthetic ones: what judges a generator is trained on (Guo et al., section 3)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mrgen.data.generated import read_generated
from mrgen.data.sampler import Key
from mrgen.data.slice_dataset import SliceDataset
from mrgen.data.splits import Split
from mrgen.data.store import Store, StoredSubject
from mrgen.errors import UserError

__all__ = ["Mix", "MixedSlices"]


class Mix:
    """Synthetic slices that join the real ones of training.

    Args:
        store: a synthetic cohort that ``mrgen-synthesize`` wrote.
        fraction: synthetic slices for each real one; 1 and 0.5 in the paper's experiments 1 and 2.
        equal_steps: an epoch has as many steps as of the real slices alone, so that all mixes are trained equally long;
            else every slice is shown once an epoch, and more slices train longer.

    Attributes:
        subjects: of the synthetic cohort, by id.
        made_from: patients that the generator was trained on.
        method: the name of its run.

    Raises:
        UserError: no synthetic cohort, or one that is not finished.
    """

    def __init__(self, *, store: str | Path, fraction: float = 1.0, equal_steps: bool = False):
        if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not fraction > 0:
            raise UserError(
                f"data.mix.fraction is {fraction!r}; expected a number above 0, or data.mix.store=null for none"
            )
        self.fraction, self.equal_steps = float(fraction), bool(equal_steps)
        record = read_generated(Path(store))
        if record is None:
            raise UserError(
                f"data.mix.store={store}: found no synthetic cohort there, expected one; make it with "
                "mrgen-synthesize checkpoint=RUN output=STORE"
            )
        if not record["complete"]:
            raise UserError(f"data.mix.store={store}: its making was interrupted; run the same mrgen-synthesize again")
        self.store = Store(store)
        self.subjects = self.store.subjects
        self.method, self.made_from = str(record["method"]), frozenset(record["patients"])
        self._of = str(record["store"])
        self._made = {key: record[key] for key in ("checkpoint", "seed", "slices")}

    def check(self, modalities: Sequence[str], classes: Sequence[str], labels: str, split: Split, real: Store) -> None:
        """Raises UserError where the cohort does not fit the real one, or knows its held-out patients."""
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
        """How many there are."""
        return sum(subject.shape[2] for subject in self.subjects.values())

    def wanted(self, real: int) -> int:
        """How many join so many real ones. Raises UserError where there are too few."""
        wanted = max(1, round(self.fraction * real))
        if wanted > self.slices():
            raise UserError(
                f"data.mix: {self.fraction:g} synthetic slices for each of {real} real ones are {wanted}, and "
                f"{self.store.path} holds {self.slices()}; make more (mrgen-synthesize … slices={wanted}) or lower "
                "data.mix.fraction"
            )
        return wanted

    def describe(self, real: int) -> dict[str, Any]:
        """For a checkpoint: plain containers."""
        return {
            "method": self.method,
            "fraction": self.fraction,
            "equal_steps": self.equal_steps,
            "real_slices": real,
            "synthetic_slices": self.wanted(real),
            "patients": sorted(self.made_from),
            "made": self._made,  # of which checkpoint, how many
        }


def _sides(sides: set[tuple[float, ...]]) -> str:
    return " or ".join(" × ".join(f"{side:g}" for side in pair) + " mm" for pair in sorted(sides))


class MixedSlices(Dataset):
    """Real slices, then the synthetic ones; a smaller fraction takes some of those that a larger one takes.

    Args:
        real: all of them.
        mix: where the others come from.
        seed: chooses them.
        **reading: as of ``SliceDataset``.
    """

    def __init__(self, real: SliceDataset, mix: Mix, *, seed: int, **reading: Any):
        subjects: list[StoredSubject] = list(mix.subjects.values())
        reading["lookup"] = mix.store.layout.label_lookup(reading.pop("labels"))
        self.real, self.synthetic = real, SliceDataset(subjects, seed=seed, whole=True, **reading)
        order = np.random.default_rng([seed, len(self.synthetic)]).permutation(len(self.synthetic))
        self.chosen = order[: mix.wanted(len(real))]

    def __len__(self) -> int:
        return len(self.real) + len(self.chosen)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, which = key
        if which < len(self.real):
            return self.real[key]
        return self.synthetic[epoch, index, int(self.chosen[which - len(self.real)])]
