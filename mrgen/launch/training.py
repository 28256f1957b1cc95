"""From a resolved config to a finished run folder."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from mrgen import __version__
from mrgen.callbacks.determinism import SeedSteps
from mrgen.callbacks.finite import FiniteLoss
from mrgen.callbacks.preemption import Preemption
from mrgen.callbacks.provenance import KEY, Provenance
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.guides import load_guides, save_guides
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store, read_cohort
from mrgen.errors import UserError
from mrgen.files import write_json
from mrgen.launch.build import check_data
from mrgen.launch.checkpoints import load_weights
from mrgen.launch.cluster.slurm import requeue
from mrgen.launch.configs import write_config
from mrgen.launch.csv_logger import CsvLogger
from mrgen.launch.fitting import ESTIMATOR, check, fit
from mrgen.launch.going_on import Restored, SameStart, check_config, is_finished, newest, only_here
from mrgen.launch.instantiate import instantiate, plain
from mrgen.launch.status import Outcome, check_metrics, has_begun, read_status, recorded
from mrgen.launch.tracking import loggers, source_commit
from mrgen.launch.trainer import Checkpoint, build_trainer, channels_last, check_epochs, why_stopped
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
    store = Store(Path(str(conf.data.store)))  # Hydra reads a folder called 7 as a number
    check_data([store.layout.to_conf(), list(store.modalities)], store.path / "cohort.json")  # lest they are resolved
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
    """Trains one preset, or goes on where it was stopped.

    Args:
        conf: composed config of ``conf/train.yaml``; with ``resume`` a run that has begun in the folder goes on, one
            that has finished is left as it is, and where there is none one begins.
        run_dir: the run's folder, which exists.

    Returns:
        The run's folder, with ``config.yaml`` (resolved), ``split.json``, ``metrics.csv``, ``status.json`` and
        ``checkpoints/{best,last}.ckpt``.

    Raises:
        UserError: among others for a folder that holds another run, or is being trained by another process; it is then
            left as it was.
        Preempted: the run was told to end, and has saved.
    """
    check_epochs(conf.trainer.max_epochs)
    first = _is_first()
    with only_here(run_dir, enabled=first):  # before all else: who has waited finds what the other one has left
        if has_begun(run_dir):
            if not conf.resume:
                raise UserError(
                    f"{run_dir} holds a finished or interrupted run; give another folder, or go on with "
                    f"resume={run_dir}"
                )
            fill_from_store(conf)
            check_config(conf, run_dir)
            check_metrics(run_dir, read_status(run_dir))
            if is_finished(conf, run_dir):
                if first:
                    print(f"{run_dir} has finished; a higher trainer.max_epochs would go on with it")
                return run_dir
        with (
            Preemption(run_dir / "checkpoints", requeue) as preemption,
            recorded(run_dir, command="mrgen-train", enabled=first) as outcome,
        ):
            _train(conf, run_dir, preemption, outcome)
    return run_dir


def _is_first() -> bool:
    """Whether this process is the first rank, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _train(conf: DictConfig, run_dir: Path, preemption: Preemption, outcome: Outcome) -> None:
    saved = newest(run_dir)
    chosen = {name: callback for name, callback in (conf.get("callbacks") or {}).items() if callback}
    if unknown := [name for name, callback in chosen.items() if "_target_" not in callback]:
        raise UserError(f"callbacks.{unknown[0]}: this run has no such callback; callbacks=[images,…] chooses them")
    fill_from_store(conf)
    pl.seed_everything(checked_seed(conf.seed), verbose=False)
    # A resumed run keeps its split although the store may have grown: who was tested may not become who is trained on.
    kept: dict[str, Any] = {}
    if saved:
        kept = {"split": {"kind": "file", "file": str(run_dir / "split.json")}}
    axes = {"mrgen.data.crops.BrainBox": 3, "mrgen.data.slices.AxialSlice": 2}.get(conf.data.sampling._target_)
    if saved and axes:  # nor may a new head change the box
        kept["sampling"] = {**plain(conf.data.sampling), "size": saved.content[KEY]["data"]["box"][:axes]}
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
        if (run_dir / ESTIMATOR).is_file():  # epochs are nothing to it
            return
        outcome.begun = True
        _keep_settings(conf, datamodule, run_dir)
        with loggers(conf, run_dir, [CsvLogger(run_dir / "metrics.csv")]) as tracked:
            fit(model, datamodule, run_dir, description=_describe(conf, datamodule), loggers=tracked)
        return
    channels_last(model)
    _check_shapes(model, datamodule)
    if saved:
        try:
            load_weights(model, saved.content["state_dict"])
        except RuntimeError as error:
            raise UserError(
                f"{saved.path} holds another network than the config describes; a resumed run keeps its model"
            ) from error
    description = _describe(conf, datamodule)
    if saved:
        _check_mix(conf, run_dir, saved.content[KEY]["data"].get("mix"), description["data"]["mix"])
    if saved:  # the atlas of the subjects that it was trained on
        datamodule.guides = load_guides(guides, run_dir)
    step = saved.step if saved else -1
    csv = CsvLogger(run_dir / "metrics.csv")
    csv.go_on_from(step)
    checkpoints = run_dir / "checkpoints"
    callbacks: list[Callback] = [
        SameStart(step),
        FiniteLoss(),
        SeedSteps(conf.seed),
        Provenance(description),
        LearningRateMonitor("epoch"),
        *(instantiate(callback) for callback in chosen.values()),
        preemption,  # behind those that change the model
    ]
    monitor = conf.get("monitor", "val/loss")
    if datamodule.split.val and monitor and conf.trainer.get("limit_val_batches") != 0:
        best = Checkpoint(checkpoints, "best", monitor=monitor, mode="min", enable_version_counter=False)
        callbacks.append(best)
    # After the best one, whose score it holds: otherwise a resumed run would not know the last epoch's and might put a
    # worse checkpoint in its place.
    callbacks.append(Checkpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False))
    trainer = build_trainer(_with_stages(conf, getattr(model, "stages", 1)), run_dir, callbacks=callbacks, loggers=[])
    if not datamodule.split.val:
        trainer.limit_val_batches = 0
    elif len(datamodule.split.val) < trainer.world_size:
        raise UserError(
            f"{len(datamodule.split.val)} validation subjects for {trainer.world_size} devices; each needs one: "
            "raise data.split.val or lower trainer.devices"
        )
    if saved:
        saved.check(epochs=trainer.max_epochs, devices=trainer.world_size)
    learned = datamodule.guides
    outcome.begun = True
    if _is_first():  # only now: what was refused above must leave the folder as it was
        _keep_settings(conf, datamodule, run_dir)
        save_guides(learned, run_dir)
    path, saved = saved.path if saved else None, None  # its memory is wanted for the training
    restored = Restored(path) if path else None
    trainer.callbacks.extend([restored] if restored else [])  # type: ignore[attr-defined]
    with loggers(conf, run_dir, [csv]) as tracked, restored.restoring() if restored else nullcontext():
        trainer.loggers = [DummyLogger()] if conf.trainer.get("fast_dev_run") else tracked
        trainer.fit(model, datamodule=datamodule, ckpt_path=path, weights_only=True)
        outcome.stopped = why_stopped(trainer)


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
    write_config(conf, run_dir / "config.yaml")
    datamodule.split.save(run_dir / "split.json")
    write_json(run_dir / "environment.json", _environment())


def _environment() -> dict[str, Any]:
    """Versions and hardware, for whoever repeats the run."""
    import platform
    from importlib.metadata import version

    packages = ("mrgen", "torch", "pytorch-lightning", "torchio", "monai", "numpy", "hydra-core")
    return {
        "commit": source_commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
