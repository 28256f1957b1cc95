"""Pictures of what a network makes of a few fixed slices, every so many epochs: what a loss does not tell."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from mrgen.callbacks.ema import EMA
from mrgen.callbacks.image_grid import Column, difference, draw_grid, edges, greys, labels, variances, window
from mrgen.data.batch import Batch, volumes
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.examples import Example, example_subjects, read_example
from mrgen.errors import UserError
from mrgen.evaluation.figures import SEQUENCES
from mrgen.protocols import Generator, LabelMaps, Segmenter, Synthesizer

__all__ = ["Images"]

PICTURES = 10  # of a training, where nobody says how often
MAPS = 6  # that are drawn from noise


@runtime_checkable
class DrawsMaps(Protocol):
    """A model of structure maps from noise: ``draw`` makes maps (n, 1, X, Y), 0 and 1; ``mask`` is 1 outside them."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor: ...

    def mask(self, maps: Tensor) -> Tensor: ...


@runtime_checkable
class FromMaps(Protocol):
    """A model that makes images (n, C, X, Y) of structure maps and labels; ``real`` prepares those of a batch."""

    modalities: tuple[str, ...]

    def real(self, batch: Mapping[str, Batch]) -> Any: ...

    def synthesise(self, structure: Tensor, lesion: Tensor) -> Tensor: ...


class Images(Callback):
    """Writes ``images/epoch-0010.png`` to the run's folder, and shows it in the services that track the run.

    A synthesizer's real, synthetic, error and variance, with its segmentation where it segments too; a segmenter's
    inputs, reference and segmentation; a generator's label, real and made sequences; structure maps from noise.
    Nothing is drawn of a model that is none of these. Training is not changed by it: no random number, no statistic and
    no gradient is left behind. The first rank draws, and no rank waits for another.

    Args:
        every_n_epochs: how often; None: ten times in a training, once in one of fewer than ten epochs. The last epoch
            is always drawn.
        subjects: how many of the validation subjects (of the training subjects where there are none), by name.
        slices: of each, those with the largest lesion.
        mc_samples: the most Monte Carlo samples of a variance, which cost a pass each.
        seed: of what is drawn, the same in every epoch.

    Raises:
        UserError: a number that is none of these.
    """

    def __init__(
        self,
        *,
        every_n_epochs: int | None = None,
        subjects: int = 1,
        slices: int = 3,
        mc_samples: int = 4,
        seed: int = 0,
    ):
        numbers = {"every_n_epochs": (every_n_epochs or 1, 1), "subjects": (subjects, 1), "slices": (slices, 1)}
        for name, (value, least) in (numbers | {"mc_samples": (mc_samples, 2), "seed": (seed, 0)}).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"callbacks.images.{name} is {value!r}; expected a whole number from {least} on")
        self.every_n_epochs, self.subjects, self.slices = every_n_epochs, subjects, slices
        self.mc_samples, self.seed = mc_samples, seed
        self.examples: list[Example] | None = None
        self.drawn = -1  # the last epoch of which there is a picture
        self.failed = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs or -1
        every = self.every_n_epochs or (PICTURES if last < 0 else last if last < PICTURES else -(-last // PICTURES))
        if epoch % every == 0 or epoch == last:
            self._draw(trainer, pl_module, epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > 0:  # ended by something else than max_epochs
            self._draw(trainer, pl_module, trainer.current_epoch)

    def _draw(self, trainer: Trainer, model: LightningModule, epoch: int) -> None:
        trial = getattr(trainer, "fast_dev_run", False)
        if trial or not trainer.is_global_zero or self.failed or self.drawn == epoch:
            return
        self.drawn = epoch
        path = Path(trainer.default_root_dir) / "images" / f"epoch-{epoch:04d}.png"
        try:
            with _averaged(trainer, model), _as_at_test(model), isolate_rng(), _fewer_samples(model, self.mc_samples):
                torch.manual_seed(self.seed)
                with trainer.precision_plugin.val_step_context():
                    grid = self._grid(trainer.datamodule, model)  # type: ignore[attr-defined]
                if grid is None:
                    return
                path.parent.mkdir(exist_ok=True)
                columns, rows, settings = grid.columns, grid.rows, grid.settings
                draw_grid(columns, rows, path, title=f"{type(model).__name__}, epoch {epoch}", **settings)
        except Exception as error:  # memory, disk: no picture is worth a training
            self.failed = True
            print(f"images: none from here on ({type(error).__name__}: {error}); the training goes on", flush=True)
            return
        step = (
            trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        )  # of the last batch, where the epoch's metrics stand
        for logger in trainer.loggers:
            if hasattr(logger, "log_picture"):
                logger.log_picture("images", path, step=step)

    def _grid(self, datamodule: CohortDataModule, model: LightningModule) -> "_Grid | None":
        kinds = (DrawsMaps, Generator, FromMaps, Synthesizer, Segmenter)
        if not isinstance(model, kinds):
            return None
        if self.examples is None:
            ids = example_subjects(datamodule, self.subjects)
            self.examples = [read_example(datamodule, id, self.slices) for id in ids]
        if isinstance(model, DrawsMaps):
            return _maps(model, self.seed)
        parts = [_pictures(model, datamodule, example, self.seed) for example in self.examples]
        columns = [_stacked(alike) for alike in zip(*(part.columns for part in parts), strict=True)]
        shown, label = (np.concatenate([part.settings[name] for part in parts]) for name in ("shown", "label"))
        settings = {"shown": shown, "label": label, "classes": datamodule.classes}
        return _Grid(columns, [row for part in parts for row in part.rows], settings)


# ----- what is left as it was ----------------------------------------------------------------------------------------


def _averaged(trainer: Trainer, model: LightningModule) -> AbstractContextManager[None]:
    """With the weights that a checkpoint has: of an average of weights the average."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ema = next((callback for callback in callbacks if isinstance(callback, EMA)), None)
    return nullcontext() if ema is None else ema.shown(model)


@contextmanager
def _as_at_test(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():  # what is kept for later epochs is an ordinary tensor
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _fewer_samples(model: Any, most: int) -> Iterator[None]:
    samples = getattr(model, "mc_samples", None)
    if samples is None:
        yield
        return
    model.mc_samples = min(samples, most)
    try:
        yield
    finally:
        model.mc_samples = samples


# ----- what is drawn of which model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """What ``draw_grid`` is told."""

    columns: list[Column]
    rows: list[str]
    settings: dict[str, Any]


def _maps(model: DrawsMaps, seed: int) -> _Grid:
    """Structure maps of random codes, and the brains' masks that are made of them."""
    maps = model.draw(MAPS, torch.Generator().manual_seed(seed))
    pictures = torch.stack([maps, 1 - model.mask(maps)])[:, :, 0].float().cpu().numpy()  # (2, n, X, Y)
    columns = [edges(f"code {i + 1}", pictures[:, i]) for i in range(MAPS)]
    return _Grid(columns, ["structure map", "its mask"], {"shown": pictures.reshape(-1, *pictures.shape[2:])})


def _pictures(model: LightningModule, datamodule: CohortDataModule, example: Example, seed: int) -> _Grid:
    batch: Any = {
        name: part.to(model.device) if isinstance(part, Tensor) else part for name, part in example.batch.items()
    }
    label, brain = example.slices(batch["label"]), example.slices(batch["brain"])
    classes = datamodule.classes
    inputs = volumes(batch, datamodule.modalities)
    real = {name: example.slices(volume)[:, 0] for name, volume in inputs.items()}  # (n, X, Y) each
    ends = {name: window(images, brain) for name, images in real.items()}
    columns: list[Column] = []
    if isinstance(model, Generator | FromMaps):
        columns = [labels("label", label, brain, classes)]
        if isinstance(model, Generator):
            maps = LabelMaps(batch["label"], batch["brain"], {name: batch[name] for name in model.guides})
            made = next(iter(model.generate([maps], seed))).image  # (n, C, X, Y)
        else:
            apart: Any = {
                name: {**batch, "image": volume, "lesions": batch["label"][:, None]} for name, volume in inputs.items()
            }
            prepared = model.real(apart)
            made = model.synthesise(prepared.structure, prepared.lesion)
            columns.append(edges("structure map", example.slices(prepared.structure)[:, 0]))
        for name, images in zip(model.modalities, example.slices(made).swapaxes(0, 1), strict=True):
            columns += [greys(f"{_named(name)} real", real[name], ends[name])]
            columns += [greys(f"{_named(name)} made", images, ends[name])]
    elif isinstance(model, Synthesizer):
        (target,) = model.targets
        synthesis = model.synthesize(inputs)
        synthetic = example.slices(synthesis.mean)[:, 0]
        columns = [greys(f"{_named(target)} real", real[target], ends[target], brain)]
        columns += [greys("synthetic", synthetic, ends[target], brain)]
        columns += [difference(synthetic, real[target], ends[target], brain)]
        if synthesis.variance is not None:
            columns += [variances(example.slices(synthesis.variance)[:, 0], brain)]
        found = _segmented(model, inputs)
        columns += [labels("label" if found is None else "reference", label, brain, classes)]
        if found is not None:
            columns += [labels("segmentation", example.slices(found), brain, classes)]
    else:
        segmenter = cast(Segmenter, model)
        columns = [greys(_named(name), real[name], ends[name], brain) for name in segmenter.sources]
        answer = example.slices(segmenter.segment(inputs).labels)
        columns += [labels("reference", label, brain, classes), labels("segmentation", answer, brain, classes)]
    rows = [f"{example.subject}\nslice {number}" for number in example.numbers]
    return _Grid(columns, rows, {"shown": brain, "label": label})


def _segmented(model: object, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Labels of a synthesizer that segments too; None of one that does not, or not yet."""
    try:
        return model.segment(inputs).labels if isinstance(model, Segmenter) else None
    except (ValueError, UserError):
        return None


def _stacked(columns: tuple[Column, ...]) -> Column:
    """Columns of several subjects as one, in the windows of the first."""
    first = columns[0]
    pictures = np.concatenate([column.pictures for column in columns])
    return Column(first.title, pictures, first.low, first.high, first.cmap)


def _named(sequence: str) -> str:
    return SEQUENCES.get(sequence, sequence.upper())
