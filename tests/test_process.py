"Schedules and the forward process: exact facts, parity with others, properties, old mistakes."

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_course import core
from ddpm_course.process import (
    DDPM,
    SCHEDULES,
    Process,
    Table,
    betas_to_abar,
    cosine,
    linear,
    sigmoid,
)

F64 = torch.float64
DEVICES = (
    ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
)
names = pytest.mark.parametrize("name", SCHEDULES)
quick = settings(max_examples=60, deadline=None)


def close(a, b, tol=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=tol, atol=tol
    )


# ---- parity


@pytest.mark.parametrize("ours, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedule_agrees_with_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.DDPMScheduler(1000, beta_schedule=theirs)
    close(DDPM(1000, ours).abar[1:], other.alphas_cumprod, 1e-6)
    close(DDPM(1000, ours).betas, other.betas, 1e-6)


@pytest.mark.parametrize("ours, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_add_noise_agrees_with_diffusers(ours, theirs):
    "Their step t is our t + 1: they count the first step as 0."
    diffusers = pytest.importorskip("diffusers")
    other, p = diffusers.DDPMScheduler(1000, beta_schedule=theirs), DDPM(1000, ours)
    x0, eps, t = (
        torch.randn(6, 3, 8, 8),
        torch.randn(6, 3, 8, 8),
        torch.tensor([1, 2, 10, 500, 999, 1000]),
    )
    # theirs computes in float32, sqrt(1 - abar) at t = 1
    close(p.add_noise(x0, t, eps), other.add_noise(x0, eps, t - 1), 2e-5)
    x0, eps = x0.double(), eps.double()
    # the same with their own float32 betas, summed up in float64
    other.alphas_cumprod = (1 - other.betas.double()).cumprod(0)
    close(p.add_noise(x0, t, eps), other.add_noise(x0, eps, t - 1), 1e-6)


def test_custom_betas_agree_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.DDPMScheduler(
        1000, beta_schedule="linear", beta_start=0.00085, beta_end=0.012
    )
    close(DDPM(beta_start=0.00085, beta_end=0.012).abar[1:], other.alphas_cumprod, 1e-6)


@pytest.mark.parametrize("start, end, tau", [(-3, 3, 1.0), (-3, 3, 0.7), (0, 3, 0.3)])
def test_sigmoid_is_the_formula_of_jabri(start, end, tau):
    """gamma(t) of 'Scalable adaptive computation for iterative generation', in plain Python
    numbers, clipped at 1e-9."""

    def sig(x):
        return 1 / (1 + math.exp(-x))

    v_start, v_end = sig(start / tau), sig(end / tau)
    gamma = [
        (v_end - sig((t / 1000 * (end - start) + start) / tau)) / (v_end - v_start)
        for t in range(1001)
    ]
    close(
        DDPM(1000, "sigmoid", start=start, end=end, tau=tau).abar,
        [min(1.0, max(1e-9, g)) for g in gamma],
    )


def test_linear_and_cosine_are_their_formulas():
    product, betas = [1.0], [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    for b in betas:
        product.append(product[-1] * (1 - b))
    close(linear(), product)

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    # the last step is the capped one
    close(cosine()[:1000], [f(t) / f(0) for t in range(1000)], 1e-11)
    close(cosine()[1000] / cosine()[999], 0.001)


# ---- the two old mistakes


@names
@pytest.mark.parametrize("T", [1, 2, 5, 1000])
def test_mistake_04_index_zero_is_neither_trained_nor_sampled(name, T):
    p = DDPM(T, name)
    # 0 is the data itself
    assert len(p.abar) == T + 1 and p.abar[0] == 1 and p.alpha(0) == 1 and p.sigma(0) == 0
    drawn = p.sample_t(40 * T + 100, generator=torch.Generator().manual_seed(0))
    assert drawn.min() == 1 and drawn.max() == T and not drawn.is_floating_point()
    if T <= 5:
        assert drawn.unique().tolist() == list(range(1, T + 1))  # every noisy level is trained
    # and sampling visits every level, down to the data
    assert p.steps(T).tolist() == list(range(T, -1, -1))
    x0 = torch.randn(2, 3)
    assert p.add_noise(x0, p.steps(1)[-1:], torch.randn(2, 3)).equal(x0)
    assert (p.sigma(torch.arange(1, T + 1)) > 0).all()


@names
@pytest.mark.parametrize("T", [1, 4, 10, 33, 100, 250, 1000, 4000])
def test_mistake_08_betas_are_rescaled_with_T(name, T):
    p, full = DDPM(T, name), DDPM(1000, name)
    close(p.abar[-1], full.abar[-1])  # every T ends in the same noise
    assert p.abar[-1] < 1e-4
    if 1000 % T == 0:
        close(p.abar, full.abar[:: 1000 // T])  # and passes through the same places
    close(betas_to_abar(p.betas), p.abar)


def test_mistake_08_as_it_was():
    "A hundred of the classic betas stop at 0.36, and one has to ask for that."
    assert abs(betas_to_abar(torch.linspace(1e-4, 0.02, 100, dtype=F64))[-1] - 0.3636) < 1e-4
    close(DDPM(100, n=100).abar, linear(100))
    assert DDPM(100).abar[-1] < 1e-4


# ---- facts


@names
def test_variance_preserving_and_monotone(name):
    p, t = DDPM(1000, name), torch.arange(1001)
    close(p.alpha(t) ** 2 + p.sigma(t) ** 2, torch.ones(1001), 1e-15)
    assert (p.abar.diff() < 0).all() and (p.betas.diff() > 0).all()  # no schedule goes up and down
    assert p.snr(0) == torch.inf and (p.snr(t).diff() < 0).all()
    close(p.snr(t[1:]).log(), (p.abar[1:] / (1 - p.abar[1:])).log(), 1e-10)


@names
def test_walk_and_jump_have_the_same_mean_and_variance(name):
    """Exactly: mean and variance of the Markov chain, carried through its steps, are alpha * x0 and
    sigma^2."""
    p, mean, var = DDPM(1000, name), 1.0, 0.0
    for t, beta in enumerate(p.betas.tolist(), 1):
        mean, var = (1 - beta) ** 0.5 * mean, (1 - beta) * var + beta
        close(p.alpha(t), mean, 1e-9)
        close(p.sigma(t) ** 2, var, 1e-10)


@names
def test_add_noise_has_the_right_mean_and_variance(name):
    g, n, p = torch.Generator().manual_seed(1), 200_000, DDPM(100, name)
    for t in (1, 20, 50, 100):
        x = p.add_noise(
            torch.full((n, 1), 0.7), torch.full((n,), t), torch.randn(n, 1, generator=g)
        ).double()
        var = p.sigma(t).item() ** 2
        assert abs(x.mean() - 0.7 * p.alpha(t)) < 5 * (var / n) ** 0.5
        assert abs(x.var() - var) < 5 * var * (2 / n) ** 0.5


def test_no_cancellation_where_there_is_almost_no_noise():
    p = DDPM(1000, beta_start=1e-10)
    close(p.sigma(1) ** 2 / 1e-10, 1.0, 1e-6)


def test_float_times_interpolate_log_abar():
    p = DDPM(10)
    close(p.alpha(2.5).log(), (p.alpha(2).log() + p.alpha(3).log()) / 2)
    assert p.alpha(torch.tensor([3.0])) == p.alpha(torch.tensor([3])) and p.alpha(10.0) == p.alpha(
        10
    )
    t = torch.tensor([2.5], dtype=F64, requires_grad=True)
    p.alpha(t).sum().backward()
    close(t.grad, 0.5 * p.log_abar[[2, 3]].diff() * p.alpha(2.5))


@names
def test_the_slope_at_a_whole_time_is_that_of_the_step_that_led_to_it(name):
    "Whole times are where samplers stand: a slope of 0 there would freeze every SDE solver."
    p, t = DDPM(20, name), torch.arange(21, dtype=F64)
    steps = p.log_abar.diff()
    close(torch.func.grad(lambda t: p.table(t).sum())(t), torch.cat([steps[:1], steps]))


@pytest.mark.parametrize("T", [1, 7, 1000, 4000, None])
def test_clock_runs_from_0_to_1000(T):
    p = DDPM(T) if T else Process()
    assert p.clock(torch.tensor([p.t_max, 0])).tolist() == [1000, 0]
    assert p.clock(torch.tensor([p.t_max / 2])).item() == 500


def test_init_noise_is_as_strong_as_the_end():
    p = DDPM(100, n=100)  # ends at sigma 0.8
    x = p.init_noise((4, 50_000), generator=torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32 and abs(x.std() - p.sigma(100)) < 0.01
    one_each = [torch.Generator().manual_seed(i) for i in range(4)]
    x = DDPM().init_noise((4, 3), generator=one_each)
    assert x[2:3].equal(DDPM().init_noise((1, 3), generator=[torch.Generator().manual_seed(2)]))


@given(st.integers(1, 100_000), st.data())
@quick
def test_steps_fall_from_T_to_0_without_repeats(T, data):
    n = data.draw(st.integers(max(1, T - 5), T) | st.integers(1, min(T, 3000)))
    p = DDPM(8)
    p.t_max = T  # only the grid is looked at
    ts = p.steps(n)
    assert len(ts) == n + 1 and ts[0] == T and ts[-1] == 0 and (ts.diff() < 0).all()
    assert (ts - torch.arange(n, -1, -1, dtype=F64) * T / n).abs().max() <= 0.5


# ---- properties: shapes, types, devices, casts

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=6).map(tuple)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@given(shapes, dtypes, st.sampled_from(list(SCHEDULES)), st.integers(1, 50), st.data())
@quick
def test_any_shape_and_type(shape, dtype, name, T, data):
    """Sound (B,C,L), images (B,C,H,W), video (B,C,T,H,W), plain numbers (B,): the type and the
    shape come back, each example at its own time."""
    p = DDPM(T, name)
    t = torch.tensor(data.draw(st.lists(st.integers(0, T), min_size=shape[0], max_size=shape[0])))
    x0, eps = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x = p.add_noise(x0, t, eps)
    assert x.shape == shape and x.dtype == dtype
    for i, one in enumerate(t):  # by hand, example by example
        a, s = (c.to(dtype) for c in (p.alpha(one), p.sigma(one)))
        assert x[i].equal(a * x0[i] + s * eps[i])
    assert p.alpha(t).dtype == F64 and all(
        c.shape == (shape[0],) + (1,) * (len(shape) - 1) for c in p.coeffs(t, x0)
    )


@names
def test_float64_stays_float64(name):
    p, x = DDPM(1000, name), torch.ones(1, 2, dtype=F64)
    close(
        p.add_noise(x, torch.tensor([700]), 0 * x) ** 2, SCHEDULES[name]()[700].expand(1, 2), 1e-13
    )


CASTS = dict(
    half=lambda m: m.half(),
    bfloat16=lambda m: m.bfloat16(),
    float=lambda m: m.float(),
    double=lambda m: m.double(),
    to=lambda m: m.to(torch.float16),
    to_both=lambda m: m.to("cpu", torch.bfloat16),
    type=lambda m: m.type(torch.float16),
    deepcopy=copy.deepcopy,
    pickle=lambda m: pickle.loads(pickle.dumps(m)),
    half_and_back=lambda m: m.half().double(),
    meta=lambda m: m.to("meta").to_empty(device="cpu"),
    share=lambda m: m.share_memory(),
    twice=lambda m: copy.deepcopy(m.half()).half(),
)


@pytest.mark.parametrize("how", CASTS)
def test_tables_survive_casts(how):
    "Also inside of a model, which is where casts come from."
    exact, p = DDPM().log_abar.clone(), DDPM()
    for q in (CASTS[how](p), CASTS[how](torch.nn.Sequential(torch.nn.Linear(2, 2), DDPM()))[1]):
        assert q.log_abar.dtype == F64 and q.log_abar.equal(exact)
        assert q.alpha(torch.tensor([1])) < 1 and q.sigma(1) > 0.0099


def test_a_copy_does_not_share_its_table():
    p = DDPM(5)
    q = copy.deepcopy(p)
    q.log_abar.zero_()
    assert p.abar[-1] < 1e-4


def test_nothing_to_store_or_to_train():
    p = DDPM()
    assert p.state_dict() == {} and list(p.parameters()) == [] and len(list(p.buffers())) == 1
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), p)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    model.load_state_dict(model.state_dict())  # strict


@pytest.mark.parametrize("device", DEVICES)
def test_follows_the_module_to_a_device(device):
    p, kind = DDPM().to(device), torch.float32 if device == "mps" else F64
    assert p.log_abar.device.type == device and p.log_abar.dtype == kind
    x, t = torch.ones(3, 1, 4, 4, device=device), p.sample_t(3, device)
    assert t.device.type == device and p.steps(5, device).device.type == device
    assert (
        p.add_noise(x, t, x).device.type == device
        and p.init_noise((2, 3), device).device.type == device
    )
    here = DDPM().add_noise(x.cpu(), t.cpu(), x.cpu())
    torch.testing.assert_close(p.add_noise(x, t, x).cpu(), here, rtol=1e-6, atol=1e-6)
    # a process left on the CPU works too
    torch.testing.assert_close(DDPM().add_noise(x, t, x).cpu(), here, rtol=1e-6, atol=1e-6)
    assert p.to("cpu").log_abar.equal(DDPM().log_abar)  # exact again


def test_device_without_float64(monkeypatch):
    """As on mps: the table goes there as float32, no float64 is ever sent, and what comes back is
    exact."""
    monkeypatch.setattr(core, "NO_FLOAT64", ("meta",))
    seen, p = [], DDPM()

    def move(x):
        seen.append(x.dtype)
        return x.to("meta")

    p._apply(move)
    assert (
        p.log_abar.device.type == "meta"
        and p.log_abar.dtype == torch.float32
        and set(seen) == {torch.float32}
    )
    assert p.to_empty(device="cpu").log_abar.equal(DDPM().log_abar) and p.log_abar.dtype == F64


def test_made_under_another_default():
    "Neither torch's default type nor its default device may spoil the table."
    for default in (torch.float32, torch.float64, torch.float16):
        old = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            assert DDPM(50, "cosine").half().abar.dtype == F64
        finally:
            torch.set_default_dtype(old)
    with torch.device("meta"):
        p = {name: DDPM(50, name) for name in SCHEDULES}
    for name, q in p.items():
        assert q.abar.equal(DDPM(50, name).abar)


def test_random_times_take_a_generator():
    p = DDPM()
    a, b = (p.sample_t(50, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert a.equal(b) and not a.equal(p.sample_t(50, generator=torch.Generator().manual_seed(4)))
    t = Process().sample_t(10_000, generator=torch.Generator().manual_seed(0))
    assert t.min() > 0 and t.max() <= 1 and abs(t.mean() - 0.5) < 0.02


# ---- bad input gets a sentence

BAD = dict(
    schedule=(
        lambda: DDPM(schedule="cosin"),
        (
            "unknown schedule 'cosin': choose one of 'linear', 'cosine', 'sigmoid'. Did you mean"
            " 'cosine'?"
        ),
    ),
    T_zero=(lambda: DDPM(0), "at least 1, not 0"),
    T_negative=(lambda: DDPM(-3), "at least 1, not -3"),
    T_fraction=(lambda: DDPM(10.5), "whole number of steps, at least 1, not 10.5"),
    T_nan=(lambda: DDPM(math.nan), "not nan"),
    T_infinite=(lambda: DDPM(math.inf), "not inf"),
    beta_high=(lambda: DDPM(beta_end=1.0), r"betas are variances in (0, 1), not 0.0001 to 1"),
    beta_zero=(lambda: DDPM(beta_start=0.0), "not 0 to 0.02"),
    beta_negative=(lambda: DDPM(beta_start=-0.1), "not -0.1 to"),
    beta_nan=(lambda: DDPM(beta_start=math.nan), "nan"),
    cosine_cap=(lambda: DDPM(schedule="cosine", max_beta=1.5), "betas are"),
    sigmoid_flat=(lambda: DDPM(schedule="sigmoid", start=1.0, end=1.0), "betas are"),
    sigmoid_sharp=(lambda: DDPM(schedule="sigmoid", tau=0.001), "betas are"),
    table=(lambda: betas_to_abar(torch.tensor([0.1, 1.2])), "not 0.1 to 1.2"),
    steps_zero=(lambda: DDPM().steps(0), "1 to 1000 steps, not 0"),
    steps_many=(lambda: DDPM(10).steps(11), "T = 10 takes 1 to 10 steps, not 11"),
    steps_base=(lambda: Process().steps(0), "at least 1 step, not 0"),
    time_late=(lambda: DDPM(10).alpha(torch.tensor([3, 11])), "times are in 0..10, not 3 to 11"),
    time_early=(lambda: DDPM(10).sigma(-1), "not -1 to -1"),
    time_nan=(lambda: DDPM(10).sigma(math.nan), "times are in 0..10"),
    pixels=(
        lambda: DDPM().add_noise(torch.zeros(2, 3, dtype=torch.uint8), 5, torch.zeros(2, 3)),
        "not torch.uint8: use to_float",
    ),
    noise=(
        lambda: DDPM().add_noise(torch.zeros(2, 3), 5, torch.zeros(2, 1)),
        "noise of shape (2, 1) for data of shape (2, 3)",
    ),
    times=(
        lambda: DDPM().add_noise(torch.zeros(2, 3), torch.tensor([1, 2, 3]), torch.zeros(2, 3)),
        "one value per example",
    ),
)


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_a_sentence(what):
    call, said = BAD[what]
    with pytest.raises(ValueError) as e:
        call()
    assert said in str(e.value) and "\n" not in str(e.value)


def test_table_reads_entries_and_lines_between():
    table = Table(torch.tensor([0.0, 1.0, 5.0]))
    assert (
        table(torch.tensor([[0, 1], [2, 2]])).tolist() == [[0, 1], [5, 5]]
        and table(1.5) == 3
        and table(2.0) == 5
    )
    close(sigmoid().log()[-1], math.log(1e-9))


# ---- verbs that a sibling overrides, times of frames


def test_corrupt_draws_the_noise_and_mixes():
    x0, t = torch.randn(4, 3), torch.tensor([1, 200, 700, 1000])
    for p in (DDPM(), Straight()):
        t = t * p.t_max / 1000
        x, eps = p.corrupt(x0, t, torch.Generator().manual_seed(3))
        assert eps.equal(torch.randn(4, 3, generator=torch.Generator().manual_seed(3)))
        assert x.equal(p.add_noise(x0, t, eps)) and p.corrupt(x0, t, eps=eps)[0].equal(x)
    each = [torch.Generator().manual_seed(i) for i in range(4)]
    one = DDPM().corrupt(x0[2:3], 5, [torch.Generator().manual_seed(2)])[1]
    assert DDPM().corrupt(x0, 5, each)[1][2:3].equal(one)


def test_a_sibling_that_overrides_the_prior_is_asked_under_both_names():
    class Absorb(Process):
        def prior(self, shape, device=None, generator=None):
            return torch.full(shape, -1.0, device=device)

    assert (Absorb().init_noise((2, 3)) == -1).all()


class Straight(Process):
    def alpha(self, t):
        return 1 - torch.as_tensor(t).double()

    def sigma(self, t):
        return torch.as_tensor(t).double()


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5), (2, 3, 5, 4), (2, 3, 5, 4, 4)], ids=str)
@pytest.mark.parametrize("p", [DDPM(), Straight()], ids=["ddpm", "line"])
def test_every_frame_may_have_a_time_of_its_own(p, shape):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, *shape, generator=g)
    t = (torch.rand(2, 5, generator=g) * p.t_max).round() if p.t_max > 1 else torch.rand(2, 5)
    x, axis = p.add_noise(x0, t, eps), 1 if len(shape) == 2 else 2
    for f in range(5):  # frame by frame, as if the others were not there
        a, e = (v.select(axis, f) for v in (x0, eps))
        assert torch.allclose(x.select(axis, f), p.add_noise(a, t[:, f], e), atol=1e-6)
    same = p.add_noise(x0, t[:, :1].expand(2, 5), eps)
    assert torch.allclose(same, p.add_noise(x0, t[:, 0], eps))


@pytest.mark.parametrize("t", [(3, 5), (2, 3), (2, 5, 1), (5, 2)], ids=str)
def test_times_of_frames_must_fit(t):
    with pytest.raises(ValueError, match=r"\(B, F\) for x of shape \(B, F\) or \(B, C, F, ...\)"):
        Straight().add_noise(torch.zeros(2, 3, 5), torch.zeros(t), torch.zeros(2, 3, 5))


def test_grids_are_float64():
    "In float32 the end of a grid was beyond t_max: cos(pi/2) came out as -4e-8."

    class Trig(Straight):
        t_max = math.pi / 2

    assert Trig().steps(7).dtype == F64 and Trig().steps(7)[0] == math.pi / 2
    assert 0 < torch.cos(Trig().steps(4)[0]) < 1e-16


def test_where_training_looks_is_a_choice():
    p, g = DDPM(50), torch.Generator
    p.times = "uniform"
    t = p.sample_t(2000, generator=g().manual_seed(0))
    assert t.is_floating_point() and 0 < t.min() and t.max() <= 50 and t.unique().numel() > 1900
    assert DDPM.times == "whole" and not DDPM(50).sample_t(5).is_floating_point()
    with pytest.raises(ValueError, match="unknown times 'unifrom'.*Did you mean 'uniform'"):
        p.times = "unifrom"
        p.sample_t(3)
