"""From segmenters with and without synthetic training slices to tables: what ``mrgen-evaluate`` does for paper 2.

``mrgen.launch.judging.availability`` judges such runs by the same checks and for paper 4.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from mrgen.data.datamodule import CohortDataModule
from mrgen.errors import UserError
from mrgen.evaluation.augmentation import Augmentation
from mrgen.evaluation.augmentation_figures import dice_figure, label_figure, median_and_low
from mrgen.evaluation.augmentation_numbers import augmentation_summary, method_of
from mrgen.evaluation.augmentation_tables import augmentation_tables
from mrgen.evaluation.cross_validation import Method
from mrgen.evaluation.figures import SEQUENCES
from mrgen.evaluation.table import write_rows
from mrgen.files import write_text
from mrgen.launch.configs import write_config
from mrgen.launch.instantiate import plain
from mrgen.launch.judging.evaluating import by_name, by_subjects, check_leaks, finished_runs, whole_volumes
from mrgen.launch.runs import Run, load_run
from mrgen.launch.trainer import build_trainer
from mrgen.launch.training import checked_seed
from mrgen.protocols import Segmenter

__all__ = ["augmented", "held_out", "judge_augmentation", "judged_runs", "segmenters", "trained_on"]


def judge_augmentation(conf: DictConfig, out_dir: Path) -> Path:
    """The judgement of ``experiment=samr/tables``: all runs on the held-out subjects of their common split.

    Args:
        conf: composed config of ``conf/evaluate.yaml``.
        out_dir: gets ``config.yaml``, ``table.md`` (all tables), ``table.csv`` (their numbers), ``subjects.csv`` (one
            line a subject, run and label), ``slices.csv`` (one a slice, run and label that is in reference or
            prediction) and the figures ``segmentation.png`` and ``dice.png``.

    Returns:
        ``out_dir``.

    Raises:
        UserError: runs that do not fit together, or a subject whose patient a run, or the generator behind its
            synthetic slices, was trained on.
    """
    augmented(conf, out_dir)
    return out_dir


def augmented(conf: DictConfig, out_dir: Path) -> Augmentation | None:
    """As ``judge_augmentation``: what was judged, once it is written; None in processes that do not write it."""
    named = segmenters(conf)
    module, notes = held_out(conf, named)
    notes += [f"{name}: {run.path.name} ({run.checkpoint.stem})." for name, run in named.items()]
    reference = str(conf.evaluation.reference)
    if not any(method_of(name) == reference for name in named):
        notes.append(f"No run is called {reference}: nothing is compared with real slices alone.")
    labels = {name: [number] for number, name in enumerate(module.classes) if number}
    if (judged := judged_runs(conf, out_dir, named, module, labels)) is not None:
        _report(conf, out_dir, judged, named, module, notes)
    return judged


def segmenters(conf: DictConfig) -> dict[str, Run]:
    """The runs to judge by name; repeated ones carry a running number.

    Raises:
        UserError: no segmenters of slices, runs whose numbers could not be compared, or repeats that were trained on
            other data or for other times.
    """
    if conf.subjects not in ("test", "val"):
        raise UserError(f"subjects is {conf.subjects}; runs are judged on their common split: expected test or val")
    checked_seed(conf.seed)
    runs = [load_run(path) for path in finished_runs(conf)]
    for run in runs:
        if not isinstance(run.model, Segmenter) or run.slices is None:
            raise UserError(
                f"{run.path} is a {type(run.model).__name__}, which segments no slices; expected runs of a segmenter "
                "such as experiment=samr/unet"
            )
    _check_alike(conf, runs)
    named = by_name(runs)
    _check_repeats(named)
    return named


def held_out(conf: DictConfig, named: Mapping[str, Run]) -> tuple[CohortDataModule, list[str]]:
    """Whole volumes of the held-out subjects, and what a reader of the table must know of them.

    Raises:
        UserError: subjects without a label; a run called as the reference that knows synthetic slices; or a subject
            whose patient a run, or the generator behind its synthetic slices, was trained on.
    """
    runs = list(named.values())
    module = whole_volumes(conf, runs[0], runs)  # the first as all others: they read the same sequences
    unlabelled = [id for id in module.split.test if not module.store.subjects[id].labelled]
    if unlabelled:
        raise UserError(f"{', '.join(unlabelled[:3])}: no label, which this judgement needs; judge labelled subjects")
    reference = str(conf.evaluation.reference)
    for name, run in named.items():
        if method_of(name) == reference and run.description["data"].get("synthetic"):
            raise UserError(
                f"{run.path} is called {reference}, as the one on real slices alone, and was trained on a synthetic "
                "cohort; train it under another name (name=…)"
            )
    leaks = check_leaks(module, runs, module.split.test)
    return module, [f"Subjects: the {conf.subjects} part of the runs' common split, {module.store.path.name}.", *leaks]


def judged_runs(
    conf: DictConfig,
    out_dir: Path,
    named: Mapping[str, Run],
    module: CohortDataModule,
    labels: Mapping[str, Sequence[int]],
    **judging: Any,
) -> Augmentation | None:
    """The judgement of all runs; None in processes that are not to write it.

    Args:
        conf: composed config of ``conf/evaluate.yaml``.
        out_dir: of the trainer.
        named, module: of ``segmenters`` and ``held_out``.
        labels, **judging: as of ``Augmentation``.
    """
    pl.seed_everything(checked_seed(conf.seed), verbose=False)
    shown = str(conf.evaluation.shown)
    judged = Augmentation(
        methods={name: Method(run.model, run.normalisation, run.slices) for name, run in named.items() if run.slices},
        modalities=module.modalities,
        labels=labels,
        subjects={id: module.store.subjects[id] for id in module.split.test},
        shown=shown if shown in module.modalities else module.modalities[0],
        **judging,
    )
    trainer = build_trainer(conf.trainer, out_dir, callbacks=[], loggers=[])
    trainer.test(judged, datamodule=module, verbose=False)
    return judged if trainer.is_global_zero else None


def _report(
    conf: DictConfig,
    out_dir: Path,
    judged: Augmentation,
    runs: Mapping[str, Run],
    module: CohortDataModule,
    notes: Sequence[str],
) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    write_config(conf, out_dir / "config.yaml")
    evaluation = plain(conf.evaluation)
    title = "SMOKE RUN, not a result: augmentation" if conf.smoke else "Augmentation"
    labels, paper = _labels(evaluation, module.classes)
    reference = str(evaluation["reference"])
    write_rows(out_dir / "subjects.csv", judged.rows)
    write_rows(out_dir / "slices.csv", judged.slices)
    summary = augmentation_summary(judged.rows, labels=list(labels), reference=reference)
    write_rows(out_dir / "table.csv", summary)
    tables = augmentation_tables(
        judged.rows,
        title=title,
        labels=labels,
        reference=reference,
        experiments=evaluation.get("experiments") or (),
        claims=evaluation.get("claims") or (),
        training={name: trained_on(run) for name, run in runs.items()},
        paper=paper,
        notes=notes,
    ).values()
    write_text(out_dir / "table.md", "\n".join(table.markdown() for table in tables))
    pictured = {id: judged.kept[id] for id in median_and_low(judged.rows)}
    label_figure(
        pictured,
        out_dir / "segmentation.png",
        title=f"{title}, subjects of median and of low Dice",
        shown=SEQUENCES.get(judged.shown, judged.shown),
        classes=module.classes[1:],
    )
    dice_figure(judged.rows, out_dir / "dice.png", title=f"{title}, Dice", labels=list(labels), reference=reference)
    for table in tables:
        table.show()


def _labels(evaluation: Mapping[str, Any], classes: Sequence[str]) -> tuple[dict[str, str], Any]:
    """Classes to report with their names in the paper, and the paper; where a cohort lacks one, its own and none."""
    named = {str(label): str(name) for name, label in (evaluation.get("labels") or {}).items()}
    if named and set(named) <= set(classes):
        return named, evaluation.get("paper")
    return {name: name for name in classes[1:]}, None


def _check_alike(conf: DictConfig, runs: Sequence[Run]) -> None:
    """Raises UserError where numbers of two runs could not be compared."""
    if len({run.checkpoint.resolve() for run in runs}) < len(runs):
        raise UserError("runs names a run twice; give every run once")
    if len(groups := by_subjects(conf, list(runs))) > 1:
        one, other = (group[0].path for group in groups[:2])
        raise UserError(
            f"{one} and {other} have other {conf.subjects} subjects or stores; train all runs with one split: "
            "data.split.kind=file data.split.file=RUN/split.json"
        )
    for what, values in {
        "sequences": {run.path: tuple(run.model.sources) for run in runs},
        "classes": {run.path: tuple(_classes(run)) for run in runs},
    }.items():
        first, found = runs[0].path, values[runs[0].path]
        for path, value in values.items():
            if value != found:
                raise UserError(
                    f"{first} knows the {what} {', '.join(found)}, {path} {', '.join(value)}; judge those of one kind "
                    "at a time"
                )


def _check_repeats(named: Mapping[str, Run]) -> None:
    """Raises UserError for runs of one name that differ in more than their seed: they would be averaged."""
    first: dict[str, Run] = {}
    for name, run in named.items():
        other = first.setdefault(method_of(name), run)
        if trained_on(run) != trained_on(other):
            raise UserError(
                f"{other.path} and {run.path} are both called {method_of(name)} and were trained on other data or for "
                "other times; train one of them under another name (name=…), or judge one at a time"
            )


def _classes(run: Run) -> list[str]:
    return [str(name) for name in run.conf.data.layout.classes[run.conf.data.labels]]


def trained_on(run: Run) -> dict[str, Any]:
    """How a run was trained; None where its checkpoint does not say."""
    data, trained = run.description["data"], run.description.get("training") or {}
    mix, size = data.get("mix"), run.conf.data.get("batch_size")
    return {
        "real_slices": (mix or {}).get("real_slices", data.get("slices")),
        "synthetic_slices": mix["synthetic_slices"] if mix else 0 if "mix" in data else None,
        "enhanced_slices": mix.get("enhanced_slices", 0) if mix else 0 if "mix" in data else None,
        "order": mix.get("order") if mix else None,
        "whole_cohort": "synthetic" if data.get("synthetic") else None,
        "epochs": trained.get("epochs"),
        "steps": trained.get("steps"),
        "batch_size": size * trained["devices"] if size and trained else None,
        "equal_steps": mix["equal_steps"] if mix else None,
        "made": mix.get("made") if mix else None,
    }
