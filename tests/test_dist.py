"""Several processes, real ones: equal weights, each example once, kill and resume, one sentence.

Most of them are forked from a server that has imported everything and get from here what torchrun
would give them: numbers, and a store to meet in. The command line is started by torchrun itself."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as td
from common import QUICK, tiny_diffusion, tiny_dls
from torch import nn

from ddpm_course.checkpoint import checkpoints, newest, read_state
from ddpm_course.dist import PeerLost, Shard, rank, world
from ddpm_course.loggers import read_log
from ddpm_course.process import DDPM
from ddpm_course.training import Diffusion, TrainingDiverged
from ddpm_course.unet import UNet_conditional

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux"),
    pytest.mark.skipif(not td.is_available(), reason="torch without torch.distributed"),
]
context = multiprocessing.get_context("forkserver") if sys.platform == "linux" else None
PASSES, EXAMPLES, BATCH = 4, 66, 16  # the last of 5 batches has 2 examples, fewer than 4 processes


@pytest.fixture(scope="module", autouse=True)
def server():
    context.set_forkserver_preload(["common", "ddpm_course.cli"])
    torch.set_num_threads(1)


def begin(job, r, n, port, folder, kw):
    "What a process does: it is number r of n, and leaves what it found in a file."
    os.environ |= dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), OMP_NUM_THREADS="1")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is not in the first process
    torch.set_num_threads(1)
    out = os.open(f"{folder}/out-{r}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    torch.save(job(**kw), f"{folder}/found-{r}.pt")


def said(folder) -> list:  # what each process wrote
    return [path.read_text() for path in sorted(Path(folder).glob("out-*"))]


class Group:
    "Processes that run the same job together."

    def __init__(self, n, job, folder, **kw):
        self.folder, self.n = Path(folder), n
        self.folder.mkdir(parents=True, exist_ok=True)
        # it takes a free port by itself
        self.store = td.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        args = (n, self.store.port, str(folder), kw)
        self.all = [context.Process(target=begin, args=(job, r, *args)) for r in range(n)]
        for p in self.all:
            p.start()

    def wait(self, seconds=100) -> list:  # exit codes
        end = time.monotonic() + seconds
        try:
            for p in self.all:
                p.join(max(end - time.monotonic(), 0))
            hung = [r for r, p in enumerate(self.all) if p.exitcode is None]
            assert not hung, f"processes {hung} hang: {said(self.folder)}"
        finally:
            for p in self.all:
                p.kill()
                p.join()
        return [p.exitcode for p in self.all]

    def found(self) -> list:  # what each found
        assert self.wait() == [0] * self.n, said(self.folder)
        paths = [self.folder / f"found-{r}.pt" for r in range(self.n)]
        return [torch.load(path, weights_only=False) for path in paths]


def ready(r):  # of batch files: a name for an example
    return int((r * torch.arange(1, r.numel() + 1).view_as(r)).sum().mul(1000).round())


@contextlib.contextmanager
def watched(diff, kill=None):
    "Keep which examples were trained on and with what noise; (rank, step) to die at."
    seen, batch = [], []
    real_step, real_corrupt = diff.train_step, diff.process.corrupt

    def corrupt(x0, t, *args):
        x_t, eps = real_corrupt(x0, t, *args)
        batch[:] = [(ready(x), float(e.sum()), float(s)) for x, e, s in zip(x0, eps, t)]
        return x_t, eps

    def step(*args):
        if kill == (rank(), diff.step):
            os.kill(os.getpid(), signal.SIGKILL)
        losses = real_step(*args)
        place = (diff.trainer.epoch, diff.trainer.batch)
        seen.extend((*place, *example) for example in batch[: len(losses)])
        return losses

    diff.train_step, diff.process.corrupt = step, corrupt
    yield seen
    del diff.train_step, diff.process.corrupt


def flat(module):
    return torch.cat([v.detach().flatten() for v in module.state_dict().values()])


def train(run, kill=None, passes=PASSES, shard=False, **kw):
    "A training that is started as anybody would start one."
    diff, dls = tiny_diffusion(), tiny_dls(EXAMPLES, BATCH)
    if shard:
        dls.train = Shard(dls.train)
    kw = dict(accumulate=2, loggers=[], progress=True, save_every=0.0, resume=True) | QUICK | kw
    error = None
    with watched(diff, kill) as seen:
        try:
            diff.fit(dls, epochs=passes, run=run, wandb=False, **kw)
        except (PeerLost, ValueError, OSError, ArithmeticError) as e:
            error = type(e).__name__, str(e)
    weights = dict(model=flat(diff.model), ema=flat(diff.ema_model))
    return dict(weights, seen=seen, step=diff.step, error=error, history=diff.history)


def passes_of(found):  # examples of each pass, of all processes
    passes = {}
    for one in found:
        for e, _, name, *_ in one["seen"]:
            passes.setdefault(e, []).append(name)
    return {e: sorted(names) for e, names in passes.items()}


EVERY = sorted(ready(x) for x, _ in tiny_dls(EXAMPLES, BATCH).train.epoch(0) for x in x)


def equal_weights(found):
    return all(torch.equal(f[k], found[0][k]) for f in found for k in ("model", "ema"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same training, whole: in one, two and four processes."
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for n in (2, 4):
        kw = dict(run=folder / str(n) / "run", loggers=None)
        found[n] = Group(n, train, folder / str(n), **kw).found()
    found[1] = [train(folder / "1" / "run", loggers=None)]
    return folder, found


@pytest.mark.parametrize("n", [2, 4])
def test_all_have_equal_weights_and_see_each_example_once(runs, n):
    found = runs[1][n]
    assert [f["error"] for f in found] == [None] * n and equal_weights(found)
    assert {f["step"] for f in found} == {runs[1][1][0]["step"]} == {PASSES * 5 // 2}
    assert passes_of(found) == {e: EVERY for e in range(PASSES)}, "each example once in a pass"
    assert len({ready(x) for x, _ in tiny_dls(EXAMPLES, BATCH).train.epoch(0) for x in x}) > 60
    noises = [s[3] for f in found for s in f["seen"]]
    assert len(set(noises)) == len(noises) == PASSES * EXAMPLES, "noise of another example"
    times = [[s[4] for s in f["seen"][:3]] for f in found]
    assert all(a != b for i, a in enumerate(times) for b in times[:i]), "two draw the same times"


@pytest.mark.parametrize("n", [2, 4])
def test_one_log_one_config_one_run(runs, n):
    run, one = runs[0] / str(n) / "run", runs[0] / "1" / "run"
    lines, alone = read_log(run), read_log(one)
    assert [(e["step"], e["epoch"]) for e in lines] == [(e["step"], e["epoch"]) for e in alone]
    assert [e.keys() for e in lines] == [e.keys() for e in alone]
    for a, b in zip(lines, alone):  # other noise, the same training
        assert b["loss"] / 2 < a["loss"] < 2 * b["loss"]
    config = json.loads((run / "config.json").read_text())
    assert config == json.loads((one / "config.json").read_text()) and len(config["history"]) == 1
    assert [p.name for p in checkpoints(run)][-1] == f"step-{PASSES * 5 // 2:09d}"
    assert not list((run / "checkpoints").glob(".*"))
    loaded, found = Diffusion.load(run, device="cpu"), runs[1][n][0]
    assert torch.equal(flat(loaded.model), found["model"])
    assert torch.equal(flat(loaded.ema_model), found["ema"])
    state = read_state(newest(run))
    assert len(state["random"]) == n
    assert len({s["noise"].numpy().tobytes() for s in state["random"]}) == n
    first, *others = said(run.parent)
    assert "step/s" in first or "it/s" in first or "100%" in first, "the first shows a bar"
    assert not any(others), "and the others are silent"


# ---- kill and resume


@pytest.fixture(scope="module")
def killed(runs):
    "Process 1 of 2 dies in the second pass; what was saved has a piece of a step pending."
    folder = runs[0] / "killed"
    group = Group(2, train, folder, run=folder / "run", kill=(1, 4), save_every=1e9)
    codes = group.wait(60)
    return folder, codes, torch.load(folder / "found-0.pt", weights_only=False)


def test_a_killed_process_ends_the_others_with_a_sentence(killed):
    folder, codes, found = killed
    assert codes == [0, -signal.SIGKILL]
    name, text = found["error"]
    assert name == "PeerLost" and text.count(".") == 0 and "resume=True (--resume)" in text
    state = read_state(newest(folder / "run"))
    assert (found["step"], state["step"], state["pending"], state["epoch"]) == (4, 2, 1, 1)


def test_the_same_number_goes_on_bit_for_bit(runs, killed):
    folder = runs[0] / "again"
    shutil.copytree(killed[0] / "run", folder / "run")
    found, whole = Group(2, train, folder, run=folder / "run").found(), runs[1][2]
    assert equal_weights(found) and torch.equal(found[0]["model"], whole[0]["model"])
    assert torch.equal(found[0]["ema"], whole[0]["ema"])
    for a, b in zip(found, whole):
        assert a["seen"] == b["seen"][-len(a["seen"]) :], "the same examples and noise"
        assert a["history"] == b["history"], "the losses in the log, too"
    first, second = said(folder)
    assert first.count("goes on at step") == 1 and "not bit for bit" not in first + second
    history = json.loads((folder / "run" / "config.json").read_text())["history"]
    assert [e["event"] for e in history] == ["start", "resume"]


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 4)])
def test_another_number_goes_on_and_says_so(runs, killed, before, after):
    folder = runs[0] / f"{before}to{after}"
    if before == 1:
        short = tiny_diffusion()
        with watched(short), pytest.raises(KeyboardInterrupt):

            def log(*_):
                raise KeyboardInterrupt

            short.fit(
                tiny_dls(EXAMPLES, BATCH),
                epochs=PASSES,
                run=folder / "run",
                loggers=[log],
                accumulate=2,
                progress=False,
                **QUICK,
            )
    else:
        shutil.copytree(killed[0] / "run", folder / "run")
    state = read_state(newest(folder / "run"))
    found = Group(after, train, folder, run=folder / "run").found()
    assert equal_weights(found) and {f["step"] for f in found} == {PASSES * 5 // 2}
    words = f"was trained by {before} processes, goes on with {after}: not bit for bit"
    assert [text.count(words) for text in said(folder)] == [1, *[0] * (after - 1)]
    rest = [x for x, _ in tiny_dls(EXAMPLES, BATCH).train.epoch(state["epoch"], state["batch"])]
    want = {e: EVERY for e in range(state["epoch"] + 1, PASSES)}
    assert passes_of(found) == want | {state["epoch"]: sorted(ready(x) for b in rest for x in b)}
    noises = [s[3] for f in found for s in f["seen"]]
    assert len(set(noises)) == len(noises)


# ---- 2 x 16 is 1 x 32


def constant(process, n, device=None, generator=None):
    return torch.full((n,), 0.4 * process.t_max, device=device)


def given(sizes):
    g = torch.Generator().manual_seed(1)
    shape = (1, 8, 8)
    return [
        (
            torch.rand(n, *shape, generator=g) * 2 - 1,
            torch.randint(0, 3, (n,), generator=g),
            torch.randn(n, *shape, generator=g),
        )
        for n in sizes
    ]


SUMS = dict(
    plain=dict(sizes=[32] * 6),
    uneven=dict(sizes=[32, 32, 13, 3, 1]),
    pieces=dict(sizes=[32, 32, 7, 32, 32, 5], accumulate=2),
    fsdp=dict(sizes=[32, 32, 13, 32, 1], strategy="fsdp"),
    fsdp_pieces=dict(sizes=[32, 32, 7, 32], accumulate=2, strategy="fsdp"),
)


def one_sum(sizes, run=None, epochs=2, resume=False, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # no attention: its keys have a bias whose gradient is 0 but for rounding, and Adam
        # divides by the size of gradients
        kw_net = dict(time_dim=16, widths=(8, 8), attention=(), num_classes=3)
        net = UNet_conditional(1, 1, **kw_net)
    about = dict(p_uncond=0.0, times=None if run else constant, device="cpu")
    diff = Diffusion(net, DDPM(100, "cosine"), "v", (1, 8, 8), 3, **about)
    first = flat(diff.model)
    if world() > 1:
        kw["strategy"] = kw.get("strategy", "ddp")
    diff.fit(
        given(sizes),
        epochs=epochs,
        run=run,
        resume=resume,
        loggers=[],
        progress=False,
        **QUICK | kw,
    )
    moved = (flat(diff.model) - first).abs().max()
    return dict(model=flat(diff.model), ema=flat(diff.ema_model), step=diff.step, moved=moved)


def mishaps():
    "What all must notice together; then they are still fit for another training."
    seen = {}
    data = given([32, 32, 32])
    data[1][0][1, 0, 0, 0] = float("nan")  # the second example: that of the second process
    try:
        tiny_diffusion().fit(data, epochs=2, progress=False, **QUICK)
    except TrainingDiverged as e:
        seen["nan"] = str(e)
    shuffled = torch.utils.data.DataLoader(
        [b for n in range(64) for b in [given([1])[0][0][0] * n / 64]], 16, shuffle=True
    )
    torch.manual_seed(rank())
    try:
        tiny_diffusion(0).fit(shuffled, epochs=1, progress=False, **QUICK)
    except ValueError as e:
        seen["shuffled"] = str(e)
    own = tiny_diffusion()
    own.model.scale = nn.Parameter(torch.ones(()))
    try:
        own.fit(data, epochs=1, progress=False, **QUICK)
    except ValueError as e:
        seen["outside"] = str(e)
    try:
        tiny_diffusion().fit(given([32] * (3 - rank())), epochs=1, progress=False, **QUICK)
    except ValueError as e:
        seen["lengths"] = str(e)
    try:
        tiny_diffusion(5 - rank()).fit(tiny_dls(num_classes=5), epochs=1, progress=False, **QUICK)
    except (ValueError, PeerLost) as e:
        seen["door"] = str(e)
    torch.manual_seed(rank())  # nobody has seeded this network
    net = nn.Conv2d(1, 1, 3, padding=1)
    net.forward = lambda x, t, cond: nn.Conv2d.forward(net, x)
    diff = Diffusion(net, shape=(1, 8, 8), device="cpu")
    diff.fit([x for x, *_ in given([32, 32])], epochs=2, progress=False, **QUICK)
    return seen | dict(model=flat(diff.model), ema=flat(diff.ema_model))


def slow(minutes):
    "The second process is slow, and its clock is wrong."
    diff = tiny_diffusion()
    real, start, clock = diff.train_step, time.monotonic(), time.monotonic

    def step(*args):
        time.sleep(0.03 * rank())
        return real(*args)

    diff.train_step = step
    if rank():
        time.monotonic = lambda: 50 * clock()
    diff.fit(tiny_dls(), minutes=minutes, progress=False, **QUICK)
    time.monotonic = clock
    budget = diff.trainer.sched.state_dict()
    keys = ("last", "begin", "length")
    return dict(took=clock() - start, step=diff.step, plan={k: budget[k] for k in keys})


def several(place):
    found = {name: one_sum(**kw) for name, kw in SUMS.items()}
    found["run"] = one_sum([32] * 3, run=f"{place}/run", strategy="fsdp")
    found["mishaps"] = mishaps()
    found["slow"] = slow(0.04)
    found["shard"] = train(None, shard=True, accumulate=1, progress=False)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, Group(2, several, folder, place=folder).found()


@pytest.fixture(scope="module")
def alone():
    return {name: one_sum(**kw) for name, kw in SUMS.items()}


@pytest.mark.parametrize("name", SUMS)
def test_two_with_16_are_one_with_32(two, alone, name):
    found, want = [f[name] for f in two[1]], alone[name]
    assert equal_weights(found) and found[0]["step"] == want["step"] > 3
    assert want["moved"] > 1e-3, "it was trained"
    for key in ("model", "ema"):
        assert (found[0][key] - want[key]).abs().max() < 1e-6, key


def test_a_sharded_run_loads_anywhere_and_goes_on_unsharded(two):
    folder, found = two[0], [f["run"] for f in two[1]]
    loaded = Diffusion.load(folder / "run", device="cpu")
    assert equal_weights(found) and torch.equal(flat(loaded.model), found[0]["model"])
    assert torch.equal(flat(loaded.ema_model), found[0]["ema"]) and loaded.step == 6
    state = read_state(newest(folder / "run"))
    shapes = [v["exp_avg"].shape for v in state["opt"]["state"].values()]
    assert shapes == [p.shape for p in loaded.model.parameters()] and type(shapes[0]) is torch.Size
    assert state["settings"]["strategy"] == "fsdp"
    kw = dict(sizes=[32] * 3, epochs=1, extend=True)
    jobs = dict(fsdp=("fsdp", 2), ddp=("ddp", 2), alone=("ddp", 1))
    ends = {}
    for name, (strategy, n) in jobs.items():
        shutil.copytree(folder / "run", folder / name)
        kw |= dict(run=folder / name, strategy=strategy)
        ends[name] = Group(n, one_sum, folder / name, **kw).found()
        assert {f["step"] for f in ends[name]} == {9} and equal_weights(ends[name])
    for key in ("model", "ema"):  # the same noise in two processes, sharded or not
        assert (ends["fsdp"][0][key] - ends["ddp"][0][key]).abs().max() < 1e-6
    assert "goes on with 1: not bit for bit" in said(folder / "alone")[0]


def test_what_goes_wrong_in_one_is_noticed_by_all(two):
    for found in (f["mishaps"] for f in two[1]):
        assert "data of step 1 hold numbers that are NaN or infinite" in found["nan"]
        assert "read different batches" in found["shuffled"] and "Loader(" in found["shuffled"]
        assert "weights outside of .net" in found["outside"] and "(scale)" in found["outside"]
        assert "numbers of batches differ: 2 in process 1, 3 in process 0" in found["lengths"]
    a, b = (f["mishaps"]["door"] for f in two[1])
    assert (
        b == "the model has 4 classes, the data 5" and a.startswith("process 1 cannot") and b in a
    )
    assert equal_weights([f["mishaps"] for f in two[1]]), "networks that nobody had seeded"


def test_the_clock_of_the_first_decides_for_all(two):
    a, b = (f["slow"] for f in two[1])
    assert (a["step"], a["plan"]) == (b["step"], b["plan"]) and a["plan"]["begin"] is not None
    assert a["step"] == a["plan"]["begin"] + a["plan"]["length"]
    assert 1.5 < a["took"] < 10, a  # of 2.4 seconds


def test_a_loader_of_each_process_its_own(two):
    found = [f["shard"] for f in two[1]]
    assert equal_weights(found) and found[0]["step"] == PASSES * 2
    passes = passes_of(found)
    assert len(passes) == PASSES
    for e in passes:  # a fifth batch for two processes is left over
        first = [x for x, _ in list(tiny_dls(EXAMPLES, BATCH).train.epoch(e))[:4] for x in x]
        assert passes[e] == sorted(map(ready, first))


# ---- ends


def ending(what, run):
    "Something happens in one process; what each is told, and when."
    size = 4096 if what == "signal" else 64  # examples; it comes in the middle of a pass
    dls, kw = tiny_dls(size), dict(epochs=200, save_every=0.0, loggers=[])
    start = time.monotonic()

    class Breaks(type(dls.train)):
        def epoch(self, e, start=0):
            for i, batch in enumerate(super().epoch(e, start)):
                if (e, i) == (2, 1) and rank() == 1:
                    raise OSError("a file of the data is gone")
                yield batch

    def log(step, *_):
        if step > 8:
            raise OSError("no space left for the log")

    if what == "loader":
        dls.train.__class__ = Breaks
    if what == "logger":
        kw["loggers"] = [log]
    if what == "disk" and int(os.environ["RANK"]) == 0:
        from ddpm_course import runs
        from ddpm_course.checkpoint import CheckpointError

        def full(*_):
            raise CheckpointError("the disk is full")

        runs.write_checkpoint, kw["epochs"] = full, 3
    kw["epochs"] = 3 if what == "disk" else kw["epochs"]
    diff = tiny_diffusion()
    if what == "signal":
        real = diff.train_step

        def step(*args):
            if diff.step == 30 and rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # torchrun hands it on: twice
            return real(*args)

        diff.train_step = step
    try:
        diff.fit(dls, run=run, progress=False, **kw, **QUICK)
        told = "finished"
    except (Exception, KeyboardInterrupt) as e:
        told = f"{type(e).__name__}: {e}"
    return dict(told=told, step=diff.step, seconds=time.monotonic() - start)


ENDS = dict(
    loader=("PeerLost: another process", "OSError: a file of the data is gone"),
    logger=("OSError: no space left", "PeerLost: another process"),
    disk=("CheckpointError: the disk is full", "PeerLost: another process"),
    signal=("KeyboardInterrupt: stopped at step", "KeyboardInterrupt: stopped at step"),
)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):  # all at once
    folder = tmp_path_factory.mktemp("ends")
    groups = {k: Group(2, ending, folder / k, what=k, run=folder / k / "run") for k in ENDS}
    return folder, {k: group.found() for k, group in groups.items()}


@pytest.mark.parametrize("what", ENDS)
def test_an_end_of_one_is_the_end_of_all(ends, what):
    folder, found = ends[0] / what, ends[1][what]
    for one, words in zip(found, ENDS[what]):
        assert one["told"].startswith(words), found
    assert abs(found[0]["seconds"] - found[1]["seconds"]) < 20
    if what == "disk":
        assert said(folder)[0].count("the disk is full; training goes on") == 1
        assert not said(folder)[1] and found[0]["step"] == found[1]["step"] == 12
    else:
        at = int(newest(folder / "run").name.split("-")[1])
        assert at <= found[0]["step"] < 800 or what == "signal"
    if what == "signal":  # all left at one step, which is saved
        assert found[0]["step"] == found[1]["step"] == at
        assert 30 <= at < 120
        assert all(one["told"].endswith(f"saved to {folder / 'run'}") for one in found)


# ---- the command line, started by torchrun


class Torchrun:
    def __init__(self, logs, *args):
        self.logs = Path(logs)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "--redirects=3", f"--log-dir={logs}"]
        command += ["-m", "--", "ddpm_course.cli", *map(str, args)]
        env = os.environ | dict(OMP_NUM_THREADS="1")
        quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.main = subprocess.Popen(command, env=env, start_new_session=True, **quiet)

    def kill(self):  # processes first: torchrun gives each a session of its own
        for r in range(2):
            with contextlib.suppress(AssertionError, ProcessLookupError):
                os.kill(self.worker(r), signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.main.pid, signal.SIGKILL)

    def worker(self, r) -> int:  # its process id
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                facts = (path / "stat").read_text().rsplit(")", 1)[1].split()
                if int(facts[1]) != self.main.pid:
                    continue
                if f"RANK={r}" in (path / "environ").read_text().split("\0"):
                    return int(path.name)
        raise AssertionError(f"no process {r}")

    def until(self, ready, seconds=90):
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end or self.main.poll() is not None:
                raise AssertionError((self.end(1), self.said("stdout"), self.said("stderr")))
            time.sleep(0.05)

    def end(self, seconds=90) -> tuple:  # exit code, and what torchrun itself said
        try:
            out = self.main.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            self.kill()
            out = self.main.communicate()[0]
        return self.main.returncode, out

    def said(self, stream) -> list:
        return [p.read_text() for p in sorted(self.logs.glob(f"*/attempt_0/*/{stream}.log"))]


def steps(run):
    return int(newest(run).name.split("-")[1]) if checkpoints(run) else 0


def test_the_command_line_under_torchrun(tmp_path):
    run, logs = tmp_path / "run", [tmp_path / f"logs{i}" for i in range(3)]
    args = ["train", "--data", "digits", "--img-size", 8, "--precision", "float32", "--no-wandb"]
    args += ["--device", "cpu", "--run", run]

    first = Torchrun(logs[0], *args, "--epochs", 60)  # a process is killed
    first.until(lambda: steps(run))
    os.kill(first.worker(1), signal.SIGKILL)
    code, report = first.end()
    out, err = first.said("stdout"), first.said("stderr")
    assert code not in (0, None) and "".join(err).count("another process of this training has") == 1
    assert "Traceback" not in "".join(out + err), err
    assert out[0].count("classes |") == 1 and not out[1], "one set of messages"

    second, before = Torchrun(logs[1], *args, "--epochs", 60, "--resume"), steps(run)  # Ctrl-C
    second.until(lambda: steps(run) > before)
    os.killpg(second.main.pid, signal.SIGINT)
    code, report = second.end()
    out, err = second.said("stdout"), second.said("stderr")
    assert code not in (0, None) and "".join(err).count("stopped at step") == 1, (report, err)
    assert f"stopped at step {steps(run)} of" in "".join(err) and "Traceback" not in "".join(err)
    assert "".join(out).count(f"goes on at step {before} of") == 1, out

    run = tmp_path / "short"
    args[-1] = run
    third = Torchrun(logs[2], *args, "--epochs", 0.3, "--resume")
    code, report = third.end()
    out, err = third.said("stdout"), third.said("stderr")
    assert code == 0 and (run / "samples.png").exists(), (report, err)
    assert out[0].count("a new one begins") == out[0].count("validation loss") == 1 and not out[1]
    assert not err[1] and "Traceback" not in err[0] and len(read_log(run)) == 1


if __name__ == "__main__":
    pytest.main([__file__, "-q"])
