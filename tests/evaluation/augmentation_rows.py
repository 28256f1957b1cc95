"""Rows of a judgement of augmentation: patients that are noise, with a paper's numbers as their means."""

import numpy as np

LABELS = {"edema": "edema", "necrotic core": "cavity"}
PRINTED = {
    "pix2pix-1.0": {"dice": [0.589, 0.459], "hd95": [13.18, 21.003], "sensitivity": [0.626, 0.419]},
    "samr-1.0": {"dice": [0.794, 0.813], "hd95": [6.049, 1.568], "specificity": [0.997, 0.999]},
    "real": {"dice": [0.646, 0.613]},
}
EXPERIMENTS = [
    {"title": "Exp. 1", "rows": {name: PRINTED[name] for name in ("pix2pix-1.0", "samr-1.0")}},
    {"title": "Exp. 3", "rows": {"real": PRINTED["real"]}},
    {"title": "Exp. 4", "rows": {"no_atlas-1.0": {"dice": [0.677, 0.697]}}},
]
PAPER = {"title": "Guo", "preference": {"title": "Guo, Table 1", "rows": {"real": 100, "SAMR": 72.1}}}
RUNS = ("real", "pix2pix-1.0", "samr-1.0")


def row(patient, name, label, dice, **others):
    """One scan's; what is not given stands for a perfect slice."""
    return {
        **{"subject": f"{patient}_1", "patient": patient, "site": None, "input": name, "label": label, "dice": dice},
        **{"hd95": 5.0, "sensitivity": 0.5, "specificity": 0.99, "one_empty": False, "dice_there": dice},
        **{"slices": 10, "slices_there": 4, "slices_missed": 1, "slices_false": 2},
        **{"slice_dice": 0.7, "slice_hd95": 30.0, "slice_sensitivity": 0.6, "slice_specificity": 0.98},
        **{"slice_dice_there": 0.4, "slice_hd95_both": 3.0, **others},
    }


def cohort(names=RUNS, n=12, seed=0):
    """``n`` patients, whose differences between runs are larger than their noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        level = rng.normal(0, 0.03)
        for name in names:
            for j, label in enumerate(LABELS):
                mean = PRINTED.get(name.partition("#")[0], {"dice": [0.7, 0.7]})["dice"][j]
                dice = mean + level + rng.normal(0, 0.004)
                rows.append(row(f"p{i}", name, label, dice, hd95=40 * (1 - dice), slice_dice=dice / 2))
    return rows
