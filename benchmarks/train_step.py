"""One training step: images per second, share of what a plain matmul reaches, and peak memory.

Each row runs in a process of its own, in turn, for several rounds, since shared machines drift; the
table gives medians. FLOPs are those of the network's forward and backward pass, counted by torch;
the peak is the best of a few square matmuls in the same precision, measured in the same process.
Precision and layout, where they are left to the package, are chosen in a process before, so that
the memory is that of training.

    python benchmarks/train_step.py [--steps 5] [--rounds 3] [--batch 32] [--size 32]
"""

import argparse
import json
import statistics
import time

import torch
from bench import Results, begin, child, markdown, measured_on, parser, short

ROWS = dict(
    source="source network, as the source trains it",
    ours="the same network, our way",
    light="light network, our way",
)
GPU_ROWS = {
    "ours float32": "the same network, float32",
    "ours contiguous": "the same network, contiguous",
    "ours compiled": "the same network, compiled",
    "light float32": "light network, float32",
    "light contiguous": "light network, contiguous",
    "light compiled": "light network, compiled",
}
SETTINGS = dict(
    float32=dict(precision="float32"),
    contiguous=dict(channels_last=False),
    compiled=dict(compile=True),
)


def source_step(x, y):
    from source import SourceTrainer

    trainer = SourceTrainer(x.shape[1:], 10, x.device)
    return lambda: trainer.step(x, y), trainer.net, dict(precision="float32", channels_last=False)


def our_step(x, y, light: bool, **settings):
    from types import SimpleNamespace

    from ddpm_course.training import Diffusion
    from ddpm_course.unet import UNet_conditional

    shape = tuple(x.shape[1:])
    diff = Diffusion(
        None if light else UNet_conditional(shape[0], shape[0], num_classes=10),
        shape=shape,
        num_classes=10,
        device=x.device,
    )
    diff.prepare(
        SimpleNamespace(train=[(x, y)], valid=[], num_classes=10), total_steps=10_000, **settings
    )
    return (
        lambda: diff.train_step(x, y),
        diff.model.net,
        dict(precision=diff.settings.precision, channels_last=diff.settings.channels_last),
    )


def timed(f, device) -> float:
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops(net, x, y) -> int:
    """Forward and backward of the network on these images, counted by torch; attention as plain
    products, which it knows to count everywhere."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as count, sdpa_kernel(SDPBackend.MATH):
        net(x, torch.full((len(x),), 500.0, device=x.device), y).sum().backward()
    net.zero_grad()
    return count.get_total_flops()


def matmul_peak(device, dtype, patience: float = 0.5) -> float:
    """FLOP/s of the best of a few sizes; a larger one is tried only where it will take less than
    `patience` seconds."""
    best = 0.0
    for n in (512, 1024, 2048, 4096, 8192):
        if best and 2 * n**3 / best > patience:
            break
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        timed(lambda: a @ b, device)
        best = max(best, 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(5)))
    return best


def ready(row: str, args, **settings):
    "A batch, and the step, network and settings of a row."
    net, _, variant = row.partition(" ")
    x = torch.rand(args.batch, 3, args.size, args.size, device=args.device) * 2 - 1
    y = torch.arange(args.batch, device=args.device) % 10
    return (
        x,
        y,
        *(
            source_step(x, y)
            if net == "source"
            else our_step(x, y, net == "light", **SETTINGS.get(variant, {}) | settings)
        ),
    )


def measure(row: str, args) -> dict:
    "One process, one row, one round."
    from ddpm_course.core import peak_memory

    net, _, variant = row.partition(" ")
    x, y, step, module, settings = ready(row, args, **json.loads(args.settings))
    for _ in range(1 + 4 * (args.device.type == "cuda")):
        step()
    repeats = args.steps * (10 if net == "light" or args.device.type == "cuda" else 1)
    seconds = statistics.median(timed(step, args.device) for _ in range(repeats))
    memory = peak_memory()
    if variant == "compiled":
        # compiled code hides its operations
        module = our_step(x, y, net == "light", precision="float32", channels_last=False)[1]
    return dict(
        images_per_second=args.batch / seconds,
        flops=flops(module, x, y) / seconds,
        peak_memory=memory,
        peak_flops=matmul_peak(
            args.device, getattr(torch, settings["precision"]), 0.01 if args.quick else 0.5
        ),
        **settings,
    )


def table(rows: list) -> str:
    names = ROWS | GPU_ROWS
    base = [r["images_per_second"] for r in rows if r["row"] == "source"]
    lines = []
    for which in names:
        if not (found := [r for r in rows if r["row"] == which]):
            continue
        speed, last = statistics.median(r["images_per_second"] for r in found), found[-1]
        used = [100 * r["flops"] / r["peak_flops"] for r in found if r.get("flops")]
        lines.append(
            [
                names[which],
                speed,
                base and f"{short(speed / statistics.median(base))}x" or "",
                f"{statistics.median(used):.0f}%" if used else "",
                f"{max(r['peak_memory'] for r in found):.1f} GB",
                last["precision"],
                "channels_last" if last["channels_last"] else "contiguous",
            ]
        )
    size, batch = (rows[-1]["run"]["settings"][k] for k in ("size", "batch"))
    tried = {
        p: [r["peak_flops"] for r in rows if r["precision"] == p and r.get("peak_flops")]
        for p in dict.fromkeys(r["precision"] for r in rows)
    }
    peaks = [
        f"{short(statistics.median(found) / 1e9)} GFLOP/s in {p}"
        for p, found in tried.items()
        if found
    ]
    header = [
        f"training step, batch {batch}, {size}x{size}",
        "images per second",
        "times the source",
        "of the matmul peak",
        "peak memory",
        "precision",
        "layout",
    ]
    reached = f"A plain matmul reaches {', '.join(peaks)}. " if peaks else ""
    return f"{markdown(header, lines)}\n\n{reached}{measured_on(rows)}"


def main(argv=None):
    p = parser(__doc__, steps=5, rounds=3, batch=32, size=32)
    p.add_argument(
        "--only",
        nargs="+",
        choices=[*ROWS, *GPU_ROWS],
        metavar="ROW",
        help=f"some of {', '.join(ROWS)}; on a GPU also {', '.join(GPU_ROWS)}",
    )
    p.add_argument("--row", choices=[*ROWS, *GPU_ROWS], help=argparse.SUPPRESS)
    p.add_argument("--settings", help=argparse.SUPPRESS)
    args = begin(p.parse_args(argv))
    if args.row:
        return print(
            json.dumps(measure(args.row, args) if args.settings else ready(args.row, args)[-1])
        )
    if args.quick:
        args.steps, args.rounds, args.batch, args.size = 1, 1, 2, 16
    results = Results("train_step", args, ("row", "round"))
    rows = args.only or [
        *ROWS,
        *(GPU_ROWS if args.device.type == "cuda" else ["light float32"]),
    ]

    def one(row, *more):
        return child(
            __file__,
            args,
            "--row",
            row,
            "--steps",
            args.steps,
            "--batch",
            args.batch,
            "--size",
            args.size,
            *more,
        )

    chosen = {row: json.dumps(one(row)) if row in ("ours", "light") else "{}" for row in rows}
    for n in range(args.rounds):
        for row in rows:
            results.add(row=row, round=n, **one(row, "--settings", chosen[row]))
    print(table(results.rows), results.path, sep="\n\n")


if __name__ == "__main__":
    main()
