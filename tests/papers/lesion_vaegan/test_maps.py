"""Algorithms 1 and 2 by hand and against SciPy's Sobel operator, and the gradients that the published code lacks."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from mrgen.papers.lesion_vaegan.maps import fits, outside, outside_lesion, straight_through, structure_map


def printed(image: np.ndarray, beta: float) -> np.ndarray:
    """Algorithm 1 line by line, with the scaling of the authors' code."""
    edges = np.stack([ndimage.sobel(image, axis, mode="mirror") for axis in (0, 1)])
    f1, f2 = edges.min(axis=0), edges.max(axis=0)
    f1, f2 = ((f - f.min()) / (f.max() - f.min()) for f in (f1, f2))
    f1, f2 = f1.mean() - f1, f2 - f2.mean()
    return ((1.0 * (f1 > beta) + 1.0 * (f2 > beta)) > 0).astype(np.float32)


@pytest.mark.parametrize("beta", [0.07, 0.12])
def test_a_structure_map_is_algorithm_1_as_printed(beta: float):
    image = ndimage.gaussian_filter(np.random.default_rng(0).random((24, 20)), 2).astype(np.float32)
    found = structure_map(torch.from_numpy(image)[None, None], beta)[0, 0].numpy()
    assert 0.02 < found.mean() < 0.9
    assert np.array_equal(found, printed(image, beta))


def test_a_structure_map_shows_the_border_of_a_disc_and_nothing_of_an_even_slice():
    x, y = np.mgrid[:32, :32]
    disc = torch.from_numpy(((x - 16) ** 2 + (y - 16) ** 2 < 100).astype(np.float32))[None, None]
    found = structure_map(torch.cat([disc, torch.full_like(disc, 0.4)]), 0.12)
    assert found[0, 0, 16, 16] == 0
    assert found[0, 0, 6, 16] == 1
    assert found[0, 0, 0, 0] == 0
    assert not found[1].any()
    assert set(found.unique().tolist()) == {0, 1}


def test_a_gradient_passes_thresholds():
    soft = torch.tensor([0.2, 0.5, 0.7], requires_grad=True)
    hard = straight_through(soft)
    assert hard.tolist() == [0, 0, 1]
    hard.sum().backward()
    assert soft.grad.tolist() == [1, 1, 1]
    image = torch.rand(2, 1, 16, 16, requires_grad=True)
    structure_map(image, 0.07)[0].sum().backward()
    assert image.grad[0].abs().sum() > 0
    assert not image.grad[1].any()


def test_a_mask_is_one_outside_the_brain():
    image = torch.tensor([[0.0, 0.3], [-0.1, 1e-6]])[None, None]
    assert outside(image)[0, 0].tolist() == [[1, 0], [1, 0]]


def test_an_enlarged_mask_keeps_its_size_and_has_a_larger_brain():
    image = torch.zeros(1, 1, 40, 40)
    image[..., 10:30, 10:30] = 1
    plain, enlarged = outside(image), outside(image, 5)
    assert enlarged.shape == plain.shape
    inside = lambda mask: (mask == 0).sum().item()  # noqa: E731
    assert inside(plain) == 400
    assert inside(enlarged) == round(20 * 45 / 40) ** 2
    assert not ((plain == 0) & (enlarged == 1))[..., 11:29, 11:29].any()


def test_a_lesion_fits_where_all_of_it_lies_within_the_brain():
    mask = torch.ones(2, 1, 8, 8)
    mask[:, :, 2:6, 2:6] = 0
    label = torch.zeros(2, 8, 8, dtype=torch.int64)
    label[0, 3, 3] = 4
    label[1, 3, 3] = label[1, 3, 6] = 1
    assert fits(mask, label).tolist() == [True, False]
    assert outside_lesion(label)[1, 0, 3, 3:7].tolist() == [0, 1, 1, 0]
