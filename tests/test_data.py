"Data sets, folders, broken files, splits and batches: what `get_dls` promises, row by row."

import socket
import time
import warnings
from pathlib import Path

import pytest
import torch
from common import make_folder, picture
from PIL import Image

from ddpm_course.core import to_float, to_uint8
from ddpm_course.data import (
    Batches,
    DataLoaders,
    fit_image,
    get_dls,
    lesson_data,
    shapes_dls,
    split_part,
)
from ddpm_course.files import array_part, load_parts, pixel_keys, read_image
from ddpm_course.shapes import COLOURS, SHAPES, Shapes, captions, draw_shapes, make_scene, render


def saved(tmp_path, im, name="x.png", **kw):
    im.save(tmp_path / name, **kw)
    return tmp_path / name


# ---------------------------------------------------------------- pixels


def test_pixels_round_trip():
    u8 = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(u8)), u8)
    assert to_float(u8)[[0, -1]].tolist() == [-1, 1]


@pytest.mark.parametrize(
    "mode, value, fmt, expected",
    [
        ("1", 1, "png", [255]),
        ("L", 77, "png", [77]),
        ("L", 77, "bmp", [77]),
        ("RGB", (1, 2, 3), "png", [1, 2, 3]),
        ("RGB", (1, 2, 3), "ppm", [1, 2, 3]),
        ("RGB", (1, 2, 3), "tiff", [1, 2, 3]),
        ("RGBA", (255, 0, 0, 0), "png", [255, 255, 255]),
        ("RGBA", (255, 0, 0, 255), "png", [255, 0, 0]),
        ("RGBA", (255, 0, 0, 51), "png", [255, 204, 204]),
        ("LA", (0, 0), "png", [255]),
        ("LA", (0, 51), "png", [204]),
        ("CMYK", (255, 0, 0, 0), "tiff", [0, 255, 255]),
        ("CMYK", (0, 0, 0, 255), "tiff", [0, 0, 0]),
        ("I;16", 65535, "png", [255]),
        ("I;16", 32768, "png", [128]),
        ("I;16", 257, "png", [1]),
        ("I;16", 32768, "tiff", [128]),
        ("F", 1.0, "tiff", [255]),
        ("F", 0.5, "tiff", [128]),
    ],
)
def test_modes(tmp_path, mode, value, fmt, expected):
    path = saved(tmp_path, Image.new(mode, (3, 2), value), f"x.{fmt}")
    assert read_image(path).shape == (len(expected), 2, 3)
    assert read_image(path)[:, 1, 2].tolist() == expected


def test_16_bit_keeps_its_range(tmp_path):
    im = Image.new("I;16", (256, 1))
    for v in range(256):
        im.putpixel((v, 0), v * 257)
    assert read_image(saved(tmp_path, im)).flatten().tolist() == list(range(256))


def test_cmyk_jpeg(tmp_path):
    c = read_image(saved(tmp_path, Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "x.jpg"))[:, 8, 8]
    assert c[0] < 10 and c[1] > 245 and c[2] > 245


def test_palette(tmp_path):
    im = Image.new("P", (2, 1))
    im.putpalette([10, 20, 30, 200, 100, 0])
    im.putpixel((1, 0), 1)
    assert read_image(saved(tmp_path, im)).flatten(1).T.tolist() == [[10, 20, 30], [200, 100, 0]]
    assert read_image(saved(tmp_path, im, "t.png", transparency=0)).flatten(1).T.tolist() == [
        [255] * 3,
        [200, 100, 0],
    ]
    assert read_image(saved(tmp_path, im, "x.gif")).shape == (3, 1, 2)


def test_grey_with_a_transparent_level(tmp_path):
    im = Image.new("L", (2, 1), 7)
    im.putpixel((1, 0), 90)
    assert read_image(saved(tmp_path, im, transparency=7)).tolist() == [[[255, 90]]]


@pytest.mark.parametrize(
    "orientation, expected",
    [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
    ],
)
def test_exif_orientation(tmp_path, orientation, expected):
    im = Image.new("L", (3, 2))
    im.putdata([1, 2, 3, 4, 5, 6])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert read_image(saved(tmp_path, im, exif=exif)).tolist() == [expected]


def test_channels_of_a_folder(tmp_path):
    saved(tmp_path, Image.new("L", (4, 4), 9), "a.png"), saved(
        tmp_path, Image.new("L", (4, 4), 99), "b.png"
    )
    saved(tmp_path, Image.new("I;16", (4, 4), 9999), "c.png")
    assert get_dls(tmp_path, 8).shape == (1, 8, 8) and get_dls(tmp_path, 8, channels=3).shape == (
        3,
        8,
        8,
    )
    saved(tmp_path, Image.new("RGB", (4, 4), (255, 0, 0)), "d.png")
    assert get_dls(tmp_path, 8).shape == (3, 8, 8) and get_dls(tmp_path, 8, channels=1).shape == (
        1,
        8,
        8,
    )


# ---------------------------------------------------------------- framing


@pytest.mark.parametrize("hw", [(60, 180), (180, 60), (61, 97), (20, 20)])
@pytest.mark.parametrize("size", [32, (20, 50), (64, 40), 16])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_never_stretched(hw, size, fit):
    h, w = hw
    r = min(h, w) // 6
    y, x = torch.arange(h)[:, None] - (h - 1) / 2, torch.arange(w) - (w - 1) / 2
    disc = (x**2 + y**2 < r**2).byte()[None, None] * 255
    out = fit_image(disc, size, fit)
    assert out.shape[2:] == ((size, size) if isinstance(size, int) else size)
    mass = out[0, 0].float() / 255
    rows, cols = mass.sum(1), mass.sum(0)

    def spread(v):
        i = torch.arange(len(v))
        m = (i * v).sum() / v.sum()
        return ((i - m) ** 2 * v).sum() / v.sum()

    assert abs(spread(rows).sqrt() - spread(cols).sqrt()) < 0.35
    assert abs(rows.argmax() - (len(rows) - 1) / 2) <= max(2, rows.max() / 2)


def test_padding_continues_the_edge():
    im = torch.zeros(1, 3, 10, 30, dtype=torch.uint8)
    im[:, 0] = 200
    im[:, :, 3:7, 10:20] = 50  # not at the edge
    out = fit_image(im, 30)
    assert out[0, :, 0, 0].tolist() == [200, 0, 0] and torch.equal(out[:, :, 10:20], im)
    assert fit_image(im, 30, fill=7)[0, :, 0, 0].tolist() == [7] * 3
    assert torch.equal(fit_image(im, 10, "crop"), im[:, :, :, 10:20])


def test_padding_takes_the_edges_that_it_touches():
    im = torch.zeros(1, 1, 10, 30, dtype=torch.uint8)
    im[:, :, 0], im[:, :, -1] = 100, 200
    assert fit_image(im, 30)[0, 0, [0, -1], 15].tolist() == [150, 150]
    assert fit_image(im.transpose(2, 3), 30)[0, 0, 15, [0, -1]].tolist() == [150, 150]


def test_extreme_shapes():
    assert fit_image(torch.zeros(1, 1, 1, 500, dtype=torch.uint8), 32).shape == (1, 1, 32, 32)
    assert fit_image(torch.zeros(1, 3, 500, 1, dtype=torch.uint8), 1, "crop").shape == (1, 3, 1, 1)


# ---------------------------------------------------------------- named sets


def test_digits():
    d = get_dls("digits", 32, batch_size=50)
    assert (
        d.shape == (1, 32, 32)
        and d.num_classes == 10
        and d.classes == list("0123456789")
        and not d.train.flip
    )
    assert sum(len(b.labels) for b in (d.train, d.valid, d.test)) == 1797
    for b in (d.valid, d.test):
        assert b.labels.bincount(minlength=10).min() >= 17  # stratified
    keys = [{*pixel_keys(b.images)} for b in (d.train, d.valid, d.test)]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    x, y = next(iter(d.train))
    assert x.dtype == torch.float32 and x.shape == (50, 1, 32, 32) and y.dtype == torch.int64
    assert x.min() == -1 and x.max() == 1 and d.train.images.dtype == torch.uint8


def test_digits_split_does_not_depend_on_the_size_and_depends_on_the_seed():
    a, b, c = get_dls("digits", 8), get_dls("digits", 16), get_dls("digits", 8, seed=1)
    assert torch.equal(a.test.labels, b.test.labels) and not torch.equal(
        a.test.images, c.test.images
    )
    assert torch.equal(fit_image(a.test.images, 16, fill=0), b.test.images)


def fake_mnist(monkeypatch, n=60):
    from torchvision import datasets

    class Fake:
        classes = [f"{i} - name" for i in range(10)]

        def __init__(self, root, train=True, download=False):
            g = torch.Generator().manual_seed(int(train))
            self.data = torch.randint(
                256, (n if train else 20, 28, 28), generator=g, dtype=torch.uint8
            )
            self.targets = torch.arange(n if train else 20) % 10

    for kind in ("MNIST", "FashionMNIST"):
        monkeypatch.setattr(datasets, kind, Fake)


def test_mnist_is_padded_with_background_and_keeps_its_test_part(monkeypatch):
    fake_mnist(monkeypatch)
    d = get_dls("mnist", 32)
    assert (
        d.shape == (1, 32, 32)
        and len(d.test.labels) == 20
        and len(d.train.labels) + len(d.valid.labels) == 60
    )
    rim = d.train.images.clone()
    rim[:, :, 2:30, 2:30] = 0
    assert rim.sum() == 0 and not d.train.flip
    assert get_dls("mnist", 28).shape == (1, 28, 28) and get_dls("mnist", (14, 20)).shape == (
        1,
        14,
        20,
    )
    assert get_dls("mnist", 64, channels=3).shape == (3, 64, 64)
    assert d.classes == list("0123456789")


def test_training_images_that_are_in_the_test_part_are_removed(monkeypatch):
    from torchvision import datasets

    fake_mnist(monkeypatch)
    base = datasets.MNIST

    class Leaky(base):
        def __init__(self, root, train=True, download=False):
            super().__init__(root, train)
            if train:
                self.data[:5] = base(root, train=False).data[:5]

    monkeypatch.setattr(datasets, "MNIST", Leaky)
    with pytest.warns(UserWarning, match="removed 5 exact duplicates"):
        d = get_dls("mnist", 28)
    assert len(d.train.labels) + len(d.valid.labels) == 55 and len(d.test.labels) == 20
    assert len(d.dropped) == 5


def test_cifar10_is_mirrored_and_resized(monkeypatch):
    from torchvision import datasets

    class Fake:
        classes = list("abcdefghij")

        def __init__(self, root, train=True, download=False):
            self.data = torch.randint(
                256,
                (40, 32, 32, 3),
                generator=torch.Generator().manual_seed(int(train)),
                dtype=torch.uint8,
            ).numpy()
            self.targets = [i % 10 for i in range(40)]

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    d = get_dls("cifar10", 40)
    assert d.train.flip and not d.valid.flip and not d.test.flip and d.shape == (3, 40, 40)
    assert d.train.images[:, :, 0].float().std() > 20  # resized, not padded
    assert not get_dls("cifar10", 32, flip=False).train.flip and get_dls(
        "cifar10", 32, channels=1
    ).shape == (1, 32, 32)
    one = get_dls("cifar10", 32).test
    assert torch.equal(one.images, torch.from_numpy(Fake("", train=False).data).permute(0, 3, 1, 2))


# ---------------------------------------------------------------- folders


def names(d):
    return [len(b.labels) for b in (d.train, d.valid, d.test)]


def test_folder_with_classes(tmp_path):
    d = get_dls(make_folder(tmp_path, {"cat": 60, "dog": 60}), 16)
    assert (
        d.classes == ["cat", "dog"]
        and d.num_classes == 2
        and d.shape == (3, 16, 16)
        and sum(names(d)) == 120
        and not d.train.flip
    )
    for b in (d.train, d.valid, d.test):
        assert b.labels.unique().tolist() == [0, 1]
    assert 80 <= names(d)[0] <= 110
    assert d.name == tmp_path.name and get_dls(str(tmp_path), 16).shape == d.shape


def test_folder_without_classes(tmp_path):
    d = get_dls(make_folder(tmp_path, {".": 30}), 16, batch_size=7)
    assert d.num_classes == 0 and d.classes == [] and sum(names(d)) == 30
    for _, y in d.train:
        assert y.dtype == torch.int64 and y.eq(0).all()


def test_split_folders(tmp_path):
    d = get_dls(make_folder(tmp_path, {"train/a": 20, "train/b": 20, "test/a": 5, "test/b": 4}), 16)
    assert names(d) == [36, 4, 9] or sum(names(d)[:2]) == 40 and names(d)[2] == 9
    d = get_dls(make_folder(tmp_path / "x", {"train": 12, "valid": 3, "test": 2}), 16)
    assert names(d) == [12, 3, 2] and d.num_classes == 0
    d = get_dls(make_folder(tmp_path / "y", {"train/a": 30, "val/a": 3}), 16)
    assert names(d)[1] == 3 and names(d)[2] >= 1 and names(d)[0] + names(d)[2] == 30
    d = get_dls(make_folder(tmp_path / "z", {"train": 12, "bus": 12}), 16)  # vehicles
    assert d.classes == ["bus", "train"]


def test_a_file_that_is_added_moves_no_other(tmp_path):
    make_folder(tmp_path, {"a": 80, "b": 80})

    def where():
        parts, _, _ = load_parts(tmp_path, lambda u8: fit_image(u8, 8))
        parts = split_part(parts["all"], dict(valid=0.1, test=0.1), stable=True)
        return {name: split for split, p in parts.items() for name in p.names}

    before = where()
    for i in range(20):
        picture(9000 + i).save(tmp_path / f"a/new{i}.png")
    (tmp_path / "b/001.png").rename(tmp_path / "b/zzz.png")
    after = where()
    assert len(after) == 180 and all(after[n] == s for n, s in before.items() if n in after)
    # by content, not by name
    assert after[str(tmp_path / "b/zzz.png")] == before[str(tmp_path / "b/001.png")]


def test_folder_split_does_not_depend_on_the_size(tmp_path):
    make_folder(tmp_path, {"a": 40})
    a, b = get_dls(tmp_path, 24), get_dls(tmp_path, 12)
    assert torch.equal(fit_image(a.test.images, 12), b.test.images)


def test_duplicates_are_removed_and_counted(tmp_path):
    make_folder(tmp_path, {"a": 20, "b": 20})
    for i in range(5):
        (tmp_path / f"a/copy{i}.png").write_bytes((tmp_path / f"a/{i:03}.png").read_bytes())
    Image.open(tmp_path / "b/000.png").save(tmp_path / "b/same_pixels.bmp")
    with pytest.warns(UserWarning, match="removed 6 exact duplicates from 46"):
        d = get_dls(tmp_path, 24)
    assert sum(names(d)) == 40 and len(d.dropped) == 6
    images = torch.cat([b.images for b in (d.train, d.valid, d.test)])
    assert len({*pixel_keys(images)}) == 40


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_tiny_folders(tmp_path, n):
    make_folder(tmp_path, {"a": n})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        d = get_dls(tmp_path, 8)
    assert bool(said) == (n < 3) and all(k >= 1 for k in names(d)) and len(list(d.train)) == 1


def test_many_classes_of_one_image(tmp_path):
    with pytest.warns(UserWarning, match="no class of these 10 images can spare one"):
        d = get_dls(make_folder(tmp_path, {f"c{i}": 1 for i in range(10)}), 8)
    assert names(d) == [10, 10, 10] and d.num_classes == 10
    assert d.train.labels.unique().tolist() == list(range(10))  # none is only held out


def test_hidden_files_and_other_files_are_passed_over(tmp_path):
    make_folder(tmp_path, {"a": 3, ".hidden": 2, "__MACOSX": 1})
    (tmp_path / "a/._000.png").write_bytes(b"mac")
    (tmp_path / "a/notes.txt").write_text("hi")
    picture(77).save(tmp_path / "a/BIG.JPG", "JPEG")
    d = get_dls(tmp_path, 8)
    assert sum(names(d)) == 4 and d.classes == ["a"] and not d.dropped


def test_duplicates_between_given_splits(tmp_path):
    make_folder(tmp_path, {"train": 10, "valid": 5, "test": 4})
    first = (tmp_path / "test/000.png").read_bytes()
    (tmp_path / "valid/leak.png").write_bytes(first)
    (tmp_path / "train/leak.png").write_bytes(first)
    (tmp_path / "train/leak2.png").write_bytes((tmp_path / "valid/001.png").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d = get_dls(tmp_path, 24)
    assert (
        names(d) == [10, 5, 4]
        and {Path(p).name for p in d.dropped} == {"leak.png", "leak2.png"}
        and len(d.dropped) == 3
    )


def test_no_validation_part_if_none_is_wanted():
    d = get_dls("digits", 8, valid=0)
    assert (
        len(d.valid.labels) == 0
        and list(d.valid) == []
        and len(d.train.labels) + len(d.test.labels) == 1797
    )


def test_images_beside_classes_are_named(tmp_path):
    make_folder(tmp_path, {"a": 3, ".": 2})
    with pytest.warns(UserWarning, match="ignored 2 images"):
        get_dls(tmp_path, 8)


def test_more_images_beside_the_folders_than_in_them_are_no_classes(tmp_path):
    make_folder(tmp_path, {"more": 2, ".": 9})
    with pytest.warns(UserWarning, match="no classes: 9 images lie in .* and 2 in .*more"):
        d = get_dls(tmp_path, 8)
    assert d.num_classes == 0 and sum(len(b.labels) for b in (d.train, d.valid, d.test)) == 11


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("stable", [True, False])
def test_never_more_is_held_out_than_was_asked_for(stable, seed):
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(20, 130, (), generator=g))
    pixels = torch.randint(0, 256, (n, 1, 4, 4), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 1 + seed % 5, (n,), generator=g)
    part = array_part(pixels, labels, lambda u8: u8)
    found = split_part(part, dict(valid=0.1, test=0.2), seed, stable)
    sizes = labels.bincount()
    for name, share in dict(valid=0.1, test=0.2).items():
        held = found[name].labels.bincount(minlength=len(sizes))
        owed = sizes * share
        exact = owed < 5 if stable else owed > 0  # larger ones keep it on average
        assert (held <= owed.ceil())[exact].all() and len(found[name].names) >= 1
        if exact.all():
            assert len(found[name].names) <= max(share * n + 0.5 * len(sizes), 1)


# ---------------------------------------------------------------- errors


def message(exc, f, *args, **kw):
    with pytest.raises(exc) as e:
        f(*args, **kw)
    text = str(e.value)
    assert "\n" not in text and len(text) < 600
    return text


def test_unknown_name():
    text = message(ValueError, get_dls, "minst")
    assert "Did you mean 'mnist'" in text and all(
        n in text for n in ("shapes", "digits", "cifar10", "fashion_mnist")
    )


def test_folder_missing_or_no_folder(tmp_path):
    for p in (tmp_path / "no", str(tmp_path / "no"), "./no/such", "~/no/such/folder"):
        text = message(FileNotFoundError, get_dls, p)
        assert Path(p).name in text and ".jpg" in text
    (tmp_path / "file.txt").touch()
    assert "is a file" in message(NotADirectoryError, get_dls, tmp_path / "file.txt")
    (tmp_path / "file.zip").touch()
    assert "no zip or tar archive" in message(ValueError, get_dls, tmp_path / "file.zip")


def test_folder_empty(tmp_path):
    text = message(FileNotFoundError, get_dls, tmp_path)
    assert str(tmp_path) in text and all(e in text for e in (".jpg", ".png", ".webp"))
    (tmp_path / "a.txt").touch()
    assert str(tmp_path) in message(FileNotFoundError, get_dls, tmp_path)


def test_subfolder_without_images(tmp_path):
    make_folder(tmp_path, {"a": 3, "b": 0})
    text = message(FileNotFoundError, get_dls, tmp_path)
    assert str(tmp_path / "b") in text and ".png" in text
    make_folder(tmp_path / "s", {"train": 3, "test": 0})
    assert str(tmp_path / "s/test") in message(FileNotFoundError, get_dls, tmp_path / "s")


def test_classes_that_do_not_match(tmp_path):
    make_folder(tmp_path, {"train/a": 4, "test/c": 2})
    assert "train has not: c" in message(ValueError, get_dls, tmp_path)
    make_folder(tmp_path / "s", {"train/a": 4, "test": 2})
    assert "no class folders" in message(ValueError, get_dls, tmp_path / "s")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
def test_broken_files(tmp_path, suffix):
    make_folder(tmp_path, {"a": 6})
    noise = Image.fromarray(torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy())
    noise.save(tmp_path / f"a/cut.{suffix}")
    data = (tmp_path / f"a/cut.{suffix}").read_bytes()
    (tmp_path / f"a/cut.{suffix}").write_bytes(data[: len(data) // 2])
    (tmp_path / f"a/empty.{suffix}").touch()
    (tmp_path / f"a/text.{suffix}").write_text("not an image at all")
    with pytest.warns(UserWarning, match="skipped 3 of 9") as said:
        d = get_dls(tmp_path, 8)
    text = str(said[0].message)
    assert all(f"{n}.{suffix}" in text for n in ("cut", "empty", "text")) and "\n" not in text
    assert sum(names(d)) == 6 and {Path(p).stem for p in d.dropped} == {"cut", "empty", "text"}
    assert "stopped at 3 of 9" in message(ValueError, get_dls, tmp_path, 8, on_bad="error")


def test_nothing_readable(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "x.png" in message(ValueError, get_dls, tmp_path)
        make_folder(tmp_path, {"b": 3})
        assert "class a" in message(ValueError, get_dls, tmp_path)


@pytest.mark.parametrize(
    "kw, word",
    [
        (dict(img_size=0), "img_size"),
        (dict(img_size=-3), "img_size"),
        (dict(img_size=2.5), "img_size"),
        (dict(img_size=(3,)), "img_size"),
        (dict(batch_size=0), "batch_size"),
        (dict(batch_size=1.5), "batch_size"),
        (dict(fit="stretch"), "fit"),
        (dict(on_bad="wran"), "warn"),
        (dict(channels=2), "channels"),
        (dict(valid=1), "valid"),
        (dict(sizes=(1, 2)), "sizes"),
        (dict(sizes=(1, 2, 0)), "sizes"),
    ],
)
@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_options_without_sense(kw, word, name):
    assert word in message(ValueError, get_dls, name, **kw)


def test_shapes_refuse_what_would_be_a_lie():
    assert "left and right" in message(ValueError, get_dls, "shapes", flip=True)
    assert "colour" in message(ValueError, get_dls, "shapes", channels=1)


def test_labels_are_checked():
    x = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    assert Batches(x, [0, 1, 2]).labels.dtype == torch.int64 and Batches(x).labels.tolist() == [
        0,
        0,
        0,
    ]
    for bad in (
        [0, 1],
        [[0], [1], [2]],
        [0.0, 1.0, 2.0],
        [-1, 0, 1],
        torch.tensor([True, False, True]),
    ):
        message(ValueError, Batches, x, bad)
    ok = Batches(x, [0, 1, 2])
    assert DataLoaders(ok, ok, ok, 3, (1, 4, 4), list("abc")).num_classes == 3
    assert "0 to 1" in message(ValueError, DataLoaders, ok, ok, ok, 2, (1, 4, 4), list("ab"))
    assert "(1, 4, 4)" in message(ValueError, DataLoaders, ok, ok, ok, 3, (3, 4, 4), list("abc"))
    for bad in (x.float(), x[0], x.long()):
        message(ValueError, Batches, bad, [0, 1, 2])
    for bad in (0, -1, 2.0, True):
        message(ValueError, Batches, x, [0, 1, 2], batch_size=bad)
    message(ValueError, ok.epoch, 0, -1)


# ---------------------------------------------------------------- no network


def no_network(monkeypatch):
    def refuse(*args, **kw):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    "name, files",
    [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("cifar10", "cifar-10-batches-py")],
)
def test_no_network(monkeypatch, tmp_path, name, files):
    no_network(monkeypatch)
    start = time.time()
    for kw in (dict(), dict(download=False)):
        text = message(FileNotFoundError, get_dls, name, root=tmp_path, **kw)
        assert (
            str(tmp_path / files) in text
            and "'digits'" in text
            and "'shapes'" in text
            and repr(name) in text
        )
    assert time.time() - start < 20 and socket.getdefaulttimeout() is None


def test_a_silent_server_does_not_hang(monkeypatch, tmp_path):
    from torchvision import datasets

    class Silent:
        def __init__(self, root, train, download):
            assert socket.getdefaulttimeout() is not None and socket.getdefaulttimeout() <= 60
            raise TimeoutError("timed out") if download else RuntimeError("Dataset not found")

    monkeypatch.setattr(datasets, "MNIST", Silent)
    assert "timed out" in message(FileNotFoundError, get_dls, "mnist", root=tmp_path)


def test_damaged_files(tmp_path, monkeypatch):
    no_network(monkeypatch)
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for n in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{n}-ubyte").write_bytes(b"\0\0\x08\x03")
    assert str(raw) in message(FileNotFoundError, get_dls, "mnist", root=tmp_path)


def test_where_data_is_looked_for(tmp_path, monkeypatch):
    no_network(monkeypatch)
    monkeypatch.setenv("DDPM_COURSE_DATA", str(tmp_path / "env"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert str(tmp_path / "env") in message(FileNotFoundError, get_dls, "mnist", download=False)
    assert str(tmp_path / "arg") in message(
        FileNotFoundError, get_dls, "mnist", download=False, root=tmp_path / "arg"
    )
    monkeypatch.delenv("DDPM_COURSE_DATA")
    assert str(tmp_path / "cache/ddpm_course") in message(
        FileNotFoundError, get_dls, "mnist", download=False
    )


def test_lesson_data(tmp_path, monkeypatch, capsys):
    no_network(monkeypatch)
    monkeypatch.setenv("DDPM_COURSE_DATA", str(tmp_path))
    monkeypatch.setenv("DDPM_COURSE_TIER", "cpu")
    assert (
        lesson_data("mnist", img_size=16).name == "digits" and "digits" in capsys.readouterr().out
    )
    fake_mnist(monkeypatch)
    assert lesson_data("mnist", img_size=16).name == "mnist"
    monkeypatch.setenv("DDPM_COURSE_TIER", "ci")
    assert lesson_data("mnist", img_size=16).name == "digits"
    assert lesson_data("mnist", "shapes", sizes=(10, 5, 5)).name == "shapes"


# ---------------------------------------------------------------- batches


def pixels(n, seed=0):
    return torch.randint(
        256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


@pytest.mark.parametrize("n, size", [(10, 3), (10, 5), (10, 10), (10, 64), (1, 1)])
def test_each_image_once_an_epoch(n, size):
    x = pixels(n)
    b = Batches(x, list(range(n)), size, shuffle=True)
    for _ in range(2):
        got = list(b)
        assert len(got) == len(b) and sorted(torch.cat([y for _, y in got]).tolist()) == list(
            range(n)
        )
        for im, y in got:
            assert torch.equal(im, to_float(x[y]))
    assert [y.tolist() for _, y in Batches(x, list(range(n)), size)] == [
        list(range(n))[k : k + size] for k in range(0, n, size)
    ]


def test_orders_differ_and_repeat():
    b = Batches(pixels(50), list(range(50)), 50, shuffle=True)
    first, second = (next(iter(b))[1].tolist() for _ in range(2))
    assert first != second and [next(b.epoch(e))[1].tolist() for e in (0, 1)] == [first, second]
    assert (
        next(Batches(pixels(50), list(range(50)), 50, shuffle=True, seed=1).epoch(0))[1].tolist()
        != first
    )


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_resume_bit_for_bit(start):
    def fresh():
        return Batches(pixels(37), list(range(37)), 10, shuffle=True, flip=True, seed=3)

    whole = list(fresh().epoch(5))
    b = fresh()
    list(b), torch.manual_seed(99), next(b.epoch(2))
    rest = list(b.epoch(5, start))
    assert len(rest) == 4 - start
    for (x, y), (u, v) in zip(whole[start:], rest):
        assert torch.equal(x, u) and torch.equal(y, v)
    state = torch.get_rng_state()
    list(b)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_flips_half_of_the_training_images():
    x = pixels(400)
    got = torch.cat([im for im, _ in Batches(x, None, 64, flip=True).epoch(0)])
    plain = (got == to_float(x)).flatten(1).all(1)
    assert 0.4 < plain.float().mean() < 0.6 and torch.equal(
        got[~plain], to_float(x[~plain]).flip(-1)
    )


def test_to_device_keeps_bytes():
    d = get_dls("digits", 8).to("cpu")
    assert d.train.images.dtype == torch.uint8 and d.to(torch.device("cpu")) is d
    s = get_dls("shapes", 8, sizes=(20, 5, 5)).to("cpu")
    drawn = next(s.train.epoch(0))[0]
    assert s.train.images.shape == (20, 3, 8, 8) and torch.equal(next(s.train.epoch(0))[0], drawn)
    if torch.cuda.is_available():
        for d in (get_dls("digits", 8, flip=True), get_dls("shapes", 8, sizes=(200, 5, 5))):
            here = list(d.train.epoch(1))
            for (x, y), (u, v) in zip(here, d.to("cuda").train.epoch(1)):
                assert (
                    u.is_cuda
                    and v.is_cuda
                    and torch.equal(y, v.cpu())
                    and (x - u.cpu()).abs().max() < 0.01
                )


def test_sizes_cap_the_parts():
    d = get_dls("digits", 8, sizes=(100, 20, 5000))
    assert names(d) == [100, 20, 179] or names(d)[:2] == [100, 20]
    assert len(d.train.labels.unique()) == 10


# ---------------------------------------------------------------- shapes


def test_shapes_do_not_depend_on_the_batch():
    i = torch.randperm(500)
    whole = draw_shapes(torch.arange(500))[0]
    assert torch.equal(draw_shapes(i)[0], whole[i]) and torch.equal(
        draw_shapes(i[:1])[0], whole[i[:1]]
    )
    ds = Shapes(500)
    assert torch.equal(
        torch.cat([ds.get(torch.arange(k, min(k + 7, 500))) for k in range(0, 500, 7)]), whole
    )


def test_shapes_splits_are_disjoint_and_seeded():
    d = shapes_dls(16, sizes=(300, 100, 100))
    keys = [{*pixel_keys(b.images)} for b in (d.train, d.valid, d.test)]
    assert (
        len(set.union(*keys)) == 500 and d.num_classes == len(SHAPES) and d.classes == list(SHAPES)
    )
    assert not torch.equal(shapes_dls(16, seed=1, sizes=(3, 1, 1)).train.images, d.train.images[:3])
    assert names(get_dls("shapes")) == [50_000, 2_000, 5_000]


def test_captions_say_what_is_there():
    scene = make_scene(torch.arange(3000))
    x = render(scene, 64)
    for i, text in enumerate(captions(scene)[:300]):
        words = text.split()
        assert (
            words[3] == SHAPES[scene["shape"][i, 0]]
            and words[0] == "a"
            and words[1] in ("small", "large")
            and words[2] in COLOURS
        )
        seen = {
            n
            for n, c in COLOURS.items()
            if (x[i] == torch.tensor(c).view(3, 1, 1)).all(0).sum() > 8
        }
        assert seen == {w for w in words if w in COLOURS}, text
        if not scene["present"][i, 1]:
            continue
        where = []
        for o in (0, 1):
            mine = (
                (x[i] == torch.tensor(list(COLOURS.values())[scene["colour"][i, o]]).view(3, 1, 1))
                .all(0)
                .nonzero()
                .float()
            )
            where.append(mine.mean(0))
        if len(seen) == 2:
            dy, dx = (where[1] - where[0]).tolist()
            true = (
                ("left of" if dx > 0 else "right of")
                if abs(dx) > abs(dy)
                else ("above" if dy > 0 else "below")
            )
            assert true in text
    assert len({*captions(scene)}) > 1000


@pytest.mark.parametrize("size", [1, 8, 32, (48, 20), (20, 48), 128])
def test_shapes_of_any_size(size):
    x = draw_shapes(torch.arange(20), size)[0]
    assert x.dtype == torch.uint8 and x.shape[2:] == (
        (size, size) if isinstance(size, int) else size
    )
    assert x.float().std() > 1


def test_large_and_small_drawings_agree():
    big, small = (
        draw_shapes(torch.arange(50), 128)[0].float(),
        draw_shapes(torch.arange(50), 32)[0].float(),
    )
    down = torch.nn.functional.avg_pool2d(big, 4)
    assert (down - small).abs().mean() < 1 and (down - small).abs().max() < 100


def test_shapes_are_fast():
    torch.set_num_threads(max(1, min(2, torch.get_num_threads())))
    ds = Shapes(4096)
    ds.get(torch.arange(1024))
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        ds.get(torch.arange(4096))
        best = max(best, 4096 / (time.perf_counter() - start))
    # 20,000 and more on a machine with nothing else to do
    assert best > 4000, f"{best:.0f} images/s"


def test_import_is_light():
    import subprocess
    import sys

    code = (
        "import sys, ddpm_course.data; print([m for m in ('torchvision', 'PIL', 'sklearn', 'tqdm',"
        " 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    new = eval(out)
    base = eval(
        subprocess.run(
            [sys.executable, "-c", code.replace("ddpm_course.data", "torch")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert set(new) <= set(base), new


def test_array_part_hashes_before_it_resizes():
    x = pixels(4)
    p = array_part(x, [0, 1, 2, 3], lambda u8: u8[:, :, :1, :1])
    assert len({*p.keys}) == 4 and p.images.shape == (4, 1, 1, 1) and p.keys == pixel_keys(x)
