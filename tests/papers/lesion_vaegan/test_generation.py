"""Who learns from which term, and the terms by hand."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from mrgen.errors import UserError
from mrgen.papers.lesion_vaegan.generation import DISCRIMINATOR, GENERATOR, SEGMENTOR, LesionVAEGAN
from mrgen.papers.lesion_vaegan.generator import Made, Real
from mrgen.papers.lesion_vaegan.maps import structure_map
from mrgen.papers.lesion_vaegan.segmentors import lesion_loss

CLASSES = ("background", "edema", "core")
NAMES = ("t1", "t2", "flair")
WEIGHTS = OmegaConf.load("conf/model/lesion_vaegan.yaml").weights
NETS = {
    "EC": "generator.encoder",
    "EC_R": "generator.fusion_encoder",
    "DC": "generator.decoder",
    "D": "discriminator",
    "FD": "code_discriminator",
    "SEG": "segmentors",
}
# Sections 2.4 and 2.6: which term trains which networks, and no others.
TRAINS = {
    "d1_translated": {"D"},
    "d1_category": {"D"},
    "d1_code": {"FD"},
    "d2_real": {"D"},
    "d2_real_category": {"D"},
    "d2_synthetic": {"D"},
    "d2_synthetic_category": {"D"},
    "d2_code": {"FD"},
    "g1_adversarial": {"EC", "DC"},
    "g1_category": {"EC", "DC"},
    "reconstruction": {"EC", "DC"},
    "cycle": {"EC", "DC"},
    "cycle_pairs": {"EC", "DC"},
    "semantic1": {"EC", "DC"},
    "semantic1_pairs": {"EC", "DC"},
    "g2_adversarial": {"EC_R", "DC"},
    "g2_category": {"EC_R", "DC"},
    "g2_code": {"EC_R"},
    "structure": {"EC_R", "DC"},
    "structure_pairs": {"EC_R", "DC"},
    "lesion2": {"EC_R", "DC"},
    "registration": {"EC", "EC_R", "DC"},
    "registration_pairs": {"EC", "EC_R", "DC"},
    "semantic2": {"EC", "EC_R", "DC"},
    "semantic2_pairs": {"EC", "EC_R", "DC"},
    "background_reconstructed": {"EC", "DC"},
    "background_translated": {"EC", "DC"},
    "background_synthetic": {"EC", "EC_R", "DC"},
    "lesion1": {"SEG"},
}


class At(LesionVAEGAN):
    """Without a trainer: what Lightning does in its steps, done plainly."""

    def optimizers(self):
        return self.__dict__.setdefault("groups", self.configure_optimizers())

    def manual_backward(self, loss):
        loss.backward()

    def log(self, name, value, **kwargs):
        self.__dict__.setdefault("logged", {})[name] = float(value)


def model(**changes) -> At:
    torch.manual_seed(0)
    small = {"modalities": NAMES, "classes": CLASSES, "width": 2, "discriminator_width": 2, "lr": 1e-3}
    return At(**{**small, "weights": dict(WEIGHTS), **changes}).train()


def batch(size: int = 32, slices: int = 2, seed: int = 0) -> dict:
    """Unpaired slices of a square brain, with a lesion in each and other lesions beside."""
    generator = torch.Generator().manual_seed(seed)
    brain = torch.zeros(slices, size, size, dtype=torch.bool)
    brain[:, 2:-2, 2:-2] = True
    label = torch.zeros(slices, size, size, dtype=torch.int64)
    label[:, 5:9, 5:9] = 1
    label[:, 6:8, 6:8] = 2
    parts = {}
    for name in NAMES:
        image = torch.rand(slices, 1, size, size, generator=generator).clamp(min=0.01) * brain[:, None]
        lesions = label.roll(2, dims=1)[:, None].repeat(1, 4, 1, 1).to(torch.uint8)
        parts[name] = {"image": image, "label": label, "brain": brain, "lesions": lesions}
    return parts


@pytest.fixture(scope="module")
def learned():
    """By term, the networks that get a gradient of it."""
    net = model()
    terms = net.terms(net.real(batch()))
    found = {}
    for name, term in terms.items():
        net.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        found[name] = {
            short
            for short, part in NETS.items()
            if any(p.grad is not None and p.grad.any() for p in net.get_submodule(part).parameters())
        }
    return found


@pytest.mark.parametrize("term", TRAINS)
def test_a_term_trains_whom_it_is_meant_for_and_nobody_else(term: str, learned: dict):
    assert learned[term] == TRAINS[term]


def test_the_table_has_every_term_and_every_term_a_weight(learned: dict):
    assert list(learned) == list(TRAINS)
    assert set(learned) == {*DISCRIMINATOR, *GENERATOR, *SEGMENTOR} == set(WEIGHTS)
    for name in DISCRIMINATOR:
        assert TRAINS[name] <= {"D", "FD"}
    for name in GENERATOR:
        assert TRAINS[name] <= {"EC", "EC_R", "DC"}


def test_optimizers_share_the_networks_among_them():
    net = model()
    groups = [{id(p) for g in o.param_groups for p in g["params"]} for o in net.configure_optimizers()]
    assert [
        sum(groups[i] >= {id(p) for p in net.get_submodule(part).parameters()} for i in range(3))
        for part in NETS.values()
    ]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(list(net.parameters()))
    assert groups[2] == {id(p) for p in net.segmentors.parameters()}


def test_a_step_trains_every_network_and_logs_every_term():
    net = model()
    before = {name: p.clone() for name, p in net.named_parameters()}
    net.training_step(batch(), 0)
    for part in NETS.values():
        assert any(not torch.equal(before[f"{part}.{n}"], p) for n, p in net.get_submodule(part).named_parameters())
    assert set(net.logged) == {"train/loss", *(f"train/{name}" for name in WEIGHTS)}
    weighted = sum(WEIGHTS[name] * net.logged[f"train/{name}"] for name in GENERATOR)
    assert net.logged["train/loss"] == pytest.approx(weighted, rel=1e-4)


def test_a_weight_of_zero_leaves_a_term_out():
    net = model(weights={name: 1.0 if name == "lesion1" else 0.0 for name in WEIGHTS})
    before = {name: p.clone() for name, p in net.named_parameters()}
    net.training_step(batch(), 0)
    changed = {name.partition(".")[0] for name, p in net.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {"segmentors"}


def test_segmentors_never_learn_from_made_images():
    net = model()
    real = net.real(batch())
    net.generator_terms(real, net(real))["lesion2"].backward()
    assert all(p.grad is None for p in net.segmentors.parameters())
    assert all(p.requires_grad for p in net.parameters())  # frozen for a while alone


class Means(nn.Module):
    """Stands in for a discriminator: patches that say each image's mean, and twice that as its category."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def forward(self, images):
        mean = images.flatten(1).mean(dim=1)[:, None, None, None]
        return (mean, 2 * mean) if self.heads == 2 else mean


def by_hand():
    """Two sequences of one slice of 16 × 16, everything of one value each."""
    net = At(
        modalities=NAMES[:2], classes=CLASSES, weights=dict(WEIGHTS), width=2, discriminator_width=2, expand=0
    ).eval()
    net.discriminator, net.code_discriminator = Means(2), Means(1)

    def full(*values, channels=1):
        return torch.stack([torch.full((1, channels, 16, 16), value) for value in values])

    label = torch.zeros(1, 16, 16, dtype=torch.int64)
    real = Real(full(0.5, 0.8), torch.stack([label, label]), full(0.0)[0], full(1.0)[0], label)
    made = Made(
        code=full(0.6, 0.9, channels=16),
        reconstructed=full(0.4, 0.6),
        translated=full(0.3, 0.1),  # the first as the second, and the second as the first
        recode=full(0.5, 0.7, channels=16),
        cycled=full(0.45, 0.7),
        code_g=full(0.2, channels=16)[0],
        synthetic=full(0.25, 0.75),
        recode_g=full(0.3, 0.6, channels=16),
        translated_g=full(0.5, 0.35),
    )
    return net, real, made


def test_discriminators_take_real_images_and_real_codes_for_true():
    terms = LesionVAEGAN.discriminator_terms(*by_hand())
    wanted = {
        "d1_translated": 0.3**2 + 0.1**2,
        "d1_category": (0.6 - 1) ** 2 + 0.2**2,  # the first pair's target is sequence 1
        "d1_code": (0.6 - 1) ** 2 + (0.9 - 1) ** 2,
        "d2_real": (0.5 - 1) ** 2 + (0.8 - 1) ** 2,
        "d2_real_category": 1.0**2 + (1.6 - 1) ** 2,  # a squared error of the sequence's number, no softmax
        "d2_synthetic": 0.25**2 + 0.75**2,
        "d2_synthetic_category": 0.5**2 + (1.5 - 1) ** 2,
        "d2_code": 0.2**2,
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(wanted, rel=1e-5)


def test_the_generators_terms_by_hand():
    net, real, made = by_hand()
    terms = {name: term.item() for name, term in net.generator_terms(real, made).items()}
    wanted = {
        "g1_adversarial": (0.3 - 1) ** 2 + (0.1 - 1) ** 2,
        "g1_category": (0.6 - 1) ** 2 + 0.2**2,
        "reconstruction": 0.1**2 + 0.2**2,
        "cycle": 0.05**2 + 0.1**2,
        "cycle_pairs": 0,  # of two sequences there is one way round each
        "semantic1": 0.1**2 + 0.2**2,
        "semantic1_pairs": 0,
        "g2_adversarial": (0.25 - 1) ** 2 + (0.75 - 1) ** 2,
        "g2_category": 0.5**2 + 0.5**2,
        "g2_code": 0.8**2,
        "structure": 0,
        "structure_pairs": 0,
        "registration": (0.75 - 0.5) ** 2 + (0.25 - 0.35) ** 2,  # each translation meets its target
        "registration_pairs": 0,
        "semantic2": 0.1**2 + 0.4**2,
        "semantic2_pairs": 2 * 0.3**2,  # ordered pairs
        "background_reconstructed": 0,  # there is none
        "background_translated": 0,
        "background_synthetic": 0.25**2 + 0.75**2 + 0.5**2 + 0.35**2,  # all is outside
    }
    lesion = terms.pop("lesion2")
    assert terms == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert lesion == pytest.approx(lesion_loss(net.segmentors(made.synthetic), real.lesion, [2.5, 25, 125], 125).item())


def test_cycles_and_translations_are_compared_within_their_own_sequence():
    net = model(dropout=0.0).eval()
    real = net.real(batch())
    made = net(real)
    terms = net.generator_terms(real, made)
    pairs = net.pairs

    def mean(a, b):
        return (a - b).square().mean()

    around = [
        mean(made.cycled[p], made.cycled[q])
        for p, (i, j) in enumerate(pairs)
        for q, (k, l) in enumerate(pairs)  # noqa: E741
        if i == k and j != l
    ]
    assert torch.allclose(terms["cycle_pairs"], sum(around), rtol=1e-4)
    registered = [
        mean(made.translated_g[p], made.translated_g[q])
        for p, (i, j) in enumerate(pairs)
        for q, (k, l) in enumerate(pairs)  # noqa: E741
        if j == l and i != k
    ]
    assert torch.allclose(terms["registration_pairs"], sum(registered), rtol=1e-4)
    aligned = [mean(made.synthetic[i], made.translated_g[p]) for p, (_, i) in enumerate(pairs)]
    assert torch.allclose(terms["registration"], sum(aligned), rtol=1e-4)


def test_what_is_made_is_made_as_the_page_says():
    net = model(dropout=0.0).eval()
    real = net.real(batch())
    made = net(real)
    (j, i), place = (2, 1), net.pairs.index((2, 1))
    code = net.generator.encoder(real.image[j])
    translated = net.generator.decode(code[None], [i])[0]
    recode = net.generator.encoder(translated)
    for found, wanted in (
        (made.code[j], code),
        (made.reconstructed[j], net.generator.decode(code[None], [j])[0]),
        (made.translated[place], translated),
        (made.recode[place], recode),
        (made.cycled[place], net.generator.decode(recode[None], [j])[0]),
        (made.synthetic[i], net.generator.decode(made.code_g[None], [i])[0]),
        (made.translated_g[place], net.generator.decode(net.generator.encoder(made.synthetic[j])[None], [i])[0]),
    ):
        assert torch.allclose(found, wanted, atol=1e-4)


def test_the_structure_loss_looks_outside_the_lesion():
    net = model(dropout=0.0).eval()
    real = net.real(batch())
    made = net(real)
    edges = structure_map(made.synthetic.flatten(0, 1), net.beta).unflatten(0, made.synthetic.shape[:2])
    there = (real.lesion == 0).float()[:, None]
    wanted = sum(((real.structure - one) * there).square().mean() for one in edges)
    assert torch.allclose(net.generator_terms(real, made)["structure"], wanted, rtol=1e-5)


def test_a_map_has_no_outline_of_its_own_lesion_and_gets_the_first_that_fits():
    net, parts = model(expand=0), batch(slices=1)
    parts["t2"]["label"] = parts["flair"]["label"] = parts["t1"]["label"]
    for part in parts.values():
        part["lesions"] = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        part["lesions"][0, 0, 0, 8] = 1  # outside the brain
        part["lesions"][0, 1, 10, 8] = 2
        part["lesions"][0, 2, 12, 8] = 1
    real = net.real(parts)
    assert real.lesion.nonzero().tolist() == [[0, 10, 8]]
    assert real.lesion.max() == 2
    assert not real.structure[:, :, 5:9, 5:9].any()
    assert real.structure.any()
    for part in parts.values():
        part["lesions"][0, 1:, 0, 0] = 1
    assert torch.equal(net.real(parts).lesion, parts["t1"]["label"])  # none fits: its own


def test_fusion_puts_one_fifth_of_the_label_on_four_fifths_of_the_map():
    net = model()
    structure = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    fused = net.generator.fuse(structure, torch.tensor([[[0, 2], [1, 255]]]))
    assert fused[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.8, 0.8])
    assert fused[0, :, 0, 1].tolist() == pytest.approx([0.0, 0.0, 0.2])
    assert fused[0, :, 1, 1].tolist() == pytest.approx([1.0, 0.8, 0.8])  # what is ignored is no lesion


def test_the_sequences_map_survives_the_decoders_first_layer():
    x = torch.rand(1, 16, 8, 8)
    first, last = (
        torch.cat([x, F.one_hot(torch.tensor([i]), 3).float()[..., None, None].expand(1, 3, 8, 8)], 1) for i in (0, 2)
    )
    repaired, published = (model(norm_after_map=norm).generator.decoder[0] for norm in (False, True))
    middle = (..., slice(1, -1), slice(1, -1))  # away from the borders, where zero padding tells
    assert not torch.allclose(repaired(first)[middle], repaired(last)[middle], atol=1e-3)
    published[0].padding_mode, published[0]._reversed_padding_repeated_twice = "replicate", [1, 1, 1, 1]
    assert torch.allclose(published(first), published(last), atol=1e-4)  # without borders nothing is left of it


def test_a_synthesis_depends_on_map_and_label_alone_and_not_on_its_neighbours():
    net = model().eval()
    maps = (torch.rand(20, 1, 16, 16) > 0.7).float()
    labels = torch.randint(0, 3, (20, 16, 16))
    images = net.synthesise(maps, labels)
    assert images.shape == (20, 3, 16, 16)
    assert images.min() > 0
    assert images.max() < 1
    assert torch.allclose(images[7:8], net.synthesise(maps[7:8], labels[7:8]), atol=1e-5)


def test_validation_measures_on_slices_that_belong_together():
    net = model().eval()
    paired = {
        "image": torch.rand(5, 3, 16, 16),
        "label": torch.zeros(5, 16, 16, dtype=torch.int64),
        "brain": torch.ones(5, 16, 16, dtype=torch.bool),
    }
    net.validation_step(paired, 0)
    net.on_validation_epoch_end()
    assert set(net.logged) == {"val/loss", "val/mae_reconstructed", "val/mae_translated", "val/mae_synthetic"}
    code = net.generator.encode(paired["image"].transpose(0, 1)[:, :, None])
    errors = [
        (net.generator.decode(code[j][None], [i])[0, :, 0] - paired["image"][:, i]).abs().mean() for j, i in net.pairs
    ]
    assert net.logged["val/loss"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modalities": ["t1"]}, "two sequences or more"),
        ({"classes": ["background"]}, "one class of lesion or more"),
        ({"weights": {**WEIGHTS, "recon": 1.0}}, "has also recon"),
        ({"weights": {**WEIGHTS, "cycle": -1.0}}, "expected a number from 0 on"),
        ({"tau": 0.0}, "tau above 0"),
        ({"label_share": 2.0}, "label_share from 0 to 1"),
        ({"lesion1_class_weights": []}, "expected one number from 0 on"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, said: str):
    with pytest.raises((ValueError, UserError), match=said):
        model(**changes)


def test_the_authors_first_weights_are_blurs():
    net = model(init="blur")
    weight = net.generator.decoder[0][0].weight
    assert torch.allclose(weight, torch.full_like(weight, 1 / weight[0].numel()), atol=1e-5)
    assert weight.std() > 0
