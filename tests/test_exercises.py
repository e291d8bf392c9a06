"""Exercises, three ways from one source.

The solution passes, the blank is helped, each typical mistake gets its own hint; and the lessons
ask and solve what is checked.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_course import exercises
from ddpm_course.exercises import FOUND, all_exercises, find, graded, three_ways

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = all_exercises()
LESSONS = sorted({k.split(".")[0] for k in EXERCISES})


def cells(lesson: str) -> list:
    name = __import__(f"ddpm_course.answers.lesson_{lesson}", fromlist=["LESSON"]).LESSON
    return [
        (c["cell_type"], "".join(c["source"]), c.get("outputs"))
        for c in json.loads(Path(ROOT, "nbs", f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    ]


def names(lesson: str) -> dict:
    "What the exercises may use: the imports of the set-up cell, and the lesson's own module."
    found = {}
    for kind, source, _ in cells(lesson):
        if m := re.match(r"#\| default_exp (\S+)", source):
            found |= vars(__import__(f"ddpm_course.{m[1]}", fromlist=["x"]))
        if kind == "code" and "except ImportError" in source:
            exec(
                "\n".join(
                    line for line in source.splitlines() if line.startswith(("import", "from"))
                ),
                found,
            )
    if lesson == "00":  # which has no module: its tables
        from ddpm_course.answers import lesson_00

        found["alpha"], found["sigma"] = lesson_00._levels()
    if lesson == "04b":  # nor has this one: the road and the block of its network
        from ddpm_course.answers import lesson_04b

        found |= dict(process=found["DDPM"](schedule="cosine"), Block=lesson_04b._Block)
    return found


def asked(source: str) -> list:
    "(key, name of the answer) of each check in a cell."
    calls = (
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "check"
    )
    return [(c.args[0].value, c.args[1].id) for c in calls]


def test_there_are_enough():
    part_one = [k for k in EXERCISES if k[:2] <= "09"]
    assert len(part_one) >= 30 and {EXERCISES[k].kind for k in part_one} == set(exercises.KINDS)
    for lesson in LESSONS:
        assert sum(k.split(".")[0] == lesson for k in EXERCISES) >= 3, lesson
    assert {p.name[:3].rstrip("_") for p in Path(ROOT, "nbs").glob("0*_*.ipynb")} <= set(LESSONS)


@pytest.mark.parametrize("key", EXERCISES)
def test_three_ways(key):
    three_ways(EXERCISES[key])


@pytest.mark.parametrize("key", EXERCISES)
def test_hints_tell_mistakes_apart(key):
    e = EXERCISES[key]
    said = {graded(e, answer).text for answer, _ in e.mistakes}
    assert len(said) > 1 and e.blank not in {w for _, w in e.mistakes}, said


@pytest.mark.parametrize("lesson", LESSONS)
def test_lesson_asks_and_solves(lesson):
    here, open_, seen, shown = names(lesson), [], [], {}
    here["check"] = lambda key, answer: shown.setdefault(key, graded(find(key), answer))
    for kind, source, outputs in cells(lesson):
        if kind == "code" and 'check("' in source:
            exec(source, here)
            for key, name in asked(source):
                assert (
                    not shown[key].right and "raised" not in shown[key].text
                ), f"{key}: the stub is told {shown[key]}"
                open_.append((key, name))
                seen.append(key)
            text = "".join(
                "".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs
            )
            for key, _ in asked(source):
                assert (
                    shown[key].text in text
                ), f"{key}: run `python tools/outputs.py --only 'check(\"'` on the lesson"
        elif kind == "code" and source.startswith("#| solution"):
            exec(source, here)
            made = {m[2] for m in re.finditer(r"^(def|class) (\w+)", source, re.M)}
            for key, name in [pair for pair in open_ if pair[1] in made]:
                said = graded(find(key), here[name])
                assert said.right, f"{key}: the solution is told {said}"
                open_.remove((key, name))
        elif kind == "markdown" and "<details>" in source:
            for key, name in list(open_):
                code = [
                    b
                    for b in re.findall(r"```python\n(.*?)```", source, re.S)
                    if re.search(rf"^(def|class) {name}\b|^{name} =", b, re.M)
                ]
                code += [b for b in re.findall(r"`([^`\n]+)`", source) if b.startswith(f"{name} =")]
                if not code:
                    continue
                exec(code[0], here)
                said = graded(find(key), here[name])
                assert said.right, f"{key}: the solution in the fold is told {said}"
                open_.remove((key, name))
    assert not open_, f"no solution in a fold for {open_}"
    assert seen == [k for k in EXERCISES if k.split(".")[0] == lesson]


def test_an_error_is_shown_at_the_line_of_the_learner():
    def mine(process, x_s, s, t, eps):
        return process.alhpa(t)

    said = graded(find("02.1"), mine)
    assert (
        not said
        and "AttributeError" in said.text
        and "Line" in said.text
        and "process.alhpa" in said.text
    )


def test_a_number_can_come_as_a_tensor_or_not_at_all():
    import torch

    assert graded(find("02.2"), torch.tensor(4.0)) and graded(find("02.2"), 4)
    for odd in ("four", [1, 2], {}, torch.zeros(3)):
        assert "number" in graded(find("02.2"), odd).text


def test_an_exercise_has_one_home_but_a_notebook_may_say_it_again():
    kept = FOUND["02.2"]

    def again(module):
        def grade(answer):
            return None

        grade.__module__ = module
        exercises.exercise("02.1", "again", "code", 1, "blank", [])(grade)

    first = FOUND["02.1"]
    try:
        again("__main__")
        FOUND["02.1"] = first
        with pytest.raises(ValueError, match="two exercises 02.1"):
            again("ddpm_course.answers.lesson_99")
    finally:
        FOUND["02.1"] = first
    assert FOUND["02.2"] is kept


def run(folder: Path, *args: str, text: str = ""):
    env = os.environ | {"DDPM_COURSE_PROGRESS": str(folder / "progress.json")}
    return subprocess.run(
        [sys.executable, "-m", "ddpm_course.cli", "progress", *args],
        capture_output=True,
        text=True,
        env=env,
        input=text,
        cwd=folder,
    )


def test_progress_on_the_command_line(tmp_path, monkeypatch):
    out = run(tmp_path)
    assert (
        out.returncode == 0
        and f"0 of {len(EXERCISES)} exercises done" in out.stdout
        and "next: 02.1" in out.stdout
    )
    monkeypatch.setenv("DDPM_COURSE_PROGRESS", str(tmp_path / "progress.json"))
    for key in FOUND:
        if key.startswith("02."):
            exercises.check(key, EXERCISES[key].solution)
    out = run(tmp_path)
    assert (
        f"{len([k for k in FOUND if k.startswith('02.')])} of {len(EXERCISES)}" in out.stdout
        and "next: 02" not in out.stdout
    )
    assert run(tmp_path, "--reset", text="n\n").returncode == 1 and exercises.done()
    assert run(tmp_path, "--reset", text="y\n").returncode == 0 and not exercises.done()
