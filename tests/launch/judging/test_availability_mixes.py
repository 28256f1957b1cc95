"""The 25 mixes of Table 2: one number chooses amounts, order and store; enhancement keeps a slice a slice."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torchio as tio
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mrgen.data.dataset import augmented
from mrgen.errors import UserError
from mrgen.launch import training
from mrgen.launch.instantiate import instantiate, plain
from mrgen.launch.paths import CONF_DIR
from mrgen.launch.training import train
from tests.launch.tools import CPU, Called, composed

PRESET = "experiment=lesion_vaegan/availability"
AMOUNTS = ("real", "synthetic", "enhanced", "order")


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRGEN_STORES", "/stores")


def mix(*overrides: str) -> dict:
    return plain(composed("train", PRESET, *overrides).data.mix)


def test_rows_are_those_that_the_table_shows():
    """What a run is trained on and what stands beside its result; the order of one kind alone does not matter."""
    judged = yaml.safe_load((CONF_DIR / "experiment" / "lesion_vaegan" / "tables.yaml").read_text())
    rows = composed("train", PRESET).rows
    assert list(rows) == list(range(1, 26))
    printed = {name: {key: row[key] for key in AMOUNTS} for name, row in judged["evaluation"]["rows"].items()}
    for row in printed.values():
        row["order"] = row["order"] or "random"
    assert {f"row-{number}": dict(row) for number, row in rows.items()} == printed


@pytest.mark.parametrize(
    ("row", "store", "amounts"),
    [
        (1, None, (1.0, 0.0, 0.0, "random")),
        (3, "/stores/synthetic_generation", (0.0, 1.0, 0.0, "random")),
        (7, "/stores/synthetic_generation", (0.1, 2.0, 0.0, "synthetic_first")),
        (19, None, (1.0, 0.0, 0.5, "random")),
        (24, "/stores/synthetic_generation", (1.0, 1.0, 0.0, "real_first")),
    ],
)
def test_a_row_says_what_is_mixed(stores: None, row: int, store: str | None, amounts: tuple):
    made = mix(f"row={row}")
    assert (made["real"], made["fraction"], made["enhanced"], made["order"]) == amounts
    assert made["store"] == store
    assert made["equal_steps"]  # every row has the same iterations
    assert composed("train", PRESET, f"row={row}").name == f"row-{row}"


def test_synthetic_is_a_name_or_a_path(stores: None):
    assert mix("row=25", "synthetic=generation-single")["store"] == "/stores/synthetic_generation-single"
    assert mix("row=25", "synthetic=here/mine")["store"] == "here/mine"


def test_a_row_that_there_is_not_is_one_sentence(mrgen: Callable[..., Called], phantom_store: Path):
    called = mrgen("train", PRESET, f"data.store={phantom_store}", "row=26", "plan=true")
    assert called.code == 1
    assert called.message.startswith("row=26: found no such row; expected one of 1, 2, 3, ")
    assert "interpolation" not in called.message


def test_all_rows_are_one_range():
    """As the documentation sweeps them."""
    jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(["row=range(1,26)"]), None)[0]
    assert jobs == [[f"row={row}"] for row in range(1, 26)]


OLD = {"method": "samr", "fraction": 1.0, "equal_steps": False, "real_slices": 9, "patients": [], "made": None}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (OLD, {**OLD, "real": 1.0, "order": "random", "samples": None}, None),  # from before there were orders
        (None, None, None),
        (OLD, {**OLD, "fraction": 0.5}, r"data\.mix is another"),
        (None, OLD, r"data\.mix is another"),
        (OLD, None, r"data\.mix is another"),
        (
            {**OLD, "samples": 900},
            {**OLD, "samples": 1800},
            r"order=real_first divided a training of 900 samples, and now it has 1800; resume with the trainer\.max_ep",
        ),
    ],
)
def test_a_resumed_run_draws_the_slices_that_its_checkpoint_tells_of(old, new, said: str | None):
    conf = OmegaConf.create({"data": {"mix": {"store": "s", "order": "real_first"}}})
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        training._check_mix(conf, Path("run"), old, new)


def test_enhancement_moves_image_label_and_brain_together():
    """Forty draws on one slice, a bright rectangle of lesion in grey brain: what is bright stays lesion, all else 0."""
    enhance = tio.Compose([instantiate(each) for each in mix("row=1")["enhancement"]])
    brain = torch.zeros(48, 40, 1, dtype=torch.bool)
    brain[10:38, 8:32] = True
    label = torch.zeros(48, 40, 1, dtype=torch.int64)
    label[14:24, 10:18] = 4
    image = (0.4 * brain + 0.5 * (label == 4)).float()[None].repeat(2, 1, 1, 1)
    parts = {"image": image, "label": label, "brain": brain}
    made = [augmented(enhance, parts, seed=seed, outside=0.0) for seed in range(40)]
    for each in made:
        assert each["image"].shape == image.shape
        assert each["label"].unique().tolist() == [0, 4]
        bright = each["image"][0] > 0.65
        assert float((bright != (each["label"] == 4)).float().mean()) < 0.02  # interpolated borders
        assert (each["image"][:, ~each["brain"]] == 0).all()
        assert each["brain"].sum() == pytest.approx(int(brain.sum()), rel=0.07)
    assert len({each["image"].numpy().tobytes() for each in made}) > 30  # of flips there are two


def test_a_row_is_trained_and_resumed_as_it_was(phantom_store: Path, tmp_path: Path):
    """On the phantom, of any layout and number of sequences; another mix is another run."""
    small = ("data.sampling.size=[48,48]", "data.steps_per_epoch=1", "trainer.max_epochs=1", "model.width=2", *CPU)
    conf = composed("train", PRESET, f"data.store='{phantom_store}'", "data.modalities=[t1,flair]", "row=19", *small)
    run = train(conf, tmp_path)
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (description,) = [value for value in saved.values() if isinstance(value, dict) and "data" in value]
    mixed = description["data"]["mix"]
    assert mixed["enhanced_slices"] == round(0.5 * mixed["real_slices"])
    assert len(description["data"]["classes"]) == 5
    conf.resume, conf.data.mix.enhanced = str(run), 0.8
    with pytest.raises(UserError, match=r"another config \(data\.mix\.enhanced: 0\.5 there, 0\.8 here\)"):
        train(conf, run)
