"""From run folders to a judgement: what ``mrgen-evaluate`` does."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from mrgen.data.datamodule import CohortDataModule
from mrgen.errors import UserError
from mrgen.evaluation.figures import calibration_figure, swap_figure, synthesis_figure
from mrgen.evaluation.inference import WholeSegmenter, WholeSynthesizer
from mrgen.evaluation.swap import Swap
from mrgen.evaluation.swap_tables import swap_pairs, swap_summary, swap_tables
from mrgen.evaluation.table import write_rows
from mrgen.launch.instantiate import plain
from mrgen.launch.runs import Run, load_run
from mrgen.launch.training import build_datamodule, build_trainer, checked_seed
from mrgen.protocols import Segmenter, Synthesizer

__all__ = ["evaluate_swap"]


def evaluate_swap(conf: DictConfig, out_dir: Path) -> Path:
    """The swap of ``experiment=rsnet/swap``.

    Args:
        conf: composed config of ``conf/evaluate.yaml``.
        out_dir: folder for what ``_write`` writes.

    Returns:
        ``out_dir``.

    Raises:
        UserError: runs that do not fit together, or an evaluated subject that one of them was trained on.
    """
    if not conf.runs:
        raise UserError("runs is empty; give the folders of the runs to judge: runs=[RUN,RUN]")
    if not OmegaConf.is_list(conf.runs):
        raise UserError(f"runs is {conf.runs}; expected a list: runs=[{conf.runs}]")
    seed = checked_seed(conf.seed)
    segmenter = load_run(conf.segmenter)
    if not isinstance(segmenter.model, Segmenter) or isinstance(segmenter.model, Synthesizer):
        raise UserError(
            f"segmenter={conf.segmenter} is a {type(segmenter.model).__name__}; expected a segmenter such as S-Net"
        )
    runs = [load_run(path) for path in conf.runs]
    if len({run.checkpoint.resolve() for run in runs}) < len(runs):
        raise UserError("runs names a run twice; give every run once")
    for run in runs:
        if hasattr(run.model, "mc_samples"):  # the others have no samples to draw
            run.draw_samples(mc_samples=conf.mc_samples, mc_batch=conf.mc_batch)
    synthesizers = _named(runs, segmenter)
    datamodule = _datamodule(conf, segmenter, runs)
    ids = datamodule.split.test
    notes = [f"Subjects: the {conf.subjects} part of the segmenter's split, {datamodule.store.path.name}."]
    notes += [
        f"all real: {_named_file(segmenter)}",
        *(f"{name}: {_named_file(run)}" for name, run in zip(synthesizers, runs, strict=True)),
    ]
    box = list(datamodule.whole.size or ())
    notes += [
        f"{run.path.name}: trained in a box of {run.description['data']['box']} voxels, judged in one of {box}."
        for run in [segmenter, *runs]
        if not run.tile and run.description["data"]["box"] != box
    ]
    notes += _check_leaks(datamodule, [segmenter, *runs], ids)

    pl.seed_everything(seed, verbose=False)
    swap = Swap(
        segmenter=WholeSegmenter(segmenter.model, segmenter.tile),
        synthesizers=synthesizers,
        modalities=datamodule.modalities,
        regions=datamodule.store.layout.regions,
        pictured=_pictured(datamodule),
        seed=seed,
    )
    trainer = build_trainer(conf.trainer, out_dir, callbacks=[], loggers=[])
    if len(ids) < trainer.world_size:
        raise UserError(f"{len(ids)} subjects for {trainer.world_size} devices; lower trainer.devices")
    trainer.test(swap, datamodule=datamodule, verbose=False)
    notes += [
        f"{name}: in tiles, because memory was short; one pass would give other numbers."
        for name, method in {"the segmenter": swap.segmenter, **synthesizers}.items()
        if method.tiled
    ]
    if trainer.is_global_zero:
        _write(swap, conf, datamodule.store.layout.regions, notes, out_dir)
    return out_dir


def _write(swap: Swap, conf: DictConfig, known: Mapping[str, Any], notes: list[str], out_dir: Path) -> None:
    """Tables and figures of a finished swap; the tables also on the console.

    Args:
        swap: after its test.
        conf: see ``evaluate_swap``.
        known: the cohort's regions.
        notes: below the first table.
        out_dir: gets ``table.md`` (all tables), ``table.csv`` (their numbers, one line an input set), ``pairs.csv``
            (where two methods make one target), ``subjects.csv`` and ``figure.png``; where a synthesis has a variance
            also ``calibration.csv``, ``uncertainty.png`` and one ``synthesis-METHOD.png`` a method.
    """
    title = "SMOKE RUN, not a result: swap" if conf.smoke else "Swap"
    comparable = all(name in known for name in conf.evaluation.regions)  # the cohort has the paper's columns
    regions = plain(conf.evaluation.regions) if comparable else list(known)
    paper = plain(conf.evaluation.paper) if comparable else None
    summary, pairs = swap_summary(swap.rows, regions=regions, paper=paper), swap_pairs(swap.rows)
    tables = swap_tables(swap.rows, regions=regions, title=title, paper=paper, notes=notes)
    out_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(plain(conf)), out_dir / "config.yaml")
    files = {"subjects": swap.rows, "table": summary, "pairs": pairs, "calibration": swap.calibration}
    for name, rows in files.items():
        if rows:
            write_rows(out_dir / f"{name}.csv", rows)
    (out_dir / "table.md").write_text("\n".join(table.markdown() for table in tables.values()), encoding="utf-8")

    pictured = f"{title}, {swap.pictured}"
    swap_figure(swap.slices, out_dir / "figure.png", title=pictured)
    uncertain = [name.partition("/")[2] for name, kept in swap.slices.items() if "variance" in kept]
    for method in dict.fromkeys(uncertain):
        path = out_dir / f"synthesis-{method.replace('/', '-')}.png"
        synthesis_figure(swap.slices, path, title=f"{pictured}, {method}", method=method)
    if swap.calibration:
        correlations = {line["input"]: line["rank_correlation"] for line in summary if "rank_correlation" in line}
        calibration_figure(
            swap.calibration, swap.slices, correlations, out_dir / "uncertainty.png", title=f"{title}, uncertainty"
        )
    for table in tables.values():
        table.show()


def _named_file(run: Run) -> Path:
    """The checkpoint as a table names it: by the run, not by where the runs lie on this machine."""
    return Path(*run.checkpoint.parts[-4:])


def _named(runs: list[Run], segmenter: Run) -> dict[str, Any]:
    """Row names ``target/method`` of the runs, the scale of each checked against the segmenter's."""
    named: dict[str, Any] = {}
    sources = cast(Segmenter, segmenter.model).sources
    scale = segmenter.description["data"]["normalisation"]
    for run in runs:
        if not isinstance(run.model, Synthesizer):
            raise UserError(f"{run.path} is a {type(run.model).__name__}, which synthesises nothing")
        target = run.model.targets[0]
        needed = {*run.model.sources, target}
        if target not in sources or not needed <= set(segmenter.description["data"]["modalities"]):
            have = ", ".join(segmenter.description["data"]["modalities"])
            raise UserError(
                f"{run.path} makes {target} from {', '.join(run.model.sources)}; the segmenter was trained on {have}"
            )
        if run.description["data"]["normalisation"] != scale:
            raise UserError(
                f"{run.path} was trained with {run.description['data']['normalisation']}, the segmenter with {scale}; "
                "a swap needs both on one scale"
            )
        run.check_scale()
        method = str(run.conf.name).removesuffix(f"-{target}")
        name, count = f"{target}/{method}", 2
        while name in named:  # several seeds of one method
            name, count = f"{target}/{method}#{count}", count + 1
        named[name] = WholeSynthesizer(run.model, run.tile)
    return named


def _datamodule(conf: DictConfig, segmenter: Run, runs: list[Run]) -> CohortDataModule:
    """Whole brains of the evaluated subjects, in the box in which the segmenter was trained to see them."""
    ids = {"test": segmenter.split.test, "val": segmenter.split.val}.get(conf.subjects)
    if ids is None:
        raise UserError(f"subjects is {conf.subjects}; expected test or val")
    if not ids:
        other = "val" if conf.subjects == "test" else "test"
        raise UserError(
            f"{segmenter.path}: its split has no {conf.subjects} subjects; "
            f"choose subjects={other}, or train with data.split.{conf.subjects} above 0"
        )
    divisor = math.lcm(*(int(getattr(run.model, "divisor", 1)) for run in [segmenter, *runs]))
    box = None
    if not segmenter.tile:  # rounded up where a synthesizer of more levels asks for it
        box = [-(-n // divisor) * divisor for n in segmenter.description["data"]["box"]]
    changes: dict[str, Any] = {
        "sampling": {"_target_": "mrgen.data.crops.BrainBox", "size": box, "divisor": divisor},
        "split": {"kind": "file", "file": str(segmenter.path / "split.json")},
        "augmentation": [],
    }
    if conf.store:
        changes["store"] = conf.store
    datamodule = build_datamodule(segmenter.conf.data, **changes)
    datamodule.split = dataclasses.replace(datamodule.split, test=ids, val=())
    return datamodule


def _check_leaks(datamodule: CohortDataModule, runs: list[Run], ids: tuple[str, ...]) -> list[str]:
    """Refuses subjects whose patient a run was trained on; says where one served to select a checkpoint."""
    notes = []
    subjects = datamodule.store.subjects
    evaluated = {subjects[id].patient for id in ids}
    for run in runs:
        seen: Mapping[str, set[str]] = {
            part: {subjects[id].patient for id in getattr(run.split, part) if id in subjects}
            for part in ("train", "val")
        }
        if leaked := sorted(evaluated & seen["train"]):
            raise UserError(
                f"{run.path} was trained on {len(leaked)} of the {len(evaluated)} patients to evaluate "
                f"({', '.join(leaked[:3])}{' …' if len(leaked) > 3 else ''}); "
                "train all runs with one split: data.split.kind=file data.split.file=RUN/split.json"
            )
        if chosen := evaluated & seen["val"]:
            notes.append(f"Optimistic: {len(chosen)} of these subjects chose the checkpoint of {run.path.name}.")
    return notes


def _pictured(datamodule: CohortDataModule) -> str:
    """The evaluated subject with the most enhancing tumour, or lesion where nothing enhances."""

    def lesion(id: str) -> tuple[int, int]:
        counts = datamodule.store.subjects[id].label_counts or {}
        mapped: dict[int, int] = {}
        for number, count in counts.items():
            mapped[int(datamodule.lookup[number])] = mapped.get(int(datamodule.lookup[number]), 0) + count
        return mapped.get(3, 0), sum(count for number, count in mapped.items() if 0 < number < 255)

    return max(datamodule.split.test, key=lesion)
