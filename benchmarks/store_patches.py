"""How fast are random crops from the store, against a bare memory map and against TorchIO and MONAI?

    python benchmarks/store_patches.py                   # six synthetic subjects in a temporary folder
    python benchmarks/store_patches.py --store stores/x  # an existing four-sequence store

Every contender delivers random 96³ crops of all sequences of the same subjects. Rounds are interleaved and the median
is kept, because machines are shared. The ratio to the bare map of the same file is the number to read: patches per
second depend on the machine.
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
import torch

from mrgen.data.layouts import Layout
from mrgen.data.store import Store, StoredSubject, to_original, write_cohort, write_subject

SHAPE, SIDE = (240, 240, 155), 96
PEER_ROUNDS = 3  # they are slower by two orders of magnitude: what varies by a fifth needs no more
RESULTS = Path(__file__).parent / "results"
LAYOUT = Path(__file__).parents[1] / "conf" / "data" / "layout" / "brats2019.yaml"


def grow_store(path: Path, n: int) -> Store:
    """`n` subjects of BraTS's size: smooth random intensities in an ellipsoid, int16."""
    from scipy.ndimage import zoom

    write_cohort(path, Layout.from_conf(LAYOUT), ("t1", "t1ce", "t2", "flair"))
    axes = [(np.arange(s) - (s - 1) / 2) / (0.38 * s) for s in SHAPE]
    brain = axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None, :] ** 2 <= 1
    for i in range(n):
        rng = np.random.default_rng(i)
        coarse = rng.normal(400, 150, (4, 30, 30, 31)).clip(1, 1500)
        image = np.stack([zoom(c, (8, 8, 5), order=1) for c in coarse])
        image = ((image + rng.normal(0, 20, image.shape).astype(np.float32)).clip(1) * brain).astype(np.int16)
        write_subject(path, id=f"S{i}", image=image, brain=brain, affine=np.diag([-1.0, -1, 1, 1]))
    return Store(path)


def corners(subjects: list[StoredSubject], seed: int) -> Iterator[tuple[StoredSubject, tuple[tuple[int, int], ...]]]:
    rng = np.random.default_rng(seed)
    while True:
        subject = subjects[rng.integers(len(subjects))]
        starts = [int(rng.integers(n - SIDE + 1)) for n in subject.shape]
        yield subject, tuple((a, a + SIDE) for a in starts)


class Crops(torch.utils.data.Dataset):
    """Crops as a map-style dataset; `bare` reads the map itself, else the store's reader into a kept float buffer."""

    def __init__(self, subjects: list[StoredSubject], n: int, bare: bool) -> None:
        self.subjects, self.n, self.bare = subjects, n, bare
        self.maps: dict[str, np.ndarray] = {}
        self.buffer: np.ndarray | None = None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        subject, box = next(corners(self.subjects, i))
        if self.bare:
            if subject.id not in self.maps:
                self.maps[subject.id] = np.load(subject.path / "image.npy", mmap_mode="r")
            return torch.from_numpy(np.array(self.maps[subject.id][(slice(None), *(slice(a, b) for a, b in box))]))
        if self.buffer is None:
            self.buffer = np.empty((len(subject.modalities), SIDE, SIDE, SIDE), np.float32)
        return z_scored(subject, subject.read_image(box=box, out=self.buffer))


def z_scored(subject: StoredSubject, patch: np.ndarray) -> torch.Tensor:
    table = [subject.statistics[m] for m in subject.modalities]
    mean, std = (torch.tensor([row[k] for row in table]).float() for k in ("clipped_mean", "clipped_std"))
    return torch.from_numpy(patch).sub_(mean[:, None, None, None]).div_(std[:, None, None, None])


def timed(deliver: Callable[[int, int], None]) -> Callable[[int, int], float]:
    def run(n: int, seed: int) -> float:
        start = time.perf_counter()
        deliver(n, seed)
        return time.perf_counter() - start

    return run


def contenders(store: Store, nifti: Path, cache: Path, workers: int) -> dict[str, Callable[[int, int], float]]:
    """Name → a function of (patches wanted, seed) that delivers them and says how many seconds that took."""
    subjects = list(store.subjects.values())
    channels = len(store.modalities)
    maps = {}
    for s in subjects:  # the same file and type, opened the barest way: np.memmap at the header's end
        header = np.load(s.path / "image.npy", mmap_mode="r")
        maps[s.id] = np.memmap(
            s.path / "image.npy", header.dtype, "r", offset=header.offset, shape=(channels, *s.shape)
        )
    stored = np.result_type(*(m.dtype for m in maps.values()))
    buffer = np.empty(buffer_shape(store), stored)
    floats = np.empty(buffer.shape, np.float32)

    @timed
    def bare(n: int, seed: int) -> None:
        for _, (s, box) in zip(range(n), corners(subjects, seed), strict=False):
            np.array(maps[s.id][(slice(None), *(slice(a, b) for a, b in box))])

    @timed
    def bare_reused(n: int, seed: int) -> None:
        for _, (s, box) in zip(range(n), corners(subjects, seed), strict=False):
            np.copyto(buffer, maps[s.id][(slice(None), *(slice(a, b) for a, b in box))])

    @timed
    def fresh(n: int, seed: int) -> None:
        for _, (s, box) in zip(range(n), corners(subjects, seed), strict=False):
            s.read_image(box=box)

    @timed
    def reused(n: int, seed: int) -> None:
        for _, (s, box) in zip(range(n), corners(subjects, seed), strict=False):
            s.read_image(box=box, out=buffer)

    @timed
    def normalised(n: int, seed: int) -> None:
        for _, (s, box) in zip(range(n), corners(subjects, seed), strict=False):
            z_scored(s, s.read_image(box=box, out=floats))

    def loaded(bare: bool) -> Callable[[int, int], float]:
        def run(n: int, seed: int) -> float:
            ahead = 2 * workers  # what is prefetched while the first item is waited for is not counted
            dataset = Crops(subjects, n + ahead, bare)
            loader = iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers))
            for _ in range(ahead):
                next(loader)  # the start of the processes is paid once an epoch
            start = time.perf_counter()
            for _ in loader:
                pass
            return time.perf_counter() - start

        return run

    found = {
        "bare np.memmap": bare,
        "bare np.memmap, buffer reused": bare_reused,
        "store": fresh,
        "store, buffer reused": reused,
        "store, float32, z-scored": normalised,
        f"bare np.memmap, {workers} worker processes": loaded(True),
        f"store, float32, z-scored, {workers} worker processes": loaded(False),
    }
    found.update(peers(store, nifti, cache))
    return found


def buffer_shape(store: Store) -> tuple[int, ...]:
    return (len(store.modalities), SIDE, SIDE, SIDE)


def peers(store: Store, nifti: Path, cache: Path) -> dict[str, Callable[[int, int], float]]:
    """TorchIO's Queue and MONAI's PersistentDataset on the same subjects, each as its documentation shows it."""
    import torchio
    from monai.data import DataLoader, PersistentDataset
    from monai.transforms import Compose, ConcatItemsd, EnsureChannelFirstd, LoadImaged, RandSpatialCropd

    files = [{m: str(nifti / f"{s}_{m}.nii.gz") for m in store.modalities} for s in store.subjects]
    tio_subjects = [torchio.Subject(**{m: torchio.ScalarImage(f[m]) for m in store.modalities}) for f in files]

    @timed
    def queue(n: int, seed: int) -> None:
        torch.manual_seed(seed)
        patches = torchio.Queue(
            torchio.SubjectsDataset(tio_subjects, load_getitem=True),
            max_length=8 * len(files),
            samples_per_volume=8,
            sampler=torchio.UniformSampler(SIDE),
            num_workers=0,
        )
        for i, subject in enumerate(torchio.SubjectsLoader(patches, batch_size=1, num_workers=0)):
            assert torch.cat([subject[m]["data"] for m in store.modalities], dim=-4).shape[-4:] == buffer_shape(store)
            if i + 1 == n:
                break

    keys = list(store.modalities)
    crop = RandSpatialCropd("image", (SIDE,) * 3, random_size=False)
    transforms = [LoadImaged(keys), EnsureChannelFirstd(keys), ConcatItemsd(keys, "image"), crop]
    persistent = PersistentDataset(files, Compose(transforms), cache_dir=cache)

    @timed
    def persisted(n: int, seed: int) -> None:
        crop.set_random_state(seed)
        done = 0
        while done < n:
            for item in DataLoader(persistent, batch_size=1, shuffle=True, num_workers=0):
                assert item["image"].shape[1:] == buffer_shape(store)
                done += 1
                if done == n:
                    break

    return {"TorchIO Queue (8 patches a volume)": queue, "MONAI PersistentDataset (cache warm)": persisted}


def export(store: Store, folder: Path) -> None:
    import nibabel

    folder.mkdir()
    for id_, subject in store.subjects.items():
        for m in store.modalities:
            volume = to_original(subject.read_image([m])[0], subject)
            nibabel.save(nibabel.Nifti1Image(volume, subject.original_affine), folder / f"{id_}_{m}.nii.gz")


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
    parser.add_argument("--store", type=Path, help="an existing store; default: a synthetic one")
    parser.add_argument("--subjects", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--patches", type=int, default=60, help="a round, for the fast contenders")
    parser.add_argument("--peer-patches", type=int, default=48, help="a round, for TorchIO and MONAI")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader's worker; two threads on a busy machine wait for each other
    with tempfile.TemporaryDirectory(prefix="store_patches_") as temporary:
        folder = Path(temporary)
        store = Store(options.store) if options.store else grow_store(folder / "store", options.subjects)
        export(store, folder / "nifti")
        runs = contenders(store, folder / "nifti", folder / "cache", options.workers)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(-1, options.rounds):  # round −1 warms caches, the page cache included, and is not counted
            for name, run in runs.items():
                peer = name.startswith(("TorchIO", "MONAI"))
                if peer and i >= PEER_ROUNDS:
                    continue
                wanted = options.peer_patches if peer else options.patches
                seconds = run(wanted, 1000 + i)
                if i >= 0:
                    rates[name].append(wanted / seconds)
    base = rates["bare np.memmap"]
    rows = [
        {
            "contender": name,
            "patches_per_second": round(statistics.median(several), 1),
            # of each round, and then the median: what slows a shared machine slows both
            "ratio_to_bare": round(statistics.median(a / b for a, b in zip(several, base, strict=False)), 3),
        }
        for name, several in rates.items()
    ]
    packages = {name: version(name) for name in ("numpy", "torch", "torchio", "monai")}
    arguments = "".join(
        f" --{key.replace('_', '-')} {value}"
        for key, value in vars(options).items()
        if key not in ("store", "results") and value != parser.get_default(key)
    )
    command = f"python benchmarks/store_patches.py{' --store …' if options.store else ''}{arguments}"
    subject = next(iter(store.subjects.values()))
    setting = (
        f"{len(store.subjects)} subjects of {'×'.join(map(str, subject.shape))}, {len(store.modalities)} sequences, "
        f"{subject.read_image(box=((0, 1),) * 3).dtype}; random {SIDE}³ crops; page cache warm; "
        f"one torch thread; median of {options.rounds} interleaved rounds ({PEER_ROUNDS} for TorchIO and MONAI)"
    )
    report(options.results, rows, {"command": command, "setting": setting, "hardware": hardware(), **packages})


def report(folder: Path, rows: list[dict], about: dict[str, str]) -> None:
    lines = ["| contender | patches/s | ratio to bare memmap |", "|---|---:|---:|"]
    lines += [f"| {r['contender']} | {r['patches_per_second']:g} | {r['ratio_to_bare']:.3g} |" for r in rows]
    print("\n".join(lines))
    versions = ", ".join(f"{k} {v}" for k, v in about.items() if k not in ("command", "setting", "hardware"))
    page = [
        "# Random crops from the store",
        "",
        f"`{about['command']}`",
        "",
        f"{about['setting']}. {about['hardware']}. {versions}.",
        "",
        *lines,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store_patches.md").write_text("\n".join(page) + "\n")
    (folder / "store_patches.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
