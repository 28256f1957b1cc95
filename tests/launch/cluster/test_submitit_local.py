"""A sweep on a workstation whose jobs are processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mrgen.launch.status import read_status
from tests.launch.tools import TINY


@pytest.mark.parametrize(
    ("launcher", "gpus"),
    [
        ("local", "5"),
        pytest.param("submitit_local", "", marks=pytest.mark.slow),  # which hides them
    ],
)
def test_jobs_run_beside_each_other_and_one_that_fails_ends_alone(
    tmp_path: Path, phantom_store: Path, launcher: str, gpus: str
) -> None:
    sweep = tmp_path / "sweep"
    command = [Path(sys.executable).with_name("mrgen-train"), "-m", f"hydra/launcher={launcher}"]
    command += ["experiment=rsnet/rsnet", *TINY, "trainer.max_epochs=1", "seed=0,-1"]
    command += [f"data.store='{phantom_store}'", f"hydra.sweep.dir='{sweep}'"]
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'submitit.core._submit' in sys.orig_argv:\n"
        f"    open({str(tmp_path / 'seen')!r}, 'a').write(f\"[{{os.environ['CUDA_VISIBLE_DEVICES']}}]\\n\")\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "5", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: 1 of 2 jobs of the sweep failed" in done.stderr
    assert read_status(sweep / "0_rsnet-t2")["state"] == "finished"
    assert read_status(sweep / "1_rsnet-t2")["reason"].startswith("UserError: seed is -1")
    assert (tmp_path / "seen").read_text().split() == [f"[{gpus}]"] * 2
