"""Batch, what every data set returns.

Read next: data.py"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass
class Batch:
    """Images and all that is known about them."""
    image: torch.Tensor | None                  # (B, 3, H, W) in [-1, 1]; None if moments are enough
    caption: list                               # B strings
    attributes: torch.Tensor                    # (B, A) class of each attribute, -1 where an image has none
    mentioned: torch.Tensor                     # (B, A) bool: the caption states the attribute
    # (B, 4): height and width of the original image in pixels, then rows and columns of the resized image
    # that were cut off above and on the left
    micro_cond: torch.Tensor | None = None
    # for draws that all micro-batches of a step share; None: torch's global generator
    generator: torch.Generator | None = None
    moments: torch.Tensor | None = None         # (B, 2C, h, w) of the VAE's latents, from a cache

    def __getitem__(self, rows):
        """rows: a slice."""
        image, micro_cond, moments = (None if x is None else x[rows]
                                      for x in (self.image, self.micro_cond, self.moments))
        return Batch(image, self.caption[rows], self.attributes[rows], self.mentioned[rows], micro_cond,
                     self.generator, moments)

    def pin_memory(self):
        """The images in page-locked memory, from which a GPU copies them while the CPU goes on. Grey images
        are one channel shown three times (expand), which can only be pinned as a copy."""
        image, moments = (None if x is None else x.contiguous().pin_memory()
                          for x in (self.image, self.moments))
        return replace(self, image=image, moments=moments)

    def to(self, device, resolution=None):
        """The images on a device, resized to the model's resolution (bicubic) if they are squares of another;
        other shapes are those of aspect-ratio buckets."""
        if self.moments is not None:                # of the right size, and so are the images
            image, moments = (None if x is None else x.to(device, non_blocking=x.is_pinned())
                              for x in (self.image, self.moments))
            return replace(self, image=image, moments=moments)
        image = self.image.to(device, non_blocking=self.image.is_pinned())
        is_square = image.shape[-1] == image.shape[-2]
        if resolution and is_square and resolution != image.shape[-1]:
            image = F.interpolate(image, (resolution, resolution), mode="bicubic", antialias=True)
            image = image.clamp(-1, 1)
        return Batch(image, self.caption, self.attributes, self.mentioned, self.micro_cond, self.generator)


def check_split(split, split_sizes):
    if split not in split_sizes:
        raise ValueError(f"this data set has the splits {', '.join(split_sizes)}; '{split}' is none of them")


def check_num_samples(n, split_sizes, split="test"):
    """ValueError unless n images of a split can be measured against n others."""
    if not 200 <= n <= 10 ** 6:
        raise ValueError(f"--eval-samples {n}: a Fréchet distance of 128 features needs 200 to 10^6")
    check_split(split, split_sizes)
    available = split_sizes[split]
    if available and 2 * n > available:
        raise ValueError(f"--eval-samples {n}: the {split} split has {available} images; two halves with no "
                         f"image in common hold {available // 2} at most, and 200 is the minimum")
