"""Who may import whom: one direction, so that nets know no losses, data no papers, and papers not each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "mrgen"
MODULES = {
    ".".join(("mrgen", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(ROOT.rglob("*.py"))
}
ENTRY_POINTS = ("mrgen.prepare", "mrgen.train", "mrgen.synthesize", "mrgen.evaluate")
METHOD_PARTS = ("mrgen.nets", "mrgen.losses", "mrgen.metrics", "mrgen.protocols")

# What a module may import of mrgen, by the longest part of its name that stands here; None: anything.
MAY_IMPORT: dict[str, tuple[str, ...] | None] = {
    "mrgen": (),
    "mrgen.errors": (),
    "mrgen.files": ("mrgen.errors",),
    "mrgen.arrays": ("mrgen.errors", "mrgen.files"),
    "mrgen.nets": ("mrgen.nets",),
    "mrgen.losses": ("mrgen.losses",),
    "mrgen.metrics": ("mrgen.metrics",),
    "mrgen.protocols": (),
    "mrgen.data": ("mrgen.data", "mrgen.protocols", "mrgen.arrays", "mrgen.errors", "mrgen.files"),
    "mrgen.papers": (
        *METHOD_PARTS,
        "mrgen.data.batch",
        "mrgen.arrays",
        "mrgen.errors",
        "mrgen.files",
    ),  # and itself: see violations()
    "mrgen.segmenter": (*METHOD_PARTS, "mrgen.data.batch", "mrgen.errors", "mrgen.files"),
    "mrgen.evaluation": (*METHOD_PARTS, "mrgen.data", "mrgen.evaluation", "mrgen.errors", "mrgen.files"),
    "mrgen.callbacks": (
        *METHOD_PARTS,
        "mrgen.data",
        "mrgen.evaluation",
        "mrgen.callbacks",
        "mrgen.errors",
        "mrgen.files",
    ),
    "mrgen.launch": None,
    **{name: ("mrgen.launch", "mrgen.errors") for name in ENTRY_POINTS},
}
# Packages of others that only these parts may import.
ONLY_IN = {
    "hydra": (*ENTRY_POINTS, "mrgen.launch"),
    "omegaconf": (*ENTRY_POINTS, "mrgen.launch"),
    "wandb": ("mrgen.launch", "mrgen.callbacks"),
}


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def imports(source: str, module: str, *, package: bool = False) -> Iterator[str]:
    """Names of the modules that a source imports, anywhere in it: inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*parts, *([base] if base else [])])
            for alias in node.names:  # "from mrgen.data import batch" imports a module, "… import Batch" a name
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                yield str(node.args[0].value)


def violations(source: str, module: str, *, package: bool = False) -> list[str]:
    """The imports of a module's source that the rules forbid."""
    rule = max((part for part in MAY_IMPORT if below(module, part)), key=len)
    allowed = MAY_IMPORT[rule]
    if rule == "mrgen.papers":  # a paper of several files is one folder; it may import itself
        assert allowed is not None
        own = ".".join(module.split(".")[:3])
        allowed = (*allowed, own) if own in MODULES and own != "mrgen.papers" else allowed
    found = []
    for name in imports(source, module, package=package):
        if below(name, "mrgen"):
            if allowed is not None and not any(below(name, part) for part in allowed) and name != "mrgen":
                found.append(f"{module} imports {name}")
        elif (only := ONLY_IN.get(name.partition(".")[0])) and not any(below(module, part) for part in only):
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_only_what_it_may(module: str):
    file = MODULES[module]
    assert violations(file.read_text(encoding="utf-8"), module, package=file.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mrgen.nets.unet3d", "from mrgen.losses.segmentation import dice"),
        ("mrgen.nets.unet3d", "from mrgen.errors import UserError"),
        ("mrgen.losses.segmentation", "import mrgen.metrics.segmentation"),
        ("mrgen.metrics.segmentation", "from mrgen.data.batch import IGNORED"),
        ("mrgen.protocols", "from mrgen.nets import blocks"),
        ("mrgen.data.store", "def f():\n    from mrgen.launch.paths import CONF_DIR"),
        ("mrgen.data.store", "from ..papers import rsnet"),
        ("mrgen.papers.rsnet", "from mrgen.papers.samr import SAMR"),
        ("mrgen.papers.rsnet", "from . import samr"),
        ("mrgen.papers.rsnet", "from mrgen.data.datamodule import CohortDataModule"),
        ("mrgen.papers.rsnet", "from omegaconf import DictConfig"),
        ("mrgen.segmenter", "from mrgen.papers.rsnet import RSNet"),
        ("mrgen.segmenter", "import wandb"),
        ("mrgen.evaluation.swap", "if TYPE_CHECKING:\n    from mrgen.papers.rsnet import RSNet"),
        ("mrgen.evaluation.swap", "from hydra.utils import instantiate"),
        ("mrgen.callbacks.console", "import importlib\nimportlib.import_module('mrgen.papers.rsnet')"),
        ("mrgen.train", "import wandb"),
        ("mrgen.train", "from mrgen.papers.rsnet import RSNet"),
    ],
)
def test_the_check_finds_a_violation(module: str, source: str):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "mrgen.nets.unet3d",
            "import torch\nfrom mrgen.nets.blocks import ConvBlock3d\nfrom .blocks import ConvBlock3d",
        ),
        ("mrgen.papers.rsnet", "from mrgen.data.batch import Batch\nfrom mrgen.data import batch"),
        ("mrgen.papers.rsnet", "import pytorch_lightning\nfrom mrgen.errors import UserError"),
        ("mrgen.launch.demo", "import hydra, wandb\nfrom mrgen.papers.rsnet import RSNet"),
        ("mrgen.evaluation.swap", "from mrgen import __version__"),
    ],
)
def test_the_check_finds_nothing_where_nothing_is(module: str, source: str):
    assert violations(source, module) == []


def test_networks_losses_metrics_and_papers_live_without_the_rest():
    """They import where none of these packages is installed: a method can be taken elsewhere with torch and Lightning.

    The packages are made absent as pip would leave them, no module to find and no metadata, because Lightning looks
    for some of them itself and copes where they are not.
    """
    absent = ("torchio", "SimpleITK", "hydra", "omegaconf", "wandb", "monai", "nibabel", "nilearn")
    wanted = [
        name
        for name in MODULES
        if any(below(name, part) for part in (*METHOD_PARTS, "mrgen.papers", "mrgen.segmenter", "mrgen.data.batch"))
    ]
    code = f"""
import importlib, importlib.abc, importlib.metadata as metadata, sys
absent = {absent!r}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from_name = metadata.Distribution.from_name.__func__
def known(cls, name):
    if name.lower().removesuffix("-core") in {{a.lower() for a in absent}}:
        raise metadata.PackageNotFoundError(name)
    return from_name(cls, name)
metadata.Distribution.from_name = classmethod(known)
for name in absent:  # they are gone indeed
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{{name}} is still there")
for name in {wanted!r}:
    importlib.import_module(name)
left = sorted(set(absent) & {{m.partition(".")[0] for m in sys.modules}})
sys.exit(f"{{left}} came in" if left else 0)
"""
    assert {"mrgen.nets.unet3d", "mrgen.losses.segmentation", "mrgen.papers.rsnet", "mrgen.segmenter"} <= set(wanted)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
