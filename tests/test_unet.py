"The network: its size, old mistakes that live in it, agreement with others, any configuration."

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ddpm_course import unet
from ddpm_course.light_unet import LightUNet
from ddpm_course.unet import (
    DoubleConv,
    Down,
    SelfAttention,
    UNet,
    UNet_conditional,
    Up,
    attend,
    bcast_channels,
    check_size,
    timestep_embedding,
)

quick = settings(max_examples=30, deadline=None)
SMALL = dict(time_dim=16, widths=(8, 16), heads=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def count(net):
    return sum(p.numel() for p in net.parameters())


def close(a, b, tol=1e-4):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ---- the defaults are the network that the course starts from


def test_parameter_counts():
    assert count(UNet()) == 15_661_955
    assert count(UNet_conditional()) == 15_661_955
    assert count(UNet_conditional(num_classes=10)) == 15_664_771 == 15_664_515 + 256  # the null row


def test_the_source_topology():
    net = UNet()
    assert [(d.convs[1].net[0].in_channels, d.convs[2].net[0].out_channels) for d in net.downs] == [
        (64, 128),
        (128, 256),
        (256, 256),
    ]
    assert [
        (
            u.convs[1].net[0].in_channels,
            u.convs[1].net[0].out_channels,
            u.convs[1].net[3].out_channels,
        )
        for u in net.ups
    ] == [(512, 256, 128), (256, 128, 64), (128, 64, 64)]
    assert [a.heads for a in (*net.downs_sa, *net.ups_sa)] == [4] * 6
    assert len(net.mid) == 2 and net.out[0].kernel_size == (1, 1) and net.multiple == 8
    assert all(m.num_groups == 1 for m in net.modules() if isinstance(m, nn.GroupNorm))


def test_the_defaults_compute_what_the_source_does():
    "The network of the article written out once more, plainly, with torch's own attention layer."
    net = UNet_conditional(2, 2, num_classes=5).eval()
    with torch.no_grad():  # fresh norms are all alike: tell them apart
        for p in net.parameters():
            p.add_(torch.rand_like(p) * (0.5 if p.ndim == 1 else 0.0))
    w = net.state_dict()

    def double(x, at, residual=False):
        h = F.conv2d(x, w[at + ".net.0.weight"], padding=1)
        h = F.gelu(F.group_norm(h, 1, w[at + ".net.1.weight"], w[at + ".net.1.bias"]))
        h = F.group_norm(
            F.conv2d(h, w[at + ".net.3.weight"], padding=1),
            1,
            w[at + ".net.4.weight"],
            w[at + ".net.4.bias"],
        )
        return F.gelu(x + h) if residual else h

    def linear(x, at):
        return F.linear(x, w[at + ".weight"], w[at + ".bias"])

    def norm(x, at):
        return F.layer_norm(x, x.shape[-1:], w[at + ".weight"], w[at + ".bias"])

    def attend(x, at):
        x_ln = norm(tokens := x.flatten(2).transpose(1, 2), at + ".norm")
        mha = nn.MultiheadAttention(x.shape[1], 4, batch_first=True)
        mha.load_state_dict(
            dict(
                in_proj_weight=w[at + ".qkv.weight"],
                in_proj_bias=w[at + ".qkv.bias"],
                **{"out_proj.weight": w[at + ".out.weight"], "out_proj.bias": w[at + ".out.bias"]},
            )
        )
        h = tokens + mha(x_ln, x_ln, x_ln)[0]
        h = h + linear(F.gelu(linear(norm(h, at + ".mlp.0"), at + ".mlp.1")), at + ".mlp.3")
        return h.transpose(1, 2).reshape(x.shape)

    def timed(x, at):
        return x + linear(F.silu(emb), at + ".time.1")[:, :, None, None]

    x, t, y = torch.randn(2, 2, 16, 24), torch.tensor([3.0, 700.0]), torch.tensor([4, 5])
    angles = t[:, None] / 10000 ** (torch.arange(0, 256, 2) / 256)
    emb = torch.cat([angles.sin(), angles.cos()], 1) + w["label_emb.weight"][y]
    skips = [double(x, "stem.1")]
    for i in range(3):
        h = double(
            double(F.max_pool2d(skips[-1], 2), f"downs.{i}.convs.1", True), f"downs.{i}.convs.2"
        )
        skips.append(attend(timed(h, f"downs.{i}"), f"downs_sa.{i}"))
    h = double(double(skips.pop(), "mid.0"), "mid.1")
    for i in range(3):
        h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True)
        h = double(
            double(torch.cat([skips.pop(), h], 1), f"ups.{i}.convs.0", True), f"ups.{i}.convs.1"
        )
        h = attend(timed(h, f"ups.{i}"), f"ups_sa.{i}")
    with torch.no_grad():
        close(net(x, t, y), F.conv2d(h, w["out.0.weight"], w["out.0.bias"]), 1e-4)


def test_names_of_the_weights_stay():
    "Checkpoints are read by these names."
    names = UNet_conditional(num_classes=10).state_dict().keys()
    assert len(names) == 177
    assert {
        "stem.1.net.0.weight",
        "downs.0.convs.1.net.3.weight",
        "downs.2.time.1.bias",
        "downs_sa.0.qkv.weight",
        "downs_sa.2.mlp.0.weight",
        "mid.1.net.4.bias",
        "ups.0.convs.0.net.0.weight",
        "ups.2.time.1.weight",
        "ups_sa.2.out.weight",
        "out.0.weight",
        "label_emb.weight",
    } <= names


def test_light_is_light():
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        LightUNet()(torch.zeros(1, 1, 32, 32), torch.zeros(1))
    with FlopCounterMode(display=False) as source, torch.no_grad():
        UNet(1, 1)(torch.zeros(1, 1, 32, 32), torch.zeros(1))
    # older torch does not count attention on a CPU
    assert 0.9 < source.get_total_flops() / 3460.2e6 < 1.01
    assert ours.get_total_flops() < source.get_total_flops() / 10
    assert sum(p.numel() for p in LightUNet(1, 1, 10).parameters()) == 757_668


# ---- the old mistakes


@quick
@given(st.integers(1, 9), st.integers(1, 9))
def test_mistake_07_attention_reads_height_and_width(H, W):
    sa, x = SelfAttention(8).double(), torch.randn(2, 8, H, W).double()
    tokens = x.flatten(2).mT
    q, k, v = sa.qkv(sa.norm(tokens)).chunk(3, -1)
    heads = [
        torch.softmax(q[..., i] @ k[..., i].mT / math.sqrt(2), -1) @ v[..., i]
        for i in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8))
    ]
    tokens = tokens + sa.out(torch.cat(heads, -1))
    close(sa(x), (tokens + sa.mlp(tokens)).mT.reshape(2, 8, H, W), 1e-10)
    close(sa(x.mT), sa(x).mT, 1e-10)


def test_mistake_07_in_the_whole_network():
    """A 16x8 image: the network without positions sees the same in every attention when it lies on
    its side."""
    net = UNet(1, 1, **SMALL).double()
    seen = []
    for a in (*net.downs_sa, *net.ups_sa):
        a.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    assert net(torch.randn(2, 1, 16, 8).double(), torch.ones(2)).shape == (2, 1, 16, 8)
    assert len(seen) == 2
    for a, (x, y) in zip((*net.downs_sa, *net.ups_sa), seen):
        assert x.shape == y.shape and x.shape[-2] == 2 * x.shape[-1]
        close(a(x.mT), y.mT, 1e-10)


@quick
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2]), st.integers(2, 3))
def test_mistake_12_sizes_work_or_are_refused_at_the_door(H, W, patch, levels):
    net = UNet(
        1, 1, time_dim=16, widths=(8,) * levels, heads=2, attention=(), patch=patch, mid_blocks=1
    )
    x = torch.zeros(1, 1, H, W)
    if H % net.multiple == W % net.multiple == 0:
        assert net(x, torch.ones(1)).shape == x.shape
    else:
        with pytest.raises(ValueError, match=f"{H} x {W} does not fit"):
            net(x, torch.ones(1))


@quick
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([2, 4, 8, 16]))
def test_mistake_12_the_named_sizes_are_the_nearest(H, W, multiple):
    try:
        check_size((H, W), multiple)
    except ValueError as error:
        named = [
            tuple(map(int, part.split(" x ")))
            for part in str(error).split("nearest are ")[1].split(" and ")
        ]
        assert H % multiple or W % multiple
        for h, w in named:
            check_size((h, w), multiple)
            assert abs(h - H) < multiple and abs(w - W) < multiple
        assert all(w >= W and h >= H for h, w in named[-1:])
    else:
        assert H % multiple == W % multiple == 0


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that any operation makes, forward and backward, and the
    names of the operations."""

    def __init__(self):
        super().__init__()
        self.shapes, self.names = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.names.add(str(func))
        self.shapes |= {
            tuple(o.shape)
            for o in (out if isinstance(out, (tuple, list)) else [out])
            if isinstance(o, torch.Tensor)
        }
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mistake_16_the_weights_are_never_formed(dtype):
    sa, x, N = SelfAttention(8), torch.randn(2, 8, 13, 11, requires_grad=True), 13 * 11
    with Shapes() as ops, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        sa(x).float().pow(2).sum().backward()
    assert not any(s[-2:] == (N, N) for s in ops.shapes)
    assert any(
        "scaled_dot_product" in n and ("flash" in n or "efficient" in n or "fused" in n)
        for n in ops.names
    )
    # as it was: the test can see the difference
    mha, seq = nn.MultiheadAttention(8, 4, batch_first=True), x.flatten(2).mT
    with Shapes() as ops:
        mha(seq, seq, seq)[0].sum().backward()
    assert any(s[-2:] == (N, N) for s in ops.shapes)


def test_mistake_16_one_fused_call(monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        unet.F,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append((a[0].shape, a[3:], k)) or fused(*a, **k),
    )
    SelfAttention(8)(torch.zeros(2, 8, 4, 6))
    # no mask, no dropout: what the fused kernels ask for
    assert calls == [((2, 4, 24, 2), (None,), {})]


def test_mistake_16_memory_grows_with_the_pixels_not_their_square():
    def kept(side):
        sizes = {}

        def pack(x):
            sizes[x.data_ptr()] = x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            _ = sa(torch.randn(1, 16, side, side))
        return sum(sizes.values())

    sa = SelfAttention(16)
    assert kept(64) < 4.5 * kept(32)


def test_mistake_16_no_attention_at_full_size_in_the_light_network():
    net, tokens = LightUNet(), []
    for m in net.modules():
        if isinstance(m, SelfAttention):
            m.register_forward_hook(lambda m, i, o: tokens.append(o[0, 0].numel()))
    net(torch.zeros(1, 1, 32, 32), torch.zeros(1))
    assert tokens and max(tokens) <= 8 * 8


def test_mistake_18_no_label_is_a_class_of_its_own():
    net = UNet_conditional(1, 1, num_classes=3, **SMALL)
    assert net.label_emb.weight.shape == (4, 16)
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([1.0, 10, 100, 900]), torch.tensor([0, 3, 2, 3])
    mixed = net(x, t, y)
    for i, label in enumerate([0, None, 2, None]):  # each example as if it were alone
        close(
            mixed[i : i + 1],
            net(x[i : i + 1], t[i : i + 1], None if label is None else torch.tensor([label])),
        )
    none = net(x, t)
    assert all((none - net(x, t, torch.full((4,), k))).abs().max() > 1e-4 for k in range(3))
    with torch.no_grad():
        net.label_emb.weight[3] = 0  # as it was: nothing is added
    assert (none - net(x, t)).abs().max() > 1e-4


def test_mistake_18_the_null_row_is_trained_by_unlabelled_examples_only():
    net = UNet_conditional(1, 1, num_classes=3, **SMALL)
    x, t = torch.randn(2, 1, 8, 8), torch.ones(2)
    for y, rows in (([0, 2], [0, 2]), ([1, 3], [1, 3]), (None, [3])):
        net.zero_grad()
        net(x, t, None if y is None else torch.tensor(y)).pow(2).sum().backward()
        assert net.label_emb.weight.grad.abs().sum(1).nonzero().flatten().tolist() == rows


# ---- agreement with others


def test_timestep_embedding_agrees_with_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0.0, 1, 10.5, 500, 1000])
    close(
        timestep_embedding(t, 64),
        embeddings.get_timestep_embedding(t, 64, downscale_freq_shift=0),
        2e-4,
    )


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=8), st.sampled_from([2, 8, 256]))
@quick
def test_timestep_embedding(ts, dim):
    e = timestep_embedding(torch.tensor(ts), dim)
    assert e.shape == (len(ts), dim) and e.dtype == torch.float32
    for row, t in zip(e, torch.tensor(ts).tolist()):
        for i in (0, dim // 2 - 1):
            angle = t * 10000 ** (-2 * i / dim)
            assert (
                abs(row[i] - math.sin(angle)) < 2e-3
                and abs(row[dim // 2 + i] - math.cos(angle)) < 2e-3
            )
    assert torch.equal(e, timestep_embedding(torch.tensor(ts).double(), dim)) and torch.equal(
        e[:1], timestep_embedding(torch.tensor(ts[0]), dim)
    )


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_attention_agrees_with_torch_in_any_number_of_dimensions(shape):
    sa, mha, x = (
        SelfAttention(12, 3),
        nn.MultiheadAttention(12, 3, batch_first=True),
        torch.randn(2, 12, *shape),
    )
    mha.load_state_dict(
        {
            "in_proj_weight": sa.qkv.weight,
            "in_proj_bias": sa.qkv.bias,
            "out_proj.weight": sa.out.weight,
            "out_proj.bias": sa.out.bias,
        }
    )
    tokens = x.flatten(2).mT
    tokens = tokens + mha(*[sa.norm(tokens)] * 3, need_weights=False)[0]
    close(sa(x), (tokens + sa.mlp(tokens)).mT.reshape(x.shape), 1e-5)
    assert bcast_channels(torch.ones(2, 12), x).shape == (2, 12, *[1] * len(shape))


@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 1), (2, 3, 4)])
def test_a_clock_of_any_shape(shape):
    t = 1000 * torch.rand(shape)
    e = timestep_embedding(t, 8)
    assert e.shape == (*shape, 8) and torch.equal(
        e.flatten(0, -2), timestep_embedding(t.flatten(), 8)
    )


def test_a_mask_leaves_tokens_out_in_every_head():
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    mask = torch.tensor([[True, False, True, True, False, False, False], [True] * 7])
    out = attend(q, k, v, 3, mask)
    close(out[:1], attend(q[:1], k[:1, [0, 2, 3]], v[:1, [0, 2, 3]], 3), 1e-6)
    close(out[1:], attend(q[1:], k[1:], v[1:], 3), 1e-6)
    heads = [
        torch.softmax(q[..., i] @ k[..., i].mT / 2, -1) @ v[..., i]
        for i in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    close(attend(q, k, v, 3), torch.cat(heads, -1), 1e-5)


# ---- any size and configuration


@st.composite
def configurations(draw):
    levels = draw(st.integers(2, 4))
    config = dict(
        c_in=draw(st.integers(1, 4)),
        c_out=draw(st.integers(1, 4)),
        time_dim=draw(st.sampled_from([8, 16])),
        widths=tuple(draw(st.lists(st.sampled_from([4, 8, 12]), min_size=levels, max_size=levels))),
        attention=draw(st.none() | st.lists(st.integers(0, levels - 1), unique=True).map(tuple)),
        heads=draw(st.sampled_from([1, 2, 4])),
        mid_blocks=draw(st.integers(0, 2)),
        patch=draw(st.integers(1, 3)),
    )
    return (
        config,
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([None, 1, 5])),
    )


@quick
@given(configurations())
def test_any_configuration(drawn):
    config, h, w, num_classes = drawn
    net = UNet_conditional(**config, num_classes=num_classes).double().eval()
    x = torch.randn(3, config["c_in"], h * net.multiple, w * net.multiple).double()
    t, y = torch.tensor([1.0, 300.5, 1000]), (
        None if num_classes is None else torch.tensor([0, num_classes, num_classes - 1])
    )
    out = net(x, t, y)
    assert (
        out.shape == (3, config["c_out"], *x.shape[2:])
        and out.isfinite().all()
        and out.dtype == torch.float64
    )
    # no example sees another
    close(out[1:2], net(x[1:2], t[1:2], None if y is None else y[1:2]), 1e-9)
    assert (out - net(x, t + 100, y)).abs().max() > 1e-9  # the time matters
    assert (out - net(x + torch.randn_like(x), t, y)).abs().max() > 1e-9  # and the image
    twin = UNet_conditional(**json.loads(json.dumps(net.config)))  # from a configuration file
    assert twin.config == net.config
    twin.double().load_state_dict(net.state_dict())
    assert torch.equal(out, twin(x, t, y))
    out.sum().backward()
    reached = {n for n, p in net.named_parameters() if p.grad is not None}
    assert reached == set(dict(net.named_parameters()))  # nothing is built and not used


def test_every_skip_is_used():
    net, x = UNet(1, 1, time_dim=16, widths=(8, 8, 8, 8), heads=2), torch.randn(1, 1, 16, 16)
    skips = []
    for up in net.ups:
        up.register_forward_pre_hook(lambda m, args: skips.append(args[1]) or args[1].retain_grad())
    net(x, torch.ones(1)).pow(2).sum().backward()
    assert [s.shape[-1] for s in skips] == [4, 8, 16] and all(s.grad.abs().sum() > 0 for s in skips)


def test_down_and_up_add_the_time_to_every_pixel():
    emb, x = torch.randn(2, 16), torch.randn(2, 4, 4, 6)
    for block, args in ((Down(4, 6, 16), (x,)), (Up(8, 6, 16), (x, torch.randn(2, 4, 8, 12)))):
        change = block(*args, emb) - block(*args, 0 * emb)
        close(
            change, (block.time(emb) - block.time(0 * emb))[..., None, None].expand_as(change), 1e-5
        )


def test_one_time_and_one_label_serve_the_whole_batch():
    net, x = UNet_conditional(1, 1, num_classes=3, **SMALL), torch.randn(3, 1, 8, 8)
    close(
        net(x, torch.tensor([7.0]), torch.tensor([2])),
        net(x, torch.full((3,), 7.0), torch.full((3,), 2)),
        1e-5,
    )


# ---- number types and layouts


def test_autocast_runs_the_heavy_layers_in_bfloat16():
    net, x, t = (
        UNet_conditional(1, 1, num_classes=3, **SMALL),
        torch.randn(4, 1, 16, 16),
        torch.tensor([1.0, 10, 500, 999]),
    )
    kinds = {}
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(lambda m, i, o: kinds.setdefault(type(m), set()).add(o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, torch.tensor([0, 1, 2, 3]))
    assert kinds == {nn.Conv2d: {torch.bfloat16}, nn.Linear: {torch.bfloat16}}
    exact = net(x, t, torch.tensor([0, 1, 2, 3]))
    assert (out.float() - exact).pow(2).mean() < 1e-3 * exact.pow(2).mean()
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_whole_network_in_another_type(dtype):
    net, x = UNet_conditional(1, 1, num_classes=3, **SMALL).to(dtype), torch.randn(2, 1, 8, 8).to(
        dtype
    )
    assert net(x, torch.tensor([1.0, 900.0]), torch.tensor([0, 3])).dtype == dtype
    assert net(x, torch.tensor([1, 900]), None).dtype == dtype  # whole times


def test_channels_last_gives_the_same():
    net, x, t = UNet(1, 1, **SMALL), torch.randn(2, 1, 16, 8), torch.ones(2)
    expected = net(x, t)
    close(
        net.to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last), t
        ),
        expected,
        1e-4,
    )


def test_copies_are_independent():
    net = UNet_conditional(1, 1, num_classes=3, **SMALL)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.out[0].bias.add_(1)
    x, t = torch.randn(1, 1, 8, 8), torch.ones(1)
    close(twin(x, t), net(x, t) + 1, 1e-5)


# ---- as a graph: no operation may look at data


def inputs(n):
    y = torch.arange(n) % 4  # 3: no label
    return torch.randn(n, 1, 8, 8), 1000 * torch.rand(n), y


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_export_with_any_number_of_images(strict, labels):
    net = UNet_conditional(1, 1, num_classes=3 if labels else None, **SMALL).eval()
    take = slice(3 if labels else 2)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch},) * len(inputs(2)[take])
    program = torch.export.export(net, inputs(2)[take], dynamic_shapes=shapes, strict=strict)
    graph = program.module()
    for n in (2, 5):
        args = inputs(n)[take]
        close(graph(*args), net(*args), 1e-6)


def test_compiles_in_one_piece():
    net = UNet_conditional(1, 1, num_classes=3, **SMALL)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for args in (inputs(2), inputs(2)[:2]):
        assert torch.equal(compiled(*args), net(*args))
    with pytest.raises(ValueError, match=r"0\.\.2, or 3 for 'no label'"):  # eager still looks
        net(*inputs(2)[:2], torch.tensor([0, 4]))


# ---- bad input


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: UNet(1, 1, **SMALL)(torch.zeros(1, 1, 9, 8), torch.ones(1)),
            "9 x 8.*multiples of 2.*8 x 8 and 10 x 8",
        ),
        (lambda: UNet(1, 1, **SMALL)(torch.zeros(1, 1, 0, 8), torch.ones(1)), "0 x 8"),
        (
            lambda: UNet(3, 3, **SMALL)(torch.zeros(1, 1, 8, 8), torch.ones(1)),
            r"\(B,3,H,W\), not \(1, 1, 8, 8\)",
        ),
        (lambda: UNet(1, 1, **SMALL)(torch.zeros(1, 8, 8), torch.ones(1)), r"not \(1, 8, 8\)"),
        (
            lambda: UNet(1, 1, **SMALL)(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.tensor([1])),
            "takes no labels",
        ),
        (
            lambda: UNet_conditional(1, 1, **SMALL)(
                torch.zeros(1, 1, 8, 8), torch.ones(1), torch.tensor([1])
            ),
            "takes no labels",
        ),
        (
            lambda: UNet(1, 1, **SMALL)(torch.zeros(2, 1, 8, 8), torch.ones(2, 1)),
            r"one clock value per image, not \(2, 1\)",
        ),
        (lambda: check_size((30,), 8), r"^size 30 does.*multiples of 8.*are 24 and 32$"),
        (
            lambda: check_size((5, 30, 8), (1, 8, 8)),
            r"5 x 30 x 8.*multiples of 1 x 8 x 8.*5 x 24 x 8 and 5 x 32 x 8$",
        ),
        (lambda: check_size((0, 30, 8), (1, 8, 8)), "1 x 24 x 8 and 1 x 32 x 8"),
        (lambda: labelled(torch.tensor([4])), r"0\.\.2, or 3 for 'no label'.*\[4\]"),
        (lambda: labelled(torch.tensor([-1])), r"\[-1\]"),
        (lambda: labelled(torch.tensor([1.0])), "whole numbers"),
        (lambda: labelled(torch.tensor([[1]])), "one per image"),
        (lambda: DoubleConv(4, 8, residual=True), "4 in, 8 out"),
        (lambda: SelfAttention(10, 4), "10 channels do not divide into 4 heads"),
        (lambda: SelfAttention(10, 0), "0 heads"),
        (lambda: UNet(widths=(64,)), "at least two widths"),
        (lambda: UNet(widths=(8, 8), attention=(2,)), r"levels 0\.\.1"),
        (lambda: UNet(widths=(8, 8), attention=(-1,)), r"levels 0\.\.1"),
        (lambda: timestep_embedding(torch.ones(1), 7), "even, not 7"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def labelled(y):
    return UNet_conditional(1, 1, num_classes=3, **SMALL)(torch.zeros(1, 1, 8, 8), torch.ones(1), y)
