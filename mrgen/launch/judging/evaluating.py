"""From run folders to a judgement: what ``mrgen-evaluate`` does."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from mrgen.data.crops import WholeVolume
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.identity import scan_of, twins
from mrgen.data.normalisation import Normalisation
from mrgen.data.store import Store
from mrgen.errors import UserError
from mrgen.evaluation.inference import WholeSegmenter
from mrgen.evaluation.swap import REAL, Swap
from mrgen.launch.judging.reporting import Judged, check, report
from mrgen.launch.runs import Run, load_run
from mrgen.launch.status import UNREADABLE, is_alive, seen_status
from mrgen.launch.trainer import FAST, build_trainer
from mrgen.launch.training import build_datamodule, checked_seed
from mrgen.protocols import Segmenter, Synthesizer

__all__ = ["evaluate"]

STORED = {"_target_": "mrgen.data.normalisation.Stored", "masked": False}


def evaluate(conf: DictConfig, out_dir: Path) -> Path:
    """The judgement of ``experiment=rsnet/swap`` and its like.

    With a segmenter all runs are judged on a part of its split. Without one each is judged on that part of its own,
    so that the runs of a cross-validation come together in one table.

    Args:
        conf: composed config of ``conf/evaluate.yaml``.
        out_dir: folder for what ``mrgen.launch.judging.reporting.report`` writes.

    Returns:
        ``out_dir``.

    Raises:
        UserError: runs that do not fit together, or an evaluated subject that one of them was trained on.
    """
    check(conf)
    folders, segmenter = finished_runs(conf), _segmenter(conf)
    judged = judged_by(segmenter, [load_run(path) for path in folders], conf, out_dir)
    if judged is not None:
        report(judged, conf, out_dir)
    return out_dir


def judged_by(segmenter: Run | None, runs: list[Run], conf: DictConfig, out_dir: Path) -> Judged | None:
    """What ``evaluate`` judges, of runs that are loaded; None in processes that are not to write it.

    Raises:
        UserError: as ``evaluate``.
    """
    seed = checked_seed(conf.seed)
    if len({run.checkpoint.resolve() for run in runs}) < len(runs):
        raise UserError("runs names a run twice; give every run once")
    for run in runs:
        if hasattr(run.model, "mc_samples"):  # the others have no samples to draw
            run.draw_samples(mc_samples=conf.mc_samples, mc_batch=conf.mc_batch)
    parts = []
    for group in [runs] if segmenter or conf.subjects == "all" else by_subjects(conf, runs):
        parts.append((whole_volumes(conf, segmenter, group), dict(zip(_named(group, segmenter), group, strict=True))))
    _check_same_subjects(parts)
    notes = [note for datamodule, named in parts for note in _notes(conf, datamodule, segmenter, named)]
    judged = Judged(notes=list(dict.fromkeys(notes)))  # folds say the same
    for datamodule, named in parts:
        pl.seed_everything(seed, verbose=False)
        swap = _swap(datamodule, segmenter, named, seed)
        trainer = build_trainer(conf.trainer, out_dir, callbacks=[], loggers=[])
        if len(datamodule.split.test) < trainer.world_size:
            raise UserError(
                f"{len(datamodule.split.test)} subjects for {trainer.world_size} devices; lower trainer.devices"
            )
        trainer.test(swap, datamodule=datamodule, verbose=False)
        judged.add(swap, datamodule.classes, named)
    return judged if trainer.is_global_zero else None


def _segmenter(conf: DictConfig) -> Run | None:
    if conf.segmenter is None:
        return None
    if OmegaConf.is_list(conf.segmenter):
        raise UserError(f"segmenter={conf.segmenter}: expected one run; several judge in experiment=bench alone")
    return load_segmenter(conf.segmenter)


def load_segmenter(path: Any) -> Run:
    """A judge's run. Raises UserError for what segments no volumes, or synthesises as well."""
    segmenter = load_run(path)
    if not isinstance(segmenter.model, Segmenter) or isinstance(segmenter.model, Synthesizer):
        raise UserError(f"segmenter={path} is a {type(segmenter.model).__name__}; expected a segmenter such as S-Net")
    return segmenter


def finished_runs(conf: DictConfig) -> list[Any]:
    """Of the runs to judge."""
    if conf.runs is None or not OmegaConf.is_list(conf.runs):
        raise UserError(f"runs is {conf.runs}; expected a list: runs=[{conf.runs}]")
    sweeps = [] if conf.sweep is None else list(conf.sweep) if OmegaConf.is_list(conf.sweep) else [conf.sweep]
    folders = [*conf.runs, *(run for sweep in sweeps for run in _of_sweep(Path(str(sweep)).expanduser()))]
    if not folders:
        raise UserError("runs is empty; give the folders of the runs to judge: runs=[RUN,RUN], or sweep=FOLDER")
    return folders


def _of_sweep(folder: Path) -> list[Path]:
    """The finished runs of a sweep, in the order of their jobs; of the others it says what became of them."""
    if not folder.is_dir():
        raise UserError(f"sweep={folder}: found no such folder; expected that of mrgen-train -m")
    states = {path.parent: _state(path.parent) for path in folder.glob("*/status.json")}
    finished = [path for path, state in states.items() if state == "finished"]
    if not finished:
        raise UserError(
            f"sweep={folder}: no finished run there; expected the folder of mrgen-train -m, and how far its jobs are "
            f"shows: mrgen-evaluate sweep={folder}"
        )
    for path, state in states.items():
        if state != "finished":
            print(f"{path}: {state}, left out")

    def job(path: Path) -> list[int | str]:  # folders begin with the number of their job, or hold others: row-2, row-10
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if place % 2 else part for place, part in enumerate(parts)]

    return sorted(finished, key=job)


def _state(run_dir: Path) -> str:
    status = seen_status(run_dir)
    if status["state"] == UNREADABLE:
        return str(status["reason"])
    if status["state"] == "running" and not is_alive(status):
        return "lost"
    return "not trained" if str(status.get("stopped")).startswith(FAST) else status["state"]


def by_subjects(conf: DictConfig, runs: list[Run]) -> list[list[Run]]:
    """Runs that are judged on the same subjects, in the order given."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:  # stores may share ids
        groups.setdefault((str(conf.store or run.conf.data.store), *_part(conf, run)), []).append(run)
    return list(groups.values())


def by_name(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by row name, which is the run's; repeated ones carry a running number."""
    named: dict[str, Run] = {}
    for run in runs:
        name, count = str(run.conf.name), 2
        while name in named:
            name, count = f"{run.conf.name}#{count}", count + 1
        named[name] = run
    return named


def _part(conf: DictConfig, run: Run) -> tuple[str, ...]:
    """The subjects of ``conf.subjects`` in a run's split."""
    ids = {"test": run.split.test, "val": run.split.val}.get(conf.subjects)
    if ids is None:
        raise UserError(f"subjects is {conf.subjects}; expected test, val or all")
    if not ids:
        other = "val" if conf.subjects == "test" else "test"
        raise UserError(
            f"{run.path}: its split has no {conf.subjects} subjects; choose subjects={other}, "
            f"or train with data.split.{conf.subjects} above 0"
        )
    return ids


def _swap(datamodule: CohortDataModule, segmenter: Run | None, runs: Mapping[str, Run], seed: int) -> Swap:
    """The judgement of one group of runs; every method sees the subjects in the normalisation of its training."""
    made: dict[str, Normalisation] = {}  # by their settings: what two methods share is computed once

    def normalisation(run: Run) -> Normalisation:
        settings = run.description["data"]["normalisation"]
        return made.setdefault(str(sorted(settings.items())), run.normalisation)

    judges = {} if segmenter is None else {REAL: segmenter}
    return Swap(
        segmenter=None if segmenter is None else WholeSegmenter(segmenter.model, segmenter.tile),
        synthesizers={name: run.synthesizer() for name, run in runs.items()},
        modalities=datamodule.modalities,
        regions=datamodule.regions,
        normalisations={name: normalisation(run) for name, run in {**judges, **runs}.items()},
        subjects=datamodule.store.subjects,
        boxes={name: run.view for name, run in {**judges, **runs}.items()},
        pictured=_pictured(datamodule),
        seed=seed,
    )


def _named(runs: list[Run], segmenter: Run | None) -> list[str]:
    """Row names ``target/method``. Raises UserError for a run that cannot be judged."""
    names: list[str] = []
    for run in runs:
        if not isinstance(run.model, Synthesizer):
            raise UserError(f"{run.path} is a {type(run.model).__name__}, which synthesises nothing")
        target = run.model.targets[0]
        if segmenter is not None:
            have = segmenter.description["data"]["modalities"]
            if target not in cast(Segmenter, segmenter.model).sources or not {*run.model.sources, target} <= set(have):
                raise UserError(
                    f"{run.path} makes {target} from {', '.join(run.model.sources)}; the segmenter was trained on "
                    f"{', '.join(have)}"
                )
        run.check_scale()
        method = str(run.conf.name).removesuffix(f"-{target}")
        name, count = f"{target}/{method}", 2
        while name in names:  # several seeds of one method
            name, count = f"{target}/{method}#{count}", count + 1
        names.append(name)
    return names


def whole_volumes(conf: DictConfig, segmenter: Run | None, runs: list[Run]) -> CohortDataModule:
    """Whole volumes of the evaluated subjects in stored intensities."""
    first = segmenter or runs[0]
    modalities = first.description["data"]["modalities"]
    if segmenter is None:  # another store may lack what nobody needs
        targets = [getattr(run.model, "targets", (str(run.conf.target),)) for run in runs]  # a segmenter shows its own
        needed = {name for run, made in zip(runs, targets, strict=True) for name in (*run.model.sources, *made)}
        modalities = [*(name for name in modalities if name in needed), *sorted(needed - set(modalities))]
    changes: dict[str, Any] = {
        "modalities": modalities,
        "sampling": {"_target_": "mrgen.data.crops.BrainBox", "divisor": 1},
        "split": {"kind": "file", "file": str(first.path / "split.json")},
        "normalisation": STORED,
        "augmentation": [],
        "labelled": False,
        "mix": None,
    }
    if conf.store:
        changes["store"] = conf.store
    if conf.subjects == "all":
        ids = tuple(Store(conf.store or first.conf.data.store).subjects)
        changes["split"] = {"kind": "explicit", "train": list(ids), "val": [], "test": []}
    else:
        ids = _part(conf, first)
    datamodule = build_datamodule(first.conf.data, **changes)
    datamodule.split = dataclasses.replace(datamodule.split, train=(), val=(), test=ids)
    datamodule.whole = WholeVolume()
    return datamodule


def _check_same_subjects(parts: Sequence[tuple[CohortDataModule, Mapping[str, Run]]]) -> None:
    """Raises UserError where means would be of different subjects, or of one subject twice."""
    subjects: dict[str, list[str]] = {}
    for datamodule, named in parts:
        ids = [f"{id} of {datamodule.store.path}" for id in datamodule.split.test]  # stores may share ids
        for name in named:
            subjects.setdefault(name, []).extend(ids)
    everyone = {id for ids in subjects.values() for id in ids}
    for name, ids in subjects.items():
        if twice := [id for id in ids if ids.count(id) > 1]:
            raise UserError(
                f"{name} would judge {twice[0]} twice; runs of one name must be the folds of one cross-validation: "
                "give other names (name=…), or judge them one by one"
            )
        if set(ids) != everyone:
            raise UserError(
                f"{name} would be judged on {len(ids)} of {len(everyone)} subjects, other runs on others; train all "
                "runs with one split (data.split.kind=file data.split.file=RUN/split.json), or give all of their folds"
            )


def _notes(
    conf: DictConfig, datamodule: CohortDataModule, segmenter: Run | None, named: Mapping[str, Run]
) -> list[str]:
    """What a reader of the table must know. Raises UserError for subjects that cannot be judged, or were trained on."""
    subjects = [datamodule.store.subjects[id] for id in datamodule.split.test]
    if conf.evaluation.kind == "swap" and not any(subject.labelled for subject in subjects):
        raise UserError(
            f"none of the subjects in {datamodule.store.path} has a label, which this judgement needs; "
            "experiment=t1_to_t2/swap compares with the segmentation from the real sequences"
        )
    whose = f"the {conf.subjects} part of " + ("the segmenter's split" if segmenter else "the runs' own splits")
    whose = f"all {len(datamodule.split.test)} of the store" if conf.subjects == "all" else whose
    notes = [f"Subjects: {whose}, {datamodule.store.path.name}."]
    notes += [f"all real: {_named_file(segmenter)}"] if segmenter else []
    notes += [f"{name}: {_named_file(run)}" for name, run in named.items()]
    everyone = [*([segmenter] if segmenter else []), *named.values()]
    if segmenter:
        scale = segmenter.normalisation.scale
        other = [name for name, run in named.items() if run.model.scale != scale]
        if other:
            notes.append(f"Normalised anew, by their own statistics, for the segmenter ({scale}): {', '.join(other)}.")
    return notes + check_leaks(datamodule, everyone, datamodule.split.test)


def _named_file(run: Run) -> Path:
    """The checkpoint as a table names it: by the run, not by where the runs lie on this machine."""
    return Path(*run.checkpoint.parts[-4:])


def check_leaks(datamodule: CohortDataModule, runs: list[Run], ids: tuple[str, ...]) -> list[str]:
    """Refuses subjects whose patient a run was trained on; says where one served to select a checkpoint."""
    notes = []
    subjects = datamodule.store.subjects
    evaluated = {subjects[id].patient for id in ids}
    for run in runs:
        seen: Mapping[str, set[str]] = {
            part: {subjects[id].patient for id in getattr(run.split, part) if id in subjects}
            for part in ("train", "val")
        }
        mix = run.description["data"].get("mix") or {}
        if leaked := sorted(evaluated & set(mix.get("patients", ()))):
            raise UserError(
                f"{run.path}: its synthetic slices are of {mix['method']}, which was trained on {len(leaked)} of the "
                f"{len(evaluated)} patients to evaluate ({', '.join(leaked[:3])}{' …' if len(leaked) > 3 else ''}); "
                "train generator and segmenter with one split: data.split.kind=file data.split.file=RUN/split.json"
            )
        if leaked := sorted(evaluated & seen["train"]):
            raise UserError(
                f"{run.path} was trained on {len(leaked)} of the {len(evaluated)} patients to evaluate "
                f"({', '.join(leaked[:3])}{' …' if len(leaked) > 3 else ''}); "
                "train all runs with one split: data.split.kind=file data.split.file=RUN/split.json"
            )
        notes += _check_copies(datamodule, run, ids)
        if run.checkpoint.name == "best.ckpt" and (chosen := evaluated & seen["val"]):
            notes.append(f"Optimistic: {len(chosen)} of these subjects chose the checkpoint of {run.path.name}.")
    return notes


def _check_copies(datamodule: CohortDataModule, run: Run, ids: tuple[str, ...]) -> list[str]:
    """Refuses subjects whose voxels a run was trained on under other names, of its own store as well.

    The store of a run may be gone, or elsewhere on this machine: then there is nothing to compare, which is said.
    """
    evaluated = [scan_of(datamodule.store.subjects[id]) for id in ids]
    path = Path(str(run.conf.data.store)).expanduser()
    store = datamodule.store if path.resolve() == datamodule.store.path.resolve() else None
    if store is None:
        try:
            store = Store(path)
        except UserError:
            return [f"Not compared with what {run.path.name} was trained on: its store is not at hand."]
    same = store is datamodule.store
    trained = [
        scan_of(store.subjects[id]) for id in run.split.train if id in store.subjects and not (same and id in ids)
    ]
    if copies := twins(evaluated, trained) if trained else []:
        named = ", ".join(f"{one} as {other}" for one, other, _ in copies[:3]) + (" …" if len(copies) > 3 else "")
        raise UserError(
            f"{run.path} was trained on the voxels of {len(copies)} of the {len(ids)} subjects to evaluate, under "
            f"other names ({named}, in {store.path}); leave them out of the store, or train without them"
        )
    return []


def _pictured(datamodule: CohortDataModule) -> str:
    """The evaluated subject with the most enhancing tumour, or lesion where nothing enhances."""

    def lesion(id: str) -> tuple[int, int]:
        counts = datamodule.store.subjects[id].label_counts or {}
        mapped: dict[int, int] = {}
        for number, count in counts.items():
            mapped[int(datamodule.lookup[number])] = mapped.get(int(datamodule.lookup[number]), 0) + count
        enhancing = sum(mapped.get(number, 0) for number in datamodule.regions.get("ET", ()))
        return enhancing, sum(count for number, count in mapped.items() if 0 < number < 255)

    return max(datamodule.split.test, key=lesion)
