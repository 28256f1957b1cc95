"""What ``mrgen-synthesize`` needs for the lesion VAE-GAN: the runs of both stages, and what its filters left."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from mrgen.data.batch import IGNORED
from mrgen.data.generated import Lesion
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store, StoredSubject, read_cohort
from mrgen.errors import UserError
from mrgen.launch.runs import Run, load_run
from mrgen.papers.lesion_vaegan.cohort import LesionCohort, Segment, StructureModel
from mrgen.papers.lesion_vaegan.filters import Selection
from mrgen.protocols import Generated, Generator

__all__ = ["BOUNDS", "LesionMethod", "lesion_settings"]

COUNTS = ("maps_drawn", "maps_accepted", "labels_drawn", "labels_accepted", "candidates", "kept")
MEANS = ("dice", "mse")  # over candidates
BOUNDS = ("map_tries", "dice_tries")  # of the selection; no draw depends on them


def lesion_settings(conf: DictConfig) -> list[str]:
    """The settings ``key=value`` of ``conf/synthesize.yaml`` that are set and that the lesion VAE-GAN alone knows."""
    given = [f"{key}={conf[key]}" for key in ("structure", "segmentors") if conf[key] is not None]
    changed = [part.name for part in fields(Selection) if conf.selection[part.name] != part.default]
    return given + [f"selection.{name}={conf.selection[name]}" for name in changed]


class LesionMethod:
    """Both stages and the segmentors, as the cohort's generator (a ``mrgen.launch.synthesis.generating.Method``).

    Args:
        run: of the second stage.
        conf: ``structure``, ``segmentors``, ``selection`` and ``manipulations`` of ``conf/synthesize.yaml``.
        slices: that the run was shown.

    Raises:
        UserError: a setting that does not concern it, or a run that does not fit the others.
    """

    kinds: tuple[str, ...] = ()

    def __init__(self, run: Run, conf: DictConfig, slices: SiteSlices):
        if conf.manipulations is not None:
            raise UserError(
                f"manipulations={conf.manipulations}: {run.conf.name} makes random lesion labels of its own, by "
                "rotating, flipping, shifting and shrinking; leave manipulations out"
            )
        self.name = str(run.conf.name)
        _check_real("checkpoint", conf.checkpoint, run)
        structure = _structure_run(run, conf.structure, slices)
        segmentors = None if conf.segmentors is None else _segmentors_run(run, conf.segmentors)
        self._others = [other for other in (structure, segmentors) if other is not None]
        self.networks: Sequence[nn.Module] = [run.model, *(other.model for other in self._others)]
        segment = _own(run.model.segmentors) if segmentors is None else _separate(segmentors.model)
        self.selection = Selection(**{part.name: conf.selection[part.name] for part in fields(Selection)})
        self.model: Generator = LesionCohort(structure.model, run.model, segment, self.selection)
        self.settings: Mapping[str, Any] = {
            "scheme": str(run.model.scheme),
            "structure": f"sha256:{structure.digest()}",
            "segmentors": None if segmentors is None else f"sha256:{segmentors.digest()}",
            "selection": asdict(self.selection),
        }

    def donors(
        self, training: Sequence[StoredSubject], sampling: SiteSlices, lookup: np.ndarray
    ) -> list[StoredSubject]:
        """Those with a lesion in the slices that training shows."""
        donors = [subject for subject in training if _has_lesion(subject, sampling, lookup)]
        if not donors:
            raise UserError(
                f"{self.name}: found no lesion in the slices that training shows of its {len(training)} labelled "
                "subjects, expected some to make random lesion labels of; train it on a cohort with lesions"
            )
        return donors

    def patients(self, real: Store) -> set[str]:
        return set().union(*(_patients(other, real) for other in self._others))

    def line(self, lesion: Lesion, made: Generated) -> str:
        return _said(made.filters, self.selection)

    def outcome(
        self, sources: Sequence[Mapping[str, Any]], exhausted: Mapping[str, Mapping[str, float]]
    ) -> tuple[str, Mapping[str, Any]]:
        # With what was made in vain: means over kept subjects alone would flatter the generator.
        told = [*(source["filters"] for source in sources), *exhausted.values()]
        total = {key: sum(one[key] for one in told) for key in COUNTS}
        total |= {key: sum(one[key] * one["candidates"] for one in told) / total["candidates"] for key in MEANS}
        said = f"{_said(total, self.selection)}, {len(exhausted)} donors left out" if exhausted else ""
        return said or _said(total, self.selection), {"filters": {**total, "donors_without": len(exhausted)}}


def _said(filters: Mapping[str, float], selection: Selection) -> str:
    """Each filter's rate of acceptance."""

    def rate(passed: str, tried: str) -> str:
        return f"{filters[passed] / filters[tried]:.0%} of {filters[tried]}"

    least = f"Dice from {selection.dice:g} on" if selection.best is None else "best Dice"
    return (
        f"accepted: structure maps {rate('maps_accepted', 'maps_drawn')}, labels "
        f"{rate('labels_accepted', 'labels_drawn')}, {least} {rate('kept', 'candidates')} (mean "
        f"{filters['dice']:.3f})"
    )


# ----- the other runs ------------------------------------------------------------------------------------------------


def _structure_run(run: Run, asked: Any, slices: SiteSlices) -> Run:
    if not asked:
        raise UserError(
            f"structure is not set; {run.conf.name} makes slices from structure maps: give the run that draws them, "
            "such as structure=runs/structure/RUN (mrgen-train experiment=lesion_vaegan/structure)"
        )
    structure = load_run(asked)
    if not isinstance(structure.model, StructureModel):
        raise UserError(
            f"structure={asked} is a {type(structure.model).__name__}, which draws no structure maps; give a run of "
            "experiment=lesion_vaegan/structure"
        )
    structure.check_finished("structure", asked)
    _check_real("structure", asked, structure)
    found, expected = (
        f"{' × '.join(map(str, size))} pixels on the scale {scale}"
        for size, scale in (
            (structure.model.size, structure.normalisation.scale),
            (slices.size, run.normalisation.scale),
        )
    )
    if found != expected:
        raise UserError(
            f"structure={asked}: draws maps of {found}, expected {expected}, which {run.conf.name} was trained on; "
            "train both stages with one data.sampling and one data.normalisation"
        )
    return structure


def _check_real(key: str, asked: Any, run: Run) -> None:
    """Raises UserError for a run of a synthetic cohort: nobody could be told that the cohort's generator knows."""
    if run.description["data"].get("synthetic"):
        raise UserError(
            f"{key}={asked}: {run.conf.name} was trained on a synthetic cohort, {run.conf.data.store}, expected a real "
            "one; give a run that was trained on the scans themselves"
        )


def _segmentors_run(run: Run, asked: Any) -> Run:
    segmentors = load_run(asked)
    if not hasattr(segmentors.model, "segment_each"):
        raise UserError(
            f"segmentors={asked} is a {type(segmentors.model).__name__}, which finds no label in each sequence by "
            "itself; give a run of the lesion VAE-GAN's segmentors, or leave segmentors out for the generator's own"
        )
    segmentors.check_finished("segmentors", asked)
    _check_real("segmentors", asked, segmentors)
    data, own = segmentors.description["data"], run.description["data"]
    for key, needed in (("modalities", run.model.modalities), ("classes", own["classes"])):
        if list(data[key]) != list(needed):
            raise UserError(
                f"segmentors={asked}: its {key} are {list(data[key])}, expected {list(needed)}, those of "
                f"{run.conf.name}; train them on the same cohort"
            )
    if segmentors.normalisation.scale != run.normalisation.scale:
        raise UserError(
            f"segmentors={asked}: trained on the scale {segmentors.normalisation.scale}, expected "
            f"{run.normalisation.scale}, that of {run.conf.name}"
        )
    if mixed := (data.get("mix") or {}).get("synthetic_slices"):
        raise UserError(
            f"segmentors={asked}: trained on {mixed} synthetic slices, expected real ones alone, lest they find what "
            "generators make rather than lesions; give a run without data.mix.store"
        )
    return segmentors


def _own(segmentors: nn.Module) -> Segment:
    def segment(images: Tensor) -> Tensor:
        scores = segmentors(images.transpose(0, 1).unsqueeze(2))  # (C, n, classes, X, Y)
        return scores.argmax(dim=2).transpose(0, 1)

    return segment


def _separate(model: Any) -> Segment:
    def segment(images: Tensor) -> Tensor:
        found = model.segment_each({name: images[:, [k]] for k, name in enumerate(model.sources)})
        return torch.stack([found[name] for name in model.sources], dim=1)

    return segment


def _has_lesion(subject: StoredSubject, sampling: SiteSlices, lookup: np.ndarray) -> bool:
    if not any(0 < lookup[number] != IGNORED for number in subject.label_counts or ()):
        return False
    x, y, _ = sampling.box(subject.shape, subject.site)
    z = sampling.training(subject.shape, subject.site)
    label = lookup[subject.read_label((x, y, (z.start, z.stop)))[..., :: z.step]]
    return bool(np.any((label > 0) & (label != IGNORED)))


def _patients(other: Run, real: Store) -> set[str]:
    """Whom a run was trained on, by the cohort of the generator or by its own."""
    mixed = (other.description["data"].get("mix") or {}).get("patients", ())
    store, path = real, Path(str(other.conf.data.store)).expanduser()
    if not store.subjects.keys() >= set(other.split.train) and read_cohort(path) is not None:
        store = Store(path)
    if lacking := [id for id in other.split.train if id not in store.subjects]:
        raise UserError(
            f"store={store.path}: found no {lacking[0]}, whom {other.conf.name} was trained on, expected its cohort "
            f"there or in {path}; nobody could be told from its patients"
        )
    return {store.subjects[id].patient for id in other.split.train}.union(mixed)
