"""What a denoiser is, in one contract, and who fulfils it.

Every diffusion model here, whatever its family, is asked one thing: given x_t = alpha x0 + sigma eps, output
y = a x0 + b eps with known (a, b). Two linear equations, two unknowns: solving them gives back (x0, eps), and
so the samplers and losses of this project never ask whether a model predicts noise, pictures, velocities or
flows.

    [x_t]   [alpha sigma] [x0 ]          eps: (a, b) = (0, 1)            x0:   (1, 0)
    [ y ] = [  a     b  ] [eps]          v:          (-sigma, alpha)     flow: (-1, 1)

Time runs one way everywhere: index 0 is the cleanest step, T-1 the noisiest.        Read next: sampler.py
"""

import copy
import hashlib
import json
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

import networks
import parallel

WEIGHTS = Path(__file__).parent / "weights"


class Denoiser(nn.Module):
    """The contract. A family gives three tables and four methods (output, encode, decode, condition)."""

    network: nn.Module                                      # what training changes; everything else is frozen
    size: int                                               # of a picture, pixels
    shape: tuple                                            # of a latent picture, (C, h, w)
    heavy = False                                           # its pictures and checkpoints take minutes
    facts = {}                                              # what its file says of itself
    at_once = 100                                           # pictures that are drawn together

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
        both = {key: torch.cat([uncond.get(key, value).expand_as(value), value])
                for key, value in cond.items()}
        y_u, y_c = self.output(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        return y_u + guidance * (y_c - y_u)

    def twin(self):
        """The same model with a network of its own, frozen: what it is now, kept."""
        other = copy.copy(self)
        other._modules = {**self._modules, "network": copy.deepcopy(self.network)}
        return other.eval().requires_grad_(False)

    def adapt(self, rank):
        """Freeze the network; let low-rank adapters learn instead."""
        raise ValueError("--lora is for sd15, sdxl and sd3: this network is small enough to learn as it is")

    def save_memory(self):
        """Recompute every block of the network in the backward pass."""
        raise ValueError("--lean is for sd15, sdxl and sd3: this network is small as it is")

    def close(self):
        """Every caption that will be asked has been: what only `condition` needs may go."""

    def keep(self, out, **facts):
        """Write into the run folder `out` what training made, in a form that others load."""
        raise NotImplementedError

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

    def condition(self, captions, frame=None):
        """B strings -> a dict of tensors whose first dimension is B, passed to `output` unread. One is
        "pooled" (B, P), the caption as one vector, on which a discriminator may condition. frame (B, 4): what
        size a photograph had and where it was cut; SDXL wants to know."""
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


# ------------------------------------------------------------------------- Stable Diffusion 1.5, XL and 3

def schedule(scheduler):
    """A diffusers scheduler -> target, alpha, sigma and time, from the cleanest step to the noisiest. The
    sigmas of a flow are read as they were built: set_timesteps would shift them a second time."""
    if not hasattr(scheduler, "alphas_cumprod"):
        sigma = scheduler.sigmas.double().flip(0)
        return "flow", 1 - sigma, sigma, sigma * scheduler.config.num_train_timesteps
    target = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[scheduler.config.prediction_type]
    product = scheduler.alphas_cumprod.double()
    return target, product.sqrt(), (1 - product).sqrt(), torch.arange(len(product))


class Latent(Denoiser):
    """What the three families share: a network and a VAE from a diffusers pipeline, and captions that are
    encoded once. The pipeline stays outside the module tree, and its text encoders leave when they have read
    everything (`close`)."""
    heavy, at_once = True, 4

    def __init__(self, pipe, size, source):
        super().__init__(*schedule(pipe.scheduler))
        self.part = "transformer" if hasattr(pipe, "transformer") else "unet"
        self.network, self.vae = getattr(pipe, self.part), pipe.vae
        self.outside, self.read = [pipe], {}                 # a list hides it from nn.Module
        self.rank, self.bare = 0, False                      # of the adapters, and whether they are off
        self.pipeline, self.source = type(pipe), source
        self.size, scale = size, 2 ** (len(self.vae.config.block_out_channels) - 1)
        if size % (8 * scale):
            raise ValueError(f"--size {size}: wanted a multiple of {8 * scale}, for the network halves the "
                             "latent picture three times")
        self.shape = (self.vae.config.latent_channels, size // scale, size // scale)
        self.requires_grad_(False)
        self.network.requires_grad_(True)
        with torch.no_grad():                                # the encoders' own fingerprint names their shelf
            said = self.ask(["a fingerprint"])["text"].float().cpu().numpy().tobytes()
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        self.cache = home / "adversarial-diffusion" / hashlib.sha256(said).hexdigest()[:16]
        self.cache.mkdir(parents=True, exist_ok=True)

    def encode(self, image):
        z = torch.cat([self.vae.encode(one).latent_dist.sample() for one in image.split(1)])
        return (z.float() - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def decode(self, z):
        """One picture at a time, recomputed in the backward pass: the VAE's graph of one picture is alive."""
        z = z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        return torch.cat([recompute(self.draw, one, use_reentrant=False) for one in z.split(1)]).float()

    def draw(self, z):
        return self.vae.decode(z).sample

    def adapt(self, rank):
        """LoRA: the network freezes, low-rank adapters on its attention learn."""
        from peft import LoraConfig
        self.rank = rank
        self.network.requires_grad_(False)
        attention = ["to_q", "to_k", "to_v", "to_out.0",
                     "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        self.network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                            target_modules=attention))

    def save_memory(self):
        self.network.enable_gradient_checkpointing()

    def wear(self, path):
        """Adapters from the file that `keep` wrote."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file
        layers = {name.removeprefix(f"{self.part}."): value for name, value in load_file(path).items()}
        set_peft_model_state_dict(self.network, layers)

    def twin(self):
        if not self.rank:
            return super().twin()
        other = copy.copy(self)                              # one copy of the weights: itself, adapters off
        other.bare = True
        return other

    def output(self, x, time, cond):
        if self.bare:
            self.network.disable_adapters()
        y = self.call(x, time, cond)
        if self.bare:
            self.network.enable_adapters()
        return y

    def call(self, x, time, cond):
        """`output` of the family."""
        raise NotImplementedError

    def ask(self, captions):
        """B strings -> {"text": (B, N, D), "pooled": (B, P)}, by the pipeline's own encode_prompt."""
        raise NotImplementedError

    @torch.no_grad()
    def condition(self, captions, frame=None):
        new = [c for c in dict.fromkeys(captions) if c not in self.read and not self.place(c).is_file()]
        if new and not self.outside:
            raise ValueError(f"the text encoders are gone and never read '{new[0][:80]}'")
        if new:
            from safetensors.torch import save_file
            said = self.ask(new)
            for i, caption in enumerate(new):
                partial = self.place(caption).with_suffix(f".{os.getpid()}")
                save_file({k: v[i].clone().cpu() for k, v in said.items()}, partial)
                partial.replace(self.place(caption))
        read = [self.recall(caption) for caption in captions]
        return {key: torch.stack([one[key] for one in read]).to(self.alpha.device) for key in read[0]}

    def place(self, caption):
        """Where on disk it is kept what the text encoders made of a caption."""
        return self.cache / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"

    def recall(self, caption):
        """What they made of it, from memory or from disk."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        if caption not in self.read:
            if len(self.read) >= 2048:
                self.read.pop(next(iter(self.read)))         # the oldest
            try:
                self.read[caption] = load_file(self.place(caption))
            except SafetensorError:
                raise ValueError(f"{self.place(caption)} is damaged: remove it") from None
        return self.read[caption]

    def forget(self):
        if self.rank:
            raise ValueError("init=random and --lora exclude each other: adapters on nothing learn nothing")
        self.network = type(self.network).from_config(self.network.config)

    def close(self):
        self.outside.clear()                                 # the text encoders; what they read stays

    def keep(self, out, **facts):
        """LoRA: a file for `pipe.load_lora_weights(out)`. The whole network: a pipeline folder, in which
        everything else is as it came."""
        from peft import get_peft_model_state_dict
        state = get_peft_model_state_dict(self.network) if self.rank else self.network.state_dict()
        state = parallel.whole(state)
        if parallel.rank() > 0:
            return
        student = "fresh" in facts["rows"][0][1]
        scheduler = self.few_step_scheduler(max(steps for steps, _ in facts["rows"])) if student else None
        if self.rank:
            self.pipeline.save_lora_weights(out, **{f"{self.part}_lora_layers": state})
            scheduler and scheduler.save_pretrained(out / "scheduler")
        else:
            pipe = self.pipeline.from_pretrained(self.source, **({"scheduler": scheduler} if student else {}))
            getattr(pipe, self.part).load_state_dict(state)
            pipe.save_pretrained(out / "pipeline")

    def few_step_scheduler(self, steps):
        """A student's path for plain pipelines: leap, forget the noise, draw it anew. diffusers has it under
        the name of consistency models. A flow's must be told its stops: pipe(sigmas=[1, .75, .5, .25])."""
        import diffusers
        if self.target == "flow":
            return diffusers.FlowMatchLCMScheduler.from_pretrained(self.source, subfolder="scheduler")
        return diffusers.LCMScheduler.from_pretrained(
            self.source, subfolder="scheduler", original_inference_steps=steps, timestep_spacing="trailing",
            clip_sample=False, rescale_betas_zero_snr=False)


class SD15(Latent):
    """Stable Diffusion 1.x: a U-Net that knows integer steps and one CLIP's tokens."""

    def ask(self, captions):
        pipe = self.outside[0]
        text = pipe.encode_prompt(captions, self.alpha.device, 1, False)[0]               # (B, 77, 768)
        ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        end = (ids == pipe.tokenizer.eos_token_id).int().argmax(1)            # where CLIP sums up
        return {"text": text, "pooled": text[torch.arange(len(text)), end]}

    def call(self, x, time, cond):
        return self.network(x, time, cond["text"]).sample


class SDXL(Latent):
    """Stable Diffusion XL: two CLIPs, and what the picture's size was and where it was cut."""

    def ask(self, captions):
        pipe = self.outside[0]
        text, _, pooled, _ = pipe.encode_prompt(captions, device=self.alpha.device,
                                                do_classifier_free_guidance=False)
        if pipe.config.force_zeros_for_empty_prompt:         # what it was trained to take for "no caption"
            said = torch.tensor([bool(c) for c in captions], device=text.device).to(text)
            text, pooled = text * said[:, None, None], pooled * said[:, None]
        return {"text": text, "pooled": pooled}

    def condition(self, captions, frame=None):
        known = super().condition(captions)
        return known if frame is None else {**known, "frame": frame.to(self.alpha.device)}

    def call(self, x, time, cond):
        frame = cond.get("frame", torch.tensor([[self.size, self.size, 0, 0]], device=x.device))
        frame = torch.cat([frame, torch.full_like(frame[:, :2], self.size)], 1).expand(len(x), 6)
        extra = {"text_embeds": cond["pooled"], "time_ids": frame}
        return self.network(x, time, cond["text"], added_cond_kwargs=extra).sample


class SD3(Latent):
    """Stable Diffusion 3: a transformer on the straight line of rectified flow, two CLIPs and T5."""

    def ask(self, captions):
        text, _, pooled, _ = self.outside[0].encode_prompt(captions, None, None, device=self.alpha.device,
                                                           do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def call(self, x, time, cond):
        return self.network(x, cond["text"], cond["pooled"], time).sample


# the adapter, the pipeline's class in diffusers, its public home, pixels
FAMILIES = {"sd15": (SD15, "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
            "sdxl": (SDXL, "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0", 1024),
            "sd3": (SD3, "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3-medium-diffusers", 1024)}


# --------------------------------------------------------------------------------------- weights and building

def device():
    """Where everything runs."""
    return torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")


def half_precision():
    """Autocast to bf16 on a GPU, and on a processor that has it (a step is then about 1.7 times faster)."""
    kind = device().type
    able = kind != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=able)


def save(module, path, **facts):
    """fp16 safetensors with a few facts (JSON values) in the header;
    written beside the file, then renamed."""
    from safetensors.torch import save_file
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    state = {k: v.half().contiguous() for k, v in parallel.whole(module.state_dict()).items()}
    if parallel.rank() > 0:
        return
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


class Dino(nn.Module):
    """DINOv2 as the discriminators' eyes, for real models: any picture in, tokens of every block out."""

    def __init__(self, body):
        super().__init__()
        self.body, depth = body, body.config.num_hidden_layers
        self.layers = sorted({0, *(depth * i // 4 for i in range(1, 5))})     # patches, four blocks
        for name, value in (("mean", (.485, .456, .406)), ("spread", (.229, .224, .225))):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))     # ImageNet's

    def forward(self, image):
        """(B, 3, H, W) in [-1, 1] -> maps (B, D, h, w) of the embedding and every block, their CLS (B, D)."""
        patch = self.body.config.patch_size
        h, w = (max(1, round(n / patch)) for n in image.shape[2:])
        image = F.interpolate(image, (h * patch, w * patch), mode="bicubic", antialias=True)
        seen = self.body((image * .5 + .5 - self.mean) / self.spread, output_hidden_states=True).hidden_states
        return ([s[:, 1:].transpose(1, 2).unflatten(2, (h, w)) for s in seen], [s[:, 0] for s in seen])


def dino(which, weights=None):
    """DINOv2 from a transformers folder or hub id (default facebook/dinov2-small), or with random weights."""
    from transformers import Dinov2Config, Dinov2Model
    if which == "random":
        return Dino(Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)))
    if which != "vit":
        raise ValueError(f"real models have features=vit (DINOv2) or random, not {which}")
    source = str(weights or "facebook/dinov2-small")
    try:
        return Dino(Dinov2Model.from_pretrained(source, use_safetensors=True))
    except Exception as error:
        why = str(error).strip().split("\n")[0][:200]
        raise OSError(f"cannot load DINOv2 from {source} ({type(error).__name__}: {why}); "
                      "name a folder that holds it with --features") from None


def features(model, data, which="vit", folder=None, weights=None):
    """The discriminators' eyes. Real models have DINOv2, from `folder`; the tiny one what was trained for its
    data set, from `folder`, else `weights`, else the shipped: the TinyViT, the TinyCNN, or a TinyViT that
    never learned anything ("random")."""
    if model in FAMILIES:
        return dino(which, folder)
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


def pipeline(model, weights, size):
    """--model sd15, sdxl or sd3; --weights, a diffusers folder or a hub id -> the family's Denoiser. Whatever
    is missing, refused or half there is one sentence."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    adapter, name, home, _ = FAMILIES[model]
    source = str(weights or home)
    if (run := Path(source) / "config.json").is_file():      # of train.py: its result, whole or adapters
        plan = json.loads(run.read_text())
        if (Path(source) / "pipeline").is_dir():
            return pipeline(model, Path(source) / "pipeline", size or plan["size"])
        denoiser = pipeline(model, plan["weights"], size or plan["size"])
        denoiser.adapt(plan["lora"])
        denoiser.wear(Path(source) / "pytorch_lora_weights.safetensors")
        return denoiser
    index = Path(source) / "model_index.json"
    if Path(source).exists() and not index.is_file():
        raise ValueError(f"--weights {source}: wanted a diffusers folder, found no model_index.json in it")
    if index.is_file() and (held := json.loads(index.read_text()).get("_class_name")) != name:
        raise ValueError(f"--weights {source} holds a {held}: --model {model} wants a {name}")
    if not index.is_file() and (source.count("/") != 1 or source[0] in "./~"):
        raise FileNotFoundError(f"--weights {source}: no such folder, and no hub id either (OWNER/NAME)")
    try:
        spare = {"safety_checker": None, "requires_safety_checker": False} if model == "sd15" else {}
        pipe = getattr(diffusers, name).from_pretrained(source, use_safetensors=True, **spare)
    except Exception as error:                               # hub, disk, JSON, safetensors: each has its own
        why = str(error).strip().split("\n")[0][:200]
        what = ("complete it, or copy it again" if index.is_file() else
                f"accept its licence at https://huggingface.co/{source} and log in (`hf auth login`), "
                "or name a local diffusers folder with --weights")
        raise OSError(f"cannot load {source} ({type(error).__name__}: {why}); {what}") from None
    return adapter(pipe, size or pixels(model), source)


def build(model, data, weights=None, size=None):
    """--model, --data, --weights (of the tiny one a file, a run or a weights folder; default: shipped) -> a
    Denoiser of which `network` alone is trainable, with the `facts` of its file."""
    if model in FAMILIES:
        return pipeline(model, weights, size)
    if (size or pixels(model)) != 32:
        raise ValueError(f"--size {size}: the tiny model's pictures have 32 pixels")
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
