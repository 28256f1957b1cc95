"""Numbers of paper 3's cross-validation: how well lesions are segmented without the missing sequence, and how well that
sequence is imputed.

What the paper printed comes from the preset.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mrgen.evaluation.statistics import bootstrap_interval
from mrgen.evaluation.swap_tables import Rows, adjust, p_value, paired, scores

__all__ = [
    "CHALLENGE",
    "DEPTHS",
    "OFFLINE",
    "QUALITY",
    "SEGMENTATION",
    "SIZES",
    "TESTED",
    "UNIMODAL",
    "WHERE",
    "cross_validation_directions",
    "cross_validation_sites",
    "cross_validation_summary",
    "methods_of",
    "recall_by_size",
]

JOINT, OFFLINE, UNIMODAL = "joint", "offline", "unimodal"  # the paper's three methods
SEGMENTATION = {"dsc": "DSC", "fpr": "FPR", "fnr": "FNR"}  # its Table 1
CHALLENGE = {
    "fdr": "FDR (%)",
    "lesion_fpr": "cluster FPR (%)",
    "lesion_f1": "lesion F1 (%)",
    "lesion_recall": "lesion recall (%)",
    "hd95": "HD95 (mm)",
    "avd": "AVD (%)",
}
QUALITY = {"mae": 4, "psnr": 2, "ssim": 3}  # its Table 3, SSIM added, and the digits that are printed
WHERE = {"image": "", "brain": "_brain"}
# PSNR with the image's own range differs from PSNR by a constant of the subject: the same test.
TESTED = tuple(f"{measure}{end}" for end in WHERE.values() for measure in QUALITY)
DEPTHS = ("periventricular", "cortical", "deep")
PLACES = tuple(f"fp_{depth}_{side}" for depth in DEPTHS for side in ("border", "apart"))
MEASURES = (*SEGMENTATION, *CHALLENGE, "reference_ml", "predicted_ml", *TESTED, "psnr_own", *PLACES)
PERCENT = dict.fromkeys(("dsc", "fpr", "fnr", "fdr", "lesion_fpr", "lesion_f1", "lesion_recall", "avd"), 100)
EDGES = (0.02, 0.1, 0.5, 2.5)  # ml
SIZES = ("< 0.02", "0.02–0.1", "0.1–0.5", "0.5–2.5", "≥ 2.5")
CLAIMS = (  # sections 3.2 and 3.3; each pair is one to be tested
    ("dsc", JOINT, ">", UNIMODAL),
    ("dsc", UNIMODAL, ">", OFFLINE),
    ("dsc", JOINT, ">", OFFLINE),
    ("fpr", JOINT, "<", OFFLINE),
    ("fpr", OFFLINE, "<", UNIMODAL),
    ("fpr", JOINT, "<", UNIMODAL),
    ("fnr", UNIMODAL, "<", JOINT),
    ("fnr", UNIMODAL, "<", OFFLINE),
    ("mae", JOINT, "<", OFFLINE),
    ("psnr", JOINT, ">", OFFLINE),
)


def cross_validation_summary(
    rows: Rows, *, reference: str = UNIMODAL, paper: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One mapping a method, in the order of ``rows``: what ``table.csv`` holds.

    Args:
        rows: one a subject and method: ``subject``, ``site`` (or None), ``fold``, ``input`` (the method; a repeated one
            carries a running number, ``joint#2``); fractions ``dsc``, ``fpr`` (may exceed 1), ``fnr``, ``fdr``,
            ``lesion_f1``, ``lesion_recall``, ``lesion_fpr``, ``avd``; ``hd95`` (mm); ``reference_ml``,
            ``predicted_ml`` and ``fp_{periventricular,cortical,deep}_{border,apart}`` (ml); of methods that impute
            ``mae``, ``psnr``, ``ssim``, the same with ``_brain``, and ``psnr_own``. What a row does not have is not
            measured. Methods may have different subjects.
        reference: the method that ``dsc``, ``fpr`` and ``fnr`` are compared with; imputation is with ``offline``.
        paper: ``title``, and ``segmentation`` (%) and ``imputation`` by method and measure.

    Returns:
        ``input`` and ``n`` (subjects); every measure of the rows, fractions in %: its mean, and with ``_low`` and
        ``_high`` behind the name the mean's 95% bootstrap interval over subjects (nan for 1 subject). Likewise
        ``*_change``, the difference from ``reference`` or ``offline`` over the subjects that both have, and ``*_p`` of
        the paired Wilcoxon test, Holm-adjusted over all methods and measures, of segmentation and of imputation in
        turn; None for the method itself, where the other is missing and below 6 subjects. At last ``paper_*``.
    """
    imputed = [key for key in TESTED if any(key in row for row in rows)]
    lines: list[dict[str, Any]] = []
    for name in methods_of(rows):
        line: dict[str, Any] = {"input": name, "n": sum(row["input"] == name for row in rows)}
        for key in MEASURES:
            line |= _estimate(key, _scaled(key, scores(rows, name, key).values()))
        for other, keys in ((reference, SEGMENTATION), (OFFLINE, imputed)):
            for key in keys:
                pairs = [] if name == other else paired(rows, name, other, key)
                line |= _estimate(f"{key}_change", _scaled(key, [value - against for value, against in pairs]))
                line[f"{key}_p"] = None if name == other else p_value(rows, name, other, key)
        printed = {key: _printed(paper, name, key) for key in (*SEGMENTATION, *QUALITY)}
        lines.append(line | {f"paper_{key}": value for key, value in printed.items() if value is not None})
    adjust(lines, [f"{key}_p" for key in SEGMENTATION])
    adjust(lines, [f"{key}_p" for key in imputed])
    return lines


def cross_validation_directions(rows: Rows, *, paper: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The paper's claims of one method being better than another, each pair by the subjects that both have.

    Args:
        rows: see ``cross_validation_summary``.
        paper: likewise.

    Returns:
        One mapping a claim whose two methods have subjects in common: ``measure``, ``first``, ``relation`` (``>`` or
        ``<``), ``second``; ``n`` (common subjects); ``first_mean``, ``second_mean``; ``difference`` (first − second)
        with ``_low`` and ``_high``; ``holds``: whether the means are as the paper has them; ``p``, Holm-adjusted over
        these claims; ``paper_first`` and ``paper_second``, None where the paper has none.
    """
    lines: list[dict[str, Any]] = []
    for key, first, relation, second in CLAIMS:
        if not (pairs := paired(rows, first, second, key)):
            continue
        means = [float(np.mean(_scaled(key, values))) for values in zip(*pairs, strict=True)]
        lines.append(
            {
                "measure": key,
                "first": first,
                "relation": relation,
                "second": second,
                "n": len(pairs),
                "first_mean": means[0],
                "second_mean": means[1],
                **_estimate("difference", _scaled(key, [a - b for a, b in pairs])),
                "holds": means[0] > means[1] if relation == ">" else means[0] < means[1],
                "p": p_value(rows, first, second, key),
                "paper_first": _printed(paper, first, key),
                "paper_second": _printed(paper, second, key),
            }
        )
    adjust(lines, ["p"])
    return lines


def cross_validation_sites(rows: Rows) -> list[dict[str, Any]]:
    """The paper's measures by site: is it one scanner that makes a mean?

    Args:
        rows: see ``cross_validation_summary``.

    Returns:
        One mapping a site and method, in the order of ``rows``: ``site``, ``input``, ``n`` (subjects), and ``dsc``,
        ``fpr``, ``fnr`` (%) with ``_low`` and ``_high``. Empty where there are not several sites.
    """
    sites = list(dict.fromkeys(row.get("site") for row in rows))
    lines: list[dict[str, Any]] = []
    for site in sites if len({site for site in sites if site is not None}) > 1 else ():
        here = [row for row in rows if row.get("site") == site]
        for name in methods_of(here):
            lines.append({"site": site, "input": name, "n": sum(row["input"] == name for row in here)})
            for key in SEGMENTATION:
                lines[-1] |= _estimate(key, _scaled(key, scores(here, name, key).values()))
    return lines


def recall_by_size(lesions: Rows) -> list[dict[str, Any]]:
    """How many of the reference's lesions are found, by their size, the lesions of all subjects together.

    Args:
        lesions: one a reference lesion and method: ``subject``, ``input``, ``volume_ml``, ``found`` (any overlap) and
            ``share`` (of its voxels that are predicted, 0 to 1).

    Returns:
        One mapping a size and method that has such lesions, by size and then in the order of ``lesions``: ``size`` (of
        ``SIZES``, ml; the lower edge belongs to it), ``input``, ``subjects``, ``lesions``; ``found`` and ``share``, the
        percentages of lesions found and of their voxels (mean over lesions), with ``_low`` and ``_high``: the 95%
        bootstrap interval that draws subjects, since lesions of one subject are no independent observations.
    """
    bins: dict[tuple[int, str], dict[str, list[tuple[float, float]]]] = {}
    for lesion in lesions:
        place = int(np.digitize(lesion["volume_ml"], EDGES)), str(lesion["input"])
        pair = float(lesion["found"]), float(lesion["share"])
        bins.setdefault(place, {}).setdefault(str(lesion["subject"]), []).append(pair)
    lines = []
    for size, label in enumerate(SIZES):
        for name in methods_of(lesions):
            if not (subjects := bins.get((size, name))):
                continue
            counts = [len(pairs) for pairs in subjects.values()]
            line: dict[str, Any] = {"size": label, "input": name, "subjects": len(counts), "lesions": sum(counts)}
            for i, key in enumerate(("found", "share")):
                line |= _pooled(key, [100 * sum(pair[i] for pair in pairs) for pairs in subjects.values()], counts)
            lines.append(line)
    return lines


def methods_of(rows: Rows) -> list[str]:
    """Their names, in the order of appearance."""
    return list(dict.fromkeys(str(row["input"]) for row in rows))


def _scaled(key: str, values: Iterable[float]) -> list[float]:
    return [PERCENT.get(key, 1) * value for value in values]


def _estimate(key: str, values: Sequence[float]) -> dict[str, float]:
    """Nothing of no values, so that what was not measured has no column."""
    if not values:
        return {}
    low, high = bootstrap_interval(values)
    return {key: float(np.mean(values)), f"{key}_low": low, f"{key}_high": high}


def _pooled(key: str, totals: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """Mean of all lesions, and its interval (BCa) over subjects: of each the total and the number of its lesions."""
    from scipy.stats import bootstrap

    sums, numbers = np.asarray(totals, dtype=float), np.asarray(counts, dtype=float)
    mean = float(sums.sum() / numbers.sum())
    low = high = mean
    if len(sums) < 2:
        low = high = math.nan
    elif not np.allclose(sums, mean * numbers):  # otherwise all subjects agree, of which no bootstrap can be made
        low, high = bootstrap(
            (sums, numbers),
            lambda x, n, axis=-1: x.sum(axis) / n.sum(axis),
            paired=True,
            method="BCa",
            random_state=np.random.default_rng(0),
        ).confidence_interval
    return {key: mean, f"{key}_low": float(low), f"{key}_high": float(high)}


def _printed(paper: Mapping[str, Any] | None, name: str, key: str) -> float | None:
    """A repeated method carries a running number; the paper has one row for it."""
    part = "segmentation" if key in SEGMENTATION else "imputation"
    return (paper or {}).get(part, {}).get(name.partition("#")[0], {}).get(key)
