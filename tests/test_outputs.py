"""What `sample`, `morph` and `evaluate` take and give, and runs that go on: from the command
line, as a user would."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from common import command_line, make_folder, picture
from PIL import Image

from ddpm_course import cli
from ddpm_course.checkpoint import read_json
from ddpm_course.runs import DataChanged
from ddpm_course.training import Diffusion, load_pretrained

SMALL = ("--img-size", 16, "--batch-size", 16, "--device", "cpu", "--precision", "float32")
SMALL += ("--layout", "channels_first")


def clear(i, size=24):  # a drawn shape on nothing
    pixels = np.asarray(picture(i, size))
    alpha = 255 * (pixels != pixels[0, 0]).any(2, keepdims=True)
    return Image.fromarray(np.concatenate([pixels, alpha.astype(np.uint8)], 2))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder of icons with alpha, icons/, and a run of one pass over it, runs/icons."
    root = tmp_path_factory.mktemp("outputs")
    for k, name in enumerate(("cat", "dog")):
        (root / "icons" / name).mkdir(parents=True)
        for i in range(30):
            clear(100 * k + i).save(root / "icons" / name / f"{i}.png")
    train = ("train", "--data", root / "icons", "--background", "keep", *SMALL)
    command_line(*train, "--epochs", 1, "--run", root / "runs/icons")
    return root


def sample(home, *args):
    return command_line("sample", "--run", home / "runs/icons", "--steps", 4, *args)


# ------------------------------------------------------------------ samples


def test_films_of_the_denoising(home, tmp_path):
    sample(home, "--n", 2, "--out", tmp_path / "a.gif")
    assert Image.open(tmp_path / "a.gif").n_frames == 4
    sample(home, "--n", 2, "--out", tmp_path / "b.gif", "--stages", 2, "--noisy")
    film = Image.open(tmp_path / "b.gif")
    assert film.n_frames == 2
    first, last = (film.seek(k) or np.asarray(film.convert("RGB")).astype(float) for k in (0, 1))
    assert first[:, 60:].std() > last[:, 60:].std()  # noise, and what is left of it
    av = pytest.importorskip("av")
    sample(home, "--n", 2, "--out", tmp_path / "c.mp4")
    with av.open(tmp_path / "c.mp4") as video:
        assert len(list(video.decode(video=0))) > 4  # the last one stands


def test_without_pyav_a_sentence_says_how_to_get_it(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    said = command_line(
        *("sample", "--run", home / "runs/icons", "--n", 1, "--out", tmp_path / "a.mp4"), code=1
    )
    assert "pip install 'ddpm_course[video]'" in said


def test_stages_are_columns_of_a_sheet(home, tmp_path):
    sample(home, "--n", 2, "--label", "cat", "--out", tmp_path / "a.png", "--stages", 3)
    sample(home, "--n", 2, "--label", "cat", "--out", tmp_path / "b.png")
    (wide, tall), (_, once) = (Image.open(tmp_path / f"{k}.png").size for k in "ab")
    assert wide >= 3 * 34 and tall == 2 * 34 + 2 and once == 34 + 2


def test_numbers_can_be_trained_on(home, tmp_path):
    sample(home, "--n", 6, "--out", tmp_path / "a.npz")
    arrays = np.load(tmp_path / "a.npz")
    assert arrays["x"].shape == (12, 4, 16, 16) and arrays["x"].dtype == np.uint8
    assert arrays["y"].tolist() == [0] * 6 + [1] * 6
    said = command_line(
        *("train", "--data", tmp_path / "a.npz", *SMALL[2:], "--epochs", 1),
        *("--run", tmp_path / "run"),
    )
    assert "4x16x16, 2 classes" in said


def test_a_set_is_drawn_in_parts(home, tmp_path):
    for name, *how in (("all", "--n", 3), ("rest", "--n", 2, "--seed-from", 1)):
        sample(home, "--label", "dog", *how, "--out", f"{tmp_path}/{name}/")
    rows = read_json(tmp_path / "rest/manifest.json")["samples"]
    assert [row["number"] for row in rows] == [1, 2] and rows[0]["label"] == "dog"
    for name in ("00001.png", "00002.png"):
        pixels = [np.asarray(Image.open(tmp_path / k / name)) for k in ("all", "rest")]
        assert pixels[0].shape == (16, 16, 4)  # no frame, and with its transparency
        assert abs(pixels[0].astype(int) - pixels[1]).max() <= 1


def test_noise_of_ones_own(home, tmp_path):
    noise = np.random.default_rng(0).normal(size=(2, 4, 16, 16)).astype("float32")
    np.save(tmp_path / "noise.npy", noise)
    sample(home, "--start", tmp_path / "noise.npy", "--out", tmp_path / "a.npz")
    drawn = np.load(tmp_path / "a.npz")["x"]
    assert len(drawn) == 4  # both for each label
    model = Diffusion.load(home / "runs/icons", "cpu")
    again = model.sample(
        [0, 0], start=torch.from_numpy(noise), n_steps=4, cfg_scale=2.0, seed=0
    )
    assert torch.equal(torch.from_numpy(drawn[:2]), model.space.from_x(again))
    np.save(tmp_path / "noise.npy", noise[:, :3])
    said = command_line(
        "sample", "--run", home / "runs/icons", "--start", tmp_path / "noise.npy", code=1
    )
    assert "noise of this model is float32 of shape (N, 4, 16, 16)" in said


def test_models_that_ship_are_sampled_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "samples.png" in command_line("sample", "--run", "digits", "--n", 1, "--steps", 2)
    assert Image.open("samples.png").size[1] > 10 * 34
    assert "Did you mean 'digits'" in command_line("sample", "--run", "digit", code=1)


# ------------------------------------------------------------------ from one to another


def test_morphs_go_there_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how = ("morph", "--run", "digits", "--steps", 5, "--frames", 4)
    command_line(*how, "--label", 3, "--to-label", 8)
    film = Image.open("morph.gif")
    assert film.n_frames == 6
    frames = [film.seek(k) or np.asarray(film.convert("L")) for k in range(6)]
    assert (frames[1] == frames[5]).all() and (frames[0] != frames[3]).any()
    command_line(*how, "--label", 3, "--from", 7, "--to", 7, "--out", "same.npz")
    x = np.load("same.npz")["x"].astype(int)
    assert abs(x - x[:1]).max() <= 1
    command_line(*how, "--out", "each/")
    assert len(read_json("each/manifest.json")["samples"]) == 4


def test_a_picture_comes_back_from_its_noise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = load_pretrained("digits", "cpu")
    seven = digits.space.from_x(digits.sample([7], n_steps=20, seed=3, cfg_scale=2.0))[0, 0]
    Image.fromarray(seven.numpy()).save("seven.png")
    how = ("morph", "--run", "digits", "--label", 7, "--frames", 3, "--steps", 20)
    command_line(*how, "--from", "seven.png", "--to", 5, "--out", "a.npz")
    x = np.load("a.npz")["x"].astype(float)
    assert abs(x[0, 0] - seven.numpy()).mean() < 8 < abs(x[2, 0] - seven.numpy()).mean()


@pytest.mark.parametrize(
    "wrong, words",
    [
        (("--from", "nothing.png"), "neither a seed nor a file"),
        (("--frames", 1), "at least 2 frames"),
        (("--label", "eleven"), "unknown label 'eleven'"),
        (("--out", "a.tiff"), "ends in none of"),
    ],
)
def test_morphs_that_make_no_sense(wrong, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in command_line("morph", "--run", "digits", "--steps", 2, *wrong, code=1)


# ------------------------------------------------------------------ numbers


def test_a_run_is_compared_with_its_own_data_as_it_saw_them(home):
    said = command_line(
        *("evaluate", home / "runs/icons", "--features", "random", "--n", 20, "--steps", 2)
    )
    assert "reference: the test split of icons" in said
    assert "no label accuracy: no classifier is at hand" in said
    facts = read_json(home / "runs/icons/evaluation.json")
    assert facts["against"] == str(home / "icons") and facts["split"] == "test"
    assert "label_accuracy" not in facts["numbers"]


def test_all_images_can_be_the_reference(home, tmp_path):
    said = command_line(
        *("evaluate", home / "runs/icons", "--features", "random", "--n", 20, "--steps", 2),
        *("--split", "all", "--out", tmp_path / "e.json"),
    )
    assert "reference: all splits of icons, 60 of its 60 images" in said
    numbers = read_json(tmp_path / "e.json")
    assert numbers["numbers"]["n_reference"] == 60
    # the real images of the other column are not among those they are compared with
    assert numbers["real"]["n_reference"] == 60 - numbers["real"]["n"]


def test_nobody_trains_a_classifier_that_nobody_needs(home, tmp_path, monkeypatch):
    def never(*args, **kw):
        raise AssertionError("a classifier was trained")

    monkeypatch.setattr("ddpm_course.judge.train_classifier", never)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    how = ("evaluate", home / "runs/icons", "--n", 10, "--steps", 2, "--out", tmp_path / "e.json")
    command_line(*how, "--features", "random")

    def nothing(device=None):
        raise OSError("the weights of Inception v3 could not be fetched")

    monkeypatch.setattr("ddpm_course.features.inception_features", nothing)
    said = command_line(*how, "--features", "inception", code=1)
    assert "could not be fetched" in said  # before anything was drawn or trained


def test_what_was_written_one_by_one_is_judged_by_its_manifest(tmp_path):
    command_line("sample", "--run", "digits", "--n", 4, "--steps", 8, "--out", f"{tmp_path}/d/")
    command_line("evaluate", tmp_path / "d", "--against", "digits", "--img-size", 16, "--out",
                 tmp_path / "e.json")  # fmt: skip
    numbers = read_json(tmp_path / "e.json")["numbers"]
    assert numbers["n"] == 40 and numbers["label_accuracy"] > 0.7


def test_without_data_to_compare_with_a_sentence_says_so(tmp_path):
    (tmp_path / "d").mkdir()
    assert "--against, and the data" in command_line("evaluate", tmp_path / "d", code=1)


# ------------------------------------------------------------------ runs that go on


def test_a_run_of_measured_precision_is_made_longer(home, tmp_path):
    run = tmp_path / "run"
    data = ("--data", home / "icons", "--img-size", 16, "--device", "cpu")
    command_line("train", *data, "--epochs", 1, "--run", run)
    said = command_line("train", "--run", run, "--extend", "--epochs", 1)
    assert "is extended from step" in said
    kept = read_json(run / "config.json")["training"]
    assert kept["precision"] != "auto" and kept["channels_last"] is not None


def test_moved_and_changed_data(tmp_path):
    make_folder(tmp_path, {"icons/a": 20, "icons/b": 20})
    run = tmp_path / "run"
    command_line("train", "--data", tmp_path / "icons", *SMALL, "--epochs", 1, "--run", run)
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "icons", tmp_path / "there/icons")
    said = command_line("train", "--run", run, "--extend", "--epochs", 1, code=1)
    assert "are not there: where they have been moved, say --data" in said
    moved = ("train", "--run", run, "--data", tmp_path / "there/icons", "--extend", "--epochs", 1)
    assert "is extended from step" in command_line(*moved)
    make_folder(tmp_path, {"there/icons/a": 60}, start=5000)
    assert "--data-changed) goes on with these" in command_line(*moved, code=1)
    command_line(*moved, "--data-changed")
    config = read_json(run / "config.json")
    assert config["history"][-1]["data_changed"] is True
    assert config["data"]["batches"] > 3  # those of the new data


def test_who_sits_before_a_terminal_is_asked(monkeypatch):
    calls = []

    class Asked:
        def fit(self, dls, epochs, minutes, data_changed, **how):
            calls.append(data_changed)
            if not data_changed:
                raise DataChanged("other data")

    with pytest.raises(DataChanged):
        cli._fit(Asked(), None, 1, None, False)  # nobody can answer
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(cli.click, "confirm", lambda text, abort: calls.append(text))
    cli._fit(Asked(), None, 1, None, False)
    assert calls == [False, False, "other data\nGo on with these?", True]


def test_deterministic_trainings_are_the_same_bit_for_bit(home, tmp_path):
    data = ("--data", home / "icons", "--img-size", 16, "--device", "cpu", "--deterministic")
    for k in (1, 2):
        command_line("train", *data, "--epochs", 2, "--run", tmp_path / f"run{k}")
    one, two = (Diffusion.load(tmp_path / f"run{k}", "cpu").model.state_dict() for k in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    kept = read_json(tmp_path / "run1/config.json")["training"]
    assert (kept["precision"], kept["channels_last"]) == ("float32", False)
    assert kept["threads"] == torch.get_num_threads()
    assert not torch.are_deterministic_algorithms_enabled()  # as before
    said = command_line("train", *data, "--minutes", 1, "--run", tmp_path / "run3", code=1)
    assert "a deterministic training takes epochs" in said


# ------------------------------------------------------------------ data that are said


def test_classes_without_images_and_images_in_two_classes_are_said(tmp_path):
    make_folder(tmp_path, {"a": 12, "b": 12})
    (tmp_path / "c").mkdir()
    for i in range(3):
        shutil.copy(tmp_path / f"b/{i:03}.png", tmp_path / f"c/{i:03}.png")
    run = ("--run", tmp_path.parent / f"{tmp_path.name}-run")
    said = command_line("train", "--data", tmp_path, *SMALL, "--epochs", 1, *run)
    assert "3 of them lay in another class too" in said
    assert "no image to train on in c (others have the same images)" in said


def test_pictures_of_a_training_have_names(home):
    log = [json.loads(line) for line in (home / "runs/icons/log.jsonl").open()]
    (name,) = [line["ema"] for line in log if "ema" in line]
    wide, tall = Image.open(home / "runs/icons" / name).size
    assert tall == 2 + 32 + 13 + 2  # a row of pictures, and their names beneath
    assert Image.open(home / "runs/icons/samples.png").size[0] > 8 * 34 + 2  # names of rows
