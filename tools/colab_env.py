"""An environment with the notebook programs that Google Colab has (ipywidgets 7, IPython 7), and
JupyterLab 3, which goes with them.

usage: python tools/colab_env.py      makes it, if it is not there yet, and prints its Python

It holds no torch and nothing of this project: whoever uses it adds what else is wanted.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = ROOT / "tests" / "colab_installed.txt"
NOTEBOOK_STACK = (  # what of the list shows notebooks and runs their cells
    "ipykernel",
    "ipython",
    "ipywidgets",
    "jupyter_client",
    "matplotlib-inline",
    "nbclient",
    "nbformat",
    "notebook",
    "tornado",
    "tqdm",
    "traitlets",
    "widgetsnbextension",
)
JUPYTERLAB_3 = ("jupyterlab>=3.5,<3.6", "jupyterlab_widgets>=1.1,<2")


def colab_pins() -> dict:
    "What Colab has: name -> version."
    text = INSTALLED.read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.M))


def colab_environment(folder: Path = ROOT / ".venv-colab") -> Path:
    """The Python of an environment in this folder, made once for each list of versions. Raises
    ConnectionError where no package index answers, RuntimeError for what else pip says."""
    pins = colab_pins()
    wanted = [f"{name}=={pins[name]}" for name in NOTEBOOK_STACK]
    wanted += JUPYTERLAB_3
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:8]
    made = folder.resolve() / f"python{version}-{digest}"
    if not made.exists():
        _make(made, wanted)
    return _python(made)


def _python(environment: Path) -> Path:
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"


def _make(made: Path, wanted: list):
    made.parent.mkdir(parents=True, exist_ok=True)
    # under another name until it is whole: no half of it is ever taken for the thing
    part = Path(tempfile.mkdtemp(prefix="part-", dir=made.parent))
    try:
        venv.create(part, symlinks=os.name != "nt")
        _install(_python(part), wanted)
        part.rename(made)
    except OSError:
        if not made.exists():  # else somebody was quicker
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _install(python: Path, wanted: list):
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=1", "--prefer-binary", *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    said = "\n".join(line for line in done.stderr.splitlines() if "ERROR" in line)
    if "(from versions: none)" in said:  # pip knows no single version of a package
        raise ConnectionError(f"no package index answers: {said}")
    raise RuntimeError(f"pip cannot install Colab's notebook programs: {said or done.stderr}")


if __name__ == "__main__":
    print(colab_environment())
