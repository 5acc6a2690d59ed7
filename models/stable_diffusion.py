"""Stable Diffusion 1.5, XL and 3 behind the interface of models/denoiser.py.

A diffusers pipeline is taken apart: its scheduler gives the tables alpha, sigma and t_input, its U-Net or
transformer is the trained network, its VAE encodes and decodes, its encode_prompt encodes the captions. The
result of a training run goes back into a pipeline folder, or is a LoRA file that any such pipeline loads.
Read next: models/families.py (loading), models/prompt_cache.py (captions), models/export.py (model card)"""

import copy

import torch
from tqdm import tqdm

from models import export, half_precision, pipelines, prompt_cache
from models.denoiser import Denoiser
from utils import distributed
from utils.broadcasting import build_on_rank0
from utils.checkpoint import atomic_write, atomic_write_text
from utils.messages import BadInput

# Layers that get LoRA adapters, by the ends of their names, in U-Nets and in SD3's transformer. "all" is the
# recipe of LCM-LoRA: a few-step student has to change more than its attention.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LORA_TARGETS = {"attention": ATTENTION, "all": [
    *ATTENTION, "proj_in", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj",
    "downsamplers.0.conv", "upsamplers.0.conv", "attentions.0.proj_out", "attentions.1.proj_out",
    "attentions.2.proj_out", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear",
    "norm1_context.linear"]}


def schedule_from_diffusers(scheduler):
    """A diffusers scheduler -> prediction_type, alpha, sigma, t_input, tables (T,) from the cleanest timestep
    to the noisiest. ValueError for a scheduler without such tables.

    The sigmas of a flow are those of the constructor: set_timesteps would shift them a second time."""
    class_name = type(scheduler).__name__
    if class_name.startswith("FlowMatch"):
        sigma = scheduler.sigmas.double().flip(0)
        return "flow", 1 - sigma, sigma, sigma * scheduler.config.num_train_timesteps
    found = scheduler.config.get("prediction_type")
    prediction_type = {theirs: ours for ours, theirs in export.PREDICTION_TYPES.items()}.get(found)
    if prediction_type is None or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"the pipeline's scheduler is a {class_name} with prediction_type {found}: wanted "
                         "one with alphas_cumprod that predicts epsilon, v_prediction or sample, or a "
                         "FlowMatch scheduler")
    alphas_cumprod = scheduler.alphas_cumprod.double()
    return (prediction_type, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(),
            torch.arange(len(alphas_cumprod)))


class LatentDenoiser(Denoiser):
    """What the three families share. The pipeline itself is kept in a list, so that its text encoders are no
    submodules of the model; `unload_text_encoders` drops it."""

    is_large = True
    keeps_text_encoders = False        # True: there are too many captions to encode them before the training
    sample_batch_size = 4
    component_name = "unet"            # of the trained network in the pipeline

    def __init__(self, pipe, resolution, pretrained_path, vae_path=None):
        """pipe: a diffusers pipeline. resolution: side of the images in pixels. pretrained_path: the folder,
        file or hub id that it came from. vae_path: that of its VAE, if it is not the pipeline's own."""
        super().__init__(*schedule_from_diffusers(pipe.scheduler))
        self.network = getattr(pipe, self.component_name)
        self.vae = pipe.vae
        self.pipeline_cls, self.pretrained_path, self.vae_path = type(pipe), pretrained_path, vae_path
        self.scheduler_config = dict(pipe.scheduler.config)
        self.lora_preloaded = False    # the adapters came with the weights, from an earlier run
        self.lora_layers = []          # layers with adapters; a list, so that they are no second submodules
        self.lora_disabled = False     # in a frozen copy: the network without its adapters
        vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size_multiple = pipelines.LATENT_MULTIPLE * vae_scale_factor
        if resolution < 1 or resolution % self.size_multiple:
            raise ValueError(f"--resolution {resolution}: wanted a multiple of {self.size_multiple}, since "
                             "the network halves the latent three times")
        self.resolution = resolution
        self.latent_shape = (self.vae.config.latent_channels, resolution // vae_scale_factor,
                             resolution // vae_scale_factor)
        self.requires_grad_(False)
        self.network.requires_grad_(True)
        half_precision.run_in_fp32(self.output_layer)
        self.vae.enable_gradient_checkpointing()
        self._pipe = [pipe]
        self.prompt_cache = prompt_cache.PromptCache(
            prompt_cache.text_encoding_hash(pipe, type(self).__name__, self.network.config))

    @property
    def output_layer(self):
        return self.network.conv_out if self.component_name == "unet" else self.network.proj_out

    # ------------------------------------------------------------------------------------------- the VAE

    def encode(self, image):
        return self.scaled([self.run_vae(lambda x: self.vae.encode(x).latent_dist.sample(), item)
                            for item in image.split(1)])

    def encode_moments(self, image):
        """(B, 3, H, W) -> mean and log variance of the VAE's latents (B, 2C, h, w), which sample_latents
        takes."""
        return torch.cat([self.run_vae(lambda x: self.vae.encode(x).latent_dist.parameters, item)
                          for item in image.split(1)])

    def sample_latents(self, moments):
        """encode, from the moments of the images."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        return self.scaled([self.run_vae(lambda x: DiagonalGaussianDistribution(x).sample(), item)
                            for item in moments.split(1)])

    def scaled(self, latents):
        """A list of the VAE's latents -> the network's (B, C, h, w)."""
        return (torch.cat(latents) - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def encode_batch(self, batch):
        return self.encode(batch.image) if batch.moments is None else self.sample_latents(batch.moments)

    def decode(self, z):
        """One image at a time. Every block is recomputed in the backward pass: the graph of one image of 1024
        pixels would take 19 GiB; so it is 1.6 GiB, and 6.1 GiB at the peak of the backward pass (in bf16)."""
        z = z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        return torch.cat([self.run_vae(lambda x: self.vae.decode(x).sample, item) for item in z.split(1)])

    def run_vae(self, function, x):
        """function(x), in the half precision that the VAE's weights have been cast to, or else in fp32 under
        the caller's autocast. -> fp32"""
        device_type, dtype = x.device.type, self.vae.dtype
        if dtype != torch.float32:
            # without autocast, under which every group norm would return and keep fp32
            with torch.autocast(device_type, enabled=False):
                return function(x.to(dtype)).float()
        autocast_dtype = torch.get_autocast_dtype(device_type)
        is_enabled = torch.is_autocast_enabled(device_type) and self.vae_dtype(autocast_dtype) != dtype
        with torch.autocast(device_type, autocast_dtype, enabled=is_enabled):
            return function(x.float()).float()

    def vae_dtype(self, half_dtype):
        """The type in which the VAE can compute where the network computes in half_dtype. Only SDXL's
        overflows, and only in fp16."""
        return half_dtype

    # --------------------------------------------------------------------------------------- the captions

    def encode_prompt(self, captions):
        """B strings -> {"text": (B, N, D), "pooled": (B, P)}, by the pipeline's own encode_prompt."""
        raise NotImplementedError

    def text_encoders(self):
        return [component for name, component in self._pipe[0].components.items()
                if name.startswith("text_encoder") and component is not None]

    @torch.no_grad()
    def cache_prompt_embeds(self, captions):
        """Encode captions and put them into the cache, a file for each FILE_BYTES."""
        if captions and not self._pipe:
            raise BadInput(f"the text encoders are unloaded and have not encoded '{captions[0][:80]}', or "
                           f"its encoding in {self.prompt_cache.folder} is damaged: start again")
        device, pending, num_bytes = distributed.get_device(), [], 0
        for i in tqdm(range(0, len(captions), 64), "captions", disable=len(captions) < 5000):
            for encoder in self.text_encoders():
                encoder.to(device)
            with torch.autocast(device.type, enabled=False):
                encodings = self.encode_prompt(captions[i:i + 64])
            pending.append({key: value.float().cpu() for key, value in encodings.items()})
            num_bytes += 2 * sum(value.numel() for value in encodings.values())
            is_last = i + 64 >= len(captions)
            if num_bytes >= prompt_cache.FILE_BYTES or is_last:
                start = i + 64 - 64 * len(pending)
                self.prompt_cache.store(captions[start:i + 64], {
                    key: torch.cat([encodings[key] for encodings in pending]) for key in pending[0]})
                pending, num_bytes = [], 0

    def precompute_prompt_embeds(self, captions):
        """Encode the captions of a run, each process its share; or, where they would need more than
        DISK_BYTES, keep the text encoders and encode every batch when it is needed."""
        captions = list(dict.fromkeys(captions))
        row_bytes = sum(value[0].numel() * 2 for value in self.encode_prompts(captions[:1]).values())
        gib = row_bytes * len(captions) / 2 ** 30
        for caption in captions:
            self.prompt_cache.digest(caption)                          # BadInput for what is no text
        if row_bytes * len(captions) > prompt_cache.DISK_BYTES:
            self.keep_text_encoders()
            note = (f"their encodings would take {gib:,.0f} GiB, so each batch is encoded when it is needed; "
                    "the text encoders stay in memory")
        else:
            share = captions[distributed.get_rank()::distributed.get_world_size()]
            note = f"their encodings take {gib:.1f} GiB in {self.prompt_cache.folder}, up to 1 GiB in memory"
        if len(captions) >= 1000 and distributed.get_rank() == 0:
            print(f"{len(captions):,} captions: {note}")
        if not self.keeps_text_encoders:
            missing = [caption for caption in share if self.prompt_cache.load(caption) is None]
            self.cache_prompt_embeds(missing)
        self.prompt_cache.on_disk = False  # a stream has other captions in every batch
        distributed.barrier()  # every caption has been encoded before any process goes on

    def keep_text_encoders(self):
        """On a GPU in half precision: in fp32 SD 3's would take some 20 GiB of it."""
        self.keeps_text_encoders, self.prompt_cache.on_disk = True, False
        if distributed.get_device().type == "cuda":
            half_precision.cast_text_encoders(self.text_encoders())

    @torch.no_grad()
    def encode_prompts(self, captions, micro_cond=None):
        encodings = {caption: self.prompt_cache.load(caption) for caption in captions}
        missing = [caption for caption, encoding in encodings.items() if encoding is None]
        self.cache_prompt_embeds(missing)
        encodings |= {caption: self.prompt_cache.load(caption) for caption in missing}
        # in fp32, as above: autocast to bf16 refuses to join tensors in fp16
        return {key: torch.stack([encodings[caption][key].float() for caption in captions])
                .to(self.alpha.device) for key in encodings[captions[0]]}

    def unload_text_encoders(self):
        if not self.keeps_text_encoders:
            self._pipe.clear()

    # ---------------------------------------------------------------------------------------- the network

    def call_network(self, x, t_input, cond):
        """forward_network of the family."""
        raise NotImplementedError

    def forward_network(self, x, t_input, cond):
        if not self.lora_disabled:
            return self.call_network(x, t_input, cond)
        self.switch_adapters(False)
        try:
            return self.call_network(x, t_input, cond)
        finally:
            self.switch_adapters(True)

    def switch_adapters(self, enabled):
        """Only the flag is set that every adapted layer reads in its forward pass. peft's own function also
        sets requires_grad, which costs SDXL .1 s per pair of calls and is wrong while a graph is alive."""
        for layer in self.lora_layers:
            layer._disable_adapters = not enabled

    def reset_parameters(self):
        if self.lora_rank:
            raise ValueError("init=random and --lora-rank exclude each other: adapters of a network without "
                             "training cannot learn to generate images")
        self.network = type(self.network).from_config(self.network.config)
        half_precision.run_in_fp32(self.output_layer)

    def enable_gradient_checkpointing(self):
        self.network.enable_gradient_checkpointing()
        self.recomputes_blocks = True

    def cast_frozen(self, half_dtype, network_dtype=None):
        """Frozen weights of the network and the VAE become half_dtype (network_dtype: of the network, if it
        is another one). Under autocast of the same type the network's results do not change."""
        half_precision.accept_fp32_inputs(self.network, self.output_layer)
        half_precision.cast_frozen_weights(self.network, network_dtype or half_dtype, self.output_layer)
        self.vae.to(self.vae_dtype(half_dtype))
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")  # TF32 for what is computed in fp32

    def apply_fsdp(self, half_dtype):
        """Weights are gathered in half_dtype, as autocast casts them anyway; the output layer's in fp32."""
        half_precision.accept_fp32_inputs(self.network, self.output_layer)
        distributed.apply_fsdp(self.network, half_dtype, [self.output_layer])

    # ------------------------------------------------------------------------------------------------ LoRA

    def add_lora(self, rank, targets="attention"):
        """Freeze the network and add adapters; targets: a key of LORA_TARGETS. Adapters of an earlier run are
        trained on."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
        if self.lora_rank not in (0, rank):
            raise ValueError(f"--lora-rank {rank}: the run that --pretrained names has adapters of rank "
                             f"{self.lora_rank}")
        if self.lora_rank and self.lora_targets != targets:
            raise ValueError(f"--lora-targets {targets}: the run that --pretrained names has adapters on "
                             f"{self.lora_targets}")
        if self.lora_rank:
            return
        self.lora_rank, self.lora_targets = rank, targets
        self.network.requires_grad_(False)
        self.network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                            target_modules=LORA_TARGETS[targets]))
        self.lora_layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]

    def load_lora(self, path):
        """Load the adapters that `save_pretrained` wrote; ValueError if they belong to another network."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        prefix = f"{self.component_name}."
        try:
            lora_state = {name.removeprefix(prefix): value for name, value in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error})") from None
        expected = {name: value.shape for name, value in get_peft_model_state_dict(self.network).items()}
        if {name: value.shape for name, value in lora_state.items()} != expected:
            raise ValueError(f"{path} does not hold the adapters of this network")
        set_peft_model_state_dict(self.network, lora_state)
        self.lora_preloaded = True

    def frozen_copy(self):
        """With new adapters no second network is needed: the same one without its adapters is the frozen
        model. Adapters of an earlier run belong to the frozen model, so these are copied."""
        if not self.lora_rank or self.lora_preloaded:
            return super().frozen_copy()
        frozen = copy.copy(self)
        frozen.lora_disabled = True
        return frozen

    def initial_copy(self):
        def load_network():
            pipe = pipelines.load_pipeline(self.pipeline_cls, self.pretrained_path)
            return getattr(pipe, self.component_name)

        frozen = copy.copy(self)
        frozen._modules = {**self._modules, "network": build_on_rank0(load_network)}
        half_precision.run_in_fp32(frozen.output_layer)
        return frozen.eval().requires_grad_(False)

    # ------------------------------------------------------------------------------------------- the result

    def save_pretrained(self, run_dir, sampling_configs, **metadata):
        """Write a LoRA file and a scheduler folder, or a whole pipeline folder, and README.md, which tells
        how plain diffusers opens it. All processes must call it."""
        from peft import get_peft_model_state_dict
        scheduler = export.make_scheduler(self, export.is_few_step(sampling_configs))
        state = get_peft_model_state_dict(self.network) if self.lora_rank else self.network.state_dict()
        state = distributed.gather_full(state, cpu_rank0=True)
        if distributed.get_rank() > 0:
            return
        if self.lora_rank:
            with atomic_write(run_dir / "pytorch_lora_weights.safetensors") as tmp_path:
                lora_layers = {f"{self.component_name}_lora_layers": state}
                self.pipeline_cls.save_lora_weights(tmp_path.parent, weight_name=tmp_path.name, **lora_layers)
            if self.component_name == "unet":
                export.save_kohya_lora(state, run_dir / export.KOHYA_FILE)
            with atomic_write(run_dir / "scheduler") as tmp_path:
                scheduler.save_pretrained(tmp_path)
        else:
            pipe = pipelines.load_pipeline(self.pipeline_cls, self.pretrained_path, scheduler=scheduler)
            if self.vae_path:
                pipe.register_modules(vae=self.vae)
            getattr(pipe, self.component_name).load_state_dict(state)
            with atomic_write(run_dir / "pipeline") as tmp_path:
                pipe.save_pretrained(tmp_path)
        card = export.model_card(self, run_dir, scheduler, sampling_configs, metadata)
        atomic_write_text(run_dir / "README.md", card)


class SD15(LatentDenoiser):
    """Stable Diffusion 1.x: a U-Net with integer timesteps, one CLIP text encoder."""

    def encode_prompt(self, captions):
        pipe = self._pipe[0]
        text = pipe.encode_prompt(captions, distributed.get_device(), 1, False)[0]          # (B, 77, 768)
        ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        end = (ids == pipe.tokenizer.eos_token_id).int().argmax(1)  # CLIP's pooled output is at this token
        return {"text": text, "pooled": text[torch.arange(len(text)), end.to(text.device)]}

    def call_network(self, x, t_input, cond):
        return self.network(x, t_input, cond["text"]).sample


class SDXL(LatentDenoiser):
    """Stable Diffusion XL: two CLIP text encoders; the network is also given the size of the original image,
    the corner of the crop and the size that it is to generate."""

    def encode_prompt(self, captions):
        pipe = self._pipe[0]
        text, _, pooled, _ = pipe.encode_prompt(captions, device=distributed.get_device(),
                                                do_classifier_free_guidance=False)
        if pipe.config.force_zeros_for_empty_prompt:  # zeros stood for "no caption" in SDXL's training
            keep_mask = torch.tensor([bool(caption) for caption in captions], device=text.device).to(text)
            text, pooled = text * keep_mask[:, None, None], pooled * keep_mask[:, None]
        return {"text": text, "pooled": pooled}

    def vae_dtype(self, half_dtype):
        """diffusers' own rule: fp32 in place of fp16 where the VAE's config says so. Only the VAE that was
        made for fp16 says force_upcast=false; bf16 has fp32's range and needs no exception."""
        is_unsafe = half_dtype == torch.float16 and self.vae.config.force_upcast
        return torch.float32 if is_unsafe else half_dtype

    def encode_prompts(self, captions, micro_cond=None):
        cond = super().encode_prompts(captions)
        if micro_cond is None:
            return cond
        return {**cond, "micro_cond": micro_cond.to(self.alpha.device)}

    def call_network(self, x, t_input, cond):
        micro_cond = cond.get("micro_cond")
        pixels_per_latent = self.resolution // self.latent_shape[-1]
        height, width = (side * pixels_per_latent for side in x.shape[-2:])
        if micro_cond is None:
            micro_cond = torch.tensor([[height, width, 0, 0]], device=x.device)
        target_size = micro_cond.new_tensor([[height, width]]).expand(len(micro_cond), 2)
        time_ids = torch.cat([micro_cond, target_size], 1).expand(len(x), 6)
        added_cond = {"text_embeds": cond["pooled"], "time_ids": time_ids}
        return self.network(x, t_input, cond["text"], added_cond_kwargs=added_cond).sample


class SD3(LatentDenoiser):
    """Stable Diffusion 3: a transformer trained by rectified flow, two CLIP text encoders and T5."""

    component_name = "transformer"

    def encode_prompt(self, captions):
        text, _, pooled, _ = self._pipe[0].encode_prompt(
            captions, None, None, device=distributed.get_device(), do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def call_network(self, x, t_input, cond):
        return self.network(x, cond["text"], cond["pooled"], t_input).sample
