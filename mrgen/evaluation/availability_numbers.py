"""Numbers of the availability study: what segmentors score after training on real, synthetic and enhanced slices.

Qu et al. (section 3.4) average the Dice and the MSE of maps of label numbers over slices and sequences; so does every
number of a run here. What is compared is compared by patient: slices and scans of one patient are averaged first.
Trainings of one name that differ in their seed are repeats, and averaged within each patient.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mrgen.evaluation.augmentation_numbers import MEAN, by_patient, method_of, over_repeats, runs_of
from mrgen.evaluation.statistics import holm, paired_wilcoxon
from mrgen.evaluation.swap_tables import Rows, adjust, estimate

__all__ = ["INDEX", "availability_claims", "availability_runs", "availability_summary", "region_labels"]

INDEX = ("dice", "mse")  # of maps of label numbers: ``index_dice`` and ``index_mse`` of the rows


def availability_runs(indices: Rows) -> list[dict[str, Any]]:
    """One mapping a run, in the order of ``indices``: what the paper prints of the best of four.

    Args:
        indices: of ``mrgen.evaluation.augmentation.Augmentation``.

    Returns:
        ``input`` (the run), ``row`` (its name without a running number); ``dice`` and ``mse``, means over slices and
        sequences; ``dice_SEQUENCE`` and ``mse_SEQUENCE``, over slices.
    """
    lines: list[dict[str, Any]] = []
    for name in runs_of(indices):
        own = [row for row in indices if row["input"] == name]
        line: dict[str, Any] = {"input": name, "row": method_of(name)}
        for key in INDEX:
            line[key] = _over_slices(own, key)
        for sequence in dict.fromkeys(str(row["sequence"]) for row in own):
            for key in INDEX:
                line[f"{key}_{sequence}"] = _over_slices([row for row in own if row["sequence"] == sequence], key)
        lines.append(line)
    return lines


def availability_summary(rows: Rows, indices: Rows, *, regions: Sequence[str], reference: str) -> list[dict[str, Any]]:
    """One mapping a row of the study, in the order of ``indices``: what ``table.csv`` holds.

    Args:
        rows: of ``mrgen.evaluation.augmentation.Augmentation``, one a scan, run and region.
        indices: of the same, one a scan, run and sequence.
        regions: names of labels of ``rows``, in order.
        reference: the row on all real slices alone.

    Returns:
        ``input`` (the row), ``runs`` (repeats), ``n`` (patients). Means over the repeats: ``dice`` and ``mse``, over
        slices and sequences, with ``_std`` (n − 1; nan of one run) and ``_best``, those of the run with the highest
        Dice; ``dice_SEQUENCE`` and ``mse_SEQUENCE``. Means over patients with ``_low`` and ``_high``, their 95%
        bootstrap interval: ``patient_dice``, ``patient_mse``, and ``region_R``, the Dice of every region and of
        ``MEAN`` where there are several; likewise ``*_change``, differences from the reference, paired by patient.
        ``*_p`` of the paired Wilcoxon test, Holm-adjusted over all rows, and of ``region_R`` over all regions as well;
        None of the reference, without one, and below 6 patients.
    """
    runs, patients = availability_runs(indices), by_patient(rows, regions)
    labels = region_labels(regions)
    lines: list[dict[str, Any]] = []
    for name in dict.fromkeys(run["row"] for run in runs):
        own = [run for run in runs if run["row"] == name]
        best = max(own, key=lambda run: run["dice"])
        line: dict[str, Any] = {"input": name, "runs": len(own), "n": len(_index(indices, name, "dice"))}
        for key in own[0].keys() - {"input", "row"}:
            line[key] = float(np.mean([run[key] for run in own]))
        for key in INDEX:
            values = [run[key] for run in own]
            line[f"{key}_std"] = float(np.std(values, ddof=1)) if len(own) > 1 else math.nan
            line[f"{key}_best"] = best[key]
        compared = {f"patient_{key}": [_index(indices, of, key) for of in (name, reference)] for key in INDEX}
        for label in labels:
            whole = [row for row in patients if row["label"] == label]
            compared[f"region_{label}"] = [over_repeats(whole, of, "dice") for of in (name, reference)]
        for key, (mine, against) in compared.items():
            line |= estimate(key, list(mine.values()))
            pairs = [] if name == reference else [(value, against[id]) for id, value in mine.items() if id in against]
            line |= estimate(f"{key}_change", [a - b for a, b in pairs])
            line[f"{key}_p"] = paired_wilcoxon([a for a, _ in pairs], [b for _, b in pairs])
        lines.append(line)
    for key in INDEX:
        adjust(lines, [f"patient_{key}_p"])
    adjust(lines, [f"region_{label}_p" for label in labels])
    return lines


def region_labels(regions: Sequence[str]) -> list[str]:
    """The regions, and their mean where there are several."""
    return [*regions, *[MEAN] * (len(regions) > 1)]


def availability_claims(
    rows: Rows, indices: Rows, *, regions: Sequence[str], study: Mapping[str, Any], paper: bool = True
) -> list[dict[str, Any]]:
    """What the paper reads from its table, by the Dice of maps of label numbers.

    Args:
        rows, indices, regions: see ``availability_summary``.
        study: of the preset. ``rows``: by name, the paper's ``dice``. ``claims``: two names and ``<``, ``>`` or ``~``
            between them; ``close``: how far apart two may be that are ``~``. ``peaks``: lists of names, ordered by
            amount, of which neither the first nor the last is best. ``tops``: pairs of lists; the best of the first is
            above the best of the second. ``best``: names that are above all others of ``rows``.
        paper: whether to tell its numbers.

    Returns:
        One mapping a claim whose rows were all run, of ``best`` one whose row and one more was: ``claim``; ``n``
        (patients); ``ours``, the means over patients of its rows (of ``tops`` the two bests, of ``best`` the row and
        the best other); ``holds``; ``paper``, its numbers alike, None where it is not asked. Of two rows also
        ``difference`` (first − second) with ``_low`` and ``_high``, and ``p``, Holm-adjusted over these claims (None
        below 6 patients); and ``region`` likewise, the difference in the Dice of regions, mean over them. Of others
        these are nan and None.
    """
    names = {method_of(name) for name in runs_of(indices)}
    values = {name: _index(indices, name, "dice") for name in names}
    ours = {name: float(np.mean(list(scored.values()))) for name, scored in values.items()}
    printed = {name: float(row["dice"]) for name, row in study["rows"].items()} if paper else {}
    patients = [row for row in by_patient(rows, regions) if row["label"] == region_labels(regions)[-1]]
    lines: list[dict[str, Any]] = []

    def claimed(claim: str, shown: Sequence[str], shown_by_paper: Sequence[str], holds: bool, **more: Any) -> None:
        theirs = [printed[name] for name in shown_by_paper] if set(shown_by_paper) <= set(printed) else None
        line = {"claim": claim, "n": len(values[shown[0]]), "ours": [ours[name] for name in shown], "holds": holds}
        none = {**estimate("difference", []), **estimate("region", []), "p": None}
        lines.append({**line, "paper": theirs, **none, **more})

    for first, relation, second in study.get("claims") or ():
        if not {first, second} <= names:
            continue
        one, other = (values[name] for name in (first, second))
        pairs = [(value, other[id]) for id, value in one.items() if id in other]
        region = [over_repeats(patients, name, "dice") for name in (first, second)]
        gap = ours[first] - ours[second]
        held = {"<": gap < 0, ">": gap > 0, "~": abs(gap) <= study["close"]}[relation]
        claimed(
            f"{first} {relation} {second}",
            (first, second),
            (first, second),
            held,
            **estimate("difference", [a - b for a, b in pairs]),
            **estimate("region", [value - region[1][id] for id, value in region[0].items() if id in region[1]]),
            p=paired_wilcoxon([a for a, _ in pairs], [b for _, b in pairs]),
        )
    for series in study.get("peaks") or ():
        if set(series) <= names:
            top = max(series, key=ours.__getitem__)
            said = f"{series[0]} to {series[-1]} rise, then fall"
            claimed(said, series, series, top not in (series[0], series[-1]))
    for first, second in study.get("tops") or ():
        if {*first, *second} <= names:
            said = f"best of {first[0]} to {first[-1]} > best of {second[0]} to {second[-1]}"
            tops = [max(series, key=ours.__getitem__) for series in (first, second)]
            theirs = [max(series, key=lambda name: printed.get(name, 0)) for series in (first, second)]
            claimed(said, tops, theirs, ours[tops[0]] > ours[tops[1]])
    for name in study.get("best") or ():
        known = [other for other in study["rows"] if other in names and other != name]
        if name in names and known:
            rival = max(known, key=ours.__getitem__)
            theirs = [name, max((other for other in study["rows"] if other != name), key=lambda x: printed.get(x, 0))]
            claimed(f"{name} is best of {len(known) + 1} rows", (name, rival), theirs, ours[name] > ours[rival])
    for line, p in zip(lines, holm([line["p"] for line in lines]), strict=True):
        line["p"] = p
    return lines


def _over_slices(indices: Rows, key: str) -> float:
    """The mean over slices of rows that are means over theirs; nan where there is none."""
    counted = [row for row in indices if row["slices"]]
    weights = [row["slices"] for row in counted]
    return float(np.average([row[f"index_{key}"] for row in counted], weights=weights)) if counted else math.nan


def _index(indices: Rows, method: str, key: str) -> dict[str, float]:
    """By patient, over the slices of all scans, sequences and repeats."""
    own: dict[str, list[Mapping[str, Any]]] = {}
    for row in indices:
        if method_of(str(row["input"])) == method:
            own.setdefault(str(row["patient"]), []).append(row)
    found = {patient: _over_slices(several, key) for patient, several in own.items()}
    return {patient: value for patient, value in found.items() if not math.isnan(value)}
