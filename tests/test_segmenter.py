from functools import partial

import pytest
import torch

from mrgen.data.batch import volumes
from mrgen.metrics.segmentation import region_dice
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
