"""Paper 2's baselines: who learns from what, losses by hand, and noise that follows from the seed."""

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
from mrgen.launch.instantiate import instantiate
from mrgen.nets.blocks import Dropout
from mrgen.papers.label_to_image import LabelToImage
from mrgen.protocols import Generator, LabelMaps
from tests.launch.tools import composed

MODALITIES = ("t1", "flair")
CLASSES = ("background", "core", "edema")
SIZE = 64
PIX2PIX = {"downs": 6}
SHIN = {"downs": 6, "tissue": True}
PIX2PIXHD = {
    "generator": "global",
    "downs": 4,
    "blocks": 2,
    "l1_weight": 0.0,
    "feature_weight": 10.0,
    "least_squares": True,
}
BASELINES = pytest.mark.parametrize("settings", [PIX2PIX, PIX2PIXHD, SHIN], ids=["pix2pix", "pix2pixhd", "shin"])


class At(LabelToImage):
    """The module without a trainer: what Lightning does in its steps, done plainly."""

    def optimizers(self):
        if "sides" not in self.__dict__:
            self.__dict__["sides"] = [conf["optimizer"] for conf in self.configure_optimizers()]
        return self.sides

    def manual_backward(self, loss):
        loss.backward()

    def log(self, name, value, **kwargs):
        self.__dict__.setdefault("logged", {})[name] = float(value)


def made(settings=PIX2PIX, cls=At, **changes):
    torch.manual_seed(0)
    small = {"modalities": MODALITIES, "classes": CLASSES, "filters": 4, "discriminator_filters": 2, "lr": 1e-2}
    return cls(**{**small, **settings, **changes}).train()


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
        "tissue": torch.rand(slices, 3, SIZE, SIZE, generator=generator).softmax(dim=1),
        "subject": ["s"] * slices,
        "spacing": torch.ones(slices, 3),
    }


def step_inputs(model, batch):
    condition, image = model.parts(batch)
    return condition, image, model(condition)


def generated(model, batch, seed=0, **changes):
    parts = {**batch, **changes}
    return model.generate_slices(parts["label"], parts["brain"], parts.get("tissue"), seed=seed)


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


# ----- what it is ----------------------------------------------------------------------------------------------------


@BASELINES
def test_each_is_a_generator_of_every_sequence(settings):
    model = made(settings)
    assert isinstance(model, Generator)
    assert (model.modalities, model.scale) == (MODALITIES, "symmetric")
    assert model.guides == (("tissue",) if settings is SHIN else ())
    assert model.divisor == 2 ** settings["downs"]
    images = step_inputs(model, example())[2]
    assert (images.shape, images.dtype) == ((2, 2, SIZE, SIZE), torch.float32)
    assert float(images.detach().abs().max()) <= 1


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="expected no lesion and one class of lesion or more"):
        made(classes=["background"])
    with pytest.raises(ValueError, match="expected unet or global"):
        made(generator="resnet")


@pytest.mark.parametrize(("downs", "size", "dropouts"), [(8, 256, 3), (6, 64, 1), (5, 64, 0)])
def test_pix2pix_halves_to_one_pixel_and_keeps_its_dropout(downs, size, dropouts):
    with torch.device("meta"):
        model = LabelToImage(modalities=["a", "b", "c", "d", "e"], classes=[*CLASSES, "tumour"], downs=downs)
        images = model(torch.empty(2, 5, size, size))
        (stages,) = model.discriminate(torch.empty(2, 5, size, size), images)
    assert images.shape == (2, 5, size, size)
    assert len([m for m in model.modules() if isinstance(m, Dropout)]) == dropouts
    assert stages[-1].shape[2:] == ((30, 30) if size == 256 else (6, 6))  # Isola et al.'s PatchGAN of 70 pixels
    assert stages[0].shape[1] == 64


def test_pix2pixhd_is_the_global_generator_layer_by_layer():
    """As its authors describe it: nine blocks, no layer of ours beside them. Biases before a norm count for nothing."""

    def conv(n, m, kernel):
        return [nn.ReflectionPad2d(kernel // 2), nn.Conv2d(n, m, kernel, bias=False), nn.InstanceNorm2d(m)]

    class Block(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.body = nn.Sequential(*conv(n, n, 3), nn.ReLU(), *conv(n, n, 3))

        def forward(self, x):
            return x + self.body(x)

    layers = [*conv(4, 4, 7), nn.ReLU()]
    for n in (4, 8, 16, 32):
        layers += [nn.Conv2d(n, 2 * n, 3, stride=2, padding=1, bias=False), nn.InstanceNorm2d(2 * n), nn.ReLU()]
    layers += [Block(64) for _ in range(9)]
    for n in (64, 32, 16, 8):
        up = nn.ConvTranspose2d(n, n // 2, 3, stride=2, padding=1, output_padding=1, bias=False)
        layers += [up, nn.InstanceNorm2d(n // 2), nn.ReLU()]
    reference = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(4, 2, 7), nn.Tanh())

    model = made(PIX2PIXHD, blocks=9)
    ours = dict(zip(reference.state_dict(), model.generator.state_dict().values(), strict=True))
    reference.load_state_dict(ours)
    condition, _, images = step_inputs(model, example())
    torch.testing.assert_close(images, reference(condition))


def test_pix2pixhd_judges_at_two_scales_with_instance_norm():
    model = made(PIX2PIXHD)
    condition, image, _ = step_inputs(model, example())
    inputs = torch.cat([condition, image], dim=1)
    torch.testing.assert_close(model.discriminate(condition, image), model.discriminators(inputs)[0])
    assert [len(stages) for stages in model.discriminate(condition, image)] == [5, 5]
    assert len(made(PIX2PIXHD, scales=3).discriminate(condition, image)) == 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with torch.device("meta"):
        full = LabelToImage(modalities=["t1"], classes=CLASSES, **{**PIX2PIXHD, "blocks": 9})
    assert max(p.shape[0] for p in full.generator.parameters()) == 1024  # no cap


# ----- conf ----------------------------------------------------------------------------------------------------------


def conf(name):
    """The conf of a model, resolved for BraTS's four sequences and three classes of lesion."""
    return OmegaConf.to_container(composed("train", f"model={name}", "data=brats2019").model, resolve=True)


def test_conf_says_what_the_constructor_does():
    settings = conf("label_pix2pix")
    defaults = {name: p.default for name, p in inspect.signature(LabelToImage).parameters.items()}
    given = {name: value for name, value in settings.items() if name not in ("_target_", "modalities", "classes")}
    assert {**given, "betas": tuple(given["betas"])} == {name: defaults[name] for name in given}
    assert set(settings) == {"_target_", *defaults}
    assert settings["classes"] == ["background", "necrotic and non-enhancing core", "edema", "enhancing"]


def test_the_others_are_pix2pix_but_for_what_they_say():
    base = conf("label_pix2pix")
    assert conf("label_shin") == {**base, "tissue": True}
    assert conf("label_pix2pixhd") == {**base, **PIX2PIXHD, "blocks": 9}


@pytest.mark.parametrize("name", ["label_pix2pix", "label_pix2pixhd", "label_shin"])
def test_every_conf_makes_a_model_of_the_cohort(name):
    with torch.device("meta"):
        model = instantiate(composed("train", f"model={name}", "data=brats2019").model)
        condition = torch.empty(1, 5 + 3 * (name == "label_shin"), 256, 256)
        assert model(condition).shape == (1, 4, 256, 256)


# ----- tissue --------------------------------------------------------------------------------------------------------


def test_tissue_is_told_where_the_brain_is_normal_and_nowhere_else():
    model, batch = made(SHIN), example()
    condition, _ = model.parts(batch)
    torch.testing.assert_close(condition[:, :4], label_map(batch["label"], batch["brain"], 3))
    normal = (batch["brain"] & (batch["label"] == 0))[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(condition[:, 4:][normal], batch["tissue"][normal])
    assert not condition[:, 4:][~normal].any()


def test_a_lesion_that_was_put_there_takes_the_place_of_tissue():
    model, batch = made(SHIN), example(lesion=False)
    labels = batch["label"].clone()
    labels[:, 10:20, 10:20] = 1
    before, after = model.parts(batch)[0], model.parts({**batch, "label": labels})[0]
    assert before[:, 4:, 10:20, 10:20].all()
    assert not after[:, 4:, 10:20, 10:20].any()
    torch.testing.assert_close(after[:, 4:, 20:], before[:, 4:, 20:])


def test_both_sides_see_the_tissue():
    model, batch = made(SHIN), example()
    image = batch["image"]
    one, other = (model.parts({**batch, "tissue": tissue})[0] for tissue in (batch["tissue"], batch["tissue"].flip(1)))
    assert not torch.allclose(model(one), model(other))
    assert not torch.allclose(model.discriminate(one, image)[0][0], model.discriminate(other, image)[0][0])
    assert torch.equal(*(made().parts({**batch, "tissue": tissue})[0] for tissue in (one[:, 4:], other[:, 4:])))


def test_missing_tissue_is_missed():
    model, batch = made(SHIN), example()
    del batch["tissue"]
    for call in (lambda: model.training_step(batch, 0), lambda: generated(model, batch)):
        with pytest.raises(ValueError, match="built with tissue probabilities, got none"):
            call()
    made().training_step(batch, 0)


# ----- losses by hand ------------------------------------------------------------------------------------------------


@BASELINES
@pytest.mark.parametrize("least_squares", [False, True])
def test_adversarial_losses_by_hand(settings, least_squares):
    model = made(settings, least_squares=least_squares)
    condition, image, synthetic = step_inputs(model, example())

    def logits(images):
        return [stages[-1] for stages in model.discriminate(condition, images)]

    def wrong(found, truth):
        return (found - truth).square().mean() if least_squares else F.softplus((1 - 2 * truth) * found).mean()

    pairs = list(zip(logits(image), logits(synthetic), strict=True))
    assert len(pairs) == (2 if settings is PIX2PIXHD else 1)
    expected = sum((wrong(real, 1) + wrong(fake, 0)) / 2 for real, fake in pairs)
    torch.testing.assert_close(model.discriminator_loss(condition, image, synthetic), expected)
    losses = model.generator_losses(condition, image, synthetic)
    torch.testing.assert_close(losses["adversarial"], sum(wrong(fake, 1) for _, fake in pairs))


def test_l1_by_hand():
    """The mean over the slice, background and all, but for what has no label."""
    model, batch = made(), example()
    condition, image, synthetic = step_inputs(model, batch)
    losses = model.generator_losses(condition, image, synthetic)
    known = batch["label"] != 255
    expected = (image - synthetic).abs().movedim(1, -1)[known].mean()
    torch.testing.assert_close(losses["l1"], expected)
    torch.testing.assert_close(losses["loss"], losses["adversarial"] + 100 * losses["l1"])
    assert set(losses) == {"adversarial", "l1", "loss"}
    unknown = {**batch, "label": torch.full_like(batch["label"], 255)}
    assert float(model.generator_losses(*step_inputs(model, unknown))["l1"].detach()) == 0


def test_matched_features_by_hand_have_no_logits():
    model = made(PIX2PIXHD)
    condition, image, synthetic = step_inputs(model, example())
    losses = model.generator_losses(condition, image, synthetic)
    real, fake = model.discriminate(condition, image), model.discriminate(condition, synthetic)
    distances = [
        (r - f).abs().mean() for rs, fs in zip(real, fake, strict=True) for r, f in zip(rs[:-1], fs[:-1], strict=True)
    ]
    assert len(distances) == 2 * 4
    torch.testing.assert_close(losses["features"], sum(distances) / 2)  # 4 / (3 + 1) a stage, 1/2 a scale
    torch.testing.assert_close(losses["loss"], losses["adversarial"] + 10 * losses["features"])
    assert set(losses) == {"adversarial", "features", "loss"}
    with torch.no_grad():
        for net in model.discriminators.discriminators:
            net.stages[-1].weight.mul_(7)
    later = model.generator_losses(condition, image, synthetic)
    torch.testing.assert_close(later["features"], losses["features"])
    assert not torch.allclose(later["adversarial"], losses["adversarial"])


def test_matched_features_pull_synthetic_images_and_never_real_ones():
    model = made(PIX2PIXHD)
    condition, image, synthetic = step_inputs(model, example())
    image, synthetic = image.requires_grad_(), synthetic.detach().requires_grad_()
    features = model.generator_losses(condition, image, synthetic)["features"]
    real, fake = torch.autograd.grad(features, (image, synthetic), allow_unused=True)
    assert real is None
    assert fake.any()
    image = image.detach()
    assert float(model.generator_losses(condition, image, image)["features"].detach()) == 0


# ----- each side leaves the other alone ------------------------------------------------------------------------------


@BASELINES
def test_a_step_of_the_discriminators_leaves_the_generator_as_it_was(settings):
    model = made(settings)
    inputs = step_inputs(model, example())
    judges, generator = state(model.discriminators), state(model.generator)
    model.discriminator_step(*inputs)
    assert changed(model.generator, generator) == set()
    assert gradients(model.generator) == [None] * len(gradients(model.generator))
    assert weights(model.discriminators) <= changed(model.discriminators, judges)


@BASELINES
def test_a_step_of_the_generator_leaves_the_discriminators_as_they_were(settings):
    """Weights, gradients, running means and variances and their counters."""
    model = made(settings)
    inputs = step_inputs(model, example())
    model.discriminator_step(*inputs)  # so that they have gradients and statistics to lose
    judges, gradient = state(model.discriminators), [g.clone() for g in gradients(model.discriminators)]
    generator = state(model.generator)
    model.generator_step(*inputs)
    assert changed(model.discriminators, judges) == set()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model.discriminators), gradient, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert weights(model.generator) <= changed(model.generator, generator)


@BASELINES
def test_a_batch_is_one_step_of_each_the_discriminators_first(settings):
    model, order, calls = made(settings), [], []
    for name, optimizer in zip(("generator", "discriminators"), model.optimizers(), strict=True):
        optimizer.register_step_pre_hook(lambda *_, name=name: order.append(name))
    model.generator.register_forward_hook(lambda *_: calls.append("generator"))
    model.training_step(example(), 0)
    assert order == ["discriminators", "generator"]
    assert calls == ["generator"]
    held = "features" if settings is PIX2PIXHD else "l1"
    assert set(model.logged) == {f"train/{name}" for name in ("loss", "discriminator", "adversarial", held)}


def test_each_side_has_its_own_adam_and_the_rate_falls_linearly_in_the_end():
    model = made(lr=1.0, betas=[0.3, 0.9], constant_epochs=3, decay_epochs=4)
    sides = model.configure_optimizers()
    assert [side["lr_scheduler"]["name"] for side in sides] == ["lr-generator", "lr-discriminators"]
    for side, net in zip(sides, (model.generator, model.discriminators), strict=True):
        (group,) = side["optimizer"].param_groups
        assert (type(side["optimizer"]), group["betas"]) == (torch.optim.Adam, (0.3, 0.9))
        assert list(map(id, group["params"])) == [id(p) for p in net.parameters()]
        rates = []
        for _ in range(8):
            rates.append(group["lr"])
            side["optimizer"].step()
            side["lr_scheduler"]["scheduler"].step()
        assert rates == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


# ----- training ------------------------------------------------------------------------------------------------------


@BASELINES
def test_training_on_one_batch_brings_the_images_nearer(settings):
    model, batch = made(settings, lr=2e-3), example()
    values = torch.tensor([[-1.0, 0.2, 0.9, 0.7], [-1.0, -0.3, 0.5, 0.8]])  # of every label
    batch["image"] = torch.einsum("cl,blxy->bcxy", values, label_map(batch["label"], batch["brain"], 3))
    errors = []
    for step in range(16):
        if step in (0, 15):
            _, image, synthetic = step_inputs(model, batch)
            errors.append(float((synthetic - image).abs().mean().detach()))
        model.training_step(batch, step)
    assert errors[1] < 0.8 * errors[0]


@BASELINES
def test_a_plan_counts_both_sides_and_knows_no_values(settings):
    model, batch = made(settings, dropout=0.0), example()
    loss = model.losses(batch, torch.ones(3))["loss"]
    inputs = step_inputs(model, batch)
    both = model.discriminator_loss(*inputs) + model.generator_losses(*inputs)["loss"]
    torch.testing.assert_close(loss, both)
    meta = {key: torch.empty_like(batch[key], device="meta") for key in ("image", "label", "brain")}
    model = made(settings).to("meta")
    loss = model.losses(meta, torch.ones(3, device="meta"))["loss"]
    loss.backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None for p in model.parameters())


class Slices(torch.utils.data.Dataset):
    """Four slices, every other one without lesion."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {key: value[0] for key, value in example(index, 1, lesion=index % 2 == 0).items()}


@BASELINES
def test_lightning_trains_it_and_resumes_both_sides_and_their_schedule(settings, tmp_path):
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

    changes = {"cls": LabelToImage, "constant_epochs": 1, "decay_epochs": 3, "lr": 1e-3}
    loader, first = DataLoader(Slices(), batch_size=2), trainer(2)
    first.fit(made(settings, **changes), loader, loader)
    assert first.global_step == 2 * 2 * 2  # epochs, batches, sides
    assert all(first.callback_metrics[f"val/{name}"].isfinite() for name in ("loss", "mae_brain", "mae_lesion"))
    again, model, seen = trainer(3), made(settings, **changes), []
    model.on_train_epoch_start = lambda: seen.append([o.param_groups[0]["lr"] for o in again.optimizers])
    again.fit(model, loader, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert seen == [pytest.approx([1e-3 * 0.5] * 2)]  # the third of the epochs
    assert all(next(iter(o.state.values()))["step"] == 3 * 2 for o in again.optimizers)


# ----- validation ----------------------------------------------------------------------------------------------------


def validated(model, *subjects):
    for batch in subjects:
        model.validation_step(batch, 0)
    return {name: float(value) for name, value in model.val_means.take().items()}


@BASELINES
def test_validation_is_of_whole_subjects_and_of_the_same_noise_every_time(settings):
    model, batch = made(settings).eval(), example(slices=18)
    means = validated(model, batch)
    error = (generated(model, batch) - batch["image"]).abs().movedim(1, -1)
    lesion = (batch["label"] == 1) | (batch["label"] == 2)
    assert means["mae_brain"] == pytest.approx(float(error[batch["brain"] & (batch["label"] != 255)].mean()), rel=1e-5)
    assert means["mae_lesion"] == pytest.approx(float(error[lesion].mean()), rel=1e-5)
    assert means["loss"] == means["mae_brain"]
    assert validated(model, batch) == means
    healthy = validated(model, example(seed=1, slices=1, lesion=False))
    assert healthy["mae_lesion"] != healthy["mae_lesion"]  # nan: there is none


# ----- generation ----------------------------------------------------------------------------------------------------


@BASELINES
def test_generation_leaves_the_model_and_everybodys_random_numbers_as_they_are(settings):
    model, batch = made(settings), example(slices=18)
    model.training_step(batch, 0)  # so that batch norms have statistics
    before, drawn = state(model), torch.random.get_rng_state()
    images = generated(model, batch)
    assert changed(model, before) == set()
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert (images.shape, images.dtype, images.requires_grad) == ((18, 2, SIZE, SIZE), torch.float32, False)
    assert float(images.abs().max()) <= 1
    assert not torch.allclose(generated(model, batch, label=batch["label"].flip(1)), images)


@BASELINES
def test_the_seed_is_all_that_noise_follows_from(settings):
    model, batch = made(settings), example()
    images = generated(model, batch, seed=1)
    torch.manual_seed(99)
    assert torch.equal(generated(model, batch, seed=1), images)
    assert torch.equal(generated(model, batch, seed=2), images) == (settings is PIX2PIXHD)  # it has none
    still = made(settings, dropout=0.0)
    assert torch.equal(generated(still, batch, seed=1), generated(still, batch, seed=2))


@BASELINES
def test_slices_do_not_depend_on_one_another(settings):
    """Nor on the statistics of those beside them, which Pix2Pix's batch norms would use at test."""
    model, batch = made(settings), example(slices=3)
    model.training_step(batch, 0)
    images = generated(model, batch)
    label = batch["label"].clone()
    label[1] = label[1].flip(0)
    other = generated(model, batch, label=label)
    assert torch.equal(other[[0, 2]], images[[0, 2]])
    assert not torch.allclose(other[1], images[1])


def test_generation_uses_running_statistics():
    model, batch = made(SHIN, dropout=0.0), example(slices=18)
    model.training_step(batch, 0)
    condition, _ = model.parts(batch)
    torch.testing.assert_close(generated(model, batch), copy.deepcopy(model).eval()(condition).detach())
    alone = {key: batch[key][17:] for key in ("label", "brain", "tissue")}
    torch.testing.assert_close(generated(model, alone), generated(model, batch)[17:])


def test_subjects_come_one_at_a_time_with_noise_of_their_own():
    model, batch = made(SHIN), example()
    maps = LabelMaps(batch["label"], batch["brain"], {"tissue": batch["tissue"]})

    def subjects(number):
        for _ in range(number):
            asked.append(1)
            yield maps

    asked = []
    stream = model.generate(subjects(3), seed=5)
    first = next(stream)
    assert len(asked) == 1
    assert first.image.shape == (2, 2, SIZE, SIZE)
    assert (first.label is batch["label"], first.brain is batch["brain"]) == (True, True)
    rest = [subject.image for subject in stream]
    assert not torch.equal(first.image, rest[0])
    again = [subject.image for subject in model.generate(subjects(2), seed=5)]
    assert torch.equal(again[0], first.image)
    assert torch.equal(again[1], rest[0])
    assert not torch.equal(next(model.generate(subjects(1), seed=6)).image, first.image)
