"""Multistep solvers against diffusers' schedulers over whole walks, closed forms, and their own
memory; grids; thresholding."""

import functools
import math

import pytest
import torch
from common import tiny_diffusion
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_course.core import build
from ddpm_course.denoiser import exact_denoiser
from ddpm_course.edm import EDM, churn, rho_levels, rho_steps
from ddpm_course.flow import Flow
from ddpm_course.model import make_step
from ddpm_course.process import DDPM
from ddpm_course.sampling import euler, heun, sample
from ddpm_course.score import NCSN, GaussianMixture
from ddpm_course.sde import VE, VP, SubVP, corrected
from ddpm_course.solvers import (
    _moments,
    dpmpp_2m,
    dpmpp_2m_sde,
    linear_part,
    log_snr_steps,
    threshold,
    unipc,
)

F64 = torch.float64
SOLVERS = dict(dpmpp_2m=dpmpp_2m, unipc=unipc)
PROCESSES = dict(
    ddpm=DDPM(),
    cosine=DDPM(1000, "cosine"),
    vp=VP(),
    sub_vp=SubVP(),
    ve=VE(),
    ncsn=NCSN(),
    edm=EDM(),
    flow=Flow(),
)
MIX = GaussianMixture(torch.tensor([[0.8, 0.2], [-0.5, -0.3], [0.1, -0.9]], dtype=F64), 0.2)


def line(a, b):
    return lambda n: torch.linspace(a, b, n + 1, dtype=F64)


def lam(process, t):
    return (process.alpha(t) / process.sigma(t)).log()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def counted(denoise):
    def wrapper(x, t):
        wrapper.calls += 1
        return denoise(x, t)

    wrapper.calls = 0
    return wrapper


# ---------------------------------------------------------------- parity with diffusers, over whole
# walks
# their arithmetic on our times: their own grid is rounded to whole timesteps and to float32
def walk_of(scheduler, process, ts, denoise, x):
    t64, n = ts.double(), len(ts) - 1
    scheduler.set_timesteps(n)
    scheduler.sigmas = process.sigma(t64) / process.alpha(t64)
    scheduler.timesteps = torch.arange(n, 0, -1)
    scheduler._step_index, images = 0, x[:, :, None, None]
    for i, t in enumerate(ts[:-1]):
        x0 = denoise(images[:, :, 0, 0], t.expand(len(x)))[:, :, None, None]
        images = scheduler.step(x0, scheduler.timesteps[i], images).prev_sample
    return images[:, :, 0, 0]


GRIDS = {
    "linear, 20": (DDPM(), DDPM().steps(20)),
    "linear, 9": (DDPM(), DDPM().steps(9)),
    "linear, 50": (DDPM(), DDPM().steps(50)),
    "cosine, uneven": (
        DDPM(1000, "cosine"),
        torch.tensor([980.0, 900, 850, 500, 480, 100, 20, 3, 0]),
    ),
    "vp": (VP(), line(1, 0)(17)),
    "vp, log SNR": (VP(), log_snr_steps(VP(), 12)),
    "two steps": (DDPM(), torch.tensor([1000, 400, 0])),
    "one": (DDPM(), torch.tensor([1000, 0])),
}


@pytest.mark.parametrize("case", GRIDS)
def test_dpmpp_2m_like_diffusers(case):
    from diffusers import DPMSolverMultistepScheduler

    process, ts = GRIDS[case]
    x, denoise = process.init_noise((5, 2), generator=seeded()).double(), MIX.denoiser(process)
    theirs = DPMSolverMultistepScheduler(
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    assert (
        sample(denoise, process, x, ts, dpmpp_2m()) - walk_of(theirs, process, ts, denoise, x)
    ).abs().max() < 1e-6  # they step in float32


@pytest.mark.parametrize("case", GRIDS)
def test_unipc_like_diffusers(case):
    from diffusers import UniPCMultistepScheduler

    process, ts = GRIDS[case]
    x, denoise = process.init_noise((5, 2), generator=seeded()).double(), MIX.denoiser(process)
    theirs = UniPCMultistepScheduler(prediction_type="sample", solver_order=2, solver_type="bh2")
    assert (
        sample(denoise, process, x, ts, unipc()) - walk_of(theirs, process, ts, denoise, x)
    ).abs().max() < 1e-12


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_walks_agree_with_untouched_diffusers(name):  # its own grid, tables and types
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kind = dict(dpmpp_2m=DPMSolverMultistepScheduler, unipc=UniPCMultistepScheduler)[name]
    scheduler, process = (
        kind(prediction_type="sample", solver_order=2, beta_start=1e-4, beta_end=0.02),
        DDPM(),
    )
    scheduler.set_timesteps(10)
    # our t = 1..T is their 0..T-1
    ts = torch.tensor([*(t + 1 for t in scheduler.timesteps.tolist()), 0])
    mix = GaussianMixture(MIX.means.float(), 0.2)
    x, denoise = process.init_noise((5, 2), generator=seeded()), mix.denoiser(process)
    images = x[:, :, None, None]
    for i, t in enumerate(scheduler.timesteps):
        images = scheduler.step(
            denoise(images[:, :, 0, 0], ts[i].expand(5))[:, :, None, None], t, images
        ).prev_sample
    assert (
        sample(denoise, process, x, ts, SOLVERS[name]()) - images[:, :, 0, 0]
    ).abs().max() < 1e-3  # their 1 - abar is float32


# ---------------------------------------------------------------- the linear part
@pytest.mark.parametrize("name", PROCESSES)
def test_with_a_constant_answer_the_linear_part_is_ddim(name):
    process = PROCESSES[name]
    ts = process.steps(6)
    x, x0 = torch.randn(4, 3, generator=seeded(), dtype=F64), torch.randn(
        4, 3, generator=seeded(1), dtype=F64
    )
    for t, s in zip(ts[:-1].expand(4, -1).T, ts[1:].expand(4, -1).T):
        shrink, gain, h = (v[:, None] for v in linear_part(process, t, s))
        want = euler(lambda x, t: x0, process, x, t.double(), s.double())[0]
        assert torch.allclose(shrink * x + gain * x0, want, rtol=1e-9, atol=1e-9) and (h > 0).all()
        for step in SOLVERS.values():
            assert torch.allclose(
                step()(lambda x, t: x0, process, x, t, s)[0], want, rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("case", PROCESSES)
def test_one_point_is_reached_exactly(case, name):
    process, point = PROCESSES[case], torch.tensor([[0.3, -0.9]], dtype=F64)
    for n in (1, 2, 3, 8):
        x = process.init_noise((4, 2), generator=seeded()).double()
        assert torch.allclose(
            sample(exact_denoiser(process, point), process, x, process.steps(n), SOLVERS[name]()),
            point.expand(4, 2),
            atol=1e-10,
        )


def test_moments_of_a_step():
    u = torch.linspace(0, 1, 20_001, dtype=F64)
    for h in (1e-6, 9e-4, 1.1e-3, 0.3, 5.0, 40.0):
        w = (h * (u - 1)).exp()
        want = [torch.trapezoid(w * u**k, u) / torch.trapezoid(w, u) for k in (1, 2)]
        assert torch.allclose(
            _moments(torch.tensor([h], dtype=F64))[:, 0], torch.stack(want), atol=1e-6
        )
    assert (
        _moments(torch.tensor([math.inf], dtype=F64)).tolist() == [[1], [1]]
        and _moments(torch.zeros(1, dtype=F64)).isfinite().all()
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 999), min_size=3, max_size=3, unique=True),
    st.floats(-1, 1),
    st.floats(-1, 1),
)
def test_a_parabola_is_integrated_exactly_by_the_corrector(times, a, b):
    process, (t, m, s) = DDPM(), sorted(map(float, times), reverse=True)

    def answer(x, t):
        return (0.1 + a * lam(process, t) + b * lam(process, t) ** 2)[:, None].expand_as(x)

    def land(*times):
        return sample(
            answer,
            process,
            torch.ones(1, 1, dtype=F64),
            torch.tensor([*times, times[-1] - 1e-7], dtype=F64),
            unipc(),
        )

    way = torch.linspace(m, s, 20_001, dtype=F64)
    weight = lam(process, way).exp()
    mean = torch.trapezoid(answer(way[:, None], way)[:, 0], weight) / (weight[-1] - weight[0])
    shrink, gain, _ = linear_part(process, way[:1], way[-1:])
    want = shrink * land(t, m) + gain * mean
    assert (land(t, m, s) - want).abs().max() < 1e-5 * (1 + want.abs().max())


# ---------------------------------------------------------------- measured orders
ORDERS = {
    "cosine 900 to 100": (DDPM(1000, "cosine"), line(900, 100), 2, 3),
    "ve to 0.1": (VE(), line(1, 0.1), 2, 3),
    "edm to sigma 0.002": (EDM(), lambda n: rho_levels(n + 1), 2, 3),
    "flow inside": (Flow(), line(0.9, 0.1), 2, 3),
    "flow to 0": (Flow(), line(1, 0), 1.8, 2),
}


@pytest.mark.parametrize("case", ORDERS)
def test_measured_order_on_normal_data(case):
    process, grid, *expected = ORDERS[case]
    law, errors = GaussianMixture(torch.full((1, 1), 0.7, dtype=F64), 0.5), {k: [] for k in SOLVERS}

    def spread(t):
        return ((0.5 * process.alpha(t)) ** 2 + process.sigma(t) ** 2).sqrt()

    for n in (128, 256):
        ts = grid(n)
        x = 0.7 * process.alpha(ts[0]) + spread(ts[0]) * torch.tensor(
            [[0.3], [-1.0], [2.0]], dtype=F64
        )
        want = 0.7 * process.alpha(ts[-1]) + spread(ts[-1]) / spread(ts[0]) * (
            x - 0.7 * process.alpha(ts[0])
        )
        for k in SOLVERS:
            errors[k].append(
                (sample(law.denoiser(process), process, x, ts, SOLVERS[k]()) - want)
                .abs()
                .max()
                .item()
            )
    for (k, (a, b)), order in zip(errors.items(), expected):
        assert abs(math.log2(a / b) - order) < 0.2, (k, math.log2(a / b))
    assert errors["unipc"][1] < errors["dpmpp_2m"][1] / 4


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("case", PROCESSES)
def test_a_mixture_is_reached_better_than_by_euler(case, name):
    process = PROCESSES[case]
    x, denoise = process.init_noise((64, 2), generator=seeded()).double(), MIX.denoiser(process)
    times = (
        process.steps
        if case in ("edm", "flow")
        else lambda n: log_snr_steps(process, n, sigma_max=40.0)
    )
    truth = sample(denoise, process, x, times(150), heun)

    def off(step):
        return (sample(denoise, process, x, times(20), step) - truth).pow(2).mean().sqrt().item()

    assert off(SOLVERS[name]()) < 0.6 * off(euler)


# ---------------------------------------------------------------- cost and memory
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("case", PROCESSES)
def test_one_evaluation_a_step(case, name):
    process = PROCESSES[case]
    for n in (1, 2, 7):
        count = counted(MIX.denoiser(process))
        assert (
            sample(
                count,
                process,
                process.init_noise((3, 2)).double(),
                process.steps(n),
                make_step(name),
            )
            .isfinite()
            .all()
            and count.calls == n
        )


@pytest.mark.parametrize("name", SOLVERS)
def test_memory_starts_anew(name):
    process, step = DDPM(), SOLVERS[name]()
    denoise, x, ts = (
        MIX.denoiser(process),
        torch.randn(6, 2, generator=seeded(), dtype=F64),
        torch.tensor([1000, 700, 400, 100]),
    )  # ends above 0
    want = sample(denoise, process, x, ts, SOLVERS[name]())
    for _ in range(2):
        assert torch.equal(sample(denoise, process, x, ts, step), want)  # a second run
    # chunks, the last is smaller
    chunks = [sample(denoise, process, x[i : i + 4], ts, step) for i in (0, 4)]
    assert torch.allclose(torch.cat(chunks), want, atol=1e-14)
    sample(denoise, process, x, torch.tensor([900, 650, 200]), step)  # another grid between
    assert torch.equal(sample(denoise, process, x, ts, step), want)
    # stops on the way, goes on later with the same memory: one walk
    mine = {}
    first = sample(denoise, process, x, ts[:3], step, memory=mine)
    assert torch.equal(sample(denoise, process, first, ts[2:], step, memory=mine), want)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_walk_that_begins_where_another_ended_is_another_walk(name):
    "It was taken for the same one: -1.507 instead of -1.369."
    process, step = DDPM(), SOLVERS[name]()
    denoise, (a, b) = MIX.denoiser(process), torch.randn(2, 6, 2, generator=seeded(), dtype=F64)
    high, low = (torch.tensor(v, dtype=F64) for v in ([990, 700, 500], [500, 200, 10]))
    sample(denoise, process, a, high, step)
    want = sample(denoise, process, b, low, SOLVERS[name]())
    assert torch.equal(sample(denoise, process, b, low, step), want)


@pytest.mark.parametrize("name", SOLVERS)
def test_without_memory_every_step_is_ddim(name):
    process, step = DDPM(), SOLVERS[name]()
    denoise, x = MIX.denoiser(process), torch.randn(6, 2, generator=seeded(), dtype=F64)
    for t, s in ((900, 600), (600, 300), (600, 300), (300, 0)):
        t, s = torch.full((6,), t), torch.full((6,), s)
        want = euler(denoise, process, x, t, s)[0]
        assert torch.allclose(step(denoise, process, x, t, s)[0], want, atol=1e-12)


def spread_missed(rule, process, n, size=60_000):
    "Of N(0.7, 0.5^2): how far the standard deviation of the samples is off."
    law = GaussianMixture(torch.full((1, 1), 0.7, dtype=F64), 0.5)
    u = torch.linspace(-1, 1, size + 2, dtype=F64)[1:-1, None]
    ts = rho_steps(process, n)
    top = ((0.5 * process.alpha(ts[:1])) ** 2 + process.sigma(ts[:1]) ** 2).sqrt()
    x = 0.7 * process.alpha(ts[:1]) + top * u.erfinv() * 2**0.5
    out = sample(law.denoiser(process), process, x, ts, rule, generator=seeded(5))
    return abs(out.std().item() - 0.5)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("process", [EDM(), VP()], ids=["edm", "vp"])
def test_a_solver_inside_churn_keeps_its_memory(process, name):
    "It fell back to first order: 0.038 and 0.020 at 40 and 80 steps, in place of 0.010 and 0.003."

    def missed(make, n):  # the paper's S_churn is 1
        rule = churn(1 / n, low=0, high=math.inf, extra=1.0, step=make)
        return spread_missed(rule, process, n)

    order = math.log2(missed(SOLVERS[name](), 20) / missed(SOLVERS[name](), 40))
    first = math.log2(missed(euler, 20) / missed(euler, 40))
    assert 0.8 < first < 1.2 and order > 1.6, (first, order)
    assert missed(SOLVERS[name](), 40) < 0.4 * missed(euler, 40)


@pytest.mark.parametrize("name", SOLVERS)
def test_churn_without_noise_is_the_solver_inside(name):
    process, x = VP(), torch.randn(3, 2, generator=seeded(), dtype=F64)
    ts = process.steps(7)
    want = sample(MIX.denoiser(process), process, x, ts, SOLVERS[name]())
    for rule in (churn(0.0, step=name), corrected(SOLVERS[name](), n=0)):
        got = sample(MIX.denoiser(process), process, x, ts, rule)
        assert torch.allclose(got, want, atol=1e-8)


# ---------------------------------------------------------------- DPM-Solver++ (2M) on the SDE
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", PROCESSES)
def test_2m_sde_walks_every_process(case, eta):
    process, rule = PROCESSES[case], build("sampler", "dpmpp_2m_sde", eta=eta)
    assert rule.config == dict(name="dpmpp_2m_sde", eta=eta)
    x, d = process.prior((2000, 2), generator=seeded()).double(), MIX.denoiser(process)
    out = sample(d, process, x, process.steps(40), rule, generator=seeded(1))
    assert out.isfinite().all()
    assert (out.mean(0) - MIX.means.mean(0)).abs().max() < 0.07
    near = torch.cdist(out, MIX.means).argmin(1).bincount(minlength=3) / 2000
    assert (near - 1 / 3).abs().max() < 0.07
    if eta == 0:
        plain = sample(d, process, x, process.steps(40), dpmpp_2m())
        assert torch.equal(out, plain)


def test_2m_sde_is_ddpm_without_a_line_and_better_with_it():
    process, x = VP(), torch.randn(3, 2, generator=seeded(), dtype=F64)
    t, s = torch.full((3,), 0.6, dtype=F64), torch.full((3,), 0.4, dtype=F64)
    d = MIX.denoiser(process)
    got = dpmpp_2m_sde(d, process, x, t, s, generator=seeded())[0]
    want = euler(d, process, x, t, s, eta=1.0, generator=seeded())[0]
    assert torch.allclose(got, want, atol=1e-12)
    missed = [spread_missed(dpmpp_2m_sde, EDM(), n) for n in (40, 80)]
    first = [spread_missed(functools.partial(euler, eta=1.0), EDM(), n) for n in (40, 80)]
    assert missed[0] < 0.5 * first[0] and missed[1] < 0.5 * first[1], (missed, first)
    assert math.log2(missed[0] / missed[1]) > 0.8, missed


@pytest.mark.parametrize("name", SOLVERS)
def test_images_do_not_depend_on_the_chunks(name):
    diff, step = tiny_diffusion(), SOLVERS[name]()
    whole = diff.sample([0, 1, 2, 0, 1, 2, 0], n_steps=4, step=step, seed=0)
    assert torch.allclose(
        diff.sample([0, 1, 2, 0, 1, 2, 0], n_steps=4, step=step, seed=0, chunk=3), whole, atol=1e-5
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_two_walks_at_once_do_not_meet(name):
    process, a, b = VP(), SOLVERS[name](), SOLVERS[name]()
    denoise, x, ts = (
        MIX.denoiser(process),
        torch.randn(3, 2, generator=seeded(), dtype=F64),
        VP().steps(5),
    )
    want, xs = sample(denoise, process, x, ts, SOLVERS[name]()), [x, -x]
    memories = {}, {}
    for t, s in zip(ts[:-1], ts[1:]):
        xs = [
            step(denoise, process, y, t.expand(3), s.expand(3), memory=m)[0]
            for step, y, m in zip((a, b), xs, memories)
        ]
    assert torch.equal(xs[0], want)


@pytest.mark.parametrize("name", SOLVERS)
def test_examples_may_stand_at_different_times(name):
    process, step = DDPM(), SOLVERS[name]()
    denoise, x = MIX.denoiser(process), torch.randn(3, 2, generator=seeded(), dtype=F64)
    times = torch.tensor([[900, 300, 40], [500, 299, 20], [100, 200, 0]])  # one of them finishes
    together, memory = x, {}
    for t, s in zip(times[:-1], times[1:]):
        together = step(denoise, process, together, t, s, memory=memory)[0]
    alone = [sample(denoise, process, x[i : i + 1], times[:, i], SOLVERS[name]()) for i in range(3)]
    assert together.isfinite().all() and torch.allclose(together, torch.cat(alone), atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
# a wrapper that moves the point between two steps, such as a Langevin step, does not lose its move
def test_a_correction_keeps_what_others_added(name):
    process, ts = VP(), torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=F64)

    def walk(shift, denoise=lambda x, t: torch.full_like(x, 0.3)):
        step, x, memory = SOLVERS[name](), torch.ones(4, 2, dtype=F64), {}
        for t, s in zip(ts[:-1], ts[1:]):
            x = step(denoise, process, x, t.expand(4), s.expand(4), memory=memory)[0]
            x = x + shift * (s == 0.8)
        return x

    # the answers are always the same: a shift shrinks with sigma
    kept = process.sigma(ts[3]) / process.sigma(ts[1])
    assert torch.allclose(walk(1.0) - walk(0.0), kept.expand(4, 2), atol=1e-12)
    out = sample(
        MIX.denoiser(process),
        process,
        torch.ones(4, 2, dtype=F64),
        VP().steps(6),
        corrected(SOLVERS[name](), n=1),
        generator=seeded(1),
    )
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 5), (2, 1, 4, 4), (1, 2, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_any_shape_and_type(name, shape, dtype):
    def denoise(x, t):
        return 0.8 * x.tanh()

    for process in (Flow(), DDPM()):
        out = sample(
            denoise,
            process,
            torch.randn(shape, generator=seeded()).to(dtype),
            process.steps(6),
            SOLVERS[name](),
        )
        assert out.shape == shape and out.dtype == dtype and out.isfinite().all()


# ---------------------------------------------------------------- grids
@pytest.mark.parametrize("case", PROCESSES)
@pytest.mark.parametrize("n", [1, 2, 10])
def test_log_snr_grid(case, n):
    process = PROCESSES[case]
    ts = log_snr_steps(process, n)
    assert (
        len(ts) == n + 1
        and ts.dtype == F64
        and ts[0] == process.t_max
        and ts[-1] == 0
        and (ts.diff() < 0).all()
    )
    inner = lam(process, log_snr_steps(process, max(n, 3), sigma_max=5.0, sigma_min=0.05)[:-1])
    assert abs(inner[0].exp() * 5 - 1) < 1e-6 and abs(inner[-1].exp() * 0.05 - 1) < 1e-6
    assert torch.allclose(inner.diff(), inner.diff()[0], rtol=1e-6)


@pytest.mark.parametrize(
    "kw, word",
    [
        (dict(n=0), "at least 1 step"),
        (dict(n=5, sigma_min=0.0), "between 0 and 80"),
        (dict(n=5, sigma_max=1.0, sigma_min=2.0), "between 0 and 1"),
    ],
)
def test_grids_that_make_no_sense(kw, word):
    with pytest.raises(ValueError, match=word):
        log_snr_steps(EDM(), **kw)


# ---------------------------------------------------------------- thresholding
@pytest.mark.parametrize("q", [0.9, 0.995])
def test_threshold_like_diffusers(q):
    from diffusers import DDPMScheduler

    x = (
        torch.randn(4, 3, 8, 8, generator=seeded())
        * torch.tensor([0.2, 1.0, 2.0, 9.0])[:, None, None, None]
    )
    theirs = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=q, sample_max_value=100.0)
    assert torch.allclose(
        threshold(lambda x, t: x, q)(x, None), theirs._threshold_sample(x), atol=1e-6
    )
    assert torch.allclose(
        DDPMScheduler(thresholding=True)._threshold_sample(x), x.clamp(-1, 1)
    )  # their default only clips


def test_threshold_is_a_wrapper_that_passes_conditions_on():
    seen = []

    def denoise(x, t, y=None, mask=None):
        seen.append((y, mask))
        return 3 * x

    # one number per example
    out = threshold(denoise, 1.0, bound=0.5)(torch.tensor([-1.0, 0.1, 2.0]), None, 7, mask=8)
    assert out.tolist() == pytest.approx([-0.5, 0.3, 0.5]) and seen == [(7, 8)]
    assert threshold(denoise)(torch.randn(2, 3, dtype=torch.bfloat16), None).dtype == torch.bfloat16


@pytest.mark.parametrize("q", [0.0, -1, 1.5, 99.5, float("nan")])
def test_q_is_a_share(q):
    with pytest.raises(ValueError, match="share of pixels"):
        threshold(lambda x, t: x, q)
