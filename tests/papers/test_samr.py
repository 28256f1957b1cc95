"""Who learns from what, by hand: six discriminators of three regions, a generator and a segmenter."""

import copy
import inspect

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mrgen.data.batch import label_map
from mrgen.losses.segmentation import generalised_dice
from mrgen.papers.samr import SAMR, regions
from mrgen.protocols import Generator, LabelMaps, Segmenter, Synthesizer
from tests.launch.tools import composed

MODALITIES = ("t1", "flair")
CLASSES = ("background", "core", "edema")
SIZE = 64
BACKGROUND, NORMAL, LESION = range(3)


class At(SAMR):
    """SAMR without a trainer: what Lightning does in its steps, done plainly."""

    def optimizers(self):
        if "sides" not in self.__dict__:
            self.__dict__["sides"] = [conf["optimizer"] for conf in self.configure_optimizers()]
        return self.sides

    def manual_backward(self, loss):
        loss.backward()

    def log(self, name, value, **kwargs):
        self.__dict__.setdefault("logged", {})[name] = float(value)


def made(cls=At, **changes):
    torch.manual_seed(0)
    small = {"filters": 2, "downs": 3, "blocks": 1, "discriminator_filters": 2, "unet_filters": 2, "unet_downs": 3}
    return cls(**{"modalities": MODALITIES, "classes": CLASSES, "lr": 1e-2, **small, **changes}).train()


def example(seed=0, slices=2, lesion=True):
    """A square head with a lesion of two classes, some of it unknown, in a background of −1."""
    generator = torch.Generator().manual_seed(seed)
    brain = torch.zeros(slices, SIZE, SIZE, dtype=torch.bool)
    brain[:, 8:56, 8:56] = True
    label = torch.zeros(slices, SIZE, SIZE, dtype=torch.int64)
    if lesion:
        label[:, 20:34, 20:40] = 2
        label[:, 24:30, 25:35] = 1
    label[:, 40:44, 40:44] = 255
    image = 2 * torch.rand(slices, 2, SIZE, SIZE, generator=generator) - 1
    return {
        "image": torch.where(brain[:, None], image, -1.0),
        "label": label,
        "brain": brain,
        "atlas": 2 * torch.rand(slices, 6, SIZE, SIZE, generator=generator) - 1,
        "subject": ["s"] * slices,
        "spacing": torch.ones(slices, 3),
    }


def step_inputs(model, batch):
    labels, image, atlas = model.parts(batch)
    return labels, image, model(labels, atlas), atlas


def state(net):
    """Weights and buffers, as they are now."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def changed(net, before):
    """Names of the weights and buffers that differ by a bit."""
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def weights(net):
    return {name for name, _ in net.named_parameters()}


def gradients(net):
    return [p.grad for p in net.parameters()]


def by_hand(model, labels, images, atlas):
    """What the six make of a batch that has every region in every slice, by multiplying with the regions."""
    stages = []
    for k, net in enumerate(model.discriminators.discriminators):
        lesion = labels[:, 2:].sum(1, keepdim=True)
        region = (labels[:, :1], labels[:, 1:2], lesion)[k // 2]
        x = torch.cat([labels, images, atlas], dim=1) * region
        stages.append(net(nn.AvgPool2d(3, 2, 1, count_include_pad=False)(x) if k % 2 else x))
    return stages


def dice_error(model, images, labels):
    return generalised_dice(model.segmenter(images).softmax(1), labels)


# ----- the label map -------------------------------------------------------------------------------------------------


def test_label_map_and_regions_by_hand():
    label = torch.tensor([0, 0, 1, 2, 255, 255, 2]).reshape(1, 1, -1)
    brain = torch.tensor([0, 1, 1, 1, 1, 0, 0]).bool().reshape(1, 1, -1)
    labels = label_map(label, brain, 3)
    expected = [[1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 1]]
    assert labels[0, :, 0].tolist() == expected
    assert regions(labels)[0, :, 0].int().tolist() == [*expected[:2], [0, 0, 1, 1, 0, 0, 1]]
    assert (labels.dtype, regions(labels).dtype) == (torch.float32, torch.bool)


def test_the_label_map_is_left_as_it_is():
    """Merged through a view, the lesion would change the discriminators' input, and twice on a second call."""
    model, batch = made(), example()
    inputs = step_inputs(model, batch)
    before = [x.clone() for x in inputs]
    model.discriminator_step(*inputs)
    model.generator_step(*inputs)
    regions(inputs[0])
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert set(inputs[0].unique().tolist()) == {0, 1}


def test_classes_must_name_a_lesion():
    with pytest.raises(ValueError, match="expected no lesion and one class of lesion or more"):
        made(classes=["background"])


# ----- what it is ----------------------------------------------------------------------------------------------------


def test_networks_follow_the_sequences_and_classes():
    model = made()
    assert not isinstance(model, Synthesizer | Segmenter)
    assert model(torch.zeros(1, 4, SIZE, SIZE), torch.zeros(1, 6, SIZE, SIZE)).shape == (1, 2, SIZE, SIZE)
    with torch.device("meta"):
        five = SAMR(modalities=["t1", "t1ce", "t2", "flair", "apt"], classes=[*CLASSES, "tumour"])
    assert five.discriminators.discriminators[0].stages[0][0].in_channels == 25  # the paper's
    assert len(five.discriminators.discriminators) == 6
    assert (five.generator.mask_encoder[0].in_channels, five.generator.atlas_encoder[0].in_channels) == (5, 15)
    assert (five.divisor, model.divisor, made(unet_downs=4).divisor) == (32, 8, 16)
    assert made(unet_downs=4, shape_weight=0).divisor == 8


def test_conf_says_what_the_constructor_does():
    conf = OmegaConf.to_container(composed("train", "model=samr", "data=brats2019"), resolve=False)["model"]
    defaults = {name: p.default for name, p in inspect.signature(SAMR).parameters.items()}
    given = {name: value for name, value in conf.items() if name not in ("_target_", "modalities", "classes")}
    assert {**given, "betas": tuple(given["betas"])} == {name: defaults[name] for name in given}
    assert set(conf) == {"_target_", *defaults}
    classes = composed("train", "model=samr", "data=brats2019").model.classes
    assert list(classes) == ["background", "necrotic and non-enhancing core", "edema", "enhancing"]


# ----- losses by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least_squares", [False, True])
def test_losses_by_hand(least_squares):
    model, batch = made(least_squares=least_squares, feature_weight=3.0, shape_weight=7.0), example()
    labels, image, synthetic, atlas = step_inputs(model, batch)
    real, fake = by_hand(model, labels, image, atlas), by_hand(model, labels, synthetic, atlas)

    def wrong(logits, truth):
        return (logits - truth).square().mean() if least_squares else F.softplus((1 - 2 * truth) * logits).mean()

    expected = sum((wrong(r[-1], 1) + wrong(f[-1], 0)) / 2 for r, f in zip(real, fake, strict=True))
    torch.testing.assert_close(model.discriminator_loss(labels, image, synthetic, atlas), expected)

    losses = model.generator_losses(labels, image, synthetic, atlas)
    torch.testing.assert_close(losses["adversarial"], sum(wrong(f[-1], 1) for f in fake))
    squares = [(a - b).square().mean() for r, f in zip(real, fake, strict=True) for a, b in zip(r, f, strict=True)]
    assert len(squares) == 6 * 5
    torch.testing.assert_close(losses["features"], sum(squares))
    torch.testing.assert_close(losses["shape_real"], dice_error(model, image, labels))
    torch.testing.assert_close(losses["shape_synthetic"], dice_error(model, synthetic, labels))
    shapes = losses["shape_real"] + losses["shape_synthetic"]
    torch.testing.assert_close(losses["loss"], losses["adversarial"] + 3 * losses["features"] + 7 * shapes)
    model = made()
    assert (model.feature_weight, model.shape_weight, model.least_squares) == (5, 1, False)


def test_without_regions_two_ordinary_discriminators_judge_the_whole_slice():
    model, batch = made(label_wise=False), example()
    labels, image, synthetic, atlas = step_inputs(model, batch)
    full, half = model.discriminators.discriminators
    x = torch.cat([labels, synthetic, atlas], dim=1)
    fake = full(x)[-1], half(nn.AvgPool2d(3, 2, 1, count_include_pad=False)(x))[-1]
    losses = model.generator_losses(labels, image, synthetic, atlas)
    torch.testing.assert_close(losses["adversarial"], sum(F.softplus(-logits).mean() for logits in fake))


# ----- each side leaves the other alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_step_of_the_discriminators_leaves_g_and_u_as_they_were(norm):
    model = made(norm=norm)
    inputs = step_inputs(model, example())
    six, others = state(model.discriminators), {n: state(n) for n in (model.generator, model.segmenter)}
    model.discriminator_step(*inputs)
    for net, before in others.items():
        assert changed(net, before) == set()
        assert gradients(net) == [None] * len(gradients(net))
    assert weights(model.discriminators) <= changed(model.discriminators, six)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_step_of_g_and_u_leaves_the_discriminators_as_they_were(norm):
    """Weights, gradients, running means and variances and their counters."""
    model = made(norm=norm)
    inputs = step_inputs(model, example())
    model.discriminator_step(*inputs)  # so that they have gradients and statistics to lose
    six, gradient = state(model.discriminators), [g.clone() for g in gradients(model.discriminators)]
    others = {net: state(net) for net in (model.generator, model.segmenter)}
    model.generator_step(*inputs)
    assert changed(model.discriminators, six) == set()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model.discriminators), gradient, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    for net, before in others.items():
        assert weights(net) <= changed(net, before)


def test_a_batch_is_one_step_of_each_the_discriminators_first():
    model, batch, order, calls = made(), example(), [], []
    for name, optimizer in zip(("G and U", "six"), model.optimizers(), strict=True):
        optimizer.register_step_pre_hook(lambda *_, name=name: order.append(name))
    model.generator.register_forward_hook(lambda *_: calls.append("G"))
    model.training_step(batch, 0)
    assert order == ["six", "G and U"]
    assert calls == ["G"]
    names = ("loss", "discriminator", "adversarial", "features", "shape_real", "shape_synthetic")
    assert set(model.logged) == {f"train/{name}" for name in names}


def test_g_goes_through_the_updated_discriminators():
    model, batch = made(), example()
    copied = copy.deepcopy(model)
    inputs = step_inputs(copied, batch)
    model.training_step(batch, 0)
    earlier = float(copied.generator_losses(*inputs)["loss"].detach())
    copied.discriminator_step(*inputs)
    later = float(copied.generator_losses(*inputs)["loss"].detach())
    assert model.logged["train/loss"] == pytest.approx(later, rel=1e-5)
    assert later != pytest.approx(earlier, rel=1e-3)


def test_one_optimizer_has_all_six_and_the_other_g_and_u():
    model = made(lr=2e-4)
    generator, discriminators = model.optimizers()
    nets = [[model.generator, model.segmenter], [*model.discriminators.discriminators]]
    assert len(nets[1]) == 6
    for optimizer, own in zip((generator, discriminators), nets, strict=True):
        (group,) = optimizer.param_groups
        assert isinstance(optimizer, torch.optim.Adam)
        assert (group["lr"], group["betas"]) == (2e-4, (0.5, 0.999))
        assert list(map(id, group["params"])) == [id(p) for net in own for p in net.parameters()]


@pytest.mark.parametrize("term", ["features", "adversarial"])
def test_what_the_discriminators_say_reaches_g_alone(term):
    model = made()
    model.generator_losses(*step_inputs(model, example()))[term].backward()
    assert all(g is not None and g.isfinite().all() for g in gradients(model.generator))
    assert any(g.any() for g in gradients(model.generator))
    for net in (model.discriminators, model.segmenter):
        assert gradients(net) == [None] * len(gradients(net))


def test_matched_features_pull_synthetic_images_and_never_real_ones():
    model = made()
    labels, image, synthetic, atlas = step_inputs(model, example())
    image.requires_grad_()
    synthetic = synthetic.detach().requires_grad_()
    losses = model.generator_losses(labels, image, synthetic, atlas)
    real, fake = torch.autograd.grad(losses["features"], (image, synthetic), allow_unused=True)
    assert real is None
    assert fake.any()
    same = model.generator_losses(labels, image.detach(), image.detach(), atlas)
    assert float(same["features"]) == 0


def test_shapes_of_real_slices_teach_u_and_those_of_synthetic_ones_g_too():
    for term, moved in (("shape_real", {"segmenter"}), ("shape_synthetic", {"generator", "segmenter"})):
        model = made()
        model.generator_losses(*step_inputs(model, example()))[term].backward()
        names = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert names == moved


def test_u_may_learn_from_real_slices_alone():
    """Then it does not meet G halfway, nor do its batch norms note what G makes; G's gradient is the same."""
    found = []
    for freeze in (False, True):
        model = made(freeze_unet_on_synthetic=freeze)
        inputs = step_inputs(model, example())
        losses = model.generator_losses(*inputs)
        statistics = state(model.segmenter)
        losses["loss"].backward()
        found.append((model, inputs, losses, statistics))
    (free, *_), (model, (labels, image, *_), losses, statistics) = found
    torch.testing.assert_close(losses, found[0][2])
    torch.testing.assert_close(gradients(model.generator), gradients(free.generator))
    alone = made()
    dice_error(alone, image, labels).backward()
    torch.testing.assert_close(gradients(model.segmenter), gradients(alone.segmenter))
    torch.testing.assert_close(statistics, state(alone.segmenter))
    assert any(
        not torch.allclose(a, b) for a, b in zip(gradients(free.segmenter), gradients(model.segmenter), strict=True)
    )
    assert all(p.requires_grad for p in model.parameters())


# ----- regions -------------------------------------------------------------------------------------------------------


def terms(model, labels, image, synthetic, atlas):
    """Logits and features of real and of synthetic slices, by region."""
    real, fake = model.discriminate(labels, image, atlas), model.discriminate(labels, synthetic, atlas)
    return [[*real[2 * k], *real[2 * k + 1], *fake[2 * k], *fake[2 * k + 1]] for k in range(3)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("which", ["image", "synthetic", "atlas"])
def test_what_is_outside_the_lesion_does_not_count_for_its_discriminators(which):
    model = made()
    inputs = dict(zip(("labels", "image", "synthetic", "atlas"), step_inputs(model, example()), strict=True))
    outside = ~regions(inputs["labels"])[:, LESION, None]
    other = {**inputs, which: torch.where(outside, 0.3, inputs[which])}
    before, after = terms(model, **inputs), terms(model, **other)
    assert same(before[LESION], after[LESION])
    assert not same(before[NORMAL], after[NORMAL])
    other = {**inputs, which: torch.where(outside, inputs[which], 0.3)}
    before, after = terms(model, **inputs), terms(model, **other)
    assert not same(before[LESION], after[LESION])
    assert same(before[NORMAL], after[NORMAL])
    assert same(before[BACKGROUND], after[BACKGROUND])


def test_what_is_unknown_is_judged_by_nobody():
    """Neither its image nor what U says of it."""
    model, batch = made(), example()
    labels, image, synthetic, atlas = step_inputs(model, batch)
    unknown = (batch["label"] == 255)[:, None]
    other = torch.where(unknown, 0.9, image)
    for k in range(3):
        assert same(*(terms(model, labels, x, synthetic, atlas)[k] for x in (image, other)))
    find = model.segmenter
    errors = []
    for there in (-9.0, 9.0):
        answer = torch.tensor([there, 0, 0, 0]).reshape(1, 4, 1, 1)
        model.segmenter = None
        model.__dict__["segmenter"] = lambda x, answer=answer: torch.where(unknown, answer, find(x))
        errors.append(float(model._shape_error(labels, image).detach()))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_without_a_lesion_its_discriminators_stay_as_they_are(norm):
    """Although Adam has a momentum of earlier batches, which gradients of zero would let run on."""
    model = made(norm=norm)
    model.training_step(example(), 0)
    lesions, others = model.discriminators.discriminators[4:], model.discriminators.discriminators[:4]
    before = [state(net) for net in lesions], [state(net) for net in others]
    model.training_step(example(seed=1, lesion=False), 1)
    for net, then in zip(lesions, before[0], strict=True):
        assert changed(net, then) & weights(net) == set()
    for net, then in zip(others, before[1], strict=True):
        assert weights(net) <= changed(net, then)
    assert all(value == pytest.approx(value) and abs(value) < 1e6 for value in model.logged.values())
    assert all(p.isfinite().all() for p in model.parameters())
    model.training_step(example(seed=2), 2)
    assert all(weights(net) <= changed(net, then) for net, then in zip(lesions, before[0], strict=True))


def test_a_slice_without_lesion_adds_nothing_to_the_lesions_terms():
    model, ill, healthy = made(), example(slices=1), example(seed=1, slices=1, lesion=False)
    both = {key: torch.cat([ill[key], healthy[key]]) for key in ("image", "label", "brain", "atlas")}
    alone, mixed = ([*model.discriminate(*parts)] for parts in (model.parts(ill), model.parts(both)))
    assert all(same(a, b) for a, b in zip(alone[4:], mixed[4:], strict=True))
    assert [len(stages[-1]) for stages in mixed] == [2, 2, 2, 2, 1, 1]
    assert [len(stages[-1]) for stages in model.discriminate(*model.parts(healthy))] == [1] * 4


# ----- ablations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "decoders", "judges"),
    [
        ({}, 2, 6),
        ({"stretch_out": False}, 1, 6),
        ({"label_wise": False}, 2, 2),
        ({"atlas": False}, 2, 6),
        ({"shape_weight": 0}, 2, 6),
        ({"stretch_out": False, "label_wise": False, "atlas": False, "shape_weight": 0.0}, 1, 2),
    ],
)
def test_every_ablation_trains_and_is_validated(changes, decoders, judges):
    model = made(**changes)
    assert (len(model.generator.decoders), len(model.discriminators.discriminators)) == (decoders, judges)
    assert (model.generator.atlas_encoder is None) == ("atlas" in changes)
    assert (model.segmenter is None) == ("shape_weight" in changes)
    batch, before = example(), state(model)
    if not changes.get("atlas", True):
        del batch["atlas"]
    model.training_step(batch, 0)
    assert weights(model) <= changed(model, before)
    assert any("shape" in name for name in model.logged) == (model.segmenter is not None)
    model.eval().validation_step(batch, 0)
    model.on_validation_epoch_end()
    assert all(value == value for value in model.logged.values())  # no nan


def test_without_an_atlas_nobody_looks_at_one():
    model, batch = made(atlas=False), example()
    assert model.parts(batch)[2] is None
    assert model.discriminators.discriminators[0].stages[0][0].in_channels == 4 + 2
    assert model.generate_slices(batch["label"], batch["brain"]).shape == (2, 2, SIZE, SIZE)


def test_a_missing_atlas_is_missed():
    model, batch = made(), example()
    del batch["atlas"]
    for call in (lambda: model.training_step(batch, 0), lambda: model.generate_slices(batch["label"], batch["brain"])):
        with pytest.raises(ValueError, match="built with an atlas, got none"):
            call()


# ----- training ------------------------------------------------------------------------------------------------------


def test_training_on_one_batch_brings_the_images_nearer():
    model = made(filters=4, unet_filters=4, discriminator_filters=4, lr=5e-4)
    batch = {key: example()[key][..., 4:44, 4:44] for key in ("image", "label", "brain", "atlas")}
    values = torch.tensor([[-1.0, 0.2, 0.9], [-1.0, -0.3, 0.5]])  # of background, normal brain and lesion
    batch["image"] = torch.einsum("cr,brxy->bcxy", values, regions(model.parts(batch)[0]).float())
    errors, logged = [], []
    for step in range(20):
        if step in (0, 19):
            _, image, synthetic, _ = step_inputs(model, batch)
            errors.append(float((synthetic - image).abs().mean().detach()))
        model.training_step(batch, step)
        logged.append(dict(model.logged))
    assert errors[1] < 0.5 * errors[0]
    for name in ("train/shape_real", "train/shape_synthetic"):
        assert logged[-1][name] < logged[0][name]


def test_each_side_improves_against_the_other_as_it_is():
    model, batch = made(), example()
    inputs = step_inputs(model, batch)
    losses = [float(model.discriminator_step(*inputs)["discriminator"]) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    model = made()
    losses = [float(model.generator_step(*step_inputs(model, batch))["loss"]) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_plan_counts_both_sides_and_knows_no_values():
    model, batch = made(), example()
    real = model.losses(batch)["loss"]
    real.backward()
    assert all(p.grad is not None for p in model.parameters())
    inputs = step_inputs(made(), batch)
    both = made().discriminator_loss(*inputs) + made().generator_losses(*inputs)["loss"]
    torch.testing.assert_close(real, both)
    for changes in ({}, {"label_wise": False}, {"atlas": False}):
        with torch.device("meta"):
            meta = {key: torch.empty_like(batch[key], device="meta") for key in ("image", "label", "brain")}
        model = made(**changes).to("meta")
        loss = model.losses(meta, torch.ones(3))["loss"]
        loss.backward()
        assert loss.device.type == "meta"
        assert all(p.grad is not None for p in model.parameters())


def test_the_learning_rate_is_constant_and_then_falls_linearly():
    sides = made(lr=1.0, betas=[0.3, 0.9], constant_epochs=3, decay_epochs=4).configure_optimizers()
    assert [side["lr_scheduler"]["name"] for side in sides] == ["lr-generator", "lr-discriminators"]
    for side in sides:
        optimizer, scheduler = side["optimizer"], side["lr_scheduler"]["scheduler"]
        assert optimizer.param_groups[0]["betas"] == (0.3, 0.9)
        rates = []
        for _ in range(8):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


class Slices(torch.utils.data.Dataset):
    """Four slices, every other one without lesion."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {key: value[0] for key, value in example(index, 1, lesion=index % 2 == 0).items()}


def test_lightning_trains_it_and_resumes_both_sides_and_their_schedule(tmp_path):
    def trainer(epochs):
        return pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            callbacks=[pl.callbacks.ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)],
        )

    settings = {"cls": SAMR, "constant_epochs": 1, "decay_epochs": 3, "lr": 1e-3}
    loader, first = DataLoader(Slices(), batch_size=2), trainer(2)
    first.fit(made(**settings), loader, loader)
    assert first.global_step == 2 * 2 * 2  # epochs, batches, sides
    names = ("train/loss_epoch", "val/loss", "val/mae_lesion", "val/shape_real", "val/shape_synthetic")
    assert all(first.callback_metrics[name].isfinite() for name in names)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    again, model, seen = trainer(3), made(**settings), []
    model.on_train_epoch_start = lambda: seen.append([o.param_groups[0]["lr"] for o in again.optimizers])
    again.fit(model, loader, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert seen == [pytest.approx([1e-3 * 0.5] * 2)]  # the third of the epochs
    assert all(next(iter(o.state.values()))["step"] == 3 * 2 for o in again.optimizers)


# ----- validation and generation -------------------------------------------------------------------------------------


def validated(model, *subjects):
    with torch.no_grad():
        for batch in subjects:
            model.validation_step(batch, 0)
    return {name: float(value) for name, value in model.val_means.take().items()}


@pytest.mark.parametrize("slices", [1, 18])
def test_validation_is_of_whole_subjects_in_parts(slices):
    model, batch = made().eval(), example(slices=slices)
    means = validated(model, batch)
    labels, image, atlas = model.parts(batch)
    with torch.no_grad():
        synthetic = model(labels, atlas)
        error, lesion = (synthetic - image).abs(), (batch["label"] == 1) | (batch["label"] == 2)
        brain = batch["brain"] & (batch["label"] != 255)
        assert means["mae_brain"] == pytest.approx(float(error.movedim(1, -1)[brain].mean()), rel=1e-5)
        assert means["mae_lesion"] == pytest.approx(float(error.movedim(1, -1)[lesion].mean()), rel=1e-5)
        assert means["loss"] == means["mae_brain"]
        assert means["shape_real"] == pytest.approx(float(dice_error(model, image, labels)), rel=1e-5)
        assert means["shape_synthetic"] == pytest.approx(float(dice_error(model, synthetic, labels)), rel=1e-5)


def test_every_subject_weighs_the_same_and_one_without_lesion_has_no_error_in_it():
    model = made().eval()
    ill, healthy = example(slices=1), example(seed=1, slices=3, lesion=False)
    one, other, both = validated(model, ill), validated(model, healthy), validated(model, ill, healthy)
    assert both["mae_brain"] == pytest.approx((one["mae_brain"] + other["mae_brain"]) / 2)
    assert other["mae_lesion"] != other["mae_lesion"]
    assert both["mae_lesion"] == one["mae_lesion"]


@torch.no_grad()
def test_generation_is_of_the_labels_that_are_given_and_leaves_the_model_as_it_is():
    model, batch = made(), example(slices=18)
    model(*model.parts(batch)[::2])  # so that its batch norms have statistics
    before = state(model)
    images = model.generate_slices(batch["label"], batch["brain"], batch["atlas"])
    assert changed(model, before) == set()
    assert all(m.training for m in model.modules())
    assert (images.shape, images.dtype) == ((18, 2, SIZE, SIZE), torch.float32)
    assert float(images.abs().max()) <= 1
    labels = label_map(batch["label"], batch["brain"], 3)
    torch.testing.assert_close(images, copy.deepcopy(model).eval()(labels, batch["atlas"]))
    alone = model.generate_slices(*(batch[key][17:] for key in ("label", "brain", "atlas")))
    torch.testing.assert_close(alone, images[17:])
    mirrored = model.generate_slices(batch["label"].flip(1), batch["brain"], batch["atlas"])
    assert not torch.allclose(mirrored, images)


@torch.no_grad()
def test_it_answers_the_generators_protocol():
    model = made()
    assert isinstance(model, Generator)
    assert (model.modalities, model.guides, model.scale) == (MODALITIES, ("atlas",), "symmetric")
    assert made(atlas=False).guides == ()
    batches = [example(seed=seed, slices=2) for seed in range(2)]
    given = [LabelMaps(batch["label"], batch["brain"], {"atlas": batch["atlas"]}) for batch in batches]
    subjects = list(model.generate(given, seed=3))
    for batch, subject in zip(batches, subjects, strict=True):
        expected = model.generate_slices(batch["label"], batch["brain"], batch["atlas"])
        assert torch.equal(subject.image, expected)
        assert subject.label is batch["label"]
        assert subject.brain is batch["brain"]
    assert torch.equal(next(model.generate(given, seed=4)).image, subjects[0].image)


def test_the_logits_may_be_left_unmatched():
    printed, without = made(), made(match_output=False)
    labels, image, atlas = printed.parts(example())
    synthetic = printed(labels, atlas)
    found = [model.generator_losses(labels, image, synthetic, atlas)["features"] for model in (printed, without)]
    real, fake = (printed.discriminate(labels, images, atlas) for images in (image, synthetic))
    logits = sum(F.mse_loss(f[-1], r[-1]) for r, f in zip(real, fake, strict=True))
    assert float(found[0] - found[1]) == pytest.approx(float(logits), rel=1e-4)
