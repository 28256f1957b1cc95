"""The wheel works where no checkout is. Slow: it builds one."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from mrgen.launch.paths import CONF_DIR

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("prepare", "train", "synthesize", "evaluate")


def test_a_checkout_and_an_editable_install_read_the_conf_that_people_edit():
    assert CONF_DIR == ROOT / "conf"
    for script in SCRIPTS:  # console scripts and modules are the same
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        assert declared[f"mrgen-{script}"] == f"mrgen.{script}:main"
        assert Path(sys.executable).with_name(f"mrgen-{script}").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("mrgen-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("elsewhere") / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(installed: Path, cwd: Path, *arguments: str) -> str:
    """Python with the wheel before the checkout, in a folder that holds neither."""
    import os

    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_all_of_conf_and_all_modules(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert f"mrgen/conf/{file.relative_to(ROOT / 'conf').as_posix()}" in names
    for file in (path for kind in ("py", "html") for path in (ROOT / "mrgen").rglob(f"*.{kind}")):
        assert file.relative_to(ROOT).as_posix() in names
    assert "hydra_plugins/mrgen_launcher/slurm_launcher.py" in names
    assert "hydra_plugins/__init__.py" not in names  # it is other packages' as well
    assert not [name for name in names if name.startswith(("tests/", "conf/", "docs/", "benchmarks/"))]


@pytest.mark.slow
def test_the_wheel_works_elsewhere(installed: Path, tmp_path: Path):
    where = "import mrgen.launch.paths as p; print(p.__file__); print(p.CONF_DIR)"
    assert run(installed, tmp_path, "-c", where).splitlines() == [
        str(installed / "mrgen" / "launch" / "paths.py"),
        str(installed / "mrgen" / "conf"),
    ]
    for script in SCRIPTS:
        assert f"mrgen-{script} " in run(installed, tmp_path, "-m", f"mrgen.{script}", "--help")
    assert "experiment/rsnet: " in run(installed, tmp_path, "-m", "mrgen.train", "--help")
    config = run(installed, tmp_path, "-m", "mrgen.train", "--cfg", "job", "experiment=rsnet/rsnet", "data=brats2019")
    assert "_target_: mrgen.papers.rsnet.RSNet" in config
    assert "title: BraTS 2019" in config
    planned = run(installed, tmp_path, str(installed / "bin" / "mrgen-train"), "experiment=rsnet/rsnet", "plan=true")
    assert "plan of rsnet-t2" in planned
    assert (tmp_path / "runs" / "rsnet-t2").is_dir()  # results lie where one works, not where the package lies


@pytest.mark.slow
def test_the_wheel_reads_its_own_conf_and_no_other(installed: Path, tmp_path: Path):
    """A change in the wheel's copy shows, so that the checkout's was not read."""
    model = installed / "mrgen" / "conf" / "model" / "rsnet.yaml"
    before = model.read_text()
    model.write_text(before.replace("filters: 32", "filters: 31"))
    try:
        config = run(installed, tmp_path, "-m", "mrgen.train", "--cfg", "job", "experiment=rsnet/rsnet")
    finally:
        model.write_text(before)
    assert "filters: 31" in config
