#!/bin/sh
# Make .venv and install the course with all that its tests and lessons need. Run from the repository: sh tools/setup.sh
# PYTHON=python3.12 chooses the interpreter. Uses uv where there is one (half a minute), else venv and pip (minutes).
set -eu
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE PYTHONPATH || true
oldest=$(sed -n 's/^min_python *= *//p' settings.ini)
newest=3.13 # the newest that is tested, and what Colab has

suits() { "$1" -c "import sys; v = sys.version_info[:2]; sys.exit(not (tuple(map(int, '$2'.split('.'))) <= v <= tuple(map(int, '$3'.split('.')))))" 2>/dev/null; }

python=${PYTHON:-}
if [ -n "$python" ]; then
    command -v "$python" >/dev/null 2>&1 || { echo "PYTHON=$python is not a program that can be run." >&2; exit 1; }
    suits "$python" "$oldest" 3.999 || { echo "PYTHON=$python is $("$python" --version 2>&1), but ddpm_course needs Python $oldest or newer." >&2; exit 1; }
else
    for p in python$newest python3 python python3.12 python3.11 python3.10; do
        if suits "$p" "$oldest" "$newest"; then python=$p; break; fi
    done
    if [ -z "$python" ]; then
        for p in python3 python; do if suits "$p" "$oldest" 3.999; then python=$p; break; fi; done
    fi
fi
if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then uv=yes; else uv=; fi
if [ -z "$python" ] && [ -z "$uv" ]; then
    echo "No Python $oldest or newer was found: install one from https://www.python.org/downloads/, or install uv (https://docs.astral.sh/uv/), which fetches one by itself." >&2
    exit 1
fi

if [ -x .venv/bin/python ] && ! suits .venv/bin/python "$oldest" 3.999; then
    echo ".venv has $(.venv/bin/python --version 2>&1), but ddpm_course needs Python $oldest or newer: run 'make distclean' first." >&2
    exit 1
fi
if [ ! -x .venv/bin/python ]; then
    echo "making .venv with ${python:-a Python that uv fetches}"
    if [ -n "$uv" ]; then
        uv venv --quiet --seed --python "${python:->=$oldest,<=$newest.99}" .venv
    elif ! "$python" -m venv .venv; then
        echo "'$python -m venv' failed: on Debian and Ubuntu, 'apt install python3-venv' first, or install uv." >&2
        rm -rf .venv
        exit 1
    fi
fi
echo "installing ddpm_course and its requirements into .venv (a download of some gigabytes the first time)"
if [ -n "$uv" ]; then
    uv pip install --python .venv/bin/python --compile-bytecode -e '.[dev]'
else
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
fi
touch .venv/.installed
