"""From a run and a folder of scans to NIfTI files: what ``mrgen-synthesize`` does, but for generators' runs."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mrgen.data.cohorts import Layout, Problem, SubjectFiles, find_subjects, read_layouts, recognise_layouts
from mrgen.data.synthetic_files import SyntheticFiles
from mrgen.errors import UserError
from mrgen.launch.paths import CONF_DIR
from mrgen.launch.runs import load_run
from mrgen.launch.synthesis.generating import generate, generating_settings
from mrgen.launch.synthesis.trained import Made, Scans, TrainedMethod
from mrgen.papers.lesion_vaegan.cohort import LesionGenerator
from mrgen.protocols import Generator, Synthesizer

__all__ = ["synthesize"]


@dataclass(frozen=True)
class _Job:
    """One subject that is to be made, and why."""

    subject: SubjectFiles
    files: SyntheticFiles
    made_from: Mapping[str, Any]
    reason: str


def synthesize(conf: DictConfig) -> int:
    """Makes the missing sequence, the lesions or both of every subject below a folder; one line a subject.

    A generator's run takes no scans and makes a cohort, see ``mrgen.launch.synthesis.generating``.

    Args:
        conf: composed config of ``conf/synthesize.yaml``.

    Returns:
        How many subjects were left out.

    Raises:
        UserError: what concerns all subjects: no such run, folder or layout, an output that cannot be written.
    """
    _check_set(conf, "checkpoint", "runs/rsnet-t2/RUN")
    run = load_run(conf.checkpoint)
    generates = isinstance(run.model, Generator | LesionGenerator)
    if not (generates or isinstance(run.model, Synthesizer) or getattr(run.model, "writes_segmentation", False)):
        raise UserError(
            f"checkpoint={conf.checkpoint} is a {type(run.model).__name__}, which synthesises nothing; give a run of a "
            "synthesizer such as RS-Net, or of a generator such as SAMR"
        )
    if not generates:
        _check_set(conf, "input", "/data/patients")
    _check_set(conf, "output", "synthetic")
    output = Path(str(conf.output)).expanduser()  # 2023 is a folder too
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; expected a folder, or a name for one")
    if generates:
        generate(run, conf)
        return 0
    if given := generating_settings(conf):
        raise UserError(
            f"{given[0]}: {run.conf.name} makes files of the scans in input and generates no cohort; leave "
            f"{given[0].partition('=')[0]} out"
        )
    root = Path(str(conf.input)).expanduser()
    if not root.is_dir():
        raise UserError(f"input={root}: no such folder; expected one subject's folder, or a cohort's")
    if output.resolve() in (root.resolve(), *root.resolve().parents) or root.resolve() in output.resolve().parents:
        raise UserError(f"input={root} and output={output} lie in one another; the output needs a folder of its own")
    method = TrainedMethod(run, conf)
    _say(f"{method.name} ({conf.checkpoint}): {', '.join(method.sources)} -> {', '.join(method.makes)}")
    layout = _find_layout(None if conf.layout is None else str(conf.layout), method, root)

    subjects, problems = find_subjects(layout, root, method.sources)
    problems = [problem for problem in problems if problem.kind != "note"]  # grades, which nothing here asks for
    left_out = {problem.subject for problem in problems}
    _say(*_lines(problems, layout, method.sources))
    jobs: list[_Job] = []
    skipped = done = 0
    for subject in subjects:
        files = SyntheticFiles(output, subject.id, method.makes[0], method.images)
        try:
            made_from = method.made_from(subject, layout)
            reason = files.why_make(made_from)
        except (UserError, OSError) as error:
            left_out.add(subject.id)
            _say(f"{subject.id}: {error}")
            continue
        if reason is None:
            skipped += 1
            _say(f"{subject.id}: skipped, made before from the same scans and checkpoint")
        else:
            jobs.append(_Job(subject, files, made_from, reason))

    # One thread reads the next subject and one writes the last, while the network works on the present one.
    with ThreadPoolExecutor(2) as pool:
        writing: Future[str] | None = None
        started = time.perf_counter()
        for job, reading in _read_ahead(pool, method, layout, jobs):
            try:
                scans = reading.result()
                _say(*scans.notes)
                made = method.make(scans)
            except UserError as error:
                left_out.add(job.subject.id)
                _say(str(error))
            except MemoryError:
                left_out.add(job.subject.id)
                _say(f"{job.subject.id}: does not fit into memory; free some, or leave it out")
            else:
                if writing is not None:
                    _say(writing.result())
                done += 1
                writing = pool.submit(_save, method, job, layout, scans, made, started)
            started = time.perf_counter()
        if writing is not None:
            _say(writing.result())
    _say(f"{done} made, {skipped} skipped, {len(left_out)} left out: {output}")
    return len(left_out)


def _check_set(conf: DictConfig, key: str, example: str) -> None:
    if OmegaConf.is_missing(conf, key) or not conf[key]:
        raise UserError(f"{key} is not set; give its path, such as {key}={example}")


def _read_ahead(
    pool: Executor, method: TrainedMethod, layout: Layout, jobs: Iterable[_Job]
) -> Iterator[tuple[_Job, Future[Scans]]]:
    """Jobs with their scans, those of the next one on the way while the caller works on this one."""
    ready: tuple[_Job, Future[Scans]] | None = None
    for job in jobs:
        upcoming = job, pool.submit(method.read, job.subject, layout)
        if ready is not None:
            yield ready
        ready = upcoming
    if ready is not None:
        yield ready


def _save(method: TrainedMethod, job: _Job, layout: Layout, scans: Scans, made: Made, started: float) -> str:
    """Writes a subject's files, and returns the line that says so."""
    images, record = method.files(scans, made)
    job.files.save(images, {**record, "layout": layout.name, "made_from": job.made_from})
    again = "" if job.reason == "new" else f" anew ({job.reason})"
    seconds = time.perf_counter() - started
    return f"{scans.id}: found {', '.join(method.sources)}; made {', '.join(method.makes)}{again} in {seconds:.1f} s"


def _find_layout(asked: str | None, method: TrainedMethod, root: Path) -> Layout:
    """The layout of the scans, freed of labels: the one asked for, the run's own, or the only shipped one that fits."""
    shipped = read_layouts(CONF_DIR / "data" / "layout")
    layout = method.layout
    if asked:
        if asked not in shipped and not Path(asked).expanduser().is_file():
            raise UserError(f"layout={asked}: no such file; expected a YAML file, or one of {', '.join(shipped)}")
        layout = shipped.get(asked) or Layout.from_conf(Path(asked).expanduser())
        if lacking := [name for name in method.sources if name not in layout.images]:
            raise UserError(
                f"layout={asked}: {layout.title} has no {', '.join(lacking)}; "
                f"{method.name} needs {', '.join(method.sources)}"
            )
    if not recognise_layouts(root, {layout.name: layout}):
        usable = {name: other for name, other in shipped.items() if set(method.sources) <= set(other.images)}
        others = recognise_layouts(root, {name: other for name, other in usable.items() if other != layout})
        nothing = f"input={root}: nothing matches {layout.title} (expected {', '.join(layout.subjects)})"
        if others and (asked or len(others) > 1):
            fitting = ", ".join(f"layout={name} ({n} subject{'s' * (n != 1)})" for name, n in others.items())
            raise UserError(f"{nothing}; choose what it is: {fitting}")
        if not others:
            raise UserError(
                f"{nothing}, nor any shipped layout with {', '.join(method.sources)}; point input at the unpacked "
                "scans, or describe them in a YAML file: layout=mine.yaml (docs/cohorts.md)"
            )
        layout = shipped[next(iter(others))]
        _say(f"layout: {layout.title}; the run's own, {method.layout.title}, matches nothing in {root}")
    return replace(layout, label=(), label_values={})


def _lines(problems: Iterable[Problem], layout: Layout, sources: Sequence[str]) -> list[str]:
    """One line for each problem, and one alone for all sequences that a subject lacks."""
    missing: dict[tuple[str, str], list[str]] = {}
    lines = []
    for problem in problems:
        what, _, name = problem.kind.partition(": ")
        if what == "missing sequence":
            missing.setdefault((problem.subject, problem.file), []).append(name)
        else:
            lines.append(str(problem))
    for (subject, folder), names in missing.items():
        found = ", ".join(name for name in sources if name not in names) or "no sequence"
        expected = ", ".join(" or ".join(layout.images[name]) for name in names)
        lines.append(f"{subject}: found {found}; needs {', '.join(sources)}; no {expected} in {folder}")
    return lines


def _say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)
