"""A loader that begins in the middle of an epoch, as often as it is told to and not once more."""

import multiprocessing
import os
import signal

import pytest
from pytorch_lightning.utilities.combined_loader import CombinedLoader

from mrgen.data.loader import ResumableLoader, ignore_signals
from mrgen.data.sampler import TrainingSampler


class Keys:
    """Samples are their keys."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, key):
        return key


def make(*, workers=0, batch_size=2, seed=0, **ranks):
    sampler = TrainingSampler(5, samples=4 * batch_size, seed=seed, **ranks)
    return ResumableLoader(
        Keys(), batch_size=batch_size, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
    )


def epoch(loader, number):
    """As Lightning has it: the first iterator is made before the sampler knows the epoch."""
    batches = iter(loader)
    loader.sampler.set_epoch(number)
    return [[part.tolist() for part in batch] for batch in batches]


@pytest.mark.parametrize("workers", [0, 1])
def test_it_goes_on_behind_what_was_shown_and_begins_the_next_epoch_at_its_start(workers: int):
    whole = [epoch(make(), number) for number in (2, 3)]
    resumed = make(workers=workers)
    resumed.load_state_dict({"batches": 3})
    assert len(resumed) == 4
    assert epoch(resumed, 2) == whole[0][3:]
    assert resumed.state_dict() == {"batches": 4}
    assert epoch(resumed, 3) == whole[1]


def test_it_counts_what_it_has_shown_and_not_what_was_fetched():
    loader = make(workers=1)
    batches = iter(loader)
    assert loader.state_dict() == {"batches": 0}
    next(batches)
    next(batches)
    assert loader.state_dict() == {"batches": 2}


def test_nothing_is_left_of_an_epoch_that_was_shown_and_the_next_is_whole():
    """A run that was saved in its validation never asks for a batch of the epoch that it resumes."""
    loader = make()
    loader.load_state_dict({"batches": 4})
    iter(loader)
    assert loader.state_dict() == {"batches": 4}
    assert epoch(loader, 1) == epoch(make(), 1)


def test_every_rank_goes_on_with_its_own():
    loaders = [make(rank=rank, world_size=2) for rank in range(2)]
    whole = [epoch(loader, 1) for loader in loaders]
    for loader, batches in zip(loaders, whole, strict=True):
        loader.load_state_dict({"batches": 1})
        assert epoch(loader, 1) == batches[1:]
    assert whole[0] != whole[1]


def test_loaders_that_are_shown_together_go_on_together():
    combined = CombinedLoader({"t1": make(seed=1), "t2": make(seed=2)}, "min_size")
    batches = iter(combined)
    shown = [next(batches)[0] for _ in range(4)]
    again = CombinedLoader({"t1": make(seed=1), "t2": make(seed=2)}, "min_size")
    again._load_state_dicts([{"batches": 3}, {"batches": 3}])
    (last,) = [batch for batch, *_ in again]
    assert [part.tolist() for part in last["t2"]] == [part.tolist() for part in shown[3]["t2"]]
    assert combined._state_dicts() == [{"batches": 4}, {"batches": 4}]


def test_a_signal_to_all_processes_leaves_the_loaders_at_work():
    """A run whose loaders die of it fails before it can save."""
    sampler = TrainingSampler(5, samples=100, seed=0)
    loader = ResumableLoader(Keys(), sampler=sampler, num_workers=1, worker_init_fn=ignore_signals)
    batches = iter(loader)
    next(batches)
    workers = multiprocessing.active_children()
    assert workers
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        for worker in workers:
            os.kill(worker.pid, number)
    assert len([*batches]) == 99
