"""A model in a file of another library draws the images that it draws here, and the file says what
it is; what cannot be exported is refused with a sentence."""

import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from common import tiny_diffusion

from ddpm_course.cli import main
from ddpm_course.cond import Captions
from ddpm_course.core import example_generators, randn
from ddpm_course.export import (
    COLUMNS,
    KEY,
    USUAL_STEPS,
    Step,
    check_onnx,
    export_model,
    load_onnx,
    load_torch,
    needs,
    rows,
    traced,
)
from ddpm_course.light_unet import LightUNet
from ddpm_course.model import Model
from ddpm_course.training import load_pretrained


def onnxruntime():
    "The module; the test is left out where ONNX cannot be written or run."
    try:
        check_onnx()
    except ValueError as e:
        pytest.skip(str(e))
    return importlib.import_module("onnxruntime")


@cache
def shipped(name):
    return load_pretrained(name, "cpu")


def tiny(seed=0, **kw):
    "A light network, in seconds through an exporter, without a layer that is zero."
    torch.manual_seed(seed)
    sizes = dict(widths=(8,), attention=(), heads=2, time_dim=16)
    net = LightUNet(1, 1, **sizes | kw)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net


def same(exported, model, what, **kw):
    ask = dict(cfg_scale=2.0, n_steps=20, seed=3) | kw
    ours, theirs = model.sample(what, **ask), exported.sample(what, **ask)
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    "The file, and what was said when it was written."
    onnxruntime()
    file = tmp_path_factory.mktemp("digits") / "digits.onnx"
    return file, export_model(shipped("digits"), file)


def test_onnx_gives_the_images_of_torch(digits):
    (file, done), model = digits, shipped("digits")
    exported = load_onnx(file)
    assert same(exported, model, [0, 3, 7, 10]) < 1e-4 and done["difference"] < 1e-4
    assert done["bytes"] == file.stat().st_size < 15e6
    assert [p.name for p in file.parent.iterdir()] == ["digits.onnx"]  # weights inside
    assert str(Path.cwd()).encode() not in file.read_bytes()  # nothing of this machine
    whole = exported.sample(["3"], n=5, n_steps=4, seed=1)
    parts = exported.sample(["3"], n=5, n_steps=4, seed=1, chunk=2)  # the last is alone
    assert torch.allclose(whole, parts, atol=1e-5)
    each = torch.tensor([0.0, 3.0])
    assert same(exported, model, [1, 2], cfg_scale=each, n_steps=4) < 1e-4


def test_numpy_and_onnxruntime_are_enough(digits):
    "What the file says of itself is all that a sampler in another language needs."
    (file, _), model = digits, shipped("digits")
    session = onnxruntime().InferenceSession(file)
    about = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    assert [i.name for i in session.get_inputs()] == about["inputs"]
    assert [o.name for o in session.get_outputs()] == about["outputs"] == ["x_s", "x0_hat"]
    assert about["columns"] == COLUMNS and len(about["grids"]["20"]) == 20
    assert about["null"] == {"label": 10} and about["classes"] == list("0123456789")
    assert about["shape"] == list(model.shape) and about["bounds"] == [-1.0, 1.0]
    assert about["model"] == json.loads(json.dumps(model.config))
    label, guidance = np.array([2, 0, 1, 9]), np.full(4, 2, np.float32)
    noise = randn((4, *model.shape), example_generators(5, 4)).numpy()
    x = np.float32(about["prior"]) * noise
    for row in about["grids"]["20"]:
        at = np.tile(np.float32(row), (4, 1))
        x, x0_hat = session.run(None, dict(x=x, at=at, guidance=guidance, label=label))
        assert abs(x0_hat).max() <= 1
    ours = model.sample([2, 0, 1, 9], cfg_scale=2.0, n_steps=20, seed=5)
    assert abs(x - ours.numpy()).max() < 1e-4


def test_colour_by_the_command(tmp_path):
    onnxruntime()
    words = ["export", "shapes", "--out", str(tmp_path / "s.onnx"), "--steps", "20"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and f"{tmp_path / 's.onnx'}: 3." in done.output, done.output
    exported = load_onnx(tmp_path / "s.onnx")
    assert same(exported, shipped("shapes"), [0, 1, 2, 2]) < 1e-4
    with pytest.raises(ValueError, match="walks of 20 steps, not of 50: export it .*--steps 50"):
        exported.sample([1])


ALONE = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ddpm_course":
            raise ImportError("ddpm_course is not here")
sys.meta_path.insert(0, Blocked())
import torch
extra = {"ddpm_course.json": ""}
step = torch.export.load(sys.argv[1], extra_files=extra).module()
about = json.loads(extra["ddpm_course.json"])
label = torch.tensor([1, 2, 3, 10])
x = about["prior"] * torch.load(sys.argv[2])
for row in about["grids"]["20"]:
    at = torch.tensor(row).expand(4, -1)
    x, _ = step(x=x, at=at, guidance=torch.full((4,), 2.0), told=dict(label=label))
assert not any(m.split(".")[0] == "ddpm_course" for m in sys.modules)
torch.save(x, sys.argv[2])
"""


def test_torch_file_runs_without_this_package(tmp_path):
    model, file, noise = shipped("digits"), tmp_path / "digits.pt2", tmp_path / "noise.pt"
    export_model(model, file, "torch")
    assert same(load_torch(file), model, [1, 2, 3, 10]) < 1e-4
    torch.save(randn((4, *model.shape), example_generators(3, 4)), noise)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(file), str(noise)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours = model.sample([1, 2, 3, 10], cfg_scale=2.0, n_steps=20, seed=3)
    assert (torch.load(noise) - ours).abs().max() < 1e-4


def test_captions_and_their_padding(tmp_path):
    onnxruntime()
    words = Captions(["red", "blue", "ball"], 4, examples=["red ball"], dim=8)
    net = tiny(words=3, context=8, attention=(0,))
    model = Model(net, shape=(1, 8, 8), cond=words, device="cpu")
    export_model(model, tmp_path / "spoken.onnx", steps=[5])
    exported = load_onnx(tmp_path / "spoken.onnx")
    assert exported.about["cond"]["words"] == ["red", "blue", "ball"]
    assert same(exported, model, ["blue ball", "red", ""], n_steps=5) < 1e-4
    red, blue = (exported.sample([w], n_steps=5, seed=0) for w in ("red", "blue"))
    assert (red - blue).abs().max() > 1e-3  # it listens
    with pytest.raises(ValueError, match="unknown word 'green'"):
        exported.sample(["green ball"], n_steps=5)


KINDS = dict(
    points=dict(shape=(2,), process="edm", param="edm", num_classes=3),
    sound=dict(shape=(1, 16), process="vp", net=dict(dims=1)),
    film=dict(
        shape=(1, 3, 8, 8), process="flow", param="velocity", net=dict(dims=3, attention=(0,))
    ),
    unbounded=dict(shape=(1, 8, 8), process="ve", param="edm", bounds=None, net={}),
)


@pytest.mark.parametrize("kind", KINDS)
def test_other_data_and_processes(kind, tmp_path):
    "torch's file; ONNX is written from the same program."
    settings = dict(KINDS[kind])
    net = settings.pop("net", None)
    net = None if net is None else tiny(**net)
    model = Model(net, device="cpu", **settings)
    for p in model.ema_model.parameters():
        p.data += 0.2 * torch.randn_like(p)  # so much that samples are clipped
    export_model(model, tmp_path / "x.pt2", "torch")
    exported = load_torch(tmp_path / "x.pt2")
    ask = dict(n_steps=10, seed=1, cfg_scale=1.5)
    ours, theirs = model.sample(n=3, **ask), exported.sample(n=3, **ask)
    assert (ours - theirs).abs().max() < 1e-4 * max(1, ours.abs().max())
    assert (ours.abs().max() == 1) == (kind in ("sound", "film"))  # clipped


def test_a_run_folder_without_labels(tmp_path):
    "The averaged weights of the newest checkpoint, by the command."
    model = tiny_diffusion(num_classes=0)
    for p in model.ema_model.parameters():
        p.data += 0.1
    batches = [torch.rand(4, 1, 8, 8)]
    model.fit(batches, total_steps=1, run=tmp_path / "run", precision="float32", progress=False)
    done = CliRunner().invoke(main, ["export", str(tmp_path / "run"), "--to", "torch"])
    assert done.exit_code == 0 and "model.pt2: 0." in done.output, done.output
    exported = load_torch(tmp_path / "run" / "model.pt2")
    assert exported.about["inputs"] == ["x", "at"] and exported.about["step"] == 1
    assert list(exported.about["grids"]) == [str(n) for n in USUAL_STEPS]
    again = type(model).load(tmp_path / "run", "cpu")
    assert (again.sample(n=2, seed=0) - exported.sample(n=2, seed=0)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="without labels"):
        exported.sample([1])


@pytest.mark.parametrize("process, param", [("ddpm", "x0"), ("ddpm", "eps"), ("flow", "velocity")])
def test_diffusers_schedulers_walk_as_we_do(process, param, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    net = tiny(num_classes=2)
    bounds = (-1, 1) if process == "ddpm" else None  # their scheduler of flows does not clip
    model = Model(net, process, param, shape=(1, 8, 8), num_classes=2, bounds=bounds, device="cpu")
    done = export_model(model, tmp_path / "theirs", "diffusers")
    assert "no network like LightUNet" in done["said"] and done["difference"] < 1e-5
    unet = torch.export.load(tmp_path / "theirs" / "unet.pt2").module()
    x, label, clipped = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]), {}
    ours = model.sample(label, start=x, n_steps=20)
    if process == "ddpm":
        scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "theirs")
        scheduler.set_timesteps(20)
        clipped = dict(use_clipped_model_output=True)
    else:
        kind = diffusers.FlowMatchEulerDiscreteScheduler
        scheduler = kind.from_pretrained(tmp_path / "theirs")
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20))
    for t in scheduler.timesteps:
        told = unet(sample=x, timestep=t.expand(3), told=dict(label=label))
        x = scheduler.step(told, t, x, **clipped).prev_sample
    assert (x - ours).abs().max() < 1e-3 * max(1, ours.abs().max())


def test_what_a_gpu_trained_is_compared_on_the_cpu():
    "The model itself stays as it is, in training mode, with its random numbers."
    model = tiny_diffusion()
    model.ema_model.train()
    before = torch.get_rng_state()
    from ddpm_course.export import on_cpu

    here = on_cpu(model)
    assert model.ema_model.training and not here.ema_model.training
    assert here.process is here.ema_model.process is not model.process
    assert torch.equal(before, torch.get_rng_state())


class Looks(torch.nn.Module):
    def forward(self, x, t, cond):
        return x if (x > 0).all() else -x


def test_sentences(tmp_path, monkeypatch):
    asked = Model(Looks(), shape=(1, 8, 8), device="cpu")
    with pytest.raises(ValueError, match="cannot follow Looks"):
        at = rows(asked.ema_model, 1).repeat(2, 1)
        traced(Step(asked), dict(x=torch.zeros(2, 1, 8, 8), at=at))
    (tmp_path / "no.pt2").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no.pt2 is not a file of torch.export"):
        load_torch(tmp_path / "no.pt2")
    with pytest.raises(OSError):
        load_torch(tmp_path / "missing.pt2")
    with pytest.raises(ValueError, match=r"no_such.*pip install 'ddpm_course\[export\]'"):
        needs("json", "no_such")
    for words, message in {
        ("digit", "--out", tmp_path / "x.onnx"): "Did you mean 'digits'?",
        ("digits", "--to", "torch", "--out", tmp_path): "is a folder",
        ("digits", "--to", "torch", "--steps", "1001", "--out", tmp_path / "x"): "1 to 1000 steps",
        ("digits", "--to", "torch", "--steps", "0", "--out", tmp_path / "x"): "1 to 1000 steps",
    }.items():
        done = CliRunner().invoke(main, ["export", *map(str, words)])
        assert done.exit_code == 1 and message in done.output, (words, done.output)
        assert "Traceback" not in done.output and not (tmp_path / "x").exists()
    monkeypatch.setattr("ddpm_course.export.find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["export", "digits", "--out", str(tmp_path / "x.onnx")])
    assert done.exit_code == 1 and "pip install 'ddpm_course[export]'" in done.output
