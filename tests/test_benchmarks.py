"""The benchmarks run, write what they measured, and README shows what they wrote."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import QUICK, tiny_diffusion, tiny_dls
from PIL import Image

from ddpm_course.checkpoint import newest
from ddpm_course.model import make_process
from ddpm_course.process import DDPM
from ddpm_course.training import Diffusion

ROOT = Path(__file__).resolve().parent.parent

SCRIPTS = (
    "start_up",
    "memory",
    "train_step",
    "samplers",
    "networks",
    "time_to_quality",
    "families",
)


@pytest.fixture
def bench(monkeypatch):
    "Import a module of benchmarks/."
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in (*SCRIPTS, "bench", "tables", "quality", "peers", "source"):
        sys.modules.pop(name, None)


def run(bench, name: str, tmp_path, *options) -> list:
    "A quick run; the rows that it wrote."
    bench(name).main(
        ["--quick", "--threads", "1", "--device", "cpu", "--out", str(tmp_path), *options]
    )
    return json.loads((tmp_path / f"{name}.json").read_text())


def test_readme_shows_what_the_results_say(bench):
    assert bench("tables").main(["--check"]) is None
    assert set(
        re.findall("<!-- bench:(.*?) -->", (ROOT / "README.md").read_text(encoding="utf-8"))
    ) == {p.stem for p in (ROOT / "benchmarks/results").glob("*.json")}


def test_a_number_changed_by_hand_is_found_and_put_right(bench, tmp_path):
    tables, readme = bench("tables"), tmp_path / "README.md"
    args = ["--readme", str(readme), "--results", str(ROOT / "benchmarks/results")]
    good = (
        f"before\n<!-- bench:train_step -->\n{tables.table('train_step')}\n<!-- /bench -->\nafter\n"
    )
    readme.write_text(good.replace("| source network", "| another network"))
    assert "+| source network" in tables.main([*args, "--check"]) and readme.read_text() != good
    assert tables.main(args) is None and readme.read_text() == good


def test_a_marker_without_its_end_is_an_error(bench):
    for text in (
        "<!-- bench:memory -->\n",
        "<!-- /bench -->",
        "<!-- bench:memory -->\n<!-- bench:samplers -->\n<!-- /bench -->",
    ):
        with pytest.raises(ValueError, match="needs its"):
            bench("tables").filled(text)


def test_what_was_not_measured_says_so(bench, tmp_path):
    assert (
        bench("tables").filled("<!-- bench:memory -->\nold\n<!-- /bench -->", tmp_path)
        == "<!-- bench:memory -->\n*Not measured yet.*\n<!-- /bench -->"
    )


@pytest.mark.parametrize(
    "x, says",
    [
        (1234567, "1,234,567"),
        (1234.4, "1,230"),
        (12.345, "12.3"),
        (9.996, "10.0"),
        (0.012345, "0.0123"),
        (-0.5, "-0.500"),
        (0.0, "0"),
        (float("nan"), "nan"),
        (None, ""),
        (True, "True"),
        ("a", "a"),
    ],
)
def test_numbers_are_short(bench, x, says):
    assert bench("bench").short(x) == says


def test_seeds_are_summed_up_by_mean_and_half_range(bench):
    over_seeds = bench("bench").over_seeds
    assert (
        over_seeds([0.0161, 0.0161001]) == "0.0161 ± 0.0000"
        and over_seeds([0.25, 0.26]) == "0.255 ± 0.0050"
    )
    assert (
        over_seeds([1.0, 2.0, 6.0]) == "3.00 ± 2.5"
        and over_seeds([4.0]) == "4.00"
        and over_seeds([]) == over_seeds([None]) == ""
    )


def test_a_row_replaces_the_one_with_its_key_and_no_other(bench, tmp_path):
    args = SimpleNamespace(out=tmp_path, device=torch.device("cpu"), threads=1, steps=3)
    results = bench("bench").Results("r", args, ("model", "seed"))
    for model, seed, fid in (("a", 0, 1), ("a", 1, 2), ("b", 0, 3), ("a", 1, 4)):
        results.add(model=model, seed=seed, fid=fid)
    again = bench("bench").Results("r", args, ("model", "seed"))
    assert [(r["model"], r["seed"], r["fid"]) for r in again.rows] == [
        ("a", 0, 1),
        ("b", 0, 3),
        ("a", 1, 4),
    ]
    assert {"date", "commit", "machine", "threads", "versions", "settings"} == again.rows[0][
        "run"
    ].keys() and again.rows[0]["run"]["settings"] == dict(steps=3)
    assert (
        again.rows[0]["run"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )


def ttq_row(model, budget, fid, seed=0, guidance=None):
    return dict(
        model=model,
        budget=budget,
        seed=seed,
        guidance=guidance,
        lr=None,
        quality=[dict(n=200, fid_classifier=fid)],
    )


@pytest.mark.parametrize(
    "fids, says",
    [
        ({60: 90, 300: 50, 600: 20, 1200: 9, 1800: 8}, "1200 s"),
        ({60: 90, 300: 50, 1800: 20}, "not in 30 min"),
        ({60: 90, 300: 50}, "not in 5.0 min"),
        ({60: 90}, ""),
        ({60: 8, 300: 20}, "60 s"),
    ],
)
def test_when_a_peer_is_as_good_as_ours(bench, fids, says):
    ttq = bench("time_to_quality")
    ours = [ttq_row("ours", 300, fid, seed, 2) for seed, fid in enumerate((8, 9, 10))] + [
        ttq_row("ours", 300, 99, 0, 1),
        ttq_row("ours", 60, 99, 0, 2),
    ]
    assert (
        ttq.verdict(ours + [ttq_row("diffusers", b, f) for b, f in fids.items()], "diffusers")
        == says
    )


def test_training_stops_by_the_clock_and_goes_on(bench):
    ttq, shares = bench("time_to_quality"), []
    peer = SimpleNamespace(whole=True, seen=0, at=shares.append, step=lambda x, y: None)
    batches = iter([(torch.zeros(4, 1), torch.zeros(4))] * 10**6)
    first = ttq.train(peer, batches, 0.02, 0.05, "cpu")
    seen = peer.seen
    assert (
        first >= 0.05
        and seen > 0
        and seen % 4 == 0
        and shares[0] == pytest.approx(0.4)
        and max(shares) < 1
    )
    assert ttq.train(peer, batches, first, 0.05, "cpu") == first and peer.seen == seen
    assert ttq.train(peer, batches, first, first + 0.01, "cpu") > first and peer.seen > seen


def test_training_by_images_stops_where_a_quiet_machine_would(bench):
    ttq, shares = bench("time_to_quality"), []
    peer = SimpleNamespace(whole=True, seen=0, at=shares.append, step=lambda x, y: None)
    ttq.train(
        peer, iter([(torch.zeros(4, 1), torch.zeros(4))] * 100), 0.0, 12, "cpu", rate=6.0, begun=2.0
    )
    assert (
        peer.seen == 60
        and shares[0] == pytest.approx(2 / 12)
        and shares[-1] == pytest.approx((2 + 56 / 6) / 12)
    ), "what comes before the first step counts once"
    row = ttq_row("diffusers", 60, 90) | dict(
        by="clock", seen=500, seconds=60.0, begun=10.0, sampling=50.0, run=dict(date="today")
    )
    told = ttq.quiet([row], "diffusers", None)
    assert told == dict(seen=500, seconds=60.0, begun=10.0, per_sample=0.25, run=dict(date="today"))
    assert (
        ttq.quiet([row | dict(by="images", clock=told, seen=1, seconds=1.0)], "diffusers", None)
        == told
    ), "what the clock said outlives the row that it said it of"
    for rows in ([], [row | dict(by="images")], [row | dict(lr=1.0)], [row | dict(model="source")]):
        with pytest.raises(SystemExit, match="by-images needs"):
            ttq.quiet(rows, "diffusers", None)


def test_ours_by_images_trains_for_the_budget_at_the_median_speed(bench, tmp_path):
    rows = run(bench, "time_to_quality", tmp_path, "--only", "ours", "--guidance", "2")
    with pytest.raises(SystemExit, match="by-images needs rows of ours"):
        run(
            bench,
            "time_to_quality",
            tmp_path / "none",
            "--only",
            "ours",
            "--guidance",
            "2",
            "--by-images",
        )
    again = run(
        bench, "time_to_quality", tmp_path, "--only", "ours", "--guidance", "2", "--by-images"
    )
    (first,), (row,) = rows, again
    rate = first["seen"] / first["seconds"]
    assert (
        first["by"] == "clock"
        and row["by"] == "images"
        and row["clock"]["seen"] == first["seen"]
        and row["clock"]["run"] == first["run"]
    )
    assert (
        row["seconds"] == pytest.approx(row["seen"] / rate)
        and abs(row["seconds"] - row["budget"]) <= 32 / rate
        and row["sampling"] == pytest.approx(first["sampling"])
    )


def test_the_source_drops_labels_for_the_whole_batch_and_copies_its_ema_at_first(
    bench, monkeypatch
):
    source = bench("source")
    trainer = source.SourceTrainer((1, 16, 16), 3, torch.device("cpu"))
    assert trainer.net.config == source.UNet_conditional(1, 1, num_classes=3).config
    told = []
    trainer.net.register_forward_pre_hook(lambda m, args: told.append(args[2]))
    for drawn in (0.05, 0.5):
        monkeypatch.setattr(source.random, "random", lambda: drawn)
        trainer.step(torch.zeros(2, 1, 16, 16), torch.tensor([0, 1]))
    assert told[0] is None and told[1].tolist() == [0, 1]
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.ema.parameters(), trainer.net.parameters())
    )


@pytest.fixture
def diff():
    d = tiny_diffusion()
    return Diffusion(d.model.net, DDPM(1000, "cosine"), "v", d.shape, d.num_classes, device="cpu")


def same_noise(monkeypatch, diff, y, seed=0):
    "The peers draw what diff.sample(y, seed=seed) starts from."
    kept = {}
    diff.sample(y, n_steps=1, seed=seed, callback=lambda **kw: kept.update(kw))
    monkeypatch.setattr(torch, "randn", lambda *shape, **kw: kept["x"].clone())


@pytest.mark.parametrize("n", [4, 10])
def test_diffusers_walks_our_network_on_our_grid(diff, bench, monkeypatch, n):
    """DDIM from the same noise gives the same images: labels, guidance, times and scales are handed
    over rightly."""
    samplers, y = bench("samplers"), torch.tensor([0, 1, 2, 1])
    ours = diff.sample(y, cfg_scale=samplers.SCALE, n_steps=n, seed=0)
    same_noise(monkeypatch, diff, y)
    theirs = samplers.by_diffusers("DDIMScheduler", n)(diff, y)
    assert torch.allclose(theirs, ours, atol=2e-4) and theirs.std() > 0.1


def test_denoising_diffusion_pytorch_walks_our_network_on_our_grid(diff, bench, monkeypatch):
    pytest.importorskip("denoising_diffusion_pytorch", reason="comes with the extra 'bench'")
    samplers, y = bench("samplers"), torch.tensor([0, 1, 2, 1])
    ours = diff.sample(y, cfg_scale=samplers.SCALE, n_steps=10, seed=0)
    same_noise(monkeypatch, diff, y)
    assert torch.allclose(samplers.by_lucidrains(10)(diff, y), ours, atol=2e-4)


def test_quick_samplers(bench, tmp_path):
    rows = run(bench, "samplers", tmp_path, "--only", "ours", "diffusers", "source")
    evaluations = {(r["sampler"], r["steps"]): (r["evaluations"], r["calls"]) for r in rows}
    assert [r["seed"] for r in rows if r["library"] == "ddpm_course"] == [0, 1] and {
        r["rounds"] for r in rows
    } == {1}
    assert evaluations == {
        ("euler", 5): (5, 5),
        ("DDIMScheduler", 5): (5, 5),
        ("DPMSolverMultistepScheduler", 5): (5, 5),
        ("UniPCMultistepScheduler", 5): (5, 5),
        ("EulerDiscreteScheduler", 5): (5, 5),
        ("ancestral, two passes", 9): (9, 18),
    }
    assert all(
        r["seconds"] > 0
        and r["fid_classifier"] > 0
        and r["floor_random"] > 0
        and 0 <= r["accuracy"] <= 1
        for r in rows
    )


def test_no_image_is_drawn_twice(diff, bench):
    "Each chunk has noise of its own, and another seed has other noise."
    samplers, y = bench("samplers"), torch.tensor([0, 1, 2]).repeat(4)
    drawn = [
        samplers.measure(samplers.ours("euler", 2), diff, y, 3, seed)["images"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and len(torch.cat(drawn[1:]).unique(dim=0)) == 24


def test_a_race_takes_turns_and_counts_the_median(bench, monkeypatch):
    samplers, turns, clock = (
        bench("samplers"),
        [],
        iter([0, 1, 1, 5, 5, 14, 14, 16, 16, 18, 18, 21]),
    )
    monkeypatch.setattr(samplers, "measure", lambda run, diff, y, chunk: turns.append(run))
    monkeypatch.setattr(bench("bench").time, "perf_counter", lambda: next(clock))
    assert (
        samplers.timed(dict(a="A", b="B"), None, [0], 3) == dict(a=2, b=3)
        and turns == ["A", "B"] * 3
    )  # a took 1, 9, 2; b took 4, 2, 3


def test_only_the_clock_of_a_row_is_set_anew(bench, tmp_path):
    args = SimpleNamespace(out=tmp_path, device=torch.device("cpu"), threads=1)
    results = bench("bench").Results("r", args, ("model", "seed"))
    for model, seed in (("a", 0), ("a", 1), ("b", 0)):
        results.add(model=model, seed=seed, fid=3)
    before = results.rows
    results.update(("model",), {("a",): dict(seconds=5)})
    assert results.rows == [before[0] | dict(seconds=5), before[1] | dict(seconds=5), before[2]]


def test_the_floor_is_of_images_asked_for_as_samples_are(bench):
    quality = bench("quality").Quality.__new__(bench("quality").Quality)
    quality.train = SimpleNamespace(
        labels=torch.tensor([0] * 5 + [1] * 20 + [2] * 9), images=torch.arange(34)
    )
    for classes, n, counts in ((3, 9, [3, 3, 3]), (3, 11, [4, 4, 3])):
        quality.classes = classes
        drawn = quality.real(n, torch.Generator().manual_seed(0))
        assert (
            quality.train.labels[drawn].bincount().tolist() == counts and len(drawn.unique()) == n
        )
    quality.classes = 0
    assert len(quality.real(7, torch.Generator().manual_seed(0)).unique()) == 7


def test_quick_networks(bench, tmp_path):
    networks = bench("networks")
    rows = run(bench, "networks", tmp_path, "--only", "light", "no attention")
    assert (
        [r["shape"] for r in rows] == ["light", "no attention"]
        and rows[0]["flops"] > rows[1]["flops"]
        and rows[0]["parameters"] > rows[1]["parameters"]
    )
    assert all(
        r["seen"] == max(int(0.1 * r["speed"] / 32), 1) * 32 and r["fid_random"] > 0 for r in rows
    )
    from ddpm_course.light_unet import LightUNet

    assert (
        LightUNet(1, 1, 10, **networks.SHAPES["light"][1]).config == LightUNet(1, 1, 10).config
    ), "the first row is the default"


def test_quick_time_to_quality(bench, tmp_path):
    peers = [
        "diffusers",
        *["denoising_diffusion_pytorch"]
        * (importlib.util.find_spec("denoising_diffusion_pytorch") is not None),
    ]  # the extra 'bench'
    rows = run(bench, "time_to_quality", tmp_path, "--only", "ours", *peers)
    assert [(r["model"], r["guidance"], [q["n"] for q in r["quality"]]) for r in rows] == [
        ("ours", 2, [6, 12]),
        ("ours", 1.5, [6, 12]),
        ("ours", 1, [6, 12]),
        *((p, None, [6]) for p in peers),
    ]
    assert all(r["seen"] > 0 and r["seconds"] > 0 and r["sampling"] > 0 for r in rows)
    assert [r["quality"][0]["accuracy"] is None for r in rows] == [
        r["model"] == "denoising_diffusion_pytorch" for r in rows
    ], "it has no labels"


def test_quick_families(bench, tmp_path, monkeypatch):
    """Rows, table, picture; run again, the kept models are used, and a family that is added gets
    the same training."""
    families = bench("families")
    rows = run(
        bench, "families", tmp_path, "--only", "ve", "flow", "--picture", str(tmp_path / "p.png")
    )
    real, drawn = rows[0], rows[1:]
    assert [(r["family"], r["predict"], r["evaluations"]) for r in drawn] == [
        ("ve", "edm", 2),
        ("ve", "edm", 3),
        ("flow", "velocity", 2),
        ("flow", "velocity", 3),
    ]
    assert (
        len({json.dumps(r["recipe"]) for r in drawn}) == 1
        and {r["recipe"]["total_steps"] for r in drawn} == {3}
        and {r["training"]["seen"] for r in drawn} == {96}
    )
    assert all(
        0 < r["bits"] < 1e4 for r in drawn
    ), "a bound for every family, also where alpha is 0 at the noise end"
    assert all(0 <= r[k] <= 1 for r in rows for k in ("precision", "recall", "accuracy")) and all(
        r["fid_classifier"] > 0 for r in rows
    )
    assert (
        real["family"] == "real"
        and real["fid_classifier"] == real["floor_classifier"] == drawn[0]["floor_classifier"]
    )
    assert Image.open(tmp_path / "p.png").size == (10 * 17 + 1, 2 * 17 + 1)  # a row for each family
    table = families.table(rows)
    assert (
        table.count("\n| ") == 2 + len(drawn)
        and "| flow matching | the velocity eps - x0 | " in table
        and "3 steps of training each (96 images" in table
    )

    def never(*args, **kw):
        raise AssertionError("trained again")

    with monkeypatch.context() as m:
        m.setattr(Diffusion, "fit", never)
        again = [
            r for r in run(bench, "families", tmp_path, "--only", "flow") if r["family"] == "flow"
        ]
    assert [r["fid_random"] for r in again] == pytest.approx(
        [r["fid_random"] for r in drawn[2:]], rel=1e-3
    ) and [r["training"] for r in again] == [r["training"] for r in drawn[2:]]

    def earlier(**kw):
        return families.Bench.earlier(
            SimpleNamespace(
                budget=0,
                args=SimpleNamespace(**dict(steps=None, data="mnist") | kw),
                results=SimpleNamespace(rows=rows),
            )
        )

    assert (
        earlier() == earlier(steps=3) == drawn[0]["recipe"]
        and earlier(steps=4) is earlier(data="cifar10") is None
    )


def test_all_families_start_from_the_same_noise(bench):
    families, starts = bench("families"), []
    for name in families.NAMES:
        d = tiny_diffusion()
        diff = Diffusion(
            d.model.net,
            make_process(name),
            families.chosen(name)[1],
            d.shape,
            d.num_classes,
            device="cpu",
        )
        got = []
        families.drawn(diff, torch.tensor([0, 1]), 2, SimpleNamespace(guidance=1.0), "float32", 5)
        diff.sample(
            [0, 1], n_steps=2, seed=5, callback=lambda i, x, **_: got.append(x) if i == 0 else None
        )
        starts.append(got[0] / diff.process.sigma(torch.tensor([float(diff.process.t_max)])).item())
    for s in starts[1:]:
        torch.testing.assert_close(s, starts[0], rtol=1e-5, atol=1e-5)


def test_evaluations_are_counted_and_a_guided_one_counts_once(bench):
    families, diff = bench("families"), tiny_diffusion()
    for guidance in (1.0, 2.0):
        images, _, evaluations = families.drawn(
            diff, torch.arange(5) % 3, 4, SimpleNamespace(guidance=guidance), "float32", 0
        )
        assert evaluations == 4 and images.shape == (5, 1, 8, 8)


def test_families_predict_what_the_command_line_does_or_what_is_asked_for(bench):
    families = bench("families")
    assert [families.chosen(k) for k in families.NAMES] == [
        ("ddpm", "x0"),
        ("vp", "x0"),
        ("ve", "edm"),
        ("edm", "edm"),
        ("flow", "velocity"),
    ]
    assert families.chosen("flow:x0") == ("flow", "x0") and all(
        families.chosen(k)[1] in families.SAYS for k in families.NAMES
    )
    for name, says in (
        ("flow:eps", "divides by alpha"),
        ("flows", "Did you mean 'flow'"),
        ("ve:noise", "unknown prediction"),
    ):
        with pytest.raises(ValueError, match=says):
            families.chosen(name)


def some_code():
    """Two lines
    of words."""
    # a comment

    # fmt: off
    def inner(): "words"  # one line, that holds code
    x = [1,
         2]  # two lines
    # fmt: on
    "not a docstring"
    return inner, x


def test_lines_of_code_are_counted_without_words(bench):
    families = bench("families")
    assert families.code_lines(some_code) == 6
    lines = {name: families.family_lines(*families.chosen(name)) for name in families.NAMES}
    assert all(
        5 < process <= 80 and 2 <= prediction <= 12 for process, prediction in lines.values()
    ), lines
    edm = make_process("edm")
    assert lines["edm"][0] > families.code_lines(type(edm)), "with the grid that it calls"


def test_quick_train_step(bench, tmp_path):
    (row,) = run(bench, "train_step", tmp_path, "--only", "light")
    assert (
        row["row"] == "light"
        and row["images_per_second"] > 0
        and 0 < row["flops"] < 2 * row["peak_flops"]
    )


def test_flops_of_attention_are_counted_however_it_is_computed(bench):
    from ddpm_course.unet import UNet_conditional

    x, y = torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])
    flops = bench("train_step").flops
    assert flops(UNet_conditional(3, 3, num_classes=10), x, y) == flops(
        bench("source").source_net(3, 10), x, y
    ), "the same network with another call of attention"


def test_flops_are_those_of_a_convolution(bench):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x, t, y):
            return self.conv(x)

    assert bench("train_step").flops(Net(), torch.zeros(2, 3, 8, 8), None) == 2 * 2 * (
        2 * 8 * 8 * 5 * 3 * 9
    )  # forward, and the weights' gradient


def test_quick_start_up_and_memory(bench, tmp_path):
    (row,) = run(bench, "start_up", tmp_path, "--lessons")
    assert 0 < row["ddpm_course"] < row["torch"] + 5
    rows = run(bench, "memory", tmp_path)
    assert [(r["net"], r["what"]) for r in rows] == [
        ("light", "train"),
        ("light", "sample"),
    ] and all(r["peak"] >= r["idle"] > 0.05 for r in rows)


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("memory", "--device xyz", "unknown device 'xyz'"),
        ("memory", "--threads 0", "'0' is not a whole number from 1 up"),
        ("memory", "--sizes 16 -1", "'-1' is not a whole number"),
        ("memory", "--batches x", "'x' is not a whole number"),
        ("samplers", "--n 0", "argument --n: '0'"),
        ("train_step", "--batch 1.5", "argument --batch: '1.5'"),
        ("families", "--only flow flows", "Did you mean 'flow'?"),
        ("families", "--steps 0", "argument --steps"),
        ("families", "--data mnits", "invalid choice"),
        ("start_up", "--lessons nope.ipynb", "there is no notebook nope.ipynb"),
        ("start_up", "--lessons README.md", "there is no notebook README.md"),
    ],
)
def test_a_bad_option_is_told_in_a_line_before_anything_is_measured(
    bench, tmp_path, capsys, monkeypatch, name, options, says
):
    module = bench(name)
    monkeypatch.setattr(module, "Results", lambda *a: pytest.fail("began"))
    with pytest.raises(SystemExit) as e:
        module.main(["--quick", "--out", str(tmp_path), *options.split()])
    assert e.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_is_none_is_told_in_a_line(bench, tmp_path):
    begin, args = bench("bench").begin, dict(quick=False, threads=1, device="cpu", out=tmp_path)
    with pytest.raises(SystemExit, match=f"--run {tmp_path}/none: no run folder"):
        begin(SimpleNamespace(**args, run=tmp_path / "none"))
    tiny_diffusion().fit(tiny_dls(), 1, run=tmp_path / "run", loggers=[], progress=False, **QUICK)
    for run in (None, tmp_path / "run", newest(tmp_path / "run")):
        begin(SimpleNamespace(**args, run=run))


def test_the_help_of_a_number_says_what_it_is(bench, capsys):
    p = bench("bench").parser("doc", **dict.fromkeys(bench("bench").HELP, 7))
    text = re.sub(r"\s+", " ", p.format_help())
    for name, words in bench("bench").HELP.items():
        assert (
            f"--{name} N {words} (7)" in text
            and p.parse_args([f"--{name}", "3"])
            and len(words) > 10
        )


def test_a_machine_is_told_from_another_of_that_name(bench, monkeypatch):
    module = bench("bench")
    cpu = (
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t:"
        " AMD EPYC\n\nprocessor\t: 1\nmodel\t\t: 3\n"
    )
    monkeypatch.setattr(
        module, "Path", lambda p: SimpleNamespace(exists=lambda: True, read_text=lambda: cpu)
    )
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    assert module.machine(torch.device("cpu")) == "AMD EPYC (family 26, model 2, 2 CPUs)"
    monkeypatch.setattr(module, "Path", lambda p: SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(module.platform, "processor", lambda: "arm")
    assert module.machine(torch.device("cpu")) == "arm (2 CPUs)"


def test_results_of_a_gpu_get_a_place_behind_those_of_the_cpu(bench, tmp_path):
    tables, readme, results = bench("tables"), tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    for name in ("memory", "memory-gpu", "start_up"):
        (results / f"{name}.json").write_text(
            (ROOT / f"benchmarks/results/{name.split('-')[0]}.json").read_text()
        )
    readme.write_text(
        "a\n<!-- bench:memory -->\n<!-- /bench -->\nb\n<!-- bench:start_up -->\n<!-- /bench -->\n"
    )
    args = ["--readme", str(readme), "--results", str(results)]
    assert "bench:memory-gpu" in tables.main([*args, "--check"])
    assert tables.main(args) is None and tables.main([*args, "--check"]) is None
    text = readme.read_text()
    assert (
        re.findall("<!-- bench:(.*?) -->", text) == ["memory", "memory-gpu", "start_up"]
        and text.count(tables.table("memory", results)) == 2
    )
    assert tables.main(args) is None and readme.read_text() == text, "once"


def test_tables_say_in_what_precision_and_on_how_many_threads(bench):
    run = dict(machine="m", threads=2, versions={}, date="2026-01-01")
    memory = [
        dict(net=net, what=what, size=size, batch=8, peak=1.0, idle=0.5, run=run)
        for net, what, size in (
            ("light", "train", 32),
            ("light", "train", 128),
            ("full", "train", 32),
            ("light", "sample", 32),
            ("light", "sample", 128),
            ("full", "sample", 32),
        )
    ]
    table, lessons = bench("memory").table, bench("start_up").table(
        [dict(what="02_forward", seconds=1.0, run=run)]
    )
    assert (
        "Training is in float32 with channels_last, sampling in float32. An empty cell was not"
        " measured"
        in table(memory)
    )
    assert "in bfloat16 with" in table(
        [r | dict(precision="bfloat16" if r["what"] == "train" else "float32") for r in memory]
    )
    assert "empty cell" not in table([r for r in memory if r["size"] == 32])
    assert "one thread" in lessons and "2 threads" not in lessons


def test_start_up_is_measured_on_one_thread_and_says_so(bench, tmp_path):
    (row,) = run(bench, "start_up", tmp_path, "--lessons", "--threads", "2")
    assert row["run"]["threads"] == 1
