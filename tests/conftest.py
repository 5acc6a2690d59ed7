"""Shared by all tests: the repository on the path, one thread for each of several test processes,
and a denoiser small enough to reason about."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"                      # for the commands that tests start
    torch.set_num_threads(1)

import adt  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
from denoiser import Denoiser  # noqa: E402


class Toy(Denoiser):
    """Any target on any schedule; the network is one smooth nonlinear layer, in float64,
    so identities are exact."""

    def __init__(self, target="flow", alpha=None, sigma=None):
        if alpha is None:
            alpha, sigma, _ = models.tables(target)
        super().__init__(target, alpha, sigma, torch.arange(len(alpha)) / len(alpha))
        self.network = torch.nn.Conv2d(2, 2, 3, padding=1)
        self.double()
        self.alpha, self.sigma = alpha.double(), sigma.double()            # not rounded to float32 on the way
        self.calls = []

    def output(self, x, time, cond):
        self.calls.append((x.detach().clone(), time.clone(), torch.is_grad_enabled()))
        return torch.tanh(self.network(x)) * (1 + time.view(-1, 1, 1, 1)) * cond["scale"].view(-1, 1, 1, 1)

    def encode(self, image):
        return image

    def decode(self, z):
        return z

    def condition(self, captions, frame=None):
        return {"scale": torch.tensor([1. + len(c) for c in captions], dtype=torch.float64)}


def build_critic(variant, features, text_width, pool="tokens"):
    return adt.Config(variant=variant, pool=pool).critic(features, text_width)


def overheard(monkeypatch, model):
    """Every caption vector a network is called with."""
    heard, predict = [], model.predict
    def watched(x, t, cond, *rest):
        heard.append(cond["pooled"].clone())
        return predict(x, t, cond, *rest)
    monkeypatch.setattr(model, "predict", watched)
    return heard


def clear(*modules):
    for module in modules:
        for p in module.parameters():
            p.grad = None


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy


def family(name):
    """(target, alpha, sigma) of the four families the contract must fit, from diffusers' own schedulers."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
    sd = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    if name in ("sd15", "sdxl"):
        bars = DDPMScheduler(**sd).alphas_cumprod.double()
        return "eps", bars.sqrt(), (1 - bars).sqrt()
    if name == "sd2-v-zero-snr":
        bars = DDPMScheduler(**sd, rescale_betas_zero_snr=True).alphas_cumprod.double()
        return "v", bars.sqrt(), (1 - bars).sqrt()
    sigma = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:1000].flip(0).double()      # sd3
    return "flow", 1 - sigma, sigma


@pytest.fixture(scope="session")
def glyphs():
    return data.build("glyphs")


@pytest.fixture(scope="session")
def base():
    return models.build("tiny", "glyphs")
