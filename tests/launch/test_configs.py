"""The config of a run's folder is data, and a damaged one is a sentence."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mrgen.errors import UserError
from mrgen.launch.configs import find_config, read_config

RUN: dict[str, Any] = {
    "name": "x",
    "model": {"_target_": "mrgen.papers.rsnet.RSNet", "lr": 1e-05, "betas": [0.9, 0.999]},
    "data": {"sampling": {"_target_": "mrgen.data.crops.BrainBox"}, "layout": {"site": {"pattern": "^\\w+$"}}},
    "trainer": {"max_epochs": 2},
}
PLAIN = OmegaConf.to_yaml(OmegaConf.create(RUN)).encode()


def test_a_saved_config_comes_back(tmp_path: Path):
    (tmp_path / "config.yaml").write_bytes(PLAIN)
    assert read_config(tmp_path / "config.yaml") == RUN


def test_a_run_may_be_called_by_a_number(tmp_path: Path):
    (tmp_path / "config.yaml").write_bytes(PLAIN.replace(b"name: x", b"name: 7"))
    assert read_config(tmp_path / "config.yaml").name == 7


def test_the_runs_own_is_taken_before_hydras(tmp_path: Path):
    (tmp_path / ".hydra").mkdir()
    for path in (tmp_path / ".hydra" / "config.yaml", tmp_path / "config.yaml"):
        path.write_bytes(PLAIN)
        assert find_config(tmp_path) == path


def test_references_are_data_in_hydras_alone(tmp_path: Path):
    (tmp_path / ".hydra").mkdir()
    for folder, fits in ((tmp_path / ".hydra", True), (tmp_path, False)):
        (folder / "config.yaml").write_bytes(PLAIN + b"monitor: ${name}\n")
        if fits:
            assert read_config(folder / "config.yaml").monitor == "x"
        else:
            with pytest.raises(UserError, match="expected values"):
                read_config(folder / "config.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "found nothing"),
        (b"[1, 2]", "found a list"),
        (b"just text", "found a str"),
        (b"a: [", "found no YAML of ours"),
        (PLAIN.decode().encode("utf-16"), "byte 0 is no UTF-8"),
        (PLAIN + b"a: &x [1]\nb: *x\n", "an alias"),
        (PLAIN + b"a: !!python/object/apply:os.system ['true']", "found no YAML of ours"),
        (PLAIN + b"hydra: {callbacks: {x: {}}}", "found the key hydra, which decides what runs around a training"),
        (PLAIN + b"defaults: [/evil]", "found the key defaults"),
        (PLAIN + b"a: ${oc.env:HOME}", "expected values"),
        (PLAIN + b"callbacks: {x: {_target_: os.system}}", "asks for 'os.system'"),
        (PLAIN.replace(b"model:", b"modell:"), "found no model"),
        (PLAIN + b"tracking: true\n", "found tracking: True"),
        (b"[" * 100_000, "more than 50 levels"),
    ],
)
def test_a_saved_config_that_is_more_or_less_than_data_is_a_sentence(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*({said})"):
        read_config(path)
