"""Numbers of the judgement of augmentation: what each segmenter scores on each label, and what synthetic slices change.

The unit is the patient: slices, and the scans of one patient, are averaged first. What a paper compared, and what it
printed, come from the preset.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mrgen.evaluation.statistics import holm, paired_wilcoxon
from mrgen.evaluation.swap_tables import Rows, adjust, estimate, scores

__all__ = [
    "MEAN",
    "MEASURES",
    "augmentation_directions",
    "augmentation_repeats",
    "augmentation_summary",
    "by_patient",
    "method_of",
    "over_repeats",
    "runs_of",
]

MEASURES = {"dice": 3, "hd95": 2, "sensitivity": 3, "specificity": 4}  # and the digits that are printed
TESTED = tuple(f"{place}{measure}" for place in ("", "slice_") for measure in MEASURES)
THERE = ("dice_there", "slice_dice_there", "slice_hd95_both")  # of reference labels that are there
COUNTS = ("slices", "slices_there", "slices_missed", "slices_false", "one_empty")
MEAN = "mean of the labels"


def by_patient(rows: Rows, labels: Sequence[str]) -> list[dict[str, Any]]:
    """One row a patient, run and label, and one for the mean over the labels where there are several.

    Args:
        rows: of ``mrgen.evaluation.augmentation.Augmentation``.
        labels: which, in order; the others are left out.

    Returns:
        ``subject`` (the patient), ``input``, ``label`` and the numbers that the rows have: means over the patient's
        scans, which skip what is nan, and sums of what is counted.
    """
    scans: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["label"] in labels:
            scans.setdefault((str(row["patient"]), str(row["input"]), str(row["label"])), []).append(row)
    patients: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for (patient, name, label), several in scans.items():
        patients.setdefault((patient, name), {})[label] = _together(several)
    found: list[dict[str, Any]] = []
    for (patient, name), scored in patients.items():
        of_labels = {label: scored[label] for label in labels}
        if len(labels) > 1:
            of_labels[MEAN] = _together(list(of_labels.values()))
        found += [{"subject": patient, "input": name, "label": label, **row} for label, row in of_labels.items()]
    return found


def _together(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for key in (key for key in (*TESTED, *THERE, *COUNTS) if key in rows[0]):
        values = [float(row[key]) for row in rows if not math.isnan(row[key])]
        numbers[key] = sum(values) if key in COUNTS else float(np.mean(values)) if values else math.nan
    return numbers


def augmentation_summary(rows: Rows, *, labels: Sequence[str], reference: str) -> list[dict[str, Any]]:
    """One mapping a run and label, in the order of ``rows``: what ``table.csv`` holds.

    Args:
        rows: of ``mrgen.evaluation.augmentation.Augmentation``. A repeated run carries a running number, ``samr#2``.
        labels: names of classes, in order.
        reference: the run that was trained on real slices alone; repeated ones are averaged.

    Returns:
        ``input``, ``label`` and ``n`` (patients). ``dice``, ``hd95`` (mm), ``sensitivity`` and ``specificity`` of
        volumes, and with ``slice_`` before the name of slices: means over patients, with ``_low`` and ``_high`` behind
        the name their 95% bootstrap interval (nan of 1 patient). Likewise ``*_change``, the difference from the
        reference, paired by patient, and ``*_p`` of the paired Wilcoxon test, Holm-adjusted over all runs and labels,
        of every measure in turn; None for the reference, without one, and below 6 patients. ``hd95_median``, median
        over patients; ``dice_there``, ``slice_dice_there`` and ``slice_hd95_both``, means over patients; and
        but for the mean of the labels the sums ``slices``, ``slices_there``, ``slices_missed``, ``slices_false`` and
        ``one_empty`` (scans).
    """
    patients = by_patient(rows, labels)
    lines: list[dict[str, Any]] = []
    for name in runs_of(rows):
        for label in _labels_of(patients):
            mine = [row for row in patients if row["label"] == label]
            own = [row for row in mine if row["input"] == name]
            line: dict[str, Any] = {"input": name, "label": label, "n": len(own)}
            for key in TESTED:
                values = scores(own, name, key)
                line |= estimate(key, list(values.values()))
                against = {} if method_of(name) == reference else over_repeats(mine, reference, key)
                pairs = [(value, against[id]) for id, value in values.items() if id in against]
                line |= estimate(f"{key}_change", [a - b for a, b in pairs])
                line[f"{key}_p"] = paired_wilcoxon([a for a, _ in pairs], [b for _, b in pairs])
            line["hd95_median"] = float(np.median([row["hd95"] for row in own]))
            for key in THERE:
                values = scores(own, name, key)
                line[key] = float(np.mean(list(values.values()))) if values else math.nan
            counted = () if label == MEAN else COUNTS
            lines.append(line | {key: int(sum(row[key] for row in own)) for key in counted})
    for key in TESTED:
        adjust(lines, [f"{key}_p"])
    return lines


def augmentation_directions(
    rows: Rows,
    *,
    labels: Sequence[str],
    claims: Sequence[Sequence[str]],
    paper: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> list[dict[str, Any]]:
    """A paper's claims of one training being better than another, by the Dice of volumes, mean over the labels.

    Args:
        rows: see ``augmentation_summary``; repeated runs are averaged within each patient.
        labels: likewise.
        claims: names of two runs and ``>`` or ``<`` between them, such as ``[samr-1.0, ">", real]``.
        paper: by run and measure, a number a label.

    Returns:
        One mapping a claim whose two runs are there: ``first``, ``relation``, ``second``; ``n`` (patients);
        ``first_mean``, ``second_mean``; ``difference`` (first − second) with ``_low`` and ``_high``; likewise
        ``there``, the difference over the labels that a patient's reference has; ``holds``: whether the means are as
        the paper has them; ``p`` of the difference, Holm-adjusted over these claims; ``paper_first``,
        ``paper_second``, None where the paper has none.
    """
    patients = by_patient(rows, labels)
    whole = [row for row in patients if row["label"] == _labels_of(patients)[-1]]  # the mean, or the only label
    lines: list[dict[str, Any]] = []
    for first, relation, second in claims:
        one, other = (over_repeats(whole, name, "dice") for name in (first, second))
        if not (pairs := [(value, other[id]) for id, value in one.items() if id in other]):
            continue
        values, against = (list(side) for side in zip(*pairs, strict=True))
        means = float(np.mean(values)), float(np.mean(against))
        printed = [np.mean(paper[name]["dice"]) if paper and name in paper else None for name in (first, second)]
        line = {"first": first, "relation": relation, "second": second, "n": len(pairs)}
        line |= {"first_mean": means[0], "second_mean": means[1]}
        line |= estimate("difference", [a - b for a, b in pairs])
        there = [over_repeats(whole, name, "dice_there") for name in (first, second)]
        line |= estimate("there", [value - there[1][id] for id, value in there[0].items() if id in there[1]])
        line |= {"holds": means[0] > means[1] if relation == ">" else means[0] < means[1]}
        line |= {"p": paired_wilcoxon(values, against), "paper_first": printed[0], "paper_second": printed[1]}
        lines.append(line)
    for line, p in zip(lines, holm([line["p"] for line in lines]), strict=True):
        line["p"] = p
    return lines


def augmentation_repeats(rows: Rows, *, labels: Sequence[str]) -> list[dict[str, Any]]:
    """How far trainings that differ in nothing but their seed lie apart.

    Returns:
        One mapping a repeated run and label: ``input``, ``label``, ``runs`` (how many); ``dice`` and ``slice_dice``:
        means over the runs of their means over patients, with ``_std`` (n − 1), ``_least`` and ``_most`` behind.
    """
    patients = by_patient(rows, labels)
    repeats: dict[str, list[str]] = {}
    for name in runs_of(rows):
        repeats.setdefault(method_of(name), []).append(name)
    lines: list[dict[str, Any]] = []
    for method, names in repeats.items():
        for label in _labels_of(patients) if len(names) > 1 else ():
            mine = [row for row in patients if row["label"] == label]
            line: dict[str, Any] = {"input": method, "label": label, "runs": len(names)}
            for key in ("dice", "slice_dice"):
                means = [float(np.mean(list(scores(mine, name, key).values()))) for name in names]
                line |= {key: float(np.mean(means)), f"{key}_std": float(np.std(means, ddof=1))}
                line |= {f"{key}_least": min(means), f"{key}_most": max(means)}
            lines.append(line)
    return lines


def method_of(name: str) -> str:
    """A run's name without the running number of repeated ones."""
    return name.partition("#")[0]


def runs_of(rows: Rows) -> list[str]:
    """Their names, in the order of appearance."""
    return list(dict.fromkeys(str(row["input"]) for row in rows))


def _labels_of(patients: Rows) -> list[str]:
    return list(dict.fromkeys(str(row["label"]) for row in patients))


def over_repeats(rows: Rows, method: str, key: str) -> dict[str, float]:
    """By patient, the mean of a method's runs."""
    found: dict[str, list[float]] = {}
    for name in runs_of(rows):
        for id, value in scores(rows, name, key).items() if method_of(name) == method else ():
            found.setdefault(id, []).append(value)
    return {id: float(np.mean(values)) for id, values in found.items()}
