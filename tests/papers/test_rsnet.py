import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from mrgen.data.batch import volumes
from mrgen.data.crops import RandomPatch
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.normalisation import ZScore
from mrgen.metrics.segmentation import region_dice
from mrgen.papers.rsnet import RSNet
from mrgen.protocols import Segmenter, Synthesizer

MODALITIES = ("t1", "t1ce", "t2", "flair")
CLASSES = ("background", "necrotic core", "edema", "enhancing")
REGIONS = {"ET": [3], "WT": [1, 2, 3], "TC": [1, 3]}
COUNTS = torch.tensor([4000.0, 60.0, 30.0, 10.0])


def rsnet(**changes):
    torch.manual_seed(0)
    settings = {"target": "t1ce", "filters": 4, "levels": 2, "dropout": 0.0, **changes}
    return RSNet(modalities=MODALITIES, classes=CLASSES, regions=REGIONS, **settings)


def rnet(**changes):
    return rsnet(segment=False, extra_mri=None, **changes)


def example(size=8, subjects=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (subjects, size, size, size)
    label = torch.randint(0, 4, shape, generator=generator)
    label[:, 0, 0, 0] = 255
    brain = torch.ones(shape, dtype=torch.bool)
    brain[:, :2] = False
    image = torch.randn(subjects, 4, size, size, size, generator=generator)
    return {"image": image, "label": label, "brain": brain, "subject": [f"s{i}" for i in range(subjects)]}


class At(RSNet):
    """RS-Net in the middle of a training, without a trainer."""

    current_epoch = 7

    def log(self, name, value, **kwargs):
        self.__dict__.setdefault("logged", {})[name] = value


# ----- what it takes and makes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "nearest", "sources"),
    [
        ("t1", "t1ce", ("t1ce", "t2", "flair")),
        ("t1ce", "t1", ("t1", "t2", "flair")),
        ("t2", "flair", ("t1", "t1ce", "flair")),
        ("flair", "t2", ("t1", "t1ce", "t2")),
    ],
)
def test_all_but_the_target_are_sources_and_the_nearest_contrast_is_the_extra_mri(target, nearest, sources):
    model = rsnet(target=target)
    assert (model.sources, model.targets, model.extra_mri) == (sources, (target,), nearest)
    assert isinstance(model, Synthesizer)
    assert isinstance(model, Segmenter)


def test_the_extra_mri_can_be_chosen_or_left_out():
    assert rsnet(extra_mri="flair").extra_mri == "flair"
    assert rsnet(extra_mri=None).extra_mri is None
    settings = {"classes": CLASSES, "regions": REGIONS, "filters": 2, "levels": 2}
    assert RSNet(modalities=("t1", "flair"), target="t1", **settings).extra_mri == "flair"  # no t1ce there
    assert RSNet(modalities=("apt", "t2"), target="apt", **settings).extra_mri == "t2"


@pytest.mark.parametrize("extra", ["t1ce", "apt"])
def test_an_extra_mri_must_be_a_source(extra):
    with pytest.raises(ValueError, match=f"extra_mri is '{extra}'; expected nearest, null, or one of t1, t2, flair"):
        rsnet(extra_mri=extra)


@pytest.mark.parametrize("modalities", [MODALITIES, ("apt",)])
def test_the_target_must_be_there_with_a_source_beside_it(modalities):
    with pytest.raises(ValueError, match="target is 'apt'"):
        RSNet(modalities=modalities, target="apt", classes=CLASSES, regions=REGIONS)


def test_outputs_have_the_resolution_of_the_inputs():
    batch = example(8, subjects=2)
    mean, logits = rsnet()(volumes(batch, MODALITIES))
    assert (mean.shape, logits.shape) == ((2, 1, 8, 8, 8), (2, 4, 8, 8, 8))
    mean, logits = rnet()(volumes(batch, MODALITIES))
    assert mean.shape == (2, 1, 8, 8, 8)
    assert logits is None


def test_rsnet_never_looks_at_its_target():
    model, batch = rsnet().eval(), example()
    inputs = volumes(batch, MODALITIES)
    mean, _ = model(inputs)
    without = {name: volume for name, volume in inputs.items() if name != "t1ce"}
    assert torch.equal(model(without)[0], mean)


class Constant(nn.Module):
    """In place of the U-Net: features that know nothing of the input."""

    def forward(self, x):
        generator = torch.Generator().manual_seed(3)
        return torch.randn(x.shape[0], 4, *x.shape[2:], generator=generator)


def test_the_extra_mri_enters_the_regression_block_and_no_other_source_does():
    model, inputs = rsnet().eval(), dict(volumes(example(), MODALITIES))
    model.unet = Constant()
    mean, logits = model(inputs)
    for name in model.sources:
        changed, changed_logits = model({**inputs, name: inputs[name].flip(2)})
        assert torch.equal(changed, mean) == (name != "t1")  # the nearest contrast of t1ce
        assert torch.equal(changed_logits, logits)  # segmentation sees latent features alone


def test_rnet_has_no_extra_mri_and_no_segmentation():
    model, inputs = rnet().eval(), dict(volumes(example(), MODALITIES))
    assert model.segmentation is None
    assert model.regression.body[0][0].in_channels == 4  # the latent features alone; RS-Net's has one more
    assert rsnet().regression.body[0][0].in_channels == 5
    model.unet = Constant()
    mean, _ = model(inputs)
    for name in model.sources:
        assert torch.equal(model({**inputs, name: inputs[name].flip(2)})[0], mean)
    with pytest.raises(ValueError, match="R-Net has no segmentation block"):
        model.segment(inputs)


# ----- losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [True, False])
def test_loss_by_hand(uniform):
    model, batch = rsnet(segmentation_weight=0.3), example(4, subjects=2)
    weights = None if uniform else torch.tensor([0.5, 2.0, 3.0, 7.0])
    losses = {name: value.detach() for name, value in model.losses(batch, weights).items()}
    mean, logits = model(volumes(batch, MODALITIES))
    mean, logits = mean.detach(), logits.detach()
    synthesis, segmentation, voxels = 0.0, 0.0, 0
    for b, x, y, z in torch.cartesian_prod(*map(torch.arange, batch["label"].shape)).tolist():
        label = int(batch["label"][b, x, y, z])
        if label == 255:
            continue
        w = 1.0 if weights is None else float(weights[label])
        voxels += 1
        synthesis += w * float(mean[b, 0, x, y, z] - batch["image"][b, 1, x, y, z]) ** 2  # t1ce is channel 1
        segmentation -= w * float(logits[b, :, x, y, z].log_softmax(0)[label])
    assert voxels == 2 * (64 - 1)
    assert float(losses["synthesis"]) == pytest.approx(synthesis / voxels, rel=1e-4)
    assert float(losses["segmentation"]) == pytest.approx(segmentation / voxels, rel=1e-4)
    assert float(losses["loss"]) == pytest.approx((synthesis + 0.3 * segmentation) / voxels, rel=1e-4)


def test_rnets_loss_is_the_weighted_synthesis_error_alone():
    model, batch, weights = rnet(), example(), torch.tensor([0.5, 2.0, 3.0, 7.0])
    losses = model.losses(batch, weights)
    assert "segmentation" not in losses
    assert torch.equal(losses["loss"], losses["synthesis"])
    assert not torch.isclose(losses["loss"], model.losses(batch, None)["loss"])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        part: sum(float(p.grad.abs().sum()) for p in getattr(model, part).parameters() if p.grad is not None)
        for part in ("unet", "regression", "segmentation")
    }


def test_each_loss_trains_the_unet_and_its_own_block_alone():
    model, batch = rsnet(), example()
    reached = gradients(model, model.losses(batch, None)["segmentation"])
    assert reached["unet"] > 0
    assert reached["segmentation"] > 0
    assert reached["regression"] == 0
    reached = gradients(model, model.losses(batch, None)["synthesis"])
    assert reached["unet"] > 0
    assert reached["regression"] > 0
    assert reached["segmentation"] == 0
    assert all(value > 0 for value in gradients(model, model.losses(batch, None)["loss"]).values())


def at(**changes):
    torch.manual_seed(0)
    settings = {"target": "t1ce", "filters": 4, "levels": 2, "dropout": 0.0, **changes}
    model = At(modalities=MODALITIES, classes=CLASSES, regions=REGIONS, **settings)
    model.class_counts.copy_(COUNTS)
    return model


@pytest.mark.parametrize(
    ("rate", "cap", "raw"),
    [
        # Σ m = 4100; w_c = min(Σ m / m_c, cap) · r^7 + 1
        (1.0, 1000.0, [4100 / 4000 + 1, 4100 / 60 + 1, 4100 / 30 + 1, 411.0]),
        (1.0, 50.0, [4100 / 4000 + 1, 51.0, 51.0, 51.0]),
        (0.5, 1000.0, [4100 / 4000 / 128 + 1, 4100 / 60 / 128 + 1, 4100 / 30 / 128 + 1, 410 / 128 + 1]),
    ],
)
@pytest.mark.parametrize("segment", [True, False])
def test_training_weighs_rare_classes_by_the_papers_rule(rate, cap, raw, segment):
    model, batch = at(class_weight_decay=rate, class_weight_cap=cap, segment=segment), example()
    weights = torch.tensor(raw)
    weights = weights / ((weights * COUNTS).sum() / COUNTS.sum())  # the mean training voxel weighs 1
    expected = model.losses(batch, weights)
    torch.testing.assert_close(model.training_step(batch, 0), expected["loss"])
    parts = {"train/loss", "train/synthesis"} | ({"train/segmentation"} if segment else set())
    assert set(model.logged) == parts
    torch.testing.assert_close(model.logged["train/synthesis"], expected["synthesis"])


# ----- validation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_validation_weighs_all_classes_alike_whatever_counts_and_epoch(rate):
    model, batch = at(class_weight_decay=rate).eval(), example()
    expected = model.losses(batch, None)
    assert not torch.isclose(expected["loss"], model.training_step(batch, 0))
    model.validation_step(batch, 0)
    for name in ("loss", "synthesis", "segmentation"):
        torch.testing.assert_close(model.val_means[name].compute(), expected[name])


def test_validation_metrics_are_means_over_subjects_and_skip_what_is_not_there():
    model = at().eval().requires_grad_(False)
    with_lesion, without = example(seed=0), example(seed=1)
    without["label"] = torch.where(without["label"] == 255, 255, 0)
    errors, dices = [], []
    for batch in (with_lesion, without):
        model.validation_step(batch, 0)
        losses = model.losses(batch, None)
        errors.append((losses["mean"][:, 0] - batch["image"][:, 1]).square())
        dices.append(region_dice(losses["logits"].argmax(1), batch["label"], REGIONS))
    brain, tumour = with_lesion["brain"], (with_lesion["label"] > 0) & (with_lesion["label"] < 4)
    means = {name: float(metric.compute()) for name, metric in model.val_means.items()}
    assert means["mse_brain"] == pytest.approx(float(errors[0][brain].mean() + errors[1][brain].mean()) / 2, rel=1e-4)
    assert means["mse_tumour"] == pytest.approx(float(errors[0][tumour].mean()), rel=1e-4)  # one subject has none
    for region in REGIONS:
        assert means[f"dice_{region}"] == pytest.approx((dices[0][region] + dices[1][region]) / 2)
    model.on_validation_epoch_end()
    assert set(model.logged) == {f"val/{name}" for name in means}
    assert not any(metric.update_called for metric in model.val_means.values())  # the next epoch starts anew


def test_rnet_validates_without_dice():
    assert set(rnet().val_means) == {"loss", "synthesis", "mse_brain", "mse_tumour"}


# ----- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [rsnet, rnet])
def test_training_on_one_batch_reduces_the_loss(make):
    model, batch = make(lr=1e-2), example()
    batch["image"][:, 1] = batch["image"][:, 0] * 0.5 + (batch["label"] == 3)  # something to learn
    optimizer = model.configure_optimizers()["optimizer"]
    weights, losses = torch.tensor([1.0, 2.0, 2.0, 3.0]), []
    for _ in range(25):
        loss = model.losses(batch, weights)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]


def test_the_learning_rate_falls_by_steps_of_epochs():
    conf = rsnet(lr=1e-3, betas=[0.5, 0.9], lr_step=2, lr_gamma=0.75).configure_optimizers()
    optimizer, scheduler = conf["optimizer"], conf["lr_scheduler"]["scheduler"]
    assert conf["lr_scheduler"]["interval"] == "epoch"
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-3, 1e-3, 7.5e-4, 7.5e-4, 5.625e-4])


def test_fits_a_cohort_and_takes_the_class_counts_from_it(phantom_store):
    datamodule = CohortDataModule(
        store=phantom_store,
        modalities=MODALITIES,
        split={"kind": "ratio", "val": 0.125, "test": 0.5},
        normalisation=ZScore(),
        sampling=RandomPatch((8, 8, 8)),
        steps_per_epoch=2,
    )
    model = rsnet(filters=2, dropout=0.1)
    assert model.class_counts.tolist() == [1, 1, 1, 1]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=datamodule)
    assert model.class_counts.tolist() == datamodule.class_counts()
    assert trainer.callback_metrics["val/loss"].isfinite()
    assert trainer.callback_metrics["train/loss_epoch"].isfinite()
    assert not [key for key in model.state_dict() if "class_counts" in key or "val_means" in key]


# ----- what evaluation calls ---------------------------------------------------------------------------------------


def test_without_samples_a_synthesis_is_one_pass_with_dropout_off():
    model, inputs = rsnet(dropout=0.3, mc_samples=0).eval(), volumes(example(), MODALITIES)
    synthesis = model.synthesize(inputs)
    assert torch.equal(synthesis.mean, model(inputs)[0])
    assert (synthesis.variance, synthesis.scale) == (None, "zscore")
    assert not synthesis.mean.requires_grad


@pytest.mark.parametrize("make", [rsnet, rnet])
@pytest.mark.parametrize("subjects", [1, 2])
def test_mean_and_variance_of_dropout_samples_are_those_of_brute_force(make, subjects):
    """Twenty passes of the whole network, its dropout layers alone in training mode, all kept."""
    model, inputs = make(dropout=0.3).eval(), volumes(example(subjects=subjects), MODALITIES)
    brute = copy.deepcopy(model)
    brute.segmentation = None  # it would draw numbers of its own
    for module in brute.modules():
        module.train(isinstance(module, nn.Dropout))
    torch.manual_seed(5)
    with torch.no_grad():
        passes = torch.stack([brute(inputs)[0] for _ in range(20)])
    torch.manual_seed(5)
    synthesis = model.synthesize(inputs)
    torch.testing.assert_close(synthesis.mean, passes.mean(0))
    torch.testing.assert_close(synthesis.variance, passes.var(0))
    assert synthesis.variance.mean() > 0.001
    assert synthesis.mean.shape == synthesis.variance.shape == (subjects, 1, 8, 8, 8)


@pytest.mark.parametrize("batch", [1, 3, 7, 50])
def test_samples_in_batches_are_as_many_and_as_different(batch):
    """Every sample has its own dropout: with one mask a batch the variance would be far too small."""
    model, inputs = rsnet(dropout=0.3, mc_samples=200).eval(), volumes(example(subjects=2), MODALITIES)
    torch.manual_seed(1)
    alone = model.synthesize(inputs)
    model.mc_batch = batch
    seen = []
    model.regression.register_forward_hook(lambda _, __, out: seen.append(len(out) // 2))
    torch.manual_seed(2)
    together = model.synthesize(inputs)
    assert sum(seen) == 200
    assert max(seen) == batch
    assert together.variance.mean() == pytest.approx(float(alone.variance.mean()), rel=0.05)
    spread = (alone.variance.mean() / 200).sqrt()
    assert (together.mean - alone.mean).abs().mean() < 3 * spread


def test_what_lies_before_the_first_dropout_is_computed_once():
    model, inputs = rsnet(dropout=0.3).eval(), volumes(example(), MODALITIES)
    calls = dict.fromkeys(("stem", "deep", "segmentation"), 0)

    def counting(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    model.unet.down[0].register_forward_hook(counting("stem"))
    model.unet.down[1].register_forward_hook(counting("deep"))
    model.segmentation.register_forward_hook(counting("segmentation"))
    model.synthesize(inputs)
    assert calls == {"stem": 1, "deep": 20, "segmentation": 0}


def test_sampling_leaves_the_model_as_it_was():
    model, inputs = rsnet(dropout=0.3).eval(), volumes(example(), MODALITIES)
    before = copy.deepcopy(model.state_dict())
    model.synthesize(inputs)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_dropout_there_is_nothing_to_sample():
    assert rsnet(dropout=0.0).eval().synthesize(volumes(example(), MODALITIES)).variance is None


@pytest.mark.parametrize("wrong", [{"mc_samples": 1}, {"mc_samples": -1}, {"mc_batch": 0}])
def test_a_variance_needs_two_samples(wrong):
    with pytest.raises(ValueError, match="expected 0 or at least 2"):
        rsnet(**wrong)


def test_segmentation_is_the_softmax_of_the_logits():
    model, inputs = rsnet().eval(), volumes(example(), MODALITIES)
    segmentation = model.segment(inputs)
    torch.testing.assert_close(segmentation.probabilities.sum(1), torch.ones(1, 8, 8, 8))
    assert torch.equal(segmentation.labels, model(inputs)[1].argmax(1))
    assert segmentation.labels.dtype == torch.int64
    assert not segmentation.probabilities.requires_grad
