import json
import random
from collections import Counter
from dataclasses import dataclass

import pytest

from mrgen.data.splits import Split, explicit_split, fold_split, make_split, ratio_split
from mrgen.errors import UserError


@dataclass(frozen=True)
class Scan:
    id: str
    patient: str
    grade: str | None = None
    site: str | None = None


def one_each(number, **fields):
    return [Scan(f"s{i:03}", f"p{i:03}", **fields) for i in range(number)]


WMH = [Scan(f"{site}{i:02}", f"{site}{i:02}", site=site) for site in ("ams", "sin", "utr") for i in range(20)]
GRADES = [Scan(f"s{i:03}", f"p{i:03}", grade="HGG" if i < 210 else "LGG") for i in range(285)]
VISITS = [Scan(f"p{i:02}_v{v}", f"p{i:02}", grade="HGG") for i in range(40) for v in range(1 + i % 4)]


def sets(split):
    return split.train, split.val, split.test


def assert_partition(split, subjects):
    ids = [subject for part in sets(split) for subject in part]
    assert sorted(ids) == sorted(s.id for s in subjects)
    patient = {s.id: s.patient for s in subjects}
    train, val, test = ({patient[i] for i in part} for part in sets(split))
    assert not train & val
    assert not train & test
    assert not val & test


# -- ratio ------------------------------------------------------------------------------------------------------------


def test_ratio_gives_the_sizes_of_the_paper():
    assert [len(part) for part in sets(ratio_split(GRADES))] == [228, 57, 0]
    assert [len(part) for part in sets(ratio_split(one_each(90), (0.8, 0.0, 0.2)))] == [72, 0, 18]


@pytest.mark.parametrize("seed", range(5))
def test_ratio_keeps_visits_of_a_patient_together(seed):
    split = ratio_split(VISITS, (0.5, 0.25, 0.25), seed=seed)
    assert_partition(split, VISITS)
    patient = {s.id: s.patient for s in VISITS}
    assert [len({patient[i] for i in part}) for part in sets(split)] == [20, 10, 10]


def test_ratio_depends_on_the_seed_and_not_on_the_order():
    shuffled = random.Random(0).sample(VISITS, len(VISITS))
    assert ratio_split(shuffled, seed=3) == ratio_split(VISITS, seed=3)
    assert ratio_split(VISITS, seed=4) != ratio_split(VISITS, seed=3)


def test_a_patient_whose_visits_differ_takes_the_grade_of_the_first_by_id():
    # First visits: two of eight are HGG. Second visits: all of them.
    visits = [Scan(f"p{i}_v{v}", f"p{i}", grade="HGG" if v or i < 2 else "LGG") for i in range(8) for v in range(2)]
    for seed in range(5):
        split = ratio_split(visits, (0.5, 0.0, 0.5), seed=seed, stratify="grade")
        assert len({"p0_v0", "p1_v0"} & set(split.test)) == 1
        assert ratio_split(visits[::-1], (0.5, 0.0, 0.5), seed=seed, stratify="grade") == split


def test_the_split_of_a_seed_stays_what_it_was():
    # A change here changes the test patients of every published run.
    assert ratio_split(one_each(8), (0.5, 0.25, 0.25), seed=0) == Split(
        train=("s002", "s005", "s006", "s007"), val=("s001", "s003"), test=("s000", "s004")
    )


@pytest.mark.parametrize("seed", range(4))
def test_ratio_stratified_keeps_the_proportions(seed):
    grade = {s.id: s.grade for s in GRADES}
    split = ratio_split(GRADES, (0.7, 0.1, 0.2), seed=seed, stratify="grade")
    assert_partition(split, GRADES)
    for part in sets(split):
        assert Counter(grade[i] for i in part)["HGG"] == pytest.approx(len(part) * 210 / 285, abs=1)


def test_an_unstratified_split_does_not_keep_them_by_accident():
    grade = {s.id: s.grade for s in GRADES}
    counts = {Counter(grade[i] for i in ratio_split(GRADES, seed=s).val)["HGG"] for s in range(10)}
    assert len(counts) > 3
    assert {Counter(grade[i] for i in ratio_split(GRADES, seed=s, stratify="grade").val)["HGG"] for s in range(10)} == {
        42
    }


def test_a_small_fraction_still_gets_a_patient():
    assert [len(part) for part in sets(ratio_split(one_each(3), (0.98, 0.01, 0.01)))] == [1, 1, 1]
    assert [len(part) for part in sets(ratio_split(one_each(2), (0.0, 0.0, 1.0)))] == [0, 0, 2]


def test_too_few_patients():
    visits = [Scan("a", "p"), Scan("b", "p"), Scan("c", "q")]
    with pytest.raises(UserError, match=r"found 2 patient.* needed 3: one each for train, val, test"):
        ratio_split(visits, (0.6, 0.2, 0.2))
    with pytest.raises(UserError, match="no subjects"):
        ratio_split([], (0.6, 0.2, 0.2))


@pytest.mark.parametrize("fractions", [(0.8, 0.3, 0.0), (1.2, -0.2, 0.0), (0.8, 0.2), (float("nan"), 0.5, 0.5)])
def test_fractions_must_sum_to_one(fractions):
    with pytest.raises(UserError, match="sum to 1, found"):
        ratio_split(one_each(10), fractions)


def test_stratum_that_nobody_has_and_stratum_that_does_not_exist():
    with pytest.raises(UserError, match="no subject has one"):
        ratio_split(one_each(10), stratify="site")
    with pytest.raises(UserError, match=r"'age'\. Valid: null, grade, site"):
        ratio_split(one_each(10), stratify="age")


def test_repeated_ids_are_named():
    with pytest.raises(UserError, match="more than once: s003"):
        ratio_split([*one_each(10), Scan("s003", "other")])


# -- folds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_wmh_in_six_folds(seed):
    """Orbes-Arteaga et al.: 10 test, 5 validation, 45 train; by site 3 + 3 + 4 and 2 + 2 + 1, going round."""
    site = {s.id: s.site for s in WMH}
    tested, four, one = [], [], []
    for fold in range(6):
        split = fold_split(WMH, 6, fold, seed=seed, val_count=5, stratify="site")
        assert_partition(split, WMH)
        assert [len(part) for part in sets(split)] == [45, 5, 10]
        test, val = (Counter(site[i] for i in part) for part in (split.test, split.val))
        assert sorted(test.values()) == [3, 3, 4]
        assert sorted(val.values()) == [1, 2, 2]
        four += [name for name, number in test.items() if number == 4]
        one += [name for name, number in val.items() if number == 1]
        tested += split.test
    assert sorted(tested) == sorted(s.id for s in WMH)
    assert Counter(four) == {"ams": 2, "sin": 2, "utr": 2}
    assert one == four  # the site that tests one more validates one less: each trains with 15


def test_tied_remainders_of_the_validation_set_go_round_too():
    subjects = [s for s in WMH if int(s.id[3:]) < 18]  # 3 of each site are tested, 15 remain: 5 is 1.67 each
    site = {s.id: s.site for s in subjects}
    counts = [
        Counter(site[i] for i in fold_split(subjects, 6, fold, val_count=5, stratify="site").val) for fold in range(6)
    ]
    assert Counter(min(c, key=c.get) for c in counts) == {"ams": 2, "sin": 2, "utr": 2}


@pytest.mark.parametrize("folds", [2, 3, 7, 40])
def test_folds_cover_every_subject_once_and_keep_visits_together(folds):
    tested = []
    for fold in range(folds):
        split = fold_split(VISITS, folds, fold, val_fraction=0.1 if folds < 40 else 0)
        assert_partition(split, VISITS)
        assert split.test
        assert bool(split.val) == (folds < 40)
        tested += split.test
    assert sorted(tested) == sorted(s.id for s in VISITS)


def test_folds_depend_on_the_seed_and_not_on_the_order():
    shuffled = random.Random(0).sample(WMH, len(WMH))
    arguments = {"val_fraction": 0.1, "stratify": "site"}
    assert fold_split(shuffled, 6, 2, seed=1, **arguments) == fold_split(WMH, 6, 2, seed=1, **arguments)
    assert fold_split(WMH, 6, 2, seed=2, **arguments) != fold_split(WMH, 6, 2, seed=1, **arguments)


def test_validation_patients_differ_between_folds():
    vals = [frozenset(fold_split(WMH, 6, fold, val_count=5).val) for fold in range(6)]
    assert len(frozenset.union(*vals)) > 15  # of 30 places; without a draw of its own per fold it would be about 6


def test_fold_errors():
    with pytest.raises(UserError, match="fold must be from 0 to 5 with 6 folds; found 6"):
        fold_split(WMH, 6, 6)
    with pytest.raises(UserError, match="found -1"):
        fold_split(WMH, 6, -1)
    with pytest.raises(UserError, match="number of patients, 4; found 5"):
        fold_split(one_each(4), 5, 0)
    with pytest.raises(UserError, match="found 1"):
        fold_split(one_each(4), 1, 0)
    with pytest.raises(UserError, match="leave none to train on"):
        fold_split(one_each(4), 2, 0, val_count=2)
    with pytest.raises(UserError, match=r"val_fraction=0\.1 and val_count=2"):
        fold_split(one_each(40), 2, 0, val_count=2, val_fraction=0.1)


# -- explicit lists and files -----------------------------------------------------------------------------------------


def test_explicit_keeps_the_lists():
    split = explicit_split(["b", "a"], [], ["c"], known_ids=["a", "b", "c", "d"])
    assert split == Split(train=("b", "a"), val=(), test=("c",))


def test_unknown_ids_are_named_the_first_few():
    train = [f"x{i}" for i in range(8)]
    with pytest.raises(UserError, match="8 of 9 subjects are unknown: x0, x1, x2, x3, x4 and 3 more"):
        explicit_split(train, ["a"], [], known_ids=["a"])


def test_overlaps_are_named_with_their_sets():
    with pytest.raises(UserError, match=r"a \(in train and test\), b \(in val and val\)"):
        explicit_split(["a", "c"], ["b", "b"], ["a"], known_ids=["a", "b", "c"])


@pytest.mark.parametrize(("train", "found"), [("abc", "'abc'"), ([12, "a"], "12"), (0.2, "0.2")])
def test_lists_that_yaml_got_wrong(train, found):
    with pytest.raises(UserError, match=found):
        explicit_split(train, [], [], known_ids=["a", "abc"])


def test_save_and_load(tmp_path):
    split = ratio_split(VISITS, (0.5, 0.25, 0.25))
    path = tmp_path / "new" / "split.json"
    split.save(path)
    split.save(str(path))  # overwrites
    assert Split.load(path) == split
    assert set(json.loads(path.read_text())) == {"train", "val", "test"}
    assert [p.name for p in path.parent.iterdir()] == ["split.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "split.json"
    old = Split(("a",), (), ())
    old.save(path)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        Split(("b",), (), ()).save(path)
    assert Split.load(path) == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "cannot be read"),
        ("{", "found no JSON"),
        ("[]", "found list"),
        ('{"train": []}', "found train"),
        ('{"train": "a", "val": [], "test": []}', "list of subject ids"),
    ],
)
def test_files_that_are_no_split(tmp_path, content, found):
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=found):
        Split.load(path)


# -- from a conf ------------------------------------------------------------------------------------------------------


def test_conf_ratio():
    assert make_split(GRADES, {}) == ratio_split(GRADES)
    conf = {"kind": "ratio", "val": 0.1, "test": 0.2, "seed": 5, "stratify": "grade"}
    assert make_split(GRADES, conf) == ratio_split(GRADES, (0.7, 0.1, 0.2), seed=5, stratify="grade")
    assert make_split(GRADES, {"val": 0.8, "test": 0.2}).train == ()


def test_conf_folds():
    conf = {"kind": "folds", "folds": 6, "fold": 4, "val": 5, "stratify": "site", "seed": 2}
    assert make_split(WMH, conf) == fold_split(WMH, 6, 4, seed=2, val_count=5, stratify="site")
    assert make_split(WMH, conf | {"val": 0.1}) == fold_split(WMH, 6, 4, seed=2, val_fraction=0.1, stratify="site")
    assert make_split(WMH, conf | {"val": 0}).val == ()


BY_SITE = {"kind": "folds", "folds": 6, "val": 5, "stratify": "site", "sites": ["utr", "sin", "ams"]}


def test_conf_sites_that_are_there_change_nothing():
    assert make_split(WMH, BY_SITE) == make_split(WMH, BY_SITE | {"sites": None})
    assert make_split(WMH, BY_SITE | {"sites": ["utr"]}) == make_split(WMH, BY_SITE)  # others may be there as well


def test_conf_sites_without_subjects_are_named():
    """Of one archive that was not unpacked, folds of the two others could be made and nobody would notice."""
    two = [s for s in WMH if s.site != "sin"]
    message = (
        r"data\.split\.sites expects utr, sin, ams, found ams \(20\), utr \(20\), none of sin\. "
        r"Unpack and prepare them, or set data\.split\.sites to null\."
    )
    with pytest.raises(UserError, match=message):
        make_split(two, BY_SITE)
    assert make_split(two, BY_SITE | {"sites": None}).test


def test_conf_sites_are_those_of_folds_by_site():
    two = [s for s in WMH if s.site != "sin"]
    assert make_split(two, BY_SITE | {"stratify": None}) == fold_split(two, 6, 0, val_count=5)
    assert make_split(two, {"kind": "ratio", "sites": BY_SITE["sites"]}) == ratio_split(two)


def test_conf_explicit_and_file(tmp_path):
    conf = {"kind": "explicit", "train": ["s000", "s001"], "val": ["s002"], "test": 0.0}
    split = make_split(one_each(5), conf)
    assert split == Split(("s000", "s001"), ("s002",), ())
    split.save(tmp_path / "split.json")
    assert make_split(one_each(5), {"kind": "file", "file": tmp_path / "split.json"}) == split
    with pytest.raises(UserError, match="unknown: s002"):
        make_split(one_each(2), {"kind": "file", "file": tmp_path / "split.json"})
    with pytest.raises(UserError, match="needs `file`"):
        make_split(one_each(5), {"kind": "file"})


def test_conf_group_with_all_keys_serves_every_kind(tmp_path):
    everything = {
        "seed": 0, "val": 0.2, "test": 0.0, "stratify": None, "folds": 6, "fold": 0, "train": None, "file": None,
        "sites": None,
    }  # fmt: skip
    assert make_split(WMH, {"kind": "ratio", **everything}) == ratio_split(WMH)
    assert make_split(WMH, {"kind": "folds", **everything}) == fold_split(WMH, 6, 0, val_fraction=0.2)
    ratio_split(WMH).save(tmp_path / "s.json")
    assert make_split(WMH, everything | {"kind": "file", "file": str(tmp_path / "s.json")}) == ratio_split(WMH)


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"kind": "random"}, "unknown kind 'random'. Valid: ratio, folds, explicit, file"),
        ({"kind": "folds", "flod": 1}, "flod. Valid for folds: kind, seed, val, stratify, sites, folds, fold"),
        ({"kind": "ratio", "fold": 3}, "fold=3 has no effect on kind ratio"),
        ({"kind": "folds", "fold": 6}, "fold must be from 0 to 5"),
        ({"kind": "folds", "fold": "all"}, "fold must be a whole number, found 'all'"),
        ({"kind": "folds", "val": 1.0}, "from 0 to below 1"),
        ({"kind": "ratio", "val": 5}, "sum to 1, found -4, 5, 0"),
        ({"kind": "ratio", "val": ["s000"]}, "val must be a number.* kind explicit"),
        ({"kind": "explicit", "train": ["s000"], "val": 0.2}, r"val must be a list.*found 0\.2"),
    ],
)
def test_conf_errors(conf, message):
    with pytest.raises(UserError, match=message):
        make_split(one_each(10), conf)


def test_conf_lists_may_not_part_the_visits_of_a_patient():
    with pytest.raises(UserError, match=r"p02 \(in train and test\)"):
        make_split(VISITS, {"kind": "explicit", "train": ["p01_v0", "p02_v0"], "val": [], "test": ["p02_v1"]})
