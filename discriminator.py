"""The discriminators: a frozen pretrained backbone and small trainable heads on several of its layers.

A discriminator trained from scratch first has to learn features and gives useless gradients meanwhile; with a
frozen backbone only the heads are trained. ADT's discriminator is siamese: D(real, fake) compares the
generated image with a real one (SiameseDiscriminator). ADD's is projected: D(image, c) rates one image given
its caption (ProjectedDiscriminator, Projected GAN and StyleGAN-T). For ADT, relativistic=True returns the
difference of the logits of a pair.

Note: requires_grad_(False) on a discriminator freezes its parameters. Gradients with respect to its input
image still flow, and the generator needs them.
Read next: adt.py
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm


class DiscriminatorInputs(NamedTuple):
    """What the generator half hands to the discriminator half."""

    real: torch.Tensor                 # (B, 3, H, W) in [-1, 1]
    fake: torch.Tensor                 # (B, 3, H, W) in [-1, 1]
    cond: torch.Tensor | None          # (B, cond_dim): what D is conditioned on


# --------------------------------------------------------------------------------- frozen backbone and heads

class FrozenBackbone(nn.Module):
    """A pretrained network: images (B, 3, H, W) in [-1, 1] -> feature maps of selected layers.

    Its parameters become buffers: requires_grad_, optimisers and checkpoints do not reach them."""

    def __init__(self, network):
        """network(image) -> (list of maps (B, D, h, w), list of CLS tokens (B, D) or None); network.layers:
        which of them to use."""
        super().__init__()
        for module in network.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, param.detach(), persistent=False)
        self.network = network.eval()
        self.layers = tuple(network.layers)
        with torch.no_grad():
            maps, cls = network(torch.zeros(1, 3, 32, 32, device=next(network.buffers()).device))
        self.map_shapes = [maps[i].shape[1:] for i in self.layers]     # (D, h, w) of each layer
        self.embed_dim = cls[-1].shape[1]
        for i, (channels, _, _) in enumerate(self.map_shapes):
            self.register_buffer(f"feat_mean{i}", torch.zeros(channels))
            self.register_buffer(f"feat_whiten{i}", torch.eye(channels))

    def train(self, mode=True):
        return super().train(False)

    def normalized_maps(self, image):
        """(B, 3, H, W) -> one (B, h, w, D) per layer. The CLS token, where there is one, is added to every
        token (StyleGAN-T); each token is then layer-normalised, so that all layers have the same scale."""
        maps, cls = self.network(image)
        selected = [maps[i] if cls[i] is None else maps[i] + cls[i][..., None, None] for i in self.layers]
        return [F.layer_norm(x.float().movedim(1, -1), x.shape[1:2]) for x in selected]

    @torch.no_grad()
    def fit_whitening(self, batches, eps=.1):
        """Whiten the features from now on: equal variance in all directions of a layer, over the tokens of
        these images (a list of (B, 3, H, W)). Without whitening a few directions hold nearly all variance,
        and gradient descent on the heads ignores the others. eps: regulariser, as a fraction of the mean
        variance."""
        moment_sums = [0] * len(self.layers)
        for image in batches:
            for i, maps in enumerate(self.normalized_maps(image)):
                x1 = F.pad(maps.flatten(0, 2).double(), (1, 0), value=1.)      # (tokens, 1 + D)
                moment_sums[i] = moment_sums[i] + x1.T @ x1
        for i, moment_sum in enumerate(moment_sums):
            moments = moment_sum / moment_sum[0, 0]
            mean = moments[0, 1:]
            eigvals, eigvecs = torch.linalg.eigh(moments[1:, 1:] - mean.outer(mean))
            whitening = eigvecs * (eigvals.clamp(min=0) + eps * eigvals.mean()) ** -.5 @ eigvecs.T
            setattr(self, f"feat_mean{i}", mean.float())
            setattr(self, f"feat_whiten{i}", whitening.float())

    def forward(self, image):
        """(B, 3, H, W) -> one (B, D, h, w) per layer, in fp32: in bf16 whitening would amplify the
        rounding errors of directions of small variance."""
        maps = self.normalized_maps(image)
        whitened = []
        with torch.autocast(image.device.type, enabled=False):
            for i, x in enumerate(maps):
                x = (x - getattr(self, f"feat_mean{i}")) @ getattr(self, f"feat_whiten{i}")
                whitened.append(x.movedim(-1, 1))
        return whitened

    @torch.no_grad()
    def global_embedding(self, image):
        """(B, 3, H, W) -> the last CLS token (or mean token), layer-normalised (B, D)."""
        return F.layer_norm(self.network(image)[1][-1].float(), (self.embed_dim,))

    def make_heads(self, channels, out_channels):
        """One new Head per layer; maps finer than the coarsest are reduced to half their resolution."""
        min_side = min(h for _, h, _ in self.map_shapes)
        return nn.ModuleList(Head(d, channels, out_channels, 2 if h > min_side else 1)
                             for d, h, _ in self.map_shapes)


def build_backbone(network, images, noise_std=0.0):
    """FrozenBackbone(network), whitened on images (B, 3, H, W) with the noise that the discriminator's inputs
    will have."""
    backbone = FrozenBackbone(network).to(images.device)
    noised = images + noise_std * torch.randn_like(images) if noise_std else images
    backbone.fit_whitening(noised.split(8))
    return backbone


class Head(nn.Module):
    """(B, D, h, w) -> tokens (B, N, out_channels): 1x1 convolution (2x2 with stride 2), residual 3x3, 1x1.

    Group norm instead of StyleGAN-T's batch norm, which couples the samples of a batch. Spectral norm as in
    StyleGAN-T; where a group norm follows, the scale of the weights cancels anyway."""

    def __init__(self, in_channels, channels, out_channels, stride=1):
        super().__init__()
        normalize = partial(spectral_norm, n_power_iterations=2)
        self.conv_in = normalize(nn.Conv2d(in_channels, channels, stride, stride))
        self.conv = normalize(nn.Conv2d(channels, channels, 3, padding=1))
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(2))
        self.conv_out = normalize(nn.Conv2d(channels, out_channels, 1))

    def forward(self, x):
        x = F.leaky_relu(self.norms[0](self.conv_in(x).float()), .2)   # fp32; bf16 is slow on a CPU
        residual = F.leaky_relu(self.norms[1](self.conv(x).float()), .2)
        x = (x + residual) * .5 ** .5
        return self.conv_out(x).flatten(2).transpose(1, 2).float()     # (B, N, out_channels), fp32 from here


def make_cond_proj(backbone, cond_dim, channels):
    """W of projection conditioning (Miyato and Koyama 2018), a linear map per layer, or none."""
    maps = nn.ModuleList(nn.Linear(cond_dim, channels) for _ in backbone.layers if cond_dim)
    for linear in maps:
        nn.init.normal_(linear.bias)                                   # initially D hardly depends on c
    return maps


def project_condition(linear, cond):
    """c (B, cond_dim) -> W c (B, channels), in fp32. c gets length 8: if it is shorter, D needs hundreds of
    steps to use it; if longer, W c changes too fast."""
    cond = 8 * F.normalize(cond.float())
    with torch.autocast(cond.device.type, enabled=False):
        return linear(cond)


# ------------------------------------------------------------------------------------------- discriminators

SIAMESE_KINDS = "similarity", "reference", "ordered", "difference"


class SiameseDiscriminator(nn.Module):
    """ADT's discriminator: the same backbone sees both images, D(real, fake) -> one (B, N) per layer.

    The abstract names the siamese network and its frozen backbone; summaries add small convolutional heads on
    selected layers and a score that is the similarity of both images. Which similarity is unknown, so there
    are four kinds; g, h: heads, W c: a linear map of the caption's embedding c (B, P):
      similarity   scale * cos(h(x), h(y)) + bias                            with learned scale and bias
      reference    <g(x) + W c, h(y)> / sqrt(channels)                       the real image is a condition
      ordered      (<g(x) + W c, h(y)> - <g(y) + W c, h(x)>) / sqrt(channels)
      difference   linear(|h(x) - h(y)|)                                     the classic siamese network
    A D that tests whether two images are equal is maximised by reproducing x0. The generator does not know
    x0, and its best answer is near a mean of all possible x0, a blurred image. The ordered kind is
    antisymmetric, D(x, y) = -D(y, x): it decides which of two images is the real one, y if D(x, y) > 0."""

    def __init__(self, backbone, kind, cond_dim=0, channels=64):
        super().__init__()
        if kind not in SIAMESE_KINDS:
            raise ValueError(f"unknown siamese discriminator '{kind}': wanted {', '.join(SIAMESE_KINDS)}")
        self.backbone, self.kind = backbone, kind
        self.is_antisymmetric = kind == "ordered"
        self.heads = backbone.make_heads(channels, channels)
        if kind in ("reference", "ordered"):
            self.heads_real = backbone.make_heads(channels, channels)
            self.cond_proj = make_cond_proj(backbone, cond_dim, channels)
        if kind == "similarity":
            self.scale = nn.Parameter(torch.tensor(4.))
            self.bias = nn.Parameter(torch.tensor(-2.))
        if kind == "difference":
            self.diff_heads = nn.ModuleList(nn.Linear(channels, 1) for _ in backbone.layers)

    def compare(self, i, x, y, disc_cond):
        """Maps of layer i, (B, D, h, w) each -> logits (B, N)."""
        h_x, h_y = self.heads[i](x), self.heads[i](y)                  # (B, N, channels)
        if self.kind == "similarity":
            return self.scale * F.cosine_similarity(h_x, h_y, dim=-1, eps=1e-6) + self.bias  # ADT similarity
        if self.kind == "difference":
            return self.diff_heads[i]((h_x - h_y).abs()).squeeze(-1).float()
        w = project_condition(self.cond_proj[i], disc_cond)[:, None] if self.cond_proj else 0.
        logits = ((self.heads_real[i](x) + w) * h_y).sum(-1)           # ADT similarity
        if self.kind == "ordered":
            logits = logits - ((self.heads_real[i](y) + w) * h_x).sum(-1)
        return logits / h_y.shape[-1] ** .5

    def forward(self, real, fake, disc_cond=None):
        """real, fake: (B, 3, H, W); disc_cond (B, cond_dim) -> one (B, N) per layer."""
        with torch.no_grad():
            maps_real = self.backbone(real)                            # a constant: it needs no graph
        maps_fake = self.backbone(fake)
        return [self.compare(i, x, y, disc_cond) for i, (x, y) in enumerate(zip(maps_real, maps_fake))]


class ProjectedDiscriminator(nn.Module):
    """ADD's discriminator: <h(y), W c> / sqrt(channels) for every layer and token. c (B, cond_dim) is the
    conditioning, W has a bias; without c a plain logit.

    It has ADT's signature D(real, fake) and ignores `real`. With relativistic=True it is siamese as well: the
    logit of `fake` minus the logit of `real` (Jolicoeur-Martineau 2018)."""

    def __init__(self, backbone, cond_dim=0, relativistic=False, channels=64):
        super().__init__()
        self.backbone = backbone
        self.relativistic = self.is_antisymmetric = relativistic
        self.heads = backbone.make_heads(channels, channels if cond_dim else 1)
        self.cond_proj = make_cond_proj(backbone, cond_dim, channels)

    def logits(self, maps, disc_cond=None):
        """maps: one (B, D, h, w) per layer; disc_cond (B, cond_dim) -> one (B, N) per layer."""
        tokens = [head(x) for head, x in zip(self.heads, maps)]        # (B, N, channels)
        if self.cond_proj:
            with torch.autocast(disc_cond.device.type, enabled=False):  # logits in fp32
                tokens = [torch.einsum("bnw,bw->bn", x, project_condition(linear, disc_cond))[..., None]
                          / x.shape[-1] ** .5 for x, linear in zip(tokens, self.cond_proj)]
        return [x.squeeze(-1) for x in tokens]

    def forward(self, real, fake, disc_cond=None):
        """real (for relativistic), fake: (B, 3, H, W); disc_cond (B, cond_dim) -> (B, N) per layer."""
        logits_fake = self.logits(self.backbone(fake), disc_cond)
        if not self.relativistic:
            return logits_fake
        with torch.no_grad():
            features_real = self.backbone(real)
        logits_real = self.logits(features_real, disc_cond)
        return [d_fake - d_real for d_fake, d_real in zip(logits_fake, logits_real)]  # ADT comparison


def update_spectral_norm(disc):
    """Update every spectral norm (two power iterations), once per step. Between steps the discriminator stays
    in eval mode and is the same function for all micro-batches."""
    disc.train()
    for module in disc.modules():
        if hasattr(module, "parametrizations"):
            _ = module.weight                                          # computing it runs the iteration
    disc.eval()


def mean_of_heads(logits, condition):
    """The fraction of tokens that fulfil a condition, averaged over heads."""
    return sum(condition(d).float().mean().item() for d in logits) / len(logits)


# -------------------------------------------------------------------------------- differentiable augmentation

def clamp_straight_through(image):
    """Clamp to [-1, 1], as a viewer sees the image; otherwise D would only look for values out of range.

    The gradient passes unchanged where it leads back into the range and is zero where it leads further out:
    such a change is invisible, and the overshoot would accumulate."""
    overshoot = (image - image.clamp(-1, 1)).detach()
    if image.requires_grad:
        image = image.view_as(image)                                   # a tensor of its own for the hook
        image.register_hook(lambda grad: torch.where(overshoot * grad < 0, 0., grad))
    return image - overshoot


def sample_aug_params(n, device=None):
    """Geometric parameters of n augmentations, uniform in [-1, 1]: translation (x, y), cutout centre (x, y)
    -> (n, 4)."""
    return torch.rand(n, 4, device=device) * 2 - 1


def augment_alike(images, config):
    """Augment one image or several, each (B, 3, H, W), for the discriminator: the same translation and cutout
    for all of them, independent colours and noise. With equal colours D could rate "identical pixels" of a
    pair; with unequal geometry its tokens would not correspond. Every call draws new numbers. -> tuple"""
    aug_params = sample_aug_params(len(images[0]), images[0].device)
    return tuple(augment(image, aug_params, config.augment_strength, config.instance_noise)
                 for image in images)


def augment(image, aug_params, strength=1.0, noise_std=0.0, cutout=True):
    """DiffAugment (Zhao et al. 2020): colour, translation and cutout, differentiable; then instance noise
    (Sonderby et al. 2016). With strength 0 and noise_std 0 it is the identity.

    image: (B, 3, H, W) · aug_params: (B, 4) from sample_aug_params. Both images of a pair get the same
    aug_params so that their tokens correspond; colours are drawn here and differ between them.
    Ours: brightness is drawn per channel, and translations by odd and by even numbers of pixels are equally
    frequent. A generator can add a constant tint, or a pattern of period two, with a single bias; if D sees
    its sign, the two oscillate around it. The largest translation is at least one pixel,
    unless strength is 0."""
    n, _, h, w = image.shape
    brightness, saturation, contrast = (
        strength * (torch.rand(n, channels, 1, 1, device=image.device) * 2 - 1) for channels in (3, 1, 1))
    image = image + .4 * brightness
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * (1 + saturation)                   # factor 0 ... 2
    mean = image.mean((1, 2, 3), keepdim=True)
    image = mean + (image - mean) * (1 + .5 * contrast)                # factor 0.5 ... 1.5
    max_shift = (torch.tensor([w, h], device=image.device) / 8 * strength).round()
    if strength > 0:
        max_shift = max_shift.clamp(min=1)
    translation = (aug_params[:, :2] * max_shift).round()              # whole pixels
    theta = torch.eye(2, 3, device=image.device).repeat(n, 1, 1)
    theta[:, :, 2] = 2 * translation / torch.tensor([w, h], device=image.device)
    with torch.autocast(image.device.type, enabled=False):             # bf16 cannot index 512 columns
        grid = F.affine_grid(theta, image.shape, align_corners=False)
    image = F.grid_sample(image, grid, mode="nearest", padding_mode="border", align_corners=False)
    if cutout and strength > 0:
        y, x = torch.meshgrid(torch.linspace(-1, 1, h, device=image.device),
                              torch.linspace(-1, 1, w, device=image.device), indexing="ij")
        cutout_dist = torch.maximum((x - aug_params[:, 2, None, None]).abs(),
                                    (y - aug_params[:, 3, None, None]).abs())
        image = image * (cutout_dist > .5 * strength)[:, None]         # side: strength / 2 of the image's
    if noise_std:
        image = image + noise_std * torch.randn_like(image)
    return image
