"""How long notebooks and test files took: the longest go first, and no core waits for another.

The last run of `make test` leaves `.times.json`, which git ignores; `tools/times.json` says what is
usual. Both hold seconds by name, in groups: notebooks, files (of tests), tests, reference.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USUAL = ROOT / "tools" / "times.json"
LAST = ROOT / ".times.json"


def read(path: Path) -> dict:
    "Groups of times; nothing where the file is missing or broken: it only decides about an order."
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def longest_first(names, group: str) -> list:
    "The names in the order in which they should begin; what nobody has timed comes first."
    known = read(USUAL).get(group, {}) | read(LAST).get(group, {})
    return sorted(names, key=lambda name: -known.get(name, 1e9))


def keep(group: str, taken: dict, replace: bool = False):
    "Write down what the last run took."
    last = read(LAST)
    before = {} if replace else last.get(group, {})
    last[group] = before | {name: round(seconds, 2) for name, seconds in taken.items()}
    part = LAST.with_suffix(".part")
    part.write_text(json.dumps(last, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(LAST)


def longest(group: str, n: int = 10) -> list:
    "Lines about the longest of the last run."
    last = read(LAST).get(group, {})
    names = sorted(last, key=last.get, reverse=True)[:n]
    return [f"{last[name]:7.1f} s  {name}" for name in names]
