"""Rows of a translation's judgement: by hand, and of a cohort that is noise."""

import math

import numpy as np

REGIONS = ("WT", "TC", "ET")


def overlap(dice, hd95_mean, hd95, prefix=""):
    """One value a region, WT, TC, ET."""
    parts = {"dice": dice, "hd95_mean": hd95_mean, "hd95": hd95}
    return {
        f"{prefix}{key}_{region}": x for key, three in parts.items() for region, x in zip(REGIONS, three, strict=True)
    }


def errors(brain, tumour, **more):
    return {"own_mse_brain": brain, "own_mse_tumour": tumour, **more}


def by_hand():
    """Three subjects, the third without a lesion and without a label."""
    return [
        {"subject": "a", "input": "real", **overlap((0.9, 0.8, 0.7), (2, 3, 4), (3, 4, 5))},
        {
            "subject": "a", "input": "t2/resnet-100-0",
            **overlap((0.8, 0.7, 0.6), (4, 5, 6), (6, 7, 8)),
            **overlap((1.0, 0.9, 0.8), (1, 1, 1), (2, 2, 2), "agree_"),
            **errors(0.02, 0.04, unit_mse_brain=0.5, unit_mse_tumour=0.7),
        },
        {"subject": "a", "input": "t2/random", **overlap((0.3, 0.2, 0.1), (9, 9, 9), (9, 9, 9)), **errors(0.3, 0.1)},
        {"subject": "b", "input": "real", **overlap((0.6, 0.5, 0.4), (6, 6, 9), (8, 8, 8))},
        {
            "subject": "b", "input": "t2/resnet-100-0",
            **overlap((0.7, 0.6, 0.5), (5, 5, 5), (6, 6, 6)),
            **overlap((0.6, 0.5, 0.4), (3, 3, 3), (4, 4, 4), "agree_"),
            **errors(0.04, 0.02, unit_mse_brain=0.1, unit_mse_tumour=0.1),
        },
        {"subject": "b", "input": "t2/random", **overlap((0.6, 0.5, 0.4), (6, 6, 9), (8, 8, 8)), **errors(0.2, 0.1)},
        {"subject": "c", "input": "real"},
        {
            "subject": "c", "input": "t2/resnet-100-0",
            **overlap((1, 1, 1), (0, 0, 0), (0, 0, 0), "agree_"),
            **errors(0.09, math.nan, unit_mse_brain=0.3, unit_mse_tumour=math.nan),
        },
        {"subject": "c", "input": "t2/random", **errors(0.4, math.nan)},
    ]  # fmt: skip


def cohort(names, n=12, seed=0, segmenter=True):
    """``n`` subjects; later names are worse in Dice and HD95, ``random`` is far off in MSE."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        dice, distance = rng.uniform(0.5, 0.8, size=3), rng.uniform(2, 9, size=3)
        if segmenter:
            rows.append({"subject": f"s{i}", "input": "real", **overlap(dice, distance, 1.2 * distance)})
        for rank, name in enumerate(names):
            level = 0.35 if "random" in name else 0.02
            row = {"subject": f"s{i}", "input": name, **errors(*(level * rng.uniform(0.5, 1.5, size=2)))}
            row |= {"unit_mse_brain": 2 * row["own_mse_brain"], "unit_mse_tumour": 2 * row["own_mse_tumour"]}
            if segmenter:
                worse, farther = 0.02 * rank * rng.uniform(0.5, 1.5, size=3), rank * rng.uniform(0.5, 1.5, size=3)
                row |= overlap(dice - worse, distance + farther, 1.2 * (distance + farther))
                row |= overlap(1 - worse, farther, 1.2 * farther, "agree_")
            rows.append(row)
    return rows
