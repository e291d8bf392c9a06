"""What the benchmarks share: their options, how a row of results is written down, and how rows
become a table."""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import date
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LIBRARIES = ("torch", "torchvision", "diffusers", "denoising_diffusion_pytorch")
HELP = dict(
    n="samples that are judged",
    rounds="how often each row is timed; the median counts",
    steps="training steps that are timed in a round",
    batch="images in a batch",
    size="side of the images",
    chunk="samples drawn at a time",
    bits="test images whose bits per dimension are bounded",
    seconds="of training for each row",
)


def above_0(text: str) -> int:
    "Type of an option."
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")


def device(text: str):
    "Type of --device."
    from ddpm_course.core import default_device

    try:
        return default_device(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def parser(doc: str, **defaults) -> argparse.ArgumentParser:
    """The options that every benchmark has, and more whole numbers, of those that HELP explains:
    parser(__doc__, steps=5)."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help=(
            "seconds instead of minutes: shows that it runs, not how fast; writes to a temporary"
            " folder"
        ),
    )
    p.add_argument("--out", type=Path, help="folder for the results (benchmarks/results)")
    p.add_argument("--device", type=device, help="cuda, mps or cpu (the best there is)")
    p.add_argument("--threads", type=above_0, default=2, help="CPU threads (%(default)s)")
    for name, value in defaults.items():
        p.add_argument(
            f"--{name.replace('_', '-')}",
            type=above_0,
            default=value,
            metavar="N",
            help=f"{HELP[name]} (%(default)s)",
        )
    return p


def some_of(p: argparse.ArgumentParser, names, metavar: str):
    "--only: some of the rows; all of them by default."
    p.add_argument(
        "--only",
        nargs="+",
        choices=list(names),
        default=list(names),
        metavar=metavar,
        help=f"some of {', '.join(names)}",
    )


def several(p: argparse.ArgumentParser, name: str, default: list, says: str, kind=int, unit="N"):
    "One number or more; the help says what is meant, and the default."
    usual = " ".join(f"{v:g}" for v in default)
    p.add_argument(
        name, nargs="+", type=kind, default=default, metavar=unit, help=f"{says} ({usual})"
    )


def begin(args):
    "Device and threads as asked for; the folder for results; SystemExit where --run is no run."
    import torch

    from ddpm_course.core import default_device

    if (run := getattr(args, "run", None)) and not any(
        Path(run, f).exists() for f in ("config.json", "manifest.json")
    ):
        raise SystemExit(f"--run {run}: no run folder and no checkpoint is there")
    torch.set_num_threads(args.threads)
    if args.quick:
        warnings.simplefilter("ignore")  # a dozen samples are too few for an FID
    args.device = default_device(args.device)
    if args.out is None:
        args.out = Path(tempfile.mkdtemp(prefix="bench-")) if args.quick else RESULTS
    return args


def machine(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    first = cpu.read_text().split("\n\n")[0].splitlines() if cpu.exists() else []
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first)}
    which = [
        f"{word} {found[k]}"
        for word, k in (("family", "cpu family"), ("model", "model"))
        if k in found
    ]  # a name may stand for many
    return (
        f"{found.get('model name') or platform.processor() or platform.machine()}"
        f" ({', '.join([*which, f'{os.cpu_count()} CPUs'])})"
    )


def commit(*code: str, root: Path = HERE.parent) -> str:
    """The commit that was measured; '+' where these files (none named: the package, the benchmarks)
    have changed since."""

    def git(*args):
        return subprocess.run(
            ["git", "-C", root, *args], capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+"
            if git(
                "status", "--porcelain", "--", *(code or ("ddpm_course/*.py", "benchmarks/*.py"))
            )
            else ""
        )
    except OSError:
        return ""


def versions() -> dict:
    import ddpm_course

    found = {"python": platform.python_version(), "ddpm_course": ddpm_course.__version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


class Results:
    """NAME.json (NAME-gpu.json): a list of rows, each with the circumstances in which it was
    measured. A row replaces the one with its key."""

    def __init__(self, name: str, args, key: tuple):
        self.path = args.out / f"{name}{'-gpu' if args.device.type == 'cuda' else ''}.json"
        self.key = key
        elsewhere = (
            "out",
            "device",
            "threads",
            "quick",
            "only",
            "lessons",
            "row",
            "case",
            "run",
            "runs",
            "picture",
        )  # in the rows, or a path of this machine
        settings = {k: v for k, v in vars(args).items() if k not in elsewhere}
        self.run = dict(
            date=str(date.today()),
            commit=commit(),
            machine=machine(args.device),
            threads=args.threads,
            versions=versions(),
            settings=settings,
        )

    @property
    def rows(self) -> list:
        return load(self.path)

    def add(self, **row):
        "Saved at once: these measurements are long, and any of them may be the last."
        self.write(
            [
                *(r for r in self.rows if any(r.get(k) != row.get(k) for k in self.key)),
                row | dict(run=self.run),
            ]
        )
        print(
            "  "
            + ", ".join(
                f"{k} {short(v)}" for k, v in row.items() if isinstance(v, (str, int, float))
            ),
            flush=True,
        )

    def update(self, key: tuple, values: dict):
        """Rows keep all but what values says for their key: a quality may be from one day, and the
        clock from another."""
        self.write([r | values.get(tuple(r[k] for k in key), {}) for r in self.rows])

    def write(self, rows: list):
        from ddpm_course.checkpoint import write_atomic

        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = ",\n ".join(json.dumps(r) for r in rows)
        write_atomic(self.path, f"[\n {text}\n]\n".encode())


def load(path) -> list:
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else []


def labels(n: int, num_classes: int):
    "What samples are asked for: every class equally often."
    import torch

    return torch.arange(n) % num_classes


def race(runs: dict, rounds: int, clock=None) -> dict:
    """Seconds of each function: one after the other in turn, the median of the rounds, since shared
    machines drift."""
    clock, taken = clock or time.perf_counter, {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            start = clock()
            run()
            taken[key].append(clock() - start)
    return {key: statistics.median(v) for key, v in taken.items()}


def child(script: str, args, *more) -> dict:
    """Run a script in a process of its own, on the same device; the last line that it prints is
    JSON."""
    command = [
        sys.executable,
        script,
        "--device",
        args.device,
        "--threads",
        args.threads,
        "--out",
        args.out,
        *["--quick"] * args.quick,
        *more,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def short(x, digits: int = 3) -> str:
    "A number as a reader wants it: few digits, no exponent."
    if x is None:
        return ""
    if isinstance(x, (str, bool)):
        return str(x)
    if isinstance(x, int):
        return f"{x:,}"
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    x = float(f"{x:.{digits}g}")  # rounded before its digits are counted: 9.996 is 10.0
    return f"{x:,.{max(digits - 1 - math.floor(math.log10(abs(x))), 0)}f}"


def over_seeds(values: list, digits: int = 3) -> str:
    "Mean, and half the range where there are several: 12.3 ± 0.4."
    values = [v for v in values if v is not None]
    if len(values) < 2:
        return short(values[0] if values else None, digits)
    mean, half = short(statistics.mean(values), digits), (max(values) - min(values)) / 2
    decimals = len(mean.partition(".")[2])
    return (  # no more decimals than the mean has
        f"{mean} ±"
        f" {short(half, max(digits - 1, 1)) if half >= 10**-decimals else f'{0:.{decimals}f}'}"
    )


def markdown(header: list, rows: list) -> str:
    lines = [
        header,
        ["---", *["---:"] * (len(header) - 1)],
        *[[short(c) for c in row] for row in rows],
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_on(rows: list, threads: bool = True) -> str:
    "One line: machine, threads (if the table does not say them), versions, dates of all the rows."

    def all_of(values):
        return ", ".join(dict.fromkeys(values))

    runs = [r["run"] for r in rows]
    found = [
        all_of(
            r["machine"] + f", {r['threads']} thread{'s' * (r['threads'] > 1)}" * threads
            for r in runs
        )
    ]
    for name in ("ddpm_course", *LIBRARIES):
        if seen := all_of(r["versions"][name] for r in runs if name in r["versions"]):
            found.append(f"{name} {seen}")
    days = sorted({r["date"] for r in runs})
    return f"*{', '.join(found)}; {' to '.join(dict.fromkeys([days[0], days[-1]]))}.*"
