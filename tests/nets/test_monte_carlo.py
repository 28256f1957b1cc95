import pytest
import torch
from torch import nn

from mrgen.nets.blocks import Dropout
from mrgen.nets.monte_carlo import mean_and_variance, only_dropout_active


def test_only_dropout_wakes_and_norm_statistics_stay_untouched():
    net = nn.Sequential(
        nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), Dropout(0.5), nn.Dropout3d(0.5), nn.Sequential(nn.Dropout(0.5))
    )
    net.eval()
    statistics = {name: value.clone() for name, value in net.state_dict().items()}
    with only_dropout_active(net):
        assert [type(m) for m in net.modules() if m.training] == [Dropout, nn.Dropout3d, nn.Dropout]
        net(100 + torch.randn(2, 1, 4, 4, 4))
    assert not any(m.training for m in net.modules())
    assert all(torch.equal(value, statistics[name]) for name, value in net.state_dict().items())


def test_modes_are_put_back_after_an_error():
    net = nn.Sequential(nn.BatchNorm3d(2), Dropout(0.5))
    net[1].eval()

    def stopped():
        with only_dropout_active(net):
            assert (net.training, net[0].training, net[1].training) == (False, False, True)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert (net.training, net[0].training, net[1].training) == (True, True, False)


@pytest.mark.parametrize(("samples", "batch"), [(2, 1), (20, 1), (20, 3), (5, 9)])
def test_moments_are_those_of_all_samples_at_once(samples, batch):
    drawn = []

    def draw(n):
        drawn.append(1000 + torch.randn(n, 3, 4))  # far from 0: sums of squares in float32 would lose the variance
        return drawn[-1]

    mean, variance = mean_and_variance(draw, samples, batch)
    together = torch.cat(drawn)
    assert len(together) == samples
    assert max(map(len, drawn)) <= batch
    torch.testing.assert_close(mean, together.mean(0))
    torch.testing.assert_close(variance, together.double().var(0).float(), rtol=1e-2, atol=1e-3)


def test_one_sample_has_no_variance():
    with pytest.raises(ValueError, match="2 or more"):
        mean_and_variance(lambda n: torch.zeros(n, 1), 1, 1)
