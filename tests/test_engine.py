"""One engine for every kind of data and condition: each case as somebody would write it.

Several processes are in test_dist.py, loaders and streams in test_batches.py and test_streams.py.
"""

import ast
import json
import shutil
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from common import QUICK, failing, same_weights, tiny_diffusion, tiny_dls
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ddpm_course.cli import main
from ddpm_course.cond import Captions, Labels, Vector
from ddpm_course.core import bcast, enter, rand, randn, to_float
from ddpm_course.denoiser import Denoiser, x0_param
from ddpm_course.light_unet import LightUNet
from ddpm_course.model import PROCESSES, Model, draw
from ddpm_course.process import DDPM, Times
from ddpm_course.shapes import draw_shapes
from ddpm_course.space import Film, Sound, Table, Tokens
from ddpm_course.training import Diffusion, Trainer

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "ddpm_course"
QUIET = dict(progress=False, loggers=[])


@pytest.fixture(autouse=True)
def rooms():
    "What a test enters leaves with it."
    from ddpm_course.core import ROOMS

    list(PROCESSES)  # Part II has entered what it has
    before = {kind: dict(room) for kind, room in ROOMS.items()}
    yield
    for kind in list(ROOMS):
        ROOMS[kind] = before.get(kind, {})


def batches(*shape, n=4, size=8, scale=0.3):
    g = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(size, *shape, generator=g), None) for _ in range(n)]


# ---- (a), (b): a process and a sampler of somebody's own
TRIG = """
import math, torch
from ddpm_course.core import enter
from ddpm_course.process import Process

@enter("process", "trig")
class TrigFlow(Process):
    "x_t = cos(t) x0 + sin(t) eps (Lu and Song 2025)."
    t_max = math.pi / 2
    def alpha(self, t): return torch.cos(t)
    def sigma(self, t): return torch.sin(t)
"""


def own_file(folder, text, name="mine"):
    (folder / f"{name}.py").write_text(text)
    return folder / f"{name}.py"


def test_a_process_from_a_file_of_ones_own_is_trained_saved_loaded_and_sampled(
    tmp_path, monkeypatch
):
    assert len(TRIG.strip().splitlines()) <= 12
    own_file(tmp_path, TRIG, "trig_of_mine")
    monkeypatch.syspath_prepend(tmp_path)
    from trig_of_mine import TrigFlow

    diff = Diffusion(LightUNet(1, 1), TrigFlow(), "v", (1, 8, 8), device="cpu")
    diff.fit(batches(1, 8, 8), epochs=1, run=tmp_path / "r", **QUIET, **QUICK)
    again = Diffusion.load(tmp_path / "r", "cpu")
    assert type(again.process) is TrigFlow and again.config == diff.config
    for sampler in ("euler", "ancestral", "heun", "churn", "dpmpp_2m", "unipc"):
        assert again.sample(n=2, n_steps=4, step=sampler, seed=0).isfinite().all(), sampler
    from ddpm_course.core import ROOMS

    del ROOMS["process"]["trig"]
    with pytest.raises(ValueError, match="import trig_of_mine"):
        Diffusion.load(tmp_path / "r", "cpu")


def test_b_sampler_of_ones_own_by_name_with_settings_from_the_command_line(tmp_path):
    text = """
import torch
from ddpm_course.core import enter, randn
from ddpm_course.sampling import euler

@enter("sampler", "jump")
def jump(denoise, process, x, t, s, generator=None, memory=None, push=0.0):
    "Euler's rule, and a push."
    memory["steps"] = memory.get("steps", 0) + 1
    x, x0_hat = euler(denoise, process, x, t, s)
    return x + push * memory["steps"], x0_hat
"""
    file = own_file(tmp_path, text, "jumping")
    run = tmp_path / "r"
    diff = tiny_diffusion().fit(tiny_dls(), epochs=1, run=run, **QUIET, **QUICK)
    pictures = []
    for push in (0, 0.3):
        line = f"sample --run {run} --import {file} --sampler jump --set push={push} --steps 3"
        out = tmp_path / f"{push}.png"
        done = CliRunner().invoke(main, [*line.split(), "--out", str(out), "--device", "cpu"])
        assert done.exit_code == 0, done.output
        pictures.append(out.read_bytes())
    plain = diff.space.show(
        diff.sample([0] * 8 + [1] * 8 + [2] * 8, cfg_scale=2.0, n_steps=3, seed=0),
        names=diff.classes,
    )
    assert pictures[0] == plain[".png"] != pictures[1]


# ---- (c): weights and times are arguments
def test_c_weight_and_times_are_written_down_and_come_back(tmp_path):
    how = dict(weight="min_snr", times="logit_normal", device="cpu", shape=(1, 8, 8))
    diff = Diffusion(process="vp", param="v", **how)
    diff.fit(batches(1, 8, 8), epochs=1, run=tmp_path / "r", **QUIET, **QUICK)
    again = Diffusion.load(tmp_path / "r", "cpu")
    assert again.config == diff.config and again.config["weight"]["name"] == "min_snr"
    x, t = torch.zeros(64, 1, 8, 8), torch.linspace(0.01, 1, 64)
    eps = randn(x.shape, torch.Generator().manual_seed(1))
    plain = Denoiser(again.model.net, again.process, again.model.param)
    ratio = (again.model.loss(x, None, t, eps) / plain.loss(x, None, t, eps)).detach()
    snr = again.process.snr(t).float()
    expected = snr.clamp(max=5) * again.process.sigma(t).float() ** 2  # of v: c_out = -sigma
    torch.testing.assert_close(ratio, expected, rtol=1e-3, atol=1e-6)
    a, b = (
        m.loss(x, generator=torch.Generator().manual_seed(0)).detach() for m in (again.model, plain)
    )
    assert not torch.allclose(a, b)
    with pytest.raises(ValueError, match="Did you mean 'min_snr'"):
        Diffusion(weight="minsnr", shape=(1, 8, 8), device="cpu")


def test_c_a_denoiser_that_is_handed_in_is_never_replaced(tmp_path):
    class Absolute(Denoiser):
        def loss(self, x0, cond=None, t=None, eps=None, generator=None):
            return super().loss(x0, cond, t, eps, generator).sqrt()

    def own():
        return Absolute(LightUNet(1, 1), DDPM(100, "cosine"), x0_param)

    diff = Diffusion(denoiser=own(), shape=(1, 8, 8), device="cpu")
    diff.fit(batches(1, 8, 8), epochs=1, run=tmp_path / "r", **QUIET, **QUICK)
    with pytest.raises(ValueError, match="pass it as denoiser="):
        Diffusion.load(tmp_path / "r", "cpu")
    assert same_weights(Diffusion.load(tmp_path / "r", "cpu", denoiser=own()), diff)


# ---- (d): captions
@pytest.fixture(scope="module")
def captioned():
    x, _, captions = draw_shapes(torch.arange(96), 16)
    return to_float(x), captions


def test_d_captions_from_fit_to_sample(tmp_path, captioned):
    x, captions = captioned
    cond = Captions.fit(captions)
    data = [(x[i : i + 16], captions[i : i + 16]) for i in range(0, 96, 16)]
    heard = []
    diff = Diffusion(shape=(3, 16, 16), cond=cond, device="cpu")
    diff.model.net.register_forward_pre_hook(lambda net, args: heard.append(args[2]))
    diff.fit(data, epochs=2, run=tmp_path / "r", progress=False, **QUICK)
    shares = torch.cat([c["mask"].any(1).float() for c in heard if c is not None])
    assert 0.5 < shares.mean() < 1, "a tenth of the captions is dropped, the rest is heard"
    assert (tmp_path / "r/images").exists()
    again = Diffusion.load(tmp_path / "r", "cpu")
    asked = [captions[k] for k in range(5)]
    whole = again.sample(asked, cfg_scale=3, n_steps=4, seed=1)
    parts = again.sample(asked, cfg_scale=3, n_steps=4, seed=1, chunk=2)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
    assert not torch.allclose(whole, again.sample(asked[::-1], cfg_scale=3, n_steps=4, seed=1))
    told = cond.encode(asked)
    dirty = dict(told, tokens=torch.where(told["mask"], told["tokens"], 5))  # other padding
    assert torch.equal(draw(again, dirty, guidance=3, n_steps=4, seed=1), whole)
    with pytest.raises(ValueError, match="unknown word 'purpel'.*purple"):
        again.sample("a purpel circle")


def test_d_captions_are_never_dropped_in_silence(captioned):
    x, captions = captioned
    told = Captions.fit(captions).encode(captions[:16])
    for cond in (captions[:16], told):
        with pytest.raises(ValueError, match="made without one"):
            Diffusion(shape=(3, 16, 16), device="cpu").fit([(x[:16], cond)], epochs=1, **QUIET)
    with pytest.raises(ValueError, match="captions are sentences"):
        Diffusion(shape=(3, 16, 16), cond=Captions.fit(captions), device="cpu").fit(
            [(x[:16], torch.zeros(16))], epochs=1, **QUIET
        )


# ---- (e): sound, films, points, tables
KINDS = {
    "sound": (Sound((1, 32), rate=4000), ".wav"),
    "film": (Film((1, 3, 16, 16)), ".gif"),
    "points": ((2,), ".png"),
    "table": (Table((3,), columns=("a", "b", "c")), ".csv"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_e_every_kind_of_data_is_trained_shown_loaded_and_sampled(kind, tmp_path):
    space, suffix = KINDS[kind]
    shape = space if isinstance(space, tuple) else space.shape
    more = dict(shape=space) if isinstance(space, tuple) else dict(space=space)
    diff = Diffusion(process="flow", param="velocity", device="cpu", **more)
    data = batches(*shape)
    diff.fit(data, total_steps=4, run=tmp_path / "r", progress=False, precision="float32")
    assert list((tmp_path / "r/images").glob(f"ema-*{suffix}")), list((tmp_path / "r").rglob("*"))
    again = Diffusion.load(tmp_path / "r", "cpu")
    assert again.config == diff.config and again.space.config == diff.space.config
    x = again.sample(n=3, n_steps=3, seed=0)
    assert x.shape == (3, *shape) and torch.equal(x, diff.sample(n=3, n_steps=3, seed=0))
    out = tmp_path / f"drawn{suffix}"
    line = f"sample --run {tmp_path / 'r'} --n 2 --steps 2 --device cpu --out {out}"
    done = CliRunner().invoke(main, line.split())
    assert done.exit_code == 0 and out.stat().st_size > 0, done.output
    looks = {
        ".wav": lambda: wave.open(str(out)).getframerate() == 4000,
        ".gif": lambda: Image.open(out).n_frames == 3,
        ".png": lambda: Image.open(out).size[0] > 50,
        ".csv": lambda: out.read_text().splitlines()[0] == "a,b,c",
    }
    assert looks[suffix]()


def test_e_the_command_line_trains_on_an_array(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "tones.npz", x=0.1 * rng.normal(size=(60, 1, 64)), y=np.arange(60) % 3)
    run = tmp_path / "r"
    line = f"train --data {tmp_path}/tones.npz --epochs 1 --run {run} --device cpu --no-wandb"
    done = CliRunner().invoke(main, line.split())
    assert done.exit_code == 0 and (run / "samples.wav").exists(), done.output
    assert Diffusion.load(run, "cpu").num_classes == 3


def test_e_nothing_is_clamped_where_there_are_no_bounds():
    def far(x, t, cond=None):
        return torch.full_like(x, 7.0)

    class Far(nn.Module):
        forward = staticmethod(far)

    for bounds, reach in (((-1, 1), 1.0), (None, 7.0), ((0.0, 3.0), 3.0)):
        diff = Diffusion(Far(), shape=(1, 4), bounds=bounds, device="cpu")
        assert diff.sample(n=2, n_steps=2).max() == pytest.approx(reach)
    assert diff.sample(n=2, n_steps=2, clip=False).max() == pytest.approx(7.0)
    assert Diffusion(Far(), shape=(1, 4), bounds=None, device="cpu").space.bounds is None


def test_e_data_outside_of_the_bounds_are_told():
    with pytest.warns(UserWarning, match=r"from .* to .*bounds=None"):
        Diffusion(shape=(1, 8, 8), device="cpu").fit(
            batches(1, 8, 8, scale=3), total_steps=1, **QUIET, **QUICK
        )


# ---- (f): a known half, a gradient through the denoiser
def test_f_wrap_gives_the_same_pictures_however_they_are_cut():
    diff = tiny_diffusion()
    known = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 8, 4)

    def inpaint(denoise, part):
        return lambda x, t: torch.cat([known[part], denoise(x, t)[..., 4:]], dim=-1)

    def uphill(denoise, part):
        def moved(x, t):
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                miss = (denoise(z, t)[..., :4] - known[part]).square().sum()
                (slope,) = torch.autograd.grad(miss, z)
            return denoise(x, t) - 0.1 * slope

        return moved

    for wrap in (inpaint, uphill):
        how = dict(n_steps=5, seed=3, wrap=wrap, cfg_scale=2.0)
        whole, parts = (diff.sample([0, 1, 2, 0, 1], chunk=c, **how) for c in (5, 2))
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
    filled = diff.sample([0] * 5, n_steps=4, seed=0, wrap=inpaint)
    torch.testing.assert_close(filled[..., :4], known, rtol=0, atol=1e-6)


# ---- (i): masked letters, by the same fit, run and sample
LETTERS = 6  # and one more number, the mask


class Absorb(Times):
    "Each letter is hidden with probability t (Austin et al. 2021)."

    def corrupt(self, x0, t, generator=None, eps=None):
        eps = rand(x0.shape, generator, x0.device) if eps is None else eps
        return torch.where(eps < bcast(t.to(eps), eps), LETTERS, x0), eps

    def prior(self, shape, device=None, generator=None):
        return torch.full(shape, LETTERS, device=device)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(LETTERS + 1, 24), nn.Linear(24, LETTERS)
        self.gru = nn.GRU(24, 12, batch_first=True, bidirectional=True)

    def forward(self, x, t, cond=None):
        return self.out(self.gru(self.emb(x))[0])


class Letters(nn.Module):
    "Which letter is behind the mask? Cross-entropy where something is hidden."

    def __init__(self, net, process):
        super().__init__()
        self.net, self.process = net, process

    def forward(self, x, t, cond=None):
        return self.net(x, self.process.clock(t), cond)

    def loss(self, x0, cond=None, t=None, eps=None, generator=None):
        t = self.process.sample_t(len(x0), x0.device, generator) if t is None else t
        x_t, _ = self.process.corrupt(x0, t, generator, eps)
        wrong = F.cross_entropy(self(x_t, t, cond).mT, x0, reduction="none")
        return ((x_t == LETTERS) * wrong).sum(1) / t / x0.shape[1]


def unmask(denoise, process, x, t, s, generator=None):
    shares = denoise(x, t).softmax(-1).cumsum(-1)
    new = (rand((*x.shape, 1), generator) > shares).sum(-1).clamp(max=LETTERS - 1)
    shown = rand(x.shape, generator) > bcast(s / t, x)
    return torch.where((x == LETTERS) & shown, new, x), new


def test_i_masked_letters_by_the_same_fit_run_and_sample(tmp_path):
    enter("process", "test_absorb")(Absorb)
    enter("network", "test_reader")(Reader)
    enter("denoiser", "test_letters")(Letters)
    g = torch.Generator().manual_seed(0)
    rows = (torch.arange(5) + torch.randint(0, LETTERS, (640, 1), generator=g)) % LETTERS
    data = [(rows[i : i + 64], None) for i in range(0, 640, 64)]  # rows that count upwards
    space = Tokens((5,), alphabet="abcdef")
    diff = Diffusion(denoiser=Letters(Reader(), Absorb()), space=space, device="cpu", seed=1)
    diff.fit(
        data,
        epochs=60,
        run=tmp_path / "r",
        progress=False,
        precision="float32",
        lr=2e-2,
        loggers=[],
    )  # fmt: skip
    again = Diffusion.load(tmp_path / "r", "cpu")
    assert type(again.model) is Letters and again.config == diff.config
    whole, parts = (again.sample(n=40, n_steps=40, step=unmask, seed=0, chunk=c) for c in (40, 7))
    assert torch.equal(whole, parts) and whole.dtype == torch.int64
    counts = ((whole.diff() % LETTERS) == 1).all(1).float().mean()
    assert counts > 0.8, f"{counts:.0%} of the rows count upwards"
    line = again.space.show(whole[:1])[".txt"].decode().strip()
    assert line in "abcdefabcdef"


# ---- (j): a model that several threads use
def test_j_threads_share_a_model_one_with_gradients():
    diff = tiny_diffusion()

    def pull(denoise, part):
        def pulled(x, t):
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(denoise(z, t).square().sum(), z)
            return denoise(x, t) - 0.05 * slope

        return pulled

    jobs = [dict(wrap=pull), dict(use_ema=False), dict(cfg_scale=3.0), dict(step="heun")]

    def job(k):
        return diff.sample([0, 1, 2], n_steps=6, seed=k, **jobs[k % 4])

    alone = [job(k) for k in range(4)]
    diff.model.train()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(job, list(range(4)) * 3))
    for k, got in enumerate(together):
        torch.testing.assert_close(got, alone[k % 4], rtol=0, atol=1e-6)
    assert diff.model.training and not diff.ema_model.training
    assert all(p.grad is None for m in (diff.model, diff.ema_model) for p in m.parameters())


# ---- runs of before, longer runs, other beginnings
@pytest.fixture
def old_run(tmp_path):
    "A run of version 0.0.1, interrupted at step 5 of 8, and what became of it there."
    shutil.copytree(HERE / "old_run/run", tmp_path / "old")
    return tmp_path / "old", load_file(HERE / "old_run/expected.safetensors")


def test_a_run_of_before_loads_and_draws_the_same(old_run):
    run, want = old_run
    diff = Diffusion.load(run, "cpu")
    assert diff.config == json.loads((run / "config.json").read_text())["model"]
    got = diff.sample([0, 1, 2], cfg_scale=2.0, n_steps=10, seed=3)
    torch.testing.assert_close(got, want["samples"], rtol=0, atol=1e-5)


def test_a_run_of_before_goes_on_to_the_same_weights(old_run):
    run, want = old_run
    diff = tiny_diffusion().fit(tiny_dls(), epochs=2, run=run, resume=True, **QUIET)
    assert diff.step == 8
    for name, model in (("final", diff.model), ("average", diff.ema_model)):
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, want[f"{name}.{key}"], rtol=1e-4, atol=1e-6)


def test_a_finished_run_is_extended_and_one_that_is_not_is_not(tmp_path):
    run = tmp_path / "r"
    tiny_diffusion().fit(tiny_dls(), epochs=1, run=run, **QUIET, **QUICK)
    with pytest.raises(ValueError, match="extend=True"):
        tiny_diffusion().fit(tiny_dls(), epochs=1, run=run, **QUIET)
    longer = tiny_diffusion().fit(tiny_dls(), epochs=2, run=run, extend=True, lr=1e-3, **QUIET)
    assert longer.step == 12 and longer.settings.lr == 1e-3 and longer.settings.first_step == 4
    history = json.loads((run / "config.json").read_text())["history"]
    assert [(e["event"], e["step"]) for e in history] == [("start", 0), ("extend", 4)]
    stopped = failing(tiny_diffusion(), lambda diff: diff.step == 6)
    with pytest.raises(ConnectionError):
        stopped.fit(tiny_dls(), epochs=2, run=tmp_path / "s", save_every=0, **QUIET, **QUICK)
    with pytest.raises(ValueError, match="has not come to its end .step 6 of 8.*--resume"):
        tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "s", extend=True, **QUIET)
    with pytest.raises(ValueError, match="no run to extend"):
        tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "n", extend=True, **QUIET)


def test_an_extended_run_that_is_interrupted_ends_as_if_it_had_not_been(tmp_path):
    def finished(run):
        return tiny_diffusion().fit(tiny_dls(), epochs=1, run=run, **QUIET, **QUICK)

    finished(tmp_path / "a"), finished(tmp_path / "b")
    how = dict(epochs=2, extend=True, **QUIET)
    whole = tiny_diffusion().fit(tiny_dls(), run=tmp_path / "a", **how)
    broken = failing(tiny_diffusion(), lambda diff: diff.step == 9)
    with pytest.raises(ConnectionError):
        broken.fit(tiny_dls(), run=tmp_path / "b", save_every=0, **how)
    again = tiny_diffusion().fit(tiny_dls(), run=tmp_path / "b", resume=True, **QUIET)
    assert again.step == 12 and same_weights(whole, again)


def test_a_training_by_minutes_goes_on_with_the_plan_that_was_decided(tmp_path):
    run = tmp_path / "r"
    diff = failing(
        tiny_diffusion(),
        lambda diff: diff.trainer.total and diff.step > diff.trainer.sched.begin,
    )
    with pytest.raises(ConnectionError):
        diff.fit(tiny_dls(), minutes=0.05, run=run, save_every=0, **QUIET, **QUICK)
    total = diff.trainer.total
    again = tiny_diffusion().fit(tiny_dls(), minutes=9, run=run, resume=True, **QUIET)
    assert again.trainer.done and again.step == total and again.settings.minutes == 0.05


def test_init_takes_what_fits_and_says_what_is_new(tmp_path, capsys):
    run = tmp_path / "r"
    first = tiny_diffusion().fit(tiny_dls(), epochs=1, run=run, **QUIET, **QUICK)
    more = tiny_diffusion(num_classes=5)
    more.fit(tiny_dls(num_classes=5), total_steps=1, init=run, lr=1e-9, loggers=[], **QUICK)
    said = capsys.readouterr().out
    assert "label_emb.weight (3 classes there, 5 here)" in said
    mine, theirs = more.ema_model.net.label_emb.weight, first.ema_model.net.label_emb.weight
    torch.testing.assert_close(mine[[0, 1, 2, 5]], theirs, atol=1e-4, rtol=0)  # by name; null
    with pytest.raises(ValueError, match="Did you mean 'digits'"):
        tiny_diffusion().fit(tiny_dls(), epochs=1, init="digist", **QUIET)


# ---- how it must stay
def functions_and_names():
    for path in sorted(PACKAGE.glob("*.py")):
        yield path.stem, ast.parse(path.read_text(encoding="utf-8"))


def test_nobody_asks_what_kind_of_process_condition_or_space_it_is():
    kinds = {"Process", "Times", "DDPM", "NCSN", "VP", "SubVP", "VE", "EDM", "Flow"}
    kinds |= {"Condition", "Labels", "Captions", "Vector", "Rows", "Many", "Nothing"}
    kinds |= {"Images", "Sound", "Film", "Points", "Table", "Tokens"}
    for module, code in functions_and_names():
        for node in ast.walk(code):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not asked & kinds, f"{module}.py, line {node.lineno}"


def imports_of(code, whole: bool) -> set:
    "Modules of the package that a module imports: at its top, or anywhere."
    nodes = ast.walk(code) if whole else code.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            if node.level == 1:
                found |= {node.module} if node.module else {a.name for a in node.names}
            elif (node.module or "").startswith("ddpm_course."):
                found.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ddpm_course.")}
    return found


def test_no_arrow_of_imports_leads_upwards():
    "At the top of modules nothing is imported in a circle; Part I does not need Part II."
    graph = {name: imports_of(code, whole=False) for name, code in functions_and_names()}
    done = set()

    def visit(name, way):
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, [*way, name])
        done.add(name)

    for name in graph:
        visit(name, [])
    reach = {"training"}
    while new := {o for name in reach for o in graph.get(name, ())} - reach:
        reach |= new
    assert not reach & {"score", "sde", "edm", "flow", "solvers", "likelihood", "data", "cli"}


def test_only_space_and_pictures_know_what_a_pixel_is():
    allowed = {"space", "pictures", "data", "files", "shapes", "features", "judge", "widgets"}
    allowed |= {"evaluation", "report", "core", "cli", "exercises", "likelihood", "streams"}
    for module, code in functions_and_names():
        names = {n.id for n in ast.walk(code) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute)}
        if module not in allowed:
            assert not names & {"to_uint8", "to_float", "save_images", "show_images"}, module


def test_the_classes_are_made_of_each_other_and_not_of_a_chain():
    assert Diffusion.__mro__[1:3] == (Model, object) and Trainer.__mro__[1] is object
    diff = tiny_diffusion().prepare(tiny_dls(), epochs=1, **QUICK)
    assert isinstance(diff.trainer, Trainer) and diff.trainer.model is diff and diff.run is None


def test_vectors_labels_and_names_are_asked_for_by_their_kind():
    told = Diffusion(shape=(1, 8, 8), cond=Vector(3), device="cpu")
    assert told.sample([0.1, 0.2, 0.3], n=2, n_steps=2, cfg_scale=2).shape == (2, 1, 8, 8)
    named = Diffusion(shape=(1, 8, 8), cond=Labels(2, ["cat", "dog"]), device="cpu")
    by_name, by_number = (named.sample(w, n_steps=2, seed=0) for w in (["dog", "cat"], [1, 0]))
    assert torch.equal(by_name, by_number)


def test_bfloat16_that_is_only_imitated_is_told_with_the_factor(monkeypatch):
    from ddpm_course import settings

    monkeypatch.setattr(settings, "slowness", lambda: 20.0)
    with pytest.warns(UserWarning, match="imitates bfloat16, 20.0 times slower"):
        tiny_diffusion().sample([0], n_steps=2, precision="bfloat16")
    with pytest.warns(UserWarning, match="imitates bfloat16"):
        tiny_diffusion().fit(tiny_dls(), total_steps=1, precision="bfloat16", **QUIET)
