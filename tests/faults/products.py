"""What a user would look at of what a command made, as digests: two products are equal where the results are."""

import gzip
import hashlib
import io
import json
import stat
from pathlib import Path

import numpy as np
import torch

from tests.faults.outcome import Product
from tests.faults.process import Ended

__all__ = ["content", "images", "of_store", "store", "tables", "view", "weights"]


def _digest(*parts: bytes) -> str:
    return hashlib.sha1(b"\0".join(parts)).hexdigest()


def content(path: Path) -> bytes:
    """Of a file of ours; raises OSError for what is none, or has more bytes than any of ours."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > 1 << 28:
        raise OSError(f"{path} is no file of ours")
    return path.read_bytes()


def store(folder: Path) -> Product:
    """By subject: its arrays, and of its table what does not change with every preparation."""
    found = {}
    for place in sorted(folder.glob("*/subject.json")):
        try:
            table = json.loads(content(place))
            for key in ("revision", "source", "checksums", "checksum"):
                table.pop(key, None)
            files = sorted(place.parent.glob("*.npy"))
            arrays = [np.load(io.BytesIO(content(path)), allow_pickle=False).tobytes() for path in files]
            names = [path.name.encode() for path in files]
            found[place.parent.name] = _digest(json.dumps(table, sort_keys=True).encode(), *names, *arrays)
        except Exception as error:
            found[place.parent.name] = f"damaged: {type(error).__name__}"
    return found


def of_store(name: str):
    """The product ``store`` of a folder of that name."""
    return lambda here, ended: store(here / name)


def weights(run: str):
    """The last weights of a run, its metrics and its split; of an estimator its artefact."""

    def product(here: Path, ended: Ended) -> Product:
        folder, found = here / run, {}
        if (folder / "checkpoints" / "last.ckpt").is_file():
            try:
                saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
                tensors = sorted(saved["state_dict"].items())
                found["weights"] = _digest(*(part for k, v in tensors for part in (k.encode(), v.numpy().tobytes())))
                found["epochs"] = str(saved["epoch"])
            except Exception as error:
                found["weights"] = f"damaged: {type(error).__name__}"
        for name in ("metrics.csv", "split.json"):
            if (folder / name).is_file():
                try:
                    found[name] = _digest(content(folder / name))
                except OSError as error:
                    found[name] = f"damaged: {type(error).__name__}"
        return found

    return product


def images(output: str):
    """Every NIfTI file below a folder, unpacked; of a store its subjects."""

    def product(here: Path, ended: Ended) -> Product:
        files = sorted((here / output).rglob("*.nii.gz"))
        found = {}
        for path in files:
            try:
                found[path.name] = _digest(gzip.decompress(path.read_bytes()))
            except (OSError, EOFError) as error:
                found[path.name] = f"damaged: {type(error).__name__}"
        return found or store(here / output)

    return product


def tables(folder: str, *names: str):
    """CSV tables of a judgement."""

    def product(here: Path, ended: Ended) -> Product:
        places = [here / folder / name for name in names]
        return {path.name: _digest(path.read_bytes()) for path in places if path.is_file()}

    return product


def view(here: Path, ended: Ended) -> Product:
    """By job: its row of the table of a sweep."""
    rows = [[cell.strip() for cell in line.split("│")] for line in ended.out.splitlines() if line.startswith("│")]
    return {row[6]: " ".join(row) for row in rows if len(row) > 7}
