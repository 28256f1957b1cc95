"""Who learns from what, by hand: two players, their gradients and what each of them leaves alone."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mrgen.errors import UserError
from mrgen.papers.joint_imputation import JointImputation, LesionSegmentation, OfflineImputation
from mrgen.protocols import Segmenter, Synthesizer

MODALITIES = ("t1", "flair")
SIZE = 32


class Plain:
    """Without a trainer: what Lightning does in the steps, done plainly."""

    def optimizers(self):
        if "players" not in self.__dict__:
            self.__dict__["players"] = self.configure_optimizers()
        return self.players

    def manual_backward(self, loss):
        loss.backward()

    def log(self, name, value, **kwargs):
        self.__dict__.setdefault("logged", {})[name] = float(value)


class Joint(Plain, JointImputation):
    pass


class Offline(Plain, OfflineImputation):
    def setup(self, stage="fit"):
        super().setup(stage)
        return self


class Alone(Plain, LesionSegmentation):
    pass


class Trainer:
    """As much of one as a stage depends on."""

    training = validating = True

    def __init__(self, max_epochs, current_epoch):
        self.max_epochs, self.current_epoch = max_epochs, current_epoch


def made(cls=Joint, **changes):
    torch.manual_seed(0)
    return cls(**{"modalities": MODALITIES, "target": "flair", "width": 2, "lr": 1e-2, **changes}).train()


def example(seed=0, slices=2, lesion=True):
    generator = torch.Generator().manual_seed(seed)
    label = torch.zeros(slices, SIZE, SIZE, dtype=torch.int64)
    if lesion:
        label[:, 8:14, 10:20] = 1
        label[:, 14:16, 10:20] = 255
    return {
        "image": torch.randn(slices, 2, SIZE, SIZE, generator=generator),
        "label": label,
        "brain": torch.ones(slices, SIZE, SIZE, dtype=torch.bool),
        "subject": ["s"] * slices,
        "spacing": torch.ones(slices, 3),
    }


def state(net):
    """Weights and buffers, as they are now."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def changed(net, before):
    """Names of the weights and buffers that differ by a bit."""
    return [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]


def gradients(net):
    return [p.grad.clone() for p in net.parameters()]


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def imputed(model, source):
    """G by hand."""
    out = model.imputer(source)
    return torch.where(out > 0, out, model.slope * out)


def lesion_error(logits, label):
    """Binary cross entropy by torch, over what counts."""
    valid = label != 255
    return F.binary_cross_entropy_with_logits(logits[:, 0][valid], label[valid].float())


def squared_error(made, target, label):
    return (made - target)[:, 0][label != 255].square().mean()


# ----- what they are -----------------------------------------------------------------------------------------------


def test_protocols():
    joint, offline, alone = made(), made(Offline), made(Alone)
    for model in (joint, offline):
        assert isinstance(model, Synthesizer)
        assert isinstance(model, Segmenter)
        assert (model.sources, model.targets, model.scale) == (("t1",), ("flair",), "gaussian")
    assert isinstance(alone, Segmenter)
    assert not isinstance(alone, Synthesizer)
    assert (alone.sources, made(Alone, sees_target=True).sources) == (("t1",), ("t1", "flair"))
    assert (joint.stages, offline.stages) == (1, 2)


@pytest.mark.parametrize("cls", [Joint, Offline, Alone])
@pytest.mark.parametrize("wrong", [{"target": "t2"}, {"source": "t2"}, {"source": "flair"}])
def test_source_and_target_must_be_there_and_differ(cls, wrong):
    with pytest.raises(ValueError, match="expected two different ones of t1, flair"):
        made(cls, **wrong)


def test_other_sequences_may_be_asked_for():
    """BraTS: the same preset makes FLAIR from T1ce."""
    model = made(modalities=("t1", "t1ce", "t2", "flair"), source="t1ce")
    image = torch.randn(1, 4, SIZE, SIZE)
    source, target, _ = model.parts({**example(), "image": image})
    assert torch.equal(source, image[:, 1:2])
    assert torch.equal(target, image[:, 3:])
    assert model.eval().synthesize({"t1ce": source}).mean.shape == (1, 1, SIZE, SIZE)


def test_g_ends_in_a_leaky_relu():
    """A normalised FLAIR is negative below its mean: neither sigmoid nor ReLU could make it."""
    values = torch.tensor([-2.0, -0.1, 0.0, 3.0]).reshape(1, 1, 2, 2)
    model = made()
    assert model.slope == 0.3
    model.imputer = nn.Identity()
    torch.testing.assert_close(model.impute(values).flatten(), torch.tensor([-0.6, -0.03, 0.0, 3.0]))
    model = made(slope=0.1)
    model.imputer = nn.Identity()
    torch.testing.assert_close(model.impute(values).flatten(), torch.tensor([-0.2, -0.01, 0.0, 3.0]))


def test_both_networks_have_adam_of_the_papers_rate():
    model = JointImputation(modalities=MODALITIES, target="flair", width=2)
    imputer, segmenter = model.configure_optimizers()
    for optimizer, net in ((imputer, model.imputer), (segmenter, model.segmenter)):
        (group,) = optimizer.param_groups
        assert isinstance(optimizer, torch.optim.Adam)
        assert (group["lr"], group["betas"]) == (2e-4, (0.9, 0.999))
        assert list(map(id, group["params"])) == list(map(id, net.parameters()))


# ----- losses by hand ------------------------------------------------------------------------------------------------


def pixels(*values):
    return torch.tensor(values).reshape(1, 1, 2, 2)


LABEL = torch.tensor([1, 0, 0, 255]).reshape(1, 2, 2)


def test_losses_by_hand(monkeypatch):
    model = made(seg_weight=0.5)
    p = pixels(0.8, 0.4, 0.1, 0.5)
    monkeypatch.setattr(model, "find", lambda source, made: p.logit())
    cross_entropy = -(math.log(0.8) + math.log(0.6) + math.log(0.9)) / 3
    assert float(model.segmenter_loss(p, p, LABEL)) == pytest.approx(cross_entropy, rel=1e-5)
    losses = model.imputer_losses(p, pixels(1.0, -1.0, 0.0, 9.0), pixels(0.5, 0.0, 2.0, 0.0), LABEL)
    reconstruction = (0.5**2 + 1 + 2**2) / 3
    assert float(losses["reconstruction"]) == pytest.approx(reconstruction, rel=1e-5)
    assert float(losses["segmentation"]) == pytest.approx(cross_entropy, rel=1e-5)
    assert float(losses["loss"]) == pytest.approx(reconstruction + 0.5 * cross_entropy, rel=1e-5)
    assert made().seg_weight == 1


def test_dice_may_be_asked_for_and_is_both_players(monkeypatch):
    model = made(segmentation_loss="dice")
    p = pixels(0.8, 0.4, 0.1, 0.5)
    monkeypatch.setattr(model, "find", lambda source, made: p.logit())
    expected = 1 - (2 * 0.8 + 1) / (1.3 + 1 + 1)
    assert float(model.segmenter_loss(p, p, LABEL)) == pytest.approx(expected, rel=1e-5)
    assert float(model.imputer_losses(p, p, p, LABEL)["segmentation"]) == pytest.approx(expected, rel=1e-5)


# ----- each player leaves the other alone -----------------------------------------------------------------------------


def test_a_step_of_c_leaves_g_as_it_was():
    model = made()
    source, _, label = model.parts(example())
    synthetic = model.impute(source)
    imputer, segmenter = state(model.imputer), state(model.segmenter)
    model.segmenter_step(source, synthetic, label)
    assert changed(model.imputer, imputer) == []  # weights and buffers, bit for bit
    assert all(p.grad is None for p in model.imputer.parameters())
    assert changed(model.segmenter, segmenter) == list(segmenter)  # all of them
    assert {int(v) for k, v in model.segmenter.state_dict().items() if k.endswith("num_batches_tracked")} == {1}


def test_a_step_of_g_leaves_c_as_it_was():
    """Weights, running means and variances and their counters: C's batch norms see the batch and do not note it."""
    model = made()
    source, target, label = model.parts(example())
    model.segmenter_step(source, model.impute(source), label)  # so that C has gradients and statistics to lose
    synthetic = model.impute(source)
    imputer, segmenter, gradient = state(model.imputer), state(model.segmenter), gradients(model.segmenter)
    model.imputer_step(source, target, synthetic, label)
    assert changed(model.segmenter, segmenter) == []
    assert all(torch.equal(a, b) for a, b in zip(gradients(model.segmenter), gradient, strict=True))
    assert set(changed(model.imputer, imputer)) == {name for name, _ in model.imputer.named_parameters()}


def test_c_is_itself_again_after_a_step_of_g(monkeypatch):
    model = made()
    source, target, label = model.parts(example())
    model.imputer_step(source, target, model.impute(source), label)
    norms = [layer for layer in model.segmenter.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 18

    def whole():
        return all(p.requires_grad for p in model.segmenter.parameters()) and all(n.track_running_stats for n in norms)

    assert whole()

    def fails(loss):
        raise MemoryError

    monkeypatch.setattr(model, "manual_backward", fails)
    with pytest.raises(MemoryError):
        model.imputer_step(source, target, model.impute(source), label)
    assert whole()


# ----- the gradient that G gets through C ----------------------------------------------------------------------------


def test_g_gets_the_gradient_of_the_segmentation_through_c():
    """With the synthesis itself for a target there is no other."""
    model = made()
    source, _, label = model.parts(example())
    copied = copy.deepcopy(model)
    synthetic = model.impute(source)
    model.imputer_step(source, synthetic.detach(), synthetic, label)
    logits = copied.segmenter(torch.cat([source, imputed(copied, source)], dim=1))
    expected = torch.autograd.grad(lesion_error(logits, label), list(copied.imputer.parameters()))
    assert all(g.any() for g in expected)
    assert_close(gradients(model.imputer), expected)


def test_without_weight_the_segmentation_does_not_reach_g():
    model = made(seg_weight=0.0)
    source, _, label = model.parts(example())
    synthetic = model.impute(source)
    model.imputer_step(source, synthetic.detach(), synthetic, label)
    assert not any(g.any() for g in gradients(model.imputer))


def test_c_steps_first_and_g_goes_through_the_updated_c():
    model, batch = made(), example()
    source, target, label = model.parts(batch)
    copied = copy.deepcopy(model)
    model.training_step(batch, 0)

    def through(segmenter):
        synthetic = imputed(copied, source)
        logits = segmenter(torch.cat([source, synthetic], dim=1))
        loss = squared_error(synthetic, target, label) + lesion_error(logits, label)
        return float(loss.detach()), torch.autograd.grad(loss, list(copied.imputer.parameters()))

    loss, expected = through(copy.deepcopy(model.segmenter))
    assert model.logged["train/loss"] == pytest.approx(loss, rel=1e-4)
    assert_close(gradients(model.imputer), expected)
    earlier, other = through(copied.segmenter)
    assert earlier != pytest.approx(loss, rel=1e-4)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(expected, other, strict=True))


def test_a_batch_goes_through_g_once_and_through_c_twice():
    model, calls = made(), []
    model.imputer.register_forward_hook(lambda *_: calls.append("G"))
    model.segmenter.register_forward_hook(lambda *_: calls.append("C"))
    model.training_step(example(), 0)
    assert calls == ["G", "C", "C"]
    for net in (model.imputer, model.segmenter):  # each has noted the batch once
        assert {int(v) for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")} == {1}


def test_every_loss_is_logged():
    model = made()
    model.training_step(example(), 0)
    assert set(model.logged) == {"train/loss", "train/segmenter", "train/reconstruction", "train/segmentation"}
    total = model.logged["train/reconstruction"] + model.logged["train/segmentation"]
    assert model.logged["train/loss"] == pytest.approx(total, rel=1e-5)


def test_planning_counts_both_players():
    model, batch = made(), example()
    source, target, label = model.parts(batch)
    synthetic = imputed(copy.deepcopy(model), source)
    error = lesion_error(copy.deepcopy(model).segmenter(torch.cat([source, synthetic], dim=1)), label)
    expected = 2 * error + squared_error(synthetic, target, label)
    assert model.losses(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


# ----- C never sees a real FLAIR --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [None, 1])
def test_c_never_sees_a_real_flair(stage):
    """Another FLAIR changes G's step, but neither C's inputs nor its loss nor its update."""
    models, saw = [], []
    for seed in (0, 1):
        batch = example()
        batch["image"][:, 1] = example(seed)["image"][:, 1]
        model = made() if stage is None else made(Offline).setup()
        if stage is not None:
            model.stage.fill_(stage)
        inputs = []
        model.segmenter.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0].clone()))
        model.training_step(batch, 0)
        for given in inputs:
            assert torch.equal(given[:, :1], batch["image"][:, :1])
        models.append(model)
        saw.append(inputs)
    a, b = models
    assert all(torch.equal(*pair) for pair in zip(*saw, strict=True))
    assert a.logged["train/segmenter"] == b.logged["train/segmenter"]
    assert changed(a.segmenter, state(b.segmenter)) == []
    assert bool(changed(a.imputer, state(b.imputer))) == (stage is None)


def test_answers_need_the_source_alone():
    model = made().eval()
    t1 = torch.randn(3, 1, SIZE, SIZE)
    synthesis, found = model.synthesize({"t1": t1}), model.segment({"t1": t1})
    assert synthesis.variance is None
    assert synthesis.scale == "gaussian"
    torch.testing.assert_close(synthesis.mean, imputed(model, t1))
    probability = model.segmenter(torch.cat([t1, synthesis.mean], dim=1)).sigmoid()
    torch.testing.assert_close(found.probabilities, torch.cat([1 - probability, probability], dim=1))
    assert (found.labels.dtype, found.labels.shape) == (torch.int64, (3, SIZE, SIZE))
    assert torch.equal(found.labels, (probability[:, 0] > 0.5).long())
    assert not found.probabilities.requires_grad


def test_unimodal_sees_the_source_alone_and_the_upper_bound_the_real_target_as_well():
    t1, flair, other = (torch.randn(1, 1, SIZE, SIZE) for _ in range(3))
    unimodal, bound = made(Alone).eval(), made(Alone, sees_target=True).eval()
    assert torch.equal(unimodal({"t1": t1, "flair": flair}), unimodal.segmenter(t1))
    assert torch.equal(bound({"flair": flair, "t1": t1}), bound.segmenter(torch.cat([t1, flair], dim=1)))
    assert not torch.equal(bound({"t1": t1, "flair": flair}), bound({"t1": t1, "flair": other}))
    batch = example()
    assert float(unimodal.losses(batch)["loss"].detach()) == pytest.approx(
        float(lesion_error(unimodal.segmenter(batch["image"][:, :1]), batch["label"]).detach()), rel=1e-5
    )
    assert set(unimodal.segment({"t1": t1}).labels.unique().tolist()) <= {0, 1}


# ----- offline synthesis ---------------------------------------------------------------------------------------------


def test_its_first_stage_trains_g_by_its_error_alone_and_never_c():
    model, batch = made(Offline).setup(), example()
    source, target, label = model.parts(batch)
    copied, imputer, segmenter = copy.deepcopy(model), state(model.imputer), state(model.segmenter)
    calls = []
    model.segmenter.register_forward_hook(lambda *_: calls.append("C"))
    model.training_step(batch, 0)
    assert calls == []
    assert changed(model.segmenter, segmenter) == []
    assert changed(model.imputer, imputer) == list(imputer)
    error = squared_error(imputed(copied, source), target, label)
    assert_close(gradients(model.imputer), torch.autograd.grad(error, list(copied.imputer.parameters())))
    assert model.logged["train/loss"] == model.logged["train/reconstruction"] == pytest.approx(float(error), rel=1e-5)


def test_its_second_stage_leaves_g_alone_and_trains_c_on_what_g_makes_at_test():
    model, batch = made(Offline).setup(), example()
    model.training_step(batch, 0)  # so that G has statistics
    model.stage.fill_(1)
    source, _, label = model.parts(batch)
    imputer, segmenter, copied = state(model.imputer), state(model.segmenter), copy.deepcopy(model)
    model.train()
    model.training_step(batch, 1)
    assert changed(model.imputer, imputer) == []
    assert changed(model.segmenter, segmenter) == list(segmenter)
    synthetic = imputed(copied.eval(), source).detach()
    error = lesion_error(copied.segmenter.train()(torch.cat([source, synthetic], dim=1)), label)
    assert_close(gradients(model.segmenter), torch.autograd.grad(error, list(copied.segmenter.parameters())))
    assert model.logged["train/segmenter"] == pytest.approx(float(error), rel=1e-5)


def test_each_stage_has_half_of_the_epochs():
    model, stages = made(Offline).setup(), []
    for epoch in range(6):
        model._trainer = Trainer(max_epochs=6, current_epoch=epoch)
        model.on_train_epoch_start()
        stages.append(int(model.stage))
    assert stages == [0, 0, 0, 1, 1, 1]
    assert int(model.state_dict()["stage"]) == 1


def test_a_checkpoint_of_its_first_stage_finds_nothing():
    model = made(Offline).eval()
    t1 = torch.randn(1, 1, SIZE, SIZE)
    with pytest.raises(UserError, match=r"stopped in its first stage, before its segmenter was trained; go on with it"):
        model.segment({"t1": t1})
    assert model.synthesize({"t1": t1}).mean.shape == t1.shape
    model.stage.fill_(1)
    assert model.segment({"t1": t1}).labels.shape == (1, SIZE, SIZE)


@pytest.mark.parametrize("bias", [-99.0, 99.0])
def test_no_checkpoint_of_its_first_stage_is_better_than_one_of_its_second(bias):
    """Not even than one of a C that finds nothing, or everything."""
    model, batch = made(Offline).setup().eval(), example()
    nn.init.constant_(model.segmenter.last.bias, bias)
    first = validated(model, {**batch, "image": batch["image"].clone().fill_(0.0)})
    model.stage.fill_(1)
    second = validated(model, batch)
    assert second["loss"] < 1.1 < 2 < first["loss"]
    assert math.isnan(first["dice"])
    assert "val/dice" not in logged_means(model, 0)
    assert first["loss"] == pytest.approx(2 + first["reconstruction"])


# ----- validation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def validated(model, *subjects):
    for batch in subjects:
        model.validation_step(batch, 0)
    return {name: float(value) for name, value in model.val_means.take().items()}


@torch.no_grad()
def logged_means(model, stage):
    model.stage.fill_(stage)
    model.__dict__["logged"] = {}
    model.validation_step(example(), 0)
    model.on_validation_epoch_end()
    return model.logged


def answering(model, bias):
    """C's logits become one number everywhere."""
    nn.init.zeros_(model.segmenter.last.weight)
    nn.init.constant_(model.segmenter.last.bias, bias)
    return model.eval()


@pytest.mark.parametrize("slices", [1, 16, 37])
def test_validation_is_of_whole_subjects_in_parts(slices):
    model, batch = made().eval(), example(slices=slices)
    source, target, label = model.parts(batch)
    means = validated(model, batch)
    with torch.no_grad():
        synthetic = imputed(model, source)
        logits = model.segmenter(torch.cat([source, synthetic], dim=1))
    predicted, reference = (logits[:, 0] > 0) & (label != 255), label == 1
    dice = 2 * int((predicted & reference).sum()) / (int(predicted.sum()) + int(reference.sum()))
    assert means["dice"] == pytest.approx(dice, abs=1e-3)
    assert means["loss"] == pytest.approx(1 - means["dice"] + 1e-4 * means["segmentation"], abs=1e-6)
    assert means["segmentation"] == pytest.approx(float(lesion_error(logits, label)), rel=1e-4)
    assert means["reconstruction"] == pytest.approx(float(squared_error(synthetic, target, label)), rel=1e-4)


@pytest.mark.parametrize("cls", [Joint, Alone])
def test_a_subject_without_lesion_has_a_defined_validation(cls):
    """Nothing found is right, anything found is wrong."""
    batch = example(lesion=False)
    for bias, dice in ((-9.0, 1.0), (9.0, 0.0)):
        means = validated(answering(made(cls), bias), batch)
        assert means["dice"] == dice
        assert means["loss"] == pytest.approx(1 - dice, abs=1e-3)
        assert all(math.isfinite(value) for value in means.values())
    batch["label"][:] = 255
    assert all(math.isfinite(value) for value in validated(answering(made(cls), 9.0), batch).values())


@pytest.mark.parametrize("cls", [Joint, Alone])
def test_every_subject_weighs_the_same_whatever_its_slices(cls):
    model = answering(made(cls), -9.0)
    healthy, ill = example(slices=5, lesion=False), example(slices=1)
    assert validated(model, healthy, ill)["dice"] == 0.5


def test_other_pathology_changes_nothing():
    """What is labelled 255 may look as it will in the real FLAIR, and be found or not."""
    batch = example()
    other = {**batch, "image": batch["image"].clone()}
    other["image"][:, 1][batch["label"] == 255] = 50
    updates = []
    for b in (batch, other):
        model = made()
        model.training_step(b, 0)
        updates.append((model.logged, state(model)))
    assert updates[0][0] == updates[1][0]
    assert all(torch.equal(updates[0][1][name], value) for name, value in updates[1][1].items())

    model = made().eval()
    find = model.find
    outside = batch["label"] != 255
    means = []
    for there in (-9.0, 9.0):
        model.find = lambda s, m, there=there: torch.where(outside[:, None], find(s, m), there)
        means.append(validated(model, batch))
    assert means[0] == means[1]


def test_only_the_first_stage_has_no_dice():
    model = made(Offline).setup().eval()
    assert set(logged_means(model, 0)) == {"val/loss", "val/reconstruction"}
    assert set(logged_means(model, 1)) == {"val/loss", "val/reconstruction", "val/dice", "val/segmentation"}


def test_as_long_as_nothing_is_found_the_segmentation_loss_chooses():
    """Otherwise the first epoch would stay the best, and the joint method's imputer untrained."""
    losses = [validated(answering(made(), bias), example())["loss"] for bias in (-9.0, -1.0)]
    assert losses[0] != losses[1]
    assert all(1 < loss < 1.1 for loss in losses)
