"""SDEs against closed forms: drift and diffusion of every process, orders of every step, moments of
stochastic samplers, the adaptive solver, the dictionary of times."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_course.core import example_generators
from ddpm_course.edm import EDM
from ddpm_course.flow import Flow
from ddpm_course.model import make_process, make_step
from ddpm_course.process import DDPM
from ddpm_course.sampling import ancestral, euler, heun, sample
from ddpm_course.score import NCSN, GaussianMixture, score_of
from ddpm_course.sde import (
    VE,
    VP,
    SubVP,
    corrected,
    drift_diffusion,
    euler_maruyama,
    forward_path,
    probability_flow,
    rates,
    solve_ode,
    time_of,
)

F64 = torch.float64
SDES = {"vp": VP(), "sub_vp": SubVP(), "ve": VE(0.01, 5.0)}
SMOOTH = SDES | {"edm": EDM(), "flow": Flow()}
ALL = SMOOTH | {"ddpm": DDPM(), "cosine": DDPM(schedule="cosine"), "ncsn": NCSN(50, 0.01, 3.0)}
C = 0.5  # standard deviation of the normal data
ONE = GaussianMixture(torch.zeros(1, 1, dtype=F64), C)
TWO = GaussianMixture(
    torch.tensor([[-0.6, 0.1], [0.5, 0.3]], dtype=F64),
    torch.tensor([0.1, 0.2]),
    torch.tensor([0.3, 0.7]),
)


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def times(*t):
    return torch.tensor(t, dtype=F64)


def line(a, b, n):
    return torch.linspace(a, b, n + 1, dtype=F64)


def variance(p, t, c=C):
    return c**2 * p.alpha(t) ** 2 + p.sigma(t) ** 2


def order(errors):
    return math.log2(errors[-2] / errors[-1])


# ---------------------------------------------------------------- rates, drift, diffusion
@pytest.mark.parametrize("name", SMOOTH)
def test_rates_are_the_slopes(name):
    p = SMOOTH[name]
    t, h = p.t_max * torch.linspace(0.05, 0.95, 19, dtype=F64), 1e-5 * p.t_max
    for f, rate in zip((p.alpha, p.sigma), rates(p, t)):
        torch.testing.assert_close(rate, (f(t + h) - f(t - h)) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "p",
    [DDPM(), DDPM(schedule="cosine"), DDPM(50), NCSN(50, 0.01, 3.0)],
    ids=lambda p: str(p.config),
)
# a table has kinks, where a derivative may come out as 0
def test_at_whole_steps_the_rate_is_that_of_the_step_which_ends_there(p):
    t = torch.arange(1, p.t_max + 1)
    f, g2 = drift_diffusion(p, t)
    change = (
        (p.alpha(t) / p.alpha(t - 1)).log()
        if p.config["name"] == "ddpm"
        else torch.zeros(len(t), dtype=F64)
    )
    torch.testing.assert_close(f, change, rtol=1e-7, atol=1e-12)
    if p.config["name"] == "ddpm":
        torch.testing.assert_close(g2, -(1 - p.betas).log(), rtol=1e-7, atol=0)
    else:
        torch.testing.assert_close(
            g2, 2 * p.sigma(t) * (p.sigma(t) - p.sigma(t - 1)), rtol=1e-7, atol=0
        )


@settings(deadline=None, max_examples=30)
@given(lo=st.floats(0.01, 1), hi=st.floats(1, 50), t=st.floats(0, 1))
def test_closed_forms(lo, hi, t):
    u, beta = times(t), lo + (hi - lo) * t
    f, g2 = drift_diffusion(VP(lo, hi), u)
    assert math.isclose(f, -beta / 2, rel_tol=1e-6) and math.isclose(g2, beta, rel_tol=1e-6)
    integral = -VP(lo, hi).log_abar(u).item()
    assert math.isclose(
        drift_diffusion(SubVP(lo, hi), u)[1],
        -beta * math.expm1(-2 * integral),
        rel_tol=1e-6,
        abs_tol=1e-6,
    )
    f, g2 = drift_diffusion(VE(lo / 2, hi), u)
    assert f == 0 and math.isclose(
        g2, (lo / 2 * (2 * hi / lo) ** t) ** 2 * 2 * math.log(2 * hi / lo), rel_tol=1e-6
    )


@pytest.mark.parametrize("name", ALL)
# over an interval: sigma(b)^2 = keep^2 sigma(a)^2 + integral
def test_g2_is_what_the_variance_lacks(name):
    p = ALL[name]
    ts = p.t_max * line(0.3, 0.31, 2000)
    mid = (ts[1:] + ts[:-1]) / 2
    f, g2 = drift_diffusion(p, mid)
    v, dt = p.sigma(ts[0]) ** 2, ts[1] - ts[0]
    for a, b in zip(f.tolist(), g2.tolist()):
        v = math.exp(2 * a * dt) * v + b * dt
    torch.testing.assert_close(v, p.sigma(ts[-1]) ** 2, rtol=1e-5, atol=0)


def test_times_of_any_kind():
    a = drift_diffusion(DDPM(), torch.tensor([7]))
    for t in (torch.tensor([7.0]), torch.tensor(7).expand(1), times(7)):
        torch.testing.assert_close(drift_diffusion(DDPM(), t), a)
    f, g2 = drift_diffusion(VP(), torch.zeros(3))  # at 0 sigma rises infinitely steeply
    torch.testing.assert_close(g2, torch.full((3,), 0.1, dtype=F64), rtol=1e-6, atol=0)
    assert f.isfinite().all()
    with torch.inference_mode():
        assert rates(VP(), torch.tensor(0.5).expand(4))[0].shape == (4,)
    assert VP().alpha(torch.tensor(0.5)).dtype == VE().sigma(torch.tensor(0.5)).dtype == F64


def test_no_sde_where_alpha_is_0():
    x, d = torch.ones(2, 2, dtype=F64), TWO.denoiser(Flow())
    for call in (
        lambda: drift_diffusion(Flow(), times(0.5, 1.0)),
        lambda: euler_maruyama(d, Flow(), x, times(1, 1), times(0.9, 0.9)),
        lambda: forward_path(Flow(), x, line(0.5, 1.5, 4)),
    ):
        with pytest.raises(ValueError, match="Flow has no SDE"):
            call()
    assert sample(d, Flow(), x, line(0.99, 0, 10), euler_maruyama).isfinite().all()
    assert drift_diffusion(SubVP(), times(1.0))[1].isfinite().all()


# ---------------------------------------------------------------- forth
@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "ddpm"])
def test_forward_moments(name):
    p, N = ALL[name], 8000
    ts = p.t_max * line(0, 0.6, 600)
    path = forward_path(p, torch.full((N,), 0.8, dtype=F64), ts, seeded())
    assert path.shape == (601, N) and (path[0] == 0.8).all()
    for i in (100, 300, 600):  # four standard errors of chance and 1.5% for the size of the steps
        alpha, sigma = p.alpha(ts[i]), p.sigma(ts[i])
        assert abs(path[i].mean() - 0.8 * alpha) < 4 * sigma / N**0.5 + 0.015 * alpha
        assert abs(path[i].var() / sigma**2 - 1) < 4 * (2 / N) ** 0.5 + 0.015


@pytest.mark.parametrize("name", SDES)
def test_forward_order(name):
    p, errors = SDES[name], []
    for n in (80, 160):
        v, dt = 0.0, 0.5 / n
        for f, g2 in zip(*drift_diffusion(p, line(0, 0.5, n)[:-1])):
            v = (1 + f * dt) ** 2 * v + g2 * dt
        errors.append(abs(v / p.sigma(times(0.5)) ** 2 - 1).item())
    assert abs(order(errors) - 1) < 0.1


def test_forward_path_is_seeded_and_any_shape():
    x = torch.zeros(3, 1, 4, 4)
    a = forward_path(VP(), x, line(0, 1, 5), example_generators(1, 3))
    b = forward_path(VP(), x[1:2], line(0, 1, 5), example_generators(1, 1, 1))
    assert a.shape == (6, 3, 1, 4, 4) and a.dtype == torch.float32 and torch.equal(a[:, 1:2], b)
    for ts in (line(1, 0, 4), times(0.5), times(0.1, 0.1)):
        with pytest.raises(ValueError, match="rise"):
            forward_path(VP(), x, ts)


# ---------------------------------------------------------------- back: the ODE
@pytest.mark.parametrize("name", ALL)
def test_flow_is_drift_minus_half_the_score(name):
    p = ALL[name]
    d, x, t = (
        TWO.denoiser(p),
        torch.randn(5, 2, generator=seeded(), dtype=F64),
        p.t_max * times(0.1, 0.3, 0.5, 0.7, 0.9),
    )
    f, g2 = (v[:, None] for v in drift_diffusion(p, t))
    torch.testing.assert_close(
        probability_flow(d, p)(x, t), f * x - g2 / 2 * score_of(d, p)(x, t), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("name", SDES)
def test_orders_to_a_fixed_time(name):  # error table: Euler 1, Heun 2
    p, x = SDES[name], torch.ones(1, 1, dtype=F64)
    for step, expected in ((euler, 1), (heun, 2)):
        errors = []
        for n in (40, 80, 160):
            ts = line(1, 0.1, n)
            errors.append(
                abs(
                    sample(ONE.denoiser(p), p, x, ts, step).item()
                    / (variance(p, ts[-1]) / variance(p, ts[0])).sqrt().item()
                    - 1
                )
            )
        assert abs(order(errors) - expected) < 0.1, (name, step.__name__, errors)


# ---------------------------------------------------------------- back: the SDE
# a step on N(0, C^2) is gain * x + noise: both exactly, from the same random number at x = 0 and x
# = 1
def probe(step, p, t, s, **kw):
    same = [seeded(3), seeded(3)]
    at_0, at_1 = step(
        ONE.denoiser(p), p, times(0, 1)[:, None], t.expand(2), s.expand(2), generator=same, **kw
    )[0].flatten()
    return at_1 - at_0, (at_0 / torch.randn(1, generator=seeded(3), dtype=F64)) ** 2


@pytest.mark.parametrize("name", SDES)
def test_one_step_of_the_sde(name):  # against the law of x_s given x_t: wrong by dt^2
    p, t, off = SDES[name], times(0.5), []
    for h in (0.01, 0.005):
        s, (gain, fresh) = t - h, probe(euler_maruyama, p, t, t - h)
        r = p.alpha(t) / p.alpha(s)
        beta = p.sigma(t) ** 2 - r**2 * p.sigma(s) ** 2
        true = r * variance(p, s) / variance(p, t), variance(p, s) * beta / (
            r**2 * variance(p, s) + beta
        )
        off.append([abs(a - b).item() for a, b in zip((gain, fresh), true)])
    assert all(3.6 < a / b < 4.4 for a, b in zip(*off))


@pytest.mark.parametrize("name", SDES)
def test_order_of_the_spread(name):  # DDPM's step and Euler-Maruyama's, without chance
    p = SDES[name]
    for step, kw in ((euler_maruyama, {}), (ancestral, {}), (ancestral, dict(variance="beta"))):
        errors = []
        for n in (40, 80):
            ts = line(1, 0.5, n)
            V = variance(p, ts[0])
            for t, s in zip(ts[:-1], ts[1:]):
                gain, fresh = probe(step, p, t, s, **kw)
                V = gain**2 * V + fresh
            errors.append(abs(V / variance(p, ts[-1]) - 1).item())
        assert abs(order(errors) - 1) < 0.25, (name, step.__name__, kw, errors)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_ddpms_step_is_a_step_of_the_sde(name):  # the same noise: 1.5 in a step, 1 in a walk
    p, walks = SDES[name], []
    x = p.add_noise(
        TWO.sample(1000, seeded(1)),
        times(0.5),
        torch.randn(1000, 2, generator=seeded(2), dtype=F64),
    )
    for n in (40, 80):
        for ts in (line(0.5, 0.1, n)[:2], line(0.5, 0.1, n)):
            a, b = (
                sample(TWO.denoiser(p), p, x, ts, step, generator=seeded(4), **kw)
                for step, kw in ((ancestral, dict(variance="beta")), (euler_maruyama, {}))
            )
            walks.append((a - b).pow(2).mean().sqrt().item())
    assert (
        abs(math.log2(walks[0] / walks[2]) - 1.5) < 0.15
        and abs(math.log2(walks[1] / walks[3]) - 1) < 0.15
    )


MOMENTS = {
    "euler_maruyama": euler_maruyama,
    "corrected": corrected(),
    "corrected ODE": corrected(euler, 2),
    "corrected ancestral": corrected(ancestral),
}


@pytest.mark.parametrize("step", MOMENTS)
@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "ddpm"])
# four standard errors of chance; 3% for the steps and the corrector's bias, snr^2
def test_moments_of_samplers(name, step):
    p, N = ALL[name], 2500
    one = GaussianMixture(times(0.3)[:, None], C)
    x = sample(
        one.denoiser(p),
        p,
        p.init_noise((N, 1), generator=seeded(1)).double(),
        p.steps(125),
        MOMENTS[step],
        generator=seeded(2),
    )
    assert abs(x.mean() - 0.3) < 4 * C / N**0.5 + 0.03 * 0.3
    assert abs(x.var() / C**2 - 1) < 4 * (2 / N) ** 0.5 + 0.06


def test_shares_of_a_mixture():
    p, N = VP(), 4000
    x = sample(
        TWO.denoiser(p),
        p,
        p.init_noise((N, 2), generator=seeded(1)).double(),
        p.steps(200),
        euler_maruyama,
        generator=seeded(2),
    )
    assert abs((x[:, 0] < -0.2).double().mean() - 0.3) < 4 * (0.21 / N) ** 0.5 + 0.01


def test_vp_step_like_diffusers():
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

    theirs = ScoreSdeVpScheduler(beta_min=0.1, beta_max=20)
    theirs.set_timesteps(100)
    x, t, d = (
        torch.randn(4, 2, generator=seeded(1), dtype=F64),
        times(0.4, 0.6, 0.8, 1),
        TWO.denoiser(VP()),
    )
    eps = (x - VP().alpha(t)[:, None] * d(x, t)) / VP().sigma(t)[:, None]
    mine = euler_maruyama(d, VP(), x, t, t - 0.01, generator=seeded(5))[0]
    torch.testing.assert_close(
        theirs.step_pred(eps, x, t, generator=seeded(5))[0], mine, rtol=1e-6, atol=1e-6
    )


# their predictor for VE is DDPM's step, variance beta, on NCSN's levels
def test_ve_step_like_diffusers():
    from diffusers import ScoreSdeVeScheduler

    p, theirs = NCSN(50, 0.01, 3.0), ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=3.0)
    theirs.set_timesteps(50)
    theirs.set_sigmas(50, 0.01, 3.0)
    x, t, d = (
        torch.randn(4, 2, generator=seeded(1), dtype=F64),
        torch.full((4,), 30),
        TWO.denoiser(p),
    )
    mine = ancestral(d, p, x, t, t - 1, "beta", generator=seeded(5))[0]
    out = theirs.step_pred(score_of(d, p)(x, t), torch.tensor(29.01 / 49), x, generator=seeded(5))
    torch.testing.assert_close(out.prev_sample, mine, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the corrector
# a Langevin step on N(0, v): gain 1 - size / 2v, and its fixed point v / (1 - size / 4v)
def test_corrector_alone():
    p, t = VP(), times(0.5)
    still = lambda denoise, process, x, t, s, generator=None: (x, x)
    gain, fresh = probe(corrected(still, snr=0.2), p, t, t)
    v, size = variance(p, t), (0.4 * p.sigma(t)) ** 2
    torch.testing.assert_close(gain, 1 - size[0] / (2 * v[0]))
    torch.testing.assert_close(fresh[0], size[0])
    torch.testing.assert_close(fresh / (1 - gain**2), v / (1 - size / (4 * v)))


def test_corrector_counts_and_seeds():
    calls = []

    def denoise(x, t):
        calls.append(t[0].item())
        return TWO.denoiser(VP())(x, t)

    x = VP().init_noise((4, 2), generator=seeded())
    sample(denoise, VP(), x, VP().steps(3), corrected(n=2), generator=seeded())
    assert len(calls) == 3 * 3 - 2  # no corrector at sigma = 0
    a, b = (
        sample(denoise, VP(), x, VP().steps(3), step, generator=seeded(1))
        for step in (corrected(n=0), euler_maruyama)
    )
    assert torch.equal(a, b)
    for step in (euler_maruyama, corrected()):
        whole = sample(denoise, VP(), x, VP().steps(5), step, generator=example_generators(1, 4))
        torch.testing.assert_close(
            whole[2:3],
            sample(
                denoise, VP(), x[2:3], VP().steps(5), step, generator=example_generators(1, 1, 2)
            ),
        )
    for kw in (dict(n=-1), dict(snr=0)):
        with pytest.raises(ValueError, match="corrector"):
            corrected(**kw)


def test_steps_keep_type_and_shape():
    x, d = torch.randn(2, 3, 4, 4), lambda x, t: 0.5 * x
    for step in (
        euler_maruyama,
        corrected(),
        make_step("euler_maruyama"),
        make_step("predictor_corrector"),
    ):
        for out in step(d, SubVP(), x, torch.full((2,), 0.5), torch.full((2,), 0.4)):
            assert out.shape == x.shape and out.dtype == x.dtype
    last = euler_maruyama(
        d, VP(), x, torch.full((2,), 0.1), torch.tensor([0.0, 0.05]), generator=seeded()
    )[0]
    # the one that arrives is the estimate itself
    assert torch.equal(last[0], 0.5 * x[0]) and not torch.equal(last[1], 0.5 * x[1])


# ---------------------------------------------------------------- the adaptive solver
@pytest.mark.parametrize("name", SMOOTH)
def test_solver_against_the_exact_map(name):
    p = SMOOTH[name]
    a, b = p.t_max * times(0.9, 0.02)
    x, asked = torch.tensor([[0.3], [-1.0]], dtype=F64) * variance(p, a).sqrt(), []
    exact = x * (variance(p, b) / variance(p, a)).sqrt()
    for tol in (1e-4, 1e-8):
        y, n = solve_ode(ONE.denoiser(p), p, x, a, b, tol, tol)
        home, _ = solve_ode(ONE.denoiser(p), p, y, b, a, tol, tol)
        asked.append(n)
    torch.testing.assert_close(y, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(home, x, rtol=1e-5, atol=1e-5)
    assert asked[0] < asked[1]


def test_solver_on_the_way():
    ts, x = line(1, 0.1, 4), torch.ones(2, 1, 2, 2)  # float32
    calls = []

    def denoise(x, t):
        calls.append(t)
        return ONE.denoiser(VP())(x.flatten()[:, None], t[:1]).reshape(x.shape)

    way, n = solve_ode(denoise, VP(), x, 1, 0.1, at=ts)
    assert (
        way.shape == (5, 2, 1, 2, 2)
        and way.dtype == x.dtype
        and torch.equal(way[0], x)
        and len(calls) == n
    )
    torch.testing.assert_close(
        way[:, 0, 0, 0, 0],
        (variance(VP(), ts) / variance(VP(), ts[0])).sqrt().float(),
        rtol=1e-3,
        atol=1e-3,
    )
    torch.testing.assert_close(
        way[-1], solve_ode(denoise, VP(), x, 1, 0.1)[0], rtol=1e-4, atol=1e-4
    )


def test_solver_errors():
    x, d = torch.ones(1, 1, dtype=F64), ONE.denoiser(VP())
    for a, b in ((1, 0), (0, 1)):
        with pytest.raises(ValueError, match="where sigma is 0"):
            solve_ode(d, VP(), x, a, b)
    with pytest.raises(ValueError, match="not finite"):
        solve_ode(lambda x, t: x * torch.nan, VP(), x, 1, 0.1)
    with pytest.raises(ValueError, match="t_eval"):
        solve_ode(d, VP(), x, 1, 0.1, at=times(1, 0.05))


# ---------------------------------------------------------------- the dictionary
@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(sorted(ALL)), level=st.floats(0.02, 2.9))
def test_time_of(name, level):
    p = ALL[name]
    t = time_of(p, [level])
    assert 0 < t <= p.t_max and math.isclose(p.sigma(t) / p.alpha(t), level, rel_tol=1e-6)


def test_time_of_ends():
    for p in ALL.values():
        assert (
            time_of(p, 0.0) < 1e-9 * p.t_max
            and time_of(p, [[1e9]]).shape == (1, 1)
            and time_of(p, 1e12) > 0.999 * p.t_max
        )


def test_one_particle_on_all_processes():  # the same path, up to a scale
    level, ends = times(2.5, 0.05), []
    for p in SMOOTH.values():
        a, b = time_of(p, level)
        ends.append(
            solve_ode(
                TWO.denoiser(p),
                p,
                p.alpha(a) * torch.tensor([[1.5, -2.0]], dtype=F64),
                a,
                b,
                1e-7,
                1e-7,
            )[0]
            / p.alpha(b)
        )
    for e in ends[1:]:
        torch.testing.assert_close(e, ends[0], rtol=1e-4, atol=1e-5)


def test_made_by_name():
    for name in ("vp", "sub_vp", "ve"):
        assert make_process(**make_process(name).config).config == make_process(name).config
    for bad in (
        lambda: VP(beta_min=0),
        lambda: SubVP(beta_max=-1),
        lambda: VE(2.0, 1.0),
        lambda: VE(0.0),
    ):
        with pytest.raises(ValueError):
            bad()
