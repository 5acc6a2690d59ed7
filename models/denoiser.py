"""The interface of every diffusion model in this project.

A network outputs y = a x0 + b eps with known (a, b). With x_t = alpha x0 + sigma eps this is a 2x2 linear
system, and its solution (x0, eps) is all that the samplers and the losses need:

    [x_t]   [alpha sigma] [x0 ]          eps: (a, b) = (0, 1)            x0:   (1, 0)
    [ y ] = [  a     b  ] [eps]          v:          (-sigma, alpha)     flow: (-1, 1)

So no sampler and no loss asks which of the four a model predicts.
Timestep 0 is the cleanest, T-1 the noisiest, for every model.
Read next: models/tiny.py (a small implementation), then sampler.py"""

import copy
from contextlib import nullcontext

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from utils import distributed
from utils.precision import autocast

PREDICTION_TYPES = "eps", "x0", "v", "flow"
# Above this factor calls are computed in fp32. Relative error of eps, measured with a U-Net of Stable
# Diffusion 1.5's kind with random weights: bf16 1.3e-2, fp16 1.6e-3, TF32 1.0e-3. At t = T - 1 eps-models
# multiply it by 14.6: noise of standard deviation .19 (bf16), .023 (fp16), .015 (TF32) in every one-step x0.
MAX_AMPLIFICATION = 2.


class Denoiser(nn.Module):
    """Base class. An implementation passes three tables to __init__, sets `network`, `resolution` and
    `latent_shape`, and defines forward_network, encode, decode, encode_prompts, save_pretrained and
    reset_parameters."""

    network: nn.Module              # the trained part; everything else is frozen
    resolution: int                 # side of an image in pixels
    latent_shape: tuple             # (C, h, w) of a latent
    is_large = False                # True: sampling and checkpoints take minutes, not seconds
    metadata = {}                   # header of the file that the weights came from
    guidance_scale = 1.0            # with which the model is usually sampled before any training here
    sample_batch_size = 100         # images sampled in one batch
    lora_rank = 0                   # rank of the LoRA adapters, 0 without
    lora_targets = "attention"      # which layers have adapters
    precision = None                # of calls under autocast(): bf16, fp16, fp32; None: the hardware's best
    recomputes_blocks = False       # after enable_gradient_checkpointing

    def __init__(self, prediction_type, alpha, sigma, t_input):
        """prediction_type: eps, x0, v or flow. alpha, sigma, t_input: (T,) tables from the cleanest timestep
        to the noisiest. t_input is the number that the network receives for a timestep."""
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction type '{prediction_type}': wanted eps, x0, v or flow")
        if prediction_type == "eps" and alpha[-1] == 0:
            raise ValueError("an eps-model needs alpha_T > 0: from pure noise, eps does not determine x0")
        self.prediction_type = prediction_type
        for name, table in (("alpha", alpha), ("sigma", sigma), ("t_input", t_input)):
            self.register_buffer(name, table.float(), persistent=False)

    @property
    def T(self):
        return len(self.alpha)

    def autocast(self):
        """Context manager for calls of the network and of the discriminator."""
        return autocast(self.precision)

    def interp_table(self, table, t):
        """table (T,), t (B,) -> (B,). An integer t is an index. A fractional t interpolates linearly between
        two entries: SD3's own sampler visits such timesteps."""
        t_floor = t.long()
        t_ceil = (t_floor + 1).clamp(max=self.T - 1)
        if not t.is_floating_point():
            return table[t_floor]
        return torch.lerp(table[t_floor], table[t_ceil], (t - t_floor).to(table))

    def alpha_sigma(self, t):
        """t (B,) -> alpha, sigma, each (B, 1, 1, 1)."""
        alpha = self.interp_table(self.alpha, t)
        sigma = self.interp_table(self.sigma, t)
        return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)

    def add_noise(self, x0, t, eps):
        """The forward process, x_t = alpha x0 + sigma eps. x0, eps (B, C, h, w), t (B,) -> (B, C, h, w)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * eps

    def target_coefficients(self, t):
        """(a, b) of y = a x0 + b eps, each (B, 1, 1, 1)."""
        alpha, sigma = self.alpha_sigma(t)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        coefficients = {"eps": (zero, one), "x0": (one, zero), "v": (-sigma, alpha), "flow": (-one, one)}
        return coefficients[self.prediction_type]

    def training_target(self, x0, eps, t):
        """The output of a perfect network: y = a x0 + b eps."""
        a, b = self.target_coefficients(t)
        return a * x0 + b * eps

    def to_x0_eps(self, x_t, y, t):
        """(x_t, y) -> (x0, eps): the 2x2 system solved by Cramer's rule, in x_t's precision, not in y's.
        The determinant is alpha (eps), -sigma (x0), alpha^2 + sigma^2 (v) or alpha + sigma (flow), so
        alpha_T = 0 is no division by zero for v and flow."""
        y = y.to(x_t.dtype)
        alpha, sigma = self.alpha_sigma(t)
        a, b = self.target_coefficients(t)
        determinant = alpha * b - sigma * a
        x0 = (b * x_t - sigma * y) / determinant
        eps = (alpha * y - a * x_t) / determinant
        return x0, eps

    def amplification(self, t, t_next=None, stochasticity=0.0):
        """|d x_next / d y|, the factor of an error of the network's output in the state at t_next, or in x0
        if t_next is None. About 1 or less, except for eps-models: sigma / alpha in x0, 14.6 at the last
        timestep of Stable Diffusion, but .13 in the next state of a 50-step path. t, t_next (B,) -> (B,)"""
        alpha, sigma = self.alpha_sigma(t)
        a, b = self.target_coefficients(t)
        alpha_next, sigma_next = torch.ones_like(alpha), torch.zeros_like(sigma)
        if t_next is not None:
            alpha_next, sigma_next = self.alpha_sigma(t_next)
        sigma_next = (1 - stochasticity ** 2) ** .5 * sigma_next       # the rest of the noise is new
        return ((alpha * sigma_next - sigma * alpha_next) / (alpha * b - sigma * a)).abs().flatten()

    def precision_for(self, t, t_next=None, stochasticity=0.0):
        """Context for a call of `predict`: fp32 instead of autocast to bf16 where an error of bf16 would be
        multiplied by more than MAX_AMPLIFICATION in any image of the batch. Other types than bf16 stay."""
        device_type = self.alpha.device.type
        is_bf16 = (torch.is_autocast_enabled(device_type)
                   and torch.get_autocast_dtype(device_type) == torch.bfloat16)
        if not is_bf16 or self.amplification(t, t_next, stochasticity).max() <= MAX_AMPLIFICATION:
            return nullcontext()
        return torch.autocast(device_type, enabled=False)

    def needs_fp32(self, half_dtype):
        """Whether predictions of x0 from pure noise are computed in fp32 where others are in half_dtype."""
        t = torch.tensor([self.T - 1], device=self.alpha.device)
        return half_dtype == torch.bfloat16 and bool(self.amplification(t) > MAX_AMPLIFICATION)

    def predict(self, x_t, t, cond, uncond=None, guidance_scale=1.0):
        """The network's output with classifier-free guidance: y_u + w (y_c - y_u). w = 1 is no guidance and
        one call; otherwise both halves share one call with a batch of 2B. -> y (B, C, h, w)"""
        t_input = self.interp_table(self.t_input, t)
        if guidance_scale == 1.0:
            return self.forward_network(x_t, t_input, cond)
        if uncond is None:
            raise ValueError("guidance_scale other than 1 needs `uncond`, the condition of empty captions")
        cond_cfg = {key: torch.cat([uncond.get(key, value).expand_as(value), value])
                    for key, value in cond.items()}
        y_u, y_c = self.forward_network(torch.cat([x_t, x_t]), torch.cat([t_input, t_input]),
                                        cond_cfg).chunk(2)
        return y_u + guidance_scale * (y_c - y_u)

    def predict_recomputed(self, *args):
        """`predict` whose graph is not kept: it is computed again in the backward pass, so that one network
        graph is alive at a time. Where every block is recomputed already, the graph holds the blocks' inputs
        only, and a third forward pass would save little: per image 0.16 GiB for SD 1.5 at 512 pixels, 0.5 for
        SDXL and SD 3 at 1024, beside 1.1, 7.4 and 5.3 for a whole graph."""
        if self.recomputes_blocks or not torch.is_grad_enabled():
            return self.predict(*args)
        return checkpoint(self.predict, *args, use_reentrant=False)

    def frozen_copy(self):
        """A frozen copy with a network of its own, for example as the teacher. Everything else is shared."""
        frozen = copy.copy(self)
        frozen._modules = {**self._modules, "network": copy.deepcopy(self.network)}
        return frozen.eval().requires_grad_(False)

    def initial_copy(self):
        """A frozen copy as the model was before its training, on the CPU, read again from where it came."""
        raise NotImplementedError

    def apply_fsdp(self, half_dtype):
        """Shard the network over all processes. half_dtype: type of its calls; None: some are fp32."""
        distributed.apply_fsdp(self.network)

    def add_lora(self, rank, targets="attention"):
        """Freeze the network and add trainable LoRA adapters of this rank. targets: which layers get one."""
        raise ValueError("--lora-rank is for sd15, sdxl and sd3: this network is small enough to train fully")

    def enable_gradient_checkpointing(self):
        """Recompute every block of the network in the backward pass, to save memory."""
        raise ValueError("--gradient-checkpointing is for sd15, sdxl and sd3: this network is small as it is")

    def precompute_prompt_embeds(self, captions):
        """Encode all captions of a run before it starts. ValueError for the first that cannot be encoded."""
        for i in range(0, len(captions), 64):
            self.encode_prompts(captions[i:i + 64])

    def unload_text_encoders(self):
        """Free what only new captions need. Called when every caption has been encoded."""

    def keep_text_encoders(self):
        """Prepare what new captions need for a long stay. Called where there will be new ones."""

    def release_text_encoders(self, has_fixed_captions):
        """Free the text encoders, or keep them, when the known captions of a run have been encoded."""
        if has_fixed_captions:
            self.unload_text_encoders()
        else:
            self.keep_text_encoders()

    def save_pretrained(self, run_dir, sampling_configs, **metadata):
        """Write the trained weights into the run folder, in a format that can be loaded elsewhere.
        sampling_configs: [(num_steps, settings of the sampler)], what the model was trained for.
        metadata: JSON values to store with the weights."""
        raise NotImplementedError

    def reset_parameters(self):
        """Give the network new random weights."""
        raise NotImplementedError

    def forward_network(self, x, t_input, cond):
        """x (B, C, h, w), t_input (B,) in the network's own unit, cond from `encode_prompts`
        -> y (B, C, h, w)."""
        raise NotImplementedError

    def encode(self, image):
        """Image in [-1, 1] (B, 3, H, W) -> latent (B, C, h, w)."""
        raise NotImplementedError

    def encode_batch(self, batch):
        """The latents of a batch's images (B, C, h, w), from the cache where it holds them."""
        return self.encode(batch.image)

    def decode(self, z):
        """Latent (B, C, h, w) -> image (B, 3, H, W), differentiable and not clamped."""
        raise NotImplementedError

    def encode_prompts(self, captions, micro_cond=None):
        """B strings -> a dict of tensors whose first dimension is B; only forward_network reads them. One key
        is always "pooled" (B, P), one vector per caption: discriminators are conditioned on it.
        micro_cond (B, 4): size of the original image and corner of the crop, an input of SDXL."""
        raise NotImplementedError
