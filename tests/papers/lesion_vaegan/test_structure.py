"""Which term trains which network, and each term by hand on four pixels."""

import inspect
import math

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mrgen.errors import UserError
from mrgen.metrics.segmentation import dice
from mrgen.papers.lesion_vaegan.maps import outside, outside_lesion, structure_map
from mrgen.papers.lesion_vaegan.structure import TERMS, StructureVAEGAN
from tests.launch.tools import composed

MODALITIES = ("t1", "flair")
SIZE = (36, 40)
NETWORKS = {
    "EC_f": "encoder",
    "DC_f": "decoder",
    "MASK": "mask_generator",
    "D_f": "map_discriminator",
    "FD_f": "code_discriminator",
}
TRAINED_BY = {
    "code_d": {"FD_f"},
    "map_d": {"D_f"},
    "map_adversarial_code": {"EC_f"},
    "map_adversarial_map": {"DC_f"},
    "normal_mean": {"EC_f"},
    "normal_deviation": {"EC_f"},
    "map_reconstruction": {"EC_f", "DC_f"},
    "map_reconstruction_outside": {"EC_f", "DC_f"},
    "map_reconstruction_probability": {"EC_f", "DC_f"},
    "mask_reconstruction": {"MASK"},
    "mask_reconstruction_f": {"MASK"},
    "mask_reconstruction_f_r": {"MASK"},
    "mask_reconstruction_f_g": {"MASK"},
    "mask_reconstruction_probability": {"MASK"},
}


class At(StructureVAEGAN):
    """The model without a trainer: what Lightning does in its steps, done plainly."""

    def optimizers(self):
        if "groups" not in self.__dict__:
            self.__dict__["groups"] = self.configure_optimizers()
        return self.groups

    def manual_backward(self, loss):
        loss.backward()

    def log(self, name, value, **kwargs):
        self.__dict__.setdefault("logged", {})[name] = float(value)


def made(cls=At, **changes):
    torch.manual_seed(0)
    weights = {name: float(number) for number, name in enumerate(TERMS, start=1)}
    small = {"modalities": MODALITIES, "size": SIZE, "weights": weights, "width": 2, "latent": 16}
    return cls(**{**small, **changes}).train()


def example(seed=0, slices=2):
    """A square brain of noise with a square lesion, 0 outside."""
    brain = torch.zeros(slices, *SIZE, dtype=torch.bool)
    brain[:, 6:30, 8:34] = True
    label = torch.zeros(slices, *SIZE, dtype=torch.int64)
    label[:, 12:18, 14:22] = 3
    image = 0.1 + 0.9 * torch.rand(slices, 2, *SIZE, generator=torch.Generator().manual_seed(seed))
    return {
        "image": image * brain[:, None],
        "label": label,
        "brain": brain,
        "subject": ["s"] * slices,
        "spacing": torch.ones(slices, 3),
    }


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


class Stub(nn.Module):
    """A network that answers as told, without weights."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


# ----- who learns from what ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def differentiated():
    """The model, and all terms of one forward pass."""
    model = made()
    return model, model.losses(example())


def test_the_table_names_every_term_and_network(differentiated):
    model, losses = differentiated
    assert tuple(TRAINED_BY) == TERMS
    assert [*losses] == [*TERMS, "loss"]
    assert [name for name, _ in model.named_children()] == [*NETWORKS.values(), "val_means"]


@pytest.mark.parametrize("term", TERMS)
def test_a_term_trains_its_networks_and_no_other(differentiated, term: str):
    model, losses = differentiated
    model.zero_grad(set_to_none=True)
    losses[term].backward(retain_graph=True)
    trained = set()
    for name, attribute in NETWORKS.items():
        gradients = [p.grad for p in getattr(model, attribute).parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients)
        if any(g.any() for g in gradients):
            trained.add(name)
    assert trained == TRAINED_BY[term]


def test_the_loss_is_the_weighted_sum_and_trains_every_weight(differentiated):
    model, losses = differentiated
    by_hand = sum(number * float(losses[name].detach()) for number, name in enumerate(TERMS, start=1))
    assert float(losses["loss"].detach()) == pytest.approx(by_hand, rel=1e-5)
    model.zero_grad(set_to_none=True)
    losses["loss"].backward(retain_graph=True)
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_three_optimisers_share_no_parameter_and_have_them_all():
    model = made()
    groups = [{p for group in o.param_groups for p in group["params"]} for o in model.configure_optimizers()]
    expected = [("encoder", "decoder"), ("mask_generator",), ("map_discriminator", "code_discriminator")]
    for group, names in zip(groups, expected, strict=True):
        assert group == {p for name in names for p in getattr(model, name).parameters()}
    assert sum(map(len, groups)) == len(set.union(*groups)) == len(list(model.parameters()))
    for optimiser in model.configure_optimizers():
        assert optimiser.defaults["lr"] == 1e-4
        assert (optimiser.defaults["betas"], optimiser.defaults["weight_decay"]) == ((0.5, 0.999), 0)


def test_a_step_changes_every_network_and_logs_every_term():
    model, batch = made(lr=1e-2), example()
    before = state(model)
    model.training_step(batch, 0)
    for attribute in NETWORKS.values():
        assert any(
            not torch.equal(value, before[f"{attribute}.{name}"])
            for name, value in getattr(model, attribute).state_dict().items()
        )
    assert set(model.logged) == {f"train/{name}" for name in (*TERMS, "loss")}
    assert all(math.isfinite(value) for value in model.logged.values())


def test_steps_bring_maps_and_masks_nearer():
    quiet = dict.fromkeys(TERMS, 1.0) | {"map_adversarial_code": 0.1, "map_adversarial_map": 0.1}  # they pull elsewhere
    model, batch, logged = made(lr=5e-3, width=4, dropout=0.0, weights=quiet), example(), []
    for step in range(8):
        torch.manual_seed(1)  # the same sequences and codes in every step
        model.training_step(batch, step)
        logged.append(dict(model.logged))
    for term in ("map_reconstruction", "mask_reconstruction", "code_d"):
        assert logged[-1][f"train/{term}"] < 0.9 * logged[0][f"train/{term}"]


# ----- the terms by hand ---------------------------------------------------------------------------------------------


def by_hand():
    """All terms of one map of four pixels, with networks that answer as told, and the random code z_g.

    Discriminators answer with what they see; the deviation is 2, and the mean such that z_f is 1, 2, 3, 4.
    """
    model = made(latent=4)
    torch.manual_seed(5)
    noise, z_g = torch.randn(1, 4), torch.randn(1, 4)
    z_f = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    model.encoder = Stub(lambda f: (z_f - 2 * noise, torch.full((1, 4), 2 * math.log(2))))
    # s0 and s1 of f_r, whose p are 3/4, 1/4, 1/2 and 1, and of f_g, whose p are 0.8, 0.2, 0.2 and 0.2
    scores_r = torch.tensor([[[0.2, 0.6], [0.5, 0.0]], [[0.6, 0.2], [0.5, 0.9]]])
    scores_g = torch.tensor([[[0.1, 0.4], [0.4, 0.4]], [[0.4, 0.1], [0.1, 0.1]]])
    model.decoder = Stub(lambda codes: torch.stack([scores_r, scores_g]))
    # of m_r, whose p are 0.1, 0.9, 0.5 and 0.3, and of m_g, 0.3 everywhere
    m_r = torch.tensor([[0.1, 0.9], [0.5, 0.3]])
    m_g = torch.full((2, 2), 0.3)
    model.mask_generator = Stub(lambda maps: torch.stack([torch.stack([(1 - m) / 2, m / 2]) for m in (m_r, m_g)]))
    model.map_discriminator = model.code_discriminator = Stub(lambda x: x)
    f, mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]), torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    torch.manual_seed(5)
    return model.terms(f, mask), z_f - 2 * noise, z_g


def test_the_terms_by_hand():
    found, mean, z_g = by_hand()
    expected = {
        "code_d": float((z_g - 1).square().mean()) + (1 + 4 + 9 + 16) / 4,
        "map_d": 2 / 4 + 1 / 4,  # f is 1 twice, f_g once
        "map_adversarial_code": (0 + 1 + 4 + 9) / 4,
        "map_adversarial_map": 3 / 4,
        "normal_mean": float(mean.mean()) ** 2,
        "normal_deviation": 1.0,
        "map_reconstruction": (0.25**2 + 0.25**2 + 0.5**2 + 0) / 4,
        "map_reconstruction_outside": (0.25**2 + 0.5**2) / 4,
        "map_reconstruction_probability": (0.2**2 + 0.4**2 + 0.4**2 + 0.2**2 + 0.5**2 + 0.5**2 + 0 + 0.1**2) / 8,
        "mask_reconstruction": (0.1**2 + 0.1**2 + 0.5**2 + 0.3**2) / 4,
        "mask_reconstruction_f": (0.1**2 + 0.3**2) / 4,
        "mask_reconstruction_f_r": (0.1**2 + 0.3**2) / 4,  # p of a half is no edge, as of an argmax
        "mask_reconstruction_f_g": 0.3**2 / 4,
        # s0 is (1 − p) / 2 and s1 is p / 2
        "mask_reconstruction_probability": (
            (0.55**2 + 0.05**2) + (0.05**2 + 0.55**2) + (0.25**2 + 0.75**2) + (0.65**2 + 0.15**2)
        )
        / 8,
    }
    assert {name: float(term) for name, term in found.items()} == pytest.approx(expected, rel=1e-5)


def test_random_codes_are_true_and_encoded_ones_fake():
    """A discriminator that knows: 1 for z_g, 0 for z_f. It has no loss, and the encoder all of it; or the reverse."""
    for right in (True, False):
        model = made()
        model.encoder = Stub(lambda f: (torch.full((2, 16), 50.0), torch.zeros(2, 16)))  # far from N(0, 1)
        model.code_discriminator = Stub(
            lambda x, right=right: (
                (x.mean(dim=(1, 2, 3), keepdim=True) < 25).float()
                if right
                else (x.mean(dim=(1, 2, 3), keepdim=True) > 25).float()
            )
        )
        with torch.no_grad():
            terms = model.losses(example())
        assert float(terms["code_d"]) == (0 if right else 2)
        assert float(terms["map_adversarial_code"]) == (1 if right else 0)


def test_the_published_one_hot_of_five_is_not_copied():
    """Channels that are right have no error; the code's target of 5 leaves 16 at every edge."""
    model = made()
    f, mask = model.maps(example()["image"][:, :1], example()["label"])
    model.decoder = Stub(lambda codes: torch.cat([torch.cat([1 - f, f], dim=1)] * 2))
    model.mask_generator = Stub(lambda maps: torch.cat([torch.cat([1 - mask, mask], dim=1)] * 2))
    terms = model.terms(f, mask)
    for name in ("map_reconstruction", "mask_reconstruction"):
        assert float(terms[name]) == pytest.approx(0, abs=1e-10)
        assert float(terms[f"{name}_probability"]) == pytest.approx(0, abs=1e-10)


# ----- what is shown -------------------------------------------------------------------------------------------------


def test_maps_lack_the_lesions_outline_and_masks_are_expanded():
    model, batch = made(), example()
    image = batch["image"][:, 1:]
    f, mask = model.maps(image, batch["label"])
    whole = structure_map(image, 0.07)
    assert whole[batch["label"][:, None] > 0].any()
    assert not f[batch["label"][:, None] > 0].any()
    assert torch.equal(f, whole * outside_lesion(batch["label"]))
    assert torch.equal(mask, outside(image, 5))
    assert not torch.equal(mask, outside(image))
    assert float(made(beta=0.5).maps(image, batch["label"])[0].sum()) < float(f.sum())


def test_a_slice_shows_one_sequence_drawn_from_the_global_generator():
    model, batch, seen = made(), example(slices=1), []
    batch["image"] = torch.stack([torch.full(SIZE, 0.25), torch.full(SIZE, 0.75)])[None]
    model.maps = lambda image, label: (seen.append(image), image)[1:] * 2
    for seed in (*range(8), *range(8)):
        torch.manual_seed(seed)
        model.losses(batch)
    values = [float(image[0, 0, 0, 0]) for image in seen]
    assert all(image.shape == (1, 1, *SIZE) for image in seen)
    assert set(values) == {0.25, 0.75}
    assert values[:8] == values[8:]


def test_dropout_is_on_the_inputs_of_encoder_and_mask_alone():
    model = made()
    drops = {name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p == 0.1}
    assert {name.split(".")[0] for name in drops} == {"encoder", "mask_generator"}
    assert len(drops) == 2


# ----- generation ----------------------------------------------------------------------------------------------------


def test_drawing_is_repeatable_and_leaves_the_model_as_it_is():
    model = made()

    def drawn(seed, count=18):
        return model.draw(count, torch.Generator().manual_seed(seed))

    before, rng = state(model), torch.get_rng_state()
    maps = drawn(3)
    assert (maps.shape, maps.dtype) == ((18, 1, *SIZE), torch.float32)
    assert set(maps.unique().tolist()) == {0, 1}
    assert torch.equal(maps, drawn(3))
    assert not torch.equal(maps, drawn(4))
    codes = torch.randn(18, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(maps[:, 0], model.decoder(codes).argmax(dim=1).float())
    masks = model.mask(maps)
    assert (masks.shape, set(masks.unique().tolist())) == (maps.shape, {0, 1})
    assert torch.equal(masks, model.mask(maps))  # no dropout
    assert torch.equal(masks[:, 0], model.mask_generator.eval()(maps).argmax(dim=1).float())
    model.train()
    realness = model.realness(maps)
    torch.testing.assert_close(realness, model.map_discriminator(maps).flatten(1).mean(1).detach())
    assert realness.shape == (18,)
    assert not any(x.requires_grad for x in (maps, masks, realness))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ----- validation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_validation_is_of_whole_subjects_in_all_sequences_and_in_parts():
    model, batch = made().eval(), example(slices=9)  # 18 slices of two sequences are two parts
    model.validation_step(batch, 0)
    found = {name: float(value) for name, value in model.val_means.take().items()}
    errors, edges, brains = [], [], []
    for k in range(2):
        f, mask = model.maps(batch["image"][:, k : k + 1], batch["label"])
        scores, masks = model.decoder(model.encoder(f)[0]), model.mask_generator(f)
        p = scores[:, 1:] / scores.sum(1, keepdim=True)
        errors.append((p - f).square().mean())
        edges.append((p > 0.5, f > 0.5))
        brains.append((masks[:, :1] >= masks[:, 1:], mask < 0.5))
    assert found["loss"] == pytest.approx(float(sum(errors) / 2), rel=1e-5)
    for name, pairs in (("map_dice", edges), ("mask_dice", brains)):
        assert found[name] == pytest.approx(dice(*(torch.cat(sides) for sides in zip(*pairs, strict=True))), rel=1e-3)
    model.validation_step(batch, 0)
    model.on_validation_epoch_end()
    assert set(model.logged) == {"val/loss", "val/map_dice", "val/mask_dice"}


# ----- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": 15}, r"model.latent is 15; expected a square number"),
        ({"latent": 0}, r"model.latent is 0; expected a square number"),
        ({"size": [38, 40]}, r"data.sampling.size is \[38, 40\]; expected two multiples of 4 from 36 on"),
        ({"size": [64, 32]}, r"data.sampling.size is \[64, 32\]; expected two multiples of 4 from 36 on"),
        ({"size": [64, 64, 64]}, "expected two multiples of 4"),
        ({"weights": {"map_d": 1.0}}, "model.weights lacks code_d, map_adversarial_code, .*; expected one weight"),
        ({"weights": dict.fromkeys([*TERMS, "kl"], 1.0)}, "model.weights has also kl; expected one weight for each"),
        ({"weights": dict.fromkeys(TERMS, 1.0) | {"map_d": "x"}}, "model.weights.map_d is 'x'; expected a number"),
        ({"weights": dict.fromkeys(TERMS, 1.0) | {"map_d": -1}}, "model.weights.map_d is -1; expected a number"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        made(**changes)


def test_slices_of_another_size_are_refused():
    batch = example()
    with pytest.raises(UserError, match=r"slices are \(36, 36\) pixels and the model was built for \(36, 40\)"):
        made().losses({**batch, "image": batch["image"][..., :36], "label": batch["label"][..., :36]})


def test_the_least_size_can_be_trained():
    """At 32 the encoder leaves one number a channel, which an instance norm refuses."""
    model = made(size=(36, 36))
    batch = {key: example()[key][..., :36] for key in ("image", "label")}
    assert model.losses(batch)["loss"].isfinite()


def test_the_authors_first_weights_can_be_chosen():
    model = made(init="blur")
    for net in (model.encoder, model.decoder, model.mask_generator):
        for layer in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
            torch.testing.assert_close(
                layer.weight, torch.full_like(layer.weight, 1 / layer.weight[0].numel()), atol=1e-5, rtol=0
            )
    first = next(model.map_discriminator.parameters())
    assert float(first.detach().std()) == pytest.approx((2 / first[0].numel()) ** 0.5, rel=0.5)


# ----- preset, plan, checkpoints -------------------------------------------------------------------------------------


def test_the_preset_is_the_papers():
    conf = composed("train", "experiment=lesion_vaegan/structure")
    assert (conf.name, conf.monitor, conf.data.labels, conf.data.batch_size) == ("structure", None, "native", 1)
    assert (conf.trainer.max_epochs, conf.data.split.val, conf.data.split.test) == (100, 0.0, 0.1)
    assert conf.data.normalisation._target_.endswith(".MinMax")
    settings = OmegaConf.to_container(conf.model, resolve=True)
    assert settings.pop("_target_") == f"{StructureVAEGAN.__module__}.{StructureVAEGAN.__qualname__}"
    defaults = {name: p.default for name, p in inspect.signature(StructureVAEGAN).parameters.items()}
    assert {name: value for name, value in settings.items() if value == defaults[name]}.keys() == (
        settings.keys() - {"modalities", "size", "weights", "betas"}
    )
    assert (settings["size"], settings["betas"]) == ([*conf.data.sampling.size], [0.5, 0.999])
    assert tuple(settings["weights"]) == TERMS
    assert [*settings["weights"].values()] == [0.1, 0.001, 0.1, 100, 0.1, 0.1, 50, 5, 50, 25, 5, 5, 5, 25]


def test_a_plan_computes_shapes_alone():
    with torch.device("meta"):
        model = made(size=(184, 144), width=64, latent=4096)
    image = torch.empty(1, 4, 184, 144, device="meta")
    losses = model.losses({"image": image, "label": torch.zeros(1, 184, 144, dtype=torch.int64, device="meta")})
    losses["loss"].backward()
    assert losses["loss"].is_meta
    assert all(p.grad is not None for p in model.parameters())


class Slices(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {key: value[0] for key, value in example(index, 1).items()}


def test_lightning_trains_it_in_three_steps_a_batch_and_resumes(tmp_path):
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

    loader, first = DataLoader(Slices(), batch_size=1), trainer(1)
    first.fit(made(StructureVAEGAN), loader, loader)
    assert first.global_step == 2 * 3
    names = ("train/loss_epoch", *(f"train/{name}" for name in TERMS), "val/loss", "val/map_dice", "val/mask_dice")
    assert all(first.callback_metrics[name].isfinite() for name in names)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = trainer(2)
    again.fit(made(StructureVAEGAN), loader, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert [int(next(iter(o.state.values()))["step"]) for o in again.optimizers] == [4, 4, 4]
