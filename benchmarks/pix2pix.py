"""What do a training step and one whole volume of Pix2Pix in 3D cost, against a plain reading of the original?

    python benchmarks/pix2pix.py

The plain reading does what the authors' code does, in its order and with PyTorch's own layers: all channels are
upsampled and then split in groups of four, stacked and summed; skips are concatenated; everything is in float32 and
laid out channels first; a volume is passed through the network in training mode under ``no_grad``. Ours is
``mrgen.papers.pix2pix.Pix2Pix`` as ``mrgen-train`` and ``mrgen-evaluate`` use it: the sum comes before the upsampling,
channels last, bf16 where the processor computes in it. With the same weights both give the same numbers in float32,
which is checked first, at a quarter of the channels.

A step is the discriminator's and the generator's, each with its Adam, on one crop of 128³; a volume has 256³ voxels,
to which the paper pads a scan. Every number comes from a process of its own, so that the peak of its memory is that
contender's: what it takes beyond Python and the libraries, weights and gradients included. Rounds are interleaved and
the median of the ratios is kept. The plain reading of a whole volume takes 20 GiB, which nothing else should need then.
The ResNet is measured on smaller crops and volumes, since its plain reading takes minutes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import mrgen  # noqa: F401  before torch: it sets how OpenMP's threads wait

import torch  # isort: skip
from store_patches import RESULTS, hardware  # beside this script
from torch import Tensor, nn
from torch.nn import functional as F
from whole_volume import report, versions

from mrgen.evaluation.memory import RESERVE, free_bytes
from mrgen.launch.trainer import channels_last, choose_precision
from mrgen.papers.pix2pix import Pix2Pix

T = TypeVar("T")
L1_WEIGHT, TUMOUR_WEIGHT = 100.0, 100.0
NEEDED_GIB = 20.5  # by the plain reading of a volume of 256³, either generator


# ----- the plain reading ---------------------------------------------------------------------------------------------


class PlainUpsampling(nn.Module):
    """Upsamples every channel and adds up each group of four."""

    def forward(self, x: Tensor) -> Tensor:  # (B, n, X, Y, Z) -> (B, n / 4, 2X, 2Y, 2Z)
        x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
        return torch.stack(x.split(4, dim=1), dim=1).sum(dim=2)


class PlainLevel(nn.Module):
    """One level of the UNet-128 and all that lie below it."""

    def __init__(self, level: int = 0, filters: int = 64, downs: int = 7):
        super().__init__()
        widths = [1, *(min(filters * 2**n, 8 * filters) for n in range(downs))]
        above, width = widths[level], widths[level + 1]
        first, innermost = level == 0, level == downs - 1
        down: list[nn.Module] = [] if first else [nn.LeakyReLU(0.2, inplace=True)]
        down.append(nn.Conv3d(above, width, kernel_size=4, stride=2, padding=1, bias=False))
        if not first and not innermost:
            down.append(nn.BatchNorm3d(width))
        below = [] if innermost else [PlainLevel(level + 1, filters, downs)]
        up: list[nn.Module] = [nn.ReLU(inplace=True), PlainUpsampling()]
        up.append(nn.Conv3d((1 if innermost else 2) * width // 4, above, kernel_size=3, padding=1, bias=first))
        up.append(nn.Tanh() if first else nn.BatchNorm3d(above))
        if 4 <= level < downs - 1:
            up.append(nn.Dropout(0.5))
        self.first, self.body = first, nn.Sequential(*down, *below, *up)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.first else torch.cat([x, self.body(x)], dim=1)


class PlainBlock(nn.Module):
    """One residual block."""

    def __init__(self, width: int):
        super().__init__()
        first, second = ([nn.ReflectionPad3d(1), *convolved(width, width, 3)] for _ in range(2))
        self.body = nn.Sequential(*first, nn.ReLU(inplace=True), nn.Dropout(0.5), *second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def convolved(before: int, width: int, kernel: int, **settings: int) -> list[nn.Module]:
    return [nn.Conv3d(before, width, kernel, bias=False, **settings), nn.BatchNorm3d(width)]  # type: ignore[arg-type]


def plain_resnet(filters: int = 64, blocks: int = 6) -> nn.Sequential:
    """The ResNet generator."""
    n, relu = filters, nn.ReLU(inplace=True)
    layers: list[nn.Module] = [nn.ReflectionPad3d(3), *convolved(1, n, 7), relu]
    for width in (n, 2 * n):
        layers += [*convolved(width, 2 * width, 3, stride=2, padding=1), relu]
    layers += [PlainBlock(4 * n) for _ in range(blocks)]
    for width in (4 * n, 2 * n):
        layers += [PlainUpsampling(), *convolved(width // 4, width // 2, 3, padding=1), relu]
    return nn.Sequential(*layers, nn.ReflectionPad3d(3), nn.Conv3d(n, 1, 7), nn.Tanh())


def plain_discriminator(filters: int = 64) -> nn.Sequential:
    """3D PatchGAN of three strided layers on source and target."""
    widths = [2, filters, 2 * filters, 4 * filters, 8 * filters]
    layers: list[nn.Module] = []
    for n in range(4):
        layers.append(nn.Conv3d(widths[n], widths[n + 1], 4, stride=2 if n < 3 else 1, padding=1, bias=n == 0))
        layers += (
            [nn.LeakyReLU(0.2, inplace=True)] if n == 0 else [nn.BatchNorm3d(widths[n + 1]), nn.LeakyReLU(0.2, True)]
        )
    return nn.Sequential(*layers, nn.Conv3d(widths[4], 1, 4, padding=1))


class Plain:
    """The original's training step and test."""

    def __init__(self, generator: str, filters: int = 64):
        self.generator = PlainLevel(filters=filters) if generator == "unet" else plain_resnet(filters)
        self.discriminator = plain_discriminator(filters)
        nets = self.generator, self.discriminator
        self.adams = [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in nets]

    def step(self, source: Tensor, target: Tensor, label: Tensor) -> None:
        made = self.generator(source)
        self.discriminator.requires_grad_(True)
        self.adams[1].zero_grad()
        fake = self.judged(torch.cat([source, made.detach()], 1), 0.0)
        ((fake + self.judged(torch.cat([source, target], 1), 1.0)) / 2).backward()
        self.adams[1].step()
        self.discriminator.requires_grad_(False)
        self.adams[0].zero_grad()
        brain, tumour = (target > target.min()).float(), (label[:, None] > 0).float()
        l1 = (brain * (target - made)).abs().sum() / brain.sum()
        inside = (tumour * (target - made)).square().sum() / tumour.sum()
        adversarial = self.judged(torch.cat([source, made], 1), 1.0)
        (adversarial + L1_WEIGHT * l1 + TUMOUR_WEIGHT * inside).backward()
        self.adams[0].step()

    def judged(self, pair: Tensor, real: float) -> Tensor:
        logits = self.discriminator(pair)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))

    def infer(self, source: Tensor) -> Tensor:
        with torch.no_grad():  # in training mode, as the original tests
            return self.generator(source)


# ----- ours ----------------------------------------------------------------------------------------------------------


class Alone(Pix2Pix):
    """Pix2Pix without a trainer around it."""

    def optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        return self.__dict__["adams"]

    def manual_backward(self, loss: Tensor) -> None:  # type: ignore[override]
        loss.backward()

    def log(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        pass


class Ours:
    """As Lightning runs it."""

    def __init__(self, generator: str, filters: int = 64):
        model = Alone(
            modalities=("t1", "t2"),
            target="t2",
            generator=generator,  # type: ignore[arg-type]
            filters=filters,
            discriminator_filters=filters,
            l1_weight=L1_WEIGHT,
            tumour_weight=TUMOUR_WEIGHT,
        )
        channels_last(model)
        model.__dict__["adams"] = [player["optimizer"] for player in model.configure_optimizers()]
        self.model, self.half = model, choose_precision("auto", "cpu") == "bf16-mixed"

    def step(self, source: Tensor, target: Tensor, label: Tensor) -> None:
        image = (torch.cat([source, target], dim=1) + 1) / 2
        batch = {"image": image, "label": label, "brain": label == label, "subject": [""]}
        with torch.autocast("cpu", torch.bfloat16, self.half):
            self.model.training_step(batch, 0)  # type: ignore[arg-type]

    def infer(self, source: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, self.half):
            return self.model.synthesize({"t1": (source + 1) / 2}).mean


PLAIN = "plain reading"
CONTENDERS: dict[str, type[Plain] | type[Ours]] = {PLAIN: Plain, "ours": Ours}


def check_agreement(generator: str, side: int) -> None:
    """Raises AssertionError unless both networks give the same numbers for the same weights, in float32."""
    torch.manual_seed(0)
    plain, ours = Plain(generator, filters=16), Ours(generator, filters=16).model
    source, target = torch.rand(2, 1, 1, side, side, side) * 2 - 1
    for net, own in ((plain.generator, ours.generator), (plain.discriminator, ours.discriminator)):
        layers = [[layer for layer in n.modules() if isinstance(layer, nn.Conv3d | nn.BatchNorm3d)] for n in (net, own)]
        for theirs, same in zip(*layers, strict=True):  # both list their layers in the order of a pass
            same.load_state_dict(theirs.state_dict())
        for layer in (*net.modules(), *own.modules()):
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # each draws its own
    with torch.no_grad():
        made = plain.generator(source)
        torch.testing.assert_close(ours.generator(source), made, atol=1e-4, rtol=1e-4)
        judged = plain.discriminator(torch.cat([source, target], dim=1))
        torch.testing.assert_close(ours.discriminator(source, target), judged, atol=1e-4, rtol=1e-4)


# ----- measuring -----------------------------------------------------------------------------------------------------


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Calls a function of this file in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def measure(contender: str, generator: str, task: str, side: int) -> dict[str, float]:
    """Seconds and GiB of a task after a warm-up, in a fresh process."""
    before = peak()
    torch.manual_seed(0)
    model = CONTENDERS[contender](generator)
    source, target = torch.rand(2, 1, 1, side, side, side) * 2 - 1
    label = torch.zeros(1, side, side, side, dtype=torch.int64)
    label[:, side // 4 : side // 2, side // 4 : side // 2, side // 4 : side // 2] = 1
    if task == "step":
        model.step(source, target, label)  # also makes Adam's moments
    else:
        model.infer(source[..., : side // 2, : side // 2, : side // 2])
    start = time.perf_counter()
    model.step(source, target, label) if task == "step" else model.infer(source)
    return {"seconds": time.perf_counter() - start, "GiB": peak() - before}


def peak() -> float:
    """The most memory that this process ever held, in GiB; Linux. What getrusage says begins with its parent's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 2**20


def compared(generator: str, task: str, side: int, rounds: int) -> list[dict]:
    """A row for each contender."""
    free, needed = (free_bytes(torch.device("cpu")) or 0) / RESERVE / 2**30, NEEDED_GIB * (side / 256) ** 3
    if task == "volume" and free < needed:
        print(f"left out: plain, {generator}, {side}³ needs {needed:.1f} GiB and {free:.1f} are free", file=sys.stderr)
        return []
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, several in taken.items():
            several.append(apart(measure, name, generator, task, side))
            print(generator, task, side, name, several[-1], file=sys.stderr)
    rows = []
    for name, several in taken.items():
        row: dict = {"generator, task": f"{generator}, {task} of {side}³", "contender": name}
        for key in ("seconds", "GiB"):
            ratios = [own[key] / plain[key] for own, plain in zip(several, taken[PLAIN], strict=True)]
            row[key] = round(statistics.median(one[key] for one in several), 2)
            row[f"{key}, of plain's"] = round(statistics.median(ratios), 3)
        rows.append(row)
    return rows


def main() -> None:
    """Measures, prints and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unet", type=int, nargs=2, default=[128, 256], help="sides of crop and volume")
    parser.add_argument("--resnet", type=int, nargs=2, default=[64, 128], help="likewise")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for generator, sides in (("unet", options.unet), ("resnet", options.resnet)):
        apart(check_agreement, generator, 128 if generator == "unet" else 32)
        for task, side in zip(("step", "volume"), sides, strict=True):
            rows += compared(generator, task, side, options.rounds)
    precision = choose_precision("auto", "cpu")
    about = {
        "command": "python benchmarks/pix2pix.py"
        + "".join(
            f" --{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in vars(options).items()
            if key != "results" and value != parser.get_default(key)
        ),
        "setting": f"64 filters, batch 1; ours in {precision}; median of {options.rounds} "
        "interleaved rounds, each in a process of its own; GiB beyond Python and the libraries",
        "hardware": hardware(),
        "versions": versions("torch"),
    }
    report(options.results, "pix2pix", "Pix2Pix in 3D", tuple(rows[0]), rows, about)


if __name__ == "__main__":
    main()
