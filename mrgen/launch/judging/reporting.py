"""From a finished judgement to its files: tables, numbers, pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mrgen.errors import UserError
from mrgen.evaluation.figures import calibration_figure, swap_figure, synthesis_figure
from mrgen.evaluation.selection import ranking, select, selection_table
from mrgen.evaluation.swap import Swap
from mrgen.evaluation.swap_tables import swap_pairs, swap_summary, swap_tables
from mrgen.evaluation.table import Table, write_rows
from mrgen.evaluation.translation_figures import box_figure, overlay_figure
from mrgen.evaluation.translation_tables import region_means, translation_summary, translation_tables
from mrgen.files import write_text
from mrgen.launch.configs import write_config
from mrgen.launch.instantiate import plain
from mrgen.launch.runs import Run

__all__ = ["KINDS", "Judged", "check", "report"]

# The panels of the two box plots.
ERRORS = {
    "own_mse_brain": "MSE in the brain, own range",
    "own_mse_tumour": "MSE in the tumour, own range",
    "unit_mse_brain": "MSE in the brain, as made",
    "unit_mse_tumour": "MSE in the tumour, as made",
}
OVERLAP = {
    "dice": "Dice",
    "hd95_mean": "HD95 (mm), mean of directions",
    "agree_dice": "Dice, against real's segmentation",
    "agree_hd95_mean": "HD95 (mm), against real's segmentation",
}


@dataclass
class Judged:
    """What came out, of one group of runs or of several that were judged on different subjects.

    Attributes:
        rows, calibration: of all groups, see ``Swap``.
        slices, pictured: of the first group's pictured subject.
        regions, classes: the cohort's.
        runs: the first run of every row name.
        notes: for below the first table.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    calibration: list[dict[str, Any]] = field(default_factory=list)
    slices: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictured: str | None = None
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    classes: Sequence[str] = ()
    runs: dict[str, Run] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, swap: Swap, classes: Sequence[str], runs: Mapping[str, Run]) -> None:
        """A further group, after its test."""
        if self.pictured is None:
            self.slices, self.pictured = swap.slices, swap.pictured
            self.regions, self.classes = swap.regions, classes
        self.rows += swap.rows
        self.calibration += swap.calibration
        self.runs = {**runs, **self.runs}


def check(conf: DictConfig) -> None:
    """Raises UserError for a judgement that cannot be, before anything is computed."""
    evaluation = conf.evaluation
    if evaluation.kind not in KINDS:
        kinds = ", ".join(["cross_validation", *KINDS, "augmentation", "availability", "samples", "bench"])
        raise UserError(f"evaluation.kind is {evaluation.kind}; expected {kinds}")
    if evaluation.kind == "swap" and conf.segmenter is None:
        raise UserError("segmenter is not set; give the folder of its run: segmenter=RUN")
    if evaluation.kind == "selection":
        if conf.subjects != "val":
            raise UserError(
                f"subjects is {conf.subjects}; a selection needs subjects=val, or it would see the test set"
            )
        if evaluation.criterion == "dice" and conf.segmenter is None:
            raise UserError("evaluation.criterion=dice needs a segmenter: segmenter=RUN")
        select([], {}, evaluation.criterion, evaluation.count)  # refuses what it does not know


def report(judged: Judged, conf: DictConfig, out_dir: Path) -> None:
    """Writes what the preset's kind of judgement shows; the tables also on the console.

    Args:
        judged: all groups.
        conf: composed config of ``conf/evaluate.yaml``.
        out_dir: gets ``config.yaml``, ``table.md`` (all tables), ``table.csv`` (their numbers), ``subjects.csv`` (one
            line a subject and input set), and the kind's pictures and further files.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    write_config(conf, out_dir / "config.yaml")
    write_rows(out_dir / "subjects.csv", judged.rows)
    tables = KINDS[conf.evaluation.kind](judged, conf, out_dir)
    write_text(out_dir / "table.md", "\n".join(table.markdown() for table in tables))
    for table in tables:
        table.show()


def _titled(conf: DictConfig, name: str) -> str:
    return f"SMOKE RUN, not a result: {name}" if conf.smoke else name.capitalize()


def _columns(judged: Judged, conf: DictConfig) -> tuple[list[str], Any]:
    """Regions and the paper's numbers; where the cohort lacks the paper's regions, its own and none."""
    comparable = all(name in judged.regions for name in conf.evaluation.regions)
    return (
        plain(conf.evaluation.regions) if comparable else list(judged.regions),
        plain(conf.evaluation.get("paper")) if comparable else None,
    )


def _swap(judged: Judged, conf: DictConfig, out_dir: Path) -> list[Table]:
    """Also ``pairs.csv`` where two methods make one target, and ``figure.png``; where a synthesis has a variance
    ``calibration.csv``, ``uncertainty.png`` and one ``synthesis-METHOD.png`` a method."""
    title, (regions, paper) = _titled(conf, "swap"), _columns(judged, conf)
    summary, pairs = swap_summary(judged.rows, regions=regions, paper=paper), swap_pairs(judged.rows)
    for name, rows in {"table": summary, "pairs": pairs, "calibration": judged.calibration}.items():
        if rows:
            write_rows(out_dir / f"{name}.csv", rows)

    pictured = f"{title}, {judged.pictured}"
    swap_figure(judged.slices, out_dir / "figure.png", title=pictured)
    uncertain = [name.partition("/")[2] for name, kept in judged.slices.items() if "variance" in kept]
    for method in dict.fromkeys(uncertain):
        path = out_dir / f"synthesis-{method.replace('/', '-')}.png"
        synthesis_figure(judged.slices, path, title=f"{pictured}, {method}", method=method)
    if judged.calibration:
        correlations = {line["input"]: line["rank_correlation"] for line in summary if "rank_correlation" in line}
        path = out_dir / "uncertainty.png"
        calibration_figure(judged.calibration, judged.slices, correlations, path, title=f"{title}, uncertainty")
    tables = swap_tables(judged.rows, regions=regions, title=title, paper=paper, notes=judged.notes)
    return list(tables.values())


def _translation(judged: Judged, conf: DictConfig, out_dir: Path) -> list[Table]:
    """Also the paper's Figures 6 and 7, ``errors.png`` and ``overlap.png``, and its Figures 3 to 5, ``overlay.png``."""
    title, (regions, paper) = _titled(conf, "translation"), _columns(judged, conf)
    write_rows(out_dir / "table.csv", translation_summary(judged.rows, regions=regions, paper=paper))
    rows = region_means(judged.rows, regions=regions)
    box_figure(rows, ERRORS, out_dir / "errors.png", title=f"{title}, error")
    if any(key in row for key in OVERLAP for row in rows):
        box_figure(rows, OVERLAP, out_dir / "overlap.png", title=f"{title}, segmentation")
    # The images that the paper's error compares; not those in the segmenter's scale, which methods need not share.
    slices = {
        name: {**kept, **{key: kept[f"own_{key}"] for key in ("real", "synthetic") if f"own_{key}" in kept}}
        for name, kept in judged.slices.items()
    }
    overlay_figure(slices, out_dir / "overlay.png", title=f"{title}, {judged.pictured}", classes=judged.classes[1:4])
    tables = translation_tables(judged.rows, regions=regions, title=title, paper=paper, notes=judged.notes)
    return list(tables.values())


def _selection(judged: Judged, conf: DictConfig, out_dir: Path) -> list[Table]:
    """``table.csv`` holds all methods with their ranks, ``selected.txt`` the folders of the best, one a line."""
    settings = {key: conf.evaluation[key] for key in ("criterion", "count")}
    families = {name: getattr(run.model, "family", None) for name, run in judged.runs.items()}
    regions, _ = _columns(judged, conf)
    chosen = [line["input"] for line in select(judged.rows, families, **settings, regions=regions)]
    write_rows(out_dir / "table.csv", ranking(judged.rows, families, settings["criterion"], regions=regions))
    write_text(out_dir / "selected.txt", "".join(f"{judged.runs[name].path}\n" for name in chosen))
    notes = [*judged.notes, "The folders of the chosen runs stand in selected.txt beside this table."]
    title = _titled(conf, "selection")
    return [selection_table(judged.rows, families, **settings, regions=regions, title=title, notes=notes)]


KINDS = {"swap": _swap, "translation": _translation, "selection": _selection}
