"""Train the models that ship with the package, from the recipes below, and write them with their manifest.

usage: python tools/weights.py NAME...          (make weights NAME=mnist)

NAME `lessons` trains nothing: it takes what the lessons kept in the course's cache folder when they were run to the end in the cpu tier
(make outputs), so that a learner who skips a training cell has weights. Of 06c's
thirteen networks only the two main ones are taken, and not 08's, whose model ships already.

A training that was interrupted goes on from its last checkpoint in runs/weights-NAME. The classifiers come first: a model's
metrics are what the classifier of its data set reads. Everything is seeded; the same machine gives the same weights.
"""
import argparse
import re
import subprocess
import time
from datetime import date
from pathlib import Path

import torch

from ddpm_course import __version__
from ddpm_course.checkpoint import read_json, write_json
from ddpm_course.core import cache_folder, choose, default_device
from ddpm_course.data import get_dls
from ddpm_course.evaluation import classifier_for, fid, label_accuracy, test_accuracy, train_classifier
from ddpm_course.pretrained import manifest, read_pretrained, weights_folder, write_pretrained
from ddpm_course.training import Diffusion

ROOT = Path(__file__).resolve().parent.parent
DATA = dict(digits=dict(img_size=16), shapes=dict(img_size=32), mnist=dict(img_size=32))
EPOCHS = dict(digits=100, shapes=4, mnist=4)  # passes over the training split
LEFT_OUT = re.compile(r"08-|06c-(?!(cut-UNet|LightUNet)-0)")  # 08: load_pretrained has it
SEED, SAMPLES, STEPS, GUIDANCE = 0, 1000, 20, 2.0


def commit() -> str:
    "What the code was, with a plus where files differ from it."
    def git(*args): return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def facts(name: str, seconds: float, **metrics) -> dict:
    device = default_device()
    return dict(command=f"make weights NAME={name}", seed=SEED, seconds=round(seconds), date=date.today().isoformat(), commit=commit(),
                device=torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads",
                versions=dict(ddpm_course=__version__, torch=torch.__version__), metrics={k: round(v, 4) for k, v in metrics.items()})


def classifier(data: str):
    dls = get_dls(data, batch_size=128 if data != "digits" else 32, **DATA[data])
    start = time.perf_counter()
    net = train_classifier(dls, epochs=60 if data == "digits" else 4)
    seconds = time.perf_counter() - start
    config = dict(shape=list(dls.shape), num_classes=dls.num_classes, classes=dls.classes)
    return net.state_dict(), config, facts(f"classifier-{data}", seconds, test_accuracy=test_accuracy(net, dls))


def diffusion(data: str):
    dls = get_dls(data, batch_size=32, **DATA[data])
    run, start = ROOT / "runs" / f"weights-{data}", time.perf_counter()
    diff = Diffusion(shape=dls.shape, num_classes=dls.num_classes, classes=dls.classes, seed=SEED)
    clock = run / "seconds.json"  # of the parts before an interruption, too
    before = read_json(clock)["seconds"] if clock.exists() else 0.0
    try: diff.fit(dls, epochs=EPOCHS[data], run=run, resume=True, wandb=False)
    finally:
        seconds = before + time.perf_counter() - start
        if run.exists(): write_json(clock, dict(seconds=seconds))
    judge = classifier_for(dls)
    labels = torch.arange(dls.num_classes).repeat(-(-SAMPLES // dls.num_classes))[:SAMPLES]
    images = diff.sample(labels, cfg_scale=GUIDANCE, n_steps=STEPS, seed=SEED)
    test = torch.cat([x for x, _ in dls.test.epoch(0)])
    real = torch.cat([x for x, _ in dls.train.epoch(0)][: -(-SAMPLES // 32)])[:SAMPLES]
    numbers = dict(label_accuracy=label_accuracy(judge, images, labels), fid=fid(images, test, judge.features),
                   fid_of_real_images=fid(real, test, judge.features), judge_accuracy=test_accuracy(judge, dls),
                   valid_loss=diff.history[-1]["valid_loss"], steps=diff.step)
    return diff.ema_model.state_dict(), diff.config, facts(data, seconds, **numbers)


def lessons(shelf: Path, into: Path):
    "Copy what lessons kept into the package."
    shipped = manifest(into)
    for name, entry in manifest(shelf).items():
        if LEFT_OUT.match(name) or shipped.get(name, {}).get("sha256") == entry["sha256"]: continue
        _, weights = read_pretrained(name, shelf)
        new = write_pretrained(name, weights, entry["config"], into, **facts(name, 0) | dict(command=f"make outputs NB='nbs/{name.split('-')[0]}_*.ipynb'", seconds=None))
        print(f"{into / new['file']}: {new['bytes'] / 2**20:.2f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME")
    names = parser.parse_args().names
    if names == ["lessons"]: return lessons(cache_folder() / "kept" / "cpu", weights_folder() / "lessons")
    recipes = {f"classifier-{d}": (classifier, d) for d in DATA} | {d: (diffusion, d) for d in DATA}
    for name in names:
        choose(name, recipes, "model")
    for name in names:
        make, data = recipes[name]
        weights, config, about = make(data)
        entry = write_pretrained(name, weights, config, **about)
        print(f"{weights_folder() / entry['file']}: {entry['bytes'] / 2**20:.2f} MB, {entry['metrics']}")
    print(f"{len(manifest())} models in the manifest")


if __name__ == "__main__":
    main()
