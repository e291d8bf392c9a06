"""The training loop: the mistakes of the source code base that live in it, checkpoints, resume,
loggers, bad input."""

import json
import linecache
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from common import QUICK, same_weights, tiny_diffusion, tiny_dls
from torch import nn

from ddpm_course.checkpoint import CheckpointError, checkpoints, damage, newest, read_state
from ddpm_course.ema import EMA
from ddpm_course.loggers import LocalLogger, WandbLogger, read_log
from ddpm_course.training import Diffusion, TrainingDiverged


class Probe(nn.Module):
    "A network that records what it was given."

    def __init__(self):
        super().__init__()
        self.conv, self.dtypes, self.conds, self.modes, self.batches = (
            nn.Conv2d(1, 1, 3, padding=1),
            [],
            [],
            [],
            [],
        )

    def forward(self, x, t, cond=None):
        out = self.conv(x)
        self.dtypes.append(out.dtype)
        self.conds.append(cond)
        self.modes.append(self.training)
        self.batches.append(len(x))
        return out


def probed(num_classes=3, **kw):
    return Diffusion(Probe(), shape=(1, 8, 8), num_classes=num_classes, device="cpu", **kw)


# ---- the eighteen mistakes, those of the training loop (numbers as in the course's list)
def test_mistake_01_mixed_precision_is_on_inside_the_network():
    diff = probed().prepare(tiny_dls(), epochs=1, precision="bfloat16", channels_last=False)
    x, y = next(iter(diff.dls.train))
    losses = diff.train_step(x, y)
    assert diff.model.net.dtypes == [torch.bfloat16] and losses.dtype == torch.float32
    assert diff.model.net.conv.weight.dtype == torch.float32  # the weights themselves stay exact


def test_mistake_02_labels_are_dropped_per_example_in_training_only():
    diff = probed(p_uncond=0.5).prepare(tiny_dls(n=512, batch_size=512), epochs=1, **QUICK)
    diff.one_epoch()
    null = [(c == diff.null).float().mean().item() for c in diff.model.net.conds]
    assert 0.4 < null[0] < 0.6, "half of the examples, not the whole batch or none"
    diff.ema_model.net.conds.clear()
    diff.one_epoch(train=False)
    assert diff.ema_model.net.conds and not any(
        (c == diff.null).any() for c in diff.ema_model.net.conds
    )


def test_mistake_02_dropout_uses_torch_random_numbers_of_the_run():
    def conds(seed):
        diff = probed(p_uncond=0.5, seed=seed).prepare(tiny_dls(), epochs=1, **QUICK)
        diff.one_epoch()
        return torch.cat(diff.model.net.conds)

    assert torch.equal(conds(1), conds(1)) and not torch.equal(conds(1), conds(2))


def test_mistake_03_epoch_loss_is_the_mean_over_examples_without_a_graph():
    dls = tiny_dls(n=40, batch_size=16)  # batches of 16, 16, 8
    diff = tiny_diffusion().prepare(dls, epochs=1, **QUICK)
    seen, real = [], diff.train_step

    def step(x, y):
        seen.append(real(x, y))
        return seen[-1]

    diff.train_step = step
    mean = diff.one_epoch()
    assert mean == pytest.approx(torch.cat(seen).mean().item(), rel=1e-6) and isinstance(
        mean, float
    )
    assert mean != pytest.approx(sum(s.mean().item() for s in seen), rel=0.5) and not any(
        s.requires_grad for s in seen
    )


def test_mistake_09_resume_keeps_the_average(tmp_path):
    diff = tiny_diffusion().fit(tiny_dls(), epochs=2, run=tmp_path / "r", progress=False, **QUICK)
    state = read_state(newest(tmp_path / "r"))
    assert state["ema"]["step"] == diff.ema.step == 8


def test_mistake_13_importing_does_nothing(tmp_path):
    code = (
        "import sys, os, torch; before = set(sys.modules)\nimport ddpm_course.training\nnew ="
        " {m.split('.')[0] for m in set(sys.modules) - before}\nheavy = new & {'torchvision',"
        " 'matplotlib', 'sklearn', 'wandb', 'PIL', 'tqdm', 'IPython', 'fastcore', 'nbdev',"
        " 'ipywidgets'}\nassert not heavy, heavy\nassert os.listdir('.') == [], os.listdir('.')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-300:]


def test_mistake_14_seeds_and_devices_are_obeyed():
    def weights(seed):
        return tiny_fit(seed).model.state_dict()

    a, b, c = weights(0), weights(0), weights(1)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    assert tiny_diffusion().device == torch.device("cpu")
    first = Diffusion(shape=(1, 8, 8), device="cpu", seed=0).model.state_dict()
    assert all(
        torch.equal(v, w)
        for v, w in zip(
            first.values(),
            Diffusion(shape=(1, 8, 8), device="cpu", seed=0).model.state_dict().values(),
        )
    )


def tiny_fit(seed):
    return tiny_diffusion(seed=seed).fit(tiny_dls(seed=seed), epochs=1, progress=False, **QUICK)


def test_mistake_15_resume_restores_optimizer_and_schedule(tmp_path):
    whole = tiny_diffusion().fit(tiny_dls(), epochs=3, run=tmp_path / "a", progress=False, **QUICK)
    part = interrupted(tmp_path / "b", at=5)
    assert part.step == 5 and 5 < part.settings.total_steps
    again = tiny_diffusion().fit(tiny_dls(), run=tmp_path / "b", resume=True, progress=False)
    assert (
        again.step == whole.step and same_weights(whole, again) and again.history == whole.history
    )
    assert again.trainer.sched.get_last_lr() == whole.trainer.sched.get_last_lr()


def interrupted(run, at, n=64, **kw):
    "Train until a real SIGINT arrives during optimizer step number `at`."
    diff = tiny_diffusion().prepare(tiny_dls(n=n), epochs=3, **{**QUICK, **kw})
    real = diff.train_step

    def step(x, y):
        losses = real(x, y)
        if diff.step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return losses

    diff.train_step = step
    with pytest.raises(KeyboardInterrupt, match=f"stopped at step {at} of"):
        diff.fit(run=run, progress=False)
    return diff


def test_mistake_17_a_skipped_step_skips_everything(monkeypatch):
    diff = tiny_diffusion().prepare(tiny_dls(), epochs=1, **QUICK)

    class Scaler:  # a float16 scaler that found an overflow
        value = 2.0

        def is_enabled(self):
            return True

        def scale(self, loss):
            return loss

        def unscale_(self, opt):
            pass

        def get_scale(self):
            return self.value

        def step(self, opt):
            pass

        def update(self):
            self.value = 1.0

    diff.trainer.scaler = Scaler()
    before, lr = [p.clone() for p in diff.ema_model.parameters()], diff.trainer.sched.get_last_lr()
    x, y = next(iter(diff.dls.train))
    diff.train_step(x, y)
    assert diff.step == 0 and diff.ema.step == 0 and diff.trainer.sched.get_last_lr() == lr
    assert all(torch.equal(p, q) for p, q in zip(before, diff.ema_model.parameters()))
    diff.train_step(x, y)  # the scale no longer falls: this one counts
    assert diff.step == 1 and diff.ema.step == 1 and diff.trainer.sched.get_last_lr() != lr


# ---- the loop
def test_gradient_accumulation_equals_one_large_batch():
    dls = tiny_dls(n=32, batch_size=16)
    x = torch.cat([b for b, _ in dls.train.epoch(0)])
    y = torch.cat([k for _, k in dls.train.epoch(0)])
    small, large = tiny_diffusion(p_uncond=0.0), tiny_diffusion(p_uncond=0.0)
    t, eps = torch.arange(1, 33) * 3, torch.randn(
        x.shape, generator=torch.Generator().manual_seed(1)
    )
    grads = {}
    for diff, parts in ((small, 2), (large, 1)):
        diff.prepare(dls, epochs=1, accumulate=parts, clip=1e9, **QUICK)
        diff.trainer.opt.register_step_pre_hook(
            lambda *_, parts=parts, diff=diff: grads.update(
                {parts: [p.grad.clone() for p in diff.model.parameters()]}
            )
        )
        real = diff.model.loss
        pieces = iter(zip(t.chunk(parts), eps.chunk(parts)))

        def loss(x, y, generator=None, eps=None, real=real, pieces=pieces):
            a, b = next(pieces)
            return real(x, y, a, b)

        diff.model.loss = loss
        for xs, ys in zip(x.chunk(parts), y.chunk(parts)):
            diff.train_step(xs, ys)
        assert diff.step == 1
    for p, q in zip(grads[2], grads[1]):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_an_epoch_that_ends_inside_an_accumulation_is_resumed_exactly(tmp_path):
    whole = tiny_diffusion().fit(
        tiny_dls(n=80), epochs=3, run=tmp_path / "a", progress=False, accumulate=2, **QUICK
    )  # 5 batches an epoch
    for at in (2, 3, 5):
        interrupted(tmp_path / str(at), at, n=80, accumulate=2)
        again = tiny_diffusion().fit(
            tiny_dls(n=80), run=tmp_path / str(at), resume=True, progress=False
        )
        assert same_weights(whole, again) and again.step == whole.settings.total_steps


def test_gradients_are_clipped():
    diff = tiny_diffusion().prepare(tiny_dls(), epochs=1, clip=1e-3, **QUICK)
    norms = []
    diff.trainer.opt.register_step_pre_hook(
        lambda *_: norms.append(
            torch.stack([p.grad.norm() for p in diff.model.parameters() if p.grad is not None])
            .norm()
            .item()
        )
    )
    diff.one_epoch()
    assert len(norms) == 4 and all(n == pytest.approx(1e-3, rel=1e-3) for n in norms)


def test_loss_falls_on_learnable_data():
    dls = tiny_dls()
    for b in (dls.train, dls.valid):
        b.source.fill_(255)
        b.source[:, :, :4] = 0
    diff = tiny_diffusion().fit(dls, epochs=30, progress=False, lr=5e-3, **QUICK)
    assert diff.history[-1]["valid_loss"] < 0.5 * diff.history[0]["valid_loss"]


def test_validation_is_the_same_every_time_and_changes_nothing():
    diff = tiny_diffusion().prepare(tiny_dls(), epochs=1, **QUICK)
    before, rng = {
        k: v.clone() for k, v in diff.model.state_dict().items()
    }, diff.generator.get_state()
    assert diff.one_epoch(train=False) == diff.one_epoch(train=False)
    assert all(
        torch.equal(v, before[k]) for k, v in diff.model.state_dict().items()
    ) and torch.equal(rng, diff.generator.get_state())


def test_minutes_are_kept_and_the_end_is_decided_once(tmp_path):
    diff = tiny_diffusion().prepare(tiny_dls(), minutes=0.02)
    assert diff.trainer.total is None and diff.settings.precision in ("float32", "bfloat16")
    start = time.monotonic()
    how = dict(minutes=0.05, run=tmp_path / "r", loggers=[], progress=False)
    diff = tiny_diffusion().fit(tiny_dls(), **how, **QUICK)
    assert 2.4 < time.monotonic() - start < 6  # 3 seconds, on a machine that others use, too
    plan = read_state(newest(tmp_path / "r"))["sched"]
    assert diff.trainer.done and plan["begin"] > 0 and plan["begin"] + plan["length"] == diff.step


@pytest.mark.parametrize("busy", [(0, 1 / 3), (2 / 3, 9), (0.85, 9)])
def test_minutes_hold_although_the_machine_is_slower_for_a_third_of_the_time(busy):
    seconds, diff = 5.0, tiny_diffusion()
    real, start = diff.train_step, time.monotonic()

    def step(*batch):  # ten times slower while somebody else is there
        share = (time.monotonic() - start) / seconds
        time.sleep(0.03 if busy[0] <= share < busy[1] else 0.003)
        return real(*batch)

    diff.train_step = step
    diff.fit(tiny_dls(), minutes=seconds / 60, progress=False, loggers=[], **QUICK)
    took = time.monotonic() - start
    assert abs(took / seconds - 1) < 0.1, f"{took:.2f} s, {seconds} were asked for"


BUSY = """
import time
from ddpm_course.data import get_dls
from ddpm_course.training import Diffusion

dls = get_dls("digits", img_size=16, batch_size=32)
diff = Diffusion(shape=dls.shape, num_classes=10, device="cpu")
print("go", flush=True)
start = time.monotonic()
diff.fit(dls, minutes={} / 60, run={!r}, progress=False)
print(time.monotonic() - start)
"""


@pytest.mark.parametrize("begin, end", [(0, 1 / 3), (2 / 3, 9)])
def test_minutes_hold_while_other_programs_burn_every_core(begin, end, tmp_path):
    seconds, burning = 12.0, []
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # two would wait for each other as well
    code = BUSY.format(seconds, str(tmp_path / "r"))
    training = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert training.stdout.readline() == "go\n"
        start = time.monotonic()
        while training.poll() is None:
            now = begin <= (time.monotonic() - start) / seconds < end
            if now and not burning:
                burning = [
                    subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    for _ in range(os.cpu_count())
                ]
            for other in [] if now else burning:
                other.kill()
            time.sleep(0.05)
        took = float(training.stdout.read())
    finally:
        for other in (training, *burning):
            other.kill()
            other.wait()
    assert abs(took / seconds - 1) < 0.25, f"{took:.2f} s, {seconds} were asked for"


def test_no_synchronisation_between_bar_refreshes(monkeypatch):
    """A step reads no number back from the device; checks that say 'on the CPU only' in their own
    line may."""
    diff = tiny_diffusion().prepare(tiny_dls(), epochs=1, **QUICK)
    x, y = next(iter(diff.dls.train))

    def guard(real):
        def read(self, *a):
            frame = sys._getframe(1)
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            assert (
                '"cpu"' in line or "site-packages" in frame.f_code.co_filename
            ), f"a step waits for the device: {line.strip()}"
            return real(self, *a)

        return read

    for name in ("item", "__float__", "__int__", "__bool__", "tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, guard(getattr(torch.Tensor, name)))
    diff.train_step(x, y)
    with pytest.raises(AssertionError, match="waits for the device.*diverged"):
        diff.trainer.check_finite()


def test_modes_are_restored_by_sample():
    diff = tiny_diffusion().prepare(tiny_dls(), epochs=1, **QUICK)
    diff.model.train()
    diff.sample([0], use_ema=False, n_steps=2)
    assert diff.model.training
    with pytest.raises(ValueError):
        diff.sample([0], use_ema=False, n_steps=0)
    assert diff.model.training


def test_samples_do_not_depend_on_chunks():
    diff = tiny_diffusion()
    a, b = (diff.sample([0, 1, 2, 0, 1], n_steps=4, seed=5, chunk=c, cfg_scale=1.5) for c in (2, 5))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert a.shape == (5, 1, 8, 8) and a.abs().max() <= 1 and not torch.equal(a[0], a[3])
    assert torch.equal(diff.sample([0], n_steps=4, seed=5), diff.sample([0], n_steps=4, seed=5))


# ---- run folders
def test_three_lines_from_run_to_samples(tmp_path):
    diff = tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "r", progress=False, **QUICK)
    again = Diffusion.load(tmp_path / "r", device="cpu")
    assert torch.equal(
        again.sample([1, 2], n_steps=3, seed=0), diff.sample([1, 2], n_steps=3, seed=0)
    )
    assert again.classes == diff.classes and again.step == 4


def test_previous_checkpoint_is_kept(tmp_path):
    tiny_diffusion().fit(tiny_dls(), epochs=4, run=tmp_path / "r", progress=False, **QUICK)
    assert [p.name for p in checkpoints(tmp_path / "r")] == ["step-000000012", "step-000000016"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_in_the_middle_of_an_epoch_is_bit_for_bit(tmp_path, accumulate, optimizer):
    how = dict(accumulate=accumulate, optimizer=optimizer)
    whole = tiny_diffusion().fit(
        tiny_dls(), epochs=3, run=tmp_path / "a", progress=False, **how, **QUICK
    )
    interrupted(tmp_path / "b", at=3, **how)
    again = tiny_diffusion().fit(tiny_dls(), run=tmp_path / "b", resume=True, progress=False)
    assert same_weights(whole, again)
    lines = read_log(tmp_path / "b")
    assert [line["step"] for line in lines] == [line["step"] for line in read_log(tmp_path / "a")]


def test_a_finished_run_resumes_to_itself(tmp_path):
    a = tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "r", progress=False, **QUICK)
    b = tiny_diffusion().fit(tiny_dls(), run=tmp_path / "r", resume=True, progress=False)
    assert same_weights(a, b) and b.step == 4


def test_checkpoints_hold_only_tensors_and_plain_values(tmp_path):
    tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "r", progress=False, **QUICK)
    torch.load(newest(tmp_path / "r") / "state.pt", weights_only=True)
    json.loads((tmp_path / "r/config.json").read_text())


# ---- bad input
def test_a_run_is_not_overwritten(tmp_path):
    tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "r", progress=False, **QUICK)
    before = newest(tmp_path / "r").stat().st_mtime_ns
    with pytest.raises(ValueError, match="already holds a run.*resume=True"):
        tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "r", progress=False, **QUICK)
    assert newest(tmp_path / "r").stat().st_mtime_ns == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_and_names_step_and_learning_rate(tmp_path, value):
    diff = tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "r", progress=False, **QUICK)
    good = newest(tmp_path / "r")
    diff = tiny_diffusion().prepare(tiny_dls(), epochs=2, **QUICK)
    real = diff.model.loss
    diff.model.loss = lambda *a, **k: real(*a, **k) * (value if diff.step == 2 else 1)
    with pytest.raises(TrainingDiverged, match=r"step 2 \(learning rate"):
        diff.fit(run=tmp_path / "n", progress=False)
    assert not checkpoints(tmp_path / "n") and newest(tmp_path / "r") == good


@pytest.mark.parametrize("labels, n, message", [([3], None, "0..2"), ([-1], None, "0..2")])
def test_labels_out_of_range(labels, n, message):
    if labels == [3]:  # 3 is the null class here: allowed, 'no label'
        assert tiny_diffusion().sample(labels, n_steps=2).shape == (1, 1, 8, 8)
        labels = [4]
    with pytest.raises(ValueError, match=message):
        tiny_diffusion().sample(labels, n_steps=2)


def test_labels_for_an_unconditional_model():
    with pytest.raises(ValueError, match="without labels"):
        tiny_diffusion(num_classes=0).sample([1], n_steps=2)
    assert tiny_diffusion(num_classes=0).sample(n=3, n_steps=2).shape == (3, 1, 8, 8)


def test_no_labels_for_a_conditional_model_mean_the_null_class():
    diff = tiny_diffusion()
    assert torch.equal(
        diff.sample(n=2, n_steps=2, seed=0), diff.sample([diff.null] * 2, n_steps=2, seed=0)
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(epochs=1, minutes=1), "epochs or minutes"),
        (dict(), "epochs or minutes"),
        (dict(epochs=1, precision="float23"), "float32"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_diffusion().prepare(tiny_dls(), **change)


def test_data_that_does_not_fit():
    with pytest.raises(ValueError, match=r"\(1, 16, 16\).*\(1, 8, 8\)"):
        tiny_diffusion().prepare(tiny_dls(size=16), epochs=1)
    with pytest.raises(ValueError, match="3 classes.*5"):
        tiny_diffusion().prepare(tiny_dls(num_classes=5), epochs=1)
    with pytest.raises(ValueError, match="multiples of 2"):
        tiny_diffusion(size=9)


@pytest.mark.parametrize(
    "kw, message", [(dict(param="epsilon"), "'eps'"), (dict(device="gpu"), "'cpu'")]
)
def test_unknown_names(kw, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(shape=(1, 16, 16), **kw)


def test_missing_truncated_flipped_and_other_checkpoints(tmp_path):
    run = tmp_path / "r"
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        Diffusion.load(run)
    tiny_diffusion().fit(tiny_dls(), epochs=1, run=run, progress=False, **QUICK)
    file = newest(run) / "ema.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-10])
    with pytest.raises(
        CheckpointError,
        match=f"ema.safetensors is truncated: {len(good) - 10} bytes, expected {len(good)}",
    ):
        Diffusion.load(run)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="ema.safetensors is damaged"):
        Diffusion.load(run)
    assert file.read_bytes() == flipped, "nothing is overwritten"
    file.unlink()
    with pytest.raises(CheckpointError, match="ema.safetensors is missing"):
        Diffusion.load(run)
    file.write_bytes(good)
    config = json.loads((run / "config.json").read_text())
    config["model"]["net"]["widths"] = [8, 16]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another architecture.*expected"):
        Diffusion.load(run)
    with pytest.raises(CheckpointError, match="another model.*net"):
        tiny_diffusion().fit(tiny_dls(), run=run, resume=True, progress=False)


def test_resume_on_other_data_is_refused(tmp_path):
    interrupted(tmp_path / "r", at=2)
    with pytest.raises(ValueError, match="other data"):
        tiny_diffusion().fit(
            tiny_dls(batch_size=8), run=tmp_path / "r", resume=True, progress=False
        )


def test_folder_that_cannot_be_written_is_said_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    diff = tiny_diffusion().prepare(tiny_dls(), epochs=1, **QUICK)
    diff.train_step = lambda *_: pytest.fail("training started")
    with pytest.raises(OSError, match="file"):
        diff.fit(run=tmp_path / "file/run", progress=False)


# ---- a damaged newest checkpoint
def harmed(path):
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return path


def test_resume_passes_over_a_damaged_checkpoint_and_ends_with_the_same_weights(tmp_path, capsys):
    whole = tiny_diffusion().fit(tiny_dls(), epochs=3, run=tmp_path / "a", progress=False, **QUICK)
    tiny_diffusion().fit(tiny_dls(), epochs=3, run=tmp_path / "b", progress=False, **QUICK)
    before, last = checkpoints(tmp_path / "b")
    damaged = harmed(last)
    content = {f.name: f.read_bytes() for f in before.iterdir()}
    assert damage(last) and "model.safetensors is damaged" in damage(last)
    again = tiny_diffusion()
    real = again.train_step

    def step(x, y):
        assert {
            f.name: f.read_bytes() for f in before.iterdir()
        } == content and damaged.exists(), "nothing was deleted"
        return real(x, y)

    again.train_step = step
    again.fit(tiny_dls(), run=tmp_path / "b", resume=True, progress=False)
    said = capsys.readouterr().out
    assert "model.safetensors is damaged" in said and before.name in said
    assert same_weights(whole, again) and again.history == whole.history
    assert damage(last) is None and same_weights(
        Diffusion.load(tmp_path / "b", device="cpu"), whole
    ), "the damaged step was written again"


def test_load_passes_over_a_damaged_checkpoint_with_a_warning(tmp_path, capsys):
    tiny_diffusion().fit(tiny_dls(), epochs=2, run=tmp_path / "r", progress=False, **QUICK)
    before, last = checkpoints(tmp_path / "r")
    older = Diffusion.load(before, device="cpu")
    # a training cannot go on from it, but samples need only the weights
    (last / "state.pt").unlink()
    assert Diffusion.load(tmp_path / "r", device="cpu").step == 8
    harmed(last)
    found = Diffusion.load(tmp_path / "r", device="cpu")
    assert (
        found.step == 4
        and same_weights(found, older)
        and f"taking the checkpoint before it, {before.name}" in capsys.readouterr().out
    )


def test_a_checkpoint_of_a_step_is_written_again_only_if_it_is_damaged(tmp_path):
    diff = tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "r", progress=False, **QUICK)
    path = newest(tmp_path / "r")
    (path / "mark").touch()  # a stranger's file goes only with the folder
    assert diff.save_model() == path and (path / "mark").exists()
    harmed(path)
    assert diff.save_model() == path and not (path / "mark").exists() and damage(path) is None
    assert checkpoints(tmp_path / "r") == [path] and not list(path.parent.glob(".*"))


# ---- loggers
def test_local_and_wandb_get_the_same_calls(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "r"
    tiny_diffusion().fit(tiny_dls(), epochs=2, run=run, progress=False, wandb=True, **QUICK)
    lines = read_log(run)
    assert [line["step"] for line in lines] == [4, 8] and {
        "loss",
        "valid_loss",
        "lr",
        "raw",
        "ema",
    } <= lines[-1].keys()
    assert (run / lines[-1]["ema"]).exists() and lines[-1]["checkpoint"].endswith("step-000000008")
    for _ in range(100):  # the client's own process writes the file; it may be a moment behind
        if len(history := read_wandb(run)) == 2:
            break
        time.sleep(0.2)
    assert [h["loss"] for h in history] == pytest.approx([line["loss"] for line in lines])
    assert [h["lr"] for h in history] == pytest.approx([line["lr"] for line in lines])
    assert list(run.glob("wandb/offline-run-*/files/media/images/ema*.png"))


def read_wandb(run):
    """Scalars that the real client wrote to its offline file: a header, then records in LevelDB's
    log format."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    data, at, rows, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue  # the end of a block is filled with zeros
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind not in (1, 4):
            continue  # full record or last part; 2 and 3 go on
        record, parts = wandb_internal_pb2.Record.FromString(parts), b""
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json)
                    for i in record.history.item
                }
            )
    return rows


def test_a_resumed_training_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    real = WandbLogger.__init__

    def init(self, *args, **kw):
        real(self, *args, **kw)
        ids.append(self.run.id)

    monkeypatch.setattr(WandbLogger, "__init__", init)
    for run in ("r", "r", "other"):
        tiny_diffusion().fit(
            tiny_dls(),
            epochs=1,
            run=tmp_path / run,
            resume=True,
            progress=False,
            wandb=True,
            **QUICK,
        )
    assert (
        ids[0] == ids[1] != ids[2]
        and json.loads((tmp_path / "r/wandb.json").read_text())["id"] == ids[0]
    )
    assert {f.name for f in (tmp_path / "r").glob("wandb/offline-run-*/*.wandb")} == {
        f"run-{ids[0]}.wandb"
    }


def test_no_prompt_and_no_wandb_when_not_logged_in(tmp_path, monkeypatch):
    for k in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "r", progress=False, **QUICK)
    assert read_log(tmp_path / "r") and not (tmp_path / "r/wandb").exists()


def test_log_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    log = LocalLogger(tmp_path)
    for step in (1, 2, 3):
        log(step, dict(loss=1 / step))
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # a crash
    LocalLogger(tmp_path, step=2)(3, dict(loss=0.5))
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.5),
    ]


def test_ema_matches_its_formula():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    want = [0.9 * p + 0.1 * q for p, q in zip(a.parameters(), b.parameters())]
    EMA(0.9, warmup=False).step_ema(a, b)
    for p, q in zip(a.parameters(), want):
        torch.testing.assert_close(p, q)


def test_wandb_falls_back_when_the_server_does_not_answer(tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    real, modes = wandb.init, []

    def init(mode, **kw):
        modes.append(mode)
        if mode == "online":
            raise TimeoutError
        return real(mode=mode, **kw)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    # online asked for without a login: the client would stop and ask
    WandbLogger(tmp_path, mode="online").close()
    assert modes == ["offline"]
    modes.clear()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    log = WandbLogger(tmp_path, mode="online")
    log(1, dict(loss=1.0))
    log.close()
    assert modes == ["online", "offline"] and "does not answer" in capsys.readouterr().out
