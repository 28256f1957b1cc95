"""mrgen-synthesize of a generator: a synthetic cohort, made once and read like any other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mrgen.callbacks.provenance import KEY
from mrgen.data.generated import read_generated
from mrgen.data.guides import label_maps
from mrgen.data.normalisation import Symmetric, stored_statistics
from mrgen.data.store import Store
from mrgen.errors import UserError
from mrgen.launch.runs import load_run
from mrgen.launch.synthesis import generating
from mrgen.launch.synthesis.synthesizing import synthesize
from mrgen.launch.training import build_datamodule, fill_from_store, train
from tests.launch.tools import CPU, Called, composed, tiny_run

Script = Callable[..., Called]
SAMR = (
    *("experiment=samr/samr", "data=phantom", "data.split.val=0", "data.split.test=0.25", "data.split.stratify=null"),
    *("data.sampling.size=[32,48]", "data.sampling.step=5", "data.batch_size=2", "data.steps_per_epoch=2"),
    *("model.filters=2", "model.downs=2", "model.blocks=1", "model.discriminator_filters=2"),
    *("model.unet_filters=2", "model.unet_downs=2", "trainer.max_epochs=1", *CPU),
)
ASIS = "manipulations=[]"


@pytest.fixture(scope="module")
def samr_run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SAMR, trained for two steps on six subjects. Read only."""
    run = tmp_path_factory.mktemp("samr") / "run"
    run.mkdir()
    return train(composed("train", *SAMR, f"data.store='{phantom_store}'"), run)


def made(run: Path, output: Path, *overrides: str) -> Store:
    paths = (f"checkpoint='{run}'", f"output='{output}'")
    assert synthesize(composed("synthesize", *paths, "device=cpu", "precision=32-true", *overrides)) == 0
    return Store(output)


def arrays(store: Store) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in store.path.rglob("*.npy")}


def times(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.rglob("*")}


def sources(store: Store) -> list[dict]:
    return [json.loads((s.path / "subject.json").read_text())["source"] for s in store.subjects.values()]


# ----- what is made --------------------------------------------------------------------------------------------------


def test_a_cohort_is_what_the_generator_makes_of_training_labels(samr_run: Path, phantom_store: Path, tmp_path: Path):
    """By hand: the run's atlas, its network, its cut; read back on the generator's own scale."""
    run, real = load_run(samr_run), Store(phantom_store)
    store = made(samr_run, tmp_path / "out", ASIS)
    assert (len(store), store.modalities) == (len(run.split.train), run.model.modalities)
    assert sorted(source["anatomy"] for source in sources(store)) == sorted(run.split.train)
    lookup = real.layout.label_lookup("regions")
    for subject, source in zip(store.subjects.values(), sources(store), strict=True):
        anatomy = real.subjects[source["anatomy"]]
        z = run.slices.training(anatomy.shape, anatomy.site)
        x, y, _ = run.slices.box(anatomy.shape, anatomy.site)
        maps = label_maps(anatomy, (x, y, (z.start, z.stop)), lookup, run.guides, step=5)
        image = run.model.generate_slices(maps.label, maps.brain, maps.guides["atlas"])
        expected = torch.where(maps.brain[:, None], image, -1.0).permute(1, 2, 3, 0)
        brain = torch.from_numpy(subject.read_brain())
        known = stored_statistics(Symmetric(), subject, store.modalities)
        read = Symmetric()(torch.from_numpy(subject.read_image()), brain, known)
        torch.testing.assert_close(read, expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(lookup[subject.read_label()], maps.label.permute(1, 2, 0))
        assert (source["slices"], subject.patient) == (list(z), anatomy.patient)
    means = [np.mean([real.subjects[id].statistics[m]["p99_5"] for id in run.split.train]) for m in store.modalities]
    assert [next(iter(store.subjects.values())).statistics[m]["p99_5"] for m in store.modalities] == pytest.approx(
        means
    )


def test_the_table_says_what_it_was_made_from(samr_run: Path, phantom_store: Path, tmp_path: Path, capsys):
    store = made(samr_run, tmp_path / "out", "subjects=4", "seed=3", "manipulations=[move,mirror]")
    run, table = load_run(samr_run), read_generated(store.path)
    assert table is not None
    real = Store(phantom_store).subjects
    assert table["patients"] == sorted({real[id].patient for id in run.split.train})
    assert table["checkpoint"] == f"sha256:{run.digest()}"
    total = sum(subject.shape[2] for subject in store.subjects.values())
    said = ("complete", "method", "store", "subjects", "slices", "manipulations", "seed")
    assert [table[key] for key in said] == [True, "samr", "brats2019", 4, total, ["mirror", "move"], 3]
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(": t1, t1ce, t2, flair of 4 subjects")
    assert [line.partition(":")[0] for line in out[1:5]] == list(store.subjects)
    kinds = [source["manipulation"] for source in sources(store)]
    assert set(kinds) <= {"move", "mirror"}
    assert out[5].startswith(f"4 made, 0 skipped; 4 subjects of {total} slices, lesions: ")
    assert f"{kinds.count('move')} moved" in out[5] or not kinds.count("move")


def test_a_longer_cohort_begins_with_the_shorter_one(samr_run: Path, tmp_path: Path):
    """Whether it was made at once or in two calls, and whatever was trimmed in between."""
    grown = made(samr_run, tmp_path / "grown", "slices=7", "seed=1")
    per_subject = len(sources(grown)[0]["slices"])
    assert sum(subject.shape[2] for subject in grown.subjects.values()) == 7
    assert 1 < per_subject < 7
    first = arrays(grown)
    assert arrays(made(samr_run, grown.path, "subjects=3", "seed=1")).items() & first.items()
    at_once = made(samr_run, tmp_path / "once", "subjects=3", "seed=1")
    assert arrays(Store(grown.path)) == arrays(at_once)
    assert len(arrays(at_once)) == 9
    assert arrays(made(samr_run, tmp_path / "other", "subjects=3", "seed=2")) != arrays(at_once)


def test_the_same_command_does_nothing_again(samr_run: Path, tmp_path: Path, capsys):
    store = made(samr_run, tmp_path / "out", "subjects=2")
    before = times(store.path)
    made(samr_run, store.path, "subjects=2")
    after = times(store.path)
    assert {path: time for path, time in after.items() if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }
    assert "0 made, 2 skipped; 2 subjects" in capsys.readouterr().out


def test_an_interrupted_command_goes_on(samr_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    write = generating.write_synthetic

    def interrupted(store, planned, *args, **kwargs):
        if planned.number == 1:
            raise KeyboardInterrupt
        return write(store, planned, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(generating, "write_synthetic", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(samr_run, tmp_path / "out", "subjects=3")
    table = read_generated(tmp_path / "out")
    assert table is not None
    assert not table["complete"]
    capsys.readouterr()
    store = made(samr_run, tmp_path / "out", "subjects=3")
    assert "2 made, 1 skipped; 3 subjects" in capsys.readouterr().out
    assert read_generated(store.path) == {**table, "complete": True}
    assert arrays(store) == arrays(made(samr_run, tmp_path / "whole", "subjects=3"))


def test_the_real_store_may_have_moved(samr_run: Path, phantom_store: Path, tmp_path: Path):
    run = shutil.copytree(samr_run, tmp_path / "run")
    config = (run / "config.yaml").read_text().replace(str(phantom_store), "/gone")
    (run / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=r"store=/gone: found no cohort\.json, expected the prepared cohort that samr"):
        made(run, tmp_path / "out")
    expected = made(samr_run, tmp_path / "as_it_was", "subjects=1")
    assert arrays(made(run, tmp_path / "out", "subjects=1", f"store='{phantom_store}'")) == arrays(expected)


# ----- what is refused -----------------------------------------------------------------------------------------------


def test_another_cohort_is_not_written_over(samr_run: Path, phantom_store: Path, tmp_path: Path):
    out = made(samr_run, tmp_path / "out", "subjects=2").path
    before = times(out)
    for overrides, said in (
        (["subjects=2", "seed=1"], r"holds another synthetic cohort: seed was 0 and is now 1; choose another output"),
        (["subjects=2", ASIS], r"manipulations was .* and is now \[\]"),
        (["subjects=2", "precision=bf16-mixed"], "precision was 32-true and is now bf16-mixed"),
        (["subjects=1"], r"made for 2 subjects of \d+ slices, asked for 1 of \d+; ask for as many or more"),
        (["slices=1"], r"made for 2 subjects of \d+ slices, asked for 1 of 1"),
    ):
        with pytest.raises(UserError, match=said):
            made(samr_run, out, *overrides)
    with pytest.raises(UserError, match="found a prepared cohort that mrgen-synthesize did not make"):
        made(samr_run, phantom_store)
    assert {p: t for p, t in times(out).items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }
    assert read_generated(phantom_store) is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["input=/scans"], "input=/scans: samr generates from its own cohort's labels; leave input out"),
        (["layout=brats2019"], "leave layout out"),
        (["mc_samples=3"], "leave mc_samples out"),
        (["subjects=3", "slices=20"], "subjects=3 and slices=20 both say how many; give one of them"),
        (["subjects=0"], "subjects is 0; expected a whole number from 1 on, or null"),
        (["slices=1.5"], r"slices is 1\.5; expected a whole number"),
        (["manipulations=[grow]"], r"manipulations: found grow; expected some of \[mirror, move"),
        (["structure=runs/x"], "structure=runs/x: samr is no lesion VAE-GAN.*; leave structure out"),
        (["selection.best=0.5"], r"selection\.best=0\.5: samr is no lesion VAE-GAN.*; leave selection\.best out"),
        (["seed=-1"], "seed is -1; expected a whole number"),
        (["precision=8"], "precision is 8; expected auto"),
    ],
)
def test_settings_that_say_nothing_to_a_generator_are_refused(
    samr_run: Path, tmp_path: Path, overrides: list[str], said: str
):
    with pytest.raises(UserError, match=said):
        made(samr_run, tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["subjects=3", "slices=3", "manipulations=[]", "store=/stores/x"])
def test_settings_of_generators_say_nothing_to_other_methods(rsnet_run: Path, tmp_path: Path, setting: str):
    with pytest.raises(UserError, match=rf"{setting.partition('=')[0]}=.*: rsnet-t2 makes files of the scans in input"):
        made(rsnet_run, tmp_path / "out", f"input='{tmp_path}'", setting)


def test_another_cohort_than_the_generators_is_refused(samr_run: Path, wmh_store: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"found no BraTS19_.*, expected all 6 training subjects of samr"):
        made(samr_run, tmp_path / "out", f"store='{wmh_store}'")


def test_voxels_that_are_no_numbers_are_not_written(samr_run: Path, tmp_path: Path):
    run = shutil.copytree(samr_run, tmp_path / "run")
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert KEY in content
    # Finite, as a checkpoint's have to be, and so large that their products are not.
    content["state_dict"] = {n: w + 3e38 if w.is_floating_point() else w for n, w in content["state_dict"].items()}
    torch.save(content, path)
    with pytest.raises(UserError, match=r"syn0000_.*: the generator made NaN or infinite voxels"):
        made(run, tmp_path / "out", "subjects=1")
    table = read_generated(tmp_path / "out")
    assert table is not None
    assert not table["complete"]


# ----- read like any other -------------------------------------------------------------------------------------------


def test_a_segmenter_trains_on_it(samr_run: Path, tmp_path: Path):
    store = made(samr_run, tmp_path / "out", "subjects=4")
    run = tiny_run(tmp_path / "run", store.path, "data=synthetic", preset="snet")
    description = load_run(run).description["data"]
    assert tuple(description["modalities"]) == store.modalities
    assert description["classes"] == store.layout.classes["regions"]


def test_its_slices_join_the_real_ones_of_the_generators_training(samr_run: Path, phantom_store: Path, tmp_path: Path):
    store = made(samr_run, tmp_path / "out")
    mixed = ("experiment=samr/unet_mixed", "data=phantom", *SAMR[2:7], f"data.store='{phantom_store}'")
    conf = composed("train", *mixed, f"data.mix.store='{store.path}'")
    fill_from_store(conf)
    data = build_datamodule(conf.data)
    samples = data.train_dataloader().dataset
    assert len(samples) == 2 * data.real_slices()
    drawn = [samples[0, 0, which] for which in range(data.real_slices(), len(samples))]
    assert {sample["subject"] for sample in drawn} == set(store.subjects)
    assert all(sample["image"].shape == (4, 32, 48) for sample in drawn)
    assert any(sample["label"].any() for sample in drawn)
    assert {float(sample["image"][:, ~sample["brain"]].max()) for sample in drawn} == {-1.0}


@pytest.mark.parametrize("plan", ["plan=false", "plan=true"])
def test_without_a_cohort_the_command_that_makes_one_is_named(mrgen: Script, plan: str):
    called = mrgen("train", "experiment=rsnet/snet", "tracking=csv", "data=synthetic", plan)
    assert "stores/synthetic: found no synthetic cohort; make one with mrgen-synthesize" in called.message


def test_there_is_nothing_to_prepare(mrgen: Script):
    called = mrgen("prepare", "data=synthetic")
    assert called.code == 1
    assert called.message.startswith(
        "data=synthetic: there is nothing to prepare; mrgen-synthesize writes such a cohort"
    )


def test_no_real_scan_is_prepared_among_synthetic_ones(
    mrgen: Script, samr_run: Path, phantom_cohort: Path, tmp_path: Path
):
    store = made(samr_run, tmp_path / "out", "subjects=1")
    called = mrgen("prepare", "data=brats2019", f"data.root={phantom_cohort}", f"data.store={store.path}", "workers=0")
    assert "found a store of synthetic, expected brats2019 or none" in called.message


def test_a_generator_that_stopped_half_way_is_not_taken_for_a_finished_one(samr_run: Path, tmp_path: Path):
    stopped = tmp_path / "stopped"
    shutil.copytree(samr_run, stopped)
    (stopped / "status.json").write_text('{"state": "failed", "reason": "killed"}')
    with pytest.raises(UserError, match=r"is failed and not finished; go on with it \(mrgen-train resume="):
        made(stopped, tmp_path / "out", "subjects=1")
    assert len(made(stopped / "checkpoints" / "last.ckpt", tmp_path / "out", "subjects=1")) == 1  # asked for as it is
