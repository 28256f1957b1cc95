"""Things that a file may say and that must never be done: each would leave a file called canary, or take one away."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "SECRET",
    "TARGETS",
    "WRAPPED",
    "Runs",
    "pickled",
    "pickled_archive",
    "pickled_array",
    "pickled_checkpoint",
    "plant_helpers",
]

SECRET = "fault-secret-value"  # of an environment variable that no file may be given
CANARY = "canary"


class Runs:
    """What a pickle calls when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {CANARY}",)


def pickled() -> bytes:
    return pickle.dumps(Runs())


def pickled_array() -> bytes:
    """An npy file of one object."""
    import numpy as np

    out = io.BytesIO()
    np.save(out, np.array([Runs()], dtype=object), allow_pickle=True)
    return out.getvalue()


def pickled_checkpoint() -> bytes:
    out = io.BytesIO()
    torch.save({"state_dict": Runs(), "mrgen": Runs()}, out)
    return out.getvalue()


def pickled_archive() -> bytes:
    """An npz file of one object."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("rows", "key", "atlas", "mean", "arr_0"):
            archive.writestr(f"{name}.npy", pickled_array())
    return out.getvalue()


def plant_helpers(here: Path) -> None:
    """What payloads refer to, in the folder that a command runs in and in that of a run."""
    for folder in (here, *(path for path in (here / "runs").glob("*"))):
        (folder / "payload.bin").write_bytes(pickled())
        (folder / "payload.npy").write_bytes(pickled_array())
        (folder / "payload.pt").write_bytes(pickled_checkpoint())
        (folder / "canary_module.py").write_text(f"open({CANARY!r}, 'w').close()\n")
    (here / "victim.txt").write_text("must survive\n")
    (here / "victims").mkdir()
    (here / "victims" / "file.txt").write_text("must survive\n")


PATH: dict[str, Any] = {"_target_": "pathlib.Path", "_args_": [CANARY]}
# What would be called, by name.
TARGETS: dict[str, dict[str, Any]] = {
    "torch.load": {"_target_": "torch.load", "f": "payload.pt", "weights_only": False},
    "numpy.load": {"_target_": "numpy.load", "file": "payload.npy", "allow_pickle": True},
    "joblib.load": {"_target_": "joblib.load", "filename": "payload.bin"},
    "pickle.loads": {
        "_target_": "pickle.load",
        "file": {"_target_": "builtins.open", "file": "payload.bin", "mode": "rb"},
    },
    "Path.write_text": {"_target_": "pathlib.Path.write_text", "self": PATH, "data": "x", "_args_": [PATH, "x"]},
    "Path.touch": {"_target_": "pathlib.Path.touch", "_args_": [PATH]},
    "open": {"_target_": "builtins.open", "file": CANARY, "mode": "w"},
    "copyfile": {"_target_": "shutil.copyfile", "src": "victim.txt", "dst": CANARY},
    "rmtree": {"_target_": "shutil.rmtree", "path": "victims"},
    "symlink": {"_target_": "os.symlink", "_args_": ["victim.txt", CANARY]},
    "remove": {"_target_": "os.remove", "path": "victim.txt"},
    "os.system": {"_target_": "os.system", "command": f"touch {CANARY}"},
    "subprocess.run": {"_target_": "subprocess.run", "args": ["touch", CANARY]},
    "Popen": {"_target_": "subprocess.Popen", "args": ["touch", CANARY]},
    "eval": {"_target_": "builtins.eval", "_args_": [f"open('{CANARY}', 'w')"]},
    "exec": {"_target_": "builtins.exec", "_args_": [f"open('{CANARY}', 'w')"]},
    "import_module": {"_target_": "importlib.import_module", "name": "canary_module"},
    "a module beside": {"_target_": "canary_module.Nothing"},
    "remove_subject": {"_target_": "mrgen.data.store.remove_subject", "store": ".", "id": "victims"},
    "write_json": {"_target_": "mrgen.files.write_json", "path": PATH, "content": {}},
    "through a module of ours": {"_target_": "mrgen.launch.app.os.system", "command": f"touch {CANARY}"},
    "through a class of ours": {"_target_": "mrgen.launch.app.shutil.rmtree", "path": "victims"},
    "get_method": {"_target_": "hydra.utils.get_method", "path": "os.system"},
    "call": {"_target_": "hydra.utils.call", "config": {"_target_": "os.system", "command": f"touch {CANARY}"}},
    "CsvLogger": {"_target_": "mrgen.launch.csv_logger.CsvLogger", "path": CANARY},
    "HistogramStandardization": {"_target_": "torchio.HistogramStandardization", "landmarks": {"t1": "payload.npy"}},
    "torchio.Lambda": {
        "_target_": "torchio.Lambda",
        "function": {"_target_": "os.system", "command": f"touch {CANARY}"},
    },
    "torchio.ScalarImage": {"_target_": "torchio.ScalarImage", "path": "payload.npy"},
    "datamodule": {"_target_": "mrgen.data.datamodule.CohortDataModule", "store": "victims"},
    "Trainer": {"_target_": "pytorch_lightning.Trainer", "default_root_dir": CANARY},
    "TensorBoardLogger": {"_target_": "pytorch_lightning.loggers.TensorBoardLogger", "save_dir": CANARY},
    "ModelCheckpoint": {"_target_": "pytorch_lightning.callbacks.ModelCheckpoint", "dirpath": CANARY},
    "partial": {"_target_": "os.system", "_partial_": True, "command": f"touch {CANARY}"},
}


def _flow(node: Any) -> str:
    """A mapping in the grammar of OmegaConf's interpolations."""
    if isinstance(node, dict):
        return "{" + ",".join(f"{key}:{_flow(value)}" for key, value in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(_flow, node)) + "]"
    if isinstance(node, str):
        return "'" + node.replace("'", "\\'") + "'"
    return str(node).lower()


# How a payload stands in a file, by name.
WRAPPED = {
    "plain": lambda node: node,
    "interpolated": lambda node: f"${{oc.create:{_flow(node)}}}",
    "decoded": lambda node: '${oc.create:${oc.decode:"' + _flow(node).replace('"', '\\"') + '"}}',
    "in a list": lambda node: [node],
    "as an argument of ours": lambda node: {"_target_": "mrgen.data.normalisation.ZScore", "_args_": [node]},
    "environment": lambda node: "${oc.env:FAULT_SECRET}",
}
