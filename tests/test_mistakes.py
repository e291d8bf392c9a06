"""Those of the eighteen mistakes that no other file tests, or tests only in part: as they would be
made in the whole package."""

import copy
import inspect

import pytest
import torch
from click.testing import CliRunner
from common import QUICK, same_weights, tiny_diffusion, tiny_dls
from torch import nn

from ddpm_course import training
from ddpm_course.checkpoint import checkpoints
from ddpm_course.cli import main
from ddpm_course.core import grid, save_images, to_float, to_uint8
from ddpm_course.data import Batches, fit_image, get_dls
from ddpm_course.training import Diffusion


class Recorder(nn.Module):
    "A network that notes down how it was called."

    def __init__(self, gain=0.0):
        super().__init__()
        self.gain, self.calls = nn.Parameter(torch.tensor(gain)), []

    def forward(self, x, t, cond=None):
        self.calls.append((len(x), cond))
        return self.gain * (1 + x.abs())


def recorded(gain=0.0, **kw):
    diff = Diffusion(Recorder(gain), shape=(1, 8, 8), num_classes=3, device="cpu", **kw)
    return diff, diff.ema_model.net.calls


# ---- 3: the epoch's loss
def test_mistake_03_unequal_batches_weigh_by_their_examples():
    """Three batches of 10, 10 and 1: the last may not count ten times as much as its one example is
    worth."""
    diff = tiny_diffusion().prepare(tiny_dls(n=21, batch_size=10), epochs=1, **QUICK)

    def step(x, y):
        diff.trainer.batch += 1
        return torch.full((len(x),), 1.0 if len(x) == 10 else 22.0)

    diff.train_step = step
    # (20 * 1 + 22) / 21; the sum of the means is 24, their mean 8
    assert diff.one_epoch() == pytest.approx(2.0)


# ---- 5: guidance, asked for as learners ask
def test_mistake_05_sampling_at_scale_0_ignores_the_label_and_1_follows_it():
    diff = tiny_diffusion()
    with torch.no_grad():
        diff.ema_model.net.label_emb.weight.mul_(20)

    def images(labels, scale):
        return diff.sample(labels, n_steps=3, seed=0, cfg_scale=scale)

    null, asked = [diff.null] * 2, [0, 2]
    torch.testing.assert_close(images(asked, 0.0), images(null, 1.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(images(asked, 1.0), images(asked, 1 + 1e-6), rtol=0, atol=1e-4)
    torch.testing.assert_close(images(asked, 0.0), images(asked, 1e-6), rtol=0, atol=1e-4)
    assert (images(asked, 1.0) - images(null, 1.0)).abs().max() > 0.01


# ---- 6: grey levels
def test_mistake_06_all_grey_levels_survive_a_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)


def test_mistake_06_the_nearest_level_not_the_one_below():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels) + 0.4 / 127.5), levels)
    assert torch.equal(to_uint8(to_float(levels) - 0.4 / 127.5), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]  # nor does anything wrap around


def test_mistake_06_pictures_that_are_stored_hold_the_same_levels(tmp_path):
    from PIL import Image

    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(grid(to_float(levels), cols=1, pad=0)[:1], levels[0])
    with Image.open(save_images(to_float(levels), tmp_path / "x.png", cols=1, scale=1)) as im:
        stored = torch.tensor(list(im.convert("L").tobytes()), dtype=torch.uint8).reshape(
            im.height, im.width
        )
    assert torch.equal(stored[1:17, 1:17], levels[0, 0])


# ---- 11: stretched images
def disc(h, w, r):
    y, x = torch.arange(h)[:, None] - (h - 1) / 2, torch.arange(w) - (w - 1) / 2
    return (x**2 + y**2 < r**2).to(torch.uint8) * 255


def height_and_width(x):  # (1,H,W) of a white disc on black -> its spread in both directions
    mass = (x[0].float() - x.min()) / (x.max() - x.min())

    def spread(v):
        i = torch.arange(len(v), dtype=torch.float32)
        m = (i * v).sum() / v.sum()
        return ((i - m) ** 2 * v).sum().div(v.sum()).sqrt().item()

    return spread(mass.sum(1)), spread(mass.sum(0))


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("size", [32, (24, 48), (48, 24)])
@pytest.mark.parametrize("h, w", [(60, 180), (180, 60), (61, 97)])
def test_mistake_11_a_disc_stays_a_disc(h, w, size, fit):
    tall, wide = height_and_width(fit_image(disc(h, w, 10)[None, None], size, fit)[0])
    assert tall == pytest.approx(wide, abs=0.3)


def test_mistake_11_nor_is_a_training_image_stretched_on_its_way_into_a_batch(tmp_path):
    from PIL import Image

    for i in range(12):
        Image.fromarray(disc(60 + i, 120 - i, 24).numpy()).save(tmp_path / f"{i}.png")
    dls = get_dls(tmp_path, 32, batch_size=4, flip=True)
    shapes = [
        height_and_width(x)
        for epoch in range(3)
        for batch, _ in dls.train.epoch(epoch)
        for x in batch
    ]
    assert shapes and all(tall == pytest.approx(wide, abs=0.3) for tall, wide in shapes)


def test_mistake_11_training_images_are_themselves_or_their_mirror_images():
    images = torch.randint(
        0, 256, (32, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    seen = [
        x
        for epoch in range(4)
        for x, y in Batches(images, torch.arange(32), 32, flip=True).epoch(epoch)
    ]
    same, mirrored = (
        torch.stack([(x == to_float(im)).flatten(1).all(1) for x in seen])
        for im in (images, images.flip(-1))
    )
    assert (same | mirrored).all() and same.any() and mirrored.any()


# ---- 12: image sides
def test_mistake_12_the_model_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match="30 x 30.*multiples of 8.*24 x 24 and 32 x 32"):
        Diffusion(shape=(1, 30, 30))


# ---- 14: seeds and devices of the configuration
@pytest.fixture
def gpu_in_sight(monkeypatch):  # so that 'the best there is' is not what was asked for
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_mistake_14_the_device_that_was_asked_for(gpu_in_sight):
    diff = Diffusion(Recorder(), shape=(1, 8, 8), device="cpu")
    assert diff.device == torch.device("cpu") == diff.model.net.gain.device == diff.generator.device


def test_mistake_14_the_seed_decides_the_first_weights_and_the_noise():
    first = {seed: Diffusion(shape=(1, 8, 8), device="cpu", seed=seed) for seed in (1, 2)}
    again = Diffusion(shape=(1, 8, 8), device="cpu", seed=1)
    assert same_weights(first[1], again) and not same_weights(first[1], first[2])
    net, dls = tiny_diffusion().model.net, tiny_dls()

    def trained(seed):
        return Diffusion(
            copy.deepcopy(net), shape=(1, 8, 8), num_classes=3, device="cpu", seed=seed
        ).fit(dls, epochs=1, progress=False, **QUICK)

    # the same first weights and images: only noise, times and label dropout differ
    a, b, c = trained(1), trained(1), trained(2)
    assert same_weights(a, b) and not same_weights(a, c)


def test_mistake_14_the_command_line_passes_seed_and_device_on(gpu_in_sight, monkeypatch, tmp_path):
    seen = []

    def fit(self, dls, *_, **__):
        seen.append((self.seed, self.device.type, dls.train.seed))
        raise ValueError("that is all")

    monkeypatch.setattr(training.Diffusion, "fit", fit)
    for seed in (3, 4):
        done = CliRunner().invoke(
            main,
            [
                "train",
                "--img-size",
                "16",
                "--device",
                "cpu",
                "--seed",
                str(seed),
                "--run",
                str(tmp_path / "r"),
            ],
        )
        assert "that is all" in done.output, done.output
    assert seen == [(3, "cpu", 3), (4, "cpu", 4)]


def test_mistake_14_the_command_line_samples_with_its_seed(tmp_path):
    tiny_diffusion(num_classes=0).fit(
        tiny_dls(num_classes=0), epochs=1, run=tmp_path / "r", progress=False, **QUICK
    )

    def png(seed, name):
        done = CliRunner().invoke(
            main,
            [
                "sample",
                "--run",
                str(tmp_path / "r"),
                "--n",
                "2",
                "--steps",
                "2",
                "--device",
                "cpu",
                "--seed",
                seed,
                "--out",
                str(tmp_path / name),
            ],
        )
        assert done.exit_code == 0, done.output
        return (tmp_path / name).read_bytes()

    assert png("1", "a.png") == png("1", "b.png") != png("2", "c.png")


# ---- 15: what is saved, and when
def test_mistake_15_every_epoch_is_saved(tmp_path):
    steps = []

    def log(step, *_):
        steps.append((step, checkpoints(tmp_path)[-1].name))

    tiny_diffusion().fit(tiny_dls(), epochs=3, run=tmp_path, progress=False, loggers=[log], **QUICK)
    assert steps == [(k, f"step-{k:09d}") for k in (4, 8, 12)]


def test_mistake_15_and_the_work_within_a_long_epoch_too(tmp_path):
    diff = tiny_diffusion().prepare(tiny_dls(), epochs=1, **QUICK)
    real, found = diff.train_step, []

    def step(x, y):
        found.append(len(checkpoints(tmp_path)))
        return real(x, y)

    diff.train_step = step
    diff.fit(run=tmp_path, progress=False, save_every=0.0, loggers=[])
    assert found[0] == 0 and found[1:] and all(found[1:])


# ---- 17: guidance as the model uses it
def test_mistake_17_sampling_makes_one_doubled_pass_per_step():
    diff, calls = recorded()
    diff.sample([0, 1, 2], cfg_scale=3.0, n_steps=4)
    assert [n for n, _ in calls] == [6] * 4 and calls[0][1].tolist() == [3, 3, 3, 0, 1, 2]


def test_mistake_17_no_guidance_costs_no_second_pass():
    diff, calls = recorded()
    diff.sample([0, 1, 2], n_steps=4)
    assert [n for n, _ in calls] == [3] * 4


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_mistake_17_the_estimate_stays_in_the_range_of_images(scale):
    diff, _ = recorded(gain=50.0)
    x0s = []
    out = diff.sample(
        [0, 1],
        cfg_scale=scale,
        n_steps=4,
        seed=0,
        callback=lambda x0, **_: x0s.append(x0.abs().max().item()),
    )
    assert x0s == [1.0] * 4 and out.abs().max() <= 1
    wild = []
    diff.sample(
        [0, 1],
        cfg_scale=scale,
        n_steps=4,
        seed=0,
        clip=False,
        callback=lambda x0, **_: wild.append(x0.abs().max().item()),
    )
    assert max(wild) > 2  # it was the clipping that kept them there
    assert inspect.signature(diff.sample).parameters["clip"].default is True
