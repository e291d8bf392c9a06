"""What one would use instead, each trained as its own project trains it: a class with step(x, y),
sample(n) and the recipe in words."""

import torch
from source import SourceTrainer


class Peer:
    """Images come in as floats in [-1, 1] and go out like that. `conditional`: asked for a class,
    and told it in training."""

    # whole: its schedule needs to know the length, so every budget is a training of its own
    conditional, whole = True, False
    seen = 0  # images so far

    # their own settings on a GPU are mixed precision; on a CPU all of them compute in float32
    def precision(self):
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())


class Source(Peer):
    batch, whole = 32, True
    recipe = (
        "AdamW, one-cycle 3e-4, batch 32, eps, linear; sampled like ours, guidance 2, 20 steps (its"
        " own way evaluates the network 50 times as often; looked at after 6,400 images, 100"
        " ancestral steps draw blobs where these draw noise, and neither draws digits)"
    )

    def __init__(self, shape, num_classes, device, lr=None):
        from ddpm_course.process import DDPM
        from ddpm_course.training import Diffusion

        self.trainer = SourceTrainer(shape, num_classes, device, lr or 3e-4, steps=1000)
        self.ticks = 1000
        self.device, self.net = device, self.trainer.net
        self.sampler = Diffusion(self.trainer.ema, DDPM(), "eps", shape, num_classes, device=device)

    def at(self, share: float):  # the one-cycle schedule, walked by the clock
        while self.trainer.sched.last_epoch < min(share, 1) * self.ticks:
            self.trainer.sched.step()

    def step(self, x, y):
        self.trainer.step(x, y)

    def sample(self, labels):
        return self.sampler.sample(labels, use_ema=False, cfg_scale=2.0, n_steps=20, seed=0)


def without_bars():
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as module

    module.tqdm = lambda steps, **kw: steps


class Lucidrains(Peer):
    batch, conditional = 16, False
    recipe = (
        "its Trainer's defaults: Adam 1e-4, batch 16, v, sigmoid, EMA 0.995; its DDIM, 50 steps"
    )

    def __init__(self, shape, num_classes, device, lr=None):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        without_bars()
        self.device, self.net = device, Unet(dim=32, channels=shape[0])
        self.model = GaussianDiffusion(self.net, image_size=shape[1], sampling_timesteps=50).to(
            device
        )
        self.opt = torch.optim.Adam(self.model.parameters(), lr=lr or 1e-4, betas=(0.9, 0.99))
        self.ema = EMA(self.model, beta=0.995, update_every=10).to(device)

    def step(self, x, y):
        with self.precision():
            loss = self.model((x + 1) / 2)  # it wants images in [0, 1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()
        self.opt.zero_grad()
        self.ema.update()
        return loss.item()

    def sample(self, labels):
        self.ema.ema_model.eval()
        with self.precision():
            return (
                torch.cat(
                    [self.ema.ema_model.sample(len(part)).float() for part in labels.split(100)]
                )
                * 2
                - 1
            )


class Diffusers(Peer):
    batch = 32
    recipe = (
        "the defaults of its DDPMScheduler: eps, linear; Adam 1e-3 as in Hugging Face's"
        " class-conditional MNIST lesson, batch 32; sampled by the same scheduler, 50 steps. Tried"
        " for 300 s and no better for it: the cosine schedule, Adam 3e-4, its DDIM"
    )

    def __init__(self, shape, num_classes, device, lr=None):
        from diffusers import DDPMScheduler, UNet2DModel

        self.device = device
        self.net = UNet2DModel(
            sample_size=shape[1],
            in_channels=shape[0],
            out_channels=shape[0],
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=num_classes,
        ).to(device)
        self.noise = DDPMScheduler(num_train_timesteps=1000)
        self.opt = torch.optim.Adam(self.net.parameters(), lr=lr or 1e-3)

    def step(self, x, y):
        eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
        with self.precision():
            loss = torch.nn.functional.mse_loss(
                self.net(self.noise.add_noise(x, eps, t), t, y).sample, eps
            )
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss.item()

    @torch.no_grad()
    def sample(self, labels):
        self.net.eval()
        self.noise.set_timesteps(50)
        done = [
            self.walk(
                torch.randn(
                    len(y),
                    self.net.config.in_channels,
                    *[self.net.config.sample_size] * 2,
                    device=self.device,
                ),
                y.to(self.device),
            )
            for y in labels.split(100)
        ]
        self.net.train()
        return torch.cat(done)

    def walk(self, x, y):
        for t in self.noise.timesteps:
            with self.precision():
                eps = self.net(x, t, y).sample
            x = self.noise.step(eps.float(), t, x).prev_sample
        return x


PEERS = dict(source=Source, denoising_diffusion_pytorch=Lucidrains, diffusers=Diffusers)
