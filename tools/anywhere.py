"""Run notebooks as somebody meets them on Colab who has only installed the package.

usage: python tools/anywhere.py [--workers 2] [--timeout SECONDS] [--without-training]
                                [--kernels] [--keep-times] [NOTEBOOK...]

No notebook means all of nbs/. They get a wheel, a clean environment, an empty folder and no
network. The environment holds the wheel, what it requires, and a Jupyter kernel; nothing else can
be imported. IPython, ipywidgets and their like have the versions that Colab has
(tools/colab_env.py, tests/colab_installed.txt). torch and the other large packages are links to
what is installed here, for this Python, since Colab's own would be a download of gigabytes; the
Colab job of .github/workflows/test.yml has them all. Where no package index answers, everything is
what is installed here, and a line says so.

Each notebook is copied by itself into an empty folder and executed top to bottom in the ci tier, in
a process of its own (tools/forked.py); with --kernels, or where processes cannot be forked safely,
in a kernel of its own. Cells that nbdev_test skips are skipped. Whatever is not this machine cannot
be reached. With --without-training a notebook is run once more without the cells whose first line
begins with '# training': what follows them must find weights, from the package or kept by the
first run.
"""

import argparse
import importlib.metadata as md
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path

import times
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT / "settings.ini", encoding="utf-8")
CFG = CFG["DEFAULT"]
LIB, NBS = CFG["lib_path"], ROOT / CFG["nbs_path"]
SOURCES = (
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "LICENSE-docs",
    "CHANGELOG.md",
    "CITATION.cff",
)
DATA_FILES = (".json", ".safetensors", ".png")
# the last cell of each notebook
WHERE = f"import sys, {LIB}; assert {LIB}.__file__.startswith(sys.prefix), {LIB}.__file__"
TRAINING = re.compile(r"# training\b")  # the first line of a cell that may be skipped

GUARD = """"A network that reaches this machine and nothing else."
import ipaddress, socket

def _here(address):
    host = address[0] if isinstance(address, tuple) else address  # a path, for a Unix socket
    if isinstance(host, bytes): host = host.decode(errors="replace")
    if not isinstance(address, tuple) or host in ("", "localhost", None): return True
    try: return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError: return False

def _guarded(name, which):
    real = getattr(socket.socket, name)
    def call(self, *args):
        if not _here(args[which]):
            raise OSError(101, f"no network here: tried to reach {args[which]}")
        return real(self, *args)
    setattr(socket.socket, name, call)

for _name, _which in (("connect", 0), ("connect_ex", 0), ("sendto", -1)): _guarded(_name, _which)
_look_up = socket.getaddrinfo
def _local(host, *args, **kw):
    if not _here((host,)): raise socket.gaierror(-3, f"no network here: tried to look up {host}")
    return _look_up(host, *args, **kw)
socket.getaddrinfo = _local
"""


def package_files() -> set:
    "What belongs into the wheel, relative to the repository."
    return {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / LIB).rglob("*")
        if p.suffix in (".py", *DATA_FILES) or p.name == "py.typed"
        if "__pycache__" not in p.parts
    }


def backend(hook: str, cwd: Path, out: Path) -> Path:
    "Build with setuptools itself: what pip and build do, without their download of it."
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.strip().splitlines()[-1]


def sources(folder: Path) -> Path:
    "A copy of what the package is built from: setuptools writes beside its sources."
    for name in (*package_files(), *SOURCES):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def closure(requirements: list, places: list) -> list:
    """The distributions that pip would bring for these requirements, each from the first of these
    places (folders of installed packages) that has it."""
    found, todo = {}, [(Requirement(r), frozenset()) for r in requirements]
    while todo:
        req, extras = todo.pop()
        if req.marker and not any(req.marker.evaluate({"extra": e}) for e in (*extras, "")):
            continue
        name, wanted = canonicalize_name(req.name), frozenset(req.extras)
        if name in found and wanted <= found[name][1]:
            continue
        dist = next(iter(md.distributions(name=req.name, path=places)), None)
        if dist is None:
            raise md.PackageNotFoundError(req.name)
        found[name] = (dist, wanted | (found[name][1] if name in found else frozenset()))
        todo += [(Requirement(r), wanted) for r in dist.requires or []]
    return [dist for dist, _ in found.values()]


def clean_environment(env: Path, wheel: Path, more: tuple = (), places: tuple = ()) -> Path:
    """A new environment with the wheel and links to its requirements (and those in `more`), taken
    from `places` before what is installed here; its interpreter."""
    venv.create(env, with_pip=False, symlinks=os.name != "nt")
    python = env / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = site_packages(python)
    for dist in closure([*CFG["requirements"].split(), *more], [*map(str, places), *sys.path]):
        for name in {
            f.parts[0]
            for f in dist.files or []
            if f.parts[0] not in ("..", "__pycache__") and f.suffix != ".pth"
        }:
            source = Path(dist.locate_file(name))
            if source.exists() and not (site / name).exists():
                (site / name).symlink_to(source, target_is_directory=source.is_dir())
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--disable-pip-version-check",
            wheel,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(
        subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
    )


def alone(home: Path, **env) -> dict:
    """Environment variables with a home of its own, without anything of this project, this
    environment or this user."""
    drop = (
        "PYTHON",
        "DDPM",
        "JUPYTER",
        "IPYTHON",
        "VIRTUAL_ENV",
        "IN_TEST",
        "XDG",
        "WANDB",
        "MPL",
        "CONDA",
    )
    keep = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(drop) and not k.lower().endswith("_proxy")
    }
    home.mkdir(parents=True, exist_ok=True)
    own = {
        "HOME": str(home),
        "USERPROFILE": str(home),
        "IPYTHONDIR": str(home / "ipython"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    return keep | own | env


def colab_packages() -> tuple:
    "The folder of Colab's notebook programs; empty, and a line about it, where they cannot be had."
    from colab_env import colab_environment

    try:
        return (site_packages(colab_environment()),)
    except ConnectionError as e:
        print(f"note: not Colab's versions of IPython and ipywidgets, but those here: {e}")
        return ()


def execute(
    path: Path, folder: Path, python: Path, env: dict, timeout: float, training: bool = True
) -> list:
    """Run a copy of the notebook in an empty folder; the files it leaves there. Raises what
    nbclient raises."""
    import nbformat
    from nbclient import NotebookClient
    from outputs import SKIP, QuietOutput, ThisPython, skipped

    class CleanPython(ThisPython):
        executable = str(python)

    folder.mkdir()
    shutil.copyfile(path, folder / path.name)
    nb = nbformat.read(folder / path.name, 4)
    for cell in nb.cells:
        if cell.cell_type == "code" and (
            skipped(cell.source, set()) or not training and TRAINING.match(cell.source)
        ):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), SKIP]
    nb.cells.append(nbformat.v4.new_code_cell(WHERE))
    end = time.monotonic() + timeout
    client = NotebookClient(
        nb,
        timeout_func=lambda cell: max(1, int(end - time.monotonic())),
        kernel_manager_class=CleanPython,
        resources={"metadata": {"path": str(folder)}},
        skip_cells_with_tag=SKIP,
    )
    client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": QuietOutput}}
    client.execute(env=env)
    return sorted(p.name for p in folder.iterdir() if p.name != path.name)


def in_kernels(jobs: list, python: Path, workers: int, timeout: float):
    "Run jobs in kernels side by side: yields the outcome of each."

    def one(job: dict) -> dict:
        start, left, error = time.time(), [], ""
        place = Path(job["notebook"]), Path(job["folder"]), python, job["env"]
        try:
            left = execute(*place, timeout, job["training"])
        except Exception as e:  # an error in a cell, a timeout, a kernel that died: go on
            error = f"{type(e).__name__}: {e}"
        return dict(name=job["name"], left=left, error=error, seconds=time.time() - start)

    second = [job | job["second"] | dict(training=False) for job in jobs if job["second"]]
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, jobs)
        yield from pool.map(one, second)


def in_forks(jobs: list, python: Path, workers: int, timeout: float):
    "Run jobs in forked processes side by side: yields the outcome of each."
    from outputs import skipped

    for job in jobs:
        doc = json.loads(Path(job["notebook"]).read_text(encoding="utf-8"))
        sources = ["".join(c["source"]) for c in doc["cells"] if c["cell_type"] == "code"]
        job["cells"] = [
            dict(source=s, training=bool(TRAINING.match(s)))
            for s in [*sources, WHERE]
            if not skipped(s, set())
        ]
    results = Path(jobs[0]["results"])
    asked = results / "jobs.json"
    work = dict(jobs=jobs, workers=workers, timeout=timeout)
    asked.write_text(json.dumps(work), encoding="utf-8")
    command = [python, ROOT / "tools" / "forked.py", asked]
    server = subprocess.Popen(
        command, cwd=results, env=jobs[0]["env"], stdout=subprocess.PIPE, text=True
    )
    with server:
        for line in server.stdout:
            yield json.loads(line)
    if server.returncode:
        raise RuntimeError(f"tools/forked.py ended with status {server.returncode}")


def made_jobs(paths: list, tmp: Path, without_training: bool) -> list:
    "What is to be run: each notebook once, and perhaps a second time without its training cells."
    results = tmp / "results"
    results.mkdir()
    jobs = []
    for path in paths:
        env = alone(
            tmp / "homes" / path.stem,
            DDPM_COURSE_TIER="ci",
            IN_TEST="1",  # both ends of each control are drawn
            MPLCONFIGDIR=str(tmp / "matplotlib"),  # only the list of fonts is shared
        )
        trains = without_training and '"# training' in path.read_text(encoding="utf-8")
        second = dict(name=f"{path.stem}, without training", folder=str(tmp / f"{path.stem}-2"))
        jobs.append(
            dict(
                name=path.stem,
                notebook=str(path),
                folder=str(tmp / path.stem),
                env=env,
                training=True,
                second=second if trains else None,
                results=str(results),
            )
        )
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--workers", type=int, default=2, help="notebooks side by side")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one notebook")
    parser.add_argument(
        "--without-training",
        action="store_true",
        help="run them also without the cells that begin with '# training'",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        default=sys.platform != "linux",  # macOS and its libraries do not survive a fork
        help="a new kernel for each notebook, instead of a forked process",
    )
    parser.add_argument(
        "--keep-times", action="store_true", help="write down how long each took, for the next run"
    )
    args = parser.parse_args()
    from outputs import shortened

    paths = {p.stem: p.resolve() for p in args.notebooks or sorted(NBS.glob("*.ipynb"))}
    paths = [paths[name] for name in times.longest_first(paths, "notebooks")]
    begin, bad, taken = time.time(), [], {}
    with tempfile.TemporaryDirectory(prefix="anywhere-", ignore_cleanup_errors=True) as tmp:
        tmp = Path(tmp).resolve()
        wheel = backend("build_wheel", sources(tmp / "source"), tmp)
        python = clean_environment(tmp / "environment", wheel, ("ipykernel",), colab_packages())
        (site_packages(python) / "this_machine_only.py").write_text(GUARD, encoding="utf-8")
        (site_packages(python) / "this_machine_only.pth").write_text(
            "import this_machine_only\n", encoding="utf-8"
        )
        print(f"{wheel.name} in a clean environment after {time.time() - begin:.1f} s", flush=True)
        run = in_kernels if args.kernels else in_forks
        jobs = made_jobs(paths, tmp, args.without_training)
        for outcome in run(jobs, python, args.workers, args.timeout):
            name, seconds, left = outcome["name"], outcome["seconds"], outcome["left"]
            # of the processor, where that is known: other programs change it little
            taken[name] = outcome.get("cpu", seconds)
            if outcome["error"]:
                bad.append(name)
                print(f"FAIL {name}: {seconds:.1f} s\n{shortened(outcome['error'])}\n", flush=True)
            else:
                leaves = f", leaves {', '.join(left)}" if left else ""
                print(f"ok   {name}: {seconds:.1f} s ({taken[name]:.1f}){leaves}", flush=True)
    if args.keep_times:
        times.keep("notebooks", taken, replace=True)
    print(
        f"{len(paths)} notebooks, {time.time() - begin:.0f} s"
        + (f"; failed: {', '.join(sorted(bad))}" if bad else "")
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
