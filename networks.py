"""The small networks of the embedded world: a text-to-image U-Net, two pairs of eyes and a judge.

They stand where the large ones stand in real models: TinyText for CLIP, TinyUNet for SD's U-Net, TinyViT for
DINOv2. Nothing here knows about noise levels or adversaries; it is plain torch, trained by pretrain.py.
Read next: models.py"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


# ------------------------------------------------------------------------------ words, and a U-Net that reads

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
        """B strings -> (B, length) word numbers. Of an unknown word an error names the nearest relatives."""
        import difflib
        rows = []
        for caption in captions:
            words = caption.lower().split()
            for word in words:
                if word not in self.index:
                    near = difflib.get_close_matches(word, self.index, 4, .5) or sorted(self.index)[:8]
                    raise ValueError(f"the tiny text encoder does not know the word '{word[:40]}' "
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
        frequency = torch.exp(torch.linspace(0, 6.9, 64, device=x.device))  # 1 … 1000 radians over time 0..1
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
