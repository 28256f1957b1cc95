"""Memory that ran out, by whatever name a library gives it."""

import errno

__all__ = ["out_of_memory"]

TYPES = ("MemoryError", "_ArrayMemoryError", "OutOfMemoryError", "TerminatedWorkerError", "BrokenProcessPool")
SAID = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "alloc_failed",
    "unable to allocate shared memory",
    "out of shared memory",
    "unable to write to file </torch_",  # the same
    "is killed by signal: killed",
    "exited unexpectedly",  # of a loader's process, which nothing else ends so
)
ADVICE = (
    "in a training lower data.batch_size, data.sampling.size or data.workers, or set trainer.precision=bf16-mixed; "
    "elsewhere leave less beside it on this machine"
)


def out_of_memory(error: BaseException) -> str | None:
    """What to tell whose memory ran out; None for any other error.

    Args:
        error: whatever a task ended with; what it followed from counts as well.
    """
    cause: BaseException | None = error
    while cause is not None:
        said = str(cause).strip()
        full = isinstance(cause, OSError) and cause.errno == errno.ENOMEM
        named = isinstance(cause, RuntimeError | OSError) and any(words in said.lower() for words in SAID)
        if full or named or type(cause).__name__ in TYPES:
            first = said.splitlines()[0] if said else type(cause).__name__
            return f"memory ran out ({first[:200]}); {ADVICE}"
        cause = cause.__cause__ or cause.__context__
    return None
