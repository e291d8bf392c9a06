"""Every process with every prediction and every sampler through the command line: it works, or a
sentence says why not and what to take."""

import json
import warnings

import click
import pytest
import torch
from click.testing import CliRunner
from common import QUICK, tiny_diffusion, tiny_dls
from common import command_line as run
from PIL import Image

import ddpm_course.data
import ddpm_course.evaluation
from ddpm_course import cli
from ddpm_course.cli import main
from ddpm_course.denoiser import PARAMS
from ddpm_course.model import PROCESSES, SAMPLERS, make_process
from ddpm_course.training import Diffusion

PREDICTIONS = [*PARAMS, "edm"]
REFUSED = {(p, "velocity"): "alpha + sigma = 1" for p in PROCESSES if p != "flow"}
REFUSED |= {(p, "v"): "alpha^2 + sigma^2 = 1" for p in PROCESSES if p not in ("ddpm", "vp")}
REFUSED |= {("flow", k): "divides by alpha" for k in ("eps", "score")}
UNLESS_TOLD = dict(
    ddpm="x0", vp="x0", sub_vp="x0", ncsn="edm", ve="edm", edm="edm", flow="velocity"
)
# a score and its SDE are not defined without data
NEED_ALPHA = ("langevin", "euler_maruyama", "predictor_corrector")


@pytest.fixture
def one_step(monkeypatch):
    """Training is one step on two images, drawing gives grey; a list of the models that were
    trained."""
    trained = []

    def fit(self, dls, *args, **kw):
        x, y = next(iter(dls.train))
        self.prepare(dls, total_steps=1, **QUICK)
        loss = self.train_step(x[:2], y[:2]).mean().item()
        assert torch.isfinite(torch.tensor(loss)) and int(self.trainer.diverged) < 0
        self.history.append(dict(loss=loss))
        trained.append(self)

    monkeypatch.setattr(Diffusion, "fit", fit)
    monkeypatch.setattr(
        Diffusion, "sample", lambda self, labels, **kw: torch.zeros(len(labels), *self.shape)
    )
    monkeypatch.setattr(ddpm_course.data, "get_dls", lambda *a, **kw: tiny_dls(size=16))
    return trained


@pytest.mark.parametrize("process", PROCESSES)
def test_every_prediction_is_trained_or_refused_with_a_reason_and_a_way_out(
    process, one_step, tmp_path
):
    for k in PREDICTIONS:
        said = run(
            "train",
            "--process",
            process,
            "--predict",
            k,
            "--device",
            "cpu",
            "--run",
            tmp_path / k,
            code=int((process, k) in REFUSED),
        )
        if (process, k) not in REFUSED:
            assert (
                one_step[-1].config["process"]["name"] == process
                and one_step[-1].config["param"]["name"] == k
                and f"{process}, predicts {k}" in said
            )
            continue
        why, take = said.removeprefix("Error: ").strip().split("; take ")
        assert (
            f"prediction {k} does not go with {process}: " in why
            and REFUSED[process, k] in why
            and said.count("\n") == 1
        )
        assert take.replace(" or ", ", ").split(", ") == [
            o for o in PREDICTIONS if (process, o) not in REFUSED
        ], "the way out goes through"
    assert len(one_step) == sum((process, k) not in REFUSED for k in PREDICTIONS)


def test_refused_before_any_data_is_read(monkeypatch, tmp_path):
    def never(*a, **kw):
        raise AssertionError("data was read")

    monkeypatch.setattr(ddpm_course.data, "get_dls", never)
    for process, k in REFUSED:
        assert f"{k} does not go with {process}" in run(
            "train", "--process", process, "--predict", k, "--run", tmp_path / "r", code=1
        )
    for process in PROCESSES:
        if process != "ddpm":
            assert "--schedule belongs to ddpm" in run(
                "train", "--process", process, "--schedule", "linear", code=1
            )
    assert "Did you mean 'sub_vp'?" in run("train", "--process", "subvp", code=1)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("process", PROCESSES)
def test_what_is_predicted_and_which_schedule_unless_one_says(process, one_step, tmp_path):
    run("train", "--process", process, "--device", "cpu", "--run", tmp_path / "r")
    config = one_step[-1].config
    assert config["param"]["name"] == UNLESS_TOLD[process] and config["process"].get(
        "schedule"
    ) == ("cosine" if process == "ddpm" else None)
    if process == "ddpm":
        run("train", "--schedule", "linear", "--device", "cpu", "--run", tmp_path / "s")
        assert one_step[-1].config["process"] == dict(name="ddpm", T=1000, schedule="linear")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A run folder per process, trained for an epoch of four steps."
    folder, d = tmp_path_factory.mktemp("runs"), tiny_diffusion()
    for name in PROCESSES:
        diff = Diffusion(
            d.model.net, make_process(name), UNLESS_TOLD[name], d.shape, d.num_classes, device="cpu"
        )
        diff.fit(tiny_dls(), epochs=1, run=folder / name, loggers=[], progress=False, **QUICK)
    return folder


@pytest.mark.parametrize("process", PROCESSES)
def test_every_sampler_draws_or_is_refused_with_a_reason_and_a_way_out(
    process, runs, tmp_path, monkeypatch
):
    drawn, draw = [], Diffusion.sample
    monkeypatch.setattr(
        Diffusion, "sample", lambda *a, **kw: drawn.append(draw(*a, **kw)) or drawn[-1]
    )
    for k in SAMPLERS:
        args = [
            "sample",
            "--run",
            runs / process,
            "--sampler",
            k,
            "--steps",
            3,
            "--n",
            2,
            "--device",
            "cpu",
            "--out",
            tmp_path / f"{k}.png",
        ]
        done = CliRunner().invoke(main, [str(a) for a in args])
        if (process, k) not in [("flow", s) for s in NEED_ALPHA]:
            assert done.exit_code == 0, (k, done.output)
            assert (
                "6 images" in done.output
                and (tmp_path / f"{k}.png").exists()
                and drawn[-1].isfinite().all()
                and drawn[-1].std() > 0.1
            ), k
            continue
        assert (
            done.exit_code == 1
            and f"sampler {k} does not go with flow: " in done.output
            and "alpha" in done.output
            and "Traceback" not in done.output
        )
        take = done.output.strip().split("; take ")[1].replace(" or ", ", ").split(", ")
        assert (
            take == [o for o in SAMPLERS if o not in NEED_ALPHA]
            and not (tmp_path / f"{k}.png").exists()
        )


def test_precision_of_the_samples(runs, tmp_path):
    def draw(precision):
        run(
            "sample",
            "--run",
            runs / "ddpm",
            "--steps",
            3,
            "--device",
            "cpu",
            "--precision",
            precision,
            "--out",
            tmp_path / "x.png",
        )
        return (tmp_path / "x.png").read_bytes()

    assert draw("float32") == draw("float32") != draw("bfloat16")
    assert "Did you mean 'bfloat16'?" in run(
        "sample", "--run", runs / "ddpm", "--device", "cpu", "--precision", "bfloat", code=1
    )


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_trained_for_real_resumed_and_told(process, monkeypatch, tmp_path):
    "Without the short cuts above: one epoch, a picture, --resume, info."
    monkeypatch.setattr(ddpm_course.data, "get_dls", lambda *a, **kw: tiny_dls(size=16))
    args = [
        "train",
        "--process",
        process,
        "--epochs",
        1,
        "--precision",
        "float32",
        "--device",
        "cpu",
        "--run",
        tmp_path / "r",
    ]
    assert (
        f"{process}, predicts {UNLESS_TOLD[process]}" in run(*args)
        and (tmp_path / "r/samples.png").exists()
    )
    assert "already holds a run" in run(*args, code=1) and "step 4 of 4" in run(*args, "--resume")
    said = run(*args, "--resume", "--predict", "x0", code=1)
    assert "was started with --predict None, and x0 is asked for now" in said
    little = run("train", "--run", tmp_path / "r", "--resume")  # nothing need be repeated
    assert f"{process}, predicts" in little and "step 4 of 4" in little
    described = run("info", tmp_path / "r")
    assert (
        json.loads(described[: described.rindex("\n}") + 2])["model"]["param"]["name"]
        == UNLESS_TOLD[process]
    )


def test_what_the_clock_chooses_is_written_down(monkeypatch, tmp_path):
    "With --minutes: Muon and times from the middle, unless told; with --epochs neither."
    monkeypatch.setattr(ddpm_course.data, "get_dls", lambda *a, **kw: tiny_dls(size=16))

    def chosen(name, *args):
        quick = ["--precision", "float32", "--layout", "channels_first", "--device", "cpu"]
        run("train", *args, *quick, "--run", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        times = config["model"].get("times")
        return config["training"]["optimizer"], times and times["name"]

    brief = ["--minutes", 0.01]
    assert chosen("a", *brief) == ("muon", "logit_normal")
    assert chosen("b", *brief, "--times", "uniform") == ("muon", "uniform")
    assert chosen("c", *brief, "--process", "edm", "--optimizer", "adamw") == ("adamw", None)
    assert chosen("d", "--epochs", 1) == ("adamw", None)
    said = run("train", "--run", tmp_path / "d", "--extend", *brief)  # as it was
    assert "is extended" in said and chosen("d", "--extend", *brief) == ("adamw", None)


# ---- folders
def pictures(folder, n=120, mode="RGB", classes=("",), size=8):
    "Random pixels; mode 'grey' is grey, stored as colour."
    g = torch.Generator().manual_seed(0)
    for i in range(n):
        at = folder / classes[i % len(classes)]
        at.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (size, size, 3), generator=g, dtype=torch.uint8)
        im = Image.fromarray(pixels.numpy())
        (im.convert("L").convert("RGB") if mode == "grey" else im.convert(mode)).save(
            at / f"{i}.png"
        )
    return folder


@pytest.mark.parametrize(
    "data, args",
    [
        (".", []),
        ("{}", ["--run", "{}"]),
        ("../flat", ["--run", "a/b"]),
        ("{}", ["--run", "../link/r"]),
    ],
)
def test_a_run_does_not_go_into_its_own_data(data, args, monkeypatch, tmp_path):
    flat = pictures(tmp_path / "flat", 3)
    (tmp_path / "link").symlink_to(flat)
    monkeypatch.chdir(flat)
    monkeypatch.setattr(ddpm_course.data, "get_dls", lambda *a, **kw: pytest.fail("data was read"))
    said = run("train", "--data", *(str(a).format(flat) for a in [data, *args]), code=1)
    assert (
        "lies in the data folder" in said
        and "give a --run outside of it" in said
        and said.count("\n") == 1
    )
    assert sorted(p.name for p in flat.rglob("*")) == ["0.png", "1.png", "2.png"]


def test_a_run_beside_its_data_or_around_it_is_fine(one_step, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "flat", 3)
    for place in ("flat2", "."):
        run("train", "--data", "flat", "--run", place, "--device", "cpu")
    run("train", "--data", "digits", "--run", "digits/r", "--device", "cpu")
    assert len(one_step) == 3


@pytest.mark.parametrize(
    "command", ["sample --run no", "evaluate no --against digits", "train --run no"]
)
def test_numbers_that_no_generator_and_no_guidance_takes(command):
    for seed in (99999999999999999999999, -1, 2**32):
        assert f"'--seed': {seed} is not in the range" in run(
            *command.split(), "--seed", seed, code=2
        )
    if "train" in command:
        return
    for g in ("nan", "inf", "-inf"):
        assert f"'--guidance': take a finite number, such as 2, not {g}" in run(
            *command.split(), "--guidance", g, code=2
        )
    # as far as the run that is not there
    assert "no" in run(*command.split(), "--guidance", -1, "--seed", 2**32 - 1, code=1)


@pytest.mark.parametrize("option", ["--epochs", "--minutes"])
@pytest.mark.parametrize("length", ["inf", "nan", "-1"])
def test_lengths_that_do_not_end_or_begin(option, length, monkeypatch, tmp_path):
    monkeypatch.setattr(ddpm_course.data, "get_dls", lambda *a, **kw: tiny_dls(size=16))
    errors = [
        line
        for line in run(
            "train", option, length, "--device", "cpu", "--run", tmp_path / "r", code=1
        ).splitlines()
        if line.startswith("Error")
    ]
    assert (
        len(errors) == 1
        and option[2:] in errors[0]
        and length in errors[0]
        and not (tmp_path / "r").exists()
    )


LABELS = [
    (("1", "2", "3"), {"1": 0, "3": 2}, ["0", "c1"], True),
    (("10", "cat", "dog"), {"10": 0, "dog": 2}, ["0", "1", "2"], True),
    (("ant", "cat", "dog"), {"1": 1, "cat": 1}, ["3"], False),
    (("0", "1", "2"), {"1": 1}, ["3"], False),
]


@pytest.mark.parametrize("classes, known, unknown, told", LABELS)
def test_a_label_means_one_class(classes, known, unknown, told, monkeypatch, tmp_path):
    drawn = []
    tiny_diffusion(classes=classes).fit(
        tiny_dls(), epochs=1, run=tmp_path / "r", loggers=[], progress=False, **QUICK
    )
    monkeypatch.setattr(
        Diffusion,
        "sample",
        lambda self, labels, **kw: drawn.append(labels) or torch.zeros(len(labels), *self.shape),
    )
    for name, k in known.items():
        run("sample", "--run", tmp_path / "r", "--label", name, "--n", 1, "--device", "cpu")
        assert drawn.pop() == [k]
    for name in unknown:
        said = run("sample", "--run", tmp_path / "r", "--label", name, "--device", "cpu", code=1)
        assert (
            f"{name!r}: choose one of" in said
            and ("by name only, as a name is a number itself" in said) == told
        )
    assert "by name only" in " ".join(run("sample", "--help").split())


OUT = {
    "two.py/x.png": "two.py is a file, not a folder",
    "two.py/a/x.png": "two.py is a file, not a folder",
    "some.png": "is a folder: name one in it, such as",
    "/proc/x.png": "name a file in another folder",
    "x" * 300 + "/x.png": "too long): name a file",
}


@pytest.mark.parametrize("command", ["sample --run", "evaluate --against digits"])
@pytest.mark.parametrize("out", OUT)
def test_where_nothing_can_be_written_is_said_before_the_work(
    command, out, runs, monkeypatch, tmp_path
):
    (tmp_path / "two.py").write_text("")
    (tmp_path / "some.png").mkdir()
    monkeypatch.setattr(Diffusion, "sample", lambda *a, **kw: pytest.fail("drawn for nothing"))
    said = run(*command.split(), runs / "ddpm", "--out", tmp_path / out, "--device", "cpu", code=1)
    assert (
        said.startswith("Error: --out")
        and OUT[out] in said
        and "Errno" not in said
        and said.count("\n") == 1
    )


# ---- what evaluate and train say
def compare(*args, out, features="pixels"):
    return run(
        "evaluate",
        *args,
        "--img-size",
        8,
        "--features",
        features,
        "--steps",
        2,
        "--device",
        "cpu",
        "--out",
        out / "e.json",
    )


def test_colour_is_not_dropped_in_silence(runs, tmp_path):
    colour, stored, grey = (pictures(tmp_path / m, mode=m) for m in ("RGB", "grey", "L"))
    assert f"warning: {colour} is in colour, and L is grey: the colour is dropped" in compare(
        colour, "--against", grey, out=tmp_path
    )
    assert "warning: RGB is in colour, and the model is grey: the colour is dropped" in compare(
        runs / "ddpm", "--against", colour, "--n", 6, out=tmp_path
    )
    said = (
        compare(stored, "--against", grey, out=tmp_path)
        + compare(grey, "--against", colour, out=tmp_path)
        + compare(runs / "ddpm", "--against", stored, "--n", 6, out=tmp_path)
    )
    assert "the colour is dropped" not in said
    assert json.loads((tmp_path / "e.json").read_text())["numbers"]["n"] == 6


def test_a_floor_of_images_that_the_classifier_may_have_seen_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(
        cli, "_judge", lambda *a: ddpm_course.evaluation.Classifier((1, 8, 8), 3).eval()
    )
    data = pictures(tmp_path / "data", mode="L", classes="abc")
    k = len(ddpm_course.data.get_dls(data, img_size=8).valid.labels)

    def said(n, features):
        return compare(data, "--against", data, "--n", n, out=tmp_path, features=features)

    told = (
        "warning: the real column is of the training split, which the classifier may have seen, as"
        f" the validation split holds only {k} images"
    )
    assert told in said(k + 1, "classifier")
    for n, features in ((k, "classifier"), (k + 1, "pixels")):
        assert "training split" not in said(n, features)


def test_a_size_is_named_only_where_it_helps(capsys, monkeypatch):
    def only_trained(dls, device, train=True):
        return "a judge" if train else None

    monkeypatch.setattr(ddpm_course.evaluation, "classifier_for", only_trained)
    for channels, folder, told in ((1, True, True), (1, False, False), (3, True, False)):
        assert (
            cli._judge(
                ddpm_course.data.get_dls("digits", img_size=8, channels=channels), "cpu", folder
            )
            == "a judge"
        )
        said = capsys.readouterr().err
        assert (
            f"no classifier ships for digits of {channels}x8x8" in said
            and ("--img-size 16" in said) == told
        )


def test_no_judge_is_trained_that_nobody_asks(monkeypatch, tmp_path):
    tiny_diffusion(num_classes=0).fit(
        tiny_dls(num_classes=0), epochs=1, run=tmp_path / "r", loggers=[], progress=False, **QUICK
    )
    data, plain = pictures(tmp_path / "data", classes="abc", mode="L"), pictures(
        tmp_path / "plain", mode="L"
    )
    asked, judge = [], ddpm_course.evaluation.Classifier((1, 8, 8), 3).eval()
    monkeypatch.setattr(cli, "_judge", lambda *a: asked.append(a) or judge)
    for what in (plain, tmp_path / "r"):
        assert (
            "label_accuracy" not in compare(what, "--against", data, "--n", 10, out=tmp_path)
            and not asked
        )
    assert "label_accuracy" in compare(data, "--against", data, "--n", 10, out=tmp_path) and asked
    compare(plain, "--against", data, "--n", 10, out=tmp_path, features="classifier")
    assert len(asked) == 2, "its features are the eyes"


def test_a_warning_is_one_line_and_comes_once(tmp_path):
    data = pictures(tmp_path / "data", mode="L")
    (data / "0.png").write_bytes(b"no picture")
    said = compare(data, "--against", data, "--n", 10, out=tmp_path)
    assert (
        said.count("skipped 1 of 120 images") == said.count("warning: skipped 1 of 120 images") == 1
        and "UserWarning" not in said
        and "warn(" not in said
    )

    def twice():
        warnings.warn("look out", stacklevel=1)
        warnings.warn("look out", stacklevel=1)  # another line: Python would show it again

    shown = warnings.showwarning
    assert (
        CliRunner()
        .invoke(
            cli.Sentences(commands=dict(twice=click.Command("twice", callback=twice))), ["twice"]
        )
        .output
        == "warning: look out\n"
    )
    assert warnings.showwarning is shown


def test_how_many_images_are_trained_on_and_when_a_run_is_new(one_step, tmp_path):
    said = run("train", "--resume", "--device", "cpu", "--run", tmp_path / "r")
    assert (
        "tiny: 64 training images, 24 to validate, 24 to test, 1x16x16, 3 classes" in said
        and "r holds no run to go on with: a new one begins" in said
    )
    (tmp_path / "r/checkpoints/step-000000004").mkdir(parents=True)
    for args in (["--run", tmp_path / "r", "--resume"], ["--run", tmp_path / "s"]):
        assert "a new one begins" not in run("train", "--device", "cpu", *args)
    said = " ".join(run("train", "--help").split())
    assert (
        "with the --minutes, --epochs and --lr it started with; a new run where there is none"
        in said
    )
