from functools import partial

import pytest
import torch

from mrgen.data.batch import volumes
from mrgen.errors import UserError
from mrgen.metrics.segmentation import region_dice
from mrgen.nets.deepmedic import DeepMedic
from mrgen.nets.unet3d import SegmentationUNet3d
from mrgen.protocols import Segmenter, Synthesizer
from mrgen.segmenter import SegmenterModule

MODALITIES = ("t1", "t1ce", "t2", "flair")
CLASSES = ("background", "necrotic core", "edema", "enhancing")
REGIONS = {"ET": [3], "WT": [1, 2, 3], "TC": [1, 3]}


class At(SegmenterModule):
    """In the middle of a training, without a trainer."""

    current_epoch = 3

    def log(self, name, value, **kwargs):
        self.__dict__.setdefault("logged", {})[name] = value


def snet(cls=At, **changes):
    torch.manual_seed(0)
    net = partial(SegmentationUNet3d, filters=4, levels=2, dropout=changes.pop("dropout", 0.0))
    return cls(net=net, modalities=MODALITIES, classes=CLASSES, regions=REGIONS, **changes)


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (1, 8, 8, 8), generator=generator)
    label[0, 0, 0, 0] = 255
    image = torch.randn(1, 4, 8, 8, 8, generator=generator)
    return {"image": image, "label": label, "brain": torch.ones(1, 8, 8, 8, dtype=torch.bool), "subject": ["s"]}


def test_snet_takes_all_sequences_and_is_a_segmenter_alone():
    model = snet()
    assert model.sources == MODALITIES
    assert model.divisor == 2
    assert isinstance(model, Segmenter)
    assert not isinstance(model, Synthesizer)


def test_sequences_enter_in_the_order_of_training_whatever_the_order_of_the_mapping():
    model, inputs = snet().eval(), volumes(example(), MODALITIES)
    expected = model.net(example()["image"])
    assert torch.equal(model(inputs), expected)
    assert torch.equal(model(dict(reversed(inputs.items()))), expected)


def test_any_network_can_be_the_segmenter():
    asked = {}

    def net(**kwargs):
        asked.update(kwargs)
        return torch.nn.Conv3d(kwargs["in_channels"], kwargs["classes"], 1)

    model = SegmenterModule(net=net, modalities=("t1", "flair"), classes=("a", "b", "c"), regions={"x": [1]})
    assert asked == {"in_channels": 2, "classes": 3}
    assert model.divisor == 1
    assert model.segment({name: torch.rand(1, 1, 3, 4, 5) for name in ("t1", "flair")}).labels.shape == (1, 3, 4, 5)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_training_loss_by_hand(rate):
    model, batch = snet(class_weight_decay=rate, class_weight_cap=100.0), example()
    counts = torch.tensor([800.0, 100.0, 95.0, 5.0])
    model.class_counts.copy_(counts)
    raw = torch.tensor([1.25, 10.0, 1000 / 95, 100.0]) * rate**3 + 1  # Σ m / m_c, the last one capped
    weights = raw / ((raw * counts).sum() / 1000)
    log_p, label = model.net(batch["image"]).log_softmax(1), batch["label"]
    valid = label != 255
    picked = log_p.gather(1, label.where(valid, 0)[:, None])[:, 0]
    expected = -(weights[label.where(valid, 0)] * picked)[valid].mean()
    torch.testing.assert_close(model.training_step(batch, 0), expected)
    torch.testing.assert_close(model.logged["train/loss"], expected)


def test_validation_is_unweighted_and_averages_subjects():
    model = snet().eval()
    model.class_counts.copy_(torch.tensor([800.0, 100.0, 95.0, 5.0]))
    batches, losses, dices = [example(0), example(1)], [], []
    for batch in batches:
        model.validation_step(batch, 0)
        out = model.losses(batch, None)
        losses.append(float(out["loss"].detach()))
        dices.append(region_dice(out["logits"].argmax(1), batch["label"], REGIONS)["WT"])
    assert not torch.isclose(model.training_step(batches[1], 0), out["loss"])
    model.on_validation_epoch_end()
    assert set(model.logged) >= {"val/loss", "val/dice_ET", "val/dice_WT", "val/dice_TC"}
    assert float(model.logged["val/loss"]) == pytest.approx(sum(losses) / 2)
    assert float(model.logged["val/dice_WT"]) == pytest.approx(sum(dices) / 2)
    assert not model.val_means["loss"].update_called


def test_training_on_one_batch_reduces_the_loss():
    model, batch = snet(lr=1e-2), example()
    batch["image"][:, 0] += batch["label"].where(batch["label"] != 255, 0)
    optimizer, losses = model.configure_optimizers()["optimizer"], []
    for _ in range(20):
        loss = model.losses(batch, None)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_segmentation_is_deterministic_in_eval_mode_and_has_no_gradient():
    model, inputs = snet(dropout=0.3), volumes(example(), MODALITIES)
    model.eval()
    first, second = model.segment(inputs), model.segment(inputs)
    assert torch.equal(first.probabilities, second.probabilities)
    assert torch.equal(first.labels, first.probabilities.argmax(1))
    torch.testing.assert_close(first.probabilities.sum(1), torch.ones(1, 8, 8, 8))
    assert not first.probabilities.requires_grad


# ----- segments: a network whose answer is smaller than its input ----------------------------------------------------


def deepmedic(**changes):
    """A shallow one, with a margin of 11 and a grid of 6, whose norms have seen something."""
    torch.manual_seed(0)
    net = partial(DeepMedic, widths=(3, 3, 4), hidden=(5,), factors=(2, 3), residual=(2,), dropout=0.0)
    model = At(net=net, modalities=MODALITIES, classes=CLASSES, regions=REGIONS, **changes)
    for norm in model.net.modules():
        if isinstance(norm, torch.nn.BatchNorm3d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model


def segment(seed=0, side=4 + 2 * 11):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (2, side, side, side), generator=generator)
    image = torch.randn(2, 4, side, side, side, generator=generator)
    return {"image": image, "label": label, "brain": label >= 0, "subject": ["s", "t"]}


def test_what_the_network_says_of_itself_is_passed_on():
    model, other = deepmedic(), snet()
    assert (model.margin, model.reach, model.grid, model.divisor) == (11, 11, 6, 1)
    assert (other.margin, other.reach, other.grid, other.divisor) == (0, None, None, 2)


def test_the_loss_compares_with_the_middle_of_the_label():
    model, batch = deepmedic().eval(), segment()
    out = model.losses(batch, None)
    middle = batch["label"][:, 11:15, 11:15, 11:15]
    assert out["logits"].shape == (2, 4, 4, 4, 4)
    assert torch.equal(out["label"], middle)
    expected = torch.nn.functional.cross_entropy(model.net(batch["image"]), middle)
    torch.testing.assert_close(out["loss"], expected)
    batch["label"] = torch.full_like(batch["label"], 255)  # what lies outside says nothing
    batch["label"][:, 11:15, 11:15, 11:15] = middle
    assert torch.equal(model.losses(batch, None)["loss"], out["loss"])


def test_a_crop_of_which_the_margin_leaves_nothing_is_refused():
    assert deepmedic().losses(segment(side=23), None)["logits"].shape == (2, 4, 1, 1, 1)
    with pytest.raises(UserError, match=r"loses 11 on each side; set data\.sampling\.size to 23 or more"):
        deepmedic().losses(segment(side=22), None)


def test_validation_looks_at_the_middle_too():
    model, batch = deepmedic().eval(), segment()
    model.validation_step(batch, 0)
    model.on_validation_epoch_end()
    out = model.losses(batch, None)
    middle = batch["label"][:, 11:15, 11:15, 11:15]
    expected = region_dice(out["logits"].argmax(1), middle, REGIONS)
    assert {r: float(model.logged[f"val/dice_{r}"]) for r in REGIONS} == pytest.approx(expected)


def test_a_segmentation_has_the_inputs_size_and_background_around_it():
    model, image = deepmedic().eval(), torch.randn(1, 4, 5, 7, 6)
    surrounded = torch.zeros(1, 4, 27, 29, 28)
    surrounded[:, :, 11:16, 11:18, 11:17] = image
    part = model.segment({name: image[:, i : i + 1] for i, name in enumerate(MODALITIES)})
    assert part.labels.shape == (1, 5, 7, 6)
    torch.testing.assert_close(part.probabilities, model.net(surrounded).softmax(1).detach())


# ----- training as DeepMedic does it ---------------------------------------------------------------------------------


def test_without_class_weights_training_is_plain_cross_entropy():
    model, batch = snet(class_weighted=False), example()
    model.class_counts.copy_(torch.tensor([800.0, 100.0, 95.0, 5.0]))
    assert torch.equal(model.training_step(batch, 0), model.losses(batch, None)["loss"])


def test_the_penalty_is_of_convolution_weights_alone_and_is_not_logged():
    model, batch = deepmedic(l1=0.5, l2=0.25, class_weighted=False).eval(), segment()
    convolutions = [m.weight for m in model.net.modules() if isinstance(m, torch.nn.Conv3d)]
    assert len(convolutions) == 3 * 3 + 2
    expected = sum(float((0.5 * w.abs() + 0.25 * w**2).sum().detach()) for w in convolutions)
    assert float(model.penalty().detach()) == pytest.approx(expected, rel=1e-5)
    loss = model.losses(batch, None)["loss"]
    torch.testing.assert_close(model.training_step(batch, 0) - loss, model.penalty(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logged["train/loss"], loss)
    model.penalty().backward()
    for parameter in model.net.parameters():
        if any(parameter is weight for weight in convolutions):
            torch.testing.assert_close(parameter.grad, 0.5 * parameter.sign() + 0.5 * parameter)
        else:
            assert parameter.grad is None or not parameter.grad.any()


def test_rmsprop_by_hand():
    model = deepmedic(optimizer="rmsprop", lr=0.1, rho=0.9, eps=0.01, momentum=0.6)
    weight, optimizer = model.net.head[-1].bias, model.configure_optimizers()["optimizer"]
    value = float(weight[0].detach())
    square = velocity = 0.0
    for gradient in (2.0, -1.0, 0.5):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        square = 0.9 * square + 0.1 * gradient**2
        velocity = 0.6 * velocity + gradient / (square**0.5 + 0.01)
        value -= 0.1 * velocity
        assert float(weight[0].detach()) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"lr_milestones": [2, 3, 5]}, [1, 1, 0.5, 0.25, 0.25, 0.125]),
        ({"lr_step": 3}, [1, 1, 1, 0.5, 0.5, 0.5]),
    ],
)
def test_the_learning_rate_falls_at_milestones_or_in_steps(changes, rates):
    made = snet(lr=1.0, lr_gamma=0.5, **changes).configure_optimizers()
    found = []
    for _ in rates:
        found.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert found == rates


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match=r"model\.optimizer is 'sgd'; expected adam or rmsprop"):
        snet(optimizer="sgd")
