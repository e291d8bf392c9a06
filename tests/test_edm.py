"""EDM's grid, process and churn: the paper's formulas, exact variances, diffusers' schedulers,
seeds, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_course.core import build, example_generators
from ddpm_course.denoiser import Denoiser, edm_param, eps_param
from ddpm_course.edm import EDM, churn, rho_levels, rho_steps
from ddpm_course.flow import Flow
from ddpm_course.model import make_process, make_step
from ddpm_course.process import DDPM
from ddpm_course.sampling import euler, heun, sample
from ddpm_course.score import NCSN, GaussianMixture
from ddpm_course.sde import VE, VP, time_of

F64 = torch.float64
PROCESSES = {
    "edm": EDM(),
    "vp": VP(),
    "ve": VE(),
    "ddpm": DDPM(),
    "cosine": DDPM(schedule="cosine"),
    "ncsn": NCSN(),
    "flow": Flow(),
}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def noisy(B=4, dtype=F64, seed=0):
    return torch.randn(B, 3, 4, 4, generator=seeded(seed), dtype=dtype)


def at(v, B=4):
    return torch.full((B,), v, dtype=F64)


def level(process, t):
    return process.sigma(t) / process.alpha(t)


def gaussian(process, c):  # the exact denoiser of N(0, c^2)
    def denoise(x, t):
        alpha, sigma = process.coeffs(t, x)
        return alpha * c**2 / (c**2 * alpha**2 + sigma**2) * x

    return denoise


def net(x, clock=None, cond=None):
    return (x.roll(1, -1) - 0.3 * x).tanh()  # some network


# ---------------------------------------------------------------- the grid
LEVELS = dict(
    n=st.integers(1, 60), low=st.floats(1e-4, 1), ratio=st.floats(1.5, 1e5), rho=st.floats(0.5, 20)
)


@given(**LEVELS)
@settings(max_examples=60, deadline=None)
def test_levels_are_even_in_the_root(n, low, ratio, rho):
    v = rho_levels(n, low * ratio, low, rho)
    assert (
        v.dtype == F64
        and v.shape == (n,)
        and v[0] == pytest.approx(low * ratio)
        and (n == 1 or v[-1] == pytest.approx(low))
    )
    assert v.min() >= low and v.max() <= low * ratio and (v.diff() <= 0).all()
    steps = (v ** (1 / rho)).diff()
    assert n < 3 or torch.allclose(
        steps, steps.mean().expand(n - 1), rtol=1e-6, atol=1e-9 * (low * ratio) ** (1 / rho)
    )


@given(**LEVELS, k=st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_levels_have_no_unit(n, low, ratio, rho, k):  # twice the pixel range, twice the levels
    assert torch.allclose(
        rho_levels(n, k * low * ratio, k * low, rho),
        k * rho_levels(n, low * ratio, low, rho),
        rtol=1e-9,
        atol=0,
    )


@pytest.mark.parametrize("n", [2, 18, 79])
def test_grid_is_equation_5(n):
    i, hi, lo = torch.arange(n, dtype=F64), 80 ** (1 / 7), 0.002 ** (1 / 7)
    assert torch.allclose(
        EDM().steps(n),
        torch.cat([(hi + i / (n - 1) * (lo - hi)) ** 7, torch.zeros(1, dtype=F64)]),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("n", [1, 2, 25])
def test_rho_steps_visits_those_levels(name, n):
    process = PROCESSES[name]
    ts = rho_steps(process, n)
    strongest = min(80.0, level(process, at(float(process.t_max), 1)).item())
    assert (
        ts.dtype == F64
        and len(ts) == n + 1
        and ts[0] == process.t_max
        and ts[-1] == 0
        and (ts.diff() < 0).all()
    )
    assert torch.allclose(level(process, ts[1:-1]), rho_levels(n, strongest)[1:], rtol=1e-6, atol=0)


def test_rho_steps_may_start_below_the_top():
    ts = rho_steps(DDPM(), 12, sigma_max=10.0, sigma_min=0.1, rho=3)
    assert torch.allclose(level(DDPM(), ts[:-1]), rho_levels(12, 10.0, 0.1, 3), rtol=1e-8, atol=0)
    assert torch.allclose(rho_steps(EDM(), 9), EDM().steps(9), rtol=1e-9, atol=0)


def test_eulers_step_is_the_same_for_every_process():  # x / alpha moves in the noise level
    mix = GaussianMixture(torch.randn(6, 2, generator=seeded(), dtype=F64), 0.2)
    x, results = torch.randn(5, 2, generator=seeded(1), dtype=F64), []
    for name in ("edm", "vp", "ddpm", "cosine"):
        p = PROCESSES[name]
        ts = rho_steps(p, 15, sigma_max=40.0)
        results.append(sample(mix.denoiser(p), p, 40 * x * p.alpha(ts[:1]), ts))
    for r in results[1:]:
        assert torch.allclose(r, results[0], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the process
def test_process():
    p = EDM(0.01, 50.0, 5.0, -0.5, 0.8)
    t = torch.tensor([0.0, 0.01, 1.0, 50.0], dtype=F64)
    assert (p.alpha(t) == 1).all() and torch.equal(p.sigma(t), t)
    assert p.clock(t).tolist() == pytest.approx([0, 0, 1000 * math.log(100) / math.log(5000), 1000])
    assert make_process(**p.config).config == p.config
    assert torch.equal(p.steps(7)[:-1], rho_levels(7, 50.0, 0.01, 5.0)) and p.steps(7)[-1] == 0
    assert p.init_noise((20_000,), generator=seeded()).std() == pytest.approx(50, rel=0.03)


def test_training_levels_are_log_normal():
    p, n = EDM(p_mean=-0.7, p_std=0.9), 40_000
    t = p.sample_t(n, generator=seeded())
    z = ((t.double().log() + 0.7) / 0.9).sort().values
    cdf = 0.5 * (1 + (z / math.sqrt(2)).erf())
    # Kolmogorov and Smirnov, 1 in 1000
    assert (cdf - torch.arange(1, n + 1) / n).abs().max() < 1.95 / math.sqrt(n)
    assert torch.equal(t, p.sample_t(n, generator=seeded())) and t.dtype == torch.float32
    wide = EDM(p_std=9.0).sample_t(2000, generator=seeded())
    assert wide.min() >= 0.002 - 1e-9 and wide.max() <= 80 and (wide == 80).any()


def test_network_sees_the_same_in_every_process():
    x0, eps, v = noisy(3), noisy(3, seed=1), torch.tensor([0.05, 0.7, 20.0], dtype=F64)
    ours = Denoiser(net, EDM(), edm_param(0.5))
    for name in ("vp", "ddpm", "cosine", "flow"):
        p = PROCESSES[name]
        t = time_of(p, v)
        theirs = Denoiser(net, p, edm_param(0.5))
        assert torch.allclose(
            ours.predict(EDM().add_noise(x0, v, eps), v, None),
            theirs.predict(p.add_noise(x0, t, eps), t, None),
            atol=1e-9,
        )
        assert torch.allclose(ours.target(x0, eps, v), theirs.target(x0, eps, t), atol=1e-8)
        assert torch.allclose(
            ours(EDM().add_noise(x0, v, eps), v), theirs(p.add_noise(x0, t, eps), t), atol=1e-8
        )


# ---------------------------------------------------------------- churn
@pytest.mark.parametrize("name", PROCESSES)
def test_without_noise_it_is_the_step_inside(name):
    p, x = PROCESSES[name], noisy()
    for step, where in ((churn(0.0), 0.5), (churn(0.3, low=0.6), 0.5), (churn(0.3, high=0.4), 0.5)):
        t, s = time_of(p, at(where)), time_of(p, at(0.3))
        assert torch.allclose(
            step(gaussian(p, 0.5), p, x, t, s, seeded())[0],
            heun(gaussian(p, 0.5), p, x, t, s)[0],
            atol=1e-7,
        )
    # the top, infinite for Flow, is above `high`
    first = torch.full((4,), float(p.t_max), dtype=F64)
    if level(p, first)[0] > 50:
        got, want = (f(gaussian(p, 0.5), p, x, first, s)[0] for f in (churn(0.3), heun))
        assert got.isfinite().all() and torch.allclose(got, want, atol=1e-7)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("gamma, extra", [(0.2, 1.0), (0.41, 1.05), (3.0, 1.0)])
# normal data: raise, scale, one Euler step, all known
def test_variance_of_one_step(name, gamma, extra):
    p, c, n = PROCESSES[name], 0.5, 40_000
    t, s = (time_of(p, at(v, 1)).expand(n) for v in (0.7, 0.4))
    (a, sig), a_s = (v[0].item() for v in (p.alpha(t), p.sigma(t))), p.alpha(s)[0].item()
    x = math.sqrt(c**2 * a**2 + sig**2) * torch.randn(n, generator=seeded(), dtype=F64)
    up = 0.7 * (1 + min(gamma, math.sqrt(2) - 1))
    in_level = c**2 + 0.7**2 + extra**2 * (up**2 - 0.7**2)  # variance of x / alpha after the noise
    want = a_s**2 * in_level * ((c**2 + 0.4 * up) / (c**2 + up**2)) ** 2
    got, x0_hat = churn(gamma, extra=extra, step=euler)(gaussian(p, c), p, x, t, s, seeded(1))
    assert abs(got.var() / want - 1) < 4 * math.sqrt(2 / n)
    assert abs(x0_hat.var() / (in_level * (c**2 / (c**2 + up**2)) ** 2) - 1) < 4 * math.sqrt(2 / n)


@pytest.mark.parametrize("name", ["edm", "vp", "cosine", "flow"])
def test_moments_of_samples(name):
    p, n = PROCESSES[name], 4000
    mix = GaussianMixture(torch.tensor([[0.8, 0.2], [-0.5, -0.3]], dtype=F64), 0.15, [0.3, 0.7])
    x = p.init_noise((n, 2), generator=seeded()).double()
    out = sample(
        mix.denoiser(p), p, x, rho_steps(p, 40), churn(0.2, extra=1.0), generator=seeded(1)
    )
    want = 0.7 * mix.means[1] + 0.3 * mix.means[0]
    std = math.sqrt(0.3 * 0.7 * 1.3**2 + 0.15**2)
    assert (
        abs(out[:, 0].mean() - want[0]) < 4 * std / math.sqrt(n) + 0.01
        and abs(out[:, 0].std() - std) < 0.03
    )
    assert abs((out[:, 0] > 0.15).double().mean() - 0.3) < 4 * math.sqrt(0.21 / n) + 0.01


def test_levels_of_one_batch_may_differ_and_seeds_belong_to_examples():
    p, x = EDM(), noisy(6)
    t, s = torch.tensor([60.0, 10, 1, 0.5, 0.04, 0.01], dtype=F64), torch.tensor(
        [40.0, 5, 0.5, 0.0, 0.01, 0.0], dtype=F64
    )
    together = churn(0.2)(gaussian(p, 0.5), p, x, t, s, example_generators(0, 6))[0]
    for i in range(6):
        alone = churn(0.2)(
            gaussian(p, 0.5),
            p,
            x[i : i + 1],
            t[i : i + 1],
            s[i : i + 1],
            example_generators(0, 1, i),
        )[0]
        assert torch.allclose(together[i], alone[0], atol=1e-9)
    for i in (0, 4, 5):  # outside 0.05..50
        assert torch.allclose(together[i], heun(gaussian(p, 0.5), p, x, t, s)[0][i], atol=1e-12)


def test_the_step_inside_gets_the_generator():
    def step(denoise, process, x, t, s, generator=None, **kw):
        return euler(denoise, process, x, t, s, eta=1.0, generator=generator)

    def run():
        return churn(0.1, step=step)(
            gaussian(EDM(), 0.5), EDM(), noisy(), at(1.0), at(0.5), seeded()
        )[0]

    assert torch.equal(run(), run())
    assert (
        make_step("churn")(gaussian(EDM(), 0.5), EDM(), noisy(), at(1.0), at(0.5), seeded())[0]
        .isfinite()
        .all()
    )


# ---------------------------------------------------------------- parity with diffusers
@pytest.mark.parametrize("s_churn", [0.0, 4.0, 100.0])
@pytest.mark.parametrize("n", [5, 18])
def test_like_diffusers_edm_euler(n, s_churn):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(n)
    assert torch.allclose(scheduler.sigmas.double(), EDM().steps(n), rtol=1e-6, atol=0)
    model = Denoiser(net, EDM(), edm_param(0.5))
    ours = churn(s_churn / n, step=euler, extra=1.003)
    x = 80 * noisy(dtype=torch.float32)
    for i, t in enumerate(scheduler.timesteps):  # their scheduler divides s_churn by n, too
        v, w = scheduler.sigmas[i : i + 2].double()
        F = net(scheduler.scale_model_input(x, t))
        # the network is asked at the raised level; theirs is not: say what ours will hear
        if s_churn and 0.05 <= v <= 50:
            want = scheduler.step(
                F,
                t,
                x,
                s_churn=s_churn,
                s_tmin=0.05,
                s_tmax=50.0,
                s_noise=1.003,
                generator=seeded(i),
            ).prev_sample
            raised = v * (1 + min(s_churn / n, math.sqrt(2) - 1))

            def denoise(x, t, F=F, raised=raised):
                return scheduler.precondition_outputs(x, F, raised).to(x)

        else:
            want, denoise = scheduler.step(F, t, x).prev_sample, model
        got = ours(denoise, EDM(), x, at(v.item()), at(w.item()), seeded(i))[0]
        assert (got - want).abs().max() < 1e-5 * max(1.0, v.item())
        x = want


@pytest.mark.parametrize("n", [6, 20])
def test_like_diffusers_heun_on_the_karras_grid(n):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.HeunDiscreteScheduler(1000, 1e-4, 0.02, "linear", use_karras_sigmas=True)
    scheduler.set_timesteps(n)
    sigmas, (hi, lo) = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]), level(
        DDPM(), torch.tensor([1000, 1])
    )
    grid = torch.cat([rho_levels(n, hi.item(), lo.item()), torch.zeros(1)])
    # their table of abar is float32
    assert torch.allclose(sigmas.double(), grid, rtol=1e-4, atol=0)
    ours = rho_steps(DDPM(), n, sigma_min=lo.item(), sigma_max=hi.item() - 1e-9)
    assert (
        ours[1:-1]
        - 1
        - torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1::2]])[1:].double()
    ).abs().max() < 0.6  # they interpolate log sigma
    model = Denoiser(net, EDM(sigma_max=200.0), eps_param)
    x, B = hi.item() * noisy(dtype=torch.float32), 4
    times = iter(scheduler.timesteps)
    for v, w in zip(sigmas[:-1].double(), sigmas[1:].double()):
        want = x
        for u in (v, w) if w > 0 else (v,):
            want = scheduler.step(net(want), next(times), want).prev_sample
        got = heun(model, EDM(sigma_max=200.0), x, at(v.item(), B), at(w.item(), B))[0]
        assert (got - want).abs().max() < 1e-5 * max(1.0, v.item())
        x = want


@pytest.mark.parametrize("n", [6, 20])
def test_like_diffusers_euler_on_the_karras_grid(n):  # their x is ours over alpha
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(1000, 1e-4, 0.02, "linear", use_karras_sigmas=True)
    scheduler.set_timesteps(n)
    p = DDPM()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.sigmas[i] * noisy(dtype=torch.float32)
        now, then = (time_of(p, at(v.item())) for v in scheduler.sigmas[i : i + 2])
        if i + 1 == n:
            then = at(0.0)
        (a, _), (a_s, _) = p.coeffs(now, x), p.coeffs(then, x)
        want = scheduler.step(net(scheduler.scale_model_input(x, t)), t, x).prev_sample
        got = euler(Denoiser(net, p, eps_param), p, x * a, now, then)[0] / a_s
        assert (got - want).abs().max() < 1e-5 * max(1.0, scheduler.sigmas[i].item())


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "f, says",
    [
        (lambda: rho_levels(0), "at least 1 step, not 0"),
        (lambda: rho_levels(5, rho=0), "rho is above 0"),
        (lambda: rho_levels(5, rho=float("nan")), "rho is above 0"),
        (lambda: rho_levels(5, 0.002, 80), "0 < sigma_min < sigma_max"),
        (lambda: rho_levels(5, 80, 0.0), "0 < sigma_min"),
        (lambda: EDM(80, 0.002), "0 < sigma_min < sigma_max"),
        (lambda: EDM(rho=-7), "rho is above 0"),
        (lambda: EDM().steps(0), "at least 1 step"),
        (lambda: rho_steps(DDPM(), 0), "at least 1 step"),
        (lambda: rho_steps(DDPM(), 5, sigma_max=0.001), "0 < sigma_min < sigma_max"),
        (lambda: churn(-0.1), "gamma is a share"),
        (lambda: churn(float("nan")), "gamma is a share"),
    ],
)
def test_errors(f, says):
    with pytest.raises(ValueError, match=says):
        f()


# ---------------------------------------------------------------- above the end of the road
@pytest.mark.parametrize("name", ["edm", "vp"])
def test_churn_rises_above_t_max_where_the_formulas_go_on(name):
    "EDM at level 80 with gamma 0.4 goes to 112; it stayed at 80."
    p, asked = PROCESSES[name], []
    top = torch.full((4,), float(p.t_max), dtype=F64)
    want = 1.4 * level(p, top)[0]

    def denoise(x, t):
        asked.append(level(p, t)[0].item())
        return 0 * x

    churn(0.4, high=math.inf, step=euler)(denoise, p, noisy(), top, top / 2, seeded())
    assert asked[0] == pytest.approx(want.item(), rel=1e-9) and p.t_end == math.inf


@pytest.mark.parametrize("name", ["ddpm", "flow"])
def test_churn_stays_on_the_road_where_it_ends(name):
    p, asked = PROCESSES[name], []
    top, s = torch.full((4,), float(p.t_max), dtype=F64), time_of(PROCESSES[name], at(1.0))
    denoise = lambda x, t: asked.append(t[0].item()) or 0 * x
    out = churn(0.4, high=math.inf, step=euler)(denoise, p, noisy(), top, s, seeded())[0]
    assert asked == [p.t_max] and p.t_end == p.t_max and out.isfinite().all()


def test_churn_is_built_with_settings_and_comes_back():
    rule = build("sampler", "churn", gamma=0.3, step="euler")
    assert rule.config["gamma"] == 0.3 and rule.config["low"] == 0.05
    again = build("sampler", **churn(0.3, step=euler).config)
    a, b, c = (
        f(gaussian(EDM(), 0.5), EDM(), noisy(), at(1.0), at(0.5), seeded())[0]
        for f in (rule, again, churn(0.3, step=euler))
    )
    assert torch.equal(a, c) and torch.equal(b, c)
