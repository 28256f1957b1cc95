"""From the runs of a cross-validation to its tables: what ``mrgen-evaluate`` does for paper 3."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from mrgen.data.batch import IGNORED
from mrgen.data.datamodule import CohortDataModule
from mrgen.errors import UserError
from mrgen.evaluation.cross_validation import CrossValidation, Method
from mrgen.evaluation.cross_validation_figures import imputation_figure, places_figure, segmentation_figure
from mrgen.evaluation.cross_validation_numbers import cross_validation_summary
from mrgen.evaluation.cross_validation_tables import cross_validation_tables
from mrgen.evaluation.figures import SEQUENCES
from mrgen.evaluation.table import write_rows
from mrgen.files import write_text
from mrgen.launch.configs import find_config, read_config, write_config
from mrgen.launch.instantiate import plain
from mrgen.launch.judging.evaluating import by_name, by_subjects, check_leaks, finished_runs, whole_volumes
from mrgen.launch.runs import Run, load_run
from mrgen.launch.status import seen_status
from mrgen.launch.trainer import build_trainer
from mrgen.launch.training import checked_seed
from mrgen.protocols import Segmenter

__all__ = ["cross_validate"]

LOADS = (0.15, 0.5, 0.85)  # of the subjects ordered by lesion volume: who is pictured


def cross_validate(conf: DictConfig, out_dir: Path) -> Path:
    """The judgement of ``experiment=joint_imputation/tables``: each run on the test subjects of its own fold.

    What is there is judged; a fold that a method lacks is named, on the console and under the first table.

    Args:
        conf: composed config of ``conf/evaluate.yaml``.
        out_dir: gets ``config.yaml``, ``table.md`` (all tables), ``table.csv`` (their numbers), ``subjects.csv`` (one
            line a subject and method), ``lesions.csv`` (one line a reference lesion and method) and the figures
            ``segmentation.png``, ``places.png`` and, where a method imputes, ``imputation.png``.

    Returns:
        ``out_dir``.

    Raises:
        UserError: runs that do not fit together, or a subject that a run was trained on.
    """
    if conf.subjects not in ("test", "val"):
        raise UserError(f"subjects is {conf.subjects}; every run is judged on its own fold: expected test or val")
    seed, runs = checked_seed(conf.seed), [load_run(path) for path in finished_runs(conf)]
    for run in runs:
        if not isinstance(run.model, Segmenter) or run.slices is None:
            raise UserError(
                f"{run.path} is a {type(run.model).__name__}, which finds no lesions in slices; expected runs of "
                "experiment=joint_imputation/cross_validation"
            )
    tasks = {(run.model.sources[0], str(run.conf.target), str(conf.store or run.conf.data.store)) for run in runs}
    if len(tasks) > 1:
        each = "; ".join(f"{target} from {source} on {store}" for source, target, store in sorted(tasks))
        raise UserError(f"the runs have several tasks: {each}; judge those of one source, target and store at a time")
    (source, target, _) = tasks.pop()
    groups = [by_name(group) for group in by_subjects(conf, runs)]
    _check_once(conf, groups)
    missing = _missing(conf, groups)
    modules = [whole_volumes(conf, None, list(named.values())) for named in groups]
    subjects = {id: module.store.subjects[id] for module in modules for id in module.split.test}
    unlabelled = [id for id, subject in subjects.items() if not subject.labelled]
    if unlabelled:
        raise UserError(f"{', '.join(unlabelled[:3])}: no label, which this judgement needs; leave out their runs")
    pictured = _pictured(groups, modules)
    notes = [f"Subjects: the {conf.subjects} parts of the runs' own folds."]
    for line in missing:
        notes.append(f"MISSING: {line}.")
        print(f"missing: {line}")
    for named, module in zip(groups, modules, strict=True):  # of all folds, before the first is computed
        notes += check_leaks(module, list(named.values()), module.split.test)
        for run in named.values():
            _check_trained(run)
    rows: list[dict[str, Any]] = []
    lesions: list[dict[str, Any]] = []
    kept: dict[str, dict[str, Any]] = {}
    for named, module in zip(groups, modules, strict=True):
        pl.seed_everything(seed, verbose=False)
        first = next(iter(named.values()))
        judged = CrossValidation(
            methods={
                name: Method(run.model, run.normalisation, run.slices) for name, run in named.items() if run.slices
            },
            modalities=module.modalities,
            source=source,
            target=target,
            subjects=subjects,
            fold=_fold(first),
            pictured=pictured,
        )
        trainer = build_trainer(conf.trainer, out_dir, callbacks=[], loggers=[])
        trainer.test(judged, datamodule=module, verbose=False)
        rows += judged.rows
        lesions += judged.lesions
        kept |= judged.kept
    everyone = [run for named in groups for run in named.values()]
    notes.append(f"Runs: {', '.join(f'{run.path.name} ({run.checkpoint.stem})' for run in everyone)}.")
    if trainer.is_global_zero:
        _report(conf, out_dir, rows, lesions, {id: kept[id] for id in pictured}, (source, target), notes)
    return out_dir


def _report(
    conf: DictConfig,
    out_dir: Path,
    rows: Sequence[Mapping[str, Any]],
    lesions: Sequence[Mapping[str, Any]],
    kept: Mapping[str, Mapping[str, Any]],
    sequences: tuple[str, str],
    notes: Sequence[str],
) -> None:
    """Writes all files; ``sequences`` are source and target."""
    source, target = (SEQUENCES.get(name, name) for name in sequences)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_config(conf, out_dir / "config.yaml")
    title = "SMOKE RUN, not a result: cross-validation" if conf.smoke else "Cross-validation"
    paper = plain(conf.evaluation.get("paper"))
    write_rows(out_dir / "subjects.csv", rows)
    write_rows(out_dir / "lesions.csv", lesions)
    write_rows(out_dir / "table.csv", cross_validation_summary(rows, paper=paper))
    tables = cross_validation_tables(rows, lesions, title=title, paper=paper, notes=notes).values()
    write_text(out_dir / "table.md", "\n".join(table.markdown() for table in tables))
    methods = list(dict.fromkeys(str(row["input"]) for row in rows))
    named = {"title": f"{title}, segmentation", "source": source, "target": target}
    segmentation_figure(kept, out_dir / "segmentation.png", methods=methods, **named)
    places_figure(rows, lesions, out_dir / "places.png", title=f"{title}, errors")
    if any(slices["synthetic"] for slices in kept.values()):
        imputation_figure(kept, out_dir / "imputation.png", title=f"{title}, imputation", target=target)
    for table in tables:
        table.show()


def _check_trained(run: Run) -> None:
    """Raises UserError for a run of several stages that stopped before it could segment."""
    try:
        getattr(run.model, "check_trained", lambda: None)()
    except UserError as error:
        raise UserError(f"{run.path}: {error}") from error


def _fold(run: Run) -> int:
    split = run.conf.data.split
    return int(split.fold) if split.kind == "folds" else 0


def _check_once(conf: DictConfig, groups: Sequence[Mapping[str, Run]]) -> None:
    """Raises UserError where a method would judge a subject in two folds: they are of two cross-validations then."""
    seen: dict[tuple[str, str], Path] = {}
    for named in groups:
        for name, run in named.items():
            for id in getattr(run.split, str(conf.subjects)):
                if (name, id) in seen:
                    raise UserError(
                        f"{name} would judge {id} twice, by {seen[name, id]} and {run.path}; runs of one name must be "
                        "the folds of one cross-validation: judge them one by one, or give other names (name=…)"
                    )
                seen[name, id] = run.path


def _missing(conf: DictConfig, groups: Sequence[Mapping[str, Run]]) -> list[str]:
    """One line a method that lacks folds, with what became of them where their folders say so."""
    names = list(dict.fromkeys(name for named in groups for name in named))
    everyone = [run for named in groups for run in named.values()]
    folds = max((int(run.conf.data.split.folds) for run in everyone if run.conf.data.split.kind == "folds"), default=1)
    there = {(name, _fold(run)) for named in groups for name, run in named.items()}
    told = _unfinished(conf)
    names += [name for name, _ in told if name not in names]
    lines = []
    for name in names:
        if absent := [fold for fold in range(folds) if (name, fold) not in there]:
            each = ", ".join(f"{fold}{told.get((name, fold), '')}" for fold in absent)
            lines.append(f"{name}, fold{'s' * (len(absent) > 1)} {each}")
    return lines


def _unfinished(conf: DictConfig) -> dict[tuple[str, int], str]:
    """Of the sweeps' runs that are not finished: what their folders say, by name and fold."""
    sweeps = [] if conf.sweep is None else list(conf.sweep) if OmegaConf.is_list(conf.sweep) else [conf.sweep]
    told = {}
    for sweep in sweeps:
        for status in sorted(Path(str(sweep)).expanduser().glob("*/status.json")):
            said, run = seen_status(status.parent), status.parent
            saved = find_config(run)
            if said["state"] == "finished" or saved is None:
                continue
            try:
                found = plain(read_config(saved))
            except UserError as error:
                print(f"{run}: {error}", flush=True)
                continue
            reason = f": {said['reason']}" if "reason" in said else ""
            told[(str(found["name"]), int(found.get("fold") or 0))] = f" ({run.name} is {said['state']}{reason})"
    return told


def _pictured(groups: Sequence[Mapping[str, Run]], modules: Sequence[CohortDataModule]) -> list[str]:
    """Subjects of low, medium and high lesion load, of those that the most methods judged."""
    most = max(len(named) for named in groups)
    loads: dict[str, float] = {}  # ml
    for named, module in zip(groups, modules, strict=True):
        for id in module.split.test if len(named) == most else ():
            subject = module.store.subjects[id]
            counts = (subject.label_counts or {}).items()
            lesion = sum(count for number, count in counts if 0 < module.lookup[number] < IGNORED)
            loads[id] = lesion * float(np.prod(subject.spacing)) / 1000
    ordered = sorted(loads, key=lambda id: (loads[id], id))
    return list(dict.fromkeys(ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in LOADS))
