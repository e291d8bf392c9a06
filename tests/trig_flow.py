"A process of one's own: x_t = cos(t) x0 + sin(t) eps (Lu and Song 2025)."

import math

import torch

from ddpm_course.core import enter
from ddpm_course.process import Process


@enter("process", "trig")
class TrigFlow(Process):
    t_max = math.pi / 2

    def alpha(self, t):
        return torch.cos(t)

    def sigma(self, t):
        return torch.sin(t)
