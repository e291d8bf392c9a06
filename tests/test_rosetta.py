"""The dictionary between frameworks: conversions against closed forms, translated denoisers against
exact ones, diffusers' schedulers, loss weightings, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_course.core import bcast
from ddpm_course.denoiser import PARAMS, Denoiser, edm_param, exact_denoiser, v_param
from ddpm_course.edm import EDM
from ddpm_course.flow import Flow
from ddpm_course.guidance import cfg
from ddpm_course.process import DDPM
from ddpm_course.rosetta import (
    SHARES,
    TIMES,
    arrow,
    convert,
    loss_weight,
    ours,
    same_level,
    theirs,
    translate,
)
from ddpm_course.sampling import ancestral, euler, heun, sample
from ddpm_course.score import NCSN, GaussianMixture
from ddpm_course.sde import VE, VP, SubVP, solve_ode

F64 = torch.float64
FAMILIES = dict(
    ddpm=DDPM(),
    cosine=DDPM(1000, "cosine"),
    vp=VP(),
    sub_vp=SubVP(),
    ve=VE(),
    edm=EDM(),
    flow=Flow(),
    ncsn=NCSN(),
)
WORDS = dict(
    ddpm="eps x0 v score",
    cosine="eps x0 v score",
    vp="eps x0 v score",
    sub_vp="eps x0 score",
    ve="eps x0 score",
    edm="eps x0 score",
    flow="eps x0 velocity score",
    ncsn="eps x0 score",
)
LEVELS = torch.logspace(-2, 1.6, 9, dtype=F64)  # 0.01 to 40: every family has them
mix = GaussianMixture(
    torch.tensor([[2.0, 0], [-1, 1.5], [0, -1]], dtype=F64),
    torch.tensor([0.3, 0.1, 0.5], dtype=F64),
    [0.5, 0.3, 0.2],
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def at_level(p, level=LEVELS):
    return same_level(level, EDM(), p)  # EDM's time is its noise level


def pair(n=9, seed=0, shape=(2,)):
    return torch.randn(n, *shape, generator=seeded(seed), dtype=F64), torch.randn(
        n, *shape, generator=seeded(seed + 1), dtype=F64
    )


def length(p, t):
    return torch.stack(arrow(p, t)).norm(dim=0)


# ---------------------------------------------------------------- convert
@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.data(), st.floats(0.005, 40.0))
def test_every_word_to_every_other_and_back(name, data, level):
    p, words = FAMILIES[name], WORDS[name].split()
    frm, to = data.draw(st.sampled_from(words)), data.draw(st.sampled_from(words))
    t, (x0, eps) = at_level(p, torch.tensor([level], dtype=F64)), pair(4)
    alpha, sigma = (c[:, None] for c in arrow(p, t))
    said = {
        w: sum(share * part for share, part in zip(SHARES[w](alpha, sigma), (x0, eps)))
        for w in (frm, to)
    }
    x_t = alpha * x0 + sigma * eps
    there = convert(said[frm], x_t, p, t, frm, to)
    assert torch.allclose(there, said[to], rtol=1e-9, atol=1e-9)
    assert torch.allclose(convert(there, x_t, p, t, to, frm), said[frm], rtol=1e-9, atol=1e-9)


class Says(nn.Module):  # a network with a fixed answer
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, clock, cond=None):
        return self.answer


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_convert_is_what_the_denoiser_does(name):
    p, (x0, eps) = FAMILIES[name], pair(9)
    t, answer = at_level(p), torch.randn(9, 2, generator=seeded(5), dtype=F64)
    x_t = p.add_noise(x0, t, eps)
    for word, param in [
        *((w, PARAMS[w]) for w in WORDS[name].split()),
        (edm_param(0.7), edm_param(0.7)),
        (v_param, v_param),
    ]:
        if name in ("flow", "cosine") and word == "eps" or name == "flow" and word == "score":
            continue  # Denoiser refuses them: alpha is (nearly) 0 at the end
        try:
            d = Denoiser(Says(answer), p, param)
        except ValueError:
            continue
        assert torch.allclose(
            convert(answer, x_t, p, t, word, "x0"), d(x_t, t), rtol=1e-9, atol=1e-9
        )
        assert torch.allclose(
            convert(x0, x_t, p, t, "x0", word), d.target(x0, eps, t), rtol=1e-7, atol=1e-7
        )


def test_convert_keeps_shape_type_and_one_time_for_all():
    x_t, v = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    out = convert(v, x_t, VP(), 0.3, "v", "eps")
    assert out.shape == v.shape and out.dtype == torch.float32
    each = torch.stack(
        [
            convert(v[i : i + 1], x_t[i : i + 1], VP(), torch.tensor([0.3]), "v", "eps")[0]
            for i in range(3)
        ]
    )
    assert torch.allclose(out, each)


def test_float32_stays_exact_where_x0_hat_would_explode():
    p, (x0, eps) = DDPM(1000, "cosine"), pair(1)
    t = torch.tensor([1000])  # alpha is about 5e-5
    v = (p.alpha(t) * eps - p.sigma(t) * x0).float()
    assert (convert(v, p.add_noise(x0, t, eps).float(), p, t, "v", "eps") - eps).abs().max() < 1e-6


# ---------------------------------------------------------------- times and translated denoisers
@pytest.mark.parametrize("a", sorted(FAMILIES))
def test_same_level_has_the_same_level_and_comes_back(a):
    A, t = FAMILIES[a], at_level(FAMILIES[a])
    for B in FAMILIES.values():
        s = same_level(t, A, B)
        alpha, sigma = arrow(B, s)
        assert torch.allclose(sigma / alpha, LEVELS, rtol=1e-9) and torch.allclose(
            same_level(s, B, A), t, rtol=1e-9
        )
        # data is data, whatever the shape
        assert same_level(torch.zeros(2, 1), A, B).tolist() == [[0.0], [0.0]]
    assert same_level(torch.tensor(40), EDM(), DDPM()).shape == ()  # whole numbers too


def test_levels_that_a_process_does_not_have():
    assert (
        same_level(1.0, Flow(), EDM()) == 80
        and same_level(1.0, Flow(), DDPM()) == 1000
        and same_level(1.0, VP(), VE()) == 1
    )
    x, d = torch.randn(3, 2, dtype=F64), mix.denoiser(EDM())
    # noise of as good as the right strength
    assert torch.allclose(translate(d, EDM(), Flow())(x, 1.0), d(math.hypot(1, 80) * x, 80.0))


@pytest.mark.parametrize("a", sorted(FAMILIES))
def test_translated_exact_denoiser_is_the_exact_denoiser(a):
    A, x0, eps = FAMILIES[a], mix.sample(9, seeded()), pair(9)[1]
    for B in FAMILIES.values():
        t = at_level(B)
        x = B.add_noise(x0, t, eps)
        assert (translate(mix.denoiser(A), A, B)(x, t) - mix.denoiser(B)(x, t)).abs().max() < 1e-9
        # no noise: nothing to do
        assert (translate(mix.denoiser(A), A, B)(x0, 0.0) - x0).abs().max() < 1e-9


def test_translate_passes_conditions_on_and_keeps_the_type():
    images, labels = torch.rand(20, 1, 3, 3, generator=seeded()) * 2 - 1, torch.arange(20) % 3
    A, B, x, y = VP(), Flow(), torch.randn(4, 1, 3, 3), torch.tensor([0, 1, 2, 3])
    there, here = translate(exact_denoiser(A, images, labels), A, B), exact_denoiser(
        B, images, labels
    )
    for t in (0.3, torch.tensor([0.1, 0.5, 0.9, 0.98])):
        assert there(x, t, y).dtype == torch.float32 and torch.allclose(
            there(x, t, y), here(x, t, y), atol=1e-4
        )
        assert torch.allclose(there(x, t, cond=y), here(x, t, y), atol=1e-4)
        assert torch.allclose(
            cfg(there, y, 2.0, 3)(x, t),
            translate(lambda x, t: cfg(exact_denoiser(A, images, labels), y, 2.0, 3)(x, t), A, B)(
                x, t
            ),
            atol=1e-5,
        )


def test_two_translations_are_one():
    A, B, C = DDPM(), EDM(), Flow()
    x, t = torch.randn(9, 2, dtype=F64), at_level(C)
    assert torch.allclose(
        translate(translate(mix.denoiser(A), A, B), B, C)(x, t),
        translate(mix.denoiser(A), A, C)(x, t),
        atol=1e-9,
    )


# ---------------------------------------------------------------- sampling
def ends(p, step, levels, seed=None, **kw):
    ts, (_, eps) = torch.cat([at_level(p, levels), torch.zeros(1, dtype=F64)]), pair(20)
    x = bcast(arrow(p, ts[:1])[1], eps) * eps
    return sample(
        translate(mix.denoiser(VP()), VP(), p),
        p,
        x,
        ts,
        step,
        **kw,
        **({} if seed is None else dict(generator=seeded(seed))),
    )


def test_euler_and_ancestral_are_the_same_in_every_family():
    levels = torch.logspace(1.5, -2, 8, dtype=F64)
    for step, kw in ((euler, {}), (euler, dict(eta=0.5, seed=3)), (ancestral, dict(seed=3))):
        want = ends(DDPM(), step, levels, **kw)
        for p in FAMILIES.values():
            assert (ends(p, step, levels, **kw) - want).abs().max() < 1e-8
    # measured at the scale of t, added at that of s: it belongs to its process
    beta = dict(variance="beta", seed=3)
    assert (
        ends(DDPM(), ancestral, levels, **beta) - ends(EDM(), ancestral, levels, **beta)
    ).abs().max() > 1e-3


def test_heun_depends_on_the_scale_only_and_less_with_more_steps():
    def gap(n, a, b):
        return (
            (
                ends(a, heun, torch.logspace(1.5, -2, n, dtype=F64))
                - ends(b, heun, torch.logspace(1.5, -2, n, dtype=F64))
            )
            .abs()
            .mean()
            .item()
        )

    assert gap(12, DDPM(), VP()) < 1e-9 and gap(12, VE(), EDM()) < 1e-9  # arrows of the same length
    few, many = gap(20, VP(), EDM()), gap(60, VP(), EDM())
    assert few > 1e-4 and many < few / 4


def test_the_ode_is_the_same_in_every_family():
    (lo, hi), eps = torch.tensor([0.05, 10.0], dtype=F64), pair(6)[1]
    found = {}
    for name in ("vp", "edm", "flow"):
        p = FAMILIES[name]
        t, s = at_level(p, hi), at_level(p, lo)
        x, _ = solve_ode(
            translate(mix.denoiser(VP()), VP(), p),
            p,
            arrow(p, t)[1] * eps,
            t.item(),
            s.item(),
            1e-5,
            1e-5,
        )
        found[name] = x / length(p, s)
    assert (found["vp"] - found["edm"]).abs().max() < 1e-3 and (
        found["vp"] - found["flow"]
    ).abs().max() < 1e-3


# ---------------------------------------------------------------- diffusers
def double(scheduler):
    scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=F64)
    return scheduler


@pytest.mark.parametrize(
    "kind, word", [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")]
)
def test_ddim_like_diffusers_for_each_prediction(kind, word):
    from diffusers import DDIMScheduler

    p, scheduler = DDPM(), double(DDIMScheduler(1000, clip_sample=False, prediction_type=kind))
    scheduler.set_timesteps(20)
    x, said = pair(3, shape=(1, 4, 4))
    times = [*scheduler.timesteps.tolist(), -1]
    for t, s in ((times[0], times[1]), (times[9], times[10]), (times[-2], -1)):
        want = scheduler.step(said, t, x)
        here, there = (ours("diffusers", torch.full((3,), u)) for u in (t, s))
        x_s, x0_hat = euler(lambda x, t: convert(said, x, p, t, word, "x0"), p, x, here, there)
        assert (x0_hat - want.pred_original_sample).abs().max() < 1e-6 and (
            x_s - want.prev_sample
        ).abs().max() < 1e-6
        if kind == "v_prediction":  # what diffusers calls pred_epsilon there
            a, s_ = scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5
            assert (convert(said, x, p, here, "v", "eps") - (a * said + s_ * x)).abs().max() < 1e-9


@pytest.mark.parametrize(
    "schedule, theirs_", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_sigmas_of_euler_discrete_are_noise_levels(schedule, theirs_):
    from diffusers import EulerDiscreteScheduler

    scheduler, p = EulerDiscreteScheduler(1000, beta_schedule=theirs_), DDPM(1000, schedule)
    # the first entries of their float32 table are rounded
    t = ours("diffusers", torch.arange(999, 24, -1))
    alpha, sigma = arrow(p, t)
    assert torch.allclose(scheduler.sigmas[: len(t)].double(), sigma / alpha, rtol=2e-3)
    assert scheduler.sigmas[-1] == 0
    back = theirs(
        "diffusers", same_level(scheduler.sigmas[: len(t)].double(), EDM(sigma_max=1e6), p)
    )
    assert (back - torch.arange(999, 24, -1)).abs().max() < 0.1


def test_walk_of_euler_discrete_is_euler_on_edm():
    from diffusers import EulerDiscreteScheduler

    p, d, scheduler = DDPM(), mix.denoiser(DDPM()), EulerDiscreteScheduler(1000)
    scheduler.set_timesteps(12)
    ts = scheduler.sigmas.double()
    x = theirs_x = ts[0] * pair(5)[1]
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(theirs_x, t)
        now = ours("diffusers", t.double()).expand(5)
        said = convert(d(seen, now), seen, p, now, "x0", "eps")
        theirs_x = scheduler.step(said, t, theirs_x).prev_sample
    assert (
        sample(translate(d, p, EDM(sigma_max=200.0)), EDM(sigma_max=200.0), x, ts) - theirs_x
    ).abs().max() < 2e-3


def test_flow_match_euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    p, d = Flow(), mix.denoiser(Flow())
    plain, shifted = FlowMatchEulerDiscreteScheduler(1000), FlowMatchEulerDiscreteScheduler(
        1000, shift=3.0
    )
    assert torch.allclose(ours("diffusers_flow", plain.timesteps), plain.sigmas) and torch.allclose(
        plain.sigmas.double(), p.steps(1000)[:-1].double(), atol=1e-6
    )
    assert torch.allclose(
        same_level(shifted.sigmas[1:].double(), p, EDM(sigma_max=1e6)),
        3 * same_level(plain.sigmas[1:].double(), p, EDM(sigma_max=1e6)),
        rtol=1e-3,
    )
    plain.set_timesteps(10)
    x = theirs_x = pair(5)[1]
    for t in plain.timesteps:
        said = convert(
            d(theirs_x, ours("diffusers_flow", t)),
            theirs_x,
            p,
            ours("diffusers_flow", t),
            "x0",
            "velocity",
        )
        theirs_x = plain.step(said, t, theirs_x).prev_sample.double()
    assert (sample(d, p, x, plain.sigmas) - theirs_x).abs().max() < 1e-4


def test_edm_clock_like_diffusers():
    from diffusers import EDMEulerScheduler

    assert torch.allclose(theirs("edm", LEVELS), EDMEulerScheduler().precondition_noise(LEVELS))


# ---------------------------------------------------------------- clocks
@pytest.mark.parametrize("name", sorted(TIMES))
def test_clocks_come_back(name):
    t = torch.linspace(0.05, 1, 20, dtype=F64)
    assert torch.allclose(theirs(name, ours(name, t)), t) and torch.allclose(
        ours(name, theirs(name, t)), t
    )


def test_where_the_data_is():
    assert (
        ours("diffusers", -1) == 0
        and ours("flow_matching", 1.0) == 0
        and ours("diffusers_flow", 0) == 0
        and theirs("score_sde", 1) == 999
    )


# ---------------------------------------------------------------- weightings
def test_weights_in_closed_form():
    lam = torch.linspace(-5, 5, 21, dtype=F64)
    sech, normal = (
        1 / (lam / 2).cosh(),
        lambda m, s: torch.distributions.Normal(m, s).log_prob(lam).exp(),
    )
    cosine, edm = DDPM(1000, "cosine"), normal(2.4, 2.4) * (1 + 0.25 * lam.exp()) / 0.25
    for got, want in (
        (loss_weight(cosine, "x0", lam), sech / (2 * math.pi)),
        (loss_weight(cosine, "eps", lam), sech * lam.exp() / (2 * math.pi)),
        (loss_weight(cosine, "v", lam), (lam / 2).exp() / math.pi),
        (loss_weight(Flow(), "velocity", lam), (lam / 2).exp() / 2),
        (
            loss_weight(Flow("logit_normal"), "velocity", lam),
            normal(0, 2) * (1 + (lam / 2).exp()) ** 2,
        ),
        (loss_weight(EDM(), edm_param(), lam), edm),
    ):
        assert torch.allclose(got, want, rtol=0.08, atol=1e-4)  # counted in windows of half a unit


def test_weight_is_0_where_training_never_looks():
    w = loss_weight(VE(0.1, 10.0), "score", torch.tensor([-12.0, -3.0, 0.0]), n=10_000)
    assert w[0] == 0 and (w[1:] > 0).all()
    assert torch.equal(
        w, loss_weight(VE(0.1, 10.0), "score", torch.tensor([-12.0, -3.0, 0.0]), n=10_000)
    )  # the same seed, the same numbers


# ---------------------------------------------------------------- bad input
X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "said, call",
    [
        ("alpha.2 . sigma.2 = 1", lambda: convert(X, X, EDM(), 2.0, "v", "eps")),
        ("alpha.2 . sigma.2 = 1", lambda: convert(X, X, SubVP(), 0.5, "x0", "v")),
        ("alpha . sigma = 1", lambda: convert(X, X, VP(), 0.5, "velocity", "x0")),
        ("'eps' does not determine 'x0'", lambda: convert(X, X, Flow(), 1.0, "eps", "x0")),
        ("'x0' does not determine 'eps'", lambda: convert(X, X, VP(), 0.0, "x0", "eps")),
        ("unknown prediction 'epsilon'", lambda: convert(X, X, VP(), 0.5, "epsilon", "x0")),
        ("unknown prediction", lambda: loss_weight(VP(), "noise", torch.zeros(1))),
        ("Did you mean 'score_sde'", lambda: ours("score-sde", 3)),
        ("one value per example", lambda: convert(X, X, VP(), torch.rand(5), "v", "eps")),
    ],
)
def test_bad_input_gets_a_sentence(said, call):
    with pytest.raises(ValueError, match=said):
        call()


def test_a_function_is_taken_at_its_word():
    x0, eps = pair(3)
    x = EDM().add_noise(x0, torch.full((3,), 2.0, dtype=F64), eps)
    skip, out, _ = v_param(torch.tensor(1.0), torch.tensor(2.0))
    assert torch.allclose(convert(eps, x, EDM(), 2.0, v_param, "x0"), skip * x + out * eps)
