"""The page that a training leaves: of every kind of data, and whatever is missing."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from common import QUICK, command_line, make_folder, tiny_diffusion, tiny_dls

from ddpm_course.loggers import read_log
from ddpm_course.page import page, write_page
from ddpm_course.training import Diffusion

SMALL = ("--img-size", 16, "--batch-size", 16, "--device", "cpu", "--precision", "float32")
SMALL += ("--layout", "channels_first", "--epochs", 2)


def sources(html):  # what a browser would fetch
    return [s for s in re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')>]+)', html)]


def test_a_training_from_the_command_line_ends_with_a_page(tmp_path):
    make_folder(tmp_path, {"icons/<b>cat": 30, "icons/dog & co": 24})
    (tmp_path / "icons/<b>cat/readme.txt").write_text("no image")
    shutil.copy(tmp_path / "icons/<b>cat/000.png", tmp_path / "icons/<b>cat/twin.png")
    run = tmp_path / "my run"
    said = command_line("train", "--data", tmp_path / "icons", *SMALL, "--run", run)
    assert f"{run / 'report.html'}" in said
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;cat" in html and "dog &amp; co" in html and "<b>cat" not in html
    dls = re.search(r"all classes</th><td>(\d+)</td><td>(\d+)</td><td>(\d+)</td>", html)
    assert sum(map(int, dls.groups())) == 54
    assert "removed 1 exact duplicates" in html and "twin.png" in html
    assert "1 .txt" in html  # what was passed over
    assert "nearest to it" in html and "Too few images were held out" in html
    assert f"ddpm_course evaluate &#x27;{run}&#x27;" in html
    assert sources(html) and all(s[0] == "#" or s[:5] == "data:" for s in sources(html))
    how = ("--features", "random", "--split", "all", "--n", 12, "--steps", 2)
    command_line("evaluate", run, *how)
    assert "Not measured yet" not in page(run) and "of two Gaussians" in page(run)


KINDS = dict(points=((2,), "image/png"), sound=((1, 64), "<audio"))
KINDS |= dict(film=((1, 4, 8, 8), "image/gif"))


@pytest.mark.parametrize("kind", KINDS)
def test_other_data_have_a_page_too(kind, tmp_path):
    shape, shown = KINDS[kind]
    data = [torch.rand(8, *shape) * 2 - 1 for _ in range(3)]
    diff = Diffusion(shape=shape, device="cpu")
    diff.fit(data, epochs=2, run=tmp_path / "run", wandb=False, progress=False, **QUICK)
    html = write_page(tmp_path / "run", data, diff).read_text(encoding="utf-8")
    assert "Losses" in html and shown in html
    assert "Neighbours" not in html and "Data</h2>" not in html  # nobody knows these


def test_arrays_and_data_without_labels(tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(90, 2)))
    run = tmp_path / "points"
    command_line("train", "--data", tmp_path / "points.npy", *SMALL[4:], "--run", run)
    assert "Neighbours" not in (run / "report.html").read_text(encoding="utf-8")
    make_folder(tmp_path, {"plain": 30})
    command_line("train", "--data", tmp_path / "plain", *SMALL, "--run", tmp_path / "run")
    html = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    counts = re.search(r"all classes</th><td>(\d+)</td><td>(\d+)</td><td>(\d+)</td>", html)
    assert sum(map(int, counts.groups())) == 30 and "Neighbours" in html
    assert "--label" not in html


def test_an_old_run_has_a_page(tmp_path):
    old = Path(__file__).parent / "old_run" / "run"
    run = shutil.copytree(old, tmp_path / "run")
    html = write_page(run).read_text(encoding="utf-8")
    steps = [line["step"] for line in read_log(run)]
    assert f"{steps[-1] if steps else 0:,} steps" in html and "Next" in html


def test_models_that_copy_are_told(tmp_path):
    dls, diff = tiny_dls(n=60), tiny_diffusion()
    diff.fit(dls, epochs=1, run=tmp_path, wandb=False, progress=False, **QUICK)
    assert "are training images, pixel for pixel" not in page(tmp_path, dls, diff)
    stolen = dls.train.images.float() / 127.5 - 1
    diff.sample = lambda what, **kw: stolen[: len(what)]
    assert "100% of 48 samples are training images, pixel for pixel" in page(tmp_path, dls, diff)


def test_what_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    diff = tiny_diffusion().fit(
        tiny_dls(), epochs=1, run=tmp_path, wandb=False, progress=False, **QUICK
    )

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddpm_course.page.write_atomic", full)
    with pytest.warns(UserWarning, match="report.html was not written: .*No space left"):
        assert write_page(tmp_path, tiny_dls(), diff) is None


def test_damaged_parts_are_left_out(tmp_path):
    tiny_diffusion().fit(tiny_dls(), epochs=2, run=tmp_path, wandb=False, progress=False, **QUICK)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 9')
    (tmp_path / "evaluation.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = page(tmp_path)
    assert "Losses" in html and "Not measured yet" in html


def test_the_whole_page_stays_small(tmp_path):
    dls, diff = tiny_dls(), tiny_diffusion()
    diff.fit(dls, epochs=1, run=tmp_path, wandb=False, progress=False, **QUICK)
    first = next((tmp_path / "images").glob("ema-*"))
    for k in range(100):
        shutil.copy(first, tmp_path / "images" / f"ema-{k + 1000:07}.png")
    html = page(tmp_path, dls, diff)
    assert html.count("<figcaption>step") == 6 and "step 1,099" in html
    assert os.path.getsize(write_page(tmp_path, dls, diff)) < 1_000_000
    assert json.dumps(html)  # text, whatever was in the names
