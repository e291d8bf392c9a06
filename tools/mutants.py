"""Put each of the eighteen mistakes back, one at a time, and see that a test fails.

usage: python tools/mutants.py [NUMBER...]      (all of them: make mutants)

The work is done on a copy in a temporary folder. An edit is (file, old text, new text); the old
text must occur exactly once, so that a patch that no longer applies is noticed. White space,
comments and commas before a closing bracket make no difference: code may be folded in another way.
Further lines of a new text are indented as the line is in which the old text begins.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "ddpm_course"

# number, what comes back, edits
MUTANTS = [
    (
        1,
        "`with A and B` enters only B",
        [
            (
                "training",
                "with self.autocast(): losses = self.denoiser",
                "with self.autocast() and torch.enable_grad(): losses = self.denoiser",
            )
        ],
    ),
    (
        2,
        "labels are dropped for the whole batch, by numpy",
        [
            (
                "guidance",
                "torch.rand(n, generator=generator, device=at) < p",
                "torch.tensor(__import__('numpy').random.rand() < p).expand(n)",
            )
        ],
    ),
    (
        2,
        "labels are dropped in validation too",
        [
            (
                "training",
                "x, cond, *eps = self.moved(*batch) with self.autocast():",
                (
                    "x, cond, *eps = self.moved(*batch)\ncond = model.cond.drop(cond,"
                    " model.p_uncond, generator)\nwith self.autocast():"
                ),
            )
        ],
    ),
    (
        3,
        "the epoch's loss is a sum of batch means",
        [
            ("training", "self.loss_sum += losses.sum()", "self.loss_sum += losses.mean()"),
            ("training", "return total / max(n, 1)", "return total"),
        ],
    ),
    (
        3,
        "the loss keeps its graph",
        [("training", "losses = losses.detach()", "losses = losses * 1")],
    ),
    (
        4,
        "index 0 is not trained",
        [("process", "randint(1, process.t_max + 1", "randint(2, process.t_max + 1")],
    ),
    (
        4,
        "index 0 is not sampled",
        [
            (
                "process",
                "* self.t_max + n // 2) // n",
                "* self.t_max + n // 2).floor_divide(n).clamp(min=1)",
            )
        ],
    ),
    (
        5,
        "scale 0 is conditional",
        [
            (
                "guidance",
                "def guided(x, t):",
                (
                    "if not torch.as_tensor(scale).any(): return lambda x, t: denoise(x, t, y)\ndef"
                    " guided(x, t):"
                ),
            )
        ],
    ),
    (6, "uint8 truncates", [("pictures", ".round().clamp(0, 255)", ".clamp(0, 255)")]),
    (
        7,
        "attention reads only the width",
        [
            (
                "unet",
                "tokens = x.flatten(2).mT",
                "tokens = x.reshape(-1, x.shape[1], x.shape[-1] ** 2).mT",
            )
        ],
    ),
    (8, "betas are not rescaled with T", [("process", "* (len(curve.values) - 1) / T", "")]),
    (
        9,
        "EMA's step is not saved",
        [("ema", "warmup=self.warmup, step=self.step)", "warmup=self.warmup, step=0)")],
    ),
    (10, "EMA freezes buffers", [("ema", "old.copy_(new)", "pass")]),
    (
        11,
        "images are stretched",
        [("data", "size = max(1, round(h * factor)), max(1, round(w * factor))", "size = H, W")],
    ),
    (
        11,
        "training images are stretched in the batch",
        [("data", "x.flip(-1), x)", "x.flip(-1), F.interpolate(x[:, :, :-1], x.shape[2:]))")],
    ),
    (
        12,
        "image sides are not looked at",
        [("unet", "check_size(x.shape[2:], self.multiple)", "pass")],
    ),
    (
        13,
        "importing loads a data set",
        [
            (
                "training",
                "from .batches import Feed, check_batch, splits",
                (
                    "from .batches import Feed, check_batch, splits\nfrom .data import get_dls;"
                    " get_dls('digits')"
                ),
            )
        ],
    ),
    (
        14,
        "the seed of the noise is ignored",
        [
            (
                "model",
                "torch.Generator(self.device).manual_seed(seed)",
                "torch.Generator(self.device).manual_seed(0)",
            ),
            ("training", "seed + 1_000_003 * rank()", "1_000_003 * rank()"),
        ],
    ),
    (
        14,
        "the seed of the weights is ignored",
        [("model", "torch.manual_seed(seed)\n if dims", "torch.manual_seed(0)\nif dims")],
    ),
    (
        14,
        "the device is ignored",
        [("model", "self.device = default_device(device)", "self.device = default_device()")],
    ),
    (
        15,
        "only the last epoch is saved",
        [
            (
                "training",
                "path = self.save_model(last=last)",
                "path = self.save_model(last=last) if last else None",
            )
        ],
    ),
    (
        15,
        "optimizer and schedule are not restored",
        [
            (
                "training",
                'self.opt.load_state_dict(state["opt"] | dict(state=moments))\n'
                'for name in ("sched", "scaler")[: 2 if same else 1]:',
                'for name in ("scaler",) * same:',
            )
        ],
    ),
    (
        16,
        "attention forms its weights",
        [
            (
                "unet",
                "F.scaled_dot_product_attention(q, k, v, mask)",
                "(q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v",
            )
        ],
    ),
    (
        16,
        "attention at full resolution",
        [("light_unet", "attention: tuple = (2,)", "attention: tuple = (0, 2)")],
    ),
    (
        17,
        "guidance makes two passes",
        [
            (
                "guidance",
                "x0_hats = denoise(torch.cat([x, x]), torch.cat([t, t]), both)",
                (
                    "x0_hats = torch.cat([denoise(x, t, tree(lambda v: v[:n], both)), denoise(x, t,"
                    " tree(lambda v: v[n:], both))])"
                ),
            )
        ],
    ),
    (
        17,
        "nothing is clipped",
        [("model", "clip_x0(denoise, bounds) if bounds else denoise", "denoise")],
    ),
    (
        17,
        "EMA and schedule step when the scaler skipped",
        [
            (
                "training",
                "if scaling and (now := scaler.get_scale()) < scale",
                "if False and (now := scaler.get_scale()) < scale",
            )
        ],
    ),
    (
        18,
        "no label has no class of its own",
        [
            (
                "unet",
                "cond = torch.full((1,), self.num_classes, device=t.device)",
                "return timestep_embedding(t, self.time_dim)",
            )
        ],
    ),
]


TOKEN = re.compile(
    r"""(?P<skip> \s+ | \#[^\n]*) | \"{3}[\s\S]*?\"{3}
         | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | \w+ | .""",
    re.VERBOSE,
)


def tokens(text: str) -> list:
    "(token, where it begins, where it ends), without what only formats."
    found = [(m[0], *m.span()) for m in TOKEN.finditer(text) if not m["skip"]]
    following = [t for t, *_ in found[1:]] + [""]
    return [f for f, after in zip(found, following) if not (f[0] == "," and after in (*")]}",))]


def patched(text: str, old: str, new: str) -> str:  # ValueError unless `old` is there exactly once
    have, wanted = tokens(text), [t for t, *_ in tokens(old)]
    plain = [t for t, *_ in have]
    places = [k for k in range(len(have)) if plain[k : k + len(wanted)] == wanted]
    if len(places) != 1:
        raise ValueError(f"{old!r} occurs {len(places)} times")
    begin, end = have[places[0]][1], have[places[0] + len(wanted) - 1][2]
    line = text[text.rfind("\n", 0, begin) + 1 : begin]
    indent = line[: len(line) - len(line.lstrip())]
    return text[:begin] + new.replace("\n", "\n" + indent) + text[end:]


def copy_to(folder: Path) -> Path:  # the package, its tests and tools, without anything compiled
    for name in (NAME, "tests", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, folder)
    return folder


def python(folder: Path, *args) -> subprocess.CompletedProcess:
    "Run Python in the copy, whose package comes before the one that is installed."
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env=env,
        text=True,
        timeout=900,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run_tests(folder: Path, numbers) -> subprocess.CompletedProcess:
    "The tests of some mistakes: only the files that have any are read."
    names = [f"mistake_{n:02d}" for n in numbers]
    files = [
        f"tests/{p.name}"
        for p in sorted((folder / "tests").glob("test_*.py"))
        if any(f"def test_{n}_" in p.read_text(encoding="utf-8") for n in names)
    ]
    if not files:
        raise SystemExit(f"no test is called test_{names[0]}_...")
    return python(
        folder,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        " or ".join(names),
        *files,
    )


def check_copy(folder: Path):
    "SystemExit if the copy's Python would import another ddpm_course."
    where = python(folder, "-c", f"import {NAME}; print({NAME}.__file__)").stdout.strip()
    if Path(where).resolve().parent != (folder / NAME).resolve():
        raise SystemExit(f"the tests would import {where} instead of the patched copy")


def apply(edits, package: Path):
    "Make the edits in a copy of the package. ValueError, or SyntaxError, if that cannot be done."
    for stem, old, new in edits:
        path = package / f"{stem}.py"
        try:
            text = patched(path.read_text(encoding="utf-8"), old, new)
        except ValueError as e:
            raise ValueError(f"{path.name}: {e}") from None
        compile(text, path.name, "exec")
        path.write_text(text, encoding="utf-8")


# 'caught', 'SURVIVED' or what went wrong; a line that says more
def verdict(edits, number: int) -> tuple:
    with tempfile.TemporaryDirectory() as tmp:
        folder = copy_to(Path(tmp))
        try:
            apply(edits, folder / NAME)
        except ValueError as e:
            return "DOES NOT APPLY", str(e)
        check_copy(folder)
        try:
            done = run_tests(folder, [number])
        except subprocess.TimeoutExpired:
            return "HANGS", ""
        failed = re.findall(r"^FAILED (\S+)", done.stdout, re.M)
        if done.returncode == 1 and failed:
            return "caught", failed[0]
        return ("SURVIVED", "") if done.returncode == 0 else ("CANNOT RUN", done.stdout[-500:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "numbers", nargs="*", type=int, help="mistakes to put back [default: all eighteen]"
    )
    wanted = parser.parse_args().numbers or sorted({n for n, *_ in MUTANTS})
    if strange := set(wanted) - {n for n, *_ in MUTANTS}:
        parser.error(f"there is no mistake {min(strange)}: they are 1 to 18")
    with tempfile.TemporaryDirectory() as tmp:
        folder = copy_to(Path(tmp))
        check_copy(folder)
        done = run_tests(folder, wanted)
        if done.returncode:
            raise SystemExit(
                done.stdout[-3000:]
                + "\nthe tests fail without any mistake put back: mend that first"
            )
        print(f"without mistakes: {done.stdout.strip().splitlines()[-1]}", flush=True)
    results = []
    for number, what, edits in MUTANTS:
        if number not in wanted:
            continue
        result, more = verdict(edits, number)
        results.append(result)
        print(f"{number:2d}  {what:52s} {result}  {more}", flush=True)
    caught = results.count("caught")
    print(f"{caught} caught, {len(results) - caught} survived")
    return caught < len(results)


if __name__ == "__main__":
    sys.exit(main())
