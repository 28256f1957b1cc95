"""Fixtures of the launch side."""

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.tools import Called, call, tiny_run


@pytest.fixture(autouse=True)
def last_words(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What mrgen wants to print at the end of the process, kept from being printed at the end of pytest."""
    said: list[Callable[[], Any]] = []
    register = atexit.register

    def only_ours(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if (getattr(function, "__module__", None) or "").startswith("mrgen."):
            said.append(lambda: function(*args, **kwargs))
            return function
        return register(function, *args, **kwargs)

    monkeypatch.setattr(atexit, "register", only_ours)
    return said


@pytest.fixture
def mrgen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Called]:
    """Calls a console script in this process: ``mrgen("train", "experiment=rsnet/rsnet")``."""
    monkeypatch.setenv("MRGEN_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MRGEN_STORES", str(tmp_path / "stores"))
    monkeypatch.setenv("MRGEN_COHORTS", str(tmp_path / "cohorts"))
    return lambda script, *arguments: call(script, arguments, monkeypatch, tmp_path)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """``tests.launch.stand_in`` in the place of a training, here and in processes that are started from here."""
    from tests.launch import stand_in

    monkeypatch.setitem(sys.modules, "mrgen.launch.training", stand_in)
    site, root = tmp_path_factory.mktemp("site"), Path(__file__).resolve().parents[2]
    (site / "sitecustomize.py").write_text(
        "import sys\nfrom tests.launch import stand_in\nsys.modules['mrgen.launch.training'] = stand_in\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{root}")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, which takes longer than the judgement; for tests whose like looks at the pictures."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)


@pytest.fixture(scope="session")
def snet_run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny S-Net, trained for an epoch. Read only."""
    return tiny_run(tmp_path_factory.mktemp("snet") / "run", phantom_store, preset="snet")


@pytest.fixture(scope="session")
def rsnet_run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RS-Net that makes T2, trained for an epoch. Read only."""
    return tiny_run(tmp_path_factory.mktemp("rsnet") / "run", phantom_store)


@pytest.fixture(scope="session")
def phantom_cohort(phantom_store: Path) -> Path:
    """The raw cohort that the phantom's store was prepared from. Read only."""
    return phantom_store.parent / "cohort"
