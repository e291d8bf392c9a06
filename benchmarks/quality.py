"""How good are samples? Distances to the test set in two feature spaces, what real images reach,
and labels read as asked."""

import statistics

import torch
from bench import labels, over_seeds, short

from ddpm_course.data import get_dls
from ddpm_course.evaluation import (
    RandomFeatures,
    classifier_for,
    extract,
    fid,
    label_accuracy,
    train_classifier,
)


def data(args):
    "MNIST (or args.data) at 32x32; in a quick run the digits that scikit-learn brings, at 16x16."
    return (
        get_dls("digits", 16)
        if args.quick
        else get_dls(getattr(args, "data", "mnist"), 32, download=False)
    )


class Quality:
    "A judge for one data set: quality(images, labels) -> dict."

    def __init__(self, dls, args):
        self.judge = (
            train_classifier(dls, 1, device=args.device)
            if args.quick
            else classifier_for(dls, device=args.device)
        )
        self.nets = dict(classifier=self.judge, random=RandomFeatures(dls.shape).to(args.device))
        self.test = {s: extract(net, dls.test.images) for s, net in self.nets.items()}
        self.train, self.classes, self.floors = dls.train, dls.num_classes, {}

    def distances(self, images) -> dict:
        return {s: fid(extract(net, images), self.test[s]) for s, net in self.nets.items()}

    def real(self, n: int, g) -> torch.Tensor:
        """n training images, of all classes equally many, as samples are asked for: by chance, more
        of one class than of another costs distance too."""
        order = torch.randperm(len(self.train.labels), generator=g)
        if not self.classes:
            return self.train.images[order[:n].to(self.train.images.device)]
        y = self.train.labels.cpu()[order]
        picks = [
            order[y == k][:count] for k, count in enumerate(labels(n, self.classes).bincount())
        ]
        return self.train.images[torch.cat(picks).to(self.train.images.device)]

    def floor(self, n: int, draws: int = 10) -> dict:
        "What n real training images reach: mean over draws."
        if n not in self.floors:
            g = torch.Generator().manual_seed(0)
            drawn = [self.distances(self.real(n, g)) for _ in range(draws)]
            self.floors[n] = {s: statistics.mean(d[s] for d in drawn) for s in self.nets}
        return self.floors[n]

    # images (N,C,H,W) in [-1, 1]; labels: the classes that were asked for
    def __call__(self, images, labels=None) -> dict:
        found = {f"fid_{s}": v for s, v in self.distances(images).items()} | {
            f"floor_{s}": v for s, v in self.floor(len(images)).items()
        }
        return dict(
            n=len(images),
            **found,
            accuracy=None if labels is None else label_accuracy(self.judge, images, labels),
        )


def fid_cell(rows: list, space: str) -> str:
    "12.3 ± 0.4 (2.1x): FID over the seeds, and the mean in units of the floor."
    values = [r[f"fid_{space}"] for r in rows]
    return (
        f"{over_seeds(values)} ({short(statistics.mean(values) / rows[0][f'floor_{space}'], 2)}x)"
    )


def accuracy_cell(rows: list) -> str:
    "97.4 ± 1.0% over the seeds; nothing for samples that were not asked for a class."
    cell = over_seeds([None if r["accuracy"] is None else 100 * r["accuracy"] for r in rows])
    return cell + "%" * bool(cell)


def explained(rows: list) -> str:
    "What the columns of FIDs say."
    return (
        "FID against the test set, in brackets in units of its floor, what real images reach:"
        f" {floors(rows)}. "
    )


def floors(rows: list) -> str:
    "One line that gives the floors of all sample sizes in the rows."
    seen = {r["n"]: (r["floor_classifier"], r["floor_random"]) for r in rows}
    return "; ".join(
        f"{n:,} real training images, of every class equally many, reach {short(a)} and {short(b)}"
        for n, (a, b) in sorted(seen.items())
    )
