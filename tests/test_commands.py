"""Every command that README.md, docs/ and ``--help`` show is one that the software knows."""

import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mrgen.launch.paths import CONF_DIR
from tests.launch.tools import composed

ROOT = Path(__file__).resolve().parents[1]
BATCH = (ROOT / "docs" / "apptainer.sbatch").read_text(encoding="utf-8")
SCRIPTS = ("prepare", "train", "synthesize", "evaluate")
FLAGS = {"--help": 0, "--cfg": 1, "-m": 0, "--multirun": 0, "--resolve": 0, "--package": 1}  # Hydra's, with arguments


def commands(markdown: str) -> Iterator[str]:
    """The commands of the bash blocks: one a line, after ``$ `` or not, continued by ``\\``, with comments after #."""
    for block in re.findall(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", markdown, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line.strip().removeprefix("$ "), comments=True):
                yield shlex.join(words)


def help_examples() -> Iterator[str]:
    """The examples that ``--help`` prints."""
    for script in SCRIPTS:
        template = OmegaConf.load(CONF_DIR / f"{script}.yaml").hydra.help.template
        yield from re.findall(rf"\bmrgen-{script} .*$", template, flags=re.MULTILINE)


def check(command: str) -> list[DictConfig]:
    """Composes what a command composes. Raises where the software does not know it.

    Returns:
        One config a job, of a range for its ends alone; none for ``make`` and for ``--help``.
    """
    words = shlex.split(command)
    while "=" in words[0] and words[0].partition("=")[0].isidentifier():  # VARIABLE=value before the command
        words.pop(0)
    program, arguments = words[0], words[1:]
    if program == "make":
        assert arguments, "make without a target"
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(arguments) <= set(targets), f"{command}: not in the Makefile"
        return []
    if program == "apptainer":
        assert arguments[0] == "build"
        assert arguments[1] in BATCH, f"{command}: not the image of the batch script"
        return []
    if program == "sbatch":  # the batch script hands its arguments on
        arguments = [argument for argument in arguments if not argument.startswith("--")]
        assert (ROOT / arguments[0]).read_text(encoding="utf-8") == BATCH, f"{command}: no script of ours"
        program, arguments = "mrgen-train", arguments[1:]
    if program in ("python", "python3") and arguments[:1] == ["-m"] and arguments[1].startswith("mrgen."):
        program, arguments = f"mrgen-{arguments[1].removeprefix('mrgen.')}", arguments[2:]
    script = program.removeprefix("mrgen-")
    assert script != program, f"{command}: nothing checks what {program} does"
    assert script in SCRIPTS, f"{command}: there is no {program}"

    overrides, flags = [], []
    while arguments:
        argument = arguments.pop(0)
        if argument.startswith("-"):
            assert argument in FLAGS, f"{command}: {argument} is no option that is checked here"
            flags.append(argument)
            arguments = arguments[FLAGS[argument] :]
        else:
            overrides.append(argument)
    sweep = "-m" in flags or "--multirun" in flags
    jobs: list[list[str]] = [[]]
    for override in OverridesParser.create().parse_overrides(overrides):
        assert sweep or not override.is_sweep_override(), f"{command}: a list of choices needs -m"
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
        if values and override.is_range_sweep():  # what holds at both ends holds between
            values = [values[0], values[-1]]
        key = override.get_key_element()
        choices = [override.input_line] if values is None else [f"{key}={value}" for value in values]
        jobs = [[*job, choice] for job, choice in product(jobs, choices)]
    return [composed(script, *job) for job in jobs]


README = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))
PAGES = [command for page in sorted((ROOT / "docs").glob("*.md")) for command in commands(page.read_text("utf-8"))]
EXAMPLES = list(help_examples())


def test_there_is_something_to_check():
    assert "make demo" in README
    assert {shlex.split(command)[0] for command in README} >= {"mrgen-prepare", "mrgen-train", "mrgen-evaluate"}
    assert len(EXAMPLES) >= 6
    assert any("t1_to_t2/pix2pix_grid" in command for command in PAGES)


@pytest.mark.parametrize("command", dict.fromkeys([*README, *PAGES, *EXAMPLES]))
def test_every_command_is_known(command: str):
    for conf in check(command):
        if "model" in conf and not OmegaConf.is_missing(conf.data, "layout") and not isinstance(conf.data.layout, str):
            OmegaConf.to_container(conf, resolve=True)


def test_the_extractor_reads_the_convention():
    markdown = """
```python
mrgen-train this is no command
```
```bash
# a comment alone

$ mrgen-train experiment=rsnet/rsnet \\
    target=t2      # RS-Net
make demo  # five trainings
  mrgen-train 'name=a # b'
```
and ```make nothing``` in a line
  ```bash
  make lint
  ```
"""
    assert list(commands(markdown)) == [
        "mrgen-train experiment=rsnet/rsnet target=t2",
        "make demo",
        "mrgen-train 'name=a # b'",
        "make lint",
    ]


def test_a_sweep_is_every_one_of_its_jobs():
    jobs = check("mrgen-train -m experiment=rsnet/rsnet,rsnet/rnet target=t1,t2 model.filters=4")
    assert [(conf.name, conf.model.filters) for conf in jobs] == [
        ("rsnet-t1", 4),
        ("rsnet-t2", 4),
        ("rnet-t1", 4),
        ("rnet-t2", 4),
    ]
    ends = check("mrgen-train -m experiment=lesion_vaegan/availability 'row=range(1,26)'")
    assert [conf.name for conf in ends] == ["row-1", "row-25"]
    assert check("MRGEN_RUNS=/scratch python -m mrgen.train target=t1")[0].target == "t1"


@pytest.mark.parametrize(
    "command",
    [
        "mrgen-train experiment=rsnet/nope",
        "mrgen-train experiment=rsnet/rsnet model.filter=3",
        "mrgen-train -m target=t1,t2 nonsense=1,2",
        "mrgen-train target=t1,t2",
        "mrgen-train --nonsense",
        "mrgen-bake target=t1",
        "make nonsense",
        "make",
        "pip install something",
    ],
)
def test_an_unknown_command_is_found(command: str):
    with pytest.raises((AssertionError, HydraException)):
        check(command)
