"""Where should resolution, width and attention go?

Light networks of several shapes are each trained for the same seconds. A shape that does less work
an image sees more images in the same time; which is worth more is measured, not guessed. Speeds
come from a race: a few steps of every shape in turn, for several rounds, of which the median
counts. On a CPU the seconds are those that one thread computed, so that other work on the machine
does not count. Each shape then trains for the images of its speed, by the recipe of the package.

    python benchmarks/networks.py
        all shapes
    python benchmarks/networks.py --only light "no attention" --seconds 300
        two of them, for longer
    python benchmarks/networks.py --only light "no attention" --data shapes
        on images in colour
"""

import statistics
import time

import torch
from bench import (
    Results,
    begin,
    labels,
    markdown,
    measured_on,
    parser,
    race,
    several,
    short,
    some_of,
)

SHAPES = {  # of 32x32 images; gathered 2x2, three levels are 16x16, 8x8 and 4x4
    "light": ("as LightUNet comes: gathered 2x2, 32/64/64, attention at 4x4", {}),
    "full size": (
        "not gathered: 16/32/64 at 32x32, 16x16, 8x8, attention at 8x8",
        dict(widths=(16, 32, 64), patch=1),
    ),
    "gathered 4x4": (
        "gathered 4x4: 64/96 at 8x8 and 4x4, attention at 4x4",
        dict(widths=(64, 96), attention=(1,), patch=4),
    ),
    "two levels": (
        "two levels: 32/64 at 16x16 and 8x8, attention at 8x8",
        dict(widths=(32, 64), attention=(1,)),
    ),
    "narrow": ("half as wide: 16/32/32", dict(widths=(16, 32, 32))),
    "wide": ("half as wide again: 48/96/96", dict(widths=(48, 96, 96))),
    "no attention": ("no attention", dict(attention=())),
    "more attention": ("attention at 8x8 and 4x4", dict(attention=(1, 2))),
    "cut": (
        "the cut UNet of lesson 06b: gathered 2x2, 32/64/64, attention at 4x4",
        dict(name="UNet_conditional", patch=2, widths=(32, 64, 64), attention=(2,), mid_blocks=1),
    ),
}
SCALE, KEY = 1.5, ("data", "race", "shape", "seconds", "seed")


def made(name: str, dls, device, seed: int = 0):
    from ddpm_course.model import make_net
    from ddpm_course.training import Diffusion

    torch.manual_seed(seed)
    net = make_net(
        **dict(name="LightUNet", c_in=dls.shape[0], c_out=dls.shape[0], num_classes=dls.num_classes)
        | SHAPES[name][1]
    )
    return Diffusion(net, shape=dls.shape, num_classes=dls.num_classes, device=device, seed=seed)


def speeds(names: list, dls, args) -> dict:
    "Images per second of training."
    cpu, (x, y) = args.device.type == "cpu", next(iter(dls.train))

    def ready(name):
        diff = made(name, dls, args.device)
        diff.prepare(dls, total_steps=10_000, precision=args.precision, channels_last=False)

        def steps():
            for _ in range(args.steps):
                diff.train_step(x, y)
            if not cpu:
                torch.cuda.synchronize()

        return steps

    runs = {name: ready(name) for name in names}
    race(runs, 1)  # warm-up
    return {
        name: args.steps * len(y) / seconds
        for name, seconds in race(runs, args.rounds, time.process_time if cpu else None).items()
    }


def measure(name: str, speed: float, dls, quality, args, seed: int) -> dict:
    "One shape, trained for the images that it sees in args.seconds, and its samples judged."
    from train_step import flops

    dls.train.batch_size, diff = 32, made(name, dls, args.device, seed)
    steps = max(int(args.seconds * speed / dls.train.batch_size), 1)
    diff.prepare(dls, total_steps=steps, precision=args.precision, channels_last=False)
    diff.fit(loggers=[], progress=False)
    y = labels(args.n, dls.num_classes)
    images = (
        diff.sample(y, cfg_scale=SCALE, n_steps=20, seed=seed, precision=args.precision)
        .float()
        .cpu()
    )
    x = torch.zeros(1, *dls.shape, device=args.device)
    return dict(
        speed=speed,
        seen=steps * dls.train.batch_size,
        parameters=sum(p.numel() for p in diff.model.parameters()),
        flops=flops(diff.model.net, x, y[:1].to(args.device)),
        lr=diff.settings.lr,
        **quality(images, y),
    )


def table(rows: list) -> str:
    """A table for each data set, budget and race (speeds compare only within one), the best network
    first."""
    groups = {}
    for r in rows:
        groups.setdefault((r["data"], r["seconds"], -r["race"].count(","), r["race"]), []).append(r)
    return (
        "\n\n".join(one_table(groups[key]) for key in sorted(groups)) + f"\n\n{measured_on(rows)}"
    )


def one_table(rows: list) -> str:
    from quality import accuracy_cell, explained, fid_cell

    groups = {}
    for r in rows:
        groups.setdefault(r["shape"], []).append(r)
    lines = [
        [
            SHAPES[name][0],
            found[0]["parameters"],
            found[0]["flops"] / 1e6,
            found[0]["speed"],
            found[0]["seen"],
            fid_cell(found, "classifier"),
            fid_cell(found, "random"),
            accuracy_cell(found),
        ]
        for name, found in sorted(
            groups.items(), key=lambda kv: statistics.mean(r["fid_classifier"] for r in kv[1])
        )
    ]
    header = [
        "shape of the network",
        "parameters",
        "MFLOP an image, forward and backward",
        "images per second",
        "images seen",
        "FID, classifier's features",
        "FID, random features",
        "read as asked",
    ]
    r = rows[0]
    return (
        f"On {r['data']}, trained for {short(r['seconds'])}"
        f" seconds{' of one thread' if r['run']['threads'] == 1 else ''},"
        f" {r['run']['settings']['precision']}:\n\n{markdown(header, lines)}\n\n{r['n']:,} samples,"
        f" guidance {SCALE:g}, 20 steps; ± is half the range over {max(map(len, groups.values()))}"
        f" seeds. {explained(rows).strip()}"
    )


def main(argv=None):
    p = parser(__doc__, n=1000, seconds=120, steps=10, rounds=5)
    p.set_defaults(threads=1)
    some_of(p, SHAPES, "SHAPE")
    p.add_argument("--data", default="mnist", choices=["mnist", "shapes"], help="(%(default)s)")
    several(p, "--seeds", [0, 1], "each trains a model of its own")
    p.add_argument("--precision", default="bfloat16", help="bfloat16 or float32 (%(default)s)")
    args = begin(p.parse_args(argv))
    from quality import Quality, data

    dls = data(args)
    if args.quick:
        args.n = 12
        args.seconds = 0.1
        args.steps = 1
        args.rounds = 1
        args.seeds = args.seeds[:1]
        args.precision = "float32"
    dls.to(args.device)
    dls.train.batch_size, quality, results = 32, Quality(dls, args), Results("networks", args, KEY)
    speed = speeds(args.only, dls, args)
    for seed in args.seeds:
        for name in args.only:
            results.add(
                data=dls.name,
                race=", ".join(args.only),
                shape=name,
                seconds=args.seconds,
                seed=seed,
                **measure(name, speed[name], dls, quality, args, seed),
            )
    print(table(results.rows), results.path, sep="\n\n")


if __name__ == "__main__":
    main()
