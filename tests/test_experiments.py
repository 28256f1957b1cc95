"""What stands in ``experiments/`` can be run: every command of its scripts is one that the software knows."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.test_commands import check

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "experiments").glob("*/*.sh"))


def called(script: Path, folder: Path) -> list[str]:
    """The commands that a script gives to Python, which only writes them down; several at once do so line by line."""
    stub, said = folder / "bin" / "python", folder / "said"
    stub.parent.mkdir()
    stub.write_text(f'#!/usr/bin/env bash\nline=$(printf "%q " python "$@")\necho "$line" >> {said}\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}", "MRGEN_SCANS": str(folder / "scans")}
    done = subprocess.run(["bash", script, folder / "work"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return said.read_text().splitlines()


def name(script: Path) -> str:
    return f"{script.parent.name}/{script.stem}"


def test_there_are_experiments():
    assert {"rsnet/run", "t1_to_t2/run", "t1_to_t2/real"} <= {name(script) for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_every_command_of_an_experiment_is_known_and_every_run_judged(script: Path, tmp_path: Path):
    commands = called(script, tmp_path)
    trained, judged = [], ""
    for command in commands:
        configs = check(command)
        if "mrgen.train" in command:
            trained += [re.search(r"hydra\.run\.dir=\W*([^\s'\\\\]+)", command)[1] for _ in configs]
        if "mrgen.evaluate" in command or "mrgen.synthesize" in command:  # of generators: what they make is
            judged += command
    assert len(trained) == len(set(trained)) > 1
    sweeps = re.findall(r"sweep=\W*([^\s'\\\\]+)", judged)  # folders, all of whose runs are judged
    assert all(run in judged or str(Path(run).parent) in sweeps for run in trained)
