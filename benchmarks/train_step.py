"""Images per second and peak memory of one training step: the source network as the source trains it, the same network
our way, and the light configuration.  python benchmarks/train_step.py [--steps 5] [--rounds 3]

Each of the three runs in its own process, in turn, for several rounds (shared machines drift); the table gives medians.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"
ROWS = dict(source="source network, as the source trains it", ours="the same network, our way", light="light network, our way")


class SourceAttention(nn.Module):
    "As the source has it: nn.MultiheadAttention with its default, which returns (and so computes) the attention weights."
    def __init__(self, channels, heads=4):
        super().__init__()
        self.mha, self.norm = nn.MultiheadAttention(channels, heads, batch_first=True), nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        normed = self.norm(tokens)
        tokens = tokens + self.mha(normed, normed, normed)[0]
        return (tokens + self.mlp(tokens)).transpose(1, 2).reshape(B, C, H, W)


def source_step(x, y, device):
    "float32, attention weights requested, AdamW parameter by parameter, EMA parameter by parameter, loss read every step."
    import copy

    from ddpm_course.process import DDPM
    from ddpm_course.unet import SelfAttention, UNet_conditional
    net = UNet_conditional(num_classes=10)
    for modules in (net.downs_sa, net.ups_sa):
        for i, m in enumerate(modules):
            if isinstance(m, SelfAttention): modules[i] = SourceAttention(m.out.in_features)
    net, process = net.to(device), DDPM().to(device)
    ema, opt = copy.deepcopy(net).requires_grad_(False), torch.optim.AdamW(net.parameters(), lr=3e-4, foreach=False)
    def step():
        t = process.sample_t(len(x), device)
        eps = torch.randn_like(x)
        loss = (net(process.add_noise(x, t, eps), t, y) - eps).pow(2).mean()
        opt.zero_grad(); loss.backward(); opt.step()
        with torch.no_grad():
            for old, new in zip(ema.parameters(), net.parameters()): old.data = old.data * 0.995 + 0.005 * new.data
        loss.item()
    return step


def our_step(x, y, device, light):
    from types import SimpleNamespace

    from ddpm_course.process import DDPM
    from ddpm_course.training import Diffusion
    from ddpm_course.unet import LIGHT, UNet_conditional
    diff = Diffusion(UNet_conditional(num_classes=10, **(LIGHT if light else {})), DDPM(), "eps", tuple(x.shape[1:]), 10, device=device)
    data = SimpleNamespace(train=[(x, y)], valid=[], num_classes=10)
    diff.prepare(data, total_steps=10_000)
    step = lambda: diff.train_step(x, y)
    step.settings = dict(precision=diff.settings.precision, channels_last=diff.settings.channels_last)
    return step


def measure(which, args):
    "One process, one row, one round: median seconds of a step."
    from ddpm_course.core import default_device, peak_memory
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = default_device(args.device)
    x, y = torch.rand(args.batch, 3, args.size, args.size, device=device) * 2 - 1, torch.arange(args.batch, device=device) % 10
    step = source_step(x, y, device) if which == "source" else our_step(x, y, device, which == "light")
    def timed():
        start = time.perf_counter()
        step()
        if device.type == "cuda": torch.cuda.synchronize()
        return time.perf_counter() - start
    timed()
    n = args.steps * (10 if which == "light" else 1)
    seconds = statistics.median(timed() for _ in range(n))
    print(json.dumps(dict(images_per_second=args.batch / seconds, peak_gb=peak_memory(), **getattr(step, "settings", dict(precision="float32", channels_last=False)))))


def machine():
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    cpu = Path("/proc/cpuinfo")
    if name == "CPU" and cpu.exists(): name = next((line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")), name)
    return name


def main():
    p = argparse.ArgumentParser(description=__doc__)
    for name, default in dict(steps=5, rounds=3, batch=32, size=32, threads=2).items(): p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--device"); p.add_argument("--row", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.row: return measure(args.row, args)
    rows = {k: [] for k in ROWS}
    for _ in range(args.rounds):
        for k in ROWS:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", k], capture_output=True, text=True)
            if done.returncode: sys.exit(done.stderr)
            rows[k].append(json.loads(done.stdout.splitlines()[-1]))
    base = [r["images_per_second"] for r in rows["source"]]
    print(f"| training step, batch {args.batch}, {args.size}x{args.size} | images/s | times the source | peak memory | precision | channels_last |\n|---|---|---|---|---|---|")
    for k, found in rows.items():
        ratios = [r["images_per_second"] / b for r, b in zip(found, base)]
        last = found[-1]
        print(f"| {ROWS[k]} | {statistics.median(r['images_per_second'] for r in found):.1f} | {statistics.median(ratios):.2f} | "
              f"{max(r['peak_gb'] for r in found):.1f} GB | {last['precision']} | {last['channels_last']} |")
    RESULTS.mkdir(exist_ok=True)
    import ddpm_course
    (RESULTS / "train_step.json").write_text(json.dumps(dict(
        date=str(date.today()), machine=machine(), python=sys.version.split()[0], torch=torch.__version__, ddpm_course=ddpm_course.__version__,
        settings=vars(args), rows=rows), indent=1) + "\n")


if __name__ == "__main__": main()
