"""The panel: metrics in which no network of this project has a part.

The tables' classifier also chose the settings, so it may be blind to what these settings do to images. Every
metric here compares images with real ones without it:

    fd_efficientnet   Fréchet distance in features of a network trained on other images
    sw_pixel          sliced Wasserstein distance of whole images
    sw_patch          the same of 7x7 patches: texture, wherever it is
    auc               a new small CNN tells real from generated on images it was not trained on: .5 is chance
    nyquist           strength of patterns of period two, 1 is that of real images
    border            flatness of the background: std along the upper and lower border
    grain             the part of it that has period two
    nearest           distance to the nearest training image, 1 is that of unseen real images, 0 a copy
    caption_variance  variance among images of one caption, 1 is that of real images

Images are (N, 3, H, W) in [-1, 1], on any device; random numbers are drawn on the CPU, so that they are
the same everywhere. Read next: scripts/panel.py"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils.metrics import frechet_distance
from utils.precision import without_tf32

PATCH_SIZE = 7
PATCHES_PER_IMAGE = 16
NUM_DIRECTIONS = 256                                    # of the sliced Wasserstein distance


# --------------------------------------------------------------------------------- distances without networks

def sliced_wasserstein(a, b, num_directions=NUM_DIRECTIONS, seed=3):
    """Mean Wasserstein-1 distance of a (N, D) and b (N, D) projected on random unit vectors (Rabin et al.
    2011); of two sorted samples of numbers it is the mean absolute difference."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], num_directions, generator=generator).to(a.device)
    directions = F.normalize(directions, dim=0)
    projected_a, projected_b = ((x @ directions).sort(0).values for x in (a, b))
    return float((projected_a - projected_b).abs().mean())


def random_patches(images, size=PATCH_SIZE, per_image=PATCHES_PER_IMAGE, seed=5):
    """Patches at random places, the same places for every set of N images, each minus its mean colour ->
    (N * per_image, 3 * size * size). With the means the distance would measure brightness: a pattern of
    period two, amplitude .03, on every image left it unchanged."""
    generator = torch.Generator().manual_seed(seed)
    n, _, height, width = images.shape
    tops = torch.randint(height - size + 1, (n, per_image), generator=generator)
    lefts = torch.randint(width - size + 1, (n, per_image), generator=generator)
    windows = images.unfold(2, size, 1).unfold(3, size, 1)              # (N, 3, rows, columns, size, size)
    patches = windows[torch.arange(n)[:, None], :, tops, lefts]         # (N, per_image, 3, size, size)
    patches = patches - patches.mean((3, 4), keepdim=True)
    return patches.flatten(2).flatten(0, 1)


def nyquist_amplitude(images):
    """Root mean power of the image's Fourier coefficients at the highest frequency of either axis: patterns
    that repeat every two pixels, the grain of an upsampling by two."""
    power = torch.fft.fft2(images).abs().square().mean((0, 1))          # (H, W)
    height, width = power.shape
    return float(torch.cat([power[height // 2], power[:, width // 2]]).mean().sqrt())


def border_std(images):
    """Median over images of the std along the upper and lower border, mean over channels: 0 where the
    background is flat. A shape that reaches the border in some images does not change the median."""
    border = torch.cat([images[:, :, 0], images[:, :, -1]], 2)          # (N, 3, 2 W)
    return float(border.std(2).mean(1).median())


def border_grain(images):
    """Median over images of the amplitude of period two along the upper and lower border, mean over channels.
    Independent noise of standard deviation s along a border of W pixels gives .8 s / sqrt(W)."""
    border = torch.stack([images[:, :, 0], images[:, :, -1]], 2)        # (N, 3, 2, W)
    signs = torch.ones(border.shape[-1], device=border.device)
    signs[1::2] = -1
    return float((border * signs).mean(-1).abs().mean((1, 2)).median())


def thumbnails(images):
    """2x2 averages -> (N, 3 H W / 4)."""
    return torch.cat([F.avg_pool2d(chunk, 2).flatten(1) for chunk in images.split(1000)])


def nearest_distances(a, b):
    """Distance of each row of a (N, D) to the nearest row of b (M, D) -> (N,)."""
    return torch.cat([torch.cdist(chunk, b).amin(1) for chunk in a.split(250)])


def caption_variance(images, captions):
    """Variance of a pixel among the images of one caption, mean over pixels and over the captions that have
    at least two images. 0: one image per caption. ValueError if every caption has one image."""
    indices = {}
    for i, caption in enumerate(captions):
        indices.setdefault(caption, []).append(i)
    variances = [images[rows].var(0).mean() for rows in indices.values() if len(rows) > 1]
    if not variances:
        raise ValueError("variance within a caption: no caption has two images")
    return float(torch.stack(variances).mean())


# -------------------------------------------------------------------------------------- two-sample classifier

class TwoSampleCNN(nn.Module):
    """(B, 3, H, W) -> logit (B,), high for real images. It is also given what a 3x3 average removes,
    amplified: without it, a pattern of amplitude .03 was not found in 300 steps."""

    def __init__(self):
        super().__init__()
        layers = []
        for in_channels, channels in ((6, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
                       nn.LeakyReLU(.1), nn.AvgPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(64, 1)

    def forward(self, x):
        detail = x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        maps = self.layers(torch.cat([x, 8 * detail], 1))
        if self.training:                                              # dropout with the CPU's numbers
            maps = maps * torch.empty(maps.shape).bernoulli_(.8).div(.8).to(maps.device)
        return self.output(maps.mean((2, 3))).squeeze(1)


def area_under_curve(positive, negative):
    """Probability that a random element of positive (N,) is above one of negative (M,); ties count half."""
    order = torch.cat([positive, negative]).unique(return_inverse=True)[1]
    counts = torch.bincount(order).double()
    mean_rank = (counts.cumsum(0) - (counts - 1) / 2)[order]            # 1 ... N + M, the mean among ties
    n, m = len(positive), len(negative)
    return float((mean_rank[:n].sum() - n * (n + 1) / 2) / (n * m))


@without_tf32()
def two_sample_auc(real, fake, num_steps=300, batch_size=64, noise_std=.02, seed=0):
    """Classifier two-sample test (Lopez-Paz and Oquab 2017): train a new CNN on one half of real (N, …) and
    fake (N, …) -> its area under the ROC curve on the other half. .5: it finds no difference.

    noise_std: of noise on all images, so that the rounding of a value (exact white in real images) does not
    give the answer away."""
    half = min(len(real), len(fake)) // 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = TwoSampleCNN().to(real.device)
        images = torch.cat([real[:half], fake[:half]])
        labels = torch.cat([torch.ones(half), torch.zeros(half)]).to(real.device)

        def with_noise(x):
            return x + noise_std * torch.randn(x.shape).to(x.device)

        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=.01)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1., 0., num_steps)
        for _ in range(num_steps):
            rows = torch.randint(2 * half, (batch_size,))
            loss = F.binary_cross_entropy_with_logits(network(with_noise(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        network.eval()
        with torch.no_grad():
            logits = [torch.cat([network(with_noise(chunk)) for chunk in held_out[half:2 * half].split(250)])
                      for held_out in (real, fake)]
    return area_under_curve(*logits)


# -------------------------------------------------------------------------------------------------- the panel

class Panel:
    """Real images and what is computed of them once. `real_metrics` is what other real images score: the
    floor of every column."""

    def __init__(self, reference, unseen, extract_features, train=None, device="cpu"):
        """reference (N, 3, H, W): real images that others are compared with. unseen: N other real images, for
        the floor. extract_features: (N, 3, H, W) -> (N, D), of models.efficientnet. train: training images,
        for `nearest`; None if the reference is part of them. device: where all is computed."""
        self.reference = reference = reference.to(device)
        self.train = None if train is None else thumbnails(train).to(device)
        self.extract_features = extract_features
        self.features = extract_features(reference)
        self.patches = random_patches(reference)
        self.nyquist = nyquist_amplitude(reference)
        if self.train is not None:
            self.nearest = nearest_distances(thumbnails(reference), self.train).median()
        self.real_metrics = self.compute_metrics(unseen)

    def compute_metrics(self, images):
        """As many images as the reference, (N, 3, H, W) -> {metric: value}; sliced Wasserstein distances are
        times 1000."""
        if images.shape != self.reference.shape:
            raise ValueError(f"the panel compares {tuple(self.reference.shape)} real images with as many "
                             f"others, not with {tuple(images.shape)}")
        images = images.to(self.reference.device)
        patches = random_patches(images)
        scores = {"fd_efficientnet": frechet_distance(self.features, self.extract_features(images)),
                  "sw_pixel": 1000 * sliced_wasserstein(self.reference.flatten(1), images.flatten(1)),
                  "sw_patch": 1000 * sliced_wasserstein(self.patches, patches),
                  "auc": two_sample_auc(self.reference, images),
                  "nyquist": nyquist_amplitude(images) / self.nyquist,
                  "border": border_std(images),
                  "grain": border_grain(images)}
        if self.train is not None:
            distances = nearest_distances(thumbnails(images), self.train)
            scores["nearest"] = float(distances.median() / self.nearest)
        return scores
