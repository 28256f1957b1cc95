"""A process that dies costs the item that it worked on, whatever else was in work."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mrgen.data.cohorts import SubjectFiles
from mrgen.data.preparation import Row, _in_parallel
from mrgen.data.workers import in_processes
from mrgen.errors import UserError


def square(n: int) -> int:
    if n < 0:
        raise UserError("found a negative number")
    return n * n


def crash_at_3(n: int) -> int:
    if n == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(0.02)
    return n * n


def test_results_come_with_their_items():
    assert sorted(in_processes(range(5), square, 2)) == [(n, n * n) for n in range(5)]
    assert list(in_processes([], square, 2)) == []


def test_the_item_that_ends_its_process_is_named_and_the_others_are_done():
    results = dict(in_processes(range(6), crash_at_3, 2))
    assert results == {n: None if n == 3 else n * n for n in range(6)}


def test_an_error_of_the_task_is_no_death():
    with pytest.raises(UserError, match="found a negative number"):
        list(in_processes([1, -1], square, 1))


@dataclass(frozen=True)
class Task:
    """In the place of a preparation's."""

    def __call__(self, files: SubjectFiles):
        if files.id == "S2":
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs short
        return Row(files.id, files.id, None, None, (1, 1, 1), (1, 1, 1), False, "good"), [], ()


def test_a_preparation_names_the_subject_that_ended_its_process():
    subjects = [SubjectFiles(f"S{i}", f"S{i}", None, None, Path(f"/raw/S{i}"), {}, None) for i in range(4)]
    results = list(_in_parallel(subjects, Task(), 2))
    assert {row.id: row.status for row, _, _ in results} == {"S0": "good", "S1": "good", "S2": "bad", "S3": "good"}
    (problem,) = [problem for _, problems, _ in results for problem in problems]
    assert str(problem) == (
        "S2: /raw/S2: ended the process that read it, probably for want of memory; look at its files, or use fewer "
        "workers"
    )
