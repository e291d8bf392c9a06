"""The straight line: closed forms, orders, parity with diffusers, the same walk as DDIM, coupled
pairs from end to end, bad input."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_course.denoiser import PARAMS, Denoiser, edm_param, flow_param
from ddpm_course.edm import EDM
from ddpm_course.flow import Flow, coupled_pairs, straightness
from ddpm_course.model import make_process
from ddpm_course.process import DDPM
from ddpm_course.sampling import ancestral, euler, heun, sample
from ddpm_course.score import GaussianMixture, PointNet
from ddpm_course.sde import VP, SubVP, probability_flow, rates, time_of
from ddpm_course.training import Diffusion

F64 = torch.float64
MIX = GaussianMixture(
    torch.tensor([[-1.5, -1.0], [1.6, -0.4], [0.1, 1.5]], dtype=F64), 0.3, [0.5, 0.3, 0.2]
)
QUICK = dict(loggers=[], progress=False, precision="float32", channels_last=False)


def seeded(s=0):
    return torch.Generator().manual_seed(s)


def noise(*shape, s=0):
    return torch.randn(*shape, generator=seeded(s), dtype=F64)


def line(n):
    return torch.linspace(1, 0, n + 1, dtype=F64)


def normal(c=0.5, m=0.0):
    return GaussianMixture(torch.full((1, 1), m, dtype=F64), c)


# ---------------------------------------------------------------- the process
def test_the_straight_line():
    flow, t = Flow(), torch.rand(7, dtype=F64)
    x0, eps = noise(2, 7, 3)
    assert torch.equal(flow.alpha(t) + flow.sigma(t), torch.ones(7, dtype=F64)) and (
        flow.alpha(t[0] * 0),
        flow.sigma(t[0] * 0),
    ) == (1, 0)
    torch.testing.assert_close(flow.add_noise(x0, t, eps), torch.lerp(x0, eps, t[:, None]))
    assert [r.unique().tolist() for r in rates(flow, t)] == [[-1.0], [1.0]]
    assert flow.steps(5).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0]) and flow.init_noise(
        (2000,), generator=seeded()
    ).std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_training_times(times):
    flow = make_process(**Flow(times).config)
    assert flow.times == times
    t = flow.sample_t(50_000, generator=seeded())
    logit = (t.double() / (1 - t.double())).log()
    assert (
        t.shape == (50_000,)
        and ((t > 0) & (t <= 1)).all()
        and torch.equal(t, flow.sample_t(50_000, generator=seeded()))
    )
    # variance of a uniform number; of the sigmoid of a normal one
    want = dict(uniform=1 / 12, logit_normal=0.0434)[times]
    assert abs(t.mean() - 0.5) < 0.005 and abs(t.var() - want) < 0.002
    if times == "logit_normal":
        assert abs(logit.mean()) < 0.02 and abs(logit.std() - 1) < 0.02
    assert not torch.equal(
        t,
        Flow("uniform" if times != "uniform" else "logit_normal").sample_t(
            50_000, generator=seeded()
        ),
    )


@pytest.mark.parametrize("name", [*PARAMS, "edm"])
def test_what_may_be_predicted(name):
    param = PARAMS.get(name) or edm_param()
    if name in ("eps", "score"):
        with pytest.raises(ValueError, match=f"{name}_param does not work with Flow.*flow_param"):
            Denoiser(PointNet(), Flow(), param)
    else:
        assert (
            Denoiser(PointNet(), Flow(), param)(torch.randn(3, 2), torch.ones(3)).isfinite().all()
        )
    with (
        pytest.raises(ValueError, match="does not work")
        if name in ("eps", "score")
        else torch.no_grad()
    ):
        Diffusion(PointNet(), Flow(), name, shape=(2,), device="cpu")


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-6, 1), st.integers(0, 99))
def test_the_target_is_the_velocity_of_the_pair(t, seed):
    x0, eps = noise(2, 3, 4, s=seed)
    says = noise(3, 4, s=seed + 1)
    model = Denoiser(lambda x, clock, cond: says, Flow(), flow_param)
    torch.testing.assert_close(
        model.target(x0, eps, torch.full((3,), t, dtype=F64)), eps - x0, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        model.loss(x0, t=t, eps=eps), (says - (eps - x0)).pow(2).mean(1), rtol=1e-9, atol=1e-9
    )
    x = Flow().add_noise(x0, torch.tensor([t], dtype=F64), eps)
    torch.testing.assert_close(
        probability_flow(model, Flow())(x, torch.tensor(t, dtype=F64)), says, rtol=1e-6, atol=1e-6
    )


# ---------------------------------------------------------------- walking it
def error(law, n, step):
    c, m, x = law.std.item(), law.means.item(), noise(50, 1)
    return (
        (sample(law.denoiser(Flow()), Flow(), x, line(n), step) - (m + c * x)).abs().max().item()
    )  # the ends of the exact paths


@pytest.mark.parametrize("step, order", [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("law", [normal(0.5), normal(1.3, 0.7)], ids=["narrow", "wide, shifted"])
def test_orders(step, order, law):
    assert error(law, 256, step) < (0.02 if step is euler else 3e-4)
    assert math.log2(error(law, 128, step) / error(law, 256, step)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("step, order", [(euler, 1), (heun, 2)])
def test_orders_on_three_clusters(step, order):
    x, denoise = noise(100, 2), MIX.denoiser(Flow())
    truth = sample(denoise, Flow(), x, line(2000), heun)
    e = [
        (sample(denoise, Flow(), x, line(n), step) - truth).norm(dim=1).median().item()
        for n in (64, 128)
    ]
    assert math.log2(e[0] / e[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(
    "process",
    [DDPM(), DDPM(1000, "cosine"), VP(), SubVP()],
    ids=lambda p: p.config["name"] + p.config.get("schedule", ""),
)
@pytest.mark.parametrize("n", [3, 40])
def test_euler_is_ddim_at_the_same_levels(process, n):
    ts = process.steps(n).double()
    alpha, sigma = process.alpha(ts), process.sigma(ts)
    same, x = time_of(Flow(), sigma / alpha), noise(30, 2)
    torch.testing.assert_close(same, sigma / (alpha + sigma), rtol=1e-9, atol=1e-12)
    x_flow = x / (alpha + sigma)[0]
    a, b = sample(MIX.denoiser(process), process, x, ts), sample(
        MIX.denoiser(Flow()), Flow(), x_flow, same
    )
    assert (a - b).abs().max() < 1e-6
    torch.testing.assert_close(
        straightness(MIX.denoiser(process), process, x, ts),
        straightness(MIX.denoiser(Flow()), Flow(), x_flow, same),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize("n", [1, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_step_like_diffusers(n, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=line(n)[:-1].tolist())
    ours = shift * line(n) / (1 + (shift - 1) * line(n))
    torch.testing.assert_close(scheduler.sigmas.double(), ours, rtol=0, atol=1e-6)
    x, u = noise(3, 1, 8, 8), noise(3, 1, 8, 8, s=1)
    model = Denoiser(lambda x, clock, cond: u, Flow(), flow_param)
    for i, t in enumerate(scheduler.timesteps):
        want = scheduler.step(u, t, x).prev_sample
        got = euler(model, Flow(), x, ours[i].expand(3), ours[i + 1].expand(3))[0]
        assert (got - want).abs().max() < 1e-5
        # their timestep is our clock
        torch.testing.assert_close(Flow().clock(ours[i]).float(), t, rtol=1e-5, atol=1e-3)
        x = want


def test_neighbours_never_overtake():
    law = GaussianMixture(torch.tensor([[-1.3], [0.9]], dtype=F64), 0.12, [0.4, 0.6])
    x, film = noise(500, 1).sort(0).values, []
    end = sample(
        law.denoiser(Flow()), Flow(), x, line(200), heun, callback=lambda **k: film.append(k["x"])
    )
    assert all((f.diff(dim=0) >= 0).all() for f in [*film, end])
    assert ((end < -0.2).double().mean() - 0.4).abs() < 4 * (0.24 / 500) ** 0.5


# ---------------------------------------------------------------- how straight
@pytest.mark.parametrize("c, want", [(0.0, 0.0), (1.0, 2 - math.pi / 2), (0.5, None)])
def test_straightness_of_a_normal_law(c, want):
    t = torch.linspace(0, 1, 20_001, dtype=F64)
    v = (1 - t) ** 2 * c**2 + t**2
    if want is None:
        # x_t = x_1 sqrt(v_t): mean square of the speed, less the square of its mean
        want = (v.sqrt().diff() ** 2 / t.diff()).sum().item() - (1 - c) ** 2
    x = noise(20, 1)
    got = straightness(normal(c).denoiser(Flow()), Flow(), x, line(2000))
    assert got.shape == (20,) and torch.allclose(got, want * x[:, 0] ** 2, rtol=5e-3, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sampled_from([torch.float32, F64]),
)
def test_straight_paths_of_any_shape(shape, n, dtype):
    x = noise(*shape).to(dtype)

    def doubled(x, t):
        # data are twice their noise: x_t = (2 - t) eps
        return 2 * x / (2 - t.reshape(-1, *[1] * (x.ndim - 1))).to(x)

    got = straightness(doubled, Flow(), x, line(n).to(dtype))
    assert got.shape == (shape[0],) and got.dtype == dtype and got.abs().max() < 1e-9
    # one step is exact
    assert torch.allclose(sample(doubled, Flow(), x, line(1).to(dtype)), 2 * x, atol=1e-5)
    assert straightness(lambda x, t: x.sin(), Flow(), noise(40, 3), line(9)).mean() > 1e-3


# ---------------------------------------------------------------- pairs
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 10), st.booleans())
def test_pairs_do_not_depend_on_the_batches(n, batch_size, labels):
    eps, y = noise(n, 2), torch.arange(n) if labels else None

    def denoise(x, t, cond=None):
        return MIX.denoiser(Flow())(x, t) + (0 if cond is None else cond[:, None])

    pairs = coupled_pairs(denoise, Flow(), eps, line(4), y, batch_size=batch_size)
    assert [len(x) for x, *_ in pairs] == [len(p) for p in eps.split(batch_size)] and torch.equal(
        torch.cat([e for *_, e in pairs]), eps
    )
    x, told = torch.cat([p[0] for p in pairs]), (
        (lambda x, t: denoise(x, t, y)) if labels else denoise
    )
    torch.testing.assert_close(x, sample(told, Flow(), eps, line(4), heun))
    assert (
        torch.equal(torch.cat([p[1] for p in pairs]), y)
        if labels
        else all(p[1] is None for p in pairs)
    )
    assert not x.requires_grad


@pytest.mark.parametrize(
    "process, ts",
    [
        (VP(), torch.cat([line(600)[:-1] ** 2, torch.zeros(1, dtype=F64)])),
        (EDM(), EDM().steps(200)),
    ],
    ids=["vp", "edm"],
)
def test_pairs_of_another_process_begin_at_its_noise(process, ts):
    law = normal(0.5, 0.3)
    ((x, _, e),) = coupled_pairs(law.denoiser(process), process, noise(200, 1), ts)
    # in one dimension every flow keeps the order: the same pairs
    assert (x - (0.3 + 0.5 * e)).abs().max() < 0.01


# on N(0, 1) the first stands where it began after a detour; the second stands still
def test_a_second_flow_needs_one_step():
    g = seeded()
    eps = torch.randn(64 * 40, 1, generator=g)
    pairs = coupled_pairs(
        normal(1.0).denoiser(Flow()), Flow(), eps, Flow().steps(12), batch_size=64
    )
    torch.manual_seed(0)
    free, second = (
        Diffusion(PointNet(1, 32, 2), Flow(), "velocity", shape=(1,), device="cpu").fit(
            SimpleNamespace(train=b, valid=v), total_steps=300, **QUICK
        )
        for b, v in (([(x, y) for x, y, _ in pairs], []), (pairs, pairs[:2]))
    )
    start = torch.randn(500, 1, generator=g)
    one, two = (sample(d.ema_model, Flow(), start, Flow().steps(1)) for d in (free, second))
    assert one.std() < 0.65 and (two - start).abs().mean() < 0.15  # the mean; the noise itself
    assert (
        straightness(second.ema_model, Flow(), start, Flow().steps(20)).mean()
        < 0.2 * straightness(free.ema_model, Flow(), start, Flow().steps(20)).mean()
    )
    # nothing is left to chance in these pairs
    assert second.history[-1]["valid_loss"] < 0.05 < free.history[-1]["loss"]


def test_noise_that_does_not_fit_is_refused():
    x = torch.zeros(4, 2)
    diff = Diffusion(PointNet(), Flow(), "velocity", shape=(2,), device="cpu")
    with pytest.raises(ValueError, match=r"noise of shape \(3, 2\) for points of shape \(4, 2\)"):
        diff.fit(SimpleNamespace(train=[(x, None, x[:3])], valid=[]), total_steps=2, **QUICK)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Flow("logit-normal"), "Did you mean 'logit_normal'"),
        (
            lambda: coupled_pairs(
                MIX.denoiser(Flow()), Flow(), noise(5, 2), line(3), torch.arange(4)
            ),
            "4 labels for 5 noises",
        ),
        (
            lambda: coupled_pairs(MIX.denoiser(Flow()), Flow(), noise(5, 2), line(3).flip(0)),
            "only the last may be 0",
        ),
        (
            lambda: coupled_pairs(MIX.denoiser(Flow()), Flow(), torch.ones(5, 2).long(), line(3)),
            "floats",
        ),
        (
            lambda: straightness(MIX.denoiser(Flow()), Flow(), noise(5, 2), line(3)[:1]),
            "at least 2 times",
        ),
        (
            lambda: sample(MIX.denoiser(Flow()), Flow(), noise(5, 2), Flow().steps(0)),
            "at least 1 step",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_random_steps_also_walk_it():
    x = sample(
        normal(0.5).denoiser(Flow()),
        Flow(),
        noise(4000, 1),
        line(60),
        ancestral,
        generator=seeded(1),
    )
    assert abs(x.std() - 0.5) < 0.04
