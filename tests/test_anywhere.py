"""On Colab, on a laptop without a network, on another system, with an older Python: what a notebook
may count on, and that a breach is seen."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from badges import LINK, colab, stale  # noqa: E402
from colab_env import colab_pins  # noqa: E402

NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SCRIPTS = sorted(
    p
    for folder in ("ddpm_course", "ddpm_course/answers", "tools", "site", "tests", "benchmarks")
    for p in (ROOT / folder).glob("*.py")
)
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def cells(path: Path, kind: str) -> list:
    return [
        "".join(c["source"])
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == kind
    ]


def plain(code: str) -> str:
    "A cell as Python: without what only IPython understands."
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M)


def notebook(path: Path, *code: str) -> Path:
    made = [
        dict(
            cell_type="code", id=f"cell{n}", metadata={}, source=c, execution_count=None, outputs=[]
        )
        for n, c in enumerate(code)
    ]
    path.write_text(
        json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)), encoding="utf-8"
    )
    return path


# Every notebook by itself


EXPLORE = """from ddpm_course.core import set_seed
from ddpm_course.widgets import explore
import matplotlib.pyplot as plt
allowed = [1, 2]
def draw(k):
    if k not in allowed: raise KeyError(f'{k} cannot be drawn')
    plt.plot([k])"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The stage over notebooks that each need something they will not find, and two that need
    nothing."""
    tmp = tmp_path_factory.mktemp("stage")
    pinned = {n: colab_pins()[n] for n in ("ipython", "ipywidgets", "ipykernel", "traitlets")}
    made = [
        notebook(
            tmp / "good.ipynb",
            "import os\nassert os.listdir() == ['good.ipynb'] and os.environ['DDPM_COURSE_TIER'] =="
            " 'ci' and 'DDPM_COURSE_DATA' not in os.environ",
            "from ddpm_course.core import by_tier\nfrom ipywidgets import IntSlider, interact\ndef"
            " show(t): print(t)\ninteract(show, t=IntSlider(1, 0, 3))",
            "#| slow\n1 / 0",
            "import socket\nwith socket.create_server(('127.0.0.1', 0)) as s:"
            " socket.create_connection(s.getsockname()).close()",
        ),
        notebook(tmp / "repository.ipynb", "open('../settings.ini')"),
        notebook(tmp / "neighbour.ipynb", "open('good.ipynb')"),
        notebook(tmp / "tools.ipynb", "import nbdev"),
        notebook(tmp / "undeclared.ipynb", "import diffusers"),
        notebook(
            tmp / "network.ipynb",
            "import urllib.request\nurllib.request.urlopen('http://192.0.2.1/', timeout=5)",
        ),
        notebook(tmp / "names.ipynb", "import socket\nsocket.getaddrinfo('pypi.org', 443)"),
        notebook(
            tmp / "training.ipynb",
            "# training: seconds\nfrom pathlib import Path\nweights = 1",
            "print(weights)",
        ),
        notebook(
            tmp / "kept.ipynb",
            "from ddpm_course.core import cache_folder\nkept = cache_folder() / 'w'",
            "# training: seconds\nkept.parent.mkdir(parents=True)\nkept.write_text('w')",
            "assert kept.read_text() == 'w'",
        ),
        notebook(
            tmp / "apart.ipynb",
            "import os, tempfile\nfrom pathlib import Path\nhere, there = Path('before'),"
            " Path(tempfile.mkdtemp(), 'before')\nfor p in here, there: p.write_text('1')",
            "# training: seconds\nprint('trained')\nfor p in here, there:"
            " p.write_text('2')\nopen('trained', 'w').close()",
            "import os\nassert [p.read_text() for p in (here, there)] in (['1', '1'], ['2', '2'])\n"
            "assert os.path.exists('trained') == (here.read_text() == '2')",
        ),
        notebook(tmp / "shown.ipynb", EXPLORE, "explore(draw, k=[1, 2], name='0')"),
        notebook(
            tmp / "first.ipynb",
            "class Wrong:\n    def _repr_html_(self): raise KeyError('cannot be shown')\nWrong()",
        ),
        notebook(tmp / "end.ipynb", EXPLORE, "explore(draw, k=[1, 3], name='0')"),
        notebook(tmp / "magic.ipynb", "try: import ddpm_course\nexcept ImportError:\n    %pip x"),
        notebook(tmp / "syntax.ipynb", "def f(:"),
        notebook(
            tmp / "colab.ipynb",
            "from importlib.metadata import version",
            *(f"assert version({n!r}) == {v!r}, version({n!r})" for n, v in pinned.items()),
        ),
        notebook(tmp / "dies.ipynb", "import os\nos.kill(os.getpid(), 9)"),
        notebook(tmp / "exits.ipynb", "import sys\nsys.exit(0)", "1 / 0"),
    ]
    return subprocess.run(
        [sys.executable, ROOT / "tools/anywhere.py", "--without-training", *made],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["good", "shown", "magic", "apart", "apart, without training"])
def test_the_stage_passes_what_needs_nothing(stage, name):
    assert re.search(rf"^ok   {name}: ", stage.stdout, re.M), stage.stdout + stage.stderr


@pytest.mark.parametrize(
    "name, why",
    [
        ("repository", "FileNotFoundError"),
        ("neighbour", "FileNotFoundError"),
        ("tools", "ModuleNotFoundError"),
        ("undeclared", "ModuleNotFoundError"),
        ("network", "no network here"),
        ("names", "no network here"),
        ("first", "cannot be shown"),
        ("end", "3 cannot be drawn"),
        ("syntax", "SyntaxError"),
        ("dies", "ended with status 9"),
        ("exits", "SystemExit"),
    ],
)
def test_the_stage_fails_what_needs_more_than_the_wheel(stage, name, why):
    assert stage.returncode == 1 and re.search(rf"^FAIL {name}: ", stage.stdout, re.M), (
        stage.stdout + stage.stderr
    )
    assert why in stage.stdout.split(f"FAIL {name}: ")[1].split("\nFAIL ")[0], stage.stdout


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    "The same without forks, as on Windows and macOS: a kernel for each notebook."
    tmp = tmp_path_factory.mktemp("kernels")
    made = [
        notebook(tmp / "good.ipynb", "from ipywidgets import IntSlider\nIntSlider()"),
        notebook(tmp / "names.ipynb", "import socket\nsocket.getaddrinfo('pypi.org', 443)"),
        notebook(
            tmp / "kept.ipynb",
            "from pathlib import Path\nkept = Path.home() / 'w'",
            "# training: seconds\nkept.write_text('w')\nmade = 1",
            "assert kept.read_text() == 'w' and 'made' not in globals()",
        ),
    ]
    return subprocess.run(
        [sys.executable, ROOT / "tools/anywhere.py", "--kernels", "--without-training", *made],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "line",
    ["ok   good: ", "FAIL names: .*\n.*no network here", "FAIL kept: ", "ok   kept, without "],
)
def test_the_stage_runs_in_kernels_too(kernels, line):
    assert re.search(rf"^{line}", kernels.stdout, re.M | re.S), kernels.stdout + kernels.stderr


def test_versions_are_those_of_colab(stage):
    "Unless no package index answers: then the stage says so."
    assert re.search(r"^ok   colab: ", stage.stdout, re.M) or re.search(
        r"^note: not Colab's versions", stage.stdout, re.M
    ), stage.stdout


def test_the_stage_leaves_training_out_and_finds_what_is_missing_then(stage):
    assert re.search(r"^ok   training: ", stage.stdout, re.M) and re.search(
        r"^FAIL training, without training: ", stage.stdout, re.M
    )
    # an earlier run kept it
    assert re.search(r"^ok   kept, without training: ", stage.stdout, re.M), stage.stdout


# Colab


def test_badges_come_from_the_settings():
    assert not stale(), "python tools/badges.py makes them anew"


def test_stale_badges_are_found_and_made_anew(tmp_path):
    (tmp_path / "nbs").mkdir()
    shutil.copy(NOTEBOOKS[0], tmp_path / "nbs")
    shutil.copy(ROOT / "README.md", tmp_path)
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    (tmp_path / "settings.ini").write_text(
        re.sub(r"^user = .*$", "user = somebody", settings, flags=re.M), encoding="utf-8"
    )
    found = stale(tmp_path)
    assert len(found) == 2 and all("/github/somebody/" in text for text in found.values())
    json.loads(next(text for path, text in found.items() if path.suffix == ".ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_opens_on_colab_and_installs_what_is_missing(path):
    assert (
        f"[![Open In Colab]({BADGE})]({colab(ROOT, path.relative_to(NBS).as_posix())})"
        in cells(path, "markdown")[0]
    )
    code = [c for c in cells(path, "code") if not re.fullmatch(r"(#\|.*\n?)+", c)]
    assert re.match(
        r"try:\s+import ddpm_course\nexcept ImportError:\n    %pip install -q ddpm_course(\n|$)",
        code[0],
    ), code[0]
    others = [
        line
        for c in code
        for line in c.splitlines()
        if re.search(r"^\s*[%!]\s*(pip|conda|uv|apt)|-m pip", line)
    ]
    assert set(others) == {"    %pip install -q ddpm_course"}, others  # torch stays as Colab has it
    assert not [c for c in code if "import nbdev" in c], "nbdev is not there on Colab"


def test_readme_and_index_lead_to_colab():
    assert colab(ROOT, "index.ipynb") in (ROOT / "README.md").read_text(encoding="utf-8")
    table = "".join(cells(ROOT / "nbs/index.ipynb", "markdown"))
    assert {m[1] for m in LINK.finditer(table)} >= {
        p.name for p in NOTEBOOKS if re.match(r"[01]\d", p.name)
    }


# What a lesson costs, and what may be skipped

LESSONS = [p for p in NOTEBOOKS if re.match(r"[01]\d", p.name)]


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_says_at_the_top_what_it_costs_and_what_may_be_skipped(path):
    top, training = cells(path, "markdown")[0], [
        c for c in cells(path, "code") if c.startswith("# training")
    ]
    cost = r"^\| `cpu` \|.*(\d+|a) ?(s|seconds?|min|minutes?)\b.*\d GB \|$"
    assert re.search(cost, top, re.M) and "not measured" not in top, top
    assert ("begins with `# training`" in top) == bool(training)
    assert all(
        re.match(r"# training: .*(second|minute).*; this cell may be skipped", c) for c in training
    )


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_training_of_minutes_may_be_skipped(path):
    "Whoever trains on images for a thousand steps or for minutes says so in the first line."
    steps = r"cpu=(dict\(total_steps=)?\d{3,}"
    dict_of_steps = r"cpu=dict\(total_steps=\d{3,}"
    long = (
        rf"\.fit\(.*(minutes=|total_steps=by_tier\(.*{steps}|\*\*by_tier\(.*{dict_of_steps})"
    )
    for c in cells(path, "code"):
        if (
            re.search(long, c)
            and "PointNet" not in c
            and "refuses(" not in c
            and "#| export" not in c
        ):
            assert c.startswith("# training"), c


# Reading without running


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_picture_comes_from_another_host(path):
    doc = json.loads(path.read_text(encoding="utf-8"))
    shown = cells(path, "markdown") + [
        "".join(o.get("data", {}).get(k, ""))
        for c in doc["cells"]
        for o in c.get("outputs", [])
        for k in ("text/html", "text/markdown", "image/svg+xml")
    ]
    found = {
        u
        for text in shown
        for u in re.findall(
            r"!\[[^\]]*\]\((\w+:[^)]+)\)|<(?:img|video|audio|iframe|script|link)\b[^>]*\b(?:src|href)=[\"'](https?:[^\"']+)",
            text,
        )
        for u in u
        if u
    }
    assert found <= {BADGE}, found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_reader_sees_the_outputs(path):
    doc = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in doc["metadata"]
    outputs = [o for c in doc["cells"] for o in c.get("outputs", [])]
    assert len(json.dumps(outputs)) <= 2e6
    assert all(o.get("data", {"text/plain"}) for o in outputs), "an output without any data"


# Other systems, other Pythons

NEWER = {
    "tomllib",
    "StrEnum",
    "ReprEnum",
    "batched",
    "TaskGroup",
    "ExceptionGroup",
    "add_note",
    "file_digest",
    "LiteralString",
    "assert_never",
    "walk_up",
    "Self",
}


@pytest.mark.parametrize("path", [*SCRIPTS, *NOTEBOOKS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_nothing_needs_a_python_above_the_oldest(path):
    code = (
        [plain(c) for c in cells(path, "code")]
        if path.suffix == ".ipynb"
        else [path.read_text(encoding="utf-8")]
    )
    for c in code:
        tree = ast.parse(c, feature_version=(3, 10))
        used = (
            {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
            | {
                a.name
                for n in ast.walk(tree)
                if isinstance(n, (ast.Import, ast.ImportFrom))
                for a in n.names
            }
        )
        assert not used & NEWER, used & NEWER


def test_continuous_integration_runs_the_oldest_and_the_newest_python_on_three_systems():
    text = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    for word in (
        "ubuntu-latest",
        "macos-latest",
        "windows-latest",
        '"3.10"',
        '"3.11"',
        '"3.12"',
        '"3.13"',
        "tests/colab_installed.txt",
        "nbdev_test --n_workers",
    ):
        assert word in text, word
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert "min_python = 3.10" in settings and 'target-version = "py310"' in (
        ROOT / "pyproject.toml"
    ).read_text(encoding="utf-8")


def calls(path: Path):
    code = (
        "\n".join(map(plain, cells(path, "code")))
        if path.suffix == ".ipynb"
        else path.read_text(encoding="utf-8")
    )
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, ast.Call):
            yield (
                n,
                n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", ""),
                {k.arg for k in n.keywords},
            )


@pytest.mark.parametrize(
    "path",
    [p for p in SCRIPTS if p.parent.name in ("ddpm_course", "answers", "tools", "site")],
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_text_files_are_utf8_on_every_system(path):
    bad = [
        n.lineno
        for n, name, given in calls(path)
        if "encoding" not in given
        and (
            name in ("read_text", "write_text")
            or name == "open"
            and isinstance(n.func, ast.Name)
            and not any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in n.args[1:2])
        )
    ]
    assert not bad, f"lines {bad}: say encoding='utf-8', or Windows reads another"


@pytest.mark.parametrize(
    "path",
    [*(p for p in SCRIPTS if p.parent.name in ("ddpm_course", "answers")), *NOTEBOOKS],
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_nothing_counts_on_unix(path):
    text = (
        "\n".join(cells(path, "code"))
        if path.suffix == ".ipynb"
        else path.read_text(encoding="utf-8")
    )
    found = re.findall(
        r"os\.fork\b|[\"']fork[\"']|[\"']/(?:tmp|dev|proc|etc)\b|os\.(?:killpg|getpgid|setsid|getuid|mkfifo)|signal\.(?:SIGKILL|SIGHUP|SIGALRM|SIGUSR\d)|^import"
        r" (?:resource|fcntl|pwd|grp)\b|[\"']:[\"']\.join",
        text,
        re.M,
    )
    assert not found, found
