"""What do 20 Monte Carlo dropout samples cost, in single passes?

    python benchmarks/monte_carlo.py

RS-Net's ``synthesize`` (what lies before the first dropout once, no segmentation block, dropout drawn by gaps) against
three single passes of the same network: the pass that a loop over ``model(x)`` repeats, built from PyTorch's own
layers with dropout active; our own pass, both blocks, dropout off; and our own synthesis without samples, which leaves
the segmentation block out as well. Rounds are interleaved and the median of the ratios is kept.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mrgen  # noqa: F401  before torch: it sets how OpenMP's threads wait

import torch  # isort: skip
from store_patches import RESULTS, hardware  # beside this script
from torch import nn
from whole_volume import report, versions

from mrgen.nets import blocks
from mrgen.nets.monte_carlo import only_dropout_active
from mrgen.papers.rsnet import RSNet

MODALITIES = ("t1", "t1ce", "t2", "flair")
SAMPLES = 20


def of_pytorchs_layers(model: nn.Module) -> nn.Module:
    """The same network and weights, with PyTorch's own norm, pooling and dropout in place of ours."""
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, blocks.InstanceNorm3d):
                norm = nn.InstanceNorm3d(child.num_features, affine=True)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm.eval())
            elif isinstance(child, blocks.AvgPool3d):
                setattr(parent, name, nn.AvgPool3d(2))
            elif isinstance(child, blocks.Dropout):
                setattr(parent, name, nn.Dropout(child.p).eval())
    return plain


def main() -> None:
    """Measures, prints and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=3, default=[88, 104, 80], help="voxels: the phantom's box at 2 mm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1, help="mc_batch")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = RSNet(
        modalities=MODALITIES,
        target="t2",
        classes=("background", "core", "edema", "enhancing"),
        regions={"WT": [1, 2, 3]},
        filters=options.filters,
        mc_samples=SAMPLES,
        mc_batch=options.batch,
    )
    model = model.eval().to(device, memory_format=torch.channels_last_3d)
    once = copy.deepcopy(model)
    once.mc_samples = 0
    plain = of_pytorchs_layers(model)
    inputs = {name: torch.randn(1, 1, *options.size, device=device) for name in MODALITIES}

    def of_a_loop() -> None:
        with only_dropout_active(plain):
            plain(inputs)

    passes: dict[str, Callable[[], object]] = {
        "a loop's pass (PyTorch's layers, dropout active)": of_a_loop,
        "our pass, both blocks, dropout off": lambda: model(inputs),
        "our synthesis without samples": lambda: once.synthesize(inputs),
    }

    def seconds(run: Callable[[], object], half: bool) -> float:
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, half):
            run()
            if device == "cuda":
                torch.cuda.synchronize()
        return time.perf_counter() - start

    rows = []
    for half in (False, True):
        taken: dict[str, list[float]] = {name: [] for name in passes}
        sampling = []
        for i in range(-1, options.rounds):  # round −1 warms caches and is not counted
            several = seconds(lambda: model.synthesize(inputs), half)
            singles = {name: min(seconds(run, half) for _ in range(3)) for name, run in passes.items()}
            if i >= 0:
                sampling.append(several)
                for name, single in singles.items():
                    taken[name].append(single)
        for name, singles_of_it in taken.items():
            ratios = [several / single for several, single in zip(sampling, singles_of_it, strict=True)]
            rows.append(
                {
                    "single pass": name,
                    "precision": "bf16" if half else "fp32",
                    "seconds of a pass": round(statistics.median(singles_of_it), 3),
                    f"seconds of {SAMPLES} samples": round(statistics.median(sampling), 2),
                    "samples cost, in passes": round(statistics.median(ratios), 1),
                }
            )
    arguments = "".join(
        f" --{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in vars(options).items()
        if key != "results" and value != parser.get_default(key)
    )
    about = {
        "command": f"python benchmarks/monte_carlo.py{arguments}",
        "setting": f"RS-Net of {options.filters} filters, {'×'.join(map(str, options.size))} voxels, dropout 0.05; "
        f"median of {options.rounds} interleaved rounds",
        "hardware": torch.cuda.get_device_name() if device == "cuda" else hardware(),
        "versions": versions("torch"),
    }
    report(options.results, "monte_carlo", f"{SAMPLES} Monte Carlo dropout samples", tuple(rows[0]), rows, about)


if __name__ == "__main__":
    main()
