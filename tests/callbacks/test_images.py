"""Pictures of what a network makes of fixed slices: of every method, and none of them changes a training."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule

from mrgen.callbacks.image_grid import Column, _grid, draw_grid
from mrgen.callbacks.images import Images, _as_at_test
from mrgen.data.datamodule import CohortDataModule
from mrgen.errors import UserError
from mrgen.launch.instantiate import instantiate
from mrgen.launch.training import build_datamodule, fill_from_store, train
from tests.launch.tools import TINY, composed

SLICES = ("data.sampling.size=[48,48]", "data.modalities=[t1,t1ce,t2,flair]")
SPLIT = ("data.split.test=0.25", "data.split.val=0.25")
GAN = ("model.filters=2", "model.downs=3", "model.discriminator_filters=2")
SEQUENCES = ("T1", "T1ce", "T2", "FLAIR")
MADE = [f"{name} {what}" for name in SEQUENCES for what in ("real", "made")]
SEGMENTED = ["reference", "segmentation"]

# By name the preset with what makes it small, and the columns of its grid.
METHODS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "rsnet": (
        ("experiment=rsnet/rsnet", *TINY),
        ["T2 real", "synthetic", "error", "variance", *SEGMENTED],
    ),
    "rnet of patches": (
        ("experiment=rsnet/rnet", "data/sampling=patch", "data.sampling.size=[16,16,16]", *TINY, "model.mc_samples=0"),
        ["T2 real", "synthetic", "error", "label"],
    ),
    "snet": (
        ("experiment=rsnet/snet", "model.net.filters=2", "model.net.levels=2"),
        [*SEQUENCES, *SEGMENTED],
    ),
    "samr": (
        ("experiment=samr/samr", *SLICES, *GAN, "model.blocks=1", "model.unet_filters=2", "model.unet_downs=3"),
        ["label", *MADE],
    ),
    "pix2pix of labels": (("experiment=samr/pix2pix", *SLICES, *GAN, "model.filters=4"), ["label", *MADE]),
    "structure": (
        ("experiment=lesion_vaegan/structure", *SLICES, "model.width=1", "model.latent=4", "model.halvings=3", *SPLIT),
        [f"code {i}" for i in range(1, 7)],
    ),
    "generation": (
        ("experiment=lesion_vaegan/generation", *SLICES, "model.width=1", "model.discriminator_width=1", *SPLIT),
        ["label", "structure map", *MADE],
    ),
    "pix2pix": (
        (
            *("experiment=t1_to_t2/pix2pix", "data.sampling.size=[16,16,16]", "data.sampling.divisor=8", *GAN),
            *("model.discriminator_layers=1", "model.filters=4"),
        ),
        ["T2 real", "synthetic", "error", "label"],
    ),
    "joint": (
        ("experiment=joint_imputation/cross_validation", "model.width=2"),
        ["FLAIR real", "synthetic", "error", *SEGMENTED],
    ),
    "offline, its first stage": (
        ("experiment=joint_imputation/cross_validation", "model=offline", "model.width=2"),
        ["FLAIR real", "synthetic", "error", "label"],
    ),
    "unimodal": (
        ("experiment=joint_imputation/cross_validation", "model=unimodal", "model.width=2"),
        ["T1", *SEGMENTED],
    ),
}
WMH = ("data.sampling.size=[48,48]", "data.split.folds=3", "data.split.val=1")


def built(store: Path, *overrides: str) -> tuple[LightningModule, CohortDataModule]:
    conf = composed("train", f"data.store='{store}'", *overrides)
    fill_from_store(conf)
    torch.manual_seed(0)
    model = instantiate(conf.model)
    data = build_datamodule(
        conf.data, guides=list(getattr(model, "guides", ())), unpaired=getattr(model, "unpaired", False)
    )
    return model, data


@pytest.mark.parametrize("name", METHODS)
def test_what_is_drawn_of_a_method(name: str, phantom_store: Path, wmh_store: Path):
    overrides, titles = METHODS[name]
    wmh = "joint_imputation" in overrides[0]
    model, data = built(wmh_store if wmh else phantom_store, *overrides, *(WMH if wmh else ()))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with _as_at_test(model):
        grid = Images(slices=2)._grid(data, model)
    assert grid is not None
    assert [column.title.partition(" (")[0] for column in grid.columns] == titles
    shape = grid.settings["shown"].shape[1:]
    assert {column.pictures.shape[:3] for column in grid.columns} == {(2, *shape)}
    for column in grid.columns:
        assert np.isfinite(column.pictures).all()
        assert column.low < column.high
    for real, made in pairwise(grid.columns):
        if made.title == "synthetic" or made.title.endswith(" made"):
            assert (made.low, made.high) == (real.low, real.high)  # a bias must show
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_methods_of_which_nothing_can_be_shown_are_left_alone():
    assert Images()._grid(None, LightningModule()) is None  # type: ignore[arg-type]


def test_several_subjects_lie_below_each_other(phantom_store: Path):
    model, data = built(phantom_store, "experiment=rsnet/rnet", *TINY, "data.split.val=0.25")
    images = Images(subjects=2, slices=1)
    with _as_at_test(model):
        grid = images._grid(data, model)
    assert grid is not None
    assert [row.partition("\n")[0] for row in grid.rows] == sorted(data.split.val)
    assert all(column.pictures.shape[0] == 2 for column in grid.columns)


# ----- a training ----------------------------------------------------------------------------------------------------


def test_a_training_with_pictures_is_the_training_without(
    tmp_path: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bit by bit, with dropout, with validation and without a seed that every step sets anew."""
    monkeypatch.setattr("mrgen.callbacks.determinism.SeedSteps.on_train_batch_start", lambda *_: None)
    common = ("experiment=rsnet/rsnet", f"data.store='{phantom_store}'", "trainer.max_epochs=2", "model.dropout=0.2")
    runs = []
    for name, pictures in (("without", ()), ("with", ("callbacks=[images]", "callbacks.images.every_n_epochs=1"))):
        narrow = [override for override in TINY if not (pictures and "callbacks" in override)]
        (tmp_path / name).mkdir()
        runs.append(train(composed("train", *common, *narrow, *pictures), tmp_path / name))
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert (runs[0] / "metrics.csv").read_text() == (runs[1] / "metrics.csv").read_text()
    assert not (runs[0] / "images").exists()
    written = sorted((runs[1] / "images").iterdir())
    assert [path.name for path in written] == ["epoch-0001.png", "epoch-0002.png"]
    from matplotlib.image import imread

    first, second = (imread(path) for path in written)
    assert first.shape == second.shape
    assert first[..., :3].std() > 0.1  # something is on it
    assert not np.array_equal(first, second)


def test_every_module_is_in_its_own_mode_again():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.BatchNorm1d(2))).train()
    model[1].eval()
    with _as_at_test(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False, False]
    assert torch.is_grad_enabled()


# ----- when ----------------------------------------------------------------------------------------------------------


def drawn(monkeypatch: pytest.MonkeyPatch, epochs: int, images: Images, **trainer: Any) -> list[int]:
    """Of which epochs there are pictures; nothing is drawn."""
    pictures: list[int] = []
    monkeypatch.setattr(Images, "_grid", lambda *_: pictures.append(run.current_epoch + 1))
    run = SimpleNamespace(
        **{
            **{"is_global_zero": True, "fast_dev_run": False, "max_epochs": epochs},
            **{"default_root_dir": "/nowhere", "datamodule": None, "loggers": [], "callbacks": []},
            "precision_plugin": SimpleNamespace(val_step_context=torch.no_grad),
            **trainer,
        }
    )
    model: Any = torch.nn.Linear(1, 1)
    for epoch in range(epochs if epochs > 0 else 25):
        run.current_epoch = epoch
        images.on_train_epoch_end(run, model)  # type: ignore[arg-type]
    run.current_epoch += 1  # as Lightning counts at the end
    before = len(pictures)
    images.on_train_end(run, model)  # type: ignore[arg-type]
    return pictures[:before] + [epoch - 1 for epoch in pictures[before:]]


@pytest.mark.parametrize(
    ("epochs", "every", "pictures"),
    [
        (3, None, [3]),
        (20, None, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        (101, None, [11, 22, 33, 44, 55, 66, 77, 88, 99, 101]),
        (5, 2, [2, 4, 5]),
        (-1, None, [10, 20, 25]),  # ended by something else
    ],
)
def test_when_pictures_are_drawn(monkeypatch: pytest.MonkeyPatch, epochs: int, every: int | None, pictures: list[int]):
    assert drawn(monkeypatch, epochs, Images(every_n_epochs=every)) == pictures


@pytest.mark.parametrize("trainer", [{"is_global_zero": False}, {"fast_dev_run": True}])
def test_other_ranks_and_trial_runs_draw_nothing(monkeypatch: pytest.MonkeyPatch, trainer: dict[str, Any]):
    assert drawn(monkeypatch, 3, Images(), **trainer) == []


def test_what_cannot_be_drawn_ends_no_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    images = Images(every_n_epochs=1)
    drawn(monkeypatch, 1, images)
    monkeypatch.undo()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        assert drawn(patch, 1, Images()) == [1]
        other = Images(every_n_epochs=1)
        patch.setattr("mrgen.callbacks.images._as_at_test", full)
        assert drawn(patch, 4, other) == []
    assert other.failed
    out = capsys.readouterr().out
    assert out.count("images: none from here on (OSError") == 1
    assert "the training goes on" in out


@pytest.mark.parametrize("wrong", [{"slices": 0}, {"every_n_epochs": -1}, {"subjects": "all"}, {"mc_samples": 1}])
def test_numbers_that_cannot_be_are_a_sentence(wrong: dict[str, Any]):
    with pytest.raises(UserError, match=rf"callbacks\.images\.{next(iter(wrong))} is"):
        Images(**wrong)


# ----- the picture ---------------------------------------------------------------------------------------------------


def test_the_patients_right_is_on_the_left_and_the_front_above():
    right_front = np.zeros((1, 8, 10))  # RAS+
    right_front[0, -1, -1] = 1
    columns = [Column("grey", right_front), Column("colours", np.stack([right_front] * 3, axis=-1))]
    for axis in _grid(columns, ["row"], "title", np.ones((1, 8, 10)), {}).axes:
        (image,) = axis.images
        rows, bright, *_ = np.nonzero(np.asarray(image.get_array()))
        assert image.origin == "upper"
        assert image.get_array().shape[:2] == (10, 8)
        assert {*rows, *bright} == {0}


def test_no_text_of_a_grid_lies_on_another():
    """Of the widest kind with long names, and of a single picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    classes = ("background", "necrotic and non-enhancing core", "edema", "enhancing")
    pictures = np.zeros((2, 40, 50))
    for titles in (["label", *MADE], ["a"]):
        columns = [Column(title, pictures) for title in titles]
        colours = {name: "red" for name in classes}
        rows = ["BraTS20_Training_001\nslice 71", "BraTS20_Training_001\nslice 80"]
        figure = _grid(columns, rows, "LesionVAEGAN, epoch 100", np.ones((1, 40, 50)), colours)
        FigureCanvasAgg(figure).draw()
        texts = [text for axis in figure.axes for text in (axis.title, axis.yaxis.label) if text.get_text()]
        texts += [figure._suptitle, *figure.legends[0].get_texts()]  # type: ignore[attr-defined]
        boxes = [text.get_window_extent() for text in texts]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :]), texts[i]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(figure: Any, file: BinaryIO, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    column = Column("a", np.zeros((1, 8, 8)))
    with pytest.raises(UserError, match=r"a\.png: cannot be written \(No space"):
        draw_grid([column], ["row"], tmp_path / "a.png", title="t", shown=np.ones((1, 8, 8)))
    assert list(tmp_path.iterdir()) == []
