"""BrainClustering: T2 from T1 through tables of matched clusters (Baldini et al., section 2)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from mrgen.arrays import read_arrays
from mrgen.errors import UserError
from mrgen.files import replacing
from mrgen.papers.brain_clustering.estimator import NOT_FINITE, Estimator, Pair
from mrgen.papers.brain_clustering.kmeans import kmeans_1d
from mrgen.papers.brain_clustering.preprocessing import foreground_box, median_per_slice, preprocess, quantile
from mrgen.papers.brain_clustering.search import Location, SearchScan, finite
from mrgen.papers.brain_clustering.tables import Entries, Matching, Table, interpolate, learn_pair, merge

__all__ = ["Answer", "BrainClustering", "TrainingSubject"]

# Of ``Entries``: NumPy's kinds, and one axis.
ENTRIES = {"macro": ("iu", 1), "key": ("f", 1), "value": ("f", 1), "voxels": ("iu", 1), "common": ("iu", 1)}

Mode = Literal["train", "search"]

KNEE, MOST = 0.999, 0.01  # conditional mean: the quantile below which voxels keep their value; the most that do not


@dataclass(frozen=True)
class TrainingSubject:
    """What is kept of a training pair.

    Attributes:
        id: whose it is.
        entries: what it adds to the tables.
        reach: the greatest unit intensity of its target among the voxels that it shares with the source.
        quantisation: how far its intensities were moved, in units of the range; 0 for whole numbers.
        scan: its source, for Search; None in the mode ``train``.
    """

    id: str
    entries: Entries
    reach: float
    quantisation: float
    scan: SearchScan | None

    @property
    def agreement(self) -> float:
        """Share of the matched source micro clusters' voxels that the matching is right about.

        Few, for the printed method: its micro clusters are far narrower than the noise of the other sequence.
        """
        return float(self.entries.common.sum() / self.entries.voxels.sum())


@dataclass(frozen=True)
class Answer:
    """A query's result.

    Attributes:
        volume: (X, Y, Z) float32 unit intensities.
        subjects: ids of the training subjects whose tables were used; in Search, nearest first.
        quantisation: how far the query's intensities were moved, in units of their range; 0 for whole numbers.
    """

    volume: np.ndarray
    subjects: tuple[str, ...]
    quantisation: float


class BrainClustering(Estimator):
    """The clustering estimator.

    Training: each pair is clustered, source and target apart, into macro clusters, those into micro clusters; macro and
    then micro clusters are matched by greatest overlap, and each matched pair of micro clusters becomes a row of its
    macro cluster's table. A query is clustered into macro clusters and its intensities are looked up. Rows beyond what
    a training scan offers do not exist: a macro cluster with fewer distinct intensities than ``micro`` has a micro
    cluster for each.

    Args:
        source, target: any two sequences; the paper's are T1 and T2.
        macro: macro clusters; 3 to 6 in the paper [P].
        micro_total: micro clusters of all macro clusters together, a multiple of ``macro``; default: the nearest
            multiple that is at least 100 (the paper's 100, which its code divides by ``macro`` [C]).
        micro_per_macro: micro clusters of each macro cluster, as the paper's text can be read too; in place of
            ``micro_total``.
        mode: ``train``: one table from all pairs. ``search``: for each query, tables from the ``width`` training
            subjects whose preprocessed source has the least MSE to the query's over the whole volume.
        width: w of Search, 5 or 10 in the paper [P]; all training subjects where there are fewer.
        matching: ``assignment`` is the printed method. ``conditional_mean`` is ours: the target's mean over the voxels
            of each source micro cluster, which has a lower error and a far narrower range; so that scaling a result by
            its own maximum does not stretch it, the brightest thousandth of its voxels (at most a hundredth, where
            many share one value) is drawn out linearly to the maximum that training targets reach.
        remove_outliers: set source intensities above Q3 + 1.5 · IQR to the background, as the code does for T1 [C].
        levels: grey levels of a float scan with too many distinct intensities, see ``preprocess``.

    Attributes:
        subjects: of the training, in order.
        family: among whose members the best are selected.
    """

    def __init__(
        self,
        *,
        source: str = "t1",
        target: str = "t2",
        macro: int = 5,
        micro_total: int | None = None,
        micro_per_macro: int | None = None,
        mode: Mode = "train",
        width: int = 5,
        matching: Matching = "assignment",
        remove_outliers: bool = True,
        levels: int = 4096,
    ):
        super().__init__(source=source, target=target)
        if mode not in get_args(Mode) or matching not in get_args(Matching):
            raise ValueError(
                f"mode is {mode} and matching {matching}; expected {' or '.join(get_args(Mode))}, and "
                f"{' or '.join(get_args(Matching))}"
            )
        if min(macro, width) < 1 or not 2 <= levels <= 2**16 - 1:
            raise ValueError(
                f"macro is {macro}, width {width} and levels {levels}; expected 1, 1 and 2 (to 65535) or more"
            )
        if micro_total is not None and micro_per_macro is not None:
            raise ValueError(f"found micro_total={micro_total} and micro_per_macro={micro_per_macro}; give one of them")
        if micro_per_macro is None:
            total = -(-100 // macro) * macro if micro_total is None else micro_total
            micro_per_macro, rest = divmod(total, macro)
            if rest or total < 1:
                near = max(macro, round(total / macro) * macro)
                raise ValueError(f"micro_total is {total}, expected a multiple of macro={macro}, such as {near}")
        elif micro_per_macro < 1:
            raise ValueError(f"micro_per_macro is {micro_per_macro}; expected 1 or more")
        self.macro, self.micro, self.mode, self.width, self.matching = macro, micro_per_macro, mode, width, matching
        self.remove_outliers, self.levels = remove_outliers, levels
        self.family = "clustering" if matching == "assignment" else matching
        self.subjects: list[TrainingSubject] = []
        self._tables: list[Table] | None = None  # of all subjects, once a query has asked for them

    def settings(self) -> dict[str, Any]:
        names = ("source", "target", "macro", "mode", "width", "matching", "remove_outliers", "levels")
        return {**{name: getattr(self, name) for name in names}, "micro_per_macro": self.micro}

    # ----- training -----------------------------------------------------------------------------------------------

    def fit(self, pairs: Iterable[Pair | tuple[np.ndarray, ...]]) -> Self:
        self.subjects, self._tables = [], None
        self.partial_fit(pairs)
        if not self.subjects:
            raise UserError("found no training pair, expected one or more")
        return self

    def partial_fit(self, pairs: Iterable[Pair | tuple[np.ndarray, ...]]) -> Self:
        """Learns from further pairs; fitting at once or in parts gives the same tables.

        Raises:
            UserError: a pair that nothing can be learned from, with its id.
        """
        for pair in map(Pair._make, map(_padded, pairs)):
            id_ = pair.id or str(len(self.subjects))
            try:
                self.subjects.append(self._learn(pair, id_))
            except UserError as error:
                raise UserError(f"{id_}: {error}") from error
            del pair  # two pairs at once would be held while the next is read
            self._tables = None
        return self

    def _learn(self, pair: Pair, id_: str) -> TrainingSubject:
        shapes = [np.shape(array) for array in pair[:3] if array is not None]
        if len(shapes[0]) != 3 or any(shape != shapes[0] for shape in shapes):
            found = ", ".join(map(str, shapes))
            raise UserError(f"found arrays of {found}, expected (X, Y, Z) alike; bring the scans onto one grid")
        inside = (pair.source > 0) | (pair.target > 0) if pair.brain is None else np.asarray(pair.brain, dtype=bool)
        names = self.source, self.target
        scans = []
        for name, volume, outliers in zip(names, pair[:2], (self.remove_outliers, False), strict=True):
            try:
                scans.append(preprocess(volume[inside], remove_outliers=outliers, levels=self.levels))
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        source, target = scans
        entries = learn_pair(source, target, macro=self.macro, micro=self.micro, matching=self.matching, names=names)
        reach = float(target.levels[target.codes[source.codes > 0].max()])
        scan = None
        if self.mode == "search":
            if pair.location is not None and (pair.brain is None) != (pair.location.brain is None):
                raise ValueError(f"{id_}: found a brain mask in the pair or in its location only; expected both")
            kept = pair.location or np.where(inside, pair.source, 0)
            box = foreground_box(pair.source, pair.brain)
            scan = SearchScan(kept, shapes[0], box, source.scaling)
        return TrainingSubject(id_, entries, reach, max(source.quantisation, target.quantisation), scan)

    def tables(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and values of f_0 … f_{macro − 1} after all training subjects."""
        return [table.arrays() for table in self._merged(self.subjects)]

    def _merged(self, subjects: Sequence[TrainingSubject]) -> list[Table]:
        if subjects is not self.subjects:
            return merge((subject.entries for subject in subjects), self.macro)
        if self._tables is None:
            self._tables = merge((subject.entries for subject in subjects), self.macro)
        return self._tables

    # ----- a query ------------------------------------------------------------------------------------------------

    def _synthesize(self, volume: np.ndarray, brain: np.ndarray | None) -> np.ndarray:
        return self.query(volume, brain).volume

    def query(self, volume: np.ndarray, brain: np.ndarray | None = None) -> Answer:
        """Synthesises one volume.

        Intensities that no table row reaches are extrapolated in proportion, as the code does, so that a result may
        leave [0, 1]; it is finite. The median filter looks at the whole slice, background included.

        Args:
            volume: (X, Y, Z), background 0, stored intensities or min–max.
            brain: (X, Y, Z) bool, or None: whatever is above 0 is brain.

        Raises:
            UserError: nothing in the foreground, fewer distinct intensities than macro clusters, or, in Search,
                training scans of another shape or out of reach.
            ValueError: not fitted.
        """
        if not self.subjects:
            raise ValueError("not fitted yet; call fit or load first")
        box = foreground_box(volume, brain)
        place = tuple(slice(max(0, a - 1), b + 1) for a, b in box)  # with the neighbours that the median can fill
        inner = volume[place] if brain is None else np.where(brain[place], volume[place], 0)
        scan = preprocess(np.ascontiguousarray(inner), remove_outliers=self.remove_outliers, levels=self.levels)
        used = np.flatnonzero(scan.counts)
        macro_of = kmeans_1d(scan.levels[used], scan.counts[used], self.macro).labels
        subjects: Sequence[TrainingSubject] = self.subjects
        if self.mode == "search":
            unit = np.zeros(volume.shape, np.float32)
            unit[place] = scan.levels.astype(np.float32)[scan.codes]
            subjects = self._nearest(unit, box)

        made = np.zeros(len(scan.levels))  # target intensity of each source intensity
        for t, table in enumerate(self._merged(subjects)):
            codes = used[macro_of == t]
            made[codes] = interpolate(table, scan.levels[codes])
        values, rank = np.unique(made, return_inverse=True)  # a median of ranks is the rank of the median
        ranks = median_per_slice(rank.astype(np.uint16)[scan.codes])
        if self.matching == "conditional_mean":
            counts = np.bincount(ranks.ravel(), minlength=len(values))
            values = _drawn_out(values, counts, float(np.mean([subject.reach for subject in subjects])))
        out = np.zeros(volume.shape, np.float32)
        out[place] = values.astype(np.float32)[ranks]
        return Answer(out, tuple(subject.id for subject in subjects), scan.quantisation)

    def _nearest(self, query: np.ndarray, box: Any) -> list[TrainingSubject]:
        errors = []
        for subject in self.subjects:
            if subject.scan is None:
                raise UserError(f"{subject.id} was learned with mode=train, expected mode=search; fit anew")
            errors.append(subject.scan.squared_error(query, box))
        return [self.subjects[i] for i in np.argsort(errors, kind="stable")[: self.width]]

    # ----- the artefact -------------------------------------------------------------------------------------------

    def _save_state(self, folder: Path) -> dict[str, Any]:
        if not self.subjects:
            raise ValueError("not fitted yet; call fit first")
        entries = {name: [getattr(s.entries, name) for s in self.subjects] for name in ENTRIES}
        rows = np.array([len(s.entries.key) for s in self.subjects])
        arrays = {name: np.concatenate(several) for name, several in entries.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise UserError(NOT_FINITE.format("BrainClustering"))
        with replacing(folder / "entries.npz") as file:
            np.savez_compressed(file, **{"rows": rows, **arrays})  # type: ignore[arg-type]
        subjects = []
        for i, s in enumerate(self.subjects):
            table = {"id": s.id, "reach": s.reach, "quantisation": s.quantisation, "scan": None}
            if s.scan is not None:
                table["scan"] = _located(s.scan, folder, f"source_{i:04}.npy").to_json()
            subjects.append(table)
        return {"subjects": subjects}

    def _load_state(self, folder: Path, state: Mapping[str, Any]) -> None:
        kinds = {"rows": ("iu", 1), **ENTRIES}
        arrays = read_arrays(
            folder / "entries.npz", kinds, expected="the tables of a BrainClustering", remedy="fit anew"
        )
        rows, subjects = arrays.pop("rows"), state["subjects"]
        if (
            not len(subjects) == len(rows) > 0
            or rows.min() < 1
            or {int(rows.sum())} != {len(a) for a in arrays.values()}
        ):
            raise ValueError(f"{len(rows)} entries for {len(subjects)} subjects")
        if arrays["macro"].min() < 0 or arrays["macro"].max() >= self.macro:
            raise ValueError(f"macro clusters from {arrays['macro'].min()} to {arrays['macro'].max()}")
        parts = {name: np.split(array, np.cumsum(rows)[:-1]) for name, array in arrays.items()}
        for i, table in enumerate(subjects):
            entries = Entries(**{name: several[i] for name, several in parts.items()})
            scan = None if table["scan"] is None else SearchScan.from_json(table["scan"], folder)
            reach, quantisation = (finite(table[name]) for name in ("reach", "quantisation"))
            self.subjects.append(TrainingSubject(str(table["id"]), entries, reach, quantisation, scan))


def _padded(pair: Pair | tuple[np.ndarray, ...]) -> tuple[Any, ...]:
    return (*pair, *(None,) * (len(Pair._fields) - len(pair)))


def _located(scan: SearchScan, folder: Path, name: str) -> SearchScan:
    """The scan by its place on disk; one that is kept in memory is written beside the tables first."""
    if isinstance(scan.kept, np.ndarray):
        with replacing(folder / name) as file:
            np.save(file, scan.kept, allow_pickle=False)
        return replace(scan, kept=Location(name))
    return replace(scan, kept=scan.kept.seen_from(folder))


def _drawn_out(values: np.ndarray, counts: np.ndarray, reach: float) -> np.ndarray:
    """Values above the knee are drawn out linearly so that the greatest one in use becomes ``reach``.

    Args:
        values: ascending; the first is the background's.
        counts: voxels of each.
        reach: what the greatest one becomes.

    Returns:
        The values; unchanged where they reach as far, or where too many voxels would have to change.
    """
    used = np.flatnonzero(counts[1:]) + 1
    if len(used) < 2 or values[used[-1]] >= reach:
        return values
    top = values[used[-1]]
    knee = min(quantile(values[1:], counts[1:], (KNEE,))[0], values[used[-2]])
    if counts[values > knee].sum() > MOST * counts[1:].sum():
        return values
    return np.where(values > knee, knee + (values - knee) * (reach - knee) / (top - knee), values)
