"""How good are the images after a minute of training, and after five? Ours against others.

All train on the same images of MNIST (32x32) on the same machine. The clock counts what somebody
waits for: reading the data, building the model, choosing precision and memory layout, warming up,
making batches, validating. It does not count imports, and it stops for sampling and judging.

The learning rate of ours falls at the end, so every budget is a training of its own; so is it with
the source's one cycle. The
other peers have a constant learning rate, so that one long training passes through all budgets.

    python benchmarks/time_to_quality.py
        all rows
    python benchmarks/time_to_quality.py --only ours --budgets 60 --seeds 1
        one row
    python benchmarks/time_to_quality.py --only diffusers --until-quality
        goes on to 30 minutes, or to the quality of ours at 300 s

Quality depends on the number of images, not on the clock. So on a machine that does not stay quiet
for hours, time the peers for a minute each (--budgets 60), then let `--by-images --budgets 300
--until-quality` train for the images that this speed gives. Ours is planned at its start; where a
machine changed its speed on the way, `--only ours --by-images` trains again, for exactly the
seconds of the budget at the median speed of the rows that the clock measured. A row by images keeps
what the clock measured, as `clock`.
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
    over_seeds,
    parser,
    several,
    short,
    some_of,
)

NAMES = dict(
    ours="ddpm_course, light network",
    source="the source's network, as the source trains it",
    denoising_diffusion_pytorch="denoising_diffusion_pytorch, dim 32",
    diffusers="diffusers UNet2DModel 32/64/64",
)
CYCLE = "ours, one cycle"  # rows of --plan one_cycle
ROWS = {"ours": NAMES["ours"], CYCLE: f"{NAMES['ours']}, AdamW and one cycle"} | NAMES
TARGET, GOAL = 300, 2.0  # seconds and guidance of ours that the peers are measured against
COUNTED = "The rows of {} were trained for the images that their speed by the clock gives{}. "
# of rows that do not know how long their start took
LATE = " (the peers' start counted in, so up to a tenth too few)"
LONG = (600, 1200, 1800)  # seconds at which a peer is looked at again


class Bench:
    "What all rows share: data, judge, results."

    def __init__(self, args):
        from quality import Quality, data

        start = time.perf_counter()
        self.dls = data(args)
        self.loading, self.args = 0 if args.quick else time.perf_counter() - start, args
        self.quality = Quality(self.dls, args)
        self.dls.to(args.device)
        self.results = Results(
            "time_to_quality", args, ("model", "budget", "seed", "guidance", "lr")
        )

    def judged(self, images, asked, few: int) -> list:
        "Quality of all samples, and of the first few of them: FIDs compare only at equal numbers."
        return [
            self.quality(images[:n], None if asked is None else asked[:n])
            for n in sorted({len(images), min(few, len(images))})
        ]

    def save(
        self,
        model: str,
        budget: int,
        images,
        asked,
        sampling: float,
        told: dict | None = None,
        **row,
    ):
        "A row by the clock; or by images, with what the clock had told."
        by = dict(by="images", clock=told) if told else dict(by="clock")
        self.results.add(
            model=model,
            budget=budget,
            **row,
            **by,
            sampling=sampling,
            quality=self.judged(images, asked, self.args.samples_slow),
        )


def timed(sample, y):
    start = time.perf_counter()
    images = sample(y).float().cpu()
    return images, time.perf_counter() - start


def ours(bench: Bench, budget: int, seed: int):
    from ddpm_course.training import Diffusion

    args, dls = bench.args, bench.dls
    dls.train.batch_size = 32
    start = time.perf_counter() - bench.loading
    what = dict(shape=dls.shape, num_classes=dls.num_classes, device=args.device, seed=seed)
    # what `ddpm_course train` does with minutes, and without
    diff = Diffusion(**what, times="logit_normal" if args.plan == "hold" else None)
    if args.by_images:
        clocks = {
            (r["guidance"], r["seed"]): clock(r)
            for r in bench.results.rows
            if (r["model"], r["budget"]) == ("ours", budget)
        }
        if missing := [scale for scale in args.guidance if (scale, seed) not in clocks]:
            raise SystemExit(
                f"--by-images needs rows of ours at {budget} s (seed {seed}, guidance"
                f" {', '.join(map(str, missing))}), timed on a quiet machine first: --only ours"
                f" --budgets {budget}"
            )
        rate = statistics.median(c["seen"] / c["seconds"] for c in clocks.values())
        steps = max(round(budget * rate / dls.train.batch_size), 1)
        length = dict(total_steps=steps, plan=args.plan)
        if args.plan == "hold":
            length |= dict(optimizer="muon", beta2=0.99)  # as by the clock
    else:
        length = dict(minutes=(budget - (time.perf_counter() - start)) / 60)
    diff.fit(dls, **length, loggers=[], progress=False)
    found = diff.settings
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    seconds, trainer = time.perf_counter() - start, diff.trainer
    seen = trainer.epoch * len(dls.train.labels) + trainer.seen
    if not args.by_images and not args.quick and abs(seconds / budget - 1) > 0.05:
        print(
            f"  seed {seed} trained for {seconds:.0f} s of {budget}: the machine changed its speed;"
            " --only ours --by-images mends that"
        )
    y = labels(args.n, dls.num_classes)
    for scale in args.guidance:
        images, sampling = timed(
            lambda y: diff.sample(
                y, cfg_scale=scale, n_steps=20, seed=seed, precision=found.precision
            ),
            y,
        )
        told = clocks[scale, seed] if args.by_images else None
        if told:
            seconds, sampling = seen / rate, told["per_sample"] * len(y)
        bench.save(
            "ours" if args.plan == "hold" else CYCLE,
            budget,
            images,
            y,
            sampling,
            told,
            seed=seed,
            guidance=scale,
            lr=found.lr,
            seconds=seconds,
            parameters=sum(p.numel() for p in diff.model.parameters()),
            seen=seen,
            recipe=(
                f"{found.optimizer}, {args.plan.replace('_', ' ')} {found.lr:g}, batch 32,"
                f" {diff.config['param']['name']},"
                f" {diff.process.config['schedule']}, {found.precision},"
                f" {'channels_last' if found.channels_last else 'contiguous'}; Euler, 20 steps, in"
                " the same precision"
            ),
        )


def passes(train):
    while True:
        yield from train


def train(
    peer,
    batches,
    seconds: float,
    budget: float,
    device,
    rate: float | None = None,
    begun: float = 0,
) -> float:
    """Steps until the clock says `budget`, or for the images that a quiet machine reaches in it at
    `rate` after `begun` seconds; goes on where the last call stopped."""
    start = time.perf_counter() - seconds

    def share():
        return (begun + peer.seen / rate if rate else seconds) / budget

    while share() < 1 or not peer.seen:
        x, y = next(batches)
        if peer.whole:
            peer.at(share())
        peer.step(x.to(device), y.to(device))  # reads its loss, so that a GPU is waited for
        peer.seen += len(x)
        seconds = time.perf_counter() - start
    return seconds


def clock(row: dict) -> dict:
    "What was measured by the clock, in this row or in the one that it was counted from."
    if "clock" in row or row.get("by") == "images":
        return row.get("clock")
    return dict(
        seen=row["seen"],
        seconds=row["seconds"],
        begun=row.get("begun", 0),
        per_sample=row["sampling"] / max(q["n"] for q in row["quality"]),
        run=row["run"],
    )


def quiet(rows: list, name: str, lr) -> dict:
    "What the clock said about a peer; SystemExit if it never did."
    found = next((c for r in rows if (r["model"], r["lr"]) == (name, lr) and (c := clock(r))), None)
    if found is None:
        raise SystemExit(
            f"--by-images needs a row of {name} that was timed on a quiet machine first: --only"
            f" {name} --budgets 60"
        )
    return found


def peer_rows(bench: Bench, name: str, budgets: list, seed: int):
    from peers import PEERS

    args, dls, peer = bench.args, bench.dls, None
    y = labels(args.samples_slow, dls.num_classes)
    for budget in budgets:
        if peer is None or peer.whole:
            if peer is None:
                # imports its library before the clock starts
                PEERS[name](dls.shape, dls.num_classes, args.device)
            torch.manual_seed(seed)
            start = time.perf_counter() - bench.loading
            peer = PEERS[name](dls.shape, dls.num_classes, args.device, args.lr)
            dls.train.batch_size, batches = peer.batch, passes(dls.train)
            seconds = begun = time.perf_counter() - start
        told = quiet(bench.results.rows, name, args.lr) if args.by_images else None
        rate = told and told["seen"] / (told["seconds"] - told["begun"])
        if told:
            begun = told["begun"]
        seconds = train(peer, batches, seconds, budget, args.device, rate, begun)
        images, sampling = timed(peer.sample, y)
        if told:
            seconds, sampling = begun + peer.seen / rate, told["per_sample"] * len(y)
        bench.save(
            name,
            budget,
            images,
            y if peer.conditional else None,
            sampling,
            told,
            seed=seed,
            guidance=None,
            lr=args.lr,
            seconds=seconds,
            begun=begun,
            parameters=peer.parameters(),
            seen=peer.seen,
            recipe=peer.recipe,
        )
        if args.until_quality and reached(
            rows := bench.results.rows,
            [r for r in rows if (r["model"], r["lr"]) == (name, args.lr)],
        ):
            return


def fid_few(row: dict, n: int):
    return next((q["fid_classifier"] for q in row["quality"] if q["n"] == n), None)


def target(rows: list, n: int):
    "FID of ours at 300 s with n samples, mean over the seeds; None if it was not measured."
    found = [
        fid_few(r, n)
        for r in rows
        if r["model"] == "ours" and r["budget"] == TARGET and r["guidance"] == GOAL
    ]
    return statistics.mean(found) if found and None not in found else None


def reached(rows: list, peer: list):
    "Seconds after which a peer was as good as ours at 300 s, None if it was not (yet)."
    for r in sorted(peer, key=lambda r: r["budget"]):
        goal = target(rows, r["quality"][0]["n"])
        if goal is not None and r["quality"][0]["fid_classifier"] <= goal:
            return r["budget"]


def verdict(rows: list, name: str, lr=None) -> str:
    peer = [r for r in rows if r["model"] == name and r["lr"] == lr]
    if name in ("ours", CYCLE) or target(rows, peer[0]["quality"][0]["n"]) is None:
        return ""
    longest = max(r["budget"] for r in peer)
    return (
        f"{reached(rows, peer)} s"
        if reached(rows, peer)
        else f"not in {short(longest / 60, 2)} min" if longest >= TARGET else ""
    )


def table(rows: list) -> str:
    from quality import accuracy_cell, explained, fid_cell

    groups = {}
    for r in sorted(
        rows, key=lambda r: (r["budget"], list(ROWS).index(r["model"]), -(r["guidance"] or 0))
    ):
        lr = None if r["model"] in ("ours", CYCLE) else r["lr"]
        groups.setdefault((r["budget"], r["model"], r["guidance"], lr), []).append(r)
    lines = []
    for (_, name, scale, lr), found in groups.items():
        best = [r["quality"][-1] for r in found]
        lines.append(
            [
                ROWS[name]
                + (f", guidance {scale:g}" if scale else "")
                + (f", learning rate {lr:g}" if lr else ""),
                over_seeds([r["seconds"] for r in found]),
                found[0]["parameters"],
                int(statistics.mean(r["seen"] for r in found)),
                best[0]["n"],
                fid_cell(best, "classifier"),
                fid_cell(best, "random"),
                accuracy_cell(best),
                over_seeds([r["sampling"] * 1000 / q["n"] for r, q in zip(found, best)]),
                verdict(rows, name, lr),
            ]
        )
    counted = {"ours": [], "the peers": []}  # by images
    for r in rows:
        if r.get("by") == "images":
            counted["ours" if r["model"] in ("ours", CYCLE) else "the peers"].append(r)
    who = " and ".join(
        f"{', '.join(f'{b:,}' for b in sorted({r['budget'] for r in found}))} s of {name}"
        for name, found in counted.items()
        if found
    )
    late = any("begun" not in r for r in counted["the peers"])
    header = [
        "model",
        "seconds of training",
        "parameters",
        "images seen",
        "samples",
        "FID, classifier's features",
        "FID, random features",
        "read as asked",
        "seconds for 1,000 samples",
        f"as good as ours at {TARGET} s",
    ]
    recipes = [
        f"* {ROWS[m]}: {next(r['recipe'] for r in rows if r['model'] == m)}"
        for m in ROWS
        if any(r["model"] == m for r in rows)
    ]
    return "\n".join(
        [
            markdown(header, lines),
            "",
            (
                f"{explained([q for r in rows for q in r['quality']])}± is half the range over"
                f" {len({r['seed'] for r in rows if r['model'] == 'ours'})} seeds of ours; the"
                f" others have one seed. {COUNTED.format(who, LATE * late) if who else ''}The last"
                f" column compares FIDs of {min(r['quality'][0]['n'] for r in rows)} samples, of"
                f" ours with guidance {GOAL:g}, not its best. {measured_on(rows)}"
            ),
            "",
            *recipes,
        ]
    )


def main(argv=None):
    p = parser(__doc__, n=1000)
    some_of(p, NAMES, "MODEL")
    several(p, "--budgets", [60, TARGET], "seconds of training", unit="S")
    several(p, "--seeds", [0, 1, 2], "of ours; the peers have the first")
    several(p, "--guidance", [2.0, 1.5, 1.0], "of ours", float, "G")
    p.add_argument(
        "--samples-slow",
        type=int,
        metavar="N",
        help="samples of the peers (200; on a GPU as many as of ours)",
    )
    p.add_argument("--lr", type=float, help="another learning rate for the peers")
    p.add_argument(
        "--until-quality",
        action="store_true",
        help=(
            "peers go on to 30 minutes, looked at every 10, or until they are as good as ours at"
            " 300 s"
        ),
    )
    p.add_argument(
        "--plan",
        choices=["hold", "one_cycle"],
        default="hold",
        help="learning rate of ours: as for minutes; or one cycle, with --by-images (hold)",
    )
    p.add_argument(
        "--by-images",
        action="store_true",
        help=(
            "train for as many images as a row that the clock measured says that a quiet machine"
            " reaches: for a busy one"
        ),
    )
    args = begin(p.parse_args(argv))
    if args.plan == "one_cycle" and not args.by_images:
        p.error("one cycle must know its steps: --plan one_cycle goes with --by-images")
    if args.quick:
        args.budgets, args.seeds, args.n, args.samples_slow = [1], [0], 12, 6
    args.samples_slow = args.samples_slow or (args.n if args.device.type == "cuda" else 200)
    bench = Bench(args)
    for name in args.only:
        if name == "ours":
            for budget in args.budgets:
                for seed in args.seeds:
                    ours(bench, budget, seed)
        else:
            from peers import PEERS

            more = (
                ()
                if args.quick or not args.until_quality
                else LONG[-1:] if PEERS[name].whole else LONG
            )
            peer_rows(bench, name, [*args.budgets, *more], args.seeds[0])
    print(table(bench.results.rows), bench.results.path, sep="\n\n")


if __name__ == "__main__":
    main()
