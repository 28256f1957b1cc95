"""Random lesion labels: what each operation does, and that no lesion is lost or cut."""

from types import SimpleNamespace

import numpy as np
import pytest

from mrgen.errors import UserError
from mrgen.papers.lesion_vaegan import labels
from mrgen.papers.lesion_vaegan.labels import OPERATIONS, random_label


def lesion(x=(8, 15), y=(10, 14), size=(24, 24)) -> np.ndarray:
    """A box of 1 with 2 along its first rows and one pixel of 4."""
    label = np.zeros(size, np.uint8)
    label[slice(*x), slice(*y)] = 1
    label[x[0] : x[0] + 2, slice(*y)] = 2
    label[x[1] - 1, y[0]] = 4
    return label


def only(operation: str, label: np.ndarray, draws: dict) -> np.ndarray | None:
    """What one operation does, of chosen numbers in place of random ones."""
    rng = SimpleNamespace(**{name: lambda *_, value=value, **__: value for name, value in draws.items()})
    return labels._changed(label, *labels._drawn(operation, np.array(label.shape), rng))


def test_each_operation_by_hand():
    label = lesion()
    np.testing.assert_array_equal(only("rotate", label, {"uniform": np.pi / 2}), np.rot90(label))
    np.testing.assert_array_equal(only("flip", label, {"integers": 1}), label[::-1])
    np.testing.assert_array_equal(only("flip", label, {"integers": 0}), label[:, ::-1])
    shifted = only("shift", label, {"integers": np.array([5, 2]), "choice": np.array([1, -1])})
    np.testing.assert_array_equal(shifted, np.roll(label, (5, -2), (0, 1)))
    shrunk = only("shrink", lesion((2, 22), (2, 22)), {"integers": 6})  # 24 pixels become 18
    assert shrunk is not None
    there = np.argwhere(shrunk)
    assert (there.max(0) - there.min(0) + 1).tolist() == [15, 15]
    np.testing.assert_allclose(there.mean(0), 11.5, atol=0.5)


def test_two_different_operations_are_one_map_of_the_plane():
    """A turn by a quarter and a flip: exact, as each of them alone is."""
    label = lesion()
    turn, flip = (
        labels._drawn(name, np.array([24, 24]), SimpleNamespace(uniform=lambda *_: np.pi / 2, integers=lambda *_: 1))[0]
        for name in ("rotate", "flip")
    )
    np.testing.assert_array_equal(labels._changed(label, flip @ turn, np.zeros(2)), np.rot90(label)[::-1])


def test_a_cut_or_lost_lesion_is_none():
    border = lesion((0, 3))
    assert only("shift", border, {"integers": np.array([2, 2]), "choice": np.array([-1, 1])}) is None
    assert only("shift", border, {"integers": np.array([2, 2]), "choice": np.array([1, 1])}) is not None
    dot = np.zeros((24, 24), np.uint8)
    dot[0, 0] = 1  # falls between the pixels that 24 → 17 looks up
    lost = [k for k in range(24) if only("shrink", np.roll(dot, (k, k), (0, 1)), {"integers": 7}) is None]
    assert 0 < len(lost) < 24


def test_random_labels_keep_their_classes_and_stay_whole():
    pool = np.stack([lesion(), lesion((9, 14), (8, 16))])
    rng = np.random.default_rng(0)
    drawn = [random_label(pool, rng) for _ in range(60)]
    assert {operation for one in drawn for operation in one.operations} == set(OPERATIONS)
    assert all(len(set(one.operations)) == 2 for one in drawn)
    assert {one.source for one in drawn} == {0, 1}
    for one in drawn:
        assert (one.label.shape, one.label.dtype) == ((24, 24), np.uint8)
        assert set(np.unique(one.label)) <= {0, 1, 2, 4}
        before, after = ((label > 0).sum() for label in (pool[one.source], one.label))
        assert 0.3 * before < after < 1.3 * before  # shrunk by 7 of 24 pixels at most
    assert len({one.label.tobytes() for one in drawn}) > 50
    again = np.random.default_rng(0)
    assert all((random_label(pool, again).label == one.label).all() for one in drawn)


def test_a_lesion_without_room_says_so():
    with pytest.raises(UserError, match="random labels had lesions that were cut at the border of the slice or lost"):
        random_label(np.pad(np.ones((1, 22, 24), np.uint8), ((0, 0), (1, 1), (0, 0))), Always())


class Always:
    """Draws a turn by an eighth, which takes the corners of a slice out of it."""

    def integers(self, *_, **__):
        return 0

    def choice(self, *_, **__):
        return np.array([0, 1])

    def uniform(self, *_):
        return np.pi / 4
