"""What a variance says, and that what is drawn for it can be drawn again."""

import pytest
import torch

from mrgen.evaluation.swap import Swap
from mrgen.evaluation.swap_tables import swap_tables
from mrgen.metrics.uncertainty import calibration_bins, rank_correlation
from tests.evaluation.tools import MODALITIES, Made, Thresholds, example, run, seeded


def test_a_variance_is_judged_by_the_errors_in_the_brain():
    batches = [example("a"), example("b", seed=1)]
    made = Made("flair", lambda v: v["t2"] + 1, doubt=lambda v: v["t1"].square() + 2)
    swap, _ = run({"flair/x": made, "flair/y": Made("flair", lambda v: v["t2"])}, batches)
    for batch, row in zip(batches, swap.rows[1::3], strict=True):
        brain, tumour = batch["brain"][0], batch["label"][0] > 0
        variance = batch["image"][0, 0].square() + 2
        error = batch["image"][0, 2] + 1 - batch["image"][0, 3]
        assert row["variance_brain"] == pytest.approx(float(variance[brain].mean()))
        assert row["variance_tumour"] == pytest.approx(float(variance[tumour].mean()))
        assert row["rank_correlation"] == pytest.approx(rank_correlation(variance, error.abs(), brain))
        mine = [line for line in swap.calibration if line["subject"] == row["subject"]]
        assert [line["bin"] for line in mine] == list(range(20))
        assert {line["input"] for line in mine} == {"flair/x"}  # the other has no variance
        for i, key in enumerate(("variance", "squared_error", "voxels")):
            expected = calibration_bins(variance, error.square(), brain)[i].tolist()
            assert [line[key] for line in mine] == pytest.approx(expected)


def test_what_is_drawn_depends_on_seed_subject_and_row_and_on_nothing_else():
    """Whatever was judged before, in whichever order and on whichever rank."""
    a, b = example("a"), example("b", seed=1)

    def rows(synthesizers, batches, **settings):
        swap, _ = run(synthesizers, batches, **settings)
        return {(row["subject"], row["input"]): row for row in swap.rows}

    both = {"t1/x": seeded("t1"), "t1/y": seeded("t1")}
    first = rows(both, [a, b])
    torch.rand(7)
    assert rows(both, [b, a]) == first
    alone = rows({"t1/y": seeded("t1")}, [b])
    assert alone == {key: first[key] for key in (("b", "real"), ("b", "t1/y"))}
    drawn = {key: row["mse_brain"] for key, row in first.items() if key[1] != "real"}
    assert drawn[("a", "t1/x")] != drawn[("a", "t1/y")]
    other = rows(both, [a, b], seed=1)
    assert all(other[key]["mse_brain"] != value for key, value in drawn.items())
    # Two subjects of one brain differ by what was drawn.
    twins = rows(both, [a, example("c")])
    assert twins[("a", "t1/x")]["mse_brain"] != twins[("c", "t1/x")]["mse_brain"]


def test_a_swap_leaves_the_global_generator_as_it_was():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    run({"t1/x": seeded("t1")}, [example()], pictured="a")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cohort_with_one_region_and_no_lesion(recwarn):
    batch = example(lesion=False)
    swap = Swap(
        segmenter=Thresholds(),
        synthesizers={"t1/x": seeded("t1")},
        modalities=MODALITIES,
        regions={"WMH": [1]},
        pictured="a",
    )
    swap.test_step(batch, 0)
    swap.on_test_epoch_end()
    tables = swap_tables(swap.rows, regions=["WMH"], title="")
    assert [line[2:] for line in tables["dice"].rows] == [["100.0", "–"]] * 2  # found nowhere, and nowhere there
    assert [line[2:] for line in tables["hd95"].rows] == [["0.0", "–"]] * 2
    assert tables["synthesis"].rows[1] == ["t1", "x", "tumour", "0", *["–"] * 6]
    assert not recwarn.list


def test_a_variance_is_pictured_with_some_voxels_of_the_brain():
    batch = example(size=24)
    made = Made("flair", lambda v: v["t2"], doubt=lambda v: 1 + v["t1"].square())
    swap, _ = run({"flair/x": made, "t1/y": Made("t1", lambda v: v["t2"])}, [batch], pictured="a")
    assert {name: "variance" in kept for name, kept in swap.slices.items()} == {
        "real": False, "flair/x": True, "t1/y": False
    }  # fmt: skip
    kept, z = swap.slices["flair/x"], 3  # the first of the lesion's largest slices
    variance = (1 + batch["image"][0, 0].square()) * batch["brain"][0]  # 0 outside, like the synthesis
    assert torch.equal(kept["variance"], variance[:, :, z])
    error = (batch["image"][0, 2] - batch["image"][0, 3]).abs()
    known = {pair for pair in zip(variance[batch["brain"][0]].tolist(), error[batch["brain"][0]].tolist(), strict=True)}
    seen = list(zip(kept["voxels"]["variance"].tolist(), kept["voxels"]["error"].tolist(), strict=True))
    assert len(seen) == 5000 < len(known)
    assert len(set(seen)) == 5000
    assert set(seen) <= known
    again, _ = run({"flair/x": made}, [batch], pictured="a")
    assert torch.equal(again.slices["flair/x"]["voxels"]["error"], kept["voxels"]["error"])
    small, _ = run({"flair/x": made}, [example()], pictured="a")
    assert len(small.slices["flair/x"]["voxels"]["error"]) == int(example()["brain"].sum())
