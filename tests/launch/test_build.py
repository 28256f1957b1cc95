"""What a file says is data: of the classes that it names only listed ones are built, and nothing in it is resolved."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio
import yaml

from mrgen.errors import UserError
from mrgen.launch.build import (
    LISTED,
    MODELS,
    NORMALISATIONS,
    SAMPLINGS,
    TORCHIO,
    TRANSFORMS,
    build,
    check_data,
    trust,
)
from mrgen.launch.instantiate import instantiate
from mrgen.launch.paths import CONF_DIR

UNET = "mrgen.nets.unet3d.UNet3d"
ZSCORE = {"_target_": "mrgen.data.normalisation.ZScore"}


def test_a_file_builds_what_it_describes_as_a_config_would():
    conf = {
        "_target_": "mrgen.segmenter.SegmenterModule",
        "net": {"_target_": "mrgen.nets.unet3d.SegmentationUNet3d", "_partial_": True, "filters": 2, "levels": 2},
        "modalities": ["t1", "flair"],
        "classes": ["background", "lesion"],
        "regions": {"WMH": [1]},
    }
    torch.manual_seed(0)
    ours = build(conf, MODELS, where="a.ckpt")
    torch.manual_seed(0)
    theirs = instantiate(conf)
    assert type(ours) is type(theirs)
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert (name, a.tolist()) == (other, b.tolist())


def test_transforms_are_built_inside_of_each_other():
    flip = {"_target_": "torchio.RandomFlip", "axes": ["LR"], "flip_probability": 1}
    built = build({"_target_": "torchio.OneOf", "transforms": [flip, flip]}, TRANSFORMS, where="config.yaml")
    assert [type(each) for each in built.transforms_dict] == [torchio.RandomFlip] * 2


def test_a_class_of_another_kind_is_refused():
    with pytest.raises(
        UserError, match=r"^a\.ckpt: found 'mrgen\.data\.normalisation\.ZScore', expected a class of mrgen"
    ):
        build(ZSCORE, MODELS, where="a.ckpt")
    with pytest.raises(UserError, match=r"^a\.ckpt: found None, expected a class of mrgen\.data\.crops or"):
        build({"size": [8, 8, 8]}, SAMPLINGS, where="a.ckpt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"filters": 0}, "filters is 0"),
        ({"filters": "many"}, "filters is 'many'; expected a whole number"),
        ({"fitlers": 4}, "UNet3d has no fitlers; valid keys"),
        ({"levels": -(10**30)}, "levels"),
        ({"levels": 40}, "levels is 40; expected 2 to 8"),
        ({"filters": 5 * 10**12}, r"memory ran out .*; in a training lower"),
        ({"a\nb": 1}, r"UNet3d has no 'a\\nb'; valid keys"),
        ({"_target_": "mrgen.nets.a\nb"}, r"found 'mrgen\.nets\.a\\nb'|asks for 'mrgen\.nets\.a\\nb'"),
        ({"_target_": "mrgen.x\ny.Z"}, r"'mrgen\.x\\ny\.Z'"),
        ({"in_channels": None}, "in_channels is None"),
    ],
)
def test_what_a_constructor_refuses_is_a_sentence(change: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said) as raised:
        build({"_target_": UNET, "in_channels": 1, "filters": 2, "levels": 2} | change, MODELS, where="a.ckpt")
    assert "\n" not in str(raised.value)


def test_a_class_without_arguments_says_that_it_takes_none():
    with pytest.raises(UserError, match=r"MinMax has no q; it takes none$"):
        build({"_target_": "mrgen.data.normalisation.MinMax", "q": 1}, NORMALISATIONS, where="a.ckpt")


# ----- what runs nothing ---------------------------------------------------------------------------------------------

FOREIGN = [
    *("os.system", "os.symlink", "os.remove", "subprocess.run", "shutil.copyfile", "shutil.rmtree", "builtins.eval"),
    *("builtins.exec", "builtins.open", "importlib.import_module", "pathlib.Path.write_text", "pathlib.Path"),
    *("torch.load", "torch.save", "torch.nn.Linear", "torch.hub.load", "numpy.load", "numpy.savetxt", "joblib.load"),
    *("pickle.load", "hydra.utils.instantiate", "hydra.utils.get_method", "omegaconf.OmegaConf.load", "wandb.init"),
    *("pytorch_lightning.Trainer", "pytorch_lightning.callbacks.ModelCheckpoint", "nibabel.load", "mrgenx.Net"),
    # By way of modules of ours and of TorchIO's, and what lies in them beside the listed classes.
    *("mrgen.launch.app.os.system", "mrgen.launch.app.run_app", "mrgen.data.store.remove_subject", "mrgen.nets.unet3d"),
    *("mrgen.data.store.sole_writer", "mrgen.data.datamodule.CohortDataModule", "mrgen.data.store.Store"),
    *("mrgen.papers.rsnet.torch.load", "mrgen.papers.rsnet.nn.Linear", "mrgen.papers.rsnet.LightningModule"),
    *(
        "mrgen.papers.rsnet.class_weights",
        "mrgen.nets.blocks._Dropped",
        "mrgen.papers.rsnet.RSNet.load_from_checkpoint",
    ),
    *("mrgen.papers.brain_clustering.search.Location", "mrgen.papers.brain_clustering.BrainClustering.load"),
    *("mrgen.papers.lesion_vaegan.cohort.LesionCohort", "mrgen.data.crops.np.load", "mrgen.data.slices.Path"),
    *("mrgen.callbacks.preemption.Preemption", "mrgen.callbacks.provenance.Provenance", "mrgen.callbacks.ema.torch"),
    *("torchio.HistogramStandardization", "torchio.Lambda", "torchio.Resample", "torchio.ToReferenceSpace"),
    *("torchio.MonaiAdapter", "torchio.ScalarImage", "torchio.datasets.Colin27", "torchio.os.system", "torchio.To"),
    *("torchio.transforms.augmentation.RandomFlip", "", ".", "os.", "mrgen.", "mrgen.nets.unet3d.", "a b.c", "../x.y"),
]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[list[str]]:
    """Files that are opened for writing, processes that are started and the like, below the test's folder or not."""
    events: list[str] = []
    active = [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if active and (
            event in ("os.system", "subprocess.Popen", "os.symlink", "os.remove", "os.rename", "shutil.rmtree")
            or (event == "open" and str(args[0]).startswith(str(tmp_path)))
        ):
            events.append(event)

    sys.addaudithook(hook)
    yield events
    active.clear()


@pytest.mark.parametrize("target", FOREIGN)
def test_a_target_that_is_not_listed_is_refused_wherever_it_stands(target: str, tmp_path: Path, opened: list[str]):
    victim = tmp_path / "victim"
    hostile = {"_target_": target, "f": str(victim), "path": str(victim), "command": f"touch {victim}"}
    unet = {"_target_": UNET, "in_channels": 1}
    for conf in (
        hostile,
        hostile | {"_partial_": True},
        {**unet, "filters": hostile},
        {**unet, "filters": [1, [hostile]]},
        {**unet, "filters": {"a": ({"b": hostile},)}},
    ):
        for check in (lambda conf: build(conf, LISTED, where="a.ckpt"), lambda conf: check_data(conf, "a.ckpt")):
            with pytest.raises(UserError, match=r"^a\.ckpt: asks for .*(which is none of the classes|is not there)"):
                check(conf)
    assert opened == []


@pytest.mark.parametrize("target", [["os.system"], {"_target_": "os.system"}, None, 3, b"os.system", ("os", "system")])
def test_a_target_that_is_no_text_is_refused(target: Any):
    with pytest.raises(UserError, match=r"which is none of the classes that a file may name"):
        build({"_target_": target, "command": "true"}, MODELS, where="a.ckpt")


@pytest.mark.parametrize(
    "text",
    [
        "${oc.create:{_target_:torch.load,f:x,weights_only:false}}",
        "${oc.env:HOME}",
        "${oc.env:SECRET,}",
        "${oc.decode:x}",
        "a ${oc.${name}:x} b",
        "${${name}:x}",
        "${oc.env:MRGEN_STORES_KEY}",
        "${float:${oc.env:HOME}}",
        "${hydra.launcher}${x:}",
    ],
)
def test_resolvers_that_reach_beyond_the_config_are_refused_everywhere(text: str):
    for interpolations in (False, True):
        for node in (text, {"a": [text]}, {text: 1}, {"_target_": text}):
            with pytest.raises(UserError):
                check_data(node, "config.yaml", interpolations=interpolations)
    with pytest.raises(UserError, match=r"^a\.ckpt: found .*, expected values; what a file says is not computed"):
        build({"_target_": UNET, "in_channels": text}, MODELS, where="a.ckpt")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "${seed}",
            "${data.layout.classes.${data.labels}}",
            "${row:${rows},${row},key}",
            "${float:${data.mix.fraction}}",
        ),
        *("${oc.env:MRGEN_STORES,stores}/${data.name}", "${synthetic_store:${synthetic},${float:1}}", "x_${token:}"),
    ],
)
def test_references_are_data_where_a_config_is_not_resolved_yet(text: str):
    check_data({"a": text}, "config.yaml", interpolations=True)
    with pytest.raises(UserError, match="expected values"):
        check_data({"a": text}, "config.yaml")


@pytest.mark.parametrize("key", ["_args_", "_recursive_", "_convert_"])
def test_what_hydra_would_follow_beside_a_target_is_refused(key: str):
    with pytest.raises(UserError, match=f"found {key} beside a _target_"):
        build({**ZSCORE, key: "all"}, NORMALISATIONS, where="a.ckpt")


def test_nothing_is_imported_that_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"add trust=\[evil\]: it is imported and called then"):
        check_data({"_target_": "evil.Net"}, "a.ckpt")
    assert "evil" not in sys.modules


# ----- the list ------------------------------------------------------------------------------------------------------


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def test_every_class_that_a_preset_trains_with_is_listed():
    """Or its checkpoint could not be read."""
    found = set()
    for path in CONF_DIR.rglob("*.yaml"):
        if "hydra" in path.relative_to(CONF_DIR).parts:
            continue
        content = yaml.safe_load(path.read_text())
        content.pop("hydra", None)
        found |= set(targets(content))
    assert len(found) > 30
    for target in found:
        check_data({"_target_": target}, "a.ckpt")


def test_transforms_that_read_files_or_call_functions_are_not_listed():
    for name in TORCHIO:
        parameters = inspect.signature(getattr(torchio, name).__init__).parameters
        assert not {"function", "landmarks", "monai_transform", "reference", "target"} & set(parameters), name
    assert "path" in inspect.getsource(torchio.HistogramStandardization).lower()  # as one that is not


def test_histograms_on_disk_are_why(tmp_path: Path):
    """TorchIO loads them in the constructor."""
    np.save(tmp_path / "landmarks.npy", np.arange(13.0))
    conf = {"_target_": "torchio.HistogramStandardization", "landmarks": {"t1": str(tmp_path / "landmarks.npy")}}
    assert instantiate(conf) is not None
    with pytest.raises(UserError, match="which is none of the classes"):
        build(conf, TRANSFORMS, where="config.yaml")


# ----- trust ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def forgotten() -> Iterator[None]:
    yield
    trust([])


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("said", [["torch.nn"], "torch.nn", ["torch.nn.Linear"]])
def test_modules_that_the_user_names_are_built_from(said: Any):
    conf = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 2}
    with pytest.raises(UserError, match=r"add trust=\[torch\.nn\]"):
        build(conf, MODELS, where="a.ckpt")
    trust(said)
    assert build(conf, (*MODELS, "torch.nn"), where="a.ckpt").out_features == 2
    with pytest.raises(UserError, match="which is none of the classes"):
        build({"_target_": "torch.load", "f": "x"}, MODELS, where="a.ckpt")
    trust([])
    with pytest.raises(UserError, match="which is none of the classes"):
        check_data(conf, "a.ckpt")


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("said", [True, [3], ["a b"], ["../x"], ""])
def test_trust_takes_names_of_modules(said: Any):
    if said == "":
        said = [""]
    with pytest.raises((UserError, TypeError), match=r"expected modules of your own|not iterable"):
        trust(said)
