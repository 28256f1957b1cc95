"""``plan=true``: what a run will cost, without training it."""

import time
from functools import lru_cache
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mrgen.data.layouts import Layout
from mrgen.errors import UserError
from mrgen.launch.instantiate import instantiate, plain
from mrgen.launch.trainer import check_epochs, choose_precision
from mrgen.launch.training import build_datamodule, fill_from_store
from mrgen.nets.blocks import ConvBlock3d
from mrgen.papers.brain_clustering.estimator import Estimator

__all__ = ["plan", "show"]

FULL_SIZE = (184, 200, 152)  # RS-Net's crop of a BraTS volume at 1 mm


def _devices(devices: Any) -> int:
    """How many processes Lightning's ``trainer.devices`` means on this machine."""
    if isinstance(devices, int) and devices > 0:
        return devices
    if isinstance(devices, list | ListConfig):
        return len(devices)
    return max(1, torch.cuda.device_count())  # auto or -1


def plan(conf: DictConfig) -> dict[str, Any]:
    """Parameters, memory, steps and a duration estimate of a preset at its full size.

    One training step runs on the meta device, which computes shapes and no numbers: what autograd keeps is the
    activation memory, and the counted operations over this machine's measured rate give the time. Without a prepared
    store the crop is ``data.sampling.size`` or, for whole brains, RS-Net's 184 × 200 × 152, and the number of training
    subjects is unknown.

    Returns:
        ``parameters``, ``crop`` (voxels), ``memory_gib`` of one step, ``steps_per_epoch``, ``epochs``, ``steps``,
        ``teraflop_per_step`` and ``hours`` (None where the store is missing).
    """
    check_epochs(conf.trainer.max_epochs)
    if not conf.trainer.max_epochs or conf.trainer.max_epochs < 1:
        raise UserError("trainer.max_epochs has no end, and a plan needs one; give a number of epochs")
    full = FULL_SIZE[:2] if conf.data.sampling._target_.endswith(".AxialSlice") else FULL_SIZE
    try:
        fill_from_store(conf)
        datamodule = build_datamodule(conf.data)
        crop = datamodule.sampling.size or full
        steps: int | None = datamodule.train_steps(_devices(conf.trainer.devices))
    except UserError as error:
        if "mrgen-prepare" not in str(error):  # anything but a store that is not there yet
            raise
        crop, steps = plain(conf.data.sampling).get("size") or full, conf.data.steps_per_epoch
        _fill_from_layout(conf)
    precision = choose_precision(conf.trainer.precision, conf.trainer.accelerator)
    with torch.device("meta"):  # neither memory nor random numbers for the weights
        model = instantiate(conf.model)
    if isinstance(model, Estimator):
        raise UserError(f"{conf.name} has no network and takes seconds a subject; there is nothing to plan")
    divisor = getattr(model, "divisor", 1)
    crop = tuple(-(-n // divisor) * divisor for n in crop)  # what is not known yet will be a multiple of it
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)

    shape = (conf.data.batch_size, *crop)
    batch = {
        "image": torch.empty(shape[0], len(conf.data.modalities), *crop, device="meta"),
        "label": torch.zeros(shape, dtype=torch.int64, device="meta"),
        "brain": torch.ones(shape, dtype=torch.bool, device="meta"),
        "subject": [""] * shape[0],
    }
    weights_of_model = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage: what two layers keep counts once, and weights are counted below

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if tensor.device.type == "meta" and place not in weights_of_model:
            kept[place] = tensor
        return tensor

    half = "bf16" in precision
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        weights = torch.ones(len(conf.data.layout.classes[conf.data.labels]), device="meta")
        loss = model.losses(batch, weights)["loss"]
        activations = sum(t.untyped_storage().nbytes() for t in kept.values())
        loss.backward()
    if half:  # autocast does not know the meta device; under it the layers keep their tensors in half precision
        activations //= 2
    operations = counter.get_total_flops()
    epochs = int(conf.trainer.max_epochs) * getattr(model, "stages", 1)
    hours = None if steps is None else steps * epochs * operations / _rate(half) / 3600
    return {
        "parameters": parameters,
        "crop": tuple(int(n) for n in crop),
        "precision": precision,
        "memory_gib": (16 * parameters + activations) / 2**30,  # weights, gradients and Adam's two moments in float32
        "steps_per_epoch": steps,
        "epochs": epochs,
        "steps": None if steps is None else steps * epochs,
        "teraflop_per_step": operations / 1e12,
        "hours": hours,
    }


def _fill_from_layout(conf: DictConfig) -> None:
    """Layout and sequences as the store will have them; a user's own cohort names a file of its table."""
    if OmegaConf.is_missing(conf.data, "layout"):
        raise UserError("data.layout is not set; give the cohort's table of patterns: data.layout=my_cohort.yaml")
    layout = Layout.from_conf(conf.data.layout)
    with open_dict(conf.data):
        conf.data.layout = layout.numbered(conf.data.labels).to_conf()
        if conf.data.modalities is None:
            conf.data.modalities = list(layout.images)


@lru_cache
def _rate(half: bool) -> float:
    """Operations a second of 3D convolutions, forward and backward, on the device that training would use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, side = 16, 48
    layer = ConvBlock3d(width, width)
    layer.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    x = torch.randn(1, width, side, side, side, device=device, requires_grad=True)
    operations, best = 3 * 2 * width**2 * 27 * side**3, float("inf")
    for _ in range(4):  # the first is a warm-up, the best of the others counts
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, half):
            loss = layer(x).float().mean()
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return operations / best


def show(name: str, result: dict[str, Any]) -> None:
    """Prints a plan."""
    table = Table(title=f"plan of {name}", show_header=False)
    hours = result["hours"]
    table.add_row("parameters", f"{result['parameters']:,}")
    table.add_row("crop", " × ".join(map(str, result["crop"])))
    table.add_row("precision", result["precision"])
    memory = result["memory_gib"]
    said = f"{memory:.1f} GiB" if memory >= 1 else f"{1024 * memory:.0f} MiB"
    table.add_row("memory of a step", f"about {said}")
    steps = "unknown: prepare the cohort, or set data.steps_per_epoch"
    if result["steps"] is not None:
        steps = f"{result['steps']:,} = {result['epochs']} epochs × {result['steps_per_epoch']}"
    table.add_row("steps", steps)
    table.add_row("work of a step", f"{result['teraflop_per_step']:.3f} TFLOP")
    known = hours is not None and (f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes")
    table.add_row("duration", f"about {known} on this machine" if known else "unknown")
    Console().print(table)
