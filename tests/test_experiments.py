"""What stands in ``experiments/`` can be run: every command of its scripts is one that the software knows."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.test_commands import check

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "experiments").glob("*/run.sh"))


def called(script: Path, folder: Path) -> list[str]:
    """The commands that a script gives to Python, which only writes them down."""
    stub, said = folder / "bin" / "python", folder / "said"
    stub.parent.mkdir()
    stub.write_text(f'#!/usr/bin/env bash\nprintf "%q " python "$@" >> {said}\necho >> {said}\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script, folder / "work"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return said.read_text().splitlines()


def test_there_are_experiments():
    assert "rsnet" in {script.parent.name for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_every_command_of_an_experiment_is_known(script: Path, tmp_path: Path):
    commands = called(script, tmp_path)
    names = [conf.name for command in commands for conf in check(command) if "mrgen.train" in command]
    assert len(names) == len(set(names)) > 1
    judged = [command for command in commands if "mrgen.evaluate" in command]
    assert judged
    assert all(f"runs/{name}" in "".join(judged).replace("runs/snet-all", "runs/snet") for name in names)
