"""Train the models that ship, from the recipes below, and write them with their manifest.

usage: python tools/weights.py NAME...          (make weights NAME=mnist)

NAME `lessons` trains nothing: it takes what the lessons kept in the course's cache folder when they
were run to the end in the cpu tier (make outputs), so that a learner who skips a training cell has
weights. Of 06c's thirteen networks only the two main ones are taken, and not 08's, whose model
ships already.

A training that was interrupted goes on from its last checkpoint in runs/weights-NAME-KEY, unless
the recipe or the commit has changed since; a training that is done leaves no such folder. The
classifiers come first: a model's metrics are what the classifier of its data set reads. Everything
is seeded, precision and layout are part of the recipe: the same machine with as many threads gives
the same weights. They are those of a commit, so the code must not differ from it (--dirty trains
all the same, and the manifest shows a plus).

--measure trains nothing: it measures shipped models anew, where judge or floor have changed since,
and says so in their entries.
"""

import argparse
import hashlib
import re
import shutil
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch

from ddpm_course import __version__
from ddpm_course.checkpoint import read_json, write_json
from ddpm_course.core import cache_folder, choose, default_device
from ddpm_course.data import get_dls
from ddpm_course.evaluation import test_accuracy, train_classifier
from ddpm_course.pretrained import manifest, read_pretrained, weights_folder, write_pretrained
from ddpm_course.training import Diffusion, load_pretrained

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from bench import commit, labels  # noqa: E402

RUNS = ROOT / "runs"
DATA = dict(digits=dict(img_size=16), shapes=dict(img_size=32), mnist=dict(img_size=32))
EPOCHS = dict(digits=100, shapes=4, mnist=4)  # passes over the training split
# what two CPU cores chose by timing; left to timing, the weights would hang on it
TRAINING = dict(precision="bfloat16", channels_last=False)
# what decides about weights and metrics
CODE = ("ddpm_course/*.py", "tools/weights.py", "benchmarks/quality.py")
LEFT_OUT = re.compile(r"08-|06c-(?!(cut-UNet|LightUNet)-0)")  # 08: load_pretrained has it
SEED, SAMPLES, STEPS, GUIDANCE = 0, 1000, 20, 2.0


def facts(name: str, at: str, metrics: dict, **more) -> dict:
    device = default_device()
    return dict(
        command=f"make weights NAME={name}",
        seed=SEED,
        **more,
        date=date.today().isoformat(),
        commit=at,
        device=(
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"{device.type}, {torch.get_num_threads()} threads"
        ),
        versions=dict(ddpm_course=__version__, torch=torch.__version__),
        metrics={k: round(v, 4) for k, v in metrics.items()},
    )


def run_folder(data: str, at: str) -> Path:
    """Where a training is kept until it is done: another recipe or commit has another one, so that
    nothing old goes on as if it were new."""
    key = hashlib.sha256(repr((DATA[data], EPOCHS[data], TRAINING, SEED, at)).encode()).hexdigest()[
        :8
    ]
    return RUNS / f"weights-{data}-{key}"


def classifier(data: str, at: str):
    dls = get_dls(data, batch_size=128 if data != "digits" else 32, **DATA[data])
    start, epochs = time.perf_counter(), 60 if data == "digits" else 4
    net = train_classifier(dls, epochs=epochs)
    training = dict(
        seconds=round(time.perf_counter() - start),
        precision="float32",
        channels_last=False,
        total_steps=epochs * len(dls.train),
    )
    config = dict(shape=list(dls.shape), num_classes=dls.num_classes, classes=dls.classes)
    return (
        net.state_dict(),
        config,
        facts(f"classifier-{data}", at, dict(test_accuracy=test_accuracy(net, dls)), **training),
    )


def measured(diff, dls) -> dict:
    "Metrics of a model, with judge and floor of the benchmarks."
    from quality import Quality

    y = labels(SAMPLES, dls.num_classes)
    quality = Quality(dls, SimpleNamespace(quick=False, device=default_device()))
    found = quality(diff.sample(y, cfg_scale=GUIDANCE, n_steps=STEPS, seed=SEED), y)
    return dict(
        label_accuracy=found["accuracy"],
        fid=found["fid_classifier"],
        fid_of_real_images=found["floor_classifier"],
        judge_accuracy=test_accuracy(quality.judge, dls),
    )


def again(data: str, at: str) -> dict:
    "The entry of a model that ships, with new metrics; its weights stay."
    entries = manifest()
    entry = entries[data]
    numbers = measured(load_pretrained(data), get_dls(data, batch_size=32, **DATA[data]))
    entry["metrics"] |= {k: round(v, 4) for k, v in numbers.items()}
    entry["measured"] = dict(date=date.today().isoformat(), commit=at, torch=torch.__version__)
    write_json(weights_folder() / "manifest.json", entries)
    return entry


def diffusion(data: str, at: str):
    dls = get_dls(data, batch_size=32, **DATA[data])
    run, start = run_folder(data, at), time.perf_counter()
    diff = Diffusion(shape=dls.shape, num_classes=dls.num_classes, classes=dls.classes, seed=SEED)
    clock = run / "seconds.json"  # of the parts before an interruption, too
    before = read_json(clock)["seconds"] if clock.exists() else 0.0
    try:
        diff.fit(dls, epochs=EPOCHS[data], run=run, resume=True, wandb=False, **TRAINING)
    finally:
        seconds = before + time.perf_counter() - start
        if run.exists():
            write_json(clock, dict(seconds=seconds))
    numbers = measured(diff, dls) | dict(valid_loss=diff.history[-1]["valid_loss"], steps=diff.step)
    training = {k: getattr(diff.settings, k) for k in ("precision", "channels_last", "total_steps")}
    return (
        diff.ema_model.state_dict(),
        diff.config,
        facts(data, at, numbers, seconds=round(seconds), **training),
    )


def lessons(shelf: Path, into: Path, at: str):
    "Copy what lessons kept into the package. How long they trained is not known here."
    shipped = manifest(into)
    for name, entry in manifest(shelf).items():
        if LEFT_OUT.match(name) or shipped.get(name, {}).get("sha256") == entry["sha256"]:
            continue
        _, weights = read_pretrained(name, shelf)
        about = facts(name, at, {}) | dict(
            command=f"make outputs NB='nbs/{name.split('-')[0]}_*.ipynb'",
            seed=entry["config"]["seed"],
        )
        new = write_pretrained(name, weights, entry["config"], into, **about)
        print(f"{into / new['file']}: {new['bytes'] / 2**20:.2f} MB")


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help=f"some of {', '.join(DATA)}, {', '.join(f'classifier-{d}' for d in DATA)}; or lessons",
    )
    p.add_argument("--dirty", action="store_true", help="although the code differs from its commit")
    p.add_argument(
        "--measure", action="store_true", help="train nothing, measure the shipped models anew"
    )
    # before anything long: by its end files may have changed
    args, at = p.parse_args(argv), commit(*CODE)
    recipes = {f"classifier-{d}": (classifier, d) for d in DATA} | {d: (diffusion, d) for d in DATA}
    try:
        jobs = (
            []
            if args.names == ["lessons"]
            else [choose(name, recipes, "model") for name in args.names]
        )
    except ValueError as e:
        p.error(str(e))
    if at.endswith("+") and not args.dirty:
        p.error(
            f"the code differs from its commit {at[:-1]}: commit it first, so that the manifest can"
            " say what made the weights (or --dirty)"
        )
    if args.measure:
        if not set(args.names) <= set(DATA):
            p.error(f"--measure is for {', '.join(DATA)}")
        for name in args.names:
            print(name, again(name, at)["metrics"])
        return
    if not jobs:
        return lessons(cache_folder() / "kept" / "cpu", weights_folder() / "lessons", at)
    for name, (make, data) in zip(args.names, jobs):
        weights, config, about = make(data, at)
        entry = write_pretrained(name, weights, config, **about)
        if make is diffusion:
            shutil.rmtree(run_folder(data, at), ignore_errors=True)
        print(
            f"{weights_folder() / entry['file']}: {entry['bytes'] / 2**20:.2f} MB,"
            f" {entry['metrics']}"
        )
    print(f"{len(manifest())} models in the manifest")


if __name__ == "__main__":
    main()
