"""The bench: every imputer under the same judges, every generator in the same mixes, in two tables.

Runs are told apart by what they do. The judging itself is that of ``evaluating``, once a judge, and of ``augmenting``;
what these write lies in folders of their own beside the bench's tables.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mrgen.errors import UserError
from mrgen.evaluation.bench_figures import change_figure, changes
from mrgen.evaluation.bench_tables import (
    augmentation_bench,
    augmentation_bench_tables,
    imputation_bench,
    imputation_bench_tables,
)
from mrgen.evaluation.figures import SEQUENCES
from mrgen.evaluation.table import Table, write_rows
from mrgen.files import write_text
from mrgen.launch.configs import write_config
from mrgen.launch.judging.augmenting import augmented
from mrgen.launch.judging.evaluating import by_name, by_subjects, finished_runs, judged_by, load_segmenter
from mrgen.launch.judging.reporting import report
from mrgen.launch.runs import Run, load_run
from mrgen.protocols import Segmenter, Synthesizer

__all__ = ["judge_bench"]


@dataclass
class _Bench:
    """Runs by what they are on the bench.

    Attributes:
        judges: segmenters of volumes.
        imputers: make one sequence from another.
        segmenters: of slices, trained with a generator's synthetic cohort or without.
    """

    judges: list[Run] = field(default_factory=list)
    imputers: list[Run] = field(default_factory=list)
    segmenters: list[Run] = field(default_factory=list)


def judge_bench(conf: DictConfig, out_dir: Path) -> Path:
    """The judgement of ``experiment=bench``.

    Args:
        conf: composed config of ``conf/evaluate.yaml``; ``segmenter`` may be a list of judges.
        out_dir: gets ``config.yaml`` and ``table.md`` (all of the bench's tables). Of imputers ``imputation.csv`` and
            ``imputation.png``, and for each judge ``imputation-JUDGE/``, what ``experiment=t1_to_t2/swap`` writes. Of
            segmenters of slices ``augmentation.csv`` and ``augmentation.png``, and ``augmentation/``, what
            ``experiment=samr/tables`` writes.

    Returns:
        ``out_dir``.

    Raises:
        UserError: nothing to judge, no judge, runs that cannot stand in one table, or an evaluated subject that one of
            them was trained on.
    """
    bench = _sorted(conf)
    tables: list[Table] = []
    if bench.imputers:
        _check_alike(conf, bench)
        tables += _imputation(bench, conf, out_dir)
    if bench.segmenters:
        tables += _augmentation(bench.segmenters, conf, out_dir)
    if tables:  # and not in a process that is not to write
        write_config(conf, out_dir / "config.yaml")
        write_text(out_dir / "table.md", "\n".join(table.markdown() for table in tables))
        for table in tables:
            table.show()
    return out_dir


def _sorted(conf: DictConfig) -> _Bench:
    """All runs that were given. Raises UserError where they do not make a table."""
    if conf.subjects not in ("test", "val"):
        raise UserError(f"subjects is {conf.subjects}; the bench is of held-out subjects: expected test or val")
    judges = list(conf.segmenter) if OmegaConf.is_list(conf.segmenter) else [conf.segmenter] * bool(conf.segmenter)
    bench = _Bench(judges=[load_segmenter(path) for path in judges])
    for run in map(load_run, finished_runs(conf)):
        if isinstance(run.model, Synthesizer):
            bench.imputers.append(run)
        elif isinstance(run.model, Segmenter):
            (bench.judges if run.slices is None else bench.segmenters).append(run)
        else:
            print(f"{run.path}: a {type(run.model).__name__}, whom segmenters with its synthetic cohort stand for")
    if not (bench.imputers or bench.segmenters):
        raise UserError(
            "found neither imputers nor segmenters of slices among the runs; expected runs of experiment=bench/rsnet, "
            "t1_to_t2/pix2pix … for the first table, of samr/unet and samr/unet_mixed for the second"
        )
    return bench


def _check_alike(conf: DictConfig, bench: _Bench) -> None:
    """Raises UserError for imputers that do different things, or judges that would not see the same subjects."""
    if not bench.judges:
        raise UserError("no judge for the imputers; give runs of S-Net, DeepMedic or both: segmenter=[RUN,RUN]")
    first, *others = bench.imputers
    for run in others:
        if (run.model.sources, run.model.targets) != (first.model.sources, first.model.targets):
            raise UserError(
                f"{first.path} makes {_does(first)}, {run.path} {_does(run)}; the bench compares what is made from the "
                "same: train RS-Net by experiment=bench/rsnet, others with model.source=… or model.sources=[…]"
            )
    if len(groups := by_subjects(conf, bench.judges)) > 1:
        one, other = (group[0].path for group in groups[:2])
        raise UserError(
            f"{one} and {other} have other {conf.subjects} subjects or stores; train all judges with one split: "
            "data.split.kind=file data.split.file=RUN/split.json"
        )


def _does(run: Run) -> str:
    return f"{', '.join(run.model.targets)} from {', '.join(run.model.sources)}"


def _imputation(bench: _Bench, conf: DictConfig, out_dir: Path) -> list[Table]:
    """The first table, and what belongs to it; none in processes that are not to write it."""
    judged: dict[str, Sequence[dict[str, Any]]] = {}
    regions, notes = [str(name) for name in conf.evaluation.regions], []
    for name, judge in by_name(bench.judges).items():
        folder = out_dir / f"imputation-{name}"
        part = _part(conf, {"kind": "translation", "regions": regions}, segmenter=str(judge.path))
        found = judged_by(judge, bench.imputers, part, folder)
        if found is None:
            continue
        if not any(f"dice_{region}" in row for row in found.rows for region in regions):
            raise UserError(
                f"{judge.path}: found no label with the regions {', '.join(regions)} among its {conf.subjects} "
                "subjects, expected some; set evaluation.regions to those of the cohort, or judge labelled subjects"
            )
        report(found, part, folder)
        judged[name] = found.rows
        notes += [told for note in found.notes if (told := note.replace("all real:", f"{name}:")) not in notes]
    if not judged:
        return []
    lines = imputation_bench(judged, regions=regions)
    write_rows(out_dir / "imputation.csv", lines)
    model = bench.imputers[0].model
    source, target = (SEQUENCES.get(names[0], names[0]) for names in (model.sources, model.targets))
    title = _titled(conf, f"{target} from {source}")
    panels = {
        f"judged by {judge}": {region: changes(lines, f"{judge}_dice_{region}", "by") for region in regions}
        for judge in judged
    }
    measure = "change of Dice against the real sequence (points)"
    change_figure(panels, out_dir / "imputation.png", title=title, measure=measure)
    count = len({row["subject"] for rows in judged.values() for row in rows})
    return imputation_bench_tables(
        lines, judges=list(judged), regions=regions, title=title, subjects=count, notes=notes
    )


def _augmentation(runs: Sequence[Run], conf: DictConfig, out_dir: Path) -> list[Table]:
    """The second table likewise."""
    evaluation = {"kind": "augmentation", "reference": str(conf.evaluation.reference), "shown": conf.evaluation.shown}
    part = _part(conf, evaluation, segmenter=None, runs=[str(run.path) for run in runs], sweep=None)
    judged = augmented(part, out_dir / "augmentation")
    if judged is None:
        return []
    reference, labels = evaluation["reference"], list(judged.labels)
    lines = augmentation_bench(judged.rows, labels=labels, reference=reference)
    write_rows(out_dir / "augmentation.csv", lines)
    of_labels = {label: [line for line in lines if line["label"] == label] for label in labels}
    panel = {label: changes(found, "dice", "input") for label, found in of_labels.items()}
    title = _titled(conf, "synthetic training slices")
    measure = f"change of Dice against {reference}"
    change_figure({"": panel}, out_dir / "augmentation.png", title=title, measure=measure)
    return augmentation_bench_tables(lines, reference=reference, title=title)


def _part(conf: DictConfig, evaluation: dict[str, Any], **changed: Any) -> DictConfig:
    """The config of one of the judgements that the bench is made of."""
    part = copy.deepcopy(conf)
    for key, value in {"evaluation": evaluation, **changed}.items():
        OmegaConf.update(part, key, value, merge=False, force_add=True)
    return part


def _titled(conf: DictConfig, name: str) -> str:
    return f"SMOKE RUN, not a result: bench, {name}" if conf.smoke else f"Bench, {name}"
