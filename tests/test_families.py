"""What holds for every family at once: the processes that are entered, each prediction they can
carry, each sampler that can walk them. `pytest --families my_process.py` tests yours, too."""

import ast
import copy
import importlib
import json
import math
import operator
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ddpm_course
from ddpm_course import edm, flow, score, sde, solvers  # they enter what they have
from ddpm_course.core import ROOMS, build, find
from ddpm_course.denoiser import Denoiser, exact_denoiser
from ddpm_course.model import Model
from ddpm_course.process import LEAST, Process, Times
from ddpm_course.sampling import sample

F64 = torch.float64
PROCESSES, SAMPLERS = list(ROOMS["process"]), list(ROOMS["sampler"])
OTHER = dict(
    ddpm=dict(T=50, schedule="sigmoid", tau=0.9),
    ncsn=dict(L=30, sigma_min=0.02, sigma_max=20.0),
    vp=dict(beta_min=0.2, beta_max=15.0),
    sub_vp=dict(beta_min=0.2, beta_max=15.0),
    ve=dict(sigma_min=0.02, sigma_max=30.0),
    edm=dict(sigma_min=0.01, sigma_max=40.0, rho=5.0, p_mean=-1.0, p_std=1.0),
    flow=dict(times="logit_normal"),
)
ALL = (
    {name: (name, {}) for name in PROCESSES}
    | {f"{name}, other settings": (name, kw) for name, kw in OTHER.items()}
    | {"ddpm, cosine": ("ddpm", dict(schedule="cosine"))}
)
PREDICTIONS = list(ROOMS["prediction"])


def make_process(name, **kw):
    return build("process", name, **kw)


def make_param(name):
    return build("prediction", name)


def make_step(name):
    return build("sampler", name)


def carries(process, name) -> bool:
    "Can a process carry a prediction? Asked of both, from alpha and sigma at 64 times."
    param, t = make_param(name), process.t_max * torch.arange(1, 65, dtype=F64) / 64
    alpha, sigma = process.alpha(t), process.sigma(t)
    if hasattr(param, "sum") and (param.sum[1](alpha, sigma) - 1).abs().max() > 1e-6:
        return False
    try:
        Denoiser(nn.Identity(), process, param)
    except ValueError:
        return False
    return True


def reaches_noise(process) -> bool:  # is nothing left of the data at the end?
    return process.alpha(torch.tensor([float(process.t_max)], dtype=F64)).item() < LEAST


DEVICES = (
    ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
)


@pytest.fixture(params=ALL)
def process(request):
    name, kw = ALL[request.param]
    return make_process(name, **kw)


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def times(process, n=200):
    return process.t_max * torch.arange(n + 1, dtype=F64) / n  # 0 to t_max


def close(a, b, tol=1e-12, **kw):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol, **kw)


# ---------------------------------------------------------------- the road: alpha, sigma, clock
def test_every_process_of_the_course_is_entered_once():
    "One that is written and not entered could not be saved, nor asked for by name."
    modules = [importlib.import_module("ddpm_course.process"), edm, flow, score, sde, solvers]
    written = {
        v
        for m in modules
        for v in vars(m).values()
        if isinstance(v, type) and issubclass(v, Process) and v is not Process
    }
    entered = {find("process", name) for name in PROCESSES}
    own = {c for c in entered if c.__module__.startswith("ddpm_course.")}
    assert written == own and len(entered) == len(PROCESSES)
    assert {c for c in own} == {find("process", name) for name in OTHER}


def test_data_at_0_and_noise_that_only_grows(process):
    t = times(process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert alpha[0] == 1 and sigma[0] == 0 and alpha.dtype == sigma.dtype == F64
    assert (alpha.diff() <= 0).all() and (alpha >= 0).all() and (sigma.diff() > 0).all()
    snr = process.snr(t)
    assert (
        snr[0] == math.inf and (snr.diff()[1:] < 0).all() and snr[-1] < 0.01
    ), "at the end there is (almost) only noise"


def test_the_clock_runs_from_0_to_1000_and_never_back(process):
    clock = process.clock(times(process))
    assert (
        clock.isfinite().all()
        and clock[0] == 0
        and clock[-1] == pytest.approx(1000)
        and (clock.diff() >= 0).all()
    )
    trained = process.clock(
        process.sample_t(500, generator=seeded()).double().sort().values.unique()
    )
    assert (
        trained.min() >= 0 and trained.max() <= 1000 and (trained.diff() > 0).float().mean() > 0.95
    ), "times that are trained can be told apart"


def test_training_times_are_above_0_and_come_from_a_generator(process):
    a, b, c = (process.sample_t(4000, generator=seeded(s)) for s in (0, 0, 1))
    assert (
        a.shape == (4000,)
        and (a > 0).all()
        and (a <= process.t_max).all()
        and torch.equal(a, b)
        and not torch.equal(a, c)
    )
    clock = process.clock(a.double())
    assert (
        clock.quantile(0.02) < 420 and clock.quantile(0.98) > 580 and clock.std() > 80
    ), "they reach low and high noise"
    assert len(process.sample_t(3)) == 3


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_sampling_times_fall_from_the_end_to_0(process, n):
    ts = process.steps(n)
    assert ts.shape == (n + 1,) and (ts.diff() < 0).all() and ts[-1] == 0
    assert (
        ts[0].item() == pytest.approx(process.t_max, rel=1e-12)
        and process.sigma(ts[:-1]).gt(0).all()
    )
    with pytest.raises(ValueError, match="not 0"):
        process.steps(0)


def test_start_noise_is_that_of_the_end_and_the_same_for_all(process):
    "One seed, one noise: families can be compared from the same start."
    x, one = process.init_noise((2, 5000), generator=seeded(3)), torch.randn(
        2, 5000, generator=seeded(3)
    )
    end = process.sigma(torch.tensor([float(process.t_max)], dtype=F64)).item()
    close(x, one * end, 1e-6)
    assert x.std().item() == pytest.approx(end, rel=0.03)


def test_shares_come_in_the_type_and_shape_of_the_data(process):
    t = process.sample_t(3, generator=seeded())
    want = [c(t.double()) for c in (process.alpha, process.sigma)]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
        for shape in ((3, 5), (3, 1, 4, 4), (3, 2, 2, 2, 2), (3,)):
            got = process.coeffs(t, torch.ones(shape, dtype=dtype))
            for g, w in zip(got, want):
                assert g.dtype == dtype and g.shape == (3,) + (1,) * (len(shape) - 1)
                close(
                    g.double().flatten(),
                    w,
                    max(4 * torch.finfo(dtype).eps, 1e-6 if t.dtype == torch.float32 else 0),
                    msg=lambda m: f"{dtype}: {m}",
                )
    with pytest.raises(ValueError, match="to_float"):
        process.coeffs(t, torch.ones(3, 2, dtype=torch.uint8))


# ---------------------------------------------------------------- written down, cast, moved
def same(a, b):
    t = times(b)
    for f in ("alpha", "sigma", "clock"):
        assert torch.equal(getattr(a, f)(t), getattr(b, f)(t)), f
    assert torch.equal(a.steps(9), b.steps(9)) and torch.equal(
        a.sample_t(50, generator=seeded()), b.sample_t(50, generator=seeded())
    )
    assert type(a) is type(b) and a.config == b.config and a.t_max == b.t_max


def test_a_process_comes_back_from_json(process):
    same(make_process(**json.loads(json.dumps(process.config))), process)
    assert process.config["name"] in PROCESSES


@pytest.mark.parametrize("how", ["half", "bfloat16", "to", "deepcopy", "pickle", "inside a model"])
def test_casts_and_copies_lose_nothing(process, how):
    fresh = make_process(**process.config)
    cast = dict(
        half=lambda m: m.half(),
        bfloat16=lambda m: m.bfloat16(),
        to=lambda m: m.to("cpu", torch.float16),
        deepcopy=copy.deepcopy,
        pickle=lambda m: pickle.loads(pickle.dumps(m)),
    )
    same(
        (
            nn.Sequential(nn.Linear(1, 1), process).half()[1]
            if how == "inside a model"
            else cast[how](process)
        ),
        fresh,
    )
    assert process.state_dict() == {} and not list(
        process.parameters()
    ), "nothing to store, nothing to train"


@pytest.mark.parametrize("device", DEVICES)
def test_on_any_device(process, device):
    x, p = torch.ones(4, 1, 2, 2), copy.deepcopy(process).to(device)
    t = process.sample_t(4, generator=seeded())
    close(
        p.add_noise(x.to(device), t.to(device), x.to(device)).cpu(),
        process.add_noise(x, t, x),
        1e-5,
    )
    assert (
        p.sample_t(3, device).device.type
        == p.steps(3, device).device.type
        == p.init_noise((2, 3), device).device.type
        == device
    )


# ---------------------------------------------------------------- what a network may predict
PAIRS = [(p, k) for p in PROCESSES for k in PREDICTIONS if carries(make_process(p), k)]
M, C = 0.3, 0.4  # mean and standard deviation of normal data


@pytest.mark.parametrize("p", PROCESSES)
def test_the_pairs_are_those_of_the_papers(p):
    """DESIGN.md, section 2: x0 and EDM's mix go with all, eps and score where alpha is above 0, v
    on a circle, velocity on a line."""
    process = make_process(p)
    t = process.t_max * torch.arange(1, 65, dtype=F64) / 64
    alpha, sigma = process.alpha(t), process.sigma(t)
    circle, straight = alpha**2 + sigma**2 - 1, alpha + sigma - 1
    want = {"x0", "edm"}
    want |= set() if reaches_noise(process) else {"eps", "score"}
    want |= {"v"} if circle.abs().max() < 1e-6 else set()
    want |= {"velocity"} if straight.abs().max() < 1e-6 else set()
    assert {k for q, k in PAIRS if q == p} == want


def test_the_pairs_of_the_course():
    of = {k: {p for p, q in PAIRS if q == k} & set(OTHER) for k in PREDICTIONS}
    assert of["v"] == {"ddpm", "vp"} and of["velocity"] == {"flow"}
    assert of["eps"] == of["score"] == set(OTHER) - {"flow"}


# of x0 and eps in what the network should say, as the papers define it
def target_shares(name, alpha, sigma):
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    rest = sigma**2 / (0.25 + sigma**2)
    return dict(
        eps=(zero, one),
        x0=(one, zero),
        v=(-sigma, alpha),
        score=(zero, -one),
        velocity=(-one, one),
        edm=(rest * (0.25 + sigma**2) ** 0.5 / (0.5 * sigma), -0.5 / (0.25 + sigma**2) ** 0.5),
    )[
        name
    ]  # alpha = 1, sigma_data = 0.5


@pytest.mark.parametrize("p, k", PAIRS)
def test_the_network_learns_what_the_name_says(p, k):
    process = make_process(p)
    t = times(process, 40)[1:]
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    if k == "edm" and not (alpha == 1).all():
        return  # the paper's formula is for alpha = 1
    d, x0, eps = (
        Denoiser(nn.Identity(), process, make_param(k)),
        torch.randn(40, 3, generator=seeded(), dtype=F64),
        torch.randn(40, 3, generator=seeded(1), dtype=F64),
    )
    of_x0, of_eps = target_shares(k, alpha, sigma)
    close(d.target(x0, eps, t), of_x0 * x0 + of_eps * eps, 1e-9)


class Wave(nn.Module):  # some network: not linear, and it reads its clock
    def forward(self, x, clock, cond=None):
        return (2 * x).sin() + clock.reshape(-1, *[1] * (x.ndim - 1)) / 1000


@pytest.mark.parametrize("p, k", PAIRS)
def test_every_loss_is_the_error_of_the_clean_image_in_units_of_c_out(p, k):
    process = make_process(p)
    d, x0, eps = (
        Denoiser(Wave(), process, make_param(k)),
        torch.rand(64, 5, generator=seeded(), dtype=F64) * 2 - 1,
        torch.randn(64, 5, generator=seeded(1), dtype=F64),
    )
    t = process.sample_t(64, generator=seeded(2)).double()
    off = d(process.add_noise(x0, t, eps), t) - x0
    want = off.pow(2).mean(1) / d.scales(t)[1] ** 2
    torch.testing.assert_close(d.loss(x0, t=t, eps=eps), want, rtol=1e-6, atol=1e-9)
    drawn = d.loss(x0, generator=seeded(3))
    assert (
        drawn.shape == (64,)
        and drawn.isfinite().all()
        and torch.equal(drawn, d.loss(x0, generator=seeded(3)))
    )


def gaussian(process):  # the best denoiser of N(M, C^2)
    def denoise(x, t):
        alpha, sigma = process.coeffs(t, x)
        return M + alpha * C**2 / (C**2 * alpha**2 + sigma**2) * (x - alpha * M)

    return denoise


class Straight(nn.Module):  # the best of all networks for normal data is one of these
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x, clock, cond=None):
        return self.a + self.b * x


@pytest.mark.parametrize("p, k", PAIRS)
def test_the_least_loss_is_that_of_the_best_denoiser(p, k, n=40_000):
    """Least squares on what the network is shown and told, at one time: the denoiser around it is
    the exact one, within five standard errors."""
    process = make_process(p)
    x0, eps = (
        torch.randn(n, 1, generator=seeded(i), dtype=F64) * s + m
        for i, s, m in ((0, C, M), (1, 1, 0))
    )
    for t in process.steps(10)[[0, 3, 6, 9]].double():
        t = t.clamp(max=process.t_max)
        blank = Denoiser(nn.Identity(), process, make_param(k))
        x_t = process.add_noise(x0, t.expand(n), eps)
        c_skip, c_out, c_in = (c.item() for c in blank.scales(t))
        shown = torch.cat([torch.ones_like(x_t), c_in * x_t], 1)
        a, b = torch.linalg.lstsq(shown, blank.target(x0, eps, t.expand(n))).solution.flatten()
        learned, grid = (
            Denoiser(Straight(a, b), process, make_param(k)),
            x_t.mean() + x_t.std() * torch.linspace(-2, 2, 5, dtype=F64)[:, None],
        )
        alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
        # of a line fitted to n points, two deviations from their mean
        error = C * sigma / (alpha**2 * C**2 + sigma**2) ** 0.5 / n**0.5 * 5**0.5
        assert (learned(grid, t) - gaussian(process)(grid, t)).abs().max() < 5 * error
        best = learned.loss(x0, t=t.expand(n), eps=eps).mean()
        for da, db in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)):
            assert (
                Denoiser(Straight(a + da, b + db / c_in / x_t.std()), process, make_param(k))
                .loss(x0, t=t.expand(n), eps=eps)
                .mean()
                > best
            )


# ---------------------------------------------------------------- every sampler on every process
# steps, how far mean and standard deviation (0.3 and 0.4 in the data) may be off; sampling error of
# 4,000 points: 0.006 and 0.0045
LIMITS = dict(
    euler=(100, 0.02, 0.035),
    ancestral=(100, 0.03, 0.045),
    heun=(50, 0.02, 0.02),
    langevin=(200, 0.05, 0.11),
    euler_maruyama=(100, 0.03, 0.04),
    predictor_corrector=(100, 0.03, 0.04),
    churn=(25, 0.03, 0.05),
    dpmpp_2m=(40, 0.02, 0.03),
    unipc=(40, 0.02, 0.03),
    dpmpp_2m_sde=(60, 0.03, 0.035),
)
# they divide by alpha: the reverse SDE, and Langevin steps that carry the data along
NEED_DATA = ("langevin", "euler_maruyama", "predictor_corrector")


@pytest.mark.parametrize("p", PROCESSES)
@pytest.mark.parametrize("s", SAMPLERS)
def test_every_sampler_draws_normal_data_on_every_process(s, p):
    process, (n, of_mean, of_std) = make_process(p), LIMITS.get(s, (100, 0.05, 0.05))
    ts, rule, g = process.steps(n), make_step(s), seeded(1)
    x = process.prior((4000, 1), generator=seeded(0)).double()
    if reaches_noise(process) and s in NEED_DATA:
        with pytest.raises(ValueError, match="where alpha is 0"):
            sample(gaussian(process), process, x, ts, rule, generator=g)
        return
    x = sample(gaussian(process), process, x, ts, rule, generator=g)
    assert (
        abs(x.mean().item() - M) < of_mean and abs(x.std().item() - C) < of_std
    ), f"{s} on {p}: mean {x.mean():.3f}, standard deviation {x.std():.3f}"


@pytest.mark.parametrize("s", SAMPLERS)
def test_a_sampler_comes_back_from_its_description(s):
    rule = make_step(s)
    assert json.loads(json.dumps(rule.config)) == rule.config and rule.config["name"] == s
    again, process = build("sampler", **rule.config), make_process("vp")
    x, d = process.prior((3, 2), generator=seeded()).double(), gaussian(process)
    a, b = (sample(d, process, x, process.steps(5), f, generator=seeded()) for f in (rule, again))
    assert torch.equal(a, b)


@pytest.mark.parametrize("p", PROCESSES)
@pytest.mark.parametrize("s", SAMPLERS)
def test_up_the_road_a_rule_is_finite_or_says_no(s, p):
    "Euler-Maruyama gave NaN, and ancestral sampling was Euler's rule without saying so."
    process = make_process(p)
    ts = process.steps(8)[1:-1].flip(0)
    x, d = torch.randn(3, 2, dtype=F64), exact_denoiser(process, torch.eye(2, dtype=F64))
    fresh = [sample(d, process, x, ts.flip(0), make_step(s), generator=seeded(i)) for i in (0, 1)]
    if torch.equal(*fresh):
        assert sample(d, process, x, ts, make_step(s)).isfinite().all()
    else:
        with pytest.raises(ValueError, match="only from noise to data"):
            sample(d, process, x, ts, make_step(s))


def test_samplers_have_limits_here():
    assert set(LIMITS) <= set(SAMPLERS)


def test_a_process_of_ones_own_runs_through_all_of_this():
    "TrigFlow, in a file of its own, without a change here."
    here = Path(__file__).parent
    if "trig" in PROCESSES:
        return  # that is what runs now
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "trig"]
    command += ["--families", str(here / "trig_flow.py"), str(here / "test_families.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and int(passed[1]) > 45, done.stdout[-3000:]


# ---------------------------------------------------------------- one implementation of each idea
SOURCES = {
    p.name: p.read_text(encoding="utf-8")
    for p in sorted(Path(ddpm_course.__file__).parent.glob("*.py"))
    if p.name != "_modidx.py"
}


def asks_what_a_process_is(source: str) -> list:
    "Lines that ask for the type or the name of a process, in place of its alpha and sigma."
    classes, found = {"Process", "Times", *(find("process", p).__name__ for p in PROCESSES)}, []

    def names(node):
        return {getattr(n, "id", getattr(n, "attr", None)) for n in ast.walk(node)}

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "isinstance",
            "issubclass",
            "hasattr",
            "getattr",
        ):
            asked = (
                names(node.args[1]) & classes
                or "process" in names(node.args[0])
                and "str" not in names(node.args[1])
            )  # a name is no process yet
        elif isinstance(node, ast.Compare):
            # type(process) is VP, process.config["name"] == "flow", type(process).__name__ == ...
            sides = [node.left, *node.comparators]
            calls = any(
                isinstance(n, ast.Call) and getattr(n.func, "id", "") == "type"
                for s in sides
                for n in ast.walk(s)
            )
            named = any(isinstance(s, ast.Constant) and s.value in PROCESSES for s in sides)
            asked = (calls and any(names(s) & (classes | {"process"}) for s in sides)) or (
                named and any("process" in names(s) for s in sides)
            )
        elif isinstance(node, ast.MatchClass):
            asked = names(node.cls) & classes
        else:
            continue
        if asked:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_nobody_asks_what_kind_of_process_it_is(name):
    assert asks_what_a_process_is(SOURCES[name]) == []


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(process, VE)",
        "isinstance(p, (sde.VP, int))",
        "issubclass(type(p), Process)",
        "type(self.process) is Flow",
        "hasattr(process, 'betas')",
        "diff.process.config['name'] == 'flow'",
        "type(process).__name__ == 'EDM'",
        "match p:\n case VP(): pass",
        "getattr(self.process, 'T', 5)",
    ],
)
def test_the_rule_against_it_finds_it(line):
    assert asks_what_a_process_is(line)


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(x, Tensor)",
        "isinstance(process, str)",
        "name == 'flow'",
        "'schedule' in process.config",
        "type(net).__name__ in NETS",
        "process.alpha(t) == 0",
    ],
)
def test_the_rule_against_it_lets_others_be(line):
    assert not asks_what_a_process_is(line)


def sampling_loops(source: str) -> list:
    """Loops over neighbours on a grid that carry something from one pair to the next: walks from
    noise to data."""
    found = []
    for loop in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.For)):
        if not re.search(
            r"zip\((\w+)\[:-1\], \1\[1:\]\)|pairwise\(|range\(len\((\w+)\) - 1\)",
            ast.unparse(loop.iter),
        ):
            continue
        uses = sorted(
            (n for part in loop.body for n in ast.walk(part) if isinstance(n, ast.Name)),
            key=lambda n: (n.lineno, isinstance(n.ctx, ast.Store), n.col_offset),
        )
        first = {}
        for n in uses:
            first.setdefault(n.id, n.ctx)  # what a line reads counts before what it writes
        if {n.id for n in uses if isinstance(n.ctx, ast.Store)} & {
            k for k, how in first.items() if isinstance(how, ast.Load)
        }:
            found.append(ast.unparse(loop.iter))
    return found


def test_one_sampling_loop():
    assert {name: len(found) for name, s in SOURCES.items() if (found := sampling_loops(s))} == {
        "sampling.py": 1
    }


@pytest.mark.parametrize(
    "walk, is_one",
    [
        ("for t, s in zip(ts[:-1], ts[1:]):\n x = step(x, t, s)", True),
        ("for t, s in itertools.pairwise(ts):\n x += f(x, t)", True),
        (
            (
                "for i, (t, s) in enumerate(zip(ts[:-1], ts[1:])):\n t = t.expand(3)\n x, x0 ="
                " step(denoise, x, t, s)"
            ),
            True,
        ),
        ("for i in range(len(ts) - 1):\n d = net(x, ts[i])\n x = x + d", True),
        # a sum over levels, such as a bound, is no walk
        ("for t, s in zip(ts[:-1], ts[1:]):\n r = f(t, s)\n terms.append(r * 2)", False),
        ("for a, b in zip(widths, widths[1:]):\n x = f(x, a, b)", False),
    ],
)
def test_the_rule_for_loops_knows_a_walk(walk, is_one):
    assert bool(sampling_loops(walk)) == is_one


LOOPS = {
    what: (pattern, {"training.py": 1, "judge.py": 1})
    for what, pattern in {  # the judge is a classifier
        "backward pass": r"\.backward\(",
        "optimizer": r"optim\.\w+\(",
        "learning rate schedule": r"lr_scheduler\.\w+\(",
    }.items()
}


@pytest.mark.parametrize("what", LOOPS)
def test_one_training_loop(what):
    pattern, where = LOOPS[what]
    assert {
        name: len(re.findall(pattern, s)) for name, s in SOURCES.items() if re.search(pattern, s)
    } == where


def test_a_family_is_small():
    """About thirty lines, all told: a process says alpha, sigma and what differs, and inherits the
    rest."""
    for name in PROCESSES:
        own = {
            k
            for k, v in vars(type(make_process(name))).items()
            if callable(v) and not k.startswith("__")
        }
        assert own <= {k for c in (Process, Times) for k in vars(c)} | {
            "log_abar"
        }, f"{name} brings methods that no other process has"


def test_every_family_reaches_another_process_that_was_spawned():
    "As data loaders and servers on Windows and macOS start theirs: all that is needed is pickled."
    t = torch.tensor([0.3], dtype=F64)
    processes = [make_process(name, **kw) for name, kw in ALL.values()]
    networks = [
        Denoiser(score.PointNet(dim=3), process, make_param(name))
        for process in processes
        for name in PREDICTIONS
        if carries(process, name)
    ]
    for network in networks:
        network.requires_grad_(False)
    model = Model(shape=(1, 8, 8), num_classes=2, process="flow", param="velocity", device="cpu")
    x = torch.ones(1, 3)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        alphas = pool.map(operator.methodcaller("alpha", t), processes)
        estimates = pool.map(operator.methodcaller("__call__", x, t.float()), networks)
        described = pool.map(operator.methodcaller("describe"), [model])
        rules = pool.map(callable, [make_step(name) for name in SAMPLERS])
    for process, alpha in zip(processes, alphas):
        assert torch.equal(process.alpha(t), alpha), process
    for network, estimate in zip(networks, estimates):
        assert torch.equal(network(x, t.float()), estimate)
    assert described == [model.describe()] and all(rules)
