"""What the tests of mrgen-synthesize share."""

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from mrgen.callbacks.provenance import KEY
from mrgen.launch.synthesis.synthesizing import synthesize
from tests.launch.tools import composed

A, B = "BraTS19_2013_102_1", "BraTS19_2013_107_1"  # subjects of the phantom
ONE_PASS, TWO_PASSES = ("mc_samples=0",), ("mc_samples=2",)


def copied(raw: Path, root: Path, *ids: str) -> Path:
    """Some subjects of a cohort."""
    for id in ids:
        shutil.copytree(next(raw.glob(f"*/{id}")), root / id)
    return root


def described(run_dir: Path, **data: Any) -> Path:
    """Changes what the best checkpoint says of its data."""
    path = run_dir / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content[KEY]["data"] |= data
    torch.save(content, path)
    return run_dir


def made(run: Path, root: Path, output: Path, *overrides: str, left_out: int = 0) -> Path:
    """Synthesises, in the one precision whose results do not depend on the processor."""
    paths = (f"checkpoint='{run}'", f"input='{root}'", f"output='{output}'")
    assert synthesize(composed("synthesize", *paths, "device=cpu", "precision=32-true", *overrides)) == left_out
    return output


def image(output: Path, id: str = A, what: str = "synthetic", target: str = "t2") -> nibabel.Nifti1Image:
    return nibabel.load(output / id / f"{id}_{target}_{what}.nii.gz")


def values(output: Path, id: str = A, what: str = "synthetic") -> np.ndarray:
    return np.asanyarray(image(output, id, what).dataobj)


def record(output: Path, id: str = A) -> dict[str, Any]:
    return json.loads((output / id / f"{id}_t2.json").read_text())
