"""Two jobs from beginning to end, at small size: icons with alpha in subfolders, and photographs
of one thing. What a person does with them is done from the command line."""

import math

import numpy as np
import pytest
import torch
from common import command_line
from PIL import Image, ImageDraw, ImageFont

from ddpm_course.checkpoint import read_json
from ddpm_course.data import get_dls
from ddpm_course.export import load_onnx
from ddpm_course.features import pixel_features
from ddpm_course.training import Diffusion

EMOJI = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"  # fonts-noto-color-emoji
FACES = [*range(0x1F600, 0x1F645)]
HEARTS = [0x2764, *range(0x1F493, 0x1F49F), 0x1F90D, 0x1F90E, 0x1F9E1]
LEAVES = [*range(0x1F330, 0x1F344), *range(0x1F337, 0x1F343), 0x1F96C, 0x1F966]
MOONS = [*range(0x1F311, 0x1F31E)]


def emoji(root):
    "Icons of a font: 136 x 128 pixels, most of them clear."
    font = ImageFont.truetype(EMOJI, 109)
    for name, codes in dict(faces=FACES, hearts=HEARTS, leaves=LEAVES, moons=MOONS).items():
        (root / name).mkdir(parents=True)
        for code in sorted({*codes}):
            image = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
            ImageDraw.Draw(image).text((0, 0), chr(code), font=font, embedded_color=True)
            if image.getbbox():
                image.save(root / name / f"{code:x}.png")
    return root


def outline(name, turn):  # corners in [-1, 1]
    if name == "moons":
        angles = np.linspace(0, 2 * math.pi, 24)
        return [(math.cos(a), math.sin(a)) for a in angles]
    if name == "hearts":
        angles = np.linspace(0, 2 * math.pi, 40)
        wide = [math.sin(a) ** 3 for a in angles]
        high = [(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a)) / 17 for a in angles]
        return [(x, -y) for x, y in zip(wide, high)]
    steps = 10 if name == "faces" else 3
    far = [1.0 if k % 2 == 0 or steps == 3 else 0.45 for k in range(steps)]
    return [
        (r * math.cos(2 * math.pi * k / steps + turn), r * math.sin(2 * math.pi * k / steps + turn))
        for k, r in enumerate(far)
    ]


def drawn(root):
    "Where that font is not installed: stars, hearts, triangles and discs, with soft edges."
    colours = dict(faces=(250, 200, 40), hearts=(220, 40, 70), leaves=(60, 160, 70))
    g = np.random.default_rng(0)
    for name in ("faces", "hearts", "leaves", "moons"):
        (root / name).mkdir(parents=True)
        for i in range(30):
            image = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
            size, (x, y) = g.uniform(35, 55), g.uniform(56, 76, 2)
            corners = [(x + size * a, y + size * b) for a, b in outline(name, g.uniform(0, 1))]
            fill = np.clip(colours.get(name, (120, 130, 170)) + g.normal(0, 12, 3), 0, 255)
            ImageDraw.Draw(image).polygon(corners, fill=(*fill.astype(int).tolist(), 255))
            image.resize((68, 64)).save(root / name / f"{i}.png")
    return root


SMALL = ("--img-size", 16, "--batch-size", 16, "--device", "cpu", "--precision", "float32")
SMALL += ("--layout", "channels_first")


@pytest.fixture(scope="module")
def icons(tmp_path_factory):
    "The folder, the run, and what the training said."
    home = tmp_path_factory.mktemp("icons")
    make = drawn
    try:
        ImageFont.truetype(EMOJI, 109)
        make = emoji
    except OSError:
        print("fonts-noto-color-emoji is not installed: drawn icons")
    data, run = make(home / "icons"), home / "run"
    said = command_line(
        *("train", "--data", data, "--background", "keep", *SMALL),
        *("--epochs", 60, "--flip", "--run", run),
    )
    return data, run, said


def means(images):  # (N,4,H,W) bytes -> what a glance sees: colours in 4 x 4 squares
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def read_as_asked(data, images, labels):
    "Share of the images whose nearest five training images are mostly of that class."
    dls = get_dls(data, 16, background="keep")
    real, y = means(dls.train.images), dls.train.labels
    near = torch.cdist(means(images), real).topk(5, largest=False).indices
    return (y[near].mode(1).values == labels).float().mean().item()


def test_icons_are_read_with_their_classes_and_their_alpha(icons):
    _, run, said = icons
    assert "4x16x16, 4 classes" in said and "classes: faces: " in said
    assert "hearts: " in said and "duplicates" not in said
    assert (run / "samples.png").exists()


def test_icons_drawn_by_label_are_recognised(icons, tmp_path):
    data, run, _ = icons
    command_line("sample", "--run", run, "--n", 12, "--steps", 20, "--out", tmp_path / "a.npz")
    arrays = np.load(tmp_path / "a.npz")
    images, labels = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    assert read_as_asked(data, images, labels) > 0.85
    assert (images[:, 3] < 30).float().mean() > 0.15  # corners are clear
    assert (images[:, 3] > 225).float().mean() > 0.1


def test_icons_go_on_and_start_others(icons, tmp_path):
    data, run, _ = icons
    before = Diffusion.load(run, "cpu").step
    said = command_line("train", "--run", run, "--extend", "--epochs", 1)
    assert "is extended from step" in said and Diffusion.load(run, "cpu").step > before
    said = command_line(
        *("train", "--data", data, "--img-size", 32, "--init", "shapes", "--epochs", 1),
        *(*SMALL[2:], "--run", tmp_path / "fine"),
    )
    assert "starts from shapes: 119 of 119 tensors" in said  # on white paper: three channels
    assert "6 classes there, 4 here" in said


def test_icons_are_drawn_by_onnxruntime(icons, tmp_path):
    pytest.importorskip("onnxruntime")
    data, run, _ = icons
    command_line("export", run, "--to", "onnx", "--steps", 20, "--out", tmp_path / "i.onnx")
    labels = torch.arange(4).repeat_interleave(8)
    x = load_onnx(tmp_path / "i.onnx").sample(labels, cfg_scale=2.0, n_steps=20, seed=1)
    images = Diffusion.load(run, "cpu").space.from_x(torch.as_tensor(x))
    assert read_as_asked(data, images, labels) > 0.85


def test_icons_are_compared_with_all_icons(icons):
    _, run, _ = icons
    how = ("--features", "random", "--split", "all", "--n", 60, "--steps", 20)
    assert "reference: all splits of icons" in command_line("evaluate", run, *how)
    numbers = read_json(run / "evaluation.json")
    ours, real = numbers["numbers"], numbers["real"]
    assert ours["precision"] > 0.5 and ours["fid"] < 10 * max(real["fid"], 0.05)
    assert ours["identical"] == 0


def test_photographs_of_one_thing(tmp_path):
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("flower.jpg")).resize((160, 107))
    folder, run = tmp_path / "photos", tmp_path / "run"
    folder.mkdir()
    for top in range(0, 107 - 64, 9):
        for left in range(0, 160 - 64, 8):
            photo.crop((left, top, left + 64, top + 64)).save(folder / f"{top}-{left}.jpg")
    said = command_line(
        *("train", "--data", folder, "--img-size", 64, "--flip", "--epochs", 12, "--run", run),
        *("--batch-size", 8, *SMALL[4:]),
    )
    assert "3x64x64, 0 classes" in said
    command_line("sample", "--run", run, "--n", 16, "--steps", 15, "--out", tmp_path / "a.npz")
    dls, x = get_dls(folder, 64), torch.from_numpy(np.load(tmp_path / "a.npz")["x"])
    sets = x, dls.train.images, dls.test.images
    drawn, real, test = (pixel_features(u8.float()) for u8 in sets)
    near, usual = (torch.cdist(f, real).min(1).values.median() for f in (drawn, test))
    assert near < 1.8 * usual, (near, usual)  # nearly as near to one as another one is
    petals = (x[:, 0] > 150).float().mean((1, 2))
    leaves = ((x[:, 0] < 60) & (x[:, 1] < 110)).float().mean((1, 2))
    assert petals.mean() > 0.15 and leaves.mean() > 0.15  # both, beside each other
    how = ("--features", "pixels", "--split", "all", "--n", 16, "--steps", 5)
    assert "reference: all splits of photos" in command_line("evaluate", run, *how)
