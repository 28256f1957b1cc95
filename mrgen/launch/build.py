"""Objects from what a file says: it is data, whoever wrote it, and never a program.

A checkpoint, an estimator's description and the config of a run's folder name classes by ``_target_``. Hydra would
import and call whatever stands there, and resolve ``${…}`` inside of it. Here nothing is resolved, and only those
classes are built that are meant to be: their constructors take numbers and names and touch no file. docs/security.md
has the whole picture.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mrgen.errors import UserError
from mrgen.launch.instantiate import check_arguments
from mrgen.launch.memory import out_of_memory

__all__ = [
    "CALLBACKS",
    "MODELS",
    "NORMALISATIONS",
    "SAMPLINGS",
    "TRANSFORMS",
    "build",
    "check_data",
    "trust",
]

# Modules whose classes a file may name, by what they are.
MODELS = ("mrgen.papers", "mrgen.segmenter", "mrgen.nets")
NORMALISATIONS = ("mrgen.data.normalisation",)
SAMPLINGS = ("mrgen.data.crops", "mrgen.data.slices")
TRANSFORMS = ("mrgen.data.intensity", "torchio")
# The others of this package are handed folders and functions by training.
CALLBACKS = tuple(f"mrgen.callbacks.{name}" for name in ("early_stopping", "ema", "images", "median_stop"))
LISTED = (*MODELS, *NORMALISATIONS, *SAMPLINGS, *TRANSFORMS, *CALLBACKS)
# Of TorchIO's transforms those that read no file (as HistogramStandardization, Resample and ToReferenceSpace may) and
# call no function that they are given (as Lambda and MonaiAdapter do).
TORCHIO = frozenset(
    {
        *("Clamp", "Compose", "Contour", "Crop", "CropOrPad", "EnsureShapeMultiple", "KeepLargestComponent", "Mask"),
        *("OneHot", "OneOf", "Pad", "RandomAffine", "RandomAffineElasticDeformation", "RandomAnisotropy"),
        *("RandomBiasField", "RandomBlur", "RandomElasticDeformation", "RandomFlip", "RandomGamma", "RandomGhosting"),
        *("RandomLabelsToImage", "RandomMotion", "RandomNoise", "RandomSpike", "RandomSwap", "RemapLabels"),
        *("RemoveLabels", "RescaleIntensity", "Resize", "SequentialLabels", "ToCanonical", "ToOrientation"),
        *("Transpose", "ZNormalization"),
    }
)
# Resolvers that compute from the config alone, or name one of mrgen's own folders.
RESOLVER = re.compile(
    r"\$\{((float|now|row|synthetic_store|token):|hydra:(job\.\w+|runtime\.output_dir)\}"
    r"|oc\.env:MRGEN_(RUNS|STORES|COHORTS)\b)"
)
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

_trusted: list[str] = []


def trust(modules: Any) -> None:
    """Lets files name what lies in modules of the user's own, for the rest of this process.

    Args:
        modules: the setting ``trust`` of the command line, a dotted name or several; it replaces an earlier one.

    Raises:
        UserError: none of these.
    """
    names = [modules] if isinstance(modules, str) else list(modules or [])
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise UserError(f"trust={modules}: expected modules of your own, such as trust=[my_lab.networks]")
    _trusted[:] = names


def build(conf: Mapping[str, Any], places: Sequence[str], *, where: str | Path, **extra: Any) -> Any:
    """An object that a file describes.

    Args:
        conf: plain containers with a ``_target_``; arguments may hold further ones, with ``_partial_`` or without.
        places: the modules in which the outermost class must lie, ``MODELS``, say.
        where: the file, for messages.
        **extra: further arguments.

    Raises:
        UserError: a class that files may not name, ``${…}``, or arguments that the constructor refuses.
    """
    conf = OmegaConf.to_container(conf, resolve=False) if OmegaConf.is_config(conf) else conf  # type: ignore[assignment]
    check_data(conf, where)
    if not isinstance(conf, Mapping) or not _below(str(conf.get("_target_")).rpartition(".")[0], (*places, *_trusted)):
        found = repr(conf.get("_target_")) if isinstance(conf, Mapping) else type(conf).__name__
        raise UserError(f"{where}: found {found:.100}, expected a class of {' or '.join(places)}; restore the file")
    if conf.get("_partial_"):
        raise UserError(f"{where}: found _partial_ beside {conf['_target_']}, which builds nothing; restore the file")
    return _built({**conf, **extra}, where)


def _built(node: Any, where: str | Path) -> Any:
    if isinstance(node, list | tuple):
        return [_built(value, where) for value in node]
    if not isinstance(node, Mapping):
        return node
    if "_target_" not in node:
        return {key: _built(value, where) for key, value in node.items()}
    target, is_partial = node["_target_"], node.get("_partial_", False)
    given = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    called = _class(target, where)
    check_arguments(target, called, given)
    arguments = {key: _built(value, where) for key, value in given.items()}
    if is_partial:
        return partial(called, **arguments)
    try:
        return called(**arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a constructor says of numbers that it was not made for
        said = out_of_memory(error) or str(error).strip() or type(error).__name__
        raise UserError(f"{where}: {target}: {said.splitlines()[0]}") from error


def check_data(node: Any, where: str | Path, *, interpolations: bool = False) -> None:
    """Raises UserError where a file says more than data: a class that files may not name, or ``${…}``.

    Args:
        node: plain containers, as they were read.
        where: the file, for messages.
        interpolations: whether references to other keys, and resolvers of mrgen's own, are expected. ``_target_`` never
            is one.
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not isinstance(key, str | int):
                raise UserError(f"{where}: found the key {key!r}, expected text; restore the file")
            check_data(key, where)
            if key == "_target_":
                _class(value, where)
            elif key == "_partial_":
                if not isinstance(value, bool):
                    raise UserError(f"{where}: _partial_ is {value!r}; expected true or false")
            elif isinstance(key, str) and key.startswith("_") and "_target_" in node:
                raise UserError(f"{where}: found {key} beside a _target_, which a file may not say; restore the file")
            else:
                check_data(value, where, interpolations=interpolations)
    elif isinstance(node, list | tuple):
        for value in node:
            check_data(value, where, interpolations=interpolations)
    elif isinstance(node, str):
        # The colon behind any other resolver, whose name may be computed as well, is what is left of one.
        left = RESOLVER.sub("${", node).partition("${")
        if left[1] and not (interpolations and ":" not in left[2]):
            raise UserError(
                f"{where}: found {node[:80]!r}, expected values; what a file says is not computed: write the value "
                "itself"
            )


def _below(name: str, places: Sequence[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _class(target: Any, where: str | Path) -> Any:
    """What a ``_target_`` names; its module is imported only where it is one of the listed, or trusted."""
    module, _, name = str(target).rpartition(".")
    if isinstance(target, str) and NAME.fullmatch(target):
        if _below(module, _trusted) or target in _trusted:
            return _imported(module, name, where)
        if module in ("torchio", "torchio.transforms"):
            if name in TORCHIO:
                return _imported(module, name, where)
        elif _below(module, [place for place in LISTED if place != "torchio"]):
            found = _imported(module, name, where)
            if inspect.isclass(found) and _is_listed(found):
                return found
    raise UserError(
        f"{where}: asks for {target!r:.100}, which is none of the classes that a file may name (methods, networks, "
        "normalisations, crops, callbacks and transforms of mrgen, transforms of TorchIO). If it is your own, or "
        f"somebody's whose code you would run, add "
        f"trust=[{repr(module or str(target))[1:-1]:.100}]: it is imported and called then"
    )


def _imported(module: str, name: str, where: str | Path) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{where}: asks for {module}.{name}, which is not there ({error}); the file is of another version of "
            "mrgen, or damaged"
        ) from None


def _is_listed(found: type) -> bool:
    """Whether a class is defined in one of the listed modules, and of its kind: their helpers are no methods."""
    from torch import nn

    from mrgen.papers.brain_clustering.estimator import Estimator

    if _below(found.__module__, MODELS):
        return issubclass(found, nn.Module | Estimator)
    return _below(found.__module__, [place for place in LISTED if place != "torchio"])
