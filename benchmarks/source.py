"""What is compared with: network and training step of the course's source, mistakes and all."""

import copy
import random

import torch
from torch import nn

from ddpm_course.process import DDPM
from ddpm_course.unet import SelfAttention, UNet_conditional


class SourceAttention(nn.Module):
    """nn.MultiheadAttention with its default, which returns (and so computes) the weights."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.mha = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, channels),
            nn.GELU(),
            nn.Linear(channels, channels),
        )

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        normed = self.norm(tokens)
        tokens = tokens + self.mha(normed, normed, normed)[0]
        return (tokens + self.mlp(tokens)).transpose(1, 2).reshape(x.shape)


def source_net(channels: int, num_classes: int) -> nn.Module:
    net = UNet_conditional(channels, channels, num_classes=num_classes)
    for modules in (net.downs_sa, net.ups_sa):
        for i, m in enumerate(modules):
            modules[i] = SourceAttention(m.out.in_features)
    assert not any(isinstance(m, SelfAttention) for m in net.modules())
    return net


class SourceTrainer:
    """How the source trains.

    float32 (its mixed precision was never on), labels dropped for a whole batch at once, AdamW and
    EMA parameter by parameter, a one-cycle learning rate, EMA that only copies for 2,000 steps, the
    loss read after every step.
    """

    def __init__(self, shape, num_classes, device, lr=3e-4, steps=10_000):
        self.net = source_net(shape[0], num_classes).to(device)
        self.process = DDPM().to(device)
        self.device = device
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.opt = torch.optim.AdamW(self.net.parameters(), lr=lr, foreach=False)
        self.sched = torch.optim.lr_scheduler.OneCycleLR(self.opt, lr, total_steps=steps + 1)
        self.done = 0

    def step(self, x, y) -> float:
        t = self.process.sample_t(len(x), self.device)
        eps = torch.randn_like(x)
        loss = (
            (
                self.net(self.process.add_noise(x, t, eps), t, None if random.random() < 0.1 else y)
                - eps
            )
            .pow(2)
            .mean()
        )
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        self.done += 1
        beta = 0.995 if self.done > 2000 else 0.0
        with torch.no_grad():
            for old, new in zip(self.ema.parameters(), self.net.parameters()):
                old.data = old.data * beta + (1 - beta) * new.data
        return loss.item()
