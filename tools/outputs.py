"""Run lessons to the end in fresh kernels and store their outputs in the notebooks.

usage: python tools/outputs.py [--flags slow,cuda,network] [--only TEXT] [--cwd FOLDER]
                               [--timeout SECONDS] NOTEBOOK...

The size of a run is DDPM_COURSE_TIER (cpu if unset; ci is refused, because stored outputs come from
real runs). Cells that nbdev_test would skip are skipped here too and keep what they show. Nothing
is stored for a notebook that fails.

--only runs the set-up cell and the cells that contain TEXT, such as 'check("', and leaves the
others as they are.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from execnb.nbio import dict2nb, write_nb
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.output_widget import OutputWidget
from nbdev.clean import clean_nb
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {"slow", "cuda", "network"}  # tst_flags of settings.ini
SKIP = "skip-execution"
WIDGET = "application/vnd.jupyter.widget-view+json"
WARN_MB = 2
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# '37%|####    | 37/100 [00:01<00:02, 31.2it/s]'
BAR = re.compile(r"\d+%\|.*\||\d+(it|ex|batch)?s?/s\b|\d+it \[")
CALLABLE = re.compile(r"<function [^>]*>|functools\.partial\(.*\)")


class QuietOutput(OutputWidget):
    """Captures what a slider draws without sending it back: a send beside the waiting loop can lose
    the kernel's reply for good."""

    def sync_state(self):
        pass


class ThisPython(AsyncKernelManager):
    "A kernel of the running interpreter, whatever kernel specifications the user has."

    executable = sys.executable

    @property
    def kernel_spec(self):
        argv = [
            self.executable,
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            "--log-level=40",
        ]
        return KernelSpec(argv=argv, display_name="python3", language="python")


def directives(source: str) -> dict:
    "nbdev's `#| name: value` lines at the head of a cell."
    found = {}
    for line in source.splitlines():
        if m := re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$", line):
            found[m[1]] = m[2].strip()
        elif line.strip() and not line.lstrip().startswith(("#", "%%")):
            break
    return found


def skipped(source: str, flags: set) -> bool:
    d = directives(source)
    return (
        bool((FLAGS - flags) & d.keys())
        or d.get("eval", "").lower() == "false"
        or "nbdev_export(" in source
    )


def scrub(text: str, replacements: list) -> str:
    "Take the paths of this machine out of a text."
    for old, new in replacements:
        text = text.replace(old, new)
    return re.sub(r"\S*ipykernel_\d+[\\/]\d+\.py", "<cell>", text)


def terminal(text: str) -> str:
    "What is left on a terminal: a carriage return begins the line again."
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def kept_stream(name: str, text: str) -> str:
    text = ANSI.sub("", terminal(text))
    if name == "stderr":
        text = "".join(
            line for line in text.splitlines(keepends=True) if line.strip() and not BAR.search(line)
        )
    return text


def readable(outputs: list, replacements: list) -> list:
    "The outputs that somebody without a kernel can see, streams joined, paths removed."
    widget = any(WIDGET in o.get("data", {}) for o in outputs)
    joined = []
    for o in outputs:
        if o["output_type"] == "stream" and joined and joined[-1].get("name") == o["name"]:
            joined[-1] = {**joined[-1], "text": joined[-1]["text"] + o["text"]}
        elif WIDGET not in o.get("data", {}):
            joined.append(dict(o))
    kept = []
    for o in joined:
        if o["output_type"] == "stream":
            o["text"] = scrub(kept_stream(o["name"], o["text"]), replacements)
            if not o["text"].strip():
                continue
        elif "data" in o:
            plain = o["data"].get("text/plain", "")
            if widget and o["data"].keys() == {"text/plain"} and CALLABLE.fullmatch(plain):
                continue  # what interact() returns
            o["data"] = {
                k: scrub(v, replacements) if k.startswith("text/") else v
                for k, v in o["data"].items()
            }
        kept.append(o)
    return kept


def run(
    path: Path, flags: set, cwd: Path, timeout: float, replacements: list, only: str = ""
) -> dict:
    "Execute the notebook; its JSON with new outputs. Raises what nbclient raises."
    before = path.read_text(encoding="utf-8")
    nb = nbformat.reads(before, 4)
    for cell in nb.cells:
        others = only and only not in cell.source and "except ImportError" not in cell.source
        if cell.cell_type == "code" and (others or skipped(cell.source, flags)):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), SKIP]
    end = time.monotonic() + timeout
    client = NotebookClient(
        nb,
        timeout_func=lambda cell: max(1, int(end - time.monotonic())),
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(cwd)}},
        skip_cells_with_tag=SKIP,
    )
    client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": QuietOutput}}
    client.execute()
    for cell in nb.cells:
        if cell.cell_type == "code" and SKIP not in cell.metadata.get("tags", []):
            cell.outputs = (
                []
                if "nbdev_export(" in cell.source
                else [nbformat.from_dict(o) for o in readable(cell.outputs, replacements)]
            )
    if path.read_text(encoding="utf-8") != before:
        raise RuntimeError(f"{path.name} was edited while it ran: run it again")
    done, doc = json.loads(nbformat.writes(nb)), json.loads(before)
    for old, new in zip(doc["cells"], done["cells"], strict=True):
        if old["cell_type"] == "code":
            old["outputs"], old["execution_count"] = new["outputs"], None
    doc["metadata"].pop("widgets", None)
    return doc


def store(doc: dict, path: Path):
    "Write as nbdev_clean would, by way of a temporary file."
    cfg = get_config(path=ROOT)
    clean_nb(
        doc,
        False,
        cfg.allowed_metadata_keys.split(),
        cfg.allowed_cell_metadata_keys.split(),
        cfg.clean_ids,
    )
    part = path.with_name(path.name + ".part")
    try:
        write_nb(dict2nb(doc), part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def shortened(error: Exception) -> str:
    "Cell and traceback, without colours; the middle is left out if they are long."
    text = ANSI.sub("", str(error))
    return text if len(text) < 6000 else text[:2000] + "\n  ...\n" + text[-4000:]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument(
        "--flags", default="", help="also run cells with these flags: slow,cuda,network"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="run only the set-up cell and the cells that contain this",
    )
    parser.add_argument("--cwd", type=Path, help="run in this folder instead of a new empty one")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one notebook")
    args = parser.parse_args()
    flags = {f for f in re.split(r"[,\s]+", args.flags) if f}
    if flags - FLAGS:
        parser.error(f"unknown flags {sorted(flags - FLAGS)}: choose from {sorted(FLAGS)}")
    if os.environ.setdefault("DDPM_COURSE_TIER", "cpu") == "ci":
        parser.error(
            "stored outputs come from real runs: DDPM_COURSE_TIER must be cpu, gpu or big, not ci"
        )
    if missing := [str(p) for p in args.notebooks if not p.is_file()]:
        parser.error(f"no such notebook: {', '.join(missing)}")

    for name in ("IN_TEST", "PYTHONDONTWRITEBYTECODE", "MPLBACKEND"):
        os.environ.pop(name, None)
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    # controls are stored with their pictures: who reads has no kernel
    os.environ["DDPM_COURSE_STILL"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    print(f"tier {os.environ['DDPM_COURSE_TIER']}, {sys.executable}", flush=True)
    bad = []
    for path in (p.resolve() for p in args.notebooks):
        start = time.time()
        with tempfile.TemporaryDirectory(prefix="lesson-", ignore_cleanup_errors=True) as scratch:
            work, config = Path(scratch, "work"), Path(scratch, "ipython")
            work.mkdir()
            os.environ["IPYTHONDIR"] = str(config)  # no start-up files of the user's
            cwd = (args.cwd or work).resolve()
            places = [
                (str(cwd), "."),
                (os.path.realpath(scratch), "."),
                (scratch, "."),
                *((p, "site-packages") for p in sys.path if p.endswith("site-packages")),
                (sys.prefix, "python"),
                (os.environ.get("DDPM_COURSE_DATA") or "\0", "data"),
                (str(ROOT), "."),
                (str(Path.home()), "~"),
            ]
            places = [(old.rstrip("/\\"), new) for old, new in places if old.strip("/\\")]
            try:
                doc = run(path, flags, cwd, args.timeout, places, args.only)
            except Exception as e:
                # an error in a cell, a timeout, a kernel that died: report it, go on with the next
                bad.append(path.name)
                print(
                    f"FAIL {path.name}: {time.time() - start:.1f} s, nothing"
                    f" stored\n{type(e).__name__}: {shortened(e)}\n",
                    flush=True,
                )
                continue
        store(doc, path)
        size = path.stat().st_size / 1e6
        print(
            f"ok   {path.name}: {time.time() - start:.1f} s, {size:.2f} MB"
            + (f"  WARNING: above {WARN_MB} MB" if size > WARN_MB else ""),
            flush=True,
        )
        for n, cell in enumerate(doc["cells"]):
            for o in cell.get("outputs", []):
                if o.get("name") == "stderr":
                    print(
                        f"     cell {n} wrote to stderr: {''.join(o['text']).strip()[:300]}",
                        flush=True,
                    )
    if bad:
        print(f"failed: {', '.join(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
