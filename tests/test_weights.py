"""tools/weights.py: what the manifest says of weights is what made them."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddpm_course.pretrained as pretrained
from ddpm_course.checkpoint import write_json
from ddpm_course.pretrained import manifest, weights_folder, write_pretrained

ROOT = Path(__file__).resolve().parent.parent


def loaded():
    spec = importlib.util.spec_from_file_location("weights", ROOT / "tools" / "weights.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The tool, with a recipe of seconds; all that it writes goes to a folder of its own, where the
    judge of the digits lies already."""
    tool, judge, shelf = (
        loaded(),
        weights_folder() / "classifier-digits.safetensors",
        tmp_path / "shelf",
    )
    shelf.mkdir()
    shutil.copy(judge, shelf)
    write_json(shelf / "manifest.json", {judge.stem: manifest()[judge.stem]})
    for module in (tool, pretrained):
        monkeypatch.setattr(module, "weights_folder", lambda: shelf)
    tool.commit, tool.RUNS, tool.EPOCHS, tool.SAMPLES, tool.STEPS = (
        (lambda *code: "abc"),
        tmp_path / "runs",
        dict(digits=0.05),
        20,
        2,
    )
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield tool
    sys.modules.pop("quality", None)


@pytest.mark.parametrize(
    "names, commit, says",
    [
        ("mnits", "abc", "Did you mean 'mnist'?"),
        ("digits lessons", "abc", "unknown model 'lessons'"),
        ("digits", "abc+", "differs from its commit abc:"),
        ("lessons", "abc+", "differs from its commit abc:"),
    ],
)
def test_what_cannot_be_made_is_told_before_anything_is_trained(
    weights, capsys, names, commit, says
):
    weights.commit, weights.diffusion, weights.lessons = (lambda *code: commit), *[
        lambda *a: pytest.fail("began")
    ] * 2
    with pytest.raises(SystemExit) as e:
        weights.main(names.split())
    assert e.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_the_commit_has_a_plus_where_code_differs_and_nowhere_else(tmp_path):
    tool = loaded()

    def commit():
        return tool.commit(*tool.CODE, root=tmp_path)

    code, text = tmp_path / "ddpm_course/core.py", tmp_path / "ddpm_course/weights/manifest.json"
    text.parent.mkdir(parents=True)
    for path in (code, text):
        path.write_text("1\n")
    for args in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", *args.split()], cwd=tmp_path, check=True)
    clean = commit()
    text.write_text("2\n")  # what the tool itself writes
    assert len(clean) == 12 and commit() == clean
    code.write_text("2\n")
    assert commit() == clean + "+"


def test_the_manifest_says_what_the_code_was_when_training_began(weights):
    commits = iter(["before+", "after"])
    weights.commit = lambda *code: next(commits)
    weights.diffusion = lambda data, at: (
        dict(w=torch.zeros(1)),
        dict(net={}),
        weights.facts(data, at, {}),
    )
    weights.main(["digits", "--dirty"])
    assert manifest()["digits"]["commit"] == "before+"


@pytest.mark.filterwarnings("ignore:20 samples")
def test_weights_are_trained_by_the_recipe_and_anew_each_time(weights, monkeypatch):
    """Precision and layout as the recipe says, whatever is fast here; what another recipe or commit
    began does not go on as this one."""
    seen, fit = [], weights.Diffusion.fit
    monkeypatch.setattr(
        weights.Diffusion,
        "fit",
        lambda self, *a, run, **kw: seen.append(run.exists())
        or fit(self, *a, run=run, loggers=[], progress=False, **kw),
    )
    # nothing is timed
    monkeypatch.setattr("ddpm_course.training.fastest", lambda settings, *_: settings)
    weights.main(["digits"])
    first = manifest()["digits"]
    assert (
        first["precision"],
        first["channels_last"],
        first["total_steps"],
        first["metrics"]["steps"],
    ) == ("bfloat16", False, 2, 2)
    assert not list(
        weights.RUNS.glob("*")
    ), "what is done does not stand in the way of the next training"
    weights.main(["digits"])
    assert manifest()["digits"]["sha256"] == first["sha256"] and seen == [
        False,
        False,
    ], "the same recipe and commit: the same weights"
    folders = [weights.run_folder("digits", at) for at in ("abc", "def")]
    weights.EPOCHS = dict(digits=0.1)
    assert len({*folders, weights.run_folder("digits", "abc")}) == 3
    weights.main(["digits"])
    assert (
        manifest()["digits"]["total_steps"] == 4
        and manifest()["digits"]["sha256"] != first["sha256"]
    )


@pytest.mark.filterwarnings("ignore:20 samples")
def test_the_floor_is_that_of_the_benchmarks(weights, monkeypatch):
    import quality

    monkeypatch.setattr(
        quality.Quality, "floor", lambda self, n: dict(classifier=123.0 + n, random=0.0)
    )
    weights.main(["digits"])
    assert manifest()["digits"]["metrics"]["fid_of_real_images"] == 143


@pytest.mark.filterwarnings("ignore:20 samples")
def test_a_model_is_measured_anew_and_its_weights_stay(weights, monkeypatch, capsys):
    import quality

    weights.main(["digits"])
    before, weights.commit = manifest()["digits"], lambda *code: "def"
    monkeypatch.setattr(
        quality.Quality, "floor", lambda self, n: dict(classifier=123.0 + n, random=0.0)
    )
    monkeypatch.setattr(weights, "write_pretrained", lambda *a, **kw: pytest.fail("trained"))
    weights.main(["digits", "--measure"])
    after = manifest()["digits"]
    assert after["metrics"]["fid_of_real_images"] == 143 and after["measured"]["commit"] == "def"
    # half precision, now
    assert after["metrics"]["fid"] == pytest.approx(before["metrics"]["fid"], rel=0.05)
    changed = {k for k in after if after[k] != before.get(k)}
    assert changed == {"metrics", "measured"} and {
        k for k, v in after["metrics"].items() if v != before["metrics"][k]
    } <= {"fid", "fid_of_real_images", "label_accuracy"}
    for wrong in ("classifier-digits", "lessons"):
        with pytest.raises(SystemExit):
            weights.main([wrong, "--measure"])
        assert "--measure is for digits, shapes, mnist" in capsys.readouterr().err


def test_lessons_are_taken_with_their_own_seed_and_without_a_time(weights, tmp_path):
    write_pretrained(
        "09b-base-seed-2", dict(w=torch.zeros(1)), dict(net={}, seed=2), tmp_path / "kept"
    )
    weights.lessons(tmp_path / "kept", tmp_path / "lessons", "abc")
    entry = manifest(tmp_path / "lessons")["09b-base-seed-2"]
    assert (
        entry["seed"] == 2
        and entry["commit"] == "abc"
        and entry["command"] == "make outputs NB='nbs/09b_*.ipynb'"
        and "seconds" not in entry
    )


def test_the_manifests_that_ship_state_the_seed_of_their_model():
    for folder in (None, weights_folder() / "lessons"):
        for name, entry in manifest(folder).items():
            assert (
                entry["metrics"].get("fid_of_real_images") is None
                or "measured" in entry
                or "+" not in entry["commit"]
            ), name
            assert (
                entry["seed"] == entry["config"].get("seed", 0)
                and entry.get("seconds", 1) is not None
            ), name
