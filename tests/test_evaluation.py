"""The measures: against closed forms, brute force, torchmetrics and scipy.

Besides: bad input, copiers, and the classifiers that ship.
"""

import itertools
import json
import math
import urllib.error
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from common import QUICK, tiny_diffusion, tiny_dls
from PIL import Image
from sklearn.metrics.pairwise import polynomial_kernel
from torch import nn

from ddpm_course import cli
from ddpm_course import evaluation as ev
from ddpm_course import report as rp
from ddpm_course.cli import main
from ddpm_course.core import to_float
from ddpm_course.data import get_dls
from ddpm_course.denoiser import Denoiser, exact_denoiser, loss_floor, v_param
from ddpm_course.pretrained import write_pretrained
from ddpm_course.process import DDPM
from ddpm_course.training import Diffusion
from ddpm_course.unet import UNet_conditional


def normal(n, D=5, seed=0, dtype=torch.float64):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(n, C=1, size=8, seed=0):
    return torch.randint(
        0, 256, (n, C, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def flat(x):
    return x.flatten(1)


class Same(nn.Module):
    "Features that are what is fed in: torchmetrics wants a module."

    def __init__(self, D):
        super().__init__()
        self.num_features = D

    def forward(self, x):
        return x


# ---- extract
@pytest.mark.parametrize(
    "net", [ev.Classifier((3, 16, 16), 4), ev.RandomFeatures((3, 16, 16)), ev.pixel_features, flat]
)
def test_features_of_uint8_and_of_floats_are_the_same_however_they_are_cut(net):
    u8 = pixels(23, 3, 16)
    f = ev.extract(net, u8)
    assert f.dtype == torch.float64 and len(f) == 23 and f.std() > 0
    assert torch.equal(f, ev.extract(net, to_float(u8)))
    torch.testing.assert_close(f, ev.extract(net, u8, batch_size=4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_any_precision_are_read(dtype):
    x, net, judge = (
        to_float(pixels(9)),
        ev.RandomFeatures((1, 8, 8)),
        ev.Classifier((1, 8, 8), 3).eval(),
    )
    torch.testing.assert_close(ev.extract(net, x.to(dtype)), ev.extract(net, x.to(dtype).float()))
    assert torch.equal(ev.predict(judge, x.to(dtype)), ev.predict(judge, x.to(dtype).float()))
    d, i = ev.nearest_neighbours(x.to(dtype), pixels(9))  # one of them as pixels
    assert i[:, 0].tolist() == list(range(9)) and d.max() < 0.1
    torch.testing.assert_close(
        ev.extract(net.to(torch.bfloat16), pixels(9)),
        ev.extract(ev.RandomFeatures((1, 8, 8)), pixels(9)),
        rtol=0.1,
        atol=0.1,
    )  # its own precision


RANGES = dict(
    zero_to_one=(lambda u8: u8 / 255, "from 0 to 1,"),
    zero_to_255=(lambda u8: u8.float(), "from 0 to 255,"),
    standardised=(lambda u8: (u8 / 255 - 0.13) / 0.31, "from -0.419 to 2.81,"),
)


@pytest.mark.parametrize("what", RANGES)
def test_floats_of_another_range_come_with_a_warning_wherever_images_are_compared(what):
    make, words = RANGES[what]
    u8 = pixels(200)
    for call in (
        lambda x: ev.fid(x, u8, ev.pixel_features),
        lambda x: ev.memorisation(x, u8[:100], u8[100:]),
    ):
        with pytest.warns(UserWarning, match=words):
            call(make(u8))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(u8)
            call(to_float(u8))
            call(
                to_float(u8)
                + 0.1 * torch.randn(u8.shape, generator=torch.Generator().manual_seed(0))
            )


def test_a_classifier_its_method_and_a_module_in_training_mode_give_the_same_features():
    net = ev.Classifier((1, 8, 8), 3)
    with torch.no_grad():
        for _ in range(3):
            net(to_float(pixels(50)))  # batch norm has seen something
    f = ev.extract(net.features, pixels(9))
    assert net.training and torch.equal(f, ev.extract(net, pixels(9)))
    assert torch.equal(f, ev.extract(net.eval(), pixels(9))) and not net.training
    with torch.no_grad():
        torch.testing.assert_close(f, net.features(to_float(pixels(9))).double())


def test_the_mode_is_restored_after_an_error():
    net = ev.RandomFeatures((1, 8, 8)).train()
    net.layers[0].weight[:] = math.nan
    with pytest.raises(ValueError):
        ev.extract(net, pixels(3))
    assert net.training


def test_random_features_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = ev.RandomFeatures((1, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b = ev.RandomFeatures((1, 8, 8))
    assert torch.equal(ev.extract(a, pixels(5)), ev.extract(b, pixels(5)))
    assert not torch.equal(
        ev.extract(a, pixels(5)), ev.extract(ev.RandomFeatures((1, 8, 8), seed=1), pixels(5))
    )
    assert ev.extract(ev.RandomFeatures((1, 8, 8), dim=7), pixels(5)).shape == (5, 7)


def test_pixel_features_are_the_image_made_small():
    x = torch.arange(4.0).reshape(1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert ev.pixel_features(x, 2).tolist() == [[0, 1, 2, 3]] and torch.equal(
        ev.pixel_features(x), x.flatten(1)
    )


def nans(x):
    f = x.flatten(1).clone()
    f[[1, 4], 3] = math.nan
    f[6, 2] = math.inf
    return f


BAD_FEATURES = dict(
    nan=(lambda: ev.fid(pixels(20), pixels(20), nans), "3 of 20 feature vectors hold NaN"),
    nan_in_a_set=(lambda: ev.fid(nans(normal(20)), normal(20)), "3 of 20 feature vectors hold NaN"),
    maps=(
        lambda: ev.fid(pixels(20), pixels(20), lambda x: x),
        "one vector per image, (N,D), not (20, 1, 8, 8)",
    ),
    numbers=(lambda: ev.fid(torch.zeros(5), torch.zeros(5)), "(N,D), not (5,)"),
    colour=(
        lambda: ev.fid(pixels(20, 3), pixels(20, 3), ev.Classifier((1, 8, 8), 3).features),
        "made for 1 channel, the images have 3",
    ),
    grey=(
        lambda: ev.extract(ev.RandomFeatures((3, 8, 8)), pixels(20)),
        "made for 3 channels, the images have 1",
    ),
    one_of_each=(
        lambda: ev.fid(pixels(20), pixels(20, 3), flat),
        "features of 64 and of 192 numbers",
    ),
    size=(
        lambda: ev.extract(ev.RandomFeatures((1, 8, 8)), pixels(20, size=16)),
        "made for images of shape (1, 8, 8), not (1, 16, 16)",
    ),
    no_features=(
        lambda: ev.kid(pixels(20), pixels(20)),
        "pass features=, such as classifier.features",
    ),
    one_image=(
        lambda: ev.fid(pixels(1), pixels(20), flat),
        "at least 2 samples",
        "64 features",
        "has 1",
    ),
    one_image_kid=(
        lambda: ev.kid(pixels(1), pixels(20), flat),
        "sets of 1 and 20",
        "fewer subsets",
    ),
    parts=(lambda: ev.kid(normal(100), normal(100), subsets=3, size=40), "3 parts of 40"),
    one_image_precision=(
        lambda: ev.precision_recall(pixels(1), pixels(20), flat),
        "neighbour number 3 takes at least 4 samples, not 1",
    ),
    one_image_coverage=(
        lambda: ev.density_coverage(pixels(20), pixels(1), flat),
        "neighbour number 5 takes at least 6 samples, not 1",
    ),
    nothing=(lambda: ev.density_coverage(normal(0), normal(20)), "one of the sets is empty"),
    no_parts=(lambda: ev.kid(normal(20), normal(20), subsets=0), "at least 1, not 0"),
    no_neighbour=(
        lambda: ev.precision_recall(normal(20), normal(20), k=0),
        "k is at least 1, not 0",
    ),
    neighbours=(lambda: ev.nearest_neighbours(normal(5), normal(3), k=4), "3 candidates", "not 4"),
    shapes=(lambda: ev.nearest_neighbours(pixels(5), pixels(5, 3)), "(1, 8, 8) and (3, 8, 8)"),
    nobody=(lambda: ev.memorisation(normal(0), normal(20), normal(20)), "the first set is empty"),
    nan_generated=(
        lambda: ev.memorisation(nans(normal(20)), normal(20), normal(20)),
        "3 of 20 members of a set hold NaN",
    ),
    nan_heldout=(
        lambda: ev.memorisation(normal(20), normal(20), nans(normal(20))),
        "3 of 20 members of a set hold NaN",
    ),
    nan_read=(
        lambda: ev.predict(ev.Classifier((1, 8, 8), 3).eval(), torch.full((4, 1, 8, 8), torch.nan)),
        "4 of 4 images hold NaN",
    ),
    column_of_labels=(
        lambda: ev.label_accuracy(ev.Classifier((1, 8, 8), 3).eval(), pixels(4), torch.zeros(4, 1)),
        "4 images need 4 labels in one dimension, not (4, 1)",
    ),
    labels_between=(
        lambda: ev.label_accuracy(ev.Classifier((1, 8, 8), 3), pixels(2), [1.5, 2.5]),
        "labels are whole numbers",
    ),
    labels_beyond=(
        lambda: ev.label_accuracy(ev.Classifier((1, 8, 8), 3), pixels(2), [0, 77]),
        "3 classes go from 0 to 2",
        "77",
    ),
    labels_below=(
        lambda: ev.label_accuracy(ev.Classifier((1, 8, 8), 3), pixels(2), [0, -1]),
        "labels start at 0",
    ),
    labels_report=(
        lambda: rp.report(
            pixels(9),
            torch.full((9,), 3),
            pixels(9),
            ev.Classifier((1, 8, 8), 3),
            features=ev.pixel_features,
        ),
        "3 classes go from 0 to 2",
    ),
    nothing_read=(
        lambda: ev.label_accuracy(ev.Classifier((1, 8, 8), 3), pixels(0), []),
        "no images to read",
    ),
    one_image_loss=(
        lambda: ev.loss_per_level(tiny_diffusion().model, pixels(1)),
        "at least 2 images, not 1",
    ),
    no_chunk=(
        lambda: ev.nearest_neighbours(pixels(5), pixels(5), chunk=0),
        "chunk is a whole number of at least 1, not 0",
    ),
    no_batch_loss=(
        lambda: ev.loss_per_level(tiny_diffusion().model, pixels(4), batch_size=0),
        "batch_size is a whole number of at least 1, not 0",
    ),
    no_batch_read=(
        lambda: ev.predict(ev.Classifier((1, 8, 8), 3), pixels(4), batch_size=0),
        "batch_size is a whole number",
    ),
    no_batch=(lambda: ev.extract(flat, pixels(4), batch_size=0), "batch_size is a whole number"),
    labels_loss=(
        lambda: ev.loss_per_level(tiny_diffusion().model, pixels(4), [0, 1]),
        "2 labels for 4 images",
    ),
    time_0=(
        lambda: ev.loss_per_level(tiny_diffusion().model, pixels(4), ts=[0, 50]),
        "above 0 and up to 100",
        "0 to 50",
    ),
    time_101=(
        lambda: ev.loss_per_level(tiny_diffusion().model, pixels(4), ts=[101]),
        "above 0 and up to 100",
    ),
    small_report=(
        lambda: rp.report(pixels(5), None, pixels(20), features=flat),
        "6 images and 6 real ones",
        "not 5 and 20",
    ),
    small_reference=(lambda: rp.report(pixels(20), None, pixels(5), features=flat), "not 20 and 5"),
)


@pytest.mark.parametrize("what", BAD_FEATURES)
def test_bad_input_is_one_sentence(what):
    call, *words = BAD_FEATURES[what]
    with pytest.raises(ValueError) as e:
        call()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), e.value


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda x: x.numpy(), "not ndarray: pass torch.as_tensor"),
        (lambda x: x.double().numpy(), "not ndarray"),
        (lambda x: x > 127, "not True and False: pass 2.0"),
    ],
)
def test_arrays_and_bools_are_one_sentence_wherever_images_are_compared(make, words):
    net, u8 = ev.Classifier((1, 8, 8), 3).eval(), pixels(100)
    x = make(u8)
    for call in (
        lambda: ev.fid(x, u8, flat),
        lambda: ev.kid(u8, x, flat),
        lambda: ev.fid(flat(u8), make(flat(u8))),
        lambda: ev.extract(flat, x),
        lambda: ev.predict(net, x),
        lambda: ev.label_accuracy(net, x, [0] * 100),
        lambda: ev.nearest_neighbours(u8, x),
        lambda: ev.memorisation(x, u8, u8),
        lambda: ev.loss_per_level(tiny_diffusion().model, x),
        lambda: rp.report(x, None, u8, features=flat),
    ):
        with pytest.raises(TypeError, match=words):
            call()


# ---- Frechet
# of two sets with independent features, from their means and standard deviations
def closed_form(a, b):
    return ((a.mean(0) - b.mean(0)) ** 2 + (a.std(0) - b.std(0)) ** 2).sum().item()


@pytest.mark.parametrize("n, m", [(2, 2), (50, 50), (50, 300), (300, 50)])
def test_frechet_of_one_feature_is_the_closed_form(n, m):
    a, b = 3 * normal(n, 1), 1 + normal(m, 1, seed=1)
    assert ev.frechet_distance(a, b) == pytest.approx(closed_form(a, b), rel=1e-12)


def test_frechet_of_a_stretched_and_shifted_set():
    a = normal(100, 6)
    shift, rotation = torch.arange(6.0).double(), torch.linalg.qr(normal(6, 6, seed=1)).Q
    assert ev.frechet_distance(a, a + shift) == pytest.approx((shift**2).sum().item(), rel=1e-12)
    assert ev.frechet_distance(a, 2 * a) == pytest.approx(
        a.mean(0).pow(2).sum().item() + a.var(0).sum().item(), rel=1e-12
    )
    assert ev.frechet_distance(a @ rotation, 2 * a @ rotation) == pytest.approx(
        ev.frechet_distance(a, 2 * a), rel=1e-12
    )


@pytest.mark.parametrize("n, D", [(500, 20), (60, 50), (20, 50), (2, 300)])
def test_frechet_of_identical_sets_is_zero_within_rounding_and_it_is_symmetric(n, D):
    a, b = 100 * normal(n, D) + 7, 30 * normal(n, D, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 0 <= ev.frechet_distance(a, a) < 1e-13 * a.pow(2).sum().item()
        assert 0 <= ev.frechet_distance(a, a[torch.randperm(n)]) < 1e-12 * a.pow(2).sum().item()
        assert ev.frechet_distance(a, b) == pytest.approx(ev.frechet_distance(b, a), rel=1e-12)


def test_frechet_agrees_with_scipys_matrix_square_root():
    from scipy.linalg import sqrtm

    a, b = normal(400, 12) @ normal(12, 12, seed=3), normal(300, 12, seed=1) + 0.3
    Ca, Cb = torch.cov(a.T), torch.cov(b.T)
    want = (
        (a.mean(0) - b.mean(0)).pow(2).sum().item()
        + (Ca + Cb).trace().item()
        - 2 * sqrtm((Ca @ Cb).numpy()).trace().real
    )
    assert ev.frechet_distance(a, b) == pytest.approx(want, rel=1e-9)


def test_fewer_samples_than_features_are_right_and_come_with_a_warning():
    a, b = normal(20, 50), normal(30, 50, seed=1) + 1
    with pytest.warns(UserWarning, match="20 samples for 50 features.*kid"):
        d = ev.frechet_distance(a, b)
    # both sets lie in a space of fewer dimensions, where nothing changes
    Q = torch.linalg.qr(torch.cat([a, b]).T).Q
    Ca, Cb = torch.cov((a @ Q).T), torch.cov((b @ Q).T)
    eig = torch.linalg.eigvals(Ca @ Cb).real.clamp(min=0).sqrt().sum()
    assert d == pytest.approx(
        ((a - 0).mean(0) - b.mean(0)).pow(2).sum().item()
        + (Ca.trace() + Cb.trace() - 2 * eig).item(),
        rel=1e-6,
    )


def test_enough_samples_come_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ev.frechet_distance(normal(51, 50), normal(51, 50, seed=1))


def test_more_samples_bring_the_frechet_distance_of_equal_sources_down_as_one_over_n():
    d = [
        sum(
            ev.frechet_distance(normal(n, 8, seed=s), normal(n, 8, seed=100 + s)) for s in range(40)
        )
        / 40
        for n in (100, 400)
    ]
    assert 3.5 < d[0] / d[1] < 4.5


# ---- kernel
def test_mmd_is_the_sum_over_pairs():
    x, y = normal(7), normal(9, seed=1) + 0.5

    def k(a, b):
        return (torch.dot(a, b).item() / 5 + 1) ** 3

    xx = sum(k(a, b) for a, b in itertools.permutations(x, 2)) / (7 * 6)
    yy = sum(k(a, b) for a, b in itertools.permutations(y, 2)) / (9 * 8)
    xy = sum(k(a, b) for a, b in itertools.product(x, y)) / 63
    assert ev.mmd(x, y).item() == pytest.approx(xx + yy - 2 * xy, rel=1e-12)
    # scikit-learn's kernel is the same: gamma 1 / D, constant 1
    K = polynomial_kernel(x, y, degree=3)
    assert xy == pytest.approx(K.mean(), rel=1e-12)


def test_kid_is_unbiased_and_its_error_is_the_spread():
    same = torch.tensor(
        [
            ev.kernel_distance(normal(60, seed=s), normal(60, seed=1000 + s), subsets=5)
            for s in range(300)
        ]
    )
    # 0 on average, at 12 images per part
    assert abs(same[:, 0].mean()) < 4 * same[:, 0].std() / 300**0.5
    other = torch.tensor(
        [
            ev.kernel_distance(normal(60, seed=s) + 1, normal(60, seed=1000 + s), subsets=5)
            for s in range(300)
        ]
    )
    for d in (same, other):
        assert 0.8 < d[:, 1].pow(2).mean().sqrt() / d[:, 0].std() < 1.25
    assert other[:, 0].mean() > 10 * other[:, 0].std() / 300**0.5


def test_kid_uses_the_whole_sets_whatever_their_sizes_and_its_seed_decides_the_parts():
    a, b = normal(40), normal(70, seed=1)
    assert ev.kernel_distance(a, b, subsets=1)[0] == pytest.approx(ev.mmd(a, b).item(), rel=1e-10)
    assert math.isnan(ev.kernel_distance(a, b, subsets=1)[1])
    assert ev.kernel_distance(a, b) == ev.kernel_distance(a, b) != ev.kernel_distance(a, b, seed=1)
    assert ev.kid(pixels(40), pixels(70, seed=1), ev.pixel_features) == ev.kernel_distance(
        *(ev.extract(ev.pixel_features, x) for x in (pixels(40), pixels(70, seed=1)))
    )


def test_the_kernel_distance_of_a_set_and_itself_and_of_sets_with_equal_classes_is_below_zero():
    a = normal(40)
    assert ev.kernel_distance(a, a, subsets=1)[0] < 0
    centres = 3 * torch.eye(5).double()

    def drawn(n, seed, equal):
        k = (
            torch.arange(n) % 5
            if equal
            else torch.randint(5, (n,), generator=torch.Generator().manual_seed(seed))
        )
        return centres[k] + 0.1 * normal(n, seed=seed)

    for equal in (False, True):
        d = torch.tensor(
            [
                ev.kernel_distance(drawn(50, s, equal), drawn(50, 1000 + s, False), subsets=1)[0]
                for s in range(300)
            ]
        )
        z = (d.mean() / d.std() * 300**0.5).item()
        assert z < -5 if equal else abs(z) < 4, (equal, z)


def test_parts_of_a_given_size_are_disjoint():
    a = torch.arange(30.0).double()[:, None]
    seen = []
    real = ev.mmd
    ev.mmd = lambda x, y: seen.append(x[:, 0].tolist()) or real(x, y)
    try:
        ev.kernel_distance(a, a, subsets=3, size=4)
    finally:
        ev.mmd = real
    assert [len(s) for s in seen] == [4, 4, 4] and len({v for s in seen for v in s}) == 12


# ---- torchmetrics
@pytest.mark.filterwarnings("ignore:Metric")
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1.3, 0.4)])
def test_fid_and_kid_agree_with_torchmetrics(scale, shift):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    net = ev.RandomFeatures((1, 16, 16), dim=24)
    real, fake = (ev.extract(net, pixels(300, size=16, seed=s)).float() * 5 for s in (0, 1))
    fake = scale * fake + shift
    theirs = FrechetInceptionDistance(feature=Same(24))
    for x, is_real in ((real, True), (fake, False)):
        theirs.update(x, real=is_real)
    assert ev.fid(fake, real) == pytest.approx(theirs.compute().item(), rel=1e-4, abs=1e-4)
    theirs = KernelInceptionDistance(feature=Same(24), subsets=1, subset_size=300)
    for x, is_real in ((real, True), (fake, False)):
        theirs.update(x, real=is_real)
    assert ev.kid(fake, real, subsets=1)[0] == pytest.approx(
        theirs.compute()[0].item(), rel=1e-4, abs=1e-4
    )


# ---- balls
def brute(a, b, k_pr=3, k_dc=5):  # the definitions, one pair at a time
    d = lambda x, y: math.dist(x.tolist(), y.tolist())

    def ball(s, k):
        return [sorted(d(x, y) for j, y in enumerate(s) if j != i)[k - 1] for i, x in enumerate(s)]

    ra, rb, rd = ball(a, k_pr), ball(b, k_pr), ball(b, k_dc)
    precision = sum(any(d(x, y) <= r for y, r in zip(b, rb)) for x in a) / len(a)
    recall = sum(any(d(x, y) <= r for y, r in zip(a, ra)) for x in b) / len(b)
    inside = [[d(x, y) < r for y, r in zip(b, rd)] for x in a]
    return (
        precision,
        recall,
        sum(map(sum, inside)) / (k_dc * len(a)),
        sum(map(any, zip(*inside))) / len(b),
    )


@pytest.mark.parametrize(
    "n, m, D, shift", [(40, 40, 2, 0.0), (30, 50, 2, 1.0), (50, 30, 6, 0.5), (25, 25, 1, 100.0)]
)
def test_precision_recall_density_and_coverage_are_what_a_loop_over_pairs_gives(n, m, D, shift):
    a, b = normal(n, D) + shift, normal(m, D, seed=1)
    pr, dc = ev.precision_recall(a, b), ev.density_coverage(a, b)
    assert (pr["precision"], pr["recall"], dc["density"], dc["coverage"]) == pytest.approx(
        brute(a, b), abs=1e-12
    )
    p, r = pr["precision"], pr["recall"]
    assert pr["f1"] == (2 * p * r / (p + r) if p + r else 0)


def test_they_do_not_depend_on_how_many_are_compared_at_once():
    a, b = normal(1700, 3), normal(2300, 3, seed=1)
    d = torch.cdist(a, b)
    ra, rb, rd = (torch.cdist(s, s).kthvalue(k + 1).values for s, k in ((a, 3), (b, 3), (b, 5)))
    assert ev.precision_recall(a, b)["precision"] == (d <= rb).any(1).double().mean().item()
    assert ev.precision_recall(a, b)["recall"] == (d.T <= ra).any(1).double().mean().item()
    dc = ev.density_coverage(a, b)
    assert dc == dict(
        density=pytest.approx((d < rd).sum().item() / (5 * 1700)),
        coverage=(d < rd).any(0).double().mean().item(),
    )


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-3, 1e3), (1e6, 0.0)])
def test_identical_sets(scale, offset):
    a = scale * normal(60, 4) + offset
    assert ev.precision_recall(a, a) == dict(precision=1, recall=1, f1=1)
    assert ev.density_coverage(a, a) == dict(density=1, coverage=1)


def test_identical_sets_in_which_every_point_comes_six_times():
    a = normal(30).repeat(6, 1)  # the fifth neighbour is at distance 0
    assert (
        ev.density_coverage(a, a) == dict(density=6 / 5, coverage=1)
        and ev.precision_recall(a, a)["f1"] == 1
    )
    assert ev.density_coverage(a[:15], a) == dict(density=6 / 5, coverage=0.5)


def test_a_set_far_away_and_ten_copies_of_ten():
    a = normal(100)
    assert ev.precision_recall(a + 100, a) == dict(precision=0, recall=0, f1=0)
    assert ev.density_coverage(a + 100, a) == dict(density=0, coverage=0)
    copies = a[:10].repeat(10, 1)
    assert ev.precision_recall(copies, a) == dict(
        precision=1, recall=0.1, f1=pytest.approx(0.2 / 1.1)
    )  # a ball around copies is a point


@pytest.mark.parametrize("k", [3, 5])
def test_the_same_source_has_density_one_and_the_coverage_of_the_paper(k):
    M = N = 200
    dc = [
        ev.density_coverage(normal(M, 3, seed=s), normal(N, 3, seed=500 + s), k=k)
        for s in range(30)
    ]
    want = 1 - math.prod((N - i) / (M + N - i) for i in range(1, k + 1))  # Naeem et al. 2020, eq. 9
    assert sum(d["density"] for d in dc) / 30 == pytest.approx(1, abs=0.03)
    assert sum(d["coverage"] for d in dc) / 30 == pytest.approx(
        want, abs=0.01
    ) and want == pytest.approx(1 - 2**-k, abs=0.005)


def test_dropped_modes_cost_recall_and_rubbish_costs_precision():
    centres = 50 * torch.eye(4, 2).double() + 50 * torch.tensor([[0, 0], [0, 0], [1, 1], [2, 0]])
    real, fake = (normal(400, 2, seed=s) + centres.repeat(100, 1) for s in (0, 1))
    dropped, rubbish = fake[torch.arange(400) % 4 != 0], torch.cat(
        [fake[:300], normal(100, 2, seed=2) - 200]
    )
    assert (
        0.70
        < ev.precision_recall(dropped, real)["recall"]
        < 0.76
        < 0.93
        < ev.precision_recall(dropped, real)["precision"]
    )
    assert 0.70 < ev.precision_recall(rubbish, real)["precision"] < 0.76


def test_distances():
    a, b = normal(5), normal(6, seed=1)
    torch.testing.assert_close(
        ev.distances(a + 1e4, b + 1e4),
        torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"),
        rtol=1e-7,
        atol=1e-7,
    )
    assert (ev.distances(a + 1e4, a + 1e4).diagonal() == 0).all()


# ---- neighbours
@pytest.mark.parametrize("k", [1, 3, 20])
def test_nearest_neighbours_are_exact(k):
    a, b = normal(70, 9, dtype=torch.float32), normal(20, 9, seed=1, dtype=torch.float32)
    d, i = ev.nearest_neighbours(a, b, k, chunk=16)
    want, order = (a[:, None] - b).norm(dim=2).sort(1)
    assert torch.equal(i, order[:, :k])
    torch.testing.assert_close(d, want[:, :k])


def test_a_copy_is_at_distance_zero_even_among_thousands_of_large_images():
    b = pixels(3000, 3, 16)
    d, i = ev.nearest_neighbours(b[[7, 2999]], b)
    assert d.tolist() == [[0], [0]] and i.tolist() == [[7], [2999]]
    assert torch.equal(
        ev.nearest_neighbours(to_float(b[:2]), b[5:])[0],
        ev.nearest_neighbours(b[:2], to_float(b[5:]))[0],
    )


def test_near_copies_do_not_hide_the_copy():
    b = normal(400, 500, dtype=torch.float32)
    # the fast distances cannot tell these five apart
    near = b[:1] + 1e-5 * normal(4, 500, seed=1, dtype=torch.float32)
    for i in range(4):
        d, j = ev.nearest_neighbours(near, torch.cat([b, near.roll(i, 0)]))
        assert d.tolist() == [[0]] * 4 and j[:, 0].tolist() == [400 + (m + i) % 4 for m in range(4)]


def drawn(n, seed):
    return to_float(get_dls("shapes", img_size=16, sizes=(n, 2, 2), seed=seed).train.images)


def test_fresh_images_pass_and_z_is_a_z():
    z = []
    for s in range(60):
        T, H, G = (normal(100, 3, seed=1000 * j + s) for j in range(1, 4))
        z.append([(m := ev.memorisation(G, T, H))["z"], m["copies_z"]])
    z = torch.tensor(z)
    assert (
        (z.mean(0).abs() < 0.5).all()
        and (0.75 < z.std(0)).all()
        and (z.std(0) < 1.3).all()
        and z.abs().max() < 4
    )
    assert (
        abs(m["copies"] - m["copies_heldout"]) < 0.1
        and 0 < m["copies"] + m["copies_heldout"] < 0.15
    )  # about (1/3)**3 by chance


def test_unequal_sets_have_another_expectation():
    z = torch.tensor(
        [
            (
                m := ev.memorisation(
                    *(normal(n, 3, seed=1000 * j + s) for j, n in enumerate((150, 300, 60)))
                )
            )["z"]
            for s in range(60)
        ]
    )
    assert m["expected"] == 300 / 360 and abs(z.mean()) < 0.5 and 0.75 < z.std() < 1.25


COPIERS = dict(
    all=lambda T, fresh: T,
    noisy=lambda T, fresh: T
    + 0.1 * torch.randn(T.shape, generator=torch.Generator().manual_seed(9)),
    ten_images=lambda T, fresh: T[:10].repeat(60, 1, 1, 1),
    one_in_four=lambda T, fresh: torch.cat([T[:150], fresh[:450]]),
    one_in_twenty=lambda T, fresh: torch.cat([T[:30], fresh[:570]]),
)


@pytest.mark.filterwarnings("ignore:images as floats")  # bell-shaped numbers stand for images
@pytest.mark.parametrize("kind", COPIERS)
def test_a_copier_is_caught(kind):
    T, H, fresh = (
        normal(600, 40, seed=s, dtype=torch.float32).reshape(600, 1, 5, 8) for s in (1, 2, 3)
    )
    m = ev.memorisation(COPIERS[kind](T, fresh), T, H)
    share = dict(one_in_four=1 / 4, one_in_twenty=1 / 20).get(kind, 1)
    assert m["copies"] == pytest.approx(share) and m["copies_heldout"] == 0 and m["copies_z"] > 3
    # too few to move the whole
    assert share < 0.1 or (m["closer"] > 0.5 + 0.4 * share and m["z"] > 3)
    fair = ev.memorisation(fresh, T, H)
    assert abs(fair["z"]) < 3 and fair["copies"] == fair["copies_heldout"] == 0


def test_ten_fresh_images_again_and_again_are_no_copies_however_many():
    T, H, fresh = (normal(200, 40, seed=s) for s in (1, 2, 3))
    z = torch.tensor(
        [ev.memorisation(fresh[10 * i : 10 * i + 10].repeat(10, 1), T, H)["z"] for i in range(20)]
    )
    # counting each of 100 as a witness would make z three times as wide
    assert z.abs().max() < 3.3 and 0.5 < z.std() < 1.5


@pytest.mark.parametrize("nearest", [[0, 1, 2], [0, 0, 0, 3, 5], [4] * 7, [0, 1, 2, 3, 4, 5, 5]])
def test_the_standard_error_is_that_of_dealing_the_labels_anew(nearest):
    shares = [
        sum(i in trained for i in nearest) / len(nearest)
        for trained in itertools.combinations(range(6), 2)
    ]  # 2 of 6 were trained on
    share, error, z = ev.closer_share(torch.tensor(nearest), 2, 4)
    assert share == shares[0] and sum(shares) / 15 == pytest.approx(1 / 3)
    assert error == pytest.approx(
        math.sqrt(sum((s - 1 / 3) ** 2 for s in shares) / 15)
    ) and z == pytest.approx((share - 1 / 3) / error)


def test_nobody_to_count_is_no_evidence():
    assert ev.closer_share(torch.tensor([], dtype=torch.long), 3, 1) == (0.75, 0, 0)


def test_memorisation_in_a_feature_space():
    T, H = drawn(100, 0), drawn(100, 1)
    m = ev.memorisation(T[:50], T, H, features=ev.pixel_features)
    assert m["closer"] == m["copies"] == 1 and m["train"] == 0 and m["heldout"] > 0


# ---- loss per level
def test_loss_per_level_is_the_denoisers_loss_and_meets_the_floor():
    x0s, process = normal(6, 3, dtype=torch.float32), DDPM(100)
    exact = exact_denoiser(process, x0s)

    class Net(nn.Module):  # v of the exact denoiser
        def forward(self, x, clock, cond=None):
            t = clock * 100 / 1000
            a, s = process.coeffs(t, x)
            return (a * x - exact(x, t)) / s

    ts = torch.tensor([10.0, 50.0, 90.0])
    assert torch.allclose(process.clock(ts), ts * 10)
    got = ev.loss_per_level(Denoiser(Net(), process, v_param), x0s.repeat(300, 1), ts=ts)
    floor, error = loss_floor(
        process,
        v_param,
        x0s,
        ts,
        n=2000,
        with_error=True,
        generator=torch.Generator().manual_seed(0),
    )
    z = (got["loss"] - floor) / (got["error"] ** 2 + error**2).sqrt()
    assert z.abs().max() < 4 and (got["error"] > 0).all()


def test_loss_per_level_takes_labels_restores_the_mode_and_does_not_depend_on_batches():
    diff = tiny_diffusion()
    images, y = pixels(20), torch.arange(20) % 3
    with torch.no_grad():
        for p in diff.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    one = ev.loss_per_level(diff.model.train(), images, y, ts=[20, 60])
    assert diff.model.training and one["t"].tolist() == [20, 60]
    two = ev.loss_per_level(diff.model, to_float(images), y, ts=[20, 60], batch_size=7)
    torch.testing.assert_close(one["loss"], two["loss"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(
        one["loss"], ev.loss_per_level(diff.model, images, 2 - y, ts=[20, 60])["loss"], rtol=1e-4
    )
    x, eps = to_float(images), torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = diff.model.eval().loss(x, y, torch.tensor(60), eps).double()
    assert one["loss"][1] == pytest.approx(want.mean().item(), rel=1e-5) and one["error"][
        1
    ] == pytest.approx((want.std() / 20**0.5).item(), rel=1e-5)
    assert ev.loss_per_level(diff.model, images, y)["t"].tolist() == [
        10.0 * i for i in range(1, 11)
    ]


# ---- Inception
@pytest.fixture
def untrained(monkeypatch):
    import torchvision.models as models

    real = models.inception_v3
    torch.manual_seed(0)
    monkeypatch.setattr(
        models,
        "inception_v3",
        lambda weights: real(weights=None, init_weights=False, transform_input=True),
    )


def test_inception_gives_2048_features_of_any_size_and_of_grey_as_of_colour(untrained):
    net = ev.inception_features("cpu")
    grey = pixels(2, 1, 16)
    f = ev.extract(net, grey)
    assert (
        f.shape == (2, 2048)
        and torch.equal(f, ev.extract(net, grey.expand(-1, 3, -1, -1)))
        and (f[0] != f[1]).any()
    )
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        net(torch.zeros(1, 2, 16, 16))


def test_inception_sees_299_pixels_between_minus_one_and_one(untrained):
    seen = []
    net = ev.inception_features("cpu")
    net.net.Conv2d_1a_3x3.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net(torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 1, 32, 32))
    assert (
        seen[0].shape == (2, 3, 299, 299) and (seen[0][0] == -1).all() and (seen[0][1] == 1).all()
    )


def test_torchvision_expects_the_numbers_that_we_feed(untrained):
    from torchvision.transforms.functional import normalize

    seen, p = [], torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    from torchvision.models import inception_v3

    net = inception_v3(weights="IMAGENET1K_V1").eval()
    net.Conv2d_1a_3x3.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        # as the weights' own transforms say
        net(normalize(p, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(seen[0], 2 * p - 1, atol=1e-5, rtol=1e-5)


def test_inception_without_a_network_is_one_sentence(monkeypatch):
    import torchvision.models as models

    def offline(weights):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(models, "inception_v3", offline)
    with pytest.raises(OSError, match="Inception v3 could not be fetched .*RandomFeatures"):
        ev.inception_features("cpu")


# ---- classifiers that ship
@pytest.fixture
def shipping(tmp_path, monkeypatch):
    "A folder of weights with a classifier of the digits as if it had been trained."
    import ddpm_course.pretrained as pretrained

    net = ev.Classifier((1, 16, 16), 10).eval()
    write_pretrained(
        "classifier-digits",
        net.state_dict(),
        dict(shape=[1, 16, 16], num_classes=10),
        tmp_path / "weights",
        seed=0,
    )
    monkeypatch.setattr(pretrained, "weights_folder", lambda: tmp_path / "weights")
    return net


def test_a_shipped_classifier_reads_as_it_did(shipping):
    net = ev.shipped_classifier("classifier-digits", device="cpu")
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    torch.testing.assert_close(
        ev.extract(net, pixels(9, size=16)),
        ev.extract(shipping, pixels(9, size=16)),
        rtol=5e-3,
        atol=5e-3,
    )
    with pytest.raises(ValueError, match="Did you mean 'classifier-digits'"):
        ev.shipped_classifier("classifier-digit")


def test_the_shipped_classifier_is_taken_for_its_own_data_only(shipping, monkeypatch):
    monkeypatch.setattr(
        "ddpm_course.judge.train_classifier", lambda *a, **kw: pytest.fail("trained")
    )
    same = ev.classifier_for(get_dls("digits", img_size=16), device="cpu")
    torch.testing.assert_close(same.head.weight, shipping.head.weight, rtol=1e-3, atol=1e-3)
    other = dict(
        size=dict(img_size=8),
        part=dict(img_size=16, sizes=(100, 20, 20)),
        split=dict(img_size=16, seed=1),
        colour=dict(img_size=16, channels=3),
    )
    for kw in other.values():
        assert not ev.ships(get_dls("digits", **kw)), kw
    assert ev.ships(get_dls("digits", img_size=16)) and not ev.ships(tiny_dls())


def test_uint8_images_can_be_judged():
    net = ev.Classifier((1, 8, 8), 3).eval()
    assert torch.equal(ev.predict(net, pixels(30)), ev.predict(net, to_float(pixels(30))))


# ---- report
def test_report_has_every_number_that_the_functions_give():
    net = ev.Classifier((1, 8, 8), 3).eval()
    a, b, y = pixels(40), pixels(60, seed=1), torch.arange(40) % 3
    with pytest.warns(UserWarning, match="40 samples for 128 features"):
        r = rp.report(a, y, b, net, train=b[:30], heldout=b[30:])
    assert r["n"] == 40 and r["n_reference"] == 60 and set(rp.MEANING) < set(r)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert r["fid"] == ev.fid(a, b, net.features)
    assert (r["kid"], r["kid_error"]) == ev.kid(a, b, net.features)
    p = ev.label_accuracy(net, a, y)
    assert r["label_accuracy"] == p and r["label_accuracy_error"] == rp.share_error(p, 40)
    m = ev.memorisation(a, b[:30], b[30:])
    assert (r["closer"], r["closer_error"], r["copies"]) == (m["closer"], m["error"], m["copies"])


def test_report_compares_equal_numbers_where_balls_are_counted_and_all_there_are_elsewhere(
    monkeypatch,
):
    a, sizes = pixels(40), []
    for name in ("precision_recall", "density_coverage", "frechet_distance", "kernel_distance"):
        monkeypatch.setattr(
            rp,
            name,
            lambda a, b, f=getattr(rp, name), **kw: sizes.append((len(a), len(b))) or f(a, b, **kw),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r = rp.report(a, None, a, features=ev.pixel_features)
        assert (r["precision"], r["recall"], r["density"], r["coverage"]) == (1, 1, 1, 1) and r[
            "fid"
        ] < 1e-9
        assert "label_accuracy" not in r and "closer" not in r
        del sizes[:]
        rp.report(a[:20], None, pixels(100, seed=2), features=ev.pixel_features)
    assert sorted(sizes) == [(20, 20), (20, 20), (20, 100), (20, 100)]


def test_the_table_has_a_column_for_each_and_a_meaning_for_each_row():
    rows = dict(
        model=dict(n=10, n_reference=10_000, fid=3.14159, kid=0.1, kid_error=0.02, closer_z=3.21),
        real=dict(n=10, fid=1.0, label_accuracy=1.0, label_accuracy_error=0.05, label_accuracy_n=9),
    )
    lines = rp.report_table(rows).splitlines()
    assert (
        lines[0].split() == ["model", "real"]
        and lines[1].split()[:3] == ["images", "10", "10"]
        and lines[2].split()[:3] == ["reference", "10000", "-"]
    )
    assert (
        lines[3].split()[:7] == ["label_accuracy", "-", "1", "+-", "0.05", "(of", "9)"]
        and "3.14" in lines[4]
        and rp.MEANING["fid"] in lines[4]
    )
    assert "0.1 +- 0.02" in lines[5] and lines[6].split()[:3] == ["closer_z", "3.21", "-"]


@pytest.mark.parametrize("n", [20, 45])
# as with many: ten parts of 10 images exceed 3 in about 2% of the pairs
def test_the_error_of_kid_can_be_trusted_with_few_images(n):
    z = torch.tensor(
        [
            (
                r := rp.report(
                    normal(40, 8, seed=s), None, normal(n, 8, seed=1000 + s), features=flat
                )
            )["kid"]
            / r["kid_error"]
            for s in range(400)
        ]
    ).abs()
    assert (z > 3).double().mean() < 0.05 and z.max() < 10


@pytest.mark.parametrize("n", [9, 50, 1000])
def test_the_error_of_a_share_is_half_of_wilsons_interval(n):
    from scipy.stats import binomtest

    for k in (0, 1, n // 2, n):
        ci = binomtest(k, n).proportion_ci(math.erf(0.5**0.5), "wilson")  # one standard error
        assert (
            rp.share_error(k / n, n) == pytest.approx((ci.high - ci.low) / 2, rel=1e-9)
            and rp.share_error(k / n, n) > 0
        )


@pytest.mark.parametrize("n", [6, 11, 19, 25])
def test_a_report_of_few_images_holds_numbers_only(n):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r = rp.report(
            pixels(n),
            None,
            pixels(60, seed=1),
            features=ev.pixel_features,
            train=pixels(30, seed=2),
            heldout=pixels(30, seed=3),
        )
    assert all(math.isfinite(v) for v in r.values()) and ("kid_error" in r) == (n >= 20)
    assert (
        r["kid"]
        == ev.kid(pixels(n), pixels(60, seed=1), ev.pixel_features, subsets=10 if n >= 20 else 1)[0]
    )  # of all there are


def test_real_images_are_drawn_at_random_with_their_labels():
    dls = tiny_dls()
    split, drawn, rest = rp.real_draw(dls, 10, seed=1)
    assert (
        split is dls.valid
        and len(drawn) == 10
        and sorted(torch.cat([drawn, rest]).tolist()) == list(range(24))
    )
    assert torch.equal(drawn, rp.real_draw(dls, 10, seed=1)[1]) and not torch.equal(
        drawn, rp.real_draw(dls, 10, seed=2)[1]
    )
    assert rp.real_draw(dls, 30)[0] is dls.train and len(rp.real_draw(dls, 100)[1]) == 64


def test_what_real_images_get_is_measured_on_images_that_neither_judge_nor_model_saw(
    monkeypatch,
):
    dls, small, seen = tiny_dls(n=64), tiny_dls(n=64), []
    small.valid = small.test = type(small.valid)(small.valid.images[:4], small.valid.labels[:4])
    monkeypatch.setattr(
        rp,
        "report",
        lambda images, labels, reference, classifier, features, **kw: seen.append((images, kw))
        or dict(n=len(images)),
    )
    for data, n, pool, heldout in (
        (dls, 12, dls.valid, 12),
        (dls, 20, dls.valid, 24),
        (small, 20, small.train, 4),
    ):
        rp.real_report(data, n, features=flat)
        images, kw = seen.pop()
        d, i = ev.nearest_neighbours(images, pool.images)
        assert (
            len(images) == n
            and (d == 0).all()
            and len(i.unique()) == n
            and len(kw["heldout"]) == heldout
        )
        assert (ev.nearest_neighbours(images, kw["train"])[0] > 0).all() and (
            ev.nearest_neighbours(images, kw["heldout"])[0] > 0
        ).all()
    rp.real_report(get_dls("shapes", img_size=16, sizes=(100, 60, 60)), 80, features=flat)
    assert len(seen.pop()[0]) == 60  # all there are


def test_real_images_score_like_real_images():
    dls = get_dls("shapes", img_size=16, sizes=(400, 200, 200))
    r = rp.real_report(dls, 100, features=ev.RandomFeatures(dls.shape, dim=16))
    assert (
        abs(r["kid"]) < 4 * r["kid_error"]
        and abs(r["closer_z"]) < 3.5
        and 0.7 < r["density"] < 1.3
        and r["precision"] > 0.6
    )


# ---- the command
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A model of the digits that has seen one pass."
    path = tmp_path_factory.mktemp("evaluate") / "run"
    torch.manual_seed(0)
    net = UNet_conditional(
        1, 1, time_dim=16, widths=(8, 8), attention=(1,), heads=2, num_classes=10
    )
    dls = get_dls("digits", img_size=16, batch_size=256)
    return str(
        Diffusion(net, DDPM(100, "cosine"), "v", (1, 16, 16), 10, dls.classes, device="cpu")
        .fit(dls, epochs=1, run=path, progress=False, **QUICK)
        .run
    )


BY_PIXELS = ("--against", "digits", "--img-size", 16, "--features", "pixels")


def evaluate(*args, code=0):
    done = CliRunner().invoke(main, ["evaluate", *map(str, args), "--device", "cpu"])
    assert done.exit_code == code and "Traceback" not in done.output, (done.output, done.exception)
    return done.output


def plain_json(*path):  # what JSON knows: no NaN
    def no(constant):
        raise AssertionError(constant)

    return json.loads(Path(*path).read_text(), parse_constant=no)


def test_evaluate_a_run(run, shipping, tmp_path):
    said = evaluate(run, "--against", "digits", "--n", 60, "--steps", 2, "--seed", 3)
    written = plain_json(run, "evaluation.json")
    assert "reference: the test split of digits, 179 of its 1,797 images" in said
    assert f"{run}/evaluation.json" in said and "warning: 60 samples for 128 features" in said
    assert {k: written[k] for k in ("against", "features", "seed", "steps", "guidance")} == dict(
        against="digits", features="classifier", seed=3, steps=2, guidance=2.0
    )
    numbers, real = written["numbers"], written["real"]
    assert (
        numbers["n"] == real["n"] == 60
        and numbers["n_reference"] == 179
        and set(rp.MEANING) < set(numbers)
        and set(rp.MEANING) < set(real)
    )
    dls = get_dls("digits", img_size=16)
    y = dls.valid.labels[rp.real_draw(dls, 60, 3)[1]]  # the labels of the real column
    assert y.bincount(minlength=10).unique().numel() > 1  # a random draw: not six of each
    images = Diffusion.load(run, "cpu").sample(y, cfg_scale=2.0, n_steps=2, seed=3)
    judge = ev.shipped_classifier("classifier-digits", device="cpu")
    assert (
        numbers["label_accuracy"] == ev.label_accuracy(judge, images, y)
        and real["label_accuracy"] == pytest.approx(ev.test_accuracy(judge, dls))
        and "(of 179)" in said
    )
    assert real["label_accuracy_n"] == 179 and real["label_accuracy_error"] == rp.share_error(
        real["label_accuracy"], 179
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert numbers["fid"] == pytest.approx(
            ev.fid(images, dls.test.images, judge.features), rel=1e-4
        )
    for name, meaning in rp.MEANING.items():
        assert any(
            line.startswith(name + " ") and meaning in line for line in said.splitlines()
        ), name
    again = evaluate(
        run,
        "--against",
        "digits",
        "--n",
        60,
        "--steps",
        2,
        "--seed",
        3,
        "--out",
        tmp_path / "again.json",
        "--features",
        "pixels",
    )
    other = json.loads((tmp_path / "again.json").read_text())
    assert (
        "again.json" in again
        and other["features"] == "pixels"
        and other["numbers"]["fid"] != numbers["fid"]
        and other["numbers"]["closer"] == numbers["closer"]
    )


def pictures(folder, images, names=None):
    for i, u8 in enumerate(images):
        at = folder / (names[i] if names else "")
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(u8[0].numpy()).save(at / f"{i}.png")
    return folder


def test_evaluate_a_folder_of_copied_training_images(shipping, tmp_path):
    dls = get_dls("digits", img_size=16)
    folder = pictures(
        tmp_path / "copies", dls.train.images[:80], [dls.classes[k] for k in dls.train.labels[:80]]
    )
    said = evaluate(
        folder,
        *BY_PIXELS,
        "--out",
        tmp_path / "e.json",
    )
    numbers = json.loads((tmp_path / "e.json").read_text())["numbers"]
    assert (
        said.splitlines()[0].split() == ["copies", "real", "digits"]
        and numbers["n"] == 80
        and numbers["copies"] == numbers["closer"] == 1
    )
    judge = ev.shipped_classifier("classifier-digits", device="cpu")
    assert numbers["label_accuracy"] == pytest.approx(
        ev.label_accuracy(judge, dls.train.images[:80], dls.train.labels[:80])
    )


def test_evaluate_catches_ten_images_copied_many_times(shipping, tmp_path):
    dls = get_dls("digits", img_size=16)
    ten = torch.stack([dls.train.images[dls.train.labels == k][0] for k in range(10)])
    folder = pictures(tmp_path / "ten", ten.repeat(20, 1, 1, 1))
    said = evaluate(
        folder,
        *BY_PIXELS,
        "--out",
        tmp_path / "e.json",
    )
    written = plain_json(tmp_path, "e.json")
    assert (
        written["numbers"]["identical"] == 1
        and written["real"]["identical"] == 0
        and "warning: 100.0% of the images are training images, pixel for pixel" in said
    )
    # ten witnesses, eight training images for each that was held out
    assert "closer_z cannot reach 3" in said
    assert "warning: the real column is of 179 images" in said and "--n 179" in said


def test_images_rounded_to_pixels_are_still_identical_and_others_are_not():
    train, held = to_float(pixels(30)), to_float(pixels(30, seed=1))
    # within the rounding of one grey level
    near = train[:10] + (torch.rand(10, 1, 8, 8) - 0.5) / 127.5
    assert (
        ev.memorisation(near, train, held)["identical"] == 1
        and ev.memorisation(train[:10] + 3 / 255, train, held)["identical"] == 0
    )
    assert (
        ev.memorisation(held[:10], train, held)["identical"] == 0
        and ev.memorisation(train[:10], train, held, features=flat)["identical"] == 1
    )


def test_a_judge_is_told_of_another_range_but_may_read_noise():
    net = ev.Classifier((1, 8, 8), 3).eval()
    with pytest.warns(UserWarning, match="from 0 to 1"):
        ev.label_accuracy(net, pixels(9) / 255, [0] * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ev.predict(net, 3 * torch.randn(9, 1, 8, 8))


@pytest.mark.parametrize("measure", [ev.precision_recall, ev.density_coverage])
def test_sets_of_other_sizes_are_told(measure):
    with pytest.warns(UserWarning, match="300 generated and 60 real images"):
        measure(normal(300), normal(60, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(normal(60), normal(64, seed=1))


def test_too_few_images_are_told_before_a_judge_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_judge", lambda *a: pytest.fail("asked for a judge"))
    folder = pictures(tmp_path / "five", pixels(5, size=16))
    assert "holds 5 images, and a comparison takes 6" in evaluate(
        folder, "--against", "digits", "--img-size", 16, "--out", tmp_path / "e.json", code=1
    )


def test_evaluate_a_folder_of_another_size_without_classes(shipping, tmp_path):
    stored = pixels(12, size=8)
    said = evaluate(
        pictures(tmp_path / "small", stored),
        *BY_PIXELS,
        "--n",
        10,
        "--out",
        tmp_path / "new" / "e.json",
    )
    # the folder is made, and ten images are too few for a standard error
    numbers = plain_json(tmp_path, "new", "e.json")["numbers"]
    assert numbers["n"] == 10 and "label_accuracy" not in numbers and "kid_error" not in numbers
    assert "class folders" not in said


def test_class_folders_of_other_names_are_named(shipping, tmp_path):
    folder = pictures(tmp_path / "words", pixels(20, size=16), ["seven", "three"] * 10)
    said = evaluate(
        folder,
        *BY_PIXELS,
        "--out",
        tmp_path / "e.json",
    )
    assert (
        "no label accuracy: the class folders are seven, three, and the classes of digits are 0,"
        " 1, 2"
        in said
    )
    assert "label_accuracy" not in plain_json(tmp_path, "e.json")["numbers"]


def test_a_model_with_other_classes_than_the_data_is_asked_for_its_own():
    dls, diff = tiny_dls(), tiny_diffusion()
    images, labels = cli._drawn(diff, dls, 100, 1, 1.0, 0)
    assert labels is None and images.shape == (100, 1, 8, 8)
    diff.classes = dls.classes
    images, labels = cli._drawn(diff, dls, 100, 1, 1.0, 0)  # more than there are: the same again
    split, drawn, _ = rp.real_draw(dls, 100)
    assert torch.equal(labels, split.labels[drawn].repeat(2)[:100])


def test_what_has_no_judge_is_said(shipping, tmp_path, monkeypatch):
    def only_trained(dls, device, train=True):
        return ev.Classifier(dls.shape, 10).eval() if train else None

    monkeypatch.setattr(ev, "classifier_for", only_trained)
    folder = pictures(tmp_path / "f", pixels(12, size=8))
    said = evaluate(folder, "--against", "digits", "--img-size", 8, "--out", tmp_path / "e.json")
    assert "no classifier ships for digits of 1x8x8 (one ships for 1x16x16: --img-size 16)" in said
    assert "no classifier ships" not in evaluate(
        folder,
        *BY_PIXELS,
        "--out",
        tmp_path / "e.json",
    )


def test_labels_go_with_their_images_where_a_folder_has_some_classes_and_images_to_spare(
    shipping, tmp_path, monkeypatch
):
    dls, seen = get_dls("digits", img_size=16), []
    some = torch.cat([dls.test.images[dls.test.labels == k][:15] for k in (7, 3)])
    folder = pictures(tmp_path / "some", some, ["7"] * 15 + ["3"] * 15)
    real = rp.report
    monkeypatch.setattr(
        rp,
        "report",
        lambda images, labels, *a, **kw: seen.append((images, labels))
        or real(images, labels, *a, **kw),
    )
    evaluate(
        folder,
        *BY_PIXELS,
        "--n",
        20,
        "--out",
        tmp_path / "e.json",
    )
    images, labels = seen[0]
    d, i = ev.nearest_neighbours(images, dls.test.images)
    assert (
        len(images) == 20
        and (d == 0).all()
        and torch.equal(dls.test.labels[i[:, 0]], labels)
        and set(labels.tolist()) == {3, 7}
    )


def test_a_folder_is_fitted_to_the_frame_as_its_reference_is(tmp_path):
    stored = pixels(3, size=13)
    folder, dls = pictures(tmp_path / "f", stored), get_dls("digits", img_size=16)
    # ink on black: padded with black, enlarged only where the frame is much larger
    images, labels = cli._folder(folder, dls, "digits")
    assert (
        labels is None
        and torch.equal(images[:, :, 1:14, 1:14], stored)
        and images[:, :, 0].max() == images[:, :, 14:].max() == 0
    )
    assert not torch.equal(cli._folder(folder, dls, str(folder))[0], images)


EVALUATE = dict(
    data=(["--against", "digit"], "Did you mean 'digits'?"),
    n=(
        ["--against", "digits", "--n", 5],
        "at least 6 (coverage looks at the fifth neighbour), not 5",
    ),
    out=(
        ["--against", "digits", "--features", "pixels", "--out", "."],
        "is a folder: name one in it, such as evaluation.json",
    ),
    steps=(["--against", "digits", "--steps", 0, "--features", "pixels"], "1 to 100 steps, not 0"),
)


@pytest.mark.parametrize("what", EVALUATE)
def test_evaluate_typed_wrong(what, run):
    args, word = EVALUATE[what]
    said = evaluate(run, *args, code=1)
    assert said.startswith("Error: ") and said.count("\n") == 1 and word in said


def test_evaluate_what_is_not_there(shipping, tmp_path):
    assert "does not exist" in evaluate(
        tmp_path / "none", "--against", "digits", "--img-size", 16, code=1
    )
    assert "three holds 3 images" in evaluate(
        pictures(tmp_path / "three", pixels(3)),
        "--against",
        "digits",
        "--img-size",
        16,
        "--out",
        tmp_path / "e.json",
        code=1,
    )
    few = evaluate(
        tmp_path / "three",
        "--against",
        pictures(tmp_path / "c", pixels(19, seed=1)),
        "--img-size",
        8,
        code=1,
    )
    assert "c holds 19 images, and only" in few and "about 60 in all" in few
    pictures(tmp_path / "a", pixels(12))
    pictures(tmp_path / "b", pixels(150, seed=1))
    assert "has no classes" in evaluate(
        tmp_path / "a", "--against", tmp_path / "b", "--features", "classifier", code=1
    )


@pytest.mark.parametrize("name", ["nowhere", "digit", "classifier-digits"])
def test_evaluate_a_name_that_is_no_model(name):  # a classifier draws nothing
    said = evaluate(name, "--against", "digits", code=1)
    assert (
        f"(and no run or folder of that name) '{name}': choose one of 'digits', 'mnist', 'shapes'"
        in said
    )
