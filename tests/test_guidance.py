"Label dropout and classifier-free guidance: the mistakes of the source, properties, closed forms."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_course.denoiser import exact_denoiser
from ddpm_course.guidance import cfg, drop_labels
from ddpm_course.process import DDPM
from ddpm_course.sampling import clip_x0, heun, sample

K = 3
quick = settings(max_examples=40, deadline=None, derandomize=True)


class Counting:
    "A denoiser whose answer differs for every label; remembers the sizes of its batches."

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, y=None):
        self.rows.append(len(x))
        assert len(t) == len(x) == len(y)
        shift = y.double().reshape(len(y), -1).mean(1) * 0.7 - 1
        t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return x * 0.5 + shift.to(x.dtype).reshape(t.shape) + t / 1000


def batch(n=6, shape=(2,), seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=g, dtype=torch.float64)
    return x, torch.randint(1, 1000, (n,), generator=g), torch.randint(0, K, (n,), generator=g)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# the mistakes of the source


def test_mistake_02_labels_are_dropped_per_example():
    y = torch.arange(64) % K
    dropped = torch.stack(
        [(drop_labels(y, 0.1, K, gen(i)) == K).double().mean() for i in range(3000)]
    )
    assert abs(dropped.mean() - 0.1) < 0.003
    assert abs(dropped.std() - math.sqrt(0.09 / 64)) < 0.002  # one throw per batch would give 0.3
    one, two = (
        (torch.stack([drop_labels(y, 0.5, K, gen(i)) for i in range(1000)])[:, j] == K).double()
        for j in (3, 40)
    )
    # two examples are independent
    assert abs(((one - one.mean()) * (two - two.mean())).mean()) < 0.03


def test_mistake_02_the_dice_are_torchs_and_repeat():
    y = torch.zeros(200, dtype=torch.long)
    assert torch.equal(drop_labels(y, 0.5, K, gen(1)), drop_labels(y, 0.5, K, gen(1)))
    assert not torch.equal(drop_labels(y, 0.5, K, gen(1)), drop_labels(y, 0.5, K, gen(2)))
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    torch.manual_seed(5)
    first = drop_labels(y, 0.5, K)
    torch.manual_seed(5)
    assert torch.equal(first, drop_labels(y, 0.5, K))
    assert (np.random.get_state()[1] == before).all()
    assert (y == 0).all()  # a new tensor


def test_mistake_05_scale_0_is_unconditional_and_1_conditional():
    x, t, y = batch()
    uncond, cond = Counting()(x, t, torch.full_like(y, K)), Counting()(x, t, y)
    assert torch.equal(cfg(Counting(), y, 0, K)(x, t), uncond)
    assert torch.equal(cfg(Counting(), y, 0.0, K)(x, t), uncond)
    assert torch.equal(cfg(Counting(), y, 1.0, K)(x, t), cond)
    mixed = cfg(Counting(), y, torch.tensor([0.0, 1, 0, 1, 0, 1]), K)(x, t)
    assert torch.equal(mixed[::2], uncond[::2]) and torch.equal(mixed[1::2], cond[1::2])


@pytest.mark.parametrize("at", [-1.0, 0.0, 0.5, 1.0, 3.0])
def test_mistake_05_the_scale_is_continuous(at):
    x, t, y = batch()
    there, left, right = (cfg(Counting(), y, at + d, K)(x, t) for d in (0.0, -1e-6, 1e-6))
    assert (left - there).abs().max() < 1e-5 and (right - there).abs().max() < 1e-5
    assert not torch.equal(left, right)


@pytest.mark.parametrize("scale", [0, 0.0, 1.0, 3.0, -2.0, torch.linspace(0, 5, 6)])
def test_mistake_17_one_call_with_a_doubled_batch(scale):
    x, t, y = batch()
    denoise = Counting()
    cfg(denoise, y, scale, K)(x, t)
    assert denoise.rows == [12]


def test_mistake_17_clipping_wraps_guidance():
    x, t, y = batch(50)
    guided = cfg(Counting(), y, 8.0, K)
    assert guided(x, t).abs().max() > 1
    assert torch.equal(clip_x0(guided, 1.0)(x, t), guided(x, t).clamp(-1, 1))


def test_mistake_18_no_label_is_a_class_of_its_own():
    x, t, _ = batch()
    exact = exact_denoiser(
        DDPM(), torch.randn(60, 2, generator=gen(), dtype=torch.float64), torch.arange(60) % K
    )
    # every class is guided, class 0 too, and scale 0 is the denoiser without labels
    for k in range(K):
        y = torch.full((6,), k)
        assert (cfg(exact, y, 3.0, K)(x, t) - exact(x, t, y)).abs().max() > 0.1
        torch.testing.assert_close(cfg(exact, y, 0.0, K)(x, t), exact(x, t))


def test_mistake_18_dropped_labels_train_the_null_row_and_no_other():
    table, y = nn.Embedding(K + 1, 1), torch.arange(300) % K
    dropped = drop_labels(y, 0.3, K, gen())
    table(dropped).sum().backward()
    counts = table.weight.grad[:, 0]
    assert 60 < counts[K] < 120
    assert all(counts[k] == ((y == k) & (dropped != K)).sum() for k in range(K))
    assert torch.equal(dropped[dropped != K], y[dropped != K])


# properties

shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple)


@quick
@given(st.integers(1, 8), shapes, shapes, st.floats(-10, 10), st.integers(0, 99))
def test_guidance_is_a_line_through_the_two_estimates(n, xs, ys, scale, seed):
    x, t, _ = batch(n, xs, seed)
    y = torch.randint(0, K, (n, *ys), generator=gen(seed))
    uncond, cond = Counting()(x, t, torch.full_like(y, K)), Counting()(x, t, y)
    for w in (
        scale,
        torch.full((n,), scale, dtype=torch.float64),
        torch.tensor(scale, dtype=torch.float64),
    ):
        got = cfg(Counting(), y, w, K)(x, t)
        assert got.shape == x.shape and got.dtype == x.dtype
        torch.testing.assert_close(got, uncond + scale * (cond - uncond), rtol=1e-10, atol=1e-10)


@quick
@given(st.lists(st.floats(-5, 9), min_size=1, max_size=8), st.integers(0, 99))
def test_one_scale_per_example_equals_one_by_one(scales, seed):
    x, t, y = batch(len(scales), (2,), seed)
    got = cfg(Counting(), y, torch.tensor(scales, dtype=torch.float64), K)(x, t)
    for i, w in enumerate(scales):
        torch.testing.assert_close(
            got[i : i + 1], cfg(Counting(), y[i : i + 1], w, K)(x[i : i + 1], t[i : i + 1])
        )


@quick
@given(st.integers(1, 30), shapes, st.floats(0, 1), st.integers(0, 99))
def test_an_example_is_kept_or_dropped_whole(n, shape, p, seed):
    y = torch.randint(0, K, (n, *shape), generator=gen(seed))
    got = drop_labels(y, p, K, gen(seed))
    rows, new = y.reshape(n, -1), got.reshape(n, -1)
    assert got.shape == y.shape and got.dtype == y.dtype
    assert ((new == rows).all(1) | (new == K).all(1)).all()
    assert torch.equal(drop_labels(y, 0.0, K), y) and (drop_labels(y, 1.0, K) == K).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_null_may_be_a_value_an_example_or_a_batch(dtype):
    y = torch.ones(4, 3, dtype=dtype)
    for null in (0, torch.zeros(1), [0, 0, 0], torch.zeros(4, 3)):
        got = drop_labels(y, 1.0, null)
        assert (got == 0).all() and got.dtype == dtype and got.shape == y.shape
    assert drop_labels(y, 1.0, [7, 8, 9]).tolist() == [[7, 8, 9]] * 4


def test_a_batch_of_null_labels_is_a_negative_prompt():
    x, t, y = batch()
    avoid = (y + 1) % K
    start, end = Counting()(x, t, avoid), Counting()(x, t, y)
    torch.testing.assert_close(cfg(Counting(), y, 2.0, avoid)(x, t), start + 2 * (end - start))


def test_t_may_be_one_time_for_all():
    x, _, y = batch()
    guided = cfg(Counting(), y, 2.0, K)
    assert torch.equal(guided(x, torch.tensor(300)), guided(x, torch.full((6,), 300)))


# closed forms


def test_guided_finite_set_is_the_softmax_average_written_out():
    process, x0s, labels = (
        DDPM(),
        torch.randn(30, 2, generator=gen(), dtype=torch.float64),
        torch.arange(30) % K,
    )
    x, t, y = batch()
    alpha, sigma = process.coeffs(t, x)
    by_hand = torch.zeros_like(x)
    for i in range(len(x)):
        weight = (-((x[i] - alpha[i] * x0s) ** 2).sum(1) / (2 * sigma[i] ** 2)).exp()
        own = weight * (labels == y[i])
        uncond, cond = weight @ x0s / weight.sum(), own @ x0s / own.sum()
        by_hand[i] = uncond + 2.5 * (cond - uncond)
    torch.testing.assert_close(
        cfg(exact_denoiser(process, x0s, labels), y, 2.5, K)(x, t), by_hand, rtol=1e-7, atol=1e-8
    )


class Mixture:
    """Gaussians of one spread at `means`, the label is the index; label len(means) is 'no label'.
    Everything by autograd from the density."""

    def __init__(self, process, means, std):
        self.process, self.means, self.std = process, means, std

    def log_joint(self, x, t):
        alpha, sigma = self.process.coeffs(t, x)
        var = (alpha * self.std) ** 2 + sigma**2
        d2 = ((x[:, None] - alpha[:, None] * self.means) ** 2).sum(-1)
        return -d2 / (2 * var) - x.shape[1] / 2 * var.log()

    def score(self, x, t, y, scale):  # of p_t(x) p_t(y | x)^scale
        x = x.clone().requires_grad_()
        joint = self.log_joint(x, t)
        log_p = joint.logsumexp(1) + scale * joint.log_softmax(1).gather(1, y[:, None])[:, 0]
        return torch.autograd.grad(log_p.sum(), x)[0]

    def __call__(self, x, t, y):  # the closed-form denoiser
        alpha, sigma = self.process.coeffs(t, x)
        only = torch.arange(len(self.means)) == y[:, None]
        logits = self.log_joint(x, t).masked_fill(~only & only.any(1, keepdim=True), -torch.inf)
        m = logits.softmax(1) @ self.means
        return m + alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2) * (x - alpha * m)


@quick
@given(st.floats(-2, 8), st.integers(0, 99))
def test_guided_mixture_is_the_score_of_the_tilted_noisy_density(scale, seed):
    process = DDPM()
    mixture = Mixture(
        process, torch.tensor([[1.0, 0], [-1, 0.5], [0, -1]], dtype=torch.float64), 0.3
    )
    x, t, y = batch(8, (2,), seed)
    alpha, sigma = process.coeffs(t, x)
    tweedie = (x + sigma**2 * mixture.score(x, t, y, scale)) / alpha
    torch.testing.assert_close(cfg(mixture, y, scale, K)(x, t), tweedie, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 3.0, -0.5])
def test_guided_gaussian_samples_have_the_spread_of_the_closed_form(scale):
    """All data N(0, 1), the class N(0.7, tau^2): the path contracts by (tau^2 / (tau^2 +
    S^2))^(w/2) (1 / (1 + S^2))^((1-w)/2), S = sigma / alpha at the noise end."""
    process, tau = DDPM(), 0.4

    def denoise(x, t, y):
        alpha, sigma = process.coeffs(t, x)
        m, s = 0.7 * y[:, None], torch.where(y == 1, tau, 1.0)[:, None].double()
        return m + alpha * s**2 / ((alpha * s) ** 2 + sigma**2) * (x - alpha * m)

    # the map is a straight line: three points tell it
    x = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    end = sample(
        cfg(denoise, torch.ones(3, dtype=torch.long), scale, 0),
        process,
        x,
        1000 * torch.linspace(1, 0, 201) ** 2,
        heun,
    )
    alpha, sigma = process.coeffs(torch.tensor([1000]), x[:1])
    S = (sigma / alpha).item()
    slope = (
        (tau**2 / (tau**2 + S**2)) ** (scale / 2)
        * (1 / (1 + S**2)) ** ((1 - scale) / 2)
        / alpha.item()
    )
    assert abs((end[2] - end[0]).item() / 2 - slope) < 2e-3 * slope
    assert abs(slope - tau**scale) < 1e-3 * tau**scale
    assert abs((end[0] + end[2] - 2 * end[1]).item()) < 1e-9  # straight
    if scale not in (0.0, 1.0):  # and not the spread of p(x) p(y|x)^w
        precision = 1 - scale + scale / tau**2
        assert precision < 0 or abs(precision**-0.5 / tau**scale - 1) > 0.1
    if scale == 1.0:
        assert abs(end[1].item() - 0.7 * (1 - tau / math.sqrt(tau**2 + S**2))) < 2e-3


# bad input gets a sentence


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda y: drop_labels(y, 1.1, K), "probability"),
        (lambda y: drop_labels(y, -0.1, K), "probability"),
        (lambda y: drop_labels(y, float("nan"), K), "probability"),
        (lambda y: drop_labels(y, 0.1, None), "not None"),
        (lambda y: drop_labels(y, 0.1, [1, 2]), r"shape \(2,\)"),
        (lambda y: drop_labels(y, 0.1, torch.zeros(3, 1)), r"shape \(3, 1\)"),
        (lambda y: drop_labels([0, 1, 2], 0.1, K), r"\[0, 1, 2\]"),
        (lambda y: drop_labels(torch.tensor(1), 0.1, K), r"tensor\(1\)"),
        (lambda y: cfg(Counting(), None, 1.0, K), "not None"),
        (lambda y: cfg(Counting(), y, 1.0, None), "not None"),
        (lambda y: cfg(Counting(), y, torch.ones(2), K), r"shape \(2,\)"),
        (lambda y: cfg(Counting(), y, torch.ones(3, 1), K), r"shape \(3, 1\)"),
        (
            lambda y: cfg(Counting(), y, 1.0, K)(torch.randn(5, 2), torch.tensor(10)),
            "3 labels and got a batch of 5",
        ),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.tensor([0, 1, 2]))
