"""From a resolved config to a finished run folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from mrgen import __version__
from mrgen.callbacks.determinism import SeedSteps
from mrgen.callbacks.provenance import KEY, Provenance
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.guides import load_guides, save_guides
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store, read_cohort
from mrgen.errors import UserError
from mrgen.launch.csv_logger import CsvLogger
from mrgen.launch.fitting import ESTIMATOR, check, fit
from mrgen.launch.instantiate import instantiate, plain
from mrgen.launch.status import recorded, write_json
from mrgen.launch.tracking import finish_wandb, wandb_logger, wandb_mode
from mrgen.launch.trainer import Checkpoint, build_trainer, channels_last
from mrgen.papers.brain_clustering.estimator import Estimator

__all__ = ["build_datamodule", "checked_seed", "fill_from_store", "train"]

# Keys of the group ``data`` that say what a cohort is; the rest are the datamodule's arguments.
PREPARATION = ("name", "root", "layout", "phantom", "head")
# Normalisations by the scale that they give.
KINDS = {"zscore": "ZScore", "unit": "MinMax", "symmetric": "Symmetric", "gaussian": "Gaussian"}


def fill_from_store(conf: DictConfig) -> None:
    """The prepared store is the truth: its layout replaces the config's; its sequences where none are given."""
    if conf.data.get("name") == "synthetic" and read_cohort(conf.data.store) is None:
        raise UserError(
            f"data.store={conf.data.store}: found no synthetic cohort; make one with mrgen-synthesize checkpoint=RUN "
            "output=STORE of a generator's run, or set data.store"
        )
    store = Store(Path(conf.data.store))
    with open_dict(conf.data):
        conf.data.layout = store.layout.numbered(conf.data.labels).to_conf()
        if conf.data.modalities is None:
            conf.data.modalities = list(store.modalities)


def build_datamodule(data: DictConfig | dict[str, Any], **changes: Any) -> CohortDataModule:
    """The datamodule of a ``data`` config; ``changes`` replace its arguments."""
    settings = {key: value for key, value in plain(data).items() if key not in PREPARATION} | changes
    return instantiate({"_target_": "mrgen.data.datamodule.CohortDataModule", **settings})


def checked_seed(seed: Any) -> int:
    """The seed. Raises UserError for anything but a whole number from 0 to 2³² − 1, which is what NumPy takes."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed!r}; expected a whole number from 0 on")
    return seed


def _describe(conf: DictConfig, datamodule: CohortDataModule) -> dict[str, Any]:
    """What a checkpoint must say to be used without this run's folder: plain containers only."""
    samples = datamodule.ordered_samples(conf.trainer.max_epochs)
    return {
        "version": __version__,
        "model": plain(conf.model),
        "data": {
            "modalities": list(datamodule.modalities),
            "labels": conf.data.labels,
            "classes": list(datamodule.classes),
            "normalisation": plain(conf.data.normalisation),
            "box": list(datamodule.whole.size or ()),  # norms that use a volume's own statistics depend on it
            "intensity_scale": {name: list(datamodule.intensity_scale(name)) for name in datamodule.modalities},
            "mix": datamodule.mix.describe(datamodule.real_slices(), samples) if datamodule.mix else None,
            "synthetic": datamodule.synthetic,  # the whole cohort is
            "slices": datamodule.real_slices() if isinstance(datamodule.sampling, SiteSlices) else None,
        },
    }


def train(conf: DictConfig, run_dir: Path) -> Path:
    """Trains one preset.

    Args:
        conf: composed config of ``conf/train.yaml``.
        run_dir: the run's folder, which exists.

    Returns:
        The run's folder, with ``config.yaml`` (resolved), ``split.json``, ``metrics.csv``, ``status.json`` and
        ``checkpoints/{best,last}.ckpt``.
    """
    with recorded(run_dir, command="mrgen-train", enabled=getattr(rank_zero_only, "rank", 0) == 0):
        return _train(conf, run_dir)


def _train(conf: DictConfig, run_dir: Path) -> Path:
    last = run_dir / "checkpoints" / "last.ckpt"
    saved: dict[str, Any] = {}
    if conf.resume and last.is_file():
        try:
            saved = torch.load(last, weights_only=True, map_location="cpu")
            # Not global_step, which counts every optimizer of a GAN; rows of the CSV count batches.
            resumed_step = int(saved["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"])
        except Exception as error:  # corrupt, truncated, or holding more than plain containers
            raise UserError(f"{last}: cannot be read as a checkpoint of mrgen ({type(error).__name__})") from error
    elif last.is_file() or ((run_dir / ESTIMATOR).is_file() and not conf.resume):
        raise UserError(
            f"{run_dir} holds a finished or interrupted run; give another folder, or go on with resume={run_dir}"
        )
    else:
        resumed_step = -1

    fill_from_store(conf)
    pl.seed_everything(checked_seed(conf.seed), verbose=False)
    # A resumed run keeps its split although the store may have grown: who was tested may not become who is trained on.
    kept: dict[str, Any] = {}
    if conf.resume and (run_dir / "split.json").is_file():
        kept = {"split": {"kind": "file", "file": str(run_dir / "split.json")}}
    axes = {"mrgen.data.crops.BrainBox": 3, "mrgen.data.slices.AxialSlice": 2}.get(conf.data.sampling._target_)
    if saved and axes:  # nor may a new head change the box
        kept["sampling"] = {**plain(conf.data.sampling), "size": saved[KEY]["data"]["box"][:axes]}
    model = instantiate(conf.model)
    guides = getattr(model, "guides", ())
    unpaired = getattr(model, "unpaired", False)
    datamodule = build_datamodule(conf.data, guides=list(guides), unpaired=unpaired, **kept)
    if getattr(model, "scale", datamodule.normalisation.scale) != datamodule.normalisation.scale:
        raise UserError(
            f"{type(model).__name__} works on the scale {model.scale!r} and data.normalisation gives "
            f"{datamodule.normalisation.scale!r}; set data.normalisation._target_=mrgen.data.normalisation."
            f"{KINDS.get(model.scale, model.scale)}"
        )
    if isinstance(model, Estimator):
        check(model, datamodule)
        if (run_dir / ESTIMATOR).is_file():  # resumed, and finished before
            return run_dir
        _keep_settings(conf, datamodule, run_dir)
        with _loggers(conf, run_dir, CsvLogger(run_dir / "metrics.csv")) as loggers:
            fit(model, datamodule, run_dir, description=_describe(conf, datamodule), loggers=loggers)
        return run_dir
    channels_last(model)
    _check_shapes(model, datamodule)
    if saved:
        try:
            model.load_state_dict(saved["state_dict"])
        except RuntimeError as error:
            raise UserError(
                f"{last} holds another network than the config describes; a resumed run keeps its model"
            ) from error
    description = _describe(conf, datamodule)
    if saved:
        _check_mix(conf, run_dir, saved[KEY]["data"].get("mix"), description["data"]["mix"])
    if saved:  # the atlas of the subjects that it was trained on
        datamodule.guides = load_guides(guides, run_dir)
    learned = datamodule.guides
    _keep_settings(conf, datamodule, run_dir)  # only now: what was refused above must leave the folder as it was
    save_guides(learned, run_dir)
    csv = CsvLogger(run_dir / "metrics.csv")
    if resumed_step >= 0:
        csv.go_on_from(resumed_step)
    checkpoints = run_dir / "checkpoints"
    callbacks: list[Callback] = [
        SeedSteps(conf.seed),
        Provenance(description),
        LearningRateMonitor("epoch"),
        *(instantiate(callback) for callback in (conf.get("callbacks") or {}).values() if callback),
    ]
    monitor = conf.get("monitor", "val/loss")
    if datamodule.split.val and monitor:
        best = Checkpoint(checkpoints, "best", monitor=monitor, mode="min", enable_version_counter=False)
        callbacks.append(best)
    # After the best one, whose score it holds: otherwise a resumed run would not know the last epoch's and might put a
    # worse checkpoint in its place.
    callbacks.append(Checkpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False))
    with _loggers(conf, run_dir, csv) as loggers:
        trainer_conf = _with_stages(conf, getattr(model, "stages", 1))
        trainer = build_trainer(trainer_conf, run_dir, callbacks=callbacks, loggers=loggers)
        if not datamodule.split.val:
            trainer.limit_val_batches = 0
        elif len(datamodule.split.val) < trainer.world_size:
            raise UserError(
                f"{len(datamodule.split.val)} validation subjects for {trainer.world_size} devices; each needs one: "
                "raise data.split.val or lower trainer.devices"
            )
        trainer.fit(model, datamodule=datamodule, ckpt_path=last if resumed_step >= 0 else None, weights_only=True)
    return run_dir


def _check_mix(conf: DictConfig, run_dir: Path, old: dict[str, Any] | None, new: dict[str, Any] | None) -> None:
    """Raises UserError where a resumed run would draw other slices, as far as its checkpoint tells."""
    # Checkpoints from before a key was there know nothing of it.
    changed = [key for key in old if (new or {}).get(key) != old[key]] if old else ["mix"] if new else []
    if old and changed == ["samples"]:
        raise UserError(
            f"{run_dir}: data.mix.order={conf.data.mix.order} divided a training of {old['samples']} samples, and now "
            f"it has {(new or {})['samples']}; resume with the trainer.max_epochs, data.batch_size and "
            "data.steps_per_epoch that it began with, or train anew"
        )
    if changed:
        raise UserError(
            f"{run_dir}: data.mix is another, or its store={conf.data.mix.store} is "
            "not the cohort any more that this run was trained on; restore it, or train anew"
        )


def _check_shapes(model: Any, datamodule: CohortDataModule) -> None:
    """Raises UserError for crops or slices that the network cannot take."""
    least = getattr(model, "smallest", 0)
    if isinstance(datamodule.sampling, SiteSlices):
        size = datamodule.sampling.size
        if any(n % model.divisor or n < least for n in size):
            raise UserError(
                f"data.sampling.size is {list(size)}; the network needs multiples of {model.divisor}"
                + (f" from {least} on" if least else "")
                + "; change it, or lower the network's number of downsamplings (model.downs and model.unet_downs of a "
                "generator, model.net.downs of a U-Net)"
            )
        return
    shapes = [datamodule.sampling.size, datamodule.whole.size]
    if any(n % model.divisor for shape in shapes for n in shape or ()):
        raise UserError(
            f"crops are {shapes[0]} and {shapes[1]} voxels and the network needs multiples of {model.divisor}; "
            f"set data.sampling.divisor={model.divisor}"
        )


def _with_stages(conf: DictConfig, stages: int) -> DictConfig:
    """The trainer's config of a model that trains in several stages, each of ``trainer.max_epochs`` epochs."""
    epochs = conf.trainer.max_epochs
    if stages == 1:
        return conf.trainer
    if not epochs or epochs < 1:
        raise UserError(
            f"trainer.max_epochs is {epochs}; {conf.name} trains in {stages} stages of so many epochs, and needs a "
            "number from 1 on"
        )
    return OmegaConf.create({**conf.trainer, "max_epochs": stages * epochs})


def _keep_settings(conf: DictConfig, datamodule: CohortDataModule, run_dir: Path) -> None:
    OmegaConf.save(OmegaConf.create(plain(conf)), run_dir / "config.yaml")
    datamodule.split.save(run_dir / "split.json")
    write_json(run_dir / "environment.json", _environment())


@contextmanager
def _loggers(conf: DictConfig, run_dir: Path, csv: CsvLogger) -> Iterator[list[Logger]]:
    """The CSV and, unless it is switched off, a run of W&B that ends with the block, as failed where that fails."""
    if not conf.tracking.wandb or wandb_mode() == "disabled":
        yield [csv]
        return
    settings = {"project": conf.tracking.project, "name": conf.name, "group": conf.tracking.group}
    failed = True
    try:
        yield [csv, wandb_logger(run_dir, config=plain(conf), **settings)]
        failed = False
    finally:
        finish_wandb(run_dir, failed=failed)


def _environment() -> dict[str, Any]:
    """Versions and hardware, for whoever repeats the run."""
    import platform
    from importlib.metadata import version

    packages = ("mrgen", "torch", "pytorch-lightning", "torchio", "monai", "numpy", "hydra-core")
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
