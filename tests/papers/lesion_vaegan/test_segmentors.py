"""The squared error of labels by hand, and what each sequence's segmentor sees and answers."""

import pytest
import torch
from torch import nn

from mrgen.nets.lesion_vaegan import LesionSegmentors
from mrgen.papers.lesion_vaegan.segmentors import LesionSegmentation, lesion_loss
from mrgen.protocols import Segmenter

CLASSES = ("background", "edema", "core")


def made(**changes):
    torch.manual_seed(0)
    return LesionSegmentation(**{"modalities": ["t1", "flair"], "classes": CLASSES, "width": 2, **changes})


def test_the_loss_of_four_voxels_by_hand():
    label = torch.tensor([[[0, 2], [1, 255]]])  # (B=1, X, Y)
    scores = torch.tensor([[0.5, 0.0], [0.0, 0.9]]), torch.tensor([[0.5, 0.0], [0.0, 0.9]]), torch.zeros(2, 2)
    scores = torch.stack(scores)[None, None]  # (C=1, B=1, n=3, X, Y)
    # Background: 0.5², then 0, 0; edema: 0.5², 0, 1; core: 0, 1, 0; the ignored voxel counts in no error.
    wanted = (0.25 * 1 + 1.25 * 5 + 1 * 15) / 4
    assert lesion_loss(scores, label, [1, 5, 15], 0.0).item() == pytest.approx(wanted)
    # Index maps: (0.5, 0; 0, ·) against (0, 2; 1, ·), over n − 1 = 2.
    index = (0.25 + 4 + 1) / 4 / 4
    assert lesion_loss(scores, label, [0], 7.0).item() == pytest.approx(7 * index)
    # Of two sequences the sum, and the last weight holds for all further classes.
    twice = scores.expand(2, *scores.shape[1:])
    assert lesion_loss(twice, label, [1, 5, 15], 0.0).item() == pytest.approx(2 * wanted)
    assert lesion_loss(scores, label, [2], 0.0).item() == pytest.approx(2 * (0.25 + 1.25 + 1) / 4)


def test_every_sequence_may_show_its_own_place():
    scores = torch.rand(2, 1, 3, 4, 4)
    labels = torch.randint(0, 3, (2, 1, 4, 4))
    together = lesion_loss(scores, labels, [1, 5], 3.0)
    apart = [lesion_loss(scores[i : i + 1], labels[i], [1, 5], 3.0) for i in range(2)]
    assert torch.allclose(together, sum(apart))


@pytest.mark.parametrize(
    ("scheme", "encoders", "decoders"), [("single", 1, 1), ("shared_encoder", 1, 2), ("multiple", 2, 2)]
)
def test_schemes_share_what_they_say(scheme: str, encoders: int, decoders: int):
    net = LesionSegmentors(2, 3, width=2, scheme=scheme)
    assert (len(net.encoders), len(net.decoders)) == (encoders, decoders)
    images = torch.rand(2, 1, 1, 16, 16)
    scores = net(images)
    assert scores.shape == (2, 1, 3, 16, 16)
    assert scores.min() > 0
    assert scores.max() < 1
    scores[0].sum().backward()  # of the first sequence alone
    for nets in (net.encoders, net.decoders):
        learned = [any(p.grad is not None and p.grad.any() for p in part.parameters()) for part in nets]
        assert learned == [True, False][: len(nets)]


def test_a_sequence_is_segmented_by_itself():
    model = made().eval()
    volumes = {name: torch.rand(1, 1, 16, 20, 3) for name in model.sources}
    each = model.segment_each(volumes)
    assert isinstance(model, Segmenter)
    assert list(each) == ["t1", "flair"]
    assert each["t1"].shape == (1, 16, 20, 3)
    other = model.segment_each({**volumes, "flair": torch.rand(1, 1, 16, 20, 3)})
    assert torch.equal(each["t1"], other["t1"])
    assert not torch.equal(each["flair"], other["flair"])
    slices = model.segment_each({name: volume[..., 1] for name, volume in volumes.items()})
    assert torch.equal(slices["flair"], each["flair"][..., 1])
    together, both = model.segment_all(volumes)
    assert torch.equal(together.labels, model.segment(volumes).labels)
    assert all(torch.equal(both[name], each[name]) for name in each)


def test_all_sequences_together_answer_by_their_mean_score():
    model = made().eval()

    class Fixed(nn.Module):
        def forward(self, images):
            scores = torch.zeros(*images.shape[:2], 3, *images.shape[3:])
            scores[0, :, 1], scores[1, :, 2], scores[1, :, 1] = 0.6, 0.5, 0.1
            return scores

    model.segmentors = Fixed()
    found = model.segment({name: torch.zeros(1, 1, 4, 4, 2) for name in model.sources})
    assert (found.labels == 1).all()
    assert found.labels.shape == (1, 4, 4, 2)
    assert torch.allclose(found.probabilities.sum(dim=1), torch.ones(1, 4, 4, 2))
    assert torch.allclose(found.probabilities[0, :, 0, 0, 0], torch.tensor([0, 0.7, 0.5]) / 1.2)


def test_dropout_is_of_the_input_alone():
    drops = [module.p for module in made(dropout=0.1).modules() if isinstance(module, nn.Dropout)]
    assert drops == [0.1, 0.1]


def test_training_lowers_the_loss():
    model = made(dropout=0.0, lr=1e-2, scheme="single")
    label = torch.zeros(2, 16, 16, dtype=torch.int64)
    label[:, 4:10, 4:10] = 2
    batch = {"image": torch.rand(2, 2, 16, 16) * 0.1 + (label > 0)[:, None], "label": label}
    optimizer = model.configure_optimizers()
    first = model.losses(batch)["loss"].item()
    for _ in range(20):
        optimizer.zero_grad()
        model.losses(batch)["loss"].backward()
        optimizer.step()
    assert model.losses(batch)["loss"].item() < first / 2


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="expected single, shared_encoder or multiple"):
        made(scheme="double")
