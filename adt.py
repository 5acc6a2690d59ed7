"""ADT, Adversarial Diffusion Tuning (Shen et al. 2025, arXiv 2504.11423): fine-tune a multi-step model.

A diffusion model is trained on noised real images, but at inference it denoises its own outputs. ADT runs the
real inference path in training: noise a real image to a timestep of the path, run the sampler from there to
x0_hat, and let a discriminator compare x0_hat with the real image x0. The diffusion loss is kept. Gradients
flow through K steps of the path and never through the network's inputs (sampler.py).

    L_G = L_diffusion - lambda_adv D(x0, x0_hat)
    L_D = relu(1 - D(sg[x0_hat], x0)) + relu(1 + D(x0, sg[x0_hat]))

This is for D(x, y) = -D(y, x), which decides which of two images is the real one: D(x, y) > 0 says that y
is. For other discriminators the first term is relu(1 - D(x0, x0')), where x0' is the real image with other
colours.

The defaults are the method as published, as far as it is known; RECIPES["tuned"] has what worked better here.
The same names as in add.py: Config, RECIPES, generator_loss, discriminator_loss. Read next: train.py
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

import discriminator
import losses
import sampler
from discriminator import DiscriminatorInputs, augment_alike
from utils import config as settings


@dataclass(kw_only=True)
class Config(settings.DiscriminatorConfig, settings.TrainConfig):
    """Settings of ADT. Provenance: paper (abstract), secondary (summaries, related work), ours."""

    has_teacher = False
    # the first ones to change
    discriminator: Annotated[Literal["similarity", "reference", "ordered", "difference", "relativistic",
                                     "projected"],
                             "ours: how D compares the pair; the paper says siamese, summaries "
                             "similarity"] = "ordered"
    lambda_adv: Annotated[float, "ours: weight of the adversarial loss; 0 = diffusion loss only"] = 0.5
    rollout_start: Annotated[Literal["image", "noise"],
                             "paper: image, a noised real image; noise, pure noise, is ours"] = "image"
    num_inference_steps: Annotated[int, "ours: sampler steps of the path"] = 10
    num_grad_steps: Annotated[int, "ours: K, how many of the steps of an image keep their graph"] = 2
    lr: Annotated[float, "ours: learning rate of the generator"] = 2e-4
    # the rest
    grad_step_selection: Annotated[Literal["strided", "last", "random", "all"],
                                   "secondary: which K steps"] = "strided"
    guidance_scale: Annotated[float, "ours: classifier-free guidance inside the path"] = 1.0
    input_grad_scale: Annotated[float, "secondary: gradient through the network's input, 0 = none"] = 0.0
    checkpoint_rollout: Annotated[bool, "ours: save memory: recompute each call, or its blocks, in the "
                                  "backward pass"] = False
    real_images: Annotated[Literal["original", "vae_reconstruction"],
                           "ours: what D takes as real, x0 or decode(encode(x0))"] = "original"
    lambda_diff: Annotated[float, "ours: weight of the diffusion loss, which the paper keeps"] = 1.0
    caption_dropout: Annotated[float, "ours: fraction of empty captions in the diffusion loss"] = 0.1
    timestep_sampling: Annotated[Literal["uniform", "logit_normal"],
                                 "ours: timesteps of the diffusion loss"] = "uniform"

    def __post_init__(self):
        settings.check_shared(self)
        settings.require_positive(self, "num_inference_steps", "num_grad_steps")
        settings.require_fraction(self, "input_grad_scale", "caption_dropout")
        if self.lambda_adv == self.lambda_diff == 0:
            raise ValueError("lambda_adv and lambda_diff are both 0: there is no loss left")

    def timesteps(self, T):
        """Timesteps of the inference path that training runs -> (num_inference_steps,)."""
        return sampler.make_timesteps(T, self.num_inference_steps)

    def eval_sampling_configs(self, base_guidance_scale=1.0):
        """What is measured after training: (before or after, number of steps, sampling settings).
        base_guidance_scale is not used: both are sampled with guidance_scale, as in training."""
        return [(label, self.num_inference_steps, {"guidance_scale": self.guidance_scale})
                for label in ("before", "after")]

    def check_model(self, model, is_sharded):
        """ValueError if the model cannot be trained with these settings."""
        if is_sharded:
            settings.check_sharded(self)
        self.timesteps(model.T)                                        # ValueError if the path is impossible

    def warnings(self, model):
        """Sentences to print before a large model is trained."""
        return []

    @property
    def needs_images(self):
        """Whether the losses look at the real images and not at their latents alone."""
        return self.lambda_adv > 0 and self.real_images == "original"

    def extra_prompts(self, model):
        """Prompts that training needs besides the captions."""
        return [""]

    def build_discriminator(self, backbone, text_dim):
        """backbone: FrozenBackbone; text_dim: length of the captions' pooled embeddings."""
        if self.discriminator in ("projected", "relativistic"):
            is_relativistic = self.discriminator == "relativistic"
            return discriminator.ProjectedDiscriminator(backbone, text_dim, is_relativistic)
        return discriminator.SiameseDiscriminator(backbone, self.discriminator, text_dim)


# The default is "paper": the settings above. "tuned": every path starts from pure noise; docs/results.md has
# the gains.
RECIPES = {"paper": {}, "tuned": {"rollout_start": "noise"}}

# Presets of large models, {setting: (value, source)}; "sd15 lora" and "sd15 full" are added to "sd15".
# CoMat (partly the same authors) publishes numbers for LoRA of rank 128 on SD 1.5 and SDXL at 512 px. Its
# batch is that of each GPU; here several processes divide batch_size (utils/config.py, divide_batch).
# Real images are VAE reconstructions, since D could otherwise recognise the decoder instead of the generator.
LARGE = {
    "num_inference_steps": (50, "secondary"), "num_grad_steps": (5, "secondary"),
    "guidance_scale": (7.5, "secondary"), "max_grad_norm": (.1, "secondary"), "beta1": (.9, "secondary"),
    "lr_schedule": ("constant", "secondary"), "batch_size": (4, "secondary"),
    "real_images": ("vae_reconstruction", "secondary"), "augment_strength": (1., "secondary"),
    "checkpoint_rollout": (True, "ours"), "warmup_steps_d": (100, "ours"),
    "ema_decay": (.999, "ours")}
SD3 = {**LARGE, "num_inference_steps": (28, "ours"), "num_grad_steps": (5, "ours"), "batch_size": (1, "ours"),
       "guidance_scale": (7., "secondary"), "max_grad_norm": (.1, "ours"), "beta1": (.9, "ours"),
       "timestep_sampling": ("logit_normal", "secondary")}
SD35 = {**SD3, "guidance_scale": (4.5, "secondary")}
SD3_LORA = {"lr": (2e-5, "ours"), "lr_d": (5e-5, "ours")}
FULL = {"lr": (2e-6, "ours"), "lr_d": (5e-5, "ours")}
PRESETS = {
    "sd15": LARGE,
    "sd15 lora": {"lr": (5e-5, "secondary"), "lr_d": (2e-5, "secondary")},
    "sd15 full": {"lr": (5e-6, "ours"), "lr_d": (2e-5, "ours")},
    "sdxl": {**LARGE, "batch_size": (6, "secondary")},
    "sdxl lora": {"lr": (2e-5, "secondary"), "lr_d": (5e-5, "secondary")},
    "sdxl full": FULL,
    "sd3": SD3, "sd3 lora": SD3_LORA, "sd3 full": FULL,
    "sd35": SD35, "sd35 lora": SD3_LORA, "sd35 full": FULL,
    "sd35-large": SD35, "sd35-large lora": SD3_LORA, "sd35-large full": FULL}

# Fine-tuning with the diffusion loss alone, where momentum does no harm: the rates of diffusers' examples.
# guidance_scale is that of the samples only: what the model is usually sampled with.
FINE_TUNING = {"beta1": (.9, "ours"), "lr_schedule": ("constant", "secondary"), "ema_decay": (.999, "ours"),
               "num_inference_steps": (50, "secondary"), "batch_size": (4, "ours")}
FINE_TUNING_FLOW = {**FINE_TUNING, "timestep_sampling": ("logit_normal", "secondary"),
                    "num_inference_steps": (28, "ours")}
DIFFUSION_PRESETS = {"tiny": {"beta1": (.9, "ours"), "lr": (1e-4, "ours")},
                     "sd15": {**FINE_TUNING, "guidance_scale": (7.5, "secondary")},
                     "sdxl": {**FINE_TUNING, "guidance_scale": (5., "secondary")},
                     "sd3": {**FINE_TUNING_FLOW, "guidance_scale": (7., "secondary")},
                     "sd35": {**FINE_TUNING_FLOW, "guidance_scale": (4.5, "secondary")},
                     "sd35-large": {**FINE_TUNING_FLOW, "guidance_scale": (4.5, "secondary")}}
DIFFUSION_PRESETS |= {f"{name} {weights}": {"lr": (lr, "secondary")}
                      for name in ("sd15", "sdxl", "sd3", "sd35", "sd35-large")
                      for weights, lr in (("lora", 1e-4), ("full", 1e-5))}


def rollout_from_batch(model, x0, cond, uncond, config, generator=None):
    """Simulate inference: noise each x0 (B, C, h, w) to a timestep of the path, drawn uniformly, or start
    from noise, and run the sampler to the end -> x0_hat (B, C, h, w), with the truncated gradient.

    generator: draws starts and K steps. It is the same for all micro-batches, so that every process calls the
    network equally often."""
    timesteps = config.timesteps(model.T)
    eps = torch.randn_like(x0)
    starts = torch.zeros(len(x0), dtype=torch.long)
    x = eps
    if config.rollout_start == "image":
        starts = sampler.stratified_starts(len(timesteps), len(x0), generator)
        x = model.add_noise(x0, timesteps[starts].to(x0.device), eps)  # ADT start: t_s uniform over the path
    grad_steps = sampler.select_grad_steps_of_batch(len(timesteps), starts, config.num_grad_steps,
                                                    config.grad_step_selection, generator)
    path = model, x, timesteps, cond, uncond, config.guidance_scale
    # where blocks are recomputed, images that join at different steps would need many small calls
    graphs_are_kept = not config.checkpoint_rollout or model.recomputes_blocks and len(starts.unique()) > 1
    if config.input_grad_scale or not graphs_are_kept:
        return sampler.rollout(*path, grad_steps, config.input_grad_scale, config.checkpoint_rollout,
                               starts=starts)
    call_size = len(x) if config.checkpoint_rollout else None          # recomputes blocks of so many images
    return sampler.rollout_in_two_passes(*path, grad_steps=grad_steps, starts=starts, call_size=call_size)


def generator_loss(model, teacher, disc, batch, config):
    """-> {"diffusion": loss, "adv": loss}, weighted; and DiscriminatorInputs, whose `fake` has its graph, or
    None without adversarial loss. teacher: not used, ADD has one."""
    keep_mask = torch.rand(len(batch.caption)) >= config.caption_dropout
    with torch.no_grad():                                              # VAE and text encoders are frozen
        x0 = model.encode_batch(batch)
        captions = [c if keep else "" for c, keep in zip(batch.caption, keep_mask)]
        cond_dropped = model.encode_prompts(captions, batch.micro_cond)
    t = losses.sample_timesteps(len(x0), model.T, config.timestep_sampling).to(x0.device)
    # recompute, so that this loss's graph does not stay in memory during the rollout
    recompute = config.checkpoint_rollout and config.lambda_adv > 0
    diffusion = losses.diffusion_loss(model, x0, t, torch.randn_like(x0), cond_dropped, recompute)
    if config.lambda_adv == 0:
        return {"diffusion": config.lambda_diff * diffusion}, None

    with torch.no_grad():
        cond = model.encode_prompts(batch.caption, batch.micro_cond)
        uncond = model.encode_prompts([""])
        real = batch.image
        if config.real_images == "vae_reconstruction":
            real = discriminator.clamp_straight_through(model.decode(x0))
    x0_hat = rollout_from_batch(model, x0, cond, uncond, config, batch.generator)
    fake = discriminator.clamp_straight_through(model.decode(x0_hat))  # (B, 3, H, W), with its graph
    adv = losses.hinge_generator(disc(*augment_alike([real, fake], config), cond["pooled"]))
    losses_dict = {"diffusion": config.lambda_diff * diffusion,
                   "adv": config.lambda_adv * adv}                     # ADT L_G: their sum
    return losses_dict, DiscriminatorInputs(real, fake, cond["pooled"])


def discriminator_loss(disc, inputs, config):
    """-> {"d": loss}, logits_real, logits_fake; inputs: DiscriminatorInputs.

    The real pair is the real image twice, with the same geometry and independent colours and noise; the fake
    pair is the real image and the generated one. With an antisymmetric discriminator, D(x, y) = -D(y, x), the
    real pair is the fake pair in the other order: D says which of the two images is the real one."""
    real, fake = inputs.real, inputs.fake.detach()
    if disc.is_antisymmetric:
        logits_fake = disc(*augment_alike([real, fake], config), inputs.cond)  # D(x0, sg[x0_hat])
        logits_real = [-d for d in logits_fake]                        # D(sg[x0_hat], x0)
    else:
        logits_real = disc(*augment_alike([real, real], config), inputs.cond)  # D(x0, x0')
        logits_fake = disc(*augment_alike([real, fake], config), inputs.cond)  # D(x0, sg[x0_hat])
    loss = losses.hinge_real(logits_real) + losses.hinge_fake(logits_fake)  # ADT L_D
    return {"d": loss}, logits_real, logits_fake
