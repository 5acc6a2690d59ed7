"""The tiny text-to-image model, and where every network comes from: weights, features, judges, `build`.

The tiny model fulfils the same contract as Stable Diffusion (denoiser.py); its networks are in networks.py,
its weights in weights/. Files are safetensors, with a few facts about themselves in their headers.
Read next: sampler.py"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

import networks
import parallel
import stable
import survival
from denoiser import Denoiser

WEIGHTS = Path(__file__).parent / "weights"
FAMILIES = stable.FAMILIES


def tables(target, steps=1000):
    """The tiny model's noise schedule: the straight line of rectified flow, alpha = 1 - sigma. An eps-model
    cannot start at alpha_T = 0 and gets Stable Diffusion's scaled-linear betas instead."""
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    if target == "eps":
        betas = torch.linspace(.00085 ** .5, .012 ** .5, steps, dtype=torch.float64) ** 2
        product = torch.cumprod(1 - betas, 0)
        return product.sqrt(), (1 - product).sqrt(), time
    return 1 - time, time, time


class TinyDenoiser(Denoiser):
    """4.2 M parameters that draw 32x32 pictures from captions. Its 'VAE' is pixel-unshuffle: exactly
    invertible, so the latent path of the real models is exercised at no cost.

    What can be said of y from x_t alone, by the best line through it, need not be learned:
        y = skip x_t + gain F(x_t / scale),    skip = cov(x_t, y) / var(x_t),    gain^2 = var(y) - skip cov
    so that F sees and gives numbers of size 1 at every time (the idea of Karras et al. 2022, for any target).
    Else 64 channels must carry twelve of noise through every layer, only to subtract it again; what they
    garble is lost in the last of fifty steps, but stands in the picture of a single one."""
    size, shape = 32, (12, 16, 16)

    def __init__(self, words, target="flow", spread=.8):
        """spread: root mean square of x_0's elements, roughly."""
        super().__init__(target, *tables(target))
        (alpha, sigma), (a, b) = ((z.flatten() for z in pair) for pair in
                                  (self.at(torch.arange(self.T)), self.coefficients(torch.arange(self.T))))
        variance = (alpha * spread) ** 2 + sigma ** 2
        covariance = a * alpha * spread ** 2 + b * sigma
        skip = covariance / variance
        gain = ((a * spread) ** 2 + b ** 2 - skip * covariance).clamp(min=0).sqrt()
        for name, table in (("skip", skip), ("gain", gain), ("scale", variance.sqrt())):
            self.register_buffer(name, table, persistent=False)
        self.words = list(words)
        self.text = networks.TinyText(self.words)
        self.network = networks.TinyUNet()

    def forget(self):
        self.network = networks.TinyUNet()

    def keep(self, out, **facts):
        save(self, out / "denoiser.safetensors", words=self.words, target=self.target, **facts)

    def output(self, x, time, cond):
        skip, gain, scale = (self.look_up(table, time * self.T - 1).view(-1, 1, 1, 1)
                             for table in (self.skip, self.gain, self.scale))
        return skip * x + gain * self.network(x / scale, time, cond["text"], cond["mask"], cond["pooled"])

    def encode(self, image):
        return F.pixel_unshuffle(image, 2)                                    # (B, 12, 16, 16)

    def decode(self, z):
        return F.pixel_shuffle(z, 2)

    def condition(self, captions, frame=None):
        return self.text(captions)


# --------------------------------------------------------------------------------------- weights and building

def half_precision():
    """Autocast to bf16 on a GPU, and on a processor that has it (a step is then about 1.7 times faster)."""
    kind = parallel.device().type
    able = kind != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=able)


def save(module, path, **facts):
    """fp16 safetensors with a few facts (JSON values) in the header, whole or not at all."""
    from safetensors.torch import save_file
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().contiguous() for k, v in parallel.whole(module.state_dict()).items()}
    if parallel.rank() > 0:
        return
    with survival.whole(path) as partial:
        save_file(state, partial, {k: json.dumps(v) for k, v in facts.items()})


def load(path):
    """-> (state dict in fp32, facts). Never unpickles."""
    from safetensors import SafetensorError, safe_open
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}: name others, or make some with pretrain.py --data …")
    try:
        with safe_open(path, "pt") as file:
            facts = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            return {k: file.get_tensor(k).float() for k in file.keys()}, facts
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None


def fill(module, state, path):
    """Load a state dict, and say in one sentence what does not fit."""
    own = module.state_dict()
    wrong = [k for k in own.keys() ^ state.keys()] + [k for k in own.keys() & state.keys()
                                                      if own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{path} holds another network: {len(wrong)} tensors do not fit, "
                         f"'{sorted(wrong)[0]}' first")
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path} holds weights that are no numbers")
    module.load_state_dict(state)
    return module


def find(which, data, weights=None):
    """Where a network's file is: in the folder named by --weights if it has one, else the shipped one."""
    own = Path(weights) / f"{which}.safetensors" if weights else None
    return own if own and own.is_file() else WEIGHTS / data / f"{which}.safetensors"


def sealed(network, path):
    """A frozen measuring network from its file."""
    state, facts = load(path)
    if "attributes" not in facts:
        raise ValueError(f"{path} is not a {network.__name__}: its header names no attributes")
    return fill(network(facts["attributes"]), state, path).eval().requires_grad_(False)


def features(model, data, which="vit", folder=None, weights=None):
    """The discriminators' eyes. Real models have DINOv2, from `folder`; the tiny one what was trained for its
    data set, from `folder`, else `weights`, else the shipped: the TinyViT, the TinyCNN, or a TinyViT that
    never learned anything ("random")."""
    if model in FAMILIES:
        return stable.dino(which, folder)
    if folder and not find("features", data, folder).is_relative_to(folder):
        raise FileNotFoundError(f"--features {folder}: wanted a folder with a features.safetensors")
    if which == "cnn":
        return sealed(networks.TinyCNN, find("cnn", data, folder or weights))
    trained = sealed(networks.TinyViT, find("features", data, folder or weights))
    return networks.TinyViT([head.out_features for head in trained.heads]) if which == "random" else trained


def judge(data, weights=None):
    """The pretrained Judge of a data set."""
    return sealed(networks.Judge, find("judge", data, weights))


def pixels(model):
    """The size of a model's pictures, where nothing else is said."""
    if model != "tiny" and model not in FAMILIES:
        raise ValueError(f"unknown model '{model}': wanted tiny, {', '.join(FAMILIES)}")
    return FAMILIES[model][3] if model in FAMILIES else TinyDenoiser.size


def build(model, data, weights=None, size=None):
    """--model, --data, --weights (of the tiny one a file, a run or a weights folder; default: shipped) -> a
    Denoiser of which `network` alone is trainable, with the `facts` of its file."""
    if model in FAMILIES:
        return stable.pipeline(model, weights, size)
    if (size or pixels(model)) != 32:
        raise ValueError(f"--size {size}: the tiny model's pictures have 32 pixels")
    if weights and not Path(weights).exists():
        raise FileNotFoundError(f"--weights {weights}: no such file or folder")
    path = Path(weights or WEIGHTS / data)
    path = path if path.is_file() else path / "denoiser.safetensors"
    state, facts = load(path)
    words = facts.get("words")
    if "target" not in facts or not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise ValueError(f"{path} is not a tiny denoiser: its header names no words and target")
    denoiser = fill(TinyDenoiser(facts["words"], facts["target"]), state, path).requires_grad_(False)
    denoiser.network.requires_grad_(True)
    denoiser.facts = facts
    return denoiser
