"""Every kind of file that is read, how it is damaged, and the command that then reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import excuses, products
from tests.faults.headers import metaimage_line, nifti_field, npy_header, nrrd_line
from tests.faults.mutations import BYTES, PLACES, archive_mutators, inside_gzip
from tests.faults.outcome import Product
from tests.faults.process import Ended
from tests.faults.texts import CSV, JSON, YAML
from tests.faults.world import BARE, FORMATS, INFER, RSNET, SNET, STORE, train_arguments

__all__ = ["KINDS", "Door", "Kind"]


@dataclass(frozen=True)
class Door:
    """A command.

    Attributes:
        script, arguments: of it.
        parts: folders and files of the world that it is given.
        writes: globs of what it may write where it succeeds.
        product: what it made, see ``products``.
        apart: whether each part of the product has its own input, so that damage to one must not touch the others.
    """

    script: str
    arguments: tuple[str, ...]
    parts: tuple[str, ...]
    writes: tuple[str, ...]
    product: Callable[[Path, Ended], Product]
    apart: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: in the table.
        files: globs below the world; each case damages one of what they match.
        mutators: to the content.
        door: the command.
        excuse: whether a damage cannot be told from data, see ``excuses``.
        names: by which a message may call the file, beside its path's own.
    """

    name: str
    files: tuple[str, ...]
    mutators: tuple[Any, ...]
    door: Door
    excuse: Callable[..., bool] = excuses.never
    names: tuple[str, ...] = ()

    @property
    def candidates(self) -> tuple[Any, ...]:
        return (*self.mutators, *PLACES)


JUDGE = (*BARE, "hydra.run.dir=judged")


def _scans(name: str) -> Door:
    place = f"scans/{name.replace(' ', '_')}"
    arguments = ("data=own", f"data.layout={place}/layout.yaml", f"data.root={place}/raw", f"data.store={place}/store")
    return Door(
        "prepare", (*arguments, "workers=0"), (place,), (f"{place}/store/*",), products.of_store(f"{place}/store"), True
    )


def _prepared(*more: str) -> Door:
    return Door(
        *("prepare", ("data=phantom", *STORE, "workers=0", *more), ("cohort", "store")),
        *(("store/*",), products.of_store("store"), True),
    )


TRAIN = Door("train", tuple(train_arguments(RSNET, "new")), ("store",), ("new/*",), products.weights("new"))
RESUME = Door(
    *("train", ("resume=runs/rsnet", "trainer.max_epochs=3"), ("store", "runs/rsnet"), ("runs/rsnet/*",)),
    products.weights("runs/rsnet"),
)
VIEW = Door(
    *("evaluate", ("sweep=sweep", "hydra.run.dir=.", "hydra.output_subdir=null"), ("sweep",), ()),
    *(products.view, True),
)
RESUME_SWEEP = Door(
    *("train", ("resume=sweep", "trainer.max_epochs=2"), ("store", "sweep"), ("sweep/*",)),
    products.weights("sweep/0_rsnet-t2"),
)
SWAP = Door(
    *("evaluate", ("experiment=rsnet/swap", "segmenter=runs/snet", "runs=[runs/rsnet]", *JUDGE)),
    *(("store", "runs/rsnet", "runs/snet"), ("judged/*",), products.tables("judged", "table.csv", "subjects.csv")),
)
SCORE = Door(
    *("evaluate", ("experiment=samr/samples", "answers=answers.csv", "key=samples/key/key.csv", *JUDGE)),
    *(("answers.csv", "samples"), ("judged/*",), products.tables("judged", "table.csv")),
)
GENERATE = Door(
    *("synthesize", ("checkpoint=runs/samr", "output=more", "subjects=2", *INFER), ("store", "runs/samr"), ("more/*",)),
    products.images("more"),
)
ON_SYNTHETIC = Door(
    *("train", (*SNET, "data=synthetic", "data.store=synthetic", *BARE, "hydra.run.dir=new", "trainer.max_epochs=1")),
    *(("synthetic",), ("new/*",), products.weights("new")),
)


def _synthesize(run: str, output: str = "again", *parts: str) -> Door:
    arguments = (f"checkpoint=runs/{run}", "input=patients", f"output={output}", *INFER)
    return Door("synthesize", arguments, (f"runs/{run}", "patients", *parts), (f"{output}/*",), products.images(output))


NPY = (npy_header, *BYTES[:6], npy_header, *BYTES[6:], npy_header, npy_header)
ZIP = (*BYTES, *archive_mutators())
HEADERS = {"nifti": nifti_field, "nifti gz": inside_gzip(nifti_field), "metaimage": metaimage_line, "nrrd": nrrd_line}


def _of_scans(name: str) -> Kind:
    header = HEADERS.get(name) or HEADERS[name.partition(" ")[0]]
    place, suffix = f"scans/{name.replace(' ', '_')}/raw/P1", FORMATS[name][0]
    mutators = (header, header, *BYTES, *[header] * 16)
    data = {".mhd": (f"{place}/*.raw",), ".nhdr": (f"{place}/*.raw",)}.get(suffix, ())
    return Kind(name, (f"{place}/*{suffix}", *data), mutators, _scans(name), excuses.same_reading, ("P1",))


RUN_TEXT = excuses.same_form
KINDS: tuple[Kind, ...] = (
    *map(_of_scans, FORMATS),
    Kind("layout", ("scans/nifti/layout.yaml",), YAML, _scans("nifti"), RUN_TEXT, ("layout",)),
    Kind("name_mapping.csv", ("cohort/name_mapping.csv",), CSV, _prepared(), RUN_TEXT),
    Kind("store: image.npy", ("store/*/image.npy",), NPY, _prepared("verify=true")),
    Kind("store: label.npy", ("store/*/label.npy",), NPY, _prepared("verify=true")),
    Kind("store: brain.npy", ("store/*/brain.npy",), NPY, _prepared("verify=true")),
    Kind("store: subject.json", ("store/*/subject.json",), JSON, _prepared("verify=true"), RUN_TEXT),
    Kind("store: cohort.json", ("store/cohort.json",), JSON, _prepared(), RUN_TEXT, ("data.store",)),
    Kind("arrays in training", ("store/*/*.npy",), NPY, TRAIN, excuses.same_array),
    Kind("subject.json in training", ("store/*/subject.json",), JSON, TRAIN, RUN_TEXT),
    Kind("cohort.json in training", ("store/cohort.json",), JSON, TRAIN, RUN_TEXT),
    Kind("best.ckpt", ("runs/rsnet/checkpoints/best.ckpt",), ZIP, _synthesize("rsnet")),
    Kind("last.ckpt in resume", ("runs/rsnet/checkpoints/last.ckpt",), ZIP, RESUME),
    Kind("config.yaml in resume", ("runs/rsnet/config.yaml",), YAML, RESUME, RUN_TEXT),
    Kind("config.yaml of a run", ("runs/rsnet/config.yaml",), YAML, _synthesize("rsnet"), RUN_TEXT),
    Kind("split.json in resume", ("runs/rsnet/split.json",), JSON, RESUME, RUN_TEXT),
    Kind("split.json of a run", ("runs/snet/split.json",), JSON, SWAP, RUN_TEXT),
    Kind("status.json in resume", ("runs/rsnet/status.json",), JSON, RESUME, RUN_TEXT),
    Kind("status.json of a run", ("runs/rsnet/status.json",), JSON, _synthesize("rsnet"), RUN_TEXT),
    Kind("metrics.csv in resume", ("runs/rsnet/metrics.csv",), CSV, RESUME, RUN_TEXT),
    Kind("sweep: status.json", ("sweep/0_*/status.json",), JSON, VIEW, RUN_TEXT),
    Kind("sweep: metrics.csv", ("sweep/0_*/metrics.csv",), CSV, VIEW, RUN_TEXT),
    Kind("sweep: config.yaml", ("sweep/0_*/config.yaml",), YAML, VIEW, RUN_TEXT),
    Kind("sweep.json", ("sweep/sweep.json",), JSON, VIEW, RUN_TEXT),
    Kind("multirun.yaml", ("sweep/multirun.yaml",), YAML, RESUME_SWEEP, RUN_TEXT),
    Kind("estimator", ("runs/clustering/estimator/estimator.json",), JSON, _synthesize("clustering"), RUN_TEXT),
    Kind("entries.npz", ("runs/clustering/estimator/entries.npz",), ZIP, _synthesize("clustering")),
    Kind("description.json", ("runs/clustering/description.json",), JSON, _synthesize("clustering"), RUN_TEXT),
    Kind("atlas.npz", ("runs/samr/atlas.npz",), ZIP, GENERATE),
    Kind("atlas.json", ("runs/samr/atlas.json",), JSON, GENERATE, RUN_TEXT),
    Kind("generated.json", ("synthetic/generated.json",), JSON, ON_SYNTHETIC, RUN_TEXT),
    Kind("record of a synthesis", ("made/*/*.json",), JSON, _synthesize("rsnet", "made", "made"), RUN_TEXT),
    Kind("scans in synthesis", ("patients/*/*/*_t1.nii.gz",), BYTES, _synthesize("rsnet"), excuses.never),
    Kind("answers.csv", ("answers.csv", "samples/key/key.csv"), CSV, SCORE, RUN_TEXT),
)
