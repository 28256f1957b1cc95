"""Synthetic cohorts: whose brain and whose lesion, and that a store gives back what the generator made."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from raw_scans import LAYOUTS, ellipsoid, lesion, scan

from mrgen.data.generated import (
    Planned,
    draw_lesion,
    generator_seed,
    maps_of,
    own_numbers,
    plan_subjects,
    prepared_digest,
    read_generated,
    synthetic_layout,
    write_generated,
    write_synthetic,
)
from mrgen.data.guides import label_maps
from mrgen.data.layouts import read_layouts
from mrgen.data.lesions import KINDS
from mrgen.data.normalisation import MinMax, Symmetric, known_ends, stored_statistics
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.errors import UserError
from mrgen.protocols import Generated

SHIPPED = read_layouts(LAYOUTS)
AFFINE = np.array([[0, -2.0, 0, 5], [3.0, 0, 0, -7], [0, 0, 4.0, 11], [0, 0, 0, 1]])
SCALE = {"t1": [300.0, 300.0], "flair": [450.0, 450.0]}
CUT = SiteSlices(size=[24, 16], dropped_elsewhere=0.1, step=3)  # of 16 × 18 × 20 voxels: z = 2, 5, … 17


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Patients P (two visits), Q and R with lesions, and S with none; R's voxels have another size."""
    folder = tmp_path_factory.mktemp("real")
    write_cohort(folder, SHIPPED["brats2019"], list(SCALE))
    arrays = {"image": np.stack([scan(1), scan(2)]), "brain": ellipsoid(), "affine": AFFINE, "site": "here"}
    for id, label in (("P_1", lesion()), ("P_2", lesion()), ("Q_1", lesion((1, 1, 2))), ("S_1", lesion(()))):
        write_subject(folder, id=id, patient=id[0], label=label, grade="LGG" if id == "Q_1" else "HGG", **arrays)
    write_subject(folder, id="R_1", patient="R", label=lesion(), **{**arrays, "affine": np.diag([1.0, 1, 1, 1])})
    return Store(folder)


@pytest.fixture(scope="module")
def lookup(real):
    return real.layout.label_lookup("regions")


def planned(real, id, number=0, kept=None):
    subject = real.subjects[id]
    x, y, _ = CUT.box(subject.shape, subject.site)
    z = CUT.training(subject.shape, subject.site)
    return Planned(number, subject, (x, y, (z.start, z.stop)), z, tuple(range(len(z))) if kept is None else kept)


# ----- which subjects ------------------------------------------------------------------------------------------------


def test_every_brain_is_taken_once_before_one_is_taken_again(real):
    training = list(real.subjects.values())
    plan = plan_subjects(training, CUT, seed=1, subjects=13)
    ids = [subject.anatomy.id for subject in plan]
    assert [subject.number for subject in plan] == list(range(13))
    assert set(ids[:5]) == set(ids[5:10]) == set(real.subjects)
    assert ids[:5] != ids[5:10]
    assert plan_subjects(training[::-1], CUT, seed=1, subjects=7) == plan[:7]  # whatever the order they come in
    assert plan_subjects(training, CUT, seed=2, subjects=13) != plan
    assert plan[3].id == f"syn0003_{ids[3]}"
    assert plan[0].slices == [2, 5, 8, 11, 14, 17]
    assert plan[0].box == ((-4, 20), (1, 17), (2, 18))


def test_so_many_slices_are_whole_subjects_and_evenly_spread_ones_of_the_last(real):
    training = list(real.subjects.values())
    plan = plan_subjects(training, CUT, seed=1, slices=15)
    assert [len(subject.kept) for subject in plan] == [6, 6, 3]
    assert plan[:2] == plan_subjects(training, CUT, seed=1, subjects=2)
    assert plan[2].slices == [5, 11, 17]
    assert [len(subject.kept) for subject in plan_subjects(training, CUT, seed=1, slices=12)] == [6, 6]
    assert plan_subjects(training, CUT, seed=1, slices=1)[0].slices == [11]


# ----- whose lesion --------------------------------------------------------------------------------------------------


def test_later_subjects_take_the_place_of_those_that_cannot_be_made(real):
    """And keep their own number, of which all depends that is drawn."""
    training = list(real.subjects.values())
    plan = plan_subjects(training, CUT, seed=1, subjects=8)
    without = {plan[1].id, plan[6].id}
    left = [planned for planned in plan if planned.id not in without]
    assert plan_subjects(training, CUT, seed=1, subjects=6, without=without) == left
    trimmed = plan_subjects(training, CUT, seed=1, slices=15, without=without)
    assert [len(planned.kept) for planned in trimmed] == [6, 6, 3]
    assert [planned.id for planned in trimmed] == [planned.id for planned in left[:3]]


def test_a_transplanted_lesion_is_another_patients_and_says_whose(real, lookup):
    """P's other visit has P's lesion, R's voxels have another size, and S has no lesion to give: Q is left."""
    drawn = draw_lesion(planned(real, "P_1"), list(real.subjects.values()), lookup, kinds=["transplant"], seed=0)
    assert (drawn.manipulation, drawn.subject.id) == ("transplant", "Q_1")
    assert set(np.unique(drawn.label)) == {0, 1, 2}  # Q's classes, without P's 3
    alone = draw_lesion(planned(real, "R_1"), list(real.subjects.values()), lookup, kinds=["transplant"], seed=0)
    assert (alone.manipulation, alone.subject.id) == (None, "R_1")
    np.testing.assert_array_equal(alone.label, lookup[real.subjects["R_1"].read_label()])


def test_a_lesion_depends_on_seed_and_number_alone(real, lookup):
    training = list(real.subjects.values())

    def drawn(seed, number):
        found = draw_lesion(planned(real, "P_1", number), training, lookup, kinds=KINDS, seed=seed)
        return found.manipulation, found.subject.id, found.label.tobytes()

    several = [drawn(0, number) for number in range(12)]
    assert several == [drawn(0, number) for number in range(12)]
    assert len({kind for kind, _, _ in several}) >= 3
    assert drawn(1, 0) != several[0] or drawn(1, 1) != several[1]
    seeds = [generator_seed(planned(real, "P_1", number), 0) for number in range(5)]
    assert len(set(seeds)) == 5


def test_labels_stay_as_they_are_where_nothing_may_or_can_be_done(real, lookup):
    training = list(real.subjects.values())
    for id, kinds in (("P_1", []), ("S_1", KINDS)):
        found = draw_lesion(planned(real, id), training, lookup, kinds=kinds, seed=0)
        assert (found.manipulation, found.subject.id) == (None, id)
        np.testing.assert_array_equal(found.label, lookup[real.subjects[id].read_label()])


def test_the_generator_gets_the_slices_of_training_with_the_new_labels(real, lookup):
    """Boxes exceed the scan along x and cut it along y."""
    place = planned(real, "P_1")
    as_it_was = draw_lesion(place, [], lookup, kinds=[], seed=0)
    found, expected = maps_of(place, as_it_was, lookup, {}), label_maps(place.anatomy, place.box, lookup, {}, 3)
    assert found.label.shape == found.brain.shape == (6, 24, 16)
    assert found.label.dtype == torch.int64
    torch.testing.assert_close(found.label, expected.label)
    torch.testing.assert_close(found.brain, expected.brain)
    assert found.label.any()

    moved = draw_lesion(place, [], lookup, kinds=["move"], seed=0)
    by_hand = np.zeros((24, 16, 6), np.uint8)
    by_hand[4:20] = moved.label[:, 1:17, 2:18:3]
    np.testing.assert_array_equal(maps_of(place, moved, lookup, {}).label.permute(1, 2, 0), by_hand)


# ----- what the store holds ------------------------------------------------------------------------------------------


@pytest.fixture
def made(real, lookup):
    """A generator's answer: noise, inside the brain and out of it, at both ends of the scale too."""
    place = planned(real, "P_1")
    lesion = draw_lesion(place, list(real.subjects.values()), lookup, kinds=["transplant"], seed=0)
    maps = maps_of(place, lesion, lookup, {})
    image = torch.tanh(3 * torch.randn(6, 2, 24, 16, generator=torch.Generator().manual_seed(0)))
    return place, lesion, Generated(image, maps.label, maps.brain)


def written(folder, real, lookup, place, lesion, made):
    write_cohort(folder, synthetic_layout(real.layout), list(SCALE))
    known = known_ends(list(real.subjects.values()), SCALE, Symmetric.top)
    write_synthetic(folder, place, lesion, made, scale=SCALE, numbers=own_numbers(lookup), known=known)
    store = Store(folder)
    return store, store.subjects[place.id]


def test_symmetric_reads_back_what_the_generator_made(tmp_path, real, lookup, made):
    """Intensities are on the scale of the training cohort, and not on the percentile that the image happens to have."""
    store, subject = written(tmp_path, real, lookup, *made)
    _, _, synthetic = made
    brain = torch.from_numpy(subject.read_brain())
    read = Symmetric()(torch.from_numpy(subject.read_image()), brain, stored_statistics(Symmetric(), subject, SCALE))
    expected = torch.where(synthetic.brain[:, None], synthetic.image, -1.0).permute(1, 2, 3, 0)
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-6)
    assert subject.read_image().dtype == np.float32
    assert not subject.read_image()[:, ~brain.numpy()].any()
    assert [subject.statistics[name]["p99_5"] for name in SCALE] == [600, 900]
    assert store.modalities == tuple(SCALE)
    assert subject.shape == (24, 16, 6)


def test_labels_are_the_cohorts_own_numbers(tmp_path, real, lookup, made):
    place, lesion, synthetic = made
    synthetic.label[2:5, 12, 8] = torch.tensor([1, 2, 3])  # 3 is enhancing, for which BraTS writes 4
    store, subject = written(tmp_path, real, lookup, place, lesion, synthetic)
    assert (store.name, store.layout.classes) == ("synthetic", real.layout.classes)
    assert set(subject.label_counts) == {0, 1, 2, 4}
    np.testing.assert_array_equal(
        store.layout.label_lookup("regions")[subject.read_label()], synthetic.label.permute(1, 2, 0)
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_every_class_of_a_shipped_layout_has_a_number_that_maps_to_it(name):
    lookup = SHIPPED[name].label_lookup("regions")
    numbers = own_numbers(lookup)
    np.testing.assert_array_equal(lookup[numbers[lookup]], lookup)
    assert numbers[0] == 0
    assert set(numbers) <= set(SHIPPED[name].label_values)


def test_ignored_voxels_stay_ignored():
    assert own_numbers(SHIPPED["wmh2017"].label_lookup("regions"))[[0, 1, 255]].tolist() == [0, 1, 2]
    assert own_numbers(SHIPPED["brats2015"].label_lookup("regions"))[1] == 1  # of necrosis and non-enhancing, the less


def test_a_voxel_keeps_its_place_in_the_world(tmp_path, real, lookup, made):
    """The box begins 4 voxels before the scan along x; slices are 3 apart."""
    _, subject = written(tmp_path, real, lookup, *made)
    np.testing.assert_allclose(subject.affine @ [5, 6, 4, 1], AFFINE @ [5 - 4, 6 + 1, 2 + 3 * 4, 1])
    assert subject.spacing == pytest.approx((3, 2, 12))


def test_of_slices_left_out_the_mean_gap_counts(tmp_path, real, lookup, made):
    _, lesion, synthetic = made
    kept = (0, 2, 5)
    _, subject = written(tmp_path, real, lookup, planned(real, "P_1", kept=kept), lesion, synthetic)
    assert subject.shape == (24, 16, 3)
    assert subject.spacing[2] == pytest.approx(4 * 7.5)  # z = 2, 8, 17
    read = subject.read_brain()
    np.testing.assert_array_equal(read, synthetic.brain[list(kept)].permute(1, 2, 0))


def test_a_subject_is_filed_under_the_patient_whose_lesion_it_has(tmp_path, real, lookup, made):
    _, subject = written(tmp_path, real, lookup, *made)
    assert (subject.id, subject.patient, subject.grade, subject.site) == ("syn0000_P_1", "Q", "LGG", "here")
    source = json.loads((subject.path / "subject.json").read_text())["source"]
    assert source == {
        "number": 0,
        "anatomy": "P_1",
        "lesion": "Q_1",
        "manipulation": "transplant",
        "slices": [2, 5, 8, 11, 14, 17],
    }


def test_what_a_generator_tells_of_its_slices_is_kept_with_them(tmp_path, real, lookup, made):
    """Structure maps lie beside the image, records go with the slices, and 1 is where MinMax has it."""
    _, lesion, synthetic = made
    edges = torch.rand(6, 24, 16, generator=torch.Generator().manual_seed(1)) > 0.8
    told = [{"dice": k / 10} for k in range(6)]
    unit = replace(synthetic, image=synthetic.image.abs(), structure=edges, records=told, filters={"kept": 6})
    scale, kept = {"t1": [0.0, 712.5], "flair": [0.0, 321.3]}, [0, 2, 5]
    write_cohort(tmp_path, synthetic_layout(real.layout), list(scale))
    place = planned(real, "P_1", kept=tuple(kept))
    training = list(real.subjects.values())
    known = known_ends(training, scale, MinMax.top)
    subject = write_synthetic(tmp_path, place, lesion, unit, scale=scale, numbers=own_numbers(lookup), known=known)
    np.testing.assert_array_equal(subject.read_structure(), edges[kept].permute(1, 2, 0))
    np.testing.assert_array_equal(
        subject.read_structure(((2, 9), (0, 5), (1, 2))), edges[2:3, 2:9, :5].permute(1, 2, 0)
    )
    assert subject.statistics["t1"]["max"] == 712.5
    brain = torch.from_numpy(subject.read_brain())
    read = MinMax()(torch.from_numpy(subject.read_image()), brain, stored_statistics(MinMax(), subject, scale))
    torch.testing.assert_close(read, unit.image[kept].permute(1, 2, 3, 0) * brain, rtol=0, atol=1e-6)
    high = {name: np.mean([real.statistics[name]["p99_5"] for real in training]) for name in scale}
    assert {name: subject.statistics[name]["p99_5"] for name in scale} == pytest.approx(high)  # on other scales
    source = json.loads((subject.path / "subject.json").read_text())["source"]
    assert (source["records"], source["filters"]) == ([told[k] for k in kept], {"kept": 6})
    with pytest.raises(UserError, match="P_1 has no structure maps"):
        real.subjects["P_1"].read_structure()


# ----- generated.json ------------------------------------------------------------------------------------------------

TABLE = {
    "complete": True,
    "method": "samr",
    "checkpoint": "sha256:0",
    "store": "brats2019",
    "patients": ["P"],
    "subjects": 2,
    "slices": 12,
    "manipulations": ["move"],
    "seed": 1,
}


def test_the_table_is_read_back_and_a_real_store_has_none(tmp_path, real):
    assert read_generated(real.path) is None
    assert read_generated(tmp_path / "nowhere") is None
    write_generated(tmp_path, TABLE)
    assert read_generated(tmp_path) == {"version": 1, **TABLE}
    assert [path.name for path in tmp_path.iterdir()] == ["generated.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "expected a synthetic cohort's table"),
        ("[]", "expected a synthetic cohort's table"),
        (json.dumps({"version": 2, **TABLE}), "found version 2, expected version 1"),
        (json.dumps({"version": 1, "method": "samr"}), "found version 1 without complete, checkpoint"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, content, said):
    (tmp_path / "generated.json").write_text(content)
    with pytest.raises(UserError, match=said):
        read_generated(tmp_path)


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "nowhere").write_text("a file")
    with pytest.raises(UserError, match=r"nowhere/generated\.json: cannot be written"):
        write_generated(tmp_path / "nowhere", TABLE)


def test_subjects_prepared_anew_are_noticed(real, tmp_path):
    subjects = list(real.subjects.values())
    assert prepared_digest(subjects) == prepared_digest(subjects[::-1])
    write_cohort(tmp_path, real.layout, real.modalities)
    copy = [
        write_subject(tmp_path, id=s.id, image=s.read_image(), brain=s.read_brain(), affine=s.affine) for s in subjects
    ]
    assert prepared_digest(copy) != prepared_digest(subjects)
