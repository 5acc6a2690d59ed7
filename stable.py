"""Stable Diffusion 1.5, XL and 3 behind the contract, and DINOv2, the eyes of their discriminators.

Each is a diffusers pipeline taken apart: its schedule becomes three tables, its network the one thing that
learns, its VAE encodes and decodes, its own encode_prompt reads the captions. What comes out of training goes
back into a pipeline, or is a LoRA that any pipeline loads.                          Read next: sampler.py"""

import copy
import hashlib
import json
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import metrics
import parallel
import survival
from denoiser import Denoiser


def schedule(scheduler):
    """A diffusers scheduler -> target, alpha, sigma and time, from the cleanest step to the noisiest. The
    sigmas of a flow are read as they were built: set_timesteps would shift them a second time."""
    kind, said = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if kind.startswith("FlowMatch"):
        sigma = scheduler.sigmas.double().flip(0)
        return "flow", 1 - sigma, sigma, sigma * scheduler.config.num_train_timesteps
    target = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}.get(said)
    if target is None or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"its scheduler is a {kind} (prediction_type {said}): wanted one with "
                         "alphas_cumprod that predicts epsilon, v_prediction or sample, or a FlowMatch…")
    product = scheduler.alphas_cumprod.double()
    return target, product.sqrt(), (1 - product).sqrt(), torch.arange(len(product))


def exact(layer):
    """Have a layer compute in full precision under autocast, too. The last one's output is what `split` may
    multiply by 15: rounded to bf16, every picture would carry noise of its own."""
    class Exact(type(layer)):
        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float())
    layer.__class__ = Exact


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
        self.rank, self.worn, self.bare = 0, False, False    # of the adapters; came they along? are they off?
        self.pipeline, self.source = type(pipe), source
        self.size, scale = size, 2 ** (len(self.vae.config.block_out_channels) - 1)
        if size % (8 * scale):
            raise ValueError(f"--size {size}: wanted a multiple of {8 * scale}, for the network halves the "
                             "latent picture three times")
        self.shape = (self.vae.config.latent_channels, size // scale, size // scale)
        self.requires_grad_(False)
        self.network.requires_grad_(True)
        exact(self.last)
        self.wake(parallel.device())
        with torch.no_grad():                                # the encoders' own fingerprint names their shelf
            said = self.ask(["a fingerprint"])["text"].float().cpu().numpy().tobytes()
        self.wake("cpu")                                     # until there is a caption that nobody has read
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        self.cache = home / "adversarial-diffusion" / hashlib.sha256(said).hexdigest()[:16]
        self.cache.mkdir(parents=True, exist_ok=True)

    @property
    def last(self):
        """The network's last layer."""
        return self.network.conv_out if self.part == "unet" else self.network.proj_out

    def wake(self, device):
        """Bring the text encoders there."""
        for name, part in self.outside[0].components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device)

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
        if self.rank not in (0, rank):
            raise ValueError(f"--lora {rank}: the run it starts from has adapters of rank {self.rank}")
        if self.rank:
            return                                           # they go on learning
        self.rank = rank
        self.network.requires_grad_(False)
        attention = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
        self.network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                            target_modules=attention))

    def halve(self):
        """The frozen weights of linear layers and convolutions, nearly all there are, in bf16, as autocast
        reads them anyhow. Not the last layer's, and nothing that learns."""
        for module in self.network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module is not self.last:
                for weight in module.parameters(recurse=False):
                    weight.data = weight.data if weight.requires_grad else weight.data.bfloat16()

    def save_memory(self):
        self.network.enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()             # twice recomputed: its blocks are the largest

    def wear(self, path):
        """Adapters from the file that `keep` wrote."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            layers = {name.removeprefix(f"{self.part}."): value for name, value in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error})") from None
        own = get_peft_model_state_dict(self.network)
        if {name: value.shape for name, value in layers.items()} != {k: v.shape for k, v in own.items()}:
            raise ValueError(f"{path} does not hold the adapters of this network")
        set_peft_model_state_dict(self.network, layers)
        self.worn = True

    def twin(self):
        if not self.rank or self.worn:                       # another run's adapters belong to what it is
            return super().twin()
        other = copy.copy(self)                              # new ones say nothing: itself, adapters off
        other.bare = True
        return other

    def output(self, x, time, cond):
        if not self.bare:
            return self.call(x, time, cond)
        self.network.disable_adapters()
        try:
            return self.call(x, time, cond)
        finally:
            self.network.enable_adapters()

    def call(self, x, time, cond):
        """`output` of the family."""
        raise NotImplementedError

    def ask(self, captions):
        """B strings -> {"text": (B, N, D), "pooled": (B, P)}, by the pipeline's own encode_prompt."""
        raise NotImplementedError

    @torch.no_grad()
    def hear(self, captions):
        """Have the text encoders read what they have not read yet, and keep it on disk."""
        from safetensors.torch import save_file
        new = [c for c in dict.fromkeys(captions) if c not in self.read and not self.place(c).is_file()]
        if new and not self.outside:
            raise ValueError(f"the text encoders are gone and never read '{new[0][:80]}'")
        for i in tqdm(range(0, len(new), 64), "captions", disable=len(new) < 5000):
            self.wake(parallel.device())
            with torch.autocast(parallel.device().type, enabled=False):
                said = self.ask(new[i:i + 64])
            for j, caption in enumerate(new[i:i + 64]):
                partial = self.place(caption).with_suffix(f".{os.getpid()}")
                save_file({k: v[j].clone().cpu() for k, v in said.items()}, partial)
                partial.replace(self.place(caption))

    def prime(self, captions):
        self.hear(captions[parallel.rank()::parallel.world()])
        parallel.agree(False)                                # nobody goes on before all have been read

    @torch.no_grad()
    def condition(self, captions, frame=None):
        self.hear(captions)
        read = [self.recall(caption) for caption in captions]
        return {key: torch.stack([one[key].float() for one in read]).to(self.alpha.device) for key in read[0]}

    def place(self, caption):
        """Where on disk it is kept what the text encoders made of a caption."""
        try:
            return self.cache / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"
        except UnicodeEncodeError:
            raise ValueError(f"a caption holds half a character: {ascii(caption[:60])}") from None

    def recall(self, caption):
        """What they made of it, from memory or from disk."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        if caption not in self.read:
            try:
                said = load_file(self.place(caption))
                if len(self.read) * sum(value.nbytes for value in said.values()) > 2 ** 30:
                    self.read.pop(next(iter(self.read)))     # the oldest: a gigabyte of them is enough
                self.read[caption] = said
            except SafetensorError:
                raise ValueError(f"{self.place(caption)} is damaged: remove it") from None
        return self.read[caption]

    def forget(self):
        if self.rank:
            raise ValueError("init=random and --lora exclude each other: adapters on nothing learn nothing")
        self.network = type(self.network).from_config(self.network.config)
        exact(self.last)

    def close(self):
        self.outside.clear()                                 # the text encoders; what they read stays

    def keep(self, out, **facts):
        """LoRA: a file for `pipe.load_lora_weights(out)`. The whole network: a pipeline folder, in which
        everything else is as it came."""
        from peft import get_peft_model_state_dict
        state = get_peft_model_state_dict(self.network) if self.rank else self.network.state_dict()
        state = parallel.whole(state, home=True)
        if parallel.rank() > 0:
            return
        student = "fresh" in facts["rows"][0][1]
        scheduler = self.few_step_scheduler(max(steps for steps, _ in facts["rows"])) if student else None
        if self.rank:
            with survival.whole(out / "pytorch_lora_weights.safetensors") as partial:
                layers = {f"{self.part}_lora_layers": state}
                self.pipeline.save_lora_weights(out, weight_name=partial.name, **layers)
            scheduler and scheduler.save_pretrained(out / "scheduler")
        else:
            pipe = load(self.pipeline, self.source, **({"scheduler": scheduler} if student else {}))
            getattr(pipe, self.part).load_state_dict(state)
            with survival.whole(out / "pipeline") as partial:
                pipe.save_pretrained(partial)
        survival.write(out / "use.md", self.use(scheduler, facts["rows"]))

    def use(self, scheduler, rows):
        """How plain diffusers opens the result and draws with it: Markdown."""
        kind, source = self.pipeline.__name__, self.source if self.rank else "pipeline"
        source = str(Path(source).resolve()) if self.rank and Path(source).exists() else source
        lines = ["import diffusers", f'pipe = diffusers.{kind}.from_pretrained("{source}")']
        if self.rank:
            lines += ['pipe.load_lora_weights(".")']
        if self.rank and scheduler:
            name = type(scheduler).__name__
            lines += [f'pipe.scheduler = diffusers.{name}.from_pretrained(".", subfolder="scheduler")']
        for steps, settings in rows:
            how, scale = f"num_inference_steps={steps}", settings.get("guidance", 1)
            if scheduler and self.target == "flow":          # its own spacing would end at a clean step
                how = "sigmas=[" + ", ".join(f"{1 - i / steps:g}" for i in range(steps)) + "]"
            lines += [f"image = pipe(prompt, {how}, guidance_scale={scale:g}).images[0]"]
        return "\n".join(["In this folder:\n\n```python", *lines, "```\n"])

    def few_step_scheduler(self, steps):
        """A student's path for plain pipelines: leap, forget the noise, draw it anew. diffusers has it under
        the name of consistency models. A flow's must be told its stops: pipe(sigmas=[1, .75, .5, .25])."""
        import diffusers
        if self.target == "flow":
            return diffusers.FlowMatchLCMScheduler.from_pretrained(self.source, subfolder="scheduler")
        return diffusers.LCMScheduler.from_pretrained(
            self.source, subfolder="scheduler", original_inference_steps=steps, timestep_spacing="trailing",
            clip_sample=False, **({} if self.alpha[-1] < 1e-3 else {"rescale_betas_zero_snr": False}))


class SD15(Latent):
    """Stable Diffusion 1.x: a U-Net that knows integer steps and one CLIP's tokens."""

    def ask(self, captions):
        pipe = self.outside[0]
        text = pipe.encode_prompt(captions, parallel.device(), 1, False)[0]               # (B, 77, 768)
        ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        end = (ids == pipe.tokenizer.eos_token_id).int().argmax(1)            # where CLIP sums up
        return {"text": text, "pooled": text[torch.arange(len(text)), end.to(text.device)]}

    def call(self, x, time, cond):
        return self.network(x, time, cond["text"]).sample


class SDXL(Latent):
    """Stable Diffusion XL: two CLIPs, and what the picture's size was and where it was cut."""

    def ask(self, captions):
        pipe = self.outside[0]
        text, _, pooled, _ = pipe.encode_prompt(captions, device=parallel.device(),
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
        text, _, pooled, _ = self.outside[0].encode_prompt(captions, None, None, device=parallel.device(),
                                                           do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def call(self, x, time, cond):
        return self.network(x, cond["text"], cond["pooled"], time).sample


# the adapter, the pipeline's class in diffusers, its public home, pixels
FAMILIES = {"sd15": (SD15, "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
            "sdxl": (SDXL, "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0", 1024),
            "sd3": (SD3, "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3-medium-diffusers", 1024)}


def index_of(source):
    """What is in a diffusers folder, by its own word; nothing of a hub id."""
    path = Path(source) / "model_index.json"
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: copy the folder again") from None


def load(kind, source, **parts):
    """A diffusers pipeline as it came, without pickles, without what it came without (SD 3's T5), and without
    Stable Diffusion 1.5's picture censor and its eyes; in half precision where a folder has nothing else."""
    parents = {path.parent for path in Path(source).glob("*/*.safetensors")}
    halved = any(all(".fp16." in path.name for path in parent.glob("*.safetensors")) for parent in parents)
    variant = {"variant": "fp16"} if halved else {}
    parts = {key: None for key, value in index_of(source).items() if value == [None, None]} | parts
    if kind.__name__ == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind.from_pretrained(source, use_safetensors=True, **variant, **parts)


def pipeline(model, weights, size):
    """--model sd15, sdxl or sd3; --weights, a diffusers folder or a hub id -> the family's Denoiser. Whatever
    is missing, refused or half there is one sentence."""
    import transformers
    transformers.logging.set_verbosity_error()               # it misses torchvision; nobody else does
    import diffusers
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    adapter, name, home, pixels = FAMILIES[model]
    source = str(weights or home)
    index, run = Path(source) / "model_index.json", Path(source) / "config.json"
    if run.is_file() and not index.is_file():                # of train.py: its result, whole or adapters
        plan = survival.read_plan(run)
        if plan["model"] != model:
            raise ValueError(f"{source} is a run of {plan['model']}, not of --model {model}")
        if (Path(source) / "pipeline").is_dir():
            return pipeline(model, Path(source) / "pipeline", size or plan["size"])
        layers = Path(source) / "pytorch_lora_weights.safetensors"
        endless = Path(plan["weights"] or ".").resolve() == Path(source).resolve()
        if not plan["lora"] or endless or not layers.is_file():
            raise FileNotFoundError(f"{source} has no result yet: train.py --resume finishes the run")
        denoiser = pipeline(model, plan["weights"], size or plan["size"])
        denoiser.adapt(plan["lora"])
        denoiser.wear(layers)
        return denoiser
    if Path(source).exists() and not index.is_file():
        raise ValueError(f"--weights {source}: wanted a diffusers folder, found no model_index.json in it")
    if index.is_file() and (held := index_of(source).get("_class_name")) != name:
        raise ValueError(f"--weights {source} holds a {held}: --model {model} wants a {name}")
    if not index.is_file() and (source.count("/") != 1 or source[0] in "./~"):
        raise FileNotFoundError(f"--weights {source}: no such folder, and no hub id either (OWNER/NAME)")
    try:
        pipe = load(getattr(diffusers, name), source)
    except Exception as error:                               # hub, disk, JSON, safetensors: each has its own
        why = str(error).strip().split("\n")[0][:200]
        what = ("complete it, copy it again, or convert its .bin files to .safetensors" if index.is_file()
                else f"look whether the network is there, and whether https://huggingface.co/{source} wants "
                "its licence accepted and a login (`hf auth login`); or name a local folder with --weights")
        raise OSError(f"cannot load {source} ({type(error).__name__}: {why}); {what}") from None
    return adapter(pipe, size or pixels, source)


# ------------------------------------------------------------------------------------------------- DINOv2

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
    source = weights or "facebook/dinov2-small"
    return Dino(metrics.loaded("Dinov2Model", source, "--features", use_safetensors=True))
