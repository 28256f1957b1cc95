"""Augmentation of intensities that TorchIO does not have."""

import torch
from torchio import Subject
from torchio.transforms import IntensityTransform
from torchio.transforms.augmentation import RandomTransform

__all__ = ["IntensityShift", "UniformNoise"]


class IntensityShift(RandomTransform, IntensityTransform):
    """Shifts and scales every sequence by its own random numbers, (x + shift) · scale: DeepMedic's augmentation.

    Background is shifted too; the data path sets it back to 0.

    Args:
        shift_std: standard deviation of the shift, which is normal around 0, in units of the normalised image.
        scale_mean, scale_std: of the scale, which is normal.
        **kwargs: of ``torchio.Transform``, such as ``p`` and ``include``.
    """

    def __init__(self, shift_std: float = 0.05, scale_mean: float = 1.0, scale_std: float = 0.01, **kwargs):
        super().__init__(**kwargs)
        self.shift_std, self.scale_mean, self.scale_std = shift_std, scale_mean, scale_std
        self.args_names = ["shift_std", "scale_mean", "scale_std"]

    def apply_transform(self, subject: Subject) -> Subject:
        for image in self.get_images(subject):
            shift, scale = torch.randn(2, len(image.data), 1, 1, 1)  # of torch's generator, which the dataset seeds
            shifted = image.data.float() + self.shift_std * shift  # (C, X, Y, Z)
            image.set_data(shifted.mul_(self.scale_mean + self.scale_std * scale))
        return subject


class UniformNoise(RandomTransform, IntensityTransform):
    """Adds to every voxel of every sequence a number of its own between −bound and bound.

    Args:
        bound: in units of the normalised image.
        **kwargs: of ``torchio.Transform``, such as ``p`` and ``include``.
    """

    def __init__(self, bound: float = 0.03, **kwargs):
        super().__init__(**kwargs)
        self.bound = bound
        self.args_names = ["bound"]

    def apply_transform(self, subject: Subject) -> Subject:
        for image in self.get_images(subject):
            image.set_data(image.data + self.bound * (2 * torch.rand(image.data.shape) - 1))
        return subject
