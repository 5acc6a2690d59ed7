"""What all tests share: the import path, one thread per test process, a small denoiser, and short runs."""

import functools
import gc
import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"                                # for the commands that tests start
    torch.set_num_threads(1)

import add  # noqa: E402
import adt  # noqa: E402
import data  # noqa: E402
import discriminator  # noqa: E402
import train  # noqa: E402
from models import loading  # noqa: E402
from models.denoiser import Denoiser  # noqa: E402
from models.tiny import noise_schedule  # noqa: E402
from utils import plotting, precision  # noqa: E402

# ADT's
DISCRIMINATORS = ["similarity", "reference", "ordered", "difference", "relativistic", "projected"]
DRAWING = {name: getattr(plotting, name) for name in ("plot_training_curves", "save_image_grid")}


@pytest.hookimpl(trylast=True)                                        # after -m has left out others
def pytest_collection_modifyitems(items):
    """The notebooks take longest: one stands first, and the others after four tests each, since pytest-xdist
    (--dist load) gives each worker about five tests at the start."""
    notebooks = [item for item in items if item.get_closest_marker("notebooks")]
    others = [item for item in items if item not in notebooks]
    for i, item in enumerate(reversed(notebooks)):
        others.insert(5 * i, item)
    items[:] = others


def pytest_collection_finish():
    """Tests and libraries stay to the end: the garbage collector, which every run calls, may skip them."""
    gc.freeze()


# ---------------------------------------------------------------------------------------------- denoisers

class Toy(Denoiser):
    """Any prediction type on any schedule. The network is one smooth nonlinear layer in float64, so
    identities are exact. `calls` holds (x, t_input, whether gradients are on) of every network call."""

    def __init__(self, prediction_type="flow", alpha=None, sigma=None, channels=2):
        if alpha is None:
            alpha, sigma, _ = noise_schedule(prediction_type)
        super().__init__(prediction_type, alpha, sigma, torch.arange(len(alpha)) / len(alpha))
        self.network = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.double()
        self.alpha, self.sigma = alpha.double(), sigma.double()        # the base class rounds to float32
        self.calls = []

    def forward_network(self, x, t_input, cond):
        self.calls.append((x.detach().clone(), t_input.clone(), torch.is_grad_enabled()))
        return torch.tanh(self.network(x)) * (1 + t_input.view(-1, 1, 1, 1)) * cond["scale"].view(-1, 1, 1, 1)

    def timestep(self, t_input):
        """The inverse of the table t_input -> (B,) int64."""
        return (t_input * self.T).round().long()

    def encode(self, image):
        return image

    def decode(self, z):
        return z

    def encode_prompts(self, captions, micro_cond=None):
        scale = torch.tensor([1. + len(c) for c in captions], dtype=self.alpha.dtype)
        return {"scale": scale, "pooled": scale[:, None]}


def family_schedule(name):
    """(prediction_type, alpha, sigma) of the four model families, from diffusers' own schedulers."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
    sd_betas = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    if name in ("sd15", "sdxl"):
        alphas_cumprod = DDPMScheduler(**sd_betas).alphas_cumprod.double()
        return "eps", alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    if name == "sd2-v-zero-snr":
        alphas_cumprod = DDPMScheduler(**sd_betas, rescale_betas_zero_snr=True).alphas_cumprod.double()
        return "v", alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    sigma = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:1000].flip(0).double()  # sd3
    return "flow", 1 - sigma, sigma


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy


# ----------------------------------------------------------------------------------------- discriminators

def build_discriminator(kind, backbone, text_dim):
    """ADT's discriminator of this kind."""
    return adt.Config(discriminator=kind).build_discriminator(backbone, text_dim)


class RandomConv(torch.nn.Module):
    """A backbone of one random convolution: (B, 3, H, W) -> one map (B, 8, H / 8, W / 8) and its mean."""

    layers = (0,)

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 8, stride=8)

    def forward(self, image):
        x = self.conv(image)
        return [x], [x.mean((2, 3))]


class LinearHead(torch.nn.Module):
    """(B, D, h, w) -> tokens (B, N, out_channels), one matrix: its gradient has a closed form."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.linear = torch.nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, x):
        return self.linear(tokens_of(x))


def tokens_of(x):
    """(B, D, h, w) -> (B, N, D)."""
    return x.flatten(2).transpose(1, 2)


# --------------------------------------------------------------------------------------- small assistants

def record_conditioning(monkeypatch, model):
    """-> a list that receives the pooled caption embeddings of every call of the model."""
    recorded, predict = [], model.predict

    def recording_predict(x_t, t, cond, *rest):
        recorded.append(cond["pooled"].clone())
        return predict(x_t, t, cond, *rest)

    monkeypatch.setattr(model, "predict", recording_predict)
    return recorded


def zero_grads(*modules):
    for module in modules:
        for param in module.parameters():
            param.grad = None


def untrained_params(module):
    """Names of the parameters without any gradient."""
    return [name for name, param in module.named_parameters()
            if param.grad is None or not param.grad.abs().sum() > 0]


# --------------------------------------------------------------------------------------------- short runs

def small_settings(args):
    """Arguments of train.py for a run that takes a second."""
    settings = ["--set", "batch_size=2", "--set", "warmup_steps_d=0", "--eval-samples", "0"]
    if "add" not in args:
        settings += ["--set", "num_inference_steps=2", "--set", "num_grad_steps=1"]
    return settings


def make_trainer(*args):
    """The Trainer of a short run with these arguments of train.py; nothing is written."""
    return train.setup(train.parse_args([*small_settings(args), "--steps", "4", *args])[1])[2]


def train_run(out, *args):
    """Run train.py with these arguments -> out, the run folder."""
    train.main([*small_settings(args), "--output-dir", str(out), *args])
    return out


def copy_run(run_dir, target):
    """A copy of a finished run, which a test may resume or damage -> target."""
    return Path(shutil.copytree(run_dir, target))


# ---------------------------------------------------------------------------------------------- fixtures

def cached_whitening(fit_whitening):
    """fit_whitening, which computes the statistics of the same network and images once in a process."""
    statistics = {}

    def fit(backbone, batches, **kwargs):
        batches = list(batches)
        tensors = [*backbone.network.state_dict().values(), *backbone.network.buffers(), *batches]
        digest = hashlib.sha256(repr((backbone.layers, kwargs)).encode())
        for tensor in tensors:
            digest.update(tensor.float().cpu().numpy().tobytes())
        key = digest.digest()
        if key not in statistics:
            fit_whitening(backbone, batches, **kwargs)
            statistics[key] = {name: buffer.clone() for name, buffer in backbone.named_buffers(recurse=False)}
        for name, buffer in statistics[key].items():
            setattr(backbone, name, buffer.clone())

    return fit


@pytest.fixture(scope="session", autouse=True)
def constants_computed_once():
    """Every short run would render the same glyphs and whiten the same features: three seconds of four."""
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "glyph_mask", functools.cache(data.glyph_mask))
    patch.setattr(discriminator.FrozenBackbone, "fit_whitening",
                  cached_whitening(discriminator.FrozenBackbone.fit_whitening))
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def no_drawing():
    """Runs write empty files in place of curves and sample grids, which take longer than their steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plotting, "plot_training_curves", lambda log, path: Path(path).touch())
        patch.setattr(plotting, "save_image_grid", lambda rows, path, *_, **__: Path(path).touch())
        yield


@pytest.fixture
def drawing(monkeypatch):
    """Curves and sample grids are drawn, for tests that look at them."""
    for name, function in DRAWING.items():
        monkeypatch.setattr(plotting, name, function)


@pytest.fixture(scope="session")
def adt_run(tmp_path_factory):
    """The folder of a finished run of ADT on glyphs, two steps, seed 0. Tests copy it to change it."""
    return train_run(tmp_path_factory.mktemp("adt") / "run", "--steps", "2")


@pytest.fixture(scope="session")
def glyphs():
    return data.build_dataset("glyphs")


@pytest.fixture(scope="session")
def base():
    """The pretrained tiny model. Shared by all tests of a process: they must not change it."""
    return loading.load_model("tiny", "glyphs")


@pytest.fixture(scope="module")
def backbone():
    return discriminator.FrozenBackbone(loading.load_backbone("tiny", "glyphs"))


@pytest.fixture(scope="module")
def tiny_setup(glyphs, backbone):
    """model, discriminator (similarity), batch of four."""
    torch.manual_seed(0)
    model = loading.load_model("tiny", "glyphs")
    disc = build_discriminator("similarity", backbone, 128)
    return model, disc, glyphs.sample_batch(4, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def add_setup(tiny_setup):
    """model, teacher, discriminator with ADD's defaults, batch of four."""
    model, similarity_disc, batch = tiny_setup
    disc = add.Config().build_discriminator(similarity_disc.backbone, 128)
    return model, model.frozen_copy(), disc, batch


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A folder with tiny pipelines sd15, sdxl and sd3, a DINOv2 (dino), and three captioned images."""
    from tiny_families import make_pretrained  # it imports diffusers
    return make_pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    """An empty cache folder, and fp32 instead of autocast."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "default_precision", lambda: "fp32")
    return tmp_path / "cache"
