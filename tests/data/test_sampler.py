from collections import Counter

import pytest

from mrgen.data.sampler import EvaluationSampler, TrainingSampler, Turn


def sampler(rank=0, world_size=1, *, subjects=7, samples=4, seed=0, epoch=0):
    made = TrainingSampler(subjects, samples=samples, seed=seed, rank=rank, world_size=world_size)
    made.set_epoch(epoch)
    return made


def common_order(world_size, epochs, **kwargs):
    """Keys in the order in which all ranks together see them."""
    keys = []
    for epoch in range(epochs):
        ranks = [list(sampler(rank, world_size, epoch=epoch, **kwargs)) for rank in range(world_size)]
        keys += [key for step in zip(*ranks, strict=True) for key in step]
    return keys


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("subjects", "samples"), [(7, 4), (7, 7), (3, 10), (1, 2), (12, 1)])
def test_every_subject_once_before_any_twice(world_size, subjects, samples):
    epochs = 6
    order = [which for *_, which in common_order(world_size, epochs, subjects=subjects, samples=samples)]
    assert len(order) == epochs * samples * world_size
    for start in range(0, len(order), subjects):
        one_pass = order[start : start + subjects]
        assert len(set(one_pass)) == len(one_pass)
        assert set(one_pass) <= set(range(subjects))


def test_order_is_shuffled_anew_in_every_pass_and_by_the_seed():
    order = [which for *_, which in common_order(1, 3, subjects=20, samples=20)]
    passes = [order[i : i + 20] for i in (0, 20, 40)]
    assert len(set(map(tuple, passes))) == 3
    assert list(range(20)) not in passes
    assert order != [which for *_, which in common_order(1, 3, subjects=20, samples=20, seed=1)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_is_a_function_of_seed_and_epoch_alone(world_size):
    for rank in range(world_size):
        uninterrupted, epochs = sampler(rank, world_size), []
        for epoch in range(5):
            uninterrupted.set_epoch(epoch)
            epochs.append(list(uninterrupted))
            assert list(uninterrupted) == epochs[-1]  # reading it twice changes nothing
        assert [list(sampler(rank, world_size, epoch=epoch)) for epoch in range(5)] == epochs


def test_all_ranks_together_see_what_one_process_with_as_many_samples_sees():
    for epoch in range(4):
        alone = list(sampler(samples=12, epoch=epoch))
        for world_size in (2, 3):
            ranks = [
                list(sampler(rank, world_size, samples=12 // world_size, epoch=epoch)) for rank in range(world_size)
            ]
            assert sorted(key for keys in ranks for key in keys) == alone
            assert [key for step in zip(*ranks, strict=True) for key in step] == alone


@pytest.mark.parametrize("world_size", [2, 3])
def test_no_two_samples_of_a_training_share_their_seed(world_size):
    # (epoch, index) seeds crop and augmentation: ranks that shared one would show the same crop.
    seeds = Counter((epoch, index) for epoch, index, _ in common_order(world_size, 5))
    assert set(seeds.values()) == {1}
    assert {epoch for epoch, _ in seeds} == set(range(5))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_length_is_the_same_on_every_rank(world_size):
    for rank in range(world_size):
        made = sampler(rank, world_size, samples=5)
        assert len(made) == len(list(made)) == 5


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_turns_follow_each_other_over_the_borders_of_epochs(world_size):
    """Two of five subjects have the first nine samples of a training, the others the rest, however long it goes on."""
    turns = [Turn(range(3, 5), 9), Turn(range(3), 0)]
    order = [which for *_, which in common_order(world_size, 5, subjects=turns, samples=6 // world_size)]
    first, rest = order[:9], order[9:]
    assert (len(order), set(first), set(rest)) == (30, {3, 4}, {0, 1, 2})
    for part, size in ((first, 2), (rest, 3)):
        assert all(len(set(part[i : i + size])) == len(part[i : i + size]) for i in range(0, len(part), size))
    alone = [which for *_, which in common_order(1, 5, subjects=turns, samples=6)]
    assert order == alone


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("subjects", [0, 1, 4, 7])
def test_evaluation_partitions_the_subjects(world_size, subjects):
    ranks = [EvaluationSampler(subjects, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(which for rank in ranks for *_, which in rank) == list(range(subjects))
    assert [len(rank) for rank in ranks] == [len(list(rank)) for rank in ranks]
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
