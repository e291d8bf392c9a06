"""Scores against automatic differentiation for every process, Langevin against its stationary law,
the two losses that are one, shapes, seeds, bad input."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_course.core import example_generators
from ddpm_course.denoiser import Denoiser, eps_param, exact_denoiser, score_param
from ddpm_course.model import PROCESSES, make_process, make_step
from ddpm_course.process import DDPM
from ddpm_course.sampling import sample
from ddpm_course.score import NCSN, GaussianMixture, PointNet, annealed, langevin, score_of
from ddpm_course.training import Diffusion

F64 = torch.float64
ALL = {name: make_process(name) for name in PROCESSES} | {"cosine": DDPM(100, "cosine")}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(shape=(2,), seed=0):
    means = torch.randn(4, *shape, generator=gen(seed), dtype=F64)
    return GaussianMixture(
        means, torch.tensor([0.1, 0.5, 0.3, 0.05], dtype=F64), [0.4, 0.3, 0.2, 0.1]
    )


def noisy(mix, process, n=32, seed=1):  # points where they are found at n different times
    t = process.t_max * (0.02 + 0.96 * torch.rand(n, generator=gen(seed), dtype=F64))
    x0 = mix.sample(n, gen(seed))
    return process.add_noise(x0, t, torch.randn(x0.shape, generator=gen(seed + 1), dtype=F64)), t


# ---------------------------------------------------------------- the mixture and its score
@pytest.mark.parametrize("shape", [(2,), (5,), (1, 3, 3)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_score_is_the_gradient_of_the_log_density(name, shape):
    process, mix = ALL[name], mixture(shape)
    x, t = noisy(mix, process)
    x.requires_grad_()
    truth = torch.autograd.grad(mix.log_prob(process, x, t).sum(), x)[0]
    found = score_of(mix.denoiser(process), process)(x.detach(), t)
    assert found.shape == x.shape
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_mixture_without_width_is_a_finite_set(name):
    process, points = ALL[name], GaussianMixture(torch.randn(6, 3, generator=gen(), dtype=F64))
    x, t = noisy(points, process)
    torch.testing.assert_close(
        points.denoiser(process)(x, t),
        exact_denoiser(process, points.means)(x, t),
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize("name", ALL)
def test_density_integrates_to_one(name):
    process, mix = ALL[name], mixture((1,))
    t = 0.3 * process.t_max * torch.ones(1, dtype=F64)
    reach = 8 * (process.alpha(t).double() + process.sigma(t).double()).item() + 3
    x = torch.linspace(-reach, reach, 40_001, dtype=F64)[:, None]
    assert abs(mix.log_prob(process, x, t).exp().sum() * (x[1] - x[0]).item() - 1) < 1e-6


def test_samples_have_the_shares_and_moments():
    mix, n = mixture(), 40_000
    x = mix.sample(n, gen(3))
    w = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    mean = w @ mix.means
    var = w @ (mix.std[:, None] ** 2 + (mix.means - mean) ** 2)
    assert ((x.mean(0) - mean).abs() < 5 * (var / n).sqrt()).all()
    assert ((x.var(0) / var - 1).abs() < 0.05).all()
    assert torch.equal(x, mix.sample(n, gen(3))) and not torch.equal(x, mix.sample(n, gen(4)))
    # weights are made to sum to 1
    far = GaussianMixture(10.0 * torch.arange(4.0)[:, None], 0.1, [4, 3, 2, 1])
    share = (far.sample(n, gen()) / 10).round().long().ravel().bincount() / n
    assert ((share - w).abs() < 5 * (w * (1 - w) / n).sqrt()).all()


def test_times_may_be_a_number_one_or_many():
    mix, process, x = mixture(), NCSN(10, 0.1, 3.0), torch.randn(4, 2, dtype=F64)
    score = score_of(mix.denoiser(process), process)
    for t in (3, torch.tensor([3]), torch.full((4,), 3)):
        torch.testing.assert_close(score(x, t), score(x, torch.tensor(3)))
    assert score(x.float(), 3).dtype == torch.float32


# ---------------------------------------------------------------- two losses, one training
class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 2).double()

    def forward(self, x, t, cond=None):
        return self.out(x)


@pytest.mark.parametrize("make", [OneLayer, lambda: PointNet().double()])
# eps and score are refused where alpha is 0
@pytest.mark.parametrize("name", [n for n in ALL if n != "flow"])
def test_score_matching_is_eps_prediction(name, make):
    torch.manual_seed(0)
    net = make()
    turned = deepcopy(net)
    for w in turned.out.parameters():
        w.data.neg_()
    process, mix = ALL[name], mixture()
    a, b = Denoiser(net, process, score_param), Denoiser(turned, process, eps_param)
    x0, eps = mix.sample(32, gen()), torch.randn(32, 2, generator=gen(1), dtype=F64)
    t = process.t_max * (0.05 + 0.9 * torch.rand(32, generator=gen(2), dtype=F64))
    x_t, sigma = process.add_noise(x0, t, eps), process.sigma(t)[:, None]
    by_hand = (sigma * score_of(a, process)(x_t, t) + eps).pow(2).mean(1)
    losses = [d.loss(x0, t=t, eps=eps) for d in (a, b)]
    for loss in losses:
        torch.testing.assert_close(loss, by_hand, rtol=1e-6, atol=1e-8)
    grads = [
        torch.autograd.grad(loss.mean(), n.parameters()) for loss, n in zip(losses, (net, turned))
    ]
    for (key, _), g, h in zip(net.named_parameters(), *grads):
        torch.testing.assert_close(g, -h if key.startswith("out") else h, rtol=1e-6, atol=1e-9)


def test_explicit_and_denoising_losses_differ_by_the_floor():
    one, process, n = GaussianMixture(torch.zeros(1, 2, dtype=F64), 0.7), NCSN(10, 0.1, 2.0), 20_000
    x0, eps = one.sample(n, gen()), torch.randn(n, 2, generator=gen(1), dtype=F64)
    sigma, x_t = process.sigma(7).item(), process.add_noise(x0, 7, eps)
    true = -x_t / (0.49 + sigma**2)
    for wrong in (0.0, 0.5, 1.0, 3.0):  # any multiple of the true score
        gap = (wrong * true + eps / sigma).pow(2).sum(1) - (wrong * true - true).pow(2).sum(1)
        # what x_t does not tell of eps, for two numbers
        floor = 2 / sigma**2 * 0.49 / (0.49 + sigma**2)
        assert abs(gap.mean() - floor) < 5 * gap.std() / n**0.5


# ---------------------------------------------------------------- levels
@settings(max_examples=30, deadline=None)
@given(L=st.integers(2, 400), low=st.floats(1e-3, 1), ratio=st.floats(1.5, 1e4))
def test_ncsn_is_a_geometric_grid(L, low, ratio):
    p = NCSN(L, low, low * ratio)
    t = torch.arange(1, L + 1)
    formula = low * ratio ** ((t - 1).double() / (L - 1))  # Song and Ermon 2019, section 4
    torch.testing.assert_close(p.sigma(t), formula, rtol=1e-9, atol=0)
    assert p.sigma(0) == 0 and (p.alpha(t) == 1).all()
    clock = p.clock(t)
    assert clock[0] == 0 and clock[-1] == 1000 and (clock.diff() > 0).all()
    drawn = p.sample_t(500, generator=gen())
    assert drawn.min() >= 1 and drawn.max() <= L and drawn.dtype == torch.int64


def test_ncsn_survives_casts_and_its_config():
    p = NCSN(50, 0.02, 9.0)
    sigma = p.sigma(torch.arange(51))
    assert torch.equal(deepcopy(p).half().sigma(torch.arange(51)), sigma)
    config = dict(p.config)
    assert torch.equal(make_process(**config).sigma(torch.arange(51)), sigma)
    assert p.steps(10).tolist() == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0]


# ---------------------------------------------------------------- Langevin
def test_one_langevin_step():
    n = 50_000
    x, score = torch.ones(n, 1, dtype=F64), -2 * torch.ones(n, 1, dtype=F64)
    y = langevin(x, score, 0.3, gen())
    assert (
        abs(y.mean() - (1 - 0.3)) < 5 * (0.3 / n) ** 0.5
        and abs(y.var() / 0.3 - 1) < 5 * (2 / n) ** 0.5
    )
    # a size for each
    two = langevin(torch.zeros(2, n), torch.zeros(2, n), torch.tensor([0.01, 4.0]), gen())
    assert abs(two[0].std() / 0.1 - 1) < 0.02 and abs(two[1].std() / 2 - 1) < 0.02


@pytest.mark.parametrize("h", [0.1, 0.7, 1.9, 3.0])
def test_stationary_variance_of_unadjusted_langevin(h):
    v, n = 0.49, 20_000
    x = v**0.5 * torch.randn(n, 1, generator=gen(), dtype=F64)
    g = gen(1)
    for _ in range(80):
        x = langevin(x, -x / v, h * v, g)
    assert abs(x.var() / v * (1 - h / 4) - 1) < 5 * (2 / n) ** 0.5


@pytest.mark.parametrize("n, rate", [(1, 0.5), (3, 0.4), (8, 1.0)])
def test_annealed_follows_its_recursion(n, rate):
    process, one, size = (
        NCSN(30, 0.05, 4.0),
        GaussianMixture(torch.zeros(1, 1, dtype=F64), 0.6),
        20_000,
    )
    V = process.sigma(30).item() ** 2
    for t in range(30, 1, -1):
        v = 0.36 + process.sigma(t).item() ** 2
        for _ in range(n):
            V = (1 - rate * process.sigma(t).item() ** 2 / (2 * v)) ** 2 * V + rate * process.sigma(
                t
            ).item() ** 2
    g = gen()
    x = process.init_noise((size, 1), generator=g).double()
    x = sample(
        one.denoiser(process),
        process,
        x,
        process.steps(30)[:-1],
        annealed,
        n=n,
        rate=rate,
        generator=g,
    )
    assert abs(x.var() / V - 1) < 5 * (2 / size) ** 0.5


@pytest.mark.parametrize(
    "name, start",
    [("ddpm", 1.0), ("ncsn", 1.0), ("vp", 1.0), ("sub_vp", 1.0), ("ve", 1.0), ("flow", 0.98)],
)
def test_annealed_samples_any_process(name, start):
    process, mix = ALL[name], GaussianMixture(
        torch.tensor([[-1.0], [1.0]], dtype=F64), 0.2, [0.7, 0.3]
    )
    n, g, ts = 3000, gen(), torch.linspace(start * process.t_max, 0, 81)
    if name in ("ddpm", "ncsn"):
        ts = process.steps(80)
    sigma = process.sigma(ts[:1].double()).item()
    x = sample(
        mix.denoiser(process),
        process,
        sigma * torch.randn(n, 1, generator=g, dtype=F64),
        ts,
        annealed,
        n=10,
        generator=g,
    )
    left = x < 0
    assert abs(left.double().mean() - 0.7) < 0.06  # 5 standard errors are 0.042
    assert abs(x[left].mean() + 1) < 0.05 and abs(x[left].std() / 0.2 - 1) < 0.2


def test_annealed_counts_evaluations_and_ends_in_the_estimate():
    process, calls = NCSN(6, 0.1, 2.0), []

    def denoise(x, t):
        calls.append(t[0].item())
        return 0 * x + len(calls)

    film = []
    x = sample(
        denoise,
        process,
        torch.zeros(3, 2),
        process.steps(6),
        annealed,
        callback=lambda **k: film.append(k),
        n=4,
        generator=gen(),
    )
    assert calls == [t for t in range(6, 0, -1) for _ in range(4)]
    assert (x == 24).all() and torch.equal(film[-1]["x0"], x)  # the last estimate itself


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4), (2, 3, 4, 4)], ids=str)
def test_seeds_belong_to_examples_and_shapes_are_free(shape):
    process, mix = NCSN(5, 0.1, 2.0), mixture(shape)

    def drawn(ids):
        g = [example_generators(3, 1, start=i)[0] for i in ids]
        return sample(
            mix.denoiser(process),
            process,
            process.init_noise((len(ids), *shape), generator=g),
            process.steps(5),
            annealed,
            n=2,
            generator=g,
        )

    assert torch.allclose(drawn(range(4))[2], drawn([2])[0], atol=1e-5)


# ---------------------------------------------------------------- the network for points, and the
# rest of the course around it
def test_point_net():
    torch.manual_seed(0)
    net, x = PointNet(dim=3, width=16, depth=2, num_classes=4), torch.randn(5, 3)
    t, y = torch.rand(5) * 1000, torch.tensor([0, 1, 2, 3, 4])
    assert net(x, t, y).shape == (5, 3)
    assert torch.allclose(net(x, t), net(x, t, torch.full((5,), 4))) and not torch.allclose(
        net(x, t), net(x, t, y)
    )  # no label is the null class
    assert torch.allclose(net(x, t[:1]), net(x, t[:1].expand(5)))
    assert not torch.allclose(net(x, t), net(x, t + 100))  # it sees the clock
    assert not PointNet(width=16).label_emb


def test_a_diffusion_of_points_samples_by_langevin():
    diff = Diffusion(PointNet(width=16), NCSN(5, 0.1, 2.0), "edm", shape=(2,), device="cpu")
    kw = dict(n_steps=5, step=partial(make_step("langevin"), n=2), seed=1)
    x = diff.sample(n=6, **kw)
    assert make_step("langevin") is annealed and x.shape == (6, 2) and x.isfinite().all()
    assert torch.allclose(x, diff.sample(n=6, chunk=2, **kw), atol=1e-5)


# ---------------------------------------------------------------- bad input
def walk(process=NCSN(5), **kw):
    return sample(lambda x, t: x, process, torch.zeros(2, 2), process.steps(5), annealed, **kw)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: NCSN(1), "at least 2, not 1"),
        (lambda: NCSN(2.5), "whole number"),
        (lambda: NCSN(10, 1.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: NCSN(10, 0.0, 1.0), "not 0.0"),
        (lambda: NCSN(5).steps(6), "1 to 5 steps"),
        (lambda: NCSN(5).sigma(6), "0..5"),
        (lambda: GaussianMixture(torch.zeros(2, 2).long()), "floats, not torch.int64"),
        (lambda: GaussianMixture(torch.zeros(2, 2), weights=[1, -1]), "none below 0"),
        (lambda: GaussianMixture(torch.zeros(2, 2), weights=[1, 1, 1]), "2 shares"),
        (lambda: GaussianMixture(torch.zeros(2, 2), weights=[0, 0]), "shares"),
        (lambda: GaussianMixture(torch.zeros(2, 2), -1.0), "none below 0"),
        (lambda: GaussianMixture(torch.zeros(2, 2), [1, 2, 3]), "one number or 2"),
        (lambda: langevin(torch.zeros(2, 2), torch.zeros(2, 2), 0), "above 0, not 0"),
        (
            lambda: langevin(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(3)),
            "one value per example",
        ),
        (lambda: walk(n=0), "at least 1, not 0"),
        (lambda: walk(rate=0), "not 0"),
        (lambda: walk(rate=4.0), "below 4"),
        (lambda: walk(ALL["flow"]), "Flow"),
        (lambda: Denoiser(PointNet(), ALL["flow"], score_param), "does not work with Flow"),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(ValueError) as e:
        call()
    assert said in str(e.value), str(e.value)
    assert "\n" not in str(e.value)


def test_points_without_noise_are_themselves():
    "0 / 0: a heap of width 0 at a time of sigma 0 gave NaN."
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64)
    for dtype in (F64, torch.float32):
        points, mixed = (GaussianMixture(means.to(dtype), std) for std in (0.0, [0.0, 0.2]))
        for p in (NCSN(10, 0.1, 3.0), DDPM()):
            for law in (points, mixed):
                got = law.denoiser(p)(means.to(dtype), 0.0)
                assert torch.equal(got, means.to(dtype))
            wide = means[1:].to(dtype) + 0.1  # in the heap that has a width: itself
            assert torch.allclose(mixed.denoiser(p)(wide, 0.0), wide, atol=1e-6)
            near = points.denoiser(p)(means.to(dtype) + 0.1, 0.0)
            assert torch.equal(near, means.to(dtype))  # the nearest of them


def test_shares_keep_their_digits():
    "A list of weights was rounded to float32."
    law = GaussianMixture(torch.zeros(3, 1, dtype=F64), 1.0, [0.1, 0.2, 0.7])
    want = torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    torch.testing.assert_close(law.log_weights.exp(), want, rtol=1e-15, atol=0)
    assert law.sample(5).dtype == F64
    assert GaussianMixture(law.means, 1.0, [1, 2, 7]).sample(2).shape == (2, 1)
