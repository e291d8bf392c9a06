"""What does a network evaluation buy? Our samplers beside those of the peers.

All draw with the same weights, guided, and are seen by the same judge. A guided evaluation is one
doubled batch and counts once. The last row is the source's way: 999 ancestral steps, nothing
clipped, and two separate passes for guidance.

    python benchmarks/samplers.py                      all rows, on the weights that ship
    python benchmarks/samplers.py --only source        one group
    python benchmarks/samplers.py --run runs/mine      on other weights (MNIST at 32x32)
    python benchmarks/samplers.py --time               only the clock, for the rows that are there

Seconds come from a race at the end: one chunk of every row in turn, for several rounds, of which
the median counts, since shared machines drift.
"""

from pathlib import Path

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

SCALE, KEY = 2.0, ("library", "sampler", "steps")
OURS = (
    [("euler", n) for n in (5, 10, 20, 50)]
    + [("heun", n) for n in (5, 10, 25)]
    + [("ancestral", n) for n in (10, 20, 50, 100)]
    + [(name, n) for name in ("dpmpp_2m", "unipc") for n in (5, 10, 20)]
)
# each with the settings that do best for this schedule and for pixels, of those that its
# documentation names
DIFFUSERS = dict(
    DDIMScheduler=dict(timestep_spacing="trailing"),
    EulerDiscreteScheduler=dict(timestep_spacing="trailing"),
    DPMSolverMultistepScheduler=dict(lambda_min_clipped=-5.1, thresholding=True),
    UniPCMultistepScheduler=dict(thresholding=True),
    # HeunDiscreteScheduler does not fit: the cosine schedule starts at a sigma of 20,000, where its
    # trapezoid is far off
)
# eps that agrees with the clipped image
STEP = dict(DDIMScheduler=dict(use_clipped_model_output=True))


class Guided(torch.nn.Module):
    """What the network says for these labels, guided; times as the peers count them, 0..999 for our
    1..1000."""

    channels, out_dim, self_condition = 1, 1, False  # denoising_diffusion_pytorch asks for these

    def __init__(self, diff, y):
        super().__init__()
        from ddpm_course.guidance import cfg

        self.denoise = cfg(diff.ema_model, y.to(diff.device), SCALE, diff.null)
        self.process = diff.process
        self.channels = self.out_dim = diff.shape[0]

    def forward(self, x, t, *_):
        t = t.expand(len(x)).float() + 1
        alpha, sigma = self.process.coeffs(t, x)
        return (alpha * x - self.denoise(x, t)) / sigma  # v, whatever the network predicts


def by_diffusers(name: str, n: int):
    import diffusers

    def run(diff, y):
        walk = getattr(diffusers, name)(
            num_train_timesteps=1000,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            **DIFFUSERS[name],
        )
        walk.set_timesteps(n, device=diff.device)
        model = Guided(diff, y)
        x = torch.randn(len(y), *diff.shape, device=diff.device) * walk.init_noise_sigma
        for t in walk.timesteps:
            x = walk.step(
                model(walk.scale_model_input(x, t), t), t, x, **STEP.get(name, {})
            ).prev_sample
        return x.clamp(-1, 1)

    return run


def by_lucidrains(n: int):
    from denoising_diffusion_pytorch import GaussianDiffusion
    from peers import without_bars

    without_bars()

    def run(diff, y):
        walk = GaussianDiffusion(
            Guided(diff, y),
            image_size=diff.shape[1],
            objective="pred_v",
            beta_schedule="cosine",
            sampling_timesteps=n,
        )
        return walk.to(diff.device).sample(len(y)) * 2 - 1

    return run


def source_way(diff, y, steps: int = 999):
    """From t = 1000 to 1, which is index 0 of the source and which it leaves out; variance beta;
    two passes."""
    from ddpm_course.sampling import ancestral, sample

    y, none = y.to(diff.device), torch.full_like(y, diff.null, device=diff.device)

    def denoise(x, t):
        return torch.lerp(diff.ema_model(x, t, none), diff.ema_model(x, t, y), SCALE)

    ts = diff.process.steps(steps + 1, diff.device)[:-1]
    return sample(
        denoise,
        diff.process,
        diff.process.init_noise((len(y), *diff.shape), diff.device),
        ts,
        ancestral,
        variance="beta",
    ).clamp(-1, 1)


def ours(name: str, n: int):
    from ddpm_course.model import make_step

    # its noise comes from torch.manual_seed, chunk after chunk
    return lambda diff, y: diff.sample(y, cfg_scale=SCALE, n_steps=n, step=make_step(name))


def plan(only: list, quick: bool) -> list:
    "(library, sampler, steps, function of (diff, labels))"
    rows = (
        [("ddpm_course", name, n, ours(name, n)) for name, n in (OURS[:1] if quick else OURS)]
        if "ours" in only
        else []
    )
    if "diffusers" in only:
        rows += [
            ("diffusers", name, n, by_diffusers(name, n))
            for name in DIFFUSERS
            for n in ((5,) if quick else (5, 10, 20, 50))
        ]
    if "denoising_diffusion_pytorch" in only:
        rows += [
            ("denoising_diffusion_pytorch", "ddim", n, by_lucidrains(n))
            for n in ((5,) if quick else (5, 10, 20, 50))
        ]
    if "source" in only:
        steps = 9 if quick else 999
        rows += [
            ("source", "ancestral, two passes", steps, lambda diff, y: source_way(diff, y, steps))
        ]
    return rows


@torch.no_grad()
def measure(run, diff, y, chunk: int, seed: int = 0) -> dict:
    "Samples, and how often the network was called for a chunk."
    calls = []
    hook = diff.ema_model.net.register_forward_hook(lambda *_: calls.append(1))
    diff.ema_model.eval()
    try:
        torch.manual_seed(seed)
        images = torch.cat([run(diff, part).float().cpu() for part in y.split(chunk)])
        return dict(images=images, calls=len(calls) // len(y.split(chunk)))
    finally:
        hook.remove()


def timed(runs: dict, diff, y, rounds: int) -> dict:
    "Seconds for one chunk of labels."
    return race(
        {key: lambda run=run: measure(run, diff, y, len(y)) for key, run in runs.items()}, rounds
    )


def table(rows: list) -> str:
    from quality import accuracy_cell, explained, fid_cell

    source = next((r["seconds"] for r in rows if r["library"] == "source"), None)  # of a chunk
    order = ["ddpm_course", "denoising_diffusion_pytorch", "diffusers", "source"]
    rows = sorted(
        rows,
        key=lambda r: (
            order.index(r["library"]),
            [s for s in dict.fromkeys(r["sampler"] for r in rows)].index(r["sampler"]),
            r["steps"],
        ),
    )
    groups = {}
    for r in rows:
        groups.setdefault(tuple(r[k] for k in KEY), []).append(r)
    clocks = dict.fromkeys(
        f"{t['threads']} thread{'s' * (t['threads'] > 1)}, {t['date']}"
        for r in rows
        for t in [r["timed"]]
    )
    lines = [
        [
            r["library"],
            r["sampler"],
            r["evaluations"],
            fid_cell(found, "classifier"),
            fid_cell(found, "random"),
            accuracy_cell(found),
            r["seconds"] * 1000 / r["chunk"],
            source and f"{short(source / r['seconds'])}x",
        ]
        for found in groups.values()
        for r in found[:1]
    ]
    header = [
        "library",
        "sampler",
        "evaluations",
        "FID, classifier's features",
        "FID, random features",
        "read as asked",
        "seconds for 1,000 samples",
        "faster than the source",
    ]
    return (
        markdown(header, lines)
        + f"\n\nWeights: {', '.join(sorted({r['weights'] for r in rows}))}; guidance {SCALE:g}; a"
        " guided evaluation is one doubled batch and counts once. ± is half the range over"
        f" {max(map(len, groups.values()))} seeds of ours; the others have one."
        f" {explained(rows)}Seconds: median of {rows[0]['rounds']} rounds of a race,"
        f" {rows[0]['chunk']} images of every row in turn, on {' and '.join(clocks)}."
        f" {measured_on(rows, threads=False)}"
    )


def main(argv=None):
    groups = ["ours", "denoising_diffusion_pytorch", "diffusers", "source"]
    # chunk as Diffusion.sample cuts, so that a call is an evaluation
    p = parser(__doc__, n=1000, chunk=128, rounds=3)
    some_of(p, groups, "GROUP")
    several(p, "--seeds", [0, 1, 2], "of ours; the others have the first")
    p.add_argument(
        "--time", action="store_true", help="draw nothing anew: only time the rows that are there"
    )
    p.add_argument("--run", help="run folder; default: the mnist weights that ship")
    args = begin(p.parse_args(argv))
    from quality import Quality, data

    from ddpm_course.core import keep_memory
    from ddpm_course.training import Diffusion, load_pretrained

    keep_memory()  # as the command line does
    dls = data(args)
    if args.quick:
        args.n, args.rounds, args.seeds = 12, 1, args.seeds[:2]
        diff = Diffusion(shape=dls.shape, num_classes=dls.num_classes, device=args.device)
        diff.fit(
            dls, loggers=[], progress=False, total_steps=3, precision="float32", channels_last=False
        )
    else:
        diff = (
            Diffusion.load(args.run, device=args.device)
            if args.run
            else load_pretrained("mnist", device=args.device)
        )
    if diff.process.config != dict(name="ddpm", T=1000, schedule="cosine"):
        raise SystemExit(
            f"the peers are set up for the cosine schedule, T = 1000, not {diff.process.config}"
        )
    results = Results("samplers", args, (*KEY, "seed"))
    quality = None if args.time else Quality(dls, args)
    y = labels(args.n, dls.num_classes)
    weights = (
        "three steps of training"
        if args.quick
        else Path(args.run).name if args.run else "mnist, as shipped"
    )
    planned = plan(args.only, args.quick)
    for *key, run in [] if args.time else planned:
        for seed in args.seeds if key[0] == "ddpm_course" else args.seeds[:1]:
            done = measure(run, diff, y, args.chunk, seed)
            results.add(
                **dict(zip(KEY, key)),
                seed=seed,
                evaluations=key[-1] if key[0] == "source" else done["calls"],
                calls=done["calls"],
                weights=weights,
                **quality(done["images"], y),
            )
    there = {tuple(r[k] for k in KEY) for r in results.rows}
    runs = {tuple(key): run for *key, run in planned if tuple(key) in there}
    timed(dict(list(runs.items())[:1]), diff, y[: args.chunk], 1)  # warm-up
    results.update(
        KEY,
        {
            key: dict(
                seconds=s, chunk=min(args.chunk, args.n), rounds=args.rounds, timed=results.run
            )
            for key, s in timed(runs, diff, y[: args.chunk], args.rounds).items()
        },
    )
    print(table(results.rows), results.path, sep="\n\n")


if __name__ == "__main__":
    main()
