"""How fast is one whole subject, against MONAI's sliding window?

    python benchmarks/whole_volume.py

The subject is a phantom at 1 mm on BraTS's 240 × 240 × 155 grid, the network a 3D U-Net of 4.9 million parameters with
four sequences in and four classes out. The brain box is one pass over the smallest box of multiples of 8 that holds the
brain, pasted back into the grid (``mrgen.evaluation.inference.infer``). MONAI's sliding window goes over the whole grid
in windows of 96³ with its default overlap of 0.25. All run the same network, laid out channels last. Rounds are
interleaved and the median of the ratios is kept.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mrgen  # noqa: F401  before torch: it sets how OpenMP's threads wait

import torch  # isort: skip
from monai.inferers import sliding_window_inference
from store_patches import LAYOUT, RESULTS, hardware  # beside this script

from mrgen.data.layouts import Layout
from mrgen.data.normalisation import ZScore
from mrgen.data.phantom import grow_cohort
from mrgen.data.preparation import prepare_cohort
from mrgen.data.store import Store, StoredSubject
from mrgen.evaluation.inference import infer
from mrgen.nets.unet3d import SegmentationUNet3d

WINDOW, PEER = 96, "MONAI sliding window, fp32"


def grow_subject(folder: Path) -> StoredSubject:
    grow_cohort(folder / "cohort", layout="brats2019", subjects=1, spacing=1.0, seed=0, workers=0)
    layout = Layout.from_conf(LAYOUT)
    prepare_cohort(layout, folder / "cohort", folder / "store", workers=0, progress=False)
    return next(iter(Store(folder / "store").subjects.values()))


def brain_box(subject: StoredSubject, divisor: int) -> list[tuple[int, int]]:
    """The brain's box, every side rounded up to a multiple of the divisor, about the same centre."""
    box = []
    for start, stop in subject.brain_box:
        more = -(stop - start) % divisor
        box.append((start - more // 2, stop + more - more // 2))
    return box


def main() -> None:
    """Measures, prints and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=1, help="windows of one of MONAI's passes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="whole_volume_") as temporary:
        subject = grow_subject(Path(temporary))
        brain = torch.from_numpy(subject.read_brain())
        statistics_of = [subject.statistics[name] for name in subject.modalities]
        image = ZScore()(torch.from_numpy(subject.read_image()), brain, statistics_of)[None].to(device)
    torch.manual_seed(0)
    net = SegmentationUNet3d(4, 4, filters=options.filters).eval().to(device, memory_format=torch.channels_last_3d)
    box = brain_box(subject, net.divisor)
    windows = [(WINDOW,) * 3, options.windows]

    def timed(run: Callable[[], torch.Tensor], half: bool) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, half):
                answer = run()
                assert answer.shape == (1, 4, *subject.shape)
                if device == "cuda":
                    torch.cuda.synchronize()
            return time.perf_counter() - start

        return measure

    contenders = {
        f"{name}, {'bf16' if half else 'fp32'}": timed(run, half)
        for half in (False, True)
        for name, run in {
            "MONAI sliding window": lambda: sliding_window_inference(image, *windows, net),
            "brain box": lambda: infer(net, image, box=box, divisor=net.divisor),
        }.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(-1, options.rounds):  # round −1 warms caches and is not counted
        for name, run in contenders.items():
            took = run()
            if i >= 0:
                seconds[name].append(took)
    rows = [
        {
            "contender": name,
            "seconds": round(statistics.median(several), 2),
            "times_as_fast": round(statistics.median(a / b for a, b in zip(seconds[PEER], several, strict=True)), 2),
        }
        for name, several in seconds.items()
    ]
    sides = "×".join(str(b - a) for a, b in box)
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    about = {
        "command": "python benchmarks/whole_volume.py"
        + "".join(
            f" --{key} {value}"
            for key, value in vars(options).items()
            if key != "results" and value != parser.get_default(key)
        ),
        "setting": f"{'×'.join(map(str, subject.shape))} voxels, brain box {sides}; U-Net of {parameters:.1f} million "
        f"parameters; median of {options.rounds} interleaved rounds; ratios to MONAI in fp32",
        "hardware": torch.cuda.get_device_name() if device == "cuda" else hardware(),
        "versions": versions("torch", "monai"),
    }
    report(options.results, "whole_volume", "A whole subject", ("contender", "seconds", "times as fast"), rows, about)


def versions(*packages: str) -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in packages)


def report(
    folder: Path, name: str, title: str, columns: tuple[str, ...], rows: list[dict], about: dict[str, str]
) -> None:
    """Prints the table and keeps it as Markdown and JSON."""
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]
    print("\n".join(lines))
    page = [f"# {title}", "", f"`{about['command']}`", ""]
    page += [f"{about['setting']}. {about['hardware']}. {about['versions']}.", "", *lines]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(page) + "\n")
    (folder / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
