"""A cohort on disk: settled by its settings, grown in parallel, goes on where it was stopped."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mrgen.errors import UserError
from mrgen.files import read_json, write_json

VERSION = 2  # raise it when the same settings grow other subjects
SETTINGS = "phantom.json"


def grow_cohort(
    root: str | Path,
    *,
    layout: str = "brats2019",
    subjects: int = 20,
    spacing: float = 1.5,
    seed: int = 0,
    sequences: Sequence[str] | None = None,
    skull: bool = False,
    workers: int | None = None,
) -> list[Path]:
    """Writes a phantom cohort below `root`, as the challenge would ship it.

    Subjects that are there already are kept, so it can be stopped and goes on; with a larger `subjects` it adds to
    them. Each is written beside its place and then renamed, so a folder with a case's name is a complete case.

    Args:
        root: folder of the cohort; `phantom.json` in it remembers the settings.
        layout: a BraTS year (`brats2015`, `brats2017` … `brats2021`, `brats2023`) or `wmh2017`.
        subjects: number of cases. With `brats2015` and `brats2023` every fifth is a second visit of the one before.
        spacing: isotropic voxel size in mm.
        seed: the same seed grows the same cohort, at every spacing the same heads.
        sequences: default t1, t1ce, t2, flair (t1, flair with `wmh2017`); `apt` may be added in BraTS layouts.
        skull: keep what lies outside the brain. Always so with `wmh2017`, as in that challenge.
        workers: threads; default one a CPU, at most 8.

    Returns:
        The cases' folders, in the order of their numbers.

    Raises:
        UserError: settings that cannot be grown, or a root that holds something else.
    """
    # numpy, scipy and nibabel come in here, so that importing the package stays cheap
    from rich.progress import track

    from mrgen.data.phantom.anatomy import load_template, tissue_at
    from mrgen.data.phantom.layouts import LAYOUTS, Case, write_mapping
    from mrgen.data.phantom.subject import grow_subject, identify

    if layout not in LAYOUTS:
        raise UserError(f"phantom: unknown layout {layout!r}; valid layouts are {', '.join(LAYOUTS)}")
    table = LAYOUTS[layout]
    tumour = table.pathology == "tumour"
    skull = skull or not tumour
    chosen = _check(layout, tumour, subjects, spacing, sequences)
    root = Path(root)
    _claim(
        root,
        {"layout": layout, "spacing": float(spacing), "seed": int(seed), "sequences": list(chosen), "skull": skull},
        subjects,
    )

    cases = []
    for number in range(subjects):
        patient, visit = table.patient_and_visit(number)
        grade, site = identify(seed=seed, index=patient, pathology=table.pathology)
        cases.append(Case(number, patient, visit, grade, site))
    folders = [root / table.folder(case) for case in cases]
    missing = [(case, folder) for case, folder in zip(cases, folders, strict=True) if not folder.exists()]

    for left in root.glob(".growing-*"):  # by a run that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    nursery = root / f".growing-{secrets.token_hex(6)}"  # on the same disk, so that the rename is atomic

    def grow(job: tuple[Case, Path]) -> None:
        case, folder = job
        subject = grow_subject(
            seed=seed,
            index=case.patient,
            visit=case.visit,
            spacing=spacing,
            pathology=table.pathology,
            sequences=chosen,
            skull=skull,
        )
        young = nursery / str(case.number)
        young.mkdir(parents=True)
        table.write(subject, young, case)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():  # another process may have been faster
            young.rename(folder)

    if missing:
        load_template(), tissue_at(spacing)  # once, before the threads ask for it at the same time
        # Threads, not processes: the work is numpy, scipy and zlib, which let go of the interpreter's lock, and the
        # template is shared. It also runs inside a notebook, a test or a job that has CUDA initialised.
        pool = ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8))
        try:
            for _ in track(pool.map(grow, missing), f"growing {layout} phantoms", total=len(missing)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
            shutil.rmtree(nursery, ignore_errors=True)
    write_mapping(table, cases, root)
    return folders


def _check(
    layout: str, tumour: bool, subjects: int, spacing: float, sequences: Sequence[str] | None
) -> tuple[str, ...]:
    """Checks what was asked for; returns the sequences."""
    from mrgen.data.phantom.subject import TUMOUR_SEQUENCES, WMH_SEQUENCES

    default = TUMOUR_SEQUENCES if tumour else WMH_SEQUENCES
    valid = (*default, "apt") if tumour else default
    chosen = tuple(sequences or default)
    if unknown := [s for s in chosen if s not in valid]:
        raise UserError(
            f"phantom: layout {layout} has no sequence {', '.join(unknown)}; valid sequences are {', '.join(valid)}"
        )
    if subjects < 1:
        raise UserError(f"phantom: subjects is {subjects}, expected 1 or more")
    if not 0.5 <= spacing <= 5:
        raise UserError(f"phantom: spacing is {spacing} mm, expected 0.5 to 5 (the demo takes 3, the default is 1.5)")
    return tuple(s for s in valid if s in chosen)  # in one order, so that the order asked for changes nothing


def _claim(root: Path, settings: dict[str, object], subjects: int) -> None:
    """Makes `root` the home of a phantom with these settings, or says why it cannot be."""
    path = root / SETTINGS
    settings = {"version": VERSION, **settings}
    if os.path.lexists(path):
        remedy = f"delete {root} and grow it again"
        found = read_json(path, expected="what the phantom was grown with", remedy=remedy)
        if not isinstance(found, dict) or type(count := found.pop("subjects", None)) is not int:
            raise UserError(f"{path} cannot be read (no number of subjects in it); {remedy}")
        if different := [k for k in settings if found.get(k) != settings[k]]:
            each = "; ".join(f"{k} is {found.get(k)}, asked for is {settings[k]}" for k in different)
            raise UserError(
                f"{root} holds a phantom of other settings: {each}. Choose another folder or delete this one"
            )
        if count > subjects:
            raise UserError(
                f"{root} holds a phantom of other settings: subjects is {count}, asked for is {subjects}. "
                f"Ask for {count} or more, choose another folder or delete this one"
            )
    elif root.exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty and holds no phantom; choose a new folder, so that no scans are mixed up")
    root.mkdir(parents=True, exist_ok=True)
    write_json(path, {**settings, "subjects": subjects})
