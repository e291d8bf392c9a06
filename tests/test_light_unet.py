"The light network: its size and names, where the embedding enters, any configuration, bad input."

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_course.light_unet import FiLMBlock, LightUNet, norm, zeroed
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
