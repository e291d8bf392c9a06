"""How long until something happens: the import of ddpm_course.training, and every lesson.

Imports, after that of torch, are timed in fresh processes, median of several. A lesson is run in
the smallest tier, as the tests run it, by nbdev_test, alone, on one thread; the time includes
starting Python.

    python benchmarks/start_up.py [--rounds 7] [--lessons nbs/02_forward.ipynb ...]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench import HERE, Results, begin, markdown, measured_on, parser, short

IMPORT = (
    "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import"
    " ddpm_course.training; print(b - a, time.perf_counter() - b)"
)


def imports(rounds: int) -> dict:
    "Median seconds to import torch, and to import the course's training after it."
    found = [
        [
            float(v)
            for v in subprocess.run(
                [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True
            ).stdout.split()
        ]
        for _ in range(rounds + 1)
    ]
    # the first reads the files from disk
    torch_s, ours_s = (statistics.median(v) for v in zip(*found[1:]))
    return dict(torch=torch_s, ddpm_course=ours_s)


def lesson(path: Path) -> float:
    "Seconds that nbdev_test takes for one notebook."
    env = {k: v for k, v in os.environ.items() if k != "DDPM_COURSE_TIER"} | dict(
        OMP_NUM_THREADS="1", WANDB_MODE="offline", WANDB_SILENT="true"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [Path(sys.executable).parent / "nbdev_test", "--path", path, "--n_workers", "1"],
        cwd=HERE.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{path.name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return time.perf_counter() - start


def table(rows: list) -> str:
    first = next((r for r in rows if r["what"] == "import"), None)
    seconds = {
        r["what"]: r["seconds"]
        for r in sorted(rows, key=lambda r: r["what"])
        if r["what"] != "import"
    }
    lessons = {k: v for k, v in seconds.items() if k == "index" or k < "80"}
    text = (
        f"`import ddpm_course.training` takes {short(first['ddpm_course'], 2)} s after the"
        f" {short(first['torch'], 2)} s of `import torch`.\n\n"
        if first
        else ""
    )
    if seconds:
        more = [
            [
                f"{len(seconds) - len(lessons)} reference notebooks",
                sum(seconds.values()) - sum(lessons.values()),
            ]
        ] * (len(lessons) < len(seconds))
        total = [["all", sum(seconds.values())]] * (len(seconds) > 1)
        text += (
            "<details><summary>All notebooks in the smallest tier, one after the other:"
            f" {short(sum(seconds.values()))} s</summary>\n\n"
        )
        text += (
            markdown(
                ["notebook, smallest tier, one thread, with the start of Python", "seconds"],
                [*lessons.items(), *more, *total],
            )
            + "\n\n</details>\n\n"
        )
    return text + measured_on(rows, threads=False)


def notebook(text: str) -> Path:
    "Type of --lessons: nbdev_test is content with a file that does not exist."
    if not text.endswith(".ipynb") or not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no notebook {text}")
    return Path(text)


def main(argv=None):
    p = parser(__doc__, rounds=7)
    p.add_argument(
        "--lessons", nargs="*", type=notebook, metavar="NOTEBOOK", help="only these (all in nbs/)"
    )
    args = begin(p.parse_args(argv))
    args.threads = 1  # whatever was asked for
    if args.quick:
        args.rounds, args.lessons = 1, args.lessons or []
    results = Results("start_up", args, ("what",))
    results.add(what="import", **imports(args.rounds))
    for path in (
        sorted((HERE.parent / "nbs").glob("*.ipynb")) if args.lessons is None else args.lessons
    ):
        results.add(what=path.stem, seconds=lesson(path.resolve()))
    print(table(results.rows), results.path, sep="\n\n")


if __name__ == "__main__":
    main()
