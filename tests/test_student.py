"""One source, two editions: the student's has blanks and checks, and nothing gives them away."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from student import directives, student

from ddpm_course.exercises import find, graded

ROOT = Path(__file__).resolve().parent.parent
LESSONS = {p.stem: nbformat.read(p, 4) for p in sorted((ROOT / "nbs").glob("[01]*.ipynb"))}
ASKED = re.compile(r"""^check\("([\w.]+)", (\w+)\)$""", re.M)


def code(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def defined(source) -> dict:  # name -> the code that defines it
    found = (ast.FunctionDef, ast.ClassDef)
    return {n.name: ast.unparse(n) for n in ast.parse(source).body if isinstance(n, found)}


BLANKS = [  # lesson, key, name, the blank, the solution
    (lesson, *ASKED.findall(before.source)[-1], before.source, after.source)
    for lesson, nb in LESSONS.items()
    for before, after in zip(code(nb), code(nb)[1:])
    if "solution" in directives(after)
]


def test_there_are_blanks():
    assert len(BLANKS) >= 3


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_editions_differ_by_the_solutions_alone(lesson):
    whole, blank = LESSONS[lesson], student(LESSONS[lesson], f"{lesson}.ipynb")
    kept = iter(blank.cells)
    for cell in whole.cells:
        if cell.cell_type != "code" or directives(cell) & {"solution", "hide", "default_exp"}:
            continue
        mine = next(c for c in kept if c.cell_type == "code")
        plain = [line for line in cell.source.splitlines() if not line.startswith("#|")]
        assert mine.source == "\n".join(plain).strip("\n"), cell.source[:80]
        assert mine.outputs == [] and mine.execution_count is None
    text = "\n".join(c.source for c in blank.cells)
    assert "<summary>Solution" not in text and "student edition" in text
    assert not [c for c in blank.cells if "solution" in directives(c)]
    exercises = [k for c in code(whole) for k in ASKED.findall(c.source)]
    assert [k for c in code(blank) for k in ASKED.findall(c.source)] == exercises


@pytest.mark.parametrize("lesson, key, name, blank, solution", BLANKS, ids=[b[1] for b in BLANKS])
def test_a_blank_asks_for_what_the_solution_shows(lesson, key, name, blank, solution):
    """The same name, the same arguments, something missing; and the exercise of this lesson."""
    asked, shown = defined(blank)[name], defined(solution)[name]
    head = re.compile(r"^(?:def|class) .*|    def .*", re.M)
    assert head.findall(asked) == head.findall(shown) and asked != shown
    assert len(asked.splitlines()) <= len(shown.splitlines()) + 1
    assert key.split(".")[0] == lesson.split("_")[0] and graded(find(key), find(key).solution)


@pytest.mark.parametrize("lesson, key, name, blank, solution", BLANKS, ids=[b[1] for b in BLANKS])
def test_blanks_are_told_what_to_do_and_solutions_pass(lesson, key, name, blank, solution):
    "In the lesson's own namespace, as its reader has it: all definitions up to there."
    space = {}
    for cell in code(LESSONS[lesson]):
        if cell.source == blank:
            break
        plain = ["    pass" if "%pip" in line else line for line in cell.source.splitlines()]
        tree = ast.parse("\n".join(plain))
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
        for node in tree.body:
            if isinstance(node, kinds):
                try:
                    exec(compile(ast.Module([node], []), lesson, "exec"), space)
                except NameError:
                    pass  # a number that comes of a training
    exec(blank.replace("check(", "told = check("), space)
    assert not space["told"].right and space["told"].text.startswith("Not yet"), space["told"]
    exec("\n".join(line for line in solution.splitlines() if not line.startswith("#|")), space)
    said = graded(find(key), space[name])
    assert said.right, said
