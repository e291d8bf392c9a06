"""Draw the film that opens the readme and the website: digits dissolve, others come out of it.

usage: python tools/animation.py [--out assets/forward_reverse.png]      (5 seconds on a CPU)

The digits and the way back are those of the MNIST model that ships with the package; seeds are
fixed, nothing is picked. The film is an animated PNG in 32 shades of grey; beside it lies its last
picture, for who has asked the system for less motion.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ddpm_course.core import grid, to_uint8
from ddpm_course.guidance import cfg
from ddpm_course.sampling import clip_x0, euler, sample
from ddpm_course.training import load_pretrained

ROOT = Path(__file__).resolve().parent.parent
# pictures each way, pixels of the film to one of the digits, height of the line of text
THERE, BACK, SCALE, LINE = 24, 24, 2, 24
TIMES = dict(first=900, step=80, noise=700, last=2500)  # milliseconds


def films() -> list:
    "[(text, (10,1,32,32) images)], there and back."
    diff, labels = load_pretrained("mnist", "cpu"), torch.arange(10)
    digits = diff.sample(labels, cfg_scale=2.0, n_steps=25, seed=1)
    process, g = diff.process, torch.Generator().manual_seed(0)
    noise = torch.randn(digits.shape, generator=g)
    # slowly at first, where there is most to see
    grow = [round(process.t_max * (i / THERE) ** 1.5) for i in range(THERE + 1)]
    film = [
        (
            f"forward: noise comes in, t = {t}",
            process.add_noise(digits, torch.full((10,), t), noise),
        )
        for t in grow
    ]
    way = []
    x = sample(
        clip_x0(cfg(diff.ema_model, labels, 2.0, diff.null)),
        process,
        film[-1][1],
        process.steps(4 * BACK),
        euler,
        callback=lambda **k: way.append((k["t"][0], k["x"])),
    )
    back = [(float(t), x) for t, x in way[4::4]]
    return (
        film
        + [(f"back: the network takes it away, t = {t:.0f}", x) for t, x in back]
        + [("back: the network takes it away, t = 0", x)]
    )


def picture(text: str, x: torch.Tensor) -> Image.Image:
    "One frame: a row of digits, a line of text."
    row = (
        grid((to_uint8(x).int() // 8 * 255 // 31).to(torch.uint8), cols=10, pad=1)[:1]
        .repeat_interleave(SCALE, 1)
        .repeat_interleave(SCALE, 2)[0]
    )
    image = Image.new("L", (row.shape[1], row.shape[0] + LINE), 255)
    image.paste(Image.fromarray(row.numpy()))
    ImageDraw.Draw(image).text((4, row.shape[0] + 2), text, fill=0, font=ImageFont.load_default(15))
    return image


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "assets/forward_reverse.png")
    out = parser.parse_args().out
    with torch.no_grad():
        frames = [picture(*f) for f in films()]
    times = [TIMES["step"]] * len(frames)
    times[0], times[THERE], times[-1] = TIMES["first"], TIMES["noise"], TIMES["last"]
    frames[0].save(
        out, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True
    )
    still = out.with_name(out.stem + "_still.png")
    both = Image.new("L", (frames[0].width, 3 * frames[0].height), 255)
    for i, k in enumerate((0, THERE, -1)):
        both.paste(frames[k], (0, i * frames[0].height))
    both.save(still, optimize=True)
    for p in (out, still):
        print(
            f"{p}: {p.stat().st_size / 1e3:.0f} kB, {len(frames)} pictures"
            if p == out
            else f"{p}: {p.stat().st_size / 1e3:.0f} kB"
        )


if __name__ == "__main__":
    main()
