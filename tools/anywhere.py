"""Run notebooks as somebody meets them who has only installed the package.

usage: python tools/anywhere.py [--workers 2] [--timeout SECONDS] [--without-training] [NOTEBOOK...]

No notebook means all of nbs/. They get a wheel, a clean environment, an empty folder and no
network. The environment holds the wheel, what it requires, and a Jupyter kernel, as links to what
is installed here; nothing else can be imported. Each notebook is copied by itself into an empty
folder and executed top to bottom in a kernel of its own, in the ci tier. Cells that nbdev_test
skips are skipped. Whatever is not this machine cannot be reached. With --without-training the cells
whose first line begins with '# training' are left out too: what follows them must find weights,
from the package or kept by an earlier run.
"""

import argparse
import importlib.metadata as md
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


def closure(requirements: list) -> list:
    "The distributions that pip would bring for these requirements, from what is installed here."
    found, todo = {}, [(Requirement(r), frozenset()) for r in requirements]
    while todo:
        req, extras = todo.pop()
        if req.marker and not any(req.marker.evaluate({"extra": e}) for e in (*extras, "")):
            continue
        name, wanted = canonicalize_name(req.name), frozenset(req.extras)
        if name in found and wanted <= found[name][1]:
            continue
        dist = md.distribution(req.name)
        found[name] = (dist, wanted | (found[name][1] if name in found else frozenset()))
        todo += [(Requirement(r), wanted) for r in dist.requires or []]
    return [dist for dist, _ in found.values()]


def clean_environment(env: Path, wheel: Path, more: tuple = ()) -> Path:
    """A new environment with the wheel and links to its requirements (and those in `more`); its
    interpreter."""
    venv.create(env, with_pip=False, symlinks=os.name != "nt")
    python = env / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = site_packages(python)
    for dist in closure([*CFG["requirements"].split(), *more]):
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
    # in this very kernel
    where = f"import sys, {LIB}; assert {LIB}.__file__.startswith(sys.prefix), {LIB}.__file__"
    nb.cells.append(nbformat.v4.new_code_cell(where))
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--workers", type=int, default=2, help="kernels side by side")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one notebook")
    parser.add_argument(
        "--without-training",
        action="store_true",
        help="then run them again without the cells that begin with '# training'",
    )
    args = parser.parse_args()
    from outputs import shortened

    paths = [p.resolve() for p in args.notebooks] or sorted(NBS.glob("*.ipynb"))
    begin, bad = time.time(), []
    with tempfile.TemporaryDirectory(prefix="anywhere-", ignore_cleanup_errors=True) as tmp:
        tmp = Path(tmp).resolve()
        wheel = backend("build_wheel", sources(tmp / "source"), tmp)
        python = clean_environment(tmp / "environment", wheel, ("ipykernel",))
        (site_packages(python) / "this_machine_only.py").write_text(GUARD, encoding="utf-8")
        (site_packages(python) / "this_machine_only.pth").write_text(
            "import this_machine_only\n", encoding="utf-8"
        )
        print(f"{wheel.name} in a clean environment after {time.time() - begin:.1f} s", flush=True)

        def one(path: Path, training: bool):
            start, name = time.time(), path.stem + ("" if training else ", without training")
            env = alone(
                tmp / "homes" / path.stem,
                DDPM_COURSE_TIER="ci",
                MPLCONFIGDIR=str(tmp / "matplotlib"),
            )  # only the list of fonts is shared
            try:
                left = execute(
                    path,
                    tmp / name.replace(", ", "-").replace(" ", "-"),
                    python,
                    env,
                    args.timeout,
                    training,
                )
                print(
                    f"ok   {name}: {time.time() - start:.1f} s"
                    + (f", leaves {', '.join(left)}" if left else ""),
                    flush=True,
                )
            except Exception as e:
                # an error in a cell, a timeout, a kernel that died: report it, go on with the next
                bad.append(name)
                print(
                    f"FAIL {name}: {time.time() - start:.1f} s\n{type(e).__name__}:"
                    f" {shortened(e)}\n",
                    flush=True,
                )

        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda p: one(p, True), paths))
            if args.without_training:
                list(
                    pool.map(
                        lambda p: one(p, False),
                        [p for p in paths if '"# training' in p.read_text(encoding="utf-8")],
                    )
                )
    print(
        f"{len(paths)} notebooks, {time.time() - begin:.0f} s"
        + (f"; failed: {', '.join(sorted(bad))}" if bad else "")
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
