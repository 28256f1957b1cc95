"""From the runs of generators to sheets of samples and a reader's study: what ``mrgen-evaluate`` shows of paper 2."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from mrgen.data.batch import IGNORED
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.normalisation import Symmetric
from mrgen.data.slices import SiteSlices
from mrgen.data.store import StoredSubject
from mrgen.errors import UserError
from mrgen.evaluation.blind_sheet import (
    BlindItem,
    preference_table,
    read_answers,
    read_key,
    score,
    write_blind_sheet,
)
from mrgen.evaluation.samples import (
    Method,
    Reading,
    manipulations,
    most_lesion,
    preference_reference,
    sample_rows,
    sample_summary,
    sample_tables,
)
from mrgen.evaluation.samples_figures import SheetRow, sample_sheet
from mrgen.evaluation.swap import REAL
from mrgen.evaluation.table import Table, write_rows
from mrgen.files import write_text
from mrgen.launch.configs import write_config
from mrgen.launch.instantiate import plain
from mrgen.launch.judging.evaluating import by_name, by_subjects, check_leaks, finished_runs
from mrgen.launch.runs import Run, load_run
from mrgen.launch.training import build_datamodule, checked_seed
from mrgen.protocols import Generator, LabelMaps

__all__ = ["KEYS", "draw_samples"]

KEYS = ("blind", "answers", "key")  # of conf/evaluate.yaml that mean something here alone


def draw_samples(conf: DictConfig, out_dir: Path) -> Path:
    """The sheets of ``experiment=samr/samples``, its blind sheet, or what a reader's answers to that say.

    Args:
        conf: composed config of ``conf/evaluate.yaml``.
        out_dir: gets ``config.yaml`` and, of the sheets, ``methods-SUBJECT.png`` and ``manipulations-SUBJECT.png`` of
            the pictured subjects, ``table.md``, ``table.csv`` (its numbers) and ``subjects.csv`` (one line a subject,
            input and sequence); with ``blind=true`` instead ``blind/sheet.html`` and ``key/``, because the pictures
            would give the answers away; with ``answers`` and ``key`` ``table.md`` and ``table.csv``.

    Returns:
        ``out_dir``.

    Raises:
        UserError: runs that are no generators or do not fit together, a subject that one of them was trained on, or
            answers that do not fit the key.
    """
    seed = checked_seed(conf.seed)
    for name in ("subjects", "items"):
        value = conf.evaluation[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"evaluation.{name} is {value!r}; expected a whole number from 1 on")
    if not isinstance(conf.blind, bool):
        raise UserError(f"blind is {conf.blind!r}; expected true or false")
    if conf.answers is not None or conf.key is not None:
        tables = _scored(conf, out_dir)
    else:
        runs = [load_run(path) for path in finished_runs(conf)]
        datamodule = _checked(conf, runs)
        notes = check_leaks(datamodule, runs, datamodule.split.test)
        sheets = _Sheets(conf, datamodule, by_name(runs), seed)
        if conf.blind:
            sheets.blind(out_dir)
            tables = []
        else:
            tables = sheets.samples(out_dir, notes)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_config(conf, out_dir / "config.yaml")
    if tables:
        write_text(out_dir / "table.md", "\n".join(table.markdown() for table in tables))
    for table in tables:
        table.show()
    return out_dir


def _scored(conf: DictConfig, out_dir: Path) -> list[Table]:
    """A reader's answers, resolved by the key."""
    if conf.answers is None or conf.key is None:
        lacking = "key" if conf.key is None else "answers"
        raise UserError(f"{lacking} is not set; give both: answers=answers.csv key=RESULTS/key/key.csv")
    if conf.blind or conf.runs or conf.sweep:
        raise UserError("answers and key are scored without runs and without blind=true; leave these out")
    key = read_key(Path(str(conf.key)).expanduser())
    lines = score(read_answers(Path(str(conf.answers)).expanduser()), key)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_rows(out_dir / "table.csv", lines)
    counts = {
        name: len({line[column] for line in key}) for name, column in (("subjects", "subject"), ("items", "item"))
    }
    return [preference_table(lines, **counts, paper=plain(conf.evaluation.get("paper")))]


class _Sheets:
    """What the methods make of one cohort's evaluated subjects.

    Args:
        conf: composed config of ``conf/evaluate.yaml``.
        datamodule: its ``test`` part are the evaluated subjects.
        runs: by method.
        seed: of what is drawn.
    """

    def __init__(self, conf: DictConfig, datamodule: CohortDataModule, runs: Mapping[str, Run], seed: int):
        self.conf, self.datamodule, self.runs, self.seed = conf, datamodule, runs, seed
        assert isinstance(datamodule.sampling, SiteSlices)
        self.reading = Reading(
            datamodule.modalities, datamodule.lookup, datamodule.normalisation, slices=datamodule.sampling
        )
        device = torch.device("cuda" if conf.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
        self.methods = {name: Method(run.model.to(device), run.guides, device) for name, run in runs.items()}
        self.subjects = [datamodule.store.subjects[id] for id in datamodule.split.test]
        self.ordered = sorted((s for s in self.subjects if self._lesion(s)), key=lambda s: (self._lesion(s), s.id))
        if not self.ordered:
            raise UserError(
                f"none of the {len(self.subjects)} {conf.subjects} subjects has a lesion, of which samples are drawn; "
                "choose another part of the split: subjects=test or subjects=val"
            )

    @property
    def _described(self) -> dict[str, Any]:
        return {"modalities": self.datamodule.modalities, "classes": self.datamodule.classes}

    def _lesion(self, subject: StoredSubject) -> float:
        """Its lesion's volume in ml."""
        counts = (subject.label_counts or {}).items()
        lesion = sum(count for number, count in counts if 0 < self.datamodule.lookup[number] < IGNORED)
        return lesion * float(np.prod(subject.spacing)) / 1000

    # ----- the sheets ------------------------------------------------------------------------------------------------

    def samples(self, out_dir: Path, notes: Sequence[str]) -> list[Table]:
        """Writes pictures and numbers; returns the tables."""
        out_dir.mkdir(parents=True, exist_ok=True)
        count = min(self.conf.evaluation.subjects, len(self.ordered))
        # From small to large lesions, so that nobody chose who is shown.
        pictured = {self.ordered[int((i + 0.5) * len(self.ordered) / count)].id for i in range(count)}
        title = "SMOKE RUN, not a result: samples" if self.conf.smoke else "Samples"
        rows: list[dict[str, Any]] = []
        notes = [
            f"Subjects: the {self.conf.subjects} part of the runs' split, every slice that training would show.",
            *notes,
        ]
        for subject in self.subjects:
            print(f"{subject.id}: {len(self.reading.numbers(subject))} slices by {len(self.methods)} methods")
            numbers, real = self.reading.numbers(subject), self.reading.images(subject)
            maps = self.reading.maps(subject, numbers)
            made = {}
            for name, method in self.methods.items():
                own = self.reading.maps(subject, numbers, method.guides)
                (made[name],) = method.images([own], self.seed)
            rows += sample_rows(subject.id, real, made, maps, **self._described)
            if subject.id in pictured:
                donor = self._draw(out_dir, title, subject, {REAL: real, **made}, maps)
                notes += [f"manipulations-{subject.id}.png: the other patient's lesion is {donor}'s."] if donor else []
        write_rows(out_dir / "subjects.csv", rows)
        summary = sample_summary(rows)
        write_rows(out_dir / "table.csv", summary)
        notes += [f"{name}: {Path(*run.checkpoint.parts[-4:])}" for name, run in self.runs.items()]
        tables = list(sample_tables(summary, classes=self.datamodule.classes, title=title, notes=notes).values())
        paper = plain(self.conf.evaluation.get("paper"))
        return [*tables, preference_reference(paper)] if paper else tables

    def _draw(
        self, out_dir: Path, title: str, subject: StoredSubject, shown: Mapping[str, Tensor], maps: LabelMaps
    ) -> str | None:
        """Both figures of a subject, from the images (Z, C, X, Y) by row; returns whose lesion was transplanted."""
        z = most_lesion(maps.label)
        number, brain = self.reading.numbers(subject)[z], maps.brain[z].numpy()
        sheet = [SheetRow(name, maps.label[z].numpy(), images[z].numpy()) for name, images in shown.items()]
        manipulated, donor = self._manipulated(subject, number, sheet[:2])
        figures = {"methods": (title, sheet), "manipulations": (f"{title} by {next(iter(self.methods))}", manipulated)}
        for name, (heading, rows) in figures.items():
            path, heading = out_dir / f"{name}-{subject.id}.png", f"{heading}, {subject.id}, slice {number}"
            sample_sheet(rows, path, brain=brain, title=heading, **self._described)
        return donor

    def _manipulated(
        self, subject: StoredSubject, number: int, rows: Sequence[SheetRow]
    ) -> tuple[list[SheetRow], str | None]:
        """Figure 3's rows by the first method, below the real slice and the original mask; whose lesion was taken."""
        rng = np.random.default_rng(self.seed)
        method = next(iter(self.methods.values()))
        maps = self.reading.maps(subject, range(number, number + 1), method.guides)
        donor = self._donor(subject, rng)
        ways = manipulations(maps, None if donor is None else donor[1], rng)
        possible = [way for way in ways.values() if isinstance(way, LabelMaps)]
        images = iter(method.images(possible, self.seed))
        original = maps.label[0].numpy()
        shown = [rows[0], SheetRow("original mask", original, rows[1].image)]
        for name, way in ways.items():
            if isinstance(way, LabelMaps):
                shown.append(SheetRow(name, way.label[0].numpy(), next(images)[0].numpy()))
            else:
                shown.append(SheetRow(name, original, f"impossible here: {way}"))
        return shown, None if donor is None else donor[0]

    def _donor(self, subject: StoredSubject, rng: np.random.Generator) -> tuple[str, np.ndarray] | None:
        """A training subject with a lesion, and its slice with most of it, (X, Y); None where voxels differ."""
        known = self.datamodule.training_subjects()
        fitting = [
            other
            for other in known
            if self._lesion(other) and np.allclose(other.spacing[:2], subject.spacing[:2], rtol=0.01)
        ]
        for i in rng.permutation(len(fitting)):
            label = self.reading.maps(fitting[i], self.reading.numbers(fitting[i])).label
            slice_xy = label[most_lesion(label)].numpy()
            if ((slice_xy > 0) & (slice_xy != IGNORED)).any():  # not only in slices that training leaves out
                return fitting[i].id, slice_xy
        return None

    # ----- the study -------------------------------------------------------------------------------------------------

    def blind(self, out_dir: Path) -> None:
        """Writes the sheet and its key."""
        drawn, wanted = self._drawn(), self.conf.evaluation["items"]
        if not drawn:
            raise UserError("no slice that training would show has a lesion; lower data.sampling.dropped_elsewhere")
        if len(drawn) < wanted:
            print(f"evaluation.items is {wanted}; only {len(drawn)} slices have a lesion, and all are shown")
        items = []
        for subject, number in drawn:
            one = range(number, number + 1)
            maps = self.reading.maps(subject, one)
            images = {REAL: self.reading.images(subject)[self.reading.numbers(subject).index(number)]}
            for name, method in self.methods.items():
                (made,) = method.images([self.reading.maps(subject, one, method.guides)], self.seed)
                images[name] = made[0]
            shown = {name: image.numpy() for name, image in images.items()}
            items.append(BlindItem(subject.id, number, maps.label[0].numpy(), maps.brain[0].numpy(), shown))
        write_blind_sheet(items, out_dir, **self._described, seed=self.seed)
        print(f"for the reader: {out_dir / 'blind' / 'sheet.html'}; to be opened afterwards: {out_dir / 'key'}")

    def _drawn(self) -> list[tuple[StoredSubject, int]]:
        """Slices with a lesion: one of each subject, then a second of each, and so on; all in an order of chance."""
        rng = np.random.default_rng(self.seed)
        turns: list[tuple[int, StoredSubject, int]] = []
        for i in rng.permutation(len(self.ordered)):
            subject = self.ordered[i]
            numbers = self.reading.numbers(subject)
            label = self.reading.maps(subject, numbers).label
            with_lesion = np.flatnonzero(((label > 0) & (label != IGNORED)).any(2).any(1).numpy())
            chosen = rng.permutation(with_lesion)
            turns += [(turn, subject, numbers[z]) for turn, z in enumerate(chosen)]
        turns.sort(key=lambda each: each[0])  # stable: within a turn as the subjects were drawn
        taken = turns[: self.conf.evaluation["items"]]
        return [taken[i][1:] for i in rng.permutation(len(taken))]


def _checked(conf: DictConfig, runs: Sequence[Run]) -> CohortDataModule:
    """The runs' data, with the evaluated subjects as its test part. Raises UserError for runs that do not fit."""
    if conf.subjects not in ("test", "val"):
        raise UserError(
            f"subjects is {conf.subjects}; samples are of subjects that no run has seen: expected test or val"
        )
    for run in runs:
        if not isinstance(run.model, Generator):
            raise UserError(
                f"{run.path} is a {type(run.model).__name__}, which makes no images from label maps; expected runs of "
                "generators, such as experiment=samr/samr"
            )
        run.check_scale()
        if run.model.scale != Symmetric.scale:
            raise UserError(
                f"{run.path} makes images on the scale {run.model.scale!r}; sheets show them on [−1, 1], which is the "
                f"scale {Symmetric.scale!r}"
            )
        if run.conf.name == REAL:
            raise UserError(f"{run.path} is called {REAL}, as the real slices are; train it with another name=…")
    if len({run.checkpoint.resolve() for run in runs}) < len(runs):
        raise UserError("runs names a run twice; give every run once")
    first = runs[0]
    parts: dict[str, Callable[[Run], Any]] = {
        "store": lambda run: str(conf.store or run.conf.data.store),
        "data.modalities": lambda run: list(run.description["data"]["modalities"]),
        "data.labels": lambda run: run.description["data"]["labels"],
        "data.normalisation": lambda run: run.description["data"]["normalisation"],
        "data.sampling": lambda run: plain(run.conf.data.sampling),
    }
    for run in runs[1:]:
        for name, part in parts.items():
            if part(run) != part(first):
                raise UserError(
                    f"{run.path}: {name} is {part(run)}, that of {first.path} is {part(first)}; sheets show one slice "
                    "as all runs see it: train them alike, or give those that belong together"
                )
        if any(set(getattr(run.split, part)) != set(getattr(first.split, part)) for part in ("train", "val", "test")):
            raise UserError(
                f"{run.path}: its split is not that of {first.path}; train all runs with one split: "
                "data.split.kind=file data.split.file=RUN/split.json"
            )
    by_subjects(conf, list(runs))  # refuses a part of the split that is empty
    if not str(first.conf.data.sampling._target_).endswith(".SiteSlices"):
        raise UserError(f"{first.path} was not trained on all axial slices; expected data/sampling=slices")
    ids = getattr(first.split, conf.subjects)
    changes: dict[str, Any] = {
        "split": {"kind": "file", "file": str(first.path / "split.json")},
        "guides": [],
        "mix": None,
        "augmentation": [],
        **({"store": str(conf.store)} if conf.store else {}),
    }
    datamodule = build_datamodule(first.conf.data, **changes)
    datamodule.split = dataclasses.replace(datamodule.split, val=(), test=ids)
    return datamodule
