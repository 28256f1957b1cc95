"""Finished runs, read back; and every way in which a folder or a file is none."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mrgen.callbacks.provenance import KEY
from mrgen.errors import UserError
from mrgen.evaluation.table import write_rows
from mrgen.files import read_metrics, write_json
from mrgen.launch.runs import load_run


@pytest.fixture
def run_dir(rsnet_run: Path, tmp_path: Path) -> Path:
    """A run to spoil."""
    shutil.copytree(rsnet_run, tmp_path / "run")
    return tmp_path / "run"


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_a_run_comes_back_as_it_was_trained(run_dir: Path):
    run = load_run(run_dir)
    assert run.checkpoint == run_dir / "checkpoints" / "best.ckpt"
    assert run.model.targets == ("t2",)
    assert not run.model.training
    assert not any(p.requires_grad for p in run.model.parameters())
    stored = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    assert stored.keys() == run.model.state_dict().keys()
    assert all(torch.equal(run.model.state_dict()[name], tensor) for name, tensor in stored.items())
    assert run.conf.name == "rsnet-t2"
    assert len(run.split.train) == 5
    assert run.description["data"]["modalities"] == ["t1", "t1ce", "t2", "flair"]
    assert run.description["data"]["normalisation"] == {"_target_": "mrgen.data.normalisation.ZScore"}


def test_a_checkpoint_says_alone_what_its_numbers_mean(run_dir: Path):
    """Intensities of a synthesis come from the training subjects' statistics, kept in the checkpoint."""
    scale = load_run(run_dir).description["data"]["intensity_scale"]
    assert set(scale) == {"t1", "t1ce", "t2", "flair"}
    assert all(len(pair) == 2 and pair[1] > 0 for pair in scale.values())


def test_without_validation_the_last_checkpoint_is_taken(run_dir: Path):
    (run_dir / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(
        UserError, match=r"no checkpoints/best\.ckpt, which the run's validation chose; put back a copy"
    ):
        load_run(run_dir)
    assert load_run(run_dir / "checkpoints" / "last.ckpt").checkpoint.name == "last.ckpt"
    rows = [row | {"val/loss": "nan"} for row in read_metrics(run_dir / "metrics.csv")]  # it could choose none
    write_rows(run_dir / "metrics.csv", rows)
    assert load_run(run_dir).checkpoint.name == "last.ckpt"


def test_a_checkpoint_file_can_be_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_run(run_dir / "checkpoints" / "last.ckpt").path == run_dir
    monkeypatch.chdir(run_dir / "checkpoints")
    assert load_run("last.ckpt").path == run_dir


def test_nothing_there(tmp_path: Path):
    with pytest.raises(UserError, match="nope: no such run folder or checkpoint"):
        load_run(tmp_path / "nope")


def test_a_run_without_a_checkpoint_says_its_status(run_dir: Path):
    shutil.rmtree(run_dir / "checkpoints")
    write_json(run_dir / "status.json", {"state": "failed", "reason": "MemoryError: too large"})
    with pytest.raises(UserError, match=r"its status is failed: MemoryError: too large"):
        load_run(run_dir)
    write_json(run_dir / "status.json", {"state": "running"})
    with pytest.raises(UserError, match=r"its status is running$"):
        load_run(run_dir)


def test_a_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"last.ckpt and no estimator/estimator.json; it is no run folder"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "split.json"])
def test_a_checkpoint_outside_its_folder(run_dir: Path, name: str):
    (run_dir / name).unlink()
    with pytest.raises(UserError, match=f"no {name}; expected the folder that mrgen-train wrote around best.ckpt"):
        load_run(run_dir)


def test_a_lone_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.ckpt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no config.yaml; expected the folder that mrgen-train wrote around x.ckpt"):
        load_run("x.ckpt")


def test_a_file_beside_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Above its folder there is none."""
    monkeypatch.setattr(Path, "is_file", lambda path: path == Path("/x.ckpt"))
    with pytest.raises(UserError, match=r"^/: no config.yaml; expected the folder that mrgen-train wrote around"):
        load_run("/x.ckpt")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", b""),
        ("config.yaml", b"- a\n"),
        ("config.yaml", b"name: x\n"),
        ("config.yaml", "name: é\n".encode("utf-16")),
        ("config.yaml", b"name: [x\n"),
        ("split.json", b"{"),
        ("split.json", b'{"train": 3, "val": [], "test": []}'),
        ("split.json", b"\xe9"),
    ],
)
def test_a_damaged_folder_is_one_sentence(run_dir: Path, file: str, content: bytes):
    (run_dir / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(file)}.*(found|cannot be read)"):
        load_run(run_dir)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[: len(content) // 4] = bytes(len(content) // 4)
    path.write_bytes(content)


class Evil:
    """Unpickled, it would run a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize(
    "spoil",
    [
        truncated,
        flipped,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no checkpoint"),
        lambda path: torch.save({"state_dict": {}}, path),  # another program's
        lambda path: torch.save([1, 2], path),
        lambda path: changed(path, lambda content: content.pop("state_dict")),
        lambda path: changed(path, lambda content: content.update({KEY: "nothing"})),
    ],
)
def test_what_is_no_checkpoint_of_mrgen_is_one_sentence(run_dir: Path, spoil: Callable[[Path], Any]):
    spoil(run_dir / "checkpoints" / "best.ckpt")
    with pytest.raises(UserError, match=r"best.ckpt: (cannot be read as|found a description).+; put back a copy"):
        load_run(run_dir)


def test_a_checkpoint_that_would_need_unpickling_is_refused(run_dir: Path, tmp_path: Path):
    path, touched = run_dir / "checkpoints" / "best.ckpt", tmp_path / "touched"
    changed(path, lambda content: content.update(extra=Evil(f"touch {touched}")))
    with pytest.raises(UserError, match=r"cannot be read as a checkpoint of mrgen \(UnpicklingError"):
        load_run(run_dir)
    assert not touched.exists()
    torch.load(path, weights_only=False)  # it is a weapon, in other hands
    assert touched.exists()


def test_a_checkpoint_that_asks_for_a_class_outside_mrgen_is_refused(run_dir: Path, tmp_path: Path):
    touched = tmp_path / "touched"
    model = {"_target_": "os.system", "command": f"touch {touched}"}
    changed(run_dir / "checkpoints" / "best.ckpt", lambda content: content[KEY].update(model=model))
    with pytest.raises(UserError, match=r"best\.ckpt: asks for 'os\.system', which is none of the classes"):
        load_run(run_dir)
    assert not touched.exists()


def test_weights_that_do_not_fit_are_named(run_dir: Path):
    changed(run_dir / "checkpoints" / "best.ckpt", lambda content: content[KEY]["model"].update(filters=3))
    with pytest.raises(UserError, match="its weights do not fit the model that it describes"):
        load_run(run_dir)


@pytest.mark.parametrize("kind", [torch.complex64, torch.int64, torch.bool])
def test_weights_of_another_kind_of_numbers_are_not_cast(run_dir: Path, kind: torch.dtype):
    def cast(content: dict[str, Any]) -> None:
        key = next(key for key, weight in content["state_dict"].items() if weight.is_floating_point())
        content["state_dict"][key] = content["state_dict"][key].to(kind)

    changed(run_dir / "checkpoints" / "best.ckpt", cast)
    with pytest.raises(UserError, match=rf"best\.ckpt: its weights do not fit .*is of {kind}, and the model's of"):
        load_run(run_dir)


def test_a_description_that_lacks_what_a_synthesis_needs_is_one_sentence(run_dir: Path):
    """Older files may lack a key, and a run of another sampling has no box; who needs one says so."""
    path = run_dir / "checkpoints" / "best.ckpt"
    changed(path, lambda content: content[KEY]["data"].update(box=[], intensity_scale={"t1": [0.0, 1.0]}))
    run = load_run(run_dir)
    assert run.intensity_scale("t1") == (0, 1)
    with pytest.raises(UserError, match=r"best\.ckpt: found no data\.intensity_scale of t2 in its description"):
        run.intensity_scale("t2")
    with pytest.raises(UserError, match=r"best\.ckpt: found no data\.box in its description"):
        run.view([(0, 8)] * 3, (16, 16, 16), None)


def test_a_synthesis_on_another_scale_than_its_data_is_refused(rsnet_run: Path, monkeypatch: pytest.MonkeyPatch):
    """Pix2Pix answers in [0, 1]; read as z-scores, its files and its swap would be wrong without a word."""
    run = load_run(rsnet_run)
    run.check_scale()
    monkeypatch.setattr(type(run.model), "scale", "unit")
    with pytest.raises(UserError, match=r"rsnet-t2 makes values on the scale 'unit' and was trained .* 'zscore'"):
        run.check_scale()
