"""Small things that several test files use: tiny data, a tiny model."""

import torch
from click.testing import CliRunner
from PIL import Image

from ddpm_course.data import Batches, DataLoaders
from ddpm_course.process import DDPM
from ddpm_course.shapes import draw_shapes
from ddpm_course.training import Diffusion
from ddpm_course.unet import UNet_conditional


def tiny_dls(n=64, batch_size=16, num_classes=3, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)

    def part(n, shuffle=False):
        images = torch.randint(0, 256, (n, 1, size, size), generator=g, dtype=torch.uint8)
        return Batches(
            images,
            torch.randint(0, max(num_classes, 1), (n,), generator=g),
            batch_size,
            shuffle=shuffle,
            seed=seed,
        )

    return DataLoaders(
        part(n, True),
        part(24),
        part(24),
        num_classes,
        (1, size, size),
        [f"c{k}" for k in range(num_classes)],
        "tiny",
    )


def tiny_diffusion(num_classes=3, size=8, seed=0, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet_conditional(
            1,
            1,
            time_dim=16,
            widths=(8, 8),
            attention=(1,),
            heads=2,
            num_classes=num_classes or None,
        )
    return Diffusion(
        net, DDPM(100, "cosine"), "v", (1, size, size), num_classes, device="cpu", seed=seed, **kw
    )


def picture(i=0, size=24):
    return Image.fromarray(draw_shapes(torch.tensor([i]), size)[0][0].permute(1, 2, 0).numpy())


def make_folder(root, layout, start=0):
    "layout: {folder: number of different images}"
    for k, (name, n) in enumerate(layout.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            picture(start + 1000 * k + i).save(root / name / f"{i:03}.png")
    return root


def command_line(*args, code=0):
    "What the command line prints; the exit code is asserted."
    from ddpm_course.cli import main

    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == code and "Traceback" not in done.output, (
        args,
        done.output,
        done.exception,
    )
    return done.output


def failing(diff, when, save=False):
    "Its training stops in front of the step at which when(diff), as if the machine had failed."
    real = diff.train_step

    def step(*batch):
        if when(diff):
            if save:
                diff.save_model()
            raise ConnectionError
        return real(*batch)

    diff.train_step = step
    return diff


# no timing runs, the same arithmetic every time
QUICK = dict(precision="float32", channels_last=False)


def same_weights(a, b):
    return all(
        torch.equal(p, q)
        for m in ("model", "ema_model")
        for p, q in zip(getattr(a, m).state_dict().values(), getattr(b, m).state_dict().values())
    )
