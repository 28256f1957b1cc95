"""Fixtures that several test modules share."""

import os
from pathlib import Path

import pytest

import mrgen  # noqa: F401  before torch: it sets how OpenMP's threads wait

os.environ["WANDB_MODE"] = "disabled"  # but in tests of it: a service would cost each of the others a second


@pytest.fixture(scope="session")
def scans() -> Path:
    """The folder of real scans, for tests that need them."""
    folder = os.environ.get("MRGEN_SCANS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MRGEN_SCANS does not name a folder of real scans")
    return Path(folder)


@pytest.fixture(scope="session")
def phantom_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared phantom: 8 tumour subjects at 5 mm, written in the BraTS 2019 layout and read back."""
    from mrgen.data.layouts import Layout
    from mrgen.data.phantom import grow_cohort
    from mrgen.data.preparation import prepare_cohort
    from mrgen.launch.paths import CONF_DIR

    folder = tmp_path_factory.mktemp("phantom")
    grow_cohort(folder / "cohort", layout="brats2019", subjects=8, spacing=5, seed=0, workers=2)
    layout = Layout.from_conf(CONF_DIR / "data" / "layout" / "brats2019.yaml")
    report = prepare_cohort(layout, folder / "cohort", folder / "store", workers=0, progress=False)
    assert not report.problems, report.problems
    return folder / "store"


@pytest.fixture(scope="session")
def wmh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared phantom in the WMH 2017 layout: T1 and FLAIR of 6 subjects at 5 mm, two of each site."""
    from mrgen.data.layouts import Layout
    from mrgen.data.phantom import grow_cohort
    from mrgen.data.preparation import prepare_cohort
    from mrgen.launch.paths import CONF_DIR

    folder = tmp_path_factory.mktemp("wmh")
    grow_cohort(folder / "cohort", layout="wmh2017", subjects=6, spacing=5, seed=0, workers=2)
    layout = Layout.from_conf(CONF_DIR / "data" / "layout" / "wmh2017.yaml")
    report = prepare_cohort(layout, folder / "cohort", folder / "store", workers=0, progress=False)
    assert not report.problems, report.problems
    return folder / "store"
