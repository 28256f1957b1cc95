"""Memory that ran out, by whatever name: what to lower, and no traceback."""

import errno

import numpy as np
import pytest
import torch

from mrgen.errors import UserError
from mrgen.launch.app import sentence
from mrgen.launch.memory import out_of_memory


def real() -> BaseException:
    """What torch raises on a processor."""
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError


def numpys() -> BaseException:
    try:
        np.empty(2**60, dtype=np.uint8)
    except MemoryError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "error",
    [
        real(),
        numpys(),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
        RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 71) exited unexpectedly"),
        RuntimeError("DataLoader worker (pid 71) is killed by signal: Bus error. It is possible that dataloader's "
                     "workers are out of shared memory. Please try to raise your shared memory limit."),
        RuntimeError("unable to write to file </torch_12_3>: No space left on device (28)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: str(error)[:40],
)  # fmt: skip
def test_it_is_one_sentence(error: BaseException):
    said = sentence(error)
    assert said is not None
    assert "\n" not in said
    assert said.startswith("memory ran out (")
    for key in ("data.batch_size", "data.sampling.size", "data.workers", "trainer.precision"):
        assert key in said


def test_what_followed_from_it_counts_and_other_errors_do_not():
    wrapped = RuntimeError("in a worker")
    wrapped.__cause__ = MemoryError()
    assert out_of_memory(wrapped) is not None
    assert out_of_memory(RuntimeError("shapes differ")) is None
    assert sentence(UserError("the store is gone")) == "the store is gone"
