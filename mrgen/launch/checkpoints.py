"""How checkpoints are written, and how they are read: whoever opens one does it here."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from sys import float_info
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn

from mrgen.callbacks.finite import are_finite
from mrgen.callbacks.provenance import KEY
from mrgen.errors import UserError
from mrgen.files import open_to_read, replacing

__all__ = ["WholeCheckpoints", "check_description", "load_weights", "read_checkpoint"]

BLOCK = 2**22  # bytes
LARGEST = 4096  # voxels of a box along an axis
# Kinds of what a checkpoint says of its data; older ones lack some.
KINDS: dict[str, type | tuple[type, ...]] = {
    "modalities": list,
    "normalisation": Mapping,
    "labels": str,
    "classes": list,
    "box": list,
    "intensity_scale": Mapping,
    "mix": (Mapping, type(None)),
}
NEEDED = ("modalities", "normalisation")


class WholeCheckpoints(TorchCheckpointIO):
    """Every checkpoint is whole at every moment.

    Lightning's own are written to the system's folder of temporary files and moved from there, which is a copy, and can
    be cut short, where the run's folder is on another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises UserError where the disk is full; the checkpoint that was there before stays."""
        if storage_options is not None:
            raise TypeError("checkpoints are files; found storage_options")
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a file. Lightning's would remove a folder with all that is in it, and a checkpoint can name one."""
        path = Path(path)
        if path.is_file() or path.is_symlink():
            path.unlink()

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Plain containers whose sums are right, whatever Lightning asks for; errors as of ``read_checkpoint``."""
        return _read(Path(path), "put back a copy that is whole")


def read_checkpoint(path: Path, *, remedy: str) -> dict[str, Any]:
    """The content of a checkpoint of mrgen, every byte of it as it was written.

    torch writes checksums and does not look at them. Memory is taken for no more than the file has: what torch writes
    is not compressed.

    Args:
        path: of the file.
        remedy: what to do where it is none, or damaged.

    Returns:
        Plain containers and tensors on the CPU; with a description (``check_description``) under ``KEY`` and finite
        weights in ``state_dict``.

    Raises:
        UserError: it is missing, damaged or of something else.
    """
    content = _read(path, remedy)
    if not isinstance(content, dict) or not {KEY, "state_dict"} <= content.keys():
        raise UserError(
            f"{path}: cannot be read as a checkpoint of mrgen (found no {KEY} and state_dict in it); {remedy}"
        )
    check_description(content[KEY], path, remedy=remedy)
    for name in ("state_dict", "current_model_state"):  # the second: what training goes on from beside an average
        if name in content:
            _check_weights(content[name], path, name, remedy)
    return content


def _read(path: Path, remedy: str) -> Any:
    try:
        with open_to_read(path) as file:
            _check_sums(file)
        # By its name: from an open file torch reads at half the speed. What a training put there meanwhile is whole.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # corrupt, truncated, foreign, or holding more than plain containers
        found = getattr(error, "strerror", None) or (str(error) if isinstance(error, BadZipFile) else "")
        said = type(error).__name__ + (f": {found}" if found else "")
        raise UserError(f"{path}: cannot be read as a checkpoint of mrgen ({said}); {remedy}") from error
    return content


def _check_sums(file: BinaryIO) -> None:
    """Raises BadZipFile for an archive that torch did not write, or of which a byte is another."""
    size = os.fstat(file.fileno()).st_size
    with ZipFile(file) as archive:
        members = archive.infolist()
        if len({_kept(member) for member in members}) > 1 or any(member.external_attr for member in members):
            raise BadZipFile("parts of different kinds")  # of a folder torch reads no content, and says nothing
        if len({member.filename for member in members}) < len(members):
            raise BadZipFile("two parts of one name")
        for member in members:
            if member.compress_type != ZIP_STORED or member.file_size != member.compress_size:
                raise BadZipFile(f"{member.filename} is compressed, which no checkpoint of torch is")
        if sum(member.file_size for member in members) > size:
            raise BadZipFile("parts that lie in one another")
        for member in members:
            with archive.open(member) as part:  # raises BadZipFile at its end where the sum is another
                while part.read(BLOCK):
                    pass


def _kept(member: ZipInfo) -> tuple[Any, ...]:
    """What the archive's directory says of a part that is the same for all that torch writes."""
    versions = member.create_system, member.create_version, member.extract_version, member.volume, member.reserved
    return *versions, member.flag_bits, member.date_time, member.internal_attr, member.comment


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError for weights that do not fit, also where torch would cast them: complex or whole numbers."""
    for key, own in model.state_dict().items():
        if key in weights and _kind(weights[key]) != _kind(own):
            raise RuntimeError(f"{key} is of {weights[key].dtype}, and the model's of {own.dtype}")
    model.load_state_dict(weights)


def _kind(weight: Tensor) -> tuple[bool, ...]:
    return weight.is_complex(), weight.is_floating_point(), weight.dtype == torch.bool


def check_description(description: Any, path: Path, *, remedy: str) -> None:
    """Raises UserError for what does not say what model and data are.

    Args:
        description: of a checkpoint or an estimator's artefact.
        path: where it stands.
        remedy: what to do.
    """
    model, data = (description.get(key) if isinstance(description, Mapping) else None for key in ("model", "data"))
    wrong = None
    if not isinstance(model, Mapping) or not isinstance(model.get("_target_"), str):
        wrong = "model is no mapping with a _target_"
    elif not isinstance(data, Mapping):
        wrong = "data is no mapping"
    elif lacking := [key for key in NEEDED if key not in data]:
        wrong = f"data has no {', '.join(lacking)}"
    elif others := [key for key, kind in KINDS.items() if key in data and not isinstance(data[key], kind)]:
        wrong = f"data.{others[0]} is {data[others[0]]!r:.60}"
    elif any("/" in str(name) for name in data["modalities"]):  # files are called after them
        wrong = f"data.modalities is {data['modalities']!r:.60}"
    elif other := next((key for key in ("modalities", "classes") if not _are(str, data.get(key, []))), None):
        wrong = f"data.{other} is {data[other]!r:.60}"
    elif not _is_box(data.get("box", [])):
        wrong = f"data.box is {data['box']!r:.60}"
    elif not all(_is_scale(pair) for pair in data.get("intensity_scale", {}).values()):
        wrong = f"data.intensity_scale is {data['intensity_scale']!r:.60}"
    if wrong:
        raise UserError(f"{path}: found a description in which {wrong}, expected what mrgen-train wrote; {remedy}")


def _are(kind: Any, values: Sequence[Any]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _is_box(box: Sequence[Any]) -> bool:
    """Whether it is the voxels of a box, or of none."""
    return not box or (len(box) == 3 and all(type(n) is int and 1 <= n <= LARGEST for n in box))


def _is_scale(pair: Any) -> bool:
    """Whether it is the offset and the factor of intensities: finite, and the factor above 0."""
    numbers = isinstance(pair, list) and len(pair) == 2 and all(type(value) in (int, float) for value in pair)
    return numbers and all(abs(value) <= float_info.max for value in pair) and pair[1] > 0


def _check_weights(weights: Any, path: Path, name: str, remedy: str) -> None:
    if not isinstance(weights, Mapping) or not all(
        isinstance(key, str) and isinstance(weight, Tensor) for key, weight in weights.items()
    ):
        raise UserError(f"{path}: found a {name} that is no mapping of names to weights; {remedy}")
    for key, weight in weights.items():
        if (
            weight.layout != torch.strided
            or weight.is_meta
            or weight.numel() * weight.element_size() > (weight.untyped_storage().nbytes())
        ):
            raise UserError(f"{path}: found {key} of {tuple(weight.shape)} with fewer numbers than that; {remedy}")
        if not are_finite([weight]):
            raise UserError(
                f"{path}: {key} holds values that are not finite, as of a training that diverged; train anew with a "
                "lower model.lr, or take an earlier checkpoint"
            )
