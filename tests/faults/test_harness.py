"""The harness itself: it must see what it is for, or its zeros would mean nothing."""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.faults.excuses import forked
from tests.faults.mutations import BYTES
from tests.faults.outcome import judge
from tests.faults.process import Ended
from tests.faults.texts import JSON, same_form
from tests.faults.watching import watch


def _watched(folder: Path, action: Callable[[], object]) -> str:
    """What was noted while an action ran in a process that may write below a folder."""
    notes = folder / "forbidden"

    def act() -> None:
        watch(folder, notes)
        action()

    forked(act)
    return notes.read_text()


@pytest.mark.parametrize(
    "action",
    [
        lambda place: os.system("true"),
        lambda place: (place.parent / "outside").write_text("x"),
        lambda place: os.symlink("a", place / "link"),
        lambda place: os.mkdir(place.parent / "folder"),
        lambda place: os.rename(place.parent / "victim", place / "mine"),
        lambda place: (place / "link to victim").write_text("x"),
        lambda place: __import__("pickle").loads(b"cos\nsystem\n(S'true'\ntR."),
        lambda place: __import__("subprocess").run(["touch", "canary"]),
    ],
)
def test_a_forbidden_act_is_seen(tmp_path: Path, action: Callable[[Path], object]) -> None:
    """A program, a write outside the folder, also through a link, a link, a renaming and an unpickling are noted."""
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "victim").write_text("must survive")
    (place / "link to victim").symlink_to(tmp_path / "victim")
    assert _watched(place, lambda: action(place))


def test_what_commands_do_is_allowed(tmp_path: Path) -> None:
    """Files below the folder, git and Python are no reason to complain."""

    def work() -> None:
        import subprocess

        (tmp_path / "file").write_text("x")
        os.rename(tmp_path / "file", tmp_path / "other")
        os.remove(tmp_path / "other")
        subprocess.run(["git", "--version"], capture_output=True)
        subprocess.run([sys.executable, "-c", ""], capture_output=True)

    assert _watched(tmp_path, work) == ""


FINE = Ended(0, "", "", False, 1.0, ())
ROW = Ended(0, " a.json  48×48  unchanged\n", "", False, 1.0, ())
MENDED = Ended(0, "a.json: damaged, made anew\n", "", False, 1.0, ())
CLEAR = Ended(1, "", "error: a.json: found nothing\n", False, 1.0, ())
TRACEBACK = Ended(1, "", "Traceback (most recent call last):\nKeyError: 'a.json'\n", False, 1.0, ())


@pytest.mark.parametrize(
    ("ended", "found", "after", "outcome"),
    [
        (FINE, {"a": "1", "b": "2"}, {"file": "x"}, "right"),
        (FINE, {"a": "9", "b": "2"}, {"file": "x"}, "silently wrong"),
        (FINE, {"a": "1", "b": "9"}, {"file": "x"}, "lost"),
        (ROW, {"a": "9", "b": "2"}, {"file": "x"}, "silently wrong"),
        (MENDED, {"a": "9", "b": "2"}, {"file": "x"}, "clear error"),
        (FINE, {"a": "1", "b": "2"}, {}, "lost"),
        (CLEAR, {"b": "2"}, {"file": "x"}, "clear error"),
        (Ended(1, "", "error: something\n", False, 1.0, ()), {"b": "2"}, {"file": "x"}, "unclear"),
        (CLEAR, {"a": "9", "b": "2"}, {"file": "x"}, "silently wrong"),
        (TRACEBACK, {"b": "2"}, {"file": "x"}, "traceback"),
        (Ended(-11, "", "", False, 1.0, ()), {"b": "2"}, {"file": "x"}, "traceback"),
        (Ended(-9, "", "", True, 60.0, ()), {"b": "2"}, {"file": "x"}, "hang"),
        (Ended(0, "", "", False, 1.0, ("os.system",)), {"a": "1", "b": "2"}, {"file": "x"}, "executed"),
        (FINE, {"a": "1", "b": "2"}, {"file": "x", "canary": "y"}, "executed"),
    ],
)  # fmt: skip
def test_an_end_is_called_what_it_is(ended: Ended, found: dict[str, str], after: dict[str, str], outcome: str) -> None:
    """Part ``a`` of two is damaged: each outcome is told from the others."""
    judged = judge(
        ended,
        expected={"a": "1", "b": "2"},
        found=found,
        initial={},
        own=["a"],
        names=["a.json"],
        before={"file": "x"},
        after=after,
        writes=(),
        excused=False,
    )
    assert judged.name == outcome


def test_mutations_are_seeded_and_damage() -> None:
    """The same seed gives the same bytes, which are not those of before."""
    data = random.Random(0).randbytes(20_000)
    for mutator in BYTES:
        once, again = (mutator(data, random.Random(7)) for _ in range(2))
        assert once == again != data, mutator.__name__
    text = b'{"a": [1, 2], "b": {"c": "d"}}\n'
    assert len({mutator(text, random.Random(seed)) for seed in range(20) for mutator in JSON[:1]}) > 5


def test_a_change_that_somebody_may_have_meant_is_told_from_damage() -> None:
    """Another number is; a missing key, another type, a number out of all bounds and an interpolation are not."""
    before = {"lr": 0.0005, "ids": ["a", "b"], "name": "x"}
    assert same_form(before, {"lr": 0.0006, "ids": ["b"], "name": "y"})
    for change in (
        "{lr: text}",
        "{lr: -1}",
        "{lr: 1e300}",
        "{lr: .nan}",
        "{ids: []}",
        "{name: '${oc.env:X}'}",
        "{new: 1}",
    ):
        assert not same_form(before, {**before, **yaml.safe_load(change)}), change
