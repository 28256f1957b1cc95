"""torch.compile of a method's networks."""

import logging
import os
import shutil

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from mrgen.errors import UserError

__all__ = ["CompileNetworks", "networks"]


def networks(module: nn.Module) -> dict[str, nn.Module]:
    """What is compiled, by name: the module's networks, each as it is called in training.

    Of a container whose ``forward`` chooses samples by their values, and would break into pieces, its networks are
    taken one by one.
    """
    found: dict[str, nn.Module] = {}
    for name, net in module.named_children():
        lists = {f"{name}.{key}": part for key, part in net.named_children() if isinstance(part, nn.ModuleList)}
        if "discriminators" in name and lists:
            found |= {f"{key}.{i}": one for key, part in lists.items() for i, one in part.named_children()}
        elif any(True for _ in net.parameters()):
            found[name] = net
    return found


class CompileNetworks(Callback):
    """Compiles them in place: parameters keep their names, and checkpoints load with and without.

    Args:
        backend: of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor"):
        self.backend = backend

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        compilers = (os.environ.get("CXX", ""), "g++", "clang++")
        if self.backend == "inductor" and not any(name and shutil.which(name) for name in compilers):
            raise UserError(
                "trainer.compile=true needs a C++ compiler, and there is none; install g++, set CXX, or leave it out"
            )
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # where graphs break, nothing has to be done
        options = None
        if self.backend == "inductor" and trainer.strategy.root_device.type == "cpu":
            # Of channels-last tensors, backward passes of convolutions and paddings give other strides than inductor
            # was told, and it ends there.
            options = {"layout_optimization": False}
        for net in networks(pl_module).values():
            for weight in net.parameters():
                weight.data = weight.data.contiguous()  # likewise; on a GPU inductor chooses its own layouts
            net.compile(backend=self.backend, options=options)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch._dynamo.reset()  # of the next job of a sweep nothing is known yet
