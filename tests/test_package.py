"""The repository as others meet it: the built package in a clean environment, and what is stored in
the notebooks."""

import ast
import importlib.metadata as md
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from anywhere import (  # noqa: E402
    CFG,
    LIB,
    alone,
    backend,
    clean_environment,
    package_files,
    site_packages,
    sources,
)
from colab_env import colab_pins  # noqa: E402

NBS = CFG["nbs_path"]
NOTEBOOKS = sorted(p for p in (ROOT / NBS).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
COLAB = f"https://colab.research.google.com/github/{CFG['user']}/{CFG['repo']}/blob/{CFG['branch']}/{NBS}/"
# needed to make it, not to use it
FORBIDDEN = ("nbdev", "fastcore", "execnb", "ghapi", "fastgit", "IPython", "jupyterlab")
LATE = (
    "torchvision",
    "matplotlib",
    "sklearn",
    "wandb",
    "PIL",
    "tqdm",
    "ipywidgets",
    "pandas",
)  # imported where they are used


def modules() -> list:
    return sorted(
        p.stem for p in (ROOT / LIB).glob("*.py") if p.stem not in ("__init__", "_modidx")
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel, built from the unpacked source distribution, as a packager would."
    tmp = tmp_path_factory.mktemp("build")
    sdist = backend("build_sdist", sources(tmp / "src"), tmp)
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp / "unpacked")
    return backend("build_wheel", next((tmp / "unpacked").iterdir()), tmp)


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel and links to its declared requirements, and to nothing else
    that is installed here."""
    return clean_environment(tmp_path_factory.mktemp("clean") / "venv", wheel)


def outside(command: list, cwd: Path, **env) -> subprocess.CompletedProcess:
    "Run in an empty folder with an empty home, and nothing of this environment."
    env = alone(cwd.parent / "home") | {"PYTHONDONTWRITEBYTECODE": "1"} | env
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)


def metadata(wheel: Path) -> Message:
    zf = zipfile.ZipFile(wheel)
    name = next(n for n in zf.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(zf.read(name).decode())


def test_wheel_holds_every_module_and_data_file_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {n for n in names if not n.split("/")[0].endswith(".dist-info")}
    assert inside == package_files()
    assert {f"{LIB}/py.typed", f"{LIB}/__init__.py", f"{LIB}/_modidx.py"} <= inside
    assert any(n.endswith("/LICENSE") for n in names) and any(
        n.endswith("/LICENSE-docs") for n in names
    )


def test_metadata_comes_from_settings(wheel):
    m = metadata(wheel)
    assert (m["Name"], m["Version"], m["Summary"]) == (
        CFG["lib_name"],
        CFG["version"],
        CFG["description"],
    )
    assert (
        m["Requires-Python"] == ">=" + CFG["min_python"] and m["License-Expression"] == "Apache-2.0"
    )
    plain = {str(Requirement(r)) for r in m.get_all("Requires-Dist") if "extra ==" not in r}
    assert plain == {str(Requirement(r)) for r in CFG["requirements"].split()}
    assert not {canonicalize_name(Requirement(r).name) for r in plain} & {
        canonicalize_name(f) for f in FORBIDDEN
    }
    torch = next(Requirement(r) for r in plain if Requirement(r).name == "torch")
    assert all(
        s.operator == ">=" for s in torch.specifier
    ), "an upper pin on torch would replace Colab's torch"
    zf = zipfile.ZipFile(wheel)
    scripts = next(zf.read(n) for n in zf.namelist() if n.endswith("/entry_points.txt")).decode()
    assert f"{LIB} = {LIB}.cli:main" in scripts
    body = m.get_payload()
    if (ROOT / "README.md").exists():
        assert not re.findall(
            r"\]\((?!https?:|mailto:|#)[^)]+\)|\bsrc(?:set)?=\"(?!https?:)", body
        ), "links in the readme would be dead on PyPI"


IMPORT_ALL = r"""
import importlib, json, os, socket, sys, time
forbidden, late, lib, names = json.loads(sys.argv[1])

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in forbidden:
            frame, who = sys._getframe(1), None
            while frame and not who:
                module = frame.f_globals.get('__name__', '')
                if module.split('.')[0] == lib:
                    who = module
                frame = frame.f_back
            tried.append((name, who))
            raise ModuleNotFoundError(f'{name} is not part of the installed package', name=name)
tried = []
sys.meta_path.insert(0, Refuse())
def no_network(*a, **k): raise AssertionError('an import used the network')
socket.socket.connect = socket.getaddrinfo = no_network

import torch
before = set(sys.modules)
start = time.process_time()
importlib.import_module(f'{lib}.training')
seconds = time.process_time() - start
heavy = sorted({m.split('.')[0] for m in set(sys.modules) - before} & set(late))
where, broken = {}, {}
for n in names:
    try: where[n] = importlib.import_module(f'{lib}.{n}').__file__
    except BaseException as e: broken[n] = f'{type(e).__name__}: {e}'
heavy_all = sorted({m.split('.')[0] for m in set(sys.modules) - before} & set(late))
lib = importlib.import_module(lib)
print(json.dumps(dict(
    seconds=seconds,
    heavy=heavy,
    heavy_all=heavy_all,
    where=where,
    broken=broken,
    tried=tried,
    version=lib.__version__,
    left=os.listdir('.') + os.listdir(os.path.expanduser('~')),
    grad=torch.is_grad_enabled(),
    dtype=str(torch.get_default_dtype()),
)))
"""


@pytest.fixture(scope="module")
def imported(clean, tmp_path_factory) -> dict:
    empty = tmp_path_factory.mktemp("outside") / "empty"
    empty.mkdir()
    arg = json.dumps([FORBIDDEN, LATE, LIB, modules()])
    done = outside([clean, "-I", "-c", IMPORT_ALL, arg], empty)
    assert done.returncode == 0, done.stdout + done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "python": clean, "stderr": done.stderr}


def test_clean_environment_has_none_of_the_tools(clean, tmp_path):
    code = (
        f"import importlib.util as u; print([n for n in {FORBIDDEN + ('pytest', 'diffusers')!r} if"
        " u.find_spec(n)])"
    )
    (tmp_path / "empty").mkdir()
    found = eval(outside([clean, "-I", "-c", code], tmp_path / "empty").stdout)
    assert set(found) <= {"IPython"}, found  # ipywidgets requires IPython


def test_every_module_imports_outside_the_repository(imported):
    assert not imported["broken"]
    assert sorted(imported["where"]) == modules()
    home = imported["python"].parent.parent
    assert all(Path(f).is_relative_to(home) for f in imported["where"].values()), imported["where"]


def test_no_module_imports_the_tools_it_is_made_with(imported):
    assert not [t for t in imported["tried"] if t[1]]


def test_importing_training_imports_nothing_heavy_and_does_nothing(imported):
    assert imported["heavy"] == []
    assert imported["left"] == [] and imported["stderr"] == ""
    assert imported["grad"] and imported["dtype"] == "torch.float32"


def test_no_module_imports_anything_heavy(imported):
    assert imported["heavy_all"] == []


def test_importing_training_costs_little_more_than_importing_torch(imported, clean, tmp_path):
    code = (
        f"import time, torch; t = time.process_time(); import {LIB}.training;"
        " print(time.process_time() - t)"
    )
    seconds = imported["seconds"]
    for _ in range(2):  # a busy machine may need a second try
        if seconds > 0.3:
            seconds = min(seconds, float(outside([clean, "-I", "-c", code], tmp_path).stdout))
    assert seconds <= 0.3, f"{seconds:.2f} s of processor time more than import torch"


def test_everything_the_package_imports_is_declared():
    "Also inside functions, where an import test does not look."
    extras = [f"{name}requirements" for name in ("", "export_", "stream_", "video_")]
    asked = [r for extra in extras for r in CFG[extra].split()]
    declared = {canonicalize_name(Requirement(r).name) for r in asked}
    by_import = {
        k: {canonicalize_name(d) for d in v} for k, v in md.packages_distributions().items()
    }
    # the first comes with ipywidgets, only for display in a notebook; the second with torch
    allowed = {"IPython", "filelock"}
    assert any(Requirement(r).name == "filelock" for r in md.requires("torch"))
    bad = set()
    for path in (ROOT / LIB).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else ([node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            )
            for top in (
                {n.split(".")[0] for n in names} - {LIB} - set(sys.stdlib_module_names) - allowed
            ):
                # by its own name, where an extra is not installed
                if not by_import.get(top, {canonicalize_name(top)}) & declared:
                    bad.add(f"{path.name} imports {top}")
    assert not bad, sorted(bad)


def test_versions_agree(imported):
    assert imported["version"] == CFG["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert (
        re.search(rf"^version: {re.escape(CFG['version'])}$", citation, re.M)
        and CFG["git_url"] in citation
    )
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(Unreleased|\d+\.\d+\.\d+)\]", changelog, re.M)


def test_command_line_runs_outside_the_repository(clean, tmp_path):
    (tmp_path / "empty").mkdir()
    script = clean.parent / "ddpm_course"
    done = outside([script, "--help"], tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    for command in ("train", "sample", "info", "demo"):
        assert re.search(rf"^\s+{command}\b", done.stdout, re.M), done.stdout
    assert os.listdir(tmp_path / "empty") == []


# On Colab, whose packages are there and imported before ours is installed


def unmet(requirements: list, installed: dict) -> list:
    "The requirements for which pip would change what is installed, or add to it."
    installed = {canonicalize_name(name): version for name, version in installed.items()}
    return [
        str(r)
        for r in map(Requirement, requirements)
        if not r.marker or r.marker.evaluate({"extra": "", "python_version": "3.13"})
        if (name := canonicalize_name(r.name)) not in installed
        or not r.specifier.contains(installed[name])
    ]


def test_colab_has_all_that_the_wheel_requires(wheel):
    required = metadata(wheel).get_all("Requires-Dist")
    assert len(required) >= len(CFG["requirements"].split())
    assert unmet(required, colab_pins()) == []
    assert unmet(["ipywidgets>=8", "torch>=2.6", "gone"], colab_pins()) == ["ipywidgets>=8", "gone"]


def test_requirements_have_lower_bounds_only():
    for r in map(Requirement, CFG["requirements"].split()):
        assert [s.operator for s in r.specifier] == [">="], r


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> Path:
    """The Python of an environment that claims to hold what Colab has: for pip, a distribution is
    there if its metadata is."""
    env = tmp_path_factory.mktemp("colab") / "venv"
    venv.create(env, with_pip=False, symlinks=os.name != "nt")
    python = env / ("Scripts" if os.name == "nt" else "bin") / "python"
    for name, version in colab_pins().items():
        info = site_packages(python) / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(text, encoding="utf-8")
        (info / "INSTALLER").write_text("pip\n", encoding="utf-8")
    return python


def would_install(python: Path, folder: Path) -> subprocess.CompletedProcess:
    "What pip would do, which knows no other packages than those in this folder."
    command = [sys.executable, "-m", "pip", "--isolated", "--python", python, "install"]
    command += ["--dry-run", "--no-index", "--find-links", folder, CFG["lib_name"]]
    return outside(command, folder, PIP_CONFIG_FILE=os.devnull)


def test_pip_on_colab_would_install_the_course_and_nothing_else(wheel, colab):
    done = would_install(colab, wheel.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(r"^Would install (.+)$", done.stdout, re.M)[1]
    assert said.split() == [f"{CFG['lib_name']}-{CFG['version']}"]


@pytest.mark.parametrize("wrong", ["ipywidgets>=8", "torch>=2.6,<2.11", "nbdev>=2"])
def test_pip_on_colab_would_change_something_for_a_wrong_requirement(
    wheel, colab, tmp_path, wrong
):
    name = re.match(r"\w+", wrong)[0]
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(tmp_path / wheel.name, "w") as new:
        for file in old.namelist():
            content = old.read(file)
            if file.endswith(".dist-info/METADATA"):
                line = f"Requires-Dist: {wrong}\n".encode()
                content = re.sub(rb"(?m)^Requires-Dist: %b>.*\n" % name.encode(), b"", content)
                content = content.replace(b"Requires-Dist:", line + b"Requires-Dist:", 1)
            new.writestr(file, content)
    done = would_install(colab, tmp_path)
    assert done.returncode and "No matching distribution found for " + name in done.stderr, (
        done.stdout + done.stderr
    )


# What is stored in the repository


def tracked() -> list:
    "Files that git has or would take; without git, all but hidden folders and build products."
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0 and done.stdout:
        return [ROOT / n for n in done.stdout.split("\0") if n and (ROOT / n).is_file()]
    skip = {"build", "dist", "runs", "wandb", "__pycache__"}
    return [
        p
        for p in ROOT.rglob("*")
        if p.is_file()
        and not {q for q in p.relative_to(ROOT).parts if q.startswith(".") or q in skip}
    ]


def visible(path: Path) -> str:
    "The text of a file; of a notebook without its pictures, whose base64 may spell anything."
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return re.sub(
        r'("image/(?:png|jpeg|gif)": |data:(?:image|video|audio|font)/[\w+.-]+;base64,)[^\n]*',
        r"\1",
        text,
    )


def test_no_tracked_file_names_a_place_on_somebodys_machine():
    places = re.compile(
        r"(?<![\w.:/$}])/(?:root|work|workspace|home/\w+|Users/\w+|mnt/\w+|var/folders|tmp/\w)[/\w]|[A-Z]:\\\\?Users\\"
    )
    own = [str(ROOT) + "/", str(Path.home()) + "/", sys.prefix + "/"]
    bad = []
    for path in tracked():
        text = visible(path)
        bad += [
            f"{path.relative_to(ROOT)}: {m[0]!r} in {text[max(0, m.start() - 30):m.end() + 30]!r}"
            for m in places.finditer(text)
        ]
        bad += [f"{path.relative_to(ROOT)}: {o}" for o in own if o in text]
    assert not bad, "\n".join(bad[:20])


def test_no_tracked_file_is_large():
    assert not [(p.name, p.stat().st_size) for p in tracked() if p.stat().st_size > 10e6]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_as_stored(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    head = "".join(
        "".join(c["source"]) + "\n" for c in nb["cells"][:4] if c["cell_type"] == "markdown"
    )
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    page = COLAB + path.relative_to(ROOT / NBS).as_posix()
    badge = f"[![Open In Colab]({picture})]({page})"
    assert re.search(r"^# \S", head, re.M), "the first cells have no title"
    assert badge in head, f"the first cells have no Colab badge, or another one than {badge}"
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [o["ename"] for o in outputs if o["output_type"] == "error"]
    assert not [
        1 for o in outputs if any("widget" in k for k in o.get("data", {}))
    ], "widgets show nothing without a kernel"
    assert not [
        1 for o in outputs if o.get("name") == "stderr" and re.search(r"\d+%\|", "".join(o["text"]))
    ], "a progress bar is stored"
    assert (
        all(c.get("execution_count") is None for c in nb["cells"])
        and "widgets" not in nb["metadata"]
    )
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    ids = [c["id"] for c in nb["cells"]]
    assert len(ids) == len(set(ids)), "cell ids are not unique"
    assert path.stat().st_size <= 2e6, f"{path.stat().st_size / 1e6:.1f} MB"


def test_badges_of_the_readme_lead_to_notebooks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"https://colab\.research\.google\.com/github/[^)\s\"]+", text)
    assert links and all(link.startswith(COLAB) for link in links), links
    assert not [link for link in links if not (ROOT / NBS / link[len(COLAB) :]).exists()]
    for needed in ("make demo", "make test", f"pip install {CFG['lib_name']}"):
        assert needed in text, f"the readme does not say {needed!r}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text) + re.findall(
        r'<(?:img|source)[^>]*\bsrc(?:set)?="(?!https?:)([^"]+)"', text
    )
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name[0] in "01"], ids=lambda p: p.stem)
def test_a_lesson_starts_from_the_same_random_numbers(path):
    "What a reader runs shows what the page shows, and CI does not fail in one run of twelve."
    code = [
        "".join(c["source"])
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    ]
    set_up = next(source for source in code if "except ImportError" in source)
    assert re.search(r"^set_seed\(0\);?$", set_up, re.M), set_up


def test_links_between_notebooks_lead_somewhere():
    bad = []
    for path in NOTEBOOKS:
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if c["cell_type"] == "markdown":
                links = re.findall(
                    r"\]\((?!https?:|mailto:|attachment:|#)([^)#\s]+\.(?:ipynb|md|png|py))",
                    "".join(c["source"]),
                )
                bad += [
                    f"{path.name}: {link}" for link in links if not (path.parent / link).exists()
                ]
    assert not bad, "\n".join(bad)


def test_the_package_keeps_to_88_columns():
    "A laptop and a page of the website show no more. nbdev's own lines, __all__, are not ours."
    bad = []
    for path in sorted((ROOT / LIB).rglob("*.py")):
        if path.name == "_modidx.py":
            continue
        text = path.read_text(encoding="utf-8")
        nbdevs = set()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                nbdevs.update(range(node.lineno, node.end_lineno + 1))
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > 88 and number not in nbdevs:
                where = f"{path.relative_to(ROOT).as_posix()}:{number}"
                bad.append(f"{where}: {len(line)} columns, {line.strip()[:50]}...")
    assert not bad, "lines of more than 88 columns; shorten their cells:\n" + "\n".join(bad)
