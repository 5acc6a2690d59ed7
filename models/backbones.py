"""Networks that look at images: the backbones of the discriminators, and the evaluation classifier.

A backbone maps an image to feature maps and CLS tokens and stays frozen; discriminator.py puts trainable
heads on the maps that its `layers` name. TinyViT is the default of the tiny model, TinyCNN an alternative or
an addition, DINOv2 the backbone of Stable Diffusion's discriminators (ADD sec. 3.2). EvalClassifier is not a
backbone: it measures (Fréchet distance, accuracy), and no discriminator may use it.
Weights are in weights/DATA/, trained by scripts/pretrain.py.
Read next: models/loading.py"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from models.tiny import GroupNorm, TransformerBlock
from utils.broadcasting import build_on_rank0
from utils.metrics import load_transformers


def conv_block(in_channels, channels):
    """Two 3x3 convolutions with group norm; the caller applies the second activation."""
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), GroupNorm(8, channels), nn.GELU(),
                         nn.Conv2d(channels, channels, 3, padding=1), GroupNorm(8, channels))


class TinyViT(nn.Module):
    """A convolutional stem (32x32 and 16x16 pixels), then four transformer blocks over 8x8 patch tokens and a
    CLS token. Pretrained to classify attributes (CLS token) and to reconstruct masked 4x4 patches (patch
    tokens); the second task makes its features sensitive to texture."""

    layers = 0, 1, 2, 4, 6  # maps for the discriminator: both stem stages, the embedding, blocks 2 and 4

    def __init__(self, attributes, dim=128, depth=4, patch_size=4, resolution=32):
        """attributes: the number of classes of each attribute."""
        super().__init__()
        self.patch_size = patch_size
        self.stem = nn.ModuleList([conv_block(3, 32), conv_block(32, 64)])
        self.embed = nn.Conv2d(64, dim, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn((resolution // patch_size) ** 2, dim) * .02)
        self.blocks = nn.ModuleList(TransformerBlock(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.pixel_head = nn.Linear(dim, 3 * patch_size * patch_size)
        self.attribute_heads = nn.ModuleList(nn.Linear(dim, n) for n in attributes)
        self.to(memory_format=torch.channels_last)  # convolutions and pooling are faster so on a CPU

    def patchify(self, image):
        """(B, 3, 32, 32) -> (B, 64, 48), the pixels of each patch."""
        return rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)

    def forward(self, image, mask=None):
        """image (B, 3, 32, 32) in [-1, 1], mask (B, 64) bool, True at patches to hide -> maps, cls_tokens.
        maps: (B, 32, 32, 32) and (B, 64, 16, 16) of the stem, then (B, 128, 8, 8) of the embedding and of
        every block, before the final norm. cls_tokens: for each map its CLS token (B, 128), None for the
        stem's."""
        if mask is not None:
            visible_mask = rearrange(~mask, "b (h w) -> b 1 h w", h=image.shape[-2] // self.patch_size)
            image = image * F.interpolate(visible_mask.to(image.dtype), scale_factor=self.patch_size)
        x = image
        maps = []
        for stage in self.stem:
            maps.append(stage(x))
            x = F.max_pool2d(F.gelu(maps[-1]), 2)
        grid_size = x.shape[-1]
        x = rearrange(self.embed(x), "b c h w -> b (h w) c")
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        cls_token = self.cls_token.expand(len(x), -1, -1).to(x.dtype)
        x = torch.cat([cls_token, x + self.pos_embed.to(x.dtype)], 1)  # (B, 1 + 64, D)
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        maps += [rearrange(state[:, 1:], "b (h w) c -> b c h w", h=grid_size) for state in states]
        return maps, [None] * len(self.stem) + [state[:, 0] for state in states]


class TinyCNN(nn.Module):
    """Three convolutional stages (32x32, 16x16, 8x8), pretrained to classify attributes and nothing else. It
    shows how much the choice of the backbone matters."""

    layers = 0, 1, 2

    def __init__(self, attributes, channels=(32, 64, 128)):
        """attributes: the number of classes of each attribute."""
        super().__init__()
        self.stages = nn.ModuleList(conv_block(i, o) for i, o in zip((3, *channels), channels))
        self.norm = nn.LayerNorm(channels[-1])
        self.attribute_heads = nn.ModuleList(nn.Linear(channels[-1], n) for n in attributes)
        self.to(memory_format=torch.channels_last)

    def forward(self, image):
        """image (B, 3, H, W) in [-1, 1] -> maps (one per stage), cls_tokens (None, None, and the mean of the
        pooled last map in place of a CLS token)."""
        x = image
        maps = []
        for stage in self.stages:
            maps.append(stage(x))
            x = F.max_pool2d(F.gelu(maps[-1]), 2)
        return maps, [None] * (len(maps) - 1) + [x.mean((2, 3))]


class JoinedBackbones(nn.Module):
    """Several backbones as one: the maps of each that its `layers` name. The last one's last CLS token is the
    image's embedding."""

    def __init__(self, *networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.layers = tuple(range(sum(len(network.layers) for network in networks)))

    def forward(self, image):
        """image (B, 3, H, W) in [-1, 1] -> maps, cls_tokens of the selected layers, network by network."""
        maps, cls_tokens = [], []
        for network in self.networks:
            network_maps, network_cls = network(image)
            maps += [network_maps[i] for i in network.layers]
            cls_tokens += [network_cls[i] for i in network.layers]
        return maps, cls_tokens


class EvalClassifier(nn.Module):
    """The network behind the metrics. Its 128 features give the Fréchet distance, precision and recall; its
    heads classify the attributes of an image, for the accuracy.

    It shares nothing with the backbones (another architecture, another seed), because a generator learns to
    please the features of its discriminator. In pretraining it also reconstructs the image at half resolution
    from the 128 features; a network that only classifies ignores shading, texture and artefacts."""

    def __init__(self, attributes, channels=32):
        """attributes: the number of classes of each attribute."""
        super().__init__()
        sizes = (3, channels, 2 * channels, 3 * channels)
        self.stages = nn.Sequential(*(nn.Sequential(*conv_block(i, o), nn.GELU(), nn.MaxPool2d(2))
                                      for i, o in zip(sizes, sizes[1:])))
        self.feature_head = nn.Sequential(nn.Flatten(), nn.Linear(3 * channels * 16, 128), nn.LayerNorm(128))
        self.attribute_heads = nn.ModuleList(nn.Sequential(nn.GELU(), nn.Linear(128, n)) for n in attributes)

    def forward(self, image):
        """image (B, 3, 32, 32) in [-1, 1] -> features (B, 128), [logits (B, n) of each attribute]."""
        features = self.feature_head(self.stages(image))
        return features, [head(features) for head in self.attribute_heads]


# ------------------------------------------------------------------------------------------------ DINOv2

class DinoBackbone(nn.Module):
    """DINOv2 with the backbone interface, for images of any size. An image larger than those that DINOv2 was
    trained on (518 pixels) is reduced to that size: its position embeddings would be stretched beyond what it
    has learned, and attention costs grow with the fourth power of the side."""

    def __init__(self, model):
        """model: a transformers Dinov2Model."""
        super().__init__()
        self.model = model
        depth = model.config.num_hidden_layers
        self.layers = sorted({0, *(depth * i // 4 for i in range(1, 5))})  # the embedding and four blocks
        self.register_buffer("mean", torch.tensor((.485, .456, .406)).view(3, 1, 1))  # of ImageNet
        self.register_buffer("std", torch.tensor((.229, .224, .225)).view(3, 1, 1))

    def forward(self, image):
        """image (B, 3, H, W) in [-1, 1] -> maps (B, D, h, w) of the embedding and of every block, and their
        CLS tokens (B, D)."""
        patch_size, max_side = self.model.config.patch_size, self.model.config.image_size
        scale = min(1., max_side / max(image.shape[2:])) / patch_size
        h, w = (max(1, round(n * scale)) for n in image.shape[2:])     # in patches
        image = F.interpolate(image, (h * patch_size, w * patch_size), mode="bicubic", antialias=True)
        image = (image * .5 + .5 - self.mean) / self.std
        states = self.model(image, output_hidden_states=True).hidden_states  # each (B, 1 + h w, D)
        maps = [state[:, 1:].transpose(1, 2).unflatten(2, (h, w)) for state in states]
        return maps, [state[:, 0] for state in states]


def load_dino(kind, source=None):
    """kind "vit": DINOv2 from a transformers folder or hub id (default facebook/dinov2-small). kind "random":
    the same architecture with random weights."""
    if kind == "random":
        from transformers import Dinov2Config, Dinov2Model
        return DinoBackbone(Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)))
    if kind != "vit":
        raise ValueError(f"sd15, sdxl and sd3 have backbone=vit (DINOv2) or random, not {kind}")
    source = source or "facebook/dinov2-small"
    return DinoBackbone(build_on_rank0(
        lambda: load_transformers("Dinov2Model", source, "--backbone", use_safetensors=True)))
