"""Every process with every prediction and every sampler through the command line: it works, or a sentence says why not and what to take."""
import json

import pytest
import torch
from click.testing import CliRunner
from common import QUICK, tiny_diffusion, tiny_dls

import ddpm_course.data
from ddpm_course.cli import main
from ddpm_course.denoiser import PARAMS
from ddpm_course.model import PROCESSES, SAMPLERS, make_process
from ddpm_course.training import Diffusion

PREDICTIONS = [*PARAMS, "edm"]
REFUSED = {(p, "velocity"): "alpha + sigma = 1" for p in PROCESSES if p != "flow"}
REFUSED |= {(p, "v"): "alpha^2 + sigma^2 = 1" for p in PROCESSES if p not in ("ddpm", "vp")}
REFUSED |= {("flow", k): "divides by alpha" for k in ("eps", "score")}
UNLESS_TOLD = dict(ddpm="x0", vp="x0", sub_vp="x0", ncsn="edm", ve="edm", edm="edm", flow="velocity")
NEED_ALPHA = ("langevin", "euler_maruyama", "predictor_corrector")  # a score and its SDE are not defined without data


def run(*args, code=0):
    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == code and "Traceback" not in done.output, (args, done.output, done.exception)
    return done.output


@pytest.fixture
def one_step(monkeypatch):
    "Training is one step on two images, drawing gives grey; a list of the models that were trained."
    trained = []

    def fit(self, dls, *args, **kw):
        x, y = next(iter(dls.train))
        self.prepare(dls, total_steps=1, **QUICK)
        loss = self.train_step(x[:2], y[:2]).mean().item()
        assert torch.isfinite(torch.tensor(loss)) and int(self.diverged) < 0
        self.history.append(dict(loss=loss))
        trained.append(self)

    monkeypatch.setattr(Diffusion, "fit", fit)
    monkeypatch.setattr(Diffusion, "sample", lambda self, labels, **kw: torch.zeros(len(labels), *self.shape))
    monkeypatch.setattr(ddpm_course.data, "get_dls", lambda *a, **kw: tiny_dls(size=16))
    return trained


@pytest.mark.parametrize("process", PROCESSES)
def test_every_prediction_is_trained_or_refused_with_a_reason_and_a_way_out(process, one_step, tmp_path):
    for k in PREDICTIONS:
        said = run("train", "--process", process, "--predict", k, "--device", "cpu", "--run", tmp_path / k, code=int((process, k) in REFUSED))
        if (process, k) not in REFUSED:
            assert one_step[-1].config["process"]["name"] == process and one_step[-1].config["param"]["name"] == k and f"{process}, predicts {k}" in said
            continue
        why, take = said.removeprefix("Error: ").strip().split("; take ")
        assert f"prediction {k} does not go with {process}: " in why and REFUSED[process, k] in why and said.count("\n") == 1
        assert take.replace(" or ", ", ").split(", ") == [o for o in PREDICTIONS if (process, o) not in REFUSED], "the way out goes through"
    assert len(one_step) == sum((process, k) not in REFUSED for k in PREDICTIONS)


def test_refused_before_any_data_is_read(monkeypatch, tmp_path):
    def never(*a, **kw): raise AssertionError("data was read")
    monkeypatch.setattr(ddpm_course.data, "get_dls", never)
    for process, k in REFUSED: assert f"{k} does not go with {process}" in run("train", "--process", process, "--predict", k, "--run", tmp_path / "r", code=1)
    for process in PROCESSES:
        if process != "ddpm": assert "--schedule belongs to ddpm" in run("train", "--process", process, "--schedule", "linear", code=1)
    assert "Did you mean 'sub_vp'?" in run("train", "--process", "subvp", code=1)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("process", PROCESSES)
def test_what_is_predicted_and_which_schedule_unless_one_says(process, one_step, tmp_path):
    run("train", "--process", process, "--device", "cpu", "--run", tmp_path / "r")
    config = one_step[-1].config
    assert config["param"]["name"] == UNLESS_TOLD[process] and config["process"].get("schedule") == ("cosine" if process == "ddpm" else None)
    if process == "ddpm":
        run("train", "--schedule", "linear", "--device", "cpu", "--run", tmp_path / "s")
        assert one_step[-1].config["process"] == dict(name="ddpm", T=1000, schedule="linear")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A run folder per process, trained for an epoch of four steps."
    folder, d = tmp_path_factory.mktemp("runs"), tiny_diffusion()
    for name in PROCESSES:
        diff = Diffusion(d.model.net, make_process(name), UNLESS_TOLD[name], d.shape, d.num_classes, device="cpu")
        diff.fit(tiny_dls(), epochs=1, run=folder / name, loggers=[], progress=False, **QUICK)
    return folder


@pytest.mark.parametrize("process", PROCESSES)
def test_every_sampler_draws_or_is_refused_with_a_reason_and_a_way_out(process, runs, tmp_path, monkeypatch):
    drawn, draw = [], Diffusion.sample
    monkeypatch.setattr(Diffusion, "sample", lambda *a, **kw: drawn.append(draw(*a, **kw)) or drawn[-1])
    for k in SAMPLERS:
        args = ["sample", "--run", runs / process, "--sampler", k, "--steps", 3, "--n", 2, "--device", "cpu", "--out", tmp_path / f"{k}.png"]
        done = CliRunner().invoke(main, [str(a) for a in args])
        if (process, k) not in [("flow", s) for s in NEED_ALPHA]:
            assert done.exit_code == 0, (k, done.output)
            assert "6 images" in done.output and (tmp_path / f"{k}.png").exists() and drawn[-1].isfinite().all() and drawn[-1].std() > 0.1, k
            continue
        assert done.exit_code == 1 and f"sampler {k} does not go with flow: " in done.output and "alpha" in done.output and "Traceback" not in done.output
        take = done.output.strip().split("; take ")[1].replace(" or ", ", ").split(", ")
        assert take == [o for o in SAMPLERS if o not in NEED_ALPHA] and not (tmp_path / f"{k}.png").exists()


def test_precision_of_the_samples(runs, tmp_path):
    def draw(precision):
        run("sample", "--run", runs / "ddpm", "--steps", 3, "--device", "cpu", "--precision", precision, "--out", tmp_path / "x.png")
        return (tmp_path / "x.png").read_bytes()
    assert draw("float32") == draw("float32") != draw("bfloat16")
    assert "Did you mean 'bfloat16'?" in run("sample", "--run", runs / "ddpm", "--device", "cpu", "--precision", "bfloat", code=1)


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_trained_for_real_resumed_and_told(process, monkeypatch, tmp_path):
    "Without the short cuts above: one epoch, a picture, --resume, info."
    monkeypatch.setattr(ddpm_course.data, "get_dls", lambda *a, **kw: tiny_dls(size=16))
    args = ["train", "--process", process, "--epochs", 1, "--precision", "float32", "--device", "cpu", "--run", tmp_path / "r"]
    assert f"{process}, predicts {UNLESS_TOLD[process]}" in run(*args) and (tmp_path / "r/samples.png").exists()
    assert "already holds a run" in run(*args, code=1) and "step 4 of 4" in run(*args, "--resume")
    assert "describes another model" in run(*args, "--resume", "--predict", "x0", code=1)
    described = run("info", tmp_path / "r")
    assert json.loads(described[: described.rindex("\n}") + 2])["model"]["param"]["name"] == UNLESS_TOLD[process]
