"""The filters of a synthetic cohort, each with stand-ins for the networks that let it reject or accept."""

import math

import pytest
import torch
from torch import Tensor

from mrgen.errors import UserError
from mrgen.papers.lesion_vaegan.cohort import Exhausted, LesionCohort, LesionGenerator, StructureModel
from mrgen.papers.lesion_vaegan.filters import Selection, agreement, filled_outside, outline_error
from mrgen.protocols import Generator, LabelMaps

SLICES = 16  # at once
N = 40  # pixels along each axis


def disc(radius: float) -> Tensor:
    x, y = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    return (x - 19.5) ** 2 + (y - 19.5) ** 2 <= radius**2


class Circles:
    """Draws the outlines of discs, one in ``every`` of them with a gap; MASK knows the discs."""

    def __init__(self, every: int = 0, radius: float = 14, real: float = 0.0):
        self.size, self.every, self.radius, self.real = (N, N), every, radius, real
        self.drawn = 0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        maps = []
        for spread in torch.rand(count, generator=generator).tolist():
            outline = disc(self.radius + 2 * spread) & ~disc(self.radius - 1.5 + 2 * spread)
            self.drawn += 1
            if self.every and self.drawn % self.every == 0:
                outline[16:24, 20:] = False
            maps.append(outline.float())
        return torch.stack(maps)[:, None]

    def mask(self, maps: Tensor) -> Tensor:
        return torch.stack([(~disc(float((f[0].sum(0) > 0).sum()) / 2 + 0.5)).float() for f in maps])[:, None]

    def realness(self, maps: Tensor) -> Tensor:
        return torch.full((len(maps),), self.real)


class Painter:
    """Two sequences of which the first shows the label a tenth as bright, also outside the brain."""

    modalities, scale = ("t1", "flair"), "unit"

    def synthesise(self, maps: Tensor, labels: Tensor) -> Tensor:
        image = 0.5 + labels / 10
        return torch.stack([image, maps[:, 0] * 0.5 + 0.25], dim=1)


class Finder:
    """Finds in all sequences the label that the first shows, but for every second slice nothing where it ``fails``."""

    def __init__(self, fails: bool = False):
        self.fails, self.seen, self.dice = fails, 0, []

    def __call__(self, images: Tensor) -> Tensor:
        found = ((images[:, :1] - 0.5) * 10).round().clamp(min=0).long().expand(-1, 2, -1, -1).clone()
        for k in range(len(found)):
            self.seen += 1
            if self.fails and self.seen % 2:
                found[k, 1] = 0
        return found


def labels(slices: int = 5, lesion: tuple[int, int] = (17, 22)) -> LabelMaps:
    """Slices of a donor, of which the first has no lesion and the second one voxel that nobody looks at."""
    label = torch.zeros(slices, N, N, dtype=torch.int64)
    label[2:, slice(*lesion), 18:22] = 1
    label[2:, 18, 18:20] = 4
    label[1:, 0, 0] = 255
    return LabelMaps(label, torch.zeros(slices, N, N, dtype=torch.bool), {})


def cohort(structure=None, finder=None, **selection) -> LesionCohort:
    return LesionCohort(
        structure or Circles(), Painter(), finder or Finder(), Selection(**{"realness": None, **selection})
    )


def only(made: LesionCohort, maps: LabelMaps | None = None, seed: int = 0):
    return next(iter(made.generate([maps or labels()], seed)))


# ----- Algorithm 3 ---------------------------------------------------------------------------------------------------


def test_a_closed_outline_is_filled_by_hand():
    """Of the blur a line of one pixel leaves itself and its neighbours, and a gap of one pixel is closed."""
    square = torch.zeros(1, 1, 11, 11)
    square[0, 0, [2, 8], 2:9] = square[0, 0, 2:9, [2, 8]] = 1
    expected = torch.ones(11, 11)
    expected[1:10, 1:10] = 0
    for corner in (expected[1:3, 1:3], expected[1:3, 8:10], expected[8:10, 1:3], expected[8:10, 8:10]):
        corner[:] = 1  # where one or two pixels of the line are near, and not three
    expected[[2, 2, 8, 8], [2, 8, 2, 8]] = 0
    torch.testing.assert_close(filled_outside(square)[0, 0], expected)
    square[0, 0, 5, 2] = 0
    assert not filled_outside(square)[0, 0, 3:8, 3:8].any()
    square[0, 0, 4:7, 2] = 0  # open: the inside is outside
    assert filled_outside(square)[0, 0, 4:7, 4:7].all()


def test_open_outlines_differ_from_the_mask():
    circles = Circles(every=2)
    maps = circles.draw(4, torch.Generator().manual_seed(0))
    errors = outline_error(maps, circles.mask(maps))
    assert (errors[::2] < 0.03).all()
    assert (errors[1::2] > 0.2).all()
    assert errors[0] == pytest.approx(float((filled_outside(maps[:1]) != circles.mask(maps[:1])).float().mean()))


def test_maps_with_open_outlines_are_drawn_again():
    made = only(cohort(Circles(every=2)))
    assert all(record["outline_error"] <= 0.048 for record in made.records)
    assert all(record["map"] % 2 == 0 for record in made.records)
    assert made.filters["maps_drawn"] > made.filters["maps_accepted"] >= 5
    assert made.filters["candidates"] == 5


def test_outlines_that_are_always_open_end_with_the_least_error():
    broken = Circles(every=1)
    with pytest.raises(
        UserError, match=r"Algorithm 3 accepts 0 of 2\d\d structure maps; their least outline error is 0"
    ):
        only(cohort(broken))
    assert 250 <= broken.drawn < 250 + SLICES  # 50 for each of 5 slices, and what is drawn at once is finished
    with pytest.raises(
        UserError, match=r"Algorithm 3 accepts 0 of 21 structure maps; .* a higher selection\.map_tries"
    ):
        only(cohort(Circles(every=1), map_tries=3))


def test_a_map_that_is_taken_for_real_passes_at_once():
    assert only(cohort(Circles(every=1, real=0.9), realness=0.85)).filters["maps_drawn"] == 5
    with pytest.raises(UserError, match="Algorithm 3"):
        only(cohort(Circles(every=1, real=0.8), realness=0.85))


# ----- labels --------------------------------------------------------------------------------------------------------


def test_lesions_lie_within_the_brain():
    """Large lesions do not fit at every try."""
    made = only(cohort(Circles(radius=9)), labels(12, lesion=(10, 24)))
    lesion = made.label > 0
    assert lesion.flatten(1).any(dim=1).all()
    assert not (lesion & ~made.brain).any()
    assert set(made.label.unique().tolist()) <= {0, 1, 4}
    assert made.filters["labels_drawn"] > made.filters["labels_accepted"] >= 12
    assert max(record["label_tries"] for record in made.records) > 1
    assert {record["lesion_of"] for record in made.records} <= set(range(2, 12))  # slices with a lesion
    assert all(len(record["operations"]) == 2 for record in made.records)


def test_labels_that_never_fit_say_so():
    said = r"labels fit 0 of 2\d\d generated brains, with selection\.label_tries=2 on each"
    with pytest.raises(Exhausted, match=said) as caught:
        only(cohort(Circles(radius=3), outline_error=0.1, label_tries=2), labels(lesion=(8, 32)))
    assert caught.value.filters["labels_drawn"] == 2 * caught.value.filters["maps_accepted"] > 0
    assert (caught.value.filters["candidates"], caught.value.filters["dice"]) == (0, 0)


def test_a_donor_without_lesion_is_refused():
    with pytest.raises(UserError, match="none of its slices has a lesion"):
        only(cohort(), labels(2))


# ----- segmentors ----------------------------------------------------------------------------------------------------


def test_agreement_is_the_mean_over_the_sequences():
    asked = torch.zeros(1, 2, 2, dtype=torch.int64)
    asked[0, 0, 0] = 2
    found = torch.stack([asked, torch.zeros_like(asked)], dim=1)  # right in the first, nothing in the second
    dice, mse = agreement(found, asked)
    assert float(dice) == pytest.approx(0.5, abs=1e-4)
    assert float(mse) == pytest.approx((0 + 4 / 4) / 2)


def test_slices_are_kept_where_the_segmentors_agree():
    """Every second one fails in one of two sequences: Dice 0.5, and none of them is kept."""
    made = only(cohort(finder=Finder(fails=True)))
    assert len(made.image) == 5
    assert all(record["dice"] > 0.99 and record["mse"] < 1e-6 for record in made.records)
    candidates = made.filters["candidates"]
    assert candidates >= 10
    assert made.filters["kept"] == candidates // 2
    failed = candidates - candidates // 2
    assert made.filters["dice"] == pytest.approx((failed * 0.5 + candidates // 2) / candidates, abs=1e-3)
    assert made.filters["mse"] > 0


def test_segmentors_that_disagree_end_with_the_best_dice():
    said = r"the segmentors agree with 0 of 21 slices, where 5 are wanted; the best Dice is 0\.5"  # 5, and 16 at once
    with pytest.raises(Exhausted, match=said) as caught:
        only(cohort(finder=lambda images: Finder()(images) * torch.tensor([1, 0]).view(1, 2, 1, 1), dice_tries=3))
    filters = caught.value.filters
    assert (filters["candidates"], filters["kept"]) == (21, 0)
    assert filters["dice"] == pytest.approx(0.5, abs=1e-3)


def test_bounds_on_the_tries_change_no_slice():
    """So that they can be raised for what is left of a cohort."""
    enough = only(cohort(Circles(every=2), Finder(fails=True)))
    maps, slices = (math.ceil(enough.filters[name] / 5) for name in ("maps_drawn", "candidates"))
    barely = only(cohort(Circles(every=2), Finder(fails=True), map_tries=maps, dice_tries=slices))
    assert barely.records == enough.records
    torch.testing.assert_close(barely.image, enough.image, rtol=0, atol=0)


def test_the_best_share_is_kept_whatever_its_dice():
    finder = Finder(fails=True)
    made = only(cohort(finder=finder, best=0.5))
    assert (finder.seen, made.filters["candidates"], made.filters["kept"]) == (10, 10, 5)
    assert all(record["dice"] > 0.99 for record in made.records)
    assert [record["candidate"] for record in made.records] == [1, 3, 5, 7, 9]
    assert made.filters["dice"] == pytest.approx(0.75, abs=1e-3)
    assert only(cohort(finder=lambda images: images.long() * 0, best=1.0)).filters["kept"] == 5  # none agrees


def test_what_is_no_number_is_not_judged(monkeypatch):
    monkeypatch.setattr(Painter, "synthesise", lambda *_: torch.full((5, 2, N, N), torch.nan))
    with pytest.raises(UserError, match="the generator made NaN or infinite voxels"):
        only(cohort())


# ----- what comes of it ----------------------------------------------------------------------------------------------


def test_a_subject_is_maps_labels_and_what_the_generator_makes_of_them():
    made = only(cohort())
    assert isinstance(cohort(), Generator)
    assert isinstance(Circles(), StructureModel)
    assert isinstance(Painter(), LesionGenerator)
    assert made.image.shape == (5, 2, N, N)
    assert made.label.shape == made.brain.shape == made.structure.shape == (5, N, N)
    assert (made.brain.dtype, made.structure.dtype, made.label.dtype) == (torch.bool, torch.bool, torch.int64)
    image = Painter().synthesise(made.structure[:, None].float(), made.label)
    torch.testing.assert_close(made.image, image * made.brain[:, None])
    mask = Circles().mask(made.structure[:, None].float())[:, 0] > 0
    torch.testing.assert_close(made.brain, ~mask)


def test_a_subject_depends_on_the_seed_and_its_number_alone():
    several = [*cohort().generate([labels(4), labels(3)], 7)]
    alone = only(cohort(), labels(4), seed=7)
    torch.testing.assert_close(several[0].image, alone.image, rtol=0, atol=0)
    assert several[0].records == alone.records
    changed = [*cohort().generate([labels(6), labels(3)], 7)]
    torch.testing.assert_close(several[1].label, changed[1].label, rtol=0, atol=0)
    assert not torch.equal(only(cohort(), labels(4), seed=8).label, alone.label)
    assert not torch.equal(several[1].label, several[0].label[:3])


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"outline_error": -0.1}, r"selection\.outline_error is -0\.1; expected a number from 0 to 1"),
        ({"dice": 95}, r"selection\.dice is 95; expected a number from 0 to 1"),
        ({"dice": None}, r"selection\.dice is None"),
        ({"best": 0}, r"selection\.best is 0; expected a number above 0 and up to 1, or null"),
        ({"best": 1.5}, r"selection\.best is 1\.5"),
        ({"realness": "high"}, r"selection\.realness is 'high'; expected a number such as 0\.85, or null"),
        ({"map_tries": 0}, r"selection\.map_tries is 0; expected a whole number from 1 on"),
        ({"label_tries": True}, r"selection\.label_tries is True"),
        ({"dice_tries": 2.5}, r"selection\.dice_tries is 2\.5"),
    ],
)
def test_settings_out_of_range_are_refused(selection, said):
    with pytest.raises(UserError, match=said):
        Selection(**selection)
