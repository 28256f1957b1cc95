"""Monte Carlo dropout (Gal and Ghahramani 2016): a network sampled at test time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["mean_and_variance", "only_dropout_active"]


@contextmanager
def only_dropout_active(model: nn.Module) -> Iterator[None]:
    """Dropout layers in training mode, all others in eval mode; afterwards every layer is as it was.

    ``model.train()`` would wake the norms too: batch norms would use the sample's own statistics and change theirs.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.training = True
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def mean_and_variance(draw: Callable[[int], Tensor], samples: int, batch: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over samples that are drawn a few at a time; none but the last few are kept.

    Args:
        draw: called with a number n, returns n samples (n, ...).
        samples: how many in all, 2 or more.
        batch: the most that are drawn at once.

    Returns:
        Both (...) float32; the variance is the unbiased one, with ``samples − 1`` below the sum.
    """
    if samples < 2 or batch < 1:
        raise ValueError(f"found {samples} samples in batches of {batch}; expected 2 or more, and 1 or more")
    mean = squares = torch.zeros(())
    drawn = 0
    while drawn < samples:
        for sample in draw(min(batch, samples - drawn)).float():
            drawn += 1
            # Welford: a sum of squares would lose the variance of values that are far from 0.
            difference = sample - mean.to(sample)
            mean = mean.to(sample) + difference / drawn
            squares = squares.to(sample) + difference * (sample - mean)
    return mean, squares / (samples - 1)
