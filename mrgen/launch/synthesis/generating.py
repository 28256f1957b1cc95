"""From a generator's run to a synthetic cohort: what ``mrgen-synthesize`` does where no scans are needed."""

import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from mrgen.data.generated import (
    Lesion,
    Planned,
    draw_lesion,
    generator_seed,
    maps_of,
    own_numbers,
    plan_subjects,
    prepared_digest,
    read_generated,
    synthetic_layout,
    write_generated,
    write_synthetic,
)
from mrgen.data.normalisation import known_ends
from mrgen.data.slices import SiteSlices
from mrgen.data.store import (
    Store,
    StoredSubject,
    read_cohort,
    read_subjects,
    remove_leftovers,
    sole_writer,
    write_cohort,
)
from mrgen.errors import UserError
from mrgen.launch.runs import Run
from mrgen.launch.synthesis.generating_labels import LabelMethod
from mrgen.launch.synthesis.generating_lesions import LesionMethod, lesion_settings
from mrgen.launch.synthesis.generating_output import check_output
from mrgen.launch.synthesis.trained import choose_device, inference_precision
from mrgen.launch.training import checked_seed
from mrgen.papers.lesion_vaegan.cohort import Exhausted, LesionGenerator
from mrgen.protocols import Generated, Generator, LabelMaps

__all__ = ["generate", "generating_settings"]

# Keys of conf/synthesize.yaml that generators alone know, and those that they do not.
_GENERATING = ("subjects", "slices", "manipulations", "store")
_OF_SCANS = ("input", "layout", "mc_samples", "mc_batch")


def generating_settings(conf: DictConfig) -> list[str]:
    """The settings ``key=value`` that are set and that generators alone know."""
    return [f"{key}={conf[key]}" for key in _GENERATING if conf[key] is not None] + lesion_settings(conf)


def generate(run: Run, conf: DictConfig) -> Path:
    """Writes a synthetic cohort, or what is missing of one; one line a subject, on a terminal with a bar of slices.

    Args:
        run: of a ``mrgen.protocols.Generator``, or of a lesion VAE-GAN's second stage.
        conf: ``output``, ``subjects``, ``slices``, ``manipulations``, ``store``, ``structure``, ``segmentors``,
            ``selection``, ``seed``, ``device`` and ``precision`` of ``conf/synthesize.yaml``.

    Returns:
        The store.

    Raises:
        UserError: a setting that cannot be followed; no real store, or another than the run was trained on; an output
            that holds something else, or the same with other settings; filters that nothing passes.
    """
    cohort = _Cohort(run, conf)
    output = Path(str(conf.output)).expanduser()
    print(f"{run.conf.name} ({conf.checkpoint}): {', '.join(run.model.modalities)} of {len(cohort.plan)} subjects")
    with sole_writer(output):
        earlier = read_generated(output)
        cohort.exhausted.update((earlier or {}).get("exhausted", {}))
        check_output(output, earlier, cohort.table)
        remove_leftovers(output)
        todo, made = cohort.missing(output), 0
        changed = todo or earlier is None or any(earlier.get(key) != value for key, value in cohort.table.items())
        if changed:
            write_generated(output, {**cohort.table, "complete": False})
            write_cohort(output, synthetic_layout(cohort.real.layout), run.model.modalities)
        while todo:  # again where others have to take the place of what could not be made
            made += cohort.make(todo, output)
            todo = cohort.missing(output)
        done = [table for id, table in read_subjects(output).items() if id in {planned.id for planned in cohort.plan}]
        summary, outcome = cohort.method.outcome([table["source"] for table in done], cohort.exhausted)
        if changed:
            write_generated(output, {**cohort.table, **outcome})
    print(
        f"{made} made, {len(done) - made} skipped; {len(done)} subjects of {cohort.table['slices']} slices, "
        f"{summary}: {output}"
    )
    return output


class Method(Protocol):
    """What generators differ in.

    Attributes:
        model: what generates.
        networks: of which it is made, to be moved to the device.
        kinds: of ``mrgen.data.lesions.KINDS``, which may be done to a lesion before the model gets it.
        settings: of its own in ``generated.json``.
    """

    model: Generator
    networks: Sequence[nn.Module]
    kinds: tuple[str, ...]
    settings: Mapping[str, Any]

    def donors(
        self, training: Sequence[StoredSubject], sampling: SiteSlices, lookup: np.ndarray
    ) -> list[StoredSubject]:
        """Whose brains or lesions the cohort is made from; raises UserError where there are none."""
        ...

    def patients(self, real: Store) -> set[str]:
        """Whom it was trained on beside the run's own training subjects."""
        ...

    def line(self, lesion: Lesion, made: Generated) -> str:
        """How a subject came about."""
        ...

    def outcome(
        self, sources: Sequence[Mapping[str, Any]], exhausted: Mapping[str, Mapping[str, float]]
    ) -> tuple[str, Mapping[str, Any]]:
        """Of all subjects' ``source``, and of those that were not made: the words, and what ``generated.json`` says."""
        ...


class _Cohort:
    """What is to be made, and of what.

    Attributes:
        real: the store that the generator was trained on.
        exhausted: subjects that no filter let pass within the tries, by id, with ``Generated.filters`` of each. They
            are not tried again in this output, whatever the tries are then: later subjects have taken their place.
    """

    def __init__(self, run: Run, conf: DictConfig):
        if given := [key for key in _OF_SCANS if not OmegaConf.is_missing(conf, key) and conf[key] is not None]:
            raise UserError(
                f"{given[0]}={conf[given[0]]}: {run.conf.name} generates from its own cohort's labels; leave "
                f"{given[0]} out"
            )
        run.check_finished("checkpoint", conf.checkpoint)
        run.check_scale()
        if (slices := run.slices) is None:
            raise UserError(
                f"checkpoint={conf.checkpoint}: {run.conf.name} was trained on other samples than whole axial slices "
                f"({run.conf.data.sampling._target_}); train it with data/sampling=slices"
            )
        self.seed = checked_seed(conf.seed)
        lesions = isinstance(run.model, LesionGenerator)
        self.method: Method = LesionMethod(run, conf, slices) if lesions else LabelMethod(run, conf)
        self.real = _real_store(run, conf.store)
        self.lookup = self.real.layout.label_lookup(run.description["data"]["labels"])
        labelled = _training(run, self.real)
        self.training = self.method.donors(labelled, slices, self.lookup)
        self.exhausted: dict[str, Mapping[str, float]] = {}
        self._slices, self._wanted = slices, _wanted(conf, self.training)
        self._in_vain = 0  # subjects one after the other
        self.guides = run.guides
        self.scale = {name: run.intensity_scale(name) for name in run.model.modalities}
        self.known = known_ends(labelled, self.scale, getattr(run.normalisation, "top", None))
        self.device = choose_device(conf.device)
        self.precision = inference_precision(conf.precision, self.device)
        mixed = (run.description["data"].get("mix") or {}).get("patients", ())
        self._said: dict[str, Any] = {
            "method": str(run.conf.name),
            "checkpoint": f"sha256:{run.digest()}",
            "store": self.real.name,
            "prepared": prepared_digest(labelled),
            "patients": sorted(
                {self.real.subjects[id].patient for id in run.split.train}.union(mixed, self.method.patients(self.real))
            ),
            "manipulations": list(self.method.kinds),
            "seed": self.seed,
            "precision": self.precision,
            **self.method.settings,
        }

    @property
    def plan(self) -> list[Planned]:
        """Its subjects."""
        return plan_subjects(self.training, self._slices, seed=self.seed, without=self.exhausted, **self._wanted)

    @property
    def table(self) -> dict[str, Any]:
        """What ``generated.json`` says in the end."""
        plan = self.plan
        count = {"subjects": len(plan), "slices": sum(len(planned.kept) for planned in plan)}
        exhausted = {"exhausted": dict(self.exhausted)} if self.exhausted else {}
        return {**self._said, **count, **exhausted, "complete": True}

    def missing(self, output: Path) -> list[Planned]:
        """What of the plan is not in the output, or with other slices."""
        there = {id: table["source"].get("slices") for id, table in read_subjects(output).items()}
        return [planned for planned in self.plan if there.get(planned.id) != planned.slices]

    def make(self, todo: list[Planned], output: Path) -> int:
        """Makes subjects one after the other; one thread reads the next and one writes the last meanwhile.

        Returns:
            How many; the others are ``exhausted`` now.
        """
        for network in self.method.networks:
            network.to(self.device)
        numbers = own_numbers(self.lookup)

        def write(planned: Planned, lesion: Lesion, made: Generated, started: float) -> str:
            write_synthetic(output, planned, lesion, made, scale=self.scale, numbers=numbers, known=self.known)
            how, count, seconds = self.method.line(lesion, made), len(planned.kept), time.perf_counter() - started
            return f"{planned.id}: {how}, {count} slice{'s' * (count != 1)} in {seconds:.1f} s"

        before = len(self.exhausted)
        with ThreadPoolExecutor(2) as pool, _slices_bar() as bar:
            line = bar.add_task("generating", total=sum(len(planned.kept) for planned in todo))
            writing: Future[str] | None = None
            reading = [pool.submit(self._read, planned) for planned in todo[:1]]
            for k, planned in enumerate(todo):
                started = time.perf_counter()
                lesion, maps = reading.pop().result()
                reading = [pool.submit(self._read, following) for following in todo[k + 1 : k + 2]]
                try:
                    made = self._made(planned, maps)
                except Exhausted as error:
                    self._leave_out(planned, error, output)
                    continue
                finally:
                    if writing is not None:
                        print(writing.result(), flush=True)
                    writing = None
                self._in_vain = 0
                writing = pool.submit(write, planned, lesion, made, started)
                bar.advance(line, len(planned.kept))
            if writing is not None:
                print(writing.result(), flush=True)
        return len(todo) - (len(self.exhausted) - before)

    def _leave_out(self, planned: Planned, error: Exhausted, output: Path) -> None:
        """Goes on without a subject. Raises UserError once that was so of one of every donor, one after the other."""
        self.exhausted[planned.id] = error.filters
        self._in_vain += 1
        if self._in_vain == len(self.training):
            raise UserError(
                f"{planned.id}: {error}. So it was with {self._in_vain} subjects in turn, as many as there are donors; "
                f"what was finished before is in {output}"
            ) from error
        write_generated(output, {**self.table, "complete": False})
        print(f"{planned.id}: left out; {error}", flush=True)

    def _read(self, planned: Planned) -> tuple[Lesion, LabelMaps]:
        lesion = draw_lesion(planned, self.training, self.lookup, kinds=self.method.kinds, seed=self.seed)
        return lesion, maps_of(planned, lesion, self.lookup, self.guides)

    def _made(self, planned: Planned, maps: LabelMaps) -> Generated:
        """What the generator makes, on the processor."""
        guides = {name: guide.to(self.device) for name, guide in maps.guides.items()}
        there = LabelMaps(maps.label.to(self.device), maps.brain.to(self.device), guides)
        try:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16-mixed"):
                # One call a subject: it depends on no other.
                made = next(iter(self.method.model.generate([there], generator_seed(planned, self.seed))))
        except Exhausted:
            raise
        except UserError as error:
            raise UserError(f"{planned.id}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise UserError(f"{planned.id}: {self.device} lacks the memory; free some, or use device=cpu") from error
        if not torch.isfinite(made.image).all():
            raise UserError(
                f"{planned.id}: the generator made NaN or infinite voxels with precision={self.precision}; "
                "try precision=32-true, then another checkpoint"
            )
        return replace(made, image=made.image.float().cpu(), label=made.label.cpu(), brain=made.brain.cpu())


def _real_store(run: Run, asked: Any) -> Store:
    """The store that the run was trained on. Raises UserError where there is none, or another."""
    path = Path(str(asked or run.conf.data.store)).expanduser()
    if read_cohort(path) is None:
        raise UserError(
            f"store={path}: found no cohort.json, expected the prepared cohort that {run.conf.name} was trained on; "
            "say where it is now: store=FOLDER"
        )
    store = Store(path)
    if lacking := [id for id in run.split.train if id not in store.subjects]:
        raise UserError(
            f"store={path}: found no {', '.join(lacking[:3])}{' …' if len(lacking) > 3 else ''}, expected all "
            f"{len(run.split.train)} training subjects of {run.conf.name}; prepare the cohort again, or set store"
        )
    labels, classes = (run.description["data"][key] for key in ("labels", "classes"))
    if list(store.layout.classes.get(labels, ())) != list(classes):
        raise UserError(
            f"store={path}: found the classes {store.layout.classes.get(labels)}, expected {classes}, which "
            f"{run.conf.name} was trained on; set store to its own cohort"
        )
    return store


def _training(run: Run, store: Store) -> list[StoredSubject]:
    """The labelled subjects of training. Raises UserError where there are none."""
    subjects = [store.subjects[id] for id in run.split.train if store.subjects[id].labelled]
    if not subjects:
        raise UserError(f"{run.conf.name} was trained on no subject with a label, which generation starts from")
    return subjects


def _wanted(conf: DictConfig, training: Sequence[StoredSubject]) -> dict[str, int]:
    """How many subjects or slices, as of ``plan_subjects``."""
    for key in ("subjects", "slices"):
        if conf[key] is not None and (type(conf[key]) is not int or conf[key] < 1):
            raise UserError(f"{key} is {conf[key]!r}; expected a whole number from 1 on, or null")
    if conf.subjects is not None and conf.slices is not None:
        raise UserError(f"subjects={conf.subjects} and slices={conf.slices} both say how many; give one of them")
    return {"slices": conf.slices} if conf.slices is not None else {"subjects": conf.subjects or len(training)}


def _slices_bar() -> Progress:
    """Of the slices of a cohort; elsewhere than on a terminal it shows nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(), disable=not sys.stdout.isatty(), transient=True)
