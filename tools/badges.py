"""Make the Colab badges of the readme and the notebooks anew, after a fork or a move.

usage: python tools/badges.py [--check]        --check changes nothing and fails where one is stale

User, repo, branch and nbs_path are those of settings.ini.
"""

import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(
    r"https://colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/[\w.-]+/[\w.-]+/((?:[\w-]+/)*[\w.-]+\.ipynb)"
)


def colab(root: Path, notebook: str) -> str:
    "Where Colab opens a notebook of this repository."
    cfg = ConfigParser(delimiters=["="])
    cfg.read(root / "settings.ini", encoding="utf-8")
    cfg = cfg["DEFAULT"]
    return f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{cfg['nbs_path']}/{notebook}"


def stale(root: Path = ROOT) -> dict:
    "path -> text as it should be, of the files with a badge that leads elsewhere."
    found, base = {}, colab(root, "")
    for path in [
        root / "README.md",
        *sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts),
    ]:
        text = path.read_text(encoding="utf-8")
        right = LINK.sub(lambda m: base + m[1], text)
        if right != text:
            found[path] = right
    return found


if __name__ == "__main__":
    if set(sys.argv[1:]) - {"--check"}:
        sys.exit(__doc__)
    found = stale()
    for path, text in found.items():
        print(f"{path.relative_to(ROOT)}: {'stale' if sys.argv[1:] else 'made anew'}")
        if not sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
    sys.exit(bool(found and sys.argv[1:]))
