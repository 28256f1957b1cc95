import math

import pytest
import pytorch_lightning as pl
import torch
import torchio
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from mrgen.data.batch import volumes
from mrgen.evaluation.inference import WholeSynthesizer
from mrgen.launch.paths import CONF_DIR
from mrgen.papers.pix2pix import Pix2Pix, brain_l1, tumour_error
from mrgen.protocols import Segmenter, Synthesizer
from tests.launch.tools import call, composed

MODALITIES = ("t1", "t2", "flair")
SIZE = 8


class At(Pix2Pix):
    """Pix2Pix without a trainer: what Lightning does in its steps, done plainly."""

    def optimizers(self):
        if "players" not in self.__dict__:
            self.__dict__["players"] = [conf["optimizer"] for conf in self.configure_optimizers()]
        return self.players

    def manual_backward(self, loss):
        loss.backward()

    def log(self, name, value, **kwargs):
        self.__dict__.setdefault("logged", {})[name] = value


def pix2pix(cls=At, **changes):
    torch.manual_seed(0)
    small = {"filters": 4, "downs": 2, "blocks": 1, "discriminator_filters": 4, "discriminator_layers": 1}
    return cls(**{"modalities": MODALITIES, "target": "t2", **small, **changes})


def example(seed=0, subjects=1, tumour=True):
    """Raw intensities with a background of 0, as a scan has them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (subjects, SIZE, SIZE, SIZE)
    brain = torch.ones(shape, dtype=torch.bool)
    brain[:, :2] = False
    image = (100 + 50 * torch.randn(subjects, 3, SIZE, SIZE, SIZE, generator=generator)).clamp(min=1) * brain[:, None]
    label = torch.zeros(shape, dtype=torch.int64)
    if tumour:
        label[:, 4:6, 3:5, 3:5] = torch.randint(1, 4, (subjects, 2, 2, 2), generator=generator)
    return {"image": image, "label": label, "brain": brain, "subject": [f"s{i}" for i in range(subjects)]}


def step_inputs(model, batch):
    source, target = model.pair(batch)
    return source, target, model.generator(source)


# ----- what it takes and makes -------------------------------------------------------------------------------------


def test_it_makes_t2_from_t1_unless_told_otherwise():
    model = pix2pix()
    assert (model.sources, model.targets, model.scale) == (("t1",), ("t2",), "unit")
    assert isinstance(model, Synthesizer)
    assert not isinstance(model, Segmenter)
    assert (model.divisor, pix2pix(generator="resnet").divisor) == (4, 4)
    model = pix2pix(target="flair", sources=["t2", "t1"])
    assert (model.sources, model.targets) == (("t2", "t1"), ("flair",))
    source, target = model.pair(example())
    assert (source.shape, target.shape) == ((1, 2, 8, 8, 8), (1, 1, 8, 8, 8))
    assert torch.equal(source[:, :1], pix2pix().pair(example())[1])  # t2 first, as asked


@pytest.mark.parametrize("wrong", [{"target": "apt"}, {"sources": ["t1ce"]}, {"sources": ["t2"]}, {"sources": []}])
def test_sources_and_target_must_be_there_and_differ(wrong):
    with pytest.raises(ValueError, match="expected different ones of t1, t2, flair"):
        pix2pix(**wrong)


def test_there_are_two_generators():
    with pytest.raises(ValueError, match="expected unet or resnet"):
        pix2pix(generator="vae")


def test_it_names_its_generators_family():
    assert [pix2pix(generator=name).family for name in ("unet", "resnet")] == ["unet", "resnet"]


# ----- scaling -------------------------------------------------------------------------------------------------------


def test_the_networks_see_no_units():
    model, batch = pix2pix(), example()
    pairs = model.pair(batch), model.pair({**batch, "image": 0.01 * batch["image"]})
    for real, scaled in zip(*pairs, strict=True):
        torch.testing.assert_close(real, scaled)
        assert (float(real.min()), float(real.max())) == (-1, 1)


# ----- losses --------------------------------------------------------------------------------------------------------


def column(*values):
    return torch.tensor(values).reshape(1, 1, 1, 1, -1)


def test_l1_by_hand_counts_voxels_above_the_targets_minimum():
    target, made = column(-1.0, -0.5, 0.0, 1.0), column(1.0, 0.0, 0.25, 0.5)
    label = torch.zeros(1, 1, 1, 4, dtype=torch.int64)
    assert float(brain_l1(made, target, label)) == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    label[..., 3] = 255
    assert float(brain_l1(made, target, label)) == pytest.approx((0.5 + 0.25) / 2)
    assert float(brain_l1(made, torch.full_like(made, -1), label)) == 0  # no brain


def test_l1_masks_by_the_target_and_not_by_the_source():
    model, batch = pix2pix(), example()
    batch["image"][:, 0, :5] = 0  # t1 sees less than t2
    source, target, made = step_inputs(model, batch)
    expected = (target - made).abs()[target > -1].mean()
    torch.testing.assert_close(model.generator_losses(source, target, made, batch["label"])["l1"], expected)


def test_tumour_error_by_hand_is_of_the_output():
    target, made = column(-1.0, -0.5, 0.0, 1.0), column(1.0, 0.0, 0.25, 0.5)
    label = torch.tensor([0, 1, 3, 255]).reshape(1, 1, 1, 4)
    assert float(tumour_error(made, target, label)) == pytest.approx((0.5**2 + 0.25**2) / 2)


def test_without_a_tumour_its_term_is_zero_and_has_a_gradient_of_zeros():
    made = column(1.0, 0.0, 0.25, 0.5).requires_grad_()
    for label in (0, 255):
        loss = tumour_error(made, column(-1.0, -0.5, 0.0, 1.0), torch.full((1, 1, 1, 4), label))
        made.grad = None
        loss.backward()
        assert loss.item() == 0
        assert not made.grad.any()


def test_the_tumour_does_not_mask_the_generators_input():
    """With the printed formula the generator would see the tumour alone, and no other source voxel would matter."""
    model, batch = pix2pix(dropout=0.0), example()
    other = {**batch, "image": batch["image"].clone()}
    other["image"][:, 0, 2:4] *= 0.5  # t1 outside the tumour
    errors = []
    for b in (batch, other):
        source, target, made = step_inputs(model, b)
        errors.append(float(model.generator_losses(source, target, made, b["label"])["tumour"].detach()))
    assert errors[0] != errors[1]


@pytest.mark.parametrize(("l1", "tumour"), [(0.0, 0.0), (100.0, 0.0), (3.0, 7.0)])
def test_generators_loss_is_the_weighted_sum(l1, tumour):
    model, batch = pix2pix(l1_weight=l1, tumour_weight=tumour), example()
    source, target, made = step_inputs(model, batch)
    losses = model.generator_losses(source, target, made, batch["label"])
    logits = model.discriminator(source, made)
    torch.testing.assert_close(losses["adversarial"], nn.functional.softplus(-logits).mean())  # −log σ
    torch.testing.assert_close(losses["loss"], losses["adversarial"] + l1 * losses["l1"] + tumour * losses["tumour"])
    if l1 == tumour == 0:
        assert torch.equal(losses["loss"], losses["adversarial"])  # a pure GAN


@pytest.mark.parametrize("least_squares", [True, False])
def test_discriminators_loss_is_half_of_real_and_fake(least_squares):
    model, batch = pix2pix(least_squares=least_squares), example()
    source, target, made = step_inputs(model, batch)
    real, fake = model.discriminator(source, target), model.discriminator(source, made)
    expected = nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()
    if least_squares:
        expected = (real - 1).square().mean() + fake.square().mean()
    torch.testing.assert_close(model.discriminator_loss(source, target, made), expected / 2)


# ----- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_players_step_reaches_that_player_alone(player):
    model, batch = pix2pix(tumour_weight=10.0), example()
    source, target, made = step_inputs(model, batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if player == "generator":
        model.generator_step(source, target, made, batch["label"])
    else:
        model.discriminator_step(source, target, made)
    for name, p in model.named_parameters():
        own = name.startswith(player)
        assert (p.grad is not None and bool(p.grad.any())) == own, name
        assert torch.equal(p, before[name]) != own, name
        assert p.requires_grad


def test_a_training_step_is_one_step_of_each_the_discriminator_first():
    model, batch, order = pix2pix(), example(), []
    for name, optimizer in zip(("generator", "discriminator"), model.optimizers(), strict=True):
        optimizer.register_step_pre_hook(lambda *_, name=name: order.append(name))
    model.training_step(batch, 0)
    assert order == ["discriminator", "generator"]
    assert set(model.logged) == {f"train/{name}" for name in ("loss", "discriminator", "adversarial", "l1", "tumour")}
    assert not any(value.requires_grad for value in model.logged.values())


@pytest.mark.parametrize("generator", ["unet", "resnet"])
def test_training_on_one_batch_reduces_the_errors(generator):
    model, batch = pix2pix(generator=generator, filters=8, dropout=0.0, tumour_weight=100.0, lr=1e-3), example()
    t1 = nn.functional.interpolate(batch["image"][:, :1, ::4, ::4, ::4], scale_factor=4, mode="trilinear")[:, 0]
    t1, t2 = (image * batch["brain"] for image in (t1 + 1, t1.max() + 1 - t1))  # T2 is the complement of T1
    batch["image"] = torch.stack([t1, t2, t2], dim=1)
    losses = []
    for _ in range(40):
        model.training_step(batch, 0)
        losses.append({name: float(value) for name, value in model.logged.items()})
    for name in ("train/loss", "train/l1", "train/tumour"):
        assert losses[-1][name] < 0.6 * losses[0][name], name


def test_a_plan_counts_both_players():
    model, batch = pix2pix(), example()
    model.losses(batch, torch.ones(4))["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.device("meta"):
        meta = {key: torch.empty_like(value, device="meta") for key, value in batch.items() if key != "subject"}
        assert model.to("meta").losses(meta)["loss"].device.type == "meta"


# ----- schedule ------------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_constant_and_then_falls_linearly():
    players = pix2pix(lr=1.0, betas=[0.3, 0.9], constant_epochs=3, decay_epochs=4).configure_optimizers()
    assert [player["lr_scheduler"]["name"] for player in players] == ["lr-generator", "lr-discriminator"]
    for player in players:
        optimizer, scheduler = player["optimizer"], player["lr_scheduler"]["scheduler"]
        assert optimizer.param_groups[0]["betas"] == (0.3, 0.9)
        rates = []
        for _ in range(8):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


class Cohort(torch.utils.data.Dataset):
    """Two volumes, or the slice of each at ``z``."""

    def __init__(self, z=slice(None)):
        self.z = z

    def __len__(self):
        return 2

    def __getitem__(self, index):
        batch = example(seed=index)
        images = {key: batch[key][0][..., self.z] for key in ("image", "label", "brain")}
        return {**images, "subject": batch["subject"][0]}


def trainer(tmp_path, epochs, **settings):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[pl.callbacks.ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)],
        **settings,
    )


def test_lightning_trains_it_and_resumes_both_players_and_their_schedule(tmp_path):
    settings = {"cls": Pix2Pix, "constant_epochs": 1, "decay_epochs": 3, "lr": 1e-3}
    model, loader = pix2pix(**settings), DataLoader(Cohort())
    first = trainer(tmp_path, 2)
    first.fit(model, loader, loader)
    assert first.global_step == 2 * 2 * 2  # epochs, batches, players
    assert all(first.callback_metrics[name].isfinite() for name in ("train/loss_epoch", "val/loss", "val/mse_tumour"))
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = trainer(tmp_path, 3)
    seen = []
    model = pix2pix(**settings)
    model.on_train_epoch_start = lambda: seen.append([o.param_groups[0]["lr"] for o in again.optimizers])
    again.fit(model, loader, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert seen == [pytest.approx([1e-3 * 0.5] * 2)]  # the third of the epochs
    assert all(next(iter(o.state.values()))["step"] == 3 * 2 for o in again.optimizers)


# ----- slices --------------------------------------------------------------------------------------------------------


def sliced(batch, z=4):
    return {key: value if key == "subject" else value[..., z] for key, value in batch.items()}


@pytest.mark.parametrize("generator", ["unet", "resnet"])
def test_lightning_trains_it_on_slices(tmp_path, generator):
    model = pix2pix(Pix2Pix, dims=2, generator=generator, tumour_weight=10.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loader = DataLoader(Cohort(z=4), batch_size=2)
    run = trainer(tmp_path, 1)
    run.fit(model, loader, DataLoader(Cohort(z=4)))
    names = ("train/l1", "train/tumour", "train/discriminator", "val/mse_brain", "val/mse_tumour")
    assert all(0 < run.callback_metrics[name] < 100 for name in names)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_slice_keeps_the_scale_of_its_volume():
    """By its own extremes a dark slice would be as bright as any other."""
    batch = example()
    batch["image"] = 0.3 * batch["image"].clamp(0, 1)
    source, target = pix2pix(dims=2).pair(sliced(batch))
    t1, t2 = (batch["image"][:, i : i + 1, ..., 4] for i in (MODALITIES.index("t1"), MODALITIES.index("t2")))
    torch.testing.assert_close(source, 2 * t1 - 1)
    torch.testing.assert_close(target, 2 * t2 - 1)
    assert float(target.max()) < 0


def test_losses_of_a_slice_are_those_of_a_volume_of_one_slice():
    source, target = pix2pix().pair({**example(), "image": example()["image"][..., 4:5]})
    label = example()["label"][..., 4:5]
    for error in (brain_l1, tumour_error):
        volume, flat = error(source, target, label), error(source[..., 0], target[..., 0], label[..., 0])
        assert torch.equal(volume, flat)


def test_whole_volumes_are_synthesised_slice_by_slice():
    model, inputs = pix2pix(dims=2, dropout_at_test=False), {"t1": torch.rand(1, 1, 8, 7, 3)}
    whole = WholeSynthesizer(model, tile=(0, 0, 1)).synthesize(inputs)
    assert (whole.mean.shape, whole.scale) == ((1, 1, 8, 7, 3), "unit")
    third = nn.functional.pad(inputs["t1"][..., 2], (0, 1))  # to multiples of 4
    torch.testing.assert_close(whole.mean[..., 2], model.synthesize({"t1": third}).mean[..., :7])


def test_volumes_are_seen_whole_and_slices_as_slices():
    assert Pix2Pix.sees_whole
    assert pix2pix().sees_whole
    assert not pix2pix(dims=2).sees_whole


# ----- validation and synthesis --------------------------------------------------------------------------------------


def test_validation_measures_syntheses_on_the_unit_range_in_brain_and_tumour():
    model = pix2pix(dropout_at_test=False).eval()
    batches = example(seed=0), example(seed=1, tumour=False)
    brains, tumours = [], []
    for batch in batches:
        model.validation_step(batch, 0)
        inputs = volumes(batch, MODALITIES)
        error = (model.synthesize(inputs).mean - inputs["t2"] / inputs["t2"].max()).square()[:, 0]
        brains.append(float(error[batch["brain"]].mean()))
        tumours.append(float(error[batch["label"] > 0].mean()))
    model.on_validation_epoch_end()
    assert float(model.logged["val/mse_brain"]) == pytest.approx(sum(brains) / 2, rel=1e-4)
    assert float(model.logged["val/loss"]) == pytest.approx(sum(brains) / 2, rel=1e-4)
    assert float(model.logged["val/mse_tumour"]) == pytest.approx(tumours[0], rel=1e-4)  # the other has none
    assert math.isnan(tumours[1])


def test_synthesis_is_on_the_unit_range_and_0_outside_the_sources_brain():
    model, batch = pix2pix(), example()
    inputs = volumes(batch, MODALITIES)
    synthesis = model.synthesize(inputs)
    brain = batch["brain"][:, None]
    assert (synthesis.variance, synthesis.scale) == (None, "unit")
    assert not synthesis.mean[~brain].any()
    assert synthesis.mean[brain].min() > 0
    assert synthesis.mean.max() <= 1
    assert not synthesis.mean.requires_grad
    model = pix2pix(dropout_at_test=False)
    torch.testing.assert_close(model.synthesize({"t1": 7 * inputs["t1"]}).mean, model.synthesize(inputs).mean)


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("batch_statistics", [True, False])
def test_networks_stay_in_training_mode_at_test_as_far_as_asked(dropout, batch_statistics):
    model = pix2pix(generator="resnet", dropout_at_test=dropout, batch_statistics_at_test=batch_statistics)
    inputs = volumes(example(), MODALITIES)
    first, second = model.synthesize(inputs).mean, model.synthesize(inputs).mean
    assert torch.equal(first, second) != dropout
    if not dropout:
        running = (model.eval()(inputs) + 1) / 2
        brain = inputs["t1"] > 0
        assert torch.allclose(first[brain], running[brain].detach()) != batch_statistics


def test_whole_volumes_are_padded_to_what_the_generator_needs():
    model = pix2pix(dropout_at_test=False)
    inputs = {"t1": torch.rand(1, 1, 9, 10, 7)}
    whole = WholeSynthesizer(model).synthesize(inputs)
    padded = nn.functional.pad(inputs["t1"], (0, 1, 0, 2, 0, 3))
    torch.testing.assert_close(whole.mean, model.synthesize({"t1": padded}).mean[:, :, :9, :10, :7])
    assert whole.scale == "unit"


# ----- presets -------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_papers_32_models():
    conf = OmegaConf.load(CONF_DIR / "experiment" / "t1_to_t2" / "pix2pix_grid.yaml")
    sweep = {name: str(values).split(",") for name, values in conf.hydra.sweeper.params.items()}
    weights = ["0", "100", "500", "1000"]
    assert sweep == {
        "model.generator": ["unet", "resnet"],
        "model.l1_weight": weights,
        "model.tumour_weight": weights,
    }


def test_a_sweep_has_one_folder_and_a_name_for_each_job(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr("mrgen.launch.training.train", lambda conf, folder: jobs.append((conf, folder)))
    monkeypatch.setenv("MRGEN_RUNS", "made")
    less = ("model.l1_weight=100", "model.tumour_weight=0")
    assert call("train", ["-m", "experiment=t1_to_t2/pix2pix_grid", *less], monkeypatch, tmp_path).code == 0
    assert [conf.model.generator for conf, _ in jobs] == ["unet", "resnet"]
    assert [conf.name for conf, _ in jobs] == ["unet-100-0", "resnet-100-0"]
    assert [folder.name for _, folder in jobs] == ["0_unet-100-0", "1_resnet-100-0"]
    assert {folder.parents[1] for _, folder in jobs} == {tmp_path / "made"}
    assert len({folder.parent for _, folder in jobs}) == 1


def test_the_preset_is_the_papers_training():
    conf = composed("train", "experiment=t1_to_t2/pix2pix", "data=brats2019")
    assert (conf.data.sampling._target_, list(conf.data.sampling.size)) == ("mrgen.data.crops.RandomPatch", [128] * 3)
    assert conf.data.normalisation._target_ == "mrgen.data.normalisation.MinMax"
    assert conf.trainer.max_epochs == conf.model.constant_epochs + conf.model.decay_epochs == 200
    (flip,) = conf.augmentation.transforms
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=torch.arange(8.0).reshape(1, 2, 2, 2)))
    image, seen = subject["image"].data, set()
    for _ in range(40):
        flipped = instantiate(flip)(subject)["image"].data
        assert torch.equal(flipped, image) or torch.equal(flipped, image.flip(1, 2))  # both axes or neither
        seen.add(torch.equal(flipped, image))
    assert seen == {True, False}
