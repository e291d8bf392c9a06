"""Any loader in real trainings: lists, DataLoaders, streams, generators, dicts; going on is exact,
or it is refused with a sentence."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import QUICK, same_weights, tiny_diffusion
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ddpm_course.batches import Feed, Loader, unpack
from ddpm_course.cond import Captions, Labels
from ddpm_course.process import DDPM
from ddpm_course.space import Images
from ddpm_course.training import Diffusion

N, B = 40, 8  # examples, and how many of them in a batch
X = torch.linspace(-1, 1, N)[:, None, None, None] * torch.ones(1, 8, 8)
Y = torch.arange(N) % 3
PAIRS = TensorDataset(X, Y)
QUIET = dict(loggers=[], progress=False)


def pairs(n=N, size=B):
    return [(X[k : k + size], Y[k : k + size]) for k in range(0, n, size)]


def recorded(diff, stop=None):
    "A model that writes down which examples it sees, and fails after a step."
    diff.saw, real = [], diff.train_step

    def step(x, *rest):
        diff.saw.append(((x[:, 0, 0, 0] + 1) / 2 * (N - 1)).round().int().tolist())
        losses = real(x, *rest)
        if diff.step == stop:
            diff.save_model()
            raise ConnectionError
        return losses

    diff.train_step = step
    return diff


def fit(data, stop=None, diff=None, **kw):
    diff = recorded(diff or tiny_diffusion(), stop)
    kw = kw if kw.get("resume") else QUICK | kw
    return diff.fit(data, **QUIET, **kw)


def goes_on(make, tmp_path, stop=8, diff=tiny_diffusion, **length):
    "Interrupted in the middle of the second pass: weights and examples of an uninterrupted run."
    length = length or dict(total_steps=13)
    whole = fit(make(), diff=diff(), **length)
    first = recorded(diff(), stop)
    with pytest.raises(ConnectionError):
        first.fit(make(), run=tmp_path / "r", **length, **QUIET, **QUICK)
    second = fit(make(), diff=diff(), run=tmp_path / "r", resume=True)
    assert first.saw + second.saw == whole.saw
    assert second.step == whole.step and same_weights(second, whole)
    return whole


def refused(make, tmp_path, name, **length):
    length = length or dict(total_steps=12)
    first = recorded(tiny_diffusion(), 7)
    with pytest.raises(ConnectionError):
        first.fit(make(), run=tmp_path / "r", **length, **QUIET, **QUICK)
    with pytest.raises(ValueError) as e:
        fit(make(), run=tmp_path / "r", resume=True)
    for words in ("cannot go on", name, "neither epoch(e, start) nor state_dict", "Loader("):
        assert words in str(e.value)
    assert "\n" not in str(e.value)


class Rows(IterableDataset):
    "Examples one after the other; nobody knows how many."

    def __init__(self, as_dict=False, n=N):
        self.as_dict, self.n = as_dict, n

    def __iter__(self):
        for x, y in zip(X[: self.n], Y[: self.n].tolist()):
            yield dict(image=x, label=y) if self.as_dict else (x, y)


def test_shuffled_dataloader_trains_and_does_not_go_on(tmp_path):
    def make():
        g = torch.Generator().manual_seed(0)
        train = DataLoader(PAIRS, B, shuffle=True, generator=g)
        return SimpleNamespace(train=train, valid=DataLoader(PAIRS, B))

    diff = fit(make(), epochs=2)
    assert diff.step == 10 and "valid_loss" in diff.history[-1]
    for one in (diff.saw[:5], diff.saw[5:]):
        assert sorted(sum(one, [])) == list(range(N)), "each once a pass"
    refused(make, tmp_path, "DataLoader")


def test_bare_dataloader_trains_and_does_not_go_on(tmp_path):
    diff = fit(DataLoader(PAIRS, B), epochs=2)
    assert diff.saw == 2 * [list(range(k, k + B)) for k in range(0, N, B)]
    assert "valid_loss" not in diff.history[-1]
    refused(lambda: DataLoader(PAIRS, B), tmp_path, "DataLoader")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers(workers):
    assert same_weights(
        fit(DataLoader(PAIRS, B, num_workers=workers), epochs=1), fit(pairs(), epochs=1)
    )


def test_feed_starts_no_workers_and_uses_no_random_numbers_before_they_are_needed():
    loader = DataLoader(PAIRS, B, shuffle=True, num_workers=1)
    state = torch.get_rng_state()
    Feed(loader, Images((1, 8, 8)), Labels(3))
    assert torch.equal(state, torch.get_rng_state())


def test_iterable_dataset_needs_a_length_of_its_own(tmp_path):
    def make():
        return DataLoader(Rows(), B)

    with pytest.raises(ValueError, match="nobody knows how many batches.*minutes or total_steps"):
        fit(make(), epochs=1)
    assert same_weights(fit(make(), total_steps=9), fit(pairs(), total_steps=9))
    refused(make, tmp_path, "DataLoader")


def test_a_stream_to_validate_on():
    data = SimpleNamespace(train=pairs(), valid=DataLoader(Rows(), B))
    listed = SimpleNamespace(train=pairs(), valid=pairs())
    a, b = fit(data, epochs=2), fit(listed, epochs=2)
    assert [h["valid_loss"] for h in a.history] == [h["valid_loss"] for h in b.history]
    with pytest.raises(ValueError, match="can be read only once"):
        fit(SimpleNamespace(train=pairs(), valid=iter(pairs())), epochs=1)


def test_batches_that_are_dicts():
    whole = fit(pairs(), total_steps=9)
    assert same_weights(fit(DataLoader(Rows(as_dict=True), B), total_steps=9), whole)
    for names in (("image", "label"), ("pixel_values", "labels"), ("x", "y")):
        named = [dict(zip(names, batch)) for batch in pairs()]
        assert same_weights(fit(named, total_steps=9), whole), names
    numbers = [dict(image=x.numpy(), label=y.tolist()) for x, y in pairs()]
    assert same_weights(fit(numbers, total_steps=9), whole)
    with pytest.raises(ValueError, match="holds x as one of x, image.*this one has picture, label"):
        fit([dict(picture=X, label=Y)], total_steps=1)


def test_generators(tmp_path):
    whole = fit(pairs(), total_steps=4)
    assert same_weights(fit((b for b in pairs()), total_steps=4), whole)

    def endless():
        while True:
            yield from pairs()

    assert same_weights(fit(endless(), total_steps=9), fit(pairs(), total_steps=9))
    with pytest.raises(ValueError) as e:
        fit((b for b in pairs()), total_steps=9)
    assert "the data ended at step 5" in str(e.value) and "only once" in str(e.value)
    with pytest.raises(ValueError, match="training data is empty"):
        fit(iter([]), total_steps=1)
    refused(endless, tmp_path, "generator")


def test_a_run_is_kept_of_data_without_a_length(tmp_path):
    diff = fit((b for b in pairs()), total_steps=4, run=tmp_path / "r")
    assert same_weights(Diffusion.load(tmp_path / "r", device="cpu"), diff)


def test_bytes_float64_and_numpy():
    u8 = ((X + 1) * 127.5).round().to(torch.uint8)
    floats = u8.float() / 127.5 - 1
    whole = fit([(floats, Y)], total_steps=3)
    for x in (u8, u8.numpy(), floats.double(), floats.numpy().astype(np.float64), floats.numpy()):
        assert same_weights(fit([(x, Y.numpy())], total_steps=3), whole), getattr(x, "dtype", 0)
    for x in (u8.long(), u8 > 3):
        with pytest.raises(ValueError, match="images are floats, or bytes"):
            fit([(x, Y)], total_steps=1)
    with pytest.raises(ValueError, match="a batch holds tensors, arrays or sentences"):
        fit([([object()], Y)], total_steps=1)


def test_captions_as_lists_of_sentences():
    from ddpm_course.unet import UNet_conditional

    words = [f"a {('red', 'green', 'blue')[k]} thing" for k in Y.tolist()]

    class Told(nn.Module):
        "Hears the words by their mean, which is enough to see that they arrive."

        def __init__(self):
            super().__init__()
            self.net = UNet_conditional(1, 1, time_dim=16, widths=(8, 8), attention=())
            self.say, self.heard = nn.Embedding(9, 64), []

        def forward(self, x, t, cond=None):
            self.heard.append(cond["tokens"].tolist())
            told = (self.say(cond["tokens"]) * cond["mask"][..., None]).mean(1)
            return self.net(x + told.view(-1, 1, 8, 8), t)

    def train(data):
        torch.manual_seed(0)
        cond = Captions.fit(words)
        diff = Diffusion(Told(), shape=(1, 8, 8), cond=cond, device="cpu")
        diff.fit(data, total_steps=3, **QUIET, **QUICK)
        assert any(any(row) for rows in diff.model.net.heard for row in rows), "nothing was said"
        return diff

    split = [slice(k, k + B) for k in range(0, N, B)]
    whole = train([(X[s], words[s]) for s in split])
    assert same_weights(train([(X[s], tuple(words[s])) for s in split]), whole)
    assert same_weights(train([dict(image=X[s], text=words[s]) for s in split]), whole)
    rows = [(x, w) for x, w in zip(X, words)]
    assert same_weights(train(DataLoader(rows, B)), whole)
    with pytest.raises(ValueError, match="unknown word 'purple'"):
        train([(X[:2], ["a purple thing"] * 2)])
    with pytest.raises(ValueError, match="the data bring a condition"):
        Diffusion(Told(), shape=(1, 8, 8), device="cpu").fit(
            [(X[:2], words[:2])], total_steps=1, **QUIET, **QUICK
        )


def test_lists_go_on(tmp_path):
    goes_on(pairs, tmp_path)


@pytest.mark.parametrize("kw", [dict(), dict(num_workers=2), dict(shuffle=False)])
def test_loader_goes_on(tmp_path, kw):
    whole = goes_on(lambda: Loader(PAIRS, B, seed=3, **kw), tmp_path)
    assert sorted(sum(whole.saw[:5], [])) == list(range(N)) == sorted(sum(whole.saw[5:10], []))
    assert (whole.saw[:5] == whole.saw[5:10]) == (kw == dict(shuffle=False))


class Noisy(Dataset):
    "Changed at random whenever it is read, as augmented images are."

    def __len__(self):
        return N

    def __getitem__(self, i):
        x = X[i].clone()
        x[:, 1:] += 0.1 * torch.randn(1, 7, 8)
        return x, Y[i]


def dropping():
    diff = tiny_diffusion()
    net = diff.model.net
    net.drop, real = nn.Dropout(0.5), net.forward
    net.forward = lambda x, *rest: real(net.drop(x), *rest)
    return diff


@pytest.mark.parametrize("stop", [5, 8])  # between two passes, and inside of one
def test_loader_goes_on_with_dropout_and_random_images(tmp_path, stop):
    torch.manual_seed(0)
    make = lambda: Loader(Noisy(), B)  # noqa: E731
    whole = recorded(dropping())
    torch.manual_seed(0)
    whole.fit(make(), total_steps=13, **QUIET, **QUICK)
    first = recorded(dropping(), stop)
    torch.manual_seed(0)
    with pytest.raises(ConnectionError):
        first.fit(make(), total_steps=13, run=tmp_path / "r", **QUIET, **QUICK)
    torch.manual_seed(1)
    second = dropping().fit(make(), run=tmp_path / "r", resume=True, **QUIET)
    assert same_weights(second, whole)


class Counting:
    "Keeps its place itself, as torchdata's loaders do."

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < N // B:
            self.at += 1
            yield pairs()[self.at - 1]
        self.at = 0

    def state_dict(self):
        return dict(at=self.at)

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_stateful_loader_goes_on(tmp_path, stop):
    goes_on(Counting, tmp_path, stop)


@pytest.mark.parametrize("stop", [5, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader_of_torchdata_goes_on(tmp_path, stop, workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    goes_on(lambda: stateful.StatefulDataLoader(PAIRS, B, num_workers=workers), tmp_path, stop)


@pytest.mark.parametrize("at", [5, 7])  # the state of the end of a pass, and of the middle
def test_looking_at_a_restored_loader_loses_nothing(at):
    def feed():
        return Feed(Counting(), Images((1, 8, 8)), Labels(3))

    first, passed = feed(), []
    for e in range(2):
        for k, (x, *_) in enumerate(first.epoch(e)):
            passed.append(x)
            if len(passed) == at:
                state = first.state()
    second = feed()
    second.first()
    second.restore(state)
    looked = second.first()[0]
    rest = [x for x, *_ in second.epoch(1, at % 5)]
    assert torch.equal(looked, rest[0]) and len(rest) == 10 - at
    assert all(torch.equal(a, b) for a, b in zip(rest, passed[at:]))


@pytest.mark.parametrize("look", [False, True])
def test_a_state_of_the_end_of_a_pass_begins_the_next(look):
    "torchdata's loaders once gave a pass without batches after such a state."
    feed = Feed(Counting(), Images((1, 8, 8)), Labels(3))
    feed.restore(dict(at=N // B))
    if look:
        feed.first()
    assert [len(x) for x, *_ in feed.epoch(1, 0)] == [B] * (N // B)
    feed.restore(dict(at=N // B))
    assert list(feed.epoch(0, N // B)) == [], "nothing is left of the pass that was begun"


class Lying(list):
    def __init__(self, batches, says):
        super().__init__(batches)
        self.says = says

    def __len__(self):
        return self.says


@pytest.mark.parametrize("says", [4, 7])
def test_a_length_that_is_wrong(says):
    "It decides how many steps an epoch counts; which examples come is not touched by it."
    diff = fit(Lying(pairs(), says), epochs=2)
    assert diff.step == 2 * says and diff.saw == (3 * fit(pairs(), epochs=1).saw)[: 2 * says]


def test_batches_of_varying_size():
    sizes = (3, 1, 8, 2, 8, 8, 8, 2)
    cut = list(zip(X.split(sizes), Y.split(sizes)))
    diff = fit(cut, epochs=2)
    assert diff.step == 16 and [len(s) for s in diff.saw] == 2 * list(sizes)
    assert sorted(sum(diff.saw[:8], [])) == list(range(N))


def test_the_mean_loss_counts_examples_not_batches():
    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.process = nn.Parameter(torch.zeros(1)), DDPM(100, "cosine")

        def loss(self, x0, cond=None, t=None, eps=None, generator=None):
            return x0[:, 0, 0, 0] + 0 * self.w

    diff = Diffusion(denoiser=Told(), shape=(1, 8, 8), num_classes=3, device="cpu")
    x = torch.zeros(4, 1, 8, 8)
    x[0] = 1
    diff.fit([(x[:1], Y[:1]), (x[1:], Y[1:4])], epochs=1, **QUIET, **QUICK)
    assert diff.history[-1]["loss"] == pytest.approx(0.25)


def test_a_later_batch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError):
        fit([*pairs(), ("words", Y)], epochs=1)
    with pytest.raises(ValueError, match="not 4 of Tensor"):
        unpack((X, Y, X, X))


def test_data_outside_of_the_bounds_are_said_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([(100 * X, Y)], total_steps=1)
    assert len([w for w in caught if "bounds=None" in str(w.message)]) == 1
