"""Rows of a cross-validation: a cohort that is noise, with the paper's numbers as its means."""

import numpy as np

PAPER = {
    "title": "Orbes-Arteaga",
    "segmentation": {
        "unimodal": {"dsc": 55.99, "fpr": 78.67, "fnr": 38.06},
        "offline": {"dsc": 54.42, "fpr": 63.50, "fnr": 43.39},
        "joint": {"dsc": 57.81, "fpr": 58.20, "fnr": 41.33},
    },
    "imputation": {"offline": {"mae": 0.3153, "psnr": 9.65}, "joint": {"mae": 0.2566, "psnr": 11.01}},
}
METHODS = ("unimodal", "offline", "joint")
LEVELS = {name: np.array([x["dsc"], x["fpr"], x["fnr"]]) / 100 for name, x in PAPER["segmentation"].items()}
PLACES = [f"fp_{depth}_{side}" for depth in ("periventricular", "cortical", "deep") for side in ("border", "apart")]
SITES = ("Utrecht", "Singapore", "Amsterdam/GE3T")


def cohort(methods=METHODS, n=12, seed=0):
    """``n`` subjects of 3 sites in 6 folds, whose differences between methods are larger than their noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        level = rng.normal(0, 0.1)
        for name in methods:
            dsc, fpr, fnr = (
                LEVELS.get(name.partition("#")[0], np.array([0.7, 0.3, 0.2])) + level + rng.normal(0, 0.004, size=3)
            )
            row = {"subject": f"s{i}", "site": SITES[i % 3], "fold": i % 6, "input": name}
            row |= {"dsc": dsc, "fpr": abs(fpr), "fnr": abs(fnr), "fdr": 0.4, "lesion_f1": 0.5, "lesion_recall": 0.6}
            row |= {"lesion_fpr": 0.3, "hd95": 20 + level, "avd": 0.8, "reference_ml": 9.0, "predicted_ml": 11.0}
            row |= {key: (j + 1) / 10 for j, key in enumerate(PLACES)}
            if name.partition("#")[0] in PAPER["imputation"]:
                mae = PAPER["imputation"][name.partition("#")[0]]["mae"] + 0.01 * level + rng.normal(0, 0.004)
                row |= {"mae": mae, "psnr": 20 - 34 * mae, "ssim": 1 - mae, "psnr_own": 40 - 34 * mae}
                row |= {"mae_brain": 2 * mae, "psnr_brain": 14 - 34 * mae, "ssim_brain": 1 - 2 * mae}
            rows.append(row)
    return rows


def lesion(subject, volume_ml, found, share=None, method="joint"):
    share = float(found) if share is None else share
    return {"subject": subject, "input": method, "volume_ml": volume_ml, "found": found, "share": share}
