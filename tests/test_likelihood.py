"""Likelihoods against closed forms: normal laws, mixtures and grey levels with known probabilities,
on every process; DDPM's own formulas; bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import nn

from ddpm_course.core import example_generators, to_float
from ddpm_course.denoiser import Denoiser, x0_param
from ddpm_course.edm import EDM
from ddpm_course.flow import Flow
from ddpm_course.likelihood import (
    GREY,
    anchored,
    bits_per_dim,
    decode,
    decoder_log_prob,
    dequantise,
    encode,
    log_likelihood,
    make_probes,
    noise_grid,
    ode_bound,
    slerp,
    variational_bound,
    with_trace,
)
from ddpm_course.process import DDPM
from ddpm_course.sampling import clip_x0, euler, heun
from ddpm_course.score import NCSN, GaussianMixture
from ddpm_course.sde import VE, VP, SubVP, solve_ode

F64 = torch.float64
PROCESSES = dict(
    vp=VP(),
    sub_vp=SubVP(),
    ve=VE(),
    edm=EDM(),
    flow=Flow(),
    ddpm=DDPM(),
    cosine=DDPM(schedule="cosine"),
    ncsn=NCSN(),
)
# no table: an adaptive solver is quick
SMOOTH = {k: p for k, p in PROCESSES.items() if k not in ("ddpm", "cosine", "ncsn")}
BELL = GaussianMixture(torch.zeros(1, 3, dtype=F64), 0.5)
MIX = GaussianMixture(
    torch.tensor([[1.2, 0.4], [-0.8, -0.5]], dtype=F64), torch.tensor([0.3, 0.5]), [0.3, 0.7]
)
LEVELS = GaussianMixture(
    to_float(torch.tensor([[0], [131], [255]], dtype=torch.uint8)).to(F64), 0.0, [0.2, 0.3, 0.5]
)  # three grey levels


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bits(nats, D):
    return nats / (D * math.log(2))


def top(p):
    return torch.tensor(float(p.t_max), dtype=F64)


# ---------------------------------------------------------------- exact densities
@pytest.mark.parametrize("name", ["vp", "ve", "edm", "flow", "ddpm"])
def test_the_ode_finds_the_density_to_a_thousandth_of_a_bit(name):
    p, x = PROCESSES[name], MIX.sample(6, seeded(1))
    kw = dict(exact=True, prior=lambda z: MIX.log_prob(p, z, top(p)))
    found, n = log_likelihood(MIX.denoiser(p), p, x, level=0.003, **kw)
    # rates that jump a thousand times: the adaptive solver has a floor, a grid has none
    if name == "ddpm":
        assert bits(found - MIX.log_prob(p, x, 0.0), 2).abs().max() < 5e-3
        found, n = log_likelihood(MIX.denoiser(p), p, x, noise_grid(p, 400, 0.003), **kw)
    assert (
        bits(found - MIX.log_prob(p, x, 0.0), 2).abs().max() < 1e-3
        and found.shape == (6,)
        and 30 < n <= 800
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_heuns_order_on_a_fixed_grid(name):
    p, x, errors = PROCESSES[name], MIX.sample(6, seeded(1)), []
    end = noise_grid(p, 1, 0.01)[-1]
    blurred = MIX.log_prob(p, p.alpha(end) * x, end) + 2 * p.alpha(end).log()
    for steps in (60, 120):
        found, n = log_likelihood(
            MIX.denoiser(p),
            p,
            x,
            noise_grid(p, steps, 0.01),
            exact=True,
            prior=lambda z: MIX.log_prob(p, z, top(p)),
        )
        errors.append(bits(found - blurred, 2).abs().max().item())
        assert n == 2 * steps
    assert errors[1] < 0.01 and 3 < errors[0] / errors[1] < 5.5


@pytest.mark.parametrize("name", SMOOTH)
def test_a_centred_bell_needs_no_other_prior(name):
    p, x = SMOOTH[name], BELL.sample(20, seeded(2))
    found, _ = log_likelihood(BELL.denoiser(p), p, x, level=0.003, exact=True)
    assert bits(found - BELL.log_prob(p, x, 0.0), 3).abs().max() < 1e-3


def test_stopping_early_means_blurred_data():
    p, x = VP(), BELL.sample(20, seeded(3))
    found, _ = log_likelihood(BELL.denoiser(p), p, x, level=0.2, exact=True, rtol=1e-6, atol=1e-6)
    blurred = GaussianMixture(torch.zeros(1, 3, dtype=F64), math.hypot(0.5, 0.2))
    assert bits(found - blurred.log_prob(p, x, 0.0), 3).abs().max() < 1e-3
    assert bits(found - BELL.log_prob(p, x, 0.0), 3).abs().max() > 0.05


def test_one_probe_is_right_on_average_and_four_are_better():
    x, p = MIX.sample(3, seeded(4)), Flow()
    many, ts = x.repeat_interleave(400, 0), noise_grid(Flow(), 60, 0.01)
    exact = log_likelihood(MIX.denoiser(p), p, x, ts, exact=True)[0]
    one, four = (
        log_likelihood(MIX.denoiser(p), p, many, ts, n_probes=n, generator=seeded(5))[0].reshape(
            3, 400
        )
        - exact[:, None]
        for n in (1, 4)
    )
    assert (one.std(1) > 1e-3).any()
    for e in (one, four):
        assert (e.mean(1).abs() < 4 * e.std(1) / 20 + 1e-9).all()
    assert 0.4 < (four.std() / one.std()) < 0.6  # a quarter of the variance


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, t, cond=None):
        return self.b(torch.tanh(self.a(x)))


def small_model(p):
    torch.manual_seed(0)
    return Denoiser(Small(), p, x0_param)


def test_trace_of_a_network():
    net, x = Small().double(), torch.randn(2, 1, 4, 4, dtype=F64, generator=seeded())
    f = lambda v: net(v, None)
    y, trace = with_trace(f, x, make_probes(x, exact=True))
    for i in range(2):
        J = torch.autograd.functional.jacobian(lambda v: f(v[None])[0].flatten(), x[i]).reshape(
            16, 16
        )
        torch.testing.assert_close(trace[i], J.trace())
    torch.testing.assert_close(y, f(x).detach())
    assert not y.requires_grad and all(w.grad is None for w in net.parameters())


def test_a_network_adaptive_and_fixed_agree_and_leave_no_trace():
    p = Flow()
    model = small_model(p)
    x = torch.randn(2, 1, 4, 4, generator=seeded())
    with torch.no_grad():
        a, _ = log_likelihood(model, p, x, level=0.05, exact=True, rtol=1e-5, atol=1e-5)
        b, _ = log_likelihood(model, p, x, noise_grid(p, 200, 0.05), exact=True)
    assert (
        ((a - b).abs() < 3e-4 * a.abs()).all()
        and not a.requires_grad
        and all(w.grad is None for w in model.parameters())
    )


# ---------------------------------------------------------------- the bound
@pytest.mark.parametrize("name", PROCESSES)
def test_bound_above_the_truth_and_closed_by_the_best_variance(name):
    p, x = PROCESSES[name], BELL.sample(4000, seeded(6))
    truth, few, many = -BELL.log_prob(p, x, 0.0), *(
        variational_bound(BELL.denoiser(p), p, x, n=n, level=0.003, grey=None, generator=seeded(7))
        for n in (40, 160)
    )
    gaps = [bits(b["total"] - truth, 3) for b in (few, many)]
    for g in gaps:
        assert g.mean() > 4 * g.std() / len(g) ** 0.5  # far above: the steps are coarse
    assert 3 < gaps[0].mean() / gaps[1].mean() < 6  # and approaching it
    for b in (few, many):  # each step with its best variance: nothing is left on normal data
        cost = b["prior"] + (1.5 * torch.log1p(2 * b["steps"].mean(1) / 3)).sum() + b["decoder"]
        spread = b["decoder"].std() + 2 * b["steps"].std(1).norm()
        assert abs((cost - truth).mean()) < 4 * spread / len(x) ** 0.5 + 2e-3


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpms_own_formulas(variance):
    p, x0 = DDPM(50), (torch.rand(3, 1, 4, 4, generator=seeded(), dtype=F64) * 2 - 1)
    guess = lambda x, t: (x * 0.7).clamp(-1, 1)
    got = variational_bound(guess, p, x0, p.steps(50)[:-1], variance=variance, generator=seeded(1))
    g, abar, betas = seeded(1), p.abar, torch.cat([torch.zeros(1), p.betas])
    assert got["steps"].shape == (49, 3) and torch.allclose(
        got["total"], got["prior"] + got["steps"].sum(0) + got["decoder"]
    )
    torch.testing.assert_close(
        got["prior"],
        torch.distributions.kl_divergence(
            torch.distributions.Normal(abar[50].sqrt() * x0, (1 - abar[50]).sqrt()),
            torch.distributions.Normal(torch.zeros_like(x0), (1 - abar[50]).sqrt()),
        )
        .flatten(1)
        .sum(1),
    )
    for i, t in enumerate(range(50, 1, -1)):
        x_t = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * torch.randn(
            x0.shape, generator=g, dtype=F64
        )
        tilde = (1 - abar[t - 1]) / (1 - abar[t]) * betas[t]
        mean = (
            lambda x: abar[t - 1].sqrt() * betas[t] / (1 - abar[t]) * x
            + (1 - betas[t]).sqrt() * (1 - abar[t - 1]) / (1 - abar[t]) * x_t
        )
        q, m = torch.distributions.Normal(mean(x0), tilde.sqrt()), torch.distributions.Normal(
            mean(guess(x_t, t)), (tilde if variance == "posterior" else betas[t]).sqrt()
        )
        if variance == "posterior":
            torch.testing.assert_close(
                got["steps"][i], torch.distributions.kl_divergence(q, m).flatten(1).sum(1)
            )
        else:
            # our beta is that of the noise level: smaller by alpha^2 of one step, as the ratio is
            # sigma_s^2 / sigma_t^2
            r = (1 - abar[t - 1]) / (1 - abar[t])
            m = torch.distributions.Normal(m.mean, (tilde / r).sqrt())
            torch.testing.assert_close(
                got["steps"][i], torch.distributions.kl_divergence(q, m).flatten(1).sum(1)
            )
            torch.testing.assert_close(tilde / r, betas[t])  # and that is DDPM's beta


def test_decoder_against_scipy():
    u8 = torch.tensor([0, 1, 100, 254, 255], dtype=torch.uint8)
    x, h = to_float(u8).double()[:, None], 1 / 255
    for mean, std in ((-1.0, 0.01), (0.2, 0.5), (1.3, 0.1)):
        lo, hi = (x.numpy() - h - mean) / std, (x.numpy() + h - mean) / std
        lo[0], hi[-1] = -np.inf, np.inf
        want = np.where(lo + hi > 0, norm.sf(lo) - norm.sf(hi), norm.cdf(hi) - norm.cdf(lo))[:, 0]
        got = decoder_log_prob(x, torch.full_like(x, mean), std).numpy()
        np.testing.assert_allclose(
            got[want > 1e-250], np.log(want[want > 1e-250]), rtol=1e-4, atol=1e-6
        )
        assert (got[want <= 1e-250] < math.log(1e-240)).all()
    # a probability of exp(-1.8 million): no -inf, no nan
    far = decoder_log_prob(torch.full((1, 1), -1.0), torch.full((1, 1), 0.9), 1e-3)
    assert far.isfinite() and far < -1e6


@pytest.mark.parametrize("name", SMOOTH)
def test_grey_levels_with_known_probabilities(name):
    p, x0 = SMOOTH[name], LEVELS.means.repeat_interleave(60, 0)
    truth = LEVELS.log_weights.repeat_interleave(60)
    denoise = LEVELS.denoiser(p)
    bound = variational_bound(denoise, p, x0, n=60, level=0.002, generator=seeded(8))["total"]
    ode, _ = ode_bound(denoise, p, x0, noise_grid(p, 100, 0.002), exact=True, generator=seeded(9))
    for i, w in enumerate((0.2, 0.3, 0.5)):
        b, o = bound[60 * i : 60 * i + 60], -ode[60 * i : 60 * i + 60]
        assert (
            b.mean() + 4 * b.std() / 60**0.5 > -math.log(w)
            and o.mean() + 4 * o.std() / 60**0.5 > -math.log(w) - 0.02
        )
        # tight, but for the decoder: at level 0.002 a grey level holds 95% of its bell
        assert o.mean() < -math.log(w) + 0.25 + 4 * o.std() / 60**0.5
    assert -(truth.mean()) + 0.5 > bound.mean() > -truth.mean() - 4 * bound.std() / 180**0.5


def test_clipping_never_makes_the_bound_worse():
    p, x0 = VP(), torch.rand(5, 1, 4, 4, generator=seeded()) * 2 - 1
    noisy = lambda x, t: 3 * x
    raw, clipped = (
        variational_bound(d, p, x0, n=10, generator=seeded(1)) for d in (noisy, clip_x0(noisy))
    )
    assert (clipped["steps"] <= raw["steps"]).all() and (clipped["total"] < raw["total"]).all()


def test_random_numbers_belong_to_the_example():
    p, x0 = VP(), BELL.sample(4, seeded())

    def whole(k, n):
        return variational_bound(
            BELL.denoiser(p), p, x0[k:n], n=5, grey=None, generator=example_generators(3, n - k, k)
        )["total"]

    def ode(k, n):
        return log_likelihood(
            BELL.denoiser(p),
            p,
            x0[k:n],
            noise_grid(p, 5),
            generator=example_generators(3, n - k, k),
        )[0]

    for f in (whole, ode):
        torch.testing.assert_close(f(0, 4), torch.cat([f(0, 1), f(1, 4)]))


# ---------------------------------------------------------------- small parts
@given(st.floats(0.0, 1.0), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_slerp_is_symmetric_and_keeps_the_length(w, D):
    a, b = torch.randn(2, 3, 2, D, generator=seeded(D), dtype=F64)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).reshape(-1, 1, 1)
    out = slerp(a, b, w)
    torch.testing.assert_close(out, slerp(b, a, 1 - w), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        out.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-6
    )


def test_bits_per_dim_and_dequantise():
    assert bits_per_dim(torch.tensor([0.0]), (3, 4)).item() == 0
    assert bits_per_dim(torch.tensor([0.0]), (3, 4), GREY).item() == pytest.approx(math.log2(127.5))
    x = to_float(torch.full((20000,), 77, dtype=torch.uint8))
    u = dequantise(x, generator=seeded()) - x
    assert (
        u.abs().max() <= GREY / 2 + 1e-7
        and abs(u.mean()) < 4 * GREY / 12**0.5 / 20000**0.5
        and u.std().item() == pytest.approx(GREY / 12**0.5, rel=0.02)
    )


def test_anchored_weighs_by_the_inverse_of_the_errors():
    p, x = VP(), torch.randn(4, 5, generator=seeded(), dtype=F64)
    t, guess = torch.tensor([0.1, 0.3, 0.5, 0.9]).double(), lambda x, t: torch.full_like(x, 0.25)
    ts = torch.tensor([0.0, 1.0])
    same = anchored(guess, p, ts, torch.zeros(2))(x, t)
    torch.testing.assert_close(same, guess(x, t))
    level = p.snr(t) ** -1  # squared
    mixed = anchored(guess, p, ts, torch.tensor([0.04, 0.04]))(x, t)
    want = (0.25 / 0.04 + (x / p.alpha(t)[:, None]) / level[:, None]) / (
        1 / 0.04 + 1 / level[:, None]
    )
    torch.testing.assert_close(mixed, want, rtol=1e-6, atol=1e-8)


def test_anchored_where_alpha_is_0_is_the_networks_estimate():
    "At Flow's noise end the noisy image says nothing of the data: no 0 / 0."
    p, x = Flow(), torch.randn(3, 2, dtype=F64)
    mixed = anchored(
        lambda x, t: x * 0 + 0.3, p, torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.1])
    )
    assert torch.equal(mixed(x, torch.tensor(1.0, dtype=F64)), torch.full_like(x, 0.3))
    assert torch.allclose(mixed(x, torch.tensor(0.0, dtype=F64)), x)


@pytest.mark.parametrize("name", SMOOTH)
def test_encoding_follows_the_ode_and_comes_back(name):
    p, x, law = SMOOTH[name], MIX.sample(6, seeded(1)), MIX
    ts = noise_grid(p, 200, 0.02)
    z = encode(law.denoiser(p), p, x, ts)
    want, _ = solve_ode(
        law.denoiser(p), p, p.alpha(ts[-1]) * x, ts[-1].item(), ts[0].item(), 1e-8, 1e-8
    )
    assert (z - want).abs().max() < 5e-3 * p.sigma(top(p))
    errors = {
        step: [
            (
                decode(
                    law.denoiser(p),
                    p,
                    encode(law.denoiser(p), p, x, n=n, step=step),
                    n=n,
                    step=step,
                )
                - x
            )
            .abs()
            .max()
            .item()
            for n in (50, 100)
        ]
        for step in (euler, heun)
    }
    assert (
        1.6 < errors[euler][0] / errors[euler][1] < 2.8
        and errors[heun][1] < errors[euler][1] / 5
        and errors[heun][0] / errors[heun][1] > 3
    )


def test_shapes_and_grids():
    for shape in ((2, 5), (2, 1, 4, 4), (2, 3, 2, 4, 4)):
        law = GaussianMixture(torch.zeros(1, *shape[1:], dtype=F64), 0.5)
        x = law.sample(2, seeded())
        b = variational_bound(law.denoiser(VP()), VP(), x, n=4, grey=None)
        assert b["total"].shape == (2,) and b["steps"].shape == (4, 2) and len(b["ts"]) == 5
        assert log_likelihood(law.denoiser(VP()), VP(), x, noise_grid(VP(), 4))[0].shape == (2,)
        assert encode(law.denoiser(VP()), VP(), x, n=3).shape == shape
    for p in PROCESSES.values():
        ts = noise_grid(p, 7, 0.03)
        assert (
            len(ts) == 8
            and ts[0] == p.t_max
            and (p.snr(ts[-1]) ** -0.5).item() == pytest.approx(0.03, rel=1e-6)
        )
        assert (p.snr(ts[1:]).log().diff().diff().abs() < 1e-2).all()  # even in log SNR


@pytest.mark.parametrize(
    "said, call",
    [
        (
            "use to_float",
            lambda: log_likelihood(lambda x, t: x, VP(), torch.zeros(1, 2, dtype=torch.uint8)),
        ),
        (
            "above 0, where sigma is 0",
            lambda: variational_bound(lambda x, t: x, DDPM(), torch.zeros(1, 2), DDPM().steps(5)),
        ),
        (
            "times fall",
            lambda: encode(lambda x, t: x, VP(), torch.zeros(1, 2), noise_grid(VP(), 5).flip(0)),
        ),
        ("times fall", lambda: decode(lambda x, t: x, VP(), torch.zeros(1, 2), torch.ones(1))),
        ("not 0", lambda: noise_grid(VP(), 5, 0)),
        ("below 50", lambda: noise_grid(VE(), 5, 60.0)),
        ("at least 1 step", lambda: noise_grid(VP(), -1)),
        ("at least 1 probe", lambda: make_probes(torch.zeros(1, 2), 0)),
        (
            "grey=None",
            lambda: variational_bound(lambda x, t: x, VP(), torch.full((1, 2), 1.5), n=1),
        ),
        (
            "'posterior'",
            lambda: variational_bound(
                lambda x, t: x, VP(), torch.zeros(1, 2), n=1, variance="small"
            ),
        ),
        ("of one shape", lambda: slerp(torch.zeros(2, 3), torch.zeros(1, 3), 0.5)),
    ],
)
def test_bad_input_gets_a_sentence(said, call):
    with pytest.raises(ValueError, match=said):
        call()
