"""Folders as people have them: every arrangement gives the right classes and splits, or a
sentence."""

import json
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from common import QUICK, command_line, make_folder, picture, tiny_diffusion, tiny_dls
from PIL import Image

from ddpm_course.data import get_dls, split_part
from ddpm_course.files import Part
from ddpm_course.model import our_name
from ddpm_course.training import Diffusion, TrainingDiverged

QUIET = dict(progress=False, loggers=[])


def fill(folder, counts):
    "Pictures by folder, none twice, also not of an earlier call."
    return make_folder(folder, counts, start=1000 * len(list(folder.rglob("*"))))


def sizes(dls):
    return [len(b.labels) for b in (dls.train, dls.valid, dls.test)]


def quietly(*args, **kw):
    "The data, and what was said."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dls = get_dls(*args, **kw)
    return dls, " | ".join(str(w.message) for w in said)


# ---- layouts


@pytest.mark.parametrize(
    "names", [("training_set", "test_set"), ("Train", "VAL"), ("train", "dev")]
)
@pytest.mark.parametrize("inside", [True, False])
def test_splits_are_known_at_either_level(tmp_path, names, inside):
    for name, n in zip(names, (12, 5)):
        for c in ("cats", "dogs"):
            fill(tmp_path, {f"{c}/{name}" if inside else f"{name}/{c}": n})
    dls, _ = quietly(tmp_path, 8)
    held = dls.test if names[1] == "test_set" else dls.valid
    assert dls.classes == ["cats", "dogs"] and len(held.labels) == 10
    assert sum(sizes(dls)) == 34


@pytest.mark.parametrize("wrapper", ["data", "data/inner"])
def test_folders_that_hold_one_folder_are_looked_through(tmp_path, wrapper):
    for split, n in dict(train=6, test=3).items():
        fill(tmp_path, {f"{wrapper}/{split}/{c}": n for c in ("cats", "dogs")})
    dls, _ = quietly(tmp_path, 8, valid=0)
    assert dls.classes == ["cats", "dogs"] and sizes(dls) == [12, 0, 6]


def test_a_class_that_looks_like_a_split_is_said(tmp_path):
    dls, said = quietly(fill(tmp_path, {"cats": 5, "test": 5}), 8)
    assert dls.classes == ["cats", "test"] and "test in" in said and "became a class" in said


def heap(folder, n=12):
    fill(folder, {"images": n})
    return [(f"{i:03}.png", f"kind {i % 3}") for i in range(n)]


LISTS = {
    "labels.csv": lambda rows: "file,label\n" + "".join(f"{f},{y}\n" for f, y in rows),
    "metadata.jsonl": lambda rows: "".join(
        json.dumps(dict(file_name=f"images/{f}", label=y)) + "\n" for f, y in rows
    ),
    "classes.json": lambda rows: json.dumps(dict(rows)),
    "train.tsv": lambda rows: "".join(f"{f}\t{y}\n" for f, y in rows),
    "sheet.csv": lambda rows: "ID;Breed\n" + "".join(f"{f[:-4]};{y}\n" for f, y in rows),
}


@pytest.mark.parametrize("packed", ["", "zip", "gztar"])
@pytest.mark.parametrize("name", LISTS)
def test_lists_of_labels_in_folders_and_archives(tmp_path, name, packed):
    rows = heap(tmp_path / "data")
    (tmp_path / "data" / name).write_text(LISTS[name](rows))
    where = tmp_path / "data"
    if packed:
        where = shutil.make_archive(tmp_path / "packed", packed, tmp_path, "data")
    dls, said = quietly(where, 8)
    assert dls.classes == ["kind 0", "kind 1", "kind 2"] and sum(sizes(dls)) == 12
    assert "passed over" not in said


def test_a_list_inside_of_a_split_may_name_splits_of_its_own(tmp_path):
    rows = heap(tmp_path / "train")
    text = "file,label,split\n" + "".join(f"{f},{y},train\n" for f, y in rows)
    (tmp_path / "train/labels.csv").write_text(text)
    fill(tmp_path, {"test/kind 0": 3, "test/kind 1": 3})
    dls, said = quietly(tmp_path, 8)
    assert len(dls.test.labels) == 6 and len(dls.classes) == 3 and "passed over" not in said


@pytest.mark.parametrize("lines", ['["0.png", "cat"]', "3", '"cat"'])
def test_lines_of_another_kind_are_no_list(tmp_path, lines):
    heap(tmp_path)
    (tmp_path / "notes.jsonl").write_text(lines)
    dls, said = quietly(tmp_path, 8)
    assert dls.num_classes == 1 and "1 .jsonl" in said


def test_what_is_said_of_a_wrapped_list_is_said_once(tmp_path):
    fill(tmp_path, {"data": 3})
    (tmp_path / "data/labels.csv").write_text("file,label\n000.png,a\n001.png,b\ngone.png,b\n")
    dls, said = quietly(tmp_path, 8, valid=0, test=0)
    assert dls.classes == ["a", "b"] and said.count("1 of 3 rows") == 1


def test_a_list_says_what_it_could_not_use(tmp_path):
    rows = [*heap(tmp_path), ("gone.png", "kind 0")]
    (tmp_path / "labels.csv").write_text(LISTS["labels.csv"](rows))
    dls, said = quietly(tmp_path, 8)
    assert "1 of 13 rows" in said and sum(sizes(dls)) == 12


def test_numbers_in_names_of_classes_sort_as_numbers(tmp_path):
    dls, _ = quietly(fill(tmp_path, {str(i): 4 for i in range(12)}), 8)
    assert dls.classes == [str(i) for i in range(12)]


def test_what_is_no_image_is_counted_by_ending(tmp_path):
    fill(tmp_path, {"a": 4})
    for name in ("a/x.heic", "a/y.HEIC", "b.txt"):
        (tmp_path / name).write_bytes(b"?")
    _, said = quietly(tmp_path, 8)
    assert "2 .heic, 1 .txt" in said


@pytest.mark.parametrize(
    "ending, kind", [(".jfif", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000")]
)
def test_whatever_pillow_opens_is_read(tmp_path, ending, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    for i in range(4):
        picture(i, 16).save(tmp_path / f"{i}{ending}", kind)
    dls, said = quietly(tmp_path, 8)
    assert sum(sizes(dls)) == 4 and not said


def test_files_of_several_pages_are_said(tmp_path):
    first, *others = [picture(i, 16) for i in range(3)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    fill(tmp_path, {".": 3})
    _, said = quietly(tmp_path, 8)
    assert "1 files hold several pictures" in said and "the first is taken" in said


# ---- splits of small classes


def part_of(counts):
    y = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    names = [str(i) for i in range(len(y))]
    keys = [f"key {i}" for i in names]
    return Part(torch.zeros(len(y), 1, 2, 2, dtype=torch.uint8), y, names, keys, keys)


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("counts", [[3] * 40, [6] * 40, [1] * 2500, [100] + [1] * 50, [2] * 100])
def test_small_classes_keep_what_they_cannot_spare(counts, stable):
    parts = split_part(part_of(counts), dict(valid=0.1, test=0.1), stable=stable)
    n, share = sum(counts), {k: len(p.names) for k, p in parts.items()}
    luck = 3 * (0.1 * n) ** 0.5 if stable else 0  # by hash, shares are only about right
    assert share["valid"] <= 0.1 * n + luck and share["test"] <= 0.1 * n + luck
    kept = parts["train"].labels.bincount(minlength=len(counts))
    assert all(k >= max(1, 2 * n / 3) for k, n in zip(kept.tolist(), counts))
    assert sum(share.values()) == n
    if max(counts) < 3:
        assert share["valid"] == share["test"] == 0


def test_large_classes_give_their_share_rounded_each_by_itself():
    counts = [592, 674, 595, 613, 584, 542]  # a tenth of the first digits of MNIST
    parts = split_part(part_of(counts), dict(valid=0.1, test=0.1))
    for name in ("valid", "test"):
        assert parts[name].labels.bincount().tolist() == [round(0.1 * n) for n in counts]


def test_shares_are_options_and_nothing_means_nothing(tmp_path):
    fill(tmp_path, {"a": 40, "b": 40})
    dls = get_dls(tmp_path, 8, valid=0, test=0)
    assert sizes(dls) == [80, 0, 0]
    diff = Diffusion(shape=dls.shape, device="cpu").fit(dls, total_steps=1, **QUIET, **QUICK)
    assert diff.step == 1
    assert sizes(get_dls("digits", 8, valid=0.3, test=0.2))[0] == pytest.approx(0.5 * 1797, abs=8)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        get_dls("digits", 8, valid=0.5, test=0.5)


def test_balance_hands_out_every_class_equally_often(tmp_path):
    dls = get_dls(fill(tmp_path, {"few": 10, "many": 90}), 8, balance=True)
    seen = torch.cat([y for e in range(8) for _, y in dls.train.epoch(e)]).bincount()
    assert 0.4 < seen[0] / seen.sum() < 0.6
    a, b = ([y.tolist() for _, y in dls.train.epoch(3, k)] for k in (0, 1))
    assert a[1:] == b  # and goes on in the middle as before


# ---- ranges and transparency


def icons(folder, n=30):
    "White on nothing, each at another place."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        im = Image.new("RGBA", (16, 16), (i, 0, 0, 0))
        im.paste((255, 255, 255, 255), (i % 6, i // 6, 8 + i % 6, 8 + i // 6))
        im.save(folder / f"{i}.png")
    return folder


def test_white_icons_are_not_lost_on_white_paper(tmp_path):
    _, said = quietly(icons(tmp_path), 16)
    assert "30 of 30 images are blank" in said and "'keep'" in said
    for background in ("black", "#123456", "checker"):
        dls, said = quietly(tmp_path, 16, background=background)
        assert sum(sizes(dls)) == 30 and not said
    with pytest.raises(ValueError, match="white is a whole number"):
        get_dls(tmp_path, 16, white=0)
    with pytest.raises(ValueError, match="'checker', or 'keep'"):
        get_dls(tmp_path, 16, background="transparent-ish")


def test_transparency_is_kept_from_end_to_end(tmp_path):
    dls, said = quietly(icons(tmp_path / "data"), 16, background="keep")
    assert dls.shape == (4, 16, 16) and sum(sizes(dls)) == 30 and not said
    diff = Diffusion(shape=dls.shape, device="cpu")
    diff.fit(dls, total_steps=2, run=tmp_path / "r", progress=False, **QUICK)
    images = Diffusion.load(tmp_path / "r", device="cpu").sample(n=2, n_steps=2)
    assert images.shape == (2, 4, 16, 16)


def test_numbers_of_twelve_bits_are_said_and_scaled(tmp_path):
    for i in range(8):
        Image.new("I;16", (8, 8), 200 * i).save(tmp_path / f"{i}.tif")
        im = Image.open(tmp_path / f"{i}.tif").convert("I").point(lambda v: v)
        im.putpixel((3, 3), 4095)
        im.convert("I;16").save(tmp_path / f"{i}.tif")
    _, said = quietly(tmp_path, 8)
    assert "white=4095" in said
    dls, said = quietly(tmp_path, 8, white=4095)
    assert dls.train.images.max() == 255 and not said


@pytest.mark.parametrize(
    "scale, words",
    [(lambda x: (x + 1) / 2, "from 0 to 1"), (lambda x: (x + 1) * 127.5, "from 0 to 255")],
)
def test_a_loader_in_another_range_is_said_at_the_door(scale, words):
    x = torch.rand(8, 1, 8, 8) * 2 - 1
    x[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    with pytest.warns(UserWarning, match=words):
        tiny_diffusion().fit([(scale(x), torch.zeros(8).long())], total_steps=1, **QUIET, **QUICK)


# ---- two runs in one folder


HOLD = """
import sys, time
from ddpm_course.runs import Run

with Run(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_folder_is_of_one_process_until_it_dies(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "r"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        how = dict(total_steps=1, run=tmp_path / "r", **QUIET, **QUICK)
        with pytest.raises(ValueError, match=rf"being trained by process {other.pid} on .*--run"):
            tiny_diffusion().fit(tiny_dls(), **how)
        assert not (tmp_path / "r/config.json").exists()
    finally:
        other.kill()
        other.wait()
    assert tiny_diffusion().fit(tiny_dls(), **how).step == 1  # nobody had to clean up
    assert not (tmp_path / "r/.owner").exists()


# ---- from the command line


QUICKLY = ["--epochs", 0.05, "--precision", "float32", "--batch-size", 16, "--img-size", 8]


def test_runs_without_a_name_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/digits", "runs/digits-2"):
        assert name + " |" in command_line("train", "--data", "digits", *QUICKLY)
    said = command_line("train", "--data", "digits", "--resume", *QUICKLY)
    assert "runs/digits-2 is done" in said


def test_the_command_line_reads_folders_as_the_library_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    icons(tmp_path / "data/round"), icons(tmp_path / "data/square", 20)
    archive = shutil.make_archive(tmp_path / "icons", "zip", tmp_path / "data")
    how = ["--background", "keep", "--valid", 0, "--test", 0.1, "--flip", "--balance"]
    args = ["train", "--data", archive, *QUICKLY[:-2], "--img-size"]
    said = command_line(*args, "8x16", *how)
    assert "4x8x16" in said and "classes: round: " in said and ", 0 to validate" in said
    assert "HEIGHTxWIDTH" in command_line(*args, "8by16", code=1)


# ---- whoever has no home


@pytest.mark.parametrize("home", ["/proc/none", None])
def test_without_a_home_folder_all_goes_on(home, tmp_path, monkeypatch):
    from ddpm_course import exercises
    from ddpm_course.judge import classifier_for
    from ddpm_course.pretrained import kept

    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "DDPM_COURSE_PROGRESS", "DDPM_COURSE_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if home is None:
        monkeypatch.setattr(Path, "expanduser", without_home)
    assert "exercises done" in str(exercises.progress())
    exercises._note("00.1") if home is None else None
    dls = get_dls("digits", 8, sizes=(32, 8, 8))
    assert classifier_for(dls, epochs=1, device="cpu")
    diff = tiny_diffusion().fit(tiny_dls(), total_steps=1, **QUIET, **QUICK)
    assert kept(diff, "x") is diff


def without_home(path):
    if path.parts[:1] == ("~",):
        raise RuntimeError("Could not determine home directory.")
    return path


def test_the_package_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_course", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Usage: ddpm_course " in done.stdout


# ---- names and choices


def named(folder, names):
    for k, name in enumerate(names):
        fill(folder, {name: 6})
    return get_dls(folder, 8, batch_size=4)


def test_a_model_that_is_tuned_takes_the_names_of_the_new_classes(tmp_path):
    first = named(tmp_path / "a", ["cat", "dog"])
    old = Diffusion(shape=first.shape, num_classes=2, classes=first.classes, device="cpu")
    old.fit(first, total_steps=1, run=tmp_path / "r", progress=False, **QUICK)
    diff, dls = Diffusion.load(tmp_path / "r", device="cpu"), named(tmp_path / "b", ["ant", "cat"])
    with pytest.warns(UserWarning, match="were cat, dog, and are those of the data now: ant, cat"):
        diff.fit(dls, total_steps=1, **QUIET, **QUICK)
    assert diff.classes == ["ant", "cat"]
    new = Diffusion(shape=dls.shape, num_classes=2, classes=dls.classes, device="cpu")
    before = new.model.net.label_emb.weight.clone()
    new.start_from(tmp_path / "r")  # cat has moved, ant is new
    after, theirs = new.model.net.label_emb.weight, old.ema_model.net.label_emb.weight
    assert torch.equal(after[1], theirs[0]) and torch.equal(after[0], before[0])


def test_a_folder_called_like_a_data_set_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "digits", {"a": 4})
    dls, said = quietly("digits", 8)
    assert dls.num_classes == 10 and "write ./digits for the folder" in said
    assert get_dls("./digits", 8).classes == ["a"]


def test_guidance_of_a_model_that_was_never_told_nothing():
    diff = Diffusion(shape=(1, 8, 8), num_classes=2, p_uncond=0.0, device="cpu")
    with pytest.warns(UserWarning, match="p_uncond=0"):
        diff.sample([0], cfg_scale=2.0, n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diff.sample([0], n_steps=1)


@pytest.mark.parametrize(
    "name, ours", [("guidance", "cfg_scale"), ("num_inference_steps", "n_steps")]
)
def test_names_of_other_libraries_are_answered_with_ours(name, ours):
    with pytest.raises(TypeError, match=f"{name!r}: it is called {ours}"):
        tiny_diffusion().sample(n=1, **{name: 2})


# ---- what people pass


def test_arrays_and_lists_are_taken_for_tensors():
    diff, start = tiny_diffusion(), torch.randn(2, 1, 8, 8)
    how = dict(seed=0, bounds=[-1, 1])
    want = diff.sample(start=start, ts=torch.tensor([90.0, 40.0, 0.0]), **how)
    assert torch.equal(diff.sample(start=start.numpy(), ts=[90.0, 40.0, 0.0], **how), want)
    ts = torch.tensor([90, 40, 0]).numpy()
    assert torch.equal(diff.sample(start=start.tolist(), ts=ts, **how), want)
    assert Diffusion(shape=8, device="cpu").shape == (8,)


@pytest.mark.parametrize(
    "wrong", [dict(n="3"), dict(seed="a"), dict(n_steps=1.5), dict(bounds=[1, -1])]
)
def test_what_makes_no_sense_is_said(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*(whole number|lowest, highest)"):
        tiny_diffusion().sample(**dict(n=1, n_steps=1) | wrong)


def test_spoilt_data_are_not_blamed_on_the_learning_rate():
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    bad = x.clone()
    bad[2, 0, 3, 3] = float("nan")
    with pytest.raises(TrainingDiverged, match="the data of step 1 hold numbers that are NaN"):
        tiny_diffusion(num_classes=0).fit([x, bad], epochs=1, **QUIET, **QUICK)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("DDIM", "euler"),
        ("ddpm", "ancestral"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpm++ 2m sde", "dpmpp_2m_sde"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("EulerAncestralDiscreteScheduler", "ancestral"),
        ("euler_a", "ancestral"),
        ("UniPC", "unipc"),
        ("Heun", "heun"),
        ("whatever", "whatever"),
    ],
)
def test_samplers_have_the_names_of_the_field(theirs, ours):
    assert our_name(theirs) == ours
    if ours != "whatever":
        a, b = (tiny_diffusion().sample(n=1, n_steps=3, step=s, seed=0) for s in (theirs, ours))
        assert torch.equal(a, b)


# ---- many classes, few images


def test_pictures_of_a_training_show_a_page_of_the_classes(tmp_path):
    x, y = torch.rand(50, 1, 8, 8) * 2 - 1, torch.arange(50)
    diff, shown = Diffusion(shape=(1, 8, 8), num_classes=50, device="cpu"), []
    log = lambda step, scalars, images, files: shown.append(len(images["ema"]))  # noqa: E731
    diff.fit([(x, y)], total_steps=1, loggers=[log], progress=False, **QUICK)
    assert shown == [20]


def test_passes_of_one_batch_are_not_reported_one_by_one():
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    diff = tiny_diffusion(num_classes=0).fit([x], total_steps=500, **QUIET, **QUICK)
    assert 90 <= len(diff.history) <= 100 and diff.history[-1]["step"] == 500
    few = tiny_diffusion(num_classes=0).fit([x], total_steps=5, **QUIET, **QUICK)
    assert len(few.history) == 5


def test_samples_go_one_by_one_into_a_folder_with_a_manifest(tmp_path):
    x = torch.rand(6, 4, 8, 8) * 2 - 1
    diff = Diffusion(shape=(4, 8, 8), num_classes=2, classes=["cat", "dog"], device="cpu")
    y = torch.tensor([0, 1] * 3)
    diff.fit([(x, y)], total_steps=1, run=tmp_path / "r", progress=False, **QUICK)
    out = f"{tmp_path / 'out'}/"
    few = ["--n", 2, "--steps", 2, "--seed", 5]
    command_line("sample", "--run", tmp_path / "r", *few, "--out", out)
    made = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [s["label"] for s in made["samples"]] == ["cat", "cat", "dog", "dog"]
    assert made["seed"] == 5 and made["steps"] == 2 and made["version"]
    images = [Image.open(tmp_path / "out" / s["file"]) for s in made["samples"]]
    assert all(im.size == (8, 8) and im.mode == "RGBA" for im in images)  # no frame
    want = diff.sample([0, 0, 1, 1], cfg_scale=2.0, n_steps=2, seed=5)
    pixels = torch.tensor(bytearray(images[3].tobytes())).view(8, 8, 4).permute(2, 0, 1)
    assert torch.equal(pixels, diff.space.from_x(want)[3])


def test_runs_are_listed_with_their_numbers(tmp_path):
    for name in ("a", "b"):
        tiny_diffusion().fit(tiny_dls(), epochs=1, run=tmp_path / name, progress=False, **QUICK)
    (tmp_path / "b/evaluation.json").write_text('{"numbers": {"fid": 1.25}}')
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.json").write_text("{")
    said = command_line("runs", tmp_path)
    lines = {line.split()[0].rsplit("/", 1)[-1]: line for line in said.splitlines()[1:]}
    assert set(lines) == {"a", "b", "c"}
    assert " ddpm " in lines["a"] and " 4 " in lines["a"] and lines["b"].endswith("1.25")
    assert "damaged" in lines["c"]
    assert "there is no run" in command_line("runs", tmp_path / "none", code=1)


def test_floats_beyond_one_are_refused_file_by_file(tmp_path):
    fill(tmp_path, {".": 4})
    Image.new("F", (8, 8), 200.0).save(tmp_path / "wide.tif")
    dls, said = quietly(tmp_path, 8)
    assert "floats from 0 to 1 are expected, these reach 200" in said and sum(sizes(dls)) == 4


def test_the_colour_under_what_is_clear_is_nobodys(tmp_path):
    for i, colour in enumerate([(255, 0, 0, 0), (0, 255, 0, 0)]):
        im = Image.new("RGBA", (8, 8), colour)
        im.paste((9, 9, 9, 255), (0, 0, 4, 4))
        im.save(tmp_path / f"{i}.png")
    _, said = quietly(tmp_path, 8, background="keep")
    assert "removed 1 exact duplicates" in said


def test_an_archive_cannot_write_outside(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../evil.png", b"x")
    with pytest.raises(ValueError, match="lies outside"):
        get_dls(tmp_path / "evil.zip", 8)
