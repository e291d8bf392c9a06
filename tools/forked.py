"""Run notebooks in processes that are forked from one which has imported what all of them need.

usage: python tools/forked.py JOBS.json

Runs the jobs in their order and writes a line of JSON for each result. `tools/anywhere.py` starts
it with the Python of a clean environment: it uses nothing but the standard library and IPython.
Nothing is computed before a fork, so that no library has started threads, which a fork would lose.
Each notebook gets a process, a folder and a home of its own, and IPython's shell, without a kernel,
executes its cells.

At the first cell that may be skipped the process forks again: one goes on with that cell; the other
waits for the end of the first, puts the notebook's folder (with its temporary files) back as it was
at the fork, and runs the rest without such cells. The home stays: it may hold weights that the
first one kept.
"""

import atexit
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

HEAVY = (  # what notebooks import; the package itself they import themselves
    "torch",
    "torch._dynamo",  # a second, at the first step of an optimizer
    "torchvision",
    "matplotlib.pyplot",
    "matplotlib_inline.backend_inline",
    "IPython.core.interactiveshell",
    "ipywidgets",
    "scipy.linalg",
    "sklearn.datasets",
    "PIL.Image",
    "tqdm.auto",
)


def new_shell():
    "An IPython shell that draws inline, keeps no history, and remembers each traceback it shows."
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shell(InteractiveShell):
        failures = ()

        def showtraceback(self, exc_tuple=None, *args, **kw):
            """Also called for a value that cannot be shown, such as a control: a kernel would print
            that and go on."""
            self.failures += ("".join(traceback.format_exception(*(exc_tuple or sys.exc_info()))),)

        def showsyntaxerror(self, *args, **kw):
            self.showtraceback()

        def enable_gui(self, gui=None):
            pass

    config = Config()
    config.HistoryManager.enabled = False  # it would start a thread
    shell = Shell.instance(config=config)
    shell.enable_matplotlib("inline")
    return shell


class CellError(Exception):
    "The cell, what it printed, and what went wrong."


def run_cell(shell, source: str):
    from IPython.utils.capture import capture_output

    with capture_output() as said:
        shell.run_cell(source)
    if shell.failures:
        printed = (said.stdout + said.stderr)[-2000:]
        raise CellError("\n".join([source, "-" * 18, printed, *shell.failures]))


class Pass:
    "One way through a notebook, and where its outcome is written."

    def __init__(self, job: dict, name: str):
        self.job, self.name, self.again = job, name, False
        self.result = Path(job["results"], f"{name}.json")
        self.start = time.time()

    def begin(self):
        "From here on this process is the notebook's own: its output, its folders, its variables."
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(self.result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        folder = Path(self.job["folder"])
        for name in ("work", "temp"):
            (folder / name).mkdir(parents=True)
        shutil.copy(self.job["notebook"], folder / "work")
        os.environ.update(self.job["env"] | {"TMPDIR": str(folder / "temp")})
        tempfile.tempdir = None  # it is looked up again
        os.chdir(folder / "work")

    def end(self, error: str = ""):
        used, own = resource.getrusage(resource.RUSAGE_SELF), Path(self.job["notebook"]).name
        work = Path(self.job["folder"], "work")
        outcome = dict(
            name=self.name,
            left=sorted(p.name for p in work.iterdir() if p.name != own),
            error=error,
            seconds=time.time() - self.start,
            cpu=used.ru_utime + used.ru_stime,
            again=self.again,
        )
        part = self.result.with_suffix(".part")
        part.write_text(json.dumps(outcome), encoding="utf-8")
        part.replace(self.result)


def fork_second_pass(here: Pass) -> tuple:
    """Two processes return: (child, open end of the pipe) in the one that goes on; (0, None) in the
    other, when the first has ended, with the folder as it is now."""
    folder = Path(here.job["folder"])
    kept = folder.with_name(folder.name + "-kept")
    shutil.copytree(folder, kept)
    waiting, held = os.pipe()
    if child := os.fork():
        os.close(waiting)
        return child, held
    os.close(held)
    os.read(waiting, 1)  # until the first closes the other end, or dies
    shutil.rmtree(folder)
    kept.rename(folder)
    os.chdir(folder / "work")
    return 0, None


def can_fork() -> bool:
    "Whether this process may fork although it has computed: not where a GPU's threads may run."
    import torch

    return not torch.cuda.is_available()


def run_job(job: dict):
    "What the process of a notebook does. Never returns."
    here, child, held = Pass(job, job["name"]), 0, None
    trains, second = job["training"], job["second"]
    try:
        here.begin()
        shell = new_shell()
        for cell in job["cells"]:
            if cell["training"] and second and trains and not child:
                here.again = not can_fork()
                if not here.again:
                    child, held = fork_second_pass(here)
                    if not child:
                        here, trains = Pass(job, second["name"]), False
            if trains or not cell["training"]:
                run_cell(shell, cell["source"])
        here.end()
    except BaseException as e:  # whatever it is, it is told
        here.end(str(e) if isinstance(e, CellError) else traceback.format_exc())
    finally:
        try:
            atexit._run_exitfuncs()
        finally:
            if child:
                os.close(held)
                os.waitpid(child, 0)
            os._exit(0)


def outcomes(job: dict, why: str) -> list:
    "What the passes of a job wrote down; `why` for one that wrote nothing although it began."
    told = []
    for name in [job["name"], *([job["second"]["name"]] if job["second"] else [])]:
        p = Pass(job, name)
        if p.result.exists():
            told.append(json.loads(p.result.read_text(encoding="utf-8")))
        elif not told or not (told[0]["error"] or told[0]["again"]):
            log = Path(job["results"], f"{job['name']}.log")
            said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            told.append(dict(name=name, left=[], error=f"{why}\n{said[-2000:]}", seconds=0, cpu=0))
    return told


def stop(pid: int):
    "End a notebook's process and all that it has started."
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def serve(jobs: list, workers: int, timeout: float):
    "Run the jobs in their order, some side by side, and print what comes out."
    jobs, running = list(jobs), {}
    try:
        while jobs or running:
            while jobs and len(running) < workers:
                job = jobs.pop(0)
                pid = os.fork()
                if not pid:
                    os.setpgid(0, 0)
                    run_job(job)
                running[pid] = job, time.monotonic() + timeout
            for pid, (job, end) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                why = f"the process ended with status {status}"
                if not ended and time.monotonic() > end:
                    stop(pid)
                    os.waitpid(pid, 0)
                    ended, why = pid, f"TimeoutError: no end after {timeout:.0f} s"
                if ended:
                    del running[pid]
                    stop(pid)  # what it may have left running
                    told = outcomes(job, why)
                    for outcome in told:
                        print(json.dumps(outcome), flush=True)
                    if told[0].get("again"):  # by itself, since the process could not fork
                        jobs.append(job | job["second"] | dict(training=False, second=None))
            time.sleep(0.01)
    finally:
        for pid in running:
            stop(pid)


def main():
    sys.path[0] = ""  # not the folder of the tools
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and no notebook goes on
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name in HEAVY:
        importlib.import_module(name)
    serve(asked["jobs"], asked["workers"], asked["timeout"])


if __name__ == "__main__":
    main()
