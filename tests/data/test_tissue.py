"""Tissue probabilities: against the anatomy that a phantom was grown from, scikit-learn's mixture, and by hand."""

import warnings

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

import mrgen.data.phantom.subject
from mrgen.data.alignment import mni_affine
from mrgen.data.layouts import Layout
from mrgen.data.phantom import grow_subject
from mrgen.data.store import write_cohort, write_subject
from mrgen.data.tissue import TISSUES, Tissue, TissueMaps
from mrgen.errors import UserError
from mrgen.launch.paths import CONF_DIR

LAYOUT = Layout.from_conf(CONF_DIR / "data" / "layout" / "brats2019.yaml")
CSF, GM, WM = range(3)


@pytest.fixture(scope="module")
def grown():
    """A head with a tumour at 4 mm, and the fractions of ``TISSUES`` that it was rendered from, (3, X, Y, Z)."""
    known = []
    with pytest.MonkeyPatch.context() as patch:
        render = mrgen.data.phantom.subject.render

        def seen(rng, sequence, values, scanner, anatomy, *rest, **named):
            known.append(anatomy)
            return render(rng, sequence, values, scanner, anatomy, *rest, **named)

        patch.setattr(mrgen.data.phantom.subject, "render", seen)
        head = grow_subject(seed=3, index=2, spacing=4, sequences=["t1"])
    return head, np.stack([known[0].csf, known[0].gm, known[0].wm])


@pytest.fixture(scope="module")
def write(grown, tmp_path_factory):
    """Writes the grown head, changed as asked, into a store of one sequence."""
    head, _ = grown

    def written(modality="t1", image=None, **changed):
        store = tmp_path_factory.mktemp("store")
        write_cohort(store, LAYOUT, [modality])
        image = head.images["t1"] if image is None else image
        given = {"brain": head.brain, "label": head.label, "affine": head.affine, **changed}
        return write_subject(store, id="A", image=np.rint(image)[None], **given)

    return written


@pytest.fixture(scope="module")
def subject(write):
    return write()


@pytest.fixture(scope="module")
def view(subject):
    return Tissue().on(subject)


@pytest.fixture(scope="module")
def alignment(subject):
    return mni_affine(subject)


@pytest.fixture
def aligned(alignment, monkeypatch):
    """The head's own alignment for all subjects that differ from it in intensities alone."""
    monkeypatch.setattr("mrgen.data.tissue.mni_affine", lambda _: alignment)


def whole(view):
    return view.crop([(0, n) for n in view.subject.shape])


def priors(view):
    """The maps where no intensity tells anything."""
    return whole(TissueMaps(view.subject, view.pull, view.modality, np.zeros(3), 1e9))


# ----- what comes out --------------------------------------------------------------------------------------------


def test_probabilities_in_the_brain_and_nothing_outside(view, grown):
    head, _ = grown
    maps = whole(view)
    assert (TISSUES, maps.shape, maps.dtype) == (("csf", "gm", "wm"), (3, *head.brain.shape), np.float32)
    assert maps.min() >= 0
    np.testing.assert_allclose(maps.sum(axis=0), head.brain, atol=1e-6)
    assert (maps[:, ~head.brain] == 0).all()
    assert ((maps > 0.05) & (maps < 0.95))[:, head.brain].mean() > 0.1  # probabilities, no masks


def test_the_maps_are_the_anatomy_of_the_subject_and_the_priors_less_so(view, grown):
    head, truth = grown
    healthy = head.brain & (head.label == 0)

    def alike(maps):  # correlation of each tissue, and Dice of where it is the likeliest
        likeliest, true = maps.argmax(axis=0)[healthy], truth.argmax(axis=0)[healthy]
        dice = [
            2 * ((likeliest == k) & (true == k)).sum() / ((likeliest == k).sum() + (true == k).sum()) for k in range(3)
        ]
        return np.array([[np.corrcoef(maps[k][healthy], truth[k][healthy])[0, 1] for k in range(3)], dice])

    refined, before = alike(whole(view)), alike(priors(view))
    assert (refined > [[0.9, 0.8, 0.85], [0.8, 0.8, 0.8]]).all()
    assert (refined > before + 0.08).all()


def test_pure_tissue_is_told_in_the_order_of_the_names(view, grown):
    head, truth = grown
    maps = whole(view)
    assert view.modality == "t1"
    assert view.means[CSF] < view.means[GM] < view.means[WM]
    for tissue in (CSF, GM, WM):
        pure = (truth[tissue] > 0.97) & (head.label == 0)
        assert pure.sum() > 20
        assert maps[tissue][pure].mean() > 0.85


def test_a_crop_is_cut_from_the_whole_and_0_beyond_the_volume(view):
    maps = whole(view)
    part = view.crop(((10, 30), (-2, 40), (8, 50)))
    expected = np.zeros_like(part)
    depth = maps.shape[-1] - 8
    expected[:, :, 2:, :depth] = maps[:, 10:30, :40, 8:50]
    np.testing.assert_allclose(part, expected, atol=1e-6)
    assert not view.crop(((900, 902), (0, 2), (0, 1))).any()


# ----- the mixture -----------------------------------------------------------------------------------------------


def test_posteriors_are_those_of_scikit_learns_mixture(tmp_path):
    """Far beyond the template the priors are the same everywhere: then this is an ordinary mixture."""
    write_cohort(tmp_path, LAYOUT, ["t1"])
    image = np.random.default_rng(0).integers(50, 150, (1, 4, 3, 5))
    subject = write_subject(tmp_path, id="A", image=image, brain=np.ones(image.shape[1:]), affine=np.eye(4))
    far = np.eye(4) + np.array([0, 0, 0, 1]) * 1e4 * np.array([[1], [1], [1], [0]])
    means, deviation = np.array([60.0, 100.0, 130.0]), 12.0
    maps = whole(TissueMaps(subject, far, "t1", means, deviation))

    mixture = GaussianMixture(3, covariance_type="tied")
    mixture.means_, mixture.weights_ = means[:, None], np.array([1.02, 0.02, 0.02]) / 1.06
    mixture.covariances_, mixture.precisions_cholesky_ = np.array([[deviation**2]]), np.array([[1 / deviation]])
    expected = mixture.predict_proba(image.reshape(-1, 1).astype(float))
    np.testing.assert_allclose(maps.reshape(3, -1).T, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("modality", "intensity"), [("t1", (300, 500, 650)), ("t2", (900, 600, 450)), ("flair", (380, 620, 500))]
)
def test_the_tissues_intensities_are_found_whatever_the_contrast(write, grown, aligned, modality, intensity):
    """Also without a T1: then the first sequence tells tissue."""
    head, truth = grown
    tissue = truth.argmax(axis=0)
    image = np.array(intensity)[tissue] + np.random.default_rng(0).normal(0, 20, tissue.shape)
    image[head.label > 0] = 2000
    view = Tissue().on(write(modality, image * head.brain))
    assert view.modality == modality
    np.testing.assert_allclose(view.means, intensity, atol=15)
    assert abs(view.deviation - 20) < 5
    healthy = head.brain & (head.label == 0)
    assert (whole(view).argmax(axis=0) == tissue)[healthy].mean() > 0.95


def test_bright_vessels_are_no_fluid(write, grown, view, aligned):
    """As after contrast: with a variance of its own the fluid would take them, and its mean would rise."""
    head, truth = grown
    vessels = (truth[CSF] > 0.3) & (np.random.default_rng(0).random(head.brain.shape) < 0.1)
    bright = Tissue().on(write(image=np.where(vessels, 1.5 * view.means[WM], head.images["t1"])))
    assert abs(bright.means[CSF] - view.means[CSF]) < 0.25 * (view.means[GM] - view.means[CSF])
    assert whole(bright)[CSF][vessels].mean() < 0.5 < whole(view)[CSF][vessels].mean()


# ----- lesions ---------------------------------------------------------------------------------------------------


def test_a_lesion_holds_the_priors_whatever_it_looks_like(write, grown, view, aligned):
    head, _ = grown
    lesion = head.label > 0
    np.testing.assert_array_equal(whole(view)[:, lesion], priors(view)[:, lesion])
    other = Tissue().on(write(image=np.where(lesion, 3, head.images["t1"]), label=np.where(lesion, 255, 0)))
    np.testing.assert_array_equal(whole(other)[:, lesion], whole(view)[:, lesion])
    np.testing.assert_allclose(other.means, view.means, rtol=0.02)  # and teaches nothing


def test_without_a_label_all_intensities_count(write, grown, view, aligned):
    head, _ = grown
    maps = whole(Tissue().on(write(label=None)))
    np.testing.assert_allclose(maps.sum(axis=0), head.brain, atol=1e-6)
    assert abs(maps - priors(view))[:, head.label > 0].mean() > 0.05


@pytest.mark.parametrize("change", [{"label": 1}, {"image": 7.0}])
def test_a_brain_that_is_all_lesion_or_of_one_intensity_has_maps_too(write, grown, aligned, change):
    head, _ = grown
    changed = {name: np.where(head.brain, value, 0) for name, value in change.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = whole(Tissue().on(write(**changed)))
    np.testing.assert_allclose(maps.sum(axis=0), head.brain, atol=1e-6)


# ----- once, and the same ----------------------------------------------------------------------------------------


def test_a_subject_is_fitted_once_and_the_same_bit_for_bit(subject, view, write, aligned, monkeypatch):
    tissue = Tissue()
    again = tissue.on(subject)
    assert whole(again).tobytes() == whole(view).tobytes()
    monkeypatch.setattr("mrgen.data.tissue.mni_affine", None)
    assert tissue.on(subject) is again
    with pytest.raises(TypeError):
        tissue.on(write())  # prepared anew


def test_what_cannot_be_aligned_is_named(write, grown):
    head, _ = grown
    with pytest.raises(UserError, match=r"A: its t1 could not be aligned.*found nothing in the brain mask"):
        Tissue().on(write(brain=np.zeros(head.brain.shape)))
