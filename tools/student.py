"""The student edition of the lessons: blanks and checks, no solutions, no outputs.

usage: python tools/student.py FOLDER [notebook.ipynb ...]

There is one source, the lessons in nbs/. A cell that begins with `#| solution` shows what the
reader was asked to write in a cell above it, under the same name. Here such cells are left out,
and with them the solutions of the exercises: what the reader writes is what the rest of the
lesson uses.
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\| ?(\w+).*\n?", re.M)
FOLD = re.compile(r"<details>\s*<summary>\s*Solution.*?</details>\n*", re.S)
NOTE = (
    "*This is the student edition: where a line is missing, you write it, and `check` says whether"
    " it is right. The [complete lesson](https://github.com/ddpm-course/ddpm_course/blob/main/nbs/"
    "{name}) has the solutions and the outputs.*"
)


def directives(cell) -> set:
    return set(DIRECTIVE.findall(cell.source)) if cell.cell_type == "code" else set()


def student(nb: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    "A lesson without what would give it away."
    nb, cells = nbformat.from_dict(nb), []
    for cell in nb.cells:
        found = directives(cell)
        if found & {"solution", "hide", "default_exp"}:
            continue
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = FOLD.sub("", cell.source).strip("\n")
        if cell.source:
            cells.append(cell)
    title, *rest = cells[0].source.split("\n\n", 1)
    cells[0].source = "\n\n".join([title, NOTE.format(name=name), *rest])
    nb.cells = cells
    return nb


def main(out: str, *paths: str) -> int:
    paths = [Path(p) for p in paths] or sorted((ROOT / "nbs").glob("[01]*.ipynb"))
    Path(out).mkdir(parents=True, exist_ok=True)
    for path in paths:
        nb = student(nbformat.read(path, 4), path.name)
        nbformat.write(nb, Path(out, path.name))
    print(f"{len(paths)} lessons without solutions in {out}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
