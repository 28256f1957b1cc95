"""The constructor's signature is the schema."""

import pytest
import torch
from omegaconf import OmegaConf

from mrgen.errors import UserError
from mrgen.launch.instantiate import instantiate, plain

BOX = "mrgen.data.crops.BrainBox"
UNET = "mrgen.nets.unet3d.UNet3d"


def test_builds_what_the_target_says():
    box = instantiate(OmegaConf.create({"_target_": BOX, "size": [16, 24, 8]}), divisor=4)
    assert (box.size, box.divisor) == ((16, 24, 8), 4)


def test_nested_and_partial_targets_are_built():
    conf = {
        "_target_": "mrgen.segmenter.SegmenterModule",
        "net": {"_target_": "mrgen.nets.unet3d.SegmentationUNet3d", "_partial_": True, "filters": 2, "levels": 2},
        "modalities": ["t1", "flair"],
        "classes": ["background", "lesion"],
        "regions": {"WMH": [1]},
    }
    module = instantiate(conf)
    assert module.forward({name: torch.zeros(1, 1, 8, 8, 8) for name in ("t1", "flair")}).shape == (1, 2, 8, 8, 8)


def test_constructors_get_plain_containers():
    """A ListConfig among the arguments would end up in a checkpoint that weights_only=True refuses."""
    args = instantiate(OmegaConf.create({"_target_": "builtins.dict", "a": {"b": [1, {"c": 2}]}}))
    assert type(args["a"]) is dict
    assert type(args["a"]["b"]) is list
    assert type(args["a"]["b"][1]) is dict


def test_a_misspelt_key_is_named_with_the_valid_ones():
    with pytest.raises(UserError, match=r"BrainBox has no sise; valid keys: size, divisor$"):
        instantiate({"_target_": BOX, "sise": None})


def test_a_misspelt_key_deep_inside_is_named():
    conf = {"_target_": "builtins.dict", "nets": [{"net": {"_target_": UNET, "_partial_": True, "fitlers": 2}}]}
    with pytest.raises(UserError, match=r"UNet3d has no fitlers; valid keys: in_channels, filters, levels, dropout$"):
        instantiate(conf)


def test_a_target_that_takes_any_key_is_not_checked():
    assert instantiate({"_target_": "builtins.dict", "anything": 1}) == {"anything": 1}
    assert instantiate({"_target_": "torchio.RandomFlip", "axes": ["LR"], "p": 0.5}).probability == 0.5


@pytest.mark.parametrize("target", ["nope.Nope", "mrgen.data.crops.Nope", "mrgen.nope.Nope", "torch.nn.nope", "Nope"])
def test_an_unknown_target_is_named(target: str):
    with pytest.raises(UserError, match=f"_target_ '{target}' cannot be imported"):
        instantiate({"_target_": target})


def test_a_missing_argument_is_named():
    with pytest.raises(UserError, match=r"mrgen.nets.unet3d.UNet3d: .*missing.*in_channels"):
        instantiate({"_target_": UNET})


def test_the_constructors_own_refusal_is_a_sentence():
    with pytest.raises(UserError, match="UNet3d: levels is 1; expected 2 to 8"):
        instantiate({"_target_": UNET, "in_channels": 1, "levels": 1})


def test_a_users_error_passes_unchanged():
    with pytest.raises(UserError, match=r"^data.sampling.size is \[3, 8, 8\]; expected three multiples of 8"):
        instantiate({"_target_": BOX, "size": [3, 8, 8]})


def test_what_is_joined_is_not_resolved_once_more(tmp_path):
    """Hydra would: its ``instantiate`` makes a config of what it is given."""
    victim = tmp_path / "victim"
    call = f"{{oc.create:{{_target_:pathlib.Path.touch,self:{victim}}}}}"
    conf = OmegaConf.create({"a": "$", "b": call, "box": {"_target_": BOX, "size": "${a}${b}"}})
    with pytest.raises(UserError, match="which is left of an interpolation; write the value itself"):
        instantiate(conf.box)
    with pytest.raises(UserError, match="which is left of an interpolation"):
        plain(conf)


def test_plain_resolves():
    conf = OmegaConf.create({"a": 3, "b": {"c": "${a}"}})
    assert plain(conf) == {"a": 3, "b": {"c": 3}}
    assert plain("text") == "text"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("filters", "abc", "filters is 'abc'; expected a whole number"),
        ("filters", 4.5, "filters is 4.5; expected a whole number"),
        ("filters", 0, "filters is 0 and dropout 0.05; expected 1 or more"),
        ("dropout", True, "dropout is True; expected a number"),
    ],
)
def test_a_value_of_the_wrong_type_is_found_before_a_library_trips_over_it(key: str, value: object, expected: str):
    with pytest.raises(UserError, match=expected):
        instantiate({"_target_": UNET, "in_channels": 3, key: value})


def test_types_follow_the_annotations_into_sequences_and_unions():
    instantiate({"_target_": BOX, "size": None})
    with pytest.raises(UserError, match="size is 16; expected"):
        instantiate({"_target_": BOX, "size": 16})
    with pytest.raises(UserError, match="size is"):
        instantiate({"_target_": BOX, "size": [16, "x", 16]})
