"""How fast is BrainClustering on weighted distinct intensities, against kmeans1d over all voxels?

    python benchmarks/brain_clustering.py                                 # a synthetic pair of BraTS's size
    MRGEN_SCANS=/data/scans python benchmarks/brain_clustering.py        # the T1 and T2 scans found below that folder

Both do the whole of section 2 on the same arrays: preprocessing, macro and micro clusters, matching and table for a
training pair; preprocessing, macro clusters, lookup and median for a query; for a Search query the ranking of all
training subjects and the tables of the two nearest besides. The peer is the method as it is written down, over voxels:
NumPy, SciPy, and the package kmeans1d that the authors use. It holds the training volumes in memory and learns two
pairs at every Search query, as the paper does. Ours reads the training volumes from disk (page cache warm) and has
their tables in the artefact; a further row learns them at the query too. Rounds are interleaved and the median is kept,
because machines are shared.

What is clustered is compared as well: the sum of squared distances to the cluster means, over macro and micro clusters.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from mrgen.papers.brain_clustering import BrainClustering, Location, Pair
from mrgen.papers.brain_clustering.kmeans import kmeans_1d

MACRO, MICRO, WIDTH = 5, 20, 2
RESULTS = Path(__file__).parent / "results"
SUFFIXES = (("_t1.nii.gz", "_t2.nii.gz"), ("-t1n.nii.gz", "-t2w.nii.gz"))

Scans = tuple[np.ndarray, np.ndarray]


def real_pairs(root: Path) -> list[Scans]:
    import nibabel

    def read(path: str) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(nibabel.load(path).dataobj))

    found = []
    for t1, t2 in SUFFIXES:
        for path in sorted(root.rglob(f"*{t1}")):
            other = str(path).removesuffix(t1) + t2
            if os.path.exists(other):
                found.append((read(str(path)), read(other)))
    return found


def synthetic_pair(seed: int) -> Scans:
    """Smooth tissue in an ellipsoid, T2 of the opposite order, noise of its own in each; int16."""
    shape, rng = (240, 240, 155), np.random.default_rng(seed)
    axes = [(np.arange(s) - (s - 1) / 2) / (0.36 * s) for s in shape]
    brain = axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None, :] ** 2 <= 1
    tissue = ndimage.zoom(rng.uniform(0.2, 1, (30, 30, 31)), (8, 8, 5), order=1)
    t1 = 800 * tissue + rng.normal(0, 40, shape)
    t2 = 900 * (1.3 - tissue) ** 2 + rng.normal(0, 50, shape)
    t1, t2 = ((np.rint(v).clip(1) * brain).astype(np.int16) for v in (t1, t2))
    return t1, t2


class Ours:
    """The estimator, its Search with the training sources as npy files."""

    def __init__(self, training: list[Scans], folder: Path) -> None:
        settings = {"macro": MACRO, "micro_per_macro": MICRO}
        self.training, self.settings = training, settings
        self.train = BrainClustering(**settings).fit(training)
        self.search = BrainClustering(**settings, mode="search", width=WIDTH)
        self.search.fit(self.located(folder))

    def located(self, folder: Path) -> Iterator[Pair]:
        for i, (t1, t2) in enumerate(self.training):
            np.save(folder / f"{i}.npy", t1)
            yield Pair(t1, t2, location=Location(str(folder / f"{i}.npy")))

    def pair(self) -> None:
        BrainClustering(**self.settings).fit(self.training[:1])

    def query(self, t1: np.ndarray) -> np.ndarray:
        return self.train.synthesize(t1)

    def search_query(self, t1: np.ndarray) -> np.ndarray:
        return self.search.synthesize(t1)

    def search_query_learning(self, t1: np.ndarray) -> None:
        nearest = [int(id_) for id_ in self.search.query(t1).subjects]
        BrainClustering(**self.settings).fit(self.training[i] for i in nearest)


class OverVoxels:
    """The printed method as it reads, over voxels."""

    def __init__(self, training: list[Scans]) -> None:
        self.training = training
        self.sources = [self.preprocessed(t1, True) for t1, _ in training]

    @staticmethod
    def preprocessed(volume: np.ndarray, outliers: bool) -> np.ndarray:
        volume = volume.astype(np.float64).clip(0)
        if outliers:
            q1, q3 = np.percentile(volume[volume > 0], [25, 75])
            volume[volume > q3 + 1.5 * (q3 - q1)] = 0
        return volume / volume.max()

    @staticmethod
    def nested(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Macro and micro label of each voxel, and the cost of both clusterings."""
        import kmeans1d

        macro = kmeans1d.cluster(voxels, MACRO)
        labels, cost = np.array(macro.clusters), 0.0
        cost += float(((voxels - np.array(macro.centroids)[labels]) ** 2).sum())
        micro = np.zeros(len(voxels), int)
        for t in range(MACRO):
            inside = voxels[labels == t]
            found = kmeans1d.cluster(inside, MICRO)
            micro[labels == t] = found.clusters
            cost += float(((inside - np.array(found.centroids)[found.clusters]) ** 2).sum())
        return labels, micro, cost

    def learned(self, pairs: list[Scans]) -> tuple[list[dict[float, tuple[float, int]]], float]:
        tables: list[dict[float, tuple[float, int]]] = [{} for _ in range(MACRO)]
        cost = 0.0
        for t1, t2 in pairs:
            a, b = self.preprocessed(t1, True), self.preprocessed(t2, False)
            both = (a > 0) & (b > 0)
            a, b = a[both], b[both]
            (macro_a, micro_a, cost_a), (macro_b, micro_b, cost_b) = self.nested(a), self.nested(b)
            cost += cost_a + cost_b
            for i, j in matched(macro_a, macro_b, MACRO):
                of_a, of_b = macro_a == i, macro_b == j
                for m, n in matched(micro_a[of_a & of_b], micro_b[of_a & of_b], MICRO):
                    from_a, from_b = a[of_a & (micro_a == m)], b[of_b & (micro_b == n)]
                    if len(from_a) and len(from_b):
                        mean, count = tables[i].get(from_a.mean(), (0.0, 0))
                        tables[i][from_a.mean()] = mean + (from_b.mean() - mean) / (count + 1), count + 1
        return tables, cost

    def pair(self) -> float:
        return self.learned(self.training[:1])[1]

    def query(self, t1: np.ndarray, tables: list | None = None) -> np.ndarray:
        import kmeans1d

        if tables is None:
            tables = self.tables
        unit = self.preprocessed(t1, True)
        voxels = unit[unit > 0]
        macro, made = np.array(kmeans1d.cluster(voxels, MACRO).clusters), np.zeros(len(voxels))
        for t, table in enumerate(tables):
            keys = np.array(sorted(table))
            values = np.array([table[key][0] for key in keys])
            x = voxels[macro == t]
            inside = np.interp(x, keys, values)
            beyond = np.where(x < keys[0], values[0] * x / keys[0], values[-1] * x / keys[-1])
            made[macro == t] = np.where((x < keys[0]) | (x > keys[-1]), beyond, inside)
        out = np.zeros(t1.shape)
        out[unit > 0] = made
        return ndimage.median_filter(out, size=(3, 3, 1), mode="nearest")

    def search_query(self, t1: np.ndarray) -> np.ndarray:
        unit = self.preprocessed(t1, True)
        errors = [np.mean((unit - source) ** 2) for source in self.sources]
        nearest = np.argsort(errors)[:WIDTH]
        return self.query(t1, self.learned([self.training[i] for i in nearest])[0])


def matched(a: np.ndarray, b: np.ndarray, k: int) -> Iterator[tuple[int, int]]:
    overlap = np.bincount(a * k + b, minlength=k * k).reshape(k, k)
    yield from zip(*linear_sum_assignment(overlap, maximize=True), strict=True)


def weighted_cost(pair: Scans) -> float:
    """What the estimator's clusterings of a pair cost, over macro and micro clusters of both."""
    units = [OverVoxels.preprocessed(volume, outliers) for volume, outliers in zip(pair, (True, False), strict=True)]
    both, cost = (units[0] > 0) & (units[1] > 0), 0.0
    for unit in units:
        values, counts = np.unique(unit[both], return_counts=True)
        macro = kmeans_1d(values, counts, MACRO)
        cost += macro.cost + kmeans_1d(values, counts, MICRO, groups=macro.labels).cost
    return cost


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def hardware() -> str:
    model = platform.processor() or "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def main() -> None:
    """Measures, prints and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peer-rounds", type=int, default=3, help="of kmeans1d over all voxels: most of a minute each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    root = os.environ.get("MRGEN_SCANS")
    training = real_pairs(Path(root)) if root else []
    origin = f"{len(training)} real scans of MRGEN_SCANS" if training else "2 synthetic scans"
    training = training or [synthetic_pair(0), synthetic_pair(1)]
    query = training[-1][0]  # for time it does not matter that the query is a training subject
    with tempfile.TemporaryDirectory(prefix="brain_clustering_") as temporary:
        ours, peer = Ours(training, Path(temporary)), OverVoxels(training)
        tables, their_cost = peer.learned(training)  # as `ours` has learned before the first round
        peer.tables = tables
        runs: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
            "training pair": (ours.pair, peer.pair),
            "query": (lambda: ours.query(query), lambda: peer.query(query)),
            f"Search query, {WIDTH} of {len(training)}": (
                lambda: ours.search_query(query),
                lambda: peer.search_query(query),
            ),
            f"Search query, {WIDTH} of {len(training)}, tables learned at the query": (
                lambda: ours.search_query_learning(query),
                None,  # the same work as above: the peer has no other
            ),
        }
        taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
        for i in range(-1, options.rounds):  # round −1 warms caches, the page cache included, and is not counted
            for name, (mine, theirs) in runs.items():
                spent = seconds(mine)
                if i >= 0:
                    taken[name][0].append(spent)
                if theirs is not None and 0 <= i < options.peer_rounds:
                    taken[name][1].append(seconds(theirs))
        difference = float(np.abs(ours.query(query) - peer.query(query)).max())
    rows = []
    for name, (mine, theirs) in taken.items():
        theirs = theirs or rows[-1]["all"]
        ratios = [b / a for a, b in zip(mine, theirs, strict=False)]  # of each round, and then the median
        rows.append(
            {
                "what": name,
                "weighted_seconds": round(statistics.median(mine), 4),
                "over_voxels_seconds": round(statistics.median(theirs), 2),
                "times_faster": round(statistics.median(ratios), 1),
                "all": theirs,
            }
        )
    rows = [{key: value for key, value in row.items() if key != "all"} for row in rows]
    our_cost = sum(map(weighted_cost, training))
    shape = "×".join(map(str, query.shape))
    distinct = [[len(np.unique(v[v > 0])) for v in pair] for pair in training]
    arguments = "".join(
        f" --{key.replace('_', '-')} {value}"
        for key, value in vars(options).items()
        if key != "results" and value != parser.get_default(key)
    )
    about = {
        "command": f"{'MRGEN_SCANS=… ' if root else ''}python benchmarks/brain_clustering.py{arguments}",
        "setting": (
            f"{origin}, {shape}, distinct intensities (source, target) {distinct}; {MACRO} macro clusters of {MICRO} "
            f"micro clusters; median of {options.rounds} interleaved rounds ({options.peer_rounds} over all voxels)"
        ),
        "agreement": (
            f"the clusterings' cost differs by {abs(our_cost / their_cost - 1):.1e} of itself, "
            f"the queries' results by at most {difference:.1e}"
        ),
        "hardware": hardware(),
        **{name: version(name) for name in ("numpy", "scipy", "kmeans1d")},
    }
    report(options.results, rows, about)


def report(folder: Path, rows: list[dict], about: dict[str, str]) -> None:
    lines = ["| | weighted, s | over all voxels, s | times faster |", "|---|---:|---:|---:|"]
    lines += [
        f"| {r['what']} | {r['weighted_seconds']:.3f} | {r['over_voxels_seconds']:.2f} | {r['times_faster']:.0f} |"
        for r in rows
    ]
    print("\n".join([*lines, "", about["agreement"]]))
    versions = ", ".join(f"{name} {about[name]}" for name in ("numpy", "scipy", "kmeans1d"))
    page = [
        "# BrainClustering, weighted distinct intensities against kmeans1d over all voxels",
        "",
        f"`{about['command']}`",
        "",
        f"{about['setting']}. {about['hardware']}. {versions}.",
        "",
        *lines,
        "",
        f"Agreement: {about['agreement']}.",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "brain_clustering.md").write_text("\n".join(page) + "\n")
    (folder / "brain_clustering.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
