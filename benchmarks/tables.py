"""README's tables are made from the files in benchmarks/results.

usage: python benchmarks/tables.py [--check]

--check changes nothing and fails where README is out of step.

Between <!-- bench:NAME --> and <!-- /bench --> stands what the script of that name makes of
results/NAME.json. Where results/NAME-gpu.json has no place yet, it gets one behind that of NAME.
"""

import argparse
import difflib
import importlib
import re
import sys
from pathlib import Path

from bench import HERE, RESULTS, load

README = HERE.parent / "README.md"
BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.S)


def table(name: str, folder: Path = RESULTS) -> str:
    rows = load(folder / f"{name}.json")
    return (
        importlib.import_module(name.removesuffix("-gpu")).table(rows)
        if rows
        else "*Not measured yet.*"
    )


def with_gpu(text: str, folder: Path) -> str:
    "The text with a place for the table of each NAME-gpu.json."
    names = [
        name
        for _, name, _ in BLOCK.findall(text)
        if (folder / f"{name}-gpu.json").exists() and f"<!-- bench:{name}-gpu -->" not in text
    ]
    return BLOCK.sub(
        lambda m: m[0]
        + f"\n\nOn a GPU:\n\n<!-- bench:{m[2]}-gpu -->\n<!-- /bench -->" * (m[2] in names),
        text,
    )


def filled(text: str, folder: Path = RESULTS) -> str:
    "The text with every table made anew; ValueError for a marker without its end."
    blocks = BLOCK.findall(text)
    if len(blocks) != text.count("<!-- bench:") or len(blocks) != text.count("<!-- /bench -->"):
        raise ValueError(
            "every <!-- bench:NAME --> needs its <!-- /bench -->, and the other way round"
        )
    return BLOCK.sub(lambda m: f"{m[1]}{table(m[2], folder)}\n{m[3]}", with_gpu(text, folder))


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true")
    p.add_argument("--readme", type=Path, default=README)
    p.add_argument("--results", type=Path, default=RESULTS)
    args = p.parse_args(argv)
    old = args.readme.read_text(encoding="utf-8")
    new = filled(old, args.results)
    if not args.check:
        args.readme.write_text(new, encoding="utf-8")
    elif old != new:
        diff = difflib.unified_diff(
            old.splitlines(),
            new.splitlines(),
            "README.md",
            "as benchmarks/results say",
            lineterm="",
            n=0,
        )
        return (
            "\n".join(diff)
            + "\nThe tables are not those of benchmarks/results: run python benchmarks/tables.py"
        )


if __name__ == "__main__":
    sys.exit(main())
