"""The Dockerfile, as far as it can be looked at without building it."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tool(name: str) -> str:
    """A linter of the development extras."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install -e '.[dev]')")
    return found


def test_hadolint_finds_nothing():
    found = subprocess.run([tool("hadolint"), "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)

    assert found.returncode == 0, found.stdout


def test_shellcheck_finds_nothing():
    """In the batch script that runs the image."""
    found = subprocess.run([tool("shellcheck"), "docs/apptainer.sbatch"], cwd=ROOT, capture_output=True, text=True)

    assert found.returncode == 0, found.stdout


def test_what_it_copies_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if re.match(r"COPY (?!--from)", line)]

    names = {name for line in copied for name in line}
    assert names
    assert all((ROOT / name).exists() for name in names)
    assert names <= kept


def test_the_wheel_finds_all_it_is_made_of():
    """What the build reads beside the packages: the readme, the licence and what is force-included."""
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    needed = [PROJECT["project"]["readme"], *PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]]
    needed += PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

    assert all(f"!{Path(name).parts[0]}\n" in kept for name in needed)


def test_its_extras_and_its_command_are_the_projects():
    extras = re.search(r"\$\{wheel\}\[([\w,]+)\]", DOCKERFILE)
    command = re.search(r'CMD \["([\w-]+)", "--help"\]', DOCKERFILE)

    assert extras is not None
    assert set(extras[1].split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    assert command is not None
    assert command[1] in PROJECT["project"]["scripts"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_nobody_runs_as_root(target):
    stage = DOCKERFILE.partition(f" AS {target}\n")[2].partition("\nFROM ")[0]

    assert re.findall(r"^USER (\d+)$", stage, re.M)[-1] == "1000"


def test_make_docker_builds_both_targets():
    make = tool("make")
    asked = ["-n", "--no-print-directory", "docker", "TORCH_INDEX=https://cpu", "ARGUMENTS=--pull"]
    planned = subprocess.run([make, *asked], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cpu, gpu = planned.splitlines()

    assert "--pull" in cpu
    assert "--build-arg TORCH_INDEX=https://cpu --target cpu -t mrgen:cpu" in cpu
    assert "--pull" in gpu
    assert "--target gpu -t mrgen:gpu" in gpu
    assert "TORCH_INDEX" not in gpu  # wheels without CUDA
