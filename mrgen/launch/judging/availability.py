"""From segmentors of the availability study to tables and figures: what ``mrgen-evaluate`` does for paper 4."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from mrgen.data.batch import IGNORED
from mrgen.data.crops import Box
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.generated import read_generated
from mrgen.data.normalisation import stored_statistics
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store, StoredSubject
from mrgen.errors import UserError
from mrgen.evaluation.augmentation import Augmentation
from mrgen.evaluation.augmentation_figures import label_figure, median_and_low
from mrgen.evaluation.augmentation_numbers import method_of
from mrgen.evaluation.availability_figures import study_figure
from mrgen.evaluation.availability_numbers import availability_claims, availability_runs, availability_summary
from mrgen.evaluation.availability_tables import TEACHERS, availability_tables
from mrgen.evaluation.figures import SEQUENCES
from mrgen.evaluation.lesion_vaegan_figures import RegisteredSlice, registered_figure, structure_figure
from mrgen.evaluation.table import write_rows
from mrgen.files import write_text
from mrgen.launch.configs import write_config
from mrgen.launch.instantiate import plain
from mrgen.launch.judging.augmenting import held_out, judged_runs, segmenters, trained_on
from mrgen.launch.runs import Run
from mrgen.papers.lesion_vaegan.maps import structure_map

__all__ = ["judge_availability"]

MAPS, MADE, REAL = 24, 5, 3  # in a figure: structure maps, synthetic and real slices


def judge_availability(conf: DictConfig, out_dir: Path) -> Path:
    """The judgement of ``experiment=lesion_vaegan/tables``: all runs on the held-out subjects of their common split.

    Args:
        conf: composed config of ``conf/evaluate.yaml``.
        out_dir: gets ``config.yaml``, ``table.md`` (all tables), ``table.csv`` (one line a row of the study),
            ``runs.csv`` (one a run), ``claims.csv``, ``subjects.csv`` (one a subject, run and region), ``slices.csv``
            (one a slice, run and region that is in reference or prediction), ``indices.csv`` (one a subject, run and
            sequence) and the figures ``study.png`` and ``segmentation.png``; for every synthetic cohort
            ``structure-NAME.png`` and ``cohort-NAME.png``.

    Returns:
        ``out_dir``.

    Raises:
        UserError: runs that do not fit together or do not do what their row says, no lesion segmentors, a synthetic
            cohort that does not fit them, or a subject whose patient a run, or the generator of its synthetic slices or
            of such a cohort, was trained on.
    """
    named = segmenters(conf)
    for run in named.values():
        if not hasattr(run.model, "segment_all"):
            raise UserError(
                f"{run.path} is a {type(run.model).__name__}, which labels no sequence by itself; expected runs of "
                "experiment=lesion_vaegan/availability"
            )
    _check_rows(plain(conf.evaluation.rows), named)
    module, notes = held_out(conf, named)
    cohorts = _cohorts(conf, module)
    tested = _common_slices(named).tested
    regions = module.regions
    judging = {"judged": lambda subject: tested(subject.shape), "measures": ("dice",)}  # no other is printed
    judged = judged_runs(conf, out_dir, named, module, regions, **judging)
    if judged is not None:
        _report(conf, out_dir, judged, named, module, cohorts, [*notes, *_notes(conf, named)])
    return out_dir


def _report(
    conf: DictConfig,
    out_dir: Path,
    judged: Augmentation,
    runs: Mapping[str, Run],
    module: CohortDataModule,
    cohorts: Mapping[str, Store],
    notes: Sequence[str],
) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    write_config(conf, out_dir / "config.yaml")
    study = plain(conf.evaluation)
    title = "SMOKE RUN, not a result: availability" if conf.smoke else "Availability"
    reference, regions = str(study["reference"]), list(module.regions)
    summary = availability_summary(judged.rows, judged.indices, regions=regions, reference=reference)
    claims = availability_claims(judged.rows, judged.indices, regions=regions, study=study)
    of_runs = availability_runs(judged.indices)
    written = {"table": summary, "runs": of_runs, "claims": claims, "subjects": judged.rows, "slices": judged.slices}
    for name, rows in {**written, "indices": judged.indices}.items():
        if rows:
            write_rows(out_dir / f"{name}.csv", rows)
    tables = availability_tables(
        summary,
        claims,
        title=title,
        study=study,
        regions=regions,
        sequences=next(iter(runs.values())).model.sources,
        reference=reference,
        cohorts=[_judged_cohort(name, store, runs) for name, store in cohorts.items()],
        training={method_of(name): trained_on(run) for name, run in runs.items()},
        notes=notes,
    ).values()
    write_text(out_dir / "table.md", "\n".join(table.markdown() for table in tables))
    study_figure(of_runs, out_dir / "study.png", title=f"{title}, Table 2", rows=study["rows"], reference=reference)
    pictured = {id: dict(judged.kept[id]) for id in median_and_low(judged.rows)}
    for kept in pictured.values():  # of repeats the first
        kept["predicted"] = {name: found for name, found in kept["predicted"].items() if name == method_of(name)}
    label_figure(
        pictured,
        out_dir / "segmentation.png",
        title=f"{title}, subjects of median and of low Dice of regions",
        shown=SEQUENCES.get(judged.shown, judged.shown),
        classes=module.classes[1:],
    )
    for name, store in cohorts.items():
        _cohort_figures(conf, out_dir, f"{title}, {name}", name, store, next(iter(runs.values())), module)
    for table in tables:
        table.show()


# ----- runs that are what they are called --------------------------------------------------------------------------


def _check_rows(rows: Mapping[str, Mapping[str, Any]], named: Mapping[str, Run]) -> None:
    """Raises UserError for a run that was trained on other amounts or in another order than the row of its name."""
    for name, run in named.items():
        row, facts = rows.get(method_of(name)), trained_on(run)
        count = run.description["data"].get("slices")  # ×1
        if row is None or count is None:
            continue
        for kind in ("real", "synthetic", "enhanced"):
            found = facts[f"{kind}_slices"]
            if found is not None and abs(found - row[kind] * count) > 1:
                raise UserError(
                    f"{run.path} is called {method_of(name)}, of ×{row[kind]:g} {kind} slices, and was trained on "
                    f"{found}, where ×1 are {count}; train it by experiment=lesion_vaegan/availability, or under "
                    "another name (name=…)"
                )
        if (facts["order"] or "random") != (row["order"] or "random"):
            raise UserError(
                f"{run.path} is called {method_of(name)}, whose order is {row['order'] or 'random'}, and was trained "
                f"{facts['order']}; train it by experiment=lesion_vaegan/availability, or under another name (name=…)"
            )
        if run.description["data"].get("synthetic"):
            raise UserError(
                f"{run.path} is called {method_of(name)} and was trained on a synthetic cohort in place of the real "
                "one; train it by experiment=lesion_vaegan/availability, or under another name (name=…)"
            )


def _common_slices(named: Mapping[str, Run]) -> SiteSlices:
    """Raises UserError for runs that were shown slices of other sizes or places."""
    settings = {name: plain(run.conf.data.sampling) for name, run in named.items()}
    first = next(iter(settings))
    for name, found in settings.items():
        if found != settings[first]:
            raise UserError(
                f"{first} was shown the slices {settings[first]}, {name} {found}; judge runs of one data.sampling"
            )
    slices = named[first].slices
    assert slices is not None
    return slices


def _notes(conf: DictConfig, named: Mapping[str, Run]) -> list[str]:
    notes = [f"Runs: {', '.join(f'{name} {run.path.name} ({run.checkpoint.stem})' for name, run in named.items())}."]
    if not any(method_of(name) == conf.evaluation.reference for name in named):
        notes.append(f"No run is called {conf.evaluation.reference}: nothing is compared with all real slices alone.")
    made: dict[str, list[str]] = {}
    for name, run in named.items():
        if (facts := trained_on(run))["synthetic_slices"]:
            made.setdefault(str(facts["made"]), []).append(name)
    if len(made) > 1:
        groups = "; ".join(", ".join(names) for names in made.values())
        notes.append(
            f"THE ROWS' SYNTHETIC SLICES ARE OF {len(made)} COHORTS, and so differ in more than amount: {groups}."
        )
    return notes


# ----- synthetic cohorts -------------------------------------------------------------------------------------------


def _cohorts(conf: DictConfig, module: CohortDataModule) -> dict[str, Store]:
    """Of ``evaluation.cohorts`` by name. Raises UserError where one does not fit, or knows an evaluated patient."""
    found: dict[str, Store] = {}
    evaluated = {module.store.subjects[id].patient for id in module.split.test}
    for path in map(Path, plain(conf.evaluation.cohorts) or ()):
        where, record = f"evaluation.cohorts: {path}", read_generated(path)
        if record is None:
            raise UserError(
                f"{where}: found no synthetic cohort there, expected one; make it with mrgen-synthesize "
                "checkpoint=GENERATION_RUN structure=STRUCTURE_RUN output=STORE"
            )
        if not record["complete"]:
            raise UserError(f"{where}: its making was interrupted; run the same mrgen-synthesize again")
        if "filters" not in record or "scheme" not in record:
            raise UserError(
                f"{where}: made by {record['method']}, which filters nothing; expected a lesion VAE-GAN's cohort"
            )
        if leaked := sorted(evaluated & set(record["patients"])):
            raise UserError(
                f"{where}: {record['method']} was trained on {len(leaked)} of the {len(evaluated)} patients to "
                f"evaluate ({', '.join(leaked[:3])}{' …' if len(leaked) > 3 else ''}); train all stages with one "
                "split: data.split.kind=file data.split.file=RUN/split.json"
            )
        store = Store(path)
        if lacking := [name for name in module.modalities if name not in store.modalities]:
            raise UserError(f"{where}: holds {', '.join(store.modalities)}, without {', '.join(lacking)}")
        if path.name in found:
            raise UserError(
                f"{where}: found two cohorts called {path.name}; give every one once, by names of their own"
            )
        found[path.name] = store
    return found


def _judged_cohort(name: str, store: Store, runs: Mapping[str, Run]) -> dict[str, Any]:
    """A line of Table 1."""
    record = read_generated(store.path)
    assert record is not None
    judge = record.get("segmentors")  # "sha256:…", or none but its own
    if judge is None:
        judge = TEACHERS
    else:
        judge = next((run for run in runs if judge == f"sha256:{runs[run].digest()}"), f"checkpoint {judge[:15]}…")
    told = {key: record["filters"][key] for key in ("candidates", "kept", "dice", "mse")}
    return {"name": name, "scheme": record["scheme"], "judge": judge, **told}


def _cohort_figures(
    conf: DictConfig, out_dir: Path, title: str, name: str, store: Store, run: Run, module: CohortDataModule
) -> None:
    """In the manner of the paper's Figures 8 and 9; below synthetic slices some of the test subjects."""
    assert run.slices is not None
    subjects = _spread(list(store.subjects.values()), MAPS)
    share = -(-MAPS // len(subjects))
    maps = [s.read_structure()[..., z] for s in subjects for z in _spread(range(s.shape[2]), share)]
    structure_figure(maps[:MAPS], out_dir / f"structure-{name}.png", title=f"{title}: structure maps from noise")
    lookup = store.layout.label_lookup(run.description["data"]["labels"])
    rows = []
    for subject in _spread(subjects, MADE):
        whole: Box = tuple((0, size) for size in subject.shape)  # type: ignore[assignment]
        image, brain, label, z = _fullest(subject, whole, range(subject.shape[2]), module, lookup, run)
        rows.append(RegisteredSlice(subject.id, subject.read_structure()[..., z], brain, label, image))
    for subject in (module.store.subjects[id] for id in _spread(module.split.test, REAL)):
        shown = run.slices.training(subject.shape, subject.site)
        box = run.slices.box(subject.shape, subject.site)
        image, brain, label, _ = _fullest(subject, box, shown, module, module.lookup, run)
        edges = structure_map(torch.from_numpy(image[:1])[None], float(conf.evaluation.beta))[0, 0].numpy()
        edges = edges * (label == 0)  # as the generator is shown it
        rows.append(RegisteredSlice(f"real: {subject.id}", edges, brain, label, image, real=True))
    first = SEQUENCES.get(module.modalities[0], module.modalities[0])
    registered_figure(
        rows,
        out_dir / f"cohort-{name}.png",
        modalities=module.modalities,
        classes=module.classes,
        title=f"{title}: synthetic slices; below real ones of test subjects, with the structure maps of their {first}",
    )


def _fullest(
    subject: StoredSubject, box: Box, places: Sequence[int], module: CohortDataModule, lookup: np.ndarray, run: Run
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of the axial slices at some places the one with the most lesion, as segmentors are shown it.

    Returns:
        Image (C, X, Y), brain and label (X, Y) in the box, and the slice's place.
    """
    x, y, _ = box
    label = lookup[subject.read_label(box)][..., list(places)]
    chosen = int(((label > 0) & (label != IGNORED)).sum(axis=(0, 1)).argmax())
    z = places[chosen]
    only = (x, y, (z, z + 1))
    brain = np.ascontiguousarray(subject.read_brain(only))
    recorded = stored_statistics(run.normalisation, subject, module.modalities)
    image = torch.from_numpy(subject.read_image(module.modalities, only))
    image = run.normalisation(image, torch.from_numpy(brain), recorded)
    return image[..., 0].numpy(), brain[..., 0], label[..., chosen], z


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many, evenly spread."""
    count = min(count, len(items))
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]
