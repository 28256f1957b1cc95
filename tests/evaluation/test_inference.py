from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mrgen.evaluation import inference
from mrgen.evaluation.inference import WholeSegmenter, WholeSynthesizer, infer
from mrgen.evaluation.memory import free_bytes, peak_bytes
from mrgen.nets.deepmedic import DeepMedic
from mrgen.nets.unet3d import UNet3d
from mrgen.papers.rsnet import RSNet
from mrgen.protocols import Segmentation, Segmenter, Synthesis, Synthesizer
from mrgen.segmenter import SegmenterModule

MODALITIES = ("t1", "t1ce", "t2", "flair")


class Pooled(nn.Module):
    """A small U-Net whose norm looks at no sample: one pass and tiles can agree. Keeps the shapes that it saw."""

    divisor = 2
    reach = 10  # the convolutions' 1 + 2 · (1 + 1) + 1 and the pooling's 2, rounded up

    def __init__(self, channels=2):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv3d(channels, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.deep, self.up = nn.Conv3d(4, 4, 3, padding=1), nn.ConvTranspose3d(4, 4, 2, stride=2)
        self.last = nn.Conv3d(8, 2, 3, padding=1)
        self.norm.running_mean.normal_()
        self.eval().requires_grad_(False)
        self.saw = []

    def forward(self, x):
        self.saw.append(tuple(x.shape[2:]))
        skip = F.leaky_relu(self.norm(self.first(x)))
        deep = self.up(F.leaky_relu(self.deep(F.avg_pool3d(skip, 2))))
        return self.last(torch.cat([skip, deep], dim=1))


def image(*size, channels=2, subjects=1):
    return torch.randn(subjects, channels, *size, generator=torch.Generator().manual_seed(1))


# ----- one pass, and tiles where memory does not allow it ------------------------------------------------------------


def test_what_fits_is_one_pass():
    net, x = Pooled(), image(20, 24, 16)
    assert torch.equal(infer(net, x, divisor=2, reach=10, fits=20 * 24 * 16), net(x))
    assert net.saw == [(20, 24, 16)] * 2


@pytest.mark.parametrize(
    ("size", "fits"),
    [(size, fits) for size in [(48, 40, 20), (47, 38, 21)] for fits in (40 * 30 * 20, 36 * 30 * 20, 30 * 30 * 20)]
    + [((26, 22, 4), 1), ((25, 23, 3), 1)],  # hundreds of tiles as it is
)
def test_tiles_agree_with_one_pass_where_no_norm_uses_the_samples_own_statistics(size, fits):
    net, x = Pooled(), image(*size, subjects=2)
    expected = infer(net, x, divisor=2)
    net.saw.clear()
    torch.testing.assert_close(infer(net, x, divisor=2, reach=net.reach, fits=fits), expected, rtol=1e-4, atol=1e-5)
    assert len(net.saw) > 1
    assert all(torch.Size(shape).numel() <= max(fits, 22**3) for shape in net.saw)  # 2 voxels and 10 around them
    assert all(n % 2 == 0 for shape in net.saw for n in shape)


def test_too_short_a_reach_does_not_agree():
    """So that the test above can fail."""
    net, x = Pooled(), image(48, 40, 20)
    tiles = infer(net, x, divisor=2, reach=2, fits=8000)
    assert (tiles - net(x)).abs().max() > 1e-3


def test_a_network_that_normalises_by_the_sample_is_given_blended_tiles_that_fit():
    torch.manual_seed(0)
    net = UNet3d(2, filters=2, levels=2, dropout=0.0).eval()
    saw = []
    net.register_forward_pre_hook(lambda _, args: saw.append(tuple(args[0].shape[2:])))
    x = image(40, 24, 18)
    with torch.no_grad():
        answer = infer(net, x, divisor=2, fits=6000)
        assert len(saw) > 1
        assert all(torch.Size(shape).numel() <= 6000 for shape in saw)
        assert (answer - net(x)).abs().max() > 1e-3  # they cannot agree


# ----- the brain's box -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box", [((4, 16), (2, 22), (0, 16)), ((-4, 16), (2, 30), (3, 13)), ((0, 20), (0, 24), (0, 16))]
)
def test_a_box_is_computed_alone_and_put_back_in_its_place(box):
    net, x = Pooled(), image(20, 24, 16)
    padded = F.pad(x, [8] * 6)
    expected = net(padded[(..., *(slice(a + 8, b + 8) for a, b in box))])
    answer = infer(net, x, box=box, divisor=2)
    assert answer.shape == (1, 2, 20, 24, 16)
    inside = [slice(max(a, 0), min(b, n)) for (a, b), n in zip(box, x.shape[2:], strict=True)]
    back = [slice(max(-a, 0), min(b, n) - a) for (a, b), n in zip(box, x.shape[2:], strict=True)]
    assert torch.equal(answer[(..., *inside)], expected[(..., *back)])
    outside = torch.ones(20, 24, 16, dtype=torch.bool)
    outside[tuple(inside)] = False
    assert not answer[..., outside].any()
    assert net.saw[-1] == tuple(b - a for a, b in box)


def test_an_axis_that_the_network_cannot_halve_is_padded_and_cut():
    net, x = Pooled(), image(19, 24, 15)
    answer = infer(net, x, divisor=2)
    assert net.saw == [(20, 24, 16)]
    assert torch.equal(answer, net(F.pad(x, (0, 1, 0, 0, 0, 1)))[..., :19, :, :15])


# ----- patches and slices --------------------------------------------------------------------------------------------


def test_a_patchwise_network_sees_patches_of_its_size_alone():
    net, x = Pooled(), image(30, 20, 18)
    answer = infer(net, x, tile=(16, 16, 16), divisor=2, batch=2)
    assert set(net.saw) == {(16, 16, 16)}
    assert answer.shape == (1, 2, 30, 20, 18)
    assert infer(lambda part: part, x, tile=(16, 16, 16)).allclose(x, atol=1e-5)  # blending invents nothing


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_a_slicewise_network_sees_slices(axis, batch):
    torch.manual_seed(0)
    net = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
    saw = []
    net.register_forward_pre_hook(lambda _, args: saw.append(tuple(args[0].shape)))
    x, tile = image(6, 7, 8, channels=3, subjects=2), [0, 0, 0]
    tile[axis] = 1
    answer = infer(net, x, tile=tile, batch=batch)
    count, plane = x.shape[2 + axis], [n for i, n in enumerate((6, 7, 8)) if i != axis]
    assert sum(shape[0] for shape in saw) == 2 * count
    assert all(shape[0] <= batch and shape[1:] == (3, *plane) for shape in saw)
    for i in range(count):
        torch.testing.assert_close(answer.select(2 + axis, i), net(x.select(2 + axis, i)))


def test_slices_are_padded_to_what_the_network_can_halve():
    saw = []

    def predict(x):
        saw.append(tuple(x.shape))
        return x

    x = image(6, 7, 9)
    assert torch.equal(infer(predict, x, tile=(0, 0, 1), divisor=4, batch=9), x)
    assert saw == [(9, 2, 8, 8)]


@pytest.mark.parametrize("tile", [(1, 1, 0), (8, 8), (-1, 8, 8)])
def test_a_tile_that_means_nothing_is_refused(tile):
    with pytest.raises(ValueError, match="expected voxels along x, y, z"):
        infer(lambda x: x, image(8, 8, 8), tile=tile)


# ----- methods -------------------------------------------------------------------------------------------------------


def rsnet(**changes):
    torch.manual_seed(0)
    regions = {"ET": [3], "WT": [1, 2, 3], "TC": [1, 3]}
    settings = {"target": "t2", "filters": 2, "levels": 2, "dropout": 0.3, "mc_samples": 4, **changes}
    return RSNet(modalities=MODALITIES, classes="abcd", regions=regions, **settings).eval()


def sources(*size):
    return {name: image(*size, channels=1) + i for i, name in enumerate(("t1", "t1ce", "flair"))}


def test_a_whole_synthesis_is_the_methods_own():
    model, inputs = rsnet(), sources(8, 12, 8)
    whole = WholeSynthesizer(model)
    assert isinstance(whole, Synthesizer)
    assert (whole.sources, whole.targets) == (model.sources, model.targets)
    first, second = ((torch.manual_seed(3), made.synthesize(inputs))[1] for made in (model, whole))
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.variance, second.variance)
    assert second.scale == "zscore"


def test_mean_and_variance_stay_apart_in_boxes_and_patches():
    class Constant:
        sources, targets = ("t1",), ("t2",)

        def synthesize(self, volumes):
            ones = torch.ones_like(volumes["t1"])
            return Synthesis(mean=3 * ones, variance=2 * ones, scale="zscore")

    inputs = {"t1": torch.zeros(1, 1, 9, 9, 9)}
    for tile in (None, (4, 4, 4)):
        synthesis = WholeSynthesizer(Constant(), tile).synthesize(inputs, box=((2, 8), (1, 7), (-1, 5)))
        for volume, value in ((synthesis.mean, 3), (synthesis.variance, 2)):
            assert volume.shape == (1, 1, 9, 9, 9)
            torch.testing.assert_close(volume[..., 2:8, 1:7, :5], torch.full((1, 1, 6, 6, 5), float(value)))
            assert float(volume.sum()) == pytest.approx(value * 180, rel=1e-5)


def test_a_whole_segmentation_is_the_methods_own_and_background_outside_the_box():
    model, inputs = rsnet(), sources(8, 12, 8)
    whole = WholeSegmenter(model)
    assert isinstance(whole, Segmenter)
    for part in (whole.segment(inputs), whole.segment(inputs, box=((0, 8), (0, 12), (0, 8)))):
        assert torch.equal(part.labels, model.segment(inputs).labels)
        assert torch.equal(part.probabilities, model.segment(inputs).probabilities)
    part = whole.segment(inputs, box=((0, 8), (0, 4), (0, 8)))
    assert not part.labels[:, :, 4:].any()
    torch.testing.assert_close(part.probabilities.sum(1), torch.ones(1, 8, 12, 8))


def test_a_method_that_is_no_network_is_asked_once():
    class Threshold:
        sources = ("t1",)

        def segment(self, volumes):
            labels = (volumes["t1"][:, 0] > 0).long()
            return Segmentation(labels=labels, probabilities=F.one_hot(labels, 2).movedim(-1, 1).float())

    t1 = image(5, 6, 7, channels=1)
    assert torch.equal(WholeSegmenter(Threshold()).segment({"t1": t1}).labels, (t1[:, 0] > 0).long())


def test_little_memory_makes_tiles(monkeypatch):
    """The memory of a pass is found on the network itself, samples in batches included."""
    model, inputs, saw = rsnet(), sources(32, 32, 32), []
    hook = model.unet.down[0].register_forward_pre_hook(lambda _, args: saw.append(tuple(args[0].shape[2:])))
    WholeSynthesizer(model).synthesize(inputs)
    assert (32, 32, 32) in saw
    hook.remove()
    need = {}
    for batch in (1, 4):
        model.mc_batch = batch
        whole = WholeSynthesizer(model)
        whole.synthesize(inputs)
        need[batch] = whole._bytes_a_voxel
    assert 2 < need[4] / need[1] < 4.5
    model.mc_batch, saw = 1, []
    model.unet.down[0].register_forward_pre_hook(lambda _, args: saw.append(tuple(args[0].shape[2:])))
    monkeypatch.setattr(inference, "free_bytes", lambda device: int(need[1] * 16**3))
    whole = WholeSynthesizer(model)
    with pytest.warns(UserWarning, match="sees 32,768 voxels in tiles, because memory is free for 4,096 at once"):
        synthesis = whole.synthesize(inputs)
    assert whole.tiled
    seen = [shape for shape in saw if shape != (8, 8, 8)]  # 8: the measurement
    assert len(seen) > 1
    assert all(torch.Size(shape).numel() <= 16**3 for shape in seen)
    assert synthesis.variance.min() > 0


def test_a_box_that_fits_is_one_pass_however_large_the_volume(monkeypatch, recwarn):
    model, saw = rsnet(mc_samples=0), []
    model.unet.down[0].register_forward_pre_hook(lambda _, args: saw.append(tuple(args[0].shape[2:])))
    whole = WholeSynthesizer(model)
    whole._bytes_a_voxel = 1.0
    monkeypatch.setattr(inference, "free_bytes", lambda device: 16**3)
    box = ((4, 20), (-2, 14), (8, 24))
    whole.synthesize(sources(32, 32, 32), box)
    assert (saw, whole.tiled, len(recwarn)) == ([(16, 16, 16)], False, 0)
    with pytest.warns(UserWarning, match="sees 4,608 voxels in tiles"):
        whole.synthesize(sources(12, 12, 12), ((-2, 14), (-2, 14), (-3, 15)))  # a box larger than the volume
    assert whole.tiled


# ----- networks that surround their input with a margin --------------------------------------------------------------


def deepmedic():
    """A shallow one, with a margin of 11 and a grid of 6, whose norms have seen something."""
    torch.manual_seed(0)
    net = partial(DeepMedic, widths=(2, 2, 3), hidden=(5,), factors=(2, 3), residual=(2,))
    model = SegmenterModule(net=net, modalities=("t1", "t2"), classes="abc", regions={"x": [1]})
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm3d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.eval().requires_grad_(False)


def two(*size):
    x = image(*size)
    return {"t1": x[:, :1], "t2": x[:, 1:]}


def test_deepmedic_in_tiles_is_deepmedic_in_one_pass(monkeypatch, recwarn):
    """The blocks of its pathways fall on the same voxels, and what surrounds a tile is what is really there."""
    model, inputs = deepmedic(), two(70, 20, 13)
    saw = []
    model.net.register_forward_pre_hook(lambda _, args: saw.append(tuple(args[0].shape[2:])))
    whole = WholeSegmenter(model)
    once = whole.segment(inputs)
    assert saw[-1] == (72 + 22, 24 + 22, 18 + 22)  # to the grid, and the margin
    fits = 70 * 46 * 40
    monkeypatch.setattr(inference, "free_bytes", lambda device: int(fits * whole._bytes_a_voxel))
    saw.clear()
    tiled = whole.segment(inputs)
    assert len(saw) > 1
    assert all(torch.Size(shape).numel() <= fits for shape in saw)
    assert not whole.tiled
    assert not recwarn
    torch.testing.assert_close(tiled.probabilities, once.probabilities, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(once.probabilities, model.segment(inputs).probabilities, rtol=1e-4, atol=1e-5)


def test_tiles_between_the_positions_of_its_grid_would_differ():
    """So that the test above can fail."""
    model, x = deepmedic(), image(70, 20, 13)

    def predict(part):
        return model.segment({"t1": part[:, :1], "t2": part[:, 1:]}).probabilities

    once = infer(predict, x)
    tiles = infer(predict, x, divisor=1, reach=model.reach, margin=model.margin, fits=70 * 42 * 35)
    assert (tiles - once).abs().max() > 1e-3


def test_the_margin_is_not_mistaken_for_the_network():
    """A pass never needs more than the estimate says, and not a fraction of it either."""
    model = deepmedic()
    whole = WholeSegmenter(model)
    whole.segment(two(6, 6, 6))
    model.to("meta")
    ratios = []
    for side in (6, 30, 60, 112):
        inputs = {name: torch.empty(1, 1, side, side, side, device="meta") for name in ("t1", "t2")}
        ratios.append(peak_bytes(lambda inputs=inputs: model.segment(inputs)) / (side + 22) ** 3 / whole._bytes_a_voxel)
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(1, abs=0.02)
    assert ratios[1] > 0.3


# ----- memory --------------------------------------------------------------------------------------------------------


def test_peak_counts_what_lives_at_one_time():
    x = torch.empty(1000, device="meta")

    def run():
        a = x + 1  # 4000 bytes
        b = a * 2  # 8000
        del a
        b.add_(1)  # in place
        c = b.view(10, 100) + 1  # 8000 again
        return c

    assert peak_bytes(run) == 8000


def test_a_group_may_be_allowed_less_than_the_machine_has(monkeypatch, tmp_path):
    files = {
        "/proc/meminfo": "MemTotal: 64000 kB\nMemAvailable: 32000 kB\n",
        "/proc/self/cgroup": "0::/job/step\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.stat": "anon 5\n",
    }

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert free_bytes(torch.device("cpu")) == int(0.6 * 32000 * 1024)
    files["/sys/fs/cgroup/job/memory.max"] = "10000000\n"
    files["/sys/fs/cgroup/job/memory.stat"] = "anon 4000000\nfile 123\n"
    assert free_bytes(torch.device("cpu")) == int(0.6 * 6_000_000)
    files["/sys/fs/cgroup/job/memory.stat"] = "anon 11000000\n"
    assert free_bytes(torch.device("cpu")) == 0
    del files["/proc/meminfo"]
    assert free_bytes(torch.device("cpu")) is None
