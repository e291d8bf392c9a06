"""Shards: memory does not grow with the data, going on is exact, and what is damaged is said."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from common import QUICK, failing, same_weights, tiny_diffusion

from ddpm_course import streams
from ddpm_course.cond import Captions
from ddpm_course.data import get_dls
from ddpm_course.streams import Examples, Stream, stream, stream_dls, write_shards
from ddpm_course.training import Diffusion

HERE = Path(__file__).parent
pytest.importorskip("litdata", reason="streaming is an extra")


def batches(n=64, B=16, size=8, classes=3, seed=0):
    "Every image is another one: its first two pixels are its number."
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 1, size, size), generator=g, dtype=torch.uint8)
    i = torch.arange(n)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = i // 256, i % 256
    return [(x[k : k + B], (i % classes)[k : k + B]) for k in range(0, n, B)]


def write(out, data=None, **kw):
    kw = dict(valid=0, test=0, shard_mb=0.001, classes=["a", "b", "c"]) | kw
    write_shards(batches() if data is None else data, out, **kw)
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = write(tmp_path_factory.mktemp("data") / "tiny")
    assert len(list((out / "train").glob("*.bin"))) > 5
    return out


def numbers(loader, *epoch):
    return [(x[:, 0, 0, 0].int() * 256 + x[:, 0, 0, 1]).tolist() for x, _ in loader.epoch(*epoch)]


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(p, q) and torch.equal(y, z) for (p, y), (q, z) in zip(a, b)
    )


@pytest.mark.parametrize("store", ["png", "raw"])
def test_what_was_written_is_read_each_example_once(tmp_path, store):
    out = write(tmp_path / "s", store=store)
    whole = torch.cat([x for x, _ in batches()])
    for e in range(2):
        seen = 0
        for x, y in stream(out, 10, mix=3).epoch(e):
            i = x[:, 0, 0, 0].long() * 256 + x[:, 0, 0, 1]
            assert torch.equal(x, whole[i]) and torch.equal(y, i % 3), "another image or label"
            seen += len(i)
        assert sorted(itertools.chain(*numbers(stream(out, 10, mix=3), e))) == list(range(64))
        assert seen == 64


def test_order_is_a_function_of_seed_and_pass_from_any_batch(shards):
    s = stream(shards, 5, mix=3)
    whole = numbers(s, 4)
    assert all(numbers(s, 4, k) == whole[k:] for k in range(len(s) + 1))
    assert numbers(stream(shards, 5, mix=3), 4) == whole
    assert numbers(s, 3) != whole and numbers(stream(shards, 5, seed=1, mix=3), 4) != whole
    flat = list(itertools.chain(*whole))
    far = sum(abs(a - b) for a, b in zip(flat, range(64))) / 64
    assert far > 10, "examples hardly move"
    assert list(itertools.chain(*numbers(stream(shards, 5, shuffle=False), 0))) == list(range(64))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, workers):
    one = stream(shards, 5, mix=3, flip=True)
    assert same(stream(shards, 5, mix=3, flip=True, workers=workers).epoch(2, 3), one.epoch(2, 3))


def test_flips_are_those_of_the_batch(shards):
    plain, flipped = stream(shards, 16), stream(shards, 16, flip=True)
    turned = []
    for (x, _), (z, _) in zip(plain.epoch(1), flipped.epoch(1)):
        for a, b in zip(x, z):
            assert torch.equal(b, a) or torch.equal(b, a.flip(-1))
            turned.append(not torch.equal(b, a))
    assert 16 < sum(turned) < 48
    assert same(flipped.epoch(1, 2), list(flipped.epoch(1))[2:])


def test_training_on_shards_is_training_on_the_images(shards):
    streamed = tiny_diffusion().fit(
        stream_dls(shards, 16), epochs=3, loggers=[], progress=False, **QUICK
    )
    s = stream(shards, 16)
    listed = [b for e in range(3) for b in s.epoch(e)]
    listed = tiny_diffusion().fit(listed, epochs=1, loggers=[], progress=False, **QUICK)
    assert streamed.step == 12 and same_weights(streamed, listed)


@pytest.mark.parametrize("kw", [dict(), dict(workers=2), dict(endless=True)])
def test_going_on_in_the_middle_of_a_pass_is_exact(shards, tmp_path, kw):
    length = dict(total_steps=14, loggers=[], progress=False)
    whole = tiny_diffusion().fit(stream(shards, 10, **kw), **length, **QUICK)
    diff = failing(tiny_diffusion(), lambda diff: diff.step == 9, save=True)
    with pytest.raises(ConnectionError):
        diff.fit(stream(shards, 10, **kw), run=tmp_path / "r", **length, **QUICK)
    more = tiny_diffusion().fit(
        stream(shards, 10, **kw), run=tmp_path / "r", resume=True, loggers=[], progress=False
    )
    assert more.step == whole.step == 14 and same_weights(more, whole)


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch
from common import QUICK, tiny_diffusion
from ddpm_course.streams import stream_dls
torch.set_num_threads(1)
diff, real = tiny_diffusion(), None
real = diff.train_step
def step(*batch):
    if diff.step == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*batch)
diff.train_step = step
diff.fit(stream_dls({data!r}, 10), epochs=2, run={run!r}, resume=True, loggers=[],
         progress=False, save_every=0, **QUICK)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX systems")
def test_going_on_after_a_kill_is_exact(shards, tmp_path):
    torch.set_num_threads(1)
    whole = tiny_diffusion().fit(
        stream_dls(shards, 10), epochs=2, loggers=[], progress=False, **QUICK
    )
    run = tmp_path / "r"
    code = KILLED.format(here=str(HERE), at=9, data=str(shards), run=str(run))
    assert run_python(code).returncode == -signal.SIGKILL
    more = tiny_diffusion().fit(
        stream_dls(shards, 10), run=run, resume=True, loggers=[], progress=False
    )
    assert more.step == whole.step == 14 and same_weights(more, whole)


def test_endless(shards):
    on, once = stream(shards, 10, endless=True), stream(shards, 10)
    with pytest.raises(TypeError, match="no length"):
        len(on)
    begin = list(itertools.islice(on.epoch(0), 16))
    assert same(begin, list(itertools.chain(*(once.epoch(e) for e in range(3))))[:16])
    assert same(itertools.islice(on.epoch(0, 9), 7), begin[9:])
    diff = tiny_diffusion().fit(on, total_steps=16, loggers=[], progress=False, **QUICK)
    assert diff.step == 16
    with pytest.raises(ValueError, match="say minutes or total_steps"):
        tiny_diffusion().fit(on, epochs=1, progress=False, **QUICK)


def test_every_process_has_equally_many_batches_of_its_own(shards, monkeypatch):
    "64 examples in shards of uneven sizes, for 3 processes: nobody waits for another."
    monkeypatch.setattr(streams, "world", lambda: 3)
    rows = []
    for r in range(3):
        monkeypatch.setattr(streams, "rank", lambda r=r: r)
        s = stream(shards, 5, mix=3, sharded=True)
        rows.append(numbers(s, 1))
        assert len(rows[-1]) == len(s) == 13 // 3 and numbers(s, 1, 2) == rows[-1][2:]
    flat = [i for row in rows for batch in row for i in batch]
    assert len(flat) == len(set(flat)) == 60 and all(len(b) == 5 for row in rows for b in row)
    monkeypatch.setattr(streams, "world", lambda: 1)
    whole = numbers(stream(shards, 5, mix=3), 1)
    assert [rows[k % 3][k // 3] for k in range(12)] == whole[:12]


def test_floats_and_captions_and_noise(tmp_path):
    x = torch.randn(20, 2, 5)
    words = [f"a {c} thing" for c in ("red", "green")] * 10
    out = write(tmp_path / "s", [(x[:12], words[:12]), (x[12:], words[12:])], classes=None)
    dls = stream_dls(out, 6)
    got = {tuple(v.flatten().tolist()): t for b in dls.train.epoch(0) for v, t in zip(*b)}
    assert got == {tuple(v.flatten().tolist()): t for v, t in zip(x, words)}
    assert dls.num_classes == 0 and dls.shape == (2, 5)
    Captions.fit(words).encode(next(iter(dls.train))[1])
    only = write(tmp_path / "x", [x], classes=None)
    assert next(iter(stream(only, 4))).shape == (4, 2, 5)
    with pytest.raises(ValueError, match="no noise of their own"):
        write(tmp_path / "eps", [(x, torch.zeros(20).long(), x)])


def test_writing_does_not_read_ahead(tmp_path):
    "Not more than a shard is in memory: the shards appear while batches are asked for."
    found = []

    def data():
        for k in range(8):
            found.append(len(list((tmp_path / "s").rglob("*.bin"))))
            yield torch.full((8, 1, 16, 16), k, dtype=torch.uint8), torch.zeros(8).long()

    write(tmp_path / "s", data(), shard_mb=0.004, store="raw")
    assert found[0] == 0 and found[3] >= 1 and found == sorted(found) and found[-1] >= 4
    assert not any(f.name.startswith("0.") for f in (tmp_path / "s/train").iterdir())


def test_an_interrupted_writing_is_no_folder_of_shards(tmp_path):
    def data():
        yield from batches()
        raise ConnectionError

    with pytest.raises(ConnectionError):
        write(tmp_path / "s", data())
    assert not streams.holds_shards(tmp_path / "s")
    with pytest.raises(FileExistsError, match="is not empty"):
        write(tmp_path / "s")


def test_damaged_shards_are_said_in_one_sentence(tmp_path):
    def says(error, *words, **kw):
        with pytest.raises(error) as e:
            for s in (stream(out, 8, **kw),):
                list(s.epoch(0))
        text = str(e.value)
        assert "\n" not in text and all(w in text for w in words), text

    out = write(tmp_path / "s", store="raw")
    shard = sorted((out / "train").glob("*.bin"))[1]
    good = shard.read_bytes()
    shard.write_bytes(good[: len(good) // 2])
    says(ValueError, shard.name, "bytes long", "copy it again")
    shard.unlink()
    says(ValueError, shard.name, "missing")
    shard.write_bytes(good[:-40] + bytes([good[-40] ^ 255]) + good[-39:])
    says(ValueError, "example", "cannot be read")
    says(ValueError, "example", "cannot be read", workers=2)
    shard.write_bytes(good)
    assert len(list(stream(out, 8).epoch(0))) == 8
    index = out / "train/index.json"
    text = index.read_text()
    index.write_text(text[:100])
    says(ValueError, "index.json is damaged")
    index.write_text(json.dumps(dict(chunks=[], config=dict(data_format=["pickle"]))))
    says(ValueError, "pickled objects")
    index.write_text(text)
    (out / "shards.json").write_text("[]")
    says(ValueError, "shards.json is damaged")
    (out / "shards.json").unlink()
    says(FileNotFoundError, "no shards in", "write_shards")


def test_nothing_to_write_and_nothing_to_read(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in"):
        write_shards(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="nothing to write"):
        write_shards([], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no shards in"):
        stream_dls(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        stream(tmp_path / "none", 8)


def test_a_folder_of_images_becomes_shards(tmp_path):
    from PIL import Image

    for k in range(120):  # classes so large that the split is by hash alone
        path = tmp_path / "in" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (2 * k, k % 2, 99)).save(path)
    write_shards(tmp_path / "in", tmp_path / "out", img_size=8, shard_mb=0.001)
    images, shards = get_dls(tmp_path / "in", img_size=8), get_dls(tmp_path / "out", img_size=8)
    assert (shards.classes, shards.shape, shards.name) == (["a", "b"], (3, 8, 8), "in")

    def reds(b):
        x = torch.cat([x for x, _ in b]).float()
        return {round(float(v[0, 0, 0] if v.min() >= 0 else (v[0, 0, 0] + 1) * 127.5)) for v in x}

    parts = [getattr(shards, k) for k in ("train", "valid", "test")]
    found = [reds(p) for p in parts if p is not None]
    assert sum(map(len, found)) == 120 and set().union(*found) == {2 * k for k in range(120)}
    # nobody who is held out in one is trained on in the other
    held = reds(images.valid) | reds(images.test)
    assert reds(shards.valid) | reds(shards.test) <= held


def test_the_command_line_trains_on_shards(shards, tmp_path):
    from click.testing import CliRunner

    from ddpm_course.cli import main

    words = f"train --data {shards} --img-size 8 --epochs 1 --run {tmp_path / 'r'} --device cpu"
    words += " --network source --precision float32 --no-wandb"
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 0, result.output
    assert "64 training images" in result.output
    assert Diffusion.load(tmp_path / "r", device="cpu").classes == ["a", "b", "c"]


def test_files_are_opened_by_the_process_that_reads(shards):
    read = Examples(shards / "train")
    first = read[[0, 1]]
    opened = read.opened
    read.opened = (opened[0] - 1, opened[1])  # as after a fork
    assert torch.equal(read[[0, 1]][0], first[0]) and read.opened[1] is not opened[1]


def run_python(code, **kw):
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE.parent))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        **kw,
    )


MEMORY = """
import resource, sys, torch
from torch import nn
from ddpm_course.process import DDPM
from ddpm_course.streams import stream, write_shards
from ddpm_course.training import Diffusion

class Few(nn.Module):
    "Learns from a few pixels, so that reading takes the time, not learning."
    def __init__(self):
        super().__init__()
        self.w, self.process = nn.Parameter(torch.ones(1)), DDPM(100, "cosine")
    def forward(self, x, t, cond=None):
        return x
    def loss(self, x0, cond=None, t=None, eps=None, generator=None):
        return (self.w - x0[:, 0, 0, :8]).pow(2).mean(1)

data, mb, kept = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "kept"
if not kept:
    x = torch.randint(0, 256, (64, 3, 128, 128), dtype=torch.uint8)
    def batches():
        for k in range(mb * 2**20 // x.numel()):
            yield x + k, torch.zeros(64, dtype=torch.int64)
    write_shards(batches(), data, shard_mb=4, store="raw", valid=0, test=0)
loader = stream(data, 32)
if kept:
    loader = list(loader)
diff = Diffusion(denoiser=Few(), shape=(3, 128, 128), num_classes=1, device="cpu")
diff.fit(loader, epochs=1, progress=False, precision="float32", channels_last=False)
assert diff.step == len(loader) == mb * 2**20 // (3 * 128 * 128) // 64 * 2
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak = peak / 2**20 if sys.platform == "darwin" else peak / 2**10
if sys.platform == "linux":  # there the other number begins with that of the parent
    words = open("/proc/self/status", encoding="utf-8").read().split()
    peak = int(words[words.index("VmHWM:") + 1]) / 2**10
print(peak)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
def test_memory_does_not_grow_with_the_data(tmp_path):
    def peak(mb, how):  # MB
        words = [sys.executable, "-c", MEMORY, str(tmp_path / f"{mb}"), str(mb), how]
        env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE.parent))
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split()[-1])

    streamed, kept = [peak(mb, "streamed") for mb in (48, 240)], peak(240, "kept")
    print(f"peak memory in MB: {streamed} while writing and training, {kept} in memory")
    assert abs(streamed[1] - streamed[0]) < 40, streamed
    assert kept - streamed[1] > 140, "the same measure sees what is kept"


def test_without_the_library(shards, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "litdata", None)
    for f in (
        lambda: stream(shards, 8),
        lambda: get_dls(shards),
        lambda: write_shards(batches(), tmp_path / "s"),
    ):
        with pytest.raises(ImportError) as e:
            f()
        assert str(e.value) == "streaming needs litdata: pip install 'ddpm_course[stream]'"


def test_importing_streams_does_not_import_the_library():
    done = run_python(
        "import sys, ddpm_course.streams, ddpm_course.data; print('litdata' in sys.modules)"
    )
    assert done.stdout.split() == ["False"], done.stderr


def test_wrong_settings(shards):
    for kw, words in (
        (dict(batch_size=0), "batch_size"),
        (dict(workers=-1), "workers"),
        (dict(split="tset"), "unknown split 'tset'"),
        (dict(mix=0), "mix"),
    ):
        with pytest.raises(ValueError, match=words):
            Stream(shards, **kw)
