"""Bad input gets one sentence: what the files of the single modules leave open.

Where the other rows are tested: folders, broken files, image modes, no network - test_data.py; T,
betas, times and schedules - test_process.py; predictions that a process cannot carry -
test_denoiser.py; labels, NaN, checkpoints, folders that cannot be written - test_training.py; a
full disk - test_interrupt.py; sides and labels of the bare network - test_unet.py; guidance -
test_guidance.py; samplers - test_sampling.py.
"""

import os

import pytest
import torch
from click.testing import CliRunner
from common import QUICK, same_weights, tiny_diffusion, tiny_dls

from ddpm_course.checkpoint import CheckpointError, check_writable, checkpoints, newest
from ddpm_course.cli import main
from ddpm_course.core import default_device
from ddpm_course.data import get_dls
from ddpm_course.model import make_net, make_param, make_process
from ddpm_course.process import Process
from ddpm_course.training import Diffusion


def sentence(call, *words, error=ValueError):
    "What `call` says, which is one line with all of the words."
    with pytest.raises(error) as e:
        call()
    said = str(e.value)
    assert "\n" not in said and 10 < len(said) < 500 and all(w in said for w in words), said
    return said


class Straight(Process):
    "x_t = (1 - t) x0 + t eps: no data is left at t = 1, so that eps does not say what x0 was."

    config = dict(name="straight")

    def alpha(self, t):
        return 1 - t.double()

    def sigma(self, t):
        return t.double()


# ---- names
NAMES = dict(
    data_set=(
        lambda: get_dls("fashion-mnist"),
        "'fashion_mnist'",
        "'shapes', 'digits', 'mnist', 'fashion_mnist', 'cifar10'",
    ),
    device=(lambda: default_device("cud"), "'cuda'", "'cuda', 'mps', 'cpu'"),
    model_device=(
        lambda: Diffusion(shape=(1, 16, 16), device="CPU"),
        "'cpu'",
        "'cuda', 'mps', 'cpu'",
    ),
    prediction=(
        lambda: Diffusion(shape=(1, 16, 16), param="velocty", device="cpu"),
        "'velocity'",
        "'eps', 'x0', 'v'",
    ),
    stored_prediction=(lambda: make_param("scores"), "'score'", "'eps', 'x0', 'v'"),
    process=(lambda: make_process("dppm"), "'ddpm'", "'ddpm'"),
    network=(
        lambda: make_net("Unet_conditional"),
        "'UNet_conditional'",
        "'UNet', 'UNet_conditional'",
    ),
    precision=(
        lambda: tiny_diffusion().prepare(tiny_dls(), epochs=1, precision="bf16"),
        "'bfloat16'",
        "'float32', 'bfloat16', 'float16', 'auto'",
    ),
    setting=(
        lambda: tiny_diffusion().prepare(tiny_dls(), epochs=1, weightdecay=0.1),
        "'weight_decay'",
        "'lr', 'optimizer', 'weight_decay'",
    ),
)


@pytest.mark.parametrize("what", NAMES)
def test_unknown_names_list_the_choices_and_suggest_the_nearest(what):
    call, nearest, choices = NAMES[what]
    sentence(call, f"Did you mean {nearest}?", choices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there():
    sentence(lambda: default_device("cuda"), "'cuda' is not available here", "cpu")


@pytest.mark.parametrize("name", ["cpu:1", "cpu:x", "cpu:"])
def test_a_device_that_does_not_exist(name):
    sentence(lambda: default_device(name), repr(name), "there are 1")


# ---- sizes, steps, lengths
NUMBERS = dict(
    side=(
        lambda: Diffusion(shape=(3, 33, 20), device="cpu"),
        "33 x 20",
        "multiples of 8",
        "32 x 16 and 40 x 24",
    ),
    side_too_small=(lambda: Diffusion(shape=(1, 4, 4), device="cpu"), "4 x 4", "8 x 8"),
    steps_none=(lambda: tiny_diffusion().sample([0], n_steps=0), "1 to 100 steps, not 0"),
    steps_negative=(lambda: tiny_diffusion().sample([0], n_steps=-5), "1 to 100 steps, not -5"),
    steps_more_than_T=(
        lambda: tiny_diffusion().sample([0], n_steps=101),
        "1 to 100 steps, not 101",
    ),
    prediction_not_carried=(
        lambda: Diffusion(process=Straight(), param="eps", shape=(1, 16, 16), device="cpu"),
        "eps_param does not work with Straight",
    ),
    chunk=(lambda: tiny_diffusion().sample([0], chunk=0), "chunk", "at least 1, not 0"),
    labels_and_n=(lambda: tiny_diffusion().sample([0, 1], n=3), "2 labels and n=3"),
    no_epochs=(
        lambda: tiny_diffusion().prepare(tiny_dls(), epochs=0),
        "epochs must be more than 0",
    ),
    endless=(
        lambda: tiny_diffusion().prepare(tiny_dls(), minutes=float("inf")),
        "minutes must be more than 0 and finite",
    ),
    negative_minutes=(lambda: tiny_diffusion().prepare(tiny_dls(), minutes=-1), "minutes"),
    lr=(
        lambda: tiny_diffusion().prepare(tiny_dls(), epochs=1, lr=0),
        "lr must be more than 0, not 0",
    ),
    lr_nan=(
        lambda: tiny_diffusion().prepare(tiny_dls(), epochs=1, lr=float("nan")),
        "lr must be more than 0, not nan",
    ),
    accumulate=(lambda: tiny_diffusion().prepare(tiny_dls(), epochs=1, accumulate=0), "accumulate"),
    no_data=(lambda: tiny_diffusion().fit(epochs=1), "get_dls"),
)


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_that_have_no_sense(what):
    call, *words = NUMBERS[what]
    sentence(call, *words)


def test_a_refused_call_leaves_the_model_as_it_was():
    diff = tiny_diffusion()
    for steps in (0, 101):
        sentence(lambda: diff.sample([0], n_steps=steps), str(steps))
    assert same_weights(diff, tiny_diffusion()) and not diff.ema_model.training and diff.step == 0


def test_loaders_pad_so_that_any_image_fits_a_size_that_works(tmp_path):
    from PIL import Image

    for i, size in enumerate([(30, 30), (17, 90), (90, 17), (1, 1)]):
        Image.new("L", size, 50 * i).save(tmp_path / f"{i}.png")
    shape = get_dls(tmp_path, 32).shape
    assert shape == (1, 32, 32) and Diffusion(shape=shape, device="cpu").shape == shape


# ---- a batch larger than the data set
def test_a_batch_larger_than_the_data_set_trains():
    dls = tiny_dls(n=5, batch_size=100)
    diff = tiny_diffusion().fit(dls, epochs=3, progress=False, **QUICK)
    assert len(dls.train) == 1 and diff.step == 3 and not same_weights(diff, tiny_diffusion())
    assert [len(x) for x, _ in dls.train] == [5] and all(h["loss"] > 0 for h in diff.history)


def test_one_image_and_more_accumulation_than_batches_train():
    diff = tiny_diffusion().fit(
        tiny_dls(n=1, batch_size=64), epochs=4, accumulate=4, progress=False, **QUICK
    )
    assert diff.step == 1 == diff.settings.total_steps


# ---- checkpoints: what test_training.py leaves open
@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("good") / "r"
    tiny_diffusion().fit(tiny_dls(), epochs=1, run=run, progress=False, **QUICK)
    return run


@pytest.fixture
def run(good_run, tmp_path):
    import shutil

    return shutil.copytree(good_run, tmp_path / "r")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name", ["state.pt", "model.safetensors", "ema.safetensors", "manifest.json"]
)
@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda b: b[: len(b) // 2], ""),
        (lambda b: b[:20] + bytes([b[20] ^ 0x80]) + b[21:], "damaged"),
        (lambda b: b"", ""),
        (None, ""),
    ],
    ids=["truncated", "flipped", "empty", "missing"],
)
def test_resuming_from_a_damaged_checkpoint_names_the_file_and_overwrites_nothing(
    run, name, harm, words
):
    path = newest(run) / name
    if harm is None:
        path.unlink()
    else:
        path.write_bytes(harm(path.read_bytes()))
    before = contents(run)
    sentence(
        lambda: tiny_diffusion().fit(tiny_dls(), run=run, resume=True, progress=False),
        name,
        words,
        error=CheckpointError,
    )
    assert contents(run) == before


def test_a_config_that_is_no_json(run):
    (run / "config.json").write_text('{"model": ')
    sentence(
        lambda: Diffusion.load(run, device="cpu"),
        "config.json is damaged: expected JSON",
        error=CheckpointError,
    )


def test_a_folder_without_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    sentence(
        lambda: Diffusion.load(tmp_path), str(tmp_path), "checkpoints/step-", error=CheckpointError
    )


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"model": {}}', '{"model": 3}', '{"model": {"net": {"nme": "UNet"}}}']
)
def test_settings_that_are_not_a_models(tmp_path, content):
    tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / "r", progress=False, **QUICK)
    (tmp_path / "r/config.json").write_text(content)
    sentence(
        lambda: Diffusion.load(tmp_path / "r"),
        "config.json is damaged",
        "expected",
        error=CheckpointError,
    )
    sentence(
        lambda: tiny_diffusion().fit(tiny_dls(), run=tmp_path / "r", resume=True, progress=False),
        "config.json",
        error=CheckpointError,
    )


# ---- the run folder
@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="permissions do not bind this user",
)
def test_a_read_only_folder_is_said_before_training(tmp_path):
    tmp_path.chmod(0o500)
    try:
        sentence(lambda: check_writable(tmp_path / "r"), "cannot write", "r", error=OSError)
    finally:
        tmp_path.chmod(0o700)


def test_too_little_space_is_said_before_training(tmp_path):
    sentence(
        lambda: check_writable(tmp_path / "r", need=10**15),
        "MiB free",
        "needs",
        str(tmp_path / "r"),
        error=OSError,
    )
    assert not checkpoints(tmp_path / "r")


# ---- the same on the command line: a sentence on standard error, exit code 1
def fails(*args, code=1):
    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == code and isinstance(done.exception, SystemExit), (
        done.exit_code,
        done.exception,
        done.output,
    )
    said = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1 and "Traceback" not in done.output, done.output
    return said[0]


TRAIN = dict(
    data_set=(["--data", "minst"], "Did you mean 'mnist'?"),
    folder=(["--data", "./no/such/folder"], "folder", ".png"),
    schedule=(["--schedule", "cosin"], "Did you mean 'cosine'?"),
    prediction=(["--predict", "epsilon"], "'eps', 'x0', 'v'"),
    device=(["--device", "gpu"], "'cuda', 'mps', 'cpu'"),
    precision=(["--precision", "half"], "'float32', 'bfloat16', 'float16', 'auto'"),
    side=(["--img-size", 30], "30 x 30", "24 x 24 and 32 x 32"),
    no_side=(["--img-size", -8], "--img-size", "HEIGHTxWIDTH"),
    batch=(["--batch-size", 0], "batch_size"),
    no_time=(["--minutes", 0], "minutes must be more than 0"),
    endless=(["--epochs", "inf"], "epochs must be more than 0 and finite, not inf"),
    two_lengths=(["--minutes", 1, "--epochs", 1], "epochs or minutes"),
    lr=(["--lr", -1], "lr must be more than 0"),
)


@pytest.mark.parametrize("what", TRAIN)
def test_train_on_the_command_line(what, tmp_path):
    args, *words = TRAIN[what]
    small = [] if "--img-size" in args else ["--img-size", 16]
    said = fails("train", "--run", tmp_path / "r", *small, *args)
    assert all(w in said for w in words), said
    assert not (tmp_path / "r").exists()


SAMPLE = dict(
    label=(["--label", "seven"], "unknown label 'seven'", "'0', '1', '2'"),
    label_number=(["--label", 3], "unknown label '3'"),
    none=(["--n", 0], "--n", "at least 1, not 0"),
    steps=(["--steps", 0], "1 to 100 steps, not 0"),
    too_many_steps=(["--steps", 101], "1 to 100 steps, not 101"),
    sampler=(["--sampler", "eular"], "Did you mean 'euler'?"),
    chunk=(["--chunk", 0], "chunk"),
    device=(["--device", "gpu"], "'cuda', 'mps', 'cpu'"),
)


@pytest.mark.parametrize("what", SAMPLE)
def test_sample_on_the_command_line(what, good_run, tmp_path):
    args, *words = SAMPLE[what]
    said = fails(
        "sample",
        "--run",
        good_run,
        "--out",
        tmp_path / "x.png",
        *([] if "--device" in args else ["--device", "cpu"]),
        *args,
    )
    assert all(w in said for w in words), said
    assert not (tmp_path / "x.png").exists()


def test_labels_for_an_unconditional_run_on_the_command_line(tmp_path):
    tiny_diffusion(num_classes=0).fit(
        tiny_dls(num_classes=0), epochs=1, run=tmp_path / "r", progress=False, **QUICK
    )
    assert "without labels" in fails(
        "sample", "--run", tmp_path / "r", "--label", "1", "--device", "cpu"
    )


def test_runs_that_are_not_there_on_the_command_line(tmp_path):
    for command in (["sample", "--run"], ["info"]):
        assert "config.json does not exist" in fails(*command, tmp_path / "no")


def test_a_run_is_not_overwritten_from_the_command_line(tmp_path):
    run = tmp_path / "r"
    (run / "checkpoints/step-000000004").mkdir(parents=True)
    assert "already holds a run" in fails(
        "train", "--img-size", 16, "--device", "cpu", "--run", run, "--epochs", 1
    )


def test_options_that_do_not_exist_are_the_command_lines_own_error():
    assert "--epoch" in fails("train", "--epoch", 1, code=2)
