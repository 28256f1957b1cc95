"""mrgen-synthesize of the lesion VAE-GAN: two runs and their segmentors become a synthetic cohort."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mrgen.callbacks.provenance import KEY
from mrgen.data.generated import read_generated
from mrgen.data.normalisation import MinMax, stored_statistics
from mrgen.data.store import Store
from mrgen.errors import UserError
from mrgen.launch.runs import load_run
from mrgen.launch.synthesis import generating
from mrgen.launch.synthesis.generating_lesions import COUNTS
from mrgen.launch.synthesis.synthesizing import synthesize
from mrgen.launch.training import train
from mrgen.papers.lesion_vaegan.cohort import Exhausted
from mrgen.papers.lesion_vaegan.filters import Selection
from mrgen.papers.lesion_vaegan.structure import StructureVAEGAN
from tests.launch.tools import CPU, composed

SIZE = (40, 48)
TINY = (
    *("data=phantom", "data.modalities=[t1,flair]", "data.split.val=0", "data.split.test=0.25"),
    *(f"data.sampling.size=[{SIZE[0]},{SIZE[1]}]", "data.sampling.step=3", "data.split.stratify=null"),
    *("data.steps_per_epoch=1", "model.width=2", "trainer.max_epochs=1", *CPU),
)
SEGMENTORS = ("experiment=lesion_vaegan/generation", "model=lesion_segmentation", "name=segmentors")
BEST = "selection.best=0.5"  # no network here has learned anything


def trained(folder: Path, store: Path, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    return train(composed("train", *overrides[:2], *TINY, *overrides[2:], f"data.store='{store}'"), folder)


@pytest.fixture(scope="module")
def structure(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage, trained for one step. Read only."""
    folder = tmp_path_factory.mktemp("structure") / "run"
    return trained(folder, phantom_store, "experiment=lesion_vaegan/structure", "model.latent=16")


@pytest.fixture(scope="module")
def generation(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second stage, likewise. Read only."""
    folder = tmp_path_factory.mktemp("generation") / "run"
    return trained(folder, phantom_store, "experiment=lesion_vaegan/generation", "model.discriminator_width=2")


@pytest.fixture(scope="module")
def segmentors(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Segmentors of their own, likewise. Read only."""
    return trained(tmp_path_factory.mktemp("segmentors") / "run", phantom_store, *SEGMENTORS)


@pytest.fixture
def brains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage draws as if it had learned to: ellipses of which it knows the inside."""
    x, y = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SIZE), indexing="ij")

    def draw(self: StructureVAEGAN, count: int, generator: torch.Generator) -> Tensor:
        radius = 0.85 + 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
        distance = (x**2 + y**2).sqrt() / radius
        return ((distance <= 1) & (distance > 0.9)).float()

    def mask(self: StructureVAEGAN, maps: Tensor) -> Tensor:
        return 1 - torch.stack([((x**2 + y**2) <= (x**2 + y**2)[f[0] > 0].max()).float() for f in maps])[:, None]

    monkeypatch.setattr(StructureVAEGAN, "draw", draw)
    monkeypatch.setattr(StructureVAEGAN, "mask", mask)


def made(generation: Path, structure: Path, output: Path, *overrides: str) -> Store:
    paths = (f"checkpoint='{generation}'", f"structure='{structure}'", f"output='{output}'")
    assert synthesize(composed("synthesize", *paths, "device=cpu", "precision=32-true", *overrides)) == 0
    return Store(output)


def arrays(store: Store) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in store.path.rglob("*.npy")}


def sources(store: Store) -> list[dict]:
    return [json.loads((s.path / "subject.json").read_text())["source"] for s in store.subjects.values()]


# ----- what is made --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("brains")
def test_a_cohort_is_maps_labels_and_what_the_generator_makes_of_them(
    generation: Path, structure: Path, phantom_store: Path, tmp_path: Path
):
    """Read back by the run's own normalisation and label map, the store is what went into the network and came out."""
    run, real = load_run(generation), Store(phantom_store)
    store = made(generation, structure, tmp_path / "out", "subjects=3", BEST)
    assert (len(store), store.modalities) == (3, ("t1", "flair"))
    lookup = real.layout.label_lookup("native")
    for subject, source in zip(store.subjects.values(), sources(store), strict=True):
        donor = real.subjects[source["anatomy"]]
        assert (subject.patient, subject.grade, subject.site) == (donor.patient, donor.grade, donor.site)
        assert source["slices"] == list(run.slices.training(donor.shape, donor.site))
        assert subject.shape == (*SIZE, len(source["slices"]))
        maps = torch.from_numpy(subject.read_structure()).permute(2, 0, 1)
        label = torch.from_numpy(lookup[subject.read_label()].astype(np.int64)).permute(2, 0, 1)
        brain = torch.from_numpy(subject.read_brain())
        assert (label > 0).flatten(1).any(dim=1).all()
        assert brain.permute(2, 0, 1)[label > 0].all()
        with torch.no_grad():
            image = run.model.synthesise(maps[:, None].float(), label)
        expected = image.permute(1, 2, 3, 0) * brain
        read = MinMax()(
            torch.from_numpy(subject.read_image()), brain, stored_statistics(MinMax(), subject, store.modalities)
        )
        torch.testing.assert_close(read, expected, rtol=0, atol=1e-6)
        assert len(source["records"]) == subject.shape[2]
        assert source["records"][0].keys() >= {"map", "label_tries", "outline_error", "dice", "mse", "lesion_of"}
    peak = np.mean([real.subjects[id].statistics["t1"]["max"] for id in run.split.train])
    assert next(iter(store.subjects.values())).statistics["t1"]["max"] == pytest.approx(peak)


@pytest.mark.usefixtures("brains")
def test_the_table_tells_runs_settings_and_what_the_filters_left(
    generation: Path, structure: Path, segmentors: Path, phantom_store: Path, tmp_path: Path, capsys
):
    asked = (f"segmentors='{segmentors}'", "subjects=2", "seed=3", "selection.best=0.4", "selection.label_tries=99")
    store = made(generation, structure, tmp_path / "out", *asked)
    table, real = read_generated(store.path), Store(phantom_store).subjects
    assert table is not None
    said = ("complete", "method", "scheme", "subjects", "seed", "manipulations")
    assert [table[key] for key in said] == [True, "generation", "multiple", 2, 3, []]
    assert table["checkpoint"] == f"sha256:{load_run(generation).digest()}"
    assert table["structure"] == f"sha256:{load_run(structure).digest()}"
    assert table["segmentors"] == f"sha256:{load_run(segmentors).digest()}"
    assert (table["selection"]["best"], table["selection"]["label_tries"]) == (0.4, 99)
    assert table["patients"] == sorted({real[id].patient for id in load_run(generation).split.train})
    told = [source["filters"] for source in sources(store)]
    filters = table["filters"]
    assert filters["candidates"] == sum(one["candidates"] for one in told)
    assert filters["kept"] == table["slices"] == sum(subject.shape[2] for subject in store.subjects.values())
    assert filters["dice"] == pytest.approx(
        sum(one["dice"] * one["candidates"] for one in told) / filters["candidates"]
    )
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in out[1:3]] == list(store.subjects)
    assert all("accepted: structure maps 100% of " in line and "best Dice 4" in line for line in out[1:4])
    assert out[3].startswith(f"2 made, 0 skipped; 2 subjects of {table['slices']} slices, accepted: structure maps")


@pytest.mark.usefixtures("brains")
def test_a_cohort_grows_and_goes_on_where_it_was_interrupted(
    generation: Path, structure: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Number i depends on the seed and i alone; totals are of all subjects, whoever made them when."""
    write = generating.write_synthetic

    def interrupted(store, planned, *args, **kwargs):
        if planned.number == 1:
            raise KeyboardInterrupt
        return write(store, planned, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(generating, "write_synthetic", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(generation, structure, tmp_path / "out", "subjects=2", BEST)
    table = read_generated(tmp_path / "out")
    assert table is not None
    assert not table["complete"]
    capsys.readouterr()
    made(generation, structure, tmp_path / "out", "subjects=2", BEST)
    assert "1 made, 1 skipped; 2 subjects" in capsys.readouterr().out
    grown = made(generation, structure, tmp_path / "out", "subjects=3", BEST)
    made(generation, structure, tmp_path / "out", "subjects=3", BEST)  # again
    assert "0 made, 3 skipped; 3 subjects" in capsys.readouterr().out
    per_subject = next(iter(grown.subjects.values())).shape[2]
    at_once = made(generation, structure, tmp_path / "once", f"slices={3 * per_subject - 1}", BEST)
    assert sum(subject.shape[2] for subject in at_once.subjects.values()) == 3 * per_subject - 1
    whole = arrays(made(generation, structure, tmp_path / "once", "subjects=3", BEST))
    assert arrays(grown) == whole
    assert len(whole) == 3 * 4
    assert read_generated(grown.path) == read_generated(at_once.path)
    with pytest.raises(UserError, match=r"holds another synthetic cohort: selection was .* and is now"):
        made(generation, structure, tmp_path / "out", "subjects=3", "selection.best=0.6")


@pytest.mark.usefixtures("brains")
def test_donors_without_lesion_are_left_out(generation: Path, structure: Path, phantom_store: Path, tmp_path: Path):
    """Those without one in the slices that training shows; where nobody is left, that is said."""
    store = shutil.copytree(phantom_store, tmp_path / "store")
    train_ids = load_run(generation).split.train
    for id in train_ids[1:]:
        label = np.load(store / id / "label.npy")
        label[..., label.shape[2] // 3 :] = 0  # below that training shows nothing
        np.save(store / id / "label.npy", label)
    where = (f"store='{store}'", BEST)
    cohort = made(generation, structure, tmp_path / "out", "subjects=2", *where)
    assert {source["anatomy"] for source in sources(cohort)} == {train_ids[0]}
    label = np.load(store / train_ids[0] / "label.npy")
    np.save(store / train_ids[0] / "label.npy", np.zeros_like(label))
    with pytest.raises(UserError, match="found no lesion in the slices that training shows of its 6 labelled subjects"):
        made(generation, structure, tmp_path / "other", *where)


@pytest.fixture
def hopeless(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of subjects that no filter lets pass, after eight slices of Dice 0.5."""
    numbers: set[int] = set()
    make = generating._Cohort._made
    filters = {**dict.fromkeys(COUNTS, 8), "kept": 0, "dice": 0.5, "mse": 1.0}

    def made_or_not(self, planned, maps):
        if planned.number in numbers:
            raise Exhausted("the segmentors agree with 0 of 8 slices", filters)
        return make(self, planned, maps)

    monkeypatch.setattr(generating._Cohort, "_made", made_or_not)
    return numbers


@pytest.mark.usefixtures("brains")
def test_another_donor_takes_the_place_of_one_with_whom_nothing_passes(
    generation: Path, structure: Path, hopeless: set[int], tmp_path: Path, capsys
):
    """Whose slices count among what was made; and who was left out is left out when the cohort grows."""
    hopeless |= {1, 3}
    store = made(generation, structure, tmp_path / "out", "subjects=2", BEST)
    numbers = [source["number"] for source in sources(store)]
    assert numbers == [0, 2]
    out = capsys.readouterr().out.splitlines()
    (left_out,) = [line for line in out if "left out; the segmentors agree with 0 of 8 slices" in line]
    assert out[-1].startswith("2 made, 0 skipped; 2 subjects of ")
    assert ", 1 donors left out: " in out[-1]
    table = read_generated(store.path)
    assert table is not None
    assert (table["complete"], table["subjects"], list(table["exhausted"])) == (True, 2, [left_out.partition(":")[0]])
    told = [source["filters"] for source in sources(store)]
    filters = table["filters"]
    assert filters["donors_without"] == 1
    assert filters["candidates"] == sum(one["candidates"] for one in told) + 8
    assert filters["dice"] == pytest.approx(
        (sum(one["dice"] * one["candidates"] for one in told) + 4) / filters["candidates"]
    )
    per_subject = table["slices"] // 2
    grown = made(generation, structure, store.path, f"slices={3 * per_subject}", BEST, "selection.dice_tries=99")
    assert [source["number"] for source in sources(grown)] == [0, 2, 4]
    assert "1 made, 2 skipped" in capsys.readouterr().out
    hopeless.clear()  # nobody is tried again whose place was taken
    made(generation, structure, store.path, f"slices={3 * per_subject}", BEST)
    assert "0 made, 3 skipped" in capsys.readouterr().out


@pytest.mark.usefixtures("brains")
def test_where_no_donor_is_left_that_is_said_and_more_tries_go_on(
    generation: Path, structure: Path, hopeless: set[int], tmp_path: Path, capsys
):
    hopeless |= set(range(1, 7))
    with pytest.raises(UserError, match=r"syn0006_.*: the segmentors agree with 0 of 8 .* with 6 subjects in turn"):
        made(generation, structure, tmp_path / "out", "subjects=2", BEST)
    assert not (read_generated(tmp_path / "out") or {})["complete"]
    hopeless.clear()
    more = ("selection.dice_tries=40", "selection.map_tries=100")
    store = made(generation, structure, tmp_path / "out", "subjects=2", BEST, *more)
    assert [source["number"] for source in sources(store)] == [0, 6]
    table = read_generated(store.path)
    assert table is not None
    assert (table["selection"]["dice_tries"], table["filters"]["donors_without"]) == (40, 5)
    assert "1 made, 1 skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another synthetic cohort: selection was"):
        made(generation, structure, tmp_path / "out", "subjects=2", BEST, "selection.label_tries=51")


@pytest.mark.usefixtures("brains")
def test_a_terminal_shows_a_bar_of_slices(
    generation: Path, structure: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    store = made(generation, structure, tmp_path / "out", "subjects=1", BEST)
    count = next(iter(store.subjects.values())).shape[2]
    out = capsys.readouterr().out
    assert f"{count}/{count}" in out
    assert "1 made, 0 skipped" in out


# ----- what the filters refuse ---------------------------------------------------------------------------------------


def test_untrained_structure_maps_do_not_pass(generation: Path, structure: Path, tmp_path: Path):
    """Nothing is patched here: noise is no outline, and in noise no lesion fits."""
    said = r"syn0000_.*: Algorithm 3 accepts 0 of \d+ structure maps; their least outline error is 0\.\d+"
    few = ("selection.map_tries=2", "selection.label_tries=2", "selection.realness=null", BEST)
    with pytest.raises(UserError, match=said):
        made(generation, structure, tmp_path / "out", *few)
    table = read_generated(tmp_path / "out")
    assert table is not None
    assert not table["complete"]
    said = r"syn0005_.*: random lesion labels fit 0 of \d+ generated brains.* So it was with 6 subjects in turn"
    with pytest.raises(UserError, match=said):
        made(generation, structure, tmp_path / "other", *few, "selection.outline_error=1")


@pytest.mark.usefixtures("brains")
def test_segmentors_that_find_nothing_refuse_all(generation: Path, structure: Path, tmp_path: Path):
    said = r"syn0005_.*: the segmentors agree with 0 of \d+ slices, where \d+ are wanted; the best Dice is 0\.\d+"
    with pytest.raises(UserError, match=said):
        made(generation, structure, tmp_path / "out", "selection.dice_tries=1")


# ----- which runs and settings are refused ---------------------------------------------------------------------------


def test_settings_stand_once():
    """conf says where the numbers come from; the code's own are the same."""
    assert dict(composed("synthesize", "checkpoint=x").selection) == {
        name: part.default for name, part in Selection.__dataclass_fields__.items()
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["structure=null"], r"structure is not set; generation makes slices from structure maps: give the run"),
        (["structure=/nowhere"], "/nowhere: no such run folder or checkpoint"),
        (["manipulations=[move]"], "generation makes random lesion labels of its own.*; leave manipulations out"),
        (["input=/scans"], "generation generates from its own cohort's labels; leave input out"),
        (["selection.dice=2"], r"selection\.dice is 2; expected a number from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    generation: Path, structure: Path, tmp_path: Path, overrides: list[str], said: str
):
    with pytest.raises(UserError, match=said):
        made(generation, structure, tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


def test_runs_of_something_else_are_refused(generation: Path, structure: Path, segmentors: Path, tmp_path: Path):
    for overrides, said in (
        ([f"structure='{generation}'"], r"is a LesionVAEGAN, which draws no structure maps"),
        ([f"segmentors='{structure}'"], r"is a StructureVAEGAN, which finds no label in each sequence by itself"),
        ([f"checkpoint='{structure}'"], r"is a StructureVAEGAN, which synthesises nothing"),
    ):
        with pytest.raises(UserError, match=said):
            made(generation, structure, tmp_path / "out", *overrides)


@pytest.mark.parametrize("setting", ["structure=runs/x", "segmentors=runs/x", "selection.dice=0.5"])
def test_settings_of_the_lesion_vaegan_say_nothing_to_other_methods(rsnet_run: Path, tmp_path: Path, setting: str):
    paths = (f"checkpoint='{rsnet_run}'", f"input='{tmp_path}'", f"output='{tmp_path / 'out'}'")
    key = setting.partition("=")[0].replace(".", r"\.")
    with pytest.raises(UserError, match=rf"{key}=.*: rsnet-t2 makes files of the scans in input.*; leave {key} out"):
        synthesize(composed("synthesize", *paths, setting))


def test_unfinished_runs_are_refused(generation: Path, structure: Path, segmentors: Path, tmp_path: Path):
    for key, run in (("checkpoint", generation), ("structure", structure), ("segmentors", segmentors)):
        stopped = shutil.copytree(run, tmp_path / key)
        (stopped / "status.json").write_text('{"state": "failed", "reason": "killed"}')
        with pytest.raises(
            UserError, match=rf"{key}=.* is failed and not finished; go on with it \(mrgen-train resume"
        ):
            made(generation, structure, tmp_path / "out", f"{key}='{stopped}'")


def described(run: Path, copy: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a run whose checkpoint says something else of itself."""
    shutil.copytree(run, copy)
    path = copy / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    change(content[KEY])
    torch.save(content, path)
    return copy


def test_runs_that_do_not_fit_each_other_are_refused(
    generation: Path, structure: Path, segmentors: Path, tmp_path: Path
):
    def other_scale(description: dict) -> None:
        description["data"]["normalisation"] = {"_target_": "mrgen.data.normalisation.ZScore"}

    def mixed(description: dict) -> None:
        description["data"]["mix"] = {"synthetic_slices": 20, "patients": ["P"]}

    def other_classes(description: dict) -> None:
        description["data"]["classes"] = ["background", "lesion"]

    def made_up(description: dict) -> None:
        description["data"]["synthetic"] = True

    copies = {
        change.__name__: described(segmentors, tmp_path / change.__name__, change)
        for change in (other_scale, mixed, other_classes, made_up)
    }
    drawn = described(structure, tmp_path / "drawn", made_up)
    scaled = described(structure, tmp_path / "scaled", other_scale)
    for override, said in (
        (f"structure='{scaled}'", r"draws maps of 40 × 48 pixels on the scale zscore, expected 40 × 48 .* scale unit"),
        (f"segmentors='{copies['other_scale']}'", "trained on the scale zscore, expected unit"),
        (f"segmentors='{copies['made_up']}'", "segmentors was trained on a synthetic cohort, .*, expected a real one"),
        (f"structure='{drawn}'", "structure was trained on a synthetic cohort, .*, expected a real one"),
        (f"segmentors='{copies['mixed']}'", "trained on 20 synthetic slices, expected real ones alone"),
        (f"segmentors='{copies['other_classes']}'", r"its classes are \['background', 'lesion'\], expected"),
    ):
        with pytest.raises(UserError, match=said):
            made(generation, structure, tmp_path / "out", override)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("brains")
def test_whoever_a_stage_was_trained_on_is_known(generation: Path, structure: Path, tmp_path: Path):
    """A first stage of another split, which itself was trained on synthetic slices of somebody."""

    def mixed(description: dict) -> None:
        description["data"]["mix"] = {"synthetic_slices": 20, "patients": ["Somebody"]}

    other = described(structure, tmp_path / "other", mixed)
    split = json.loads((other / "split.json").read_text())
    split["train"], split["test"] = [*split["train"][1:], split["test"][0]], split["train"][:1]
    (other / "split.json").write_text(json.dumps(split))
    store = made(generation, other, tmp_path / "out", "slices=1", BEST)
    table = read_generated(store.path)
    assert table is not None
    assert len(table["patients"]) == 6 + 1 + 1
    assert "Somebody" in table["patients"]
