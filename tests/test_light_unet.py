"The light network: size and names, where conditions enter, any data, any configuration, bad input."

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_course.light_unet import (
    CrossAttention,
    FilmAttention,
    FiLMBlock,
    FilmConv,
    Gather,
    LightUNet,
    Scatter,
    as_film,
    film_norm,
    frames,
    norm,
    zeroed,
)
from ddpm_course.pretrained import manifest
from ddpm_course.unet import SelfAttention

SMALL = dict(widths=(8, 12), attention=(1,), time_dim=16, heads=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(net):
    "No layer at zero: zeros hide mistakes."
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return net


def small(num_classes=3, **kw):
    return shaken(LightUNet(1, 1, num_classes, **{**SMALL, **kw})).double()


def test_size_and_work():
    net = LightUNet(num_classes=10)
    assert sum(p.numel() for p in net.parameters()) == 757_668
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 1, 32, 32), torch.zeros(1))
    assert 62e6 < counter.get_total_flops() < 66e6  # older torch does not count attention on a CPU


def test_names_of_the_weights_stay():
    """Shipped weights and checkpoints are read by these names, and a seed gives the same weights in
    this order."""
    names = list(LightUNet(num_classes=10).state_dict())
    assert len(names) == 119
    assert names[:6] == [
        "time.0.weight",
        "time.0.bias",
        "time.2.weight",
        "time.2.bias",
        "label_emb.weight",
        "stem.1.weight",
    ]
    firsts = list(dict.fromkeys(n.split(".")[0] for n in names))
    assert firsts == ["time", "label_emb", "stem", "shrink", "downs", "mid", "ups", "grow", "out"]
    assert {
        "downs.2.1.qkv.weight",
        "mid.first.2.weight",
        "mid.film.bias",
        "mid.last.1.weight",
        "ups.0.0.short.weight",
        "shrink.1.weight",
        "grow.1.0.weight",
        "out.2.bias",
    } <= set(names)


def test_it_begins_as_zero_and_its_blocks_as_their_shortcuts():
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([1.0, 900.0])
    assert LightUNet(num_classes=3)(x, t).abs().max() == 0
    for c_in, c_out in ((8, 8), (8, 12)):
        block, h = FiLMBlock(c_in, c_out, 16), torch.randn(2, c_in, 4, 4)
        assert torch.equal(block(h, torch.randn(2, 16)), block.short(h))


def test_film_is_written_out():
    block, x, emb = (
        shaken(FiLMBlock(8, 12, 16)).double(),
        torch.randn(2, 8, 4, 6).double(),
        torch.randn(2, 16).double(),
    )
    v = emb @ block.film.weight.T + block.film.bias
    h = block.first(x)
    h = torch.stack(
        [torch.stack([h[i, c] * (1 + v[i, c]) + v[i, 12 + c] for c in range(12)]) for i in range(2)]
    )
    torch.testing.assert_close(block(x, emb), block.short(x) + block.last(h))


def test_a_closed_channel_lets_nothing_through():
    block, x = shaken(FiLMBlock(8, 8, 16)).double(), torch.randn(2, 8, 4, 4).double()
    with torch.no_grad():
        zeroed(block.film).bias[:8] = -1
    change = block(x, torch.randn(2, 16).double()) - x
    torch.testing.assert_close(change, block.last[1].bias[:, None, None].expand_as(change))


@pytest.mark.parametrize("channels, groups", [(8, 8), (12, 4), (64, 8), (3, 1), (6, 2)])
def test_groups_divide_the_channels(channels, groups):
    assert norm(channels).num_groups == groups


def test_time_and_label_reach_every_example_alone():
    net, x = small(), torch.randn(3, 1, 8, 12).double()
    t, y = torch.tensor([1.0, 300.0, 900.0]), torch.tensor([0, 3, 2])
    out = net(x, t, y)
    for i in range(3):
        torch.testing.assert_close(out[i : i + 1], net(x[i : i + 1], t[i : i + 1], y[i : i + 1]))
    torch.testing.assert_close(out[1:2], net(x[1:2], t[1:2]))  # no label is the null class
    for other in (net(x, t.roll(1), y), net(x, t, y.roll(1))):
        assert (out - other).abs().amax((1, 2, 3)).min() > 1e-4
    # one for all
    torch.testing.assert_close(net(x, t[:1], y[:1]), net(x, t[:1].repeat(3), y[:1].repeat(3)))


def test_every_skip_is_used_once():
    net, seen = LightUNet(widths=(8, 8, 8), time_dim=16, heads=2), []
    shaken(net)
    for up in net.ups:
        up[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    kept = []
    for down in net.downs:
        down[1].register_forward_hook(lambda m, i, o: kept.append(o))
    net(torch.randn(1, 1, 32, 32), torch.ones(1))
    assert [x.shape[-1] for x in seen] == [4, 8, 16]
    for x, skip in zip(seen, reversed(kept)):
        assert torch.equal(x[:, 8:], skip)


def test_attention_is_where_it_was_asked_for():
    assert [
        i for i, level in enumerate(LightUNet().downs) if isinstance(level[1], SelfAttention)
    ] == [2]
    assert not any(isinstance(m, SelfAttention) for m in LightUNet(attention=()).modules())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from([None, 1, 5]),
    st.data(),
)
def test_any_configuration(c, widths, patch, num_classes, data):
    attention = data.draw(st.lists(st.integers(0, len(widths) - 1), unique=True))
    net = shaken(
        LightUNet(c, c + 1, num_classes, widths, attention, patch, time_dim=8, heads=2)
    ).double()
    x, t = torch.randn(2, c, net.multiple, 2 * net.multiple).double(), torch.tensor([2.0, 700.0])
    y = None if num_classes is None else torch.tensor([0, num_classes])
    out = net(x, t, y)
    assert out.shape == (2, c + 1, *x.shape[2:]) and out.dtype == torch.float64
    twin = LightUNet(**json.loads(json.dumps(net.config))).double()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x, t, y), out) and twin.config == net.config
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_zeroed_layer_learns():
    net, x = LightUNet(1, 1, 3, **SMALL), torch.randn(4, 1, 8, 8)
    opt, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(30):
        loss = (net(x, torch.ones(4)) - x).pow(2).mean()
        losses.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert losses[0] == pytest.approx(x.pow(2).mean().item()) and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "kw", [{}, dict(memory_format=torch.channels_last), dict(dtype=torch.bfloat16)]
)
def test_layouts_and_types(kw):
    net, x = shaken(LightUNet(1, 1, 3, **SMALL)), torch.randn(2, 1, 8, 8)
    expected = net(x, torch.tensor([1.0, 900.0]), torch.tensor([0, 3]))
    out = (
        net.to(**kw)(x.to(**kw), torch.tensor([1.0, 900.0]), torch.tensor([0, 3]))
        if kw
        else net(x, torch.tensor([1, 900]), torch.tensor([0, 3]))
    )
    tol = 0.1 if "dtype" in kw else 1e-4
    torch.testing.assert_close(
        out.float(), expected, rtol=tol, atol=tol * expected.abs().max().item()
    )


# ---- sound, images, films


def test_the_configuration_of_an_image_network_is_what_it_was():
    "Run folders and shipped weights are compared with it."
    expected = dict(c_in=1, c_out=1, num_classes=10, widths=[32, 64, 64], attention=[2])
    assert LightUNet(num_classes=10).config == expected | dict(patch=2, time_dim=128, heads=4)
    entries = [e["config"]["net"] for e in manifest().values() if "net" in e.get("config", {})]
    light = [dict(c) for c in entries if c["name"] == "LightUNet"]
    assert light
    for c in light:
        name = c.pop("name")
        assert LightUNet(**c).config == c and name == "LightUNet"
    new = LightUNet(dims=3, context=8, extra=1, words=5, vector=2).config
    assert {k: new[k] for k in ("dims", "context", "extra", "words", "vector")} == dict(
        dims=3, context=8, extra=1, words=5, vector=2
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_gather_and_scatter(sides, channels):
    patch = [p for _, p in sides]
    x = torch.randn(2, channels, *(n * p for n, p in sides))
    gathered = Gather(*patch)(x)
    assert gathered.shape == (2, channels * torch.Size(patch).numel(), *(n for n, _ in sides))
    assert torch.equal(Scatter(*patch)(gathered), x)
    if len(sides) == 2 and patch[0] == patch[1]:
        assert torch.equal(gathered, F.pixel_unshuffle(x, patch[0]))
        assert torch.equal(Scatter(*patch)(gathered), F.pixel_shuffle(gathered, patch[0]))


def test_a_patch_of_sound_stays_together():
    x = torch.arange(12.0).view(1, 2, 6)
    assert Gather(3)(x)[0].T.tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]


@pytest.mark.parametrize("T", [1, 3])
def test_a_film_convolution_is_space_then_time(T):
    conv, x = shaken(FilmConv(3, 5, 3, stride=2, padding=1)).double(), torch.randn(2, 3, T, 6, 8)
    x = x.double()
    space = F.conv3d(x, conv.weight[:, :, None], conv.bias, stride=(1, 2, 2), padding=(0, 1, 1))
    time = F.conv3d(space, conv.time.weight[..., None], padding=(1, 0, 0))
    torch.testing.assert_close(conv(x), space + time)
    assert FilmConv(3, 5, 1).time is None and torch.equal(as_film(frames(x), T), x)


def test_a_clip_never_sees_another_clip():
    net = small(dims=3)
    x, t = torch.randn(2, 1, 3, 8, 8).double(), torch.tensor([1.0, 900.0])
    out, other = net(x, t), net(torch.cat([x[:1], 5 * x[1:]]), t)
    assert torch.equal(out[0], other[0])
    torch.testing.assert_close(out[1:], net(x[1:], t[1:]))


def test_frames_see_each_other_once_the_parts_over_time_have_moved():
    still, net = LightUNet(1, 1, 3, **SMALL, dims=3).double(), small(dims=3)
    with torch.no_grad():
        for name, p in still.named_parameters():
            if ".time." not in name:
                p.add_(0.1 * torch.randn(p.shape))
    x, t = torch.randn(1, 1, 4, 8, 8).double(), torch.ones(1)
    changed = x.clone()
    changed[:, :, 2] += 1
    apart = [(n(x, t) - n(changed, t)).abs().amax((0, 1, 3, 4)) for n in (still, net)]
    assert (apart[0] > 1e-9).tolist() == [False, False, True, False]
    assert (apart[1] > 1e-9).all()


def test_a_film_network_takes_the_weights_of_an_image_network():
    images = small()
    films = LightUNet(1, 1, 3, **SMALL, dims=3).double()
    missing, unknown = films.load_state_dict(images.state_dict(), strict=False)
    assert unknown == [] and missing and all(".time." in name for name in missing)
    x, t, y = torch.randn(2, 1, 5, 8, 12).double(), torch.tensor([3.0, 800]), torch.tensor([1, 3])
    each = torch.stack([images(x[:, :, i], t, y) for i in range(5)], 2)
    torch.testing.assert_close(films(x, t, y), each)


def test_a_clock_for_each_frame():
    net = small(dims=3)
    x, y = torch.randn(2, 1, 3, 8, 8).double(), torch.tensor([0, 2])
    t = torch.tensor([7.0, 600.0])
    torch.testing.assert_close(net(x, t[:, None].expand(-1, 3), y), net(x, t, y))
    still = LightUNet(1, 1, 3, **SMALL, dims=3).double()
    still.load_state_dict(small().state_dict(), strict=False)
    clock = torch.tensor([[7.0, 200, 900], [1, 1, 1000]])
    apart = torch.stack([still(x[:, :, i : i + 1], clock[:, i], y)[:, :, 0] for i in range(3)], 2)
    torch.testing.assert_close(still(x, clock, y), apart)


def test_film_attention_and_norm_go_frame_by_frame():
    x = torch.randn(2, 8, 4, 3, 5)
    attention, group = FilmAttention(8, 2), film_norm(8)
    each = torch.stack([norm(8)(x[:, :, i]) for i in range(4)], 2)
    torch.testing.assert_close(group(x), each)
    alone = [SelfAttention.forward(attention, frames(x[:, :, i : i + 1])) for i in range(4)]
    torch.testing.assert_close(attention(x), torch.stack(alone, 2))
    shaken(attention)
    space = as_film(SelfAttention.forward(attention, frames(x)), 4)
    for h, w in ((0, 0), (2, 4)):
        over_time = attention.time(space[..., h, w])
        torch.testing.assert_close(attention(x)[..., h, w], over_time)


RICH = dict(context=6, words=9, extra=2, vector=3)
# groups of more than one channel: a norm takes nothing away from the layer before it
ODD = SMALL | dict(widths=(12, 16))
CLIPS = {1: (12,), 2: (8, 12), 3: (5, 8, 4)}


def everything(sides, n=2):
    "x, t and all conditions at once."
    tokens = torch.tensor([[5, 2, 0, 0], [7, 1, 4, 9]])[:n]
    cond = dict(
        label=torch.tensor([0, 2])[:n],
        vector=torch.randn(n, 3).double(),
        tokens=tokens,
        image=torch.randn(n, 2, *sides).double(),
    )
    return torch.randn(n, 1, *sides).double(), torch.tensor([1.0, 900.0])[:n], cond


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_everything_at_once(dims):
    net = small(dims=dims, **RICH, **ODD)
    x, t, cond = everything(CLIPS[dims])
    out = net(x, t, cond)
    assert out.shape == x.shape
    for name in cond:  # each is heard, by each example
        less = net(x, t, {**cond, name: None})
        assert (out - less).abs().flatten(1).amax(1).min() > 1e-6, name
        other = cond[name].roll(1, 0) if name == "label" else cond[name].flip(0)
        assert (out - net(x, t, {**cond, name: other})).abs().flatten(1).amax(1).min() > 1e-6
    for i in range(2):  # and by no other
        alone = net(x[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()})
        torch.testing.assert_close(out[i : i + 1], alone)
    twin = LightUNet(**json.loads(json.dumps(net.config))).double()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x, t, cond), out) and twin.config == net.config
    net.zero_grad()
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_new_network_of_any_kind_learns_in_every_part(dims):
    "Zeros at the start keep no layer from learning for good."
    net = LightUNet(1, 1, 4, **ODD, dims=dims, **RICH).double()
    x, t, cond = everything(CLIPS[dims])
    start = copy.deepcopy(net.state_dict())
    opt = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(6):
        opt.zero_grad()
        (net(x, t, cond) - x.roll(1, -1)).pow(2).mean().backward()
        opt.step()
    assert [k for k, v in net.state_dict().items() if torch.equal(v, start[k])] == []


def test_nothing_asked_is_nothing_given():
    net = small(**RICH)
    x, t, cond = everything((8, 12))
    nothing = dict(
        label=torch.tensor([3]),
        vector=torch.zeros(1, 3),
        tokens=torch.zeros(2, 3, dtype=torch.long),
        image=torch.zeros(1, 2, 8, 12),
    )
    out = net(x, t)
    for cond in ({}, nothing, dict(tokens=None), dict(tokens=nothing["tokens"][:, :0])):
        torch.testing.assert_close(net(x, t, cond), out)
    some = torch.tensor([[5, 1, 1], [2, 2, 2]])
    hidden = dict(tokens=some, mask=torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(net(x, t, hidden), out)
    assert out.isfinite().all()
    with torch.no_grad():  # the token for 'nothing' is looked at, and is learned
        for m in net.modules():
            if isinstance(m, CrossAttention):
                m.null.add_(1)
    assert (net(x, t) - out).abs().amax((1, 2, 3)).min() > 1e-6


def test_a_tensor_is_a_label_or_a_vector_by_its_type():
    x, t = torch.randn(2, 1, 8, 8).double(), torch.ones(2)
    net, v, y = small(vector=3), torch.randn(2, 3), torch.tensor([1, 2])
    assert torch.equal(net(x, t, v), net(x, t, dict(vector=v)))
    assert torch.equal(net(x, t, y), net(x, t, dict(label=y)))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_never_reaches_the_output(dims):
    net = small(context=6, dims=dims)
    x, t, _ = everything(CLIPS[dims])
    tokens = torch.randn(2, 4, 6).double()
    mask = torch.tensor([[True, True, False, False], [False, True, True, False]])
    out = net(x, t, dict(tokens=tokens, mask=mask))
    for filler in (0.0, 1e30, float("nan"), float("inf")):
        padded = tokens.masked_fill(~mask[..., None], filler)
        assert torch.equal(net(x, t, dict(tokens=padded, mask=mask)), out)
    longer = dict(tokens=F.pad(tokens, (0, 0, 0, 90), value=7.0), mask=F.pad(mask, (0, 90)))
    torch.testing.assert_close(net(x, t, longer), out, rtol=1e-9, atol=1e-9)
    first = dict(tokens=tokens[:1, :2], mask=mask[:1, :2])  # no padding at all
    torch.testing.assert_close(net(x[:1], t[:1], first), out[:1], rtol=1e-9, atol=1e-9)


def test_padding_in_float32():
    net = small(context=6, words=9).float()
    x, t, cond = everything((8, 12))
    x, tokens = x.float(), cond["tokens"]
    out = net(x, t, dict(tokens=tokens))
    longer = net(x, t, dict(tokens=F.pad(tokens, (0, 60))))
    torch.testing.assert_close(longer, out, rtol=1e-6, atol=1e-6 * out.abs().max().item())


def test_words_know_their_places_and_tokens_do_not():
    x, t, _ = everything((8, 12))
    words = torch.tensor([[5, 2, 7], [7, 1, 4]])
    net = small(context=6, words=9)
    apart = net(x, t, dict(tokens=words)) - net(x, t, dict(tokens=words.flip(1)))
    assert apart.abs().amax() > 1e-6
    net, vectors = small(context=6), torch.randn(2, 3, 6).double()
    shuffled = dict(tokens=vectors.flip(1), mask=torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(net(x, t, dict(tokens=vectors)), net(x, t, shuffled))


def test_new_parts_begin_as_what_was_there():
    "Cross-attention starts as the identity; extra channels at zero add nothing."
    plain, x, t = small(), torch.randn(2, 1, 8, 8).double(), torch.tensor([5.0, 800])
    y = torch.tensor([1, 3])
    net = LightUNet(1, 1, 3, **SMALL, context=6, words=9, extra=2).double()
    weights = plain.state_dict()
    assert weights.keys() <= net.state_dict().keys()
    stem = torch.randn_like(net.stem[1].weight)
    stem[:, :4] = weights["stem.1.weight"]  # the noisy channels come first
    net.load_state_dict(weights | {"stem.1.weight": stem}, strict=False)
    cond = dict(label=y, tokens=torch.tensor([[1, 2], [3, 0]]))
    torch.testing.assert_close(net(x, t, cond), plain(x, t, y))
    image = torch.randn(2, 2, 8, 8)
    assert (net(x, t, cond | dict(image=image)) - plain(x, t, y)).abs().amax() > 1e-3
    h, tokens = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 4)
    assert torch.equal(CrossAttention(8, 4)(h, tokens, torch.ones(2, 5, dtype=torch.bool)), h)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.sampled_from([1, 3]))
def test_sizes_of_sound_and_film_work_or_are_refused(H, W, T, dims):
    net = LightUNet(1, 1, dims=dims, widths=(4, 4), attention=(), time_dim=8)
    sides = (H,) if dims == 1 else (T, H, W)
    x, needed = torch.zeros(2, 1, *sides), 4
    if H % needed == 0 and (dims == 1 or W % needed == 0):
        assert net(x, torch.ones(1)).shape == x.shape
    else:
        with pytest.raises(ValueError, match=" x ".join(map(str, sides)) + " does not fit") as e:
            net(x, torch.ones(1))
        nearest = str(e.value).split("nearest are ")[1].split(" and ")
        for size in nearest:
            named = [int(n) for n in size.split(" x ")]
            assert net(torch.zeros(2, 1, *named), torch.ones(1)).isfinite().all()
            assert all(abs(a - b) < needed for a, b in zip(named, sides))
            assert dims == 1 or named[0] == T  # frames are not halved


def test_work_of_a_film_and_of_words():
    def work(net, x, cond=None):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, torch.ones(1), cond)
        return counter.get_total_flops()

    image = work(LightUNet(attention=()), torch.zeros(1, 1, 32, 32))
    film = work(LightUNet(attention=(), dims=3), torch.zeros(1, 1, 8, 32, 32))
    assert 8 * image < film < 8 * 12 / 9 * image  # 3 x 3, then 3: twelve products for nine
    words = dict(tokens=torch.ones(1, 8, dtype=torch.long))
    with_words = work(LightUNet(context=64, words=99), torch.zeros(1, 1, 32, 32), words)
    assert with_words < 1.1 * work(LightUNet(), torch.zeros(1, 1, 32, 32))


# ---- as a graph: no operation may look at data


def graph_inputs(dims, kind, n):
    x, t, cond = everything(CLIPS[dims], 2)
    more = [v.repeat(-(-n // 2), *[1] * (v.ndim - 1))[:n] for v in (x, t, *cond.values())]
    x, t, cond = more[0].float(), more[1], dict(zip(cond, more[2:]))
    return x, t, {"labels": cond["label"], "all": cond, "none": None}[kind]


@pytest.mark.parametrize(
    "dims, kind, strict",
    [(2, "labels", True), (2, "labels", False), (2, "none", True), (2, "all", True)]
    + [(1, "all", False), (3, "all", True), (3, "all", False)],
)
def test_export_with_any_number_of_examples(dims, kind, strict):
    kw = RICH if kind == "all" else {}
    net = small(None if kind == "none" else 4, dims=dims, **kw).float().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    args = graph_inputs(dims, kind, 2)
    cond = {k: {0: batch} for k in args[2]} if kind == "all" else {0: batch}
    shapes = ({0: batch}, {0: batch}, None if kind == "none" else cond)
    graph = torch.export.export(net, args, dynamic_shapes=shapes, strict=strict).module()
    for n in (2, 5):
        args = graph_inputs(dims, kind, n)
        torch.testing.assert_close(graph(*args), net(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims, kind", [(2, "labels"), (2, "all"), (1, "all"), (3, "all")])
def test_compiles_in_one_piece(dims, kind):
    torch.compiler.reset()  # else it remembers the shapes of other tests, and is 20 times slower
    net = small(4, dims=dims, **(RICH if kind == "all" else {})).float()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x, t, cond = graph_inputs(dims, kind, 2)
    for asked in (cond, None):
        assert torch.equal(compiled(x, t, asked), net(x, t, asked))
    with pytest.raises(ValueError, match=r"0\.\.3, or 4 for 'no label'"):  # eager still looks
        net(x, t, torch.tensor([0, 5]))


# ---- bad input


def asked(cond, dims=2, sides=(8, 8), t=None, **kw):
    net = LightUNet(1, 1, **SMALL, dims=dims, **kw)
    return net(torch.zeros(2, 1, *sides), torch.ones(2) if t is None else t, cond)


WORDS, TRUE = torch.tensor([[1, 2], [3, 0]]), torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: LightUNet(dims=4), "unknown number of dimensions 4: choose one of 1, 2, 3"),
        (lambda: asked(None, 1), r"sound \(B,1,L\), not \(2, 1, 8, 8\)"),
        (lambda: asked(None, 3), r"films \(B,1,T,H,W\), not \(2, 1, 8, 8\)"),
        (lambda: asked(None, 1, (30,)), "^size 30 .*multiples of 4: the nearest are 28 and 32$"),
        (lambda: asked(None, 3, (3, 8, 9)), "3 x 8 x 9.*1 x 4 x 4.*3 x 8 x 8 and 3 x 8 x 12"),
        (lambda: asked(None, t=torch.ones(2, 8)), r"one value per example, not \(2, 8\)"),
        (
            lambda: asked(None, 3, (3, 8, 8), torch.ones(2, 4)),
            r"or one for each of 3 frames, not \(2, 4\)",
        ),
        (lambda: asked(dict(lable=WORDS)), "part of a condition 'lable'.*mean 'label'"),
        (lambda: asked(dict(tokens=WORDS)), r"made without context.*no tokens.*\(context=...\)"),
        (lambda: asked(dict(mask=TRUE)), "made without context, so it takes no mask"),
        (lambda: asked(dict(image=torch.zeros(2, 1, 8, 8))), "without extra.*no image"),
        (lambda: asked(dict(vector=torch.zeros(2, 3))), "without vector.*no vector"),
        (lambda: asked(dict(tokens=WORDS), context=4), r"vectors \(B,L,4\).*words=...\) embeds"),
        (lambda: asked(dict(tokens=torch.zeros(2, 3, 5)), context=4), r"\(B,L,4\).*\(2, 3, 5\)"),
        (lambda: asked(dict(tokens=torch.zeros(2, 3, 4)), context=4, words=3), r"whole.*\(B,L\)"),
        (lambda: asked(dict(tokens=WORDS + 1), context=4, words=3), "1..3, or 0.*not 1..4"),
        (lambda: asked(dict(tokens=WORDS - 1), context=4, words=3), "not -1..2"),
        (lambda: asked(dict(mask=TRUE), context=4), "give the tokens too"),
        (
            lambda: asked(dict(tokens=WORDS, mask=TRUE[:, :1]), context=4, words=3),
            r"bool \(B,2\), not torch.bool of shape \(2, 1\)",
        ),
        (lambda: asked(dict(tokens=WORDS, mask=WORDS), context=4, words=3), "not torch.int64"),
        (
            lambda: asked(dict(image=torch.zeros(2, 1, 8, 8)), extra=2),
            r"image is of shape \(B,2,8,8\), not \(2, 1, 8, 8\)",
        ),
        (lambda: asked(torch.zeros(2, 4), vector=3), r"vector is of shape \(B,3\)"),
        (lambda: LightUNet(context=4, attention=()), "name a level"),
        (lambda: LightUNet(words=4), "context=None"),
        (lambda: LightUNet(words=4, context=5), "even length: context=5"),
        (lambda: CrossAttention(10, 4, 4), "10 channels do not divide into 4 heads"),
    ],
)
def test_what_a_network_does_not_take(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: small()(torch.zeros(1, 1, 9, 8).double(), torch.ones(1)),
            "9 x 8.*multiples of 4.*8 x 8 and 12 x 8",
        ),
        (
            lambda: small()(torch.zeros(1, 3, 8, 8).double(), torch.ones(1)),
            r"\(B,1,H,W\), not \(1, 3, 8, 8\)",
        ),
        (lambda: small()(torch.zeros(1, 8, 8).double(), torch.ones(1)), r"not \(1, 8, 8\)"),
        (
            lambda: small()(torch.zeros(1, 1, 8, 8).double(), torch.ones(1), torch.tensor([4])),
            r"0\.\.2, or 3 for 'no label'.*\[4\]",
        ),
        (
            lambda: small(None)(torch.zeros(1, 1, 8, 8).double(), torch.ones(1), torch.tensor([1])),
            "made without classes",
        ),
        (lambda: LightUNet(attention=(3,)), r"\[3\].*levels 0\.\.2"),
        (lambda: LightUNet(attention=(-1,)), r"\[-1\]"),
        (lambda: LightUNet(widths=(30,), attention=(0,)), "30 channels do not divide into 4 heads"),
        (lambda: LightUNet(time_dim=7)(torch.zeros(1, 1, 8, 8), torch.ones(1)), "even, not 7"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_zeroed_gives_back_the_layer_itself():
    layer = nn.Linear(3, 2)
    assert zeroed(layer) is layer and all(
        (p == 0).all() and p.requires_grad for p in layer.parameters()
    )
