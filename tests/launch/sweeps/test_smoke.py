"""One command trains a small version of every paper and the clustering, on two processes each. Minutes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mrgen.launch.paths import CONF_DIR
from mrgen.launch.sweeps.jobs import sweep_status
from tests.launch.tools import composed

PRESETS = ("rsnet", "samr", "joint", "lesion_vaegan", "pix2pix", "clustering")
COHORTS = "data=phantom,phantom_apt,phantom_wmh,phantom_brats2015"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_small_preset_composes_on_two_processes(preset: str):
    conf = composed("train", f"experiment=smoke/{preset}", "trainer=ddp", "trainer.accelerator=cpu")
    OmegaConf.to_container(conf, resolve=True, throw_on_missing=True)
    assert conf.data.store.endswith("_5mm_n9_s0")
    assert conf.trainer.devices == 2


def test_there_is_one_for_each_paper_and_the_clustering():
    assert {file.stem for file in (CONF_DIR / "experiment" / "smoke").glob("*.yaml")} == {*PRESETS}


@pytest.mark.slow
def test_one_sweep_trains_them_all_and_ends_with_a_table(tmp_path: Path):
    folders = {name: str(tmp_path / name.lower()) for name in ("MRGEN_RUNS", "MRGEN_STORES", "MRGEN_COHORTS")}

    def mrgen(script: str, *arguments: str) -> str:
        command = [sys.executable, "-m", f"mrgen.{script}", "-m", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | folders, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    mrgen("prepare", COHORTS, "data.phantom.spacing=5", "data.phantom.subjects=9")
    small = ",".join(f"smoke/{preset}" for preset in PRESETS)
    said = mrgen("train", f"experiment={small}", "trainer=ddp", "trainer.accelerator=cpu", "tracking=csv")
    (folder,) = (tmp_path / "mrgen_runs").glob("sweep_*")
    jobs = sweep_status(folder)
    assert [job.state for job in jobs] == ["finished"] * 6
    assert [job.epoch for job in jobs[:5]] == [2] * 5
    for job in jobs:
        assert said.rindex(job.job.folder) > said.rindex(f"sweep {folder}")
