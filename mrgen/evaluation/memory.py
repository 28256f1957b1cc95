"""What a pass of a network needs and what the machine has."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mrgen.data.memory import free_memory

__all__ = ["free_bytes", "peak_bytes"]

RESERVE = 0.6  # of what is free: the libraries' own buffers, other layouts of a tensor, and the rest of the machine


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of tensors that ``run`` makes and holds at one time.

    On tensors of the device ``meta`` nothing is computed or allocated.
    """
    with torch.no_grad(), _Living() as living:
        run()
    return living.peak


def free_bytes(device: torch.device) -> int | None:
    """What a pass may take on a device, or None where nobody knows."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(RESERVE * (torch.cuda.mem_get_info(device)[0] + kept))
    free = free_memory()
    return None if free is None else int(RESERVE * free)


class _Living(TorchDispatchMode):
    """Adds up the storages that operations make, and subtracts them when they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            place = storage._cdata
            if place in self.sizes or place in given:  # a view, or computed in place
                continue
            self.sizes[place] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, place)
        return out

    def _freed(self, place: int) -> None:
        self.now -= self.sizes.pop(place, 0)
