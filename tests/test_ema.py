"Averaged weights: the formula, warm-up, buffers, the saved step, and three of the old mistakes."

import copy
import io
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_course.ema import EMA

quick = settings(max_examples=40, deadline=None)


def twins(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    return model, copy.deepcopy(model)


def shake(model, g):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype))
        for b in model.buffers():
            b.add_(1)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- the formula


@quick
@given(st.floats(0, 1, exclude_max=True), st.booleans(), st.integers(0, 12), st.integers(1, 30))
def test_foreach_is_the_formula_parameter_by_parameter(beta, warmup, start, steps):
    (model, average), ema, g = twins(), EMA(beta, warmup), torch.Generator().manual_seed(1)
    expected = {n: p.clone() for n, p in average.named_parameters()}
    for step in range(steps):
        shake(model, g)
        before = weights(model).clone()
        ema.step_ema(average, model, start)
        assert torch.equal(weights(model), before)  # the trained weights are not touched
        n = step - start
        keep = 0.0 if n < 0 else min(beta, (1 + n) / (10 + n)) if warmup else beta
        expected = {
            k: keep * e + (1 - keep) * dict(model.named_parameters())[k]
            for k, e in expected.items()
        }
        if n < 0:
            assert torch.equal(weights(average), weights(model))  # an exact copy
    for k, p in average.named_parameters():
        torch.testing.assert_close(p, expected[k], rtol=1e-10, atol=1e-10)
    assert ema.step == steps


def test_warmup_forgets_the_first_weights():
    "After n steps their share is n! 9! / (n + 9)!."
    w, average, ema = (
        nn.ParameterList([torch.zeros(1).double()]),
        nn.ParameterList([torch.ones(1).double()]),
        EMA(0.9999),
    )
    for n in range(1, 40):
        ema.step_ema(average, w)
        assert average[0].item() == pytest.approx(
            math.factorial(n) * math.factorial(9) / math.factorial(n + 9), rel=1e-9
        )


def test_warmup_ends_at_beta():
    ema, betas = EMA(0.9), []
    for ema.step in range(200):
        betas.append(ema.current_beta())
    assert (
        betas == sorted(betas)
        and betas[0] == 0.1
        and betas[80] == pytest.approx(0.9)
        and betas[-1] == 0.9
    )
    assert EMA(0.9, warmup=False).current_beta() == 0.9


@quick
@given(st.floats(0, 0.999), st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_the_average_stays_between_the_extremes(beta, path):
    w, average = (
        nn.ParameterList([torch.tensor([path[0]], dtype=torch.float64)]) for _ in range(2)
    )
    ema = EMA(beta)
    for x in path:
        w[0].data.fill_(x)
        ema.step_ema(average, w)
        assert min(path) - 1e-9 <= average[0].item() <= max(path) + 1e-9


def test_no_graph_and_in_place():
    (model, average), ema = twins(), EMA(0.9)
    places = [p.data_ptr() for p in average.parameters()]
    model(torch.randn(5, 3).double()).sum().backward()
    ema.step_ema(average, model)
    assert [p.data_ptr() for p in average.parameters()] == places
    assert all(p.is_leaf and p.grad is None for p in average.parameters())


def test_memory_layout_does_not_matter():
    torch.manual_seed(0)
    model = nn.Conv2d(4, 8, 3)
    average, ema = copy.deepcopy(model).to(memory_format=torch.channels_last), EMA(
        0.5, warmup=False
    )
    expected = 0.5 * model.weight.detach() + 0.5 * (model.weight.detach() + 1)
    with torch.no_grad():
        model.weight.add_(1)
    ema.step_ema(average, model)
    torch.testing.assert_close(average.weight.detach(), expected)


# ---- the old mistakes


def run(path, resume_at=None, keep_state=True, start=5):
    "The averages after each step of a path of weights, with an interruption."
    w, average = (nn.ParameterList([torch.zeros(2).double()]) for _ in range(2))
    ema, out = EMA(0.9), []
    for i, x in enumerate(path):
        if i == resume_at:
            state, ema = ema.state_dict(), EMA(0.9)
            if keep_state:
                ema.load_state_dict(json.loads(json.dumps(state)))
        w[0].data.copy_(x)
        ema.step_ema(average, w, start)
        out.append(average[0].detach().clone())
    return torch.stack(out)


@pytest.mark.parametrize("at", [1, 5, 6, 17, 39])
def test_mistake_09_a_resumed_run_is_the_same_bit_for_bit(at):
    path = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).double()
    whole = run(path)
    assert torch.equal(whole, run(path, at))
    if at > 5:
        # as it was: overwritten by the raw weights
        assert torch.equal(run(path, at, keep_state=False)[at], path[at])


def test_mistake_09_the_state_goes_through_json_and_weights_only():
    ema = EMA(0.99, warmup=False)
    ema.step = 1234
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    for state in (json.loads(json.dumps(ema.state_dict())), torch.load(file, weights_only=True)):
        again = EMA()
        again.load_state_dict(state)
        assert vars(again) == vars(ema) and type(again.step) is int and type(again.warmup) is bool


@pytest.mark.parametrize("missing", ["step", "beta", "warmup"])
def test_mistake_09_a_state_without_a_step_is_refused(missing):
    state = EMA(0.9).state_dict()
    del state[missing]
    ema = EMA(0.5)
    with pytest.raises(ValueError, match=missing):
        ema.load_state_dict(state)
    assert ema.beta == 0.5  # unchanged


def test_mistake_10_buffers_are_copied():
    (model, average), ema, g = twins(), EMA(0.99), torch.Generator().manual_seed(1)
    for _ in range(3):
        shake(model, g)
        ema.step_ema(average, model)
        for (name, a), (_, b) in zip(average.named_buffers(), model.named_buffers()):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), name
    assert not torch.equal(weights(average), weights(model))  # while parameters are averaged
    assert average[1].num_batches_tracked.dtype == torch.int64


def test_mistake_10_the_averaged_model_predicts():
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(256, 3).double()
    (model, average), ema = twins(), EMA(0.9)
    frozen = copy.deepcopy(average)
    opt = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(200):
        (model(x) - x.sum(1, keepdim=True) / 10).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()
        ema.step_ema(average, model)
        for a, b in zip(frozen.parameters(), model.parameters()):
            a.data.lerp_(b.data, 0.1)
    good, bad = (
        (m.eval()(x) - x.sum(1, keepdim=True) / 10).pow(2).mean().item() for m in (average, frozen)
    )
    assert good < 0.05 < 1 < bad


def test_mistake_17_a_skipped_step_leaves_the_average_alone():
    """The pattern of lesson 07 with a real scaler; tests/test_training.py tests the training loop
    itself."""
    (model, average), ema = twins(), EMA(0.9)
    scaler, opt = torch.amp.GradScaler("cpu", init_scale=8.0), torch.optim.SGD(
        model.parameters(), 0.1
    )
    for factor, counted in ((1.0, 1), (math.inf, 1), (math.nan, 1), (1.0, 2)):
        old, was = weights(average).clone(), weights(model).clone()
        scaler.scale(model(torch.randn(4, 3).double()).pow(2).mean() * factor).backward()
        before = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if scaler.get_scale() >= before:
            ema.step_ema(average, model)
        assert ema.step == counted
        assert (
            torch.equal(old, weights(average))
            == torch.equal(was, weights(model))
            == (not math.isfinite(factor))
        )


# ---- bad input


@pytest.mark.parametrize("beta", [1.0, 1.5, -0.1, float("nan")])
def test_beta_is_a_share(beta):
    with pytest.raises(ValueError, match="from 0 to just under 1"):
        EMA(beta)


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(3, 4),
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)
        ),
    ],
)
def test_models_of_another_shape(other):
    model, _ = twins()
    with pytest.raises(ValueError, match="deepcopy"):
        EMA().step_ema(other.double(), model)
