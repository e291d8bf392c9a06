"""Interrupt, kill and fill the disk, in real processes; whatever happens, the run goes on from
where it was."""

import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from common import QUICK, same_weights, tiny_diffusion, tiny_dls

from ddpm_course.checkpoint import CheckpointError, checkpoints, newest
from ddpm_course.training import Diffusion

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX systems")
context = multiprocessing.get_context("forkserver") if sys.platform != "win32" else None
EPOCHS = 60  # of 4 steps each


@pytest.fixture(scope="module", autouse=True)
def server():
    """Children fork from a process that has imported everything and computed nothing. It knows our
    sys.path only from the environment (Python before 3.14 does not hand it over)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        context.set_forkserver_preload(["test_interrupt", "torch._dynamo", "tqdm.auto"])
        multiprocessing.forkserver.ensure_running()


def train(run, save_every=0.0, kill_in=None, count=1, limit=None, started=None):
    """What a child process does: start or go on, saving after every step; `kill_in` names a system
    call to die in."""
    torch.set_num_threads(1)
    if kill_in:
        real, left = getattr(os, kill_in), [count]

        def deadly(*args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(os, kill_in, deadly)
    if limit:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if started:
        started.set()
    diff = tiny_diffusion()
    if limit:
        diff.prepare(tiny_dls(), epochs=EPOCHS, **QUICK)
    try:
        diff.fit(
            tiny_dls(),
            epochs=EPOCHS,
            run=run,
            resume=True,
            loggers=[],
            progress=False,
            save_every=save_every,
            **QUICK,
        )
    except CheckpointError as e:
        print(e)
        os._exit(7)


def child(**kw):
    p = context.Process(target=train, kwargs=kw)
    p.start()
    return p


def steps(run):
    return int(newest(run).name.split("-")[1]) if checkpoints(run) else 0


def test_twenty_kills_lose_nothing_that_was_saved(tmp_path):
    torch.set_num_threads(1)
    whole = tiny_diffusion().fit(
        tiny_dls(),
        epochs=EPOCHS,
        run=tmp_path / "whole",
        loggers=[],
        progress=False,
        save_every=1e9,
        **QUICK,
    )
    run, rng, before, seen = tmp_path / "killed", random.Random(0), 0, []
    # a write makes 8 fsyncs and 5 renames; counting beyond them kills in a later one
    inside = [("fsync", n) for n in (2, 9, 13, 20, 24)] + [
        ("replace", n) for n in (3, 7, 10, 16, 18)
    ]
    moments = inside + [None] * 10
    rng.shuffle(moments)
    for moment in moments:
        started = context.Event()
        p = child(
            run=run, started=started, **(dict(kill_in=moment[0], count=moment[1]) if moment else {})
        )
        if not moment:
            assert started.wait(60)
            time.sleep(rng.uniform(0.02, 0.35))
            p.kill()
        p.join(60)
        assert p.exitcode == -signal.SIGKILL, "it was to die, not to finish or to fail"
        if checkpoints(run):
            Diffusion.load(run, device="cpu")  # reads and verifies every byte of the weights
        assert steps(run) >= before, "work that was saved is lost"
        before = steps(run)
        seen.append(before)
    assert 0 < before < whole.step and len(set(seen)) > 5, seen
    p = child(run=run, save_every=1e9)
    p.join(120)
    assert p.exitcode == 0
    assert same_weights(
        whole, Diffusion.load(run, device="cpu")
    ), "the same weights as without twenty kills"
    assert not [
        q for q in (run / "checkpoints").iterdir() if q.name.startswith(".")
    ], "rests of broken writes"


def test_disk_full_leaves_the_old_checkpoint(tmp_path):
    run = tmp_path / "r"
    p = child(run=run, kill_in="replace", count=40)
    p.join(60)
    good = newest(run)
    content = {f.name: f.read_bytes() for f in good.iterdir()}
    p = child(run=run, limit=4096)  # no file may grow beyond 4 KiB: writing any checkpoint fails
    p.join(120)
    assert (
        p.exitcode == 7
    ), "the last checkpoint cannot be written: that is an error, with a sentence"
    assert newest(run) == good and {f.name: f.read_bytes() for f in good.iterdir()} == content
    assert not list((run / "checkpoints").glob(".tmp*"))
    Diffusion.load(run, device="cpu")


def test_ctrl_c_on_the_command_line_saves_and_leaves(tmp_path):
    run = tmp_path / "r"
    command = [
        sys.executable,
        "-m",
        "ddpm_course.cli",
        "train",
        "--data",
        "digits",
        "--img-size",
        "8",
        "--epochs",
        "40",
        "--precision",
        "float32",
        "--device",
        "cpu",
        "--run",
        str(run),
        "--no-wandb",
    ]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.time() + 90
    while not (run / "log.jsonl").exists() and time.time() < end:
        time.sleep(0.1)
    time.sleep(1.5)
    p.send_signal(signal.SIGINT)
    out = p.communicate(timeout=60)[0]
    assert p.returncode == 130 and "Traceback" not in out and "saved to" in out, out[-800:]
    assert 0 < steps(run) == int(out.split("stopped at step ")[1].split()[0])


if __name__ == "__main__":
    pytest.main([__file__, "-q"])
