"""What a denoiser is, in one contract, and the small networks of the embedded world.

Every diffusion model here, whatever its family, is asked one thing: given x_t = alpha x0 + sigma eps, output
y = a x0 + b eps with known (a, b). Two linear equations, two unknowns: solving them gives back (x0, eps), and
so the samplers and losses of this project never ask whether a model predicts noise, pictures, velocities or
flows.

    [x_t]   [alpha sigma] [x0 ]          eps: (a, b) = (0, 1)            x0:   (1, 0)
    [ y ] = [  a     b  ] [eps]          v:          (-sigma, alpha)     flow: (-1, 1)

Time runs one way everywhere: index 0 is the cleanest step, T-1 the noisiest.        Read next: sampler.py
"""

import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

WEIGHTS = Path(__file__).parent / "weights"


class Denoiser(nn.Module):
    """The contract. A family gives three tables and four methods (output, encode, decode, condition)."""

    network: nn.Module                                      # what training changes; everything else is frozen

    def __init__(self, target, alpha, sigma, time):
        """target: eps, x0, v or flow · alpha, sigma, time: (T,) tables from cleanest to noisiest."""
        super().__init__()
        if target not in ("eps", "x0", "v", "flow"):
            raise ValueError(f"unknown prediction target '{target}': wanted eps, x0, v or flow")
        if target == "eps" and alpha[-1] == 0:
            raise ValueError("an eps-model needs alpha_T > 0: "
                             "from pure noise, the noise says nothing about x0")
        self.target = target
        for name, table in (("alpha", alpha), ("sigma", sigma), ("time", time)):
            self.register_buffer(name, table.float(), persistent=False)

    @property
    def T(self):
        return len(self.alpha)

    def look_up(self, table, t):
        """t (B,) -> (B,). Fractional t reads between the rows: SD3's own sampler visits such times."""
        low = t.long()
        high = (low + 1).clamp(max=self.T - 1)
        if not t.is_floating_point():
            return table[low]
        return torch.lerp(table[low], table[high], (t - low).to(table))

    def at(self, t):
        """t (B,) -> alpha, sigma, each (B, 1, 1, 1)."""
        return tuple(self.look_up(table, t).view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))

    def add_noise(self, x0, t, eps):
        """The forward process, x_t = alpha x0 + sigma eps."""
        alpha, sigma = self.at(t)
        return alpha * x0 + sigma * eps

    def coefficients(self, t):
        """(a, b) of y = a x0 + b eps."""
        alpha, sigma = self.at(t)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        return {"eps": (zero, one), "x0": (one, zero), "v": (-sigma, alpha), "flow": (-one, one)}[self.target]

    def training_target(self, x0, eps, t):
        """What the network should have said: a x0 + b eps."""
        a, b = self.coefficients(t)
        return a * x0 + b * eps

    def split(self, x, y, t):
        """Solve the 2x2 system by Cramer's rule: (x_t, y) -> (x0, eps), in x's precision, whatever y's.
        The determinant is alpha (eps), -sigma (x0) or 1 (v) and alpha + sigma (flow): nothing here divides by
        alpha_T = 0."""
        y = y.to(x.dtype)
        (alpha, sigma), (a, b) = self.at(t), self.coefficients(t)
        determinant = alpha * b - sigma * a
        return (b * x - sigma * y) / determinant, (alpha * y - a * x) / determinant

    def predict(self, x, t, cond, uncond=None, guidance=1.0):
        """One guided call: y_u + w (y_c - y_u); w = 1 is off and costs one pass,
        otherwise both halves share one."""
        time = self.look_up(self.time, t)
        if guidance == 1.0:
            return self.output(x, time, cond)
        if uncond is None:
            raise ValueError("guidance other than 1 needs `uncond`, the condition of empty captions")
        both = {key: torch.cat([uncond[key].expand_as(value), value]) for key, value in cond.items()}
        y_u, y_c = self.output(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        return y_u + guidance * (y_c - y_u)

    def forget(self):
        """Give the network fresh random weights."""
        raise NotImplementedError

    def output(self, x, time, cond):
        """x (B, C, h, w), time (B,) in the family's own unit, cond as `condition` made it
        -> y (B, C, h, w)."""
        raise NotImplementedError

    def encode(self, image):
        """[-1, 1] (B, 3, H, W) -> (B, C, h, w)."""
        raise NotImplementedError

    def decode(self, z):
        """(B, C, h, w) -> (B, 3, H, W), differentiable and not clamped."""
        raise NotImplementedError

    def condition(self, captions):
        """B strings -> a dict of tensors whose first dimension is B, passed to `output` unread. One is
        "pooled" (B, P), the caption as one vector, on which a discriminator may condition."""
        raise NotImplementedError


def tables(target, steps=1000):
    """The tiny model's noise schedule: the straight line of rectified flow, alpha = 1 - sigma. An eps-model
    cannot start at alpha_T = 0 and gets Stable Diffusion's scaled-linear betas instead."""
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    if target == "eps":
        betas = torch.linspace(.00085 ** .5, .012 ** .5, steps, dtype=torch.float64) ** 2
        product = torch.cumprod(1 - betas, 0)
        return product.sqrt(), (1 - product).sqrt(), time
    return 1 - time, time, time


# ------------------------------------------------------------------------------- the tiny text-to-image model

class Attention(nn.Module):
    """Pre-norm attention with a residual: of x on itself, or on `context` where one is given."""

    def __init__(self, width, heads=4, context=None):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(context or width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context=None, mask=None):
        """x (B, N, D), context (B, M, C), mask (B, M) bool, True where there is a token -> (B, N, D)."""
        h = self.norm(x)
        q, k, v = self.q(h), *self.kv(h if context is None else context).chunk(2, -1)
        q, k, v = (rearrange(z, "b n (h d) -> b h n d", h=self.heads) for z in (q, k, v))
        score = q @ k.transpose(-1, -2) * q.shape[-1] ** -.5                  # (B, heads, N, M)
        if mask is not None:
            score = score.masked_fill(~mask[:, None, None], float("-inf"))
        h = score.softmax(-1).to(v.dtype) @ v                           # on a CPU this beats the fused kernel
        return x + self.out(rearrange(h, "b h n d -> b n (h d)"))


class Transformer(nn.Module):
    """One block: attention, then a two-layer perceptron, each with its residual."""

    def __init__(self, width, context=None, expand=4):
        super().__init__()
        self.attend = Attention(width)
        self.read = Attention(width, context=context) if context else None
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, expand * width), nn.GELU(),
                                   nn.Linear(expand * width, width))

    def forward(self, x, mask=None, context=None):
        x = self.attend(x, mask=mask if context is None else None)
        if self.read is not None:
            x = self.read(x, context, mask)
        return x + self.think(x)


class TinyText(nn.Module):
    """Words -> token states. One embedding per word of a closed vocabulary, two transformer blocks."""

    def __init__(self, words, width=128, length=16):
        super().__init__()
        self.index = {w: i + 2 for i, w in enumerate(words)}                  # 0 pads, 1 opens every caption
        self.length = length
        self.embed = nn.Embedding(len(words) + 2, width)
        self.position = nn.Parameter(torch.randn(length, width) * .02)
        self.blocks = nn.ModuleList(Transformer(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def tokens(self, captions):
        """B strings -> (B, length) word numbers.
        An unknown word is an error that names its nearest relatives."""
        import difflib
        rows = []
        for caption in captions:
            words = caption.lower().split()
            for word in words:
                if word not in self.index:
                    near = difflib.get_close_matches(word, self.index, 4, .5) or sorted(self.index)[:8]
                    raise ValueError(f"the tiny text encoder does not know the word '{word}' "
                                     f"(in '{caption[:80]}'): it knows {len(self.index)} words, "
                                     f"the nearest {', '.join(near)}")
            if len(words) >= self.length:
                raise ValueError(f"a caption may have {self.length - 1} words at most, not {len(words)}: "
                                 f"'{caption[:80]}'")
            rows.append([1] + [self.index[w] for w in words] + [0] * (self.length - 1 - len(words)))
        return torch.tensor(rows, device=self.embed.weight.device)

    def forward(self, captions):
        tokens = self.tokens(captions)
        mask = tokens > 0                                                     # (B, L)
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)                                                      # (B, L, D)
        pooled = (x * mask[..., None]).sum(1)                            # (B, D), the mean but for its length
        return {"text": x, "mask": mask, "pooled": F.layer_norm(pooled.float(), pooled.shape[1:])}


class Residual(nn.Module):
    """Two convolutions; time and caption scale and shift what lies between them (adaptive group norm)."""

    def __init__(self, width_in, width, embedding):
        super().__init__()
        self.before = nn.Sequential(nn.GroupNorm(8, width_in), nn.SiLU(),
                                    nn.Conv2d(width_in, width, 3, padding=1))
        self.norm, self.modulate = nn.GroupNorm(8, width), nn.Linear(embedding, 2 * width)
        self.after = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        nn.init.zeros_(self.after[1].weight)                              # every block starts as the identity
        nn.init.zeros_(self.after[1].bias)

    def forward(self, x, embedding):
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.after(self.norm(self.before(x)) * (1 + scale) + shift)


class TinyUNet(nn.Module):
    """(B, 12, 16, 16) -> the same: two levels, like SD's U-Net in small. 64 channels at 16x16; at 8x8 wider,
    with transformer blocks that read the caption's tokens. Two helps for so shallow a network when all it
    sees is noise: learned positions say where it is, a sketch straight from the caption what to look for."""

    def __init__(self, channels=12, width=64, deep=160, context=128, embedding=256):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(128, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.pooled = nn.Linear(context, embedding)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.where = nn.Parameter(torch.randn(width, 16, 16) * .2)
        self.where_deep = nn.Parameter(torch.randn(deep, 8, 8) * .2)
        self.down = nn.ModuleList(Residual(width, width, embedding) for _ in range(2))
        self.shrink = nn.Conv2d(width, deep, 3, stride=2, padding=1)
        self.sketch = nn.Sequential(nn.Linear(context, 128), nn.GELU(), nn.Linear(128, 16 * 64))
        self.ink = nn.Conv2d(16, deep, 1)
        self.middle = nn.ModuleList(Residual(deep, deep, embedding) for _ in range(4))
        self.attention = nn.ModuleList(Transformer(deep, context, 2) for _ in range(2))
        self.grow = nn.Conv2d(deep, width, 3, padding=1)
        self.up = nn.ModuleList(Residual(2 * width, width, embedding) for _ in range(2))
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(),
                                   nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x, time, text, mask, pooled):
        frequency = torch.exp(torch.linspace(0, 6.9, 64, device=x.device))   # 1 … 1000 radians over time 0..1
        angle = time[:, None].float() * frequency
        e = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.pooled(pooled))
        x = self.enter(x) + self.where                                        # (B, 64, 16, 16)
        skips = []
        for block in self.down:
            skips.append(x := block(x, e))
        x = self.shrink(x) + self.where_deep                                  # (B, 160, 8, 8)
        x = x + self.ink(self.sketch(pooled).view(-1, 16, 8, 8))
        for i, block in enumerate(self.middle):
            x = block(x, e)
            if i % 2:
                tokens = self.attention[i // 2](rearrange(x, "b c h w -> b (h w) c"), mask, text)
                x = rearrange(tokens, "b (h w) c -> b c h w", h=8)
        x = self.grow(F.interpolate(x, scale_factor=2.0))                     # (B, 64, 16, 16)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], 1), e)
        return self.leave(x)


class TinyDenoiser(Denoiser):
    """4.2 M parameters that draw 32x32 pictures from captions. Its 'VAE' is pixel-unshuffle: exactly
    invertible, so the latent path of the real models is exercised at no cost.

    What can be said of y from x_t alone, by the best line through it, need not be learned:
        y = skip x_t + gain F(x_t / scale),    skip = cov(x_t, y) / var(x_t),    gain^2 = var(y) - skip cov
    so that F sees and gives numbers of size 1 at every time (the idea of Karras et al. 2022, for any target).
    Else 64 channels must carry twelve of noise through every layer, only to subtract it again; what they
    garble is lost in the last of fifty steps, but stands in the picture of a single one."""

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
        self.text = TinyText(self.words)
        self.network = TinyUNet()

    def forget(self):
        self.network = TinyUNet()

    def output(self, x, time, cond):
        skip, gain, scale = (self.look_up(table, time * self.T - 1).view(-1, 1, 1, 1)
                             for table in (self.skip, self.gain, self.scale))
        return skip * x + gain * self.network(x / scale, time, cond["text"], cond["mask"], cond["pooled"])

    def encode(self, image):
        return F.pixel_unshuffle(image, 2)                                    # (B, 12, 16, 16)

    def decode(self, z):
        return F.pixel_shuffle(z, 2)

    def condition(self, captions):
        return self.text(captions)


# ------------------------------------------------------------------ the discriminators' eyes, and the judge's

def convolutions(width_in, width):
    """Two 3x3 convolutions, normalised; the second without its activation."""
    return nn.Sequential(nn.Conv2d(width_in, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU(),
                         nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width))


class TinyViT(nn.Module):
    """Stands where DINOv2 stands for real models: a convolutional stem (32x32 and 16x16 pixels), then four
    transformer blocks over 8x8 tokens and CLS. Trained by pretrain.py to name attributes (CLS) and to repaint
    hidden 4x4 patches (tokens), so that it knows texture as well as meaning."""
    layers = 0, 1, 2, 4, 6                     # what discriminators look at: stem, patches, two of the blocks

    def __init__(self, attributes, width=128, depth=4, patch=4, size=32):
        super().__init__()
        self.patch = patch
        self.stem = nn.ModuleList([convolutions(3, 32), convolutions(32, 64)])
        self.embed = nn.Conv2d(64, width, 1)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.hidden = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn((size // patch) ** 2, width) * .02)
        self.blocks = nn.ModuleList(Transformer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.repaint = nn.Linear(width, 3 * patch * patch)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in attributes)

    def patches(self, image):
        """(B, 3, 32, 32) -> (B, 64, 48)."""
        return rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)

    def forward(self, image, hide=None):
        """image (B, 3, 32, 32), hide (B, 64) bool -> maps (B, 32, 32, 32) and (B, 64, 16, 16) of the stem,
        then (B, 128, 8, 8) of the embedding and of every block before the final norm; and the CLS token
        (B, 128) that goes with each map, None for the stem's."""
        if hide is not None:
            shown = rearrange(~hide, "b (h w) -> b 1 h w", h=image.shape[-2] // self.patch)
            image = image * F.interpolate(shown.to(image.dtype), scale_factor=self.patch)
        x, maps = image, []
        for stage in self.stem:
            maps.append(stage(x))
            x = F.max_pool2d(F.gelu(maps[-1]), 2)
        side = x.shape[-1]
        x = rearrange(self.embed(x), "b c h w -> b (h w) c")
        if hide is not None:
            x = torch.where(hide[..., None], self.hidden.to(x.dtype), x)
        x = torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x + self.position.to(x.dtype)], 1)
        states = [x]                                                          # (B, 1 + 64, D)
        for block in self.blocks:
            states.append(x := block(x))
        maps += [rearrange(s[:, 1:], "b (h w) c -> b c h w", h=side) for s in states]
        return maps, [None] * len(self.stem) + [s[:, 0] for s in states]


class TinyCNN(nn.Module):
    """Other eyes than TinyViT's, to see what the choice of features is worth: three stages of convolutions
    (32x32, 16x16, 8x8), trained by pretrain.py to name attributes and nothing else."""
    layers = 0, 1, 2

    def __init__(self, attributes, widths=(32, 64, 128)):
        super().__init__()
        self.stages = nn.ModuleList(convolutions(i, o) for i, o in zip((3, *widths), widths))
        self.norm = nn.LayerNorm(widths[-1])
        self.heads = nn.ModuleList(nn.Linear(widths[-1], n) for n in attributes)

    def forward(self, image):
        """image (B, 3, H, W) -> its maps, and in CLS's place None, None, the last map's mean."""
        x, maps = image, []
        for stage in self.stages:
            maps.append(stage(x))
            x = F.max_pool2d(F.gelu(maps[-1]), 2)
        return maps, [None] * (len(maps) - 1) + [x.mean((2, 3))]


class Judge(nn.Module):
    """A convolutional network that no discriminator ever sees. Its 128 features give the Fréchet distance,
    its heads read a picture's attributes. It also learned to repaint the picture, at half size, from those
    128 numbers: a judge that only names things forgets shade, texture and stains. Another architecture,
    another seed: a judge that shares features with the discriminator is gamed."""

    def __init__(self, attributes, width=32):
        super().__init__()
        def stage(i, o):
            return nn.Sequential(*convolutions(i, o), nn.GELU(), nn.MaxPool2d(2))
        self.stages = nn.Sequential(stage(3, width), stage(width, 2 * width), stage(2 * width, 3 * width))
        self.feature = nn.Sequential(nn.Flatten(), nn.Linear(3 * width * 16, 128), nn.LayerNorm(128))
        self.heads = nn.ModuleList(nn.Sequential(nn.GELU(), nn.Linear(128, n)) for n in attributes)

    def forward(self, image):
        """(B, 3, 32, 32) -> features (B, 128), [logits (B, n) per attribute]."""
        feature = self.feature(self.stages(image))
        return feature, [head(feature) for head in self.heads]


# --------------------------------------------------------------------------------------- weights and building

def half_precision():
    """Autocast to bf16 where the processor has it (a step is then about 1.7 times faster), else nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def save(module, path, **facts):
    """fp16 safetensors with a few facts (JSON values) in the header;
    written beside the file, then renamed."""
    from safetensors.torch import save_file
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    state = {k: v.detach().half().contiguous() for k, v in module.state_dict().items()}
    save_file(state, partial, {k: json.dumps(v) for k, v in facts.items()})
    partial.replace(path)


def load(path):
    """-> (state dict in fp32, facts). Never unpickles."""
    from safetensors import SafetensorError, safe_open
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}: make them with `python pretrain.py --data …`, "
                                "or name others")
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
    module.load_state_dict(state)
    return module


def find(which, data, weights=None):
    """Where a network's file is: in the folder named by --weights if it has one,
    else among the shipped ones."""
    own = Path(weights) / f"{which}.safetensors" if weights else None
    return own if own and own.is_file() else WEIGHTS / data / f"{which}.safetensors"


def sealed(network, path):
    """A frozen measuring network from its file."""
    state, facts = load(path)
    if "attributes" not in facts:
        raise ValueError(f"{path} is not a {network.__name__}: its header names no attributes")
    return fill(network(facts["attributes"]), state, path).eval().requires_grad_(False)


def features(data, weights=None, which="vit"):
    """The discriminators' eyes for a data set: the pretrained TinyViT, the TinyCNN, or a TinyViT that never
    learned anything ("random")."""
    if which == "cnn":
        return sealed(TinyCNN, find("cnn", data, weights))
    trained = sealed(TinyViT, find("features", data, weights))
    return TinyViT([head.out_features for head in trained.heads]) if which == "random" else trained


def judge(data, weights=None):
    """The pretrained Judge of a data set."""
    return sealed(Judge, find("judge", data, weights))


def build(model, data, weights=None):
    """--model, --data, --weights (a file, a run or a weights folder; default: shipped) -> a Denoiser of which
    `network` alone is trainable, with the `facts` of its file."""
    if model != "tiny":
        raise ValueError(f"unknown model '{model}': wanted tiny")
    if weights and not Path(weights).exists():
        raise FileNotFoundError(f"--weights {weights}: no such file or folder")
    path = Path(weights or WEIGHTS / data)
    path = path if path.is_file() else path / "denoiser.safetensors"
    state, facts = load(path)
    if not facts.keys() >= {"words", "target"}:
        raise ValueError(f"{path} is not a tiny denoiser: its header names no words and target")
    denoiser = fill(TinyDenoiser(facts["words"], facts["target"]), state, path).requires_grad_(False)
    denoiser.network.requires_grad_(True)
    denoiser.facts = facts
    return denoiser
