"""Peak memory of a training step and of guided sampling, against image size and batch.

Every case runs in a process of its own. On a CPU this is the most that the process ever held, with
torch and everything; on a GPU what torch allocated there.

    python benchmarks/memory.py [--sizes 32 64 128] [--batches 8 32]
"""

import argparse
import json

import torch
from bench import Results, above_0, begin, child, markdown, measured_on, parser, several

NETS = dict(light="light network", full="source network, our way")
# pixels of a batch beyond which the large network is left out on a CPU: too much for a laptop
LIMIT = 64 * 64 * 32


def measure(net: str, what: str, size: int, batch: int, device) -> dict:
    from types import SimpleNamespace

    from ddpm_course.core import peak_memory
    from ddpm_course.training import Diffusion
    from ddpm_course.unet import UNet_conditional

    shape = (3, size, size)
    diff = Diffusion(
        UNet_conditional(num_classes=10) if net == "full" else None,
        shape=shape,
        num_classes=10,
        device=device,
    )
    x, y = torch.zeros(batch, *shape, device=device), torch.arange(batch, device=device) % 10
    idle = peak_memory()
    precision = "bfloat16" if what == "train" and device.type == "cuda" else "float32"
    if what == "train":
        diff.prepare(
            SimpleNamespace(train=[(x, y)], valid=[], num_classes=10),
            total_steps=10,
            precision=precision,
            channels_last=True,
        )
        for _ in range(2):
            diff.train_step(x, y)
    else:
        diff.sample(y, cfg_scale=2.0, n_steps=2, chunk=batch, precision=precision)
    return dict(peak=peak_memory(), idle=idle, precision=precision)


def table(rows: list) -> str:
    cases = sorted({(r["size"], r["batch"]) for r in rows})

    def cell(net, what, case):
        found = next(
            (r for r in rows if (r["net"], r["what"], r["size"], r["batch"]) == (net, what, *case)),
            None,
        )
        return f"{found['peak']:.1f}" if found else ""

    header = ["peak memory in GB", *(f"{size}x{size}, batch {batch}" for size, batch in cases)]
    lines = [
        [
            f"{NETS[net]}, {dict(train='training step', sample='guided sampling')[what]}",
            *(cell(net, what, c) for c in cases),
        ]
        for net in NETS
        for what in ("train", "sample")
        if any(r["net"] == net for r in rows)
    ]
    idle = " to ".join(dict.fromkeys(f"{f(r['idle'] for r in rows):.1f}" for f in (min, max)))
    precisions = dict.fromkeys(
        r.get("precision", "float32") for r in rows if r["what"] == "train"
    )  # early rows do not say it
    told = (
        f"Before the first step it is {idle} GB. Training is in {' and '.join(precisions)} with"
        " channels_last, sampling in float32. "
    )
    if any("" in line for line in lines):
        told += (
            "An empty cell was not measured: on a CPU the source network leaves out what is too"
            " much for a laptop. "
        )
    return f"{markdown(header, lines)}\n\n{told}{measured_on(rows)}"


def main(argv=None):
    p = parser(__doc__)
    several(p, "--sizes", [32, 64, 128], "sides of the images", above_0)
    several(p, "--batches", [8, 32], "images in a batch", above_0)
    p.add_argument("--case", help=argparse.SUPPRESS)
    args = begin(p.parse_args(argv))
    if args.case:
        net, what, size, batch = args.case.split(",")
        return print(json.dumps(measure(net, what, int(size), int(batch), args.device)))
    if args.quick:
        args.sizes, args.batches = [16], [2]
    results = Results("memory", args, ("net", "what", "size", "batch"))
    for net in NETS:
        for size in args.sizes:
            for batch in args.batches:
                if net == "full" and (
                    args.quick or args.device.type == "cpu" and size * size * batch > LIMIT
                ):
                    continue
                for what in ("train", "sample"):
                    results.add(
                        net=net,
                        what=what,
                        size=size,
                        batch=batch,
                        **child(__file__, args, "--case", f"{net},{what},{size},{batch}"),
                    )
    print(table(results.rows), results.path, sep="\n\n")


if __name__ == "__main__":
    main()
