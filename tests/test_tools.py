"""The tools that keep the repository in order: outputs.py stores what a reader can see, check.py
finds what is out of step, mutants.py finds the code that it spoils, times.py knows what is long."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import mutants  # noqa: E402
import times  # noqa: E402


def code(source: str, n: int) -> dict:
    return dict(
        cell_type="code",
        id=f"cell{n:04d}",
        metadata={},
        source=source.splitlines(keepends=True),
        execution_count=None,
        outputs=[],
    )


def notebook(path: Path, *cells: str) -> Path:
    meta = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    doc = dict(
        cells=[code(c, n) for n, c in enumerate(cells)], metadata=meta, nbformat=4, nbformat_minor=5
    )
    path.write_text(
        json.dumps(doc, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return path


def outputs(*args, **env) -> subprocess.CompletedProcess:
    keep = {k: v for k, v in os.environ.items() if k != "DDPM_COURSE_TIER"}
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "outputs.py", *args],
        env=keep | env,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "One notebook that goes through and one that fails, run together."
    tmp = tmp_path_factory.mktemp("outputs")
    bad = notebook(tmp / "bad.ipynb", "print('before')", "1 / 0")
    good = notebook(
        tmp / "good.ipynb",
        "import os, sys, warnings, ddpm_course\nprint(os.listdir('.'),"
        " os.environ['DDPM_COURSE_TIER'], os.environ.get('IN_TEST'))",
        "print(sys.executable, os.getcwd())",
        "from ipywidgets import interact, IntSlider\ndef show(t): print('t is',"
        " t)\nshow(3)\ninteract(show, t=IntSlider(4, 0, 9))",
        "from tqdm import tqdm\nfor _ in tqdm(range(3)): pass\nwarnings.warn('careful')",
        "#| eval: false\n1 / 0",
        "#| slow\n1 / 0",
        "#| hide\nimport nbdev; nbdev.nbdev_export()",
        "import matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1)); plt.plot([1, 2]); plt.show()",
        "2 + 2",
        "print('zwölf α')",
    )
    before = bad.read_bytes()
    done = outputs(bad, good)
    return (
        done,
        good,
        [c["outputs"] for c in json.loads(good.read_text(encoding="utf-8"))["cells"]],
        bad.read_bytes() == before,
    )


def text(outs: list) -> str:
    return "".join(
        "".join(o.get("text", []) or o.get("data", {}).get("text/plain", [])) for o in outs
    )


def test_a_failing_notebook_is_left_alone_and_the_others_go_on(stored):
    done, _, outs, untouched = stored
    assert done.returncode == 1 and untouched
    assert (
        "FAIL bad.ipynb" in done.stdout
        and "ZeroDivisionError" in done.stdout
        and "ok   good.ipynb" in done.stdout
    )
    assert text(outs[8]) == "4" and text(outs[9]) == "zwölf α\n"


def test_runs_in_the_cpu_tier_in_an_empty_folder_and_stores_no_paths(stored):
    _, good, outs, _ = stored
    assert text(outs[0]) == "[] cpu None\n"
    assert text(outs[1]).startswith("python/bin/python") and str(ROOT) not in good.read_text(
        encoding="utf-8"
    )


def test_stores_what_can_be_seen_without_a_kernel(stored):
    _, _, outs, _ = stored
    assert (
        text(outs[2]) == "t is 3\n"
    ), "the plain call stays, the widget and the function it returns go"
    assert "careful" in text(outs[3]) and "%|" not in text(
        outs[3]
    ), "warnings stay, progress bars go"
    assert any("image/png" in o.get("data", {}) for o in outs[7])


def test_cells_that_the_tests_skip_are_skipped(stored):
    assert stored[2][4:7] == [[], [], []]


def test_nbdev_clean_has_nothing_to_do_afterwards(stored):
    good = stored[1]
    before = good.read_bytes()
    subprocess.run(
        [Path(sys.executable).parent / "nbdev_clean", "--fname", good], cwd=ROOT, check=True
    )
    assert good.read_bytes() == before


def test_the_ci_tier_is_refused(tmp_path):
    done = outputs(notebook(tmp_path / "a.ipynb", "1"), DDPM_COURSE_TIER="ci")
    assert done.returncode == 2 and "not ci" in done.stderr


RUNNERS = ("colab_env", "forked", "outputs")  # what anywhere.py uses


@pytest.fixture
def project(tmp_path):
    "A project with one exported notebook, and the check in it."
    for name in ("tools", "nbs", "nbs/answers"):
        (tmp_path / name).mkdir()
    for name in ("check.py", "anywhere.py", "times.py"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    notebook(
        tmp_path / "nbs" / "00_one.ipynb",
        "#| default_exp one",
        "#| export\ndef one():\n    return 1",
        "assert one() == 1",
    )
    notebook(tmp_path / "nbs" / "99_two.ipynb", "assert 1 == 1")
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True)
    return tmp_path


def check(project: Path, *stages: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, project / "tools" / "check.py", *stages], capture_output=True, text=True
    )


def failing_lesson(project: Path):
    "A lesson that fails, in a project from which a wheel can be built."
    for name in ("setup.py", "LICENSE", "LICENSE-docs", *(f"tools/{p}.py" for p in RUNNERS)):
        shutil.copy(ROOT / name, project / name)
    (project / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "colab_installed.txt", project / "tests")
    (ROOT / ".venv-colab").mkdir(exist_ok=True)
    (project / ".venv-colab").symlink_to(ROOT / ".venv-colab")
    notebook(project / "nbs" / "01_two.ipynb", "assert 1 == 2")


def test_check_passes_a_project_in_order_and_changes_nothing(project):
    before = {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    done = check(project, "export", "clean", "ruff", "reference")
    assert done.returncode == 0 and "all stages passed" in done.stdout, done.stdout + done.stderr
    assert before == {p: p.read_bytes() for p in before}
    for line in (r"reference +ok .* s of processor time", r"\d+\.\d s  99_two"):
        assert re.search(line, done.stdout), done.stdout


@pytest.mark.parametrize(
    "stage, harm, says",
    [
        (
            "export",
            lambda p: (p / "ddpm_course/one.py").write_text(
                (p / "ddpm_course/one.py").read_text().replace("return 1", "return 2")
            ),
            "make export",
        ),
        ("export", lambda p: (p / "ddpm_course/two.py").write_text("x = 1\n"), "written by hand"),
        ("export", lambda p: (p / "ddpm_course/one.py").unlink(), "missing here"),
        (
            "clean",
            lambda p: (p / "nbs/00_one.ipynb").write_text(
                (p / "nbs/00_one.ipynb")
                .read_text()
                .replace('"execution_count": null', '"execution_count": 3')
            ),
            "not clean",
        ),
        (
            "ruff",
            lambda p: (p / "ddpm_course/one.py").write_text("def f(): return undefined_name\n"),
            "F821",
        ),
        (
            "reference",
            lambda p: notebook(p / "nbs/99_two.ipynb", "assert 1 == 2"),
            "99_two.ipynb",
        ),
        (
            "reference",
            lambda p: notebook(p / "nbs/answers/lesson_00.ipynb", "assert 1 == 2"),
            "lesson_00.ipynb",
        ),
        ("lessons", lambda p: failing_lesson(p), "FAIL 01_two"),
    ],
    ids=[
        "edited module",
        "module by hand",
        "module missing",
        "execution count",
        "undefined name",
        "failing notebook",
        "failing answers",
        "failing lesson",
    ],
)
def test_check_fails_where_it_should(project, stage, harm, says):
    harm(project)
    done = check(project, stage, *(["pytest"] if stage != "pytest" else []))
    assert done.returncode == 1 and says in done.stdout + done.stderr, done.stdout + done.stderr
    assert "== pytest" not in done.stdout, "it went on after a failure"


def test_every_notebook_belongs_to_one_stage():
    "No notebook is forgotten between the two stages that run them."
    import check

    lessons = {p.name for p in (ROOT / "nbs").glob("*.ipynb") if check.LESSON.match(p.name)}
    others = {p.name for p in (ROOT / "nbs").rglob("*.ipynb")} - lessons
    assert len(lessons) >= 25 and "index.ipynb" in lessons
    assert all(name[0] in "789" or name.startswith("lesson_") for name in others), others


# Notebooks in forked processes (what the stage does with them: tests/test_anywhere.py)

SERVE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import forked
forked.HEAVY = ("IPython.core.interactiveshell", "matplotlib_inline.backend_inline")
forked.can_fork = lambda: False  # as where there is a GPU
forked.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_without_a_second_fork_the_second_pass_begins_anew_and_nothing_hangs(tmp_path):
    def job(name, *sources):
        cells = [dict(source=s, training=s.startswith("# training")) for s in sources]
        return dict(
            name=name,
            notebook=str(notebook(tmp_path / f"{name}.ipynb", *sources)),
            folder=str(tmp_path / name),
            results=str(tmp_path),
            env=dict(NAME=name),
            training=True,
            second=dict(name=f"{name} again", folder=str(tmp_path / f"{name}-2")),
            cells=cells,
        )

    jobs = [
        job("hangs", "import time; time.sleep(600)", "# training"),
        job(
            "good",
            "import os; assert os.listdir() == ['good.ipynb'] and os.environ['NAME'] == 'good'",
            "# training\nopen('trained', 'w').close()",
            "os.mkdir('after')",
        ),
    ]
    asked = tmp_path / "jobs.json"
    asked.write_text(json.dumps(dict(jobs=jobs, workers=2, timeout=6)), encoding="utf-8")
    command = [sys.executable, "-c", SERVE, ROOT / "tools", asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    told = {t["name"]: t for t in map(json.loads, done.stdout.splitlines())}
    assert told.keys() == {"hangs", "good", "good again"}, done.stdout + done.stderr
    assert "TimeoutError: no end after 6 s" in told["hangs"]["error"]
    assert told["good"]["error"] == "" and told["good"]["left"] == ["after", "trained"]
    assert told["good again"]["error"] == "" and told["good again"]["left"] == ["after"]


# Mistakes that are put back


@pytest.mark.parametrize("number, what, edits", mutants.MUTANTS, ids=lambda v: str(v)[:40])
def test_a_mistake_can_be_put_back(tmp_path, number, what, edits):
    for stem, *_ in edits:
        shutil.copy(ROOT / "ddpm_course" / f"{stem}.py", tmp_path)
    before = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()}
    mutants.apply(edits, tmp_path)
    assert all(p.read_text(encoding="utf-8") != before[p.name] for p in tmp_path.iterdir())


FORMATTED = """
def f(x):
    if x:
        y = torch.cat(
            # why
            [x, x],
            dim=0,
        )
    return "a  b"
"""


@pytest.mark.parametrize("old", ["torch.cat([x, x], dim=0)", "torch.cat( [x,x], dim = 0, )"])
def test_a_patch_fits_code_that_is_formatted_otherwise(old):
    text = mutants.patched(FORMATTED, old, "x\nz = 1")
    assert text == '\ndef f(x):\n    if x:\n        y = x\n        z = 1\n    return "a  b"\n'


@pytest.mark.parametrize("old", ["x", '"a b"', "torch.cat([x], dim=0)", "xx", "torch.ca"])
def test_a_patch_that_does_not_fit_once_is_refused(old):
    with pytest.raises(ValueError, match="occurs [0-9]+ times"):
        mutants.patched(FORMATTED, old, "z")


# What takes long goes first


def test_usual_times_name_what_is_there():
    "A name that is gone would say nothing; what is missing goes first."
    usual = times.read(times.USUAL)
    assert usual.keys() == {"notebooks", "files"}
    assert all((ROOT / "nbs" / f"{name}.ipynb").exists() for name in usual["notebooks"])
    assert all((ROOT / "tests" / name).exists() for name in usual["files"])


def test_the_last_run_decides_what_goes_first(tmp_path, monkeypatch):
    for name in ("USUAL", "LAST"):
        monkeypatch.setattr(times, name, tmp_path / f"{name}.json")
    assert times.longest_first(["a", "b"], "files") == ["a", "b"]  # nobody knows anything
    times.USUAL.write_text(json.dumps(dict(files=dict(a=1, b=2, c=3))), encoding="utf-8")
    assert times.longest_first(["a", "b", "new", "c"], "files") == ["new", "c", "b", "a"]
    times.keep("files", dict(a=9, b=1))
    times.keep("files", dict(b=0.5))
    assert times.longest_first(["a", "b", "c"], "files") == ["a", "c", "b"]
    assert times.longest("files", 1) == ["    9.0 s  a"]
    times.keep("files", dict(b=4), replace=True)
    assert times.longest("files") == ["    4.0 s  b"]
    times.LAST.write_text("{", encoding="utf-8")  # broken: only the order suffers
    assert times.longest_first(["a", "c"], "files") == ["c", "a"]
