"""Predictions, the Denoiser, the exact denoiser and the loss floor against truths in closed
form."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_course.core import bcast, build
from ddpm_course.denoiser import (
    PARAMS,
    Denoiser,
    edm_param,
    eps_param,
    exact_denoiser,
    exact_weights,
    loss_floor,
    score_param,
    v_param,
    x0_param,
)
from ddpm_course.process import DDPM, Process


class VP(Process):
    "Song et al. 2021, beta from 0.1 to 20."

    def log_abar(self, t):
        return -(0.1 * t + 0.5 * 19.9 * t**2)

    def alpha(self, t):
        return (0.5 * self.log_abar(t)).exp()

    def sigma(self, t):
        return (-self.log_abar(t).expm1()).sqrt()


class VE(Process):
    "Noise from 0.01 to 50, the image keeps its size."

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return 0.01 * 5000.0**t


class Flow(Process):
    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t


class Cos(Process):
    "alpha is 6e-17 at the end, not quite 0."

    def alpha(self, t):
        return (t * math.pi / 2).cos()

    def sigma(self, t):
        return (t * math.pi / 2).sin()


PROCESSES = dict(
    ddpm=DDPM(), cosine=DDPM(schedule="cosine"), ddpm20=DDPM(T=20), vp=VP(), ve=VE(), flow=Flow()
)
PREDICTIONS = dict(PARAMS, edm=edm_param(0.5))
PAIRS = [
    (p, q) for p in PROCESSES for q in PREDICTIONS if not (p == "flow" and q in ("eps", "score"))
]
pairs = pytest.mark.parametrize(
    "process, param",
    [(PROCESSES[p], PREDICTIONS[q]) for p, q in PAIRS],
    ids=["-".join(p) for p in PAIRS],
)
MEANS, VARS = torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([0.25, 1.0, 0.01]).double()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def times(process, n=7):
    "From early to the very end; whole numbers for DDPM."
    share = torch.tensor([0.002, 0.02, 0.1, 0.3, 0.5, 0.8, 1.0]).double()[:n]
    return (
        (share * process.t_max).clamp(min=1).round().long() if isinstance(process, DDPM) else share
    )


def gaussian_oracle(process, x, t):
    "E[x0 | x_t] for x0 ~ N(MEANS, VARS)."
    alpha, sigma = process.coeffs(t, x)
    return MEANS + alpha * VARS / (alpha**2 * VARS + sigma**2) * (x - alpha * MEANS)


def finite_oracle(x0s):
    "The same for a finite set, straight from the definition: differences, no expanded square."

    def oracle(process, x, t):
        alpha, sigma = process.coeffs(t, x)
        diff = x[:, None] - alpha[:, None] * x0s
        logits = -diff.pow(2).flatten(2).sum(2) / (2 * sigma.flatten()[:, None] ** 2)
        return torch.einsum("bn,n...->b...", logits.softmax(1), x0s)

    return oracle


class Perfect(nn.Module):
    "A network that sees only c_in * x_t and the clock, and says what the prediction asks for."

    def __init__(self, oracle, process, param):
        super().__init__()
        self.oracle, self.process, self.param = oracle, process, param

    def forward(self, x_in, clock, cond):
        t = clock * self.process.t_max / 1000
        c_skip, c_out, c_in = (
            bcast(c, x_in).to(x_in)
            for c in self.param(self.process.alpha(t.double()), self.process.sigma(t.double()))
        )
        x = x_in / c_in
        return (self.oracle(self.process, x, t) - c_skip * x) / c_out


FINITE = normal(6, 3, seed=3)


# ---------------------------------------------------------------- predictions


@pairs
@pytest.mark.parametrize(
    "oracle", [gaussian_oracle, finite_oracle(FINITE)], ids=["gaussian", "finite"]
)
def test_a_perfect_network_gives_the_posterior_mean(process, param, oracle):
    t = times(process)
    x = process.add_noise(normal(7, 3, seed=1), t, normal(7, 3, seed=2))
    x0_hat = Denoiser(Perfect(oracle, process, param), process, param)(x, t)
    assert x0_hat.dtype == torch.float64
    assert (x0_hat - oracle(process, x, t)).abs().max() < 1e-10


@pairs
def test_the_loss_of_a_perfect_network_is_the_closed_form_floor_gaussian(process, param):
    n, (t0, *_) = 20_000, times(process)[3:]
    x0 = MEANS + VARS.sqrt() * normal(n, 3, seed=1)
    d = Denoiser(Perfect(gaussian_oracle, process, param), process, param)
    loss = d.loss(x0, t=t0.expand(n), eps=normal(n, 3, seed=2))
    a, s = process.alpha(t0), process.sigma(t0)
    floor = (VARS * s**2 / (a**2 * VARS + s**2)).mean() / param(a, s)[1] ** 2
    assert loss.shape == (n,)
    assert abs(loss.mean() - floor) < 5 * loss.std() / n**0.5


@pairs
def test_the_loss_of_a_perfect_network_is_loss_floor_finite(process, param):
    n = 4000
    d = Denoiser(Perfect(finite_oracle(FINITE), process, param), process, param)
    for t in times(process)[2:6]:
        floor, err = loss_floor(process, param, FINITE, t, n, gen(5), with_error=True)
        loss = d.loss(
            FINITE[torch.randint(6, (n,), generator=gen(6))],
            t=t.expand(n),
            eps=normal(n, 3, seed=7),
        )
        assert abs(loss.mean() - floor[0]) < 5 * (loss.var() / n + err[0] ** 2).sqrt() + 1e-9


@pairs
def test_the_loss_is_that_of_the_naive_target(process, param):
    t = times(process)
    x0, eps, says = (
        normal(7, 2, 4, 4, seed=1),
        normal(7, 2, 4, 4, seed=2),
        normal(7, 2, 4, 4, seed=3),
    )
    x_t = process.add_noise(x0, t, eps)
    d = Denoiser(lambda x, clock, cond: says, process, param)
    c_skip, c_out, _ = (bcast(c, x0) for c in d.scales(t))
    naive = (x0 - c_skip * x_t) / c_out
    torch.testing.assert_close(d.target(x0, eps, t), naive, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        d.loss(x0, t=t, eps=eps), (says - naive).pow(2).flatten(1).mean(1), rtol=1e-8, atol=0
    )


@pairs
def test_the_loss_weighs_the_image_error_by_c_out(process, param):
    t, x0, eps = times(process), normal(7, 5, seed=1), normal(7, 5, seed=2)
    d = Denoiser(lambda x, clock, cond: x.sin(), process, param)
    error = (d(process.add_noise(x0, t, eps), t) - x0).pow(2).mean(1)
    torch.testing.assert_close(
        d.loss(x0, t=t, eps=eps) * d.scales(t)[1] ** 2, error, rtol=1e-8, atol=1e-14
    )


def test_targets_mean_what_they_are_called():
    x0, eps = normal(5, 3, seed=1), normal(5, 3, seed=2)
    for process in (DDPM(), VP(), Flow()):
        t = times(process)[:5]
        alpha, sigma = process.coeffs(t, x0)
        said = dict(eps=eps, x0=x0, score=-eps)
        if not isinstance(process, Flow):
            said["v"] = alpha * eps - sigma * x0
        else:
            said = dict(x0=x0, velocity=eps - x0)
        for name, target in said.items():
            torch.testing.assert_close(
                Denoiser(None, process, PARAMS[name]).target(x0, eps, t),
                target,
                rtol=1e-10,
                atol=1e-10,
            )


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_edm_has_unit_variances_everywhere_and_is_the_table_at_alpha_1(process):
    sd, t = 0.5, times(process)
    a, s = process.alpha(t), process.sigma(t)
    c_skip, c_out, c_in = edm_param(sd)(a, s)
    torch.testing.assert_close(c_in**2 * (a**2 * sd**2 + s**2), torch.ones_like(a))
    torch.testing.assert_close(
        ((1 - c_skip * a) ** 2 * sd**2 + (c_skip * s) ** 2) / c_out**2,
        torch.ones_like(a),
        rtol=1e-6,
        atol=0,
    )
    one, var = torch.ones_like(s), s**2 + sd**2
    for got, want in zip(edm_param(sd)(one, s), (sd**2 / var, s * sd / var.sqrt(), 1 / var.sqrt())):
        torch.testing.assert_close(got, want)
    # on alpha^2 + sigma^2 = 1 with unit data it is v, up to sign
    if not isinstance(process, (VE, Flow)):
        for got, want in zip(edm_param(1.0)(a, s), (a, s, one)):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "process, t, name",
    [
        (DDPM(), 1, "v"),
        (DDPM(), 0.01, "v"),
        (Flow(), 1e-5, "velocity"),
        (Flow(), 1e-5, "v"),
        (VP(), 1e-6, "eps"),
        (VP(), 1e-6, "edm"),
    ],
)
def test_float32_targets_keep_their_digits_where_sigma_is_small(process, t, name):
    x0, eps = normal(200, 16, seed=1), normal(200, 16, seed=2)
    t, d = torch.full((200,), t), Denoiser(None, process, PREDICTIONS[name])
    alpha, sigma = process.alpha(t.double())[:, None], process.sigma(t.double())[:, None]
    c_skip, c_out, _ = (c[:, None] for c in d.scales(t))
    true = (1 - c_skip * alpha) / c_out * x0 - c_skip * sigma / c_out * eps
    got = d.target(x0.float(), eps.float(), t)
    assert got.dtype == torch.float32
    assert (got - true).abs().max() < 1e-5  # float32 numbers of size 10
    naive = (
        x0.float() - c_skip.float() * (alpha.float() * x0.float() + sigma.float() * eps.float())
    ) / c_out.float()
    assert (naive - true).abs().max() > 10 * (got - true).abs().max()


# ---------------------------------------------------------------- the Denoiser


@pytest.mark.parametrize("process", [Flow(), Cos()], ids=["flow", "cos"])
@pytest.mark.parametrize("param", [eps_param, score_param], ids=["eps", "score"])
def test_a_prediction_that_the_process_cannot_carry(process, param):
    with pytest.raises(
        ValueError, match=rf"{param.__name__} does not work with {type(process).__name__}.*v_param"
    ):
        Denoiser(None, process, param)


@pytest.mark.parametrize("process", [*PROCESSES.values(), Cos()], ids=[*PROCESSES, "cos"])
@pytest.mark.parametrize("name", ["x0", "v", "velocity", "edm"])
def test_predictions_that_every_process_carries(process, name):
    Denoiser(None, process, PREDICTIONS[name])


def test_nan_scales_are_refused():
    with pytest.raises(ValueError, match="nan_param does not work"):

        def nan_param(alpha, sigma):
            return alpha, sigma * torch.nan, alpha

        Denoiser(None, DDPM(), nan_param)


def test_making_a_denoiser_draws_no_random_numbers():
    before = torch.get_rng_state()
    Denoiser(None, DDPM())
    assert torch.equal(torch.get_rng_state(), before)


class Spy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(8, 8), []

    def forward(self, x, clock, cond):
        y = self.layer(x)
        self.seen.append((x.dtype, y.dtype, clock.clone(), cond))
        return y


@pytest.mark.parametrize(
    "process, param",
    [(DDPM(), eps_param), (DDPM(), v_param), (VE(), edm_param(0.5))],
    ids=["eps", "v", "edm"],
)
def test_bfloat16_inside_the_network_float32_outside(process, param):
    d, x, t = Denoiser(Spy(), process, param), normal(4, 8).float(), times(process, 4)
    with torch.autocast("cpu", torch.bfloat16):
        x0_hat, loss = d(x, t), d.loss(x, t=t)
    assert d.net.seen[0][:2] == (
        torch.float32,
        torch.bfloat16,
    ), "autocast was not on inside the network"
    assert x0_hat.dtype == loss.dtype == torch.float32
    c_skip, c_out, c_in = (c[:, None] for c in d.scales(t))
    with torch.autocast("cpu", torch.bfloat16):
        said = d.net.layer((c_in * x).float())
    torch.testing.assert_close(
        x0_hat, (c_skip * x + c_out * said.double()).float(), rtol=1e-5, atol=1e-5
    )  # scaled in float32


def test_the_type_of_x_comes_back_whatever_the_network_returns():
    for x_type, net_type in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ):
        d = Denoiser(lambda x, clock, cond: x.to(net_type), DDPM(), v_param)
        assert d(torch.ones(2, 3, dtype=x_type), 5).dtype == x_type


def test_the_network_gets_the_clock_and_the_condition_untouched():
    d, cond = Denoiser(Spy(), DDPM(T=20), eps_param), dict(anything="opaque")
    d(normal(3, 8).float(), torch.tensor([1, 10, 20]), cond)
    assert d.net.seen[0][2].tolist() == [50, 500, 1000] and d.net.seen[0][3] is cond
    d.loss(normal(3, 8).float(), cond, t=torch.tensor([1, 10, 20]))
    assert d.net.seen[1][2].tolist() == [50, 500, 1000] and d.net.seen[1][3] is cond


def test_one_time_for_all_is_a_time_for_each():
    d, x, eps = Denoiser(Spy(), DDPM()), normal(3, 8).float(), normal(3, 8, seed=1).float()
    assert torch.equal(d(x, 7), d(x, torch.tensor([7, 7, 7])))
    assert torch.equal(d.loss(x, t=7, eps=eps), d.loss(x, t=torch.tensor([7, 7, 7]), eps=eps))


def test_loss_is_reproducible_and_draws_times_and_noise():
    d, x = Denoiser(Spy(), DDPM()), normal(64, 8).float()
    assert torch.equal(d.loss(x, generator=gen(3)), d.loss(x, generator=gen(3)))
    assert not torch.equal(d.loss(x, generator=gen(3)), d.loss(x, generator=gen(4)))
    assert len(d.net.seen[0][2].unique()) > 32  # a time of its own for each example


def test_only_the_network_is_in_the_state_dict():
    assert all(k.startswith("net.") for k in Denoiser(Spy(), DDPM()).state_dict())


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 4),
    C=st.integers(1, 3),
    space=st.lists(st.integers(1, 5), max_size=3),
    name=st.sampled_from(sorted(PREDICTIONS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_any_shape_comes_back(B, C, space, name, dtype, seed):
    process, x0 = DDPM(), normal(B, C, *space, seed=seed).to(dtype)
    eps, t = normal(*x0.shape, seed=seed + 100).to(dtype), process.sample_t(B, generator=gen(seed))
    d = Denoiser(lambda x, clock, cond: d.target(x0, eps, t), process, PREDICTIONS[name])
    x_t = process.add_noise(x0, t, eps)
    x0_hat, loss = d(x_t, t), d.loss(x0, t=t, eps=eps)
    assert (x0_hat.shape, x0_hat.dtype, loss.shape, loss.dtype) == (x0.shape, dtype, (B,), dtype)
    assert loss.max() == 0
    # 1/alpha is up to 157
    assert (x0_hat - x0).abs().max() < (1e-2 if dtype == torch.float32 else 1e-10)
    one = torch.cat([d.target(x0[i : i + 1], eps[i : i + 1], t[i : i + 1]) for i in range(B)])
    torch.testing.assert_close(one, d.target(x0, eps, t))  # examples do not mix


# ---------------------------------------------------------------- the exact denoiser


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_exact_denoiser_is_the_definition(process):
    x0s, t = normal(50, 2, 4, 4, seed=1), times(process)
    x = process.add_noise(x0s[:7], t, normal(7, 2, 4, 4, seed=2))
    assert (
        exact_denoiser(process, x0s)(x, t) - finite_oracle(x0s)(process, x, t)
    ).abs().max() < 1e-10
    w = exact_weights(process, x0s, x, t)
    assert w.shape == (7, 50) and torch.allclose(w.sum(1), torch.ones(7).double())


def test_two_numbers_give_a_hyperbolic_tangent():
    process, x, t = DDPM(), torch.linspace(-5, 5, 101).double()[:, None], torch.full((101,), 300)
    a, s = process.alpha(t)[:, None], process.sigma(t)[:, None]
    two = torch.tensor([[1.0], [-1.0]]).double()
    assert (exact_denoiser(process, two)(x, t) - (a * x / s**2).tanh()).abs().max() < 1e-12


def test_its_slope_is_the_posterior_covariance():
    """Tweedie, second order: d x0_hat / d x_t = alpha / sigma^2 * Cov[x0 | x_t]; so it can be
    differentiated."""
    process, x, t = DDPM(), normal(1, 3, seed=1), torch.tensor([400])
    slope = torch.autograd.functional.jacobian(
        lambda z: exact_denoiser(process, FINITE)(z, t)[0], x
    )[:, 0]
    w = exact_weights(process, FINITE, x, t)[0]
    centred = FINITE - w @ FINITE
    torch.testing.assert_close(
        slope, process.alpha(t) / process.sigma(t) ** 2 * (centred.T * w) @ centred
    )


@pytest.mark.parametrize("sigma", [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 50.0])
def test_float32_data_with_neighbours_as_close_as_the_noise(sigma):
    """Members far from 0 that differ by about sigma: the expanded square in float32 would return
    the wrong ones."""
    process = VE()
    process.sigma = lambda t: torch.full_like(t, sigma)
    base = 1 + normal(40, 1, 64, seed=1)
    x0s = (base + sigma / 8 * normal(40, 25, 64, seed=2)).reshape(1000, 64).float()
    x, t = (x0s[:9].double() + sigma * normal(9, 64, seed=3)).float(), torch.ones(9)
    want = finite_oracle(x0s.double())(process, x.double(), t.double())
    got = exact_denoiser(process, x0s)(x, t)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-6 * x0s.abs().max()
    w = exact_weights(process, x0s, x, t)
    plain = ((x @ x0s.T - x0s.pow(2).sum(1) / 2) / sigma**2).softmax(1)  # all in float32
    if sigma <= 1e-3:
        assert (plain - w).abs().max() > 0.1, "then the care is not needed"


def test_sixty_thousand_members():
    process, x0s = DDPM(), normal(60_000, 48, seed=1).float()
    for t in (torch.tensor([1, 100]), torch.tensor([500, 1000])):
        x = process.add_noise(x0s[:2], t, normal(2, 48, seed=2).float())
        want = finite_oracle(x0s.double())(process, x.double(), t)
        assert (exact_denoiser(process, x0s)(x, t) - want).abs().max() < 1e-6


def test_without_noise_the_nearest_member_and_without_signal_the_mean():
    flow, x0s = Flow(), normal(20, 3, seed=1).float()
    denoise = exact_denoiser(flow, x0s)
    assert torch.equal(denoise(x0s, 0.0), x0s)
    assert torch.equal(denoise(x0s + 1e-3, torch.zeros(20)), x0s)
    twins = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert torch.equal(
        exact_denoiser(flow, twins)(torch.tensor([[0.0, 5.0]]), 0.0), torch.zeros(1, 2)
    )  # a tie is halved
    torch.testing.assert_close(
        denoise(1e3 * x0s, 1.0), x0s.mean(0).expand(20, 3), rtol=0, atol=1e-6
    )
    assert torch.equal(exact_denoiser(DDPM(), x0s)(x0s, 0), x0s)
    assert exact_denoiser(DDPM(), x0s)(1e6 * x0s, 1).isfinite().all()  # nowhere near any member


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(1, 12),
    B=st.integers(0, 9),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    chunk=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_chunks_order_and_shapes_do_not_matter(N, B, shape, chunk, seed):
    process, x0s, x = DDPM(), normal(N, *shape, seed=seed), normal(B, *shape, seed=seed + 1)
    t = process.sample_t(B, generator=gen(seed))
    want = exact_denoiser(process, x0s)(x, t)
    assert want.shape == x.shape
    torch.testing.assert_close(exact_denoiser(process, x0s, chunk=chunk)(x, t), want)
    torch.testing.assert_close(
        exact_denoiser(process, x0s[torch.randperm(N, generator=gen(seed))])(x, t), want
    )
    # copies of all change nothing
    torch.testing.assert_close(exact_denoiser(process, torch.cat([x0s, x0s]))(x, t), want)
    if B:
        assert want.max() <= x0s.max() + 1e-9 and want.min() >= x0s.min() - 1e-9  # an average


@settings(max_examples=30, deadline=None)
@given(K=st.integers(1, 4), B=st.integers(1, 6), seed=st.integers(0, 99))
def test_labels_choose_the_members(K, B, seed):
    process, x0s = DDPM(), normal(12, 3, seed=seed)
    labels = torch.arange(12) % K
    x, t, asked = (
        normal(B, 3, seed=seed + 1),
        process.sample_t(B, generator=gen(seed)),
        torch.randint(K + 1, (B,), generator=gen(seed)),
    )
    got = exact_denoiser(process, x0s, labels, chunk=4)(x, t, asked)
    for i in range(B):
        part = x0s[labels == asked[i]] if asked[i] < K else x0s  # K is carried by none: no label
        torch.testing.assert_close(
            got[i : i + 1], exact_denoiser(process, part)(x[i : i + 1], t[i : i + 1])
        )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: exact_denoiser(p, torch.zeros(3, 4, dtype=torch.uint8)), "to_float"),
        (lambda p: exact_denoiser(p, torch.zeros(0, 4)), "empty"),
        (
            lambda p: exact_denoiser(p, torch.zeros(3, 4))(torch.zeros(2, 5), torch.tensor([1, 1])),
            r"\(2, 5\)",
        ),
        (
            lambda p: exact_denoiser(p, torch.zeros(3, 4))(
                torch.zeros(2, 4), 1, torch.tensor([0, 1])
            ),
            "without labels",
        ),
        (lambda p: exact_denoiser(p, torch.zeros(3, 4), torch.zeros(2)), "2 labels for 3"),
        (lambda p: loss_floor(p, eps_param, torch.zeros(3, 4), torch.tensor([0, 5])), "above 0"),
        (lambda p: loss_floor(p, eps_param, torch.zeros(3, 4), 5, n=0), "n is"),
        (lambda p: loss_floor(p, eps_param, torch.zeros(3, 4, dtype=torch.uint8), 5), "to_float"),
        (
            lambda p: loss_floor(p, eps_param, torch.zeros(3, 4), 5, labels=torch.zeros(2)),
            "2 labels for 3",
        ),
    ],
    ids=[
        "uint8",
        "empty",
        "shape",
        "no labels",
        "few labels",
        "t = 0",
        "n = 0",
        "uint8 floor",
        "few labels floor",
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make(DDPM())


# ---------------------------------------------------------------- the loss floor


def pair_floor(a, s, gap):
    """Posterior variance of two numbers that lie `gap` apart, averaged over x_t: an integral that
    has no cancellation."""
    h, z = gap / 2, torch.linspace(-12, 12, 40_001).double()  # members -h and +h; x_t = a h + s z
    density = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    return torch.trapezoid(density * (h / (a * h * (a * h + s * z) / s**2).cosh()) ** 2, z)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("t", [1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9])
def test_floor_of_a_pair_down_to_small_t(t, offset):
    flow, gap = Flow(), 4 * t  # so that the two stay in doubt however small t is
    x0s = offset + torch.tensor([[-gap / 2], [gap / 2]]).double()
    floor, err = loss_floor(flow, x0_param, x0s, t, 20_000, gen(0), with_error=True)
    truth = pair_floor(flow.alpha(torch.tensor(t).double()), torch.tensor(t).double(), gap)
    assert 0 < err[0] < 0.02 * truth
    assert abs(floor[0] - truth) < 5 * err[0]


def test_floor_is_zero_where_members_can_be_told_apart():
    x0s = normal(500, 64, seed=1).float()
    floor = loss_floor(DDPM(), eps_param, x0s, torch.tensor([1, 5, 20]), 64, gen(0))
    # |x|^2 - |mean|^2 in float32 would leave 1e-3 at t = 1
    assert (floor >= 0).all() and floor.max() < 1e-8


def test_floor_is_never_negative():
    # weights of 1/3: |x|^2 - |mean|^2 is 0 up to rounding, of either sign
    x0s = normal(7, 50, seed=1).repeat(3, 1)
    floor = torch.stack(
        [loss_floor(DDPM(), x0_param, x0s, torch.tensor([2, 3]), 2, gen(i)) for i in range(20)]
    )
    assert (floor >= 0).all() and floor.max() < 1e-12


def test_floor_at_the_noise_end_is_the_variance_of_the_data():
    x0s = normal(40, 5, seed=1)
    floor = loss_floor(Flow(), x0_param, x0s, 1.0, 8)
    torch.testing.assert_close(floor[0], x0s.var(0, correction=0).mean())
    # c_out = -1 there
    torch.testing.assert_close(loss_floor(Flow(), PARAMS["velocity"], x0s, 1.0, 8), floor)


@pairs
def test_one_run_serves_every_prediction(process, param):
    t = times(process)[1:6]
    image = loss_floor(process, x0_param, FINITE, t, 64, gen(1))
    c_out = param(process.alpha(t), process.sigma(t))[1]
    torch.testing.assert_close(loss_floor(process, param, FINITE, t, 64, gen(1)), image / c_out**2)


def test_the_standard_error_is_honest_and_beats_the_naive_estimate():
    process, t, n = DDPM(), torch.tensor([500]), 64
    x0s = normal(8, 4, seed=1)
    truth = loss_floor(process, eps_param, x0s, t, 200_000, gen(0))[0]
    runs = [loss_floor(process, eps_param, x0s, t, n, gen(i), with_error=True) for i in range(300)]
    z = torch.stack([(f[0] - truth) / e[0] for f, e in runs])
    assert abs(z.mean()) < 0.3 and 0.85 < z.std() < 1.2
    d = Denoiser(Perfect(finite_oracle(x0s), process, eps_param), process)
    one = d.loss(
        x0s[torch.randint(8, (50_000,), generator=gen(1))], t=500, eps=normal(50_000, 4, seed=2)
    )
    assert torch.stack([e[0] for _, e in runs]).mean() < 0.8 * one.std() / n**0.5


def test_being_told_the_label_lowers_the_floor():
    process, labels, t = Flow(), torch.arange(6) % 3, torch.tensor([0.5, 1.0])
    told, err = loss_floor(
        process, x0_param, FINITE, t, 4000, gen(0), labels=labels, with_error=True
    )
    assert (told < loss_floor(process, x0_param, FINITE, t, 4000, gen(0))).all()
    within = torch.stack([FINITE[labels == k].var(0, correction=0).mean() for k in range(3)]).mean()
    # at the noise end: the variance inside a class, classes drawn at random
    assert abs(told[1] - within) < 4 * err[1]
    whole = loss_floor(process, x0_param, FINITE, t, 100, gen(0), labels=torch.zeros(6))
    # one class for all says nothing
    torch.testing.assert_close(whole, loss_floor(process, x0_param, FINITE, t, 100, gen(0)))


def test_floor_shapes_types_and_chunks():
    x0s = normal(9, 1, 4, 4, seed=1).float()
    whole = loss_floor(DDPM(), eps_param, x0s, torch.tensor([100, 500, 900]), 50, gen(0))
    assert whole.shape == (3,) and whole.dtype == torch.float32
    assert loss_floor(DDPM(), eps_param, x0s, 500, 10).shape == (1,)
    small, err = loss_floor(
        DDPM(), eps_param, x0s, torch.tensor([100, 500, 900]), 50, gen(0), with_error=True, chunk=7
    )
    assert ((small - whole).abs() < 6 * err + 1e-6).all()  # other random numbers, same truth


# ---------------------------------------------------------------- weights, times, descriptions
def wave(x, clock, cond):
    return (2 * x).sin()


@pytest.mark.parametrize("process", [DDPM(), DDPM(1000, "cosine")], ids=["linear", "cosine"])
@pytest.mark.parametrize("param, weight", dict(eps="snr", score="snr", x0="x0", v="v").items())
def test_the_plain_loss_is_a_weight_of_the_image_error(process, param, weight):
    x0 = torch.randn(64, 3, generator=gen(0), dtype=torch.float64)
    told = Denoiser(wave, process, param, weight=weight).loss(x0, generator=gen(1))
    torch.testing.assert_close(Denoiser(wave, process, param).loss(x0, generator=gen(1)), told)


def test_edms_weight_is_that_of_its_table():
    from ddpm_course.edm import EDM

    x0 = torch.randn(64, 3, generator=gen(0), dtype=torch.float64)
    weight, param = (dict(name="edm", sigma_data=0.7) for _ in range(2))
    for process in (EDM(), DDPM()):
        told = Denoiser(wave, process, param, weight=weight).loss(x0, generator=gen(1))
        plain = Denoiser(wave, process, param).loss(x0, generator=gen(1))
        torch.testing.assert_close(plain, told, rtol=1e-5, atol=1e-8)
    sigma = torch.tensor([0.1, 3.0], dtype=torch.float64)
    got = build("weight", "edm", sigma_data=0.7)(torch.ones(2, dtype=torch.float64), sigma)
    torch.testing.assert_close(got, (sigma**2 + 0.49) / (0.7 * sigma) ** 2)


@pytest.mark.parametrize("param", ["eps", "x0", "v"])
def test_min_snr_is_the_same_loss_of_the_image_whatever_is_predicted(param):
    "And for an eps network that is wrong by a constant, min(snr, gamma) / snr times its loss."
    process, x0 = DDPM(), torch.randn(40, 3, generator=gen(0), dtype=torch.float64)
    d = Denoiser(wave, process, param, weight=dict(name="min_snr", gamma=3.0))
    t, eps = process.sample_t(40, generator=gen(1)), torch.randn(x0.shape, dtype=torch.float64)
    off = d(process.add_noise(x0, t, eps), t) - x0
    want = process.snr(t).clamp(max=3) * off.pow(2).mean(1)
    torch.testing.assert_close(d.loss(x0, t=t, eps=eps), want, rtol=1e-7, atol=1e-9)
    assert d.loss(x0, t=t, eps=eps).shape == (40,)


def test_times_are_drawn_where_it_is_told_to_look():
    process, seen = DDPM(), []
    net = lambda x, clock, cond: seen.append(clock) or x
    x0 = torch.zeros(5000, 1)
    Denoiser(net, process, "x0", times="logit_normal").loss(x0, generator=gen(0))
    Denoiser(net, process, "x0", times=dict(name="logit_normal", mean=2.0)).loss(x0)
    Denoiser(net, process, "x0", times=lambda p, n, device, g: torch.full((n,), 7)).loss(x0)
    Denoiser(net, process, "x0").loss(x0, generator=gen(0))
    Denoiser(net, process, "x0", times="process").loss(x0, generator=gen(0))
    middle, late, seven, plain, own = seen
    assert 0.15 < (middle / 1000).var() ** 0.5 < 0.25 < (plain / 1000).var() ** 0.5
    assert late.median() > 850 and (seven == 7).all() and torch.equal(plain, own)


def test_log_normal_levels_on_any_process():
    from ddpm_course.edm import EDM
    from ddpm_course.sde import VP

    for process in (DDPM(1000, "cosine"), VP(), EDM()):
        t = build("times", "log_normal", mean=-0.5, std=0.8)(process, 4000, generator=gen(2))
        level = (process.sigma(t.double()) / process.alpha(t.double())).log()
        assert abs(level.mean() + 0.5) < 0.06 and abs(level.std() - 0.8) < 0.04
        assert t.dtype == torch.float32 and t.max() <= process.t_max


def test_a_denoiser_comes_back_from_its_description():
    first = Denoiser(
        wave,
        DDPM(50, "cosine"),
        dict(name="edm", sigma_data=0.3),
        weight=dict(name="min_snr", gamma=2.0),
        times=dict(name="logit_normal", std=0.5),
    )
    told = json.loads(json.dumps(first.config))
    again, x0 = Denoiser(wave, **told), torch.randn(20, 3)
    assert again.config == first.config == told
    assert torch.equal(again.loss(x0, generator=gen(0)), first.loss(x0, generator=gen(0)))
    plain = Denoiser(wave, DDPM(), eps_param)
    rest = dict(param=dict(name="eps"), weight=None, times=None)
    assert plain.config == dict(process=DDPM().config) | rest


def test_what_has_no_name_cannot_be_written_down():
    mine = lambda alpha, sigma: x0_param(alpha, sigma)
    d = Denoiser(wave, DDPM(), mine)  # it trains all the same
    assert d.loss(torch.zeros(3, 2)).shape == (3,)
    with pytest.raises(ValueError, match="cannot be written down.*@enter\\('prediction'"):
        d.config
    for kw, near in ((dict(weight="min_srn"), "min_snr"), (dict(times="logit"), "logit_normal")):
        with pytest.raises(ValueError, match=f"Did you mean '{near}'"):
            Denoiser(wave, DDPM(), "x0", **kw)


def test_every_frame_may_have_its_own_time():
    d = Denoiser(lambda x, clock, cond: x.tanh(), DDPM(), v_param, weight="min_snr")
    x0, t = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(1, 1000, (2, 5))
    eps = torch.randn(x0.shape, dtype=torch.float64)
    x = d.process.add_noise(x0, t, eps)
    alone = torch.stack([d(x[:, :, f], t[:, f]) for f in range(5)], 2)
    torch.testing.assert_close(d(x, t), alone)
    losses = [d.loss(x0[:, :, f], t=t[:, f], eps=eps[:, :, f]) for f in range(5)]
    torch.testing.assert_close(d.loss(x0, t=t, eps=eps), torch.stack(losses).mean(0))


def test_conditions_of_any_shape_pass_through_untouched():
    seen, cond = [], dict(words=torch.ones(2, 7), sizes=(torch.zeros(2), None))
    net = lambda x, clock, cond: seen.append(cond) or x
    d = Denoiser(net, DDPM(), "x0")
    d.loss(torch.zeros(2, 3), cond), d(torch.zeros(2, 3), 5, cond)
    assert seen[0] is cond and seen[1] is cond
