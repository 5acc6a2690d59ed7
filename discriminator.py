"""Discriminators: a frozen pretrained network that sees, and light heads that learn to judge what it saw.

A discriminator trained from scratch must first learn to see, and meanwhile teaches nonsense; freezing the
eyes makes adversarial training short and tame. ADT's is *siamese*: it compares the generated picture with a
real one of the same caption. ADD's is *projected*: it looks at one picture by itself, given the caption;
in the small world its verdicts on a real and a made one are then compared (add.py).

Careful: `requires_grad_(False)` on a discriminator keeps gradients out of its weights, not out of the picture
it is shown; the generator's gradient flows through it all the same.               Read next: adt.py"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.utils.parametrizations import spectral_norm


class Features(nn.Module):
    """The frozen backbone: pictures in [-1, 1] -> maps of the chosen layers. It cannot be unfrozen: its
    weights become buffers, which requires_grad_ does not reach, nor an optimiser, nor a checkpoint."""

    def __init__(self, backbone, layers=None):
        """backbone(image) -> (maps (B, D, h, w), CLS tokens (B, D) or None), and its own choice of layers."""
        super().__init__()
        for module in backbone.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, weight.detach(), persistent=False)
        self.backbone, self.layers = backbone.eval(), tuple(layers or backbone.layers)
        with torch.no_grad():
            maps, cls = backbone(torch.zeros(1, 3, 32, 32))
        self.shapes = [maps[i].shape[1:] for i in self.layers]                # (D, h, w) of each
        self.width = cls[-1].shape[1]
        for i, (d, _, _) in enumerate(self.shapes):
            self.register_buffer(f"centre{i}", torch.zeros(d))
            self.register_buffer(f"whiten{i}", torch.eye(d))

    def train(self, mode=True):
        return super().train(False)

    def tokens(self, image):
        """(B, 3, H, W) -> one (B, h, w, D) per layer: CLS, where there is one, is added to every token, then
        each token is brought to zero mean and unit variance, so that heads on any layer start alike."""
        maps, cls = self.backbone(image)
        seen = [maps[i] if cls[i] is None else maps[i] + cls[i][..., None, None] for i in self.layers]
        return [F.layer_norm(x.float().movedim(1, -1), x.shape[1:2]) for x in seen]

    @torch.no_grad()
    def level(self, pictures, floor=.1):
        """From now on, features are whitened by what these pictures show, a list of (B, 3, H, W), real ones
        with the heads' noise: every direction of a layer has the same variance over their tokens. Before, a
        few loud ones have nearly all of it; heads learn a direction the faster the louder it is, and what is
        wrong with a good fake is in the quiet ones. Less than `floor` of the mean variance stays small."""
        sums = [0] * len(self.layers)
        for image in pictures:                               # of 1 and x, the sums of x x^T
            ones = [F.pad(x.flatten(0, 2).double(), (1, 0), value=1.) for x in self.tokens(image)]
            sums = [total + x.T @ x for total, x in zip(sums, ones)]
        for i, total in enumerate(sums):
            moments = total / total[0, 0]
            centre = moments[0, 1:]
            spread, axes = torch.linalg.eigh(moments[1:, 1:] - centre.outer(centre))
            white = axes * (spread.clamp(min=0) + floor * spread.mean()) ** -.5 @ axes.T
            setattr(self, f"centre{i}", centre.float()), setattr(self, f"whiten{i}", white.float())

    def forward(self, image):
        """(B, 3, H, W) -> one (B, D, h, w) per layer, in full precision: what is quiet drowns in bf16."""
        seen = self.tokens(image)
        with torch.autocast(image.device.type, enabled=False):
            return [((x - getattr(self, f"centre{i}")) @ getattr(self, f"whiten{i}")).movedim(-1, 1)
                    for i, x in enumerate(seen)]

    @torch.no_grad()
    def summary(self, image):
        """(B, 3, H, W) -> the whole picture in one vector (B, D): CLS of the last block, or its like."""
        return F.layer_norm(self.backbone(image)[1][-1].float(), (self.width,))

    def heads(self, width, out, spectral=False):
        """One new head per layer; maps finer than the coarsest lose half their resolution in it."""
        coarse = min(h for _, h, _ in self.shapes)
        return nn.ModuleList(Head(d, width, out, 2 if h > coarse else 1, spectral) for d, h, _ in self.shapes)


class Head(nn.Module):
    """A map (B, D, h, w) -> tokens (B, N, out): 1x1 convolution, a residual 3x3 one, 1x1 out. Group norm,
    unlike batch norm, does not couple the samples of a batch; spectral norm, where asked for, keeps the slope
    of the logits gentle."""

    def __init__(self, width_in, width, out, stride=1, spectral=False):
        super().__init__()
        tame = partial(spectral_norm, n_power_iterations=2) if spectral else nn.Identity()
        self.stride = stride
        self.enter = tame(nn.Conv2d(width_in, width, 1))
        self.mix = tame(nn.Conv2d(width, width, 3, stride, padding=1))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.leave = tame(nn.Conv2d(width, out, 1))

    def forward(self, x):
        x = F.leaky_relu(self.norms[0](self.enter(x)), .2)
        x = (F.avg_pool2d(x, self.stride) + F.leaky_relu(self.norms[1](self.mix(x)), .2)) * .5 ** .5
        return self.leave(x).flatten(2).transpose(1, 2).float()               # no sums in bf16 from here on


class Siamese(nn.Module):
    """ADT's discriminator, the same eyes for both pictures: D(real, other) -> logits, one (B, N) per head.

    The paper's abstract fixes the frozen backbone, summaries say 'similarity' and leave open which:
      similarity   scale * cos(h(x), h(y)) + bias              nothing but the angle counts
      twin         <g(x), h(y)> / sqrt(width)                  other heads for the real side (SimSiam-like)
      difference   head(|h(x) - h(y)|)                         the classic siamese network
      relative     D(y | c) - D(x | c)                         see Projected: two verdicts, compared
    and so is where it is averaged: `tokens` judges every token by itself, `score` averages the tokens'
    verdicts of a layer, `all` those of all layers, too, `mean` averages the tokens first and compares two
    vectors per layer."""

    def __init__(self, features, variant="similarity", pool="tokens", width=64):
        super().__init__()
        if variant not in ("similarity", "twin", "difference"):
            raise ValueError(f"unknown siamese variant '{variant}': wanted similarity, twin or difference")
        if pool not in ("tokens", "score", "mean", "all"):
            raise ValueError(f"unknown pooling '{pool}': wanted tokens, score, mean or all")
        self.features, self.variant, self.pool = features, variant, pool
        self.heads = features.heads(width, width)
        if variant == "similarity":
            self.scale, self.bias = nn.Parameter(torch.tensor(4.)), nn.Parameter(torch.tensor(-2.))
        if variant == "twin":
            self.real_heads = features.heads(width, width)
        if variant == "difference":
            self.compare = nn.ModuleList(nn.Linear(width, 1) for _ in features.layers)

    def compare_tokens(self, i, x, y):
        """Layer i: (B, N, W) of either picture -> one score per token (B, N)."""
        if self.variant == "similarity":
            return self.scale * F.cosine_similarity(x, y, dim=-1, eps=1e-6) + self.bias    # ADT similarity
        if self.variant == "twin":
            return (x * y).sum(-1) / x.shape[-1] ** .5
        return self.compare[i]((x - y).abs()).squeeze(-1).float()

    def forward(self, real, other, text=None):
        """real, other (B, 3, H, W); text unseen -> per head (B, N), pooled (B, 1); `all`: one (B, 1)."""
        with torch.no_grad():
            real = self.features(real)                       # the reference is data: no graph here
        logits = []
        for i, (x, y) in enumerate(zip(real, self.features(other))):          # (B, D, h, w) each
            x, y = (self.real_heads if self.variant == "twin" else self.heads)[i](x), self.heads[i](y)
            if self.pool == "mean":
                x, y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
            score = self.compare_tokens(i, x, y)
            logits.append(score.mean(1, keepdim=True) if self.pool in ("score", "all") else score)
        return [torch.cat(logits, 1).mean(1, keepdim=True)] if self.pool == "all" else logits


class Projected(nn.Module):
    """ADD's discriminator, unpaired: per layer and token <h(y), b + W c> / sqrt(width), where c (B, C) is
    what it may know of the picture (its caption's vector, say); without c, a plain logit. It takes ADT's two
    pictures and looks at the second alone; `relative`, it is siamese too: the verdict on the second less the
    verdict on the first, of the same caption. Is it less real than the real one? What they share cancels."""

    def __init__(self, features, known=0, relative=False, width=64):
        super().__init__()
        self.features, self.relative = features, relative
        self.heads = features.heads(width, width if known else 1, spectral=True)
        self.project = nn.ModuleList(nn.Linear(known, width) for _ in features.layers) if known else []
        for project in self.project:
            nn.init.normal_(project.bias)                    # at first the judgement hardly depends on c

    def score(self, maps, known=None):
        """One (B, D, h, w) per layer -> logits, one (B, N) per layer."""
        seen = [head(x) for head, x in zip(self.heads, maps)]
        if self.project:
            # to length 8: shorter, it takes hundreds of steps to be heard; longer, a step of W is many of W c
            known = 8 * F.normalize(known.float())
            with torch.autocast(known.device.type, enabled=False):            # verdicts are not for bf16
                seen = [torch.einsum("bnw,bw->bn", x, w(known))[..., None] / x.shape[-1] ** .5
                        for x, w in zip(seen, self.project)]
        return [x.squeeze(-1) for x in seen]

    def forward(self, real, other, known=None):
        """real (unseen unless relative), other (B, 3, H, W), known (B, C) -> one (B, N) per layer."""
        logits = self.score(self.features(other), known)
        if not self.relative:
            return logits
        with torch.no_grad():
            real = self.features(real)                       # the reference is data: no graph here
        return [y - x for y, x in zip(logits, self.score(real, known))]       # ADT comparison: v(y) - v(x)


def tighten(critic):
    """Let every spectral norm follow its weight, once for all micro-batches of a step: until its weights move
    the critic, in eval mode, is one and the same function, however many pictures it is shown."""
    critic.train()
    for module in critic.modules():
        if hasattr(module, "parametrizations"):
            module.weight                                    # to look at it is to iterate
    critic.eval()


# ------------------------------------------------------------------------------- differentiable augmentation

def visible(image):
    """What a viewer will see: clamped to [-1, 1]. Real pictures end at black and white; an adversary that may
    look beyond them teaches nothing else. The gradient goes straight through, for what is too white to come
    back, but never further out: nobody would see it, and black that grows blacker ruins the next step."""
    outside = (image - image.clamp(-1, 1)).detach()
    if image.requires_grad:
        image = image.view_as(image)                         # a hook of its own
        image.register_hook(lambda slope: torch.where(outside * slope < 0, 0., slope))
    return image - outside


def geometry(n, device=None):
    """One geometric draw per pair: shift (n, 2) and cut-out centre (n, 2), all uniform in [-1, 1]."""
    return torch.rand(n, 4, device=device) * 2 - 1


def augment(image, draw, strength=1.0, noise=0.0, cutout=True):
    """Colour, translation, cut-out (DiffAugment, Zhao et al. 2020) and noise (Sønderby et al. 2016),
    differentiable; the identity with strength and noise 0.
    image (B, 3, H, W), draw from `geometry`. Give both members of a pair the same draw, or their tokens do
    not line up; colours are drawn here, anew for every call: a pair is not real for its identical pixels.

    Ours: each channel has a brightness of its own, and shifts are odd as often as even, however weak. A tint,
    and a 2x2 pattern where a network paints 2x2 pixels at once, are one bias away, for all pictures together:
    who can see their sign fights for them to and fro, with gradients that drown all others. And a drawn
    ground is flat to the last digit, a painted one never: who sees that, without noise, sees nothing else."""
    n, _, h, w = image.shape
    tint, saturation, contrast = (((torch.rand(n, channels, 1, 1, device=image.device) * 2 - 1) * strength)
                                  for channels in (3, 1, 1))
    image = image + .4 * tint
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * (1 + saturation)                          # 0 … 2
    level = image.mean((1, 2, 3), keepdim=True)
    image = level + (image - level) * (1 + .5 * contrast)                     # 0.5 … 1.5
    reach = (torch.tensor([w, h], device=image.device) / 8 * strength).round()
    shift = (draw[:, :2] * (reach.clamp(min=1) if strength > 0 else reach)).round()         # whole pixels
    theta = torch.eye(2, 3, device=image.device).repeat(n, 1, 1)
    theta[:, :, 2] = 2 * shift / torch.tensor([w, h], device=image.device)
    with torch.autocast(image.device.type, enabled=False):   # bf16 confuses the columns of 512 pixels
        grid = F.affine_grid(theta, image.shape, align_corners=False)
    image = F.grid_sample(image, grid, mode="nearest", padding_mode="border", align_corners=False)
    if cutout and strength > 0:
        y, x = torch.meshgrid(torch.linspace(-1, 1, h, device=image.device),
                              torch.linspace(-1, 1, w, device=image.device), indexing="ij")
        away = torch.maximum((x - draw[:, 2, None, None]).abs(), (y - draw[:, 3, None, None]).abs())
        image = image * (away > .5 * strength)[:, None]                       # a square of half the side
    return image + noise * torch.randn_like(image) if noise else image
