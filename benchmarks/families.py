"""Five families of diffusion models: the same network, the same images, as many training steps.

A family is a process (what noise does to an image), a prediction (what the network says about it)
and the times at which the one is trained and the other sampled. All else is shared: network, loop,
optimizer, seed, Euler's rule, the noise that samples start from. The steps are those that the
network makes in --seconds, timed once, before the first training: since the network is the same, so
is a step, and a machine that is busy for a while is unfair to nobody. Nothing is
guided (--guidance 1).

    python benchmarks/families.py
        all five, MNIST, 240 seconds each
    python benchmarks/families.py --only flow flow:x0 --seconds 60
        one of them with two predictions, a minute each
    python benchmarks/families.py --picture assets/families.png
        also the five side by side, a row each, from the same noise
    python benchmarks/families.py --data cifar10 --device cuda
        on a GPU

Trained models are kept in --runs, and found there when the script is run again: the numbers can be
measured anew without training.
"""

import ast
import inspect
import io
import json
import statistics
import sys
import textwrap
import time
import tokenize
from pathlib import Path

import torch
from bench import (
    HERE,
    Results,
    above_0,
    begin,
    labels,
    markdown,
    measured_on,
    over_seeds,
    parser,
    several,
)

NAMES = dict(
    ddpm="DDPM, cosine schedule",
    vp="VP, the SDE of DDPM",
    ve="VE, the SDE of NCSN",
    edm="EDM",
    flow="flow matching",
)
# of the process, where the default is not what one would train
SETTINGS = dict(ddpm=dict(schedule="cosine"))
SAYS = dict(
    eps="the noise",
    x0="the clean image",
    v="v = alpha eps - sigma x0",
    score="sigma times the score",
    velocity="the velocity eps - x0",
    edm="EDM's mix of image and noise",
)


def chosen(name: str) -> tuple:
    """'flow:x0' is a family and what its network predicts; 'flow' takes what `ddpm_course train
    --process flow` does; ValueError."""
    from ddpm_course.core import choose
    from ddpm_course.model import check_param, make_process

    family, _, predict = name.partition(":")
    choose(family, NAMES, "family")
    return family, check_param(make_process(family), predict or None)


# ---- what a family costs in code
def code_lines(thing) -> int:
    "Lines of a class or function that hold code: no docstrings, no comments, no blank lines."
    source = textwrap.dedent(inspect.getsource(thing))
    nodes = [
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(n) is not None
    ]
    docs = {(n.body[0].lineno, n.body[0].col_offset) for n in nodes}
    nothing = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    tokens = [
        t
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type not in nothing and t.start not in docs
    ]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)})


def family_lines(family: str, predict: str) -> tuple:
    """Lines of the process (its class, and the functions of its module that it calls), lines of the
    prediction."""
    from ddpm_course.denoiser import PARAMS, edm_param
    from ddpm_course.model import make_process

    cls = type(make_process(family))
    module = sys.modules[cls.__module__]
    used = {
        n.id
        for n in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
        if isinstance(n, ast.Name)
    }
    helpers = [
        f
        for k in sorted(used)
        if inspect.isfunction(f := getattr(module, k, None)) and f.__module__ == cls.__module__
    ]
    return code_lines(cls) + sum(map(code_lines, helpers)), code_lines(
        (PARAMS | dict(edm=edm_param))[predict]
    )


# ---- training
class Bench:
    "What all families share: data, judge, results, the recipe."

    def __init__(self, args):
        from quality import Quality, data

        self.args, self.dls, self.budget = args, data(args), 0 if args.steps else args.seconds
        self.quality, self.dls.train.batch_size = Quality(self.dls, args), 32
        self.dls.to(args.device)
        self.results = Results(
            "families",
            args,
            ("data", "family", "predict", "budget", "seed", "guidance", "evaluations"),
        )
        self.recipe = self.earlier() or self.timed()

    def earlier(self):
        """The recipe of the families that were measured before with this budget, so that those that
        are added get the same."""
        args, found = self.args, (r for r in self.results.rows if r.get("recipe"))
        return next(
            (
                r["recipe"]
                for r in found
                if (r["data"], r["budget"]) == (args.data, self.budget)
                and args.steps in (None, r["recipe"]["total_steps"])
            ),
            None,
        )

    def timed(self) -> dict:
        """Precision, layout and number of steps: what this network does in the budget on this
        machine."""
        from ddpm_course.settings import timings

        diff = self.model("flow", "velocity", 0).prepare(self.dls, total_steps=1)
        a_step = statistics.median(timings(diff.trial(diff.settings), 30))
        steps = self.args.steps or max(int(self.args.seconds / a_step), 1)
        settings = dict(precision=diff.settings.precision)
        return settings | dict(channels_last=diff.settings.channels_last, total_steps=steps)

    def model(self, family: str, predict: str, seed: int):
        from ddpm_course.model import make_process
        from ddpm_course.training import Diffusion

        dls = self.dls
        return Diffusion(
            process=make_process(family, **SETTINGS.get(family, {})),
            param=predict,
            shape=dls.shape,
            num_classes=dls.num_classes,
            device=self.args.device,
            seed=seed,
        )

    def trained(self, family: str, predict: str, seed: int) -> tuple:
        """The model, and the seconds that its training took: from --runs if it is there, or it goes
        on where it was interrupted."""
        from ddpm_course.checkpoint import checkpoints, write_json
        from ddpm_course.training import Diffusion

        folder = (
            self.args.runs
            / f"{self.args.data}-{family}-{predict}-{self.recipe['total_steps']}-{seed}"
        )
        note = folder / "trained.json"
        if note.exists():
            return Diffusion.load(folder, self.args.device), json.loads(note.read_text())
        start, interrupted = time.perf_counter(), bool(checkpoints(folder))
        diff = self.model(family, predict, seed).fit(
            self.dls, run=folder, resume=True, loggers=[], progress=False, **self.recipe
        )
        write_json(
            note,
            dict(
                seconds=None if interrupted else time.perf_counter() - start,
                seen=diff.step * self.dls.train.batch_size,
                parameters=sum(p.numel() for p in diff.model.parameters()),
            ),
        )
        return diff, json.loads(note.read_text())


# ---- numbers
def drawn(diff, y, evaluations: int, args, precision: str, seed: int) -> tuple:
    "Images, seconds, and how often the network was really called for each."
    calls, start = [], time.perf_counter()
    hook = diff.ema_model.net.register_forward_hook(
        lambda net, given, out: calls.append(len(given[0]))
    )
    try:
        images = (
            diff.sample(
                y, n_steps=evaluations, cfg_scale=args.guidance, seed=seed, precision=precision
            )
            .float()
            .cpu()
        )
    finally:
        hook.remove()
    doubled = 1 if args.guidance == 1 else 2  # a guided evaluation is one doubled batch
    return images, time.perf_counter() - start, sum(calls) // (doubled * len(y))


def covered(quality, images) -> dict:
    "Precision and recall against as many test images, in the classifier's features."
    from ddpm_course.evaluation import extract, precision_recall

    n = min(len(images), len(quality.test["classifier"]))
    found = precision_recall(
        extract(quality.nets["classifier"], images)[:n],
        quality.test["classifier"][:n],
        k=min(3, n - 1),
    )
    return dict(precision=found["precision"], recall=found["recall"])


def bits(diff, dls, n: int, evaluations: int = 100):
    """Bits per dimension of n labelled test images: lesson 15's bound by the probability-flow ODE.

    Where the noise is below the network's error, measured on as many training images, the noisy
    image itself is part of the estimate.
    """
    from ddpm_course.core import randn, to_float
    from ddpm_course.likelihood import anchored, bits_per_dim, noise_grid, ode_bound

    def first(split):
        return to_float(split.images[:n].to(diff.device)), split.labels[:n].to(diff.device)

    model, process, g = diff.ema_model.eval(), diff.process, torch.Generator().manual_seed(0)
    x, y = first(dls.train)
    levels = noise_grid(process, 24).flip(0).to(diff.device)  # rising

    def error(t):
        return (
            (model(process.add_noise(x, t, randn(x.shape, g, diff.device)), t, y) - x).pow(2).mean()
        )

    with torch.no_grad():
        errors = torch.stack([error(t.expand(len(x))) for t in levels])
    x, y = first(dls.test)
    denoise = anchored(lambda x, t: model(x, t, y), process, levels, errors)
    nats, _ = ode_bound(denoise, process, x, ts=noise_grid(process, evaluations // 2), generator=g)
    return bits_per_dim(nats, diff.shape).mean().item()


def measure(bench: Bench, family: str, predict: str, seed: int):
    """Train one family, or find it; write a row for each number of evaluations; the first images of
    the last one."""
    args, dls = bench.args, bench.dls
    diff, training = bench.trained(family, predict, seed)
    y = labels(args.n, dls.num_classes)
    shared = dict(
        data=args.data,
        family=family,
        predict=predict,
        budget=bench.budget,
        seed=seed,
        guidance=args.guidance,
        recipe=bench.recipe,
        training=training,
        lines=family_lines(family, predict),
        bits=bits(diff, dls, args.bits),
        bits_n=args.bits,
    )
    for evaluations in args.evaluations:
        images, sampling, called = drawn(
            diff, y, evaluations, args, bench.recipe["precision"], seed
        )
        assert called == evaluations, f"{family}: {called} evaluations, not {evaluations}"
        bench.results.add(
            **shared,
            evaluations=evaluations,
            sampling=sampling,
            **bench.quality(images, y),
            **covered(bench.quality, images),
        )
    return images[: dls.num_classes]


def real(bench: Bench):
    "The row that says what can be reached: real training images in the place of drawn ones."
    from ddpm_course.evaluation import test_accuracy

    args, quality = bench.args, bench.quality
    bench.results.add(
        data=args.data,
        family="real",
        predict=None,
        budget=None,
        seed=None,
        guidance=None,
        evaluations=None,
        n=args.n,
        **{f"{k}_{s}": v for k in ("fid", "floor") for s, v in quality.floor(args.n).items()},
        **covered(quality, quality.real(args.n, torch.Generator().manual_seed(0))),
        accuracy=test_accuracy(quality.judge, bench.dls),
    )


# ---- what is shown
def draw(rows: list, path: Path):
    "A row of images per family, in grey where they are, as small as a PNG can be."
    from PIL import Image

    from ddpm_course.core import grid

    g = grid(torch.cat(rows), len(rows[0]))
    grey = rows[0].shape[1] == 1
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((g[0] if grey else g.permute(1, 2, 0)).numpy()).save(path, optimize=True)


def mean(rows: list, key: str, scale: float = 1.0, digits: int = 3) -> str:
    return over_seeds([scale * r[key] for r in rows if r.get(key) is not None], digits)


def cells(rows: list) -> list:
    "What is measured of images, drawn or real, over the seeds."
    from quality import fid_cell

    return [
        fid_cell(rows, "classifier"),
        fid_cell(rows, "random"),
        *(mean(rows, k, digits=2) for k in ("precision", "recall")),
        f"{mean(rows, 'accuracy', 100)}%",
    ]


def table(rows: list) -> str:
    "One for each data set, budget and guidance."
    kinds = {}
    for r in rows:
        if r["family"] != "real":
            kinds.setdefault((r["data"], r["budget"], r["guidance"]), []).append(r)
    return "\n\n".join(
        (
            f"{data}, {f'{budget} s' if budget else 'steps by hand'}, guidance {scale:g}:\n\n"
            if len(kinds) > 1
            else ""
        )
        + one_table(found, [r for r in rows if (r["data"], r["family"]) == (data, "real")])
        for (data, budget, scale), found in sorted(kinds.items())
    )


def one_table(rows: list, real: list) -> str:
    groups, lines = {}, []
    for r in sorted(
        rows, key=lambda r: (list(NAMES).index(r["family"]), r["predict"], r["evaluations"])
    ):
        groups.setdefault((r["family"], r["predict"]), {}).setdefault(r["evaluations"], []).append(
            r
        )
    for (family, predict), found in groups.items():
        for i, (evaluations, same) in enumerate(found.items()):
            what = [
                NAMES[family],
                SAYS[predict],
                " + ".join(map(str, same[0]["lines"])),
                mean(same, "bits"),
            ]
            lines.append([*(what if i == 0 else [""] * 4), evaluations, *cells(same)])
    lines += [["real training images", "", "", "", "", *cells([r])] for r in real]
    header = [
        "family",
        "the network says",
        "lines of code",
        "bits per dimension",
        "evaluations",
        "FID, classifier's features",
        "FID, random features",
        "precision",
        "recall",
        "read as asked",
    ]
    return f"{markdown(header, lines)}\n\n{footnote(rows)}"


def footnote(rows: list) -> str:
    from quality import floors

    first, seeds = rows[0], len({r["seed"] for r in rows})
    steps = ", ".join(dict.fromkeys(f"{r['recipe']['total_steps']:,}" for r in rows))
    took = [s for r in rows if (s := r["training"]["seconds"])]
    how = [
        f"{first['training']['seen']:,} images",
        *[f"timed as {first['budget']} s, {statistics.mean(took):.0f} s by the clock"]
        * bool(first["budget"] and took),
    ]
    told = (
        f"{first['training']['parameters']:,} parameters, {steps} steps of training each"
        f" ({', '.join(how)}),"
        f" {'one seed' if seeds == 1 else f'{seeds} seeds, ± half their range'}. {first['n']:,}"
        " samples by Euler's rule, one evaluation a step, on each family's own times, guidance"
        f" {first['guidance']:g}, the same start noise. FID, precision and recall against test"
        f" images; FID in brackets in units of its floor, what real images reach: {floors(rows)}."
        " Lines of code: process + prediction, without docstrings and comments; all else is"
        " shared. "
    )
    told += (
        f"Bits per dimension: a bound for {first['bits_n']} test images given their labels, by the"
        " probability-flow ODE, the estimate anchored as in lesson 15. "
    )
    return told + measured_on(rows)


def main(argv=None):
    p = parser(__doc__, n=1000, seconds=240, bits=64)
    p.add_argument(
        "--only",
        nargs="+",
        default=list(NAMES),
        metavar="FAMILY",
        help=(
            f"some of {', '.join(NAMES)}; FAMILY:PREDICTION for another prediction than the"
            " usual one"
        ),
    )
    several(p, "--evaluations", [10, 20, 50], "of the network for a sample", above_0)
    several(p, "--seeds", [0], "each trains a model of its own")
    p.add_argument(
        "--steps",
        type=above_0,
        metavar="N",
        help="of training, in place of those that --seconds gives",
    )
    p.add_argument("--guidance", type=float, default=1.0, metavar="G", help="1: none (1)")
    p.add_argument(
        "--data",
        choices=("mnist", "fashion_mnist", "cifar10"),
        default="mnist",
        metavar="NAME",
        help="mnist, fashion_mnist or cifar10, where they lie already (mnist)",
    )
    p.add_argument("--runs", type=Path, help="folder that keeps the trained models (runs/families)")
    p.add_argument(
        "--picture",
        type=Path,
        help="PNG to write: a row for each family, from the same start noise",
    )
    args = begin(p.parse_args(argv))
    try:
        pairs = [chosen(name) for name in args.only]  # before anything long
    except ValueError as e:
        p.error(str(e))
    if args.quick:
        args.seconds = 1
        args.steps = 3
        args.n = 20
        args.evaluations = [2, 3]
        args.seeds = [0]
        args.bits = 2
    args.runs = args.runs or (
        args.out / "runs" if args.quick else HERE.parent / "runs" / "families"
    )
    bench, pictures = Bench(args), []
    real(bench)
    for family, predict in pairs:
        for seed in args.seeds:
            images = measure(bench, family, predict, seed)
            if seed == args.seeds[0]:
                pictures.append(images)
    if args.picture:
        draw(pictures, args.picture)
    print(
        table(bench.results.rows),
        bench.results.path,
        *[args.picture] * bool(args.picture),
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
