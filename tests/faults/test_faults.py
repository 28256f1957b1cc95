"""Nothing is executed, lost or wrong in silence: the short form of ``make faults``."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.outcome import BAD, OUTCOMES
from tests.faults.table import BEGIN, END

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--mutants", "1", "--kills", "14", "--jobs", "2")


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One damage of every kind of file, a payload through every door, two kills of every command."""
    import json

    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.faults.run", str(folder), *SHORT]
    # A process of its own: it forks, which one with pytest's threads must not.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode in (0, 1), ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "| all |" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-3000:]
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("outcome", BAD)
def test_no_file_kill_or_full_disk_ends_badly(tried: list[dict[str, Any]], outcome: str) -> None:
    """Of everything that is tried, nothing ends in a traceback, hangs, is silently wrong, executed or lost."""
    found = [line for line in tried if line["name"] == outcome]
    lines = [f"{line['group']} {line['case']}: {line['what']}: {line['line']}" for line in found]
    assert not lines, "\n".join(lines)


def test_every_kind_every_door_and_every_command_is_tried(tried: list[dict[str, Any]]) -> None:
    """A kind that nobody tries would pass."""
    from tests.faults.doors import KINDS
    from tests.faults.hostile import PLACES
    from tests.faults.killing import JOBS

    groups = {line["group"] for line in tried}
    expected = {
        *(f"damaged: {kind.name}" for kind in KINDS),
        *(f"hostile: {name.partition(':')[0]}" for name in PLACES),
        *("hostile: pickles", "hostile: links", "hostile: git"),
        *(f"{what}: {name}" for name in JOBS if "workers" not in name for what in ("killed", "disk full", "at once")),
    }
    assert expected <= groups, expected - groups


def test_the_recorded_table_has_zeros() -> None:
    """``docs/reliability.md`` holds the whole run: 2,000 damaged files, 200 kills, none of which ends badly."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    if not rows:
        pytest.skip("make faults has not been run on this version")
    assert rows[0] == ["what", "tried", *OUTCOMES]
    counts = {row[0]: dict(zip(rows[0][1:], map(int, row[1:]), strict=True)) for row in rows[2:]}
    for what, least in (
        ("damaged: ", 2000),
        ("killed: ", 200),
        ("hostile: ", 300),
        ("disk full: ", 40),
        ("at once: ", 20),
    ):
        assert sum(row["tried"] for name, row in counts.items() if name.startswith(what)) >= least, what
    assert {outcome: counts["all"][outcome] for outcome in BAD} == dict.fromkeys(BAD, 0)
