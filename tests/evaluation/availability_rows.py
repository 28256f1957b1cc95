"""Rows of an availability study: patients that are noise around a Dice for each row of the table."""

import numpy as np

from tests.evaluation.augmentation_rows import row

REGIONS = ("ET", "WT")
SEQUENCES = ("t1", "flair")
STUDY = {
    "rows": {
        "row-1": {"real": 1.0, "synthetic": 0.0, "enhanced": 0.0, "order": None, "mse": 0.026, "dice": 0.915},
        "row-3": {"real": 0.0, "synthetic": 1.0, "enhanced": 0.0, "order": None, "mse": 0.205, "dice": 0.708},
        "row-12": {"real": 1.0, "synthetic": 0.2, "enhanced": 0.0, "order": "random", "mse": 0.025, "dice": 0.921},
        "row-13": {"real": 1.0, "synthetic": 0.5, "enhanced": 0.0, "order": "random", "mse": 0.023, "dice": 0.939},
        "row-14": {"real": 1.0, "synthetic": 0.8, "enhanced": 0.0, "order": "random", "mse": 0.026, "dice": 0.916},
        "row-19": {"real": 1.0, "synthetic": 0.0, "enhanced": 0.5, "order": "random", "mse": 0.025, "dice": 0.927},
        "row-25": {
            **{"real": 1.0, "synthetic": 1.0, "enhanced": 0.0, "order": "synthetic_first"},
            **{"mse": 0.021, "dice": 0.940},
        },
    },
    "close": 0.015,
    "claims": [["row-3", "<", "row-1"], ["row-12", "~", "row-1"], ["row-12", ">", "row-1"], ["row-9", "<", "row-1"]],
    "peaks": [["row-12", "row-13", "row-14"], ["row-19", "row-20"]],
    "tops": [[["row-12", "row-13", "row-14"], ["row-19"]]],
    "best": ["row-25"],
    "schemes": {
        "real": {"title": "4 SEG", "mse": 0.026, "dice": 0.915},
        "single": {"title": "1 SEG", "mse": 0.053, "dice": 0.741},
    },
    "paper": {"title": "Qu et al.", "caution": "the planning sheet\nhas 0.20 less"},
}
DICE = {name: one["dice"] for name, one in STUDY["rows"].items()}


def index(patient, name, sequence, dice, mse=0.03, slices=50, scan=1):
    """One scan's, of one sequence."""
    who = {"subject": f"{patient}_{scan}", "patient": patient, "site": None, "input": name}
    return {**who, "sequence": sequence, "slices": slices, "index_dice": dice, "index_mse": mse}


def study(names=tuple(DICE), n=8, seed=0, dices=DICE):
    """(rows, indices) of ``n`` patients, whose differences between rows are larger than their noise."""
    rng = np.random.default_rng(seed)
    rows, indices = [], []
    for i in range(n):
        level = rng.normal(0, 0.01)
        for name in names:
            dice = dices[name.partition("#")[0]] + level + rng.normal(0, 0.001)
            rows += [row(f"p{i}", name, region, dice - 0.2) for region in REGIONS]
            indices += [
                index(f"p{i}", name, sequence, dice + shift, (1 - dice) / 3)
                for sequence, shift in zip(SEQUENCES, (-0.01, 0.01), strict=True)
            ]
    return rows, indices
