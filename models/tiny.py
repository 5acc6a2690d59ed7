"""The tiny text-to-image model: 4.0 M parameters, 32x32 images, trained and sampled on a CPU.

It has the parts of Stable Diffusion in small: TinyTextEncoder (for CLIP), TinyUNet (for the U-Net), and
pixel-unshuffle in place of the VAE. TinyDenoiser joins them behind the interface of models/denoiser.py and
adds the preconditioning of Karras et al. 2022 (EDM):
    y = c_skip x_t + c_out F(x_t / std(x_t))
Weights are in weights/DATA/, trained by scripts/pretrain.py.
Read next: sampler.py"""

import difflib

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from models.denoiser import Denoiser
from utils.checkpoint import save_weights
from utils.messages import BadInput


def noise_schedule(prediction_type, steps=1000):
    """-> alpha, sigma, t_input, each (steps,) float64. Rectified flow, alpha = 1 - sigma, except for eps: an
    eps-model cannot start at alpha_T = 0 and gets the scaled-linear betas of Stable Diffusion."""
    t_input = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    if prediction_type == "eps":
        betas = torch.linspace(.00085 ** .5, .012 ** .5, steps, dtype=torch.float64) ** 2
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), t_input
    return 1 - t_input, t_input, t_input


class Attention(nn.Module):
    """Pre-norm attention with a residual connection: self-attention, or cross-attention to `context`."""

    def __init__(self, dim, num_heads=4, context_dim=None):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim or dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None):
        """x (B, N, D), context (B, M, C), mask (B, M) bool, True at real tokens -> (B, N, D)."""
        h = self.norm(x)
        q = self.q(h)
        k, v = self.kv(h if context is None else context).chunk(2, -1)
        q, k, v = (rearrange(z, "b n (h d) -> b h n d", h=self.num_heads) for z in (q, k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -.5  # (B, heads, N, M)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        h = scores.softmax(-1).to(v.dtype) @ v  # on a CPU this is faster than the fused kernel
        return x + self.out(rearrange(h, "b h n d -> b n (h d)"))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, and an MLP, each with a residual connection."""

    def __init__(self, dim, context_dim=None, mlp_ratio=4):
        super().__init__()
        self.attn = Attention(dim)
        self.cross_attn = Attention(dim, context_dim=context_dim) if context_dim else None
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, mlp_ratio * dim), nn.GELU(),
                                 nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x, mask=None, context=None):
        """x (B, N, D), context (B, M, C) -> (B, N, D). mask belongs to the context, without one to x."""
        x = self.attn(x, mask=mask if context is None else None)
        if self.cross_attn is not None:
            x = self.cross_attn(x, context, mask)
        return x + self.mlp(x)


class TinyTextEncoder(nn.Module):
    """Captions of a closed vocabulary, one token per word -> token states, by two transformer blocks."""

    def __init__(self, vocab, dim=128, max_length=16):
        super().__init__()
        self.token_to_id = {word: i + 2 for i, word in enumerate(vocab)}  # 0: padding, 1: start of caption
        self.max_length = max_length
        self.token_embed = nn.Embedding(len(vocab) + 2, dim)
        self.pos_embed = nn.Parameter(torch.randn(max_length, dim) * .02)
        self.blocks = nn.ModuleList(TransformerBlock(dim) for _ in range(2))
        self.norm = nn.LayerNorm(dim)

    def tokenize(self, captions):
        """B strings -> (B, max_length) token ids. BadInput for an unknown word (with the most similar known
        ones) and for a caption that is too long."""
        token_ids = []
        for caption in captions:
            words = caption.lower().split()
            for word in words:
                if word not in self.token_to_id:
                    suggestions = (difflib.get_close_matches(word, self.token_to_id, 4, .5)
                                   or sorted(self.token_to_id)[:8])
                    raise BadInput(f"the tiny text encoder does not know the word '{word[:40]}' "
                                   f"(in '{caption[:80]}'): it knows {len(self.token_to_id)} words, "
                                   f"the nearest are {', '.join(suggestions)}")
            if len(words) >= self.max_length:
                raise BadInput(f"a caption may have {self.max_length - 1} words at most, not {len(words)}: "
                               f"'{caption[:80]}'")
            padding = [0] * (self.max_length - 1 - len(words))
            token_ids.append([1] + [self.token_to_id[word] for word in words] + padding)
        return torch.tensor(token_ids, device=self.token_embed.weight.device)

    def forward(self, captions):
        """B strings -> text (B, L, D), mask (B, L) bool (True at real tokens), pooled (B, D)."""
        token_ids = self.tokenize(captions)
        mask = token_ids > 0
        x = self.token_embed(token_ids) + self.pos_embed
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        pooled = (x * mask[..., None]).sum(1)  # (B, D); a sum is enough, the layer norm removes the length
        return {"text": x, "mask": mask, "pooled": F.layer_norm(pooled.float(), pooled.shape[1:])}


class GroupNorm(nn.GroupNorm):
    """In fp32, as under autocast on a GPU. In bf16 and channels-last it takes five times as long on a CPU."""

    def forward(self, x):
        return super().forward(x.float())


class ResBlock(nn.Module):
    """Residual block with adaptive group norm: time and caption set scale and shift between the two
    convolutions. Its last layer starts at zero, so the block starts as the identity (plus `skip`)."""

    def __init__(self, in_channels, channels, emb_dim, padding_mode="zeros"):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(8, in_channels), nn.SiLU(),
            nn.Conv2d(in_channels, channels, 3, padding=1, padding_mode=padding_mode))
        self.norm = GroupNorm(8, channels)
        self.emb_proj = nn.Linear(emb_dim, 2 * channels)
        self.out_layers = nn.Sequential(
            nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1, padding_mode=padding_mode))
        self.skip = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()
        nn.init.zeros_(self.out_layers[1].weight)
        nn.init.zeros_(self.out_layers[1].bias)

    def forward(self, x, emb):
        """x (B, C_in, h, w), emb (B, E) -> (B, C, h, w)."""
        scale, shift = self.emb_proj(emb)[:, :, None, None].chunk(2, 1)
        h = self.norm(self.in_layers(x)) * (1 + scale) + shift
        return self.skip(x) + self.out_layers(h)


class TinyUNet(nn.Module):
    """(B, 4 C, 16, 16) -> the same shape, for images of C colour channels. Levels: 24 channels at 32x32,
    64 at 16x16, 160 at 8x8, the last with transformer blocks that attend to the caption's tokens.

    The first and the last layers see pixels (32x32), not latents. A network whose last layer has weights of
    its own for each of a latent's four sub-pixels paints a faint pattern of period two on flat backgrounds.
    Here all pixels share their weights. The convolutions at full resolution repeat the image's edge. Zeros
    around it would be a contour and leave noise in the outermost pixels.

    Two additions help so shallow a network when its input is pure noise, as in one-step sampling: learned
    position embeddings give every location a different input, and a map computed from the pooled caption
    gives a first layout."""

    def __init__(self, image_channels=3, pixel_channels=24, base_channels=64, mid_channels=160,
                 context_dim=128, emb_dim=256):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(128, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.text_embed = nn.Linear(context_dim, emb_dim)
        self.conv_in = nn.Conv2d(image_channels, pixel_channels, 3, padding=1, padding_mode="replicate")
        self.downsample_pixels = nn.Conv2d(pixel_channels, base_channels, 4, stride=2, padding=1)
        self.pos_embed = nn.Parameter(torch.randn(base_channels, 16, 16) * .2)
        self.mid_pos_embed = nn.Parameter(torch.randn(mid_channels, 8, 8) * .2)
        self.down_block = ResBlock(base_channels, base_channels, emb_dim)
        self.downsample = nn.Conv2d(base_channels, mid_channels, 3, stride=2, padding=1)
        self.text_to_map = nn.Sequential(nn.Linear(context_dim, 128), nn.GELU(), nn.Linear(128, 16 * 64))
        self.map_proj = nn.Conv2d(16, mid_channels, 1)
        self.mid_blocks = nn.ModuleList(ResBlock(mid_channels, mid_channels, emb_dim) for _ in range(4))
        self.mid_attn = nn.ModuleList(TransformerBlock(mid_channels, context_dim, 2) for _ in range(2))
        self.upsample_conv = nn.Conv2d(mid_channels, base_channels, 3, padding=1)
        self.up_block = ResBlock(base_channels, base_channels, emb_dim)
        self.to_pixels = nn.Conv2d(base_channels, pixel_channels, 1)
        self.pixel_emb_proj = nn.Linear(emb_dim, 2 * pixel_channels)
        self.pixel_block = ResBlock(pixel_channels, pixel_channels, emb_dim, padding_mode="replicate")
        self.conv_out = nn.Conv2d(pixel_channels, image_channels, 3, padding=1, padding_mode="replicate")
        self.to(memory_format=torch.channels_last)  # convolutions are faster so on a CPU

    def embed(self, t_input, pooled):
        """t_input (B,) in 0..1, pooled (B, C) -> (B, E)."""
        frequencies = torch.exp(torch.linspace(0, 6.9, 64, device=t_input.device))  # 1 … 1000 radians
        angles = t_input[:, None].float() * frequencies
        sinusoids = torch.cat([angles.sin(), angles.cos()], 1)
        return F.silu(self.time_embed(sinusoids) + self.text_embed(pooled))

    def forward(self, x, t_input, text, mask, pooled):
        """x (B, 4 C, 16, 16), t_input (B,) in 0..1, text (B, L, C), mask (B, L), pooled (B, C)."""
        emb = self.embed(t_input, pooled)
        x = F.pixel_shuffle(x, 2).contiguous(memory_format=torch.channels_last)  # (B, C, 32, 32)
        pixel_skip = self.conv_in(x)  # (B, 24, 32, 32)
        x = self.downsample_pixels(pixel_skip) + self.pos_embed  # (B, 64, 16, 16)
        x = self.down_block(x, emb)
        skip = x
        x = self.downsample(x) + self.mid_pos_embed  # (B, 160, 8, 8)
        x = x + self.map_proj(self.text_to_map(pooled).view(-1, 16, 8, 8))
        for i, block in enumerate(self.mid_blocks):
            x = block(x, emb)
            if i % 2:
                tokens = rearrange(x, "b c h w -> b (h w) c")
                tokens = self.mid_attn[i // 2](tokens, mask, text)
                x = rearrange(tokens, "b (h w) c -> b c h w", h=8)
        # the convolution comes before the upsampling: a quarter of the cost
        x = F.interpolate(self.upsample_conv(x), scale_factor=2.0) + skip  # (B, 64, 16, 16)
        x = self.to_pixels(self.up_block(x, emb))
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")  # (B, 24, 32, 32)
        # the noise of x_t comes through this skip, linearly and as strongly as t requires
        scale, shift = self.pixel_emb_proj(emb)[:, :, None, None].chunk(2, 1)
        x = x + pixel_skip * (1 + scale) + shift
        return F.pixel_unshuffle(self.conv_out(self.pixel_block(x, emb)), 2)


class TinyDenoiser(Denoiser):
    """32x32 images from captions. In place of the VAE: pixel-unshuffle, which is exactly invertible, so the
    code for latents runs at no cost.

    Preconditioning, for any prediction type: the part of y that a line through x_t predicts is added in
    closed form, and the network learns the rest, with input and target of unit variance at every t:
        y = c_skip x_t + c_out F(x_t / std(x_t))
        c_skip = cov(x_t, y) / var(x_t),    c_out^2 = var(y) - c_skip cov(x_t, y)
    Without it, 64 channels would have to carry the 12 channels of noise through every layer only to subtract
    them. Fifty sampling steps correct the error of that; a single step does not."""

    resolution = 32

    def __init__(self, vocab, prediction_type="flow", image_channels=3, sigma_data=.8):
        """vocab: all words of the captions. image_channels: 1 for grey images, which cannot get colour noise.
        sigma_data: root mean square of the elements of x0."""
        super().__init__(prediction_type, *noise_schedule(prediction_type))
        self.image_channels, self.latent_shape = image_channels, (4 * image_channels, 16, 16)
        t = torch.arange(self.T)
        alpha, sigma = (table.flatten() for table in self.alpha_sigma(t))
        a, b = (table.flatten() for table in self.target_coefficients(t))
        variance = (alpha * sigma_data) ** 2 + sigma ** 2  # of x_t
        covariance = a * alpha * sigma_data ** 2 + b * sigma  # of x_t and y
        c_skip = covariance / variance
        c_out = ((a * sigma_data) ** 2 + b ** 2 - c_skip * covariance).clamp(min=0).sqrt()
        self.register_buffer("c_skip", c_skip, persistent=False)
        self.register_buffer("c_out", c_out, persistent=False)
        self.register_buffer("x_t_std", variance.sqrt(), persistent=False)  # 1 / c_in
        self.vocab = list(vocab)
        self.text_encoder = TinyTextEncoder(self.vocab)
        self.network = TinyUNet(image_channels)

    def reset_parameters(self):
        self.network = TinyUNet(self.image_channels)

    def save_pretrained(self, run_dir, sampling_configs, **metadata):
        save_weights(self, run_dir / "denoiser.safetensors", vocab=self.vocab,
                     prediction_type=self.prediction_type, image_channels=self.image_channels,
                     sampling_configs=sampling_configs, **metadata)

    def forward_network(self, x, t_input, cond):
        t = t_input * self.T - 1
        c_skip, c_out, x_t_std = (self.interp_table(table, t).view(-1, 1, 1, 1)
                                  for table in (self.c_skip, self.c_out, self.x_t_std))
        return c_skip * x + c_out * self.network(x / x_t_std, t_input, cond["text"], cond["mask"],
                                                 cond["pooled"])

    def encode(self, image):
        if self.image_channels == 1:
            image = image.mean(1, keepdim=True)
        return F.pixel_unshuffle(image, 2)  # (B, 4 C, 16, 16)

    def decode(self, z):
        return F.pixel_shuffle(z, 2).expand(-1, 3, -1, -1)

    def encode_prompts(self, captions, micro_cond=None):
        return self.text_encoder(captions)
