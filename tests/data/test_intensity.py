import pytest
import torch
import torchio as tio

from mrgen.data.intensity import IntensityShift, UniformNoise


def subject(channels=4):
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(channels, 6, 5, 4, generator=generator)
    return tio.Subject(
        image=tio.ScalarImage(tensor=image),
        label=tio.LabelMap(tensor=torch.ones(1, 6, 5, 4, dtype=torch.int16)),
    )


def line(before, after):
    """Scale and offset of every channel, and that nothing else happened to it."""
    found = []
    for x, y in zip(before, after, strict=True):
        scale = (y.max() - y.min()) / (x.max() - x.min())
        offset = (y - scale * x).mean()
        torch.testing.assert_close(y, scale * x + offset, rtol=1e-4, atol=1e-5)
        found.append((float(scale), float(offset / scale)))
    return found


def test_every_sequence_has_its_own_shift_and_scale():
    given = subject()
    before = given["image"].data.clone()
    torch.manual_seed(0)
    made = IntensityShift()(given)
    scales, shifts = zip(*line(before, made["image"].data), strict=True)
    assert len(set(scales)) == len(set(shifts)) == 4
    assert torch.equal(given["image"].data, before)
    assert torch.equal(made["label"].data, given["label"].data)


def test_their_distribution_is_deepmedics():
    given = subject(channels=500)
    torch.manual_seed(0)
    scales, shifts = torch.tensor(line(given["image"].data, IntensityShift()(given)["image"].data)).T
    assert float(scales.mean()) == pytest.approx(1, abs=4 * 0.01 / 500**0.5)
    assert float(scales.std()) == pytest.approx(0.01, rel=0.15)
    assert float(shifts.mean()) == pytest.approx(0, abs=4 * 0.05 / 500**0.5)
    assert float(shifts.std()) == pytest.approx(0.05, rel=0.15)


def test_the_shift_comes_before_the_scale():
    given = tio.Subject(image=tio.ScalarImage(tensor=torch.zeros(1, 2, 2, 2)))
    torch.manual_seed(0)
    once = IntensityShift(shift_std=1.0, scale_mean=1.0, scale_std=0.0)(given)["image"].data
    torch.manual_seed(0)
    twice = IntensityShift(shift_std=1.0, scale_mean=2.0, scale_std=0.0)(given)["image"].data
    assert once.any()
    assert torch.equal(twice, 2 * once)


def test_torchs_generator_alone_decides():
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(IntensityShift()(subject())["image"].data)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert torch.equal(IntensityShift(shift_std=0, scale_std=0)(subject())["image"].data, subject()["image"].data)


def test_uniform_noise_is_uniform_in_every_voxel_and_leaves_labels():
    given = tio.Subject(
        image=tio.ScalarImage(tensor=torch.full((2, 20, 20, 20), 0.5)),
        label=tio.LabelMap(tensor=torch.ones(1, 20, 20, 20, dtype=torch.int16)),
    )
    torch.manual_seed(0)
    made = UniformNoise(bound=0.03)(given)
    noise = made["image"].data - 0.5
    assert 0.0299 < float(noise.abs().max()) <= 0.03 + 1e-6
    assert float(noise.mean()) == pytest.approx(0, abs=1e-3)
    assert float(noise.std()) == pytest.approx(0.06 / 12**0.5, rel=0.02)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(made["label"].data, given["label"].data)
