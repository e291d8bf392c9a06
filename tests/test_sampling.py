"""Samplers against closed forms: normal data, finite point sets, moments, diffusers' schedulers,
shapes, seeds, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ddpm_course.sampling as sampling
from ddpm_course.core import build, example_generators
from ddpm_course.denoiser import Denoiser, exact_denoiser
from ddpm_course.process import DDPM, Process
from ddpm_course.sampling import STEPS, ancestral, clip_x0, euler, heun, sample, step_variances

F64 = torch.float64


# ---------------------------------------------------------------- small processes, one per family
# of the course
class VP(Process):  # Song et al. 2021: continuous time, linear beta(t)
    def log_abar(self, t):
        return -(0.1 * t + 19.9 * t**2 / 2)

    def alpha(self, t):
        return (self.log_abar(t) / 2).exp()

    def sigma(self, t):
        return (-self.log_abar(t).expm1()).sqrt()


class EDM(Process):  # Karras et al. 2022: noise is added, time is sigma
    t_max = 80.0

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return t


class Flow(Process):  # Lipman et al. 2023: a straight line from data to noise
    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t


def line(a, b):
    return lambda n: torch.linspace(a, b, n + 1, dtype=F64)


def squared(t_max):
    return lambda n: t_max * line(1, 0)(n) ** 2


def karras(lo=0.002, hi=80.0, rho=7):
    return lambda n: torch.linspace(hi ** (1 / rho), lo ** (1 / rho), n + 1, dtype=F64) ** rho


def karras_to_0(n):
    return torch.cat([karras()(n - 1), torch.zeros(1, dtype=F64)])


GRIDS = {  # process, grid, Heun's order there
    "ddpm to t=100": (DDPM(), line(1000, 100), 2),
    "vp to t=0.1": (VP(), line(1, 0.1), 2),
    "edm to sigma=0.002": (EDM(), karras(), 2),
    "flow to 0": (Flow(), line(1, 0), 2),
    "ddpm to 0": (DDPM(), line(1000, 0), None),  # falls towards 1
    "vp to 0": (VP(), line(1, 0), None),
    "ddpm to 0, squared": (DDPM(), squared(1000), 2),
    "vp to 0, squared": (VP(), squared(1), 2),
}
TO_0 = {
    "ddpm": (DDPM(), DDPM().steps),
    "vp": (VP(), line(1, 0)),
    "edm": (EDM(), karras_to_0),
    "flow": (Flow(), line(1, 0)),
}


def variance(process, t, c):
    return (c * process.alpha(t)) ** 2 + process.sigma(t) ** 2


def gaussian(process, c, m=0.0):  # the exact denoiser of N(m, c^2)
    def denoise(x, t):
        alpha, sigma = process.coeffs(t, x)
        return m + alpha * c**2 / (c**2 * alpha**2 + sigma**2) * (x - alpha * m)

    return denoise


def ode_map(process, x, t, s, c, m=0.0):  # the exact solution of the ODE for N(m, c^2)
    stretch = (variance(process, s, c) / variance(process, t, c)).sqrt()
    return process.alpha(s) * m + stretch * (x - process.alpha(t) * m)


def counted(denoise):
    def wrapper(x, t):
        wrapper.times.append(t[0].item())
        return denoise(x, t)

    wrapper.times = []
    return wrapper


def order(errors):
    return math.log2(errors[-2] / errors[-1])


# ---------------------------------------------------------------- oracle 1: normal data
# at c = 1 DDPM's path is a circle, where Heun happens to have order 3
@pytest.mark.parametrize("c", [0.3, 0.6])
@pytest.mark.parametrize("case", GRIDS)
def test_measured_order_on_normal_data(case, c):
    process, grid, heun_order = GRIDS[case]
    x, errors = torch.tensor([0.3, -1.0, 2.0], dtype=F64), {euler: [], heun: []}
    for n in (128, 256):
        ts = grid(n)
        start = process.alpha(ts[0]) * 0.7 + variance(process, ts[0], c).sqrt() * x
        want = ode_map(process, start, ts[0], ts[-1], c, 0.7)
        for step, found in errors.items():
            found.append(
                (sample(gaussian(process, c, 0.7), process, start, ts, step) - want)
                .abs()
                .max()
                .item()
            )
    assert abs(order(errors[euler]) - 1) < 0.06
    if heun_order:
        assert abs(order(errors[heun]) - heun_order) < 0.1
    else:
        assert 1.0 < order(errors[heun]) < 1.6
    assert all(h < e / 5 for h, e in zip(errors[heun], errors[euler]))


def test_heuns_order_to_zero_is_spoilt_by_the_last_step():
    process, c = VP(), 0.5
    for n in (512, 1024):
        ts = line(1, 0)(n)
        angle = torch.atan2(process.sigma(ts[-2]), c * process.alpha(ts[-2]))
        x = torch.ones(1, dtype=F64)
        error = (
            (
                sample(gaussian(process, c), process, x, ts, heun)
                / ode_map(process, x, ts[0], ts[-1], c)
                - 1
            )
            .abs()
            .item()
        )
        assert error == pytest.approx(1 - angle.cos().item(), rel=0.1)


@pytest.mark.parametrize("case", GRIDS)
def test_an_euler_step_loses_the_cosine_of_its_angle(case):
    process, grid, _ = GRIDS[case]
    ts, c, x = grid(12), 0.5, torch.ones(1, dtype=F64)
    angle = torch.atan2(process.sigma(ts), c * process.alpha(ts)).double()
    got = sample(gaussian(process, c), process, x, ts) / ode_map(process, x, ts[0], ts[-1], c)
    assert got.item() == pytest.approx(angle.diff().cos().prod().item(), rel=1e-9)


# a step on normal data is x -> gain * x + fresh * z: read both off
def fresh_and_gain(monkeypatch, process, t, s, c, **kw):
    with monkeypatch.context() as m:
        m.setattr(sampling, "randn", lambda shape, *_: torch.tensor([0.0, 1.0], dtype=F64))
        out, _ = ancestral(
            gaussian(process, c),
            process,
            torch.tensor([1.0, 0.0], dtype=F64),
            t.expand(2),
            s.expand(2),
            **kw,
        )
    return out[0].item(), out[1].item()


@pytest.mark.parametrize("kind", ["posterior", "beta"])
@pytest.mark.parametrize("name", TO_0)
def test_spread_of_ancestral_samples_is_weakly_first_order(name, kind, monkeypatch):
    process, grid = TO_0[name]
    for c in (0.25, 1.0):
        errors = []
        for n in (100, 200):
            ts = grid(n)
            V = variance(process, ts[0], c).item()
            for t, s in zip(ts[:-1], ts[1:]):
                gain, fresh = fresh_and_gain(monkeypatch, process, t, s, c, variance=kind)
                r, v_t, v_s = (
                    process.alpha(t) / process.alpha(s),
                    variance(process, t, c),
                    variance(process, s, c),
                )
                # the mean is exact
                assert gain == pytest.approx((r * v_s / v_t).item(), rel=1e-6, abs=1e-12)
                truth = (v_s - (r * v_s) ** 2 / v_t).item()  # Var(x_s | x_t) of normal variables
                if kind == "posterior":
                    assert fresh**2 <= truth * (1 + 1e-6) + 1e-15
                elif s > 0 and (name == "edm" or name in ("ddpm", "vp") and c <= 1):
                    assert fresh**2 >= truth * (1 - 1e-6)
                V = gain**2 * V + fresh**2
            errors.append(math.sqrt(V) / c - 1)
        if kind == "posterior":
            assert errors[0] < errors[1] < 0  # always too narrow
        if name == "ddpm" and c < 1 and kind == "beta":
            assert errors[0] > errors[1] > 0  # too wide
        assert abs(errors[1]) < 0.75 * abs(errors[0])
        if kind == "posterior":
            assert order([abs(e) for e in errors]) > 0.6


def test_each_of_ddpms_variances_is_exact_for_one_kind_of_data():
    process, t, s = DDPM(), torch.tensor([2, 50, 500, 1000]), torch.tensor([1, 49, 300, 999])
    beta, posterior = step_variances(process, t, s)
    r = process.alpha(t) / process.alpha(s)

    def truth(c):
        return variance(process, s, c) - (r * variance(process, s, c)) ** 2 / variance(
            process, t, c
        )

    assert torch.allclose(truth(0.0), posterior, rtol=1e-6) and torch.allclose(
        truth(1.0), beta, rtol=1e-9
    )
    assert (
        (posterior < truth(0.5)).all() and (truth(0.5) < beta).all() and (beta < truth(2.0)).all()
    )


# ---------------------------------------------------------------- DDPM's ancestral variance, by
# moments
@pytest.mark.parametrize("kind", ["posterior", "beta"])
@pytest.mark.parametrize("t, s", [(1000, 999), (500, 499), (500, 400), (10, 3), (2, 1), (1, 0)])
def test_moments_of_one_ancestral_step(t, s, kind):
    process, n = DDPM(), 100_000
    x, x0 = torch.full((n,), 0.8, dtype=F64), torch.full((n,), -0.3, dtype=F64)
    g = torch.Generator().manual_seed(t)
    got = ancestral(lambda x, t: x0, process, x, torch.full((n,), t), torch.full((n,), s), kind, g)[
        0
    ]
    abar_t, abar_s = process.abar[t], process.abar[s]
    beta = 1 - abar_t / abar_s
    mean = (
        abar_s.sqrt() * beta / (1 - abar_t) * -0.3
        + (abar_t / abar_s).sqrt() * (1 - abar_s) / (1 - abar_t) * 0.8
    )  # eq. 7
    var = ((1 - abar_s) / (1 - abar_t) * beta if kind == "posterior" else beta * (s > 0)).item()
    assert abs(got.mean() - mean) <= 5 * math.sqrt(var / n) + 1e-12  # five standard errors
    assert abs(got.var() - var) <= 5 * var * math.sqrt(2 / (n - 1)) + 1e-24


@pytest.mark.parametrize("kind", ["posterior", "beta"])
@pytest.mark.parametrize("name", TO_0)
def test_moments_of_a_whole_ancestral_walk(name, kind, monkeypatch):
    (process, grid), c, n = TO_0[name], 0.5, 50_000
    ts, g = grid(10), torch.Generator().manual_seed(1)
    x = variance(process, ts[0], c).sqrt() * torch.randn(n, generator=g, dtype=F64)
    got = sample(gaussian(process, c), process, x, ts, ancestral, variance=kind, generator=g)
    V = variance(process, ts[0], c).item()
    for t, s in zip(ts[:-1], ts[1:]):
        gain, fresh = fresh_and_gain(monkeypatch, process, t, s, c, variance=kind)
        V = gain**2 * V + fresh**2
    assert abs(got.mean()) < 5 * math.sqrt(V / n) and abs(got.var() / V - 1) < 5 * math.sqrt(
        2 / (n - 1)
    )


def test_eta_shares_out_the_noise():
    process, x, t, s = (
        DDPM(),
        torch.zeros(100_000, dtype=F64),
        torch.tensor([600]),
        torch.tensor([400]),
    )
    posterior = step_variances(process, t, s)[1].item()
    for eta in (0.0, 0.5, 1.0):
        got = euler(
            lambda x, t: torch.zeros_like(x),
            process,
            x,
            t,
            s,
            eta,
            torch.Generator().manual_seed(0),
        )[0]
        assert got.var().item() == pytest.approx(
            eta**2 * posterior, rel=5 * math.sqrt(2 / 1e5), abs=1e-30
        )
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1), dtype=F64) * process.sigma(
        t
    )  # pure noise at t ...
    for eta in (0.0, 0.5, 1.0):  # ... is pure noise at s, of the right size, whatever eta
        got = euler(
            lambda x, t: torch.zeros_like(x),
            process,
            x,
            t,
            s,
            eta,
            torch.Generator().manual_seed(0),
        )[0]
        assert got.var().item() == pytest.approx(
            process.sigma(s).item() ** 2, rel=5 * math.sqrt(2 / 2e5)
        )


# ---------------------------------------------------------------- oracle 2: finite point sets
@pytest.mark.parametrize("name", TO_0)
@pytest.mark.parametrize(
    "kw",
    [dict(), dict(eta=1.0), dict(step=heun), dict(step=ancestral, variance="beta")],
    ids=["ddim", "eta 1", "heun", "beta"],
)
def test_one_point_is_found_from_anywhere(name, kw):
    process, grid = TO_0[name]
    point = torch.tensor([[0.3, -0.9, 1.0]], dtype=F64)
    for n in (1, 2, 7):
        x = sample(
            exact_denoiser(process, point),
            process,
            torch.full((4, 3), 0.5, dtype=F64) * process.t_max,
            grid(n),
            **kw,
        )
        assert torch.allclose(x, point.expand(4, 3), atol=1e-12)


@pytest.mark.parametrize("step", [euler, heun])
@pytest.mark.parametrize("case", GRIDS)
def test_the_path_to_one_point_is_exact_at_any_number_of_steps(case, step):
    process, grid, _ = GRIDS[case]
    ts, x0, eps = grid(3), torch.tensor([[0.4]], dtype=F64), torch.tensor([[1.3]], dtype=F64)
    walk = []
    sample(
        exact_denoiser(process, x0),
        process,
        process.add_noise(x0, ts[:1], eps),
        ts,
        step,
        lambda **k: walk.append((k["t"], k["x"])),
    )
    for t, x in walk:
        assert torch.allclose(x, process.add_noise(x0, t, eps), atol=1e-10)


POINTS, COUNTS = torch.tensor([-0.8, 0.1, 0.9], dtype=F64), (5, 2, 3)  # three values, some repeated
CLOUD = torch.cat([p.expand(k) for p, k in zip(POINTS, COUNTS)])[:, None]


def cdf(process, x, t):  # P(x_t < x) for the cloud
    return (
        0.5
        * torch.erfc((process.alpha(t) * CLOUD.T - x[:, None]) / process.sigma(t) / math.sqrt(2))
    ).mean(1)


# in one dimension the ODE keeps quantiles: solve cdf_s(y) = cdf_t(x) by bisection
def quantile_map(process, x, t, s):
    q, lo, hi = cdf(process, x, t), torch.full_like(x, -500), torch.full_like(x, 500)
    for _ in range(90):
        mid = (lo + hi) / 2
        below = cdf(process, mid, s) < q
        lo, hi = torch.where(below, mid, lo), torch.where(below, hi, mid)
    return (lo + hi) / 2


@pytest.mark.parametrize("case, s", [("ddpm", 100.0), ("vp", 0.1), ("edm", 0.3), ("flow", 0.2)])
def test_measured_order_on_a_finite_set(case, s):
    process = TO_0[case][0]
    t = torch.tensor(process.t_max, dtype=F64)
    x = process.alpha(t) * CLOUD.mean() + process.sigma(t) * torch.tensor(
        [-1.6, -0.4, 0.05, 0.6, 1.4], dtype=F64
    )
    want = quantile_map(process, x, t, torch.tensor(s, dtype=F64))
    grid, errors = karras(s) if case == "edm" else line(process.t_max, s), {euler: [], heun: []}
    for n in (128, 256):
        for step, found in errors.items():
            got = sample(exact_denoiser(process, CLOUD), process, x[:, None], grid(n), step)[:, 0]
            found.append((got - want).abs().max().item())
    assert abs(order(errors[euler]) - 1) < 0.15, errors
    assert abs(order(errors[heun]) - 2) < 0.25, errors
    assert errors[heun][-1] < errors[euler][-1] / 5


@pytest.mark.parametrize("name", TO_0)
@pytest.mark.parametrize(
    "kw",
    [dict(), dict(eta=1.0), dict(step=heun), dict(step=ancestral, variance="beta")],
    ids=["ddim", "eta 1", "heun", "beta"],
)
def test_a_finite_set_is_returned_with_its_frequencies(name, kw):
    (process, grid), n = TO_0[name], 4000
    g, ts = torch.Generator().manual_seed(3), grid(300)
    x = process.alpha(ts[:1]) * CLOUD[torch.randint(len(CLOUD), (n,), generator=g)] + process.sigma(
        ts[:1]
    ) * torch.randn(n, 1, generator=g, dtype=F64)
    got = sample(exact_denoiser(process, CLOUD, chunk=n), process, x, ts, generator=g, **kw)
    distance, which = (got - POINTS).abs().min(1)
    assert distance.max() < (1e-3 if name in ("ddpm", "edm") else 2e-2)
    for k, count in enumerate(COUNTS):
        p = count / sum(COUNTS)
        # 0.01: 300 steps, not infinitely many
        assert abs((which == k).double().mean() - p) < 4 * math.sqrt(p * (1 - p) / n) + 0.01


# ---------------------------------------------------------------- parity with diffusers: our t =
# 1..T is their 0..T-1, our 0 their -1
# its tables in float64: in float32 its 1 - abar is wrong by 6e-4 at the first step
def double(scheduler):
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def noisy_pair(B=3):
    return torch.randn(2, B, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=F64)


def says_eps(process, eps):
    return lambda x, t: (x - process.coeffs(t, x)[1] * eps) / process.coeffs(t, x)[0]


def batch(t):
    return torch.full((3,), int(t))


def seeded():
    return torch.Generator().manual_seed(11)


def same_steps(scheduler, n, step, *how, **theirs):
    "Steps of theirs among n, first, in the middle and last, and ours between the same times."
    x, eps = noisy_pair()
    process, scheduler = DDPM(), double(scheduler)
    scheduler.set_timesteps(n)
    times = [*scheduler.timesteps.tolist(), -1]
    for i in sorted({0, 1, n // 3, n // 2, n - 2, n - 1}):
        want = scheduler.step(eps, times[i], x, generator=seeded(), **theirs)
        t, s = batch(times[i] + 1), batch(times[i + 1] + 1)
        got, x0 = step(says_eps(process, eps), process, x, t, s, *how, seeded())
        assert (got - want.prev_sample).abs().max() < 1e-6
        assert (x0 - want.pred_original_sample).abs().max() < 1e-6


@pytest.mark.parametrize("ours, theirs", [("posterior", "fixed_small"), ("beta", "fixed_large")])
@pytest.mark.parametrize("n", [1000, 50, 7])
def test_ddpm_step_like_diffusers(ours, theirs, n):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000, variance_type=theirs, clip_sample=False)
    same_steps(scheduler, n, ancestral, ours)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [1000, 50, 10])
def test_ddim_step_like_diffusers(eta, n):
    from diffusers import DDIMScheduler

    same_steps(DDIMScheduler(1000, clip_sample=False), n, euler, eta, eta=eta)


def test_float32_steps_agree_with_untouched_diffusers_where_its_tables_allow():
    from diffusers import DDIMScheduler, DDPMScheduler

    x, eps = (v.float() for v in noisy_pair())
    process = DDPM()
    ddpm, ddim = DDPMScheduler(1000, clip_sample=False), DDIMScheduler(1000, clip_sample=False)
    ddim.set_timesteps(1000)
    for t in (50, 200, 500):
        a, b = batch(t + 1), batch(t)
        assert (
            ancestral(says_eps(process, eps), process, x, a, b, generator=seeded())[0]
            - ddpm.step(eps, t, x, generator=seeded()).prev_sample
        ).abs().max() < 1e-5
        assert (
            euler(says_eps(process, eps), process, x, a, b)[0] - ddim.step(eps, t, x).prev_sample
        ).abs().max() < 1e-5


# theirs re-derives eps from the clipped image if asked, ours always
def test_clipping_like_diffusers():
    from diffusers import DDIMScheduler

    x, eps = noisy_pair()
    process, scheduler = DDPM(), double(DDIMScheduler(1000, clip_sample=True))
    scheduler.set_timesteps(50)
    t, s = scheduler.timesteps[10].item(), scheduler.timesteps[11].item()
    want = scheduler.step(eps, t, x, use_clipped_model_output=True).prev_sample
    got, x0 = euler(clip_x0(says_eps(process, eps)), process, x, batch(t + 1), batch(s + 1))
    assert (got - want).abs().max() < 1e-6 and x0.abs().max() == 1


# ---------------------------------------------------------------- the loop
@pytest.mark.parametrize("n", [1, 2, 3, 10, 999, 1000])
def test_every_walk_goes_from_T_to_0(n):  # mistake 4: index 0 was neither trained nor sampled
    process = DDPM()
    ts = process.steps(n)
    count, seen = counted(lambda x, t: torch.full_like(x, 0.25)), []
    x = sample(
        count,
        process,
        torch.randn(2, 3),
        ts,
        callback=lambda **k: seen.append((k["t"][0].item(), k["s"][0].item())),
    )
    assert seen[0][0] == 1000 and seen[-1][1] == 0 and len(count.times) == n
    assert all(a[1] == b[0] for a, b in zip(seen, seen[1:])) and all(t > s for t, s in seen)
    # at t = 0 no noise is left: the estimate itself
    assert torch.equal(x, torch.full_like(x, 0.25))
    if n == 1000:
        assert count.times == list(range(1000, 0, -1))  # t = 1, their index 0, is used ...
    # ... and trained
    assert set(process.sample_t(20_000, generator=seeded()).tolist()) >= {1, 1000}


@pytest.mark.parametrize("name", TO_0)
def test_number_of_evaluations(name):
    process, grid = TO_0[name]
    for n in (1, 2, 10):
        for step, want in ((euler, n), (ancestral, n), (heun, 2 * n - 1)):
            count = counted(gaussian(process, 0.5))
            assert (
                sample(count, process, torch.randn(2, 3, dtype=F64), grid(n), step).isfinite().all()
            )
            assert len(count.times) == want and min(count.times) > 0
    count = counted(gaussian(process, 0.5))
    # stops at sigma > 0: two each
    sample(count, process, torch.randn(2, 3, dtype=F64), grid(10)[:-1], heun)
    assert len(count.times) == 18


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.drop, self.grads = nn.Parameter(torch.tensor(0.1)), nn.Dropout(0.5), []

    def forward(self, x, clock, cond=None):
        self.grads.append(torch.is_grad_enabled())
        return self.w * x


@pytest.mark.parametrize("training", [True, False])
def test_sample_has_no_grad_and_leaves_everything_as_it_was(training):
    process, net = DDPM(), Net()
    model = Denoiser(net, process).train(training)
    modes, x, ts = [m.training for m in model.modules()], torch.randn(2, 1, 4, 4), process.steps(5)
    x_before, ts_before, rng = x.clone(), ts.clone(), torch.get_rng_state()
    out = sample(model, process, x, ts)
    assert not out.requires_grad and not any(net.grads) and net.w.grad is None
    assert torch.is_grad_enabled() and modes == [m.training for m in model.modules()]
    assert (
        torch.equal(x, x_before)
        and torch.equal(ts, ts_before)
        and torch.equal(rng, torch.get_rng_state())
    )
    sample(model, process, x, ts, eta=1.0, generator=seeded())
    # a generator is used instead of the global numbers
    assert torch.equal(rng, torch.get_rng_state())
    with pytest.raises(RuntimeError, match="from inside"):
        sample(lambda x, t: (_ for _ in ()).throw(RuntimeError("from inside")), process, x, ts)
    assert torch.is_grad_enabled()


def test_callback_sees_each_step():
    process, x, seen = DDPM(), torch.randn(2, 1, 4, 4), []
    denoise = gaussian(process, 0.5)
    out = sample(denoise, process, x, process.steps(4), heun, lambda **k: seen.append(k))
    assert (
        [k["i"] for k in seen] == [0, 1, 2, 3]
        and torch.equal(seen[0]["x"], x)
        and set(seen[0]) == {"i", "t", "s", "x", "x0"}
    )
    for k in seen:
        assert k["t"].shape == (2,) and torch.equal(k["x0"], denoise(k["x"], k["t"]))
    for a, b in zip(seen, seen[1:]):
        assert torch.equal(heun(denoise, process, a["x"], a["t"], a["s"])[0], b["x"])
    assert torch.equal(seen[-1]["x0"], out)


# ---------------------------------------------------------------- seeds
STOCHASTIC = [
    dict(eta=1.0),
    dict(eta=0.5),
    dict(step=ancestral),
    dict(step=ancestral, variance="beta"),
]


@pytest.mark.parametrize("kw", STOCHASTIC, ids=["eta 1", "eta 0.5", "posterior", "beta"])
def test_samples_of_a_seed_do_not_depend_on_the_batch_size(kw):
    process, shape, n = DDPM(), (1, 6, 6), 7
    x0s = torch.rand(20, *shape, generator=seeded()) * 2 - 1

    def draw(denoise, size, seed=3):
        out = []
        for i in range(0, n, size):
            g = example_generators(seed, min(size, n - i), start=i)
            out.append(
                sample(
                    denoise,
                    process,
                    process.init_noise((len(g), *shape), generator=g),
                    process.steps(15),
                    generator=g,
                    **kw,
                )
            )
        return torch.cat(out)

    pixelwise = gaussian(process, 0.5)
    whole = draw(pixelwise, n)
    for size in (1, 2, 5):
        assert torch.equal(draw(pixelwise, size), whole)
    assert torch.equal(draw(pixelwise, n), whole) and not torch.allclose(
        draw(pixelwise, n, seed=4), whole, atol=1e-2
    )
    assert len(set(whole.flatten(1).sum(1).tolist())) == n  # and they differ from each other
    exact = exact_denoiser(process, x0s)
    for size in (1, 5):
        assert torch.allclose(draw(exact, size), draw(exact, n), atol=1e-4)


# ---------------------------------------------------------------- shapes and types
SHAPES = st.one_of(
    st.tuples(st.integers(1, 3)),  # numbers
    st.tuples(st.integers(1, 3), st.integers(1, 5)),  # tables, points
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 9)),  # audio (B,C,L)
    # images (B,C,H,W)
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(
        st.integers(1, 2),
        st.integers(1, 2),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 3),
    ),  # video (B,C,T,H,W)
)


@settings(max_examples=60, deadline=None)
@given(
    SHAPES,
    st.sampled_from(sorted(STEPS)),
    st.sampled_from(sorted(TO_0)),
    st.integers(1, 4),
    st.sampled_from([torch.float32, F64]),
)
def test_any_shape_and_type(shape, step, name, n, dtype):
    process, grid = TO_0[name]
    x = torch.randn(shape, dtype=dtype)
    out = sample(gaussian(process, 0.5), process, x, grid(n), STEPS[step])
    assert out.shape == x.shape and out.dtype == dtype and out.isfinite().all()
    flat = sample(
        gaussian(process, 0.5), process, x.flatten(), grid(n), STEPS[step], generator=seeded()
    )
    again = sample(gaussian(process, 0.5), process, x, grid(n), STEPS[step], generator=seeded())
    # a number is a number, whatever shape it stands in
    assert torch.allclose(flat, again.flatten(), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 1000), st.floats(0, 1))
def test_steps_between_any_two_times(a, b, eta):
    process, t, s = DDPM(), max(a, b), min(a, b) - 1
    x, x0 = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    t, s = torch.full((2,), t), torch.full((2,), s)
    beta, posterior = step_variances(process, t, s)
    assert (
        (beta >= posterior).all()
        and (posterior >= 0).all()
        and (posterior <= process.sigma(s) ** 2).all()
    )
    assert torch.allclose(beta, 1 - process.abar[t] / process.abar[s], atol=1e-12)
    got = euler(lambda x, t: x0, process, x, t, s, eta, seeded())[0]
    z, eps = (
        torch.randn(2, 3, generator=seeded(), dtype=F64),
        (x - process.alpha(t)[:, None] * x0) / process.sigma(t)[:, None],
    )
    up = (eta**2 * posterior)[:, None]
    assert torch.allclose(
        got,
        process.alpha(s)[:, None] * x0
        + (process.sigma(s)[:, None] ** 2 - up).clamp(min=0).sqrt() * eps
        + up.sqrt() * z,
        atol=1e-8,
    )


@pytest.mark.parametrize("step", STEPS)
def test_examples_may_stand_at_different_times(step):
    process, x = DDPM(), torch.randn(3, 2, 4)
    t, s = torch.tensor([900, 300, 40]), torch.tensor([500, 299, 0])  # one of them finishes
    together = STEPS[step](
        gaussian(process, 0.5), process, x, t, s, generator=example_generators(0, 3)
    )[0]
    alone = [
        STEPS[step](
            gaussian(process, 0.5),
            process,
            x[i : i + 1],
            t[i : i + 1],
            s[i : i + 1],
            generator=[example_generators(0, 3)[i]],
        )[0]
        for i in range(3)
    ]
    assert together.isfinite().all() and torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_half_precision_images_stay_finite():
    process = DDPM()
    x = torch.randn(2, 1, 4, 4).to(torch.bfloat16)
    for step in STEPS.values():
        out = sample(gaussian(process, 0.5), process, x, process.steps(20), step)
        assert out.dtype == torch.bfloat16 and out.isfinite().all()


# ---------------------------------------------------------------- wrappers and bad input
def test_clip_x0_is_a_wrapper_that_passes_conditions_on():
    seen = []

    def denoise(x, t, y=None, mask=None):
        seen.append((y, mask))
        return 3 * x

    x = torch.tensor([-1.0, -0.2, 0.1, 2.0])
    assert clip_x0(denoise)(x, None).tolist() == pytest.approx([-1, -0.6, 0.3, 1])
    assert clip_x0(denoise, 0.5)(x, None, 7, mask=8).abs().max() == 0.5 and seen[-1] == (7, 8)
    process = DDPM()
    out = sample(clip_x0(lambda x, t: 100 * x), process, torch.randn(2, 3), process.steps(5))
    assert out.abs().max() == 1
    assert (
        sample(lambda x, t: x * 0 + 1.5, process, torch.randn(2, 3), process.steps(5)).max() == 1.5
    )  # nothing is clipped unless asked


@pytest.mark.parametrize("eta", [-0.1, 1.1, 3, float("nan")])
def test_eta_is_a_share(eta):
    process = DDPM()
    with pytest.raises(ValueError, match="eta.*from 0 .* to 1"):
        sample(gaussian(process, 0.5), process, torch.randn(2, 3), process.steps(5), eta=eta)


@pytest.mark.parametrize("name, near", [("bta", "'beta'"), ("posteriour", "'posterior'")])
def test_unknown_variance_suggests_the_nearest(name, near):
    process = DDPM()
    with pytest.raises(ValueError, match=f"unknown variance '{name}'.*Did you mean {near}"):
        sample(
            gaussian(process, 0.5),
            process,
            torch.randn(2, 3),
            process.steps(5),
            ancestral,
            variance=name,
        )


@pytest.mark.parametrize(
    "ts",
    [torch.tensor(500), torch.tensor([]), torch.tensor([500]), torch.tensor([[500, 0]])],
    ids=lambda t: str(tuple(t.shape)),
)
def test_a_grid_needs_two_times(ts):
    with pytest.raises(ValueError, match="at least 2 times"):
        sample(gaussian(DDPM(), 0.5), DDPM(), torch.randn(2, 3), ts)


@pytest.mark.parametrize(
    "ts", [DDPM().steps(5).flip(0), torch.tensor([1000, 0, 0]), torch.tensor([0, 0])], ids=str
)
def test_only_the_last_time_may_be_zero(ts):
    with pytest.raises(ValueError, match="only the last may be 0"):
        sample(gaussian(DDPM(), 0.5), DDPM(), torch.randn(2, 3), ts)


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_steps_that_make_no_sense(n):
    with pytest.raises(ValueError, match=str(n)):
        DDPM().steps(n)


def test_generators_must_be_one_per_example():
    process = DDPM()
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        sample(
            gaussian(process, 0.5),
            process,
            torch.randn(3, 2),
            process.steps(5),
            eta=1.0,
            generator=example_generators(0, 2),
        )


# ---------------------------------------------------------------- rules that remember
def test_every_walk_has_a_memory_of_its_own():
    def rule(denoise, process, x, t, s, memory, generator=None):
        seen.append((id(memory), dict(memory)))
        memory["last"] = t[0].item()
        return euler(denoise, process, x, t, s)

    process, d, seen = DDPM(), gaussian(DDPM(), 0.5), []
    x = torch.randn(2, 3, dtype=F64)
    for _ in range(2):
        sample(d, process, x, process.steps(2), rule)
    assert [m for _, m in seen] == [{}, {"last": 1000}] * 2
    mine = {}
    sample(d, process, x, process.steps(2), rule, memory=mine)
    assert mine == {"last": 500}


def test_a_rule_of_ones_own_need_not_know_of_memory():
    def rule(denoise, process, x, t, s, generator=None):
        return euler(denoise, process, x, t, s)

    def open_rule(denoise, process, x, t, s, **kw):
        assert kw["memory"] == {}
        return rule(denoise, process, x, t, s)

    from ddpm_course.edm import churn
    from ddpm_course.sde import corrected

    process, x = DDPM(), torch.randn(2, 3, dtype=F64)
    d, ts = gaussian(DDPM(), 0.5), process.steps(5)
    want = sample(d, process, x, ts)
    for mine in (rule, open_rule, churn(0.0, step=rule), corrected(rule, n=0), "euler"):
        assert torch.allclose(sample(d, process, x, ts, mine), want, atol=1e-8)
    with pytest.raises(ValueError, match="Did you mean 'euler'"):
        sample(d, process, x, ts, "eulr")


@pytest.mark.parametrize(
    "kw",
    [dict(eta=0.3), dict(step=ancestral), dict(step=ancestral, variance="beta")],
    ids=["eta", "posterior", "beta"],
)
def test_fresh_noise_goes_only_from_noise_to_data(kw):
    process, x = DDPM(), torch.randn(2, 3, dtype=F64)
    up = torch.tensor([10, 400, 900])
    with pytest.raises(ValueError, match="rises from 10 to 400: take euler or heun"):
        sample(gaussian(process, 0.5), process, x, up, **kw)
    for step in (euler, heun):
        assert sample(gaussian(process, 0.5), process, x, up, step).isfinite().all()


def test_samplers_are_built_with_settings():
    rule = build("sampler", "ancestral", variance="beta")
    process, x = DDPM(), torch.randn(2, 3, dtype=F64)
    t, s = torch.full((2,), 500), torch.full((2,), 400)
    got = rule(gaussian(process, 0.5), process, x, t, s, generator=seeded())[0]
    want = ancestral(gaussian(process, 0.5), process, x, t, s, "beta", seeded())[0]
    assert torch.equal(got, want) and rule.config == dict(name="ancestral", variance="beta")
    with pytest.raises(ValueError, match="has no setting 'varaince'.*'variance'"):
        build("sampler", "ancestral", varaince="beta")
